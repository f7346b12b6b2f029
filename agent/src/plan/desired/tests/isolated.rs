//! Entries of isolated networks, in the host's namespace and in their own.

use super::*;
use crate::model::{Device, Vni};
use crate::plan::isolation::{Isolation, PeerNetwork, Transit};
use crate::plan::state::PairTarget;

const BLUE: &str = r#"{"Network":"10.9.0.0/22","EnableIPv6":true,"IPv6Network":"fd00:9::/62","Backend":{"VNI":7}}"#;
const BLUE_V4: &str = r#"{"Network":"10.9.0.0/22","Backend":{"VNI":7}}"#;
const BLUE_V6: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:9::/62","Backend":{"VNI":7}}"#;
const BLUE_KEY: &str = "10.9.1.0-24&fd00:9:0:1::-64";

fn vni(n: u32) -> Vni {
    Vni::try_from(n).expect("a VNI")
}

/// A peer network with a larger VNI, and one with a smaller VNI and IPv4 only.
fn peer_networks() -> Vec<PeerNetwork> {
    let red = PerFamily { v4: Some(cidr("10.20.0.0/16")), v6: Some(cidr("fd00:20::/48")) };
    let green = PerFamily { v4: Some(cidr("10.30.0.0/16")), v6: None };
    [("red", 9, red), ("green", 3, green)]
        .map(|(name, n, ranges)| PeerNetwork { name: name.into(), namespace: format!("ov-{name}"), vni: vni(n), ranges })
        .into()
}

/// The network `blue`, the host's second isolated one.
fn blue(config: &str, key: &str, published: &[&str]) -> HostSpec {
    let mut endpoint = endpoint_with_ports(published);
    endpoint.port.as_mut().expect("a port").addresses =
        PerFamily { v4: Some(address("10.9.1.2")), v6: Some(address("fd00:9:0:1::2")) };
    let isolation = Isolation { transit: Transit::new(1), peers: peer_networks() };
    HostSpec { isolation: Some(isolation), numbered_sets: true, ports: vec![Arc::new(endpoint)], ..host(config, key) }
}

/// All entries of a namespace with this network only, without those of its peers.
fn entries_in(host: &HostSpec, scope: Scope) -> State {
    let facts = NamespaceFacts { forward_drops: Family::ALL.to_vec(), ..NamespaceFacts::default() };
    let mut state = host.entries(scope);
    state.extend(shared_entries(&[&host.shared(scope)], &facts));
    state
}

#[test]
fn namespace_of_isolated_network_has_expected_entries() {
    let host = blue(BLUE, BLUE_KEY, &["127.0.0.1:80:8080", "53:5353/udp"]);
    let wanted = [
        "sysctl net/ipv4/conf/ovb.7/accept_redirects 0",
        "sysctl net/ipv4/conf/ovb.7/arp_filter 0",
        "sysctl net/ipv4/conf/ovb.7/arp_ignore 0",
        "sysctl net/ipv4/conf/ovb.7/forwarding 1",
        "sysctl net/ipv4/conf/ovb.7/proxy_arp 0",
        "sysctl net/ipv4/conf/ovb.7/proxy_arp_pvlan 0",
        "sysctl net/ipv4/conf/ovb.7/route_localnet 0",
        "sysctl net/ipv4/conf/ovb.7/rp_filter 2",
        "sysctl net/ipv4/conf/ovr.3/accept_redirects 0",
        "sysctl net/ipv4/conf/ovr.3/forwarding 1",
        "sysctl net/ipv4/conf/ovr.3/rp_filter 2",
        "sysctl net/ipv4/conf/ovr.9/accept_redirects 0",
        "sysctl net/ipv4/conf/ovr.9/forwarding 1",
        "sysctl net/ipv4/conf/ovr.9/rp_filter 2",
        "sysctl net/ipv4/conf/ovt.7/accept_redirects 0",
        "sysctl net/ipv4/conf/ovt.7/forwarding 1",
        "sysctl net/ipv4/conf/ovt.7/rp_filter 2",
        "sysctl net/ipv4/conf/ovx.7/accept_redirects 0",
        "sysctl net/ipv4/conf/ovx.7/forwarding 1",
        "sysctl net/ipv4/conf/ovx.7/rp_filter 2",
        "sysctl net/ipv4/ip_forward 1",
        "sysctl net/ipv6/conf/all/forwarding 1",
        "sysctl net/ipv6/conf/ovb.7/accept_ra 0",
        "sysctl net/ipv6/conf/ovb.7/disable_ipv6 0",
        "sysctl net/ipv6/conf/ovb.7/forwarding 1",
        "sysctl net/ipv6/conf/ovr.3/accept_ra 0",
        "sysctl net/ipv6/conf/ovr.3/disable_ipv6 0",
        "sysctl net/ipv6/conf/ovr.3/forwarding 1",
        "sysctl net/ipv6/conf/ovr.9/accept_ra 0",
        "sysctl net/ipv6/conf/ovr.9/disable_ipv6 0",
        "sysctl net/ipv6/conf/ovr.9/forwarding 1",
        "sysctl net/ipv6/conf/ovt.7/accept_ra 0",
        "sysctl net/ipv6/conf/ovt.7/disable_ipv6 0",
        "sysctl net/ipv6/conf/ovt.7/forwarding 1",
        "sysctl net/ipv6/conf/ovx.7/accept_ra 0",
        "sysctl net/ipv6/conf/ovx6.7/accept_ra 0",
        "sysctl net/ipv6/conf/ovx6.7/disable_ipv6 0",
        "sysctl net/ipv6/conf/ovx6.7/forwarding 1",
        "link ovb.7 bridge address c6:b3:ec:32:65:47 mtu 1430 up",
        "link ovr.3 veth address 0a:6f:76:00:00:07 mtu 1500 up",
        "link ovr.9 veth address 0a:6f:76:00:00:07 mtu 1500 up",
        "link ovt.7 veth mtu 1500 up",
        "link ovx.7 vxlan id 7 local 192.0.2.1 dstport 8472 address 02:01:00:00:00:01 mtu 1450 up",
        "link ovx6.7 vxlan id 7 local 2001:db8::1 dstport 8472 address 02:01:00:00:00:01 mtu 1430 up",
        "link veth7 veth master ovb.7 mtu 1430 up",
        "address 10.9.1.0/32 dev ovx.7 present",
        "address fd00:9:0:1::/128 dev ovx6.7 present",
        "address 10.9.1.1/24 dev ovb.7 present",
        "address fd00:9:0:1::1/64 dev ovb.7 present",
        "address fe80::c4b3:ecff:fe32:6547/64 dev ovb.7 present",
        "address 169.254.64.3/31 dev ovt.7 present",
        "address fd6f:7665:726c:6179::3/127 dev ovt.7 present",
        "address fe80::2/64 dev ovt.7 present",
        "table inet overlayd 5 chains",
        "table bridge overlayd 4 chains",
        "element of ports4: tcp . 80 to 10.9.1.2:8080",
        "element of ports4: udp . 53 to 10.9.1.2:5353",
        "element of ports6: udp . 53 to [fd00:9:0:1::2]:5353",
        "element of source4: veth7 . 02:05:00:00:00:07 . 10.9.1.2 present",
        "element of source6: veth7 . 02:05:00:00:00:07 . fd00:9:0:1::2 present",
        "element of source6: veth7 . 02:05:00:00:00:07 . fe80::5:ff:fe00:7 present",
        "accept in the IPv4 FORWARD chain of iptables 10.9.0.0/22",
        "accept in the IPv6 FORWARD chain of iptables fd00:9::/62",
        "neigh 169.254.127.254 dev ovr.3 lladdr 0a:6f:76:00:00:03",
        "neigh 169.254.127.254 dev ovr.9 lladdr 0a:6f:76:00:00:09",
        "neigh fd6f:7665:726c:6179::3ffe dev ovr.9 lladdr 0a:6f:76:00:00:09",
        "route 0.0.0.0/0 via 169.254.64.2 dev ovt.7 onlink",
        "route 10.20.0.0/16 via 169.254.127.254 dev ovr.9 onlink",
        "route 10.30.0.0/16 via 169.254.127.254 dev ovr.3 onlink",
        "route ::/0 via fd6f:7665:726c:6179::2 dev ovt.7 onlink",
        "route fd00:20::/48 via fd6f:7665:726c:6179::3ffe dev ovr.9 onlink",
        "route unreachable 10.9.1.0/24 present",
        "route unreachable 10.9.2.0/23 present",
        "route unreachable fd00:9:0:1::/64 present",
        "route unreachable fd00:9:0:2::/63 present",
    ];
    assert_eq!(lines(&entries_in(&host, Scope::Network)), wanted);
}

#[test]
fn host_has_only_the_transit_of_an_isolated_network() {
    let wanted = [
        "sysctl net/ipv4/conf/ovt.7/accept_redirects 0",
        "sysctl net/ipv4/conf/ovt.7/forwarding 1",
        "sysctl net/ipv4/conf/ovt.7/route_localnet 1",
        "sysctl net/ipv4/conf/ovt.7/rp_filter 2",
        "sysctl net/ipv4/ip_forward 1",
        "sysctl net/ipv6/conf/all/forwarding 1",
        "sysctl net/ipv6/conf/ovt.7/accept_ra 0",
        "sysctl net/ipv6/conf/ovt.7/disable_ipv6 0",
        "sysctl net/ipv6/conf/ovt.7/forwarding 1",
        "link ovt.7 veth mtu 1500 up",
        "address 169.254.64.2/31 dev ovt.7 present",
        "address fd6f:7665:726c:6179::2/127 dev ovt.7 present",
        "address fe80::1/64 dev ovt.7 present",
        "table inet overlayd 11 chains",
        "table bridge overlayd 4 chains",
        "element of ports4: udp . 53 to 169.254.64.3:53",
        "element of ports6: udp . 53 to [fd6f:7665:726c:6179::3]:53",
        "element of bound4: 127.0.0.1 . tcp . 80 to 169.254.64.3:80",
        "accept in the IPv4 FORWARD chain of iptables 169.254.64.0/18",
        "accept in the IPv6 FORWARD chain of iptables fd6f:7665:726c:6179::/64",
        "route ::1/128 local dev ovt.7",
    ];
    let host = blue(BLUE, BLUE_KEY, &["127.0.0.1:80:8080", "53:5353/udp"]);
    assert_eq!(lines(&entries_in(&host, Scope::Host)), wanted);
    let quiet = lines(&entries_in(&blue(BLUE, BLUE_KEY, &[]), Scope::Host));
    assert!(quiet.contains(&"sysctl net/ipv4/conf/ovt.7/route_localnet 0".to_owned()), "{quiet:?}");
    assert!(!quiet.iter().any(|line| line.starts_with("element") || line.contains("::1/128")), "{quiet:?}");
}

#[test]
fn entries_have_the_families_of_the_network() {
    for (config, key, other) in [(BLUE_V4, "10.9.1.0-24", Family::V6), (BLUE_V6, "fd00:9:0:1::-64", Family::V4)] {
        let mut host = blue(config, key, &["80:80", "[::1]:81:81", "127.0.0.1:81:81"]);
        *Arc::make_mut(&mut host.ports[0]).port.as_mut().expect("a port").addresses.slot(other) = None;
        for scope in [Scope::Host, Scope::Network] {
            let text = lines(&entries_in(&host, scope)).join("\n").replace("net/ipv6/conf/ovb.7/accept_ra", "");
            let (ipv4, ipv6) = (text.contains("169.254."), text.contains("fd6f:") || text.contains("ports6"));
            assert_eq!((ipv4, ipv6), (other == Family::V6, other == Family::V4), "{scope:?}: {text}");
            let sysctls = if other == Family::V4 { "net/ipv4/" } else { "disable_ipv6" };
            assert!(!text.contains(sysctls), "{scope:?}: {text}");
        }
    }
}

#[test]
fn internal_network_has_no_way_out() {
    let mut host = blue(BLUE, BLUE_KEY, &["80:80"]);
    host.isolation.as_mut().expect("isolated").transit = None;
    let in_host = lines(&entries_in(&host, Scope::Host));
    assert_eq!(in_host, ["table inet overlayd 6 chains", "table bridge overlayd 4 chains"]);
    let own = lines(&entries_in(&host, Scope::Network));
    let leads_out = |line: &&String| line.contains("ovt.") || line.contains("/0 ") || line.contains("ports4");
    assert_eq!(own.iter().find(leads_out), None);
    assert!(own.contains(&"route 10.20.0.0/16 via 169.254.127.254 dev ovr.9 onlink".to_owned()), "{own:?}");
}

/// Both ends of a pair between two namespaces, the second one by its network's own plan.
#[test]
fn one_network_creates_the_pair_and_both_ends_match() {
    let blue = blue(BLUE, BLUE_KEY, &[]);
    let peer_of_blue = PeerNetwork {
        name: "blue".into(),
        namespace: "ov-blue".to_owned(),
        vni: vni(7),
        ranges: PerFamily { v4: Some(cidr("10.9.0.0/22")), v6: Some(cidr("fd00:9::/62")) },
    };
    let config = r#"{"Network":"10.20.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:20::/48","Backend":{"VNI":9}}"#;
    let isolation = Isolation { transit: Transit::new(2), peers: vec![peer_of_blue] };
    let red = HostSpec { isolation: Some(isolation), numbered_sets: true, ..host(config, "10.20.1.0-24&fd00:20:0:1::-64") };
    let [blue, red] = [blue, red].map(|host| host.entries(Scope::Network));
    let link = |state: &State, name: &str| match &state[&Key::Link(name.into())] {
        Value::Link(link) => (**link).clone(),
        _ => unreachable!("a link"),
    };
    let (own, other) = (link(&blue, "ovr.9"), link(&red, "ovr.7"));
    assert_eq!(own.kind, LinkKind::Pair(Some(PairTarget::Namespace("ov-red".to_owned(), Device::peer_link(vni(7))))));
    assert_eq!((other.kind, own.mtu), (LinkKind::Pair(None), other.mtu), "the network with the larger VNI waits");
    assert_eq!(link(&blue, "ovr.3").kind, LinkKind::Pair(None), "a smaller VNI creates that pair");
    assert_eq!(link(&blue, "ovt.7").kind, LinkKind::Pair(Some(PairTarget::Host)));
    // Each one's neighbour entry has the other one's MAC.
    for (state, device, mac) in [(&blue, 9, other.mac), (&red, 7, own.mac)] {
        let is_of_link = |key: &Key| matches!(key, Key::Neigh(found, _) if *found == Device::peer_link(vni(device)));
        let macs: Vec<&Value> = state.iter().filter(|(key, _)| is_of_link(key)).map(|(_, value)| value).collect();
        assert_eq!(macs, [&Value::Neigh(mac.expect("a MAC")); 2]);
    }
}

#[test]
fn peer_entries_are_split_by_scope() {
    let host = blue(BLUE, BLUE_KEY, &[]);
    let mut peer = peer();
    for (family, subnet) in [(Family::V4, "10.9.2.0/24"), (Family::V6, "fd00:9:0:2::/64")] {
        peer.remote_subnets.slot(family).as_mut().expect("a subnet").subnet = cidr(subnet);
    }
    let of = |host: &HostSpec, scope| {
        let entries = host.peer_entries(&peer).into_iter().filter(|(key, _)| host.peer_entry_scope(key) == scope);
        entries.map(|(key, value)| format!("{key} {value}")).collect::<Vec<_>>()
    };
    assert_eq!(
        of(&host, Scope::Host),
        [
            "element of peers4.7: 192.0.2.9 . 10.9.2.0 present",
            "element of ranges4.9: 192.0.2.9 . 10.9.2.0-10.9.2.255 present",
            "element of ranges4.3: 192.0.2.9 . 10.9.2.0-10.9.2.255 present",
            "element of peers6.7: 2001:db8::9 . fd00:9:0:2:: present",
            "element of ranges6.9: 2001:db8::9 . fd00:9:0:2::-fd00:9:0:2:ffff:ffff:ffff:ffff present",
        ]
    );
    assert_eq!(
        of(&host, Scope::Network),
        [
            "fdb 02:00:00:00:09:04 dev ovx.7 dst 192.0.2.9",
            "neigh 10.9.2.0 dev ovx.7 lladdr 02:00:00:00:09:04",
            "route 10.9.2.0/24 via 10.9.2.0 dev ovx.7 onlink",
            "fdb 02:00:00:00:09:06 dev ovx6.7 dst 2001:db8::9",
            "neigh fd00:9:0:2:: dev ovx6.7 lladdr 02:00:00:00:09:06",
            "route fd00:9:0:2::/64 via fd00:9:0:2:: dev ovx6.7 onlink",
        ]
    );
    let unmasqueraded = HostSpec { masquerade: false, ..host.clone() };
    assert_eq!(of(&unmasqueraded, Scope::Host), of(&host, Scope::Host), "no host has an address in the network");
    // The sets exist as soon as the elements can, also before the peer network's own rules.
    let Value::Ruleset(rules) = &entries_in(&host, Scope::Host)[&Key::Ruleset(Table::Inet)] else { panic!("rules") };
    for (key, _) in host.peer_entries(&peer) {
        assert!(!matches!(&key, Key::Element(element) if !rules.sets.contains(&element.set())), "{key}");
    }
    let routed = HostSpec { isolation: None, ..host };
    assert!(of(&routed, Scope::Network).is_empty() && routed.scopes() == [Scope::Host]);
}

#[test]
fn keys_fit_and_devices_are_desired_in_each_scope() {
    let host = blue(BLUE, BLUE_KEY, &["80:80"]);
    for scope in host.scopes() {
        let mut state = entries_in(&host, *scope);
        state.extend(host.peer_entries(&peer()).into_iter().filter(|(key, _)| host.peer_entry_scope(key) == *scope));
        for (key, value) in &state {
            assert!(key.fits(value), "{key} {value}");
            if let Some(device) = device_of(key, value, &state) {
                assert!(state.contains_key(&Key::Link(device.name().into())), "{key} {value} without {device}");
            }
        }
    }
}

/// Elements of published ports in both scopes, of containers that are attached in this order.
fn published(endpoints: &[(&str, &[&str])]) -> [Vec<String>; 2] {
    let ports = endpoints.iter().enumerate().map(|(n, (name, published))| {
        let mut endpoint = endpoint_with_ports(published);
        let port = endpoint.port.as_mut().expect("a port");
        let last = u8::try_from(n).expect("few") + 2;
        port.addresses = PerFamily { v4: Some([10, 9, 1, last].into()), v6: None };
        Arc::new(Endpoint { name: name.parse().expect(name), attached_at: n as u64, ..endpoint })
    });
    let mut ports: Vec<_> = ports.collect();
    ports.sort_by(|a, b| a.name.cmp(&b.name));
    let host = HostSpec { ports, ..blue(BLUE_V4, "10.9.1.0-24", &[]) };
    [Scope::Host, Scope::Network].map(|scope| {
        let entries = lines(&host.entries(scope)).into_iter();
        entries
            .filter_map(|line| line.strip_prefix("element of ").filter(|line| !line.starts_with("source")).map(str::to_owned))
            .collect()
    })
}

#[test]
fn transit_port_is_the_hosts_unless_it_is_taken() {
    let one = published(&[("a", &["127.0.0.1:80-81:8080-8081", "80:8080/udp"])]);
    assert_eq!(
        one[0],
        [
            "ports4: udp . 80 to 169.254.64.3:80",
            "bound4: 127.0.0.1 . tcp . 80 to 169.254.64.3:80",
            "bound4: 127.0.0.1 . tcp . 81 to 169.254.64.3:81",
        ]
    );
    assert_eq!(
        one[1],
        ["ports4: tcp . 80 to 10.9.1.2:8080", "ports4: tcp . 81 to 10.9.1.2:8081", "ports4: udp . 80 to 10.9.1.2:8080"]
    );
    // `a` comes later than `b`, whose port stays. The highest port is published, so that the next one is used.
    let two = published(&[("b", &["127.0.0.1:80:80", "65535:1"]), ("a", &["192.0.2.1:80:80", "192.0.2.2:80:80"])]);
    assert_eq!(
        two[0],
        [
            "ports4: tcp . 65535 to 169.254.64.3:65535",
            "bound4: 127.0.0.1 . tcp . 80 to 169.254.64.3:80",
            "bound4: 192.0.2.1 . tcp . 80 to 169.254.64.3:65534",
            "bound4: 192.0.2.2 . tcp . 80 to 169.254.64.3:65533",
        ]
    );
    assert_eq!(
        two[1],
        [
            "ports4: tcp . 80 to 10.9.1.2:80",
            "ports4: tcp . 65533 to 10.9.1.3:80",
            "ports4: tcp . 65534 to 10.9.1.3:80",
            "ports4: tcp . 65535 to 10.9.1.2:1",
        ]
    );
    // One container's port on two addresses is one port of the transit.
    let same = published(&[("a", &["127.0.0.1:80:80", "192.0.2.1:80:80"])]);
    assert_eq!(same[1], ["ports4: tcp . 80 to 10.9.1.2:80"]);
    // Every other port is published: the second container's is left out in both namespaces.
    let full = published(&[("a", &["127.0.0.1:80:80", "1-79:1-79", "81-65535:81-65535"]), ("b", &["192.0.2.1:80:80"])]);
    assert!(full[0].len() == 65_535 && full[1].len() == 65_535);
}

#[test]
fn changed_entries_lead_to_the_new_entries_in_each_scope() {
    let endpoint = |name: &str, last: u8, published: &[&str]| {
        let mut endpoint = endpoint_with_ports(published);
        let port = endpoint.port.as_mut().expect("a port");
        port.host_interface = format!("veth{last}");
        port.addresses = PerFamily { v4: Some([10, 9, 1, last].into()), v6: None };
        Arc::new(Endpoint { name: name.parse().expect(name), attached_at: last.into(), ..endpoint })
    };
    let all = [endpoint("a", 4, &["127.0.0.1:80:80"]), endpoint("b", 3, &["192.0.2.1:80:80"]), endpoint("c", 2, &["53:53/udp"])];
    let mut hosts: Vec<HostSpec> = (0..8_usize)
        .map(|picks| {
            let ports = all.iter().enumerate().filter(|(n, _)| picks >> n & 1 == 1).map(|(_, endpoint)| endpoint.clone());
            HostSpec { ports: ports.collect(), ..blue(BLUE_V4, "10.9.1.0-24", &[]) }
        })
        .collect();
    let mut internal = hosts[7].clone();
    internal.isolation.as_mut().expect("isolated").transit = None;
    hosts.push(internal);
    for (from, to) in hosts.iter().flat_map(|from| hosts.iter().map(move |to| (from, to))) {
        for scope in [Scope::Host, Scope::Network] {
            let (removed, added) = from.changed_entries(to, scope);
            let mut state = from.entries(scope);
            state.retain(|key, _| !removed.contains_key(key));
            state.extend(added);
            assert_eq!(state, to.entries(scope), "{scope:?}: {:?} to {:?}", from.ports, to.ports);
        }
    }
    let (removed, added) = hosts[5].changed_entries(&hosts[1], Scope::Network);
    assert!(added.is_empty() && removed.keys().all(|key| !key.to_string().contains("veth4")), "{removed:?}");
}

#[test]
fn addresses_that_the_host_depends_on_matter_to_routed_networks_only() {
    let reserved = BTreeSet::from([address("10.9.2.7")]);
    let host = HostSpec { reserved, ..blue(BLUE, BLUE_KEY, &[]) };
    assert!(host.entries(Scope::Network).contains_key(&Key::Unreachable(cidr("10.9.2.0/23"))));
    assert!(!HostSpec { isolation: None, ..host }.entries(Scope::Host).contains_key(&Key::Unreachable(cidr("10.9.2.0/23"))));
}

#[test]
fn networks_of_all_kinds_share_no_key_in_the_host() {
    let red = {
        let config = r#"{"Network":"10.20.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:20::/48","Backend":{"VNI":9}}"#;
        let isolation = Isolation { transit: Transit::new(2), peers: Vec::new() };
        HostSpec { isolation: Some(isolation), numbered_sets: true, ..host(config, "10.20.1.0-24&fd00:20:0:1::-64") }
    };
    let routed = host(r#"{"Network":"10.99.0.0/16","Backend":{"VNI":5}}"#, "10.99.7.0-24");
    let routed = HostSpec { numbered_sets: true, ..routed };
    let hosts = [host(DUAL, DUAL_KEY), routed, blue(BLUE, BLUE_KEY, &["80:80"]), red];
    let shared = shared_entries(&hosts.each_ref().map(|host| host.shared(Scope::Host)).each_ref(), &NamespaceFacts::default());
    let parts = hosts.map(|host| {
        let mut state = host.entries(Scope::Host);
        state.extend(host.peer_entries(&peer()).into_iter().filter(|(key, _)| host.peer_entry_scope(key) == Scope::Host));
        // The peer has the same subnet in each network, where routes and unreachable ranges are each network's own.
        state.retain(|key, _| !matches!(key, Key::Route(_) | Key::Unreachable(_)));
        state
    });
    let parts: Vec<&State> = [&shared].into_iter().chain(&parts).collect();
    for (i, part) in parts.iter().enumerate() {
        for other in &parts[i + 1..] {
            let common: Vec<&Key> = part.keys().filter(|key| other.contains_key(*key)).collect();
            assert!(common.is_empty(), "{common:?}");
        }
    }
}
