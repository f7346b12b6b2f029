//! The reconciler's persistent state, in `state.json` of the state directory.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::{Device, Mac, PerFamily, Subnet};
use crate::network::NetworkStateStore;
use crate::reconcile::SysctlStore;
use crate::state::{HostState, StateDir, StateError};

/// The host's state and its file. A failed write is logged and retried at the next change; meanwhile the state in memory is used.
#[derive(Debug, Clone)]
pub(super) struct HostStateStore {
    state_dir: Arc<StateDir>,
    host: Arc<Mutex<HostState>>,
}

impl HostStateStore {
    pub(super) fn load(state: Arc<StateDir>) -> Result<HostStateStore, StateError> {
        let host = state.load_host()?;
        Ok(HostStateStore { state_dir: state, host: Arc::new(Mutex::new(host)) })
    }

    /// Saves the leased subnet and the published addresses.
    pub(super) fn record_held_subnet(&self, subnet: Subnet, public_ip: PerFamily<IpAddr>) {
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
