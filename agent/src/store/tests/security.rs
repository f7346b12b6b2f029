//! Tests of TLS, login and permissions.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::slice;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Permission};

use super::harness::*;
use super::proxy::PausableProxy;
use crate::model::NetworkChange;
use crate::model::event::{Connection, OwnLease, StoreEvent};
use crate::store::{
    NetworkError, StoreConfig, StoreError, WriteKind, get_config, put_config, read_all, server_clock, write_network,
};

/// Creates a CA, and certificates signed by it for the server and a client.
fn create_certificates(directory: &Path) {
    let openssl = |arguments: &[&str]| run_command(directory, "openssl", arguments);
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    for ca in ["ca", "other"] {
        let (keyout, out) = (format!("{ca}.key"), format!("{ca}.crt"));
        openssl(
            &[&["req", "-x509", "-days", "2", "-subj", "/CN=test CA", "-keyout", &keyout, "-out", &out][..], &key[..]].concat(),
        );
    }
    fs::write(directory.join("server.ext"), "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n").unwrap();
    fs::write(directory.join("client.ext"), "extendedKeyUsage=clientAuth\n").unwrap();
    for name in ["server", "client"] {
        let file = |ending: &str| format!("{name}.{ending}");
        let subject = format!("/CN={name}");
        openssl(&[&["req", "-subj", &subject, "-keyout", &file("key"), "-out", &file("csr")][..], &key[..]].concat());
        openssl(&[
            "x509",
            "-req",
            "-days",
            "2",
            "-in",
            &file("csr"),
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-extfile",
            &file("ext"),
            "-out",
            &file("crt"),
        ]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mutual_tls_connects() {
    let directory = tempfile::tempdir().unwrap();
    create_certificates(directory.path());
    let file = |name: &str| directory.path().join(name);
    let tls = ServerTls { ca: file("ca.crt"), certificate: file("server.crt"), key: file("server.key") };
    let etcd = Etcd::start_with(Some(tls)).await;
    let good = StoreConfig {
        cafile: Some(file("ca.crt")),
        certfile: Some(file("client.crt")),
        keyfile: Some(file("client.key")),
        ..etcd.config()
    };
    put_config(&good, NETWORK, crate::store::ReplaceCondition::Any).await.unwrap();
    let clock = server_clock(&good).await.unwrap().expect("a date");
    let own = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(own.abs_diff(clock) <= 5, "{clock}, and not {own}");
    let mut agent = Agent::start(good.clone(), Some(lease_request(NETWORK, 7)));
    agent.next_held().await;
    agent.stop().await;

    let without = StoreConfig { certfile: None, keyfile: None, ..good.clone() };
    let error = get_config(&without).await.unwrap_err();
    assert!(matches!(error, StoreError::Tls { .. }) && error.to_string().contains("--etcd-certfile"), "{error}");
    let stranger = StoreConfig { cafile: Some(file("other.crt")), ..good.clone() };
    server_clock(&stranger).await.unwrap_err();
    let error = get_config(&stranger).await.unwrap_err();
    assert!(matches!(error, StoreError::Tls { .. }) && error.to_string().contains("--etcd-cafile"), "{error}");
    let missing = StoreConfig { cafile: Some(file("nothing.crt")), ..good.clone() };
    let error = get_config(&missing).await.unwrap_err().to_string();
    assert!(error.contains("nothing.crt") && error.contains("--etcd-cafile"), "{error}");
    let swapped = StoreConfig { keyfile: Some(file("client.crt")), ..good.clone() };
    let error = get_config(&swapped).await.unwrap_err().to_string();
    assert!(error.contains("client.crt") && error.contains("--etcd-keyfile"), "{error}");
    let name = good.endpoints[0].replace("127.0.0.1", "localhost");
    let error = get_config(&StoreConfig { endpoints: vec![name], ..good.clone() }).await.unwrap_err();
    assert!(matches!(error, StoreError::Tls { .. }) && error.to_string().contains("names other hosts"), "{error}");
    let plain = StoreConfig { cafile: None, certfile: None, keyfile: None, ..good };
    let error =
        get_config(&StoreConfig { endpoints: vec![plain.endpoints[0].replace("https", "http")], ..plain }).await.unwrap_err();
    assert!(error.to_string().contains("127.0.0.1"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_to_plaintext_server_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    create_certificates(directory.path());
    let etcd = Etcd::start().await;
    let endpoints = vec![etcd.endpoint().replace("http", "https")];
    let config = StoreConfig { endpoints, cafile: Some(directory.path().join("ca.crt")), ..etcd.config() };
    let error = get_config(&config).await.unwrap_err();
    assert!(matches!(error, StoreError::Tls { .. }) && error.to_string().contains("http://"), "{error}");
}

/// Enables authentication with the users `root`, `agent` (may write below the prefix), `reader` (may read there) and `nobody` (no
/// rights), all with the same password.
pub(super) async fn enable_auth(etcd: &Etcd) -> StoreConfig {
    let mut client: Client = etcd.client().await;
    for user in ["root", "agent", "reader", "nobody"] {
        client.user_add(user, "s3cret of all", None).await.unwrap();
    }
    client.role_add("root").await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    let range = || (format!("{PREFIX}/"), format!("{PREFIX}0"));
    for role in ["agent", "reader"] {
        client.role_add(role).await.unwrap();
        let (from, to) = range();
        let permission = match role {
            "agent" => Permission::read_write(from).with_range_end(to),
            _ => Permission::read(from).with_range_end(to),
        };
        client.role_grant_permission(role, permission).await.unwrap();
        client.user_grant_role(role, role).await.unwrap();
    }
    client.auth_enable().await.unwrap();
    StoreConfig { username: Some("agent".to_owned()), ..etcd.config() }
}

#[tokio::test(flavor = "multi_thread")]
async fn password_authentication_works() {
    let etcd = Etcd::start().await;
    etcd.put_config(NETWORK).await;
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        write_secret(&directory.path().join(name), text);
        Some(directory.path().join(name))
    };
    // A configured password is no error if etcd's authentication is disabled.
    let superfluous = StoreConfig { username: Some("agent".to_owned()), password_file: file("any", "x"), ..etcd.config() };
    get_config(&superfluous).await.unwrap();

    let config = enable_auth(&etcd).await;
    let good = StoreConfig { password_file: file("good", "s3cret of all\n"), ..config.clone() };
    let mut agent = Agent::start(good.clone(), Some(lease_request(NETWORK, 7)));
    agent.next_held().await;
    agent.stop().await;
    read_all(&good, true).await.unwrap();
    assert!(!format!("{good:?}").contains("s3cret"));

    let wrong = StoreConfig { password_file: file("wrong", "s3cret of none"), ..config.clone() };
    let error = get_config(&wrong).await.unwrap_err();
    assert!(matches!(error, StoreError::Login { .. }), "{error:?}");
    let text = format!("{error} {error:?}");
    assert!(text.contains("user `agent`") && text.contains("--etcd-password-file") && !text.contains("s3cret"), "{text}");
    let nobody = StoreConfig { username: None, ..etcd.config() };
    let error = get_config(&nobody).await.unwrap_err();
    assert!(matches!(error, StoreError::Login { .. }) && error.to_string().contains("without a user name"), "{error}");
    let forbidden = StoreConfig { username: Some("nobody".to_owned()), ..good.clone() };
    let error = get_config(&forbidden).await.unwrap_err();
    assert!(matches!(error, StoreError::Permission { .. }), "{error:?}");
    assert!(error.to_string().contains("user `nobody` may not read") && error.to_string().contains(PREFIX), "{error}");
    let open = file("open", "s3cret of all");
    fs::set_permissions(open.as_ref().unwrap(), fs::Permissions::from_mode(0o644)).unwrap();
    let error = get_config(&StoreConfig { password_file: open, ..config.clone() }).await.unwrap_err().to_string();
    assert!(
        error.contains("is accessible to other users (mode 0644): chmod 600 ") && error.contains("--etcd-password-file"),
        "{error}"
    );
    let empty = StoreConfig { password_file: file("empty", "\n"), ..config.clone() };
    assert!(get_config(&empty).await.unwrap_err().to_string().contains("is empty"));

    // A user with read permission only still watches the network, and the missing permission is reported.
    let reader = StoreConfig { username: Some("reader".to_owned()), ..good };
    let mut agent = Agent::start(reader, Some(lease_request(NETWORK, 8)));
    let (_, own) = agent.snapshot_and_own().await;
    assert!(matches!(&own, OwnLease::NotHeld { reason } if reason.contains("user `reader` may not write")), "{own:?}");
    let quiet = tokio::time::timeout(std::time::Duration::from_secs(2), agent.events.recv()).await;
    assert!(!matches!(quiet, Ok(Some(StoreEvent::Connection(Connection::Down { .. })))), "{quiet:?}");
    agent.stop().await;
}

/// Writes a file that only its owner can access.
pub(super) fn write_secret(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// Captures the log of all levels as text.
#[derive(Clone, Default)]
struct LogBuffer(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for LogBuffer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Set in the child process that runs only the test below.
const ISOLATED_ENV: &str = "OVERLAY_TEST_ALONE";

#[tokio::test]
async fn password_is_never_logged() {
    // Subscribers of other tests determine, for the whole process, which events are emitted at all.
    if std::env::var_os(ISOLATED_ENV).is_none() {
        let this = std::thread::current().name().unwrap().to_owned();
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &this, "--nocapture"])
            .env(ISOLATED_ENV, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    let etcd = Etcd::start().await;
    etcd.put_config(NETWORK).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    write_secret(&file, "s3cret of all");
    let config = StoreConfig { password_file: Some(file.clone()), ..enable_auth(&etcd).await };
    let log = LogBuffer::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).finish();
    // All tasks run on one thread, so this thread's subscriber receives all events.
    let _guard = tracing::subscriber::set_default(subscriber);
    get_config(&config).await.unwrap();
    fs::write(&file, "s3cret of none").unwrap();
    get_config(&config).await.unwrap_err();
    let text = String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned();
    assert!(text.len() > 4096, "the log is too short: {} bytes", text.len());
    assert!(!text.contains("s3cret"));
}

/// A user without permission to read one network.
#[tokio::test(flavor = "multi_thread")]
async fn missing_permission_of_one_network_leaves_others() {
    let etcd = Etcd::with_networks(&["default", "blue", "green"]).await;
    let mut client = etcd.client().await;
    client.user_add("limited", "s3cret of all", None).await.unwrap();
    client.role_add("limited").await.unwrap();
    client.user_grant_role("limited", "limited").await.unwrap();
    let permissions = |network: &str| {
        let leases = Permission::read_write(key(network, "subnets/")).with_range_end(key(network, "subnets0"));
        [Permission::read(key(network, "config")), leases]
    };
    for permission in permissions("default").into_iter().chain(permissions("blue")) {
        client.role_grant_permission("limited", permission).await.unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    write_secret(&file, "s3cret of all");
    enable_auth(&etcd).await;
    let proxy = PausableProxy::connect_to(slice::from_ref(&etcd)).await;
    let config = StoreConfig {
        endpoints: vec![proxy.endpoint()],
        username: Some("limited".to_owned()),
        password_file: Some(file),
        ..StoreConfig::default()
    };
    let (store, _guard) = start_store(config);
    let mut others = ["default", "blue"].map(|name| start(&store, name));
    for agent in &mut others {
        agent.next_held().await;
    }
    settle(&mut others).await;
    let mut green = start(&store, "green");
    let down = |event: &StoreEvent| match event {
        StoreEvent::Connection(Connection::Down { error }) => Some(error.clone()),
        _ => None,
    };
    let error = green.find(down).await;
    assert!(error.contains("user `limited` may not read"), "{error}");
    assert!(error.contains("--prefix /coreos.com/network/networks/green/`"), "{error}");
    others[0].assert_quiet(Duration::from_secs(1)).await;
    others[1].assert_quiet(Duration::from_millis(100)).await;
    // Granted, it works without another connection.
    let options = ConnectOptions::new().with_user("root", "s3cret of all");
    let mut root = Client::connect([etcd.endpoint()], Some(options)).await.unwrap();
    for permission in permissions("green") {
        root.role_grant_permission("limited", permission).await.unwrap();
    }
    green.next_held().await;
    assert_eq!(proxy.connection_count(), 1);
}

/// The roles of `deploy/etcd/access.sh`: an agent takes leases in the networks that it is granted, and writes no record.
#[tokio::test(flavor = "multi_thread")]
async fn agent_role_holds_leases_and_writes_no_records() {
    let etcd = Etcd::with_networks(&["default", "blue", "green"]).await;
    let directory = tempfile::tempdir().unwrap();
    let access = |networks: &[&str]| {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/etcd/access.sh"));
        command.arg(directory.path()).arg(PREFIX).args(networks).env("ETCDCTL_ENDPOINTS", etcd.endpoint());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    access(&["blue"]);
    let user = |name: &str| StoreConfig {
        username: Some(name.to_owned()),
        password_file: Some(directory.path().join(name)),
        ..etcd.config()
    };
    let (store, _guard) = start_store(user("overlay-agent"));
    let mut blue = start(&store, "blue");
    let mut green = start(&store, "green");
    let held = blue.next_held().await;
    let reason = green.next_not_held().await;
    assert!(reason.contains("may not write this host's lease") && reason.contains("/networks/green/"), "{reason}");
    let change = NetworkChange { isolated: Some(true), ..NetworkChange::default() };
    for name in ["default", "blue"] {
        let error = write_network(&user("overlay-agent"), &name.into(), WriteKind::Change, &change).await.unwrap_err();
        assert!(matches!(error, NetworkError::Role { .. } | NetworkError::Invalid { .. }), "{error}");
    }
    // It may also see which entries an etcd lease has, and so revokes none that is in use.
    access(&["green"]);
    assert_eq!(green.next_held().await.etcd_lease, held.etcd_lease);
    green.stop().await;
    store.network(&"green".into()).release("id-7").await.unwrap();
    blue.stop().await;
    store.network(&"blue".into()).release("id-7").await.unwrap();
    let options = ConnectOptions::new().with_user("root", std::fs::read_to_string(directory.path().join("root")).unwrap().trim());
    let mut root = Client::connect([etcd.endpoint()], Some(options)).await.unwrap();
    assert!(root.leases().await.unwrap().leases().is_empty());
}
