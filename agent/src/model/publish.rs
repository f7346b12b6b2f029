//! Published ports: host ports that are forwarded to a container.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::Family;
use super::text::printable;

/// A published port or port range. As text `[ADDRESS:]HOST[-LAST]:CONTAINER[-LAST][/tcp|udp|sctp]`, an IPv6 address in brackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishedPort {
    /// The host's address that it is bound to; `None`: any address of the host.
    #[serde(default)]
    pub address: Option<IpAddr>,
    /// The first port on the host.
    pub host_port: u16,
    /// The first port in the container.
    pub container_port: u16,
    /// Number of consecutive ports on both sides, at least 1.
    #[serde(default = "one")]
    pub count: u16,
    /// The transport protocol.
    #[serde(default)]
    pub protocol: Transport,
}

fn one() -> u16 {
    1
}

/// Transport protocols with ports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Error of parsing or validating a [`PublishedPort`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a valid published port: {reason}; use [ADDRESS:]HOST[-LAST]:CONTAINER[-LAST][/tcp|udp|sctp], an IPv6 address in brackets"
)]
pub struct PublishError {
    /// The rejected text, cut to 80 characters.
    pub text: String,
    /// The cause.
    pub reason: String,
}

impl PublishedPort {
    /// Checks rules that a JSON value can violate but a parsed text cannot: port 0, an empty range, a range beyond 65535.
    ///
    /// # Errors
    /// The violated rule.
    pub fn validate(&self) -> Result<(), PublishError> {
        let exceeds_range = |first: u16| u32::from(first) + u32::from(self.count) > 65_536;
        let reason = if self.host_port == 0 || self.container_port == 0 {
            "port 0 is not valid"
        } else if self.count == 0 {
            "the port range is empty"
        } else if exceeds_range(self.host_port) || exceeds_range(self.container_port) {
            "the port range exceeds 65535"
        } else {
            return Ok(());
        };
        Err(PublishError { text: self.to_string(), reason: reason.to_owned() })
    }

    /// The family that it is bound to; `None` for both.
    pub fn family(&self) -> Option<Family> {
        self.address.map(Family::of)
    }

    /// Whether it forwards to a container with addresses of these families. Runtimes publish on both `0.0.0.0` and `::` by
    /// default, for any container, so the wildcard address of a family that the container lacks has no effect.
    pub fn has_effect(&self, has: impl Fn(Family) -> bool) -> bool {
        self.family().is_none_or(has)
    }

    /// Whether it is bound to all addresses of one family.
    pub fn is_wildcard(&self) -> bool {
        self.address.is_some_and(|address| address.is_unspecified())
    }

    /// Whether both map a shared host port to the same container port.
    pub fn is_compatible_with(&self, other: &PublishedPort) -> bool {
        let offset = |p: &PublishedPort| i32::from(p.container_port) - i32::from(p.host_port);
        offset(self) == offset(other)
    }

    /// Whether both use the same host port on a shared address.
    pub fn conflicts_with(&self, other: &PublishedPort) -> bool {
        let end = |p: &PublishedPort| u32::from(p.host_port) + u32::from(p.count);
        let ports = u32::from(self.host_port) < end(other) && u32::from(other.host_port) < end(self);
        let addresses = match (self.address, other.address) {
            // The unspecified address matches every address of its family.
            (Some(a), Some(b)) => a == b || (a.is_ipv4() == b.is_ipv4() && (a.is_unspecified() || b.is_unspecified())),
            _ => true,
        };
        self.protocol == other.protocol && ports && addresses
    }
}

impl Transport {
    /// The protocol number in the IP header (IANA).
    pub fn number(self) -> u8 {
        match self {
            Transport::Tcp => 6,
            Transport::Udp => 17,
            Transport::Sctp => 132,
        }
    }

    /// The protocol name.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
            Transport::Sctp => "sctp",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            // `SocketAddr` puts IPv6 into brackets.
            Some(address) => write!(f, "{}", SocketAddr::new(address, self.host_port))?,
            None => write!(f, "{}", self.host_port)?,
        }
        let run = |f: &mut fmt::Formatter<'_>, first: u16| match self.count {
            0 | 1 => Ok(()),
            count => write!(f, "-{}", u32::from(first) + u32::from(count) - 1),
        };
        run(f, self.host_port)?;
        write!(f, ":{}", self.container_port)?;
        run(f, self.container_port)?;
        write!(f, "/{}", self.protocol)
    }
}

impl std::str::FromStr for PublishedPort {
    type Err = PublishError;

    fn from_str(text: &str) -> Result<Self, PublishError> {
        parse(text).map_err(|reason| PublishError { text: printable(text), reason })
    }
}

fn parse(text: &str) -> Result<PublishedPort, String> {
    let (ports, protocol) = match text.rsplit_once('/') {
        None => (text, Transport::Tcp),
        Some((ports, "tcp")) => (ports, Transport::Tcp),
        Some((ports, "udp")) => (ports, Transport::Udp),
        Some((ports, "sctp")) => (ports, Transport::Sctp),
        Some((_, other)) => return Err(format!("`{}` is not a protocol", printable(other))),
    };
    let (rest, container) = ports.rsplit_once(':').ok_or("the container port is missing")?;
    let (address, host) = match rest.rsplit_once(':') {
        None => (None, rest),
        Some((address, host)) => {
            let unbracketed = address.strip_prefix('[').and_then(|a| a.strip_suffix(']'));
            let parsed = match unbracketed {
                Some(inner) => inner.parse().ok().filter(IpAddr::is_ipv6),
                None => address.parse().ok().filter(IpAddr::is_ipv4),
            };
            (Some(parsed.ok_or_else(|| format!("`{}` is not an address", printable(address)))?), host)
        }
    };
    // 0.0.0.0 and :: mean any address of their family. They are kept because the family matters.
    let (host_port, count) = parse_port_range(host)?;
    let (container_port, container_count) = parse_port_range(container)?;
    if count != container_count {
        return Err(format!("{count} ports on the host, {container_count} in the container"));
    }
    Ok(PublishedPort { address, host_port, container_port, count, protocol })
}

/// Parses `PORT` or `FIRST-LAST` into the first port and the count.
fn parse_port_range(text: &str) -> Result<(u16, u16), String> {
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port) if port > 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(port),
        _ => Err(format!("`{}` is not a port from 1 to 65535", printable(text))),
    };
    let Some((first, last)) = text.split_once('-') else { return Ok((port(text)?, 1)) };
    let (first, last) = (port(first)?, port(last)?);
    match last.checked_sub(first) {
        Some(more) => Ok((first, more + 1)),
        None => Err(format!("{first}-{last} ends before it begins")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        for (text, shown) in [
            ("8080:80", "8080:80/tcp"),
            ("127.0.0.1:8080:80/udp", "127.0.0.1:8080:80/udp"),
            ("[::1]:53:5353/sctp", "[::1]:53:5353/sctp"),
            ("8000-8003:9000-9003", "8000-8003:9000-9003/tcp"),
            ("1-65535:1-65535", "1-65535:1-65535/tcp"),
        ] {
            let publish: PublishedPort = text.parse().unwrap();
            assert_eq!(publish.to_string(), shown);
            assert_eq!(shown.parse::<PublishedPort>().unwrap(), publish);
            publish.validate().unwrap();
            let json = serde_json::to_string(&publish).unwrap();
            assert_eq!(serde_json::from_str::<PublishedPort>(&json).unwrap(), publish);
        }
        for text in [
            "",
            "80",
            ":80",
            "80:",
            "0:80",
            "80:0",
            "65536:1",
            "+1:2",
            "1-2:3",
            "2-1:2-1",
            "a:b",
            "80:80/icmp",
            "::1:80:80",
            "[1.2.3.4]:1:1",
            "1.2.3:1:1",
            "80:80/tcp/udp",
            "1:2:3:4",
        ] {
            let error = text.parse::<PublishedPort>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}`")) && error.contains("HOST"), "{text}: {error}");
        }
    }

    #[test]
    fn invalid_json_values_are_rejected() {
        let value = |host_port, container_port, count| PublishedPort {
            address: None,
            host_port,
            container_port,
            count,
            protocol: Transport::Tcp,
        };
        assert!(value(1, 1, 65_535).validate().is_ok());
        for bad in [value(0, 1, 1), value(1, 0, 1), value(1, 1, 0), value(2, 1, 65_535), value(1, 2, 65_535)] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn wildcard_of_missing_family_has_no_effect() {
        let effects = |text: &str| {
            let publish: PublishedPort = text.parse().unwrap();
            Family::ALL.map(|there| publish.has_effect(|family| family == there))
        };
        assert_eq!((effects("80:80"), effects("0.0.0.0:80:80")), ([true, true], [true, false]));
        assert_eq!((effects("[::]:80:80"), effects("[::1]:80:80")), ([false, true], [false, true]));
        let wildcard = |text: &str| text.parse::<PublishedPort>().unwrap().is_wildcard();
        assert!(wildcard("[::]:80:80") && wildcard("0.0.0.0:80:80") && !wildcard("80:80") && !wildcard("[::1]:80:80"));
    }

    #[test]
    fn shared_port_to_same_container_port_is_compatible() {
        let agree = |a: &str, b: &str| a.parse::<PublishedPort>().unwrap().is_compatible_with(&b.parse().unwrap());
        assert!(agree("80:8080", "0.0.0.0:80:8080") && agree("80-90:180-190", "85:185"));
        assert!(!agree("80:8080", "80:8081") && !agree("80-90:180-190", "85:186"));
    }

    #[test]
    fn overlapping_ports_conflict() {
        let collide = |a: &str, b: &str| {
            let (a, b): (PublishedPort, PublishedPort) = (a.parse().unwrap(), b.parse().unwrap());
            assert_eq!(a.conflicts_with(&b), b.conflicts_with(&a));
            a.conflicts_with(&b)
        };
        assert!(collide("80:1", "80:2") && collide("80-90:1-11", "90:1") && collide("1.2.3.4:80:1", "80:1"));
        assert!(collide("0.0.0.0:80:1", "1.2.3.4:80:1") && !collide("0.0.0.0:80:1", "[::]:80:1"));
        assert!(!collide("80:1", "80:1/udp") && !collide("80-90:1-11", "91:1") && !collide("1.2.3.4:80:1", "1.2.3.5:80:1"));
    }
}
