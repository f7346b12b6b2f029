//! Addresses of our devices.

use ipnetwork::IpNetwork;

use super::link::Links;
use super::socket::Refusal;
use crate::model::Device;
use crate::plan::OpError;

/// Sets or removes an address of a device of ours.
pub async fn set(links: &mut Links<'_>, device: Device, address: IpNetwork, present: bool) -> Result<(), OpError> {
    let verb = if present { "add" } else { "remove" };
    let what = || format!("cannot {verb} address {address} on {device}");
    let result = match links.known.index(device) {
        Some(index) if present => links.rtnl.add_address(index, address).await,
        Some(index) => links.rtnl.delete_address(index, address).await,
        None => Err(Refusal { errno: libc::ENODEV, detail: format!("{device} is not there") }),
    };
    match result {
        // Gone already, or with its device.
        Err(e) if !present && matches!(e.errno, libc::EADDRNOTAVAIL | libc::ENODEV) => {}
        other => other.map_err(|e| e.during(what()))?,
    }
    if present {
        links.known.addresses.insert((device, address));
    } else {
        links.known.addresses.remove(&(device, address));
    }
    Ok(())
}
