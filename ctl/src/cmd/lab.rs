//! `overlayctl lab`: several hosts on this machine.
//!
//! Without root each command re-executes itself inside the lab's namespaces ([`rootless`]). `lab up` starts their supervisor
//! first; `lab down` ends the supervisor and every other process inside.

mod view;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use overlay_agent::model::{Cidr, PerFamily};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{CommandError, Context, Outcome};
use crate::lab::down::TeardownSummary;
use crate::lab::{Families, Lab, LabError, LabName, LabOptions, LabsDir, Progress, check, down, rootless, status};
use crate::output::{Style, Tone};
use view::{CheckView, DownView, StatusView};

/// The arguments.
#[derive(Debug, clap::Subcommand)]
pub enum Args {
    /// Start a lab: hosts, a switch between them, an outside world, etcd, one agent per host, containers
    Up(UpArgs),
    /// Stop a lab and remove its processes, namespaces and files
    Down {
        /// Lab to stop
        #[command(flatten)]
        name: NameArg,
        /// Stop every lab of this user
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// Show the hosts of a lab, their agents, subnets and containers
    Status {
        /// Lab to show
        #[command(flatten)]
        name: NameArg,
    },
    /// Run a command inside a lab
    #[command(after_help = "overlayctl lab exec h1 -- overlayctl peers\noverlayctl lab exec h1-c1 -- ip address")]
    Exec {
        /// Lab to run in
        #[command(flatten)]
        name: NameArg,
        /// Host (h1), container (h1-c1, h1-net1-c1), a host's isolated network (h1.net1), net (switch and etcd) or world (outside)
        target: String,
        /// Command and its arguments
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Check that every container reaches every other of its network (with its own address) and the world (with its host's
    /// address), and none of another network
    Check {
        /// Lab to check
        #[command(flatten)]
        name: NameArg,
    },
    /// Hold the namespaces of a lab without root
    #[command(hide = true)]
    Supervisor {
        /// Directory of the lab
        #[arg(long)]
        directory: PathBuf,
    },
}

/// Selects a lab.
#[derive(Debug, Clone, clap::Args)]
pub struct NameArg {
    /// Name of the lab: 1 to 12 of a-z 0-9
    #[arg(long, env = "OVERLAY_LAB", default_value = "lab")]
    name: LabName,
}

/// The arguments of `lab up`.
#[derive(Debug, clap::Args)]
pub struct UpArgs {
    #[command(flatten)]
    name: NameArg,
    /// Number of hosts
    #[arg(long, default_value_t = 3)]
    hosts: u16,
    /// Containers per host and network
    #[arg(long, default_value_t = 2)]
    containers: u16,
    /// Number of isolated networks beside the default one: net1, net2, ..., all with 10.0.0.0/16 (fd00:10::/56)
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    networks: u16,
    /// Address families of underlay and overlay
    #[arg(long, value_enum, default_value_t = Families::V4)]
    family: Families,
    /// Overlay network; once per family
    #[arg(long, value_name = "CIDR")]
    network: Vec<Cidr>,
    /// Start hosts, switch, world and etcd only
    #[arg(long)]
    no_agents: bool,
    /// The agent's binary [default: next to overlayctl, else in PATH]
    #[arg(long, value_name = "PATH", env = "OVERLAYD_BIN")]
    overlayd: Option<PathBuf>,
    /// Flag for each agent, such as --agent-arg=--log-level=debug
    #[arg(long = "agent-arg", value_name = "FLAG", allow_hyphen_values = true)]
    agent_args: Vec<String>,
}

/// Runs the command, if necessary again inside the lab's namespaces.
pub async fn run(context: &Context, args: Args) -> Result<Outcome, CommandError> {
    let labs_dir = LabsDir::for_user();
    let enter = rootless::is_needed();
    if rootless::is_inside() {
        rootless::restore_directory();
    }
    match args {
        Args::Supervisor { directory } => match rootless::run_supervisor(&directory)? {},
        Args::Up(args) if enter => up_rootless(&labs_dir, &args),
        Args::Up(args) => up(context, &labs_dir, &args).await,
        Args::Down { name, all } => down_all(context, &labs_dir, if all { labs_dir.labs()? } else { vec![name.name] }),
        Args::Status { name } | Args::Check { name } | Args::Exec { name, .. } if enter => run_inside(&labs_dir, &name.name),
        Args::Status { name } => {
            let lab = Lab::open(&labs_dir, &name.name)?;
            context.printer.print(&StatusView(&status::status(&lab).await))?;
            Ok(Outcome::Ok)
        }
        Args::Check { name } => run_check(context, &Lab::open(&labs_dir, &name.name)?).await,
        Args::Exec { name, target, command } => exec(&Lab::open(&labs_dir, &name.name)?, &target, &command),
    }
}

/// Builds the lab's options from the arguments.
fn options(args: &UpArgs) -> Result<LabOptions, CommandError> {
    let mut networks: PerFamily<Cidr> = PerFamily::default();
    for network in &args.network {
        if let Some(before) = networks.slot(network.family()).replace(*network) {
            let message = format!("--network {before} and --network {network}: a lab has one {} network", network.family());
            return Err(CommandError::Usage { message });
        }
    }
    Ok(LabOptions {
        hosts: args.hosts,
        containers: if args.no_agents { 0 } else { args.containers },
        isolated: args.networks,
        families: args.family,
        networks,
        agents: !args.no_agents,
        overlayd: args.overlayd.clone(),
        agent_args: args.agent_args.clone(),
        ..LabOptions::new(args.name.name.clone())
    })
}

async fn up(context: &Context, labs_dir: &LabsDir, args: &UpArgs) -> Result<Outcome, CommandError> {
    let options = options(args)?;
    let report = |elapsed: Duration, text: &str| {
        let style = Style::for_stream(&std::io::stderr());
        eprintln!("{} {text}", style.paint(Tone::Quiet, &format!("{:>6.2}s", elapsed.as_secs_f64())));
    };
    let (mut interrupt, mut terminate) = (signal_stream(SignalKind::interrupt())?, signal_stream(SignalKind::terminate())?);
    // An interrupted start leaves nothing behind. The lab's name is enough to find what to remove.
    let code = tokio::select! {
        lab = Lab::up(labs_dir, &options, Progress::new(&report)) => {
            context.printer.print(&StatusView(&status::status(&lab?).await))?;
            return Ok(Outcome::Ok);
        }
        _ = interrupt.recv() => 130,
        _ = terminate.recv() => 143,
    };
    eprintln!("overlayctl: removing the incomplete lab");
    down::down(&labs_dir.lab_dir(&options.name), &options.name)?;
    Ok(Outcome::Code(code))
}

fn signal_stream(kind: SignalKind) -> Result<Signal, CommandError> {
    Ok(signal(kind).map_err(|source| LabError::Spawn { program: "a signal handler".to_owned(), source })?)
}

/// Starts a supervisor and starts the lab inside its namespaces.
fn up_rootless(labs_dir: &LabsDir, args: &UpArgs) -> Result<Outcome, CommandError> {
    let name = &args.name.name;
    // Rejects bad options before anything is created.
    crate::lab::Layout::new(&options(args)?)?;
    if labs_dir.read_layout(name).is_ok() || rootless::supervisor(labs_dir, name).is_some() {
        return Err(LabError::Exists { name: name.to_string(), dir: labs_dir.lab_dir(name) }.into());
    }
    rootless::start_supervisor(labs_dir, name)?;
    let outcome = run_inside(labs_dir, name);
    if !matches!(outcome, Ok(Outcome::Ok)) {
        rootless::down(labs_dir, name)?;
    }
    outcome
}

/// Runs this command again inside the lab.
fn run_inside(labs_dir: &LabsDir, name: &LabName) -> Result<Outcome, CommandError> {
    // The command inside handles an interrupt; this process only waits for its end.
    let _signal_streams = (signal_stream(SignalKind::interrupt())?, signal_stream(SignalKind::terminate())?);
    Ok(match rootless::enter(labs_dir, name)? {
        0 => Outcome::Ok,
        code => Outcome::Code(code),
    })
}

fn down_all(context: &Context, labs_dir: &LabsDir, names: Vec<LabName>) -> Result<Outcome, CommandError> {
    let mut first_error = None;
    let mut views = Vec::new();
    for name in names {
        match down_one(labs_dir, &name) {
            Ok(removed) => views.push(DownView { name: name.to_string(), removed }),
            Err(error) => {
                // Every lab is tried. The first error is the result; the others are printed at once.
                if let Some(before) = first_error.replace(error) {
                    eprintln!("overlayctl: {before}");
                }
            }
        }
    }
    for view in &views {
        context.printer.print(view)?;
    }
    if views.is_empty() && first_error.is_none() {
        eprintln!("no lab is running");
    }
    first_error.map_or(Ok(Outcome::Ok), Err)
}

fn down_one(labs_dir: &LabsDir, name: &LabName) -> Result<TeardownSummary, CommandError> {
    if rootless::is_inside() {
        let message = "this process runs inside a rootless lab: run `overlayctl lab down` outside".to_owned();
        return Err(CommandError::Usage { message });
    }
    Ok(if rootless::is_needed() { rootless::down(labs_dir, name)? } else { down::down(&labs_dir.lab_dir(name), name)? })
}

/// Replaces this process by the command, inside the target's namespace.
fn exec(lab: &Lab, target: &str, command: &[OsString]) -> Result<Outcome, CommandError> {
    let netns = lab.netns(target)?;
    let mut prepared = lab.command(target, command)?;
    let program = prepared.get_program().to_string_lossy().into_owned();
    setns(&netns, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| LabError::Spawn { program: program.clone(), source: errno.into() })?;
    let source = prepared.exec();
    let error = LabError::Spawn { program, source };
    eprintln!("overlayctl: {error}");
    // Exit codes of a shell: 127 not found, 126 not executable.
    let missing = matches!(&error, LabError::Spawn { source, .. } if source.kind() == std::io::ErrorKind::NotFound);
    Ok(Outcome::Code(if missing { 127 } else { 126 }))
}

async fn run_check(context: &Context, lab: &Lab) -> Result<Outcome, CommandError> {
    if std::io::stderr().is_terminal() {
        eprintln!("checking lab {}: every container calls every other one and the world outside", lab.layout().name);
    }
    let report = check::check(lab).await?;
    if report.containers.is_empty() {
        let message = format!("lab `{}` has no containers to check", lab.layout().name);
        return Err(LabError::Options { message }.into());
    }
    context.printer.print(&CheckView(&report))?;
    if report.ok {
        return Ok(Outcome::Ok);
    }
    let failed = report.overlay.iter().chain(&report.egress).filter(|c| c.error.is_some()).count();
    if failed > 0 {
        eprintln!("overlayctl: {failed} of {} calls failed", report.overlay.len() + report.egress.len());
    }
    let crossings = report.isolation.map_or(0, |isolation| isolation.crossings.len());
    if crossings > 0 {
        eprintln!(
            "overlayctl: {crossings} datagrams reached another network: `overlayctl network verify` on the hosts says by which way"
        );
    }
    Ok(Outcome::Negative)
}
