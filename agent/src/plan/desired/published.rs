//! Elements of published ports: from a port of the host to a container, for an isolated network by way of its transit.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::model::{Endpoint, Family, Port, PublishedPort, Transport};
use crate::plan::isolation::{Scope, Transit};
use crate::plan::ruleset::Element;

/// A published port of one family and its target in the container.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mapping {
    family: Family,
    protocol: Transport,
    host_port: u16,
    /// The host's address that it is bound to; `None` for any.
    bound: Option<IpAddr>,
    target: SocketAddr,
}

/// The mappings of a published port or port range. Each port is one element: the full range has 65,535 elements, and a lookup
/// costs the same.
pub(super) fn mappings<'a>(publish: &'a PublishedPort, port: &'a Port) -> impl Iterator<Item = Mapping> + 'a {
    let PublishedPort { address, protocol, .. } = *publish;
    let bound = address.filter(|address| !address.is_unspecified());
    port.addresses.iter().filter(|(family, _)| publish.has_effect(|bound| bound == *family)).flat_map(
        move |(family, container_address)| {
            (0..publish.count).filter_map(move |n| {
                let host_port = publish.host_port.checked_add(n)?;
                let target = SocketAddr::new(*container_address, publish.container_port.checked_add(n)?);
                Some(Mapping { family, protocol, host_port, bound, target })
            })
        },
    )
}

impl Mapping {
    /// The element that translates the host's port to this target.
    fn host_element(&self, target: SocketAddr) -> (Element, SocketAddr) {
        let element = match self.bound {
            Some(address) => Element::Bound(address, self.protocol, self.host_port),
            None => Element::Port(self.family, self.protocol, self.host_port),
        };
        (element, target)
    }

    /// The element of a routed network, which leads to the container at once.
    pub(super) fn element(&self) -> (Element, SocketAddr) {
        self.host_element(self.target)
    }

    /// The element of an isolated network in a scope: from the host's port to the transit's, and from there to the container.
    /// `None` if the transit has no free port.
    pub(super) fn transit_element(&self, scope: Scope, transit: Transit, ports: &TransitPorts) -> Option<(Element, SocketAddr)> {
        let port = ports.get(self)?;
        Some(match scope {
            Scope::Host => self.host_element(SocketAddr::new(transit.network(self.family), port)),
            Scope::Network => (Element::Port(self.family, self.protocol, port), self.target),
        })
    }
}

/// The transit's ports of mappings whose own port leads to another container already: by bound address, protocol and host port.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct TransitPorts(BTreeMap<(IpAddr, Transport, u16), Option<u16>>);

impl TransitPorts {
    /// Ports that are bound to different addresses can lead to different containers. The container that was attached first keeps
    /// the port, so that a new one changes no present translation; another gets the highest port that nothing uses.
    pub(super) fn of(endpoints: &[Arc<Endpoint>]) -> TransitPorts {
        let mut publishers: Vec<&Endpoint> = endpoints.iter().map(|endpoint| &**endpoint).collect();
        publishers.retain(|endpoint| endpoint.published.iter().any(is_bound));
        publishers.sort_by_key(|endpoint| endpoint.attached_at);
        let mut targets = BTreeMap::new();
        let mut moved = TransitPorts::default();
        for mapping in publishers.into_iter().flat_map(|endpoint| endpoint_mappings(endpoint, is_bound)) {
            let Some(bound) = mapping.bound else { continue };
            let Mapping { family, protocol, host_port, target, .. } = mapping;
            if *targets.entry((family, protocol, host_port)).or_insert(target) != target {
                let free = moved.highest_free(endpoints, family, protocol);
                moved.0.insert((bound, protocol, host_port), free);
            }
        }
        moved
    }

    fn get(&self, mapping: &Mapping) -> Option<u16> {
        let moved = mapping.bound.and_then(|bound| self.0.get(&(bound, mapping.protocol, mapping.host_port)));
        moved.copied().unwrap_or(Some(mapping.host_port))
    }

    fn highest_free(&self, endpoints: &[Arc<Endpoint>], family: Family, protocol: Transport) -> Option<u16> {
        let published = |port: u16| {
            let covers = |publish: &PublishedPort| {
                publish.protocol == protocol && port.checked_sub(publish.host_port).is_some_and(|n| n < publish.count)
            };
            endpoints.iter().flat_map(|endpoint| &endpoint.published).any(covers)
        };
        let taken = |port: u16| {
            self.0.iter().any(|((bound, of, _), moved)| Family::of(*bound) == family && *of == protocol && *moved == Some(port))
        };
        (1..=u16::MAX).rev().find(|port| !published(*port) && !taken(*port))
    }
}

fn is_bound(publish: &PublishedPort) -> bool {
    publish.address.is_some_and(|address| !address.is_unspecified())
}

/// The mappings of an endpoint's published ports that `filter` selects.
fn endpoint_mappings(endpoint: &Endpoint, filter: fn(&PublishedPort) -> bool) -> impl Iterator<Item = Mapping> {
    let published = endpoint.published.iter().filter(move |publish| filter(publish));
    endpoint.port.iter().flat_map(move |port| published.clone().flat_map(|publish| mappings(publish, port)))
}
