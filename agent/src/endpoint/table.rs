//! The endpoints of this host in memory, and as they stand in `endpoints.json`. Pure: no files, no kernel, no tasks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::ipam::Ipam;
use super::request::{Wish, free_mac, host_interface};
use super::{EndpointError, EndpointNetwork};
use crate::model::api::Attached;
use crate::model::endpoint::EndpointName;
use crate::model::{Endpoint, Family, Mode, PerFamily, Port, Subnet};
use crate::plan::Plug;

/// How far an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Phase {
    /// Written down, not plugged yet or only in part.
    Attaching,
    /// Plugged.
    Attached,
    /// About to go.
    Detaching,
}

/// An endpoint and how far it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) phase: Phase,
    #[serde(flatten)]
    pub(super) endpoint: Endpoint,
}

/// The content of `endpoints.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stored {
    /// The endpoints, by name.
    pub(super) endpoints: Vec<Record>,
    /// Where each family's search for an address goes on, so that a restart does not hand out again what was just given back.
    #[serde(default)]
    pub(super) cursor: PerFamily<IpAddr>,
}

/// Everything known of this host's endpoints.
#[derive(Debug, Default)]
pub(super) struct Table {
    records: BTreeMap<EndpointName, Record>,
    network: Option<EndpointNetwork>,
    /// The allocators of the last known subnet; kept while no subnet is leased.
    pools: PerFamily<Ipam>,
    /// From the file, for the first subnet.
    cursor: PerFamily<IpAddr>,
    /// Counts changes of what is stored.
    pub(super) version: u64,
}

impl Table {
    pub(super) fn from_stored(stored: Stored) -> Table {
        let records = stored.endpoints.into_iter().map(|record| (record.endpoint.name.clone(), record)).collect();
        Table { records, cursor: stored.cursor, ..Table::default() }
    }

    pub(super) fn stored(&self) -> Stored {
        let cursor = if self.pools.is_empty() { self.cursor } else { self.pools.map(|_, pool| pool.cursor()) };
        Stored { endpoints: self.records.values().cloned().collect(), cursor }
    }

    pub(super) fn get(&self, name: &EndpointName) -> Option<&Record> {
        self.records.get(name)
    }

    pub(super) fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// The endpoints that are plugged, by name, without those whose namespace is missing: a veth pair goes with its namespace.
    pub(super) fn plugged(&self, missing: &BTreeSet<EndpointName>) -> Vec<Endpoint> {
        let plugged =
            |r: &&Record| r.phase == Phase::Attached && r.endpoint.port.is_some() && !missing.contains(&r.endpoint.name);
        self.records.values().filter(plugged).map(|r| r.endpoint.clone()).collect()
    }

    /// Takes another subnet, bridge or MTU as the present one. Addresses of endpoints count as in use where they lie in it.
    pub(super) fn set_network(&mut self, network: Option<EndpointNetwork>) {
        if let Some(new) = &network {
            for family in Family::ALL {
                let range = new.subnet.get(family);
                if self.pools.get(family).map(Ipam::range) != range {
                    *self.pools.slot(family) = range.map(|range| self.pool(range, family));
                }
            }
        }
        self.network = network;
    }

    fn pool(&self, range: crate::model::Cidr, family: Family) -> Ipam {
        let mut pool = Ipam::new(range);
        if let Some(cursor) = self.cursor.get(family) {
            pool.resume(*cursor);
        }
        for address in self.records.values().filter_map(|r| r.endpoint.addresses().get(family).copied()) {
            // Outside the range it is a stale endpoint's; twice the same cannot be, and would do no harm.
            let _ = pool.take(address);
        }
        pool
    }

    pub(super) fn network(&self) -> Result<&EndpointNetwork, EndpointError> {
        self.network.as_ref().ok_or(EndpointError::NoSubnet)
    }

    /// Endpoints with an address outside the present subnet; none while there is no subnet.
    pub(super) fn stale(&self) -> Vec<Endpoint> {
        let Some(network) = &self.network else { return Vec::new() };
        let outside = |r: &&Record| outside(&r.endpoint, &network.subnet).is_some();
        self.records.values().filter(outside).map(|r| r.endpoint.clone()).collect()
    }

    /// Whether the endpoint of that name is what is asked for, so that attaching it again answers it; an error where it is something else.
    pub(super) fn matches(&self, endpoint: &Endpoint, wish: &Wish) -> Result<(), EndpointError> {
        let held = |held: String, asked: String| EndpointError::NameHeld { name: endpoint.name.clone(), held, asked };
        if endpoint.netns != wish.netns {
            let text = |path: &std::path::Path| format!("network namespace {}", path.display());
            return Err(held(text(&endpoint.netns), text(&wish.netns)));
        }
        let Some(port) = &endpoint.port else { return Err(held(format!("mode {}", endpoint.mode), Mode::Overlay.to_string())) };
        if port.interface != wish.interface {
            return Err(held(format!("interface {}", port.interface), wish.interface.clone()));
        }
        for (family, wished) in wish.addresses.iter() {
            match port.addresses.get(family) {
                Some(address) if address == wished => {}
                Some(address) => return Err(held(format!("address {address}"), wished.to_string())),
                None => return Err(held(format!("no {family} address"), wished.to_string())),
            }
        }
        let subnet = self.network()?.subnet;
        match outside(endpoint, &subnet) {
            Some(address) => Err(EndpointError::Stale { name: endpoint.name.clone(), address, subnet }),
            None => Ok(()),
        }
    }

    /// Makes a record in phase attaching, with addresses, MAC and host interface. All or nothing.
    pub(super) fn reserve(&mut self, name: EndpointName, wish: Wish, now: u64) -> Result<Endpoint, EndpointError> {
        let subnet = self.network()?.subnet;
        for (family, address) in wish.addresses.iter() {
            let pool = self.pools.get(family).ok_or(EndpointError::NoFamily { address: *address, family, subnet })?;
            if let Some(holder) = self.records.values().find(|r| r.endpoint.addresses().get(family) == Some(address)) {
                return Err(EndpointError::AddressHeld { address: *address, holder: holder.endpoint.name.clone() });
            }
            pool.check(*address)?;
        }
        let same_interface = |port: &Port| port.interface == wish.interface;
        let same_place = |r: &&Record| r.endpoint.port.as_ref().is_some_and(same_interface) && r.endpoint.netns == wish.netns;
        if let Some(holder) = self.records.values().find(same_place) {
            let holder = holder.endpoint.name.clone();
            return Err(EndpointError::InterfaceHeld { interface: wish.interface, netns: wish.netns, holder });
        }
        let addresses = self.allocate(&wish.addresses)?;
        let ports = || self.records.values().filter_map(|r| r.endpoint.port.as_ref());
        let taken = |interface: &str| ports().any(|port| port.host_interface == interface);
        let mut attempt = 0;
        let mut host_end = host_interface(&name, attempt);
        while taken(&host_end) {
            attempt += 1;
            host_end = host_interface(&name, attempt);
        }
        let endpoint = Endpoint {
            name: name.clone(),
            mode: Mode::Overlay,
            netns: wish.netns,
            port: Some(Port {
                interface: wish.interface,
                host_interface: host_end,
                mac: free_mac(|mac| ports().any(|port| port.mac == mac)),
                addresses,
            }),
            published: Vec::new(),
            source_check: true,
            owner: None,
            attached_at: now,
        };
        self.records.insert(name, Record { phase: Phase::Attaching, endpoint: endpoint.clone() });
        self.version += 1;
        Ok(endpoint)
    }

    /// One address in each family of the subnet; the wished ones have been checked.
    fn allocate(&mut self, wished: &PerFamily<IpAddr>) -> Result<PerFamily<IpAddr>, EndpointError> {
        let mut given = PerFamily::default();
        let families: Vec<Family> = self.pools.families().collect();
        for family in families {
            let Some(pool) = self.pools.slot(family) else { continue };
            let address = match wished.get(family) {
                Some(address) => pool.take(*address).map(|()| *address),
                None => pool.allocate(),
            };
            match address {
                Ok(address) => *given.slot(family) = Some(address),
                Err(error) => {
                    self.release(&given);
                    return Err(error.into());
                }
            }
        }
        Ok(given)
    }

    fn release(&mut self, addresses: &PerFamily<IpAddr>) {
        for (family, address) in addresses.iter() {
            if let Some(pool) = self.pools.slot(family) {
                pool.release(*address);
            }
        }
    }

    pub(super) fn set_phase(&mut self, name: &EndpointName, phase: Phase) {
        if let Some(record) = self.records.get_mut(name) {
            record.phase = phase;
            self.version += 1;
        }
    }

    /// Forgets an endpoint and takes its addresses back.
    pub(super) fn remove(&mut self, name: &EndpointName) {
        if let Some(record) = self.records.remove(name) {
            self.release(&record.endpoint.addresses());
            self.version += 1;
        }
    }

    /// What the kernel needs for an endpoint, and the answer to the attach.
    pub(super) fn plug(&self, endpoint: &Endpoint) -> Result<(Plug, Attached), EndpointError> {
        let network = self.network()?;
        let no_port =
            || EndpointError::Defect { name: endpoint.name.clone(), text: format!("mode {} has no interface", endpoint.mode) };
        let port = endpoint.port.as_ref().ok_or_else(no_port)?;
        let mut plug = Plug {
            netns: endpoint.netns.clone(),
            interface: port.interface.clone(),
            host_interface: port.host_interface.clone(),
            bridge: network.bridge,
            mac: port.mac,
            mtu: network.mtu,
            addresses: Vec::new(),
            gateways: Vec::new(),
        };
        let mut attached = Attached {
            endpoint: endpoint.clone(),
            prefix_length: PerFamily::default(),
            gateway: PerFamily::default(),
            mtu: Some(network.mtu),
        };
        for (family, address) in port.addresses.iter() {
            let stale = || EndpointError::Stale { name: endpoint.name.clone(), address: *address, subnet: network.subnet };
            let range = network.subnet.get(family).filter(|range| range.contains(*address)).ok_or_else(stale)?;
            let gateway = network.subnet.gateway(family).ok_or_else(stale)?;
            plug.addresses.push(IpNetwork::new(*address, range.length()).map_err(|_| stale())?);
            plug.gateways.push(gateway);
            *attached.prefix_length.slot(family) = Some(range.length());
            *attached.gateway.slot(family) = Some(gateway);
        }
        Ok((plug, attached))
    }
}

fn outside(endpoint: &Endpoint, subnet: &Subnet) -> Option<IpAddr> {
    let outside = |(family, address): &(Family, &IpAddr)| !subnet.get(*family).is_some_and(|range| range.contains(**address));
    endpoint.addresses().iter().find(outside).map(|(_, address)| *address)
}
