//! Debian's podman with its CNI backend and the agent's network list: containers on two hosts reach each other's addresses.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Family;
use overlay_tests::image::{PAGE_BODY, build_rootfs, fetch_page};
use overlay_tests::programs::{CommandOutput, require_program, workspace_binary};
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, eventually_true, kernel};
use overlayctl::lab::Families;
use serde_json::Value;

/// The podman of one host, with its own directories and configuration; its leftovers are removed on drop.
struct Podman<'a> {
    lab: &'a TestLab,
    host: &'static str,
    dir: PathBuf,
}

impl<'a> Podman<'a> {
    /// Starts the host's agent, which writes the network list, and builds the image.
    async fn start(lab: &'a TestLab, host: &'static str) -> Podman<'a> {
        require_program("podman", "podman");
        require_program("runc", "runc");
        require_program("tar", "tar");
        let dir = lab.host(host).dir().join("podman");
        let podman = Podman { lab, host, dir };
        let list = podman.conflist().display().to_string();
        assert!(!podman.conflist().exists());
        lab.host(host).agent_start(&["--cni-conflist", &list]).expect_ok("start the agent");
        lab.host(host).wait_ready(READY_TIMEOUT).await.expect_ok("ready");
        eventually_true("the agent writes the network list", CONVERGE_TIMEOUT, || podman.conflist().exists()).await;
        podman.configure();
        let image = podman.dir.join("image.tar");
        let root = build_rootfs(&podman.dir).display().to_string();
        kernel::run(lab, host, &["tar", "-C", &root, "-cf", &image.display().to_string(), "."]);
        podman.run(&["import", &image.display().to_string(), "busybox"]).assert_code(0);
        podman
    }

    fn conflist(&self) -> PathBuf {
        self.dir.join("net.d/10-overlay.conflist")
    }

    fn configure(&self) {
        let at = |name: &str| self.dir.join(name).display().to_string();
        for name in ["root", "run", "tmp", "bin"] {
            fs::create_dir_all(self.dir.join(name)).expect_ok(name);
        }
        symlink(workspace_binary("overlay-cni"), self.dir.join("bin/overlay-cni")).expect_ok("the plugin");
        // crun refuses the hybrid cgroups of some machines; the limits are no higher than on any machine.
        let containers = format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
             [network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [\"{}\", \"/usr/lib/cni\"]\nnetwork_config_dir = \"{}\"\n\
             [engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n\
             tmp_dir = \"{}\"\nstatic_dir = \"{}\"\nvolume_path = \"{}\"\n",
            at("bin"),
            at("net.d"),
            at("tmp"),
            at("static"),
            at("volumes")
        );
        fs::write(self.dir.join("containers.conf"), containers).expect_ok("containers.conf");
        let storage = format!("[storage]\ndriver = \"vfs\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n", at("root"), at("run"));
        fs::write(self.dir.join("storage.conf"), storage).expect_ok("storage.conf");
    }

    fn run(&self, arguments: &[&str]) -> CommandOutput {
        let settings = [
            format!("CONTAINERS_CONF={}", self.dir.join("containers.conf").display()),
            format!("CONTAINERS_STORAGE_CONF={}", self.dir.join("storage.conf").display()),
        ];
        let mut command = vec!["timeout", "--signal=KILL", "120", "env"];
        command.extend(settings.iter().map(String::as_str));
        command.push("podman");
        kernel::attempt(self.lab, self.host, &[&command, arguments].concat())
    }

    /// Starts a container with a web server; returns podman's view of its network.
    fn serve(&self, name: &str, more: &[&str]) -> Value {
        let command = [&["run", "--detach", "--name", name, "--network", "overlay"], more, &["busybox"]].concat();
        self.run(&[&command[..], &["httpd", "-f", "-p", "80", "-h", "/www"]].concat()).assert_code(0);
        let all: Value = self.run(&["inspect", name]).assert_code(0).json();
        all[0]["NetworkSettings"]["Networks"]["overlay"].clone()
    }

    /// A container's namespace, as the agent knows it.
    async fn open_netns(&self, name: &str) -> Netns {
        let id = self.run(&["inspect", "--format", "{{.Id}}", name]).assert_code(0).stdout;
        let all = self.lab.host(self.host).client().endpoints().await.expect_ok("endpoints").endpoints;
        let owner = format!("cni/overlay/{}/eth0", id.trim());
        let found = all.into_iter().find(|e| e.owner.as_deref() == Some(&owner)).expect_ok(&owner);
        Netns::open(&found.netns).expect_ok("the container's namespace")
    }

    async fn endpoint_count(&self) -> usize {
        self.lab.host(self.host).client().endpoints().await.expect_ok("endpoints").endpoints.len()
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        // Also after a failed test: no podman process stays.
        let _ignored = self.run(&["rm", "--all", "--force", "--time", "0"]);
    }
}

fn field<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().expect_ok(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_on_two_hosts_reach_each_other() {
    let lab = TestLab::without_agents(2, Families::Dual).await;
    let (one, two) = (Podman::start(&lab, "h1").await, Podman::start(&lab, "h2").await);
    lab.wait_full_mesh().await;
    let listed = one.run(&["network", "ls", "--format", "{{.Name}}"]).assert_code(0).stdout;
    assert!(listed.lines().any(|name| name == "overlay"), "{listed}");

    let subnet = lab.status("h2").await.lease.expect_ok("a lease").subnet;
    let requested = subnet.get(Family::V4).and_then(|range| range.nth(99)).expect_ok("an address").to_string();
    let web = two.serve("web", &["--ip", &requested, "--mac-address", "02:00:5e:10:00:99"]);
    assert_eq!((field(&web, "IPAddress"), field(&web, "MacAddress")), (requested.as_str(), "02:00:5e:10:00:99"));
    let near = one.serve("near", &[]);
    for (from, name, to) in [(&one, "near", &web), (&two, "web", &near)] {
        let inside = from.open_netns(name).await;
        for key in ["IPAddress", "GlobalIPv6Address"] {
            let address = field(to, key).parse().expect_ok(key);
            assert_eq!(fetch_page(&inside, address).expect_ok(&format!("the page of {address}")), PAGE_BODY);
        }
    }
    let known = lab.host("h2").client().endpoints().await.expect_ok("endpoints").endpoints;
    assert!(known.len() == 1 && known[0].owner.as_ref().is_some_and(|o| o.starts_with("cni/overlay/") && o.ends_with("/eth0")));

    // An address in use is refused.
    let output = two.run(&["run", "--network", "overlay", "--ip", &requested, "busybox", "ip", "address"]);
    assert!(output.code != Some(0) && output.stderr.contains("is in use by endpoint"), "{}", output.stderr);
    assert_eq!(two.endpoint_count().await, 1);

    for (podman, name) in [(&one, "near"), (&two, "web")] {
        podman.run(&["rm", "--force", "--time", "0", name]).assert_code(0);
        assert_eq!(podman.endpoint_count().await, 0, "{name} is gone");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conflist_edit_survives_agent_restart() {
    let lab = TestLab::without_agents(1, Families::V4).await;
    let podman = Podman::start(&lab, "h1").await;
    let list = podman.conflist().display().to_string();
    let before = fs::read_to_string(podman.conflist()).expect_ok("the list");
    podman.serve("web", &[]);
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("SIGTERM");
    assert_eq!(fs::read_to_string(podman.conflist()).expect_ok("the list"), before, "it stays after the agent's end");
    // An edited list belongs to its editor.
    let mut changed: Value = serde_json::from_str(&before).expect_ok("the list");
    changed.as_object_mut().and_then(|list| list.remove("writtenBy")).expect_ok("the agent's mark");
    changed["plugins"][0]["timeout"] = "1s".into();
    let shorter = changed.to_string();
    fs::write(podman.conflist(), &shorter).expect_ok("the list");
    let output = podman.run(&["run", "--network", "overlay", "busybox", "ip", "address"]);
    assert!(output.code != Some(0) && output.stderr.contains("Is overlayd running?"), "{}", output.stderr);

    lab.host("h1").agent_start(&["--cni-conflist", &list]).expect_ok("start the agent");
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    lab.wait_for_log("h1", &["WARN", "leaving it unchanged", &list]).await;
    assert_eq!(fs::read_to_string(podman.conflist()).expect_ok("the list"), shorter);
    assert_eq!(podman.endpoint_count().await, 1, "the earlier container, and none of the failed one");
    podman.run(&["rm", "--force", "--time", "0", "web"]).assert_code(0);
    assert_eq!(podman.endpoint_count().await, 0);
}
