//! Tests of [`NftMonitor`]: foreign changes are reported, our own are not.

use std::time::Duration;

use super::table::{ALTERATIONS, run_alteration};
use super::*;
use crate::kernel::nft::{Nft, NftChange, NftMonitor};
use crate::model::Family;
use crate::plan::ruleset::source_filter;

/// Receive buffer of the tested monitors.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Longer than any event takes: the kernel delivers it before the command returns.
const EVENT_TIMEOUT: Duration = Duration::from_secs(5);

/// A pending event arrives at once, so this wait shows that there is none.
const QUIET_PERIOD: Duration = Duration::from_millis(50);

fn with_runtime<F: Future>(body: impl FnOnce() -> F + Send) {
    in_netns(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async { body().await });
    });
}

/// Collects events until none arrives for [`QUIET_PERIOD`].
async fn collect_events(monitor: &mut NftMonitor) -> Vec<NftChange> {
    let mut seen = Vec::new();
    let mut wait = EVENT_TIMEOUT;
    while let Ok(change) = tokio::time::timeout(wait, monitor.changed()).await {
        seen.push(change.expect("monitor"));
        assert!(seen.len() < 1000, "no end of events");
        wait = QUIET_PERIOD;
    }
    seen
}

async fn expect_no_event(monitor: &mut NftMonitor) {
    if let Ok(change) = tokio::time::timeout(QUIET_PERIOD, monitor.changed()).await {
        panic!("unexpected {change:?}");
    }
}

#[test]
fn foreign_changes_emit_events_own_do_not() {
    with_runtime(|| async {
        let mut tables = Tables::open();
        let mut monitor = NftMonitor::open(Some(tables.nft.port_id()), RECEIVE_BUFFER).expect("monitor");
        for (what, script) in ALTERATIONS {
            tables.set([rules(), source_filter()]);
            expect_no_event(&mut monitor).await;
            run_alteration(script);
            let seen = collect_events(&mut monitor).await;
            assert!(!seen.is_empty() && seen.iter().all(|change| *change == NftChange::OwnTables), "{what}: {seen:?}");
        }
        tables.delete();
        expect_no_event(&mut monitor).await;
    });
}

#[test]
fn changes_by_another_socket_emit_events() {
    with_runtime(|| async {
        let nft = Nft::open().expect("open");
        let mut other = Tables::open();
        let mut monitor = NftMonitor::open(Some(nft.port_id()), RECEIVE_BUFFER).expect("monitor");
        other.set([rules()]);
        assert_eq!(monitor.changed().await.expect("event"), NftChange::OwnTables);
    });
}

#[test]
fn only_forward_chains_of_foreign_tables_emit_events() {
    with_runtime(|| async {
        let mut nft = Nft::open().expect("open");
        let mut monitor = NftMonitor::open(Some(nft.port_id()), RECEIVE_BUFFER).expect("monitor");
        let forward = [
            "iptables -P FORWARD DROP",
            "iptables -P FORWARD ACCEPT",
            "iptables -I FORWARD -j DROP",
            "iptables -D FORWARD 1",
            "iptables -A FORWARD -s 192.0.2.0/24 -j ACCEPT",
            "iptables -F FORWARD",
            "nft delete table ip filter",
            "ip6tables -P FORWARD DROP",
            "ip6tables -A FORWARD -j ACCEPT",
            "nft flush ruleset",
        ];
        for line in forward {
            iptables(line);
            let seen = collect_events(&mut monitor).await;
            assert!(!seen.is_empty() && seen.iter().all(|change| *change == NftChange::Forward), "{line}: {seen:?}");
        }

        iptables("iptables -P FORWARD DROP");
        iptables("ip6tables -P FORWARD DROP");
        collect_events(&mut monitor).await;
        for (family, network) in [(Family::V4, "10.244.0.0/16"), (Family::V6, "fd00::/8")] {
            nft.set_forward_accept(family, &[network.parse().expect("cidr")]).expect("set");
            nft.delete_forward_accept(family).expect("delete");
        }
        let unrelated = [
            "iptables -A INPUT -j ACCEPT",
            "iptables -N OTHER",
            "iptables -A OTHER -j ACCEPT",
            "iptables -t nat -A POSTROUTING -j ACCEPT",
            "nft add table inet overlayd2",
            "nft add chain inet overlayd2 forward",
            "nft add table ip overlayd",
            "nft delete table ip overlayd",
        ];
        for line in unrelated {
            iptables(line);
        }
        expect_no_event(&mut monitor).await;
    });
}

#[test]
fn one_transaction_on_both_emits_two_events() {
    with_runtime(|| async {
        let mut tables = Tables::open();
        iptables("iptables -P FORWARD DROP");
        tables.set([rules()]);
        let mut monitor = NftMonitor::open(Some(tables.nft.port_id()), RECEIVE_BUFFER).expect("monitor");
        super::nft("flush ruleset");
        let seen = collect_events(&mut monitor).await;
        assert!(seen.contains(&NftChange::OwnTables) && seen.contains(&NftChange::Forward), "{seen:?}");
    });
}

#[test]
fn cancelled_wait_loses_no_event() {
    with_runtime(|| async {
        let mut monitor = NftMonitor::open(None, RECEIVE_BUFFER).expect("monitor");
        for _ in 0..20 {
            assert!(tokio::time::timeout(Duration::from_millis(1), monitor.changed()).await.is_err());
        }
        super::nft("add table inet overlayd");
        assert!(tokio::time::timeout(EVENT_TIMEOUT, monitor.changed()).await.is_ok());
    });
}

#[test]
fn lost_events_are_reported() {
    with_runtime(|| async {
        let mut tables = Tables::open();
        let mut monitor = NftMonitor::open(None, RECEIVE_BUFFER).expect("monitor");
        // Some KiB per event and no reads: the receive buffer overflows long before the loop ends.
        for _ in 0..4_000 {
            tables.set([rules()]);
        }
        let mut seen = Vec::new();
        while let Ok(change) = tokio::time::timeout(QUIET_PERIOD, monitor.changed()).await {
            seen.push(change.expect("monitor"));
            assert!(seen.len() < 100_000, "no end of events");
        }
        assert!(seen.contains(&NftChange::Lost));
        super::nft("flush ruleset");
        let seen = collect_events(&mut monitor).await;
        assert!(!seen.is_empty() && seen.iter().all(|change| *change == NftChange::OwnTables), "{seen:?}");
    });
}

/// Thousands of foreign rules cost the monitor little. Prints the time of this process.
#[test]
fn unrelated_rule_storm_is_skipped() {
    with_runtime(|| async {
        let mut monitor = NftMonitor::open(None, RECEIVE_BUFFER).expect("monitor");
        super::nft("add table inet storm\nadd chain inet storm c");
        let rule = |i: u32| format!("add rule inet storm c ip saddr 10.{}.{}.0/24 accept\n", i / 256, i % 256);
        // In parts, because without root `nft` cannot send more than net.core.wmem_max at once.
        for part in 0..20 {
            super::nft(&(part * 250..(part + 1) * 250).map(rule).collect::<String>());
        }
        // This event follows the storm, so its arrival proves that the storm was read.
        super::nft("add table inet overlayd");
        let begin = std::time::Instant::now();
        assert_eq!(monitor.changed().await.expect("event"), NftChange::OwnTables);
        println!("5,000 unrelated rules read through in {:?}", begin.elapsed());
    });
}
