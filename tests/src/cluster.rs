//! An etcd of three members, each in a namespace of its own on a lab's switch, so that members can be killed, stopped and cut off one by
//! one. The lab then has no etcd of its own.

use std::process::Command;
use std::time::Duration;

use ipnetwork::IpNetwork;
use nix::sys::signal::Signal;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::setup::Setup;
use overlayctl::lab::process::{self, GRACE, ProcessId};
use overlayctl::lab::{self, Lab, LabOptions, agent, container, layout, underlay};
use serde_json::Value;

use crate::story::READY;
use crate::{Must, Story, etcd, eventually};

/// The members, by number.
pub const MEMBERS: [u8; 3] = [1, 2, 3];

/// How long a cluster may take to have a leader: an election is a second or two, more on a busy machine.
const ELECTED: Duration = Duration::from_secs(30);

/// Brings up a lab as [`Story::up`] does, with a cluster in place of its own etcd.
pub async fn up(change: impl FnOnce(&mut LabOptions)) -> Story {
    let mut agents = true;
    let story = Story::up(|options| {
        change(options);
        agents = std::mem::replace(&mut options.agents, false);
        options.etcd = MEMBERS.map(|member| url(member, layout::ETCD_PORT)).to_vec();
    })
    .await;
    for member in MEMBERS {
        wire(&story, &name(member), address(member)).await;
        start(&story, member);
    }
    healthy(&story, &MEMBERS).await;
    begin(&story, agents).await;
    story
}

/// Writes the network's configuration by what the agents are told to use as etcd, and where it is wished starts them.
pub(crate) async fn begin(story: &Story, agents: bool) {
    lab::etcd::configure(story).await.must("write the network's configuration");
    if agents {
        for host in story.hosts() {
            host.agent_start(&[]).must("start");
        }
        story.mesh().await;
        container::attach_all(story).await.must("attach the containers");
    }
}

/// Makes a namespace with a wire to the underlay's switch, for a program that serves the hosts.
pub(crate) async fn wire(story: &Story, name: &str, address: [u8; 4]) {
    let at = "a server's wire";
    let switch = Setup::open(&story.inside("net")).must("the switch");
    let netns = Netns::create(&story.layout().namespace(name)).must("a server's namespace");
    switch.add_veth(name, underlay::WIRE, &netns).await.must(at);
    switch.set_master(name, underlay::SWITCH).await.must(at);
    switch.set_up(name).await.must(at);
    let own = Setup::open(&netns).must(at);
    own.add_address(underlay::WIRE, IpNetwork::new(address.into(), 16).must("an address")).await.must(at);
    own.set_up("lo").await.must(at);
    own.set_up(underlay::WIRE).await.must(at);
}

/// The namespace of a member, as the lab names it.
pub fn name(member: u8) -> String {
    format!("e{member}")
}

/// The address of a member.
pub fn address(member: u8) -> [u8; 4] {
    [10, 99, 0, 10 + member]
}

/// Where a member answers on that port.
pub fn url(member: u8, port: u16) -> String {
    let [a, b, c, d] = address(member);
    format!("http://{a}.{b}.{c}.{d}:{port}")
}

/// Starts a member, on its data where there is some. Does not wait.
pub fn start(lab: &Lab, member: u8) {
    const PEER: u16 = 2380;
    let dir = lab.dir().join(name(member));
    std::fs::create_dir_all(&dir).must("a member's directory");
    let mut command = Command::new(lab::etcd::program().must("etcd"));
    clean(&mut command);
    let all: Vec<String> = MEMBERS.iter().map(|m| format!("{}={}", name(*m), url(*m, PEER))).collect();
    let own = url(member, layout::ETCD_PORT);
    command.args(["--name", &name(member), "--logger", "zap", "--log-outputs", "stderr"]);
    command.arg("--data-dir").arg(dir.join("data"));
    // The loopback address is for commands that ask this very member.
    command.args(["--listen-client-urls", &format!("{own},http://127.0.0.1:{}", layout::ETCD_PORT)]);
    command.args(["--advertise-client-urls", &own, "--listen-peer-urls", &url(member, PEER)]);
    command.args(["--initial-advertise-peer-urls", &url(member, PEER)]);
    command.args(["--initial-cluster", &all.join(","), "--initial-cluster-state", "new"]);
    let netns = lab.netns(&name(member)).must("a member's namespace");
    process::start(command, Some(&netns), &dir.join("etcd.log"), &record(lab, member)).must("start a member");
}

/// Takes away what the caller's environment would tell a program of etcd's.
pub(crate) fn clean(command: &mut Command) {
    for (variable, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("ETCD_")) {
        command.env_remove(variable);
    }
    if cfg!(not(target_arch = "x86_64")) {
        // etcd 3.4 asks for this word of consent on every other architecture.
        command.env("ETCD_UNSUPPORTED_ARCH", if cfg!(target_arch = "aarch64") { "arm64" } else { std::env::consts::ARCH });
    }
}

fn record(lab: &Lab, member: u8) -> std::path::PathBuf {
    lab.dir().join(name(member)).join("etcd.pid")
}

/// Sends a member a signal.
pub fn signal(lab: &Lab, member: u8, signal: Signal) {
    let id = ProcessId::recorded(&record(lab, member)).must("a member's process id");
    id.signal(signal).must("signal a member");
    if matches!(signal, Signal::SIGKILL | Signal::SIGTERM) {
        assert!(id.wait(GRACE), "e{member} ends on {signal}");
    }
}

/// Waits until these members have a leader and answer.
pub async fn healthy(lab: &Lab, members: &[u8]) {
    let limit = ELECTED;
    eventually(&format!("members {members:?} are healthy"), limit, || {
        members.iter().try_for_each(|member| match at(lab, *member, &["endpoint", "health"]) {
            said if said.code == Some(0) => Ok(()),
            said => Err(said.err),
        })
    })
    .await;
}

/// Runs etcdctl against one member, inside its namespace.
pub fn at(lab: &Lab, member: u8, arguments: &[&str]) -> crate::programs::Said {
    etcd::etcdctl_at(lab, &name(member), &format!("http://127.0.0.1:{}", layout::ETCD_PORT), arguments)
}

/// The member that leads; the caller knows that there is one.
pub async fn leader(lab: &Lab) -> u8 {
    eventually("one member leads", ELECTED, || {
        let ids = MEMBERS.map(|member| (member, status(lab, member)));
        let leads = |(member, status): &(u8, Option<(u64, u64)>)| status.filter(|(own, leader)| own == leader).map(|_| *member);
        let found: Vec<u8> = ids.iter().filter_map(leads).collect();
        if let [one] = found.as_slice() { Ok(*one) } else { Err(format!("{ids:?}")) }
    })
    .await
}

/// The ids of a member and of who leads in its eyes; `None` where it does not answer.
fn status(lab: &Lab, member: u8) -> Option<(u64, u64)> {
    let said = at(lab, member, &["endpoint", "status", "-w", "json"]);
    let all: Value = if said.code == Some(0) { said.json() } else { return None };
    let status = &all[0]["Status"];
    Some((status["header"]["member_id"].as_u64()?, status["leader"].as_u64()?))
}

/// Hands the lead to another member; which one leads now.
pub async fn move_leader(lab: &Lab) -> u8 {
    let from = leader(lab).await;
    let to = from % 3 + 1;
    let (id, _) = status(lab, to).must("a follower that answers");
    at(lab, from, &["move-leader", &format!("{id:x}")]).exits(0);
    let now = leader(lab).await;
    assert_ne!(now, from, "the lead has moved");
    now
}

/// Drops all history up to now on every member, and returns the space to the disk.
pub fn compact(lab: &Lab) {
    let revision = etcd::revision(lab);
    let said = etcd::etcdctl(lab, &["compact", "--physical", &revision.to_string()]);
    // Nothing was written since the last time.
    if !said.err.contains("required revision has been compacted") {
        said.exits(0);
    }
}

/// Waits until every agent is ready and connected to the store.
pub async fn all_well(story: &Story) {
    for host in story.hosts() {
        let well = |s: &overlay_agent::model::api::Status| s.ready && s.store.connected;
        host.wait_status(READY, "it is not well again", well).await.must(host.name());
    }
    agent::wait_mesh(story, READY).await.must("every agent has a way to every other");
}
