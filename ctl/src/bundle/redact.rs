//! Removes secrets from texts: private keys, passwords in URLs and after keywords, and all known secrets.

use std::path::Path;

use regex::{Captures, Regex};

/// Replacement for a secret.
pub const REDACTED: &str = "<removed>";

/// Minimum length of a known secret: shorter ones would match ordinary words.
const MIN_SECRET_LEN: usize = 4;

/// Removes secrets.
#[derive(Debug)]
pub struct Redactor {
    /// Known secrets, the longest first.
    secrets: Vec<String>,
    patterns: Vec<(Regex, Kind)>,
}

/// Secret part of a pattern's match.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// The whole match.
    Whole,
    /// The group `secret`.
    Group,
}

/// Patterns with their secret part. A keyword that ends in `file`, `path`, `dir` or the like names the location of a secret,
/// which is not secret.
const PATTERNS: [(&str, Kind); 5] = [
    (r"(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(-----END [A-Z0-9 ]*PRIVATE KEY-----|\z)", Kind::Whole),
    (r"[A-Za-z][A-Za-z0-9+.-]*://(?P<secret>[^\s/@'\x22]+)@", Kind::Group),
    (r"(?i)\b(?:proxy-)?authorization\s*[:=]\s*(?P<secret>(?:basic|bearer|digest)\s+[^\s'\x22,;]+)", Kind::Group),
    (
        // `password_file = "x"`, `"Password": "x"`, `--token=x`, `ETCD_PASSWORD=x`, `secret: x`
        r#"(?im)[\w.-]*(?:passw(?:or)?d|passphrase|secret|token|api[_-]?key|private[_-]?key|psk|preshared[_-]?key)(?:[\w.-]*(?:data|value|text))?["']?\s*[:=]\s*(?:"(?P<secret>(?:[^"\\]|\\.)*)"|'(?P<single>[^']*)'|(?P<bare>[^\s"',;}\]]+))"#,
        Kind::Group,
    ),
    (r"(?i)--(?:[\w-]*-)?(?:password|passphrase|token|secret)\s+(?P<secret>[^\s-][^\s]*)", Kind::Group),
];

impl Redactor {
    /// Creates a redactor that also removes these known secrets.
    pub fn new(mut secrets: Vec<String>) -> Redactor {
        secrets.retain(|text| text.len() >= MIN_SECRET_LEN);
        secrets.sort_by_key(|text| std::cmp::Reverse(text.len()));
        secrets.dedup();
        // Tests detect an invalid pattern.
        let patterns = PATTERNS.iter().filter_map(|(pattern, kind)| Some((Regex::new(pattern).ok()?, *kind))).collect();
        Redactor { secrets, patterns }
    }

    /// Returns the text without secrets, and their number.
    pub fn redact(&self, text: &str) -> (String, usize) {
        let (mut text, mut count) = (text.to_owned(), 0);
        for secret in &self.secrets {
            let found = text.matches(secret.as_str()).count();
            if found > 0 {
                count += found;
                text = text.replace(secret.as_str(), REDACTED);
            }
        }
        for (pattern, kind) in &self.patterns {
            let mut replace = |captures: &Captures<'_>| {
                let matched = captures.get(0).map_or("", |m| m.as_str());
                let secret = ["secret", "single", "bare"].iter().find_map(|name| captures.name(name));
                match (kind, secret) {
                    (Kind::Whole, _) => {
                        count += 1;
                        REDACTED.to_owned()
                    }
                    (Kind::Group, Some(secret)) if !secret.is_empty() && !secret.as_str().contains(REDACTED) => {
                        count += 1;
                        let start = secret.start() - captures.get(0).map_or(0, |m| m.start());
                        format!("{}{REDACTED}{}", &matched[..start], &matched[start + secret.len()..])
                    }
                    _ => matched.to_owned(),
                }
            };
            text = pattern.replace_all(&text, &mut replace).into_owned();
        }
        (text, count)
    }
}

/// Reads the known secrets from secret files: each line of each file, and each file as a whole. An unreadable file yields none.
pub fn known_secrets(files: &[&Path], directory: &Path) -> Vec<String> {
    let directory_files = std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found = Vec::new();
    for path in files.iter().map(|path| path.to_path_buf()).chain(directory_files) {
        // A certificate is public, and a pattern matches a key.
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if text.contains("-----BEGIN") {
            continue;
        }
        found.extend(text.lines().map(|line| line.trim().to_owned()));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_compiles() {
        assert_eq!(Redactor::new(Vec::new()).patterns.len(), PATTERNS.len());
    }

    #[test]
    fn secrets_are_redacted() {
        let redactor = Redactor::new(vec!["hunter2".to_owned(), "abc".to_owned()]);
        for (text, wanted) in [
            ("login with hunter2 failed", "login with <removed> failed"),
            ("etcd-password = \"geheim\"", "etcd-password = \"<removed>\""),
            ("{\"Password\": \"ge\\\"heim\", \"x\": 1}", "{\"Password\": \"<removed>\", \"x\": 1}"),
            ("ETCD_ROOT_PASSWORD=geheim next", "ETCD_ROOT_PASSWORD=<removed> next"),
            ("token: geheim", "token: <removed>"),
            ("overlayd --password geheim --x", "overlayd --password <removed> --x"),
            ("http://root:geheim@10.0.0.1:2379/x", "http://<removed>@10.0.0.1:2379/x"),
            ("Authorization: Bearer geheim", "Authorization: <removed>"),
            ("a -----BEGIN EC PRIVATE KEY-----\ngeheim\n-----END EC PRIVATE KEY----- b", "a <removed> b"),
            ("-----BEGIN PRIVATE KEY-----\ngeheim cut off", "<removed>"),
            ("secret = 'geheim'", "secret = '<removed>'"),
            // The location of a secret is not secret.
            ("etcd-password-file = \"/etc/overlayd/pw\"", "etcd-password-file = \"/etc/overlayd/pw\""),
            ("--etcd-keyfile=/etc/overlayd/client.key", "--etcd-keyfile=/etc/overlayd/client.key"),
            ("http://10.0.0.1:2379", "http://10.0.0.1:2379"),
            (
                "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----",
                "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----",
            ),
            ("abcdef", "abcdef"),
        ] {
            let (cleaned, count) = redactor.redact(text);
            assert_eq!(cleaned, wanted);
            assert_eq!(count, usize::from(text != wanted), "{text}");
            assert_eq!(redactor.redact(&cleaned).0, cleaned, "twice is once");
        }
    }
}
