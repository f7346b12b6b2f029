//! The nftables tables `inet overlayd` and `bridge overlayd` as values. `kernel::nft` writes, reads and compares them.
//!
//! A rule is a list of [`Expr`], the few nf_tables expressions that our rules need. Foreign rules never appear here. The text
//! form (`Display`) equals the output of `nft -s -t list table ...`. Set elements are not part of a ruleset: each [`Element`] is
//! an entry of its own, so adding a peer or endpoint adds one element and does not rewrite the table.

mod host;
mod set;
mod source_filter;
mod spec;
mod text;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::model::{Cidr, Family};

pub use host::{OVERLAY_CHAIN, inet_table};
pub use set::{Element, PeerPair, SetFieldType, SetName, SetValue};
pub use source_filter::source_filter;
pub use spec::{InetTableSpec, Tunnel};

/// The name of our tables, in either family.
pub const TABLE: &str = "overlayd";

/// Our tables, by nf_tables family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Table {
    /// IPv4 and IPv6 packets to, from and through the host: forwarding, masquerade, published ports, tunnel source filter.
    #[default]
    Inet,
    /// Frames that bridges receive from containers.
    Bridge,
}

impl Table {
    /// Both.
    pub const ALL: [Table; 2] = [Table::Inet, Table::Bridge];
}

/// The contents of one of our tables, except its set elements.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ruleset {
    /// The table.
    #[serde(default)]
    pub table: Table,
    /// The named counters, in order of their names.
    #[serde(default)]
    pub counters: Vec<Counter>,
    /// The sets and maps, in their order.
    #[serde(default)]
    pub sets: Vec<SetName>,
    /// The chains, in order of their names.
    pub chains: Vec<Chain>,
    /// Foreign objects in the table, each as a description: `flags 0x1`, `chain extra`, `set s`. Only present in actual state,
    /// where it makes the ruleset differ.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub foreign: Vec<String>,
}

/// Counters of packets dropped on purpose, one per reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Counter {
    /// Containers' packets to the overlay's VXLAN port.
    Encapsulation,
    /// Packets between an isolated network and this host's other networks, or from outside to its transit, that no published port
    /// translated. Only present with isolated networks.
    Isolation,
    /// Containers' packets from or to loopback addresses, which must not appear on a network.
    Loopback,
    /// VXLAN packets with our VNI and a forbidden source: the outer source is not a peer, or the inner source is outside that
    /// peer's subnet.
    Tunnel,
    /// Containers' DHCP server answers.
    Dhcp,
    /// Containers' router advertisements, redirects and router solicitations.
    Router,
    /// Frames with an address or MAC that is not the container's own.
    Source,
}

impl Counter {
    /// All counters, in order.
    pub const ALL: [Counter; 7] = [
        Counter::Encapsulation,
        Counter::Isolation,
        Counter::Loopback,
        Counter::Tunnel,
        Counter::Dhcp,
        Counter::Router,
        Counter::Source,
    ];

    /// The name in the table, in metrics and in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Counter::Encapsulation => "encapsulation",
            Counter::Isolation => "isolation",
            Counter::Loopback => "loopback",
            Counter::Tunnel => "tunnel",
            Counter::Dhcp => "dhcp",
            Counter::Router => "router",
            Counter::Source => "source",
        }
    }

    /// The table that contains it.
    pub const fn table(self) -> Table {
        match self {
            Counter::Encapsulation | Counter::Isolation | Counter::Loopback | Counter::Tunnel => Table::Inet,
            Counter::Dhcp | Counter::Router | Counter::Source => Table::Bridge,
        }
    }
}

/// A chain with its rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// Its name in the table.
    pub name: String,
    /// The hook of a base chain; `None` for a regular chain, which is a jump target.
    pub base: Option<Base>,
    /// Its rules in order.
    pub rules: Vec<Rule>,
}

/// The hook of a base chain. The policy is always accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The hook.
    pub hook: Hook,
    /// `filter` or `nat`.
    pub kind: ChainKind,
    /// Priority in the hook, as in `nft`: lower runs first.
    pub priority: i32,
}

/// Netfilter hooks of the inet and bridge families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    /// Before routing; on the bridge, before forwarding and MAC learning.
    Prerouting,
    /// To this host.
    Input,
    /// Through this host.
    Forward,
    /// From this host.
    Output,
    /// After routing.
    Postrouting,
}

/// Types of base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChainKind {
    /// Filtering.
    Filter,
    /// Address translation.
    Nat,
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Its matches and its statement, in order.
    pub exprs: Vec<Expr>,
}

/// A field of a packet or of its metadata. Lengths and offsets are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Field {
    /// `iifname`: 16 bytes.
    InputInterface,
    /// `oifname`: 16 bytes.
    OutputInterface,
    /// `meta protocol`, the EtherType after VLAN tags that the kernel has stripped: 2 bytes.
    Protocol,
    /// `meta l4proto`, the transport protocol: 1 byte.
    Layer4,
    /// `ether saddr`: 6 bytes.
    EtherSource,
    /// `ip saddr` or `ip6 saddr`.
    Source(Family),
    /// `ip daddr` or `ip6 daddr`.
    Destination(Family),
    /// `ip6 nexthdr`: 1 byte.
    NextHeader,
    /// `ip6 length`, the payload length after the IPv6 header: 2 bytes.
    PayloadLength,
    /// `arp saddr ether`: 6 bytes.
    ArpSenderMac,
    /// `arp saddr ip`: 4 bytes.
    ArpSenderAddress,
    /// `th dport`: 2 bytes.
    DestinationPort,
    /// `@th,...`: bytes at an offset in the transport header, of which only the leading bits count.
    Transport {
        /// The offset.
        offset: u8,
        /// The number of bytes.
        length: u8,
        /// The number of leading bits that count; the other bits are masked to zero.
        prefix: u8,
    },
}

impl Field {
    /// Its length in bytes.
    pub const fn length(self) -> u8 {
        match self {
            Field::InputInterface | Field::OutputInterface => 16,
            Field::Protocol | Field::PayloadLength | Field::DestinationPort => 2,
            Field::Layer4 | Field::NextHeader => 1,
            Field::EtherSource | Field::ArpSenderMac => 6,
            Field::Source(family) | Field::Destination(family) => family.bits() / 8,
            Field::ArpSenderAddress => 4,
            Field::Transport { length, .. } => length,
        }
    }

    /// Bytes at an offset in the transport header, all of which count.
    pub const fn transport(offset: u8, length: u8) -> Field {
        Field::Transport { offset, length, prefix: length * 8 }
    }

    /// The family whose header contains it.
    pub const fn family(self) -> Option<Family> {
        match self {
            Field::Source(family) | Field::Destination(family) => Some(family),
            _ => None,
        }
    }
}

/// One match or statement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expr {
    /// `ip saddr CIDR` or `ip6 saddr CIDR`; with `negate`, `!=`. Includes the match on the layer 3 protocol.
    Source {
        /// The range.
        cidr: Cidr,
        /// Negated: outside the range.
        negate: bool,
    },
    /// `ip daddr CIDR` or `ip6 daddr CIDR`; with `negate`, `!=`.
    Destination {
        /// The range.
        cidr: Cidr,
        /// Negated: outside the range.
        negate: bool,
    },
    /// `ip saddr FIRST-LAST`, or another field of addresses; with `negate`, `!=`. Includes the match on the layer 3 protocol.
    Range {
        /// The field of addresses.
        field: Field,
        /// The first address.
        first: IpAddr,
        /// The last one.
        last: IpAddr,
        /// Negated: outside the range.
        negate: bool,
    },
    /// `iifname NAME`.
    InputInterface(String),
    /// `oifname NAME`.
    OutputInterface(String),
    /// A field has this value; with `negate`, another value. For an interface field, a value shorter than the field is a prefix
    /// match.
    Field {
        /// The field.
        field: Field,
        /// Negated: another value.
        negate: bool,
        /// The value, in network byte order.
        value: Vec<u8>,
    },
    /// `fib daddr type local`: the destination is an address of this host.
    ToThisHost,
    /// `ct status dnat`: the connection's destination was translated.
    Translated,
    /// `ct status snat,dnat`: the connection's source or destination was translated.
    AddressTranslated,
    /// The concatenation of the fields is in a set. Includes the match on the layer 3 protocol of a field that needs it.
    In {
        /// The fields.
        fields: Vec<Field>,
        /// The set.
        set: SetName,
    },
    /// `dnat ip to FIELDS map @NAME`: the map translates the destination. Nothing happens if the map has no entry for the fields.
    Translate {
        /// The fields.
        fields: Vec<Field>,
        /// The map.
        map: SetName,
    },
    /// `counter`.
    Counter,
    /// `counter name NAME`.
    Count(Counter),
    /// `accept`.
    Accept,
    /// `drop`.
    Drop,
    /// `return`: back to the calling chain.
    Return,
    /// `jump CHAIN`.
    Jump(String),
    /// `masquerade random,fully-random`.
    Masquerade,
    /// `notrack`: conntrack ignores the packet.
    Untrack,
    /// An unsupported expression in the kernel. Only present in actual state, where it makes the ruleset differ.
    Foreign,
}

/// A rule with these expressions.
fn rule(exprs: impl IntoIterator<Item = Expr>) -> Rule {
    Rule { exprs: exprs.into_iter().collect() }
}

/// A match: the field has this value.
fn is(field: Field, value: &[u8]) -> Expr {
    Expr::Field { field, negate: false, value: value.to_vec() }
}

/// A match: the field has another value.
fn is_not(field: Field, value: &[u8]) -> Expr {
    Expr::Field { field, negate: true, value: value.to_vec() }
}

/// Protocol numbers in IP headers (IANA).
const UDP: [u8; 1] = [17];
const ICMPV6: [u8; 1] = [58];
