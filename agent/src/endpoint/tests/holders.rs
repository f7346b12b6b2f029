//! What an endpoint has whose namespace is gone is given to the next one that asks for it, without waiting for the audit.

use super::modes::{in_mode, publishing};
use super::*;

/// What one request asks for that another one has.
fn requests(netns: &str) -> Vec<(&'static str, AttachRequest)> {
    vec![
        ("address", ask_for(netns, &["10.244.1.77"])),
        ("IPv6 address", ask_for(netns, &["fd00:10:244:1::77"])),
        ("MAC", AttachRequest { mac: Some("02:00:5e:10:00:07".parse().unwrap()), ..ask(netns) }),
        ("TCP port", publishing(netns, &["8080:80"])),
        ("UDP port", publishing(netns, &["8080:80/udp"])),
        ("SCTP port", publishing(netns, &["8080:80/sctp"])),
        ("port of an IPv4 address", publishing(netns, &["192.0.2.7:8080:80"])),
        ("port of an IPv6 address", publishing(netns, &["[2001:db8::7]:8080:80"])),
    ]
}

fn names(endpoints: &Endpoints<FakeKernel>) -> Vec<String> {
    endpoints.list().into_iter().map(|e| e.name.to_string()).collect()
}

#[tokio::test]
async fn what_a_gone_namespace_holds_is_given_to_the_next() {
    for (what, request) in requests("/ns/a") {
        let host = Host::new(&["/ns/a", "/ns/b"]);
        let endpoints = host.start(DUAL).await;
        endpoints.attach(name("a"), request.clone()).await.unwrap();
        let next = AttachRequest { netns: Some("/ns/b".into()), ..request };
        let error = endpoints.attach(name("b"), next.clone()).await.expect_err(what);
        assert_eq!((error.class(), names(&endpoints)), (Class::Conflict, vec!["a".to_owned()]), "{what}: a living one keeps it");
        host.kernel.kill("/ns/a");
        endpoints.attach(name("b"), next).await.expect(what);
        assert_eq!((names(&endpoints), host.kernel.plugs().len()), (vec!["b".to_owned()], 1), "{what}");
        assert_eq!(endpoints.plugged().borrow().len(), 1, "{what}");
    }
}

#[tokio::test]
async fn what_a_gone_namespace_holds_is_given_to_the_next_after_a_restart() {
    for reboot in [false, true] {
        for (what, request) in requests("/ns/a") {
            let host = Host::new(&["/ns/a", "/ns/b"]);
            let endpoints = host.start(DUAL).await;
            endpoints.attach(name("a"), request.clone()).await.unwrap();
            endpoints.close().await;
            drop(endpoints);
            if reboot {
                // Others are at each path.
                host.kernel.replace_namespaces();
            } else {
                host.kernel.kill("/ns/a");
            }
            let endpoints = host.start(DUAL).await;
            endpoints.attach(name("b"), AttachRequest { netns: Some("/ns/b".into()), ..request }).await.expect(what);
            assert_eq!(names(&endpoints), ["b"], "{what}, reboot: {reboot}");
        }
    }
}

#[tokio::test]
async fn one_request_takes_over_from_several() {
    let host = Host::new(&["/ns/a", "/ns/b", "/ns/c", "/ns/d"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), publishing("/ns/a", &["8080:80"])).await.unwrap();
    endpoints.attach(name("b"), publishing("/ns/b", &["8081:80"])).await.unwrap();
    endpoints.attach(name("c"), ask_for("/ns/c", &["10.244.1.77"])).await.unwrap();
    host.kernel.kill("/ns/a");
    host.kernel.kill("/ns/b");
    let wanted =
        AttachRequest { publish: publishing("/ns/d", &["8080-8081:80-81"]).publish, ..ask_for("/ns/d", &["10.244.1.77"]) };
    endpoints.attach(name("d"), wanted.clone()).await.expect_err("one of the three holders lives");
    host.kernel.kill("/ns/c");
    endpoints.attach(name("d"), wanted).await.unwrap();
    assert_eq!(names(&endpoints), ["d"]);
}

#[tokio::test]
async fn full_subnet_gives_the_addresses_of_gone_namespaces() {
    let host = Host::new(&["/ns/a", "/ns/b", "/ns/c"]);
    let endpoints = host.start("10.244.1.4-30").await;
    endpoints.attach(name("a"), ask("/ns/a")).await.unwrap();
    host.kernel.kill("/ns/a");
    endpoints.attach(name("b"), ask("/ns/b")).await.unwrap();
    let error = endpoints.attach(name("c"), ask("/ns/c")).await.unwrap_err();
    assert!(error.to_string().contains("is full: 1 addresses in use"), "{error}");
    assert_eq!(names(&endpoints), ["b"]);
}

#[tokio::test]
async fn namespace_made_again_at_the_same_path_is_free() {
    for held in [ask("/ns/a"), in_mode("none", Some("/ns/a"))] {
        let host = Host::new(&["/ns/a"]);
        let endpoints = host.start(DUAL).await;
        endpoints.attach(name("a"), held.clone()).await.unwrap();
        endpoints.attach(name("b"), ask("/ns/a")).await.expect_err("it is a's");
        host.kernel.replace_namespaces();
        endpoints.attach(name("b"), ask("/ns/a")).await.unwrap();
        assert_eq!(names(&endpoints), ["b"]);
        // The name, with another owner.
        host.kernel.replace_namespaces();
        let other = AttachRequest { owner: Some("cni/net/2/eth0".to_owned()), ..held };
        endpoints.attach(name("b"), other).await.unwrap();
        assert_eq!(endpoints.list()[0].owner.as_deref(), Some("cni/net/2/eth0"));
    }
}

#[tokio::test]
async fn endpoint_plugged_into_a_namespace_made_again_keeps_what_it_has() {
    let host = Host::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), publishing("/ns/a", &["8080:80"])).await.unwrap();
    endpoints.attach(name("s"), in_mode("container:a", None)).await.unwrap();
    host.kernel.replace_namespaces();
    assert!(endpoints.heal().await.is_empty());
    endpoints.attach(name("b"), publishing("/ns/b", &["8080:80"])).await.expect_err("a lives in it");
    endpoints.detach(name("a"), false).await.expect_err("s shares it");
    endpoints.close().await;
    drop(endpoints);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("b"), publishing("/ns/b", &["8080:80"])).await.expect_err("a lives in it");
}

#[tokio::test]
async fn endpoint_of_a_runtime_is_not_plugged_into_a_namespace_made_again() {
    let host = Host::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    let request = AttachRequest { owner: Some("cni/net/1/eth0".to_owned()), ..publishing("/ns/a", &["8080:80"]) };
    let first = endpoints.attach(name("a"), request.clone()).await.unwrap();
    host.kernel.replace_namespaces();
    host.kernel.remove(&first.endpoint.port.as_ref().unwrap().host_interface);
    assert!(endpoints.heal().await.is_empty());
    assert!(host.kernel.plugs().is_empty() && endpoints.plugged().borrow().is_empty());
    let second = endpoints.attach(name("a"), request).await.unwrap();
    assert_ne!(first.endpoint.addresses(), second.endpoint.addresses(), "asked for, it is a new endpoint");
    assert_eq!(host.kernel.plugs().len(), 1);
    host.kernel.replace_namespaces();
    assert!(endpoints.audit().await.is_empty());
    assert_eq!(endpoints.audit().await, [name("a")]);
}

#[tokio::test]
async fn name_attached_anew_is_plugged_at_once() {
    let host = Host::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), ask("/ns/a")).await.unwrap();
    host.kernel.kill("/ns/a");
    // Its port went with its namespace, and somebody noticed.
    assert!(endpoints.heal().await.is_empty() && endpoints.audit().await.is_empty());
    endpoints.attach(name("a"), ask("/ns/b")).await.unwrap();
    assert_eq!(endpoints.plugged().borrow().len(), 1);
    // One look is not two.
    host.kernel.kill("/ns/b");
    assert!(endpoints.audit().await.is_empty());
}

#[tokio::test]
async fn shared_namespace_that_is_gone_is_neither_shared_nor_kept() {
    let host = Host::new(&["/ns/a"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), ask("/ns/a")).await.unwrap();
    endpoints.attach(name("s"), in_mode("container:a", None)).await.unwrap();
    host.kernel.kill("/ns/a");
    let error = endpoints.attach(name("t"), in_mode("container:a", None)).await.unwrap_err();
    assert!(error.to_string().contains("no network namespace at /ns/a"), "{error}");
    // The name of one that shared it.
    host.kernel.revive("/ns/b");
    endpoints.attach(name("s"), ask("/ns/b")).await.unwrap();
    host.kernel.revive("/ns/a");
    endpoints.attach(name("t"), in_mode("container:a", None)).await.unwrap();
    host.kernel.kill("/ns/a");
    let detached = endpoints.detach(name("a"), false).await.unwrap();
    assert_eq!((detached.sharers, names(&endpoints)), (vec![name("t")], vec!["s".to_owned()]));
}

#[tokio::test]
async fn half_detached_endpoint_is_finished_for_the_next() {
    let host = Host::new(&["/ns/a", "/ns/b"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), publishing("/ns/a", &["8080:80"])).await.unwrap();
    host.kernel.refuse_unplugs_after(0);
    endpoints.detach(name("a"), false).await.unwrap_err();
    let error = endpoints.attach(name("b"), publishing("/ns/b", &["8080:80"])).await.unwrap_err();
    assert_eq!(error.class(), Class::Conflict, "{error}");
    host.kernel.refuse_nothing();
    endpoints.attach(name("b"), publishing("/ns/b", &["8080:80"])).await.unwrap();
    assert_eq!(names(&endpoints), ["b"]);
}

#[tokio::test]
async fn two_that_hold_what_the_other_asks_for_do_not_wait_for_each_other() {
    let host = Host::new(&["/ns/a", "/ns/b", "/ns/c", "/ns/d"]);
    let endpoints = host.start(DUAL).await;
    endpoints.attach(name("a"), publishing("/ns/a", &["8080:80"])).await.unwrap();
    endpoints.attach(name("b"), publishing("/ns/b", &["8081:80"])).await.unwrap();
    host.kernel.kill("/ns/a");
    host.kernel.kill("/ns/b");
    let both = async {
        tokio::join!(
            endpoints.attach(name("a"), publishing("/ns/c", &["8081:80"])),
            endpoints.attach(name("b"), publishing("/ns/d", &["8080:80"]))
        )
    };
    let (a, b) = tokio::time::timeout(Duration::from_secs(10), both).await.expect("no deadlock");
    a.unwrap();
    b.unwrap();
    assert_eq!(endpoints.list().len(), 2);
}
