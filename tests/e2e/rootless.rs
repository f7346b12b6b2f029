//! A lab without root: as an ordinary user, inside namespaces of its own. Up, check, down, and nothing left.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use overlay_agent::kernel::netns::Netns;
use overlay_tests::dump::Dump;
use overlay_tests::programs::{Said, needs, needs_root, overlayctl, overlayd};
use overlay_tests::{Must, within};

/// `nobody` of every Debian system.
const USER: u32 = 65_534;

/// Runs overlayctl as the user, its labs and programs in a directory that the user can reach.
fn ctl(dir: &Path, arguments: &[&str]) -> Said {
    let program = dir.join("bin/overlayctl");
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", "90", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program);
    command.args(arguments).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("OVERLAY_LAB_DIR", dir.join("labs")).current_dir(dir);
    let output = command.output().must("setpriv (apt-get install util-linux)");
    Said::of(&[&["overlayctl"], arguments].concat(), &output)
}

/// The user's processes of this test: those that have its directory in their environment.
fn processes(dir: &Path) -> Vec<String> {
    let mark = dir.join("labs").to_string_lossy().into_owned();
    let ids = std::fs::read_dir("/proc").must("/proc").flatten().filter_map(|e| e.file_name().into_string().ok());
    ids.filter(|id| id.bytes().all(|b| b.is_ascii_digit()))
        .filter(|id| std::fs::read(format!("/proc/{id}/environ")).is_ok_and(|e| String::from_utf8_lossy(&e).contains(&mark)))
        .filter_map(|id| std::fs::read_to_string(format!("/proc/{id}/cmdline")).ok())
        .map(|line| line.replace('\0', " "))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn up_check_down() {
    needs_root();
    needs("etcd", "etcd-server");
    needs("setpriv", "util-linux");
    let before = Dump::of(&Netns::current().must("the machine's namespace"));
    let names = Netns::list().must("the named namespaces");
    // The build directory may lie where the user cannot go.
    let temporary = tempfile::Builder::new().prefix("ovr").tempdir_in("/tmp").must("a directory");
    let dir = temporary.path();
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).must("its mode");
    for sub in ["bin", "labs"] {
        std::fs::create_dir(dir.join(sub)).must(sub);
    }
    for program in [overlayctl(), overlayd()] {
        let to = dir.join("bin").join(program.file_name().must("a name"));
        std::fs::copy(&program, to).must("copy the program");
    }
    chown(dir.join("labs"), Some(USER), Some(USER)).must("the labs' owner");

    let up = ctl(dir, &["lab", "up", "--name", "poor", "--hosts", "2", "--containers", "1", "--family", "dual"]).exits(0);
    assert!(up.out.contains("h2"), "{}", up.out);
    let check = ctl(dir, &["lab", "check", "--name", "poor"]).exits(0);
    assert!(check.out.contains("no NAT inside the overlay"), "{}", check.out);
    let routes = ctl(dir, &["lab", "exec", "--name", "poor", "h1", "--", "ip", "route", "show", "proto", "86"]).exits(0);
    assert!(routes.out.contains("ovx.1"), "{}", routes.out);
    let peers = ctl(dir, &["lab", "exec", "--name", "poor", "h1", "--", "overlayctl", "peers"]).exits(0);
    assert!(peers.out.contains("h2"), "{}", peers.out);
    ctl(dir, &["lab", "up", "--name", "poor"]).exits(1).complains(&["is there already"]);
    ctl(dir, &["lab", "exec", "--name", "poor", "h9", "--", "true"]).exits(1).complains(&["has no `h9`"]);
    assert_eq!(Netns::list().must("the named namespaces").difference(&names).filter(|n| n.contains("poor")).count(), 0);

    ctl(dir, &["lab", "down", "--name", "poor"]).exits(0);
    within("all processes are gone", overlay_tests::story::SOON, || processes(dir).is_empty()).await;
    let left: Vec<_> = std::fs::read_dir(dir.join("labs")).must("the labs").flatten().map(|e| e.file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
    ctl(dir, &["lab", "down", "--name", "poor"]).exits(0);
    let changes = Dump::of(&Netns::current().must("the machine's namespace")).changes_since(&before);
    assert!(changes.is_empty(), "the machine's own namespace has changed:\n{changes}");
}
