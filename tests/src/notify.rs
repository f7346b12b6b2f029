//! The kernel's netlink notifications of links, addresses, routes, rules, next hops, permanent neighbours, forwarding and
//! nftables.
//!
//! A test that asserts "no writes" subscribes to them meanwhile, and ends with [`assert_only_new_peer`].
//!
//! Neighbours that the kernel learns and removes itself are left out.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket, sockopt,
};
use overlay_agent::kernel::netns::Netns;

use crate::test_lab::CONVERGE_TIMEOUT;
use crate::{ExpectContext, TestLab, churn, etcd, eventually};

/// Groups of `linux/rtnetlink.h`: link, neighbours, IPv4 address, route and rule, IPv6 address, route and rule, both netconf,
/// next hops.
const ROUTE_GROUPS: [u32; 11] = [1, 3, 5, 7, 8, 9, 11, 19, 24, 25, 32];

/// `NFNLGRP_NFTABLES` of `linux/netfilter/nfnetlink.h`.
const NFT_GROUPS: [u32; 1] = [7];

/// Receive buffer in bytes, for some ten thousand notifications.
const RECEIVE_BUFFER_SIZE: usize = 8 << 20;

/// A host is quiet after this period without notifications, and the time limit for it.
const QUIET_PERIOD: Duration = Duration::from_millis(300);
const QUIET_TIMEOUT: Duration = Duration::from_secs(20);

/// How long after an event late changes are awaited.
pub const OBSERVATION_PERIOD: Duration = Duration::from_millis(700);

/// The length of a header (`struct nlmsghdr`).
const NLMSG_HDRLEN: usize = 16;

/// A subscription in one namespace.
#[derive(Debug)]
pub struct Notifications {
    netns: Netns,
    sockets: [(&'static str, OwnedFd); 2],
}

impl Notifications {
    /// Subscribes.
    pub fn subscribe(netns: &Netns) -> Notifications {
        Notifications { netns: netns.clone(), sockets: sockets(netns) }
    }

    /// The notifications since the last call, one line each.
    pub fn drain(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        for (kind, fd) in &self.sockets {
            loop {
                match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                    Ok(length) => lines.extend(messages(&buffer[..length]).filter_map(|m| describe(kind, m))),
                    Err(Errno::EAGAIN) => break,
                    Err(Errno::EINTR) => {}
                    Err(errno) => panic!("the kernel's notifications ({kind}): {errno}"),
                }
            }
        }
        lines
    }

    /// Checks that there were no notifications.
    #[track_caller]
    pub fn assert_none(&self, context: &str) {
        let lines = self.drain();
        assert!(lines.is_empty(), "{context}: the kernel reports {} changes:\n  {}", lines.len(), lines.join("\n  "));
    }

    /// Waits until duplicate address detection has ended for every address (one or two seconds) and a quiet period has passed.
    pub async fn wait_quiet(&self) {
        let start = Instant::now();
        let mut last = start;
        while last.elapsed() < QUIET_PERIOD {
            let (lines, tentative) = (self.drain(), self.tentative_addresses());
            if !lines.is_empty() || !tentative.is_empty() {
                last = Instant::now();
            }
            assert!(start.elapsed() < QUIET_TIMEOUT, "the host does not become quiet: {lines:?} {tentative}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The addresses that are not usable yet.
    fn tentative_addresses(&self) -> String {
        let mut command = std::process::Command::new("ip");
        command.args(["-6", "-o", "address", "show", "tentative"]);
        let output =
            self.netns.run(|| command.output()).expect_ok("enter the namespace").expect_ok("ip (apt-get install iproute2)");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// The notifications of an added IPv4 peer, without their details.
const NEW_PEER: [&str; 6] =
    ["new neighbour", "new neighbour", "new next hop", "new route", "nftables message 12", "nftables message 15"];

/// Checks that these hosts' kernels stay unchanged for the observation period. The end is positive: a lease that is written then
/// takes the same path through the agents, and the kernels report its entries and nothing else. The lease is deleted again.
pub async fn assert_only_new_peer(lab: &TestLab, kernels: &[(&str, Notifications)], context: &str) {
    tokio::time::sleep(OBSERVATION_PERIOD).await;
    for (host, notifications) in kernels {
        notifications.assert_none(&format!("{host}, {context}"));
    }
    let [key, ..] = etcd::free_keys(lab);
    etcd::put(lab, &key, &churn::lease(254, 1));
    for (host, notifications) in kernels {
        let mut lines = Vec::new();
        eventually(&format!("{context}: {host} has the new peer"), CONVERGE_TIMEOUT, || {
            lines.extend(notifications.drain());
            if lines.len() >= NEW_PEER.len() { Ok(()) } else { Err(lines.join("\n  ")) }
        })
        .await;
        let mut kinds: Vec<&str> = lines.iter().map(|line| line.split(" by port").next().unwrap_or_default()).collect();
        kinds.iter_mut().for_each(|kind| *kind = kind.split(':').next().unwrap_or_default());
        kinds.sort_unstable();
        assert_eq!(kinds, NEW_PEER, "{context}: {host}: {lines:#?}");
    }
    etcd::delete(lab, &key);
}

/// The sockets that receive every change in a namespace, each with the name of its protocol.
pub(crate) fn sockets(netns: &Netns) -> [(&'static str, OwnedFd); 2] {
    let open = |protocol, groups: &[u32]| -> nix::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER_SIZE)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups.iter().fold(0, |mask, group| mask | 1 << (group - 1))))?;
        Ok(fd)
    };
    let all = || -> nix::Result<[(&'static str, OwnedFd); 2]> {
        Ok([
            ("route", open(SockProtocol::NetlinkRoute, &ROUTE_GROUPS)?),
            ("nftables", open(SockProtocol::NetlinkNetFilter, &NFT_GROUPS)?),
        ])
    };
    netns.run(all).expect_ok("enter the namespace").expect_ok("subscribe to netlink groups (root is needed)")
}

/// Splits a datagram into messages.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?)).ok()?;
        let message = bytes.get(..length.max(NLMSG_HDRLEN))?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// A line for a message; `None` for changes by the kernel itself.
pub(crate) fn describe(kind: &str, message: &[u8]) -> Option<String> {
    let code = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    let sender = u32::from_ne_bytes(message.get(12..16)?.try_into().ok()?);
    let body = message.get(NLMSG_HDRLEN..).unwrap_or_default();
    if kind == "nftables" {
        return Some(format!("nftables message {} by port {sender}", code & 0xff));
    }
    // linux/rtnetlink.h
    let name = match code {
        16 => "new link",
        17 => "link gone",
        20 => "new address",
        21 => "address gone",
        24 => "new route",
        25 => "route gone",
        28 => "new neighbour",
        29 => "neighbour gone",
        32 => "new rule",
        33 => "rule gone",
        80 => "netconf",
        81 => "netconf gone",
        104 => "new next hop",
        105 => "next hop gone",
        _ => "message",
    };
    let detail = match code {
        // Half a minute after a port came up, a bridge timer reports it once more (br_forward_delay_timer_expired in
        // net/bridge/br_stp_timer.c): AF_BRIDGE, without a requesting process.
        16 if body.first() == Some(&7) && sender == 0 => return None,
        // struct ndmsg: family, padding, interface, state.
        28 | 29 => {
            let state = u16::from_ne_bytes(body.get(8..10)?.try_into().ok()?);
            // NUD_NOARP and NUD_PERMANENT of linux/neighbour.h: configured neighbours, not learned ones.
            // The kernel makes and removes NUD_NOARP entries by itself, such as those of multicast addresses.
            if state & 0xc0 == 0 || (state & 0x80 == 0 && sender == 0) {
                return None;
            }
            format!("interface {}, family {}", i32::from_ne_bytes(body.get(4..8)?.try_into().ok()?), body.first()?)
        }
        // struct ifinfomsg and struct ifaddrmsg: the interface follows four bytes.
        16 | 17 | 20 | 21 => {
            format!("interface {}, family {}", i32::from_ne_bytes(body.get(4..8)?.try_into().ok()?), body.first()?)
        }
        // struct rtmsg: family, lengths, tos, table, protocol.
        24 | 25 => format!("family {}, table {}, proto {}", body.first()?, body.get(4)?, body.get(5)?),
        // struct nhmsg: family, scope, protocol.
        104 | 105 => format!("family {}, proto {}", body.first()?, body.get(2)?),
        _ => format!("type {code}"),
    };
    Some(format!("{name}: {detail}, by port {sender}"))
}
