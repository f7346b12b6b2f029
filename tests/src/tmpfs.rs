//! A small tmpfs for one host's state directory, in a mount namespace of its own.
//!
//! A sleeping process holds the namespace and ends with the lab; the mount is invisible elsewhere.

use std::path::PathBuf;
use std::process::Command;

use overlayctl::lab::process::{self, ProcessId};
use overlayctl::lab::{Lab, LabError, agent};

use crate::programs::{CommandOutput, overlayd};
use crate::test_lab::CONVERGE_TIMEOUT;
use crate::{ExpectContext, TestLab, eventually_true};

/// The size in bytes: a state directory takes some kilobytes.
const TMPFS_SIZE: &str = "256k";

/// The file system of a host's state directory.
#[derive(Debug)]
pub struct Tmpfs<'a> {
    lab: &'a TestLab,
    host: &'static str,
    mount_process: ProcessId,
}

impl<'a> Tmpfs<'a> {
    /// Creates the file system for a host whose agent is not running yet.
    pub async fn new(lab: &'a TestLab, host: &'static str) -> Tmpfs<'a> {
        let at = lab.host(host);
        std::fs::create_dir_all(at.state_dir()).expect_ok("the state directory");
        std::fs::create_dir_all(at.run_dir()).expect_ok("the run directory");
        let mut command = Command::new("unshare");
        // The command line of the holding process shows when the mount is done.
        let script = "mount -t tmpfs -o size=$2,mode=700 none \"$1\" && exec sleep 86399";
        command.args(["--mount", "sh", "-c", script, "sh"]).arg(at.state_dir()).arg(TMPFS_SIZE);
        let (log, record) = (at.dir().join("volume.log"), at.dir().join("volume.pid"));
        let mount_process = process::start(command, Some(&lab.open_netns(host)), &log, &record).expect_ok("unshare (util-linux)");
        let is_mounted =
            || std::fs::read(format!("/proc/{}/cmdline", mount_process.pid)).is_ok_and(|line| line.starts_with(b"sleep"));
        eventually_true("the tmpfs is mounted", CONVERGE_TIMEOUT, is_mounted).await;
        Tmpfs { lab, host, mount_process }
    }

    /// Starts the host's agent with its state on this file system. Does not wait.
    pub fn start_agent(&self) {
        self.try_start_agent().expect_ok("nsenter (util-linux)");
    }

    /// Starts an agent that cannot run: it may have ended before its process id is recorded.
    pub fn start_failing_agent(&self) {
        let _ended_already = self.try_start_agent();
    }

    fn try_start_agent(&self) -> Result<ProcessId, LabError> {
        let at = self.lab.host(self.host);
        let mut command = self.nsenter_command();
        command.arg(overlayd()).args(["--config", "/dev/null", "--node-name", self.host]);
        command.arg("--run-dir").arg(at.run_dir()).arg("--state-dir").arg(at.state_dir());
        command.args(["--etcd-endpoints", &self.lab().layout().etcd_endpoints().join(",")]);
        let record = agent::pid_file(self.lab().dir(), self.host);
        process::start(command, Some(&self.lab.open_netns(self.host)), &at.log(), &record)
    }

    /// Fills the file system.
    pub fn fill(&self) {
        // dd fails when the file system is full.
        self.run("dd if=/dev/zero of=\"$1\"/ballast bs=4k 2>/dev/null; rm -f \"$1\"/drop; ! head -c 8192 /dev/zero >\"$1\"/drop");
        self.run("rm -f \"$1\"/drop; dd if=/dev/zero of=\"$1\"/more bs=1 count=4096 2>/dev/null || true");
    }

    /// Frees the space again.
    pub fn free_space(&self) {
        self.run("rm -f \"$1\"/ballast \"$1\"/more");
    }

    /// Makes the directory read-only for files opened from now on, or writable again.
    pub fn set_read_only(&self, read_only: bool) {
        // A mount on top: the agent's open files, including its lock, keep using the writable one below.
        let script = "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\"";
        self.run(if read_only { script } else { "umount \"$1\"" });
    }

    /// The names of the files in the directory.
    pub fn file_names(&self) -> Vec<String> {
        self.run("ls -A \"$1\"").lines().map(str::to_owned).collect()
    }

    /// The state directory's path in the test's mount namespace.
    pub fn host_path(&self) -> PathBuf {
        let dir = self.lab.host(self.host).state_dir();
        PathBuf::from(format!("/proc/{}/root", self.mount_process.pid)).join(dir.strip_prefix("/").unwrap_or(&dir))
    }

    fn run(&self, script: &str) -> String {
        let mut command = self.nsenter_command();
        command.args(["sh", "-c", script, "sh"]).arg(self.lab.host(self.host).state_dir());
        let output = command.output().expect_ok("nsenter (util-linux)");
        CommandOutput::from_output(&["nsenter", script], &output).assert_code(0).stdout
    }

    fn nsenter_command(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.mount_process.pid));
        command
    }

    fn lab(&self) -> &Lab {
        self.lab
    }
}
