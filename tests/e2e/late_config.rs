//! A late, invalid or changed network configuration. The agents wait and report it, keep the last valid one, and follow changes.

use overlay_agent::model::Family;
use overlay_agent::model::api::Health;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, etcd, eventually, http, kernel};
use overlayctl::lab::Families;

#[tokio::test(flavor = "multi_thread")]
async fn agents_wait_for_config() {
    let lab = TestLab::without_agents(2, Families::V4).await;
    let key = etcd::config_key();
    etcd::delete(&lab, &key);
    for host in lab.hosts() {
        host.agent_start(&[]).expect_ok("start");
    }
    for host in lab.hosts() {
        let waits = |s: &overlay_agent::model::api::Status| s.store.connected && s.problems.iter().any(|p| p.contains(&key));
        let status = host
            .wait_status(CONVERGE_TIMEOUT, "it does not report that it waits for a configuration", waits)
            .await
            .expect_ok("status");
        assert!(!status.ready && status.health == Health::Waiting && status.lease.is_none(), "{status:#?}");
        assert!(status.problems[0].contains("waiting for the network's configuration"), "{:?}", status.problems);
        assert!(status.problems[0].contains("overlayctl config set FILE"), "the remedy is named: {:?}", status.problems);
        lab.wait_for_log(host.name(), &["waiting for the network's configuration", &key]).await;
        lab.ctl(host.name(), &["status"]).assert_code(3);
        assert_eq!(http::request(&host.socket(), "GET", "/healthz", "").status, 200);
        assert_eq!(http::request(&host.socket(), "GET", "/readyz", "").status, 503);
        let output = lab.ctl(host.name(), &["attach", "early"]).assert_code(1);
        assert!(output.stderr.contains("no subnet is leased yet"), "{}", output.stderr);
        assert!(kernel::link(&lab, host.name(), "ovx.1").is_none(), "nothing is created yet");
    }
    lab.ctl("h1", &["status", "--wait", "300ms"]).assert_code(4);

    // The errors of an invalid one are named by field, and the agent keeps waiting.
    etcd::put(&lab, &key, r#"{"Network":"10.244.0.1/16","SubnetLen":99,"Backend":{"Type":"carrier-pigeon"}}"#);
    let status = lab
        .host("h1")
        .wait_status(CONVERGE_TIMEOUT, "it does not report the errors", |s| !s.store.config_errors.is_empty())
        .await
        .expect_ok("status");
    let fields: Vec<&str> = status.store.config_errors.iter().map(|e| e.field.as_str()).collect();
    assert!(fields.contains(&"Network") && fields.contains(&"Backend.Type"), "{fields:?}");
    assert!(
        !status.ready && status.problems.iter().any(|p| p.contains("is invalid") && p.contains("10.244.0.1/16")),
        "{status:#?}"
    );
    lab.wait_for_log("h1", &["10.244.0.1/16"]).await;

    let file = lab.dir().join("network.json");
    std::fs::write(&file, &lab.layout().config).expect_ok("a file");
    lab.ctl("h1", &["config", "set", &file.to_string_lossy()]).assert_code(0);
    lab.wait_full_mesh().await;
    for host in lab.hosts() {
        lab.wait_converged(host.name(), CONVERGE_TIMEOUT).await;
        lab.ctl(host.name(), &["status", "--wait", "10s"]).assert_code(0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_config_keeps_last_valid_one() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V4).await;
    let before = kernel::actual_state(&lab, "h1");
    etcd::put(&lab, &etcd::config_key(), r#"{"Network":"10.244.0.0/33"}"#);
    let status = lab
        .host("h1")
        .wait_status(CONVERGE_TIMEOUT, "it does not notice the invalid one", |s| !s.store.config_errors.is_empty())
        .await
        .expect_ok("h1");
    assert_eq!((status.store.config_errors[0].field.as_str(), status.health), ("Network", Health::Degraded), "{status:#?}");
    assert!(status.lease.is_some() && status.network.is_some());
    lab.ctl("h1", &["status"]).assert_code(3);
    etcd::delete(&lab, &etcd::config_key());
    let gone = |s: &overlay_agent::model::api::Status| s.problems.iter().any(|p| p.contains("was deleted; the last one stays"));
    lab.host("h1").wait_status(CONVERGE_TIMEOUT, "it does not report the missing configuration", gone).await.expect_ok("h1");
    assert_eq!(kernel::difference(&kernel::actual_state(&lab, "h1"), &before), "");
    etcd::put(&lab, &etcd::config_key(), &lab.layout().config);
    let healthy = |s: &overlay_agent::model::api::Status| s.health == Health::Ok;
    lab.host("h1").wait_status(CONVERGE_TIMEOUT, "not healthy again", healthy).await.expect_ok("h1");
    flow.stop().await.assert_no_loss("while the configuration was invalid and missing");
    assert_eq!(kernel::difference(&kernel::actual_state(&lab, "h1"), &before), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn vni_and_port_change_is_followed() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let subnets = subnets_of(&lab).await;
    // The gateway's MAC must stay: containers cache it, and would send to a wrong MAC for a minute.
    lab.assert_full_reachability().await;
    let gateway = |name: &str| kernel::text(&kernel::link(&lab, "h1", name).expect_ok(name), "address");
    let before = gateway("ovb.1");
    let config = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":4789}}"#;
    etcd::put(&lab, &etcd::config_key(), config);
    for host in ["h1", "h2"] {
        eventually(&format!("{host} has the devices of VNI 7 and none of VNI 1"), READY_TIMEOUT, || {
            let links = kernel::list_json(&lab, host, "ip", &["link", "show"]);
            let mut ours: Vec<String> =
                links.iter().map(|l| kernel::text(l, "ifname")).filter(|n| kernel::is_agent_device(n)).collect();
            ours.sort();
            if ours == ["ovb.7", "ovx.7"] { Ok(()) } else { Err(format!("{ours:?}")) }
        })
        .await;
        let link = kernel::link(&lab, host, "ovx.7").expect_ok("ovx.7");
        assert_eq!(kernel::number(&link["linkinfo"]["info_data"], "port"), 4789);
        let peers = |s: &overlay_agent::model::api::Status| s.ready && s.data_path.peers == 1;
        lab.host(host).wait_status(READY_TIMEOUT, "one peer", peers).await.expect_ok(host);
        assert!(lab.lease_of(host).value.contains("\"VNI\":7"));
    }
    assert_eq!(subnets_of(&lab).await, subnets, "the subnets stay, and so the containers' addresses");
    assert_eq!(gateway("ovb.7"), before);
    lab.assert_full_reachability().await;
}

async fn subnets_of(lab: &TestLab) -> Vec<String> {
    let mut all = Vec::new();
    for host in lab.hosts() {
        all.push(lab.status(host.name()).await.lease.expect_ok("a lease").subnet.to_string());
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn subnet_length_change_is_followed() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 0;
    })
    .await;
    etcd::put(&lab, &etcd::config_key(), r#"{"Network":"10.244.0.0/16","SubnetLen":26}"#);
    for host in lab.hosts() {
        let small = |s: &overlay_agent::model::api::Status| {
            let length = s.lease.as_ref().and_then(|l| l.subnet.get(Family::V4)).map(|c| c.length());
            s.ready && length == Some(26) && s.data_path.peers == 1
        };
        host.wait_status(READY_TIMEOUT, "no /26 or not one peer", small).await.expect_ok("status");
    }
    eventually("the old leases are deleted", CONVERGE_TIMEOUT, || {
        let keys: Vec<String> = etcd::leases(&lab).into_iter().map(|e| e.key).collect();
        if keys.len() == 2 && keys.iter().all(|k| k.ends_with("-26")) { Ok(()) } else { Err(format!("{keys:?}")) }
    })
    .await;
    for host in lab.hosts() {
        lab.wait_converged(host.name(), CONVERGE_TIMEOUT).await;
        lab.host(host.name()).attach("new").await.expect_ok("attach");
    }
    lab.assert_full_reachability().await;
}
