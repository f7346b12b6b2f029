//! Reads a certificate's expiry from its PEM file. Not every server that rejects an expired certificate reports the reason. Pure.
//!
//! Parses only up to `notAfter` (RFC 5280, section 4.1); TLS validates the certificate.

use std::time::{SystemTime, UNIX_EPOCH};

/// DER tags (X.690).
const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;

/// Whether the first certificate of a PEM text has expired at `now`; `None` if it cannot be parsed.
pub(super) fn has_expired(pem: &[u8], now: SystemTime) -> Option<bool> {
    let der = first_block(&String::from_utf8_lossy(pem))?;
    let now = now.duration_since(UNIX_EPOCH).ok()?.as_secs();
    Some(not_after(&der)? < format_utc(now))
}

fn first_block(text: &str) -> Option<Vec<u8>> {
    let (_, rest) = text.split_once("-----BEGIN CERTIFICATE-----")?;
    let (body, _) = rest.split_once("-----END")?;
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for c in body.bytes().filter(|c| !c.is_ascii_whitespace() && *c != b'=') {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).ok()?);
        }
    }
    Some(bytes)
}

/// Splits off the first element: tag, content, rest.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
        let length = bytes.iter().try_fold(0_usize, |sum, byte| sum.checked_mul(256)?.checked_add(usize::from(*byte)))?;
        (length, rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

/// The content of the first element, which must have this tag, and the rest.
fn expect_tag(der: &[u8], wanted: u8) -> Option<(&[u8], &[u8])> {
    element(der).filter(|(tag, ..)| *tag == wanted).map(|(_, content, rest)| (content, rest))
}

/// `notAfter` as `YYYYMMDDHHMMSS`.
fn not_after(der: &[u8]) -> Option<String> {
    let (certificate, _) = expect_tag(der, SEQUENCE)?;
    let (tbs, _) = expect_tag(certificate, SEQUENCE)?;
    let tbs = expect_tag(tbs, VERSION).map_or(tbs, |(_, rest)| rest);
    let (_, tbs) = expect_tag(tbs, INTEGER)?;
    let (_, tbs) = expect_tag(tbs, SEQUENCE)?; // signature
    let (_, tbs) = expect_tag(tbs, SEQUENCE)?; // issuer
    let (validity, _) = expect_tag(tbs, SEQUENCE)?;
    let (_, _, rest) = element(validity)?; // notBefore
    let (tag, text, _) = element(rest)?;
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    match tag {
        GENERALIZED_TIME => Some(text.to_owned()),
        // Two-digit years from 50 on belong to the 20th century (RFC 5280, section 4.1.2.5.1).
        UTC_TIME => Some(format!("{}{text}", if text >= "5" { "19" } else { "20" })),
        _ => None,
    }
}

/// Formats seconds since 1970 as `YYYYMMDDHHMMSS`, by the days-to-civil algorithm for the proleptic Gregorian calendar.
fn format_utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}{month:02}{day:02}{:02}{:02}{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn format_utc_matches_known_dates() {
        for (seconds, wanted) in [
            (0, "19700101000000"),
            (951_782_399, "20000228235959"),
            (951_782_400, "20000229000000"),
            (4_102_444_799, "20991231235959"),
            (4_107_542_400, "21000301000000"),
        ] {
            assert_eq!(format_utc(seconds), wanted);
        }
    }

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
