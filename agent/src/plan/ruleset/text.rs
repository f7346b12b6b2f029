//! A ruleset as text, word for word as `nft -s list table inet overlayd` prints it, so that a person can compare the two.

use std::fmt;

use super::{Chain, ChainKind, Expr, Hook, Rule, Ruleset, TABLE};
use crate::model::{Cidr, Family};

impl fmt::Display for Ruleset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {TABLE} {{")?;
        for thing in &self.foreign {
            writeln!(f, "\t# not ours: {thing}")?;
        }
        for (index, chain) in self.chains.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            chain.fmt(f)?;
        }
        writeln!(f, "}}")
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\tchain {} {{", self.name)?;
        let priority = Priority { hook: self.hook, value: self.priority };
        writeln!(f, "\t\ttype {} hook {} priority {priority}; policy accept;", self.kind, self.hook)?;
        for rule in &self.rules {
            writeln!(f, "\t\t{rule}")?;
        }
        writeln!(f, "\t}}")
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, expr) in self.exprs.iter().enumerate() {
            if index > 0 {
                f.write_str(" ")?;
            }
            expr.fmt(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expr::Source { cidr, negate } => address(f, "saddr", *cidr, *negate),
            Expr::Destination { cidr, negate } => address(f, "daddr", *cidr, *negate),
            Expr::InputInterface(name) => write!(f, "iifname \"{name}\""),
            Expr::Counter => f.write_str("counter"),
            Expr::Accept => f.write_str("accept"),
            Expr::Drop => f.write_str("drop"),
            Expr::Masquerade => f.write_str("masquerade random,fully-random"),
            Expr::Foreign => f.write_str("# not ours"),
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        })
    }
}

impl fmt::Display for ChainKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
        })
    }
}

fn address(f: &mut fmt::Formatter<'_>, field: &str, cidr: Cidr, negate: bool) -> fmt::Result {
    let protocol = match cidr.family() {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    };
    write!(f, "{protocol} {field} {}", if negate { "!= " } else { "" })?;
    if cidr.length() == cidr.family().bits() { write!(f, "{}", cidr.base()) } else { write!(f, "{cidr}") }
}

/// A priority by name where it is within ten of one that has a name, as `nft` prints it.
struct Priority {
    hook: Hook,
    value: i32,
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // nft(8), "Standard priority names"; the last column is the one hook in which the name holds.
        const NAMES: [(&str, i32, Option<Hook>); 6] = [
            ("raw", -300, None),
            ("mangle", -150, None),
            ("dstnat", -100, Some(Hook::Prerouting)),
            ("filter", 0, None),
            ("security", 50, None),
            ("srcnat", 100, Some(Hook::Postrouting)),
        ];
        let near = NAMES
            .iter()
            .filter(|(_, _, hook)| hook.is_none_or(|hook| hook == self.hook))
            .find(|(_, value, _)| self.value.abs_diff(*value) <= 10);
        match near {
            Some((name, value, _)) if self.value == *value => f.write_str(name),
            Some((name, value, _)) if self.value > *value => write!(f, "{name} + {}", self.value.abs_diff(*value)),
            Some((name, value, _)) => write!(f, "{name} - {}", self.value.abs_diff(*value)),
            None => write!(f, "{}", self.value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_like_nft() {
        let cidr = |text: &str| text.parse().expect(text);
        let rule = |exprs: &[Expr]| Rule { exprs: exprs.to_vec() };
        let rules = Ruleset {
            chains: vec![
                Chain {
                    name: "forward".to_owned(),
                    hook: Hook::Forward,
                    kind: ChainKind::Filter,
                    priority: -5,
                    rules: vec![
                        rule(&[Expr::Source { cidr: cidr("10.1.2.3/32"), negate: true }, Expr::Counter, Expr::Drop]),
                        rule(&[Expr::InputInterface("ovb.1".to_owned()), Expr::Accept]),
                    ],
                },
                Chain {
                    name: "postrouting".to_owned(),
                    hook: Hook::Postrouting,
                    kind: ChainKind::Nat,
                    priority: 300,
                    rules: vec![rule(&[Expr::Destination { cidr: cidr("fd00::/8"), negate: false }, Expr::Masquerade])],
                },
            ],
            foreign: vec!["chain extra".to_owned()],
        };
        let text = "\
table inet overlayd {
\t# not ours: chain extra
\tchain forward {
\t\ttype filter hook forward priority filter - 5; policy accept;
\t\tip saddr != 10.1.2.3 counter drop
\t\tiifname \"ovb.1\" accept
\t}

\tchain postrouting {
\t\ttype nat hook postrouting priority 300; policy accept;
\t\tip6 daddr fd00::/8 masquerade random,fully-random
\t}
}
";
        assert_eq!(rules.to_string(), text);
    }
}
