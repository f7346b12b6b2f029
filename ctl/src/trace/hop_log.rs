//! Log of the hops: each hop is recorded, and the first that stops the packet ends the trace.

use std::fmt::Display;

use overlay_agent::kernel::trace::EvalResult;
use overlay_agent::plan::OpError;

use super::{Hop, TraceError, TraceOutcome};

/// Reason for the end of a trace.
#[derive(Debug)]
pub enum Stop {
    /// The last recorded hop stops the packet.
    AtLastHop,
    /// A query to the kernel failed.
    Failed(TraceError),
}

impl From<OpError> for Stop {
    fn from(error: OpError) -> Stop {
        Stop::Failed(error.into())
    }
}

impl From<TraceError> for Stop {
    fn from(error: TraceError) -> Stop {
        Stop::Failed(error)
    }
}

/// Result of a step: continue, or end the trace.
pub type Step<T> = Result<T, Stop>;

/// The hops so far.
#[derive(Debug, Default)]
pub struct HopLog {
    /// Hops, in order.
    pub hops: Vec<Hop>,
    /// Remarks for the reader.
    pub notes: Vec<String>,
}

impl HopLog {
    fn add(&mut self, location: &str, step: &str, outcome: TraceOutcome, message: String, remedy: Option<String>) {
        self.hops.push(Hop { place: location.to_owned(), step: step.to_owned(), outcome, answer: message, remedy });
    }

    /// Records a hop that the packet passes.
    pub fn ok(&mut self, location: &str, step: &str, message: impl Display) {
        self.add(location, step, TraceOutcome::Ok, message.to_string(), None);
    }

    /// Records a hop that the packet passes as far as known.
    pub fn unsure(&mut self, location: &str, step: &str, message: impl Display, remedy: &str) {
        let remedy = (!remedy.is_empty()).then(|| remedy.to_owned());
        self.add(location, step, TraceOutcome::Unsure, message.to_string(), remedy);
    }

    /// Records a hop that stops the packet.
    pub fn stop(&mut self, location: &str, step: &str, message: impl Display, remedy: impl Display) -> Stop {
        self.add(location, step, TraceOutcome::Stop, message.to_string(), Some(remedy.to_string()));
        Stop::AtLastHop
    }

    /// Records the rules' verdict; `step` is `rules forward` or the like.
    pub fn record_rules(&mut self, location: &str, step: &str, result: &EvalResult) -> Step<()> {
        let chains = match result.chains.as_slice() {
            [] => "no chains".to_owned(),
            chains => chains.join(", "),
        };
        match &result.dropped {
            Some(rule) if result.is_certain_drop() => {
                let mut remedy = format!("see `{}`", rule.list_command());
                if rule.table == "filter" && rule.chain == "FORWARD" {
                    remedy.push_str(" and `iptables -S FORWARD`");
                }
                Err(self.stop(location, step, format!("dropped by {rule}"), remedy))
            }
            Some(rule) => {
                let accepting_rules = result.possible_accepts.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let message =
                    format!("dropped by {rule}, unless {accepting_rules} accepts it; the rule's result is not predictable");
                self.unsure(location, step, message, &format!("`--live` shows the actual verdict; `{}`", rule.list_command()));
                Ok(())
            }
            None if !result.possible_drops.is_empty() => {
                let dropping_rules = result.possible_drops.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let message = format!("accepted, unless {dropping_rules} drops it; the rule's result is not predictable");
                self.unsure(location, step, message, "`--live` shows the actual verdict");
                Ok(())
            }
            None => {
                self.ok(location, step, format!("accepted ({chains})"));
                Ok(())
            }
        }
    }
}
