//! Proxies of etcd (`etcd grpc-proxy`) between the agents and a cluster, each in a namespace of its own on the underlay.

use std::process::Command;

use nix::sys::signal::Signal;
use overlayctl::lab::process::{self, GRACE, ProcessId};
use overlayctl::lab::{self, Lab, LabOptions, layout};

use crate::programs::Said;
use crate::story::READY;
use crate::{Must, Story, cluster, etcd, eventually};

/// The proxies, by number.
pub const PROXIES: [u8; 2] = [1, 2];

/// Brings up a lab as [`cluster::up`] does, whose agents know the proxies alone.
pub async fn up(change: impl FnOnce(&mut LabOptions)) -> Story {
    let mut agents = true;
    let story = Story::up(|options| {
        change(options);
        agents = std::mem::replace(&mut options.agents, false);
        options.etcd = PROXIES.map(url).to_vec();
    })
    .await;
    for member in cluster::MEMBERS {
        cluster::wire(&story, &cluster::name(member), cluster::address(member)).await;
        cluster::start(&story, member);
    }
    cluster::healthy(&story, &cluster::MEMBERS).await;
    for proxy in PROXIES {
        cluster::wire(&story, &name(proxy), address(proxy)).await;
        start(&story, proxy).await;
    }
    cluster::begin(&story, agents).await;
    story
}

/// The namespace of a proxy, as the lab names it.
pub fn name(proxy: u8) -> String {
    format!("p{proxy}")
}

fn address(proxy: u8) -> [u8; 4] {
    [10, 99, 0, 20 + proxy]
}

/// Where a proxy answers.
pub fn url(proxy: u8) -> String {
    let [a, b, c, d] = address(proxy);
    format!("http://{a}.{b}.{c}.{d}:{}", layout::ETCD_PORT)
}

/// As `docs/scale.md` has it.
const COMMAND: &str = "etcd grpc-proxy start --endpoints=https://e1:2379,https://e2:2379,https://e3:2379 --listen-addr=0.0.0.0:2379 --advertise-client-url=PROXY:2379 --max-send-bytes=33554432";
const PAGES_MEMBERS: &str = "https://e1:2379,https://e2:2379,https://e3:2379";

/// Starts a proxy and waits until it hands on what it is asked.
pub async fn start(story: &Story, proxy: u8) {
    let dir = story.dir().join(name(proxy));
    std::fs::create_dir_all(&dir).must("a proxy's directory");
    let mut command = Command::new(lab::etcd::program().must("etcd"));
    cluster::clean(&mut command);
    let members: Vec<String> = cluster::MEMBERS.iter().map(|member| cluster::url(*member, layout::ETCD_PORT)).collect();
    let own = url(proxy);
    let own = own.trim_start_matches("http://");
    let words = COMMAND.replace(PAGES_MEMBERS, &members.join(",")).replace("0.0.0.0:2379", own).replace("PROXY:2379", own);
    command.args(words.split_whitespace().skip(1)).arg("--data-dir").arg(dir.join("data"));
    let netns = story.netns(&name(proxy)).must("a proxy's namespace");
    process::start(command, Some(&netns), &dir.join("proxy.log"), &record(story, proxy)).must("start a proxy");
    eventually(&format!("{} hands on", name(proxy)), READY, || match ask(story, proxy, &["get", "no-such-key"]) {
        said if said.code == Some(0) => Ok(()),
        said => Err(said.err),
    })
    .await;
}

/// Ends a proxy without warning.
pub fn kill(lab: &Lab, proxy: u8) {
    let id = ProcessId::recorded(&record(lab, proxy)).must("a proxy's process id");
    id.signal(Signal::SIGKILL).must("kill a proxy");
    assert!(id.wait(GRACE), "p{proxy} ends");
}

/// Runs etcdctl against one proxy.
pub fn ask(lab: &Lab, proxy: u8, arguments: &[&str]) -> Said {
    etcd::etcdctl_at(lab, "net", &url(proxy), arguments)
}

fn record(lab: &Lab, proxy: u8) -> std::path::PathBuf {
    lab.dir().join(name(proxy)).join("proxy.pid")
}
