//! Invalid requests and containers that die during an attach: a clear error, and no leftovers.

use std::net::TcpListener;
use std::process::{Command, Stdio};

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::api::{AttachResponse, ErrorBody};
use overlay_tests::dump::NetnsDump;
use overlay_tests::leftovers::Leftovers;
use overlay_tests::programs::require_program;
use overlay_tests::test_lab::CONVERGE_TIMEOUT;
use overlay_tests::{ExpectContext, TestLab, eventually, http, kernel};
use overlayctl::lab::Families;

#[tokio::test(flavor = "multi_thread")]
async fn invalid_attach_values_are_rejected() {
    let lab = TestLab::one_host(Families::Dual).await;
    let held: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "held", "--publish", "8080:80"]).assert_code(0).json();
    let taken = held.endpoint.addresses().v4.expect_ok("IPv4").to_string();
    let mac = held.endpoint.port.expect_ok("a port").mac.to_string();
    // A host's socket listens on a port.
    let listener = lab.open_netns("h1").run(|| TcpListener::bind("0.0.0.0:0")).expect_ok("enter").expect_ok("a port");
    let busy = listener.local_addr().expect_ok("bound").port();
    let (busy_port, own) = (format!("{busy}:80"), format!("(process {})", std::process::id()));
    let before = Leftovers::baseline(&lab).await;
    let long = "x".repeat(300);
    for (arguments, code, wanted) in [
        (&["attach", "a/b"][..], 2, &["`a/b` is no endpoint name"][..]),
        (&["attach", "../a"], 2, &["is no endpoint name"]),
        (&["attach", &long], 2, &["is no endpoint name: 1 to 63"]),
        (&["attach", "a\u{1b}[31m"], 2, &["is no endpoint name"]),
        (&["attach", "a", "--netns", "/etc/passwd"], 1, &["/etc/passwd"]),
        (&["attach", "a", "--netns", "/run"], 1, &["/run"]),
        (&["attach", "a", "--netns", "/proc/self/ns/mnt"], 1, &["no network namespace at /proc/self/ns/mnt"]),
        (&["attach", "a", "--interface", "eth 0"], 1, &["invalid interface name"]),
        (&["attach", "a", "--ip", &taken], 1, &[&taken, "in use by endpoint held"]),
        (&["attach", "a", "--ip", "192.0.2.1"], 1, &["192.0.2.1", "outside this host's subnet"]),
        (&["attach", "a", "--mac", &mac], 1, &[&mac, "in use by endpoint held"]),
        (&["attach", "a", "--publish", "80"], 2, &["`80` is not a valid published port"]),
        (&["attach", "a", "--publish", "8000-8100:1-101"], 1, &["endpoint held has 8080:80/tcp"]),
        (&["attach", "a", "--publish", &busy_port], 1, &[&busy_port, &own, "listens on 0.0.0.0"]),
        (&["attach", "a", "--publish", "8472:1/udp"], 1, &["8472:1/udp", "the kernel"]),
        (&["attach", "a", "--publish", "192.0.2.250:81:80"], 1, &["the host has no address 192.0.2.250"]),
        (
            &["attach", "a", "--publish", "81:1", "--publish", "80-81:5-6"],
            1,
            &["map the same host port to different container ports"],
        ),
        (&["run", "--publish", &busy_port, "--", "true"], 1, &[&own]),
    ] {
        lab.ctl("h1", arguments).assert_code(code).assert_stderr_contains(wanted);
        before.assert_unchanged(&lab, &arguments.join(" ")).await;
    }
    // The same directly over the socket, with values that no command line would send.
    let socket = lab.host("h1").socket();
    let put = |path: &str, body: &str| http::request(&socket, "PUT", path, body);
    for (path, body, status) in [
        ("/v1/endpoints/a%2Fb", r#"{"netns": "/run/netns/x"}"#, 400),
        (&format!("/v1/endpoints/{long}"), r#"{"netns": "/run/netns/x"}"#, 400),
        ("/v1/endpoints/a", r#"{"netns": "x"}"#, 400),
        ("/v1/endpoints/a", r#"{"mode": "macvlan", "netns": "/run/netns/x"}"#, 400),
        ("/v1/endpoints/a", r#"{"mode": "host", "publish": [{"host_port": 1, "container_port": 1}]}"#, 400),
        ("/v1/endpoints/a", r#"{"mode": "container:nobody"}"#, 404),
        ("/v1/endpoints/a", r#"{"netns": "/run/netns/x", "colour": "red"}"#, 400),
        (
            "/v1/endpoints/a",
            r#"{"netns": "/run/netns/x", "publish": [{"host_port": 65535, "container_port": 1, "count": 2}]}"#,
            400,
        ),
        ("/v1/endpoints/a", r#"{"netns": "/run/netns/x", "owner": "a\nb"}"#, 400),
        ("/v1/endpoints/a", "{", 400),
    ] {
        let answer = put(path, body);
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.body);
        assert!(!answer.json::<ErrorBody>().error.is_empty());
    }
    before.assert_unchanged(&lab, "requests by the socket").await;
    drop(listener);
    lab.ctl("h1", &["attach", "a", "--publish", &busy_port]).assert_code(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn attach_rejects_existing_interface() {
    let lab = TestLab::one_host(Families::Dual).await;
    let name = lab.layout().namespace("h1-mine");
    kernel::run(&lab, "h1", &["ip", "netns", "add", &name]);
    kernel::shell(&lab, "h1-mine", "ip link add eth0 type bridge");
    let (host, inside) = (Leftovers::baseline(&lab).await, NetnsDump::of(&lab.open_netns("h1-mine")));
    let attach = |more: &[&str]| lab.ctl("h1", &[&["attach", "mine", "--netns", &format!("/run/netns/{name}")], more].concat());
    attach(&[]).assert_code(1).assert_stderr_contains(&["has an interface of that name already: choose another one"]);
    assert_eq!(NetnsDump::of(&lab.open_netns("h1-mine")).changes_since(&inside), "");
    host.assert_unchanged(&lab, "an existing interface").await;
    // An existing default route is not replaced either.
    let route = "ip address add 192.0.2.2/24 dev eth0 && ip link set eth0 up && ip route add default via 192.0.2.1";
    kernel::shell(&lab, "h1-mine", route);
    attach(&["--interface", "eth1"]).assert_code(1).assert_stderr_contains(&[
        "has a default route already",
        "--no-default-route",
        "isDefaultGateway",
    ]);
    assert!(kernel::link(&lab, "h1-mine", "eth1").is_none());
    assert!(
        !kernel::text(&kernel::link(&lab, "h1-mine", "lo").expect_ok("lo"), "operstate").contains("UNKNOWN"),
        "lo is still down"
    );
    host.assert_unchanged(&lab, "an existing default route").await;
    kernel::run(&lab, "h1-mine", &["ip", "route", "del", "default"]);
    attach(&["--interface", "eth1"]).assert_code(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_fail_without_agent() {
    let lab = TestLab::one_host(Families::Dual).await;
    let before = Leftovers::baseline(&lab).await;
    lab.host("h1").agent_stop(nix::sys::signal::Signal::SIGTERM).expect_ok("SIGTERM");
    for arguments in [
        &["attach", "a"][..],
        &["attach", "a", "--dns", "192.0.2.1"],
        &["detach", "a"],
        &["run", "--name", "a", "--", "echo", "begun"],
        &["inspect"],
        &["endpoints"],
    ] {
        let output = lab.ctl("h1", arguments).assert_code(1).assert_stderr_contains(&["no agent"]);
        assert!(!output.stdout.contains("begun"));
    }
    lab.start_agent("h1").await;
    before.assert_unchanged(&lab, "commands without an agent").await;
}

/// The container's process ends at any moment of the attach.
#[tokio::test(flavor = "multi_thread")]
async fn container_killed_during_attach_leaves_nothing() {
    require_program("unshare", "util-linux");
    let lab = TestLab::one_host(Families::Dual).await;
    let own = Netns::current().expect_ok("this namespace");
    let before = Leftovers::baseline(&lab).await;
    let (mut attached, mut refused) = (0, 0);
    for delay in 0..24_u64 {
        let mut command = Command::new("unshare");
        let mut process = command.args(["--net", "sleep", "600"]).stdin(Stdio::null()).spawn().expect_ok("unshare");
        let pid = process.id();
        eventually("the process has its own namespace", CONVERGE_TIMEOUT, || {
            let apart = Netns::open(format!("/proc/{pid}/ns/net")).and_then(|netns| netns.is_same(&own)).map(|same| !same);
            if apart.as_ref().is_ok_and(|apart| *apart) { Ok(()) } else { Err(format!("{apart:?}")) }
        })
        .await;
        let killer = std::thread::spawn(move || {
            // Different moments of the attach, without synchronisation.
            std::thread::sleep(std::time::Duration::from_millis(delay));
            process.kill().and_then(|()| process.wait())
        });
        let output = lab.ctl("h1", &["attach", "dying", "--pid", &pid.to_string()]);
        killer.join().join_or_panic().expect_ok("the end of the process");
        match output.code {
            Some(0) => attached += 1,
            Some(1) => {
                refused += 1;
                assert!(output.stderr.len() > "overlayctl: ".len(), "{}", output.stderr);
            }
            other => panic!("{other:?}: {}", output.stderr),
        }
        lab.ctl("h1", &["detach", "dying"]).assert_code(0);
    }
    before.assert_unchanged(&lab, "dying containers").await;
    eprintln!("{attached} containers were attached before they died, {refused} were not");
}

trait JoinOrPanic<T> {
    fn join_or_panic(self) -> T;
}

impl<T> JoinOrPanic<T> for std::thread::Result<T> {
    fn join_or_panic(self) -> T {
        self.unwrap_or_else(|cause| std::panic::resume_unwind(cause))
    }
}
