//! Packet capture with tcpdump inside a namespace.
//!
//! Packets are parsed as far as the tests need it, including VXLAN's inner packets.

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use overlayctl::lab::Lab;

use crate::ExpectContext;
use crate::packet_builder::{PacketSocket, frame};
use crate::programs::require_program;

/// VXLAN's port in the overlay (`wire.md`).
pub const VXLAN_PORT: u16 = 8472;

/// `EtherType` of the frame that ends a capture: local experiments (IEEE 802).
const END_MARKER: u16 = 0x88b5;

/// Time limit for tcpdump to write the end marker.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    file: PathBuf,
    /// At the same interface.
    socket: PacketSocket,
}

/// A packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// The Ethernet destination.
    pub to_mac: [u8; 6],
    /// `EtherType`: 0x0800 IPv4, 0x0806 ARP, 0x86dd IPv6.
    pub ether_type: u16,
    /// Source and destination of the IP header, or sender and target of ARP.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// The IP protocol; 0 without an IP header.
    pub protocol: u8,
    /// The UDP or TCP destination port.
    pub port: Option<u16>,
    /// The target of an IPv6 neighbour solicitation or advertisement.
    pub neighbour: Option<IpAddr>,
    /// VNI and inner packet of VXLAN.
    pub vxlan: Option<(u32, Box<Packet>)>,
}

impl Packet {
    /// Whether the destination MAC is a group address.
    pub fn is_multicast(&self) -> bool {
        self.to_mac[0] & 1 == 1
    }

    /// Whether this is ARP or IPv6 neighbour discovery.
    pub fn is_neighbour_discovery(&self) -> bool {
        self.ether_type == 0x0806 || self.neighbour.is_some()
    }
}

impl Capture {
    /// Starts a capture at an interface, with no snap length.
    pub fn start(lab: &Lab, target: &str, interface: &str) -> Capture {
        require_program("tcpdump", "tcpdump");
        let file = lab.dir().join(format!("{target}-{interface}.pcap"));
        let mut command = Command::new("tcpdump");
        command.args(["--immediate-mode", "-U", "-n", "-Z", "root", "-i", interface, "-w"]).arg(&file);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let netns = lab.netns(target).expect_ok(target);
        let mut child = netns.run(|| command.spawn()).expect_ok("enter the namespace").expect_ok("tcpdump");
        let mut output = BufReader::new(child.stderr.take().expect_ok("tcpdump's standard error"));
        let mut line = String::new();
        while !line.contains("listening on") {
            let before = line.len();
            output.read_line(&mut line).expect_ok("tcpdump's standard error");
            assert!(line.len() > before, "tcpdump ended: {line}");
        }
        // tcpdump prints its statistics at the end; a closed pipe would kill it before that.
        child.stderr = Some(output.into_inner());
        let socket = PacketSocket::open(&netns, interface);
        Capture { child, file, socket }
    }

    /// Ends the capture and returns its packets.
    pub fn stop(mut self) -> Vec<Packet> {
        // tcpdump writes packets in their order: after this frame, all earlier ones are in the file.
        self.socket.send(&frame([2, 0, 0, 0, 0, 0xed], [2, 0, 0, 0, 0, 0xee], END_MARKER, &[0; 46]));
        let end = Instant::now() + FLUSH_TIMEOUT;
        let mut all = loop {
            let all = packets(&std::fs::read(&self.file).expect_ok("the capture"));
            if all.iter().any(|packet| packet.ether_type == END_MARKER) {
                break all;
            }
            assert!(Instant::now() < end, "tcpdump does not write the end marker: {all:?}");
            std::thread::sleep(Duration::from_millis(5));
        };
        self.terminate(Signal::SIGINT);
        // Another capture's marker may have arrived over the wire.
        all.retain(|packet| packet.ether_type != END_MARKER);
        all
    }

    fn terminate(&mut self, signal: Signal) {
        if let Ok(None) = self.child.try_wait() {
            let _ended = kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX)), signal);
            let _collected = self.child.wait();
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.terminate(Signal::SIGKILL);
    }
}

/// The packets of a classic capture file (pcap-savefile(5)), in this machine's byte order.
fn packets(bytes: &[u8]) -> Vec<Packet> {
    let mut found = Vec::new();
    let mut rest = bytes.get(24..).unwrap_or_default();
    while let Some(length) = rest.get(8..12).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes) {
        let end = 16 + usize::try_from(length).unwrap_or(usize::MAX - 16);
        let Some(frame) = rest.get(16..end) else { break };
        found.extend(parse_ethernet(frame));
        rest = &rest[end..];
    }
    found
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn parse_ethernet(frame: &[u8]) -> Option<Packet> {
    let mut packet = Packet {
        to_mac: frame.get(..6)?.try_into().ok()?,
        ether_type: u16_at(frame, 12)?,
        addresses: None,
        protocol: 0,
        port: None,
        neighbour: None,
        vxlan: None,
    };
    let body = frame.get(14..)?;
    let v4 = |at: usize| Some(IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(body.get(at..at + 4)?).ok()?)));
    let v6 = |at: usize| Some(IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(body.get(at..at + 16)?).ok()?)));
    let payload = match packet.ether_type {
        0x0806 => {
            packet.addresses = Some((v4(14)?, v4(24)?));
            return Some(packet);
        }
        0x0800 => {
            packet.addresses = Some((v4(12)?, v4(16)?));
            packet.protocol = *body.get(9)?;
            body.get(usize::from(body.first()? & 15) * 4..)?
        }
        0x86dd => {
            packet.addresses = Some((v6(8)?, v6(24)?));
            packet.protocol = *body.get(6)?;
            body.get(40..)?
        }
        _ => return Some(packet),
    };
    match packet.protocol {
        6 | 17 => packet.port = u16_at(payload, 2),
        // ICMPv6 types 135 and 136: neighbour solicitation and advertisement, target after eight bytes (RFC 4861 section 4.3).
        58 if matches!(payload.first(), Some(135 | 136)) => packet.neighbour = v6(48),
        _ => {}
    }
    if packet.protocol == 17 && packet.port == Some(VXLAN_PORT) {
        // UDP 8 bytes, VXLAN 8 bytes with the VNI in bytes five to seven (RFC 7348 section 5).
        let vni = payload.get(12..15)?.iter().fold(0, |vni, byte| vni << 8 | u32::from(*byte));
        packet.vxlan = Some((vni, Box::new(parse_ethernet(payload.get(16..)?)?)));
    }
    Some(packet)
}
