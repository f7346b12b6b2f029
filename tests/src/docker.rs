//! Docker on a lab host: Debian's dockerd with its own containerd, in the host's network namespace.
//!
//! Mounts and processes are in separate namespaces, so that it cannot interfere with a Docker of the machine. All of it ends with
//! [`Docker`].

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use overlayctl::lab::Lab;
use serde_json::Value;
use tempfile::TempDir;

use crate::programs::{CommandOutput, require_program};
use crate::{ExpectContext, eventually};

/// The image in every test Docker.
pub const IMAGE: &str = "overlay-tests";

/// Debian's client; the search path may contain another one first.
const DOCKER_CLIENT: &str = "/usr/bin/docker";

/// The parent directory of images and containers, and the directory's name prefix; the lab's name follows.
const DATA_DIR: (&str, &str) = ("/var/tmp", "overlay-docker-");

/// The prefix of cgroup names; the names of lab and host follow.
const CGROUP_PREFIX: &str = "overlay-tests-";

/// The cgroup v2 root, with the v1 controllers' hierarchies below it.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Time limit for the start or end of containerd and dockerd.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The script of the init process in the new namespaces. At its end the kernel kills all other processes. It ends when its
/// standard input is closed, so also if the test is killed.
const INIT_SCRIPT: &str = r#"
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
/usr/bin/containerd --config "$DIR/containerd.toml" --root "$DIR/containerd" --state /run/containerd --address /run/containerd.sock \
    >>"$DIR/containerd.log" 2>&1 &
for _ in $(seq 600); do [ -S /run/containerd.sock ] && break; sleep 0.1; done
/usr/sbin/dockerd --containerd /run/containerd.sock --data-root "$DIR/data" --exec-root /run/docker --pidfile /run/docker.pid \
    --host "unix://$DIR/docker.sock" --storage-driver vfs --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent "/$CGROUP" "$@" \
    >>"$DIR/dockerd.log" 2>&1 &
cat >/dev/null
"#;

/// Docker's files: images survive a restart of the daemon.
#[derive(Debug)]
pub struct DockerFiles {
    dir: TempDir,
    cgroup: String,
}

/// A running Docker.
#[derive(Debug)]
pub struct Docker<'a> {
    files: &'a DockerFiles,
    init: Child,
}

impl DockerFiles {
    /// Creates the files for a lab host.
    pub fn new(lab: &Lab, host: &str) -> DockerFiles {
        for (program, package) in
            [("dockerd", "docker.io"), ("containerd", "containerd"), ("runc", "runc"), ("busybox", "busybox-static")]
        {
            require_program(program, package);
        }
        assert!(Path::new(DOCKER_CLIENT).is_file(), "{DOCKER_CLIENT} is not installed: apt-get install docker.io");
        let lab = &lab.layout().name;
        let dir =
            tempfile::Builder::new().prefix(&format!("{}{lab}-", DATA_DIR.1)).tempdir_in(DATA_DIR.0).expect_ok("a directory");
        // Without the Kubernetes plugin, which opens ports.
        fs::write(dir.path().join("containerd.toml"), "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n")
            .expect_ok("containerd's configuration");
        DockerFiles { dir, cgroup: format!("{CGROUP_PREFIX}{lab}-{host}") }
    }

    /// The path of dockerd's configuration file.
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("daemon.json")
    }

    /// Starts containerd and dockerd inside a host and waits until they answer. `config` is dockerd's configuration file.
    pub async fn start(&self, lab: &Lab, host: &str, config: Option<&Path>) -> Docker<'_> {
        let dir = self.dir.path();
        let socket = dir.join("docker.sock");
        let _ignored = fs::remove_file(&socket);
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", INIT_SCRIPT, "docker"]);
        let no_config = dir.join("no.json");
        fs::write(&no_config, "{}").expect_ok("a configuration");
        command.arg("--config-file").arg(config.unwrap_or(&no_config));
        command.env("DIR", dir).env("CGROUP", &self.cgroup).env_remove("DOCKER_HOST");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let netns = lab.netns(host).expect_ok(host);
        let init = netns.run(|| command.spawn()).expect_ok("enter the host").expect_ok("unshare");
        let mut docker = Docker { files: self, init };
        eventually(&format!("dockerd of {host} answers"), START_TIMEOUT, || {
            let output = docker.attempt(&["version", "--format", "{{.Server.Version}}"]);
            if output.code == Some(0) { Ok(()) } else { Err(format!("{}\n{}", output.stderr, docker.log())) }
        })
        .await;
        assert!(docker.init.try_wait().expect_ok("wait").is_none(), "dockerd's namespaces ended: {}", docker.log());
        docker
    }
}

impl Drop for DockerFiles {
    fn drop(&mut self) {
        for parent in cgroup_parents() {
            remove_cgroup(&parent.join(&self.cgroup));
        }
    }
}

/// Removes leftovers of killed test runs: cgroups and files of labs that no longer exist. Busy ones stay for the next run.
pub fn remove_leftovers(is_finished: impl Fn(&str) -> bool) {
    let leftovers = |parent: &Path, prefix: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        let is_leftover = |name: &str| name.strip_prefix(prefix)?.split_once('-').map(|(lab, _)| is_finished(lab));
        entries.filter(|entry| entry.file_name().to_str().and_then(is_leftover) == Some(true)).map(|entry| entry.path()).collect()
    };
    for group in cgroup_parents().iter().flat_map(|parent| leftovers(parent, CGROUP_PREFIX)) {
        remove_cgroup(&group);
    }
    for dir in leftovers(Path::new(DATA_DIR.0), DATA_DIR.1) {
        // Another test process may remove the same files.
        let _ignored = fs::remove_dir_all(dir);
    }
}

/// The directories that may contain cgroups.
fn cgroup_parents() -> Vec<PathBuf> {
    let controllers = fs::read_dir(CGROUP_ROOT).into_iter().flatten().flatten().map(|entry| entry.path());
    controllers.filter(|path| path.is_dir()).chain([PathBuf::from(CGROUP_ROOT)]).collect()
}

/// Removes a cgroup and its children; a v1 or v2 cgroup is only removed by an explicit rmdir.
fn remove_cgroup(group: &Path) {
    for inner in fs::read_dir(group).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        remove_cgroup(&inner.path());
    }
    let _ignored = fs::remove_dir(group);
}

impl Docker<'_> {
    /// Runs Docker's client and accepts any exit code.
    pub fn attempt(&self, arguments: &[&str]) -> CommandOutput {
        self.attempt_with(arguments, &[])
    }

    fn attempt_with(&self, arguments: &[&str], input: &[u8]) -> CommandOutput {
        let dir = self.files.dir.path();
        let mut command = Command::new(DOCKER_CLIENT);
        command.arg("--host").arg(format!("unix://{}", dir.join("docker.sock").display())).args(arguments);
        command.env("DOCKER_CONFIG", dir).env_remove("DOCKER_HOST").env_remove("DOCKER_CONTEXT");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect_ok(DOCKER_CLIENT);
        let mut stdin = child.stdin.take().expect_ok("the client's input");
        // A client that does not read its input succeeds as well.
        let _closed = stdin.write_all(input);
        drop(stdin);
        let output = child.wait_with_output().expect_ok(DOCKER_CLIENT);
        CommandOutput::from_output(&[&["docker"], arguments].concat(), &output)
    }

    /// Runs Docker's client, which must succeed. Returns its output without the last newline.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> String {
        self.attempt(arguments).assert_code(0).stdout.trim_end().to_owned()
    }

    /// Builds [`IMAGE`]: busybox, and a page in `/www` that names the host.
    #[track_caller]
    pub fn import_image(&self, page: &str) {
        let root = self.files.dir.path().join("image");
        fs::create_dir_all(root.join("bin")).expect_ok("the image");
        fs::create_dir_all(root.join("www")).expect_ok("the image");
        fs::write(root.join("www/index.html"), page).expect_ok("the page");
        let busybox =
            ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).is_file()).expect_ok("busybox");
        fs::copy(busybox, root.join("bin/busybox")).expect_ok("busybox");
        for applet in ["sh", "ping", "ping6", "httpd", "nc", "ip"] {
            let link = root.join("bin").join(applet);
            if !link.exists() {
                symlink("busybox", link).expect_ok(applet);
            }
        }
        let tar = Command::new("tar").arg("-C").arg(&root).args(["-c", "."]).output().expect_ok("tar");
        self.attempt_with(&["import", "-", IMAGE], &tar.stdout).assert_code(0);
    }

    /// Starts a container with a web server that ends at once on a stop.
    #[track_caller]
    pub fn run_web_server(&self, name: &str) {
        self.run(&[
            "run",
            "--detach",
            "--name",
            name,
            "--stop-signal",
            "KILL",
            IMAGE,
            "/bin/httpd",
            "-f",
            "-vv",
            "-p",
            "80",
            "-h",
            "/www",
        ]);
    }

    /// A container's settings in Docker's default network.
    #[track_caller]
    pub fn network_settings(&self, container: &str) -> Value {
        let text = self.run(&["inspect", "--format", "{{json .NetworkSettings.Networks.bridge}}", container]);
        serde_json::from_str(&text).expect_ok(&text)
    }

    /// The last lines of the daemons' logs.
    pub fn log(&self) -> String {
        let dir = self.files.dir.path();
        let tail = |name: &str| overlayctl::lab::process::log_tail(&dir.join(name));
        format!("containerd:\n{}\ndockerd:\n{}", tail("containerd.log"), tail("dockerd.log"))
    }
}

impl Drop for Docker<'_> {
    /// Ends the daemons and the containers.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- Docker in {}\n{}", self.files.cgroup, self.log());
        }
        drop(self.init.stdin.take());
        let end = Instant::now() + START_TIMEOUT;
        while let Ok(None) = self.init.try_wait() {
            if Instant::now() > end {
                let _ignored = self.init.kill();
                let _collected = self.init.wait();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
