//! `overlayctl support-bundle`: its contents with and without an agent, and no secrets in it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use overlay_tests::programs::require_program;
use overlay_tests::{ExpectContext, TestLab};
use overlayctl::bundle::Bundle;

/// Secrets, each in one place.
const SECRETS: [&str; 5] = ["pw-of-a-file-81", "pw-in-a-url-82", "pw-of-a-key-83", "bearer-of-a-log-84", "c2VjcmV0LWtleS04NQ"];

/// Unpacks a bundle; returns all texts, by name.
fn unpack(file: &Path, into: &Path) -> Vec<(String, String)> {
    require_program("tar", "tar");
    let done = Command::new("tar").arg("xzf").arg(file).arg("-C").arg(into).status().expect_ok("tar");
    assert!(done.success());
    let mut all = Vec::new();
    let mut folders = vec![into.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect_ok("a folder") {
            let path = entry.expect_ok("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(into).expect_ok("inside").components().skip(1).collect::<std::path::PathBuf>();
                all.push((name.display().to_string(), std::fs::read_to_string(&path).expect_ok("text")));
            }
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn bundle_is_complete_without_secrets() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 1;
    })
    .await;
    let dir = tempfile::tempdir().expect_ok("a directory");
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("pw"), "pw-of-a-file-81\n").expect_ok("written");
    let config = format!(
        "etcd-username = \"agent\"\netcd-password-file = \"{}\"\netcd-endpoints = [\"http://agent:pw-in-a-url-82@10.0.0.1:2379\"]\n# api_key = \"pw-of-a-key-83\"\n",
        path("pw").display()
    );
    std::fs::write(path("overlayd.toml"), config).expect_ok("written");
    let log = "a line of the log\nlogin of agent with pw-of-a-file-81 refused\nauthorization: Bearer bearer-of-a-log-84\n\
               -----BEGIN EC PRIVATE KEY-----\nc2VjcmV0LWtleS04NQ\n-----END EC PRIVATE KEY-----\n";
    std::fs::write(path("log"), log).expect_ok("written");
    let text = |path: std::path::PathBuf| path.to_str().expect_ok("a path").to_owned();
    let state = text(lab.host("h1").state_dir());
    let make = |out: &str| {
        let out = text(path(out));
        let (config, log) = (text(path("overlayd.toml")), text(path("log")));
        lab.ctl("h1", &["-o", "json", "support-bundle", "--out", &out, "--config", &config, "--log", &log, "--state-dir", &state])
    };
    let bundle: Bundle = make("with.tar.gz").assert_code(0).json();
    assert_eq!(std::fs::metadata(&bundle.file).expect_ok("the file").permissions().mode() & 0o777, 0o600);
    let found = unpack(&bundle.file, &{
        std::fs::create_dir(path("with")).expect_ok("a folder");
        path("with")
    });
    let part = |name: &str| &found.iter().find(|(found, _)| found == name).expect_ok(name).1;
    // The listed entries are exactly the contents.
    let mut listed: Vec<&str> = bundle.entries.iter().filter(|e| e.missing.is_none()).map(|e| e.name.as_str()).collect();
    listed.push("CONTENTS.txt");
    listed.sort_unstable();
    let mut names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(listed, names);
    assert!(listed.iter().all(|name| *name == "CONTENTS.txt" || part("CONTENTS.txt").contains(name)));
    // The agent's view, the kernel's, and the container's.
    assert!(
        part("agent/status.json").contains("\"node\": \"h1\"")
            && part("agent/metrics.txt").contains("overlayd_ready{network=\"default\"} 1")
    );
    assert!(part("kernel/fdb.txt").contains("ovx.1") && part("kernel/nftables.txt").contains("table inet overlayd"));
    let address = lab.host("h1").client().endpoints().await.expect_ok("endpoints").endpoints[0]
        .addresses()
        .v4
        .expect_ok("IPv4")
        .to_string();
    assert!(part("containers/c1/address.txt").contains(&address) && part("state/endpoints.json").contains(&address));
    assert!(part("logs/1.txt").contains("a line of the log") && part("config/overlayd.toml").contains("etcd-password-file = "));
    // No secret, and each place was covered.
    for (name, text) in &found {
        for secret in SECRETS {
            assert!(!text.contains(secret), "{secret} in {name}");
        }
    }
    let removed = |name: &str| bundle.entries.iter().find(|e| e.name == name).expect_ok(name).removed;
    assert_eq!((removed("config/overlayd.toml"), removed("logs/1.txt")), (2, 3), "{:#?}", bundle.entries);
    // An existing file is not overwritten.
    make("with.tar.gz").assert_code(1).assert_stderr_contains(&["with.tar.gz", "--out"]);

    // Without an agent: data from the kernel and from files.
    lab.host("h1").agent_stop(Signal::SIGKILL).expect_ok("stop the agent");
    let bundle: Bundle = make("without.tar.gz").assert_code(0).json();
    let missing = |name: &str| bundle.entries.iter().find(|e| e.name == name).expect_ok(name).missing.clone();
    assert!(missing("agent/status.json").expect_ok("why").contains("nothing listens"));
    assert_eq!(
        (missing("kernel/links.txt"), missing("containers/c1/address.txt"), missing("state/endpoints.json")),
        (None, None, None)
    );
    assert!(!path("without.tar.gz.partial").exists());
}
