//! An etcd cluster of three set up by `deploy/etcd`: mutual TLS, and least-privilege roles.
//!
//! Covers an agent's permissions, and its errors for a wrong certificate, password or role.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::api::Status;
use overlay_tests::dump::NetnsDump;
use overlay_tests::programs::{CommandOutput, overlayctl, require_program};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::wait::eventually_async;
use overlay_tests::{ExpectContext, TestLab};
use overlayctl::client::Client;
use overlayctl::lab::process::{self, ProcessId, TERM_GRACE};
use overlayctl::lab::{Families, layout};

/// One member per host: each verifies that the others connect from the address in their certificate.
const MEMBERS: [(&str, &str); 3] = [("h1", "10.99.1.1"), ("h2", "10.99.1.2"), ("h3", "10.99.1.3")];

/// Time limit for a leader election, or for an agent to notice that a server is gone.
const ELECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// A lab with hosts and without agents, and a cluster member on each host.
struct Cluster {
    lab: TestLab,
    members: Vec<ProcessId>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let failures = process::terminate_all(&self.members, TERM_GRACE);
        assert!(failures.is_empty() || std::thread::panicking(), "{failures:?}");
    }
}

/// A script of `deploy/etcd`.
fn script(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/etcd").join(name);
    path.to_str().expect_ok("a path in UTF-8").to_owned()
}

impl Cluster {
    async fn up() -> Cluster {
        require_program("openssl", "openssl");
        require_program("etcdctl", "etcd-client");
        let lab = TestLab::without_agents(3, Families::V4).await;
        let mut cluster = Cluster { lab, members: Vec::new() };
        let net = cluster.lab.open_netns("net");
        cluster.create_certificates("pki", "365", &["overlay-agent"]);
        let list = MEMBERS.map(|(name, address)| format!("{name}={address}"));
        for (name, _) in MEMBERS {
            cluster.start_member(name, name, &list);
        }
        let healthy = || {
            let mut command = cluster.etcdctl(None);
            command.args(["endpoint", "health"]);
            let output = run(&mut command, Some(&net));
            std::future::ready(if output.code == Some(0) { Ok(()) } else { Err(output.stderr) })
        };
        eventually_async("all members are healthy", ELECTION_TIMEOUT, healthy).await;
        let mut access = cluster.etcdctl(Some("access.sh"));
        access.arg(cluster.file("passwords"));
        run(&mut access, Some(&net)).assert_code(0);
        cluster
    }

    /// Starts a member of the cluster with this member list.
    fn start_member(&mut self, netns_name: &str, name: &str, list: &[String]) {
        let mut settings = Command::new(script("member.sh"));
        settings.arg(name).arg(self.file("pki")).args(list).env("DATA", self.file(&format!("{name}-etcd")));
        let settings = run(&mut settings, None).assert_code(0).stdout;
        let mut etcd = Command::new("etcd");
        for (key, value) in settings.lines().filter_map(|line| line.split_once('=')) {
            etcd.env(key, value);
        }
        let (log, record) = (self.file(&format!("{name}-etcd.log")), self.file(&format!("{name}-etcd.pid")));
        self.members.push(process::start(etcd, Some(&self.lab.open_netns(netns_name)), &log, &record).expect_ok(name));
    }

    /// Starts a separate server with an expired certificate; returns its URL.
    fn start_expired_server(&mut self) -> String {
        let net = self.lab.open_netns("net");
        let addresses =
            run(Command::new("ip").args(["-o", "-4", "address", "show", "to", "10.99.0.2"]), Some(&net)).assert_code(0).stdout;
        let device = addresses.split_whitespace().nth(1).expect_ok("the device of the lab's etcd");
        run(Command::new("ip").args(["address", "add", "10.99.0.12/16", "dev", device]), Some(&net)).assert_code(0);
        let mut certs = Command::new(script("certs.sh"));
        certs.arg(self.file("pki")).args(["member", "stale", "10.99.0.12"]).env("DAYS", "0");
        run(&mut certs, None).assert_code(0);
        // A certificate of 0 days is still valid in the second in which it was made.
        let expired = ["x509", "-noout", "-checkend", "0", "-in", &self.file("pki/stale.crt").display().to_string()];
        let end = std::time::Instant::now() + CONVERGE_TIMEOUT;
        while run(Command::new("openssl").args(expired), None).code == Some(0) {
            assert!(std::time::Instant::now() < end, "the certificate does not expire");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        // openssl counts the last second of a certificate as expired, rustls as valid.
        std::thread::sleep(std::time::Duration::from_secs(1));
        self.start_member("net", "stale", &["stale=10.99.0.12".to_owned()]);
        "https://10.99.0.12:2379".to_owned()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.lab.dir().join(name)
    }

    /// Creates a CA with certificates for all members and the clients, valid for that many days.
    fn create_certificates(&self, dir: &str, days: &str, clients: &[&str]) {
        let certs = |arguments: &[&str], days: &str| {
            let mut command = Command::new(script("certs.sh"));
            command.arg(self.file(dir)).args(arguments).env("DAYS", days);
            run(&mut command, None).assert_code(0);
        };
        certs(&["ca"], "365");
        for (name, address) in MEMBERS {
            certs(&["member", name, address], "365");
        }
        for client in clients {
            certs(&["client", client], days);
        }
    }

    /// etcdctl, or a script that uses it, with the agent's certificate.
    fn etcdctl(&self, script_name: Option<&str>) -> Command {
        let mut command = script_name.map_or_else(|| Command::new("etcdctl"), |name| Command::new(script(name)));
        command.env("ETCDCTL_API", "3").env("ETCDCTL_ENDPOINTS", MEMBERS.map(|(_, a)| format!("https://{a}:2379")).join(","));
        command.env("ETCDCTL_CACERT", self.file("pki/ca.crt"));
        command.env("ETCDCTL_CERT", self.file("pki/overlay-agent.crt"));
        command.env("ETCDCTL_KEY", self.file("pki/overlay-agent.key"));
        command
    }

    /// Runs etcdctl as one of the users.
    fn etcdctl_as_user(&self, user: &str, arguments: &[&str]) -> CommandOutput {
        let password = std::fs::read_to_string(self.file("passwords").join(user)).expect_ok("a password");
        let mut command = self.etcdctl(None);
        command.env("ETCDCTL_USER", format!("{user}:{}", password.trim_end())).args(arguments);
        run(&mut command, Some(&self.lab.open_netns("net")))
    }

    /// The flags of a client for the cluster: a user, the CA's directory, and a certificate name.
    fn flags(&self, user: &str, pki: &str, certificate: &str) -> Vec<String> {
        let path = |name: String| self.file(&name).display().to_string();
        vec![
            format!("--etcd-endpoints={}", MEMBERS.map(|(_, address)| format!("https://{address}:2379")).join(",")),
            format!("--etcd-cafile={}", path(format!("{pki}/ca.crt"))),
            format!("--etcd-certfile={}", path(format!("pki/{certificate}.crt"))),
            format!("--etcd-keyfile={}", path(format!("pki/{certificate}.key"))),
            format!("--etcd-username={user}"),
            format!("--etcd-password-file={}", path(format!("passwords/{user}"))),
        ]
    }

    /// Writes the network configuration as its administrator.
    fn write_network_config(&self) {
        let network = self.file("network.json");
        std::fs::write(&network, r#"{"Network": "10.244.0.0/16"}"#).expect_ok("a file");
        let mut command = Command::new(overlayctl());
        command.args(["config", "set"]).arg(&network).args(self.flags("overlay-admin", "pki", "overlay-agent"));
        run(&mut command, Some(&self.lab.open_netns("h1"))).assert_code(0);
    }

    /// Starts an agent with these flags; it ends with the test.
    fn start_agent(&mut self, host: &str, flags: &[String]) -> Client {
        let dir = self.file(&format!("{host}-{}", self.members.len()));
        let mut command = self.lab.overlayd_command(host, dir.join("run"), dir.join("state"));
        // Replace the endpoints of the lab's own etcd, which the harness sets.
        let mut arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let named = arguments.iter().position(|a| a == "--etcd-endpoints").expect_ok("the lab's etcd");
        arguments.drain(named..named + 2);
        let environment: Vec<_> = command.get_envs().map(|(k, v)| (k.to_owned(), v.map(ToOwned::to_owned))).collect();
        command = Command::new(command.get_program());
        for (name, _) in environment.iter().filter(|(_, value)| value.is_none()) {
            command.env_remove(name);
        }
        command.args(arguments).args(flags);
        std::fs::create_dir_all(&dir).expect_ok("a directory");
        let netns = self.lab.open_netns(host);
        let process = process::start(command, Some(&netns), &dir.join("log"), &dir.join("pid")).expect_ok("the agent");
        self.members.push(process);
        Client::new(dir.join("run/overlayd.sock"))
    }

    /// Ends the agent that was started last.
    fn stop_last(&mut self) {
        let last = self.members.pop().expect_ok("an agent");
        assert_eq!(process::terminate_all(&[last], TERM_GRACE), Vec::<String>::new());
    }
}

fn run(command: &mut Command, netns: Option<&overlay_agent::kernel::netns::Netns>) -> CommandOutput {
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    command.stdin(std::process::Stdio::null());
    let output = match netns {
        Some(netns) => netns.run(|| command.output()).expect_ok("enter the namespace"),
        None => command.output(),
    };
    CommandOutput::from_output(&words, &output.expect_ok(&words[0]))
}

async fn wait_status(what: &str, client: &Client, condition: impl Fn(&Status) -> bool) -> Status {
    let query = || async {
        match client.status().await {
            Ok(status) if condition(&status) => Ok(status),
            Ok(status) => Err(format!("{:?}, connected {}", status.problems, status.store.connected)),
            Err(error) => Err(error.to_string()),
        }
    };
    eventually_async(what, READY_TIMEOUT.max(ELECTION_TIMEOUT), query).await
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_role_has_least_privilege() {
    let mut cluster = Cluster::up().await;
    cluster.write_network_config();
    let flags = cluster.flags("overlay-agent", "pki", "overlay-agent");
    let first = cluster.start_agent("h1", &flags);
    let status = wait_status("the first agent is ready", &first, |status| status.ready).await;
    let subnet = status.lease.expect_ok("a lease").subnet;

    // Its password gives no access to the configuration, to keys outside the prefix, or to administration.
    let lease = format!("{}/subnets/x", layout::ETCD_PREFIX);
    cluster.etcdctl_as_user("overlay-agent", &["put", &lease, "{}"]).assert_code(0);
    cluster.etcdctl_as_user("overlay-agent", &["del", &lease]).assert_code(0);
    let config = format!("{}/config", layout::ETCD_PREFIX);
    let blue = |key: &str| format!("{}/networks/blue/{key}", layout::ETCD_PREFIX);
    for denied in [
        &["put", &config, "{}"][..],
        &["del", &config],
        &["put", "/coreos.com/network2/subnets/x", "{}"],
        &["put", &blue("config"), "{}"],
        &["put", &blue("subnets/x"), "{}"],
        &["put", &format!("{}/vnis/2", layout::ETCD_PREFIX), "blue"],
        &["get", "--prefix", "/coreos.com/"],
        &["get", "--prefix", ""],
        &["user", "add", "mallory:x"],
        &["auth", "disable"],
    ] {
        cluster.etcdctl_as_user("overlay-agent", denied).assert_code(1).assert_stderr_contains(&["permission denied"]);
    }
    cluster.etcdctl_as_user("overlay-reader", &["get", &config]).assert_code(0);
    cluster
        .etcdctl_as_user("overlay-reader", &["put", &lease, "{}"])
        .assert_code(1)
        .assert_stderr_contains(&["permission denied"]);
    // A named network's leases are granted one by one; its record stays the administrator's.
    let mut access = cluster.etcdctl(Some("access.sh"));
    access.arg(cluster.file("passwords")).args([layout::ETCD_PREFIX, "blue"]);
    run(&mut access, Some(&cluster.lab.open_netns("net"))).assert_code(0);
    cluster.etcdctl_as_user("overlay-agent", &["put", &blue("subnets/x"), "{}"]).assert_code(0);
    for denied in [blue("config"), blue("subnets"), blue("subnets").replace("blue", "green") + "/x"] {
        let denied = cluster.etcdctl_as_user("overlay-agent", &["put", &denied, "{}"]);
        denied.assert_code(1).assert_stderr_contains(&["permission denied"]);
    }
    let network = |user: &str, words: &[&str]| {
        let mut command = Command::new(overlayctl());
        command.arg("network").args(words).args(cluster.flags(user, "pki", "overlay-agent"));
        run(&mut command, Some(&cluster.lab.open_netns("h1")))
    };
    let refused = network("overlay-agent", &["set", "default", "--mtu", "1400"]);
    refused.assert_code(1).assert_stderr_contains(&["user `overlay-agent` may not change a network", "role overlay-admin's"]);
    network("overlay-reader", &["ls"]).assert_code(0);
    network("overlay-admin", &["rm", "blue", "--force"]).assert_code(0);
    // A certificate's name selects its user. An unknown name has no access without a password; without a certificate, no
    // connection.
    cluster.create_certificates("pki", "365", &["passer-by"]);
    for (certificate, code) in [("overlay-agent", 0), ("passer-by", 1), ("none", 1)] {
        let mut nameless = cluster.etcdctl(None);
        nameless.args(["--command-timeout=3s", "get", &config]);
        if certificate == "none" {
            nameless.env_remove("ETCDCTL_CERT").env_remove("ETCDCTL_KEY");
        } else {
            nameless.env("ETCDCTL_CERT", cluster.file(&format!("pki/{certificate}.crt")));
            nameless.env("ETCDCTL_KEY", cluster.file(&format!("pki/{certificate}.key")));
        }
        run(&mut nameless, Some(&cluster.lab.open_netns("net"))).assert_code(code);
    }

    // Two of three members are a quorum: the agent continues with any of them, and another host joins.
    let gone = cluster.members[0];
    gone.signal(Signal::SIGKILL).expect_ok("kill a member");
    assert!(gone.wait(TERM_GRACE), "the member is gone");
    let second = cluster.start_agent("h2", &flags);
    wait_status("the second agent is ready without one member", &second, |status| status.ready && status.data_path.peers == 1)
        .await;
    let status =
        wait_status("the first agent has the second as peer", &first, |s| s.ready && s.store.connected && s.data_path.peers == 1)
            .await;
    assert_eq!(status.lease.expect_ok("a lease").subnet, subnet);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_wrong_credential_has_its_own_error() {
    let mut cluster = Cluster::up().await;
    cluster.write_network_config();
    cluster.create_certificates("other", "365", &[]);
    // An expired certificate of the right CA, and a valid one of another CA.
    cluster.create_certificates("pki", "0", &["expired"]);
    cluster.create_certificates("other", "365", &["stranger"]);
    for ending in ["crt", "key"] {
        let (from, to) = (format!("other/stranger.{ending}"), format!("pki/stranger.{ending}"));
        std::fs::copy(cluster.file(&from), cluster.file(&to)).expect_ok(&to);
    }
    let wrong = cluster.file("passwords/wrong");
    std::fs::write(&wrong, "not the password\n").expect_ok("a password");
    std::fs::set_permissions(&wrong, std::fs::Permissions::from_mode(0o600)).expect_ok("for its owner alone");
    let before = NetnsDump::of(&cluster.lab.open_netns("h1"));

    let mut wrong_password = cluster.flags("overlay-agent", "pki", "overlay-agent");
    wrong_password.retain(|flag| !flag.starts_with("--etcd-password-file"));
    wrong_password.push(format!("--etcd-password-file={}", cluster.file("passwords/wrong").display()));
    let stale = cluster.start_expired_server();
    let mut expired_server = cluster.flags("overlay-agent", "pki", "overlay-agent");
    expired_server[0] = format!("--etcd-endpoints={stale}");
    let cases = [
        (
            "the reader's role",
            cluster.flags("overlay-reader", "pki", "overlay-agent"),
            vec!["user `overlay-reader` may not write"],
        ),
        ("a wrong password", wrong_password, vec!["user `overlay-agent`", "--etcd-password-file"]),
        ("a wrong CA", cluster.flags("overlay-agent", "other", "overlay-agent"), vec!["not signed by the CA of --etcd-cafile"]),
        ("an expired certificate", cluster.flags("overlay-agent", "pki", "expired"), vec!["--etcd-certfile", "has expired"]),
        ("a server's expired certificate", expired_server, vec!["its certificate has expired"]),
        ("a stranger's certificate", cluster.flags("overlay-agent", "pki", "stranger"), vec!["client certificate of its CA"]),
    ];
    let mut errors = Vec::new();
    for (what, flags, wanted) in cases {
        let client = cluster.start_agent("h1", &flags);
        let says = |status: &Status| wanted.iter().all(|text| status.problems.iter().any(|problem| problem.contains(text)));
        let status = wait_status(what, &client, says).await;
        assert!(!status.ready && status.lease.is_none(), "{what}: {status:?}");
        errors.push(status.problems.join("; "));
        cluster.stop_last();
    }
    errors.sort_unstable();
    errors.dedup();
    assert_eq!(errors.len(), 6, "the errors are distinct: {errors:#?}");
    let text = errors.join("\n");
    assert!(!text.contains("not the password"), "{text}");
    // Agents without a lease have changed nothing.
    let changes = NetnsDump::of(&cluster.lab.open_netns("h1")).changes_since(&before);
    assert!(changes.is_empty(), "{changes}");
    let keys = cluster.etcdctl_as_user("root", &["get", "--prefix", "--keys-only", layout::ETCD_PREFIX]).assert_code(0).stdout;
    assert_eq!(keys.trim(), format!("{}/config", layout::ETCD_PREFIX));
}
