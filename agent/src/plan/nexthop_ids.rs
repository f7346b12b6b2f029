//! Allocation of next-hop object ids, which all networks of a network namespace share.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use super::state::{Key, NEXTHOP_IDS, RouteTarget, State, Value};
use crate::model::{Device, Role};

/// Ids of the next-hop objects, by gateway.
///
/// Ids have no meaning of their own, so they are allocated, not planned. An existing object keeps its id; a new one gets the next
/// free id. Allocation cycles through the whole range, so that an id is not reused while a route may still refer to it.
#[derive(Debug)]
pub struct NexthopIds {
    ids: HashMap<(Device, IpAddr), u32>,
    used: HashSet<u32>,
    next: u32,
}

impl Default for NexthopIds {
    fn default() -> Self {
        NexthopIds { ids: HashMap::new(), used: HashSet::new(), next: NEXTHOP_IDS.start }
    }
}

impl NexthopIds {
    /// Replaces the gateways of routes over VXLAN devices by next-hop objects, whose entries it adds. Other devices are ends of
    /// veth pairs, without a carrier while the other end is down: the kernel then accepts a route with a gateway, but rejects a
    /// next-hop object, and deletes an existing one.
    pub fn resolve(&mut self, entries: Vec<(Key, Value)>) -> Vec<(Key, Value)> {
        let mut resolved = Vec::with_capacity(entries.len() + entries.len() / 4);
        for (key, value) in entries {
            if let Value::Route(RouteTarget::Gateway(device @ Device { role: Role::Vxlan(_), .. }, gateway)) = value {
                let id = self.id_for(device, gateway);
                resolved.push((Key::Nexthop(id), Value::Nexthop { device, gateway }));
                resolved.push((key, Value::Route(RouteTarget::Nexthop(id))));
            } else {
                resolved.push((key, value));
            }
        }
        resolved
    }

    /// Reserves capacity for `gateways` more gateways.
    pub fn reserve(&mut self, gateways: usize) {
        self.ids.reserve(gateways);
        self.used.reserve(gateways);
    }

    /// Adopts the ids of the objects in the kernel. If a gateway has two objects, the first is used; the second one's id stays
    /// reserved, because routes may still use it.
    pub fn adopt(&mut self, actual: &State) {
        for (key, value) in actual.range(Key::Nexthop(0)..=Key::Nexthop(u32::MAX)) {
            if let (Key::Nexthop(id), Value::Nexthop { device, gateway }) = (key, value)
                && NEXTHOP_IDS.contains(id)
                && self.used.insert(*id)
            {
                self.ids.entry((*device, *gateway)).or_insert(*id);
            }
        }
    }

    /// The id of a gateway's object; allocated if there is none.
    pub fn id_for(&mut self, device: Device, gateway: IpAddr) -> u32 {
        if let Some(id) = self.ids.get(&(device, gateway)) {
            return *id;
        }
        while self.used.contains(&self.next) {
            self.advance();
        }
        let id = self.next;
        self.advance();
        self.ids.insert((device, gateway), id);
        self.used.insert(id);
        id
    }

    /// Releases a gateway's id.
    pub fn release(&mut self, device: Device, gateway: IpAddr) {
        if let Some(id) = self.ids.remove(&(device, gateway)) {
            self.used.remove(&id);
        }
    }

    fn advance(&mut self) {
        self.next = if self.next + 1 < NEXTHOP_IDS.end { self.next + 1 } else { NEXTHOP_IDS.start };
    }
}

#[cfg(test)]
mod tests;
