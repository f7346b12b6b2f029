//! Segments: the devices that one frame can reach without being routed.

use std::collections::{BTreeMap, VecDeque};

use overlay_agent::kernel::trace::Link;
use overlay_agent::model::Role;

use super::WayHop;
use super::spaces::{Network, Spaces};

/// Kinds of links whose packets appear at the link to which `IFLA_LINK` refers.
const STACKED_KINDS: [&str; 8] = ["veth", "netkit", "vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "dsa"];

/// A device, by namespace and index, or a VNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Node {
    Device(usize, u32),
    Vni(u32),
}

/// All segments of this host.
pub(super) struct Segments {
    edges: BTreeMap<Node, Vec<(Node, WayHop)>>,
    /// The number of each node's segment.
    numbers: BTreeMap<Node, usize>,
    /// The segments of each network: its bridge's and its VNI's.
    networks: Vec<[Option<usize>; 2]>,
}

impl Segments {
    /// Finds the segments. A link that is down carries no frames.
    pub(super) fn find(spaces: &Spaces, fdb_vnis: &BTreeMap<(usize, u32), Vec<u32>>) -> Segments {
        let mut segments = Segments { edges: BTreeMap::new(), numbers: BTreeMap::new(), networks: Vec::new() };
        for (number, space) in spaces.all.iter().enumerate() {
            let place = &space.view.place;
            for link in &space.view.links {
                let node = Node::Device(number, link.index);
                segments.edges.entry(node).or_default();
                if !link.up {
                    continue;
                }
                let hop = |what: String| WayHop { namespace: place.clone(), device: Some(link.name.clone()), what };
                if let Some(bridge) = switch_of(&space.view.links, link) {
                    segments.join(
                        node,
                        Node::Device(number, bridge.index),
                        hop(format!("{} is a port of {}", link.name, bridge.name)),
                    );
                }
                if let Some((other, end)) = spaces.other_end(number, link).filter(|(_, end)| end.up && is_stacked(link)) {
                    let what = format!("{} ({}) leads to {} in {}", link.name, link.kind, end.name, spaces.all[other].view.place);
                    segments.join(node, Node::Device(other, end.index), hop(what));
                }
                let own = link.vxlan.iter().map(|vxlan| vxlan.vni);
                for vni in own.chain(fdb_vnis.get(&(number, link.index)).into_iter().flatten().copied()) {
                    segments.join(node, Node::Vni(vni), hop(format!("{} sends and receives VNI {vni}", link.name)));
                }
            }
        }
        segments.number();
        let device = |network: &Network| {
            let links = &spaces.all[network.space].view.links;
            links.iter().find(|link| link.device().is_some_and(|device| device.role == Role::Bridge && device.vni == network.vni))
        };
        segments.networks = spaces
            .networks
            .iter()
            .map(|network| {
                let bridge = device(network).map(|link| Node::Device(network.space, link.index));
                [bridge.and_then(|node| segments.of(node)), segments.of(Node::Vni(network.vni.get()))]
            })
            .collect();
        segments
    }

    fn join(&mut self, a: Node, b: Node, hop: WayHop) {
        self.edges.entry(a).or_default().push((b, hop.clone()));
        self.edges.entry(b).or_default().push((a, hop));
    }

    fn number(&mut self) {
        for node in self.edges.keys() {
            if self.numbers.contains_key(node) {
                continue;
            }
            let number = self.numbers.len();
            let mut queue = VecDeque::from([*node]);
            while let Some(next) = queue.pop_front() {
                if self.numbers.insert(next, number).is_none() {
                    queue.extend(self.edges[&next].iter().map(|(other, _)| *other));
                }
            }
        }
    }

    /// The segment of a node.
    pub(super) fn of(&self, node: Node) -> Option<usize> {
        self.numbers.get(&node).copied()
    }

    /// The networks that have this segment.
    pub(super) fn networks_of(&self, segment: usize) -> impl Iterator<Item = usize> {
        (0..self.networks.len()).filter(move |network| self.networks[*network].contains(&Some(segment)))
    }

    /// The devices of a segment that hand its packets to their namespace's routing.
    pub(super) fn routed_devices<'s>(&self, spaces: &'s Spaces, segment: usize) -> Vec<(usize, &'s Link)> {
        let mut found = Vec::new();
        for (node, number) in &self.numbers {
            let Node::Device(space, index) = node else { continue };
            let links = &spaces.all[*space].view.links;
            let link = links.iter().find(|link| link.index == *index);
            found.extend(
                link.filter(|link| *number == segment && link.up && switch_of(links, link).is_none()).map(|link| (*space, link)),
            );
        }
        found
    }

    /// The segments in which a network's containers, on this host and on others, send.
    pub(super) fn of_network(&self, network: usize) -> impl Iterator<Item = usize> {
        let [bridge, vni] = self.networks[network];
        bridge.into_iter().chain(vni.filter(|vni| bridge != Some(*vni)))
    }

    /// The links from a network's bridge, or its VNI, to a node; `None` if it is in no segment of the network.
    pub(super) fn path(&self, spaces: &Spaces, network: usize, to: Node) -> Option<Vec<WayHop>> {
        let Network { space, vni, .. } = &spaces.networks[network];
        let bridges = spaces.all[*space].view.links.iter();
        let bridges =
            bridges.filter(|link| link.device().is_some_and(|device| device.role == Role::Bridge && device.vni == *vni));
        let starts = bridges.map(|link| Node::Device(*space, link.index)).chain([Node::Vni(vni.get())]);
        let mut reached: BTreeMap<Node, Vec<WayHop>> = BTreeMap::new();
        let mut queue: VecDeque<(Node, Vec<WayHop>)> = starts.map(|node| (node, Vec::new())).collect();
        while let Some((node, hops)) = queue.pop_front() {
            if reached.contains_key(&node) {
                continue;
            }
            if node == to {
                return Some(hops);
            }
            for (next, hop) in self.edges.get(&node).into_iter().flatten() {
                queue.push_back((*next, hops.iter().chain([hop]).cloned().collect()));
            }
            reached.insert(node, hops);
        }
        None
    }

    /// The links from one network to another, if a frame passes without being routed.
    pub(super) fn joined(&self, spaces: &Spaces, from: usize, to: usize) -> Option<Vec<WayHop>> {
        let shared = self.of_network(from).find(|segment| self.networks[to].contains(&Some(*segment)))?;
        let Network { space, vni, .. } = &spaces.networks[to];
        let bridge =
            spaces.all[*space].view.links.iter().find(|link| link.name == overlay_agent::model::Device::bridge(*vni).name());
        let ends = bridge.map(|link| Node::Device(*space, link.index)).into_iter().chain([Node::Vni(vni.get())]);
        ends.filter(|end| self.of(*end) == Some(shared)).find_map(|end| self.path(spaces, from, end))
    }
}

/// Whether packets of this device appear at the one that it refers to.
fn is_stacked(link: &Link) -> bool {
    STACKED_KINDS.contains(&link.kind.as_str())
}

/// The bridge, bond or switch that a link is a port of. A VRF's links route packets themselves.
pub(super) fn switch_of<'l>(links: &'l [Link], link: &Link) -> Option<&'l Link> {
    links.iter().find(|master| Some(master.index) == link.master && master.kind != "vrf")
}
