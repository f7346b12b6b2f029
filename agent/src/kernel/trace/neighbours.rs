//! Neighbours and FDB entries of an interface.

use std::thread::sleep;
use std::time::{Duration, Instant};

use super::*;

/// Longest wait for a neighbour in resolution. The kernel sends three requests, one a second, before it gives up
/// (`mcast_solicit` and `retrans_time_ms` in `Documentation/networking/ip-sysctl.rst`).
const RESOLUTION_TIMEOUT: Duration = Duration::from_secs(4);
/// Interval between reads of a neighbour in resolution.
const RESOLUTION_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A neighbour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// The MAC, if known.
    pub mac: Option<Mac>,
    /// `PERMANENT`, `REACHABLE`, `STALE`, `INCOMPLETE`, `FAILED`, ...
    pub state: String,
}

impl Neighbour {
    /// Whether the kernel can send to it without resolution.
    pub fn is_usable(&self) -> bool {
        self.mac.is_some() && !matches!(self.state.as_str(), "FAILED" | "INCOMPLETE")
    }
}

/// A request for one neighbour, or for one FDB entry.
enum NeighbourRequest {
    Neighbour(u32, IpAddr),
    Fdb(u32, Mac),
}

impl Request for NeighbourRequest {
    fn write(&self, buffer: &mut Vec<u8>, flags: u16, sequence: u32) {
        let mut m = Message::begin(buffer, libc::RTM_GETNEIGH, flags, sequence);
        match self {
            NeighbourRequest::Neighbour(index, address) => {
                let number = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
                m.body(&[u8::try_from(number).unwrap_or_default(), 0, 0, 0]).body(&index.to_ne_bytes()).body(&[0; 4]);
                m.put_address(NDA_DST, *address);
            }
            NeighbourRequest::Fdb(index, mac) => {
                m.body(&[AF_BRIDGE, 0, 0, 0]).body(&index.to_ne_bytes()).body(&[0, 0, NTF_SELF, 0]);
                m.put(NDA_LLADDR, &mac.0);
            }
        };
    }
}

impl KernelQuery {
    /// A neighbour of an interface; `None` if the kernel has no entry. Waits while the kernel resolves it, because an unanswered
    /// request says nothing yet.
    pub fn neighbour(&mut self, interface: u32, address: IpAddr) -> Option<Neighbour> {
        let deadline = Instant::now() + RESOLUTION_TIMEOUT;
        loop {
            let found = self.read_neighbour(interface, address);
            if found.as_ref().is_none_or(|found| found.state != "INCOMPLETE") || Instant::now() >= deadline {
                return found;
            }
            sleep(RESOLUTION_POLL_INTERVAL);
        }
    }

    fn read_neighbour(&mut self, interface: u32, address: IpAddr) -> Option<Neighbour> {
        let read = |body: &[u8]| {
            let state = u16_at(body, 8)?;
            let mac = attributes(body, NDMSG_LEN).find(|(kind, _)| *kind == NDA_LLADDR).and_then(|(_, value)| mac(value));
            Some(Neighbour { mac, state: nud_state_name(state) })
        };
        self.socket.get(&NeighbourRequest::Neighbour(interface, address), read).ok()
    }

    /// The VXLAN device's remote address for a MAC; `None` if it has no FDB entry.
    pub fn fdb_destination(&mut self, interface: u32, mac: Mac) -> Option<IpAddr> {
        let read = |body: &[u8]| attributes(body, NDMSG_LEN).find(|(kind, _)| *kind == NDA_DST).and_then(|(_, v)| address(v));
        self.socket.get(&NeighbourRequest::Fdb(interface, mac), read).ok()
    }
}

/// `NUD_...` in `linux/neighbour.h`, with the names of `ip neigh`.
fn nud_state_name(state: u16) -> String {
    let words = [
        (0x80, "PERMANENT"),
        (0x40, "NOARP"),
        (0x20, "FAILED"),
        (0x10, "PROBE"),
        (0x08, "DELAY"),
        (0x04, "STALE"),
        (0x02, "REACHABLE"),
    ];
    let word = words.iter().find(|(bit, _)| state & bit != 0).map(|(_, word)| *word);
    word.unwrap_or(if state & 0x01 != 0 { "INCOMPLETE" } else { "NONE" }).to_owned()
}
