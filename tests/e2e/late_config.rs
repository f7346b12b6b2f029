//! The network's configuration comes late, is wrong, changes: the agents wait and say so, keep the last good one, and follow.

use overlay_agent::model::Family;
use overlay_agent::model::api::Health;
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, Story, etcd, eventually, http, kernel};
use overlayctl::lab::Families;

#[tokio::test(flavor = "multi_thread")]
async fn it_comes_after_the_agents() {
    let story = Story::without_agents(2, Families::V4).await;
    let key = etcd::config_key();
    etcd::delete(&story, &key);
    for host in story.hosts() {
        host.agent_start(&[]).must("start");
    }
    for host in story.hosts() {
        let waits = |s: &overlay_agent::model::api::Status| s.store.connected && s.problems.iter().any(|p| p.contains(&key));
        let status = host.wait_status(SOON, "it does not say that it waits for a configuration", waits).await.must("status");
        assert!(!status.ready && status.health == Health::Waiting && status.lease.is_none(), "{status:#?}");
        assert!(status.problems[0].contains("waiting for the network's configuration"), "{:?}", status.problems);
        assert!(status.problems[0].contains("overlayctl config set FILE"), "the remedy is said: {:?}", status.problems);
        story.logged(host.name(), &["waiting for the network's configuration", &key]).await;
        story.ctl(host.name(), &["status"]).exits(3);
        assert_eq!(http::ask(&host.socket(), "GET", "/healthz", "").status, 200);
        assert_eq!(http::ask(&host.socket(), "GET", "/readyz", "").status, 503);
        let said = story.ctl(host.name(), &["attach", "early"]).exits(1);
        assert!(said.err.contains("no subnet is leased yet"), "{}", said.err);
        assert!(kernel::link(&story, host.name(), "ovx.1").is_none(), "nothing is made yet");
    }
    story.ctl("h1", &["status", "--wait", "300ms"]).exits(4);

    // A wrong one is named field by field, and waited over.
    etcd::put(&story, &key, r#"{"Network":"10.244.0.1/16","SubnetLen":99,"Backend":{"Type":"carrier-pigeon"}}"#);
    let status = story
        .at("h1")
        .wait_status(SOON, "it does not name what is wrong", |s| !s.store.config_errors.is_empty())
        .await
        .must("status");
    let fields: Vec<&str> = status.store.config_errors.iter().map(|e| e.field.as_str()).collect();
    assert!(fields.contains(&"Network") && fields.contains(&"Backend.Type"), "{fields:?}");
    assert!(!status.ready && status.problems.iter().any(|p| p.contains("is bad") && p.contains("10.244.0.1/16")), "{status:#?}");
    story.logged("h1", &["10.244.0.1/16"]).await;

    let file = story.dir().join("network.json");
    std::fs::write(&file, &story.layout().config).must("a file");
    story.ctl("h1", &["config", "set", &file.to_string_lossy()]).exits(0);
    story.mesh().await;
    for host in story.hosts() {
        story.settled(host.name(), SOON).await;
        story.ctl(host.name(), &["status", "--wait", "10s"]).exits(0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_change_leaves_the_last_good_one_in_force() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let flow = story.flow("h1-c1", "h2-c1", Family::V4).await;
    let before = kernel::actual(&story, "h1");
    etcd::put(&story, &etcd::config_key(), r#"{"Network":"10.244.0.0/33"}"#);
    let status =
        story.at("h1").wait_status(SOON, "it does not see the wrong one", |s| !s.store.config_errors.is_empty()).await.must("h1");
    assert_eq!((status.store.config_errors[0].field.as_str(), status.health), ("Network", Health::Degraded), "{status:#?}");
    assert!(status.lease.is_some() && status.network.is_some());
    story.ctl("h1", &["status"]).exits(3);
    etcd::delete(&story, &etcd::config_key());
    let gone = |s: &overlay_agent::model::api::Status| s.problems.iter().any(|p| p.contains("is gone, the last one stays"));
    story.at("h1").wait_status(SOON, "it does not say that it is gone", gone).await.must("h1");
    assert_eq!(kernel::difference(&kernel::actual(&story, "h1"), &before), "");
    etcd::put(&story, &etcd::config_key(), &story.layout().config);
    let well = |s: &overlay_agent::model::api::Status| s.health == Health::Ok;
    story.at("h1").wait_status(SOON, "it is not well again", well).await.must("h1");
    flow.stop().await.assert_no_loss("while the configuration was wrong and away");
    assert_eq!(kernel::difference(&kernel::actual(&story, "h1"), &before), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_vni_and_port_are_followed() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let subnets = subnets_of(&story).await;
    // The containers learn their gateway's MAC, which has to stay: they would send to nobody for a minute.
    story.assert_all_reach().await;
    let gateway = |name: &str| kernel::text(&kernel::link(&story, "h1", name).must(name), "address");
    let before = gateway("ovb.1");
    let config = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":4789}}"#;
    etcd::put(&story, &etcd::config_key(), config);
    for host in ["h1", "h2"] {
        eventually(&format!("{host} has the devices of VNI 7 and none of VNI 1"), READY, || {
            let links = kernel::listed(&story, host, "ip", &["link", "show"]);
            let mut ours: Vec<String> = links.iter().map(|l| kernel::text(l, "ifname")).filter(|n| kernel::is_ours(n)).collect();
            ours.sort();
            if ours == ["ovb.7", "ovx.7"] { Ok(()) } else { Err(format!("{ours:?}")) }
        })
        .await;
        let link = kernel::link(&story, host, "ovx.7").must("ovx.7");
        assert_eq!(kernel::number(&link["linkinfo"]["info_data"], "port"), 4789);
        let peers = |s: &overlay_agent::model::api::Status| s.ready && s.data_path.peers == 1;
        story.at(host).wait_status(READY, "one peer", peers).await.must(host);
        assert!(story.lease_of(host).value.contains("\"VNI\":7"));
    }
    assert_eq!(subnets_of(&story).await, subnets, "the subnets stay, and so the containers' addresses");
    assert_eq!(gateway("ovb.7"), before);
    story.assert_all_reach().await;
}

async fn subnets_of(story: &Story) -> Vec<String> {
    let mut all = Vec::new();
    for host in story.hosts() {
        all.push(story.status(host.name()).await.lease.must("a lease").subnet.to_string());
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn smaller_subnets_are_followed() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 0;
    })
    .await;
    etcd::put(&story, &etcd::config_key(), r#"{"Network":"10.244.0.0/16","SubnetLen":26}"#);
    for host in story.hosts() {
        let small = |s: &overlay_agent::model::api::Status| {
            let length = s.lease.as_ref().and_then(|l| l.subnet.get(Family::V4)).map(|c| c.length());
            s.ready && length == Some(26) && s.data_path.peers == 1
        };
        host.wait_status(READY, "it has no /26 and one peer", small).await.must("status");
    }
    eventually("the old leases are given back", SOON, || {
        let keys: Vec<String> = etcd::leases(&story).into_iter().map(|e| e.key).collect();
        if keys.len() == 2 && keys.iter().all(|k| k.ends_with("-26")) { Ok(()) } else { Err(format!("{keys:?}")) }
    })
    .await;
    for host in story.hosts() {
        story.settled(host.name(), SOON).await;
        story.at(host.name()).attach("new").await.must("attach");
    }
    story.assert_all_reach().await;
}
