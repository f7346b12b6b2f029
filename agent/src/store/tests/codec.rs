//! Tests of decoding and encoding lease values.

use proptest::prelude::*;

use super::*;
use crate::model::{Mac, Vni};

const FLANNEL: &str =
    r#"{"PublicIP":"10.99.1.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"4a:de:38:28:a5:6b"}}"#;
const DUAL: &str = r#"{"PublicIP":"10.99.1.1","PublicIPv6":"fd99::1:1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:b3:ec:32:65:47"},"BackendV6Data":{"VNI":1,"VtepMAC":"ba:1b:a3:ca:ed:d5"},"Node":{"Name":"h1","Id":"0123abcd"}}"#;

fn entry(key: &str, value: &str) -> RawEntry {
    RawEntry { key: key.to_owned(), value: value.as_bytes().to_vec(), create_revision: 5, mod_revision: 9, etcd_lease: Some(77) }
}

fn decode_valid(key: &str, value: &str) -> Lease {
    decode(&entry(key, value)).value.unwrap_or_else(|e| panic!("{e}: {value}")).lease
}

/// The entries of a recorded etcd dump, which alternates keys and values.
fn recorded_values(folder: &str) -> Vec<(String, String)> {
    let path = format!("{}/../tests/fixtures/flannel-v0.20.2/{folder}/etcd.txt", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    lines
        .chunks(2)
        .filter_map(|pair| Some((pair[0].strip_prefix("/coreos.com/network/subnets/")?.to_owned(), pair[1].to_owned())))
        .collect()
}

#[test]
fn recorded_values_round_trip_byte_for_byte() {
    let mut seen = 0;
    for folder in ["vxlan", "vxlan-dualstack", "vxlan-directrouting", "host-gw"] {
        for (key, value) in recorded_values(folder) {
            let lease = decode_valid(&key, &value);
            assert_eq!(encode(&lease).unwrap(), value, "{folder} {key}");
            assert_eq!(lease.node, None);
            seen += 1;
        }
    }
    assert_eq!(seen, 8);
    assert_eq!(
        decode_valid("10.244.15.0-24", &recorded_values("host-gw")[0].1).backend,
        BackendData::Other { name: "host-gw".to_owned() }
    );
}

#[test]
fn node_is_appended_to_flannel_value() {
    let lease = decode_valid("10.244.101.0-24&fd00:10:244:51::-64", DUAL);
    assert_eq!(lease.node, Some(Node { name: "h1".to_owned(), id: "0123abcd".to_owned() }));
    assert_eq!(encode(&lease).unwrap(), DUAL);
}

#[test]
fn ipv6_only_lease_is_decoded() {
    let value = r#"{"PublicIP":null,"PublicIPv6":"fd99::1:1","BackendType":"vxlan","BackendV6Data":{"VNI":7,"VtepMAC":"ba:1b:a3:ca:ed:d5"}}"#;
    assert_eq!(encode(&decode_valid("fd00:10:244:51::-64", value)).unwrap(), value);
}

#[test]
fn keys_are_case_insensitive_and_unknown_ones_ignored() {
    let value = r#"{"publicip":"10.99.1.1","BACKENDTYPE":"vxlan","backenddata":{"vni":1,"vtepmac":"4A:DE:38:28:A5:6B","x":1},"Later":[{}]}"#;
    assert_eq!(decode_valid("10.244.27.0-24", value), decode_valid("10.244.27.0-24", FLANNEL));
}

#[test]
fn hostile_values_are_rejected_with_field_and_rule() {
    let swap = |from: &str, to: &str| {
        assert!(FLANNEL.contains(from), "{from}");
        FLANNEL.replace(from, to)
    };
    let dual = |from: &str, to: &str| DUAL.replace(from, to);
    let v4 = "10.244.27.0-24";
    let both = "10.244.101.0-24&fd00:10:244:51::-64";
    let table: Vec<(&str, String, &str)> = vec![
        (v4, String::new(), "it is not JSON"),
        (v4, "{".to_owned(), "it is not JSON"),
        (v4, "[]".to_owned(), "it is not a JSON object"),
        (v4, "\"x\"".to_owned(), "it is not a JSON object"),
        (v4, "[".repeat(10_000), "it is not JSON"),
        (v4, "x".repeat(1 << 20), "1048576 bytes, more than the 16384"),
        (v4, "{}".to_owned(), "PublicIP is missing"),
        (v4, swap("10.99.1.1", "10.99.1.1; reboot"), "PublicIP is `10.99.1.1; reboot`: must be an IPv4 address"),
        (v4, swap("10.99.1.1", "fd99::1"), "PublicIP is `fd99::1`"),
        (v4, swap("10.99.1.1", "0.0.0.0"), "the unspecified address"),
        (v4, swap("10.99.1.1", "0.1.2.3"), "this network"),
        (v4, swap("10.99.1.1", "127.0.0.1"), "a loopback address"),
        (v4, swap("10.99.1.1", "224.0.0.1"), "a multicast address"),
        (v4, swap("10.99.1.1", "169.254.1.1"), "a link-local address"),
        (v4, swap("10.99.1.1", "255.255.255.255"), "the broadcast address"),
        (v4, swap("\"10.99.1.1\"", "7"), "PublicIP is `7`: must be a string"),
        (v4, swap(r#""vxlan""#, "null"), "BackendType is missing"),
        (v4, swap("vxlan", "vx lan"), "BackendType is `vx lan`"),
        (v4, swap("vxlan", &"v".repeat(40)), "BackendType"),
        (v4, swap(r#"{"VNI":1,"VtepMAC":"4a:de:38:28:a5:6b"}"#, "null"), "BackendData is missing"),
        (v4, swap(r#"{"VNI":1,"VtepMAC":"4a:de:38:28:a5:6b"}"#, "[1]"), "BackendData is `[1]`"),
        (v4, swap("\"VNI\":1", "\"VNI\":0"), "BackendData.VNI is `0`"),
        (v4, swap("\"VNI\":1", "\"VNI\":16777216"), "BackendData.VNI is `16777216`"),
        (v4, swap("\"VNI\":1", "\"VNI\":-1"), "BackendData.VNI is `-1`"),
        (v4, swap("\"VNI\":1", "\"VNI\":1.5"), "BackendData.VNI is `1.5`"),
        (v4, swap("\"VNI\":1,", ""), "BackendData.VNI is missing"),
        (v4, swap("4a:de:38:28:a5:6b", ""), "BackendData.VtepMAC is missing"),
        (v4, swap("4a:de:38:28:a5:6b", "4a:de:38:28:a5"), "BackendData.VtepMAC is `4a:de:38:28:a5`"),
        (v4, swap("4a:de:38:28:a5:6b", "01:00:5e:00:00:01"), "must be a unicast MAC"),
        (v4, swap("4a:de:38:28:a5:6b", "ff:ff:ff:ff:ff:ff"), "must be a unicast MAC"),
        (v4, swap("4a:de:38:28:a5:6b", "00:00:00:00:00:00"), "must be a unicast MAC"),
        (v4, swap("4a:de:38:28:a5:6b", "$(reboot)"), "`$(reboot)`"),
        (both, dual("fd99::1:1", "::"), "PublicIPv6 is `::`"),
        (both, dual("fd99::1:1", "::1"), "a loopback address"),
        (both, dual("fd99::1:1", "fe80::1"), "a link-local address"),
        (both, dual("fd99::1:1", "ff02::1"), "a multicast address"),
        (both, dual("fd99::1:1", "::ffff:10.1.1.1"), "an IPv4-mapped address"),
        (both, dual("\"fd99::1:1\"", "null"), "PublicIPv6 is missing"),
        (both, dual("BackendV6Data", "Other"), "BackendV6Data is missing"),
        (both, dual(r#""BackendV6Data":{"VNI":1"#, r#""BackendV6Data":{"VNI":2"#), "both families"),
        (both, dual(r#"{"Name":"h1","Id":"0123abcd"}"#, "7"), "Node is `7`"),
        (both, dual("\"h1\"", "\"$(reboot)\""), "Node.Name is `$(reboot)`"),
        (both, dual("\"h1\"", "\"h1\\u001b[2J\""), "Node.Name"),
        (both, dual("\"h1\"", "\"\""), "Node.Name is missing"),
        (both, dual("\"h1\"", &format!("\"{}\"", "n".repeat(254))), "must be 1 to 253"),
        (both, dual("0123abcd", &"i".repeat(65)), "must be 1 to 64"),
        (both, dual("\"0123abcd\"", "{}"), "Node.Id is `{}`"),
        ("10.244.27.1-24", FLANNEL.to_owned(), "its key is no subnet"),
        ("0.0.0.0/0", FLANNEL.to_owned(), "its key is no subnet"),
        ("$(reboot)", FLANNEL.to_owned(), "its key is no subnet"),
        ("a/b/c", FLANNEL.to_owned(), "its key is no subnet"),
        ("", FLANNEL.to_owned(), "its key is no subnet"),
    ];
    for (key, value, wanted) in table {
        let decoded = decode(&entry(key, &value));
        assert_eq!(decoded.key, key);
        let refusal = decoded.value.expect_err(&value);
        let message = refusal.to_string();
        assert!(message.contains(wanted), "`{wanted}` is not in: {message}");
        assert!(message.len() < 500 && !message.contains(char::is_control), "not fit for a log line: {message}");
    }
}

#[test]
fn owner_is_read_from_partial_values() {
    let read = |value: &str| owner(value.as_bytes());
    assert_eq!(read(r#"{"PublicIP":"10.99.1.7"}"#).public_ip.v4.map(|a| a.to_string()).as_deref(), Some("10.99.1.7"));
    assert_eq!(read(r#"{"Node":{"Name":"h","Id":"i"}}"#).node.map(|n| n.id).as_deref(), Some("i"));
    for nothing in ["", "{}", "[]", "{", r#"{"PublicIP":"127.0.0.1","Node":{"Name":"$","Id":"i"}}"#] {
        assert_eq!(read(nothing), Owner::default(), "{nothing}");
    }
}

fn any_lease() -> impl Strategy<Value = (Subnet, Lease)> {
    let mac = any::<[u8; 6]>().prop_map(Mac::local);
    let word = "[A-Za-z0-9._-]{1,20}";
    (any::<(u8, u8, u8)>(), 1_u32..(1 << 24), mac.clone(), mac, word, word, any::<[bool; 2]>()).prop_map(
        |((families, a, b), vni, mac4, mac6, name, id, [vxlan, ours])| {
            let families: Vec<Family> =
                Family::ALL.into_iter().enumerate().filter(|(i, _)| (families % 3) as usize != *i).map(|(_, f)| f).collect();
            let value = |family, v4: String, v6: String| match family {
                Family::V4 => v4,
                Family::V6 => v6,
            };
            let cidr = |f| value(f, format!("10.{a}.{b}.0/24"), format!("fd00:{a:x}:{b:x}::/64")).parse().unwrap();
            let address = |f| value(f, format!("192.168.{a}.{b}"), format!("fd99::{a:x}:{b:x}")).parse().unwrap();
            let vtep = families.iter().map(|f| (*f, if *f == Family::V4 { mac4 } else { mac6 })).collect();
            let backend = if vxlan {
                BackendData::Vxlan { vni: Vni::try_from(vni).unwrap(), vtep }
            } else {
                BackendData::Other { name: name.clone() }
            };
            let node = ours.then_some(Node { name, id });
            let subnet = Subnet::new(families.iter().map(|f| (*f, cidr(*f))).collect()).unwrap();
            (subnet, Lease { public_ip: families.iter().map(|f| (*f, address(*f))).collect(), backend, node })
        },
    )
}

proptest! {
    #[test]
    fn encoded_lease_decodes_unchanged((subnet, lease) in any_lease()) {
        let text = encode(&lease).unwrap();
        prop_assert_eq!(decode_value(&subnet, text.as_bytes()), Ok(lease));
    }

    #[test]
    fn random_bytes_do_not_panic_decoder(key in ".{0,40}", value in prop::collection::vec(any::<u8>(), 0..300)) {
        let raw = RawEntry { key, value, create_revision: 1, mod_revision: 1, etcd_lease: None };
        let _ = decode(&raw);
        let _ = owner(&raw.value);
    }

    #[test]
    fn mutated_lease_does_not_panic_decoder(at in 0..DUAL.len(), byte in any::<u8>(), cut in 0..DUAL.len()) {
        let mut value = DUAL.as_bytes().to_vec();
        value[at] = byte;
        let _ = decode_value(&Subnet::from_key("10.244.101.0-24&fd00:10:244:51::-64").unwrap(), &value);
        value.truncate(cut);
        let _ = owner(&value);
    }
}
