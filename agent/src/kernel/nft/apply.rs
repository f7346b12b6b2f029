//! Changes of our tables and their elements: each run of ops is one transaction, so that no packet sees a table without what its sets should hold.
//!
//! What is written follows from what is known to be there. Where that turns out to be wrong (others changed it), it is read anew and the transaction
//! computed again. An op that the kernel refuses is left out and the rest tried again: one bad entry stops no other.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::codec;
use super::nfnl_socket::{ERESTART, NfnlSocket, Transaction, TransactionError};
use super::set::{self, ELEMENTS_PER_MESSAGE};
use super::table::{self, CounterValue, TableChange};
use crate::plan::ruleset::{Counter, Element, Ruleset, SetName, TABLE, Table};
use crate::plan::{Key, Op, OpError, State, Value};

/// How often a transaction is computed anew: because others changed nf_tables meanwhile, or without an op that was refused.
const MAX_RETRIES: usize = 32;
/// Elements of one transaction where no table is replaced: some 100 KB, less than any socket may send at once.
const ELEMENTS_PER_TRANSACTION: usize = 2000;
/// Entries from which on they are taken into what is known as a whole rather than one by one.
const BULK_THRESHOLD: usize = 1000;

/// Whether an op goes through here.
pub(in crate::kernel) fn is_ruleset_key(key: &Key) -> bool {
    matches!(key, Key::Ruleset(_) | Key::Element(_))
}

/// Applies ops that are all of [`is_ruleset_key`] and follows in `known` what became of them. Returns those that failed, by their index. `reread`
/// reads what is there.
pub(super) fn apply(
    socket: &mut NfnlSocket,
    ops: &[Op],
    cached: &mut State,
    mut reread: impl FnMut(&mut NfnlSocket) -> Result<State, OpError>,
) -> Vec<(usize, OpError)> {
    let mut failed = Vec::new();
    let whole = ops.iter().any(|op| matches!(op, Op::Set(Key::Ruleset(_), _)));
    let parts = if whole { ops.len().max(1) } else { ELEMENTS_PER_TRANSACTION };
    for (n, part) in ops.chunks(parts).enumerate() {
        let first = n * parts;
        failed.extend(apply_part(socket, part, cached, &mut reread).into_iter().map(|(index, error)| (first + index, error)));
    }
    failed.sort_by_key(|(index, _)| *index);
    failed
}

fn apply_part(
    socket: &mut NfnlSocket,
    ops: &[Op],
    cached: &mut State,
    reread: &mut impl FnMut(&mut NfnlSocket) -> Result<State, OpError>,
) -> Vec<(usize, OpError)> {
    let mut failed: BTreeMap<usize, OpError> = BTreeMap::new();
    for (index, op) in ops.iter().enumerate() {
        if let Op::Set(_, Value::Ruleset(ruleset)) = op
            && let Err(error) = table::validate(ruleset)
        {
            failed.insert(index, error);
        }
    }
    // How a table differs is looked up: what others added to it must go as well. Its elements are not read for that.
    for op in ops {
        if let Op::Set(key @ Key::Ruleset(table), _) = op
            && let Ok((found, _)) = socket.read_consistent(|socket| table::read(socket, *table))
        {
            match found {
                Some(found) => cached.insert(key.clone(), Value::Ruleset(Box::new(found))),
                None => cached.remove(key),
            };
        }
    }
    let (mut elements_per_message, mut reread_done) = (ELEMENTS_PER_MESSAGE, false);
    let mut last = None;
    for _ in 0..MAX_RETRIES {
        let plan = TransactionPlan::new(ops, &failed, cached, elements_per_message);
        let Err(refused) = plan.commit(socket) else {
            update_cache(ops, &failed, cached);
            return failed.into_iter().collect();
        };
        let TransactionError { index, error } = refused;
        if !reread_done && matches!(error.errno, libc::ENOENT | libc::EEXIST | libc::EBUSY | ERESTART | libc::ENOBUFS) {
            // What is there is not what was thought.
            match reread(socket) {
                Ok(state) => *cached = state,
                Err(_) => break,
            }
            reread_done = error.errno != ERESTART;
            last = Some(error);
            continue;
        }
        match plan.failure_scope(index) {
            FailureScope::Op(op) => {
                failed.insert(op, plan.describe(index, error));
            }
            FailureScope::OneOfSeveral => elements_per_message = 1,
            FailureScope::All => {
                last = Some(error);
                break;
            }
        }
    }
    // The whole was refused, or too much of it.
    let error = last.unwrap_or(OpError { errno: libc::EIO, message: "too many changes of nf_tables were refused".to_owned() });
    for index in 0..ops.len() {
        failed.entry(index).or_insert_with(|| error.clone());
    }
    failed.into_iter().collect()
}

/// What a transaction consists of.
enum Command<'a> {
    Table { table: Table, changes: Vec<TableChange<'a>> },
    Elements { message: u8, set: SetName, elements: Vec<(&'a Element, Option<SocketAddr>)> },
}

/// Whose fault a refusal is.
enum FailureScope {
    Op(usize),
    /// One of several elements in a message.
    OneOfSeveral,
    /// None in particular.
    All,
}

/// A transaction.
struct TransactionPlan<'a> {
    /// Each step with the ops that it comes from; none for elements that were there before.
    commands: Vec<(Command<'a>, Vec<usize>)>,
}

impl<'a> TransactionPlan<'a> {
    fn new(
        ops: &'a [Op],
        failed: &BTreeMap<usize, OpError>,
        cached: &'a State,
        elements_per_message: usize,
    ) -> TransactionPlan<'a> {
        let pending_ops = || ops.iter().enumerate().filter(|(index, _)| !failed.contains_key(index));
        let mut commands: Vec<(Command<'a>, Vec<usize>)> = Vec::new();
        // Tables that are made anew, so that what their sets held has to be written again.
        let mut replaced: BTreeMap<Table, &Ruleset> = BTreeMap::new();
        // Tables that go, and their elements with them.
        let mut removed: BTreeSet<Table> = BTreeSet::new();
        for (index, op) in pending_ops() {
            let Key::Ruleset(table) = op.key() else { continue };
            if matches!(op, Op::Delete(..)) {
                removed.insert(*table);
            }
            let changes = match (op, cached.get(op.key())) {
                (Op::Set(_, Value::Ruleset(wanted)), Some(Value::Ruleset(found))) if found.foreign.is_empty() => {
                    table::update(found, wanted)
                }
                (Op::Set(_, Value::Ruleset(wanted)), _) => {
                    replaced.insert(*table, wanted);
                    table::replacement(wanted)
                }
                (Op::Delete(..), Some(_)) => {
                    removed.insert(*table);
                    vec![TableChange::Table { message: codec::NFT_MSG_DELTABLE }]
                }
                _ => continue,
            };
            commands.push((Command::Table { table: *table, changes }, vec![index]));
        }
        // What changes, by element: what is there, what shall be, and because of which op.
        let mut changes: BTreeMap<&Element, ElementChange> = BTreeMap::new();
        let before = |key: &Key| match cached.get(key) {
            Some(Value::Element(target)) => Some(target.as_deref().copied()),
            _ => None,
        };
        let all_known = if replaced.is_empty() { None } else { Some(cached.iter()) };
        for (key, value) in all_known.into_iter().flatten() {
            if let (Key::Element(element), Value::Element(target)) = (key, value)
                && let Some(ruleset) = replaced.get(&element.set().table())
                && ruleset.sets.contains(&element.set())
            {
                changes.insert(element, ElementChange { before: None, after: Some(target.as_deref().copied()), op: None });
            }
        }
        for (index, op) in pending_ops() {
            let Key::Element(element) = op.key() else { continue };
            let table = element.set().table();
            let fresh = replaced.contains_key(&table) || removed.contains(&table);
            let after = match op {
                Op::Set(_, Value::Element(target)) => Some(target.as_deref().copied()),
                _ => None,
            };
            let before = if fresh { None } else { before(op.key()) };
            changes.insert(element, ElementChange { before, after, op: Some(index) });
        }
        for (message, side) in [(codec::NFT_MSG_DELSETELEM, ChangeSide::Before), (codec::NFT_MSG_NEWSETELEM, ChangeSide::After)] {
            let mut by_set: BTreeMap<SetName, Vec<ElementWithOp<'_>>> = BTreeMap::new();
            for (element, change) in &changes {
                if change.before == change.after {
                    continue;
                }
                let target = match side {
                    ChangeSide::Before => change.before,
                    ChangeSide::After => change.after,
                };
                if let Some(target) = target {
                    by_set.entry(element.set()).or_default().push((element, target, change.op));
                }
            }
            for (set, all) in by_set {
                for part in all.chunks(elements_per_message) {
                    let elements = part.iter().map(|(element, target, _)| (*element, *target)).collect();
                    let ops = part.iter().filter_map(|(_, _, op)| *op).collect();
                    commands.push((Command::Elements { message, set, elements }, ops));
                }
            }
        }
        TransactionPlan { commands }
    }

    fn commit(&self, socket: &mut NfnlSocket) -> Result<(), TransactionError> {
        if self.commands.is_empty() {
            return Ok(());
        }
        let mut counter_values: BTreeMap<Counter, CounterValue> = BTreeMap::new();
        for (command, _) in &self.commands {
            if let Command::Table { table, .. } = command {
                // A count that cannot be read begins anew.
                counter_values.extend(table::read_counters(socket, *table).unwrap_or_default());
            }
        }
        let total: usize = self.commands.iter().map(|(command, _)| command.message_count()).sum();
        let total = u32::try_from(total).unwrap_or(u32::MAX);
        socket.commit(None, total, |transaction| {
            for (command, _) in &self.commands {
                command.write(transaction, &counter_values);
            }
        })
    }

    /// The step that a change of the transaction belongs to, and which of its changes it is.
    fn command_at(&self, index: Option<u32>) -> Option<(&(Command<'a>, Vec<usize>), usize)> {
        let mut left = usize::try_from(index?).ok()?;
        for command in &self.commands {
            let changes = command.0.message_count();
            if left < changes {
                return Some((command, left));
            }
            left -= changes;
        }
        None
    }

    fn failure_scope(&self, index: Option<u32>) -> FailureScope {
        match self.command_at(index) {
            Some(((_, ops), _)) => match ops.as_slice() {
                [op] => FailureScope::Op(*op),
                [] => FailureScope::All,
                _ => FailureScope::OneOfSeveral,
            },
            None => FailureScope::All,
        }
    }

    /// Names the part that the kernel refused.
    fn describe(&self, index: Option<u32>, error: OpError) -> OpError {
        let OpError { errno, message } = error;
        let message = match self.command_at(index) {
            Some(((Command::Table { table, changes }, _), change)) => {
                let part = changes.get(change).map(TableChange::describe).unwrap_or_default();
                let comma = if part.is_empty() { "" } else { ", " };
                format!("table {table} {TABLE}{comma}{part}: {message}")
            }
            Some(((Command::Elements { set, elements, .. }, _), _)) => match elements.as_slice() {
                [(element, _)] => format!("table {} {TABLE}, {element}: {message}", set.table()),
                _ => format!("table {} {TABLE}, set {}: {message}", set.table(), set.name()),
            },
            None => message,
        };
        OpError { errno, message }
    }
}

/// An element as a message has it, with the op that it comes from.
type ElementWithOp<'a> = (&'a Element, Option<SocketAddr>, Option<usize>);

struct ElementChange {
    before: Option<Option<SocketAddr>>,
    after: Option<Option<SocketAddr>>,
    op: Option<usize>,
}

enum ChangeSide {
    Before,
    After,
}

impl Command<'_> {
    fn message_count(&self) -> usize {
        match self {
            Command::Table { changes, .. } => changes.len(),
            Command::Elements { .. } => 1,
        }
    }

    fn write(&self, transaction: &mut Transaction, counter_values: &BTreeMap<Counter, CounterValue>) {
        match self {
            Command::Table { table, changes } => {
                for change in changes {
                    change.write(transaction, *table, counter_values);
                }
            }
            Command::Elements { message, set, elements } => set::change_elements(transaction, *message, *set, elements),
        }
    }
}

/// Follows in `known` what the ops of a transaction have changed.
fn update_cache(ops: &[Op], failed: &BTreeMap<usize, OpError>, cached: &mut State) {
    // What was set since the last deletion: many are taken in as a whole, which leaves the tree's nodes full.
    let mut pending_sets: Vec<(Key, Value)> = Vec::new();
    let flush = |pending_sets: &mut Vec<(Key, Value)>, cached: &mut State| match pending_sets.len() {
        0..BULK_THRESHOLD => cached.extend(pending_sets.drain(..)),
        _ => cached.append(&mut pending_sets.drain(..).collect()),
    };
    for (index, op) in ops.iter().enumerate() {
        if failed.contains_key(&index) {
            continue;
        }
        match op {
            Op::Set(key, value) => {
                if let (Key::Ruleset(table), Value::Ruleset(ruleset)) = (key, value) {
                    flush(&mut pending_sets, cached);
                    cached.retain(|key, _| match key {
                        Key::Element(element) if element.set().table() == *table => ruleset.sets.contains(&element.set()),
                        _ => true,
                    });
                }
                pending_sets.push((key.clone(), value.clone()));
            }
            Op::Delete(key, _) => {
                flush(&mut pending_sets, cached);
                if let Key::Ruleset(table) = key {
                    cached.retain(|key, _| !matches!(key, Key::Element(element) if element.set().table() == *table));
                }
                cached.remove(key);
            }
        }
    }
    flush(&mut pending_sets, cached);
}
