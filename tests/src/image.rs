//! A container's root directory, made of busybox alone: enough to answer HTTP and to look at one's own network.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use overlay_agent::kernel::netns::Netns;

use crate::ExpectContext;

/// Where Debian's package busybox-static has it.
const BUSYBOX: &str = "/bin/busybox";

/// The programs of busybox that stories run.
const APPLETS: [&str; 5] = ["sh", "ip", "ping", "httpd", "sleep"];

/// How long a call may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// What a container's web server says.
pub const PAGE_BODY: &str = "a page from inside\n";

/// Makes the tree below a directory; its path.
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

/// Fetches the page of a container from inside a namespace; what went wrong as text. The busybox of some distributions cannot resolve even a
/// numeric address, so it is not asked.
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
