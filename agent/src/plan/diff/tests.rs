//! Property tests of the comparison: any actual and any desired state, on a simulated kernel.

mod cases;
mod simulation;

use std::collections::BTreeSet;
use std::net::IpAddr;

use proptest::prelude::*;

use self::simulation::{Setup, SimulatedKernel, any_setup, any_state, normalise, similar_setups};
use super::*;
use crate::model::{Cidr, Mac};
use crate::plan::State;
use crate::plan::nexthop_ids::NexthopIds;

/// Keys of devices and ports whose names foreign links have.
fn foreign_links(state: &State) -> BTreeSet<Key> {
    state
        .iter()
        .filter(|(_, value)| matches!(value, Value::Link(link) if matches!(link.kind, LinkKind::Foreign { .. })))
        .map(|(key, _)| key.clone())
        .collect()
}

fn on_foreign_link(device: Option<Device>, foreign: &BTreeSet<Key>) -> bool {
    device.is_some_and(|device| foreign.contains(&Key::Link(device.name().into())))
}

/// Whether the agent cannot reach the desired value: a foreign link has the name, or an endpoint's port is missing.
fn cannot_converge(key: &Key, desired: &State, actual: &State, foreign: &BTreeSet<Key>) -> bool {
    let wanted = &desired[key];
    let lost_port = matches!(wanted, Value::Link(link) if link.kind == LinkKind::Port) && !actual.contains_key(key);
    lost_port || foreign.contains(key) || on_foreign_link(required_device(key, wanted, desired), foreign)
}

/// The inner MAC and the outer address of a packet to a subnet; `None` if the data path drops it.
fn resolve(state: &State, subnet: Cidr) -> Option<(Mac, IpAddr)> {
    let Some(Value::Route(via)) = state.get(&Key::Route(subnet)) else { return None };
    let (device, gateway) = match via {
        RouteTarget::Nexthop(id) => match state.get(&Key::Nexthop(*id)) {
            Some(Value::Nexthop { device, gateway }) => (*device, *gateway),
            _ => return None,
        },
        RouteTarget::Gateway(device, gateway) => (*device, *gateway),
        RouteTarget::Via(_) | RouteTarget::Local(_) | RouteTarget::Foreign => return None,
    };
    let up = matches!(state.get(&Key::Link(device.name().into())), Some(Value::Link(link)) if link.up);
    let Some(Value::Neigh(mac)) = state.get(&Key::Neigh(device, gateway)) else { return None };
    let Some(Value::Fdb(public_ip)) = state.get(&Key::Fdb(device, *mac)) else { return None };
    (up && gateway == subnet.base()).then_some((*mac, *public_ip))
}

/// Whether the entries on the device of a subnet's desired route survive the batch.
fn device_survives(subnet: Cidr, desired: &State, actual: &State) -> bool {
    let key = Key::Route(subnet);
    let device = desired.get(&key).and_then(|value| device_of(&key, value, desired));
    device.is_some_and(|device| DeviceChanges::new(desired, actual).get(device) == DeviceChange::Unchanged)
}

/// Checks after each op of a batch that packets take the old path or the new one, for every subnet that works before and is
/// desired after. Returns the number of checked subnets.
fn watch_traffic(desired: &State, actual: &State, new_macs_only: bool) -> usize {
    let macs_before: BTreeSet<Mac> =
        actual.keys().filter_map(|key| if let Key::Fdb(_, mac) = key { Some(*mac) } else { None }).collect();
    let watched: Vec<_> = desired
        .keys()
        .filter_map(|key| if let Key::Route(subnet) = key { Some(*subnet) } else { None })
        .filter(|subnet| device_survives(*subnet, desired, actual))
        .filter_map(|subnet| Some((subnet, resolve(actual, subnet)?, resolve(desired, subnet)?)))
        .filter(|(_, old, new)| old == new || (new_macs_only && (old.0 == new.0 || !macs_before.contains(&new.0))))
        .collect();
    let mut kernel = SimulatedKernel::new(actual.clone());
    for op in diff(desired, actual) {
        kernel.apply(&op);
        for (subnet, old, new) in &watched {
            let now = resolve(&kernel.state, *subnet);
            assert!(now == Some(*old) || now == Some(*new), "{subnet}: {now:?} is neither {old:?} nor {new:?} after `{op}`");
        }
    }
    for (subnet, _, new) in &watched {
        assert_eq!(resolve(&kernel.state, *subnet), Some(*new), "{subnet} at the end");
    }
    watched.len()
}

/// Sorts the ops within each stage, where their order is arbitrary.
fn sort_within_stages(mut batch: Batch) -> Batch {
    let step = |op: &Op| (matches!(op, Op::Set(..)), stage(op.key()));
    for ops in batch.chunk_by_mut(|a, b| step(a) == step(b)) {
        ops.sort_by(|a, b| a.key().cmp(b.key()));
    }
    batch
}

/// Desired state on a host whose kernel holds `actual`.
fn desired_for(setup: &Setup, actual: &State) -> State {
    let mut ids = NexthopIds::default();
    ids.adopt(actual);
    setup.desired(&mut ids)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// From any actual state, one batch leads to the desired state, a second batch is empty, and foreign entries stay.
    #[test]
    fn any_actual_state_converges(setup in any_setup(), actual in any_state()) {
        let desired = desired_for(&setup, &actual);
        let mut kernel = SimulatedKernel::new(actual.clone());
        for op in diff(&desired, &actual) {
            kernel.apply(&op);
        }
        let after = &kernel.state;
        let foreign = foreign_links(&actual);
        for (key, wanted) in &desired {
            let reached = after.get(key).is_some_and(|found| is_satisfied(wanted, found));
            prop_assert!(reached || cannot_converge(key, &desired, &actual, &foreign), "{key}: {:?} is not {wanted:?}", after.get(key));
        }
        for (key, found) in after.iter().filter(|(key, _)| !desired.contains_key(key)) {
            prop_assert!(!is_managed(key, found, &desired, after) || on_foreign_link(key.device(), &foreign), "{key} {found} is left over");
        }
        for (key, found) in &actual {
            let not_ours = !is_managed(key, found, &desired, &actual) && !matches!(found, Value::Sysctl(_));
            if not_ours && !desired.contains_key(key) || foreign.contains(key) || on_foreign_link(key.device(), &foreign) {
                match (found, after.get(key)) {
                    // A port may lose its bridge, but is never deleted.
                    (Value::Link(old), Some(Value::Link(new))) => prop_assert_eq!(&old.kind, &new.kind),
                    (_, now) => prop_assert_eq!(now, Some(found), "{}", key),
                }
            }
        }
        for op in diff(&desired, after) {
            let refused = !SimulatedKernel::new(after.clone()).apply(&op);
            prop_assert!(refused && matches!(op, Op::Set(Key::Link(_), _)), "the second batch has `{op}`");
        }
    }

    /// Subnets that work before and after a batch work after each of its ops, whatever other entries the kernel has.
    #[test]
    fn traffic_is_never_interrupted(setup in any_setup(), actual in any_state()) {
        watch_traffic(&desired_for(&setup, &actual), &actual, false);
    }

    /// The same for a change from one state of the agent to another: packets to peers with a new address or MAC take the old path
    /// or the new one.
    #[test]
    fn changing_peers_stay_reachable((before, after) in similar_setups()) {
        let mut ids = NexthopIds::default();
        let actual = before.desired(&mut ids);
        let desired = after.desired(&mut ids);
        let watched = watch_traffic(&desired, &actual, true);
        if before.device_settings() == after.device_settings() {
            prop_assert!(watched >= before.surviving_peer_count(&after), "{watched} of {}", before.surviving_peer_count(&after));
        }
    }

    /// A comparison of some keys has the same result as a full one for these keys, and for all entries on a changing device among
    /// them.
    #[test]
    fn partial_diff_equals_part_of_full_diff(setup in any_setup(), actual in any_state(), picks in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
        let desired = desired_for(&setup, &actual);
        let all: Vec<&Key> = desired.keys().chain(actual.keys()).collect();
        let some: BTreeSet<&Key> = picks.iter().filter(|_| !all.is_empty()).map(|pick| all[pick.index(all.len())]).collect();
        let mut changes = DeviceChanges::new(&desired, &actual);
        let changing: BTreeSet<Device> = some
            .iter()
            .filter_map(|key| link_device(key))
            .filter(|device| !matches!(changes.get(*device), DeviceChange::Unchanged | DeviceChange::Conflict))
            .collect();
        let included = |key: &Key| {
            some.contains(key)
                || [&desired, &actual].into_iter().any(|state| {
                    state.get(key).and_then(|value| required_device(key, value, state)).is_some_and(|device| changing.contains(&device))
                })
        };
        let wanted: Batch = diff(&desired, &actual).into_iter().filter(|op| included(op.key())).collect();
        prop_assert_eq!(sort_within_stages(diff_keys(&desired, &actual, some.iter().copied())), sort_within_stages(wanted));
    }

    /// The generated kernel states are possible ones.
    #[test]
    fn generated_states_are_valid(actual in any_state()) {
        prop_assert_eq!(normalise(actual.clone()), actual);
    }
}
