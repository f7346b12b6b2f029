//! Our accept rules in the FORWARD chain of iptables (`ip filter FORWARD`, `ip6 filter FORWARD`).
//!
//! A DROP there wins over the accept in our own table. The rules are ours by their comment; they are written as `iptables-nft` writes
//! its own, so that `iptables -S` shows them and leaves them alone. What `iptables-restore` writes back from a saved copy of them has
//! the comment in the form of an xtables match: that is ours as well, and is replaced.

use super::channel::{Channel, ERESTART, Refused};
use super::expr::{self, Dialect};
use super::table::{hook_number, is_named};
use super::wire::{self, NLM_F_CREATE, Object, Writer};
use crate::model::{Cidr, Family};
use crate::plan::OpError;
use crate::plan::ruleset::{Expr, Hook, Rule};

/// The table and chain of iptables, in each family.
pub(super) const TABLE: &str = "filter";
pub(super) const CHAIN: &str = "FORWARD";

/// The comment by which a rule there is ours.
const COMMENT: &str = crate::plan::ruleset::TABLE;

/// `NFTNL_UDATA_RULE_COMMENT`, libnftnl's `include/libnftnl/udata.h`: the type of a comment in a rule's user data, which is a list of
/// type (1 byte), length (1 byte) and value, here a text with its terminating zero.
const UDATA_COMMENT: u8 = 0;

/// How often a change is computed anew because others changed nf_tables between reading and writing.
const TRIES: u32 = 32;

/// What a family's FORWARD chain holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Forward {
    /// Packets that no rule decides are dropped.
    pub(super) drops: bool,
    /// Our rules by handle, in order.
    rules: Vec<(u64, Rule)>,
}

impl Forward {
    /// The network that our rules there accept. Where they are not exactly the two that there should be, the unspecified address as
    /// a range of one, which no network is: so it differs from any, and from none.
    pub(super) fn accepted(&self, family: Family) -> Option<Cidr> {
        let (_, first) = self.rules.first()?;
        let cidr = match first.exprs.first() {
            Some(Expr::Source { cidr, .. } | Expr::Destination { cidr, .. }) => Some(*cidr),
            _ => None,
        };
        let damaged = Cidr::host(family.unspecified());
        Some(cidr.filter(|cidr| self.holds(*cidr)).unwrap_or(damaged))
    }

    fn holds(&self, cidr: Cidr) -> bool {
        self.rules.len() == 2 && rules(cidr).iter().all(|wanted| self.rules.iter().any(|(_, rule)| rule == wanted))
    }
}

/// The two rules for a network.
fn rules(cidr: Cidr) -> [Rule; 2] {
    [Expr::Source { cidr, negate: false }, Expr::Destination { cidr, negate: false }]
        .map(|range| Rule { exprs: vec![range, Expr::Counter, Expr::Accept] })
}

/// Reads a family's chain. To be called inside [`Channel::consistent`].
pub(super) fn read(channel: &mut Channel, family: Family) -> Result<Forward, OpError> {
    let number = expr::protocol_number(family);
    let policy = |object: Object<'_>| {
        let hook = wire::attribute(object.attributes, wire::NFTA_CHAIN_HOOK)?;
        let forward = wire::number(hook, wire::NFTA_HOOK_HOOKNUM)? == hook_number(Hook::Forward);
        forward.then(|| wire::number(object.attributes, wire::NFTA_CHAIN_POLICY)).flatten()
    };
    let chain = |w: &mut Writer| {
        w.text(wire::NFTA_CHAIN_TABLE, TABLE);
        w.text(wire::NFTA_CHAIN_NAME, CHAIN);
    };
    let Some(policy) = channel.get(wire::NFT_MSG_GETCHAIN, number, chain, policy)? else {
        return Ok(Forward { drops: false, rules: Vec::new() });
    };
    let mut rules = Vec::new();
    let of_chain = |w: &mut Writer| place(w);
    channel.dump(wire::NFT_MSG_GETRULE, number, of_chain, |object| {
        let here = is_named(object.attributes, wire::NFTA_RULE_TABLE, TABLE)
            && is_named(object.attributes, wire::NFTA_RULE_CHAIN, CHAIN);
        let ours = is_ours(object.attributes);
        let handle = wire::attribute(object.attributes, wire::NFTA_RULE_HANDLE).and_then(wire::be64);
        if let (true, true, Some(handle)) = (here, ours, handle) {
            rules.push((handle, expr::read(object.attributes, Dialect::Iptables(family))));
        }
    })?;
    Ok(Forward { drops: policy == Some(wire::NF_DROP), rules })
}

/// Makes our rules there the two for `wanted`, at the head of the chain, or none. Writes nothing where that is so already.
pub(super) fn set(channel: &mut Channel, family: Family, wanted: Option<Cidr>) -> Result<(), OpError> {
    let number = expr::protocol_number(family);
    let mut last = None;
    for _ in 0..TRIES {
        let (present, generation) = channel.consistent(|channel| read(channel, family))?;
        let done = match wanted {
            Some(cidr) => present.holds(cidr),
            None => present.rules.is_empty(),
        };
        if done {
            return Ok(());
        }
        let new = wanted.map(rules);
        let count = present.rules.len() + if new.is_some() { 2 } else { 0 };
        let outcome = channel.commit(Some(generation), u32::try_from(count).unwrap_or(u32::MAX), |transaction| {
            for (handle, _) in &present.rules {
                transaction.change(wire::NFT_MSG_DELRULE, 0, number, |w| {
                    place(w);
                    w.u64(wire::NFTA_RULE_HANDLE, *handle);
                });
            }
            // Without `NLM_F_APPEND` a rule becomes the first: so the last one goes first.
            for rule in new.iter().flatten().rev() {
                transaction.change(wire::NFT_MSG_NEWRULE, NLM_F_CREATE, number, |w| {
                    place(w);
                    expr::write(w, rule, Dialect::Iptables(family));
                    w.bytes(wire::NFTA_RULE_USERDATA, &user_data(COMMENT));
                });
            }
        });
        match outcome {
            Ok(()) => return Ok(()),
            // Others were faster: nothing was changed, look again.
            Err(Refused { error, .. }) if matches!(error.errno, ERESTART | libc::ENOBUFS) => last = Some(error),
            Err(Refused { error, .. }) => return Err(describe(error, family)),
        }
    }
    Err(describe(last.unwrap_or(OpError { errno: ERESTART, message: String::new() }), family))
}

fn place(w: &mut Writer) {
    w.text(wire::NFTA_RULE_TABLE, TABLE);
    w.text(wire::NFTA_RULE_CHAIN, CHAIN);
}

fn describe(error: OpError, family: Family) -> OpError {
    let table = match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    };
    let OpError { errno, message } = error;
    let message = match errno {
        libc::ENOENT => "there is no such chain: nothing of iptables stands in the way of this family".to_owned(),
        ERESTART => format!("nf_tables changed before each of {TRIES} writes: find what rewrites it so often with `nft monitor`"),
        _ => message,
    };
    OpError { errno, message: format!("chain {table} {TABLE} {CHAIN}: {message}") }
}

fn user_data(comment: &str) -> Vec<u8> {
    let length = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
    [&[UDATA_COMMENT, length], comment.as_bytes(), &[0]].concat()
}

/// Whether a rule has our comment, in either form.
fn is_ours(attributes: &[u8]) -> bool {
    let text =
        wire::attribute(attributes, wire::NFTA_RULE_USERDATA).and_then(comment).or_else(|| expr::comment_match(attributes));
    text == Some(COMMENT.as_bytes())
}

/// The comment in a rule's user data.
fn comment(mut data: &[u8]) -> Option<&[u8]> {
    while let [kind, length, rest @ ..] = data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == UDATA_COMMENT {
            return Some(wire::name(value));
        }
        data = &rest[usize::from(*length)..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_are_found_behind_other_data() {
        assert_eq!(comment(&user_data("overlayd")), Some(&b"overlayd"[..]));
        assert_eq!(comment(&[&[7, 2, 1, 1][..], &user_data("x")].concat()), Some(&b"x"[..]));
        assert_eq!(comment(&[0, 200, 1]), None);
        assert_eq!(comment(&[]), None);
    }

    #[test]
    fn a_half_set_differs_from_all() {
        let cidr: Cidr = "10.244.0.0/16".parse().expect("cidr");
        let [from, to] = rules(cidr);
        let accepted = |rules: &[&Rule]| {
            let rules = rules.iter().zip(1..).map(|(rule, handle)| (handle, (*rule).clone())).collect();
            Forward { drops: true, rules }.accepted(Family::V4)
        };
        let damaged = Some(Cidr::host(Family::V4.unspecified()));
        assert_eq!(accepted(&[]), None);
        assert_eq!(accepted(&[&from, &to]), Some(cidr));
        assert_eq!(accepted(&[&from]), damaged);
        assert_eq!(accepted(&[&from, &from]), damaged);
        assert_eq!(accepted(&[&from, &to, &to]), damaged);
        assert_eq!(accepted(&[&Rule { exprs: vec![Expr::Foreign] }, &to]), damaged);
    }
}
