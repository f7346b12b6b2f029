//! Selection of the external interface, and its problems.

use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

use super::{Network, NetworkStateStore};
use crate::model::network::Pool;
use crate::model::{Family, NetworkConfig, PerFamily};
use crate::plan::backend;
use crate::plan::contribution::HostView;
use crate::plan::underlay::{CurrentUnderlay, SelectionReason, Underlay, UnderlayChoice, ipv6_remedy};

/// Time after the start for IPv6 to be enabled on the external interface, before this host uses IPv4 only.
const IPV6_GRACE: Duration = Duration::from_secs(3);

/// The external interface, and what it was selected from.
#[derive(Debug, Default)]
pub(super) struct UnderlayState {
    /// The external interface.
    pub(super) selected: Option<Underlay>,
    /// Why its addresses were selected.
    pub(super) reasons: PerFamily<SelectionReason>,
    /// Problems of the selection.
    pub(super) errors: Vec<String>,
    /// Number of the last request for a new read of the host.
    pub(super) refresh: u64,
    /// Time at which the selection has to be made again without an event.
    pub(super) reselect_at: Option<Instant>,
    /// IPv6 was disabled when the external interface was selected.
    pub(super) ipv4_only: bool,
}

impl<M: NetworkStateStore> Network<M> {
    /// Selects the external interface.
    pub(super) fn select_underlay(&mut self, now: Instant) {
        self.underlay.reselect_at = None;
        let scopes = &self.planner.scopes;
        let (Some(record), Some(view), Some(devices)) = (&self.store.record, scopes.host.view.clone(), scopes.device_view())
        else {
            return;
        };
        if view.refreshes.get(&self.settings.name).copied().unwrap_or_default() < self.underlay.refresh {
            return;
        }
        let pools = record.config.pools;
        let in_use = self.current_underlay(&record.config, devices);
        // The host has no route into an isolated network, so that any address of the host may be in its range.
        let leasable = if self.settings.isolated { PerFamily::default() } else { pools };
        let choice = self.settings.selection.choose(&view.inventory, pools.families(), &leasable, view.probe_route, &in_use);
        let problems = match choice {
            _ if view.error.is_some() => view.error.iter().cloned().collect(),
            Ok(mut choice) => {
                if !self.apply_ipv6_fallback(&pools, &mut choice, now) {
                    return;
                }
                let UnderlayChoice { underlay, reasons, problems } = choice;
                for (family, new) in underlay.local.iter() {
                    if let (Some(old), Some(reason)) = (in_use.address(family).filter(|old| old != new), reasons.get(family)) {
                        let lost = view.inventory.explain_loss(old, underlay.index);
                        tracing::warn!(%family, %old, %new, lost, %reason, "underlay address changed");
                    }
                }
                if self.underlay.selected.as_ref() != Some(&underlay) {
                    tracing::info!(
                        interface = underlay.name,
                        mtu = underlay.mtu,
                        addresses = %underlay.public_ip,
                        "external interface"
                    );
                    self.underlay.selected = Some(underlay);
                    self.changed = true;
                }
                self.changed |= self.underlay.reasons != reasons;
                self.underlay.reasons = reasons;
                problems
            }
            Err(error) => vec![error.to_string()],
        };
        if self.underlay.errors != problems {
            for problem in &problems {
                tracing::error!(problem, "problem with the external interface");
            }
            self.underlay.errors = problems;
            self.changed = true;
        }
        self.dirty.host = true;
    }

    /// The underlay in use, or that of an earlier run: read from its devices, else from the last published addresses (after
    /// a reboot).
    fn current_underlay(&self, network: &NetworkConfig, devices: &HostView) -> CurrentUnderlay {
        if let Some(underlay) = &self.underlay.selected {
            return CurrentUnderlay { link: Some(underlay.index), local: underlay.local, published: PerFamily::default() };
        }
        let published = self.state_store.published_addresses();
        let mut in_use = CurrentUnderlay::default();
        for family in network.families() {
            let device = backend::of(network).device(family).and_then(|device| devices.devices.get(&device));
            let (link, local) = device.and_then(|link| link.kind.underlay()).unzip();
            in_use.link = in_use.link.or(link);
            // Behind NAT the published address is not the source.
            let published = published.get(family).filter(|_| self.settings.selection.public_ip.get(family).is_none());
            *in_use.local.slot(family) = local;
            *in_use.published.slot(family) = published.copied();
        }
        in_use
    }

    /// Problems of the external interface and its addresses.
    pub(super) fn underlay_problems(&self) -> impl Iterator<Item = String> {
        self.underlay.errors.iter().cloned().chain(self.own_address_in_overlay())
    }

    /// The problem text if this host's address is in the overlay's leasable range. Packets to it would enter the tunnel, so peers
    /// reject the lease.
    fn own_address_in_overlay(&self) -> Option<String> {
        let record = self.store.record.as_ref().filter(|_| !self.settings.isolated)?;
        let (network, underlay) = (&record.config, self.underlay.selected.as_ref()?);
        let leased =
            |(family, address): &(Family, &IpAddr)| network.pools.get(*family).is_some_and(|pool| pool.covers_address(**address));
        let (family, address) = underlay.public_ip.iter().find(leased)?;
        let pool = network.pools.get(family)?;
        Some(format!(
            "this host's address {address} lies among the overlay's subnets, {} to {}, so peers ignore this host: exclude its range with \
             SubnetMin and SubnetMax, or choose another network",
            pool.min.base(),
            pool.max.last()
        ))
    }

    /// Reduces the choice to IPv4 if IPv6 is disabled on the external interface and this run has not used it yet. A lease with
    /// IPv6 would need an underlay address. If IPv6 is enabled later, this run ignores it: the host would get another subnet, and
    /// its containers would lose their IPv4 addresses. Returns whether the choice is final.
    fn apply_ipv6_fallback(&mut self, pools: &PerFamily<Pool>, choice: &mut UnderlayChoice, now: Instant) -> bool {
        if !pools.families().eq(Family::ALL) {
            self.underlay.ipv4_only = false;
            return true;
        }
        let UnderlayChoice { underlay, reasons, problems } = choice;
        let is_back = underlay.local.v6.is_some();
        if is_back && !self.underlay.ipv4_only {
            return true;
        }
        if !self.underlay.ipv4_only && now < self.started + IPV6_GRACE {
            // The host's network configuration may be about to enable it.
            self.underlay.reselect_at = Some(self.started + IPV6_GRACE);
            return false;
        }
        self.underlay.ipv4_only = true;
        (underlay.local.v6, underlay.public_ip.v6, reasons.v6) = (None, None, None);
        let name = &underlay.name;
        problems.push(match is_back {
            true => format!(
                "IPv6 is enabled again on {name}, but this host leased an IPv4 subnet only: restart overlayd to use both; the host then gets \
                 another subnet, so attach its containers again"
            ),
            false => format!(
                "IPv6 is switched off on the external interface {name}, so only IPv4 of the overlay works on this host: {}, or remove IPv6 \
                 from the network's configuration",
                ipv6_remedy(name)
            ),
        });
        true
    }
}
