//! Resources of an endpoint whose namespace is gone are free for the next attach, before any audit.

use super::modes::{mode_request, publish_request};
use super::*;

/// Requests that conflict with each other, by the resource that they conflict in.
fn requests(netns: &str) -> Vec<(&'static str, AttachRequest)> {
    vec![
        ("address", attach_request_with(netns, &["10.244.1.77"])),
        ("IPv6 address", attach_request_with(netns, &["fd00:10:244:1::77"])),
        ("MAC", AttachRequest { mac: Some("02:00:5e:10:00:07".parse().unwrap()), ..attach_request(netns) }),
        ("TCP port", publish_request(netns, &["8080:80"])),
        ("UDP port", publish_request(netns, &["8080:80/udp"])),
        ("SCTP port", publish_request(netns, &["8080:80/sctp"])),
        ("port of an IPv4 address", publish_request(netns, &["192.0.2.7:8080:80"])),
        ("port of an IPv6 address", publish_request(netns, &["[2001:db8::7]:8080:80"])),
    ]
}

fn names(endpoints: &Endpoints<FakeKernel>) -> Vec<String> {
    endpoints.list().into_iter().map(|e| e.name.to_string()).collect()
}

#[tokio::test]
async fn missing_netns_releases_resources_to_next_attach() {
    for (what, request) in requests("/ns/a") {
        let host = TestHost::new(&["/ns/a", "/ns/b"]);
        let endpoints = host.start(DUAL).await;
        endpoints.attach(name("a"), request.clone()).await.unwrap();
        let next = AttachRequest { netns: Some("/ns/b".into()), ..request };
        let error = endpoints.attach(name("b"), next.clone()).await.expect_err(what);
        assert_eq!(
            (error.class(), names(&endpoints)),
            (ErrorClass::Conflict, vec!["a".to_owned()]),
            "{what}: an endpoint with a namespace keeps it"
        );
        host.kernel.remove_netns("/ns/a");
        endpoints.attach(name("b"), next).await.expect(what);
        assert_eq!((names(&endpoints), host.kernel.port_specs().len()), (vec!["b".to_owned()], 1), "{what}");
        assert_eq!(endpoints.ports().borrow().len(), 1, "{what}");
    }
}

#[tokio::test]
async fn missing_netns_releases_resources_after_restart() {
    for reboot in [false, true] {
        for (what, request) in requests("/ns/a") {
            let host = TestHost::new(&["/ns/a", "/ns/b"]);
            let endpoints = host.start(DUAL).await;
            endpoints.attach(name("a"), request.clone()).await.unwrap();
            endpoints.close().await;
            drop(endpoints);
            if reboot {
                // Other namespaces are at each path.
                host.kernel.replace_namespaces();
            } else {
                host.kernel.remove_netns("/ns/a");
            }
            let endpoints = host.start(DUAL).await;
            endpoints.attach(name("b"), AttachRequest { netns: Some("/ns/b".into()), ..request }).await.expect(what);
            assert_eq!(names(&endpoints), ["b"], "{what}, reboot: {reboot}");
        }
    }
}

#[tokio::test]
async fn attach_takes_over_from_several_endpoints() {
    let host = TestHost::new(&["/ns/a", "/ns/b", "/ns/c", "/ns/d"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), publish_request("/ns/a", &["8080:80"])).await.unwrap();
    endpoints.attach(name("b"), publish_request("/ns/b", &["8081:80"])).await.unwrap();
    endpoints.attach(name("c"), attach_request_with("/ns/c", &["10.244.1.77"])).await.unwrap();
    host.kernel.remove_netns("/ns/a");
    host.kernel.remove_netns("/ns/b");
    let wanted = AttachRequest {
        publish: publish_request("/ns/d", &["8080-8081:80-81"]).publish,
        ..attach_request_with("/ns/d", &["10.244.1.77"])
    };
    endpoints.attach(name("d"), wanted.clone()).await.expect_err("one of the three holders is alive");
    host.kernel.remove_netns("/ns/c");
    endpoints.attach(name("d"), wanted).await.unwrap();
    assert_eq!(names(&endpoints), ["d"]);
}

#[tokio::test]
async fn full_subnet_reclaims_addresses_of_missing_netns() {
    let host = TestHost::new(&["/ns/a", "/ns/b", "/ns/c"]);
    let endpoints = host.start("10.244.1.4-30").await;
    endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    host.kernel.remove_netns("/ns/a");
    endpoints.attach(name("b"), attach_request("/ns/b")).await.unwrap();
    let error = endpoints.attach(name("c"), attach_request("/ns/c")).await.unwrap_err();
    assert!(error.to_string().contains("is full: 1 addresses in use"), "{error}");
    assert_eq!(names(&endpoints), ["b"]);
}

#[tokio::test]
async fn recreated_netns_at_same_path_is_free() {
    for held in [attach_request("/ns/a"), mode_request("none", Some("/ns/a"))] {
        let host = TestHost::new(&["/ns/a"]);
        let endpoints = host.start(DUAL).await;
        endpoints.attach(name("a"), held.clone()).await.unwrap();
        endpoints.attach(name("b"), attach_request("/ns/a")).await.expect_err("a uses the namespace");
        host.kernel.replace_namespaces();
        endpoints.attach(name("b"), attach_request("/ns/a")).await.unwrap();
        assert_eq!(names(&endpoints), ["b"]);
        // The same name with another owner.
        host.kernel.replace_namespaces();
        let other = AttachRequest { owner: Some("cni/net/2/eth0".to_owned()), ..held };
        endpoints.attach(name("b"), other).await.unwrap();
        assert_eq!(endpoints.list()[0].owner.as_deref(), Some("cni/net/2/eth0"));
    }
}

#[tokio::test]
async fn endpoint_reattached_to_recreated_netns_keeps_resources() {
    let host = TestHost::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), publish_request("/ns/a", &["8080:80"])).await.unwrap();
    endpoints.attach(name("s"), mode_request("container:a", None)).await.unwrap();
    host.kernel.replace_namespaces();
    assert!(endpoints.reconcile_ports().await.is_empty());
    endpoints.attach(name("b"), publish_request("/ns/b", &["8080:80"])).await.expect_err("a lives in it");
    endpoints.detach(name("a"), false).await.expect_err("s shares it");
    endpoints.close().await;
    drop(endpoints);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("b"), publish_request("/ns/b", &["8080:80"])).await.expect_err("a lives in it");
}

#[tokio::test]
async fn runtime_endpoint_is_not_reattached_to_recreated_netns() {
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    let request = AttachRequest { owner: Some("cni/net/1/eth0".to_owned()), ..publish_request("/ns/a", &["8080:80"]) };
    let first = endpoints.attach(name("a"), request.clone()).await.unwrap();
    host.kernel.replace_namespaces();
    host.kernel.remove(&first.endpoint.port.as_ref().unwrap().host_interface);
    assert!(endpoints.reconcile_ports().await.is_empty());
    assert!(host.kernel.port_specs().is_empty() && endpoints.ports().borrow().is_empty());
    let second = endpoints.attach(name("a"), request).await.unwrap();
    assert_ne!(first.endpoint.addresses(), second.endpoint.addresses(), "an attach creates a new endpoint");
    assert_eq!(host.kernel.port_specs().len(), 1);
    host.kernel.replace_namespaces();
    assert!(endpoints.audit().await.is_empty());
    assert_eq!(endpoints.audit().await, [name("a")]);
}

#[tokio::test]
async fn reattached_name_gets_port_immediately() {
    let host = TestHost::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    host.kernel.remove_netns("/ns/a");
    // Its port vanished with its namespace, and both checks have noticed.
    assert!(endpoints.reconcile_ports().await.is_empty() && endpoints.audit().await.is_empty());
    endpoints.attach(name("a"), attach_request("/ns/b")).await.unwrap();
    assert_eq!(endpoints.ports().borrow().len(), 1);
    // One audit is not enough to detach it.
    host.kernel.remove_netns("/ns/b");
    assert!(endpoints.audit().await.is_empty());
}

#[tokio::test]
async fn missing_shared_netns_is_released() {
    let host = TestHost::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
    endpoints.attach(name("s"), mode_request("container:a", None)).await.unwrap();
    host.kernel.remove_netns("/ns/a");
    let error = endpoints.attach(name("t"), mode_request("container:a", None)).await.unwrap_err();
    assert!(error.to_string().contains("no network namespace at /ns/a"), "{error}");
    // Attach under the name of an endpoint that shared the namespace.
    host.kernel.restore_netns("/ns/b");
    endpoints.attach(name("s"), attach_request("/ns/b")).await.unwrap();
    host.kernel.restore_netns("/ns/a");
    endpoints.attach(name("t"), mode_request("container:a", None)).await.unwrap();
    host.kernel.remove_netns("/ns/a");
    let detached = endpoints.detach(name("a"), false).await.unwrap();
    assert_eq!((detached.sharers, names(&endpoints)), (vec![name("t")], vec!["s".to_owned()]));
}

#[tokio::test]
async fn partial_detach_is_finished_by_next_attach() {
    let host = TestHost::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), publish_request("/ns/a", &["8080:80"])).await.unwrap();
    host.kernel.fail_detaches_after(0);
    endpoints.detach(name("a"), false).await.unwrap_err();
    let error = endpoints.attach(name("b"), publish_request("/ns/b", &["8080:80"])).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Conflict, "{error}");
    host.kernel.clear_failures();
    endpoints.attach(name("b"), publish_request("/ns/b", &["8080:80"])).await.unwrap();
    assert_eq!(names(&endpoints), ["b"]);
}

#[tokio::test]
async fn crossed_attaches_do_not_deadlock() {
    let host = TestHost::new(&["/ns/a", "/ns/b", "/ns/c", "/ns/d"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), publish_request("/ns/a", &["8080:80"])).await.unwrap();
    endpoints.attach(name("b"), publish_request("/ns/b", &["8081:80"])).await.unwrap();
    host.kernel.remove_netns("/ns/a");
    host.kernel.remove_netns("/ns/b");
    let both = async {
        tokio::join!(
            endpoints.attach(name("a"), publish_request("/ns/c", &["8081:80"])),
            endpoints.attach(name("b"), publish_request("/ns/d", &["8080:80"]))
        )
    };
    let (a, b) = tokio::time::timeout(Duration::from_secs(10), both).await.expect("no deadlock");
    a.unwrap();
    b.unwrap();
    assert_eq!(endpoints.list().len(), 2);
}

/// A concurrent attach replaces the holder between the rejection and the look at the holder.
#[tokio::test]
async fn resource_released_since_rejection_is_requested_again() {
    let host = TestHost::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("b"), publish_request("/ns/b", &["8081:80"])).await.unwrap();
    let error = endpoints.attach(name("a"), publish_request("/ns/a", &["8081:80"])).await.unwrap_err();
    assert!(!endpoints.release_dead_holders(&error).await, "b still publishes the port");
    endpoints.detach(name("b"), false).await.unwrap();
    endpoints.attach(name("b"), publish_request("/ns/b", &["8080:80"])).await.unwrap();
    assert!(endpoints.release_dead_holders(&error).await, "b publishes another port now");
}
