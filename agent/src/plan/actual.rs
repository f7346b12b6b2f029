//! Actual kernel state in two parts. No entry is in both.
//!
//! The kernel layer owns the local entries, because it compares events with them. The reconciler owns the peers' entries.

use super::ruleset::Element;
use super::state::{Entries, Key, LinkState, State, Value};
use crate::model::{Family, Mac};

/// Entries that do not depend on peers, as last written, read or reported.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalState {
    /// Sysctls, links and addresses.
    pub entries: State,
    /// The tables with their elements, and the accept rules in iptables' chains.
    pub rules: State,
}

impl LocalState {
    /// Sets an entry, or removes it. Returns whether it was different before.
    pub fn set(&mut self, key: Key, value: Option<Value>) -> bool {
        let part = if is_rule(&key) { &mut self.rules } else { &mut self.entries };
        match value {
            Some(value) if part.get(&key) == Some(&value) => false,
            Some(value) => {
                part.insert(key, value);
                true
            }
            None => part.remove(&key).is_some(),
        }
    }

    /// The value of an entry.
    pub fn get(&self, key: &Key) -> Option<&Value> {
        if is_rule(key) { self.rules.get(key) } else { self.entries.get(key) }
    }

    /// A link, by interface name.
    pub fn link(&self, name: &str) -> Option<&LinkState> {
        match self.entries.get(&Key::Link(name.into())) {
            Some(Value::Link(link)) => Some(link),
            _ => None,
        }
    }

    /// The source filter's elements of an interface.
    pub fn source_elements(&self, interface: &str) -> impl Iterator<Item = Element> {
        let first = Element::Source(Box::new((interface.to_owned(), Mac([0; 6]), Family::V4.unspecified())));
        let sources = self.rules.range(Key::Element(first)..).map_while(|(key, _)| match key {
            Key::Element(element @ Element::Source(_)) if element.interface() == Some(interface) => Some(element.clone()),
            _ => None,
        });
        let unchecked = Element::Unchecked(interface.into());
        let is_unchecked = self.rules.contains_key(&Key::Element(unchecked.clone()));
        sources.chain(is_unchecked.then_some(unchecked))
    }
}

fn is_rule(key: &Key) -> bool {
    matches!(key, Key::Ruleset(_) | Key::Element(_) | Key::ForwardAccept(_))
}

/// Both parts together.
#[derive(Debug, Clone, Copy)]
pub struct ActualState<'a> {
    /// The local entries.
    pub local: &'a LocalState,
    /// The peers' entries, and the unreachable routes.
    pub peers: &'a State,
}

impl Entries for ActualState<'_> {
    fn get(&self, key: &Key) -> Option<&Value> {
        if key.is_peer_entry() { self.peers.get(key) } else { self.local.get(key) }
    }

    fn iter(&self) -> impl Iterator<Item = (&Key, &Value)> {
        // Sorted, because the kinds of key are in this order.
        self.local.entries.iter().chain(&self.local.rules).chain(self.peers)
    }

    fn links(&self) -> impl Iterator<Item = (&Key, &LinkState)> {
        self.local.entries.links()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Cidr, Device, Vni};
    use crate::plan::ruleset::Table;

    #[test]
    fn parts_are_in_key_order() {
        let address: ipnetwork::IpNetwork = "10.0.0.1/24".parse().expect("an address");
        let range: Cidr = "10.0.0.0/24".parse().expect("a CIDR");
        let device = Device::vxlan(Family::V4, Vni::DEFAULT);
        let keys = [
            Key::Sysctl("ipv4/a".into()),
            Key::Address(device, address),
            Key::Ruleset(Table::Inet),
            Key::Element(Element::Unchecked("ove1".into())),
            Key::ForwardAccept(Family::V4),
            Key::Fdb(device, Mac([2; 6])),
            Key::Neigh(device, address.ip()),
            Key::Nexthop(1),
            Key::Route(range),
            Key::Unreachable(range),
        ];
        let (mut local, mut peers) = (LocalState::default(), State::new());
        for key in keys.clone() {
            if key.is_peer_entry() {
                peers.insert(key, Value::Address);
            } else {
                assert!(local.set(key.clone(), Some(Value::Address)) && !local.set(key, Some(Value::Address)));
            }
        }
        let actual = ActualState { local: &local, peers: &peers };
        assert!(actual.iter().map(|(key, _)| key).eq(&keys) && keys.is_sorted());
        assert!(keys.iter().all(|key| actual.contains_key(key)));
    }

    #[test]
    fn source_elements_are_those_of_one_interface() {
        let source = |interface: &str, address: &str| {
            Element::Source(Box::new((interface.to_owned(), Mac([2; 6]), address.parse().expect(address))))
        };
        let elements = [source("ove1", "10.0.0.1"), source("ove1", "fe80::1"), Element::Unchecked("ove1".into())];
        let others = [source("ove", "10.0.0.1"), source("ove10", "10.0.0.1"), Element::Unchecked("ove2".into())];
        let mut local = LocalState::default();
        for element in elements.iter().chain(&others) {
            local.set(Key::Element(element.clone()), Some(Value::Element(None)));
        }
        assert!(local.source_elements("ove1").eq(elements));
        assert_eq!(local.source_elements("ove3").count(), 0);
    }
}
