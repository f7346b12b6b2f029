//! Containers of a lab: named namespaces that the hosts' agents attach.

use std::net::IpAddr;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::api::{AttachRequest, AttachResponse};
use overlay_agent::model::endpoint::EndpointName;
use overlay_agent::model::{Family, PerFamily};

use super::{Host, Lab, LabError};

/// Maximum number of hosts that attach containers at once.
const MAX_CONCURRENT_HOSTS: usize = 8;

/// Attaches every container of the layout. Each host attaches sequentially, so that addresses follow the names.
pub async fn attach_all(lab: &Lab) -> Result<(), LabError> {
    let attached = stream::iter(lab.hosts()).map(|host| async move {
        for name in &host.layout().containers {
            host.attach(name).await?;
        }
        Ok::<(), LabError>(())
    });
    attached.buffer_unordered(MAX_CONCURRENT_HOSTS).try_collect::<Vec<()>>().await?;
    Ok(())
}

impl Host<'_> {
    /// Creates a container's namespace and attaches it; the lab's target is then `HOST-NAME`. Removes the namespace if the agent
    /// refuses.
    pub async fn attach(&self, name: &str) -> Result<AttachResponse, LabError> {
        let endpoint: EndpointName = name.parse().map_err(|e| LabError::Options { message: format!("{e}") })?;
        let namespace = self.lab().layout().namespace(&format!("{}-{name}", self.name()));
        let netns = Netns::create(&namespace)?;
        let request = AttachRequest { netns: Some(netns.path().to_owned()), ..AttachRequest::default() };
        match self.client().attach(&endpoint, &request).await {
            Ok(attached) => Ok(attached),
            Err(source) => {
                Netns::delete(&namespace)?;
                Err(LabError::Agent { host: self.name().to_owned(), source })
            }
        }
    }
}

/// A container on the overlay, from the kernel's state.
#[derive(Debug)]
pub struct AttachedContainer {
    /// Name on the host: `c1`.
    pub name: String,
    /// Namespace.
    pub netns: Netns,
    /// Addresses.
    pub addresses: PerFamily<IpAddr>,
}

/// Lists the containers of a host, including manually attached ones, whether the agent runs or not.
pub fn list_attached(host: &Host<'_>) -> Result<Vec<AttachedContainer>, LabError> {
    let prefix = host.lab().layout().namespace(&format!("{}-", host.name()));
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
            all.push(AttachedContainer { name: name.to_owned(), netns, addresses });
        }
    }
    Ok(all)
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
