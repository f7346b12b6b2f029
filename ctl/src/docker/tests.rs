use super::*;

fn options() -> DockerOptions {
    DockerOptions {
        bridge: "ovb.1".to_owned(),
        fixed_cidr: "10.244.7.128/25".parse().expect("a range"),
        mtu: 1450,
        ip_masq: false,
        ipv6: false,
        fixed_cidr_v6: None,
    }
}

fn merged(options: &DockerOptions, config: &str) -> Result<Value, String> {
    let Ok(Value::Object(present)) = serde_json::from_str(config) else { panic!("{config}") };
    options.merged(Path::new("/etc/docker/daemon.json"), present).map(Value::Object).map_err(|error| error.to_string())
}

#[test]
fn options_render_as_flags_and_keys() {
    assert_eq!(options().flags(), "--bridge=ovb.1 --fixed-cidr=10.244.7.128/25 --ip-masq=false --mtu=1450");
    let dual = DockerOptions { ipv6: true, fixed_cidr_v6: Some("fd00::/64".parse().expect("a range")), ..options() };
    assert!(dual.flags().contains("--fixed-cidr-v6=fd00::/64 --ip-masq=false --ipv6=true"), "{}", dual.flags());
    assert!(dual.keys().keys().all(|key| OWN_KEYS.contains(&key.as_str())));
}

#[test]
fn foreign_keys_are_kept() {
    let found = merged(&options(), r#"{"log-driver": "journald", "hosts": ["unix://"], "mtu": 1450}"#).expect("no conflict");
    let expected = serde_json::json!({
        "log-driver": "journald", "hosts": ["unix://"],
        "bridge": "ovb.1", "fixed-cidr": "10.244.7.128/25", "mtu": 1450, "ip-masq": false
    });
    assert_eq!(found, expected);
    // A second merge changes nothing.
    assert_eq!(merged(&options(), &expected.to_string()).expect("no conflict"), expected);
}

#[test]
fn options_of_old_lease_are_replaced() {
    let earlier = r#"{"bridge": "ovb.7", "fixed-cidr": "10.9.1.128/25", "mtu": 1430, "ip-masq": false, "ipv6": true,
        "fixed-cidr-v6": "fd00:9::/64", "debug": true}"#;
    let mut expected = options().keys();
    expected.insert("debug".to_owned(), Value::Bool(true));
    assert_eq!(merged(&options(), earlier).expect("no conflict"), Value::Object(expected));
}

#[test]
fn every_conflict_is_reported() {
    let present =
        r#"{"bip": "172.17.0.1/16", "bridge": "docker0", "mtu": 1500, "default-gateway": "172.17.0.1", "ip-masq": false}"#;
    let error = merged(&options(), present).expect_err("conflicts");
    for part in [
        "/etc/docker/daemon.json",
        r#""bip": "172.17.0.1/16": "#,
        r#""bridge": "docker0": it must be "ovb.1""#,
        r#""mtu": 1500: it must be 1450"#,
        r#""default-gateway": "172.17.0.1": "#,
        "nothing was written",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
    assert!(!error.contains("ip-masq"), "{error}");
    // A similar prefix does not make a bridge ours.
    assert!(merged(&options(), r#"{"bridge": "ovb.x"}"#).is_err());
    // A key that we never write is not ours, even in a file that is otherwise ours.
    assert!(merged(&options(), r#"{"bridge": "ovb.1", "bip": "10.244.7.1/24"}"#).is_err());
}

#[test]
fn malformed_config_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("daemon.json");
    assert_eq!(read_config(&path).expect("none is none"), Map::new());
    for (text, expected) in [("[]", "it contains an array"), ("{\"mtu\": }", "line 1"), ("{} x", "trailing")] {
        std::fs::write(&path, text).expect("writable");
        let error = read_config(&path).expect_err(text).to_string();
        assert!(error.contains(expected) && error.contains("daemon.json"), "{error}");
    }
    std::fs::write(&path, "\n").expect("writable");
    assert_eq!(read_config(&path).expect("an empty file is none"), Map::new());
}
