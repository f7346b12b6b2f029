//! The table `inet overlayd`: written as a whole in one transaction, read as a whole.

use super::channel::{Channel, Refused, Transaction};
use super::expr::{self, Dialect, IFNAMSIZ};
use super::wire::{self, NFPROTO_INET, NLM_F_APPEND, NLM_F_CREATE, Object, Writer};
use crate::plan::OpError;
use crate::plan::ruleset::{Chain, ChainKind, Expr, Hook, Ruleset, TABLE};

/// What a table can hold beside chains, and how it is asked for. Each is asked for and named by the same attributes: 1, the table,
/// and 2, its own name.
const OTHERS: [(u8, &str); 3] =
    [(wire::NFT_MSG_GETSET, "set"), (wire::NFT_MSG_GETOBJ, "object"), (wire::NFT_MSG_GETFLOWTABLE, "flowtable")];

/// `NFTA_SET_NAME`, `NFTA_OBJ_NAME`, `NFTA_FLOWTABLE_NAME`.
const NFTA_OTHER_NAME: u16 = 2;

/// Replaces the table, whatever it held, in one transaction: no packet sees anything between.
pub(super) fn replace(channel: &mut Channel, ruleset: &Ruleset) -> Result<(), OpError> {
    check(ruleset)?;
    let rules: usize = ruleset.chains.iter().map(|chain| chain.rules.len()).sum();
    let total = u32::try_from(3 + ruleset.chains.len() + rules)
        .map_err(|_| OpError { errno: libc::E2BIG, message: "more rules than a transaction can number".to_owned() })?;
    let changes = |transaction: &mut Transaction| {
        // Made first so that the deletion always finds one.
        table(transaction, wire::NFT_MSG_NEWTABLE, NLM_F_CREATE);
        table(transaction, wire::NFT_MSG_DELTABLE, 0);
        table(transaction, wire::NFT_MSG_NEWTABLE, NLM_F_CREATE);
        for chain in &ruleset.chains {
            new_chain(transaction, chain);
        }
        for chain in &ruleset.chains {
            for rule in &chain.rules {
                transaction.change(wire::NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, NFPROTO_INET, |w| {
                    w.text(wire::NFTA_RULE_TABLE, TABLE);
                    w.text(wire::NFTA_RULE_CHAIN, &chain.name);
                    expr::write(w, rule, Dialect::Inet);
                });
            }
        }
    };
    channel.commit(None, total, changes).map_err(|refused| describe(refused, ruleset))
}

/// Deletes the table with all that is in it. That there is none is success.
pub(super) fn delete(channel: &mut Channel) -> Result<(), OpError> {
    match channel.commit(None, 1, |transaction| table(transaction, wire::NFT_MSG_DELTABLE, 0)) {
        Err(Refused { error, .. }) if error.errno != libc::ENOENT => {
            Err(OpError { errno: error.errno, message: format!("deleting table inet {TABLE}: {}", error.message) })
        }
        _ => Ok(()),
    }
}

/// Reads the table; `None` where there is none. To be called inside [`Channel::consistent`].
pub(super) fn read(channel: &mut Channel) -> Result<Option<Ruleset>, OpError> {
    let flags = |object: Object<'_>| wire::number(object.attributes, wire::NFTA_TABLE_FLAGS).unwrap_or(0);
    let named = |w: &mut Writer| w.text(wire::NFTA_TABLE_NAME, TABLE);
    let Some(flags) = channel.get(wire::NFT_MSG_GETTABLE, NFPROTO_INET, named, flags)? else { return Ok(None) };

    let mut ruleset = Ruleset::default();
    if flags != 0 {
        ruleset.foreign.push(format!("flags {flags:#x}"));
    }
    // Chains cannot be asked for by table.
    channel.dump(
        wire::NFT_MSG_GETCHAIN,
        NFPROTO_INET,
        |_| {},
        |object| {
            if is_named(object.attributes, wire::NFTA_CHAIN_TABLE, TABLE) {
                match read_chain(object.attributes) {
                    Ok(chain) => ruleset.chains.push(chain),
                    Err(words) => ruleset.foreign.push(words),
                }
            }
        },
    )?;
    for (message, what) in OTHERS {
        channel.dump(message, NFPROTO_INET, named, |object| {
            if is_named(object.attributes, wire::NFTA_TABLE_NAME, TABLE) {
                let name = wire::attribute(object.attributes, NFTA_OTHER_NAME).map(wire::name).unwrap_or_default();
                ruleset.foreign.push(format!("{what} {}", String::from_utf8_lossy(name)));
            }
        })?;
    }
    let of_table = |w: &mut Writer| w.text(wire::NFTA_RULE_TABLE, TABLE);
    channel.dump(wire::NFT_MSG_GETRULE, NFPROTO_INET, of_table, |object| {
        if !is_named(object.attributes, wire::NFTA_RULE_TABLE, TABLE) {
            return;
        }
        let name = wire::attribute(object.attributes, wire::NFTA_RULE_CHAIN).map(wire::name).unwrap_or_default();
        if let Some(chain) = ruleset.chains.iter_mut().find(|chain| chain.name.as_bytes() == name) {
            chain.rules.push(expr::read(object.attributes, None));
        }
    })?;
    Ok(Some(ruleset))
}

/// Whether a text attribute has that value.
pub(super) fn is_named(attributes: &[u8], kind: u16, name: &str) -> bool {
    wire::attribute(attributes, kind).is_some_and(|value| wire::name(value) == name.as_bytes())
}

fn table(transaction: &mut Transaction, message: u8, flags: u16) {
    transaction.change(message, flags, NFPROTO_INET, |w| w.text(wire::NFTA_TABLE_NAME, TABLE));
}

fn new_chain(transaction: &mut Transaction, chain: &Chain) {
    transaction.change(wire::NFT_MSG_NEWCHAIN, NLM_F_CREATE, NFPROTO_INET, |w| {
        w.text(wire::NFTA_CHAIN_TABLE, TABLE);
        w.text(wire::NFTA_CHAIN_NAME, &chain.name);
        w.nest(wire::NFTA_CHAIN_HOOK, |w| {
            w.u32(wire::NFTA_HOOK_HOOKNUM, hook_number(chain.hook));
            w.u32(wire::NFTA_HOOK_PRIORITY, chain.priority.cast_unsigned());
        });
        w.u32(wire::NFTA_CHAIN_POLICY, wire::NF_ACCEPT);
        w.text(wire::NFTA_CHAIN_TYPE, kind_name(chain.kind));
    });
}

/// The chain, or in words what it is where no [`Chain`] can say it.
fn read_chain(attributes: &[u8]) -> Result<Chain, String> {
    let name = wire::attribute(attributes, wire::NFTA_CHAIN_NAME).map(wire::name).unwrap_or_default();
    let name = String::from_utf8_lossy(name).into_owned();
    let hook = wire::attribute(attributes, wire::NFTA_CHAIN_HOOK).ok_or_else(|| format!("chain {name}"))?;
    let other = |what: &str| format!("chain {name} with {what}");
    let policy = wire::number(attributes, wire::NFTA_CHAIN_POLICY);
    if policy != Some(wire::NF_ACCEPT) {
        return Err(other("another policy than accept"));
    }
    let flags = wire::number(attributes, wire::NFTA_CHAIN_FLAGS).unwrap_or(wire::NFT_CHAIN_BASE);
    let on_device = [wire::NFTA_HOOK_DEV, wire::NFTA_HOOK_DEVS].iter().any(|kind| wire::attribute(hook, *kind).is_some());
    if flags != wire::NFT_CHAIN_BASE || on_device {
        return Err(other("flags or devices"));
    }
    let kind = wire::attribute(attributes, wire::NFTA_CHAIN_TYPE).map(wire::name);
    let kind = [ChainKind::Filter, ChainKind::Nat].into_iter().find(|k| kind == Some(kind_name(*k).as_bytes()));
    let number = wire::number(hook, wire::NFTA_HOOK_HOOKNUM);
    let hook_name = HOOKS.into_iter().find(|hook| number == Some(hook_number(*hook)));
    let priority = wire::number(hook, wire::NFTA_HOOK_PRIORITY);
    match (kind, hook_name, priority) {
        (Some(kind), Some(hook), Some(priority)) => {
            Ok(Chain { hook, kind, priority: priority.cast_signed(), rules: Vec::new(), name })
        }
        _ => Err(other("another type or hook")),
    }
}

const HOOKS: [Hook; 5] = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];

/// `enum nf_inet_hooks`, `linux/netfilter.h`.
pub(super) const fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

const fn kind_name(kind: ChainKind) -> &'static str {
    match kind {
        ChainKind::Filter => "filter",
        ChainKind::Nat => "nat",
    }
}

/// Refuses what has no form in the kernel, before anything is sent.
fn check(ruleset: &Ruleset) -> Result<(), OpError> {
    let refuse = |message: String| Err(OpError { errno: libc::EINVAL, message });
    if let Some(thing) = ruleset.foreign.first() {
        return refuse(format!("table inet {TABLE} cannot be written with `{thing}`, which was read and is not ours"));
    }
    for chain in &ruleset.chains {
        for (index, rule) in chain.rules.iter().enumerate() {
            for expr in &rule.exprs {
                match expr {
                    Expr::Foreign => {
                        return refuse(format!("rule {} of chain {} was read and is not ours", index + 1, chain.name));
                    }
                    Expr::InputInterface(name) if name.is_empty() || name.len() >= IFNAMSIZ || name.contains('\0') => {
                        return refuse(format!(
                            "interface name `{}` in rule {} of chain {}: 1 to 15 bytes are allowed",
                            name.escape_default(),
                            index + 1,
                            chain.name
                        ));
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

/// Names the part that the kernel refused.
fn describe(refused: Refused, ruleset: &Ruleset) -> OpError {
    let index = refused.index.and_then(|index| usize::try_from(index).ok());
    let part = match index.map(|index| index.checked_sub(3)) {
        Some(Some(index)) => {
            let chains = ruleset.chains.iter().map(|chain| format!("chain {}", chain.name));
            let rules = ruleset
                .chains
                .iter()
                .flat_map(|chain| chain.rules.iter().map(move |rule| format!("rule `{rule}` of chain {}", chain.name)));
            chains.chain(rules).nth(index).unwrap_or_default()
        }
        _ => String::new(),
    };
    let comma = if part.is_empty() { "" } else { ", " };
    let OpError { errno, message } = refused.error;
    OpError { errno, message: format!("table inet {TABLE}{comma}{part}: {message}") }
}
