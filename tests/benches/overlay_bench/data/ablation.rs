//! The overlay with and without a setting: one command applies it on each host, another one reverts it, in turns.

use std::process::Command;

use anyhow::{Context, ensure};
use overlay_agent::kernel::netns::Netns;

/// A setting under test.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// The command that applies it.
    pub with: &'a str,
    /// The command that reverts it.
    pub without: &'a str,
}

impl Setting<'_> {
    /// Applies or reverts it on all hosts.
    pub fn set(&self, hosts: &[Netns], enable: bool) -> anyhow::Result<()> {
        let script = if enable { self.with } else { self.without };
        for host in hosts {
            // /sys shows the devices of the namespace in which it was mounted.
            let command = format!("mount -t sysfs none /sys && {{ {script}; }}");
            let run = || Command::new("unshare").args(["-m", "sh", "-ec", &command]).output();
            let output = host.run(run)?.context("`unshare` is needed: apt-get install util-linux")?;
            ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }
}
