//! Foreign rules that drop the tunnel or forwarding. The overlay's packets are evaluated against the rules of every table except
//! the agent's, as in the kernel; a finding names the rule that drops one.
//!
//! `rules` parses the output of `nft list ruleset`: the rules of nftables, and those that `iptables-nft`, firewalld, ufw and
//! Docker write through it. `iptables-restore-translate`, of the same package, translates the rules of the older
//! `iptables-legacy`.

mod packet;
mod rules;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use overlay_agent::model::api::{PeerEntry, Status, UnderlayStatus};
use overlay_agent::model::{Cidr, Device, Family, Mac};

use super::facts::{ToolError, report_unchecked, run_tool};
use super::{Facts, Findings};

use packet::{Hook, Packet};
use rules::{Dropped, Ruleset};

/// The agent's tables.
const OWN_TABLE: &str = "overlayd";
/// Container port of the evaluated packets: no rule is likely to match it.
const ANY_PORT: u16 = 49_771;
/// Maximum number of peers whose packets are evaluated: rules rarely match single peers.
const MAX_PEERS: usize = 8;

pub(super) async fn check(facts: &Facts, findings: &mut Findings) {
    let mut all = Vec::new();
    match run_tool(&["nft", "-a", "list", "ruleset"]).await {
        Ok(text) => all.push(Ruleset::parse(&text)),
        Err(error) => report_unchecked(findings, "the rules of nftables", &error),
    }
    for family in [Family::V4, Family::V6] {
        match legacy_ruleset(family).await {
            Ok(rules) => all.extend(rules),
            Err(error) => report_unchecked(findings, &format!("the legacy {family} rules of iptables"), &error),
        }
    }
    for (what, hurts, packet) in packets(facts) {
        let dropped: Vec<Dropped> = all.iter().filter_map(|rules| rules.verdict(&packet, OWN_TABLE)).collect();
        // One finding per table, and one for the same rule with several peers.
        for drop in dropped {
            let summary =
                format!("{what} {}", if drop.certain { "are dropped by a firewall" } else { "may be dropped by a firewall" });
            let evidence = vec![drop.place.clone(), drop.rule.clone(), format!("for example: {packet}")];
            if findings.contains(&summary, &evidence[1]) {
                continue;
            }
            let remedy = remedy(&drop, &packet);
            match (drop.certain, hurts) {
                (true, true) => findings.error(summary, evidence, remedy),
                (true, false) => findings.warning(summary, evidence, remedy),
                (false, _) => findings.info(summary, evidence, remedy),
            }
        }
    }
}

impl Findings {
    /// Whether an equal finding exists.
    fn contains(&self, summary: &str, rule: &str) -> bool {
        self.items.iter().any(|finding| finding.summary == summary && finding.evidence.iter().any(|line| line == rule))
    }
}

/// Reads the rules of `iptables-legacy`, if there are any. The program itself loads the kernel's module, so it only runs if the
/// module is loaded.
async fn legacy_ruleset(family: Family) -> Result<Option<Ruleset>, ToolError> {
    let (names, program) = match family {
        Family::V4 => ("/proc/net/ip_tables_names", "iptables"),
        Family::V6 => ("/proc/net/ip6_tables_names", "ip6tables"),
    };
    if std::fs::read_to_string(names).unwrap_or_default().trim().is_empty() {
        return Ok(None);
    }
    let script = format!("{program}-legacy-save | {program}-restore-translate -f /dev/stdin");
    let translated = run_tool(&["sh", "-ec", &script]).await?;
    Ok(Some(Ruleset::parse_commands(&translated)))
}

/// Lists sample packets of the overlay: description, whether their loss breaks the overlay, and the packet.
fn packets(facts: &Facts) -> Vec<(String, bool, Packet)> {
    let mut all = Vec::new();
    let (Some(status), Some(port)) = (facts.status(), facts.port()) else { return all };
    let Some(underlay) = &status.underlay else { return all };
    let bridge = facts.network.as_ref().and_then(|network| network.bridge.as_ref()).map(|bridge| bridge.device.interface.clone());
    let outside = |family: Family| -> IpAddr {
        match family {
            // Documentation ranges (RFC 5737, RFC 3849).
            Family::V4 => IpAddr::from([203, 0, 113, 1]),
            Family::V6 => IpAddr::from([0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1]),
        }
    };
    let stand_ins = if facts.peers.is_empty() { sample_peers(status, underlay) } else { Vec::new() };
    let hurts = stand_ins.is_empty();
    for peer in facts.peers.iter().chain(&stand_ins).take(MAX_PEERS) {
        let underlay_family = Family::of(peer.public_ip);
        let Some(own) = underlay.public_ip.get(underlay_family).copied() else { continue };
        let name = underlay.interface.as_str();
        let tunnel = format!("the tunnel's packets (UDP port {port})");
        let (there, here) = (peer.public_ip, own);
        all.push((format!("{tunnel} from peers"), hurts, Packet::udp(Hook::Input, (name, ""), (there, here), (ANY_PORT, port))));
        all.push((format!("{tunnel} to peers"), hurts, Packet::udp(Hook::Output, ("", name), (here, there), (ANY_PORT, port))));
        let family = peer.subnet.family();
        let subnet = status.lease.as_ref().and_then(|lease| lease.subnet.get(family));
        let (Some(subnet), Some(bridge)) = (subnet, bridge.as_deref()) else { continue };
        let (Some(ours), Some(theirs)) = (subnet.nth(2), peer.subnet.nth(2)) else { continue };
        let ports = (ANY_PORT, ANY_PORT);
        for (what, interfaces, addresses) in [
            ("containers' packets to other hosts", (bridge, peer.device.as_str()), (ours, theirs)),
            ("containers' packets from other hosts", (peer.device.as_str(), bridge), (theirs, ours)),
        ] {
            all.push((what.to_owned(), hurts, Packet::tcp(Hook::Forward, interfaces, addresses, ports)));
        }
        if underlay.public_ip.get(family).is_some() {
            let packet = Packet::tcp(Hook::Forward, (bridge, name), (ours, outside(family)), ports);
            all.push(("containers' packets to the world".to_owned(), false, packet));
        }
    }
    all
}

/// Sample peers for a host without peers: neighbours on the underlay with a subnet of the same network. A drop is only a warning,
/// because a rule may accept the real peers by address.
fn sample_peers(status: &Status, underlay: &UnderlayStatus) -> Vec<PeerEntry> {
    let (Some(network), Some(lease)) = (&status.network, &status.lease) else { return Vec::new() };
    let one = |(family, own): (Family, Cidr)| {
        let public_ip = match underlay.public_ip.get(family)? {
            IpAddr::V4(own) => IpAddr::from((u32::from(*own) ^ 1).to_be_bytes()),
            IpAddr::V6(own) => IpAddr::from((u128::from(*own) ^ 1).to_be_bytes()),
        };
        let pool = network.pools.get(family)?;
        Some(PeerEntry {
            subnet: if pool.min == own { pool.max } else { pool.min },
            host: None,
            public_ip,
            vtep: Mac([2, 0, 0, 0, 0, 1]),
            device: Device::vxlan(family, network.vxlan.vni).name(),
            nexthop_id: None,
            state: String::new(),
            last_repair: None,
        })
    };
    lease.subnet.iter().filter_map(one).collect()
}

/// Remedy, in the syntax of the tool that wrote the rule.
fn remedy(drop: &Dropped, packet: &Packet) -> String {
    let port = packet.destination_port;
    let tunnel = packet.hook != Hook::Forward;
    let bridge = if packet.input.starts_with("ovb.") { &packet.input } else { &packet.output };
    if drop.place.contains("firewalld") {
        return match tunnel {
            true => format!("firewall-cmd --permanent --add-port={port}/udp && firewall-cmd --reload"),
            false => {
                let [one, other] = [&packet.input, &packet.output];
                format!(
                    "firewall-cmd --permanent --zone=trusted --add-interface={one} --add-interface={other} && firewall-cmd --reload"
                )
            }
        };
    }
    if drop.place.contains("chain ufw") || drop.path.iter().any(|chain| chain.starts_with("ufw")) {
        return match tunnel {
            true => format!("ufw allow {port}/udp"),
            false => format!("ufw route allow in on {} out on {}", packet.input, packet.output),
        };
    }
    if drop.path.iter().any(|chain| chain.starts_with("DOCKER")) {
        return "Docker's rules do it; what is accepted in its chain DOCKER-USER goes before them: iptables -I DOCKER-USER -i BRIDGE -j ACCEPT; \
                iptables -I DOCKER-USER -o BRIDGE -j ACCEPT"
            .replace("BRIDGE", bridge);
    }
    let program = match (packet.family(), drop.legacy) {
        (Family::V4, false) => "iptables",
        (Family::V4, true) => "iptables-legacy",
        (Family::V6, false) => "ip6tables",
        (Family::V6, true) => "ip6tables-legacy",
    };
    if drop.is_iptables() {
        return match packet.hook {
            Hook::Forward if drop.is_policy() && !drop.legacy => format!(
                "the agent accepts it there while it is ready: see the check `agent`. By hand: {program} -I FORWARD -i {bridge} -j ACCEPT; \
                 {program} -I FORWARD -o {bridge} -j ACCEPT"
            ),
            Hook::Forward if drop.is_policy() => format!(
                "{program} -I FORWARD -i {bridge} -j ACCEPT; {program} -I FORWARD -o {bridge} -j ACCEPT; better, go over to nftables, where \
                 the agent sees to it: update-alternatives --config iptables"
            ),
            Hook::Forward => format!("{program} -I FORWARD -i {} -o {} -j ACCEPT, before that rule", packet.input, packet.output),
            Hook::Input => {
                format!("{program} -I INPUT -p udp --dport {port} -j ACCEPT, before that rule; and keep it over restarts")
            }
            Hook::Output => {
                format!("{program} -I OUTPUT -p udp --dport {port} -j ACCEPT, before that rule; and keep it over restarts")
            }
        };
    }
    let chain = &drop.chain;
    let accept = match packet.hook {
        Hook::Forward => format!("iifname \"{}\" oifname \"{}\" accept", packet.input, packet.output),
        Hook::Input | Hook::Output => format!("udp dport {port} accept"),
    };
    format!("nft insert rule {chain} {accept}; and the same in the file that the rules come from (/etc/nftables.conf)")
}
