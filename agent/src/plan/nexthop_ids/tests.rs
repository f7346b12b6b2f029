use super::*;
use crate::model::{Family, Vni};

fn ovx() -> Device {
    Device::vxlan(Family::V4, Vni::DEFAULT)
}

fn gateway(i: u8) -> IpAddr {
    std::net::Ipv4Addr::new(10, 244, i, 0).into()
}

fn nexthop_state(objects: &[(u32, u8)]) -> State {
    objects.iter().map(|(id, i)| (Key::Nexthop(*id), Value::Nexthop { device: ovx(), gateway: gateway(*i) })).collect()
}

#[test]
fn nexthop_ids_are_unique_and_stable() {
    let mut ids = NexthopIds::default();
    let all: HashSet<u32> = (0..200).map(|i| ids.id_for(ovx(), gateway(i))).collect();
    assert_eq!(all.len(), 200);
    assert!(all.iter().all(|id| NEXTHOP_IDS.contains(id)));
    assert_eq!(ids.id_for(ovx(), gateway(7)), ids.id_for(ovx(), gateway(7)));
    assert_ne!(
        ids.id_for(Device::vxlan(Family::V6, Vni::DEFAULT), gateway(7)),
        ids.id_for(ovx(), gateway(7)),
        "of another device"
    );
}

#[test]
fn existing_nexthop_ids_are_adopted() {
    let start = NEXTHOP_IDS.start;
    let mut ids = NexthopIds::default();
    ids.adopt(&nexthop_state(&[(start, 1), (start + 1, 2), (start + 2, 1), (5, 3)]));
    assert_eq!(ids.id_for(ovx(), gateway(1)), start, "the first of two is used");
    assert_eq!(ids.id_for(ovx(), gateway(2)), start + 1);
    assert_eq!(ids.id_for(ovx(), gateway(4)), start + 3, "the second one's id stays reserved: routes may still use it");
    assert_eq!(ids.id_for(ovx(), gateway(3)), start + 4, "an id outside our range is not ours");
}

/// Over a veth pair the kernel rejects a next-hop object while the other end is down.
#[test]
fn only_routes_over_vxlan_devices_get_nexthop_objects() {
    let route = |device, i| {
        let subnet = crate::model::Cidr::containing(gateway(i), 24).expect("a subnet");
        (Key::Route(subnet), Value::Route(RouteTarget::Gateway(device, gateway(i))))
    };
    let others = [Device::transit(Vni::DEFAULT), Device::peer_link(Vni::DEFAULT)].map(|device| route(device, 1)).to_vec();
    let mut ids = NexthopIds::default();
    assert_eq!(ids.resolve(others.clone()), others);
    let resolved = ids.resolve(vec![route(ovx(), 2)]);
    assert!(
        matches!(resolved[..], [(Key::Nexthop(_), _), (Key::Route(_), Value::Route(RouteTarget::Nexthop(_)))]),
        "{resolved:?}"
    );
}

#[test]
fn nexthop_ids_are_not_reused_immediately() {
    let mut ids = NexthopIds::default();
    let first = ids.id_for(ovx(), gateway(1));
    ids.release(ovx(), gateway(1));
    assert_ne!(ids.id_for(ovx(), gateway(2)), first);
    assert_ne!(ids.id_for(ovx(), gateway(1)), first);

    let mut ids = NexthopIds { next: NEXTHOP_IDS.end - 1, ..NexthopIds::default() };
    assert_eq!(ids.id_for(ovx(), gateway(1)), NEXTHOP_IDS.end - 1);
    assert_eq!(ids.id_for(ovx(), gateway(2)), NEXTHOP_IDS.start, "ids wrap around");
}
