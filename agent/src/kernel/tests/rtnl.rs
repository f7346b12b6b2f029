//! Requests about links, addresses and routes, and the kernel's error messages.

use netlink_packet_route::route::RouteProtocol;

use super::support::*;
use crate::kernel::netns::LOOPBACK_IFINDEX;
use crate::kernel::route_socket::RouteSocket;
use crate::kernel::rtnl::route;

#[test]
fn kernel_error_carries_ext_ack_message() {
    TestNetns::new("words")
        .netns
        .run(|| {
            let mut socket = RouteSocket::open().expect("a socket");
            let destination = "10.9.0.0/16".parse().expect("cidr");
            let unreachable = route(Some(destination), Some(ip("10.8.0.1")), None, RouteProtocol::Static);
            let error = socket.replace_route(unreachable).expect_err("the gateway is unreachable");
            assert_eq!((error.errno, error.detail.as_str()), (libc::ENETUNREACH, "Nexthop has invalid gateway"));
        })
        .expect("a thread inside");
}

#[test]
fn addresses_have_no_broadcast_and_no_dad() {
    TestNetns::new("plain")
        .netns
        .run(|| {
            let mut socket = RouteSocket::open().expect("a socket");
            for address in ["10.9.0.1/24", "fd09::1/64"] {
                let address = address.parse().expect("address");
                socket.add_address(LOOPBACK_IFINDEX, address).expect("added");
                socket.add_address(LOOPBACK_IFINDEX, address).expect("added again");
            }
            let listed = run("ip address show dev lo");
            assert!(listed.contains("10.9.0.1/24") && !listed.contains("brd 10.9.0.255"), "{listed}");
            assert!(listed.contains("nodad") && !listed.contains("tentative"), "{listed}");
        })
        .expect("a thread inside");
}
