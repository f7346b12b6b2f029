//! Tests of the state directory, its files, locks and journals.

use std::os::unix::fs::{MetadataExt, symlink};

use super::*;
use crate::model::{Device, Family, Vni};

fn quarantined_files(directory: &Path) -> Vec<String> {
    let names = std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|n| n.contains(".torn-")).collect()
}

#[test]
fn node_id_is_created_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/state");
    let id = StateDir::open(&path).unwrap().node_id().unwrap();
    assert_eq!(id.len(), 32);
    assert_eq!(StateDir::open(&path).unwrap().node_id().unwrap(), id);
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(std::fs::metadata(path.join("node-id")).unwrap().mode() & 0o7777, 0o600);
}

#[test]
fn new_node_id_resets_macs() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let device = Device::vxlan(Family::V4, Vni::DEFAULT);
    let (id, mut host) = (state.node_id().unwrap(), HostState::default());
    let (mac, _) = host.device_mac(device, None);
    host.sysctls.insert("ipv4/ip_forward".to_owned(), "0".to_owned());
    state.save_host(&host).unwrap();
    assert_eq!((state.node_id().unwrap(), state.load_host().unwrap()), (id.clone(), host.clone()));
    std::fs::remove_file(dir.path().join("node-id")).unwrap();
    assert_ne!(state.node_id().unwrap(), id);
    let mut copy = state.load_host().unwrap();
    assert_eq!(copy.sysctls, host.sysctls);
    assert_ne!(copy.device_mac(device, None).0, mac);
}

#[test]
fn directory_of_network_is_private_and_under_the_same_lock() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("state");
    let network_dir = |name: &str| root.join("networks").join(name);
    let [blue, green] = ["blue", "green"].map(NetworkName::from);
    {
        let state = StateDir::open(&root).unwrap();
        assert_eq!(state.networks().unwrap(), []);
        let of_blue = state.network(&blue).unwrap();
        drop(state);
        for path in [root.join("networks"), network_dir("blue")] {
            assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o7777, 0o700);
        }
        let error = StateDir::open(&root).unwrap_err();
        assert!(matches!(error, StateError::Lock(LockError::Held { .. })), "{error}");
        // The devices of a copied host get other MACs in each network.
        let device = Device::vxlan(Family::V4, Vni::try_from(7).unwrap());
        let mut host = HostState { record: Some("{}".to_owned()), ..HostState::default() };
        let (mac, _) = host.device_mac(device, None);
        of_blue.save_host(&host).unwrap();
        drop(of_blue);
        let state = StateDir::open(&root).unwrap();
        state.node_id().unwrap();
        let mut copy = state.network(&blue).unwrap().load_host().unwrap();
        assert!(copy.device_mac(device, None) != (mac, false) && copy.record == host.record);
        state.network(&green).unwrap().save_host(&host).unwrap();
        std::fs::create_dir(network_dir("Not-ours")).unwrap();
        assert_eq!(state.networks().unwrap(), [blue.clone(), green.clone()]);
        // The network is left.
        state.network(&green).unwrap().remove().unwrap();
        assert_eq!(state.networks().unwrap(), [blue]);
        state.remove().unwrap();
    }
    let left = |path: PathBuf| std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    assert_eq!((left(root.clone()), left(root.join("networks"))), (vec!["networks".into()], vec!["Not-ours".into()]));
    std::fs::remove_dir(network_dir("Not-ours")).unwrap();
    StateDir::open(&root).unwrap().remove().unwrap();
    assert!(!root.exists());
}

#[test]
fn corrupt_files_are_quarantined() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let mut host = HostState::default();
    let (mac, _) = host.device_mac(Device::vxlan(Family::V6, Vni::DEFAULT), None);
    state.save_host(&host).unwrap();
    let content = std::fs::read(dir.path().join("state.json")).unwrap();
    // Truncations at many lengths, and content that is not text or has another type.
    let mut corrupt: Vec<Vec<u8>> = (0..content.len() - 2).step_by(7).map(|n| content[..n].to_vec()).collect();
    corrupt.extend([
        b"\xff\xfe\0\0".to_vec(),
        b"[]".to_vec(),
        b"{\"version\":\"x\"}".to_vec(),
        b"{\"version\":1,\"subnet\":7}".to_vec(),
    ]);
    for (n, bytes) in corrupt.iter().enumerate() {
        std::fs::write(dir.path().join("state.json"), bytes).unwrap();
        assert_eq!(state.load_host().unwrap(), HostState::default(), "{:?}", String::from_utf8_lossy(bytes));
        assert_eq!(quarantined_files(dir.path()).len(), n + 1);
    }
    state.save_host(&host).unwrap();
    assert_eq!(state.load_host().unwrap().device_mac(Device::vxlan(Family::V6, Vni::DEFAULT), None), (mac, false));
    let found = Some(Mac([2, 0, 0, 0, 0, 7]));
    assert_eq!(
        state.load_host().unwrap().device_mac(Device::vxlan(Family::V4, Vni::DEFAULT), found),
        (Mac([2, 0, 0, 0, 0, 7]), true)
    );

    std::fs::write(dir.path().join("node-id"), "").unwrap();
    assert_eq!(state.node_id().unwrap().len(), 32);
    std::fs::remove_file(dir.path().join("state.json")).unwrap();
    std::fs::create_dir(dir.path().join("state.json")).unwrap();
    assert_eq!(state.load_host().unwrap(), HostState::default());
    assert!(quarantined_files(dir.path()).iter().any(|n| n.starts_with("node-id.torn-")));
}

#[test]
fn bridges_share_gateway_mac() {
    let mut host = HostState::default();
    let (first, second) = (Vni::DEFAULT, Vni::try_from(7).unwrap());
    let (gateway, _) = host.device_mac(Device::bridge(first), None);
    let (tunnel, _) = host.device_mac(Device::vxlan(Family::V4, first), None);
    assert_eq!(host.device_mac(Device::bridge(second), None), (gateway, true));
    assert_ne!(host.device_mac(Device::vxlan(Family::V4, second), None).0, tunnel, "each VTEP has its own");
    assert_eq!(host.device_mac(Device::bridge(second), None), (gateway, false));
}

#[test]
fn newer_version_is_rejected_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let path = dir.path().join("state.json");
    std::fs::write(&path, "{\"version\":2,\"subnet\":{\"other\":1}}").unwrap();
    let error = state.load_host().unwrap_err().to_string();
    assert!(error.contains("has version 2, but this overlayd supports 1"), "{error}");
    assert!(path.exists() && quarantined_files(dir.path()).is_empty());
}

#[test]
fn host_state_round_trips_and_skips_equal_write() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let mut host = HostState::default();
    let (mac, _) = host.device_mac(Device::vxlan(Family::V4, Vni::DEFAULT), None);
    assert_eq!(host.device_mac(Device::vxlan(Family::V4, Vni::DEFAULT), None), (mac, false));
    assert!(mac.is_unicast());
    host.subnet = Some(Subnet::from_key("10.244.101.0-24&fd00:10:244:51::-64").unwrap());
    host.public_ip.v4 = Some("10.99.1.1".parse().unwrap());
    state.save_host(&host).unwrap();
    let inode = std::fs::metadata(dir.path().join("state.json")).unwrap().ino();
    state.save_host(&host).unwrap();
    assert_eq!(std::fs::metadata(dir.path().join("state.json")).unwrap().ino(), inode);
    assert_eq!(state.load_host().unwrap(), host);
    assert!(!dir.path().join(".state.json.tmp").exists());
}

#[test]
fn second_agent_is_rejected_with_pid() {
    let dir = tempfile::tempdir().unwrap();
    let held = DirLock::acquire(dir.path()).unwrap();
    let error = DirLock::acquire(dir.path()).unwrap_err().to_string();
    assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
    assert!(error.contains(&dir.path().display().to_string()), "{error}");
    drop(held);
    let state = StateDir::open(dir.path()).unwrap();
    assert!(matches!(StateDir::open(dir.path()), Err(StateError::Lock(LockError::Held { .. }))));
    // One directory can be both run and state directory of an agent.
    let run = DirLock::acquire(dir.path()).unwrap();
    drop((state, run));
    StateDir::open(dir.path()).unwrap();
}

#[test]
fn symlink_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let victim = dir.path().join("victim");
    std::fs::write(&victim, "mine").unwrap();
    symlink(&victim, dir.path().join(".file.tmp")).unwrap();
    symlink(&victim, dir.path().join("file")).unwrap();
    write_atomic(&dir.path().join("file"), b"new", 0o640).unwrap();
    assert_eq!(std::fs::read(&victim).unwrap(), b"mine");
    assert_eq!(std::fs::read(dir.path().join("file")).unwrap(), b"new");
    assert_eq!(std::fs::symlink_metadata(dir.path().join("file")).unwrap().mode() & 0o7777, 0o640);
}

#[test]
fn subnet_env_matches_flannel() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/flannel-v0.20.2");
    let cases = [
        ("vxlan", "10.244.0.0/16", "", "10.244.27.0-24", 1450, ""),
        ("vxlan-directrouting", "10.244.0.0/16", "", "10.244.18.192-26", 1450, ""),
        ("host-gw", "10.244.0.0/16", "", "10.244.15.0-24", 1500, ""),
        // flannel writes the IPv4 MTU; ours is that of the smaller family.
        ("vxlan-dualstack", "10.244.0.0/16", "fd00:10:244::/56", "10.244.101.0-24&fd00:10:244:51::-64", 1430, "FLANNEL_MTU=1450"),
    ];
    for (name, v4, v6, key, mtu, flannels_mtu) in cases {
        let network = PerFamily { v4: v4.parse().ok(), v6: v6.parse().ok() };
        let text = subnet_env(&network, &Subnet::from_key(key).unwrap(), mtu, true);
        let mut recorded = std::fs::read_to_string(fixtures.join(name).join("subnet.env")).unwrap();
        if !flannels_mtu.is_empty() {
            recorded = recorded.replace(flannels_mtu, &format!("FLANNEL_MTU={mtu}"));
        }
        assert_eq!(text, recorded, "{name}");
    }
    let six = subnet_env(
        &PerFamily { v4: None, v6: "fd00:10:244::/56".parse().ok() },
        &Subnet::from_key("fd00:10:244:51::-64").unwrap(),
        1430,
        false,
    );
    assert_eq!(
        six,
        "FLANNEL_IPV6_NETWORK=fd00:10:244::/56\nFLANNEL_IPV6_SUBNET=fd00:10:244:51::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=false\n"
    );
}

#[test]
fn subnet_env_is_world_readable_and_written_on_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/flannel/subnet.env");
    assert!(write_subnet_env(&path, "A=1\n").unwrap());
    assert!(!write_subnet_env(&path, "A=1\n").unwrap());
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert!(write_subnet_env(&path, "A=1\n").unwrap());
    assert!(write_subnet_env(&path, "A=2\n").unwrap());
}

/// Runs `test` on a thread with its own mount namespace, in which `directory` is a tmpfs with these options.
fn on_tmpfs(directory: &Path, options: &str, test: impl FnOnce() + Send) {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS)
                .expect("this test needs root (CAP_SYS_ADMIN): run it with sudo, or in `unshare -rm`");
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), Some(options)).unwrap();
            test();
            nix::mount::umount2(directory, nix::mount::MntFlags::MNT_DETACH).unwrap();
        });
        thread.join().expect("the test on the tmpfs");
    });
}

#[test]
fn full_disk_keeps_old_file_and_reports() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state.json");
    on_tmpfs(dir.path(), "size=64k", || {
        write_atomic(&file, b"old", 0o600).unwrap();
        let error = write_atomic(&file, &vec![b'x'; 1 << 20], 0o600).unwrap_err().to_string();
        assert!(
            error.contains(&dir.path().display().to_string()) && error.contains("file system is full: free space"),
            "{error}"
        );
        assert_eq!(std::fs::read(&file).unwrap(), b"old");
        // The space of the failed write is free again.
        write_atomic(&file, &vec![b'x'; 30 << 10], 0o600).unwrap();
    });
}

#[test]
fn read_only_filesystem_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    on_tmpfs(dir.path(), "ro", || {
        let error = StateDir::open(&dir.path().join("state")).unwrap_err().to_string();
        assert!(error.contains("read-only: remount it writable"), "{error}");
    });
}

#[test]
fn journal_replays_appends_and_drops_partial_line() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let path = dir.path().join("j");
    let read = || state.journal("j").read::<u32>();
    assert_eq!(read().unwrap(), Vec::<u32>::new());
    let mut journal = state.journal("j");
    journal.append([1_u32, 2].iter()).unwrap();
    journal.append([3_u32].iter()).unwrap();
    assert_eq!(read().unwrap(), [1, 2, 3]);
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    let content = std::fs::read(&path).unwrap();
    // A kill during an append: all complete lines count.
    for length in 0..content.len() {
        std::fs::write(&path, &content[..length]).unwrap();
        let lines = content[..length].iter().filter(|b| **b == b'\n').count();
        assert_eq!(read().unwrap(), [1, 2, 3][..lines.saturating_sub(1)], "{length} bytes");
    }
    assert!(quarantined_files(dir.path()).is_empty());
    // An unreadable line quarantines the file; the lines before it count.
    std::fs::write(&path, b"{\"version\":1}\n1\n\"x\"\n3\n").unwrap();
    assert_eq!(read().unwrap(), [1]);
    assert_eq!((quarantined_files(dir.path()).len(), path.exists()), (1, false));
    std::fs::write(&path, b"{\"version\":9}\n1\n").unwrap();
    assert!(matches!(read(), Err(StateError::Version { found: 9, .. })));
    assert!(path.exists(), "the journal of a newer agent is left alone");
}

#[test]
fn journal_has_room_until_long_or_removed() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let mut journal = state.journal("j");
    assert!(journal.has_room());
    journal.append([1_u32].iter()).unwrap();
    assert!(journal.has_room());
    assert!(!state.journal("j").has_room(), "a journal of another process may end in a partial line");
    std::fs::remove_file(dir.path().join("j")).unwrap();
    assert!(!journal.has_room());
    journal.clear().unwrap();
    let line = "x".repeat(1000);
    for n in 0..300 {
        assert_eq!(journal.has_room(), n * 1003 < 256 << 10, "{n}");
        journal.append([&line].iter()).unwrap();
    }
    journal.clear().unwrap();
    assert!(journal.has_room() && !dir.path().join("j").exists());
}
