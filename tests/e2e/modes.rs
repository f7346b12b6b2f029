//! The modes side by side, sharing and letting go, the namespaces of processes.

use std::process::{Child, Command, Stdio};

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::api::{Attached, Detached};
use overlay_tests::left::Left;
use overlay_tests::programs::needs;
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, Story, eventually, kernel};
use overlayctl::lab::Families;

fn modes(story: &Story) -> Vec<String> {
    story.endpoints("h1").iter().map(|e| format!("{} {}", e.name, e.mode)).collect()
}

/// The interfaces in a namespace that anybody has to do with: a kernel with tunnels as modules puts some into each.
fn interfaces(netns: &Netns) -> Vec<String> {
    let listed = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).must("enter").must("/proc/net/dev");
    let names = listed.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
    let mut names: Vec<String> = names.filter(|name| name == "lo" || name.starts_with("eth")).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn the_modes_side_by_side() {
    let story = Story::one_host(Families::Dual).await;
    let before = Left::settled(&story).await;
    let attached: Attached = story.ctl("h1", &["-o", "json", "attach", "o"]).exits(0).json();
    // Usable at once in both families: one packet, no second try.
    for (_, gateway) in attached.gateway.iter() {
        kernel::run(&story, "h1-o", &["ping", "-c", "1", "-W", "2", &gateway.to_string()]);
    }
    let addresses = kernel::run(&story, "h1-o", &["ip", "-o", "address", "show", "scope", "global"]);
    assert!(addresses.lines().count() == 2 && !addresses.contains("tentative"), "{addresses}");
    story.ctl("h1", &["attach", "n", "--mode", "none"]).exits(0);
    story.ctl("h1", &["attach", "h", "--mode", "host"]).exits(0);
    story.ctl("h1", &["attach", "s", "--mode", "container:o"]).exits(0);
    story.ctl("h1", &["attach", "t", "--mode", "container:s"]).exits(0);
    assert_eq!(modes(&story), ["h host", "n none", "o overlay", "s container:o", "t container:o"]);

    assert_eq!(interfaces(&story.inside("h1-o")), ["eth0", "lo"]);
    assert_eq!(interfaces(&story.inside("h1-n")), ["lo"]);
    for loopback in ["127.0.0.1", "::1"] {
        kernel::run(&story, "h1-n", &["ping", "-c", "1", "-W", "2", loopback]);
    }
    let netns = |name: &str| {
        let path = story.endpoints("h1").into_iter().find(|e| e.name.as_str() == name).must(name).netns;
        Netns::open(path).must(name)
    };
    assert!(netns("h").is_same(&story.inside("h1")).must("compare"));
    assert!(netns("s").is_same(&story.inside("h1-o")).must("compare"));
    let table = story.ctl("h1", &["endpoints"]).exits(0).out;
    assert!(table.contains("container:o") && table.contains("MODE"), "{table}");

    // Shared: not to be let go but by force.
    let held = story.endpoints("h1");
    story.ctl("h1", &["detach", "o"]).exits(1).complains(&["endpoint o shares its network namespace with s, t", "--force"]);
    assert_eq!(story.endpoints("h1"), held);
    kernel::run(&story, "h1-o", &["ping", "-c", "1", "-W", "2", &attached.gateway.v4.must("IPv4").to_string()]);
    story.ctl("h1", &["detach", "t"]).exits(0);
    let detached: Detached = story.ctl("h1", &["-o", "json", "detach", "--force", "o"]).exits(0).json();
    assert_eq!(detached.sharers.iter().map(|s| s.as_str()).collect::<Vec<_>>(), ["s"]);
    assert_eq!(modes(&story), ["h host", "n none"]);
    for name in ["h", "n"] {
        story.ctl("h1", &["detach", name]).exits(0);
    }
    assert!(story.netns("h1-n").is_err() && story.netns("h1-o").is_err());
    before.same(&story, "all modes").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_mode_has_not_is_refused() {
    let story = Story::one_host(Families::Dual).await;
    for (arguments, code, wanted) in [
        (&["attach", "a", "--mode", "bridge"][..], 2, "`bridge` is no mode: overlay, none, host or container:NAME"),
        (&["attach", "a", "--mode", "container:../b"], 2, "is no endpoint name"),
        (&["attach", "a", "--mode", "container:b"], 1, "there is no endpoint b"),
        (&["attach", "a", "--mode", "host", "--pid", "1"], 2, "leave out --netns and --pid"),
        (&["attach", "a", "--mode", "none", "--publish", "1:1"], 1, "mode none has no place for published ports"),
        (&["attach", "a", "--mode", "host", "--ip", "10.0.0.1"], 1, "mode host has no place for a wished address"),
        (&["attach", "a", "--mode", "none", "--dns", "192.0.2.1"], 2, "are for mode overlay"),
        (&["attach", "a", "--mode", "none", "--no-source-check"], 1, "mode none has no place for a source check"),
    ] {
        story.ctl("h1", arguments).exits(code).complains(&[wanted]);
        assert!(story.endpoints("h1").is_empty() && story.netns("h1-a").is_err(), "{arguments:?}");
    }
}

/// A process in a namespace of its own; ended with the test.
struct Process(Child);

impl Process {
    async fn start() -> Process {
        needs("unshare", "util-linux");
        let mut command = Command::new("unshare");
        command.args(["--net", "sleep", "600"]).stdin(Stdio::null());
        let process = Process(command.spawn().must("unshare"));
        let own = Netns::current().must("this namespace");
        eventually("the process has a namespace of its own", SOON, || {
            let apart = process.netns().and_then(|netns| netns.is_same(&own)).map(|same| !same);
            if apart.as_ref().is_ok_and(|apart| *apart) { Ok(()) } else { Err(format!("{apart:?}")) }
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
        self.0.kill().must("end it");
        self.0.wait().must("its end");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_namespace_of_a_process() {
    let story = Story::one_host(Families::Dual).await;
    let before = Left::settled(&story).await;
    let process = Process::start().await;
    let attached: Attached = story.ctl("h1", &["-o", "json", "attach", "p", "--pid", &process.pid()]).exits(0).json();
    assert_eq!(attached.endpoint.netns, std::path::Path::new(&format!("/proc/{}/ns/net", process.pid())));
    assert_eq!(interfaces(&process.netns().must("its namespace")), ["eth0", "lo"]);
    let again: Attached = story.ctl("h1", &["-o", "json", "attach", "p", "--pid", &process.pid()]).exits(0).json();
    assert_eq!(again.endpoint, attached.endpoint);

    // Over a restart of the agent: it is known to be the same one.
    story.ctl("h1", &["attach", "host", "--mode", "host"]).exits(0);
    story.at("h1").agent_stop(nix::sys::signal::Signal::SIGKILL).must("SIGKILL");
    story.at("h1").agent_start(&[]).must("start");
    story.at("h1").wait_ready(READY).await.must("ready");
    let after = story.endpoints("h1");
    assert_eq!(after.iter().find(|e| e.name.as_str() == "p"), Some(&attached.endpoint));
    // The host's namespace has another path now, that of the new agent.
    let host = after.iter().find(|e| e.name.as_str() == "host").must("host");
    assert!(Netns::open(&host.netns).must("its path").is_same(&story.inside("h1")).must("compare"));
    story.ctl("h1", &["detach", "host"]).exits(0);

    // It ends: its name is free for another one, which gets an interface of its own.
    let old = attached.endpoint.port.must("a port").host_interface;
    let gone = process.pid();
    process.end();
    story.ctl("h1", &["attach", "q", "--pid", &gone]).exits(1).complains(&["there is no process", &gone]);
    let other = Process::start().await;
    let attached: Attached = story.ctl("h1", &["-o", "json", "attach", "p", "--pid", &other.pid()]).exits(0).json();
    assert_eq!(interfaces(&other.netns().must("its namespace")), ["eth0", "lo"]);
    assert_eq!(story.endpoints("h1"), std::slice::from_ref(&attached.endpoint), "the old one is gone");
    assert_eq!(attached.endpoint.port.must("a port").host_interface, old);
    story.ctl("h1", &["detach", "p"]).exits(0);
    assert_eq!(interfaces(&other.netns().must("its namespace")), ["lo"]);
    let own = story.at("h1").agent().must("the agent").pid.to_string();
    for (flag, value) in [("--pid", own.as_str()), ("--netns", "/proc/self/ns/net")] {
        story.ctl("h1", &["attach", "p", flag, value]).exits(1).complains(&["is the host's own network namespace"]);
    }
    before.same(&story, "all modes").await;
}
