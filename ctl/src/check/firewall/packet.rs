//! A packet as rules see it, and whether one match of a rule is true of it: yes, no, or not to be told from here.

use std::fmt;
use std::net::IpAddr;

use overlay_agent::model::{Cidr, Family};

/// Where in netfilter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    /// To this host.
    Input,
    /// Through this host.
    Forward,
    /// From this host.
    Output,
}

impl Hook {
    /// The hooks that such a packet passes, in nft's words, in the order in which it passes them.
    pub(super) fn passes(self) -> &'static [&'static str] {
        match self {
            Hook::Input => &["prerouting", "input"],
            Hook::Forward => &["prerouting", "forward", "postrouting"],
            Hook::Output => &["output", "postrouting"],
        }
    }
}

/// A packet, the first of its connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) hook: Hook,
    /// The interface that it comes in by; empty for our own.
    pub(super) input: String,
    /// The one that it leaves by; empty where it is for this host.
    pub(super) output: String,
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    protocol: &'static str,
    pub(super) source_port: u16,
    pub(super) destination_port: u16,
}

/// Whether something is so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Truth {
    Yes,
    No,
    Unknown,
}

impl From<bool> for Truth {
    fn from(value: bool) -> Truth {
        if value { Truth::Yes } else { Truth::No }
    }
}

impl Packet {
    pub(super) fn udp(hook: Hook, interfaces: (&str, &str), addresses: (IpAddr, IpAddr), ports: (u16, u16)) -> Packet {
        Packet::new(hook, "udp", interfaces, addresses, ports)
    }

    pub(super) fn tcp(hook: Hook, interfaces: (&str, &str), addresses: (IpAddr, IpAddr), ports: (u16, u16)) -> Packet {
        Packet::new(hook, "tcp", interfaces, addresses, ports)
    }

    fn new(
        hook: Hook,
        protocol: &'static str,
        interfaces: (&str, &str),
        addresses: (IpAddr, IpAddr),
        ports: (u16, u16),
    ) -> Packet {
        Packet {
            hook,
            input: interfaces.0.to_owned(),
            output: interfaces.1.to_owned(),
            source: addresses.0,
            destination: addresses.1,
            protocol,
            source_port: ports.0,
            destination_port: ports.1,
        }
    }

    pub(super) fn family(&self) -> Family {
        Family::of(self.destination)
    }

    /// Whether `key` (`ip saddr`, `udp dport`, `iifname` ...) of this packet is `value`: one value, a range, a prefix, or a list.
    pub(super) fn is(&self, key: &str, value: &[String]) -> Truth {
        let any = |one: &dyn Fn(&str) -> Truth| any(value, one);
        let v4 = self.family() == Family::V4;
        match key {
            "iifname" | "iif" => any(&|value| name(&self.input, value)),
            "oifname" | "oif" => any(&|value| name(&self.output, value)),
            "ip saddr" => {
                if v4 {
                    any(&|value| address(self.source, value))
                } else {
                    Truth::No
                }
            }
            "ip daddr" => {
                if v4 {
                    any(&|value| address(self.destination, value))
                } else {
                    Truth::No
                }
            }
            "ip6 saddr" => {
                if v4 {
                    Truth::No
                } else {
                    any(&|value| address(self.source, value))
                }
            }
            "ip6 daddr" => {
                if v4 {
                    Truth::No
                } else {
                    any(&|value| address(self.destination, value))
                }
            }
            "ip protocol" if !v4 => Truth::No,
            "ip6 nexthdr" if v4 => Truth::No,
            "meta l4proto" | "ip protocol" | "ip6 nexthdr" => any(&|value| self.is_protocol(value)),
            "meta nfproto" => any(&|value| Truth::from(value == if v4 { "ipv4" } else { "ipv6" })),
            "udp dport" | "tcp dport" | "th dport" | "sctp dport" => self.port(key, value, self.destination_port),
            "udp sport" | "tcp sport" | "th sport" | "sctp sport" => self.port(key, value, self.source_port),
            // Our rules keep the tunnel's packets from conntrack.
            "ct state" if self.hook != Hook::Forward => any(&|value| Truth::from(value == "untracked")),
            "ct state" => any(&|value| Truth::from(value == "new")),
            "ct status" if self.hook != Hook::Forward => Truth::No,
            "ct status" => any(&|value| Truth::from(value == "confirmed")),
            "icmp type" | "icmp code" | "icmpv6 type" | "tcp flags" => Truth::No,
            "pkttype" | "meta pkttype" => any(&|value| Truth::from(value == "unicast" || value == "host")),
            "fib daddr type" => any(&|value| self.destination_type(value)),
            _ => Truth::Unknown,
        }
    }

    fn is_protocol(&self, value: &str) -> Truth {
        let number = if self.protocol == "udp" { "17" } else { "6" };
        Truth::from(value == self.protocol || value == number)
    }

    fn port(&self, key: &str, values: &[String], port: u16) -> Truth {
        if !key.starts_with("th ") && !key.starts_with(self.protocol) {
            return Truth::No;
        }
        any(values, &|value| in_range(port, value))
    }

    fn destination_type(&self, value: &str) -> Truth {
        match (value, self.hook) {
            ("local", hook) => Truth::from(hook == Hook::Input),
            ("unicast", hook) => Truth::from(hook != Hook::Input),
            _ => Truth::No,
        }
    }
}

/// Whether something is so of one of the values.
fn any(values: &[String], one: &dyn Fn(&str) -> Truth) -> Truth {
    let all: Vec<Truth> = values.iter().map(|value| one(value)).collect();
    match () {
        () if all.contains(&Truth::Yes) => Truth::Yes,
        () if all.contains(&Truth::Unknown) => Truth::Unknown,
        () => Truth::No,
    }
}

/// An interface's name, in quotes or not; a `*` at its end stands for any rest.
fn name(have: &str, wanted: &str) -> Truth {
    let wanted = wanted.trim_matches('"');
    match wanted.strip_suffix('*') {
        Some(start) => Truth::from(!have.is_empty() && have.starts_with(start)),
        None => Truth::from(have == wanted),
    }
}

fn address(have: IpAddr, wanted: &str) -> Truth {
    if let Some((first, last)) = wanted.split_once('-') {
        return match (first.parse::<IpAddr>(), last.parse::<IpAddr>()) {
            (Ok(first), Ok(last)) => Truth::from(first <= have && have <= last),
            _ => Truth::Unknown,
        };
    }
    if let Ok(one) = wanted.parse::<IpAddr>() {
        return Truth::from(one == have);
    }
    wanted.parse::<Cidr>().map_or(Truth::Unknown, |range| Truth::from(range.contains(have)))
}

fn in_range(have: u16, wanted: &str) -> Truth {
    match wanted.split_once('-') {
        Some((first, last)) => match (first.parse::<u16>(), last.parse::<u16>()) {
            (Ok(first), Ok(last)) => Truth::from(first <= have && have <= last),
            _ => Truth::Unknown,
        },
        // Names of services are none of the overlay's ports.
        None => wanted.parse::<u16>().map_or(Truth::No, |port| Truth::from(port == have)),
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from {} to {}", self.protocol, self.source, self.destination)?;
        if self.hook != Hook::Forward {
            write!(f, " port {}", self.destination_port)?;
        }
        for (word, interface) in [("in by", &self.input), ("out by", &self.output)] {
            if !interface.is_empty() {
                write!(f, ", {word} {interface}")?;
            }
        }
        Ok(())
    }
}
