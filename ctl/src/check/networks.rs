//! The namespaces of this host's isolated networks: devices, transit, rules, sysctls, and ways between the networks.

use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::trace::Link;
use overlay_agent::model::{Device, Family, Role};
use overlay_agent::plan::ruleset::TABLE;
use overlay_agent::plan::sysctls;

use super::{Facts, Findings};
use crate::trace::TraceError;
use crate::trace::namespace_view::{NamespaceView, NetworkNamespace, link_fault};
use crate::verify::{Verdict, verify};

/// Remedy for what the agent keeps in place.
const REPAIR_HINT: &str = "a running agent restores it: see the check `agent`";

pub(super) fn check(facts: &Facts, findings: &mut Findings) {
    if let Err(error) = check_all(facts, findings) {
        findings.info("not checked: the namespaces of isolated networks", vec![error.to_string()], "run this as root");
    }
}

fn check_all(facts: &Facts, findings: &mut Findings) -> Result<(), TraceError> {
    let networks = NamespaceView::of_networks(&Netns::current()?)?;
    if networks.is_empty() {
        return Ok(());
    }
    let host = NamespaceView::host()?;
    for network in &networks {
        let view = NamespaceView::open(network.place.clone(), network.netns.clone())?;
        devices(network, &view, &host, findings);
        rules(network, &view, findings);
        settings(network, &view, findings);
    }
    leftovers(facts, &networks, findings);
    ways(findings)
}

/// Checks the devices of a network, and both ends of its transit.
fn devices(network: &NetworkNamespace, view: &NamespaceView, host: &NamespaceView, findings: &mut Findings) {
    let NetworkNamespace { network: name, place, vni, .. } = network;
    let is_tunnel = |link: &&Link| link.device().is_some_and(|device| matches!(device.role, Role::Vxlan(_)));
    let own = view.links.iter().filter(|link| link.device().is_some());
    let transit = Device::transit(*vni).name();
    let other_end = host.links.iter().filter(|link| link.name == transit);
    for (link, place) in own.map(|link| (link, place.as_str())).chain(other_end.map(|link| (link, "the host"))) {
        if let Some(fault) = link_fault(link) {
            findings.error(
                format!("a device of network {name} carries no packets"),
                vec![format!("{place}: {fault}")],
                REPAIR_HINT,
            );
        }
    }
    if !view.links.iter().any(|link| is_tunnel(&link)) {
        let evidence = vec![format!("{place} has no VXLAN device")];
        findings.error(format!("the containers of network {name} reach only their own host"), evidence, REPAIR_HINT);
    }
    let [inside, outside] = [view, host].map(|view| view.links.iter().any(|link| link.name == transit));
    if inside != outside {
        let lacking = if inside { "the host" } else { place };
        let evidence = vec![format!("{lacking} has no {transit}")];
        findings.error(format!("the transit of network {name} has lost its other end"), evidence, REPAIR_HINT);
    }
}

/// Checks that the network's tables exist.
fn rules(network: &NetworkNamespace, view: &NamespaceView, findings: &mut Findings) {
    let NetworkNamespace { network: name, place, .. } = network;
    let missing: Vec<String> = ["inet", "bridge"]
        .into_iter()
        .filter(|family| !view.ruleset.has_table(family, TABLE))
        .map(|family| format!("{place} has no table {family} {TABLE}"))
        .collect();
    if !missing.is_empty() {
        findings.error(
            format!("rules of network {name} are missing: its containers can use each other's addresses"),
            missing,
            REPAIR_HINT,
        );
    }
}

/// Checks forwarding, and the sysctls of the network's devices.
fn settings(network: &NetworkNamespace, view: &NamespaceView, findings: &mut Findings) {
    let NetworkNamespace { network: name, place, .. } = network;
    let devices: Vec<Device> = view.links.iter().filter_map(Link::device).collect();
    for family in Family::ALL {
        let has_address = view.addresses.iter().any(|address| {
            let is_local = address.is_loopback() || matches!(address, std::net::IpAddr::V6(a) if a.is_unicast_link_local());
            Family::of(*address) == family && !is_local
        });
        if !has_address {
            continue;
        }
        let mut wanted: Vec<(String, &str)> = vec![(sysctls::forwarding(family).to_owned(), "1")];
        wanted.extend(
            devices.iter().filter(|device| device.carries(family)).flat_map(|device| sysctls::device_settings(*device, family)),
        );
        let differs = |(path, value): (String, &str)| {
            let found = view.sysctl(&path).filter(|found| found != value)?;
            Some(format!("{place}: net.{path} = {found}, not {value}"))
        };
        let evidence: Vec<String> = wanted.into_iter().filter_map(differs).collect();
        if !evidence.is_empty() {
            findings.error(format!("settings of network {name} block its {family} traffic"), evidence, REPAIR_HINT);
        }
    }
}

/// Reports namespaces of networks for which the agent has no state: it has left them, or never joined them.
fn leftovers(facts: &Facts, networks: &[NetworkNamespace], findings: &mut Findings) {
    let known = facts.settings.state_dir.join("networks");
    // Another agent's state directory, or none, says nothing about these networks.
    if !known.is_dir() {
        return;
    }
    for NetworkNamespace { network, place, .. } in networks.iter().filter(|network| !known.join(&network.network).exists()) {
        findings.warning(
            format!("the namespace {place} belongs to no network of the agent"),
            vec![format!("{} does not exist", known.join(network).display())],
            format!("if no container uses it (overlayctl endpoints), delete it: ip netns delete {place}"),
        );
    }
}

/// Reports ways between networks that are not by design.
fn ways(findings: &mut Findings) -> Result<(), TraceError> {
    let report = match verify(None) {
        Ok(report) => report,
        Err(error) => {
            findings.info("not checked: ways between isolated networks", vec![error.to_string()], "overlayctl network verify");
            return Ok(());
        }
    };
    for pair in report.pairs {
        let command = format!("overlayctl network verify {} {}", pair.from, pair.to);
        match pair.verdict {
            Verdict::Reachable => {
                let ways = pair.ways.iter().filter(|way| !way.by_design).map(|way| way.by.clone());
                let summary = format!("packets of network {} reach network {}, from which it is isolated", pair.from, pair.to);
                findings.error(summary, ways.collect(), format!("remove what opens the way; {command} names each hop"));
            }
            Verdict::Unknown => {
                let summary = format!("not checked: whether packets of network {} reach network {}", pair.from, pair.to);
                findings.info(summary, pair.unknown, command);
            }
            Verdict::Isolated | Verdict::ByDesign => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::check::Settings;
    use crate::client::Client;
    use crate::etcd::EtcdArgs;
    use crate::trace::tests::TwoNetworks;

    /// The findings about both networks, each with its evidence.
    fn findings(networks: &TwoNetworks, state_dir: &Path) -> Vec<String> {
        let settings = Settings {
            client: Client::new("/nowhere"),
            etcd: EtcdArgs::default(),
            state_dir: state_dir.to_owned(),
            root: "/".into(),
            peers: 0,
        };
        let facts = Facts { settings, status: Err(String::new()), peers: Vec::new(), network: None, links: None };
        let found = networks.inside(|| {
            let mut findings = Findings::for_check("networks");
            check(&facts, &mut findings);
            findings.into_vec()
        });
        let texts = found.into_iter().map(|finding| format!("{}: {}", finding.summary, finding.evidence.join("; ")));
        texts.filter(|text| [&networks.a, &networks.b].iter().any(|name| text.contains(*name))).collect()
    }

    #[test]
    fn each_fault_of_a_network_is_found() {
        let state = tempfile::tempdir().expect("a directory");
        for (what, script, wanted) in [
            ("bridge", "ip -n ov-$A link set ovb.11 down", "carries no packets: ov-"),
            ("VXLAN device", "ip -n ov-$A link del ovx.11", "reach only their own host: ov-"),
            ("rules", "ip netns exec ov-$A nft delete table bridge overlayd", "has no table bridge overlayd"),
            (
                "forwarding",
                "ip netns exec ov-$A sysctl -qw net.ipv6.conf.all.forwarding=0",
                "net.ipv6/conf/all/forwarding = 0, not 1",
            ),
            (
                "way",
                "nft flush ruleset; ip route add 10.2.0.0/16 via 169.254.64.5",
                "is isolated: route 10.2.0.0/16 via 169.254.64.5",
            ),
        ] {
            let networks = TwoNetworks::build();
            let has = |findings: &[String]| findings.iter().any(|text| text.contains(wanted));
            let before = findings(&networks, state.path());
            networks.run(script);
            let after = findings(&networks, state.path());
            assert!(!has(&before) && has(&after), "{what}: {before:#?} {after:#?}");
        }
        let networks = TwoNetworks::build();
        std::fs::create_dir_all(state.path().join("networks").join(&networks.a)).expect("the state of one network");
        let left = findings(&networks, state.path());
        let left: Vec<&String> = left.iter().filter(|text| text.contains("belongs to no network of the agent")).collect();
        assert!(left.len() == 1 && left[0].contains(&networks.b), "{left:#?}");
    }
}
