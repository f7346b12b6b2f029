//! `overlayctl detach`: detaches a container; removes its namespace and resolver file if `overlayctl attach` created them.

use overlay_agent::model::api::DetachResponse;
use overlay_agent::model::endpoint::EndpointName;
use serde::Serialize;

use super::{CommandError, Context, Outcome};
use crate::netns::{NamedNamespaces, PrefixArg};
use crate::output::{Style, View, joined};
use crate::resolver::ResolverFile;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The endpoint's name
    name: EndpointName,
    /// Detach even if other endpoints share the network namespace; they are detached too
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    prefix: PrefixArg,
}

/// Detaches the endpoint. An unknown endpoint is no error: the requested state holds.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let existing = context.client.endpoints().await?.endpoints.into_iter().find(|e| e.name == args.name);
    let detached = context.client.detach_with(&args.name, args.force).await?;
    let namespaces = NamedNamespaces::for_socket(context.client.socket(), &args.prefix);
    // Cleans up even if the agent knows no such endpoint: a killed `attach` leaves a namespace behind.
    let netns = existing.map_or_else(|| namespaces.path(&args.name), |endpoint| endpoint.netns);
    if let Some(file) = ResolverFile::for_namespace(&netns, &args.name) {
        file.remove()?;
    }
    let namespace_removed = namespaces.remove(&args.name)?;
    context.printer.print(&DetachedView { name: &args.name, detached: &detached, namespace_removed })?;
    Ok(Outcome::Ok)
}

#[derive(Serialize)]
struct DetachedView<'a> {
    #[serde(skip)]
    name: &'a EndpointName,
    #[serde(flatten)]
    detached: &'a DetachResponse,
    namespace_removed: bool,
}

impl View for DetachedView<'_> {
    fn text(&self, _style: Style, _wide: bool) -> String {
        let DetachResponse { endpoint, sharers } = self.detached;
        let namespace = if self.namespace_removed { "; namespace removed" } else { "" };
        let sharers = if sharers.is_empty() { String::new() } else { format!(", and with it {}", joined(sharers)) };
        match endpoint {
            Some(name) => format!("{name} detached{sharers}{namespace}"),
            None => format!("{} was not attached{namespace}", self.name),
        }
    }
}
