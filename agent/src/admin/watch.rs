//! The stream of `GET /v1/subnets?watch=true`: one JSON object per line, the first at once, then one per change.

use std::convert::Infallible;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::watch::Receiver;
use tokio_util::sync::CancellationToken;

use super::Backend;

/// How long changes are collected into one line, for example if many hosts start together. Too short for users to notice.
const COALESCE_DELAY: Duration = Duration::from_millis(20);

struct SubnetsWatch<B> {
    backend: Arc<B>,
    changes: Receiver<u64>,
    stop: CancellationToken,
    /// Hash of the last line. It suppresses identical lines after unrelated changes.
    last_hash: Option<u64>,
}

/// The response body. Ends with the client or at `stop`. A slow client misses intermediate states, never the last one.
pub(super) fn stream_subnets<B: Backend>(backend: Arc<B>, stop: CancellationToken) -> Body {
    let changes = backend.changes();
    let watch = SubnetsWatch { backend, changes, stop, last_hash: None };
    Body::from_stream(stream::unfold(watch, |mut watch| async move {
        let line = watch.next_line().await?;
        Some((Ok::<Bytes, Infallible>(line), watch))
    }))
}

impl<B: Backend> SubnetsWatch<B> {
    async fn next_line(&mut self) -> Option<Bytes> {
        loop {
            if self.last_hash.is_some() {
                tokio::select! {
                    () = self.stop.cancelled() => return None,
                    changed = self.changes.changed() => changed.ok()?,
                }
                tokio::time::sleep(COALESCE_DELAY).await;
            }
            // Marked as seen before the read, so that a change during the read causes another line.
            self.changes.borrow_and_update();
            let line = self.encode_line().await?;
            let mut hasher = DefaultHasher::new();
            line.hash(&mut hasher);
            let hash = hasher.finish();
            if self.last_hash.replace(hash) != Some(hash) {
                return Some(line);
            }
        }
    }

    async fn encode_line(&self) -> Option<Bytes> {
        let subnets = match self.backend.subnets().await {
            Ok(subnets) => subnets,
            Err(error) => {
                tracing::warn!(%error, "subnet watch ended");
                return None;
            }
        };
        let mut line = serde_json::to_vec(&subnets).inspect_err(|error| tracing::error!(%error, "cannot encode subnets")).ok()?;
        line.push(b'\n');
        Some(line.into())
    }
}
