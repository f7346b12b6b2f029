//! Namespaces, and the operations of [`NetnsBuilder`] in them.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use super::support::{TestNetns, run};
use crate::kernel::netns::{Netns, NetnsError, named_path};
use crate::kernel::netns_builder::NetnsBuilder;
use crate::model::Mac;

#[test]
fn namespace_is_created_entered_and_deleted() {
    let before = Netns::current().expect("own");
    let scratch = TestNetns::new("life");
    assert!(Netns::list().expect("list").contains(scratch.name()));
    assert!(matches!(Netns::create(scratch.name()), Err(NetnsError::AlreadyExists { .. })));
    assert!(Netns::named(scratch.name()).expect("named").is_same(&scratch.netns).expect("same"));
    let inside = scratch.netns.run(|| Netns::current().expect("inside")).expect("run");
    assert!(inside.is_same(&scratch.netns).expect("same"));
    assert!(!before.is_same(&scratch.netns).expect("same"));
    assert!(before.is_same(&Netns::current().expect("own")).expect("same"), "the caller stays in its namespace");
    let inside = scratch.netns.run_in_place(|| Netns::current().expect("inside")).expect("run in place");
    assert!(inside.is_same(&scratch.netns).expect("same"));
    assert!(before.is_same(&Netns::current().expect("own")).expect("same"), "the thread has returned");
    let links = scratch.netns.run(|| run("ip -br link")).expect("run");
    assert!(links.starts_with("lo") && links.contains("UP"), "{links}");

    let name = scratch.name().to_owned();
    drop(scratch);
    assert!(!Netns::list().expect("list").contains(&name));
    Netns::delete(&name).expect("a second deletion succeeds");
    assert!(matches!(Netns::named(&name), Err(NetnsError::NotFound { .. })));
}

#[test]
fn non_namespace_path_is_refused() {
    for path in ["/etc/passwd", "/run", "/dev/null", "/proc/self/ns/uts", "/proc/self/ns/mnt"] {
        let error = Netns::open(path).expect_err(path);
        assert!(matches!(error, NetnsError::NotNetns { .. }), "{path}: {error}");
    }
    for name in ["", ".", "..", "a/b", "../x"] {
        assert!(matches!(named_path(name), Err(NetnsError::InvalidName { .. })), "{name}");
    }
}

#[test]
fn half_created_namespace_can_be_deleted() {
    let scratch = TestNetns::new("half");
    let name = format!("{}-file", scratch.name());
    let path = named_path(&name).expect("path");
    fs::write(&path, "").expect("a plain file");
    assert!(matches!(Netns::named(&name), Err(NetnsError::NotNetns { .. })));
    Netns::delete(&name).expect("delete");
    assert!(!path.exists());
}

#[test]
fn panic_inside_namespace_reaches_caller() {
    let scratch = TestNetns::new("panic");
    let before = Netns::current().expect("own");
    let panics = |work: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err();
    assert!(panics(&|| scratch.netns.run(|| panic!("inside")).expect("entered")));
    assert!(panics(&|| scratch.netns.run_in_place(|| panic!("inside")).expect("entered")));
    assert!(before.is_same(&Netns::current().expect("own")).expect("same"), "the thread has returned");
}

#[test]
fn pids_lists_processes_in_namespace() {
    let scratch = TestNetns::new("pids");
    assert_eq!(scratch.netns.pids().expect("pids"), Vec::<i32>::new());
    let spawn = || std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
    let mut child = scratch.netns.run(spawn).expect("run");
    let found = scratch.netns.pids();
    child.kill().expect("kill");
    child.wait().expect("wait");
    assert_eq!(found.expect("pids"), vec![child.id().cast_signed()]);
}

#[test]
fn veth_pair_connects_two_namespaces() {
    let (left, right) = (TestNetns::new("left"), TestNetns::new("right"));
    let connect = || {
        let (l, r) = (NetnsBuilder::open(&left.netns)?, NetnsBuilder::open(&right.netns)?);
        l.add_bridge("br0")?;
        l.add_veth("port", "eth0", &right.netns)?;
        l.set_master("port", "br0")?;
        l.set_mtu("port", 1400)?;
        r.set_mac("eth0", Mac([2, 0, 0, 0, 0, 7]))?;
        for (setup, name, host) in [(&l, "br0", 1), (&r, "eth0", 2)] {
            for address in [format!("10.9.0.{host}/24"), format!("fd00:9::{host}/64")] {
                let address = address.parse().expect("an address");
                setup.add_address(name, address)?;
                setup.add_address(name, address)?;
            }
            setup.set_up(name)?;
        }
        l.set_up("port")?;
        r.add_route(None, Some("10.9.0.1".parse().expect("address")), None)?;
        r.add_route(None, Some("fd00:9::1".parse().expect("address")), Some("eth0"))?;
        r.add_route(Some("10.77.0.0/16".parse().expect("cidr")), None, Some("eth0"))?;
        l.delete_link("none")?;
        r.link_index("none")
    };
    let error = connect().expect_err("no such link");
    assert_eq!(error.errno, libc::ENODEV);
    assert!(error.message.contains("cannot find interface none"), "{error}");
    let (address, routes) = right.netns.run(|| (run("ip -br address"), run("ip route") + &run("ip -6 route"))).expect("run");
    assert!(address.contains("10.9.0.2/24 fd00:9::2/64"), "{address}");
    for route in ["default via 10.9.0.1 dev eth0", "default via fd00:9::1 dev eth0", "10.77.0.0/16 dev eth0"] {
        assert!(routes.contains(route), "{route} in {routes}");
    }
    for (server, family) in [("10.9.0.1:0", "IPv4"), ("[fd00:9::1]:0", "IPv6")] {
        let listener = left.netns.run(|| TcpListener::bind(server).expect("bind")).expect("run");
        let target = listener.local_addr().expect("address");
        let connected = right.netns.run(|| TcpStream::connect_timeout(&target, Duration::from_secs(3))).expect("run");
        assert!(connected.is_ok(), "{family}: {connected:?}");
    }
}
