//! The underlay: namespaces, the switch, the world outside, and each host's wire.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::setup::Setup;
use overlay_agent::model::{Family, PerFamily};
use overlay_agent::plan::OpError;

use super::LabError;
use super::layout::{Layout, etcd_address, gateway_address, outside_address, underlay};

/// The switch in its namespace.
pub const SWITCH: &str = "switch";
/// The wire's end in a host and in the world.
pub const WIRE: &str = "eth0";

/// Makes everything that stands before the first process.
pub async fn build(layout: &Layout) -> Result<(), LabError> {
    let net = Netns::create(&layout.namespace("net"))?;
    let switch = Setup::open(&net).map_err(at("net"))?;
    switch.add_bridge(SWITCH).await.map_err(at("net"))?;
    add_addresses(&switch, SWITCH, layout, etcd_address).await.map_err(at("net"))?;
    switch.set_up(SWITCH).await.map_err(at("net"))?;

    let world = Netns::create(&layout.namespace("world"))?;
    let setup = wire(&switch, "world", &world).await.map_err(at("world"))?;
    let result = async {
        add_addresses(&setup, WIRE, layout, gateway_address).await?;
        for family in layout.families() {
            setup.add_address("lo", IpNetwork::from(outside_address(family))).await?;
        }
        setup.set_up(WIRE).await
    };
    result.await.map_err(at("world"))?;

    for host in &layout.hosts {
        let netns = Netns::create(&layout.namespace(&host.name))?;
        let setup = wire(&switch, &host.name, &netns).await.map_err(at(&host.name))?;
        connect_host(&setup, &host.addresses).await.map_err(at(&host.name))?;
    }
    Ok(())
}

/// Lays a wire from a port of the switch to `eth0` of a namespace.
async fn wire(switch: &Setup, port: &str, netns: &Netns) -> Result<Setup, OpError> {
    switch.add_veth(port, WIRE, netns).await?;
    switch.set_master(port, SWITCH).await?;
    switch.set_up(port).await?;
    Setup::open(netns)
}

async fn connect_host(setup: &Setup, addresses: &PerFamily<IpAddr>) -> Result<(), OpError> {
    for (family, address) in addresses.iter() {
        setup.add_address(WIRE, on_underlay(family, *address)).await?;
    }
    setup.set_up(WIRE).await?;
    for family in addresses.families() {
        setup.add_route(None, Some(gateway_address(family)), Some(WIRE)).await?;
    }
    Ok(())
}

async fn add_addresses(setup: &Setup, link: &str, layout: &Layout, address: impl Fn(Family) -> IpAddr) -> Result<(), OpError> {
    for family in layout.families() {
        setup.add_address(link, on_underlay(family, address(family))).await?;
    }
    Ok(())
}

fn on_underlay(family: Family, address: IpAddr) -> IpNetwork {
    IpNetwork::new(address, underlay(family).length()).unwrap_or_else(|_| IpNetwork::from(address))
}

fn at(what: &str) -> impl FnOnce(OpError) -> LabError {
    let what = what.to_owned();
    move |source| LabError::Link { what, source }
}
