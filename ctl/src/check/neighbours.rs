//! Other managers of the agent's devices: NetworkManager, systemd-networkd, and leftovers of a flannel.

use std::path::Path;

use overlay_agent::kernel::trace::RulesetSnapshot;

use super::facts::is_overlay_link;
use super::{Facts, Findings};

pub(super) fn check(facts: &Facts, findings: &mut Findings) {
    managers(facts, findings);
    flannel(facts, findings);
}

/// The agent's links by index and name.
fn overlay_links(facts: &Facts) -> Vec<(u64, String)> {
    let links = facts.links.iter().flatten();
    let pairs = links.filter_map(|link| Some((link["ifindex"].as_u64()?, link["ifname"].as_str()?.to_owned())));
    pairs.filter(|(_, name)| is_overlay_link(name)).collect()
}

/// NetworkManager has one file per device (`/run/NetworkManager/devices/INDEX`, `managed=`), as has systemd-networkd
/// (`/run/systemd/netif/links/INDEX`, `ADMIN_STATE=`).
fn managers(facts: &Facts, findings: &mut Findings) {
    let managed_names = |directory: &str, is_managed: fn(&str) -> bool| -> Vec<String> {
        let directory = facts.path(directory);
        let managed = |index: u64| read(&directory.join(index.to_string())).lines().any(|line| is_managed(line.trim()));
        overlay_links(facts).into_iter().filter(|(index, _)| managed(*index)).map(|(_, name)| name).collect()
    };
    let by_manager = managed_names("/run/NetworkManager/devices", |line| line == "managed=true" || line == "managed=1");
    if !by_manager.is_empty() {
        findings.warning(
            "NetworkManager manages devices of the agent: it may remove their addresses",
            vec![by_manager.join(", ")],
            "write `[keyfile]` and `unmanaged-devices=interface-name:ovx*;interface-name:ovb.*;interface-name:ove*` to \
             /etc/NetworkManager/conf.d/overlayd.conf, then: nmcli general reload",
        );
    }
    let by_networkd = managed_names("/run/systemd/netif/links", |line| {
        line.strip_prefix("ADMIN_STATE=")
            .is_some_and(|state| matches!(state, "configuring" | "configured" | "pending" | "failed"))
    });
    if !by_networkd.is_empty() {
        findings.warning(
            "systemd-networkd manages devices of the agent: it removes unknown routes and addresses",
            vec![by_networkd.join(", ")],
            "write `[Match]`, `Name=ovx* ovb.* ove*`, `[Link]`, `Unmanaged=yes` to /etc/systemd/network/05-overlayd.network, then: \
             networkctl reload",
        );
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn flannel(facts: &Facts, findings: &mut Findings) {
    let port = facts.tunnel().map(|tunnel| tunnel.port);
    let vni = facts.tunnel().and_then(|tunnel| tunnel.vni).map(|vni| u64::from(vni.get()));
    let mut leftovers = Vec::new();
    for name in facts.link_names(|name| name.starts_with("flannel") || name == "cni0") {
        let info = facts.link(&name).map(|link| &link["linkinfo"]["info_data"]);
        let matches_field =
            |field: &str, wanted: Option<u64>| wanted.is_some() && info.and_then(|info| info[field].as_u64()) == wanted;
        if matches_field("id", vni) && matches_field("port", port.map(u64::from)) {
            findings.error(
                format!("flannel's {name} has the overlay's VNI and port: the kernel refuses a second such device"),
                vec![format!("ip -d link show {name}")],
                format!("stop flanneld on this host, then: ip link delete {name}"),
            );
        } else {
            leftovers.push(format!("link {name}"));
        }
    }
    let environment = facts.path("/run/flannel/subnet.env");
    if environment.exists() {
        leftovers.push(format!("{}: {}", environment.display(), read(&environment).lines().collect::<Vec<_>>().join(" ")));
    }
    // The firewall check reports a failure.
    if let Ok(ruleset) = RulesetSnapshot::read() {
        leftovers.extend(ruleset.chain_names().filter(|name| name.starts_with("FLANNEL")).map(|name| format!("chain {name}")));
    }
    if !leftovers.is_empty() {
        findings.warning(
            "a former flannel on this host left objects behind",
            leftovers,
            "after flanneld is stopped and its containers are moved: ip link delete flannel.1; ip link delete cni0; rm -r /run/flannel; \
             iptables -t nat -F FLANNEL-POSTRTG; iptables -F FLANNEL-FWD",
        );
    }
}
