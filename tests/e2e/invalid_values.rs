//! Thousands of invalid values in etcd: no crash, no routes outside the network, no effect on valid peers, and bounded memory.

use overlay_agent::model::Family;
use overlay_agent::model::api::Status;
use overlay_tests::etcd_gateway::EtcdGateway;
use overlay_tests::invalid_values::{InvalidValueGenerator, check_config, check_entry, overlaps_any};
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::{ExpectContext, TestLab, etcd, kernel, process_memory};
use overlayctl::lab::layout;

/// The generator's seed; another one repeats the result of a longer run.
fn seed() -> u64 {
    std::env::var("OVERLAY_SEED").ok().map_or(1, |text| text.parse().expect_ok("OVERLAY_SEED is a number"))
}

/// Number of generated values.
const ITERATIONS: usize = 3_000;

/// Inputs that the fuzzer kept.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = format!("{}/fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(&directory).expect_ok(&directory);
    files.map(|file| std::fs::read(file.expect_ok("a file").path()).expect_ok("a file")).collect()
}

#[test]
fn random_entries_are_handled() {
    let kept = corpus("entry");
    assert!(kept.len() >= 8, "the corpus is missing: {}", kept.len());
    for data in kept {
        let (key, value) = data.split_at(data.iter().position(|b| *b == b'\n').unwrap_or(data.len()));
        check_entry(&String::from_utf8_lossy(key), value.get(1..).unwrap_or_default());
    }
    let mut generator = InvalidValueGenerator::new(seed());
    for _ in 0..ITERATIONS {
        let (key, value) = generator.random_entry();
        let repeat = format!("OVERLAY_SEED={}: {key} {}", seed(), String::from_utf8_lossy(&value));
        std::panic::catch_unwind(|| check_entry(&key, &value)).unwrap_or_else(|_| panic!("{repeat}"));
    }
}

#[test]
fn random_configs_are_handled() {
    for data in corpus("config") {
        check_config(&String::from_utf8_lossy(&data));
    }
    let mut generator = InvalidValueGenerator::new(seed());
    for _ in 0..ITERATIONS {
        let text = String::from_utf8_lossy(&generator.random_config()).into_owned();
        std::panic::catch_unwind(|| check_config(&text)).unwrap_or_else(|_| panic!("OVERLAY_SEED={}: {text}", seed()));
    }
}

/// Runs a function with a connection to the lab's etcd.
fn with_etcd_gateway<T: Send>(lab: &TestLab, work: impl FnOnce(&mut EtcdGateway) -> anyhow::Result<T> + Send) -> T {
    let address = std::net::SocketAddr::new(layout::etcd_address(Family::V4), layout::ETCD_PORT);
    let result = lab.open_netns("net").run(|| work(&mut EtcdGateway::connect(address)?));
    result.expect_ok("the namespace of etcd").expect_ok("etcd")
}

#[tokio::test(flavor = "multi_thread")]
async fn running_agent_ignores_invalid_values() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let before = kernel::actual_state(&lab, "h1");
    let pid = lab.host("h1").agent().expect_ok("h1").pid;
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V4).await;
    let mut ours = Vec::new();
    for host in ["h1", "h2"] {
        ours.push(lab.status(host).await.lease.expect_ok("a lease").subnet);
    }
    let mut generator = InvalidValueGenerator::new(seed());
    // The hosts' own keys are for other tests: overwriting one takes its subnet.
    let entries: Vec<_> =
        std::iter::from_fn(|| Some(generator.random_entry())).filter(|(key, _)| !overlaps_any(key, &ours)).take(3000).collect();
    let all: std::collections::BTreeMap<String, Vec<u8>> =
        entries.into_iter().map(|(key, value)| (etcd::lease_key(&key), value)).collect();
    let pairs: Vec<(&String, &Vec<u8>)> = all.iter().collect();
    with_etcd_gateway(&lab, |etcd| etcd.put_all(&pairs));
    let revision = etcd::revision(&lab);
    let seen = |s: &Status| s.store.revision >= revision && s.store.leases > all.len() / 2;
    for host in ["h1", "h2"] {
        let status = lab.host(host).wait_status(CONVERGE_TIMEOUT, "it has not read all of them", seen).await.expect_ok(host);
        assert!(status.ready && status.data_path.failed.is_empty(), "{status:#?}");
        assert!(!status.store.refused.is_empty());
    }
    // Some of them are valid leases; none leads outside the network or to us.
    let network: overlay_agent::model::Cidr = "10.244.0.0/16".parse().expect_ok("a network");
    for route in kernel::list_json(&lab, "h1", "ip", &["-4", "route", "show", "proto", "86", "type", "unicast"]) {
        let text = kernel::text(&route, "dst");
        let range: overlay_agent::model::Cidr =
            if text.contains('/') { text } else { format!("{text}/32") }.parse().expect_ok("a range");
        assert!(network.covers(range) && !ours[0].get(Family::V4).expect_ok("ours").overlaps(range), "{route}");
    }
    assert_eq!(kernel::list_json(&lab, "h1", "ip", &["-6", "route", "show", "proto", "86"]), Vec::<serde_json::Value>::new());
    lab.assert_full_reachability().await;
    flow.stop().await.assert_no_loss("during invalid writes");
    assert_eq!(lab.host("h1").agent().expect_ok("h1").pid, pid, "the agent has not restarted");
    with_etcd_gateway(&lab, |etcd| {
        all.keys().try_for_each(|key| etcd.delete(key).map(drop))?;
        Ok(())
    });
    let healthy = |s: &Status| s.store.leases == 2 && s.problems.is_empty();
    lab.host("h1").wait_status(CONVERGE_TIMEOUT, "not healthy again", healthy).await.expect_ok("h1");
    assert_eq!(kernel::difference(&kernel::actual_state(&lab, "h1"), &before), "");
}

/// Anonymous memory of a host's agent, in MiB.
fn agent_memory_mib(lab: &TestLab, host: &str) -> u64 {
    process_memory::anonymous_rss_kib(lab.host(host).agent().expect_ok(host).pid) / 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_memory_is_bounded_under_100k_leases() {
    const COUNT: u32 = 100_000;
    let lab = TestLab::up(|options| {
        options.hosts = 1;
        options.containers = 0;
    })
    .await;
    let before = kernel::actual_state(&lab, "h1");
    let (base, lines) = (agent_memory_mib(&lab, "h1"), lab.log("h1").lines().count());
    let lease = |n: u32| {
        let [a, b, c, d] = (0xc000_0000 + n).to_be_bytes();
        let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}"}}"#);
        format!(r#"{{"PublicIP":"{a}.{b}.{c}.{d}","BackendType":"vxlan","BackendData":{data}}}"#)
    };
    // Half of them cannot be parsed, the other half are leases outside the network.
    let pairs: Vec<(String, String)> = (0..COUNT)
        .map(|n| match n % 2 {
            0 => (etcd::lease_key(&format!("junk-{n}")), "{".to_owned()),
            _ => (etcd::lease_key(&format!("{}-32", std::net::Ipv4Addr::from(0xac10_0000 + n))), lease(n)),
        })
        .collect();
    with_etcd_gateway(&lab, |etcd| etcd.put_all(&pairs));
    let all = |s: &Status| s.store.leases == COUNT as usize + 1;
    let status = lab.host("h1").wait_status(CONVERGE_TIMEOUT * 6, "it has not read all of them", all).await.expect_ok("h1");
    assert!(status.ready && status.store.refused.len() <= 100, "{}", status.store.refused.len());
    assert!(status.problems.iter().any(|p| p.contains(&format!("{COUNT} leases ignored"))), "{:?}", status.problems);
    let with_junk = agent_memory_mib(&lab, "h1");
    let new_lines = lab.log("h1").lines().count() - lines;
    println!("{COUNT} invalid entries: {base} MiB before, {with_junk} MiB with it, {new_lines} lines in the log");
    assert!(with_junk < base + 150, "at most 1.5 KiB per entry: {with_junk} MiB");
    assert!(new_lines < 2_000, "the log is not flooded: {new_lines} lines");
    assert_eq!(kernel::difference(&kernel::actual_state(&lab, "h1"), &before), "");
    let prefix = etcd::lease_key("");
    with_etcd_gateway(&lab, |etcd| {
        etcd.delete_range(&format!("{prefix}172."), &format!("{prefix}173."))?;
        etcd.delete_range(&format!("{prefix}junk-"), &format!("{prefix}junk."))
    });
    let healthy = |s: &Status| s.store.leases == 1 && s.problems.is_empty() && s.ready;
    lab.host("h1").wait_status(CONVERGE_TIMEOUT * 6, "not healthy again", healthy).await.expect_ok("h1");
}
