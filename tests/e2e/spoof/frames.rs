//! The frames: each with its name and with what must become of it.

use std::net::{IpAddr, SocketAddr};

use overlay_tests::craft::{self, ALL_NODES, ARP, BROADCAST, Mac, ROUTER_ADVERTISEMENT, icmpv6, ip_frame, router_advertisement};
use overlay_tests::rules::link_local;

/// What must become of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It comes to the other end.
    Passes,
    /// It does not, and is counted under this reason.
    Dropped(&'static str),
}

use Verdict::{Dropped, Passes};

/// Who sends, or whose name is used.
#[derive(Debug, Clone, Copy)]
pub struct Me {
    pub mac: Mac,
    pub v4: IpAddr,
    pub v6: IpAddr,
}

const NOBODY: Mac = [0; 6];

/// ICMPv6 types (RFC 4861 section 4).
const ROUTER_SOLICITATION: u8 = 133;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// The options source and target link-layer address.
const SOURCE_MAC: u8 = 1;
const TARGET_MAC: u8 = 2;

type Frames = Vec<(String, Vec<u8>, Verdict)>;

fn parse(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn option(kind: u8, mac: Mac) -> Vec<u8> {
    [[kind, 1].as_slice(), &mac].concat()
}

/// Flags or nothing, a target, options: what solicitations and advertisements have behind the checksum.
fn about(flags: u8, target: IpAddr, options: &[u8]) -> Vec<u8> {
    [&[flags, 0, 0, 0], craft::octets(target).as_slice(), options].concat()
}

fn udp(to: Mac, from: Mac, source: (IpAddr, u16), destination: (IpAddr, u16)) -> Vec<u8> {
    let packet = craft::udp(SocketAddr::from(source), SocketAddr::from(destination), b"made by hand");
    ip_frame(to, from, &packet)
}

/// A DHCP server's offers, with its own addresses.
fn offers(me: Me, to: Me) -> Frames {
    let broadcast = parse("255.255.255.255");
    vec![
        ("a DHCP offer".to_owned(), udp(BROADCAST, me.mac, (me.v4, 67), (broadcast, 68)), Dropped("dhcp")),
        ("a DHCP offer to one".to_owned(), udp(to.mac, me.mac, (me.v4, 67), (to.v4, 68)), Dropped("dhcp")),
        (
            "a DHCPv6 advertisement".to_owned(),
            udp(to.mac, me.mac, (link_local(me.mac), 547), (link_local(to.mac), 546)),
            Dropped("dhcp"),
        ),
        ("a DHCPv6 reply from another port".to_owned(), udp(to.mac, me.mac, (me.v6, 9), (to.v6, 546)), Dropped("dhcp")),
    ]
}

/// What only a router says.
fn routers(me: Me, to: Me) -> Frames {
    let local = link_local(me.mac);
    let redirect = [&[0; 4], craft::octets(local).as_slice(), &craft::octets(to.v6)].concat();
    let named = |name: &str, frame| (name.to_owned(), frame, Dropped("router"));
    vec![
        named("a router advertisement", router_advertisement(me.mac, parse("2001:db8:bad::"))),
        named("a redirect", ip_frame(to.mac, me.mac, &icmpv6(local, link_local(to.mac), REDIRECT, &redirect))),
        named(
            "a router solicitation",
            ip_frame(ALL_NODES, me.mac, &icmpv6(local, parse("ff02::1"), ROUTER_SOLICITATION, &[0; 4])),
        ),
        named("a router advertisement behind a VLAN tag", {
            let plain = router_advertisement(me.mac, parse("2001:db8:bad::"));
            [&plain[..12], &[0x81, 0, 0, 5], &plain[12..]].concat()
        }),
        named("a router advertisement behind another header", {
            let message = craft::icmpv6_message(local, parse("ff02::1"), ROUTER_ADVERTISEMENT, &[0; 12]);
            ip_frame(ALL_NODES, me.mac, &behind_options(local, parse("ff02::1"), &message))
        }),
    ]
}

/// An ICMPv6 message behind a header of destination options (RFC 8200 section 4.6), which holds padding.
fn behind_options(source: IpAddr, destination: IpAddr, message: &[u8]) -> Vec<u8> {
    let padding = [craft::ICMPV6, 0, 1, 4, 0, 0, 0, 0];
    craft::ip(source, destination, 60, &[padding.as_slice(), message].concat())
}

/// What an endpoint may send whatever its checks say: its own.
fn own(me: Me, to: Me) -> Frames {
    let local = link_local(me.mac);
    let named = |name: &str, frame| (name.to_owned(), frame, Passes);
    let solicit = |source, target, options: &[u8]| icmpv6(source, to.v6, SOLICITATION, &about(0, target, options));
    let advertise = |target, options: &[u8]| icmpv6(me.v6, to.v6, ADVERTISEMENT, &about(0x20, target, options));
    vec![
        named("own IPv4", udp(to.mac, me.mac, (me.v4, 9), (to.v4, 9))),
        named("own IPv6", udp(to.mac, me.mac, (me.v6, 9), (to.v6, 9))),
        named("own link-local address", udp(to.mac, me.mac, (local, 9), (link_local(to.mac), 9))),
        named("a DHCP client", udp(BROADCAST, me.mac, (me.v4, 68), (parse("255.255.255.255"), 67))),
        named("own ARP request", craft::frame(BROADCAST, me.mac, ARP, &craft::arp(1, (me.mac, me.v4), (NOBODY, to.v4)))),
        named("own ARP answer", craft::frame(to.mac, me.mac, ARP, &craft::arp(2, (me.mac, me.v4), (to.mac, to.v4)))),
        named("own gratuitous ARP", craft::frame(BROADCAST, me.mac, ARP, &craft::arp(1, (me.mac, me.v4), (NOBODY, me.v4)))),
        named("own solicitation", ip_frame(to.mac, me.mac, &solicit(me.v6, to.v6, &option(SOURCE_MAC, me.mac)))),
        named("own solicitation without an option", ip_frame(to.mac, me.mac, &solicit(me.v6, to.v6, &[]))),
        named("own advertisement", ip_frame(to.mac, me.mac, &advertise(me.v6, &option(TARGET_MAC, me.mac)))),
        named("own advertisement without an option", ip_frame(to.mac, me.mac, &advertise(me.v6, &[]))),
        named("own duplicate address detection", {
            let packet = icmpv6(parse("::"), parse("ff02::1"), SOLICITATION, &about(0, me.v6, &[]));
            ip_frame(ALL_NODES, me.mac, &packet)
        }),
        named("an echo request", ip_frame(to.mac, me.mac, &icmpv6(me.v6, to.v6, 128, &[0, 1, 0, 1]))),
    ]
}

/// What pretends: addresses and MACs of others.
fn forged(me: Me, to: Me, far: Me, gateway: Me) -> Frames {
    let local = link_local(me.mac);
    let mut all: Frames = Vec::new();
    let mut add = |name: String, frame: Vec<u8>| all.push((name, frame, Dropped("source")));
    for (whose, address) in [
        ("the neighbour", to.v4),
        ("a far container", far.v4),
        ("the gateway", gateway.v4),
        ("the world", parse("192.0.2.1")),
        ("loopback", parse("127.0.0.1")),
        ("nobody", parse("0.0.0.0")),
        ("a far container in IPv6", far.v6),
        ("the gateway in IPv6", gateway.v6),
        ("the world in IPv6", parse("2001:db8::1")),
        ("the neighbour's link-local address", link_local(to.mac)),
        ("nobody in IPv6", parse("::")),
    ] {
        let destination = if address.is_ipv4() { to.v4 } else { to.v6 };
        add(format!("source of {whose}"), udp(to.mac, me.mac, (address, 9), (destination, 9)));
    }
    let stranger = [2, 0, 0, 0, 0, 0x77];
    for (whose, mac) in [("a stranger", stranger), ("the neighbour", to.mac), ("the gateway", gateway.mac)] {
        add(format!("IPv4 with the MAC of {whose}"), udp(BROADCAST, mac, (me.v4, 9), (to.v4, 9)));
        add(format!("IPv6 with the MAC of {whose}"), udp(ALL_NODES, mac, (me.v6, 9), (to.v6, 9)));
        add(
            format!("ARP with the MAC of {whose}"),
            craft::frame(BROADCAST, mac, ARP, &craft::arp(1, (mac, me.v4), (NOBODY, to.v4))),
        );
        add(
            format!("ARP that gives the MAC of {whose}"),
            craft::frame(BROADCAST, me.mac, ARP, &craft::arp(2, (mac, me.v4), (to.mac, to.v4))),
        );
    }
    for (whose, address) in [("a far container", far.v4), ("the gateway", gateway.v4), ("nobody", parse("0.0.0.0"))] {
        for (word, operation) in [("request", 1), ("answer", 2)] {
            let said = craft::arp(operation, (me.mac, address), (to.mac, to.v4));
            add(format!("ARP {word} for {whose}"), craft::frame(to.mac, me.mac, ARP, &said));
        }
    }
    let mut icmp = |name: &str, source: IpAddr, kind: u8, body: Vec<u8>| {
        add(name.to_owned(), ip_frame(to.mac, me.mac, &icmpv6(source, to.v6, kind, &body)));
    };
    icmp("advertisement of another", me.v6, ADVERTISEMENT, about(0x20, far.v6, &option(TARGET_MAC, me.mac)));
    icmp("advertisement of another, bare", me.v6, ADVERTISEMENT, about(0x20, gateway.v6, &[]));
    icmp("advertisement with another MAC", me.v6, ADVERTISEMENT, about(0x20, me.v6, &option(TARGET_MAC, to.mac)));
    icmp("advertisement from another", far.v6, ADVERTISEMENT, about(0x20, far.v6, &option(TARGET_MAC, me.mac)));
    let two = [option(TARGET_MAC, me.mac), option(TARGET_MAC, to.mac)].concat();
    icmp("advertisement with two options", me.v6, ADVERTISEMENT, about(0x20, me.v6, &two));
    icmp("advertisement with the other option", me.v6, ADVERTISEMENT, about(0x20, me.v6, &option(SOURCE_MAC, me.mac)));
    icmp("solicitation with another MAC", me.v6, SOLICITATION, about(0, to.v6, &option(SOURCE_MAC, to.mac)));
    icmp("solicitation from another", far.v6, SOLICITATION, about(0, to.v6, &option(SOURCE_MAC, me.mac)));
    icmp("solicitation with two options", local, SOLICITATION, about(0, to.v6, &two));
    icmp("duplicate address detection for another", parse("::"), SOLICITATION, about(0, far.v6, &[]));
    icmp("an echo request from another", far.v6, 128, vec![0, 1, 0, 1]);
    let message = craft::icmpv6_message(me.v6, to.v6, ADVERTISEMENT, &about(0x20, far.v6, &option(TARGET_MAC, me.mac)));
    add("advertisement behind another header".to_owned(), ip_frame(to.mac, me.mac, &behind_options(me.v6, to.v6, &message)));
    add("a frame of no known protocol".to_owned(), craft::frame(to.mac, me.mac, 0x88cc, &[0; 50]));
    add(
        "a bridge's own protocol".to_owned(),
        craft::frame([0x01, 0x80, 0xc2, 0, 0, 0], me.mac, 0x26, &[0x42, 0x42, 3, 0, 0, 0, 0]),
    );
    let inner = craft::udp(SocketAddr::new(far.v4, 9), SocketAddr::new(to.v4, 9), b"made by hand");
    let tagged = [[0, 5, 0x08, 0].as_slice(), &inner].concat();
    add("a forged source behind a VLAN tag".to_owned(), craft::frame(to.mac, me.mac, 0x8100, &tagged));
    let twice = [[0, 5, 0x81, 0].as_slice(), &tagged].concat();
    add("a forged source behind two VLAN tags".to_owned(), craft::frame(to.mac, me.mac, 0x88a8, &twice));
    all
}

/// For an endpoint whose source is checked.
pub fn checked(me: Me, to: Me, far: Me, gateway: Me) -> Frames {
    let parts = [own(me, to), forged(me, to, far, gateway), routers(me, to), offers(me, to)];
    parts.into_iter().flatten().collect()
}

/// For one whose source is not checked: its addresses and MACs are its own affair; to be a router or a DHCP server is not.
pub fn unchecked(me: Me, to: Me, far: Me) -> Frames {
    let stranger = [2, 0, 0, 0, 0, 0x77];
    let virtual_mac = [0, 0, 0x5e, 0, 1, 7];
    let named = |name: &str, frame| (name.to_owned(), frame, Passes);
    let passes = vec![
        named("source of the world", udp(to.mac, me.mac, (parse("192.0.2.1"), 9), (to.v4, 9))),
        named("source of a far container in IPv6", udp(to.mac, me.mac, (far.v6, 9), (to.v6, 9))),
        named("another MAC", udp(to.mac, stranger, (me.v4, 9), (to.v4, 9))),
        named("ARP of a virtual address", {
            craft::frame(BROADCAST, virtual_mac, ARP, &craft::arp(2, (virtual_mac, far.v4), (BROADCAST, far.v4)))
        }),
        named("advertisement of a virtual address", {
            let body = about(0x20, far.v6, &option(TARGET_MAC, me.mac));
            ip_frame(to.mac, me.mac, &icmpv6(far.v6, to.v6, ADVERTISEMENT, &body))
        }),
        named("a frame of no known protocol", craft::frame(to.mac, me.mac, 0x88cc, &[0; 50])),
    ];
    [own(me, to), passes, routers(me, to), offers(me, to)].into_iter().flatten().collect()
}
