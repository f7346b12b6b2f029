//! Selection of the external interface and of its addresses that peers send to.
//!
//! The address in use stays while it is usable. Otherwise the kernel's source address of the default route is preferred.
//! Addresses that an operator or a daemon adds to the host's own address come last: secondary addresses, and those of host
//! length, as VRRP uses them. Lifetimes do not matter: a DHCP lease has one, a floating address has none. Each family is selected
//! separately; a problem in one family does not delay the other.

mod address;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use regex::Regex;

use crate::model::network::Pool;
use crate::model::{Cidr, Family, PerFamily};

pub use address::{Flaw, HostAddress};

/// Selection rules for the external interface. The first configured rule applies: the first existing name or address, the first
/// link whose name or address matches the expression, or the interface of the route to an address. Without a rule it is that of
/// the default route.
#[derive(Debug, Clone, Default)]
pub struct UnderlaySelector {
    /// Interface names or addresses, in order of preference.
    pub interfaces: Vec<String>,
    /// A regular expression for names and addresses.
    pub regex: Option<Regex>,
    /// An address that is reached through the interface.
    pub can_reach: Option<IpAddr>,
    /// Addresses that peers send to, if they differ from the interface's (behind NAT).
    pub public_ip: PerFamily<IpAddr>,
}

/// Why no external interface could be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnderlayError {
    /// None of the names or addresses exists.
    #[error("--iface: this host has no interface {}; candidates: {candidates}", .wanted.join(" or "))]
    NoSuchInterface {
        /// The configured names and addresses.
        wanted: Vec<String>,
        /// The existing interfaces.
        candidates: String,
    },
    /// Nothing matches the expression.
    #[error("--iface-regex: `{regex}` matches no interface name or address; candidates: {candidates}")]
    NoMatch {
        /// The expression.
        regex: String,
        /// The existing interfaces.
        candidates: String,
    },
    /// There is no route to the address.
    #[error("--iface-can-reach: there is no route to {address}; candidates: {candidates}")]
    Unreachable {
        /// The address.
        address: IpAddr,
        /// The existing interfaces.
        candidates: String,
    },
    /// There is no default route.
    #[error("this host has no {family} default route: name the external interface with --iface; candidates: {candidates}")]
    NoDefaultRoute {
        /// The first family of the network.
        family: Family,
        /// The existing interfaces.
        candidates: String,
    },
    /// The selected interface has no IPv6, and IPv4 cannot replace it.
    #[error(
        "IPv6 is switched off on interface {interface}, and the network needs it: {}, or choose another interface with --iface; \
         candidates: {candidates}",
        ipv6_remedy(.interface)
    )]
    Ipv6Disabled {
        /// The interface.
        interface: String,
        /// The existing interfaces.
        candidates: String,
    },
    /// The selected interface lacks an address that the network needs.
    #[error(
        "interface {interface} has no {family} address, which the {family} network needs: add one, or choose another interface with --iface; candidates: {candidates}"
    )]
    NoAddress {
        /// The interface.
        interface: String,
        /// The family.
        family: Family,
        /// The existing interfaces.
        candidates: String,
    },
}

/// The host's interfaces that are not ours, as the kernel lists them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostInventory {
    /// The links.
    pub links: Vec<ForeignLink>,
    /// Default routes, the preferred (lowest metric) first within each family.
    pub default_routes: Vec<DefaultRoute>,
    /// Families in which iptables' FORWARD chain (`ip filter FORWARD`, `ip6 filter FORWARD`) has policy DROP, which Docker and
    /// ufw set.
    pub forward_drops: Vec<Family>,
    /// The host's DNS servers.
    pub resolvers: BTreeSet<IpAddr>,
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
    /// Whether it is a port of another interface (a bridge, a bond), which has the addresses.
    pub is_port: bool,
    /// Its IPv6 settings; absent if the kernel has no IPv6 (`ipv6.disable=1`), or if the interface's MTU is below 1280.
    pub ipv6: Option<Ipv6Settings>,
    /// Its addresses of global scope, in the kernel's order.
    pub addresses: Vec<HostAddress>,
}

/// The settings below `/proc/sys/net/ipv6/conf` that matter for a foreign interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Settings {
    /// `forwarding`: it acts as a router, and ignores router advertisements unless `accept_ra` is 2.
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
    /// The preferred source.
    pub source: Option<IpAddr>,
    /// The router; `None` if all destinations are on link.
    pub gateway: Option<IpAddr>,
    /// Learned from a router advertisement.
    pub from_router_advertisement: bool,
}

/// The selected underlay.
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
    /// The source address of the VXLAN device, per family: differs from `public_ip` behind NAT.
    pub local: PerFamily<IpAddr>,
}

/// The external interface and addresses in use, by this agent or by its previous run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CurrentUnderlay {
    /// Interface index.
    pub link: Option<u32>,
    /// The source of each VXLAN device.
    pub local: PerFamily<IpAddr>,
    /// The last published address, if there is no device: after a reboot.
    pub published: PerFamily<IpAddr>,
}

impl CurrentUnderlay {
    /// The address of a family.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        self.local.get(family).or(self.published.get(family)).copied()
    }
}

/// Why an address was selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SelectionReason {
    /// It is named by `--iface`, or matches `--iface-regex`.
    Configured,
    /// It is the only usable one.
    Only,
    /// It was in use before.
    InUse,
    /// It is the kernel's source address for the default route.
    DefaultRouteSource,
    /// It is the first of equally good ones.
    First,
    /// The interface has no usable address any more.
    Retained,
}

impl fmt::Display for SelectionReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SelectionReason::Configured => "named by --iface or --iface-regex",
            SelectionReason::Only => "the interface's only usable address",
            SelectionReason::InUse => "in use before",
            SelectionReason::DefaultRouteSource => "the source of the default route",
            SelectionReason::First => "the interface's first address",
            SelectionReason::Retained => "kept: the interface has no usable address",
        })
    }
}

/// A selected underlay, with reasons and problems.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnderlayChoice {
    /// The underlay.
    pub underlay: Underlay,
    /// Why each address was selected.
    pub reasons: PerFamily<SelectionReason>,
    /// Missing interfaces and addresses, for which those in use stay.
    pub problems: Vec<String>,
}

impl UnderlaySelector {
    /// Selects the external interface and one of its addresses for each family. Addresses in the leasable ranges are not usable.
    /// `reachable_link` is the interface of the kernel's route to [`UnderlaySelector::can_reach`]; `None` without a route. If an
    /// interface or address in use is not found, it stays in use and is reported as a problem.
    pub fn choose(
        &self,
        inventory: &HostInventory,
        families: impl IntoIterator<Item = Family>,
        leasable: &PerFamily<Pool>,
        reachable_link: Option<u32>,
        in_use: &CurrentUnderlay,
    ) -> Result<UnderlayChoice, UnderlayError> {
        let families: Vec<Family> = families.into_iter().collect();
        let mut problems = Vec::new();
        let (link, configured) = match self.select_link(inventory, &families, reachable_link) {
            Ok(found) => found,
            Err(error) => {
                let is_in_use = |link: &&ForeignLink| Some(link.index) == in_use.link && !link.loopback;
                let Some(link) = inventory.links.iter().find(is_in_use) else { return Err(error) };
                problems.push(format!("{error}; {} stays in use", link.name));
                (link, None)
            }
        };
        let not_found = !problems.is_empty();
        let mut local = PerFamily::default();
        let mut reasons = PerFamily::default();
        for family in families.iter().copied() {
            // Without IPv6, only an existing device's address can stay.
            let lacks_ipv6 = family == Family::V6 && link.lacks_ipv6();
            let current = if lacks_ipv6 { in_use.local.v6 } else { in_use.address(family) };
            if lacks_ipv6 && current.is_none() && families.contains(&Family::V4) {
                continue;
            }
            // If an address is configured and missing, no other address replaces it.
            let configured_before = current.filter(|address| not_found && self.is_configured(*address));
            let (address, reason) = match configured.filter(|address| Family::of(*address) == family) {
                Some(address) => (address, SelectionReason::Configured),
                None => match configured_before
                    .map(|address| (address, SelectionReason::Retained))
                    .or_else(|| best_address(inventory, link, leasable, family, current))
                {
                    Some(found) => found,
                    None => {
                        let (interface, candidates) = (link.name.clone(), inventory.candidates());
                        let error = match lacks_ipv6 {
                            true => UnderlayError::Ipv6Disabled { interface, candidates },
                            false => UnderlayError::NoAddress { interface, family, candidates },
                        };
                        let Some(current) = current else { return Err(error) };
                        problems.push(format!("{error}; {current} stays in use until then; other families are not affected"));
                        (current, SelectionReason::Retained)
                    }
                },
            };
            *local.slot(family) = Some(address);
            *reasons.slot(family) = Some(reason);
        }
        let underlay = Underlay {
            index: link.index,
            name: link.name.clone(),
            mtu: link.mtu,
            public_ip: local.map(|family, address| self.public_ip.get(family).copied().unwrap_or(*address)),
            local,
        };
        Ok(UnderlayChoice { underlay, reasons, problems })
    }

    /// The external interface, and the configured address if the interface was found by its address.
    fn select_link<'a>(
        &self,
        inventory: &'a HostInventory,
        families: &[Family],
        reachable_link: Option<u32>,
    ) -> Result<(&'a ForeignLink, Option<IpAddr>), UnderlayError> {
        let candidates = || inventory.candidates();
        let usable = || inventory.links.iter().filter(|link| !link.loopback);
        let by_index = |index: u32| inventory.links.iter().find(|link| link.index == index);
        if !self.interfaces.is_empty() {
            let found = self.interfaces.iter().find_map(|wanted| {
                let address = wanted.parse::<IpAddr>().ok();
                let link = usable().find(|link| link.name == *wanted || address.is_some_and(|a| link.address(a).is_some()))?;
                Some((link, address.filter(|_| link.name != *wanted)))
            });
            found.ok_or_else(|| UnderlayError::NoSuchInterface { wanted: self.interfaces.clone(), candidates: candidates() })
        } else if let Some(regex) = &self.regex {
            let by_name = usable().find(|link| regex.is_match(&link.name)).map(|link| (link, None));
            let by_address = || {
                usable().find_map(|link| {
                    let mut addresses = link.addresses.iter().map(|a| a.address);
                    addresses.find(|a| regex.is_match(&a.to_string())).map(|address| (link, Some(address)))
                })
            };
            by_name
                .or_else(by_address)
                .ok_or_else(|| UnderlayError::NoMatch { regex: regex.to_string(), candidates: candidates() })
        } else if let Some(address) = self.can_reach {
            let link = reachable_link.and_then(by_index).filter(|link| !link.loopback);
            link.map(|link| (link, None)).ok_or_else(|| UnderlayError::Unreachable { address, candidates: candidates() })
        } else {
            let family = families.first().copied().unwrap_or(Family::V4);
            let route = inventory.default_routes.iter().find(|route| route.family == family);
            let link = route.and_then(|route| by_index(route.interface));
            link.map(|link| (link, None)).ok_or_else(|| UnderlayError::NoDefaultRoute { family, candidates: candidates() })
        }
    }

    /// Whether `--iface` or `--iface-regex` selects this address.
    fn is_configured(&self, address: IpAddr) -> bool {
        let text = address.to_string();
        self.interfaces.contains(&text) || self.regex.as_ref().is_some_and(|regex| regex.is_match(&text))
    }
}

/// The best address of a link in a family, with the reason.
fn best_address(
    inventory: &HostInventory,
    link: &ForeignLink,
    leasable: &PerFamily<Pool>,
    family: Family,
    in_use: Option<IpAddr>,
) -> Option<(IpAddr, SelectionReason)> {
    let leased = |address| leasable.get(family).is_some_and(|pool| pool.covers_address(address)).then_some(Flaw::Leased);
    let flaw = |address: &HostAddress| address.flaw.max(leased(address.address));
    let usable: Vec<&HostAddress> = link
        .addresses
        .iter()
        .filter(|address| Family::of(address.address) == family && flaw(address).is_none_or(Flaw::is_usable))
        .collect();
    let route = inventory.default_routes.iter().find(|route| route.family == family && route.interface == link.index);
    let is_source = |address: &HostAddress| match route {
        Some(DefaultRoute { source: Some(source), .. }) => address.address == *source,
        // As the kernel selects it (`inet_select_addr` in net/ipv4/devinet.c): a primary address whose subnet contains the
        // gateway.
        Some(DefaultRoute { gateway: Some(gateway), .. }) => {
            !address.secondary
                && Cidr::containing(address.address, address.length).is_some_and(|subnet| subnet.contains(*gateway))
        }
        _ => false,
    };
    let is_additional = |address: &HostAddress| address.secondary || address.length == family.bits();
    let is_in_use = |address: &HostAddress| in_use == Some(address.address);
    let rank = |address: &&&HostAddress| {
        let source = is_source(address);
        (flaw(address), is_additional(address) && !source, !is_in_use(address), !source)
    };
    let best = usable.iter().min_by_key(rank)?;
    let reason = match usable.len() {
        1 => SelectionReason::Only,
        _ if is_in_use(best) => SelectionReason::InUse,
        _ if is_source(best) => SelectionReason::DefaultRouteSource,
        _ => SelectionReason::First,
    };
    Some((best.address, reason))
}

impl ForeignLink {
    /// An address of this link.
    fn address(&self, address: IpAddr) -> Option<&HostAddress> {
        self.addresses.iter().find(|found| found.address == address)
    }
}

/// The DNS servers in a resolv.conf(5).
pub fn nameservers(resolv_conf: &str) -> impl Iterator<Item = IpAddr> + '_ {
    resolv_conf.lines().filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse().ok())
}

/// Remedy to enable IPv6 on an interface.
pub fn ipv6_remedy(interface: &str) -> String {
    format!(
        "sysctl -w net/ipv6/conf/{interface}/disable_ipv6=0 (if there is no such setting, the kernel was started with ipv6.disable=1, or \
         the MTU of {interface} is below 1280)"
    )
}

impl ForeignLink {
    /// Whether IPv6 is disabled on it.
    pub fn lacks_ipv6(&self) -> bool {
        self.ipv6.is_none_or(|ipv6| ipv6.disabled)
    }
}

impl HostInventory {
    /// Underlay addresses that this host depends on: its routers and its resolvers.
    pub fn required_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.default_routes.iter().filter_map(|route| route.gateway).chain(self.resolvers.iter().copied())
    }

    /// Why an address is not in use any more, for messages.
    pub fn explain_loss(&self, address: IpAddr, interface: u32) -> String {
        let found = self.links.iter().find_map(|link| Some((link, link.address(address)?)));
        match found {
            None => "no longer on this host".to_owned(),
            Some((link, _)) if link.index != interface => format!("on {}, which is not the external interface", link.name),
            Some((_, HostAddress { flaw: Some(flaw), .. })) => flaw.to_string(),
            Some(_) => "a better one exists".to_owned(),
        }
    }

    /// The interfaces through which containers reach external IPv4 networks: the external one, and those with a default route.
    pub fn uplinks(&self, external: u32) -> Vec<String> {
        let has_default_route =
            |index: u32| self.default_routes.iter().any(|route| route.family == Family::V4 && route.interface == index);
        let uplinks = self.links.iter().filter(|link| link.index == external || has_default_route(link.index));
        uplinks.map(|link| link.name.clone()).collect()
    }

    /// The selectable interfaces with their addresses, for messages.
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
mod tests;
