//! A fake kernel, shared by successive agents of a host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::model::{PerFamily, PublishedPort};
use crate::plan::{HostPorts, HostSocket, OpError, PortDriver, PortSpec, SourceFilter};

#[derive(Debug, Clone)]
pub(super) struct FakeKernel(Arc<Mutex<FakeState>>);

#[derive(Debug, Default)]
struct FakeState {
    netns_paths: BTreeSet<String>,
    ports: BTreeMap<String, PortSpec>,
    change_count: usize,
    failing_attaches: usize,
    allowed_detaches: Option<usize>,
    panic_on_attach: bool,
    block: Option<(BlockPoint, Arc<Semaphore>)>,
    is_blocked: bool,
    generation: usize,
    loopbacks: BTreeSet<PathBuf>,
    sockets: Vec<HostSocket>,
    source_filter: SourceFilter,
}

/// Point at which the fake kernel blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockPoint {
    BeforeAttach,
    AfterAttach,
    BeforeDetach,
    AfterDetach,
}

fn kernel_error(text: &str) -> OpError {
    OpError { errno: libc::EBUSY, message: text.to_owned() }
}

impl FakeKernel {
    pub(super) fn new(namespaces: &[&str]) -> FakeKernel {
        let netns_paths = namespaces.iter().map(|s| (*s).to_owned()).collect();
        FakeKernel(Arc::new(Mutex::new(FakeState { netns_paths, ..FakeState::default() })))
    }

    fn with_state<T>(&self, f: impl FnOnce(&mut FakeState) -> T) -> T {
        f(&mut super::lock(&self.0))
    }

    pub(super) fn port_specs(&self) -> BTreeMap<String, PortSpec> {
        self.with_state(|w| w.ports.clone())
    }

    pub(super) fn change_count(&self) -> usize {
        self.with_state(|w| w.change_count)
    }

    pub(super) fn remove(&self, host_interface: &str) {
        self.with_state(|w| w.ports.remove(host_interface)).expect("a port");
    }

    pub(super) fn remove_netns(&self, netns: &str) {
        self.with_state(|w| w.netns_paths.remove(netns));
    }

    pub(super) fn restore_netns(&self, netns: &str) {
        self.with_state(|w| w.netns_paths.insert(netns.to_owned()));
    }

    /// Replaces the namespace at each path.
    pub(super) fn replace_namespaces(&self) {
        self.with_state(|w| w.generation += 1);
    }

    pub(super) fn loopbacks(&self) -> usize {
        self.with_state(|w| w.loopbacks.len())
    }

    /// Adds a socket of the host that conflicts with a published port.
    pub(super) fn listen(&self, wanted: &str, holder: &str) {
        let wanted: PublishedPort = wanted.parse().expect(wanted);
        let address = IpAddr::from([0, 0, 0, 0]);
        let socket = HostSocket { wanted, address, port: wanted.host_port, holder: holder.to_owned() };
        self.with_state(|w| w.sockets.push(socket));
    }

    /// From now on `attach_port` applies the source filter.
    pub(super) fn apply_source_filter(&self) {
        self.with_state(|w| w.source_filter = SourceFilter::Applied);
    }

    pub(super) fn fail_attaches(&self, count: usize) {
        self.with_state(|w| w.failing_attaches = count);
    }

    pub(super) fn fail_detaches_after(&self, allowed: usize) {
        self.with_state(|w| w.allowed_detaches = Some(allowed));
    }

    pub(super) fn clear_failures(&self) {
        self.with_state(|w| (w.failing_attaches, w.allowed_detaches) = (0, None));
    }

    pub(super) fn panic_on_next_attach(&self) {
        self.with_state(|w| w.panic_on_attach = true);
    }

    pub(super) fn block_before_attach(&self) -> Arc<Semaphore> {
        self.block_at(BlockPoint::BeforeAttach)
    }

    /// Blocks calls at this point until they get a permit.
    pub(super) fn block_at(&self, point: BlockPoint) -> Arc<Semaphore> {
        let gate = Arc::new(Semaphore::new(0));
        self.with_state(|w| (w.block, w.is_blocked) = (Some((point, Arc::clone(&gate))), false));
        gate
    }

    /// Waits until a call is blocked at that point.
    pub(super) async fn wait_blocked(&self) {
        let blocked = async {
            while !self.with_state(|w| w.is_blocked) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), blocked).await.expect("the block point is reached");
    }

    pub(super) fn unblock(&self) {
        self.with_state(|w| w.block = None);
    }

    async fn wait_at(&self, point: BlockPoint) {
        let gate = self.with_state(|w| w.block.as_ref().filter(|(p, _)| *p == point).map(|(_, gate)| Arc::clone(gate)));
        if let Some(gate) = gate {
            self.with_state(|w| w.is_blocked = true);
            gate.acquire().await.expect("a gate").forget();
        }
    }
}

impl PortDriver for FakeKernel {
    async fn attach_port(&self, spec: &PortSpec) -> Result<SourceFilter, OpError> {
        self.wait_at(BlockPoint::BeforeAttach).await;
        assert!(!self.with_state(|w| std::mem::take(&mut w.panic_on_attach)), "a defect");
        // Lets other tasks run in between, as the kernel's work does.
        tokio::task::yield_now().await;
        let source_filter = self.with_state(|w| {
            if w.failing_attaches > 0 {
                w.failing_attaches -= 1;
                return Err(kernel_error("attach failed"));
            }
            match w.ports.get(&spec.host_interface) {
                Some(existing) if existing == spec => return Ok(w.source_filter),
                Some(_) => return Err(kernel_error("another port of that name exists")),
                None => {}
            }
            let has_collision = w.ports.values().any(|p| {
                p.mac == spec.mac
                    || (p.netns == spec.netns && p.interface == spec.interface)
                    || (p.bridge == spec.bridge && p.addresses.iter().any(|a| spec.addresses.contains(a)))
            });
            assert!(!has_collision, "{spec:?} collides");
            w.ports.insert(spec.host_interface.clone(), spec.clone());
            w.change_count += 1;
            Ok(w.source_filter)
        })?;
        self.wait_at(BlockPoint::AfterAttach).await;
        Ok(source_filter)
    }

    fn check_port(&self, spec: &PortSpec) -> Result<Option<String>, OpError> {
        let exists = self.port_specs().get(&spec.host_interface) == Some(spec);
        Ok((!exists).then(|| format!("{} is not there", spec.host_interface)))
    }

    async fn detach_port(&self, host_interface: &str) -> Result<(), OpError> {
        self.wait_at(BlockPoint::BeforeDetach).await;
        self.with_state(|w| {
            match &mut w.allowed_detaches {
                Some(0) => return Err(kernel_error("detach failed")),
                Some(remaining) => *remaining -= 1,
                None => {}
            }
            w.change_count += usize::from(w.ports.remove(host_interface).is_some());
            Ok(())
        })?;
        self.wait_at(BlockPoint::AfterDetach).await;
        Ok(())
    }

    fn flush_connections(&self, _: &PerFamily<IpAddr>) {}

    fn netns_exists(&self, netns: &Path) -> bool {
        self.with_state(|w| w.netns_paths.contains(&*netns.to_string_lossy()))
    }

    fn netns_id(&self, netns: &Path) -> Option<String> {
        let generation = self.with_state(|w| w.generation);
        self.netns_exists(netns).then(|| format!("{}-{generation}", netns.display()))
    }

    fn is_host_netns(&self, netns: &Path) -> bool {
        netns == Path::new("/proc/1/ns/net")
    }

    fn host_netns(&self) -> PathBuf {
        "/proc/1/ns/net".into()
    }

    async fn set_loopback_up(&self, netns: &Path) -> Result<(), OpError> {
        self.wait_at(BlockPoint::BeforeAttach).await;
        self.with_state(|w| {
            w.change_count += usize::from(w.loopbacks.insert(netns.to_owned()));
            Ok(())
        })
    }

    fn host_ports(&self, wanted: &[PublishedPort]) -> Result<HostPorts, OpError> {
        let sockets = self.with_state(|w| w.sockets.clone());
        let sockets = sockets.into_iter().filter(|socket| wanted.contains(&socket.wanted)).collect();
        Ok(HostPorts {
            addresses: ["192.0.2.7", "2001:db8::7"].iter().map(|a| a.parse().expect("an address")).collect(),
            sockets,
        })
    }
}
