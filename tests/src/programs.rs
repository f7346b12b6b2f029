//! The programs that tests start: our own from the same target directory, and the system's.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use nix::errno::Errno;

use crate::ExpectContext;

/// A binary of this workspace, from the directory above the running test binary.
pub fn workspace_binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect_ok("the path of the running test");
    let sibling = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    sibling.expect_ok(&format!("{name} not found near {}: run `cargo build --workspace` first", own.display()))
}

/// The path of the agent.
pub fn overlayd() -> PathBuf {
    workspace_binary("overlayd")
}

/// The path of the command line program.
pub fn overlayctl() -> PathBuf {
    workspace_binary("overlayctl")
}

/// Fails with advice if a program of the system is not installed.
pub fn require_program(program: &str, package: &str) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from))
        .any(|dir| dir.join(program).is_file());
    assert!(found, "{program} is not installed: apt-get install {package}");
}

/// Fails with advice if the test does not run as root.
pub fn require_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test needs root for network namespaces: run it as root (sudo cargo test ...), or all tests with sudo ./tests/run.sh"
    );
}

/// The exit code and output of a program, as text.
#[derive(Debug, Clone)]
pub struct CommandOutput {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// The command, for messages.
    pub command: String,
}

impl CommandOutput {
    /// Converts the output of a program.
    pub fn from_output(command: &[impl AsRef<str>], output: &Output) -> CommandOutput {
        let names: Vec<&str> = command
            .iter()
            .map(|part| Path::new(part.as_ref()).file_name().and_then(|n| n.to_str()).unwrap_or(part.as_ref()))
            .collect();
        CommandOutput {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            command: names.join(" "),
        }
    }

    /// Checks the exit code and returns the output.
    #[track_caller]
    pub fn assert_code(self, code: i32) -> CommandOutput {
        assert_eq!(self.code, Some(code), "`{}` has another exit code; output:\n{}{}", self.command, self.stdout, self.stderr);
        self
    }

    /// Checks that standard error contains each of these, and returns the output.
    #[track_caller]
    pub fn assert_stderr_contains(self, texts: &[&str]) -> CommandOutput {
        for text in texts {
            assert!(
                self.stderr.contains(text),
                "`{}` does not print `{text}`; output:\n{}{}",
                self.command,
                self.stdout,
                self.stderr
            );
        }
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json<T: serde::de::DeserializeOwned>(&self) -> T {
        match serde_json::from_str(&self.stdout) {
            Ok(value) => value,
            Err(error) => panic!("`{}`: {error} in:\n{}{}", self.command, self.stdout, self.stderr),
        }
    }
}

/// CPU time of a process in nanosecond resolution, including threads that have ended.
pub fn process_cpu_time(pid: i32) -> nix::Result<Duration> {
    let mut clock: libc::clockid_t = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the system writes one value through the given pointer.
    match unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) } {
        0 => {}
        errno => return Err(Errno::from_raw(errno)),
    }
    // SAFETY: as above.
    Errno::result(unsafe { libc::clock_gettime(clock, &raw mut time) })?;
    Ok(Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default()))
}
