//! Interface sysctls (`/proc/sys/net/ipv4/conf`, `/proc/sys/net/ipv6/conf`) that the overlay's traffic depends on.
//!
//! A new device gets the values of `conf/default`, and the kernel uses the device's own value instead of the global one: with
//! `ip_forward=1`, a device created under `conf/default/forwarding=0` forwards nothing. So desired state sets them on each
//! device.
//!
//! If the kernel combines a device's value with that of `conf/all`, the values here take effect whatever the value of `all` is.
//! The exception is `arp_ignore`, which `all` can override (the larger value counts); `overlayctl check` reports that.

use super::state::{Key, State, Value};
use super::underlay::{ForeignLink, HostInventory};
use crate::model::{Device, Family, Role};

/// IPv4 forwarding of the whole namespace.
pub const IPV4_FORWARD: &str = "ipv4/ip_forward";
/// IPv6 forwarding of the whole namespace. It alone decides whether the kernel forwards IPv6 (`ip6_forward` in
/// `net/ipv6/ip6_output.c`).
pub const IPV6_FORWARD: &str = "ipv6/conf/all/forwarding";

/// Sysctls of every device that carries IPv4.
///
/// | sysctl | without it |
/// | --- | --- |
/// | `forwarding` | packets received on the device are not forwarded (`ip_route_input_slow` in `net/ipv4/route.c`) |
/// | `rp_filter` 2 (loose) | strict (1) drops packets whose return path is another device; the larger of this and `all` counts |
/// | `accept_redirects` | any neighbour on the device could change the host's routes |
const IPV4: [(&str, &str); 3] = [("forwarding", "1"), ("rp_filter", "2"), ("accept_redirects", "0")];
/// Further sysctls of the bridge, so that it always answers ARP requests for the gateway, and only those.
const IPV4_BRIDGE: [(&str, &str); 4] = [("arp_filter", "0"), ("arp_ignore", "0"), ("proxy_arp", "0"), ("proxy_arp_pvlan", "0")];
/// Sysctls of every device that carries IPv6. Without `forwarding` a device accepts redirects, and its neighbour advertisements
/// lack the router flag.
const IPV6: [(&str, &str); 2] = [("disable_ipv6", "0"), ("forwarding", "1")];

/// The sysctls of a device for one family: path and value.
pub fn device_settings(device: Device, family: Family) -> impl Iterator<Item = (String, &'static str)> {
    let settings = match (family, device.role) {
        (Family::V4, Role::Bridge) => IPV4.iter().chain(&IPV4_BRIDGE),
        (Family::V4, _) => IPV4.iter().chain(&[]),
        (Family::V6, _) => IPV6.iter().chain(&[]),
    };
    settings.map(move |(setting, value)| (interface_path(&device.to_string(), family, setting), *value))
}

/// Path of an interface's sysctl, below `/proc/sys/net`.
pub fn interface_path(interface: &str, family: Family, setting: &str) -> String {
    let protocol = match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    format!("{protocol}/conf/{interface}/{setting}")
}

/// The sysctl that enables forwarding of a family on this host.
pub const fn forwarding(family: Family) -> &'static str {
    match family {
        Family::V4 => IPV4_FORWARD,
        Family::V6 => IPV6_FORWARD,
    }
}

/// Kinds of interfaces whose peer may be a container or a guest. A router there is ignored unless the host has a route from it.
const INNER_KINDS: [&str; 3] = ["bridge", "tun", "veth"];

/// The host's own interfaces that have to keep accepting router advertisements when the host forwards IPv6. With forwarding and
/// `accept_ra=1`, the kernel ignores advertisements and drops the default routes learned from them (`rt6_purge_dflt_routers` in
/// `net/ipv6/route.c`).
///
/// These are the interfaces that accept advertisements now. If the agent enabled forwarding (`enabled_by_agent`), they include
/// those that accepted advertisements before. `changed` reports interfaces whose sysctl the agent changed before. On a host that
/// forwarded before the agent's start, an interface that ignored advertisements stays unchanged. So does one with `accept_ra=0`,
/// for which another program does router discovery.
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
        let accepts_ra = !ipv6.forwarding || enabled_by_agent || has_ra_default_route;
        changed(&link.name) || (ipv6.accept_ra == 1 && may_have_routers && accepts_ra)
    };
    inventory.links.iter().filter(is_kept).map(|link| link.name.clone()).collect()
}

/// Adds a device's sysctls for one family to a state.
pub fn insert_device_settings(state: &mut State, device: Device, family: Family) {
    for (path, value) in device_settings(device, family) {
        insert(state, path, value);
    }
}

/// Our devices accept no router advertisements, neither from a container nor through the tunnel. This also applies to a network
/// without IPv6, because the host may have IPv6.
pub fn ignore_router_advertisements(state: &mut State, device: Device) {
    insert(state, interface_path(&device.name(), Family::V6, "accept_ra"), "0");
}

/// Adds a sysctl to a state.
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
        assert_eq!(
            accept_ra_names(&all, 6, true),
            "eth0 eth1 bond0.7 cali7 br0",
            "the external interface is included whatever its kind"
        );
        let set = |all: &mut HostInventory, forwarding, accept_ra| {
            for link in &mut all.links {
                link.ipv6 = Some(Ipv6Settings { forwarding, accept_ra, disabled: false });
            }
        };
        set(&mut all, true, 1);
        assert_eq!(accept_ra_names(&all, 2, true), "eth0 eth1 bond0.7 br0", "the agent enabled forwarding");
        assert_eq!(
            accept_ra_names(&all, 2, false),
            "br0",
            "the host forwarded before: only interfaces with a default route from advertisements"
        );
        set(&mut all, false, 0);
        assert_eq!(accept_ra_names(&all, 2, true), "", "another program does router discovery");
        set(&mut all, true, 2);
        assert_eq!(accept_ra_names(&all, 2, true), "", "nothing to change");
        all.links[2].name = "changed".to_owned();
        assert_eq!(accept_ra_names(&all, 2, false), "changed");
        all.links[2].ipv6 = None;
        assert_eq!(accept_ra_names(&all, 2, true), "");
    }
}
