//! Tests of each configuration rule with a valid or invalid value.

use super::*;
use crate::model::Vni;
use crate::model::backend::VxlanConfig;

fn parse_valid(text: &str) -> NetworkConfig {
    NetworkConfig::parse(text).unwrap_or_else(|e| panic!("{text}: {e}")).config
}

fn parse_errors(text: &str) -> String {
    match NetworkConfig::parse(text) {
        Ok(parsed) => panic!("{text} was accepted: {parsed:?}"),
        Err(errors) => errors.to_string(),
    }
}

#[test]
fn omitted_fields_use_defaults() {
    let config = parse_valid(r#"{"Network":"10.244.0.0/16"}"#);
    let pool = config.pools.v4.expect("IPv4");
    assert_eq!((pool.subnet_length, pool.count()), (24, 255));
    assert_eq!(pool.min.to_string(), "10.244.1.0/24");
    assert_eq!(pool.max.to_string(), "10.244.255.0/24");
    assert_eq!(config.backend, BackendConfig::Vxlan(VxlanConfig { vni: Vni::DEFAULT, port: 8472, mtu: None }));
    assert_eq!(config.pools.v6, None);
}

#[test]
fn small_networks_use_longer_subnet_prefix() {
    let pool = |text: &str| parse_valid(text).pools.iter().next().map(|(_, p)| *p).expect("a pool");
    assert_eq!(pool(r#"{"Network":"10.0.0.0/22"}"#).subnet_length, 24);
    assert_eq!(pool(r#"{"Network":"10.0.0.0/24"}"#).subnet_length, 26);
    assert_eq!(pool(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/63"}"#).subnet_length, 65);
    assert_eq!(pool(r#"{"Network":"10.0.0.0/28"}"#).subnet_length, 30);
    assert!(parse_errors(r#"{"Network":"10.0.0.0/29"}"#).contains("too small"));
}

#[test]
fn case_of_keys_is_ignored() {
    let config = parse_valid(r#"{"network":"10.244.0.0/16","subnetlen":26,"backend":{"type":"vxlan","vni":42,"PORT":4789}}"#);
    assert_eq!(
        config.backend,
        BackendConfig::Vxlan(VxlanConfig { vni: Vni::try_from(42).expect("a VNI"), port: 4789, mtu: None })
    );
    assert_eq!(config.pools.v4.map(|p| p.subnet_length), Some(26));
}

#[test]
fn json_form_names_the_backend() {
    let config = parse_valid(r#"{"Network":"10.244.0.0/16","Backend":{"MTU":9000}}"#);
    let json = serde_json::to_string(&config).expect("JSON");
    let pool = r#"{"network":"10.244.0.0/16","subnet_length":24,"min":"10.244.1.0/24","max":"10.244.255.0/24"}"#;
    assert_eq!(json, format!(r#"{{"pools":{{"v4":{pool}}},"vxlan":{{"vni":1,"port":8472,"mtu":9000}}}}"#));
    assert_eq!(serde_json::from_str::<NetworkConfig>(&json).expect("its own JSON"), config);
}

#[test]
fn every_error_names_field_value_and_rule() {
    for (text, wanted) in [
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
        ("{}", "Network: `` is missing"),
        (
            r#"{"Network":"10.244.1.0/16"}"#,
            "Network: `10.244.1.0/16` has host bits set: the network of that length is 10.244.0.0/16",
        ),
        (r#"{"Network":"fd00::/64"}"#, "is not an IPv4 CIDR"),
        (r#"{"Network":7}"#, "Network: `7` is not a string"),
        (r#"{"Network":"127.0.0.0/8"}"#, "loopback"),
        (r#"{"Network":"0.0.0.0/0"}"#, "covers the whole address space"),
        (r#"{"Network":"10.0.0.0/16","SubnetLen":31}"#, "SubnetLen: `31` is outside 18 to 30"),
        (r#"{"Network":"10.0.0.0/16","SubnetLen":17}"#, "SubnetLen: `17` is outside 18 to 30"),
        (r#"{"Network":"10.0.0.0/16","SubnetMin":"10.1.0.0"}"#, "SubnetMin: `10.1.0.0` is not inside 10.0.0.0/16"),
        (r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.1.9"}"#, "the nearest below is 10.0.1.0"),
        (
            r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.9.0","SubnetMax":"10.0.3.0"}"#,
            "SubnetMin: `10.0.9.0` is above SubnetMax 10.0.3.0",
        ),
        (r#"{"Network":"10.0.0.0/16","EnableIPv4":false}"#, "no family is left"),
        (r#"{"Network":"10.0.0.0/16","EnableIPv6":true}"#, "IPv6Network: `` is missing"),
        (r#"{"Network":"10.0.0.0/16","Backend":{"Type":"host-gw"}}"#, "Backend.Type: `host-gw` is not supported"),
        (r#"{"Network":"10.0.0.0/16","Backend":{"VNI":16777216}}"#, "Backend.VNI: `16777216`"),
        (r#"{"Network":"10.0.0.0/16","Backend":{"Port":-1}}"#, "Backend.Port: `-1`"),
        (r#"{"Network":"10.0.0.0/16","Backend":{"MTU":900}}"#, "Backend.MTU: `900` is below 1350"),
    ] {
        let message = parse_errors(text);
        assert!(message.contains(wanted), "{text}: {message}");
    }
    let all = parse_errors(r#"{"Network":"10.0.0.1/16","Backend":{"Type":"udp","VNI":"x"}}"#);
    assert_eq!(all.matches(';').count(), 2, "all errors are reported at once: {all}");
}

#[test]
fn unknown_fields_are_warnings() {
    let parsed = NetworkConfig::parse(r#"{"Network":"10.0.0.0/16","Netwrk":1,"Backend":{"DirectRouting":true,"Foo":2}}"#)
        .expect("unknown fields are ignored");
    let fields: Vec<_> = parsed.warnings.iter().map(|w| w.field.as_str()).collect();
    assert_eq!(fields, ["Backend.DirectRouting", "Backend.Foo", "Netwrk"]);
}

#[test]
fn subnet_larger_than_bridge_ports_warns() {
    let warnings = |text: &str| NetworkConfig::parse(text).expect(text).warnings;
    let found = warnings(r#"{"Network":"10.244.0.0/16","SubnetLen":21}"#);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].field, "SubnetLen");
    assert!(
        found[0].rule.starts_with("of 21 gives each host 2045 addresses for containers, more than the 1023 ports"),
        "{found:?}"
    );
    for fits in [
        r#"{"Network":"10.244.0.0/16","SubnetLen":22}"#,
        r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#,
    ] {
        assert_eq!(warnings(fits), [], "{fits}");
    }
}

#[test]
fn pool_index_round_trips() {
    let pool = parse_valid(r#"{"Network":"10.244.0.0/16","SubnetLen":26,"SubnetMin":"10.244.10.0","SubnetMax":"10.244.20.0"}"#)
        .pools
        .v4
        .expect("IPv4");
    assert_eq!(pool.count(), 41);
    for index in 0..41 {
        assert_eq!(pool.nth(index).and_then(|s| pool.index_of(s)), Some(index));
    }
    assert_eq!(pool.nth(41), None);
    assert_eq!(pool.index_of("10.244.0.0/26".parse().expect("a CIDR")), None);
}

#[test]
fn leasable_without_excludes_subnets_holding_addresses() {
    let pool = parse_valid(r#"{"Network":"10.1.0.0/22","SubnetMin":"10.1.0.0"}"#).pools.v4.expect("IPv4");
    let without = |addresses: &[&str]| {
        let addresses = addresses.iter().map(|text| text.parse().expect("an address")).collect();
        pool.leasable_without(&addresses).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(without(&[]), "10.1.0.0/22");
    assert_eq!(without(&["10.9.0.1", "fd00::1"]), "10.1.0.0/22");
    assert_eq!(without(&["10.1.1.7"]), "10.1.0.0/24 10.1.2.0/23");
    assert_eq!(without(&["10.1.1.0", "10.1.1.255", "10.1.2.9"]), "10.1.0.0/24 10.1.3.0/24");
    assert_eq!(without(&["10.1.0.1", "10.1.1.1", "10.1.2.1", "10.1.3.1"]), "");
}

#[test]
fn leasable_covers_exactly_the_pool() {
    let ranges = |text: &str| {
        let (_, pool) = parse_valid(text).pools.iter().next().map(|(f, p)| (f, *p)).expect("a pool");
        let ranges = pool.leasable();
        let covered = |address: std::net::IpAddr| ranges.iter().any(|range| range.contains(address));
        for address in [pool.network.base(), pool.min.base(), pool.max.last(), pool.network.last()] {
            assert_eq!(covered(address), pool.covers_address(address), "{address}");
        }
        ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(ranges(r#"{"Network":"10.1.0.0/22","SubnetMin":"10.1.0.0"}"#), "10.1.0.0/22");
    assert_eq!(ranges(r#"{"Network":"10.1.0.0/22"}"#), "10.1.1.0/24 10.1.2.0/23");
    assert_eq!(
        ranges(r#"{"Network":"10.0.0.0/8","SubnetMin":"10.10.0.0","SubnetMax":"10.99.0.0"}"#),
        "10.10.0.0/15 10.12.0.0/14 10.16.0.0/12 10.32.0.0/11 10.64.0.0/11 10.96.0.0/15 10.98.0.0/16 10.99.0.0/24"
    );
    assert_eq!(
        ranges(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fdff:ffff:ffff:ff00::/56"}"#).split(' ').next_back(),
        Some("fdff:ffff:ffff:ff80::/57")
    );
}

#[test]
fn span_is_smallest_covering_cidr() {
    for (text, span) in [
        (r#"{"Network":"10.244.0.0/16"}"#, "10.244.0.0/16"),
        (r#"{"Network":"10.0.0.0/8","SubnetMin":"10.10.0.0","SubnetMax":"10.99.0.0"}"#, "10.0.0.0/9"),
        (r#"{"Network":"10.0.0.0/8","SubnetMin":"10.10.0.0","SubnetMax":"10.10.255.0"}"#, "10.10.0.0/16"),
        (r#"{"Network":"10.0.0.0/8","SubnetMin":"10.10.7.0","SubnetMax":"10.10.7.0"}"#, "10.10.7.0/24"),
    ] {
        let pool = parse_valid(text).pools.v4.expect("a pool");
        assert_eq!(pool.span().to_string(), span, "{text}");
        assert!(pool.leasable().iter().all(|range| pool.span().covers(*range)), "{text}");
    }
}
