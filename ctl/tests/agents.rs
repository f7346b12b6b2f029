//! The lab with agents, through the library's interface and through the commands inside it.
//!
//! Needs root, etcd, and the agent's binary: `cargo build -p overlay-agent`.

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use nix::sys::signal::Signal;
use overlayctl::lab::{Families, Lab, LabGuard, LabName, LabOptions, LabsDir, Progress, check};

/// Timeout of any operation of an agent on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(30);

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Starts a lab below its own directory.
async fn lab(dir: &Path, options: LabOptions) -> LabGuard {
    let lab = Lab::up(&LabsDir::at(dir), &options, Progress::silent()).await;
    lab.unwrap_or_else(|error| panic!("root, etcd and overlayd are needed: {error}")).guarded()
}

fn temp_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("ovl").tempdir_in("/tmp").expect("a temporary directory")
}

/// Runs `overlayctl ARGUMENTS` on a host.
fn ctl(lab: &Lab, host: &str, arguments: &[&str]) -> Output {
    lab.exec(host, &[&[env!("CARGO_BIN_EXE_overlayctl")][..], arguments].concat()).expect("overlayctl runs")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lab_check_passes_and_detects_nat() {
    let dir = temp_dir();
    let lab =
        lab(dir.path(), LabOptions { hosts: 2, containers: 1, families: Families::Dual, ..LabOptions::new(LabName::unique()) })
            .await;
    let report = check::check(&lab).await.expect("a check");
    assert!(report.ok, "{report:#?}");
    assert_eq!((report.overlay.len(), report.egress.len()), (4, 4));

    // The data path works without the agent, and nothing repairs it: the check must detect address translation, family by family.
    let host = lab.host("h1").expect("a host");
    host.agent_stop(Signal::SIGTERM).expect("it ends");
    let rules = "add table ip evil; add chain ip evil post { type nat hook postrouting priority 90; }; \
                 add rule ip evil post oifname \"ovx.1\" masquerade";
    let nft = host.exec(&["nft", rules]).expect("nft runs");
    assert!(nft.status.success(), "{}", text(&nft.stderr));
    let report = check::check(&lab).await.expect("a check");
    let failed: Vec<_> = report.overlay.iter().filter(|c| c.error.is_some()).map(|c| (c.from.as_str(), c.to.as_str())).collect();
    assert!(!report.ok);
    assert_eq!(failed, [("h1-c1", "h2-c1")], "{report:#?}");

    host.agent_start(&[]).expect("it starts");
    host.wait_ready(TIMEOUT).await.expect("it gets ready");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn detach_removes_only_namespaces_that_attach_created() {
    let dir = temp_dir();
    let lab = lab(dir.path(), LabOptions { hosts: 1, containers: 0, ..LabOptions::new(LabName::unique()) }).await;
    let namespace = lab.layout().namespace("h1-web");
    let path = Path::new("/run/netns").join(&namespace);

    let attached = ctl(&lab, "h1", &["attach", "web", "-o", "json"]);
    assert!(attached.status.success(), "{}", text(&attached.stderr));
    let attached: serde_json::Value = serde_json::from_slice(&attached.stdout).expect("JSON");
    assert_eq!(attached["endpoint"]["netns"], path.to_str().expect("a path"));
    let again = ctl(&lab, "h1", &["attach", "web", "-o", "json"]);
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&again.stdout).expect("JSON"),
        attached,
        "the second attach returns the same"
    );
    assert!(text(&ctl(&lab, "h1", &["endpoints"]).stdout).contains("web"));
    assert!(ctl(&lab, "h1", &["detach", "web"]).status.success());
    assert!(!path.exists());
    assert!(ctl(&lab, "h1", &["detach", "web"]).status.success(), "an unknown endpoint is no error");

    // A rejected attach leaves nothing behind.
    let refused = ctl(&lab, "h1", &["attach", "web", "--ip", "192.0.2.1"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("192.0.2.1"), "{}", text(&refused.stderr));
    assert!(!path.exists());
    assert_eq!(ctl(&lab, "h1", &["attach", "web", "--ip", "10.0.0.1", "--ip", "10.0.0.2"]).status.code(), Some(2));

    // A foreign namespace must be named explicitly, and is never removed.
    let made = overlay_agent::kernel::netns::Netns::create(&namespace).expect("a namespace");
    let taken = ctl(&lab, "h1", &["attach", "web"]);
    assert!(text(&taken.stderr).contains("--netns"), "{}", text(&taken.stderr));
    let named = ctl(&lab, "h1", &["attach", "web", "--netns", path.to_str().expect("a path")]);
    assert!(named.status.success(), "{}", text(&named.stderr));
    assert!(ctl(&lab, "h1", &["detach", "web"]).status.success());
    assert!(path.exists());
    drop(made);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_exit_code_follows_health() {
    let dir = temp_dir();
    let lab = lab(dir.path(), LabOptions { hosts: 1, containers: 0, ..LabOptions::new(LabName::unique()) }).await;
    let host = lab.host("h1").expect("a host");
    assert_eq!(ctl(&lab, "h1", &["status"]).status.code(), Some(0));
    host.agent_stop(Signal::SIGTERM).expect("it ends");
    let gone = ctl(&lab, "h1", &["status"]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(text(&gone.stderr).contains("overlayd"), "{}", text(&gone.stderr));
    assert_eq!(ctl(&lab, "h1", &["status", "--wait", "200ms"]).status.code(), Some(4));
    host.agent_start(&[]).expect("it starts");
    let ready = ctl(&lab, "h1", &["status", "--wait", "30s", "--brief"]);
    assert_eq!(ready.status.code(), Some(0), "{}", text(&ready.stderr));
    assert!(text(&ready.stdout).starts_with("h1 ready 10.244."), "{}", text(&ready.stdout));

    // Without etcd: degraded, and the data path is unchanged.
    let etcd = overlayctl::lab::ProcessId::from_pid_file(&overlayctl::lab::etcd::pid_file(lab.dir())).expect("etcd's record");
    etcd.signal(Signal::SIGKILL).expect("it runs");
    host.wait_status(TIMEOUT, "etcd's end is not seen", |status| !status.store.connected).await.expect("it is noticed");
    assert_eq!(ctl(&lab, "h1", &["status"]).status.code(), Some(3));
    overlayctl::lab::etcd::start(&lab).await.expect("it starts with its data");
    host.wait_status(TIMEOUT, "etcd is not seen again", |status| status.ready && status.store.connected)
        .await
        .expect("it is noticed");
}
