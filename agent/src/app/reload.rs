//! SIGHUP: reads the settings again, applies the reloadable ones and logs the others that changed.

use std::sync::Arc;

use clap::ArgMatches;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::{HostConfig, RawSettings, load_settings};
use crate::systemd::Notifier;
use crate::telemetry::LevelHandle;

/// The settings that a reload applies; all others are read once. The contents of etcd's files are read at each connect.
const RELOADABLE: [&str; 1] = ["log-level"];

/// The source of the settings, to read them again.
#[derive(Debug)]
pub struct SettingsSource {
    matches: ArgMatches,
    /// The settings at the start.
    running: RawSettings,
}

impl SettingsSource {
    /// The command line, and the settings that the agent starts with.
    pub fn new(matches: ArgMatches, running: RawSettings) -> SettingsSource {
        SettingsSource { matches, running }
    }
}

/// SIGHUP, caught from the construction of this value.
pub(super) struct Reload {
    hangup: Signal,
    source: SettingsSource,
    level: LevelHandle,
    notifier: Arc<Notifier>,
}

impl Reload {
    /// Installs the signal handler. Needs a tokio runtime; the error is the system's.
    pub(super) fn catch(source: SettingsSource, level: LevelHandle, notifier: Arc<Notifier>) -> std::io::Result<Reload> {
        Ok(Reload { hangup: signal(SignalKind::hangup())?, source, level, notifier })
    }

    /// The task: a reload at each signal, until `stop`.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                signalled = self.hangup.recv() => if signalled.is_none() {
                    return stop.cancelled().await;
                },
            }
            self.notifier.reloading().await;
            reload(&self.source, &self.level);
            self.notifier.reloaded().await;
        }
    }
}

fn reload(source: &SettingsSource, level: &LevelHandle) {
    let raw = load_settings(&source.matches);
    let config = match HostConfig::validate(raw.clone()) {
        Ok(config) => config,
        Err(mistakes) => {
            tracing::error!(%mistakes, "reloaded settings are invalid; keeping the current settings");
            return;
        }
    };
    match level.set(&config.log_level) {
        Ok(()) => tracing::info!(log_level = config.log_level, "settings reloaded"),
        Err(error) => tracing::error!(%error, "cannot change the log level"),
    }
    let (_, waiting) = split_reloadable(source.running.changed_settings(&raw));
    if !waiting.is_empty() {
        tracing::warn!(
            settings = waiting.join(", "),
            "changed settings take effect at the next start: systemctl restart overlayd, which interrupts no traffic"
        );
    }
}

/// Splits changed settings into those that take effect at once and those that need a restart.
fn split_reloadable(changed: Vec<&'static str>) -> (Vec<&'static str>, Vec<&'static str>) {
    changed.into_iter().partition(|name| RELOADABLE.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::command;

    #[test]
    fn reloadable_settings_are_separated_from_others() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("overlayd.toml");
        let matches = || command().get_matches_from(["overlayd".as_ref(), "--config".as_ref(), file.as_os_str()]);
        std::fs::write(&file, "iface = [\"eth0\"]\nip-masq = true\n").unwrap();
        let before = load_settings(&matches());
        // `ip-masq` had its default value before, so leaving it out is no change.
        std::fs::write(&file, "iface = [\"eth1\"]\nlog-level = \"debug\"\nresync-interval = \"1m\"\n").unwrap();
        let after = load_settings(&matches());
        assert_eq!(split_reloadable(before.changed_settings(&after)), (vec!["log-level"], vec!["iface", "resync-interval"]));
        assert!(before.changed_settings(&before).is_empty());
    }
}
