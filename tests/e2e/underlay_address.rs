//! Which of its addresses a host gives its peers: floating addresses beside its own, and one family of a dual-stack host in trouble.

use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Family;
use overlay_agent::model::api::Status;
use overlay_tests::story::{READY, SOON};
use overlay_tests::traffic::Traffic;
use overlay_tests::{Must, Story, eventually, kernel};
use overlayctl::lab::Families;

/// A host's own address as a DHCP client sets it: with a lifetime.
const LIFETIME: &str = "valid_lft 900 preferred_lft 900";
/// A floating address, as keepalived sets it.
const FLOATING: &str = "10.99.50.50/32";

async fn pair(families: Families) -> Story {
    Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = families;
    })
    .await
}

/// The address that the VXLAN device of a family sends from.
fn source(story: &Story, host: &str, family: Family) -> String {
    let (name, field) = match family {
        Family::V4 => ("ovx.1", "local"),
        Family::V6 => ("ovx6.1", "local6"),
    };
    kernel::text(&kernel::link(story, host, name).must(name)["linkinfo"]["info_data"], field)
}

/// Both that the lease says so, and that the tunnel sends from there.
async fn publishes(story: &Story, host: &str, v4: &str, v6: Option<&str>) {
    eventually(&format!("{host} has {v4} and {v6:?}"), READY, || {
        let lease = story.lease_of(host).value;
        let v6_text = v6.map_or("null".to_owned(), |v6| format!("\"{v6}\""));
        let published = [format!("\"PublicIP\":\"{v4}\""), format!("\"PublicIPv6\":{v6_text}")];
        let sent = source(story, host, Family::V4) == v4 && v6.is_none_or(|v6| source(story, host, Family::V6) == v6);
        if published.iter().all(|field| lease.contains(field)) && sent { Ok(()) } else { Err(lease) }
    })
    .await;
}

async fn has_problem(story: &Story, host: &str, words: &str) {
    let names = |status: &Status| status.problems.iter().any(|problem| problem.contains(words));
    story.at(host).wait_status(SOON, words, names).await.must(words);
}

async fn has_no_problem(story: &Story, host: &str) {
    story.at(host).wait_status(SOON, "no problem", |status| status.ready && status.problems.is_empty()).await.must(host);
}

async fn restart(story: &Story, host: &str) {
    story.at(host).agent_stop(Signal::SIGTERM).must("stop");
    story.at(host).agent_start(&[]).must("start");
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv4_change_is_published_while_ipv6_is_missing() {
    let story = pair(Families::Dual).await;
    let (old, v6) = ("10.99.1.2", "fd99::1:2");
    publishes(&story, "h2", old, Some(v6)).await;
    kernel::shell(&story, "h2", &format!("ip -6 address delete {v6}/64 dev eth0"));
    has_problem(&story, "h2", "eth0 has no IPv6 address").await;
    let traffic = Traffic::start(&story, "h1-c1", "h2-c1", Family::V4).await;
    kernel::shell(
        &story,
        "h2",
        "echo 1 >/proc/sys/net/ipv4/conf/eth0/promote_secondaries
         ip address add 10.99.7.7/16 dev eth0; ip address delete 10.99.1.2/16 dev eth0
         ip route replace default via 10.99.0.254 dev eth0",
    );
    publishes(&story, "h2", "10.99.7.7", Some(v6)).await;
    // A start finds the family missing as well: what was held goes on.
    restart(&story, "h2").await;
    story
        .at("h2")
        .wait_status(READY, "the lease", |status| status.lease.is_some() && status.data_path.peers > 0)
        .await
        .must("h2");
    has_problem(&story, "h2", &format!("{v6} stays in use")).await;
    publishes(&story, "h2", "10.99.7.7", Some(v6)).await;
    traffic.go_on(Duration::from_secs(1)).await;
    traffic.stop().await.assert_at_most(400, Duration::from_secs(5), "IPv4's change while IPv6 is missing");
    let flow = story.flow("h1-c1", "h2-c1", Family::V4).await;
    flow.go_on(Duration::from_millis(500)).await;
    flow.stop().await.assert_no_loss("IPv4 is whole while IPv6 is missing");
    kernel::shell(&story, "h2", &format!("ip address add {v6}/64 dev eth0 nodad"));
    has_no_problem(&story, "h2").await;
    let flow = story.flow("h1-c1", "h2-c1", Family::V6).await;
    flow.go_on(Duration::from_millis(500)).await;
    flow.stop().await.assert_no_loss("IPv6 is back");
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_change_is_published_while_ipv4_is_missing() {
    let story = pair(Families::Dual).await;
    let v4 = "10.99.1.2";
    // Its default route goes along with it.
    kernel::shell(&story, "h2", &format!("ip address delete {v4}/16 dev eth0"));
    has_problem(&story, "h2", "eth0 has no IPv4 address").await;
    has_problem(&story, "h2", "no IPv4 default route").await;
    kernel::shell(&story, "h2", "ip address add fd99::7:7/64 dev eth0 nodad; ip -6 address delete fd99::1:2/64 dev eth0");
    publishes(&story, "h2", v4, Some("fd99::7:7")).await;
    let flow = story.flow("h1-c1", "h2-c1", Family::V6).await;
    flow.go_on(Duration::from_millis(500)).await;
    flow.stop().await.assert_no_loss("IPv6 is whole while IPv4 is missing");
    kernel::shell(&story, "h2", &format!("ip address add {v4}/16 dev eth0; ip route replace default via 10.99.0.254 dev eth0"));
    has_no_problem(&story, "h2").await;
    publishes(&story, "h2", v4, Some("fd99::7:7")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn floating_address_that_comes_moves_and_goes_changes_nothing() {
    let story = pair(Families::V4).await;
    let own = "10.99.1.1";
    kernel::shell(&story, "h1", &format!("ip address change {own}/16 dev eth0 {LIFETIME}"));
    let traffic = Traffic::start(&story, "h2-c1", "h1-c1", Family::V4).await;
    let (add, delete) = (format!("ip address add {FLOATING} dev eth0"), format!("ip address delete {FLOATING} dev eth0"));
    let stays = async |what: &str| {
        traffic.go_on(Duration::from_secs(1)).await;
        let lease = story.lease_of("h1").value;
        assert!(lease.contains(&format!("\"PublicIP\":\"{own}\"")) && source(&story, "h1", Family::V4) == own, "{what}: {lease}");
    };
    kernel::shell(&story, "h1", &add);
    stays("it is added").await;
    let status = story.status("h1").await.underlay.must("an underlay");
    assert_eq!(status.reasons.v4.as_deref(), Some("in use before"));
    let shown = story.ctl("h1", &["status"]).exits(0);
    assert!(shown.out.contains("10.99.1.1: in use before"), "{}", shown.out);
    kernel::shell(&story, "h2", &add);
    stays("it is on two hosts").await;
    restart(&story, "h1").await;
    story.at("h1").wait_ready(READY).await.must("h1");
    stays("the agent starts again").await;
    kernel::shell(&story, "h1", &delete);
    stays("it goes to the other host").await;
    assert!(!story.log("h1").contains("is another one now"), "{}", story.log("h1"));
    traffic.stop().await.assert_none("a floating address");
    for host in ["h1", "h2"] {
        has_no_problem(&story, host).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tunnel_moves_to_the_next_fit_address_where_its_own_goes() {
    let story = pair(Families::V4).await;
    kernel::shell(&story, "h1", &format!("ip address add {FLOATING} dev eth0; ip address add 10.99.7.7/24 dev eth0"));
    kernel::shell(&story, "h1", "ip address delete 10.99.1.1/16 dev eth0; ip route replace 10.99.0.0/16 dev eth0 src 10.99.7.7");
    publishes(&story, "h1", "10.99.7.7", None).await;
    let log = story.logged("h1", &["is another one now", "old=10.99.1.1", "new=10.99.7.7", "no longer on this host"]).await;
    assert!(log.lines().any(|line| line.contains("WARN") && line.contains("is another one now")), "{log}");
    // The last resort is used as well, and left for the host's own once that is back.
    kernel::shell(
        &story,
        "h1",
        "ip address delete 10.99.7.7/24 dev eth0; ip route replace 10.99.0.0/16 dev eth0 src 10.99.50.50",
    );
    publishes(&story, "h1", "10.99.50.50", None).await;
    kernel::shell(&story, "h1", "ip address add 10.99.1.1/16 dev eth0; ip route replace default via 10.99.0.254 dev eth0");
    publishes(&story, "h1", "10.99.1.1", None).await;
    story.at("h1").wait_ready(READY).await.must("h1");
    kernel::shell(
        &story,
        "h1",
        "ip route delete 10.99.0.0/16 dev eth0 src 10.99.50.50; ip address delete 10.99.50.50/32 dev eth0",
    );
    story.assert_all_reach().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn first_start_passes_over_a_floating_address() {
    let story = Story::without_agents(1, Families::V4).await;
    let script = format!(
        "ip address flush dev eth0; ip address add {FLOATING} dev eth0; ip address add 10.99.1.1/16 dev eth0 {LIFETIME}
         ip route replace default via 10.99.0.254 dev eth0"
    );
    kernel::shell(&story, "h1", &script);
    let underlay = story.start("h1").await.underlay.must("an underlay");
    assert_eq!(underlay.public_ip.v4, "10.99.1.1".parse().ok());
    assert_eq!(underlay.reasons.v4.as_deref(), Some("the source of the default route"));
}
