//! Tests of desired state, entry by entry.

mod isolated;

use std::collections::BTreeSet;

use super::*;
use crate::model::peer::RemoteSubnet;
use crate::model::{Cidr, NetworkConfig, PeerEndpoint, PerFamily, Subnet};
use crate::plan::nexthop_ids::NexthopIds;
use crate::plan::ruleset::Table;
use crate::plan::shared::{NamespaceFacts, shared_entries};
use crate::plan::state::device_of;
use crate::plan::underlay::Underlay;

fn address(text: &str) -> IpAddr {
    text.parse().expect(text)
}

fn cidr(text: &str) -> Cidr {
    text.parse().expect(text)
}

fn host(config: &str, key: &str) -> HostSpec {
    let network = NetworkConfig::parse(config).expect("a configuration").config;
    let local = network
        .families()
        .map(|family| (family, address(if family == Family::V4 { "192.0.2.1" } else { "2001:db8::1" })))
        .collect();
    HostSpec {
        subnet: Subnet::from_key(key).expect("a key"),
        underlay: Underlay { index: 2, name: "eth0".to_owned(), mtu: 1500, public_ip: local, local },
        backend_data: backend::of(&network).lease_data(&network, &mut |_| Mac([2, 1, 0, 0, 0, 1])),
        bridge_mac: Mac([0xc6, 0xb3, 0xec, 0x32, 0x65, 0x47]),
        network,
        masquerade: true,
        numbered_sets: false,
        tx_checksum: true,
        docker: false,
        ports: Vec::new(),
        reserved: BTreeSet::new(),
        isolation: None,
    }
}

/// All entries of a namespace with this network only, without those of its peers.
fn entries(host: &HostSpec) -> State {
    entries_with(host, &[])
}

fn entries_with(host: &HostSpec, accept_ra_interfaces: &[&str]) -> State {
    let facts = NamespaceFacts {
        forward_drops: vec![Family::V6],
        accept_ra_interfaces: accept_ra_interfaces.iter().map(|name| (*name).to_owned()).collect(),
        uplinks: vec!["eth0".to_owned()],
    };
    let mut state = host.entries(Scope::Host);
    state.extend(shared_entries(&[&host.shared(Scope::Host)], &facts));
    state
}

const V4: &str = r#"{"Network":"10.244.0.0/16"}"#;
const V6: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#;
const DUAL: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#;
const DUAL_KEY: &str = "10.244.7.0-24&fd00:10:244:7::-64";

fn peer() -> Peer {
    let remote = |subnet: &str, public_ip: &str, last: u8| RemoteSubnet {
        subnet: cidr(subnet),
        public_ip: address(public_ip),
        endpoint: Some(PeerEndpoint::Vxlan(Mac([2, 0, 0, 0, 9, last]))),
    };
    Peer {
        remote_subnets: PerFamily {
            v4: Some(remote("10.244.9.0/24", "192.0.2.9", 4)),
            v6: Some(remote("fd00:10:244:9::/64", "2001:db8::9", 6)),
        },
    }
}

fn lines<'a>(entries: impl IntoIterator<Item = (&'a Key, &'a Value)>) -> Vec<String> {
    entries.into_iter().map(|(key, value)| format!("{key} {value}")).collect()
}

#[test]
fn dual_stack_host_has_expected_entries() {
    let wanted = [
        "sysctl net/ipv4/conf/eth0/forwarding 1",
        "sysctl net/ipv4/conf/ovb.1/accept_redirects 0",
        "sysctl net/ipv4/conf/ovb.1/arp_filter 0",
        "sysctl net/ipv4/conf/ovb.1/arp_ignore 0",
        "sysctl net/ipv4/conf/ovb.1/forwarding 1",
        "sysctl net/ipv4/conf/ovb.1/proxy_arp 0",
        "sysctl net/ipv4/conf/ovb.1/proxy_arp_pvlan 0",
        "sysctl net/ipv4/conf/ovb.1/route_localnet 1",
        "sysctl net/ipv4/conf/ovb.1/rp_filter 2",
        "sysctl net/ipv4/conf/ovx.1/accept_redirects 0",
        "sysctl net/ipv4/conf/ovx.1/forwarding 1",
        "sysctl net/ipv4/conf/ovx.1/rp_filter 2",
        "sysctl net/ipv4/ip_forward 1",
        "sysctl net/ipv6/conf/all/forwarding 1",
        "sysctl net/ipv6/conf/ovb.1/accept_ra 0",
        "sysctl net/ipv6/conf/ovb.1/disable_ipv6 0",
        "sysctl net/ipv6/conf/ovb.1/forwarding 1",
        "sysctl net/ipv6/conf/ovx.1/accept_ra 0",
        "sysctl net/ipv6/conf/ovx6.1/accept_ra 0",
        "sysctl net/ipv6/conf/ovx6.1/disable_ipv6 0",
        "sysctl net/ipv6/conf/ovx6.1/forwarding 1",
        "link ovb.1 bridge address c6:b3:ec:32:65:47 mtu 1430 up",
        "link ovx.1 vxlan id 1 local 192.0.2.1 dstport 8472 address 02:01:00:00:00:01 mtu 1450 up",
        "link ovx6.1 vxlan id 1 local 2001:db8::1 dstport 8472 address 02:01:00:00:00:01 mtu 1430 up",
        "link veth7 veth master ovb.1 hairpin on mtu 1430 up",
        "address 10.244.7.0/32 dev ovx.1 present",
        "address fd00:10:244:7::/128 dev ovx6.1 present",
        "address 10.244.7.1/24 dev ovb.1 present",
        "address fd00:10:244:7::1/64 dev ovb.1 present",
        "address fe80::c4b3:ecff:fe32:6547/64 dev ovb.1 present",
        "table inet overlayd 9 chains",
        "table bridge overlayd 4 chains",
        "element of ports4: udp . 53 to 10.244.7.2:5353",
        "element of ports6: udp . 53 to [fd00:10:244:7::2]:5353",
        "element of bound4: 127.0.0.1 . tcp . 80 to 10.244.7.2:8080",
        "element of bound4: 127.0.0.1 . tcp . 81 to 10.244.7.2:8081",
        "element of source4: veth7 . 02:05:00:00:00:07 . 10.244.7.2 present",
        "element of source6: veth7 . 02:05:00:00:00:07 . fd00:10:244:7::2 present",
        "element of source6: veth7 . 02:05:00:00:00:07 . fe80::5:ff:fe00:7 present",
        "accept in the IPv6 FORWARD chain of iptables fd00:10:244::/56",
        "route ::1/128 local dev ovb.1",
        "route unreachable 10.244.1.0/24 present",
        "route unreachable 10.244.2.0/23 present",
        "route unreachable 10.244.4.0/22 present",
        "route unreachable 10.244.8.0/21 present",
        "route unreachable 10.244.16.0/20 present",
        "route unreachable 10.244.32.0/19 present",
        "route unreachable 10.244.64.0/18 present",
        "route unreachable 10.244.128.0/17 present",
        "route unreachable fd00:10:244:1::/64 present",
        "route unreachable fd00:10:244:2::/63 present",
        "route unreachable fd00:10:244:4::/62 present",
        "route unreachable fd00:10:244:8::/61 present",
        "route unreachable fd00:10:244:10::/60 present",
        "route unreachable fd00:10:244:20::/59 present",
        "route unreachable fd00:10:244:40::/58 present",
        "route unreachable fd00:10:244:80::/57 present",
    ];
    let host = HostSpec {
        ports: vec![Arc::new(endpoint_with_ports(&["127.0.0.1:80-81:8080-8081", "53:5353/udp"]))],
        ..host(DUAL, DUAL_KEY)
    };
    assert_eq!(lines(&entries(&host)), wanted);
}

#[test]
fn subnet_of_required_address_has_no_unreachable_route() {
    let unreachable = |reserved: &[&str]| {
        let host = HostSpec { reserved: reserved.iter().map(|text| address(text)).collect(), ..host(DUAL, DUAL_KEY) };
        let ranges =
            lines(&entries(&host)).into_iter().filter_map(|line| Some(line.strip_prefix("route unreachable ")?.to_owned()));
        ranges.filter(|line| line.starts_with("10.244.1") || line.contains(":80")).collect::<Vec<_>>()
    };
    assert_eq!(
        unreachable(&[]),
        ["10.244.1.0/24 present", "10.244.16.0/20 present", "10.244.128.0/17 present", "fd00:10:244:80::/57 present"]
    );
    assert_eq!(unreachable(&["10.244.1.9", "fd00:10:244:ff::1"])[..2], ["10.244.16.0/20 present", "10.244.128.0/17 present"]);
    assert!(!unreachable(&["fd00:10:244:ff::1"]).contains(&"fd00:10:244:80::/57 present".to_owned()));
}

/// Creates an endpoint with these published ports.
fn endpoint_with_ports(published: &[&str]) -> Endpoint {
    let port = Port {
        interface: "eth0".to_owned(),
        host_interface: "veth7".to_owned(),
        mac: Mac([2, 5, 0, 0, 0, 7]),
        addresses: PerFamily { v4: Some(address("10.244.7.2")), v6: Some(address("fd00:10:244:7::2")) },
    };
    let published = published.iter().map(|text| text.parse().expect(text)).collect();
    Endpoint { published, ..Endpoint::on_bridge("web", port) }
}

#[test]
fn changed_entries_omit_unchanged_endpoints() {
    let named = |name: &str, last: u8, published: &[&str]| {
        let mut endpoint = endpoint_with_ports(published);
        let port = endpoint.port.as_mut().expect("a port");
        port.host_interface = format!("veth{last}");
        port.mac = Mac([2, 5, 0, 0, 0, last]);
        Arc::new(Endpoint { name: name.parse().expect(name), ..endpoint })
    };
    let with = |ports: &[&Arc<Endpoint>]| HostSpec { ports: ports.iter().copied().cloned().collect(), ..host(DUAL, DUAL_KEY) };
    let (a, b, c) = (named("a", 1, &[]), named("b", 2, &[]), named("c", 3, &["80:80"]));
    let other_b = named("b", 4, &[]);
    let hosts = [with(&[]), with(&[&a]), with(&[&a, &b]), with(&[&a, &other_b]), with(&[&c]), with(&[&a, &b, &c])];
    let unmasqueraded = HostSpec { masquerade: false, ..with(&[&a, &b]) };
    for from in hosts.iter().chain([&unmasqueraded]) {
        for to in hosts.iter().chain([&unmasqueraded]) {
            let (removed, added) = from.changed_entries(to, Scope::Host);
            // All entries of `from`, minus the old changed entries, plus the new ones, are all entries of `to`.
            let mut state = from.entries(Scope::Host);
            state.retain(|key, _| !removed.contains_key(key));
            state.extend(added);
            assert_eq!(state, to.entries(Scope::Host), "{:?} to {:?}", from.ports, to.ports);
        }
    }
    let (removed, added) = with(&[&a, &b]).changed_entries(&with(&[&a, &other_b]), Scope::Host);
    let interfaces = |state: &State| lines(state).iter().filter(|line| line.starts_with("link")).count();
    assert_eq!((interfaces(&removed), interfaces(&added)), (1, 1));
    assert!(lines(&removed).iter().chain(&lines(&added)).all(|line| !line.contains("veth1")));
}

/// The elements of a host's sets, without those of its peers.
fn elements(host: &HostSpec) -> Vec<String> {
    lines(&entries(host)).into_iter().filter_map(|line| line.strip_prefix("element of ").map(str::to_owned)).collect()
}

#[test]
fn published_port_maps_to_container_per_family() {
    let ports = |published: &str| {
        let host = HostSpec { ports: vec![Arc::new(endpoint_with_ports(&[published]))], ..host(DUAL, DUAL_KEY) };
        elements(&host).into_iter().filter(|line| !line.starts_with("source")).collect::<Vec<_>>()
    };
    for (published, wanted) in [
        ("80:8080/sctp", vec!["ports4: sctp . 80 to 10.244.7.2:8080", "ports6: sctp . 80 to [fd00:10:244:7::2]:8080"]),
        ("0.0.0.0:80:80", vec!["ports4: tcp . 80 to 10.244.7.2:80"]),
        ("[::]:80:80", vec!["ports6: tcp . 80 to [fd00:10:244:7::2]:80"]),
        ("192.0.2.1:80:80", vec!["bound4: 192.0.2.1 . tcp . 80 to 10.244.7.2:80"]),
        ("[::1]:80:80", vec!["bound6: ::1 . tcp . 80 to [fd00:10:244:7::2]:80"]),
    ] {
        assert_eq!(ports(published), wanted, "{published}");
    }
    assert_eq!(ports("1-65535:1-65535").len(), 2 * 65_535);
    assert_eq!(ports("65535:65535").len(), 2);
}

#[test]
fn no_published_ports_means_no_dnat() {
    let rules = |host: &HostSpec| match &entries(host)[&Key::Ruleset(Table::Inet)] {
        Value::Ruleset(rules) => rules.to_string(),
        _ => unreachable!("rules"),
    };
    let quiet = HostSpec { masquerade: false, ports: vec![Arc::new(endpoint_with_ports(&[]))], ..host(DUAL, DUAL_KEY) };
    let text = rules(&quiet);
    assert!(!text.contains(" nat ") && !text.contains("map "), "no conntrack on a host without NAT:\n{text}");
    let sysctl = "sysctl net/ipv4/conf/ovb.1/route_localnet 0".to_owned();
    assert!(lines(&entries(&quiet)).contains(&sysctl));
    let text = rules(&HostSpec { ports: vec![Arc::new(endpoint_with_ports(&["80:80"]))], ..quiet });
    assert!(text.contains("chain prerouting") && text.contains("chain output") && text.contains("chain postrouting"), "{text}");
}

#[test]
fn endpoint_source_is_checked_by_default() {
    let free = Endpoint { source_check: false, ..endpoint_with_ports(&[]) };
    assert_eq!(elements(&HostSpec { ports: vec![Arc::new(free)], ..host(DUAL, DUAL_KEY) }), ["unchecked: veth7 present"]);
    let mut v4 = endpoint_with_ports(&[]);
    v4.port.as_mut().expect("a port").addresses.v6 = None;
    let only = elements(&HostSpec { ports: vec![Arc::new(v4)], ..host(V4, "10.244.7.0-24") });
    assert_eq!(only, ["source4: veth7 . 02:05:00:00:00:07 . 10.244.7.2 present"]);
}

#[test]
fn peer_tunnel_elements_cover_its_subnet() {
    let of = |host: &HostSpec, subnet: &str| {
        let mut peer = peer();
        peer.remote_subnets.v6 = None;
        peer.remote_subnets.v4 = peer.remote_subnets.v4.map(|remote| RemoteSubnet { subnet: cidr(subnet), ..remote });
        let entries = host.peer_entries(&peer);
        let elements = entries.into_iter().filter(|(key, _)| matches!(key, Key::Element(_)));
        elements.map(|(key, _)| key.to_string()).collect::<Vec<_>>()
    };
    let usual = host(V4, "10.244.7.0-24");
    assert_eq!(of(&usual, "10.244.9.0/24"), ["element of peers4: 192.0.2.9 . 10.244.9.0"]);
    assert_eq!(of(&usual, "10.244.8.0/22"), ["element of ranges4: 192.0.2.9 . 10.244.8.0-10.244.11.255"]);
    assert_eq!(of(&usual, "10.244.9.64/26"), ["element of ranges4: 192.0.2.9 . 10.244.9.64-10.244.9.127"]);
    let plain = HostSpec { masquerade: false, ..usual };
    let wanted = ["element of peers4: 192.0.2.9 . 10.244.9.0", "element of hosts4: 192.0.2.9 . 192.0.2.9"];
    assert_eq!(of(&plain, "10.244.9.0/24"), wanted, "it replies to containers from its own address");
}

#[test]
fn peer_has_five_entries_per_family() {
    let mut ids = NexthopIds::default();
    let entries = ids.resolve(host(DUAL, DUAL_KEY).peer_entries(&peer()));
    let wanted = [
        "element of peers4: 192.0.2.9 . 10.244.9.0 present",
        "fdb 02:00:00:00:09:04 dev ovx.1 dst 192.0.2.9",
        "neigh 10.244.9.0 dev ovx.1 lladdr 02:00:00:00:09:04",
        "nexthop id 1442840576 via 10.244.9.0 dev ovx.1",
        "route 10.244.9.0/24 nhid 1442840576",
        "element of peers6: 2001:db8::9 . fd00:10:244:9:: present",
        "fdb 02:00:00:00:09:06 dev ovx6.1 dst 2001:db8::9",
        "neigh fd00:10:244:9:: dev ovx6.1 lladdr 02:00:00:00:09:06",
        "nexthop id 1442840577 via fd00:10:244:9:: dev ovx6.1",
        "route fd00:10:244:9::/64 nhid 1442840577",
    ];
    assert_eq!(lines(entries.iter().map(|(key, value)| (key, value))), wanted);

    let entries = host(V4, "10.244.7.0-24").peer_entries(&peer());
    let wanted = [
        "element of peers4: 192.0.2.9 . 10.244.9.0 present",
        "fdb 02:00:00:00:09:04 dev ovx.1 dst 192.0.2.9",
        "neigh 10.244.9.0 dev ovx.1 lladdr 02:00:00:00:09:04",
        "route 10.244.9.0/24 via 10.244.9.0 dev ovx.1 onlink",
    ];
    assert_eq!(lines(entries.iter().map(|(key, value)| (key, value))), wanted, "only the family of this host's subnet");
}

#[test]
fn entries_fit_keys_and_use_desired_devices() {
    for (config, key) in [(V4, "10.244.7.0-24"), (V6, "fd00:10:244:7::-64"), (DUAL, DUAL_KEY)] {
        let host = host(config, key);
        let mut state = entries(&host);
        state.extend(host.peer_entries(&peer()));
        for (key, value) in &state {
            assert!(key.fits(value), "{key} {value}");
            if let Some(device) = device_of(key, value, &state) {
                assert!(state.contains_key(&Key::Link(device.name().into())), "{key} {value} without {device}");
            }
        }
    }
}

#[test]
fn mtu_leaves_room_for_the_encapsulation() {
    for (config, key, vxlan, bridge) in [
        (V4, "10.244.7.0-24", PerFamily { v4: Some(1450), v6: None }, 1450),
        (V6, "fd00:10:244:7::-64", PerFamily { v4: None, v6: Some(1430) }, 1430),
        (DUAL, DUAL_KEY, PerFamily { v4: Some(1450), v6: Some(1430) }, 1430),
    ] {
        let host = host(config, key);
        let found: PerFamily<u32> = host.families().map(|family| (family, host.family_mtu(family))).collect();
        assert_eq!((found, host.mtu()), (vxlan, bridge), "{config}");
    }
    let set = host(r#"{"Network":"10.244.0.0/16","Backend":{"MTU":9000}}"#, "10.244.7.0-24");
    assert_eq!(set.mtu(), 8950, "the configured underlay MTU counts");
}

#[test]
fn only_host_interfaces_accept_router_advertisements() {
    let sysctls = |config: &str, key: &str, kept: bool| -> Vec<String> {
        let accept_ra: &[&str] = if kept { &["eth0"] } else { &[] };
        lines(&entries_with(&host(config, key), accept_ra)).into_iter().filter(|line| line.contains("accept_ra")).collect()
    };
    let ours = ["sysctl net/ipv6/conf/ovb.1/accept_ra 0", "sysctl net/ipv6/conf/ovx.1/accept_ra 0"];
    assert_eq!(sysctls(V4, "10.244.7.0-24", true), ours, "IPv6 forwarding and the external interface stay unchanged");
    assert!(!sysctls(DUAL, DUAL_KEY, false).iter().any(|line| line.contains("eth0")));
    assert!(sysctls(V6, "fd00:10:244:7::-64", true).contains(&"sysctl net/ipv6/conf/eth0/accept_ra 2".to_owned()));
}

#[test]
fn sysctls_cover_only_network_families() {
    let of = |config: &str, key: &str| -> Vec<String> {
        let wanted = |line: &String| line.starts_with("sysctl") && !line.contains("accept_ra");
        lines(&entries(&host(config, key))).into_iter().filter(wanted).collect()
    };
    assert!(of(V4, "10.244.7.0-24").iter().all(|line| line.contains("net/ipv4/")));
    let v6 = of(V6, "fd00:10:244:7::-64");
    assert!(v6.iter().all(|line| line.contains("net/ipv6/")), "{v6:?}");
    assert!(v6.contains(&"sysctl net/ipv6/conf/ovx6.1/disable_ipv6 0".to_owned()), "{v6:?}");
}

#[test]
fn masquerade_and_offload_follow_settings() {
    let host = HostSpec { masquerade: false, tx_checksum: false, ..host(V4, "10.244.7.0-24") };
    let entries = entries(&host);
    assert!(
        matches!(&entries[&Key::Ruleset(Table::Inet)], Value::Ruleset(rules) if rules.chains.iter().all(|chain| chain.name != "postrouting"))
    );
    let Value::Link(link) = &entries[&Key::Link("ovx.1".into())] else { panic!("a link") };
    assert!(matches!(&link.kind, LinkKind::Vxlan(vxlan) if !vxlan.tx_checksum && !vxlan.learning));
}

#[test]
fn bridge_has_docker_link_local_address() {
    let found = |config: &str, key: &str| {
        let host = HostSpec { docker: true, ..host(config, key) };
        lines(&entries(&host)).contains(&"address fe80::1/64 dev ovb.1 present".to_owned())
    };
    assert!(found(DUAL, DUAL_KEY));
    assert!(!found(V4, "10.244.7.0-24"));
}

/// A second network in the same namespace, with the same hosts.
fn second_network() -> HostSpec {
    let config = r#"{"Network":"10.99.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:99::/56","Backend":{"VNI":7}}"#;
    HostSpec { numbered_sets: true, masquerade: false, ..host(config, "10.99.7.0-24&fd00:99:7::-64") }
}

#[test]
fn two_networks_share_no_key() {
    let networks = [host(DUAL, DUAL_KEY), second_network()];
    let facts = NamespaceFacts { forward_drops: Family::ALL.to_vec(), ..NamespaceFacts::default() };
    let shared = shared_entries(&networks.each_ref().map(|host| host.shared(Scope::Host)).each_ref(), &facts);
    let [first, second] = networks.map(|host| {
        let [a, b, c] = match host.numbered_sets {
            false => ["10.244.9.0/24", "fd00:10:244:9::/64", "10.244.10.0/25"],
            true => ["10.99.9.0/24", "fd00:99:9::/64", "10.99.10.0/25"],
        };
        let mut state = host.entries(Scope::Host);
        for (v4, v6) in [(a, Some(b)), (c, None)] {
            let mut peer = peer();
            peer.remote_subnets.v4.as_mut().expect("IPv4").subnet = cidr(v4);
            peer.remote_subnets.v6 =
                peer.remote_subnets.v6.zip(v6).map(|(remote, v6)| RemoteSubnet { subnet: cidr(v6), ..remote });
            state.extend(host.peer_entries(&peer));
        }
        state
    });
    let parts = [&shared, &first, &second];
    for (i, part) in parts.iter().enumerate() {
        for other in &parts[i + 1..] {
            let common: Vec<&Key> = part.keys().filter(|key| other.contains_key(*key)).collect();
            assert!(common.is_empty(), "{common:?}");
        }
    }
    let accepted = |family, ranges: [&str; 2]| {
        assert_eq!(shared.get(&Key::ForwardAccept(family)), Some(&Value::ForwardAccept(ranges.map(cidr).into())));
    };
    accepted(Family::V4, ["10.99.0.0/16", "10.244.0.0/16"]);
    accepted(Family::V6, ["fd00:10:244::/56", "fd00:99::/56"]);
}

#[test]
fn tunnel_filter_of_two_networks_is_by_vni() {
    let specs = [host(DUAL, DUAL_KEY).shared(Scope::Host), second_network().shared(Scope::Host)];
    let shared = shared_entries(&specs.each_ref(), &NamespaceFacts::default());
    let Some(Value::Ruleset(rules)) = shared.get(&Key::Ruleset(Table::Inet)) else { panic!("rules") };
    let text = rules.to_string();
    let lines_of = |name: &str| {
        let chain = text.split(&format!("\tchain {name} {{\n")).nth(1).and_then(|rest| rest.split("\t}\n").next());
        chain.unwrap_or_default().lines().map(str::trim).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(
        lines_of("vxlan"),
        [
            "iifname \"ovb.1\" counter name \"encapsulation\" drop",
            "iifname \"ovb.7\" counter name \"encapsulation\" drop",
            "@th,96,24 0x1 jump vxlan.1",
            "@th,96,24 0x7 jump vxlan.7",
        ]
    );
    for (vni, sets) in [("1", ["@peers4 ", "@peers6 "]), ("7", ["@peers4.7 ", "@peers6.7 "])] {
        let rules = lines_of(&format!("vxlan.{vni}"));
        assert!(sets.iter().all(|set| rules.iter().any(|rule| rule.contains(set))), "{rules:?}");
        assert_eq!(rules.last().map(String::as_str), Some("counter name \"tunnel\" drop"));
    }
    assert!(!lines_of("vxlan.1").iter().any(|rule| rule.contains(".7")), "{text}");
    // One port for both: each rule for it is there once.
    assert_eq!(lines_of("outgoing").len(), 2, "{text}");
    assert!(lines_of("incoming").contains(&"iifname != \"ovb.*\" accept".to_owned()), "{text}");
}
