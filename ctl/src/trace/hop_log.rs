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
    fn add(&mut self, place: &str, step: &str, outcome: TraceOutcome, answer: String, remedy: Option<String>) {
        self.hops.push(Hop { place: place.to_owned(), step: step.to_owned(), outcome, answer, remedy });
    }

    /// Records a hop that the packet passes.
    pub fn ok(&mut self, place: &str, step: &str, answer: impl Display) {
        self.add(place, step, TraceOutcome::Ok, answer.to_string(), None);
    }

    /// Records a hop that the packet passes as far as known.
    pub fn unsure(&mut self, place: &str, step: &str, answer: impl Display, remedy: &str) {
        let remedy = (!remedy.is_empty()).then(|| remedy.to_owned());
        self.add(place, step, TraceOutcome::Unsure, answer.to_string(), remedy);
    }

    /// Records a hop that stops the packet.
    pub fn stop(&mut self, place: &str, step: &str, answer: impl Display, remedy: impl Display) -> Stop {
        self.add(place, step, TraceOutcome::Stop, answer.to_string(), Some(remedy.to_string()));
        Stop::AtLastHop
    }

    /// Records the rules' verdict; `step` is `rules forward` or the like.
    pub fn record_rules(&mut self, place: &str, step: &str, result: &EvalResult) -> Step<()> {
        let chains = match result.chains.as_slice() {
            [] => "no chains".to_owned(),
            chains => chains.join(", "),
        };
        match &result.dropped {
            Some(by) if result.is_certain_drop() => {
                let mut remedy = format!("see `{}`", by.list_command());
                if by.table == "filter" && by.chain == "FORWARD" {
                    remedy.push_str(" and `iptables -S FORWARD`");
                }
                Err(self.stop(place, step, format!("dropped by {by}"), remedy))
            }
            Some(by) => {
                let unless = result.possible_accepts.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let answer = format!("dropped by {by}, unless {unless} accepts it; the rule's result is not predictable");
                self.unsure(place, step, answer, &format!("`--live` shows the actual verdict; `{}`", by.list_command()));
                Ok(())
            }
            None if !result.possible_drops.is_empty() => {
                let perhaps = result.possible_drops.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let answer = format!("accepted, unless {perhaps} drops it; the rule's result is not predictable");
                self.unsure(place, step, answer, "`--live` shows the actual verdict");
                Ok(())
            }
            None => {
                self.ok(place, step, format!("accepted ({chains})"));
                Ok(())
            }
        }
    }
}
