//! What the rules of a namespace do with a packet that is not sent: its headers go through the expressions of each chain as the kernel would
//! have them go (`nft_do_chain` in net/netfilter/nf_tables_core.c). The packet is taken to be the first of its connection.
//!
//! What cannot be known beforehand (a limit, an unread match of xtables, a mark) makes a rule uncertain, and the verdict says so.

use serde::{Deserialize, Serialize};

use super::book::{Book, BookChain, BookRule, Place, family_word};
use super::expr::uapi::*;
use super::registers::{Registers, Truth};
use super::table::hook_number;
use super::wire::{self, NF_ACCEPT, NF_DROP, NFPROTO_BRIDGE, NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6};
use crate::kernel::trace::packet::Packet;
use crate::model::Family;
use crate::plan::ruleset::Hook;

/// Chains that jump to each other: the kernel allows 16 (`NFT_JUMP_STACK_SIZE`).
const DEPTH: usize = 16;
const NFT_GOTO: u32 = (-4_i32).cast_unsigned();
const NFT_CONTINUE: u32 = u32::MAX;

/// What becomes of a packet at a hook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// Where it is dropped; absent where it passes.
    pub dropped: Option<Place>,
    /// Rules before that which would let it pass, if they matched: that cannot be known beforehand.
    pub unless: Vec<Place>,
    /// Where it passes: rules that would drop it, if they matched.
    pub perhaps: Vec<Place>,
    /// Whether conntrack takes no notice of it from here on.
    pub untracked: bool,
    /// How it is translated, and where.
    pub translation: Option<(Translation, Place)>,
    /// The base chains that it goes through, each as `inet overlayd incoming`.
    pub chains: Vec<String>,
}

impl Judgement {
    /// Whether it is dropped whatever cannot be known.
    pub fn is_drop(&self) -> bool {
        self.dropped.is_some() && self.unless.is_empty()
    }
}

/// How an address of a packet is changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Translation {
    /// The destination becomes another; the port is absent where it stays.
    Destination {
        /// The new address; absent where it stays.
        address: Option<std::net::IpAddr>,
        /// The new port.
        port: Option<u16>,
    },
    /// The source becomes another.
    Source {
        /// The new address; absent where it stays.
        address: Option<std::net::IpAddr>,
    },
    /// The source becomes the address of the interface that the packet leaves by.
    Masquerade,
    /// Translated in a way that cannot be read.
    Unknown,
}

/// How a chain ended.
enum End {
    Accept,
    Drop(Place),
    /// Nothing decided.
    Through,
}

struct Judge<'a> {
    book: &'a Book,
    packet: &'a Packet,
    result: Judgement,
}

impl Book {
    /// Has the packet pass the chains of a hook, by their priorities. `bridge` asks for the chains that see frames, not packets.
    pub fn judge(&self, hook: Hook, bridge: bool, packet: &Packet) -> Judgement {
        let result = Judgement {
            dropped: None,
            unless: Vec::new(),
            perhaps: Vec::new(),
            untracked: packet.untracked,
            translation: None,
            chains: Vec::new(),
        };
        let mut judge = Judge { book: self, packet, result };
        let sees = |family: u8| match (bridge, packet.family) {
            (true, _) => family == NFPROTO_BRIDGE,
            (false, Family::V4) => matches!(family, NFPROTO_INET | NFPROTO_IPV4),
            (false, Family::V6) => matches!(family, NFPROTO_INET | NFPROTO_IPV6),
        };
        let mut chains: Vec<(i32, &BookChain)> = Vec::new();
        for chain in self.chains.iter().filter(|chain| sees(chain.family)) {
            chains.extend(chain.base.filter(|(number, _)| *number == hook_number(hook)).map(|(_, priority)| (priority, chain)));
        }
        chains.sort_by_key(|(priority, _)| *priority);
        for (_, chain) in chains {
            judge.result.chains.push(format!("{} {} {}", family_word(chain.family), chain.table, chain.name));
            match judge.chain(chain, 0, true) {
                End::Drop(place) => {
                    judge.result.dropped = Some(place);
                    break;
                }
                End::Accept => {}
                End::Through if chain.drops => {
                    judge.result.dropped = Some(place(chain, None));
                    break;
                }
                End::Through => {}
            }
        }
        judge.result
    }
}

fn place(chain: &BookChain, rule: Option<&BookRule>) -> Place {
    Place {
        family: family_word(chain.family).to_owned(),
        table: chain.table.clone(),
        chain: chain.name.clone(),
        handle: rule.map(|rule| rule.handle),
        comment: rule.and_then(|rule| rule.comment.clone()),
    }
}

/// What a rule decides.
enum Step {
    Accept,
    Drop,
    Jump(String),
    Goto(String),
    Return,
    Continue,
}

impl Judge<'_> {
    /// A chain's rules in order. `sure` is false where the jump that led here is uncertain: nothing is decided then, only noted.
    fn chain(&mut self, chain: &BookChain, depth: usize, sure: bool) -> End {
        for rule in &chain.rules {
            let mut registers = Registers::new(self.packet, self.book, chain, self.result.untracked);
            let (truth, step) = self.rule(chain, rule, &mut registers);
            let certain = sure && truth == Truth::Yes;
            match (truth, step) {
                (Truth::No, _) | (_, Step::Continue) => {}
                (_, Step::Accept) if certain => return End::Accept,
                (_, Step::Drop) if certain => return End::Drop(place(chain, Some(rule))),
                (_, Step::Accept) => self.result.unless.push(place(chain, Some(rule))),
                (_, Step::Drop) => self.result.perhaps.push(place(chain, Some(rule))),
                (_, Step::Return) if truth == Truth::Yes => return End::Through,
                // Nobody knows whether it goes on: the rules behind are followed, too.
                (_, Step::Return) => {}
                (_, Step::Jump(to)) => match self.jump(chain, &to, depth, certain) {
                    End::Through => {}
                    end => return end,
                },
                (_, Step::Goto(to)) => match self.jump(chain, &to, depth, certain) {
                    End::Through if certain => return End::Through,
                    End::Through => {}
                    end => return end,
                },
            }
        }
        End::Through
    }

    fn is_of(&self, family: u32) -> bool {
        let own = match self.packet.family {
            Family::V4 => NFPROTO_IPV4,
            Family::V6 => NFPROTO_IPV6,
        };
        family == u32::from(own)
    }

    fn jump(&mut self, from: &BookChain, name: &str, depth: usize, sure: bool) -> End {
        let book = self.book;
        let same = |chain: &&BookChain| chain.family == from.family && chain.table == from.table && chain.name == name;
        match book.chains.iter().find(same) {
            Some(chain) if depth < DEPTH => self.chain(chain, depth + 1, sure),
            _ => End::Through,
        }
    }

    fn rule(&mut self, chain: &BookChain, rule: &BookRule, registers: &mut Registers<'_>) -> (Truth, Step) {
        let mut truth = Truth::Yes;
        for (name, data) in &rule.exprs {
            let number = |kind| wire::number(data, kind);
            let step = match name.as_str() {
                "immediate" if number(NFTA_IMMEDIATE_DREG) == Some(NFT_REG_VERDICT) => {
                    wire::attribute(data, NFTA_IMMEDIATE_DATA).and_then(verdict)
                }
                "lookup" if number(NFTA_LOOKUP_DREG) == Some(NFT_REG_VERDICT) => match registers.lookup(data) {
                    Some((Truth::Yes, found)) => found.and_then(|data| verdict(&data)),
                    Some((Truth::No, _)) => return (Truth::No, Step::Continue),
                    _ => {
                        truth = truth.and(Truth::Unknown);
                        None
                    }
                },
                "reject" => Some(Step::Drop),
                "notrack" => {
                    self.result.untracked |= truth == Truth::Yes;
                    None
                }
                // In a table of both families each rule translates packets of one.
                "nat" if number(NFTA_NAT_FAMILY).is_some_and(|family| !self.is_of(family)) => None,
                "nat" | "masq" | "redir" => {
                    if truth == Truth::Yes {
                        self.result.translation = Some((registers.translation(name, data), place(chain, Some(rule))));
                    }
                    Some(Step::Accept)
                }
                "target" => match wire::attribute(data, NFTA_MATCH_NAME).map(wire::name).unwrap_or_default() {
                    b"REJECT" => Some(Step::Drop),
                    target @ (b"MASQUERADE" | b"DNAT" | b"SNAT" | b"REDIRECT") => {
                        let how = if target == b"MASQUERADE" { Translation::Masquerade } else { Translation::Unknown };
                        if truth == Truth::Yes {
                            self.result.translation = Some((how, place(chain, Some(rule))));
                        }
                        Some(Step::Accept)
                    }
                    _ => None,
                },
                _ => {
                    truth = truth.and(registers.execute(name, data));
                    None
                }
            };
            if truth == Truth::No {
                return (Truth::No, Step::Continue);
            }
            if let Some(step) = step {
                return (truth, step);
            }
        }
        (truth, Step::Continue)
    }
}

/// The verdict in a data attribute.
fn verdict(data: &[u8]) -> Option<Step> {
    let verdict = wire::attribute(data, NFTA_DATA_VERDICT)?;
    let chain = || {
        let name = wire::attribute(verdict, NFTA_VERDICT_CHAIN).map(wire::name).unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    };
    Some(match wire::number(verdict, NFTA_VERDICT_CODE)? {
        NF_DROP => Step::Drop,
        NFT_JUMP => Step::Jump(chain()),
        NFT_GOTO => Step::Goto(chain()),
        NFT_RETURN => Step::Return,
        NFT_CONTINUE => Step::Continue,
        NF_ACCEPT => Step::Accept,
        // A queue: some program decides.
        _ => Step::Accept,
    })
}
