//! The kernel state of a lab host, read with an operator's tools: `ip`, `bridge`, `nft`, /proc/sys.
//!
//! [`actual_state`] lists the overlay's entries, one per line. [`expected_state`] derives the same lines from the leases and
//! section 5 of the design. A test compares the two.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use overlay_agent::model::Family;
use overlay_agent::model::api::{SubnetEntry, Subnets};
use overlay_agent::model::device::PORT_PREFIX;
use overlayctl::lab::{Host, Lab};
use serde_json::Value;

use crate::ExpectContext;
use crate::programs::{CommandOutput, require_program};
use crate::rules::{self, ExpectedRuleset};

/// The route protocol number of the agent.
pub const ROUTE_PROTOCOL: &str = "86";

/// Runs a command inside a target; it must succeed.
#[track_caller]
pub fn run(lab: &Lab, target: &str, command: &[&str]) -> String {
    attempt(lab, target, command).assert_code(0).stdout
}

/// Runs a command inside a target and accepts any exit code.
#[track_caller]
pub fn attempt(lab: &Lab, target: &str, command: &[&str]) -> CommandOutput {
    CommandOutput::from_output(command, &lab.exec(target, command).expect_ok(&format!("{target}: {}", command.join(" "))))
}

/// Runs a shell script inside a target; it must succeed.
#[track_caller]
pub fn shell(lab: &Lab, target: &str, script: &str) -> String {
    run(lab, target, &["sh", "-ec", script])
}

/// The elements of the output of `ip -j -d` or `bridge -j`; none without output.
#[track_caller]
pub fn list_json(lab: &Lab, target: &str, program: &str, arguments: &[&str]) -> Vec<Value> {
    require_program(program, "iproute2");
    let command: Vec<&str> = [program, "-j", "-d"].into_iter().chain(arguments.iter().copied()).collect();
    let output = attempt(lab, target, &command).assert_code(0);
    if output.stdout.trim().is_empty() {
        return Vec::new();
    }
    let all: Vec<Value> = output.json();
    all.into_iter().filter(|v| v.as_object().is_some_and(|fields| !fields.is_empty())).collect()
}

/// A link by name, if it exists.
pub fn link(lab: &Lab, target: &str, name: &str) -> Option<Value> {
    list_json(lab, target, "ip", &["link", "show"]).into_iter().find(|link| link["ifname"] == name)
}

/// A sysctl below /proc/sys/net, as the target sees it.
#[track_caller]
pub fn sysctl(lab: &Lab, target: &str, path: &str) -> String {
    let file = Path::new("/proc/sys/net").join(path);
    let read = lab.netns(target).expect_ok(target).run(|| fs::read_to_string(&file)).expect_ok(target);
    read.expect_ok(&format!("{target}: {}", file.display())).trim().to_owned()
}

/// All overlay entries of a host's kernel, one per line. The ids of next-hop objects are resolved.
pub fn actual_state(lab: &Lab, target: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for link in list_json(lab, target, "ip", &["link", "show"]) {
        all.extend(link_line(&link));
    }
    for link in list_json(lab, target, "ip", &["address", "show"]) {
        let name = text(&link, "ifname");
        if !is_agent_device(&name) {
            continue;
        }
        for address in link["addr_info"].as_array().map(Vec::as_slice).unwrap_or_default() {
            // The kernel adds link-local addresses itself; the bridge's comes from the MAC that the agent sets.
            if address["scope"] == "global" {
                all.insert(format!("address {}/{} dev {name}", text(address, "local"), number(address, "prefixlen")));
            }
        }
    }
    let tunnels = list_json(lab, target, "ip", &["link", "show", "type", "vxlan"]).into_iter().map(|l| text(&l, "ifname"));
    for device in tunnels.filter(|name| is_agent_device(name)) {
        for fdb in list_json(lab, target, "bridge", &["fdb", "show", "dev", &device]) {
            let flags = fdb["flags"].as_array().map(Vec::len);
            let is_permanent = fdb["state"] == "permanent" && flags == Some(1) && fdb["flags"][0] == "self";
            let state = if is_permanent { "permanent self".to_owned() } else { format!("{} {}", fdb["state"], fdb["flags"]) };
            all.insert(format!("fdb {} dst {} dev {device} {state}", text(&fdb, "mac"), text(&fdb, "dst")));
        }
        for neigh in list_json(lab, target, "ip", &["neigh", "show", "dev", &device]) {
            let (state, protocol) = (&neigh["state"], text(&neigh, "protocol"));
            let state = if *state == serde_json::json!(["PERMANENT"]) { "permanent".to_owned() } else { state.to_string() };
            all.insert(format!(
                "neigh {} lladdr {} dev {device} {state} proto {protocol}",
                text(&neigh, "dst"),
                text(&neigh, "lladdr")
            ));
        }
    }
    for nexthop in list_json(lab, target, "ip", &["nexthop", "show", "proto", ROUTE_PROTOCOL]) {
        all.insert(format!(
            "nexthop via {} dev {} {} proto {ROUTE_PROTOCOL}",
            text(&nexthop, "gateway"),
            text(&nexthop, "dev"),
            join_words(&nexthop["flags"])
        ));
    }
    for family in ["-4", "-6"] {
        for route in list_json(lab, target, "ip", &[family, "route", "show", "proto", ROUTE_PROTOCOL, "type", "unreachable"]) {
            let metric = number(&route, "metric");
            all.insert(format!("route unreachable {} metric {metric} proto {ROUTE_PROTOCOL}", text(&route, "dst")));
        }
        for route in list_json(lab, target, "ip", &[family, "route", "show", "proto", ROUTE_PROTOCOL, "type", "unicast"]) {
            let route_kind = if route.get("nhid").is_some() { "nexthop" } else { "classic" };
            all.insert(format!(
                "route {} via {} dev {} {} {route_kind} proto {ROUTE_PROTOCOL}",
                text(&route, "dst"),
                text(&route, "gateway"),
                text(&route, "dev"),
                join_words(&route["flags"])
            ));
        }
    }
    all.extend(rules::actual_ruleset(lab, target));
    for route in list_json(lab, target, "ip", &["-6", "route", "show", "table", "all", "type", "local", "proto", ROUTE_PROTOCOL])
    {
        all.insert(format!("route local {} dev {} proto {ROUTE_PROTOCOL}", text(&route, "dst"), text(&route, "dev")));
    }
    let exists = |name: &str| link(lab, target, name).is_some();
    for path in expected_sysctls(lab).into_iter().map(|(path, _)| path) {
        if path.split('/').nth(2).is_none_or(|name| name == "all" || exists(name)) {
            all.insert(format!("sysctl {path} {}", sysctl(lab, target, &path)));
        }
    }
    all
}

/// A host's expected state according to section 5 of the design, from leases, network and underlay. Same lines as
/// [`actual_state`].
pub async fn expected_state(host: &Host<'_>, classic: bool) -> BTreeSet<String> {
    let lab = host.lab();
    let Subnets { subnets } = host.client().subnets().await.expect_ok("the subnets");
    let own = subnets.iter().find(|entry| entry.own).expect_ok("this host's own lease");
    let peers: Vec<&SubnetEntry> = subnets.iter().filter(|entry| !entry.own && entry.refused.is_none()).collect();
    let underlay_mtu = link(lab, host.name(), "eth0").map(|l| number(&l, "mtu")).expect_ok("eth0");
    let subnet = own.subnet.expect_ok("the own subnet");
    let (vni, port) = (vni(lab), port(lab));
    let mut all = BTreeSet::new();
    let mut smallest = u64::MAX;
    for (family, range) in subnet.iter() {
        let (device, overhead, host_length) = match family {
            Family::V4 => (format!("ovx.{vni}"), 50, 32),
            Family::V6 => (format!("ovx6.{vni}"), 70, 128),
        };
        let mtu = underlay_mtu - overhead;
        smallest = smallest.min(mtu);
        let local = own.public_ip.get(family).expect_ok("the own address");
        let mac = own.vtep.get(family).expect_ok("the own MAC");
        all.insert(format!(
            "link {device} vxlan {vni} local {local} dev eth0 port {port} learning false mac {mac} mtu {mtu} up alias overlayd"
        ));
        all.insert(format!("address {}/{host_length} dev {device}", range.base()));
        all.insert(format!("address {}/{} dev ovb.{vni}", subnet.gateway(family).expect_ok("a gateway"), range.length()));
        for peer in &peers {
            let Some(base) = peer.subnet.and_then(|s| s.get(family)) else { continue };
            let (dst, mac) = (peer.public_ip.get(family).expect_ok("its address"), peer.vtep.get(family).expect_ok("its MAC"));
            let gateway = base.base();
            all.insert(format!("fdb {mac} dst {dst} dev {device} permanent self"));
            all.insert(format!("neigh {gateway} lladdr {mac} dev {device} permanent proto {ROUTE_PROTOCOL}"));
            if classic {
                all.insert(format!("route {base} via {gateway} dev {device} onlink classic proto {ROUTE_PROTOCOL}"));
            } else {
                all.insert(format!("nexthop via {gateway} dev {device} onlink proto {ROUTE_PROTOCOL}"));
                all.insert(format!("route {base} via {gateway} dev {device} onlink nexthop proto {ROUTE_PROTOCOL}"));
            }
        }
    }
    all.insert(format!("link ovb.{vni} bridge mtu {smallest} up alias overlayd"));
    let endpoints = host.client().endpoints().await.expect_ok("the endpoints").endpoints;
    let published = endpoints.iter().any(|endpoint| !endpoint.published.is_empty());
    for endpoint in &endpoints {
        let Some(port) = &endpoint.port else { continue };
        let hairpin = !endpoint.published.is_empty();
        all.insert(format!("port {} master ovb.{vni} mtu {smallest} up hairpin {hairpin} alias overlayd", port.host_interface));
    }
    if published && subnet.get(Family::V6).is_some() {
        all.insert(format!("route local ::1 dev ovb.{vni} proto {ROUTE_PROTOCOL}"));
    }
    // The network configuration in force, because a test may have replaced the lab's.
    let pools = host.client().status().await.expect_ok("the status").network.expect_ok("the network").pools;
    // The lab's hosts use the machine's resolvers, at any address.
    let resolvers = resolvers();
    for range in pools.iter().flat_map(|(_, pool)| pool.leasable_without(&resolvers)) {
        all.insert(format!("route unreachable {range} metric {} proto {ROUTE_PROTOCOL}", u32::MAX));
    }
    let local = own.public_ip;
    all.extend(ExpectedRuleset { vni, port, pools, subnet, local, peers: &peers, endpoints: &endpoints }.lines());
    for (path, value) in expected_sysctls(lab) {
        let family = if path.starts_with("ipv4/") { Family::V4 } else { Family::V6 };
        let value = match value {
            _ if path.ends_with("route_localnet") => u8::from(published).to_string(),
            Some(value) => value.to_owned(),
            None if subnet.get(family).is_some() => "1".to_owned(),
            None => sysctl(lab, host.name(), &path),
        };
        all.insert(format!("sysctl {path} {value}"));
    }
    all
}

/// The machine's resolvers.
fn resolvers() -> BTreeSet<IpAddr> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let text = read("/etc/resolv.conf") + "\n" + &read("/run/systemd/resolve/resolv.conf");
    text.lines().filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse().ok()).collect()
}

/// The sysctls that the agent sets. `None` as a value is forwarding of a family that the network may not have.
fn expected_sysctls(lab: &Lab) -> Vec<(String, Option<&'static str>)> {
    let (vni, networks) = (vni(lab), lab.layout().networks);
    let (bridge, v4, v6) = (format!("ovb.{vni}"), format!("ovx.{vni}"), format!("ovx6.{vni}"));
    let mut all = vec![("ipv4/ip_forward".to_owned(), None), ("ipv6/conf/all/forwarding".to_owned(), None)];
    let mut of = |protocol: &str, device: &str, settings: &[(&str, &'static str)]| {
        all.extend(settings.iter().map(|(name, value)| (format!("{protocol}/conf/{device}/{name}"), Some(*value))));
    };
    of("ipv6", &bridge, &[("accept_ra", "0")]);
    if networks.get(Family::V4).is_some() {
        for device in [&bridge, &v4] {
            of("ipv4", device, &[("forwarding", "1"), ("rp_filter", "2"), ("accept_redirects", "0")]);
        }
        let alone = ["arp_filter", "arp_ignore", "proxy_arp", "proxy_arp_pvlan", "route_localnet"];
        of("ipv4", &bridge, &alone.map(|name| (name, "0")));
        of("ipv4", "eth0", &[("forwarding", "1")]);
        of("ipv6", &v4, &[("accept_ra", "0")]);
    }
    if networks.get(Family::V6).is_some() {
        of("ipv6", &v6, &[("accept_ra", "0")]);
        for device in [&bridge, &v6] {
            of("ipv6", device, &[("disable_ipv6", "0"), ("forwarding", "1")]);
        }
    }
    all
}

/// The lines of only one of the two sets, for messages; empty if they are equal.
pub fn difference(actual: &BTreeSet<String>, expected: &BTreeSet<String>) -> String {
    let missing = expected.difference(actual).map(|line| format!("  missing: {line}\n"));
    missing.chain(actual.difference(expected).map(|line| format!("  unexpected: {line}\n"))).collect()
}

/// The VNI in the lab's configuration.
pub fn vni(lab: &Lab) -> u64 {
    backend(lab, "VNI", 1)
}

/// The UDP port in the lab's configuration.
pub fn port(lab: &Lab) -> u64 {
    backend(lab, "Port", 8472)
}

fn backend(lab: &Lab, field: &str, default: u64) -> u64 {
    let config: Value = serde_json::from_str(&lab.layout().config).expect_ok("the lab's configuration");
    config["Backend"][field].as_u64().unwrap_or(default)
}

/// Whether a link is one of the agent's devices, without the bridge ports.
pub fn is_agent_device(name: &str) -> bool {
    ["ovx.", "ovx6.", "ovb.", "ovt.", "ovr."].iter().any(|prefix| name.starts_with(prefix))
}

fn link_line(link: &Value) -> Option<String> {
    let name = text(link, "ifname");
    if name.starts_with(PORT_PREFIX) {
        let (master, hairpin) = (text(link, "master"), &link["linkinfo"]["info_slave_data"]["hairpin"]);
        let hairpin = hairpin.as_bool().unwrap_or_default();
        let state = if is_up(link) { "up" } else { "down" };
        let alias = text(link, "ifalias");
        return Some(format!("port {name} master {master} mtu {} {state} hairpin {hairpin} alias {alias}", number(link, "mtu")));
    }
    if !is_agent_device(&name) {
        return None;
    }
    let data = &link["linkinfo"]["info_data"];
    let state = if is_up(link) { "up" } else { "down" };
    let end = format!("mtu {} {state} alias {}", number(link, "mtu"), text(link, "ifalias"));
    Some(match link["linkinfo"]["info_kind"].as_str() {
        Some("vxlan") => {
            let local = data["local"].as_str().or(data["local6"].as_str()).unwrap_or_default();
            // The index of an interface in another namespace has no name here, or that of a device of ours.
            let is_elsewhere = link["link_netnsid"].is_u64() || link["link_netns"].is_string();
            let lower = if is_elsewhere { "of another namespace".to_owned() } else { text(data, "link") };
            format!(
                "link {name} vxlan {} local {local} dev {lower} port {} learning {} mac {} {end}",
                number(data, "id"),
                number(data, "port"),
                data["learning"],
                text(link, "address")
            )
        }
        kind => format!("link {name} {} {end}", kind.unwrap_or("without kind")),
    })
}

fn is_up(link: &Value) -> bool {
    link["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "UP"))
}

/// The text of a field; empty if missing.
pub fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_default().to_owned()
}

/// The number of a field; 0 if missing.
pub fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or_default()
}

fn join_words(list: &Value) -> String {
    let all: Vec<&str> = list.as_array().map(Vec::as_slice).unwrap_or_default().iter().filter_map(Value::as_str).collect();
    all.join(" ")
}
