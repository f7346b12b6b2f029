//! The hops as they are gone: each is noted, and the first that stops ends the way.

use std::fmt::Display;

use overlay_agent::kernel::trace::Judgement;
use overlay_agent::plan::OpError;

use super::{Hop, Outcome, TraceError};

/// Why the way is not gone on.
#[derive(Debug)]
pub enum Ended {
    /// The hop that was noted last stops the packet.
    Stopped,
    /// The kernel could not be asked.
    Failed(TraceError),
}

impl From<OpError> for Ended {
    fn from(error: OpError) -> Ended {
        Ended::Failed(error.into())
    }
}

impl From<TraceError> for Ended {
    fn from(error: TraceError) -> Ended {
        Ended::Failed(error)
    }
}

/// Goes on, or ends.
pub type Go<T> = Result<T, Ended>;

/// The hops so far.
#[derive(Debug, Default)]
pub struct Passage {
    /// In order.
    pub hops: Vec<Hop>,
    /// What a reader should know beside them.
    pub notes: Vec<String>,
}

impl Passage {
    fn add(&mut self, place: &str, step: &str, outcome: Outcome, answer: String, remedy: Option<String>) {
        self.hops.push(Hop { place: place.to_owned(), step: step.to_owned(), outcome, answer, remedy });
    }

    /// The packet goes on.
    pub fn ok(&mut self, place: &str, step: &str, answer: impl Display) {
        self.add(place, step, Outcome::Ok, answer.to_string(), None);
    }

    /// The packet goes on, as far as can be known.
    pub fn unsure(&mut self, place: &str, step: &str, answer: impl Display, remedy: &str) {
        let remedy = (!remedy.is_empty()).then(|| remedy.to_owned());
        self.add(place, step, Outcome::Unsure, answer.to_string(), remedy);
    }

    /// The packet stops here.
    pub fn stop(&mut self, place: &str, step: &str, answer: impl Display, remedy: impl Display) -> Ended {
        self.add(place, step, Outcome::Stop, answer.to_string(), Some(remedy.to_string()));
        Ended::Stopped
    }

    /// What rules do with it: `step` is `rules forward` and the like.
    pub fn judged(&mut self, place: &str, step: &str, judgement: &Judgement) -> Go<()> {
        let chains = match judgement.chains.as_slice() {
            [] => "no chains".to_owned(),
            chains => chains.join(", "),
        };
        match &judgement.dropped {
            Some(by) if judgement.is_drop() => {
                let mut remedy = format!("see `{}`", by.command());
                if by.table == "filter" && by.chain == "FORWARD" {
                    remedy.push_str(" and `iptables -S FORWARD`");
                }
                Err(self.stop(place, step, format!("dropped by {by}"), remedy))
            }
            Some(by) => {
                let unless = judgement.unless.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let answer = format!("dropped by {by}, unless {unless} lets it pass, which cannot be known beforehand");
                self.unsure(place, step, answer, &format!("`--live` shows what becomes of a packet; `{}`", by.command()));
                Ok(())
            }
            None if !judgement.perhaps.is_empty() => {
                let perhaps = judgement.perhaps.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
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
