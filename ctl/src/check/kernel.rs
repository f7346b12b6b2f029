//! The kernel: tries each feature in a temporary network namespace; reads sysctls and limits.

use overlay_agent::model::{Device, Family};
use overlay_agent::plan::sysctls;

use super::facts::{ToolError, read_net_stat, report_unchecked, run_tool, sysctl};
use super::findings::FULL_WARNING_PERCENT;
use super::{Facts, Findings};

/// A kernel feature: name, commands that need it, and whether the overlay requires it.
struct Feature {
    name: &'static str,
    script: &'static str,
    required: bool,
    remedy: &'static str,
}

const FEATURES: [Feature; 6] = [
    Feature {
        name: "VXLAN devices",
        script: "ip link add name x0 type vxlan id 1 dstport 8472 nolearning local 192.0.2.1",
        required: true,
        remedy: "modprobe vxlan, or a kernel with CONFIG_VXLAN",
    },
    Feature {
        name: "bridges",
        script: "ip link add name b0 type bridge",
        required: true,
        remedy: "modprobe bridge, or a kernel with CONFIG_BRIDGE",
    },
    Feature {
        name: "veth pairs",
        script: "ip link add name v0 type veth peer name v1",
        required: true,
        remedy: "modprobe veth, or a kernel with CONFIG_VETH",
    },
    Feature {
        name: "next-hop objects",
        script: "ip link set lo up; ip nexthop add id 7 dev lo",
        required: false,
        remedy: "a kernel from 5.3 on; without them, thousands of peers take seconds instead of milliseconds",
    },
    Feature {
        name: "nftables with masquerade",
        script: "nft 'table inet t { chain c { type nat hook postrouting priority 100; ip saddr 192.0.2.0/24 masquerade random,fully-random; }; }'",
        required: true,
        remedy: "modprobe nf_tables nft_masq nft_chain_nat, or a kernel with CONFIG_NF_TABLES and CONFIG_NFT_MASQ",
    },
    Feature {
        name: "nftables on bridges",
        script: "nft 'table bridge t { chain c { type filter hook prerouting priority 0; iifname \"x\" ether saddr 02:00:00:00:00:01 drop; }; }'",
        required: true,
        remedy: "modprobe nf_tables_bridge, or a kernel with CONFIG_NF_TABLES_BRIDGE: without it containers can use each other's addresses",
    },
];

pub(super) async fn check(facts: &Facts, findings: &mut Findings) {
    match run_tool(&["unshare", "--net", "true"]).await {
        Ok(_) => {
            for feature in &FEATURES {
                probe_feature(feature, findings).await;
            }
        }
        Err(error) => report_unchecked(findings, "kernel features", &error),
    }
    forwarding(facts, findings);
    interface_sysctls(facts, findings);
    conntrack_usage(findings);
    for family in Family::ALL {
        let (file, limit) = match family {
            Family::V4 => ("arp_cache", "ipv4/neigh/default/gc_thresh3"),
            Family::V6 => ("ndisc_cache", "ipv6/neigh/default/gc_thresh3"),
        };
        let limit_value = sysctl(limit).and_then(|text| text.parse().ok());
        // Each processor's line has the total of all.
        if let (Some(entries), Some(limit_value)) = (read_net_stat(file, "entries").first(), limit_value) {
            // The agent's own entries are permanent and do not count against the limit.
            neighbour_table(family, entries.saturating_sub(facts.peers.len() as u64), limit_value, findings);
        }
    }
}

/// Checks the kernel's neighbour table. All network namespaces share it: a container's entry for the gateway counts like the
/// host's for the container.
fn neighbour_table(family: Family, entries: u64, max: u64, findings: &mut Findings) {
    if max > 0 && entries * 100 >= max * FULL_WARNING_PERCENT as u64 {
        let name = format!("net.{}.neigh.default.gc_thresh", family.to_string().to_lowercase());
        findings.warning(
            format!("the kernel's {family} neighbour table is nearly full: containers and hosts will fail to resolve each other"),
            vec![format!("{entries} entries, {name}3 = {max}")],
            format!("sysctl -w {name}1={} {name}2={} {name}3={}, and the same in /etc/sysctl.d", max, max * 2, max * 4),
        );
    }
}

async fn probe_feature(feature: &Feature, findings: &mut Findings) {
    let program = feature.script.split(' ').next().unwrap_or_default();
    match run_tool(&["unshare", "--net", "sh", "-ec", feature.script]).await {
        Ok(_) => {}
        Err(ToolError::Failed { reason, .. }) if reason.contains("not found") => {
            report_unchecked(findings, feature.name, &ToolError::Missing(program.to_owned()));
        }
        Err(error) => {
            let summary = format!("the kernel has no {}", feature.name);
            let evidence = vec![error.to_string()];
            if feature.required {
                findings.error(summary, evidence, feature.remedy);
            } else {
                findings.warning(summary, evidence, feature.remedy);
            }
        }
    }
}

/// Checks forwarding in each family with a tunnel. A running agent restores it at once, so a value found here persists.
fn forwarding(facts: &Facts, findings: &mut Findings) {
    for family in facts.families() {
        let path = sysctls::forwarding(family);
        let name = format!("net.{}", path.replace('/', "."));
        match sysctl(path).as_deref() {
            Some("1" | "2") => {}
            Some(value) => findings.error(
                format!("the host does not forward {family}: containers reach only their own host"),
                vec![format!("{name} = {value}")],
                format!(
                    "a running agent sets it: see the check `agent`. Until then: sysctl -w {name}=1; and look for a file that \
                     switches it off: grep -r forward /etc/sysctl.d /etc/sysctl.conf"
                ),
            ),
            None => findings.info(
                format!("not checked: forwarding of {family}"),
                vec![format!("{name} cannot be read")],
                "run this as root, with /proc mounted",
            ),
        }
    }
}

/// Checks per-interface settings that stop the overlay's traffic regardless of the global ones.
fn interface_sysctls(facts: &Facts, findings: &mut Findings) {
    let own_devices: Vec<Device> = facts.link_names(|_| true).iter().filter_map(|name| Device::from_name(name)).collect();
    for family in facts.families() {
        let of_devices = own_devices.iter().filter(|device| device.carries(family));
        let mut wanted: Vec<(String, &str)> = of_devices.flat_map(|device| sysctls::device_settings(*device, family)).collect();
        if let (Family::V4, Some(underlay)) = (family, facts.status().and_then(|status| status.underlay.as_ref())) {
            wanted.push((sysctls::interface_path(&underlay.interface, family, "forwarding"), "1"));
        }
        let number = |path: &str| sysctl(path).and_then(|text| text.parse::<u32>().ok());
        for (path, value) in wanted {
            let Some(actual) = sysctl(&path).filter(|found| found != value) else { continue };
            // The larger of this and the `all` setting applies, and only 1 (strict) drops.
            let all = sysctls::interface_path("all", family, "rp_filter");
            if path.ends_with("/rp_filter") && number(&all).max(number(&path)) != Some(1) {
                continue;
            }
            findings.error(
                format!("an interface setting blocks the overlay's {family} traffic"),
                vec![format!("net.{path} = {actual}, not {value}")],
                format!(
                    "a running agent sets it: see the check `agent`. Until then: sysctl -w net/{path}={value}; and look for a \
                     file that sets it: grep -rE '{}' /etc/sysctl.d /etc/sysctl.conf",
                    path.rsplit('/').next().unwrap_or_default()
                ),
            );
        }
        let all = sysctls::interface_path("all", family, "arp_ignore");
        if family == Family::V4 && number(&all) == Some(8) {
            findings.error(
                "this host answers no ARP requests: containers cannot resolve their gateway",
                vec!["net.ipv4.conf.all.arp_ignore = 8".to_owned()],
                "it applies to every interface, regardless of the interface's own value: sysctl -w net.ipv4.conf.all.arp_ignore=0 (1 and 2 do no harm)",
            );
        }
    }
}

fn conntrack_usage(findings: &mut Findings) {
    let number = |name: &str| sysctl(&format!("netfilter/{name}")).and_then(|text| text.parse::<u64>().ok());
    if let (Some(count), Some(max)) = (number("nf_conntrack_count"), number("nf_conntrack_max"))
        && max > 0
        && count * 100 >= max * FULL_WARNING_PERCENT as u64
    {
        findings.warning(
            "the conntrack table is nearly full: new connections will be dropped",
            vec![format!("nf_conntrack_count = {count}, nf_conntrack_max = {max}")],
            format!("sysctl -w net.netfilter.nf_conntrack_max={}, and the same in /etc/sysctl.d", max * 2),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearly_full_neighbour_table_is_reported() {
        let finding_for = |entries| {
            let mut findings = Findings::for_check("kernel");
            neighbour_table(Family::V6, entries, 1024, &mut findings);
            findings.into_vec().into_iter().next().map(|finding| (finding.evidence.concat(), finding.remedy))
        };
        assert_eq!(finding_for(921), None);
        let (evidence, remedy) = finding_for(922).expect("a finding");
        assert_eq!(evidence, "922 entries, net.ipv6.neigh.default.gc_thresh3 = 1024");
        assert!(remedy.contains("net.ipv6.neigh.default.gc_thresh3=4096"), "{remedy}");
    }
}
