//! The connection of `rtnetlink`: what it makes, what it says when it is refused, and that its end is noticed.

use std::time::Duration;

use netlink_packet_route::route::RouteProtocol;
use tokio::time::timeout;

use super::support::*;
use crate::kernel::netns::LOOPBACK;
use crate::kernel::rtnl::{Rtnl, route};
use crate::kernel::{Kernel, KernelOptions};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_connection_that_ended_is_an_error_and_not_success() {
    Scratch::new("ended").block_on(async || {
        let rtnl = Rtnl::open().expect("a connection");
        assert_eq!(rtnl.delete_link(99).await.map_err(|e| e.errno), Err(libc::ENODEV));
        assert_eq!(rtnl.link_index("lo").await, Ok(LOOPBACK));
        let ended = rtnl.ended();
        rtnl.abort();
        timeout(SOON, ended).await.expect("its end is told");
        assert_eq!(rtnl.delete_link(99).await.map_err(|e| e.errno), Err(libc::EPIPE));
        assert_eq!(rtnl.link_index("lo").await.map_err(|e| e.errno), Err(libc::EPIPE));
    });
}

#[test]
fn the_monitor_ends_with_the_connection() {
    Scratch::new("monends").block_on(async || {
        let (kernel, _events, monitor) = Kernel::open(&KernelOptions::default()).expect("the kernel");
        let monitor = tokio::spawn(monitor.run());
        kernel.abort_connection().await;
        let end = timeout(SOON, monitor).await.expect("it ends").expect("no panic");
        assert_eq!(end.map_err(|e| e.errno), Err(libc::EPIPE));
    });
}

#[test]
fn refusals_have_the_kernels_words() {
    Scratch::new("words").block_on(async || {
        let rtnl = Rtnl::open().expect("a connection");
        let destination = "10.9.0.0/16".parse().expect("cidr");
        let nowhere = route(Some(destination), Some(ip("10.8.0.1")), None, RouteProtocol::Static);
        let refusal = rtnl.replace_route(nowhere).await.expect_err("a gateway that cannot be reached");
        assert_eq!((refusal.errno, refusal.detail.as_str()), (libc::ENETUNREACH, "Nexthop has invalid gateway"));
    });
}

#[test]
fn addresses_have_neither_broadcast_nor_duplicate_detection() {
    Scratch::new("plain").block_on(async || {
        let rtnl = Rtnl::open().expect("a connection");
        for address in ["10.9.0.1/24", "fd09::1/64"] {
            let address = address.parse().expect("address");
            rtnl.add_address(LOOPBACK, address).await.expect("added");
            rtnl.add_address(LOOPBACK, address).await.expect("added again");
        }
        let listed = run("ip address show dev lo");
        assert!(listed.contains("10.9.0.1/24") && !listed.contains("brd 10.9.0.255"), "{listed}");
        assert!(listed.contains("nodad") && !listed.contains("tentative"), "{listed}");
    });
}
