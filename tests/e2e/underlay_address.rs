//! A host's published address: floating addresses, and a dual-stack host that loses one family.

use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_agent::model::api::Status;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::traffic::Traffic;
use overlay_tests::{ExpectContext, TestLab, eventually, kernel};
use overlayctl::lab::Families;

/// A host's own address with a DHCP client's lifetime.
const DHCP_LIFETIME: &str = "valid_lft 900 preferred_lft 900";
/// A floating address, as keepalived sets it.
const FLOATING_ADDRESS: &str = "10.99.50.50/32";

async fn start_pair(families: Families) -> TestLab {
    TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = families;
    })
    .await
}

/// The source address of a family's VXLAN device.
fn vxlan_local_address(lab: &TestLab, host: &str, family: Family) -> String {
    let (name, field) = match family {
        Family::V4 => ("ovx.1", "local"),
        Family::V6 => ("ovx6.1", "local6"),
    };
    kernel::text(&kernel::link(lab, host, name).expect_ok(name)["linkinfo"]["info_data"], field)
}

/// Waits until the lease has the addresses, and the tunnel uses them as source.
async fn wait_published(lab: &TestLab, host: &str, v4: &str, v6: Option<&str>) {
    eventually(&format!("{host} has {v4} and {v6:?}"), READY_TIMEOUT, || {
        let lease = lab.lease_of(host).value;
        let v6_text = v6.map_or("null".to_owned(), |v6| format!("\"{v6}\""));
        let published = [format!("\"PublicIP\":\"{v4}\""), format!("\"PublicIPv6\":{v6_text}")];
        let sent = vxlan_local_address(lab, host, Family::V4) == v4
            && v6.is_none_or(|v6| vxlan_local_address(lab, host, Family::V6) == v6);
        if published.iter().all(|field| lease.contains(field)) && sent { Ok(()) } else { Err(lease) }
    })
    .await;
}

async fn wait_problem(lab: &TestLab, host: &str, words: &str) {
    let names = |status: &Status| status.problems.iter().any(|problem| problem.contains(words));
    lab.host(host).wait_status(CONVERGE_TIMEOUT, words, names).await.expect_ok(words);
}

async fn wait_no_problem(lab: &TestLab, host: &str) {
    lab.host(host)
        .wait_status(CONVERGE_TIMEOUT, "no problem", |status| status.ready && status.problems.is_empty())
        .await
        .expect_ok(host);
}

async fn restart_agent(lab: &TestLab, host: &str) {
    lab.host(host).agent_stop(Signal::SIGTERM).expect_ok("stop");
    lab.host(host).agent_start(&[]).expect_ok("start");
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv4_change_is_published_while_ipv6_is_missing() {
    let lab = start_pair(Families::Dual).await;
    let (old, v6) = ("10.99.1.2", "fd99::1:2");
    wait_published(&lab, "h2", old, Some(v6)).await;
    kernel::shell(&lab, "h2", &format!("ip -6 address delete {v6}/64 dev eth0"));
    wait_problem(&lab, "h2", "eth0 has no IPv6 address").await;
    let traffic = Traffic::start(&lab, "h1-c1", "h2-c1", Family::V4).await;
    kernel::shell(
        &lab,
        "h2",
        "echo 1 >/proc/sys/net/ipv4/conf/eth0/promote_secondaries
         ip address add 10.99.7.7/16 dev eth0; ip address delete 10.99.1.2/16 dev eth0
         ip route replace default via 10.99.0.254 dev eth0",
    );
    wait_published(&lab, "h2", "10.99.7.7", Some(v6)).await;
    // The family is also missing at a start: the held subnet stays.
    restart_agent(&lab, "h2").await;
    lab.host("h2")
        .wait_status(READY_TIMEOUT, "the lease", |status| status.lease.is_some() && status.data_path.peers > 0)
        .await
        .expect_ok("h2");
    wait_problem(&lab, "h2", &format!("{v6} stays in use")).await;
    wait_published(&lab, "h2", "10.99.7.7", Some(v6)).await;
    traffic.run_for(Duration::from_secs(1)).await;
    traffic.stop().await.assert_loss_at_most(400, Duration::from_secs(5), "a change of IPv4 while IPv6 is missing");
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V4).await;
    flow.run_for(Duration::from_millis(500)).await;
    flow.stop().await.assert_no_loss("IPv4 works while IPv6 is missing");
    kernel::shell(&lab, "h2", &format!("ip address add {v6}/64 dev eth0 nodad"));
    wait_no_problem(&lab, "h2").await;
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V6).await;
    flow.run_for(Duration::from_millis(500)).await;
    flow.stop().await.assert_no_loss("IPv6 is back");
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_change_is_published_while_ipv4_is_missing() {
    let lab = start_pair(Families::Dual).await;
    let v4 = "10.99.1.2";
    // The default route is deleted with it.
    kernel::shell(&lab, "h2", &format!("ip address delete {v4}/16 dev eth0"));
    wait_problem(&lab, "h2", "eth0 has no IPv4 address").await;
    wait_problem(&lab, "h2", "no IPv4 default route").await;
    kernel::shell(&lab, "h2", "ip address add fd99::7:7/64 dev eth0 nodad; ip -6 address delete fd99::1:2/64 dev eth0");
    wait_published(&lab, "h2", v4, Some("fd99::7:7")).await;
    let flow = lab.start_ping("h1-c1", "h2-c1", Family::V6).await;
    flow.run_for(Duration::from_millis(500)).await;
    flow.stop().await.assert_no_loss("IPv6 works while IPv4 is missing");
    kernel::shell(&lab, "h2", &format!("ip address add {v4}/16 dev eth0; ip route replace default via 10.99.0.254 dev eth0"));
    wait_no_problem(&lab, "h2").await;
    wait_published(&lab, "h2", v4, Some("fd99::7:7")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn floating_address_changes_nothing() {
    let lab = start_pair(Families::V4).await;
    let own = "10.99.1.1";
    kernel::shell(&lab, "h1", &format!("ip address change {own}/16 dev eth0 {DHCP_LIFETIME}"));
    let traffic = Traffic::start(&lab, "h2-c1", "h1-c1", Family::V4).await;
    let (add, delete) =
        (format!("ip address add {FLOATING_ADDRESS} dev eth0"), format!("ip address delete {FLOATING_ADDRESS} dev eth0"));
    let stays = async |what: &str| {
        traffic.run_for(Duration::from_secs(1)).await;
        let lease = lab.lease_of("h1").value;
        assert!(
            lease.contains(&format!("\"PublicIP\":\"{own}\"")) && vxlan_local_address(&lab, "h1", Family::V4) == own,
            "{what}: {lease}"
        );
    };
    kernel::shell(&lab, "h1", &add);
    stays("it is added").await;
    let status = lab.status("h1").await.underlay.expect_ok("an underlay");
    assert_eq!(status.reasons.v4.as_deref(), Some("in use before"));
    let output = lab.ctl("h1", &["status"]).assert_code(0);
    assert!(output.stdout.contains("10.99.1.1: in use before"), "{}", output.stdout);
    kernel::shell(&lab, "h2", &add);
    stays("it is on two hosts").await;
    restart_agent(&lab, "h1").await;
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("h1");
    stays("the agent starts again").await;
    kernel::shell(&lab, "h1", &delete);
    stays("it moves to the other host").await;
    assert!(!lab.log("h1").contains("underlay address changed"), "{}", lab.log("h1"));
    traffic.stop().await.assert_no_loss("a floating address");
    for host in ["h1", "h2"] {
        wait_no_problem(&lab, host).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn removed_address_moves_tunnel_to_next() {
    let lab = start_pair(Families::V4).await;
    kernel::shell(&lab, "h1", &format!("ip address add {FLOATING_ADDRESS} dev eth0; ip address add 10.99.7.7/24 dev eth0"));
    kernel::shell(&lab, "h1", "ip address delete 10.99.1.1/16 dev eth0; ip route replace 10.99.0.0/16 dev eth0 src 10.99.7.7");
    wait_published(&lab, "h1", "10.99.7.7", None).await;
    let log =
        lab.wait_for_log("h1", &["underlay address changed", "old=10.99.1.1", "new=10.99.7.7", "no longer on this host"]).await;
    assert!(log.lines().any(|line| line.contains("WARN") && line.contains("underlay address changed")), "{log}");
    // The floating address is used as a last resort, and left once the host's own address is back.
    kernel::shell(&lab, "h1", "ip address delete 10.99.7.7/24 dev eth0; ip route replace 10.99.0.0/16 dev eth0 src 10.99.50.50");
    wait_published(&lab, "h1", "10.99.50.50", None).await;
    kernel::shell(&lab, "h1", "ip address add 10.99.1.1/16 dev eth0; ip route replace default via 10.99.0.254 dev eth0");
    wait_published(&lab, "h1", "10.99.1.1", None).await;
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("h1");
    kernel::shell(&lab, "h1", "ip route delete 10.99.0.0/16 dev eth0 src 10.99.50.50; ip address delete 10.99.50.50/32 dev eth0");
    lab.assert_full_reachability().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn first_start_skips_floating_address() {
    let lab = TestLab::without_agents(1, Families::V4).await;
    let script = format!(
        "ip address flush dev eth0; ip address add {FLOATING_ADDRESS} dev eth0; ip address add 10.99.1.1/16 dev eth0 {DHCP_LIFETIME}
         ip route replace default via 10.99.0.254 dev eth0"
    );
    kernel::shell(&lab, "h1", &script);
    let underlay = lab.start_agent("h1").await.underlay.expect_ok("an underlay");
    assert_eq!(underlay.public_ip.v4, "10.99.1.1".parse().ok());
    assert_eq!(underlay.reasons.v4.as_deref(), Some("the source of the default route"));
}
