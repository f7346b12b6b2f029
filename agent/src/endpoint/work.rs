//! The steps of an attach and a detach. Each runs as a task that holds the name, so that no two work on one endpoint.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::spec::{AttachMode, AttachSpec, veth_name};
use super::table::{EndpointRecord, Phase};
use super::{APPLY_TIMEOUT, EndpointError, ErrorClass, Inner, lock};
use crate::model::api::AttachResponse;
use crate::model::endpoint::EndpointName;
use crate::model::{Endpoint, Mode, Port, PublishedPort};
use crate::plan::{HostSocket, OpError, PortDriver, PortSpec, SourceFilter};
use crate::state::StateError;

impl<C: PortDriver + 'static> Inner<C> {
    pub(super) async fn attach(self: Arc<Self>, name: EndpointName, spec: AttachSpec) -> Result<AttachResponse, EndpointError> {
        let spec = self.resolve_netns(spec)?;
        let existing = lock(&self.table).get(&name).cloned();
        if let Some(record) = existing {
            if record.phase == Phase::Attached {
                let fits = lock(&self.table).matches(&record.endpoint, &spec);
                match fits {
                    Ok(()) if self.is_alive(&record) => return self.reattach_port(&record.endpoint).await,
                    Err(error) if error.class() != ErrorClass::Conflict || self.holds_resources(&record) => return Err(error),
                    Ok(()) | Err(_) => {
                        tracing::info!(endpoint = %name, netns = %record.endpoint.netns.display(), "its namespace is gone; attaching it anew");
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
            Ok(guard) => guard,
            Err(source) => {
                self.rollback(&name).await;
                return Err(EndpointError::Kernel { name, source });
            }
        };
        // One that shares was gone already if its owner was detached meanwhile.
        if !lock(&self.table).mark_attached(&name) {
            let target = if let Mode::Container(target) = endpoint.mode { target } else { name.clone() };
            return Err(EndpointError::TargetDetached { name, target });
        }
        // Written down before it is announced: an endpoint that would be removed at the next start is no endpoint.
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
            endpoint = %name, mode = %endpoint.mode, netns = %endpoint.netns.display(),
            interface = endpoint.port.as_ref().map(|port| &port.interface),
            host_interface = endpoint.port.as_ref().map(|port| &port.host_interface),
            addresses = %endpoint.addresses(), "attached"
        );
        Ok(attached)
    }

    /// Detaches an endpoint, and where `force` is given or the namespace is gone those who share it; who they were.
    pub(super) async fn detach(
        self: Arc<Self>,
        name: EndpointName,
        force: bool,
    ) -> Result<Option<Vec<EndpointName>>, EndpointError> {
        let force = force || lock(&self.table).get(&name).cloned().is_some_and(|record| !self.holds_resources(&record));
        let begun = {
            let mut table = lock(&self.table);
            let sharers = table.sharers(&name);
            if !sharers.is_empty() && !force {
                return Err(EndpointError::NetnsShared { name, sharers });
            }
            // From here on nobody can begin to share it.
            table.begin_detach(&name).map(|was| (was, sharers))
        };
        let Some((was, sharers)) = begun else {
            // What an agent left in the kernel whose state was lost has the name's interface.
            let leftover = veth_name(&name, 0);
            let uses_leftover = |r: &EndpointRecord| r.endpoint.port.as_ref().is_some_and(|port| port.host_interface == leftover);
            if !lock(&self.table).records().any(uses_leftover) {
                let kernel = |source| EndpointError::Kernel { name: name.clone(), source };
                self.driver.detach_port(&leftover).await.map_err(kernel)?;
            }
            // An earlier detach may have failed at its last step, the writing.
            let written = self.persist();
            return written.map(|()| None).map_err(|source| EndpointError::State { name, source });
        };
        self.finish_detach(&name, was).await?;
        tracing::info!(endpoint = %name, ?sharers, "detached");
        Ok(Some(sharers))
    }

    /// Detaches an endpoint if its namespace is still gone.
    pub(super) async fn release_if_gone(self: Arc<Self>, name: EndpointName) -> Result<bool, EndpointError> {
        let held = lock(&self.table).get(&name).cloned();
        let Some(record) = held else { return Ok(false) };
        if self.holds_resources(&record) {
            return Ok(false);
        }
        self.teardown(&name).await?;
        tracing::info!(endpoint = %name, netns = %record.endpoint.netns.display(), "detached: its namespace is gone");
        Ok(true)
    }

    /// Removes what is left of an endpoint that is neither attached nor gone.
    pub(super) async fn remove_partial(self: Arc<Self>, name: EndpointName) -> Result<(), EndpointError> {
        let unfinished = lock(&self.table).get(&name).is_some_and(|r| r.phase != Phase::Attached);
        if unfinished { self.teardown(&name).await } else { Ok(()) }
    }

    /// Plugs an attached endpoint again where its namespace and subnet are there.
    pub(super) async fn reattach(self: Arc<Self>, name: EndpointName) -> Result<(), EndpointError> {
        let held = lock(&self.table).get(&name).filter(|r| r.phase == Phase::Attached && r.endpoint.port.is_some()).cloned();
        let Some(record) = held else { return Ok(()) };
        if self.is_alive(&record) {
            return self.reattach_port(&record.endpoint).await.map(|_| ());
        }
        lock(&self.missing).insert(name);
        self.broadcast_ports();
        Ok(())
    }

    /// Whether an endpoint has a namespace to be in. A path below `/proc` stays while the process behind it can be another one, and a runtime
    /// attaches each namespace that it makes: there it has to be the one that was attached. Any other path that a person gave says itself which
    /// namespace is meant, also after a reboot. Blocks for as long as it takes to open a file.
    pub(super) fn is_alive(&self, record: &EndpointRecord) -> bool {
        let netns = &record.endpoint.netns;
        let must_match_id = netns.starts_with("/proc") || record.endpoint.owner.is_some();
        if must_match_id { self.netns_matches(record) } else { self.driver.netns_exists(netns) }
    }

    /// Whether an endpoint keeps others from what it has: it is attached, and its namespace is the one that was attached. Another one that was
    /// made at the same path since is no reason to refuse anybody. Blocks as [`Inner::is_alive`] does.
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

    /// Notes that an endpoint's namespace is there.
    fn mark_present(&self, name: &EndpointName) {
        lock(&self.missing).remove(name);
        lock(&self.missing_before).remove(name);
    }

    /// The namespace's path without links, and whether there is a namespace that can be a container's.
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

    /// The host has the addresses of the ports that are to be published, and nothing of its own waits there.
    async fn check_host_ports(self: &Arc<Self>, spec: &AttachSpec) -> Result<(), EndpointError> {
        // A wildcard of a family that containers have not takes nothing from the host's sockets.
        let subnet = lock(&self.table).network().map(|network| network.subnet).ok();
        let in_effect = |publish: &&PublishedPort| {
            !publish.is_wildcard() || publish.has_effect(|family| subnet.is_none_or(|subnet| subnet.get(family).is_some()))
        };
        let publish: Vec<PublishedPort> = spec.publish.iter().filter(in_effect).copied().collect();
        if publish.is_empty() {
            return Ok(());
        }
        let inner = Arc::clone(self);
        let looked = tokio::task::spawn_blocking(move || inner.driver.host_ports(&publish));
        let host = match looked.await {
            Ok(Ok(host)) => host,
            // What cannot be seen does not stand in the way.
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot look for what holds the ports on this host");
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
        // The path may lead to another namespace than at the attach.
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

    /// Waits until rules and published ports of an endpoint are in place: whoever is told that it is attached may send at once.
    async fn wait_applied(&self, endpoint: &Endpoint, source_filter: SourceFilter) {
        let Some(applied) = lock(&self.applied_endpoints).as_ref().map(watch::Sender::subscribe) else { return };
        if source_filter == SourceFilter::Applied && endpoint.published.is_empty() {
            return;
        }
        let mut applied = applied;
        let seen = applied.wait_for(|all| {
            all.binary_search_by(|e| e.name.cmp(&endpoint.name)).is_ok_and(|at| all.get(at).is_some_and(|e| **e == *endpoint))
        });
        if tokio::time::timeout(APPLY_TIMEOUT, seen).await.is_err() {
            tracing::warn!(endpoint = %endpoint.name, "attached, but its rules are not in place yet");
        }
    }

    /// Plugs a new endpoint. An interface of that name can only be what an agent left behind whose state was lost.
    async fn attach_new_port(&self, spec: &PortSpec) -> Result<SourceFilter, OpError> {
        self.driver.detach_port(&spec.host_interface).await?;
        self.driver.attach_port(spec).await
    }

    /// Takes a failed attach back. What cannot be taken back now is left to the audit.
    async fn rollback(&self, name: &EndpointName) {
        if let Err(error) = self.teardown(name).await {
            tracing::warn!(endpoint = %name, %error, "a failed attach could not be undone; it is tried again");
        }
    }

    /// Removes an endpoint and those who share its namespace, however far it is.
    async fn teardown(&self, name: &EndpointName) -> Result<(), EndpointError> {
        let was = lock(&self.table).begin_detach(name);
        match was {
            Some(was) => self.finish_detach(name, was).await,
            None => Ok(()),
        }
    }

    /// Removes an endpoint that is marked: unplugged first, then forgotten. `old_target` is how far it was before.
    async fn finish_detach(&self, name: &EndpointName, was: Phase) -> Result<(), EndpointError> {
        let port = lock(&self.table).get(name).and_then(|r| r.endpoint.port.clone());
        self.broadcast_ports();
        if let Some(Port { host_interface, addresses, .. }) = port {
            if was == Phase::Attached
                && let Err(error) = self.persist()
            {
                // A full disk must not keep a container on the network; the last step below reports it.
                tracing::warn!(endpoint = %name, %error, "detaching without having written it down first");
            }
            let kernel = |source| EndpointError::Kernel { name: name.clone(), source };
            self.driver.detach_port(&host_interface).await.map_err(kernel)?;
            self.driver.flush_connections(&addresses);
        }
        lock(&self.table).remove(name);
        self.persist().map_err(|source| EndpointError::State { name: name.clone(), source })
    }

    /// Tells what is plugged now.
    pub(super) fn broadcast_ports(&self) {
        let table = lock(&self.table);
        let ports = table.ports(&lock(&self.missing));
        self.ports.send_if_modified(|current| {
            let changed = *current != ports;
            *current = ports;
            changed
        });
    }

    /// Writes the table down.
    pub(super) fn persist(&self) -> Result<(), StateError> {
        let wanted = lock(&self.table).version;
        lock(&self.store).write(&self.table, wanted)
    }
}
