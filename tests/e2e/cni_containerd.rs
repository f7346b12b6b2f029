//! Debian's containerd: `ctr run --cni` passes `/proc/PID/ns/net` and calls DEL after the container's end.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use overlay_agent::model::Endpoint;
use overlay_tests::cni::plugin_config;
use overlay_tests::image::{PAGE_BODY, build_rootfs, fetch_page};
use overlay_tests::programs::{require_program, workspace_binary};
use overlay_tests::test_lab::READY_TIMEOUT;
use overlay_tests::{ExpectContext, TestLab, eventually, eventually_true, kernel};
use serde_json::json;

/// A host's containerd, with its own configuration and directories.
struct Containerd<'a> {
    lab: &'a TestLab,
    dir: PathBuf,
    process: Child,
}

impl<'a> Containerd<'a> {
    async fn start(lab: &'a TestLab, host: &str) -> Containerd<'a> {
        require_program("containerd", "containerd");
        require_program("ctr", "containerd");
        require_program("runc", "runc");
        // A socket path is limited to 107 bytes.
        let dir = lab.host(host).dir().join("ctd");
        for name in ["root", "state", "net.d", "bin"] {
            fs::create_dir_all(dir.join(name)).expect_ok(name);
        }
        symlink(workspace_binary("overlay-cni"), dir.join("bin/overlay-cni")).expect_ok("the plugin");
        let list = json!({ "cniVersion": "1.0.0", "name": "overlay", "plugins": [plugin_config(lab, host)] });
        fs::write(dir.join("net.d/10-overlay.conflist"), list.to_string()).expect_ok("the network list");
        let config = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{0}/sock\"\n[ttrpc]\naddress = \"{0}/sock.ttrpc\"\n",
            dir.display()
        );
        fs::write(dir.join("config.toml"), config).expect_ok("the configuration");
        let log = || fs::File::options().append(true).create(true).open(dir.join("log")).expect_ok("the log");
        let start = || {
            let mut command = Command::new("containerd");
            command.arg("--config").arg(dir.join("config.toml")).stdin(Stdio::null()).stdout(log()).stderr(log());
            command.spawn()
        };
        let running = lab.open_netns(host).run(start).expect_ok("enter the host").expect_ok("containerd");
        let containerd = Containerd { lab, dir, process: running };
        eventually("containerd answers", READY_TIMEOUT, || {
            let output = containerd.ctr("ctr version");
            if output.code == Some(0) { Ok(()) } else { Err(output.stderr) }
        })
        .await;
        containerd
    }

    /// Runs a shell line with `ctr` in a mount namespace where the network list and the plugins are in `ctr`'s directories.
    fn ctr(&self, line: &str) -> overlay_tests::programs::CommandOutput {
        kernel::attempt(self.lab, "h1", &["unshare", "--mount", "sh", "-ec", &self.script(line)])
    }

    fn script(&self, line: &str) -> String {
        let dir = self.dir.display();
        format!(
            "export CONTAINERD_ADDRESS={dir}/sock\nmount -t tmpfs none /opt\nmkdir -p /opt/cni/bin\nmount --bind {dir}/bin /opt/cni/bin\n\
             mount -t tmpfs none /etc/cni\nmkdir /etc/cni/net.d\nmount --bind {dir}/net.d /etc/cni/net.d\nexec timeout --signal=KILL 120 {line}"
        )
    }

    async fn endpoints(&self) -> Vec<Endpoint> {
        self.lab.host("h1").client().endpoints().await.expect_ok("endpoints").endpoints
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        // Each container has a containerd process that outlives it.
        let _ignored = self.ctr("sh -c 'for task in $(ctr task ls -q); do ctr task rm -f $task; ctr container rm $task; done'");
        let pid = i32::try_from(self.process.id()).unwrap_or_default();
        let _sent = kill(Pid::from_raw(pid), Signal::SIGTERM);
        let _ended = self.process.wait();
        if std::thread::panicking() {
            eprintln!("--- containerd's log\n{}", fs::read_to_string(self.dir.join("log")).unwrap_or_default());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ctr_run_attaches_and_detaches() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let containerd = Containerd::start(&lab, "h1").await;
    let before = containerd.endpoints().await.len();
    let root = build_rootfs(&containerd.dir).display().to_string();
    let output = containerd.ctr(&format!("ctr run --rm --cni --rootfs {root} first /bin/ip -o address show eth0")).assert_code(0);
    assert!(output.stdout.contains("inet 10.244."), "{}", output.stdout);
    assert_eq!(containerd.endpoints().await.len(), before, "DEL was called");

    // A web server, called from another host's container, until it is killed.
    let script = containerd.script(&format!("ctr run --rm --cni --rootfs {root} web /bin/httpd -f -p 80 -h /www"));
    let start = || Command::new("unshare").args(["--mount", "sh", "-ec", &script]).stdin(Stdio::null()).spawn();
    let mut running = lab.open_netns("h1").run(start).expect_ok("enter the host").expect_ok("ctr");
    let attached = async |limit| {
        overlay_tests::wait::eventually_async("web is attached", limit, || async {
            let all = containerd.endpoints().await;
            let found = all.into_iter().find(|e| e.owner.as_deref() == Some("cni/overlay/default-web/eth0"));
            found.ok_or_else(|| "not attached".to_owned())
        })
        .await
    };
    let endpoint = attached(READY_TIMEOUT).await;
    assert!(endpoint.netns.starts_with("/proc/"), "{}", endpoint.netns.display());
    let address = endpoint.addresses().v4.expect_ok("IPv4");
    eventually("the page from another host", READY_TIMEOUT, || {
        let page = fetch_page(&lab.open_netns("h2-c1"), address)?;
        if page == PAGE_BODY { Ok(()) } else { Err(page) }
    })
    .await;
    containerd.ctr("ctr task kill --signal SIGKILL web").assert_code(0);
    eventually_true("ctr ends with its container", READY_TIMEOUT, || running.try_wait().is_ok_and(|ended| ended.is_some())).await;
    assert_eq!(containerd.endpoints().await.len(), before, "DEL was called");
}
