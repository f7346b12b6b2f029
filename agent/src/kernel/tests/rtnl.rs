//! The `rtnetlink` connection: its changes, the kernel's error messages, and the detection of its end.

use std::time::Duration;

use netlink_packet_route::route::RouteProtocol;
use tokio::time::timeout;

use super::support::*;
use crate::kernel::netns::LOOPBACK_IFINDEX;
use crate::kernel::rtnl::{Rtnl, route};
use crate::kernel::{Kernel, KernelOptions};

const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

#[test]
fn request_on_closed_connection_fails() {
    on_netns("ended", async |netns| {
        let rtnl = Rtnl::open(netns).expect("a connection");
        assert_eq!(rtnl.delete_link(99).await.map_err(|e| e.errno), Err(libc::ENODEV));
        assert_eq!(rtnl.link_index("lo").await, Ok(LOOPBACK_IFINDEX));
        let closed = rtnl.closed();
        rtnl.abort();
        timeout(CLOSE_TIMEOUT, closed).await.expect("its end is signalled");
        assert_eq!(rtnl.delete_link(99).await.map_err(|e| e.errno), Err(libc::EPIPE));
        assert_eq!(rtnl.link_index("lo").await.map_err(|e| e.errno), Err(libc::EPIPE));
    });
}

#[test]
fn monitor_ends_with_connection() {
    on_netns("monends", async |netns| {
        let (kernel, _events, monitor) = Kernel::open(netns, &KernelOptions::default()).expect("the kernel");
        let monitor = tokio::spawn(monitor.run());
        kernel.abort_connection().await;
        let end = timeout(CLOSE_TIMEOUT, monitor).await.expect("it ends").expect("no panic");
        assert_eq!(end.map_err(|e| e.errno), Err(libc::EPIPE));
    });
}

#[test]
fn kernel_error_carries_ext_ack_message() {
    on_netns("words", async |netns| {
        let rtnl = Rtnl::open(netns).expect("a connection");
        let destination = "10.9.0.0/16".parse().expect("cidr");
        let unreachable = route(Some(destination), Some(ip("10.8.0.1")), None, RouteProtocol::Static);
        let error = rtnl.replace_route(unreachable).await.expect_err("the gateway is unreachable");
        assert_eq!((error.errno, error.detail.as_str()), (libc::ENETUNREACH, "Nexthop has invalid gateway"));
    });
}

#[test]
fn addresses_have_no_broadcast_and_no_dad() {
    on_netns("plain", async |netns| {
        let rtnl = Rtnl::open(netns).expect("a connection");
        for address in ["10.9.0.1/24", "fd09::1/64"] {
            let address = address.parse().expect("address");
            rtnl.add_address(LOOPBACK_IFINDEX, address).await.expect("added");
            rtnl.add_address(LOOPBACK_IFINDEX, address).await.expect("added again");
        }
        let listed = netns.run(|| run("ip address show dev lo")).expect("inside");
        assert!(listed.contains("10.9.0.1/24") && !listed.contains("brd 10.9.0.255"), "{listed}");
        assert!(listed.contains("nodad") && !listed.contains("tentative"), "{listed}");
    });
}
