//! Settings of interfaces (`/proc/sys/net/ipv4/conf`, `/proc/sys/net/ipv6/conf`) with which the kernel would not carry the overlay's traffic.
//!
//! A device is created with the values of `conf/default`, and the kernel goes by the device's own value, not by the global one: with
//! `ip_forward=1` a device that was created under `conf/default/forwarding=0` forwards nothing. So the settings are desired for each device.
//!
//! Where the kernel combines a device's value with that of `conf/all`, only values are here that hold whatever the other is.
//! `arp_ignore` is the one that `all` can overrule (the larger counts); `overlayctl check` looks at that.

use super::super::state::{Key, State, Value};
use crate::model::{Device, Family, Role};

/// IPv4 forwarding of the whole namespace.
pub const IPV4_FORWARD: &str = "ipv4/ip_forward";
/// IPv6 forwarding of the whole namespace. The kernel forwards IPv6 by this one alone (`ip6_forward` in `net/ipv6/ip6_output.c`).
pub const IPV6_FORWARD: &str = "ipv6/conf/all/forwarding";

/// What every device that carries IPv4 has.
///
/// | setting | without it |
/// | --- | --- |
/// | `forwarding` | nothing that comes in by the device is forwarded (`ip_route_input_slow` in `net/ipv4/route.c`) |
/// | `rp_filter` 2 (loose) | the larger of this and `all` counts, and strict (1) is the smaller: a source whose way back is another one is dropped |
/// | `accept_redirects` | whoever is at the device could change the host's routes |
const IPV4: [(&str, &str); 3] = [("forwarding", "1"), ("rp_filter", "2"), ("accept_redirects", "0")];
/// What the bridge has beside that, so that it alone answers ARP for the gateway, always, and for nothing else.
const IPV4_BRIDGE: [(&str, &str); 4] = [("arp_filter", "0"), ("arp_ignore", "0"), ("proxy_arp", "0"), ("proxy_arp_pvlan", "0")];
/// What every device that carries IPv6 has. A device that is no router takes redirects, and says in its advertisements that it is none.
const IPV6: [(&str, &str); 2] = [("disable_ipv6", "0"), ("forwarding", "1")];

/// The settings of a device for one family: path and value.
pub fn of_device(device: Device, family: Family) -> impl Iterator<Item = (String, &'static str)> {
    let settings = match (family, device.role) {
        (Family::V4, Role::Bridge) => IPV4.iter().chain(&IPV4_BRIDGE),
        (Family::V4, _) => IPV4.iter().chain(&[]),
        (Family::V6, _) => IPV6.iter().chain(&[]),
    };
    settings.map(move |(setting, value)| (of(&device.to_string(), family, setting), *value))
}

/// Where a setting of an interface is.
pub fn of(interface: &str, family: Family, setting: &str) -> String {
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

/// Adds a setting to a state.
pub fn want(state: &mut State, path: impl Into<Box<str>>, value: &str) {
    state.insert(Key::Sysctl(path.into()), Value::Sysctl(value.into()));
}
