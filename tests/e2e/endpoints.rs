//! Containers attached and detached by `overlayctl`, as a person does it: names, wished addresses, what is taken, what is full, what is gone.

use overlay_agent::model::api::{Attached, Health, Status};
use overlay_agent::model::{Endpoint, Family};
use overlay_tests::programs::Said;
use overlay_tests::story::{READY, SECOND, SOON};
use overlay_tests::{Must, Story, etcd, kernel, within};
use overlayctl::lab::Families;

#[tokio::test(flavor = "multi_thread")]
async fn attached_seen_and_detached() {
    let story = Story::one_host(Families::Dual).await;
    let before = kernel::actual(&story, "h1");
    let attached: Attached = story.ctl("h1", &["-o", "json", "attach", "web"]).exits(0).json();
    let subnet = story.status("h1").await.lease.must("a lease").subnet;
    for (family, range) in subnet.iter() {
        let address = *attached.endpoint.addresses().get(family).must("an address");
        assert!(range.contains(address));
        assert_eq!(
            (attached.prefix_length.get(family), attached.gateway.get(family)),
            (Some(&range.length()), subnet.gateway(family).as_ref())
        );
        let gateway = subnet.gateway(family).must("a gateway").to_string();
        kernel::run(&story, "h1-web", &["ping", "-c", "1", "-W", "2", &gateway]);
    }
    assert_eq!(attached.mtu, Some(1430));
    let inner = kernel::link(&story, "h1-web", "eth0").must("eth0");
    assert_eq!(kernel::text(&inner, "address"), attached.endpoint.port.as_ref().must("a port").mac.to_string());
    assert_eq!(kernel::sysctl(&story, "h1-web", "ipv6/conf/eth0/accept_ra"), "0");

    // The same again answers the same.
    let again: Attached = story.ctl("h1", &["-o", "json", "attach", "web"]).exits(0).json();
    assert_eq!(again.endpoint, attached.endpoint);
    assert_eq!(story.endpoints("h1"), std::slice::from_ref(&attached.endpoint));
    let table = story.ctl("h1", &["endpoints"]).exits(0).out;
    assert!(table.contains("web") && table.contains(&attached.endpoint.addresses().v4.must("IPv4").to_string()), "{table}");
    assert_eq!(story.status("h1").await.endpoints, 1);

    story.ctl("h1", &["detach", "web"]).exits(0);
    assert!(story.endpoints("h1").is_empty());
    assert!(story.netns("h1-web").is_err(), "the namespace that attach made is gone");
    assert!(kernel::link(&story, "h1", &attached.endpoint.port.as_ref().must("a port").host_interface).is_none());
    assert_eq!(kernel::difference(&kernel::actual(&story, "h1"), &before), "", "the host is as it was before");
    let said = story.ctl("h1", &["detach", "web"]).exits(0);
    assert!(said.out.contains("was not attached"), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn wishes() {
    let story = Story::one_host(Families::Dual).await;
    let subnet = story.status("h1").await.lease.must("a lease").subnet;
    let nth = |family: Family, n: u128| subnet.get(family).and_then(|range| range.nth(n)).must("an address").to_string();
    let (v4, v6) = (nth(Family::V4, 77), nth(Family::V6, 0x77));
    let attached: Attached = story.ctl("h1", &["-o", "json", "attach", "a", "--ip", &v4, "--ip", &v6]).exits(0).json();
    assert_eq!(attached.endpoint.addresses().iter().map(|(_, a)| a.to_string()).collect::<Vec<_>>(), [v4.clone(), v6.clone()]);
    let refused = |ip: &str, wanted: &[&str]| {
        story.ctl("h1", &["attach", "b", "--ip", ip]).exits(1).complains(wanted);
        assert!(story.netns("h1-b").is_err(), "no namespace is left behind");
    };
    refused(&v4, &[&v4, "in use by endpoint a", "overlayctl detach a"]);
    refused(&v6, &[&v6, "in use by endpoint a"]);
    refused("192.0.2.1", &["192.0.2.1", "outside this host's subnet"]);
    refused(&nth(Family::V4, 0), &["subnet", "for containers"]);
    refused(&nth(Family::V4, 1), &["gateway", "for containers"]);
    refused(&nth(Family::V4, 255), &["broadcast", "for containers"]);
    story.ctl("h1", &["attach", "b", "--ip", &v4, "--ip", "10.0.0.1"]).exits(2).complains(&["one IPv4 address"]);
    story.ctl("h1", &["attach", "../b"]).exits(2);
    story.ctl("h1", &["attach", "b", "--interface", "much-too-long-for-a-name"]).exits(1).complains(&["no interface name"]);
    // The name, with another wish.
    let other = nth(Family::V4, 78);
    story.ctl("h1", &["attach", "a", "--ip", &other]).exits(1).complains(&["endpoint a is attached with", &other]);
    assert_eq!(story.endpoints("h1"), [attached.endpoint]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_subnet() {
    let story = Story::up(|options| {
        options.hosts = 1;
        options.containers = 0;
        options.networks.v4 = "10.200.0.0/28".parse().ok();
    })
    .await;
    let subnet = story.status("h1").await.lease.must("a lease").subnet.to_string();
    assert!(subnet.ends_with("/30"), "{subnet}");
    // A /30 has four addresses: the subnet's own, the gateway's, one container's, broadcast.
    story.ctl("h1", &["attach", "first"]).exits(0);
    story.ctl("h1", &["attach", "second"]).exits(1).complains(&[
        &format!("subnet {subnet} is full"),
        "1 addresses in use",
        "SubnetLen",
    ]);
    story.ctl("h1", &["detach", "first"]).exits(0);
    story.ctl("h1", &["attach", "second"]).exits(0);
    // One whose namespace was deleted takes no address.
    kernel::run(&story, "h1", &["ip", "netns", "delete", &story.layout().namespace("h1-second")]);
    story.ctl("h1", &["attach", "third"]).exits(0);
    assert_eq!(story.endpoints("h1").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_by_path() {
    let story = Story::one_host(Families::V4).await;
    let attach = |name: &str, path: &str| -> Said { story.ctl("h1", &["attach", name, "--netns", path]) };
    attach("a", "/run/netns/no-such-namespace").exits(1).complains(&["there is no network namespace at", "no-such-namespace"]);
    attach("a", "/etc/passwd").exits(1).complains(&["/etc/passwd"]);
    attach("a", "/tmp").exits(1).complains(&["/tmp"]);
    let own = story.layout().namespace("h1");
    let said = attach("a", &format!("/run/netns/{own}"));
    assert_eq!(said.code, Some(1), "the host's own namespace is no container: {}{}", said.out, said.err);
    assert!(story.endpoints("h1").is_empty());

    // One of its own making, by path; detach leaves it.
    let name = story.layout().namespace("h1-mine");
    kernel::run(&story, "h1", &["ip", "netns", "add", &name]);
    attach("mine", &format!("/run/netns/{name}")).exits(0);
    attach("other", &format!("/run/netns/{name}")).exits(1).complains(&["belongs to endpoint mine"]);
    story.ctl("h1", &["detach", "mine"]).exits(0);
    assert!(story.netns("h1-mine").is_ok(), "it was not made by attach");
    assert!(kernel::link(&story, "h1-mine", "eth0").is_none());
}

/// A namespace goes away with its container: the address is free again.
#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_goes_away() {
    let story = Story::one_host(Families::V4).await;
    let attached: Attached = story.ctl("h1", &["-o", "json", "attach", "web"]).exits(0).json();
    let address = attached.endpoint.addresses().v4.must("an address").to_string();
    kernel::run(&story, "h1", &["ip", "netns", "delete", &story.layout().namespace("h1-web")]);
    within("its interface goes with it", SOON, || {
        kernel::link(&story, "h1", &attached.endpoint.port.as_ref().must("a port").host_interface).is_none()
    })
    .await;
    let well = |s: &Status| s.ready && s.problems.is_empty();
    story.at("h1").wait_status(SECOND, "a container's end is no fault of the host", well).await.must("h1");
    // The same name and address again: nobody else has them.
    let again: Attached = story.ctl("h1", &["-o", "json", "attach", "web", "--ip", &address]).exits(0).json();
    assert_eq!(again.endpoint.addresses(), attached.endpoint.addresses());
    kernel::run(&story, "h1-web", &["ping", "-c", "1", "-W", "2", &again.gateway.v4.must("a gateway").to_string()]);
    assert_eq!(story.endpoints("h1").len(), 1);
}

/// What a container has whose namespace was deleted is given to the next one at once, also by an agent that knows it from its files only.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_namespace_holds_neither_address_nor_mac_nor_port() {
    let story = Story::one_host(Families::V4).await;
    let web: Attached = story.ctl("h1", &["-o", "json", "attach", "web", "-p", "8080:80"]).exits(0).json();
    let address = web.endpoint.addresses().v4.must("an address").to_string();
    let mac = web.endpoint.port.must("a port").mac.to_string();
    let delete = |name: &str| kernel::run(&story, "h1", &["ip", "netns", "delete", &story.layout().namespace(name)]);
    let attach = |name: &str| story.ctl("h1", &["attach", name, "-p", "8080:80", "--ip", &address, "--mac", &mac]);
    attach("next").exits(1).complains(&["endpoint web has 8080:80/tcp"]);
    delete("h1-web");
    attach("next").exits(0);
    kernel::run(&story, "h1-next", &["ping", "-c", "1", "-W", "2", &web.gateway.v4.must("a gateway").to_string()]);
    assert_eq!(story.endpoints("h1").into_iter().map(|e| e.name.to_string()).collect::<Vec<_>>(), ["next"]);

    story.at("h1").agent_stop(nix::sys::signal::Signal::SIGKILL).must("SIGKILL");
    delete("h1-next");
    story.start("h1").await;
    attach("last").exits(0);
    assert_eq!(story.endpoints("h1").into_iter().map(|e| e.name.to_string()).collect::<Vec<_>>(), ["last"]);
}

/// An address goes to another container, with another MAC: nobody who knew the old one waits.
#[tokio::test(flavor = "multi_thread")]
async fn address_moved_to_another_container_is_reached_at_once() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    let attach = |name: &str, wanted: &[String]| -> Endpoint {
        let ips = wanted.iter().flat_map(|ip| ["--ip", ip]);
        let arguments: Vec<&str> = ["-o", "json", "attach", name].into_iter().chain(ips).collect();
        story.ctl("h1", &arguments).exits(0).json::<Attached>().endpoint
    };
    let first = attach("a1", &[]);
    let addresses: Vec<String> = first.addresses().iter().map(|(_, address)| address.to_string()).collect();
    let all_reach = |whom: &str| {
        for from in ["h1-c1", "h1", "h2-c1", "h2"] {
            for address in &addresses {
                // More than one: the kernel takes an IPv6 address into use in a task of its own (`addrconf_dad_work`), the first packet may be earlier.
                let said = kernel::attempt(&story, from, &["ping", "-c", "3", "-i", "0.2", "-W", "1", address]);
                let known = kernel::run(&story, from, &["ip", "neigh"]);
                assert_eq!(said.code, Some(0), "{from} reaches {whom} at {address}: {}{}\n{known}", said.out, said.err);
            }
        }
    };
    all_reach("a1");
    story.ctl("h1", &["detach", "a1"]).exits(0);
    let second = attach("a2", &addresses);
    assert_eq!(second.addresses(), first.addresses());
    assert_ne!(second.port.must("a port").mac, first.port.must("a port").mac, "the case is one of two MACs");
    all_reach("a2");
}

/// A container with a network of its own and the overlay beside it: the default route stays that network's, also when the wire is made anew.
#[tokio::test(flavor = "multi_thread")]
async fn second_interface_without_default_route_reaches_the_overlay_only() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    let name = story.layout().namespace("h1-two");
    kernel::run(&story, "h1", &["ip", "netns", "add", &name]);
    let own = "ip link add eth0 type bridge && ip link set eth0 up && ip address add 192.0.2.2/24 dev eth0 && \
               ip address add 2001:db8:2::2/64 dev eth0 nodad && ip route add default via 192.0.2.1 && \
               ip -6 route add default via 2001:db8:2::1";
    kernel::shell(&story, "h1-two", own);
    let path = format!("/run/netns/{name}");
    let arguments = ["-o", "json", "attach", "two", "--netns", &path, "--interface", "eth1", "--no-default-route"];
    let attached: Attached = story.ctl("h1", &arguments).exits(0).json();
    assert!(!attached.endpoint.default_route && attached.routes.iter().all(|(_, to)| to.length() > 0), "{attached:?}");
    let c1 = story.endpoints("h2").into_iter().find(|e| e.name.as_str() == "c1").must("c1").addresses();
    let reached = || {
        for (family, address) in c1.iter() {
            kernel::run(&story, "h1-two", &["ping", "-c", "1", "-W", "2", &address.to_string()]);
            let flag = if family == Family::V4 { "-4" } else { "-6" };
            let routes = kernel::run(&story, "h1-two", &["ip", flag, "route", "show", "default"]);
            assert!(routes.contains("dev eth0") && !routes.contains("dev eth1"), "{routes}");
        }
        let view = story.ctl("h1", &["inspect", "two"]).exits(0).out;
        assert!(view.contains("in place") && view.contains("default route  off"), "{view}");
    };
    reached();
    let again: Attached = story.ctl("h1", &arguments).exits(0).json();
    assert_eq!(again, attached);
    let default = [&arguments[..8]].concat();
    story.ctl("h1", &default).exits(1).complains(&["default route off, not default route on"]);

    // The agent is killed, and the wire is lost while none runs.
    story.at("h1").agent_stop(nix::sys::signal::Signal::SIGKILL).must("SIGKILL");
    kernel::run(&story, "h1-two", &["ip", "link", "delete", "eth1"]);
    story.start("h1").await;
    within("the wire is there again", SOON, || kernel::link(&story, "h1-two", "eth1").is_some()).await;
    reached();
}

/// Endpoints outlive the agent.
#[tokio::test(flavor = "multi_thread")]
async fn over_a_restart() {
    let story = Story::one_host(Families::V4).await;
    let attached: Attached = story.ctl("h1", &["-o", "json", "attach", "web"]).exits(0).json();
    story.at("h1").agent_stop(nix::sys::signal::Signal::SIGKILL).must("SIGKILL");
    story.ctl("h1", &["endpoints"]).exits(1).complains(&["no agent answers"]);
    story.at("h1").agent_start(&[]).must("start");
    story.at("h1").wait_ready(READY).await.must("ready");
    assert_eq!(story.endpoints("h1"), [attached.endpoint]);
    story.ctl("h1", &["detach", "web"]).exits(0);
    assert!(story.netns("h1-web").is_err());
}

/// The host gets another subnet: its endpoints lead nowhere, and the status says which to restart.
#[tokio::test(flavor = "multi_thread")]
async fn another_subnet() {
    let story = Story::one_host(Families::V4).await;
    story.ctl("h1", &["attach", "web"]).exits(0);
    story.ctl("h1", &["attach", "alone", "--mode", "none"]).exits(0);
    let before = story.lease_of("h1");
    story.at("h1").agent_stop(nix::sys::signal::Signal::SIGTERM).must("stop");
    let other = r#"{"PublicIP":"10.99.7.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}}"#;
    etcd::revoke(&story, before.lease);
    etcd::put(&story, &before.key, other);
    story.at("h1").agent_start(&[]).must("start");
    let named = |s: &Status| s.problems.iter().any(|p| p.contains("restart them: web"));
    let status = story.at("h1").wait_status(READY, "the endpoint is named", named).await.must("h1");
    assert_eq!(status.health, Health::Degraded);
    let view = story.ctl("h1", &["inspect", "web"]).exits(0).out;
    assert!(view.contains("outside the present subnet"), "{view}");
    story.ctl("h1", &["attach", "web"]).exits(1).complains(&["outside the present subnet", "overlayctl detach web"]);
    story.ctl("h1", &["detach", "web"]).exits(0);
    let attached: Attached = story.ctl("h1", &["-o", "json", "attach", "web"]).exits(0).json();
    let subnet = story.status("h1").await.lease.must("a lease").subnet;
    assert!(subnet.get(Family::V4).must("IPv4").contains(attached.endpoint.addresses().v4.must("an address")));
    let well = |s: &Status| !s.problems.iter().any(|p| p.contains("restart them"));
    story.at("h1").wait_status(SOON, "none is named any more", well).await.must("h1");
}
