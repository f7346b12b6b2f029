//! The quiet points: everything that must be true once all faults have ended.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::api::Status;
use overlay_tests::dump::Dump;
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, etcd, eventually, kernel, memory};
use overlayctl::lab::check;

use super::{HOSTS, SERVED, STAYS, Soak, Wish};

/// Open files that an agent may have more than at its first quiet point: connections that come and go.
const FILES: usize = 12;
/// Anonymous memory that it may have more, in kB.
const MEMORY: u64 = 4 << 10;

/// Open files and anonymous memory (kB) of an agent.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    files: usize,
    memory: u64,
}

impl Soak {
    /// Ends what lasts, waits until all agents are well, and looks at everything.
    pub async fn quiet(&mut self) {
        self.end_fault().await;
        self.steps.push("quiet".to_owned());
        self.wait().await;
        self.move_containers().await;
        for host in self.active.keys() {
            self.story.settled(host, READY).await;
        }
        self.everybody_reaches_everybody().await;
        self.published_ports_lead_to_their_containers().await;
        self.nothing_is_left_over().await;
        self.nothing_grows().await;
    }

    /// Every agent is ready, has every peer, and nothing waits for another try.
    async fn wait(&self) {
        let peers = self.active.len() - 1 + self.peers.len();
        let well = |s: &Status| s.ready && s.store.connected && s.data_path.peers == peers && s.data_path.failed.is_empty();
        for host in self.active.keys() {
            self.story.at(host).wait_status(2 * READY, &format!("{host} has not {peers} peers"), well).await.must(host);
        }
    }

    /// A host whose lease was another's for a moment has moved: its containers are attached anew, as an operator would.
    async fn move_containers(&mut self) {
        for host in HOSTS.into_iter().filter(|host| self.active.contains_key(host)).collect::<Vec<_>>() {
            let subnet = self.story.status(host).await.lease.must("a lease").subnet;
            let endpoints = self.story.at(host).client().endpoints().await.must(host).endpoints;
            for endpoint in endpoints {
                let inside = |(family, address): (_, &IpAddr)| subnet.get(family).is_some_and(|r| r.contains(*address));
                if endpoint.addresses().iter().all(inside) {
                    continue;
                }
                self.count(host, "container moved");
                let name = endpoint.name.as_str();
                let wish = self.active[host][name];
                self.detach_named(host, name).await;
                self.attach_as(host, name, wish).await.must("attach anew");
            }
        }
    }

    async fn everybody_reaches_everybody(&self) {
        let report = check::check(&self.story).await.must("check");
        let bad: Vec<_> = report.overlay.iter().chain(&report.egress).filter(|call| call.error.is_some()).collect();
        assert!(bad.is_empty() && report.ok, "calls went wrong: {bad:#?} {:?}", report.remarks);
        let containers: usize = self.active.keys().map(|host| self.with_addresses(host)).sum();
        assert_eq!(report.containers.len(), containers, "{:?}", report.containers);
    }

    /// From the world outside, by each address of the host.
    async fn published_ports_lead_to_their_containers(&self) {
        let world = self.story.inside("world");
        for (host, containers) in &self.active {
            for (name, wish) in containers {
                let Wish::Published(port) = wish else { continue };
                let inside = self.story.inside(&format!("{host}-{name}"));
                // One socket for both families.
                let server = inside.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, SERVED))).must("enter").must("serve");
                server.set_nonblocking(true).must("a server that does not wait");
                for (_, address) in self.story.at(host).layout().addresses.iter() {
                    let to = SocketAddr::new(*address, *port);
                    let call = || world.run(|| TcpStream::connect_timeout(&to, SOON)).must("enter");
                    let stream = call().must(&format!("{name} of {host}, by {to} from outside"));
                    let accept = || server.accept().map_err(|error| error.to_string());
                    let (_, caller) = eventually(&format!("{name} of {host} is called by {to}"), SOON, accept).await;
                    assert_eq!(caller.port(), stream.local_addr().must("an address").port(), "{name} by {to}: another's call");
                }
            }
        }
    }

    /// Namespaces, endpoints, ports, leases: those that there should be and no others. Hosts that left are as they were.
    async fn nothing_is_left_over(&self) {
        let layout = self.story.layout();
        let mut wanted: BTreeSet<String> = ["net", "world", "e1", "e2", "e3"].iter().map(|name| layout.namespace(name)).collect();
        wanted.extend(HOSTS.iter().map(|host| layout.namespace(host)));
        for (host, containers) in &self.active {
            wanted.extend(containers.keys().map(|name| layout.namespace(&format!("{host}-{name}"))));
            let endpoints = self.story.at(host).client().endpoints().await.must(host).endpoints;
            let names: BTreeSet<String> = endpoints.iter().map(|endpoint| endpoint.name.to_string()).collect();
            assert!(names.iter().eq(containers.keys()), "the endpoints of {host}: {names:?}, not {containers:?}");
            let addresses: BTreeSet<_> =
                endpoints.iter().flat_map(|e| e.addresses().iter().map(|(_, a)| *a).collect::<Vec<_>>()).collect();
            let (all, apart) = (2 * self.with_addresses(host), addresses.len());
            assert_eq!(apart, all, "each has its own addresses: {addresses:?}");
            let links = kernel::listed(&self.story, host, "ip", &["link", "show"]);
            let ports = links.iter().filter(|link| kernel::text(link, "ifname").starts_with("ove")).count();
            assert_eq!(ports, self.with_addresses(host), "the ports of {host}");
        }
        let found: BTreeSet<String> =
            Netns::list().must("namespaces").into_iter().filter(|n| n.starts_with(&layout.prefix())).collect();
        assert_eq!(found, wanted, "namespaces");
        let leases = etcd::leases(&self.story);
        assert_eq!(leases.len(), self.active.len() + self.peers.len(), "leases: {leases:#?}");
        for host in HOSTS.iter().filter(|host| !self.active.contains_key(*host)) {
            eventually("a host that left is as it was", READY, || {
                let changes = Dump::of(&self.story.inside(host)).changes_since(&self.clean[host]);
                if changes.is_empty() { Ok(()) } else { Err(format!("{host}:\n{changes}")) }
            })
            .await;
        }
    }

    /// Growth is what is left after the agent gave unused memory back, which it does a second after its last batch.
    async fn nothing_grows(&mut self) {
        for host in self.active.keys() {
            let pid = self.story.at(host).agent().must("an agent").pid;
            let first = *self.sizes.entry(pid).or_insert_with(|| size(pid));
            eventually(&format!("open files and memory of {host}"), SOON, || {
                let now = size(pid);
                let grown = now.files > first.files + FILES || now.memory > first.memory + MEMORY;
                if grown { Err(format!("{first:?} at the first quiet point, now {now:?}")) } else { Ok(()) }
            })
            .await;
        }
    }

    /// How the agent that stays has grown, for people.
    pub fn growth(&self) -> String {
        let pid = self.story.at(STAYS).agent().must("an agent").pid;
        format!("{STAYS}: {:?}, at first {:?}", size(pid), self.sizes.get(&pid))
    }
}

fn size(pid: i32) -> Size {
    Size { files: fs::read_dir(format!("/proc/{pid}/fd")).must("an agent's open files").count(), memory: memory::anonymous(pid) }
}
