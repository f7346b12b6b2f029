//! Failures: invalid input, a missing or restarted agent, a dying container, lost state. A clear error, and no leftovers.

use std::fs;
use std::thread;

use nix::sys::signal::Signal;
use overlay_agent::kernel::netns::Netns;
use overlay_tests::cni::{Attachment, Network, parse_error};
use overlay_tests::programs::CommandOutput;
use overlay_tests::test_lab::{CONVERGE_TIMEOUT, READY_TIMEOUT};
use overlay_tests::{ExpectContext, TestLab, eventually_true, kernel};
use overlayctl::lab::Families;
use serde_json::{Value, json};

use super::{dump_when_stable, endpoints, wait_unchanged};

/// A lab with one host after its first container was removed. The first container's lasting side effects are part of the
/// baseline.
async fn start_lab_with_network() -> (TestLab, Network) {
    let lab = TestLab::one_host(Families::Dual).await;
    let network = Network::overlay_only(&lab, "h1", "1.1.0");
    let attachment = Attachment::new(&lab, "h1", "first");
    network.add(&attachment).map_err(|output| output.stdout).expect_ok("ADD");
    network.del(&attachment, &Value::Null).map_err(|output| output.stdout).expect_ok("DEL");
    (lab, network)
}

fn cni_log(lab: &TestLab) -> String {
    fs::read_to_string(lab.host("h1").dir().join("cni.log")).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_input_is_rejected() {
    let (lab, network) = start_lab_with_network().await;
    let attachment = Attachment::new(&lab, "h1", "c1");
    let plain = lab.host("h1").dir().join("plain");
    fs::write(&plain, "").expect_ok("a file");
    let good = network.config(&network.plugins[0], &[]);
    let (host, inside) = (lab.open_netns("h1"), attachment.open_netns());
    kernel::run(&lab, "h1-c1", &["ip", "link", "add", "taken0", "type", "bridge"]);
    let before = (dump_when_stable(&host).await, dump_when_stable(&inside).await);
    let plain = plain.display().to_string();
    let long = "n".repeat(300);
    let as_who = |change: &dyn Fn(&mut Attachment)| {
        let mut attachment = attachment.clone();
        change(&mut attachment);
        attachment
    };
    let config = |attachment: &Attachment, key: &str, value: Value, wanted: (u64, &str)| {
        let mut config = good.clone();
        config[key] = value;
        if key == "socket" {
            // Nothing will ever listen there.
            config["timeout"] = "1s".into();
        }
        let (code, text) = parse_error(&network.exec_plugin("ADD", attachment, &network.plugins[0], &config));
        assert!(code == wanted.0 && text.contains(wanted.1), "{code}: {text}");
    };
    config(&attachment, "cniVersion", "9.9.9".into(), (1, "9.9.9"));
    config(&attachment, "cniVersion", Value::Null, (1, "0.1.0"));
    config(&attachment, "name", "a/b".into(), (7, "a/b"));
    config(&attachment, "name", long.clone().into(), (7, "bytes"));
    config(&attachment, "socket", "here".into(), (7, "here"));
    config(&attachment, "socket", plain.clone().into(), (11, "nothing listens"));
    config(&attachment, "ipam", serde_json::json!({ "type": "host-local" }), (2, "ipam"));
    config(
        &as_who(&|attachment| attachment.netns = "/run/netns/there-is-none".to_owned()),
        "x",
        Value::Null,
        (3, "there-is-none"),
    );
    config(&as_who(&|attachment| attachment.netns = plain.clone()), "x", Value::Null, (4, "not a network namespace"));
    config(&as_who(&|attachment| attachment.netns = "/proc/self/ns/net".to_owned()), "x", Value::Null, (4, "host's own"));
    config(&as_who(&|attachment| attachment.netns = String::new()), "x", Value::Null, (4, "CNI_NETNS"));
    config(&as_who(&|attachment| attachment.interface = "taken0".to_owned()), "x", Value::Null, (101, "taken0"));
    config(&as_who(&|attachment| attachment.interface = "a/b".to_owned()), "x", Value::Null, (4, "CNI_IFNAME"));
    config(&as_who(&|attachment| attachment.interface = String::new()), "x", Value::Null, (4, "CNI_IFNAME"));
    config(&as_who(&|attachment| attachment.container = "../c".to_owned()), "x", Value::Null, (4, "CNI_CONTAINERID"));
    config(&as_who(&|attachment| attachment.container = String::new()), "x", Value::Null, (4, "CNI_CONTAINERID"));
    config(&as_who(&|attachment| attachment.container = long.clone()), "x", Value::Null, (7, "bytes"));
    for (verb, input, wanted) in [
        ("ADD", "", 6),
        ("ADD", "{\"cniVersion\": \"1.0.0\",", 6),
        ("ADD", "\u{1}\u{2}", 6),
        ("ADD", &good.to_string(), 4),
        ("PUT", &good.to_string(), 4),
        ("", &good.to_string(), 4),
    ] {
        assert_eq!(parse_error(&network.exec_own_plugin(verb, input)).0, wanted, "{verb} {input}");
    }
    assert!(endpoints(&lab).await.is_empty());
    wait_unchanged("the host", &host, &before.0).await;
    wait_unchanged("the container", &inside, &before.1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plugin_fails_without_agent() {
    let (lab, mut network) = start_lab_with_network().await;
    network.plugins[0]["timeout"] = "1s".into();
    let attachment = Attachment::new(&lab, "h1", "c1");
    let known = Attachment::new(&lab, "h1", "c2");
    let result = network.add(&known).map_err(|output| output.stdout).expect_ok("ADD");
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("SIGTERM");
    let before = (dump_when_stable(&lab.open_netns("h1")).await, dump_when_stable(&attachment.open_netns()).await);
    let (code, text) = parse_error(&network.add(&attachment).expect_err("ADD"));
    assert!(code == 11 && text.contains("Is overlayd running?"), "{code}: {text}");
    let (code, text) = parse_error(&network.status().expect_err("STATUS"));
    assert!(code == 50 && text.contains("Is overlayd running?"), "{code}: {text}");
    assert_eq!(parse_error(&network.check(&known, &result).expect_err("CHECK")).0, 11);
    assert_eq!(parse_error(&network.gc(&[]).expect_err("GC")).0, 11);
    assert_eq!(parse_error(&network.del(&known, &result).expect_err("DEL while the namespace exists")).0, 11);
    wait_unchanged("the host", &lab.open_netns("h1"), &before.0).await;
    wait_unchanged("the container", &attachment.open_netns(), &before.1).await;
    // Deleting the namespace deletes the interface; a returning agent notices this itself.
    Netns::delete(known.netns.rsplit_once('/').expect_ok("a name").1).expect_ok("delete");
    network.del(&known, &result).map_err(|output| output.stdout).expect_ok("DEL of a deleted namespace");
    lab.start_agent("h1").await;
    network.status().map_err(|output| output.stdout).expect_ok("STATUS");
    assert_eq!(endpoints(&lab).await.len(), 1, "the agent still knows it");
    network.del(&known, &Value::Null).map_err(|output| output.stdout).expect_ok("DEL again");
    assert!(endpoints(&lab).await.is_empty());
}

/// Runs a verb in the background; returns once the plugin's log shows its request to the agent.
async fn start_in_background<T: Send + 'static>(
    lab: &TestLab,
    log_pattern: &str,
    verb: impl FnOnce() -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let count = |log: &str| log.lines().filter(|line| line.contains(log_pattern)).count();
    let before = count(&cni_log(lab));
    let running = thread::spawn(verb);
    eventually_true(&format!("the plugin's {log_pattern}"), CONVERGE_TIMEOUT, || count(&cni_log(lab)) > before).await;
    running
}

#[track_caller]
fn join<T>(running: thread::JoinHandle<T>) -> T {
    running.join().unwrap_or_else(|_| panic!("the plugin's thread panicked"))
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_restart_during_verb_leaves_nothing() {
    let (lab, network) = start_lab_with_network().await;
    let attachment = Attachment::new(&lab, "h1", "c1");
    let add = |attachment: &Attachment| {
        let (network, attachment) = (network.clone(), attachment.clone());
        move || network.add(&attachment)
    };
    // The agent is stopped when the verb begins.
    lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    let running = start_in_background(&lab, "PUT /v1/endpoints/c1", add(&attachment)).await;
    lab.start_agent("h1").await;
    let result = join(running).map_err(|output| output.stdout).expect_ok("ADD");
    network.check(&attachment, &result).map_err(|output| output.stdout).expect_ok("CHECK");

    // The agent is killed while it holds the request.
    let second = Attachment::new(&lab, "h1", "c2");
    lab.host("h1").agent().expect_ok("the agent").signal(Signal::SIGSTOP).expect_ok("SIGSTOP");
    let running = start_in_background(&lab, "PUT /v1/endpoints/c2", add(&second)).await;
    lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    lab.start_agent("h1").await;
    let result = join(running).map_err(|output| output.stdout).expect_ok("ADD");
    network.check(&second, &result).map_err(|output| output.stdout).expect_ok("CHECK");
    assert_eq!(endpoints(&lab).await.len(), 2);

    // The same with DEL.
    lab.host("h1").agent().expect_ok("the agent").signal(Signal::SIGSTOP).expect_ok("SIGSTOP");
    let running = {
        let (network, second) = (network.clone(), second.clone());
        start_in_background(&lab, "DELETE /v1/endpoints/c2", move || network.del(&second, &Value::Null)).await
    };
    lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("SIGKILL");
    lab.start_agent("h1").await;
    join(running).map_err(|output| output.stdout).expect_ok("DEL");
    assert_eq!(endpoints(&lab).await.len(), 1);
    assert!(kernel::link(&lab, "h1-c2", "eth0").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn container_killed_during_add_leaves_nothing() {
    let (lab, network) = start_lab_with_network().await;
    let before = dump_when_stable(&lab.open_netns("h1")).await;
    let attachment = Attachment::new(&lab, "h1", "c1");
    lab.host("h1").agent().expect_ok("the agent").signal(Signal::SIGSTOP).expect_ok("SIGSTOP");
    let running = {
        let (network, attachment) = (network.clone(), attachment.clone());
        start_in_background(&lab, "PUT /v1/endpoints/c1", move || network.add(&attachment)).await
    };
    Netns::delete(attachment.netns.rsplit_once('/').expect_ok("a name").1).expect_ok("delete");
    lab.host("h1").agent().expect_ok("the agent").signal(Signal::SIGCONT).expect_ok("SIGCONT");
    let output: CommandOutput = join(running).expect_err("the namespace is gone");
    let (code, text) = parse_error(&output);
    assert!(code == 3 && text.contains(&attachment.netns), "{code}: {text}");
    assert!(endpoints(&lab).await.is_empty());
    wait_unchanged("the host", &lab.open_netns("h1"), &before).await;
    network.del(&attachment, &Value::Null).map_err(|output| output.stdout).expect_ok("DEL");

    // The runtime gives up half way: its DEL removes what the agent has created by then.
    let attachment = Attachment::new(&lab, "h1", "c2");
    lab.host("h1").agent().expect_ok("the agent").signal(Signal::SIGSTOP).expect_ok("SIGSTOP");
    let mut short = network.clone();
    short.plugins[0]["timeout"] = "1s".into();
    let (code, text) = parse_error(&short.add(&attachment).expect_err("the agent does not answer"));
    assert!(code == 11 && text.contains("did not answer in time"), "{code}: {text}");
    lab.host("h1").agent().expect_ok("the agent").signal(Signal::SIGCONT).expect_ok("SIGCONT");
    network.del(&attachment, &Value::Null).map_err(|output| output.stdout).expect_ok("DEL");
    assert!(endpoints(&lab).await.is_empty());
    assert!(kernel::link(&lab, "h1-c2", "eth0").is_none());
    Netns::delete(attachment.netns.rsplit_once('/').expect_ok("a name").1).expect_ok("delete");
    wait_unchanged("the host", &lab.open_netns("h1"), &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn del_works_after_endpoint_state_is_lost() {
    let (lab, network) = start_lab_with_network().await;
    let attachment = Attachment::new(&lab, "h1", "c1");
    let before = (dump_when_stable(&lab.open_netns("h1")).await, dump_when_stable(&attachment.open_netns()).await);
    network.add(&attachment).map_err(|output| output.stdout).expect_ok("ADD");
    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("SIGTERM");
    fs::remove_file(lab.host("h1").state_dir().join("endpoints.json")).expect_ok("the agent's endpoint file");
    lab.host("h1").agent_start(&[]).expect_ok("start");
    lab.host("h1").wait_ready(READY_TIMEOUT).await.expect_ok("ready");
    assert!(endpoints(&lab).await.is_empty());
    assert!(kernel::link(&lab, "h1-c1", "eth0").is_some(), "the container kept its interface");
    network.del(&attachment, &Value::Null).map_err(|output| output.stdout).expect_ok("DEL without a previous result");
    wait_unchanged("the host", &lab.open_netns("h1"), &before.0).await;
    wait_unchanged("the container", &attachment.open_netns(), &before.1).await;
}

/// A container lost without DEL, and immediately another one in a namespace of the same path.
#[tokio::test(flavor = "multi_thread")]
async fn container_lost_without_del_frees_its_port() {
    let (lab, mut network) = start_lab_with_network().await;
    network.runtime = json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] });
    let mut attachment = Attachment::new(&lab, "h1", "lost");
    network.add(&attachment).map_err(|output| output.stdout).expect_ok("ADD");
    for n in 0..2 {
        Netns::delete(attachment.netns.rsplit_once('/').expect_ok("a name").1).expect_ok("delete");
        attachment = Attachment { container: format!("next{n}"), ..Attachment::new(&lab, "h1", "lost") };
        let result = network.add(&attachment).map_err(|output| output.stdout).expect_ok("ADD of the next");
        network.check(&attachment, &result).map_err(|output| output.stdout).expect_ok("CHECK of the next");
    }
    let listed = endpoints(&lab).await;
    assert!(listed.len() == 1 && listed[0].name.as_str().starts_with("next1"), "{listed:?}");
}
