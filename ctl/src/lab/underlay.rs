//! The underlay: namespaces, the switch, the outside world, and each host's veth pair.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::netns_builder::NetnsBuilder;
use overlay_agent::model::{Family, PerFamily};
use overlay_agent::plan::OpError;

use super::LabError;
use super::layout::{HostLayout, Layout, etcd_address, gateway_address, outside_address, underlay};

/// Name of the switch's bridge.
pub const SWITCH: &str = "switch";
/// Name of the veth end in a host and in the world.
pub const UPLINK: &str = "eth0";

/// Creates the namespaces, links, addresses and routes, before any process starts.
pub fn build(layout: &Layout) -> Result<(), LabError> {
    let net = Netns::create(&layout.namespace("net"))?;
    let switch = NetnsBuilder::open(&net).map_err(link_error("net"))?;
    switch.add_bridge(SWITCH).map_err(link_error("net"))?;
    add_addresses(&switch, SWITCH, layout, etcd_address).map_err(link_error("net"))?;
    switch.set_up(SWITCH).map_err(link_error("net"))?;

    let world = Netns::create(&layout.namespace("world"))?;
    let setup = connect_to_switch(&switch, "world", &world).map_err(link_error("world"))?;
    let configure = || {
        add_addresses(&setup, UPLINK, layout, gateway_address)?;
        for family in layout.families() {
            setup.add_address("lo", IpNetwork::from(outside_address(family)))?;
        }
        setup.set_up(UPLINK)
    };
    configure().map_err(link_error("world"))?;

    layout.hosts.iter().try_for_each(|host| add_host(layout, host))
}

/// Creates a host's namespace, with its link to the switch.
pub fn add_host(layout: &Layout, host: &HostLayout) -> Result<(), LabError> {
    let switch = NetnsBuilder::open(&Netns::named(&layout.namespace("net"))?).map_err(link_error("net"))?;
    let netns = Netns::create(&layout.namespace(&host.name))?;
    let setup = connect_to_switch(&switch, &host.name, &netns).map_err(link_error(&host.name))?;
    configure_host(&setup, &host.addresses).map_err(link_error(&host.name))
}

/// Creates a veth pair from a switch port to `eth0` of a namespace.
fn connect_to_switch(switch: &NetnsBuilder, port: &str, netns: &Netns) -> Result<NetnsBuilder, OpError> {
    switch.add_veth(port, UPLINK, netns)?;
    switch.set_master(port, SWITCH)?;
    switch.set_up(port)?;
    NetnsBuilder::open(netns)
}

fn configure_host(setup: &NetnsBuilder, addresses: &PerFamily<IpAddr>) -> Result<(), OpError> {
    for (family, address) in addresses.iter() {
        setup.add_address(UPLINK, on_underlay(family, *address))?;
    }
    setup.set_up(UPLINK)?;
    for family in addresses.families() {
        setup.add_route(None, Some(gateway_address(family)), Some(UPLINK))?;
    }
    Ok(())
}

fn add_addresses(setup: &NetnsBuilder, link: &str, layout: &Layout, address: impl Fn(Family) -> IpAddr) -> Result<(), OpError> {
    for family in layout.families() {
        setup.add_address(link, on_underlay(family, address(family)))?;
    }
    Ok(())
}

fn on_underlay(family: Family, address: IpAddr) -> IpNetwork {
    IpNetwork::new(address, underlay(family).length()).unwrap_or_else(|_| IpNetwork::from(address))
}

fn link_error(device: &str) -> impl FnOnce(OpError) -> LabError {
    let device = device.to_owned();
    move |source| LabError::Link { what: device, source }
}
