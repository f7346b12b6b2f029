//! The network's configuration in etcd: parses flannel's schema and checks all rules at once.
//!
//! Source of the rules: `docs/wire.md`. Keys are matched case-insensitively, like Go does.

mod pool;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::device::MAX_BRIDGE_PORTS;
use super::family::address_value;
use super::{BackendConfig, Cidr, Family, PerFamily, Subnet};

pub use super::config_fields::{ConfigErrors, FieldError};
use super::config_fields::{FieldReader, field_error};
pub use pool::Pool;

/// The configured network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// The pool of each enabled family.
    pub pools: PerFamily<Pool>,
    /// The backend.
    #[serde(flatten)]
    pub backend: BackendConfig,
}

/// IPv6's minimum MTU in bytes (RFC 8200, section 5). Below it the kernel disables IPv6 on an interface.
pub const IPV6_MIN_MTU: u32 = 1280;

/// A valid configuration with its warnings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedConfig {
    /// The configuration.
    pub config: NetworkConfig,
    /// Unknown fields, known fields without effect, and questionable values.
    pub warnings: Vec<FieldError>,
}

impl NetworkConfig {
    /// The families of the network.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        self.pools.families()
    }

    /// The network reduced to these families.
    pub fn restricted_to(&self, families: impl IntoIterator<Item = Family>) -> NetworkConfig {
        let pools = families.into_iter().filter_map(|family| Some((family, *self.pools.get(family)?))).collect();
        NetworkConfig { pools, ..self.clone() }
    }

    /// The address space of a family.
    pub fn network(&self, family: Family) -> Option<Cidr> {
        self.pools.get(family).map(|pool| pool.network)
    }

    /// Whether a host may hold this subnet: its families are the network's, and each range is a subnet of its pool.
    pub fn allows_subnet(&self, subnet: &Subnet) -> bool {
        Family::ALL.into_iter().all(|family| match (self.pools.get(family), subnet.get(family)) {
            (Some(pool), Some(cidr)) => pool.allows_subnet(cidr),
            (None, None) => true,
            _ => false,
        })
    }

    /// Parses the JSON text under `<prefix>/config`. Reports all errors at once.
    pub fn parse(text: &str) -> Result<ParsedConfig, ConfigErrors> {
        let mut reader = FieldReader::of_object(text)?;
        let config = NetworkConfig::read(&mut reader);
        let (errors, warnings) = reader.finish();
        match config {
            Some(config) if errors.is_empty() => Ok(ParsedConfig { config, warnings }),
            _ => Err(ConfigErrors(errors)),
        }
    }

    /// Takes flannel's fields; `None` if the backend is invalid. The reader has the errors.
    pub(super) fn read(reader: &mut FieldReader) -> Option<NetworkConfig> {
        let v4 = reader.family(Family::V4);
        let v6 = reader.family(Family::V6);
        if !v4.enabled && !v6.enabled {
            reader.errors.push(field_error(
                "EnableIPv4",
                "false",
                "disables IPv4 while EnableIPv6 is not true: no family is left",
            ));
        }
        let pools: PerFamily<Pool> =
            [v4, v6].into_iter().filter_map(|f| reader.pool(f).map(|pool| (pool.network.family(), pool))).collect();
        if reader.boolean("EnableNFTables").is_some() {
            reader.warn("EnableNFTables", "has no effect: nftables is always used");
        }
        Some(NetworkConfig { pools, backend: reader.backend()? })
    }
}

/// The raw fields of one family.
struct FamilyFields {
    family: Family,
    enabled: bool,
    network: Option<(String, Result<Cidr, String>)>,
    length: Option<u64>,
    min: Option<(String, Option<IpAddr>)>,
    max: Option<(String, Option<IpAddr>)>,
}

impl Family {
    pub(super) fn field_name(self, name: &str) -> String {
        match self {
            Family::V4 => name.to_owned(),
            Family::V6 => format!("IPv6{name}"),
        }
    }

    /// The default subnet length.
    fn default_subnet_length(self) -> u8 {
        match self {
            Family::V4 => 24,
            Family::V6 => 64,
        }
    }

    /// The longest subnet prefix: two host bits for base, gateway and at least one container.
    fn max_subnet_length(self) -> u8 {
        self.bits() - 2
    }
}

impl FieldReader {
    fn family(&mut self, family: Family) -> FamilyFields {
        let enabled = match family {
            Family::V4 => self.boolean("EnableIPv4").unwrap_or(true),
            Family::V6 => self.boolean("EnableIPv6").unwrap_or(false),
        };
        let parse_bound = |text: String| {
            let address = text.parse().ok().filter(|a| Family::of(*a) == family);
            (text, address)
        };
        FamilyFields {
            family,
            enabled,
            network: self.string(&family.field_name("Network")).map(|text| {
                let cidr = text
                    .parse::<Cidr>()
                    .map_err(|e| e.to_string())
                    .and_then(|cidr| if cidr.family() == family { Ok(cidr) } else { Err(format!("is not an {family} CIDR")) });
                (text, cidr)
            }),
            length: self.number(&family.field_name("SubnetLen"), 0, u64::from(family.bits())),
            min: self.string(&family.field_name("SubnetMin")).map(parse_bound),
            max: self.string(&family.field_name("SubnetMax")).map(parse_bound),
        }
    }

    /// Builds the pool of an enabled family; `None` if disabled or invalid. Reports invalid fields.
    fn pool(&mut self, fields: FamilyFields) -> Option<Pool> {
        let family = fields.family;
        if !fields.enabled {
            return None;
        }
        let network_field = family.field_name("Network");
        let network = match fields.network {
            None => {
                self.fail(&network_field, "", &format!("is missing: an {family} CIDR is needed"));
                return None;
            }
            Some((text, Err(rule))) => {
                let rule = rule.strip_prefix(&format!("`{text}` ")).unwrap_or(&rule).to_owned();
                self.fail(&network_field, &text, &rule);
                return None;
            }
            Some((text, Ok(cidr))) => {
                if let Some(rule) = unusable_reason(cidr) {
                    self.fail(&network_field, &text, rule);
                    return None;
                }
                cidr
            }
        };
        let shortest = network.length() + 2;
        if shortest > family.max_subnet_length() {
            self.fail(
                &network_field,
                &network.to_string(),
                &format!(
                    "is too small: /{} is the longest, for subnets of /{}",
                    family.max_subnet_length() - 2,
                    family.max_subnet_length()
                ),
            );
            return None;
        }
        // flannel writes 0 for "not set".
        let length = match fields.length.filter(|length| *length != 0) {
            None => family.default_subnet_length().max(shortest),
            Some(length) => match u8::try_from(length).ok().filter(|l| (shortest..=family.max_subnet_length()).contains(l)) {
                Some(length) => length,
                None => {
                    let rule = format!(
                        "is outside {shortest} to {}: at least four subnets in {network}, each of at least four addresses",
                        family.max_subnet_length()
                    );
                    self.fail(&family.field_name("SubnetLen"), &length.to_string(), &rule);
                    return None;
                }
            },
        };
        let full_pool = Pool {
            network,
            subnet_length: length,
            min: first_subnet(network, length)?,
            max: Cidr::containing(network.last(), length)?,
        };
        // The first subnet is skipped by default: its base is the network's own address.
        let default_min = full_pool.nth(1)?;
        let min = self.bound(&family.field_name("SubnetMin"), fields.min, default_min, &full_pool)?;
        let max = self.bound(&family.field_name("SubnetMax"), fields.max, full_pool.max, &full_pool)?;
        if min > max {
            let rule = format!("is above {} {}", family.field_name("SubnetMax"), max.base());
            self.fail(&family.field_name("SubnetMin"), &min.base().to_string(), &rule);
            return None;
        }
        let containers = address_value(min.last()) - address_value(min.base()) - 2;
        // Only the IPv4 length is chosen by the number of containers. An IPv6 subnet of any usual length exceeds one bridge.
        if family == Family::V4 && containers > MAX_BRIDGE_PORTS as u128 {
            let rule = format!(
                "of {length} gives each host {containers} addresses for containers, more than the {MAX_BRIDGE_PORTS} ports that the kernel allows on its \
                 bridge: 22 is enough"
            );
            self.warn(&family.field_name("SubnetLen"), &rule);
        }
        Some(Pool { min, max, ..full_pool })
    }

    fn bound(&mut self, field: &str, value: Option<(String, Option<IpAddr>)>, default: Cidr, full_pool: &Pool) -> Option<Cidr> {
        let Some((text, address)) = value else { return Some(default) };
        let network = full_pool.network;
        let rule = match address {
            None => format!("is not an {} address", network.family()),
            Some(address) if !network.contains(address) => format!("is not inside {network}"),
            Some(address) => match Cidr::containing(address, full_pool.subnet_length) {
                Some(subnet) if subnet.base() == address => return Some(subnet),
                Some(subnet) => {
                    format!("is not the base address of a /{}: the nearest below is {}", full_pool.subnet_length, subnet.base())
                }
                None => format!("is not an {} address", network.family()),
            },
        };
        self.fail(field, &text, &rule);
        None
    }

    fn backend(&mut self) -> Option<BackendConfig> {
        let fields = match self.take_field("Backend") {
            None => Map::new(),
            Some(Value::Object(fields)) => fields,
            Some(other) => {
                self.fail("Backend", &other.to_string(), "is not a JSON object");
                return None;
            }
        };
        let mut reader = FieldReader::new("Backend.", fields);
        let backend = BackendConfig::parse(&mut reader);
        let (errors, warnings) = reader.finish();
        let valid = errors.is_empty();
        self.errors.extend(errors);
        self.warnings.extend(warnings);
        valid.then_some(backend)
    }
}

fn first_subnet(network: Cidr, length: u8) -> Option<Cidr> {
    Cidr::containing(network.base(), length)
}

/// Why an address space cannot be used for an overlay.
fn unusable_reason(network: Cidr) -> Option<&'static str> {
    let hits = |text: &str| text.parse::<Cidr>().is_ok_and(|other| other.overlaps(network));
    if network.length() == 0 {
        Some("covers the whole address space")
    } else if hits("127.0.0.0/8") || hits("::1/128") {
        Some("contains loopback addresses")
    } else if hits("224.0.0.0/4") || hits("ff00::/8") {
        Some("contains multicast addresses")
    } else if hits("169.254.0.0/16") || hits("fe80::/10") {
        Some("contains link-local addresses")
    } else if hits("0.0.0.0/8") || hits("240.0.0.0/4") {
        Some("contains reserved addresses")
    } else {
        None
    }
}

#[cfg(test)]
mod tests;
