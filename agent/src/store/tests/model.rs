//! Exhaustive search of the lease protocol: every interleaving of a few hosts' steps, with crashes, lost responses, partitions,
//! late writes, expired leases, deleted keys and configuration changes, up to a number of faults.
//!
//! The model uses the real code: `LeaseSnapshot`, `HolderState` and `decide` choose each step, the preconditions of `write` are
//! evaluated, keys and values are real. It reimplements only etcd (`model/etcd.rs`) and the order of steps in `lease_keeper`
//! (`model/state.rs`). `history.rs` tests that order against a real etcd.
//!
//! Invariants of every state: no two hosts have overlapping entries, and no host overwrites or deletes an entry that another host
//! holds. From every state the hosts settle without another fault, and then each holds a subnet. The search itself is tested: it
//! must find the violations of protocols that lack a precondition.

mod canonical;
mod etcd;
mod state;

use std::collections::HashMap;
use std::collections::VecDeque;

use state::{Defect, ModelState};

/// Limit of states, to bound memory.
const MAX_STATES: usize = 4_000_000;

/// Environment variable: number of additional faults per scenario. The search then takes minutes instead of seconds.
const EXTRA_FAULTS_ENV: &str = "OVERLAY_MODEL_FAULTS";

/// Three subnets.
const THREE_SUBNETS: &str = r#"{"Network":"10.1.0.0/16","SubnetMin":"10.1.10.0","SubnetMax":"10.1.12.0"}"#;
/// Two subnets.
const TWO_SUBNETS: &str = r#"{"Network":"10.1.0.0/16","SubnetMin":"10.1.10.0","SubnetMax":"10.1.11.0"}"#;
/// The same range with longer prefixes: a subnet of `TWO_SUBNETS` overlaps two of these.
const HALF_SIZE_SUBNETS: &str = r#"{"Network":"10.1.0.0/16","SubnetLen":25,"SubnetMin":"10.1.10.0","SubnetMax":"10.1.11.128"}"#;
/// Two families, with three and four subnets.
const DUAL: &str = r#"{"Network":"10.1.0.0/16","SubnetMin":"10.1.10.0","SubnetMax":"10.1.12.0","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetMin":"fd00:0:0:1::","IPv6SubnetMax":"fd00:0:0:4::"}"#;

/// Reservations that leave two free subnets in each family, but no index that is free in both. Different keys then share the
/// subnet of one family.
const CROSSED_RESERVATIONS: [&str; 3] = ["10.1.10.0-24", "fd00:0:0:2::-64", "fd00:0:0:3::-64"];

/// Result of a search.
#[derive(Debug)]
struct SearchResult {
    states: usize,
    steps: usize,
    quiescent: usize,
    /// The first violation, with the steps that lead to it.
    violation: Option<String>,
}

/// Explores all reachable states.
fn explore(start: ModelState) -> SearchResult {
    let mut numbers: HashMap<u64, u32> = HashMap::new();
    // For each state: the first predecessor with its step, and all predecessors without a fault.
    let mut predecessors: Vec<(u32, String)> = vec![(0, "start".to_owned())];
    let mut fault_free_predecessors: Vec<Vec<u32>> = vec![Vec::new()];
    let mut quiescent: Vec<u32> = Vec::new();
    let mut queue = VecDeque::from([(0u32, start.canonical())]);
    numbers.insert(start.canonical().fingerprint(), 0);
    let mut found = SearchResult { states: 1, steps: 0, quiescent: 0, violation: None };
    let path_to = |predecessors: &[(u32, String)], mut current: u32| {
        let mut steps = Vec::new();
        while current != 0 {
            let (from, label) = &predecessors[usize::try_from(current).unwrap()];
            steps.push(label.clone());
            current = *from;
        }
        steps.reverse();
        steps.join("\n  ")
    };
    while let Some((number, state)) = queue.pop_front() {
        let mut is_quiescent = true;
        for step in state.transitions() {
            found.steps += 1;
            let next = match step.outcome {
                Ok(next) => next.canonical(),
                Err(violation) => {
                    found.violation = Some(format!("{violation}:\n  {}\n  {}", path_to(&predecessors, number), step.label));
                    return found;
                }
            };
            let next_number = u32::try_from(predecessors.len()).unwrap();
            let target = *numbers.entry(next.fingerprint()).or_insert(next_number);
            is_quiescent &= step.fault || target == number;
            if target == next_number {
                predecessors.push((number, step.label));
                fault_free_predecessors.push(Vec::new());
                queue.push_back((next_number, next));
                assert!(predecessors.len() < MAX_STATES, "the scenario has more than {MAX_STATES} states");
            }
            // Faults are not guaranteed to occur: settling may only depend on steps without a fault.
            if !step.fault && target != number {
                fault_free_predecessors[usize::try_from(target).unwrap()].push(number);
            }
        }
        if is_quiescent {
            if let Some(violation) = state.quiescence_violation() {
                found.violation = Some(format!("settled, but {violation}:\n  {}\n{state:#?}", path_to(&predecessors, number)));
                return found;
            }
            quiescent.push(number);
        }
    }
    (found.states, found.quiescent) = (predecessors.len(), quiescent.len());
    let mut settles = vec![false; predecessors.len()];
    while let Some(number) = quiescent.pop() {
        let index = usize::try_from(number).unwrap();
        if !std::mem::replace(&mut settles[index], true) {
            quiescent.extend(&fault_free_predecessors[index]);
        }
    }
    if let Some(stuck) = settles.iter().position(|settles| !settles) {
        found.violation = Some(format!("never settles:\n  {}", path_to(&predecessors, u32::try_from(stuck).unwrap())));
    }
    found
}

#[track_caller]
fn assert_holds(what: &str, start: ModelState) {
    let found = explore(start);
    println!("{what}: {} states, {} steps, {} settled", found.states, found.steps, found.quiescent);
    if let Some(violation) = found.violation {
        panic!("{what}: {violation}");
    }
    assert!(found.states > 50 && found.quiescent > 0, "{what}: the search explored too little: {found:?}");
}

/// Asserts that the search finds the violation of a defective protocol.
#[track_caller]
fn assert_violates(what: &str, wanted: &str, start: ModelState) {
    let found = explore(start);
    let violation = found.violation.unwrap_or_else(|| panic!("{what}: {} states, but no violation found", found.states));
    println!("{what}: found after {} steps: {violation}\n", found.steps);
    assert!(violation.starts_with(wanted), "{what}: {violation}");
}

fn fault_budget(number: u8) -> u8 {
    number + std::env::var(EXTRA_FAULTS_ENV).map_or(0, |text| text.parse().expect("OVERLAY_MODEL_FAULTS is a number"))
}

#[test]
fn three_hosts_never_overlap() {
    assert_holds("three hosts, three subnets", ModelState::new(&[THREE_SUBNETS], &[], 3, fault_budget(0)));
}

#[test]
fn two_hosts_with_two_subnets_never_overlap() {
    assert_holds("two hosts, two subnets", ModelState::new(&[TWO_SUBNETS], &[], 2, fault_budget(1)));
}

#[test]
fn dual_stack_hosts_never_overlap() {
    assert_holds("two hosts, two families", ModelState::new(&[DUAL], &CROSSED_RESERVATIONS, 2, fault_budget(1)));
}

#[test]
fn configuration_change_causes_no_overlap() {
    assert_holds(
        "two hosts, shorter subnets than before",
        ModelState::new(&[TWO_SUBNETS, HALF_SIZE_SUBNETS], &[], 2, fault_budget(0)),
    );
    assert_holds(
        "two hosts, longer subnets than before",
        ModelState::new(&[HALF_SIZE_SUBNETS, TWO_SUBNETS], &[], 2, fault_budget(0)),
    );
}

#[test]
fn defective_protocols_are_detected() {
    let broken = |configs: &[&str], faults, defect| {
        let reserved = if configs == [DUAL] { &CROSSED_RESERVATIONS[..] } else { &[] };
        ModelState::new(configs, reserved, 2, faults).with_defect(defect)
    };
    assert_violates("entries are created without preconditions", "h", broken(&[TWO_SUBNETS], 0, Defect::UnconditionalCreate));
    assert_violates("only the own key is compared, with two families", "h", broken(&[DUAL], 0, Defect::UncheckedRange));
    assert_violates(
        "the configuration is not compared",
        "h",
        broken(&[TWO_SUBNETS, HALF_SIZE_SUBNETS], 0, Defect::UncheckedConfig),
    );
    assert_violates(
        "entries are changed and deleted without preconditions",
        "h",
        broken(&[TWO_SUBNETS], 2, Defect::UnconditionalChange),
    );
}
