//! Users of the host without rights: the agent's files, its socket and its ports give them nothing. And secrets: where they may stand, and that they
//! show nowhere.
//!
//! The agent's directories lie where everybody may go, so that what is closed is closed by its own mode.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::{Uid, setfsuid};
use overlay_agent::model::api::Status;
use overlay_tests::programs::{Said, needs, overlayctl};
use overlay_tests::story::{READY, SOON};
use overlay_tests::wait::eventually_asked;
use overlay_tests::{Must, Story, etcd, kernel};
use overlayctl::client::Client;
use overlayctl::lab::Families;
use overlayctl::lab::process::{self, GRACE, ProcessId};
use tempfile::TempDir;

/// The agent's password, and one that is not.
const PASSWORD: &str = "tulips-in-may";
const WRONG: &str = "roses-in-june";

/// Where metrics are, where they are.
const METRICS: &str = "127.0.0.1:9780";

/// One host, an etcd that asks for a password, and room that everybody may enter.
struct Place {
    story: Story,
    dir: TempDir,
    agent: Option<ProcessId>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let failures = process::end_all(&self.agent.take().into_iter().collect::<Vec<_>>(), GRACE);
        assert!(failures.is_empty() || std::thread::panicking(), "{failures:?}");
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).must(&path.display().to_string());
}

impl Place {
    async fn up() -> Place {
        needs("setpriv", "util-linux");
        let story = Story::without_agents(1, Families::Dual).await;
        let dir = tempfile::tempdir().must("a directory");
        mode(dir.path(), 0o755);
        let place = Place { story, dir, agent: None };
        for (name, password) in [("password", PASSWORD), ("wrong", WRONG)] {
            fs::write(place.file(name), format!("{password}\n")).must(name);
            mode(&place.file(name), 0o600);
        }
        // A copy that everybody may run, wherever the sources are.
        fs::copy(overlayctl(), place.file("overlayctl")).must("a copy of overlayctl");
        mode(&place.file("overlayctl"), 0o755);
        let agent = format!("agent:{PASSWORD}");
        for command in [
            &["user", "add", "root:of-the-store"][..],
            &["user", "grant-role", "root", "root"],
            &["user", "add", &agent],
            &["user", "grant-role", "agent", "root"],
            &["auth", "enable"],
        ] {
            etcd::etcdctl(&place.story, command).exits(0);
        }
        place
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn path(&self, name: &str) -> String {
        self.file(name).display().to_string()
    }

    /// The agent, with the password in that file.
    fn command(&self, password: &str) -> Command {
        let mut command = self.story.overlayd("h1", self.file("run"), self.file("state"));
        command.args(["--log-level", "trace", "--etcd-username", "agent"]);
        command.args(["--etcd-password-file", &self.path(password)]);
        command
    }

    /// Starts the agent in place of the one that runs, and waits until it is as wished.
    async fn agent(&mut self, command: Command, wished: impl Fn(&Status) -> bool) -> Status {
        if let Some(agent) = self.agent.take() {
            assert_eq!(process::end_all(&[agent], GRACE), Vec::<String>::new());
        }
        let netns = self.story.inside("h1");
        self.agent = Some(process::start(command, Some(&netns), &self.file("log"), &self.file("pid")).must("the agent"));
        let client = Client::new(self.file("run/overlayd.sock"));
        let ask = || async {
            match client.status().await {
                Ok(status) if wished(&status) => Ok(status),
                Ok(status) => Err(format!("{:?}", status.problems)),
                Err(error) => Err(error.to_string()),
            }
        };
        eventually_asked("the agent is as it should be", READY, ask).await
    }

    /// A command of an ordinary user on the host.
    fn anybody(&self, command: &[&str]) -> Said {
        let user =
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--"];
        kernel::attempt(&self.story, "h1", &[&user[..], command].concat())
    }

    /// overlayctl of root, or of an ordinary user.
    fn ctl(&self, root: bool, arguments: &[&str]) -> Said {
        let (program, socket) = (self.path("overlayctl"), self.path("run/overlayd.sock"));
        let command = [&[program.as_str(), "--socket", &socket][..], arguments].concat();
        if root { kernel::attempt(&self.story, "h1", &command) } else { self.anybody(&command) }
    }

    /// What `find` finds as an ordinary user, from the room on.
    fn found_by_anybody(&self, conditions: &[&str]) -> Vec<String> {
        let (run, state) = (self.path("run"), self.path("state"));
        let said = self.anybody(&[&["find", &run, &state][..], conditions].concat());
        let mut names: Vec<String> = said.out.lines().map(|line| line.replacen(&self.path(""), "", 1)).collect();
        names.sort();
        names
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_user_gets_nothing() {
    let mut place = Place::up().await;
    place.agent(place.command("password"), |status| status.ready).await;
    place.ctl(true, &["attach", "web"]).exits(0);
    let attached = place.ctl(true, &["-o", "json", "endpoints"]).exits(0).out;

    // The socket.
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
        place.ctl(false, arguments).exits(1).complains(&["is denied", "become root"]);
    }
    // Files: what runtimes read of the subnet, and which namespace overlayctl made; nothing can be changed, made or removed.
    let namespace = place.story.layout().namespace("h1-web");
    let readable = place.found_by_anybody(&["-type", "f", "-readable"]);
    assert_eq!(readable, [format!("run/netns/{namespace}"), "run/subnet.env".to_owned()]);
    assert_eq!(place.found_by_anybody(&["!", "-type", "l", "-writable"]), Vec::<String>::new());
    assert_eq!(place.found_by_anybody(&["-type", "d", "-readable"]), ["run", "run/netns"]);
    place.anybody(&["ls", &place.path("state")]).exits(2).complains(&["Permission denied"]);
    // The namespace of a container.
    let netns = format!("/run/netns/{namespace}");
    kernel::run(&place.story, "h1", &["nsenter", &format!("--net={netns}"), "true"]);
    place.anybody(&["nsenter", &format!("--net={netns}"), "true"]).exits(1);
    place.anybody(&["ip", "link", "delete", "ovb.1"]).exits(2);
    // The process.
    let pid = place.agent.must("the agent").pid;
    place.anybody(&["cat", &format!("/proc/{pid}/environ")]).exits(1);
    place.anybody(&["ls", &format!("/proc/{pid}/fd")]).exits(2);
    place.anybody(&["kill", &pid.to_string()]).exits(1);
    // Nothing listens on any address; the tunnel's own port is the kernel's.
    let listening = kernel::run(&place.story, "h1", &["ss", "-H", "--listening", "--tcp", "--processes"]);
    assert_eq!(listening, "");

    assert_eq!(place.ctl(true, &["-o", "json", "endpoints"]).exits(0).out, attached, "all as it was");
    place.ctl(true, &["status", "--brief"]).exits(0);
}

/// The agent's name among abstract sockets, which anybody may take, keeps only another agent from starting.
#[tokio::test(flavor = "multi_thread")]
async fn a_taken_name_keeps_no_agent_from_starting() {
    let mut place = Place::up().await;
    let take = |user: u32| {
        let held = place.story.inside("h1").run(|| {
            // The user of this thread alone: whoever makes a socket owns it.
            setfsuid(Uid::from_raw(user));
            let address = std::os::unix::net::SocketAddr::from_abstract_name("overlayd").must("a name");
            UnixListener::bind_addr(&address)
        });
        held.must("enter").must("the name is free")
    };
    let held = take(0);
    place.story.ends("h1", place.command("password")).exits(1).complains(&["another overlayd runs in this network namespace"]);
    drop(held);
    let _held = take(65534);
    place.agent(place.command("password"), |status| status.ready).await;
    let log = fs::read_to_string(place.file("log")).must("the log");
    let told = log.lines().find(|line| line.contains("@overlayd is held by a user who cannot run the agent")).must("a warning");
    assert!(told.contains("WARN") && told.contains("user=65534"), "{told}");
}

/// Asks over TCP, inside the host.
fn ask(story: &Story, address: &str, method: &str, path: &str) -> Option<(u16, String)> {
    let address: SocketAddr = address.parse().must("an address");
    let mut stream = story.inside("h1").run(|| TcpStream::connect_timeout(&address, SOON)).must("enter").ok()?;
    stream.set_read_timeout(Some(SOON)).must("a limit");
    let body = r#"{"level":"trace"}"#;
    let head = format!("{method} {path} HTTP/1.0\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(head.as_bytes()).must(path);
    let mut text = String::new();
    stream.read_to_string(&mut text).must(path);
    let (head, body) = text.split_once("\r\n\r\n").must(&text);
    Some((head.split(' ').nth(1).and_then(|code| code.parse().ok()).must(head), body.to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_over_tcp_are_all_there_is() {
    let mut place = Place::up().await;
    let mut command = place.command("password");
    command.args(["--metrics-listen", METRICS]);
    place.agent(command, |status| status.ready).await;
    place.ctl(true, &["attach", "web"]).exits(0);
    for path in ["/metrics", "/healthz", "/readyz"] {
        let (code, body) = ask(&place.story, METRICS, "GET", path).must(path);
        assert_eq!(code, 200, "{path}: {body}");
        for secret in [PASSWORD, "web", "10.244.", "fd00:", "agent"] {
            assert!(!body.contains(secret), "{path} tells of `{secret}`: {body}");
        }
        assert_eq!(ask(&place.story, METRICS, "PUT", path).must(path).0, 405, "PUT {path}");
    }
    for (method, path) in [
        ("GET", "/v1/status"),
        ("GET", "/v1/endpoints"),
        ("GET", "/v1/network"),
        ("PUT", "/v1/log-level"),
        ("PUT", "/v1/endpoints/x"),
        ("DELETE", "/v1/endpoints/web"),
    ] {
        assert_eq!(ask(&place.story, METRICS, method, path).must(path).0, 404, "{method} {path}");
    }
    // Where it was asked for, and nowhere else.
    let elsewhere = place.story.at("h1").layout().addresses.v4.must("IPv4");
    assert_eq!(ask(&place.story, &format!("{elsewhere}:9780"), "GET", "/metrics"), None);
    assert!(place.ctl(true, &["endpoints"]).exits(0).out.contains("web"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_shows_nowhere() {
    let mut place = Place::up().await;
    place.agent(place.command("password"), |status| status.ready).await;
    let mut said = String::new();
    let endpoints = format!("--etcd-endpoints={}", place.story.layout().etcd_endpoints().join(","));
    let mut every_word = |place: &Place, password: &str| {
        let login = [&endpoints, "--etcd-username=agent", &format!("--etcd-password-file={}", place.path(password))];
        for command in [&["status"][..], &["-o", "json", "status"], &["inspect"], &["subnets"], &["peers"]] {
            let Said { out, err, .. } = place.ctl(true, command);
            said += &(out + &err);
        }
        for command in [&["config", "show"][..], &["subnets"]] {
            let Said { out, err, .. } = place.ctl(true, &[command, &login[..]].concat());
            said += &(out + &err);
        }
        let pid = place.agent.must("the agent").pid;
        for file in ["cmdline", "environ"] {
            said += &String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/{file}")).must(file));
        }
    };
    every_word(&place, "password");
    // The same where etcd refuses it.
    let refused = |status: &Status| status.problems.iter().any(|problem| problem.contains("--etcd-password-file"));
    place.agent(place.command("wrong"), refused).await;
    every_word(&place, "wrong");
    let log = fs::read_to_string(place.file("log")).must("the log");
    assert!(log.contains(" DEBUG ") && log.contains("--etcd-password-file"), "the log has every level, and the refusal");
    assert!(said.contains("10.244.0.0/16") && said.contains("--etcd-password-file"), "{said}");
    let kept = ["run", "state"].map(|dir| kernel::attempt(&place.story, "h1", &["grep", "-rls", "in-", &place.path(dir)]).out);
    for secret in [PASSWORD, WRONG] {
        let line = log.lines().chain(said.lines()).find(|line| line.contains(secret));
        assert_eq!(line, None, "{secret} is told");
    }
    for file in kept.iter().flat_map(|list| list.lines()) {
        let text = fs::read(file).must(file);
        let text = String::from_utf8_lossy(&text);
        assert!(!text.contains(PASSWORD) && !text.contains(WRONG), "{file} keeps the password");
    }
}

/// A file with a secret that others may read, or change, is refused before anything is touched: whoever names it, and wherever.
#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_open_to_others() {
    let place = Place::up().await;
    let (password, settings) = (place.path("password"), place.path("overlayd.toml"));
    let open = |value: u32| mode(&place.file("password"), value);
    let plain = || place.story.overlayd("h1", place.file("run"), place.file("state"));
    let remedy = format!("chmod 600 {password}");
    for value in [0o644, 0o604, 0o620, 0o666] {
        open(value);
        let told = format!("is open to others (mode {value:04o})");
        let wanted = ["etcd-password-file", &told, &remedy];
        place.story.ends("h1", place.command("password")).exits(2).complains(&wanted);
    }
    let mut by_variable = plain();
    by_variable.args(["--etcd-username", "agent"]).env("OVERLAYD_ETCD_PASSWORD_FILE", &password);
    place.story.ends("h1", by_variable).exits(2).complains(&["OVERLAYD_ETCD_PASSWORD_FILE", &remedy]);
    let with_file = |text: String| {
        fs::write(&settings, text).must("settings");
        let mut command = plain();
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let at = arguments.iter().position(|argument| argument == "/dev/null").must("the file of settings");
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
    place.story.ends("h1", with_file(naming.clone())).exits(2).complains(&[&settings, &remedy]);
    let login = [
        format!("--etcd-endpoints={}", place.story.layout().etcd_endpoints().join(",")),
        "--etcd-username=agent".to_owned(),
        format!("--etcd-password-file={password}"),
    ];
    let login: Vec<&str> = login.iter().map(String::as_str).collect();
    place.ctl(true, &[&["config", "show"][..], &login].concat()).exits(1).complains(&[&remedy]);
    assert!(!place.file("state").exists() && !place.file("run").exists(), "nothing was touched");

    // The settings themselves, where they name a secret: who changes them sends it elsewhere.
    open(0o600);
    for value in [0o664, 0o646] {
        let command = with_file(naming.clone());
        mode(&place.file("overlayd.toml"), value);
        let told = format!("can be changed by others (mode {value:04o}): chmod 644 {settings}");
        place.story.ends("h1", command).exits(2).complains(&[&told]);
    }
    // A secret that stands in the settings is not repeated.
    for text in [format!("etcd-password = \"{PASSWORD}\"\n"), format!("etcd-password = \"{PASSWORD}\n")] {
        let said = place.story.ends("h1", with_file(text)).exits(2);
        assert!(!said.err.contains(PASSWORD) && said.err.contains(&settings), "{}", said.err);
    }
    for flag in [format!("--etcd-password={PASSWORD}"), format!("--etcd-endpoints=http://agent:{PASSWORD}@10.99.0.2:2379")] {
        let mut command = plain();
        command.arg(&flag);
        let said = place.story.ends("h1", command).exits(2);
        assert!(!said.err.contains(PASSWORD), "{}", said.err);
        let said = place.ctl(true, &["config", "show", &flag]);
        assert!(matches!(said.code, Some(1 | 2)) && !said.err.contains(PASSWORD), "{}", said.err);
    }
    // All as it should be.
    place.ctl(true, &[&["config", "show"][..], &login].concat()).exits(0);
}
