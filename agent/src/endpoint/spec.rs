//! Validated attach requests, and generated names and MACs of endpoints. Pure except for the random MAC.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::EndpointError;
use crate::model::api::AttachRequest;
use crate::model::endpoint::EndpointName;
use crate::model::text::printable;
use crate::model::{Cidr, Device, Family, Mac, Mode, NetworkName, PerFamily, PublishedPort, Subnet};

/// Default name of the interface in the container.
const DEFAULT_INTERFACE: &str = "eth0";

/// Maximum length of an interface name in bytes: `IFNAMSIZ` - 1 (linux/if.h).
const MAX_INTERFACE_NAME: usize = 15;

/// Maximum length of an owner in bytes.
const MAX_OWNER: usize = 256;

/// The network that this host's containers are attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointNetwork {
    /// The host's subnet.
    pub subnet: Subnet,
    /// The ranges of the whole overlay network, which contain the subnet.
    pub networks: PerFamily<Cidr>,
    /// The bridge.
    pub bridge: Device,
    /// The overlay's MTU in bytes.
    pub mtu: u32,
    /// Whether Docker uses a part of the subnet ([`crate::model::DockerShare`]).
    pub docker: bool,
}

/// An attach request with valid values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AttachSpec {
    /// The mode, with its namespace and options.
    pub(super) mode: AttachMode,
    /// Published ports, sorted; no two conflict.
    pub(super) publish: Vec<PublishedPort>,
    /// Whether the source addresses of its packets are checked.
    pub(super) source_check: bool,
    /// Whether it gets a default route over the overlay.
    pub(super) default_route: bool,
    /// The runtime or plugin that manages the endpoint.
    pub(super) owner: Option<String>,
}

/// The mode of a request, with its options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AttachMode {
    /// An interface on the bridge.
    Overlay {
        /// The namespace.
        netns: NetnsRef,
        /// The interface in it.
        interface: String,
        /// Requested addresses.
        addresses: PerFamily<IpAddr>,
        /// The requested MAC.
        mac: Option<Mac>,
    },
    /// Loopback only.
    None(NetnsRef),
    /// The host's namespace; its path is filled in by the agent.
    Host(PathBuf),
    /// The namespace of another endpoint.
    Container(EndpointName),
}

/// A requested network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NetnsRef {
    /// Absolute path.
    pub(super) path: PathBuf,
    /// Id that distinguishes it from a later namespace at the same path; `None` if the kernel has none.
    pub(super) id: Option<String>,
}

impl AttachSpec {
    /// Validates a request, as far as that is possible without the host's state.
    pub(super) fn from_request(request: AttachRequest) -> Result<AttachSpec, EndpointError> {
        let AttachRequest { mode, netns, interface, addresses, mac, mut publish, source_check, default_route, owner } = request;
        let unsupported = |what| EndpointError::UnsupportedInMode { what, mode: mode.clone() };
        if mode != Mode::Overlay {
            let options = [
                (interface.is_some(), "an interface"),
                (!addresses.is_empty(), "an address"),
                (mac.is_some(), "a MAC"),
                (!publish.is_empty(), "published ports"),
                (source_check.is_some(), "a source check"),
                (default_route.is_some(), "a default route"),
                (netns.is_some() && mode != Mode::None, "a network namespace"),
            ];
            if let Some((_, what)) = options.into_iter().find(|(is_given, _)| *is_given) {
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

    /// The namespace, if the request names it by path.
    pub(super) fn netns(&self) -> Option<&NetnsRef> {
        match &self.mode {
            AttachMode::Overlay { netns: site, .. } | AttachMode::None(site) => Some(site),
            AttachMode::Host(_) | AttachMode::Container(_) => None,
        }
    }

    /// The same, mutable, so that its path can be resolved.
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

    /// Whether it has the path `netns`, which has to be resolved too. Compares bytes, since the component-wise comparison of
    /// paths is some hundred times slower, and an attach compares with each endpoint of the host.
    pub(super) fn is_at(&self, netns: &Path) -> bool {
        self.path.as_os_str() == netns.as_os_str()
    }

    /// Resolves symbolic links in the path, so that `/var/run/netns/a` becomes `/run/netns/a`. The path stays unchanged if that
    /// fails, as it does for `/proc/PID/ns/net`. Reads the file system.
    pub(super) fn resolve(&mut self, id: impl FnOnce(&Path) -> Option<String>) {
        // The fallback is normalized too (no duplicate slashes), because paths are compared byte by byte.
        self.path = self.path.canonicalize().unwrap_or_else(|_| self.path.components().collect());
        self.id = id(&self.path);
    }
}

fn checked_interface(interface: Option<String>) -> Result<String, EndpointError> {
    let interface = interface.unwrap_or_else(|| DEFAULT_INTERFACE.to_owned());
    // As dev_valid_name in the kernel's net/core/dev.c, but without % (the kernel would insert a number) and without unprintable
    // characters.
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

/// Checks that each port is valid, and that no two map the same host port to different targets. Compatible repetitions are
/// allowed, since runtimes repeat a mapping with each address.
fn check_ports(publish: &[PublishedPort]) -> Result<(), EndpointError> {
    for (n, port) in publish.iter().enumerate() {
        port.validate()?;
        if let Some(other) = publish.iter().take(n).find(|other| other.conflicts_with(port) && !other.is_compatible_with(port)) {
            return Err(EndpointError::PublishConflict { one: *other, other: *port });
        }
    }
    Ok(())
}

/// Name of the host end of an endpoint's veth pair: `ove` and 11 hex digits of the name's hash, 14 of the kernel's 15 characters.
/// In a named network the hash is of `NETWORK/NAME`, since networks share the host's namespace. `attempt` counts the names that
/// were in use already.
pub(super) fn veth_name(network: &NetworkName, name: &EndpointName, attempt: u32) -> String {
    let prefix = if network.is_default() { ["", ""] } else { [network.as_str(), "/"] };
    let text = prefix.into_iter().chain([name.as_str()]).flat_map(str::bytes);
    // FNV-1a, 64 bits: a name has the same interface after a restart, so that a leftover interface is found again.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in text.chain(attempt.to_be_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("ove{:011x}", hash >> 20)
}

/// A random, locally administered MAC that is not in use.
pub(super) fn free_mac(is_used: impl Fn(Mac) -> bool) -> Mac {
    loop {
        // 2^46 values: a second iteration is very rare.
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
            (r#"{"mode": "none", "netns": "/a", "interface": "eth0"}"#, "mode none does not support an interface"),
            (
                r#"{"mode": "none", "netns": "/a", "publish": [{"host_port": 1, "container_port": 1}]}"#,
                "does not support published ports",
            ),
            (r#"{"mode": "none", "netns": "/a", "addresses": {"v4": "10.0.0.1"}}"#, "does not support an address"),
            (r#"{"mode": "none"}"#, "is not an absolute path"),
            (r#"{"mode": "host", "netns": "/a"}"#, "mode host does not support a network namespace"),
            (r#"{"mode": "container:b", "netns": "/a"}"#, "mode container:b does not support a network namespace"),
            (r#"{"mode": "host", "source_check": false}"#, "does not support a source check"),
            (r#"{"mode": "none", "netns": "/a", "default_route": false}"#, "does not support a default route"),
            (r#"{"netns": "/a", "owner": "a\u001b[0m"}"#, "invalid owner"),
            (r#"{"netns": "/a", "owner": ""}"#, "invalid owner"),
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
        let network = NetworkName::default();
        let first = veth_name(&network, &name, 0);
        assert!(first.len() == 14 && first.starts_with("ove") && first[3..].bytes().all(|b| b.is_ascii_hexdigit()), "{first}");
        assert_eq!(first, veth_name(&network, &name, 0));
        assert_ne!(first, veth_name(&network, &name, 1));
        let [blue, green] = ["blue", "green"].map(|network| veth_name(&network.into(), &name, 0));
        assert!(blue.len() == 14 && blue != green && blue != first, "{blue} {green}");
        // Fixed for every version: an agent finds the interfaces of the one before.
        assert_eq!([&first, &blue], ["ovef32c32bdd43", "ovef3e4f4a64f3"]);
        let mac = free_mac(|m| m.0[5] < 0x80);
        assert!(mac.is_unicast() && mac.0[0] & 2 == 2 && mac.0[5] >= 0x80);
    }
}
