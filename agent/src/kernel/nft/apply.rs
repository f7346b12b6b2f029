//! Applies changes to our tables and their elements. Each batch of ops is one transaction, so packets never see a table without
//! its elements.
//!
//! The transaction is computed from the cached state. If the cache is wrong (another process changed nf_tables), the state is
//! read again and the transaction recomputed. An op that the kernel refuses is left out and the rest retried: one bad entry does
//! not block the others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::codec;
use super::nfnl_socket::{ERESTART, NfnlSocket, Transaction, TransactionError};
use super::set::{self, ELEMENTS_PER_MESSAGE};
use super::table::{self, CounterValue, TableChange};
use crate::plan::ruleset::{Counter, Element, Ruleset, SetName, TABLE, Table};
use crate::plan::{Key, Op, OpError, State, Value};

/// Maximum number of attempts per transaction. It is recomputed if another process changed nf_tables, or without a refused op.
const MAX_RETRIES: usize = 32;
/// Elements per transaction if no table is replaced: some 100 KB, less than any socket may send at once.
const ELEMENTS_PER_TRANSACTION: usize = 2000;
/// Number of entries from which the cache is extended in bulk instead of one by one.
const BULK_THRESHOLD: usize = 1000;

/// Whether [`apply`] handles ops with this key.
pub(in crate::kernel) fn is_ruleset_key(key: &Key) -> bool {
    matches!(key, Key::Ruleset(_) | Key::Element(_))
}

/// Applies ops and updates `cached` with their outcome. All ops must satisfy [`is_ruleset_key`]. Returns the failed ops by index.
/// `reread` reads the current state.
pub(super) fn apply(
    socket: &mut NfnlSocket,
    ops: &[Op],
    cached: &mut State,
    mut reread: impl FnMut(&mut NfnlSocket) -> Result<State, OpError>,
) -> Vec<(usize, OpError)> {
    let mut failed = Vec::new();
    let replaces_table = ops.iter().any(|op| matches!(op, Op::Set(Key::Ruleset(_), _)));
    let ops_per_part = if replaces_table { ops.len().max(1) } else { ELEMENTS_PER_TRANSACTION };
    for (n, part) in ops.chunks(ops_per_part).enumerate() {
        let first = n * ops_per_part;
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
    // Reads each table before the comparison, because objects added by other processes must be removed too. This does not read
    // its elements.
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
        let Err(failure) = plan.commit(socket) else {
            update_cache(ops, &failed, cached);
            return failed.into_iter().collect();
        };
        let TransactionError { index, error } = failure;
        if !reread_done && matches!(error.errno, libc::ENOENT | libc::EEXIST | libc::EBUSY | ERESTART | libc::ENOBUFS) {
            // The cache was wrong.
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
    // The kernel refused the whole transaction, or too many ops.
    let error = last.unwrap_or(OpError { errno: libc::EIO, message: "the kernel refused too many nf_tables changes".to_owned() });
    for index in 0..ops.len() {
        failed.entry(index).or_insert_with(|| error.clone());
    }
    failed.into_iter().collect()
}

/// A part of a transaction.
enum Command<'a> {
    Table { table: Table, changes: Vec<TableChange<'a>> },
    Elements { message: u8, set: SetName, elements: Vec<(&'a Element, Option<SocketAddr>)> },
}

/// The ops to which a kernel error applies.
enum FailureScope {
    Op(usize),
    /// One of several elements in a message.
    OneOfSeveral,
    /// The transaction as a whole.
    All,
}

/// A transaction.
struct TransactionPlan<'a> {
    /// Each command with its ops; no ops for elements that existed before.
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
        // Tables that are recreated: the elements of their sets must be written again.
        let mut replaced: BTreeMap<Table, &Ruleset> = BTreeMap::new();
        // Tables that are deleted together with their elements.
        let mut removed: BTreeSet<Table> = BTreeSet::new();
        // The sets that tables have from now on: elements of others are deleted with their set.
        let mut sets: BTreeMap<Table, &[SetName]> = BTreeMap::new();
        for (index, op) in pending_ops() {
            let Key::Ruleset(table) = op.key() else { continue };
            if matches!(op, Op::Delete(..)) {
                removed.insert(*table);
            }
            if let Op::Set(_, Value::Ruleset(wanted)) = op {
                sets.insert(*table, &wanted.sets);
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
        // Changes by element: the current value, the wanted value, and the op.
        let mut changes: BTreeMap<&Element, ElementChange> = BTreeMap::new();
        let cached_value = |key: &Key| match cached.get(key) {
            Some(Value::Element(target)) => Some(target.as_deref().copied()),
            _ => None,
        };
        let cached_entries = if replaced.is_empty() { None } else { Some(cached.iter()) };
        for (key, value) in cached_entries.into_iter().flatten() {
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
            let is_new_table = replaced.contains_key(&table) || removed.contains(&table);
            let after = match op {
                Op::Set(_, Value::Element(target)) => Some(target.as_deref().copied()),
                _ => None,
            };
            let is_set_gone = sets.get(&table).is_some_and(|sets| !sets.contains(&element.set()));
            let before = if is_new_table || is_set_gone { None } else { cached_value(op.key()) };
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
            for (set, set_elements) in by_set {
                for part in set_elements.chunks(elements_per_message) {
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
                // A counter that cannot be read starts at zero.
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

    /// The command of a message in the transaction, and the index of its change in that command.
    fn command_at(&self, index: Option<u32>) -> Option<(&(Command<'a>, Vec<usize>), usize)> {
        let mut remaining = usize::try_from(index?).ok()?;
        for command in &self.commands {
            let changes = command.0.message_count();
            if remaining < changes {
                return Some((command, remaining));
            }
            remaining -= changes;
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

    /// Adds the part that the kernel refused to the error.
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

/// An element of a message, with its target and its op.
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

/// Updates the cached state with the successful ops of a transaction.
fn update_cache(ops: &[Op], failed: &BTreeMap<usize, OpError>, cached: &mut State) {
    // Entries set since the last deletion. Inserting many at once leaves the nodes of the tree full.
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
