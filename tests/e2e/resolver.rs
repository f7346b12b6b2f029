//! Resolver files of named namespaces: created from flags or from the host's file, used by `ip netns exec`, removed, never
//! overwritten.

use std::fs;
use std::path::{Path, PathBuf};

use overlay_agent::kernel::netns::Netns;
use overlay_tests::programs::{CommandOutput, overlayctl, require_program};
use overlay_tests::{ExpectContext, TestLab, kernel};
use overlayctl::lab::Families;

fn resolv_conf_path(lab: &TestLab, name: &str) -> PathBuf {
    Path::new("/etc/netns").join(lab.layout().namespace(&format!("h1-{name}"))).join("resolv.conf")
}

/// The contents of /etc/resolv.conf for a command in the namespace, without comments.
fn effective_resolv_conf(lab: &TestLab, name: &str) -> String {
    let namespace = lab.layout().namespace(&format!("h1-{name}"));
    let text = kernel::run(lab, "h1", &["ip", "netns", "exec", &namespace, "cat", "/etc/resolv.conf"]);
    text.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("|")
}

#[tokio::test(flavor = "multi_thread")]
async fn dns_flags_write_resolv_conf() {
    let lab = TestLab::one_host(Families::V4).await;
    let flags = ["--dns", "192.0.2.53", "--dns", "2001:db8::53", "--dns-search", "a.example", "--dns-option", "ndots:3"];
    lab.ctl("h1", &[&["attach", "web"], &flags[..]].concat()).assert_code(0);
    let wanted = "nameserver 192.0.2.53|nameserver 2001:db8::53|search a.example|options ndots:3";
    assert_eq!(effective_resolv_conf(&lab, "web"), wanted);
    // A repeated attach without flags keeps it, with other flags changes it.
    lab.ctl("h1", &["attach", "web"]).assert_code(0);
    assert_eq!(effective_resolv_conf(&lab, "web"), wanted);
    lab.ctl("h1", &["attach", "web", "--dns", "192.0.2.54", "--dns-search", ".", "--dns-option", "rotate"]).assert_code(0);
    assert_eq!(effective_resolv_conf(&lab, "web"), "nameserver 192.0.2.54|options rotate");
    // A refused attach changes nothing.
    let ip = ["--ip", "192.0.2.1", "--dns", "192.0.2.55"];
    lab.ctl("h1", &[&["attach", "web"], &ip[..]].concat()).assert_code(1);
    lab.ctl("h1", &[&["attach", "other"], &ip[..]].concat()).assert_code(1);
    assert_eq!(effective_resolv_conf(&lab, "web"), "nameserver 192.0.2.54|options rotate");
    assert!(!resolv_conf_path(&lab, "other").parent().expect_ok("a directory").exists());
    lab.ctl("h1", &["detach", "web"]).assert_code(0);
    assert!(!resolv_conf_path(&lab, "web").parent().expect_ok("a directory").exists(), "nothing is left");
    for (flag, value) in [("--dns", "x"), ("--dns-search", "a b"), ("--dns-option", "x\ny")] {
        lab.ctl("h1", &["attach", "web", flag, value]).assert_code(2);
        assert!(lab.netns("h1-web").is_err());
    }
}

/// Runs overlayctl with another /etc/resolv.conf, in its own mount namespace.
fn ctl_with_host_resolv_conf(lab: &TestLab, host_file: &Path, arguments: &[&str]) -> CommandOutput {
    require_program("unshare", "util-linux");
    let script = "mount --bind \"$1\" /etc/resolv.conf; shift; exec \"$@\"";
    let (program, text) = (overlayctl().display().to_string(), host_file.display().to_string());
    let front = ["unshare", "--mount", "--propagation", "slave", "sh", "-ec", script, "sh", text.as_str(), program.as_str()];
    kernel::attempt(lab, "h1", &[&front[..], arguments].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn host_resolvers_skip_unreachable_ones() {
    let lab = TestLab::one_host(Families::V4).await;
    let directory = tempfile::tempdir().expect_ok("a directory");
    let host = directory.path().join("resolv.conf");
    let name = lab.layout().namespace("h1-web");
    // Created here: mounts in the command's own mount namespace are invisible outside.
    Netns::create(&name).expect_ok("a namespace");
    let path = format!("/run/netns/{name}");
    let attach = ["attach", "web", "--netns", path.as_str()];
    fs::write(&host, "nameserver 127.0.0.1\nnameserver ::1\nnameserver 192.0.2.9\nnameserver 0.0.0.0\nsearch b.example\n")
        .expect_ok("a file");
    ctl_with_host_resolv_conf(&lab, &host, &attach).assert_code(0);
    assert_eq!(effective_resolv_conf(&lab, "web"), "nameserver 192.0.2.9|search b.example");
    lab.ctl("h1", &["detach", "web"]).assert_code(0);
    assert!(!resolv_conf_path(&lab, "web").exists() && lab.netns("h1-web").is_ok(), "the namespace stays, our file is gone");
    // No reachable resolver: a warning, but no failure.
    fs::write(&host, "nameserver 127.0.0.1\n").expect_ok("a file");
    let output = ctl_with_host_resolv_conf(&lab, &host, &attach).assert_code(0);
    let resolved = [Path::new("/run/systemd/resolve/resolv.conf"), Path::new("/run/NetworkManager/no-stub-resolv.conf")];
    if resolved.iter().all(|path| !path.exists()) {
        output.assert_stderr_contains(&["can reach no resolver of this host", "127.0.0.1", "--dns"]);
        assert_eq!(effective_resolv_conf(&lab, "web"), "");
    }
    assert!(!effective_resolv_conf(&lab, "web").contains("127."));
    lab.ctl("h1", &["detach", "web"]).assert_code(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_resolv_conf_is_kept() {
    let lab = TestLab::one_host(Families::V4).await;
    let file = resolv_conf_path(&lab, "web");
    let directory = file.parent().expect_ok("a directory").to_owned();
    let _removed = RemoveOnDrop(directory.clone());
    fs::create_dir_all(&directory).expect_ok("a directory");
    fs::write(&file, "nameserver 192.0.2.200\n").expect_ok("a file");
    lab.ctl("h1", &["attach", "web", "--dns", "192.0.2.1"])
        .assert_code(1)
        .assert_stderr_contains(&[&file.display().to_string(), "was not written for endpoint web"]);
    assert!(lab.netns("h1-web").is_err(), "nothing is left behind");
    lab.ctl("h1", &["attach", "web"]).assert_code(0);
    assert_eq!(effective_resolv_conf(&lab, "web"), "nameserver 192.0.2.200");
    lab.ctl("h1", &["detach", "web"]).assert_code(0);
    assert_eq!(fs::read_to_string(&file).expect_ok("the file"), "nameserver 192.0.2.200\n");
    // A file left by a killed `overlayctl` is recognised by its contents, also after a reboot.
    fs::remove_file(&file).expect_ok("remove it");
    lab.ctl("h1", &["attach", "web", "--dns", "192.0.2.1"]).assert_code(0);
    kernel::run(&lab, "h1", &["ip", "netns", "delete", &lab.layout().namespace("h1-web")]);
    lab.ctl("h1", &["attach", "web", "--dns", "192.0.2.2"]).assert_code(0);
    assert_eq!(effective_resolv_conf(&lab, "web").split('|').next(), Some("nameserver 192.0.2.2"));
    lab.ctl("h1", &["detach", "web"]).assert_code(0);
    assert!(!directory.exists());
    // A process has no name for a resolver file.
    lab.ctl("h1", &["attach", "web", "--netns", "/proc/1/ns/net", "--dns", "192.0.2.1"])
        .assert_code(2)
        .assert_stderr_contains(&["/run/netns/NAME"]);
}

/// Removes a directory on drop.
struct RemoveOnDrop(PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        // On success it is already gone.
        let _ignored = fs::remove_dir_all(&self.0);
    }
}
