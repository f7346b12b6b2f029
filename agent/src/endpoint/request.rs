//! What an attach asks for, checked, and the names made up for an endpoint. Pure but for the random MAC.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::EndpointError;
use crate::model::api::AttachRequest;
use crate::model::endpoint::EndpointName;
use crate::model::lease::printable;
use crate::model::{Family, Mac, Mode, PerFamily, Publish};

/// The interface inside the container unless asked otherwise.
const DEFAULT_INTERFACE: &str = "eth0";

/// The longest interface name in bytes: `IFNAMSIZ` - 1 (linux/if.h).
const LONGEST_INTERFACE: usize = 15;

/// The longest owner in bytes.
const LONGEST_OWNER: usize = 256;

/// A request whose values can be right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wish {
    /// What the container gets, and where.
    pub(super) place: Place,
    /// Ports of the host that shall lead to it, sorted; no two contradict each other.
    pub(super) publish: Vec<Publish>,
    /// Whether its packets' addresses are checked.
    pub(super) source_check: bool,
    /// Whether its default route leads over the overlay.
    pub(super) default_route: bool,
    /// What asks for it.
    pub(super) owner: Option<String>,
}

/// The mode of a request with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// An interface on the bridge.
    Overlay {
        /// The namespace.
        site: Site,
        /// The interface in it.
        interface: String,
        /// Wished addresses.
        addresses: PerFamily<IpAddr>,
        /// The wished MAC.
        mac: Option<Mac>,
    },
    /// Loopback only.
    None(Site),
    /// The host's namespace, by a path that is known where the request is served.
    Host(PathBuf),
    /// The namespace of another endpoint.
    Container(EndpointName),
}

/// A network namespace that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Site {
    /// Absolute path.
    pub(super) netns: PathBuf,
    /// What tells it from a later one at the same path, as far as the kernel says.
    pub(super) id: Option<String>,
}

impl Wish {
    /// Checks what can be checked without looking at the host.
    pub(super) fn check(request: AttachRequest) -> Result<Wish, EndpointError> {
        let AttachRequest { mode, netns, interface, addresses, mac, mut publish, source_check, default_route, owner } = request;
        let unfit = |what| EndpointError::NotInMode { what, mode: mode.clone() };
        if mode != Mode::Overlay {
            let given = [
                (interface.is_some(), "an interface"),
                (!addresses.is_empty(), "a wished address"),
                (mac.is_some(), "a wished MAC"),
                (!publish.is_empty(), "published ports"),
                (source_check.is_some(), "a source check"),
                (default_route.is_some(), "a default route"),
                (netns.is_some() && mode != Mode::None, "a network namespace"),
            ];
            if let Some((_, what)) = given.into_iter().find(|(given, _)| *given) {
                return Err(unfit(what));
            }
        }
        let place = match mode {
            Mode::Overlay => Place::Overlay {
                site: Site::check(netns)?,
                interface: checked_interface(interface)?,
                addresses: checked_addresses(addresses)?,
                mac: checked_mac(mac)?,
            },
            Mode::None => Place::None(Site::check(netns)?),
            Mode::Host => Place::Host(PathBuf::new()),
            Mode::Container(name) => Place::Container(name),
        };
        if let Some(text) = &owner
            && (text.is_empty() || text.len() > LONGEST_OWNER || text.chars().any(char::is_control))
        {
            return Err(EndpointError::Owner { owner: printable(text) });
        }
        publish.sort();
        check_ports(&publish)?;
        Ok(Wish {
            place,
            publish,
            source_check: source_check.unwrap_or(true),
            default_route: default_route.unwrap_or(true),
            owner,
        })
    }

    /// The namespace that was asked for by path.
    pub(super) fn site(&self) -> Option<&Site> {
        match &self.place {
            Place::Overlay { site, .. } | Place::None(site) => Some(site),
            Place::Host(_) | Place::Container(_) => None,
        }
    }

    /// The same, to be made more exact.
    pub(super) fn site_mut(&mut self) -> Option<&mut Site> {
        match &mut self.place {
            Place::Overlay { site, .. } | Place::None(site) => Some(site),
            Place::Host(_) | Place::Container(_) => None,
        }
    }
}

impl Site {
    fn check(netns: Option<PathBuf>) -> Result<Site, EndpointError> {
        let netns = netns.unwrap_or_default();
        if !netns.is_absolute() || netns.as_os_str().as_encoded_bytes().contains(&0) {
            return Err(EndpointError::NetnsPath { netns: printable(&netns.to_string_lossy()) });
        }
        Ok(Site { netns, id: None })
    }

    /// Whether it is there, at a path that was resolved as well: the comparison by parts that paths have is some hundred times slower, and is made
    /// with each endpoint of the host.
    pub(super) fn is_at(&self, netns: &Path) -> bool {
        self.netns.as_os_str() == netns.as_os_str()
    }

    /// The path without symbolic links, so that `/var/run/netns/a` is `/run/netns/a`; as it is where that fails, which it does for
    /// `/proc/PID/ns/net`. Looks at the file system.
    pub(super) fn resolve(&mut self, id: impl FnOnce(&Path) -> Option<String>) {
        // Also there in one spelling, without what is doubled: paths are compared byte by byte.
        self.netns = self.netns.canonicalize().unwrap_or_else(|_| self.netns.components().collect());
        self.id = id(&self.netns);
    }
}

fn checked_interface(interface: Option<String>) -> Result<String, EndpointError> {
    let interface = interface.unwrap_or_else(|| DEFAULT_INTERFACE.to_owned());
    // As dev_valid_name in the kernel's net/core/dev.c, without % (the kernel would fill in a number) and without what a terminal
    // would not show.
    let allowed = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%');
    let taken = matches!(interface.as_str(), "." | ".." | "lo");
    if taken || !(1..=LONGEST_INTERFACE).contains(&interface.len()) || !interface.bytes().all(allowed) {
        return Err(EndpointError::InterfaceName { interface: printable(&interface) });
    }
    Ok(interface)
}

fn checked_addresses(addresses: PerFamily<IpAddr>) -> Result<PerFamily<IpAddr>, EndpointError> {
    match addresses.iter().find(|(family, address)| Family::of(**address) != *family) {
        Some((family, address)) => Err(EndpointError::WishFamily { address: *address, family }),
        None => Ok(addresses),
    }
}

fn checked_mac(mac: Option<Mac>) -> Result<Option<Mac>, EndpointError> {
    match mac {
        Some(mac) if !mac.is_unicast() => Err(EndpointError::MacGroup { mac }),
        _ => Ok(mac),
    }
}

/// Each port can be one, and no two lead the same port of the host elsewhere: runtimes repeat a mapping, once with each address.
fn check_ports(publish: &[Publish]) -> Result<(), EndpointError> {
    for (n, port) in publish.iter().enumerate() {
        port.check()?;
        if let Some(other) = publish.iter().take(n).find(|other| other.collides(port) && !other.agrees(port)) {
            return Err(EndpointError::PublishTwice { one: *other, other: *port });
        }
    }
    Ok(())
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
        let interface = |wish: Wish| match wish.place {
            Place::Overlay { interface, .. } => interface,
            other => panic!("{other:?}"),
        };
        assert_eq!(interface(Wish::check(request("/a", None)).unwrap()), "eth0");
        assert_eq!(interface(Wish::check(request("/a", Some(&long[..15]))).unwrap()).len(), 15);
    }

    #[test]
    fn what_a_mode_has_not_is_refused() {
        let asked = |json: &str| Wish::check(serde_json::from_str(json).expect(json)).map_err(|e| e.to_string());
        for (json, what) in [
            (r#"{"mode": "none", "netns": "/a", "interface": "eth0"}"#, "mode none has no place for an interface"),
            (r#"{"mode": "none", "netns": "/a", "publish": [{"host_port": 1, "container_port": 1}]}"#, "for published ports"),
            (r#"{"mode": "none", "netns": "/a", "addresses": {"v4": "10.0.0.1"}}"#, "for a wished address"),
            (r#"{"mode": "none"}"#, "is not an absolute path"),
            (r#"{"mode": "host", "netns": "/a"}"#, "mode host has no place for a network namespace"),
            (r#"{"mode": "container:b", "netns": "/a"}"#, "mode container:b has no place for a network namespace"),
            (r#"{"mode": "host", "source_check": false}"#, "for a source check"),
            (r#"{"mode": "none", "netns": "/a", "default_route": false}"#, "for a default route"),
            (r#"{"netns": "/a", "owner": "a\u001b[0m"}"#, "is no owner"),
            (r#"{"netns": "/a", "owner": ""}"#, "is no owner"),
            (r#"{"netns": "/a", "publish": [{"host_port": 0, "container_port": 1}]}"#, "port 0 is none"),
            (
                r#"{"netns": "/a", "publish": [{"host_port": 80, "container_port": 1}, {"host_port": 79, "container_port": 1, "count": 2}]}"#,
                "79-80:1-2/tcp and 80:1/tcp",
            ),
        ] {
            let error = asked(json).unwrap_err();
            assert!(error.contains(what), "{json}: {error}");
        }
        for json in [r#"{"mode": "none", "netns": "/a"}"#, r#"{"mode": "host"}"#, r#"{"mode": "container:b", "owner": "x"}"#] {
            asked(json).unwrap();
        }
    }

    #[test]
    fn a_namespace_is_known_by_more_than_its_path() {
        for path in ["/proc/1/ns/net", "/run/netns/a"] {
            let mut site = Site::check(Some(path.into())).unwrap();
            site.resolve(|_| Some("7".to_owned()));
            assert_eq!(site.id.as_deref(), Some("7"));
        }
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
