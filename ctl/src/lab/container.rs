//! The containers of a lab: named namespaces that the hosts' agents attach.

use futures_util::stream::{self, StreamExt, TryStreamExt};
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::PerFamily;
use overlay_agent::model::api::{AttachRequest, Attached};
use overlay_agent::model::endpoint::EndpointName;

use super::{Host, Lab, LabError};

/// How many hosts attach theirs at once.
const AT_ONCE: usize = 8;

/// Attaches every container of the layout: on each host one after the other, so that addresses follow the names.
pub async fn attach_all(lab: &Lab) -> Result<(), LabError> {
    let attached = stream::iter(lab.hosts()).map(|host| async move {
        for name in &host.layout().containers {
            attach(&host, name).await?;
        }
        Ok::<(), LabError>(())
    });
    attached.buffer_unordered(AT_ONCE).try_collect::<Vec<()>>().await?;
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
