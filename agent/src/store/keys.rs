//! Keys in etcd. Pure.
//!
//! A network has `config` and `subnets/<subnet>`: the default one below the prefix, a named one below `<prefix>/networks/<name>`.

use super::StoreError;
use crate::model::{Cidr, NetworkName, Vni};

/// flannel's default prefix.
pub const DEFAULT_PREFIX: &str = "/coreos.com/network";

/// The keys below one prefix. The prefix is normalised like flannel's `path.Join` does: no trailing and no double slashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    prefix: String,
}

/// Kind of a key below the prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum KeyKind {
    /// The network's configuration.
    Config,
    /// An entry of `subnets/`, with the part after it.
    Subnet(String),
    /// Any other key; ignored.
    Other,
}

impl Keys {
    /// Creates the keys below this prefix.
    ///
    /// # Errors
    /// [`StoreError::Prefix`] if it is empty or contains control characters.
    pub fn new(prefix: &str) -> Result<Keys, StoreError> {
        let error = |rule| StoreError::Prefix { prefix: crate::model::text::printable(prefix), rule };
        if prefix.chars().any(char::is_control) {
            return Err(error("contains control characters"));
        }
        let parts: Vec<&str> = prefix.split('/').filter(|part| !part.is_empty()).collect();
        if parts.is_empty() {
            return Err(error("has no path component"));
        }
        let root = if prefix.starts_with('/') { "/" } else { "" };
        Ok(Keys { prefix: format!("{root}{}", parts.join("/")) })
    }

    /// The prefix without a trailing slash.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The key of the network's configuration.
    pub fn config(&self) -> String {
        format!("{}/config", self.prefix)
    }

    /// The full key of an entry, from its last part.
    pub fn subnet(&self, key: &str) -> String {
        format!("{}/subnets/{key}", self.prefix)
    }

    /// The keys of one network, of which these are the default's.
    pub fn network(&self, name: &NetworkName) -> Keys {
        match name.is_default() {
            true => self.clone(),
            false => Keys { prefix: format!("{}/networks/{name}", self.prefix) },
        }
    }

    /// The range of everything of named networks: from (inclusive), to (exclusive).
    pub(super) fn networks_range(&self) -> (String, String) {
        (format!("{}/networks/", self.prefix), format!("{}/networks0", self.prefix))
    }

    /// The name in a key of [`Self::networks_range`], not necessarily valid.
    pub(super) fn network_part<'a>(&self, key: &'a str) -> Option<&'a str> {
        key.strip_prefix(&self.networks_range().0)?.split('/').next()
    }

    /// The key that names the network of a VNI.
    pub(super) fn vni(&self, vni: Vni) -> String {
        format!("{}/vnis/{vni}", self.prefix)
    }

    /// The range of all VNI keys: from (inclusive), to (exclusive).
    pub(super) fn vnis_range(&self) -> (String, String) {
        (format!("{}/vnis/", self.prefix), format!("{}/vnis0", self.prefix))
    }

    /// The range of all keys below the prefix: from (inclusive), to (exclusive).
    pub(super) fn prefix_range(&self) -> (String, String) {
        (format!("{}/", self.prefix), format!("{}0", self.prefix))
    }

    /// The range of all entries: from (inclusive), to (exclusive).
    pub(super) fn subnets_range(&self) -> (String, String) {
        (format!("{}/subnets/", self.prefix), format!("{}/subnets0", self.prefix))
    }

    /// Classifies a key.
    pub(super) fn kind_of(&self, key: &[u8]) -> KeyKind {
        let Some(rest) = key.strip_prefix(self.prefix.as_bytes()) else { return KeyKind::Other };
        if rest == b"/config" {
            return KeyKind::Config;
        }
        match rest.strip_prefix(b"/subnets/") {
            Some(part) => KeyKind::Subnet(String::from_utf8_lossy(part).into_owned()),
            None => KeyKind::Other,
        }
    }
}

/// All ranges that an entry's key claims, in canonical form or not. A non-canonical key is rejected as a lease, but no host may
/// allocate the ranges that it names.
pub(super) fn claimed_ranges(key: &str) -> Vec<Cidr> {
    key.split('&')
        .filter_map(|part| {
            let (address, length) = part.rsplit_once(['-', '/'])?;
            Cidr::containing(address.trim().parse().ok()?, length.trim().parse().ok()?)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(prefix: &str) -> Keys {
        Keys::new(prefix).expect(prefix)
    }

    #[test]
    fn prefixes_are_normalised() {
        for (prefix, wanted) in [
            ("/coreos.com/network", "/coreos.com/network"),
            ("/coreos.com/network/", "/coreos.com/network"),
            ("//coreos.com///network//", "/coreos.com/network"),
            ("overlay", "overlay"),
        ] {
            assert_eq!(keys(prefix).prefix(), wanted);
        }
        for prefix in ["", "/", "///", "/a\nb"] {
            assert!(matches!(Keys::new(prefix), Err(StoreError::Prefix { .. })), "{prefix:?}");
        }
    }

    #[test]
    fn key_kinds_match_built_keys() {
        let keys = keys("/p");
        assert_eq!(keys.kind_of(keys.config().as_bytes()), KeyKind::Config);
        assert_eq!(keys.kind_of(keys.subnet("10.1.0.0-24").as_bytes()), KeyKind::Subnet("10.1.0.0-24".to_owned()));
        for other in ["/p", "/p/config2", "/p/endpoints/x", "/pp/config", "/p/subnets", ""] {
            assert_eq!(keys.kind_of(other.as_bytes()), KeyKind::Other, "{other}");
        }
        let (from, to) = keys.subnets_range();
        assert!(from < keys.subnet("0") && keys.subnet("~") < to);
        let (from, to) = keys.prefix_range();
        assert!(from < keys.config() && keys.subnet("~") < to);
    }

    #[test]
    fn named_networks_have_keys_below_their_name() {
        let keys = keys("/p");
        assert_eq!(keys.network(&NetworkName::default()), keys);
        let blue = keys.network(&"blue".into());
        assert_eq!(
            (blue.config(), blue.subnet("10.1.0.0-24")),
            ("/p/networks/blue/config".into(), "/p/networks/blue/subnets/10.1.0.0-24".into())
        );
        assert_eq!(keys.network_part(&blue.subnet("10.1.0.0-24")), Some("blue"));
        assert_eq!((keys.network_part("/p/networks/x"), keys.network_part("/p/config")), (Some("x"), None));
        let (from, to) = keys.networks_range();
        assert!(from < blue.config() && blue.subnet("~") < to);
        let (from, to) = keys.vnis_range();
        let vni = keys.vni(Vni::DEFAULT);
        assert!(vni == "/p/vnis/1" && from < vni && vni < to);
        // Agents of the default network ignore them.
        assert_eq!(keys.kind_of(blue.config().as_bytes()), KeyKind::Other);
    }

    #[test]
    fn non_canonical_keys_claim_ranges() {
        let claims = |key: &str| claimed_ranges(key).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(claims("10.244.1.7-24"), ["10.244.1.0/24"]);
        assert_eq!(claims("FD00:0::-64"), ["fd00::/64"]);
        assert_eq!(claims("10.1.0.0-16&fd00::-64"), ["10.1.0.0/16", "fd00::/64"]);
        assert!(claims("rubbish").is_empty() && claims("").is_empty() && claims("10.0.0.0-99").is_empty());
    }
}
