//! Tests of our rules in the FORWARD chain of a real iptables-nft.

use super::*;
use crate::kernel::nft::{Nft, NftState};
use crate::model::{Cidr, Family};

const SETUP: [&str; 6] = [
    "iptables -P FORWARD DROP",
    "iptables -A FORWARD -s 192.0.2.0/25 -p tcp --dport 80 -m comment --comment others -j ACCEPT",
    "iptables -t nat -A POSTROUTING -s 192.0.2.0/24 -j MASQUERADE",
    "ip6tables -P FORWARD DROP",
    "ip6tables -A FORWARD -s 2001:db8::/33 -j ACCEPT",
    "ip6tables -A INPUT -i eth0 -j DROP",
];

/// The programs and the network of each family.
fn families() -> [(Family, &'static str, Cidr); 2] {
    let cidr = |text: &str| text.parse().expect(text);
    [(Family::V4, "iptables", cidr("10.244.0.0/16")), (Family::V6, "ip6tables", cidr("fd00:10:244::/53"))]
}

/// The output of iptables-save, without its dates and counters.
fn saved_rules(program: &str) -> String {
    let text = run_command(&format!("{program}-save"), &[], "");
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split(" [").next().unwrap_or(line).to_owned() + "\n")
        .collect()
}

#[test]
fn netns_without_iptables_has_no_forward_chain() {
    in_netns(|| {
        let mut nft = Nft::open().expect("open");
        assert_eq!(nft.dump().expect("dump"), NftState::default());
        for (family, _, network) in families() {
            nft.delete_forward_accept(family).expect("nothing to delete");
            let error = nft.set_forward_accept(family, &[network]).expect_err("no chain");
            assert_eq!(error.errno, libc::ENOENT);
            assert!(error.message.contains("filter FORWARD: no such chain"), "{}", error.message);
        }
        let error = nft.set_forward_accept(Family::V6, &[families()[0].2]).expect_err("other family");
        assert_eq!(
            error.message,
            "10.244.0.0/16 is not an IPv6 network: its accept rules belong in the other family's FORWARD chain"
        );
        assert_eq!(run_command("nft", &["list", "ruleset"], ""), "");
    });
}

#[test]
fn drop_policy_is_reported_per_family() {
    in_netns(|| {
        let mut nft = Nft::open().expect("open");
        let mut drops = || nft.dump().expect("dump").forward_drops;
        iptables("iptables -A FORWARD -j ACCEPT");
        iptables("ip6tables -A FORWARD -j ACCEPT");
        assert_eq!(drops(), []);
        iptables("ip6tables -P FORWARD DROP");
        assert_eq!(drops(), [Family::V6]);
        iptables("iptables -P FORWARD DROP");
        assert_eq!(drops(), [Family::V4, Family::V6]);
        iptables("ip6tables -P FORWARD ACCEPT");
        assert_eq!(drops(), [Family::V4]);
        super::nft("delete table ip filter");
        assert_eq!(drops(), []);
        // A chain of that name on another hook does not drop forwarded packets.
        super::nft("table ip filter { chain FORWARD { type filter hook input priority 0; policy drop; }; }");
        assert_eq!(drops(), []);
    });
}

#[test]
fn iptables_lists_and_restores_accept_rules() {
    in_netns(|| {
        for line in SETUP {
            iptables(line);
        }
        let mut nft = Nft::open().expect("open");
        for (family, program, network) in families() {
            let before = saved_rules(program);
            nft.set_forward_accept(family, &[network]).expect("set");
            assert_eq!(nft.dump().expect("dump").forward_accept.get(family), Some(&Box::from([network])));
            let listed = iptables(&format!("{program} -S FORWARD"));
            let ours = format!(
                "-P FORWARD DROP\n\
                 -A FORWARD -s {network} -m comment --comment overlayd -j ACCEPT\n\
                 -A FORWARD -d {network} -m comment --comment overlayd -j ACCEPT\n\
                 -A FORWARD -s "
            );
            assert!(listed.starts_with(&ours), "{listed}");
            assert_eq!(saved_rules(program).lines().count(), before.lines().count() + 2);

            // Other tools can still change their rules, and restore a saved ruleset.
            iptables(&format!("{program} -I FORWARD -i lo -j ACCEPT"));
            iptables(&format!("{program} -D FORWARD -i lo -j ACCEPT"));
            let text = run_command(&format!("{program}-save"), &[], "");
            run_command(&format!("{program}-restore"), &[], &text);
            assert_eq!(iptables(&format!("{program} -S FORWARD")), listed);

            // iptables-restore writes the comment as an xtables match. We do not write that form, but recognise it as ours.
            assert_eq!(
                nft.dump().expect("dump").forward_accept.get(family),
                Some(&Box::from([Cidr::host(family.unspecified())]))
            );
            nft.set_forward_accept(family, &[network]).expect("set");
            assert_eq!(nft.dump().expect("dump").forward_accept.get(family), Some(&Box::from([network])));
            assert_eq!(iptables(&format!("{program} -S FORWARD")), listed);

            nft.set_forward_accept(family, &[network]).expect("set");
            nft.delete_forward_accept(family).expect("delete");
            nft.delete_forward_accept(family).expect("delete what is gone");
            assert_eq!(saved_rules(program), before);
            assert_eq!(nft.dump().expect("dump").forward_accept.get(family), None);
        }
    });
}

#[test]
fn setting_is_idempotent_and_repairs_damage() {
    in_netns(|| {
        for line in SETUP {
            iptables(line);
        }
        let mut nft = Nft::open().expect("open");
        for (family, program, network) in families() {
            let table = if family == Family::V4 { "ip" } else { "ip6" };
            let handles = || {
                let listed = run_command("nft", &["-a", "list", "chain", table, "filter", "FORWARD"], "");
                let ours = listed.lines().filter(|line| line.contains("comment \"overlayd\""));
                ours.filter_map(|line| line.split("# handle ").nth(1)).map(str::to_owned).collect::<Vec<_>>()
            };
            nft.set_forward_accept(family, &[network]).expect("set");
            let first = handles();
            assert_eq!(first.len(), 2);
            nft.set_forward_accept(family, &[network]).expect("set again");
            assert_eq!(handles(), first, "nothing was written");

            super::nft(&format!("delete rule {table} filter FORWARD handle {}", first[0]));
            let damaged = nft.dump().expect("dump").forward_accept.get(family).cloned();
            assert_eq!(damaged, Some(Box::from([Cidr::host(family.unspecified())])));
            nft.set_forward_accept(family, &[network]).expect("repair");
            assert_eq!(nft.dump().expect("dump").forward_accept.get(family), Some(&Box::from([network])));
            assert_eq!(handles().len(), 2);

            let other = Cidr::containing(network.base(), network.length() - 1).expect("shorter");
            nft.set_forward_accept(family, &[other]).expect("another network");
            assert_eq!(nft.dump().expect("dump").forward_accept.get(family), Some(&Box::from([other])));
            assert_eq!(handles().len(), 2);

            iptables(&format!("{program} -F FORWARD"));
            assert_eq!(nft.dump().expect("dump").forward_accept.get(family), None);
            nft.set_forward_accept(family, &[network]).expect("after a flush");
            assert_eq!(nft.dump().expect("dump").forward_accept.get(family), Some(&Box::from([network])));
        }
    });
}
