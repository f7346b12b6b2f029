//! Tests of the selection of the interface, and of one of its addresses.

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

/// Parses `ADDRESS/LENGTH`, followed by the kernel's flags of the address.
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

fn inventory() -> HostInventory {
    HostInventory {
        links: vec![
            link(1, "lo", &["127.0.0.1/8", "::1/128"]),
            link(2, "eth0", &["192.0.2.7/24", "192.0.2.8/24", "2001:db8::7/64"]),
            link(3, "eth1", &["198.51.100.7/24"]),
        ],
        default_routes: vec![route(Family::V4, 3)],
        ..HostInventory::default()
    }
}

fn choose(selection: &UnderlaySelector, families: &[Family], reachable_link: Option<u32>) -> Result<Underlay, String> {
    let choice =
        selection.choose(&inventory(), families.iter().copied(), &pools(families), reachable_link, &CurrentUnderlay::default());
    choice.map(|choice| choice.underlay).map_err(|e| e.to_string())
}

fn by_interface(wanted: &[&str]) -> UnderlaySelector {
    UnderlaySelector { interfaces: wanted.iter().map(ToString::to_string).collect(), ..UnderlaySelector::default() }
}

#[test]
fn interface_is_selected_by_each_criterion() {
    let v4 = [Family::V4];
    assert_eq!(choose(&by_interface(&["ens9", "eth0"]), &v4, None).expect("by name").name, "eth0");
    let by_address = choose(&by_interface(&["192.0.2.8"]), &v4, None).expect("by address");
    assert_eq!(by_address.public_ip.v4, "192.0.2.8".parse().ok());
    let regex = |text| UnderlaySelector { regex: Regex::new(text).ok(), ..UnderlaySelector::default() };
    assert_eq!(choose(&regex("^eth1$"), &v4, None).expect("by name").name, "eth1");
    assert_eq!(choose(&regex(r"^192\.0\.2\.8$"), &v4, None).expect("by address").local.v4, "192.0.2.8".parse().ok());
    let selector = UnderlaySelector { can_reach: "203.0.113.1".parse().ok(), ..UnderlaySelector::default() };
    assert_eq!(choose(&selector, &v4, Some(2)).expect("by route").name, "eth0");
    assert_eq!(choose(&UnderlaySelector::default(), &v4, None).expect("default route").name, "eth1");
}

#[test]
fn public_ip_overrides_local_address() {
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
        let after_reboot = CurrentUnderlay { published, ..CurrentUnderlay::default() };
        for in_use in [CurrentUnderlay::default(), after_reboot] {
            let chosen = eth1.choose(&inventory, Family::ALL, &pools(&Family::ALL), None, &in_use).expect("IPv4");
            let Underlay { local, public_ip, .. } = chosen.underlay;
            assert_eq!((local.v4, public_ip.v6, chosen.reasons.v6), ("198.51.100.7".parse().ok(), None, None));
        }
        let built = CurrentUnderlay { local: published, ..CurrentUnderlay::default() };
        let kept = eth1.choose(&inventory, Family::ALL, &pools(&Family::ALL), None, &built).expect("both");
        assert_eq!((kept.underlay.local.v6, kept.reasons.v6), (published.v6, Some(SelectionReason::Retained)));
        let remedy = "sysctl -w net/ipv6/conf/eth1/disable_ipv6=0";
        assert!(kept.problems.concat().contains(remedy), "{:?}", kept.problems);
        let alone = eth1.choose(&inventory, [Family::V6], &pools(&[Family::V6]), None, &CurrentUnderlay::default());
        let error = alone.expect_err("nothing is left of an IPv6 network");
        assert!(error.to_string().contains(remedy), "{error}");
    }
}

#[test]
fn errors_name_the_candidates() {
    let candidates = "candidates: eth0 (192.0.2.7, 192.0.2.8, 2001:db8::7), eth1 (198.51.100.7)";
    let regex = UnderlaySelector { regex: Regex::new("^wlan").ok(), ..UnderlaySelector::default() };
    let selector = UnderlaySelector { can_reach: "203.0.113.1".parse().ok(), ..UnderlaySelector::default() };
    for (result, wanted) in [
        (choose(&by_interface(&["eth7", "lo"]), &[Family::V4], None), "no interface eth7 or lo"),
        (choose(&regex, &[Family::V4], None), "`^wlan` matches no interface"),
        (choose(&selector, &[Family::V4], None), "no route to 203.0.113.1"),
        (choose(&UnderlaySelector::default(), &[Family::V6], None), "no IPv6 default route"),
        (choose(&by_interface(&["eth1"]), &Family::ALL, None), "eth1 has no IPv6 address"),
    ] {
        let error = result.expect_err(wanted);
        assert!(error.contains(wanted) && error.contains(candidates), "{error}");
    }
}

/// The choice on eth0, which has these addresses and the default route in both families.
fn choose_on_eth0(addresses: &[&str], in_use: &[&str], route: DefaultRoute) -> UnderlayChoice {
    let families: &[Family] = if addresses.iter().any(|a| a.contains("::")) { &Family::ALL } else { &[Family::V4] };
    let inventory =
        HostInventory { links: vec![link(2, "eth0", addresses)], default_routes: vec![route], ..HostInventory::default() };
    let local = in_use.iter().map(|text| text.parse::<IpAddr>().expect(text)).map(|a| (Family::of(a), a)).collect();
    let in_use = CurrentUnderlay { link: Some(2), local, ..CurrentUnderlay::default() };
    by_interface(&["eth0"]).choose(&inventory, families.iter().copied(), &pools(families), None, &in_use).expect("a choice")
}

fn v4(choice: &UnderlayChoice) -> (String, SelectionReason) {
    (choice.underlay.local.v4.expect("an address").to_string(), choice.reasons.v4.expect("a reason"))
}

#[test]
fn address_kinds_are_ranked() {
    let plain = route(Family::V4, 2);
    let source = DefaultRoute { source: "192.0.2.9".parse().ok(), ..plain };
    let gateway = DefaultRoute { gateway: "192.0.2.1".parse().ok(), ..plain };
    for (what, addresses, in_use, route, wanted, reason) in [
        ("one alone", &["192.0.2.7/24"][..], "", plain, "192.0.2.7", SelectionReason::Only),
        ("host length is last", &["192.0.2.100/32", "192.0.2.7/24"], "", plain, "192.0.2.7", SelectionReason::First),
        ("secondary is last", &["192.0.2.100/24 secondary", "192.0.2.7/24"], "", plain, "192.0.2.7", SelectionReason::First),
        ("host length where it is all there is", &["192.0.2.100/32"], "", plain, "192.0.2.100", SelectionReason::Only),
        (
            "the preferred source",
            &["192.0.2.7/24", "192.0.2.9/24 secondary"],
            "",
            source,
            "192.0.2.9",
            SelectionReason::DefaultRouteSource,
        ),
        (
            "a preferred source of host length",
            &["192.0.2.7/24", "192.0.2.9/32"],
            "",
            source,
            "192.0.2.9",
            SelectionReason::DefaultRouteSource,
        ),
        (
            "the subnet of the gateway",
            &["198.51.100.7/24", "192.0.2.7/24"],
            "",
            gateway,
            "192.0.2.7",
            SelectionReason::DefaultRouteSource,
        ),
        ("in use stays", &["192.0.2.7/24", "198.51.100.7/24"], "198.51.100.7", gateway, "198.51.100.7", SelectionReason::InUse),
        (
            "in use, with a preferred source present",
            &["192.0.2.7/24", "192.0.2.9/24"],
            "192.0.2.7",
            source,
            "192.0.2.7",
            SelectionReason::InUse,
        ),
        (
            "in use, with a new one of host length present",
            &["192.0.2.100/32", "192.0.2.7/24"],
            "192.0.2.7",
            plain,
            "192.0.2.7",
            SelectionReason::InUse,
        ),
        (
            "in use, but additional to the host's own",
            &["192.0.2.7/24", "192.0.2.100/32"],
            "192.0.2.100",
            plain,
            "192.0.2.7",
            SelectionReason::First,
        ),
        (
            "in use, and deprecated",
            &["192.0.2.7/24 deprecated", "192.0.2.8/24"],
            "192.0.2.7",
            plain,
            "192.0.2.8",
            SelectionReason::First,
        ),
        (
            "deprecated where it is all there is",
            &["192.0.2.7/24 deprecated"],
            "192.0.2.7",
            plain,
            "192.0.2.7",
            SelectionReason::Only,
        ),
        ("link-local", &["169.254.7.7/16 link-local", "192.0.2.7/24"], "", plain, "192.0.2.7", SelectionReason::Only),
        ("leased by the overlay", &["10.244.3.1/24", "192.0.2.100/32"], "", plain, "192.0.2.100", SelectionReason::First),
        ("in the network, and not leased", &["10.244.0.1/24", "192.0.2.100/32"], "", plain, "10.244.0.1", SelectionReason::First),
    ] {
        let in_use: Vec<&str> = in_use.split_terminator(' ').collect();
        let choice = choose_on_eth0(addresses, &in_use, route);
        assert_eq!(v4(&choice), (wanted.to_owned(), reason), "{what}");
        assert!(choice.problems.is_empty(), "{what}: {:?}", choice.problems);
    }
    for flaw in ["temporary", "deprecated", "tentative", "duplicate"] {
        let flawed = format!("2001:db8::1/64 {flaw}");
        let choice =
            choose_on_eth0(&["192.0.2.7/24", &flawed, "2001:db8::2/64"], &["192.0.2.7", "2001:db8::1"], route(Family::V6, 2));
        assert_eq!(choice.underlay.local.v6, "2001:db8::2".parse().ok(), "{flaw}");
    }
}

#[test]
fn family_without_address_keeps_current_one() {
    let (plain, in_use) = (route(Family::V4, 2), ["192.0.2.7", "2001:db8::7"]);
    let choice = |addresses: &[&str]| choose_on_eth0(addresses, &in_use, plain);
    let local =
        |choice: &UnderlayChoice| [choice.underlay.local.v4, choice.underlay.local.v6].map(|a| a.expect("one").to_string());
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
fn current_interface_stays_when_configured_one_missing() {
    let mut host = inventory();
    host.default_routes.clear();
    let local = PerFamily { v4: "192.0.2.9".parse().ok(), v6: "2001:db8::9".parse().ok() };
    let in_use = CurrentUnderlay { link: Some(2), local, ..CurrentUnderlay::default() };
    let selector = UnderlaySelector { can_reach: "203.0.113.1".parse().ok(), ..UnderlaySelector::default() };
    for (selection, wanted, v4) in [
        (UnderlaySelector::default(), "no IPv4 default route", "192.0.2.7"),
        (selector, "no route to 203.0.113.1", "192.0.2.7"),
        (by_interface(&["eth9"]), "no interface eth9", "192.0.2.7"),
        (by_interface(&["192.0.2.9"]), "no interface 192.0.2.9", "192.0.2.9"),
    ] {
        let choice = selection.choose(&host, Family::ALL, &pools(&Family::ALL), None, &in_use).expect(wanted);
        assert_eq!((choice.underlay.name.as_str(), choice.underlay.local.v4), ("eth0", v4.parse().ok()), "{wanted}");
        assert_eq!(choice.underlay.local.v6, "2001:db8::7".parse().ok(), "{wanted}: the other family follows");
        assert!(choice.problems[0].contains(wanted) && choice.problems[0].contains("eth0 stays in use"), "{:?}", choice.problems);
        assert!(
            selection.choose(&host, Family::ALL, &pools(&Family::ALL), None, &CurrentUnderlay::default()).is_err(),
            "{wanted}: nothing is in use"
        );
    }
}

#[test]
fn lost_address_is_explained() {
    let host = HostInventory {
        links: vec![link(2, "eth0", &["2001:db8::1/64 deprecated"]), link(3, "eth1", &["192.0.2.1/24"])],
        ..HostInventory::default()
    };
    let loss = |text: &str| host.explain_loss(text.parse().expect(text), 2);
    assert_eq!(loss("192.0.2.7"), "no longer on this host");
    assert_eq!(loss("192.0.2.1"), "on eth1, which is not the external interface");
    assert_eq!(loss("2001:db8::1"), "deprecated");
}
