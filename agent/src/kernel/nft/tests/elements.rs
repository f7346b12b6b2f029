//! Tests of set elements: round trips, table changes, foreign changes and timing.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Instant;

use super::*;
use crate::model::{Mac, Transport};
use crate::plan::ruleset::{Counter, Element, PeerPair, source_filter};

fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

fn set(element: Element, target: Option<SocketAddr>) -> Op {
    Op::Set(Key::Element(element), Value::Element(target.map(Box::new)))
}

fn delete(element: Element) -> Op {
    Op::Delete(Key::Element(element), Value::Element(None))
}

fn target(text: &str) -> Option<SocketAddr> {
    Some(text.parse().expect(text))
}

/// One element of each kind, in each family.
fn one_of_each() -> Vec<Op> {
    let mut ops = Vec::new();
    for (outer, base, last, family) in [
        ("192.0.2.9", "10.244.9.0", "10.244.11.255", Family::V4),
        ("2001:db8::9", "fd00:10:244:9::", "fd00:10:244:b:ffff:ffff:ffff:ffff", Family::V6),
    ] {
        let (outer, base, last) = (ip(outer), ip(base), ip(last));
        let to = Some(SocketAddr::new(base, 8080));
        ops.push(set(Element::Peer(PeerPair::new(outer, base).expect("one family")), None));
        ops.push(set(Element::Range(Box::new((outer, base, last))), None));
        ops.push(set(Element::Host(outer), None));
        ops.push(set(Element::Port(family, Transport::Udp, 53), to));
        ops.push(set(Element::Bound(outer, Transport::Sctp, 65535), to));
        ops.push(set(Element::Source(Box::new(("ove0123456789a".to_owned(), Mac([2, 3, 4, 5, 6, 7]), base))), None));
    }
    ops.push(set(Element::Unchecked("ove0123456789a".into()), None));
    ops
}

fn both_tables() -> Vec<Op> {
    [ruleset(&dual(), false, true), source_filter()].map(set_table).to_vec()
}

#[test]
fn every_element_kind_round_trips() {
    in_netns(|| {
        let mut tables = Tables::open();
        tables.apply(&[both_tables(), one_of_each()].concat());
        assert_eq!(tables.nft.dump().expect("dump").rules, tables.cached);
        assert_eq!(tables.cached.len(), 2 + 13);
        for (kind, table, name, wanted) in [
            ("set", "inet", "peers4", "192.0.2.9 . 10.244.9.0"),
            ("set", "inet", "hosts6", "2001:db8::9 . 2001:db8::9"),
            ("set", "inet", "ranges4", "192.0.2.9 . 10.244.9.0-10.244.11.255"),
            ("map", "inet", "ports4", "udp . 53 : 10.244.9.0 . 8080"),
            ("map", "inet", "bound6", "2001:db8::9 . sctp . 65535 : fd00:10:244:9:: . 8080"),
            ("set", "bridge", "source4", "\"ove0123456789a\" . 02:03:04:05:06:07 . 10.244.9.0"),
            ("set", "bridge", "source6", "\"ove0123456789a\" . 02:03:04:05:06:07 . fd00:10:244:9::"),
            ("set", "bridge", "unchecked", "\"ove0123456789a\""),
        ] {
            let listed = run_command("nft", &["list", kind, table, "overlayd", name], "");
            assert!(listed.contains(&format!("elements = {{ {wanted} }}")), "{listed}");
        }
        // A second apply writes nothing; afterwards all elements are deleted.
        let generation = tables.nft.generation();
        tables.apply(&one_of_each());
        assert_eq!(tables.nft.generation(), generation);
        let deletions: Vec<Op> = one_of_each().into_iter().map(|op| Op::Delete(op.key().clone(), Value::Element(None))).collect();
        tables.apply(&deletions);
        tables.apply(&deletions);
        assert_eq!(tables.cached.len(), 2);
        assert_eq!(tables.nft.dump().expect("dump").rules, tables.cached);
    });
}

/// As `overlayd cleanup` does it: the elements and their tables in one batch.
#[test]
fn deleting_tables_deletes_their_elements() {
    in_netns(|| {
        let mut tables = Tables::open();
        tables.apply(&[both_tables(), one_of_each()].concat());
        let mut elements = tables.nft.dump().expect("dump").rules;
        elements.retain(|key, _| matches!(key, Key::Element(_)));
        let deletions = elements.into_iter().map(|(key, value)| Op::Delete(key, value));
        let all: Vec<Op> =
            deletions.chain(Table::ALL.map(|t| Op::Delete(Key::Ruleset(t), Value::Ruleset(Box::default())))).collect();
        tables.apply(&all);
        assert_eq!((tables.cached.len(), tables.nft.dump().expect("dump").rules.len()), (0, 0));
        // Deleting also succeeds after another process removed the tables.
        tables.apply(&[both_tables(), one_of_each()].concat());
        nft("flush ruleset");
        tables.apply(&all);
        assert_eq!(tables.cached.len(), 0);
    });
}

#[test]
fn replaced_table_keeps_elements_and_counters() {
    in_netns(|| {
        let mut tables = Tables::open();
        tables.apply(&[both_tables(), one_of_each()].concat());
        let before = tables.nft.dump().expect("dump").rules;
        super::nft("reset counters table inet overlayd\nadd rule inet overlayd tunnel counter name tunnel");
        run_command("sh", &["-c", "ip link set lo up && ping -c 2 -i 0.2 127.0.0.1"], "");
        let counted = tables.nft.counters().expect("counters")[&Counter::Tunnel];
        assert!(counted.packets >= 4 && counted.bytes >= 4 * 84, "{counted:?}");
        tables.apply(&both_tables());
        assert_eq!(tables.nft.dump().expect("dump").rules, before);
        assert_eq!(tables.nft.counters().expect("counters")[&Counter::Tunnel], counted);

        // The elements of a removed set disappear with it.
        tables.set([ruleset(&dual(), true, false)]);
        let state = tables.nft.dump().expect("dump");
        assert_eq!(state.rules, tables.cached);
        assert!(!state.rules.keys().any(|key| matches!(key, Key::Element(Element::Port(..) | Element::Host(_)))));
        tables.delete();
        assert_eq!(tables.cached, State::new());
    });
}

#[test]
fn element_target_is_replaced() {
    in_netns(|| {
        let mut tables = Tables::open();
        let port = || Element::Port(Family::V4, Transport::Tcp, 80);
        tables.apply(&[both_tables(), vec![set(port(), target("10.244.9.2:80"))]].concat());
        tables.apply(&[set(port(), target("10.244.9.3:81"))]);
        assert_eq!(
            tables.nft.dump().expect("dump").rules[&Key::Element(port())],
            Value::Element(target("10.244.9.3:81").map(Box::new))
        );
        tables.apply(&[delete(port()), set(port(), target("10.244.9.4:80"))]);
        assert_eq!(
            tables.nft.dump().expect("dump").rules[&Key::Element(port())],
            Value::Element(target("10.244.9.4:80").map(Box::new))
        );
    });
}

/// Foreign changes are detected, and the transaction is computed again from the current state.
#[test]
fn stale_cache_is_reread_and_retried() {
    for alteration in [
        "delete element inet overlayd peers4 { 192.0.2.9 . 10.244.9.0 }",
        "add element inet overlayd ports4 { tcp . 80 : 10.0.0.1 . 1 }",
        "delete element inet overlayd ports4 { udp . 53 : 10.244.9.0 . 8080 }",
        "flush set bridge overlayd source4",
    ] {
        in_netns(|| {
            let mut tables = Tables::open();
            tables.apply(&[both_tables(), one_of_each()].concat());
            super::nft(alteration);
            let wanted = vec![
                delete(Element::Peer(PeerPair::new(ip("192.0.2.9"), ip("10.244.9.0")).expect("one family"))),
                delete(Element::Source(Box::new(("ove0123456789a".to_owned(), Mac([2, 3, 4, 5, 6, 7]), ip("10.244.9.0"))))),
                delete(Element::Port(Family::V4, Transport::Udp, 53)),
                set(Element::Port(Family::V4, Transport::Tcp, 80), target("10.244.9.2:80")),
            ];
            tables.apply(&wanted);
            let found = tables.nft.dump().expect("dump").rules;
            assert_eq!(found, tables.cached, "{alteration}");
            for op in &wanted {
                match op {
                    Op::Set(key, value) => assert_eq!(found.get(key), Some(value), "{alteration}"),
                    Op::Delete(key, _) => assert_eq!(found.get(key), None, "{alteration}"),
                }
            }
        });
    }
}

#[test]
fn refused_element_does_not_block_others() {
    in_netns(|| {
        let mut tables = Tables::open();
        let invalid = set(Element::Host(ip("192.0.2.1")), None);
        // The hosts sets do not exist when containers' packets are masqueraded.
        let mut ops = vec![set_table(rules()), set_table(source_filter())];
        ops.extend(one_of_each().into_iter().filter(|op| !matches!(op.key(), Key::Element(Element::Host(_)))));
        let valid_count = ops.len();
        ops.insert(5, invalid);
        let failed = tables.nft.apply(&ops, &mut tables.cached);
        assert_eq!(failed.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [5], "{failed:?}");
        let message = &failed[0].1.message;
        assert!(message.starts_with("table inet overlayd, element of hosts4: 192.0.2.1 . 192.0.2.1: "), "{message}");
        assert_eq!(tables.cached.len(), valid_count);
        assert_eq!(tables.nft.dump().expect("dump").rules, tables.cached);
        // The kernel refuses a range that overlaps another one of the same peer.
        let range = |last| set(Element::Range(Box::new((ip("192.0.2.9"), ip("10.244.9.9"), ip(last)))), None);
        let failed = tables.nft.apply(&[range("10.244.20.0")], &mut tables.cached);
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert_eq!(tables.nft.dump().expect("dump").rules, tables.cached);
    });
}

/// Prints the cost of the source and tunnel filters with many peers.
#[test]
fn ten_thousand_peers_are_applied() {
    let peer = |n: u32| {
        let outer = Ipv4Addr::from_bits(0xc612_0000 + n).into();
        Element::Peer(PeerPair::new(outer, Ipv4Addr::from_bits(0x0a00_0000 + (n << 8)).into()).expect("one family"))
    };
    in_netns(|| {
        let mut tables = Tables::open();
        tables.apply(&both_tables());
        let all: Vec<Op> = (0..10_000).map(|n| set(peer(n), None)).collect();
        let timed = |what: &str, work: &mut dyn FnMut()| {
            let begin = Instant::now();
            work();
            println!("{what}: {:?}", begin.elapsed());
        };
        timed("10,000 elements set", &mut || tables.apply(&all));
        assert_eq!(tables.cached.len(), 10_002);
        timed("one more", &mut || tables.apply(&[set(peer(10_000), None)]));
        timed("one removed", &mut || tables.apply(&[delete(peer(10_000))]));
        timed("the table replaced with all of them", &mut || tables.apply(&both_tables()));
        let mut found = State::new();
        timed("all read", &mut || found = tables.nft.dump().expect("dump").rules);
        assert_eq!(found, tables.cached);
        let deletions: Vec<Op> = (0..10_000).map(|n| delete(peer(n))).collect();
        timed("10,000 elements removed", &mut || tables.apply(&deletions));
        assert_eq!(tables.nft.dump().expect("dump").rules.len(), 2);
    });
}

/// Prints the cost of publishing many ports, one element each.
#[test]
fn every_port_of_a_protocol_is_published() {
    in_netns(|| {
        let mut tables = Tables::open();
        tables.apply(&both_tables());
        for count in [1_000, 65_535] {
            let to = |port| Some(SocketAddr::new(ip("10.244.9.2"), port));
            let all: Vec<Op> = (1..=count).map(|port| set(Element::Port(Family::V4, Transport::Tcp, port), to(port))).collect();
            let begin = Instant::now();
            tables.apply(&all);
            println!("{count} ports published: {:?}", begin.elapsed());
            assert_eq!(tables.cached.len(), 2 + usize::from(count));
        }
        assert_eq!(tables.nft.dump().expect("dump").rules, tables.cached);
    });
}
