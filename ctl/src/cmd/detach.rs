//! `overlayctl detach`: detaches a container; removes its namespace and resolver file if `overlayctl attach` created them.

use overlay_agent::model::NetworkName;
use overlay_agent::model::api::DetachResponse;
use overlay_agent::model::endpoint::EndpointName;
use serde::Serialize;

use super::networks::endpoints_named;
use super::{CommandError, Context, Outcome};
use crate::netns::{NamedNamespaces, PrefixArg};
use crate::output::{Style, View, joined};
use crate::resolver::ResolverFile;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The endpoint's name
    name: EndpointName,
    /// Network to detach it from, repeatable [default: all that it is in]
    #[arg(long = "network", value_name = "NAME")]
    networks: Vec<NetworkName>,
    /// Detach even if other endpoints share the network namespace; they are detached too
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    prefix: PrefixArg,
}

/// Detaches the endpoint. An unknown endpoint is no error: the requested state holds.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let existing = endpoints_named(&context.client, &args.name).await?;
    let networks: Vec<NetworkName> = match (args.networks.as_slice(), existing.as_slice()) {
        ([], []) => vec![NetworkName::default()],
        ([], existing) => existing.iter().map(|endpoint| endpoint.network.clone()).collect(),
        (given, _) => given.to_vec(),
    };
    let mut detached = DetachResponse { endpoint: None, sharers: Vec::new() };
    for network in &networks {
        let response = context.client.of_network(network).detach_with(&args.name, args.force).await?;
        detached.endpoint = detached.endpoint.or(response.endpoint);
        detached.sharers.extend(response.sharers);
    }
    let namespaces = NamedNamespaces::for_socket(context.client.socket(), &args.prefix);
    let mut namespace_removed = false;
    // The container's other networks still need its namespace.
    if existing.iter().all(|endpoint| networks.contains(&endpoint.network)) {
        // Cleans up even if the agent knows no such endpoint: a killed `attach` leaves a namespace behind.
        let netns = existing.into_iter().next().map_or_else(|| namespaces.path(&args.name), |endpoint| endpoint.netns);
        if let Some(file) = ResolverFile::for_namespace(&netns, &args.name) {
            file.remove()?;
        }
        namespace_removed = namespaces.remove(&args.name)?;
    }
    let networks = if networks.iter().all(NetworkName::is_default) { Vec::new() } else { networks };
    context.printer.print(&DetachedView { name: &args.name, detached: &detached, networks, namespace_removed })?;
    Ok(Outcome::Ok)
}

#[derive(Serialize)]
struct DetachedView<'a> {
    #[serde(skip)]
    name: &'a EndpointName,
    #[serde(flatten)]
    detached: &'a DetachResponse,
    /// The networks, unless it is the default one alone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    networks: Vec<NetworkName>,
    namespace_removed: bool,
}

impl View for DetachedView<'_> {
    fn text(&self, _style: Style, _wide: bool) -> String {
        let DetachResponse { endpoint, sharers } = self.detached;
        let namespace = if self.namespace_removed { "; namespace removed" } else { "" };
        let sharers = if sharers.is_empty() { String::new() } else { format!(", and with it {}", joined(sharers)) };
        let networks = |word: &str| match self.networks.as_slice() {
            [] => String::new(),
            networks => format!(" {word} {}", joined(networks)),
        };
        let (from, to) = (networks("from"), networks("to"));
        match endpoint {
            Some(name) => format!("{name} detached{from}{sharers}{namespace}"),
            None => format!("{} was not attached{to}{namespace}", self.name),
        }
    }
}
