//! Paths, methods, status codes and bodies.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequestParts, Path, Query, Request, State};
use axum::http::request::Parts;
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
use super::{ApiError, Backend, Directory, ErrorKind, watch};
use crate::model::NetworkName;
use crate::model::api::{
    AttachRequest, AttachResponse, DetachResponse, Endpoints, ErrorBody, LogLevel, Mesh, NetworkView, Networks, Peers, Status,
};
use crate::model::endpoint::EndpointName;
use crate::model::text::printable;

/// The largest request body, in bytes. The largest sensible body has a few hundred.
const MAX_BODY_SIZE: usize = 64 << 10;

struct ApiState<D> {
    directory: Arc<D>,
    stop: CancellationToken,
}

impl<D> Clone for ApiState<D> {
    fn clone(&self) -> Self {
        ApiState { directory: Arc::clone(&self.directory), stop: self.stop.clone() }
    }
}

/// The paths of the default network, and those of any network.
const NETWORK_PATHS: [&str; 2] = ["/v1", "/v1/networks/{network}"];

/// The complete API.
pub(super) fn api_router<D: Directory>(directory: Arc<D>, request_timeout: Duration, stop: CancellationToken) -> Router {
    let host = directory.default_network();
    let mut v1 = Router::new()
        .route("/v1/networks", get(networks::<D>))
        .route("/v1/mesh", get(mesh::<D>))
        .route("/v1/log-level", get(log_level::<D>).put(set_log_level::<D>));
    for path in NETWORK_PATHS {
        v1 = v1
            .route(&format!("{path}/status"), get(status::<D>))
            .route(&format!("{path}/subnets"), get(subnets::<D>))
            .route(&format!("{path}/peers"), get(peers::<D>))
            .route(&format!("{path}/network"), get(network::<D>))
            .route(&format!("{path}/endpoints"), get(endpoints::<D>))
            .route(&format!("{path}/endpoints/{{name}}"), put(attach::<D>).delete(detach::<D>));
    }
    with_fallbacks(v1.with_state(ApiState { directory, stop }).merge(health_router(host)), request_timeout)
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

/// The parameters of a path.
#[derive(Deserialize)]
struct Names {
    /// Of the network; the default one's paths have none.
    #[serde(default)]
    network: Option<String>,
    /// Of the endpoint.
    #[serde(default)]
    name: String,
}

impl Names {
    fn network(&self) -> Result<NetworkName, ErrorResponse> {
        self.network.as_deref().map_or(Ok(NetworkName::default()), |text| text.parse().map_err(bad_request))
    }
}

/// The network and the endpoint that a path names.
fn endpoint_names(path: Result<Path<Names>, PathRejection>) -> Result<(NetworkName, EndpointName), ErrorResponse> {
    let Path(names) = path.map_err(|e| bad_request(e.body_text()))?;
    Ok((names.network()?, EndpointName::try_from(names.name).map_err(bad_request)?))
}

/// The network that a path names. A network that this host is not in is an error.
struct NetworkOf<D: Directory>(Arc<D::Network>);

impl<D: Directory> FromRequestParts<ApiState<D>> for NetworkOf<D> {
    type Rejection = ErrorResponse;

    async fn from_request_parts(parts: &mut Parts, shared: &ApiState<D>) -> Result<Self, ErrorResponse> {
        let Path(names) = Path::<Names>::from_request_parts(parts, shared).await.map_err(|e| bad_request(e.body_text()))?;
        let name = names.network()?;
        match shared.directory.network(&name) {
            Some(network) => Ok(NetworkOf(network)),
            None => Err(not_joined(&*shared.directory, &name).await),
        }
    }
}

async fn not_joined<D: Directory>(directory: &D, name: &NetworkName) -> ErrorResponse {
    let joined: Vec<String> = directory.list().await.networks.into_iter().map(|entry| entry.name.to_string()).collect();
    let text = format!(
        "this host is not in network {name}, only in {}: `overlayctl network ls` lists all networks, and `overlayctl attach NAME \
         --network {name}` joins it",
        joined.join(", ")
    );
    ErrorResponse(StatusCode::NOT_FOUND, text)
}

async fn networks<D: Directory>(State(shared): State<ApiState<D>>) -> Json<Networks> {
    Json(shared.directory.list().await)
}

async fn status<D: Directory>(NetworkOf(network): NetworkOf<D>) -> JsonResult<Status> {
    Ok(Json(network.status().await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SubnetsQuery {
    #[serde(default)]
    watch: bool,
}

async fn subnets<D: Directory>(
    State(shared): State<ApiState<D>>,
    NetworkOf(network): NetworkOf<D>,
    query: Result<Query<SubnetsQuery>, QueryRejection>,
) -> Result<Response, ErrorResponse> {
    let Query(query) =
        query.map_err(|e| bad_request(format!("{}; the only parameter is watch=true", printable(&e.body_text()))))?;
    if query.watch {
        let lines = watch::stream_subnets(network, shared.stop);
        return Ok(([(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"))], lines).into_response());
    }
    Ok(Json(network.subnets().await?).into_response())
}

async fn peers<D: Directory>(NetworkOf(network): NetworkOf<D>) -> JsonResult<Peers> {
    Ok(Json(network.peers().await?))
}

async fn mesh<D: Directory>(State(shared): State<ApiState<D>>) -> Json<Mesh> {
    Json(shared.directory.default_network().mesh())
}

/// The same over TCP: `overlayctl mesh --port` queries it on other hosts.
async fn mesh_over_tcp<B: Backend>(State(backend): State<Arc<B>>) -> Json<Mesh> {
    Json(backend.mesh())
}

async fn endpoints<D: Directory>(NetworkOf(network): NetworkOf<D>) -> JsonResult<Endpoints> {
    Ok(Json(network.endpoints().await?))
}

async fn network<D: Directory>(NetworkOf(network): NetworkOf<D>) -> JsonResult<NetworkView> {
    Ok(Json(network.network().await?))
}

async fn attach<D: Directory>(
    State(shared): State<ApiState<D>>,
    Extension(connection): Extension<Connection>,
    path: Result<Path<Names>, PathRejection>,
    content: Body,
) -> JsonResult<AttachResponse> {
    let (network, name) = endpoint_names(path)?;
    let request: AttachRequest = parse_body(content).await?;
    // A runtime that gave up an ADD sends a DEL over another connection, which may have been served first.
    if connection.is_closed() {
        return Err(bad_request("the client has closed the connection"));
    }
    Ok(Json(shared.directory.join(&network).await?.attach(name, request).await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DetachQuery {
    #[serde(default)]
    force: bool,
}

async fn detach<D: Directory>(
    State(shared): State<ApiState<D>>,
    path: Result<Path<Names>, PathRejection>,
    query: Result<Query<DetachQuery>, QueryRejection>,
) -> JsonResult<DetachResponse> {
    let (network, name) = endpoint_names(path)?;
    let Query(query) =
        query.map_err(|e| bad_request(format!("{}; the only parameter is force=true", printable(&e.body_text()))))?;
    match shared.directory.network(&network) {
        Some(network) => Ok(Json(network.detach(name, query.force).await?)),
        // A host leaves a network some time after its last endpoint: a repeated detach still succeeds.
        None => Ok(Json(DetachResponse { endpoint: None, sharers: Vec::new() })),
    }
}

async fn log_level<D: Directory>(State(shared): State<ApiState<D>>) -> Json<LogLevel> {
    Json(LogLevel { level: shared.directory.default_network().log_level() })
}

async fn set_log_level<D: Directory>(State(shared): State<ApiState<D>>, content: Body) -> JsonResult<LogLevel> {
    let wanted: LogLevel = parse_body(content).await?;
    let host = shared.directory.default_network();
    host.set_log_level(&wanted.level)?;
    Ok(Json(LogLevel { level: host.log_level() }))
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
