//! nf_tables over nfnetlink, and conntrack clean-up after ruleset changes (`conntrack`).
//!
//! Writes the tables `inet overlayd` and `bridge overlayd`. Also writes accept rules into the FORWARD chains of iptables.
//! [`TraceMonitor`] creates temporary tables. No other table is touched and no process is started.
//!
//! Owns one blocking socket ([`Nft`]) and one event socket ([`NftMonitor`]). Each belongs to the network namespace in which it
//! was opened. This module spawns no tasks: [`Nft`] calls take some hundred microseconds and belong on a blocking thread; the
//! caller awaits [`NftMonitor`].

mod apply;
mod codec;
mod conntrack;
mod eval;
mod expr;
mod forward;
mod monitor;
mod nfnl_socket;
mod registers;
mod set;
mod snapshot;
mod table;
#[cfg(test)]
mod tests;
mod trace_monitor;
mod translation;
mod xtables;

use std::collections::BTreeMap;

pub(super) use apply::is_ruleset_key;
pub(super) use codec::NFNLGRP_NFTABLES;
pub(super) use conntrack::{ConntrackCleaner, NatMappings, StaleFilter};
pub use eval::EvalResult;
pub use monitor::{NftChange, NftMonitor};
pub use snapshot::{RuleRef, RulesetSnapshot, legacy_tables};
pub use table::CounterValue;
pub use trace_monitor::{TraceEvent, TraceMonitor, TraceRead};
pub use translation::{PossibleTranslation, Translation};

use nfnl_socket::NfnlSocket;

use crate::model::{Cidr, Family, PerFamily};
use crate::plan::ruleset::{Counter, Table};
use crate::plan::{Key, Op, OpError, Ruleset, State, Value};

/// nf_tables of one network namespace.
pub struct Nft {
    socket: NfnlSocket,
}

/// The nf_tables state that concerns us, read at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NftState {
    /// Our tables and their set elements, as [`Key::Ruleset`] and [`Key::Element`]. Equals the applied state after
    /// [`Nft::apply`].
    pub rules: State,
    /// The ranges that our rules in the FORWARD chain of iptables accept, sorted. If another process altered the rules, the value is
    /// the unspecified address with full prefix length (`0.0.0.0/32`, `::/128`), which no network has.
    pub forward_accept: PerFamily<Box<[Cidr]>>,
    /// The families whose iptables FORWARD chain has the policy drop.
    pub forward_drops: Vec<Family>,
}

impl NftState {
    /// One of our tables; `None` if it does not exist.
    pub fn ruleset(&self, table: Table) -> Option<&Ruleset> {
        match self.rules.get(&Key::Ruleset(table)) {
            Some(Value::Ruleset(ruleset)) => Some(ruleset),
            _ => None,
        }
    }

    /// Converts the state to entries.
    pub fn into_entries(self) -> State {
        let mut entries = self.rules;
        let accepted = self.forward_accept.iter();
        entries.extend(accepted.map(|(family, ranges)| (Key::ForwardAccept(family), Value::ForwardAccept(ranges.clone()))));
        entries
    }
}

impl Nft {
    /// Opens nf_tables of the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel has no nfnetlink, or the process has no file descriptors left. Missing or forbidden nf_tables is reported by
    /// the later calls.
    pub fn open() -> Result<Nft, OpError> {
        Ok(Nft { socket: NfnlSocket::open(codec::NFNL_SUBSYS_NFTABLES)? })
    }

    /// The netlink port id of the socket. Events of our own changes carry it.
    pub fn port_id(&self) -> u32 {
        self.socket.port_id()
    }

    /// A counter of transactions by other processes in the namespace, with an arbitrary start. While it is unchanged, no other
    /// process changed nf_tables.
    ///
    /// # Errors
    /// No permission, or no nf_tables in the kernel.
    pub fn foreign_generation(&mut self) -> Result<u32, OpError> {
        self.socket.foreign_generation()
    }

    /// Reads all nf_tables state that concerns us, at one moment.
    ///
    /// # Errors
    /// No permission, no nf_tables in the kernel, or other processes change it faster than it can be read (`EINTR`).
    pub fn dump(&mut self) -> Result<NftState, OpError> {
        let read = |socket: &mut NfnlSocket| {
            let mut state = NftState { rules: read_rules(socket)?, ..NftState::default() };
            read_forward(socket, &mut state)?;
            Ok(state)
        };
        self.socket.read_consistent(read).map(|(state, _)| state)
    }

    /// Reads only the FORWARD chains of iptables, not our tables.
    ///
    /// # Errors
    /// See [`Nft::dump`].
    pub fn dump_forward(&mut self) -> Result<NftState, OpError> {
        let read = |socket: &mut NfnlSocket| {
            let mut state = NftState::default();
            read_forward(socket, &mut state)?;
            Ok(state)
        };
        self.socket.read_consistent(read).map(|(state, _)| state)
    }

    /// Applies changes to our tables and elements in one transaction. The ops are [`Key::Ruleset`] and [`Key::Element`] entries;
    /// packets see no intermediate state. A replaced table keeps its set elements and counter values. `cached` is the state
    /// assumed in the kernel; it is updated to the new state, and read again if it turns out to be wrong. Entries that already
    /// exist are not written.
    ///
    /// Returns the failed ops by index. Either the kernel refused a part (named in the message), or the value has parts that can
    /// only be read ([`Expr::Foreign`](crate::plan::ruleset::Expr::Foreign)). All other ops are in force.
    pub fn apply(&mut self, ops: &[Op], cached: &mut State) -> Vec<(usize, OpError)> {
        let mut rules = std::mem::take(cached);
        // Forward entries sort after our tables in the order of keys.
        let forward_entries = rules.split_off(&Key::ForwardAccept(Family::V4));
        let failed =
            apply::apply(&mut self.socket, ops, &mut rules, |socket| socket.read_consistent(read_rules).map(|(rules, _)| rules));
        rules.extend(forward_entries);
        *cached = rules;
        failed
    }

    /// The packets dropped on purpose since the tables were first created.
    ///
    /// # Errors
    /// No permission, or no nf_tables in the kernel.
    pub fn counters(&mut self) -> Result<BTreeMap<Counter, CounterValue>, OpError> {
        let read = |socket: &mut NfnlSocket| {
            let mut all = BTreeMap::new();
            for table in Table::ALL {
                all.extend(table::read_counters(socket, table)?);
            }
            Ok(all)
        };
        self.socket.read_consistent(read).map(|(all, _)| all)
    }

    /// The generation number of the last transaction in the namespace, by any process.
    #[cfg(test)]
    fn generation(&mut self) -> u32 {
        self.socket.read_consistent(|_| Ok(())).expect("a generation").1
    }

    /// Makes a family's iptables FORWARD chain accept traffic from and to these ranges, which are sorted. Two rules for each at the
    /// head of the chain do this. Our rules for other ranges are removed. If the rules exist, nothing is written.
    ///
    /// # Errors
    /// `EINVAL` if a range has the other family, `ENOENT` if the chain does not exist, or the kernel refused.
    pub fn set_forward_accept(&mut self, family: Family, ranges: &[Cidr]) -> Result<(), OpError> {
        if let Some(network) = ranges.iter().find(|range| range.family() != family) {
            let message =
                format!("{network} is not an {family} network: its accept rules belong in the other family's FORWARD chain");
            return Err(OpError { errno: libc::EINVAL, message });
        }
        forward::set(&mut self.socket, family, ranges)
    }

    /// Removes our rules from a family's iptables FORWARD chain. Missing rules or a missing chain count as success.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn delete_forward_accept(&mut self, family: Family) -> Result<(), OpError> {
        forward::set(&mut self.socket, family, &[])
    }
}

/// Reads our tables and their set elements. Call inside [`NfnlSocket::read_consistent`].
fn read_rules(socket: &mut NfnlSocket) -> Result<State, OpError> {
    let mut rules = State::new();
    for table in Table::ALL {
        let Some(mut ruleset) = table::read(socket, table)? else { continue };
        for set in ruleset.sets.clone() {
            if !set::read_elements(socket, set, &mut rules)? {
                ruleset.foreign.push(format!("foreign elements in set {}", set.name()));
            }
        }
        rules.insert(Key::Ruleset(table), Value::Ruleset(Box::new(ruleset)));
    }
    Ok(rules)
}

/// Reads the FORWARD chains of iptables. Call inside [`NfnlSocket::read_consistent`].
fn read_forward(socket: &mut NfnlSocket, state: &mut NftState) -> Result<(), OpError> {
    for family in Family::ALL {
        let forward = forward::read(socket, family)?;
        *state.forward_accept.slot(family) = forward.accepted_ranges(family);
        if forward.policy_drop {
            state.forward_drops.push(family);
        }
    }
    Ok(())
}
