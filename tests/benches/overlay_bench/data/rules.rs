//! Rulesets for one path: the agents are frozen, and the agent's own writer removes and restores the tables.

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use clap::ValueEnum;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::nft::Nft;
use overlay_agent::plan::ruleset::{ChainKind, Expr, OVERLAY_CHAIN, Rule, Table};
use overlay_agent::plan::{Key, Op, OpError, Ruleset, State, Value};

/// A foreign firewall with connection tracking, like those of Docker, kube-proxy, firewalld and ufw.
const FIREWALL: &str = "add table inet others; add chain inet others c { type filter hook forward priority 10; }; \
                        add rule inet others c ct state established,related accept";

/// The loaded rulesets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rules {
    /// No rules.
    None,
    /// All our rules.
    All,
    /// Our bridge table, which filters packets from containers.
    Bridge,
    /// Our inet table.
    Inet,
    /// Our inet table without address translation, and so without conntrack.
    Stateless,
    /// All our rules, with the tunnel's packets in conntrack.
    Tracked,
    /// All our rules, and no conntrack for packets inside the overlay. Published ports and stateful firewalls would not work.
    InnerUntracked,
    /// None of ours, and a foreign firewall with conntrack.
    Others,
    /// All our rules and that firewall.
    AllAndOthers,
}

impl Rules {
    /// All rulesets, each with its baseline.
    pub const WITH_BASELINE: [(Rules, Option<Rules>); 9] = [
        (Rules::None, None),
        (Rules::All, Some(Rules::None)),
        (Rules::Bridge, Some(Rules::None)),
        (Rules::Inet, Some(Rules::None)),
        (Rules::Stateless, Some(Rules::None)),
        (Rules::Tracked, Some(Rules::None)),
        (Rules::InnerUntracked, Some(Rules::None)),
        (Rules::Others, Some(Rules::None)),
        (Rules::AllAndOthers, Some(Rules::Others)),
    ];

    /// The label in the table.
    pub const fn label(self) -> &'static str {
        match self {
            Rules::None => "no rules",
            Rules::All => "our rules",
            Rules::Bridge => "our rules of the bridge alone",
            Rules::Inet => "our rules of IP alone",
            Rules::Stateless => "our rules of IP but for NAT",
            Rules::Tracked => "our rules, the tunnel in conntrack",
            Rules::InnerUntracked => "our rules, nothing of the overlay in conntrack",
            Rules::Others => "a foreign firewall with conntrack",
            Rules::AllAndOthers => "our rules beside a foreign firewall with conntrack",
        }
    }

    const fn has_foreign_firewall(self) -> bool {
        matches!(self, Rules::Others | Rules::AllAndOthers)
    }

    /// The part of one of our tables that is loaded.
    fn select(self, ruleset: &Ruleset) -> Option<Ruleset> {
        match (self, ruleset.table) {
            (Rules::All | Rules::AllAndOthers, _) | (Rules::Bridge, Table::Bridge) | (Rules::Inet, Table::Inet) => {
                Some(ruleset.clone())
            }
            (Rules::Stateless, Table::Inet) => {
                let mut ruleset = ruleset.clone();
                ruleset.chains.retain(|chain| chain.base.is_none_or(|base| base.kind != ChainKind::Nat));
                Some(ruleset)
            }
            (Rules::Tracked | Rules::InnerUntracked, Table::Bridge) => Some(ruleset.clone()),
            (Rules::Tracked, Table::Inet) => {
                let mut ruleset = ruleset.clone();
                for chain in &mut ruleset.chains {
                    chain.rules.retain(|rule| !rule.exprs.contains(&Expr::Untrack));
                }
                Some(ruleset)
            }
            (Rules::InnerUntracked, Table::Inet) => {
                let mut ruleset = ruleset.clone();
                let overlay = ruleset.chains.iter().find(|chain| chain.name == OVERLAY_CHAIN);
                let overlay = overlay.map(|chain| chain.rules.iter().flat_map(|rule| rule.exprs.clone())).into_iter().flatten();
                let exprs = overlay.filter(|expr| !matches!(expr, Expr::Accept)).chain([Expr::Untrack]).collect();
                if let Some(chain) = ruleset.chains.iter_mut().find(|chain| chain.name == "incoming") {
                    chain.rules.insert(1, Rule { exprs });
                }
                Some(ruleset)
            }
            _ => None,
        }
    }
}

/// Switches a host's rules.
pub struct RulesetSwitch {
    netns: Netns,
    nft: Nft,
    /// The tables made by the agent.
    original: State,
    current: State,
    foreign_firewall: bool,
}

impl RulesetSwitch {
    /// Reads a host's rules, which must be both tables.
    pub fn new(netns: &Netns) -> anyhow::Result<RulesetSwitch> {
        let mut nft = netns.run(Nft::open)??;
        let agent_rules = nft.dump()?.rules;
        for table in Table::ALL {
            ensure!(agent_rules.contains_key(&Key::Ruleset(table)), "there is no table {table} overlayd to be measured");
        }
        Ok(RulesetSwitch {
            netns: netns.clone(),
            nft,
            current: agent_rules.clone(),
            original: agent_rules,
            foreign_firewall: false,
        })
    }

    /// Loads exactly these rules.
    pub fn set(&mut self, rules: Rules) -> anyhow::Result<()> {
        let deletions: Vec<Op> = self.current.iter().filter(|(key, _)| matches!(key, Key::Ruleset(_))).map(delete_op).collect();
        let tables: Vec<Ruleset> =
            self.original.values().filter_map(|value| as_ruleset(value).and_then(|r| rules.select(r))).collect();
        let is_selected = |key: &Key| matches!(key, Key::Element(e) if tables.iter().any(|t| t.sets.contains(&e.set()) && t.table == e.set().table()));
        let elements =
            self.original.iter().filter(|(key, _)| is_selected(key)).map(|(key, value)| Op::Set(key.clone(), value.clone()));
        let tables = tables.iter().map(|r| Op::Set(Key::Ruleset(r.table), Value::Ruleset(Box::new(r.clone()))));
        let additions: Vec<Op> = tables.chain(elements).collect();
        for ops in [deletions, additions].iter().filter(|ops| !ops.is_empty()) {
            first_error(self.nft.apply(ops, &mut self.current))?;
        }
        if rules.has_foreign_firewall() != self.foreign_firewall {
            let script = if rules.has_foreign_firewall() { FIREWALL } else { "delete table inet others" };
            let run = || Command::new("nft").arg(script).output();
            let output = self.netns.run(run)?.context("`nft` is needed: apt-get install nftables")?;
            ensure!(output.status.success(), "nft {script}: {}", String::from_utf8_lossy(&output.stderr).trim());
            self.foreign_firewall = rules.has_foreign_firewall();
        }
        Ok(())
    }

    /// Whether the kernel has the agent's rules again.
    pub fn is_restored(&mut self) -> anyhow::Result<bool> {
        Ok(self.nft.dump()?.rules == self.original)
    }
}

/// Loads these rules on all hosts, and waits for the kernel. It frees hooks once no processor uses them.
pub fn set_on_all(switches: &mut [RulesetSwitch], rules: Rules) -> anyhow::Result<()> {
    for switch in &mut *switches {
        switch.set(rules)?;
    }
    thread::sleep(Duration::from_millis(30));
    Ok(())
}

fn delete_op((key, value): (&Key, &Value)) -> Op {
    Op::Delete(key.clone(), value.clone())
}

fn as_ruleset(value: &Value) -> Option<&Ruleset> {
    match value {
        Value::Ruleset(ruleset) => Some(ruleset),
        _ => None,
    }
}

fn first_error(failed: Vec<(usize, OpError)>) -> anyhow::Result<()> {
    failed.into_iter().next().map_or(Ok(()), |(_, error)| Err(anyhow!(error)))
}
