//! Our accept rules in iptables' FORWARD chains (`ip filter FORWARD`, `ip6 filter FORWARD`).
//!
//! A DROP in these chains overrides the accept in our own table. A comment marks our rules. They are encoded as `iptables-nft`
//! does, so that `iptables -S` lists them and leaves them unchanged. `iptables-restore` writes the comment of saved rules as an
//! xtables match; we recognise such rules as ours and replace them.

use std::collections::BTreeSet;

use super::codec::{self, NLM_F_CREATE, Object, Writer};
use super::expr::{self, RuleEncoding};
use super::nfnl_socket::{ERESTART, NfnlSocket, TransactionError};
use super::table::hook_number;
use crate::model::{Cidr, Family};
use crate::plan::OpError;
use crate::plan::ruleset::{Expr, Hook, Rule};

/// The table and chain of iptables, the same in each family.
pub(super) const TABLE: &str = "filter";
pub(super) const CHAIN: &str = "FORWARD";

/// The comment that marks our rules.
const RULE_COMMENT: &str = crate::plan::ruleset::TABLE;

/// `NFTNL_UDATA_RULE_COMMENT`, libnftnl's `include/libnftnl/udata.h`: the type of a comment in a rule's user data. User data are
/// a list of type (1 byte), length (1 byte) and value; this value is a string with its terminating zero.
const NFTNL_UDATA_RULE_COMMENT: u8 = 0;

/// Maximum number of attempts to apply a change, if other processes change nf_tables meanwhile.
const MAX_RETRIES: u32 = 32;

/// The state of a family's FORWARD chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ForwardChain {
    /// The chain's policy is drop.
    pub(super) policy_drop: bool,
    /// Our rules by handle, in order.
    rules: Vec<(u64, Rule)>,
}

impl ForwardChain {
    /// The ranges that our rules accept, sorted; `None` without rules. If they are not exactly the two expected rules for each, it is
    /// the unspecified address with full prefix length. No network has this value, so it differs from every network and from `None`.
    pub(super) fn accepted_ranges(&self, family: Family) -> Option<Box<[Cidr]>> {
        let range = |rule: &Rule| match rule.exprs.first() {
            Some(Expr::Source { cidr, .. }) => Some(*cidr),
            _ => None,
        };
        let ranges: BTreeSet<Cidr> = self.rules.iter().filter_map(|(_, rule)| range(rule)).collect();
        let ranges: Box<[Cidr]> = ranges.into_iter().collect();
        let invalid = || Box::from([Cidr::host(family.unspecified())]);
        (!self.rules.is_empty()).then(|| if self.has_accept_rules(&ranges) { ranges } else { invalid() })
    }

    fn has_accept_rules(&self, ranges: &[Cidr]) -> bool {
        let mut wanted = ranges.iter().flat_map(|range| accept_rules(*range));
        self.rules.len() == 2 * ranges.len() && wanted.all(|wanted| self.rules.iter().any(|(_, rule)| *rule == wanted))
    }
}

/// The two accept rules of a range.
fn accept_rules(cidr: Cidr) -> [Rule; 2] {
    [Expr::Source { cidr, negate: false }, Expr::Destination { cidr, negate: false }]
        .map(|range| Rule { exprs: vec![range, Expr::Counter, Expr::Accept] })
}

/// Reads a family's chain. Call inside [`NfnlSocket::read_consistent`].
pub(super) fn read(socket: &mut NfnlSocket, family: Family) -> Result<ForwardChain, OpError> {
    let number = codec::protocol_number(family);
    let policy = |object: Object<'_>| {
        let hook = codec::attribute(object.attributes, codec::NFTA_CHAIN_HOOK)?;
        let forward = codec::attribute_u32(hook, codec::NFTA_HOOK_HOOKNUM)? == hook_number(Hook::Forward);
        forward.then(|| codec::attribute_u32(object.attributes, codec::NFTA_CHAIN_POLICY)).flatten()
    };
    let chain = |w: &mut Writer| {
        w.text(codec::NFTA_CHAIN_TABLE, TABLE);
        w.text(codec::NFTA_CHAIN_NAME, CHAIN);
    };
    let Some(policy) = socket.get(codec::NFT_MSG_GETCHAIN, number, chain, policy)? else {
        return Ok(ForwardChain { policy_drop: false, rules: Vec::new() });
    };
    let mut rules = Vec::new();
    let of_chain = |w: &mut Writer| write_rule_chain(w);
    socket.dump(codec::NFT_MSG_GETRULE, number, of_chain, |object| {
        let in_chain = codec::attribute_equals(object.attributes, codec::NFTA_RULE_TABLE, TABLE)
            && codec::attribute_equals(object.attributes, codec::NFTA_RULE_CHAIN, CHAIN);
        let ours = is_ours(object.attributes);
        let handle = codec::attribute(object.attributes, codec::NFTA_RULE_HANDLE).and_then(codec::be64);
        if let (true, true, Some(handle)) = (in_chain, ours, handle) {
            rules.push((handle, expr::read(object.attributes, RuleEncoding::Iptables(family))));
        }
    })?;
    Ok(ForwardChain { policy_drop: policy == Some(codec::NF_DROP), rules })
}

/// Replaces our rules by the two of each range. The rules stand at the head of the chain. Writes nothing if the rules are already
/// right.
pub(super) fn set(socket: &mut NfnlSocket, family: Family, ranges: &[Cidr]) -> Result<(), OpError> {
    let number = codec::protocol_number(family);
    let mut last = None;
    for _ in 0..MAX_RETRIES {
        let (present, generation) = socket.read_consistent(|socket| read(socket, family))?;
        if present.has_accept_rules(ranges) {
            return Ok(());
        }
        let new: Vec<Rule> = ranges.iter().flat_map(|range| accept_rules(*range)).collect();
        let count = present.rules.len() + new.len();
        let outcome = socket.commit(Some(generation), u32::try_from(count).unwrap_or(u32::MAX), |transaction| {
            for (handle, _) in &present.rules {
                transaction.push_message(codec::NFT_MSG_DELRULE, 0, number, |w| {
                    write_rule_chain(w);
                    w.u64(codec::NFTA_RULE_HANDLE, *handle);
                });
            }
            // Without `NLM_F_APPEND` the kernel inserts at the head, so the rules are sent in reverse order.
            for rule in new.iter().rev() {
                transaction.push_message(codec::NFT_MSG_NEWRULE, NLM_F_CREATE, number, |w| {
                    write_rule_chain(w);
                    expr::write(w, rule, RuleEncoding::Iptables(family));
                    w.bytes(codec::NFTA_RULE_USERDATA, &comment_user_data(RULE_COMMENT));
                });
            }
        });
        match outcome {
            Ok(()) => return Ok(()),
            // Another process was faster; nothing was changed. Read again.
            Err(TransactionError { error, .. }) if matches!(error.errno, ERESTART | libc::ENOBUFS) => last = Some(error),
            Err(TransactionError { error, .. }) => return Err(describe(error, family)),
        }
    }
    Err(describe(last.unwrap_or(OpError { errno: ERESTART, message: String::new() }), family))
}

fn write_rule_chain(w: &mut Writer) {
    w.text(codec::NFTA_RULE_TABLE, TABLE);
    w.text(codec::NFTA_RULE_CHAIN, CHAIN);
}

fn describe(error: OpError, family: Family) -> OpError {
    let table = match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    };
    let OpError { errno, message } = error;
    let message = match errno {
        libc::ENOENT => "no such chain: iptables does not filter forwarded packets of this family".to_owned(),
        ERESTART => {
            format!("nf_tables changed before each of {MAX_RETRIES} writes: find the process that rewrites it with `nft monitor`")
        }
        _ => message,
    };
    OpError { errno, message: format!("chain {table} {TABLE} {CHAIN}: {message}") }
}

fn comment_user_data(comment: &str) -> Vec<u8> {
    let length = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
    [&[NFTNL_UDATA_RULE_COMMENT, length], comment.as_bytes(), &[0]].concat()
}

/// Whether a rule has our comment, as user data or as an xtables match.
fn is_ours(attributes: &[u8]) -> bool {
    let text = codec::attribute(attributes, codec::NFTA_RULE_USERDATA)
        .and_then(rule_comment)
        .or_else(|| expr::comment_match(attributes));
    text == Some(RULE_COMMENT.as_bytes())
}

/// The comment in a rule's user data.
fn rule_comment(mut data: &[u8]) -> Option<&[u8]> {
    while let [kind, length, rest @ ..] = data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == NFTNL_UDATA_RULE_COMMENT {
            return Some(codec::strip_nul(value));
        }
        data = &rest[usize::from(*length)..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comment_is_found_after_other_user_data() {
        assert_eq!(rule_comment(&comment_user_data("overlayd")), Some(&b"overlayd"[..]));
        assert_eq!(rule_comment(&[&[7, 2, 1, 1][..], &comment_user_data("x")].concat()), Some(&b"x"[..]));
        assert_eq!(rule_comment(&[0, 200, 1]), None);
        assert_eq!(rule_comment(&[]), None);
    }

    #[test]
    fn incomplete_accept_rules_read_as_invalid() {
        let cidr: Cidr = "10.244.0.0/16".parse().expect("cidr");
        let [from, to] = accept_rules(cidr);
        let accepted = |rules: &[&Rule]| {
            let rules = rules.iter().zip(1..).map(|(rule, handle)| (handle, (*rule).clone())).collect();
            ForwardChain { policy_drop: true, rules }.accepted_ranges(Family::V4)
        };
        let invalid = Some(Box::from([Cidr::host(Family::V4.unspecified())]));
        assert_eq!(accepted(&[]), None);
        assert_eq!(accepted(&[&from, &to]), Some(Box::from([cidr])));
        assert_eq!(accepted(&[&from]), invalid);
        assert_eq!(accepted(&[&from, &from]), invalid);
        assert_eq!(accepted(&[&from, &to, &to]), invalid);
        assert_eq!(accepted(&[&Rule { exprs: vec![Expr::Foreign] }, &to]), invalid);
    }
}
