//! The host: its interfaces, addresses and rules, read once, and the kernel to be asked for the rest.

use std::net::IpAddr;

use overlay_agent::kernel::trace::packet::Interface;
use overlay_agent::kernel::trace::{KernelQuery, Link, OverlayRanges, RulesetSnapshot};
use overlay_agent::model::{Family, Role};
use overlay_agent::plan::OpError;

/// The calling thread's namespace.
pub struct HostView {
    /// Asks.
    pub kernel: KernelQuery,
    /// All rules.
    pub ruleset: RulesetSnapshot,
    /// All interfaces.
    pub links: Vec<Link>,
    /// All addresses.
    pub addresses: Vec<IpAddr>,
    /// The overlay.
    pub overlay: OverlayRanges,
}

impl HostView {
    /// Reads it.
    pub fn open() -> Result<HostView, OpError> {
        let mut kernel = KernelQuery::open()?;
        let links = kernel.links()?;
        let addresses = kernel.addresses(0)?;
        let overlay = kernel.overlay_ranges()?;
        Ok(HostView { kernel, ruleset: RulesetSnapshot::read()?, links, addresses, overlay })
    }

    /// An interface.
    pub fn link(&self, index: Option<u32>) -> Option<&Link> {
        self.links.iter().find(|link| Some(link.index) == index)
    }

    /// Its name, or its number where it is none that is known.
    pub fn name(&self, index: Option<u32>) -> String {
        match (self.link(index), index) {
            (Some(link), _) => link.name.clone(),
            (None, Some(index)) => format!("interface {index}"),
            (None, None) => "no interface".to_owned(),
        }
    }

    /// As rules name it.
    pub fn interface(&self, index: Option<u32>) -> Option<Interface> {
        self.link(index).map(|link| Interface { index: link.index, name: link.name.clone() })
    }

    /// The overlay's bridge.
    pub fn bridge(&self) -> Option<&Link> {
        self.links.iter().find(|link| link.device().is_some_and(|device| device.role == Role::Bridge))
    }

    /// The VXLAN device of a family.
    pub fn tunnel(&self, family: Family) -> Option<&Link> {
        self.links.iter().find(|link| link.is_tunnel(family))
    }

    /// Whether an address is one that the overlay leases.
    pub fn in_overlay(&self, address: IpAddr) -> bool {
        self.overlay.ranges.get(Family::of(address)).is_some_and(|(first, last)| (*first..=*last).contains(&address))
    }

    /// A sysctl below `/proc/sys/net`; `None` where there is none.
    pub fn sysctl(path: &str) -> Option<String> {
        std::fs::read_to_string(format!("/proc/sys/net/{path}")).ok().map(|text| text.trim().to_owned())
    }
}

/// `lo`, 127.0.0.0/8 aside: whether an interface can send.
pub fn link_fault(link: &Link) -> Option<String> {
    if !link.up {
        Some(format!("{} is down", link.name))
    } else if !link.running {
        Some(format!("{} has no carrier", link.name))
    } else {
        None
    }
}
