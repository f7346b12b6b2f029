//! The containers of a lab: named namespaces that the hosts' agents attach.

use futures_util::stream::{self, StreamExt, TryStreamExt};
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::PerFamily;
use overlay_agent::model::api::{AttachRequest, Attached};
use overlay_agent::model::endpoint::EndpointName;

use super::{Host, Lab, LabError};

/// How many are attached at once: over all hosts, so that each agent gets a few.
const AT_ONCE: usize = 8;

/// Attaches every container of the layout.
pub async fn attach_all(lab: &Lab) -> Result<(), LabError> {
    let hosts: Vec<Host<'_>> = lab.hosts().collect();
    let all = hosts.iter().flat_map(|host| host.layout().containers.iter().map(move |name| (host, name)));
    let attached = stream::iter(all).map(|(host, name)| async move { attach(host, name).await });
    attached.buffer_unordered(AT_ONCE).try_collect::<Vec<_>>().await?;
    Ok(())
}

/// Makes the namespace and has the agent attach it. Where the agent refuses, the namespace is removed again.
pub(super) async fn attach(host: &Host<'_>, name: &str) -> Result<Attached, LabError> {
    let endpoint: EndpointName = name.parse().map_err(|e| LabError::Options { message: format!("{e}") })?;
    let namespace = host.lab().layout().namespace(&format!("{}-{name}", host.name()));
    let netns = Netns::create(&namespace)?;
    let request = AttachRequest { netns: netns.path().to_owned(), interface: None, addresses: PerFamily::default() };
    match host.client().attach(&endpoint, &request).await {
        Ok(attached) => Ok(attached),
        Err(source) => {
            Netns::delete(&namespace)?;
            Err(LabError::Agent { host: host.name().to_owned(), source })
        }
    }
}
