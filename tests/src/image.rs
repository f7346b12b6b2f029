//! A container's root directory with busybox only: enough for HTTP and network diagnosis.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use overlay_agent::kernel::netns::Netns;

use crate::ExpectContext;

/// The path in Debian's package busybox-static.
const BUSYBOX: &str = "/bin/busybox";

/// The busybox applets that tests run.
const APPLETS: [&str; 5] = ["sh", "ip", "ping", "httpd", "sleep"];

/// Time limit of a request.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// The web server's page in a container.
pub const PAGE_BODY: &str = "a page from inside\n";

/// Creates the tree below a directory; returns its path.
pub fn build_rootfs(dir: &Path) -> PathBuf {
    let root = dir.join("rootfs");
    for name in ["bin", "etc", "proc", "sys", "dev", "tmp", "www"] {
        fs::create_dir_all(root.join(name)).expect_ok("make the container's tree");
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).expect_ok("busybox (apt-get install busybox-static)");
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).expect_ok(applet);
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n").expect_ok("passwd");
    fs::write(root.join("www/page"), PAGE_BODY).expect_ok("the page");
    root
}

/// Fetches a container's page from inside a namespace; an error is text. It does not use busybox, because some distributions'
/// busybox cannot resolve even a numeric address.
pub fn fetch_page(from: &Netns, to: IpAddr) -> Result<String, String> {
    let call = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to, 80), FETCH_TIMEOUT)?;
        stream.set_read_timeout(Some(FETCH_TIMEOUT))?;
        stream.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = from.run(call).map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).ok_or(answer)
}
