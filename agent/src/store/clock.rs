//! Reads a server's clock from the `Date` header of an HTTP response. etcd serves `/version` on its client port, with and without
//! TLS.

use std::io;
use std::sync::Arc;
use std::time::Duration;

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

/// Timeout for connecting and the response.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum size of the response header, in bytes.
const MAX_HEADER_SIZE: usize = 16 << 10;

/// The clock of the first endpoint, in seconds since 1970; `None` if its response has no date. Needs no login. Takes at most 5 s.
///
/// # Errors
/// [`StoreError::Unreachable`] if there is no response, or an error of the settings and their files.
pub async fn server_clock(config: &StoreConfig) -> Result<Option<u64>, StoreError> {
    let endpoint = config.endpoints.first().ok_or(StoreError::NoEndpoint)?;
    let url = normalise_endpoint(endpoint, config.uses_tls())?;
    let (scheme, authority) = url.split_once("://").unwrap_or(("http", &url));
    let tls = if scheme == "https" { Some(tls_connector(config)?) } else { None };
    let head = match tokio::time::timeout(REQUEST_TIMEOUT, fetch_head(authority, tls)).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    match head {
        Ok(head) => Ok(date_header(&head)),
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

async fn fetch_head(authority: &str, tls: Option<TlsConnector>) -> io::Result<String> {
    let stream = TcpStream::connect(authority).await?;
    let Some(tls) = tls else { return request_head(stream, authority).await };
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host).trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    request_head(tls.connect(name, stream).await?, authority).await
}

/// Sends the request, and reads up to the empty line after the header, or to the end of the stream.
async fn request_head(mut stream: impl AsyncRead + AsyncWrite + Unpin, authority: &str) -> io::Result<String> {
    stream.write_all(format!("GET /version HTTP/1.0\r\nHost: {authority}\r\n\r\n").as_bytes()).await?;
    stream.flush().await?;
    let (mut response, mut buffer) = (Vec::new(), [0; 1024]);
    while response.len() < MAX_HEADER_SIZE && !response.windows(4).any(|window| window == b"\r\n\r\n") {
        match stream.read(&mut buffer).await? {
            0 => break,
            length => response.extend_from_slice(&buffer[..length]),
        }
    }
    Ok(String::from_utf8_lossy(&response).into_owned())
}

fn date_header(head: &str) -> Option<u64> {
    let lines = head.lines().take_while(|line| !line.is_empty());
    let date = lines.filter_map(|line| line.split_once(':')).find(|(name, _)| name.eq_ignore_ascii_case("date"));
    parse_date(date?.1.trim())
}

/// Parses an HTTP date in its preferred form, IMF-fixdate (RFC 9110, 5.6.7): `Sun, 06 Nov 1994 08:49:37 GMT`.
fn parse_date(text: &str) -> Option<u64> {
    const MONTHS: &str = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let words: Vec<&str> = text.split_whitespace().collect();
    let [_, day, month, year, time, "GMT"] = words.as_slice() else { return None };
    let month = u64::try_from(MONTHS.find(*month)? / 3 + 1).ok()?;
    let (day, year): (u64, u64) = (day.parse().ok()?, year.parse().ok()?);
    let parts: Vec<u64> = time.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let [hour, minute, second] = parts.as_slice() else { return None };
    if !(1970..=9999).contains(&year) || !(1..=31).contains(&day) || *hour > 23 || *minute > 59 || *second > 60 {
        return None;
    }
    // Days since 1970 in the Gregorian calendar, with March as the first month of the year.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1;
    Some((days - 719_468) * 86_400 + hour * 3_600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_date_is_parsed() {
        assert_eq!(parse_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(parse_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(parse_date("Tue, 29 Feb 2028 23:59:59 GMT"), Some(1_835_481_599));
        let huge = format!("Sun, 06 Nov 1994 {}:00:00 GMT", u64::MAX);
        for bad in [
            "",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49 GMT",
            "x, 1 Xxx 2000 1:1:1 GMT",
            "x, 0 Jan 2000 1:1:1 GMT",
            &huge,
        ] {
            assert_eq!(parse_date(bad), None, "{bad}");
        }
    }

    #[test]
    fn date_in_body_is_ignored() {
        assert_eq!(date_header("HTTP/1.0 200 OK\r\ndate: Thu, 01 Jan 1970 00:00:01 GMT\r\n\r\n{}"), Some(1));
        assert_eq!(date_header("HTTP/1.0 200 OK\r\n\r\nDate: Thu, 01 Jan 1970 00:00:01 GMT\r\n"), None);
    }
}
