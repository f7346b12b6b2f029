//! `overlayctl trace`: a packet's path on a healthy lab, and with each part broken manually, without an agent to repair it.

use std::net::IpAddr;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::{ExpectContext, TestLab, eventually, kernel};
use overlayctl::lab::Families;
use overlayctl::trace::{Trace, TraceOutcome};

async fn start_lab(families: Families) -> TestLab {
    TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 2;
        options.families = families;
    })
    .await
}

/// The address of a container `HOST-NAME`.
async fn address(lab: &TestLab, container: &str, family: Family) -> IpAddr {
    let (host, name) = container.split_once('-').expect_ok("HOST-NAME");
    let endpoints = lab.host(host).client().endpoints().await.expect_ok(host).endpoints;
    *endpoints.iter().find(|e| e.name.as_str() == name).expect_ok(container).addresses().get(family).expect_ok("its address")
}

/// Runs a trace and checks that its exit code fits its outcome.
#[track_caller]
fn trace(lab: &TestLab, arguments: &[&str]) -> Trace {
    let state = lab.host("h1").state_dir();
    let state = state.to_str().expect_ok("a path");
    let output = lab.ctl("h1", &[&["-o", "json", "trace", "--state-dir", state], arguments].concat());
    let trace: Trace =
        serde_json::from_str(&output.stdout).unwrap_or_else(|e| panic!("{e}: {} {}", output.stdout, output.stderr));
    let live = trace.live.as_ref().is_some_and(|live| live.dropped);
    let code = match trace.outcome {
        _ if live => 1,
        TraceOutcome::Ok => 0,
        TraceOutcome::Stop => 1,
        TraceOutcome::Unsure => 3,
    };
    assert_eq!(output.code, Some(code), "{trace:#?}");
    trace
}

/// The hops, as `PLACE/STEP`.
fn hop_names(trace: &Trace) -> Vec<String> {
    trace.hops.iter().map(|hop| format!("{}/{}", hop.place, hop.step)).collect()
}

/// Checks that the trace stops at this hop, with these words.
#[track_caller]
fn assert_stops_at(trace: &Trace, at: &str, words: &[&str], what: &str) {
    let last = trace.hops.last().expect_ok("a hop");
    assert_eq!((trace.outcome, format!("{}/{}", last.place, last.step).as_str()), (TraceOutcome::Stop, at), "{what}: {trace:#?}");
    let text = format!("{} {}", last.answer, last.remedy.as_deref().expect_ok("a remedy"));
    for word in words {
        assert!(text.contains(word), "{what}: `{word}` in {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn trace_passes_on_healthy_lab() {
    let lab = start_lab(Families::Dual).await;
    lab.ctl("h1", &["attach", "web", "--publish", "8080:80"]).assert_code(0);
    for family in Family::ALL {
        let flag: &[&str] = if family == Family::V6 { &["-6"] } else { &[] };
        let trace_ends = |ends: &[&str]| {
            let trace = trace(&lab, &[flag, ends].concat());
            assert_eq!(trace.outcome, TraceOutcome::Ok, "{ends:?}: {trace:#?}");
            trace
        };
        let far = address(&lab, "h2-c1", family).await.to_string();
        let near = address(&lab, "h1-c1", family).await;
        // To another host: every entry on the path.
        let over = trace_ends(&["c1", &far]);
        let peer = lab.host("h1").client().peers().await.expect_ok("peers").peers;
        let peer = peer.into_iter().find(|p| p.subnet.family() == family).expect_ok("a peer");
        for step in ["host/route", "host/next hop", "host/neighbour", "host/fdb", "host/outer route", "host/rules forward"] {
            assert!(hop_names(&over).iter().any(|s| s == step), "{step} in {over:#?}");
        }
        let answer = |step: &str| over.hops.iter().find(|h| h.step == step).expect_ok(step).answer.clone();
        assert!(
            answer("fdb").contains(&peer.vtep.expect_ok("its MAC").to_string())
                && answer("fdb").contains(&peer.public_ip.to_string())
        );
        assert!(over.end.contains("h2") && over.to.what == "on host h2" && over.from.address == near, "{over:#?}");
        assert!(over.hops.iter().any(|h| h.step == "translation" && h.answer.starts_with("none")), "{over:#?}");
        // The other host's half, from its side.
        let back = trace_ends(&[&far, "c1"]);
        assert!(
            hop_names(&back).contains(&"host/outer rules input".to_owned()) && back.end.contains("container c1"),
            "{back:#?}"
        );
        // On this host, to this host, from this host, to a host by its name.
        assert_eq!(trace_ends(&["c1", "c2"]).hops.last().map(|h| h.place.clone()).as_deref(), Some("container c2"));
        assert!(trace_ends(&["c1", "host"]).end.contains("this host"));
        assert!(trace_ends(&["host", &far]).end.contains("h2"));
        assert_eq!(trace_ends(&["c1", "h2"]).to.address, peer.subnet.base());
        // To the outside.
        let outside = overlayctl::lab::layout::outside_address(family).to_string();
        let out = trace_ends(&["c1", &outside]);
        assert!(out.hops.iter().any(|h| h.step == "translation" && h.answer.contains("masquerade")), "{out:#?}");
        // A published port, from outside.
        let public =
            lab.status("h1").await.underlay.expect_ok("an underlay").public_ip.get(family).expect_ok("an address").to_string();
        let public = if family == Family::V6 { format!("[{public}]:8080") } else { format!("{public}:8080") };
        let published = trace_ends(&[&outside, &public]);
        let web = address(&lab, "h1-web", family).await.to_string();
        let translation = published.hops.iter().find(|h| h.step == "translation").expect_ok("a translation");
        assert!(translation.answer.contains(&web) && published.end.contains("container web"), "{published:#?}");
    }
    let text = lab.ctl("h1", &["trace", "c1", "h2"]).assert_code(0).stdout;
    assert!(text.contains("It passes") && text.contains("WHERE"), "{text}");
    lab.ctl("h1", &["trace", "nobody", "h2"])
        .assert_code(1)
        .assert_stderr_contains(&["`nobody` is not a container of this host"]);
    lab.ctl("h1", &["trace", "c1", "h2:x"]).assert_code(1).assert_stderr_contains(&["`h2:x`: the port is not a number"]);
}

/// A fault, its script, the hop and words of the trace's answer. Script arguments: `$1` the container's address on the other
/// host, `$2` the MAC, `$3` the base, `$4` the id of the next hop, `$5` the port of the container's bridge.
const DATA_PATH_FAULTS: [(&str, &str, &str, &[&str]); 13] = [
    ("FDB entry", "bridge fdb del $2 dev ovx.1", "host/fdb", &["has no entry for"]),
    ("neighbour", "ip neigh del $3 dev ovx.1", "host/neighbour", &["on ovx.1"]),
    (
        "next hop elsewhere",
        "ip nexthop replace id $4 via 10.244.0.9 dev ovx.1 onlink",
        "host/next hop",
        &["10.244.0.9", "not the peer"],
    ),
    ("next hop gone", "ip nexthop del id $4", "host/route", &["no peer's route covers it", "agent does not answer"]),
    ("route gone", "ip route del $3/24", "host/route", &["no peer's route covers it"]),
    (
        "FDB entry to this host",
        "bridge fdb replace $2 dev ovx.1 dst 10.99.1.1 self permanent",
        "host/outer route",
        &["own address"],
    ),
    ("tunnel down", "ip link set ovx.1 down", "host/route", &["in the overlay network"]),
    ("port down", "ip link set $5 down", "host/port", &["is down"]),
    ("port off the bridge", "ip link set $5 nomaster", "host/port", &["is not a port of ovb.1"]),
    ("bridge down", "ip link set ovb.1 down", "host/bridge", &["is down"]),
    ("forwarding off", "sysctl -qw net.ipv4.ip_forward=0", "host/forwarding", &["is 0"]),
    (
        "a forward chain that drops",
        "nft 'add table inet block; add chain inet block f { type filter hook forward priority 10; }; add rule inet block f ip daddr { 10.244.0.0/16 } counter drop comment \"shut\"'",
        "host/rules forward",
        &["chain inet block f", "shut"],
    ),
    (
        "an output chain whose policy drops the tunnel",
        "nft 'add table ip out; add chain ip out o { type filter hook output priority 0; policy drop; }; add rule ip out o tcp dport 22 accept; add rule ip out o udp dport != 8472 accept'",
        "host/outer rules output",
        &["the policy of chain ip out o"],
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn trace_names_each_broken_part() {
    let lab = start_lab(Families::V4).await;
    let far = address(&lab, "h2-c1", Family::V4).await.to_string();
    let endpoints = lab.host("h1").client().endpoints().await.expect_ok("endpoints").endpoints;
    let port = endpoints[0].port.clone().expect_ok("a port").host_interface;
    for (what, script, at, words) in DATA_PATH_FAULTS {
        let peer = lab.host("h1").client().peers().await.expect_ok("peers").peers.remove(0);
        assert_eq!(trace(&lab, &["c1", &far]).outcome, TraceOutcome::Ok, "before: {what}");
        lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("stop the agent");
        let id = peer.nexthop_id.expect_ok("a next hop").to_string();
        let (mac, base) = (peer.vtep.expect_ok("its MAC").to_string(), peer.subnet.base().to_string());
        kernel::run(&lab, "h1", &["sh", "-ec", script, "sh", &far, &mac, &base, &id, &port]);
        let found = trace(&lab, &["c1", &far]);
        assert_stops_at(&found, at, words, what);
        assert!(found.notes.iter().any(|note| note.contains("Names come from")), "{what}: {found:#?}");
        kernel::shell(&lab, "h1", "for t in 'inet block' 'ip out'; do nft delete table $t 2>/dev/null || true; done");
        lab.start_agent("h1").await;
    }
}

/// With a hanging agent the kernel is still queried; with a responsive one leases are shown as well.
#[tokio::test(flavor = "multi_thread")]
async fn trace_covers_underlay_containers_and_leases() {
    let lab = start_lab(Families::V4).await;
    let far = address(&lab, "h2-c1", Family::V4).await.to_string();
    // The container's own part.
    kernel::shell(&lab, "h1-c1", "ip route del default");
    assert_stops_at(&trace(&lab, &["c1", &far]), "container c1/route", &["no route", "inspect c1"], "the default route");
    kernel::shell(&lab, "h1-c2", "ip link set eth0 down");
    assert_stops_at(
        &trace(&lab, &["host", &address(&lab, "h1-c2", Family::V4).await.to_string()]),
        "host/port",
        &["no carrier"],
        "eth0",
    );
    lab.ctl("h1", &["attach", "c1"]).assert_code(0);
    // The underlay: the peer is down.
    kernel::shell(&lab, "h2", "ip link set eth0 down");
    kernel::run(&lab, "h1", &["sh", "-c", "ip neigh flush dev eth0; ping -c 1 -W 1 10.99.1.2 || true"]);
    eventually("the neighbour entry has failed", CONVERGE_TIMEOUT, || {
        let found = trace(&lab, &["c1", &far]);
        let last = found.hops.last().expect_ok("a hop").clone();
        if last.step == "outer neighbour" && last.outcome == TraceOutcome::Stop { Ok(()) } else { Err(format!("{last:?}")) }
    })
    .await;
    kernel::shell(&lab, "h2", "ip link set eth0 up");
    // Its lease ends while this host's agent watches.
    lab.host("h2").agent_stop(Signal::SIGKILL).expect_ok("stop the agent");
    let lease = lab.lease_of("h2");
    overlay_tests::etcd::delete(&lab, &lease.key);
    eventually("the peer is gone", CONVERGE_TIMEOUT, || {
        let found = trace(&lab, &["c1", &far]);
        let last = found.hops.last().expect_ok("a hop").clone();
        let is_reported = last.step == "route" && last.answer.contains("no host holds a subnet with it");
        if is_reported { Ok(()) } else { Err(format!("{last:?}")) }
    })
    .await;
    // A running agent that does not answer.
    let pid = lab.host("h1").agent().expect_ok("an agent");
    pid.signal(Signal::SIGSTOP).expect_ok("stop it");
    let found = trace(&lab, &["c1", "host"]);
    assert_eq!(found.outcome, TraceOutcome::Ok, "{found:#?}");
    assert!(found.notes.iter().any(|note| note.contains("did not answer")), "{found:#?}");
    pid.signal(Signal::SIGCONT).expect_ok("SIGCONT");
}

#[tokio::test(flavor = "multi_thread")]
async fn live_trace_shows_packets() {
    let lab = start_lab(Families::Dual).await;
    for family in Family::ALL {
        let flag: &[&str] = if family == Family::V6 { &["-6"] } else { &[] };
        let far = address(&lab, "h2-c1", family).await.to_string();
        let found = trace(&lab, &[flag, &["c1", &far, "--live", "--send", "--wait", "20s"]].concat());
        let live = found.live.expect_ok("the live part");
        assert!(live.answered && !live.dropped, "{live:#?}");
        let tunnel = if family == Family::V4 { "ovx.1" } else { "ovx6.1" };
        let at = |packet: &str, place: &str, what: &str| {
            live.interfaces.iter().any(|s| s.packet == packet && s.place == place && s.what.contains(what))
        };
        assert!(
            at("request", "ovb.1", "in") && at("request", tunnel, "out") && at("request", "eth0", "in VXLAN from"),
            "{live:#?}"
        );
        assert!(at("reply", "eth0", "in VXLAN from") && at("reply", tunnel, "in"), "{live:#?}");
        assert!(live.rules.iter().any(|s| s.place == "inet overlayd incoming" && s.what.ends_with("accept")), "{live:#?}");
    }
    // A rule that `trace` cannot evaluate, and that drops each packet.
    let far = address(&lab, "h2-c1", Family::V4).await.to_string();
    kernel::shell(
        &lab,
        "h1",
        "nft 'add table inet block; add chain inet block f { type filter hook forward priority 10; }; \
         add rule inet block f ip daddr 10.244.0.0/16 meta length > 20 drop'",
    );
    let found = trace(&lab, &["c1", &far, "--live", "--send", "--wait", "20s"]);
    assert_eq!(found.outcome, TraceOutcome::Unsure, "{found:#?}");
    let live = found.live.expect_ok("the live part");
    assert!(live.dropped && !live.answered && live.summary.contains("inet block f"), "{live:#?}");
    kernel::shell(&lab, "h1", "nft delete table inet block");
    // No leftovers, not even of a killed one.
    let tables = || kernel::run(&lab, "h1", &["nft", "list", "tables"]);
    assert!(!tables().contains("overlay-trace"), "{}", tables());
    let program = overlay_tests::programs::overlayctl();
    let program = program.to_str().expect_ok("a path");
    let socket = lab.host("h1").socket();
    let socket = socket.to_str().expect_ok("a path");
    let command = [program, "--socket", socket, "trace", "c1", &far, "--live", "--wait", "60s"];
    let mut watcher = lab.command("h1", &command).expect_ok("a command");
    watcher.stdout(std::process::Stdio::null());
    let mut watcher = lab.open_netns("h1").run(|| watcher.spawn()).expect_ok("enter the host").expect_ok("a watcher");
    eventually(
        "the watch has begun",
        CONVERGE_TIMEOUT,
        || if tables().contains("overlay-trace") { Ok(()) } else { Err(tables()) },
    )
    .await;
    watcher.kill().expect_ok("kill it");
    watcher.wait().expect_ok("its end");
    eventually(
        "its tables are gone",
        CONVERGE_TIMEOUT,
        || if tables().contains("overlay-trace") { Err(tables()) } else { Ok(()) },
    )
    .await;
}
