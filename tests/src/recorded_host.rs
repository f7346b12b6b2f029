//! Rebuilds a host that an earlier release ran, from its recorded state below `tests/fixtures/releases`.
//!
//! `tests/fixtures/releases/README.md` describes the files. `@c1@` in them is the name of a container's namespace and `@id:c1@`
//! its identity, which differ in each lab.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use overlay_agent::kernel::netns::Netns;

use crate::{ExpectContext, TestLab, etcd, kernel};

/// The recorded host, its peer, and the host's containers.
pub const HOST: &str = "h1";
/// The other host of the recording: only its identity is recorded, because the agent makes its entries again.
pub const PEER: &str = "h2";
/// The recorded host's containers; the second one has published ports.
pub const CONTAINERS: [&str; 2] = ["c1", "web"];

/// Seconds that the recorded lease in etcd lives; the agent renews it.
const LEASE_SECONDS: u32 = 86_400;
/// `NLMSG_ERROR` of `linux/netlink.h`.
const NLMSG_ERROR: u16 = 2;

/// Rebuilds the kernel state, the state directory and the lease of [`HOST`], and gives [`PEER`] its identity. The lab has no
/// running agents, and both families.
pub fn rebuild(lab: &TestLab, release: &str) {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/releases").join(release);
    let containers = CONTAINERS.map(|name| {
        let namespace = lab.layout().namespace(&format!("{HOST}-{name}"));
        (name, Netns::create(&namespace).expect_ok(&namespace), namespace)
    });
    let read = |file: &str| {
        let text = fs::read_to_string(fixture.join(file)).expect_ok(file);
        containers.iter().fold(text, |text, (name, netns, namespace)| {
            text.replace(&format!("@{name}@"), namespace).replace(&format!("@id:{name}@"), &netns.id().expect_ok(name))
        })
    };
    let batch = |target: &str, program: &str, file: &str| {
        let path = lab.dir().join(file);
        fs::write(&path, read(file)).expect_ok(file);
        kernel::run(lab, target, &[program, "-batch", &path.to_string_lossy()]);
    };
    batch(HOST, "ip", "host.ip");
    batch(HOST, "bridge", "host.bridge");
    for name in CONTAINERS {
        batch(&format!("{HOST}-{name}"), "ip", &format!("{name}.ip"));
    }
    let sysctls: String = read("sysctls").lines().map(|line| format!("sysctl -qw 'net/{}'\n", line.replace(' ', "="))).collect();
    kernel::shell(lab, HOST, &sysctls);
    load_rules(&lab.open_netns(HOST), &read("rules.hex"));
    for (host, directory) in [(HOST, "state"), (PEER, "peer")] {
        let state = lab.host(host).state_dir();
        fs::create_dir_all(&state).expect_ok("the state directory");
        for entry in fs::read_dir(fixture.join(directory)).expect_ok(directory) {
            let name = entry.expect_ok("an entry").file_name().to_string_lossy().into_owned();
            write_private(&state.join(&name), &read(&format!("{directory}/{name}")));
        }
    }
    let lease = read("lease");
    let (key, value) = lease.trim_end().split_once('\n').expect_ok("a key and its value");
    etcd::put_leased(lab, key, value, &etcd::grant(lab, LEASE_SECONDS));
}

fn write_private(path: &Path, text: &str) {
    fs::write(path, text).expect_ok(&path.display().to_string());
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect_ok("the mode of a state file");
}

/// Sends the recorded nf_tables transaction: one message in hexadecimal digits per line. `nft -f` cannot load some of the rules,
/// because it has no syntax for a field of the inner packet as a part of a set's key.
fn load_rules(netns: &Netns, text: &str) {
    let mut bytes = Vec::new();
    for line in text.lines() {
        let digits = |at: usize| u8::from_str_radix(line.get(at..at + 2)?, 16).ok();
        bytes.extend((0..line.len()).step_by(2).map(|at| digits(at).expect_ok("two hexadecimal digits")));
        // NLMSG_ALIGN of linux/netlink.h.
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    let run = || -> nix::Result<Vec<i32>> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_NONBLOCK, SockProtocol::NetlinkNetFilter)?;
        // The kernel handles the transaction before send() returns, and has queued an answer for each wrong message.
        send(fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let (mut errors, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
        loop {
            match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => errors.extend(buffer.get(..length).and_then(error_of).filter(|errno| *errno != 0)),
                Err(Errno::EAGAIN) => return Ok(errors),
                Err(errno) => return Err(errno),
            }
        }
    };
    let errors = netns.run(run).expect_ok("enter the host").expect_ok("nf_tables");
    assert!(errors.is_empty(), "the kernel refuses recorded rules: {errors:?}");
}

/// The error number of an `NLMSG_ERROR` message (`struct nlmsgerr`).
fn error_of(message: &[u8]) -> Option<i32> {
    let code = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    let errno = i32::from_ne_bytes(message.get(16..20)?.try_into().ok()?);
    (code == NLMSG_ERROR).then_some(errno)
}
