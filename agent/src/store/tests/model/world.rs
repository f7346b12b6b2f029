//! etcd and the hosts as one value, and every step that can come next.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::super::harness::{PREFIX, wish};
use super::etcd::{Answer, NOBODY, Request, Stored, Text, What};
use crate::model::event::{HeldLease, LeaseOrigin, LeaseWish};
use crate::model::{Cidr, NetworkConfig, Subnet};
use crate::store::codec;
use crate::store::keys::{Keys, claimed_ranges};
use crate::store::lease::{Held, Look, Memory, Step, decide, wished};
use crate::store::pick::pick;
use crate::store::write::{Guard, change_guards, create_guards};

/// Races after which a host's choice repeats: a bound for the search, not of the protocol.
const ATTEMPTS: u32 = 4;

/// A protocol that lacks something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Broken {
    /// Entries are made wherever the choice fell.
    Create,
    /// Other keys that could name the same range are not compared.
    Whole,
    /// The configuration that the choice rests on is not compared.
    Config,
    /// Entries are changed and deleted whatever has become of them.
    Change,
}

/// All there is.
#[derive(Clone)]
pub(super) struct World {
    pub(super) setting: Rc<Setting>,
    pub(super) revision: i64,
    /// Which configuration is there, and since which revision.
    pub(super) config: (usize, i64),
    pub(super) entries: BTreeMap<String, Stored>,
    /// etcd leases that have not ended.
    pub(super) alive: BTreeSet<i64>,
    pub(super) granted: i64,
    pub(super) hosts: Vec<Host>,
    /// Writes that a server received and has not carried out: nobody waits for their answer any more.
    pub(super) late: Vec<(usize, Request)>,
    /// Faults that may still come.
    pub(super) faults: u8,
}

/// What does not change.
pub(super) struct Setting {
    pub(super) keys: Keys,
    pub(super) configs: Vec<(String, NetworkConfig)>,
    /// Identities of each host: the next one when it lost its state.
    pub(super) identities: Vec<Vec<String>>,
    pub(super) broken: Option<Broken>,
}

#[derive(Debug, Clone)]
pub(super) struct Host {
    /// How often it lost its state.
    pub(super) generation: usize,
    pub(super) up: bool,
    pub(super) linked: bool,
    /// The configuration that it has seen.
    pub(super) seen: usize,
    /// What its state file remembers.
    pub(super) preferred: Option<Subnet>,
    pub(super) memory: Memory,
    pub(super) spare: Option<i64>,
    pub(super) orphan: Option<i64>,
    pub(super) stage: Stage,
}

/// What a host does next.
#[derive(Debug, Clone)]
pub(super) enum Stage {
    Look,
    /// Get an etcd lease, then make or take over the entry.
    Grant(Plan),
    Write(Request),
    Hold,
}

#[derive(Debug, Clone)]
pub(super) enum Plan {
    Create { subnet: Subnet, config: i64, whole: Option<i64> },
    TakeOver(Held),
}

/// A step and where it leads.
pub(super) struct Move {
    pub(super) label: String,
    /// Whether it is one that need not come.
    pub(super) fault: bool,
    /// The world behind it, or the property that it violates.
    pub(super) outcome: Result<World, String>,
}

impl World {
    /// So many hosts that know the first configuration; each change to a later one is free, faults are counted. The hosts' first choices have
    /// the first family's part in common.
    pub(super) fn new(configs: &[&str], reserved: &[&str], hosts: usize, faults: u8) -> World {
        let configs: Vec<(String, NetworkConfig)> =
            configs.iter().map(|text| ((*text).to_owned(), NetworkConfig::parse(text).unwrap().config)).collect();
        let ranges: Vec<Cidr> = reserved.iter().flat_map(|key| claimed_ranges(key)).collect();
        let choice = |id: &str| pick(&configs[0].1, &ranges, id, 0).unwrap();
        let wanted = choice("h0");
        let near = |subnet: &Subnet| subnet.iter().next() == wanted.iter().next();
        let ids = (0..500).map(|n| format!("h{n}")).filter(|id| near(&choice(id)));
        let (mut same, mut other): (Vec<String>, Vec<String>) = ids.partition(|id| choice(id) == wanted);
        let mut next = |n: usize| if n % 2 == 1 && !other.is_empty() { other.remove(0) } else { same.remove(0) };
        let identities = (0..hosts).map(|host| (0..3).map(|_| next(host)).collect()).collect();
        let reservation = |key: &&str| {
            let stored = Stored { writer: NOBODY, value: Text::new("{}".to_owned()), created: 1, changed: 1, etcd_lease: None };
            ((*key).to_owned(), stored)
        };
        let entries = reserved.iter().map(reservation).collect();
        let host = Host {
            generation: 0,
            up: true,
            linked: true,
            seen: 0,
            preferred: None,
            memory: Memory::default(),
            spare: None,
            orphan: None,
            stage: Stage::Look,
        };
        World {
            setting: Rc::new(Setting { keys: Keys::new(PREFIX).unwrap(), configs, identities, broken: None }),
            revision: 1,
            config: (0, 1),
            entries,
            alive: BTreeSet::new(),
            granted: 0,
            hosts: vec![host; hosts],
            late: Vec::new(),
            faults,
        }
    }

    /// The same with a defect.
    pub(super) fn broken(mut self, defect: Broken) -> World {
        if let Some(setting) = Rc::get_mut(&mut self.setting) {
            setting.broken = Some(defect);
        }
        self
    }

    fn wish(&self, number: usize) -> LeaseWish {
        let host = &self.hosts[number];
        let mut wish = wish(&self.setting.configs[host.seen].0, u16::try_from(number + 1).unwrap());
        wish.node.id.clone_from(&self.setting.identities[number][host.generation]);
        wish.preferred = host.preferred;
        wish
    }

    fn value(wish: &LeaseWish) -> Rc<Text> {
        Text::new(codec::encode(&wished(wish)).unwrap())
    }

    /// Every step that can come next.
    pub(super) fn steps(&self) -> Vec<Move> {
        let mut all = Vec::new();
        for number in 0..self.hosts.len() {
            self.steps_of(number, &mut all);
        }
        let mut add = |label: String, fault: bool, change: &dyn Fn(&mut World) -> Result<(), String>| {
            let mut world = self.clone();
            let outcome = change(&mut world).map(|()| world);
            all.push(Move { label, fault, outcome });
        };
        for (number, (writer, request)) in self.late.iter().enumerate() {
            add(format!("h{writer}'s late write of {} arrives", request.key), false, &|world| {
                world.late.remove(number);
                world.carry_out(*writer, request).map(|_| ())
            });
            add(format!("h{writer}'s late write of {} is lost", request.key), false, &|world| {
                world.late.remove(number);
                Ok(())
            });
        }
        for id in self.alive.iter().filter(|id| !self.renewed(**id)) {
            add(format!("etcd lease {id} expires"), false, &|world| {
                world.end_lease(*id);
                Ok(())
            });
        }
        if self.config.0 + 1 < self.setting.configs.len() {
            add("the configuration changes".to_owned(), false, &|world| {
                world.revision += 1;
                world.config = (world.config.0 + 1, world.revision);
                Ok(())
            });
        }
        if self.faults > 0 {
            for (key, stored) in self.entries.iter().filter(|(_, stored)| stored.writer != NOBODY) {
                add(format!("somebody deletes {key}"), true, &|world| {
                    world.faults -= 1;
                    world.revision += 1;
                    world.entries.remove(key);
                    Ok(())
                });
                if let Some(id) = stored.etcd_lease.filter(|id| self.renewed(*id)) {
                    add(format!("somebody revokes etcd lease {id}"), true, &|world| {
                        world.faults -= 1;
                        world.end_lease(id);
                        Ok(())
                    });
                }
            }
        }
        all
    }

    fn steps_of(&self, number: usize, all: &mut Vec<Move>) {
        let host = &self.hosts[number];
        let mut add = |label: &str, fault: bool, change: &dyn Fn(&mut World) -> Result<(), String>| {
            let mut world = self.clone();
            let outcome = change(&mut world).map(|()| world);
            all.push(Move { label: format!("h{number} {label}"), fault, outcome });
        };
        if !host.up {
            add("starts", false, &|world| {
                world.hosts[number].up = true;
                Ok(())
            });
            return;
        }
        if host.seen != self.config.0 {
            add("sees the configuration", false, &|world| {
                let host = &mut world.hosts[number];
                host.seen += 1;
                if matches!(host.stage, Stage::Hold) {
                    host.stage = Stage::Look;
                }
                Ok(())
            });
        }
        if !host.linked {
            add("is linked again", false, &|world| {
                world.hosts[number].linked = true;
                world.hosts[number].stage = Stage::Look;
                Ok(())
            });
        } else if let Some(doing) = self.next_of(number) {
            add(&doing, false, &|world| world.go_on(number));
        }
        if self.faults == 0 || !host.linked {
            return;
        }
        // What is on its way is lost, or arrives and only its answer is lost, or arrives at any later time.
        let fates: &[&str] = if matches!(host.stage, Stage::Write(_)) { &["lost", "done", "late"] } else { &["none"] };
        for fate in fates {
            for what in ["crashes", "crashes and loses its state", "is cut off"] {
                add(&format!("{what}, its write {fate}"), true, &|world| {
                    world.faults -= 1;
                    if let Stage::Write(request) = std::mem::replace(&mut world.hosts[number].stage, Stage::Look) {
                        match *fate {
                            "done" => {
                                world.carry_out(number, &request)?;
                            }
                            "late" => world.late.push((number, request)),
                            _ => {}
                        }
                    }
                    let host = &mut world.hosts[number];
                    if what == "is cut off" {
                        host.linked = false;
                        return Ok(());
                    }
                    let memory = std::mem::take(&mut host.memory);
                    host.preferred = memory.held.map(|held| held.lease.subnet).or(memory.last).or(host.preferred);
                    (host.up, host.spare, host.orphan) = (false, None, None);
                    if what == "crashes and loses its state" {
                        (host.generation, host.preferred) = (host.generation + 1, None);
                    }
                    Ok(())
                });
            }
        }
    }

    /// What a host that is up and linked would do now.
    fn next_of(&self, number: usize) -> Option<String> {
        let host = &self.hosts[number];
        match &host.stage {
            Stage::Look => Some("looks and decides".to_owned()),
            Stage::Grant(_) => Some("gets an etcd lease".to_owned()),
            Stage::Write(request) => Some(format!("writes or deletes {}", request.key)),
            Stage::Hold => {
                let held = host.memory.held.as_ref()?;
                let gone = held.lease.etcd_lease.is_some_and(|id| !self.alive.contains(&id));
                let same = self.entries.get(&held.key).is_some_and(|stored| stored.changed == held.mod_revision);
                // The watch looks out for entries that name this host, too: a write that arrives late makes one.
                let second = self.entries.iter().any(|(key, stored)| *key != held.key && self.names(number, stored));
                (gone || !same || second).then(|| "notices a change".to_owned())
            }
        }
    }

    fn names(&self, number: usize, stored: &Stored) -> bool {
        let id = &self.setting.identities[number][self.hosts[number].generation];
        stored.value.id.as_ref() == Some(id)
    }

    fn go_on(&mut self, number: usize) -> Result<(), String> {
        match self.hosts[number].stage.clone() {
            Stage::Look => self.look(number),
            Stage::Grant(plan) => {
                let id = match self.hosts[number].spare {
                    Some(id) => id,
                    None => {
                        self.granted += 1;
                        self.alive.insert(self.granted);
                        self.granted
                    }
                };
                self.hosts[number].spare = Some(id);
                self.hosts[number].stage = Stage::Write(self.planned(number, plan, id));
            }
            Stage::Write(request) => {
                let answer = self.carry_out(number, &request)?;
                self.answered(number, request, answer);
            }
            Stage::Hold => {
                let host = &mut self.hosts[number];
                let gone = host.memory.held.as_ref().and_then(|h| h.lease.etcd_lease).is_some_and(|id| !self.alive.contains(&id));
                if gone {
                    host.memory.lose();
                }
                host.stage = Stage::Look;
            }
        }
        Ok(())
    }

    /// One look, and what `decide` makes of it: the order of `Holder::turn` and `Holder::act`.
    fn look(&mut self, number: usize) {
        let wish = self.wish(number);
        let look = Look::of(self.listing(), &wish.node.id);
        let mut memory = std::mem::take(&mut self.hosts[number].memory);
        if let Some((lost, _)) = memory.notice_loss(&look, &wish) {
            self.hosts[number].orphan = lost.lease.etcd_lease.or(self.hosts[number].orphan);
        }
        let bound = |id: i64| look.claims.iter().any(|claim| claim.etcd_lease == Some(id));
        if let Some(id) = self.hosts[number].orphan.take_if(|id| !bound(*id)) {
            self.end_lease(id);
        }
        let step = decide(&look, &wish, &memory);
        let config = look.config.as_ref().map_or(0, |config| config.mod_revision);
        self.hosts[number].stage = match step {
            Step::Keep(held) => {
                memory = self.got(number, held);
                Stage::Hold
            }
            Step::Write(held) => Stage::Write(self.change(&wish, held, None)),
            Step::TakeOver(held) if held.lease.etcd_lease.is_some() => Stage::Grant(Plan::TakeOver(held)),
            Step::TakeOver(held) => Stage::Write(self.change(&wish, held, None)),
            Step::Acquire { subnet, whole } => {
                Stage::Grant(Plan::Create { subnet, config, whole: whole.then_some(look.revision) })
            }
            Step::Release { key, mod_revision, etcd_lease, .. } => {
                if memory.held.as_ref().is_some_and(|held| held.key == key) {
                    memory.held = None;
                }
                let shared = look.claims.iter().any(|claim| claim.key != key && claim.etcd_lease == etcd_lease);
                let etcd_lease = etcd_lease.filter(|_| !shared);
                let guards = self.guarded(change_guards(&self.setting.keys, &key, mod_revision), Broken::Change);
                Stage::Write(Request { key, guards, what: What::Remove { etcd_lease } })
            }
            Step::Prove { key, mod_revision, etcd_lease, .. } => {
                memory.lose();
                // Whoever is up and linked renews. What is renewed no more is known to be so after half a minute.
                if self.alive.contains(&etcd_lease) && !self.renewed(etcd_lease) {
                    memory.dead = Some((key, mod_revision));
                }
                Stage::Look
            }
            Step::Wait { .. } => {
                memory.lose();
                Stage::Look
            }
            Step::Stay if memory.held.is_some() => Stage::Hold,
            Step::Stay => Stage::Look,
        };
        self.hosts[number].memory = memory;
    }

    fn planned(&self, number: usize, plan: Plan, id: i64) -> Request {
        let wish = self.wish(number);
        match plan {
            Plan::TakeOver(mut held) => {
                held.lease.etcd_lease = Some(id);
                self.change(&wish, held, Some(id))
            }
            Plan::Create { subnet, config, whole } => {
                let key = subnet.to_key();
                let whole = whole.filter(|_| self.setting.broken != Some(Broken::Whole));
                let mut guards = self.guarded(create_guards(&self.setting.keys, &key, config, whole), Broken::Create);
                if self.setting.broken == Some(Broken::Config) {
                    guards.retain(|guard| !matches!(guard, Guard::Unchanged { .. }));
                }
                if self.setting.broken == Some(Broken::Whole) {
                    guards = vec![Guard::Unchanged { key: self.setting.keys.subnet(&key), revision: 0 }];
                }
                let lease = HeldLease { subnet, etcd_lease: Some(id), origin: LeaseOrigin::Acquired };
                let held = Held { key: key.clone(), mod_revision: 0, lease };
                let what = What::Put { value: World::value(&wish), binding: Some(id), held, made: true };
                Request { key, guards, what }
            }
        }
    }

    fn change(&self, wish: &LeaseWish, held: Held, binding: Option<i64>) -> Request {
        let guards = self.guarded(change_guards(&self.setting.keys, &held.key, held.mod_revision), Broken::Change);
        Request { key: held.key.clone(), guards, what: What::Put { value: World::value(wish), binding, held, made: false } }
    }

    fn guarded(&self, guards: Vec<Guard>, defect: Broken) -> Vec<Guard> {
        if self.setting.broken == Some(defect) { Vec::new() } else { guards }
    }

    fn answered(&mut self, number: usize, request: Request, answer: Answer) {
        let mut stage = Stage::Look;
        match (request.what, answer) {
            (What::Put { mut held, .. }, Answer::Written(revision)) => {
                held.mod_revision = revision;
                self.hosts[number].memory = self.got(number, held);
                stage = Stage::Hold;
            }
            (What::Put { made, .. }, answer) => {
                let host = &mut self.hosts[number];
                if matches!(answer, Answer::LeaseGone) {
                    host.spare = None;
                }
                if made {
                    host.memory.attempt = (host.memory.attempt + 1).min(ATTEMPTS);
                }
            }
            (What::Remove { .. }, _) => {}
        }
        self.hosts[number].stage = stage;
    }

    /// What is remembered of what is held: `Holder::got`.
    fn got(&mut self, number: usize, held: Held) -> Memory {
        let host = &mut self.hosts[number];
        for slot in [&mut host.spare, &mut host.orphan] {
            if *slot == held.lease.etcd_lease {
                *slot = None;
            }
        }
        Memory { last: Some(held.lease.subnet), held: Some(held), ..Memory::default() }
    }

    /// Whether a host that is up and linked keeps this etcd lease alive, or has just got it.
    fn renewed(&self, id: i64) -> bool {
        let keeps = |host: &Host| {
            let held = host.memory.held.as_ref().and_then(|held| held.lease.etcd_lease);
            host.up && host.linked && (held == Some(id) || host.spare == Some(id))
        };
        self.hosts.iter().any(keeps)
    }

    /// What is not as it should be where nothing goes on any more.
    pub(super) fn unrest(&self) -> Option<String> {
        let holds = |number: &usize| {
            let Some(held) = &self.hosts[*number].memory.held else { return false };
            self.entries.get(&held.key).is_some_and(|s| s.writer == *number && self.is_held(&held.key, s))
        };
        let without: Vec<usize> = (0..self.hosts.len()).filter(|number| !holds(number)).collect();
        if !without.is_empty() {
            return Some(format!("hosts {without:?} hold nothing"));
        }
        let leases = self.entries.values().filter(|stored| stored.writer != NOBODY).count();
        (leases != self.hosts.len()).then(|| format!("{leases} entries of {} hosts", self.hosts.len()))
    }
}
