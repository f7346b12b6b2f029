//! Reads and writes sysctls of the network namespace.
//!
//! They are files below `/proc/sys/net`. A value is read before it is written: if it is already set, nothing is written, and a
//! read-only `/proc/sys` is no error.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use crate::model::{Family, PerFamily};
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

/// The sysctls of one network namespace: its directories `ipv4` and `ipv6` below `/proc/sys/net`, held open.
///
/// `/proc/sys/net` shows the namespace of the thread that looks up a name in it. The directories below it belong to one namespace,
/// whichever thread uses them. They also save time: the kernel keeps an entry for each namespace in which `net/ipv6` was ever
/// looked up, all of one name and in one list. With hundreds of containers a lookup from the root takes several times as long.
#[derive(Debug)]
pub struct Sysctls {
    directories: PerFamily<OwnedFd>,
}

impl Sysctls {
    /// Opens the sysctls of these families in the calling thread's namespace.
    pub fn open(families: &[Family]) -> Sysctls {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = |family: &Family| {
            let name = if *family == Family::V4 { "ipv4" } else { "ipv6" };
            // A kernel without IPv6 has no such directory.
            Some((*family, open(&PathBuf::from(format!("{ROOT}/{name}")), flags, Mode::empty()).ok()?))
        };
        Sysctls { directories: families.iter().filter_map(directory).collect() }
    }

    /// Reads the value at a path below `/proc/sys/net`; `None` if there is no such file, for example without IPv6.
    pub fn read(&self, path: &str) -> Result<Option<String>, OpError> {
        match self.file(path, OFlag::O_RDONLY)?.and_then(io::read_to_string) {
            Ok(text) => Ok(Some(text.trim_end().to_owned())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(error("read", path, &e)),
        }
    }

    /// Writes a value unless the sysctl already has it.
    pub fn write(&self, path: &str, value: &str) -> Result<(), OpError> {
        let found = self.read(path)?;
        if found.as_deref() == Some(value) || (found.is_none() && value == OFF && self.is_implicitly_off(path)) {
            return Ok(());
        }
        self.overwrite(path, value)
    }

    /// Writes a value if the sysctl exists. Returns whether it does.
    pub fn write_if_exists(&self, path: &str, value: &str) -> Result<bool, OpError> {
        let found = self.read(path)?;
        if found.as_deref().is_some_and(|found| found != value) {
            self.overwrite(path, value)?;
        }
        Ok(found.is_some())
    }

    fn overwrite(&self, path: &str, value: &str) -> Result<(), OpError> {
        // Without O_CREAT: /proc/sys refuses it with a misleading EACCES if the file is missing.
        let file = self.file(path, OFlag::O_WRONLY)?;
        file.and_then(|mut file| file.write_all(value.as_bytes())).map_err(|e| error("write", path, &e))
    }

    /// Whether a missing sysctl counts as switched off. Then the kernel has no IPv6 at all (`ipv6.disable=1`), or none on an
    /// existing interface, because its MTU is below 1280 (`addrconf_notify` in `net/ipv6/addrconf.c`).
    pub fn is_implicitly_off(&self, path: &str) -> bool {
        let exists = |path: &str| self.file(path, OFlag::O_PATH).is_ok_and(|file| file.is_ok());
        let Some(rest) = path.strip_prefix("ipv6/") else { return false };
        let interface = rest.strip_prefix("conf/").and_then(|rest| rest.split_once('/')).map(|(interface, _)| interface);
        self.directories.v6.is_none()
            || interface.is_some_and(|name| !exists(&format!("ipv6/conf/{name}")) && exists(&format!("ipv4/conf/{name}")))
    }

    /// Opens the file at a path below `/proc/sys/net`.
    fn file(&self, path: &str, flags: OFlag) -> Result<io::Result<fs::File>, OpError> {
        let is_plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
        let (directory, name) = match path.split_once('/') {
            Some(("ipv4", name)) if name.split('/').all(is_plain) => (&self.directories.v4, name),
            Some(("ipv6", name)) if name.split('/').all(is_plain) => (&self.directories.v6, name),
            _ => {
                let message = format!("`{path}` is not a sysctl path below {ROOT}/ipv4 or {ROOT}/ipv6");
                return Err(OpError { errno: libc::EINVAL, message });
            }
        };
        let missing = || Err(io::Error::from_raw_os_error(libc::ENOENT));
        Ok(directory.as_ref().map_or_else(missing, |directory| {
            Ok(openat(directory, Path::new(name), flags | OFlag::O_CLOEXEC, Mode::empty())?.into())
        }))
    }
}

/// The value of a setting that is switched off.
pub const OFF: &str = "0";

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
        let sysctls = Sysctls::open(&Family::ALL);
        for path in
            ["", "ipv4", "core/somaxconn", "/etc/passwd", "../../etc/passwd", "ipv4/../../../etc", "ipv4//x", "ipv4/.", "ipv4/\0"]
        {
            assert_eq!(sysctls.read(path).expect_err(path).errno, libc::EINVAL, "{path:?}");
        }
        assert_eq!(sysctls.read("ipv4/no_such_thing"), Ok(None));
        let error = sysctls.write("ipv4/no_such_thing", "1").expect_err("missing");
        assert!(error.message.contains("no such setting"), "{error}");
    }
}
