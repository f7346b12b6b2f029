//! Checks a certificate's expiry in its PEM file. Not every server that rejects an expired certificate reports the reason. Pure.

use std::time::{SystemTime, UNIX_EPOCH};

use tokio_rustls::rustls::client::verify_server_cert_signed_by_trust_anchor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, UnixTime};
use tokio_rustls::rustls::server::ParsedCertificate;
use tokio_rustls::rustls::{CertificateError, Error, RootCertStore};

/// Whether the first certificate of a PEM text has expired at `now`; `None` if it cannot be parsed.
///
/// rustls checks the dates before it looks for the issuer, so no CA is needed: any other error means not expired.
pub(super) fn has_expired(pem: &[u8], now: SystemTime) -> Option<bool> {
    let der = CertificateDer::from_pem_slice(pem).ok()?;
    let certificate = ParsedCertificate::try_from(&der).ok()?;
    let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).ok()?);
    let checked = verify_server_cert_signed_by_trust_anchor(&certificate, &RootCertStore::empty(), &[], now, &[]);
    Some(matches!(checked, Err(Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn openssl_certificate_expiry_is_detected() {
        let now = SystemTime::now();
        let day = Duration::from_secs(86_400);
        // From 2050 on the time is a GeneralizedTime.
        for days in [2_u32, 400, 20_000] {
            let dir = tempfile::tempdir().unwrap();
            let output = Command::new("openssl")
                .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=x"])
                .args(["-days", &days.to_string(), "-keyout", "key", "-out", "crt"])
                .current_dir(dir.path())
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let pem = std::fs::read(dir.path().join("crt")).unwrap();
            assert_eq!(has_expired(&pem, now), Some(false));
            assert_eq!(has_expired(&pem, now + day * (days - 1)), Some(false));
            assert_eq!(has_expired(&pem, now + day * (days + 1)), Some(true));
        }
    }

    #[test]
    fn invalid_certificate_has_no_expiry() {
        let block = |body: &str| format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n");
        for text in ["", "x", &block(""), &block("MIIB"), &block("!!!!"), &block("MP////////8="), &block("MIH/////")] {
            assert_eq!(has_expired(text.as_bytes(), SystemTime::now()), None, "{text}");
        }
    }
}
