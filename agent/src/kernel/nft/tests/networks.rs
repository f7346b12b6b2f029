//! The tables of two networks in one network namespace.

use super::*;
use crate::kernel::nft::{RulesetSnapshot, Translation};
use crate::kernel::trace::packet::{Flow, Interface, Packet};
use crate::model::Cidr;
use crate::plan::backend;
use crate::plan::ruleset::{Element, Hook, PeerPair, SetName};

/// The VNI of the second network.
const OTHER: &str = "7";

fn specs() -> [InetTableSpec; 2] {
    let other =
        network(r#"{"Network":"10.99.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:99::/53","Backend":{"VNI":7,"Port":4789}}"#);
    [spec(&dual(), true, true), InetTableSpec { numbered_sets: true, ..spec(&other, false, true) }]
}

fn both() -> Ruleset {
    let [first, second] = specs();
    inet_table(&[&first, &second])
}

/// A peer of both networks: the same host, even with the same subnet.
fn peer() -> [Op; 2] {
    let pair = PeerPair::new([192, 0, 2, 9].into(), [10, 244, 9, 0].into()).expect("one family");
    let second = backend::of(&specs()[1].network).tunnel().and_then(|tunnel| tunnel.vni).expect("VXLAN");
    [Element::Peer(pair.clone()), Element::Peer(pair).of_network(Some(second))]
        .map(|element| Op::Set(Key::Element(element), Value::Element(None)))
}

#[test]
fn tables_of_two_networks_round_trip() {
    in_netns(|| {
        let mut tables = Tables::open();
        let first = inet_table(&[&specs()[0]]);
        let [peer, other_peer] = peer();
        tables.apply(&[set_table(both())]);
        assert_eq!(run_command("nft", &["-s", "-t", "list", "table", "inet", "overlayd"], ""), both().to_string());
        tables.delete();
        tables.apply(&[set_table(first.clone()), peer.clone()]);
        tables.apply(&[set_table(both()), other_peer.clone()]);
        assert_eq!(tables.nft.dump().expect("dump").rules, tables.cached);
        assert_eq!(tables.ruleset(), Some(both()));
        for name in ["peers4".to_owned(), format!("peers4.{OTHER}")] {
            let listed = run_command("nft", &["list", "set", "inet", "overlayd", &name], "");
            assert!(listed.contains("192.0.2.9 . 10.244.9.0"), "{listed}");
        }
        // The second network leaves: the first one keeps its element, and has the rules that it had alone.
        let generation = tables.nft.generation();
        tables.apply(&[set_table(first.clone()), Op::Delete(other_peer.key().clone(), Value::Element(None))]);
        assert_eq!(tables.nft.generation(), generation + 1, "one transaction");
        assert_eq!(tables.ruleset(), Some(first));
        let elements: Vec<Key> = tables.nft.dump().expect("dump").rules.into_keys().collect();
        assert!(elements.contains(peer.key()) && !elements.contains(other_peer.key()), "{elements:?}");
    });
}

#[test]
fn names_of_tunnel_sets_are_read_back() {
    let sets = both().sets;
    assert!(sets.iter().all(|set| SetName::from_name(Table::Inet, set.name().as_bytes()) == Some(*set)));
    for name in ["peers4.0", "peers4.07", "peers4.", "bound4.7", "peers4.7.7", "other.7"] {
        assert_eq!(SetName::from_name(Table::Inet, name.as_bytes()), None, "{name}");
    }
}

/// The rules of each network translate its own packets only.
#[test]
fn each_network_is_masqueraded_by_its_own_rules() {
    in_netns(|| {
        let [first, mut second] = specs();
        let translation = |tables: &mut Tables, specs: &[&InetTableSpec], source: [u8; 4], destination: [u8; 4], output: &str| {
            tables.apply(&[set_table(inet_table(specs))]);
            let flow = Flow { source: source.into(), destination: destination.into(), protocol: 6, port: 80 };
            let output = Some(Interface { index: 9, name: output.to_owned() });
            let packet = Packet { output, destination_is_local: Some(false), ..Packet::new(&flow) };
            let snapshot = RulesetSnapshot::read().expect("the rules");
            snapshot.evaluate(Hook::Postrouting, false, &packet).translation.map(|(translation, _)| translation)
        };
        let mut tables = Tables::open();
        let world = [203, 0, 113, 1];
        for masquerade in [false, true] {
            second.masquerade = masquerade;
            let masquerades = masquerade.then_some(Translation::Masquerade);
            let mut check =
                |source, destination, output| translation(&mut tables, &[&first, &second], source, destination, output);
            assert_eq!(check([10, 244, 3, 2], world, "eth0"), Some(Translation::Masquerade));
            assert_eq!(check([10, 99, 3, 2], world, "eth0"), masquerades);
            assert_eq!(check([10, 244, 3, 2], [10, 244, 9, 2], "ovx.1"), None);
            assert_eq!(check([10, 99, 3, 2], [10, 99, 9, 2], "ovx.7"), None);
            // From one network into the tunnel of the other: its peers accept only this host's subnet of that network.
            assert_eq!(check([10, 99, 3, 2], [10, 244, 9, 2], "ovx.1"), Some(Translation::Masquerade));
        }
    });
}

#[test]
fn forward_chain_accepts_several_ranges() {
    in_netns(|| {
        iptables("iptables -P FORWARD DROP");
        iptables("iptables -A FORWARD -s 172.16.0.0/12 -j ACCEPT");
        let mut nft = Nft::open().expect("open");
        let ranges = ["10.99.0.0/16", "10.244.0.0/16"].map(|text| text.parse::<Cidr>().expect(text));
        for ranges in [&ranges[..], &ranges[..1], &ranges[1..], &ranges[..]] {
            nft.set_forward_accept(Family::V4, ranges).expect("set");
            let state = nft.dump().expect("dump");
            assert_eq!(state.forward_accept.get(Family::V4).map(|found| &**found), Some(ranges));
            let listed = iptables("iptables -S FORWARD");
            assert_eq!(listed.matches("overlayd").count(), 2 * ranges.len(), "{listed}");
            assert!(listed.contains("172.16.0.0/12"), "{listed}");
        }
    });
}
