//! A fake kernel, which is a map of entries; a state store that forgets everything; and a clock.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::model::{Device, Family, Mac, NetworkRecord, PerFamily, Role, Subnet};
use crate::network::NetworkStateStore;
use crate::plan::actual::LocalState;
use crate::plan::isolation::Transit;
use crate::plan::underlay::{DefaultRoute, ForeignLink, HostAddress, HostInventory, Ipv6Settings};
use crate::plan::{ApplyReport, Batch, DataPath, Dump, KernelEvent, Key, Op, OpError, State};
use crate::reconcile::SysctlStore;

/// State of the fake kernel: its entries, the keys whose ops fail, and every applied op.
#[derive(Debug)]
pub struct FakeState {
    pub state: State,
    pub failing_keys: BTreeSet<Key>,
    pub applied_ops: Vec<Op>,
    pub dump_count: usize,
    /// An entry that another process deletes before the next dump, and where to send the event.
    pub deleted_before_dump: Option<(Key, mpsc::Sender<KernelEvent>)>,
    /// Whether `apply` never returns.
    pub stuck: bool,
    /// Whether the next `apply` panics.
    pub panics: bool,
    /// The addresses of the external interface.
    pub addresses: Vec<HostAddress>,
}

impl Default for FakeState {
    fn default() -> FakeState {
        FakeState {
            state: State::new(),
            failing_keys: BTreeSet::new(),
            applied_ops: Vec::new(),
            dump_count: 0,
            deleted_before_dump: None,
            stuck: false,
            panics: false,
            addresses: vec![address("192.0.2.100", 24)],
        }
    }
}

/// An address of the external interface.
pub fn address(text: &str, length: u8) -> HostAddress {
    HostAddress { address: text.parse().unwrap(), length, secondary: false, flaw: None }
}

thread_local! {
    /// How far the tested tasks' clock is ahead. They run on the test's thread.
    static AHEAD: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// The clock of the tested tasks.
pub fn clock() -> Instant {
    Instant::now() + AHEAD.get()
}

/// Lets time pass for the tested tasks. They notice it when they get a message.
pub fn advance_clock(by: Duration) {
    AHEAD.set(AHEAD.get() + by);
}

#[derive(Debug, Clone, Default)]
pub struct FakeKernel(Arc<Mutex<FakeState>>);

impl FakeKernel {
    /// Locks the kernel's state, to read it or to change it as another process would.
    pub fn lock(&self) -> std::sync::MutexGuard<'_, FakeState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DataPath for FakeKernel {
    async fn dump(&mut self) -> Result<Dump, OpError> {
        let deleted = self.lock().deleted_before_dump.take();
        if let Some((key, events)) = deleted {
            self.lock().state.remove(&key);
            events.try_send(KernelEvent::Changed(vec![(key, None)])).expect("room for an event");
        }
        let local_before = self.local().clone();
        let mut kernel = self.lock();
        kernel.dump_count += 1;
        let peers = kernel.state.clone().into_iter().filter(|(key, _)| key.is_peer_entry());
        Ok(Dump { peers: peers.collect(), local_before })
    }

    /// Always up to date, as with a monitor that reads each event at once.
    fn local(&self) -> impl Deref<Target = LocalState> {
        let mut local = Box::<LocalState>::default();
        for (key, value) in self.lock().state.iter().filter(|(key, _)| !key.is_peer_entry()) {
            local.set(key.clone(), Some(value.clone()));
        }
        local
    }

    async fn apply(&mut self, batch: &Batch) -> ApplyReport {
        let stuck = self.lock().stuck;
        if stuck {
            std::future::pending::<()>().await;
        }
        let mut kernel = self.lock();
        assert!(!std::mem::take(&mut kernel.panics), "a defect of the data path");
        let mut report = ApplyReport::default();
        for (index, op) in batch.iter().enumerate() {
            if kernel.failing_keys.contains(op.key()) {
                report.failed.push((index, OpError { errno: 12, message: "cannot allocate memory".to_owned() }));
            } else {
                op.apply_to(&mut kernel.state);
                kernel.applied_ops.push(op.clone());
            }
        }
        report
    }

    async fn watch_sysctls(&mut self, _: Vec<String>) -> Result<(), OpError> {
        Ok(())
    }

    async fn inventory(&mut self) -> Result<HostInventory, OpError> {
        let addresses = self.lock().addresses.clone();
        let disabled = !addresses.iter().any(|host| host.address.is_ipv6());
        Ok(HostInventory {
            links: vec![ForeignLink {
                index: 2,
                name: "eth0".to_owned(),
                mtu: 1500,
                up: true,
                loopback: false,
                kind: String::new(),
                is_port: false,
                ipv6: Some(Ipv6Settings { forwarding: false, accept_ra: 1, disabled }),
                addresses,
            }],
            default_routes: vec![DefaultRoute {
                family: Family::V4,
                interface: 2,
                source: None,
                gateway: None,
                from_router_advertisement: false,
            }],
            ..HostInventory::default()
        })
    }

    async fn route_to(&mut self, _: IpAddr) -> Result<Option<u32>, OpError> {
        Ok(None)
    }
}

/// A state store without a file.
#[derive(Debug, Clone, Default)]
pub struct FakeStateStore {
    /// Whether the next call of the network panics.
    pub panics: Arc<AtomicBool>,
    /// The MACs that were found on devices.
    pub found_macs: Arc<Mutex<BTreeMap<Device, Option<Mac>>>>,
    /// The saved record.
    pub record: Arc<Mutex<Option<NetworkRecord>>>,
}

impl NetworkStateStore for FakeStateStore {
    fn device_mac(&mut self, device: Device, found: Option<Mac>) -> Mac {
        assert!(!self.panics.swap(false, Ordering::Relaxed), "a defect of the network");
        self.found_macs.lock().unwrap().insert(device, found);
        Mac([2, 0, 0, 0, 0, if device.role == Role::Bridge { 0xb0 } else { 0x64 }])
    }
    fn preferred_subnet(&self) -> Option<Subnet> {
        None
    }
    fn published_addresses(&self) -> PerFamily<IpAddr> {
        PerFamily::default()
    }
    fn transit(&mut self) -> Option<Transit> {
        Transit::new(5)
    }
    fn save_record(&mut self, record: &NetworkRecord) {
        *self.record.lock().unwrap() = Some(record.clone());
    }
}

impl SysctlStore for FakeStateStore {
    fn save_sysctl(&mut self, _: &str, _: &str) {}
    fn saved_sysctl(&self, _: &str) -> Option<String> {
        None
    }
}
