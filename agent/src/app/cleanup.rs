//! `overlayd_command run_cleanup`: removes what the agent made on the host, and gives its lease back.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};

use super::{SOCKET_NAME, preflight, store_config};
use crate::config::HostConfig;
use crate::kernel::{Kernel, KernelOptions};
use crate::plan::diff::diff;
use crate::plan::{DataPath, Key, LinkKind, Op, PortDriver, State, Value};
use crate::state::{DirLock, HostState, StateDir};
use crate::store;

/// How long etcd may take to give the lease back.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

/// Removes everything: endpoints' interfaces, devices, routes and next hops of our protocol number, rules, changed sysctls, the lease, the state.
/// Goes on over errors and names them all at the end; safe to repeat.
pub async fn cleanup(config: HostConfig) -> anyhow::Result<()> {
    preflight::check_capabilities()?;
    let run_lock = DirLock::acquire(&config.run_dir).context("cleanup needs the agent stopped")?;
    let _namespace_lock = preflight::lock_namespace().context("cleanup needs the agent stopped")?;
    let state = StateDir::open(&config.state_dir)?;
    let mut failures: Vec<String> = Vec::new();
    let host = state.load_host().unwrap_or_else(|error| {
        failures.push(format!("what this host remembers is lost, its sysctls stay as they are: {error}"));
        HostState::default()
    });
    clean_kernel(&host, &mut failures).await?;
    release_lease(&config, &state, &mut failures).await;
    let files = [config.subnet_file.clone(), config.run_dir.join(SOCKET_NAME)];
    for path in &files {
        remove_file(path, &mut failures);
    }
    if failures.is_empty() {
        // The identity goes last, so that a repeated cleanup still knows which lease is this host's.
        if let Err(error) = state.remove() {
            failures.push(error.to_string());
        }
        drop(run_lock);
        remove_file(&config.run_dir.join("overlayd.lock"), &mut failures);
        // Where others put files of theirs the directory stays, which is no failure.
        let _ = std::fs::remove_dir(&config.run_dir);
    }
    if failures.is_empty() {
        tracing::info!("nothing of the agent is left on this host");
        return Ok(());
    }
    bail!("cleanup is not complete; mend this and repeat it:\n  {}", failures.join("\n  "))
}

async fn clean_kernel(host: &HostState, failures: &mut Vec<String>) -> anyhow::Result<()> {
    let (mut kernel, _events, _follow) = Kernel::open(&KernelOptions::default())?;
    let port_manager = kernel.port_manager();
    let actual = kernel.dump().await.context("the kernel's state cannot be read")?;
    for (key, value) in &actual {
        if let (Key::Link(name), Value::Link(link)) = (key, value)
            && link.kind == LinkKind::Port
            && let Err(error) = port_manager.detach_port(name).await
        {
            failures.push(format!("{key}: {error}"));
        }
    }
    let mut batch = diff(&State::new(), &actual);
    // Switched back last: until then nothing else differs for the host's other traffic. Those of interfaces that are gone went with them.
    let present =
        kernel.watch_sysctls(host.sysctls.keys().cloned().collect()).await.context("the host's settings cannot be read")?;
    let before = host.sysctls.iter().map(|(path, value)| (Key::Sysctl(path.clone().into()), Value::Sysctl(value.clone().into())));
    batch.extend(
        before.filter(|(key, _)| key.device().is_none() && present.contains_key(key)).map(|(key, value)| Op::Set(key, value)),
    );
    let report = kernel.apply(&batch).await;
    for (index, error) in report.failed {
        failures.push(format!("{}: {error}", batch.get(index).map(ToString::to_string).unwrap_or_default()));
    }
    tracing::info!(entries = batch.len(), "kernel state removed");
    Ok(())
}

async fn release_lease(config: &HostConfig, state: &StateDir, failures: &mut Vec<String>) {
    let id = match state.node_id() {
        Ok(id) => id,
        Err(error) => {
            failures.push(error.to_string());
            return;
        }
    };
    match tokio::time::timeout(RELEASE_TIMEOUT, store::release(&store_config(&config.etcd), &id)).await {
        Ok(Ok(done)) => {
            for key in done.released {
                tracing::info!(key, "lease given back");
            }
            for key in done.reservations {
                tracing::info!(key, "reservation kept: it is its owner's to delete");
            }
        }
        Ok(Err(error)) => failures.push(format!("the lease in etcd is not given back: {error}")),
        Err(_) => failures.push(format!(
            "the lease in etcd is not given back: no answer within {} s; without it the lease ends by itself a day after its last renewal",
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
