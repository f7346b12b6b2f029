//! A host's part of the overlay network, and its etcd key.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Cidr, Family, PerFamily};

/// A host's subnet: one CIDR per family of the network, at least one of them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "PerFamily<Cidr>", into = "PerFamily<Cidr>")]
pub struct Subnet(PerFamily<Cidr>);

/// Error of building or parsing a [`Subnet`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    /// No CIDR is present, or a CIDR is in the other family's field.
    #[error("a subnet needs an IPv4 CIDR, an IPv6 CIDR or one of each")]
    Families,
    /// The key does not have the format `10.244.1.0-24`, `fd00::-64` or `10.244.1.0-24&fd00::-64`.
    #[error("`{key}` is not a subnet key: expected 10.244.1.0-24, fd00:10:244:1::-64 or both joined by `&`")]
    Key {
        /// The rejected key, cut to 80 characters.
        key: String,
    },
}

impl Subnet {
    /// Creates a subnet of these CIDRs.
    pub fn new(cidrs: PerFamily<Cidr>) -> Result<Subnet, SubnetError> {
        if cidrs.is_empty() || cidrs.iter().any(|(family, cidr)| cidr.family() != family) {
            return Err(SubnetError::Families);
        }
        Ok(Subnet(cidrs))
    }

    /// The CIDR of one family.
    pub fn get(&self, family: Family) -> Option<Cidr> {
        self.0.get(family).copied()
    }

    /// The CIDRs, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = (Family, Cidr)> + '_ {
        self.0.iter().map(|(family, cidr)| (family, *cidr))
    }

    /// The families of the subnet.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        self.0.families()
    }

    /// Whether the ranges of any family overlap.
    pub fn overlaps(&self, other: &Subnet) -> bool {
        self.iter().any(|(family, cidr)| other.get(family).is_some_and(|o| o.overlaps(cidr)))
    }

    /// The bridge's address in a family: base + 1, the gateway of the containers.
    pub fn gateway(&self, family: Family) -> Option<IpAddr> {
        self.get(family)?.nth(1)
    }

    /// The last part of the etcd key in flannel's format: `10.244.27.0-24`, dual-stack
    /// `10.244.101.0-24&fd00:10:244:51::-64`.
    pub fn to_key(&self) -> String {
        let part = |cidr: Cidr| format!("{}-{}", cidr.base(), cidr.length());
        self.iter().map(|(_, cidr)| part(cidr)).collect::<Vec<_>>().join("&")
    }

    /// Parses a key. Accepts only the canonical text, so that two keys never name the same subnet.
    pub fn from_key(key: &str) -> Result<Subnet, SubnetError> {
        let error = || SubnetError::Key { key: key.chars().take(80).collect() };
        let mut cidrs = PerFamily::default();
        for part in key.split('&') {
            let (address, length) = part.rsplit_once('-').ok_or_else(error)?;
            let cidr: Cidr = format!("{address}/{length}").parse().map_err(|_| error())?;
            if cidrs.slot(cidr.family()).replace(cidr).is_some() {
                return Err(error());
            }
        }
        let subnet = Subnet::new(cidrs).map_err(|_| error())?;
        if subnet.to_key() == key { Ok(subnet) } else { Err(error()) }
    }
}

impl TryFrom<PerFamily<Cidr>> for Subnet {
    type Error = SubnetError;

    fn try_from(cidrs: PerFamily<Cidr>) -> Result<Self, SubnetError> {
        Subnet::new(cidrs)
    }
}

impl From<Subnet> for PerFamily<Cidr> {
    fn from(subnet: Subnet) -> Self {
        subnet.0
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_round_trip() {
        for key in ["10.244.27.0-24", "10.244.101.0-24&fd00:10:244:51::-64", "fd00:10:244:51::-64"] {
            assert_eq!(Subnet::from_key(key).expect(key).to_key(), key);
        }
    }

    #[test]
    fn non_canonical_keys_are_rejected() {
        for key in [
            "",
            "config",
            "10.244.27.1-24",
            "10.244.27.0/24",
            "10.244.27.0-024",
            "10.244.27.0-33",
            "fd00:10:244:51::-64&10.244.101.0-24",
            "10.244.1.0-24&10.244.2.0-24",
            "FD00::-64",
            "fd00:0:0::-64",
            "10.244.27.0-24&",
            "10.244.27.0-24;reboot",
        ] {
            assert!(Subnet::from_key(key).is_err(), "{key}");
        }
    }
}
