//! An etcd cluster of three members in a lab.
//!
//! Each member has its own namespace on the lab's switch, so that members can be killed, stopped and partitioned one by one. The
//! lab has no etcd of its own.

use std::process::Command;
use std::time::Duration;

use ipnetwork::IpNetwork;
use nix::sys::signal::Signal;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::netns_builder::NetnsBuilder;
use overlayctl::lab::process::{self, ProcessId, TERM_GRACE};
use overlayctl::lab::{self, Lab, LabOptions, agent, container, layout, underlay};
use serde_json::Value;

use crate::test_lab::READY_TIMEOUT;
use crate::{ExpectContext, TestLab, etcd, eventually};

/// The numbers of the members.
pub const MEMBERS: [u8; 3] = [1, 2, 3];

/// Time limit for a leader election: one or two seconds, more on a busy machine.
const ELECTION_TIMEOUT: Duration = Duration::from_secs(30);

/// Brings up a lab like [`TestLab::up`], with a cluster instead of its own etcd.
pub async fn up(configure: impl FnOnce(&mut LabOptions)) -> TestLab {
    let mut agents = true;
    let lab = TestLab::up(|options| {
        configure(options);
        agents = std::mem::replace(&mut options.agents, false);
        options.etcd = MEMBERS.map(|member| url(member, layout::ETCD_PORT)).to_vec();
    })
    .await;
    for member in MEMBERS {
        add_switch_namespace(&lab, &name(member), address(member));
        start(&lab, member);
    }
    wait_members_healthy(&lab, &MEMBERS).await;
    configure_and_start_agents(&lab, agents).await;
    lab
}

/// Writes the network configuration to the agents' etcd endpoints, and starts the agents on request.
pub(crate) async fn configure_and_start_agents(lab: &TestLab, agents: bool) {
    lab::etcd::configure(lab).await.expect_ok("write the network's configuration");
    if agents {
        for host in lab.hosts() {
            host.agent_start(&[]).expect_ok("start");
        }
        lab.wait_full_mesh().await;
        container::attach_all(lab).await.expect_ok("attach the containers");
    }
}

/// Creates a namespace with a veth pair to the underlay switch, for a server.
pub(crate) fn add_switch_namespace(lab: &TestLab, name: &str, address: [u8; 4]) {
    let at = "connect a server to the switch";
    let switch = NetnsBuilder::open(&lab.open_netns("net")).expect_ok("the switch");
    let netns = Netns::create(&lab.layout().namespace(name)).expect_ok("a server's namespace");
    switch.add_veth(name, underlay::UPLINK, &netns).expect_ok(at);
    switch.set_master(name, underlay::SWITCH).expect_ok(at);
    switch.set_up(name).expect_ok(at);
    let own = NetnsBuilder::open(&netns).expect_ok(at);
    own.add_address(underlay::UPLINK, IpNetwork::new(address.into(), 16).expect_ok("an address")).expect_ok(at);
    own.set_up("lo").expect_ok(at);
    own.set_up(underlay::UPLINK).expect_ok(at);
}

/// The lab's name of a member's namespace.
pub fn name(member: u8) -> String {
    format!("e{member}")
}

/// The address of a member.
pub fn address(member: u8) -> [u8; 4] {
    [10, 99, 0, 10 + member]
}

/// The URL of a member's port.
pub fn url(member: u8, port: u16) -> String {
    let [a, b, c, d] = address(member);
    format!("http://{a}.{b}.{c}.{d}:{port}")
}

/// Starts a member, with its existing data if present. Does not wait.
pub fn start(lab: &Lab, member: u8) {
    const PEER: u16 = 2380;
    let dir = lab.dir().join(name(member));
    std::fs::create_dir_all(&dir).expect_ok("a member's directory");
    let mut command = Command::new(lab::etcd::find_program().expect_ok("etcd"));
    clear_etcd_env(&mut command);
    let all: Vec<String> = MEMBERS.iter().map(|m| format!("{}={}", name(*m), url(*m, PEER))).collect();
    let own = url(member, layout::ETCD_PORT);
    command.args(["--name", &name(member), "--logger", "zap", "--log-outputs", "stderr"]);
    command.arg("--data-dir").arg(dir.join("data"));
    // The loopback address serves commands that query this one member.
    command.args(["--listen-client-urls", &format!("{own},http://127.0.0.1:{}", layout::ETCD_PORT)]);
    command.args(["--advertise-client-urls", &own, "--listen-peer-urls", &url(member, PEER)]);
    command.args(["--initial-advertise-peer-urls", &url(member, PEER)]);
    command.args(["--initial-cluster", &all.join(","), "--initial-cluster-state", "new"]);
    let netns = lab.netns(&name(member)).expect_ok("a member's namespace");
    process::start(command, Some(&netns), &dir.join("etcd.log"), &pid_file(lab, member)).expect_ok("start a member");
}

/// Removes etcd's variables of the caller's environment.
pub(crate) fn clear_etcd_env(command: &mut Command) {
    for (variable, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("ETCD_")) {
        command.env_remove(variable);
    }
    if cfg!(not(target_arch = "x86_64")) {
        // etcd 3.4 requires this variable on every other architecture.
        command.env("ETCD_UNSUPPORTED_ARCH", if cfg!(target_arch = "aarch64") { "arm64" } else { std::env::consts::ARCH });
    }
}

fn pid_file(lab: &Lab, member: u8) -> std::path::PathBuf {
    lab.dir().join(name(member)).join("etcd.pid")
}

/// Sends a member a signal.
pub fn signal(lab: &Lab, member: u8, signal: Signal) {
    let id = ProcessId::from_pid_file(&pid_file(lab, member)).expect_ok("a member's process id");
    id.signal(signal).expect_ok("signal a member");
    if matches!(signal, Signal::SIGKILL | Signal::SIGTERM) {
        assert!(id.wait(TERM_GRACE), "e{member} ends on {signal}");
    }
}

/// Waits until these members have a leader and answer.
pub async fn wait_members_healthy(lab: &Lab, members: &[u8]) {
    let limit = ELECTION_TIMEOUT;
    eventually(&format!("members {members:?} are healthy"), limit, || {
        members.iter().try_for_each(|member| match etcdctl_at_member(lab, *member, &["endpoint", "health"]) {
            output if output.code == Some(0) => Ok(()),
            output => Err(output.stderr),
        })
    })
    .await;
}

/// Runs etcdctl against one member, inside its namespace.
pub fn etcdctl_at_member(lab: &Lab, member: u8, arguments: &[&str]) -> crate::programs::CommandOutput {
    etcd::etcdctl_at(lab, &name(member), &format!("http://127.0.0.1:{}", layout::ETCD_PORT), arguments)
}

/// The leading member; there must be one.
pub async fn leader(lab: &Lab) -> u8 {
    eventually("one member leads", ELECTION_TIMEOUT, || {
        let ids = MEMBERS.map(|member| (member, status(lab, member)));
        let leader_of =
            |(member, status): &(u8, Option<(u64, u64)>)| status.filter(|(own, leader)| own == leader).map(|_| *member);
        let leaders: Vec<u8> = ids.iter().filter_map(leader_of).collect();
        if let [member] = leaders.as_slice() { Ok(*member) } else { Err(format!("{ids:?}")) }
    })
    .await
}

/// A member's id and the id of its leader; `None` if it does not answer.
fn status(lab: &Lab, member: u8) -> Option<(u64, u64)> {
    let output = etcdctl_at_member(lab, member, &["endpoint", "status", "-w", "json"]);
    let all: Value = if output.code == Some(0) { output.json() } else { return None };
    let status = &all[0]["Status"];
    Some((status["header"]["member_id"].as_u64()?, status["leader"].as_u64()?))
}

/// Moves the leadership to another member; returns the new leader.
pub async fn move_leader(lab: &Lab) -> u8 {
    let from = leader(lab).await;
    let to = from % 3 + 1;
    let (id, _) = status(lab, to).expect_ok("a responding follower");
    etcdctl_at_member(lab, from, &["move-leader", &format!("{id:x}")]).assert_code(0);
    let new_leader = leader(lab).await;
    assert_ne!(new_leader, from, "the leadership has moved");
    new_leader
}

/// Compacts all history up to now on every member, and returns the space to the disk.
pub fn compact(lab: &Lab) {
    let revision = etcd::revision(lab);
    let output = etcd::etcdctl(lab, &["compact", "--physical", &revision.to_string()]);
    // No write since the last compaction.
    if !output.stderr.contains("required revision has been compacted") {
        output.assert_code(0);
    }
}

/// Waits until every agent is ready and connected to the store.
pub async fn wait_agents_healthy(lab: &TestLab) {
    for host in lab.hosts() {
        let is_healthy = |s: &overlay_agent::model::api::Status| s.ready && s.store.connected;
        host.wait_status(READY_TIMEOUT, "not healthy again", is_healthy).await.expect_ok(host.name());
    }
    agent::wait_mesh(lab, READY_TIMEOUT).await.expect_ok("every agent reaches every other agent");
}
