//! Evaluates the nf_tables rules of a namespace for a packet that is not sent.
//!
//! The packet headers go through the expressions of each chain as in the kernel (`nft_do_chain` in
//! net/netfilter/nf_tables_core.c). The packet is assumed to be the first of its connection.
//!
//! A rule is uncertain if it depends on state that cannot be predicted: a limit, an unsupported xtables match, an unknown mark.
//! The result lists such rules.

use serde::{Deserialize, Serialize};

use super::codec::{self, NF_ACCEPT, NF_DROP, NFPROTO_BRIDGE, NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6};
use super::expr::uapi::*;
use super::registers::{MatchResult, Registers};
use super::snapshot::{ChainDump, RuleDump, RuleRef, RulesetSnapshot, family_name};
use super::table::hook_number;
use super::translation::{PossibleTranslation, Translation};
use super::xtables;
use crate::kernel::packet::Packet;
use crate::model::Family;
use crate::plan::ruleset::Hook;

/// Maximum depth of jumps between chains, as in the kernel.
const NFT_JUMP_STACK_SIZE: usize = 16;
const NFT_GOTO: u32 = (-4_i32).cast_unsigned();
const NFT_CONTINUE: u32 = u32::MAX;

/// The outcome for a packet at a hook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvalResult {
    /// The rule or policy that drops the packet; absent if it passes.
    pub dropped: Option<RuleRef>,
    /// Earlier rules of the same base chain that may accept the packet, whose match is uncertain.
    pub possible_accepts: Vec<RuleRef>,
    /// Rules that may drop the packet, whose match is uncertain.
    pub possible_drops: Vec<RuleRef>,
    /// Whether conntrack ignores the packet from here on.
    pub untracked: bool,
    /// The translation, and its rule.
    pub translation: Option<(Translation, RuleRef)>,
    /// Further translations, by rules whose match is uncertain.
    #[serde(skip)]
    pub possible_translations: Vec<PossibleTranslation>,
    /// The base chains that the packet traverses, each as `inet overlayd incoming`.
    pub chains: Vec<String>,
}

impl EvalResult {
    /// Whether the packet is dropped regardless of uncertain rules.
    pub fn is_certain_drop(&self) -> bool {
        self.dropped.is_some() && self.possible_accepts.is_empty()
    }
}

/// The outcome of a chain.
enum ChainOutcome {
    Accept(RuleRef),
    Drop(RuleRef),
    /// A userspace program or an unsupported expression decides.
    Undecided(RuleRef),
    /// No rule gave a verdict.
    NoVerdict,
}

struct Evaluator<'a> {
    snapshot: &'a RulesetSnapshot,
    packet: &'a Packet,
    result: EvalResult,
    /// The chains entered from the current base chain, which is the first.
    path: Vec<String>,
}

impl RulesetSnapshot {
    /// Evaluates the chains of a hook in priority order. `bridge` selects the bridge chains, which see frames, instead of the IP
    /// chains.
    pub fn evaluate(&self, hook: Hook, bridge: bool, packet: &Packet) -> EvalResult {
        let result = EvalResult {
            dropped: None,
            possible_accepts: Vec::new(),
            possible_drops: Vec::new(),
            untracked: packet.untracked,
            translation: None,
            possible_translations: Vec::new(),
            chains: Vec::new(),
        };
        let mut evaluator = Evaluator { snapshot: self, packet, result, path: Vec::new() };
        let applies_to = |family: u8| match (bridge, packet.family) {
            (true, _) => family == NFPROTO_BRIDGE,
            (false, Family::V4) => matches!(family, NFPROTO_INET | NFPROTO_IPV4),
            (false, Family::V6) => matches!(family, NFPROTO_INET | NFPROTO_IPV6),
        };
        let mut chains: Vec<(i32, &ChainDump)> = Vec::new();
        for chain in self.chains.iter().filter(|chain| applies_to(chain.family)) {
            chains.extend(chain.base.filter(|(number, _)| *number == hook_number(hook)).map(|(_, priority)| (priority, chain)));
        }
        chains.sort_by_key(|(priority, _)| *priority);
        for (_, chain) in chains {
            // NAT requires a connection (`nf_nat_inet_fn` in net/netfilter/nf_nat_core.c).
            if chain.is_nat && evaluator.result.untracked {
                continue;
            }
            evaluator.result.chains.push(format!("{} {} {}", family_name(chain.family), chain.table, chain.name));
            evaluator.path.clear();
            let outcome = evaluator.eval_chain(chain, 0);
            let dropped = match outcome {
                ChainOutcome::Drop(rule) => Some(rule),
                ChainOutcome::NoVerdict if chain.policy_drop => Some(evaluator.rule_ref(chain, None)),
                ChainOutcome::Undecided(rule) => {
                    evaluator.result.possible_drops.push(rule);
                    None
                }
                ChainOutcome::Accept(_) | ChainOutcome::NoVerdict => None,
            };
            if dropped.is_some() {
                evaluator.result.dropped = dropped;
                break;
            }
            // An accept ends only its own base chain, which the packet passes either way.
            evaluator.result.possible_accepts.clear();
        }
        evaluator.result
    }
}

/// The verdict of a rule.
enum Verdict {
    Accept,
    Drop,
    Jump(String),
    Goto(String),
    Return,
    Continue,
    Undecided,
}

impl Evaluator<'_> {
    fn rule_ref(&self, chain: &ChainDump, rule: Option<&RuleDump>) -> RuleRef {
        RuleRef {
            family: family_name(chain.family).to_owned(),
            table: chain.table.clone(),
            chain: chain.name.clone(),
            handle: rule.map(|rule| rule.handle),
            comment: rule.and_then(|rule| rule.comment.clone()),
            path: self.path.clone(),
        }
    }

    /// Evaluates a chain's rules in order. The outcome is certain if the chain is entered; uncertain outcomes on the way are
    /// recorded in the result.
    fn eval_chain(&mut self, chain: &ChainDump, depth: usize) -> ChainOutcome {
        self.path.push(chain.name.clone());
        // Unknown after a return or goto whose match is uncertain.
        let mut reachable = MatchResult::True;
        for rule in &chain.rules {
            let mut registers = Registers::new(self.packet, self.snapshot, chain, self.result.untracked);
            let (matched, verdict) = self.eval_rule(chain, rule, &mut registers);
            if matched == MatchResult::False {
                continue;
            }
            let outcome = match verdict {
                Verdict::Continue => continue,
                Verdict::Accept => ChainOutcome::Accept(self.rule_ref(chain, Some(rule))),
                Verdict::Drop => ChainOutcome::Drop(self.rule_ref(chain, Some(rule))),
                Verdict::Undecided => ChainOutcome::Undecided(self.rule_ref(chain, Some(rule))),
                Verdict::Return => ChainOutcome::NoVerdict,
                Verdict::Jump(target) => match self.eval_jump(chain, &target, depth) {
                    ChainOutcome::NoVerdict => continue,
                    outcome => outcome,
                },
                Verdict::Goto(target) => self.eval_jump(chain, &target, depth),
            };
            if matched.and(reachable) == MatchResult::True {
                return outcome;
            }
            match outcome {
                ChainOutcome::Accept(rule) => self.result.possible_accepts.push(rule),
                ChainOutcome::Drop(rule) => self.result.possible_drops.push(rule),
                ChainOutcome::Undecided(rule) => {
                    self.result.possible_accepts.push(rule.clone());
                    self.result.possible_drops.push(rule);
                }
                ChainOutcome::NoVerdict => reachable = MatchResult::Unknown,
            }
            // The rule matches, so the chain ends here if it is evaluated this far.
            if matched == MatchResult::True {
                return ChainOutcome::NoVerdict;
            }
        }
        ChainOutcome::NoVerdict
    }

    fn is_packet_family(&self, family: u32) -> bool {
        let own = match self.packet.family {
            Family::V4 => NFPROTO_IPV4,
            Family::V6 => NFPROTO_IPV6,
        };
        family == u32::from(own)
    }

    fn eval_jump(&mut self, caller: &ChainDump, name: &str, depth: usize) -> ChainOutcome {
        let snapshot = self.snapshot;
        let is_target = |chain: &&ChainDump| chain.family == caller.family && chain.table == caller.table && chain.name == name;
        match snapshot.chains.iter().find(is_target) {
            Some(chain) if depth < NFT_JUMP_STACK_SIZE => self.eval_chain(chain, depth + 1),
            _ => ChainOutcome::NoVerdict,
        }
    }

    /// Adds a translation whose match is uncertain; `key` is that of a map's element.
    fn add_possible_translation(&mut self, chain: &ChainDump, rule: &RuleDump, translation: Translation, key: &[u8]) {
        // The fields of a key are padded to four bytes: protocol and port are the last two of a published port's.
        let published = match key.last_chunk::<8>() {
            Some([protocol, 0, 0, 0, high, low, 0, 0]) => Some((*protocol, u16::from_be_bytes([*high, *low]))),
            _ => None,
        };
        let rule = self.rule_ref(chain, Some(rule));
        self.result.possible_translations.push(PossibleTranslation { translation, rule, published });
    }

    fn eval_rule(&mut self, chain: &ChainDump, rule: &RuleDump, registers: &mut Registers<'_>) -> (MatchResult, Verdict) {
        let mut matched = MatchResult::True;
        for (name, data) in &rule.exprs {
            let number = |kind| codec::attribute_u32(data, kind);
            let verdict = match name.as_str() {
                "immediate" if number(NFTA_IMMEDIATE_DREG) == Some(NFT_REG_VERDICT) => {
                    codec::attribute(data, NFTA_IMMEDIATE_DATA).and_then(parse_verdict)
                }
                "lookup" if number(NFTA_LOOKUP_DREG) == Some(NFT_REG_VERDICT) => match registers.lookup(data) {
                    Some((MatchResult::True, found)) => found.and_then(|data| parse_verdict(&data)),
                    Some((MatchResult::False, _)) => return (MatchResult::False, Verdict::Continue),
                    _ => {
                        matched = MatchResult::Unknown;
                        Some(Verdict::Undecided)
                    }
                },
                "reject" => Some(Verdict::Drop),
                // A userspace program decides, or the SYN proxy, which consumes packets.
                "queue" | "synproxy" => Some(Verdict::Undecided),
                "notrack" => {
                    self.result.untracked |= matched == MatchResult::True;
                    None
                }
                // In an inet table, a NAT rule only translates packets of its own family.
                "nat" if number(NFTA_NAT_FAMILY).is_some_and(|family| !self.is_packet_family(family)) => None,
                "nat" | "masq" | "redir" => {
                    if matched == MatchResult::True {
                        self.result.translation = Some((registers.translation(name, data), self.rule_ref(chain, Some(rule))));
                    } else {
                        for (translation, key) in registers.possible_translations(name, data) {
                            self.add_possible_translation(chain, rule, translation, &key);
                        }
                    }
                    Some(Verdict::Accept)
                }
                "target" => match codec::attribute(data, NFTA_MATCH_NAME).map(codec::strip_nul).unwrap_or_default() {
                    b"REJECT" => Some(Verdict::Drop),
                    b"MASQUERADE" | b"DNAT" | b"SNAT" | b"REDIRECT" => {
                        let translation = xtables::translation(data, self.packet.family);
                        if matched == MatchResult::True {
                            self.result.translation = Some((translation, self.rule_ref(chain, Some(rule))));
                        } else {
                            self.add_possible_translation(chain, rule, translation, &[]);
                        }
                        Some(Verdict::Accept)
                    }
                    // These change the packet or its connection, or report it.
                    b"CHECKSUM" | b"CLASSIFY" | b"CONNMARK" | b"CONNSECMARK" | b"CT" | b"DSCP" | b"HL" | b"LOG" | b"MARK"
                    | b"NFLOG" | b"NOTRACK" | b"SECMARK" | b"SET" | b"TCPMSS" | b"TEE" | b"TOS" | b"TRACE" | b"TTL" => None,
                    _ => {
                        matched = MatchResult::Unknown;
                        Some(Verdict::Undecided)
                    }
                },
                _ => {
                    matched = matched.and(registers.execute(name, data));
                    None
                }
            };
            if matched == MatchResult::False {
                return (MatchResult::False, Verdict::Continue);
            }
            if let Some(verdict) = verdict {
                return (matched, verdict);
            }
        }
        (matched, Verdict::Continue)
    }
}

/// Decodes the verdict in a data attribute.
fn parse_verdict(data: &[u8]) -> Option<Verdict> {
    let verdict = codec::attribute(data, NFTA_DATA_VERDICT)?;
    let chain = || {
        let name = codec::attribute(verdict, NFTA_VERDICT_CHAIN).map(codec::strip_nul).unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    };
    Some(match codec::attribute_u32(verdict, NFTA_VERDICT_CODE)? {
        NF_DROP => Verdict::Drop,
        NFT_JUMP => Verdict::Jump(chain()),
        NFT_GOTO => Verdict::Goto(chain()),
        NFT_RETURN => Verdict::Return,
        NFT_CONTINUE => Verdict::Continue,
        NF_ACCEPT => Verdict::Accept,
        // A queue.
        _ => Verdict::Undecided,
    })
}
