//! Settings of the host's interfaces under which the kernel would not carry the overlay's traffic, made before the agent starts and while it runs.

use nix::sys::signal::Signal;
use overlay_tests::story::{SECOND, SOON};
use overlay_tests::{Must, Story, kernel, within};
use overlayctl::lab::Families;

/// Writes a value below `/proc/sys/net` of h1.
fn write(story: &Story, path: &str, value: &str) {
    kernel::shell(story, "h1", &format!("echo {value} >/proc/sys/net/{path}"));
}

fn read(story: &Story, path: &str) -> String {
    kernel::sysctl(story, "h1", path)
}

/// Starts both agents, with a container on each host.
async fn started(story: &Story) {
    for host in ["h1", "h2"] {
        story.start(host).await;
    }
    story.mesh().await;
    for host in ["h1", "h2"] {
        story.at(host).attach("c1").await.must("attach");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn new_interfaces_that_do_not_forward_are_made_to() {
    let story = Story::without_agents(2, Families::V4).await;
    let before = [
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/default/forwarding", "0"),
        ("ipv4/conf/eth0/forwarding", "0"),
        ("ipv4/conf/default/rp_filter", "1"),
        ("ipv4/conf/all/rp_filter", "1"),
        ("ipv4/conf/default/arp_ignore", "8"),
        ("ipv4/conf/default/arp_filter", "1"),
        ("ipv4/conf/default/proxy_arp", "1"),
    ];
    before.into_iter().for_each(|(path, value)| write(&story, path, value));
    started(&story).await;
    story.settled("h1", SOON).await;
    story.assert_all_reach().await;

    // While it runs: what the kernel tells of is back at once.
    for (path, right, wrong) in [
        ("ipv4/conf/ovb.1/forwarding", "1", "0"),
        ("ipv4/conf/ovx.1/forwarding", "1", "0"),
        ("ipv4/conf/eth0/forwarding", "1", "0"),
        ("ipv4/conf/ovx.1/rp_filter", "2", "1"),
        ("ipv4/conf/ovb.1/proxy_arp", "0", "1"),
    ] {
        write(&story, path, wrong);
        within(path, SECOND, || read(&story, path) == right).await;
    }
    story.ctl("h1", &["check", "kernel"]).exits(0);
    story.assert_all_reach().await;

    // Without the agent they stay wrong, and are named.
    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    for (path, wrong, words) in [
        ("ipv4/conf/ovx.1/forwarding", "0", ["net.ipv4/conf/ovx.1/forwarding = 0", "sysctl -w net/ipv4/conf/ovx.1/forwarding=1"]),
        ("ipv4/conf/ovb.1/rp_filter", "0", ["net.ipv4/conf/ovb.1/rp_filter = 0", "sysctl -w net/ipv4/conf/ovb.1/rp_filter=2"]),
        ("ipv4/conf/all/arp_ignore", "8", ["net.ipv4.conf.all.arp_ignore = 8", "answers no ARP request"]),
    ] {
        let was = read(&story, path);
        write(&story, path, wrong);
        let said = story.ctl("h1", &["check", "kernel"]).exits(1).out;
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        write(&story, path, &was);
    }

    let mut cleanup = story.overlayd("h1", story.at("h1").run_dir(), story.at("h1").state_dir());
    cleanup.arg("cleanup");
    story.ends("h1", cleanup).exits(0);
    for (path, value) in before {
        assert_eq!(read(&story, path), value, "{path} is as it was");
    }
}

/// IPv6 switched off for devices to come, as hardened hosts have it.
#[tokio::test(flavor = "multi_thread")]
async fn new_interfaces_without_ipv6_get_it() {
    let story = Story::without_agents(2, Families::Dual).await;
    write(&story, "ipv6/conf/default/disable_ipv6", "1");
    started(&story).await;
    story.settled("h1", SOON).await;
    story.assert_all_reach().await;
    // A namespace whose interfaces come without, as Docker makes them.
    let netns = story.layout().namespace("h1-other");
    kernel::run(&story, "net", &["ip", "netns", "add", &netns]);
    kernel::shell(&story, "h1-other", "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6");
    story.ctl("h1", &["attach", "other", "--netns", &format!("/run/netns/{netns}")]).exits(0);
    assert_eq!(kernel::sysctl(&story, "h1-other", "ipv6/conf/eth0/disable_ipv6"), "0");

    // Switched off on a device while the agent runs: its addresses come back with it.
    for device in ["ovb.1", "ovx6.1"] {
        let path = format!("ipv6/conf/{device}/disable_ipv6");
        write(&story, &path, "1");
        within(&path, SECOND, || read(&story, &path) == "0").await;
        story.settled("h1", SOON).await;
    }
    story.assert_all_reach().await;
}
