//! What an attach asks for, checked, and the names made up for an endpoint. Pure but for the random MAC.

use std::net::IpAddr;
use std::path::PathBuf;

use super::EndpointError;
use crate::model::api::AttachRequest;
use crate::model::endpoint::EndpointName;
use crate::model::lease::printable;
use crate::model::{Family, Mac, PerFamily};

/// The interface inside the container unless asked otherwise.
const DEFAULT_INTERFACE: &str = "eth0";

/// The longest interface name in bytes: `IFNAMSIZ` - 1 (linux/if.h).
const LONGEST_INTERFACE: usize = 15;

/// A request whose values can be right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wish {
    /// Absolute path of the namespace.
    pub(super) netns: PathBuf,
    /// The interface in it.
    pub(super) interface: String,
    /// Wished addresses.
    pub(super) addresses: PerFamily<IpAddr>,
}

impl Wish {
    /// Checks what can be checked without looking at the host.
    pub(super) fn check(request: AttachRequest) -> Result<Wish, EndpointError> {
        let AttachRequest { netns, interface, addresses, .. } = request;
        let netns = netns.unwrap_or_default();
        if !netns.is_absolute() || netns.as_os_str().as_encoded_bytes().contains(&0) {
            return Err(EndpointError::NetnsPath { netns: printable(&netns.to_string_lossy()) });
        }
        let interface = interface.unwrap_or_else(|| DEFAULT_INTERFACE.to_owned());
        // As dev_valid_name in the kernel's net/core/dev.c, without % (the kernel would fill in a number) and without what a terminal
        // would not show.
        let allowed = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%');
        let taken = matches!(interface.as_str(), "." | ".." | "lo");
        if taken || !(1..=LONGEST_INTERFACE).contains(&interface.len()) || !interface.bytes().all(allowed) {
            return Err(EndpointError::InterfaceName { interface: printable(&interface) });
        }
        if let Some((family, address)) = addresses.iter().find(|(family, address)| Family::of(**address) != *family) {
            return Err(EndpointError::WishFamily { address: *address, family });
        }
        Ok(Wish { netns, interface, addresses })
    }

    /// The path without symbolic links, so that `/var/run/netns/a` is `/run/netns/a`; as it is where that fails, which it does for
    /// `/proc/PID/ns/net`. Looks at the file system.
    pub(super) fn resolve(&mut self) {
        if let Ok(path) = self.netns.canonicalize() {
            self.netns = path;
        }
    }
}

/// The host's end of an endpoint's veth pair: `ove` and 11 hex digits of the name's hash, 14 characters of the kernel's 15. `attempt` counts
/// the names that turned out to be taken.
pub(super) fn host_interface(name: &EndpointName, attempt: u32) -> String {
    // FNV-1a, 64 bits: the same name has the same interface after a restart, so that one that was left behind is found again.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in name.as_str().bytes().chain(attempt.to_be_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("ove{:011x}", hash >> 20)
}

/// A random MAC, locally administered, that is none of those.
pub(super) fn free_mac(taken: impl Fn(Mac) -> bool) -> Mac {
    loop {
        // 2^46 values: a second round is next to never needed.
        let mac = Mac::local(rand::random());
        if !taken(mac) {
            return mac;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(netns: &str, interface: Option<&str>) -> AttachRequest {
        AttachRequest { netns: Some(netns.into()), interface: interface.map(str::to_owned), ..AttachRequest::default() }
    }

    #[test]
    fn values_that_cannot_be_right_are_refused() {
        for netns in ["", "a", "./a", "run/netns/a", "/run/netns/a\0b"] {
            assert!(matches!(Wish::check(request(netns, None)), Err(EndpointError::NetnsPath { .. })), "{netns}");
        }
        let long = "x".repeat(16);
        for interface in ["", ".", "..", "lo", "a/b", "a b", "a:1", "eth%d", "a\n", "é", "\u{1b}[0m", &long] {
            let error = Wish::check(request("/a", Some(interface))).unwrap_err();
            assert!(matches!(error, EndpointError::InterfaceName { .. }) && !error.to_string().contains('\u{1b}'), "{interface}");
        }
        let mut swapped = request("/a", None);
        swapped.addresses.v4 = Some("fd00::5".parse().unwrap());
        assert!(matches!(Wish::check(swapped), Err(EndpointError::WishFamily { .. })));
        assert_eq!(Wish::check(request("/a", None)).unwrap().interface, "eth0");
        assert_eq!(Wish::check(request("/a", Some(&long[..15]))).unwrap().interface.len(), 15);
    }

    #[test]
    fn made_up_names() {
        let name: EndpointName = "c1".parse().unwrap();
        let first = host_interface(&name, 0);
        assert!(first.len() == 14 && first.starts_with("ove") && first[3..].bytes().all(|b| b.is_ascii_hexdigit()), "{first}");
        assert_eq!(first, host_interface(&name, 0));
        assert_ne!(first, host_interface(&name, 1));
        let mac = free_mac(|m| m.0[5] < 0x80);
        assert!(mac.is_unicast() && mac.0[0] & 2 == 2 && mac.0[5] >= 0x80);
    }
}
