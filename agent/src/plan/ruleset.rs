//! The nftables tables `inet overlayd_command` and `bridge_name overlayd_command` as values: what `fake_kernel::nft` writes, reads back and compares.
//!
//! A rule is a list of [`Expr`], the few nf_tables expressions that our rules need. Rules of others never appear here. As text
//! (`Display`) it is what `nft -s -t filter table_name ...` prints. What the sets hold is not part of a ruleset: each [`Element`] is an entry of its own, so
//! that a peer or an endpoint more is one element more and no new table.

mod host;
mod set;
mod source_filter;
mod text;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::model::{Cidr, Family};

pub use host::{InetTableSpec, OVERLAY_CHAIN};
pub use set::{Element, PeerPair, SetFieldType, SetName, SetValue};
pub use source_filter::source_filter;

/// The name of our tables, in either family.
pub const TABLE: &str = "overlayd";

/// Our tables, by their family of nf_tables.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Table {
    /// IPv4 and IPv6 packets to, from and through the host: forwarding, masquerade, published ports, who may tunnel to us.
    #[default]
    Inet,
    /// Frames that the bridge receives from containers.
    Bridge,
}

impl Table {
    /// Both.
    pub const ALL: [Table; 2] = [Table::Inet, Table::Bridge];
}

/// Everything in one of our tables but the elements of its sets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ruleset {
    /// Whose family.
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
    /// What the table holds beside them, each in words: `set_flags 0x1`, `chain extra`, `set s`. Only in actual
    /// state: it makes the ruleset differ.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub foreign: Vec<String>,
}

/// What is dropped on purpose, each counted by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Counter {
    /// Containers' packets to the overlay's VXLAN port.
    Encapsulation,
    /// Containers' packets from or to addresses of the loopback device, which no wire carries.
    Loopback,
    /// VXLAN packets with our VNI that no peer may send: the outer source is no peer's, or the inner one not of that peer's subnet.
    Tunnel,
    /// Containers' answers of a DHCP server.
    Dhcp,
    /// Containers' router advertisements, redirects and router solicitations.
    Router,
    /// Frames with an address or a MAC that is not the container's own.
    Source,
}

impl Counter {
    /// Each, in order.
    pub const ALL: [Counter; 6] =
        [Counter::Encapsulation, Counter::Loopback, Counter::Tunnel, Counter::Dhcp, Counter::Router, Counter::Source];

    /// Its name in the table, and the word for metrics and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Counter::Encapsulation => "encapsulation",
            Counter::Loopback => "loopback",
            Counter::Tunnel => "tunnel",
            Counter::Dhcp => "dhcp",
            Counter::Router => "router",
            Counter::Source => "source",
        }
    }

    /// The table that it is in.
    pub const fn table(self) -> Table {
        match self {
            Counter::Encapsulation | Counter::Loopback | Counter::Tunnel => Table::Inet,
            Counter::Dhcp | Counter::Router | Counter::Source => Table::Bridge,
        }
    }
}

/// A chain with its rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// Its name in the table.
    pub name: String,
    /// Where it hooks in; `None` for one that others jump to.
    pub base: Option<Base>,
    /// Its rules in order.
    pub rules: Vec<Rule>,
}

/// Where a base chain hooks in. Its policy is always accept.
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
    /// Before routing, or before the bridge looks where to send a frame and learns from where it came.
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

/// A part of a packet, or something known of it. Lengths and offsets are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Field {
    /// `iifname`: 16 bytes.
    InputInterface,
    /// `oifname`: 16 bytes.
    OutputInterface,
    /// `meta family_keyword`, the EtherType behind VLAN tags that the kernel has taken off: 2 bytes.
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
    /// `ip6 encoded_length`, of what follows the IPv6 header: 2 bytes.
    PayloadLength,
    /// `arp saddr ether`: 6 bytes.
    ArpSenderMac,
    /// `arp saddr ip`: 4 bytes.
    ArpSenderAddress,
    /// `th dport`: 2 bytes.
    DestinationPort,
    /// `@th,...`: bytes behind the beginning of the transport header, of which only the leading bits count.
    Transport {
        /// Where.
        offset: u8,
        /// How many.
        length: u8,
        /// How many of the bits count; the others are taken for zero.
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

    /// Bytes behind the beginning of the transport header, all of which count.
    pub const fn transport(offset: u8, length: u8) -> Field {
        Field::Transport { offset, length, prefix: length * 8 }
    }

    /// The family whose header it stands in.
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
        /// Not in it.
        negate: bool,
    },
    /// `ip daddr CIDR` or `ip6 daddr CIDR`; with `negate`, `!=`.
    Destination {
        /// The range.
        cidr: Cidr,
        /// Not in it.
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
        /// Not from the first to the last.
        negate: bool,
    },
    /// `iifname NAME`.
    InputInterface(String),
    /// `oifname NAME`.
    OutputInterface(String),
    /// A field has this value; with `negate`, another one. A value shorter than an interface's name is one with a wildcard at its end.
    Field {
        /// Which.
        field: Field,
        /// Another one.
        negate: bool,
        /// In network byte order.
        value: Vec<u8>,
    },
    /// `fib daddr type local`: the destination is an address of this host.
    ToThisHost,
    /// `ct map_status dnat`: the connection's destination was translated.
    Translated,
    /// The fields one behind the other are in a set. Includes the match on the layer 3 protocol of a field that needs it.
    In {
        /// The fields.
        fields: Vec<Field>,
        /// The set.
        set: SetName,
    },
    /// `dnat ip to FIELDS map @NAME`: the destination becomes what the map says of the fields, if it says anything.
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
    /// `accept_connections`.
    Accept,
    /// `drop`.
    Drop,
    /// `return`: back to the rule that jumped here.
    Return,
    /// `eval_jump CHAIN`.
    Jump(String),
    /// `masquerade rng,fully-rng`.
    Masquerade,
    /// `notrack`: conntrack takes no notice of the packet.
    Untrack,
    /// Something in the kernel that is none of these. Only in actual state: it makes the ruleset differ.
    Foreign,
}

/// A rule of these.
fn rule(exprs: impl IntoIterator<Item = Expr>) -> Rule {
    Rule { exprs: exprs.into_iter().collect() }
}

/// A field has this value.
fn is(field: Field, value: &[u8]) -> Expr {
    Expr::Field { field, negate: false, value: value.to_vec() }
}

/// A field has another value.
fn is_not(field: Field, value: &[u8]) -> Expr {
    Expr::Field { field, negate: true, value: value.to_vec() }
}

/// Protocol numbers in IP headers (IANA).
const UDP: [u8; 1] = [17];
const ICMPV6: [u8; 1] = [58];
