//! `overlayctl attach`: attaches a network namespace to the overlay; without `--netns` and `--pid` it creates a named one first.

use std::path::PathBuf;

use overlay_agent::model::api::{AttachRequest, AttachResponse};
use overlay_agent::model::endpoint::EndpointName;
use overlay_agent::model::{Mode, NetworkName};
use serde::Serialize;

use super::attach_args::AttachArgs;
use super::networks::{endpoints_named, undo_attaches};
use super::{CommandError, Context, Outcome};
use crate::client::{Client, ClientError};
use crate::lab::process::ProcessId;
use crate::netns::{NamedNamespaces, NamespaceError};
use crate::output::{Style, Tone, View, joined};
use crate::resolver::ResolverFile;

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "overlayctl attach web --publish 8080:80 && ip netns exec web ip address")]
pub struct Args {
    /// The endpoint's name, unique in the network on this host
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
    let mut requests = attach.requests(None)?;
    // What existed before stays if a further attach fails.
    let needs_namespace = args.netns.is_none() && args.pid.is_none() && attach.has_namespace();
    let existing = if needs_namespace || requests.len() > 1 { endpoints_named(&context.client, name).await? } else { Vec::new() };
    let namespaces = NamedNamespaces::for_socket(context.client.socket(), &attach.prefix);
    let mut created = None;
    let mut process = None;
    let netns = match (&args.netns, args.pid) {
        _ if !attach.has_namespace() => None,
        // The agent has another working directory.
        (Some(path), _) => Some(std::path::absolute(path).map_err(|source| CommandError::Read { path: path.clone(), source })?),
        (None, Some(pid)) => {
            process = Some(ProcessId::from_pid(pid).ok_or(NamespaceError::NoProcess { pid })?);
            Some(format!("/proc/{pid}/ns/net").into())
        }
        (None, None) => {
            let path = namespaces.path(name);
            // Recreates a namespace that has disappeared since; the agent attaches the endpoint to the new one.
            if !(existing.iter().any(|e| e.netns == path) && path.exists()) {
                created = Some(namespaces.create(name)?);
            }
            Some(path)
        }
    };
    requests.iter_mut().for_each(|(_, request)| request.netns.clone_from(&netns));
    let file =
        netns.as_deref().and_then(|netns| ResolverFile::for_namespace(netns, name)).filter(|_| attach.mode == Mode::Overlay);
    if attach.resolver.is_given() && file.is_none() {
        let message =
            "--dns, --dns-search and --dns-option need a named namespace (/run/netns/NAME): its name selects the resolver file";
        return Err(CommandError::Usage { message: message.to_owned() });
    }
    let written = match &file {
        Some(file) => file.write(&attach.resolver, created.is_some())?,
        None => None,
    };
    let existing: Vec<NetworkName> = existing.into_iter().map(|endpoint| endpoint.network).collect();
    let attached = attach_to_each(&context.client, name, &requests, &existing).await?;
    if let Some(process) = process.filter(|process| !process.is_alive()) {
        // The process ended meanwhile and PIDs are reused: the namespace may be another process's.
        for (network, _) in &requests {
            context.client.of_network(network).detach(name).await?;
        }
        return Err(NamespaceError::NoProcess { pid: process.pid }.into());
    }
    if let Some(namespace) = created {
        namespace.keep();
    }
    if let Some(written) = written {
        written.keep();
    }
    let view = match attached.as_slice() {
        [one] => AttachedView::One(one),
        several => AttachedView::Several(several),
    };
    context.printer.print(&view)?;
    Ok(Outcome::Ok)
}

/// Attaches a container to each network in turn. If one fails, it is detached again from those that it was not in before.
pub(super) async fn attach_to_each(
    client: &Client,
    name: &EndpointName,
    requests: &[(NetworkName, AttachRequest)],
    existing: &[NetworkName],
) -> Result<Vec<AttachResponse>, ClientError> {
    let (mut attached, mut new) = (Vec::new(), Vec::new());
    for (network, request) in requests {
        match client.of_network(network).attach(name, request).await {
            Ok(response) => attached.push(response),
            Err(error) => {
                undo_attaches(client, name, &new).await;
                return Err(error);
            }
        }
        new.extend(Some(network).filter(|network| !existing.contains(network)).cloned());
    }
    Ok(attached)
}

/// One response as it is, several as a list.
#[derive(Serialize)]
#[serde(untagged)]
enum AttachedView<'a> {
    One(&'a AttachResponse),
    Several(&'a [AttachResponse]),
}

impl View for AttachedView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        let several = match self {
            AttachedView::One(one) => std::slice::from_ref(*one),
            AttachedView::Several(several) => several,
        };
        let text = |response: &AttachResponse| attached_text(response, style, wide);
        several.iter().map(text).collect::<Vec<_>>().join("\n")
    }
}

/// What one network gave the container.
fn attached_text(response: &AttachResponse, style: Style, wide: bool) -> String {
    let AttachResponse { endpoint, prefix_length, gateway, routes, mtu } = response;
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
    let network = if endpoint.network.is_default() { String::new() } else { format!(", network {}", endpoint.network) };
    lines.push(format!("  {} in {}{network}{mtu}", port.interface, endpoint.netns.display()));
    if !endpoint.published.is_empty() {
        lines.push(format!("  published {}", joined(&endpoint.published)));
    }
    if wide {
        lines.push(format!("  {} on the host, MAC {}", port.host_interface, port.mac));
    }
    lines.join("\n")
}
