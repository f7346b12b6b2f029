//! A lab for one test: a unique name, guaranteed cleanup, and the agents' logs on a failure.

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

/// Time limit for an agent's readiness: a fraction of a second, more if twenty share two processors.
pub const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// Time limit for the convergence after a change in etcd or in the kernel. The documented promise is one second; tests of that
/// promise use a second.
pub const CONVERGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The documented promise for drift: repair within a second.
pub const REPAIR_DEADLINE: Duration = Duration::from_secs(1);

/// The directory of test labs: separate from a user's labs, so that leftovers are recognisable.
pub fn lab_dir() -> LabsDir {
    LabsDir::at("/run/overlay-lab-tests")
}

/// A lab of one test.
#[derive(Debug)]
pub struct TestLab {
    lab: LabGuard,
    /// The number of neighbour table overflows before.
    neighbour_overflows_before: u64,
}

impl TestLab {
    /// Brings a lab up; `configure` changes the defaults: three hosts with two containers each, IPv4. All agents are ready and
    /// reach each other, and the containers are attached.
    pub async fn up(configure: impl FnOnce(&mut LabOptions)) -> TestLab {
        prepare();
        let mut options = LabOptions { overlayd: Some(overlayd()), ..LabOptions::new(LabName::unique()) };
        configure(&mut options);
        if !options.agents {
            options.overlayd = None;
        }
        // Test traffic must be the only traffic; tests of probes set the interval themselves.
        if !options.agent_args.iter().any(|argument| argument.starts_with("--mesh-interval")) {
            options.agent_args.push("--mesh-interval=0s".to_owned());
        }
        let overflows = neighbour_overflows();
        let lab = Lab::up(&lab_dir(), &options, Progress::silent()).await.expect_ok("bring the lab up");
        TestLab { lab: lab.guarded(), neighbour_overflows_before: overflows }
    }

    /// Hosts, switch and etcd, with the network configuration but without running agents.
    pub async fn without_agents(hosts: u16, families: Families) -> TestLab {
        TestLab::up(|options| {
            options.hosts = hosts;
            options.containers = 0;
            options.families = families;
            options.agents = false;
        })
        .await
    }

    /// One host without containers, with a ready agent.
    pub async fn one_host(families: Families) -> TestLab {
        TestLab::up(|options| {
            options.hosts = 1;
            options.containers = 0;
            options.families = families;
        })
        .await
    }

    /// A host's endpoints in the output of `overlayctl`.
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

    /// Waits until every agent is ready and reaches every other agent.
    pub async fn wait_full_mesh(&self) {
        agent::wait_mesh(&self.lab, READY_TIMEOUT).await.expect_ok("every agent reaches every other agent");
    }

    /// Checks calls from every container to every other container and to the outside.
    pub async fn assert_full_reachability(&self) {
        let report = check::check(&self.lab).await.expect_ok("check the lab");
        let failed: Vec<String> = report
            .overlay
            .iter()
            .chain(&report.egress)
            .filter_map(|c| c.error.as_ref().map(|e| format!("  {} to {} ({}): {e}", c.from, c.to, c.address)))
            .collect();
        assert!(failed.is_empty() && report.ok, "{} calls failed:\n{}", failed.len(), failed.join("\n"));
        assert!(!report.overlay.is_empty(), "there were calls");
    }

    /// Starts a ping flow from one container to another.
    pub async fn start_ping(&self, from: &str, to: &str, family: Family) -> PingFlow {
        let (host, name) = to.split_once('-').expect_ok("a container HOST-NAME");
        let endpoints = self.host(host).client().endpoints().await.expect_ok(host).endpoints;
        let endpoint = endpoints.into_iter().find(|e| e.name.as_str() == name).expect_ok(to);
        let address = *endpoint.addresses().get(family).expect_ok("the container's address");
        PingFlow::start(&self.open_netns(from), &self.open_netns(to), address).await
    }

    /// Waits until a host's kernel state is exactly the expected one. On a host with isolated networks, their transits and the
    /// table that they share with the default network are left out.
    pub async fn wait_converged(&self, host: &str, limit: Duration) {
        let host = self.host(host);
        let mut expected = kernel::expected_state(&host, false).await;
        eventually(&format!("the kernel state of {} is as expected", host.name()), limit, || {
            let mut actual = kernel::actual_state(&self.lab, host.name());
            if !host.isolated_namespaces().map_err(|error| error.to_string())?.is_empty() {
                for lines in [&mut actual, &mut expected] {
                    lines.retain(|line| !line.contains("ovt.") && !line.starts_with("nft inet"));
                }
            }
            let difference = kernel::difference(&actual, &expected);
            if difference.is_empty() { Ok(()) } else { Err(format!("\n{difference}")) }
        })
        .await;
    }

    /// Runs overlayctl on a host against its agent.
    #[track_caller]
    pub fn ctl(&self, host: &str, args: &[&str]) -> CommandOutput {
        let program = overlayctl().to_string_lossy().into_owned();
        let command: Vec<&str> = std::iter::once(program.as_str()).chain(args.iter().copied()).collect();
        kernel::attempt(&self.lab, host, &command)
    }

    /// A command of the agent's program for a host, independent of the lab's agent. The caller sets every flag that differs from
    /// the lab's directories and etcd. It must not disturb the lab's own agent of that host.
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

    /// Runs a command of [`TestLab::overlayd_command`] in the host's namespace. It must exit by itself; otherwise it is killed
    /// and the test fails.
    #[track_caller]
    pub fn run_to_exit(&self, host: &str, mut command: Command) -> CommandOutput {
        let command_line: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        let wrapped = {
            // timeout(1) kills it even if this test is killed.
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
        let result = CommandOutput::from_output(&command_line, &output);
        assert!(
            !matches!(result.code, Some(124 | 137)),
            "`{}` does not exit; output:\n{}{}",
            result.command,
            result.stdout,
            result.stderr
        );
        result
    }

    /// The log of a host's agent.
    pub fn log(&self, host: &str) -> String {
        std::fs::read_to_string(self.host(host).log()).unwrap_or_default()
    }

    /// Waits until one line of a host's log contains each of these.
    pub async fn wait_for_log(&self, host: &str, patterns: &[&str]) -> String {
        eventually(&format!("{host} logs {patterns:?}"), CONVERGE_TIMEOUT, || {
            let log = self.log(host);
            let line = log.lines().find(|line| patterns.iter().all(|text| line.contains(text)));
            line.map(str::to_owned).ok_or_else(|| process::log_tail(&self.host(host).log()))
        })
        .await
    }

    /// A host's lease in etcd.
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
                    "--- the kernel's neighbour table, which all namespaces share, overflowed meanwhile: containers could not resolve each \
                     other. Stop what else runs on this machine, or raise net.ipv4.neigh.default.gc_thresh3"
                );
            }
            for host in self.lab.hosts() {
                eprintln!(
                    "--- last lines of the log of {} in lab {}\n{}",
                    host.name(),
                    self.lab.layout().name,
                    last_lines(&self.log(host.name()))
                );
            }
        }
    }
}

/// The last lines of a log, more than the lab prints: the cause may be some lines earlier.
fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

/// The number of IPv4 neighbour table overflows (`table_fulls`, in hexadecimal, one line per processor).
fn neighbour_overflows() -> u64 {
    let text = std::fs::read_to_string("/proc/net/stat/arp_cache").unwrap_or_default();
    let mut lines = text.lines();
    let column = lines.next().and_then(|head| head.split_whitespace().position(|name| name == "table_fulls"));
    let Some(column) = column else { return 0 };
    let value = |line: &str| u64::from_str_radix(line.split_whitespace().nth(column)?, 16).ok();
    lines.filter_map(value).sum()
}

/// Checks the requirements of every test; removes the labs of killed test runs once.
pub(crate) fn prepare() {
    static ONCE: Once = Once::new();
    require_root();
    require_program("etcd", "etcd-server");
    require_program("etcdctl", "etcd-client");
    require_program("ip", "iproute2");
    ONCE.call_once(|| {
        let labs_dir = lab_dir();
        for name in labs_dir.labs().unwrap_or_default() {
            if is_stale_lab(&name.to_string()) {
                // Another test process may remove the same lab at the same time.
                let _removed = overlayctl::lab::down::down(&labs_dir.lab_dir(&name), &name);
            }
        }
        docker::remove_leftovers(is_stale_lab);
    });
}

/// Whether a lab name comes from [`LabName::unique`] in a process that has ended.
fn is_stale_lab(name: &str) -> bool {
    let parts = name.strip_prefix('t').and_then(|rest| rest.split_once('n'));
    let Some((pid, number)) = parts else { return false };
    let hex = |text: &str| i32::from_str_radix(text, 16).ok();
    match (hex(pid), hex(number)) {
        (Some(pid), Some(_)) => process::ProcessId::from_pid(pid).is_none(),
        _ => false,
    }
}
