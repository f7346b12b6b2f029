//! Conflicts between the overlay's ranges and the host's routing: foreign routes, Docker's networks, resolvers and etcd inside
//! the ranges, and reverse path filters that drop packets with an asymmetric return path.

use std::net::IpAddr;

use overlay_agent::model::network::Pool;
use overlay_agent::model::{Cidr, Family, NetworkConfig};
use overlay_agent::plan::underlay::nameservers;
use serde_json::Value;

use super::facts::{ToolError, is_overlay_link, is_tunnel, report_unchecked, run_tool_json, sysctl};
use super::{Facts, Finding, Findings};

/// Protocol number of the agent's routes.
const OUR_PROTOCOL: &str = "86";

pub(super) async fn check(facts: &Facts, findings: &mut Findings) {
    for (_, pool) in facts.pools().iter() {
        foreign_routes(pool, findings).await;
        reserved_addresses(facts, pool, findings);
    }
    peer_routes(facts, findings).await;
}

/// Routes of this host that collide with a network which no agent has applied yet.
pub(crate) async fn route_collisions(network: &NetworkConfig) -> Vec<Finding> {
    let mut findings = Findings::for_check("addresses");
    for (_, pool) in network.pools.iter() {
        foreign_routes(pool, &mut findings).await;
    }
    findings.into_vec()
}

async fn foreign_routes(pool: &Pool, findings: &mut Findings) {
    let family = pool.network.family();
    match routes(family).await {
        Ok(routes) => collisions(pool, &routes, findings),
        Err(error) => report_unchecked(findings, &format!("the host's {family} routes"), &error),
    }
}

async fn routes(family: Family) -> Result<Vec<Value>, ToolError> {
    let flag = if family == Family::V4 { "-4" } else { "-6" };
    run_tool_json(&["ip", flag, "-j", "-N", "route", "show", "table", "all"]).await
}

fn collisions(pool: &Pool, routes: &[Value], findings: &mut Findings) {
    // The kernel's table of local addresses (`RT_TABLE_LOCAL`) does not route packets to other hosts.
    const RT_TABLE_LOCAL: &str = "255";
    let Pool { network, min, max, .. } = pool;
    for route in routes {
        let text = |name: &str| route[name].as_str().unwrap_or_default();
        let (device, destination) = (text("dev"), text("dst"));
        let foreign = text("protocol") != OUR_PROTOCOL
            && !is_overlay_link(device)
            && text("table") != RT_TABLE_LOCAL
            && text("table") != "local";
        // Only the range of leased subnets can conflict: hosts may use addresses in the rest of the network.
        let overlaps_leasable = |range: &Cidr| range.base() <= max.last() && min.base() <= range.last();
        let Some(range) = parse_destination(destination).filter(|range| foreign && overlaps_leasable(range)) else { continue };
        let evidence = vec![format!("route {destination} dev {device} proto {}", protocol_name(text("protocol")))];
        if !(range.covers(*min) && range.covers(*max)) {
            let owner = device_owner(device);
            findings.error(
                format!(
                    "the overlay network {network} collides with {owner}: containers with these addresses are unreachable from this host"
                ),
                evidence,
                match owner.starts_with("a route") {
                    true => format!("remove it (ip route delete {destination}), or give the overlay another network"),
                    false => format!(
                        "give {owner} another range (Docker: `bip` and `default-address-pools` in /etc/docker/daemon.json), or the \
                         overlay another network"
                    ),
                },
            );
        } else {
            findings.info(
                format!("the overlay network {network} lies inside a range that this host routes elsewhere"),
                evidence,
                "leased subnets use the overlay, and unleased subnets of the range are unreachable from this host: choose ranges that do not \
                 overlap",
            );
        }
    }
}

fn parse_destination(destination: &str) -> Option<Cidr> {
    if destination == "default" {
        return None;
    }
    destination.parse::<Cidr>().ok().or_else(|| Some(Cidr::host(destination.parse::<IpAddr>().ok()?)))
}

/// Maps common protocol numbers to the names in `/etc/iproute2/rt_protos`, because `-N` prints numbers.
fn protocol_name(protocol: &str) -> &str {
    match protocol {
        "2" => "kernel",
        "3" => "boot",
        "4" => "static",
        "16" => "dhcp",
        // The default protocol of `ip route add`, which `ip route show` omits.
        "" => "boot",
        other => other,
    }
}

/// Guesses a device's owner from its name.
fn device_owner(device: &str) -> String {
    let owner = match device {
        "docker0" | "docker_gwbridge" => "Docker's network",
        name if name.starts_with("br-") => "Docker's network",
        "cni0" | "flannel.1" => "flannel's network",
        name if name.starts_with("virbr") => "libvirt's network",
        name if name.starts_with("podman") || name.starts_with("cni-podman") => "podman's network",
        name if name.starts_with("tun") || name.starts_with("wg") => "the VPN",
        _ => return format!("a route by {device}"),
    };
    format!("{owner} on {device}")
}

/// Reports addresses inside the overlay's subnets that must stay outside: the underlay's, the resolvers', etcd's.
fn reserved_addresses(facts: &Facts, pool: &Pool, findings: &mut Findings) {
    let resolvers = std::fs::read_to_string(facts.path("/etc/resolv.conf")).unwrap_or_default();
    let endpoints = facts.status().map(|status| status.store.endpoints.as_slice()).unwrap_or_default();
    let servers = endpoints.iter().filter_map(|endpoint| {
        let authority = endpoint.split("://").last()?.trim_end_matches('/');
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
        host.trim_matches(['[', ']']).parse::<IpAddr>().ok()
    });
    let own = facts.status().and_then(|status| status.underlay.as_ref()).map(|underlay| underlay.public_ip).unwrap_or_default();
    let all = nameservers(&resolvers)
        .map(|address| ("a resolver of /etc/resolv.conf", address))
        .chain(servers.map(|address| ("etcd", address)))
        .chain(own.iter().map(|(_, address)| ("this host's own underlay address", *address)));
    let is_leasable =
        |address: IpAddr| pool.covers_address(address) || facts.peers.iter().any(|peer| peer.subnet.contains(address));
    for (description, address) in
        all.filter(|(_, address)| Family::of(*address) == pool.network.family() && is_leasable(*address))
    {
        findings.error(
            format!("{description} lies inside the overlay network {}, in the range of leased subnets", pool.network),
            vec![address.to_string()],
            "the tunnel takes its packets once its subnet is leased; until then only that subnet is exempt from the unreachable route: choose an overlay \
             network without real addresses, or exclude its range with SubnetMin and SubnetMax",
        );
    }
}

/// Checks the route to each peer, and whether a reverse path filter (RFC 3704) drops packets with an asymmetric return path.
async fn peer_routes(facts: &Facts, findings: &mut Findings) {
    let Some(underlay) = facts.status().and_then(|status| status.underlay.as_ref()) else { return };
    for peer in facts.peers.iter().take(facts.settings.peers) {
        let overlay_address = peer.subnet.nth(1).unwrap_or_else(|| peer.subnet.base());
        for (address, wanted) in [(peer.public_ip, underlay.interface.as_str()), (overlay_address, peer.device.as_str())] {
            let Ok(routes) = run_tool_json(&["ip", "-j", "route", "get", &address.to_string()]).await else { continue };
            let Some(device) = routes.first().and_then(|route| route["dev"].as_str()).filter(|device| *device != wanted) else {
                continue;
            };
            let evidence = vec![format!("ip route get {address}: dev {device}, not {wanted}")];
            let strict = strict_rp_filter(Family::of(address), wanted);
            let host = peer.host.clone().unwrap_or_else(|| peer.subnet.to_string());
            match strict {
                Some(filter) if !is_tunnel(device) => findings.error(
                    format!("the reverse path filter drops packets from {host} on {wanted}: the return path is {device}"),
                    evidence.into_iter().chain([filter]).collect(),
                    format!("fix the route, or sysctl -w net.ipv4.conf.{wanted}.rp_filter=2 (loose)"),
                ),
                _ => findings.warning(
                    format!("packets to {host} do not leave by {wanted}"),
                    evidence,
                    "look for a more specific route or a policy rule: ip route, ip rule; --iface chooses the external interface",
                ),
            }
        }
    }
}

/// Describes a strict filter of an interface. The larger of the interface's and the `all` setting applies (`ip-sysctl.rst`). IPv6
/// has none.
fn strict_rp_filter(family: Family, interface: &str) -> Option<String> {
    if family == Family::V6 {
        return None;
    }
    let value = |name: &str| sysctl(&format!("ipv4/conf/{name}/rp_filter")).and_then(|text| text.parse::<u8>().ok()).unwrap_or(0);
    let (all, own) = (value("all"), value(interface));
    (all.max(own) == 1).then(|| format!("net.ipv4.conf.all.rp_filter = {all}, net.ipv4.conf.{interface}.rp_filter = {own}"))
}
