//! `networks`: isolated networks on one host: many of them, a new one until its first packet, and throughput in one.

mod first_packet;
mod many;
mod paths;

use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use overlay_agent::model::api::Status;
use overlayctl::lab::Host;

use super::process_stats::agent_json;
use super::report::Report;

/// Options of the measurement.
#[derive(Debug, Args)]
pub struct NetworksArguments {
    /// Number of isolated networks; may be given several times, the smallest first
    #[arg(long, value_name = "N", default_values_t = [1, 10, 100])]
    networks: Vec<u16>,
    /// Number of leases in each network besides the host's own
    #[arg(long, value_name = "N", default_value_t = 100)]
    peers: u32,
    /// Agents started for each number of networks; 0 omits them
    #[arg(long, value_name = "K", default_value_t = 3)]
    runs: usize,
    /// Do not count wake-ups, which takes more than a minute for each number of networks
    #[arg(long)]
    no_wakes: bool,
    /// New networks with a first container; 0 omits them
    #[arg(long, value_name = "K", default_value_t = 40)]
    samples: usize,
    /// Turns through all paths; 0 omits them
    #[arg(long, value_name = "K", default_value_t = 15)]
    turns: usize,
    /// Milliseconds of each load in a turn; a fifth of it for a single operation
    #[arg(long, value_name = "MS", default_value_t = 500)]
    time: u64,
}

/// Runs the measurement.
pub fn measure(arguments: &NetworksArguments, report: &mut Report) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    if arguments.runs > 0 {
        many::measure(arguments, &runtime, report)?;
    }
    if arguments.samples > 0 {
        first_packet::measure(arguments.samples, &runtime, report)?;
    }
    if arguments.turns > 0 {
        paths::measure(arguments.turns, Duration::from_millis(arguments.time.max(10)), &runtime, report)?;
    }
    Ok(())
}

/// Runs `overlayctl` on a host against its agent, as an operator does. It finds etcd by the agent.
pub fn run_overlayctl(host: &Host<'_>, arguments: &[&str]) -> anyhow::Result<()> {
    let program = std::env::current_exe()?.with_file_name("overlayctl");
    ensure!(
        program.is_file(),
        "{} is needed: build it with the same profile (cargo build --release --workspace)",
        program.display()
    );
    let (program, socket) = (program.to_string_lossy().into_owned(), host.socket().to_string_lossy().into_owned());
    let command = [&[program.as_str(), "--socket", &socket], arguments].concat();
    let output = host.exec(&command).with_context(|| format!("cannot run {program}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "overlayctl {}: {}", arguments.join(" "), stderr.trim());
    Ok(())
}

/// Reads the status of one of a host's networks.
pub fn network_status(host: &Host<'_>, network: &str) -> anyhow::Result<Status> {
    Ok(serde_json::from_value(agent_json(&host.socket(), &format!("/v1/networks/{network}/status"))?)?)
}
