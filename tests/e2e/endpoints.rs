//! Containers attached and detached with `overlayctl`: names, requested addresses, conflicts, a full subnet, deleted namespaces.

use overlay_agent::model::api::{AttachResponse, Health, Status};
use overlay_agent::model::{Endpoint, Family};
use overlay_tests::programs::CommandOutput;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT, REPAIR_DEADLINE};
use overlay_tests::{ExpectContext, TestLab, etcd, eventually_true, kernel};
use overlayctl::lab::Families;

#[tokio::test(flavor = "multi_thread")]
async fn endpoint_is_attached_listed_and_detached() {
    let lab = TestLab::one_host(Families::Dual).await;
    let before = kernel::actual_state(&lab, "h1");
    let attached: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "web"]).assert_code(0).json();
    let subnet = lab.status("h1").await.lease.expect_ok("a lease").subnet;
    for (family, range) in subnet.iter() {
        let address = *attached.endpoint.addresses().get(family).expect_ok("an address");
        assert!(range.contains(address));
        assert_eq!(
            (attached.prefix_length.get(family), attached.gateway.get(family)),
            (Some(&range.length()), subnet.gateway(family).as_ref())
        );
        let gateway = subnet.gateway(family).expect_ok("a gateway").to_string();
        kernel::run(&lab, "h1-web", &["ping", "-c", "1", "-W", "2", &gateway]);
    }
    assert_eq!(attached.mtu, Some(1430));
    let inner = kernel::link(&lab, "h1-web", "eth0").expect_ok("eth0");
    assert_eq!(kernel::text(&inner, "address"), attached.endpoint.port.as_ref().expect_ok("a port").mac.to_string());
    assert_eq!(kernel::sysctl(&lab, "h1-web", "ipv6/conf/eth0/accept_ra"), "0");

    // A repeated attach has the same answer.
    let again: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "web"]).assert_code(0).json();
    assert_eq!(again.endpoint, attached.endpoint);
    assert_eq!(lab.endpoints("h1"), std::slice::from_ref(&attached.endpoint));
    let table = lab.ctl("h1", &["endpoints"]).assert_code(0).stdout;
    assert!(table.contains("web") && table.contains(&attached.endpoint.addresses().v4.expect_ok("IPv4").to_string()), "{table}");
    assert_eq!(lab.status("h1").await.endpoints, 1);

    lab.ctl("h1", &["detach", "web"]).assert_code(0);
    assert!(lab.endpoints("h1").is_empty());
    assert!(lab.netns("h1-web").is_err(), "the namespace created by attach is gone");
    assert!(kernel::link(&lab, "h1", &attached.endpoint.port.as_ref().expect_ok("a port").host_interface).is_none());
    assert_eq!(kernel::difference(&kernel::actual_state(&lab, "h1"), &before), "", "the host is unchanged");
    let output = lab.ctl("h1", &["detach", "web"]).assert_code(0);
    assert!(output.stdout.contains("was not attached"), "{}", output.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn requested_addresses_are_assigned_or_refused() {
    let lab = TestLab::one_host(Families::Dual).await;
    let subnet = lab.status("h1").await.lease.expect_ok("a lease").subnet;
    let nth = |family: Family, n: u128| subnet.get(family).and_then(|range| range.nth(n)).expect_ok("an address").to_string();
    let (v4, v6) = (nth(Family::V4, 77), nth(Family::V6, 0x77));
    let attached: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "a", "--ip", &v4, "--ip", &v6]).assert_code(0).json();
    assert_eq!(attached.endpoint.addresses().iter().map(|(_, a)| a.to_string()).collect::<Vec<_>>(), [v4.clone(), v6.clone()]);
    let refused = |ip: &str, wanted: &[&str]| {
        lab.ctl("h1", &["attach", "b", "--ip", ip]).assert_code(1).assert_stderr_contains(wanted);
        assert!(lab.netns("h1-b").is_err(), "no namespace is left behind");
    };
    refused(&v4, &[&v4, "in use by endpoint a", "overlayctl detach a"]);
    refused(&v6, &[&v6, "in use by endpoint a"]);
    refused("192.0.2.1", &["192.0.2.1", "outside this host's subnet"]);
    refused(&nth(Family::V4, 0), &["subnet", "containers can have"]);
    refused(&nth(Family::V4, 1), &["gateway", "containers can have"]);
    refused(&nth(Family::V4, 255), &["broadcast", "containers can have"]);
    lab.ctl("h1", &["attach", "b", "--ip", &v4, "--ip", "10.0.0.1"]).assert_code(2).assert_stderr_contains(&["one IPv4 address"]);
    lab.ctl("h1", &["attach", "../b"]).assert_code(2);
    lab.ctl("h1", &["attach", "b", "--interface", "much-too-long-for-a-name"])
        .assert_code(1)
        .assert_stderr_contains(&["invalid interface name"]);
    // The same name with another requested address.
    let other = nth(Family::V4, 78);
    lab.ctl("h1", &["attach", "a", "--ip", &other])
        .assert_code(1)
        .assert_stderr_contains(&["endpoint a is attached with", &other]);
    assert_eq!(lab.endpoints("h1"), [attached.endpoint]);
}

#[tokio::test(flavor = "multi_thread")]
async fn full_subnet_refuses_attach() {
    let lab = TestLab::up(|options| {
        options.hosts = 1;
        options.containers = 0;
        options.networks.v4 = "10.200.0.0/28".parse().ok();
    })
    .await;
    let subnet = lab.status("h1").await.lease.expect_ok("a lease").subnet.to_string();
    assert!(subnet.ends_with("/30"), "{subnet}");
    // A /30 has four addresses: the subnet's base, the gateway, one container, broadcast.
    lab.ctl("h1", &["attach", "first"]).assert_code(0);
    lab.ctl("h1", &["attach", "second"]).assert_code(1).assert_stderr_contains(&[
        &format!("subnet {subnet} is full"),
        "1 addresses in use",
        "SubnetLen",
    ]);
    lab.ctl("h1", &["detach", "first"]).assert_code(0);
    lab.ctl("h1", &["attach", "second"]).assert_code(0);
    // An endpoint with a deleted namespace occupies no address.
    kernel::run(&lab, "h1", &["ip", "netns", "delete", &lab.layout().namespace("h1-second")]);
    lab.ctl("h1", &["attach", "third"]).assert_code(0);
    assert_eq!(lab.endpoints("h1").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_netns_paths_are_refused() {
    let lab = TestLab::one_host(Families::V4).await;
    let attach = |name: &str, path: &str| -> CommandOutput { lab.ctl("h1", &["attach", name, "--netns", path]) };
    attach("a", "/run/netns/no-such-namespace")
        .assert_code(1)
        .assert_stderr_contains(&["there is no network namespace at", "no-such-namespace"]);
    attach("a", "/etc/passwd").assert_code(1).assert_stderr_contains(&["/etc/passwd"]);
    attach("a", "/tmp").assert_code(1).assert_stderr_contains(&["/tmp"]);
    let own = lab.layout().namespace("h1");
    let output = attach("a", &format!("/run/netns/{own}"));
    assert_eq!(output.code, Some(1), "the host's own namespace is not a container: {}{}", output.stdout, output.stderr);
    assert!(lab.endpoints("h1").is_empty());

    // A user-created namespace, by path; detach keeps it.
    let name = lab.layout().namespace("h1-mine");
    kernel::run(&lab, "h1", &["ip", "netns", "add", &name]);
    attach("mine", &format!("/run/netns/{name}")).assert_code(0);
    attach("other", &format!("/run/netns/{name}")).assert_code(1).assert_stderr_contains(&["belongs to endpoint mine"]);
    lab.ctl("h1", &["detach", "mine"]).assert_code(0);
    assert!(lab.netns("h1-mine").is_ok(), "detach keeps a namespace that attach did not create");
    assert!(kernel::link(&lab, "h1-mine", "eth0").is_none());
}

/// A deleted namespace frees the container's address.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_namespace_can_be_reattached() {
    let lab = TestLab::one_host(Families::V4).await;
    let attached: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "web"]).assert_code(0).json();
    let address = attached.endpoint.addresses().v4.expect_ok("an address").to_string();
    kernel::run(&lab, "h1", &["ip", "netns", "delete", &lab.layout().namespace("h1-web")]);
    eventually_true("the interface disappears with the namespace", CONVERGE_TIMEOUT, || {
        kernel::link(&lab, "h1", &attached.endpoint.port.as_ref().expect_ok("a port").host_interface).is_none()
    })
    .await;
    let healthy = |s: &Status| s.ready && s.problems.is_empty();
    lab.host("h1").wait_status(REPAIR_DEADLINE, "the host is not healthy after a container's end", healthy).await.expect_ok("h1");
    // The same name and address again: both are free.
    let again: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "web", "--ip", &address]).assert_code(0).json();
    assert_eq!(again.endpoint.addresses(), attached.endpoint.addresses());
    kernel::run(&lab, "h1-web", &["ping", "-c", "1", "-W", "2", &again.gateway.v4.expect_ok("a gateway").to_string()]);
    assert_eq!(lab.endpoints("h1").len(), 1);
}

/// The address, MAC and port of a deleted namespace are available at once, also for an agent that knows it only from its state
/// files.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_namespace_frees_address_mac_and_port() {
    let lab = TestLab::one_host(Families::V4).await;
    let web: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "web", "-p", "8080:80"]).assert_code(0).json();
    let address = web.endpoint.addresses().v4.expect_ok("an address").to_string();
    let mac = web.endpoint.port.expect_ok("a port").mac.to_string();
    let delete = |name: &str| kernel::run(&lab, "h1", &["ip", "netns", "delete", &lab.layout().namespace(name)]);
    let attach = |name: &str| lab.ctl("h1", &["attach", name, "-p", "8080:80", "--ip", &address, "--mac", &mac]);
    attach("next").assert_code(1).assert_stderr_contains(&["endpoint web has 8080:80/tcp"]);
    delete("h1-web");
    attach("next").assert_code(0);
    kernel::run(&lab, "h1-next", &["ping", "-c", "1", "-W", "2", &web.gateway.v4.expect_ok("a gateway").to_string()]);
    assert_eq!(lab.endpoints("h1").into_iter().map(|e| e.name.to_string()).collect::<Vec<_>>(), ["next"]);

    lab.host("h1").agent_stop(nix::sys::signal::Signal::SIGKILL).expect_ok("SIGKILL");
    delete("h1-next");
    lab.start_agent("h1").await;
    attach("last").assert_code(0);
    assert_eq!(lab.endpoints("h1").into_iter().map(|e| e.name.to_string()).collect::<Vec<_>>(), ["last"]);
}

/// An address moves to another container with another MAC: clients with the old MAC do not wait.
#[tokio::test(flavor = "multi_thread")]
async fn moved_address_is_reachable_at_once() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    let attach = |name: &str, wanted: &[String]| -> Endpoint {
        let ips = wanted.iter().flat_map(|ip| ["--ip", ip]);
        let arguments: Vec<&str> = ["-o", "json", "attach", name].into_iter().chain(ips).collect();
        lab.ctl("h1", &arguments).assert_code(0).json::<AttachResponse>().endpoint
    };
    let first = attach("a1", &[]);
    let addresses: Vec<String> = first.addresses().iter().map(|(_, address)| address.to_string()).collect();
    let all_reach = |whom: &str| {
        for from in ["h1-c1", "h1", "h2-c1", "h2"] {
            for address in &addresses {
                // Three packets: the kernel enables an IPv6 address in a separate task (`addrconf_dad_work`), possibly after the
                // first one.
                let output = kernel::attempt(&lab, from, &["ping", "-c", "3", "-i", "0.2", "-W", "1", address]);
                let known = kernel::run(&lab, from, &["ip", "neigh"]);
                assert_eq!(
                    output.code,
                    Some(0),
                    "{from} reaches {whom} at {address}: {}{}\n{known}",
                    output.stdout,
                    output.stderr
                );
            }
        }
    };
    all_reach("a1");
    lab.ctl("h1", &["detach", "a1"]).assert_code(0);
    let second = attach("a2", &addresses);
    assert_eq!(second.addresses(), first.addresses());
    assert_ne!(second.port.expect_ok("a port").mac, first.port.expect_ok("a port").mac, "the MACs differ");
    all_reach("a2");
}

/// A container with another network besides the overlay. That network keeps the default route, also after the veth pair is
/// recreated.
#[tokio::test(flavor = "multi_thread")]
async fn second_interface_reaches_overlay_only() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
    })
    .await;
    let name = lab.layout().namespace("h1-two");
    kernel::run(&lab, "h1", &["ip", "netns", "add", &name]);
    let own = "ip link add eth0 type bridge && ip link set eth0 up && ip address add 192.0.2.2/24 dev eth0 && \
               ip address add 2001:db8:2::2/64 dev eth0 nodad && ip route add default via 192.0.2.1 && \
               ip -6 route add default via 2001:db8:2::1";
    kernel::shell(&lab, "h1-two", own);
    let path = format!("/run/netns/{name}");
    let arguments = ["-o", "json", "attach", "two", "--netns", &path, "--interface", "eth1", "--no-default-route"];
    let attached: AttachResponse = lab.ctl("h1", &arguments).assert_code(0).json();
    assert!(!attached.endpoint.default_route && attached.routes.iter().all(|(_, to)| to.length() > 0), "{attached:?}");
    let c1 = lab.endpoints("h2").into_iter().find(|e| e.name.as_str() == "c1").expect_ok("c1").addresses();
    let reached = || {
        for (family, address) in c1.iter() {
            kernel::run(&lab, "h1-two", &["ping", "-c", "1", "-W", "2", &address.to_string()]);
            let flag = if family == Family::V4 { "-4" } else { "-6" };
            let routes = kernel::run(&lab, "h1-two", &["ip", flag, "route", "show", "default"]);
            assert!(routes.contains("dev eth0") && !routes.contains("dev eth1"), "{routes}");
        }
        let view = lab.ctl("h1", &["inspect", "two"]).assert_code(0).stdout;
        assert!(view.contains("in place") && view.contains("default route  off"), "{view}");
    };
    reached();
    let again: AttachResponse = lab.ctl("h1", &arguments).assert_code(0).json();
    assert_eq!(again, attached);
    let default = [&arguments[..8]].concat();
    lab.ctl("h1", &default).assert_code(1).assert_stderr_contains(&["default route off, not default route on"]);

    // The agent is killed, and the veth pair is deleted while no agent runs.
    lab.host("h1").agent_stop(nix::sys::signal::Signal::SIGKILL).expect_ok("SIGKILL");
    kernel::run(&lab, "h1-two", &["ip", "link", "delete", "eth1"]);
    lab.start_agent("h1").await;
    eventually_true("the veth pair is back", CONVERGE_TIMEOUT, || kernel::link(&lab, "h1-two", "eth1").is_some()).await;
    reached();
}

/// Endpoints survive the agent.
#[tokio::test(flavor = "multi_thread")]
async fn endpoints_survive_agent_restart() {
    let lab = TestLab::one_host(Families::V4).await;
    let attached: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "web"]).assert_code(0).json();
    lab.host("h1").agent_stop(nix::sys::signal::Signal::SIGKILL).expect_ok("SIGKILL");
    lab.ctl("h1", &["endpoints"]).assert_code(1).assert_stderr_contains(&["nothing listens"]);
    lab.host("h1").agent_start(&[]).expect_ok("start");
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    assert_eq!(lab.endpoints("h1"), [attached.endpoint]);
    lab.ctl("h1", &["detach", "web"]).assert_code(0);
    assert!(lab.netns("h1-web").is_err());
}

/// The host gets another subnet: its endpoints are unreachable, and the status names those that need a restart.
#[tokio::test(flavor = "multi_thread")]
async fn subnet_change_reports_stale_endpoints() {
    let lab = TestLab::one_host(Families::V4).await;
    lab.ctl("h1", &["attach", "web"]).assert_code(0);
    lab.ctl("h1", &["attach", "alone", "--mode", "none"]).assert_code(0);
    let before = lab.lease_of("h1");
    lab.host("h1").agent_stop(nix::sys::signal::Signal::SIGTERM).expect_ok("stop");
    let other = r#"{"PublicIP":"10.99.7.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}}"#;
    etcd::revoke(&lab, before.lease);
    etcd::put(&lab, &before.key, other);
    lab.host("h1").agent_start(&[]).expect_ok("start");
    let named = |s: &Status| s.problems.iter().any(|p| p.contains("restart them: web"));
    let status = lab.host("h1").wait_status(READY_TIMEOUT, "the endpoint is not named", named).await.expect_ok("h1");
    assert_eq!(status.health, Health::Degraded);
    let view = lab.ctl("h1", &["inspect", "web"]).assert_code(0).stdout;
    assert!(view.contains("outside the present subnet"), "{view}");
    lab.ctl("h1", &["attach", "web"])
        .assert_code(1)
        .assert_stderr_contains(&["outside the present subnet", "overlayctl detach web"]);
    lab.ctl("h1", &["detach", "web"]).assert_code(0);
    let attached: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "web"]).assert_code(0).json();
    let subnet = lab.status("h1").await.lease.expect_ok("a lease").subnet;
    assert!(subnet.get(Family::V4).expect_ok("IPv4").contains(attached.endpoint.addresses().v4.expect_ok("an address")));
    let healthy = |s: &Status| !s.problems.iter().any(|p| p.contains("restart them"));
    lab.host("h1").wait_status(CONVERGE_TIMEOUT, "an endpoint is still named", healthy).await.expect_ok("h1");
}
