//! `overlayctl detach`: takes a container off the overlay, and removes its namespace where `attach` had made it.

use overlay_agent::model::endpoint::EndpointName;
use serde::Serialize;

use super::{CommandError, Context, Outcome};
use crate::netns::{NamedNamespaces, PrefixArg};
use crate::output::{Style, View};

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The endpoint's name
    name: EndpointName,
    #[command(flatten)]
    prefix: PrefixArg,
}

/// Detaches. One that is not there is no error: what was asked for is the case.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let detached = context.client.detach(&args.name).await?.endpoint;
    // Also where the agent knew of none: an attach that was killed half way leaves a namespace.
    let namespace_removed = NamedNamespaces::of(context.client.socket(), &args.prefix).remove(&args.name)?;
    context.printer.show(&DetachedView { name: &args.name, endpoint: detached.as_ref(), namespace_removed })?;
    Ok(Outcome::Well)
}

#[derive(Serialize)]
struct DetachedView<'a> {
    #[serde(skip)]
    name: &'a EndpointName,
    endpoint: Option<&'a EndpointName>,
    namespace_removed: bool,
}

impl View for DetachedView<'_> {
    fn text(&self, _style: Style, _wide: bool) -> String {
        let namespace = if self.namespace_removed { "; its namespace is removed" } else { "" };
        match self.endpoint {
            Some(name) => format!("{name} is detached{namespace}"),
            None => format!("{} was not attached{namespace}", self.name),
        }
    }
}
