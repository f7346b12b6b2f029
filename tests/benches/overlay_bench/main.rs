//! `overlay-bench`: what the agent costs, each figure beside its baseline from the same run.
//!
//! | module | holds |
//! | --- | --- |
//! | `synthetic_leases`, `start`, `join`, `churn`, `run_batch`, `fleet`, `memory`, `attach_filter`, `data` | one measurement each |
//! | `stats`, `report` | samples to medians and spreads, rows to a table or JSON |
//! | `draw`, `chart` | reports to pictures, curves to SVG |
//! | `member` | peers as leases, as the store's entries and as the kernel's |
//! | `rtnl`, `limit` | a minimal rtnetlink, and the raw limit made of it |
//! | `driver` | the agent's path without its process |
//! | `netns_guard`, `bench_lab` | a namespace, a lab full of leases |
//! | `process_stats` | what a process has used, what agents and etcd say of themselves |
//!
//! It needs root (network namespaces of its own), iproute2 and, for all but `synthetic_leases`, etcd and an `overlayd_command` of the same profile.
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
    /// Print JSON in place of the table; `docs/performance.md` has its fields
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    measurement: Measurement,
}

#[derive(Debug, Subcommand)]
enum Measurement {
    /// Peers that come in one snapshot and go in another, until the last route is in the kernel or gone from it; baseline: raw netlink
    Peers(peers::PeersArguments),
    /// An agent's process begun, until the overlay is in place, in an empty kernel and in one where all is in place; baseline: etcdctl and raw netlink
    Start(start::StartArguments),
    /// A lease put into etcd, until it is a route in every host's kernel; baseline: a bare watcher
    Join(join::JoinArguments),
    /// Leases that change all the time; baseline: a bare watcher, and the begin of the run
    Churn(churn::ChurnArguments),
    /// Foreign routes and links that come and go by the thousand; baseline: who makes them
    Storm(storm::StormArguments),
    /// Real agents by the hundred on one etcd; baseline: the smallest number of them
    Fleet(fleet::FleetArguments),
    /// Resident memory of an agent; baseline: the same agent without peers
    Memory(memory::MemoryArguments),
    /// A container attached and detached, by the socket and by the CNI plugin; baseline: Debian's plugins bridge and host-local
    Attach(attach::AttachArguments),
    /// What passes between containers, and what the rules cost; baseline: the hosts, a plain bridge, the same way without rules
    Data(data::DataArguments),
    /// Pictures from what the others printed with --json
    Draw(draw::DrawArguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Measurement::Draw(arguments) = &arguments.measurement {
        return run_draw(arguments);
    }
    let printed = measure(&arguments.measurement).and_then(|report| {
        let text = if arguments.json { report.json()? } else { report.table() };
        // A reader that has seen enough is no error.
        let _closed = writeln!(std::io::stdout(), "{text}");
        Ok(report)
    });
    match printed {
        Ok(report) if report.goals_met() => ExitCode::SUCCESS,
        // As `overlayctl` has it: it works, but not as well as it should.
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
        Measurement::Draw(_) => {}
    }
    report.finish();
    Ok(report)
}

/// Tells a person what is being done.
fn progress(text: &str) {
    eprintln!("# {text}");
}
