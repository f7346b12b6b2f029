//! Tests that write and read our tables, list them with `nft`, and alter them from outside.

use super::*;
use crate::plan::ruleset::{Base, Chain, ChainKind, Expr, Field, Hook, Rule, source_filter};

#[test]
fn written_tables_read_back() {
    in_netns(|| {
        let mut tables = Tables::open();
        assert_eq!(tables.ruleset(), None);
        for config in [ipv4(), ipv6(), dual()] {
            for [masquerade, publishes] in [[true, true], [true, false], [false, true], [false, false]] {
                let rules = ruleset(&config, masquerade, publishes);
                for _ in 0..2 {
                    tables.set([rules.clone(), source_filter()]);
                    let state = tables.nft.dump().expect("dump");
                    assert_eq!(state.ruleset(Table::Inet), Some(&rules));
                    assert_eq!(state.ruleset(Table::Bridge), Some(&source_filter()));
                    assert_eq!(state.rules, tables.cached);
                }
            }
        }
        tables.delete();
        tables.delete();
        assert_eq!(tables.ruleset(), None);
        assert_eq!(run_command("nft", &["list", "ruleset"], ""), "");
    });
}

#[test]
fn every_address_and_hook_round_trips() {
    let cidr = |text: &str| text.parse().expect(text);
    let chain = |name: &str, hook, kind, priority, rules| {
        let base = Some(Base { hook, kind, priority });
        Chain { name: name.to_owned(), base, rules }
    };
    let mut matches = Vec::new();
    for length in [0, 1, 7, 8, 9, 15, 16, 24, 31, 32, 33, 47, 56, 64, 65, 120, 127, 128] {
        for address in ["10.244.3.7", "fd00:10:244:51:a:b:c:d"] {
            let address: std::net::IpAddr = address.parse().expect("address");
            if let Some(cidr) = crate::model::Cidr::containing(address, length) {
                let negate = length % 2 == 1;
                matches.push(Rule { exprs: vec![Expr::Source { cidr, negate }, Expr::Counter, Expr::Drop] });
                matches.push(Rule { exprs: vec![Expr::Destination { cidr, negate: !negate }, Expr::Accept] });
                let (first, last) = (cidr.base(), cidr.last());
                let field = Field::Destination(cidr.family());
                if first != last && length > 0 {
                    matches.push(Rule { exprs: vec![Expr::Range { field, first, last, negate }, Expr::Accept] });
                }
            }
        }
    }
    let names =
        ["ovb.1", "fifteen.bytes.x"].map(|name| Rule { exprs: vec![Expr::InputInterface(name.to_owned()), Expr::Accept] });
    let mut rules = Ruleset {
        chains: vec![
            chain("guard", Hook::Prerouting, ChainKind::Filter, -300, names.to_vec()),
            chain("dnat", Hook::Prerouting, ChainKind::Nat, -100, Vec::new()),
            chain("in", Hook::Input, ChainKind::Filter, 10, Vec::new()),
            chain("forward", Hook::Forward, ChainKind::Filter, 0, matches),
            chain("out", Hook::Output, ChainKind::Filter, -160, Vec::new()),
            chain(
                "postrouting",
                Hook::Postrouting,
                ChainKind::Nat,
                95,
                vec![Rule { exprs: vec![Expr::Source { cidr: cidr("fd00::/8"), negate: false }, Expr::Masquerade] }],
            ),
        ],
        ..Ruleset::default()
    };
    rules.chains.sort_by(|a, b| a.name.cmp(&b.name));
    in_netns(|| {
        let mut tables = Tables::open();
        tables.set([rules.clone()]);
        assert_eq!(tables.ruleset().as_ref(), Some(&rules));
        assert_eq!(run_command("nft", &["-s", "list", "table", "inet", "overlayd"], ""), rules.to_string());
    });
}

#[test]
fn nft_listing_matches_display() {
    in_netns(|| {
        let mut tables = Tables::open();
        tables.set([rules(), source_filter()]);
        for (ruleset, table) in [(rules(), "inet"), (source_filter(), "bridge")] {
            let listed = run_command("nft", &["-s", "-t", "list", "table", table, "overlayd"], "");
            assert_eq!(listed, ruleset.to_string());
        }
    });
}

/// Alterations by another process, as `nft` scripts. Each must be detected. `@N` stands for the handle of the N-th rule of chain
/// overlay.
pub(super) const ALTERATIONS: [(&str, &str); 22] = [
    ("rule deleted", "delete rule inet overlayd overlay handle @1"),
    ("rule added", "add rule inet overlayd overlay drop"),
    ("rule inserted", "insert rule inet overlayd overlay ip saddr 10.0.0.0/8 drop"),
    ("rule replaced", "replace rule inet overlayd overlay handle @1 ip saddr 10.244.0.0/17 accept"),
    (
        "rules reordered",
        "delete rule inet overlayd overlay handle @1; add rule inet overlayd overlay ip saddr 10.244.1.0-10.244.255.255 accept",
    ),
    ("rule with an unknown expression", "add rule inet overlayd overlay ct state established accept"),
    ("rule with a vmap", "add rule inet overlayd overlay ip protocol vmap { tcp : accept, udp : drop }"),
    ("masquerade with other flags", "add rule inet overlayd postrouting masquerade"),
    ("policy changed", "add chain inet overlayd incoming { policy drop; }"),
    ("chain flushed", "flush chain inet overlayd overlay"),
    ("chain added", "add chain inet overlayd extra"),
    ("base chain added", "add chain inet overlayd extra { type filter hook input priority 0; }"),
    ("set added", "add set inet overlayd s { type ipv4_addr; }"),
    ("counter added", "add counter inet overlayd c"),
    ("element added", "add element inet overlayd peers4 { 192.0.2.1 . 10.0.0.0 }"),
    ("element added to a map", "add element inet overlayd ports4 { tcp . 80 : 10.0.0.1 . 80 }"),
    ("set recreated", "add set inet overlayd hosts4 { type ipv4_addr; }"),
    ("guard: chain flushed", "flush chain bridge overlayd guard"),
    ("guard: table deleted", "delete table bridge overlayd"),
    ("table made dormant", "add table inet overlayd { flags dormant; }"),
    ("table deleted", "delete table inet overlayd"),
    ("all flushed", "flush ruleset"),
];

/// Runs one alteration.
pub(super) fn run_alteration(script: &str) {
    let mut script = script.to_owned();
    if script.contains('@') {
        let listed = run_command("nft", &["-a", "list", "chain", "inet", "overlayd", "overlay"], "");
        let rules = listed.lines().filter(|line| line.contains("accept #")).filter_map(|line| line.split("# handle ").nth(1));
        for (index, handle) in rules.enumerate() {
            script = script.replace(&format!("@{}", index + 1), handle);
        }
    }
    nft(&script);
}

#[test]
fn every_alteration_is_detected_and_repaired() {
    in_netns(|| {
        let mut tables = Tables::open();
        for (what, script) in ALTERATIONS {
            tables.set([rules(), source_filter()]);
            let before = tables.nft.dump().expect("dump").rules;
            run_alteration(script);
            assert_ne!(tables.nft.dump().expect("dump").rules, before, "{what}");
        }
        tables.set([rules(), source_filter()]);
        assert_eq!(tables.ruleset(), Some(rules()));
    });
}

#[test]
fn foreign_objects_are_reported() {
    in_netns(|| {
        let mut tables = Tables::open();
        tables.set([rules()]);
        super::nft(
            "table inet overlayd { set s { type ipv4_addr; }; counter c { }; \
             chain y { type filter hook input priority 0; policy drop; }; chain z { type route hook output priority 0; }; }",
        );
        super::nft("add table inet overlayd { flags dormant; }");
        let words = [
            "flags 0x1",
            "chain y with a policy other than accept",
            "chain z with an unsupported type or hook",
            "set s",
            "object c",
        ];
        assert_eq!(tables.ruleset().expect("table").foreign, words);
    });
}

#[test]
fn foreign_tables_are_left_alone() {
    const FOREIGN_TABLES: &str = "\
table inet overlayd2 {
\tset s {
\t\ttype ipv4_addr
\t\telements = { 10.0.0.1 }
\t}

\tchain forward {
\t\ttype filter hook forward priority filter; policy drop;
\t\tip saddr @s accept
\t}
}
table ip overlayd {
\tchain forward {
\t\taccept
\t}
}
";
    in_netns(|| {
        super::nft(FOREIGN_TABLES);
        let mut tables = Tables::open();
        assert_eq!(tables.nft.dump().expect("dump").rules, State::new());
        tables.set([rules(), source_filter()]);
        assert_eq!(tables.ruleset(), Some(rules()));
        tables.delete();
        assert_eq!(run_command("nft", &["list", "ruleset"], ""), FOREIGN_TABLES);
    });
}

#[test]
fn invalid_rules_are_refused_with_location() {
    in_netns(|| {
        let mut tables = Tables::open();
        tables.set([rules()]);
        let with = |expr: Expr| {
            let mut rules = rules();
            let tunnel = rules.chains.iter_mut().find(|chain| chain.name == "tunnel").expect("a chain");
            tunnel.rules.push(Rule { exprs: vec![expr] });
            rules
        };
        let mut refused = |rules: Ruleset| {
            let failed = tables.nft.apply(&[set_table(rules)], &mut tables.cached);
            assert_eq!(failed.len(), 1, "{failed:?}");
            failed[0].1.message.clone()
        };
        assert_eq!(
            refused(with(Expr::Foreign)),
            "rule 2 of chain tunnel has an expression that is not ours and can only be read"
        );
        assert_eq!(
            refused(with(Expr::InputInterface("sixteen.bytes.xy".to_owned()))),
            "interface name `sixteen.bytes.xy` in rule 2 of chain tunnel: 1 to 15 bytes are allowed"
        );
        // The kernel refuses these: masquerade needs a nat chain, and a chain name has a length limit.
        let message = refused(with(Expr::Masquerade));
        assert!(message.starts_with("table inet overlayd, rule `masquerade random,fully-random` of chain tunnel: "), "{message}");
        let mut long = rules();
        long.chains[1].name = "x".repeat(300);
        let name = long.chains[1].name.clone();
        long.chains.sort_by(|a, b| a.name.cmp(&b.name));
        let message = refused(long);
        assert!(message.starts_with(&format!("table inet overlayd, chain {name}: ")), "{message}");
        assert_eq!(tables.ruleset(), Some(rules()), "the previous ruleset stays in force");
    });
}

#[test]
fn dumps_are_consistent_during_concurrent_writes() {
    in_netns(|| {
        let mut nft = Nft::open().expect("open");
        let mut writer = Tables::open();
        let (one, two) = (ruleset(&ipv4(), true, false), ruleset(&dual(), true, true));
        writer.set([one.clone()]);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..300 {
                    writer.set([two.clone()]);
                    writer.set([one.clone()]);
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            let mut dumps = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) && dumps < 100_000 {
                let state = nft.dump().expect("dump");
                let read = state.ruleset(Table::Inet);
                assert!(read == Some(&one) || read == Some(&two), "{read:?}");
                dumps += 1;
            }
            assert!(dumps > 0);
        });
    });
}

#[test]
fn foreign_generation_ignores_own_transactions() {
    in_netns(|| {
        let mut tables = Tables::open();
        let before = tables.nft.foreign_generation().expect("a number");
        tables.set([rules(), source_filter()]);
        tables.delete();
        assert_eq!(tables.nft.foreign_generation().expect("a number"), before);
        run_alteration("add table inet mine");
        assert_eq!(tables.nft.foreign_generation().expect("a number"), before.wrapping_add(1));
    });
}

#[test]
fn missing_capability_is_reported() {
    in_netns(|| {
        let mut tables = Tables::open();
        // Capabilities are per thread, and this thread ends with the test.
        let (header, none) = ([0x2008_0522_u32, 0], [0_u32; 6]);
        // SAFETY: capset reads a header of two and a body of six 32-bit words, both alive and of that size.
        let dropped = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
        assert_eq!(dropped, 0, "capset: {}", std::io::Error::last_os_error());
        let refused = tables.nft.apply(&[set_table(rules())], &mut tables.cached).remove(0).1;
        for error in [tables.nft.dump().expect_err("dump"), refused] {
            assert_eq!(error.errno, libc::EPERM);
            assert!(error.message.contains("needs CAP_NET_ADMIN"), "{}", error.message);
        }
    });
}
