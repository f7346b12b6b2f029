//! Changes of our tables and their elements: each run of ops is one transaction, so that no packet sees a table without what its sets should hold.
//!
//! What is written follows from what is known to be there. Where that turns out to be wrong (others changed it), it is read anew and the transaction
//! computed again. An op that the kernel refuses is left out and the rest tried again: one bad entry stops no other.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::channel::{Channel, ERESTART, Refused, Transaction};
use super::set::{self, PACK};
use super::table::{self, Counted, Piece};
use super::wire;
use crate::plan::ruleset::{Counter, Element, Ruleset, SetName, TABLE, Table};
use crate::plan::{Key, Op, OpError, State, Value};

/// How often a transaction is computed anew: because others changed nf_tables meanwhile, or without an op that was refused.
const TRIES: usize = 32;
/// Elements of one transaction where no table is replaced: some 100 KB, less than any socket may send at once.
const SPLIT: usize = 2000;
/// Entries from which on they are taken into what is known as a whole rather than one by one.
const WHOLESALE: usize = 1000;

/// Whether an op goes through here.
pub(in crate::kernel) fn is_rules(key: &Key) -> bool {
    matches!(key, Key::Ruleset(_) | Key::Element(_))
}

/// Applies ops that are all of [`is_rules`] and follows in `known` what became of them. Returns those that failed, by their index. `reread`
/// reads what is there.
pub(super) fn apply(
    channel: &mut Channel,
    ops: &[Op],
    known: &mut State,
    mut reread: impl FnMut(&mut Channel) -> Result<State, OpError>,
) -> Vec<(usize, OpError)> {
    let mut failed = Vec::new();
    let whole = ops.iter().any(|op| matches!(op, Op::Set(Key::Ruleset(_), _)));
    let parts = if whole { ops.len().max(1) } else { SPLIT };
    for (n, part) in ops.chunks(parts).enumerate() {
        let first = n * parts;
        failed.extend(apply_part(channel, part, known, &mut reread).into_iter().map(|(index, error)| (first + index, error)));
    }
    failed.sort_by_key(|(index, _)| *index);
    failed
}

fn apply_part(
    channel: &mut Channel,
    ops: &[Op],
    known: &mut State,
    reread: &mut impl FnMut(&mut Channel) -> Result<State, OpError>,
) -> Vec<(usize, OpError)> {
    let mut failed: BTreeMap<usize, OpError> = BTreeMap::new();
    for (index, op) in ops.iter().enumerate() {
        if let Op::Set(_, Value::Ruleset(ruleset)) = op
            && let Err(error) = table::check(ruleset)
        {
            failed.insert(index, error);
        }
    }
    // How a table differs is looked up: what others added to it must go as well. Its elements are not read for that.
    for op in ops {
        if let Op::Set(key @ Key::Ruleset(table), _) = op
            && let Ok((found, _)) = channel.consistent(|channel| table::read(channel, *table))
        {
            match found {
                Some(found) => known.insert(key.clone(), Value::Ruleset(Box::new(found))),
                None => known.remove(key),
            };
        }
    }
    let (mut pack, mut read) = (PACK, false);
    let mut last = None;
    for _ in 0..TRIES {
        let plan = Plan::new(ops, &failed, known, pack);
        let Err(refused) = plan.commit(channel) else {
            record(ops, &failed, known);
            return failed.into_iter().collect();
        };
        let Refused { index, error } = refused;
        if !read && matches!(error.errno, libc::ENOENT | libc::EEXIST | libc::EBUSY | ERESTART | libc::ENOBUFS) {
            // What is there is not what was thought.
            match reread(channel) {
                Ok(state) => *known = state,
                Err(_) => break,
            }
            read = error.errno != ERESTART;
            last = Some(error);
            continue;
        }
        match plan.blame(index) {
            Blame::Op(op) => {
                failed.insert(op, plan.describe(index, error));
            }
            Blame::Several => pack = 1,
            Blame::All => {
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
enum Step<'a> {
    Table { table: Table, pieces: Vec<Piece<'a>> },
    Elements { message: u8, set: SetName, elements: Vec<(&'a Element, Option<SocketAddr>)> },
}

/// Whose fault a refusal is.
enum Blame {
    Op(usize),
    /// One of several elements in a message.
    Several,
    /// None in particular.
    All,
}

/// A transaction.
struct Plan<'a> {
    /// Each step with the ops that it comes from; none for elements that were there before.
    steps: Vec<(Step<'a>, Vec<usize>)>,
}

impl<'a> Plan<'a> {
    fn new(ops: &'a [Op], failed: &BTreeMap<usize, OpError>, known: &'a State, pack: usize) -> Plan<'a> {
        let taken = || ops.iter().enumerate().filter(|(index, _)| !failed.contains_key(index));
        let mut steps: Vec<(Step<'a>, Vec<usize>)> = Vec::new();
        // Tables that are made anew, so that what their sets held has to be written again.
        let mut replaced: BTreeMap<Table, &Ruleset> = BTreeMap::new();
        // Tables that go, and their elements with them.
        let mut removed: BTreeSet<Table> = BTreeSet::new();
        for (index, op) in taken() {
            let Key::Ruleset(table) = op.key() else { continue };
            if matches!(op, Op::Delete(..)) {
                removed.insert(*table);
            }
            let pieces = match (op, known.get(op.key())) {
                (Op::Set(_, Value::Ruleset(wanted)), Some(Value::Ruleset(found))) if found.foreign.is_empty() => {
                    table::change(found, wanted)
                }
                (Op::Set(_, Value::Ruleset(wanted)), _) => {
                    replaced.insert(*table, wanted);
                    table::replace(wanted)
                }
                (Op::Delete(..), Some(_)) => {
                    removed.insert(*table);
                    vec![Piece::Table { message: wire::NFT_MSG_DELTABLE }]
                }
                _ => continue,
            };
            steps.push((Step::Table { table: *table, pieces }, vec![index]));
        }
        // What changes, by element: what is there, what shall be, and because of which op.
        let mut changes: BTreeMap<&Element, Change> = BTreeMap::new();
        let before = |key: &Key| match known.get(key) {
            Some(Value::Element(target)) => Some(target.as_deref().copied()),
            _ => None,
        };
        let all_known = if replaced.is_empty() { None } else { Some(known.iter()) };
        for (key, value) in all_known.into_iter().flatten() {
            if let (Key::Element(element), Value::Element(target)) = (key, value)
                && let Some(ruleset) = replaced.get(&element.set().table())
                && ruleset.sets.contains(&element.set())
            {
                changes.insert(element, Change { before: None, after: Some(target.as_deref().copied()), op: None });
            }
        }
        for (index, op) in taken() {
            let Key::Element(element) = op.key() else { continue };
            let table = element.set().table();
            let fresh = replaced.contains_key(&table) || removed.contains(&table);
            let after = match op {
                Op::Set(_, Value::Element(target)) => Some(target.as_deref().copied()),
                _ => None,
            };
            let before = if fresh { None } else { before(op.key()) };
            changes.insert(element, Change { before, after, op: Some(index) });
        }
        for (message, wanted) in [(wire::NFT_MSG_DELSETELEM, Wanted::Before), (wire::NFT_MSG_NEWSETELEM, Wanted::After)] {
            let mut by_set: BTreeMap<SetName, Vec<Written<'_>>> = BTreeMap::new();
            for (element, change) in &changes {
                if change.before == change.after {
                    continue;
                }
                let target = match wanted {
                    Wanted::Before => change.before,
                    Wanted::After => change.after,
                };
                if let Some(target) = target {
                    by_set.entry(element.set()).or_default().push((element, target, change.op));
                }
            }
            for (set, all) in by_set {
                for part in all.chunks(pack) {
                    let elements = part.iter().map(|(element, target, _)| (*element, *target)).collect();
                    let ops = part.iter().filter_map(|(_, _, op)| *op).collect();
                    steps.push((Step::Elements { message, set, elements }, ops));
                }
            }
        }
        Plan { steps }
    }

    fn commit(&self, channel: &mut Channel) -> Result<(), Refused> {
        if self.steps.is_empty() {
            return Ok(());
        }
        let mut counted: BTreeMap<Counter, Counted> = BTreeMap::new();
        for (step, _) in &self.steps {
            if let Step::Table { table, .. } = step {
                // A count that cannot be read begins anew.
                counted.extend(table::counters(channel, *table).unwrap_or_default());
            }
        }
        let total: usize = self.steps.iter().map(|(step, _)| step.changes()).sum();
        let total = u32::try_from(total).unwrap_or(u32::MAX);
        channel.commit(None, total, |transaction| {
            for (step, _) in &self.steps {
                step.write(transaction, &counted);
            }
        })
    }

    /// The step that a change of the transaction belongs to, and which of its changes it is.
    fn step(&self, index: Option<u32>) -> Option<(&(Step<'a>, Vec<usize>), usize)> {
        let mut left = usize::try_from(index?).ok()?;
        for step in &self.steps {
            let changes = step.0.changes();
            if left < changes {
                return Some((step, left));
            }
            left -= changes;
        }
        None
    }

    fn blame(&self, index: Option<u32>) -> Blame {
        match self.step(index) {
            Some(((_, ops), _)) => match ops.as_slice() {
                [op] => Blame::Op(*op),
                [] => Blame::All,
                _ => Blame::Several,
            },
            None => Blame::All,
        }
    }

    /// Names the part that the kernel refused.
    fn describe(&self, index: Option<u32>, error: OpError) -> OpError {
        let OpError { errno, message } = error;
        let message = match self.step(index) {
            Some(((Step::Table { table, pieces }, _), change)) => {
                let part = pieces.get(change).map(Piece::words).unwrap_or_default();
                let comma = if part.is_empty() { "" } else { ", " };
                format!("table {table} {TABLE}{comma}{part}: {message}")
            }
            Some(((Step::Elements { set, elements, .. }, _), _)) => match elements.as_slice() {
                [(element, _)] => format!("table {} {TABLE}, {element}: {message}", set.table()),
                _ => format!("table {} {TABLE}, set {}: {message}", set.table(), set.name()),
            },
            None => message,
        };
        OpError { errno, message }
    }
}

/// An element as a message has it, with the op that it comes from.
type Written<'a> = (&'a Element, Option<SocketAddr>, Option<usize>);

struct Change {
    before: Option<Option<SocketAddr>>,
    after: Option<Option<SocketAddr>>,
    op: Option<usize>,
}

enum Wanted {
    Before,
    After,
}

impl Step<'_> {
    fn changes(&self) -> usize {
        match self {
            Step::Table { pieces, .. } => pieces.len(),
            Step::Elements { .. } => 1,
        }
    }

    fn write(&self, transaction: &mut Transaction, counted: &BTreeMap<Counter, Counted>) {
        match self {
            Step::Table { table, pieces } => {
                for piece in pieces {
                    piece.write(transaction, *table, counted);
                }
            }
            Step::Elements { message, set, elements } => set::change_elements(transaction, *message, *set, elements),
        }
    }
}

/// Follows in `known` what the ops of a transaction have changed.
fn record(ops: &[Op], failed: &BTreeMap<usize, OpError>, known: &mut State) {
    // What was set since the last deletion: many are taken in as a whole, which leaves the tree's nodes full.
    let mut made: Vec<(Key, Value)> = Vec::new();
    let take_in = |made: &mut Vec<(Key, Value)>, known: &mut State| match made.len() {
        0..WHOLESALE => known.extend(made.drain(..)),
        _ => known.append(&mut made.drain(..).collect()),
    };
    for (index, op) in ops.iter().enumerate() {
        if failed.contains_key(&index) {
            continue;
        }
        match op {
            Op::Set(key, value) => {
                if let (Key::Ruleset(table), Value::Ruleset(ruleset)) = (key, value) {
                    take_in(&mut made, known);
                    known.retain(|key, _| match key {
                        Key::Element(element) if element.set().table() == *table => ruleset.sets.contains(&element.set()),
                        _ => true,
                    });
                }
                made.push((key.clone(), value.clone()));
            }
            Op::Delete(key, _) => {
                take_in(&mut made, known);
                if let Key::Ruleset(table) = key {
                    known.retain(|key, _| !matches!(key, Key::Element(element) if element.set().table() == *table));
                }
                known.remove(key);
            }
        }
    }
    take_in(&mut made, known);
}
