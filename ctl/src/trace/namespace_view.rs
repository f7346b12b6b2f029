//! A network namespace of this host: interfaces, addresses and rules, read once, and a handle for further kernel queries.

use std::net::IpAddr;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::trace::packet::Interface;
use overlay_agent::kernel::trace::{KernelQuery, Link, OverlayRanges, RulesetSnapshot, legacy_tables};
use overlay_agent::model::{Family, Role, Vni};
use overlay_agent::plan::OpError;

use super::TraceError;

/// Start of the names of isolated networks' namespaces in `/run/netns`.
pub const NETWORK_PREFIX: &str = "ov-";

/// The host's namespace in a path.
pub const HOST: &str = "host";

/// State of a namespace.
pub struct NamespaceView {
    /// Its name in a path: [`HOST`], `ov-NAME`, or a container's path.
    pub place: String,
    /// The namespace.
    pub netns: Netns,
    /// Handle for kernel queries.
    pub kernel: KernelQuery,
    /// All rules.
    pub ruleset: RulesetSnapshot,
    /// All interfaces.
    pub links: Vec<Link>,
    /// All addresses.
    pub addresses: Vec<IpAddr>,
    /// Ranges of the overlay.
    pub overlay: OverlayRanges,
}

impl NamespaceView {
    /// Reads the host's namespace, which is the calling thread's.
    pub fn host() -> Result<NamespaceView, TraceError> {
        Ok(NamespaceView::open(HOST.to_owned(), Netns::current()?)?)
    }

    /// Reads a namespace.
    pub fn open(place: String, netns: Netns) -> Result<NamespaceView, OpError> {
        let mut kernel = KernelQuery::open_in(&netns)?;
        let links = kernel.links()?;
        let addresses = kernel.addresses(0)?;
        let overlay = kernel.overlay_ranges()?;
        let ruleset = RulesetSnapshot::read_in(&netns)?;
        Ok(NamespaceView { place, netns, kernel, ruleset, links, addresses, overlay })
    }

    /// The namespaces of this host's isolated networks, by network.
    pub fn of_networks(host: &Netns) -> Result<Vec<NetworkNamespace>, TraceError> {
        let mut found = Vec::new();
        for place in Netns::list()?.into_iter().filter(|name| name.starts_with(NETWORK_PREFIX)) {
            // Another program's file, or a namespace that is being deleted.
            let Ok(netns) = Netns::named(&place) else { continue };
            let mut kernel = KernelQuery::open_in(&netns)?;
            let links = kernel.links()?;
            let host_id = kernel.netns_id(host)?;
            let is_bridge = |link: &&Link| link.device().is_some_and(|device| device.role == Role::Bridge);
            let Some((bridge, device)) = links.iter().find(is_bridge).and_then(|link| Some((link, link.device()?))) else {
                continue;
            };
            // Left out are a lab's hosts, and networks of another host: neither tunnel nor transit leads here.
            let leads_out =
                |link: &&Link| link.device().is_some_and(|device| matches!(device.role, Role::Vxlan(_) | Role::Transit));
            let outer: Vec<Option<u32>> = links.iter().filter(leads_out).map(|link| link.peer_netns).collect();
            // One that has lost both has only its bridge, its ports and links to peer networks.
            let is_inner = |link: &Link| link.name == "lo" || link.device().is_some() || link.master.is_some();
            let is_of_host = outer.iter().any(|id| id.is_some() && *id == host_id)
                || (outer.is_empty() && bridge.is_marked() && links.iter().all(is_inner));
            if !is_of_host {
                continue;
            }
            let network = place.strip_prefix(NETWORK_PREFIX).unwrap_or_default().to_owned();
            let vni = device.vni;
            found.push(NetworkNamespace { network, place, netns, vni, links });
        }
        Ok(found)
    }

    /// Finds an interface.
    pub fn link(&self, index: Option<u32>) -> Option<&Link> {
        self.links.iter().find(|link| Some(link.index) == index)
    }

    /// Name of an interface, or its index if unknown.
    pub fn name(&self, index: Option<u32>) -> String {
        match (self.link(index), index) {
            (Some(link), _) => link.name.clone(),
            (None, Some(index)) => format!("interface {index}"),
            (None, None) => "no interface".to_owned(),
        }
    }

    /// Interface as rules match it.
    pub fn interface(&self, index: Option<u32>) -> Option<Interface> {
        self.link(index).map(|link| Interface { index: link.index, name: link.name.clone() })
    }

    /// Bridge of the overlay.
    pub fn bridge(&self) -> Option<&Link> {
        self.links.iter().find(|link| link.device().is_some_and(|device| device.role == Role::Bridge))
    }

    /// VXLAN device of a family.
    pub fn tunnel(&self, family: Family) -> Option<&Link> {
        self.links.iter().find(|link| link.is_tunnel(family))
    }

    /// Whether the overlay leases an address.
    pub fn in_overlay(&self, address: IpAddr) -> bool {
        self.overlay.ranges.get(Family::of(address)).is_some_and(|(first, last)| (*first..=*last).contains(&address))
    }

    /// Reads a sysctl below `/proc/sys/net`; `None` if absent.
    pub fn sysctl(&self, path: &str) -> Option<String> {
        let read = || std::fs::read_to_string(format!("/proc/sys/net/{path}")).ok();
        self.netns.run_in_place(read).ok().flatten().map(|text| text.trim().to_owned())
    }

    /// The tables of iptables-legacy.
    pub fn legacy_tables(&self, family: Family) -> Vec<String> {
        self.netns.run_in_place(|| legacy_tables(family)).unwrap_or_default()
    }
}

/// The namespace of an isolated network.
#[derive(Debug, Clone)]
pub struct NetworkNamespace {
    /// The network's name.
    pub network: String,
    /// The namespace's name.
    pub place: String,
    /// The namespace.
    pub netns: Netns,
    /// The network's VNI.
    pub vni: Vni,
    /// Its links.
    pub links: Vec<Link>,
}

/// Describes why an interface cannot send; `None` if it can.
pub fn link_fault(link: &Link) -> Option<String> {
    if !link.up {
        Some(format!("{} is down", link.name))
    } else if !link.running {
        Some(format!("{} has no carrier", link.name))
    } else {
        None
    }
}
