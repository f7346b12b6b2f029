//! `overlayctl run`: a command in a network namespace of its own on the overlay, from the first to the last.
//!
//! The command shares terminal and process group with us. What the terminal sends (Ctrl-C) reaches it by itself; what others send to us is
//! handed on. Whatever ends it, what was made is taken down after it.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpgrp, tcgetpgrp};
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Mode;
use overlay_agent::model::endpoint::EndpointName;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::{CommandError, Context, Outcome};
use crate::attach_args::AttachArgs;
use crate::client::ClientError;
use crate::netns::{NamedNamespaces, NamespaceError};
use crate::resolver::ResolverFile;

/// Exit codes of a shell: the command cannot be run, is not found, was ended by a signal (added to its number).
const EXIT_NOT_EXECUTABLE: u8 = 126;
const EXIT_NOT_FOUND: u8 = 127;
const EXIT_SIGNAL_BASE: i32 = 128;

/// How long an agent that is away at the end, because it starts anew, is waited for.
const DETACH_TIMEOUT: Duration = Duration::from_secs(15);
const DETACH_RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "overlayctl run --publish 8080:8000 -- python3 -m http.server")]
pub struct Args {
    /// The endpoint's name, unique on this host; made up where it is not given
    #[arg(long)]
    name: Option<EndpointName>,
    #[command(flatten)]
    attach: AttachArgs,
    /// The command, behind `--`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the command and answers its exit code.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    args.attach.request(None)?;
    // From here on no signal ends us before all is taken down.
    let mut signals = Signals::subscribe()?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => generate_name()?,
    };
    if context.client.endpoints().await?.endpoints.iter().any(|e| e.name == name) {
        let message = format!(
            "endpoint {name} is there already: choose another --name; a command in its namespace: overlayctl run --mode container:{name} -- ..."
        );
        return Err(CommandError::Usage { message });
    }
    let namespaces = NamedNamespaces::for_socket(context.client.socket(), &args.attach.prefix);
    let outcome = run_attached(context, args, &name, &namespaces, &mut signals).await;
    // The command's own outcome is what is asked for; only where it was well, a failure here counts.
    match (outcome, teardown(context, &name, &namespaces).await) {
        (Ok(Outcome::Code(0)) | Err(_), Err(error)) => Err(error),
        (outcome, Ok(())) => outcome,
        (outcome, Err(error)) => {
            eprintln!("overlayctl: {error}");
            outcome
        }
    }
}

/// Makes what is needed and runs the command in it. Whoever calls takes it down.
async fn run_attached(
    context: &Context,
    args: &Args,
    name: &EndpointName,
    namespaces: &NamedNamespaces,
    signals: &mut Signals,
) -> Result<Outcome, CommandError> {
    let attach = &args.attach;
    let created = if attach.has_namespace() { Some(namespaces.create(name)?) } else { None };
    let netns = created.as_ref().map(|_| namespaces.path(name));
    let own_file =
        netns.as_deref().and_then(|netns| ResolverFile::for_namespace(netns, name)).filter(|_| attach.mode == Mode::Overlay);
    let written = match &own_file {
        Some(file) => file.write(&attach.resolver, true)?,
        None => None,
    };
    let request = attach.request(netns)?;
    let attached = tokio::select! {
        attached = context.client.attach(name, &request) => attached?,
        Some(signal) = signals.next() => return Ok(signal_outcome(signal)),
    };
    let endpoint = attached.endpoint;
    // One that shares has the resolvers of whom it shares with.
    let file = match &endpoint.mode {
        Mode::Container(owner) => ResolverFile::for_namespace(&endpoint.netns, owner),
        _ => own_file,
    };
    let resolver = file.as_ref().and_then(ResolverFile::existing).filter(|_| endpoint.mode != Mode::Host);
    let mounts = MountSetup { resolver, private_mounts: endpoint.mode != Mode::Host };
    let netns = Netns::open(&endpoint.netns).map_err(NamespaceError::from)?;
    let outcome = match start(&netns, &mounts, &args.command)? {
        Ok(child) => wait(child, signals).await?,
        Err(error) => {
            eprintln!("overlayctl: cannot run {}: {error}", args.command.first().map_or("", String::as_str));
            let missing = error.kind() == io::ErrorKind::NotFound;
            Outcome::Code(if missing { EXIT_NOT_FOUND } else { EXIT_NOT_EXECUTABLE })
        }
    };
    // The agent takes its end down before the namespace goes.
    if let Some(made) = created {
        made.keep();
    }
    if let Some(written) = written {
        written.keep();
    }
    Ok(outcome)
}

/// What the command finds besides the network.
struct MountSetup<'a> {
    /// The file in place of `/etc/resolv.conf`.
    resolver: Option<&'a Path>,
    /// Whether it has mounts of its own.
    private_mounts: bool,
}

/// Starts the command on a thread inside; the inner error is about the command itself.
fn start(netns: &Netns, mounts: &MountSetup<'_>, words: &[String]) -> Result<io::Result<Child>, CommandError> {
    let runtime = tokio::runtime::Handle::current();
    let started = netns.run(|| {
        if mounts.private_mounts {
            set_up_mounts(mounts.resolver)?;
        }
        let _entered = runtime.enter();
        let (program, arguments) = words.split_first().map_or(("", &[][..]), |(program, rest)| (program.as_str(), rest));
        // A process inherits the namespaces of the thread that starts it.
        Ok(Command::new(program).args(arguments).spawn())
    });
    started.map_err(NamespaceError::from)?
}

/// Gives the calling thread mounts of its own, as `ip path exec` does: the resolver file, and the network devices of its namespace in `/sys`.
fn set_up_mounts(resolver: Option<&Path>) -> Result<(), CommandError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |errno: nix::Error| CommandError::Write { path, source: errno.into() }
    };
    let root = Path::new("/");
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed(root))?;
    // What is mounted on the host later is seen here as well, and nothing the other way round.
    mount(None::<&str>, root, None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>).map_err(failed(root))?;
    let usual = Path::new("/etc/resolv.conf");
    if let Some(file) = resolver.filter(|_| usual.exists()) {
        mount(Some(file), usual, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(failed(usual))?;
    }
    // In a user namespace it can be refused; few programs look there.
    let _without = mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::MS_RDONLY, None::<&str>);
    Ok(())
}

/// Waits for the command's end and hands on signals meanwhile.
async fn wait(mut child: Child, signals: &mut Signals) -> Result<Outcome, CommandError> {
    let id = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
    loop {
        tokio::select! {
            ended = child.wait() => {
                let status = ended.map_err(|source| CommandError::Read { path: "/proc".into(), source })?;
                return Ok(Outcome::Code(exit_code(status)));
            }
            Some(signal) = signals.next() => {
                if let Some(id) = id && !comes_from_terminal(signal) {
                    // That it has ended just now is seen in the next round.
                    let _ended = kill(id, signal);
                }
            }
        }
    }
}

/// Whether the terminal has sent the signal to the command as well: it goes to the whole process group in its foreground.
fn comes_from_terminal(signal: Signal) -> bool {
    matches!(signal, Signal::SIGINT | Signal::SIGQUIT) && tcgetpgrp(io::stdin()).is_ok_and(|group| group == getpgrp())
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or(status.signal().map(|signal| EXIT_SIGNAL_BASE + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

fn signal_outcome(signal: Signal) -> Outcome {
    Outcome::Code(u8::try_from(EXIT_SIGNAL_BASE + signal as i32).unwrap_or(1))
}

/// Detaches, and removes the resolver file and the namespace. An agent that is away is waited for.
async fn teardown(context: &Context, name: &EndpointName, namespaces: &NamedNamespaces) -> Result<(), CommandError> {
    let end = Instant::now() + DETACH_TIMEOUT;
    let detached = loop {
        match context.client.detach_with(name, true).await {
            Err(ClientError::NoSocket { .. } | ClientError::ConnectionRefused { .. } | ClientError::ConnectionLost { .. })
                if Instant::now() < end =>
            {
                tokio::time::sleep(DETACH_RETRY_INTERVAL).await;
            }
            outcome => break outcome,
        }
    };
    if let Some(file) = ResolverFile::for_namespace(&namespaces.path(name), name) {
        file.remove()?;
    }
    namespaces.remove(name)?;
    detached?;
    Ok(())
}

/// A name that nobody else has: of our process and the moment.
fn generate_name() -> Result<EndpointName, CommandError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
    let text = format!("run-{}-{:x}", std::process::id(), now & 0xff_ffff);
    text.parse().map_err(|e| CommandError::Usage { message: format!("{e}") })
}

/// The signals that are handed on, but for those that were ignored when we were started (`nohup`): the command ignores them, too.
struct Signals {
    receiver: mpsc::Receiver<Signal>,
    _tasks: tokio::task::JoinSet<()>,
}

impl Signals {
    const FORWARDED: [Signal; 6] =
        [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2];

    fn subscribe() -> Result<Signals, CommandError> {
        let ignored = ignored_signals();
        let (send, arrived) = mpsc::channel(16);
        let mut tasks = tokio::task::JoinSet::new();
        for caught in Self::FORWARDED.into_iter().filter(|s| ignored & (1 << (*s as u32 - 1)) == 0) {
            let mut stream = signal(SignalKind::from_raw(caught as i32))
                .map_err(|source| CommandError::Read { path: "/proc/self/status".into(), source })?;
            let send = send.clone();
            tasks.spawn(async move {
                while stream.recv().await.is_some() {
                    if send.send(caught).await.is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Signals { receiver: arrived, _tasks: tasks })
    }

    /// The next one. Cancel-safe.
    async fn next(&mut self) -> Option<Signal> {
        self.receiver.recv().await
    }
}

/// The ignored signals as a mask (`SigIgn`, `proc_pid_status(5)`).
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_shell_convention() {
        for (raw, code) in [(0, 0), (7 << 8, 7), (9, 137), (15, 143)] {
            assert_eq!(exit_code(ExitStatus::from_raw(raw)), code);
        }
        assert_eq!(signal_outcome(Signal::SIGINT), Outcome::Code(130));
    }

    #[test]
    fn generated_name_is_valid() {
        assert!(generate_name().expect("a name").as_str().starts_with("run-"));
    }
}
