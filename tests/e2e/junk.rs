//! Junk in etcd, by the thousand: no crash, no way out of the network, no effect on those who behave, and memory that has a bound.

use overlay_agent::model::Family;
use overlay_agent::model::api::Status;
use overlay_tests::gateway::Gateway;
use overlay_tests::junk::{Junk, check_config, check_entry, touches};
use overlay_tests::story::SOON;
use overlay_tests::{Must, Story, etcd, kernel, memory};
use overlayctl::lab::layout;

/// Seeds of the generator; another one may be given, to repeat what a longer run has found.
fn seed() -> u64 {
    std::env::var("OVERLAY_SEED").ok().map_or(1, |text| text.parse().must("OVERLAY_SEED is a number"))
}

/// Values of the generator that are tried.
const ROUNDS: usize = 3_000;

/// Inputs that a fuzzer found worth keeping.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = format!("{}/fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(&directory).must(&directory);
    files.map(|file| std::fs::read(file.must("a file").path()).must("a file")).collect()
}

#[test]
fn entries_of_all_kinds() {
    let kept = corpus("entry");
    assert!(kept.len() >= 8, "the corpus is there: {}", kept.len());
    for data in kept {
        let (key, value) = data.split_at(data.iter().position(|b| *b == b'\n').unwrap_or(data.len()));
        check_entry(&String::from_utf8_lossy(key), value.get(1..).unwrap_or_default());
    }
    let mut junk = Junk::new(seed());
    for _ in 0..ROUNDS {
        let (key, value) = junk.entry();
        let repeat = format!("OVERLAY_SEED={}: {key} {}", seed(), String::from_utf8_lossy(&value));
        std::panic::catch_unwind(|| check_entry(&key, &value)).unwrap_or_else(|_| panic!("{repeat}"));
    }
}

#[test]
fn configurations_of_all_kinds() {
    for data in corpus("config") {
        check_config(&String::from_utf8_lossy(&data));
    }
    let mut junk = Junk::new(seed());
    for _ in 0..ROUNDS {
        let text = String::from_utf8_lossy(&junk.config()).into_owned();
        std::panic::catch_unwind(|| check_config(&text)).unwrap_or_else(|_| panic!("OVERLAY_SEED={}: {text}", seed()));
    }
}

/// A conversation with the lab's etcd.
fn with_etcd<T: Send>(story: &Story, work: impl FnOnce(&mut Gateway) -> anyhow::Result<T> + Send) -> T {
    let address = std::net::SocketAddr::new(layout::etcd_address(Family::V4), layout::ETCD_PORT);
    let done = story.inside("net").run(|| work(&mut Gateway::connect(address)?));
    done.must("the namespace of etcd").must("etcd")
}

#[tokio::test(flavor = "multi_thread")]
async fn live() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let before = kernel::actual(&story, "h1");
    let pid = story.at("h1").agent().must("h1").pid;
    let flow = story.flow("h1-c1", "h2-c1", Family::V4).await;
    let mut ours = Vec::new();
    for host in ["h1", "h2"] {
        ours.push(story.status(host).await.lease.must("a lease").subnet);
    }
    let mut junk = Junk::new(seed());
    // The hosts' own keys are for other stories: whoever overwrites one takes the subnet.
    let entries: Vec<_> = std::iter::from_fn(|| Some(junk.entry())).filter(|(key, _)| !touches(key, &ours)).take(3000).collect();
    let all: std::collections::BTreeMap<String, Vec<u8>> =
        entries.into_iter().map(|(key, value)| (etcd::lease_key(&key), value)).collect();
    let pairs: Vec<(&String, &Vec<u8>)> = all.iter().collect();
    with_etcd(&story, |etcd| etcd.put_all(&pairs));
    let revision = etcd::revision(&story);
    let seen = |s: &Status| s.store.revision >= revision && s.store.leases > all.len() / 2;
    for host in ["h1", "h2"] {
        let status = story.at(host).wait_status(SOON, "it does not see all of it", seen).await.must(host);
        assert!(status.ready && status.data_path.failed.is_empty(), "{status:#?}");
        assert!(!status.store.refused.is_empty());
    }
    // Some of it is no worse than a lease; none of it leads out of the network or to us.
    let network: overlay_agent::model::Cidr = "10.244.0.0/16".parse().must("a network");
    for route in kernel::listed(&story, "h1", "ip", &["-4", "route", "show", "proto", "86", "type", "unicast"]) {
        let text = kernel::text(&route, "dst");
        let range: overlay_agent::model::Cidr =
            if text.contains('/') { text } else { format!("{text}/32") }.parse().must("a range");
        assert!(network.covers(range) && !ours[0].get(Family::V4).must("ours").overlaps(range), "{route}");
    }
    assert_eq!(kernel::listed(&story, "h1", "ip", &["-6", "route", "show", "proto", "86"]), Vec::<serde_json::Value>::new());
    story.assert_all_reach().await;
    flow.stop().await.assert_no_loss("while junk came");
    assert_eq!(story.at("h1").agent().must("h1").pid, pid, "the same agent all the while");
    with_etcd(&story, |etcd| {
        all.keys().try_for_each(|key| etcd.delete(key).map(drop))?;
        Ok(())
    });
    let well = |s: &Status| s.store.leases == 2 && s.problems.is_empty();
    story.at("h1").wait_status(SOON, "it is not well again", well).await.must("h1");
    assert_eq!(kernel::difference(&kernel::actual(&story, "h1"), &before), "");
}

/// Anonymous memory of a host's agent, in MiB.
fn memory_of(story: &Story, host: &str) -> u64 {
    memory::anonymous(story.at(host).agent().must(host).pid) / 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand() {
    const COUNT: u32 = 100_000;
    let story = Story::up(|options| {
        options.hosts = 1;
        options.containers = 0;
    })
    .await;
    let before = kernel::actual(&story, "h1");
    let (base, lines) = (memory_of(&story, "h1"), story.log("h1").lines().count());
    let lease = |n: u32| {
        let [a, b, c, d] = (0xc000_0000 + n).to_be_bytes();
        let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}"}}"#);
        format!(r#"{{"PublicIP":"{a}.{b}.{c}.{d}","BackendType":"vxlan","BackendData":{data}}}"#)
    };
    // Half of it cannot be read, the other half are leases outside the network.
    let pairs: Vec<(String, String)> = (0..COUNT)
        .map(|n| match n % 2 {
            0 => (etcd::lease_key(&format!("junk-{n}")), "{".to_owned()),
            _ => (etcd::lease_key(&format!("{}-32", std::net::Ipv4Addr::from(0xac10_0000 + n))), lease(n)),
        })
        .collect();
    with_etcd(&story, |etcd| etcd.put_all(&pairs));
    let all = |s: &Status| s.store.leases == COUNT as usize + 1;
    let status = story.at("h1").wait_status(SOON * 6, "it does not see all of it", all).await.must("h1");
    assert!(status.ready && status.store.refused.len() <= 100, "{}", status.store.refused.len());
    assert!(status.problems.iter().any(|p| p.contains(&format!("{COUNT} leases are left out"))), "{:?}", status.problems);
    let with_junk = memory_of(&story, "h1");
    let told = story.log("h1").lines().count() - lines;
    println!("{COUNT} entries of junk: {base} MiB before, {with_junk} MiB with it, {told} lines in the log");
    assert!(with_junk < base + 150, "1.5 KiB an entry at most: {with_junk} MiB");
    assert!(told < 2_000, "the log is not flooded: {told} lines");
    assert_eq!(kernel::difference(&kernel::actual(&story, "h1"), &before), "");
    let prefix = etcd::lease_key("");
    with_etcd(&story, |etcd| {
        etcd.delete_range(&format!("{prefix}172."), &format!("{prefix}173."))?;
        etcd.delete_range(&format!("{prefix}junk-"), &format!("{prefix}junk."))
    });
    let well = |s: &Status| s.store.leases == 1 && s.problems.is_empty() && s.ready;
    story.at("h1").wait_status(SOON * 6, "it is not well again", well).await.must("h1");
}
