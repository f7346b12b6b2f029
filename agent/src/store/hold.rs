//! Taking, renewing and giving back this host's lease: carries out what [`lease`] decides.
//!
//! Runs beside the watch in the task of [`Store::run`](super::Store::run) and never holds it up. It may be dropped at any await: whatever
//! was written is found again by the next look, because the entry names this host; [`Memory`] only spares work.

use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::connect::{Session, StoreConfig};
use super::lease::{self, Held, Look, Memory, RETRY, Step};
use super::renew::{self, Life, Renewal};
use super::watch::{Board, Sightings, send};
use super::write::Binding;
use super::{StoreError, codec};
use crate::backoff::Backoff;
use crate::model::Subnet;
use crate::model::event::{HeldLease, LeaseOrigin, LeaseWish, OwnLease, StoreEvent};

/// Waiting between tries after a lost race. Short: the other one has finished, and the next choice is another.
const RACE: Backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(500));
/// Waiting between tries after an answer that was an error.
const TROUBLE: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(15));
/// How long giving back an unused etcd lease may hold up the end.
const FAREWELL: Duration = Duration::from_secs(1);

/// Holds this host's lease over any number of connections.
pub(super) struct Holder<'a> {
    ttl: Duration,
    keep_alive: Duration,
    board: &'a Board,
    events: mpsc::Sender<StoreEvent>,
    wish: watch::Receiver<Option<LeaseWish>>,
    memory: Memory,
    /// What was handed on last.
    told: Option<OwnLease>,
    /// The revision up to which the state of the held entry is known.
    known: i64,
    /// An etcd lease that was granted and is not bound to a key yet.
    spare: Option<i64>,
    /// The etcd lease of an entry that was lost.
    orphan: Option<i64>,
    /// The etcd lease whose holder is being watched, and since when.
    suspect: Option<(i64, Instant)>,
    random: SmallRng,
    race: Backoff,
    trouble: Backoff,
}

/// What follows a step.
enum Next {
    /// Look again.
    Again,
    /// Look again after a short wait: somebody was faster.
    Race,
    /// Look again after this long or when something changes.
    Later(Duration),
    /// Renew until something changes.
    Hold,
}

impl<'a> Holder<'a> {
    pub(super) fn new(
        config: &StoreConfig,
        board: &'a Board,
        events: mpsc::Sender<StoreEvent>,
        wish: watch::Receiver<Option<LeaseWish>>,
    ) -> Holder<'a> {
        Holder {
            ttl: config.lease_ttl,
            keep_alive: config.keep_alive,
            board,
            events,
            wish,
            memory: Memory::default(),
            told: None,
            known: 0,
            spare: None,
            orphan: None,
            suspect: None,
            random: SmallRng::from_rng(&mut rand::rng()),
            race: RACE,
            trouble: TROUBLE,
        }
    }

    /// Takes and holds the wished lease until the connection fails.
    pub(super) async fn run(&mut self, session: &Session) -> StoreError {
        let mut address = None;
        loop {
            let wish = self.wish.borrow_and_update().clone();
            let Some(wish) = wish else {
                changed(&mut self.wish).await;
                continue;
            };
            if *address.get_or_insert(wish.public_ip) != wish.public_ip {
                return StoreError::Moved;
            }
            self.board.identity.send_replace(Some(wish.node.id.clone()));
            match self.turn(session, &wish).await {
                Ok(()) => self.trouble.reset(),
                Err(error) if error.ends_session() => return error,
                Err(error) => {
                    if let Err(gone) = self.report(&error).await {
                        return gone;
                    }
                    let delay = self.trouble.next_delay(&mut self.random);
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = changed(&mut self.wish) => {}
                    }
                }
            }
        }
    }

    /// Gives back what was granted and not used.
    pub(super) async fn leave(&mut self, session: &Session) {
        if let Some(id) = self.spare.take()
            && !matches!(tokio::time::timeout(FAREWELL, session.revoke(id)).await, Ok(Ok(())))
        {
            debug!(etcd_lease = format!("{id:x}"), "an unused etcd lease is left to expire");
        }
    }

    /// Looks, decides, acts; returns when it is time to look again.
    async fn turn(&mut self, session: &Session, wish: &LeaseWish) -> Result<(), StoreError> {
        let look = Look::of(session.list().await?, &wish.node.id);
        self.known = look.revision;
        if let Some((lost, reason)) = self.memory.notice_loss(&look, wish) {
            warn!(subnet = %lost.lease.subnet, reason, "this host's lease is lost, taking one again");
            self.orphan = lost.lease.etcd_lease.or(self.orphan);
            self.tell(OwnLease::Wanted { reason }).await?;
        }
        if let Some(id) = self.orphan.take_if(|id| !look.claims.iter().any(|claim| claim.etcd_lease == Some(*id))) {
            // Nothing is bound to it, so nothing goes with it.
            if let Err(error) = session.revoke(id).await {
                debug!(%error, "the etcd lease of the lost entry is left to expire");
            }
        }
        let step = lease::decide(&look, wish, &self.memory);
        debug!(revision = look.revision, attempt = self.memory.attempt, ?step, "decided");
        match self.act(session, wish, look, step).await? {
            Next::Again => Ok(()),
            Next::Race => {
                let delay = self.race.next_delay(&mut self.random);
                tokio::time::sleep(delay).await;
                Ok(())
            }
            Next::Later(delay) => {
                self.board.held.send_replace(None);
                self.leave(session).await;
                self.rest(delay).await;
                Ok(())
            }
            Next::Hold => self.hold(session, wish).await,
        }
    }

    /// Waits for a new wish, an entry that goes, or the end of the delay.
    async fn rest(&mut self, delay: Duration) {
        let mut sightings = self.board.sightings.subscribe();
        let removals = sightings.borrow_and_update().removals;
        let removed = until(&mut sightings, |seen| seen.removals != removals);
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = changed(&mut self.wish) => {}
            () = removed => {}
        }
    }

    async fn act(&mut self, session: &Session, wish: &LeaseWish, look: Look, step: Step) -> Result<Next, StoreError> {
        match step {
            Step::Keep(held) => {
                self.board.held.send_replace(Some(held.key.clone()));
                let seen = self.board.sightings.borrow().revision;
                if seen > look.revision {
                    // The watch is already behind the look and did not look out for this entry.
                    drop(look);
                    let (now, revision) = session.get_entry(&held.key).await?;
                    if now.is_none_or(|entry| entry.mod_revision != held.mod_revision) {
                        return Ok(Next::Again);
                    }
                    self.known = revision;
                }
                self.got(held);
                Ok(Next::Hold)
            }
            Step::Write(held) => {
                drop(look);
                self.overwrite(session, wish, held).await
            }
            Step::TakeOver(mut held) => {
                let from = look.claim(&held.key).and_then(|claim| claim.owner.node.clone()).map(|node| node.name);
                info!(subnet = %held.lease.subnet, from, "taking over the lease that has this host's public IP");
                drop(look);
                if held.lease.etcd_lease.is_some() {
                    held.lease.etcd_lease = Some(self.grant(session).await?);
                }
                self.overwrite(session, wish, held).await
            }
            Step::Acquire { subnet, whole } => self.acquire(session, wish, &look, subnet, whole).await,
            Step::Release { key, mod_revision, etcd_lease, reason } => {
                warn!(key, reason, "giving up a lease");
                if self.memory.held.as_ref().is_some_and(|held| held.key == key) {
                    self.memory.held = None;
                    self.tell(OwnLease::Wanted { reason }).await?;
                }
                let shared = look.claims.iter().any(|claim| claim.key != key && claim.etcd_lease == etcd_lease);
                let gone = session.remove(&key, mod_revision).await?;
                if let (true, false, Some(id)) = (gone, shared, etcd_lease) {
                    session.revoke(id).await?;
                }
                Ok(if gone { Next::Again } else { Next::Race })
            }
            Step::Prove { key, mod_revision, etcd_lease, reason } => {
                drop(look);
                self.memory.lose();
                self.prove(session, (key, mod_revision), etcd_lease, reason).await
            }
            Step::Wait { reason } => {
                self.memory.lose();
                self.want(reason).await?;
                Ok(Next::Later(RETRY))
            }
            Step::Stay if self.memory.held.is_some() => Ok(Next::Hold),
            Step::Stay => Ok(Next::Later(RETRY)),
        }
    }

    /// Writes our value into an entry that stands there, unless it was changed since the look.
    async fn overwrite(&mut self, session: &Session, wish: &LeaseWish, mut held: Held) -> Result<Next, StoreError> {
        self.board.held.send_replace(Some(held.key.clone()));
        let binding = match held.lease.etcd_lease {
            Some(id) if self.spare == Some(id) => Binding::To(id),
            _ => Binding::Keep,
        };
        let written = session.overwrite(&held.key, Self::value(session, wish)?, binding, held.mod_revision).await;
        match self.or_expired(written)? {
            None => Ok(Next::Race),
            Some(revision) => {
                held.mod_revision = revision;
                info!(subnet = %held.lease.subnet, reservation = held.lease.etcd_lease.is_none(), "wrote this host's lease");
                self.got(held);
                Ok(Next::Hold)
            }
        }
    }

    /// Makes a new entry in one transaction that fails where anybody was faster.
    async fn acquire(
        &mut self,
        session: &Session,
        wish: &LeaseWish,
        look: &Look,
        subnet: Subnet,
        whole: bool,
    ) -> Result<Next, StoreError> {
        let etcd_lease = self.grant(session).await?;
        let key = subnet.to_key();
        let config = look.config.as_ref().map_or(0, |config| config.mod_revision);
        let whole = whole.then_some(look.revision);
        self.board.held.send_replace(Some(key.clone()));
        let written = session.create(&key, Self::value(session, wish)?, etcd_lease, config, whole).await;
        let Some(mod_revision) = self.or_expired(written)? else {
            debug!(%subnet, attempt = self.memory.attempt, "somebody was faster");
            self.memory.attempt = self.memory.attempt.saturating_add(1);
            return Ok(Next::Race);
        };
        match self.memory.last.or(wish.preferred) {
            Some(last) if last != subnet => {
                warn!(from = %last, to = %subnet, "THIS HOST'S SUBNET HAS CHANGED: its old one is not free any more or does not fit the network");
            }
            _ => info!(%subnet, "took a free subnet"),
        }
        let lease = HeldLease { subnet, etcd_lease: Some(etcd_lease), origin: LeaseOrigin::Acquired };
        self.got(Held { key, mod_revision, lease });
        Ok(Next::Hold)
    }

    /// Our value as text.
    fn value(session: &Session, wish: &LeaseWish) -> Result<String, StoreError> {
        codec::encode(&lease::wished(wish)).map_err(|error| StoreError::Answer {
            endpoint: session.context.endpoint.clone(),
            what: "write this host's lease",
            detail: error.to_string(),
        })
    }

    /// A spare etcd lease that expired while it waited to be used is a race lost.
    fn or_expired(&mut self, answer: Result<Option<i64>, StoreError>) -> Result<Option<i64>, StoreError> {
        match answer {
            Err(StoreError::LeaseGone { .. }) if self.spare.is_some() => {
                self.spare = None;
                Ok(None)
            }
            other => other,
        }
    }

    /// An etcd lease that is bound to no key yet.
    async fn grant(&mut self, session: &Session) -> Result<i64, StoreError> {
        if let Some(id) = self.spare {
            return Ok(id);
        }
        let id = session.grant(self.ttl).await?;
        self.spare = Some(id);
        Ok(id)
    }

    /// Finds out whether the holder of an entry that could be ours lives.
    async fn prove(
        &mut self,
        session: &Session,
        entry: (String, i64),
        etcd_lease: i64,
        reason: String,
    ) -> Result<Next, StoreError> {
        let now = Instant::now();
        let since = match self.suspect {
            Some((id, since)) if id == etcd_lease => since,
            _ => now,
        };
        self.suspect = Some((etcd_lease, since));
        let Some(ttl) = session.time_to_live(etcd_lease).await? else {
            // Expired: the entry goes in a moment.
            return Ok(Next::Race);
        };
        let (reason, again) = match renew::life(ttl, self.keep_alive, now - since) {
            Life::Gone => {
                info!(key = entry.0, "the holder of the entry has stopped renewing it");
                self.memory.dead = Some(entry);
                self.suspect = None;
                return Ok(Next::Again);
            }
            Life::Alive { again } => (reason, again),
            Life::Unknown { again } => (format!("{reason}; waiting whether it still renews its lease"), again),
        };
        self.want(reason).await?;
        Ok(Next::Later(again))
    }

    /// Takes note of what is held.
    fn got(&mut self, held: Held) {
        if held.lease.etcd_lease == self.spare {
            self.spare = None;
        }
        if held.lease.etcd_lease == self.orphan {
            self.orphan = None;
        }
        self.suspect = None;
        self.memory = Memory { last: Some(held.lease.subnet), held: Some(held), ..Memory::default() };
        self.race.reset();
    }

    /// Renews until the wish or the entry changes.
    async fn hold(&mut self, session: &Session, wish: &LeaseWish) -> Result<(), StoreError> {
        let Some(held) = self.memory.held.clone() else { return Ok(()) };
        let mut renewal = match held.lease.etcd_lease {
            None => None,
            Some(id) => match Renewal::start(session, id, self.keep_alive).await {
                Err(StoreError::LeaseGone { .. }) => return Err(self.expired(&held, id).await?),
                other => Some(other?),
            },
        };
        self.tell(OwnLease::Held(held.lease.clone())).await?;
        let known = self.known.max(held.mod_revision);
        let mut sightings = self.board.sightings.subscribe();
        loop {
            let touched = until(&mut sightings, |seen| seen.held > known);
            tokio::select! {
                () = touched => return Ok(()),
                () = changed(&mut self.wish) => {
                    if self.wish.borrow_and_update().as_ref().is_some_and(|new| new != wish) {
                        return Ok(());
                    }
                }
                renewed = Renewal::next(&mut renewal, session) => match renewed {
                    Err(StoreError::LeaseGone { lease }) => return Err(self.expired(&held, lease).await?),
                    other => other?,
                },
            }
        }
    }

    /// The etcd lease behind our entry is gone, so the entry goes too.
    async fn expired(&mut self, held: &Held, id: i64) -> Result<StoreError, StoreError> {
        let reason = format!("the etcd lease of {} has expired or was revoked", held.lease.subnet);
        warn!(subnet = %held.lease.subnet, etcd_lease = format!("{id:x}"), "this host's etcd lease has expired or was revoked");
        self.memory.lose();
        self.tell(OwnLease::Wanted { reason }).await?;
        Ok(StoreError::LeaseGone { lease: id })
    }

    /// Says that an error stands in the way.
    async fn report(&mut self, error: &StoreError) -> Result<(), StoreError> {
        match error {
            StoreError::LeaseGone { .. } | StoreError::Compacted { .. } => Ok(()),
            // What is held stays held; only its change or renewal waits.
            _ if self.memory.held.is_some() => {
                warn!(%error, "this host's lease could not be updated, trying again");
                Ok(())
            }
            _ => self.want(error.to_string()).await,
        }
    }

    /// Hands on that no lease is held, and logs it when the reason is new.
    async fn want(&mut self, reason: String) -> Result<(), StoreError> {
        let wanted = OwnLease::Wanted { reason };
        if self.told.as_ref() != Some(&wanted)
            && let OwnLease::Wanted { reason } = &wanted
        {
            warn!(reason, "this host has no lease");
        }
        self.tell(wanted).await
    }

    /// Hands on the state of the lease where it differs from what was handed on before.
    async fn tell(&mut self, own: OwnLease) -> Result<(), StoreError> {
        if self.told.as_ref() != Some(&own) {
            self.told = Some(own.clone());
            send(&self.events, StoreEvent::Own(own)).await?;
        }
        Ok(())
    }
}

/// Waits for a new wish; for ever where nobody can wish any more.
async fn changed(wish: &mut watch::Receiver<Option<LeaseWish>>) {
    if wish.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits for a sighting.
async fn until(sightings: &mut watch::Receiver<Sightings>, wanted: impl FnMut(&Sightings) -> bool) {
    // The board lives longer than whoever waits on it.
    let _ = sightings.wait_for(wanted).await;
}
