//! The resolver files of named namespaces: made from flags or the host's, found by `ip netns exec`, removed, and never taken from others.

use std::fs;
use std::path::{Path, PathBuf};

use overlay_agent::kernel::netns::Netns;
use overlay_tests::programs::{Said, needs, overlayctl};
use overlay_tests::{Must, Story, kernel};
use overlayctl::lab::Families;

fn file(story: &Story, name: &str) -> PathBuf {
    Path::new("/etc/netns").join(story.layout().namespace(&format!("h1-{name}"))).join("resolv.conf")
}

/// What a command in the namespace finds in /etc/resolv.conf, without comments.
fn seen(story: &Story, name: &str) -> String {
    let namespace = story.layout().namespace(&format!("h1-{name}"));
    let text = kernel::run(story, "h1", &["ip", "netns", "exec", &namespace, "cat", "/etc/resolv.conf"]);
    text.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("|")
}

#[tokio::test(flavor = "multi_thread")]
async fn from_flags() {
    let story = Story::one_host(Families::V4).await;
    let flags = ["--dns", "192.0.2.53", "--dns", "2001:db8::53", "--dns-search", "a.example", "--dns-option", "ndots:3"];
    story.ctl("h1", &[&["attach", "web"], &flags[..]].concat()).exits(0);
    let wanted = "nameserver 192.0.2.53|nameserver 2001:db8::53|search a.example|options ndots:3";
    assert_eq!(seen(&story, "web"), wanted);
    // The same again without flags leaves it, with others changes it.
    story.ctl("h1", &["attach", "web"]).exits(0);
    assert_eq!(seen(&story, "web"), wanted);
    story.ctl("h1", &["attach", "web", "--dns", "192.0.2.54", "--dns-search", ".", "--dns-option", "rotate"]).exits(0);
    assert_eq!(seen(&story, "web"), "nameserver 192.0.2.54|options rotate");
    // One that is refused changes nothing.
    let ip = ["--ip", "192.0.2.1", "--dns", "192.0.2.55"];
    story.ctl("h1", &[&["attach", "web"], &ip[..]].concat()).exits(1);
    story.ctl("h1", &[&["attach", "other"], &ip[..]].concat()).exits(1);
    assert_eq!(seen(&story, "web"), "nameserver 192.0.2.54|options rotate");
    assert!(!file(&story, "other").parent().must("a directory").exists());
    story.ctl("h1", &["detach", "web"]).exits(0);
    assert!(!file(&story, "web").parent().must("a directory").exists(), "nothing is left");
    for (flag, value) in [("--dns", "x"), ("--dns-search", "a b"), ("--dns-option", "x\ny")] {
        story.ctl("h1", &["attach", "web", flag, value]).exits(2);
        assert!(story.netns("h1-web").is_err());
    }
}

/// overlayctl where the host's /etc/resolv.conf is another one: in a mount namespace of its own.
fn ctl_where(story: &Story, host_file: &Path, arguments: &[&str]) -> Said {
    needs("unshare", "util-linux");
    let script = "mount --bind \"$1\" /etc/resolv.conf; shift; exec \"$@\"";
    let (program, text) = (overlayctl().display().to_string(), host_file.display().to_string());
    let front = ["unshare", "--mount", "--propagation", "slave", "sh", "-ec", script, "sh", text.as_str(), program.as_str()];
    kernel::attempt(story, "h1", &[&front[..], arguments].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn from_the_host_without_what_cannot_be_reached() {
    let story = Story::one_host(Families::V4).await;
    let directory = tempfile::tempdir().must("a directory");
    let host = directory.path().join("resolv.conf");
    let name = story.layout().namespace("h1-web");
    // Made here: what is mounted in the command's own mount namespace is not seen outside.
    Netns::create(&name).must("a namespace");
    let path = format!("/run/netns/{name}");
    let attach = ["attach", "web", "--netns", path.as_str()];
    fs::write(&host, "nameserver 127.0.0.1\nnameserver ::1\nnameserver 192.0.2.9\nnameserver 0.0.0.0\nsearch b.example\n")
        .must("a file");
    ctl_where(&story, &host, &attach).exits(0);
    assert_eq!(seen(&story, "web"), "nameserver 192.0.2.9|search b.example");
    story.ctl("h1", &["detach", "web"]).exits(0);
    assert!(!file(&story, "web").exists() && story.netns("h1-web").is_ok(), "the namespace is not ours, the file was");
    // Nothing can be reached: said, and not in the way.
    fs::write(&host, "nameserver 127.0.0.1\n").must("a file");
    let said = ctl_where(&story, &host, &attach).exits(0);
    let resolved = [Path::new("/run/systemd/resolve/resolv.conf"), Path::new("/run/NetworkManager/no-stub-resolv.conf")];
    if resolved.iter().all(|path| !path.exists()) {
        said.complains(&["no resolver of this host can be reached", "127.0.0.1", "--dns"]);
        assert_eq!(seen(&story, "web"), "");
    }
    assert!(!seen(&story, "web").contains("127."));
    story.ctl("h1", &["detach", "web"]).exits(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_file_stays() {
    let story = Story::one_host(Families::V4).await;
    let file = file(&story, "web");
    let directory = file.parent().must("a directory").to_owned();
    let _removed = Removed(directory.clone());
    fs::create_dir_all(&directory).must("a directory");
    fs::write(&file, "nameserver 192.0.2.200\n").must("a file");
    story
        .ctl("h1", &["attach", "web", "--dns", "192.0.2.1"])
        .exits(1)
        .complains(&[&file.display().to_string(), "was not written for endpoint web"]);
    assert!(story.netns("h1-web").is_err(), "nothing is left behind");
    story.ctl("h1", &["attach", "web"]).exits(0);
    assert_eq!(seen(&story, "web"), "nameserver 192.0.2.200");
    story.ctl("h1", &["detach", "web"]).exits(0);
    assert_eq!(fs::read_to_string(&file).must("the file"), "nameserver 192.0.2.200\n");
    // What a killed `overlayctl` left is ours, also after a reboot: it says so itself.
    fs::remove_file(&file).must("remove it");
    story.ctl("h1", &["attach", "web", "--dns", "192.0.2.1"]).exits(0);
    kernel::run(&story, "h1", &["ip", "netns", "delete", &story.layout().namespace("h1-web")]);
    story.ctl("h1", &["attach", "web", "--dns", "192.0.2.2"]).exits(0);
    assert_eq!(seen(&story, "web").split('|').next(), Some("nameserver 192.0.2.2"));
    story.ctl("h1", &["detach", "web"]).exits(0);
    assert!(!directory.exists());
    // A process has no name that a file could be found by.
    story
        .ctl("h1", &["attach", "web", "--netns", "/proc/1/ns/net", "--dns", "192.0.2.1"])
        .exits(2)
        .complains(&["/run/netns/NAME"]);
}

/// Removes a directory at the end, however it comes.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // It is gone where all went well.
        let _gone = fs::remove_dir_all(&self.0);
    }
}
