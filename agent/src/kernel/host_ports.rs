//! Finds the host's own sockets that listen on a port, and their owners.
//!
//! The sockets come from `/proc/net` of the agent's namespace (`proc_pid_net(5)`), which every kernel has. Processes' descriptors
//! are read only if a port is taken.
//!
//! An IPv6 socket on `::` counts for IPv4 as well, because the tables do not show whether it is for IPv6 alone (`IPV6_V6ONLY`).
//! Refusing a port is better than diverting the IPv4 connections of a dual-stack socket.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::text::printable;
use crate::model::{Family, PublishedPort, Transport};
use crate::plan::{HostPorts, HostSocket, OpError};

/// Directory of the socket tables. `/proc/net` would be the main thread's.
const PROC_NET: &str = "/proc/thread-self/net";

/// States of a listening socket (`include/net/tcp_states.h`): a TCP listener, and a UDP socket without a remote end.
const TCP_LISTEN: &str = "0A";
const UDP_UNCONNECTED: &str = "07";

/// A socket that listens on a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ListeningSocket {
    address: IpAddr,
    port: u16,
    inode: u64,
}

/// Reads the host's addresses, and the sockets that listen on one of these ports.
pub fn query(wanted: &[PublishedPort]) -> Result<HostPorts, OpError> {
    let addresses = nix::ifaddrs::getifaddrs()
        .map_err(|errno| OpError { errno: errno as i32, message: format!("cannot list the host's addresses: {errno}") })?;
    let ip = |address: nix::sys::socket::SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    };
    let mut found = HostPorts { addresses: addresses.filter_map(|i| i.address.and_then(ip)).collect(), sockets: Vec::new() };
    let mut conflicting: Vec<(PublishedPort, ListeningSocket)> = Vec::new();
    for protocol in [Transport::Tcp, Transport::Udp, Transport::Sctp] {
        let of_protocol: Vec<&PublishedPort> = wanted.iter().filter(|publish| publish.protocol == protocol).collect();
        if of_protocol.is_empty() {
            continue;
        }
        for socket in listening_sockets(protocol)? {
            let publish = of_protocol.iter().find(|publish| conflicts(publish, &socket));
            conflicting.extend(publish.map(|publish| (**publish, socket)));
        }
    }
    if !conflicting.is_empty() {
        let owners = socket_owners(&conflicting.iter().map(|(_, socket)| socket.inode).collect::<Vec<_>>());
        // A VXLAN device's socket has no process.
        let unknown_owner = || "the kernel (a tunnel's port) or a process not visible to the agent".to_owned();
        let name = |inode: u64| owners.get(&inode).cloned().unwrap_or_else(unknown_owner);
        found.sockets = conflicting
            .into_iter()
            .map(|(wanted, ListeningSocket { address, port, inode })| HostSocket { wanted, address, port, holder: name(inode) })
            .collect();
    }
    Ok(found)
}

/// Whether a published port would divert the traffic of a socket.
fn conflicts(publish: &PublishedPort, socket: &ListeningSocket) -> bool {
    let offset = u32::from(socket.port).checked_sub(u32::from(publish.host_port));
    let same_port = offset.is_some_and(|offset| offset < u32::from(publish.count));
    let is_wildcard_v6 = socket.address == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    same_port
        && match publish.address {
            None => true,
            Some(address) if Family::of(address) != Family::of(socket.address) => is_wildcard_v6,
            Some(address) => address == socket.address || address.is_unspecified() || socket.address.is_unspecified(),
        }
}

/// The listening sockets of a protocol. A table that the kernel lacks counts as empty.
fn listening_sockets(protocol: Transport) -> Result<Vec<ListeningSocket>, OpError> {
    let (names, state): (&[&str], _) = match protocol {
        Transport::Tcp => (&["tcp", "tcp6"], TCP_LISTEN),
        Transport::Udp => (&["udp", "udp6"], UDP_UNCONNECTED),
        Transport::Sctp => (&["sctp/eps"], ""),
    };
    let mut all = Vec::new();
    for name in names {
        let path = format!("{PROC_NET}/{name}");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(read_error(&path, &error)),
        };
        for line in BufReader::new(file).lines().skip(1) {
            let line = line.map_err(|error| read_error(&path, &error))?;
            if protocol == Transport::Sctp {
                all.extend(parse_sctp_line(&line));
                continue;
            }
            match parse_line(&line) {
                Some((found, socket)) if found == state => all.push(socket),
                // Listeners come first (`tcp_seq_start`); a hundred thousand connections may follow them.
                Some(_) if protocol == Transport::Tcp => break,
                _ => {}
            }
        }
    }
    Ok(all)
}

fn read_error(path: &str, error: &io::Error) -> OpError {
    OpError { errno: error.raw_os_error().unwrap_or_default(), message: format!("cannot read {path}: {error}") }
}

/// Parses a line of `tcp`, `udp` or their IPv6 tables: the state and the socket.
fn parse_line(line: &str) -> Option<(&str, ListeningSocket)> {
    let mut fields = line.split_ascii_whitespace();
    let (address, port) = fields.nth(1)?.split_once(':')?;
    let state = fields.nth(1)?;
    let inode = fields.nth(5)?.parse().ok()?;
    Some((state, ListeningSocket { address: hex_address(address)?, port: u16::from_str_radix(port, 16).ok()?, inode }))
}

/// Parses an address: 32-bit words in hexadecimal, each in the machine's byte order.
fn hex_address(text: &str) -> Option<IpAddr> {
    let word = |at: usize| Some(u32::from_str_radix(text.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    match text.len() {
        8 => Some(IpAddr::V4(Ipv4Addr::from(word(0)?))),
        32 => {
            let mut bytes = [0; 16];
            for at in 0..4 {
                bytes[at * 4..at * 4 + 4].copy_from_slice(&word(at)?);
            }
            Some(IpAddr::V6(Ipv6Addr::from(bytes)))
        }
        _ => None,
    }
}

/// Parses a line of `sctp/eps`: `ENDPT SOCK STY SST HBKT LPORT UID INODE LADDRS` (`net/sctp/proc.c`). Returns one socket for each
/// local address.
fn parse_sctp_line(line: &str) -> Vec<ListeningSocket> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (Some(Ok(port)), Some(Ok(inode))) = (fields.get(5).map(|p| p.parse()), fields.get(7).map(|i| i.parse())) else {
        return Vec::new();
    };
    let addresses = fields.iter().skip(8).filter_map(|a| a.parse().ok());
    addresses.map(|address| ListeningSocket { address, port, inode }).collect()
}

/// The processes that hold these sockets, each as `NAME (process PID)`.
fn socket_owners(inodes: &[u64]) -> BTreeMap<u64, String> {
    let mut found = BTreeMap::new();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids {
        // Skip a process that has ended or that the agent may not inspect.
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let inode = target.to_str().and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            if let Some(inode) = inode.filter(|inode| inodes.contains(inode)) {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                found.entry(inode).or_insert_with(|| format!("{} (process {pid})", printable(name.trim())));
            }
        }
        if inodes.iter().all(|inode| *inode == 0 || found.contains_key(inode)) {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn proc_net_lines_are_parsed() {
        let little = cfg!(target_endian = "little");
        let line =
            "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 ffff 100 0 0 10 0";
        let (state, socket) = parse_line(line).expect("a socket");
        assert_eq!((state, socket.port, socket.inode), ("0A", 8080, 4711));
        assert_eq!(socket.address.to_string(), if little { "127.0.0.1" } else { "1.0.0.127" });
        let line =
            "  1: 00000000000000000000000001000000:0035 00000000000000000000000000000000:0000 07 0:0 00:0 0 0 0 12 2 ffff 0";
        let (state, socket) = parse_line(line).expect("a socket");
        assert_eq!((state, socket.port, socket.inode), ("07", 53, 12));
        assert!(!little || socket.address == IpAddr::V6(Ipv6Addr::LOCALHOST));
        for line in ["", "x", "0: 00:1 0:0 0A", "0: 0100007F:1F90 00000000:0000 0A 0 0 0 0 0 x"] {
            assert_eq!(parse_line(line), None, "{line}");
        }
        let sctp = parse_sctp_line("ffff8881 ffff8882 2   10  62   5000      0 881 127.0.0.1 ::1 ");
        assert_eq!(
            sctp.iter().map(|s| (s.address.to_string(), s.port, s.inode)).collect::<Vec<_>>(),
            [("127.0.0.1".to_owned(), 5000, 881), ("::1".to_owned(), 5000, 881)]
        );
        assert!(parse_sctp_line("ENDPT SOCK").is_empty());
    }

    #[test]
    fn published_port_conflicts_with_listening_socket() {
        let conflicts = |publish: &str, address: &str, port: u16| {
            let socket = ListeningSocket { address: address.parse().expect(address), port, inode: 1 };
            super::conflicts(&publish.parse().expect(publish), &socket)
        };
        assert!(conflicts("80:1", "0.0.0.0", 80) && conflicts("80:1", "127.0.0.1", 80) && conflicts("79-80:1-2", "::1", 80));
        assert!(conflicts("127.0.0.1:80:1", "0.0.0.0", 80) && conflicts("0.0.0.0:80:1", "10.0.0.1", 80));
        assert!(conflicts("127.0.0.1:80:1", "::", 80), "the socket may serve both families");
        assert!(!conflicts("80:1", "0.0.0.0", 81) && !conflicts("81:1", "0.0.0.0", 80) && !conflicts("78-79:1-2", "0.0.0.0", 80));
        assert!(!conflicts("127.0.0.1:80:1", "127.0.0.2", 80) && !conflicts("[::]:80:1", "0.0.0.0", 80));
        assert!(!conflicts("127.0.0.1:80:1", "::1", 80));
    }

    #[test]
    fn listening_socket_is_found_with_its_owner() {
        let tcp = TcpListener::bind("127.0.0.1:0").expect("a port");
        let udp = UdpSocket::bind("[::1]:0").expect("a port");
        let (tcp_port, udp_port) = (tcp.local_addr().expect("bound").port(), udp.local_addr().expect("bound").port());
        let ports: Vec<PublishedPort> =
            [format!("{tcp_port}:1"), format!("[::1]:{udp_port}:1/udp")].iter().map(|t| t.parse().expect(t)).collect();
        let found = query(&ports).expect("readable");
        assert!(found.addresses.contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)));
        let holders: Vec<(IpAddr, u16, &str)> = found.sockets.iter().map(|s| (s.address, s.port, s.holder.as_str())).collect();
        let own = format!("(process {})", std::process::id());
        assert_eq!(holders.len(), 2, "{holders:?}");
        assert!(holders.iter().all(|(_, _, holder)| holder.ends_with(&own)), "{holders:?}");
        // A connection does not count as a listener.
        let client = std::net::TcpStream::connect(tcp.local_addr().expect("bound")).expect("a connection");
        let port = client.local_addr().expect("bound").port();
        assert!(query(&[format!("{port}:1").parse().expect("a port")]).expect("readable").sockets.is_empty());
        drop((tcp, udp, client));
        assert!(query(&ports).expect("readable").sockets.is_empty());
    }
}
