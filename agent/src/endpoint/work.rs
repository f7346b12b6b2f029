//! The steps of an attach and a detach. Each runs as a task that holds the name, so that no two work on one endpoint.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::request::Wish;
use super::table::Phase;
use super::{EndpointError, FILE, Inner, lock};
use crate::model::Endpoint;
use crate::model::api::Attached;
use crate::model::endpoint::EndpointName;
use crate::plan::{ContainerPath, OpError, Plug};
use crate::state::{FileError, StateDir, StateError};

/// File work that did not come to its end, because the runtime is ending.
pub(super) fn interrupted(state: &StateDir, error: tokio::task::JoinError) -> StateError {
    FileError::new("finish the work on", &state.path().join(FILE), std::io::Error::other(error)).into()
}

impl<C: ContainerPath + 'static> Inner<C> {
    pub(super) async fn attach(self: Arc<Self>, name: EndpointName, wish: Wish) -> Result<Attached, EndpointError> {
        let wish = self.locate(wish).await?;
        let held = lock(&self.table).get(&name).cloned();
        if let Some(record) = held {
            if record.phase == Phase::Attached {
                let fits = lock(&self.table).matches(&record.endpoint, &wish);
                match fits {
                    Ok(()) => return self.plug_again(&record.endpoint).await,
                    Err(EndpointError::NameHeld { .. }) if !self.path.netns_alive(&record.endpoint.netns) => {
                        tracing::info!(endpoint = %name, netns = %record.endpoint.netns.display(), "its namespace is gone; attaching it anew");
                    }
                    Err(error) => return Err(error),
                }
            }
            self.take_down(&name).await?;
        }
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
        if let Err(source) = self.persist().await {
            lock(&self.table).remove(&name);
            return Err(EndpointError::State { name, source });
        }
        if let Err(source) = self.plug_anew(&plug).await {
            self.unwind(&name).await;
            return Err(EndpointError::Kernel { name, source });
        }
        lock(&self.table).set_phase(&name, Phase::Attached);
        // Written down before it is announced: an endpoint that would be removed at the next start is no endpoint.
        if let Err(source) = self.persist().await {
            self.unwind(&name).await;
            return Err(EndpointError::State { name, source });
        }
        self.publish();
        tracing::info!(
            endpoint = %name, mode = %endpoint.mode, netns = %endpoint.netns.display(), interface = plug.interface,
            host_interface = plug.host_interface, addresses = ?endpoint.addresses(), "attached"
        );
        Ok(attached)
    }

    pub(super) async fn detach(self: Arc<Self>, name: EndpointName) -> Result<Option<EndpointName>, EndpointError> {
        if lock(&self.table).get(&name).is_none() {
            // An earlier detach may have failed at its last step, the writing.
            let written = self.persist().await;
            return written.map(|()| None).map_err(|source| EndpointError::State { name, source });
        }
        self.take_down(&name).await?;
        tracing::info!(endpoint = %name, "detached");
        Ok(Some(name))
    }

    /// Detaches an endpoint if its namespace is still gone.
    pub(super) async fn release_gone(self: Arc<Self>, name: EndpointName) -> Result<bool, EndpointError> {
        let held = lock(&self.table).get(&name).cloned();
        let Some(record) = held.filter(|r| !self.path.netns_alive(&r.endpoint.netns)) else { return Ok(false) };
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
        let held = lock(&self.table).get(&name).filter(|r| r.phase == Phase::Attached).cloned();
        match held {
            Some(record) if self.path.netns_alive(&record.endpoint.netns) => self.plug_again(&record.endpoint).await.map(|_| ()),
            Some(_) => {
                lock(&self.missing).insert(name);
                self.publish();
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// The namespace's path without links, and whether there is a namespace.
    async fn locate(self: &Arc<Self>, mut wish: Wish) -> Result<Wish, EndpointError> {
        let inner = Arc::clone(self);
        let looked = tokio::task::spawn_blocking(move || {
            wish.resolve();
            let alive = inner.path.netns_alive(&wish.netns);
            (wish, alive)
        });
        match looked.await {
            Ok((wish, true)) => Ok(wish),
            Ok((wish, false)) => Err(EndpointError::NetnsGone { netns: wish.netns }),
            // Only while the runtime ends.
            Err(_) => Err(EndpointError::Ending),
        }
    }

    async fn plug_again(&self, endpoint: &Endpoint) -> Result<Attached, EndpointError> {
        let (plug, attached) = lock(&self.table).plug(endpoint)?;
        let kernel = |source| EndpointError::Kernel { name: endpoint.name.clone(), source };
        self.path.plug(&plug).await.map_err(kernel)?;
        lock(&self.missing).remove(&endpoint.name);
        self.publish();
        Ok(attached)
    }

    /// Plugs a new endpoint. An interface of that name can only be what an agent left behind whose state was lost.
    async fn plug_anew(&self, plug: &Plug) -> Result<(), OpError> {
        self.path.unplug(&plug.host_interface).await?;
        self.path.plug(plug).await
    }

    /// Takes a failed attach back. What cannot be taken back now is left to the audit.
    async fn unwind(&self, name: &EndpointName) {
        if let Err(error) = self.take_down(name).await {
            tracing::warn!(endpoint = %name, %error, "a failed attach could not be undone; it is tried again");
        }
    }

    /// Removes an endpoint, however far it is: marked first, then unplugged, then forgotten.
    async fn take_down(&self, name: &EndpointName) -> Result<(), EndpointError> {
        let (was, host_interface) = {
            let mut table = lock(&self.table);
            let Some(record) = table.get(name) else { return Ok(()) };
            let before = (record.phase, record.endpoint.port.as_ref().map(|port| port.host_interface.clone()));
            table.set_phase(name, Phase::Detaching);
            before
        };
        self.publish();
        if was == Phase::Attached
            && let Err(error) = self.persist().await
        {
            // A full disk must not keep a container on the network; the last step below reports it.
            tracing::warn!(endpoint = %name, %error, "detaching without having written it down first");
        }
        let kernel = |source| EndpointError::Kernel { name: name.clone(), source };
        if let Some(host_interface) = host_interface {
            self.path.unplug(&host_interface).await.map_err(kernel)?;
        }
        lock(&self.table).remove(name);
        self.persist().await.map_err(|source| EndpointError::State { name: name.clone(), source })
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

    /// Writes the table down, where it is not by another's writing: those who wait at the same time share one.
    pub(super) async fn persist(&self) -> Result<(), StateError> {
        let wanted = lock(&self.table).version;
        let mut written = self.written.lock().await;
        if *written >= wanted {
            return Ok(());
        }
        let (version, stored) = {
            let table = lock(&self.table);
            (table.version, table.stored())
        };
        let state = Arc::clone(&self.state);
        let saved = tokio::task::spawn_blocking(move || state.save(FILE, &stored)).await;
        saved.unwrap_or_else(|e| Err(interrupted(&self.state, e)))?;
        *written = version;
        Ok(())
    }
}
