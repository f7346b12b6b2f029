//! Which interface is the external one, and which addresses of it peers send to.

use std::net::IpAddr;

use regex::Regex;

use crate::model::{Family, PerFamily};

/// How the external interface is chosen: the first of the names and addresses that is there, else the first link whose name or address
/// matches the expression, else the one by which an address is reached, else that of the default route.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Interface names or addresses, in order of preference.
    pub interfaces: Vec<String>,
    /// An expression for names and addresses.
    pub regex: Option<Regex>,
    /// An address that is reached through the interface.
    pub can_reach: Option<IpAddr>,
    /// Addresses that peers send to, where they differ from the interface's (behind NAT).
    pub public_ip: PerFamily<IpAddr>,
}

/// Why no external interface could be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnderlayError {
    /// None of the names or addresses is there.
    #[error("--iface: this host has no interface {}; candidates: {candidates}", .wanted.join(" or "))]
    NoSuchInterface {
        /// What was asked for.
        wanted: Vec<String>,
        /// What there is.
        candidates: String,
    },
    /// Nothing matches the expression.
    #[error("--iface-regex: `{regex}` matches no interface name or address; candidates: {candidates}")]
    NoMatch {
        /// The expression.
        regex: String,
        /// What there is.
        candidates: String,
    },
    /// There is no route to the address.
    #[error("--iface-can-reach: there is no route to {address}; candidates: {candidates}")]
    Unreachable {
        /// The address.
        address: IpAddr,
        /// What there is.
        candidates: String,
    },
    /// There is no default route.
    #[error("this host has no {family} default route: name the external interface with --iface; candidates: {candidates}")]
    NoDefaultRoute {
        /// The first family of the network.
        family: Family,
        /// What there is.
        candidates: String,
    },
    /// The chosen interface has no IPv6, and the network has nothing else.
    #[error(
        "IPv6 is switched off on interface {interface}, and the network has no other family: {}, or choose another interface with --iface; \
         candidates: {candidates}",
        ipv6_remedy(.interface)
    )]
    WithoutIpv6 {
        /// The interface.
        interface: String,
        /// What there is.
        candidates: String,
    },
    /// The chosen interface lacks an address that the network needs.
    #[error(
        "interface {interface} has no {family} address, which the {family} network needs: add one, or choose another interface with --iface; candidates: {candidates}"
    )]
    NoAddress {
        /// The interface.
        interface: String,
        /// The family.
        family: Family,
        /// What there is.
        candidates: String,
    },
}

/// The host's interfaces that are not ours, as the kernel lists them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// The links.
    pub links: Vec<ForeignLink>,
    /// Default routes, the preferred (lowest metric) first within each family.
    pub defaults: Vec<DefaultRoute>,
    /// Families in which iptables' FORWARD chain (`ip filter FORWARD`, `ip6 filter FORWARD`) has policy DROP, as Docker and ufw set it.
    pub forward_drops: Vec<Family>,
}

/// A link that is not ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignLink {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The loopback device.
    pub loopback: bool,
    /// `bridge`, `veth`, `vlan`; empty for hardware.
    pub kind: String,
    /// It is part of another interface (a bridge, a bond), which has the addresses.
    pub is_port: bool,
    /// Its IPv6 settings; absent where the kernel has no IPv6 (`ipv6.disable=1`), or none on an interface with an MTU below 1280.
    pub ipv6: Option<Ipv6Settings>,
    /// Its addresses of global scope, permanent ones and those that are preferred first.
    pub addresses: Vec<IpAddr>,
}

/// The settings below `/proc/sys/net/ipv6/conf` of an interface, as far as they matter for an interface that is not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Settings {
    /// `forwarding`: it is a router's, and ignores router advertisements unless `accept_ra` is 2.
    pub forwarding: bool,
    /// `accept_ra`.
    pub accept_ra: u32,
    /// `disable_ipv6`.
    pub disabled: bool,
}

/// A default route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefaultRoute {
    /// The family.
    pub family: Family,
    /// Interface index.
    pub interface: u32,
    /// Learned from a router advertisement.
    pub from_router_advertisement: bool,
}

/// The chosen underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// Interface index of the external interface.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The address that peers send to, per family.
    pub public_ip: PerFamily<IpAddr>,
    /// The address that the VXLAN device has as source, per family: differs from `public_ip` behind NAT.
    pub local: PerFamily<IpAddr>,
}

impl Selection {
    /// Chooses the external interface for these families. `reach` is the interface by which the kernel would send to
    /// [`Selection::can_reach`], `None` where there is no route. Where IPv6 is switched off on it the choice has IPv4 alone.
    pub fn choose(&self, inventory: &Inventory, families: &[Family], reach: Option<u32>) -> Result<Underlay, UnderlayError> {
        let candidates = || inventory.candidates();
        let usable = || inventory.links.iter().filter(|link| !link.loopback);
        let by_index = |index: u32| inventory.links.iter().find(|link| link.index == index);
        let mut asked_address = None;
        let link = if !self.interfaces.is_empty() {
            let found = self.interfaces.iter().find_map(|wanted| {
                let address = wanted.parse::<IpAddr>().ok();
                let link = usable().find(|link| link.name == *wanted || address.is_some_and(|a| link.addresses.contains(&a)))?;
                Some((link, address.filter(|_| link.name != *wanted)))
            });
            let (link, address) = found
                .ok_or_else(|| UnderlayError::NoSuchInterface { wanted: self.interfaces.clone(), candidates: candidates() })?;
            asked_address = address;
            link
        } else if let Some(regex) = &self.regex {
            let by_name = usable().find(|link| regex.is_match(&link.name)).map(|link| (link, None));
            let by_address = || {
                usable().find_map(|link| {
                    link.addresses.iter().find(|a| regex.is_match(&a.to_string())).map(|address| (link, Some(*address)))
                })
            };
            let (link, address) = by_name
                .or_else(by_address)
                .ok_or_else(|| UnderlayError::NoMatch { regex: regex.to_string(), candidates: candidates() })?;
            asked_address = address;
            link
        } else if let Some(address) = self.can_reach {
            reach
                .and_then(by_index)
                .filter(|link| !link.loopback)
                .ok_or_else(|| UnderlayError::Unreachable { address, candidates: candidates() })?
        } else {
            let family = families.first().copied().unwrap_or(Family::V4);
            inventory
                .defaults
                .iter()
                .find(|route| route.family == family)
                .and_then(|route| by_index(route.interface))
                .ok_or_else(|| UnderlayError::NoDefaultRoute { family, candidates: candidates() })?
        };
        let mut local = PerFamily::default();
        if families == [Family::V6] && link.is_without_ipv6() {
            return Err(UnderlayError::WithoutIpv6 { interface: link.name.clone(), candidates: candidates() });
        }
        let lacks = |family| family == Family::V6 && families.contains(&Family::V4) && link.is_without_ipv6();
        for family in families.iter().copied().filter(|family| !lacks(*family)) {
            let address = asked_address
                .filter(|address| Family::of(*address) == family)
                .or_else(|| link.addresses.iter().copied().find(|address| Family::of(*address) == family))
                .ok_or_else(|| UnderlayError::NoAddress { interface: link.name.clone(), family, candidates: candidates() })?;
            *local.slot(family) = Some(address);
        }
        Ok(Underlay {
            index: link.index,
            name: link.name.clone(),
            mtu: link.mtu,
            public_ip: local.map(|family, address| self.public_ip.get(family).copied().unwrap_or(*address)),
            local,
        })
    }
}

/// How IPv6 is switched on on an interface.
pub fn ipv6_remedy(interface: &str) -> String {
    format!(
        "sysctl -w net/ipv6/conf/{interface}/disable_ipv6=0 (where there is no such setting the kernel was started with ipv6.disable=1, or \
         the MTU of {interface} is below 1280)"
    )
}

impl ForeignLink {
    /// IPv6 is switched off on it.
    pub fn is_without_ipv6(&self) -> bool {
        self.ipv6.is_none_or(|ipv6| ipv6.disabled)
    }
}

impl Inventory {
    /// The interfaces by which containers reach the world outside over IPv4: the external one, and those with a default route.
    pub fn uplinks(&self, external: u32) -> Vec<String> {
        let leads_out = |index: u32| self.defaults.iter().any(|route| route.family == Family::V4 && route.interface == index);
        let uplinks = self.links.iter().filter(|link| link.index == external || leads_out(link.index));
        uplinks.map(|link| link.name.clone()).collect()
    }

    /// The interfaces to choose from, with their addresses, for messages.
    pub fn candidates(&self) -> String {
        let usable: Vec<String> = self
            .links
            .iter()
            .filter(|link| !link.loopback && !link.addresses.is_empty())
            .map(|link| {
                let addresses: Vec<String> = link.addresses.iter().map(ToString::to_string).collect();
                format!("{} ({}{})", link.name, addresses.join(", "), if link.up { "" } else { ", down" })
            })
            .collect();
        if usable.is_empty() { "none with an address".to_owned() } else { usable.join(", ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            addresses: addresses.iter().map(|a| a.parse().expect("an address")).collect(),
        }
    }

    fn inventory() -> Inventory {
        Inventory {
            links: vec![
                link(1, "lo", &["127.0.0.1", "::1"]),
                link(2, "eth0", &["192.0.2.7", "192.0.2.8", "2001:db8::7"]),
                link(3, "eth1", &["198.51.100.7"]),
            ],
            defaults: vec![DefaultRoute { family: Family::V4, interface: 3, from_router_advertisement: false }],
            ..Inventory::default()
        }
    }

    fn choose(selection: &Selection, families: &[Family], reach: Option<u32>) -> Result<Underlay, String> {
        selection.choose(&inventory(), families, reach).map_err(|e| e.to_string())
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
        for ipv6 in [None, Some(Ipv6Settings { forwarding: false, accept_ra: 1, disabled: true })] {
            inventory.links[2].ipv6 = ipv6;
            let chosen = eth1.choose(&inventory, &Family::ALL, None).expect("IPv4");
            assert_eq!((chosen.local.v4, chosen.public_ip.v6), ("198.51.100.7".parse().ok(), None));
            let error = eth1.choose(&inventory, &[Family::V6], None).expect_err("nothing is left of an IPv6 network");
            assert!(error.to_string().contains("sysctl -w net/ipv6/conf/eth1/disable_ipv6=0"), "{error}");
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
}
