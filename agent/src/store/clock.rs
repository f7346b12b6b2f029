//! Reads a server's clock from the `Date` header of an HTTP response. etcd serves `/version` on its client port, with and without
//! TLS.

use std::io;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tracing::debug;

use super::StoreError;
use super::connect::{StoreConfig, normalise_endpoint};
use crate::http::{self, Response};

/// Timeout for connecting and the response.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum size of the response, in bytes.
const MAX_RESPONSE_SIZE: u64 = 16 << 10;

/// The clock of the first endpoint, in seconds since 1970; `None` if its response has no date. Needs no login. Takes at most 5 s.
///
/// # Errors
/// [`StoreError::Unreachable`] if there is no response, or an error of the settings and their files.
pub async fn server_clock(config: &StoreConfig) -> Result<Option<u64>, StoreError> {
    let endpoint = config.endpoints.first().ok_or(StoreError::NoEndpoint)?;
    let url = normalise_endpoint(endpoint, config.uses_tls())?;
    let (scheme, authority) = url.split_once("://").unwrap_or(("http", &url));
    let tls = if scheme == "https" { Some(tls_connector(config)?) } else { None };
    let response = match tokio::time::timeout(REQUEST_TIMEOUT, fetch(authority, tls)).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    match response {
        Ok(response) => Ok(response.header("date").and_then(parse_date)),
        Err(error) => {
            debug!(url, %error, "cannot read etcd server clock");
            Err(StoreError::Unreachable { endpoint: url, detail: error.to_string() })
        }
    }
}

/// The same TLS settings as for the gRPC connection to etcd.
fn tls_connector(config: &StoreConfig) -> Result<TlsConnector, StoreError> {
    let unusable = |error: String| StoreError::Endpoint {
        endpoint: config.endpoints.join(","),
        rule: format!("cannot be reached over TLS: {error}"),
    };
    let (authorities, identity) = config.tls_files()?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&authorities).flatten());
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(error.to_string()))?
        .with_root_certificates(roots);
    let client = match identity {
        None => builder.with_no_client_auth(),
        Some((certificates, key)) => {
            let chain = CertificateDer::pem_slice_iter(&certificates).flatten().collect();
            let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| unusable(error.to_string()))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| unusable(error.to_string()))?
        }
    };
    Ok(TlsConnector::from(Arc::new(client)))
}

async fn fetch(authority: &str, tls: Option<TlsConnector>) -> io::Result<Response> {
    let stream = TcpStream::connect(authority).await?;
    let Some(tls) = tls else { return exchange(stream, authority).await };
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host).trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    exchange(tls.connect(name, stream).await?, authority).await
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, authority: &str) -> io::Result<Response> {
    stream.write_all(&http::request("GET", "/version", authority, &[])).await?;
    stream.flush().await?;
    let mut bytes = Vec::new();
    let ended = stream.take(MAX_RESPONSE_SIZE).read_to_end(&mut bytes).await;
    // A complete response counts, even if TLS was not closed properly.
    Response::parse(bytes).or_else(|error| ended.and(Err(error)))
}

/// Parses an HTTP date (RFC 9110, 5.6.7).
fn parse_date(text: &str) -> Option<u64> {
    let date = httpdate::parse_http_date(text).ok()?;
    date.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_date_is_parsed() {
        assert_eq!(parse_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        // An obsolete form, which a recipient must accept.
        assert_eq!(parse_date("Sunday, 06-Nov-94 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(parse_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(parse_date("Tue, 29 Feb 2028 23:59:59 GMT"), Some(1_835_481_599));
        let huge = format!("Sun, 06 Nov 1994 {}:00:00 GMT", u64::MAX);
        for bad in ["", "Sun, 06 Nov 1994 08:49 GMT", "x, 1 Xxx 2000 1:1:1 GMT", "x, 0 Jan 2000 1:1:1 GMT", &huge] {
            assert_eq!(parse_date(bad), None, "{bad}");
        }
    }
}
