//! Machines for the pages: what stands in the documentation is run on them as it stands, in the directories and at the addresses of the pages.
//!
//! A machine is a set of namespaces (network, mounts, processes, host name) on one switch, with a root of its own as far as it is written to
//! (`machines/boot.sh`). What it has in place of systemd and its journal stands in `machines/bin`; services are started by the same commands as their
//! units do it, and the units themselves are tested on booted systems by `tests/systemd.sh`.
//!
//! | name | address |
//! | --- | --- |
//! | `host-1`, `host-2`, ... | 192.0.2.1, 192.0.2.2, ... |
//! | `etcd` | 192.0.2.10 |
//! | `etcd-1`, `etcd-2`, `etcd-3` | 192.0.2.11 to 192.0.2.13 |
//! | `net` | the switch; default gateway 192.0.2.254, and 203.0.113.1 in the world outside |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::programs::{CommandOutput, overlayctl, require_program, require_root};
use crate::{ExpectContext, eventually};

/// How long a machine may take to be there: a fraction of a second.
const BOOT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a condition on a machine may take to hold: a moment, more where the machines share a busy processor.
const CONDITION_TIMEOUT: Duration = Duration::from_secs(60);

/// The machines of a story. All of it goes with this value.
#[derive(Debug)]
pub struct DocHosts {
    hosts: BTreeMap<String, DocHost>,
}

#[derive(Debug)]
struct DocHost {
    /// `unshare`, whose end is that of all processes of the machine.
    supervisor: Child,
    /// The machine's first process, as it is seen from outside.
    init_pid: i32,
}

impl DocHosts {
    /// Boots three hosts with an agent each and the subnets of the pages, `etcd`, and what else is named.
    pub async fn with_overlay(more: &[&str]) -> DocHosts {
        let machines = DocHosts::boot(&[&["host-1", "host-2", "host-3", "etcd"], more].concat()).await;
        machines.start_etcd("etcd");
        machines.set_network_config("host-1", r#"{"Network": "10.244.0.0/16"}"#);
        for (host, subnet) in [("host-1", "10.244.7.0/24"), ("host-2", "10.244.9.0/24"), ("host-3", "10.244.12.0/24")] {
            machines.configure(host, subnet);
            machines.run(host, "systemctl start overlayd");
        }
        machines
    }

    /// Boots a switch and these machines.
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

    /// A machine's interface `eth0`, on the switch.
    fn attach_to_switch(&self, name: &str) {
        // The kernel takes the number of the switch's process as the caller sees it, who is outside.
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
        self.hosts.get(name).expect_ok(&format!("a machine `{name}`"))
    }

    /// A command that runs on a machine as root, in root's directory.
    pub fn command(&self, name: &str, program: &str, arguments: &[&str]) -> Command {
        let init = self.host(name).init_pid.to_string();
        let own = overlayctl().parent().expect_ok("its directory").to_path_buf();
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

    /// Runs a script on a machine; what it printed. It has to end well.
    #[track_caller]
    pub fn run(&self, name: &str, script: &str) -> String {
        let output = self.command(name, "bash", &["-euo", "pipefail", "-c", script]).output().expect_ok("nsenter");
        CommandOutput::from_output(&[name, script], &output).assert_code(0).stdout
    }

    /// Waits until a script ends well on a machine.
    pub async fn wait_for(&self, name: &str, script: &str) {
        eventually(&format!("on {name}: {script}"), CONDITION_TIMEOUT, || {
            let output = self.command(name, "bash", &["-euo", "pipefail", "-c", script]).output().expect_ok("nsenter");
            let said = CommandOutput::from_output(&[name, script], &output);
            if said.code == Some(0) { Ok(()) } else { Err(said.stdout + &said.stderr) }
        })
        .await;
    }

    /// Writes a file of a machine.
    #[track_caller]
    pub fn write(&self, name: &str, path: &str, text: &str) {
        // As the machine's own processes see it.
        let init = self.host(name).init_pid;
        let path = PathBuf::from(format!("/proc/{init}/root{path}"));
        std::fs::create_dir_all(path.parent().expect_ok("a directory")).expect_ok("a directory");
        std::fs::write(&path, text).expect_ok(&path.display().to_string());
    }

    /// Copies a file of one machine to another one.
    #[track_caller]
    pub fn copy(&self, from: &str, to: &str, path: &str) {
        let file = |name: &str| PathBuf::from(format!("/proc/{}/root{path}", self.host(name).init_pid));
        std::fs::copy(file(from), file(to)).expect_ok(path);
    }

    /// Starts etcd on a machine, reachable at the machine's address.
    #[track_caller]
    pub fn start_etcd(&self, name: &str) {
        let url = format!("http://192.0.2.{}:2379", host_number(name));
        let settings = format!("ETCD_LISTEN_CLIENT_URLS={url},http://127.0.0.1:2379\nETCD_ADVERTISE_CLIENT_URLS={url}\n");
        self.write(name, "/etc/default/etcd", &settings);
        self.run(name, "systemctl start etcd");
    }

    /// Writes the network's configuration into the etcd at `etcd`.
    #[track_caller]
    pub fn set_network_config(&self, name: &str, config: &str) {
        self.write(name, "/run/network.json", config);
        self.run(name, "overlayctl config set /run/network.json --etcd-endpoints http://192.0.2.10:2379");
    }

    /// Gives a host its configuration, with etcd at `etcd`, and the memory of a subnet that it had: the one that the pages show. Its agent is not started.
    #[track_caller]
    pub fn configure(&self, name: &str, subnet: &str) {
        self.write(name, "/etc/overlayd/overlayd.toml", "etcd-endpoints = [\"http://192.0.2.10:2379\"]\n");
        self.write_saved_subnet(name, subnet);
    }

    /// Gives a host the memory of a subnet that it had.
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
                eprintln!("--- the end of the log of {name} ({})\n{log}", machine.init_pid);
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
        // Ended with this thread, and its processes with it, also where the test is killed.
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
        let keeper = command.spawn().expect_ok("unshare");
        let children = format!("/proc/{0}/task/{0}/children", keeper.id());
        let init = eventually(&format!("machine {name} is there"), BOOT_TIMEOUT, || {
            let text = std::fs::read_to_string(&children).unwrap_or_default();
            let init: i32 = text.trim().parse().map_err(|_| "it has no first process".to_owned())?;
            let ready = Path::new(&format!("/proc/{init}/root/run/machine/ready")).exists();
            if ready { Ok(init) } else { Err("it is not ready".to_owned()) }
        })
        .await;
        DocHost { supervisor: keeper, init_pid: init }
    }
}

/// The last number of a machine's address.
fn host_number(name: &str) -> u8 {
    let number = |text: &str| text.parse::<u8>().expect_ok("a machine's number");
    match name.split_once('-') {
        Some(("host", n)) => number(n),
        Some(("etcd", n)) => 10 + number(n),
        _ => 10,
    }
}
