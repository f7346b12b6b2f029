//! Table of a network's endpoints on this host. Pure: no files, no kernel, no tasks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::EndpointError;
use super::claims::{Claims, HostClaims};
use super::id::EndpointId;
use super::ipam::Ipam;
use super::record::{EndpointRecord, JournalEntry, Phase, StoredTable};
use super::spec::{AttachMode, AttachSpec, EndpointNetwork, NetnsRef, free_mac, veth_name};
use crate::model::api::AttachResponse;
use crate::model::device::MAX_BRIDGE_PORTS;
use crate::model::endpoint::EndpointName;
use crate::model::{Cidr, Endpoint, Family, Mac, Mode, NetworkName, PerFamily, Port, PublishedPort, Subnet};
use crate::plan::PortSpec;
use crate::plan::desired::source_elements;

/// A network's endpoints on this host. Its records' claims end with it.
#[derive(Debug)]
pub(super) struct EndpointTable {
    name: NetworkName,
    claims: HostClaims,
    records: BTreeMap<EndpointName, EndpointRecord>,
    network: Option<EndpointNetwork>,
    /// The allocators of the last known subnet; kept while no subnet is leased.
    pools: PerFamily<Ipam>,
    /// The stored cursor, for the first subnet.
    cursor: PerFamily<IpAddr>,
    /// Counts changes of the stored content.
    pub(super) version: u64,
    /// Endpoints whose records changed since the last [`EndpointTable::take_changes`].
    changed: BTreeSet<EndpointName>,
}

impl EndpointTable {
    /// The stored table of a network; claims what its endpoints have.
    pub(super) fn from_stored(stored: StoredTable, name: NetworkName, claims: HostClaims) -> EndpointTable {
        let mut records = BTreeMap::new();
        for mut record in stored.endpoints {
            // One name for all, instead of a copy each.
            Arc::make_mut(&mut record.endpoint).network = name.clone();
            claims.lock().insert(&record.endpoint);
            records.insert(record.endpoint.name.clone(), record);
        }
        EndpointTable {
            name,
            claims,
            records,
            network: None,
            pools: PerFamily::default(),
            cursor: stored.cursor,
            version: 0,
            changed: BTreeSet::new(),
        }
    }

    pub(super) fn stored(&self) -> StoredTable {
        StoredTable { endpoints: self.records.values().cloned().collect(), cursor: self.cursor() }
    }

    fn cursor(&self) -> PerFamily<IpAddr> {
        if self.pools.is_empty() { self.cursor } else { self.pools.map(|_, pool| pool.cursor()) }
    }

    /// Records that an endpoint's record differs from the stored one.
    fn mark_changed(&mut self, name: &EndpointName) {
        self.changed.insert(name.clone());
        self.version += 1;
    }

    /// The changes since the last call.
    pub(super) fn take_changes(&mut self) -> Vec<JournalEntry> {
        let cursor = self.cursor();
        let changed = std::mem::take(&mut self.changed).into_iter();
        changed.map(|name| JournalEntry { record: self.records.get(&name).cloned(), name, cursor }).collect()
    }

    /// Marks changes as pending again, because they could not be stored.
    pub(super) fn requeue_changes(&mut self, changes: Vec<JournalEntry>) {
        self.changed.extend(changes.into_iter().map(|change| change.name));
    }

    pub(super) fn get(&self, name: &EndpointName) -> Option<&EndpointRecord> {
        self.records.get(name)
    }

    pub(super) fn records(&self) -> impl Iterator<Item = &EndpointRecord> {
        self.records.values()
    }

    /// The endpoints that still hold the resource that an attach was refused.
    pub(super) fn holders(&self, error: &EndpointError) -> Vec<EndpointRecord> {
        let holds = |record: &&EndpointRecord| error.is_caused_by(&record.endpoint);
        self.records.values().filter(holds).cloned().collect()
    }

    /// The endpoints with a port on the bridge, by name, except those whose veth pair vanished with its namespace.
    pub(super) fn ports(&self, missing: &BTreeSet<EndpointName>) -> Vec<Arc<Endpoint>> {
        let has_port =
            |r: &&EndpointRecord| r.phase == Phase::Attached && r.endpoint.port.is_some() && !missing.contains(&r.endpoint.name);
        self.records.values().filter(has_port).map(|r| Arc::clone(&r.endpoint)).collect()
    }

    /// Sets the present subnet, bridge and MTU. Addresses of endpoints inside the subnet count as in use.
    pub(super) fn set_network(&mut self, network: Option<EndpointNetwork>) {
        if let Some(new) = &network {
            for family in Family::ALL {
                let range = new.subnet.get(family);
                if self.pools.get(family).map(Ipam::range) != range {
                    *self.pools.slot(family) = range.map(|range| self.pool(range, family, new.docker));
                }
            }
        }
        self.network = network;
    }

    fn pool(&self, range: Cidr, family: Family, docker: bool) -> Ipam {
        let mut pool = if docker { Ipam::with_docker_share(range) } else { Ipam::new(range) };
        if let Some(cursor) = self.cursor.get(family) {
            pool.resume(*cursor);
        }
        for address in self.records.values().filter_map(|r| r.endpoint.addresses().get(family).copied()) {
            // Fails harmlessly for stale endpoints, and for endpoints in what is now Docker's part. Duplicates cannot occur.
            let _ = pool.reserve(address);
        }
        pool
    }

    /// The allocators of the last known subnet.
    pub(super) fn pools(&self) -> &PerFamily<Ipam> {
        &self.pools
    }

    pub(super) fn network(&self) -> Result<&EndpointNetwork, EndpointError> {
        self.network.as_ref().ok_or(EndpointError::NoSubnet)
    }

    /// Endpoints with an address outside the present subnet; none while there is no subnet.
    pub(super) fn stale(&self) -> Vec<Endpoint> {
        let Some(network) = &self.network else { return Vec::new() };
        let is_outside = |r: &&EndpointRecord| address_outside(&r.endpoint, &network.subnet).is_some();
        self.records.values().filter(is_outside).map(|r| Endpoint::clone(&r.endpoint)).collect()
    }

    /// The mode of a request. If its target shares a namespace itself, the result refers to the namespace's owner.
    fn mode(&self, attach_mode: &AttachMode) -> Mode {
        match attach_mode {
            AttachMode::Overlay { .. } => Mode::Overlay,
            AttachMode::None(_) => Mode::None,
            AttachMode::Host(_) => Mode::Host,
            AttachMode::Container(target) => match self.records.get(target).map(|r| &r.endpoint.mode) {
                Some(Mode::Container(owner)) => Mode::Container(owner.clone()),
                _ => Mode::Container(target.clone()),
            },
        }
    }

    /// Checks that an attached endpoint matches a request, so that a repeated attach can return it.
    pub(super) fn matches(&self, endpoint: &Endpoint, spec: &AttachSpec) -> Result<(), EndpointError> {
        let name_in_use = |existing: String, requested: String| EndpointError::NameInUse {
            name: EndpointId::of(endpoint),
            held: existing,
            asked: requested,
        };
        let differs = |what: &str, actual: &str, requested: &str| {
            if actual == requested { Ok(()) } else { Err(name_in_use(format!("{what} {actual}"), format!("{what} {requested}"))) }
        };
        differs("mode", &endpoint.mode.to_string(), &self.mode(&spec.mode).to_string())?;
        if let Some(netns) = spec.netns() {
            differs("network namespace", &endpoint.netns.to_string_lossy(), &netns.path.to_string_lossy())?;
        }
        let owner = |owner: &Option<String>| owner.clone().unwrap_or_else(|| "none".to_owned());
        differs("owner", &owner(&endpoint.owner), &owner(&spec.owner))?;
        differs("published ports", &format_ports(&endpoint.published), &format_ports(&spec.publish))?;
        let check = |on: bool| if on { "on" } else { "off" };
        differs("source check", check(endpoint.source_check), check(spec.source_check))?;
        differs("default route", check(endpoint.default_route), check(spec.default_route))?;
        let (Some(port), AttachMode::Overlay { interface, addresses, mac, .. }) = (&endpoint.port, &spec.mode) else {
            return Ok(());
        };
        differs("interface", &port.interface, interface)?;
        differs("MAC", &port.mac.to_string(), &mac.unwrap_or(port.mac).to_string())?;
        for (family, requested) in addresses.iter() {
            match port.addresses.get(family) {
                Some(address) if address == requested => {}
                Some(address) => return Err(name_in_use(format!("address {address}"), requested.to_string())),
                None => return Err(name_in_use(format!("no {family} address"), requested.to_string())),
            }
        }
        let subnet = self.network()?.subnet;
        match address_outside(endpoint, &subnet) {
            Some(address) => Err(EndpointError::Stale { name: EndpointId::of(endpoint), address, subnet }),
            None => Ok(()),
        }
    }

    /// Creates a record and allocates its resources, or fails without effect. It is `Attaching` if the kernel has work for it.
    pub(super) fn reserve(&mut self, name: EndpointName, spec: AttachSpec, now: u64) -> Result<Endpoint, EndpointError> {
        let mode = self.mode(&spec.mode);
        let AttachSpec { mode: attach_mode, publish, source_check, default_route, owner } = spec;
        let claims = self.claims.clone();
        let mut claims = claims.lock();
        let (netns, port) = match attach_mode {
            AttachMode::Overlay { netns, interface, addresses, mac } => {
                self.check_published(&claims, &publish)?;
                let port = self.reserve_port(&claims, &name, &netns, interface, &addresses, mac)?;
                (netns, Some(port))
            }
            AttachMode::None(netns) => {
                claims.check_netns_free(&netns, |_| true)?;
                (netns, None)
            }
            AttachMode::Host(netns) => (NetnsRef { path: netns, id: None }, None),
            AttachMode::Container(target) => {
                let owner = if let Mode::Container(owner) = &mode { owner } else { &target };
                let attached = self.records.get(owner).filter(|r| r.phase == Phase::Attached);
                let Some(record) = attached else { return Err(EndpointError::TargetNotFound { target }) };
                (NetnsRef { path: record.endpoint.netns.clone(), id: record.netns_id.clone() }, None)
            }
        };
        let phase = if matches!(mode, Mode::Overlay | Mode::None) { Phase::Attaching } else { Phase::Attached };
        let endpoint = Endpoint {
            name: name.clone(),
            network: self.name.clone(),
            mode,
            netns: netns.path,
            port,
            published: publish,
            source_check,
            default_route,
            owner,
            attached_at: now,
        };
        self.mark_changed(&name);
        let shared = Arc::new(endpoint.clone());
        claims.insert(&shared);
        self.records.insert(name, EndpointRecord { phase, endpoint: shared, netns_id: netns.id });
        Ok(endpoint)
    }

    /// Checks that the ports can be published on this host, and that no other endpoint has them.
    fn check_published(&self, claims: &Claims, publish: &[PublishedPort]) -> Result<(), EndpointError> {
        for wanted in publish {
            let subnet = self.network()?.subnet;
            if let Some(family) = wanted.family().filter(|family| subnet.get(*family).is_none()) {
                if wanted.is_wildcard() {
                    continue;
                }
                return Err(EndpointError::PublishFamily { wanted: *wanted, family, subnet });
            }
            claims.check_published(wanted)?;
        }
        Ok(())
    }

    /// Allocates addresses, MAC and host interface of an endpoint on the bridge.
    fn reserve_port(
        &mut self,
        claims: &Claims,
        name: &EndpointName,
        netns: &NetnsRef,
        interface: String,
        requested: &PerFamily<IpAddr>,
        mac: Option<Mac>,
    ) -> Result<Port, EndpointError> {
        let subnet = self.network()?.subnet;
        for (family, address) in requested.iter() {
            let pool = self.pools.get(family).ok_or(EndpointError::FamilyNotAvailable { address: *address, family, subnet })?;
            if let Some(holder) = self.records.values().find(|r| r.endpoint.addresses().get(family) == Some(address)) {
                return Err(EndpointError::AddressInUse { address: *address, holder: EndpointId::of(&holder.endpoint) });
            }
            pool.check(*address)?;
        }
        let find_by_mac = |mac: Mac| self.records.values().find(|r| r.endpoint.port.as_ref().is_some_and(|port| port.mac == mac));
        if let Some((mac, holder)) = mac.and_then(|mac| Some((mac, find_by_mac(mac)?))) {
            return Err(EndpointError::MacInUse { mac, holder: EndpointId::of(&holder.endpoint) });
        }
        claims.check_netns_free(netns, |mode| *mode == Mode::None)?;
        claims.check_interface_free(netns, &interface)?;
        if self.records.values().filter(|r| r.endpoint.port.is_some()).count() >= MAX_BRIDGE_PORTS {
            return Err(EndpointError::BridgeFull);
        }
        let addresses = self.allocate(requested)?;
        let ports = || self.records.values().filter_map(|r| r.endpoint.port.as_ref());
        let mut attempt = 0;
        let mut host_end = veth_name(&self.name, name, attempt);
        while claims.has_host_interface(&host_end) {
            attempt += 1;
            host_end = veth_name(&self.name, name, attempt);
        }
        let mac = mac.unwrap_or_else(|| free_mac(|mac| ports().any(|port| port.mac == mac)));
        Ok(Port { interface, host_interface: host_end, mac, addresses })
    }

    /// Allocates one address in each family of the subnet; the requested ones have been checked.
    fn allocate(&mut self, requested: &PerFamily<IpAddr>) -> Result<PerFamily<IpAddr>, EndpointError> {
        let mut allocated = PerFamily::default();
        let families: Vec<Family> = self.pools.families().collect();
        for family in families {
            let Some(pool) = self.pools.slot(family) else { continue };
            let address = match requested.get(family) {
                Some(address) => pool.reserve(*address).map(|()| *address),
                None => pool.allocate(),
            };
            match address {
                Ok(address) => *allocated.slot(family) = Some(address),
                Err(error) => {
                    self.release(&allocated);
                    return Err(error.into());
                }
            }
        }
        Ok(allocated)
    }

    fn release(&mut self, addresses: &PerFamily<IpAddr>) {
        for (family, address) in addresses.iter() {
            if let Some(pool) = self.pools.slot(family) {
                pool.release(*address);
            }
        }
    }

    /// Marks an endpoint as attached. Returns whether it still exists.
    pub(super) fn mark_attached(&mut self, name: &EndpointName) -> bool {
        let Some(record) = self.records.get_mut(name) else { return false };
        if record.phase != Phase::Attached {
            record.phase = Phase::Attached;
            self.mark_changed(name);
        }
        true
    }

    /// Marks an endpoint as detaching, and removes endpoints that share its namespace, which have no entries in the kernel.
    /// Returns the previous phase; `None` if the endpoint does not exist.
    pub(super) fn begin_detach(&mut self, name: &EndpointName) -> Option<Phase> {
        for sharer in self.sharers(name) {
            self.remove(&sharer);
        }
        let record = self.records.get_mut(name)?;
        let previous_phase = std::mem::replace(&mut record.phase, Phase::Detaching);
        self.mark_changed(name);
        Some(previous_phase)
    }

    /// The endpoints that share an endpoint's namespace.
    pub(super) fn sharers(&self, name: &EndpointName) -> Vec<EndpointName> {
        let shares = |r: &&EndpointRecord| matches!(&r.endpoint.mode, Mode::Container(owner) if owner == name);
        self.records.values().filter(shares).map(|r| r.endpoint.name.clone()).collect()
    }

    /// Sets the namespace id of an endpoint and of those that share its namespace. Returns whether it changed.
    pub(super) fn set_netns_id(&mut self, name: &EndpointName, id: &str) -> bool {
        let version = self.version;
        for name in self.sharers(name).into_iter().chain([name.clone()]) {
            if let Some(record) = self.records.get_mut(&name).filter(|r| r.netns_id.as_deref() != Some(id)) {
                record.netns_id = Some(id.to_owned());
                self.mark_changed(&name);
            }
        }
        self.version != version
    }

    /// Removes an endpoint and releases its addresses and claims.
    pub(super) fn remove(&mut self, name: &EndpointName) {
        if let Some(record) = self.records.remove(name) {
            self.claims.lock().remove(&record.endpoint);
            self.release(&record.endpoint.addresses());
            self.mark_changed(name);
        }
    }

    /// Updates the path of the host's namespace in endpoints of mode host, and in those that share with them.
    pub(super) fn set_host_netns(&mut self, path: &std::path::Path) {
        let of_host: Vec<EndpointName> = {
            let hosts = self.records.values().filter(|r| r.endpoint.mode == Mode::Host).map(|r| &r.endpoint.name);
            hosts.flat_map(|name| self.sharers(name).into_iter().chain([name.clone()])).collect()
        };
        for name in of_host {
            if let Some(record) = self.records.get_mut(&name).filter(|r| r.endpoint.netns != path) {
                Arc::make_mut(&mut record.endpoint).netns = path.to_owned();
                self.mark_changed(&name);
            }
        }
    }

    /// The port specification of an endpoint, if it has a port on the bridge, and the response to its attach.
    pub(super) fn port_spec(&self, endpoint: &Endpoint) -> Result<(Option<PortSpec>, AttachResponse), EndpointError> {
        let mut attached = AttachResponse {
            endpoint: endpoint.clone(),
            prefix_length: PerFamily::default(),
            gateway: PerFamily::default(),
            routes: PerFamily::default(),
            mtu: None,
        };
        let Some(port) = endpoint.port.as_ref() else { return Ok((None, attached)) };
        let network = self.network()?;
        attached.mtu = Some(network.mtu);
        let mut spec = PortSpec {
            netns: endpoint.netns.clone(),
            interface: port.interface.clone(),
            host_interface: port.host_interface.clone(),
            bridge: network.bridge,
            mac: port.mac,
            mtu: network.mtu,
            addresses: Vec::new(),
            routes: Vec::new(),
            sources: source_elements(port, endpoint.source_check).collect(),
        };
        for (family, address) in port.addresses.iter() {
            let stale = || EndpointError::Stale { name: EndpointId::of(endpoint), address: *address, subnet: network.subnet };
            let range = network.subnet.get(family).filter(|range| range.contains(*address)).ok_or_else(stale)?;
            let gateway = network.subnet.gateway(family).ok_or_else(stale)?;
            spec.addresses.push(IpNetwork::new(*address, range.length()).map_err(|_| stale())?);
            // If this host's subnet is the whole network, the address's prefix route covers it.
            let overlay = network.networks.get(family).copied().filter(|network| *network != range);
            let destination = if endpoint.default_route { Some(Cidr::all(family)) } else { overlay };
            spec.routes.extend(destination.map(|destination| (destination, gateway)));
            *attached.routes.slot(family) = destination;
            *attached.prefix_length.slot(family) = Some(range.length());
            *attached.gateway.slot(family) = Some(gateway);
        }
        Ok((Some(spec), attached))
    }
}

impl Drop for EndpointTable {
    fn drop(&mut self) {
        let mut claims = self.claims.lock();
        self.records.values().for_each(|record| claims.remove(&record.endpoint));
    }
}

/// Formats published ports for a message.
fn format_ports(published: &[PublishedPort]) -> String {
    if published.is_empty() {
        return "none".to_owned();
    }
    published.iter().map(PublishedPort::to_string).collect::<Vec<_>>().join(", ")
}

fn address_outside(endpoint: &Endpoint, subnet: &Subnet) -> Option<IpAddr> {
    let is_outside = |(family, address): &(Family, &IpAddr)| !subnet.get(*family).is_some_and(|range| range.contains(**address));
    endpoint.addresses().iter().find(is_outside).map(|(_, address)| *address)
}
