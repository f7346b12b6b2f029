//! A read-only snapshot of all nf_tables rules in a network namespace, for [`super::eval`].

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use super::codec::{self, NFPROTO_BRIDGE, NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6, Object, Writer};
use super::expr::uapi::{NFTA_EXPR_DATA, NFTA_EXPR_NAME, NFTA_LIST_ELEM, NFTA_MATCH_NAME};
use super::nfnl_socket::NfnlSocket;
use super::set::*;
use crate::kernel::netns::Netns;
use crate::model::Family;
use crate::plan::OpError;

/// `NFT_TABLE_F_DORMANT`: the chains of the table are not evaluated.
const NFT_TABLE_F_DORMANT: u32 = 1;
/// `NFTNL_UDATA_RULE_COMMENT`, libnftnl's `include/libnftnl/udata.h`.
const NFTNL_UDATA_RULE_COMMENT: u8 = 0;

/// The location of a rule or a chain policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RuleRef {
    /// `ip`, `ip6`, `inet`, `bridge`.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The rule's handle, as in `nft -a list ruleset`; absent for a chain policy.
    pub handle: Option<u64>,
    /// The rule's comment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// The chains entered up to the rule, base chain first.
    #[serde(skip)]
    pub path: Vec<String>,
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RuleRef { family, table, chain, handle, comment, .. } = self;
        match handle {
            Some(handle) => write!(f, "rule {handle} of chain {family} {table} {chain}")?,
            None => write!(f, "the policy of chain {family} {table} {chain}")?,
        }
        comment.as_ref().map_or(Ok(()), |comment| write!(f, " (\"{comment}\")"))
    }
}

impl RuleRef {
    /// The `nft` command that lists the chain.
    pub fn list_command(&self) -> String {
        let RuleRef { family, table, chain, .. } = self;
        format!("nft -a list chain {family} {table} {chain}")
    }
}

/// A chain.
pub(super) struct ChainDump {
    pub(super) family: u8,
    pub(super) table: String,
    pub(super) name: String,
    /// The hook number and the priority, for a base chain that is active.
    pub(super) base: Option<(u32, i32)>,
    /// The policy is drop.
    pub(super) policy_drop: bool,
    /// The chain's type is `nat`.
    pub(super) is_nat: bool,
    pub(super) rules: Vec<RuleDump>,
}

/// A rule, with its expressions as name and attributes.
pub(super) struct RuleDump {
    pub(super) handle: u64,
    pub(super) comment: Option<String>,
    pub(super) exprs: Vec<(String, Vec<u8>)>,
}

/// A set with its elements.
#[derive(Debug, Default)]
pub(super) struct SetDump {
    pub(super) flags: u32,
    pub(super) elements: Vec<ElementDump>,
}

/// An element of a set.
#[derive(Debug, Default)]
pub(super) struct ElementDump {
    pub(super) key: Vec<u8>,
    pub(super) key_end: Option<Vec<u8>>,
    /// The element marks the end of an interval and is not a member.
    pub(super) is_interval_end: bool,
    /// The data attributes of a map element.
    pub(super) data: Option<Vec<u8>>,
}

type SetId = (u8, String, String);

/// All rules of a namespace. Sets are read on first use.
pub struct RulesetSnapshot {
    pub(super) chains: Vec<ChainDump>,
    socket: RefCell<NfnlSocket>,
    sets: RefCell<BTreeMap<SetId, Option<Rc<SetDump>>>>,
}

impl RulesetSnapshot {
    /// Reads the calling thread's namespace.
    ///
    /// # Errors
    /// No permission (`CAP_NET_ADMIN`), or no nf_tables in the kernel.
    pub fn read() -> Result<RulesetSnapshot, OpError> {
        let mut socket = NfnlSocket::open(codec::NFNL_SUBSYS_NFTABLES)?;
        let (chains, _) = socket.read_consistent(read_chains)?;
        Ok(RulesetSnapshot { chains, socket: RefCell::new(socket), sets: RefCell::default() })
    }

    /// Reads a namespace.
    ///
    /// # Errors
    /// As [`RulesetSnapshot::read`], or the namespace cannot be entered.
    pub fn read_in(netns: &Netns) -> Result<RulesetSnapshot, OpError> {
        netns.run_in_place(RulesetSnapshot::read).map_err(|e| OpError::from(&e))?
    }

    /// Rules that may redirect packets past routes and bridges, which [`RulesetSnapshot::evaluate`] does not follow.
    pub fn redirections(&self) -> Vec<RuleRef> {
        let redirects = |(name, data): &(String, Vec<u8>)| match name.as_str() {
            "dup" | "fwd" | "tproxy" => true,
            "target" => {
                let target = codec::attribute(data, NFTA_MATCH_NAME).map(codec::strip_nul).unwrap_or_default();
                matches!(target, b"TEE" | b"TPROXY" | b"NETMAP")
            }
            _ => false,
        };
        let mut found = Vec::new();
        for chain in &self.chains {
            // All chains of a device are uncertain: they see packets before any other.
            let rules = chain.rules.iter().filter(|rule| chain.family == NFPROTO_NETDEV || rule.exprs.iter().any(redirects));
            found.extend(rules.map(|rule| RuleRef {
                family: family_name(chain.family).to_owned(),
                table: chain.table.clone(),
                chain: chain.name.clone(),
                handle: Some(rule.handle),
                comment: rule.comment.clone(),
                path: Vec::new(),
            }));
        }
        found
    }

    /// Removes the tables of a name.
    #[must_use]
    pub fn without_table(mut self, name: &str) -> RulesetSnapshot {
        self.chains.retain(|chain| chain.table != name);
        self
    }

    /// Whether a table has chains; `family` is the `nft` keyword.
    pub fn has_table(&self, family: &str, table: &str) -> bool {
        self.chains.iter().any(|chain| chain.table == table && family_name(chain.family) == family)
    }

    /// The names of all chains.
    pub fn chain_names(&self) -> impl Iterator<Item = &str> {
        self.chains.iter().map(|chain| chain.name.as_str())
    }

    /// A set; `None` if it cannot be read.
    pub(super) fn set(&self, family: u8, table: &str, name: &str) -> Option<Rc<SetDump>> {
        let key = (family, table.to_owned(), name.to_owned());
        if let Some(cached) = self.sets.borrow().get(&key) {
            return cached.clone();
        }
        let found = read_set(&mut self.socket.borrow_mut(), family, table, name).ok().flatten().map(Rc::new);
        self.sets.borrow_mut().insert(key, found.clone());
        found
    }
}

/// The tables of iptables-legacy in the calling thread's namespace. nf_tables does not show them. Empty without permission.
pub fn legacy_tables(family: Family) -> Vec<String> {
    let path = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    let mut names: Vec<String> =
        std::fs::read_to_string(path).unwrap_or_default().split_whitespace().map(str::to_owned).collect();
    names.sort();
    names
}

/// `linux/netfilter.h`: chains of a device.
const NFPROTO_NETDEV: u8 = 5;

/// The families whose chains see packets of the namespace.
const FAMILIES: [u8; 5] = [NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6, NFPROTO_BRIDGE, NFPROTO_NETDEV];

/// The `nft` keyword of a family.
pub(super) fn family_name(family: u8) -> &'static str {
    match family {
        NFPROTO_INET => "inet",
        NFPROTO_IPV4 => "ip",
        NFPROTO_IPV6 => "ip6",
        NFPROTO_BRIDGE => "bridge",
        NFPROTO_NETDEV => "netdev",
        _ => "other",
    }
}

fn string_attribute(attributes: &[u8], kind: u16) -> String {
    let name = codec::attribute(attributes, kind).map(codec::strip_nul).unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

fn read_chains(socket: &mut NfnlSocket) -> Result<Vec<ChainDump>, OpError> {
    let mut chains: Vec<ChainDump> = Vec::new();
    for family in FAMILIES {
        let mut dormant = Vec::new();
        socket.dump(
            codec::NFT_MSG_GETTABLE,
            family,
            |_| {},
            |object| {
                if codec::attribute_u32(object.attributes, codec::NFTA_TABLE_FLAGS).unwrap_or(0) & NFT_TABLE_F_DORMANT != 0 {
                    dormant.push(string_attribute(object.attributes, codec::NFTA_TABLE_NAME));
                }
            },
        )?;
        let first = chains.len();
        socket.dump(
            codec::NFT_MSG_GETCHAIN,
            family,
            |_| {},
            |object| {
                let mut chain = read_chain(family, object.attributes);
                if dormant.contains(&chain.table) {
                    chain.base = None;
                }
                chains.push(chain);
            },
        )?;
        socket.dump(
            codec::NFT_MSG_GETRULE,
            family,
            |_| {},
            |object| {
                let (table, name) = (
                    string_attribute(object.attributes, codec::NFTA_RULE_TABLE),
                    string_attribute(object.attributes, codec::NFTA_RULE_CHAIN),
                );
                if let Some(chain) = chains[first..].iter_mut().find(|chain| chain.table == table && chain.name == name) {
                    chain.rules.push(read_rule(object.attributes));
                }
            },
        )?;
    }
    Ok(chains)
}

fn read_chain(family: u8, attributes: &[u8]) -> ChainDump {
    let base = codec::attribute(attributes, codec::NFTA_CHAIN_HOOK).and_then(|hook| {
        Some((
            codec::attribute_u32(hook, codec::NFTA_HOOK_HOOKNUM)?,
            codec::attribute_u32(hook, codec::NFTA_HOOK_PRIORITY)?.cast_signed(),
        ))
    });
    ChainDump {
        family,
        table: string_attribute(attributes, codec::NFTA_CHAIN_TABLE),
        name: string_attribute(attributes, codec::NFTA_CHAIN_NAME),
        base,
        policy_drop: base.is_some() && codec::attribute_u32(attributes, codec::NFTA_CHAIN_POLICY) == Some(codec::NF_DROP),
        is_nat: string_attribute(attributes, codec::NFTA_CHAIN_TYPE) == "nat",
        rules: Vec::new(),
    }
}

fn read_rule(attributes: &[u8]) -> RuleDump {
    let list = codec::attribute(attributes, codec::NFTA_RULE_EXPRESSIONS).unwrap_or_default();
    let exprs = codec::attributes(list).filter(|(kind, _)| *kind == NFTA_LIST_ELEM).map(|(_, element)| {
        let data = codec::attribute(element, NFTA_EXPR_DATA).unwrap_or_default();
        (string_attribute(element, NFTA_EXPR_NAME), data.to_vec())
    });
    RuleDump {
        handle: codec::attribute(attributes, codec::NFTA_RULE_HANDLE).and_then(codec::be64).unwrap_or(0),
        comment: codec::attribute(attributes, codec::NFTA_RULE_USERDATA).and_then(rule_comment),
        exprs: exprs.collect(),
    }
}

/// The comment in a rule's user data. User data are a list of type (1 byte), length (1 byte) and value.
fn rule_comment(mut data: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == NFTNL_UDATA_RULE_COMMENT {
            return Some(String::from_utf8_lossy(codec::strip_nul(value)).into_owned());
        }
        data = &rest[value.len()..];
    }
    None
}

fn read_set(socket: &mut NfnlSocket, family: u8, table: &str, name: &str) -> Result<Option<SetDump>, OpError> {
    let named = |w: &mut Writer| {
        w.text(NFTA_SET_TABLE, table);
        w.text(NFTA_SET_NAME, name);
    };
    let flags = |object: Object<'_>| codec::attribute_u32(object.attributes, NFTA_SET_FLAGS).unwrap_or(0);
    let Some(flags) = socket.get(codec::NFT_MSG_GETSET, family, named, flags)? else { return Ok(None) };
    let mut set = SetDump { flags, elements: Vec::new() };
    let listed = |w: &mut Writer| {
        w.text(NFTA_SET_ELEM_LIST_TABLE, table);
        w.text(NFTA_SET_ELEM_LIST_SET, name);
    };
    socket.dump(codec::NFT_MSG_GETSETELEM, family, listed, |object| {
        let list = codec::attribute(object.attributes, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
        set.elements.extend(codec::attributes(list).map(|(_, element)| read_element(element)));
    })?;
    Ok(Some(set))
}

fn read_element(element: &[u8]) -> ElementDump {
    use super::expr::uapi::NFTA_DATA_VALUE;
    let value = |kind| codec::attribute(element, kind).and_then(|data| codec::attribute(data, NFTA_DATA_VALUE));
    ElementDump {
        key: value(NFTA_SET_ELEM_KEY).unwrap_or_default().to_vec(),
        key_end: value(NFTA_SET_ELEM_KEY_END).map(<[u8]>::to_vec),
        is_interval_end: codec::attribute_u32(element, NFTA_SET_ELEM_FLAGS).unwrap_or(0) & NFT_SET_ELEM_INTERVAL_END != 0,
        data: codec::attribute(element, NFTA_SET_ELEM_DATA).map(<[u8]>::to_vec),
    }
}
