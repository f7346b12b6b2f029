//! `overlay-bench`: the agent's costs, each next to a baseline from the same run.
//!
//! | module | holds |
//! | --- | --- |
//! | `peers`, `start`, `join`, `churn`, `storm`, `fleet`, `memory`, `attach`, `data`, `networks` | one measurement each |
//! | `stats`, `report` | samples to medians and spreads, rows to a table or JSON |
//! | `draw`, `chart` | reports to charts, curves to SVG |
//! | `synthetic_peer` | peers as leases, as the store's entries and as kernel entries |
//! | `rtnl`, `raw_netlink` | a minimal rtnetlink, and the raw limit measured with it |
//! | `driver` | the agent's data path without its process |
//! | `netns_guard`, `bench_lab` | a namespace, a lab with many leases |
//! | `process_stats` | the usage of a process, the metrics of agents and etcd |
//!
//! It needs root (for network namespaces), iproute2 and, for all but `peers`, etcd and an `overlayd` of the same profile.
//! `docs/performance.md` shows results and how to repeat them.

mod attach;
mod bench_lab;
mod chart;
mod churn;
mod data;
mod draw;
mod driver;
mod fleet;
mod join;
mod memory;
mod netns_guard;
mod networks;
mod peers;
mod process_stats;
mod raw_netlink;
mod report;
mod rtnl;
mod start;
mod stats;
mod storm;
mod synthetic_peer;

use std::io::Write;
use std::process::ExitCode;

use anyhow::ensure;
use clap::{Parser, Subcommand};

use report::Report;

/// Measures the agent against its baselines on this machine.
#[derive(Debug, Parser)]
#[command(name = "overlay-bench", version)]
struct Arguments {
    /// Print JSON instead of the table; `docs/performance.md` documents its fields
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    measurement: Measurement,
}

#[derive(Debug, Subcommand)]
enum Measurement {
    /// Peers added by one snapshot and removed by another, until the last route is in the kernel or gone; baseline: raw netlink
    Peers(peers::PeersArguments),
    /// Start of an agent's process until the overlay is in place, with an empty and with a complete kernel; baseline: etcdctl and
    /// raw netlink
    Start(start::StartArguments),
    /// A lease put into etcd until it is a route in every host's kernel; baseline: a bare watcher
    Join(join::JoinArguments),
    /// Continuous changes of leases; baseline: a bare watcher, and the begin of the run
    Churn(churn::ChurnArguments),
    /// Thousands of foreign routes and links, added and removed; baseline: the process that makes them
    Storm(storm::StormArguments),
    /// Hundreds of real agents on one etcd; baseline: the smallest number of them
    Fleet(fleet::FleetArguments),
    /// Resident memory of an agent; baseline: the same agent without peers
    Memory(memory::MemoryArguments),
    /// Attach and detach of a container, by the socket and by the CNI plugin; baseline: Debian's plugins bridge and host-local
    Attach(attach::AttachArguments),
    /// Throughput between containers, and cost of the rules; baseline: the hosts, a plain bridge, the same path without rules
    Data(data::DataArguments),
    /// Many isolated networks on a host, a new one until its first packet, and throughput in one; baseline: one network, and the
    /// default network
    Networks(networks::NetworksArguments),
    /// Charts from the output of the other sub-commands with --json
    Draw(draw::DrawArguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Measurement::Draw(arguments) = &arguments.measurement {
        return run_draw(arguments);
    }
    let result = measure(&arguments.measurement).and_then(|report| {
        let text = if arguments.json { report.json()? } else { report.table() };
        // A closed standard output is not an error.
        let _closed = writeln!(std::io::stdout(), "{text}");
        Ok(report)
    });
    match result {
        Ok(report) if report.goals_met() => ExitCode::SUCCESS,
        // As in `overlayctl`: it works, but not as well as it should.
        Ok(_) => ExitCode::from(3),
        Err(error) => {
            eprintln!("overlay-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_draw(arguments: &draw::DrawArguments) -> ExitCode {
    match draw::draw(arguments) {
        Ok(files) => {
            let _closed = write!(std::io::stdout(), "{files}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("overlay-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(measurement: &Measurement) -> anyhow::Result<Report> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces are needed: run it as root (sudo target/release/overlay-bench ...)"
    );
    if cfg!(debug_assertions) {
        progress("built without optimisation: the figures say nothing about a release (cargo run --release ...)");
    }
    let mut report = Report::new();
    match measurement {
        Measurement::Peers(arguments) => peers::measure(arguments, &mut report)?,
        Measurement::Start(arguments) => start::measure(arguments, &mut report)?,
        Measurement::Join(arguments) => join::measure(arguments, &mut report)?,
        Measurement::Churn(arguments) => churn::measure(arguments, &mut report)?,
        Measurement::Storm(arguments) => storm::measure(arguments, &mut report)?,
        Measurement::Fleet(arguments) => fleet::measure(arguments, &mut report)?,
        Measurement::Memory(arguments) => memory::measure(arguments, &mut report)?,
        Measurement::Attach(arguments) => attach::measure(arguments, &mut report)?,
        Measurement::Data(arguments) => data::measure(arguments, &mut report)?,
        Measurement::Networks(arguments) => networks::measure(arguments, &mut report)?,
        Measurement::Draw(_) => {}
    }
    report.finish();
    Ok(report)
}

/// Prints the current step on standard error.
fn progress(text: &str) {
    eprintln!("# {text}");
}
