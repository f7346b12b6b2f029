//! Rules as nft prints them, and the way of a packet through them.
//!
//! What a rule says that is not known here makes it uncertain: such a rule is taken to be possible, never to be sure. So a finding that is certain is one, and
//! one that is not says so.

use std::collections::BTreeMap;

use super::packet::{Packet, Ternary};

/// How deep chains may call each other; the kernel's own limit is 16 (`NFT_JUMP_STACK_SIZE`).
const MAX_JUMP_DEPTH: usize = 16;

/// All rules of one kind of table.
#[derive(Debug, Default)]
pub(super) struct Ruleset {
    /// By family, table and chain, as `ip filter INPUT`.
    chains: BTreeMap<String, Chain>,
    /// Elements by family, table and set.
    sets: BTreeMap<String, Vec<String>>,
    /// They are `iptables-legacy_ruleset`'s.
    legacy: bool,
}

#[derive(Debug, Default)]
struct Chain {
    base: Option<Base>,
    rules: Vec<String>,
}

#[derive(Debug, Clone)]
struct Base {
    hook: String,
    /// `filter`, `nat` or `route`.
    kind: String,
    priority: i32,
    drops: bool,
}

/// Where a packet ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dropped {
    /// `table_name ip filter, chain INPUT`.
    pub(super) place: String,
    /// The rule's text, or the chain's policy.
    pub(super) rule: String,
    /// The base chain, as nft's commands name it.
    pub(super) chain: String,
    /// The chains on the way.
    pub(super) path: Vec<String>,
    /// Whether nothing on the way is in doubt.
    pub(super) certain: bool,
    /// Whether the rule is `iptables-legacy_ruleset`'s, to whose chains the agent adds nothing.
    pub(super) legacy: bool,
}

impl Dropped {
    /// Whether iptables wrote the chain: it uses capitals and tables of fixed names.
    pub(super) fn is_iptables(&self) -> bool {
        ["ip filter ", "ip6 filter ", "ip mangle ", "ip6 mangle ", "ip raw ", "ip6 raw "]
            .iter()
            .any(|table| self.chain.starts_with(table))
            && self.chain.rsplit(' ').next().is_some_and(|chain| chain.chars().all(|c| c.is_ascii_uppercase()))
    }

    /// Whether the chain's policy decided.
    pub(super) fn is_policy(&self) -> bool {
        self.rule.starts_with("policy")
    }
}

/// What became of a packet in a chain.
enum ChainResult {
    /// Accepted in this base chain.
    Accepted,
    /// Nobody decided.
    NoVerdict,
    /// Dropped, by this rule of that chain.
    Dropped { chain: String, rule: String },
}

/// What is noted on the way through one base chain.
#[derive(Default)]
struct ChainTrace {
    path: Vec<String>,
    /// A rule that may have accepted the packet.
    maybe_accepted: bool,
    /// The first rule that may have dropped it.
    maybe_dropped: Option<(String, String)>,
}

/// One rule's outcome for a packet: whether it matches, and what it does then.
struct RuleResult {
    matches: Ternary,
    verdict: Verdict,
}

enum Verdict {
    None,
    Accept,
    Drop,
    Return,
    Call { chain: String, back: bool },
}

impl Ruleset {
    /// What `nft -a filter ruleset` prints.
    pub(super) fn parse(text: &str) -> Ruleset {
        let mut rules = Ruleset::default();
        let (mut table, mut inner) = (String::new(), String::new());
        let mut elements = String::new();
        for line in text.lines() {
            // Handles and iptables-nft's remarks stand behind `#`, which nft quotes in comments.
            let line = line.trim();
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["table", family, name, "{", ..] => table = format!("{family} {name}"),
                ["chain", name, "{", ..] => {
                    inner = format!("{table} {name}");
                    rules.chains.entry(inner.clone()).or_default();
                }
                ["set" | "map", name, "{", ..] => {
                    inner = format!("{table} {name}");
                    rules.sets.entry(inner.clone()).or_default();
                }
                ["}", ..] => {}
                ["elements", "=", ..] => {
                    elements = format!(" {}", line.split_once('{').map(|(_, rest)| rest).unwrap_or_default());
                }
                ["type", kind, "hook", hook, ..] => {
                    let base = Base::parse(kind, hook, line);
                    rules.chains.entry(inner.clone()).or_default().base = Some(base);
                }
                [] => {}
                _ if !elements.is_empty() => elements += line,
                _ => {
                    if let Some(chain) = rules.chains.get_mut(&inner) {
                        chain.rules.push(line.to_owned());
                    }
                }
            }
            if let Some((list, _)) = elements.split_once('}') {
                rules.sets.entry(inner.clone()).or_default().extend(split_list(list));
                elements.clear();
            }
        }
        rules
    }

    /// What `iptables-restore-translate` prints: nft's commands.
    pub(super) fn parse_commands(text: &str) -> Ruleset {
        let mut rules = Ruleset { legacy: true, ..Ruleset::default() };
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["add", "chain", family, table, chain, rest @ ..] => {
                    let entry = rules.chains.entry(format!("{family} {table} {chain}")).or_default();
                    if let ["{", "type", kind, "hook", hook, ..] = rest {
                        entry.base = Some(Base::parse(kind, hook, line));
                    }
                }
                ["add", "rule", family, table, chain, ..] => {
                    let text = line.splitn(6, ' ').nth(5).unwrap_or_default().to_owned();
                    rules.chains.entry(format!("{family} {table} {chain}")).or_default().rules.push(text);
                }
                _ => {}
            }
        }
        rules
    }

    /// The first thing that drops the packet, in tables that have another name than `ours`.
    pub(super) fn verdict(&self, packet: &Packet, ours: &str) -> Option<Dropped> {
        let family = match packet.family() {
            overlay_agent::model::Family::V4 => "ip",
            overlay_agent::model::Family::V6 => "ip6",
        };
        for hook in packet.hook.passes() {
            let mut bases: Vec<(&String, &Chain, &Base)> = self
                .chains
                .iter()
                .filter_map(|(name, chain)| Some((name, chain, chain.base.as_ref()?)))
                .filter(|(name, _, base)| {
                    let mut words = name.split(' ');
                    let of_family = words.next().is_some_and(|word| word == family || word == "inet");
                    of_family && words.next() != Some(ours) && base.hook == *hook && base.kind == "filter"
                })
                .collect();
            bases.sort_by_key(|(.., base)| base.priority);
            for (name, _, base) in bases {
                let mut way = ChainTrace::default();
                let end = self.walk(name, packet, &mut way, 0);
                let dropped = match end {
                    ChainResult::Accepted => None,
                    ChainResult::NoVerdict if base.drops => Some((name.clone(), "policy drop".to_owned())),
                    ChainResult::NoVerdict => None,
                    ChainResult::Dropped { chain, rule } => Some((chain, rule)),
                };
                let certain = dropped.is_some() && !way.maybe_accepted;
                let Some((chain, rule)) = dropped.or(way.maybe_dropped) else { continue };
                let parts: Vec<&str> = chain.split(' ').collect();
                let place = match parts.as_slice() {
                    [family, table, chain] => {
                        let legacy = if self.legacy { " (iptables-legacy)" } else { "" };
                        format!("table {family} {table}, chain {chain}{legacy}")
                    }
                    _ => chain.clone(),
                };
                return Some(Dropped { place, rule, chain: name.clone(), path: way.path, certain, legacy: self.legacy });
            }
        }
        None
    }

    fn walk(&self, name: &str, packet: &Packet, way: &mut ChainTrace, depth: usize) -> ChainResult {
        let Some(chain) = self.chains.get(name).filter(|_| depth < MAX_JUMP_DEPTH) else { return ChainResult::NoVerdict };
        let table = name.rsplit_once(' ').map_or(name, |(table, _)| table);
        way.path.push(name.rsplit(' ').next().unwrap_or(name).to_owned());
        for rule in &chain.rules {
            let RuleResult { matches, verdict } = self.effect(rule, table, packet);
            if matches == Ternary::False {
                continue;
            }
            let sure = matches == Ternary::True;
            match verdict {
                Verdict::None => {}
                Verdict::Accept if sure => return ChainResult::Accepted,
                Verdict::Accept => way.maybe_accepted = true,
                Verdict::Drop if sure => return ChainResult::Dropped { chain: name.to_owned(), rule: rule.clone() },
                Verdict::Drop => {
                    way.maybe_dropped.get_or_insert((name.to_owned(), rule.clone()));
                }
                Verdict::Return if sure => return ChainResult::NoVerdict,
                Verdict::Return => way.maybe_accepted = true,
                Verdict::Call { chain: called, back } => {
                    let end = self.walk(&format!("{table} {called}"), packet, way, depth + 1);
                    match (end, sure) {
                        (ChainResult::NoVerdict, true) if back => {}
                        (ChainResult::NoVerdict, true) => return ChainResult::NoVerdict,
                        (ChainResult::NoVerdict, false) => {}
                        (end, true) => return end,
                        (ChainResult::Accepted, false) => way.maybe_accepted = true,
                        (ChainResult::Dropped { chain, rule }, false) => {
                            way.maybe_dropped.get_or_insert((chain, rule));
                        }
                    }
                }
            }
        }
        ChainResult::NoVerdict
    }

    fn effect(&self, rule: &str, table: &str, packet: &Packet) -> RuleResult {
        let words = tokens(rule);
        let mut matches = Ternary::True;
        let mut at = 0;
        let and = |matches: &mut Ternary, found: Ternary| {
            *matches = match (*matches, found) {
                (Ternary::False, _) | (_, Ternary::False) => Ternary::False,
                (Ternary::Unknown, _) | (_, Ternary::Unknown) => Ternary::Unknown,
                _ => Ternary::True,
            };
        };
        let verdict = |verdict: Verdict, matches: Ternary| RuleResult { matches, verdict };
        while at < words.len() {
            let word = words[at].as_str();
            at += 1;
            match word {
                "accept" => return verdict(Verdict::Accept, matches),
                "drop" | "reject" => return verdict(Verdict::Drop, matches),
                "return" => return verdict(Verdict::Return, matches),
                "jump" | "goto" => {
                    let chain = words.get(at).cloned().unwrap_or_default();
                    return verdict(Verdict::Call { chain, back: word == "jump" }, matches);
                }
                "queue" => return verdict(Verdict::Accept, Ternary::Unknown),
                "counter" => {
                    if words.get(at).is_some_and(|word| word == "packets") {
                        at += 4;
                    }
                }
                "comment" => at += 1,
                "log" => {
                    while words
                        .get(at)
                        .is_some_and(|word| matches!(word.as_str(), "prefix" | "level" | "group" | "flags" | "snaplen"))
                    {
                        at += 2;
                    }
                }
                // What is set on a packet decides nothing.
                "notrack" => {}
                _ => {
                    let Some((key, used)) = key(&words[at - 1..]) else {
                        and(&mut matches, Ternary::Unknown);
                        continue;
                    };
                    at += used - 1;
                    let negated = words.get(at).is_some_and(|word| word == "!=");
                    at += usize::from(negated || words.get(at).is_some_and(|word| word == "=="));
                    let Some(value) = words.get(at) else { break };
                    at += 1;
                    if value == "vmap" {
                        let decided = self.mapped(&key, words.get(at).map(String::as_str).unwrap_or_default(), packet);
                        return RuleResult { matches: meet(matches, decided.matches), verdict: decided.verdict };
                    }
                    if value == "set" {
                        // `meta mark set 1`: a value, no match.
                        at += 1;
                        continue;
                    }
                    let found = match self.values(value, table) {
                        Some(values) => packet.is(&key, &values),
                        None => Ternary::Unknown,
                    };
                    let found = match (found, negated) {
                        (Ternary::True, true) => Ternary::False,
                        (Ternary::False, true) if of_other_protocol(&key, packet) => Ternary::False,
                        (Ternary::False, true) => Ternary::True,
                        (found, _) => found,
                    };
                    and(&mut matches, found);
                }
            }
        }
        verdict(Verdict::None, matches)
    }

    /// The values that a word stands for: `{ 1, 2 }`, `@set`, `a,b`, or itself.
    fn values(&self, word: &str, table: &str) -> Option<Vec<String>> {
        if let Some(name) = word.strip_prefix('@') {
            return self.sets.get(&format!("{table} {name}")).cloned();
        }
        Some(split_list(word.trim_start_matches('{').trim_end_matches('}')))
    }

    /// `KEY vmap { VALUE : VERDICT, ... }`.
    fn mapped(&self, key: &str, map: &str, packet: &Packet) -> RuleResult {
        if !map.starts_with('{') {
            return RuleResult { matches: Ternary::Unknown, verdict: Verdict::Drop };
        }
        for pair in map.trim_matches(['{', '}']).split(',') {
            let Some((value, verdict)) = pair.split_once(" : ") else { continue };
            if packet.is(key, &[value.trim().to_owned()]) != Ternary::True {
                continue;
            }
            let words: Vec<&str> = verdict.split_whitespace().collect();
            let verdict = match words.as_slice() {
                ["accept"] => Verdict::Accept,
                ["drop"] => Verdict::Drop,
                ["return"] => Verdict::Return,
                ["jump", chain] => Verdict::Call { chain: (*chain).to_owned(), back: true },
                ["goto", chain] => Verdict::Call { chain: (*chain).to_owned(), back: false },
                _ => Verdict::None,
            };
            return RuleResult { matches: Ternary::True, verdict };
        }
        RuleResult { matches: Ternary::False, verdict: Verdict::None }
    }
}

impl Base {
    fn parse(kind: &str, hook: &str, line: &str) -> Base {
        let priority = line.split_once("priority ").map_or("0", |(_, rest)| rest.split(';').next().unwrap_or("0"));
        Base {
            hook: hook.to_owned(),
            kind: kind.to_owned(),
            priority: number(priority),
            drops: line.split_once("policy ").is_some_and(|(_, rest)| rest.starts_with("drop")),
        }
    }
}

/// A priority: a number, a name, or `filter + 10` (`nft(8)`, "Standard priority names").
fn number(text: &str) -> i32 {
    text.split_whitespace()
        .fold((0, 1), |(sum, sign), word| match word {
            "+" => (sum, 1),
            "-" => (sum, -1),
            "raw" => (sum - 300, 1),
            "mangle" => (sum - 150, 1),
            "dstnat" => (sum - 100, 1),
            "filter" => (sum, 1),
            "security" => (sum + 50, 1),
            "srcnat" => (sum + 100, 1),
            word => (sum + sign * word.parse::<i32>().unwrap_or(0), 1),
        })
        .0
}

/// `udp dport != 1` is about UDP only: of a packet of another protocol it is not true either.
fn of_other_protocol(key: &str, packet: &Packet) -> bool {
    let protocol = match key.split(' ').next() {
        Some(word @ ("udp" | "tcp" | "sctp")) => word,
        Some("ip" | "ip6") => {
            return packet.is(&format!("{} daddr", &key[..key.find(' ').unwrap_or(0)]), &[packet.destination.to_string()])
                == Ternary::False;
        }
        Some("icmp" | "icmpv6") => return true,
        _ => return false,
    };
    packet.is("meta l4proto", &[protocol.to_owned()]) == Ternary::False
}

fn meet(a: Ternary, b: Ternary) -> Ternary {
    match (a, b) {
        (Ternary::False, _) | (_, Ternary::False) => Ternary::False,
        (Ternary::True, Ternary::True) => Ternary::True,
        _ => Ternary::Unknown,
    }
}

/// The key that the words begin with, and how many of them it is.
fn key(words: &[String]) -> Option<(String, usize)> {
    let word = |at: usize| words.get(at).map(String::as_str).unwrap_or_default();
    let first = word(0);
    let length = match first {
        "iifname" | "oifname" | "iif" | "oif" | "pkttype" | "mark" | "skuid" => 1,
        "fib" => 3,
        "meta" if matches!(word(1), "iifname" | "oifname" | "iif" | "oif") => return Some((word(1).to_owned(), 2)),
        "ip" | "ip6" | "udp" | "tcp" | "th" | "sctp" | "meta" | "ct" | "icmp" | "icmpv6" | "ether" => 2,
        _ => return None,
    };
    let key: Vec<&str> = (0..length).map(word).collect();
    Some((key.join(" "), length))
}

/// Words; what stands in quotes or braces is one. What follows `#` is nft's remark.
fn tokens(rule: &str) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    let (mut word, mut quoted, mut depth) = (String::new(), false, 0usize);
    for c in rule.chars() {
        match c {
            '#' if !quoted && depth == 0 => break,
            '"' => {
                quoted = !quoted;
                word.push(c);
            }
            '{' if !quoted => {
                depth += 1;
                word.push(c);
            }
            '}' if !quoted => {
                depth = depth.saturating_sub(1);
                word.push(c);
            }
            c if c.is_whitespace() && !quoted && depth == 0 => {
                if !word.is_empty() {
                    all.push(std::mem::take(&mut word));
                }
            }
            c => word.push(c),
        }
    }
    if !word.is_empty() {
        all.push(word);
    }
    all
}

/// The elements of a list; what follows an element (`timeout`, `counter`, `rule_comment`) is left off.
fn split_list(text: &str) -> Vec<String> {
    let first = |element: &str| element.split_whitespace().next().map(str::to_owned);
    text.split(',').filter_map(first).collect()
}
