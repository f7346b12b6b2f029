//! Which interface is the external one, and which addresses of it peers send to.
//!
//! The address in use stays while it is fit. Otherwise the choice is the kernel's own source for the default route, and behind it what an operator or
//! a daemon adds beside the host's own address: secondary addresses, and those of host length, as VRRP has them. Lifetimes do not matter: a
//! DHCP lease has one, a floating address has none. Each family is chosen by itself; the trouble of one does not hold up the other.

mod address;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use regex::Regex;

use crate::model::network::Pool;
use crate::model::{Cidr, Family, PerFamily};

pub use address::{Flaw, HostAddress};

/// How the external interface is chosen: the first of the names and addresses that is there, else the first link whose name or address
/// matches the expression, else the one by which an address is reached, else that of the default route.
#[derive(Debug, Clone, Default)]
pub struct UnderlaySelector {
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
    /// The chosen interface has no IPv6, and IPv4 alone is no way out.
    #[error(
        "IPv6 is switched off on interface {interface}, and the network needs it: {}, or choose another interface with --iface; \
         candidates: {candidates}",
        ipv6_remedy(.interface)
    )]
    Ipv6Disabled {
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
pub struct HostInventory {
    /// The links.
    pub links: Vec<ForeignLink>,
    /// Default routes, the preferred (lowest metric) first within each family.
    pub default_routes: Vec<DefaultRoute>,
    /// Families in which iptables' FORWARD chain (`ip filter FORWARD`, `ip6 filter FORWARD`) has policy DROP, as Docker and ufw set it.
    pub forward_drops: Vec<Family>,
    /// The servers that names are asked of.
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
    /// `bridge_name`, `veth`, `vlan`; empty for hardware.
    pub kind: String,
    /// It is part of another interface (a bridge, a bond), which has the addresses.
    pub is_port: bool,
    /// Its IPv6 settings; absent where the kernel has no IPv6 (`is_ipv6.disable=1`), or none on an interface with an MTU below 1280.
    pub ipv6: Option<Ipv6Settings>,
    /// Its addresses of global scope, in the kernel's order.
    pub addresses: Vec<HostAddress>,
}

/// The settings below `/proc/sys/net/is_ipv6/conf` of an interface, as far as they matter for an interface that is not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Settings {
    /// `check_forwarding`: it is a router's, and ignores router advertisements unless `accept_ra` is 2.
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
    /// The router; `None` where all is on link.
    pub gateway: Option<IpAddr>,
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

/// The external interface and the addresses that are in use, by this agent or the one before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CurrentUnderlay {
    /// Interface index.
    pub link: Option<u32>,
    /// The source of each VXLAN device.
    pub local: PerFamily<IpAddr>,
    /// What was published last, where there is no device: after a reboot.
    pub published: PerFamily<IpAddr>,
}

impl CurrentUnderlay {
    /// The address of a family.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        self.local.get(family).or(self.published.get(family)).copied()
    }
}

/// Why an address was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SelectionReason {
    /// It is named by `--iface`, or matches `--iface-regex`.
    Configured,
    /// There is no other one.
    Only,
    /// It was in use before.
    InUse,
    /// The kernel sends from it by the default route.
    DefaultRouteSource,
    /// It is the first one that is as good.
    First,
    /// The interface does not have it any more, nor another one.
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

/// A chosen underlay, and how it was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnderlayChoice {
    /// The underlay.
    pub underlay: Underlay,
    /// Why each address was chosen.
    pub reasons: PerFamily<SelectionReason>,
    /// What was looked for and is not there: what was in use stays.
    pub problems: Vec<String>,
}

impl UnderlaySelector {
    /// Chooses the external interface and an address of it for each family of the pools. `reach` is the interface by which the kernel would send to
    /// [`UnderlaySelector::can_reach`], `None` where there is no route. What is not found and is in use stays, and is named among the problems.
    pub fn choose(
        &self,
        inventory: &HostInventory,
        pools: &PerFamily<Pool>,
        reachable_link: Option<u32>,
        in_use: &CurrentUnderlay,
    ) -> Result<UnderlayChoice, UnderlayError> {
        let families: Vec<Family> = pools.families().collect();
        let mut problems = Vec::new();
        let (link, configured) = match self.select_link(inventory, &families, reachable_link) {
            Ok(found) => found,
            Err(error) => {
                let same = |link: &&ForeignLink| Some(link.index) == in_use.link && !link.loopback;
                let Some(link) = inventory.links.iter().find(same) else { return Err(error) };
                problems.push(format!("{error}; {} stays in use", link.name));
                (link, None)
            }
        };
        let not_found = !problems.is_empty();
        let mut local = PerFamily::default();
        let mut reasons = PerFamily::default();
        for family in families {
            // On a kernel without IPv6 only what was built with it can stay.
            let lacks_ipv6 = family == Family::V6 && link.lacks_ipv6();
            let before = if lacks_ipv6 { in_use.local.v6 } else { in_use.address(family) };
            if lacks_ipv6 && before.is_none() && pools.get(Family::V4).is_some() {
                continue;
            }
            // Where what is asked for by its address is gone, no other one takes its place.
            let configured_before = before.filter(|address| not_found && self.is_configured(*address));
            let (address, reason) = match configured.filter(|address| Family::of(*address) == family) {
                Some(address) => (address, SelectionReason::Configured),
                None => match configured_before
                    .map(|address| (address, SelectionReason::Retained))
                    .or_else(|| best_address(inventory, link, pools, family, before))
                {
                    Some(found) => found,
                    None => {
                        let (interface, candidates) = (link.name.clone(), inventory.candidates());
                        let error = match lacks_ipv6 {
                            true => UnderlayError::Ipv6Disabled { interface, candidates },
                            false => UnderlayError::NoAddress { interface, family, candidates },
                        };
                        let Some(before) = before else { return Err(error) };
                        problems.push(format!("{error}; {before} stays in use until then, and other families do not wait"));
                        (before, SelectionReason::Retained)
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

    /// The external interface, and the address that was asked for where it was found by one.
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

    /// Whether `--iface` or `--iface-regex` asks for this very address.
    fn is_configured(&self, address: IpAddr) -> bool {
        let text = address.to_string();
        self.interfaces.contains(&text) || self.regex.as_ref().is_some_and(|regex| regex.is_match(&text))
    }
}

/// The best address of a family that a link has, and why it is.
fn best_address(
    inventory: &HostInventory,
    link: &ForeignLink,
    pools: &PerFamily<Pool>,
    family: Family,
    in_use: Option<IpAddr>,
) -> Option<(IpAddr, SelectionReason)> {
    let leased = |address| pools.get(family).is_some_and(|pool| pool.covers_address(address)).then_some(Flaw::Leased);
    let flaw = |address: &HostAddress| address.flaw.max(leased(address.address));
    let usable: Vec<&HostAddress> = link
        .addresses
        .iter()
        .filter(|address| Family::of(address.address) == family && flaw(address).is_none_or(Flaw::is_usable))
        .collect();
    let route = inventory.default_routes.iter().find(|route| route.family == family && route.interface == link.index);
    let is_source = |address: &HostAddress| match route {
        Some(DefaultRoute { source: Some(source), .. }) => address.address == *source,
        // As the kernel chooses (`inet_select_addr` in net/ipv4/devinet.c): a primary address whose subnet the gateway is in.
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

/// The servers that a resolv.conf(5) names.
pub fn nameservers(resolv_conf: &str) -> impl Iterator<Item = IpAddr> + '_ {
    resolv_conf.lines().filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse().ok())
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
    pub fn lacks_ipv6(&self) -> bool {
        self.ipv6.is_none_or(|ipv6| ipv6.disabled)
    }
}

impl HostInventory {
    /// Addresses of the underlay that this host depends on: its routers and its resolvers.
    pub fn required_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.default_routes.iter().filter_map(|route| route.gateway).chain(self.resolvers.iter().copied())
    }

    /// What became of an address that was in use and is not any more, for messages.
    pub fn explain_loss(&self, address: IpAddr, interface: u32) -> String {
        let found = self.links.iter().find_map(|link| Some((link, link.address(address)?)));
        match found {
            None => "no longer on this host".to_owned(),
            Some((link, _)) if link.index != interface => format!("on {}, which is not the external interface", link.name),
            Some((_, HostAddress { flaw: Some(flaw), .. })) => flaw.to_string(),
            Some(_) => "a better one is there".to_owned(),
        }
    }

    /// The interfaces by which containers reach the world outside over IPv4: the external one, and those with a default route.
    pub fn uplinks(&self, external: u32) -> Vec<String> {
        let has_default_route =
            |index: u32| self.default_routes.iter().any(|route| route.family == Family::V4 && route.interface == index);
        let uplinks = self.links.iter().filter(|link| link.index == external || has_default_route(link.index));
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
mod tests;
