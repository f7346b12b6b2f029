//! Reads and writes our tables; a table is written in one transaction.

use std::collections::BTreeMap;

use super::codec::{self, NLM_F_APPEND, NLM_F_CREATE, Object, Writer, attribute_equals, table_family};
use super::expr::{self, IFNAMSIZ, RuleEncoding};
use super::nfnl_socket::{NfnlSocket, Transaction};
use super::set;
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

/// The values of a counter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CounterValue {
    /// Packets.
    pub packets: u64,
    /// Bytes, counted from the network header; on the bridge, of the frame without its Ethernet header.
    pub bytes: u64,
}

/// One netlink message of a table change.
#[derive(Clone, Copy)]
pub(super) enum TableChange<'a> {
    /// Creates the table, or deletes it with its contents.
    Table {
        message: u8,
    },
    /// Deletes all rules.
    DeleteRules,
    DeleteChain(&'a Chain),
    DeleteSet(SetName),
    DeleteCounter(Counter),
    AddSet(SetName, u32),
    AddCounter(Counter),
    AddChain(&'a Chain),
    AddRule(&'a Chain, &'a Rule),
}

/// The changes that rebuild a table from scratch. The elements of its sets are lost.
pub(super) fn replacement(wanted: &Ruleset) -> Vec<TableChange<'_>> {
    // Created first, because the deletion fails if the table does not exist.
    let mut changes = [codec::NFT_MSG_NEWTABLE, codec::NFT_MSG_DELTABLE, codec::NFT_MSG_NEWTABLE]
        .map(|message| TableChange::Table { message })
        .to_vec();
    push_additions(&mut changes, &Ruleset::default(), wanted);
    changes
}

/// The changes that turn one of our tables into another. Sets and counters in both keep their contents, so the cost does not grow
/// with the number of elements.
pub(super) fn update<'a>(found: &'a Ruleset, wanted: &'a Ruleset) -> Vec<TableChange<'a>> {
    let mut changes = vec![TableChange::DeleteRules];
    changes.extend(found.chains.iter().filter(|chain| !has_chain(wanted, chain)).map(TableChange::DeleteChain));
    changes.extend(found.sets.iter().filter(|set| !wanted.sets.contains(set)).map(|set| TableChange::DeleteSet(*set)));
    let removed = found.counters.iter().filter(|counter| !wanted.counters.contains(counter));
    changes.extend(removed.map(|counter| TableChange::DeleteCounter(*counter)));
    push_additions(&mut changes, found, wanted);
    changes
}

/// Adds the missing objects, and all rules.
fn push_additions<'a>(changes: &mut Vec<TableChange<'a>>, found: &Ruleset, wanted: &'a Ruleset) {
    let new = wanted.sets.iter().filter(|set| !found.sets.contains(set));
    changes.extend(new.zip(1..).map(|(set, id)| TableChange::AddSet(*set, id)));
    let new = wanted.counters.iter().filter(|counter| !found.counters.contains(counter));
    changes.extend(new.map(|counter| TableChange::AddCounter(*counter)));
    changes.extend(wanted.chains.iter().filter(|chain| !has_chain(found, chain)).map(TableChange::AddChain));
    for chain in &wanted.chains {
        changes.extend(chain.rules.iter().map(|rule| TableChange::AddRule(chain, rule)));
    }
}

/// Whether a table has this chain; rules are not compared.
fn has_chain(ruleset: &Ruleset, chain: &Chain) -> bool {
    ruleset.chains.iter().any(|other| other.name == chain.name && other.base == chain.base)
}

impl TableChange<'_> {
    /// Writes the change. A new counter starts with its previous value.
    pub(super) fn write(&self, transaction: &mut Transaction, table: Table, counter_values: &BTreeMap<Counter, CounterValue>) {
        let family = table_family(table);
        let delete_named = |transaction: &mut Transaction, message, table_attribute, name_attribute, name: &str| {
            transaction.push_message(message, 0, family, |w| {
                w.text(table_attribute, TABLE);
                w.text(name_attribute, name);
            });
        };
        match *self {
            TableChange::Table { message } => {
                let flags = if message == codec::NFT_MSG_NEWTABLE { NLM_F_CREATE } else { 0 };
                transaction.push_message(message, flags, family, |w| w.text(codec::NFTA_TABLE_NAME, TABLE));
            }
            TableChange::DeleteRules => {
                transaction.push_message(codec::NFT_MSG_DELRULE, 0, family, |w| w.text(codec::NFTA_RULE_TABLE, TABLE))
            }
            TableChange::DeleteChain(chain) => {
                delete_named(transaction, codec::NFT_MSG_DELCHAIN, codec::NFTA_CHAIN_TABLE, codec::NFTA_CHAIN_NAME, &chain.name);
            }
            TableChange::DeleteSet(set) => {
                delete_named(transaction, codec::NFT_MSG_DELSET, set::NFTA_SET_TABLE, set::NFTA_SET_NAME, &set.name());
            }
            TableChange::DeleteCounter(counter) => transaction.push_message(codec::NFT_MSG_DELOBJ, 0, family, |w| {
                w.text(NFTA_OBJ_TABLE, TABLE);
                w.text(NFTA_OBJ_NAME, counter.name());
                w.u32(NFTA_OBJ_TYPE, codec::NFT_OBJECT_COUNTER);
            }),
            TableChange::AddSet(set, id) => set::add_set(transaction, set, id),
            TableChange::AddCounter(counter) => {
                add_counter(transaction, counter, counter_values.get(&counter).copied().unwrap_or_default())
            }
            TableChange::AddChain(chain) => add_chain(transaction, chain, family),
            TableChange::AddRule(chain, rule) => {
                transaction.push_message(codec::NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, family, |w| {
                    w.text(codec::NFTA_RULE_TABLE, TABLE);
                    w.text(codec::NFTA_RULE_CHAIN, &chain.name);
                    expr::write(w, rule, RuleEncoding::for_table(table));
                });
            }
        }
    }

    /// A description for error messages; empty for the table itself.
    pub(super) fn describe(&self) -> String {
        match self {
            TableChange::Table { .. } => String::new(),
            TableChange::DeleteRules => "its rules".to_owned(),
            TableChange::DeleteChain(chain) | TableChange::AddChain(chain) => format!("chain {}", chain.name),
            TableChange::DeleteSet(set) | TableChange::AddSet(set, _) => format!("set {}", set.name()),
            TableChange::DeleteCounter(counter) | TableChange::AddCounter(counter) => format!("counter {}", counter.name()),
            TableChange::AddRule(chain, rule) => format!("rule `{rule}` of chain {}", chain.name),
        }
    }
}

/// Reads a table; `None` if it does not exist. Call inside [`NfnlSocket::read_consistent`].
pub(super) fn read(socket: &mut NfnlSocket, table: Table) -> Result<Option<Ruleset>, OpError> {
    let family = table_family(table);
    let flags = |object: Object<'_>| codec::attribute_u32(object.attributes, codec::NFTA_TABLE_FLAGS).unwrap_or(0);
    let table_name = |w: &mut Writer| w.text(codec::NFTA_TABLE_NAME, TABLE);
    let Some(flags) = socket.get(codec::NFT_MSG_GETTABLE, family, table_name, flags)? else { return Ok(None) };

    let mut ruleset = Ruleset { table, ..Ruleset::default() };
    if flags != 0 {
        ruleset.foreign.push(format!("flags {flags:#x}"));
    }
    // The kernel cannot filter a chain dump by table.
    socket.dump(
        codec::NFT_MSG_GETCHAIN,
        family,
        |_| {},
        |object| {
            if attribute_equals(object.attributes, codec::NFTA_CHAIN_TABLE, TABLE) {
                match read_chain(object.attributes) {
                    Ok(chain) => ruleset.chains.push(chain),
                    Err(description) => ruleset.foreign.push(description),
                }
            }
        },
    )?;
    let (sets, foreign) = set::read_sets(socket, table)?;
    ruleset.sets = sets;
    ruleset.foreign.extend(foreign);
    for (name, counter, _) in read_objects(socket, table)? {
        match counter {
            Some(counter) => ruleset.counters.push(counter),
            None => ruleset.foreign.push(format!("object {name}")),
        }
    }
    ruleset.counters.sort();
    // The kernel lists them in creation order.
    ruleset.chains.sort_by(|a, b| a.name.cmp(&b.name));
    socket.dump(codec::NFT_MSG_GETFLOWTABLE, family, table_name, |object| {
        if attribute_equals(object.attributes, NFTA_FLOWTABLE_TABLE, TABLE) {
            let name = codec::attribute(object.attributes, NFTA_FLOWTABLE_NAME).map(codec::strip_nul).unwrap_or_default();
            ruleset.foreign.push(format!("flowtable {}", String::from_utf8_lossy(name)));
        }
    })?;
    let of_table = |w: &mut Writer| w.text(codec::NFTA_RULE_TABLE, TABLE);
    socket.dump(codec::NFT_MSG_GETRULE, family, of_table, |object| {
        if !attribute_equals(object.attributes, codec::NFTA_RULE_TABLE, TABLE) {
            return;
        }
        let name = codec::attribute(object.attributes, codec::NFTA_RULE_CHAIN).map(codec::strip_nul).unwrap_or_default();
        if let Some(chain) = ruleset.chains.iter_mut().find(|chain| chain.name.as_bytes() == name) {
            chain.rules.push(expr::read(object.attributes, RuleEncoding::for_table(table)));
        }
    })?;
    Ok(Some(ruleset))
}

/// The counter values of a table; empty if it does not exist.
pub(super) fn read_counters(socket: &mut NfnlSocket, table: Table) -> Result<Vec<(Counter, CounterValue)>, OpError> {
    let counter = |(_, counter, counted): (String, Option<Counter>, CounterValue)| counter.map(|counter| (counter, counted));
    match read_objects(socket, table) {
        Ok(objects) => Ok(objects.into_iter().filter_map(counter).collect()),
        Err(error) if error.errno == libc::ENOENT => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The named objects of a table. Our counters are given with their values.
fn read_objects(socket: &mut NfnlSocket, table: Table) -> Result<Vec<(String, Option<Counter>, CounterValue)>, OpError> {
    let mut all = Vec::new();
    let of_table = |w: &mut Writer| w.text(NFTA_OBJ_TABLE, TABLE);
    socket.dump(codec::NFT_MSG_GETOBJ, table_family(table), of_table, |object| {
        if !attribute_equals(object.attributes, NFTA_OBJ_TABLE, TABLE) {
            return;
        }
        let name = codec::attribute(object.attributes, NFTA_OBJ_NAME).map(codec::strip_nul).unwrap_or_default();
        let is_counter = codec::attribute_u32(object.attributes, NFTA_OBJ_TYPE) == Some(codec::NFT_OBJECT_COUNTER);
        let is_named = |counter: &Counter| counter.table() == table && counter.name().as_bytes() == name;
        let counter = Counter::ALL.into_iter().find(is_named).filter(|_| is_counter);
        let data = codec::attribute(object.attributes, NFTA_OBJ_DATA).unwrap_or_default();
        let number = |kind| codec::attribute(data, kind).and_then(codec::be64).unwrap_or(0);
        let counted = CounterValue { packets: number(NFTA_COUNTER_PACKETS), bytes: number(NFTA_COUNTER_BYTES) };
        all.push((String::from_utf8_lossy(name).into_owned(), counter, counted));
    })?;
    Ok(all)
}

fn add_counter(transaction: &mut Transaction, counter: Counter, value: CounterValue) {
    transaction.push_message(codec::NFT_MSG_NEWOBJ, NLM_F_CREATE, table_family(counter.table()), |w| {
        w.text(NFTA_OBJ_TABLE, TABLE);
        w.text(NFTA_OBJ_NAME, counter.name());
        w.u32(NFTA_OBJ_TYPE, codec::NFT_OBJECT_COUNTER);
        w.nest(NFTA_OBJ_DATA, |w| {
            w.u64(NFTA_COUNTER_BYTES, value.bytes);
            w.u64(NFTA_COUNTER_PACKETS, value.packets);
        });
    });
}

fn add_chain(transaction: &mut Transaction, chain: &Chain, family: u8) {
    transaction.push_message(codec::NFT_MSG_NEWCHAIN, NLM_F_CREATE, family, |w| {
        w.text(codec::NFTA_CHAIN_TABLE, TABLE);
        w.text(codec::NFTA_CHAIN_NAME, &chain.name);
        let Some(base) = chain.base else { return };
        w.nest(codec::NFTA_CHAIN_HOOK, |w| {
            w.u32(codec::NFTA_HOOK_HOOKNUM, hook_number(base.hook));
            w.u32(codec::NFTA_HOOK_PRIORITY, base.priority.cast_unsigned());
        });
        w.u32(codec::NFTA_CHAIN_POLICY, codec::NF_ACCEPT);
        w.text(codec::NFTA_CHAIN_TYPE, chain_type_name(base.kind));
    });
}

/// The chain, or a description if a [`Chain`] cannot represent it.
fn read_chain(attributes: &[u8]) -> Result<Chain, String> {
    let name = codec::attribute(attributes, codec::NFTA_CHAIN_NAME).map(codec::strip_nul).unwrap_or_default();
    let name = String::from_utf8_lossy(name).into_owned();
    let Some(hook) = codec::attribute(attributes, codec::NFTA_CHAIN_HOOK) else {
        return Ok(Chain { name, base: None, rules: Vec::new() });
    };
    let other = |what: &str| format!("chain {name} with {what}");
    let policy = codec::attribute_u32(attributes, codec::NFTA_CHAIN_POLICY);
    if policy != Some(codec::NF_ACCEPT) {
        return Err(other("a policy other than accept"));
    }
    let flags = codec::attribute_u32(attributes, codec::NFTA_CHAIN_FLAGS).unwrap_or(codec::NFT_CHAIN_BASE);
    let on_device = [codec::NFTA_HOOK_DEV, codec::NFTA_HOOK_DEVS].iter().any(|kind| codec::attribute(hook, *kind).is_some());
    if flags != codec::NFT_CHAIN_BASE || on_device {
        return Err(other("flags or devices"));
    }
    let kind = codec::attribute(attributes, codec::NFTA_CHAIN_TYPE).map(codec::strip_nul);
    let kind = [ChainKind::Filter, ChainKind::Nat].into_iter().find(|k| kind == Some(chain_type_name(*k).as_bytes()));
    let number = codec::attribute_u32(hook, codec::NFTA_HOOK_HOOKNUM);
    let hook_name = HOOKS.into_iter().find(|hook| number == Some(hook_number(*hook)));
    let priority = codec::attribute_u32(hook, codec::NFTA_HOOK_PRIORITY);
    match (kind, hook_name, priority) {
        (Some(kind), Some(hook), Some(priority)) => {
            let base = Base { hook, kind, priority: priority.cast_signed() };
            Ok(Chain { name, base: Some(base), rules: Vec::new() })
        }
        _ => Err(other("an unsupported type or hook")),
    }
}

const HOOKS: [Hook; 5] = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];

/// `enum nf_inet_hooks`, `linux/netfilter.h`; the bridge hooks have the same numbers (`linux/netfilter_bridge.h`).
pub(super) const fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

const fn chain_type_name(kind: ChainKind) -> &'static str {
    match kind {
        ChainKind::Filter => "filter",
        ChainKind::Nat => "nat",
    }
}

/// Rejects values that cannot be encoded, before anything is sent.
pub(super) fn validate(ruleset: &Ruleset) -> Result<(), OpError> {
    let refuse = |message: String| Err(OpError { errno: libc::EINVAL, message });
    if let Some(object) = ruleset.foreign.first() {
        let table = ruleset.table;
        return refuse(format!("table {table} {TABLE} cannot be written: `{object}` is not ours and can only be read"));
    }
    for chain in &ruleset.chains {
        for (index, rule) in chain.rules.iter().enumerate() {
            for expr in &rule.exprs {
                match expr {
                    Expr::Foreign => {
                        return refuse(format!(
                            "rule {} of chain {} has an expression that is not ours and can only be read",
                            index + 1,
                            chain.name
                        ));
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
