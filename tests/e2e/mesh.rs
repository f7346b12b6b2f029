//! `overlayctl mesh` and `overlayctl ping-mesh`: a healthy mesh, overlay and underlay faults, a host down, a departed host, the
//! cost.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use overlay_agent::model::api::Reachability;
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::{ExpectContext, TestLab, etcd, eventually, http, kernel};
use overlayctl::cmd::mesh::Matrix;
use overlayctl::lab::Families;

/// With rounds of one second, two missed rounds make a path silent.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);

async fn start_lab(families: Families) -> TestLab {
    TestLab::up(|options| {
        options.hosts = 3;
        options.containers = 0;
        options.families = families;
        options.agent_args = vec!["--mesh-interval=1s".to_owned(), "--metrics-listen=0.0.0.0:9780".to_owned()];
    })
    .await
}

/// The complete matrix, from the sockets of the lab's hosts.
fn read_matrix(lab: &TestLab) -> Matrix {
    let sockets: Vec<PathBuf> = ["h2", "h3"].iter().map(|host| lab.host(host).socket()).collect();
    let sockets: Vec<&str> = sockets.iter().flat_map(|path| ["--also", path.to_str().expect_ok("a path")]).collect();
    let output = lab.ctl("h1", &[&["-o", "json", "mesh"], sockets.as_slice()].concat());
    assert!(matches!(output.code, Some(0 | 3)), "{} {}", output.stdout, output.stderr);
    serde_json::from_str(&output.stdout).expect_ok("the matrix")
}

/// The reachability from one host to another, in all families.
fn states(matrix: &Matrix, from: &str, to: &str) -> Vec<Reachability> {
    let paths = matrix.paths.iter().filter(|p| p.from == from && p.entry.host.as_deref() == Some(to));
    paths.map(|p| p.entry.state).collect()
}

/// A sample of h1's metrics.
fn metric_sample(lab: &TestLab, name: &str) -> f64 {
    let page = http::request(&lab.host("h1").socket(), "GET", "/metrics", "").body;
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    value.expect_ok(&format!("{name} in {page}"))
}

/// The number of h1's peers in a state, from its metrics.
fn peer_count(lab: &TestLab, state: Reachability) -> f64 {
    metric_sample(lab, &format!("overlayd_mesh_peers{{state=\"{}\"}}", state.as_str()))
}

async fn wait_matrix(lab: &TestLab, what: &str, condition: impl Fn(&Matrix) -> bool) -> Matrix {
    eventually(what, PROBE_TIMEOUT, || {
        let matrix = read_matrix(lab);
        if condition(&matrix) { Ok(matrix) } else { Err(format!("{matrix:#?}").chars().take(3000).collect()) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn overlay_and_underlay_faults_are_distinguished() {
    let lab = start_lab(Families::Dual).await;
    let all_ok = |m: &Matrix| m.paths.len() == 12 && m.paths.iter().all(|p| p.entry.state == Reachability::Ok);
    let matrix = wait_matrix(&lab, "every host reaches every host", all_ok).await;
    assert_eq!(matrix.hosts, ["h1", "h2", "h3"]);
    assert!(matrix.paths.iter().all(|p| p.entry.overlay.mean_micros.is_some() && p.entry.underlay.mean_micros.is_some()));
    eventually("the metrics say the same", PROBE_TIMEOUT, || {
        let (reachable, probing) = (peer_count(&lab, Reachability::Ok), metric_sample(&lab, "overlayd_mesh_probing"));
        if (reachable, probing) == (4.0, 1.0) { Ok(()) } else { Err(format!("{reachable} {probing}")) }
    })
    .await;
    for way in ["overlay", "underlay"] {
        assert!(metric_sample(&lab, &format!("overlayd_mesh_round_trip_seconds_count{{way=\"{way}\"}}")) >= 4.0, "{way}");
        let worst = metric_sample(&lab, &format!("overlayd_mesh_worst_round_trip_seconds{{way=\"{way}\"}}"));
        assert!(worst > 0.0 && worst < 2.0, "{way}: {worst} s");
    }
    // The same over TCP, by which the other hosts' agents are queried.
    let over_tcp: Matrix = lab.ctl("h1", &["-o", "json", "mesh", "--port", "9780"]).assert_code(0).json();
    assert_eq!((over_tcp.hosts.len(), over_tcp.missing.len()), (3, 0), "{over_tcp:#?}");
    let text = lab.ctl("h1", &["mesh", "--port", "9781"]).assert_code(0).stdout;
    assert!(text.contains("no row from h2") && text.contains("--metrics-listen"), "{text}");

    // Only the tunnel fails: h2 drops VXLAN's port.
    kernel::shell(
        &lab,
        "h2",
        "nft 'add table inet shut; add chain inet shut i { type filter hook input priority -400; }; add rule inet shut i udp dport 8472 drop'",
    );
    let matrix = wait_matrix(&lab, "only the overlay to h2 is down", |m| {
        states(m, "h1", "h2") == [Reachability::OverlayDown; 2] && states(m, "h1", "h3") == [Reachability::Ok; 2]
    })
    .await;
    assert_eq!(matrix.paths[0].entry.state, Reachability::OverlayDown, "the worst is first");
    // Another round may have passed since.
    eventually("the metrics say the same", PROBE_TIMEOUT, || {
        let states = [Reachability::OverlayDown, Reachability::Ok].map(|state| peer_count(&lab, state));
        if states == [2.0, 2.0] { Ok(()) } else { Err(format!("{states:?}")) }
    })
    .await;
    assert!(metric_sample(&lab, "overlayd_mesh_lost_probes_total{way=\"overlay\"}") >= 4.0);
    lab.ctl("h1", &["mesh"]).assert_code(3);
    let now: Matrix = lab.ctl("h1", &["-o", "json", "ping-mesh"]).assert_code(3).json();
    assert_eq!(
        (states(&now, "h1", "h2"), states(&now, "h1", "h3")),
        (vec![Reachability::OverlayDown; 2], vec![Reachability::Ok; 2])
    );
    kernel::shell(&lab, "h2", "nft delete table inet shut");

    // Only the underlay's ICMP fails.
    kernel::shell(
        &lab,
        "h2",
        "nft 'add table inet shut; add chain inet shut i { type filter hook input priority -400; }; \
         add rule inet shut i iifname eth0 icmp type echo-request drop; add rule inet shut i iifname eth0 icmpv6 type echo-request drop'",
    );
    wait_matrix(&lab, "only the underlay to h2 is silent", |m| states(m, "h1", "h2") == [Reachability::UnderlaySilent; 2]).await;
    kernel::shell(&lab, "h2", "nft delete table inet shut");

    // Partitioned but alive: its agent still renews its lease.
    for device in ["underlay drop in", "underlay drop out"] {
        let hook = if device.ends_with("in") { "input" } else { "output" };
        kernel::shell(
            &lab,
            "h3",
            &format!(
                "nft 'add table inet cut; add chain inet cut {hook} {{ type filter hook {hook} priority -400; }}; \
                 add rule inet cut {hook} ip saddr 10.99.1.0/24 ip daddr 10.99.1.0/24 drop; add rule inet cut {hook} ip6 saddr fd99::1:0/112 ip6 daddr fd99::1:0/112 drop'"
            ),
        );
    }
    let matrix = wait_matrix(&lab, "h3 is cut off", |m| states(m, "h1", "h3") == [Reachability::Unreachable; 2]).await;
    let path = matrix.paths.iter().find(|p| p.from == "h1" && p.entry.host.as_deref() == Some("h3")).expect_ok("h3");
    assert!(path.lease_idle_seconds == Some(0) && path.says.contains("not down"), "{path:#?}");
    // It leaves: its lease is deleted.
    lab.host("h3").agent_stop(Signal::SIGKILL).expect_ok("stop the agent");
    etcd::delete(&lab, &lab.lease_of("h3").key);
    let matrix = wait_matrix(&lab, "h3 has gone", |m| {
        let found = states(m, "h1", "h3");
        !found.is_empty() && found.iter().all(|state| *state == Reachability::Gone)
    })
    .await;
    let path = matrix.paths.iter().find(|p| p.from == "h1" && p.entry.host.as_deref() == Some("h3")).expect_ok("h3");
    assert_eq!(
        (peer_count(&lab, Reachability::Unreachable), peer_count(&lab, Reachability::Unknown)),
        (0.0, 0.0),
        "a departed host is not a peer"
    );
    assert!(path.says.contains("its lease ended") && matrix.missing.len() == 1, "{matrix:#?}");
}

/// The number of echo requests that a host has sent since its creation.
fn echo_requests_sent(lab: &TestLab, host: &str) -> u64 {
    let text = kernel::shell(lab, host, "grep ^Icmp: /proc/net/snmp");
    let mut lines = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let (names, values) = (lines.next().expect_ok("names"), lines.next().expect_ok("values"));
    let at = names.iter().position(|name| *name == "OutEchos").expect_ok("OutEchos");
    values[at].parse().expect_ok("a number")
}

async fn start_pair(interval: &str) -> TestLab {
    TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.agent_args = vec![format!("--mesh-interval={interval}")];
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn disabled_probing_sends_nothing() {
    let lab = start_pair("0s").await;
    let output = lab.ctl("h1", &["mesh"]).assert_code(3).stdout;
    assert!(output.contains("switched off"), "{output}");
    assert_eq!(metric_sample(&lab, "overlayd_mesh_probing"), 0.0);
    let before = echo_requests_sent(&lab, "h1");
    let probed: Matrix = lab.ctl("h1", &["-o", "json", "ping-mesh", "--count", "2"]).assert_code(0).json();
    assert_eq!(states(&probed, "h1", "h2"), [Reachability::Ok]);
    assert_eq!(echo_requests_sent(&lab, "h1") - before, 4, "two probes of two paths, and no others");
}

/// An interval of a millisecond would give 2,000 echo requests a second: the documented limit holds.
#[tokio::test(flavor = "multi_thread")]
async fn probe_rate_is_bounded() {
    let lab = start_pair("1ms").await;
    eventually("it probes", CONVERGE_TIMEOUT, || {
        if echo_requests_sent(&lab, "h1") > 4 { Ok(()) } else { Err(echo_requests_sent(&lab, "h1").to_string()) }
    })
    .await;
    let (from, start) = (echo_requests_sent(&lab, "h1"), Instant::now());
    eventually("a hundred probes", PROBE_TIMEOUT, || {
        let now = echo_requests_sent(&lab, "h1");
        if now >= from + 100 { Ok(()) } else { Err(now.to_string()) }
    })
    .await;
    let (count, took) = (echo_requests_sent(&lab, "h1") - from, start.elapsed());
    // One more may fall on either edge of the interval.
    assert!(f64::from(u32::try_from(count).expect_ok("few")) <= 50.0 * took.as_secs_f64() + 2.0, "{count} in {took:?}");
}
