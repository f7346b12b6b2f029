//! nf_tables over nfnetlink: our table `inet overlayd`, and our accept rules in iptables' FORWARD chains.
//!
//! Owns one blocking socket ([`Nft`]) and one that listens ([`NftMonitor`]), both of the network namespace that they were opened in. No
//! process is started and no other table is touched. No tasks: [`Nft`]'s calls take some hundred microseconds and belong on a blocking
//! thread, [`NftMonitor`] is awaited by whoever follows the kernel.

mod channel;
mod expr;
mod forward;
mod monitor;
mod table;
#[cfg(test)]
mod tests;
mod wire;

pub use monitor::{NftChange, NftMonitor};

use channel::Channel;

use crate::model::{Cidr, Family, PerFamily};
use crate::plan::{OpError, Ruleset};

/// nf_tables of one network namespace.
pub struct Nft {
    channel: Channel,
}

/// What nf_tables holds that is ours or concerns us, at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NftState {
    /// The table `inet overlayd`, all of it; `None` where there is none. After [`Nft::set_ruleset`] it equals what was set.
    pub ruleset: Option<Ruleset>,
    /// The network that our rules in iptables' FORWARD chain accept. Where others altered them, a value that no network has: the
    /// unspecified address with full length (`0.0.0.0/32`, `::/128`).
    pub forward_accept: PerFamily<Cidr>,
    /// The families whose FORWARD chain of iptables drops what no rule decides.
    pub forward_drops: Vec<Family>,
}

impl Nft {
    /// Opens nf_tables of the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel has no nfnetlink, or the process no file descriptors left. That nf_tables is missing or forbidden shows in the calls.
    pub fn open() -> Result<Nft, OpError> {
        Ok(Nft { channel: Channel::open()? })
    }

    /// The netlink port id of the socket: events of our own changes carry it.
    pub fn port_id(&self) -> u32 {
        self.channel.port()
    }

    /// Reads everything that concerns us, as it stands at one moment.
    ///
    /// # Errors
    /// No permission, no nf_tables in the kernel, or others change it faster than it can be read (`EINTR`).
    pub fn dump(&mut self) -> Result<NftState, OpError> {
        let read = |channel: &mut Channel| {
            let mut state = NftState { ruleset: table::read(channel)?, ..NftState::default() };
            for family in Family::ALL {
                let forward = forward::read(channel, family)?;
                *state.forward_accept.slot(family) = forward.accepted(family);
                if forward.drops {
                    state.forward_drops.push(family);
                }
            }
            Ok(state)
        };
        self.channel.consistent(read).map(|(state, _)| state)
    }

    /// Makes the table hold exactly this, in one transaction: no packet sees anything between. Counters begin anew.
    ///
    /// # Errors
    /// The kernel refused a part (named in the message), or the value has parts that were only ever read
    /// ([`Expr::Foreign`](crate::plan::ruleset::Expr::Foreign)); what was in force stays so.
    pub fn set_ruleset(&mut self, ruleset: &Ruleset) -> Result<(), OpError> {
        table::replace(&mut self.channel, ruleset)
    }

    /// Deletes the table. That there is none is success.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn delete_ruleset(&mut self) -> Result<(), OpError> {
        table::delete(&mut self.channel)
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
        forward::set(&mut self.channel, family, Some(network))
    }

    /// Removes our rules from iptables' FORWARD chain of a family. That there are none, or no such chain, is success.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn delete_forward_accept(&mut self, family: Family) -> Result<(), OpError> {
        forward::set(&mut self.channel, family, None)
    }
}
