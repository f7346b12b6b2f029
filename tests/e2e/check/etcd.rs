//! `overlayctl check store`: failing servers, and clock skew.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn etcd_faults_and_clock_skew_are_found() {
    let lab = start_lab(Families::V4).await;
    let good = lab.layout().etcd_endpoints().join(",");
    let bad = format!("{good},http://10.99.0.2:1");
    assert_finding(&lab, &["store", "--etcd-endpoints", &bad], Severity::Warning, &["1 of 2 etcd servers", "10.99.0.2:1"]);
    let tls = good.replace("http://", "https://");
    assert_finding(
        &lab,
        &["store", "--etcd-endpoints", &tls],
        Severity::Error,
        &["etcd does not answer", "https://10.99.0.2:2379"],
    );
    // A server with a wrong clock: its HTTP date is years ago.
    let listener = lab.open_netns("h1").run(|| std::net::TcpListener::bind("127.0.0.1:2399")).expect_ok("h1").expect_ok("a port");
    listener.set_nonblocking(true).expect_ok("a listener");
    static STOP: AtomicBool = AtomicBool::new(false);
    let server = std::thread::spawn(move || {
        use std::io::{ErrorKind, Read, Write};
        while !STOP.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((mut stream, _)) => {
                    let _read = stream.set_nonblocking(false).and_then(|()| stream.read(&mut [0; 1024]));
                    let answer = "HTTP/1.0 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 2\r\n\r\n{}";
                    let _written = stream.write_all(answer.as_bytes());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(10)),
                Err(_) => return,
            }
        }
    });
    assert_finding(
        &lab,
        &["store", "--etcd-endpoints", "http://127.0.0.1:2399"],
        Severity::Warning,
        &["clock", "784111777", "timesyncd"],
    );
    STOP.store(true, Ordering::Relaxed);
    server.join().unwrap_or_default();
    wait_no_findings(&lab, &["store"]).await;
    etcd::kill(&lab);
    assert_finding(&lab, &["store"], Severity::Error, &["etcd does not answer"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_clock_skew_is_found_over_tls() {
    require_program("openssl", "openssl");
    let lab = TestLab::without_agents(1, Families::V4).await;
    let (pki, answers) = (lab.dir().join("pki"), lab.dir().join("answers"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/etcd/certs.sh");
    for arguments in [&["ca"][..], &["member", "old", "127.0.0.1"], &["client", "overlay-agent"]] {
        let made = Command::new(&script).arg(&pki).args(arguments).output().expect_ok("certs.sh");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    // A server with a wrong clock that requires a client certificate: openssl serves complete responses from files.
    fs::create_dir_all(&answers).expect_ok("a directory");
    fs::write(answers.join("version"), "HTTP/1.0 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n{}").expect_ok("an answer");
    let file = |name: &str| pki.join(name).to_string_lossy().into_owned();
    let mut server = Command::new("timeout");
    server.args([
        "300",
        "openssl",
        "s_server",
        "-accept",
        "127.0.0.1:2398",
        "-HTTP",
        "-quiet",
        "-Verify",
        "1",
        "-verify_return_error",
    ]);
    server.args(["-cert", &file("old.crt"), "-key", &file("old.key"), "-CAfile", &file("ca.crt")]).current_dir(&answers);
    let (log, record) = (lab.dir().join("s_server.log"), lab.dir().join("s_server.pid"));
    let server = process::start(server, Some(&lab.open_netns("h1")), &log, &record).expect_ok("openssl");
    let given = |more: &[&str]| {
        let mut arguments = ["store", "--etcd-endpoints", "https://127.0.0.1:2398", "--etcd-cafile"].map(str::to_owned).to_vec();
        arguments.push(file("ca.crt"));
        arguments.extend(more.iter().map(|argument| file(argument)));
        if more.len() == 2 {
            arguments.insert(5, "--etcd-certfile".to_owned());
            arguments.insert(7, "--etcd-keyfile".to_owned());
        }
        arguments
    };
    let clocks = |arguments: Vec<String>| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (report, _) = run_check(&lab, &arguments);
        let clocks = report.findings.into_iter().filter(|finding| finding.summary.contains("clock"));
        clocks.map(|finding| finding.evidence.join(" ")).collect::<Vec<String>>()
    };
    eventually("the clock is measured", REPAIR_TIMEOUT, || {
        match clocks(given(&["overlay-agent.crt", "overlay-agent.key"])).as_slice() {
            [evidence] if evidence.contains("https://127.0.0.1:2398 says 784111777") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(clocks(given(&[])), Vec::<String>::new(), "no clock without a client certificate");
    let failures = process::terminate_all(&[server], process::TERM_GRACE);
    assert!(failures.is_empty(), "{failures:?}");
}
