//! The nftables table `inet overlayd` as a value: what `kernel::nft` writes, reads back and compares.
//!
//! A rule is a list of [`Expr`], the few nf_tables expressions that our rules need. Rules of others never appear here. As text
//! (`Display`) it is what `nft -s list table inet overlayd` prints.

mod text;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::model::{Cidr, Family, NetworkConfig};

/// The family and name of our table.
pub const TABLE: &str = "overlayd";

/// Everything in our table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ruleset {
    /// The base chains, in the order in which they are made.
    pub chains: Vec<Chain>,
    /// What the table holds beside them, each in words: `flags 0x1`, `chain extra`, `set s`. Only in actual
    /// state: it makes the ruleset differ. Later sets and maps of ours get fields of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub foreign: Vec<String>,
}

/// A base chain with its rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// Its name in the table.
    pub name: String,
    /// Where it hooks in.
    pub hook: Hook,
    /// `filter` or `nat`.
    pub kind: ChainKind,
    /// Priority in the hook, as in `nft`: lower runs first.
    pub priority: i32,
    /// Its rules in order. The policy is always accept.
    pub rules: Vec<Rule>,
}

/// Netfilter hooks of the inet family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    /// Before routing.
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
    /// `iifname NAME`.
    InputInterface(String),
    /// `counter`.
    Counter,
    /// `accept`.
    Accept,
    /// `drop`.
    Drop,
    /// `masquerade random,fully-random`.
    Masquerade,
    /// Something in the kernel that is none of these. Only in actual state: it makes the ruleset differ.
    Foreign,
}

/// The rules for a network: forwarding to and from the overlay is accepted, and with `masquerade` what leaves the overlay for elsewhere (not
/// multicast) gets the host's address. Inside the overlay nothing is translated.
pub fn ruleset(network: &NetworkConfig, masquerade: bool) -> Ruleset {
    let mut forward = Vec::new();
    let mut postrouting = Vec::new();
    for (_, pool) in network.pools.iter() {
        let cidr = pool.network;
        forward.push(Rule { exprs: vec![Expr::Source { cidr, negate: false }, Expr::Accept] });
        forward.push(Rule { exprs: vec![Expr::Destination { cidr, negate: false }, Expr::Accept] });
        if masquerade {
            postrouting.push(Rule {
                exprs: vec![
                    Expr::Source { cidr, negate: false },
                    Expr::Destination { cidr, negate: true },
                    Expr::Destination { cidr: multicast(cidr.family()), negate: true },
                    Expr::Masquerade,
                ],
            });
        }
    }
    let mut chains =
        vec![Chain { name: "forward".to_owned(), hook: Hook::Forward, kind: ChainKind::Filter, priority: 0, rules: forward }];
    if masquerade {
        chains.push(Chain {
            name: "postrouting".to_owned(),
            hook: Hook::Postrouting,
            kind: ChainKind::Nat,
            // NF_IP_PRI_NAT_SRC in linux/netfilter_ipv4.h.
            priority: 100,
            rules: postrouting,
        });
    }
    Ruleset { chains, foreign: Vec::new() }
}

fn multicast(family: Family) -> Cidr {
    let (address, length): (IpAddr, u8) = match family {
        Family::V4 => (std::net::Ipv4Addr::new(224, 0, 0, 0).into(), 4),
        Family::V6 => (std::net::Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), 8),
    };
    Cidr::containing(address, length).unwrap_or_else(|| Cidr::host(address))
}
