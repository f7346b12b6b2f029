//! The commands: one file each, with its arguments and what it does.

pub mod attach;
pub mod check;
pub mod completions;
pub mod config;
pub mod detach;
pub mod docker_options;
pub mod endpoints;
pub mod graph;
pub mod inspect;
pub mod lab;
pub mod man;
pub mod mesh;
pub mod peers;
pub mod ping_mesh;
pub mod run;
pub mod status;
pub mod subnets;
pub mod support_bundle;
pub mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::bundle::BundleError;
use crate::client::{Client, ClientError, DEFAULT_SOCKET};
use crate::docker::DockerError;
use crate::etcd::EtcdError;
use crate::lab::LabError;
use crate::netns::NamespaceError;
use crate::output::{Format, OutputError, Printer};
use crate::resolver::ResolverError;
use crate::trace::TraceError;

/// See and steer the overlay network of this host.
#[derive(Debug, Parser)]
#[command(name = "overlayctl", version, propagate_version = true, max_term_width = 110)]
#[command(after_help = "Exit codes: 0 well, 1 error, 2 usage, 3 degraded, 4 timed out.")]
pub struct Cli {
    /// The agent's socket
    #[arg(long, global = true, value_name = "PATH", env = "OVERLAYD_SOCKET", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// The shape of the output
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Every host's subnet, from the agent or straight from etcd
    Subnets(subnets::Args),
    /// How this host reaches each peer
    Peers(peers::Args),
    /// The agent's health
    Status(status::Args),
    /// The network's configuration in etcd
    #[command(subcommand)]
    Config(config::Args),
    /// Attach a container's network namespace to the overlay
    Attach(attach::Args),
    /// Run a command in a fresh network namespace on the overlay
    Run(run::Args),
    /// Detach a container
    Detach(detach::Args),
    /// The containers of this host
    Endpoints(endpoints::Args),
    /// The network of this host in detail: addresses, devices, ports, containers, counters
    Inspect(inspect::Args),
    /// The overlay as a picture: hosts, subnets, containers, links
    Graph(graph::Args),
    /// What on this host stands in the way, and what to do about it
    Check(check::Args),
    /// Which host reaches which, over overlay and underlay, by the agents' probes
    Mesh(mesh::Args),
    /// Probe every peer from this host now
    PingMesh(ping_mesh::Args),
    /// The way a packet takes, hop by hop, from the kernel's own answers
    Trace(trace::Args),
    /// State, logs, what the kernel holds and versions in one archive, without secrets
    SupportBundle(support_bundle::Args),
    /// What dockerd has to be told so that its containers are on the overlay
    DockerOptions(docker_options::Args),
    /// Several hosts on this machine, each with its own agent, and a private etcd
    #[command(subcommand)]
    Lab(lab::Args),
    /// Completions for a shell
    Completions(completions::Args),
    /// Manual pages
    Man(man::Args),
}

/// How a command ended that did what it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Exit code 0.
    Ok,
    /// Exit code 1: the answer is no.
    Negative,
    /// Exit code 3.
    Degraded,
    /// Exit code 4.
    TimedOut,
    /// The exit code of a command that ran inside a lab or a container.
    Code(u8),
}

/// Why a command did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The agent.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// etcd.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// The lab.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A network namespace.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// A resolver file.
    #[error(transparent)]
    Resolver(#[from] ResolverError),
    /// The archive.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The way of a packet.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// Docker's options.
    #[error(transparent)]
    Docker(#[from] DockerError),
    /// Standard output.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A file that was named.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file or directory that cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// There is no such thing.
    #[error("{message}")]
    Missing {
        /// What is not there, and where to look.
        message: String,
    },
    /// The arguments are well-formed but make no sense together; exit code 2.
    #[error("{message}")]
    Usage {
        /// What is wrong, and what to write instead.
        message: String,
    },
}

/// What every command gets.
#[derive(Debug)]
pub struct Context {
    /// The agent.
    pub client: Client,
    /// Standard output.
    pub printer: Printer,
}

/// Runs the command of a command line.
pub async fn run(cli: Cli) -> Result<Outcome, CommandError> {
    let context = Context { client: Client::new(cli.socket), printer: Printer::new(cli.output) };
    match cli.command {
        Command::Subnets(args) => subnets::run(&context, &args).await,
        Command::Peers(args) => peers::run(&context, &args).await,
        Command::Status(args) => status::run(&context, &args).await,
        Command::Config(args) => config::run(&context, &args).await,
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
        Command::Completions(args) => completions::run(&context, &args),
        Command::Man(args) => man::run(&context, &args),
    }
}

/// Tells an error on standard error and turns the result into the exit code.
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
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_work_before_and_after_subcommand() {
        let cli = Cli::try_parse_from(["overlayctl", "-o", "json", "peers", "--socket", "/x"]).expect("a command line");
        assert_eq!((cli.output, cli.socket), (Format::Json, PathBuf::from("/x")));
    }
}
