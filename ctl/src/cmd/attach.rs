//! `overlayctl attach`: attaches a network namespace to the overlay; without `--netns` and `--pid` it creates a named one first.

use std::path::PathBuf;

use overlay_agent::model::Mode;
use overlay_agent::model::api::AttachResponse;
use overlay_agent::model::endpoint::EndpointName;
use serde::Serialize;

use super::attach_args::AttachArgs;
use super::{CommandError, Context, Outcome};
use crate::lab::process::ProcessId;
use crate::netns::{NamedNamespaces, NamespaceError};
use crate::output::{Style, Tone, View, joined};
use crate::resolver::ResolverFile;

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "overlayctl attach web --publish 8080:80 && ip netns exec web ip address")]
pub struct Args {
    /// The endpoint's name, unique on this host
    name: EndpointName,
    /// Network namespace to attach. Default: creates a namespace NAME, as `ip netns add` does; `detach` removes it
    #[arg(long, value_name = "PATH", conflicts_with = "pid")]
    netns: Option<PathBuf>,
    /// Process whose network namespace is attached
    #[arg(long, value_name = "PID")]
    pid: Option<i32>,
    #[command(flatten)]
    attach: AttachArgs,
}

/// Attaches the endpoint and prints it.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let Args { name, attach, .. } = args;
    if !attach.has_namespace() && (args.netns.is_some() || args.pid.is_some()) {
        let message = format!("mode {} has a network namespace already: leave out --netns and --pid", attach.mode);
        return Err(CommandError::Usage { message });
    }
    let mut request = attach.request(None)?;
    let namespaces = NamedNamespaces::for_socket(context.client.socket(), &attach.prefix);
    let mut created = None;
    let mut process = None;
    request.netns = match (&args.netns, args.pid) {
        _ if !attach.has_namespace() => None,
        // The agent has another working directory.
        (Some(path), _) => Some(std::path::absolute(path).map_err(|source| CommandError::Read { path: path.clone(), source })?),
        (None, Some(pid)) => {
            process = Some(ProcessId::from_pid(pid).ok_or(NamespaceError::NoProcess { pid })?);
            Some(format!("/proc/{pid}/ns/net").into())
        }
        (None, None) => {
            let existing = context.client.endpoints().await?.endpoints.into_iter().find(|e| e.name == *name);
            let path = namespaces.path(name);
            // Recreates a namespace that has disappeared since; the agent attaches the endpoint to the new one.
            if !(existing.is_some_and(|e| e.netns == path) && path.exists()) {
                created = Some(namespaces.create(name)?);
            }
            Some(path)
        }
    };
    let file = request
        .netns
        .as_deref()
        .and_then(|netns| ResolverFile::for_namespace(netns, name))
        .filter(|_| attach.mode == Mode::Overlay);
    if attach.resolver.is_given() && file.is_none() {
        let message =
            "--dns, --dns-search and --dns-option need a named namespace (/run/netns/NAME): its name selects the resolver file";
        return Err(CommandError::Usage { message: message.to_owned() });
    }
    let written = match &file {
        Some(file) => file.write(&attach.resolver, created.is_some())?,
        None => None,
    };
    let attached = context.client.attach(name, &request).await?;
    if let Some(process) = process.filter(|process| !process.is_alive()) {
        // The process ended meanwhile and PIDs are reused: the namespace may be another process's.
        context.client.detach(name).await?;
        return Err(NamespaceError::NoProcess { pid: process.pid }.into());
    }
    if let Some(namespace) = created {
        namespace.keep();
    }
    if let Some(written) = written {
        written.keep();
    }
    context.printer.print(&AttachedView(&attached))?;
    Ok(Outcome::Ok)
}

#[derive(Serialize)]
#[serde(transparent)]
struct AttachedView<'a>(&'a AttachResponse);

impl View for AttachedView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        let AttachResponse { endpoint, prefix_length, gateway, routes, mtu } = self.0;
        let addresses: Vec<String> = endpoint
            .addresses()
            .iter()
            .map(|(family, address)| match (prefix_length.get(family), gateway.get(family)) {
                (Some(length), Some(gateway)) => {
                    let only = routes.get(family).filter(|_| !endpoint.default_route).map(|to| format!(" to {to}"));
                    format!("{address}/{length} via {gateway}{}", only.unwrap_or_default())
                }
                _ => address.to_string(),
            })
            .collect();
        let Some(port) = &endpoint.port else {
            return format!("{}  mode {}\n  {}", endpoint.name, endpoint.mode, endpoint.netns.display());
        };
        let mut lines = vec![format!("{}  {}", endpoint.name, style.paint(Tone::Good, &addresses.join(", ")))];
        let mtu = mtu.map(|mtu| format!(", MTU {mtu}")).unwrap_or_default();
        lines.push(format!("  {} in {}{mtu}", port.interface, endpoint.netns.display()));
        if !endpoint.published.is_empty() {
            lines.push(format!("  published {}", joined(&endpoint.published)));
        }
        if wide {
            lines.push(format!("  {} on the host, MAC {}", port.host_interface, port.mac));
        }
        lines.join("\n")
    }
}
