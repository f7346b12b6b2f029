//! Hosts for the documentation pages.
//!
//! The pages' commands run here unchanged, with the directories and addresses of the pages.
//!
//! A host is a set of namespaces (network, mounts, processes, host name) on one switch. The directories that it writes to are its
//! own (`machines/boot.sh`). `machines/bin` holds its substitutes for systemd and the journal. They start services by the same
//! commands as the units; `tests/systemd.sh` tests the units themselves on booted systems.
//!
//! | name | address |
//! | --- | --- |
//! | `host-1`, `host-2`, ... | 192.0.2.1, 192.0.2.2, ... |
//! | `etcd` | 192.0.2.10 |
//! | `etcd-1`, `etcd-2`, `etcd-3` | 192.0.2.11 to 192.0.2.13 |
//! | `net` | the switch; default gateway 192.0.2.254, and 203.0.113.1 outside the network |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::programs::{CommandOutput, overlayctl, require_program, require_root};
use crate::{ExpectContext, eventually};

/// Time limit for a host's boot: usually a fraction of a second.
const BOOT_TIMEOUT: Duration = Duration::from_secs(30);

/// Time limit for a condition on a host. Usually a moment, more if the hosts share a busy processor.
const CONDITION_TIMEOUT: Duration = Duration::from_secs(60);

/// The hosts of a test. All of them end with this value.
#[derive(Debug)]
pub struct DocHosts {
    hosts: BTreeMap<String, DocHost>,
}

#[derive(Debug)]
struct DocHost {
    /// `unshare`; its end terminates all processes of the host.
    supervisor: Child,
    /// The PID of the host's init process in the test's PID namespace.
    init_pid: i32,
}

impl DocHosts {
    /// Boots three hosts with an agent each and the subnets of the pages, `etcd`, and the named hosts.
    pub async fn with_overlay(agent_args: &[&str]) -> DocHosts {
        let machines = DocHosts::boot(&[&["host-1", "host-2", "host-3", "etcd"], agent_args].concat()).await;
        machines.start_etcd("etcd");
        machines.set_network_config("host-1", r#"{"Network": "10.244.0.0/16"}"#);
        for (host, subnet) in [("host-1", "10.244.7.0/24"), ("host-2", "10.244.9.0/24"), ("host-3", "10.244.12.0/24")] {
            machines.configure(host, subnet);
            machines.run(host, "systemctl start overlayd");
        }
        machines
    }

    /// Boots a switch and these hosts.
    pub async fn boot(names: &[&str]) -> DocHosts {
        require_root();
        for (program, package) in [
            ("bash", "bash"),
            ("etcd", "etcd-server"),
            ("etcdctl", "etcd-client"),
            ("ip", "iproute2"),
            ("nft", "nftables"),
            ("ping", "iputils-ping"),
            ("sysctl", "procps"),
            ("tcpdump", "tcpdump"),
            ("unshare", "util-linux"),
        ] {
            require_program(program, package);
        }
        let mut all = DocHosts { hosts: BTreeMap::new() };
        for name in std::iter::once("net").chain(names.iter().copied()) {
            all.hosts.insert(name.to_owned(), DocHost::boot(name).await);
        }
        all.run("net", "ip link add switch type bridge; ip address add 192.0.2.254/24 dev switch; ip link set switch up");
        all.run("net", "ip address add 203.0.113.1/32 dev lo");
        for name in names {
            all.attach_to_switch(name);
            let hosts: String = names.iter().map(|n| format!("192.0.2.{} {n}\n", host_number(n))).collect();
            all.run(name, &format!("printf '%s' '{hosts}' >>/etc/hosts"));
        }
        all
    }

    /// Connects a host's interface `eth0` to the switch.
    fn attach_to_switch(&self, name: &str) {
        // The kernel resolves the switch's PID in the caller's PID namespace, which is outside of the host.
        let net = self.host("net").init_pid;
        let enter = |init: i32, script: String| {
            let output = Command::new("nsenter")
                .args(["-t", &init.to_string(), "-n", "bash", "-euc", &script])
                .output()
                .expect_ok("nsenter");
            assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        };
        enter(
            self.host(name).init_pid,
            format!(
                "ip link add eth0 type veth peer name {name} netns {net}; ip address add 192.0.2.{}/24 dev eth0; ip link set eth0 up; \
                 ip route add default via 192.0.2.254",
                host_number(name)
            ),
        );
        enter(net, format!("ip link set {name} master switch up"));
    }

    fn host(&self, name: &str) -> &DocHost {
        self.hosts.get(name).expect_ok(&format!("a host `{name}`"))
    }

    /// A command that runs on a host as root, in root's directory.
    pub fn command(&self, name: &str, program: &str, arguments: &[&str]) -> Command {
        let init = self.host(name).init_pid.to_string();
        let own = overlayctl().parent().expect_ok("overlayctl's directory").to_path_buf();
        let path = format!("/usr/local/sbin:/usr/local/bin:{}:/usr/sbin:/usr/bin:/sbin:/bin", own.display());
        let mut command = Command::new("nsenter");
        command.args([
            "-t",
            &init,
            "-n",
            "-m",
            "-u",
            "-i",
            "-p",
            "env",
            "-i",
            "--chdir=/root",
            "HOME=/root",
            "LC_ALL=C.UTF-8",
            "TERM=dumb",
        ]);
        command.args(["ETCDCTL_API=3", &format!("PATH={path}"), program]).args(arguments);
        command.stdin(Stdio::null());
        command
    }

    /// Runs a script on a host and returns its output. The script must succeed.
    #[track_caller]
    pub fn run(&self, name: &str, script: &str) -> String {
        let output = self.command(name, "bash", &["-euo", "pipefail", "-c", script]).output().expect_ok("nsenter");
        CommandOutput::from_output(&[name, script], &output).assert_code(0).stdout
    }

    /// Waits until a script succeeds on a host.
    pub async fn wait_for(&self, name: &str, script: &str) {
        eventually(&format!("on {name}: {script}"), CONDITION_TIMEOUT, || {
            let output = self.command(name, "bash", &["-euo", "pipefail", "-c", script]).output().expect_ok("nsenter");
            let result = CommandOutput::from_output(&[name, script], &output);
            if result.code == Some(0) { Ok(()) } else { Err(result.stdout + &result.stderr) }
        })
        .await;
    }

    /// Writes a file on a host.
    #[track_caller]
    pub fn write(&self, name: &str, path: &str, text: &str) {
        // The path as the host's own processes see it.
        let init = self.host(name).init_pid;
        let path = PathBuf::from(format!("/proc/{init}/root{path}"));
        std::fs::create_dir_all(path.parent().expect_ok("a directory")).expect_ok("a directory");
        std::fs::write(&path, text).expect_ok(&path.display().to_string());
    }

    /// Copies a file from one host to another.
    #[track_caller]
    pub fn copy(&self, from: &str, to: &str, path: &str) {
        let file = |name: &str| PathBuf::from(format!("/proc/{}/root{path}", self.host(name).init_pid));
        std::fs::copy(file(from), file(to)).expect_ok(path);
    }

    /// Starts etcd on a host, listening on the host's address.
    #[track_caller]
    pub fn start_etcd(&self, name: &str) {
        let url = format!("http://192.0.2.{}:2379", host_number(name));
        let settings = format!("ETCD_LISTEN_CLIENT_URLS={url},http://127.0.0.1:2379\nETCD_ADVERTISE_CLIENT_URLS={url}\n");
        self.write(name, "/etc/default/etcd", &settings);
        self.run(name, "systemctl start etcd");
    }

    /// Writes the network configuration to the etcd at `etcd`.
    #[track_caller]
    pub fn set_network_config(&self, name: &str, config: &str) {
        self.write(name, "/run/network.json", config);
        self.run(name, "overlayctl config set /run/network.json --etcd-endpoints http://192.0.2.10:2379");
    }

    /// Configures a host with the etcd at `etcd`, and saves the subnet of the pages as its last one. Does not start its agent.
    #[track_caller]
    pub fn configure(&self, name: &str, subnet: &str) {
        self.write(name, "/etc/overlayd/overlayd.toml", "etcd-endpoints = [\"http://192.0.2.10:2379\"]\n");
        self.write_saved_subnet(name, subnet);
    }

    /// Writes a host's state file with a saved subnet.
    #[track_caller]
    pub fn write_saved_subnet(&self, name: &str, subnet: &str) {
        self.run(name, "install -d -m 0700 /var/lib/overlayd");
        self.write(name, "/var/lib/overlayd/state.json", &format!("{{\"version\": 1, \"subnet\": {{\"v4\": \"{subnet}\"}}}}\n"));
    }
}

impl Drop for DocHosts {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        for (name, machine) in &self.hosts {
            if failed && name.starts_with("host") {
                let output = self.command(name, "tail", &["-n", "25", "/var/log/overlayd.log"]).output();
                let log = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
                eprintln!("--- last lines of the log of {name} ({})\n{log}", machine.init_pid);
            }
        }
        for machine in self.hosts.values_mut() {
            let _ended = machine.supervisor.kill().and_then(|()| machine.supervisor.wait());
        }
    }
}

impl DocHost {
    async fn boot(name: &str) -> DocHost {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/machines");
        // A SIGKILL at the end of this thread ends it with its processes, also if the test is killed.
        let mut command = Command::new("setpriv");
        command.args([
            "--pdeathsig",
            "KILL",
            "unshare",
            "--net",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
            "--fork",
            "--kill-child=KILL",
        ]);
        command
            .args(["--mount-proc", "--propagation", "private", "bash"])
            .arg(own.join("boot.sh"))
            .arg(name)
            .arg(own.join("bin"));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let supervisor = command.spawn().expect_ok("unshare");
        let children = format!("/proc/{0}/task/{0}/children", supervisor.id());
        let init = eventually(&format!("host {name} is up"), BOOT_TIMEOUT, || {
            let text = std::fs::read_to_string(&children).unwrap_or_default();
            let init: i32 = text.trim().parse().map_err(|_| "no init process".to_owned())?;
            let ready = Path::new(&format!("/proc/{init}/root/run/machine/ready")).exists();
            if ready { Ok(init) } else { Err("not ready".to_owned()) }
        })
        .await;
        DocHost { supervisor, init_pid: init }
    }
}

/// The last byte of a host's address.
fn host_number(name: &str) -> u8 {
    let number = |text: &str| text.parse::<u8>().expect_ok("a host's number");
    match name.split_once('-') {
        Some(("host", n)) => number(n),
        Some(("etcd", n)) => 10 + number(n),
        _ => 10,
    }
}
