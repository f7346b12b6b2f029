//! Settings of interfaces (`/proc/sys/net/ipv4/conf`, `/proc/sys/net/is_ipv6/conf`) with which the kernel would not carry the overlay's traffic.
//!
//! A device is created with the values of `conf/default`, and the kernel goes by the device's own value, not by the global one: with
//! `ip_forward=1` a device that was created under `conf/default/check_forwarding=0` forwards nothing. So the settings are desired for each device.
//!
//! Where the kernel combines a device's value with that of `conf/all`, only values are here that hold whatever the other is.
//! `arp_ignore` is the one that `all` can overrule (the larger counts); `overlayctl check` looks at that.

use super::super::state::{Key, State, Value};
use super::super::underlay::{ForeignLink, HostInventory};
use crate::model::{Device, Family, Role};

/// IPv4 forwarding of the whole namespace.
pub const IPV4_FORWARD: &str = "ipv4/ip_forward";
/// IPv6 forwarding of the whole namespace. The kernel forwards IPv6 by this one alone (`ip6_forward` in `net/is_ipv6/ip6_output.c`).
pub const IPV6_FORWARD: &str = "ipv6/conf/all/forwarding";

/// What every device that carries IPv4 has.
///
/// | setting | without it |
/// | --- | --- |
/// | `check_forwarding` | nothing that comes in by the device is forwarded (`ip_route_input_slow` in `net/ipv4/route.c`) |
/// | `rp_filter` 2 (loose) | the larger of this and `all` counts, and strict (1) is the smaller: a source whose way back is another one is dropped |
/// | `accept_redirects` | whoever is at the device could change the host's routes |
const IPV4: [(&str, &str); 3] = [("forwarding", "1"), ("rp_filter", "2"), ("accept_redirects", "0")];
/// What the bridge has beside that, so that it alone answers ARP for the gateway, always, and for nothing else.
const IPV4_BRIDGE: [(&str, &str); 4] = [("arp_filter", "0"), ("arp_ignore", "0"), ("proxy_arp", "0"), ("proxy_arp_pvlan", "0")];
/// What every device that carries IPv6 has. A device that is no router takes redirects, and says in its advertisements that it is none.
const IPV6: [(&str, &str); 2] = [("disable_ipv6", "0"), ("forwarding", "1")];

/// The settings of a device for one family: path and value.
pub fn device_settings(device: Device, family: Family) -> impl Iterator<Item = (String, &'static str)> {
    let settings = match (family, device.role) {
        (Family::V4, Role::Bridge) => IPV4.iter().chain(&IPV4_BRIDGE),
        (Family::V4, _) => IPV4.iter().chain(&[]),
        (Family::V6, _) => IPV6.iter().chain(&[]),
    };
    settings.map(move |(setting, value)| (interface_path(&device.to_string(), family, setting), *value))
}

/// Where a setting of an interface is.
pub fn interface_path(interface: &str, family: Family, setting: &str) -> String {
    let protocol = match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    format!("{protocol}/conf/{interface}/{setting}")
}

/// The sysctl that lets the host forward a family.
pub const fn forwarding(family: Family) -> &'static str {
    match family {
        Family::V4 => IPV4_FORWARD,
        Family::V6 => IPV6_FORWARD,
    }
}

/// Kinds of interfaces at whose other end may be a container or a guest: a router there is nobody's unless it is used already.
const INNER_KINDS: [&str; 3] = ["bridge", "tun", "veth"];

/// The host's own interfaces that have to go on with router advertisements when the host forwards IPv6. With `accept_ra=1` the kernel ignores them
/// then, and drops the default routes that came from them (`rt6_purge_dflt_routers` in `net/is_ipv6/route.c`).
///
/// These are the interfaces that take advertisements now, and while forwarding was switched on by the agent (`enabled_by_agent`) those that would have;
/// `changed` names the ones whose setting the agent changed before. An interface that ignored advertisements on a host that forwarded before the
/// agent came stays as it is, as does one whose setting is 0: others do its router discovery.
pub fn accept_ra_interfaces(
    inventory: &HostInventory,
    external: u32,
    enabled_by_agent: bool,
    changed: impl Fn(&str) -> bool,
) -> Vec<String> {
    let is_kept = |link: &&ForeignLink| {
        let Some(ipv6) = link.ipv6.filter(|ipv6| ipv6.accept_ra != 0) else { return false };
        let has_ra_default_route =
            inventory.default_routes.iter().any(|route| route.interface == link.index && route.from_router_advertisement);
        let inner = link.is_port || link.loopback || INNER_KINDS.contains(&link.kind.as_str());
        let may_have_routers = link.index == external || has_ra_default_route || !inner;
        let takes = !ipv6.forwarding || enabled_by_agent || has_ra_default_route;
        changed(&link.name) || (ipv6.accept_ra == 1 && may_have_routers && takes)
    };
    inventory.links.iter().filter(is_kept).map(|link| link.name.clone()).collect()
}

/// Adds a setting to a state.
pub fn insert(state: &mut State, path: impl Into<Box<str>>, value: &str) {
    state.insert(Key::Sysctl(path.into()), Value::Sysctl(value.into()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::underlay::{DefaultRoute, Ipv6Settings};

    fn link(index: u32, name: &str, kind: &str) -> ForeignLink {
        ForeignLink {
            index,
            name: name.to_owned(),
            mtu: 1500,
            up: true,
            loopback: name == "lo",
            kind: kind.to_owned(),
            is_port: false,
            ipv6: Some(Ipv6Settings { forwarding: false, accept_ra: 1, disabled: false }),
            addresses: Vec::new(),
        }
    }

    fn inventory() -> HostInventory {
        let mut links = vec![
            link(1, "lo", ""),
            link(2, "eth0", ""),
            link(3, "eth1", ""),
            link(4, "bond0.7", "vlan"),
            link(5, "docker0", "bridge"),
            link(6, "cali7", "veth"),
            link(7, "eth2", ""),
            link(8, "br0", "bridge"),
        ];
        links[6].is_port = true;
        let defaults =
            vec![DefaultRoute { family: Family::V6, interface: 8, source: None, gateway: None, from_router_advertisement: true }];
        HostInventory { links, default_routes: defaults, ..HostInventory::default() }
    }

    fn accept_ra_names(inventory: &HostInventory, external: u32, switched_on: bool) -> String {
        accept_ra_interfaces(inventory, external, switched_on, |name| name == "changed").join(" ")
    }

    #[test]
    fn accept_ra_is_kept_where_in_use() {
        let mut all = inventory();
        assert_eq!(accept_ra_names(&all, 2, true), "eth0 eth1 bond0.7 br0");
        assert_eq!(accept_ra_names(&all, 6, true), "eth0 eth1 bond0.7 cali7 br0", "the external interface counts whatever it is");
        let set = |all: &mut HostInventory, forwarding, accept_ra| {
            for link in &mut all.links {
                link.ipv6 = Some(Ipv6Settings { forwarding, accept_ra, disabled: false });
            }
        };
        set(&mut all, true, 1);
        assert_eq!(accept_ra_names(&all, 2, true), "eth0 eth1 bond0.7 br0", "the agent switched forwarding on");
        assert_eq!(accept_ra_names(&all, 2, false), "br0", "the host forwarded before: only what lives from them");
        set(&mut all, false, 0);
        assert_eq!(accept_ra_names(&all, 2, true), "", "others do their router discovery");
        set(&mut all, true, 2);
        assert_eq!(accept_ra_names(&all, 2, true), "", "nothing to change");
        all.links[2].name = "changed".to_owned();
        assert_eq!(accept_ra_names(&all, 2, false), "changed");
        all.links[2].ipv6 = None;
        assert_eq!(accept_ra_names(&all, 2, true), "");
    }
}
