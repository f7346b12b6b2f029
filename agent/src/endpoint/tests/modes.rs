//! Tests of the modes other than overlay, of namespace ids, and of published ports.

use super::*;
use crate::model::Mac;

pub(super) fn mode_request(mode: &str, netns: Option<&str>) -> AttachRequest {
    AttachRequest { mode: mode.parse().expect(mode), netns: netns.map(Into::into), ..AttachRequest::default() }
}

pub(super) fn publish_request(netns: &str, ports: &[&str]) -> AttachRequest {
    AttachRequest { publish: ports.iter().map(|p| p.parse().expect(p)).collect(), ..attach_request(netns) }
}

async fn assert_rejected(
    endpoints: &Endpoints<FakeKernel>,
    endpoint_name: &str,
    request: AttachRequest,
    class: ErrorClass,
    expected: &str,
) {
    let error = endpoints.attach(name(endpoint_name), request).await.expect_err(expected);
    assert!(error.to_string().contains(expected), "{error} lacks {expected}");
    assert_eq!(error.class(), class, "{error}");
}

#[tokio::test]
async fn modes_without_subnet_attach() {
    let host = TestHost::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start("").await;
    let none = endpoints.attach(name("n"), mode_request("none", Some("/ns/a"))).await.unwrap();
    assert_eq!((none.mtu, none.endpoint.port.is_none(), host.kernel.loopbacks()), (None, true, 1));
    let own = endpoints.attach(name("h"), mode_request("host", None)).await.unwrap();
    assert_eq!(own.endpoint.netns.to_str(), Some("/proc/1/ns/net"));
    let shared = endpoints.attach(name("s"), mode_request("container:n", None)).await.unwrap();
    assert_eq!(shared.endpoint.netns.to_str(), Some("/ns/a"));
    // Sharing with an endpoint that shares itself means sharing with the namespace's owner.
    let stacked = endpoints.attach(name("t"), mode_request("container:s", None)).await.unwrap();
    assert_eq!(stacked.endpoint.mode.to_string(), "container:n");
    for (who, request) in [
        ("n", mode_request("none", Some("/ns/a"))),
        ("h", mode_request("host", None)),
        ("s", mode_request("container:n", None)),
        ("t", mode_request("container:s", None)),
    ] {
        endpoints.attach(name(who), request).await.expect("a repeated attach");
    }
    assert!(endpoints.ports().borrow().is_empty(), "none of them has a port on the bridge");
    assert!(host.kernel.port_specs().is_empty());

    let conflict = ErrorClass::Conflict;
    assert_rejected(
        &endpoints,
        "n",
        mode_request("host", None),
        conflict,
        "endpoint n is attached with mode none, not mode host",
    )
    .await;
    assert_rejected(&endpoints, "m", mode_request("none", Some("/ns/a")), conflict, "/ns/a belongs to endpoint n in mode none")
        .await;
    assert_rejected(
        &endpoints,
        "m",
        mode_request("none", Some("/ns/c")),
        ErrorClass::InvalidRequest,
        "no network namespace at /ns/c",
    )
    .await;
    assert_rejected(&endpoints, "m", mode_request("container:x", None), ErrorClass::NotFound, "there is no endpoint x").await;
    assert_rejected(&endpoints, "m", mode_request("container:m", None), ErrorClass::NotFound, "there is no endpoint m").await;
    assert_rejected(
        &endpoints,
        "n",
        mode_request("container:s", None),
        conflict,
        "attached with mode none, not mode container:n",
    )
    .await;
    endpoints.set_network(Some(network("10.244.1.0-24")));
    assert_rejected(
        &endpoints,
        "m",
        attach_request("/ns/a"),
        conflict,
        "/ns/a belongs to endpoint n in mode none: attach with mode container:n",
    )
    .await;
    endpoints.attach(name("o"), attach_request("/ns/b")).await.unwrap();
    assert_rejected(
        &endpoints,
        "m",
        mode_request("none", Some("/ns/b")),
        conflict,
        "/ns/b belongs to endpoint o in mode overlay",
    )
    .await;

    // After a restart.
    let before = endpoints.list();
    endpoints.close().await;
    drop(endpoints);
    let endpoints = host.start("10.244.1.0-24").await;
    assert_eq!(endpoints.list(), before);
    assert!(endpoints.reconcile_ports().await.is_empty() && endpoints.audit().await.is_empty());
}

#[tokio::test]
async fn shared_netns_detach_requires_force() {
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    for sharer in ["s", "t"] {
        endpoints.attach(name(sharer), mode_request("container:a", None)).await.unwrap();
    }
    let error = endpoints.detach(name("a"), false).await.unwrap_err();
    assert!(error.to_string().contains("endpoint a shares its network namespace with s, t"), "{error}");
    assert_eq!((error.class(), endpoints.list().len(), host.kernel.port_specs().len()), (ErrorClass::Conflict, 3, 1));
    assert_eq!(endpoints.detach(name("t"), false).await.unwrap().sharers, []);
    let detached = endpoints.detach(name("a"), true).await.unwrap();
    assert_eq!((detached.endpoint, detached.sharers), (Some(name("a")), vec![name("s")]));
    assert!(endpoints.list().is_empty() && host.kernel.port_specs().is_empty() && !host.stored_json().contains("\"s\""));
    // It does not exist, so no endpoint can start sharing it.
    assert_rejected(&endpoints, "s", mode_request("container:a", None), ErrorClass::NotFound, "there is no endpoint a").await;
}

#[tokio::test]
async fn sharers_are_detached_with_netns() {
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    endpoints.attach(name("s"), mode_request("container:a", None)).await.unwrap();
    endpoints.attach(name("h"), mode_request("host", None)).await.unwrap();
    host.kernel.remove_netns("/ns/a");
    assert!(endpoints.audit().await.is_empty());
    assert_eq!(endpoints.audit().await, [name("a")]);
    assert_eq!(endpoints.list().into_iter().map(|e| e.name).collect::<Vec<_>>(), [name("h")]);
}

#[tokio::test]
async fn reused_pid_is_a_different_netns() {
    const PATH: &str = "/proc/4711/ns/net";
    let host = TestHost::new(&[PATH, "/ns/b"]);
    let endpoints = host.start(DUAL).await;
    let first = endpoints.attach(name("a"), attach_request(PATH)).await.unwrap();
    endpoints.attach(name("s"), mode_request("container:a", None)).await.unwrap();
    endpoints.attach(name("b"), attach_request("/ns/b")).await.unwrap();
    assert_eq!(endpoints.attach(name("a"), attach_request(PATH)).await.unwrap(), first);
    host.kernel.replace_namespaces();
    // The old endpoint's interface is not created in the new namespace.
    host.kernel.remove(&first.endpoint.port.as_ref().unwrap().host_interface);
    assert!(endpoints.reconcile_ports().await.is_empty());
    assert_eq!(host.kernel.port_specs().len(), 1, "b's port, whose path identifies its namespace");
    // An attach of the new namespace creates a new endpoint.
    let second = endpoints.attach(name("a"), attach_request(PATH)).await.unwrap();
    assert_ne!(first.endpoint.addresses(), second.endpoint.addresses());
    assert_eq!(endpoints.list().len(), 2, "endpoints that shared the old one are removed with it");
    host.kernel.replace_namespaces();
    assert!(endpoints.audit().await.is_empty());
    assert_eq!(endpoints.audit().await, [name("a")]);
    assert_rejected(&endpoints, "a", attach_request("/proc/1/ns/net"), ErrorClass::InvalidRequest, "no network namespace").await;
    host.kernel.restore_netns("/proc/1/ns/net");
    assert_rejected(
        &endpoints,
        "a",
        attach_request("/proc/1/ns/net"),
        ErrorClass::InvalidRequest,
        "is the host's own network namespace",
    )
    .await;
}

#[tokio::test]
async fn conflicting_published_ports_are_rejected() {
    let host = TestHost::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start("10.244.1.0-24").await;
    host.kernel.listen("22:22/tcp", "sshd (process 7)");
    let a = endpoints.attach(name("a"), publish_request("/ns/a", &["8081:81", "192.0.2.7:8080:80"])).await.unwrap();
    let texts = |published: &[crate::model::PublishedPort]| published.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(&a.endpoint.published), ["8081:81/tcp", "192.0.2.7:8080:80/tcp"]);
    assert_eq!(endpoints.ports().borrow()[0].published, a.endpoint.published);
    assert!(host.stored_json().contains("8081"), "kept");
    // The order of published ports does not matter.
    let again = endpoints.attach(name("a"), publish_request("/ns/a", &["192.0.2.7:8080:80", "8081:81"])).await.unwrap();
    assert_eq!(again, a);
    let before = (host.stored_json(), host.kernel.port_specs());
    let conflict = ErrorClass::Conflict;
    for (who, ports, class, expected) in [
        ("b", &["8080:80"][..], conflict, "8080:80/tcp cannot be published: endpoint a has 192.0.2.7:8080:80/tcp"),
        ("b", &["8000-8100:1-101"], conflict, "endpoint a has"),
        ("b", &["22:22"], conflict, "22:22/tcp cannot be published: sshd (process 7) listens on 0.0.0.0:22"),
        ("b", &["192.0.2.8:90:90"], ErrorClass::InvalidRequest, "the host has no address 192.0.2.8"),
        ("b", &["[::1]:90:90"], ErrorClass::InvalidRequest, "this host's subnet 10.244.1.0/24 has no IPv6"),
    ] {
        assert_rejected(&endpoints, who, publish_request("/ns/b", ports), class, expected).await;
    }
    let other = "published ports 8081:81/tcp, 192.0.2.7:8080:80/tcp, not published ports 8081:82/tcp";
    assert_rejected(&endpoints, "a", publish_request("/ns/a", &["8081:82"]), conflict, other).await;
    assert_rejected(&endpoints, "a", attach_request("/ns/a"), conflict, "not published ports none").await;
    assert_eq!((host.stored_json(), host.kernel.port_specs()), before);
    for ports in [&["8082:1"][..], &["8080:80/udp"], &["127.0.0.1:8080:1"]] {
        endpoints.attach(name("b"), publish_request("/ns/b", ports)).await.unwrap();
        endpoints.detach(name("b"), false).await.unwrap();
    }
}

#[tokio::test]
async fn wildcard_of_missing_family_has_no_effect() {
    for (subnet, served, missing, specific) in [
        ("10.244.1.0-24", "0.0.0.0:8080:80", "[::]:8080:80", "[2001:db8::7]:8081:80"),
        ("fd00:10:244:1::-64", "[::]:8080:80", "0.0.0.0:8080:80", "192.0.2.7:8081:80"),
    ] {
        let host = TestHost::new(&["/ns/a", "/ns/b", "/ns/c"]);
        let endpoints = host.start(subnet).await;
        // A socket on a family without a subnet does not conflict.
        host.kernel.listen(missing, "sshd (process 7)");
        let both = publish_request("/ns/a", &[served, missing]);
        let a = endpoints.attach(name("a"), both.clone()).await.unwrap();
        assert_eq!(a.endpoint.published.len(), 2, "shown as requested");
        assert_eq!(endpoints.attach(name("a"), both).await.unwrap(), a, "a repeated attach");
        assert_rejected(&endpoints, "b", publish_request("/ns/b", &[served]), ErrorClass::Conflict, "endpoint a has").await;
        assert_rejected(
            &endpoints,
            "b",
            publish_request("/ns/b", &[specific]),
            ErrorClass::InvalidRequest,
            "so no container could reply",
        )
        .await;
        endpoints.detach(name("a"), false).await.unwrap();
        // A wildcard of the missing family alone does not occupy the port.
        endpoints.attach(name("b"), publish_request("/ns/b", &[missing])).await.unwrap();
        endpoints.attach(name("c"), publish_request("/ns/c", &["8080:80"])).await.unwrap();
    }
}

#[tokio::test]
async fn repeated_mapping_is_accepted() {
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    let repeated = publish_request("/ns/a", &["8080:80", "8080:80", "0.0.0.0:8080:80", "[::]:8080:80", "8080-8081:80-81"]);
    let a = endpoints.attach(name("a"), repeated.clone()).await.unwrap();
    assert_eq!(endpoints.attach(name("a"), repeated).await.unwrap(), a);
    let elsewhere = publish_request("/ns/a", &["0.0.0.0:8080:80", "8080:81"]);
    assert_rejected(
        &endpoints,
        "b",
        elsewhere,
        ErrorClass::InvalidRequest,
        "map the same host port to different container ports",
    )
    .await;
}

#[tokio::test]
async fn source_check_and_owner_are_persisted() {
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start("10.244.1.0-24").await;
    let router = AttachRequest { source_check: Some(false), owner: Some("cni/net/1".to_owned()), ..attach_request("/ns/a") };
    let a = endpoints.attach(name("a"), router.clone()).await.unwrap().endpoint;
    assert_eq!((a.source_check, a.owner.as_deref()), (false, Some("cni/net/1")));
    assert_rejected(
        &endpoints,
        "a",
        AttachRequest { source_check: None, ..router.clone() },
        ErrorClass::Conflict,
        "source check off",
    )
    .await;
    assert_rejected(
        &endpoints,
        "a",
        AttachRequest { owner: None, ..router },
        ErrorClass::Conflict,
        "owner cni/net/1, not owner none",
    )
    .await;
    endpoints.close().await;
    drop(endpoints);
    assert_eq!(host.start("10.244.1.0-24").await.list(), [a]);
}

#[tokio::test]
async fn without_default_route_only_overlay_is_routed() {
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    let second = AttachRequest { default_route: Some(false), interface: Some("eth1".to_owned()), ..attach_request("/ns/a") };
    let a = endpoints.attach(name("a"), second.clone()).await.unwrap();
    let routes = || format_routes(host.kernel.port_specs().values().next().unwrap());
    let wanted = ["10.244.0.0/16 via 10.244.1.1", "fd00:10:244::/56 via fd00:10:244:1::1"];
    assert_eq!(routes(), wanted);
    assert_eq!(a.routes.iter().map(|(_, to)| to.to_string()).collect::<Vec<_>>(), ["10.244.0.0/16", "fd00:10:244::/56"]);
    assert_eq!(endpoints.attach(name("a"), second.clone()).await.unwrap(), a);
    let with_one = AttachRequest { default_route: None, ..second };
    assert_rejected(&endpoints, "a", with_one, ErrorClass::Conflict, "default route off, not default route on").await;
    endpoints.close().await;
    drop(endpoints);
    let endpoints = host.start(DUAL).await;
    assert_eq!(endpoints.list(), [a.endpoint]);
    host.kernel.remove(&endpoints.list()[0].port.as_ref().unwrap().host_interface);
    assert!(endpoints.reconcile_ports().await.is_empty());
    assert_eq!(routes(), wanted);
}

#[tokio::test]
async fn subnet_equal_to_network_needs_no_route() {
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start("").await;
    let complete = network("10.244.1.0-24");
    let networks = complete.subnet.iter().collect();
    endpoints.set_network(Some(EndpointNetwork { networks, ..complete }));
    endpoints.attach(name("a"), AttachRequest { default_route: Some(false), ..attach_request("/ns/a") }).await.unwrap();
    assert!(format_routes(host.kernel.port_specs().values().next().unwrap()).is_empty());
}

#[test]
fn older_file_implies_default_route() {
    let port = crate::model::Port {
        interface: "eth0".to_owned(),
        host_interface: "ove1".to_owned(),
        mac: Mac::local([1; 6]),
        addresses: PerFamily::default(),
    };
    let mut older = serde_json::to_value(Endpoint::on_bridge("a", port)).unwrap();
    older.as_object_mut().unwrap().remove("default_route").expect("it is written");
    assert!(serde_json::from_value::<Endpoint>(older).unwrap().default_route);
}

#[tokio::test]
async fn requested_mac_is_unique() {
    let host = TestHost::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start("10.244.1.0-24").await;
    let with = |mac: &str, netns: &str| AttachRequest { mac: Some(mac.parse().unwrap()), ..attach_request(netns) };
    let mac = "02:00:5e:10:00:07";
    let a = endpoints.attach(name("a"), with(mac, "/ns/a")).await.unwrap();
    let port = a.endpoint.port.clone().unwrap();
    assert_eq!((port.mac.to_string().as_str(), host.kernel.port_specs()[&port.host_interface].mac), (mac, port.mac));
    // A request with the same MAC and one without a MAC both match the endpoint.
    assert_eq!(endpoints.attach(name("a"), with(mac, "/ns/a")).await.unwrap(), a);
    assert_eq!(endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap(), a);
    let other = "endpoint a is attached with MAC 02:00:5e:10:00:07, not MAC 02:00:5e:10:00:08";
    assert_rejected(&endpoints, "a", with("02:00:5e:10:00:08", "/ns/a"), ErrorClass::Conflict, other).await;
    assert_rejected(&endpoints, "b", with(mac, "/ns/b"), ErrorClass::Conflict, "in use by endpoint a").await;
    assert_rejected(&endpoints, "b", with("ff:ff:ff:ff:ff:ff", "/ns/b"), ErrorClass::InvalidRequest, "a group address").await;
    let in_none = AttachRequest { mac: Some(port.mac), ..mode_request("none", Some("/ns/b")) };
    assert_rejected(&endpoints, "b", in_none, ErrorClass::InvalidRequest, "does not support a MAC").await;
    endpoints.detach(name("a"), false).await.unwrap();
    endpoints.attach(name("b"), with(mac, "/ns/b")).await.unwrap();
}
