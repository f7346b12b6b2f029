//! Reads and writes sysctls of the network namespace.
//!
//! They are files below `/proc/sys/net`, which shows the namespace of the thread that opens them. A value is read before it is
//! written: if it is already set, nothing is written, and a read-only `/proc/sys` is no error.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use crate::plan::OpError;

const ROOT: &str = "/proc/sys/net";

/// Path of `accept_ra`: whether an interface takes addresses and routes from router advertisements.
pub fn accept_ra(interface: &str) -> String {
    format!("ipv6/conf/{interface}/accept_ra")
}

/// Path of `ndisc_notify`: whether an interface announces its IPv6 addresses by unsolicited neighbour advertisements when its MAC
/// is set or it comes up.
pub fn ndisc_notify(interface: &str) -> String {
    format!("ipv6/conf/{interface}/ndisc_notify")
}

/// Path of `addr_gen_mode`: how an interface generates its link-local address. 1 is not at all (`enum in6_addr_gen_mode` in
/// `linux/if_link.h`).
pub fn addr_gen_mode(interface: &str) -> String {
    format!("ipv6/conf/{interface}/addr_gen_mode")
}

/// Path of `disable_ipv6`: switching it on removes all IPv6 addresses of the interface.
pub fn disable_ipv6(interface: &str) -> String {
    format!("ipv6/conf/{interface}/disable_ipv6")
}

/// Path of `route_localnet`: whether packets from and to 127.0.0.0/8 may pass an interface.
pub fn route_localnet(interface: &str) -> String {
    format!("ipv4/conf/{interface}/route_localnet")
}

/// Reads the value at a path below `/proc/sys/net`; `None` if there is no such file, for example without IPv6.
pub fn read(path: &str) -> Result<Option<String>, OpError> {
    read_file(fs::File::open(sysctl_path(path)?), path)
}

/// Reads a sysctl's file; `None` if it does not exist.
fn read_file(file: io::Result<fs::File>, path: &str) -> Result<Option<String>, OpError> {
    match file.and_then(io::read_to_string) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(error("read", path, &e)),
    }
}

/// Writes a value unless the sysctl already has it.
pub fn write(path: &str, value: &str) -> Result<(), OpError> {
    let found = read(path)?;
    if found.as_deref() == Some(value) || (found.is_none() && value == OFF && is_implicitly_off(path)) {
        return Ok(());
    }
    overwrite(path, value)
}

fn overwrite(path: &str, value: &str) -> Result<(), OpError> {
    // Without O_CREAT: /proc/sys refuses it with a misleading EACCES if the file is missing.
    write_file(fs::File::options().write(true).open(sysctl_path(path)?), path, value)
}

fn write_file(file: io::Result<fs::File>, path: &str, value: &str) -> Result<(), OpError> {
    file.and_then(|mut file| file.write_all(value.as_bytes())).map_err(|e| error("write", path, &e))
}

/// The directory of one namespace's IPv6 interface settings, held open. The kernel keeps an entry for each namespace in which
/// `net/ipv6` was ever looked up, all of one name and in one list. With hundreds of containers a lookup from the root takes
/// several times as long.
#[derive(Debug)]
pub struct Ipv6ConfDir(Option<OwnedFd>);

impl Ipv6ConfDir {
    /// Opens the directory of the calling thread's namespace.
    pub fn open() -> Ipv6ConfDir {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        // A kernel without IPv6 has no such directory.
        Ipv6ConfDir(open(&PathBuf::from(format!("{ROOT}/ipv6/conf")), flags, Mode::empty()).ok())
    }

    /// Makes an interface ignore router advertisements. Returns whether it has IPv6 at all.
    pub fn disable_accept_ra(&self, interface: &str) -> Result<bool, OpError> {
        let Some(directory) = &self.0 else { return Ok(false) };
        let path = accept_ra(interface);
        let file = |flags: OFlag| {
            let name = PathBuf::from(format!("{interface}/accept_ra"));
            Ok(openat(directory, &name, flags | OFlag::O_CLOEXEC, Mode::empty())?.into())
        };
        let Some(now) = read_file(file(OFlag::O_RDONLY), &path)? else { return Ok(false) };
        if now != OFF {
            write_file(file(OFlag::O_WRONLY), &path, OFF)?;
        }
        Ok(true)
    }
}

/// The value of a setting that is switched off.
pub const OFF: &str = "0";

/// Whether a missing sysctl counts as switched off. Then the kernel has no IPv6 at all (`ipv6.disable=1`), or none on an existing
/// interface, because its MTU is below 1280 (`addrconf_notify` in `net/ipv6/addrconf.c`).
pub fn is_implicitly_off(path: &str) -> bool {
    let exists = |path: &str| PathBuf::from(format!("{ROOT}/{path}")).exists();
    let Some(rest) = path.strip_prefix("ipv6/") else { return false };
    let interface = rest.strip_prefix("conf/").and_then(|rest| rest.split_once('/')).map(|(interface, _)| interface);
    !exists("ipv6") || interface.is_some_and(|name| !exists(&format!("ipv6/conf/{name}")) && exists(&format!("ipv4/conf/{name}")))
}

/// Writes a value if the sysctl exists.
pub fn write_if_exists(path: &str, value: &str) -> Result<(), OpError> {
    match read(path)? {
        Some(found) if found != value => overwrite(path, value),
        _ => Ok(()),
    }
}

fn sysctl_path(path: &str) -> Result<PathBuf, OpError> {
    let is_plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    if !path.split('/').all(is_plain) {
        let message = format!("`{path}` is not a sysctl path below {ROOT}");
        return Err(OpError { errno: libc::EINVAL, message });
    }
    Ok(PathBuf::from(format!("{ROOT}/{path}")))
}

fn error(verb: &str, path: &str, error: &io::Error) -> OpError {
    let remedy = match error.raw_os_error() {
        Some(libc::EROFS | libc::EACCES | libc::EPERM) => {
            format!("; set net.{} on the host, or run the agent where /proc/sys is writable", path.replace('/', "."))
        }
        Some(libc::ENOENT) => "; the kernel has no such setting (is IPv6 switched off, or the interface gone?)".to_owned(),
        _ => String::new(),
    };
    OpError { errno: error.raw_os_error().unwrap_or_default(), message: format!("cannot {verb} {ROOT}/{path}: {error}{remedy}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_outside_root_are_rejected() {
        for path in ["", "/etc/passwd", "../../etc/passwd", "ipv4/../../../etc", "ipv4//x", "ipv4/.", "ipv4/\0"] {
            assert_eq!(read(path).expect_err(path).errno, libc::EINVAL, "{path:?}");
        }
        assert_eq!(read("ipv4/no_such_thing"), Ok(None));
        let error = write("ipv4/no_such_thing", "1").expect_err("missing");
        assert!(error.message.contains("no such setting"), "{error}");
    }
}
