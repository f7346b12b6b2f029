//! CHECK: compares the previous result with the kernel's state and the agent's. Parts of other plugins in the chain are not
//! checked.

use std::collections::BTreeMap;
use std::fmt::Write;

use nix::net::if_::if_nametoindex;
use overlay_agent::model::{Endpoint, Mac, Port};

use super::environment::Attachment;
use super::error::{CniError, Code};
use super::name;
use super::result::{Address, CniResult, Interface, Route};
use super::sandbox::{self, InterfaceState};
use super::verbs::{Context, endpoint_name};

/// This plugin's part of a previous result.
struct AttachResult<'a> {
    interface: &'a Interface,
    addresses: Vec<&'a Address>,
    /// Routes over the gateways of these addresses.
    routes: Vec<&'a Route>,
}

impl<'a> AttachResult<'a> {
    /// Selects the container's interface and its addresses and routes.
    fn from_result(result: &'a CniResult, name: &str) -> Option<AttachResult<'a>> {
        let is_container_interface = |interface: &&Interface| interface.name == name && !interface.sandbox.is_empty();
        let index = result.interfaces.iter().position(|interface| is_container_interface(&interface))?;
        let addresses: Vec<&Address> = result.ips.iter().filter(|address| address.interface == Some(index)).collect();
        let by_ours = |route: &&Route| route.gw.is_some() && addresses.iter().any(|address| address.gateway == route.gw);
        Some(AttachResult {
            interface: &result.interfaces[index],
            routes: result.routes.iter().filter(by_ours).collect(),
            addresses,
        })
    }
}

impl Context<'_> {
    /// Runs CHECK. An error lists each difference as a line of its details.
    pub fn check(&self, attachment: &Attachment) -> Result<(), CniError> {
        let owner = name::owner(self.config, attachment)?;
        let endpoint = endpoint_name(&owner)?;
        let Some(previous) = &self.config.prev_result else {
            return Err(CniError::new(Code::InvalidConfig, "CHECK without prevResult"));
        };
        let interface = &attachment.interface;
        let Some(attached) = AttachResult::from_result(previous, interface) else {
            let text =
                format!("prevResult has no container interface {interface}: it is not the result of this attachment's ADD");
            return Err(CniError::new(Code::InvalidConfig, text));
        };
        let netns = sandbox::open(attachment.netns.as_deref().unwrap_or_else(|| std::path::Path::new("")))?;
        let registered = self.agent().endpoints()?.endpoints.into_iter().find(|known| known.name == endpoint);
        let interfaces = sandbox::interfaces(&netns)?;
        let mut differences = compare_with_kernel(&attached, &interfaces);
        match &registered {
            Some(Endpoint { port: Some(port), source_check, netns: at, .. }) => {
                if at.canonicalize().ok() != netns.path().canonicalize().ok() {
                    differences.push(format!("the agent has endpoint {endpoint} in {} instead", at.display()));
                }
                differences.extend(compare_with_agent(&attached, port, *source_check));
                if if_nametoindex(port.host_interface.as_str()).is_err() {
                    differences.push(format!("the host interface {} is missing", port.host_interface));
                }
            }
            _ => differences.push(format!("the agent has no endpoint {endpoint}")),
        }
        if differences.is_empty() {
            self.log.info(format_args!("CHECK {endpoint}: unchanged, owner {owner}, {:.1} ms", self.elapsed_ms()));
            return Ok(());
        }
        let first = &differences[0];
        let mut text = format!("{interface} in {} differs from its attachment: {first}", netns.path().display());
        if differences.len() > 1 {
            // Writing to a String cannot fail.
            let _ = write!(text, ", and {} more", differences.len() - 1);
        }
        Err(CniError::new(Code::Mismatch, text).with_details(differences.join("\n")))
    }
}

/// Compares the result with the kernel's state.
fn compare_with_kernel(attached: &AttachResult<'_>, interfaces: &BTreeMap<String, InterfaceState>) -> Vec<String> {
    let name = &attached.interface.name;
    let Some(found) = interfaces.get(name) else { return vec![format!("{name} is missing")] };
    let mut differences = Vec::new();
    if !found.up {
        differences.push(format!("{name} is down"));
    }
    if let Ok(mac) = attached.interface.mac.to_ascii_lowercase().parse::<Mac>()
        && found.mac != Some(mac.0)
    {
        differences.push(format!("{name} has the MAC {}, not {mac}", found.mac.map(|m| Mac(m).to_string()).unwrap_or_default()));
    }
    for Address { address, .. } in &attached.addresses {
        if !found.addresses.contains(address) {
            differences.push(format!("{name} has no address {address}"));
        }
    }
    for Route { dst, gw, .. } in &attached.routes {
        if let Some(gateway) = gw.filter(|gateway| !found.routes.contains(&(*dst, *gateway))) {
            let what = if dst.prefix() == 0 { "default route".to_owned() } else { format!("route to {dst}") };
            differences.push(format!("no {what} via {gateway} over {name}"));
        }
    }
    differences
}

/// Compares the result with the agent's endpoint: its source check passes only the addresses and the MAC that it has.
fn compare_with_agent(attached: &AttachResult<'_>, port: &Port, source_check: bool) -> Vec<String> {
    let mut differences = Vec::new();
    if port.interface != attached.interface.name {
        differences.push(format!("the agent has it as interface {}", port.interface));
    }
    for (_, endpoint_address) in port.addresses.iter() {
        if !attached.addresses.iter().any(|address| address.address.ip() == *endpoint_address) {
            differences.push(format!("the agent assigned {endpoint_address}, which prevResult lacks"));
        }
    }
    for address in attached.addresses.iter().map(|address| address.address.ip()) {
        if source_check && !port.addresses.iter().any(|(_, endpoint_address)| *endpoint_address == address) {
            differences.push(format!("the agent did not assign {address}: packets from it are dropped"));
        }
    }
    if let Ok(mac) = attached.interface.mac.to_ascii_lowercase().parse::<Mac>()
        && source_check
        && mac != port.mac
    {
        differences.push(format!("the agent has the MAC {}, not {mac}: packets from it are dropped", port.mac));
    }
    differences
}
