//! The hops as they are gone: each is noted, and the first that stops ends the way.

use std::fmt::Display;

use overlay_agent::kernel::trace::EvalResult;
use overlay_agent::plan::OpError;

use super::{Hop, TraceError, TraceOutcome};

/// Why the way is not gone on.
#[derive(Debug)]
pub enum Stop {
    /// The hop that was noted last stops the packet.
    AtLastHop,
    /// The kernel could not be asked.
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

/// Goes on, or ends.
pub type Step<T> = Result<T, Stop>;

/// The hops so far.
#[derive(Debug, Default)]
pub struct HopLog {
    /// In order.
    pub hops: Vec<Hop>,
    /// What a reader should know beside them.
    pub notes: Vec<String>,
}

impl HopLog {
    fn add(&mut self, place: &str, step: &str, outcome: TraceOutcome, answer: String, remedy: Option<String>) {
        self.hops.push(Hop { place: place.to_owned(), step: step.to_owned(), outcome, answer, remedy });
    }

    /// The packet goes on.
    pub fn ok(&mut self, place: &str, step: &str, answer: impl Display) {
        self.add(place, step, TraceOutcome::Ok, answer.to_string(), None);
    }

    /// The packet goes on, as far as can be known.
    pub fn unsure(&mut self, place: &str, step: &str, answer: impl Display, remedy: &str) {
        let remedy = (!remedy.is_empty()).then(|| remedy.to_owned());
        self.add(place, step, TraceOutcome::Unsure, answer.to_string(), remedy);
    }

    /// The packet stops here.
    pub fn stop(&mut self, place: &str, step: &str, answer: impl Display, remedy: impl Display) -> Stop {
        self.add(place, step, TraceOutcome::Stop, answer.to_string(), Some(remedy.to_string()));
        Stop::AtLastHop
    }

    /// What rules do with it: `step` is `rules forward` and the like.
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
                let answer = format!("dropped by {by}, unless {unless} lets it pass, which cannot be known beforehand");
                self.unsure(place, step, answer, &format!("`--live` shows what becomes of a packet; `{}`", by.list_command()));
                Ok(())
            }
            None if !result.possible_drops.is_empty() => {
                let perhaps = result.possible_drops.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let answer = format!("accepted, unless {perhaps} drops it, which cannot be known beforehand");
                self.unsure(place, step, answer, "`--live` shows what becomes of a packet");
                Ok(())
            }
            None => {
                self.ok(place, step, format!("accepted ({chains})"));
                Ok(())
            }
        }
    }
}
