//! Namespaces, and the operations of [`NetnsBuilder`] in them.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::support::{TestNetns, run};
use crate::kernel::netns::{NETNS_RUN_DIR, NETWORK_PREFIX, Netns, NetnsError, named_path, serve_name_request};
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

/// Gives the calling thread a mount namespace like that of the packaged agent: `/run/netns` is read-only, and what is mounted there
/// does not reach the host.
fn confine(helper: &std::path::Path) {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).expect("a slave");
    let names = fs::File::open(NETNS_RUN_DIR).expect("the names");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("a tmpfs");
    fs::create_dir(NETNS_RUN_DIR).expect("a directory");
    let names = format!("/proc/self/fd/{}", names.as_raw_fd());
    mount(Some(names.as_str()), NETNS_RUN_DIR, none, MsFlags::MS_BIND | MsFlags::MS_REC, none).expect("the names");
    mount(none, NETNS_RUN_DIR, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none).expect("read-only");
    fs::create_dir("/run/overlayd").expect("a directory");
    std::os::unix::fs::symlink(helper, "/run/overlayd/netns.sock").expect("a link");
}

#[test]
fn helper_names_namespaces_of_confined_agent() {
    // The directory exists and is shared then.
    let plain = TestNetns::new("helper");
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("helper.sock");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let helper = std::thread::spawn(move || {
        for client in listener.incoming().take(5) {
            serve_name_request(client.expect("a client")).expect("a request");
        }
    });
    let name = format!("{NETWORK_PREFIX}{}", plain.name());
    let on_host = || Netns::named(&name);
    std::thread::scope(|scope| {
        let (name, plain, on_host) = (&name, plain.name(), &on_host);
        let (to_host, from_agent) = std::sync::mpsc::sync_channel(0);
        let (to_agent, from_host) = std::sync::mpsc::sync_channel::<()>(0);
        let agent = scope.spawn(move || {
            confine(&socket);
            let netns = Netns::ensure(name).expect("created");
            let step = |id: String| {
                to_host.send(id).expect("a receiver");
                from_host.recv().expect("a sender");
            };
            step(netns.id().expect("an id"));
            assert!(!netns.is_named(), "the host deleted the name");
            netns.name_again().expect("named");
            step(netns.id().expect("an id"));
            assert!(netns.is_named());
            let error = Netns::delete(plain).expect_err("no network's").to_string();
            assert!(error.contains("is not an isolated network's namespace"), "{error}");
            let error = Netns::ensure(&format!("{name}/x")).expect_err("no name");
            assert!(matches!(error, NetnsError::InvalidName { .. }), "{error}");
            Netns::delete(name).expect("deleted");
            // It stays with the name that it has.
            Netns::ensure(name).expect("created");
        });
        let id = from_agent.recv().expect("a sender");
        assert_eq!(on_host().expect("named").id().expect("an id"), id, "the agent's namespace");
        run(&format!("ip netns delete {name}"));
        to_agent.send(()).expect("a receiver");
        assert_eq!(from_agent.recv().expect("a sender"), id);
        assert_eq!(on_host().expect("named").id().expect("an id"), id, "named again");
        to_agent.send(()).expect("a receiver");
        agent.join().expect("the agent");
    });
    helper.join().expect("the helper");
    assert!(on_host().is_ok(), "it outlives the agent");
    Netns::delete(&name).expect("deleted");
}
