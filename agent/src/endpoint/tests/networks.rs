//! Endpoints of two networks on one host: a table each, and what the host has only once.

use super::modes::{mode_request, publish_request};
use super::*;

/// A host in the default network and in `blue`, which have the same addresses.
struct TwoNetworks {
    host: TestHost,
    claims: HostClaims,
    default: Endpoints<FakeKernel>,
    blue: Endpoints<FakeKernel>,
}

impl TwoNetworks {
    async fn start(host: TestHost) -> TwoNetworks {
        let claims = HostClaims::default();
        let restore = async |name: NetworkName, directory: std::path::PathBuf, vni: u32| {
            let state = Arc::new(StateDir::open(&directory).unwrap());
            let endpoints = Endpoints::restore(state, host.kernel.clone(), name, claims.clone()).await.unwrap();
            let bridge = Device::bridge(Vni::try_from(vni).unwrap());
            endpoints.set_network(Some(EndpointNetwork { bridge, ..network(DUAL) }));
            endpoints
        };
        let path = host.directory.path();
        let default = restore(NetworkName::default(), path.to_owned(), 1).await;
        let blue = restore("blue".into(), path.join("blue"), 2).await;
        TwoNetworks { host, claims, default, blue }
    }

    async fn restart(self) -> TwoNetworks {
        let TwoNetworks { host, default, blue, .. } = self;
        default.close().await;
        blue.close().await;
        drop((default, blue));
        TwoNetworks::start(host).await
    }
}

fn on_interface(netns: &str, interface: &str) -> AttachRequest {
    AttachRequest { interface: Some(interface.to_owned()), ..attach_request(netns) }
}

#[tokio::test]
async fn name_is_unique_per_network() {
    let host = TwoNetworks::start(TestHost::new(&["/ns/a"])).await;
    let first = host.default.attach(name("web"), attach_request("/ns/a")).await.unwrap().endpoint;
    let second = host.blue.attach(name("web"), on_interface("/ns/a", "eth1")).await.unwrap().endpoint;
    assert_eq!(first.addresses(), second.addresses());
    let host_end = |endpoint: &Endpoint| endpoint.port.as_ref().unwrap().host_interface.clone();
    assert_ne!(host_end(&first), host_end(&second));
    assert_eq!((first.network, second.network.as_str()), (NetworkName::default(), "blue"));
    assert!(!host.host.stored_json().contains("blue"));

    host.default.detach(name("web"), false).await.unwrap();
    assert_eq!((host.default.list().len(), host.blue.list().len()), (0, 1));
    assert_eq!(host.host.kernel.port_specs().keys().cloned().collect::<Vec<_>>(), [host_end(&second)]);
}

#[tokio::test]
async fn host_resource_is_claimed_across_networks() {
    let host = TwoNetworks::start(TestHost::new(&["/ns/a", "/ns/b", "/ns/n"])).await;
    host.blue.attach(name("web"), publish_request("/ns/a", &["8080:80"])).await.unwrap();
    host.default.attach(name("bare"), mode_request("none", Some("/ns/n"))).await.unwrap();
    let before = (host.host.stored_json(), host.host.kernel.port_specs());
    for (request, expected) in [
        (
            publish_request("/ns/b", &["8000-8090:80-170"]),
            "8000-8090:80-170/tcp cannot be published: endpoint web of network blue has 8080:80/tcp; choose another port, or \
             `overlayctl detach web --network blue` first",
        ),
        (
            attach_request("/ns/a"),
            "interface eth0 in /ns/a belongs to endpoint web of network blue: choose another interface, or `overlayctl detach \
             web --network blue` first",
        ),
        (
            mode_request("none", Some("/ns/a")),
            "/ns/a belongs to endpoint web of network blue in mode overlay: `overlayctl detach web --network blue` first",
        ),
    ] {
        let error = host.default.attach(name("other"), request).await.expect_err(expected);
        assert_eq!((error.to_string().as_str(), error.class()), (expected, ErrorClass::Conflict));
    }
    let error = host.blue.attach(name("other"), attach_request("/ns/n")).await.unwrap_err().to_string();
    assert!(error.starts_with("/ns/n belongs to endpoint bare in mode none: attach with mode container:bare, or"), "{error}");
    assert_eq!((host.host.stored_json(), host.host.kernel.port_specs()), before);

    host.blue.detach(name("web"), false).await.unwrap();
    host.default.attach(name("other"), publish_request("/ns/b", &["8080:80"])).await.unwrap();
    host.blue.attach(name("web"), attach_request("/ns/b")).await.expect_err("eth0 is the default network's");
}

#[tokio::test]
async fn claims_are_restored_with_their_endpoints() {
    let host = TwoNetworks::start(TestHost::new(&["/ns/a", "/ns/b"])).await;
    let web = host.blue.attach(name("web"), publish_request("/ns/a", &["8080:80"])).await.unwrap().endpoint;
    host.default.attach(name("web"), attach_request("/ns/b")).await.unwrap();
    let host = host.restart().await;
    assert_eq!((host.blue.list(), host.default.list().len()), (vec![web], 1));
    let error = host.default.attach(name("other"), publish_request("/ns/b", &["8080:80"])).await.unwrap_err();
    assert!(matches!(error, EndpointError::PublishInUse { .. }), "{error}");

    // A host that leaves a network gives up its claims.
    host.blue.close().await;
    let TwoNetworks { host: _host, claims, default, blue } = host;
    drop(blue);
    assert!(claims.lock().check_published(&"8080:80".parse().unwrap()).is_ok());
    assert_eq!(default.list().len(), 1);
}

#[tokio::test]
async fn missing_netns_releases_claims_of_another_network() {
    let host = TwoNetworks::start(TestHost::new(&["/ns/a", "/ns/b"])).await;
    host.blue.attach(name("web"), publish_request("/ns/a", &["8080:80"])).await.unwrap();
    host.default.attach(name("next"), publish_request("/ns/b", &["8080:80"])).await.expect_err("its holder is alive");
    host.host.kernel.remove_netns("/ns/a");
    host.default.attach(name("next"), publish_request("/ns/b", &["8080:80"])).await.unwrap();
    assert_eq!((host.blue.list(), host.default.list().len()), (Vec::new(), 1));
    assert!(host.blue.ports().borrow().is_empty());
}

#[tokio::test]
async fn concurrent_attaches_claim_a_port_once() {
    let namespaces: Vec<String> = (0..40).map(|number| format!("/ns/{number}")).collect();
    let host = TwoNetworks::start(TestHost::new(&namespaces.iter().map(String::as_str).collect::<Vec<_>>())).await;
    let mut all = JoinSet::new();
    for (number, netns) in namespaces.iter().enumerate() {
        let endpoints = if number % 2 == 0 { host.default.clone() } else { host.blue.clone() };
        let request = publish_request(netns, &["8080:80"]);
        all.spawn(async move { endpoints.attach(name(&format!("c{number}")), request).await.is_ok() });
    }
    assert_eq!(all.join_all().await.into_iter().filter(|attached| *attached).count(), 1);
    assert_eq!(host.default.list().len() + host.blue.list().len(), 1);
}

#[tokio::test]
async fn concurrency_is_limited_for_all_networks_together() {
    let host = TwoNetworks::start(TestHost::new(&["/ns/a"])).await;
    let all = host.claims.permits().acquire_many_owned(MAX_CONCURRENT.try_into().unwrap()).await.unwrap();
    let blue = host.blue.clone();
    let mut attach = tokio::spawn(async move { blue.attach(name("web"), attach_request("/ns/a")).await });
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut attach).await.is_err());
    drop(all);
    attach.await.unwrap().unwrap();
}

#[tokio::test]
async fn network_with_endpoint_or_running_attach_is_not_closed() {
    let host = TwoNetworks::start(TestHost::new(&["/ns/a"])).await;
    let gate = host.host.kernel.block_before_attach();
    let blue = host.blue.clone();
    let attach = tokio::spawn(async move { blue.attach(name("web"), attach_request("/ns/a")).await });
    host.host.kernel.wait_blocked().await;
    assert!(!host.blue.close_if_unused());
    gate.add_permits(1);
    attach.await.unwrap().unwrap();
    assert!(!host.blue.close_if_unused());
    host.host.kernel.unblock();
    host.blue.detach(name("web"), false).await.unwrap();
    assert!(host.blue.close_if_unused());
    let error = host.blue.attach(name("web"), attach_request("/ns/a")).await.unwrap_err();
    assert!(matches!(error, EndpointError::ShuttingDown), "{error}");
    host.default.attach(name("web"), attach_request("/ns/a")).await.unwrap();
}

#[tokio::test]
async fn named_network_has_mode_overlay_only() {
    let host = TwoNetworks::start(TestHost::new(&["/ns/a"])).await;
    host.blue.attach(name("web"), attach_request("/ns/a")).await.unwrap();
    for (mode, netns) in [("host", None), ("none", Some("/ns/a")), ("container:web", None)] {
        let error = host.blue.attach(name("other"), mode_request(mode, netns)).await.unwrap_err();
        let expected = format!("network blue does not support mode {mode}: omit the network, or use mode overlay");
        assert_eq!((error.to_string(), error.class()), (expected, ErrorClass::InvalidRequest));
    }
    let error = host.default.attach(name("other"), mode_request("container:web", None)).await.unwrap_err().to_string();
    assert!(error.starts_with("there is no endpoint web whose network namespace could be shared"), "{error}");
}

#[tokio::test]
async fn audits_of_all_networks_are_due_at_the_same_time() {
    const INTERVAL: Duration = Duration::from_millis(300);
    let host = TwoNetworks::start(TestHost::new(&["/ns/a"])).await;
    let due = host.claims.next_audit(INTERVAL);
    assert_eq!(host.claims.clone().next_audit(INTERVAL), due);
    // The first audit is due before a whole interval has passed since its task started. A busy machine may delay it.
    let is_early = async || {
        host.blue.attach(name("web"), attach_request("/ns/a")).await.unwrap();
        tokio::time::sleep_until(host.claims.next_audit(INTERVAL) + INTERVAL / 2).await;
        host.host.kernel.remove_netns("/ns/a");
        let (stop, started) = (CancellationToken::new(), tokio::time::Instant::now());
        let mut ports = host.blue.ports();
        let audited = tokio::select! {
            () = host.blue.audit_every(INTERVAL, stop) => unreachable!("it is not stopped"),
            audited = ports.wait_for(|ports| ports.is_empty()) => audited.is_ok(),
        };
        host.host.kernel.restore_netns("/ns/a");
        audited && started.elapsed() < INTERVAL
    };
    for _ in 0..20 {
        if is_early().await {
            return;
        }
    }
    panic!("each network audits at times of its own");
}
