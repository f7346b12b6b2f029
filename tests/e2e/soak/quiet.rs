//! The checkpoints: invariants that hold once all faults have ended.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::api::Status;
use overlay_tests::dump::NetnsDump;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, etcd, eventually, kernel, process_memory};
use overlayctl::lab::check;

use super::{AttachKind, HOSTS, SERVICE_PORT, STABLE_HOST, Soak};

/// Open files of an agent beyond those at its first checkpoint: temporary connections, and the sockets of two isolated networks.
const MAX_EXTRA_FILES: usize = 12 + 2 * 16;
/// Growth limit of its anonymous memory, in kB, with two isolated networks.
const MAX_EXTRA_KIB: u64 = (4 + 2) << 10;

/// Open files and anonymous memory (kB) of an agent.
#[derive(Debug, Clone, Copy)]
pub struct ProcessSize {
    files: usize,
    memory_kib: u64,
}

impl Soak {
    /// Ends the current fault, waits until all agents are healthy, and checks all invariants.
    pub async fn check_invariants(&mut self) {
        self.end_fault().await;
        self.steps.push("quiet".to_owned());
        self.wait_converged().await;
        self.reattach_moved_containers().await;
        for host in self.containers_by_host.keys() {
            self.lab.wait_converged(host, READY_TIMEOUT).await;
        }
        self.wait_networks_converged().await;
        self.assert_full_reachability().await;
        self.assert_published_ports().await;
        self.assert_no_leftovers().await;
        self.assert_no_growth().await;
    }

    /// Waits until every agent is ready and has every peer, without pending retries.
    async fn wait_converged(&self) {
        let peers = self.containers_by_host.len() - 1 + self.peers.len();
        let is_converged =
            |s: &Status| s.ready && s.store.connected && s.data_path.peers == peers && s.data_path.failed.is_empty();
        for host in self.containers_by_host.keys() {
            self.lab
                .host(host)
                .wait_status(2 * READY_TIMEOUT, &format!("{host} does not have {peers} peers"), is_converged)
                .await
                .expect_ok(host);
        }
    }

    /// A host that lost its subnet to another one has moved. Its containers are attached again, as an operator would.
    async fn reattach_moved_containers(&mut self) {
        for host in HOSTS.into_iter().filter(|host| self.containers_by_host.contains_key(host)).collect::<Vec<_>>() {
            let subnet = self.lab.status(host).await.lease.expect_ok("a lease").subnet;
            let endpoints = self.lab.host(host).client().endpoints().await.expect_ok(host).endpoints;
            for endpoint in endpoints {
                let is_in_subnet = |(family, address): (_, &IpAddr)| subnet.get(family).is_some_and(|r| r.contains(*address));
                if endpoint.addresses().iter().all(is_in_subnet) {
                    continue;
                }
                self.record_step(host, "container moved");
                let name = endpoint.name.as_str();
                let kind = self.containers_by_host[host][name];
                self.detach_named(host, name).await;
                self.attach_as(host, name, kind).await.expect_ok("attach again");
            }
            self.reattach_moved_in_networks(host).await;
        }
    }

    async fn assert_full_reachability(&self) {
        let report = check::check(&self.lab).await.expect_ok("check");
        let failed: Vec<_> = report.overlay.iter().chain(&report.egress).filter(|call| call.error.is_some()).collect();
        assert!(failed.is_empty() && report.ok, "calls failed: {failed:#?} {:?}", report.remarks);
        let isolation = report.isolation.iter().flat_map(|isolation| &isolation.crossings).collect::<Vec<_>>();
        assert!(isolation.is_empty(), "packets crossed between networks: {isolation:#?}");
        let default: usize = self.containers_by_host.keys().map(|host| self.addressed_containers(host)).sum();
        let containers = default + self.in_networks.len();
        assert_eq!(report.containers.len(), containers, "{:?}", report.containers);
    }

    /// Checks published ports from outside, by each address of the host.
    async fn assert_published_ports(&self) {
        let world = self.lab.open_netns("world");
        for (host, containers) in &self.containers_by_host {
            for (name, kind) in containers {
                let AttachKind::Published(port) = kind else { continue };
                let netns = self.lab.open_netns(&format!("{host}-{name}"));
                // One socket for both families.
                let server =
                    netns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, SERVICE_PORT))).expect_ok("enter").expect_ok("serve");
                server.set_nonblocking(true).expect_ok("a nonblocking server");
                for (_, address) in self.lab.host(host).layout().addresses.iter() {
                    let to = SocketAddr::new(*address, *port);
                    let call = || world.run(|| TcpStream::connect_timeout(&to, CONVERGE_TIMEOUT)).expect_ok("enter");
                    let stream = call().expect_ok(&format!("{name} of {host}, by {to} from outside"));
                    let accept = || server.accept().map_err(|error| error.to_string());
                    let (_, caller) = eventually(&format!("{name} of {host} is called by {to}"), CONVERGE_TIMEOUT, accept).await;
                    assert_eq!(
                        caller.port(),
                        stream.local_addr().expect_ok("an address").port(),
                        "{name} by {to}: a call of another client"
                    );
                }
            }
        }
    }

    /// Checks namespaces, endpoints, ports and leases: no more and no fewer than expected. Hosts that left are as before.
    async fn assert_no_leftovers(&self) {
        let layout = self.lab.layout();
        let mut expected: BTreeSet<String> =
            ["net", "world", "e1", "e2", "e3"].iter().map(|name| layout.namespace(name)).collect();
        expected.extend(HOSTS.iter().map(|host| layout.namespace(host)));
        expected.extend(self.network_namespaces().await);
        for (host, containers) in &self.containers_by_host {
            expected.extend(containers.keys().map(|name| layout.namespace(&format!("{host}-{name}"))));
            let endpoints = self.lab.host(host).client().endpoints().await.expect_ok(host).endpoints;
            let names: BTreeSet<String> = endpoints.iter().map(|endpoint| endpoint.name.to_string()).collect();
            assert!(names.iter().eq(containers.keys()), "the endpoints of {host}: {names:?}, not {containers:?}");
            let addresses: BTreeSet<_> =
                endpoints.iter().flat_map(|e| e.addresses().iter().map(|(_, a)| *a).collect::<Vec<_>>()).collect();
            let (all, distinct) = (2 * self.addressed_containers(host), addresses.len());
            assert_eq!(distinct, all, "each has its own addresses: {addresses:?}");
            let links = kernel::list_json(&self.lab, host, "ip", &["link", "show"]);
            let ports = links.iter().filter(|link| kernel::text(link, "ifname").starts_with("ove")).count();
            assert_eq!(ports, self.addressed_containers(host), "the ports of {host}");
        }
        let found: BTreeSet<String> =
            Netns::list().expect_ok("namespaces").into_iter().filter(|n| n.starts_with(&layout.prefix())).collect();
        assert_eq!(found, expected, "namespaces");
        let leases = etcd::leases(&self.lab);
        assert_eq!(leases.len(), self.containers_by_host.len() + self.peers.len(), "leases: {leases:#?}");
        for host in HOSTS.iter().filter(|host| !self.containers_by_host.contains_key(*host)) {
            eventually("a host that left has its initial state", READY_TIMEOUT, || {
                let changes = NetnsDump::of(&self.lab.open_netns(host)).changes_since(&self.initial_dumps[host]);
                if changes.is_empty() { Ok(()) } else { Err(format!("{host}:\n{changes}")) }
            })
            .await;
        }
    }

    /// Checks growth after the agent has returned unused memory, one second after its last batch.
    async fn assert_no_growth(&mut self) {
        for host in self.containers_by_host.keys() {
            let pid = self.lab.host(host).agent().expect_ok("an agent").pid;
            let first = *self.sizes.entry(pid).or_insert_with(|| process_size(pid));
            eventually(&format!("open files and memory of {host}"), CONVERGE_TIMEOUT, || {
                let now = process_size(pid);
                let has_grown = now.files > first.files + MAX_EXTRA_FILES || now.memory_kib > first.memory_kib + MAX_EXTRA_KIB;
                if has_grown { Err(format!("{first:?} at the first checkpoint, now {now:?}")) } else { Ok(()) }
            })
            .await;
        }
    }

    /// The growth of the agent that is never restarted, as text.
    pub fn growth(&self) -> String {
        let pid = self.lab.host(STABLE_HOST).agent().expect_ok("an agent").pid;
        format!("{STABLE_HOST}: {:?}, at first {:?}", process_size(pid), self.sizes.get(&pid))
    }
}

fn process_size(pid: i32) -> ProcessSize {
    ProcessSize {
        files: fs::read_dir(format!("/proc/{pid}/fd")).expect_ok("an agent's open files").count(),
        memory_kib: process_memory::anonymous_rss_kib(pid),
    }
}
