//! What can go wrong between the agent and etcd, each with the place, the value and the remedy. No message ever holds a password.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::metrics::Metrics;

use crate::config::secret::ExposedFile;

/// Why something could not be read from or written to etcd.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Neither endpoints nor a discovery name are given.
    #[error("no etcd endpoint is given: set --etcd-endpoints or --etcd-discovery-srv")]
    NoEndpoint,
    /// The key prefix cannot be one.
    #[error("etcd prefix `{prefix}` {rule}: use one such as /coreos.com/network")]
    Prefix {
        /// The refused prefix.
        prefix: String,
        /// What is wrong with it.
        rule: &'static str,
    },
    /// An endpoint is no URL of an etcd server.
    #[error("etcd endpoint `{endpoint}` {rule}")]
    Endpoint {
        /// The refused endpoint.
        endpoint: String,
        /// What is wrong with it and what is allowed.
        rule: String,
    },
    /// A file that the connection needs cannot be read.
    #[error("the {purpose} {} cannot be read: {source}", path.display())]
    File {
        /// What the file is for, with the flag that names it.
        purpose: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A file that the connection needs has another content than it must have.
    #[error("the {purpose} {} {rule}", path.display())]
    Content {
        /// What the file is for, with the flag that names it.
        purpose: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        rule: &'static str,
    },
    /// A file with a secret is open to others than it should be.
    #[error("the {purpose} {} {exposed}", path.display())]
    Exposed {
        /// What the file is for, with the flag that names it.
        purpose: &'static str,
        /// The file.
        path: PathBuf,
        /// Its mode, and the remedy.
        exposed: ExposedFile,
    },
    /// A user without a password file, a certificate without a key, or the reverse.
    #[error("{given} needs {missing} as well")]
    Incomplete {
        /// The flag that is given.
        given: &'static str,
        /// The flag that is missing.
        missing: &'static str,
    },
    /// The SRV records could not be had.
    #[error("etcd discovery by SRV records of `{name}` failed: {detail}; look at `dig SRV _etcd-client._tcp.{name}`")]
    Discovery {
        /// The domain.
        name: String,
        /// The resolver's answer.
        detail: String,
    },
    /// An endpoint cannot be reached.
    #[error("etcd {endpoint} cannot be reached: {detail}; {}", unreachable(endpoint, detail))]
    Unreachable {
        /// The endpoint.
        endpoint: String,
        /// The cause.
        detail: String,
    },
    /// An endpoint does not answer in time.
    #[error(
        "etcd {endpoint} did not answer within {seconds} s ({what}): it does not run, its name is unknown here, or a firewall drops its packets"
    )]
    Timeout {
        /// The endpoint.
        endpoint: String,
        /// What was asked.
        what: &'static str,
        /// How long was waited, in seconds.
        seconds: f32,
    },
    /// The TLS connection failed.
    #[error("TLS with etcd {endpoint} failed: {detail}; {remedy}")]
    Tls {
        /// The endpoint.
        endpoint: String,
        /// The TLS library's words.
        detail: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The user is refused.
    #[error("etcd {endpoint} refuses {who}: {detail}; check --etcd-username and --etcd-password-file")]
    Login {
        /// The endpoint.
        endpoint: String,
        /// Who was refused.
        who: String,
        /// etcd's words.
        detail: String,
    },
    /// The user may not do this.
    #[error(
        "{who} may not {what} at etcd {endpoint}: grant it with `etcdctl role grant-permission ROLE readwrite --prefix {prefix}/`"
    )]
    Permission {
        /// The endpoint.
        endpoint: String,
        /// Who was refused.
        who: String,
        /// What was asked.
        what: &'static str,
        /// The prefix.
        prefix: String,
    },
    /// etcd's database is full.
    #[error("etcd {endpoint} is out of space and accepts no writes: compact and defragment it, then `etcdctl alarm disarm`")]
    NoSpace {
        /// The endpoint.
        endpoint: String,
    },
    /// An etcd lease has expired or was revoked.
    #[error("etcd lease {lease:x} is not there any more")]
    LeaseNotFound {
        /// The etcd lease.
        lease: i64,
    },
    /// The connection may hang on an address that this host no longer has; the kernel would let it wait for answers that cannot
    /// come.
    #[error("this host's underlay address has changed: connecting to etcd anew")]
    AddressChanged,
    /// The revision that is asked for has been compacted away.
    #[error("etcd has compacted the revisions behind {revision} away")]
    Compacted {
        /// The revision that was asked for.
        revision: i64,
    },
    /// An answer is larger than is accepted.
    #[error("etcd {endpoint} sent an answer that is too large: {detail}")]
    TooLarge {
        /// The endpoint.
        endpoint: String,
        /// The sizes.
        detail: String,
    },
    /// Any other answer that is no success.
    #[error("etcd {endpoint} could not {what}: {detail}")]
    RequestFailed {
        /// The endpoint.
        endpoint: String,
        /// What was asked.
        what: &'static str,
        /// etcd's words.
        detail: String,
    },
    /// None of the endpoints can be used.
    #[error("no etcd endpoint can be used: {}", errors.join("; "))]
    AllFailed {
        /// What each of them said.
        errors: Vec<String>,
    },
    /// The configuration was changed by somebody else in the meantime.
    #[error(
        "the configuration was changed meanwhile (revision {found} instead of {expected}): look at it again, then write it again"
    )]
    Conflict {
        /// The revision of the last change that the caller knew; 0 for none.
        expected: i64,
        /// The revision found; 0 for none.
        found: i64,
    },
    /// Nobody receives events any more.
    #[error("the receiver of store events is gone")]
    ReceiverClosed,
}

impl StoreError {
    /// Whether the connection is of no use any more, as against an answer that is no success.
    pub(super) fn ends_session(&self) -> bool {
        use StoreError as E;
        matches!(
            self,
            E::Unreachable { .. } | E::Timeout { .. } | E::Tls { .. } | E::Login { .. } | E::AddressChanged | E::ReceiverClosed
        )
    }
}

/// Where and for whom a request was made; turns the client library's errors into ours.
#[derive(Debug, Clone)]
pub(super) struct Context {
    /// The endpoint.
    pub(super) endpoint: String,
    /// The user, where there is one.
    pub(super) user: Option<String>,
    /// The prefix.
    pub(super) prefix: String,
    /// Whether the server has answered anything yet.
    pub(super) has_responded: bool,
    /// Whether the client certificate has expired.
    pub(super) certificate_expired: bool,
    /// Where round trips are counted.
    pub(super) metrics: Option<Arc<Metrics>>,
}

// gRPC status codes (grpc.io, `statuscodes.md`).
const DEADLINE_EXCEEDED: i32 = 4;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const UNAVAILABLE: i32 = 14;
const UNAUTHENTICATED: i32 = 16;

/// How a connection looks that the server ended after it was made.
const CONNECTION_CLOSED_TEXTS: [&str; 3] = ["connection closed", "broken pipe", "reset by peer"];

/// The client library's own words, which say nothing to whoever reads them behind the system's.
const REDUNDANT_TEXTS: [&str; 3] = ["tcp connect error: ", "transport error: ", ": transport error"];

impl Context {
    pub(super) fn user_description(&self) -> String {
        self.user.as_ref().map_or_else(|| "a client without a user name".to_owned(), |user| format!("user `{user}`"))
    }

    /// Our error for the library's.
    pub(super) fn map_error(&self, what: &'static str, error: etcd_client::Error) -> StoreError {
        use etcd_client::Error as E;
        let endpoint = self.endpoint.clone();
        match error {
            E::GRpcStatus(status) => {
                let detail = error_chain(status.message(), status.source());
                self.map_status(what, i32::from(status.code()), status.source().is_some(), detail)
            }
            E::TransportError(error) => self.map_transport_error(error_chain("", Some(&error))),
            E::IoError(error) => StoreError::Unreachable { endpoint, detail: error.to_string() },
            E::InvalidUri(error) => StoreError::Endpoint { endpoint, rule: format!("is no URL: {error}") },
            other => StoreError::RequestFailed { endpoint, what, detail: other.to_string() },
        }
    }

    fn map_status(&self, what: &'static str, code: i32, local: bool, detail: String) -> StoreError {
        let endpoint = self.endpoint.clone();
        let says = |text: &str| detail.contains(text);
        if says("required revision has been compacted") {
            return StoreError::Compacted { revision: 0 };
        }
        if says("decoded message length too large") || says("message larger than max") {
            return StoreError::TooLarge { endpoint, detail };
        }
        if says("database space exceeded") {
            return StoreError::NoSpace { endpoint };
        }
        if says("authentication failed") || says("user name is empty") || says("invalid auth token") || code == UNAUTHENTICATED {
            return StoreError::Login { endpoint, who: self.user_description(), detail };
        }
        match code {
            PERMISSION_DENIED => {
                StoreError::Permission { endpoint, who: self.user_description(), what, prefix: self.prefix.clone() }
            }
            NOT_FOUND if says("lease not found") => StoreError::LeaseNotFound { lease: 0 },
            UNAVAILABLE if !local => StoreError::RequestFailed { endpoint, what, detail },
            UNAVAILABLE => self.map_transport_error(detail),
            DEADLINE_EXCEEDED | RESOURCE_EXHAUSTED => StoreError::RequestFailed { endpoint, what, detail },
            _ if local => self.map_transport_error(detail),
            _ => StoreError::RequestFailed { endpoint, what, detail },
        }
    }

    /// A failure below gRPC: TLS tells what is wrong only in words.
    fn map_transport_error(&self, detail: String) -> StoreError {
        let endpoint = self.endpoint.clone();
        let says = |text: &str| detail.contains(text);
        let alert = says("alert")
            || (endpoint.starts_with("https://")
                && !self.has_responded
                && CONNECTION_CLOSED_TEXTS.iter().any(|words| says(words)));
        let remedy = if self.certificate_expired && alert {
            // Not every server says so.
            "the client certificate of --etcd-certfile has expired: renew it, or set this host's clock right"
        } else if says("UnknownIssuer") || says("BadSignature") {
            "its certificate is not signed by the CA of --etcd-cafile (by none that this host trusts, where no file is given)"
        } else if says("NotValidForName") || says("not valid for name") {
            "its certificate names other hosts: use the name in the certificate as endpoint"
        } else if says("NotValidYet") || says("not valid yet") {
            "its certificate is not valid yet: is this host's clock right?"
        } else if says("Expired") || says("expired") {
            "its certificate has expired: renew it, or set this host's clock right"
        } else if says("CertificateRequired") || says("certificate required") || says("BadCertificate") || says("UnknownCA") {
            "it wants a client certificate of its CA: set --etcd-certfile and --etcd-keyfile"
        } else if says("InvalidContentType") || says("corrupt message") || says("handshake eof") {
            "where it does not speak TLS, use an http:// endpoint"
        } else if endpoint.starts_with("https://")
            && !self.has_responded
            && CONNECTION_CLOSED_TEXTS.iter().any(|words| says(words))
        {
            // TLS 1.3 servers look at the client's certificate only after the handshake. One without TLS says so where its words
            // arrive before the end of the connection, which they need not.
            "servers that want a client certificate of their CA end the connection so: set --etcd-certfile and --etcd-keyfile; and servers \
             without TLS may: for these use an http:// endpoint"
        } else if says("certificate") || says("tls") || says("TLS") || says("fatal alert") {
            "check --etcd-cafile, --etcd-certfile and --etcd-keyfile"
        } else {
            return StoreError::Unreachable { endpoint, detail: strip_redundant_text(&detail) };
        };
        StoreError::Tls { endpoint, detail: strip_redundant_text(&detail), remedy }
    }
}

fn strip_redundant_text(detail: &str) -> String {
    REDUNDANT_TEXTS.iter().fold(detail.to_owned(), |detail, noise| detail.replace(noise, ""))
}

/// What to do about an endpoint that cannot be reached, by the system's words.
fn unreachable(endpoint: &str, detail: &str) -> String {
    let says = |text: &str| detail.contains(text);
    if says("refused") {
        "nothing listens there: start etcd, or set --etcd-endpoints to where it is".to_owned()
    } else if says("o route to host") || says("etwork is unreachable") {
        "is the address of --etcd-endpoints right? `ip route get ADDRESS` shows this host's way there".to_owned()
    } else if says("lookup") || says("dns error") {
        let host = endpoint.rsplit_once("://").map_or(endpoint, |(_, rest)| rest);
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        format!("is the name of --etcd-endpoints right? `getent hosts {name}` asks as the agent does")
    } else if endpoint.starts_with("http://") && CONNECTION_CLOSED_TEXTS.iter().any(|words| says(words)) {
        "servers that speak TLS end the connection so: use an https:// endpoint, and --etcd-cafile; and etcd's client port, usually 2379"
            .to_owned()
    } else {
        "does etcd run there, and is its client port open from here?".to_owned()
    }
}

/// An error's words and those of its sources, without repetition.
fn error_chain(first: &str, source: Option<&(dyn Error + 'static)>) -> String {
    let mut parts: Vec<String> = if first.is_empty() { Vec::new() } else { vec![first.to_owned()] };
    let mut next = source;
    while let Some(error) = next {
        let text = error.to_string();
        if !parts.iter().any(|part| part.contains(&text)) {
            parts.push(text);
        }
        next = error.source();
    }
    // Long enough for a chain of causes, short enough for a log line.
    parts.join(": ").chars().take(400).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
