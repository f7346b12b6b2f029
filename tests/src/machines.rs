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

use crate::programs::{Said, needs, needs_root, overlayctl};
use crate::{Must, eventually};

/// How long a machine may take to be there: a fraction of a second.
const BOOT: Duration = Duration::from_secs(30);

/// How long a condition on a machine may take to hold: a moment, more where the machines share a busy processor.
const UNTIL: Duration = Duration::from_secs(60);

/// The machines of a story. All of it goes with this value.
#[derive(Debug)]
pub struct Machines {
    machines: BTreeMap<String, Machine>,
}

#[derive(Debug)]
struct Machine {
    /// `unshare`, whose end is that of all processes of the machine.
    keeper: Child,
    /// The machine's first process, as it is seen from outside.
    init: i32,
}

impl Machines {
    /// Boots three hosts with an agent each and the subnets of the pages, `etcd`, and what else is named.
    pub async fn with_overlay(others: &[&str]) -> Machines {
        let machines = Machines::boot(&[&["host-1", "host-2", "host-3", "etcd"], others].concat()).await;
        machines.etcd("etcd");
        machines.network("host-1", r#"{"Network": "10.244.0.0/16"}"#);
        for (host, subnet) in [("host-1", "10.244.7.0/24"), ("host-2", "10.244.9.0/24"), ("host-3", "10.244.12.0/24")] {
            machines.configure(host, subnet);
            machines.run(host, "systemctl start overlayd");
        }
        machines
    }

    /// Boots a switch and these machines.
    pub async fn boot(names: &[&str]) -> Machines {
        needs_root();
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
            needs(program, package);
        }
        let mut all = Machines { machines: BTreeMap::new() };
        for name in std::iter::once("net").chain(names.iter().copied()) {
            all.machines.insert(name.to_owned(), Machine::boot(name).await);
        }
        all.run("net", "ip link add switch type bridge; ip address add 192.0.2.254/24 dev switch; ip link set switch up");
        all.run("net", "ip address add 203.0.113.1/32 dev lo");
        for name in names {
            all.plug(name);
            let hosts: String = names.iter().map(|n| format!("192.0.2.{} {n}\n", last(n))).collect();
            all.run(name, &format!("printf '%s' '{hosts}' >>/etc/hosts"));
        }
        all
    }

    /// A machine's interface `eth0`, on the switch.
    fn plug(&self, name: &str) {
        // The kernel takes the number of the switch's process as the caller sees it, who is outside.
        let net = self.machine("net").init;
        let enter = |init: i32, script: String| {
            let output =
                Command::new("nsenter").args(["-t", &init.to_string(), "-n", "bash", "-euc", &script]).output().must("nsenter");
            assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        };
        enter(
            self.machine(name).init,
            format!(
                "ip link add eth0 type veth peer name {name} netns {net}; ip address add 192.0.2.{}/24 dev eth0; ip link set eth0 up; \
                 ip route add default via 192.0.2.254",
                last(name)
            ),
        );
        enter(net, format!("ip link set {name} master switch up"));
    }

    fn machine(&self, name: &str) -> &Machine {
        self.machines.get(name).must(&format!("a machine `{name}`"))
    }

    /// A command that runs on a machine as root, in root's directory.
    pub fn command(&self, name: &str, program: &str, arguments: &[&str]) -> Command {
        let init = self.machine(name).init.to_string();
        let own = overlayctl().parent().must("its directory").to_path_buf();
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
        let output = self.command(name, "bash", &["-euo", "pipefail", "-c", script]).output().must("nsenter");
        Said::of(&[name, script], &output).exits(0).out
    }

    /// Waits until a script ends well on a machine.
    pub async fn until(&self, name: &str, script: &str) {
        eventually(&format!("on {name}: {script}"), UNTIL, || {
            let output = self.command(name, "bash", &["-euo", "pipefail", "-c", script]).output().must("nsenter");
            let said = Said::of(&[name, script], &output);
            if said.code == Some(0) { Ok(()) } else { Err(said.out + &said.err) }
        })
        .await;
    }

    /// Writes a file of a machine.
    #[track_caller]
    pub fn write(&self, name: &str, path: &str, text: &str) {
        // As the machine's own processes see it.
        let init = self.machine(name).init;
        let path = PathBuf::from(format!("/proc/{init}/root{path}"));
        std::fs::create_dir_all(path.parent().must("a directory")).must("a directory");
        std::fs::write(&path, text).must(&path.display().to_string());
    }

    /// Copies a file of one machine to another one.
    #[track_caller]
    pub fn copy(&self, from: &str, to: &str, path: &str) {
        let file = |name: &str| PathBuf::from(format!("/proc/{}/root{path}", self.machine(name).init));
        std::fs::copy(file(from), file(to)).must(path);
    }

    /// Starts etcd on a machine, reachable at the machine's address.
    #[track_caller]
    pub fn etcd(&self, name: &str) {
        let url = format!("http://192.0.2.{}:2379", last(name));
        let settings = format!("ETCD_LISTEN_CLIENT_URLS={url},http://127.0.0.1:2379\nETCD_ADVERTISE_CLIENT_URLS={url}\n");
        self.write(name, "/etc/default/etcd", &settings);
        self.run(name, "systemctl start etcd");
    }

    /// Writes the network's configuration into the etcd at `etcd`.
    #[track_caller]
    pub fn network(&self, name: &str, config: &str) {
        self.write(name, "/run/network.json", config);
        self.run(name, "overlayctl config set /run/network.json --etcd-endpoints http://192.0.2.10:2379");
    }

    /// Gives a host its configuration, with etcd at `etcd`, and the memory of a subnet that it had: the one that the pages show. Its agent is not started.
    #[track_caller]
    pub fn configure(&self, name: &str, subnet: &str) {
        self.write(name, "/etc/overlayd/overlayd.toml", "etcd-endpoints = [\"http://192.0.2.10:2379\"]\n");
        self.remember(name, subnet);
    }

    /// Gives a host the memory of a subnet that it had.
    #[track_caller]
    pub fn remember(&self, name: &str, subnet: &str) {
        self.run(name, "install -d -m 0700 /var/lib/overlayd");
        self.write(name, "/var/lib/overlayd/state.json", &format!("{{\"version\": 1, \"subnet\": {{\"v4\": \"{subnet}\"}}}}\n"));
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        for (name, machine) in &self.machines {
            if failed && name.starts_with("host") {
                let output = self.command(name, "tail", &["-n", "25", "/var/log/overlayd.log"]).output();
                let log = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
                eprintln!("--- the end of the log of {name} ({})\n{log}", machine.init);
            }
        }
        for machine in self.machines.values_mut() {
            let _ended = machine.keeper.kill().and_then(|()| machine.keeper.wait());
        }
    }
}

impl Machine {
    async fn boot(name: &str) -> Machine {
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
        let keeper = command.spawn().must("unshare");
        let children = format!("/proc/{0}/task/{0}/children", keeper.id());
        let init = eventually(&format!("machine {name} is there"), BOOT, || {
            let text = std::fs::read_to_string(&children).unwrap_or_default();
            let init: i32 = text.trim().parse().map_err(|_| "it has no first process".to_owned())?;
            let ready = Path::new(&format!("/proc/{init}/root/run/machine/ready")).exists();
            if ready { Ok(init) } else { Err("it is not ready".to_owned()) }
        })
        .await;
        Machine { keeper, init }
    }
}

/// The last number of a machine's address.
fn last(name: &str) -> u8 {
    let number = |text: &str| text.parse::<u8>().must("a machine's number");
    match name.split_once('-') {
        Some(("host", n)) => number(n),
        Some(("etcd", n)) => 10 + number(n),
        _ => 10,
    }
}
