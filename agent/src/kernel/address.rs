//! Sets and removes addresses of our devices.

use ipnetwork::IpNetwork;

use super::link::Links;
use super::route_socket::KernelError;
use super::sysctl;
use crate::model::Device;
use crate::plan::{Key, OpError, Value};

/// Sets or removes an address of one of our devices.
pub fn set(links: &mut Links<'_>, device: Device, address: IpNetwork, present: bool) -> Result<(), OpError> {
    let verb = if present { "add" } else { "remove" };
    let what = || format!("cannot {verb} address {address} on {device}");
    let result = match links.cache.index(device) {
        Some(index) if present => links.socket.add_address(index, address),
        Some(index) => links.socket.delete_address(index, address),
        None => Err(KernelError { errno: libc::ENODEV, detail: format!("device {device} does not exist") }),
    };
    match result {
        // The address was removed before, or with its device.
        Err(e) if !present && matches!(e.errno, libc::EADDRNOTAVAIL | libc::ENODEV) => {}
        Err(e) if e.errno == libc::EACCES && address.is_ipv6() => {
            let mut error = e.context(what());
            error
                .message
                .push_str(&format!("; IPv6 may be switched off there: sysctl -w net/{}=0", sysctl::disable_ipv6(&device.name())));
            return Err(error);
        }
        other => other.map_err(|e| e.context(what()))?,
    }
    links.cache.set(Key::Address(device, address), present.then_some(Value::Address));
    Ok(())
}
