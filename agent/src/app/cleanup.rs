//! `overlayd cleanup`: removes everything the agent created on the host and releases its lease.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};

use super::{SOCKET_NAME, preflight, store_config};
use crate::config::HostConfig;
use crate::kernel::netns::Netns;
use crate::kernel::{Kernel, KernelOptions, delete_network_netns};
use crate::model::NetworkName;
use crate::plan::actual::ActualState;
use crate::plan::diff::diff;
use crate::plan::state::Entries;
use crate::plan::{DataPath, Key, LinkKind, Op, PortDriver, State, Value};
use crate::state::{DirLock, HostState, StateDir};
use crate::store::{self, StoreConfig};

/// Time limit for the release of the lease in etcd.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

/// Removes everything the agent created on this host and restores changed sysctls.
///
/// Removes endpoints' interfaces, devices, routes and next hops with our protocol number, rules, the lease and the state.
/// Continues after errors and returns all of them at the end; safe to repeat. With `only`, leaves just these named networks: their
/// namespaces, leases and states are removed, and the next start removes their entries from the host's namespace.
pub async fn cleanup(config: HostConfig, only: &[NetworkName]) -> anyhow::Result<()> {
    preflight::check_capabilities()?;
    let run_lock = DirLock::acquire(&config.run_dir).context("cleanup needs the agent stopped")?;
    let _namespace_lock = preflight::lock_namespace().context("cleanup needs the agent stopped")?;
    let state = StateDir::open(&config.state_dir)?;
    let mut failures: Vec<String> = Vec::new();
    if !only.is_empty() {
        leave_networks(&config, &state, only, &mut failures).await?;
        return report(&failures);
    }
    let host = state.load_host().unwrap_or_else(|error| {
        failures.push(format!("the saved host state cannot be read, changed sysctls are not restored: {error}"));
        HostState::default()
    });
    clean_kernel(&host, &mut failures).await?;
    let networks = state.networks().unwrap_or_else(|error| {
        failures.push(format!("named networks are not left: {error}"));
        Vec::new()
    });
    leave_networks(&config, &state, &networks, &mut failures).await?;
    release_lease(&store_config(&config.etcd), &state, &mut failures).await;
    let files = [config.subnet_file.clone(), config.run_dir.join(SOCKET_NAME)];
    for path in &files {
        remove_file(path, &mut failures);
    }
    if failures.is_empty() {
        // The identity is removed last: a repeated cleanup needs it to find this host's lease.
        if let Err(error) = state.remove() {
            failures.push(error.to_string());
        }
        drop(run_lock);
        remove_file(&config.run_dir.join("overlayd.lock"), &mut failures);
        // A directory with foreign files stays; that is not a failure.
        let _ = std::fs::remove_dir(&config.run_dir);
    }
    report(&failures)
}

fn report(failures: &[String]) -> anyhow::Result<()> {
    if failures.is_empty() {
        tracing::info!("cleanup complete");
        return Ok(());
    }
    bail!("cleanup is not complete; fix these errors and repeat it:\n  {}", failures.join("\n  "))
}

/// Removes the namespaces, leases and states of named networks. The state of one that fails stays, so that cleanup can be repeated.
async fn leave_networks(
    config: &HostConfig,
    state: &StateDir,
    networks: &[NetworkName],
    failures: &mut Vec<String>,
) -> anyhow::Result<()> {
    let present = state.networks()?;
    for name in networks {
        if !present.contains(name) {
            let present: Vec<String> = present.iter().map(ToString::to_string).collect();
            failures.push(format!("this host is not in network {name}; it is in: {}", present.join(", ")));
            continue;
        }
        let before = failures.len();
        if let Err(error) = delete_network_netns(&format!("{}{name}", config.netns_prefix)) {
            failures.push(format!("the namespace of network {name} cannot be removed: {error}"));
        }
        release_lease(&store_config(&config.etcd).of_network(name)?, state, failures).await;
        if failures.len() == before
            && let Err(error) = state.network(name).and_then(StateDir::remove)
        {
            failures.push(error.to_string());
        }
    }
    Ok(())
}

async fn clean_kernel(host: &HostState, failures: &mut Vec<String>) -> anyhow::Result<()> {
    let (mut kernel, _events, _follow) = Kernel::open(&Netns::current()?, &KernelOptions::default())?;
    let port_manager = kernel.port_manager();
    let peers = kernel.dump().await.context("the kernel's state cannot be read")?.peers;
    let links = kernel.local().entries.clone();
    for (key, _) in links.links().filter(|(_, link)| link.kind == LinkKind::Port) {
        if let Key::Link(name) = key
            && let Err(error) = port_manager.detach_port(name).await
        {
            failures.push(format!("{key}: {error}"));
        }
    }
    let mut batch = diff(&State::new(), &ActualState { local: &kernel.local(), peers: &peers });
    // Sysctls are restored last, because they affect the host's other traffic. Sysctls of deleted interfaces no longer exist.
    kernel.watch_sysctls(host.sysctls.keys().cloned().collect()).await.context("the host's settings cannot be read")?;
    let saved_sysctls =
        host.sysctls.iter().map(|(path, value)| (Key::Sysctl(path.clone().into()), Value::Sysctl(value.clone().into())));
    batch.extend(
        saved_sysctls
            .filter(|(key, _)| key.device().is_none() && kernel.local().get(key).is_some())
            .map(|(key, value)| Op::Set(key, value)),
    );
    let report = kernel.apply(&batch).await;
    for (index, error) in report.failed {
        failures.push(format!("{}: {error}", batch.get(index).map(ToString::to_string).unwrap_or_default()));
    }
    tracing::info!(entries = batch.len(), "kernel state removed");
    Ok(())
}

async fn release_lease(config: &StoreConfig, state: &StateDir, failures: &mut Vec<String>) {
    let id = match state.node_id() {
        Ok(id) => id,
        Err(error) => {
            failures.push(error.to_string());
            return;
        }
    };
    match tokio::time::timeout(RELEASE_TIMEOUT, store::release(config, &id)).await {
        Ok(Ok(report)) => {
            for key in report.released {
                tracing::info!(key, "lease released");
            }
            for key in report.reservations {
                tracing::info!(key, "reservation kept; delete its key to end it");
            }
        }
        Ok(Err(error)) => failures.push(format!("the lease in etcd is not released: {error}")),
        Err(_) => failures.push(format!(
            "the lease in etcd is not released: no answer within {} s; the lease expires a day after its last renewal",
            RELEASE_TIMEOUT.as_secs()
        )),
    }
}

fn remove_file(path: &Path, failures: &mut Vec<String>) {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            failures.push(format!("{} cannot be removed: {error}", path.display()));
        }
        _ => {}
    }
}
