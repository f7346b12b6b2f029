//! A made-up kernel: shared by the agents that follow one another on a host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::sync::Semaphore;

use crate::model::{PerFamily, Publish};
use crate::plan::{ContainerPath, Guard, HostPorts, HostSocket, OpError, Plug};

#[derive(Debug, Clone)]
pub(super) struct FakeKernel(Arc<Mutex<World>>);

#[derive(Debug, Default)]
struct World {
    alive: BTreeSet<String>,
    plugs: BTreeMap<String, Plug>,
    changes: usize,
    refused_plugs: usize,
    allowed_unplugs: Option<usize>,
    panics: bool,
    hang: Option<(Point, Arc<Semaphore>)>,
    reached: bool,
    generation: usize,
    loopbacks: BTreeSet<PathBuf>,
    sockets: Vec<HostSocket>,
    guard: Guard,
}

/// Where the kernel is slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    BeforePlug,
    AfterPlug,
    BeforeUnplug,
    AfterUnplug,
}

fn refused(text: &str) -> OpError {
    OpError { errno: libc::EBUSY, message: text.to_owned() }
}

impl FakeKernel {
    pub(super) fn new(namespaces: &[&str]) -> FakeKernel {
        let alive = namespaces.iter().map(|s| (*s).to_owned()).collect();
        FakeKernel(Arc::new(Mutex::new(World { alive, ..World::default() })))
    }

    fn world<T>(&self, f: impl FnOnce(&mut World) -> T) -> T {
        f(&mut super::lock(&self.0))
    }

    pub(super) fn plugs(&self) -> BTreeMap<String, Plug> {
        self.world(|w| w.plugs.clone())
    }

    pub(super) fn changes(&self) -> usize {
        self.world(|w| w.changes)
    }

    pub(super) fn remove(&self, host_interface: &str) {
        self.world(|w| w.plugs.remove(host_interface)).expect("a plug");
    }

    pub(super) fn kill(&self, netns: &str) {
        self.world(|w| w.alive.remove(netns));
    }

    pub(super) fn revive(&self, netns: &str) {
        self.world(|w| w.alive.insert(netns.to_owned()));
    }

    /// Puts another namespace behind each path.
    pub(super) fn replace_namespaces(&self) {
        self.world(|w| w.generation += 1);
    }

    pub(super) fn loopbacks(&self) -> usize {
        self.world(|w| w.loopbacks.len())
    }

    /// A socket of the host that a published port meets.
    pub(super) fn listen(&self, wanted: &str, holder: &str) {
        let wanted: Publish = wanted.parse().expect(wanted);
        let address = IpAddr::from([0, 0, 0, 0]);
        let socket = HostSocket { wanted, address, port: wanted.host_port, holder: holder.to_owned() };
        self.world(|w| w.sockets.push(socket));
    }

    /// From now on the guard is told of what is plugged.
    pub(super) fn tell_guard(&self) {
        self.world(|w| w.guard = Guard::Told);
    }

    pub(super) fn refuse_plugs(&self, count: usize) {
        self.world(|w| w.refused_plugs = count);
    }

    pub(super) fn refuse_unplugs_after(&self, allowed: usize) {
        self.world(|w| w.allowed_unplugs = Some(allowed));
    }

    pub(super) fn refuse_nothing(&self) {
        self.world(|w| (w.refused_plugs, w.allowed_unplugs) = (0, None));
    }

    pub(super) fn panic_at_next_plug(&self) {
        self.world(|w| w.panics = true);
    }

    pub(super) fn hang_before_plug(&self) -> Arc<Semaphore> {
        self.hang_at(Point::BeforePlug)
    }

    /// Whoever comes to this point waits for a permit.
    pub(super) fn hang_at(&self, point: Point) -> Arc<Semaphore> {
        let gate = Arc::new(Semaphore::new(0));
        self.world(|w| (w.hang, w.reached) = (Some((point, Arc::clone(&gate))), false));
        gate
    }

    /// Whether somebody waits at that point.
    pub(super) fn reached(&self) -> bool {
        self.world(|w| w.reached)
    }

    pub(super) fn hang_nowhere(&self) {
        self.world(|w| w.hang = None);
    }

    async fn point(&self, point: Point) {
        let gate = self.world(|w| w.hang.as_ref().filter(|(p, _)| *p == point).map(|(_, gate)| Arc::clone(gate)));
        if let Some(gate) = gate {
            self.world(|w| w.reached = true);
            gate.acquire().await.expect("a gate").forget();
        }
    }
}

impl ContainerPath for FakeKernel {
    async fn plug(&self, plug: &Plug) -> Result<Guard, OpError> {
        self.point(Point::BeforePlug).await;
        assert!(!self.world(|w| std::mem::take(&mut w.panics)), "a defect");
        // Lets others run in between, as the kernel's work does.
        tokio::task::yield_now().await;
        let guard = self.world(|w| {
            if w.refused_plugs > 0 {
                w.refused_plugs -= 1;
                return Err(refused("no plug today"));
            }
            match w.plugs.get(&plug.host_interface) {
                Some(there) if there == plug => return Ok(w.guard),
                Some(_) => return Err(refused("another plug of that name is there")),
                None => {}
            }
            let taken = w.plugs.values().any(|p| {
                p.mac == plug.mac
                    || (p.netns == plug.netns && p.interface == plug.interface)
                    || p.addresses.iter().any(|a| plug.addresses.contains(a))
            });
            assert!(!taken, "{plug:?} collides");
            w.plugs.insert(plug.host_interface.clone(), plug.clone());
            w.changes += 1;
            Ok(w.guard)
        })?;
        self.point(Point::AfterPlug).await;
        Ok(guard)
    }

    fn difference(&self, plug: &Plug) -> Result<Option<String>, OpError> {
        let there = self.plugs().get(&plug.host_interface) == Some(plug);
        Ok((!there).then(|| format!("{} is not there", plug.host_interface)))
    }

    async fn unplug(&self, host_interface: &str) -> Result<(), OpError> {
        self.point(Point::BeforeUnplug).await;
        self.world(|w| {
            match &mut w.allowed_unplugs {
                Some(0) => return Err(refused("no unplug today")),
                Some(left) => *left -= 1,
                None => {}
            }
            w.changes += usize::from(w.plugs.remove(host_interface).is_some());
            Ok(())
        })?;
        self.point(Point::AfterUnplug).await;
        Ok(())
    }

    fn forget(&self, _: &PerFamily<IpAddr>) {}

    fn netns_alive(&self, netns: &Path) -> bool {
        self.world(|w| w.alive.contains(&*netns.to_string_lossy()))
    }

    fn netns_id(&self, netns: &Path) -> Option<String> {
        let generation = self.world(|w| w.generation);
        self.netns_alive(netns).then(|| format!("{}-{generation}", netns.display()))
    }

    fn is_own_netns(&self, netns: &Path) -> bool {
        netns == Path::new("/proc/1/ns/net")
    }

    fn own_netns(&self) -> PathBuf {
        "/proc/1/ns/net".into()
    }

    async fn loopback(&self, netns: &Path) -> Result<(), OpError> {
        self.point(Point::BeforePlug).await;
        self.world(|w| {
            w.changes += usize::from(w.loopbacks.insert(netns.to_owned()));
            Ok(())
        })
    }

    fn host_ports(&self, wanted: &[Publish]) -> Result<HostPorts, OpError> {
        let sockets = self.world(|w| w.sockets.clone());
        let sockets = sockets.into_iter().filter(|socket| wanted.contains(&socket.wanted)).collect();
        Ok(HostPorts {
            addresses: ["192.0.2.7", "2001:db8::7"].iter().map(|a| a.parse().expect("an address")).collect(),
            sockets,
        })
    }

    fn ports(&self) -> Result<Vec<String>, OpError> {
        Ok(self.plugs().into_keys().collect())
    }
}
