//! The raw limit: only the netlink messages for N peers, built beforehand, sent 200 at a time over one blocking socket.
//!
//! The kernel's work is the same as for the agent: an FDB entry, a neighbour, a next-hop object and a route per peer, set with
//! `NLM_F_CREATE | NLM_F_REPLACE`, and the same removed, once by itself and once with the device. No process listens to events,
//! and nothing is compared, stored or logged.

use anyhow::{Context, ensure};
use overlay_agent::model::{Cidr, Family};

use super::netns_guard::NetnsGuard;
use super::rtnl::{RTM_DELNEXTHOP, RTM_GETNEXTHOP, RTM_NEWNEXTHOP, Rtnl, address, attributes, flag, octets, u32_at, write};
use super::stats::{Cost, CostTimer};
use super::synthetic_peer::SyntheticPeer;

/// Messages of one `send`.
const MESSAGES_PER_SEND: usize = 200;
/// The first next-hop id.
const FIRST_NEXTHOP_ID: u32 = 1_000_000;
/// `linux/rtnetlink.h`.
const RTPROT_STATIC: u8 = 4;
const RT_TABLE_MAIN: u8 = 254;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;
const RTA_DST: u16 = 1;
const RTA_NH_ID: u16 = 30;
/// `linux/neighbour.h`.
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const NTF_SELF: u8 = 2;
/// `linux/nexthop.h`.
const NHA_ID: u16 = 1;
const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;
/// Lengths of `struct ndmsg`, `struct nhmsg` and `struct rtmsg` in bytes.
const NDMSG: usize = 12;
const NHMSG: usize = 8;
const RTMSG: usize = 12;

/// Appends a peer's message: buffer, sequence number, peer, interface index.
type MessageWriter = fn(&mut Vec<u8>, u32, &SyntheticPeer, u32);

/// The messages that add a peer, in this order.
const SET: [MessageWriter; 4] = [set_fdb, set_neighbour, set_nexthop, set_route];
/// The messages that remove a peer; a removed device takes the last two entries with it.
const REMOVE: [MessageWriter; 4] = [del_route, del_nexthop, del_neighbour, del_fdb];

/// Peers of one family, and the interface index of their VXLAN device.
pub type DevicePeers<'a> = (&'a [SyntheticPeer], u32);

/// The requests for a fleet, grouped by `send`.
#[derive(Debug)]
pub struct Requests(Vec<Vec<u8>>);

impl Requests {
    /// Requests that add all entries.
    pub fn set(fleet: &[DevicePeers<'_>]) -> Requests {
        Requests::of(&SET, fleet)
    }

    /// Requests that remove each entry.
    pub fn remove(fleet: &[DevicePeers<'_>]) -> Requests {
        Requests::of(&REMOVE, fleet)
    }

    /// Requests that remove routes and next hops, and then the devices with everything else, including the bridge. Without the
    /// explicit removal, the kernel would walk the whole routing table for each next hop of a removed device.
    pub fn tear_down(fleet: &[DevicePeers<'_>], bridge: u32) -> Requests {
        let mut requests = Requests::of(&REMOVE[..2], fleet);
        requests.0.extend(fleet.iter().map(|(_, device)| *device).chain([bridge]).map(|device| {
            let mut buffer = Vec::new();
            let body = [&[0; 4][..], &device.to_ne_bytes(), &[0; 8]].concat();
            write(&mut buffer, libc::RTM_DELLINK, 0, 1, &body, &[]);
            buffer
        }));
        requests
    }

    fn of(kinds: &[MessageWriter], fleet: &[DevicePeers<'_>]) -> Requests {
        let mut sends = Vec::new();
        let mut sequence = 0;
        for (peers, device) in fleet {
            for kind in kinds {
                for chunk in peers.chunks(MESSAGES_PER_SEND) {
                    let mut buffer = Vec::with_capacity(MESSAGES_PER_SEND * 80);
                    for peer in chunk {
                        sequence += 1;
                        kind(&mut buffer, sequence, peer, *device);
                    }
                    sends.push(buffer);
                }
            }
        }
        Requests(sends)
    }

    /// Sends them in the calling thread's namespace. Returns the cost.
    pub fn send(&self) -> anyhow::Result<Cost> {
        let mut socket = Rtnl::open().context("cannot open an rtnetlink socket")?;
        let timer = CostTimer::start()?;
        let mut errors = 0;
        for messages in &self.0 {
            errors += socket.request(messages).context("cannot send")?;
        }
        let cost = timer.cost()?;
        ensure!(errors == 0, "the kernel refused {errors} of the raw limit's requests");
        Ok(cost)
    }
}

/// The costs of the raw limit.
#[derive(Debug, Clone, Copy)]
pub struct RawTiming {
    /// Adding all entries.
    pub set: Cost,
    /// Removing each entry.
    pub removed: Cost,
    /// Removing routes and next hops, and then the devices.
    pub torn_down: Cost,
}

/// Measures the raw limit in its own namespace, for the peers of each family. The kernel's entries are counted after each step.
pub async fn measure_raw(fleet: &[&[SyntheticPeer]]) -> anyhow::Result<RawTiming> {
    let netns_guard = NetnsGuard::new()?;
    let mut device_peers = Vec::new();
    for peers in fleet {
        let family = peers.first().context("a fleet without members")?.subnet.family();
        device_peers.push((*peers, netns_guard.add_vxlan(family)?));
    }
    let bridge = netns_guard.add_bridge()?;
    let (set, remove, tear_down) =
        (Requests::set(&device_peers), Requests::remove(&device_peers), Requests::tear_down(&device_peers, bridge));
    netns_guard.netns().run(|| {
        let step = |requests: &Requests, present: bool| {
            let cost = requests.send()?;
            KernelEntryCounts::assert_all(&device_peers, present).context("raw limit")?;
            Ok::<_, anyhow::Error>(cost)
        };
        let raw = RawTiming {
            set: step(&set, true)?,
            removed: step(&remove, false)?,
            torn_down: {
                step(&set, true)?;
                step(&tear_down, false)?
            },
        };
        Ok(raw)
    })?
}

const REPLACE: i32 = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;

fn set_fdb(buffer: &mut Vec<u8>, sequence: u32, peer: &SyntheticPeer, device: u32) {
    let body = ndmsg(libc::AF_BRIDGE, device, NTF_SELF);
    let attributes: [(u16, &[u8]); 2] = [(NDA_LLADDR, &peer.mac.0), (NDA_DST, &octets(peer.public_ip))];
    write(buffer, libc::RTM_NEWNEIGH, flag(REPLACE), sequence, &body, &attributes);
}

fn set_neighbour(buffer: &mut Vec<u8>, sequence: u32, peer: &SyntheticPeer, device: u32) {
    let body = ndmsg(af(peer.subnet.family()), device, 0);
    let attributes: [(u16, &[u8]); 2] = [(NDA_DST, &octets(peer.subnet.base())), (NDA_LLADDR, &peer.mac.0)];
    write(buffer, libc::RTM_NEWNEIGH, flag(REPLACE), sequence, &body, &attributes);
}

fn set_nexthop(buffer: &mut Vec<u8>, sequence: u32, peer: &SyntheticPeer, device: u32) {
    let mut body = vec![byte(af(peer.subnet.family())), 0, RTPROT_STATIC, 0];
    body.extend_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
    let id = nexthop_id(peer);
    let gateway = octets(peer.subnet.base());
    let attributes: [(u16, &[u8]); 3] = [(NHA_ID, &id), (NHA_GATEWAY, &gateway), (NHA_OIF, &device.to_ne_bytes())];
    write(buffer, RTM_NEWNEXTHOP, flag(REPLACE), sequence, &body, &attributes);
}

fn set_route(buffer: &mut Vec<u8>, sequence: u32, peer: &SyntheticPeer, _device: u32) {
    let id = nexthop_id(peer);
    let body = rtmsg(peer.subnet, RTPROT_STATIC, RTN_UNICAST);
    let attributes: [(u16, &[u8]); 2] = [(RTA_DST, &octets(peer.subnet.base())), (RTA_NH_ID, &id)];
    write(buffer, libc::RTM_NEWROUTE, flag(REPLACE), sequence, &body, &attributes);
}

fn del_fdb(buffer: &mut Vec<u8>, sequence: u32, peer: &SyntheticPeer, device: u32) {
    let body = ndmsg(libc::AF_BRIDGE, device, NTF_SELF);
    write(buffer, libc::RTM_DELNEIGH, 0, sequence, &body, &[(NDA_LLADDR, &peer.mac.0)]);
}

fn del_neighbour(buffer: &mut Vec<u8>, sequence: u32, peer: &SyntheticPeer, device: u32) {
    let body = ndmsg(af(peer.subnet.family()), device, 0);
    write(buffer, libc::RTM_DELNEIGH, 0, sequence, &body, &[(NDA_DST, &octets(peer.subnet.base()))]);
}

fn del_nexthop(buffer: &mut Vec<u8>, sequence: u32, peer: &SyntheticPeer, _device: u32) {
    write(buffer, RTM_DELNEXTHOP, 0, sequence, &[0; NHMSG], &[(NHA_ID, &nexthop_id(peer))]);
}

fn del_route(buffer: &mut Vec<u8>, sequence: u32, peer: &SyntheticPeer, _device: u32) {
    let body = rtmsg(peer.subnet, RTPROT_STATIC, RTN_UNICAST);
    write(buffer, libc::RTM_DELROUTE, 0, sequence, &body, &[(RTA_DST, &octets(peer.subnet.base()))]);
}

/// Distinct for the families, whose next hops share one range of ids.
fn nexthop_id(peer: &SyntheticPeer) -> [u8; 4] {
    let first = match peer.subnet.family() {
        Family::V4 => FIRST_NEXTHOP_ID,
        Family::V6 => 2 * FIRST_NEXTHOP_ID,
    };
    (first + peer.number).to_ne_bytes()
}

fn ndmsg(family: libc::c_int, device: u32, flags: u8) -> Vec<u8> {
    let mut body = vec![byte(family), 0, 0, 0];
    body.extend_from_slice(&device.to_ne_bytes());
    body.extend_from_slice(&NUD_PERMANENT.to_ne_bytes());
    body.extend_from_slice(&[flags, 0]);
    body
}

fn rtmsg(destination: Cidr, protocol: u8, kind: u8) -> [u8; RTMSG] {
    let family = byte(af(destination.family()));
    [family, destination.length(), 0, 0, RT_TABLE_MAIN, protocol, 0, kind, 0, 0, 0, 0]
}

fn af(family: Family) -> libc::c_int {
    match family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    }
}

/// Converts address families and similar numbers, all of which are below 256.
fn byte(number: libc::c_int) -> u8 {
    u8::try_from(number).unwrap_or_default()
}

/// The kernel's entries for peers in one family: of one device, and the next hops and routes through it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KernelEntryCounts {
    /// FDB entries.
    pub fdb: usize,
    /// Permanent neighbours.
    pub neighbours: usize,
    /// Next-hop objects.
    pub nexthops: usize,
    /// Routes to next-hop objects.
    pub routes: usize,
}

impl KernelEntryCounts {
    /// Reads them in the calling thread's namespace.
    fn read(family: Family, device: u32) -> anyhow::Result<KernelEntryCounts> {
        let mut socket = Rtnl::open()?;
        let mut counts = KernelEntryCounts::default();
        let state = |body: &[u8]| body.get(8..10).map_or(0, |s| u16::from_ne_bytes([s[0], s[1]]));
        let is_own_entry = |body: &[u8]| u32_at(body, 4) == Some(device) && state(body) & NUD_PERMANENT != 0;
        socket.dump(libc::RTM_GETNEIGH, &[&[byte(libc::AF_BRIDGE)][..], &[0; NDMSG - 1]].concat(), |body| {
            counts.fdb += usize::from(is_own_entry(body));
        })?;
        let family_byte = byte(af(family));
        socket.dump(libc::RTM_GETNEIGH, &[&[family_byte][..], &[0; NDMSG - 1]].concat(), |body| {
            counts.neighbours += usize::from(is_own_entry(body));
        })?;
        socket.dump(RTM_GETNEXTHOP, &[&[family_byte][..], &[0; NHMSG - 1]].concat(), |body| {
            counts.nexthops += usize::from(body.first() == Some(&family_byte));
        })?;
        socket.dump(libc::RTM_GETROUTE, &[&[family_byte][..], &[0; RTMSG - 1]].concat(), |body| {
            counts.routes += usize::from(attributes(body, RTMSG).any(|(kind, _)| kind == RTA_NH_ID));
        })?;
        Ok(counts)
    }

    fn assert_count(&self, peers: usize) -> anyhow::Result<()> {
        let found = [self.fdb, self.neighbours, self.nexthops, self.routes];
        ensure!(
            found == [peers; 4],
            "{peers} peers are wanted and the kernel holds {} FDB entries, {} neighbours, {} next hops and {} routes",
            found[0],
            found[1],
            found[2],
            found[3]
        );
        Ok(())
    }

    /// Fails unless every peer of each family has one of each entry or, if `present` is false, unless no entry is left.
    pub fn assert_all(fleet: &[DevicePeers<'_>], present: bool) -> anyhow::Result<()> {
        for (peers, device) in fleet {
            let family = peers.first().context("a fleet without members")?.subnet.family();
            KernelEntryCounts::read(family, *device)?.assert_count(if present { peers.len() } else { 0 })?;
        }
        Ok(())
    }
}

/// The destination of a route message and its protocol number.
pub fn route_of(body: &[u8]) -> Option<(Cidr, u8)> {
    let (&length, &protocol) = (body.get(1)?, body.get(5)?);
    let base = attributes(body, RTMSG).find(|(kind, _)| *kind == RTA_DST).and_then(|(_, value)| address(value))?;
    Some((Cidr::containing(base, length)?, protocol))
}
