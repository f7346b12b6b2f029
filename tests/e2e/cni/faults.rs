//! What goes wrong: bad input, an agent that is away or ends in the middle, a container that dies, memories that are lost. A clear error, and
//! nothing left behind.

use std::fs;
use std::thread;

use nix::sys::signal::Signal;
use overlay_agent::kernel::netns::Netns;
use overlay_tests::cni::{Attachment, Network, error_of};
use overlay_tests::programs::Said;
use overlay_tests::story::{READY, SOON};
use overlay_tests::{Must, Story, kernel, within};
use overlayctl::lab::Families;
use serde_json::{Value, json};

use super::{as_before, endpoints, still};

/// A story with one host, after its first container came and went: what comes along with the first one is there.
async fn prepared() -> (Story, Network) {
    let story = Story::one_host(Families::Dual).await;
    let network = Network::of(&story, "h1", "1.1.0");
    let who = Attachment::new(&story, "h1", "first");
    network.add(&who).map_err(|said| said.out).must("ADD");
    network.del(&who, &Value::Null).map_err(|said| said.out).must("DEL");
    (story, network)
}

fn cni_log(story: &Story) -> String {
    fs::read_to_string(story.at("h1").dir().join("cni.log")).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input() {
    let (story, network) = prepared().await;
    let who = Attachment::new(&story, "h1", "c1");
    let plain = story.at("h1").dir().join("plain");
    fs::write(&plain, "").must("a file");
    let good = network.config(&network.plugins[0], &[]);
    let (host, inside) = (story.inside("h1"), who.inside());
    kernel::run(&story, "h1-c1", &["ip", "link", "add", "taken0", "type", "bridge"]);
    let before = (still(&host).await, still(&inside).await);
    let plain = plain.display().to_string();
    let long = "n".repeat(300);
    let as_who = |change: &dyn Fn(&mut Attachment)| {
        let mut who = who.clone();
        change(&mut who);
        who
    };
    let config = |who: &Attachment, key: &str, value: Value, wanted: (u64, &str)| {
        let mut config = good.clone();
        config[key] = value;
        let (code, text) = error_of(&network.run("ADD", who, &network.plugins[0], &config));
        assert!(code == wanted.0 && text.contains(wanted.1), "{code}: {text}");
    };
    config(&who, "cniVersion", "9.9.9".into(), (1, "9.9.9"));
    config(&who, "cniVersion", Value::Null, (1, "0.1.0"));
    config(&who, "name", "a/b".into(), (7, "a/b"));
    config(&who, "name", long.clone().into(), (7, "bytes"));
    config(&who, "socket", "here".into(), (7, "here"));
    config(&who, "socket", plain.clone().into(), (11, "no agent answers"));
    config(&who, "ipam", serde_json::json!({ "type": "host-local" }), (2, "ipam"));
    config(&as_who(&|who| who.netns = "/run/netns/there-is-none".to_owned()), "x", Value::Null, (3, "there-is-none"));
    config(&as_who(&|who| who.netns = plain.clone()), "x", Value::Null, (4, "not a network namespace"));
    config(&as_who(&|who| who.netns = "/proc/self/ns/net".to_owned()), "x", Value::Null, (4, "host's own"));
    config(&as_who(&|who| who.netns = String::new()), "x", Value::Null, (4, "CNI_NETNS"));
    config(&as_who(&|who| who.interface = "taken0".to_owned()), "x", Value::Null, (101, "taken0"));
    config(&as_who(&|who| who.interface = "a/b".to_owned()), "x", Value::Null, (4, "CNI_IFNAME"));
    config(&as_who(&|who| who.interface = String::new()), "x", Value::Null, (4, "CNI_IFNAME"));
    config(&as_who(&|who| who.container = "../c".to_owned()), "x", Value::Null, (4, "CNI_CONTAINERID"));
    config(&as_who(&|who| who.container = String::new()), "x", Value::Null, (4, "CNI_CONTAINERID"));
    config(&as_who(&|who| who.container = long.clone()), "x", Value::Null, (7, "bytes"));
    for (verb, input, wanted) in [
        ("ADD", "", 6),
        ("ADD", "{\"cniVersion\": \"1.0.0\",", 6),
        ("ADD", "\u{1}\u{2}", 6),
        ("ADD", &good.to_string(), 4),
        ("PUT", &good.to_string(), 4),
        ("", &good.to_string(), 4),
    ] {
        assert_eq!(error_of(&network.bare(verb, input)).0, wanted, "{verb} {input}");
    }
    assert!(endpoints(&story).await.is_empty());
    as_before("the host", &host, &before.0).await;
    as_before("the container", &inside, &before.1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_not_running() {
    let (story, mut network) = prepared().await;
    network.plugins[0]["timeout"] = "1s".into();
    let who = Attachment::new(&story, "h1", "c1");
    let known = Attachment::new(&story, "h1", "c2");
    let result = network.add(&known).map_err(|said| said.out).must("ADD");
    story.at("h1").agent_stop(Signal::SIGTERM).must("SIGTERM");
    let before = (still(&story.inside("h1")).await, still(&who.inside()).await);
    let (code, text) = error_of(&network.add(&who).expect_err("ADD"));
    assert!(code == 11 && text.contains("Is overlayd running?"), "{code}: {text}");
    let (code, text) = error_of(&network.status().expect_err("STATUS"));
    assert!(code == 50 && text.contains("Is overlayd running?"), "{code}: {text}");
    assert_eq!(error_of(&network.check(&known, &result).expect_err("CHECK")).0, 11);
    assert_eq!(error_of(&network.gc(&[]).expect_err("GC")).0, 11);
    assert_eq!(error_of(&network.del(&known, &result).expect_err("DEL while the namespace is there")).0, 11);
    as_before("the host", &story.inside("h1"), &before.0).await;
    as_before("the container", &who.inside(), &before.1).await;
    // With the namespace the interface goes; the agent finds out by itself when it is back.
    Netns::delete(known.netns.rsplit_once('/').must("a name").1).must("delete");
    network.del(&known, &result).map_err(|said| said.out).must("DEL of what is gone");
    story.start("h1").await;
    network.status().map_err(|said| said.out).must("STATUS");
    assert_eq!(endpoints(&story).await.len(), 1, "the agent still knows it");
    network.del(&known, &Value::Null).map_err(|said| said.out).must("DEL again");
    assert!(endpoints(&story).await.is_empty());
}

/// Runs a verb beside what happens meanwhile; returns when the plugin has spoken to the agent, or has tried to.
async fn begin<T: Send + 'static>(
    story: &Story,
    wanted: &str,
    verb: impl FnOnce() -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let count = |log: &str| log.lines().filter(|line| line.contains(wanted)).count();
    let before = count(&cni_log(story));
    let running = thread::spawn(verb);
    within(&format!("the plugin's {wanted}"), SOON, || count(&cni_log(story)) > before).await;
    running
}

#[track_caller]
fn joined<T>(running: thread::JoinHandle<T>) -> T {
    running.join().unwrap_or_else(|_| panic!("the plugin's thread panicked"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_restarts_in_the_middle() {
    let (story, network) = prepared().await;
    let who = Attachment::new(&story, "h1", "c1");
    let add = |who: &Attachment| {
        let (network, who) = (network.clone(), who.clone());
        move || network.add(&who)
    };
    // It is away when the verb begins.
    story.at("h1").agent_stop(Signal::SIGKILL).must("SIGKILL");
    let running = begin(&story, "PUT /v1/endpoints/c1", add(&who)).await;
    story.start("h1").await;
    let result = joined(running).map_err(|said| said.out).must("ADD");
    network.check(&who, &result).map_err(|said| said.out).must("CHECK");

    // It is killed while it has the request.
    let second = Attachment::new(&story, "h1", "c2");
    story.at("h1").agent().must("the agent").signal(Signal::SIGSTOP).must("SIGSTOP");
    let running = begin(&story, "PUT /v1/endpoints/c2", add(&second)).await;
    story.at("h1").agent_stop(Signal::SIGKILL).must("SIGKILL");
    story.start("h1").await;
    let result = joined(running).map_err(|said| said.out).must("ADD");
    network.check(&second, &result).map_err(|said| said.out).must("CHECK");
    assert_eq!(endpoints(&story).await.len(), 2);

    // And so with DEL.
    story.at("h1").agent().must("the agent").signal(Signal::SIGSTOP).must("SIGSTOP");
    let running = {
        let (network, second) = (network.clone(), second.clone());
        begin(&story, "DELETE /v1/endpoints/c2", move || network.del(&second, &Value::Null)).await
    };
    story.at("h1").agent_stop(Signal::SIGKILL).must("SIGKILL");
    story.start("h1").await;
    joined(running).map_err(|said| said.out).must("DEL");
    assert_eq!(endpoints(&story).await.len(), 1);
    assert!(kernel::link(&story, "h1-c2", "eth0").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_dies_half_way() {
    let (story, network) = prepared().await;
    let before = still(&story.inside("h1")).await;
    let who = Attachment::new(&story, "h1", "c1");
    story.at("h1").agent().must("the agent").signal(Signal::SIGSTOP).must("SIGSTOP");
    let running = {
        let (network, who) = (network.clone(), who.clone());
        begin(&story, "PUT /v1/endpoints/c1", move || network.add(&who)).await
    };
    Netns::delete(who.netns.rsplit_once('/').must("a name").1).must("delete");
    story.at("h1").agent().must("the agent").signal(Signal::SIGCONT).must("SIGCONT");
    let said: Said = joined(running).expect_err("the namespace is gone");
    let (code, text) = error_of(&said);
    assert!(code == 3 && text.contains(&who.netns), "{code}: {text}");
    assert!(endpoints(&story).await.is_empty());
    as_before("the host", &story.inside("h1"), &before).await;
    network.del(&who, &Value::Null).map_err(|said| said.out).must("DEL");

    // The runtime itself gives up half way: its DEL finds whatever the agent has made of it.
    let who = Attachment::new(&story, "h1", "c2");
    story.at("h1").agent().must("the agent").signal(Signal::SIGSTOP).must("SIGSTOP");
    let mut short = network.clone();
    short.plugins[0]["timeout"] = "1s".into();
    let (code, text) = error_of(&short.add(&who).expect_err("nobody answers"));
    assert!(code == 11 && text.contains("did not answer in time"), "{code}: {text}");
    story.at("h1").agent().must("the agent").signal(Signal::SIGCONT).must("SIGCONT");
    network.del(&who, &Value::Null).map_err(|said| said.out).must("DEL");
    assert!(endpoints(&story).await.is_empty());
    assert!(kernel::link(&story, "h1-c2", "eth0").is_none());
    Netns::delete(who.netns.rsplit_once('/').must("a name").1).must("delete");
    as_before("the host", &story.inside("h1"), &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memories_that_are_lost() {
    let (story, network) = prepared().await;
    let who = Attachment::new(&story, "h1", "c1");
    let before = (still(&story.inside("h1")).await, still(&who.inside()).await);
    network.add(&who).map_err(|said| said.out).must("ADD");
    story.at("h1").agent_stop(Signal::SIGTERM).must("SIGTERM");
    fs::remove_file(story.at("h1").state_dir().join("endpoints.json")).must("the agent's memory");
    story.at("h1").agent_start(&[]).must("start");
    story.at("h1").wait_ready(READY).await.must("ready");
    assert!(endpoints(&story).await.is_empty());
    assert!(kernel::link(&story, "h1-c1", "eth0").is_some(), "the container kept its interface");
    network.del(&who, &Value::Null).map_err(|said| said.out).must("DEL without a previous result");
    as_before("the host", &story.inside("h1"), &before.0).await;
    as_before("the container", &who.inside(), &before.1).await;
}

/// A container that is lost without a DEL, and another one at once in a namespace of the same path.
#[tokio::test(flavor = "multi_thread")]
async fn container_lost_without_del_holds_nothing() {
    let (story, mut network) = prepared().await;
    network.runtime = json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] });
    let mut who = Attachment::new(&story, "h1", "lost");
    network.add(&who).map_err(|said| said.out).must("ADD");
    for n in 0..2 {
        Netns::delete(who.netns.rsplit_once('/').must("a name").1).must("delete");
        who = Attachment { container: format!("next{n}"), ..Attachment::new(&story, "h1", "lost") };
        let result = network.add(&who).map_err(|said| said.out).must("ADD of the next");
        network.check(&who, &result).map_err(|said| said.out).must("CHECK of the next");
    }
    let listed = endpoints(&story).await;
    assert!(listed.len() == 1 && listed[0].name.as_str().starts_with("next1"), "{listed:?}");
}
