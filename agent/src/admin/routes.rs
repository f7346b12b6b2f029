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
use axum::{Extension, Json, Router};
use futures_util::FutureExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::{ApiError, Backend, ErrorKind, watch};
use crate::model::api::{
    AttachRequest, AttachResponse, DetachResponse, Endpoints, ErrorBody, LogLevel, Mesh, NetworkView, Peers, Status,
};
use crate::model::endpoint::EndpointName;
use crate::model::text::printable;

/// The largest request body, in bytes. The largest sensible body has a few hundred.
const MAX_BODY_SIZE: usize = 64 << 10;

struct ApiState<B> {
    backend: Arc<B>,
    stop: CancellationToken,
}

impl<B> Clone for ApiState<B> {
    fn clone(&self) -> Self {
        ApiState { backend: Arc::clone(&self.backend), stop: self.stop.clone() }
    }
}

/// The complete API.
pub(super) fn api_router<B: Backend>(backend: Arc<B>, request_timeout: Duration, stop: CancellationToken) -> Router {
    let shared = ApiState { backend: Arc::clone(&backend), stop };
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
    with_fallbacks(v1.merge(health_router(backend)), request_timeout)
}

/// Metrics and health only.
pub(super) fn metrics_router<B: Backend>(backend: Arc<B>, request_timeout: Duration) -> Router {
    with_fallbacks(health_router(backend), request_timeout)
}

/// Answers every request with 503 and closes the connection, for clients above the connection limit.
pub(super) fn busy_router(max_connections: usize) -> Router {
    Router::new().fallback(async move || {
        let text = format!("{max_connections} connections are open, the maximum: close some, or try again in a moment");
        ([(header::CONNECTION, HeaderValue::from_static("close"))], ErrorResponse(StatusCode::SERVICE_UNAVAILABLE, text))
            .into_response()
    })
}

fn health_router<B: Backend>(backend: Arc<B>) -> Router {
    Router::new()
        .route("/healthz", get(alive::<B>))
        .route("/readyz", get(ready::<B>))
        .route("/metrics", get(metrics::<B>))
        .route("/mesh", get(mesh_over_tcp::<B>))
        .with_state(backend)
}

fn with_fallbacks(router: Router, request_timeout: Duration) -> Router {
    let no_path = async |uri: Uri| ErrorResponse(StatusCode::NOT_FOUND, format!("there is no {}", printable(uri.path())));
    let no_method = async |method: Method, uri: Uri| {
        let text = format!("{} does not support {}", printable(uri.path()), printable(method.as_str()));
        ErrorResponse(StatusCode::METHOD_NOT_ALLOWED, text)
    };
    router
        .fallback(no_path)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(request_timeout, timeout_layer))
}

/// Limits a request's duration, and turns a panic into a 500 response.
async fn timeout_layer(State(timeout): State<Duration>, request: Request, next: Next) -> Response {
    let what = format!("{} {}", printable(request.method().as_str()), printable(request.uri().path()));
    match tokio::time::timeout(timeout, AssertUnwindSafe(next.run(request)).catch_unwind()).await {
        Ok(Ok(response)) => response,
        Ok(Err(_panic)) => {
            tracing::error!(request = what, "request handler panicked");
            ErrorResponse(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("{what} failed because of a bug in the agent: see its log, and please report it"),
            )
            .into_response()
        }
        Err(_elapsed) => {
            let text = format!("{what} took longer than {} s; it may still complete: try again", timeout.as_secs());
            ErrorResponse(StatusCode::GATEWAY_TIMEOUT, text).into_response()
        }
    }
}

/// An error response.
struct ErrorResponse(StatusCode, String);

impl From<ApiError> for ErrorResponse {
    fn from(error: ApiError) -> ErrorResponse {
        let status = match error.kind {
            ErrorKind::BadValue => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Conflict => StatusCode::CONFLICT,
            ErrorKind::NotReady => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        ErrorResponse(status, error.message)
    }
}

impl IntoResponse for ErrorResponse {
    fn into_response(self) -> Response {
        (self.0, Json(ErrorBody { error: self.1 })).into_response()
    }
}

type JsonResult<T> = Result<Json<T>, ErrorResponse>;

/// Parses a JSON body.
async fn parse_body<T: DeserializeOwned>(body: Body) -> Result<T, ErrorResponse> {
    let bytes = axum::body::to_bytes(body, MAX_BODY_SIZE).await.map_err(|_| {
        let text = format!("the request's body is incomplete or has more than {MAX_BODY_SIZE} bytes");
        ErrorResponse(StatusCode::PAYLOAD_TOO_LARGE, text)
    })?;
    serde_json::from_slice(&bytes)
        .map_err(|e| bad_request(format!("the request's body is invalid: {}", printable(&e.to_string()))))
}

fn bad_request(text: impl ToString) -> ErrorResponse {
    ErrorResponse(StatusCode::BAD_REQUEST, text.to_string())
}

fn endpoint_name(path: Result<Path<String>, PathRejection>) -> Result<EndpointName, ErrorResponse> {
    let Path(text) = path.map_err(|e| bad_request(e.body_text()))?;
    EndpointName::try_from(text).map_err(bad_request)
}

async fn status<B: Backend>(State(shared): State<ApiState<B>>) -> JsonResult<Status> {
    Ok(Json(shared.backend.status().await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SubnetsQuery {
    #[serde(default)]
    watch: bool,
}

async fn subnets<B: Backend>(
    State(shared): State<ApiState<B>>,
    query: Result<Query<SubnetsQuery>, QueryRejection>,
) -> Result<Response, ErrorResponse> {
    let Query(query) =
        query.map_err(|e| bad_request(format!("{}; the only parameter is watch=true", printable(&e.body_text()))))?;
    if query.watch {
        let lines = watch::stream_subnets(shared.backend, shared.stop);
        return Ok(([(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"))], lines).into_response());
    }
    Ok(Json(shared.backend.subnets().await?).into_response())
}

async fn peers<B: Backend>(State(shared): State<ApiState<B>>) -> JsonResult<Peers> {
    Ok(Json(shared.backend.peers().await?))
}

async fn mesh<B: Backend>(State(shared): State<ApiState<B>>) -> Json<Mesh> {
    Json(shared.backend.mesh())
}

/// The same over TCP: `overlayctl mesh --port` queries it on other hosts.
async fn mesh_over_tcp<B: Backend>(State(backend): State<Arc<B>>) -> Json<Mesh> {
    Json(backend.mesh())
}

async fn endpoints<B: Backend>(State(shared): State<ApiState<B>>) -> JsonResult<Endpoints> {
    Ok(Json(shared.backend.endpoints().await?))
}

async fn network<B: Backend>(State(shared): State<ApiState<B>>) -> JsonResult<NetworkView> {
    Ok(Json(shared.backend.network().await?))
}

async fn attach<B: Backend>(
    State(shared): State<ApiState<B>>,
    Extension(connection): Extension<Connection>,
    path: Result<Path<String>, PathRejection>,
    content: Body,
) -> JsonResult<AttachResponse> {
    let name = endpoint_name(path)?;
    let request: AttachRequest = parse_body(content).await?;
    // A runtime that gave up an ADD sends a DEL over another connection, which may have been served first.
    if connection.is_closed() {
        return Err(bad_request("the client has closed the connection"));
    }
    Ok(Json(shared.backend.attach(name, request).await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DetachQuery {
    #[serde(default)]
    force: bool,
}

async fn detach<B: Backend>(
    State(shared): State<ApiState<B>>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<DetachQuery>, QueryRejection>,
) -> JsonResult<DetachResponse> {
    let name = endpoint_name(path)?;
    let Query(query) =
        query.map_err(|e| bad_request(format!("{}; the only parameter is force=true", printable(&e.body_text()))))?;
    Ok(Json(shared.backend.detach(name, query.force).await?))
}

async fn log_level<B: Backend>(State(shared): State<ApiState<B>>) -> Json<LogLevel> {
    Json(LogLevel { level: shared.backend.log_level() })
}

async fn set_log_level<B: Backend>(State(shared): State<ApiState<B>>, content: Body) -> JsonResult<LogLevel> {
    let wanted: LogLevel = parse_body(content).await?;
    shared.backend.set_log_level(&wanted.level)?;
    Ok(Json(LogLevel { level: shared.backend.log_level() }))
}

async fn alive<B: Backend>(State(backend): State<Arc<B>>) -> Result<&'static str, ErrorResponse> {
    backend.alive().await.map(|()| "ok\n").map_err(|reason| ErrorResponse(StatusCode::SERVICE_UNAVAILABLE, reason))
}

async fn ready<B: Backend>(State(backend): State<Arc<B>>) -> Result<&'static str, ErrorResponse> {
    match backend.ready().await {
        Ok(()) => Ok("ready\n"),
        Err(reasons) => Err(ErrorResponse(StatusCode::SERVICE_UNAVAILABLE, reasons.join("; "))),
    }
}

async fn metrics<B: Backend>(State(backend): State<Arc<B>>) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], backend.metrics().await).into_response()
}
