//! `overlayctl check`: no findings on a healthy lab, and a finding with evidence and remedy for each fault.
//!
//! Each fault is repaired before the next one, and its finding must disappear.

#[path = "check/etcd.rs"]
mod check_etcd;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use overlay_agent::model::Endpoint;
use overlay_tests::faults::Fault;
use overlay_tests::programs::require_program;
use overlay_tests::{ExpectContext, TestLab, etcd, eventually, kernel};
use overlayctl::check::{Finding, Report, Severity, names};
use overlayctl::lab::{Families, process};

/// Time limit for the end of a finding after a repair.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(30);

async fn start_lab(families: Families) -> TestLab {
    start_lab_with_hosts(2, families).await
}

async fn start_lab_with_hosts(hosts: u16, families: Families) -> TestLab {
    for (program, package) in [("ping", "iputils-ping"), ("nft", "nftables"), ("iptables", "iptables"), ("unshare", "util-linux")]
    {
        require_program(program, package);
    }
    TestLab::up(|options| {
        options.hosts = hosts;
        options.containers = 1;
        options.families = families;
    })
    .await
}

/// The report of `overlayctl check` on h1, and its exit code.
#[track_caller]
fn run_check(lab: &TestLab, arguments: &[&str]) -> (Report, Option<i32>) {
    let state = lab.host("h1").state_dir();
    let state = state.to_string_lossy();
    let mut command = vec!["-o", "json", "check"];
    if !arguments.contains(&"--state-dir") {
        command.extend(["--state-dir", &state]);
    }
    command.extend(arguments);
    let output = lab.ctl("h1", &command);
    (output.json(), output.code)
}

/// Checks that there is exactly one finding above information, and that it contains each of the words.
#[track_caller]
fn assert_finding(lab: &TestLab, arguments: &[&str], severity: Severity, words: &[&str]) -> Finding {
    let (report, code) = run_check(lab, arguments);
    let found = find(&report, severity, words);
    let expected_code = match report.worst {
        Some(Severity::Error) => 1,
        Some(Severity::Warning) => 3,
        _ => 0,
    };
    assert_eq!(code, Some(expected_code), "the exit code is that of the worst finding");
    found
}

/// The finding that contains each of the words.
#[track_caller]
fn find(report: &Report, severity: Severity, words: &[&str]) -> Finding {
    let is_expected = |finding: &&Finding| {
        let text = format!("{} {} {}", finding.summary, finding.evidence.join(" "), finding.remedy);
        finding.severity == severity && words.iter().all(|word| text.contains(word))
    };
    let found = report.findings.iter().find(is_expected).cloned();
    let found = found.expect_ok(&format!("{severity:?} {words:?} in {:#?}", report.findings));
    assert!(!found.evidence.is_empty() && !found.remedy.is_empty(), "{found:#?}");
    found
}

/// Waits until there is no finding above information.
async fn wait_no_findings(lab: &TestLab, arguments: &[&str]) {
    eventually(&format!("{arguments:?} has no findings"), REPAIR_TIMEOUT, || {
        let (report, code) = run_check(lab, arguments);
        let problems: Vec<&Finding> = report.findings.iter().filter(|finding| finding.severity > Severity::Info).collect();
        if problems.is_empty() && code == Some(0) { Ok(()) } else { Err(format!("{problems:#?}, exit code {code:?}")) }
    })
    .await;
}

/// Breaks something on h1, checks its finding, repairs it, and checks that the finding is gone.
async fn assert_fault_is_found_and_cleared(
    lab: &TestLab,
    check: &str,
    break_script: &str,
    repair_script: &str,
    severity: Severity,
    words: &[&str],
) {
    kernel::shell(lab, "h1", break_script);
    assert_finding(lab, &[check], severity, words);
    kernel::shell(lab, "h1", repair_script);
    wait_no_findings(lab, &[check]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn healthy_host_has_no_findings() {
    for families in [Families::V4, Families::V6, Families::Dual] {
        let lab = start_lab(families).await;
        wait_no_findings(&lab, &[]).await;
        let (report, _) = run_check(&lab, &[]);
        let run: Vec<&str> = report.checks.iter().map(|checked| checked.name.as_str()).collect();
        assert_eq!(run, names().collect::<Vec<_>>());
        let state = lab.host("h1").state_dir();
        let output = lab.ctl("h1", &["check", "--state-dir", &state.to_string_lossy()]).assert_code(0);
        assert_eq!(
            output.stdout.lines().filter(|line| line.starts_with("ok ") || line.starts_with("info ")).count(),
            run.len(),
            "{}",
            output.stdout
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn firewall_faults_are_found() {
    let lab = start_lab(Families::V4).await;
    let nft = "nft 'table inet evil { chain in { type filter hook input priority 0; ip saddr 10.99.0.0/16 udp dport 8472 counter drop; }; }'";
    assert_fault_is_found_and_cleared(
        &lab,
        "firewall",
        nft,
        "nft delete table inet evil",
        Severity::Error,
        &["from peers", "inet evil", "chain in", "8472", "accept"],
    )
    .await;
    let output = "iptables -N BAD; iptables -A BAD -p udp -m multiport --dports 53,8472 -j REJECT; iptables -A OUTPUT -j BAD";
    let repair = "iptables -F; iptables -X BAD";
    assert_fault_is_found_and_cleared(
        &lab,
        "firewall",
        output,
        repair,
        Severity::Error,
        &["to peers", "chain BAD", "8472", "reject"],
    )
    .await;
    // Rules that nf_tables does not show are reported as present.
    let (report, _) = run_check(&lab, &["firewall"]);
    assert!(!report.findings.iter().any(|finding| finding.summary.contains("iptables-legacy")), "{:#?}", report.findings);
    for (program, tables) in [("iptables", "filter"), ("ip6tables", "filter mangle")] {
        for table in tables.split(' ') {
            kernel::run(&lab, "h1", &[&format!("{program}-legacy"), "-t", table, "-A", "FORWARD", "-i", "absent", "-j", "DROP"]);
        }
        let summary = format!("not checked: {program}-legacy has tables");
        let tables = format!("tables of {program}-legacy: {tables}");
        assert_finding(&lab, &["firewall"], Severity::Info, &[&summary, &tables, &format!("{program}-legacy-save")]);
    }
    let traced = lab.ctl("h1", &["trace", "c1", "203.0.113.1"]).stdout;
    assert!(traced.contains("rules of iptables-legacy (`iptables-legacy -S`), which are not evaluated"), "{traced}");
    let world =
        "nft 'table ip evil { chain f { type filter hook forward priority 5; iifname \"ovb.*\" oifname \"eth0\" reject; }; }'";
    assert_fault_is_found_and_cleared(
        &lab,
        "firewall",
        world,
        "nft delete table ip evil",
        Severity::Warning,
        &["to the world", "ip evil", "eth0"],
    )
    .await;
    // Docker's policy: the agent adds its accept rule, so nothing is found, although other traffic is dropped.
    kernel::shell(&lab, "h1", "iptables -P FORWARD DROP");
    wait_no_findings(&lab, &["firewall"]).await;
    // firewalld and ufw, recognised by their chains.
    let firewalld = "nft 'table inet firewalld { chain filter_INPUT { type filter hook input priority 10; ct state { established, related } accept; \
                     iifname \"lo\" accept; tcp dport 22 accept; reject with icmpx admin-prohibited; }; }'";
    assert_fault_is_found_and_cleared(
        &lab,
        "firewall",
        firewalld,
        "nft delete table inet firewalld",
        Severity::Error,
        &["from peers", "firewall-cmd", "8472/udp"],
    )
    .await;
    let ufw =
        "iptables -N ufw-user-input; iptables -A ufw-user-input -p udp --dport 8472 -j DROP; iptables -A INPUT -j ufw-user-input";
    assert_fault_is_found_and_cleared(
        &lab,
        "firewall",
        ufw,
        "iptables -F INPUT; iptables -F ufw-user-input; iptables -X ufw-user-input",
        Severity::Error,
        &["ufw allow 8472/udp"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn address_and_neighbour_faults_are_found() {
    let lab = start_lab(Families::V4).await;
    let free = format!("{}/24", etcd::free_subnet(&lab));
    let address = free.replace(".0/", ".1/");
    let docker = format!("ip link add docker0 type bridge; ip address add {address} dev docker0; ip link set docker0 up");
    assert_fault_is_found_and_cleared(
        &lab,
        "addresses",
        &docker,
        "ip link delete docker0",
        Severity::Error,
        &["Docker's network on docker0", &free, "daemon.json"],
    )
    .await;
    let static_route = format!("ip route add {free} via 10.99.0.254");
    assert_fault_is_found_and_cleared(
        &lab,
        "addresses",
        &static_route,
        &format!("ip route delete {free}"),
        Severity::Error,
        &[&free, "a route by eth0", "boot"],
    )
    .await;
    let other = "ip link add wrong0 type bridge; ip link set wrong0 up; ip route add 10.99.1.2/32 dev wrong0";
    let filter = format!("{other}; echo 1 >/proc/sys/net/ipv4/conf/eth0/rp_filter");
    let repair = "ip link delete wrong0; echo 0 >/proc/sys/net/ipv4/conf/eth0/rp_filter";
    assert_fault_is_found_and_cleared(
        &lab,
        "addresses",
        &filter,
        repair,
        Severity::Error,
        &["reverse path filter", "wrong0", "rp_filter=2"],
    )
    .await;
    kernel::shell(&lab, "h1", "echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter");
    assert_fault_is_found_and_cleared(
        &lab,
        "addresses",
        other,
        "ip link delete wrong0",
        Severity::Warning,
        &["do not leave by eth0", "wrong0"],
    )
    .await;

    let root = tempfile::tempdir().expect_ok("a directory");
    let path = root.path().to_string_lossy().into_owned();
    let file = |name: &str, text: &str| {
        let file = root.path().join(name);
        fs::create_dir_all(file.parent().unwrap_or(Path::new("/"))).expect_ok(name);
        fs::write(&file, text).expect_ok(name);
    };
    file("etc/resolv.conf", "search x\nnameserver 10.244.9.53\n");
    assert_finding(&lab, &["addresses", "--root", &path], Severity::Error, &["resolver", "10.244.9.53"]);
    let index = |name: &str| {
        kernel::shell(
            &lab,
            "h1",
            &format!("cat /sys/class/net/{name}/ifindex 2>/dev/null || ip -o link show {name} | cut -d: -f1"),
        )
    };
    wait_no_findings(&lab, &["neighbours", "--root", &path]).await;
    file(&format!("run/NetworkManager/devices/{}", index("ovb.1").trim()), "[device]\nmanaged=true\n");
    assert_finding(&lab, &["neighbours", "--root", &path], Severity::Warning, &["NetworkManager", "ovb.1", "unmanaged-devices"]);
    file(&format!("run/NetworkManager/devices/{}", index("ovb.1").trim()), "[device]\nmanaged=false\n");
    file(&format!("run/systemd/netif/links/{}", index("ovx.1").trim()), "ADMIN_STATE=unmanaged\nOPER_STATE=routable\n");
    wait_no_findings(&lab, &["neighbours", "--root", &path]).await;
    file(&format!("run/systemd/netif/links/{}", index("ovx.1").trim()), "ADMIN_STATE=configured\nOPER_STATE=routable\n");
    assert_finding(&lab, &["neighbours", "--root", &path], Severity::Warning, &["systemd-networkd", "ovx.1", "Unmanaged=yes"]);
    file("run/flannel/subnet.env", "FLANNEL_NETWORK=10.244.0.0/16\n");
    assert_finding(&lab, &["neighbours", "--root", &path], Severity::Warning, &["flannel", "FLANNEL_NETWORK=10.244.0.0/16"]);

    let left = "ip link add flannel.1 type vxlan id 9 dev eth0 dstport 8472 nolearning; ip link add cni0 type bridge; iptables -N FLANNEL-FWD";
    let repair = "ip link delete flannel.1; ip link delete cni0; iptables -X FLANNEL-FWD";
    assert_fault_is_found_and_cleared(&lab, "neighbours", left, repair, Severity::Warning, &["flannel.1", "cni0", "FLANNEL-FWD"])
        .await;
}

/// A host with six peers, each with another fault, so that one check waits for all of them at once.
#[tokio::test(flavor = "multi_thread")]
async fn peer_path_faults_are_found() {
    let lab = start_lab_with_hosts(7, Families::V4).await;
    wait_no_findings(&lab, &["paths"]).await;
    // A switch port with a smaller MTU than the hosts'; the kernel's bridge allows for a VLAN tag (`is_skb_forwardable`).
    kernel::shell(&lab, "net", "ip link set h2 mtu 1400");
    // The underlay fragments large packets. Tunnel packets survive this; packets with the don't-fragment flag do not.
    let fragments = "ip daddr 10.99.1.3 ip length > 1400 ip protocol icmp drop";
    kernel::shell(
        &lab,
        "net",
        &format!("nft 'table bridge evil {{ chain f {{ type filter hook forward priority 0; {fragments}; }}; }}'"),
    );
    // The peer's firewall: the tunnel's port; only TCP, as with checksums broken by a network card; only UDP.
    for (host, dropped) in
        [("h4", "udp dport 8472"), ("h5", "iifname \"ovx.1\" meta l4proto tcp"), ("h6", "iifname \"ovx.1\" meta l4proto udp")]
    {
        let rule = format!("chain in {{ type filter hook input priority 0; {dropped} drop; }}");
        kernel::shell(&lab, host, &format!("nft 'table inet evil {{ {rule}; }}'"));
    }
    // The host is down.
    let down = Fault::UnderlayDown("h7");
    down.begin(&lab).await;
    let (report, code) = run_check(&lab, &["paths"]);
    let expected: [(Severity, &[&str]); 6] = [
        (
            Severity::Error,
            &["overlay to h2 carries 1354 of 1450", "large packets are lost", "Backend.MTU`, the underlay's, to 1404"],
        ),
        (Severity::Warning, &["underlay to h3 carries 1400 of 1500", "fragmented", "the underlay's, to 1400"]),
        (Severity::Error, &["h4 is reached by the underlay, but not by the overlay", "10.99.1.4"]),
        (Severity::Error, &["h5", "no TCP", "--vxlan-tx-checksum=false"]),
        (Severity::Warning, &["large sends do not arrive at h6"]),
        (Severity::Warning, &["h7 is not reached at all"]),
    ];
    for (severity, words) in expected {
        find(&report, severity, words);
    }
    let problems = report.findings.iter().filter(|finding| finding.severity > Severity::Info);
    assert_eq!((problems.count(), code), (expected.len(), Some(1)), "{:#?}", report.findings);

    down.end(&lab).await;
    kernel::shell(&lab, "net", "ip link set h2 mtu 1500; nft delete table bridge evil");
    for host in ["h4", "h5", "h6"] {
        kernel::shell(&lab, host, "nft delete table inet evil");
    }
    wait_no_findings(&lab, &["paths"]).await;
}

/// A network card that writes wrong checksums into the inner packets; here the switch corrupts them. The agents do not offload
/// checksums to the card, so that the packets on the wire have checksums at all.
#[tokio::test(flavor = "multi_thread")]
async fn corrupted_checksums_are_found() {
    let lab = TestLab::up(|options| {
        options.hosts = 2;
        options.containers = 0;
        options.agent_args = vec!["--vxlan-tx-checksum=false".to_owned()];
    })
    .await;
    wait_no_findings(&lab, &["paths"]).await;
    // From the outer UDP header: 8 bytes UDP, 8 VXLAN, 14 Ethernet; then inner IPv4 (protocol at 9), and TCP (checksum at 16).
    let spoil = "nft 'table bridge evil { chain f { type filter hook forward priority 0; udp dport 8472 @th,312,8 6 @th,528,16 set 0x1234; }; }'";
    kernel::shell(&lab, "net", spoil);
    assert_finding(&lab, &["paths"], Severity::Error, &["h2", "no TCP", "checksums arrive broken", "--vxlan-tx-checksum=false"]);
    kernel::shell(&lab, "net", "nft delete table bridge evil");
    wait_no_findings(&lab, &["paths"]).await;
    // UDP in one packet and in segments: the same at 6 bytes into UDP.
    let spoil = "nft 'table bridge evil { chain f { type filter hook forward priority 0; udp dport 8472 @th,312,8 17 @th,448,16 set 0x1234; }; }'";
    kernel::shell(&lab, "net", spoil);
    assert_finding(&lab, &["paths"], Severity::Warning, &["large sends do not arrive at h2"]);
    kernel::shell(&lab, "net", "nft delete table bridge evil");
    wait_no_findings(&lab, &["paths"]).await;
}

async fn endpoint(lab: &TestLab, name: &str) -> Endpoint {
    let all = lab.host("h1").client().endpoints().await.expect_ok("endpoints").endpoints;
    all.into_iter().find(|endpoint| endpoint.name.as_str() == name).expect_ok(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn container_faults_are_found() {
    let lab = start_lab(Families::V4).await;
    lab.ctl("h1", &["attach", "web"]).assert_code(0);
    wait_no_findings(&lab, &["endpoints"]).await;
    let web = endpoint(&lab, "web").await;
    let address = web.addresses().v4.expect_ok("the container's address");
    kernel::shell(&lab, "h1", &format!("nsenter --net={} ip address delete {address}/24 dev eth0", web.netns.display()));
    assert_finding(&lab, &["endpoints"], Severity::Warning, &["the container web", &address.to_string(), "detach web"]);
    // The default route was lost with the address: the finding's remedy repairs both.
    lab.ctl("h1", &["detach", "web"]).assert_code(0);
    lab.ctl("h1", &["attach", "web"]).assert_code(0);
    wait_no_findings(&lab, &["endpoints"]).await;
    let web = endpoint(&lab, "web").await;
    let address = web.addresses().v4.expect_ok("the container's address");

    let leaked = "ip link add ove0badbad0 type veth peer name ovepeer; ip link set ove0badbad0 master ovb.1";
    assert_fault_is_found_and_cleared(
        &lab,
        "endpoints",
        leaked,
        "ip link delete ove0badbad0",
        Severity::Warning,
        &["ove0badbad0", "no container's", "ip link delete"],
    )
    .await;

    // The state directory differs from the agent.
    let copy = tempfile::tempdir().expect_ok("a directory");
    let file = lab.host("h1").state_dir().join("endpoints.json");
    let path = copy.path().to_string_lossy().into_owned();
    let text = fs::read_to_string(file).expect_ok("endpoints.json");
    fs::write(copy.path().join("endpoints.json"), text.replace(&address.to_string(), "10.244.3.3")).expect_ok("a copy");
    assert_finding(&lab, &["endpoints", "--state-dir", &path], Severity::Warning, &["do not agree", "web"]);
    fs::write(copy.path().join("endpoints.json"), "{\"version\":1,\"endpo").expect_ok("a torn copy");
    assert_finding(&lab, &["endpoints", "--state-dir", &path], Severity::Error, &["cannot be read", "endpoints.json"]);

    // A namespace deleted before its container, and one left behind by its container.
    kernel::shell(&lab, "h1", &format!("umount {0} && rm {0}", web.netns.display()));
    assert_finding(&lab, &["endpoints"], Severity::Warning, &["web", "detach web"]);
    lab.ctl("h1", &["detach", "web"]).assert_code(0);
    lab.ctl("h1", &["attach", "left"]).assert_code(0);
    let agent = lab.host("h1").client();
    agent.detach(&"left".parse().expect_ok("a name")).await.expect_ok("detach by the socket, which leaves the namespace");
    assert_finding(
        &lab,
        &["endpoints"],
        Severity::Warning,
        &["left belongs to a container that no longer exists", "ip netns delete"],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_and_kernel_faults_are_found() {
    let lab = start_lab(Families::V4).await;
    wait_no_findings(&lab, &["kernel"]).await;
    // A kernel without VXLAN, simulated by iproute2's error message.
    let tools = tempfile::tempdir().expect_ok("a directory");
    let ip = tools.path().join("ip");
    fs::write(&ip, "#!/bin/sh\ncase \"$*\" in *vxlan*|*nexthop*) echo 'Error: Unknown device type.' >&2; exit 2;; esac\nexec /sbin/ip \"$@\"\n").expect_ok("ip");
    fs::set_permissions(&ip, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect_ok("ip");
    let program = overlay_tests::programs::overlayctl();
    let script = format!("PATH={}:$PATH exec {} -o json check kernel", tools.path().display(), program.display());
    let output = kernel::attempt(&lab, "h1", &["sh", "-c", &script]).assert_code(1);
    let report: Report = output.json();
    let summaries: Vec<(Severity, &str)> =
        report.findings.iter().map(|finding| (finding.severity, finding.summary.as_str())).collect();
    assert_eq!(
        summaries,
        [(Severity::Error, "the kernel has no VXLAN devices"), (Severity::Warning, "the kernel has no next-hop objects")]
    );

    let conflict = Fault::AgentFrozen("h1");
    conflict.begin(&lab).await;
    kernel::shell(&lab, "h1", "ip link delete ovx.1; ip link add ovx.1 type bridge");
    conflict.end(&lab).await;
    eventually("the agent reports it", REPAIR_TIMEOUT, || {
        let (report, _) = run_check(&lab, &["agent"]);
        let is_reported = report
            .findings
            .iter()
            .any(|finding| finding.severity == Severity::Error && finding.evidence.join(" ").contains("ovx.1"));
        if is_reported { Ok(()) } else { Err(format!("{:#?}", report.findings)) }
    })
    .await;
    kernel::shell(&lab, "h1", "ip link delete ovx.1");
    wait_no_findings(&lab, &["agent"]).await;

    lab.host("h1").agent_stop(Signal::SIGTERM).expect_ok("stop");
    assert_finding(&lab, &["agent"], Severity::Error, &["the agent does not answer", "systemctl start overlayd"]);
    kernel::shell(&lab, "h1", "echo 0 >/proc/sys/net/ipv4/ip_forward");
    assert_finding(&lab, &["kernel"], Severity::Error, &["does not forward IPv4", "ip_forward = 0"]);
    lab.start_agent("h1").await;
    wait_no_findings(&lab, &["kernel", "agent"]).await;
}
