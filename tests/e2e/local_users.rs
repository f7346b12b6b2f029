//! Unprivileged users of the host: no access through the agent's files, socket or ports. Secrets: allowed places, and no leaks.
//!
//! The agent's directories are below world-accessible ones, so that only their own modes protect them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use overlay_agent::model::api::Status;
use overlay_tests::programs::{CommandOutput, overlayctl, require_program};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::wait::{eventually, eventually_async};
use overlay_tests::{ExpectContext, TestLab, etcd, kernel};
use overlayctl::client::Client;
use overlayctl::lab::Families;
use overlayctl::lab::process::{self, ProcessId, TERM_GRACE};
use tempfile::TempDir;

/// The agent's password, and a wrong one.
const PASSWORD: &str = "tulips-in-may";
const WRONG_PASSWORD: &str = "roses-in-june";

/// The address of the metrics listener, if enabled.
const METRICS_ADDRESS: &str = "127.0.0.1:9780";

/// Runs a command as an unprivileged user.
const USER: [&str; 7] =
    ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--"];

/// One host, an etcd with a password, and a world-accessible directory.
struct AuthLab {
    lab: TestLab,
    dir: TempDir,
    agent: Option<ProcessId>,
}

impl Drop for AuthLab {
    fn drop(&mut self) {
        let failures = process::terminate_all(&self.agent.take().into_iter().collect::<Vec<_>>(), TERM_GRACE);
        assert!(failures.is_empty() || std::thread::panicking(), "{failures:?}");
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect_ok(&path.display().to_string());
}

impl AuthLab {
    async fn up() -> AuthLab {
        require_program("setpriv", "util-linux");
        let lab = TestLab::without_agents(1, Families::Dual).await;
        let dir = tempfile::tempdir().expect_ok("a directory");
        set_mode(dir.path(), 0o755);
        let auth_lab = AuthLab { lab, dir, agent: None };
        for (name, password) in [("password", PASSWORD), ("wrong", WRONG_PASSWORD)] {
            fs::write(auth_lab.file(name), format!("{password}\n")).expect_ok(name);
            set_mode(&auth_lab.file(name), 0o600);
        }
        // A copy that every user may run, wherever the sources are.
        fs::copy(overlayctl(), auth_lab.file("overlayctl")).expect_ok("a copy of overlayctl");
        set_mode(&auth_lab.file("overlayctl"), 0o755);
        let agent = format!("agent:{PASSWORD}");
        for command in [
            &["user", "add", "root:of-the-store"][..],
            &["user", "grant-role", "root", "root"],
            &["user", "add", &agent],
            &["user", "grant-role", "agent", "root"],
            &["auth", "enable"],
        ] {
            etcd::etcdctl(&auth_lab.lab, command).assert_code(0);
        }
        auth_lab
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn path(&self, name: &str) -> String {
        self.file(name).display().to_string()
    }

    /// The agent's command, with the password in that file.
    fn agent_command(&self, password_file: &str) -> Command {
        let mut command = self.lab.overlayd_command("h1", self.file("run"), self.file("state"));
        command.args(["--log-level", "trace", "--etcd-username", "agent"]);
        command.args(["--etcd-password-file", &self.path(password_file)]);
        command
    }

    /// Replaces the running agent, and waits for a status condition.
    async fn start_agent(&mut self, command: Command, condition: impl Fn(&Status) -> bool) -> Status {
        if let Some(agent) = self.agent.take() {
            assert_eq!(process::terminate_all(&[agent], TERM_GRACE), Vec::<String>::new());
        }
        let netns = self.lab.open_netns("h1");
        self.agent = Some(process::start(command, Some(&netns), &self.file("log"), &self.file("pid")).expect_ok("the agent"));
        let client = Client::new(self.file("run/overlayd.sock"));
        let query = || async {
            match client.status().await {
                Ok(status) if condition(&status) => Ok(status),
                Ok(status) => Err(format!("{:?}", status.problems)),
                Err(error) => Err(error.to_string()),
            }
        };
        eventually_async("the agent's status is as expected", READY_TIMEOUT, query).await
    }

    /// Runs a command as an unprivileged user on the host.
    fn run_as_nobody(&self, command: &[&str]) -> CommandOutput {
        kernel::attempt(&self.lab, "h1", &[&USER[..], command].concat())
    }

    /// Runs overlayctl as root, or as an unprivileged user.
    fn ctl(&self, root: bool, arguments: &[&str]) -> CommandOutput {
        let (program, socket) = (self.path("overlayctl"), self.path("run/overlayd.sock"));
        let command = [&[program.as_str(), "--socket", &socket][..], arguments].concat();
        if root { kernel::attempt(&self.lab, "h1", &command) } else { self.run_as_nobody(&command) }
    }

    /// The output of `find` as an unprivileged user, from the shared directory.
    fn find_as_nobody(&self, conditions: &[&str]) -> Vec<String> {
        let (run, state) = (self.path("run"), self.path("state"));
        let output = self.run_as_nobody(&[&["find", &run, &state][..], conditions].concat());
        let mut names: Vec<String> = output.stdout.lines().map(|line| line.replacen(&self.path(""), "", 1)).collect();
        names.sort();
        names
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unprivileged_user_has_no_access() {
    let mut auth = AuthLab::up().await;
    auth.start_agent(auth.agent_command("password"), |status| status.ready).await;
    auth.ctl(true, &["attach", "web"]).assert_code(0);
    let attached = auth.ctl(true, &["-o", "json", "endpoints"]).assert_code(0).stdout;

    // Socket.
    for arguments in [
        &["status"][..],
        &["subnets"],
        &["peers"],
        &["endpoints"],
        &["inspect"],
        &["attach", "mine"],
        &["attach", "host", "--mode", "host"],
        &["detach", "web"],
        &["run", "--", "true"],
    ] {
        auth.ctl(false, arguments).assert_code(1).assert_stderr_contains(&["permission denied", "become root"]);
    }
    // Files: readable are the subnet for runtimes, and the namespace created by overlayctl; nothing is writable.
    let namespace = auth.lab.layout().namespace("h1-web");
    let readable = auth.find_as_nobody(&["-type", "f", "-readable"]);
    assert_eq!(readable, [format!("run/netns/{namespace}"), "run/subnet.env".to_owned()]);
    assert_eq!(auth.find_as_nobody(&["!", "-type", "l", "-writable"]), Vec::<String>::new());
    assert_eq!(auth.find_as_nobody(&["-type", "d", "-readable"]), ["run", "run/netns"]);
    auth.run_as_nobody(&["ls", &auth.path("state")]).assert_code(2).assert_stderr_contains(&["Permission denied"]);
    // The container's namespace.
    let netns = format!("/run/netns/{namespace}");
    kernel::run(&auth.lab, "h1", &["nsenter", &format!("--net={netns}"), "true"]);
    auth.run_as_nobody(&["nsenter", &format!("--net={netns}"), "true"]).assert_code(1);
    auth.run_as_nobody(&["ip", "link", "delete", "ovb.1"]).assert_code(2);
    // Process.
    let pid = auth.agent.expect_ok("the agent").pid;
    auth.run_as_nobody(&["cat", &format!("/proc/{pid}/environ")]).assert_code(1);
    auth.run_as_nobody(&["ls", &format!("/proc/{pid}/fd")]).assert_code(2);
    auth.run_as_nobody(&["kill", &pid.to_string()]).assert_code(1);
    // No TCP listener at all; the tunnel's UDP port belongs to the kernel.
    let listening = kernel::run(&auth.lab, "h1", &["ss", "-H", "--listening", "--tcp", "--processes"]);
    assert_eq!(listening, "");

    assert_eq!(auth.ctl(true, &["-o", "json", "endpoints"]).assert_code(0).stdout, attached, "nothing has changed");
    auth.ctl(true, &["status", "--brief"]).assert_code(0);
}

/// Any user may lock the namespace's file, which otherwise only prevents a second agent.
#[tokio::test(flavor = "multi_thread")]
async fn namespace_locked_by_user_does_not_block_agent() {
    let mut auth = AuthLab::up().await;
    let netns = File::open(auth.lab.open_netns("h1").path()).expect_ok("the namespace");
    netns.try_lock().expect_ok("no agent runs");
    auth.lab
        .run_to_exit("h1", auth.agent_command("password"))
        .assert_code(1)
        .assert_stderr_contains(&["another overlayd runs in this network namespace", &format!("pid {}", std::process::id())]);
    drop(netns);
    let mut user = Command::new(USER[0]);
    user.args(&USER[1..]).args(["flock", "--no-fork"]).arg(auth.lab.open_netns("h1").path()).args(["sleep", "120"]);
    let mut user = user.spawn().expect_ok("flock");
    eventually("the user has the lock", CONVERGE_TIMEOUT, || {
        let netns = File::open(auth.lab.open_netns("h1").path()).expect_ok("the namespace");
        if netns.try_lock().is_err() { Ok(()) } else { Err("it is free".to_owned()) }
    })
    .await;
    auth.start_agent(auth.agent_command("password"), |status| status.ready).await;
    let log = fs::read_to_string(auth.file("log")).expect_ok("the log");
    let warning = log.lines().find(|line| line.contains("a user who cannot run the agent has locked")).expect_ok("a warning");
    assert!(warning.contains("WARN") && warning.contains("user=65534"), "{warning}");
    user.kill().expect_ok("the user's process");
    user.wait().expect_ok("the user's process");
}

/// Sends a request over TCP, inside the host.
fn http_request(lab: &TestLab, address: &str, method: &str, path: &str) -> Option<(u16, String)> {
    let address: SocketAddr = address.parse().expect_ok("an address");
    let mut stream =
        lab.open_netns("h1").run(|| TcpStream::connect_timeout(&address, CONVERGE_TIMEOUT)).expect_ok("enter").ok()?;
    stream.set_read_timeout(Some(CONVERGE_TIMEOUT)).expect_ok("a limit");
    let body = r#"{"level":"trace"}"#;
    let head = format!("{method} {path} HTTP/1.0\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(head.as_bytes()).expect_ok(path);
    let mut text = String::new();
    stream.read_to_string(&mut text).expect_ok(path);
    let (head, body) = text.split_once("\r\n\r\n").expect_ok(&text);
    Some((head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect_ok(head), body.to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_listener_serves_only_metrics() {
    let mut auth = AuthLab::up().await;
    let mut command = auth.agent_command("password");
    command.args(["--metrics-listen", METRICS_ADDRESS]);
    auth.start_agent(command, |status| status.ready).await;
    auth.ctl(true, &["attach", "web"]).assert_code(0);
    for path in ["/metrics", "/healthz", "/readyz"] {
        let (code, body) = http_request(&auth.lab, METRICS_ADDRESS, "GET", path).expect_ok(path);
        assert_eq!(code, 200, "{path}: {body}");
        for secret in [PASSWORD, "web", "10.244.", "fd00:", "agent"] {
            assert!(!body.contains(secret), "{path} reveals `{secret}`: {body}");
        }
        assert_eq!(http_request(&auth.lab, METRICS_ADDRESS, "PUT", path).expect_ok(path).0, 405, "PUT {path}");
    }
    for (method, path) in [
        ("GET", "/v1/status"),
        ("GET", "/v1/endpoints"),
        ("GET", "/v1/network"),
        ("PUT", "/v1/log-level"),
        ("PUT", "/v1/endpoints/x"),
        ("DELETE", "/v1/endpoints/web"),
    ] {
        assert_eq!(http_request(&auth.lab, METRICS_ADDRESS, method, path).expect_ok(path).0, 404, "{method} {path}");
    }
    // It listens on the requested address only.
    let elsewhere = auth.lab.host("h1").layout().addresses.v4.expect_ok("IPv4");
    assert_eq!(http_request(&auth.lab, &format!("{elsewhere}:9780"), "GET", "/metrics"), None);
    assert!(auth.ctl(true, &["endpoints"]).assert_code(0).stdout.contains("web"));
}

#[tokio::test(flavor = "multi_thread")]
async fn password_is_never_exposed() {
    let mut auth = AuthLab::up().await;
    auth.start_agent(auth.agent_command("password"), |status| status.ready).await;
    let mut output = String::new();
    let endpoints = format!("--etcd-endpoints={}", auth.lab.layout().etcd_endpoints().join(","));
    let mut every_word = |auth: &AuthLab, password: &str| {
        let login = [&endpoints, "--etcd-username=agent", &format!("--etcd-password-file={}", auth.path(password))];
        for command in [&["status"][..], &["-o", "json", "status"], &["inspect"], &["subnets"], &["peers"]] {
            let CommandOutput { stdout, stderr, .. } = auth.ctl(true, command);
            output += &(stdout + &stderr);
        }
        for command in [&["config", "show"][..], &["subnets"]] {
            let CommandOutput { stdout, stderr, .. } = auth.ctl(true, &[command, &login[..]].concat());
            output += &(stdout + &stderr);
        }
        let pid = auth.agent.expect_ok("the agent").pid;
        for file in ["cmdline", "environ"] {
            output += &String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/{file}")).expect_ok(file));
        }
    };
    every_word(&auth, "password");
    // The same when etcd rejects it.
    let refused = |status: &Status| status.problems.iter().any(|problem| problem.contains("--etcd-password-file"));
    auth.start_agent(auth.agent_command("wrong"), refused).await;
    every_word(&auth, "wrong");
    let log = fs::read_to_string(auth.file("log")).expect_ok("the log");
    assert!(log.contains(" DEBUG ") && log.contains("--etcd-password-file"), "the log has every level, and the refusal");
    assert!(output.contains("10.244.0.0/16") && output.contains("--etcd-password-file"), "{output}");
    let kept = ["run", "state"].map(|dir| kernel::attempt(&auth.lab, "h1", &["grep", "-rls", "in-", &auth.path(dir)]).stdout);
    for secret in [PASSWORD, WRONG_PASSWORD] {
        let line = log.lines().chain(output.lines()).find(|line| line.contains(secret));
        assert_eq!(line, None, "{secret} is revealed");
    }
    for file in kept.iter().flat_map(|list| list.lines()) {
        let text = fs::read(file).expect_ok(file);
        let text = String::from_utf8_lossy(&text);
        assert!(!text.contains(PASSWORD) && !text.contains(WRONG_PASSWORD), "{file} keeps the password");
    }
}

/// A world-readable or writable secret file is rejected before any change, in every place that can name it.
#[tokio::test(flavor = "multi_thread")]
async fn world_readable_secret_files_are_refused() {
    let auth = AuthLab::up().await;
    let (password, settings) = (auth.path("password"), auth.path("overlayd.toml"));
    let open = |value: u32| set_mode(&auth.file("password"), value);
    let plain = || auth.lab.overlayd_command("h1", auth.file("run"), auth.file("state"));
    let remedy = format!("chmod 600 {password}");
    for value in [0o644, 0o604, 0o620, 0o666] {
        open(value);
        let warning = format!("is accessible to other users (mode {value:04o})");
        let wanted = ["etcd-password-file", &warning, &remedy];
        auth.lab.run_to_exit("h1", auth.agent_command("password")).assert_code(2).assert_stderr_contains(&wanted);
    }
    let mut by_variable = plain();
    by_variable.args(["--etcd-username", "agent"]).env("OVERLAYD_ETCD_PASSWORD_FILE", &password);
    auth.lab.run_to_exit("h1", by_variable).assert_code(2).assert_stderr_contains(&["OVERLAYD_ETCD_PASSWORD_FILE", &remedy]);
    let with_file = |text: String| {
        fs::write(&settings, text).expect_ok("settings");
        let mut command = plain();
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let at = arguments.iter().position(|argument| argument == "/dev/null").expect_ok("the file of settings");
        let mut arguments = arguments;
        arguments[at] = settings.clone().into();
        let environment: Vec<_> = command.get_envs().map(|(k, v)| (k.to_owned(), v.map(ToOwned::to_owned))).collect();
        command = Command::new(command.get_program());
        for (name, _) in environment.iter().filter(|(_, value)| value.is_none()) {
            command.env_remove(name);
        }
        command.args(arguments);
        command
    };
    let naming = format!("etcd-username = \"agent\"\netcd-password-file = \"{password}\"\n");
    auth.lab.run_to_exit("h1", with_file(naming.clone())).assert_code(2).assert_stderr_contains(&[&settings, &remedy]);
    let login = [
        format!("--etcd-endpoints={}", auth.lab.layout().etcd_endpoints().join(",")),
        "--etcd-username=agent".to_owned(),
        format!("--etcd-password-file={password}"),
    ];
    let login: Vec<&str> = login.iter().map(String::as_str).collect();
    auth.ctl(true, &[&["config", "show"][..], &login].concat()).assert_code(1).assert_stderr_contains(&[&remedy]);
    assert!(!auth.file("state").exists() && !auth.file("run").exists(), "nothing was touched");

    // The settings file itself, if it names a secret: a user who can write it could redirect the secret.
    open(0o600);
    for value in [0o664, 0o646] {
        let command = with_file(naming.clone());
        set_mode(&auth.file("overlayd.toml"), value);
        let warning = format!("is writable by other users (mode {value:04o}): chmod 644 {settings}");
        auth.lab.run_to_exit("h1", command).assert_code(2).assert_stderr_contains(&[&warning]);
    }
    // A secret inside the settings is not printed.
    for text in [format!("etcd-password = \"{PASSWORD}\"\n"), format!("etcd-password = \"{PASSWORD}\n")] {
        let output = auth.lab.run_to_exit("h1", with_file(text)).assert_code(2);
        assert!(!output.stderr.contains(PASSWORD) && output.stderr.contains(&settings), "{}", output.stderr);
    }
    for flag in [format!("--etcd-password={PASSWORD}"), format!("--etcd-endpoints=http://agent:{PASSWORD}@10.99.0.2:2379")] {
        let mut command = plain();
        command.arg(&flag);
        let output = auth.lab.run_to_exit("h1", command).assert_code(2);
        assert!(!output.stderr.contains(PASSWORD), "{}", output.stderr);
        let output = auth.ctl(true, &["config", "show", &flag]);
        assert!(matches!(output.code, Some(1 | 2)) && !output.stderr.contains(PASSWORD), "{}", output.stderr);
    }
    // Valid files work.
    auth.ctl(true, &[&["config", "show"][..], &login].concat()).assert_code(0);
}
