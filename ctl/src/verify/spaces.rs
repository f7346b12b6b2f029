//! The namespaces between which packets of this host's isolated networks can move, as the kernel describes them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use overlay_agent::kernel::netns::{NETNS_RUN_DIR, Netns};
use overlay_agent::kernel::trace::{Link, PolicyRule, RouteEntry};
use overlay_agent::model::transfer_range;
use overlay_agent::model::{Cidr, Device, Family, Role, Vni};

use crate::trace::TraceError;
use crate::trace::namespace_view::NamespaceView;

/// The host's namespace in [`Spaces::all`]; those of the networks follow in their order, then the containers'.
pub(super) const HOST: usize = 0;

/// A namespace.
pub(super) struct Space {
    /// Its links, addresses and rules.
    pub(super) view: NamespaceView,
    /// Its routes of all tables.
    pub(super) routes: Vec<RouteEntry>,
    /// Its policy rules.
    pub(super) rules: Vec<PolicyRule>,
    /// The namespaces by the kernel's number for them in this one.
    others: BTreeMap<u32, usize>,
    /// Links whose other end is in a namespace that has neither a process nor a visible file.
    pub(super) unseen: Vec<String>,
}

/// An isolated network of this host.
#[derive(Debug)]
pub(super) struct Network {
    /// Its name.
    pub(super) name: String,
    /// Its VNI.
    pub(super) vni: Vni,
    /// Its namespace.
    pub(super) space: usize,
    /// Addresses of its bridge.
    pub(super) gateways: Vec<IpAddr>,
    /// The ranges of its containers on this host.
    pub(super) local: Vec<Cidr>,
    /// A range of containers on other hosts, per family.
    pub(super) remote: Vec<Cidr>,
    /// Its end of the transit.
    pub(super) transfer: Vec<IpAddr>,
}

/// All namespaces and networks.
pub(super) struct Spaces {
    /// The namespaces.
    pub(super) all: Vec<Space>,
    /// The networks.
    pub(super) networks: Vec<Network>,
}

impl Spaces {
    /// Reads the calling thread's namespace as the host's, and all that belongs to its isolated networks.
    pub(super) fn read() -> Result<Spaces, TraceError> {
        let host = NamespaceView::host()?;
        let found = NamespaceView::of_networks(&host.netns)?;
        let mut all = vec![Space::read(host)?];
        for network in &found {
            all.push(Space::read(NamespaceView::open(network.place.clone(), network.netns.clone())?)?);
        }
        let mut spaces = Spaces { all, networks: Vec::new() };
        spaces.find_containers()?;
        for (number, network) in found.into_iter().enumerate() {
            let network = Network::read(network.network, network.vni, HOST + 1 + number, &mut spaces.all)?;
            spaces.networks.push(network);
        }
        Ok(spaces)
    }

    /// Reads the namespaces to which the networks' links lead, and numbers all of them.
    fn find_containers(&mut self) -> Result<(), TraceError> {
        let known = self.all.len();
        let mut candidates = namespace_files().into_iter();
        let mut opened: Vec<(PathBuf, Netns)> = Vec::new();
        for from in HOST + 1..known {
            for to in 0..self.all.len() {
                self.number(from, to)?;
            }
            let mut next = 0;
            while !self.all[from].unresolved().is_empty() {
                if next == opened.len() {
                    let Some(path) = candidates.next() else { break };
                    // Processes end meanwhile.
                    let Ok(netns) = Netns::open(&path) else { continue };
                    opened.push((path, netns));
                }
                let (path, netns) = &opened[next];
                next += 1;
                let wanted = self.all[from].view.kernel.netns_id(netns)?;
                if wanted.is_none_or(|id| !self.all[from].unresolved().contains(&id)) {
                    continue;
                }
                let view = NamespaceView::open(path.display().to_string(), netns.clone())?;
                self.all.push(Space::read(view)?);
                self.number(from, self.all.len() - 1)?;
            }
            let unresolved = self.all[from].unresolved();
            let space = &mut self.all[from];
            let unseen = space.view.links.iter().filter(|link| link.peer_netns.is_some_and(|id| unresolved.contains(&id)));
            space.unseen =
                unseen.map(|link| format!("the namespace behind {} of {} is not visible", link.name, space.view.place)).collect();
        }
        let numbered_from = (0..self.all.len()).filter(|from| *from == HOST || *from >= known);
        for from in numbered_from {
            for to in 0..self.all.len() {
                self.number(from, to)?;
            }
        }
        Ok(())
    }

    fn number(&mut self, from: usize, to: usize) -> Result<(), TraceError> {
        let netns = self.all[to].view.netns.clone();
        if let Some(id) = self.all[from].view.kernel.netns_id(&netns)? {
            self.all[from].others.insert(id, to);
        }
        Ok(())
    }

    /// The link that a pair's or a stacked device's `peer` refers to; `None` if its namespace is not visible.
    pub(super) fn other_end(&self, space: usize, link: &Link) -> Option<(usize, &Link)> {
        let other = match link.peer_netns {
            None => space,
            Some(id) => *self.all[space].others.get(&id)?,
        };
        Some((other, self.all[other].view.link(link.peer)?))
    }

    /// The network that has this namespace.
    pub(super) fn network_of(&self, space: usize) -> Option<usize> {
        self.networks.iter().position(|network| network.space == space)
    }
}

impl Space {
    fn read(mut view: NamespaceView) -> Result<Space, TraceError> {
        let (mut routes, mut rules) = (Vec::new(), Vec::new());
        for family in Family::ALL {
            routes.extend(view.kernel.routes(family)?);
            rules.extend(view.kernel.policy_rules(family)?);
        }
        Ok(Space { view, routes, rules, others: BTreeMap::new(), unseen: Vec::new() })
    }

    fn unresolved(&self) -> BTreeSet<u32> {
        let ids = self.view.links.iter().filter(|link| link.kind != "vxlan").filter_map(|link| link.peer_netns);
        ids.filter(|id| !self.others.contains_key(id)).collect()
    }

    /// The routes that can carry packets to a container: not those of link-local, multicast and transfer addresses.
    pub(super) fn forwarding_routes(&self) -> impl Iterator<Item = &RouteEntry> {
        self.routes.iter().filter(|route| {
            let destination = route.destination;
            route.kind == "unicast" && !transfer_range(destination.family()).covers(destination) && !is_link_local(destination)
        })
    }
}

/// Whether routers forward no packets to these addresses.
fn is_link_local(range: Cidr) -> bool {
    match range.base() {
        IpAddr::V4(base) => base.is_multicast() && range.length() >= 4,
        IpAddr::V6(base) => {
            (base.is_multicast() && range.length() >= 8) || (base.is_unicast_link_local() && range.length() >= 10)
        }
    }
}

impl Network {
    fn read(name: String, vni: Vni, space: usize, all: &mut [Space]) -> Result<Network, TraceError> {
        let addresses_of = |device: Device, space: &mut Space| -> Result<Vec<IpAddr>, TraceError> {
            let Some(link) = space.view.links.iter().find(|link| link.name == device.name()) else { return Ok(Vec::new()) };
            let index = link.index;
            let addresses = space.view.kernel.addresses(index)?.into_iter();
            Ok(addresses.filter(|address| !matches!(address, IpAddr::V6(a) if a.is_unicast_link_local())).collect())
        };
        let gateways = addresses_of(Device::bridge(vni), &mut all[space])?;
        let transfer = addresses_of(Device::transit(vni), &mut all[space])?;
        let view = &all[space].view;
        let to = |wanted: fn(Role) -> bool| {
            let links = view.links.iter().filter(move |link| link.device().is_some_and(|device| wanted(device.role)));
            let indices: Vec<u32> = links.map(|link| link.index).collect();
            let routes = all[space].forwarding_routes();
            routes
                .filter(|route| route.interfaces.iter().any(|index| indices.contains(index)))
                .map(|route| route.destination)
                .collect::<Vec<_>>()
        };
        let mut remote = to(|role| matches!(role, Role::Vxlan(_)));
        let mut families = BTreeSet::new();
        remote.retain(|range| families.insert(range.family()));
        let local = to(|role| role == Role::Bridge);
        Ok(Network { name, vni, space, gateways, local, remote, transfer })
    }
}

/// Files of this machine's network namespaces: named ones, those of processes, and bind mounts elsewhere.
fn namespace_files() -> Vec<PathBuf> {
    let entries = |directory: &str| std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut paths: Vec<PathBuf> = entries(NETNS_RUN_DIR).collect();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // proc_pid_mountinfo(5): the mount point is the fifth field, the type the first after a dash.
    let is_namespace = |line: &&str| line.split(" - ").nth(1).is_some_and(|rest| rest.starts_with("nsfs "));
    paths.extend(mounts.lines().filter(is_namespace).filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from));
    paths.extend(
        entries("/proc")
            .filter(|path| path.file_name().is_some_and(|name| name.as_encoded_bytes()[0].is_ascii_digit()))
            .map(|path| path.join("ns/net")),
    );
    let mut seen = BTreeSet::new();
    paths.retain(|path| std::fs::metadata(path).is_ok_and(|file| seen.insert((file.dev(), file.ino()))));
    paths
}
