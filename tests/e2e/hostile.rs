//! What others write into etcd is refused where it cannot be right: named, counted, left out. The rest works, and nothing leads out of the
//! network.

use overlay_agent::model::api::Status;
use overlay_agent::model::{Family, Subnet};
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, Story, etcd, eventually, http, kernel};
use overlayctl::lab::Families;

const MAC: &str = "02:00:00:00:00:77";

fn lease(public_ip: &str, mac: &str) -> String {
    format!(r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#)
}

/// A key in a block of thirty subnets where no host of the story has its own, which it chose by a hash.
fn free_block(taken: &[Subnet]) -> impl Fn(u8) -> String + use<> {
    let free = |block: u8| (block..block + 30).all(|n| taken.iter().all(|subnet| subnet.to_key() != format!("10.244.{n}.0-24")));
    let block = [201, 101, 1].into_iter().find(|block| free(*block)).must("two hosts cannot hold a part of three blocks");
    move |n| format!("10.244.{}.0-24", block + n)
}

/// Name, key, value, and a word that the reason holds.
fn hostile(own: &str, peer_subnet: &str, v4: &impl Fn(u8) -> String) -> Vec<(&'static str, String, String, &'static str)> {
    let good = lease("10.99.7.7", MAC);
    let plain = |n: u8, mac: &str| lease(&format!("10.99.7.{n}"), mac);
    vec![
        ("no JSON", v4(0), "not json at all".to_owned(), "not JSON"),
        ("half a JSON", v4(1), good[..40].to_owned(), "not JSON"),
        ("an array", v4(2), "[1,2,3]".to_owned(), "not a JSON object"),
        ("empty", v4(3), String::new(), "not JSON"),
        ("no MAC", v4(4), r#"{"PublicIP":"10.99.7.5","BackendType":"vxlan","BackendData":{"VNI":1}}"#.to_owned(), "VtepMAC"),
        ("a multicast MAC", v4(5), plain(6, "01:00:5e:00:00:01"), "VtepMAC"),
        ("a broadcast MAC", v4(6), plain(7, "ff:ff:ff:ff:ff:ff"), "VtepMAC"),
        ("a MAC of zeros", v4(7), plain(8, "00:00:00:00:00:00"), "VtepMAC"),
        ("a MAC that is none", v4(8), plain(9, "02:00"), "VtepMAC"),
        ("our public IP", v4(9), lease(own, MAC), "this host's own"),
        ("a loopback public IP", v4(10), lease("127.0.0.1", MAC), "loopback"),
        ("a multicast public IP", v4(11), lease("224.0.0.1", MAC), "multicast"),
        ("an unspecified public IP", v4(12), lease("0.0.0.0", MAC), "unspecified"),
        ("a broadcast public IP", v4(13), lease("255.255.255.255", MAC), "broadcast"),
        ("a link-local public IP", v4(14), lease("169.254.1.1", MAC), "link-local"),
        ("a public IP inside the overlay", v4(15), lease("10.244.3.3", MAC), "must not lie among the overlay's subnets"),
        ("a public IP that is text", v4(16), lease("$(reboot)", MAC), "must be an IPv4 address"),
        ("a subnet outside the network", "10.50.0.0-24".to_owned(), plain(18, "02:00:00:00:01:18"), "not inside the network"),
        ("the default route", "0.0.0.0-0".to_owned(), plain(19, "02:00:00:00:01:19"), "not inside the network"),
        ("the whole network", "10.244.0.0-16".to_owned(), plain(20, "02:00:00:00:01:20"), "more than a quarter"),
        ("a part of another's", peer_subnet.replace("-24", "-26"), plain(21, "02:00:00:00:01:21"), "overlaps"),
        ("another VNI", v4(21), good.replace("\"VNI\":1", "\"VNI\":99"), "VNI 99"),
        ("a VNI that is none", v4(22), good.replace("\"VNI\":1", "\"VNI\":16777216"), "VNI"),
        (
            "another backend",
            v4(23),
            r#"{"PublicIP":"10.99.7.24","PublicIPv6":null,"BackendType":"host-gw"}"#.to_owned(),
            "host-gw",
        ),
        ("shell in the key", "10.244.225.0-24;reboot".to_owned(), good.clone(), "key is no subnet"),
        ("a key with escapes", "10.244.226.0-24\u{1b}[31m\u{7}".to_owned(), good.clone(), "key is no subnet"),
        ("a key that is not canonical", "10.244.227.1-24".to_owned(), good.clone(), "key is no subnet"),
        ("a key in IPv6", "fd00:10:244:51::-64".to_owned(), good.clone(), "PublicIPv6"),
        (
            "shell in the name",
            v4(28),
            format!(r#"{},"Node":{{"Name":"$(touch /tmp/x); `reboot`\u001b[31m","Id":"aa"}}}}"#, &good[..good.len() - 1]),
            "Node",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn lease_values() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let before = kernel::actual(&story, "h1");
    let flow = story.flow("h1-c1", "h2-c1", Family::V4).await;
    let own = story.at("h1").layout().addresses.v4.must("an address").to_string();
    let ours = story.status("h1").await.lease.must("a lease").subnet;
    let peer = story.status("h2").await.lease.must("a lease").subnet;
    let v4 = free_block(&[ours, peer]);
    let all = hostile(&own, &peer.to_key(), &v4);
    for (_, key, value, _) in &all {
        etcd::put(&story, &etcd::lease_key(key), value);
    }
    let megabyte = etcd::lease_key(&v4(29));
    etcd::put_long(&story, &megabyte, format!("{{\"PublicIP\":\"{}\"}}", "A".repeat(1 << 20)).as_bytes());
    let count = all.len() + 1;
    let counted = |s: &Status| s.store.refused.len() == count && s.store.leases == count + 2;
    let status = story.at("h1").wait_status(SOON, &format!("it does not count {count} refusals"), counted).await.must("h1");
    assert!(status.ready, "the rest works: {status:#?}");
    assert!(status.problems.iter().any(|p| p.contains(&format!("{count} leases are left out"))), "{:?}", status.problems);
    story.ctl("h1", &["status"]).exits(3);

    let subnets = story.at("h1").client().subnets().await.must("subnets").subnets;
    let log = story.log("h1");
    for (name, key, _, reason) in &all {
        // The key with its control characters replaced.
        let shown: String = key.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        let entry = subnets.iter().find(|s| s.key == *key || s.key == shown).must(&format!("{name}: an entry {shown}"));
        let refused = entry.refused.as_deref().unwrap_or_default();
        assert!(refused.contains(reason), "{name}: `{refused}` does not say `{reason}`");
        assert!(log.lines().any(|line| line.contains(&shown) && line.contains("is left out")), "{name}: not in the log: {shown}");
    }
    assert!(subnets.iter().any(|s| s.refused.as_deref().is_some_and(|r| r.contains("more than the"))), "1 MB is named");
    let table = story.ctl("h1", &["subnets"]).exits(0);
    assert_eq!(table.out.matches("left out:").count(), count, "{}", table.out);
    for text in [&table.out, &log] {
        assert!(!text.contains('\u{1b}') && !text.contains('\u{7}'), "no escapes of others reach a terminal");
        assert!(text.lines().all(|line| line.len() < 2000), "no line is blown up");
    }
    let metrics = http::ask(&story.at("h1").socket(), "GET", "/metrics", "").body;
    assert!(metrics.contains(&format!("overlayd_refused_leases {count}\n")), "{metrics}");

    assert_eq!(kernel::difference(&kernel::actual(&story, "h1"), &before), "", "nothing of it reaches the kernel");
    assert_eq!(story.at("h1").client().peers().await.must("peers").peers.len(), 1);
    story.assert_all_reach().await;
    flow.stop().await.assert_no_loss("while hostile values came");

    // The agent starts beside them as well.
    story.at("h1").agent_stop(nix::sys::signal::Signal::SIGTERM).must("stop");
    story.start("h1").await;
    assert_eq!(kernel::difference(&kernel::actual(&story, "h1"), &before), "");
    for (_, key, ..) in &all {
        etcd::delete(&story, &etcd::lease_key(key));
    }
    etcd::delete(&story, &megabyte);
    let well = |s: &Status| s.store.refused.is_empty() && s.problems.is_empty();
    story.at("h1").wait_status(SOON, "it is not well again", well).await.must("h1");
}

/// A route that is outside the network must not come to be, whatever stands in etcd at the start.
#[tokio::test(flavor = "multi_thread")]
async fn two_that_claim_the_same() {
    let story = Story::without_agents(1, Families::V4).await;
    etcd::put(&story, &etcd::lease_key("10.244.50.0-24"), &lease("10.99.7.1", "02:00:00:00:00:01"));
    etcd::put(&story, &etcd::lease_key("10.244.50.0-26"), &lease("10.99.7.2", "02:00:00:00:00:02"));
    etcd::put(&story, &etcd::lease_key("10.244.51.0-24"), &lease("10.99.7.3", "02:00:00:00:00:01"));
    let status = story.start("h1").await;
    assert_eq!((status.data_path.peers, status.store.refused.len()), (1, 2), "{status:#?}");
    story.settled("h1", SOON).await;
    // The older one goes: the younger ones come in.
    etcd::delete(&story, &etcd::lease_key("10.244.50.0-24"));
    story
        .at("h1")
        .wait_status(SOON, "the younger ones do not come in", |s| s.data_path.peers == 2 && s.store.refused.is_empty())
        .await
        .must("h1");
    story.settled("h1", SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn configurations() {
    let story = Story::up(|options| {
        options.hosts = 1;
        options.containers = 0;
    })
    .await;
    let before = etcd::list(&story, &etcd::config_key());
    let file = story.dir().join("network.json");
    for (text, wanted) in [
        (r#"{"Network":"10.244.0.1/16"}"#, &["Network", "10.244.0.1/16", "10.244.0.0/16"][..]),
        (r#"{"Network":"10.244.0.0/30"}"#, &["Network", "10.244.0.0/30", "too small"]),
        (
            r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.9.0","SubnetMax":"10.244.5.0"}"#,
            &["SubnetMin", "10.244.9.0", "SubnetMax"],
        ),
        (r#"{"Network":"10.244.0.0/16","SubnetMin":"10.245.0.0"}"#, &["SubnetMin", "10.245.0.0", "not inside"]),
        (r#"{"Network":"10.244.0.0/16","SubnetMax":"10.244.5.7"}"#, &["SubnetMax", "10.244.5.7", "10.244.5.0"]),
        (r#"{"Network":"10.244.0.0/16","SubnetLen":31}"#, &["SubnetLen", "31", "18 to 30"]),
        (r#"{"Network":"10.244.0.0/16","SubnetLen":17}"#, &["SubnetLen", "17", "18 to 30"]),
        (r#"{"Network":"224.0.0.0/8"}"#, &["Network", "224.0.0.0/8", "multicast"]),
        (r#"{"Network":"10.244.0.0/16","Backend":{"VNI":16777216}}"#, &["Backend.VNI", "16777216"]),
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#, &["Backend.Type", "udp", "vxlan"]),
        (r#"{"Network":"10.244.0.0/16","EnableIPv6":true}"#, &["IPv6Network", "missing"]),
        (r#"{"Network":"10.244.0.0/16""#, &["JSON"]),
        ("{}", &["Network", "missing"]),
    ] {
        std::fs::write(&file, text).must("a file");
        let path = file.to_string_lossy().into_owned();
        story.ctl("h1", &["config", "set", &path]).exits(1).complains(wanted).complains(&["nothing was written"]);
        story.ctl("h1", &["config", "validate", &path]).exits(1);
        assert_eq!(etcd::list(&story, &etcd::config_key()), before, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exhausted_pool_is_named() {
    let story = Story::up(|options| {
        options.hosts = 3;
        options.containers = 0;
        options.agents = false;
        options.networks.v4 = "10.200.0.0/28".parse().ok();
    })
    .await;
    // Three subnets of /30; one is reserved.
    let reserved = etcd::lease_key("10.200.0.8-30");
    etcd::put(&story, &reserved, "{}");
    story.start("h1").await;
    story.start("h2").await;
    story.at("h3").agent_start(&[]).must("start");
    let exhausted = |s: &Status| s.problems.iter().any(|p| p.contains("10.200.0.0/28"));
    let status = story.at("h3").wait_status(SOON, "it does not name the exhausted pool", exhausted).await.must("h3");
    assert!(!status.ready && status.lease.is_none(), "{status:#?}");
    story.logged("h3", &["10.200.0.0/28"]).await;
    etcd::delete(&story, &reserved);
    story.at("h3").wait_ready(READY).await.must("it takes the one that has become free");
    story.mesh().await;
    eventually("all are well", SOON, || {
        let said = story.ctl("h3", &["status"]);
        if said.code == Some(0) { Ok(()) } else { Err(said.out) }
    })
    .await;
}
