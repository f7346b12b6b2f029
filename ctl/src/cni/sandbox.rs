//! Reads a container's network namespace: interfaces, addresses, routes. Changes nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ipnetwork::IpNetwork;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use overlay_agent::kernel::netns::{Netns, NetnsError};

use super::error::{CniError, Code};

/// IPv4 routes of the thread's namespace (`proc_pid_net(5)`), one per line: interface, destination, gateway in the host's byte
/// order.
const ROUTES_V4: &str = "/proc/thread-self/net/route";
/// IPv6 routes: destination, its length, source, its length, gateway, metric, two counters, flags, interface.
const ROUTES_V6: &str = "/proc/thread-self/net/ipv6_route";

/// State of an interface in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InterfaceState {
    /// Whether the interface is up.
    pub up: bool,
    /// MAC.
    pub mac: Option<[u8; 6]>,
    /// Addresses.
    pub addresses: Vec<IpNetwork>,
    /// Routes over the interface with a gateway: destination and gateway.
    pub routes: Vec<(IpNetwork, IpAddr)>,
}

/// Opens a container's namespace. Rejects this process's own: attaching it would take the host off its network.
pub fn open(path: &Path) -> Result<Netns, CniError> {
    let netns = Netns::open(path).map_err(|e| {
        let code = match &e {
            NetnsError::NotFound { .. } => Code::UnknownContainer,
            _ => Code::InvalidEnvironment,
        };
        CniError::new(code, format!("CNI_NETNS: {e}"))
    })?;
    let own = Netns::current().and_then(|own| own.is_same(&netns));
    if own.map_err(|e| CniError::new(Code::Failed, e.to_string()))? {
        let text = format!("CNI_NETNS={} is the host's own network namespace, which cannot be attached", path.display());
        return Err(CniError::new(Code::InvalidEnvironment, text));
    }
    Ok(netns)
}

/// Whether the namespace has an interface of that name.
pub fn has_interface(netns: &Netns, name: &str) -> Result<bool, CniError> {
    in_namespace(netns, || Ok(if_nametoindex(name).is_ok()))
}

/// Reads all interfaces of the namespace by name.
pub fn interfaces(netns: &Netns) -> Result<BTreeMap<String, InterfaceState>, CniError> {
    in_namespace(netns, || {
        let mut all: BTreeMap<String, InterfaceState> = BTreeMap::new();
        for entry in getifaddrs().map_err(std::io::Error::from)? {
            let state = all.entry(entry.interface_name).or_default();
            state.up = entry.flags.contains(InterfaceFlags::IFF_UP);
            let Some(address) = entry.address else { continue };
            let netmask = entry.netmask;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            let ip = v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())));
            if let Some(link) = address.as_link_addr() {
                state.mac = link.addr();
            } else if let (Some(ip), Some(mask)) = (ip, netmask) {
                let v4 = mask.as_sockaddr_in().map(|m| IpAddr::V4(m.ip()));
                let mask = v4.or_else(|| mask.as_sockaddr_in6().map(|m| IpAddr::V6(m.ip())));
                state.addresses.extend(mask.and_then(|mask| IpNetwork::with_netmask(ip, mask).ok()));
            }
        }
        for (interface, destination, gateway) in routes()? {
            all.entry(interface).or_default().routes.push((destination, gateway));
        }
        Ok(all)
    })
}

fn in_namespace<T>(netns: &Netns, read: impl FnOnce() -> std::io::Result<T>) -> Result<T, CniError> {
    let failed = |e: &dyn std::fmt::Display| CniError::new(Code::Failed, format!("cannot read {}: {e}", netns.path().display()));
    netns.run_in_place(read).map_err(|e| failed(&e))?.map_err(|e| failed(&e))
}

/// Interface, destination and gateway.
type GatewayRoute = (String, IpNetwork, IpAddr);

/// Reads the routes of the thread's namespace that have a gateway. The file of a family that the kernel lacks is absent.
fn routes() -> std::io::Result<Vec<GatewayRoute>> {
    let text = |path| match std::fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        read => read,
    };
    let mut routes: Vec<GatewayRoute> = text(ROUTES_V4)?.lines().skip(1).filter_map(route_v4).collect();
    routes.extend(text(ROUTES_V6)?.lines().filter_map(route_v6));
    Ok(routes)
}

fn route_v4(line: &str) -> Option<GatewayRoute> {
    let mut words = line.split_whitespace();
    let (interface, destination, gateway) = (words.next()?, words.next()?, words.next()?);
    let mask = words.nth(4)?;
    let address = |hex: &str| u32::from_str_radix(hex, 16).ok().map(|value| Ipv4Addr::from(value.to_ne_bytes()));
    let destination = IpNetwork::with_netmask(address(destination)?.into(), address(mask)?.into()).ok()?;
    let gateway = address(gateway).filter(|gateway| !gateway.is_unspecified())?;
    Some((interface.to_owned(), destination, gateway.into()))
}

fn route_v6(line: &str) -> Option<GatewayRoute> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [destination, length, _, _, gateway, .., interface] = words[..] else { return None };
    let address = |hex: &str| u128::from_str_radix(hex, 16).ok().map(Ipv6Addr::from);
    let destination = IpNetwork::new(address(destination)?.into(), u8::from_str_radix(length, 16).ok()?).ok()?;
    let gateway = address(gateway).filter(|gateway| !gateway.is_unspecified())?;
    Some((interface.to_owned(), destination, gateway.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_gateway_routes_are_parsed() {
        let v4 = "eth0\t00000000\t01C8F40A\t0003\t0\t0\t0\t00000000\t0\t0\t0";
        let gateway = u32::from_str_radix("01C8F40A", 16).expect("a number").to_ne_bytes();
        let to = |text: &str| text.parse::<IpNetwork>().expect(text);
        assert_eq!(route_v4(v4), Some(("eth0".to_owned(), to("0.0.0.0/0"), IpAddr::from(gateway))));
        let hex = |address: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(address));
        let line = format!(
            "eth1\t{}\t{}\t0003\t0\t0\t0\t{}\t0\t0\t0",
            hex([10, 244, 0, 0]),
            hex([10, 244, 7, 1]),
            hex([255, 255, 0, 0])
        );
        assert_eq!(route_v4(&line), Some(("eth1".to_owned(), to("10.244.0.0/16"), IpAddr::from([10, 244, 7, 1]))));
        assert_eq!(route_v4("eth0\t00C8F40A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0"), None);
        assert_eq!(route_v4("Iface"), None);
        let zeros = "0".repeat(32);
        let v6 = format!("{zeros} 00 {zeros} 00 fd100000000000000000000000000001 00000400 00000001 00000000 00000003 eth0");
        assert_eq!(route_v6(&v6), Some(("eth0".to_owned(), to("::/0"), "fd10::1".parse().expect("an address"))));
        // The kernel's own entry for "no route".
        let none = format!("{zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200 lo");
        assert_eq!(route_v6(&none), None);
        let subnet = format!("fd100000000000000000000000000000 40 {zeros} 00 {zeros} 00000100 00000001 00000000 00000001 eth0");
        assert_eq!(route_v6(&subnet), None);
    }
}
