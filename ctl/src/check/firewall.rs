//! Rules of others that drop the tunnel or forwarding.
//!
//! Probes are the packets that the overlay depends on. [`RulesetSnapshot`] evaluates them against the rules of every table but
//! the agent's: nftables' own, and what `iptables-nft`, firewalld, ufw and Docker write. Tables of `iptables-legacy` are only
//! reported as present.

#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;

use overlay_agent::kernel::trace::packet::{Flow, Interface, Packet, TCP, UDP};
use overlay_agent::kernel::trace::{RuleRef, RulesetSnapshot, legacy_tables};
use overlay_agent::model::api::{PeerEntry, Status, UnderlayStatus};
use overlay_agent::model::{Cidr, Device, Family};
use overlay_agent::plan::OpError;
use overlay_agent::plan::backend::{self, Tunnel};
use overlay_agent::plan::ruleset::{Hook, TABLE};

use super::facts::run_tool;
use super::{Facts, Findings};

/// Destination port of the containers' probes. Rules are unlikely to name it.
const ANY_PORT: u16 = 49_771;
/// Maximum number of peers with probes. Rules rarely name single peers.
const MAX_PEERS: usize = 8;

/// A packet that the overlay depends on, the first of its connection.
#[derive(Debug, Clone)]
struct Probe {
    description: String,
    /// Whether the overlay is broken without it.
    required: bool,
    /// Input, Forward or Output.
    hook: Hook,
    flow: Flow,
    /// Absent for packets of this host.
    input: Option<Interface>,
    /// Absent for packets to this host.
    output: Option<Interface>,
}

/// A rule or policy that drops a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
struct DropVerdict {
    rule: RuleRef,
    /// Whether it depends on no uncertain rule.
    certain: bool,
}

pub(super) async fn check(facts: &Facts, findings: &mut Findings) {
    match evaluate(probes(facts)) {
        Ok(drops) => report_drops(drops, findings).await,
        Err(error) => {
            findings.info("not checked: nftables and what is written through it", vec![error.message], "run this as root");
        }
    }
    for (family, program) in [(Family::V4, "iptables"), (Family::V6, "ip6tables")] {
        let tables = legacy_tables(family).join(" ");
        if !tables.is_empty() {
            findings.info(
                format!("not checked: {program}-legacy has tables, which may drop the tunnel or forwarding"),
                vec![format!("tables of {program}-legacy: {tables}")],
                format!(
                    "{program}-legacy-save lists their rules; to have them checked, move them to nftables: update-alternatives --config {program}"
                ),
            );
        }
    }
}

/// Evaluates the probes. Returns each drop once per description.
fn evaluate(probes: Vec<Probe>) -> Result<Vec<(Probe, DropVerdict)>, OpError> {
    // The agent's own tables drop what is not the overlay's, such as packets of a sample peer.
    let ruleset = RulesetSnapshot::read()?.without_table(TABLE);
    let mut drops: Vec<(Probe, DropVerdict)> = Vec::new();
    for probe in probes {
        let Some(drop) = first_drop(&ruleset, &probe) else { continue };
        if !drops.iter().any(|(other, verdict)| other.description == probe.description && *verdict == drop) {
            drops.push((probe, drop));
        }
    }
    Ok(drops)
}

/// Evaluates the hooks that a probe passes. Returns the first certain drop, else the first uncertain one.
fn first_drop(ruleset: &RulesetSnapshot, probe: &Probe) -> Option<DropVerdict> {
    let hooks: &[Hook] = match probe.hook {
        Hook::Input => &[Hook::Prerouting, Hook::Input],
        Hook::Output => &[Hook::Output, Hook::Postrouting],
        _ => &[Hook::Prerouting, Hook::Forward, Hook::Postrouting],
    };
    let mut uncertain = None;
    // The agent's rules exempt the tunnel from conntrack.
    let mut untracked = probe.hook != Hook::Forward;
    for hook in hooks {
        let packet = Packet {
            input: probe.input.clone(),
            output: probe.output.clone().filter(|_| *hook != Hook::Prerouting),
            destination_is_local: Some(probe.hook == Hook::Input),
            untracked,
            // Any program may set marks, also outside the rules.
            mark: None,
            ..Packet::new(&probe.flow)
        };
        let result = ruleset.evaluate(*hook, false, &packet);
        untracked = result.untracked;
        let certain = result.is_certain_drop();
        let rule = result.dropped.or_else(|| result.possible_drops.into_iter().next());
        match rule.map(|rule| DropVerdict { rule, certain }) {
            Some(drop) if drop.certain => return Some(drop),
            drop => uncertain = uncertain.or(drop),
        }
    }
    uncertain
}

async fn report_drops(drops: Vec<(Probe, DropVerdict)>, findings: &mut Findings) {
    for (probe, drop) in drops {
        let RuleRef { family, table, chain, .. } = &drop.rule;
        let verb = if drop.certain { "are" } else { "may be" };
        let summary = format!("{} {verb} dropped by a firewall", probe.description);
        let chain_text = format!("table {family} {table}, chain {chain}");
        let evidence = vec![chain_text, rule_text(&drop.rule).await, format!("for example: {probe}")];
        let remedy = remedy(&drop.rule, &probe);
        match (drop.certain, probe.required) {
            (true, true) => findings.error(summary, evidence, remedy),
            (true, false) => findings.warning(summary, evidence, remedy),
            (false, _) => findings.info(summary, evidence, remedy),
        }
    }
}

/// Text of a rule as `nft` prints it; its location if `nft` cannot.
async fn rule_text(rule: &RuleRef) -> String {
    let Some(handle) = rule.handle else { return "policy drop".to_owned() };
    let command = rule.list_command();
    let listed = run_tool(&command.split(' ').collect::<Vec<_>>()).await.unwrap_or_default();
    let marker = format!("# handle {handle}");
    let line = listed.lines().find(|line| line.ends_with(&marker));
    line.map_or_else(|| rule.to_string(), |line| line.trim().to_owned())
}

/// The packets that the overlay depends on.
fn probes(facts: &Facts) -> Vec<Probe> {
    let mut all = Vec::new();
    let Some(status) = facts.status() else { return all };
    let Some(underlay) = &status.underlay else { return all };
    let interface = |name: &str| {
        let index = facts.link(name).and_then(|link| link["ifindex"].as_u64()).and_then(|index| u32::try_from(index).ok());
        Some(Interface { index: index.unwrap_or(0), name: name.to_owned() })
    };
    let bridge = facts.network.as_ref().and_then(|network| network.bridge.as_ref());
    let bridge = bridge.and_then(|bridge| interface(&bridge.device.interface));
    let external_address = |family: Family| -> IpAddr {
        match family {
            // Documentation ranges (RFC 5737, RFC 3849).
            Family::V4 => IpAddr::from([203, 0, 113, 1]),
            Family::V6 => IpAddr::from([0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1]),
        }
    };
    let samples = if facts.peers.is_empty() { sample_peers(status, underlay) } else { Vec::new() };
    let required = samples.is_empty();
    let physical = interface(&underlay.interface);
    for peer in facts.peers.iter().chain(&samples).take(MAX_PEERS) {
        let Some(own) = underlay.public_ip.get(Family::of(peer.public_ip)).copied() else { continue };
        if let Some(Tunnel { port, .. }) = facts.tunnel() {
            let tunnel = |source, destination| Flow { source, destination, protocol: UDP, port };
            all.push(Probe {
                description: format!("the tunnel's packets (UDP port {port}) from peers"),
                required,
                hook: Hook::Input,
                flow: tunnel(peer.public_ip, own),
                input: physical.clone(),
                output: None,
            });
            all.push(Probe {
                description: format!("the tunnel's packets (UDP port {port}) to peers"),
                required,
                hook: Hook::Output,
                flow: tunnel(own, peer.public_ip),
                input: None,
                output: physical.clone(),
            });
        }
        let family = peer.subnet.family();
        let subnet = status.lease.as_ref().and_then(|lease| lease.subnet.get(family));
        let (Some(subnet), Some(_)) = (subnet, &bridge) else { continue };
        let (Some(own_container), Some(peer_container)) = (subnet.nth(2), peer.subnet.nth(2)) else { continue };
        let mut forward =
            |description: &str, required, input: &Option<Interface>, output: &Option<Interface>, source, destination| {
                let flow = Flow { source, destination, protocol: TCP, port: ANY_PORT };
                let (input, output) = (input.clone(), output.clone());
                all.push(Probe { description: description.to_owned(), required, hook: Hook::Forward, flow, input, output });
            };
        let device = interface(&peer.device);
        forward("containers' packets to other hosts", required, &bridge, &device, own_container, peer_container);
        forward("containers' packets from other hosts", required, &device, &bridge, peer_container, own_container);
        if underlay.public_ip.get(family).is_some() {
            forward("containers' packets to the world", false, &bridge, &physical, own_container, external_address(family));
        }
    }
    all
}

/// Sample peers for a host without peers: neighbours on the underlay, with a subnet of the network. Drops of their packets are
/// only warnings, because a rule may accept the real peers by address.
fn sample_peers(status: &Status, underlay: &UnderlayStatus) -> Vec<PeerEntry> {
    let (Some(network), Some(lease)) = (&status.network, &status.lease) else { return Vec::new() };
    let sample_peer = |(family, own): (Family, Cidr)| {
        let public_ip = match underlay.public_ip.get(family)? {
            IpAddr::V4(own) => IpAddr::from((u32::from(*own) ^ 1).to_be_bytes()),
            IpAddr::V6(own) => IpAddr::from((u128::from(*own) ^ 1).to_be_bytes()),
        };
        let pool = network.pools.get(family)?;
        Some(PeerEntry {
            subnet: if pool.min == own { pool.max } else { pool.min },
            host: None,
            public_ip,
            vtep: None,
            device: backend::of(network).device(family).map_or_else(|| underlay.interface.clone(), Device::name),
            nexthop_id: None,
            state: String::new(),
            last_repair: None,
        })
    };
    lease.subnet.iter().filter_map(sample_peer).collect()
}

/// Remedy, as a command of the firewall that wrote the rule.
fn remedy(rule: &RuleRef, probe: &Probe) -> String {
    let port = probe.flow.port;
    let [input, output] = [&probe.input, &probe.output].map(|interface| interface.as_ref().map_or("", |i| i.name.as_str()));
    let bridge = if input.starts_with("ovb.") { input } else { output };
    let tunnel = probe.hook != Hook::Forward;
    if rule.table == "firewalld" {
        return if tunnel {
            format!("firewall-cmd --permanent --add-port={port}/udp && firewall-cmd --reload")
        } else {
            format!(
                "firewall-cmd --permanent --zone=trusted --add-interface={input} --add-interface={output} && firewall-cmd --reload"
            )
        };
    }
    let passes_chain = |prefix: &str| rule.path.iter().any(|chain| chain.starts_with(prefix));
    if passes_chain("ufw") {
        return if tunnel { format!("ufw allow {port}/udp") } else { format!("ufw route allow in on {input} out on {output}") };
    }
    if passes_chain("DOCKER") {
        return format!(
            "Docker's rules do it; what is accepted in its chain DOCKER-USER goes before them: iptables -I DOCKER-USER -i {bridge} -j \
             ACCEPT; iptables -I DOCKER-USER -o {bridge} -j ACCEPT"
        );
    }
    let base = rule.path.first().map_or("", String::as_str);
    if is_iptables(rule, base) {
        let program = if rule.family == "ip" { "iptables" } else { "ip6tables" };
        return match probe.hook {
            Hook::Input => {
                format!("{program} -I INPUT -p udp --dport {port} -j ACCEPT, before that rule; and keep it over restarts")
            }
            Hook::Output => {
                format!("{program} -I OUTPUT -p udp --dport {port} -j ACCEPT, before that rule; and keep it over restarts")
            }
            _ if rule.handle.is_none() => format!(
                "the agent accepts it there while it is ready: see the check `agent`. By hand: {program} -I FORWARD -i {bridge} -j ACCEPT; \
                 {program} -I FORWARD -o {bridge} -j ACCEPT"
            ),
            _ => format!("{program} -I FORWARD -i {input} -o {output} -j ACCEPT, before that rule"),
        };
    }
    let accept =
        if tunnel { format!("udp dport {port} accept") } else { format!("iifname \"{input}\" oifname \"{output}\" accept") };
    format!(
        "nft insert rule {} {} {base} {accept}; and the same in the file that the rules come from (/etc/nftables.conf)",
        rule.family, rule.table
    )
}

/// Whether iptables wrote the base chain: its tables have fixed names, and its base chains are in capitals.
fn is_iptables(rule: &RuleRef, base: &str) -> bool {
    ["ip", "ip6"].contains(&rule.family.as_str())
        && ["filter", "mangle", "raw"].contains(&rule.table.as_str())
        && base.chars().all(|c| c.is_ascii_uppercase())
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Flow { source, destination, protocol, port } = self.flow;
        write!(f, "{} from {source} to {destination}", if protocol == UDP { "udp" } else { "tcp" })?;
        if self.hook != Hook::Forward {
            write!(f, " port {port}")?;
        }
        for (word, interface) in [("in by", &self.input), ("out by", &self.output)] {
            if let Some(interface) = interface {
                write!(f, ", {word} {}", interface.name)?;
            }
        }
        Ok(())
    }
}
