//! Table of probes: schedule, replies, and the reachability of each peer. Pure: callers pass the time, in microseconds of a
//! monotonic clock.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use crate::model::Cidr;
use crate::model::api::{Mesh, MeshEntry, PathView, PeerEntry, Reachability};

/// Maximum number of echo requests per second. 10,000 peers with two paths each are probed once in 400 s, with some 4 kB/s.
pub const MAX_PROBES_PER_SECOND: u32 = 50;
/// Time after which a probe without a reply counts as lost.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of remembered probes per path, one bit each.
const PROBE_HISTORY: u32 = 16;
/// Number of consecutive lost probes after which a path counts as silent: a single probe may be lost by chance.
const SILENT_AFTER: u32 = 2;
/// Time for which a departed peer is reported.
const DEPARTED_RETENTION: Duration = Duration::from_secs(3600);
/// Maximum number of reported departed peers.
const MAX_DEPARTED: usize = 64;

/// One of the two paths to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbePath {
    /// To its VTEP.
    Overlay,
    /// To its public IP.
    Underlay,
}

impl ProbePath {
    /// The path as a word.
    pub const fn as_str(self) -> &'static str {
        match self {
            ProbePath::Overlay => "overlay",
            ProbePath::Underlay => "underlay",
        }
    }
}

/// Summary of all probes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Number of peers by reachability, without departed ones.
    pub states: BTreeMap<Reachability, u64>,
    /// Longest mean round-trip time to a VTEP, in microseconds; 0 without any reply.
    pub worst_overlay: u64,
    /// Longest mean round-trip time to a public IP, in microseconds.
    pub worst_underlay: u64,
}

/// A probe to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Identifies its reply.
    pub number: u64,
    /// Destination.
    pub address: IpAddr,
}

#[derive(Debug, Clone)]
struct PathStats {
    address: IpAddr,
    /// Outcomes, the latest in the lowest bit; 1 is a lost probe.
    loss_bits: u32,
    count: u32,
    last_rtt: Option<u64>,
    mean_rtt: Option<u64>,
    error: Option<String>,
}

impl PathStats {
    fn new(address: IpAddr) -> PathStats {
        PathStats { address, loss_bits: 0, count: 0, last_rtt: None, mean_rtt: None, error: None }
    }

    fn record(&mut self, lost: bool) {
        self.loss_bits = (self.loss_bits << 1 | u32::from(lost)) & ((1 << PROBE_HISTORY) - 1);
        self.count = (self.count + 1).min(PROBE_HISTORY);
    }

    /// Whether the path replies; `None` before the first outcome.
    fn is_responding(&self) -> Option<bool> {
        let last = self.count.min(SILENT_AFTER);
        (last > 0).then(|| self.loss_bits & ((1 << last) - 1) != (1 << last) - 1)
    }

    fn view(&self) -> PathView {
        PathView {
            address: self.address,
            probes: self.count,
            lost: self.loss_bits.count_ones(),
            last_micros: self.last_rtt,
            mean_micros: self.mean_rtt,
            error: self.error.clone(),
        }
    }
}

#[derive(Debug, Clone)]
struct PeerProbes {
    host: Option<String>,
    overlay: PathStats,
    underlay: PathStats,
}

impl PeerProbes {
    fn stats_mut(&mut self, path: ProbePath) -> &mut PathStats {
        match path {
            ProbePath::Overlay => &mut self.overlay,
            ProbePath::Underlay => &mut self.underlay,
        }
    }

    fn state(&self) -> Reachability {
        match (self.overlay.is_responding(), self.underlay.is_responding()) {
            (Some(true), Some(true)) if self.overlay.loss_bits | self.underlay.loss_bits != 0 => Reachability::Lossy,
            (Some(true), Some(true)) => Reachability::Ok,
            (Some(true), Some(false)) => Reachability::UnderlaySilent,
            (Some(false), Some(true)) => Reachability::OverlayDown,
            (Some(false), Some(false)) => Reachability::Unreachable,
            _ => Reachability::Unknown,
        }
    }

    fn entry(&self, subnet: Cidr, gone_since: Option<u64>) -> MeshEntry {
        MeshEntry {
            subnet,
            host: self.host.clone(),
            state: if gone_since.is_some() { Reachability::Gone } else { self.state() },
            overlay: self.overlay.view(),
            underlay: self.underlay.view(),
            gone_since,
        }
    }
}

/// Table of peers and their probes.
#[derive(Debug, Default)]
pub struct ProbeTable {
    rows: BTreeMap<Cidr, PeerProbes>,
    /// Departed peers, with the time at which each was found gone, in seconds since the epoch.
    departed: BTreeMap<Cidr, (PeerProbes, u64)>,
    /// Remaining probes of this round.
    queue: VecDeque<(Cidr, ProbePath)>,
    /// Probes without a reply yet, by number: ascending in number and in time.
    in_flight: BTreeMap<u64, (Cidr, ProbePath, u64)>,
    last_number: u64,
}

impl ProbeTable {
    /// Starts a round over these peers; `epoch` is in seconds since 1970. A new address resets a peer's statistics.
    pub fn start_round(&mut self, peers: &[PeerEntry], epoch: u64) {
        let mut before = std::mem::take(&mut self.rows);
        self.queue.clear();
        for peer in peers {
            let (vtep, public) = (peer.subnet.base(), peer.public_ip);
            let mut row = before
                .remove(&peer.subnet)
                .filter(|row| row.underlay.address == public)
                .unwrap_or_else(|| PeerProbes { host: None, overlay: PathStats::new(vtep), underlay: PathStats::new(public) });
            row.host.clone_from(&peer.host);
            self.departed.remove(&peer.subnet);
            self.rows.insert(peer.subnet, row);
            self.queue.extend([(peer.subnet, ProbePath::Overlay), (peer.subnet, ProbePath::Underlay)]);
        }
        self.departed
            .extend(before.into_iter().filter(|(subnet, _)| !self.rows.contains_key(subnet)).map(|(s, row)| (s, (row, epoch))));
        self.departed.retain(|_, (_, since)| epoch.saturating_sub(*since) < DEPARTED_RETENTION.as_secs());
        while self.departed.len() > MAX_DEPARTED {
            let oldest = self.departed.iter().min_by_key(|(_, (_, since))| *since).map(|(subnet, _)| *subnet);
            oldest.map(|subnet| self.departed.remove(&subnet));
        }
    }

    /// The next probe of this round; `None` at the end of the round.
    pub fn next_probe(&mut self, now: u64) -> Option<Probe> {
        let (subnet, path) = self.queue.pop_front()?;
        let address = self.rows.get_mut(&subnet)?.stats_mut(path).address;
        self.last_number += 1;
        self.in_flight.insert(self.last_number, (subnet, path, now));
        Some(Probe { number: self.last_number, address })
    }

    /// Records that a probe could not be sent. Returns its path, if its peer still exists.
    pub fn send_failed(&mut self, number: u64, error: String) -> Option<ProbePath> {
        let (subnet, path, _) = self.in_flight.remove(&number)?;
        let stats = self.rows.get_mut(&subnet)?.stats_mut(path);
        stats.record(true);
        stats.error = Some(error);
        Some(path)
    }

    /// Records a reply. Ignores replies to expired probes, and replies from another address than the probe's destination. Returns
    /// the path and the round-trip time in microseconds.
    pub fn on_reply(&mut self, number: u64, from: IpAddr, now: u64) -> Option<(ProbePath, u64)> {
        let &(subnet, path, sent) = self.in_flight.get(&number)?;
        let stats = self.rows.get_mut(&subnet).map(|row| row.stats_mut(path)).filter(|path| path.address == from)?;
        self.in_flight.remove(&number);
        let rtt = now.saturating_sub(sent);
        stats.record(false);
        stats.error = None;
        stats.last_rtt = Some(rtt);
        stats.mean_rtt = Some(stats.mean_rtt.map_or(rtt, |mean| (mean * 7 + rtt) / 8));
        Some((path, rtt))
    }

    /// Expires probes after [`PROBE_TIMEOUT`]; calls `on_lost` for each one whose peer still exists.
    pub fn expire(&mut self, now: u64, mut on_lost: impl FnMut(ProbePath)) {
        let timeout = u64::try_from(PROBE_TIMEOUT.as_micros()).unwrap_or(u64::MAX);
        while let Some((&number, &(subnet, path, sent))) = self.in_flight.first_key_value() {
            if now.saturating_sub(sent) < timeout {
                return;
            }
            self.in_flight.remove(&number);
            if let Some(row) = self.rows.get_mut(&subnet) {
                row.stats_mut(path).record(true);
                on_lost(path);
            }
        }
    }

    /// Whether any probe awaits its reply.
    pub fn has_in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Pause between two probes. A round takes `interval`, or longer if that would exceed [`MAX_PROBES_PER_SECOND`].
    pub fn probe_interval(&self, interval: Duration) -> Duration {
        let probes = u32::try_from(self.rows.len() * 2).unwrap_or(u32::MAX).max(1);
        (interval / probes).max(Duration::from_secs(1) / MAX_PROBES_PER_SECOND)
    }

    /// The table for the API.
    pub fn view(&self, node: &str, interval: Duration) -> Mesh {
        let mut peers: Vec<MeshEntry> = self.rows.iter().map(|(subnet, row)| row.entry(*subnet, None)).collect();
        peers.extend(self.departed.iter().map(|(subnet, (row, since))| row.entry(*subnet, Some(*since))));
        Mesh { node: node.to_owned(), interval_seconds: interval.as_secs(), error: None, peers }
    }

    /// Summary of the table.
    pub fn summary(&self) -> Summary {
        let mut all = Summary::default();
        for row in self.rows.values() {
            *all.states.entry(row.state()).or_default() += 1;
            all.worst_overlay = all.worst_overlay.max(row.overlay.mean_rtt.unwrap_or(0));
            all.worst_underlay = all.worst_underlay.max(row.underlay.mean_rtt.unwrap_or(0));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u8) -> PeerEntry {
        PeerEntry {
            subnet: format!("10.244.{number}.0/24").parse().expect("cidr"),
            host: Some(format!("h{number}")),
            public_ip: format!("192.0.2.{number}").parse().expect("ip"),
            vtep: Some(crate::model::Mac([2, 0, 0, 0, 0, number])),
            device: "ovx.1".to_owned(),
            nexthop_id: None,
            state: "programmed".to_owned(),
            last_repair: None,
        }
    }

    /// Runs some rounds; `reply_time` returns an address's round-trip time, or `None` if it does not reply.
    fn run_rounds(table: &mut ProbeTable, peers: &[PeerEntry], count: u64, reply_time: impl Fn(IpAddr) -> Option<u64>) -> Mesh {
        for round in 0..count {
            let now = round * 10_000_000;
            table.start_round(peers, 1000 + round);
            while let Some(probe) = table.next_probe(now) {
                if let Some(took) = reply_time(probe.address) {
                    table.on_reply(probe.number, probe.address, now + took);
                }
            }
            table.expire(now + 3_000_000, |_| {});
        }
        table.view("me", Duration::from_secs(30))
    }

    #[test]
    fn overlay_and_underlay_faults_are_distinguished() {
        let peers = [peer(1), peer(2), peer(3), peer(4)];
        let mut table = ProbeTable::default();
        let mesh = run_rounds(&mut table, &peers, 3, |address| match address.to_string().as_str() {
            "10.244.1.0" | "192.0.2.1" | "192.0.2.2" | "10.244.3.0" => Some(800),
            _ => None,
        });
        let states: Vec<Reachability> = mesh.peers.iter().map(|peer| peer.state).collect();
        assert_eq!(
            states,
            [Reachability::Ok, Reachability::OverlayDown, Reachability::UnderlaySilent, Reachability::Unreachable]
        );
        let summary = table.summary();
        assert_eq!(summary.states, states.iter().map(|state| (*state, 1)).collect());
        assert_eq!((summary.worst_overlay, summary.worst_underlay), (800, 800));
        let path = &mesh.peers[0].overlay;
        assert_eq!((path.probes, path.lost, path.last_micros, path.mean_micros), (3, 0, Some(800), Some(800)));
        assert_eq!((mesh.peers[3].overlay.probes, mesh.peers[3].overlay.lost), (3, 3));
    }

    #[test]
    fn single_lost_probe_is_lossy_not_unreachable() {
        let mut table = ProbeTable::default();
        run_rounds(&mut table, &[peer(1)], 4, |_| Some(100));
        let mesh = run_rounds(&mut table, &[peer(1)], 1, |_| None);
        assert_eq!((mesh.peers[0].state, mesh.peers[0].overlay.lost), (Reachability::Lossy, 1));
        let mesh = run_rounds(&mut table, &[peer(1)], 1, |_| None);
        assert_eq!(mesh.peers[0].state, Reachability::Unreachable);
        let mesh = run_rounds(&mut table, &[peer(1)], 16, |_| Some(100));
        assert_eq!(mesh.peers[0].state, Reachability::Ok, "lost probes are forgotten after 16 more");
    }

    #[test]
    fn departed_peer_is_gone_and_moved_peer_resets() {
        let mut table = ProbeTable::default();
        run_rounds(&mut table, &[peer(1), peer(2)], 2, |_| None);
        table.start_round(&[peer(1)], 2000);
        let mesh = table.view("me", Duration::ZERO);
        assert_eq!(
            mesh.peers.iter().map(|p| (p.state, p.gone_since)).collect::<Vec<_>>(),
            [(Reachability::Unreachable, None), (Reachability::Gone, Some(2000))]
        );
        let moved = PeerEntry { public_ip: "192.0.2.99".parse().expect("ip"), ..peer(1) };
        table.start_round(&[moved, peer(2)], 2001);
        let mesh = table.view("me", Duration::ZERO);
        assert!(mesh.peers.iter().all(|p| p.state == Reachability::Unknown && p.gone_since.is_none()), "{mesh:?}");
        table.start_round(&[], 2002);
        table.start_round(&[], 2002 + DEPARTED_RETENTION.as_secs());
        assert!(table.view("me", Duration::ZERO).peers.is_empty());
    }

    #[test]
    fn probe_rate_is_bounded_and_stale_replies_ignored() {
        let mut table = ProbeTable::default();
        let many: Vec<PeerEntry> = (1..=200).map(peer).collect();
        table.start_round(&many[..3], 0);
        assert_eq!(table.probe_interval(Duration::from_secs(30)), Duration::from_secs(5));
        table.start_round(&many, 0);
        assert_eq!(table.probe_interval(Duration::from_secs(1)), Duration::from_millis(20));
        let probe = table.next_probe(0).expect("a probe");
        assert_eq!(table.on_reply(probe.number, "203.0.113.1".parse().expect("ip"), 5), None);
        assert_eq!(table.view("me", Duration::ZERO).peers[0].overlay.probes, 0);
        let mut lost = Vec::new();
        table.expire(3_000_000, |path| lost.push(path));
        assert_eq!(lost, [ProbePath::Overlay]);
        table.on_reply(probe.number, probe.address, 3_000_001);
        assert_eq!((table.view("me", Duration::ZERO).peers[0].overlay.lost, table.has_in_flight()), (1, false));
    }
}
