//! Our tables: written in one transaction, read whole.

use std::collections::BTreeMap;

use super::channel::{Channel, Transaction};
use super::expr::{self, Dialect, IFNAMSIZ, table_family};
use super::set;
use super::wire::{self, NLM_F_APPEND, NLM_F_CREATE, Object, Writer};
use crate::plan::OpError;
use crate::plan::ruleset::{Base, Chain, ChainKind, Counter, Expr, Hook, Rule, Ruleset, SetName, TABLE, Table};

const NFTA_OBJ_TABLE: u16 = 1;
const NFTA_OBJ_NAME: u16 = 2;
const NFTA_OBJ_TYPE: u16 = 3;
const NFTA_OBJ_DATA: u16 = 4;
const NFTA_COUNTER_BYTES: u16 = 1;
const NFTA_COUNTER_PACKETS: u16 = 2;

const NFTA_FLOWTABLE_TABLE: u16 = 1;
const NFTA_FLOWTABLE_NAME: u16 = 2;

/// What a counter has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    /// Packets.
    pub packets: u64,
    /// Their bytes from the network header on; on the bridge, those of the frame without its Ethernet header.
    pub bytes: u64,
}

/// One message of a change of a table.
#[derive(Clone, Copy)]
pub(super) enum Piece<'a> {
    /// The table is made, or deleted with all that is in it.
    Table {
        message: u8,
    },
    /// All rules go.
    DropRules,
    DropChain(&'a Chain),
    DropSet(SetName),
    DropCounter(Counter),
    Set(SetName, u32),
    Counter(Counter),
    Chain(&'a Chain),
    Rule(&'a Chain, &'a Rule),
}

/// The pieces that make a table what it should be, whatever it held. What its sets held goes.
pub(super) fn replace(wanted: &Ruleset) -> Vec<Piece<'_>> {
    // Made first so that the deletion always finds one.
    let mut pieces =
        [wire::NFT_MSG_NEWTABLE, wire::NFT_MSG_DELTABLE, wire::NFT_MSG_NEWTABLE].map(|message| Piece::Table { message }).to_vec();
    add(&mut pieces, &Ruleset::default(), wanted);
    pieces
}

/// The pieces that make one table of ours another one. Sets that both have keep what they hold, and counters what they have counted: the cost does
/// not grow with the number of elements.
pub(super) fn change<'a>(found: &'a Ruleset, wanted: &'a Ruleset) -> Vec<Piece<'a>> {
    let mut pieces = vec![Piece::DropRules];
    pieces.extend(found.chains.iter().filter(|chain| !has_chain(wanted, chain)).map(Piece::DropChain));
    pieces.extend(found.sets.iter().filter(|set| !wanted.sets.contains(set)).map(|set| Piece::DropSet(*set)));
    let gone = found.counters.iter().filter(|counter| !wanted.counters.contains(counter));
    pieces.extend(gone.map(|counter| Piece::DropCounter(*counter)));
    add(&mut pieces, found, wanted);
    pieces
}

/// What is not there yet, and all rules.
fn add<'a>(pieces: &mut Vec<Piece<'a>>, found: &Ruleset, wanted: &'a Ruleset) {
    let new = wanted.sets.iter().filter(|set| !found.sets.contains(set));
    pieces.extend(new.zip(1..).map(|(set, id)| Piece::Set(*set, id)));
    let new = wanted.counters.iter().filter(|counter| !found.counters.contains(counter));
    pieces.extend(new.map(|counter| Piece::Counter(*counter)));
    pieces.extend(wanted.chains.iter().filter(|chain| !has_chain(found, chain)).map(Piece::Chain));
    for chain in &wanted.chains {
        pieces.extend(chain.rules.iter().map(|rule| Piece::Rule(chain, rule)));
    }
}

/// Whether a table has this chain, whatever its rules.
fn has_chain(ruleset: &Ruleset, chain: &Chain) -> bool {
    ruleset.chains.iter().any(|other| other.name == chain.name && other.base == chain.base)
}

impl Piece<'_> {
    /// Writes it. A counter begins with what it had counted.
    pub(super) fn write(&self, transaction: &mut Transaction, table: Table, counted: &BTreeMap<Counter, Counted>) {
        let family = table_family(table);
        let named = |transaction: &mut Transaction, message, table_attribute, name_attribute, name: &str| {
            transaction.change(message, 0, family, |w| {
                w.text(table_attribute, TABLE);
                w.text(name_attribute, name);
            });
        };
        match *self {
            Piece::Table { message } => {
                let flags = if message == wire::NFT_MSG_NEWTABLE { NLM_F_CREATE } else { 0 };
                transaction.change(message, flags, family, |w| w.text(wire::NFTA_TABLE_NAME, TABLE));
            }
            Piece::DropRules => transaction.change(wire::NFT_MSG_DELRULE, 0, family, |w| w.text(wire::NFTA_RULE_TABLE, TABLE)),
            Piece::DropChain(chain) => {
                named(transaction, wire::NFT_MSG_DELCHAIN, wire::NFTA_CHAIN_TABLE, wire::NFTA_CHAIN_NAME, &chain.name);
            }
            Piece::DropSet(set) => {
                named(transaction, wire::NFT_MSG_DELSET, set::NFTA_SET_TABLE, set::NFTA_SET_NAME, set.name());
            }
            Piece::DropCounter(counter) => transaction.change(wire::NFT_MSG_DELOBJ, 0, family, |w| {
                w.text(NFTA_OBJ_TABLE, TABLE);
                w.text(NFTA_OBJ_NAME, counter.name());
                w.u32(NFTA_OBJ_TYPE, wire::NFT_OBJECT_COUNTER);
            }),
            Piece::Set(set, id) => set::new_set(transaction, set, id),
            Piece::Counter(counter) => new_counter(transaction, counter, counted.get(&counter).copied().unwrap_or_default()),
            Piece::Chain(chain) => new_chain(transaction, chain, family),
            Piece::Rule(chain, rule) => {
                transaction.change(wire::NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, family, |w| {
                    w.text(wire::NFTA_RULE_TABLE, TABLE);
                    w.text(wire::NFTA_RULE_CHAIN, &chain.name);
                    expr::write(w, rule, Dialect::of(table));
                });
            }
        }
    }

    /// What it is, in words; empty where it is the table.
    pub(super) fn words(&self) -> String {
        match self {
            Piece::Table { .. } => String::new(),
            Piece::DropRules => "its rules".to_owned(),
            Piece::DropChain(chain) | Piece::Chain(chain) => format!("chain {}", chain.name),
            Piece::DropSet(set) | Piece::Set(set, _) => format!("set {}", set.name()),
            Piece::DropCounter(counter) | Piece::Counter(counter) => format!("counter {}", counter.name()),
            Piece::Rule(chain, rule) => format!("rule `{rule}` of chain {}", chain.name),
        }
    }
}

/// Reads a table; `None` where there is none. To be called inside [`Channel::consistent`].
pub(super) fn read(channel: &mut Channel, table: Table) -> Result<Option<Ruleset>, OpError> {
    let family = table_family(table);
    let flags = |object: Object<'_>| wire::number(object.attributes, wire::NFTA_TABLE_FLAGS).unwrap_or(0);
    let named = |w: &mut Writer| w.text(wire::NFTA_TABLE_NAME, TABLE);
    let Some(flags) = channel.get(wire::NFT_MSG_GETTABLE, family, named, flags)? else { return Ok(None) };

    let mut ruleset = Ruleset { table, ..Ruleset::default() };
    if flags != 0 {
        ruleset.foreign.push(format!("flags {flags:#x}"));
    }
    // Chains cannot be asked for by table.
    channel.dump(
        wire::NFT_MSG_GETCHAIN,
        family,
        |_| {},
        |object| {
            if is_named(object.attributes, wire::NFTA_CHAIN_TABLE, TABLE) {
                match read_chain(object.attributes) {
                    Ok(chain) => ruleset.chains.push(chain),
                    Err(words) => ruleset.foreign.push(words),
                }
            }
        },
    )?;
    let (sets, foreign) = set::read_sets(channel, table)?;
    ruleset.sets = sets;
    ruleset.foreign.extend(foreign);
    for (name, counter, _) in objects(channel, table)? {
        match counter {
            Some(counter) => ruleset.counters.push(counter),
            None => ruleset.foreign.push(format!("object {name}")),
        }
    }
    ruleset.counters.sort();
    // The kernel has them in the order in which they were made.
    ruleset.chains.sort_by(|a, b| a.name.cmp(&b.name));
    channel.dump(wire::NFT_MSG_GETFLOWTABLE, family, named, |object| {
        if is_named(object.attributes, NFTA_FLOWTABLE_TABLE, TABLE) {
            let name = wire::attribute(object.attributes, NFTA_FLOWTABLE_NAME).map(wire::name).unwrap_or_default();
            ruleset.foreign.push(format!("flowtable {}", String::from_utf8_lossy(name)));
        }
    })?;
    let of_table = |w: &mut Writer| w.text(wire::NFTA_RULE_TABLE, TABLE);
    channel.dump(wire::NFT_MSG_GETRULE, family, of_table, |object| {
        if !is_named(object.attributes, wire::NFTA_RULE_TABLE, TABLE) {
            return;
        }
        let name = wire::attribute(object.attributes, wire::NFTA_RULE_CHAIN).map(wire::name).unwrap_or_default();
        if let Some(chain) = ruleset.chains.iter_mut().find(|chain| chain.name.as_bytes() == name) {
            chain.rules.push(expr::read(object.attributes, Dialect::of(table)));
        }
    })?;
    Ok(Some(ruleset))
}

/// What the counters of a table have counted; empty where there is no table.
pub(super) fn counters(channel: &mut Channel, table: Table) -> Result<Vec<(Counter, Counted)>, OpError> {
    let counter = |(_, counter, counted): (String, Option<Counter>, Counted)| counter.map(|counter| (counter, counted));
    match objects(channel, table) {
        Ok(objects) => Ok(objects.into_iter().filter_map(counter).collect()),
        Err(error) if error.errno == libc::ENOENT => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The named objects of a table, those that are counters of ours and what they have counted.
fn objects(channel: &mut Channel, table: Table) -> Result<Vec<(String, Option<Counter>, Counted)>, OpError> {
    let mut all = Vec::new();
    let of_table = |w: &mut Writer| w.text(NFTA_OBJ_TABLE, TABLE);
    channel.dump(wire::NFT_MSG_GETOBJ, table_family(table), of_table, |object| {
        if !is_named(object.attributes, NFTA_OBJ_TABLE, TABLE) {
            return;
        }
        let name = wire::attribute(object.attributes, NFTA_OBJ_NAME).map(wire::name).unwrap_or_default();
        let is_counter = wire::number(object.attributes, NFTA_OBJ_TYPE) == Some(wire::NFT_OBJECT_COUNTER);
        let named = |counter: &Counter| counter.table() == table && counter.name().as_bytes() == name;
        let counter = Counter::ALL.into_iter().find(named).filter(|_| is_counter);
        let data = wire::attribute(object.attributes, NFTA_OBJ_DATA).unwrap_or_default();
        let number = |kind| wire::attribute(data, kind).and_then(wire::be64).unwrap_or(0);
        let counted = Counted { packets: number(NFTA_COUNTER_PACKETS), bytes: number(NFTA_COUNTER_BYTES) };
        all.push((String::from_utf8_lossy(name).into_owned(), counter, counted));
    })?;
    Ok(all)
}

/// Whether a text attribute has that value.
pub(super) fn is_named(attributes: &[u8], kind: u16, name: &str) -> bool {
    wire::attribute(attributes, kind).is_some_and(|value| wire::name(value) == name.as_bytes())
}

fn new_counter(transaction: &mut Transaction, counter: Counter, counted: Counted) {
    transaction.change(wire::NFT_MSG_NEWOBJ, NLM_F_CREATE, table_family(counter.table()), |w| {
        w.text(NFTA_OBJ_TABLE, TABLE);
        w.text(NFTA_OBJ_NAME, counter.name());
        w.u32(NFTA_OBJ_TYPE, wire::NFT_OBJECT_COUNTER);
        w.nest(NFTA_OBJ_DATA, |w| {
            w.u64(NFTA_COUNTER_BYTES, counted.bytes);
            w.u64(NFTA_COUNTER_PACKETS, counted.packets);
        });
    });
}

fn new_chain(transaction: &mut Transaction, chain: &Chain, family: u8) {
    transaction.change(wire::NFT_MSG_NEWCHAIN, NLM_F_CREATE, family, |w| {
        w.text(wire::NFTA_CHAIN_TABLE, TABLE);
        w.text(wire::NFTA_CHAIN_NAME, &chain.name);
        let Some(base) = chain.base else { return };
        w.nest(wire::NFTA_CHAIN_HOOK, |w| {
            w.u32(wire::NFTA_HOOK_HOOKNUM, hook_number(base.hook));
            w.u32(wire::NFTA_HOOK_PRIORITY, base.priority.cast_unsigned());
        });
        w.u32(wire::NFTA_CHAIN_POLICY, wire::NF_ACCEPT);
        w.text(wire::NFTA_CHAIN_TYPE, kind_name(base.kind));
    });
}

/// The chain, or in words what it is where no [`Chain`] can say it.
fn read_chain(attributes: &[u8]) -> Result<Chain, String> {
    let name = wire::attribute(attributes, wire::NFTA_CHAIN_NAME).map(wire::name).unwrap_or_default();
    let name = String::from_utf8_lossy(name).into_owned();
    let Some(hook) = wire::attribute(attributes, wire::NFTA_CHAIN_HOOK) else {
        return Ok(Chain { name, base: None, rules: Vec::new() });
    };
    let other = |what: &str| format!("chain {name} with {what}");
    let policy = wire::number(attributes, wire::NFTA_CHAIN_POLICY);
    if policy != Some(wire::NF_ACCEPT) {
        return Err(other("another policy than accept"));
    }
    let flags = wire::number(attributes, wire::NFTA_CHAIN_FLAGS).unwrap_or(wire::NFT_CHAIN_BASE);
    let on_device = [wire::NFTA_HOOK_DEV, wire::NFTA_HOOK_DEVS].iter().any(|kind| wire::attribute(hook, *kind).is_some());
    if flags != wire::NFT_CHAIN_BASE || on_device {
        return Err(other("flags or devices"));
    }
    let kind = wire::attribute(attributes, wire::NFTA_CHAIN_TYPE).map(wire::name);
    let kind = [ChainKind::Filter, ChainKind::Nat].into_iter().find(|k| kind == Some(kind_name(*k).as_bytes()));
    let number = wire::number(hook, wire::NFTA_HOOK_HOOKNUM);
    let hook_name = HOOKS.into_iter().find(|hook| number == Some(hook_number(*hook)));
    let priority = wire::number(hook, wire::NFTA_HOOK_PRIORITY);
    match (kind, hook_name, priority) {
        (Some(kind), Some(hook), Some(priority)) => {
            let base = Base { hook, kind, priority: priority.cast_signed() };
            Ok(Chain { name, base: Some(base), rules: Vec::new() })
        }
        _ => Err(other("another type or hook")),
    }
}

const HOOKS: [Hook; 5] = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];

/// `enum nf_inet_hooks`, `linux/netfilter.h`; those of the bridge have the same numbers (`linux/netfilter_bridge.h`).
pub(super) const fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

const fn kind_name(kind: ChainKind) -> &'static str {
    match kind {
        ChainKind::Filter => "filter",
        ChainKind::Nat => "nat",
    }
}

/// Refuses what has no form in the kernel, before anything is sent.
pub(super) fn check(ruleset: &Ruleset) -> Result<(), OpError> {
    let refuse = |message: String| Err(OpError { errno: libc::EINVAL, message });
    if let Some(thing) = ruleset.foreign.first() {
        let table = ruleset.table;
        return refuse(format!("table {table} {TABLE} cannot be written with `{thing}`, which was read and is not ours"));
    }
    for chain in &ruleset.chains {
        for (index, rule) in chain.rules.iter().enumerate() {
            for expr in &rule.exprs {
                match expr {
                    Expr::Foreign => {
                        return refuse(format!("rule {} of chain {} was read and is not ours", index + 1, chain.name));
                    }
                    Expr::InputInterface(name) | Expr::OutputInterface(name)
                        if name.is_empty() || name.len() >= IFNAMSIZ || name.contains('\0') =>
                    {
                        return refuse(format!(
                            "interface name `{}` in rule {} of chain {}: 1 to 15 bytes are allowed",
                            name.escape_default(),
                            index + 1,
                            chain.name
                        ));
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(())
}
