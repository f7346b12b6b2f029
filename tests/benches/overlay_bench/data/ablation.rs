//! The overlay with a setting and without it: a command that makes the setting on each host, and one that takes it back, in turns.

use std::process::Command;

use anyhow::{Context, ensure};
use overlay_agent::kernel::netns::Netns;

/// A setting to be tried.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// Makes it.
    pub with: &'a str,
    /// Takes it back.
    pub without: &'a str,
}

impl Setting<'_> {
    /// Makes it, or takes it back, on all hosts.
    pub fn set(&self, hosts: &[Netns], enable: bool) -> anyhow::Result<()> {
        let script = if enable { self.with } else { self.without };
        for host in hosts {
            // The devices below /sys are those of the namespace that it was mounted in.
            let whole = format!("mount -t sysfs none /sys && {{ {script}; }}");
            let run = || Command::new("unshare").args(["-m", "sh", "-ec", &whole]).output();
            let output = host.run(run)?.context("`unshare` is needed: apt-get install util-linux")?;
            ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }
}
