//! The doctor: a healthy lab has nothing, and each thing that is broken in it is named, with its evidence and a remedy.
//!
//! What is broken is mended again before the next, and the doctor says that, too.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Endpoint;
use overlay_tests::faults::Fault;
use overlay_tests::programs::needs;
use overlay_tests::{Must, Story, etcd, eventually, kernel};
use overlayctl::check::{Finding, Report, Severity, names};
use overlayctl::lab::{Families, process};

/// How long the host may take to be as it was once a thing is mended.
const MENDED: Duration = Duration::from_secs(30);

async fn lab(families: Families) -> Story {
    for (program, package) in [("ping", "iputils-ping"), ("nft", "nftables"), ("iptables", "iptables"), ("unshare", "util-linux")]
    {
        needs(program, package);
    }
    Story::up(|options| {
        options.hosts = 2;
        options.containers = 1;
        options.families = families;
    })
    .await
}

/// What the doctor says on h1, and its exit code.
#[track_caller]
fn ask(story: &Story, arguments: &[&str]) -> (Report, Option<i32>) {
    let state = story.at("h1").state_dir();
    let state = state.to_string_lossy();
    let mut command = vec!["-o", "json", "check"];
    if !arguments.contains(&"--state-dir") {
        command.extend(["--state-dir", &state]);
    }
    command.extend(arguments);
    let said = story.ctl("h1", &command);
    (said.json(), said.code)
}

/// The doctor finds exactly this grave thing, and each of the words in it.
#[track_caller]
fn finds(story: &Story, arguments: &[&str], severity: Severity, words: &[&str]) -> Finding {
    let (report, code) = ask(story, arguments);
    let holds = |finding: &&Finding| {
        let text = format!("{} {} {}", finding.summary, finding.evidence.join(" "), finding.remedy);
        finding.severity == severity && words.iter().all(|word| text.contains(word))
    };
    let found = report.findings.iter().find(holds).cloned();
    let found = found.must(&format!("{arguments:?} finds {severity:?} {words:?} in {:#?}", report.findings));
    assert!(!found.evidence.is_empty() && !found.remedy.is_empty(), "{found:#?}");
    let wanted = match report.worst {
        Some(Severity::Error) => 1,
        Some(Severity::Warning) => 3,
        _ => 0,
    };
    assert_eq!(code, Some(wanted), "the exit code says the worst");
    found
}

/// Nothing above information is found; the host may take a moment to be well again.
async fn well(story: &Story, arguments: &[&str]) {
    eventually(&format!("{arguments:?} finds nothing"), MENDED, || {
        let (report, code) = ask(story, arguments);
        let grave: Vec<&Finding> = report.findings.iter().filter(|finding| finding.severity > Severity::Info).collect();
        if grave.is_empty() && code == Some(0) { Ok(()) } else { Err(format!("{grave:#?}, exit code {code:?}")) }
    })
    .await;
}

/// Breaks something on h1, sees it found, mends it, sees that.
async fn broken(story: &Story, check: &str, breaks: &str, mends: &str, severity: Severity, words: &[&str]) {
    kernel::shell(story, "h1", breaks);
    finds(story, &[check], severity, words);
    kernel::shell(story, "h1", mends);
    well(story, &[check]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_host_has_nothing() {
    for families in [Families::V4, Families::V6, Families::Dual] {
        let story = lab(families).await;
        well(&story, &[]).await;
        let (report, _) = ask(&story, &[]);
        let run: Vec<&str> = report.checks.iter().map(|checked| checked.name.as_str()).collect();
        assert_eq!(run, names().collect::<Vec<_>>());
        let state = story.at("h1").state_dir();
        let said = story.ctl("h1", &["check", "--state-dir", &state.to_string_lossy()]).exits(0);
        assert_eq!(
            said.out.lines().filter(|line| line.starts_with("ok ") || line.starts_with("info ")).count(),
            run.len(),
            "{}",
            said.out
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn firewalls() {
    let story = lab(Families::V4).await;
    let nft = "nft 'table inet evil { chain in { type filter hook input priority 0; ip saddr 10.99.0.0/16 udp dport 8472 counter drop; }; }'";
    broken(
        &story,
        "firewall",
        nft,
        "nft delete table inet evil",
        Severity::Error,
        &["from peers", "inet evil", "chain in", "8472", "accept"],
    )
    .await;
    let output = "iptables -N BAD; iptables -A BAD -p udp -m multiport --dports 53,8472 -j REJECT; iptables -A OUTPUT -j BAD";
    let mend = "iptables -F; iptables -X BAD";
    broken(&story, "firewall", output, mend, Severity::Error, &["to peers", "chain BAD", "8472", "reject"]).await;
    let legacy = "iptables-legacy -P FORWARD DROP";
    broken(
        &story,
        "firewall",
        legacy,
        "iptables-legacy -P FORWARD ACCEPT",
        Severity::Error,
        &["containers' packets to other hosts", "policy drop", "iptables-legacy"],
    )
    .await;
    let world =
        "nft 'table ip evil { chain f { type filter hook forward priority 5; iifname \"ovb.*\" oifname \"eth0\" reject; }; }'";
    broken(&story, "firewall", world, "nft delete table ip evil", Severity::Warning, &["to the world", "ip evil", "eth0"]).await;
    // Docker's policy: the agent adds its accept, so nothing is found, though others are dropped.
    kernel::shell(&story, "h1", "iptables -P FORWARD DROP");
    well(&story, &["firewall"]).await;
    // firewalld and ufw by their chains.
    let firewalld = "nft 'table inet firewalld { chain filter_INPUT { type filter hook input priority 10; ct state { established, related } accept; \
                     iifname \"lo\" accept; tcp dport 22 accept; reject with icmpx admin-prohibited; }; }'";
    broken(
        &story,
        "firewall",
        firewalld,
        "nft delete table inet firewalld",
        Severity::Error,
        &["from peers", "firewall-cmd", "8472/udp"],
    )
    .await;
    let ufw =
        "iptables -N ufw-user-input; iptables -A ufw-user-input -p udp --dport 8472 -j DROP; iptables -A INPUT -j ufw-user-input";
    broken(
        &story,
        "firewall",
        ufw,
        "iptables -F INPUT; iptables -F ufw-user-input; iptables -X ufw-user-input",
        Severity::Error,
        &["ufw allow 8472/udp"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_and_neighbours() {
    let story = lab(Families::V4).await;
    let docker = "ip link add docker0 type bridge; ip address add 10.244.240.1/24 dev docker0; ip link set docker0 up";
    broken(
        &story,
        "addresses",
        docker,
        "ip link delete docker0",
        Severity::Error,
        &["Docker's network on docker0", "10.244.240.0/24", "daemon.json"],
    )
    .await;
    let static_route = "ip route add 10.244.77.0/24 via 10.99.0.254";
    broken(
        &story,
        "addresses",
        static_route,
        "ip route delete 10.244.77.0/24",
        Severity::Error,
        &["10.244.77.0/24", "a route by eth0", "boot"],
    )
    .await;
    let other = "ip link add wrong0 type bridge; ip link set wrong0 up; ip route add 10.99.1.2/32 dev wrong0";
    let filter = format!("{other}; echo 1 >/proc/sys/net/ipv4/conf/eth0/rp_filter");
    let mend = "ip link delete wrong0; echo 0 >/proc/sys/net/ipv4/conf/eth0/rp_filter";
    broken(&story, "addresses", &filter, mend, Severity::Error, &["reverse path filter", "wrong0", "rp_filter=2"]).await;
    kernel::shell(&story, "h1", "echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter");
    broken(&story, "addresses", other, "ip link delete wrong0", Severity::Warning, &["do not leave by eth0", "wrong0"]).await;

    let root = tempfile::tempdir().must("a directory");
    let path = root.path().to_string_lossy().into_owned();
    let file = |name: &str, text: &str| {
        let file = root.path().join(name);
        fs::create_dir_all(file.parent().unwrap_or(Path::new("/"))).must(name);
        fs::write(&file, text).must(name);
    };
    file("etc/resolv.conf", "search x\nnameserver 10.244.9.53\n");
    finds(&story, &["addresses", "--root", &path], Severity::Error, &["resolver", "10.244.9.53"]);
    let index = |name: &str| {
        kernel::shell(
            &story,
            "h1",
            &format!("cat /sys/class/net/{name}/ifindex 2>/dev/null || ip -o link show {name} | cut -d: -f1"),
        )
    };
    well(&story, &["neighbours", "--root", &path]).await;
    file(&format!("run/NetworkManager/devices/{}", index("ovb.1").trim()), "[device]\nmanaged=true\n");
    finds(&story, &["neighbours", "--root", &path], Severity::Warning, &["NetworkManager", "ovb.1", "unmanaged-devices"]);
    file(&format!("run/NetworkManager/devices/{}", index("ovb.1").trim()), "[device]\nmanaged=false\n");
    file(&format!("run/systemd/netif/links/{}", index("ovx.1").trim()), "ADMIN_STATE=unmanaged\nOPER_STATE=routable\n");
    well(&story, &["neighbours", "--root", &path]).await;
    file(&format!("run/systemd/netif/links/{}", index("ovx.1").trim()), "ADMIN_STATE=configured\nOPER_STATE=routable\n");
    finds(&story, &["neighbours", "--root", &path], Severity::Warning, &["systemd-networkd", "ovx.1", "Unmanaged=yes"]);
    file("run/flannel/subnet.env", "FLANNEL_NETWORK=10.244.0.0/16\n");
    finds(&story, &["neighbours", "--root", &path], Severity::Warning, &["flannel", "FLANNEL_NETWORK=10.244.0.0/16"]);

    let left = "ip link add flannel.1 type vxlan id 9 dev eth0 dstport 8472 nolearning; ip link add cni0 type bridge; iptables -N FLANNEL-FWD";
    let mend = "ip link delete flannel.1; ip link delete cni0; iptables -X FLANNEL-FWD";
    broken(&story, "neighbours", left, mend, Severity::Warning, &["flannel.1", "cni0", "FLANNEL-FWD"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ways_to_peers() {
    let story = lab(Families::V4).await;
    // A switch's port that carries less than the hosts believe; the kernel's bridge allows for a VLAN tag (`is_skb_forwardable`).
    kernel::shell(&story, "net", "ip link set h2 mtu 1400");
    finds(
        &story,
        &["paths"],
        Severity::Error,
        &["overlay to h2 carries 1354 of 1450", "large packets are lost", "Backend.MTU`, the underlay's, to 1404"],
    );
    kernel::shell(&story, "net", "ip link set h2 mtu 1500");
    well(&story, &["paths"]).await;
    // The underlay cuts large packets up, which the tunnel's survive and what must not be cut up does not.
    let whole =
        "nft 'table bridge evil { chain f { type filter hook forward priority 0; ip length > 1400 ip protocol icmp drop; }; }'";
    kernel::shell(&story, "net", whole);
    finds(
        &story,
        &["paths"],
        Severity::Warning,
        &["underlay to h2 carries 1400 of 1500", "fragmented", "the underlay's, to 1400"],
    );
    kernel::shell(&story, "net", "nft delete table bridge evil");
    well(&story, &["paths"]).await;
    // The peer's firewall.
    kernel::shell(
        &story,
        "h2",
        "nft 'table inet evil { chain in { type filter hook input priority 0; udp dport 8472 drop; }; }'",
    );
    finds(&story, &["paths"], Severity::Error, &["h2 is reached by the underlay, but not by the overlay", "10.99.1.2"]);
    kernel::shell(&story, "h2", "nft delete table inet evil");
    well(&story, &["paths"]).await;
    // TCP alone does not arrive: as with checksums that a network card has broken.
    kernel::shell(
        &story,
        "h2",
        "nft 'table inet evil { chain in { type filter hook input priority 0; iifname \"ovx.1\" meta l4proto tcp drop; }; }'",
    );
    finds(&story, &["paths"], Severity::Error, &["h2", "no TCP", "--vxlan-tx-checksum=false"]);
    kernel::shell(&story, "h2", "nft delete table inet evil");
    kernel::shell(
        &story,
        "h2",
        "nft 'table inet evil { chain in { type filter hook input priority 0; iifname \"ovx.1\" meta l4proto udp drop; }; }'",
    );
    finds(&story, &["paths"], Severity::Warning, &["large sends do not arrive at h2"]);
    kernel::shell(&story, "h2", "nft delete table inet evil");
    well(&story, &["paths"]).await;
    // The host is gone.
    let gone = Fault::UnderlayDown("h2");
    gone.begin(&story).await;
    finds(&story, &["paths"], Severity::Warning, &["h2 is not reached at all"]);
}

/// A network card that writes wrong checksums into what is inside the tunnel: here the switch spoils them. The agents do not leave checksums to the card, so
/// that they are on the wire at all.
#[tokio::test(flavor = "multi_thread")]
async fn checksums() {
    let story = Story::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.agent_args = vec!["--vxlan-tx-checksum=false".to_owned()];
    })
    .await;
    well(&story, &["paths"]).await;
    // From the outer UDP header on: 8 bytes of it, VXLAN 8, Ethernet 14; then the inner IPv4 header with the protocol at 9, and 16 bytes into TCP its checksum.
    let spoil = "nft 'table bridge evil { chain f { type filter hook forward priority 0; udp dport 8472 @th,312,8 6 @th,528,16 set 0x1234; }; }'";
    kernel::shell(&story, "net", spoil);
    finds(&story, &["paths"], Severity::Error, &["h2", "no TCP", "checksums arrive broken", "--vxlan-tx-checksum=false"]);
    kernel::shell(&story, "net", "nft delete table bridge evil");
    well(&story, &["paths"]).await;
    // UDP in one piece and in segments: the same at 6 bytes into UDP.
    let spoil = "nft 'table bridge evil { chain f { type filter hook forward priority 0; udp dport 8472 @th,312,8 17 @th,448,16 set 0x1234; }; }'";
    kernel::shell(&story, "net", spoil);
    finds(&story, &["paths"], Severity::Warning, &["large sends do not arrive at h2"]);
    kernel::shell(&story, "net", "nft delete table bridge evil");
    well(&story, &["paths"]).await;
}

async fn endpoint(story: &Story, name: &str) -> Endpoint {
    let all = story.at("h1").client().endpoints().await.must("endpoints").endpoints;
    all.into_iter().find(|endpoint| endpoint.name.as_str() == name).must(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn containers() {
    let story = lab(Families::V4).await;
    story.ctl("h1", &["attach", "web"]).exits(0);
    well(&story, &["endpoints"]).await;
    let web = endpoint(&story, "web").await;
    let address = web.addresses().v4.must("its address");
    kernel::shell(&story, "h1", &format!("nsenter --net={} ip address delete {address}/24 dev eth0", web.netns.display()));
    finds(&story, &["endpoints"], Severity::Warning, &["the container web", &address.to_string(), "detach web"]);
    // The default route went along with it: what the remedy says mends both.
    story.ctl("h1", &["detach", "web"]).exits(0);
    story.ctl("h1", &["attach", "web"]).exits(0);
    well(&story, &["endpoints"]).await;
    let web = endpoint(&story, "web").await;
    let address = web.addresses().v4.must("its address");

    let leaked = "ip link add ove0badbad0 type veth peer name ovepeer; ip link set ove0badbad0 master ovb.1";
    broken(
        &story,
        "endpoints",
        leaked,
        "ip link delete ove0badbad0",
        Severity::Warning,
        &["ove0badbad0", "no container's", "ip link delete"],
    )
    .await;

    // The state directory says otherwise.
    let copy = tempfile::tempdir().must("a directory");
    let file = story.at("h1").state_dir().join("endpoints.json");
    let path = copy.path().to_string_lossy().into_owned();
    let text = fs::read_to_string(file).must("endpoints.json");
    fs::write(copy.path().join("endpoints.json"), text.replace(&address.to_string(), "10.244.3.3")).must("a copy");
    finds(&story, &["endpoints", "--state-dir", &path], Severity::Warning, &["do not agree", "web"]);
    fs::write(copy.path().join("endpoints.json"), "{\"version\":1,\"endpo").must("a torn copy");
    finds(&story, &["endpoints", "--state-dir", &path], Severity::Error, &["cannot be read", "endpoints.json"]);

    // A namespace that goes away under its container, and one that stays behind its container.
    kernel::shell(&story, "h1", &format!("umount {0} && rm {0}", web.netns.display()));
    finds(&story, &["endpoints"], Severity::Warning, &["web", "detach web"]);
    story.ctl("h1", &["detach", "web"]).exits(0);
    story.ctl("h1", &["attach", "left"]).exits(0);
    let agent = story.at("h1").client();
    agent.detach(&"left".parse().must("a name")).await.must("detach by the socket, which leaves the namespace");
    finds(&story, &["endpoints"], Severity::Warning, &["left was made for a container that is no more", "ip netns delete"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_and_its_clock() {
    let story = lab(Families::V4).await;
    let good = story.layout().etcd_endpoints().join(",");
    let bad = format!("{good},http://10.99.0.2:1");
    finds(&story, &["store", "--etcd-endpoints", &bad], Severity::Warning, &["1 of 2 etcd servers", "10.99.0.2:1"]);
    let tls = good.replace("http://", "https://");
    finds(&story, &["store", "--etcd-endpoints", &tls], Severity::Error, &["etcd does not answer", "https://10.99.0.2:2379"]);
    // A server whose clock is wrong: its HTTP has a date of long ago.
    let listener = story.inside("h1").run(|| std::net::TcpListener::bind("127.0.0.1:2399")).must("h1").must("a port");
    listener.set_nonblocking(true).must("a listener");
    static STOP: AtomicBool = AtomicBool::new(false);
    let server = std::thread::spawn(move || {
        use std::io::{ErrorKind, Read, Write};
        while !STOP.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((mut stream, _)) => {
                    let _asked = stream.set_nonblocking(false).and_then(|()| stream.read(&mut [0; 1024]));
                    let answer = "HTTP/1.0 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 2\r\n\r\n{}";
                    let _told = stream.write_all(answer.as_bytes());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(10)),
                Err(_) => return,
            }
        }
    });
    finds(
        &story,
        &["store", "--etcd-endpoints", "http://127.0.0.1:2399"],
        Severity::Warning,
        &["clock", "784111777", "timesyncd"],
    );
    STOP.store(true, Ordering::Relaxed);
    server.join().unwrap_or_default();
    well(&story, &["store"]).await;
    etcd::kill(&story);
    finds(&story, &["store"], Severity::Error, &["etcd does not answer"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clock_of_etcd_over_tls() {
    needs("openssl", "openssl");
    let story = Story::without_agents(1, Families::V4).await;
    let (pki, answers) = (story.dir().join("pki"), story.dir().join("answers"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/etcd/certs.sh");
    for arguments in [&["ca"][..], &["member", "old", "127.0.0.1"], &["client", "overlay-agent"]] {
        let made = Command::new(&script).arg(&pki).args(arguments).output().must("certs.sh");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    // A server whose clock is wrong, and that wants a client certificate: openssl serves whole answers out of files.
    fs::create_dir_all(&answers).must("a directory");
    fs::write(answers.join("version"), "HTTP/1.0 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n{}").must("an answer");
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
    let (log, record) = (story.dir().join("s_server.log"), story.dir().join("s_server.pid"));
    let server = process::start(server, Some(&story.inside("h1")), &log, &record).must("openssl");
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
        let (report, _) = ask(&story, &arguments);
        let clocks = report.findings.into_iter().filter(|finding| finding.summary.contains("clock"));
        clocks.map(|finding| finding.evidence.join(" ")).collect::<Vec<String>>()
    };
    eventually("the clock is measured", MENDED, || match clocks(given(&["overlay-agent.crt", "overlay-agent.key"])).as_slice() {
        [evidence] if evidence.contains("https://127.0.0.1:2398 says 784111777") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    assert_eq!(clocks(given(&[])), Vec::<String>::new(), "who is refused is told no clock");
    let failures = process::end_all(&[server], process::GRACE);
    assert!(failures.is_empty(), "{failures:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_and_the_kernel() {
    let story = lab(Families::V4).await;
    well(&story, &["kernel"]).await;
    // A kernel without VXLAN, as iproute2 tells it.
    let tools = tempfile::tempdir().must("a directory");
    let ip = tools.path().join("ip");
    fs::write(&ip, "#!/bin/sh\ncase \"$*\" in *vxlan*|*nexthop*) echo 'Error: Unknown device type.' >&2; exit 2;; esac\nexec /sbin/ip \"$@\"\n").must("ip");
    fs::set_permissions(&ip, std::os::unix::fs::PermissionsExt::from_mode(0o755)).must("ip");
    let program = overlay_tests::programs::overlayctl();
    let script = format!("PATH={}:$PATH exec {} -o json check kernel", tools.path().display(), program.display());
    let said = kernel::attempt(&story, "h1", &["sh", "-c", &script]).exits(1);
    let report: Report = said.json();
    let told: Vec<(Severity, &str)> =
        report.findings.iter().map(|finding| (finding.severity, finding.summary.as_str())).collect();
    assert_eq!(
        told,
        [(Severity::Error, "the kernel has no VXLAN devices"), (Severity::Warning, "the kernel has no next-hop objects")]
    );

    let conflict = Fault::AgentHangs("h1");
    conflict.begin(&story).await;
    kernel::shell(&story, "h1", "ip link delete ovx.1; ip link add ovx.1 type bridge");
    conflict.end(&story).await;
    eventually("the agent says so", MENDED, || {
        let (report, _) = ask(&story, &["agent"]);
        let told = report
            .findings
            .iter()
            .any(|finding| finding.severity == Severity::Error && finding.evidence.join(" ").contains("ovx.1"));
        if told { Ok(()) } else { Err(format!("{:#?}", report.findings)) }
    })
    .await;
    kernel::shell(&story, "h1", "ip link delete ovx.1");
    well(&story, &["agent"]).await;

    story.at("h1").agent_stop(Signal::SIGTERM).must("stop");
    finds(&story, &["agent"], Severity::Error, &["the agent does not answer", "systemctl start overlayd"]);
    kernel::shell(&story, "h1", "echo 0 >/proc/sys/net/ipv4/ip_forward");
    finds(&story, &["kernel"], Severity::Error, &["does not forward IPv4", "ip_forward = 0"]);
    story.start("h1").await;
    well(&story, &["kernel", "agent"]).await;
}
