//! Segments: the devices that one frame can reach without being routed.

use std::collections::{BTreeMap, VecDeque};

use overlay_agent::kernel::trace::Link;
use overlay_agent::model::Device;

use super::report::WayHop;
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
    /// By segment, the devices that hand its packets to their namespace's routing.
    routed: BTreeMap<usize, Vec<(usize, u32)>>,
    /// The segments of each network: its bridge's and its VNI's.
    networks: Vec<[Option<usize>; 2]>,
}

impl Segments {
    /// Finds the segments. A link that is down carries no frames.
    pub(super) fn find(spaces: &Spaces, fdb_vnis: &BTreeMap<(usize, u32), Vec<u32>>) -> Segments {
        let mut segments =
            Segments { edges: BTreeMap::new(), numbers: BTreeMap::new(), routed: BTreeMap::new(), networks: Vec::new() };
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
        for (number, space) in spaces.all.iter().enumerate() {
            let links = &space.view.links;
            for link in links.iter().filter(|link| link.up && switch_of(links, link).is_none()) {
                let segment = segments.numbers.get(&Node::Device(number, link.index)).copied();
                segments.routed.entry(segment.unwrap_or_default()).or_default().push((number, link.index));
            }
        }
        let ends = spaces.networks.iter().map(|network| ends_of(spaces, network).map(|node| segments.of(node?)));
        segments.networks = ends.collect();
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

    /// The devices of a segment that hand its packets to their namespace's routing, by namespace and index.
    pub(super) fn routed_devices(&self, segment: usize) -> impl Iterator<Item = (usize, u32)> {
        self.routed.get(&segment).into_iter().flatten().copied()
    }

    /// The segments in which a network's containers, on this host and on others, send.
    pub(super) fn of_network(&self, network: usize) -> impl Iterator<Item = usize> {
        let [bridge, vni] = self.networks[network];
        bridge.into_iter().chain(vni.filter(|vni| bridge != Some(*vni)))
    }

    /// The links from a network's bridge, or its VNI, to a node; `None` if it is in no segment of the network.
    pub(super) fn path(&self, spaces: &Spaces, network: usize, to: Node) -> Option<Vec<WayHop>> {
        let starts = ends_of(spaces, &spaces.networks[network]).into_iter().flatten();
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
        let mut ends = ends_of(spaces, &spaces.networks[to]).into_iter().flatten();
        ends.find_map(|end| self.path(spaces, from, end).filter(|_| self.of(end) == Some(shared)))
    }
}

/// A network's bridge and its VNI.
fn ends_of(spaces: &Spaces, network: &Network) -> [Option<Node>; 2] {
    let links = &spaces.all[network.space].view.links;
    let bridge = links.iter().find(|link| link.name == Device::bridge(network.vni).name());
    [bridge.map(|link| Node::Device(network.space, link.index)), Some(Node::Vni(network.vni.get()))]
}

/// Whether packets of this device appear at the one that it refers to.
fn is_stacked(link: &Link) -> bool {
    STACKED_KINDS.contains(&link.kind.as_str())
}

/// The bridge, bond or switch that a link is a port of. A VRF's links route packets themselves.
pub(super) fn switch_of<'l>(links: &'l [Link], link: &Link) -> Option<&'l Link> {
    links.iter().find(|master| Some(master.index) == link.master && master.kind != "vrf")
}
