//! Drift with a thousand peers present: each kind of entry deleted or altered, one at a time and all at once. It is back, counted, logged with
//! what differed; how long it was away is printed.

use std::collections::BTreeSet;
use std::time::Duration;

use overlay_agent::model::Family;
use overlay_tests::programs::processor_time;
use overlay_tests::stopwatch::{Lap, Stopwatch, Times};
use overlay_tests::story::SOON;
use overlay_tests::{Must, Story, eventually, http, kernel, peers};
use overlayctl::lab::Families;

/// Peers that are leases alone, besides the one host.
const PEERS: u16 = 1000;

/// No entry may be away longer. The goals are printed beside the figures: 20 ms at the median, 200 ms at worst.
const LIMIT: Duration = Duration::from_secs(1);

/// How often each kind of entry is deleted or altered alone.
const TIMES: usize = 5;

/// Silence after which a repair is over.
const REST: Duration = Duration::from_millis(150);

/// One entry each: what is done to the entry number `$1` of its list, and what the entry is called in metrics.
const ONE: [(&str, &str, &str); 8] = [
    ("route deleted", "route", "ip route delete $(ip route show proto 86 type unicast | sed -n ${1}p | cut -d' ' -f1) proto 86"),
    (
        "IPv6 route deleted",
        "route",
        "ip -6 route delete $(ip -6 route show proto 86 type unicast | sed -n ${1}p | cut -d' ' -f1) proto 86",
    ),
    (
        "route altered",
        "route",
        "ip route replace $(ip route show proto 86 type unicast | sed -n ${1}p | cut -d' ' -f1) via 10.99.0.254",
    ),
    ("next hop deleted", "nexthop", "ip nexthop delete $(ip nexthop show proto 86 | sed -n ${1}p | cut -d' ' -f1,2)"),
    (
        "neighbour deleted",
        "neigh",
        "ip neigh delete $(ip neigh show dev ovx.1 nud permanent | sed -n ${1}p | cut -d' ' -f1) dev ovx.1",
    ),
    (
        "neighbour altered",
        "neigh",
        "ip neigh replace $(ip neigh show dev ovx.1 nud permanent | sed -n ${1}p | cut -d' ' -f1) lladdr 02:99:99:99:99:99 dev ovx.1 nud permanent",
    ),
    (
        "forwarding entry deleted",
        "fdb",
        "bridge fdb show dev ovx.1 | sed -n ${1}p | { read mac _ dst _; bridge fdb del $mac dev ovx.1 dst $dst; }",
    ),
    (
        "forwarding entry altered",
        "fdb",
        "bridge fdb replace $(bridge fdb show dev ovx.1 | sed -n ${1}p | cut -d' ' -f1) dev ovx.1 dst 10.99.77.77",
    ),
];

/// All entries of a kind, as fast as a program can.
const ALL: [(&str, &str); 5] = [
    (
        "all routes deleted",
        "for f in -4 -6; do ip $f route show proto 86 type unicast | sed 's/^\\([^ ]*\\).*/route delete \\1 proto 86/' | ip $f -force -batch -; done",
    ),
    (
        "all next hops deleted",
        "ip nexthop show proto 86 | sed 's/^id \\([0-9]*\\).*/nexthop delete id \\1/' | ip -force -batch -",
    ),
    (
        "all neighbours deleted",
        "for d in ovx.1 ovx6.1; do ip neigh show dev $d nud permanent | sed \"s/^\\([^ ]*\\).*/neigh delete \\1 dev $d/\" | ip -force -batch -; done",
    ),
    (
        "all forwarding entries deleted",
        "for d in ovx.1 ovx6.1; do bridge fdb show dev $d | sed \"s/^\\([^ ]*\\) dst \\([^ ]*\\).*/fdb del \\1 dev $d dst \\2/\" | bridge -force -batch -; done",
    ),
    ("tunnels and bridge deleted", "ip link delete ovx.1; ip link delete ovx6.1; ip link delete ovb.1; nft flush ruleset"),
];

async fn lab() -> Story {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = Families::Dual;
        options.networks = peers::networks();
    })
    .await;
    peers::put_all(&story, &peers::beside(&story, PEERS, true));
    let all = usize::from(PEERS) + 1;
    for host in ["h1", "h2"] {
        let whole = |s: &overlay_agent::model::api::Status| s.ready && s.data_path.peers == all;
        story.at(host).wait_status(SOON, "it has not every peer", whole).await.must(host);
    }
    story
}

async fn healed(story: &Story, what: &str, before: &BTreeSet<String>) {
    eventually(what, SOON, || {
        let difference = kernel::difference(&kernel::actual(story, "h1"), before);
        if difference.is_empty() { Ok(()) } else { Err(format!("\n{}", difference.chars().take(2000).collect::<String>())) }
    })
    .await;
}

fn counted(story: &Story, kind: &str) -> u64 {
    let metrics = http::ask(&story.at("h1").socket(), "GET", "/metrics", "").body;
    let name = format!("overlayd_drift_repairs_total{{kind=\"{kind}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)).and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

fn row(what: &str, times: &Times, whole: Duration) {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "{what:<32} {:>5} entries, away {:>7.2} ms at the median, {:>7.2} ms at worst; all over after {:>7.2} ms",
        times.len(),
        ms(times.median()),
        ms(times.worst()),
        ms(whole)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_at_a_time() {
    let story = lab().await;
    let before = kernel::actual(&story, "h1");
    let stopwatch = Stopwatch::start(&story.inside("h1"));
    let mut all = Times::default();
    for (what, kind, script) in ONE {
        let (repairs, of_kind) = (story.status("h1").await.data_path.drift_repairs, counted(&story, kind));
        let lines = story.log("h1").lines().filter(|line| line.contains("an entry was changed by others")).count();
        let mut times = Times::default();
        let mut whole = Duration::ZERO;
        stopwatch.lap(REST, SOON).await;
        for number in 0..TIMES {
            let script = format!("set -- {}; {script}", 100 + 150 * number);
            kernel::shell(&story, "h1", &script);
            let Lap { entries, whole: span } = stopwatch.lap(REST, SOON).await;
            // A foreign route replaces ours without an end of its own; whatever there was, the whole of it counts.
            times.add(entries.values().max().copied().unwrap_or_default().max(span));
            whole = whole.max(span);
        }
        row(what, &times, whole);
        healed(&story, what, &before).await;
        assert!(times.worst() > Duration::ZERO, "{what}: something happened");
        assert!(times.worst() < LIMIT, "{what}: {times:?}");
        all.extend(std::iter::once(times.worst()));
        let count = TIMES as u64;
        let status = story.status("h1").await;
        assert!(status.data_path.drift_repairs >= repairs + count, "{what}: counted in the status: {:?}", status.data_path);
        assert!(counted(&story, kind) >= of_kind + count, "{what}: counted in the metrics by kind");
        let log = story.log("h1");
        let told: Vec<&str> = log.lines().filter(|line| line.contains("an entry was changed by others")).skip(lines).collect();
        let (first, one) = (told.first().must("a line"), format!("entry={kind}"));
        assert!(told.iter().filter(|line| line.contains(kind)).count() >= TIMES, "{what}: {one}: {told:#?}");
        assert!(first.contains("found=") && first.contains("wanted="), "{what}: says what differed: {first}");
        assert!(told.len() <= 3 * TIMES, "{what}: each is logged once: {told:#?}");
    }
    println!("worst of each kind: {:?} at the median (goal 20 ms), {:?} at worst (goal 200 ms)", all.median(), all.worst());
    story.assert_all_reach().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_at_once() {
    let story = lab().await;
    let before = kernel::actual(&story, "h1");
    let endpoints = story.at("h1").client().endpoints().await.must("endpoints").endpoints;
    let stopwatch = Stopwatch::start(&story.inside("h1"));
    for (what, script) in ALL {
        let repairs = story.status("h1").await.data_path.drift_repairs;
        stopwatch.lap(REST, SOON).await;
        kernel::shell(&story, "h1", script);
        let Lap { entries, whole } = stopwatch.lap(5 * REST, SOON).await;
        let mut times = Times::default();
        times.extend(entries.values().copied());
        row(what, &times, whole);
        healed(&story, what, &before).await;
        let status = story.status("h1").await;
        assert!(status.ready && status.data_path.failed.is_empty(), "{what}: {:?}", status.data_path);
        assert!(status.data_path.drift_repairs > repairs, "{what}: counted");
        let flow = story.flow("h1-c1", "h2-c1", Family::V4).await;
        flow.go_on(Duration::from_millis(250)).await;
        flow.stop().await.assert_no_loss(&format!("after: {what}"));
    }
    assert_eq!(story.at("h1").client().endpoints().await.must("endpoints").endpoints, endpoints, "endpoints came through");
    let log = story.log("h1");
    let lines = log.lines().filter(|line| line.contains("putting it back") || line.contains("putting them back")).count();
    let repairs = story.status("h1").await.data_path.drift_repairs;
    assert!(lines * 4 < usize::try_from(repairs).must("a number"), "{repairs} repairs, and {lines} lines of log");
    story.assert_all_reach().await;
}

/// Somebody deletes a route every 10 ms: the agent neither gives in nor spins, and says so loudly.
#[tokio::test(flavor = "multi_thread")]
async fn two_that_fight() {
    let story = lab().await;
    let time = Duration::from_secs(3);
    let agent = story.at("h1").agent().must("an agent");
    let peer = story.at("h1").client().peers().await.must("peers").peers.into_iter().find(|p| p.subnet.family() == Family::V4);
    let route = peer.must("a peer").subnet.to_string();
    let used = processor_time(agent.pid).must("the agent's processor time");
    let repairs = story.status("h1").await.data_path.drift_repairs;
    let script = format!(
        "end=$(($(date +%s%N) + {})); n=0
         while [ $(date +%s%N) -lt $end ]; do ip route delete {route} proto 86 2>/dev/null && n=$((n + 1)); sleep 0.01; done
         echo $n",
        time.as_nanos()
    );
    let deleted: u64 = kernel::shell(&story, "h1", &script).trim().parse().must("a number");
    let used = processor_time(agent.pid).must("the agent's processor time") - used;
    let status = story.status("h1").await;
    let repaired = status.data_path.drift_repairs - repairs;
    println!("{deleted} deletions, {repaired} repairs, {} ms of processor time in {} ms", used.as_millis(), time.as_millis());
    assert!(deleted >= 10, "there was a fight: {deleted}");
    assert!(repaired <= 40, "the rate is bounded: {repaired} repairs");
    assert!(used < time / 2, "the processor is not spun: {used:?} of {time:?}");
    assert!(status.problems.iter().any(|p| p.contains(&route)), "the status names it: {:?}", status.problems);
    let loud = story.logged("h1", &["ERROR", "keeps undoing an entry", &route]).await;
    assert_eq!(story.log("h1").matches("keeps undoing an entry").count(), 1, "told once: {loud}");
    // The other one gives up: the route is back when the pause is over.
    story
        .at("h1")
        .wait_status(2 * SOON, "it does not come to rest", |s| s.ready && s.data_path.failed.is_empty())
        .await
        .must("h1");
    assert!(kernel::run(&story, "h1", &["ip", "route", "show", &route]).contains("proto 86"));
}
