//! Model state: etcd and the hosts as one value, and all possible next steps.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::super::harness::{PREFIX, lease_request};
use super::etcd::{NO_HOST, Operation, StoredEntry, StoredValue, TxnRequest, TxnResult};
use crate::model::event::{LeaseOrigin, LeaseRequest};
use crate::model::{Cidr, NetworkConfig, Subnet};
use crate::store::keys::{Keys, claimed_ranges};
use crate::store::lease::{Action, HeldEntry, HeldLease, HolderState, LeaseSnapshot, decide, lease_value};
use crate::store::write::{Precondition, change_preconditions, create_preconditions};
use crate::store::{codec, pick::pick};

/// Number of lost races after which a host's choice repeats. It bounds the search; the protocol has no such limit.
const MAX_ATTEMPTS: u32 = 4;

/// Defect of a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Defect {
    /// Entries are created without preconditions.
    UnconditionalCreate,
    /// Other keys that could name the same range are not compared.
    UncheckedRange,
    /// The configuration that the choice is based on is not compared.
    UncheckedConfig,
    /// Entries are changed and deleted without preconditions.
    UnconditionalChange,
}

/// The complete state of the model.
#[derive(Clone)]
pub(super) struct ModelState {
    pub(super) scenario: Rc<Scenario>,
    pub(super) revision: i64,
    /// The current configuration's index, and the revision of its last change.
    pub(super) config: (usize, i64),
    pub(super) entries: BTreeMap<String, StoredEntry>,
    /// etcd leases that are not expired or revoked.
    pub(super) live_leases: BTreeSet<i64>,
    pub(super) last_lease_id: i64,
    pub(super) hosts: Vec<Host>,
    /// Writes that a server received but has not executed. Their senders no longer wait for the response.
    pub(super) delayed_writes: Vec<(usize, TxnRequest)>,
    /// Number of faults that may still occur.
    pub(super) remaining_faults: u8,
}

/// The constant part of a scenario.
pub(super) struct Scenario {
    pub(super) keys: Keys,
    pub(super) configs: Vec<(String, NetworkConfig)>,
    /// Identities of each host; it uses the next one after it lost its state.
    pub(super) identities: Vec<Vec<String>>,
    pub(super) defect: Option<Defect>,
}

#[derive(Debug, Clone)]
pub(super) struct Host {
    /// Number of times it lost its state.
    pub(super) generation: usize,
    pub(super) up: bool,
    pub(super) connected: bool,
    /// The configuration that it has seen.
    pub(super) seen_config: usize,
    /// The subnet in its state file.
    pub(super) preferred: Option<Subnet>,
    pub(super) state: HolderState,
    pub(super) unused_lease: Option<i64>,
    pub(super) stale_lease: Option<i64>,
    pub(super) stage: Stage,
}

/// The next step of a host.
#[derive(Debug, Clone)]
pub(super) enum Stage {
    Decide,
    /// Get an etcd lease, then create or take over the entry.
    Grant(PlannedWrite),
    Write(TxnRequest),
    Hold,
}

#[derive(Debug, Clone)]
pub(super) enum PlannedWrite {
    Create { subnet: Subnet, config: i64, max_create_revision: Option<i64> },
    TakeOver(HeldEntry),
}

/// A step and its result.
pub(super) struct Transition {
    pub(super) label: String,
    /// Whether it is a fault, which may not occur.
    pub(super) fault: bool,
    /// The state after it, or the violated property.
    pub(super) outcome: Result<ModelState, String>,
}

impl ModelState {
    /// Creates hosts that know the first configuration. Changes to later configurations do not count as faults. The hosts' first
    /// choices share the subnet of the first family.
    pub(super) fn new(configs: &[&str], reserved: &[&str], hosts: usize, faults: u8) -> ModelState {
        let configs: Vec<(String, NetworkConfig)> =
            configs.iter().map(|text| ((*text).to_owned(), NetworkConfig::parse(text).unwrap().config)).collect();
        let ranges: Vec<Cidr> = reserved.iter().flat_map(|key| claimed_ranges(key)).collect();
        let choice = |id: &str| pick(&configs[0].1, &ranges, id, 0).unwrap();
        let wanted = choice("h0");
        let shares_first_subnet = |subnet: &Subnet| subnet.iter().next() == wanted.iter().next();
        let ids = (0..500).map(|n| format!("h{n}")).filter(|id| shares_first_subnet(&choice(id)));
        let (mut same, mut other): (Vec<String>, Vec<String>) = ids.partition(|id| choice(id) == wanted);
        let mut next = |n: usize| if n % 2 == 1 && !other.is_empty() { other.remove(0) } else { same.remove(0) };
        let identities = (0..hosts).map(|host| (0..3).map(|_| next(host)).collect()).collect();
        let reservation = |key: &&str| {
            let stored = StoredEntry {
                writer: NO_HOST,
                value: StoredValue::new("{}".to_owned()),
                create_revision: 1,
                mod_revision: 1,
                etcd_lease: None,
            };
            ((*key).to_owned(), stored)
        };
        let entries = reserved.iter().map(reservation).collect();
        let host = Host {
            generation: 0,
            up: true,
            connected: true,
            seen_config: 0,
            preferred: None,
            state: HolderState::default(),
            unused_lease: None,
            stale_lease: None,
            stage: Stage::Decide,
        };
        ModelState {
            scenario: Rc::new(Scenario { keys: Keys::new(PREFIX).unwrap(), configs, identities, defect: None }),
            revision: 1,
            config: (0, 1),
            entries,
            live_leases: BTreeSet::new(),
            last_lease_id: 0,
            hosts: vec![host; hosts],
            delayed_writes: Vec::new(),
            remaining_faults: faults,
        }
    }

    /// Adds a defect.
    pub(super) fn with_defect(mut self, defect: Defect) -> ModelState {
        if let Some(setting) = Rc::get_mut(&mut self.scenario) {
            setting.defect = Some(defect);
        }
        self
    }

    fn lease_request(&self, number: usize) -> LeaseRequest {
        let host = &self.hosts[number];
        let mut request = lease_request(&self.scenario.configs[host.seen_config].0, u16::try_from(number + 1).unwrap());
        request.node.id.clone_from(&self.scenario.identities[number][host.generation]);
        request.preferred = host.preferred;
        request
    }

    fn encode_value(request: &LeaseRequest) -> Rc<StoredValue> {
        StoredValue::new(codec::encode(&lease_value(request)).unwrap())
    }

    /// All possible next steps.
    pub(super) fn transitions(&self) -> Vec<Transition> {
        let mut all = Vec::new();
        for number in 0..self.hosts.len() {
            self.host_transitions(number, &mut all);
        }
        let mut add = |label: String, fault: bool, change: &dyn Fn(&mut ModelState) -> Result<(), String>| {
            let mut next = self.clone();
            let outcome = change(&mut next).map(|()| next);
            all.push(Transition { label, fault, outcome });
        };
        for (number, (writer, request)) in self.delayed_writes.iter().enumerate() {
            add(format!("h{writer}'s late write of {} arrives", request.key), false, &|state| {
                state.delayed_writes.remove(number);
                state.commit(*writer, request).map(|_| ())
            });
            add(format!("h{writer}'s late write of {} is lost", request.key), false, &|state| {
                state.delayed_writes.remove(number);
                Ok(())
            });
        }
        for id in self.live_leases.iter().filter(|id| !self.is_renewed(**id)) {
            add(format!("etcd lease {id} expires"), false, &|state| {
                state.revoke_lease(*id);
                Ok(())
            });
        }
        if self.config.0 + 1 < self.scenario.configs.len() {
            add("the configuration changes".to_owned(), false, &|state| {
                state.revision += 1;
                state.config = (state.config.0 + 1, state.revision);
                Ok(())
            });
        }
        if self.remaining_faults > 0 {
            for (key, stored) in self.entries.iter().filter(|(_, stored)| stored.writer != NO_HOST) {
                add(format!("an operator deletes {key}"), true, &|state| {
                    state.remaining_faults -= 1;
                    state.revision += 1;
                    state.entries.remove(key);
                    Ok(())
                });
                if let Some(id) = stored.etcd_lease.filter(|id| self.is_renewed(*id)) {
                    add(format!("an operator revokes etcd lease {id}"), true, &|state| {
                        state.remaining_faults -= 1;
                        state.revoke_lease(id);
                        Ok(())
                    });
                }
            }
        }
        all
    }

    fn host_transitions(&self, number: usize, all: &mut Vec<Transition>) {
        let host = &self.hosts[number];
        let mut add = |label: &str, fault: bool, change: &dyn Fn(&mut ModelState) -> Result<(), String>| {
            let mut next = self.clone();
            let outcome = change(&mut next).map(|()| next);
            all.push(Transition { label: format!("h{number} {label}"), fault, outcome });
        };
        if !host.up {
            add("starts", false, &|state| {
                state.hosts[number].up = true;
                Ok(())
            });
            return;
        }
        if host.seen_config != self.config.0 {
            add("sees the configuration", false, &|state| {
                let host = &mut state.hosts[number];
                host.seen_config += 1;
                if matches!(host.stage, Stage::Hold) {
                    host.stage = Stage::Decide;
                }
                Ok(())
            });
        }
        if !host.connected {
            add("is reconnected", false, &|state| {
                state.hosts[number].connected = true;
                state.hosts[number].stage = Stage::Decide;
                Ok(())
            });
        } else if let Some(doing) = self.next_step(number) {
            add(&doing, false, &|state| state.advance(number));
        }
        if self.remaining_faults == 0 || !host.connected {
            return;
        }
        // A write in flight is lost, or arrives with its response lost, or arrives at any later time.
        let write_outcomes: &[&str] = if matches!(host.stage, Stage::Write(_)) { &["lost", "done", "late"] } else { &["none"] };
        for write_outcome in write_outcomes {
            for what in ["crashes", "crashes and loses its state", "is cut off"] {
                add(&format!("{what}, its write {write_outcome}"), true, &|state| {
                    state.remaining_faults -= 1;
                    if let Stage::Write(request) = std::mem::replace(&mut state.hosts[number].stage, Stage::Decide) {
                        match *write_outcome {
                            "done" => {
                                state.commit(number, &request)?;
                            }
                            "late" => state.delayed_writes.push((number, request)),
                            _ => {}
                        }
                    }
                    let host = &mut state.hosts[number];
                    if what == "is cut off" {
                        host.connected = false;
                        return Ok(());
                    }
                    let former = std::mem::take(&mut host.state);
                    host.preferred = former.held.map(|held| held.lease.subnet).or(former.last_subnet).or(host.preferred);
                    (host.up, host.unused_lease, host.stale_lease) = (false, None, None);
                    if what == "crashes and loses its state" {
                        (host.generation, host.preferred) = (host.generation + 1, None);
                    }
                    Ok(())
                });
            }
        }
    }

    /// The next step of a host that is up and connected.
    fn next_step(&self, number: usize) -> Option<String> {
        let host = &self.hosts[number];
        match &host.stage {
            Stage::Decide => Some("reads a snapshot and decides".to_owned()),
            Stage::Grant(_) => Some("gets an etcd lease".to_owned()),
            Stage::Write(request) => Some(format!("writes or deletes {}", request.key)),
            Stage::Hold => {
                let held = host.state.held.as_ref()?;
                let expired = held.lease.etcd_lease.is_some_and(|id| !self.live_leases.contains(&id));
                let is_unchanged = self.entries.get(&held.key).is_some_and(|stored| stored.mod_revision == held.mod_revision);
                // The watch also reports other entries that name this host: a late write creates one.
                let second = self.entries.iter().any(|(key, stored)| *key != held.key && self.names_host(number, stored));
                (expired || !is_unchanged || second).then(|| "notices a change".to_owned())
            }
        }
    }

    fn names_host(&self, number: usize, stored: &StoredEntry) -> bool {
        let id = &self.scenario.identities[number][self.hosts[number].generation];
        stored.value.id.as_ref() == Some(id)
    }

    fn advance(&mut self, number: usize) -> Result<(), String> {
        match self.hosts[number].stage.clone() {
            Stage::Decide => self.decide_next(number),
            Stage::Grant(plan) => {
                let id = match self.hosts[number].unused_lease {
                    Some(id) => id,
                    None => {
                        self.last_lease_id += 1;
                        self.live_leases.insert(self.last_lease_id);
                        self.last_lease_id
                    }
                };
                self.hosts[number].unused_lease = Some(id);
                self.hosts[number].stage = Stage::Write(self.build_request(number, plan, id));
            }
            Stage::Write(request) => {
                let result = self.commit(number, &request)?;
                self.handle_result(number, request, result);
            }
            Stage::Hold => {
                let host = &mut self.hosts[number];
                let etcd_lease = host.state.held.as_ref().and_then(|held| held.lease.etcd_lease);
                if etcd_lease.is_some_and(|id| !self.live_leases.contains(&id)) {
                    host.state.forget_held();
                }
                host.stage = Stage::Decide;
            }
        }
        Ok(())
    }

    /// Takes a snapshot and executes `decide`, in the order of `LeaseKeeper::step` and `LeaseKeeper::execute`.
    fn decide_next(&mut self, number: usize) {
        let request = self.lease_request(number);
        let snapshot = LeaseSnapshot::from_listing(self.listing(), &request.node.id);
        let mut state = std::mem::take(&mut self.hosts[number].state);
        if let Some((lost, _)) = state.detect_loss(&snapshot, &request) {
            self.hosts[number].stale_lease = lost.lease.etcd_lease.or(self.hosts[number].stale_lease);
        }
        let bound = |id: i64| snapshot.entries.iter().any(|entry| entry.etcd_lease == Some(id));
        if let Some(id) = self.hosts[number].stale_lease.take_if(|id| !bound(*id)) {
            self.revoke_lease(id);
        }
        let action = decide(&snapshot, &request, &state);
        let config = snapshot.config.as_ref().map_or(0, |config| config.mod_revision);
        self.hosts[number].stage = match action {
            Action::Keep(held) => {
                state = self.record_held(number, held);
                Stage::Hold
            }
            Action::Write(held) => Stage::Write(self.change_request(&request, held, None)),
            Action::TakeOver(held) if held.lease.etcd_lease.is_some() => Stage::Grant(PlannedWrite::TakeOver(held)),
            Action::TakeOver(held) => Stage::Write(self.change_request(&request, held, None)),
            Action::Acquire { subnet, compare_all } => {
                let max_create_revision = compare_all.then_some(snapshot.revision);
                Stage::Grant(PlannedWrite::Create { subnet, config, max_create_revision })
            }
            Action::Release { key, mod_revision, etcd_lease, .. } => {
                if state.held.as_ref().is_some_and(|held| held.key == key) {
                    state.held = None;
                }
                let is_shared = snapshot.entries.iter().any(|entry| entry.key != key && entry.etcd_lease == etcd_lease);
                let etcd_lease = etcd_lease.filter(|_| !is_shared);
                let preconditions = self.preconditions_unless(
                    change_preconditions(&self.scenario.keys, &key, mod_revision),
                    Defect::UnconditionalChange,
                );
                Stage::Write(TxnRequest { key, preconditions, operation: Operation::Remove { etcd_lease } })
            }
            Action::VerifyLiveness { key, mod_revision, etcd_lease, .. } => {
                state.forget_held();
                // Each connected host that is up renews. A lease that is not renewed is recognised as such after half a minute.
                if self.live_leases.contains(&etcd_lease) && !self.is_renewed(etcd_lease) {
                    state.dead_entry = Some((key, mod_revision));
                }
                Stage::Decide
            }
            Action::RetryLater { .. } => {
                state.forget_held();
                Stage::Decide
            }
            Action::Idle if state.held.is_some() => Stage::Hold,
            Action::Idle => Stage::Decide,
        };
        self.hosts[number].state = state;
    }

    fn build_request(&self, number: usize, plan: PlannedWrite, id: i64) -> TxnRequest {
        let request = self.lease_request(number);
        match plan {
            PlannedWrite::TakeOver(mut held) => {
                held.lease.etcd_lease = Some(id);
                self.change_request(&request, held, Some(id))
            }
            PlannedWrite::Create { subnet, config, max_create_revision } => {
                let key = subnet.to_key();
                let max_create_revision = max_create_revision.filter(|_| self.scenario.defect != Some(Defect::UncheckedRange));
                let mut preconditions = self.preconditions_unless(
                    create_preconditions(&self.scenario.keys, &key, config, max_create_revision),
                    Defect::UnconditionalCreate,
                );
                if self.scenario.defect == Some(Defect::UncheckedConfig) {
                    preconditions.retain(|precondition| !matches!(precondition, Precondition::Unchanged { .. }));
                }
                if self.scenario.defect == Some(Defect::UncheckedRange) {
                    preconditions = vec![Precondition::Unchanged { key: self.scenario.keys.subnet(&key), revision: 0 }];
                }
                let lease = HeldLease { subnet, etcd_lease: Some(id), origin: LeaseOrigin::Acquired };
                let held = HeldEntry { key: key.clone(), mod_revision: 0, lease };
                let operation =
                    Operation::Put { value: ModelState::encode_value(&request), binding: Some(id), held, creates: true };
                TxnRequest { key, preconditions, operation }
            }
        }
    }

    fn change_request(&self, request: &LeaseRequest, held: HeldEntry, binding: Option<i64>) -> TxnRequest {
        let preconditions = self.preconditions_unless(
            change_preconditions(&self.scenario.keys, &held.key, held.mod_revision),
            Defect::UnconditionalChange,
        );
        TxnRequest {
            key: held.key.clone(),
            preconditions,
            operation: Operation::Put { value: ModelState::encode_value(request), binding, held, creates: false },
        }
    }

    fn preconditions_unless(&self, preconditions: Vec<Precondition>, defect: Defect) -> Vec<Precondition> {
        if self.scenario.defect == Some(defect) { Vec::new() } else { preconditions }
    }

    fn handle_result(&mut self, number: usize, request: TxnRequest, result: TxnResult) {
        let mut stage = Stage::Decide;
        match (request.operation, result) {
            (Operation::Put { mut held, .. }, TxnResult::Written(revision)) => {
                held.mod_revision = revision;
                self.hosts[number].state = self.record_held(number, held);
                stage = Stage::Hold;
            }
            (Operation::Put { creates, .. }, result) => {
                let host = &mut self.hosts[number];
                if matches!(result, TxnResult::LeaseNotFound) {
                    host.unused_lease = None;
                }
                if creates {
                    host.state.attempt = (host.state.attempt + 1).min(MAX_ATTEMPTS);
                }
            }
            (Operation::Remove { .. }, _) => {}
        }
        self.hosts[number].stage = stage;
    }

    /// The holder's state after a success, as in `LeaseKeeper::record_held`.
    fn record_held(&mut self, number: usize, held: HeldEntry) -> HolderState {
        let host = &mut self.hosts[number];
        for slot in [&mut host.unused_lease, &mut host.stale_lease] {
            if *slot == held.lease.etcd_lease {
                *slot = None;
            }
        }
        HolderState { last_subnet: Some(held.lease.subnet), held: Some(held), ..HolderState::default() }
    }

    /// Whether a connected host that is up renews this etcd lease, or has just obtained it.
    fn is_renewed(&self, id: i64) -> bool {
        let keeps = |host: &Host| {
            let held = host.state.held.as_ref().and_then(|held| held.lease.etcd_lease);
            host.up && host.connected && (held == Some(id) || host.unused_lease == Some(id))
        };
        self.hosts.iter().any(keeps)
    }

    /// The violation in a settled state, if any.
    pub(super) fn quiescence_violation(&self) -> Option<String> {
        let holds = |number: &usize| {
            let Some(held) = &self.hosts[*number].state.held else { return false };
            self.entries.get(&held.key).is_some_and(|s| s.writer == *number && self.is_held(&held.key, s))
        };
        let without_lease: Vec<usize> = (0..self.hosts.len()).filter(|number| !holds(number)).collect();
        if !without_lease.is_empty() {
            return Some(format!("hosts {without_lease:?} hold no subnet"));
        }
        let leases = self.entries.values().filter(|stored| stored.writer != NO_HOST).count();
        (leases != self.hosts.len()).then(|| format!("{leases} entries of {} hosts", self.hosts.len()))
    }
}
