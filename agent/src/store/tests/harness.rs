//! Test harness: a private etcd, and agents' stores connected to it.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Client, GetOptions, PutOptions};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::model::event::{LeaseRequest, OwnLease, StoreEntry, StoreEvent};
use crate::model::{BackendData, Family, Mac, NetworkConfig, Node, PerFamily, Subnet, Vni};
use crate::store::lease::HeldLease;
use crate::store::{Store, StoreConfig, StoreError};

/// Timeout of every wait in a test.
pub(super) const TEST_TIMEOUT: Duration = Duration::from_secs(30);
pub(super) const PREFIX: &str = "/coreos.com/network";
pub(super) const NETWORK: &str = r#"{"Network":"10.244.0.0/16"}"#;
pub(super) const DUAL: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#;

/// Certificate files of a TLS server.
pub(super) struct ServerTls {
    pub(super) ca: PathBuf,
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
}

/// A private etcd; it ends with the test.
pub(super) struct Etcd {
    directory: TempDir,
    ports: [u16; 2],
    /// Its index in the cluster, and the peer ports of all members.
    cluster_member: (usize, Vec<u16>),
    tls: Option<ServerTls>,
    child: Option<Child>,
}

impl Etcd {
    pub(super) async fn start() -> Etcd {
        Etcd::start_with(None).await
    }

    pub(super) async fn start_with(tls: Option<ServerTls>) -> Etcd {
        // Another test may take a port after it was found free. etcd then exits, and other ports are tried.
        for _ in 0..10 {
            let ports = free_ports();
            let tls =
                tls.as_ref().map(|t| ServerTls { ca: t.ca.clone(), certificate: t.certificate.clone(), key: t.key.clone() });
            let mut etcd = Etcd { directory: directory(), ports, cluster_member: (0, vec![ports[1]]), tls, child: None };
            if etcd.run().await {
                return etcd;
            }
        }
        panic!("etcd found no free ports in ten tries");
    }

    /// Starts a server with these networks, which all have the same range.
    pub(super) async fn with_networks(names: &[&str]) -> Etcd {
        let etcd = Etcd::start().await;
        let mut client = etcd.client().await;
        for name in names {
            client.put(key(name, "config"), NETWORK, None).await.unwrap();
        }
        etcd
    }

    /// Starts a cluster of three members.
    pub(super) async fn cluster() -> [Etcd; 3] {
        'tries: for _ in 0..10 {
            let ports = [free_ports(), free_ports(), free_ports()];
            let peers = ports.map(|[_, peer]| peer).to_vec();
            let mut members = [0, 1, 2].map(|n| Etcd {
                directory: directory(),
                ports: ports[n],
                cluster_member: (n, peers.clone()),
                tls: None,
                child: None,
            });
            for member in &mut members {
                if !member.run().await {
                    continue 'tries;
                }
            }
            members[0].client().await;
            return members;
        }
        panic!("etcd found no free ports in ten tries");
    }

    /// Starts etcd on its data directory. Returns whether it listens.
    pub(super) async fn run(&mut self) -> bool {
        let url = |scheme: &str, port: u16| format!("{scheme}://127.0.0.1:{port}");
        let (client, peer) = (self.endpoint(), url("http", self.ports[1]));
        let mut command = Command::new("etcd");
        let members = self.cluster_member.1.iter().enumerate().map(|(n, port)| format!("m{n}={}", url("http", *port)));
        command.arg("--name").arg(format!("m{}", self.cluster_member.0)).args(["--log-level", "error"]);
        command.arg("--initial-cluster").arg(members.collect::<Vec<_>>().join(","));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.arg("--data-dir").arg(self.directory.path().join("data"));
        if let Some(tls) = &self.tls {
            command.arg("--cert-file").arg(&tls.certificate).arg("--key-file").arg(&tls.key);
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(&tls.ca);
        }
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|e| panic!("cannot start etcd ({e}): run `apt-get install etcd-server`"));
        let child = self.child.insert(child);
        let deadline = Instant::now() + TEST_TIMEOUT;
        while Instant::now() < deadline {
            if child.try_wait().unwrap().is_some() {
                self.child = None;
                return false;
            }
            if tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, self.ports[0])).await.is_ok() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }

    /// Kills it, as a power failure would. Its data stays.
    pub(super) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
    }

    /// Removes its data.
    pub(super) fn delete_data(&self) {
        std::fs::remove_dir_all(self.directory.path().join("data")).unwrap();
    }

    /// Suspends the process like a hung machine, or resumes it.
    pub(super) fn set_suspended(&self, frozen: bool) {
        use nix::sys::signal::{Signal, kill};
        let pid = nix::unistd::Pid::from_raw(self.child.as_ref().unwrap().id().try_into().unwrap());
        kill(pid, if frozen { Signal::SIGSTOP } else { Signal::SIGCONT }).unwrap();
    }

    /// Number of answered requests of this gRPC method.
    pub(super) async fn request_count(&self, method: &str) -> u64 {
        self.metric(&["grpc_server_handled_total", &format!("grpc_method=\"{method}\"")]).await
    }

    /// Sum of the metrics whose lines contain all of these texts.
    pub(super) async fn metric(&self, texts: &[&str]) -> u64 {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, self.ports[0])).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let lines = text.lines().filter(|line| !line.starts_with('#') && texts.iter().all(|text| line.contains(text)));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    }

    pub(super) fn endpoint(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.ports[0])
    }

    pub(super) fn config(&self) -> StoreConfig {
        StoreConfig { endpoints: vec![self.endpoint()], ..StoreConfig::default() }
    }

    /// A separate client for the test.
    pub(super) async fn client(&self) -> Client {
        let deadline = Instant::now() + TEST_TIMEOUT;
        loop {
            let mut client = Client::connect([self.endpoint()], None).await.unwrap();
            match client.get("x", None).await {
                Ok(_) => return client,
                Err(e) if Instant::now() > deadline => panic!("etcd does not answer: {e}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    pub(super) async fn put_config(&self, text: &str) {
        self.put("config", text, None).await;
    }

    /// Writes a key below the prefix.
    pub(super) async fn put(&self, key: &str, value: &str, etcd_lease: Option<i64>) {
        let options = etcd_lease.map(|id| PutOptions::new().with_lease(id));
        self.client().await.put(format!("{PREFIX}/{key}"), value, options).await.unwrap();
    }

    pub(super) async fn put_subnet(&self, key: &str, value: &str, etcd_lease: Option<i64>) {
        self.put(&format!("subnets/{key}"), value, etcd_lease).await;
    }

    /// The IDs of all etcd leases.
    pub(super) async fn leases(&self) -> Vec<i64> {
        self.client().await.leases().await.unwrap().leases().iter().map(|lease| lease.id()).collect()
    }

    pub(super) async fn grant(&self, seconds: i64) -> i64 {
        self.client().await.lease_grant(seconds, None).await.unwrap().id()
    }

    /// All entries of the default network (key, value, etcd lease), and the revision.
    pub(super) async fn subnets(&self) -> (Vec<(String, String, i64)>, i64) {
        self.subnets_of("default").await
    }

    /// All entries of a network, and the revision.
    pub(super) async fn subnets_of(&self, network: &str) -> (Vec<(String, String, i64)>, i64) {
        let prefix = key(network, "subnets/");
        let answer = self.client().await.get(prefix.as_str(), Some(GetOptions::new().with_prefix())).await.unwrap();
        let entries = answer.kvs().iter().map(|kv| {
            (kv.key_str().unwrap().strip_prefix(&prefix).unwrap().to_owned(), kv.value_str().unwrap().to_owned(), kv.lease())
        });
        (entries.collect(), answer.header().unwrap().revision())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Finds two free ports. They are below the kernel's ephemeral range (32768 and up), so that no other process gets one while the
/// etcd that listens there is down.
fn free_ports() -> [u16; 2] {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let free = || loop {
        // Other test processes start at another port.
        let n = std::process::id().wrapping_mul(101).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(20_000 + n % 12_000).unwrap();
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    };
    [free(), free()]
}

fn directory() -> TempDir {
    tempfile::Builder::new().prefix("overlay-etcd-").tempdir().unwrap()
}

/// What a lease of a VXLAN network carries.
pub(super) fn vxlan(vtep: PerFamily<Mac>) -> BackendData {
    BackendData::Vxlan { vni: Vni::DEFAULT, vtep }
}

/// The lease request of host `number`.
pub(super) fn lease_request(network: &str, number: u16) -> LeaseRequest {
    let network = NetworkConfig::parse(network).expect(network).config;
    let [high, low] = number.to_be_bytes();
    let mac = |family| Mac::local([2, if family == Family::V4 { 4 } else { 6 }, 0, 0, high, low]);
    let address = |family| match family {
        Family::V4 => format!("192.168.{high}.{}", low).parse().unwrap(),
        Family::V6 => format!("fd99::{number:x}").parse().unwrap(),
    };
    let families: Vec<Family> = network.families().collect();
    LeaseRequest {
        node: Node { name: format!("host{number}"), id: format!("id-{number}") },
        public_ip: families.iter().map(|f| (*f, address(*f))).collect::<PerFamily<_>>(),
        backend: vxlan(families.iter().map(|f| (*f, mac(*f))).collect()),
        network,
        preferred: None,
    }
}

/// A key of a network.
pub(super) fn key(network: &str, rest: &str) -> String {
    if network == "default" { format!("{PREFIX}/{rest}") } else { format!("{PREFIX}/networks/{network}/{rest}") }
}

/// A store whose connection is kept until the guard is dropped.
pub(super) fn start_store(config: StoreConfig) -> (Store, DropGuard) {
    let (store, shutdown) = (Store::new(config), CancellationToken::new());
    let (connection, token) = (store.clone(), shutdown.clone());
    tokio::spawn(async move { connection.run_connection(token).await });
    (store, shutdown.drop_guard())
}

/// The store of one agent, or a network's part of it.
pub(super) struct Agent {
    pub(super) events: mpsc::Receiver<StoreEvent>,
    pub(super) lease_request: watch::Sender<Option<LeaseRequest>>,
    shutdown: CancellationToken,
    task: Option<JoinHandle<Result<(), StoreError>>>,
}

impl Agent {
    pub(super) fn start(config: StoreConfig, lease_request: Option<LeaseRequest>) -> Agent {
        let store = Store::new(config);
        Agent::spawn(lease_request, |events, requests, shutdown| async move { store.run(events, requests, shutdown).await })
    }

    /// Starts a network's part of a store.
    pub(super) fn in_network(store: &Store, name: &str, lease_request: Option<LeaseRequest>) -> Agent {
        let network = store.network(&name.into());
        Agent::spawn(lease_request, |events, requests, shutdown| async move { network.run(events, requests, shutdown).await })
    }

    fn spawn<F>(
        lease_request: Option<LeaseRequest>,
        run: impl FnOnce(mpsc::Sender<StoreEvent>, watch::Receiver<Option<LeaseRequest>>, CancellationToken) -> F,
    ) -> Agent
    where
        F: Future<Output = Result<(), StoreError>> + Send + 'static,
    {
        let (sender, events) = mpsc::channel(64);
        let (lease_request, lease_requests) = watch::channel(lease_request);
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(run(sender, lease_requests, shutdown.clone()));
        Agent { events, lease_request, shutdown, task: Some(task) }
    }

    /// The next event, except server addresses.
    pub(super) async fn next(&mut self) -> StoreEvent {
        self.find(|event| (!matches!(event, StoreEvent::Servers(_))).then(|| event.clone())).await
    }

    /// Waits for the first event that `f` maps to a value; skips other events.
    pub(super) async fn find<T>(&mut self, mut f: impl FnMut(&StoreEvent) -> Option<T>) -> T {
        let deadline = Instant::now() + TEST_TIMEOUT;
        let mut skipped = Vec::new();
        loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            let Ok(event) = tokio::time::timeout(remaining, self.events.recv()).await else {
                panic!("timeout; skipped events: {skipped:#?}")
            };
            let event = event.unwrap_or_else(|| panic!("the store has ended; skipped events: {skipped:#?}"));
            if let Some(found) = f(&event) {
                return found;
            }
            skipped.push(event);
        }
    }

    /// Waits for the snapshot and for the state of the own lease. The watch and the lease keeper report them in any order.
    pub(super) async fn snapshot_and_own(&mut self) -> (Vec<StoreEntry>, OwnLease) {
        let (mut snapshot, mut own) = (None, None);
        self.find(|event| {
            match event {
                StoreEvent::Snapshot(entries) => snapshot = Some(entries.clone()),
                StoreEvent::Own(state) => own = Some(state.clone()),
                _ => {}
            }
            snapshot.clone().zip(own.clone())
        })
        .await
    }

    pub(super) async fn next_held(&mut self) -> HeldLease {
        self.find(|event| match event {
            StoreEvent::Own(OwnLease::Held(held)) => {
                Some(HeldLease { subnet: held.subnet, etcd_lease: held.expiry.map(|id| id.0), origin: held.origin })
            }
            _ => None,
        })
        .await
    }

    /// Panics if an event arrives within this time.
    pub(super) async fn assert_quiet(&mut self, time: Duration) {
        let event = tokio::time::timeout(time, self.events.recv()).await;
        assert!(event.is_err(), "{event:?}");
    }

    pub(super) async fn next_not_held(&mut self) -> String {
        self.find(|event| match event {
            StoreEvent::Own(OwnLease::NotHeld { reason }) => Some(reason.clone()),
            _ => None,
        })
        .await
    }

    /// Stops it gracefully.
    pub(super) async fn stop(mut self) {
        self.shutdown.cancel();
        let task = self.task.take().unwrap();
        let drain = async { while self.events.recv().await.is_some() {} };
        let (outcome, ()) = tokio::time::timeout(TEST_TIMEOUT, async { tokio::join!(task, drain) }).await.expect("ends in time");
        outcome.unwrap().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// A network's part of the store of host 7.
pub(super) fn start(store: &Store, network: &str) -> Agent {
    Agent::in_network(store, network, Some(lease_request(NETWORK, 7)))
}

/// Skips the events of the next half second.
pub(super) async fn settle(agents: &mut [Agent]) {
    tokio::time::sleep(Duration::from_millis(500)).await;
    for agent in agents {
        while tokio::time::timeout(Duration::from_millis(10), agent.events.recv()).await.is_ok() {}
    }
}

pub(super) fn subnet(key: &str) -> Subnet {
    Subnet::from_key(key).expect(key)
}

/// Runs a command, and panics with its stderr if it fails.
pub(super) fn run_command(directory: &Path, command: &str, arguments: &[&str]) {
    let output = Command::new(command).args(arguments).current_dir(directory).output();
    let output = output.unwrap_or_else(|e| panic!("cannot start {command} ({e}): run `apt-get install {command}`"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command} {arguments:?}: {stderr}");
}
