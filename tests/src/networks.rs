//! Named networks in a lab: their records, containers and namespaces.
//!
//! The target of a host's part of an isolated network is `HOST.NETWORK`, that of a container `HOST-NAME`.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::api::{AttachRequest, AttachResponse};
use overlay_agent::model::{Family, NetworkName};
use overlayctl::lab::layout;

use crate::notify::Notifications;
use crate::ping::PingFlow;
use crate::programs::CommandOutput;
use crate::test_lab::READY_TIMEOUT;
use crate::{ExpectContext, TestLab, etcd, eventually, eventually_true, kernel};

/// The range of networks whose addresses do not matter.
pub const RANGE: &str = "10.0.0.0/16";

/// Time limit for a host to leave a network in which it stays for [`LEAVE_AFTER`].
const LEAVE_TIMEOUT: Duration = Duration::from_secs(30);
/// Flag of agents for [`wait_left`].
pub const LEAVE_AFTER: &str = "--leave-after=3s";

/// A network's name.
#[track_caller]
pub fn name(text: &str) -> NetworkName {
    text.parse().expect_ok(text)
}

/// Runs `overlayctl network` on host `h1` against the lab's etcd.
#[track_caller]
pub fn network_command(lab: &TestLab, arguments: &[&str]) -> CommandOutput {
    let endpoints = lab.layout().etcd_endpoints().join(",");
    let command: Vec<&str> =
        ["network"].into_iter().chain(arguments.iter().copied()).chain(["--etcd-endpoints", &endpoints]).collect();
    lab.ctl("h1", &command)
}

/// Creates a network.
#[track_caller]
pub fn create(lab: &TestLab, name: &str, options: &[&str]) {
    network_command(lab, &[&["create", name], options].concat()).assert_code(0);
}

/// Creates isolated networks with the same range.
#[track_caller]
pub fn create_all(lab: &TestLab, names: &[&str]) {
    for name in names {
        create(lab, name, &["--cidr", RANGE]);
    }
}

/// The VNI of a network.
#[track_caller]
pub fn vni(lab: &TestLab, network: &str) -> u64 {
    let record = etcd::list(lab, &format!("{}/networks/{network}/config", layout::ETCD_PREFIX));
    let config: serde_json::Value = serde_json::from_str(&record.first().expect_ok(network).value).expect_ok(network);
    config["Backend"]["VNI"].as_u64().expect_ok("a VNI")
}

/// The leases of a network.
pub fn leases(lab: &TestLab, network: &str) -> Vec<etcd::Entry> {
    etcd::list(lab, &format!("{}/networks/{network}/subnets/", layout::ETCD_PREFIX))
}

/// Attaches a container to a network; the host joins the network with its first one.
pub async fn attach(lab: &TestLab, host: &str, network: &str, container: &str) -> AttachResponse {
    attach_with(lab, host, network, container, AttachRequest::default()).await
}

/// The same with further fields of the request.
pub async fn attach_with(lab: &TestLab, host: &str, network: &str, container: &str, request: AttachRequest) -> AttachResponse {
    let attached = lab.host(host).attach_in(&name(network), container, request).await;
    attached.expect_ok(&format!("attach {container} on {host} to {network}"))
}

/// A request that publishes ports.
#[track_caller]
pub fn publishing(ports: &[&str]) -> AttachRequest {
    AttachRequest { publish: ports.iter().map(|port| port.parse().expect_ok(port)).collect(), ..AttachRequest::default() }
}

/// Detaches a container and deletes its namespace.
pub async fn detach(lab: &TestLab, host: &str, network: &str, container: &str) {
    let client = lab.host(host).client_of(&name(network));
    client.detach(&container.parse().expect_ok(container)).await.expect_ok("detach");
    Netns::delete(&lab.layout().namespace(&format!("{host}-{container}"))).expect_ok("delete the container");
}

/// Attaches a container to a network on each host, named after both: `blue-c1` with the target `h1-blue-c1`. Waits until the
/// hosts know each other.
pub async fn attach_to_each(lab: &TestLab, network: &str, hosts: &[&str]) -> Vec<AttachResponse> {
    let mut attached = Vec::new();
    for host in hosts {
        attached.push(attach(lab, host, network, &format!("{network}-c1")).await);
    }
    wait_ready(lab, network, hosts).await;
    attached
}

/// Waits until these hosts, and no others, are ready peers in a network.
pub async fn wait_ready(lab: &TestLab, network: &str, hosts: &[&str]) {
    for host in hosts {
        let ready = lab.host(host).wait_ready_in(&name(network), hosts.len() - 1, READY_TIMEOUT).await;
        ready.expect_ok(&format!("{host} in {network}"));
    }
}

/// The address of a container in a family.
#[track_caller]
pub fn address(attached: &AttachResponse, family: Family) -> IpAddr {
    *attached.endpoint.addresses().get(family).expect_ok("an address")
}

/// A ping flow from a container to an attached one.
pub async fn ping(lab: &TestLab, from: &str, to: &str, attached: &AttachResponse, family: Family) -> PingFlow {
    PingFlow::start(&lab.open_netns(from), &lab.open_netns(to), address(attached, family)).await
}

/// Whether a host has the namespace of a network.
pub fn has_namespace(lab: &TestLab, host: &str, network: &str) -> bool {
    Netns::list().expect_ok("namespaces").contains(&lab.layout().namespace(&format!("{host}.{network}")))
}

/// The name of a network's namespace on a host.
pub fn namespace_name(lab: &TestLab, host: &str, network: &str) -> String {
    lab.layout().namespace(&format!("{host}.{network}"))
}

/// The overlay's entries of a host: in its own namespace, and in those of its isolated networks.
pub fn host_state(lab: &TestLab, host: &str) -> BTreeSet<String> {
    let isolated = lab.host(host).isolated_namespaces().expect_ok(host);
    let targets = std::iter::once(host.to_owned()).chain(isolated.iter().map(|(network, _)| format!("{host}.{network}")));
    targets
        .flat_map(|target| kernel::actual_state(lab, &target).into_iter().map(move |line| format!("{target}: {line}")))
        .collect()
}

/// Waits until a host's entries are those of an earlier time.
pub async fn wait_state(lab: &TestLab, host: &str, wanted: &BTreeSet<String>, context: &str) {
    eventually(&format!("{host} has its entries, {context}"), READY_TIMEOUT, || {
        let difference = kernel::difference(&host_state(lab, host), wanted);
        if difference.is_empty() { Ok(()) } else { Err(format!("\n{difference}")) }
    })
    .await;
}

/// Subscriptions in a host's namespace and in those of its isolated networks, once they are quiet.
pub async fn subscribe(lab: &TestLab, host: &str) -> Vec<(String, Notifications)> {
    let mut kernels = vec![(host.to_owned(), Notifications::subscribe(&lab.open_netns(host)))];
    for (network, netns) in lab.host(host).isolated_namespaces().expect_ok(host) {
        kernels.push((format!("{host}.{network}"), Notifications::subscribe(&netns)));
    }
    for (_, notifications) in &kernels {
        notifications.wait_quiet().await;
    }
    kernels
}

/// Checks that there were no notifications.
#[track_caller]
pub fn assert_quiet(kernels: &[(String, Notifications)], context: &str) {
    for (target, notifications) in kernels {
        notifications.assert_none(&format!("{target}, {context}"));
    }
}

/// Waits until a host has left a network: no namespace, no lease. Its agent has the flag [`LEAVE_AFTER`].
pub async fn wait_left(lab: &TestLab, host: &str, network: &str) {
    eventually_true(&format!("{host} has left {network}"), LEAVE_TIMEOUT, || {
        let name_field = format!("\"Name\":\"{host}\"");
        !has_namespace(lab, host, network) && !leases(lab, network).iter().any(|lease| lease.value.contains(&name_field))
    })
    .await;
}
