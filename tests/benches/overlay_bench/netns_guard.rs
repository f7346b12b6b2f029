//! A network namespace for one turn of a measurement, with an underlay interface.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, ensure};
use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::netns_builder::NetnsBuilder;
use overlay_agent::model::Family;

/// The underlay interface.
pub const UNDERLAY: &str = "wan0";
/// The bridge of the measurement without an agent.
pub const BRIDGE: &str = "br0";

/// A namespace, removed on drop.
#[derive(Debug)]
pub struct NetnsGuard {
    name: String,
    netns: Netns,
}

impl NetnsGuard {
    /// Creates a namespace with an underlay of both families.
    pub fn new() -> anyhow::Result<NetnsGuard> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!("ovbench-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let netns = Netns::create(&name)?;
        let netns_guard = NetnsGuard { name, netns };
        let setup = NetnsBuilder::open(&netns_guard.netns)?;
        setup.add_bridge(UNDERLAY)?;
        for address in ["10.99.0.1/16", "fd99::1/64"] {
            setup.add_address(UNDERLAY, address.parse()?)?;
        }
        setup.set_up(UNDERLAY)?;
        Ok(netns_guard)
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The interface index of a link.
    pub fn link_index(&self, link: &str) -> anyhow::Result<u32> {
        Ok(NetnsBuilder::open(&self.netns)?.link_index(link)?)
    }

    /// Creates the agent's VXLAN device with `ip`, up and with its own address. Returns its interface index.
    pub fn add_vxlan(&self, family: Family) -> anyhow::Result<u32> {
        let (device, local, address) = match family {
            Family::V4 => ("ovx.1", "10.99.0.1", "10.255.255.0/32"),
            Family::V6 => ("ovx6.1", "fd99::1", "fd10:ff:ffff:ffff::/128"),
        };
        let vxlan = ["type", "vxlan", "id", "1", "local", local, "dev", UNDERLAY, "dstport", "8472", "nolearning"];
        self.ip(&[&["link", "add", device][..], &vxlan].concat())?;
        self.ip(&["address", "add", address, "dev", device])?;
        self.ip(&["link", "set", device, "up"])?;
        self.link_index(device)
    }

    /// Creates the agent's bridge, up. Returns its interface index.
    pub fn add_bridge(&self) -> anyhow::Result<u32> {
        let setup = NetnsBuilder::open(&self.netns)?;
        setup.add_bridge(BRIDGE)?;
        setup.set_up(BRIDGE)?;
        self.link_index(BRIDGE)
    }

    fn ip(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let run = || std::process::Command::new("ip").args(arguments).output();
        let output = self.netns.run(run)?.context("`ip` is needed: apt-get install iproute2")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ip {}: {}", arguments.join(" "), stderr.trim());
        Ok(())
    }
}

impl Drop for NetnsGuard {
    fn drop(&mut self) {
        if let Err(error) = Netns::delete(&self.name) {
            eprintln!("overlay-bench: {error}");
        }
    }
}
