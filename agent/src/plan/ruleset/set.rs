//! The sets and maps of our tables, and the meaning of their elements.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::Table;
use crate::model::{Family, Mac, Transport, Vni};

/// The sets and maps. Those of the tunnel source filter belong to one network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SetName {
    /// `address . protocol . port` of this host to a container's address and port, for ports bound to one address.
    Bound(Family),
    /// The underlay addresses of peers, as outer and inner source. Containers' packets to these addresses are not masqueraded.
    Hosts(Family),
    /// Outer source, and base address of the inner source's subnet, with the network's subnet length.
    Peers(Family),
    /// `protocol . port` on any address of this host to a container's address and port.
    Ports(Family),
    /// Outer source and range of inner sources, for subnets of another length.
    Ranges(Family),
    /// Interface, MAC and address of an endpoint.
    Source(Family),
    /// The interfaces of endpoints without source checks.
    Unchecked,
    /// A set of the network with this VNI, which ends its name. The sets without a VNI are the default network's.
    Network(Vni, TunnelSet),
}

/// The sets of the tunnel source filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TunnelSet {
    /// As [`SetName::Hosts`].
    Hosts(Family),
    /// As [`SetName::Peers`].
    Peers(Family),
    /// As [`SetName::Ranges`].
    Ranges(Family),
}

/// Types of a set's fields, with their `nft` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetFieldType {
    /// `ipv4_addr`, `ipv6_addr`.
    Address(Family),
    /// `ether_addr`.
    Mac,
    /// `inet_proto`.
    Protocol,
    /// `inet_service`.
    Port,
    /// `ifname`.
    Interface,
}

/// A value of one field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetValue {
    /// An address.
    Address(IpAddr),
    /// A MAC.
    Mac(Mac),
    /// A transport protocol's number.
    Protocol(u8),
    /// A port.
    Port(u16),
    /// An interface's name.
    Interface(String),
}

impl SetName {
    /// All sets and maps without a VNI.
    pub const ALL: [SetName; 13] = [
        SetName::Bound(Family::V4),
        SetName::Bound(Family::V6),
        SetName::Hosts(Family::V4),
        SetName::Hosts(Family::V6),
        SetName::Peers(Family::V4),
        SetName::Peers(Family::V6),
        SetName::Ports(Family::V4),
        SetName::Ports(Family::V6),
        SetName::Ranges(Family::V4),
        SetName::Ranges(Family::V6),
        SetName::Source(Family::V4),
        SetName::Source(Family::V6),
        SetName::Unchecked,
    ];

    /// The table that contains it.
    pub const fn table(self) -> Table {
        match self {
            SetName::Source(_) | SetName::Unchecked => Table::Bridge,
            _ => Table::Inet,
        }
    }

    /// Its name in the table.
    pub fn name(self) -> Cow<'static, str> {
        match self.vni() {
            Some(vni) => format!("{}.{vni}", self.base_name()).into(),
            None => self.base_name().into(),
        }
    }

    /// The VNI in its name.
    const fn vni(self) -> Option<Vni> {
        if let SetName::Network(vni, _) = self { Some(vni) } else { None }
    }

    /// The default network's set of the same kind.
    const fn without_vni(self) -> SetName {
        match self {
            SetName::Network(_, TunnelSet::Hosts(family)) => SetName::Hosts(family),
            SetName::Network(_, TunnelSet::Peers(family)) => SetName::Peers(family),
            SetName::Network(_, TunnelSet::Ranges(family)) => SetName::Ranges(family),
            other => other,
        }
    }

    /// The set of the same kind that belongs to a network. A set that networks share is returned as it is.
    pub fn of_network(self, vni: Option<Vni>) -> SetName {
        let set = match self {
            SetName::Hosts(family) => TunnelSet::Hosts(family),
            SetName::Peers(family) => TunnelSet::Peers(family),
            SetName::Ranges(family) => TunnelSet::Ranges(family),
            other => return other,
        };
        vni.map_or(self, |vni| SetName::Network(vni, set))
    }

    const fn base_name(self) -> &'static str {
        match self.without_vni() {
            SetName::Bound(Family::V4) => "bound4",
            SetName::Bound(Family::V6) => "bound6",
            SetName::Hosts(Family::V4) => "hosts4",
            SetName::Hosts(Family::V6) => "hosts6",
            SetName::Peers(Family::V4) => "peers4",
            SetName::Peers(Family::V6) => "peers6",
            SetName::Ports(Family::V4) => "ports4",
            SetName::Ports(Family::V6) => "ports6",
            SetName::Ranges(Family::V4) => "ranges4",
            SetName::Ranges(Family::V6) => "ranges6",
            SetName::Source(Family::V4) => "source4",
            SetName::Source(Family::V6) => "source6",
            // `without_vni` returns no other set.
            SetName::Unchecked | SetName::Network(..) => "unchecked",
        }
    }

    /// The set of that name in a table.
    pub fn from_name(table: Table, name: &[u8]) -> Option<SetName> {
        let name = std::str::from_utf8(name).ok()?;
        let (base, vni) = match name.split_once('.') {
            Some((base, vni)) => (base, Some(Vni::try_from(vni.parse::<u32>().ok()?).ok()?)),
            None => (name, None),
        };
        let set = SetName::ALL.into_iter().find(|set| set.table() == table && set.base_name() == base)?.of_network(vni);
        (set.name() == name).then_some(set)
    }

    /// The types of its key's fields.
    pub fn key(self) -> Vec<SetFieldType> {
        match self.without_vni() {
            SetName::Bound(family) => vec![SetFieldType::Address(family), SetFieldType::Protocol, SetFieldType::Port],
            SetName::Hosts(family) | SetName::Peers(family) | SetName::Ranges(family) => {
                vec![SetFieldType::Address(family), SetFieldType::Address(family)]
            }
            SetName::Ports(_) => vec![SetFieldType::Protocol, SetFieldType::Port],
            SetName::Source(family) => vec![SetFieldType::Interface, SetFieldType::Mac, SetFieldType::Address(family)],
            SetName::Unchecked | SetName::Network(..) => vec![SetFieldType::Interface],
        }
    }

    /// The types of a map's data; none for a set.
    pub fn data(self) -> Vec<SetFieldType> {
        match self {
            SetName::Bound(family) | SetName::Ports(family) => vec![SetFieldType::Address(family), SetFieldType::Port],
            _ => Vec::new(),
        }
    }

    /// Whether its elements are ranges.
    pub const fn has_ranges(self) -> bool {
        matches!(self.without_vni(), SetName::Ranges(_))
    }
}

impl SetFieldType {
    /// Length in bytes, without the padding to four in a concatenation.
    pub const fn length(self) -> usize {
        match self {
            SetFieldType::Address(Family::V4) => 4,
            SetFieldType::Address(Family::V6) | SetFieldType::Interface => 16,
            SetFieldType::Mac => 6,
            SetFieldType::Protocol => 1,
            SetFieldType::Port => 2,
        }
    }
}

/// One element of one of our sets. Long variants are boxed, because the keys of peers are many.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Element {
    /// The peer at an underlay address may tunnel packets of a subnet. The second address is the first one of the subnet.
    Peer(PeerPair),
    /// The peer at an underlay address may tunnel packets from the second to the third address.
    Range(Box<(IpAddr, IpAddr, IpAddr)>),
    /// The peer at an underlay address may tunnel packets from that address.
    Host(IpAddr),
    /// A port of any address of this host, in one family.
    Port(Family, Transport, u16),
    /// A port of one address of this host.
    Bound(IpAddr, Transport, u16),
    /// An interface may send with this MAC and address.
    Source(Box<(String, Mac, IpAddr)>),
    /// An interface may send with any MAC and address.
    Unchecked(Box<str>),
    /// An element of the tunnel source filter that belongs to the network with this VNI instead of the default network.
    Network(Box<(Vni, Element)>),
}

/// An underlay address and the base address of a subnet, of one family. Each peer has one, stored three times; so IPv4 pairs need
/// no heap memory besides the element itself.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(IpAddr, IpAddr)", into = "(IpAddr, IpAddr)")]
pub struct PeerPair(Addresses);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Addresses {
    V4(Ipv4Addr, Ipv4Addr),
    V6(Box<(Ipv6Addr, Ipv6Addr)>),
}

impl PeerPair {
    /// Creates a pair; `None` if the families differ.
    pub fn new(outer: IpAddr, base: IpAddr) -> Option<PeerPair> {
        let addresses = match (outer, base) {
            (IpAddr::V4(outer), IpAddr::V4(base)) => Addresses::V4(outer, base),
            (IpAddr::V6(outer), IpAddr::V6(base)) => Addresses::V6(Box::new((outer, base))),
            _ => return None,
        };
        Some(PeerPair(addresses))
    }

    /// The underlay address.
    pub fn outer(&self) -> IpAddr {
        match &self.0 {
            Addresses::V4(outer, _) => (*outer).into(),
            Addresses::V6(both) => both.0.into(),
        }
    }

    /// The lowest address of the subnet.
    pub fn base(&self) -> IpAddr {
        match &self.0 {
            Addresses::V4(_, base) => (*base).into(),
            Addresses::V6(both) => both.1.into(),
        }
    }

    /// The family of both.
    pub fn family(&self) -> Family {
        Family::of(self.outer())
    }
}

impl TryFrom<(IpAddr, IpAddr)> for PeerPair {
    type Error = &'static str;

    fn try_from((outer, base): (IpAddr, IpAddr)) -> Result<PeerPair, &'static str> {
        PeerPair::new(outer, base).ok_or("both addresses must have the same family")
    }
}

impl From<PeerPair> for (IpAddr, IpAddr) {
    fn from(pair: PeerPair) -> (IpAddr, IpAddr) {
        (pair.outer(), pair.base())
    }
}

impl Element {
    /// The set that contains it.
    pub fn set(&self) -> SetName {
        match self {
            Element::Peer(peer) => SetName::Peers(peer.family()),
            Element::Range(range) => SetName::Ranges(Family::of(range.0)),
            Element::Host(address) => SetName::Hosts(Family::of(*address)),
            Element::Port(family, ..) => SetName::Ports(*family),
            Element::Bound(address, ..) => SetName::Bound(Family::of(*address)),
            Element::Source(source) => SetName::Source(Family::of(source.2)),
            Element::Unchecked(_) => SetName::Unchecked,
            Element::Network(network) => network.1.set().of_network(Some(network.0)),
        }
    }

    /// The same element in the set of a network.
    pub fn of_network(self, vni: Option<Vni>) -> Element {
        match vni {
            Some(vni) => Element::Network(Box::new((vni, self))),
            None => self,
        }
    }

    /// The endpoint's interface, for a source element.
    pub fn interface(&self) -> Option<&str> {
        match self {
            Element::Source(source) => Some(&source.0),
            Element::Unchecked(interface) => Some(interface),
            _ => None,
        }
    }

    /// The fields of its key.
    pub fn key(&self) -> Vec<SetValue> {
        match self {
            Element::Peer(peer) => vec![SetValue::Address(peer.outer()), SetValue::Address(peer.base())],
            Element::Range(range) => vec![SetValue::Address(range.0), SetValue::Address(range.1)],
            Element::Host(address) => vec![SetValue::Address(*address), SetValue::Address(*address)],
            Element::Port(_, protocol, port) => vec![SetValue::Protocol(protocol.number()), SetValue::Port(*port)],
            Element::Bound(address, protocol, port) => {
                vec![SetValue::Address(*address), SetValue::Protocol(protocol.number()), SetValue::Port(*port)]
            }
            Element::Source(source) => {
                vec![SetValue::Interface(source.0.clone()), SetValue::Mac(source.1), SetValue::Address(source.2)]
            }
            Element::Unchecked(interface) => vec![SetValue::Interface(interface.to_string())],
            Element::Network(network) => network.1.key(),
        }
    }

    /// The end of its key, if the key is a range.
    pub fn key_end(&self) -> Option<Vec<SetValue>> {
        match self {
            Element::Range(range) => Some(vec![SetValue::Address(range.0), SetValue::Address(range.2)]),
            Element::Network(network) => network.1.key_end(),
            _ => None,
        }
    }

    /// The element with this key; `None` if no element of ours can have it.
    pub fn from_key(set: SetName, key: Vec<SetValue>, end: Option<Vec<SetValue>>) -> Option<Element> {
        use SetValue::{Address, Interface, Mac, Port, Protocol};
        let transport = |number: u8| [Transport::Tcp, Transport::Udp, Transport::Sctp].into_iter().find(|t| t.number() == number);
        let element = match (set.without_vni(), key.as_slice(), end.as_deref()) {
            (SetName::Peers(_), [Address(outer), Address(base)], None) => Element::Peer(PeerPair::new(*outer, *base)?),
            (SetName::Ranges(_), [Address(outer), Address(first)], Some([Address(same), Address(last)])) if same == outer => {
                Element::Range(Box::new((*outer, *first, *last)))
            }
            (SetName::Hosts(_), [Address(outer), Address(inner)], None) if outer == inner => Element::Host(*outer),
            (SetName::Ports(family), [Protocol(number), Port(port)], None) => Element::Port(family, transport(*number)?, *port),
            (SetName::Bound(_), [Address(address), Protocol(number), Port(port)], None) => {
                Element::Bound(*address, transport(*number)?, *port)
            }
            (SetName::Source(_), [Interface(name), Mac(mac), Address(address)], None) => {
                Element::Source(Box::new((name.clone(), *mac, *address)))
            }
            (SetName::Unchecked, [Interface(name)], None) => Element::Unchecked(name.clone().into()),
            _ => return None,
        };
        Some(element.of_network(set.vni()))
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "element of {}: ", self.set().name())?;
        let element = if let Element::Network(network) = self { &network.1 } else { self };
        match element {
            Element::Peer(peer) => write!(f, "{} . {}", peer.outer(), peer.base()),
            Element::Range(range) => write!(f, "{} . {}-{}", range.0, range.1, range.2),
            Element::Host(address) => write!(f, "{address} . {address}"),
            Element::Port(_, protocol, port) => write!(f, "{protocol} . {port}"),
            Element::Bound(address, protocol, port) => write!(f, "{address} . {protocol} . {port}"),
            Element::Source(source) => write!(f, "{} . {} . {}", source.0, source.1, source.2),
            Element::Unchecked(interface) => f.write_str(interface),
            Element::Network(nested) => nested.1.fmt(f),
        }
    }
}
