//! Our tables: written whole in one transaction together with what their sets hold, read whole.

use super::channel::{Channel, Transaction};
use super::expr::{self, Dialect, IFNAMSIZ, table_family};
use super::set;
use super::wire::{self, NLM_F_APPEND, NLM_F_CREATE, Object, Writer};
use crate::plan::OpError;
use crate::plan::ruleset::{Base, Chain, ChainKind, Counter, Expr, Hook, Ruleset, TABLE, Table};

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

/// How many changes [`replace`] adds to a transaction.
pub(super) fn changes(ruleset: &Ruleset) -> usize {
    let rules: usize = ruleset.chains.iter().map(|chain| chain.rules.len()).sum();
    3 + ruleset.sets.len() + ruleset.counters.len() + ruleset.chains.len() + rules
}

/// Replaces a table, whatever it held: no packet sees anything between. Counters go on from what they had counted.
pub(super) fn replace(transaction: &mut Transaction, ruleset: &Ruleset, counted: impl Fn(Counter) -> Counted) {
    let family = table_family(ruleset.table);
    // Made first so that the deletion always finds one.
    table(transaction, wire::NFT_MSG_NEWTABLE, NLM_F_CREATE, family);
    table(transaction, wire::NFT_MSG_DELTABLE, 0, family);
    table(transaction, wire::NFT_MSG_NEWTABLE, NLM_F_CREATE, family);
    for (set, id) in ruleset.sets.iter().zip(1..) {
        set::new_set(transaction, *set, id);
    }
    for counter in &ruleset.counters {
        new_counter(transaction, *counter, counted(*counter));
    }
    for chain in &ruleset.chains {
        new_chain(transaction, chain, family);
    }
    for chain in &ruleset.chains {
        for rule in &chain.rules {
            transaction.change(wire::NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, family, |w| {
                w.text(wire::NFTA_RULE_TABLE, TABLE);
                w.text(wire::NFTA_RULE_CHAIN, &chain.name);
                expr::write(w, rule, Dialect::of(ruleset.table));
            });
        }
    }
}

/// Which part of a ruleset a change of [`replace`] is, in words; empty where it is the table.
pub(super) fn part(ruleset: &Ruleset, change: usize) -> String {
    let sets = ruleset.sets.iter().map(|set| format!("set {}", set.name()));
    let counters = ruleset.counters.iter().map(|counter| format!("counter {}", counter.name()));
    let chains = ruleset.chains.iter().map(|chain| format!("chain {}", chain.name));
    let rules = ruleset
        .chains
        .iter()
        .flat_map(|chain| chain.rules.iter().map(move |rule| format!("rule `{rule}` of chain {}", chain.name)));
    let nth = |index| sets.chain(counters).chain(chains).chain(rules).nth(index);
    change.checked_sub(3).and_then(nth).unwrap_or_default()
}

/// Deletes a table with all that is in it.
pub(super) fn delete(transaction: &mut Transaction, table_: Table) {
    table(transaction, wire::NFT_MSG_DELTABLE, 0, table_family(table_));
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
        match ruleset.chains.iter_mut().find(|chain| chain.name.as_bytes() == name) {
            Some(chain) => chain.rules.push(expr::read(object.attributes, Dialect::of(table))),
            None => {}
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

fn table(transaction: &mut Transaction, message: u8, flags: u16, family: u8) {
    transaction.change(message, flags, family, |w| w.text(wire::NFTA_TABLE_NAME, TABLE));
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
