//! The choice of the interface, and of one address among several.

use super::*;
use crate::model::NetworkConfig;

fn link(index: u32, name: &str, addresses: &[&str]) -> ForeignLink {
    ForeignLink {
        index,
        name: name.to_owned(),
        mtu: 1500,
        up: true,
        loopback: name == "lo",
        kind: String::new(),
        is_port: false,
        ipv6: Some(Ipv6Settings { forwarding: false, accept_ra: 1, disabled: false }),
        addresses: addresses.iter().map(|text| address(text)).collect(),
    }
}

fn pools(families: &[Family]) -> PerFamily<Pool> {
    let text = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#;
    let pools = NetworkConfig::parse(text).expect("a configuration").config.pools;
    families.iter().filter_map(|family| Some((*family, *pools.get(*family)?))).collect()
}

/// `ADDRESS/LENGTH`, with what the kernel says of it behind.
fn address(text: &str) -> HostAddress {
    let mut words = text.split(' ');
    let network: ipnetwork::IpNetwork = words.next().expect("an address").parse().expect(text);
    let mut address = HostAddress { address: network.ip(), length: network.prefix(), secondary: false, flaw: None };
    for word in words {
        match word {
            "secondary" => address.secondary = true,
            "temporary" => address.flaw = Some(Flaw::Temporary),
            "deprecated" => address.flaw = Some(Flaw::Deprecated),
            "tentative" => address.flaw = Some(Flaw::Tentative),
            "duplicate" => address.flaw = Some(Flaw::Duplicate),
            "link-local" => address.flaw = Some(Flaw::LinkLocal),
            other => panic!("{other}"),
        }
    }
    address
}

fn route(family: Family, interface: u32) -> DefaultRoute {
    DefaultRoute { family, interface, source: None, gateway: None, from_router_advertisement: false }
}

fn inventory() -> Inventory {
    Inventory {
        links: vec![
            link(1, "lo", &["127.0.0.1/8", "::1/128"]),
            link(2, "eth0", &["192.0.2.7/24", "192.0.2.8/24", "2001:db8::7/64"]),
            link(3, "eth1", &["198.51.100.7/24"]),
        ],
        defaults: vec![route(Family::V4, 3)],
        ..Inventory::default()
    }
}

fn choose(selection: &Selection, families: &[Family], reach: Option<u32>) -> Result<Underlay, String> {
    let choice = selection.choose(&inventory(), &pools(families), reach, &InUse::default());
    choice.map(|choice| choice.underlay).map_err(|e| e.to_string())
}

fn by_interface(wanted: &[&str]) -> Selection {
    Selection { interfaces: wanted.iter().map(ToString::to_string).collect(), ..Selection::default() }
}

#[test]
fn by_name_address_regex_reach_and_default_route() {
    let v4 = [Family::V4];
    assert_eq!(choose(&by_interface(&["ens9", "eth0"]), &v4, None).expect("by name").name, "eth0");
    let by_address = choose(&by_interface(&["192.0.2.8"]), &v4, None).expect("by address");
    assert_eq!(by_address.public_ip.v4, "192.0.2.8".parse().ok());
    let regex = |text| Selection { regex: Regex::new(text).ok(), ..Selection::default() };
    assert_eq!(choose(&regex("^eth1$"), &v4, None).expect("by name").name, "eth1");
    assert_eq!(choose(&regex(r"^192\.0\.2\.8$"), &v4, None).expect("by address").local.v4, "192.0.2.8".parse().ok());
    let reach = Selection { can_reach: "203.0.113.1".parse().ok(), ..Selection::default() };
    assert_eq!(choose(&reach, &v4, Some(2)).expect("by route").name, "eth0");
    assert_eq!(choose(&Selection::default(), &v4, None).expect("default route").name, "eth1");
}

#[test]
fn public_addresses_override() {
    let mut selection = by_interface(&["eth0"]);
    selection.public_ip.v4 = "203.0.113.5".parse().ok();
    let underlay = choose(&selection, &Family::ALL, None).expect("an underlay");
    assert_eq!(underlay.public_ip.v4, "203.0.113.5".parse().ok());
    assert_eq!(underlay.local.v4, "192.0.2.7".parse().ok());
    assert_eq!(underlay.public_ip.v6, "2001:db8::7".parse().ok());
}

#[test]
fn interface_without_ipv6_serves_ipv4_alone() {
    let mut inventory = inventory();
    let eth1 = by_interface(&["eth1"]);
    let published = PerFamily { v4: None, v6: "2001:db8::9".parse().ok() };
    for ipv6 in [None, Some(Ipv6Settings { forwarding: false, accept_ra: 1, disabled: true })] {
        inventory.links[2].ipv6 = ipv6;
        let after_reboot = InUse { published, ..InUse::default() };
        for in_use in [InUse::default(), after_reboot] {
            let chosen = eth1.choose(&inventory, &pools(&Family::ALL), None, &in_use).expect("IPv4");
            let Underlay { local, public_ip, .. } = chosen.underlay;
            assert_eq!((local.v4, public_ip.v6, chosen.reasons.v6), ("198.51.100.7".parse().ok(), None, None));
        }
        let built = InUse { local: published, ..InUse::default() };
        let kept = eth1.choose(&inventory, &pools(&Family::ALL), None, &built).expect("both");
        assert_eq!((kept.underlay.local.v6, kept.reasons.v6), (published.v6, Some(Reason::Kept)));
        let remedy = "sysctl -w net/ipv6/conf/eth1/disable_ipv6=0";
        assert!(kept.problems.concat().contains(remedy), "{:?}", kept.problems);
        let alone = eth1.choose(&inventory, &pools(&[Family::V6]), None, &InUse::default());
        let error = alone.expect_err("nothing is left of an IPv6 network");
        assert!(error.to_string().contains(remedy), "{error}");
    }
}

#[test]
fn errors_name_the_candidates() {
    let candidates = "candidates: eth0 (192.0.2.7, 192.0.2.8, 2001:db8::7), eth1 (198.51.100.7)";
    let regex = Selection { regex: Regex::new("^wlan").ok(), ..Selection::default() };
    let reach = Selection { can_reach: "203.0.113.1".parse().ok(), ..Selection::default() };
    for (result, wanted) in [
        (choose(&by_interface(&["eth7", "lo"]), &[Family::V4], None), "no interface eth7 or lo"),
        (choose(&regex, &[Family::V4], None), "`^wlan` matches no interface"),
        (choose(&reach, &[Family::V4], None), "no route to 203.0.113.1"),
        (choose(&Selection::default(), &[Family::V6], None), "no IPv6 default route"),
        (choose(&by_interface(&["eth1"]), &Family::ALL, None), "eth1 has no IPv6 address"),
    ] {
        let error = result.expect_err(wanted);
        assert!(error.contains(wanted) && error.contains(candidates), "{error}");
    }
}

/// What is chosen on eth0, which has these addresses and the default route in both families.
fn chosen(addresses: &[&str], in_use: &[&str], route: DefaultRoute) -> Choice {
    let families: &[Family] = if addresses.iter().any(|a| a.contains("::")) { &Family::ALL } else { &[Family::V4] };
    let inventory = Inventory { links: vec![link(2, "eth0", addresses)], defaults: vec![route], ..Inventory::default() };
    let local = in_use.iter().map(|text| text.parse::<IpAddr>().expect(text)).map(|a| (Family::of(a), a)).collect();
    let in_use = InUse { link: Some(2), local, ..InUse::default() };
    by_interface(&["eth0"]).choose(&inventory, &pools(families), None, &in_use).expect("a choice")
}

fn v4(choice: &Choice) -> (String, Reason) {
    (choice.underlay.local.v4.expect("an address").to_string(), choice.reasons.v4.expect("a reason"))
}

#[test]
fn rank_of_each_kind_of_address() {
    let plain = route(Family::V4, 2);
    let source = DefaultRoute { source: "192.0.2.9".parse().ok(), ..plain };
    let gateway = DefaultRoute { gateway: "192.0.2.1".parse().ok(), ..plain };
    for (what, addresses, in_use, route, wanted, reason) in [
        ("one alone", &["192.0.2.7/24"][..], "", plain, "192.0.2.7", Reason::Only),
        ("host length is last", &["192.0.2.100/32", "192.0.2.7/24"], "", plain, "192.0.2.7", Reason::First),
        ("secondary is last", &["192.0.2.100/24 secondary", "192.0.2.7/24"], "", plain, "192.0.2.7", Reason::First),
        ("host length where it is all there is", &["192.0.2.100/32"], "", plain, "192.0.2.100", Reason::Only),
        ("the preferred source", &["192.0.2.7/24", "192.0.2.9/24 secondary"], "", source, "192.0.2.9", Reason::Source),
        ("a preferred source of host length", &["192.0.2.7/24", "192.0.2.9/32"], "", source, "192.0.2.9", Reason::Source),
        ("the subnet of the gateway", &["198.51.100.7/24", "192.0.2.7/24"], "", gateway, "192.0.2.7", Reason::Source),
        ("in use stays", &["192.0.2.7/24", "198.51.100.7/24"], "198.51.100.7", gateway, "198.51.100.7", Reason::InUse),
        ("in use beside a preferred source", &["192.0.2.7/24", "192.0.2.9/24"], "192.0.2.7", source, "192.0.2.7", Reason::InUse),
        (
            "in use beside a new one of host length",
            &["192.0.2.100/32", "192.0.2.7/24"],
            "192.0.2.7",
            plain,
            "192.0.2.7",
            Reason::InUse,
        ),
        (
            "in use, but beside the host's own",
            &["192.0.2.7/24", "192.0.2.100/32"],
            "192.0.2.100",
            plain,
            "192.0.2.7",
            Reason::First,
        ),
        ("in use, and deprecated", &["192.0.2.7/24 deprecated", "192.0.2.8/24"], "192.0.2.7", plain, "192.0.2.8", Reason::First),
        ("deprecated where it is all there is", &["192.0.2.7/24 deprecated"], "192.0.2.7", plain, "192.0.2.7", Reason::Only),
        ("link-local", &["169.254.7.7/16 link-local", "192.0.2.7/24"], "", plain, "192.0.2.7", Reason::Only),
        ("leased by the overlay", &["10.244.3.1/24", "192.0.2.100/32"], "", plain, "192.0.2.100", Reason::First),
        ("in the network, and not leased", &["10.244.0.1/24", "192.0.2.100/32"], "", plain, "10.244.0.1", Reason::First),
    ] {
        let in_use: Vec<&str> = in_use.split_terminator(' ').collect();
        let choice = chosen(addresses, &in_use, route);
        assert_eq!(v4(&choice), (wanted.to_owned(), reason), "{what}");
        assert!(choice.problems.is_empty(), "{what}: {:?}", choice.problems);
    }
    for flaw in ["temporary", "deprecated", "tentative", "duplicate"] {
        let flawed = format!("2001:db8::1/64 {flaw}");
        let choice = chosen(&["192.0.2.7/24", &flawed, "2001:db8::2/64"], &["192.0.2.7", "2001:db8::1"], route(Family::V6, 2));
        assert_eq!(choice.underlay.local.v6, "2001:db8::2".parse().ok(), "{flaw}");
    }
}

#[test]
fn family_without_an_address_keeps_the_one_in_use_and_the_other_follows() {
    let (plain, in_use) = (route(Family::V4, 2), ["192.0.2.7", "2001:db8::7"]);
    let choice = |addresses: &[&str]| chosen(addresses, &in_use, plain);
    let local = |choice: &Choice| [choice.underlay.local.v4, choice.underlay.local.v6].map(|a| a.expect("one").to_string());
    for (addresses, wanted, missing) in [
        (["192.0.2.8/24", "fe80::1/64 link-local"], ["192.0.2.8", "2001:db8::7"], "IPv6"),
        (["192.0.2.8/24", "2001:db8::8/64 tentative"], ["192.0.2.8", "2001:db8::7"], "IPv6"),
        (["2001:db8::8/64", "::/128 link-local"], ["192.0.2.7", "2001:db8::8"], "IPv4"),
    ] {
        let choice = choice(&addresses);
        assert_eq!(local(&choice), wanted);
        let [problem] = choice.problems.as_slice() else { panic!("{:?}", choice.problems) };
        assert!(problem.contains(&format!("eth0 has no {missing} address")) && problem.contains("stays in use"), "{problem}");
    }
    assert_eq!(choice(&["192.0.2.8/24", "2001:db8::8/64"]).problems, Vec::<String>::new());
}

#[test]
fn interface_in_use_stays_where_the_one_asked_for_is_not_found() {
    let mut host = inventory();
    host.defaults.clear();
    let local = PerFamily { v4: "192.0.2.9".parse().ok(), v6: "2001:db8::9".parse().ok() };
    let in_use = InUse { link: Some(2), local, ..InUse::default() };
    let reach = Selection { can_reach: "203.0.113.1".parse().ok(), ..Selection::default() };
    for (selection, wanted, v4) in [
        (Selection::default(), "no IPv4 default route", "192.0.2.7"),
        (reach, "no route to 203.0.113.1", "192.0.2.7"),
        (by_interface(&["eth9"]), "no interface eth9", "192.0.2.7"),
        (by_interface(&["192.0.2.9"]), "no interface 192.0.2.9", "192.0.2.9"),
    ] {
        let choice = selection.choose(&host, &pools(&Family::ALL), None, &in_use).expect(wanted);
        assert_eq!((choice.underlay.name.as_str(), choice.underlay.local.v4), ("eth0", v4.parse().ok()), "{wanted}");
        assert_eq!(choice.underlay.local.v6, "2001:db8::7".parse().ok(), "{wanted}: the other family follows");
        assert!(choice.problems[0].contains(wanted) && choice.problems[0].contains("eth0 stays in use"), "{:?}", choice.problems);
        assert!(selection.choose(&host, &pools(&Family::ALL), None, &InUse::default()).is_err(), "{wanted}: nothing is in use");
    }
}

#[test]
fn address_that_was_lost_is_explained() {
    let host = Inventory {
        links: vec![link(2, "eth0", &["2001:db8::1/64 deprecated"]), link(3, "eth1", &["192.0.2.1/24"])],
        ..Inventory::default()
    };
    let loss = |text: &str| host.loss_of(text.parse().expect(text), 2);
    assert_eq!(loss("192.0.2.7"), "no longer on this host");
    assert_eq!(loss("192.0.2.1"), "on eth1, which is not the external interface");
    assert_eq!(loss("2001:db8::1"), "deprecated");
}
