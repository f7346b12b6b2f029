//! The external interface: looking at the host's interfaces, and what is wrong with the one that is used.

use std::net::IpAddr;
use std::time::Instant;

use super::{Memory, Reconciler, UNDERLAY_REST_FACTOR};
use crate::metrics::Whole;
use crate::model::{Device, Family, NetworkConfig};
use crate::plan::underlay::{Choice, InUse};
use crate::plan::{DataPath, Key, LinkKind, Value};

impl<D: DataPath, M: Memory> Reconciler<D, M> {
    /// Looks at the host's interfaces and chooses the external one.
    pub(super) async fn look_at_underlay(&mut self) {
        self.underlay_due = None;
        self.metrics.read_whole(Whole::Interfaces);
        let begun = Instant::now();
        let read = self.data_path.inventory().await;
        self.underlay_not_before = Instant::now() + begun.elapsed() * UNDERLAY_REST_FACTOR;
        let inventory = match read {
            Ok(inventory) => inventory,
            Err(error) => {
                tracing::error!(%error, "the host's interfaces cannot be read, trying again in a second");
                self.underlay_trouble = vec![error.to_string()];
                self.underlay_due = Some(Instant::now() + std::time::Duration::from_secs(1));
                return;
            }
        };
        self.inventory = inventory;
        let Some(network) = &self.network else { return };
        let pools = network.pools;
        let in_use = self.underlay_in_use(network);
        let reach = match self.settings.selection.can_reach {
            Some(address) => self.data_path.route_to(address).await.unwrap_or_default(),
            None => None,
        };
        let problems = match self.settings.selection.choose(&self.inventory, &pools, reach, &in_use) {
            Ok(Choice { underlay, reasons, problems }) => {
                for (family, new) in underlay.local.iter() {
                    if let (Some(old), Some(reason)) = (in_use.local.get(family).filter(|old| *old != new), reasons.get(family)) {
                        let lost = self.inventory.loss_of(*old, underlay.index);
                        tracing::warn!(%family, %old, %new, lost, %reason, "the underlay address of this host is another one now");
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
        if self.underlay_trouble != problems {
            for problem in &problems {
                tracing::error!(problem, "the external interface is not as it should be");
            }
            self.underlay_trouble = problems;
            self.changed = true;
        }
        self.host_dirty = true;
    }

    /// The underlay as it is, or as an earlier run left it: by its VXLAN devices, else by what it published last (after a reboot).
    fn underlay_in_use(&self, network: &NetworkConfig) -> InUse {
        if let Some(underlay) = &self.underlay {
            return InUse { link: Some(underlay.index), local: underlay.local };
        }
        let published = self.memory.published();
        let mut in_use = InUse::default();
        for family in network.families() {
            let device = Device::vxlan(family, network.vxlan.vni);
            let left = match self.actual.get(&Key::Link(device.name().into())) {
                Some(Value::Link(link)) => match &link.kind {
                    LinkKind::Vxlan(vxlan) => Some(vxlan),
                    _ => None,
                },
                _ => None,
            };
            in_use.link = in_use.link.or(left.map(|vxlan| vxlan.underlay));
            // Behind NAT the published address is not the source.
            let published = published.get(family).filter(|_| self.settings.selection.public_ip.get(family).is_none());
            *in_use.local.slot(family) = left.map(|vxlan| vxlan.local).or(published.copied());
        }
        in_use
    }

    /// What is wrong with the external interface and its addresses.
    pub(super) fn underlay_problems(&self) -> impl Iterator<Item = String> {
        self.underlay_trouble.iter().cloned().chain(self.own_address_in_overlay())
    }

    /// That this host's address is one that the overlay leases: its packets would go into the tunnel, so peers leave its lease out.
    fn own_address_in_overlay(&self) -> Option<String> {
        let (network, underlay) = (self.network.as_ref()?, self.underlay.as_ref()?);
        let leased =
            |(family, address): &(Family, &IpAddr)| network.pools.get(*family).is_some_and(|pool| pool.may_lease(**address));
        let (family, address) = underlay.public_ip.iter().find(leased)?;
        let pool = network.pools.get(family)?;
        Some(format!(
            "this host's address {address} lies among the overlay's subnets, {} to {}, so peers leave this host out: leave its range out by \
             SubnetMin and SubnetMax, or choose another network",
            pool.min.base(),
            pool.max.last()
        ))
    }
}
