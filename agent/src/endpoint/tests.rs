//! Tests of attach and detach with a fake kernel, whose state survives the agent, and which can fail or block.

mod crash;
mod fake_kernel;
mod holders;
mod modes;
mod networks;

use std::net::IpAddr;

use super::persist::{FILE, JOURNAL};
use super::record::StoredTable;
use super::*;
use crate::model::device::MAX_BRIDGE_PORTS;
use crate::model::{Cidr, Device, PerFamily, Subnet, Vni};
use crate::state::Journal;
use fake_kernel::FakeKernel;

struct TestHost {
    directory: tempfile::TempDir,
    kernel: FakeKernel,
}

impl TestHost {
    fn new(namespaces: &[&str]) -> TestHost {
        TestHost { directory: tempfile::tempdir().unwrap(), kernel: FakeKernel::new(namespaces) }
    }

    /// Starts an agent, and sets the network unless `subnet` is empty.
    async fn start(&self, subnet: &str) -> Endpoints<FakeKernel> {
        let state = Arc::new(StateDir::open(self.directory.path()).unwrap());
        let endpoints =
            Endpoints::restore(state, self.kernel.clone(), NetworkName::default(), HostClaims::default()).await.unwrap();
        if !subnet.is_empty() {
            endpoints.set_network(Some(network(subnet)));
        }
        endpoints
    }

    /// The stored table.
    fn stored_json(&self) -> String {
        let at = |name| self.directory.path().join(name);
        let stored: StoredTable = crate::state::peek(&at(FILE)).unwrap().unwrap_or_default();
        let changes = Journal::peek(&at(JOURNAL)).unwrap_or_default();
        serde_json::to_string_pretty(&stored.replay(changes)).unwrap()
    }
}

fn network(key: &str) -> EndpointNetwork {
    let subnet = Subnet::from_key(key).unwrap();
    let networks = subnet.iter().map(|(family, range)| (family, Cidr::containing(range.base(), range.length() - 8).unwrap()));
    EndpointNetwork { subnet, networks: networks.collect(), bridge: Device::bridge(Vni::DEFAULT), mtu: 1430, docker: false }
}

fn name(text: &str) -> EndpointName {
    text.parse().unwrap()
}

fn attach_request(netns: &str) -> AttachRequest {
    AttachRequest { netns: Some(netns.into()), ..AttachRequest::default() }
}

fn attach_request_with(netns: &str, addresses: &[&str]) -> AttachRequest {
    let parsed = addresses.iter().map(|a| a.parse::<IpAddr>().unwrap());
    AttachRequest { addresses: parsed.map(|a| (crate::model::Family::of(a), a)).collect(), ..attach_request(netns) }
}

fn format_routes(spec: &crate::plan::PortSpec) -> Vec<String> {
    spec.routes.iter().map(|(destination, gateway)| format!("{destination} via {gateway}")).collect()
}

const DUAL: &str = "10.244.1.0-24&fd00:10:244:1::-64";

#[tokio::test]
async fn attach_allocates_addresses_and_creates_port() {
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    let mut ports = endpoints.ports();
    let attached = endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    assert_eq!(attached.endpoint.addresses().v4.unwrap().to_string(), "10.244.1.2");
    assert_eq!(attached.endpoint.addresses().v6.unwrap().to_string(), "fd00:10:244:1::2");
    assert_eq!(attached.prefix_length, PerFamily { v4: Some(24), v6: Some(64) });
    assert_eq!(attached.gateway.v4.unwrap().to_string(), "10.244.1.1");
    assert_eq!((attached.endpoint.port.as_ref().unwrap().interface.as_str(), attached.mtu), ("eth0", Some(1430)));
    let port_specs = host.kernel.port_specs();
    let spec = &port_specs[&attached.endpoint.port.as_ref().unwrap().host_interface];
    assert_eq!(spec.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.244.1.2/24", "fd00:10:244:1::2/64"]);
    assert_eq!(format_routes(spec), ["0.0.0.0/0 via 10.244.1.1", "::/0 via fd00:10:244:1::1"]);
    assert_eq!((spec.mac, spec.bridge.name().as_str()), (attached.endpoint.port.as_ref().unwrap().mac, "ovb.1"));
    assert!(ports.has_changed().unwrap());
    assert_eq!(*ports.borrow_and_update(), vec![Arc::new(attached.endpoint.clone())]);

    // A repeated attach returns the same endpoint, and restores a port that another process removed.
    host.kernel.remove(&attached.endpoint.port.as_ref().unwrap().host_interface);
    assert_eq!(endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap(), attached);
    assert_eq!(host.kernel.port_specs(), port_specs);
    host.kernel.remove(&attached.endpoint.port.as_ref().unwrap().host_interface);
    assert!(endpoints.reconcile_ports().await.is_empty());
    assert_eq!(host.kernel.port_specs(), port_specs);

    assert_eq!(endpoints.detach(name("a"), false).await.unwrap().endpoint, Some(name("a")));
    assert_eq!(endpoints.detach(name("a"), false).await.unwrap().endpoint, None);
    assert!(host.kernel.port_specs().is_empty() && endpoints.list().is_empty() && ports.borrow().is_empty());
    assert_eq!(
        endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap().endpoint.addresses().v4.unwrap().to_string(),
        "10.244.1.3"
    );
}

#[tokio::test]
async fn invalid_attach_is_rejected_without_leftovers() {
    let host = TestHost::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start("").await;
    let error = endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap_err();
    assert!(error.to_string().starts_with("no subnet is leased yet") && error.class() == ErrorClass::NotReady);
    let known = tokio::spawn({
        let endpoints = endpoints.clone();
        async move { endpoints.wait_for_network().await }
    });
    tokio::task::yield_now().await;
    assert!(!known.is_finished());
    endpoints.set_network(Some(network("10.244.1.0-24")));
    tokio::time::timeout(Duration::from_secs(5), known).await.expect("the network is set").unwrap();
    endpoints.attach(name("a"), attach_request_with("/ns/a", &["10.244.1.77"])).await.unwrap();
    let before = (host.stored_json(), host.kernel.port_specs());
    let other_interface = AttachRequest { interface: Some("eth1".to_owned()), ..attach_request("/ns/a") };
    for (who, request, class, expected) in [
        (
            "a",
            attach_request("/ns/b"),
            ErrorClass::Conflict,
            "endpoint a is attached with network namespace /ns/a, not network namespace /ns/b",
        ),
        ("a", other_interface, ErrorClass::Conflict, "endpoint a is attached with interface eth0, not interface eth1"),
        (
            "a",
            attach_request_with("/ns/a", &["10.244.1.78"]),
            ErrorClass::Conflict,
            "endpoint a is attached with address 10.244.1.77, not 10.244.1.78",
        ),
        (
            "a",
            attach_request_with("/ns/a", &["fd00::1"]),
            ErrorClass::Conflict,
            "endpoint a is attached with no IPv6 address, not fd00::1",
        ),
        ("b", attach_request("/ns/a"), ErrorClass::Conflict, "interface eth0 in /ns/a belongs to endpoint a"),
        ("b", attach_request("/ns/c"), ErrorClass::InvalidRequest, "there is no network namespace at /ns/c"),
        ("b", attach_request("ns/b"), ErrorClass::InvalidRequest, "is not an absolute path"),
        (
            "b",
            attach_request_with("/ns/b", &["10.244.1.77"]),
            ErrorClass::Conflict,
            "address 10.244.1.77 is in use by endpoint a",
        ),
        ("b", attach_request_with("/ns/b", &["10.244.1.1"]), ErrorClass::InvalidRequest, "is the gateway of"),
        (
            "b",
            attach_request_with("/ns/b", &["10.244.2.7"]),
            ErrorClass::InvalidRequest,
            "is outside this host's subnet 10.244.1.0/24",
        ),
        (
            "b",
            attach_request_with("/ns/b", &["fd00::7"]),
            ErrorClass::InvalidRequest,
            "this host's subnet 10.244.1.0/24 has no IPv6",
        ),
    ] {
        let error = endpoints.attach(name(who), request).await.expect_err(expected);
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(error.class(), class, "{error}");
    }
    assert_eq!((host.stored_json(), host.kernel.port_specs()), before);
    // The holder's namespace is gone, so its name is free.
    host.kernel.remove_netns("/ns/a");
    endpoints.attach(name("a"), attach_request("/ns/b")).await.unwrap();
    assert_eq!(host.kernel.port_specs().len(), 1);
}

#[tokio::test]
async fn full_subnet_rejects_without_allocating_other_family() {
    let host = TestHost::new(&["/ns/a", "/ns/b", "/ns/c"]);
    let endpoints = host.start("10.244.1.4-30&fd00:10:244:1::-64").await;
    endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    let error = endpoints.attach(name("b"), attach_request("/ns/b")).await.unwrap_err();
    assert!(error.to_string().starts_with("subnet 10.244.1.4/30 is full: 1 addresses in use"), "{error}");
    assert_eq!(error.class(), ErrorClass::Conflict);
    endpoints.detach(name("a"), false).await.unwrap();
    let again = endpoints.attach(name("c"), attach_request("/ns/c")).await.unwrap();
    assert_eq!(again.endpoint.addresses().v4.unwrap().to_string(), "10.244.1.6");
    assert_eq!(again.endpoint.addresses().v6.unwrap().to_string(), "fd00:10:244:1::3");
}

#[tokio::test]
async fn kernel_error_leaves_nothing_behind() {
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    host.kernel.fail_attaches(1);
    let error = endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap_err();
    assert!(error.to_string().contains("endpoint a: attach failed"), "{error}");
    assert_eq!(error.class(), ErrorClass::Internal);
    assert!(host.kernel.port_specs().is_empty() && endpoints.list().is_empty() && !host.stored_json().contains("\"a\""));
    // Both attach and detach fail: the audit or the next attach removes the leftover.
    for cleared_by_audit in [true, false] {
        host.kernel.fail_attaches(1);
        host.kernel.fail_detaches_after(1);
        endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap_err();
        assert!(endpoints.list().is_empty() && host.stored_json().contains("\"a\""));
        host.kernel.clear_failures();
        if cleared_by_audit {
            assert!(endpoints.audit().await.is_empty());
            assert!(!host.stored_json().contains("\"a\""));
        } else {
            endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
            assert_eq!(endpoints.list().len(), 1);
        }
    }
}

#[tokio::test]
async fn endpoints_and_address_order_survive_restart() {
    let host = TestHost::new(&["/ns/a", "/ns/b", "/ns/c"]);
    let endpoints = host.start(DUAL).await;
    let a = endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    endpoints.attach(name("b"), attach_request("/ns/b")).await.unwrap();
    endpoints.detach(name("b"), false).await.unwrap();
    endpoints.close().await;
    assert!(matches!(endpoints.attach(name("b"), attach_request("/ns/b")).await, Err(EndpointError::ShuttingDown)));
    drop(endpoints);

    let changes = host.kernel.change_count();
    let endpoints = host.start(DUAL).await;
    assert_eq!(host.kernel.change_count(), changes, "a restart changes nothing in the kernel");
    assert_eq!(endpoints.list(), vec![a.endpoint.clone()]);
    assert_eq!(*endpoints.ports().borrow(), vec![Arc::new(a.endpoint.clone())]);
    assert_eq!(endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap(), a);
    let c = endpoints.attach(name("c"), attach_request("/ns/c")).await.unwrap();
    assert_eq!(c.endpoint.addresses().v4.unwrap().to_string(), "10.244.1.4");
}

#[tokio::test]
async fn missing_netns_is_detached_at_second_audit() {
    let host = TestHost::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    endpoints.attach(name("b"), attach_request("/ns/b")).await.unwrap();
    host.kernel.remove_netns("/ns/a");
    let ports = endpoints.ports();
    assert!(endpoints.audit().await.is_empty());
    assert_eq!((endpoints.list().len(), ports.borrow().len()), (2, 1), "its port vanished with the namespace");
    host.kernel.restore_netns("/ns/a");
    assert!(endpoints.audit().await.is_empty());
    assert_eq!(ports.borrow().len(), 2);
    // If a namespace exists again at the same path, as after a reboot, an attach recognizes it at once.
    host.kernel.remove_netns("/ns/a");
    assert!(endpoints.audit().await.is_empty());
    host.kernel.restore_netns("/ns/a");
    endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    assert_eq!(ports.borrow().len(), 2);
    host.kernel.remove_netns("/ns/a");
    endpoints.close().await;
    drop(endpoints);
    // The start performs the first audit.
    let endpoints = host.start(DUAL).await;
    assert_eq!(endpoints.list().len(), 2);
    assert_eq!(endpoints.audit().await, vec![name("a")]);
    assert_eq!(endpoints.list().len(), 1);
    assert_eq!(host.kernel.port_specs().len(), 1);
}

#[tokio::test]
async fn audits_run_only_while_endpoints_exist() {
    const INTERVAL: Duration = Duration::from_millis(10);
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    let stop = CancellationToken::new();
    let task = tokio::spawn({
        let (endpoints, stop) = (endpoints.clone(), stop.clone());
        async move { endpoints.audit_every(INTERVAL, stop).await }
    });
    for _ in 0..2 {
        // Long enough to become idle.
        tokio::time::sleep(INTERVAL * 3).await;
        assert!(endpoints.is_idle());
        endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
        host.kernel.remove_netns("/ns/a");
        let gone = async {
            while !endpoints.list().is_empty() || !endpoints.is_idle() {
                tokio::time::sleep(INTERVAL).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), gone).await.expect("the audits find it");
        host.kernel.restore_netns("/ns/a");
    }
    stop.cancel();
    task.await.unwrap();
}

#[tokio::test]
async fn subnet_change_makes_endpoints_stale_but_detachable() {
    let host = TestHost::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start("10.244.1.0-24").await;
    endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    endpoints.set_network(None);
    assert!(endpoints.stale().is_empty());
    endpoints.set_network(Some(network("10.244.9.0-24")));
    assert_eq!(endpoints.stale().len(), 1);
    let error = endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap_err().to_string();
    assert!(error.contains("endpoint a has 10.244.1.2, outside the present subnet 10.244.9.0/24"), "{error}");
    let b = endpoints.attach(name("b"), attach_request("/ns/b")).await.unwrap();
    assert_eq!(b.endpoint.addresses().v4.unwrap().to_string(), "10.244.9.2");
    endpoints.detach(name("a"), false).await.unwrap();
    let a = endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    assert_eq!(a.endpoint.addresses().v4.unwrap().to_string(), "10.244.9.3");
    assert!(endpoints.stale().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_attaches_get_unique_addresses() {
    let namespaces: Vec<String> = (0..200).map(|i| format!("/ns/{i}")).collect();
    let host = TestHost::new(&namespaces.iter().map(String::as_str).collect::<Vec<_>>());
    let endpoints = host.start(DUAL).await;
    let mut all = JoinSet::new();
    for i in 0..200 {
        // Each name is attached twice at the same time.
        for _ in 0..2 {
            let endpoints = endpoints.clone();
            all.spawn(
                async move { endpoints.attach(name(&format!("c{i}")), attach_request(&format!("/ns/{i}"))).await.unwrap() },
            );
        }
    }
    let attached = all.join_all().await;
    let distinct = |of: fn(&AttachResponse) -> String| attached.iter().map(of).collect::<BTreeSet<_>>().len();
    assert_eq!(distinct(|a| a.endpoint.addresses().v4.unwrap().to_string()), 200);
    assert_eq!(distinct(|a| a.endpoint.addresses().v6.unwrap().to_string()), 200);
    assert_eq!(distinct(|a| a.endpoint.port.as_ref().unwrap().mac.to_string()), 200);
    assert_eq!(distinct(|a| a.endpoint.port.as_ref().unwrap().host_interface.clone()), 200);
    assert_eq!(host.kernel.port_specs().len(), 200);
    let mut all = JoinSet::new();
    for endpoint in endpoints.list() {
        let endpoints = endpoints.clone();
        all.spawn(async move { endpoints.detach(endpoint.name, false).await.unwrap() });
    }
    all.join_all().await;
    assert!(host.kernel.port_specs().is_empty());
    assert!(lock(&endpoints.0.name_locks).len() <= MAX_CONCURRENT + 200);
}

#[tokio::test]
async fn client_disconnect_does_not_abort_attach() {
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    let gate = host.kernel.block_before_attach();
    tokio::select! {
        response = endpoints.attach(name("a"), attach_request("/ns/a")) => panic!("{response:?}"),
        () = host.kernel.wait_blocked() => {}
    }
    gate.add_permits(1);
    endpoints.close().await;
    assert_eq!(endpoints.list().len(), 1);
    assert_eq!(host.kernel.port_specs().len(), 1);
}

#[tokio::test]
async fn attach_waits_for_rules() {
    let host = TestHost::new(&["/ns/a", "/ns/b", "/ns/c", "/ns/d"]);
    let endpoints = host.start(DUAL).await;
    let applied = endpoints.applied_endpoints();
    let mut ports = endpoints.ports();
    let client = endpoints.clone();
    let attach = tokio::spawn(async move { client.attach(name("a"), attach_request("/ns/a")).await });
    ports.wait_for(|all| !all.is_empty()).await.unwrap();
    // If the source filter was applied with the port, an attach waits for published ports only. It also proves that the earlier
    // one is not just slow.
    host.kernel.apply_source_filter();
    endpoints.attach(name("b"), attach_request("/ns/b")).await.unwrap();
    assert!(!attach.is_finished());
    applied.send_replace(endpoints.ports().borrow().clone());
    attach.await.unwrap().unwrap();
    let publishes = AttachRequest { publish: vec!["80:80".parse().unwrap()], ..attach_request("/ns/c") };
    let client = endpoints.clone();
    let attach = tokio::spawn(async move { client.attach(name("c"), publishes).await });
    ports.wait_for(|all| all.len() == 3).await.unwrap();
    endpoints.attach(name("d"), attach_request("/ns/d")).await.unwrap();
    assert!(!attach.is_finished());
    applied.send_replace(endpoints.ports().borrow().clone());
    attach.await.unwrap().unwrap();
    // An endpoint without a port on the bridge does not wait.
    let host_mode = AttachRequest { mode: crate::model::Mode::Host, ..AttachRequest::default() };
    endpoints.attach(name("h"), host_mode).await.unwrap();
}

#[tokio::test]
async fn panic_in_attach_leaves_name_usable() {
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    host.kernel.panic_on_next_attach();
    let error = endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap_err();
    assert!(matches!(error, EndpointError::Internal { .. }), "{error}");
    endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    assert_eq!(endpoints.list().len(), 1);
}

#[tokio::test]
async fn attach_beyond_bridge_port_limit_is_rejected() {
    let namespaces: Vec<String> = (0..=MAX_BRIDGE_PORTS).map(|number| format!("/ns/{number}")).collect();
    let host = TestHost::new(&namespaces.iter().map(String::as_str).collect::<Vec<_>>());
    let endpoints = host.start("10.244.0.0-21").await;
    for (number, netns) in namespaces[1..].iter().enumerate() {
        endpoints.attach(name(&format!("c{number}")), attach_request(netns)).await.unwrap();
    }
    let before = host.kernel.port_specs();
    let error = endpoints.attach(name("late"), attach_request(&namespaces[0])).await.unwrap_err();
    assert!(error.to_string().contains("bridge uses all 1023 ports that the kernel allows"), "{error}");
    assert_eq!((error.class(), host.kernel.port_specs().len()), (ErrorClass::Conflict, before.len()));
    endpoints.detach(name("c7"), false).await.unwrap();
    endpoints.attach(name("late"), attach_request(&namespaces[0])).await.unwrap();
    // The port of an endpoint whose namespace is gone is reclaimed.
    host.kernel.remove_netns(&namespaces[1]);
    endpoints.attach(name("later"), attach_request(&namespaces[8])).await.unwrap();
}
