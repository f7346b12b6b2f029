//! The steps of an attach and a detach. Each runs as a task that holds the name, so that no two work on one endpoint.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::request::{Place, Wish, host_interface};
use super::table::{Phase, Record};
use super::{Class, EndpointError, Inner, PROGRAMMED_WAIT, lock};
use crate::model::api::Attached;
use crate::model::endpoint::EndpointName;
use crate::model::{Endpoint, Mode, Port, Publish};
use crate::plan::{ContainerPath, Guard, HostSocket, OpError, Plug};
use crate::state::StateError;

impl<C: ContainerPath + 'static> Inner<C> {
    pub(super) async fn attach(self: Arc<Self>, name: EndpointName, wish: Wish) -> Result<Attached, EndpointError> {
        let wish = self.locate(wish)?;
        let held = lock(&self.table).get(&name).cloned();
        if let Some(record) = held {
            if record.phase == Phase::Attached {
                let fits = lock(&self.table).matches(&record.endpoint, &wish);
                match fits {
                    Ok(()) if self.is_alive(&record) => return self.plug_again(&record.endpoint).await,
                    Err(error) if error.class() != Class::Conflict || self.holds(&record) => return Err(error),
                    Ok(()) | Err(_) => {
                        tracing::info!(endpoint = %name, netns = %record.endpoint.netns.display(), "its namespace is gone; attaching it anew");
                    }
                }
            }
            self.take_down(&name).await?;
        }
        self.check_host_ports(&wish).await?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let (endpoint, plug, attached) = {
            let mut table = lock(&self.table);
            let endpoint = table.reserve(name.clone(), wish, now)?;
            match table.plug(&endpoint) {
                Ok((plug, attached)) => (endpoint, plug, attached),
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
        let made = match (&plug, &endpoint.mode) {
            (Some(plug), _) => self.plug_anew(plug).await,
            (None, Mode::None) => self.path.loopback(&endpoint.netns).await.map(|()| Guard::Told),
            (None, _) => Ok(Guard::Told),
        };
        let guard = match made {
            Ok(guard) => guard,
            Err(source) => {
                self.unwind(&name).await;
                return Err(EndpointError::Kernel { name, source });
            }
        };
        // One that shares was gone already if its owner was detached meanwhile.
        if !lock(&self.table).complete(&name) {
            let target = if let Mode::Container(target) = endpoint.mode { target } else { name.clone() };
            return Err(EndpointError::TargetLeft { name, target });
        }
        // Written down before it is announced: an endpoint that would be removed at the next start is no endpoint.
        if let Err(source) = self.persist() {
            self.unwind(&name).await;
            return Err(EndpointError::State { name, source });
        }
        self.note_present(&name);
        self.publish();
        self.programmed(&endpoint, guard).await;
        for published in endpoint.published.iter().filter(|p| !endpoint.is_reached_by(p)) {
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
        let force = force || lock(&self.table).get(&name).cloned().is_some_and(|record| !self.holds(&record));
        let begun = {
            let mut table = lock(&self.table);
            let sharers = table.sharers(&name);
            if !sharers.is_empty() && !force {
                return Err(EndpointError::Shared { name, sharers });
            }
            // From here on nobody can begin to share it.
            table.begin_detach(&name).map(|was| (was, sharers))
        };
        let Some((was, sharers)) = begun else {
            // What an agent left in the kernel whose state was lost has the name's interface.
            let left = host_interface(&name, 0);
            let has_left = |r: &Record| r.endpoint.port.as_ref().is_some_and(|port| port.host_interface == left);
            if !lock(&self.table).records().any(has_left) {
                let kernel = |source| EndpointError::Kernel { name: name.clone(), source };
                self.path.unplug(&left).await.map_err(kernel)?;
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
    pub(super) async fn release_gone(self: Arc<Self>, name: EndpointName) -> Result<bool, EndpointError> {
        let held = lock(&self.table).get(&name).cloned();
        let Some(record) = held else { return Ok(false) };
        if self.holds(&record) {
            return Ok(false);
        }
        self.take_down(&name).await?;
        tracing::info!(endpoint = %name, netns = %record.endpoint.netns.display(), "detached: its namespace is gone");
        Ok(true)
    }

    /// Removes what is left of an endpoint that is neither attached nor gone.
    pub(super) async fn clear(self: Arc<Self>, name: EndpointName) -> Result<(), EndpointError> {
        let unfinished = lock(&self.table).get(&name).is_some_and(|r| r.phase != Phase::Attached);
        if unfinished { self.take_down(&name).await } else { Ok(()) }
    }

    /// Plugs an attached endpoint again where its namespace and subnet are there.
    pub(super) async fn replug(self: Arc<Self>, name: EndpointName) -> Result<(), EndpointError> {
        let held = lock(&self.table).get(&name).filter(|r| r.phase == Phase::Attached && r.endpoint.port.is_some()).cloned();
        let Some(record) = held else { return Ok(()) };
        if self.is_alive(&record) {
            return self.plug_again(&record.endpoint).await.map(|_| ());
        }
        lock(&self.missing).insert(name);
        self.publish();
        Ok(())
    }

    /// Whether an endpoint has a namespace to be in. A path below `/proc` stays while the process behind it can be another one, and a runtime
    /// attaches each namespace that it makes: there it has to be the one that was attached. Any other path that a person gave says itself which
    /// namespace is meant, also after a reboot. Blocks for as long as it takes to open a file.
    pub(super) fn is_alive(&self, record: &Record) -> bool {
        let netns = &record.endpoint.netns;
        let only_that_one = netns.starts_with("/proc") || record.endpoint.owner.is_some();
        if only_that_one { self.is_in_its_netns(record) } else { self.path.netns_alive(netns) }
    }

    /// Whether an endpoint keeps others from what it has: it is attached, and its namespace is the one that was attached. Another one that was
    /// made at the same path since is no reason to refuse anybody. Blocks as [`Inner::is_alive`] does.
    pub(super) fn holds(&self, record: &Record) -> bool {
        record.phase == Phase::Attached && self.is_in_its_netns(record)
    }

    fn is_in_its_netns(&self, record: &Record) -> bool {
        if record.endpoint.mode == Mode::Host {
            return true;
        }
        let netns = &record.endpoint.netns;
        self.path.netns_alive(netns) && record.netns_id.as_ref().is_none_or(|id| self.path.netns_id(netns).as_ref() == Some(id))
    }

    /// Notes that an endpoint's namespace is there.
    fn note_present(&self, name: &EndpointName) {
        lock(&self.missing).remove(name);
        lock(&self.gone_before).remove(name);
    }

    /// The namespace's path without links, and whether there is a namespace that can be a container's.
    fn locate(&self, mut wish: Wish) -> Result<Wish, EndpointError> {
        if let Place::Host(path) = &mut wish.place {
            *path = self.path.own_netns();
        }
        if let Place::Container(target) = &wish.place {
            let target = lock(&self.table).get(target).cloned();
            if let Some(record) = target.filter(|record| !self.is_alive(record)) {
                return Err(EndpointError::NetnsGone { netns: record.endpoint.netns.clone() });
            }
        }
        let Some(site) = wish.site_mut() else { return Ok(wish) };
        site.resolve(|path| self.path.netns_id(path));
        let netns = || site.netns.clone();
        if !self.path.netns_alive(&site.netns) {
            return Err(EndpointError::NetnsGone { netns: netns() });
        }
        if self.path.is_own_netns(&site.netns) {
            return Err(EndpointError::OwnNetns { netns: netns() });
        }
        Ok(wish)
    }

    /// The host has the addresses of the ports that are to be published, and nothing of its own waits there.
    async fn check_host_ports(self: &Arc<Self>, wish: &Wish) -> Result<(), EndpointError> {
        // A wildcard of a family that containers have not takes nothing from the host's sockets.
        let subnet = lock(&self.table).network().map(|network| network.subnet).ok();
        let in_effect = |publish: &&Publish| {
            !publish.is_wildcard() || publish.has_effect(|family| subnet.is_none_or(|subnet| subnet.get(family).is_some()))
        };
        let publish: Vec<Publish> = wish.publish.iter().filter(in_effect).copied().collect();
        if publish.is_empty() {
            return Ok(());
        }
        let inner = Arc::clone(self);
        let looked = tokio::task::spawn_blocking(move || inner.path.host_ports(&publish));
        let host = match looked.await {
            Ok(Ok(host)) => host,
            // What cannot be seen does not stand in the way.
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot look for what holds the ports on this host");
                return Ok(());
            }
            Err(_) => return Err(EndpointError::Ending),
        };
        for wanted in &wish.publish {
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

    async fn plug_again(&self, endpoint: &Endpoint) -> Result<Attached, EndpointError> {
        let (plug, attached) = lock(&self.table).plug(endpoint)?;
        let kernel = |source| EndpointError::Kernel { name: endpoint.name.clone(), source };
        let guard = match plug {
            Some(plug) => self.path.plug(&plug).await.map_err(kernel)?,
            None => Guard::Told,
        };
        // The path may lead to another namespace than at the attach.
        if let Some(id) = self.path.netns_id(&endpoint.netns)
            && lock(&self.table).set_netns_id(&endpoint.name, &id)
        {
            self.persist().map_err(|source| EndpointError::State { name: endpoint.name.clone(), source })?;
        }
        self.note_present(&endpoint.name);
        self.publish();
        self.programmed(endpoint, guard).await;
        Ok(attached)
    }

    /// Waits until rules and published ports of an endpoint are in place: whoever is told that it is attached may send at once.
    async fn programmed(&self, endpoint: &Endpoint, guard: Guard) {
        let Some(programmed) = lock(&self.programmed).as_ref().map(watch::Sender::subscribe) else { return };
        if guard == Guard::Told && endpoint.published.is_empty() {
            return;
        }
        let mut programmed = programmed;
        let seen = programmed.wait_for(|all| {
            all.binary_search_by(|e| e.name.cmp(&endpoint.name)).is_ok_and(|at| all.get(at).is_some_and(|e| **e == *endpoint))
        });
        if tokio::time::timeout(PROGRAMMED_WAIT, seen).await.is_err() {
            tracing::warn!(endpoint = %endpoint.name, "attached, but its rules are not in place yet");
        }
    }

    /// Plugs a new endpoint. An interface of that name can only be what an agent left behind whose state was lost.
    async fn plug_anew(&self, plug: &Plug) -> Result<Guard, OpError> {
        self.path.unplug(&plug.host_interface).await?;
        self.path.plug(plug).await
    }

    /// Takes a failed attach back. What cannot be taken back now is left to the audit.
    async fn unwind(&self, name: &EndpointName) {
        if let Err(error) = self.take_down(name).await {
            tracing::warn!(endpoint = %name, %error, "a failed attach could not be undone; it is tried again");
        }
    }

    /// Removes an endpoint and those who share its namespace, however far it is.
    async fn take_down(&self, name: &EndpointName) -> Result<(), EndpointError> {
        let was = lock(&self.table).begin_detach(name);
        match was {
            Some(was) => self.finish_detach(name, was).await,
            None => Ok(()),
        }
    }

    /// Removes an endpoint that is marked: unplugged first, then forgotten. `was` is how far it was before.
    async fn finish_detach(&self, name: &EndpointName, was: Phase) -> Result<(), EndpointError> {
        let port = lock(&self.table).get(name).and_then(|r| r.endpoint.port.clone());
        self.publish();
        if let Some(Port { host_interface, addresses, .. }) = port {
            if was == Phase::Attached
                && let Err(error) = self.persist()
            {
                // A full disk must not keep a container on the network; the last step below reports it.
                tracing::warn!(endpoint = %name, %error, "detaching without having written it down first");
            }
            let kernel = |source| EndpointError::Kernel { name: name.clone(), source };
            self.path.unplug(&host_interface).await.map_err(kernel)?;
            self.path.forget(&addresses);
        }
        lock(&self.table).remove(name);
        self.persist().map_err(|source| EndpointError::State { name: name.clone(), source })
    }

    /// Tells what is plugged now.
    pub(super) fn publish(&self) {
        let table = lock(&self.table);
        let plugged = table.plugged(&lock(&self.missing));
        self.plugged.send_if_modified(|current| {
            let changed = *current != plugged;
            *current = plugged;
            changed
        });
    }

    /// Writes the table down.
    pub(super) fn persist(&self) -> Result<(), StateError> {
        let wanted = lock(&self.table).version;
        lock(&self.book).write(&self.table, wanted)
    }
}
