//! Steps in isolated networks of one range, and their invariants.

use std::collections::BTreeSet;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::api::{AttachRequest, Status};
use overlay_tests::test_lab::READY_TIMEOUT;
use overlay_tests::{ExpectContext, kernel_fault, networks};
use rand::RngExt;
use rand::seq::IndexedRandom;

use super::Soak;

/// The networks.
const NETWORKS: [&str; 2] = ["blue", "green"];

/// Maximum number of containers of a host in them.
const MAX_CONTAINERS: usize = 3;

impl Soak {
    /// Creates the networks.
    pub fn create_networks(&mut self) {
        for network in NETWORKS {
            networks::create(&self.lab, network, &["--cidr", networks::RANGE, "--cidr", "fd00:10::/56"]);
            // A later step cannot read it while the store is down.
            self.vnis.insert(network, networks::vni(&self.lab, network));
        }
    }

    /// Attaches or detaches a container in a network, or damages the kernel's state of one.
    pub async fn network_step(&mut self, host: &'static str) {
        match self.rng.random_range(0..10) {
            0..5 => self.attach_in_network(host).await,
            5..8 => self.detach_in_network(host).await,
            _ => self.damage_network(host),
        }
    }

    /// The host joins the network with its first container.
    async fn attach_in_network(&mut self, host: &'static str) {
        if self.network_containers(host).len() >= MAX_CONTAINERS {
            return;
        }
        let network = NETWORKS.choose(&mut self.rng).copied().expect_ok("a network");
        self.next_container += 1;
        let name = format!("{network}-c{}", self.next_container);
        let attached = self.lab.host(host).attach_in(&networks::name(network), &name, AttachRequest::default()).await;
        match attached {
            Ok(_) => {
                self.record_step(host, format!("container attached in {network}"));
                self.in_networks.insert((host, network, name));
            }
            // Without the store the network cannot be joined.
            Err(error) => {
                println!("  {host} refuses {name} in {network}: {error}");
                self.record_step(host, "container refused in a network");
            }
        }
    }

    async fn detach_in_network(&mut self, host: &'static str) {
        let all = self.network_containers(host);
        let Some((_, network, name)) = all.choose(&mut self.rng).cloned() else { return };
        networks::detach(&self.lab, host, network, &name).await;
        self.in_networks.remove(&(host, network, name));
        self.record_step(host, format!("container detached in {network}"));
    }

    fn damage_network(&mut self, host: &'static str) {
        let Some((_, network, _)) = self.network_containers(host).choose(&mut self.rng).cloned() else { return };
        let fault = kernel_fault::ALL.choose(&mut self.rng).expect_ok("a kernel fault");
        self.record_step(&format!("{host}.{network}"), format!("kernel fault in a network: {}", fault.name));
        fault.try_inject_in(&self.lab, &format!("{host}.{network}"), self.vnis[network]);
    }

    /// Detaches all containers of a host in networks.
    pub async fn detach_all_in_networks(&mut self, host: &'static str) {
        for (_, network, name) in self.network_containers(host) {
            networks::detach(&self.lab, host, network, &name).await;
            self.in_networks.remove(&(host, network, name));
        }
    }

    /// The containers of a host in networks: host, network and name.
    pub fn network_containers(&self, host: &str) -> Vec<(&'static str, &'static str, String)> {
        self.in_networks.iter().filter(|(at, ..)| *at == host).cloned().collect()
    }

    /// Waits until each host is ready in its networks, with every other host there as a peer.
    pub async fn wait_networks_converged(&self) {
        for network in NETWORKS {
            let hosts: BTreeSet<&str> =
                self.in_networks.iter().filter(|(_, at, _)| *at == network).map(|(host, ..)| *host).collect();
            for host in hosts {
                let client = self.lab.host(host).client_of(&networks::name(network));
                // A host without containers keeps its lease for some minutes.
                let is_converged = |status: &Status| {
                    let peers = networks::leases(&self.lab, network).len() - 1;
                    status.ready && status.data_path.peers == peers && status.data_path.failed.is_empty()
                };
                overlay_tests::wait::eventually_async(&format!("{host} is ready in {network}"), 2 * READY_TIMEOUT, || async {
                    let status = client.status().await.map_err(|error| error.to_string())?;
                    if is_converged(&status) { Ok(()) } else { Err(format!("{:?} {:?}", status.problems, status.data_path)) }
                })
                .await;
            }
        }
    }

    /// The namespaces of networks that exist, as the agents list them: no more may be left.
    pub async fn network_namespaces(&self) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        for host in self.containers_by_host.keys() {
            let joined = self.lab.host(host).client().networks().await.expect_ok(host).networks;
            let named = joined.iter().filter(|entry| !entry.name.is_default());
            all.extend(named.map(|entry| networks::namespace_name(&self.lab, host, &entry.name.to_string())));
        }
        for (host, network, name) in &self.in_networks {
            assert!(all.contains(&networks::namespace_name(&self.lab, host, network)), "{host} is in {network} with {name}");
            all.insert(self.namespace_name(host, name));
        }
        all
    }

    /// Deletes the namespaces of a host's containers in networks that hold an address of a lost subnet, and attaches them again.
    pub async fn reattach_moved_in_networks(&mut self, host: &'static str) {
        for (_, network, name) in self.network_containers(host) {
            let client = self.lab.host(host).client_of(&networks::name(network));
            let subnet = client.status().await.expect_ok(network).lease.expect_ok("a lease").subnet;
            let endpoints = client.endpoints().await.expect_ok(network).endpoints;
            let endpoint = endpoints.into_iter().find(|endpoint| endpoint.name.as_str() == name).expect_ok(&name);
            let is_in_subnet = |(family, address)| subnet.get(family).is_some_and(|range| range.contains(address));
            if endpoint.addresses().iter().map(|(family, address)| (family, *address)).all(is_in_subnet) {
                continue;
            }
            self.record_step(host, "container moved in a network");
            client.detach(&name.parse().expect_ok("a name")).await.expect_ok("detach");
            Netns::delete(&self.namespace_name(host, &name)).expect_ok("delete the container");
            networks::attach(&self.lab, host, network, &name).await;
        }
    }
}
