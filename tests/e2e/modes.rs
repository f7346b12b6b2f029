//! The attach modes: side by side, shared namespaces, detach, and namespaces of processes.

use std::process::{Child, Command, Stdio};

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::api::{AttachResponse, DetachResponse};
use overlay_tests::leftovers::Leftovers;
use overlay_tests::programs::require_program;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, eventually, kernel};
use overlayctl::lab::Families;

fn modes(lab: &TestLab) -> Vec<String> {
    lab.endpoints("h1").iter().map(|e| format!("{} {}", e.name, e.mode)).collect()
}

/// The relevant interfaces of a namespace: a kernel with tunnel modules adds some to each.
fn interfaces(netns: &Netns) -> Vec<String> {
    let listed = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).expect_ok("enter").expect_ok("/proc/net/dev");
    let names = listed.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
    let mut names: Vec<String> = names.filter(|name| name == "lo" || name.starts_with("eth")).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn modes_work_side_by_side() {
    let lab = TestLab::one_host(Families::Dual).await;
    let before = Leftovers::baseline(&lab).await;
    let attached: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "o"]).assert_code(0).json();
    // Usable at once in both families: one packet, no retry.
    for (_, gateway) in attached.gateway.iter() {
        kernel::run(&lab, "h1-o", &["ping", "-c", "1", "-W", "2", &gateway.to_string()]);
    }
    let addresses = kernel::run(&lab, "h1-o", &["ip", "-o", "address", "show", "scope", "global"]);
    assert!(addresses.lines().count() == 2 && !addresses.contains("tentative"), "{addresses}");
    lab.ctl("h1", &["attach", "n", "--mode", "none"]).assert_code(0);
    lab.ctl("h1", &["attach", "h", "--mode", "host"]).assert_code(0);
    lab.ctl("h1", &["attach", "s", "--mode", "container:o"]).assert_code(0);
    lab.ctl("h1", &["attach", "t", "--mode", "container:s"]).assert_code(0);
    assert_eq!(modes(&lab), ["h host", "n none", "o overlay", "s container:o", "t container:o"]);

    assert_eq!(interfaces(&lab.open_netns("h1-o")), ["eth0", "lo"]);
    assert_eq!(interfaces(&lab.open_netns("h1-n")), ["lo"]);
    for loopback in ["127.0.0.1", "::1"] {
        kernel::run(&lab, "h1-n", &["ping", "-c", "1", "-W", "2", loopback]);
    }
    let netns = |name: &str| {
        let path = lab.endpoints("h1").into_iter().find(|e| e.name.as_str() == name).expect_ok(name).netns;
        Netns::open(path).expect_ok(name)
    };
    assert!(netns("h").is_same(&lab.open_netns("h1")).expect_ok("compare"));
    assert!(netns("s").is_same(&lab.open_netns("h1-o")).expect_ok("compare"));
    let table = lab.ctl("h1", &["endpoints"]).assert_code(0).stdout;
    assert!(table.contains("container:o") && table.contains("MODE"), "{table}");

    // Shared: detach needs --force.
    let held = lab.endpoints("h1");
    lab.ctl("h1", &["detach", "o"])
        .assert_code(1)
        .assert_stderr_contains(&["endpoint o shares its network namespace with s, t", "--force"]);
    assert_eq!(lab.endpoints("h1"), held);
    kernel::run(&lab, "h1-o", &["ping", "-c", "1", "-W", "2", &attached.gateway.v4.expect_ok("IPv4").to_string()]);
    lab.ctl("h1", &["detach", "t"]).assert_code(0);
    let detached: DetachResponse = lab.ctl("h1", &["-o", "json", "detach", "--force", "o"]).assert_code(0).json();
    assert_eq!(detached.sharers.iter().map(|s| s.as_str()).collect::<Vec<_>>(), ["s"]);
    assert_eq!(modes(&lab), ["h host", "n none"]);
    for name in ["h", "n"] {
        lab.ctl("h1", &["detach", name]).assert_code(0);
    }
    assert!(lab.netns("h1-n").is_err() && lab.netns("h1-o").is_err());
    before.assert_unchanged(&lab, "all modes").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unsupported_mode_options_are_refused() {
    let lab = TestLab::one_host(Families::Dual).await;
    for (arguments, code, wanted) in [
        (&["attach", "a", "--mode", "bridge"][..], 2, "`bridge` is not a mode: use overlay, none, host or container:NAME"),
        (&["attach", "a", "--mode", "container:../b"], 2, "is no endpoint name"),
        (&["attach", "a", "--mode", "container:b"], 1, "there is no endpoint b"),
        (&["attach", "a", "--mode", "host", "--pid", "1"], 2, "leave out --netns and --pid"),
        (&["attach", "a", "--mode", "none", "--publish", "1:1"], 1, "mode none does not support published ports"),
        (&["attach", "a", "--mode", "host", "--ip", "10.0.0.1"], 1, "mode host does not support an address"),
        (&["attach", "a", "--mode", "none", "--dns", "192.0.2.1"], 2, "are for mode overlay"),
        (&["attach", "a", "--mode", "none", "--no-source-check"], 1, "mode none does not support a source check"),
    ] {
        lab.ctl("h1", arguments).assert_code(code).assert_stderr_contains(&[wanted]);
        assert!(lab.endpoints("h1").is_empty() && lab.netns("h1-a").is_err(), "{arguments:?}");
    }
}

/// A process in its own namespace; killed with the test.
struct NetnsProcess(Child);

impl NetnsProcess {
    async fn start() -> NetnsProcess {
        require_program("unshare", "util-linux");
        let mut command = Command::new("unshare");
        command.args(["--net", "sleep", "600"]).stdin(Stdio::null());
        let process = NetnsProcess(command.spawn().expect_ok("unshare"));
        let own = Netns::current().expect_ok("this namespace");
        eventually("the process has its own namespace", CONVERGE_TIMEOUT, || {
            let is_separate = process.netns().and_then(|netns| netns.is_same(&own)).map(|same| !same);
            if is_separate.as_ref().is_ok_and(|is_separate| *is_separate) { Ok(()) } else { Err(format!("{is_separate:?}")) }
        })
        .await;
        process
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }

    fn netns(&self) -> Result<Netns, overlay_agent::kernel::netns::NetnsError> {
        Netns::open(format!("/proc/{}/ns/net", self.0.id()))
    }

    fn end(mut self) {
        self.0.kill().expect_ok("end it");
        self.0.wait().expect_ok("its end");
    }
}

impl Drop for NetnsProcess {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn process_namespace_is_attached() {
    let lab = TestLab::one_host(Families::Dual).await;
    let before = Leftovers::baseline(&lab).await;
    let process = NetnsProcess::start().await;
    let attached: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "p", "--pid", &process.pid()]).assert_code(0).json();
    assert_eq!(attached.endpoint.netns, std::path::Path::new(&format!("/proc/{}/ns/net", process.pid())));
    assert_eq!(interfaces(&process.netns().expect_ok("its namespace")), ["eth0", "lo"]);
    let again: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "p", "--pid", &process.pid()]).assert_code(0).json();
    assert_eq!(again.endpoint, attached.endpoint);

    // Over a restart of the agent: it recognises the same namespace.
    lab.ctl("h1", &["attach", "host", "--mode", "host"]).assert_code(0);
    lab.host("h1").agent_stop(nix::sys::signal::Signal::SIGKILL).expect_ok("SIGKILL");
    lab.host("h1").agent_start(&[]).expect_ok("start");
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    let after = lab.endpoints("h1");
    assert_eq!(after.iter().find(|e| e.name.as_str() == "p"), Some(&attached.endpoint));
    // The path of the host's namespace is now that of the new agent.
    let host = after.iter().find(|e| e.name.as_str() == "host").expect_ok("host");
    assert!(Netns::open(&host.netns).expect_ok("its path").is_same(&lab.open_netns("h1")).expect_ok("compare"));
    lab.ctl("h1", &["detach", "host"]).assert_code(0);

    // The process ends: its name is available for another endpoint, with its own interface.
    let old = attached.endpoint.port.expect_ok("a port").host_interface;
    let gone = process.pid();
    process.end();
    lab.ctl("h1", &["attach", "q", "--pid", &gone]).assert_code(1).assert_stderr_contains(&["no process", &gone]);
    let other = NetnsProcess::start().await;
    let attached: AttachResponse = lab.ctl("h1", &["-o", "json", "attach", "p", "--pid", &other.pid()]).assert_code(0).json();
    assert_eq!(interfaces(&other.netns().expect_ok("its namespace")), ["eth0", "lo"]);
    assert_eq!(lab.endpoints("h1"), std::slice::from_ref(&attached.endpoint), "the old endpoint is gone");
    assert_eq!(attached.endpoint.port.expect_ok("a port").host_interface, old);
    lab.ctl("h1", &["detach", "p"]).assert_code(0);
    assert_eq!(interfaces(&other.netns().expect_ok("its namespace")), ["lo"]);
    let own = lab.host("h1").agent().expect_ok("the agent").pid.to_string();
    for (flag, value) in [("--pid", own.as_str()), ("--netns", "/proc/self/ns/net")] {
        lab.ctl("h1", &["attach", "p", flag, value])
            .assert_code(1)
            .assert_stderr_contains(&["is the host's own network namespace"]);
    }
    before.assert_unchanged(&lab, "all modes").await;
}
