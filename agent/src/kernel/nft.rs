//! nf_tables over nfnetlink: our tables `inet overlayd_command` and `bridge_name overlayd_command`, and our accept rules in iptables' FORWARD chains; and the entries
//! of conntrack that a change of them makes stale (`conntrack`).
//!
//! Owns one blocking socket ([`Nft`]) and one that listens ([`NftMonitor`]), both of the network namespace that they were opened in. No
//! process is started and no other table is touched. No tasks: [`Nft`]'s calls take some hundred microseconds and belong on a blocking
//! thread, [`NftMonitor`] is awaited by whoever follows the kernel.

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

use std::collections::BTreeMap;

pub(super) use apply::is_ruleset_key;
pub(super) use codec::NFNLGRP_NFTABLES;
pub(super) use conntrack::{ConntrackCleaner, NatMappings, StaleFilter};
pub use eval::{EvalResult, Translation};
pub use monitor::{NftChange, NftMonitor};
pub use snapshot::{RuleRef, RulesetSnapshot};
pub use table::CounterValue;
pub use trace_monitor::{TraceEvent, TraceMonitor, TraceRead};

use nfnl_socket::NfnlSocket;

use crate::model::{Cidr, Family, PerFamily};
use crate::plan::ruleset::{Counter, Table};
use crate::plan::{Key, Op, OpError, Ruleset, State, Value};

/// nf_tables of one network namespace.
pub struct Nft {
    socket: NfnlSocket,
}

/// What nf_tables holds that is ours or concerns us, at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NftState {
    /// Our tables and what their sets hold, as [`Key::Ruleset`] and [`Key::Element`]. After [`Nft::apply`] it equals what was set.
    pub rules: State,
    /// The network that our rules in iptables' FORWARD chain accept. Where others altered them, a value that no network has: the
    /// unspecified address with full length (`0.0.0.0/32`, `::/128`).
    pub forward_accept: PerFamily<Cidr>,
    /// The families whose FORWARD chain of iptables drops what no rule decides.
    pub forward_drops: Vec<Family>,
}

impl NftState {
    /// One of our tables; `None` where there is none.
    pub fn ruleset(&self, table: Table) -> Option<&Ruleset> {
        match self.rules.get(&Key::Ruleset(table)) {
            Some(Value::Ruleset(ruleset)) => Some(ruleset),
            _ => None,
        }
    }

    /// All of it as entries.
    pub fn into_entries(self) -> State {
        let mut entries = self.rules;
        let accepted = |(family, network): (Family, &Cidr)| (Key::ForwardAccept(family), Value::ForwardAccept(*network));
        entries.extend(self.forward_accept.iter().map(accepted));
        entries
    }
}

impl Nft {
    /// Opens nf_tables of the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel has no nfnetlink, or the process no file descriptors left. That nf_tables is missing or forbidden shows in the calls.
    pub fn open() -> Result<Nft, OpError> {
        Ok(Nft { socket: NfnlSocket::open(codec::NFNL_SUBSYS_NFTABLES)? })
    }

    /// The netlink port id of the socket: events of our own changes carry it.
    pub fn port_id(&self) -> u32 {
        self.socket.port_id()
    }

    /// How many transactions others made in the namespace, counted from any number: while it stays the same, nothing changed that was not changed here.
    ///
    /// # Errors
    /// No permission, or no nf_tables in the kernel.
    pub fn foreign_generation(&mut self) -> Result<u32, OpError> {
        self.socket.foreign_generation()
    }

    /// Reads everything that concerns us, as it stands at one moment.
    ///
    /// # Errors
    /// No permission, no nf_tables in the kernel, or others change it faster than it can be read (`EINTR`).
    pub fn dump(&mut self) -> Result<NftState, OpError> {
        let read = |socket: &mut NfnlSocket| {
            let mut state = NftState { rules: read_rules(socket)?, ..NftState::default() };
            read_forward(socket, &mut state)?;
            Ok(state)
        };
        self.socket.read_consistent(read).map(|(state, _)| state)
    }

    /// Reads what concerns us of iptables' FORWARD chains alone: nothing of our tables.
    ///
    /// # Errors
    /// As [`Nft::dump`].
    pub fn dump_forward(&mut self) -> Result<NftState, OpError> {
        let read = |socket: &mut NfnlSocket| {
            let mut state = NftState::default();
            read_forward(socket, &mut state)?;
            Ok(state)
        };
        self.socket.read_consistent(read).map(|(state, _)| state)
    }

    /// Applies changes of our tables and their elements ([`Key::Ruleset`], [`Key::Element`]), in one transaction: no packet sees anything between. A
    /// table that is replaced keeps the elements of its sets and what its counters have counted. `known` is what is there, and is made what is there
    /// afterwards; where it turns out to be wrong it is read anew. What is there already is not written.
    ///
    /// Returns the ops that failed, by their index: the kernel refused a part (named in the message), or the value has parts that were only ever
    /// read ([`Expr::HostInterfaces`](crate::plan::ruleset::Expr::Foreign)). The others are in force.
    pub fn apply(&mut self, ops: &[Op], cached: &mut State) -> Vec<(usize, OpError)> {
        let mut rules = std::mem::take(cached);
        // Which are behind our tables in the order of keys.
        let forward_entries = rules.split_off(&Key::ForwardAccept(Family::V4));
        let failed =
            apply::apply(&mut self.socket, ops, &mut rules, |socket| socket.read_consistent(read_rules).map(|(rules, _)| rules));
        rules.extend(forward_entries);
        *cached = rules;
        failed
    }

    /// What was dropped on purpose since the tables were first made.
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

    /// The number of the last transaction in the namespace, whoever's.
    #[cfg(test)]
    fn generation(&mut self) -> u32 {
        self.socket.read_consistent(|_| Ok(())).expect("a generation").1
    }

    /// Has iptables' FORWARD chain of a family accept what comes from and goes to a network, by two rules at its head. Rules of ours for
    /// another network go; where the two are there, nothing is written.
    ///
    /// # Errors
    /// `EINVAL` where the network is of the other family, `ENOENT` where there is no such chain, or the kernel refused.
    pub fn set_forward_accept(&mut self, family: Family, network: Cidr) -> Result<(), OpError> {
        if network.family() != family {
            let message = format!("{network} is no {family} network: its accept rules belong into the other FORWARD chain");
            return Err(OpError { errno: libc::EINVAL, message });
        }
        forward::set(&mut self.socket, family, Some(network))
    }

    /// Removes our rules from iptables' FORWARD chain of a family. That there are none, or no such chain, is success.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn delete_forward_accept(&mut self, family: Family) -> Result<(), OpError> {
        forward::set(&mut self.socket, family, None)
    }
}

/// Reads our tables and what their sets hold. To be called inside [`NfnlSocket::read_consistent`].
fn read_rules(socket: &mut NfnlSocket) -> Result<State, OpError> {
    let mut rules = State::new();
    for table in Table::ALL {
        let Some(mut ruleset) = table::read(socket, table)? else { continue };
        for set in ruleset.sets.clone() {
            if !set::read_elements(socket, set, &mut rules)? {
                ruleset.foreign.push(format!("elements of set {} that are not ours", set.name()));
            }
        }
        rules.insert(Key::Ruleset(table), Value::Ruleset(Box::new(ruleset)));
    }
    Ok(rules)
}

/// Reads what concerns us of iptables' FORWARD chains. To be called inside [`NfnlSocket::read_consistent`].
fn read_forward(socket: &mut NfnlSocket, state: &mut NftState) -> Result<(), OpError> {
    for family in Family::ALL {
        let forward = forward::read(socket, family)?;
        *state.forward_accept.slot(family) = forward.accepted_network(family);
        if forward.policy_drop {
            state.forward_drops.push(family);
        }
    }
    Ok(())
}
