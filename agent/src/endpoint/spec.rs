//! What an attach asks for, checked, and the names made up for an endpoint. Pure but for the random MAC.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::EndpointError;
use crate::model::api::AttachRequest;
use crate::model::endpoint::EndpointName;
use crate::model::lease::printable;
use crate::model::{Family, Mac, Mode, PerFamily, PublishedPort};

/// The interface inside the container unless asked otherwise.
const DEFAULT_INTERFACE: &str = "eth0";

/// The longest interface name in bytes: `IFNAMSIZ` - 1 (linux/if.h).
const MAX_INTERFACE_NAME: usize = 15;

/// The longest owner in bytes.
const MAX_OWNER: usize = 256;

/// A request whose values can be right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AttachSpec {
    /// What the container gets, and where.
    pub(super) mode: AttachMode,
    /// Ports of the host that shall lead to it, sorted; no two contradict each other.
    pub(super) publish: Vec<PublishedPort>,
    /// Whether its packets' addresses are checked.
    pub(super) source_check: bool,
    /// Whether its default route leads over the overlay.
    pub(super) default_route: bool,
    /// What asks for it.
    pub(super) owner: Option<String>,
}

/// The mode of a request with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AttachMode {
    /// An interface on the bridge.
    Overlay {
        /// The namespace.
        netns: NetnsRef,
        /// The interface in it.
        interface: String,
        /// Wished addresses.
        addresses: PerFamily<IpAddr>,
        /// The wished MAC.
        mac: Option<Mac>,
    },
    /// Loopback only.
    None(NetnsRef),
    /// The host's namespace, by a path that is known where the request is served.
    Host(PathBuf),
    /// The namespace of another endpoint.
    Container(EndpointName),
}

/// A network namespace that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NetnsRef {
    /// Absolute path.
    pub(super) path: PathBuf,
    /// What tells it from a later one at the same path, as far as the kernel says.
    pub(super) id: Option<String>,
}

impl AttachSpec {
    /// Checks what can be checked without looking at the host.
    pub(super) fn from_request(request: AttachRequest) -> Result<AttachSpec, EndpointError> {
        let AttachRequest { mode, netns, interface, addresses, mac, mut publish, source_check, default_route, owner } = request;
        let unsupported = |what| EndpointError::UnsupportedInMode { what, mode: mode.clone() };
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
                return Err(unsupported(what));
            }
        }
        let attach_mode = match mode {
            Mode::Overlay => AttachMode::Overlay {
                netns: NetnsRef::from_path(netns)?,
                interface: checked_interface(interface)?,
                addresses: checked_addresses(addresses)?,
                mac: checked_mac(mac)?,
            },
            Mode::None => AttachMode::None(NetnsRef::from_path(netns)?),
            Mode::Host => AttachMode::Host(PathBuf::new()),
            Mode::Container(name) => AttachMode::Container(name),
        };
        if let Some(text) = &owner
            && (text.is_empty() || text.len() > MAX_OWNER || text.chars().any(char::is_control))
        {
            return Err(EndpointError::Owner { owner: printable(text) });
        }
        publish.sort();
        check_ports(&publish)?;
        Ok(AttachSpec {
            mode: attach_mode,
            publish,
            source_check: source_check.unwrap_or(true),
            default_route: default_route.unwrap_or(true),
            owner,
        })
    }

    /// The namespace that was asked for by path.
    pub(super) fn netns(&self) -> Option<&NetnsRef> {
        match &self.mode {
            AttachMode::Overlay { netns: site, .. } | AttachMode::None(site) => Some(site),
            AttachMode::Host(_) | AttachMode::Container(_) => None,
        }
    }

    /// The same, to be made more exact.
    pub(super) fn netns_mut(&mut self) -> Option<&mut NetnsRef> {
        match &mut self.mode {
            AttachMode::Overlay { netns: site, .. } | AttachMode::None(site) => Some(site),
            AttachMode::Host(_) | AttachMode::Container(_) => None,
        }
    }
}

impl NetnsRef {
    fn from_path(netns: Option<PathBuf>) -> Result<NetnsRef, EndpointError> {
        let netns = netns.unwrap_or_default();
        if !netns.is_absolute() || netns.as_os_str().as_encoded_bytes().contains(&0) {
            return Err(EndpointError::NetnsPath { netns: printable(&netns.to_string_lossy()) });
        }
        Ok(NetnsRef { path: netns, id: None })
    }

    /// Whether it is there, at a path that was resolved as well: the comparison by parts that paths have is some hundred times slower, and is made
    /// with each endpoint of the host.
    pub(super) fn is_at(&self, netns: &Path) -> bool {
        self.path.as_os_str() == netns.as_os_str()
    }

    /// The path without symbolic links, so that `/var/run/path/a` is `/run/path/a`; as it is where that fails, which it does for
    /// `/proc/PID/ns/net`. Looks at the file system.
    pub(super) fn resolve(&mut self, id: impl FnOnce(&Path) -> Option<String>) {
        // Also there in one spelling, without what is doubled: paths are compared byte by byte.
        self.path = self.path.canonicalize().unwrap_or_else(|_| self.path.components().collect());
        self.id = id(&self.path);
    }
}

fn checked_interface(interface: Option<String>) -> Result<String, EndpointError> {
    let interface = interface.unwrap_or_else(|| DEFAULT_INTERFACE.to_owned());
    // As dev_valid_name in the kernel's net/core/dev.c, without % (the kernel would fill in a number) and without what a terminal
    // would not show.
    let allowed = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%');
    let reserved = matches!(interface.as_str(), "." | ".." | "lo");
    if reserved || !(1..=MAX_INTERFACE_NAME).contains(&interface.len()) || !interface.bytes().all(allowed) {
        return Err(EndpointError::InterfaceName { interface: printable(&interface) });
    }
    Ok(interface)
}

fn checked_addresses(addresses: PerFamily<IpAddr>) -> Result<PerFamily<IpAddr>, EndpointError> {
    match addresses.iter().find(|(family, address)| Family::of(**address) != *family) {
        Some((family, address)) => Err(EndpointError::FamilyMismatch { address: *address, family }),
        None => Ok(addresses),
    }
}

fn checked_mac(mac: Option<Mac>) -> Result<Option<Mac>, EndpointError> {
    match mac {
        Some(mac) if !mac.is_unicast() => Err(EndpointError::MacNotUnicast { mac }),
        _ => Ok(mac),
    }
}

/// Each port can be one, and no two lead the same port of the host elsewhere: runtimes repeat a mapping, once with each address.
fn check_ports(publish: &[PublishedPort]) -> Result<(), EndpointError> {
    for (n, port) in publish.iter().enumerate() {
        port.validate()?;
        if let Some(other) = publish.iter().take(n).find(|other| other.conflicts_with(port) && !other.is_compatible_with(port)) {
            return Err(EndpointError::PublishConflict { one: *other, other: *port });
        }
    }
    Ok(())
}

/// The host's end of an endpoint's veth pair: `ove` and 11 hex digits of the name's hash, 14 characters of the kernel's 15. `attempt` counts
/// the names that turned out to be taken.
pub(super) fn veth_name(name: &EndpointName, attempt: u32) -> String {
    // FNV-1a, 64 bits: the same name has the same interface after a restart, so that one that was left behind is found again.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in name.as_str().bytes().chain(attempt.to_be_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("ove{:011x}", hash >> 20)
}

/// A random MAC, locally administered, that is none of those.
pub(super) fn free_mac(is_used: impl Fn(Mac) -> bool) -> Mac {
    loop {
        // 2^46 values: a second round is next to never needed.
        let mac = Mac::local(rand::random());
        if !is_used(mac) {
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
    fn invalid_values_are_rejected() {
        for netns in ["", "a", "./a", "run/netns/a", "/run/netns/a\0b"] {
            assert!(matches!(AttachSpec::from_request(request(netns, None)), Err(EndpointError::NetnsPath { .. })), "{netns}");
        }
        let long = "x".repeat(16);
        for interface in ["", ".", "..", "lo", "a/b", "a b", "a:1", "eth%d", "a\n", "é", "\u{1b}[0m", &long] {
            let error = AttachSpec::from_request(request("/a", Some(interface))).unwrap_err();
            assert!(matches!(error, EndpointError::InterfaceName { .. }) && !error.to_string().contains('\u{1b}'), "{interface}");
        }
        let mut swapped = request("/a", None);
        swapped.addresses.v4 = Some("fd00::5".parse().unwrap());
        assert!(matches!(AttachSpec::from_request(swapped), Err(EndpointError::FamilyMismatch { .. })));
        let interface = |spec: AttachSpec| match spec.mode {
            AttachMode::Overlay { interface, .. } => interface,
            other => panic!("{other:?}"),
        };
        assert_eq!(interface(AttachSpec::from_request(request("/a", None)).unwrap()), "eth0");
        assert_eq!(interface(AttachSpec::from_request(request("/a", Some(&long[..15]))).unwrap()).len(), 15);
    }

    #[test]
    fn options_unsupported_by_mode_are_rejected() {
        let parse = |json: &str| AttachSpec::from_request(serde_json::from_str(json).expect(json)).map_err(|e| e.to_string());
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
            (r#"{"netns": "/a", "publish": [{"host_port": 0, "container_port": 1}]}"#, "port 0 is not valid"),
            (
                r#"{"netns": "/a", "publish": [{"host_port": 80, "container_port": 1}, {"host_port": 79, "container_port": 1, "count": 2}]}"#,
                "79-80:1-2/tcp and 80:1/tcp",
            ),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.contains(what), "{json}: {error}");
        }
        for json in [r#"{"mode": "none", "netns": "/a"}"#, r#"{"mode": "host"}"#, r#"{"mode": "container:b", "owner": "x"}"#] {
            parse(json).unwrap();
        }
    }

    #[test]
    fn netns_is_identified_by_id() {
        for path in ["/proc/1/ns/net", "/run/netns/a"] {
            let mut netns = NetnsRef::from_path(Some(path.into())).unwrap();
            netns.resolve(|_| Some("7".to_owned()));
            assert_eq!(netns.id.as_deref(), Some("7"));
        }
    }

    #[test]
    fn veth_names_and_macs_are_well_formed() {
        let name: EndpointName = "c1".parse().unwrap();
        let first = veth_name(&name, 0);
        assert!(first.len() == 14 && first.starts_with("ove") && first[3..].bytes().all(|b| b.is_ascii_hexdigit()), "{first}");
        assert_eq!(first, veth_name(&name, 0));
        assert_ne!(first, veth_name(&name, 1));
        let mac = free_mac(|m| m.0[5] < 0x80);
        assert!(mac.is_unicast() && mac.0[0] & 2 == 2 && mac.0[5] >= 0x80);
    }
}
