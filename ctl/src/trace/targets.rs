//! Resolves SRC and DST: a container of this host by name, this host, a peer by its host's name, or an address.

use std::net::IpAddr;
use std::path::Path;

use overlay_agent::endpoint::read_stored;
use overlay_agent::model::api::SubnetEntry;
use overlay_agent::model::publish::Transport;
use overlay_agent::model::{Endpoint, Family, Mode, Subnet};

use super::TraceError;

/// Keyword for this host.
pub const HOST_KEYWORD: &str = "host";

/// Known hosts and containers, from the agent, or from its state directory if it does not answer.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    /// Containers of this host.
    pub endpoints: Vec<Endpoint>,
    /// All leases; `None` if the agent does not answer.
    pub leases: Option<Vec<SubnetEntry>>,
}

/// A parsed SRC or DST.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetArg {
    /// Name or address.
    pub name: String,
    /// Port and protocol.
    pub port: Option<(u16, Transport)>,
}

/// One end of the path.
#[derive(Debug, Clone)]
pub enum TraceEnd {
    /// Container of this host.
    Container(Box<Endpoint>),
    /// This host.
    Host,
    /// Another host of the overlay with its subnet; its VTEP has the subnet's first address.
    Peer(String, Subnet),
    /// Any other address, or one of this host's own.
    Address(IpAddr),
}

impl TargetArg {
    /// Parses `NAME` or `ADDRESS`, optionally with `:PORT` and `/PROTOCOL`; an IPv6 address with a port is in brackets.
    pub fn parse(text: &str) -> Result<TargetArg, TraceError> {
        let invalid = |reason: &str| {
            let message = format!(
                "`{text}`: {reason}; write NAME or ADDRESS, with a port NAME:PORT[/tcp|udp|sctp], an IPv6 address with a port in brackets"
            );
            TraceError::Target { message }
        };
        if text.parse::<IpAddr>().is_ok() {
            return Ok(TargetArg { name: text.to_owned(), port: None });
        }
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, "tcp")) => (rest, Some(Transport::Tcp)),
            Some((rest, "udp")) => (rest, Some(Transport::Udp)),
            Some((rest, "sctp")) => (rest, Some(Transport::Sctp)),
            Some(_) => return Err(invalid("the protocol is not tcp, udp or sctp")),
            None => (text, None),
        };
        let (name, port) = match rest.rsplit_once(':') {
            Some((name, port)) => {
                let port: u16 = port.parse().map_err(|_| invalid("the port is not a number from 1 to 65535"))?;
                if port == 0 {
                    return Err(invalid("port 0 is invalid"));
                }
                (name, Some((port, protocol.unwrap_or_default())))
            }
            None if protocol.is_some() => return Err(invalid("a protocol needs a port")),
            None => (rest, None),
        };
        let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
        if name.is_empty() {
            return Err(invalid("the name is empty"));
        }
        Ok(TargetArg { name: name.to_owned(), port })
    }
}

impl Inventory {
    /// Reads the state directory, for an agent that does not answer.
    pub fn from_state(state_dir: &Path) -> Inventory {
        let stored = read_stored(state_dir).ok().flatten().unwrap_or_default();
        let endpoints = stored.into_iter().map(|stored| stored.endpoint).collect();
        Inventory { endpoints, leases: None }
    }

    /// Resolves a name.
    pub fn resolve(&self, name: &str) -> Result<TraceEnd, TraceError> {
        if let Ok(address) = name.parse::<IpAddr>() {
            return Ok(self
                .container_with_address(address)
                .map_or(TraceEnd::Address(address), |e| TraceEnd::Container(Box::new(e.clone()))));
        }
        if let Some(endpoint) = self.endpoints.iter().find(|endpoint| endpoint.name.as_str() == name) {
            return Ok(match &endpoint.mode {
                Mode::Host => TraceEnd::Host,
                Mode::Container(other) => self.resolve(other.as_str())?,
                Mode::Overlay | Mode::None => TraceEnd::Container(Box::new(endpoint.clone())),
            });
        }
        if name == HOST_KEYWORD {
            return Ok(TraceEnd::Host);
        }
        let leases = self.leases.as_deref().unwrap_or_default();
        if let Some(lease) = leases.iter().find(|lease| lease.host.as_deref() == Some(name)) {
            return match lease.subnet {
                _ if lease.own => Ok(TraceEnd::Host),
                Some(subnet) => Ok(TraceEnd::Peer(name.to_owned(), subnet)),
                None => Err(TraceError::Target { message: format!("host {name} has no subnet") }),
            };
        }
        let agent_hint = if self.leases.is_none() { "; the agent does not answer, so peers' names are unknown" } else { "" };
        let message = format!(
            "`{name}` is not a container of this host (`overlayctl endpoints` lists them), not a host of the overlay and not an address: for a container \
             of another host use its address{agent_hint}"
        );
        Err(TraceError::Target { message })
    }

    /// Finds the container of this host that has an address.
    pub fn container_with_address(&self, address: IpAddr) -> Option<&Endpoint> {
        let has = |endpoint: &&Endpoint| endpoint.addresses().iter().any(|(_, own)| *own == address);
        self.endpoints.iter().find(has)
    }

    /// Finds the lease whose subnet contains an address.
    pub fn lease_for(&self, address: IpAddr) -> Option<&SubnetEntry> {
        let family = Family::of(address);
        let holds = |lease: &&SubnetEntry| lease.subnet.and_then(|s| s.get(family)).is_some_and(|range| range.contains(address));
        self.leases.as_deref().unwrap_or_default().iter().find(holds)
    }

    /// Name of the host behind an underlay address, or the address.
    pub fn host_name_at(&self, public: IpAddr) -> String {
        let at = |lease: &&SubnetEntry| lease.public_ip.iter().any(|(_, own)| *own == public);
        let name = self.leases.as_deref().unwrap_or_default().iter().find(at).and_then(|lease| lease.host.clone());
        name.map_or_else(|| public.to_string(), |name| format!("{name} ({public})"))
    }
}

impl TraceEnd {
    /// Address in a family; the route chooses this host's.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        match self {
            TraceEnd::Container(endpoint) => endpoint.addresses().get(family).copied(),
            TraceEnd::Address(address) => Some(*address).filter(|address| Family::of(*address) == family),
            TraceEnd::Peer(_, subnet) => subnet.get(family).map(|range| range.base()),
            TraceEnd::Host => None,
        }
    }

    /// Possible address families.
    pub fn families(&self) -> Vec<Family> {
        match self {
            TraceEnd::Host => Family::ALL.to_vec(),
            TraceEnd::Container(endpoint) if endpoint.addresses().is_empty() => Family::ALL.to_vec(),
            _ => Family::ALL.into_iter().filter(|family| self.address(*family).is_some()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_parses_with_and_without_port() {
        let read = |text: &str| TargetArg::parse(text).map(|w| (w.name, w.port)).map_err(|e| e.to_string());
        assert_eq!(read("web"), Ok(("web".to_owned(), None)));
        assert_eq!(read("fd00::1"), Ok(("fd00::1".to_owned(), None)));
        assert_eq!(read("192.0.2.7:80"), Ok(("192.0.2.7".to_owned(), Some((80, Transport::Tcp)))));
        assert_eq!(read("[fd00::1]:53/udp"), Ok(("fd00::1".to_owned(), Some((53, Transport::Udp)))));
        assert_eq!(read("web:8080/sctp"), Ok(("web".to_owned(), Some((8080, Transport::Sctp)))));
        for invalid in ["web:0", "web:70000", "web:x", "web/tcp", ":80", "web:80/icmp"] {
            assert!(read(invalid).is_err_and(|error| error.contains(invalid)), "{invalid}");
        }
    }
}
