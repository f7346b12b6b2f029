//! etcd proxies (`etcd grpc-proxy`) between the agents and a cluster, each in its own namespace on the underlay.

use std::process::Command;

use nix::sys::signal::Signal;
use overlayctl::lab::process::{self, ProcessId, TERM_GRACE};
use overlayctl::lab::{self, Lab, LabOptions, layout};

use crate::programs::CommandOutput;
use crate::test_lab::READY_TIMEOUT;
use crate::{ExpectContext, TestLab, cluster, etcd, eventually};

/// The numbers of the proxies.
pub const PROXIES: [u8; 2] = [1, 2];

/// Brings up a lab like [`cluster::up`], whose agents know only the proxies.
pub async fn up(configure: impl FnOnce(&mut LabOptions)) -> TestLab {
    let mut agents = true;
    let lab = TestLab::up(|options| {
        configure(options);
        agents = std::mem::replace(&mut options.agents, false);
        options.etcd = PROXIES.map(url).to_vec();
    })
    .await;
    for member in cluster::MEMBERS {
        cluster::add_switch_namespace(&lab, &cluster::name(member), cluster::address(member));
        cluster::start(&lab, member);
    }
    cluster::wait_members_healthy(&lab, &cluster::MEMBERS).await;
    for proxy in PROXIES {
        cluster::add_switch_namespace(&lab, &name(proxy), address(proxy));
        start(&lab, proxy).await;
    }
    cluster::configure_and_start_agents(&lab, agents).await;
    lab
}

/// The lab's name of a proxy's namespace.
pub fn name(proxy: u8) -> String {
    format!("p{proxy}")
}

fn address(proxy: u8) -> [u8; 4] {
    [10, 99, 0, 20 + proxy]
}

/// The URL of a proxy.
pub fn url(proxy: u8) -> String {
    let [a, b, c, d] = address(proxy);
    format!("http://{a}.{b}.{c}.{d}:{}", layout::ETCD_PORT)
}

/// The command line in `docs/scale.md`.
const PROXY_COMMAND: &str = "etcd grpc-proxy start --endpoints=https://e1:2379,https://e2:2379,https://e3:2379 --listen-addr=0.0.0.0:2379 --advertise-client-url=PROXY:2379 --max-send-bytes=33554432";
const DOC_ENDPOINTS: &str = "https://e1:2379,https://e2:2379,https://e3:2379";

/// Starts a proxy and waits until it forwards requests.
pub async fn start(lab: &TestLab, proxy: u8) {
    let dir = lab.dir().join(name(proxy));
    std::fs::create_dir_all(&dir).expect_ok("a proxy's directory");
    let mut command = Command::new(lab::etcd::find_program().expect_ok("etcd"));
    cluster::clear_etcd_env(&mut command);
    let members: Vec<String> = cluster::MEMBERS.iter().map(|member| cluster::url(*member, layout::ETCD_PORT)).collect();
    let own = url(proxy);
    let own = own.trim_start_matches("http://");
    let words = PROXY_COMMAND.replace(DOC_ENDPOINTS, &members.join(",")).replace("0.0.0.0:2379", own).replace("PROXY:2379", own);
    command.args(words.split_whitespace().skip(1)).arg("--data-dir").arg(dir.join("data"));
    let netns = lab.netns(&name(proxy)).expect_ok("a proxy's namespace");
    process::start(command, Some(&netns), &dir.join("proxy.log"), &pid_file(lab, proxy)).expect_ok("start a proxy");
    eventually(&format!("{} forwards requests", name(proxy)), READY_TIMEOUT, || {
        match etcdctl_via_proxy(lab, proxy, &["get", "no-such-key"]) {
            output if output.code == Some(0) => Ok(()),
            output => Err(output.stderr),
        }
    })
    .await;
}

/// Kills a proxy with SIGKILL.
pub fn kill(lab: &Lab, proxy: u8) {
    let id = ProcessId::from_pid_file(&pid_file(lab, proxy)).expect_ok("a proxy's process id");
    id.signal(Signal::SIGKILL).expect_ok("kill a proxy");
    assert!(id.wait(TERM_GRACE), "p{proxy} ends");
}

/// Runs etcdctl against one proxy.
pub fn etcdctl_via_proxy(lab: &Lab, proxy: u8, arguments: &[&str]) -> CommandOutput {
    etcd::etcdctl_at(lab, "net", &url(proxy), arguments)
}

fn pid_file(lab: &Lab, proxy: u8) -> std::path::PathBuf {
    lab.dir().join(name(proxy)).join("proxy.pid")
}
