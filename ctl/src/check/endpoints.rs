//! The containers of this host: agent, state directory and kernel must agree.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::Path;

use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use overlay_agent::endpoint::{StoredEndpoint, read_stored};
use overlay_agent::kernel::netns::{NETNS_RUN_DIR, Netns};
use overlay_agent::model::Endpoint;
use overlay_agent::model::api::NetworkView;
use overlay_agent::model::device::MAX_BRIDGE_PORTS;
use overlay_agent::state::StateError;

use super::findings::FULL_WARNING_PERCENT;
use super::{Facts, Findings};

pub(super) fn check(facts: &Facts, findings: &mut Findings) {
    let stored = stored_endpoints(facts, findings);
    if let Some(network) = &facts.network {
        endpoint_states(network, findings);
        ports(network, findings);
        if let Some(stored) = &stored {
            compare(network, stored, findings);
        }
        leaked_namespaces(facts, network, findings);
    } else if let Some(stored) = &stored {
        for record in stored {
            container_addresses(&record.endpoint, findings);
        }
    }
}

/// Reads the state directory; `None` if it is another agent's or unreadable.
fn stored_endpoints(facts: &Facts, findings: &mut Findings) -> Option<Vec<StoredEndpoint>> {
    match read_stored(&facts.settings.state_dir) {
        // None: no container was ever attached, or the agent has another directory.
        Ok(stored) => stored,
        Err(StateError::File(error)) if error.source.kind() != ErrorKind::InvalidData => {
            let evidence = vec![error.to_string()];
            findings.info("not checked: the state directory", evidence, "run this as root, with the agent's --state-dir");
            None
        }
        Err(error) => {
            findings.error(
                "the table of containers in the state directory cannot be read",
                vec![error.to_string()],
                "restart the agent: it moves a torn file aside and logs that; then attach the containers again",
            );
            None
        }
    }
}

/// Reports endpoints whose state the agent finds incorrect.
fn endpoint_states(network: &NetworkView, findings: &mut Findings) {
    for view in network.endpoints.iter().filter(|view| view.state != "in place") {
        let name = &view.endpoint.name;
        let netns_missing = !view.endpoint.netns.exists();
        findings.warning(
            format!("the container {name} is in an incorrect state"),
            vec![view.state.clone(), format!("namespace {}", view.endpoint.netns.display())],
            match netns_missing {
                true => format!("its namespace is gone: overlayctl detach {name} releases its addresses (the agent does so itself in its second audit)"),
                false => format!("overlayctl detach {name}, then attach it again"),
            },
        );
    }
}

/// Reports ports of the agent's bridge without an endpoint.
fn ports(network: &NetworkView, findings: &mut Findings) {
    if let Some(bridge) = &network.bridge {
        free_bridge_ports(bridge.ports.len(), findings);
    }
    let bridge = network.bridge.iter();
    let unowned = bridge.flat_map(|bridge| &bridge.ports).filter(|port| port.endpoint.is_none());
    let (own_ports, foreign): (Vec<_>, Vec<_>) = unowned.partition(|port| port.interface.starts_with("ove"));
    for port in own_ports {
        findings.warning(
            format!("{} is a port of the bridge, but no container's", port.interface),
            vec![format!("port {} of the bridge, {}", port.number, port.state)],
            format!("it leaked: ip link delete {}", port.interface),
        );
    }
    for port in foreign {
        findings.info(
            format!("{} is a port of the bridge that the agent did not create", port.interface),
            vec![format!("port {} of the bridge, {}", port.number, port.state)],
            "none, if another runtime (Docker, a virtual machine) attached it on purpose",
        );
    }
}

/// Reports a bridge that is nearly out of ports.
fn free_bridge_ports(used: usize, findings: &mut Findings) {
    if used * 100 >= MAX_BRIDGE_PORTS * FULL_WARNING_PERCENT {
        findings.warning(
            "the bridge is nearly full: the kernel will refuse more containers on this host",
            vec![format!("{used} of the {MAX_BRIDGE_PORTS} ports that the kernel gives a bridge are taken")],
            "attach further containers on other hosts; a SubnetLen of 22 or longer has no more addresses than a bridge has ports",
        );
    }
}

/// Compares the agent's table with its file.
fn compare(network: &NetworkView, stored: &[StoredEndpoint], findings: &mut Findings) {
    let file: BTreeMap<String, &StoredEndpoint> =
        stored.iter().map(|record| (record.endpoint.name.to_string(), record)).collect();
    let agent: BTreeMap<String, &Endpoint> =
        network.endpoints.iter().map(|view| (view.endpoint.name.to_string(), &view.endpoint)).collect();
    let in_transition: Vec<String> =
        file.iter().filter(|(name, record)| !record.attached && !agent.contains_key(*name)).map(|(n, _)| n.clone()).collect();
    let is_different = |name: &&String| match (file.get(*name), agent.get(*name)) {
        (Some(record), Some(endpoint)) => record.endpoint.addresses() != endpoint.addresses(),
        (Some(record), None) => record.attached,
        (None, _) => true,
    };
    let names: BTreeSet<&String> = file.keys().chain(agent.keys()).collect();
    let differing: Vec<String> = names.into_iter().filter(is_different).cloned().collect();
    if !differing.is_empty() {
        findings.warning(
            "the agent and its state directory do not agree on containers",
            vec![differing.join(", ")],
            "the state directory was modified while the agent ran, or --state-dir names another agent's: systemctl restart overlayd reads it again",
        );
    }
    if !in_transition.is_empty() {
        let remedy = "wait some seconds and check again; the agent's next audit clears the rest";
        findings.info("containers are being attached or detached", vec![in_transition.join(", ")], remedy);
    }
}

/// Checks that the container's interface has its addresses.
fn container_addresses(endpoint: &Endpoint, findings: &mut Findings) {
    let Some(port) = &endpoint.port else { return };
    let Ok(netns) = Netns::open(&endpoint.netns) else {
        return findings.warning(
            format!("the namespace of the container {} is gone", endpoint.name),
            vec![endpoint.netns.display().to_string()],
            format!("overlayctl detach {} releases its addresses", endpoint.name),
        );
    };
    let Ok(Ok(all)) = netns.run(|| getifaddrs().map(Iterator::collect::<Vec<InterfaceAddress>>)) else { return };
    let interface_exists = all.iter().any(|one| one.interface_name == port.interface);
    let present: Vec<IpAddr> =
        all.iter().filter(|one| one.interface_name == port.interface).filter_map(interface_address).collect();
    let missing: Vec<String> = port.addresses.iter().filter(|(_, a)| !present.contains(a)).map(|(_, a)| a.to_string()).collect();
    if !missing.is_empty() {
        let state = if interface_exists { "exists without" } else { "is missing, and with it" };
        findings.warning(
            format!("the container {} lacks its addresses", endpoint.name),
            vec![format!("{} in {} {state} {}", port.interface, endpoint.netns.display(), missing.join(", "))],
            format!("a process inside removed them: overlayctl detach {}, then attach it again", endpoint.name),
        );
    }
}

fn interface_address(entry: &InterfaceAddress) -> Option<IpAddr> {
    let address = entry.address.as_ref()?;
    let v4 = address.as_sockaddr_in().map(|a| IpAddr::from(a.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::from(a.ip())))
}

/// Reports namespaces that `overlayctl attach` created, by the marker files in the directory of the socket, and that no container uses.
fn leaked_namespaces(facts: &Facts, network: &NetworkView, findings: &mut Findings) {
    let Some(markers) = facts.settings.client.socket().parent().and_then(|run| std::fs::read_dir(run.join("netns")).ok()) else {
        return;
    };
    let used: BTreeSet<&OsStr> = network.endpoints.iter().filter_map(|view| view.endpoint.netns.file_name()).collect();
    let is_leaked = |name: &OsString| Path::new(NETNS_RUN_DIR).join(name).exists() && !used.contains(name.as_os_str());
    let mut leaked: Vec<OsString> = markers.flatten().map(|marker| marker.file_name()).filter(is_leaked).collect();
    leaked.sort();
    for name in leaked {
        let name = name.to_string_lossy();
        findings.warning(
            format!("the namespace {name} belongs to a container that no longer exists"),
            vec![format!("{NETNS_RUN_DIR}/{name}")],
            format!("it leaked: ip netns delete {name}"),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearly_full_bridge_is_reported() {
        let evidence = |used| {
            let mut findings = Findings::for_check("endpoints");
            free_bridge_ports(used, &mut findings);
            findings.into_vec().into_iter().flat_map(|finding| finding.evidence).collect::<Vec<_>>()
        };
        assert_eq!(evidence(920), Vec::<String>::new());
        assert_eq!(evidence(921), ["921 of the 1023 ports that the kernel gives a bridge are taken"]);
    }
}
