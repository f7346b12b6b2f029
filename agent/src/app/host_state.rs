//! The persistent state of networks and reconcilers: `state.json` of the state directory, and of each named network's.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::{Device, Mac, NetworkName, NetworkRecord, PerFamily, Subnet};
use crate::network::NetworkStateStore;
use crate::plan::isolation::Transit;
use crate::reconcile::SysctlStore;
use crate::state::{HostState, StateDir, StateError};

/// The state directories of this host's named networks.
#[derive(Debug)]
pub struct NetworkStates {
    root: Arc<StateDir>,
    transits: Transits,
}

impl NetworkStates {
    /// Loads the states of the networks that this host was in. All are loaded before any network gets a new transit.
    pub fn load(root: Arc<StateDir>) -> Result<(NetworkStates, BTreeMap<NetworkName, HostStateStore>), StateError> {
        let networks = root.networks()?;
        let states = NetworkStates { root, transits: Transits::default() };
        let loaded = networks.into_iter().map(|name| Ok((name.clone(), states.open(&name)?)));
        let loaded = loaded.collect::<Result<_, StateError>>()?;
        Ok((states, loaded))
    }

    /// Reads the state of a network, or creates its directory.
    pub fn open(&self, name: &NetworkName) -> Result<HostStateStore, StateError> {
        let state_dir = Arc::new(self.root.network(name)?);
        let host = state_dir.load_host()?;
        if let Some(stored) = host.transit {
            // It gets another number if a copied file has that of another network.
            self.transits.take(name, Transit::new(stored));
        }
        let named = Some((name.clone(), self.transits.clone()));
        Ok(HostStateStore { state_dir, host: Arc::new(Mutex::new(host)), named })
    }

    /// Removes the state of a network that this host leaves.
    pub fn remove(&self, name: &NetworkName) -> Result<(), StateError> {
        self.root.network(name)?.remove()?;
        self.transits.release(name);
        Ok(())
    }
}

/// The transits in use on this host. Clones share them.
#[derive(Debug, Clone, Default)]
struct Transits(Arc<Mutex<BTreeMap<Transit, NetworkName>>>);

impl Transits {
    /// The network's transit: the one that it has, else the wanted one if it is free, else the lowest free one.
    fn take(&self, name: &NetworkName, wanted: Option<Transit>) -> Option<Transit> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((own, _)) = taken.iter().find(|(_, holder)| *holder == name) {
            return Some(*own);
        }
        let all = (0..Transit::COUNT).filter_map(Transit::new);
        let free = wanted.into_iter().chain(all).find(|transit| !taken.contains_key(transit))?;
        taken.insert(free, name.clone());
        Some(free)
    }

    fn release(&self, name: &NetworkName) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, holder| holder != name);
    }
}

/// A network's state on this host and its file. A failed write is logged and retried at the next change; meanwhile the state in
/// memory is used.
#[derive(Debug, Clone)]
pub struct HostStateStore {
    state_dir: Arc<StateDir>,
    host: Arc<Mutex<HostState>>,
    /// The name, and the transits on this host; `None` for the default network.
    named: Option<(NetworkName, Transits)>,
}

impl HostStateStore {
    /// The state of the host and of its default network.
    pub(super) fn load(state: Arc<StateDir>) -> Result<HostStateStore, StateError> {
        let host = state.load_host()?;
        Ok(HostStateStore { state_dir: state, host: Arc::new(Mutex::new(host)), named: None })
    }

    /// Its directory.
    pub(super) fn directory(&self) -> Arc<StateDir> {
        Arc::clone(&self.state_dir)
    }

    /// Whether the network runs as an isolated one, and its last record: what is known without the store.
    pub fn last_record(&self) -> Option<(bool, NetworkRecord)> {
        let host = self.lock();
        let record = NetworkRecord::parse(host.record.as_deref()?).ok()?;
        Some((host.isolated.unwrap_or(record.isolated), record))
    }

    /// Saves the kind that the network is started as.
    pub fn record_kind(&self, isolated: bool) {
        let mut host = self.lock();
        if host.isolated != Some(isolated) {
            host.isolated = Some(isolated);
            self.save(&host);
        }
    }

    /// Saves the leased subnet and the published addresses.
    pub fn record_held_subnet(&self, subnet: Subnet, public_ip: PerFamily<IpAddr>) {
        let mut host = self.lock();
        if host.subnet != Some(subnet) || host.public_ip != public_ip {
            host.subnet = Some(subnet);
            host.public_ip = public_ip;
            self.save(&host);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HostState> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self, host: &HostState) {
        if let Err(error) = self.state_dir.save_host(host) {
            tracing::error!(%error, "cannot save the host's state; a restart may change its MAC or subnet");
        }
    }
}

impl NetworkStateStore for HostStateStore {
    fn device_mac(&mut self, device: Device, found: Option<Mac>) -> Mac {
        let mut host = self.lock();
        let (mac, new) = host.device_mac(device, found);
        if new {
            self.save(&host);
        }
        mac
    }

    fn preferred_subnet(&self) -> Option<Subnet> {
        self.lock().subnet
    }

    fn published_addresses(&self) -> PerFamily<IpAddr> {
        self.lock().public_ip
    }

    fn transit(&mut self) -> Option<Transit> {
        let (name, transits) = self.named.as_ref()?;
        let mut host = self.lock();
        let transit = transits.take(name, host.transit.and_then(Transit::new));
        let number = transit.map(Transit::number);
        if host.transit != number {
            host.transit = number;
            self.save(&host);
        }
        transit
    }

    fn save_record(&mut self, record: &NetworkRecord) {
        let mut host = self.lock();
        if self.named.is_some() && host.record.as_deref() != Some(&*record.text) {
            host.record = Some(record.text.to_string());
            self.save(&host);
        }
    }
}

impl SysctlStore for HostStateStore {
    fn save_sysctl(&mut self, path: &str, value: &str) {
        let mut host = self.lock();
        if !host.sysctls.contains_key(path) {
            host.sysctls.insert(path.to_owned(), value.to_owned());
            self.save(&host);
        }
    }

    fn saved_sysctl(&self, path: &str) -> Option<String> {
        self.lock().sysctls.get(path).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(path: &std::path::Path) -> (NetworkStates, BTreeMap<NetworkName, HostStateStore>) {
        NetworkStates::load(Arc::new(StateDir::open(path).expect("a state directory"))).expect("states")
    }

    #[test]
    fn transit_is_the_lowest_free_one_and_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let [blue, green, red] = ["blue", "green", "red"].map(NetworkName::from);
        let number = |store: &mut HostStateStore| store.transit().expect("a transit").number();
        {
            let (states, loaded) = states(dir.path());
            assert!(loaded.is_empty());
            let mut stores = [&blue, &green].map(|name| states.open(name).expect("a state"));
            assert_eq!(stores.each_mut().map(number), [0, 1]);
            assert_eq!(number(&mut states.open(&blue).expect("a restart")), 0, "a restarted network keeps its number");
            states.remove(&blue).expect("left");
        }
        let (states, mut loaded) = states(dir.path());
        assert_eq!(loaded.keys().collect::<Vec<_>>(), [&green]);
        assert_eq!(number(&mut states.open(&red).expect("a state")), 0);
        assert_eq!(loaded.get_mut(&green).map(number), Some(1));
        assert_eq!(number(&mut states.open(&blue).expect("a state")), 2);
    }

    /// A directory that was copied by hand.
    #[test]
    fn two_networks_never_have_one_transit() {
        let dir = tempfile::tempdir().expect("a directory");
        {
            let (states, _) = states(dir.path());
            for name in ["blue", "green"] {
                states.open(&name.into()).expect("a state").transit().expect("a transit");
            }
        }
        let file = |name: &str| dir.path().join("networks").join(name).join("state.json");
        std::fs::copy(file("blue"), file("green")).expect("copied");
        let (_states, mut loaded) = states(dir.path());
        let numbers: Vec<u16> = loaded.values_mut().map(|store| store.transit().expect("a transit").number()).collect();
        assert_eq!(numbers, [0, 1]);
    }

    #[test]
    fn kind_and_record_are_known_without_the_store() {
        let dir = tempfile::tempdir().expect("a directory");
        let text = r#"{"Network":"10.1.0.0/16","Isolated":false,"Backend":{"VNI":7}}"#;
        let record = NetworkRecord::parse(text).expect("a record");
        {
            let mut store = states(dir.path()).0.open(&"blue".into()).expect("a state");
            assert_eq!(store.last_record(), None);
            store.record_kind(true);
            store.save_record(&record);
        }
        let (_states, loaded) = states(dir.path());
        // It became routed while containers were attached: its namespace is still there.
        assert_eq!(loaded.get(&"blue".into()).and_then(HostStateStore::last_record), Some((true, record)));
    }

    #[test]
    fn default_network_has_no_new_fields() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut store = HostStateStore::load(Arc::new(StateDir::open(dir.path()).expect("a state directory"))).expect("a state");
        store.save_record(&NetworkRecord::parse(r#"{"Network":"10.1.0.0/16"}"#).expect("a record"));
        assert_eq!(store.transit(), None);
        store.device_mac(Device::bridge(crate::model::Vni::DEFAULT), None);
        let text = std::fs::read_to_string(dir.path().join("state.json")).expect("a file");
        assert!(["record", "isolated", "transit"].iter().all(|field| !text.contains(field)), "{text}");
    }
}
