//! The book of probes: which peer is probed next over which path, what came back, and what that says. Pure: the time is given, in microseconds of
//! any clock that only goes forward.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use crate::model::Cidr;
use crate::model::api::{Mesh, MeshEntry, PathView, PeerEntry, Reach};

/// The most echo requests a second, however many peers: 10,000 peers, with two paths each, are probed once in 400 s, for some 4 kB/s.
pub const MOST_A_SECOND: u32 = 50;
/// How long an answer is waited for.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// Probes of a path that are remembered, a bit each.
const REMEMBERED: u32 = 16;
/// The last probes that have to be lost for a path to count as silent: one may be lost by chance.
const SILENT: u32 = 2;
/// How long a peer that has gone is told of, and how many at the most.
const GONE: Duration = Duration::from_secs(3600);
const GONE_MOST: usize = 64;

/// One of the two ways to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To its VTEP.
    Overlay,
    /// To its public IP.
    Underlay,
}

impl Way {
    /// As a word.
    pub const fn word(self) -> &'static str {
        match self {
            Way::Overlay => "overlay",
            Way::Underlay => "underlay",
        }
    }
}

/// What all probes come to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// How many peers are reached how; those that have gone are not counted.
    pub states: BTreeMap<Reach, u64>,
    /// The longest of the means to a VTEP, in microseconds; 0 where nothing has answered.
    pub worst_overlay: u64,
    /// The same to a public IP.
    pub worst_underlay: u64,
}

/// A probe to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Tells its answer from others.
    pub number: u64,
    /// Whom to ask.
    pub address: IpAddr,
}

#[derive(Debug, Clone)]
struct Path {
    address: IpAddr,
    /// The outcomes, the last one in the lowest bit; a lost one is 1.
    lost: u32,
    count: u32,
    last: Option<u64>,
    mean: Option<u64>,
    error: Option<String>,
}

impl Path {
    fn new(address: IpAddr) -> Path {
        Path { address, lost: 0, count: 0, last: None, mean: None, error: None }
    }

    fn note(&mut self, lost: bool) {
        self.lost = (self.lost << 1 | u32::from(lost)) & ((1 << REMEMBERED) - 1);
        self.count = (self.count + 1).min(REMEMBERED);
    }

    /// Whether it answers; `None` where that is not known yet.
    fn answers(&self) -> Option<bool> {
        let last = self.count.min(SILENT);
        (last > 0).then(|| self.lost & ((1 << last) - 1) != (1 << last) - 1)
    }

    fn view(&self) -> PathView {
        PathView {
            address: self.address,
            probes: self.count,
            lost: self.lost.count_ones(),
            last_micros: self.last,
            mean_micros: self.mean,
            error: self.error.clone(),
        }
    }
}

#[derive(Debug, Clone)]
struct Row {
    host: Option<String>,
    overlay: Path,
    underlay: Path,
}

impl Row {
    fn path(&mut self, way: Way) -> &mut Path {
        match way {
            Way::Overlay => &mut self.overlay,
            Way::Underlay => &mut self.underlay,
        }
    }

    fn state(&self) -> Reach {
        match (self.overlay.answers(), self.underlay.answers()) {
            (Some(true), Some(true)) if self.overlay.lost | self.underlay.lost != 0 => Reach::Lossy,
            (Some(true), Some(true)) => Reach::Ok,
            (Some(true), Some(false)) => Reach::UnderlaySilent,
            (Some(false), Some(true)) => Reach::OverlayDown,
            (Some(false), Some(false)) => Reach::Unreachable,
            _ => Reach::Unknown,
        }
    }

    fn entry(&self, subnet: Cidr, gone_since: Option<u64>) -> MeshEntry {
        MeshEntry {
            subnet,
            host: self.host.clone(),
            state: if gone_since.is_some() { Reach::Gone } else { self.state() },
            overlay: self.overlay.view(),
            underlay: self.underlay.view(),
            gone_since,
        }
    }
}

/// The book.
#[derive(Debug, Default)]
pub struct Book {
    rows: BTreeMap<Cidr, Row>,
    /// With the second since the epoch at which each was found gone.
    gone: BTreeMap<Cidr, (Row, u64)>,
    /// What this round has still to probe.
    round: VecDeque<(Cidr, Way)>,
    /// Probes that wait for their answer, by number: ascending in number and in time.
    waiting: BTreeMap<u64, (Cidr, Way, u64)>,
    last: u64,
}

impl Book {
    /// Begins a round over these peers; `epoch` is the second since 1970. A peer with another address than before begins anew.
    pub fn begin(&mut self, peers: &[PeerEntry], epoch: u64) {
        let mut before = std::mem::take(&mut self.rows);
        self.round.clear();
        for peer in peers {
            let (vtep, public) = (peer.subnet.base(), peer.public_ip);
            let mut row = before.remove(&peer.subnet).filter(|row| row.underlay.address == public).unwrap_or_else(|| Row {
                host: None,
                overlay: Path::new(vtep),
                underlay: Path::new(public),
            });
            row.host.clone_from(&peer.host);
            self.gone.remove(&peer.subnet);
            self.rows.insert(peer.subnet, row);
            self.round.extend([(peer.subnet, Way::Overlay), (peer.subnet, Way::Underlay)]);
        }
        self.gone
            .extend(before.into_iter().filter(|(subnet, _)| !self.rows.contains_key(subnet)).map(|(s, row)| (s, (row, epoch))));
        self.gone.retain(|_, (_, since)| epoch.saturating_sub(*since) < GONE.as_secs());
        while self.gone.len() > GONE_MOST {
            let oldest = self.gone.iter().min_by_key(|(_, (_, since))| *since).map(|(subnet, _)| *subnet);
            oldest.map(|subnet| self.gone.remove(&subnet));
        }
    }

    /// The next probe of this round; `None` at its end.
    pub fn next(&mut self, now: u64) -> Option<Probe> {
        let (subnet, way) = self.round.pop_front()?;
        let address = self.rows.get_mut(&subnet)?.path(way).address;
        self.last += 1;
        self.waiting.insert(self.last, (subnet, way, now));
        Some(Probe { number: self.last, address })
    }

    /// A probe could not be sent. By which way it was, where its peer is still there.
    pub fn unsent(&mut self, number: u64, error: String) -> Option<Way> {
        let (subnet, way, _) = self.waiting.remove(&number)?;
        let path = self.rows.get_mut(&subnet)?.path(way);
        path.note(true);
        path.error = Some(error);
        Some(way)
    }

    /// An answer came. One that nobody waits for any more is passed over, and so is one from another address than was asked. By which way it came,
    /// and how many microseconds it took.
    pub fn answered(&mut self, number: u64, from: IpAddr, now: u64) -> Option<(Way, u64)> {
        let &(subnet, way, sent) = self.waiting.get(&number)?;
        let path = self.rows.get_mut(&subnet).map(|row| row.path(way)).filter(|path| path.address == from)?;
        self.waiting.remove(&number);
        let took = now.saturating_sub(sent);
        path.note(false);
        path.error = None;
        path.last = Some(took);
        path.mean = Some(path.mean.map_or(took, |mean| (mean * 7 + took) / 8));
        Some((way, took))
    }

    /// Gives up those that have waited too long; `lost` is told of each whose peer is still there.
    pub fn expire(&mut self, now: u64, mut lost: impl FnMut(Way)) {
        let patience = u64::try_from(PATIENCE.as_micros()).unwrap_or(u64::MAX);
        while let Some((&number, &(subnet, way, sent))) = self.waiting.first_key_value() {
            if now.saturating_sub(sent) < patience {
                return;
            }
            self.waiting.remove(&number);
            if let Some(row) = self.rows.get_mut(&subnet) {
                row.path(way).note(true);
                lost(way);
            }
        }
    }

    /// Whether answers are waited for.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The pause between two probes, so that a round takes `interval`, or longer where that would be too many a second.
    pub fn pause(&self, interval: Duration) -> Duration {
        let probes = u32::try_from(self.rows.len() * 2).unwrap_or(u32::MAX).max(1);
        (interval / probes).max(Duration::from_secs(1) / MOST_A_SECOND)
    }

    /// All of it.
    pub fn view(&self, node: &str, interval: Duration) -> Mesh {
        let mut peers: Vec<MeshEntry> = self.rows.iter().map(|(subnet, row)| row.entry(*subnet, None)).collect();
        peers.extend(self.gone.iter().map(|(subnet, (row, since))| row.entry(*subnet, Some(*since))));
        Mesh { node: node.to_owned(), interval_seconds: interval.as_secs(), error: None, peers }
    }

    /// What it comes to.
    pub fn summary(&self) -> Summary {
        let mut all = Summary::default();
        for row in self.rows.values() {
            *all.states.entry(row.state()).or_default() += 1;
            all.worst_overlay = all.worst_overlay.max(row.overlay.mean.unwrap_or(0));
            all.worst_underlay = all.worst_underlay.max(row.underlay.mean.unwrap_or(0));
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
            vtep: crate::model::Mac([2, 0, 0, 0, 0, number]),
            device: "ovx.1".to_owned(),
            nexthop_id: None,
            state: "programmed".to_owned(),
            last_repair: None,
        }
    }

    /// Goes some rounds; `answers` says of an address how long it takes, if it answers at all.
    fn rounds(book: &mut Book, peers: &[PeerEntry], count: u64, answers: impl Fn(IpAddr) -> Option<u64>) -> Mesh {
        for round in 0..count {
            let now = round * 10_000_000;
            book.begin(peers, 1000 + round);
            while let Some(probe) = book.next(now) {
                if let Some(took) = answers(probe.address) {
                    book.answered(probe.number, probe.address, now + took);
                }
            }
            book.expire(now + 3_000_000, |_| {});
        }
        book.view("me", Duration::from_secs(30))
    }

    #[test]
    fn the_two_faults_are_told_apart() {
        let peers = [peer(1), peer(2), peer(3), peer(4)];
        let mut book = Book::default();
        let mesh = rounds(&mut book, &peers, 3, |address| match address.to_string().as_str() {
            "10.244.1.0" | "192.0.2.1" | "192.0.2.2" | "10.244.3.0" => Some(800),
            _ => None,
        });
        let states: Vec<Reach> = mesh.peers.iter().map(|peer| peer.state).collect();
        assert_eq!(states, [Reach::Ok, Reach::OverlayDown, Reach::UnderlaySilent, Reach::Unreachable]);
        let summary = book.summary();
        assert_eq!(summary.states, states.iter().map(|state| (*state, 1)).collect());
        assert_eq!((summary.worst_overlay, summary.worst_underlay), (800, 800));
        let path = &mesh.peers[0].overlay;
        assert_eq!((path.probes, path.lost, path.last_micros, path.mean_micros), (3, 0, Some(800), Some(800)));
        assert_eq!((mesh.peers[3].overlay.probes, mesh.peers[3].overlay.lost), (3, 3));
    }

    #[test]
    fn one_lost_probe_is_loss_and_no_silence() {
        let mut book = Book::default();
        rounds(&mut book, &[peer(1)], 4, |_| Some(100));
        let mesh = rounds(&mut book, &[peer(1)], 1, |_| None);
        assert_eq!((mesh.peers[0].state, mesh.peers[0].overlay.lost), (Reach::Lossy, 1));
        let mesh = rounds(&mut book, &[peer(1)], 1, |_| None);
        assert_eq!(mesh.peers[0].state, Reach::Unreachable);
        let mesh = rounds(&mut book, &[peer(1)], 16, |_| Some(100));
        assert_eq!(mesh.peers[0].state, Reach::Ok, "it is forgotten after 16");
    }

    #[test]
    fn a_host_that_left_is_gone_and_one_that_moved_begins_anew() {
        let mut book = Book::default();
        rounds(&mut book, &[peer(1), peer(2)], 2, |_| None);
        book.begin(&[peer(1)], 2000);
        let mesh = book.view("me", Duration::ZERO);
        assert_eq!(
            mesh.peers.iter().map(|p| (p.state, p.gone_since)).collect::<Vec<_>>(),
            [(Reach::Unreachable, None), (Reach::Gone, Some(2000))]
        );
        let moved = PeerEntry { public_ip: "192.0.2.99".parse().expect("ip"), ..peer(1) };
        book.begin(&[moved, peer(2)], 2001);
        let mesh = book.view("me", Duration::ZERO);
        assert!(mesh.peers.iter().all(|p| p.state == Reach::Unknown && p.gone_since.is_none()), "{mesh:?}");
        book.begin(&[], 2002);
        book.begin(&[], 2002 + GONE.as_secs());
        assert!(book.view("me", Duration::ZERO).peers.is_empty());
    }

    #[test]
    fn the_rate_is_bounded_and_late_or_foreign_answers_do_not_count() {
        let mut book = Book::default();
        let many: Vec<PeerEntry> = (1..=200).map(peer).collect();
        book.begin(&many[..3], 0);
        assert_eq!(book.pause(Duration::from_secs(30)), Duration::from_secs(5));
        book.begin(&many, 0);
        assert_eq!(book.pause(Duration::from_secs(1)), Duration::from_millis(20));
        let probe = book.next(0).expect("a probe");
        assert_eq!(book.answered(probe.number, "203.0.113.1".parse().expect("ip"), 5), None);
        assert_eq!(book.view("me", Duration::ZERO).peers[0].overlay.probes, 0);
        let mut lost = Vec::new();
        book.expire(3_000_000, |way| lost.push(way));
        assert_eq!(lost, [Way::Overlay]);
        book.answered(probe.number, probe.address, 3_000_001);
        assert_eq!((book.view("me", Duration::ZERO).peers[0].overlay.lost, book.is_waiting()), (1, false));
    }
}
