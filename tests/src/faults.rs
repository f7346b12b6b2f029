//! What can go wrong, as values that a story composes: each begins and ends.
//!
//! What happens at one moment (a lease revoked, history compacted) has nothing to end. What lasts is ended by [`Fault::end`]; where a story
//! panics before, the lab's end takes all of it along, as it lives in the lab's namespaces.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use nix::sys::signal::Signal;
use overlayctl::lab::process::{GRACE, ProcessId};
use overlayctl::lab::{self, layout};

use crate::cluster::{self, MEMBERS};
use crate::story::READY;
use crate::{Must, Story, damage, etcd, kernel};

/// A fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A host's agent gets SIGTERM or SIGKILL; it is started again at the end.
    AgentEnds(&'static str, Signal),
    /// A host's agent is stopped (SIGSTOP) until the end.
    AgentHangs(&'static str),
    /// Members of the cluster get SIGKILL; they are started again at the end.
    MembersDie(Vec<u8>),
    /// Members of the cluster are stopped until the end: connections stay open and nothing answers.
    MembersHang(Vec<u8>),
    /// The lab's own etcd gets SIGKILL; it is started again at the end.
    EtcdDies,
    /// The lab's own etcd is stopped until the end.
    EtcdHangs,
    /// Packets from the ones to the others are dropped on the switch until the end.
    Cut(Cut),
    /// Another member of the cluster leads.
    LeaderMoves,
    /// All history of the store is dropped.
    Compacted,
    /// The store is defragmented: it answers nothing meanwhile.
    Defragmented,
    /// A host's etcd lease is revoked, as at its expiry: its key goes with it.
    LeaseRevoked(&'static str),
    /// A host's key is deleted.
    KeyDeleted(&'static str),
    /// A host's wire is down until the end.
    UnderlayDown(&'static str),
    /// A host's wire takes this MTU; at the end its old one again.
    UnderlayMtu(&'static str, u32),
    /// A host's address on the underlay is changed to this one; at the end its old one is back.
    UnderlayAddress(&'static str, IpAddr),
    /// A piece of a host's kernel state is deleted or altered: the name of one of [`damage::ALL`].
    Damage(&'static str, &'static str),
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Hosts (`h1`), members (`e1`), or `net` for the lab's own etcd.
    pub from: Vec<String>,
    /// The others.
    pub to: Vec<String>,
    /// Whether packets the other way are dropped as well.
    pub both_ways: bool,
}

impl Cut {
    /// Nothing passes between the ones and the others.
    pub fn between(from: &[&str], to: &[&str]) -> Cut {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Cut { from: owned(from), to: owned(to), both_ways: true }
    }

    /// Nothing passes from the ones to the others; the other way all does.
    pub fn one_way(from: &[&str], to: &[&str]) -> Cut {
        Cut { both_ways: false, ..Cut::between(from, to) }
    }

    /// Nothing passes between a host and every member of the cluster.
    pub fn from_cluster(host: &str) -> Cut {
        Cut::between(&[host], &["e1", "e2", "e3"])
    }

    /// The name of its table on the switch.
    fn table(&self) -> String {
        let letters = |names: &[String]| names.join("_");
        format!("cut_{}_{}", letters(&self.from), letters(&self.to))
    }

    fn script(&self, story: &Story) -> String {
        let mut rules = String::new();
        for from in &self.from {
            for to in &self.to {
                for (a, b) in pairs(story, from, to) {
                    rules += &drop_rule(a, b);
                    if self.both_ways {
                        rules += &drop_rule(b, a);
                    }
                }
            }
        }
        // What passes the switch, and what the switch's own namespace (the lab's own etcd) receives and sends.
        let chain = |hook: &str| format!("chain {hook} {{\ntype filter hook {hook} priority -300\n{rules}}}\n");
        format!("table bridge {} {{\n{}{}{}}}\n", self.table(), chain("forward"), chain("input"), chain("output"))
    }
}

fn drop_rule(from: IpAddr, to: IpAddr) -> String {
    let family = if from.is_ipv4() { "ip" } else { "ip6" };
    format!("{family} saddr {from} {family} daddr {to} counter drop\n")
}

/// The addresses of two targets on the underlay, of the families that both have.
fn pairs(story: &Story, a: &str, b: &str) -> Vec<(IpAddr, IpAddr)> {
    let addresses = |target: &str| -> Vec<IpAddr> {
        if target == "net" {
            return story.layout().families().map(layout::etcd_address).collect();
        }
        match target.strip_prefix('e').and_then(|number| number.parse().ok()) {
            Some(member) => vec![cluster::address(member).into()],
            None => story.at(target).layout().addresses.iter().map(|(_, address)| *address).collect(),
        }
    };
    let (a, b) = (addresses(a), addresses(b));
    a.iter().flat_map(|a| b.iter().filter(|b| a.is_ipv4() == b.is_ipv4()).map(|b| (*a, *b))).collect()
}

impl Fault {
    /// Makes it happen.
    pub async fn begin(&self, story: &Story) {
        match self {
            Fault::AgentEnds(host, signal) => story.at(host).agent_stop(*signal).must("stop the agent"),
            Fault::AgentHangs(host) => signal(&agent(story, host), Signal::SIGSTOP),
            Fault::MembersDie(members) => members.iter().for_each(|m| cluster::signal(story, *m, Signal::SIGKILL)),
            Fault::MembersHang(members) => members.iter().for_each(|m| cluster::signal(story, *m, Signal::SIGSTOP)),
            Fault::EtcdDies => etcd::kill(story),
            Fault::EtcdHangs => signal(&own_etcd(story), Signal::SIGSTOP),
            Fault::Cut(cut) => {
                let file = story.dir().join(cut.table());
                std::fs::write(&file, cut.script(story)).must("write the rules of a partition");
                kernel::run(story, "net", &["nft", "-f", &file.to_string_lossy()]);
            }
            Fault::LeaderMoves => {
                cluster::move_leader(story).await;
            }
            Fault::Compacted => cluster::compact(story),
            Fault::Defragmented => {
                etcd::etcdctl(story, &["defrag", "--command-timeout=30s"]).exits(0);
            }
            Fault::LeaseRevoked(host) => etcd::revoke(story, story.lease_of(host).lease),
            Fault::KeyDeleted(host) => etcd::delete(story, &story.lease_of(host).key),
            Fault::UnderlayDown(host) => {
                kernel::run(story, host, &["ip", "link", "set", "eth0", "down"]);
            }
            Fault::UnderlayMtu(host, mtu) => {
                kernel::run(story, host, &["ip", "link", "set", "eth0", "mtu", &mtu.to_string()]);
            }
            Fault::UnderlayAddress(host, address) => readdress(story, host, own_address(story, host), *address),
            Fault::Damage(host, name) => damage::named(name).on(story, host),
        }
    }

    /// Ends it. Does not wait for what follows from that.
    pub async fn end(&self, story: &Story) {
        match self {
            Fault::AgentEnds(host, _) => {
                story.at(host).agent_start(&[]).must("start the agent");
            }
            Fault::AgentHangs(host) => signal(&agent(story, host), Signal::SIGCONT),
            Fault::MembersDie(members) => members.iter().for_each(|m| cluster::start(story, *m)),
            Fault::MembersHang(members) => members.iter().for_each(|m| cluster::signal(story, *m, Signal::SIGCONT)),
            Fault::EtcdDies => etcd::start(story).await,
            Fault::EtcdHangs => signal(&own_etcd(story), Signal::SIGCONT),
            Fault::Cut(cut) => {
                kernel::run(story, "net", &["nft", "delete", "table", "bridge", &cut.table()]);
            }
            Fault::UnderlayDown(host) => {
                // The default route went with the link.
                kernel::shell(story, host, "ip link set eth0 up; ip route replace default via 10.99.0.254 dev eth0");
            }
            Fault::UnderlayMtu(host, _) => {
                kernel::run(story, host, &["ip", "link", "set", "eth0", "mtu", "1500"]);
            }
            Fault::UnderlayAddress(host, address) => readdress(story, host, *address, own_address(story, host)),
            Fault::LeaderMoves
            | Fault::Compacted
            | Fault::Defragmented
            | Fault::LeaseRevoked(_)
            | Fault::KeyDeleted(_)
            | Fault::Damage(..) => {}
        }
    }

    /// Begins it, lets it last, ends it, and waits until every agent is well again.
    pub async fn over(&self, story: &Story, time: Duration) {
        self.begin(story).await;
        tokio::time::sleep(time).await;
        self.end(story).await;
        if let Fault::MembersDie(members) | Fault::MembersHang(members) = self {
            cluster::healthy(story, members).await;
        }
        cluster::all_well(story).await;
    }

    /// All members of the cluster at once, by SIGKILL.
    pub fn all_members_die() -> Fault {
        Fault::MembersDie(MEMBERS.to_vec())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// The address of a host on the underlay, as the lab gave it.
fn own_address(story: &Story, host: &str) -> IpAddr {
    let addresses = &story.at(host).layout().addresses;
    addresses.v4.or(addresses.v6).must("an address")
}

/// The new address is there before the old one goes, and is not taken along by it.
fn readdress(story: &Story, host: &str, old: IpAddr, new: IpAddr) {
    let length = layout::underlay(overlay_agent::model::Family::of(new)).length();
    let script = format!(
        "echo 1 >/proc/sys/net/ipv4/conf/eth0/promote_secondaries
         ip address add {new}/{length} dev eth0
         ip address delete {old}/{length} dev eth0"
    );
    kernel::shell(story, host, &script);
}

fn agent(story: &Story, host: &str) -> ProcessId {
    story.at(host).agent().must("a running agent")
}

fn own_etcd(story: &Story) -> ProcessId {
    ProcessId::recorded(&lab::etcd::record(story.dir())).must("etcd's process id")
}

fn signal(id: &ProcessId, signal: Signal) {
    id.signal(signal).must("signal a process");
    if signal == Signal::SIGKILL {
        assert!(id.wait(GRACE), "process {} ends", id.pid);
    }
}

/// Waits until a host's agent is ready again.
pub async fn ready(story: &Story, host: &str) {
    story.at(host).wait_ready(READY).await.must(host);
}
