//! Network namespaces for tests, removed even if a test fails, and a host in one of them.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::kernel::netns::Netns;
use crate::kernel::netns_builder::NetnsBuilder;
use crate::kernel::{Kernel, KernelOptions, Monitor};
use crate::model::{Cidr, Device, Family, Mac, Vni};
use crate::plan::state::{LinkKind, NEXTHOP_IDS, RouteTarget, Vxlan};
use crate::plan::{Batch, DataPath, KernelEvent, Key, LinkState, Op, State, Value};

/// A named namespace that is deleted when it goes out of scope.
#[derive(Debug)]
pub struct TestNetns {
    name: String,
    pub netns: Netns,
}

impl TestNetns {
    pub fn new(what: &str) -> TestNetns {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!("ovt-{what}-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let netns = Netns::create(&name).unwrap_or_else(|e| panic!("these tests create network namespaces: {e}"));
        TestNetns { name, netns }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a test inside, on a runtime of one thread.
    pub fn block_on<T: Send>(&self, test: impl AsyncFnOnce() -> T + Send) -> T {
        let run = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(test());
        self.netns.run(run).expect("a thread inside")
    }
}

impl Drop for TestNetns {
    fn drop(&mut self) {
        if let Err(error) = Netns::delete(&self.name) {
            eprintln!("cannot delete network namespace: {error}");
        }
    }
}

/// Runs a command in the namespace of the calling thread and returns its output.
pub fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let program = words.next().expect("a command");
    let output = std::process::Command::new(program).args(words).output();
    let output = output.unwrap_or_else(|e| panic!("cannot run `{command}`, is iproute2 installed: {e}"));
    assert!(output.status.success(), "`{command}`: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A host with an external interface `eth0` (10.99.0.1, fd99::1, default routes) and a data path.
pub struct Host {
    pub kernel: Kernel,
    pub events: mpsc::Receiver<KernelEvent>,
    monitor: JoinHandle<()>,
    pub underlay: u32,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.monitor.abort();
    }
}

/// Runs a test on a host in a namespace of its own.
pub fn on_host(what: &str, options: KernelOptions, test: impl AsyncFnOnce(&mut Host) + Send) {
    on_host_with_monitor(what, options, |_| (), test);
}

/// Like [`on_host`], but `configure` changes the monitor before it runs.
pub fn on_host_with_monitor(
    what: &str,
    options: KernelOptions,
    configure: impl FnOnce(&Monitor) + Send,
    test: impl AsyncFnOnce(&mut Host) + Send,
) {
    let scratch = TestNetns::new(what);
    on_host_in(scratch.netns.clone(), scratch, options, configure, test);
}

/// Like [`on_host`], but the test and the data path's tasks run in another namespace.
pub fn on_host_from_outside(what: &str, test: impl AsyncFnOnce(&mut Host, &Netns) + Send) {
    let inside = TestNetns::new(what);
    let netns = inside.netns.clone();
    on_host_in(
        inside.netns.clone(),
        TestNetns::new(what),
        KernelOptions::default(),
        |_| (),
        async |host| {
            test(host, &netns).await;
        },
    );
}

fn on_host_in(
    netns: Netns,
    thread: TestNetns,
    options: KernelOptions,
    configure: impl FnOnce(&Monitor) + Send,
    test: impl AsyncFnOnce(&mut Host) + Send,
) {
    thread.block_on(async move || {
        let setup = NetnsBuilder::open(&netns).expect("a socket");
        setup.add_veth("eth0", "far", &netns).expect("a pair");
        for address in ["10.99.0.1/24", "fd99::1/64"] {
            setup.add_address("eth0", address.parse().expect("address")).expect("an address");
        }
        setup.set_up("far").expect("up");
        setup.set_up("eth0").expect("up");
        for gateway in ["10.99.0.254", "fd99::fe"] {
            setup.add_route(None, Some(gateway.parse().expect("address")), Some("eth0")).expect("a route");
        }
        let underlay = setup.link_index("eth0").expect("eth0");
        let mut host = Host::open(&netns, &options, configure, underlay).await;
        test(&mut host).await;
        assert!(!host.monitor.is_finished(), "the monitor still runs");
    });
}

impl Host {
    /// Opens the data path of a namespace.
    pub async fn open(netns: &Netns, options: &KernelOptions, configure: impl FnOnce(&Monitor), underlay: u32) -> Host {
        let (kernel, events, monitor) = Kernel::open(netns, options).expect("the kernel");
        configure(&monitor);
        let monitor = tokio::spawn(async { monitor.run().await.expect("the monitor") });
        let mut host = Host { kernel, events, monitor, underlay };
        host.drain_events().await;
        host
    }

    /// Applies a batch that has to succeed.
    pub async fn apply(&mut self, batch: &Batch) {
        let report = self.kernel.apply(batch).await;
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        // The agent's monitor runs on another thread; here it needs a yield.
        tokio::task::yield_now().await;
    }

    pub async fn dump(&mut self) -> State {
        let mut state = self.kernel.dump().await.expect("a dump").peers;
        let local = self.kernel.local();
        state.extend(local.entries.clone().into_iter().chain(local.rules.clone()));
        state
    }

    /// Creates all devices with their addresses.
    pub async fn create_devices(&mut self) {
        let batch = devices(self.underlay);
        self.apply(&batch).await;
    }

    /// The next event, within two seconds.
    pub async fn next_event(&mut self) -> KernelEvent {
        let next = tokio::time::timeout(Duration::from_secs(2), self.events.recv()).await;
        next.expect("an event within two seconds").expect("the monitor runs")
    }

    /// Waits for the next change of the key and returns its new value.
    pub async fn wait_for_change(&mut self, key: &Key) -> Option<Value> {
        for _ in 0..50 {
            if let KernelEvent::Changed(changes) = self.next_event().await
                && let Some((_, value)) = changes.into_iter().find(|(k, _)| k == key)
            {
                return value;
            }
        }
        panic!("50 events without {key}");
    }

    /// Waits for a `ResyncNeeded` event whose reason contains the text.
    pub async fn wait_for_resync(&mut self, text: &str) {
        for _ in 0..50 {
            if let KernelEvent::ResyncNeeded { reason } = self.next_event().await
                && reason.contains(text)
            {
                return;
            }
        }
        panic!("50 events without ResyncNeeded ({text})");
    }

    /// Asserts that no event arrives for 150 ms.
    pub async fn expect_no_events(&mut self) {
        let next = tokio::time::timeout(Duration::from_millis(150), self.events.recv()).await;
        assert!(next.is_err(), "unexpected: {next:?}");
    }

    /// Discards events until none arrives for 100 ms.
    pub async fn drain_events(&mut self) {
        while tokio::time::timeout(Duration::from_millis(100), self.events.recv()).await.is_ok() {}
    }
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

/// The VXLAN device of a family.
pub fn vxlan(family: Family) -> Device {
    Device::vxlan(family, Vni::DEFAULT)
}

pub fn bridge() -> Device {
    Device::bridge(Vni::DEFAULT)
}

/// A VXLAN device's wanted state.
pub fn vxlan_link(family: Family, underlay: u32) -> LinkState {
    let (local, mtu, last) = match family {
        Family::V4 => ("10.99.0.1", 1450, 4),
        Family::V6 => ("fd99::1", 1430, 6),
    };
    let vxlan = Vxlan { vni: Vni::DEFAULT, port: 8472, local: ip(local), underlay, learning: false, tx_checksum: true };
    LinkState { kind: LinkKind::Vxlan(vxlan), mac: Some(Mac([2, 0, 0, 0, 1, last])), mtu, up: true, master: None, hairpin: false }
}

pub fn bridge_link() -> LinkState {
    LinkState { kind: LinkKind::Bridge, mac: Some(Mac([2, 0, 0, 0, 1, 9])), mtu: 1430, up: true, master: None, hairpin: false }
}

/// The link that a value holds.
pub fn link_of(value: Option<&Value>) -> LinkState {
    match value {
        Some(Value::Link(link)) => (**link).clone(),
        other => panic!("no link: {other:?}"),
    }
}

pub fn set_link(device: Device, state: LinkState) -> Op {
    Op::Set(Key::Link(device.name().into()), Value::Link(Box::new(state)))
}

/// All devices and their addresses.
pub fn devices(underlay: u32) -> Batch {
    let mut batch = vec![set_link(bridge(), bridge_link())];
    batch.extend(Family::ALL.map(|family| set_link(vxlan(family), vxlan_link(family, underlay))));
    for (device, address) in [
        (bridge(), "10.244.0.1/24"),
        (bridge(), "fd00:244::1/64"),
        (vxlan(Family::V4), "10.244.0.0/32"),
        (vxlan(Family::V6), "fd00:244::/128"),
    ] {
        batch.push(Op::Set(Key::Address(device, address.parse().expect("address")), Value::Address));
    }
    batch
}

/// The entries of the peers with these numbers, grouped by kind.
pub fn peers(family: Family, numbers: std::ops::Range<u32>, nexthops: bool) -> Batch {
    let device = vxlan(family);
    let mut kinds: [Batch; 4] = Default::default();
    for n in numbers {
        let [_, a, b, c] = (n + 1).to_be_bytes();
        let (subnet, length, public) = match family {
            Family::V4 => (IpAddr::from([10, 128 + a, b, c]), 32, IpAddr::from([10, 99, b, c])),
            Family::V6 => {
                let [high, low] = [u16::from_be_bytes([0, a]), u16::from_be_bytes([b, c])];
                (IpAddr::from([0xfd00, 0x245, high, low, 0, 0, 0, 0]), 64, IpAddr::from([0xfd99, 0, 0, 0, 0, 0, high, low]))
            }
        };
        // IPv4 subnets are single addresses here, so that one more byte numbers the peers.
        let mac = Mac([2, 1, 0, a, b, c]);
        let id = NEXTHOP_IDS.start + n * 2 + u32::from(family == Family::V6);
        kinds[0].push(Op::Set(Key::Fdb(device, mac), Value::Fdb(public)));
        kinds[1].push(Op::Set(Key::Neigh(device, subnet), Value::Neigh(mac)));
        let via = if nexthops {
            kinds[2].push(Op::Set(Key::Nexthop(id), Value::Nexthop { device, gateway: subnet }));
            RouteTarget::Nexthop(id)
        } else {
            RouteTarget::Gateway(device, subnet)
        };
        let route = Key::Route(Cidr::containing(subnet, length).expect("a cidr"));
        kinds[3].push(Op::Set(route, Value::Route(via)));
    }
    kinds.concat()
}

/// The state that a batch of `Set` ops creates.
pub fn state_of(batch: &Batch) -> State {
    let entry = |op: &Op| match op {
        Op::Set(key, value) => (key.clone(), value.clone()),
        Op::Delete(..) => panic!("only Set"),
    };
    batch.iter().map(entry).collect()
}

/// The ops that remove all entries of a batch, in reverse.
pub fn deletions(batch: &Batch) -> Batch {
    state_of(batch).into_iter().rev().map(|(key, value)| Op::Delete(key, value)).collect()
}
