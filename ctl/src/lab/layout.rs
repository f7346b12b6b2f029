//! Layout of a lab: names and addresses, from the options alone. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};

use clap::ValueEnum;
use overlay_agent::model::{Cidr, Family, NetworkConfig, NetworkName, PerFamily};
use serde::{Deserialize, Serialize};

use super::LabError;

/// Key prefix in the private etcd: the default one.
pub const ETCD_PREFIX: &str = "/coreos.com/network";
/// etcd's client port.
pub const ETCD_PORT: u16 = 2379;
/// Maximum number of hosts: a Linux bridge takes no more ports (`BR_MAX_PORTS` is 1024; two are the world's and spare).
pub const MAX_HOSTS: u16 = 1000;
/// Maximum number of containers per host: more are useless in a lab.
pub const MAX_CONTAINERS: u16 = 200;
/// Maximum number of isolated networks: as many as a host is measured with.
pub const MAX_ISOLATED: u16 = 100;
/// Number of subnets of [`isolated_network`]: the first one is not leased.
const MAX_HOSTS_OF_ISOLATED: u16 = 255;

/// Name of a lab: 1 to 12 of `a-z 0-9`. It fits into namespace names, and no name followed by a dash is a prefix of another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    /// Generates a name that no other test of this machine has: from this process's ID and a counter.
    pub fn unique() -> LabName {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        // Process IDs have 22 bits at most (PID_MAX_LIMIT).
        LabName(format!("t{:x}n{:x}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed) % 0xfff))
    }
}

impl FromStr for LabName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_valid = (1..=12).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if is_valid {
            Ok(LabName(text.to_owned()))
        } else {
            let truncated: String = text.chars().take(40).collect();
            Err(format!("`{truncated}` is not a lab name: 1 to 12 of a-z 0-9"))
        }
    }
}

impl TryFrom<String> for LabName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> String {
        name.0
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Address families of a lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Families {
    /// IPv4 only
    #[default]
    #[value(name = "4")]
    V4,
    /// IPv6 only
    #[value(name = "6")]
    V6,
    /// IPv4 and IPv6
    #[value(name = "dual")]
    Dual,
}

impl Families {
    /// Lists the families.
    pub fn list(self) -> &'static [Family] {
        match self {
            Families::V4 => &[Family::V4],
            Families::V6 => &[Family::V6],
            Families::Dual => &Family::ALL,
        }
    }
}

/// Options of a new lab.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// Name of the lab.
    pub name: LabName,
    /// Number of hosts, 1 to [`MAX_HOSTS`].
    pub hosts: u16,
    /// Containers per host in each network, 0 to [`MAX_CONTAINERS`].
    pub containers: u16,
    /// Number of isolated networks beside the default one, 0 to [`MAX_ISOLATED`].
    pub isolated: u16,
    /// Families of underlay and overlay.
    pub families: Families,
    /// Overlay network of each family; defaults: 10.244.0.0/16 and fd00:10:244::/56.
    pub networks: PerFamily<Cidr>,
    /// Further fields of the network configuration, such as `Backend`.
    pub config: serde_json::Map<String, serde_json::Value>,
    /// Whether each host gets an agent.
    pub agents: bool,
    /// Path of the agent's program; found automatically if absent.
    pub overlayd: Option<PathBuf>,
    /// Flags for each agent in addition to the lab's.
    pub agent_args: Vec<String>,
    /// URLs of an external etcd. Without any, the lab starts its own and writes the configuration.
    pub etcd: Vec<String>,
}

impl LabOptions {
    /// Default options: three hosts with two containers each, IPv4.
    pub fn new(name: LabName) -> LabOptions {
        LabOptions {
            name,
            hosts: 3,
            containers: 2,
            isolated: 0,
            families: Families::V4,
            networks: PerFamily::default(),
            config: serde_json::Map::new(),
            agents: true,
            overlayd: None,
            agent_args: Vec::new(),
            etcd: Vec::new(),
        }
    }
}

/// Layout of a lab, as stored in `lab.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Layout {
    /// Name of the lab.
    pub name: LabName,
    /// Overlay network of each family of the lab.
    pub networks: PerFamily<Cidr>,
    /// Network configuration, as written to etcd.
    pub config: String,
    /// Names of the isolated networks, all with the ranges of [`isolated_network`]: `net1`, `net2`, ...
    #[serde(default)]
    pub isolated: Vec<NetworkName>,
    /// Hosts.
    pub hosts: Vec<HostLayout>,
    /// Path of the agent's program; absent in a lab without agents.
    pub overlayd: Option<PathBuf>,
    /// Flags for each agent in addition to the lab's.
    pub agent_args: Vec<String>,
    /// URLs of an external etcd.
    #[serde(default)]
    pub etcd: Vec<String>,
}

/// One host of the layout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLayout {
    /// `h1`, `h2`, ...
    pub name: String,
    /// Address on the underlay in each of the lab's families.
    pub addresses: PerFamily<IpAddr>,
    /// Names of its containers in the default network: `c1`, `c2`, ... In another network: [`container_in`].
    pub containers: Vec<String>,
}

impl Layout {
    /// Builds the layout from the options.
    pub fn new(options: &LabOptions) -> Result<Layout, LabError> {
        let refuse = |message: String| Err(LabError::Options { message });
        if !(1..=MAX_HOSTS).contains(&options.hosts) {
            return refuse(format!("--hosts {} is outside 1 to {MAX_HOSTS}", options.hosts));
        }
        if options.containers > MAX_CONTAINERS {
            return refuse(format!("--containers {} is more than {MAX_CONTAINERS}", options.containers));
        }
        if options.isolated > MAX_ISOLATED {
            return refuse(format!("--networks {} is more than {MAX_ISOLATED}", options.isolated));
        }
        if options.isolated > 0 && options.hosts > MAX_HOSTS_OF_ISOLATED {
            return refuse(format!(
                "--hosts {} is more than {MAX_HOSTS_OF_ISOLATED}, the number of subnets of an isolated network of the lab",
                options.hosts
            ));
        }
        let families = options.families.list();
        for (family, network) in options.networks.iter() {
            if !families.contains(&family) {
                return refuse(format!("--network {network} is {family}, which this lab does not use: see --family"));
            }
        }
        let networks: PerFamily<Cidr> =
            families.iter().map(|f| (*f, options.networks.get(*f).copied().unwrap_or_else(|| default_network(*f)))).collect();
        let config = network_config(&networks, &options.config);
        let pools = match NetworkConfig::parse(&config) {
            Ok(parsed) => parsed.config.pools,
            Err(errors) => return refuse(format!("the lab's network is invalid: {errors}")),
        };
        for (family, pool) in pools.iter() {
            let underlay = underlay(family);
            if pool.min.base() <= underlay.last() && underlay.base() <= pool.max.last() {
                return refuse(format!(
                    "the subnets of {} overlap the lab's underlay {underlay}: choose another --network, or other bounds in its configuration",
                    pool.network
                ));
            }
            if pool.count() < u128::from(options.hosts) {
                return refuse(format!(
                    "{} has {} subnets of /{}, too few for {} hosts",
                    pool.network,
                    pool.count(),
                    pool.subnet_length,
                    options.hosts
                ));
            }
        }
        let host = |number: u16| HostLayout {
            name: format!("h{number}"),
            addresses: families.iter().map(|f| (*f, host_address(*f, number))).collect(),
            containers: (1..=options.containers).map(|c| format!("c{c}")).collect(),
        };
        Ok(Layout {
            name: options.name.clone(),
            networks,
            config,
            isolated: isolated_names(options.isolated)?,
            hosts: (1..=options.hosts).map(host).collect(),
            overlayd: None,
            agent_args: options.agent_args.clone(),
            etcd: options.etcd.clone(),
        })
    }

    /// Prefix of every namespace's name.
    pub fn prefix(&self) -> String {
        prefix(&self.name)
    }

    /// Name of a target's namespace: `net`, `world`, `h1`, `h1-c1`.
    pub fn namespace(&self, target: &str) -> String {
        format!("{}{target}", self.prefix())
    }

    /// Start of the names of a host's isolated networks' namespaces. The target of network `blue` is `h1.blue`.
    pub fn isolated_prefix(&self, host: &str) -> String {
        self.namespace(&format!("{host}."))
    }

    /// Families of underlay and overlay.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        self.networks.families()
    }

    /// URLs of etcd.
    pub fn etcd_endpoints(&self) -> Vec<String> {
        if !self.etcd.is_empty() {
            return self.etcd.clone();
        }
        self.families().map(|family| etcd_url(family, ETCD_PORT)).collect()
    }
}

/// Prefix of the names of a lab's namespaces.
pub fn prefix(name: &LabName) -> String {
    format!("ov-{name}-")
}

/// Names of isolated networks: `net1`, `net2`, ...
fn isolated_names(count: u16) -> Result<Vec<NetworkName>, LabError> {
    let name = |n| format!("net{n}").parse::<NetworkName>().map_err(|error| LabError::Options { message: error.to_string() });
    (1..=count).map(name).collect()
}

/// Name of a container in an isolated network, as endpoint and in its namespace's name.
pub fn container_in(network: &NetworkName, container: &str) -> String {
    format!("{network}-{container}")
}

/// Range of every isolated network.
pub fn isolated_network(family: Family) -> Cidr {
    match family {
        Family::V4 => network([10, 0, 0, 0], [0; 8], 16, family),
        Family::V6 => network([0; 4], [0xfd00, 0x10, 0, 0, 0, 0, 0, 0], 56, family),
    }
}

/// Range of the underlay.
pub fn underlay(family: Family) -> Cidr {
    match family {
        Family::V4 => network([10, 99, 0, 0], [0; 8], 16, family),
        Family::V6 => network([0; 4], [0xfd99, 0, 0, 0, 0, 0, 0, 0], 64, family),
    }
}

/// Address of etcd on the underlay.
pub fn etcd_address(family: Family) -> IpAddr {
    by_family(family, [10, 99, 0, 2], [0xfd99, 0, 0, 0, 0, 0, 0, 2])
}

/// Address of the world on the underlay: the hosts' default gateway.
pub fn gateway_address(family: Family) -> IpAddr {
    by_family(family, [10, 99, 0, 254], [0xfd99, 0, 0, 0, 0, 0, 0, 0x254])
}

/// Address of the world outside underlay and overlay (documentation ranges, RFC 5737 and RFC 3849).
pub fn outside_address(family: Family) -> IpAddr {
    by_family(family, [203, 0, 113, 1], [0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1])
}

/// URL of etcd with a port.
pub fn etcd_url(family: Family, port: u16) -> String {
    format!("http://{}", std::net::SocketAddr::new(etcd_address(family), port))
}

/// Address of a host. Host 1 is 10.99.1.1 and fd99::1:1, host 251 is 10.99.2.1 and fd99::2:1: both families look alike.
fn host_address(family: Family, number: u16) -> IpAddr {
    let (high, low) = (1 + (number - 1) / 250, 1 + (number - 1) % 250);
    match family {
        Family::V4 => {
            let base = u32::from(Ipv4Addr::new(10, 99, 0, 0));
            IpAddr::V4(Ipv4Addr::from_bits(base + u32::from(high) * 256 + u32::from(low)))
        }
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, decimal_digits_as_hex(high), decimal_digits_as_hex(low))),
    }
}

/// Returns the number whose hexadecimal digits are the decimal digits of `number` (at most four).
fn decimal_digits_as_hex(number: u16) -> u16 {
    (0..4).fold(0, |sum, digit| sum | (number / 10u16.pow(digit) % 10) << (4 * digit))
}

fn default_network(family: Family) -> Cidr {
    match family {
        Family::V4 => network([10, 244, 0, 0], [0; 8], 16, family),
        Family::V6 => network([0; 4], [0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0], 56, family),
    }
}

fn by_family(family: Family, v4: [u8; 4], v6: [u16; 8]) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from(v4),
        Family::V6 => IpAddr::from(v6),
    }
}

fn network(v4: [u8; 4], v6: [u16; 8], length: u8, family: Family) -> Cidr {
    let address = by_family(family, v4, v6);
    Cidr::containing(address, length).unwrap_or_else(|| Cidr::host(address))
}

/// Writes the configuration in flannel's schema.
fn network_config(networks: &PerFamily<Cidr>, extra: &serde_json::Map<String, serde_json::Value>) -> String {
    let mut fields = serde_json::Map::new();
    for (family, network) in networks.iter() {
        let name = match family {
            Family::V4 => "Network",
            Family::V6 => "IPv6Network",
        };
        fields.insert(name.to_owned(), network.to_string().into());
    }
    fields.insert("EnableIPv4".to_owned(), networks.v4.is_some().into());
    fields.insert("EnableIPv6".to_owned(), networks.v6.is_some().into());
    fields.extend(extra.clone());
    serde_json::Value::Object(fields).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> LabOptions {
        LabOptions::new("lab".parse().expect("a name"))
    }

    #[test]
    fn host_addresses_are_distinct_and_readable() {
        let layout = Layout::new(&LabOptions { hosts: MAX_HOSTS, families: Families::Dual, ..options() })
            .expect_err("a /16 has 255 subnets");
        assert!(layout.to_string().contains("too few for 1000 hosts"), "{layout}");
        let networks = PerFamily { v4: "10.128.0.0/12".parse().ok(), v6: "fd00::/48".parse().ok() };
        let layout =
            Layout::new(&LabOptions { hosts: MAX_HOSTS, families: Families::Dual, networks, ..options() }).expect("a layout");
        let text = |n: usize| layout.hosts[n - 1].addresses.iter().map(|(_, a)| a.to_string()).collect::<Vec<_>>();
        assert_eq!(text(1), ["10.99.1.1", "fd99::1:1"]);
        assert_eq!(text(250), ["10.99.1.250", "fd99::1:250"]);
        assert_eq!(text(251), ["10.99.2.1", "fd99::2:1"]);
        let all: std::collections::BTreeSet<_> = layout.hosts.iter().flat_map(|h| h.addresses.iter().map(|(_, a)| *a)).collect();
        assert_eq!(all.len(), 2 * usize::from(MAX_HOSTS));
        assert!(all.iter().all(|a| underlay(Family::of(*a)).contains(*a)));
    }

    #[test]
    fn only_requested_families_are_configured() {
        let layout = Layout::new(&LabOptions { families: Families::V6, ..options() }).expect("a layout");
        assert_eq!(layout.etcd_endpoints(), ["http://[fd99::2]:2379"]);
        assert_eq!(layout.config, r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/56"}"#);
        assert_eq!(layout.namespace("h1-c2"), "ov-lab-h1-c2");
    }

    #[test]
    fn invalid_options_are_refused() {
        let v6 = PerFamily { v4: None, v6: "fd00::/48".parse().ok() };
        let underlay = PerFamily { v4: "10.96.0.0/12".parse().ok(), v6: None };
        for (options, wanted) in [
            (LabOptions { hosts: 0, ..options() }, "--hosts 0"),
            (LabOptions { containers: 999, ..options() }, "--containers 999"),
            (LabOptions { isolated: 101, ..options() }, "--networks 101"),
            (
                LabOptions {
                    isolated: 1,
                    hosts: 256,
                    networks: PerFamily { v4: "10.128.0.0/12".parse().ok(), v6: None },
                    ..options()
                },
                "--hosts 256",
            ),
            (LabOptions { networks: v6, ..options() }, "see --family"),
            (LabOptions { networks: underlay, ..options() }, "underlay"),
        ] {
            let message = Layout::new(&options).expect_err(wanted).to_string();
            assert!(message.contains(wanted), "{message}");
        }
    }

    #[test]
    fn underlay_inside_the_network_outside_the_pool_is_accepted() {
        let networks = PerFamily { v4: "10.0.0.0/8".parse().ok(), v6: None };
        let bounds = |max: &str| {
            let config = [("SubnetMin", "10.10.0.0"), ("SubnetMax", max)].map(|(key, value)| (key.to_owned(), value.into()));
            Layout::new(&LabOptions { networks, config: config.into_iter().collect(), ..options() })
        };
        assert!(bounds("10.98.255.0").is_ok());
        let message = bounds("10.99.0.0").expect_err("the last subnet is of the underlay").to_string();
        assert!(message.contains("underlay 10.99.0.0/16"), "{message}");
    }

    #[test]
    fn invalid_lab_names_are_refused() {
        for invalid in ["", "Lab", "a-b", "a/b", "..", "thirteenchars", "ü"] {
            assert!(invalid.parse::<LabName>().is_err(), "{invalid}");
        }
        assert_ne!(LabName::unique(), LabName::unique());
        assert!(LabName::unique().to_string().parse::<LabName>().is_ok());
    }
}
