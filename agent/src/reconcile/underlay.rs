//! The host's own interfaces: which one is external, and what their settings were and have to be.

use std::time::{Duration, Instant};

use super::{Memory, Reconciler, UNDERLAY_REST_FACTOR};
use crate::metrics::Whole;
use crate::model::{Device, Family, NetworkConfig};
use crate::plan::desired::sysctls;
use crate::plan::state::Value;
use crate::plan::underlay::{Underlay, ipv6_remedy};
use crate::plan::{DataPath, Key, LinkKind};

/// How long after the start IPv6 may still be switched off on the external interface before this host does without.
const IPV6_WAIT: Duration = Duration::from_secs(3);

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
                self.underlay_error = Some(error.to_string());
                self.underlay_due = Some(Instant::now() + Duration::from_secs(1));
                return;
            }
        };
        self.inventory = inventory;
        let Some(network) = self.network.clone() else { return };
        let families: Vec<Family> = network.families().collect();
        let reach = match self.settings.selection.can_reach {
            Some(address) => self.data_path.route_to(address).await.unwrap_or_default(),
            None => None,
        };
        match self.settings.selection.choose(&self.inventory, &families, reach) {
            Ok(mut underlay) => {
                let before = self.ipv6_problem.take();
                if !self.settle_ipv6(&network, &mut underlay) {
                    return;
                }
                if self.ipv6_problem != before {
                    self.changed = true;
                    match &self.ipv6_problem {
                        Some(problem) => tracing::error!(problem, "IPv6 of the overlay is missing"),
                        None => tracing::info!(interface = underlay.name, "IPv6 of the overlay is back"),
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
                self.underlay_error = None;
            }
            Err(error) => {
                let error = error.to_string();
                if self.underlay_error.as_ref() != Some(&error) {
                    tracing::error!(
                        error,
                        "no external interface{}",
                        if self.underlay.is_some() { ": the last one stays in use" } else { "" }
                    );
                    self.changed = true;
                }
                self.underlay_error = Some(error);
            }
        }
        self.host_dirty = true;
    }

    /// Completes the choice where IPv6 is switched off on the external interface: what an earlier choice built stays, else this run has IPv4
    /// alone, for a lease with IPv6 would need an address. Once it comes back it is not taken up by itself: the host would get another subnet,
    /// and its containers lose their IPv4 addresses. Returns whether the choice stands.
    fn settle_ipv6(&mut self, network: &NetworkConfig, underlay: &mut Underlay) -> bool {
        let is_wanted = network.families().eq(Family::ALL);
        if !is_wanted {
            self.ipv4_alone = false;
            return true;
        }
        let name = underlay.name.clone();
        if underlay.local.v6.is_some() {
            if self.ipv4_alone {
                (underlay.local.v6, underlay.public_ip.v6) = (None, None);
                self.ipv6_problem = Some(format!(
                    "IPv6 is on again on {name}, and this host leased an IPv4 subnet alone: restart overlayd to have both; it gets another \
                     subnet then, so attach its containers again"
                ));
            }
            return true;
        }
        let device = Key::Link(Device::vxlan(Family::V6, network.vxlan.vni).name().into());
        let built = match self.actual.get(&device) {
            Some(Value::Link(link)) => match &link.kind {
                LinkKind::Vxlan(vxlan) => Some(vxlan.local),
                _ => None,
            },
            _ => self.underlay.as_ref().and_then(|was| was.local.v6),
        };
        match built.filter(|_| !self.ipv4_alone) {
            Some(local) => {
                underlay.local.v6 = Some(local);
                underlay.public_ip.v6 = self.settings.selection.public_ip.v6.or(Some(local));
            }
            None if !self.ipv4_alone && self.started.elapsed() < IPV6_WAIT => {
                // What configures the host may be about to switch it on.
                self.underlay_due = Some(self.started + IPV6_WAIT);
                return false;
            }
            None => self.ipv4_alone = true,
        }
        self.ipv6_problem = Some(format!(
            "IPv6 is switched off on the external interface {name}, so that only IPv4 of the overlay works on this host: {}, or take IPv6 out \
             of the network's configuration",
            ipv6_remedy(&name)
        ));
        true
    }

    /// The host's own interfaces that have to go on with router advertisements.
    pub(super) fn keep_routers(&self, underlay: &Underlay) -> Vec<String> {
        let forwarding = Key::Sysctl(sysctls::IPV6_FORWARD.into());
        let is_off = |value: &Value| *value == Value::Sysctl("0".into());
        let switched_on = self.actual.get(&forwarding).is_some_and(is_off)
            || self.memory.sysctl_before(sysctls::IPV6_FORWARD).is_some_and(|before| before == "0");
        let changed = |name: &str| self.memory.sysctl_before(&sysctls::of(name, Family::V6, "accept_ra")).is_some();
        sysctls::keep_routers(&self.inventory, underlay.index, switched_on, changed)
    }

    /// Reads the settings of the host's own interfaces that are wanted and were not read before: what they were can be put back then.
    pub(super) async fn read_settings(&mut self) {
        let settings = self.desired.keys().take_while(|key| matches!(key, Key::Sysctl(_)));
        let unread = settings.filter(|key| key.device().is_none() && !self.actual.contains_key(key));
        let paths: Vec<String> =
            unread.filter_map(|key| if let Key::Sysctl(path) = key { Some(path.to_string()) } else { None }).collect();
        if paths.is_empty() {
            return;
        }
        match self.data_path.follow(paths).await {
            Ok(found) => self.actual.extend(found),
            Err(error) => tracing::warn!(%error, "a setting of an interface cannot be read"),
        }
    }
}
