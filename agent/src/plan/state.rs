//! Kernel state of the overlay: a map from [`Key`] to [`Value`]. Desired and actual state have the same type.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::Ruleset;
use super::ruleset::{Element, TABLE, Table};
use crate::model::{Cidr, Device, Family, Mac, Vni};

/// Protocol number of all our entries in the kernel (`ip route show proto 86`); unassigned in `/etc/iproute2/rt_protos` and
/// `linux/rtnetlink.h`.
pub const PROTOCOL: u8 = 86;

/// Id range of our next-hop objects: 16 million ids.
pub const NEXTHOP_IDS: std::ops::Range<u32> = 0x5600_0000..0x5700_0000;

/// Metric of our unreachable routes: any other route to the same destination is preferred.
pub const UNREACHABLE_METRIC: u32 = u32::MAX;

/// The `ifalias` that marks our links.
pub const LINK_ALIAS: &str = "overlayd";

/// Key of an entry. Each peer has five entries per family, in two states: texts are boxed, so that a key takes only 24 bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Key {
    /// A sysctl, by its path below `/proc/sys/net`: `ipv4/ip_forward`.
    Sysctl(Box<str>),
    /// A link of ours, by interface name: VXLAN devices, the bridge, and the host ends of the endpoints' veth pairs.
    Link(Box<str>),
    /// An address on a device of ours, with its prefix length and host bits.
    Address(Device, IpNetwork),
    /// The table `inet overlayd` or `bridge overlayd`, without the elements of its sets.
    Ruleset(Table),
    /// An element of a set. It is deleted with its table, and kept if the table is replaced.
    Element(Element),
    /// Our accept rules in iptables' FORWARD chain (`ip filter` or `ip6 filter`), where its policy is DROP.
    ForwardAccept(Family),
    /// The FDB entry of a VTEP's MAC (`bridge fdb`, flags self permanent).
    Fdb(Device, Mac),
    /// The MAC of a peer's subnet base (`ip neigh`, permanent).
    Neigh(Device, IpAddr),
    /// A next-hop object of ours, by id.
    Nexthop(u32),
    /// A route of ours in the main table.
    Route(Cidr),
    /// An unreachable route of ours in the main table, which any other route to the same destination overrides
    /// ([`UNREACHABLE_METRIC`]).
    Unreachable(Cidr),
}

/// Value of a [`Key`], in 24 bytes. Each kind of key has its kind of value, which [`Key::fits`] checks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Value {
    /// The text of a sysctl, without the line end.
    Sysctl(Box<str>),
    /// A link.
    Link(Box<LinkState>),
    /// An address exists.
    Address,
    /// The rules.
    Ruleset(Box<Ruleset>),
    /// An element exists; in a map, with its target.
    Element(Option<Box<SocketAddr>>),
    /// The ranges from and to which the rules accept forwarding, sorted.
    ForwardAccept(Box<[Cidr]>),
    /// The underlay address of a MAC.
    Fdb(IpAddr),
    /// The MAC of an address.
    Neigh(Mac),
    /// The gateway, on link at the device.
    Nexthop {
        /// Our device towards the gateway.
        device: Device,
        /// The peer's subnet base.
        gateway: IpAddr,
    },
    /// The target of a route.
    Route(RouteTarget),
    /// An unreachable route exists.
    Unreachable,
}

/// Target of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteTarget {
    /// A next-hop object of ours.
    Nexthop(u32),
    /// A gateway on link at our device (kernel without next-hop objects).
    Gateway(Device, IpAddr),
    /// A gateway that the host's other routes lead to: a peer on the same link.
    Via(IpAddr),
    /// This host, for packets received on our device.
    Local(Device),
    /// A foreign route to the same destination. Only in actual state.
    Foreign,
}

/// A link of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkState {
    /// Kind of link.
    pub kind: LinkKind,
    /// Its MAC; `None` in desired state if any MAC is fine.
    pub mac: Option<Mac>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The bridge it is a port of.
    pub master: Option<Device>,
    /// As a port of a bridge: frames may leave by the port that received them (`hairpin on`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hairpin: bool,
}

/// Kinds of link, with the settings that are fixed at creation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkKind {
    /// A VXLAN device.
    Vxlan(Vxlan),
    /// A bridge.
    Bridge,
    /// The host end of an endpoint's veth pair. A batch never creates one: the endpoints do.
    Port,
    /// An end of a veth pair between two network namespaces. Only the end that creates the pair has a target, in desired state.
    Pair(Option<PairTarget>),
    /// A link of that name that is not ours (another kind, or without our alias). Only in actual state; never changed.
    Foreign {
        /// The kernel's name of the kind: `vxlan`, `dummy`; empty for hardware.
        kind: String,
    },
}

impl LinkKind {
    /// Index and source address of the underlay that the link sends by; `None` if it has none.
    pub fn underlay(&self) -> Option<(u32, IpAddr)> {
        match self {
            LinkKind::Vxlan(vxlan) => Some((vxlan.underlay, vxlan.local)),
            LinkKind::Bridge | LinkKind::Port | LinkKind::Pair(_) | LinkKind::Foreign { .. } => None,
        }
    }
}

/// Where the other end of a veth pair is created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PairTarget {
    /// In the host's network namespace, with the same name.
    Host,
    /// In the network namespace with this name, as this device.
    Namespace(String, Device),
}

/// Settings of a VXLAN device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vxlan {
    /// The VNI.
    pub vni: Vni,
    /// UDP destination port.
    pub port: u16,
    /// The underlay address that is the source of outer packets.
    pub local: IpAddr,
    /// Interface index of the external interface.
    pub underlay: u32,
    /// Whether the device learns forwarding entries from traffic; ours never do.
    pub learning: bool,
    /// Transmit checksum offload (`ethtool -K DEV tx-checksum-ip-generic`); off for NICs that break it.
    pub tx_checksum: bool,
}

impl Vxlan {
    /// Whether a device with these settings can be changed to `wanted` without recreating it. VNI, port and learning are fixed at
    /// creation (`vxlan_changelink` in the kernel's `drivers/net/vxlan/vxlan_core.c` accepts local address and underlay link).
    pub fn changes_in_place(&self, wanted: &Vxlan) -> bool {
        self.vni == wanted.vni
            && self.port == wanted.port
            && self.learning == wanted.learning
            && Family::of(self.local) == Family::of(wanted.local)
    }
}

// Ten entries per peer and family: a larger variant would enlarge all of them.
const _: () = assert!(size_of::<(Key, Value)>() == 48);

/// Entries by key.
pub type State = BTreeMap<Key, Value>;

/// Read access to entries: those of one [`State`], or of several together.
pub trait Entries {
    /// The value of an entry.
    fn get(&self, key: &Key) -> Option<&Value>;

    /// All entries, sorted by key.
    fn iter(&self) -> impl Iterator<Item = (&Key, &Value)>;

    /// The links, in any order.
    fn links(&self) -> impl Iterator<Item = (&Key, &LinkState)>;

    /// Whether there is such an entry.
    fn contains_key(&self, key: &Key) -> bool {
        self.get(key).is_some()
    }
}

impl Entries for State {
    fn get(&self, key: &Key) -> Option<&Value> {
        BTreeMap::get(self, key)
    }

    fn iter(&self) -> impl Iterator<Item = (&Key, &Value)> {
        BTreeMap::iter(self)
    }

    fn links(&self) -> impl Iterator<Item = (&Key, &LinkState)> {
        self.range(Key::Link(Box::default())..).map_while(|(key, value)| match value {
            Value::Link(link) => Some((key, &**link)),
            _ => None,
        })
    }
}

impl Key {
    /// The device whose deletion removes the entry; `None` if there is none. The device of a next hop or a route is in its value.
    pub fn device(&self) -> Option<Device> {
        match self {
            Key::Address(device, _) | Key::Fdb(device, _) | Key::Neigh(device, _) => Some(*device),
            // `ipv6/conf/ovx6.1/accept_ra`
            Key::Sysctl(path) => path.split('/').nth(2).and_then(Device::from_name),
            Key::Link(_)
            | Key::Ruleset(_)
            | Key::Element(_)
            | Key::ForwardAccept(_)
            | Key::Nexthop(_)
            | Key::Route(_)
            | Key::Unreachable(_) => None,
        }
    }

    /// Whether the entry belongs to a peer or is an unreachable route. All other entries are local.
    pub fn is_peer_entry(&self) -> bool {
        matches!(self, Key::Fdb(..) | Key::Neigh(..) | Key::Nexthop(_) | Key::Route(_) | Key::Unreachable(_))
    }

    /// Whether the value is of this key's kind.
    pub fn fits(&self, value: &Value) -> bool {
        matches!(
            (self, value),
            (Key::Sysctl(_), Value::Sysctl(_))
                | (Key::Link(_), Value::Link(_))
                | (Key::Address(..), Value::Address)
                | (Key::Ruleset(_), Value::Ruleset(_))
                | (Key::Element(_), Value::Element(_))
                | (Key::ForwardAccept(_), Value::ForwardAccept(_))
                | (Key::Fdb(..), Value::Fdb(_))
                | (Key::Neigh(..), Value::Neigh(_))
                | (Key::Nexthop(_), Value::Nexthop { .. })
                | (Key::Route(_), Value::Route(_))
                | (Key::Unreachable(_), Value::Unreachable)
        )
    }

    /// All values of [`Key::kind`].
    pub const KINDS: [&str; 11] =
        ["sysctl", "link", "address", "ruleset", "element", "forward-accept", "fdb", "neigh", "nexthop", "route", "unreachable"];

    /// The kind of entry as a word, for metrics and messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Key::Sysctl(_) => "sysctl",
            Key::Link(_) => "link",
            Key::Address(..) => "address",
            Key::Ruleset(_) => "ruleset",
            Key::Element(_) => "element",
            Key::ForwardAccept(_) => "forward-accept",
            Key::Fdb(..) => "fdb",
            Key::Neigh(..) => "neigh",
            Key::Nexthop(_) => "nexthop",
            Key::Route(_) => "route",
            Key::Unreachable(_) => "unreachable",
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Sysctl(path) => write!(f, "sysctl net/{path}"),
            Key::Link(name) => write!(f, "link {name}"),
            Key::Address(device, address) => write!(f, "address {address} dev {device}"),
            Key::Ruleset(table) => write!(f, "table {table} {TABLE}"),
            Key::Element(element) => element.fmt(f),
            Key::ForwardAccept(family) => write!(f, "accept in the {family} FORWARD chain of iptables"),
            Key::Fdb(device, mac) => write!(f, "fdb {mac} dev {device}"),
            Key::Neigh(device, address) => write!(f, "neigh {address} dev {device}"),
            Key::Nexthop(id) => write!(f, "nexthop id {id}"),
            Key::Route(destination) => write!(f, "route {destination}"),
            Key::Unreachable(destination) => write!(f, "route unreachable {destination}"),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Sysctl(text) => f.write_str(text),
            Value::Link(link) => {
                match &link.kind {
                    LinkKind::Vxlan(v) => write!(f, "vxlan id {} local {} dstport {}", v.vni, v.local, v.port)?,
                    LinkKind::Bridge => f.write_str("bridge")?,
                    LinkKind::Port | LinkKind::Pair(_) => f.write_str("veth")?,
                    LinkKind::Foreign { kind } => write!(f, "foreign {kind}")?,
                }
                if let Some(mac) = link.mac {
                    write!(f, " address {mac}")?;
                }
                if let Some(master) = link.master {
                    write!(f, " master {master}")?;
                }
                if link.hairpin {
                    f.write_str(" hairpin on")?;
                }
                write!(f, " mtu {} {}", link.mtu, if link.up { "up" } else { "down" })
            }
            Value::Address | Value::Unreachable => f.write_str("present"),
            Value::Ruleset(rules) => write!(f, "{} chains", rules.chains.len()),
            Value::Element(Some(target)) => write!(f, "to {target}"),
            Value::Element(None) => f.write_str("present"),
            Value::ForwardAccept(ranges) => {
                ranges.iter().enumerate().try_for_each(|(i, range)| write!(f, "{}{range}", if i == 0 { "" } else { ", " }))
            }
            Value::Fdb(address) => write!(f, "dst {address}"),
            Value::Neigh(mac) => write!(f, "lladdr {mac}"),
            Value::Nexthop { device, gateway } => write!(f, "via {gateway} dev {device}"),
            Value::Route(RouteTarget::Nexthop(id)) => write!(f, "nhid {id}"),
            Value::Route(RouteTarget::Gateway(device, gateway)) => write!(f, "via {gateway} dev {device} onlink"),
            Value::Route(RouteTarget::Via(gateway)) => write!(f, "via {gateway}"),
            Value::Route(RouteTarget::Local(device)) => write!(f, "local dev {device}"),
            Value::Route(RouteTarget::Foreign) => f.write_str("foreign"),
        }
    }
}

/// The device that carries the entry's traffic, also for next hops and routes, whose device is in the value.
pub fn device_of(key: &Key, value: &Value, state: &impl Entries) -> Option<Device> {
    match (key, value) {
        (_, Value::Nexthop { device, .. }) | (_, Value::Route(RouteTarget::Gateway(device, _) | RouteTarget::Local(device))) => {
            Some(*device)
        }
        (_, Value::Route(RouteTarget::Nexthop(id))) => match state.get(&Key::Nexthop(*id)) {
            Some(Value::Nexthop { device, .. }) => Some(*device),
            _ => None,
        },
        _ => key.device(),
    }
}
