//! What others may write into etcd: broken and hostile leases and configurations, made up from what a real flanneld wrote, and what has to hold
//! whatever stands there. A seed gives the same junk again.

use std::net::IpAddr;

use overlay_agent::model::event::StoreEntry;
use overlay_agent::model::{Cidr, Family, Mac, NetworkConfig, PerFamily, Subnet};
use overlay_agent::plan::roster::{OwnHost, Roster, Standing};
use overlay_agent::store::read_entry;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::Must;

/// The network that junk is judged in.
const NETWORK: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#;
/// This host's subnet, address and MAC, and those of two peers that were there before.
const OWN: (&str, u8) = ("10.244.9.0-24&fd00:10:244:9::-64", 9);
const GOOD: [(&str, u8); 2] = [("10.244.1.0-24&fd00:10:244:1::-64", 1), ("10.244.2.0-24&fd00:10:244:2::-64", 2)];
/// The longest text about an entry, in bytes: one line of a log.
const LONGEST: usize = 2000;

/// What a real flanneld wrote: keys' last parts and values.
pub fn recorded() -> Vec<(String, String)> {
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

/// Whatever an entry is: it is read without a panic, the same way twice; what is said of it fits a line of a log; and it neither takes a good
/// peer's place nor leads anywhere outside the network, to this host, or to no host at all.
pub fn check_entry(key: &str, value: &[u8]) {
    let network = NetworkConfig::parse(NETWORK).must("the network").config;
    let entry = read_entry(key, value, 100);
    assert_eq!(entry, read_entry(key, value, 100), "read twice it is the same");
    if let Err(refusal) = &entry.value {
        assert_line(&refusal.to_string());
    }
    let own = own_host();
    let mut roster = Roster::default();
    let mut others = vec![host_entry(OWN, 1)];
    others.extend(GOOD.map(|good| host_entry(good, 2)));
    roster.replace(others);
    roster.upsert(entry);
    for (good, _) in GOOD.iter().filter(|(good, _)| *good != key) {
        let standing = roster.standing(good, &network, Some(&own));
        assert!(matches!(standing, Some(Standing::Peer(_))), "{good} is out of the data path: {standing:?}");
    }
    match roster.standing(key, &network, Some(&own)).must("it is there") {
        Standing::Own => assert_eq!(Subnet::from_key(key).ok(), Some(own.subnet)),
        Standing::Refused(refusal) => assert_line(&refusal.to_string()),
        Standing::Peer(peer) => {
            for (family, reach) in peer.reach.iter() {
                let pool = network.pools.get(family).must("a family of the network");
                assert!(pool.network.covers(reach.subnet), "{} is outside the network", reach.subnet);
                assert!(reach.subnet.length() >= pool.network.length() + 2, "{} is most of the network", reach.subnet);
                assert!(!own.subnet.get(family).must("ours").overlaps(reach.subnet), "{} is ours", reach.subnet);
                assert!(
                    is_host(reach.public_ip) && !pool.may_lease(reach.public_ip) && !reach.subnet.contains(reach.public_ip),
                    "{} is no host",
                    reach.public_ip
                );
                assert_ne!(Some(&reach.public_ip), own.public_ip.get(family), "our own address");
                assert!(reach.vtep.is_unicast() && Some(&reach.vtep) != own.vtep.get(family), "{}", reach.vtep);
            }
        }
    }
}

/// Whatever a configuration is: it is read without a panic, its mistakes fit lines of a log, and what is accepted gives out subnets of the network.
pub fn check_config(text: &str) {
    match NetworkConfig::parse(text) {
        Err(errors) => errors.0.iter().for_each(|error| assert_line(&error.to_string())),
        Ok(parsed) => {
            for (family, pool) in parsed.config.pools.iter() {
                assert_eq!(pool.network.family(), family);
                assert!(pool.count() > 0, "a pool without subnets: {text}");
                for index in [0, pool.count() / 2, pool.count() - 1] {
                    let subnet = pool.nth(index).must("a subnet of the pool");
                    assert!(pool.network.covers(subnet) && pool.leases(subnet), "{subnet} of {text}");
                    assert_eq!(pool.index_of(subnet), Some(index));
                }
                assert_eq!(pool.nth(pool.count()), None);
            }
        }
    }
}

fn assert_line(text: &str) {
    assert!(text.len() <= LONGEST, "{} bytes", text.len());
    assert!(!text.chars().any(char::is_control), "control characters reach a terminal: {text:?}");
}

fn is_host(address: IpAddr) -> bool {
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast())
}

fn addresses(number: u8) -> PerFamily<IpAddr> {
    PerFamily { v4: format!("192.0.2.{number}").parse().ok(), v6: format!("2001:db8::{number:x}").parse().ok() }
}

fn own_host() -> OwnHost {
    let mac = Mac([2, 0, 0, 0, 0, OWN.1]);
    let subnet = Subnet::from_key(OWN.0).must("a key");
    OwnHost { subnet, public_ip: addresses(OWN.1), vtep: PerFamily { v4: Some(mac), v6: Some(mac) } }
}

fn host_entry((key, number): (&str, u8), revision: i64) -> StoreEntry {
    let public_ip = addresses(number);
    let data = json!({ "VNI": 1, "VtepMAC": format!("02:00:00:00:00:{number:02x}") });
    let value = json!({
        "PublicIP": public_ip.v4, "PublicIPv6": public_ip.v6, "BackendType": "vxlan", "BackendData": data, "BackendV6Data": data,
    });
    read_entry(key, value.to_string().as_bytes(), revision)
}

/// Makes junk up.
#[derive(Debug)]
pub struct Junk {
    random: StdRng,
    recorded: Vec<(String, String)>,
}

impl Junk {
    /// The junk of a seed.
    pub fn new(seed: u64) -> Junk {
        Junk { random: StdRng::seed_from_u64(seed), recorded: recorded() }
    }

    /// The last part of a key, and a value.
    pub fn entry(&mut self) -> (String, Vec<u8>) {
        let (key, value) = self.recorded[self.random.random_range(0..self.recorded.len())].clone();
        let key = if self.random.random_bool(0.8) { self.key() } else { key };
        (key, self.spoil(&value))
    }

    /// A configuration.
    pub fn config(&mut self) -> Vec<u8> {
        let good = [
            NETWORK,
            r#"{"Network":"10.244.0.0/16","SubnetLen":24,"SubnetMin":"10.244.1.0","SubnetMax":"10.244.99.0","Backend":{"Type":"vxlan","VNI":1,"Port":8472}}"#,
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","IPv6SubnetLen":64}"#,
        ];
        let text = good[self.random.random_range(0..good.len())];
        self.spoil(text)
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.random.random_range(0..of.len())]
    }

    fn key(&mut self) -> String {
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
        if self.random.random_bool(0.2) {
            return self.one(&ODD).to_owned();
        }
        let v4 = |random: &mut StdRng| {
            let first = if random.random_bool(0.7) { [10, 244] } else { random.random() };
            let address = IpAddr::from([first[0], first[1], random.random(), random.random()]);
            cidr(address, random.random_range(8..=32))
        };
        let v6 = |random: &mut StdRng| {
            let mut words: [u16; 8] = random.random();
            if random.random_bool(0.7) {
                words[..3].copy_from_slice(&[0xfd00, 0x10, 0x244]);
                words[3] &= 0xff;
            }
            cidr(IpAddr::from(words), random.random_range(32..=128))
        };
        match self.random.random_range(0..4) {
            0 => format!("{}&{}", v4(&mut self.random), v6(&mut self.random)),
            1 => v6(&mut self.random),
            _ => v4(&mut self.random),
        }
    }

    /// Changes a JSON text in a few places, as JSON or as bytes.
    fn spoil(&mut self, text: &str) -> Vec<u8> {
        let mut value: Value = serde_json::from_str(text).must("recorded JSON");
        for _ in 0..self.random.random_range(0..4) {
            let atom = self.atom();
            let name = self.name(&value);
            let place = match value.get_mut(&name) {
                Some(Value::Object(inner)) if self.random.random_bool(0.8) => {
                    let inner_name = self.one(&["VNI", "VtepMAC", "vtepmac", "Type", "Port", "Name", "Id", "x"]);
                    inner.entry(inner_name).or_insert(Value::Null)
                }
                _ => match value.as_object_mut() {
                    Some(fields) => fields.entry(name).or_insert(Value::Null),
                    None => break,
                },
            };
            *place = atom;
        }
        let mut bytes = value.to_string().into_bytes();
        for _ in 0..self.one(&[0, 0, 0, 1, 3]) {
            let at = self.random.random_range(0..bytes.len());
            match self.random.random_range(0..4) {
                0 => bytes[at] = self.random.random(),
                1 => bytes.truncate(at.max(1)),
                2 => bytes.insert(at, self.random.random()),
                _ => bytes.extend_from_within(at..),
            }
        }
        bytes
    }

    fn name(&mut self, value: &Value) -> String {
        let names: Vec<&String> = value.as_object().map(|fields| fields.keys().collect()).unwrap_or_default();
        match names.len() {
            0 => "Node".to_owned(),
            _ if self.random.random_bool(0.1) => "Node".to_owned(),
            count => names[self.random.random_range(0..count)].clone(),
        }
    }

    fn atom(&mut self) -> Value {
        match self.random.random_range(0..9) {
            0 => Value::Null,
            1 => json!(self.one(&[0_i64, 1, -1, 25, 4096, 16_777_215, 16_777_216, i64::MAX])),
            2 => json!(self.one(&[1.5, 1e300, -0.0])),
            3 => json!(self.one(&[
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
            4 => json!("A".repeat(self.one(&[100, 300, 20_000]))),
            5 => (0..self.one(&[1, 100, 200])).fold(json!(1), |inner, _| json!([inner])),
            6 => json!({ "VNI": 1, "VtepMAC": "02:00:00:00:00:55" }),
            7 => json!({ "Name": "n", "Id": "i" }),
            _ => json!(self.random.random_bool(0.5)),
        }
    }
}

/// As a key has it, with the host bits as they are now and then.
fn cidr(address: IpAddr, length: u8) -> String {
    let whole = Cidr::containing(address, length).filter(|_| address.is_ipv4() || length % 16 != 1);
    whole.map_or_else(|| format!("{address}-{length}"), |c| format!("{}-{}", c.base(), c.length()))
}

/// Whether an entry's key lies in a range of these, in either family.
pub fn touches(key: &str, ranges: &[Subnet]) -> bool {
    let claims = |subnet: &Subnet| Family::ALL.into_iter().filter_map(|family| subnet.get(family)).collect::<Vec<_>>();
    Subnet::from_key(key).is_ok_and(|subnet| {
        let theirs = claims(&subnet);
        ranges.iter().flat_map(claims).any(|range| theirs.iter().any(|other| other.overlaps(range)))
    })
}
