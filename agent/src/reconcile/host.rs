//! Reads the host's interfaces for the networks, plans the shared entries, and reads the sysctls of the host's own interfaces.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Channels, HOST_READ_PAUSE_FACTOR, Reconciler, SysctlStore};
use crate::metrics::FullRead;
use crate::model::{Device, Family};
use crate::plan::ruleset::Table;
use crate::plan::shared::{NamespaceFacts, SharedSpec, shared_entries};
use crate::plan::state::{Entries, Value};
use crate::plan::sysctls;
use crate::plan::{DataPath, Key, LinkKind, LinkState};

impl<D: DataPath, S: SysctlStore> Reconciler<D, S> {
    /// Reads the host's interfaces and sends them to the networks.
    pub(super) async fn read_host(&mut self, channels: &Channels) {
        self.schedule.host_read = None;
        self.metrics.count_full_read(FullRead::Interfaces);
        let begun = Instant::now();
        let read = self.data_path.inventory().await;
        self.schedule.host_read_not_before = (self.now)() + begun.elapsed() * HOST_READ_PAUSE_FACTOR;
        let mut view = self.host.take().map(Arc::unwrap_or_clone).unwrap_or_default();
        view.run = self.run;
        view.refreshes.clone_from(&self.refreshes);
        match read {
            Ok(inventory) => {
                view.inventory = inventory;
                view.error = None;
                view.probe_route = match self.settings.probe_address {
                    Some(address) => self.data_path.route_to(address).await.unwrap_or_default(),
                    None => None,
                };
            }
            Err(error) => {
                tracing::error!(%error, "cannot read the host's interfaces, retrying in 1 s");
                view.error = Some(error.to_string());
                self.schedule.host_read = Some((self.now)() + Duration::from_secs(1));
            }
        }
        let is_ours = |link: &LinkState| !matches!(link.kind, LinkKind::Foreign { .. } | LinkKind::Port);
        let device = |(key, link): (&Key, &LinkState)| match key {
            Key::Link(name) if is_ours(link) => Some((Device::from_name(name)?, link.clone())),
            _ => None,
        };
        view.devices = self.data_path.local().entries.links().filter_map(device).collect();
        self.host = Some(Arc::new(view));
        channels.host.send_replace(self.host.clone());
        self.dirty.shared = true;
    }

    /// Plans the entries that the networks share.
    pub(super) fn plan_shared(&mut self) {
        let Some(host) = &self.host else { return };
        if !self.absent.is_empty() && self.data_path.local().get(&Key::Ruleset(Table::Inet)).is_some() {
            return;
        }
        let specs: Vec<&SharedSpec> = self.contributors.values().filter_map(|contributor| contributor.shared.as_ref()).collect();
        let forwarding = Key::Sysctl(sysctls::IPV6_FORWARD.into());
        let is_off = |value: &Value| *value == Value::Sysctl("0".into());
        let enabled_by_agent = self.data_path.local().get(&forwarding).is_some_and(is_off)
            || self.sysctl_store.saved_sysctl(sysctls::IPV6_FORWARD).is_some_and(|value| value == "0");
        let changed =
            |name: &str| self.sysctl_store.saved_sysctl(&sysctls::interface_path(name, Family::V6, "accept_ra")).is_some();
        let mut facts = NamespaceFacts { forward_drops: host.inventory.forward_drops.clone(), ..NamespaceFacts::default() };
        for spec in &specs {
            facts.uplinks.extend(host.inventory.uplinks(spec.external));
            facts.accept_ra_interfaces.extend(sysctls::accept_ra_interfaces(
                &host.inventory,
                spec.external,
                enabled_by_agent,
                changed,
            ));
        }
        let entries = shared_entries(&specs, &facts);
        let old_shared = std::mem::take(&mut self.desired.shared);
        let differs = |key: &&Key| old_shared.get(key) != entries.get(key);
        let keys: Vec<Key> = old_shared.keys().chain(entries.keys()).filter(differs).cloned().collect();
        self.desired.shared = entries;
        keys.into_iter().for_each(|key| self.mark_dirty(key));
    }

    /// Reads the desired sysctls of the host's own interfaces that were not read before, so that their old values can be
    /// restored.
    pub(super) async fn read_sysctls(&mut self) {
        let paths = self.unread_sysctls();
        if !paths.is_empty()
            && let Err(error) = self.data_path.watch_sysctls(paths).await
        {
            tracing::warn!(%error, "cannot read a sysctl of an interface");
        }
    }

    fn unread_sysctls(&self) -> Vec<String> {
        let local = self.data_path.local();
        let sysctls =
            self.desired.iter().map_while(|(key, _)| if let Key::Sysctl(path) = key { Some((key, path)) } else { None });
        let unread = sysctls.filter(|(key, _)| key.device().is_none() && local.get(key).is_none());
        unread.map(|(_, path)| path.to_string()).collect()
    }
}
