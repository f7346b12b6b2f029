//! Formats a ruleset exactly as `nft -s list table inet overlayd` prints it. An operator can compare the two.

use std::fmt;

use super::{Base, Chain, ChainKind, Expr, Field, Hook, Rule, Ruleset, SetFieldType, SetName, TABLE, Table};
use crate::model::{Cidr, Family};

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Table::Inet => "inet",
            Table::Bridge => "bridge",
        })
    }
}

impl fmt::Display for Ruleset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table {} {TABLE} {{", self.table)?;
        for object in &self.foreign {
            writeln!(f, "\t# not ours: {object}")?;
        }
        let counters = self.counters.iter().map(|counter| format!("\tcounter {} {{\n\t}}\n", counter.name()));
        let sets = self.sets.iter().map(|set| set_text(*set));
        let chains = self.chains.iter().map(|chain| ChainInTable(chain, self.table).to_string());
        for (index, part) in counters.chain(sets).chain(chains).enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            f.write_str(&part)?;
        }
        writeln!(f, "}}")
    }
}

fn set_text(set: SetName) -> String {
    let types = |types: Vec<SetFieldType>| types.iter().map(ToString::to_string).collect::<Vec<_>>().join(" . ");
    let (kind, data_type) =
        if set.data().is_empty() { ("set", String::new()) } else { ("map", format!(" : {}", types(set.data()))) };
    let flags = if set.has_ranges() { "\t\tflags interval\n" } else { "" };
    format!("\t{kind} {} {{\n\t\ttype {}{data_type}\n{flags}\t}}\n", set.name(), types(set.key()))
}

impl fmt::Display for SetFieldType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SetFieldType::Address(Family::V4) => "ipv4_addr",
            SetFieldType::Address(Family::V6) => "ipv6_addr",
            SetFieldType::Mac => "ether_addr",
            SetFieldType::Protocol => "inet_proto",
            SetFieldType::Port => "inet_service",
            SetFieldType::Interface => "ifname",
        })
    }
}

/// A chain with its table, which determines the names of priorities.
struct ChainInTable<'a>(&'a Chain, Table);

impl fmt::Display for ChainInTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ChainInTable(chain, table) = self;
        writeln!(f, "\tchain {} {{", chain.name)?;
        if let Some(Base { hook, kind, priority }) = chain.base {
            let priority = Priority { table: *table, hook, value: priority };
            writeln!(f, "\t\ttype {kind} hook {hook} priority {priority}; policy accept;")?;
        }
        for rule in &chain.rules {
            writeln!(f, "\t\t{rule}")?;
        }
        writeln!(f, "\t}}")
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let udp = Expr::Field { field: Field::Layer4, negate: false, value: vec![17] };
        let port = |expr: &Expr| matches!(expr, Expr::Field { field: Field::DestinationPort, .. });
        // `nft` leaves out a match that another match implies. A protocol's field implies the protocol. A UDP port implies UDP,
        // but not the layer 3 protocol.
        let is_udp_port_match = self.exprs.contains(&udp) && self.exprs.iter().any(port);
        let matches = |expr: &Expr| matches!(expr, Expr::Field { .. } | Expr::In { .. });
        let of_protocol = !is_udp_port_match && self.exprs.iter().filter(|expr| matches(expr)).count() > 1;
        let is_printed = |expr: &&Expr| match expr {
            Expr::Field { field: Field::Protocol, .. } => !of_protocol,
            expr => !is_udp_port_match || **expr != udp,
        };
        for (index, expr) in self.exprs.iter().filter(is_printed).enumerate() {
            if index > 0 {
                f.write_str(" ")?;
            }
            match expr.to_string() {
                text if is_udp_port_match && port(expr) => f.write_str(&text.replacen("th", "udp", 1))?,
                text => f.write_str(&text)?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expr::Source { cidr, negate } => write_address_match(f, "saddr", *cidr, *negate),
            Expr::Destination { cidr, negate } => write_address_match(f, "daddr", *cidr, *negate),
            Expr::Range { field, first, last, negate } => {
                write!(f, "{field} {}{first}-{last}", if *negate { "!= " } else { "" })
            }
            Expr::InputInterface(name) => write!(f, "iifname \"{name}\""),
            Expr::OutputInterface(name) => write!(f, "oifname \"{name}\""),
            Expr::Field { field, negate, value } => write_comparison(f, *field, *negate, value),
            Expr::ToThisHost => f.write_str("fib daddr type local"),
            Expr::Translated => f.write_str("ct status dnat"),
            Expr::AddressTranslated => f.write_str("ct status snat,dnat"),
            Expr::In { fields, set } => write!(f, "{} @{}", concatenation(fields), set.name()),
            Expr::Translate { fields, map } => {
                let ip = match map {
                    SetName::Bound(family) | SetName::Ports(family) => family_keyword(*family),
                    _ => "?",
                };
                write!(f, "dnat {ip} to {} map @{}", concatenation(fields), map.name())
            }
            Expr::Counter => f.write_str("counter"),
            Expr::Count(counter) => write!(f, "counter name \"{}\"", counter.name()),
            Expr::Accept => f.write_str("accept"),
            Expr::Drop => f.write_str("drop"),
            Expr::Return => f.write_str("return"),
            Expr::Jump(chain) => write!(f, "jump {chain}"),
            Expr::Masquerade => f.write_str("masquerade random,fully-random"),
            Expr::Untrack => f.write_str("notrack"),
            Expr::Foreign => f.write_str("# not ours"),
        }
    }
}

/// Writes a comparison; known numbers appear by name.
fn write_comparison(f: &mut fmt::Formatter<'_>, field: Field, negate: bool, value: &[u8]) -> fmt::Result {
    let number = value.iter().fold(0_u128, |number, byte| number << 8 | u128::from(*byte));
    let text = match (field, value) {
        (Field::InputInterface | Field::OutputInterface, value) if value.len() < 16 => {
            format!("\"{}*\"", String::from_utf8_lossy(value))
        }
        (Field::InputInterface | Field::OutputInterface, value) => {
            format!("\"{}\"", String::from_utf8_lossy(value).trim_end_matches('\0'))
        }
        (Field::Protocol, [0x08, 0x00]) => "ip".to_owned(),
        (Field::Protocol, [0x08, 0x06]) => "arp".to_owned(),
        (Field::Protocol, [0x86, 0xdd]) => "ip6".to_owned(),
        (Field::Layer4 | Field::NextHeader, [17]) => "udp".to_owned(),
        (Field::Layer4 | Field::NextHeader, [58]) => "ipv6-icmp".to_owned(),
        (Field::Transport { .. }, _) => format!("{number:#x}"),
        _ => number.to_string(),
    };
    write!(f, "{field} {}{text}", if negate { "!= " } else { "" })
}

fn concatenation(fields: &[Field]) -> String {
    fields.iter().map(ToString::to_string).collect::<Vec<_>>().join(" . ")
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Field::InputInterface => f.write_str("iifname"),
            Field::OutputInterface => f.write_str("oifname"),
            Field::Protocol => f.write_str("meta protocol"),
            Field::Layer4 => f.write_str("meta l4proto"),
            Field::EtherSource => f.write_str("ether saddr"),
            Field::Source(family) => write!(f, "{} saddr", family_keyword(*family)),
            Field::Destination(family) => write!(f, "{} daddr", family_keyword(*family)),
            Field::NextHeader => f.write_str("ip6 nexthdr"),
            Field::PayloadLength => f.write_str("ip6 length"),
            Field::ArpSenderMac => f.write_str("arp saddr ether"),
            Field::ArpSenderAddress => f.write_str("arp saddr ip"),
            Field::DestinationPort => f.write_str("th dport"),
            Field::Transport { offset, length, prefix } => {
                write!(f, "@th,{},{}", u32::from(*offset) * 8, u32::from(*length) * 8)?;
                let mask = u128::MAX << (length * 8).saturating_sub(*prefix).min(127);
                let mask = mask & (u128::MAX >> (128 - u32::from(*length) * 8));
                if *prefix < length * 8 { write!(f, " & {mask:#x}") } else { Ok(()) }
            }
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

fn write_address_match(f: &mut fmt::Formatter<'_>, field: &str, cidr: Cidr, negate: bool) -> fmt::Result {
    write!(f, "{} {field} {}", family_keyword(cidr.family()), if negate { "!= " } else { "" })?;
    if cidr.length() == cidr.family().bits() { write!(f, "{}", cidr.base()) } else { write!(f, "{cidr}") }
}

const fn family_keyword(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// A priority as `nft` prints it: by name if within ten of a named one.
struct Priority {
    table: Table,
    hook: Hook,
    value: i32,
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // nft(8), "Standard priority names". The third value is the only hook for which the name is valid.
        const NAMES: [(&str, i32, Option<Hook>); 6] = [
            ("raw", -300, None),
            ("mangle", -150, None),
            ("dstnat", -100, Some(Hook::Prerouting)),
            ("filter", 0, None),
            ("security", 50, None),
            ("srcnat", 100, Some(Hook::Postrouting)),
        ];
        // The bridge family has other names (`linux/netfilter_bridge.h`), of which we use one.
        const BRIDGE: [(&str, i32, Option<Hook>); 1] = [("dstnat", -300, Some(Hook::Prerouting))];
        let names = match self.table {
            Table::Inet => NAMES.as_slice(),
            Table::Bridge => BRIDGE.as_slice(),
        };
        let nearest = names
            .iter()
            .filter(|(_, _, hook)| hook.is_none_or(|hook| hook == self.hook))
            .find(|(_, value, _)| self.value.abs_diff(*value) <= 10);
        match nearest {
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
    fn ruleset_text_matches_nft() {
        let base = |hook, kind, priority| Some(Base { hook, kind, priority });
        let chain = |name: &str, base, rule| Chain { name: name.to_owned(), base, rules: vec![rule] };
        let negated = Expr::Source { cidr: "10.1.2.3/32".parse().expect("a cidr"), negate: true };
        let rules = Ruleset {
            chains: vec![
                chain(
                    "forward",
                    base(Hook::Forward, ChainKind::Filter, -5),
                    Rule { exprs: vec![negated, Expr::Counter, Expr::Drop] },
                ),
                chain("postrouting", base(Hook::Postrouting, ChainKind::Nat, 300), Rule { exprs: vec![Expr::Masquerade] }),
            ],
            foreign: vec!["set extra".to_owned()],
            ..Ruleset::default()
        };
        let text = "\
table inet overlayd {
\t# not ours: set extra
\tchain forward {
\t\ttype filter hook forward priority filter - 5; policy accept;
\t\tip saddr != 10.1.2.3 counter drop
\t}

\tchain postrouting {
\t\ttype nat hook postrouting priority 300; policy accept;
\t\tmasquerade random,fully-random
\t}
}
";
        assert_eq!(rules.to_string(), text);
    }
}
