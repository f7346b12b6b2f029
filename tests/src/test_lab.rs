//! A lab with a story's life: its own name, taken down at the end whatever happens, the agents' logs told where the story fails.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Once;
use std::time::Duration;

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::api::{Endpoints, Status};
use overlay_agent::model::{Endpoint, Family};
use overlayctl::lab::{Families, Host, Lab, LabGuard, LabName, LabOptions, LabsDir, Progress, agent, check, process};

use crate::programs::{CommandOutput, overlayctl, overlayd, require_program, require_root};
use crate::{ExpectContext, docker, etcd, eventually, kernel, ping::PingFlow};

/// How long an agent may take to be ready: a fraction of a second, more where twenty share two processors.
pub const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a change in etcd or in the kernel may take until all have followed. "Within a second" is the promise; tests that hold the
/// agent to it use a second.
pub const CONVERGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The promise for drift: back within a second.
pub const REPAIR_DEADLINE: Duration = Duration::from_secs(1);

/// Where the labs of stories are: apart from a person's, so that what is left over can be told.
pub fn lab_dir() -> LabsDir {
    LabsDir::at("/run/overlay-lab-tests")
}

/// A lab of one story.
#[derive(Debug)]
pub struct TestLab {
    lab: LabGuard,
    /// How often the kernel's neighbour table had been full before.
    neighbour_overflows_before: u64,
}

impl TestLab {
    /// Brings a lab up; `change` sets what differs from three hosts with two containers each, IPv4. All agents are ready, see each other, and
    /// the containers are attached.
    pub async fn up(configure: impl FnOnce(&mut LabOptions)) -> TestLab {
        prepare();
        let mut options = LabOptions { overlayd: Some(overlayd()), ..LabOptions::new(LabName::unique()) };
        configure(&mut options);
        if !options.agents {
            options.overlayd = None;
        }
        // On a story's wires is what the story sends; one about probes asks for them.
        if !options.agent_args.iter().any(|argument| argument.starts_with("--mesh-interval")) {
            options.agent_args.push("--mesh-interval=0s".to_owned());
        }
        let overflows = neighbour_overflows();
        let lab = Lab::up(&lab_dir(), &options, Progress::silent()).await.expect_ok("bring the lab up");
        TestLab { lab: lab.guarded(), neighbour_overflows_before: overflows }
    }

    /// Hosts, switch and etcd, with the configuration written and no agent started.
    pub async fn without_agents(hosts: u16, families: Families) -> TestLab {
        TestLab::up(|options| {
            options.hosts = hosts;
            options.containers = 0;
            options.families = families;
            options.agents = false;
        })
        .await
    }

    /// One host without containers, its agent ready.
    pub async fn one_host(families: Families) -> TestLab {
        TestLab::up(|options| {
            options.hosts = 1;
            options.containers = 0;
            options.families = families;
        })
        .await
    }

    /// The endpoints of a host, as `overlayctl` lists them.
    #[track_caller]
    pub fn endpoints(&self, host: &str) -> Vec<Endpoint> {
        self.ctl(host, &["-o", "json", "endpoints"]).assert_code(0).json::<Endpoints>().endpoints
    }

    /// Starts a host's agent and waits until it is ready.
    pub async fn start_agent(&self, host: &str) -> Status {
        let host = self.host(host);
        host.agent_start(&[]).expect_ok("start the agent");
        host.wait_ready(READY_TIMEOUT).await.expect_ok("the agent's start")
    }

    /// A host.
    #[track_caller]
    pub fn host(&self, name: &str) -> Host<'_> {
        self.lab.host(name).expect_ok("a host")
    }

    /// The namespace of a host, a container, `net` or `world`.
    #[track_caller]
    pub fn open_netns(&self, target: &str) -> Netns {
        self.lab.netns(target).expect_ok("a namespace")
    }

    /// The status of a host's agent.
    pub async fn status(&self, host: &str) -> Status {
        self.host(host).client().status().await.expect_ok(host)
    }

    /// Waits until every agent is ready and has a way to every other.
    pub async fn wait_full_mesh(&self) {
        agent::wait_mesh(&self.lab, READY_TIMEOUT).await.expect_ok("every agent has a way to every other");
    }

    /// Every container calls every other one and the world; checks all calls.
    pub async fn assert_full_reachability(&self) {
        let report = check::check(&self.lab).await.expect_ok("check the lab");
        let bad: Vec<String> = report
            .overlay
            .iter()
            .chain(&report.egress)
            .filter_map(|c| c.error.as_ref().map(|e| format!("  {} to {} ({}): {e}", c.from, c.to, c.address)))
            .collect();
        assert!(bad.is_empty() && report.ok, "{} calls went wrong:\n{}", bad.len(), bad.join("\n"));
        assert!(!report.overlay.is_empty(), "there were calls");
    }

    /// Starts a flow from one container to another.
    pub async fn start_ping(&self, from: &str, to: &str, family: Family) -> PingFlow {
        let (host, name) = to.split_once('-').expect_ok("a container HOST-NAME");
        let endpoints = self.host(host).client().endpoints().await.expect_ok(host).endpoints;
        let endpoint = endpoints.into_iter().find(|e| e.name.as_str() == name).expect_ok(to);
        let address = *endpoint.addresses().get(family).expect_ok("its address");
        PingFlow::start(&self.open_netns(from), &self.open_netns(to), address).await
    }

    /// Waits until a host's kernel holds exactly what the design asks for.
    pub async fn wait_converged(&self, host: &str, limit: Duration) {
        let host = self.host(host);
        let expected = kernel::expected_state(&host, false).await;
        eventually(&format!("the kernel of {} is as the design has it", host.name()), limit, || {
            let difference = kernel::difference(&kernel::actual_state(&self.lab, host.name()), &expected);
            if difference.is_empty() { Ok(()) } else { Err(format!("\n{difference}")) }
        })
        .await;
    }

    /// Runs overlayctl on a host, against its agent.
    #[track_caller]
    pub fn ctl(&self, host: &str, args: &[&str]) -> CommandOutput {
        let program = overlayctl().to_string_lossy().into_owned();
        let command: Vec<&str> = std::iter::once(program.as_str()).chain(args.iter().copied()).collect();
        kernel::attempt(&self.lab, host, &command)
    }

    /// A command of the agent's program for a host, outside of what the lab starts: the caller gives every flag that differs from the
    /// lab's directories and etcd. The lab's own agent of that host must not be disturbed by it.
    pub fn overlayd_command(&self, host: &str, run_dir: PathBuf, state_dir: PathBuf) -> Command {
        let mut command = Command::new(overlayd());
        for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("OVERLAYD_")) {
            command.env_remove(name);
        }
        command.args(["--config", "/dev/null", "--node-name", host]);
        command.arg("--run-dir").arg(run_dir).arg("--state-dir").arg(state_dir);
        command.args(["--etcd-endpoints", &self.lab.layout().etcd_endpoints().join(",")]);
        command
    }

    /// Runs a command of [`TestLab::overlayd_command`] that must end by itself, in the host's namespace. One that runs on is killed, and the test
    /// fails.
    #[track_caller]
    pub fn run_to_exit(&self, host: &str, mut command: Command) -> CommandOutput {
        let shown: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        let wrapped = {
            // timeout(1) ends it also where this test is killed in the meantime.
            let mut timeout = Command::new("timeout");
            timeout.args(["--signal=KILL", "20"]).arg(command.get_program()).args(command.get_args());
            for (name, value) in command.get_envs() {
                match value {
                    Some(value) => timeout.env(name, value),
                    None => timeout.env_remove(name),
                };
            }
            command = timeout;
            command.stdin(std::process::Stdio::null());
            &mut command
        };
        let output = self.open_netns(host).run(|| wrapped.output()).expect_ok("enter the host").expect_ok("timeout");
        let said = CommandOutput::from_output(&shown, &output);
        assert!(!matches!(said.code, Some(124 | 137)), "`{}` runs on; it said:\n{}{}", said.command, said.stdout, said.stderr);
        said
    }

    /// The agent's log of a host.
    pub fn log(&self, host: &str) -> String {
        std::fs::read_to_string(self.host(host).log()).unwrap_or_default()
    }

    /// Waits until the log of a host holds each of these, in one line.
    pub async fn wait_for_log(&self, host: &str, patterns: &[&str]) -> String {
        eventually(&format!("{host} logs {patterns:?}"), CONVERGE_TIMEOUT, || {
            let log = self.log(host);
            let line = log.lines().find(|line| patterns.iter().all(|text| line.contains(text)));
            line.map(str::to_owned).ok_or_else(|| process::log_tail(&self.host(host).log()))
        })
        .await
    }

    /// The lease of a host, as it stands in etcd.
    #[track_caller]
    pub fn lease_of(&self, host: &str) -> etcd::Entry {
        etcd::lease_with(&self.lab, &format!("\"Name\":\"{host}\""))
    }
}

impl std::ops::Deref for TestLab {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl Drop for TestLab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            if neighbour_overflows() > self.neighbour_overflows_before {
                eprintln!(
                    "--- meanwhile the kernel's neighbour table, which all namespaces share, was full: containers could not find each \
                     other. Stop what else runs on this machine, or raise net.ipv4.neigh.default.gc_thresh3"
                );
            }
            for host in self.lab.hosts() {
                eprintln!(
                    "--- the end of the log of {} in lab {}\n{}",
                    host.name(),
                    self.lab.layout().name,
                    last_lines(&self.log(host.name()))
                );
            }
        }
    }
}

/// The last lines of a log, more than the lab shows: what failed may lie a little back.
fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

/// How often an IPv4 neighbour found no room (`table_fulls`, in hexadecimal, one line a processor).
fn neighbour_overflows() -> u64 {
    let text = std::fs::read_to_string("/proc/net/stat/arp_cache").unwrap_or_default();
    let mut lines = text.lines();
    let column = lines.next().and_then(|head| head.split_whitespace().position(|name| name == "table_fulls"));
    let Some(column) = column else { return 0 };
    let value = |line: &str| u64::from_str_radix(line.split_whitespace().nth(column)?, 16).ok();
    lines.filter_map(value).sum()
}

/// What every story needs; and once, the labs of test runs that were killed are taken down.
pub(crate) fn prepare() {
    static ONCE: Once = Once::new();
    require_root();
    require_program("etcd", "etcd-server");
    require_program("etcdctl", "etcd-client");
    require_program("ip", "iproute2");
    ONCE.call_once(|| {
        let home = lab_dir();
        for name in home.labs().unwrap_or_default() {
            if is_stale_lab(&name.to_string()) {
                // Another test process may be at it as well: what one misses the other removes.
                let _removed = overlayctl::lab::down::down(&home.lab_dir(&name), &name);
            }
        }
        docker::remove_leftovers(is_stale_lab);
    });
}

/// Whether a lab has a name of [`LabName::unique`] of a process that has ended.
fn is_stale_lab(name: &str) -> bool {
    let parts = name.strip_prefix('t').and_then(|rest| rest.split_once('n'));
    let Some((pid, number)) = parts else { return false };
    let hex = |text: &str| i32::from_str_radix(text, 16).ok();
    match (hex(pid), hex(number)) {
        (Some(pid), Some(_)) => process::ProcessId::from_pid(pid).is_none(),
        _ => false,
    }
}
