//! Tests of the networks' records: transactions of concurrent operators, interrupted ones, and those of users without the role.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use etcd_client::GetOptions;
use tokio::task::JoinSet;

use super::harness::*;
use super::security::{enable_auth, write_secret};
use crate::model::{Cidr, NetworkChange, NetworkName, PerFamily, Vni};
use crate::store::{
    Keys, NetworkError, StoreConfig, WriteKind, WrittenNetwork, read_all, read_networks, remove_network, write_network,
};

const LEASE: &str = r#"{"PublicIP":"192.168.0.9","BackendType":"host-gw"}"#;

/// An isolated network with this range.
fn isolated(cidr: &str) -> NetworkChange {
    NetworkChange { isolated: Some(true), ..routed(cidr) }
}

fn routed(cidr: &str) -> NetworkChange {
    let cidr: Cidr = cidr.parse().unwrap();
    NetworkChange { cidrs: [(cidr.family(), cidr)].into_iter().collect::<PerFamily<_>>(), ..NetworkChange::default() }
}

fn with_vni(vni: u32) -> NetworkChange {
    NetworkChange { vni: Vni::try_from(vni).ok(), ..NetworkChange::default() }
}

async fn create(config: &StoreConfig, name: &str, change: &NetworkChange) -> Result<WrittenNetwork, NetworkError> {
    write_network(config, &name.into(), WriteKind::Create, change).await
}

async fn change(config: &StoreConfig, name: &str, change: &NetworkChange) -> Result<WrittenNetwork, NetworkError> {
    write_network(config, &name.into(), WriteKind::Change, change).await
}

impl Etcd {
    /// All keys below the prefix, without it, and their values.
    async fn keys(&self) -> BTreeMap<String, String> {
        let answer = self.client().await.get(PREFIX, Some(GetOptions::new().with_prefix())).await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let entry = |kv: &etcd_client::KeyValue| (text(kv.key()).replacen(&format!("{PREFIX}/"), "", 1), text(kv.value()));
        answer.kvs().iter().map(entry).collect()
    }

    /// Panics unless each named network has a record and one VNI key, and each VNI key a network.
    async fn assert_nothing_half_made(&self) {
        let keys = self.keys().await;
        let records: BTreeSet<&str> =
            keys.keys().filter_map(|key| key.strip_prefix("networks/")?.strip_suffix("/config")).collect();
        let reserved: Vec<&str> =
            keys.iter().filter(|(key, _)| key.starts_with("vnis/")).map(|(_, name)| name.as_str()).collect();
        assert_eq!((reserved.len(), reserved.iter().copied().collect()), (records.len(), records), "{keys:#?}");
        let set = read_networks(&self.config()).await.unwrap().set;
        for (name, record) in &set.networks {
            assert_eq!(set.check(name, record.as_ref().unwrap()), Ok(()), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn network_is_created_changed_and_removed() {
    let etcd = Etcd::start().await;
    let config = etcd.config();
    let made = create(&config, "default", &routed("10.244.0.0/16")).await.unwrap();
    assert_eq!((made.key.as_str(), made.before.as_deref(), made.changed), ("/coreos.com/network/config", None, true));
    for (name, vni) in [("blue", 2), ("green", 3)] {
        let made = create(&config, name, &isolated("10.0.0.0/16")).await.unwrap();
        assert_eq!(made.record.vni().map(Vni::get), Some(vni));
    }
    let listed = etcd.keys().await.into_keys().collect::<Vec<_>>();
    assert_eq!(listed, ["config", "networks/blue/config", "networks/green/config", "vnis/2", "vnis/3"]);
    etcd.assert_nothing_half_made().await;

    assert!(matches!(create(&config, "blue", &isolated("10.1.0.0/16")).await, Err(NetworkError::Exists { .. })));
    let error =
        create(&config, "red", &NetworkChange { vni: Vni::try_from(3).ok(), ..isolated("10.1.0.0/16") }).await.unwrap_err();
    assert_eq!(error.to_string(), "network red: Backend.VNI: `3` is network green's: 4 is free");
    let error = create(&config, "red", &routed("10.244.7.0/24")).await.unwrap_err();
    assert!(error.to_string().contains("overlaps 10.244.0.0/16 of routed network default"), "{error}");

    let before = etcd.keys().await;
    assert!(!change(&config, "blue", &with_vni(2)).await.unwrap().changed);
    assert_eq!(etcd.keys().await, before);
    assert!(change(&config, "blue", &with_vni(9)).await.unwrap().changed);
    let keys = etcd.keys().await;
    assert_eq!((keys.get("vnis/2"), keys.get("vnis/9").map(String::as_str)), (None, Some("blue")));
    let error = change(&config, "red", &with_vni(8)).await.unwrap_err();
    assert_eq!(error.to_string(), "no network red; present: blue, default, green");

    let peer = |name: &str| NetworkChange { add_peers: [NetworkName::from(name)].into(), ..NetworkChange::default() };
    let error = change(&config, "green", &peer("blue")).await.unwrap_err();
    assert!(error.to_string().contains("Network: `10.0.0.0/16` overlaps 10.0.0.0/16 of peer blue"), "{error}");
    change(&config, "green", &routed("10.7.0.0/16")).await.unwrap();
    change(&config, "green", &peer("blue")).await.unwrap();
    assert!(matches!(remove_network(&config, &"blue".into(), true).await, Err(NetworkError::Peered { .. })));
    remove_network(&config, &"green".into(), false).await.unwrap();
    remove_network(&config, &"blue".into(), false).await.unwrap();
    remove_network(&config, &NetworkName::default(), false).await.unwrap();
    assert_eq!(etcd.keys().await, BTreeMap::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_creators_of_one_name_make_one_network() {
    let etcd = Etcd::start().await;
    let mut creators = JoinSet::new();
    for n in 0..6 {
        let config = etcd.config();
        creators.spawn(async move { create(&config, "blue", &isolated(&format!("10.{n}.0.0/16"))).await });
    }
    let results = creators.join_all().await;
    let (made, errors): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!(made.len(), 1);
    assert!(errors.iter().all(|error| matches!(error, Err(NetworkError::Exists { .. }))), "{errors:?}");
    etcd.assert_nothing_half_made().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_creators_never_share_vni_or_range() {
    let etcd = Etcd::start().await;
    let mut creators = JoinSet::new();
    for n in 0..12 {
        let config = etcd.config();
        // The routed ones overlap each other: one of them wins.
        let (name, change) = match n % 2 {
            0 => (format!("isolated-{n}"), isolated("10.0.0.0/8")),
            _ => (format!("routed-{n}"), routed(&format!("10.0.0.0/{}", 8 + n))),
        };
        creators.spawn(async move { (n, create(&config, &name, &change).await) });
    }
    let mut vnis = BTreeSet::new();
    for (n, result) in creators.join_all().await {
        match result {
            Ok(made) => assert!(vnis.insert(made.record.vni())),
            Err(error) => assert!(n % 2 == 1 && error.to_string().contains("of routed network routed-"), "{error}"),
        }
    }
    assert_eq!(vnis.len(), 6 + 1, "{vnis:?}");
    etcd.assert_nothing_half_made().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn default_network_and_overlapping_routed_network_exclude_each_other() {
    let etcd = Etcd::start().await;
    for round in 0..10 {
        let config = StoreConfig { prefix: format!("/round-{round}"), ..etcd.config() };
        let (one, range) = (config.clone(), routed("10.0.0.0/16"));
        let default = {
            let range = range.clone();
            tokio::spawn(async move { create(&one, "default", &range).await })
        };
        let blue = create(&config, "blue", &range).await;
        let default = default.await.unwrap();
        assert!(default.is_ok() != blue.is_ok(), "{default:?} {blue:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_range_is_checked_against_concurrent_ones() {
    let etcd = Etcd::start().await;
    let config = etcd.config();
    for n in 0..6 {
        create(&config, &format!("n{n}"), &routed(&format!("10.{n}.0.0/16"))).await.unwrap();
    }
    let mut changes = JoinSet::new();
    for n in 0..6 {
        let config = config.clone();
        changes.spawn(async move { change(&config, &format!("n{n}"), &routed("172.20.0.0/16")).await.is_ok() });
    }
    assert_eq!(changes.join_all().await.into_iter().filter(|done| *done).count(), 1);
    etcd.assert_nothing_half_made().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_creation_leaves_nothing_half_made() {
    let mut etcd = Etcd::start().await;
    let config = etcd.config();
    for round in 0..12_u64 {
        let name = NetworkName::from(format!("n{round}").as_str());
        let (mine, own_name) = (config.clone(), name.clone());
        let task =
            tokio::spawn(async move { write_network(&mine, &own_name, WriteKind::Create, &isolated("10.0.0.0/16")).await });
        tokio::time::sleep(Duration::from_micros(round * 700)).await;
        if round % 4 == 3 {
            etcd.kill();
            assert!(etcd.run().await);
        } else {
            task.abort();
        }
        let _result = task.await;
        etcd.client().await;
        etcd.assert_nothing_half_made().await;
        if read_networks(&config).await.unwrap().set.networks.contains_key(&name) && round % 2 == 0 {
            remove_network(&config, &name, false).await.unwrap();
            etcd.assert_nothing_half_made().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn network_with_leases_is_removed_only_by_force() {
    let etcd = Etcd::start().await;
    let config = etcd.config();
    create(&config, "default", &routed("10.244.0.0/16")).await.unwrap();
    let made = create(&config, "blue", &isolated("10.0.0.0/16")).await.unwrap();
    // The store keeps a lease of a named network by its prefix alone.
    let blue = StoreConfig { prefix: Keys::new(PREFIX).unwrap().network(&"blue".into()).prefix().to_owned(), ..etcd.config() };
    let mut agent = Agent::start(blue.clone(), Some(lease_request(&made.text, 1)));
    let held = agent.next_held().await;
    agent.stop().await;
    etcd.put_subnet("10.244.9.0-24", LEASE, None).await;
    let flannel_host = format!("{}/subnets/10.0.200.0-24", blue.prefix);
    etcd.client().await.put(flannel_host, LEASE, None).await.unwrap();

    let error = remove_network(&config, &"blue".into(), false).await.unwrap_err();
    let text = error.to_string();
    let NetworkError::InUse { mut holders, .. } = error else { panic!("{error}") };
    holders.sort();
    let subnet = held.subnet.to_string();
    assert_eq!(holders, ["192.168.0.9 (10.0.200.0/24)".to_owned(), format!("host1 ({subnet})")]);
    assert!(text.contains("network blue is in use by") && text.contains("--force"), "{text}");
    assert_eq!(read_all(&blue, false).await.unwrap().entries.len(), 2);

    let mut gone = remove_network(&config, &"blue".into(), true).await.unwrap();
    gone.sort();
    assert_eq!(gone, holders);
    let keys = etcd.keys().await.into_keys().collect::<Vec<_>>();
    assert_eq!(keys, ["config", "subnets/10.244.9.0-24"], "the default network's are kept");
    // The default network's leases go without any other network's.
    create(&config, "blue", &isolated("10.0.0.0/16")).await.unwrap();
    assert!(matches!(remove_network(&config, &NetworkName::default(), false).await, Err(NetworkError::InUse { .. })));
    remove_network(&config, &NetworkName::default(), true).await.unwrap();
    assert_eq!(etcd.keys().await.into_keys().collect::<Vec<_>>(), ["networks/blue/config", "vnis/2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn lease_taken_during_removal_is_noticed() {
    let etcd = Etcd::start().await;
    let config = etcd.config();
    let mut client = etcd.client().await;
    for round in 0..20 {
        create(&config, "blue", &isolated("10.0.0.0/16")).await.unwrap();
        let mine = config.clone();
        let removal = tokio::spawn(async move { remove_network(&mine, &"blue".into(), false).await });
        tokio::time::sleep(Duration::from_micros(round * 500)).await;
        // As an agent does: only while the record exists.
        let record = format!("{PREFIX}/networks/blue/config");
        let lease = etcd_client::TxnOp::put(format!("{PREFIX}/networks/blue/subnets/10.0.7.0-24"), LEASE, None);
        let exists = etcd_client::Compare::create_revision(record, etcd_client::CompareOp::Greater, 0);
        let taken = client.txn(etcd_client::Txn::new().when([exists]).and_then([lease])).await.unwrap().succeeded();
        let removed = removal.await.unwrap();
        assert!(taken != removed.is_ok(), "taken: {taken}, {removed:?}");
        if taken {
            remove_network(&config, &"blue".into(), true).await.unwrap();
        }
        assert_eq!(etcd.keys().await, BTreeMap::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn user_without_role_changes_nothing() {
    let etcd = Etcd::start().await;
    create(&etcd.config(), "blue", &isolated("10.0.0.0/16")).await.unwrap();
    let before = etcd.keys().await;
    let directory = tempfile::tempdir().unwrap();
    let password = directory.path().join("password");
    write_secret(&password, "s3cret of all");
    let admin = StoreConfig { password_file: Some(password), ..enable_auth(&etcd).await };
    let reader = StoreConfig { username: Some("reader".to_owned()), ..admin.clone() };
    assert_eq!(read_networks(&reader).await.unwrap().set.networks.len(), 1);
    let errors = [
        create(&reader, "green", &isolated("10.0.0.0/16")).await.unwrap_err(),
        change(&reader, "blue", &with_vni(7)).await.unwrap_err(),
        remove_network(&reader, &"blue".into(), false).await.unwrap_err(),
    ];
    for (error, what) in errors.iter().zip(["create", "change", "remove"]) {
        assert!(matches!(error, NetworkError::Role { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains(&format!("user `reader` may not {what} a network")) && text.contains("role overlay-admin"),
            "{text}"
        );
    }
    let set = read_networks(&admin).await.unwrap().set;
    assert_eq!(set.networks.keys().map(ToString::to_string).collect::<Vec<_>>(), ["blue"]);
    assert_eq!((set.vnis.len(), before.len()), (1, 2));
    create(&admin, "green", &isolated("10.0.0.0/16")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn records_made_by_hand_are_listed_and_repaired() {
    let etcd = Etcd::start().await;
    let config = etcd.config();
    let mut client = etcd.client().await;
    for (key, value) in [
        ("networks/hand/config", r#"{"Network":"10.5.0.0/16","Backend":{"VNI":2}}"#),
        ("networks/hand-2/config", "{"),
        ("networks/left/subnets/10.6.1.0-24", LEASE),
        ("networks/BAD/config", "{}"),
        ("vnis/3", "reserved"),
        ("vnis/x", "rubbish"),
    ] {
        client.put(format!("{PREFIX}/{key}"), value, None).await.unwrap();
    }
    let networks = read_networks(&config).await.unwrap();
    let listed: Vec<(String, bool)> =
        networks.set.networks.iter().map(|(name, record)| (name.to_string(), record.is_ok())).collect();
    let wanted = [("hand", true), ("hand-2", false), ("left", false), ("reserved", false)];
    assert_eq!(listed, wanted.map(|(name, valid)| (name.to_owned(), valid)));
    assert_eq!(networks.text(&"hand-2".into()), Some("{"));
    assert_eq!(create(&config, "new", &isolated("10.0.0.0/16")).await.unwrap().record.vni().map(Vni::get), Some(4));
    // A contradiction that a record written by hand brought in does not keep the other network from changes.
    create(&config, "default", &NetworkChange { vni: Vni::try_from(9).ok(), ..routed("10.9.0.0/16") }).await.unwrap();
    let rival = r#"{"Network":"10.9.0.0/16","Backend":{"VNI":9}}"#;
    client.put(format!("{PREFIX}/networks/rival/config"), rival, None).await.unwrap();
    let mtu = NetworkChange { mtu: Some(1400), ..NetworkChange::default() };
    assert!(change(&config, "default", &mtu).await.unwrap().changed);
    let error = change(&config, "default", &with_vni(2)).await.unwrap_err();
    assert!(error.to_string().contains("`2` is network hand's") && !error.to_string().contains("rival"), "{error}");
    // A write adds the missing VNI key, also if the record stays.
    assert!(change(&config, "hand", &with_vni(2)).await.unwrap().changed);
    assert_eq!(etcd.keys().await.get("vnis/2").map(String::as_str), Some("hand"));
    for (name, force) in [("left", true), ("reserved", false), ("hand-2", false)] {
        remove_network(&config, &name.into(), force).await.unwrap();
    }
    assert_eq!(read_networks(&config).await.unwrap().set.networks.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_networks_does_not_read_their_leases() {
    let etcd = Etcd::start().await;
    let config = etcd.config();
    for name in ["blue", "blue-2", "green"] {
        create(&config, name, &isolated("10.0.0.0/8")).await.unwrap();
    }
    let requests = async || {
        let before = etcd.request_count("Range").await;
        assert_eq!(read_networks(&config).await.unwrap().set.networks.len(), 3);
        etcd.request_count("Range").await - before
    };
    let few = requests().await;
    let mut client = etcd.client().await;
    for n in 0..200 {
        client.put(format!("{PREFIX}/networks/blue/subnets/10.0.{n}.0-24"), "x".repeat(10_000), None).await.unwrap();
    }
    assert_eq!(requests().await, few);
}
