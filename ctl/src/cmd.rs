//! Commands of `overlayctl`: one file each, with arguments and execution.

pub mod attach;
mod attach_args;
pub mod check;
pub mod completions;
pub mod config;
mod context;
pub mod detach;
pub mod docker_options;
pub mod endpoints;
pub mod graph;
pub mod inspect;
pub mod lab;
pub mod man;
pub mod mesh;
pub mod network;
mod networks;
pub mod peers;
pub mod ping_mesh;
pub mod run;
pub mod status;
pub mod subnets;
pub mod support_bundle;
pub mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::client::{Client, DEFAULT_SOCKET};
use crate::output::{Format, OutputError, Printer};

pub use context::{CommandError, Context, Outcome};

/// Inspect and control the overlay network of this host.
#[derive(Debug, Parser)]
#[command(name = "overlayctl", version, propagate_version = true, max_term_width = 110)]
#[command(after_help = "Exit codes: 0 success, 1 error, 2 usage, 3 degraded, 4 timed out.")]
pub struct Cli {
    /// Path of the agent's socket
    #[arg(long, global = true, value_name = "PATH", env = "OVERLAYD_SOCKET", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// Output format
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// Command to run
    #[command(subcommand)]
    pub command: Command,
}

/// The command to run.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List every host's subnet, from the agent or directly from etcd
    Subnets(subnets::Args),
    /// List the peers and their data-path state
    Peers(peers::Args),
    /// Show the agent's health
    Status(status::Args),
    /// Show, set or validate the network configuration in etcd
    #[command(subcommand)]
    Config(config::Args),
    /// Create, list, change and remove networks in etcd
    #[command(subcommand)]
    Network(network::Args),
    /// Attach a container's network namespace to the overlay
    Attach(attach::Args),
    /// Run a command in a new network namespace on the overlay
    Run(run::Args),
    /// Detach a container
    Detach(detach::Args),
    /// List the containers of this host
    Endpoints(endpoints::Args),
    /// Show this host's network in detail: addresses, devices, ports, containers, counters
    Inspect(inspect::Args),
    /// Draw the overlay: hosts, subnets, containers, links
    Graph(graph::Args),
    /// Diagnose this host: findings with evidence and remedies
    Check(check::Args),
    /// Show reachability between hosts, over overlay and underlay, from the agents' probes
    Mesh(mesh::Args),
    /// Probe every peer from this host now
    PingMesh(ping_mesh::Args),
    /// Trace a packet's path hop by hop, from the kernel's own lookups
    Trace(trace::Args),
    /// Write one archive for support: state, logs, kernel state and versions, without secrets
    SupportBundle(support_bundle::Args),
    /// Print the dockerd options that put its containers on the overlay
    DockerOptions(docker_options::Args),
    /// Run several hosts on this machine, each with its own agent, and a private etcd
    #[command(subcommand)]
    Lab(lab::Args),
    /// Print shell completions
    Completions(completions::Args),
    /// Print or write the manual pages
    Man(man::Args),
}

/// Runs the parsed command.
pub async fn run(cli: Cli) -> Result<Outcome, CommandError> {
    let context = Context { client: Client::new(cli.socket), printer: Printer::new(cli.output) };
    match cli.command {
        Command::Subnets(args) => subnets::run(&context, &args).await,
        Command::Peers(args) => peers::run(&context, &args).await,
        Command::Status(args) => status::run(&context, &args).await,
        Command::Config(args) => config::run(&context, &args).await,
        Command::Network(args) => network::run(&context, &args).await,
        Command::Attach(args) => attach::run(&context, &args).await,
        Command::Run(args) => run::run(&context, &args).await,
        Command::Detach(args) => detach::run(&context, &args).await,
        Command::Endpoints(args) => endpoints::run(&context, &args).await,
        Command::Inspect(args) => inspect::run(&context, &args).await,
        Command::Graph(args) => graph::run(&context, &args).await,
        Command::Check(args) => check::run(&context, args).await,
        Command::Mesh(args) => mesh::run(&context, &args).await,
        Command::PingMesh(args) => ping_mesh::run(&context, &args).await,
        Command::Trace(args) => trace::run(&context, &args).await,
        Command::SupportBundle(args) => support_bundle::run(&context, &args).await,
        Command::DockerOptions(args) => docker_options::run(&context, &args).await,
        Command::Lab(args) => lab::run(&context, args).await,
        Command::Completions(args) => completions::run(&context, &args, Cli::command()),
        Command::Man(args) => man::run(&context, &args, Cli::command()),
    }
}

/// Prints an error to standard error and maps the result to the exit code.
pub fn finish(result: Result<Outcome, CommandError>) -> ExitCode {
    match result {
        Ok(Outcome::Ok) | Err(CommandError::Output(OutputError::Closed)) => ExitCode::SUCCESS,
        Ok(Outcome::Negative) => ExitCode::from(1),
        Ok(Outcome::Degraded) => ExitCode::from(3),
        Ok(Outcome::TimedOut) => ExitCode::from(4),
        Ok(Outcome::Code(code)) => ExitCode::from(code),
        Err(error) => {
            eprintln!("overlayctl: {error}");
            ExitCode::from(if matches!(error, CommandError::Usage { .. }) { 2 } else { 1 })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_work_before_and_after_subcommand() {
        let cli = Cli::try_parse_from(["overlayctl", "-o", "json", "peers", "--socket", "/x"]).expect("a command line");
        assert_eq!((cli.output, cli.socket), (Format::Json, PathBuf::from("/x")));
    }
}
