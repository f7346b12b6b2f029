//! The networks below one prefix, and the rules between them.

use std::collections::{BTreeMap, BTreeSet};

use super::config_fields::{ConfigErrors, FieldError, field_error};
use super::{NetworkName, NetworkRecord, Vni, transfer_range};

/// All networks with a record, and the VNIs that are taken.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkSet {
    /// Each network's record, or its errors.
    pub networks: BTreeMap<NetworkName, Result<NetworkRecord, ConfigErrors>>,
    /// The network that each entry of `<prefix>/vnis/` names. The default network has none: flannel does not write one.
    pub vnis: BTreeMap<Vni, NetworkName>,
}

impl NetworkSet {
    /// The lowest VNI that a new named network can have. 1 is left to the default network, which may be made later.
    pub fn free_vni(&self) -> Option<Vni> {
        let taken: BTreeSet<Vni> = self.valid().filter_map(|(_, record)| record.vni()).chain(self.vnis.keys().copied()).collect();
        (Vni::DEFAULT.get() + 1..).map_while(|n| Vni::try_from(n).ok()).find(|vni| !taken.contains(vni))
    }

    /// The networks whose `Peers` contain this one.
    pub fn peered_with(&self, name: &NetworkName) -> Vec<&NetworkName> {
        self.valid().filter(|(_, record)| record.peers.contains(name)).map(|(other, _)| other).collect()
    }

    /// Checks a network, new or present, against the others. Reports all errors at once.
    ///
    /// Invalid networks are left out: they contradict nothing, and nothing serves them.
    ///
    /// # Errors
    /// Each broken rule with its field and remedy.
    pub fn check(&self, name: &NetworkName, record: &NetworkRecord) -> Result<(), ConfigErrors> {
        let mut errors = Vec::new();
        errors.extend(record.check_name(name).err().into_iter().flat_map(|ConfigErrors(errors)| errors));
        errors.extend(self.vni_error(name, record));
        // That of IPv4 is link-local, which no configuration may contain.
        errors.extend(record.config.pools.iter().filter_map(|(family, pool)| {
            let transfer = transfer_range(family);
            let rule = format!("overlaps {transfer}, the addresses between isolated networks and their hosts: choose another");
            let overlaps = pool.network.overlaps(transfer);
            overlaps.then(|| field_error(&family.field_name("Network"), &pool.network.to_string(), &rule))
        }));
        if !record.isolated {
            let routed = self.others(name).filter(|(_, other)| !other.isolated);
            errors.extend(routed.filter_map(|(other_name, other)| {
                let rule = format!(
                    "of routed network {other_name}: a host has one route to a range; choose another, or isolate the network"
                );
                overlap_error("overlaps", record, other, &rule)
            }));
        }
        errors.extend(self.peer_errors(name, record));
        errors.extend(self.errors_of_peers(name, record));
        if errors.is_empty() { Ok(()) } else { Err(ConfigErrors(errors)) }
    }

    fn vni_error(&self, name: &NetworkName, record: &NetworkRecord) -> Option<FieldError> {
        let vni = record.vni()?;
        let reserved = self.vnis.get(&vni).filter(|holder| *holder != name);
        let holder =
            reserved.or_else(|| self.others(name).find(|(_, other)| other.vni() == Some(vni)).map(|(other, _)| other))?;
        let free = self.free_vni().map_or_else(|| "none is free".to_owned(), |free| format!("{free} is free"));
        Some(field_error("Backend.VNI", &vni.to_string(), &format!("is network {holder}'s: {free}")))
    }

    fn peer_errors(&self, name: &NetworkName, record: &NetworkRecord) -> Vec<FieldError> {
        let mut errors = Vec::new();
        let mut peers: Vec<(&NetworkName, &NetworkRecord)> = Vec::new();
        for peer in &record.peers {
            let other = self.networks.get(peer).and_then(|other| other.as_ref().ok());
            let rule = match other {
                _ if peer == name => "is the network itself: remove it".to_owned(),
                None => format!("is unknown; present: {}", joined(self.valid().map(|(name, _)| name))),
                Some(other) if !other.isolated => "is routed: only isolated networks are routed to each other".to_owned(),
                Some(other) => {
                    peers.push((peer, other));
                    continue;
                }
            };
            errors.push(field_error("Peers", &peer.to_string(), &rule));
        }
        for (at, (peer, other)) in peers.iter().enumerate() {
            let rule = format!("of peer {peer}: networks that are routed to each other need ranges of their own");
            errors.extend(overlap_error("overlaps", record, other, &rule));
            for (second, other_peer) in &peers[at + 1..] {
                let rule = format!("of {peer}, and both are peers: leave one out");
                errors.extend(overlap_error(&format!("of peer {second} overlaps"), other_peer, other, &rule));
            }
        }
        errors
    }

    /// What a change of this network breaks in those that name it as their peer.
    fn errors_of_peers(&self, name: &NetworkName, record: &NetworkRecord) -> Vec<FieldError> {
        let mut changed = self.clone();
        changed.networks.insert(name.clone(), Ok(record.clone()));
        let others = self.others(name).filter(|(_, other)| other.peers.contains(name));
        let new_errors = others.flat_map(|(other_name, other)| {
            let before = self.peer_errors(other_name, other);
            let after = changed.peer_errors(other_name, other).into_iter().filter(move |error| !before.contains(error));
            after.map(move |error| FieldError { rule: format!("{} (network {other_name} has it in Peers)", error.rule), ..error })
        });
        new_errors.collect()
    }

    fn valid(&self) -> impl Iterator<Item = (&NetworkName, &NetworkRecord)> {
        self.networks.iter().filter_map(|(name, record)| Some((name, record.as_ref().ok()?)))
    }

    fn others<'a>(&'a self, name: &'a NetworkName) -> impl Iterator<Item = (&'a NetworkName, &'a NetworkRecord)> {
        self.valid().filter(move |(other, _)| *other != name)
    }
}

fn overlap_error(relation: &str, one: &NetworkRecord, other: &NetworkRecord, rule: &str) -> Option<FieldError> {
    let (own, range) = one.overlap(other)?;
    Some(field_error(&own.family().field_name("Network"), &own.to_string(), &format!("{relation} {range} {rule}")))
}

/// The names in a sentence.
pub fn joined<'a>(names: impl IntoIterator<Item = &'a NetworkName>) -> String {
    let names: Vec<String> = names.into_iter().map(ToString::to_string).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(fields: &str) -> NetworkRecord {
        NetworkRecord::parse(&format!("{{{fields}}}")).expect(fields)
    }

    /// The default network with VNI 1, two isolated networks with one range, a routed one, and an invalid one.
    fn networks() -> NetworkSet {
        let networks = [
            ("default", r#""Network":"10.244.0.0/16""#),
            ("blue", r#""Network":"10.0.0.0/16","Isolated":true,"Backend":{"VNI":2}"#),
            ("green", r#""Network":"10.0.0.0/16","Isolated":true,"Backend":{"VNI":3},"Peers":["red"]"#),
            ("red", r#""Network":"10.9.0.0/16","Isolated":true,"Backend":{"VNI":4},"Peers":["green"]"#),
            ("hub", r#""Network":"10.78.0.0/16","Isolated":true,"Backend":{"VNI":8},"Peers":["blue","red"]"#),
            ("shop", r#""Network":"10.20.0.0/16","Backend":{"VNI":6},"EnableIPv6":true,"IPv6Network":"fd00:20::/48""#),
        ];
        let mut set = NetworkSet {
            networks: networks.into_iter().map(|(name, fields)| (name.into(), Ok(record(fields)))).collect(),
            vnis: [(5, "gone"), (2, "blue")].map(|(n, name)| (Vni::try_from(n).expect("a VNI"), name.into())).into(),
        };
        set.networks.insert("broken".into(), NetworkRecord::parse(r#"{"Network":"10.20.0.0/16","SubnetLen":99}"#));
        set
    }

    #[test]
    fn lowest_unused_vni_is_chosen() {
        assert_eq!(NetworkSet::default().free_vni().map(Vni::get), Some(2));
        // 5 is reserved although its network has no record.
        assert_eq!(networks().free_vni().map(Vni::get), Some(7));
    }

    #[test]
    fn present_networks_pass_their_own_check() {
        let set = networks();
        for (name, record) in set.valid() {
            assert_eq!(set.check(name, record), Ok(()), "{name}");
        }
    }

    #[test]
    fn isolated_networks_may_overlap_any_other() {
        let set = networks();
        for network in ["10.244.0.0/16", "10.0.0.0/16", "10.0.0.0/8"] {
            let new = record(&format!(r#""Network":"{network}","Isolated":true,"Backend":{{"VNI":9}}"#));
            assert_eq!(set.check(&"new".into(), &new), Ok(()), "{network}");
        }
    }

    #[test]
    fn each_rule_is_enforced() {
        let isolated = |fields: &str| format!(r#""Network":"10.77.0.0/16","Isolated":true,"Backend":{{"VNI":9}},{fields}"#);
        for (name, fields, wanted) in [
            ("default", r#""Network":"10.1.0.0/16","Isolated":true"#.to_owned(), "Isolated: `true` is not possible: the default"),
            ("new", r#""Network":"10.1.0.0/16""#.to_owned(), "Backend.VNI: `1` is network default's: 7 is free"),
            ("new", r#""Network":"10.1.0.0/16","Backend":{"VNI":5}"#.to_owned(), "Backend.VNI: `5` is network gone's"),
            ("new", r#""Network":"10.1.0.0/16","Backend":{"VNI":3}"#.to_owned(), "Backend.VNI: `3` is network green's"),
            (
                "new",
                r#""Network":"10.244.128.0/17","Backend":{"VNI":9}"#.to_owned(),
                "Network: `10.244.128.0/17` overlaps 10.244.0.0/16 of routed network default: a host has one route",
            ),
            (
                "new",
                r#""EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:20:0:100::/56","Backend":{"VNI":9}"#.to_owned(),
                "IPv6Network: `fd00:20:0:100::/56` overlaps fd00:20::/48 of routed network shop",
            ),
            (
                "new",
                r#""EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd6f:7665:726c::/48","Backend":{"VNI":9}"#.to_owned(),
                "IPv6Network: `fd6f:7665:726c::/48` overlaps fd6f:7665:726c:6179::/64, the addresses between isolated networks and their hosts",
            ),
            ("new", isolated(r#""Peers":["new"]"#), "Peers: `new` is the network itself"),
            ("new", isolated(r#""Peers":["nil"]"#), "Peers: `nil` is unknown; present: blue, default, green, hub, red, shop"),
            ("new", isolated(r#""Peers":["broken"]"#), "Peers: `broken` is unknown"),
            ("new", isolated(r#""Peers":["shop"]"#), "Peers: `shop` is routed"),
            (
                "new",
                r#""Network":"10.0.1.0/24","Isolated":true,"Backend":{"VNI":9},"Peers":["blue"]"#.to_owned(),
                "Network: `10.0.1.0/24` overlaps 10.0.0.0/16 of peer blue",
            ),
            (
                "new",
                isolated(r#""Peers":["blue","green"]"#),
                "Network: `10.0.0.0/16` of peer green overlaps 10.0.0.0/16 of blue, and both are peers",
            ),
            (
                "green",
                r#""Network":"10.9.9.0/24","Isolated":true,"Backend":{"VNI":3}"#.to_owned(),
                "overlaps 10.9.9.0/24 of peer green: networks that are routed to each other need ranges of their own (network red has it",
            ),
            (
                "green",
                r#""Network":"10.8.0.0/24","Backend":{"VNI":3}"#.to_owned(),
                "Peers: `green` is routed: only isolated networks are routed to each other (network red has it in Peers)",
            ),
            (
                "red",
                r#""Network":"10.0.3.0/24","Isolated":true,"Backend":{"VNI":4}"#.to_owned(),
                "of peer red overlaps 10.0.0.0/16 of blue, and both are peers: leave one out (network hub has it in Peers)",
            ),
        ] {
            let error = networks().check(&name.into(), &record(&fields)).expect_err(&fields).to_string();
            assert!(error.contains(wanted), "{fields}: {error}");
        }
    }
}
