//! Containers of a lab: named namespaces that the hosts' agents attach.

use std::net::IpAddr;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::trace::KernelQuery;
use overlay_agent::model::api::{AttachRequest, AttachResponse};
use overlay_agent::model::endpoint::EndpointName;
use overlay_agent::model::{Family, NetworkName, PerFamily};

use super::layout::container_in;
use super::{Host, Lab, LabError};

/// Maximum number of hosts that attach containers at once.
const MAX_CONCURRENT_HOSTS: usize = 8;

/// Attaches every container of the layout, in the default network and in the isolated ones. Each host attaches sequentially, so
/// that addresses follow the names.
pub async fn attach_all(lab: &Lab) -> Result<(), LabError> {
    let attached = stream::iter(lab.hosts()).map(|host| async move {
        for name in &host.layout().containers {
            host.attach(name).await?;
        }
        for network in &lab.layout().isolated {
            for name in &host.layout().containers {
                host.attach_in(network, &container_in(network, name), AttachRequest::default()).await?;
            }
        }
        Ok::<(), LabError>(())
    });
    attached.buffer_unordered(MAX_CONCURRENT_HOSTS).try_collect::<Vec<()>>().await?;
    Ok(())
}

impl Host<'_> {
    /// Creates a container's namespace and attaches it to the default network; the lab's target is then `HOST-NAME`. Removes the
    /// namespace if the agent refuses.
    pub async fn attach(&self, name: &str) -> Result<AttachResponse, LabError> {
        self.attach_in(&NetworkName::default(), name, AttachRequest::default()).await
    }

    /// The same for any network, with further fields of the request. The host joins the network with its first container.
    pub async fn attach_in(&self, network: &NetworkName, name: &str, request: AttachRequest) -> Result<AttachResponse, LabError> {
        let endpoint: EndpointName = name.parse().map_err(|e| LabError::Options { message: format!("{e}") })?;
        let namespace = self.lab().layout().namespace(&format!("{}-{name}", self.name()));
        let netns = Netns::create(&namespace)?;
        let request = AttachRequest { netns: Some(netns.path().to_owned()), ..request };
        match self.client_of(network).attach(&endpoint, &request).await {
            Ok(attached) => Ok(attached),
            Err(source) => {
                Netns::delete(&namespace)?;
                Err(LabError::Agent { host: self.name().to_owned(), source })
            }
        }
    }

    /// The namespaces of the isolated networks that the host is in.
    pub fn isolated_namespaces(&self) -> Result<Vec<(NetworkName, Netns)>, LabError> {
        let prefix = self.lab().layout().isolated_prefix(self.name());
        let names = Netns::list()?.into_iter().filter_map(|namespace| {
            let network = namespace.strip_prefix(&prefix)?.parse().ok()?;
            Some((network, namespace))
        });
        // A name without a namespace is left after a crash of who was making it.
        Ok(names.filter_map(|(network, namespace)| Some((network, Netns::named(&namespace).ok()?))).collect())
    }
}

/// A container on the overlay, from the kernel's state.
#[derive(Debug)]
pub struct AttachedContainer {
    /// Name on the host: `c1`.
    pub name: String,
    /// Its isolated network, else the default one. Of several isolated networks, one.
    pub network: NetworkName,
    /// Namespace.
    pub netns: Netns,
    /// Addresses.
    pub addresses: PerFamily<IpAddr>,
}

/// Lists the containers of a host, including manually attached ones, whether the agent runs or not.
pub fn list_attached(host: &Host<'_>) -> Result<Vec<AttachedContainer>, LabError> {
    let prefix = host.lab().layout().namespace(&format!("{}-", host.name()));
    let isolated = host.isolated_namespaces()?;
    let mut all = Vec::new();
    for (namespace, name) in Netns::list()?.iter().filter_map(|n| Some((n, n.strip_prefix(&prefix)?))) {
        let netns = Netns::named(namespace)?;
        let addresses = netns.run(global_addresses)?.map_err(|errno| LabError::File {
            action: "list the addresses in",
            path: netns.path().to_owned(),
            source: errno.into(),
        })?;
        // A namespace without addresses is not attached.
        if !addresses.is_empty() {
            let network = if isolated.is_empty() { None } else { isolated_network_of(&netns, &isolated)? };
            all.push(AttachedContainer { name: name.to_owned(), network: network.unwrap_or_default(), netns, addresses });
        }
    }
    Ok(all)
}

/// The network whose namespace has the other end of one of the container's interfaces.
fn isolated_network_of(container: &Netns, isolated: &[(NetworkName, Netns)]) -> Result<Option<NetworkName>, LabError> {
    let error = |source| LabError::Link { what: container.path().display().to_string(), source };
    let mut query = KernelQuery::open_in(container).map_err(error)?;
    let ends: Vec<u32> = query.links().map_err(error)?.into_iter().filter_map(|link| link.peer_netns).collect();
    let mut found = None;
    for (network, netns) in isolated {
        if query.netns_id(netns).map_err(error)?.is_some_and(|id| ends.contains(&id)) {
            found = Some(network.clone());
        }
    }
    Ok(found)
}

/// Addresses of the calling thread's namespace except loopback and link-local: one per family in a container.
fn global_addresses() -> nix::Result<PerFamily<IpAddr>> {
    let all = nix::ifaddrs::getifaddrs()?.filter_map(|i| {
        let address = i.address?;
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    });
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    };
    Ok(all.filter(usable).map(|ip| (Family::of(ip), ip)).collect())
}
