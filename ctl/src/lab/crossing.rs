//! Datagrams between networks, of which none may arrive.
//!
//! Each container listens. A datagram carries the names of its sender and of the sender's network, so that an arrival in another
//! network is recognised also where both have the same addresses.
//!
//! One task per address of a container; all end with [`Listeners`].

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::{Family, NetworkName, PerFamily};
use serde::{Deserialize, Serialize};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use super::LabError;

/// Port of the listeners: in the dynamic range, beside that of the check's servers.
pub const PORT: u16 = 49_775;

/// Longest payload: two names and what precedes them.
const MAX_PAYLOAD: usize = 256;

/// First word of a payload.
const MARK: &str = "crossing";

/// A container and its network.
#[derive(Debug, Clone)]
pub struct Party {
    /// Name, such as `h1-net1-c1`.
    pub name: String,
    /// Network.
    pub network: NetworkName,
    /// Namespace.
    pub netns: Netns,
    /// Addresses.
    pub addresses: PerFamily<IpAddr>,
}

/// A datagram that arrived in another network than its sender's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Crossing {
    /// Sending container.
    pub from: String,
    /// Its network.
    pub from_network: String,
    /// Receiving container.
    pub to: String,
    /// Its network.
    pub to_network: String,
}

/// Datagrams that arrived.
#[derive(Debug, Default)]
struct Arrivals {
    crossings: BTreeSet<Crossing>,
    /// Number within a network.
    own: usize,
}

/// Listeners in containers.
#[derive(Debug, Default)]
pub struct Listeners {
    tasks: JoinSet<()>,
    arrivals: Arc<Mutex<Arrivals>>,
}

impl Listeners {
    /// Starts to listen at each address of a container.
    ///
    /// # Errors
    /// The port is taken.
    pub fn add(&mut self, party: &Party) -> Result<(), LabError> {
        for (_, address) in party.addresses.iter() {
            let at = SocketAddr::new(*address, PORT);
            let error = |source| LabError::Spawn { program: format!("a listener at {at} in {}", party.name), source };
            let socket = party.netns.run_in_place(|| bind(at))?.and_then(UdpSocket::from_std).map_err(error)?;
            self.tasks.spawn(listen(socket, party.name.clone(), party.network.to_string(), Arc::clone(&self.arrivals)));
        }
        Ok(())
    }

    /// Datagrams that crossed, each pair of containers once.
    pub fn crossings(&self) -> Vec<Crossing> {
        lock(&self.arrivals).crossings.iter().cloned().collect()
    }

    /// Number of datagrams that arrived within their network.
    pub fn arrived_within(&self) -> usize {
        lock(&self.arrivals).own
    }
}

/// The payload of a container's datagrams.
pub fn payload(party: &Party) -> Vec<u8> {
    format!("{MARK} {} {}", party.network, party.name).into_bytes()
}

/// The network and the name of the container whose payload a packet ends with or contains; `None` without one.
pub fn find_payload(packet: &[u8]) -> Option<(String, String)> {
    let mark = format!("{MARK} ").into_bytes();
    let start = packet.windows(mark.len()).position(|bytes| bytes == mark)? + mark.len();
    let text = String::from_utf8_lossy(&packet[start..]);
    let (network, name) = text.split_once(' ')?;
    let name: String = name.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
    Some((network.to_owned(), name))
}

/// Sends a datagram from a container to each address of other containers that it has the family of. Returns the number that the
/// kernel accepted: it rejects those without a route.
pub fn send<'a>(from: &Party, to: impl IntoIterator<Item = &'a Party>) -> Result<usize, LabError> {
    let payload = payload(from);
    let open = |family: Family| bind(SocketAddr::new(family.unspecified(), 0));
    let mut sockets: PerFamily<std::net::UdpSocket> = PerFamily::default();
    for (family, _) in from.addresses.iter() {
        let error = |source| LabError::Spawn { program: format!("a socket in {}", from.name), source };
        *sockets.slot(family) = Some(from.netns.run_in_place(|| open(family))?.map_err(error)?);
    }
    let targets = to.into_iter().flat_map(|party| party.addresses.iter().map(|(family, address)| (family, *address)));
    let accepted = targets.filter(|(family, address)| {
        let socket = sockets.get(*family);
        // Once more: the first attempt may report an ICMP error of the one before.
        socket.is_some_and(|socket| (0..2).any(|_| socket.send_to(&payload, (*address, PORT)).is_ok()))
    });
    Ok(accepted.count())
}

fn bind(at: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = std::net::UdpSocket::bind(at)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

async fn listen(socket: UdpSocket, name: String, network: String, arrivals: Arc<Mutex<Arrivals>>) {
    let mut buffer = [0; MAX_PAYLOAD];
    loop {
        // An error belongs to an earlier datagram.
        let Ok((length, _)) = socket.recv_from(&mut buffer).await else { continue };
        let Some((from_network, from)) = find_payload(&buffer[..length]) else { continue };
        let mut arrivals = lock(&arrivals);
        if from_network == network {
            arrivals.own += 1;
            continue;
        }
        arrivals.crossings.insert(Crossing { from, from_network, to: name.clone(), to_network: network.clone() });
    }
}

fn lock(arrivals: &Mutex<Arrivals>) -> MutexGuard<'_, Arrivals> {
    arrivals.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// Two parties of two networks in one namespace, where nothing keeps them apart.
    #[tokio::test]
    async fn datagram_in_another_network_is_a_crossing() {
        let name = format!("ovt-crossing-{}", std::process::id());
        let netns = Netns::create(&name).expect("a namespace (root is needed)");
        Netns::delete(&name).expect("its name is not needed any more");
        let party = |network: &str, address: &str| Party {
            name: format!("h1-{network}-c1"),
            network: network.parse().expect("a name"),
            netns: netns.clone(),
            addresses: PerFamily { v4: address.parse().ok(), v6: None },
        };
        let (blue, green) = (party("blue", "127.0.0.2"), party("green", "127.0.0.3"));
        let mut listeners = Listeners::default();
        listeners.add(&blue).expect("a free port");
        listeners.add(&green).expect("a free port");
        assert_eq!(send(&blue, [&blue, &green]).expect("sent"), 2);
        let end = Instant::now() + Duration::from_secs(10);
        while (listeners.arrived_within() == 0 || listeners.crossings().is_empty()) && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let crossing = Crossing {
            from: "h1-blue-c1".to_owned(),
            from_network: "blue".to_owned(),
            to: "h1-green-c1".to_owned(),
            to_network: "green".to_owned(),
        };
        assert_eq!((listeners.crossings(), listeners.arrived_within()), (vec![crossing], 1));
    }
}
