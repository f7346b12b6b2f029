//! The test frames, each with its name and expected outcome.

use std::net::{IpAddr, SocketAddr};

use overlay_tests::packet_builder::{
    self, ALL_NODES, ARP, BROADCAST, Mac, ROUTER_ADVERTISEMENT, icmpv6, ip_frame, router_advertisement,
};
use overlay_tests::rules::link_local;

/// The expected outcome of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpectedOutcome {
    /// It reaches the receiver.
    Delivered,
    /// It is dropped and counted under this reason.
    Dropped(&'static str),
}

use ExpectedOutcome::{Delivered, Dropped};

/// A sender, or a spoofed one.
#[derive(Debug, Clone, Copy)]
pub struct Station {
    pub mac: Mac,
    pub v4: IpAddr,
    pub v6: IpAddr,
}

const ZERO_MAC: Mac = [0; 6];

/// ICMPv6 types (RFC 4861 section 4).
const ROUTER_SOLICITATION: u8 = 133;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// The options source and target link-layer address (RFC 4861 section 4.6).
const SOURCE_MAC: u8 = 1;
const TARGET_MAC: u8 = 2;

type TestFrames = Vec<(String, Vec<u8>, ExpectedOutcome)>;

fn parse(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn option(kind: u8, mac: Mac) -> Vec<u8> {
    [[kind, 1].as_slice(), &mac].concat()
}

/// The body of solicitations and advertisements after the checksum: flags or zero, a target, options.
fn nd_message_body(flags: u8, target: IpAddr, options: &[u8]) -> Vec<u8> {
    [&[flags, 0, 0, 0], packet_builder::octets(target).as_slice(), options].concat()
}

fn udp(to: Mac, from: Mac, source: (IpAddr, u16), destination: (IpAddr, u16)) -> Vec<u8> {
    let packet = packet_builder::udp(SocketAddr::from(source), SocketAddr::from(destination), b"made by hand");
    ip_frame(to, from, &packet)
}

/// Offers of a DHCP server with its own addresses.
fn dhcp_offers(sender: Station, receiver: Station) -> TestFrames {
    let broadcast = parse("255.255.255.255");
    vec![
        ("a DHCP offer".to_owned(), udp(BROADCAST, sender.mac, (sender.v4, 67), (broadcast, 68)), Dropped("dhcp")),
        ("a DHCP offer to one".to_owned(), udp(receiver.mac, sender.mac, (sender.v4, 67), (receiver.v4, 68)), Dropped("dhcp")),
        (
            "a DHCPv6 advertisement".to_owned(),
            udp(receiver.mac, sender.mac, (link_local(sender.mac), 547), (link_local(receiver.mac), 546)),
            Dropped("dhcp"),
        ),
        (
            "a DHCPv6 reply from another port".to_owned(),
            udp(receiver.mac, sender.mac, (sender.v6, 9), (receiver.v6, 546)),
            Dropped("dhcp"),
        ),
    ]
}

/// Messages that only a router sends.
fn router_messages(sender: Station, receiver: Station) -> TestFrames {
    let local = link_local(sender.mac);
    let redirect = [&[0; 4], packet_builder::octets(local).as_slice(), &packet_builder::octets(receiver.v6)].concat();
    let router_frame = |name: &str, frame| (name.to_owned(), frame, Dropped("router"));
    vec![
        router_frame("a router advertisement", router_advertisement(sender.mac, parse("2001:db8:bad::"))),
        router_frame(
            "a redirect",
            ip_frame(receiver.mac, sender.mac, &icmpv6(local, link_local(receiver.mac), REDIRECT, &redirect)),
        ),
        router_frame(
            "a router solicitation",
            ip_frame(ALL_NODES, sender.mac, &icmpv6(local, parse("ff02::1"), ROUTER_SOLICITATION, &[0; 4])),
        ),
        router_frame("a router advertisement after a VLAN tag", {
            let plain = router_advertisement(sender.mac, parse("2001:db8:bad::"));
            [&plain[..12], &[0x81, 0, 0, 5], &plain[12..]].concat()
        }),
        router_frame("a router advertisement after another header", {
            let message = packet_builder::icmpv6_message(local, parse("ff02::1"), ROUTER_ADVERTISEMENT, &[0; 12]);
            ip_frame(ALL_NODES, sender.mac, &with_destination_options(local, parse("ff02::1"), &message))
        }),
    ]
}

/// An ICMPv6 message after a destination options header (RFC 8200 section 4.6) with padding.
fn with_destination_options(source: IpAddr, destination: IpAddr, message: &[u8]) -> Vec<u8> {
    let padding = [packet_builder::ICMPV6, 0, 1, 4, 0, 0, 0, 0];
    packet_builder::ip(source, destination, 60, &[padding.as_slice(), message].concat())
}

/// Frames that an endpoint may always send: with its own addresses.
fn legitimate_frames(sender: Station, receiver: Station) -> TestFrames {
    let local = link_local(sender.mac);
    let delivered = |name: &str, frame| (name.to_owned(), frame, Delivered);
    let solicit =
        |source, target, options: &[u8]| icmpv6(source, receiver.v6, SOLICITATION, &nd_message_body(0, target, options));
    let advertise =
        |target, options: &[u8]| icmpv6(sender.v6, receiver.v6, ADVERTISEMENT, &nd_message_body(0x20, target, options));
    vec![
        delivered("own IPv4", udp(receiver.mac, sender.mac, (sender.v4, 9), (receiver.v4, 9))),
        delivered("own IPv6", udp(receiver.mac, sender.mac, (sender.v6, 9), (receiver.v6, 9))),
        delivered("own link-local address", udp(receiver.mac, sender.mac, (local, 9), (link_local(receiver.mac), 9))),
        delivered("a DHCP client", udp(BROADCAST, sender.mac, (sender.v4, 68), (parse("255.255.255.255"), 67))),
        delivered(
            "own ARP request",
            packet_builder::frame(
                BROADCAST,
                sender.mac,
                ARP,
                &packet_builder::arp(1, (sender.mac, sender.v4), (ZERO_MAC, receiver.v4)),
            ),
        ),
        delivered(
            "own ARP answer",
            packet_builder::frame(
                receiver.mac,
                sender.mac,
                ARP,
                &packet_builder::arp(2, (sender.mac, sender.v4), (receiver.mac, receiver.v4)),
            ),
        ),
        delivered(
            "own gratuitous ARP",
            packet_builder::frame(
                BROADCAST,
                sender.mac,
                ARP,
                &packet_builder::arp(1, (sender.mac, sender.v4), (ZERO_MAC, sender.v4)),
            ),
        ),
        delivered(
            "own solicitation",
            ip_frame(receiver.mac, sender.mac, &solicit(sender.v6, receiver.v6, &option(SOURCE_MAC, sender.mac))),
        ),
        delivered(
            "own solicitation without an option",
            ip_frame(receiver.mac, sender.mac, &solicit(sender.v6, receiver.v6, &[])),
        ),
        delivered(
            "own advertisement",
            ip_frame(receiver.mac, sender.mac, &advertise(sender.v6, &option(TARGET_MAC, sender.mac))),
        ),
        delivered("own advertisement without an option", ip_frame(receiver.mac, sender.mac, &advertise(sender.v6, &[]))),
        delivered("own duplicate address detection", {
            let packet = icmpv6(parse("::"), parse("ff02::1"), SOLICITATION, &nd_message_body(0, sender.v6, &[]));
            ip_frame(ALL_NODES, sender.mac, &packet)
        }),
        delivered("an echo request", ip_frame(receiver.mac, sender.mac, &icmpv6(sender.v6, receiver.v6, 128, &[0, 1, 0, 1]))),
    ]
}

/// Spoofed frames: with foreign addresses and MACs.
fn forged_frames(sender: Station, receiver: Station, remote: Station, gateway: Station) -> TestFrames {
    let local = link_local(sender.mac);
    let mut all: TestFrames = Vec::new();
    let mut add = |name: String, frame: Vec<u8>| all.push((name, frame, Dropped("source")));
    for (owner, address) in [
        ("the neighbour", receiver.v4),
        ("a far container", remote.v4),
        ("the gateway", gateway.v4),
        ("the world", parse("192.0.2.1")),
        ("loopback", parse("127.0.0.1")),
        ("the unspecified address", parse("0.0.0.0")),
        ("a far container in IPv6", remote.v6),
        ("the gateway in IPv6", gateway.v6),
        ("the world in IPv6", parse("2001:db8::1")),
        ("the neighbour's link-local address", link_local(receiver.mac)),
        ("the unspecified IPv6 address", parse("::")),
    ] {
        let destination = if address.is_ipv4() { receiver.v4 } else { receiver.v6 };
        add(format!("source of {owner}"), udp(receiver.mac, sender.mac, (address, 9), (destination, 9)));
    }
    let unknown_mac = [2, 0, 0, 0, 0, 0x77];
    for (owner, mac) in [("a stranger", unknown_mac), ("the neighbour", receiver.mac), ("the gateway", gateway.mac)] {
        add(format!("IPv4 with the MAC of {owner}"), udp(BROADCAST, mac, (sender.v4, 9), (receiver.v4, 9)));
        add(format!("IPv6 with the MAC of {owner}"), udp(ALL_NODES, mac, (sender.v6, 9), (receiver.v6, 9)));
        add(
            format!("ARP with the MAC of {owner}"),
            packet_builder::frame(BROADCAST, mac, ARP, &packet_builder::arp(1, (mac, sender.v4), (ZERO_MAC, receiver.v4))),
        );
        add(
            format!("ARP that gives the MAC of {owner}"),
            packet_builder::frame(
                BROADCAST,
                sender.mac,
                ARP,
                &packet_builder::arp(2, (mac, sender.v4), (receiver.mac, receiver.v4)),
            ),
        );
    }
    for (owner, address) in
        [("a far container", remote.v4), ("the gateway", gateway.v4), ("the unspecified address", parse("0.0.0.0"))]
    {
        for (word, operation) in [("request", 1), ("answer", 2)] {
            let output = packet_builder::arp(operation, (sender.mac, address), (receiver.mac, receiver.v4));
            add(format!("ARP {word} for {owner}"), packet_builder::frame(receiver.mac, sender.mac, ARP, &output));
        }
    }
    let mut icmp = |name: &str, source: IpAddr, kind: u8, body: Vec<u8>| {
        add(name.to_owned(), ip_frame(receiver.mac, sender.mac, &icmpv6(source, receiver.v6, kind, &body)));
    };
    icmp("advertisement of another", sender.v6, ADVERTISEMENT, nd_message_body(0x20, remote.v6, &option(TARGET_MAC, sender.mac)));
    icmp("advertisement of another, bare", sender.v6, ADVERTISEMENT, nd_message_body(0x20, gateway.v6, &[]));
    icmp(
        "advertisement with another MAC",
        sender.v6,
        ADVERTISEMENT,
        nd_message_body(0x20, sender.v6, &option(TARGET_MAC, receiver.mac)),
    );
    icmp(
        "advertisement from another",
        remote.v6,
        ADVERTISEMENT,
        nd_message_body(0x20, remote.v6, &option(TARGET_MAC, sender.mac)),
    );
    let two = [option(TARGET_MAC, sender.mac), option(TARGET_MAC, receiver.mac)].concat();
    icmp("advertisement with two options", sender.v6, ADVERTISEMENT, nd_message_body(0x20, sender.v6, &two));
    icmp(
        "advertisement with the other option",
        sender.v6,
        ADVERTISEMENT,
        nd_message_body(0x20, sender.v6, &option(SOURCE_MAC, sender.mac)),
    );
    icmp(
        "solicitation with another MAC",
        sender.v6,
        SOLICITATION,
        nd_message_body(0, receiver.v6, &option(SOURCE_MAC, receiver.mac)),
    );
    icmp("solicitation from another", remote.v6, SOLICITATION, nd_message_body(0, receiver.v6, &option(SOURCE_MAC, sender.mac)));
    icmp("solicitation with two options", local, SOLICITATION, nd_message_body(0, receiver.v6, &two));
    icmp("duplicate address detection for another", parse("::"), SOLICITATION, nd_message_body(0, remote.v6, &[]));
    icmp("an echo request from another", remote.v6, 128, vec![0, 1, 0, 1]);
    let message = packet_builder::icmpv6_message(
        sender.v6,
        receiver.v6,
        ADVERTISEMENT,
        &nd_message_body(0x20, remote.v6, &option(TARGET_MAC, sender.mac)),
    );
    add(
        "advertisement after another header".to_owned(),
        ip_frame(receiver.mac, sender.mac, &with_destination_options(sender.v6, receiver.v6, &message)),
    );
    add("a frame of no known protocol".to_owned(), packet_builder::frame(receiver.mac, sender.mac, 0x88cc, &[0; 50]));
    add(
        "a bridge's own protocol".to_owned(),
        packet_builder::frame([0x01, 0x80, 0xc2, 0, 0, 0], sender.mac, 0x26, &[0x42, 0x42, 3, 0, 0, 0, 0]),
    );
    let inner = packet_builder::udp(SocketAddr::new(remote.v4, 9), SocketAddr::new(receiver.v4, 9), b"made by hand");
    let tagged = [[0, 5, 0x08, 0].as_slice(), &inner].concat();
    add("a forged source after a VLAN tag".to_owned(), packet_builder::frame(receiver.mac, sender.mac, 0x8100, &tagged));
    let twice = [[0, 5, 0x81, 0].as_slice(), &tagged].concat();
    add("a forged source after two VLAN tags".to_owned(), packet_builder::frame(receiver.mac, sender.mac, 0x88a8, &twice));
    all
}

/// Frames for an endpoint with source check.
pub fn frames_with_source_check(sender: Station, receiver: Station, remote: Station, gateway: Station) -> TestFrames {
    let parts = [
        legitimate_frames(sender, receiver),
        forged_frames(sender, receiver, remote, gateway),
        router_messages(sender, receiver),
        dhcp_offers(sender, receiver),
    ];
    parts.into_iter().flatten().collect()
}

/// Frames for one without source check. Its addresses and MACs are free; router and DHCP server messages are not.
pub fn frames_without_source_check(sender: Station, receiver: Station, remote: Station) -> TestFrames {
    let unknown_mac = [2, 0, 0, 0, 0, 0x77];
    let virtual_mac = [0, 0, 0x5e, 0, 1, 7];
    let delivered = |name: &str, frame| (name.to_owned(), frame, Delivered);
    let passes = vec![
        delivered("source of the world", udp(receiver.mac, sender.mac, (parse("192.0.2.1"), 9), (receiver.v4, 9))),
        delivered("source of a far container in IPv6", udp(receiver.mac, sender.mac, (remote.v6, 9), (receiver.v6, 9))),
        delivered("another MAC", udp(receiver.mac, unknown_mac, (sender.v4, 9), (receiver.v4, 9))),
        delivered("ARP of a virtual address", {
            packet_builder::frame(
                BROADCAST,
                virtual_mac,
                ARP,
                &packet_builder::arp(2, (virtual_mac, remote.v4), (BROADCAST, remote.v4)),
            )
        }),
        delivered("advertisement of a virtual address", {
            let body = nd_message_body(0x20, remote.v6, &option(TARGET_MAC, sender.mac));
            ip_frame(receiver.mac, sender.mac, &icmpv6(remote.v6, receiver.v6, ADVERTISEMENT, &body))
        }),
        delivered("a frame of no known protocol", packet_builder::frame(receiver.mac, sender.mac, 0x88cc, &[0; 50])),
    ];
    [legitimate_frames(sender, receiver), passes, router_messages(sender, receiver), dhcp_offers(sender, receiver)]
        .into_iter()
        .flatten()
        .collect()
}
