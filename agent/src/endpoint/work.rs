//! Steps of attach and detach. Each runs as a task that holds the name's lock, so no two tasks work on one endpoint.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::record::{EndpointRecord, Phase};
use super::spec::{AttachMode, AttachSpec, veth_name};
use super::{APPLY_TIMEOUT, EndpointError, ErrorClass, Inner, lock};
use crate::model::api::AttachResponse;
use crate::model::endpoint::EndpointName;
use crate::model::{Endpoint, Mode, NetworkName, Port, PublishedPort};
use crate::plan::{HostSocket, OpError, PortDriver, PortSpec, SourceFilter};
use crate::state::StateError;

impl<C: PortDriver + 'static> Inner<C> {
    pub(super) async fn attach(self: Arc<Self>, name: EndpointName, spec: AttachSpec) -> Result<AttachResponse, EndpointError> {
        let spec = self.resolve_netns(spec)?;
        let existing = lock(&self.table).get(&name).cloned();
        if let Some(record) = existing {
            if record.phase == Phase::Attached {
                let match_result = lock(&self.table).matches(&record.endpoint, &spec);
                match match_result {
                    Ok(()) if self.is_alive(&record) => return self.reattach_port(&record.endpoint).await,
                    Err(error) if error.class() != ErrorClass::Conflict || self.holds_resources(&record) => return Err(error),
                    Ok(()) | Err(_) => {
                        tracing::info!(endpoint = %name, netns = %record.endpoint.netns.display(), "namespace is gone, recreating endpoint");
                    }
                }
            }
            self.teardown(&name).await?;
        }
        self.check_host_ports(&spec).await?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let (endpoint, port_spec, attached) = {
            let mut table = lock(&self.table);
            let endpoint = table.reserve(name.clone(), spec, now)?;
            match table.port_spec(&endpoint) {
                Ok((port_spec, attached)) => (endpoint, port_spec, attached),
                Err(error) => {
                    table.remove(&name);
                    return Err(error);
                }
            }
        };
        if let Err(source) = self.persist() {
            lock(&self.table).remove(&name);
            return Err(EndpointError::State { name, source });
        }
        let created = match (&port_spec, &endpoint.mode) {
            (Some(spec), _) => self.attach_new_port(spec).await,
            (None, Mode::None) => self.driver.set_loopback_up(&endpoint.netns).await.map(|()| SourceFilter::Applied),
            (None, _) => Ok(SourceFilter::Applied),
        };
        let source_filter = match created {
            Ok(source_filter) => source_filter,
            Err(source) => {
                self.rollback(&name).await;
                return Err(EndpointError::Kernel { name, source });
            }
        };
        // A sharing endpoint was removed already if its namespace's owner was detached meanwhile.
        if !lock(&self.table).mark_attached(&name) {
            let target = if let Mode::Container(target) = endpoint.mode { target } else { name.clone() };
            return Err(EndpointError::TargetDetached { name, target });
        }
        // Persisted before it is published, because the next start would remove an endpoint that is not marked as attached.
        if let Err(source) = self.persist() {
            self.rollback(&name).await;
            return Err(EndpointError::State { name, source });
        }
        self.mark_present(&name);
        self.broadcast_ports();
        self.wait_applied(&endpoint, source_filter).await;
        for published in endpoint.published.iter().filter(|p| !endpoint.has_address_for(p)) {
            tracing::info!(endpoint = %name, %published, "published port has no effect: the container has no address of that family");
        }
        tracing::info!(
            endpoint = %name, network = self.named_network(), mode = %endpoint.mode, netns = %endpoint.netns.display(),
            interface = endpoint.port.as_ref().map(|port| &port.interface),
            host_interface = endpoint.port.as_ref().map(|port| &port.host_interface),
            addresses = %endpoint.addresses(), "attached"
        );
        Ok(attached)
    }

    /// Detaches an endpoint. Endpoints that share its namespace are detached with it if `force` is set or the namespace is gone.
    /// Returns their names.
    pub(super) async fn detach(
        self: Arc<Self>,
        name: EndpointName,
        force: bool,
    ) -> Result<Option<Vec<EndpointName>>, EndpointError> {
        let force = force || lock(&self.table).get(&name).cloned().is_some_and(|record| !self.holds_resources(&record));
        let detaching = {
            let mut table = lock(&self.table);
            let sharers = table.sharers(&name);
            if !sharers.is_empty() && !force {
                return Err(EndpointError::NetnsShared { name, sharers });
            }
            // From here on no other endpoint can start sharing it.
            table.begin_detach(&name).map(|previous_phase| (previous_phase, sharers))
        };
        let Some((previous_phase, sharers)) = detaching else {
            // An agent whose state was lost may have left an interface with the name's hash in the kernel.
            let leftover = veth_name(&self.network, &name, 0);
            if !self.claims.lock().has_host_interface(&leftover) {
                let kernel = |source| EndpointError::Kernel { name: name.clone(), source };
                self.driver.detach_port(&leftover).await.map_err(kernel)?;
            }
            // An earlier detach may have failed at its last step, the write.
            let written = self.persist();
            return written.map(|()| None).map_err(|source| EndpointError::State { name, source });
        };
        self.finish_detach(&name, previous_phase).await?;
        tracing::info!(endpoint = %name, network = self.named_network(), ?sharers, "detached");
        Ok(Some(sharers))
    }

    /// Detaches an endpoint if its namespace is still gone.
    pub(super) async fn release_if_gone(self: Arc<Self>, name: EndpointName) -> Result<bool, EndpointError> {
        let found = lock(&self.table).get(&name).cloned();
        let Some(record) = found else { return Ok(false) };
        if self.holds_resources(&record) {
            return Ok(false);
        }
        self.teardown(&name).await?;
        tracing::info!(
            endpoint = %name, network = self.named_network(), netns = %record.endpoint.netns.display(),
            "detached: its namespace is gone"
        );
        Ok(true)
    }

    /// Removes the remaining parts of an incomplete endpoint.
    pub(super) async fn remove_partial(self: Arc<Self>, name: EndpointName) -> Result<(), EndpointError> {
        let is_incomplete = lock(&self.table).get(&name).is_some_and(|r| r.phase != Phase::Attached);
        if is_incomplete { self.teardown(&name).await } else { Ok(()) }
    }

    /// Restores the port of an attached endpoint if its namespace and its subnet exist.
    pub(super) async fn reattach(self: Arc<Self>, name: EndpointName) -> Result<(), EndpointError> {
        let found = lock(&self.table).get(&name).filter(|r| r.phase == Phase::Attached && r.endpoint.port.is_some()).cloned();
        let Some(record) = found else { return Ok(()) };
        if self.is_alive(&record) {
            return self.reattach_port(&record.endpoint).await.map(|_| ());
        }
        lock(&self.missing).insert(name);
        self.broadcast_ports();
        Ok(())
    }

    /// Whether an endpoint's namespace exists. For a path below `/proc` it has to be the attached namespace, because PIDs are
    /// reused. The same holds for an endpoint with an owner, because a runtime attaches each namespace that it creates. Any other
    /// path, given by a person, identifies the namespace by itself, also after a reboot. Blocks while it opens a file.
    pub(super) fn is_alive(&self, record: &EndpointRecord) -> bool {
        let netns = &record.endpoint.netns;
        let must_match_id = netns.starts_with("/proc") || record.endpoint.owner.is_some();
        if must_match_id { self.netns_matches(record) } else { self.driver.netns_exists(netns) }
    }

    /// Whether an endpoint's addresses, ports and names are in use: it is attached, and its namespace is the attached one. A
    /// newer namespace at the same path does not count. Blocks as [`Inner::is_alive`] does.
    pub(super) fn holds_resources(&self, record: &EndpointRecord) -> bool {
        record.phase == Phase::Attached && self.netns_matches(record)
    }

    fn netns_matches(&self, record: &EndpointRecord) -> bool {
        if record.endpoint.mode == Mode::Host {
            return true;
        }
        let netns = &record.endpoint.netns;
        self.driver.netns_exists(netns)
            && record.netns_id.as_ref().is_none_or(|id| self.driver.netns_id(netns).as_ref() == Some(id))
    }

    /// The network as a field of log lines; none for the default network.
    fn named_network(&self) -> Option<tracing::field::DisplayValue<&NetworkName>> {
        (!self.network.is_default()).then(|| tracing::field::display(&self.network))
    }

    /// Records that an endpoint's namespace exists.
    fn mark_present(&self, name: &EndpointName) {
        lock(&self.missing).remove(name);
        lock(&self.missing_before).remove(name);
    }

    /// Resolves the namespace's path, and checks that a namespace exists there that is not the host's.
    fn resolve_netns(&self, mut spec: AttachSpec) -> Result<AttachSpec, EndpointError> {
        if let AttachMode::Host(path) = &mut spec.mode {
            *path = self.driver.host_netns();
        }
        if let AttachMode::Container(target) = &spec.mode {
            let target = lock(&self.table).get(target).cloned();
            if let Some(record) = target.filter(|record| !self.is_alive(record)) {
                return Err(EndpointError::NetnsNotFound { netns: record.endpoint.netns.clone() });
            }
        }
        let Some(netns_ref) = spec.netns_mut() else { return Ok(spec) };
        netns_ref.resolve(|path| self.driver.netns_id(path));
        let netns = || netns_ref.path.clone();
        if !self.driver.netns_exists(&netns_ref.path) {
            return Err(EndpointError::NetnsNotFound { netns: netns() });
        }
        if self.driver.is_host_netns(&netns_ref.path) {
            return Err(EndpointError::HostNetns { netns: netns() });
        }
        Ok(spec)
    }

    /// Checks that the host has the addresses of the published ports, and that no socket of the host listens on them.
    async fn check_host_ports(self: &Arc<Self>, spec: &AttachSpec) -> Result<(), EndpointError> {
        // A wildcard address of a family without a subnet does not conflict with the host's sockets.
        let subnet = lock(&self.table).network().map(|network| network.subnet).ok();
        let in_effect = |publish: &&PublishedPort| {
            !publish.is_wildcard() || publish.has_effect(|family| subnet.is_none_or(|subnet| subnet.get(family).is_some()))
        };
        let publish: Vec<PublishedPort> = spec.publish.iter().filter(in_effect).copied().collect();
        if publish.is_empty() {
            return Ok(());
        }
        let inner = Arc::clone(self);
        let task = tokio::task::spawn_blocking(move || inner.driver.host_ports(&publish));
        let host = match task.await {
            Ok(Ok(host)) => host,
            // An unreadable socket list must not block the attach.
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot list the host's listening sockets, skipping the check of published ports");
                return Ok(());
            }
            Err(_) => return Err(EndpointError::ShuttingDown),
        };
        for wanted in &spec.publish {
            if let Some(address) = wanted.address
                && !address.is_unspecified()
                && !address.is_loopback()
                && !host.addresses.contains(&address)
            {
                return Err(EndpointError::PublishAddress { wanted: *wanted, address });
            }
        }
        match host.sockets.into_iter().next() {
            Some(HostSocket { wanted, address, port, holder }) => {
                Err(EndpointError::PublishListener { wanted, socket: SocketAddr::new(address, port), holder })
            }
            None => Ok(()),
        }
    }

    async fn reattach_port(&self, endpoint: &Endpoint) -> Result<AttachResponse, EndpointError> {
        let (port_spec, attached) = lock(&self.table).port_spec(endpoint)?;
        let kernel = |source| EndpointError::Kernel { name: endpoint.name.clone(), source };
        let source_filter = match port_spec {
            Some(spec) => self.driver.attach_port(&spec).await.map_err(kernel)?,
            None => SourceFilter::Applied,
        };
        // The path may refer to another namespace than at the attach.
        if let Some(id) = self.driver.netns_id(&endpoint.netns)
            && lock(&self.table).set_netns_id(&endpoint.name, &id)
        {
            self.persist().map_err(|source| EndpointError::State { name: endpoint.name.clone(), source })?;
        }
        self.mark_present(&endpoint.name);
        self.broadcast_ports();
        self.wait_applied(endpoint, source_filter).await;
        Ok(attached)
    }

    /// Waits until an endpoint's rules and published ports are applied, because the client may send packets right after the
    /// response.
    async fn wait_applied(&self, endpoint: &Endpoint, source_filter: SourceFilter) {
        let Some(applied) = lock(&self.applied_endpoints).as_ref().map(watch::Sender::subscribe) else { return };
        if source_filter == SourceFilter::Applied && endpoint.published.is_empty() {
            return;
        }
        let mut applied = applied;
        let wait = applied.wait_for(|endpoints| {
            endpoints
                .binary_search_by(|e| e.name.cmp(&endpoint.name))
                .is_ok_and(|index| endpoints.get(index).is_some_and(|e| **e == *endpoint))
        });
        if tokio::time::timeout(APPLY_TIMEOUT, wait).await.is_err() {
            tracing::warn!(endpoint = %endpoint.name, "endpoint attached, but its rules are not applied yet");
        }
    }

    /// Creates the port of a new endpoint. An existing interface of that name can only be a leftover of an agent whose state was
    /// lost.
    async fn attach_new_port(&self, spec: &PortSpec) -> Result<SourceFilter, OpError> {
        self.driver.detach_port(&spec.host_interface).await?;
        self.driver.attach_port(spec).await
    }

    /// Rolls a failed attach back. The audit retries a failed rollback.
    async fn rollback(&self, name: &EndpointName) {
        if let Err(error) = self.teardown(name).await {
            tracing::warn!(endpoint = %name, %error, "rollback of a failed attach failed, retrying at the next audit");
        }
    }

    /// Removes an endpoint in any phase, and the endpoints that share its namespace.
    async fn teardown(&self, name: &EndpointName) -> Result<(), EndpointError> {
        let previous_phase = lock(&self.table).begin_detach(name);
        match previous_phase {
            Some(previous_phase) => self.finish_detach(name, previous_phase).await,
            None => Ok(()),
        }
    }

    /// Removes an endpoint that is marked as detaching: first its port, then its record.
    async fn finish_detach(&self, name: &EndpointName, previous_phase: Phase) -> Result<(), EndpointError> {
        let port = lock(&self.table).get(name).and_then(|r| r.endpoint.port.clone());
        self.broadcast_ports();
        if let Some(Port { host_interface, addresses, .. }) = port {
            if previous_phase == Phase::Attached
                && let Err(error) = self.persist()
            {
                // A full disk must not prevent a detach; the last step below reports the error.
                tracing::warn!(endpoint = %name, %error, "cannot persist the detach, detaching anyway");
            }
            let kernel = |source| EndpointError::Kernel { name: name.clone(), source };
            self.driver.detach_port(&host_interface).await.map_err(kernel)?;
            self.driver.flush_connections(&addresses);
        }
        lock(&self.table).remove(name);
        self.persist().map_err(|source| EndpointError::State { name: name.clone(), source })
    }

    /// Publishes the present ports.
    pub(super) fn broadcast_ports(&self) {
        let table = lock(&self.table);
        let ports = table.ports(&lock(&self.missing));
        self.ports.send_if_modified(|current| {
            let changed = *current != ports;
            *current = ports;
            changed
        });
    }

    /// Persists the table.
    pub(super) fn persist(&self) -> Result<(), StateError> {
        let wanted = lock(&self.table).version;
        lock(&self.store).write(&self.table, wanted)
    }
}
