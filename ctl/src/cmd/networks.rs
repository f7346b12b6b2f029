//! Requests about one network, or about all that this host is in.

use overlay_agent::model::endpoint::EndpointName;
use overlay_agent::model::{Endpoint, NetworkName};
use serde::Serialize;

use crate::client::{Client, ClientError};

/// An item of a list, with its network if that is not the default one.
#[derive(Debug, Serialize)]
pub struct InNetwork<T> {
    /// The network.
    #[serde(skip_serializing_if = "NetworkName::is_default")]
    pub network: NetworkName,
    /// The item.
    #[serde(flatten)]
    pub item: T,
}

/// Asks about the given network, or without one about each that this host is in. The default network is the first.
pub async fn ask_each<T>(
    client: &Client,
    network: Option<&NetworkName>,
    ask: impl AsyncFn(&Client) -> Result<T, ClientError>,
) -> Result<Vec<(NetworkName, T)>, ClientError> {
    if let Some(network) = network {
        return Ok(vec![(network.clone(), ask(&client.of_network(network)).await?)]);
    }
    let mut answers = vec![(client.network_name().clone(), ask(client).await?)];
    for entry in client.networks().await?.networks.into_iter().filter(|entry| entry.name != *client.network_name()) {
        match ask(&client.of_network(&entry.name)).await {
            Ok(answer) => answers.push((entry.name, answer)),
            // The host has left the network meanwhile.
            Err(ClientError::Problem { status: hyper::StatusCode::NOT_FOUND, .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(answers)
}

/// The items of several answers as one list.
pub fn merge<T>(answers: Vec<(NetworkName, Vec<T>)>) -> Vec<InNetwork<T>> {
    let in_network =
        |(network, items): (NetworkName, Vec<T>)| items.into_iter().map(move |item| InNetwork { network: network.clone(), item });
    answers.into_iter().flat_map(in_network).collect()
}

/// The endpoints of a name, in all networks.
pub async fn endpoints_named(client: &Client, name: &EndpointName) -> Result<Vec<Endpoint>, ClientError> {
    let all = ask_each(client, None, async |client| client.endpoints().await).await?;
    let named = |(network, answer): (NetworkName, overlay_agent::model::api::Endpoints)| {
        answer.endpoints.into_iter().find(|endpoint| endpoint.name == *name).map(|endpoint| Endpoint { network, ..endpoint })
    };
    Ok(all.into_iter().filter_map(named).collect())
}

/// Detaches a container from networks again, because an attach to a further one failed. Reports failures.
pub async fn undo_attaches(client: &Client, name: &EndpointName, networks: &[NetworkName]) {
    for network in networks.iter().rev() {
        if let Err(error) = client.of_network(network).detach(name).await {
            eprintln!("overlayctl: {name} stays attached to network {network}: {error}");
        }
    }
}

#[cfg(test)]
mod tests;
