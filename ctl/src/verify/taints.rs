//! What moves packets in ways that routes and rules do not show.

use std::collections::{BTreeMap, BTreeSet};

use overlay_agent::model::Family;

use super::packets::leads_to;
use super::segments::Segments;
use super::spaces::{Space, Spaces};
use crate::trace::TraceError;

/// Reads the VNIs to which VXLAN devices send by their FDB entries.
pub(super) fn fdb_vnis(spaces: &mut Spaces) -> Result<BTreeMap<(usize, u32), Vec<u32>>, TraceError> {
    let mut found = BTreeMap::new();
    for (number, space) in spaces.all.iter_mut().enumerate() {
        let devices: Vec<u32> = space.view.links.iter().filter(|link| link.vxlan.is_some()).map(|link| link.index).collect();
        for index in devices {
            found.insert((number, index), space.view.kernel.fdb_vnis(index)?);
        }
    }
    Ok(found)
}

/// What a namespace may do with packets that the evaluation does not cover.
pub(super) fn of_space(space: &mut Space) -> Result<Vec<String>, TraceError> {
    let place = space.view.place.clone();
    let mut found = Vec::new();
    for index in space.view.kernel.ingress_qdiscs()? {
        found.push(format!("{place}: traffic control at {} may redirect packets (tc filter show)", space.view.name(Some(index))));
    }
    for link in space.view.links.iter().filter(|link| link.xdp) {
        found.push(format!("{place}: an XDP program handles the packets of {} (ip link show)", link.name));
    }
    // An external VXLAN device chooses the VNI for each packet.
    for link in space.view.links.iter().filter(|link| link.vxlan.as_ref().is_some_and(|vxlan| vxlan.vni == 0)) {
        found.push(format!("{place}: {} sends with any VNI (ip -d link show)", link.name));
    }
    found.extend(space.view.ruleset.redirections().into_iter().map(|rule| format!("{place}: {rule} may redirect packets")));
    for (family, program) in [(Family::V4, "iptables-legacy"), (Family::V6, "ip6tables-legacy")] {
        if space.view.legacy_tables(family).iter().any(|table| table == "nat") {
            found.push(format!("{place}: rules of {program} may translate addresses ({program} -t nat -S)"));
        }
    }
    found.append(&mut space.unseen.clone());
    Ok(found)
}

/// Routes of a namespace to a network whose use cannot be predicted.
pub(super) fn unpredictable_routes(spaces: &Spaces, segments: &Segments, from: usize, to: usize) -> Vec<String> {
    let Space { view, rules, .. } = &spaces.all[from];
    let conditional: BTreeSet<(Family, u32)> =
        rules.iter().filter(|rule| rule.conditional).filter_map(|rule| Some((rule.family, rule.table?))).collect();
    let mut found = Vec::new();
    for route in spaces.all[from].forwarding_routes() {
        if !route.interfaces.iter().any(|interface| leads_to(spaces, segments, from, *interface, to)) {
            continue;
        }
        let (place, destination, table) = (&view.place, route.destination, route.table);
        if route.unpredictable {
            found.push(format!("{place}: the route {destination} of table {table} has several paths"));
        } else if conditional.contains(&(destination.family(), table)) {
            found.push(format!(
                "{place}: a policy rule with conditions leads to the route {destination} of table {table} (ip rule show)"
            ));
        }
    }
    found
}
