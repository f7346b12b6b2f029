//! A lab without root: as an ordinary user, inside namespaces of its own. Up, check, down, and nothing left.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use overlay_agent::kernel::netns::Netns;
use overlay_tests::dump::NetnsDump;
use overlay_tests::programs::{CommandOutput, overlayctl, overlayd, require_program, require_root};
use overlay_tests::{ExpectContext, eventually_true};

/// `no_endpoints` of every Debian system.
const NOBODY_UID: u32 = 65_534;

/// Runs overlayctl as the user, its labs and programs in a directory that the user can reach.
fn ctl(dir: &Path, arguments: &[&str]) -> CommandOutput {
    let program = dir.join("bin/overlayctl");
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", "90", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program);
    command.args(arguments).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("OVERLAY_LAB_DIR", dir.join("labs")).current_dir(dir);
    let output = command.output().expect_ok("setpriv (apt-get install util-linux)");
    CommandOutput::from_output(&[&["overlayctl"], arguments].concat(), &output)
}

/// The user's processes of this test: those that have its directory in their environment.
fn processes(dir: &Path) -> Vec<String> {
    let mark = dir.join("labs").to_string_lossy().into_owned();
    let ids = std::fs::read_dir("/proc").expect_ok("/proc").flatten().filter_map(|e| e.file_name().into_string().ok());
    ids.filter(|id| id.bytes().all(|b| b.is_ascii_digit()))
        .filter(|id| std::fs::read(format!("/proc/{id}/environ")).is_ok_and(|e| String::from_utf8_lossy(&e).contains(&mark)))
        .filter_map(|id| std::fs::read_to_string(format!("/proc/{id}/cmdline")).ok())
        .map(|line| line.replace('\0', " "))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn lab_works_without_root() {
    require_root();
    require_program("etcd", "etcd-server");
    require_program("setpriv", "util-linux");
    let before = NetnsDump::of(&Netns::current().expect_ok("the machine's namespace"));
    let names = Netns::list().expect_ok("the named namespaces");
    // The build directory may lie where the user cannot go.
    let temporary = tempfile::Builder::new().prefix("ovr").tempdir_in("/tmp").expect_ok("a directory");
    let dir = temporary.path();
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).expect_ok("its mode");
    for sub in ["bin", "labs"] {
        std::fs::create_dir(dir.join(sub)).expect_ok(sub);
    }
    for program in [overlayctl(), overlayd()] {
        let to = dir.join("bin").join(program.file_name().expect_ok("a name"));
        std::fs::copy(&program, to).expect_ok("copy the program");
    }
    chown(dir.join("labs"), Some(NOBODY_UID), Some(NOBODY_UID)).expect_ok("the labs' owner");

    let up = ctl(dir, &["lab", "up", "--name", "poor", "--hosts", "2", "--containers", "1", "--family", "dual"]).assert_code(0);
    assert!(up.stdout.contains("h2"), "{}", up.stdout);
    let check = ctl(dir, &["lab", "check", "--name", "poor"]).assert_code(0);
    assert!(check.stdout.contains("no NAT inside the overlay"), "{}", check.stdout);
    let routes = ctl(dir, &["lab", "exec", "--name", "poor", "h1", "--", "ip", "route", "show", "proto", "86"]).assert_code(0);
    assert!(routes.stdout.contains("ovx.1"), "{}", routes.stdout);
    let peers = ctl(dir, &["lab", "exec", "--name", "poor", "h1", "--", "overlayctl", "peers"]).assert_code(0);
    assert!(peers.stdout.contains("h2"), "{}", peers.stdout);
    ctl(dir, &["lab", "up", "--name", "poor"]).assert_code(1).assert_stderr_contains(&["lab `poor` exists"]);
    ctl(dir, &["lab", "exec", "--name", "poor", "h9", "--", "true"]).assert_code(1).assert_stderr_contains(&["has no `h9`"]);
    assert_eq!(Netns::list().expect_ok("the named namespaces").difference(&names).filter(|n| n.contains("poor")).count(), 0);

    ctl(dir, &["lab", "down", "--name", "poor"]).assert_code(0);
    eventually_true("all processes are gone", overlay_tests::test_lab::CONVERGE_TIMEOUT, || processes(dir).is_empty()).await;
    let left: Vec<_> = std::fs::read_dir(dir.join("labs")).expect_ok("the labs").flatten().map(|e| e.file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
    ctl(dir, &["lab", "down", "--name", "poor"]).assert_code(0);
    let changes = NetnsDump::of(&Netns::current().expect_ok("the machine's namespace")).changes_since(&before);
    assert!(changes.is_empty(), "the machine's own namespace has changed:\n{changes}");
}
