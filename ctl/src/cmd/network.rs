//! `overlayctl network`: the networks in etcd.

mod options;
mod verify;
mod views;

use std::time::Duration;

use overlay_agent::model::{NetworkName, NetworkRecord};
use overlay_agent::store::{NetworkError, WriteKind, WrittenNetwork};

use super::{CommandError, Context, Outcome, config};
use crate::check::route_collisions;
use crate::etcd::{EtcdArgs, EtcdError};
use crate::output::{Style, Tone, joined};
use options::NetworkOptions;
use views::{ListView, NetworkView, RemovedView};

/// Timeout of the agent's answer: `rm` works without an agent, too.
const AGENT_TIMEOUT: Duration = Duration::from_secs(2);

/// The arguments.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Default of --etcd-endpoints: the servers of this host's agent, else http://127.0.0.1:2379.")]
pub enum Args {
    /// Create a network; `default` is the one whose configuration flannel's hosts share
    Create {
        /// Name: a DNS label of 1 to 32 characters
        name: NetworkName,
        /// Its fields
        #[command(flatten)]
        options: NetworkOptions,
        /// Access to etcd
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// List the networks
    Ls {
        /// Access to etcd
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// Show a network's record and its hosts
    Inspect {
        /// Name
        name: NetworkName,
        /// Access to etcd
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// Remove a network that no host uses
    Rm {
        /// Name
        name: NetworkName,
        /// Delete the hosts' leases, too
        #[arg(long)]
        force: bool,
        /// Access to etcd
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// Change fields of a network; the others stay
    Set {
        /// Name
        name: NetworkName,
        /// Fields to change
        #[command(flatten)]
        options: NetworkOptions,
        /// Access to etcd
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// Prove from the kernel's state that this host's isolated networks do not reach each other
    #[command(after_help = "Run it as root on the host; it needs neither etcd nor the agent, and changes nothing.\n\
                            Exit codes: 0 isolated, or reachable by design only; 1 a way exists that is not by design; 3 unknown.")]
    Verify {
        /// Two networks; without them all
        #[arg(value_name = "NETWORK", num_args = 2)]
        names: Vec<NetworkName>,
    },
}

/// Creates, lists, shows, removes, changes or verifies networks.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    match args {
        Args::Create { name, options, etcd } => write(context, etcd, name, WriteKind::Create, options).await,
        Args::Set { name, options, etcd } => write(context, etcd, name, WriteKind::Change, options).await,
        Args::Ls { etcd } => list(context, &config::resolve_endpoints(context, etcd).await).await,
        Args::Inspect { name, etcd } => inspect(context, &config::resolve_endpoints(context, etcd).await, name).await,
        Args::Rm { name, force, etcd } => {
            let etcd = config::resolve_endpoints(context, etcd).await;
            refuse_own_endpoints(context, &etcd, name).await?;
            let deleted_leases = etcd.remove_network(name, *force).await?;
            context.printer.print(&RemovedView { name: name.to_string(), deleted_leases })?;
            Ok(Outcome::Ok)
        }
        Args::Verify { names } => verify::run(context, names).await,
    }
}

/// An error if this host's agent uses the same etcd and has endpoints in the network.
pub(super) async fn refuse_own_endpoints(context: &Context, etcd: &EtcdArgs, name: &NetworkName) -> Result<(), CommandError> {
    let client = context.client.clone().with_timeout(AGENT_TIMEOUT);
    let Ok(status) = client.status().await else { return Ok(()) };
    let same_prefix = status.store.prefix.trim_end_matches('/') == etcd.prefix.trim_end_matches('/');
    if !same_prefix || !status.store.endpoints.iter().any(|server| etcd.endpoints.contains(server)) {
        return Ok(());
    }
    let client = client.of_network(name);
    let endpoints = client.endpoints().await.map(|answer| answer.endpoints).unwrap_or_default();
    if endpoints.is_empty() {
        return Ok(());
    }
    let message = format!(
        "network {name} has endpoints on this host: {}; `overlayctl detach NAME --network {name}` each of them first",
        joined(endpoints.iter().map(|endpoint| &endpoint.name))
    );
    Err(CommandError::InUse { message })
}

async fn write(
    context: &Context,
    etcd: &EtcdArgs,
    name: &NetworkName,
    kind: WriteKind,
    options: &NetworkOptions,
) -> Result<Outcome, CommandError> {
    let change = options.change(name, kind).map_err(|message| CommandError::Usage { message })?;
    let etcd = config::resolve_endpoints(context, etcd).await;
    let WrittenNetwork { key, record, before, changed, .. } = match etcd.write_network(name, kind, &change).await {
        Err(EtcdError::Network(NetworkError::Invalid { name, errors })) => {
            config::print_errors(&format!("network {name}"), &errors);
            eprintln!("overlayctl: nothing was written");
            return Ok(Outcome::Negative);
        }
        other => other?,
    };
    config::print_warnings(&record.warnings);
    if changed && !change.cidrs.is_empty() {
        warn_of_collisions(&record).await;
    }
    context.printer.print(&config::SetView { key, changed, before, now: config::summary(&record.config) })?;
    Ok(Outcome::Ok)
}

/// Warns of this host's routes into the network. The agents of the other hosts check theirs.
async fn warn_of_collisions(record: &NetworkRecord) {
    if record.isolated {
        return;
    }
    let style = Style::for_stream(&std::io::stderr());
    for finding in route_collisions(&record.config).await {
        eprintln!("{} {}: {}", style.paint(Tone::Warning, "warning:"), finding.summary, finding.remedy);
    }
}

async fn list(context: &Context, etcd: &EtcdArgs) -> Result<Outcome, CommandError> {
    let networks = etcd.networks().await?;
    let networks = networks.set.networks.keys().map(|name| NetworkView::new(name, &networks.set)).collect();
    context.printer.print(&ListView { networks })?;
    Ok(Outcome::Ok)
}

async fn inspect(context: &Context, etcd: &EtcdArgs, name: &NetworkName) -> Result<Outcome, CommandError> {
    let networks = etcd.networks().await?;
    if !networks.set.networks.contains_key(name) {
        return Err(EtcdError::from(networks.missing(name)).into());
    }
    let own = etcd.of_network(name)?;
    let mut view = NetworkView::new(name, &networks.set);
    view.key = Some(own.config_key());
    view.subnets = Some(own.subnets().await?.subnets);
    let valid = view.errors.is_empty();
    context.printer.print(&view)?;
    Ok(if valid { Outcome::Ok } else { Outcome::Negative })
}
