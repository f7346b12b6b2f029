//! Golden cases: `tests/fixtures/diff/<case>/` has desired and actual state as JSON, and the ops as text, one per line.
//!
//! `OVERLAY_REGENERATE=1 cargo test -p overlay-agent plan::diff` regenerates them; review the changes before a commit.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use super::super::{diff, is_satisfied};
use super::simulation::{Setup, SimulatedKernel, normalise, subnet};
use crate::model::{Family, Mac};
use crate::plan::Op;
use crate::plan::nexthop_ids::NexthopIds;
use crate::plan::state::{Key, LinkKind, RouteTarget, State, Value};

struct Case {
    name: &'static str,
    actual: State,
    desired: State,
}

const V4: u8 = 0;
const V6: u8 = 1;
const DUAL: u8 = 2;

/// A host with masquerade, next-hop objects, and three peers of its families.
fn host(families: u8) -> Setup {
    let peer = Some((0, 0, families));
    Setup {
        families,
        vni: 1,
        port: 8472,
        underlay_mtu: 1500,
        own_subnet: 1,
        own_address: 1,
        own_mac: 1,
        flags: [true, true, false, true],
        ports: Vec::new(),
        peers: [peer, peer, peer, None, None],
        isolated: false,
    }
}

/// A case: actual state is that of `before`, changed by `mutate_actual`; desired state is that of the setup after `mutate_setup`.
fn case(name: &'static str, before: Setup, mutate_actual: impl Fn(&mut State), mutate_setup: impl Fn(&mut Setup)) -> Case {
    let mut actual = normalise(before.desired(&mut NexthopIds::default()));
    mutate_actual(&mut actual);
    let mut after = before;
    mutate_setup(&mut after);
    let mut ids = NexthopIds::default();
    ids.adopt(&actual);
    Case { name, actual, desired: after.desired(&mut ids) }
}

fn empty(name: &'static str, families: u8) -> Case {
    case(name, host(families), State::clear, |_| {})
}

fn no_change(_: &mut State) {}

/// Ports that the endpoints have just created: not on a bridge yet.
fn ports_without_bridge(state: &mut State, host: &Setup) {
    for (key, value) in host.desired(&mut NexthopIds::default()) {
        if let Value::Link(mut link) = value
            && link.kind == LinkKind::Port
        {
            link.master = None;
            link.mac = Some(Mac([2, 3, 0, 0, 0, 1]));
            state.insert(key, Value::Link(link));
        }
    }
}

fn cases() -> Vec<Case> {
    let link = |name: &str| Key::Link(name.into());
    let with_ports = || Setup { ports: vec![1, 2], ..host(V4) };
    let isolated = || Setup { isolated: true, vni: 2, ..host(DUAL) };
    let foreign = |state: &mut State| {
        for (key, value) in state.iter_mut() {
            if let Value::Link(found) = value
                && *key == link("ovx.1")
            {
                found.kind = LinkKind::Foreign { kind: "vxlan".to_owned() };
            }
        }
        state.retain(|key, value| match value {
            Value::Fdb(_) | Value::Neigh(_) | Value::Nexthop { .. } | Value::Route(_) => false,
            _ => key.device().is_none_or(|device| device.name() != "ovx.1"),
        });
    };
    vec![
        empty("empty-to-three-peers-v4", V4),
        empty("empty-to-three-peers-v6", V6),
        empty("empty-to-three-peers-dual", DUAL),
        case("nothing-to-do", host(DUAL), no_change, |_| {}),
        case("peer-changes-address", host(DUAL), no_change, |host| host.peers[1] = Some((1, 0, DUAL))),
        case("peer-changes-mac", host(DUAL), no_change, |host| host.peers[1] = Some((0, 1, DUAL))),
        case("peer-leaves", host(DUAL), no_change, |host| host.peers[1] = None),
        case("peer-leaves-another-joins", host(V4), no_change, |host| {
            host.peers[1] = None;
            host.peers[4] = Some((0, 0, V4));
        }),
        case("own-subnet-moves", host(DUAL), no_change, |host| host.own_subnet = 2),
        case("own-mac-changes", host(V4), no_change, |host| host.own_mac = 2),
        case("vni-changes", with_ports(), no_change, |host| host.vni = 2),
        case("port-changes", host(DUAL), no_change, |host| host.port = 4789),
        case("underlay-address-changes", host(DUAL), no_change, |host| host.own_address = 2),
        case("underlay-mtu-changes", with_ports(), no_change, |host| host.underlay_mtu = 1400),
        case("foreign-link-in-the-way", host(V4), foreign, |_| {}),
        case(
            "foreign-route-at-a-peers-subnet",
            host(V4),
            |state| {
                state.insert(Key::Route(subnet(Family::V4, 10)), Value::Route(RouteTarget::Foreign));
                state.insert(Key::Route(subnet(Family::V4, 99)), Value::Route(RouteTarget::Foreign));
            },
            |_| {},
        ),
        case("to-classic-routes", host(DUAL), no_change, |host| host.flags[3] = false),
        case("from-classic-routes", Setup { flags: [true, true, false, false], ..host(DUAL) }, no_change, |host| {
            host.flags[3] = true
        }),
        case("masquerade-off", host(DUAL), no_change, |host| host.flags[0] = false),
        case("forward-chain-drops", host(DUAL), no_change, |host| host.flags[2] = true),
        case(
            "ports-join-the-bridge",
            host(V4),
            |state| ports_without_bridge(state, &with_ports()),
            |host| host.ports = vec![1, 2],
        ),
        case("ports-lost-their-bridge", with_ports(), |state| ports_without_bridge(state, &with_ports()), |_| {}),
        case("bridge-is-gone", with_ports(), |state| Op::Delete(link("ovb.1"), Value::Address).apply_to(state), |_| {}),
        case("empty-to-isolated", isolated(), State::clear, |_| {}),
        case("isolated-nothing-to-do", isolated(), no_change, |_| {}),
        case("transit-is-gone", isolated(), |state| Op::Delete(link("ovt.2"), Value::Address).apply_to(state), |_| {}),
        case(
            "drift",
            host(V4),
            |state| {
                let lost = [Key::Route(subnet(Family::V4, 11)), Key::Neigh(ovx(), subnet(Family::V4, 12).base())];
                state.retain(|key, _| !lost.contains(key));
                state.insert(Key::Sysctl("ipv4/ip_forward".into()), Value::Sysctl("0".into()));
                state.insert(Key::Fdb(ovx(), Mac([2, 9, 9, 9, 9, 9])), Value::Fdb(super::simulation::public_ip(Family::V4, 99)));
            },
            |_| {},
        ),
    ]
}

fn ovx() -> crate::model::Device {
    crate::model::Device::vxlan(Family::V4, crate::model::Vni::DEFAULT)
}

fn fixture_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/diff")
}

/// A state as JSON, one entry per line.
fn to_json(state: &State) -> String {
    let lines: Vec<String> = state.iter().map(|entry| serde_json::to_string(&entry).expect("an entry is JSON")).collect();
    format!("[\n{}\n]\n", lines.join(",\n"))
}

fn to_text(batch: &[Op]) -> String {
    let mut text = String::new();
    for op in batch {
        writeln!(text, "{op}").expect("a String takes text");
    }
    text
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}; OVERLAY_REGENERATE=1 writes the cases", path.display()))
}

#[test]
fn cases_match_fixtures() {
    let regenerate = std::env::var_os("OVERLAY_REGENERATE").is_some_and(|value| value == "1");
    for case in cases() {
        let (name, folder) = (case.name, fixture_dir().join(case.name));
        if regenerate {
            fs::create_dir_all(&folder).expect(name);
            fs::write(folder.join("desired.json"), to_json(&case.desired)).expect(name);
            fs::write(folder.join("actual.json"), to_json(&case.actual)).expect(name);
            fs::write(folder.join("ops.txt"), to_text(&diff(&case.desired, &case.actual))).expect(name);
        }
        let state = |file: &str| -> State {
            let entries: Vec<(Key, Value)> = serde_json::from_str(&read(&folder.join(file))).expect(name);
            entries.into_iter().collect()
        };
        let (desired, actual) = (state("desired.json"), state("actual.json"));
        assert_eq!(to_json(&desired), to_json(&case.desired), "{name}: desired state has changed");
        assert_eq!(to_json(&actual), to_json(&case.actual), "{name}: actual state has changed");
        let batch = diff(&desired, &actual);
        assert_eq!(to_text(&batch), read(&folder.join("ops.txt")), "{name}");

        let mut kernel = SimulatedKernel::new(actual);
        let applied = batch.iter().filter(|op| kernel.apply(op)).count();
        if applied == batch.len() {
            assert_eq!(normalise(kernel.state.clone()), kernel.state, "{name}: as the kernel reports it");
            for (key, wanted) in &desired {
                assert!(kernel.state.get(key).is_some_and(|found| is_satisfied(wanted, found)), "{name}: {key}");
            }
        } else {
            assert_eq!(name, "foreign-link-in-the-way");
        }
    }

    let written: BTreeSet<String> = fs::read_dir(fixture_dir())
        .expect("the fixtures")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    let known: BTreeSet<String> = cases().iter().map(|case| case.name.to_owned()).collect();
    assert_eq!(written, known, "each folder has its case");
}

/// Entries that the kernel deletes with a device or a table get no ops of their own.
#[test]
fn empty_desired_removes_everything() {
    let actual = host(DUAL).desired(&mut NexthopIds::default());
    assert!(actual.keys().any(|key| matches!(key, Key::Element(_))));
    let batch = diff(&State::new(), &actual);
    let is_independent = |op: &Op| !matches!(op.key(), Key::Element(_) | Key::Fdb(..) | Key::Neigh(..) | Key::Address(..));
    assert!(batch.iter().all(is_independent), "{}", to_text(&batch));
    let mut remaining = actual;
    batch.iter().for_each(|op| op.apply_to(&mut remaining));
    assert!(remaining.keys().all(|key| matches!(key, Key::Sysctl(_))), "{}", to_json(&remaining));
}
