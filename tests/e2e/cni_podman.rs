//! Debian's podman with its CNI backend, by the network list that the agent writes: containers on two hosts, reached by their own addresses.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Family;
use overlay_tests::image::{PAGE, fetch, tree};
use overlay_tests::programs::{Said, built, needs};
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, Story, kernel, within};
use overlayctl::lab::Families;
use serde_json::Value;

/// The podman of one host: its own directories, its own configuration; all that is left of it goes when it is dropped.
struct Podman<'a> {
    story: &'a Story,
    host: &'static str,
    dir: PathBuf,
}

impl<'a> Podman<'a> {
    /// Starts the host's agent, which writes the network list, and makes the image.
    async fn on(story: &'a Story, host: &'static str) -> Podman<'a> {
        needs("podman", "podman");
        needs("runc", "runc");
        needs("tar", "tar");
        let dir = story.at(host).dir().join("podman");
        let podman = Podman { story, host, dir };
        let list = podman.conflist().display().to_string();
        assert!(!podman.conflist().exists());
        story.at(host).agent_start(&["--cni-conflist", &list]).must("start the agent");
        story.at(host).wait_ready(READY).await.must("ready");
        within("the agent writes the network list", SOON, || podman.conflist().exists()).await;
        podman.configure();
        let image = podman.dir.join("image.tar");
        let root = tree(&podman.dir).display().to_string();
        kernel::run(story, host, &["tar", "-C", &root, "-cf", &image.display().to_string(), "."]);
        podman.run(&["import", &image.display().to_string(), "busybox"]).exits(0);
        podman
    }

    fn conflist(&self) -> PathBuf {
        self.dir.join("net.d/10-overlay.conflist")
    }

    fn configure(&self) {
        let at = |name: &str| self.dir.join(name).display().to_string();
        for name in ["root", "run", "tmp", "bin"] {
            fs::create_dir_all(self.dir.join(name)).must(name);
        }
        symlink(built("overlay-cni"), self.dir.join("bin/overlay-cni")).must("the plugin");
        // crun refuses the mixed control groups that some machines have; limits as low as any machine's.
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
        fs::write(self.dir.join("containers.conf"), containers).must("containers.conf");
        let storage = format!("[storage]\ndriver = \"vfs\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n", at("root"), at("run"));
        fs::write(self.dir.join("storage.conf"), storage).must("storage.conf");
    }

    fn run(&self, arguments: &[&str]) -> Said {
        let settings = [
            format!("CONTAINERS_CONF={}", self.dir.join("containers.conf").display()),
            format!("CONTAINERS_STORAGE_CONF={}", self.dir.join("storage.conf").display()),
        ];
        let mut command = vec!["timeout", "--signal=KILL", "120", "env"];
        command.extend(settings.iter().map(String::as_str));
        command.push("podman");
        kernel::attempt(self.story, self.host, &[&command, arguments].concat())
    }

    /// Starts a container with a web server; what podman says of its network.
    fn serve(&self, name: &str, more: &[&str]) -> Value {
        let command = [&["run", "--detach", "--name", name, "--network", "overlay"], more, &["busybox"]].concat();
        self.run(&[&command[..], &["httpd", "-f", "-p", "80", "-h", "/www"]].concat()).exits(0);
        let all: Value = self.run(&["inspect", name]).exits(0).json();
        all[0]["NetworkSettings"]["Networks"]["overlay"].clone()
    }

    /// The namespace of a container, as the agent was told it.
    async fn inside(&self, name: &str) -> Netns {
        let id = self.run(&["inspect", "--format", "{{.Id}}", name]).exits(0).out;
        let all = self.story.at(self.host).client().endpoints().await.must("endpoints").endpoints;
        let owner = format!("cni/overlay/{}/eth0", id.trim());
        let found = all.into_iter().find(|e| e.owner.as_deref() == Some(&owner)).must(&owner);
        Netns::open(&found.netns).must("its namespace")
    }

    async fn endpoints(&self) -> usize {
        self.story.at(self.host).client().endpoints().await.must("endpoints").endpoints.len()
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        // Also when the story has failed: nothing of podman runs on.
        let _gone = self.run(&["rm", "--all", "--force", "--time", "0"]);
    }
}

fn field<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().must(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_on_two_hosts() {
    let story = Story::without_agents(2, Families::Dual).await;
    let (one, two) = (Podman::on(&story, "h1").await, Podman::on(&story, "h2").await);
    story.mesh().await;
    let listed = one.run(&["network", "ls", "--format", "{{.Name}}"]).exits(0).out;
    assert!(listed.lines().any(|name| name == "overlay"), "{listed}");

    let subnet = story.status("h2").await.lease.must("a lease").subnet;
    let wished = subnet.get(Family::V4).and_then(|range| range.nth(99)).must("an address").to_string();
    let web = two.serve("web", &["--ip", &wished, "--mac-address", "02:00:5e:10:00:99"]);
    assert_eq!((field(&web, "IPAddress"), field(&web, "MacAddress")), (wished.as_str(), "02:00:5e:10:00:99"));
    let near = one.serve("near", &[]);
    for (from, name, to) in [(&one, "near", &web), (&two, "web", &near)] {
        let inside = from.inside(name).await;
        for key in ["IPAddress", "GlobalIPv6Address"] {
            let address = field(to, key).parse().must(key);
            assert_eq!(fetch(&inside, address).must(&format!("the page of {address}")), PAGE);
        }
    }
    let known = story.at("h2").client().endpoints().await.must("endpoints").endpoints;
    assert!(known.len() == 1 && known[0].owner.as_ref().is_some_and(|o| o.starts_with("cni/overlay/") && o.ends_with("/eth0")));

    // Taken is taken.
    let said = two.run(&["run", "--network", "overlay", "--ip", &wished, "busybox", "ip", "address"]);
    assert!(said.code != Some(0) && said.err.contains("is in use by endpoint"), "{}", said.err);
    assert_eq!(two.endpoints().await, 1);

    for (podman, name) in [(&one, "near"), (&two, "web")] {
        podman.run(&["rm", "--force", "--time", "0", name]).exits(0);
        assert_eq!(podman.endpoints().await, 0, "{name} is gone");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_comes_and_goes() {
    let story = Story::without_agents(1, Families::V4).await;
    let podman = Podman::on(&story, "h1").await;
    let list = podman.conflist().display().to_string();
    let before = fs::read_to_string(podman.conflist()).must("the list");
    podman.serve("web", &[]);
    story.at("h1").agent_stop(Signal::SIGTERM).must("SIGTERM");
    assert_eq!(fs::read_to_string(podman.conflist()).must("the list"), before, "it stays when the agent ends");
    // With others' changes it is theirs.
    let mut changed: Value = serde_json::from_str(&before).must("the list");
    changed.as_object_mut().and_then(|list| list.remove("writtenBy")).must("the agent's mark");
    changed["plugins"][0]["timeout"] = "1s".into();
    let shorter = changed.to_string();
    fs::write(podman.conflist(), &shorter).must("the list");
    let said = podman.run(&["run", "--network", "overlay", "busybox", "ip", "address"]);
    assert!(said.code != Some(0) && said.err.contains("Is overlayd running?"), "{}", said.err);

    story.at("h1").agent_start(&["--cni-conflist", &list]).must("start the agent");
    story.at("h1").wait_ready(READY).await.must("ready");
    story.logged("h1", &["WARN", "left alone", &list]).await;
    assert_eq!(fs::read_to_string(podman.conflist()).must("the list"), shorter);
    assert_eq!(podman.endpoints().await, 1, "the container from before, and nothing of the one that failed");
    podman.run(&["rm", "--force", "--time", "0", "web"]).exits(0);
    assert_eq!(podman.endpoints().await, 0);
}
