//! Isolated networks: VXLAN devices of the host's namespace in another one, pairs between namespaces, and the namespaces' life.

use std::net::{IpAddr, TcpListener};
use std::path::Path;

use super::support::*;
use crate::kernel::netns::{Netns, NetnsError, named_path};
use crate::kernel::netns_builder::NetnsBuilder;
use crate::kernel::{KernelOptions, delete_network_netns};
use crate::model::{Device, Family, Mac, Vni};
use crate::plan::isolation::{PEER_GATEWAY_V4, peer_link_mac};
use crate::plan::state::{LinkKind, LinkState, PairTarget, Vxlan};
use crate::plan::{Batch, DataPath, Key, Op, OpError, PortDriver, Value};

fn vni(number: u32) -> Vni {
    Vni::try_from(number).expect("a VNI")
}

/// The data path of a network's namespace on the host that is the calling thread's namespace.
async fn open_network(netns: &Netns, underlay: u32) -> Host {
    let host = Some(Netns::current().expect("the host's"));
    Host::open(netns, &KernelOptions { host, ..KernelOptions::default() }, |_| (), underlay).await
}

fn vxlan_state(number: u32, local: &str, underlay: u32, mac: u8) -> LinkState {
    let settings = Vxlan { vni: vni(number), port: 8472, local: ip(local), underlay, learning: false, tx_checksum: true };
    LinkState {
        kind: LinkKind::Vxlan(settings),
        mac: Some(Mac([2, 0, 0, 0, 9, mac])),
        mtu: 1450,
        up: true,
        master: None,
        hairpin: false,
    }
}

fn pair_state(target: Option<PairTarget>) -> LinkState {
    LinkState { kind: LinkKind::Pair(target), mac: None, mtu: 1400, up: true, master: None, hairpin: false }
}

/// What the kernel reports of such a link.
fn found_pair(link: &LinkState) -> LinkState {
    LinkState { mac: None, kind: LinkKind::Pair(None), ..link.clone() }
}

/// A network's VXLAN device with an address, and its way to the other host's device.
fn overlay(device: LinkState, own: u8, other: u8) -> Batch {
    let LinkKind::Vxlan(settings) = &device.kind else { panic!("a vxlan device") };
    let name = Device::vxlan(Family::V4, settings.vni);
    let mac = Mac([2, 0, 0, 0, 9, other]);
    vec![
        set_link(name, device.clone()),
        Op::Set(Key::Address(name, format!("10.5.0.{own}/24").parse().expect("address")), Value::Address),
        Op::Set(Key::Fdb(name, mac), Value::Fdb(format!("10.99.0.{other}").parse().expect("address"))),
        Op::Set(Key::Neigh(name, IpAddr::from([10, 5, 0, other])), Value::Neigh(mac)),
    ]
}

async fn refused(host: &mut Host, op: Op) -> OpError {
    let report = host.kernel.apply(&vec![op]).await;
    report.failed.into_iter().next().expect("refused").1
}

#[test]
fn moved_vxlan_devices_share_the_hosts_socket() {
    let far = TestNetns::new("isofar");
    let networks = ["isoa", "isob"].map(TestNetns::new);
    let far_networks = ["isoc", "isod"].map(TestNetns::new);
    let far_netns = far.netns.clone();
    on_host("isohost", KernelOptions::default(), async |host| {
        let near_netns = Netns::current().expect("own");
        let (near, setup) =
            (NetnsBuilder::open(&near_netns).expect("a socket"), NetnsBuilder::open(&far_netns).expect("a socket"));
        near.delete_link("eth0").expect("deleted");
        near.add_veth("eth0", "eth0", &far_netns).expect("a pair");
        // Other indices than on the near host.
        setup.add_bridge("unused").expect("a bridge");
        for (builder, address) in [(&near, "10.99.0.1/24"), (&setup, "10.99.0.2/24")] {
            builder.add_address("eth0", address.parse().expect("address")).expect("added");
            builder.set_up("eth0").expect("up");
        }
        let (underlay, far_underlay) = (near.link_index("eth0").expect("eth0"), setup.link_index("eth0").expect("eth0"));
        host.drain_events().await;
        let mut opened = Vec::new();
        for (number, (near, far)) in networks.iter().zip(&far_networks).enumerate() {
            let number = 5 + u32::try_from(number).expect("small");
            let mut kernel = open_network(&near.netns, underlay).await;
            let batch = overlay(vxlan_state(number, "10.99.0.1", underlay, 1), 1, 2);
            kernel.apply(&batch).await;
            let found = kernel.dump().await;
            assert!(state_of(&batch).iter().all(|(key, value)| found.get(key) == Some(value)), "{found:#?}");
            kernel.apply(&batch).await;
            kernel.expect_no_events().await;
            opened.push(kernel);
            let options = KernelOptions { host: Some(far_netns.clone()), ..KernelOptions::default() };
            let mut kernel = Host::open(&far.netns, &options, |_| (), far_underlay).await;
            kernel.apply(&overlay(vxlan_state(number, "10.99.0.2", far_underlay, 2), 2, 1)).await;
            opened.push(kernel);
        }
        host.expect_no_events().await;
        assert_eq!(run("ss -Huln").matches(":8472").count(), 1, "one socket for all VNIs");
        let inside = |command: &str| networks[0].netns.run(|| run(command)).expect("inside");
        assert_eq!(inside("ss -Huln"), "");
        // Both networks have the same addresses.
        for network in &networks {
            network.netns.run(|| run("ping -c 1 -W 2 10.5.0.2")).expect("inside");
        }
        for (network, device) in networks.iter().zip(["ovx.5:", "ovx.6:"]) {
            let counters = network.netns.run(|| run("cat /proc/net/dev")).expect("inside");
            let received = counters.split_whitespace().skip_while(|word| *word != device).nth(2);
            assert_eq!(received, Some("1"), "only its own: {counters}");
        }

        // Settings change in place, from inside, also to another external interface of the host.
        let number = |text: String| text.split(':').next().map(str::to_owned);
        let before = number(inside("ip -o link show ovx.5"));
        run("ip link add eth1 type veth peer name far1");
        for command in ["address add 10.99.0.3/24 dev eth0", "link set eth1 up", "link set far1 up"] {
            run(&format!("ip {command}"));
        }
        let eth1 = near.link_index("eth1").expect("eth1");
        let device = Device::vxlan(Family::V4, vni(5));
        let key = Key::Link(device.name().into());
        let settings =
            [("10.99.0.3", underlay, 1400, false), ("10.99.0.3", eth1, 1400, true), ("10.99.0.1", underlay, 1450, true)];
        for (local, underlay, mtu, tx_checksum) in settings {
            let mut wanted = vxlan_state(5, local, underlay, 1);
            wanted.mtu = mtu;
            let LinkKind::Vxlan(vxlan) = &mut wanted.kind else { panic!("a vxlan device") };
            vxlan.tx_checksum = tx_checksum;
            opened[0].apply(&vec![set_link(device, wanted.clone())]).await;
            assert_eq!(link_of(opened[0].dump().await.get(&key)), wanted);
            assert_eq!(number(inside("ip -o link show ovx.5")), before, "the same device");
        }
        opened[0].expect_no_events().await;
        inside("ping -c 1 -W 2 10.5.0.2");
        let mut large = vxlan_state(5, "10.99.0.1", underlay, 1);
        large.mtu = 70_000;
        let error = refused(&mut opened[0], set_link(device, large)).await;
        assert!(error.message.contains("MTU 70000 may be more than"), "{error}");

        // The kernel deletes the device with its external interface, although that is in another namespace.
        near.delete_link("eth0").expect("deleted");
        assert_eq!(opened[0].wait_for_change(&key).await, None);
        let error = refused(&mut opened[0], set_link(device, vxlan_state(5, "10.99.0.1", underlay, 1))).await;
        assert!(error.message.contains(&format!("the external interface (index {underlay}) is gone")), "{error}");
    });
}

#[test]
fn vni_conflict_names_the_hosts_interface() {
    let network = TestNetns::new("isorival");
    on_host("isohost", KernelOptions::default(), async |host| {
        run("ip link add flannel.1 type vxlan id 5 local 10.99.0.1 dev eth0 dstport 8472 nolearning");
        let mut kernel = open_network(&network.netns, host.underlay).await;
        let set = set_link(Device::vxlan(Family::V4, vni(5)), vxlan_state(5, "10.99.0.1", host.underlay, 1));
        let error = refused(&mut kernel, set.clone()).await;
        assert_eq!(error.errno, libc::EEXIST);
        assert!(error.message.contains("VNI 5 on UDP port 8472 is in use by interface flannel.1"), "{error}");
        run("ip link delete flannel.1");
        kernel.apply(&vec![set.clone()]).await;
        let other = TestNetns::new("isoother");
        let error = refused(&mut open_network(&other.netns, host.underlay).await, set).await;
        assert!(error.message.contains("is in use by a device in another network namespace"), "{error}");
    });
}

#[test]
fn transit_is_created_by_the_network_and_shared_with_the_host() {
    let network = TestNetns::new("isonet");
    on_host("isohost", KernelOptions::default(), async |host| {
        let mut inner = open_network(&network.netns, host.underlay).await;
        let transit = Device::transit(vni(5));
        let key = Key::Link(transit.name().into());
        let (inside, outside) = (pair_state(Some(PairTarget::Host)), pair_state(None));
        let (create, adopt) = (set_link(transit, inside.clone()), set_link(transit, outside.clone()));
        let error = refused(host, adopt.clone()).await;
        assert_eq!(error.errno, libc::ENODEV);
        assert!(error.message.contains("interface ovt.5 does not exist yet"), "{error}");

        for (from, what) in [
            ("", "nothing is left"),
            ("ip link add ovt.5 group 22102 type veth peer name other", "the other end is left"),
            ("inside: ip link add ovt.5 group 22102 type veth peer name other", "the own end leads elsewhere"),
        ] {
            match from.strip_prefix("inside: ") {
                Some(command) => drop(network.netns.run(|| run(command)).expect("inside")),
                None if from.is_empty() => {}
                None => drop(run(from)),
            }
            inner.dump().await;
            inner.drain_events().await;
            host.drain_events().await;
            inner.apply(&vec![create.clone()]).await;
            let arrived = link_of(host.wait_for_change(&key).await.as_ref());
            assert!(arrived.kind == LinkKind::Pair(None) && !arrived.up, "{what}: {arrived:?}");
            host.apply(&vec![adopt.clone()]).await;
            for (kernel, wanted) in [(&mut inner, &inside), (host, &outside)] {
                let found = LinkState { mac: None, ..link_of(kernel.dump().await.get(&key)) };
                assert_eq!(found, found_pair(wanted), "{what}");
            }
            let details = run("ip -d link show ovt.5");
            assert!(details.contains("alias overlayd") && details.contains("addrgenmode none"), "{what}: {details}");
            assert_eq!(run("cat /proc/sys/net/ipv6/conf/ovt.5/accept_ra").trim(), "0", "{what}");
            inner.drain_events().await;
            host.drain_events().await;
            // Both sides set their end again: nothing changes.
            let before = run("ip -o link show ovt.5");
            inner.apply(&vec![create.clone()]).await;
            host.apply(&vec![adopt.clone()]).await;
            assert_eq!(run("ip -o link show ovt.5"), before, "{what}");
            inner.expect_no_events().await;
            host.expect_no_events().await;

            // Deleted by another process, and by the network: both ends are gone, and both sides know.
            run("ip link delete ovt.5");
            assert_eq!((inner.wait_for_change(&key).await, host.wait_for_change(&key).await), (None, None), "{what}");
            inner.apply(&vec![create.clone()]).await;
            host.wait_for_change(&key).await;
            inner.apply(&vec![Op::Delete(key.clone(), Value::Link(Box::new(inside.clone())))]).await;
            assert_eq!(host.wait_for_change(&key).await, None, "{what}");
            assert!(host.kernel.local().link("ovt.5").is_none() && inner.kernel.local().link("ovt.5").is_none(), "{what}");
        }

        run("ip link add ovt.5 type bridge");
        let error = refused(&mut inner, create).await;
        assert_eq!(error.errno, libc::EEXIST);
        let wanted = "in the host's network namespace: interface ovt.5 exists and is not managed by overlayd (kind bridge";
        assert!(error.message.starts_with(wanted), "{error}");
    });
}

#[test]
fn peer_link_connects_two_networks() {
    let networks = ["isoleft", "isoright"].map(TestNetns::new);
    on_host("isohost", KernelOptions::default(), async |host| {
        let mut left = open_network(&networks[0].netns, host.underlay).await;
        let mut right = open_network(&networks[1].netns, host.underlay).await;
        let (to_right, to_left) = (Device::peer_link(vni(6)), Device::peer_link(vni(5)));
        let target = |name: &str| LinkState {
            mac: Some(peer_link_mac(vni(5))),
            ..pair_state(Some(PairTarget::Namespace(name.to_owned(), to_left)))
        };
        let error = refused(&mut left, set_link(to_right, target("ovt-none"))).await;
        assert_eq!(error.errno, libc::ENOENT);
        assert!(
            error.message.starts_with("cannot create veth pair ovr.6: ") && error.message.contains("/run/netns/ovt-none"),
            "{error}"
        );
        let neighbour = Op::Set(Key::Neigh(to_right, PEER_GATEWAY_V4.into()), Value::Neigh(peer_link_mac(vni(6))));
        left.apply(&vec![set_link(to_right, target(networks[1].name())), neighbour.clone()]).await;
        let key = Key::Link(to_left.name().into());
        right.wait_for_change(&key).await;
        let end = LinkState { mac: Some(peer_link_mac(vni(6))), ..pair_state(None) };
        right.apply(&vec![set_link(to_left, end.clone())]).await;
        assert_eq!(link_of(right.dump().await.get(&key)), end);
        let found = left.dump().await;
        assert_eq!(link_of(found.get(&Key::Link("ovr.6".into()))).mac, Some(peer_link_mac(vni(5))));
        let Op::Set(key, value) = &neighbour else { panic!("a neighbour") };
        assert_eq!(found.get(key), Some(value));
        left.expect_no_events().await;
        networks[0].netns.run(|| run("ip neigh delete 169.254.127.254 dev ovr.6")).expect("inside");
        assert_eq!(left.wait_for_change(key).await, None);
    });
}

#[test]
fn ports_of_a_network_are_checked_against_the_host() {
    let (network, container) = (TestNetns::new("isonet"), TestNetns::new("isopod"));
    on_host("isohost", KernelOptions::default(), async |host| {
        let ports = open_network(&network.netns, host.underlay).await.kernel.port_manager();
        let listener = TcpListener::bind("10.99.0.1:0").expect("a socket");
        let port = listener.local_addr().expect("an address").port();
        let found = ports.host_ports(&[format!("{port}:1").parse().expect("a port")]).expect("readable");
        assert!(found.sockets.len() == 1 && found.addresses.contains(&ip("10.99.0.1")), "{found:?}");
        let is_refused = |path: &Path| ports.is_host_netns(path);
        assert!(is_refused(Path::new("/proc/thread-self/ns/net")));
        assert!(is_refused(network.netns.path()), "its own");
        assert!(!is_refused(container.netns.path()));
    });
}

/// Socket buffers count only while messages wait. But a host may be in hundreds of networks.
#[test]
fn event_queues_of_a_network_are_small() {
    let network = TestNetns::new("isoqueue");
    on_host("isohost", KernelOptions::default(), async |host| {
        let _kernel = open_network(&network.netns, host.underlay).await;
        // As `skmem:(r0,rb67108864,...)`; the kernel doubles the size for its own use.
        let largest = || {
            let sockets = run("ss -Hf netlink -m");
            sockets.split("rb").filter_map(|text| text.split(',').next()?.parse::<u32>().ok()).max().expect("sockets")
        };
        assert_eq!(largest(), 64 << 20);
        assert_eq!(network.netns.run(largest).expect("inside"), 8 << 20, "that of requests to nf_tables");
    });
}

#[test]
fn namespace_gets_its_lost_name_again() {
    let scratch = TestNetns::new("isoname");
    let (name, netns) = (scratch.name(), &scratch.netns);
    assert!(netns.is_named() && Netns::ensure(name).expect("opened").is_same(netns).expect("same"));
    let id = netns.id().expect("an id");
    netns.run(|| run("ip link add kept type bridge")).expect("inside");
    netns.name_again().expect("it has its name");
    for lose in ["ip netns delete", "umount -l /run/netns/"] {
        let command = if lose.ends_with('/') { format!("{lose}{name}") } else { format!("{lose} {name}") };
        run(&command);
        assert!(!netns.is_named(), "{command}");
        netns.name_again().expect("named again");
        let again = Netns::named(name).expect("named");
        assert!(netns.is_named() && again.id().expect("an id") == id, "{command}");
        assert!(run(&format!("ip -n {name} -br link show kept")).starts_with("kept"), "{command}");
    }
    run(&format!("ip netns delete {name}"));
    let other = Netns::ensure(name).expect("created");
    assert!(!other.is_same(netns).expect("comparable") && !netns.is_named());
    assert!(matches!(netns.name_again(), Err(NetnsError::AlreadyExists { .. })), "never taken from another namespace");
    // What a crash left.
    Netns::delete(name).expect("deleted");
    std::fs::write(named_path(name).expect("a path"), "").expect("a plain file");
    assert!(Netns::ensure(name).expect("created").is_named());
}

#[test]
fn deleted_network_leaves_no_device() {
    let network = TestNetns::new("isogone");
    on_host("isohost", KernelOptions::default(), async |host| {
        let device = Device::vxlan(Family::V4, vni(5));
        let batch = vec![
            set_link(device, vxlan_state(5, "10.99.0.1", host.underlay, 1)),
            set_link(Device::transit(vni(5)), pair_state(Some(PairTarget::Host))),
        ];
        for _ in 0..3 {
            // Open until the end of the loop, so that the kernel cannot free the namespace.
            let held = Netns::ensure(network.name()).expect("a namespace");
            open_network(&held, host.underlay).await.apply(&batch).await;
            host.wait_for_change(&Key::Link("ovt.5".into())).await;
            delete_network_netns(network.name()).expect("deleted");
            assert!(!held.is_named());
            assert_eq!(host.wait_for_change(&Key::Link("ovt.5".into())).await, None);
            let left = held.run(|| run("ip -br link")).expect("inside");
            assert_eq!(left.lines().count(), 1, "{left}");
        }
        delete_network_netns(network.name()).expect("a second deletion succeeds");
    });
}
