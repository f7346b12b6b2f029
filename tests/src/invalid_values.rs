//! Random invalid and hostile leases and configurations in etcd, and the invariants for them.
//!
//! The values are derived from those of a real flanneld. The same seed gives the same values.

use std::net::IpAddr;

use overlay_agent::model::event::StoreEntry;
use overlay_agent::model::{Cidr, Family, Mac, NetworkConfig, PeerEndpoint, PerFamily, Subnet};
use overlay_agent::plan::lease_table::{Classification, LeaseTable, LocalHost};
use overlay_agent::store::read_entry;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::ExpectContext;

/// The network configuration for the classification of random entries.
const NETWORK_CONFIG: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#;
/// Subnet key and number (address, MAC) of this host, and of two peers with valid leases.
const OWN_LEASE: (&str, u8) = ("10.244.9.0-24&fd00:10:244:9::-64", 9);
const VALID_PEERS: [(&str, u8); 2] = [("10.244.1.0-24&fd00:10:244:1::-64", 1), ("10.244.2.0-24&fd00:10:244:2::-64", 2)];
/// Maximum length in bytes of a text about an entry: one log line.
const MAX_LINE_LENGTH: usize = 2000;

/// Key suffixes and values written by a real flanneld.
pub fn recorded_leases() -> Vec<(String, String)> {
    let texts = [
        include_str!("../fixtures/flannel-v0.20.2/vxlan/etcd.txt"),
        include_str!("../fixtures/flannel-v0.20.2/vxlan-dualstack/etcd.txt"),
        include_str!("../fixtures/flannel-v0.20.2/vxlan-directrouting/etcd.txt"),
        include_str!("../fixtures/flannel-v0.20.2/host-gw/etcd.txt"),
    ];
    let lines: Vec<&str> = texts.iter().flat_map(|text| text.lines()).collect();
    let pairs = lines.windows(2).filter_map(|pair| {
        let key = pair[0].strip_prefix("/coreos.com/network/subnets/")?;
        Some((key.to_owned(), pair[1].to_owned()))
    });
    pairs.collect()
}

/// Checks the invariants of any entry. It is parsed without a panic and always with the same result; its texts fit a log line. It
/// does not displace a valid peer, and does not lead outside the network, to this host, or to an address that is no host.
pub fn check_entry(key: &str, value: &[u8]) {
    let network = NetworkConfig::parse(NETWORK_CONFIG).expect_ok("the network").config;
    let entry = read_entry(key, value, 100);
    assert_eq!(entry, read_entry(key, value, 100), "a second read has the same result");
    if let Err(reason) = &entry.value {
        assert_log_line(&reason.to_string());
    }
    let own = own_host();
    let mut table = LeaseTable::default();
    let mut entries = vec![host_entry(OWN_LEASE, 1)];
    entries.extend(VALID_PEERS.map(|peer| host_entry(peer, 2)));
    table.replace(entries);
    table.upsert(entry);
    for (valid_key, _) in VALID_PEERS.iter().filter(|(good, _)| *good != key) {
        let classification = table.classify(valid_key, &network, Some(&own));
        assert!(matches!(classification, Some(Classification::Accepted(_))), "{valid_key} is not accepted: {classification:?}");
    }
    match table.classify(key, &network, Some(&own)).expect_ok("the entry is in the table") {
        Classification::Own => assert_eq!(Subnet::from_key(key).ok(), Some(own.subnet)),
        Classification::Rejected(reason) => assert_log_line(&reason.to_string()),
        Classification::Accepted(peer) => {
            for (family, remote) in peer.remote_subnets.iter() {
                let pool = network.pools.get(family).expect_ok("a family of the network");
                assert!(pool.network.covers(remote.subnet), "{} is outside the network", remote.subnet);
                assert!(remote.subnet.length() >= pool.network.length() + 2, "{} is most of the network", remote.subnet);
                assert!(
                    !own.subnet.get(family).expect_ok("the own subnet").overlaps(remote.subnet),
                    "{} overlaps the own subnet",
                    remote.subnet
                );
                assert!(
                    is_unicast_host(remote.public_ip)
                        && !pool.covers_address(remote.public_ip)
                        && !remote.subnet.contains(remote.public_ip),
                    "{} is not a host address",
                    remote.public_ip
                );
                assert_ne!(Some(&remote.public_ip), own.public_ip.get(family), "our own address");
                let mac = remote.endpoint.and_then(PeerEndpoint::mac).expect_ok("a VTEP");
                assert!(mac.is_unicast() && remote.endpoint.as_ref() != own.endpoints.get(family), "{mac}");
            }
        }
    }
}

/// Checks the invariants of any configuration. It is parsed without a panic, its errors fit log lines, and pools lie inside the
/// network.
pub fn check_config(text: &str) {
    match NetworkConfig::parse(text) {
        Err(errors) => errors.0.iter().for_each(|error| assert_log_line(&error.to_string())),
        Ok(parsed) => {
            for (family, pool) in parsed.config.pools.iter() {
                assert_eq!(pool.network.family(), family);
                assert!(pool.count() > 0, "a pool without subnets: {text}");
                for index in [0, pool.count() / 2, pool.count() - 1] {
                    let subnet = pool.nth(index).expect_ok("a subnet of the pool");
                    assert!(pool.network.covers(subnet) && pool.allows_subnet(subnet), "{subnet} of {text}");
                    assert_eq!(pool.index_of(subnet), Some(index));
                }
                assert_eq!(pool.nth(pool.count()), None);
            }
        }
    }
}

fn assert_log_line(text: &str) {
    assert!(text.len() <= MAX_LINE_LENGTH, "{} bytes", text.len());
    assert!(!text.chars().any(char::is_control), "control characters reach a terminal: {text:?}");
}

fn is_unicast_host(address: IpAddr) -> bool {
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast())
}

fn addresses(number: u8) -> PerFamily<IpAddr> {
    PerFamily { v4: format!("192.0.2.{number}").parse().ok(), v6: format!("2001:db8::{number:x}").parse().ok() }
}

fn own_host() -> LocalHost {
    let own = PeerEndpoint::Vxlan(Mac([2, 0, 0, 0, 0, OWN_LEASE.1]));
    let subnet = Subnet::from_key(OWN_LEASE.0).expect_ok("a key");
    LocalHost {
        subnet,
        public_ip: addresses(OWN_LEASE.1),
        endpoints: PerFamily { v4: Some(own), v6: Some(own) },
        isolated: false,
    }
}

fn host_entry((key, number): (&str, u8), revision: i64) -> StoreEntry {
    let public_ip = addresses(number);
    let data = json!({ "VNI": 1, "VtepMAC": format!("02:00:00:00:00:{number:02x}") });
    let value = json!({
        "PublicIP": public_ip.v4, "PublicIPv6": public_ip.v6, "BackendType": "vxlan", "BackendData": data, "BackendV6Data": data,
    });
    read_entry(key, value.to_string().as_bytes(), revision)
}

/// Generates random entries and configurations.
#[derive(Debug)]
pub struct InvalidValueGenerator {
    rng: StdRng,
    recorded_leases: Vec<(String, String)>,
}

impl InvalidValueGenerator {
    /// A generator with a seed.
    pub fn new(seed: u64) -> InvalidValueGenerator {
        InvalidValueGenerator { rng: StdRng::seed_from_u64(seed), recorded_leases: recorded_leases() }
    }

    /// A random key suffix and value.
    pub fn random_entry(&mut self) -> (String, Vec<u8>) {
        let (key, value) = self.recorded_leases[self.rng.random_range(0..self.recorded_leases.len())].clone();
        let key = if self.rng.random_bool(0.8) { self.random_key() } else { key };
        (key, self.mutate(&value))
    }

    /// A random configuration.
    pub fn random_config(&mut self) -> Vec<u8> {
        let valid_configs = [
            NETWORK_CONFIG,
            r#"{"Network":"10.244.0.0/16","SubnetLen":24,"SubnetMin":"10.244.1.0","SubnetMax":"10.244.99.0","Backend":{"Type":"vxlan","VNI":1,"Port":8472}}"#,
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","IPv6SubnetLen":64}"#,
        ];
        let text = valid_configs[self.rng.random_range(0..valid_configs.len())];
        self.mutate(text)
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.rng.random_range(0..choices.len())]
    }

    fn random_key(&mut self) -> String {
        const ODD: [&str; 12] = [
            "",
            "-",
            "0.0.0.0-0",
            "::-0",
            "10.244.0.0-16",
            "10.244.3.7-24",
            "10.244.3.0-33",
            "10.244.3.0-24&",
            "10.244.3.0-24/../config",
            "10.244.3.0-24;reboot",
            "\u{1b}[2J",
            "fd00:10:244:3::-64&10.244.3.0-24",
        ];
        if self.rng.random_bool(0.2) {
            return self.pick(&ODD).to_owned();
        }
        let v4 = |random: &mut StdRng| {
            let first = if random.random_bool(0.7) { [10, 244] } else { random.random() };
            let address = IpAddr::from([first[0], first[1], random.random(), random.random()]);
            subnet_key(address, random.random_range(8..=32))
        };
        let v6 = |random: &mut StdRng| {
            let mut words: [u16; 8] = random.random();
            if random.random_bool(0.7) {
                words[..3].copy_from_slice(&[0xfd00, 0x10, 0x244]);
                words[3] &= 0xff;
            }
            subnet_key(IpAddr::from(words), random.random_range(32..=128))
        };
        match self.rng.random_range(0..4) {
            0 => format!("{}&{}", v4(&mut self.rng), v6(&mut self.rng)),
            1 => v6(&mut self.rng),
            _ => v4(&mut self.rng),
        }
    }

    /// Changes a JSON text in several places, as JSON or as bytes.
    fn mutate(&mut self, text: &str) -> Vec<u8> {
        let mut value: Value = serde_json::from_str(text).expect_ok("recorded JSON");
        for _ in 0..self.rng.random_range(0..4) {
            let atom = self.random_json_value();
            let name = self.random_field(&value);
            let slot = match value.get_mut(&name) {
                Some(Value::Object(inner)) if self.rng.random_bool(0.8) => {
                    let inner_name = self.pick(&["VNI", "VtepMAC", "vtepmac", "Type", "Port", "Name", "Id", "x"]);
                    inner.entry(inner_name).or_insert(Value::Null)
                }
                _ => match value.as_object_mut() {
                    Some(fields) => fields.entry(name).or_insert(Value::Null),
                    None => break,
                },
            };
            *slot = atom;
        }
        let mut bytes = value.to_string().into_bytes();
        for _ in 0..self.pick(&[0, 0, 0, 1, 3]) {
            let at = self.rng.random_range(0..bytes.len());
            match self.rng.random_range(0..4) {
                0 => bytes[at] = self.rng.random(),
                1 => bytes.truncate(at.max(1)),
                2 => bytes.insert(at, self.rng.random()),
                _ => bytes.extend_from_within(at..),
            }
        }
        bytes
    }

    fn random_field(&mut self, value: &Value) -> String {
        let names: Vec<&String> = value.as_object().map(|fields| fields.keys().collect()).unwrap_or_default();
        match names.len() {
            0 => "Node".to_owned(),
            _ if self.rng.random_bool(0.1) => "Node".to_owned(),
            count => names[self.rng.random_range(0..count)].clone(),
        }
    }

    fn random_json_value(&mut self) -> Value {
        match self.rng.random_range(0..9) {
            0 => Value::Null,
            1 => json!(self.pick(&[0_i64, 1, -1, 25, 4096, 16_777_215, 16_777_216, i64::MAX])),
            2 => json!(self.pick(&[1.5, 1e300, -0.0])),
            3 => json!(self.pick(&[
                "",
                "vxlan",
                "host-gw",
                "10.244.9.1",
                "192.0.2.9",
                "192.0.2.77",
                "127.0.0.1",
                "224.0.0.1",
                "0.0.0.0",
                "255.255.255.255",
                "::",
                "::1",
                "::ffff:192.0.2.9",
                "2001:db8::9",
                "10.244.0.0/16",
                "0.0.0.0/0",
                "02:00:00:00:00:09",
                "02:00:00:00:00:01",
                "01:00:5e:00:00:01",
                "$(reboot)",
                "\u{1b}[31m",
            ])),
            4 => json!("A".repeat(self.pick(&[100, 300, 20_000]))),
            5 => (0..self.pick(&[1, 100, 200])).fold(json!(1), |inner, _| json!([inner])),
            6 => json!({ "VNI": 1, "VtepMAC": "02:00:00:00:00:55" }),
            7 => json!({ "Name": "n", "Id": "i" }),
            _ => json!(self.rng.random_bool(0.5)),
        }
    }
}

/// A subnet in key form, sometimes with host bits set.
fn subnet_key(address: IpAddr, length: u8) -> String {
    let range = Cidr::containing(address, length).filter(|_| address.is_ipv4() || length % 16 != 1);
    range.map_or_else(|| format!("{address}-{length}"), |c| format!("{}-{}", c.base(), c.length()))
}

/// Whether an entry's key overlaps one of these ranges, in either family.
pub fn overlaps_any(key: &str, ranges: &[Subnet]) -> bool {
    let ranges_of = |subnet: &Subnet| Family::ALL.into_iter().filter_map(|family| subnet.get(family)).collect::<Vec<_>>();
    Subnet::from_key(key).is_ok_and(|subnet| {
        let key_ranges = ranges_of(&subnet);
        ranges.iter().flat_map(ranges_of).any(|range| key_ranges.iter().any(|other| other.overlaps(range)))
    })
}
