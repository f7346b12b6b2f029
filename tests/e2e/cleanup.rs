//! `overlayd cleanup`: the host is as it was before the agent ever ran.

use nix::sys::signal::Signal;
use overlay_tests::dump::Dump;
use overlay_tests::programs::Said;
use overlay_tests::story::{SECOND, SOON};
use overlay_tests::{Must, Story, etcd, kernel, within};
use overlayctl::lab::Families;

fn cleanup(story: &Story, host: &str) -> Said {
    let mut command = story.overlayd(host, story.at(host).run_dir(), story.at(host).state_dir());
    command.arg("cleanup");
    story.ends(host, command)
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_as_it_was() {
    let story = Story::without_agents(2, Families::Dual).await;
    // Something of the host's own, which is not ours to touch.
    kernel::shell(
        &story,
        "h1",
        "ip route add 10.50.0.0/16 via 10.99.0.254; ip route add 10.51.0.0/16 via 10.99.0.254 proto static table 77
         ip rule add from 10.51.0.0/16 table 77; ip nexthop add id 5 via 10.99.0.254 dev eth0; ip route add 10.52.0.0/16 nhid 5
         ip link add own type bridge; ip link set own up; ip address add 10.53.0.1/24 dev own
         ip neigh add 10.53.0.9 lladdr 02:00:00:00:00:09 dev own nud permanent
         nft add table inet own; nft 'add chain inet own c { type filter hook forward priority 0; }'; nft add rule inet own c counter accept
         echo 1 >/proc/sys/net/ipv4/ip_forward",
    );
    // Duplicate address detection changes flags for a second or two.
    overlay_tests::notify::Notifications::listen(&story.inside("h1")).settle().await;
    let before = [Dump::of(&story.inside("h1")), Dump::of(&story.inside("h2"))];
    story.start("h1").await;
    story.start("h2").await;
    story.mesh().await;
    for host in ["h1", "h2"] {
        for container in ["c1", "c2"] {
            story.at(host).attach(container).await.must("attach");
        }
    }
    story.assert_all_reach().await;
    assert_eq!(etcd::leases(&story).len(), 2);

    for (number, host) in ["h1", "h2"].into_iter().enumerate() {
        assert!(!Dump::of(&story.inside(host)).changes_since(&before[number]).is_empty(), "the agent did something");
        story.at(host).agent_stop(Signal::SIGTERM).must("stop");
        let (run_dir, state_dir) = (story.at(host).run_dir(), story.at(host).state_dir());
        cleanup(&story, host).exits(0);
        let changes = Dump::of(&story.inside(host)).changes_since(&before[number]);
        assert!(changes.is_empty(), "{host} is not as it was:\n{changes}");
        assert_eq!(etcd::leases(&story).len(), 1 - number, "the lease of {host} is gone");
        assert!(!run_dir.exists(), "{} is gone", run_dir.display());
        assert!(!state_dir.exists(), "{} is gone", state_dir.display());
        let inside = kernel::listed(&story, &format!("{host}-c1"), "ip", &["link", "show"]);
        assert_eq!(inside.len(), 1, "the containers keep their loopback device alone: {inside:#?}");
        // Again, with nothing left to do.
        cleanup(&story, host).exits(0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_stays_its_owners() {
    let story = Story::without_agents(1, Families::V4).await;
    story.start("h1").await;
    let lease = story.lease_of("h1");
    // The operator makes it one: a key without an etcd lease.
    etcd::put(&story, &lease.key, &lease.value);
    story
        .at("h1")
        .wait_status(SOON, "the reservation is not seen", |s| s.ready && s.lease.as_ref().is_some_and(|l| l.reservation))
        .await
        .must("status");
    let kept = story.lease_of("h1");
    assert_eq!((&kept.key, kept.lease), (&lease.key, 0), "it never becomes a lease again");
    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    cleanup(&story, "h1").exits(0);
    assert_eq!(etcd::leases(&story), [kept], "it is its owner's to delete");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_refused_while_the_agent_runs() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let before = kernel::actual(&story, "h1");
    cleanup(&story, "h1").exits(1).complains(&["cleanup needs the agent stopped"]);
    // With other directories it is still the same namespace.
    let mut elsewhere = story.overlayd("h1", story.dir().join("other/run"), story.dir().join("other/state"));
    elsewhere.arg("cleanup");
    story.ends("h1", elsewhere).exits(1).complains(&["stop"]);
    assert_eq!(kernel::difference(&kernel::actual(&story, "h1"), &before), "", "nothing was touched");
    assert_eq!(etcd::leases(&story).len(), 2);
    story.assert_all_reach().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_follow_and_etcd_need_not_be_there() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 0;
    })
    .await;
    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    cleanup(&story, "h1").exits(0);
    let routes =
        |host: &str| kernel::listed(&story, host, "ip", &["route", "show", "proto", kernel::PROTOCOL, "type", "unicast"]).len();
    within("h2 has no route to h1", SECOND, || routes("h2") == 0).await;

    story.at("h2").agent_stop(Signal::SIGTERM).must("stop");
    etcd::kill(&story);
    let said = cleanup(&story, "h2").exits(1).complains(&["lease in etcd is not given back"]);
    assert!(kernel::link(&story, "h2", "ovx.1").is_none(), "the kernel is cleaned all the same: {}", said.err);
    etcd::start(&story).await;
    cleanup(&story, "h2").exits(0);
    assert_eq!(etcd::leases(&story), [], "repeated, it gives the lease back");
}
