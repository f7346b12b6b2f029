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
pub(super) enum Ternary {
    True,
    False,
    Unknown,
}

impl From<bool> for Ternary {
    fn from(value: bool) -> Ternary {
        if value { Ternary::True } else { Ternary::False }
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
    pub(super) fn is(&self, key: &str, value: &[String]) -> Ternary {
        let any = |one: &dyn Fn(&str) -> Ternary| any(value, one);
        let v4 = self.family() == Family::V4;
        match key {
            "iifname" | "iif" => any(&|value| name(&self.input, value)),
            "oifname" | "oif" => any(&|value| name(&self.output, value)),
            "ip saddr" => {
                if v4 {
                    any(&|value| address(self.source, value))
                } else {
                    Ternary::False
                }
            }
            "ip daddr" => {
                if v4 {
                    any(&|value| address(self.destination, value))
                } else {
                    Ternary::False
                }
            }
            "ip6 saddr" => {
                if v4 {
                    Ternary::False
                } else {
                    any(&|value| address(self.source, value))
                }
            }
            "ip6 daddr" => {
                if v4 {
                    Ternary::False
                } else {
                    any(&|value| address(self.destination, value))
                }
            }
            "ip protocol" if !v4 => Ternary::False,
            "ip6 nexthdr" if v4 => Ternary::False,
            "meta l4proto" | "ip protocol" | "ip6 nexthdr" => any(&|value| self.is_protocol(value)),
            "meta nfproto" => any(&|value| Ternary::from(value == if v4 { "ipv4" } else { "ipv6" })),
            "udp dport" | "tcp dport" | "th dport" | "sctp dport" => self.port(key, value, self.destination_port),
            "udp sport" | "tcp sport" | "th sport" | "sctp sport" => self.port(key, value, self.source_port),
            // Our rules keep the tunnel's packets from conntrack.
            "ct state" if self.hook != Hook::Forward => any(&|value| Ternary::from(value == "untracked")),
            "ct state" => any(&|value| Ternary::from(value == "new")),
            "ct status" if self.hook != Hook::Forward => Ternary::False,
            "ct status" => any(&|value| Ternary::from(value == "confirmed")),
            "icmp type" | "icmp code" | "icmpv6 type" | "tcp flags" => Ternary::False,
            "pkttype" | "meta pkttype" => any(&|value| Ternary::from(value == "unicast" || value == "host")),
            "fib daddr type" => any(&|value| self.destination_type(value)),
            _ => Ternary::Unknown,
        }
    }

    fn is_protocol(&self, value: &str) -> Ternary {
        let number = if self.protocol == "udp" { "17" } else { "6" };
        Ternary::from(value == self.protocol || value == number)
    }

    fn port(&self, key: &str, values: &[String], port: u16) -> Ternary {
        if !key.starts_with("th ") && !key.starts_with(self.protocol) {
            return Ternary::False;
        }
        any(values, &|value| in_range(port, value))
    }

    fn destination_type(&self, value: &str) -> Ternary {
        match (value, self.hook) {
            ("local", hook) => Ternary::from(hook == Hook::Input),
            ("unicast", hook) => Ternary::from(hook != Hook::Input),
            _ => Ternary::False,
        }
    }
}

/// Whether something is so of one of the values.
fn any(values: &[String], one: &dyn Fn(&str) -> Ternary) -> Ternary {
    let all: Vec<Ternary> = values.iter().map(|value| one(value)).collect();
    match () {
        () if all.contains(&Ternary::True) => Ternary::True,
        () if all.contains(&Ternary::Unknown) => Ternary::Unknown,
        () => Ternary::False,
    }
}

/// An interface's name, in quotes or not; a `*` at its end stands for any rest.
fn name(have: &str, wanted: &str) -> Ternary {
    let wanted = wanted.trim_matches('"');
    match wanted.strip_suffix('*') {
        Some(start) => Ternary::from(!have.is_empty() && have.starts_with(start)),
        None => Ternary::from(have == wanted),
    }
}

fn address(have: IpAddr, wanted: &str) -> Ternary {
    if let Some((first, last)) = wanted.split_once('-') {
        return match (first.parse::<IpAddr>(), last.parse::<IpAddr>()) {
            (Ok(first), Ok(last)) => Ternary::from(first <= have && have <= last),
            _ => Ternary::Unknown,
        };
    }
    if let Ok(one) = wanted.parse::<IpAddr>() {
        return Ternary::from(one == have);
    }
    wanted.parse::<Cidr>().map_or(Ternary::Unknown, |range| Ternary::from(range.contains(have)))
}

fn in_range(have: u16, wanted: &str) -> Ternary {
    match wanted.split_once('-') {
        Some((first, last)) => match (first.parse::<u16>(), last.parse::<u16>()) {
            (Ok(first), Ok(last)) => Ternary::from(first <= have && have <= last),
            _ => Ternary::Unknown,
        },
        // Names of services are none of the overlay's ports.
        None => wanted.parse::<u16>().map_or(Ternary::False, |port| Ternary::from(port == have)),
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
