//! The channels between a network and a reconciler.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use crate::plan::contribution::{HostView, Progress, ReconcilerInput};

/// A network's ends of the channels to a reconciler.
#[derive(Debug, Clone)]
pub struct ReconcilerLink {
    /// To the reconciler.
    pub input: mpsc::Sender<ReconcilerInput>,
    /// The network namespace as the reconciler read it; `None` before the first read.
    pub view: watch::Receiver<Option<Arc<HostView>>>,
    /// What the reconciler applied.
    pub progress: watch::Receiver<Progress>,
}

impl ReconcilerLink {
    /// Waits for a message; [`ScopeState::fold`](super::scope::ScopeState::fold) reads it. Never returns once the reconciler has ended.
    pub(super) async fn changed(&mut self) {
        tokio::select! {
            Ok(()) = self.view.changed() => self.view.mark_changed(),
            Ok(()) = self.progress.changed() => self.progress.mark_changed(),
            else => std::future::pending().await,
        }
    }
}
