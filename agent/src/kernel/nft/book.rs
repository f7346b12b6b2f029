//! All rules of a network namespace, whoever made them: read for [`super::judge`], never written.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use super::channel::Channel;
use super::expr::uapi::{NFTA_EXPR_DATA, NFTA_EXPR_NAME, NFTA_LIST_ELEM};
use super::set::*;
use super::wire::{self, NFPROTO_BRIDGE, NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6, Object, Writer};
use crate::plan::OpError;

/// `NFT_TABLE_F_DORMANT`: the table's chains see no packet.
const DORMANT: u32 = 1;
/// `NFTNL_UDATA_RULE_COMMENT`, libnftnl's `include/libnftnl/udata.h`.
const UDATA_COMMENT: u8 = 0;

/// Where in the rules something stands.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// `ip`, `ip6`, `inet`, `bridge`.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The rule's handle, as `nft -a list ruleset` shows it; absent for a chain's policy.
    pub handle: Option<u64>,
    /// The rule's comment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { family, table, chain, handle, comment } = self;
        match handle {
            Some(handle) => write!(f, "rule {handle} of chain {family} {table} {chain}")?,
            None => write!(f, "the policy of chain {family} {table} {chain}")?,
        }
        comment.as_ref().map_or(Ok(()), |comment| write!(f, " (\"{comment}\")"))
    }
}

impl Place {
    /// The command that lists the chain.
    pub fn command(&self) -> String {
        let Place { family, table, chain, .. } = self;
        format!("nft -a list chain {family} {table} {chain}")
    }
}

/// A chain.
pub(super) struct BookChain {
    pub(super) family: u8,
    pub(super) table: String,
    pub(super) name: String,
    /// The hook's number and the priority.
    pub(super) base: Option<(u32, i32)>,
    /// Its policy is drop.
    pub(super) drops: bool,
    pub(super) rules: Vec<BookRule>,
}

/// A rule: its expressions by name, each with its attributes.
pub(super) struct BookRule {
    pub(super) handle: u64,
    pub(super) comment: Option<String>,
    pub(super) exprs: Vec<(String, Vec<u8>)>,
}

/// A set with what it holds.
#[derive(Debug, Default)]
pub(super) struct BookSet {
    pub(super) flags: u32,
    pub(super) elements: Vec<BookElement>,
}

/// An element of a set.
#[derive(Debug, Default)]
pub(super) struct BookElement {
    pub(super) key: Vec<u8>,
    pub(super) end: Option<Vec<u8>>,
    /// The element is the end of an interval, no member.
    pub(super) closes: bool,
    /// The attributes of what it leads to.
    pub(super) data: Option<Vec<u8>>,
}

type SetKey = (u8, String, String);

/// All rules of a namespace. Sets are read when a rule asks for them.
pub struct Book {
    pub(super) chains: Vec<BookChain>,
    channel: RefCell<Channel>,
    sets: RefCell<BTreeMap<SetKey, Option<Rc<BookSet>>>>,
}

impl Book {
    /// Reads the calling thread's namespace.
    ///
    /// # Errors
    /// No permission (`CAP_NET_ADMIN`), no nf_tables in the kernel.
    pub fn read() -> Result<Book, OpError> {
        let mut channel = Channel::open(wire::NFNL_SUBSYS_NFTABLES)?;
        let (chains, _) = channel.consistent(read_chains)?;
        Ok(Book { chains, channel: RefCell::new(channel), sets: RefCell::default() })
    }

    /// A set; `None` where it cannot be read.
    pub(super) fn set(&self, family: u8, table: &str, name: &str) -> Option<Rc<BookSet>> {
        let key = (family, table.to_owned(), name.to_owned());
        if let Some(known) = self.sets.borrow().get(&key) {
            return known.clone();
        }
        let found = read_set(&mut self.channel.borrow_mut(), family, table, name).ok().flatten().map(Rc::new);
        self.sets.borrow_mut().insert(key, found.clone());
        found
    }
}

/// The families whose chains see IP packets, and the bridge's.
const FAMILIES: [u8; 4] = [NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6, NFPROTO_BRIDGE];

/// A family's word.
pub(super) fn family_word(family: u8) -> &'static str {
    match family {
        NFPROTO_INET => "inet",
        NFPROTO_IPV4 => "ip",
        NFPROTO_IPV6 => "ip6",
        NFPROTO_BRIDGE => "bridge",
        _ => "other",
    }
}

fn string(attributes: &[u8], kind: u16) -> String {
    let name = wire::attribute(attributes, kind).map(wire::name).unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

fn read_chains(channel: &mut Channel) -> Result<Vec<BookChain>, OpError> {
    let mut chains: Vec<BookChain> = Vec::new();
    for family in FAMILIES {
        let mut asleep = Vec::new();
        channel.dump(
            wire::NFT_MSG_GETTABLE,
            family,
            |_| {},
            |object| {
                if wire::number(object.attributes, wire::NFTA_TABLE_FLAGS).unwrap_or(0) & DORMANT != 0 {
                    asleep.push(string(object.attributes, wire::NFTA_TABLE_NAME));
                }
            },
        )?;
        let first = chains.len();
        channel.dump(
            wire::NFT_MSG_GETCHAIN,
            family,
            |_| {},
            |object| {
                let mut chain = read_chain(family, object.attributes);
                if asleep.contains(&chain.table) {
                    chain.base = None;
                }
                chains.push(chain);
            },
        )?;
        channel.dump(
            wire::NFT_MSG_GETRULE,
            family,
            |_| {},
            |object| {
                let (table, name) =
                    (string(object.attributes, wire::NFTA_RULE_TABLE), string(object.attributes, wire::NFTA_RULE_CHAIN));
                if let Some(chain) = chains[first..].iter_mut().find(|chain| chain.table == table && chain.name == name) {
                    chain.rules.push(read_rule(object.attributes));
                }
            },
        )?;
    }
    Ok(chains)
}

fn read_chain(family: u8, attributes: &[u8]) -> BookChain {
    let base = wire::attribute(attributes, wire::NFTA_CHAIN_HOOK).and_then(|hook| {
        Some((wire::number(hook, wire::NFTA_HOOK_HOOKNUM)?, wire::number(hook, wire::NFTA_HOOK_PRIORITY)?.cast_signed()))
    });
    BookChain {
        family,
        table: string(attributes, wire::NFTA_CHAIN_TABLE),
        name: string(attributes, wire::NFTA_CHAIN_NAME),
        base,
        drops: base.is_some() && wire::number(attributes, wire::NFTA_CHAIN_POLICY) == Some(wire::NF_DROP),
        rules: Vec::new(),
    }
}

fn read_rule(attributes: &[u8]) -> BookRule {
    let list = wire::attribute(attributes, wire::NFTA_RULE_EXPRESSIONS).unwrap_or_default();
    let exprs = wire::attributes(list).filter(|(kind, _)| *kind == NFTA_LIST_ELEM).map(|(_, element)| {
        let data = wire::attribute(element, NFTA_EXPR_DATA).unwrap_or_default();
        (string(element, NFTA_EXPR_NAME), data.to_vec())
    });
    BookRule {
        handle: wire::attribute(attributes, wire::NFTA_RULE_HANDLE).and_then(wire::be64).unwrap_or(0),
        comment: wire::attribute(attributes, wire::NFTA_RULE_USERDATA).and_then(comment),
        exprs: exprs.collect(),
    }
}

/// The comment in a rule's user data: a list of type (1 byte), length (1 byte) and value.
fn comment(mut data: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == UDATA_COMMENT {
            return Some(String::from_utf8_lossy(wire::name(value)).into_owned());
        }
        data = &rest[value.len()..];
    }
    None
}

fn read_set(channel: &mut Channel, family: u8, table: &str, name: &str) -> Result<Option<BookSet>, OpError> {
    let named = |w: &mut Writer| {
        w.text(NFTA_SET_TABLE, table);
        w.text(NFTA_SET_NAME, name);
    };
    let flags = |object: Object<'_>| wire::number(object.attributes, NFTA_SET_FLAGS).unwrap_or(0);
    let Some(flags) = channel.get(wire::NFT_MSG_GETSET, family, named, flags)? else { return Ok(None) };
    let mut set = BookSet { flags, elements: Vec::new() };
    let listed = |w: &mut Writer| {
        w.text(NFTA_SET_ELEM_LIST_TABLE, table);
        w.text(NFTA_SET_ELEM_LIST_SET, name);
    };
    channel.dump(wire::NFT_MSG_GETSETELEM, family, listed, |object| {
        let list = wire::attribute(object.attributes, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
        set.elements.extend(wire::attributes(list).map(|(_, element)| read_element(element)));
    })?;
    Ok(Some(set))
}

fn read_element(element: &[u8]) -> BookElement {
    use super::expr::uapi::NFTA_DATA_VALUE;
    let value = |kind| wire::attribute(element, kind).and_then(|data| wire::attribute(data, NFTA_DATA_VALUE));
    BookElement {
        key: value(NFTA_SET_ELEM_KEY).unwrap_or_default().to_vec(),
        end: value(NFTA_SET_ELEM_KEY_END).map(<[u8]>::to_vec),
        closes: wire::number(element, NFTA_SET_ELEM_FLAGS).unwrap_or(0) & NFT_SET_ELEM_INTERVAL_END != 0,
        data: wire::attribute(element, NFTA_SET_ELEM_DATA).map(<[u8]>::to_vec),
    }
}
