//! Paths, methods, status codes and bodies.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use futures_util::FutureExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use super::serve::Limits;
use super::{ApiError, Backend, ErrorKind, watch};
use crate::model::api::{AttachRequest, Attached, Detached, Endpoints, LogLevel, Mesh, NetworkView, Peers, Problem, Status};
use crate::model::endpoint::EndpointName;
use crate::model::lease::printable;

/// The largest body of a request, in bytes. The largest that makes sense has a few hundred.
const LARGEST_BODY: usize = 64 << 10;

struct Shared<B> {
    backend: Arc<B>,
    stop: CancellationToken,
}

impl<B> Clone for Shared<B> {
    fn clone(&self) -> Self {
        Shared { backend: Arc::clone(&self.backend), stop: self.stop.clone() }
    }
}

/// The whole interface.
pub(super) fn full<B: Backend>(backend: Arc<B>, limits: Limits, stop: CancellationToken) -> Router {
    let shared = Shared { backend: Arc::clone(&backend), stop };
    let v1 = Router::new()
        .route("/v1/status", get(status::<B>))
        .route("/v1/subnets", get(subnets::<B>))
        .route("/v1/peers", get(peers::<B>))
        .route("/v1/mesh", get(mesh::<B>))
        .route("/v1/network", get(network::<B>))
        .route("/v1/endpoints", get(endpoints::<B>))
        .route("/v1/endpoints/{name}", put(attach::<B>).delete(detach::<B>))
        .route("/v1/log-level", get(log_level::<B>).put(set_log_level::<B>))
        .with_state(shared);
    finish(v1.merge(health(backend)), limits)
}

/// Metrics and health alone.
pub(super) fn observe<B: Backend>(backend: Arc<B>, limits: Limits) -> Router {
    finish(health(backend), limits)
}

/// What a client is told for whom there is no room; it is to close its connection then.
pub(super) fn busy(most: usize) -> Router {
    Router::new().fallback(async move || {
        let text = format!("{most} connections are open, which is the most: close some, or try again in a moment");
        ([(header::CONNECTION, HeaderValue::from_static("close"))], Refused(StatusCode::SERVICE_UNAVAILABLE, text))
            .into_response()
    })
}

fn health<B: Backend>(backend: Arc<B>) -> Router {
    Router::new()
        .route("/healthz", get(alive::<B>))
        .route("/readyz", get(ready::<B>))
        .route("/metrics", get(metrics::<B>))
        .route("/mesh", get(open_mesh::<B>))
        .with_state(backend)
}

fn finish(router: Router, limits: Limits) -> Router {
    let no_path = async |uri: Uri| Refused(StatusCode::NOT_FOUND, format!("there is no {}", printable(uri.path())));
    let no_method = async |method: Method, uri: Uri| {
        let text = format!("{} cannot be asked with {}", printable(uri.path()), printable(method.as_str()));
        Refused(StatusCode::METHOD_NOT_ALLOWED, text)
    };
    router.fallback(no_path).method_not_allowed_fallback(no_method).layer(middleware::from_fn_with_state(limits.request, guard))
}

/// Bounds a request's time, and turns a panic into an answer.
async fn guard(State(timeout): State<Duration>, request: Request, next: Next) -> Response {
    let what = format!("{} {}", printable(request.method().as_str()), printable(request.uri().path()));
    match tokio::time::timeout(timeout, AssertUnwindSafe(next.run(request)).catch_unwind()).await {
        Ok(Ok(response)) => response,
        Ok(Err(_panic)) => {
            tracing::error!(request = what, "a request's handler panicked");
            Refused(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("{what} failed by a defect of the agent: see its log, and please report it"),
            )
            .into_response()
        }
        Err(_elapsed) => {
            let text = format!("{what} took longer than {} s; it may still be done: ask again", timeout.as_secs());
            Refused(StatusCode::GATEWAY_TIMEOUT, text).into_response()
        }
    }
}

/// An answer that is no success.
struct Refused(StatusCode, String);

impl From<ApiError> for Refused {
    fn from(error: ApiError) -> Refused {
        let status = match error.kind {
            ErrorKind::BadValue => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Conflict => StatusCode::CONFLICT,
            ErrorKind::NotReady => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refused(status, error.message)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.0, Json(Problem { error: self.1 })).into_response()
    }
}

type Answer<T> = Result<Json<T>, Refused>;

/// The value of a JSON body.
async fn body<T: DeserializeOwned>(body: Body) -> Result<T, Refused> {
    let bytes = axum::body::to_bytes(body, LARGEST_BODY).await.map_err(|_| {
        let text = format!("the request's body did not arrive whole or has more than {LARGEST_BODY} bytes");
        Refused(StatusCode::PAYLOAD_TOO_LARGE, text)
    })?;
    serde_json::from_slice(&bytes)
        .map_err(|e| bad(format!("the request's body is not as expected: {}", printable(&e.to_string()))))
}

fn bad(text: impl ToString) -> Refused {
    Refused(StatusCode::BAD_REQUEST, text.to_string())
}

fn endpoint_name(path: Result<Path<String>, PathRejection>) -> Result<EndpointName, Refused> {
    let Path(text) = path.map_err(|e| bad(e.body_text()))?;
    EndpointName::try_from(text).map_err(bad)
}

async fn status<B: Backend>(State(shared): State<Shared<B>>) -> Answer<Status> {
    Ok(Json(shared.backend.status().await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SubnetsQuery {
    #[serde(default)]
    watch: bool,
}

async fn subnets<B: Backend>(
    State(shared): State<Shared<B>>,
    query: Result<Query<SubnetsQuery>, QueryRejection>,
) -> Result<Response, Refused> {
    let Query(query) = query.map_err(|e| bad(format!("{}; known is watch=true", printable(&e.body_text()))))?;
    if query.watch {
        let lines = watch::subnets(shared.backend, shared.stop);
        return Ok(([(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"))], lines).into_response());
    }
    Ok(Json(shared.backend.subnets().await?).into_response())
}

async fn peers<B: Backend>(State(shared): State<Shared<B>>) -> Answer<Peers> {
    Ok(Json(shared.backend.peers().await?))
}

async fn mesh<B: Backend>(State(shared): State<Shared<B>>) -> Json<Mesh> {
    Json(shared.backend.mesh())
}

/// The same over TCP: what `overlayctl mesh --port` asks other hosts for.
async fn open_mesh<B: Backend>(State(backend): State<Arc<B>>) -> Json<Mesh> {
    Json(backend.mesh())
}

async fn endpoints<B: Backend>(State(shared): State<Shared<B>>) -> Answer<Endpoints> {
    Ok(Json(shared.backend.endpoints().await?))
}

async fn network<B: Backend>(State(shared): State<Shared<B>>) -> Answer<NetworkView> {
    Ok(Json(shared.backend.network().await?))
}

async fn attach<B: Backend>(
    State(shared): State<Shared<B>>,
    path: Result<Path<String>, PathRejection>,
    content: Body,
) -> Answer<Attached> {
    let name = endpoint_name(path)?;
    let request: AttachRequest = body(content).await?;
    Ok(Json(shared.backend.attach(name, request).await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DetachQuery {
    #[serde(default)]
    force: bool,
}

async fn detach<B: Backend>(
    State(shared): State<Shared<B>>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<DetachQuery>, QueryRejection>,
) -> Answer<Detached> {
    let name = endpoint_name(path)?;
    let Query(query) = query.map_err(|e| bad(format!("{}; known is force=true", printable(&e.body_text()))))?;
    Ok(Json(shared.backend.detach(name, query.force).await?))
}

async fn log_level<B: Backend>(State(shared): State<Shared<B>>) -> Json<LogLevel> {
    Json(LogLevel { level: shared.backend.log_level() })
}

async fn set_log_level<B: Backend>(State(shared): State<Shared<B>>, content: Body) -> Answer<LogLevel> {
    let wanted: LogLevel = body(content).await?;
    shared.backend.set_log_level(&wanted.level)?;
    Ok(Json(LogLevel { level: shared.backend.log_level() }))
}

async fn alive<B: Backend>(State(backend): State<Arc<B>>) -> Result<&'static str, Refused> {
    backend.alive().await.map(|()| "ok\n").map_err(|reason| Refused(StatusCode::SERVICE_UNAVAILABLE, reason))
}

async fn ready<B: Backend>(State(backend): State<Arc<B>>) -> Result<&'static str, Refused> {
    match backend.ready().await {
        Ok(()) => Ok("ready\n"),
        Err(reasons) => Err(Refused(StatusCode::SERVICE_UNAVAILABLE, reasons.join("; "))),
    }
}

async fn metrics<B: Backend>(State(backend): State<Arc<B>>) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], backend.metrics().await).into_response()
}
