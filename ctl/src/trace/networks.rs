//! The part of the path between namespaces: into an isolated network's, out of it, and why another network is out of reach.

use std::net::IpAddr;
use std::path::PathBuf;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::trace::Link;
use overlay_agent::model::Endpoint;

use super::hop_log::Step;
use super::namespace_view::{HOST, NETWORK_PREFIX, NamespaceView, NetworkNamespace};
use super::targets::TraceEnd;
use super::tracer::Tracer;
use super::{EndView, TraceError};

impl Tracer<'_> {
    /// The isolated network of a container: the one whose namespace has its port.
    fn network_of(&self, endpoint: &Endpoint) -> Option<&NetworkNamespace> {
        let port = &endpoint.port.as_ref()?.host_interface;
        self.networks.iter().find(|network| network.links.iter().any(|link| link.name == *port))
    }

    /// The isolated network of an end, if it is a container of one.
    fn network_of_end(&self, end: &TraceEnd) -> Option<&NetworkNamespace> {
        match end {
            TraceEnd::Container(endpoint) => self.network_of(endpoint),
            TraceEnd::Host | TraceEnd::Peer(..) | TraceEnd::Address(_) => None,
        }
    }

    /// Adds its isolated network to the description of an end.
    pub(super) fn with_network(&self, end: &TraceEnd, view: EndView) -> EndView {
        match self.network_of_end(end) {
            Some(NetworkNamespace { network, .. }) => EndView { what: format!("{} of network {network}", view.what), ..view },
            None => view,
        }
    }

    /// Enters the namespace that has the source's port. Returns it, if it is not the host's.
    pub(super) fn enter_network_of(&mut self, start: &TraceEnd) -> Result<Option<PathBuf>, TraceError> {
        let Some(NetworkNamespace { place, netns, .. }) = self.network_of_end(start).cloned() else { return Ok(None) };
        let path = netns.path().to_owned();
        self.view = NamespaceView::open(place, netns)?;
        Ok(Some(path))
    }

    /// Notes why a container of another network is out of reach.
    pub(super) fn note_isolation(&mut self, start: &TraceEnd, goal: &TraceEnd) {
        let place = |network: Option<&NetworkNamespace>| network.map(|network| network.place.clone());
        let TraceEnd::Container(target) = goal else { return };
        let (from, to) = (place(self.network_of_end(start)), place(self.network_of(target)));
        let Some(address) = target.addresses().iter().map(|(_, address)| *address).next().filter(|_| from != to) else { return };
        let name = |place: &Option<String>| match place.as_ref().and_then(|place| place.strip_prefix(NETWORK_PREFIX)) {
            Some(network) => format!("network {network}"),
            None => "the host".to_owned(),
        };
        self.log.notes.push(format!(
            "{} is in {}, which {} reaches only by its published ports, or if each network names the other as peer: elsewhere \
             {address} is another address (`overlayctl network verify`)",
            target.name,
            name(&to),
            name(&from),
        ));
    }

    /// The container that has an address in the namespace where the packet is. In the host's, also one whose port is missing.
    pub(super) fn container_here(&self, address: IpAddr) -> Option<&Endpoint> {
        let has = |endpoint: &&Endpoint| endpoint.addresses().iter().any(|(_, own)| *own == address);
        let place = |endpoint: &Endpoint| self.network_of(endpoint).map_or(HOST, |network| &network.place);
        self.inventory.endpoints.iter().filter(has).find(|endpoint| place(endpoint) == self.view.place)
    }

    /// Enters the namespace at the other end of a veth pair. Returns that end; `None` if the link leads to no known one.
    pub(super) fn cross(&mut self, link: &Link) -> Step<Option<Link>> {
        let Some(id) = link.peer_netns.filter(|_| link.kind == "veth") else { return Ok(None) };
        let networks = self.networks.iter().map(|network| (network.place.clone(), network.netns.clone()));
        let namespaces: Vec<(String, Netns)> = networks.chain([(HOST.to_owned(), self.host.clone())]).collect();
        for (place, netns) in namespaces {
            if self.view.kernel.netns_id(&netns)? != Some(id) {
                continue;
            }
            self.log.ok(&self.view.place, "link", format!("{} leads to namespace {place}", link.name));
            self.view = NamespaceView::open(place, netns)?;
            let Some(end) = self.view.link(link.peer).cloned() else {
                let message = format!("the other end of {} is missing", link.name);
                return Err(self.log.stop(&self.view.place, "link", message, "the agent restores it: `overlayctl status`"));
            };
            return Ok(Some(end));
        }
        Ok(None)
    }

    /// Enters the host's namespace, from which tunnels of all networks send.
    pub(super) fn enter_host(&mut self) -> Step<()> {
        if self.view.place != HOST {
            self.view = NamespaceView::open(HOST.to_owned(), self.host.clone())?;
        }
        Ok(())
    }
}
