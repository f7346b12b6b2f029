//! The desired state of a network namespace: what its networks contribute, and the entries that they share.

use std::collections::BTreeMap;

use super::state::{Entries, Key, LinkState, State, Value};
use crate::model::NetworkName;

/// Desired entries, by the network that contributed them. If two parts contain the same key, the first one owns it.
#[derive(Debug, Default)]
pub struct DesiredState {
    /// Entries shared by the networks.
    pub shared: State,
    /// Entries of each network.
    pub networks: BTreeMap<NetworkName, State>,
}

impl DesiredState {
    fn parts(&self) -> impl Iterator<Item = &State> {
        [&self.shared].into_iter().chain(self.networks.values())
    }
}

impl Entries for DesiredState {
    fn get(&self, key: &Key) -> Option<&Value> {
        self.parts().find_map(|part| part.get(key))
    }

    fn iter(&self) -> impl Iterator<Item = (&Key, &Value)> {
        let mut parts: Vec<_> = self.parts().map(|part| part.iter().peekable()).collect();
        std::iter::from_fn(move || {
            let heads = parts.iter_mut().enumerate().filter_map(|(index, part)| part.peek().map(|(key, _)| (*key, index)));
            let (key, first) = heads.min()?;
            for part in parts.iter_mut().skip(first + 1) {
                let _not_owned = part.next_if(|(other, _)| *other == key);
            }
            parts.get_mut(first)?.next()
        })
    }

    fn links(&self) -> impl Iterator<Item = (&Key, &LinkState)> {
        self.parts().flat_map(Entries::links)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(paths: &[&str]) -> State {
        paths.iter().map(|path| (Key::Sysctl((*path).into()), Value::Sysctl("1".into()))).collect()
    }

    #[test]
    fn first_part_owns_key() {
        let value = |value: &str| State::from([(Key::Sysctl("b".into()), Value::Sysctl(value.into()))]);
        let networks = [("one", value("1")), ("two", value("2"))].map(|(name, state)| (name.into(), state)).into();
        let desired = DesiredState { shared: state(&["a", "c"]), networks };
        let all = state(&["a", "b", "c"]);
        assert!(Entries::iter(&desired).eq(Entries::iter(&all)));
        assert!(all.iter().all(|(key, value)| desired.get(key) == Some(value)));
    }

    #[test]
    fn union_is_sorted_and_complete() {
        let networks = [(NetworkName::default(), state(&["a", "d", "e"]))].into();
        let desired = DesiredState { shared: state(&["b", "c", "f"]), networks };
        let all = state(&["a", "b", "c", "d", "e", "f"]);
        assert!(Entries::iter(&desired).eq(Entries::iter(&all)));
        assert!(all.iter().all(|(key, value)| desired.get(key) == Some(value)));
        assert!(!desired.contains_key(&Key::Sysctl("g".into())));
    }
}
