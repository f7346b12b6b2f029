//! One gRPC stream that carries the watches of all networks.
//!
//! [`run`] owns the stream and is part of the shared task. A network opens its watches with [`NetworkWatch::open`]; dropping the
//! [`NetworkWatch`] cancels them at the server. The server numbers watches in the order in which it creates them, and `etcd
//! grpc-proxy` ignores numbers that the client chooses. So only one creation is under way at a time.

use std::collections::HashMap;
use std::future::{Future, pending};
use std::pin::Pin;
use std::time::Duration;

use etcd_client::{Error, WatchOptions, WatchRequestSender, WatchResponse, WatchResponseStream};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::debug;

use super::StoreError;
use super::connect::Session;

/// Number of responses that wait for one network.
const RESPONSE_CAPACITY: usize = 16;
/// Longest time that a network which handles no responses delays the others. Its watches are cancelled then, and it opens new
/// ones once it has handled what it has.
const MAX_DELAY: Duration = Duration::from_secs(1);

/// The keys of a network that one watch covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WatchedKeys {
    /// The network's record. A watch of all keys below the default network's prefix would cover all named networks.
    Config,
    /// The leases.
    Subnets,
}

/// Request for a watch.
pub(super) struct WatchRequest {
    key: String,
    options: WatchOptions,
    /// The result of the creation; an error is the server's reason.
    created: oneshot::Sender<Result<(), String>>,
    watch: Watch,
}

/// A watch of the stream.
struct Watch {
    keys: WatchedKeys,
    responses: mpsc::Sender<(WatchedKeys, WatchResponse)>,
    /// Cancelled by the network, or here if the network falls behind.
    end: CancellationToken,
}

/// The watches of one network.
pub(super) struct NetworkWatch {
    responses: mpsc::Receiver<(WatchedKeys, WatchResponse)>,
    _end: DropGuard,
}

impl NetworkWatch {
    /// Watches a network's record and its leases, each from this revision on. Never returns if the session has ended.
    ///
    /// # Errors
    /// The server refused a watch.
    pub(super) async fn open(
        session: &Session,
        requests: &mpsc::Sender<WatchRequest>,
        config_from: i64,
        subnets_from: i64,
    ) -> Result<NetworkWatch, StoreError> {
        let (sender, responses) = mpsc::channel(RESPONSE_CAPACITY);
        let end = CancellationToken::new();
        let watch = NetworkWatch { responses, _end: end.clone().drop_guard() };
        let (from, to) = session.keys.subnets_range();
        let subnets = WatchOptions::new().with_range(to).with_start_revision(subnets_from).with_progress_notify();
        let config = WatchOptions::new().with_start_revision(config_from);
        for (keys, key, options) in [(WatchedKeys::Config, session.keys.config(), config), (WatchedKeys::Subnets, from, subnets)]
        {
            let (created, result) = oneshot::channel();
            let watch = Watch { keys, responses: sender.clone(), end: end.clone() };
            let sent = requests.send(WatchRequest { key, options, created, watch }).await;
            match (sent, result.await) {
                (Ok(()), Ok(Ok(()))) => {}
                (Ok(()), Ok(Err(reason))) => return Err(cancel_error(session, &reason)),
                // The caller learns of the session's end and drops this future.
                _ => return pending().await,
            }
        }
        Ok(watch)
    }

    /// The next response. `None` if the network fell behind or the session has ended.
    pub(super) async fn next(&mut self) -> Option<(WatchedKeys, WatchResponse)> {
        self.responses.recv().await
    }
}

/// The error for a watch that etcd refused or cancelled for another reason than compaction.
pub(super) fn cancel_error(session: &Session, reason: &str) -> StoreError {
    let context = &session.context;
    let (endpoint, what) = (context.endpoint.clone(), "watch the network");
    if reason.contains("permission denied") {
        StoreError::Permission { endpoint, who: context.user_description(), what, prefix: context.prefix.clone() }
    } else {
        StoreError::RequestFailed { endpoint, what, detail: format!("cancelled: {reason}") }
    }
}

/// Opens and cancels watches, and passes on their responses, until the stream fails.
pub(super) async fn run(session: &Session, mut requests: mpsc::Receiver<WatchRequest>) -> StoreError {
    let mut stream = WatchStream { session, stream: None, watches: HashMap::new() };
    let mut ended: FuturesUnordered<Pin<Box<dyn Future<Output = i64> + Send>>> = FuturesUnordered::new();
    loop {
        let result = tokio::select! {
            Some(id) = ended.next() => stream.cancel(id).await,
            Some(request) = requests.recv() => match stream.open(request).await {
                Ok(Some((id, end))) => {
                    ended.push(Box::pin(async move {
                        end.cancelled_owned().await;
                        id
                    }));
                    Ok(())
                }
                Ok(None) => Ok(()),
                Err(error) => return error,
            },
            response = stream.next() => match response {
                Ok(response) => {
                    stream.dispatch(response).await;
                    Ok(())
                }
                Err(error) => Err(error),
            },
        };
        if let Err(error) = result {
            return session.context.map_error("watch the network", error);
        }
    }
}

/// The stream and its watches by the server's number.
struct WatchStream<'a> {
    session: &'a Session,
    /// `None` before the first watch.
    stream: Option<(WatchRequestSender, WatchResponseStream)>,
    watches: HashMap<i64, Watch>,
}

impl WatchStream<'_> {
    /// Opens a watch. Returns its number and what ends it; `None` if the server refused it.
    async fn open(&mut self, request: WatchRequest) -> Result<Option<(i64, CancellationToken)>, StoreError> {
        let session = self.session;
        let WatchRequest { key, options, created, watch } = request;
        let response = session.with_timeout("watch the network", self.create(key, options)).await?;
        // The network may have stopped meanwhile. Its token is then cancelled, and so is the watch.
        if response.canceled() {
            let _ = created.send(Err(response.cancel_reason().to_owned()));
            return Ok(None);
        }
        let (id, end) = (response.watch_id(), watch.end.clone());
        self.watches.insert(id, watch);
        let _ = created.send(Ok(()));
        Ok(Some((id, end)))
    }

    /// Creates a watch, and passes on responses of others until the server's response to it.
    async fn create(&mut self, key: String, options: WatchOptions) -> Result<WatchResponse, Error> {
        match &mut self.stream {
            None => self.stream = Some(self.session.watcher().watch(key, Some(options)).await?.split()),
            Some((sender, _)) => sender.watch(key, Some(options)).await?,
        }
        loop {
            let response = self.next().await?;
            if response.created() {
                return Ok(response);
            }
            self.dispatch(response).await;
        }
    }

    /// The next response of any watch. Never returns before the first watch.
    async fn next(&mut self) -> Result<WatchResponse, Error> {
        let Some((_, stream)) = &mut self.stream else { return pending().await };
        stream.message().await?.ok_or_else(|| Error::WatchError("the server closed the watch".to_owned()))
    }

    /// Passes a response to its network.
    async fn dispatch(&mut self, response: WatchResponse) {
        let id = response.watch_id();
        // A cancelled watch can still have responses under way.
        let Some(watch) = self.watches.get(&id) else { return };
        let is_last = response.canceled();
        let passed_on = tokio::time::timeout(MAX_DELAY, watch.responses.send((watch.keys, response))).await;
        if is_last || !matches!(passed_on, Ok(Ok(()))) {
            debug!(watch = id, is_last, "watch ended");
            // Without this response, no later one may be passed on.
            watch.end.cancel();
            self.watches.remove(&id);
        }
    }

    async fn cancel(&mut self, id: i64) -> Result<(), Error> {
        self.watches.remove(&id);
        match &mut self.stream {
            Some((sender, _)) => sender.cancel(id).await,
            None => Ok(()),
        }
    }
}
