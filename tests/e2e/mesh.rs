//! `overlayctl mesh` and `overlayctl ping-mesh`: a whole mesh, the two faults told apart, a host that is down, one that has left, and what it costs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use overlay_agent::model::api::Reach;
use overlay_tests::story::SOON;
use overlay_tests::{Must, Story, etcd, eventually, http, kernel};
use overlayctl::cmd::mesh::Matrix;
use overlayctl::lab::Families;

/// Rounds of a second take two until a path counts as silent.
const ROUNDS: Duration = Duration::from_secs(30);

async fn lab(families: Families) -> Story {
    Story::up(|options| {
        options.hosts = 3;
        options.containers = 0;
        options.families = families;
        options.agent_args = vec!["--mesh-interval=1s".to_owned(), "--metrics-listen=0.0.0.0:9780".to_owned()];
    })
    .await
}

/// All rows, as the sockets of the lab's hosts tell them.
fn mesh(story: &Story) -> Matrix {
    let sockets: Vec<PathBuf> = ["h2", "h3"].iter().map(|host| story.at(host).socket()).collect();
    let sockets: Vec<&str> = sockets.iter().flat_map(|path| ["--also", path.to_str().must("a path")]).collect();
    let said = story.ctl("h1", &[&["-o", "json", "mesh"], sockets.as_slice()].concat());
    assert!(matches!(said.code, Some(0 | 3)), "{} {}", said.out, said.err);
    serde_json::from_str(&said.out).must("the matrix")
}

/// How one host reaches another, over all families.
fn states(matrix: &Matrix, from: &str, to: &str) -> Vec<Reach> {
    let paths = matrix.paths.iter().filter(|p| p.from == from && p.found.host.as_deref() == Some(to));
    paths.map(|p| p.found.state).collect()
}

/// A sample of h1's metrics.
fn sample(story: &Story, name: &str) -> f64 {
    let page = http::ask(&story.at("h1").socket(), "GET", "/metrics", "").body;
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    value.must(&format!("{name} in {page}"))
}

/// How many peers of h1 are in a state, by its metrics.
fn counted(story: &Story, state: Reach) -> f64 {
    sample(story, &format!("overlayd_mesh_peers{{state=\"{}\"}}", state.word()))
}

async fn becomes(story: &Story, what: &str, holds: impl Fn(&Matrix) -> bool) -> Matrix {
    eventually(what, ROUNDS, || {
        let matrix = mesh(story);
        if holds(&matrix) { Ok(matrix) } else { Err(format!("{matrix:#?}").chars().take(3000).collect()) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_are_told_apart() {
    let story = lab(Families::Dual).await;
    let all_well = |m: &Matrix| m.paths.len() == 12 && m.paths.iter().all(|p| p.found.state == Reach::Ok);
    let matrix = becomes(&story, "everyone reaches everyone", all_well).await;
    assert_eq!(matrix.hosts, ["h1", "h2", "h3"]);
    assert!(matrix.paths.iter().all(|p| p.found.overlay.mean_micros.is_some() && p.found.underlay.mean_micros.is_some()));
    eventually("the metrics say the same", ROUNDS, || {
        let (well, probing) = (counted(&story, Reach::Ok), sample(&story, "overlayd_mesh_probing"));
        if (well, probing) == (4.0, 1.0) { Ok(()) } else { Err(format!("{well} {probing}")) }
    })
    .await;
    for way in ["overlay", "underlay"] {
        assert!(sample(&story, &format!("overlayd_mesh_round_trip_seconds_count{{way=\"{way}\"}}")) >= 4.0, "{way}");
        let worst = sample(&story, &format!("overlayd_mesh_worst_round_trip_seconds{{way=\"{way}\"}}"));
        assert!(worst > 0.0 && worst < 2.0, "{way}: {worst} s");
    }
    // The same over TCP, which the other hosts' agents are asked by.
    let over_tcp: Matrix = story.ctl("h1", &["-o", "json", "mesh", "--port", "9780"]).exits(0).json();
    assert_eq!((over_tcp.hosts.len(), over_tcp.missing.len()), (3, 0), "{over_tcp:#?}");
    let text = story.ctl("h1", &["mesh", "--port", "9781"]).exits(0).out;
    assert!(text.contains("no row of h2") && text.contains("--metrics-listen"), "{text}");

    // Only the tunnel: the port of VXLAN is shut at h2.
    kernel::shell(
        &story,
        "h2",
        "nft 'add table inet shut; add chain inet shut i { type filter hook input priority -400; }; add rule inet shut i udp dport 8472 drop'",
    );
    let matrix = becomes(&story, "only the overlay to h2 is down", |m| {
        states(m, "h1", "h2") == [Reach::OverlayDown; 2] && states(m, "h1", "h3") == [Reach::Ok; 2]
    })
    .await;
    assert_eq!(matrix.paths[0].found.state, Reach::OverlayDown, "the worst is first");
    // Another round may have gone by since.
    eventually("the metrics say the same", ROUNDS, || {
        let states = [Reach::OverlayDown, Reach::Ok].map(|state| counted(&story, state));
        if states == [2.0, 2.0] { Ok(()) } else { Err(format!("{states:?}")) }
    })
    .await;
    assert!(sample(&story, "overlayd_mesh_lost_probes_total{way=\"overlay\"}") >= 4.0);
    story.ctl("h1", &["mesh"]).exits(3);
    let now: Matrix = story.ctl("h1", &["-o", "json", "ping-mesh"]).exits(3).json();
    assert_eq!((states(&now, "h1", "h2"), states(&now, "h1", "h3")), (vec![Reach::OverlayDown; 2], vec![Reach::Ok; 2]));
    kernel::shell(&story, "h2", "nft delete table inet shut");

    // Only the underlay's ICMP.
    kernel::shell(
        &story,
        "h2",
        "nft 'add table inet shut; add chain inet shut i { type filter hook input priority -400; }; \
         add rule inet shut i iifname eth0 icmp type echo-request drop; add rule inet shut i iifname eth0 icmpv6 type echo-request drop'",
    );
    becomes(&story, "only the underlay to h2 is silent", |m| states(m, "h1", "h2") == [Reach::UnderlaySilent; 2]).await;
    kernel::shell(&story, "h2", "nft delete table inet shut");

    // Cut off, and alive: its agent still renews.
    for device in ["underlay drop in", "underlay drop out"] {
        let hook = if device.ends_with("in") { "input" } else { "output" };
        kernel::shell(
            &story,
            "h3",
            &format!(
                "nft 'add table inet cut; add chain inet cut {hook} {{ type filter hook {hook} priority -400; }}; \
                 add rule inet cut {hook} ip saddr 10.99.1.0/24 ip daddr 10.99.1.0/24 drop; add rule inet cut {hook} ip6 saddr fd99::1:0/112 ip6 daddr fd99::1:0/112 drop'"
            ),
        );
    }
    let matrix = becomes(&story, "h3 is cut off", |m| states(m, "h1", "h3") == [Reach::Unreachable; 2]).await;
    let path = matrix.paths.iter().find(|p| p.from == "h1" && p.found.host.as_deref() == Some("h3")).must("h3");
    assert!(path.lease_idle_seconds == Some(0) && path.says.contains("rather than down"), "{path:#?}");
    // It leaves: its lease is gone.
    story.at("h3").agent_stop(Signal::SIGKILL).must("stop the agent");
    etcd::delete(&story, &story.lease_of("h3").key);
    let matrix = becomes(&story, "h3 has gone", |m| {
        let found = states(m, "h1", "h3");
        !found.is_empty() && found.iter().all(|state| *state == Reach::Gone)
    })
    .await;
    let path = matrix.paths.iter().find(|p| p.from == "h1" && p.found.host.as_deref() == Some("h3")).must("h3");
    assert_eq!((counted(&story, Reach::Unreachable), counted(&story, Reach::Unknown)), (0.0, 0.0), "what has gone is no peer");
    assert!(path.says.contains("its lease ended") && matrix.missing.len() == 1, "{matrix:#?}");
}

/// Echo requests that a host has sent since it was made.
fn sent(story: &Story, host: &str) -> u64 {
    let text = kernel::shell(story, host, "grep ^Icmp: /proc/net/snmp");
    let mut lines = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let (names, values) = (lines.next().must("names"), lines.next().must("values"));
    let at = names.iter().position(|name| *name == "OutEchos").must("OutEchos");
    values[at].parse().must("a number")
}

async fn pair(interval: &str) -> Story {
    Story::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.agent_args = vec![format!("--mesh-interval={interval}")];
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn switched_off_nothing_is_sent() {
    let story = pair("0s").await;
    let said = story.ctl("h1", &["mesh"]).exits(3).out;
    assert!(said.contains("switched off"), "{said}");
    assert_eq!(sample(&story, "overlayd_mesh_probing"), 0.0);
    let before = sent(&story, "h1");
    let probed: Matrix = story.ctl("h1", &["-o", "json", "ping-mesh", "--count", "2"]).exits(0).json();
    assert_eq!(states(&probed, "h1", "h2"), [Reach::Ok]);
    assert_eq!(sent(&story, "h1") - before, 4, "two probes of two paths, and nothing beside");
}

/// A round every millisecond would be 2,000 echo requests a second: no more are sent than promised.
#[tokio::test(flavor = "multi_thread")]
async fn the_rate_is_bounded() {
    let story = pair("1ms").await;
    eventually("it probes", SOON, || if sent(&story, "h1") > 4 { Ok(()) } else { Err(sent(&story, "h1").to_string()) }).await;
    let (from, start) = (sent(&story, "h1"), Instant::now());
    eventually("a hundred probes", ROUNDS, || {
        let now = sent(&story, "h1");
        if now >= from + 100 { Ok(()) } else { Err(now.to_string()) }
    })
    .await;
    let (count, took) = (sent(&story, "h1") - from, start.elapsed());
    // One more may stand on either edge.
    assert!(f64::from(u32::try_from(count).must("few")) <= 50.0 * took.as_secs_f64() + 2.0, "{count} in {took:?}");
}
