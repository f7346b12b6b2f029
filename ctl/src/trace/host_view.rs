//! The host's interfaces, addresses and rules, read once, and a handle for further kernel queries.

use std::net::IpAddr;

use overlay_agent::kernel::trace::packet::Interface;
use overlay_agent::kernel::trace::{KernelQuery, Link, OverlayRanges, RulesetSnapshot};
use overlay_agent::model::{Family, Role};
use overlay_agent::plan::OpError;

/// State of the calling thread's namespace.
pub struct HostView {
    /// Handle for kernel queries.
    pub kernel: KernelQuery,
    /// All rules.
    pub ruleset: RulesetSnapshot,
    /// All interfaces.
    pub links: Vec<Link>,
    /// All addresses.
    pub addresses: Vec<IpAddr>,
    /// Ranges of the overlay.
    pub overlay: OverlayRanges,
}

impl HostView {
    /// Reads the state.
    pub fn open() -> Result<HostView, OpError> {
        let mut kernel = KernelQuery::open()?;
        let links = kernel.links()?;
        let addresses = kernel.addresses(0)?;
        let overlay = kernel.overlay_ranges()?;
        Ok(HostView { kernel, ruleset: RulesetSnapshot::read()?, links, addresses, overlay })
    }

    /// Finds an interface.
    pub fn link(&self, index: Option<u32>) -> Option<&Link> {
        self.links.iter().find(|link| Some(link.index) == index)
    }

    /// Name of an interface, or its index if unknown.
    pub fn name(&self, index: Option<u32>) -> String {
        match (self.link(index), index) {
            (Some(link), _) => link.name.clone(),
            (None, Some(index)) => format!("interface {index}"),
            (None, None) => "no interface".to_owned(),
        }
    }

    /// Interface as rules match it.
    pub fn interface(&self, index: Option<u32>) -> Option<Interface> {
        self.link(index).map(|link| Interface { index: link.index, name: link.name.clone() })
    }

    /// Bridge of the overlay.
    pub fn bridge(&self) -> Option<&Link> {
        self.links.iter().find(|link| link.device().is_some_and(|device| device.role == Role::Bridge))
    }

    /// VXLAN device of a family.
    pub fn tunnel(&self, family: Family) -> Option<&Link> {
        self.links.iter().find(|link| link.is_tunnel(family))
    }

    /// Whether the overlay leases an address.
    pub fn in_overlay(&self, address: IpAddr) -> bool {
        self.overlay.ranges.get(Family::of(address)).is_some_and(|(first, last)| (*first..=*last).contains(&address))
    }

    /// Reads a sysctl below `/proc/sys/net`; `None` if absent.
    pub fn sysctl(path: &str) -> Option<String> {
        std::fs::read_to_string(format!("/proc/sys/net/{path}")).ok().map(|text| text.trim().to_owned())
    }
}

/// Describes why an interface cannot send; `None` if it can.
pub fn link_fault(link: &Link) -> Option<String> {
    if !link.up {
        Some(format!("{} is down", link.name))
    } else if !link.running {
        Some(format!("{} has no carrier", link.name))
    } else {
        None
    }
}
