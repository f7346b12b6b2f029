//! Faults as values that a test combines: each has a begin and an end.
//!
//! A momentary fault (a lease revoked, history compacted) needs no end. [`Fault::end`] ends a lasting one. If a test panics
//! earlier, the fault ends with the lab, because it exists only in the lab's namespaces.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use nix::sys::signal::Signal;
use overlayctl::lab::process::{ProcessId, TERM_GRACE};
use overlayctl::lab::{self, layout};

use crate::cluster::{self, MEMBERS};
use crate::test_lab::READY_TIMEOUT;
use crate::{ExpectContext, TestLab, etcd, kernel, kernel_fault};

/// A fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A host's agent gets SIGTERM or SIGKILL; it is started again at the end.
    AgentKilled(&'static str, Signal),
    /// A host's agent is stopped (SIGSTOP) until the end.
    AgentFrozen(&'static str),
    /// Members of the cluster get SIGKILL; they are started again at the end.
    MembersKilled(Vec<u8>),
    /// Members of the cluster are stopped until the end: connections stay open and nothing answers.
    MembersFrozen(Vec<u8>),
    /// The lab's own etcd gets SIGKILL; it is started again at the end.
    EtcdKilled,
    /// The lab's own etcd is stopped until the end.
    EtcdFrozen,
    /// Packets in one or both directions are dropped on the switch until the end.
    LinkCut(LinkCut),
    /// The leadership of the cluster moves to another member.
    LeaderMoves,
    /// All history of the store is compacted.
    HistoryCompacted,
    /// The store is defragmented: it does not answer meanwhile.
    Defragmented,
    /// A host's etcd lease is revoked, as at its expiry, which deletes its key.
    LeaseRevoked(&'static str),
    /// A host's key is deleted.
    KeyDeleted(&'static str),
    /// A host's underlay interface is down until the end.
    UnderlayDown(&'static str),
    /// A host's underlay interface has this MTU until the end.
    UnderlayMtu(&'static str, u32),
    /// A host's underlay address is this one until the end.
    UnderlayAddress(&'static str, IpAddr),
    /// A part of a host's kernel state is deleted or changed: a name in [`kernel_fault::ALL`].
    KernelFault(&'static str, &'static str),
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkCut {
    /// Hosts (`h1`), members (`e1`), or `net` for the lab's own etcd.
    pub from: Vec<String>,
    /// The other side of the partition.
    pub to: Vec<String>,
    /// Whether packets in the opposite direction are dropped as well.
    pub bidirectional: bool,
}

impl LinkCut {
    /// Drops everything between two sides.
    pub fn between(from: &[&str], to: &[&str]) -> LinkCut {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        LinkCut { from: owned(from), to: owned(to), bidirectional: true }
    }

    /// Drops everything from one side to the other, but not in the opposite direction.
    pub fn one_way(from: &[&str], to: &[&str]) -> LinkCut {
        LinkCut { bidirectional: false, ..LinkCut::between(from, to) }
    }

    /// Drops everything between a host and every member of the cluster.
    pub fn from_cluster(host: &str) -> LinkCut {
        LinkCut::between(&[host], &["e1", "e2", "e3"])
    }

    /// The name of the partition's table on the switch.
    fn table_name(&self) -> String {
        let letters = |names: &[String]| names.join("_");
        format!("cut_{}_{}", letters(&self.from), letters(&self.to))
    }

    fn ruleset(&self, lab: &TestLab) -> String {
        let mut rules = String::new();
        for from in &self.from {
            for to in &self.to {
                for (a, b) in pairs(lab, from, to) {
                    rules += &drop_rule(a, b);
                    if self.bidirectional {
                        rules += &drop_rule(b, a);
                    }
                }
            }
        }
        // `forward` covers switched packets; `input` and `output` those of the switch's own namespace, which holds the lab's
        // etcd.
        let chain = |hook: &str| format!("chain {hook} {{\ntype filter hook {hook} priority -300\n{rules}}}\n");
        format!("table bridge {} {{\n{}{}{}}}\n", self.table_name(), chain("forward"), chain("input"), chain("output"))
    }
}

fn drop_rule(from: IpAddr, to: IpAddr) -> String {
    let family = if from.is_ipv4() { "ip" } else { "ip6" };
    format!("{family} saddr {from} {family} daddr {to} counter drop\n")
}

/// The underlay addresses of two targets, in the families that both have.
fn pairs(lab: &TestLab, a: &str, b: &str) -> Vec<(IpAddr, IpAddr)> {
    let addresses = |target: &str| -> Vec<IpAddr> {
        if target == "net" {
            return lab.layout().families().map(layout::etcd_address).collect();
        }
        match target.strip_prefix('e').and_then(|number| number.parse().ok()) {
            Some(member) => vec![cluster::address(member).into()],
            None => lab.host(target).layout().addresses.iter().map(|(_, address)| *address).collect(),
        }
    };
    let (a, b) = (addresses(a), addresses(b));
    a.iter().flat_map(|a| b.iter().filter(|b| a.is_ipv4() == b.is_ipv4()).map(|b| (*a, *b))).collect()
}

impl Fault {
    /// Begins the fault.
    pub async fn begin(&self, lab: &TestLab) {
        match self {
            Fault::AgentKilled(host, signal) => lab.host(host).agent_stop(*signal).expect_ok("stop the agent"),
            Fault::AgentFrozen(host) => signal(&agent_process(lab, host), Signal::SIGSTOP),
            Fault::MembersKilled(members) => members.iter().for_each(|m| cluster::signal(lab, *m, Signal::SIGKILL)),
            Fault::MembersFrozen(members) => members.iter().for_each(|m| cluster::signal(lab, *m, Signal::SIGSTOP)),
            Fault::EtcdKilled => etcd::kill(lab),
            Fault::EtcdFrozen => signal(&etcd_process(lab), Signal::SIGSTOP),
            Fault::LinkCut(cut) => {
                let file = lab.dir().join(cut.table_name());
                std::fs::write(&file, cut.ruleset(lab)).expect_ok("write the rules of a partition");
                kernel::run(lab, "net", &["nft", "-f", &file.to_string_lossy()]);
            }
            Fault::LeaderMoves => {
                cluster::move_leader(lab).await;
            }
            Fault::HistoryCompacted => cluster::compact(lab),
            Fault::Defragmented => {
                etcd::etcdctl(lab, &["defrag", "--command-timeout=30s"]).assert_code(0);
            }
            Fault::LeaseRevoked(host) => etcd::revoke(lab, lab.lease_of(host).lease),
            Fault::KeyDeleted(host) => etcd::delete(lab, &lab.lease_of(host).key),
            Fault::UnderlayDown(host) => {
                kernel::run(lab, host, &["ip", "link", "set", "eth0", "down"]);
            }
            Fault::UnderlayMtu(host, mtu) => {
                kernel::run(lab, host, &["ip", "link", "set", "eth0", "mtu", &mtu.to_string()]);
            }
            Fault::UnderlayAddress(host, address) => replace_address(lab, host, own_address(lab, host), *address),
            Fault::KernelFault(host, name) => kernel_fault::by_name(name).inject(lab, host),
        }
    }

    /// Ends the fault. Does not wait for the recovery.
    pub async fn end(&self, lab: &TestLab) {
        match self {
            Fault::AgentKilled(host, _) => {
                lab.host(host).agent_start(&[]).expect_ok("start the agent");
            }
            Fault::AgentFrozen(host) => signal(&agent_process(lab, host), Signal::SIGCONT),
            Fault::MembersKilled(members) => members.iter().for_each(|m| cluster::start(lab, *m)),
            Fault::MembersFrozen(members) => members.iter().for_each(|m| cluster::signal(lab, *m, Signal::SIGCONT)),
            Fault::EtcdKilled => etcd::start(lab).await,
            Fault::EtcdFrozen => signal(&etcd_process(lab), Signal::SIGCONT),
            Fault::LinkCut(cut) => {
                kernel::run(lab, "net", &["nft", "delete", "table", "bridge", &cut.table_name()]);
            }
            Fault::UnderlayDown(host) => {
                // The default route was lost with the link.
                kernel::shell(lab, host, "ip link set eth0 up; ip route replace default via 10.99.0.254 dev eth0");
            }
            Fault::UnderlayMtu(host, _) => {
                kernel::run(lab, host, &["ip", "link", "set", "eth0", "mtu", "1500"]);
            }
            Fault::UnderlayAddress(host, address) => replace_address(lab, host, *address, own_address(lab, host)),
            Fault::LeaderMoves
            | Fault::HistoryCompacted
            | Fault::Defragmented
            | Fault::LeaseRevoked(_)
            | Fault::KeyDeleted(_)
            | Fault::KernelFault(..) => {}
        }
    }

    /// Begins the fault, ends it after some time, and waits until every agent is healthy again.
    pub async fn run_for(&self, lab: &TestLab, time: Duration) {
        self.begin(lab).await;
        tokio::time::sleep(time).await;
        self.end(lab).await;
        if let Fault::MembersKilled(members) | Fault::MembersFrozen(members) = self {
            cluster::wait_members_healthy(lab, members).await;
        }
        cluster::wait_agents_healthy(lab).await;
    }

    /// SIGKILL to all members of the cluster at once.
    pub fn all_members_killed() -> Fault {
        Fault::MembersKilled(MEMBERS.to_vec())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A host's underlay address in the lab's layout.
fn own_address(lab: &TestLab, host: &str) -> IpAddr {
    let addresses = &lab.host(host).layout().addresses;
    addresses.v4.or(addresses.v6).expect_ok("an address")
}

/// Adds the new address before it deletes the old one; `promote_secondaries` keeps the new one.
fn replace_address(lab: &TestLab, host: &str, old: IpAddr, new: IpAddr) {
    let length = layout::underlay(overlay_agent::model::Family::of(new)).length();
    let script = format!(
        "echo 1 >/proc/sys/net/ipv4/conf/eth0/promote_secondaries
         ip address add {new}/{length} dev eth0
         ip address delete {old}/{length} dev eth0"
    );
    kernel::shell(lab, host, &script);
}

fn agent_process(lab: &TestLab, host: &str) -> ProcessId {
    lab.host(host).agent().expect_ok("a running agent")
}

fn etcd_process(lab: &TestLab) -> ProcessId {
    ProcessId::from_pid_file(&lab::etcd::pid_file(lab.dir())).expect_ok("etcd's process id")
}

fn signal(id: &ProcessId, signal: Signal) {
    id.signal(signal).expect_ok("signal a process");
    if signal == Signal::SIGKILL {
        assert!(id.wait(TERM_GRACE), "process {} ends", id.pid);
    }
}

/// Waits until a host's agent is ready again.
pub async fn wait_ready(lab: &TestLab, host: &str) {
    lab.host(host).wait_ready(READY_TIMEOUT).await.expect_ok(host);
}
