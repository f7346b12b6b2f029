//! A network's record in etcd: flannel's configuration and the fields of this project, which flannel ignores.

use std::collections::BTreeSet;

use super::config_fields::{ConfigErrors, FieldError, FieldReader, field_error};
use super::{Cidr, NetworkConfig, NetworkName, Vni};

/// The value of `Encryption` for packets that travel through the hosts' WireGuard devices.
pub(super) const WIREGUARD: &str = "wireguard";

/// Longest domain, in bytes (RFC 1035 section 2.3.4, as text without the root).
const MAX_DOMAIN: usize = 253;
/// Longest label of a domain, in bytes (RFC 1035 section 2.3.4).
const MAX_LABEL: usize = 63;

/// A network as its record describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkRecord {
    /// The JSON text.
    pub text: Box<str>,
    /// Address space and backend.
    pub config: NetworkConfig,
    /// Whether it lives in a network namespace of its own on each host. Otherwise the host routes it.
    pub isolated: bool,
    /// Whether it has no way out. Only of isolated networks.
    pub internal: bool,
    /// Networks that it is routed to if they name it, too. Only of isolated networks.
    pub peers: BTreeSet<NetworkName>,
    /// Whether packets between hosts are encrypted.
    pub encrypted: bool,
    /// The domain of its endpoints' names, if it is not the default one.
    pub domain: Option<String>,
    /// Unknown fields, known fields without effect, and questionable values.
    pub warnings: Vec<FieldError>,
}

impl NetworkRecord {
    /// Parses the JSON text of a record. Reports all errors at once.
    pub fn parse(text: &str) -> Result<NetworkRecord, ConfigErrors> {
        let mut reader = FieldReader::of_object(text)?;
        let config = NetworkConfig::read(&mut reader);
        let isolated = reader.boolean("Isolated").unwrap_or(false);
        let internal = reader.boolean("Internal").unwrap_or(false);
        let peers = reader.peers();
        if internal && !isolated {
            reader.fail("Internal", "true", "needs Isolated: the host reaches every container of a routed network");
        }
        if let Some(peer) = peers.first().filter(|_| !isolated) {
            reader.fail("Peers", &peer.to_string(), "needs Isolated: the host already routes between routed networks");
        }
        let encrypted = reader.encryption();
        let domain = reader.domain();
        let (errors, warnings) = reader.finish();
        match config {
            Some(config) if errors.is_empty() => {
                Ok(NetworkRecord { text: text.into(), config, isolated, internal, peers, encrypted, domain, warnings })
            }
            _ => Err(ConfigErrors(errors)),
        }
    }

    /// Checks the record against its network's name.
    pub fn check_name(&self, name: &NetworkName) -> Result<(), ConfigErrors> {
        let rule = "is not possible: the default network is routed, flannel's hosts share it";
        match name.is_default() && self.isolated {
            true => Err(ConfigErrors(vec![field_error("Isolated", "true", rule)])),
            false => Ok(()),
        }
    }

    /// The VNI, if the backend has one.
    pub fn vni(&self) -> Option<Vni> {
        self.config.backend.vni()
    }

    /// The first range of this network that shares addresses with the other, and that network's range.
    pub fn overlap(&self, other: &NetworkRecord) -> Option<(Cidr, Cidr)> {
        self.config.families().find_map(|family| {
            let (own, other) = (self.config.network(family)?, other.config.network(family)?);
            own.overlaps(other).then_some((own, other))
        })
    }
}

impl FieldReader {
    fn peers(&mut self) -> BTreeSet<NetworkName> {
        let mut peers = BTreeSet::new();
        for text in self.strings("Peers") {
            match text.parse() {
                Ok(name) => drop(peers.insert(name)),
                Err(_) => self.fail("Peers", &text, "is not a network name: a DNS label of 1 to 32 characters"),
            }
        }
        peers
    }

    fn encryption(&mut self) -> bool {
        match self.string("Encryption").as_deref() {
            None | Some("") => false,
            Some(WIREGUARD) => true,
            Some(other) => {
                self.fail("Encryption", other, &format!("is not supported: only {WIREGUARD} is"));
                false
            }
        }
    }

    fn domain(&mut self) -> Option<String> {
        let text = self.string("Domain").filter(|text| !text.is_empty())?;
        let is_label = |label: &str| {
            (1..=MAX_LABEL).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        let domain = text.strip_suffix('.').unwrap_or(&text).to_ascii_lowercase();
        if domain.len() <= MAX_DOMAIN && domain.split('.').all(is_label) {
            return Some(domain);
        }
        self.fail("Domain", &text, "is not a domain: labels of letters, digits and `-`, separated by dots");
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_in_any_case() {
        let text = r#"{"Network":"10.1.0.0/16","isolated":true,"INTERNAL":true,"peers":["green","red"],"encryption":"wireguard",
            "domain":"Blue.Example.","Other":1}"#;
        let record = NetworkRecord::parse(text).expect("a record");
        assert!(record.isolated && record.internal && record.encrypted);
        assert_eq!(record.peers, ["green", "red"].map(NetworkName::from).into());
        assert_eq!(record.domain.as_deref(), Some("blue.example"));
        assert_eq!(record.warnings.iter().map(|w| w.field.as_str()).collect::<Vec<_>>(), ["Other"]);
    }

    #[test]
    fn flannel_configuration_is_a_routed_network() {
        let record = NetworkRecord::parse(r#"{"Network":"10.1.0.0/16","Backend":{"VNI":7}}"#).expect("a record");
        assert!(!record.isolated && !record.internal && !record.encrypted && record.peers.is_empty() && record.domain.is_none());
        assert_eq!(record.vni().map(Vni::get), Some(7));
        assert_eq!(record.config, NetworkConfig::parse(r#"{"Network":"10.1.0.0/16","Backend":{"VNI":7}}"#).expect("it").config);
    }

    #[test]
    fn each_invalid_field_is_reported() {
        for (fields, wanted) in [
            (r#""Isolated":"yes""#, "Isolated: `\"yes\"` is neither true nor false"),
            (r#""Internal":true"#, "Internal: `true` needs Isolated"),
            (r#""Peers":["green"]"#, "Peers: `green` needs Isolated"),
            (r#""Isolated":true,"Peers":"green""#, "Peers: `\"green\"` is not a list of strings"),
            (r#""Isolated":true,"Peers":["a","B"]"#, "Peers: `B` is not a network name"),
            (r#""Encryption":"ipsec""#, "Encryption: `ipsec` is not supported: only wireguard is"),
            (r#""Encryption":true"#, "Encryption: `true` is not a string"),
            (r#""Domain":"a..b""#, "Domain: `a..b` is not a domain"),
            (r#""Domain":"-a""#, "Domain: `-a` is not a domain"),
            (r#""SubnetLen":31"#, "SubnetLen: `31` is outside"),
        ] {
            let error = NetworkRecord::parse(&format!(r#"{{"Network":"10.1.0.0/16",{fields}}}"#)).expect_err(fields).to_string();
            assert!(error.contains(wanted), "{fields}: {error}");
        }
        let two = NetworkRecord::parse(r#"{"Network":"x","Domain":"."}"#).expect_err("two errors");
        assert_eq!(two.0.len(), 2, "{two}");
    }
}
