//! Selection of the external interface, its problems, and the sysctls of the host's own interfaces.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::{Reconciler, StateStore, UNDERLAY_PAUSE_FACTOR};
use crate::metrics::FullRead;
use crate::model::PerFamily;
use crate::model::network::Pool;
use crate::model::{Device, Family, NetworkConfig};
use crate::plan::desired::sysctls;
use crate::plan::underlay::{CurrentUnderlay, Underlay, UnderlayChoice, ipv6_remedy};
use crate::plan::{DataPath, Key, LinkKind, Value};

/// Time after the start for IPv6 to be enabled on the external interface, before this host uses IPv4 only.
const IPV6_GRACE: Duration = Duration::from_secs(3);

impl<D: DataPath, M: StateStore> Reconciler<D, M> {
    /// Reads the host's interfaces and selects the external one.
    pub(super) async fn update_underlay(&mut self) {
        self.underlay_due = None;
        self.metrics.count_full_read(FullRead::Interfaces);
        let begun = Instant::now();
        let read = self.data_path.inventory().await;
        self.underlay_not_before = Instant::now() + begun.elapsed() * UNDERLAY_PAUSE_FACTOR;
        let inventory = match read {
            Ok(inventory) => inventory,
            Err(error) => {
                tracing::error!(%error, "cannot read the host's interfaces, retrying in 1 s");
                self.underlay_errors = vec![error.to_string()];
                self.underlay_due = Some(Instant::now() + Duration::from_secs(1));
                return;
            }
        };
        self.inventory = inventory;
        let Some(network) = &self.network else { return };
        let pools = network.pools;
        let in_use = self.current_underlay(network);
        let reach = match self.settings.selection.can_reach {
            Some(address) => self.data_path.route_to(address).await.unwrap_or_default(),
            None => None,
        };
        let problems = match self.settings.selection.choose(&self.inventory, &pools, reach, &in_use) {
            Ok(mut choice) => {
                if !self.apply_ipv6_fallback(&pools, &mut choice) {
                    return;
                }
                let UnderlayChoice { underlay, reasons, problems } = choice;
                for (family, new) in underlay.local.iter() {
                    if let (Some(old), Some(reason)) = (in_use.address(family).filter(|old| old != new), reasons.get(family)) {
                        let lost = self.inventory.explain_loss(old, underlay.index);
                        tracing::warn!(%family, %old, %new, lost, %reason, "underlay address changed");
                    }
                }
                if self.underlay.as_ref() != Some(&underlay) {
                    tracing::info!(
                        interface = underlay.name,
                        mtu = underlay.mtu,
                        addresses = %underlay.public_ip,
                        "external interface"
                    );
                    self.underlay = Some(underlay);
                    self.changed = true;
                }
                self.changed |= self.underlay_reasons != reasons;
                self.underlay_reasons = reasons;
                problems
            }
            Err(error) => vec![error.to_string()],
        };
        if self.underlay_errors != problems {
            for problem in &problems {
                tracing::error!(problem, "problem with the external interface");
            }
            self.underlay_errors = problems;
            self.changed = true;
        }
        self.host_dirty = true;
    }

    /// The underlay in use, or that of an earlier run: read from its VXLAN devices, else from the last published addresses (after
    /// a reboot).
    fn current_underlay(&self, network: &NetworkConfig) -> CurrentUnderlay {
        if let Some(underlay) = &self.underlay {
            return CurrentUnderlay { link: Some(underlay.index), local: underlay.local, published: PerFamily::default() };
        }
        let published = self.state_store.published_addresses();
        let mut in_use = CurrentUnderlay::default();
        for family in network.families() {
            let device = Device::vxlan(family, network.vxlan.vni);
            let existing_vxlan = match self.actual.get(&Key::Link(device.name().into())) {
                Some(Value::Link(link)) => match &link.kind {
                    LinkKind::Vxlan(vxlan) => Some(vxlan),
                    _ => None,
                },
                _ => None,
            };
            in_use.link = in_use.link.or(existing_vxlan.map(|vxlan| vxlan.underlay));
            // Behind NAT the published address is not the source.
            let published = published.get(family).filter(|_| self.settings.selection.public_ip.get(family).is_none());
            *in_use.local.slot(family) = existing_vxlan.map(|vxlan| vxlan.local);
            *in_use.published.slot(family) = published.copied();
        }
        in_use
    }

    /// Problems of the external interface and its addresses.
    pub(super) fn underlay_problems(&self) -> impl Iterator<Item = String> {
        self.underlay_errors.iter().cloned().chain(self.own_address_in_overlay())
    }

    /// The problem text if this host's address is in the overlay's leasable range. Packets to it would enter the tunnel, so peers
    /// reject the lease.
    fn own_address_in_overlay(&self) -> Option<String> {
        let (network, underlay) = (self.network.as_ref()?, self.underlay.as_ref()?);
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
    fn apply_ipv6_fallback(&mut self, pools: &PerFamily<Pool>, choice: &mut UnderlayChoice) -> bool {
        if !pools.families().eq(Family::ALL) {
            self.ipv4_only = false;
            return true;
        }
        let UnderlayChoice { underlay, reasons, problems } = choice;
        let is_back = underlay.local.v6.is_some();
        if is_back && !self.ipv4_only {
            return true;
        }
        if !self.ipv4_only && self.started.elapsed() < IPV6_GRACE {
            // The host's network configuration may be about to enable it.
            self.underlay_due = Some(self.started + IPV6_GRACE);
            return false;
        }
        self.ipv4_only = true;
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

    /// The host's own interfaces that have to keep accepting router advertisements.
    pub(super) fn accept_ra_interfaces(&self, underlay: &Underlay) -> Vec<String> {
        let forwarding = Key::Sysctl(sysctls::IPV6_FORWARD.into());
        let is_off = |value: &Value| *value == Value::Sysctl("0".into());
        let enabled_by_agent = self.actual.get(&forwarding).is_some_and(is_off)
            || self.state_store.saved_sysctl(sysctls::IPV6_FORWARD).is_some_and(|before| before == "0");
        let changed =
            |name: &str| self.state_store.saved_sysctl(&sysctls::interface_path(name, Family::V6, "accept_ra")).is_some();
        sysctls::accept_ra_interfaces(&self.inventory, underlay.index, enabled_by_agent, changed)
    }

    /// Reads the desired sysctls of the host's own interfaces that were not read before, so that their old values can be
    /// restored.
    pub(super) async fn read_sysctls(&mut self) {
        let settings = self.desired.keys().take_while(|key| matches!(key, Key::Sysctl(_)));
        let unread = settings.filter(|key| key.device().is_none() && !self.actual.contains_key(key));
        let paths: Vec<String> =
            unread.filter_map(|key| if let Key::Sysctl(path) = key { Some(path.to_string()) } else { None }).collect();
        if paths.is_empty() {
            return;
        }
        match self.data_path.watch_sysctls(paths).await {
            Ok(found) => self.actual.extend(found),
            Err(error) => tracing::warn!(%error, "cannot read a sysctl of an interface"),
        }
    }
}
