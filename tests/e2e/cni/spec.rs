//! The CNI specification, verb by verb, in each supported version.

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Family;
use overlay_tests::cni::{Attachment, Network, SUPPORTED_VERSIONS, parse_error};
use overlay_tests::{ExpectContext, TestLab, kernel};
use overlayctl::lab::Families;
use serde_json::{Value, json};

use super::{dump_when_stable, endpoints, wait_unchanged};

/// Whether a version has a verb.
fn is_at_least(version: &str, first: &str) -> bool {
    SUPPORTED_VERSIONS.iter().position(|v| *v == version) >= SUPPORTED_VERSIONS.iter().position(|v| *v == first)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_verb_works_in_every_version() {
    let lab = TestLab::one_host(Families::Dual).await;
    // Kernel modules loaded for the first container add sysctls.
    let first = Attachment::new(&lab, "h1", "first");
    let network = Network::overlay_only(&lab, "h1", "1.1.0");
    let result = network.add(&first).map_err(|output| output.stdout).expect_ok("ADD");
    network.del(&first, &result).map_err(|output| output.stdout).expect_ok("DEL");
    let attachment = Attachment::new(&lab, "h1", "c1");
    let (host, inside) = (lab.open_netns("h1"), attachment.open_netns());
    let before = (dump_when_stable(&host).await, dump_when_stable(&inside).await);
    for version in SUPPORTED_VERSIONS {
        let network = Network::overlay_only(&lab, "h1", version);
        let answer: Value =
            network.exec_own_plugin("VERSION", &json!({ "cniVersion": version }).to_string()).assert_code(0).json();
        assert_eq!(answer, json!({ "cniVersion": version, "supportedVersions": SUPPORTED_VERSIONS }));

        let result = network.add(&attachment).unwrap_or_else(|output| panic!("{version}: {}{}", output.stdout, output.stderr));
        assert_result_fields(version, &result, &attachment);
        assert_kernel_matches_result(&lab, &result, &attachment);
        let listed = endpoints(&lab).await;
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].owner.as_deref(), Some(format!("cni/overlay/{}/eth0", attachment.container).as_str()));
        assert!(listed[0].name.as_str().starts_with("c1") && listed[0].name.as_str().contains("-eth0-"), "{}", listed[0].name);

        // "If the requested interface name already exists in the container, the CNI plugin MUST return with an error."
        let (code, text) = parse_error(&network.add(&attachment).expect_err("a second ADD"));
        assert!(code == 101 && text.contains("eth0"), "{code}: {text}");
        assert_eq!(endpoints(&lab).await, listed, "the existing endpoint stays");

        match network.check(&attachment, &result) {
            Ok(()) => assert!(is_at_least(version, "0.4.0")),
            Err(output) => assert_eq!((version, parse_error(&output).0), ("0.3.1", 1)),
        }
        for (verb, outcome) in [("STATUS", network.status()), ("GC", network.gc(&[&attachment]))] {
            match outcome {
                Ok(()) => assert!(is_at_least(version, "1.1.0"), "{verb}"),
                Err(output) => {
                    assert!(!is_at_least(version, "1.1.0") && parse_error(&output).0 == 1, "{verb}: {}", output.stdout)
                }
            }
        }
        assert_eq!(endpoints(&lab).await, listed, "GC keeps the named attachments");

        // The second time nothing exists any more, and there is no previous result.
        network.del(&attachment, &result).unwrap_or_else(|output| panic!("{version}: {}{}", output.stdout, output.stderr));
        network.del(&attachment, &Value::Null).unwrap_or_else(|output| panic!("{version}: {}{}", output.stdout, output.stderr));
        assert!(endpoints(&lab).await.is_empty());
        wait_unchanged(&format!("{version}: the host"), &host, &before.0).await;
        wait_unchanged(&format!("{version}: the container"), &inside, &before.1).await;
    }
    let log = std::fs::read_to_string(lab.host("h1").dir().join("cni.log")).expect_ok("the log file");
    for wanted in ["ADD c1", "CHECK c1", "DEL c1", "already has an interface eth0"] {
        assert!(log.contains(wanted), "{wanted} in:\n{log}");
    }
}

/// Checks that the result has exactly the fields of its version.
fn assert_result_fields(version: &str, result: &Value, attachment: &Attachment) {
    assert_eq!(result["cniVersion"], version);
    let interfaces = result["interfaces"].as_array().expect_ok("interfaces");
    assert_eq!(interfaces.len(), 2, "the host's and the container's interface: {result}");
    assert!(interfaces[0].get("sandbox").is_none() && interfaces[0]["name"].as_str().is_some_and(|n| n.starts_with("ove")));
    assert_eq!((&interfaces[1]["name"], &interfaces[1]["sandbox"]), (&json!("eth0"), &json!(attachment.netns)));
    assert_eq!(interfaces[1]["mac"].as_str().map(str::len), Some(17));
    assert_eq!(interfaces[1].get("mtu").is_some(), is_at_least(version, "1.1.0"), "{result}");
    let ips = result["ips"].as_array().expect_ok("ips");
    assert_eq!(ips.len(), 2);
    for (ip, digit) in ips.iter().zip(["4", "6"]) {
        assert_eq!(ip["interface"], 1);
        let wanted = if is_at_least(version, "1.0.0") { None } else { Some(json!(digit)) };
        assert_eq!(ip.get("version").cloned(), wanted, "{version}");
    }
    assert_eq!(result["routes"].as_array().map(Vec::len), Some(2));
    assert!(result["dns"].is_object());
}

/// Checks that the kernel state agrees with the result.
fn assert_kernel_matches_result(lab: &overlay_tests::TestLab, result: &Value, attachment: &Attachment) {
    let name = attachment.netns.rsplit_once("h1-").expect_ok("a container of h1").1;
    let target = format!("h1-{name}");
    let link = kernel::link(lab, &target, "eth0").expect_ok("eth0");
    assert_eq!(kernel::text(&link, "address"), result["interfaces"][1]["mac"].as_str().expect_ok("a MAC"));
    assert_eq!((link["mtu"].as_u64(), kernel::text(&link, "operstate").as_str()), (Some(1430), "UP"));
    assert!(kernel::link(lab, "h1", result["interfaces"][0]["name"].as_str().expect_ok("a name")).is_some());
    for (n, family) in [(0, Family::V4), (1, Family::V6)] {
        let flag = if family == Family::V4 { "-4" } else { "-6" };
        let addresses = kernel::run(lab, &target, &["ip", flag, "-o", "address", "show", "eth0"]);
        let address = result["ips"][n]["address"].as_str().expect_ok("an address");
        assert!(addresses.contains(address), "{address} in {addresses}");
        let gateway = result["ips"][n]["gateway"].as_str().expect_ok("a gateway");
        assert_eq!(result["routes"][n]["gw"], gateway);
        let routes = kernel::run(lab, &target, &["ip", flag, "route", "show", "default"]);
        assert!(routes.contains(&format!("via {gateway} dev eth0")), "{routes}");
        kernel::run(lab, &target, &["ping", "-c", "1", "-W", "5", gateway]);
    }
    kernel::run(lab, &target, &["ping", "-c", "1", "-W", "5", "127.0.0.1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn check_reports_changes() {
    let lab = TestLab::one_host(Families::Dual).await;
    let network = Network::overlay_only(&lab, "h1", "1.0.0");
    let (v4, v6) = ("ip -4 address flush dev eth0", "ip -6 address flush dev eth0 scope global");
    for (n, (change, wanted)) in [
        (v4, "has no address 10."),
        (v6, "has no address fd"),
        ("ip route delete default", "no default route via 10."),
        ("ip -6 route delete default", "no default route via fd"),
        ("ip link set eth0 down", "eth0 is down"),
        ("ip link set eth0 address 02:00:00:00:00:77", "has the MAC 02:00:00:00:00:77"),
        ("ip link set eth0 down; ip link set eth0 name eth7", "eth0 is missing"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("c{n}");
        let attachment = Attachment::new(&lab, "h1", &name);
        let result = network.add(&attachment).map_err(|output| output.stdout).expect_ok("ADD");
        network.check(&attachment, &result).map_err(|output| output.stdout).expect_ok("CHECK");
        kernel::run(&lab, &format!("h1-{name}"), &["sh", "-c", change]);
        let output = network.check(&attachment, &result).expect_err(change);
        let (code, _) = parse_error(&output);
        assert!(code == 103 && output.stdout.contains(wanted), "{change}: {}", output.stdout);
        network.del(&attachment, &result).map_err(|output| output.stdout).expect_ok("DEL");
    }
    let attachment = Attachment::new(&lab, "h1", "last");
    let result = network.add(&attachment).map_err(|output| output.stdout).expect_ok("ADD");
    // The agent's part: its address differs from the runtime's.
    let mut other = result.clone();
    other["ips"][0]["address"] = "10.255.255.9/24".into();
    let output = network.check(&attachment, &other).expect_err("another result");
    assert!(
        output.stdout.contains("which prevResult lacks") && output.stdout.contains("packets from it are dropped"),
        "{}",
        output.stdout
    );
    // An attachment unknown to the agent, whatever the kernel state.
    lab.ctl("h1", &["detach", endpoints(&lab).await[0].name.as_str()]).assert_code(0);
    let output = network.check(&attachment, &result).expect_err("detached");
    assert!(output.stdout.contains("the agent has no endpoint"), "{}", output.stdout);
    assert_eq!(parse_error(&network.check(&attachment, &Value::Null).expect_err("no prevResult")).0, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn runtime_capabilities_are_applied() {
    let lab = TestLab::one_host(Families::Dual).await;
    let subnet = lab.status("h1").await.lease.expect_ok("a lease").subnet;
    let nth = |family: Family, n: u128| subnet.get(family).and_then(|range| range.nth(n)).expect_ok("an address").to_string();
    let mut network = Network::overlay_only(&lab, "h1", "1.0.0");
    network.plugins[0]["dns"] = json!({ "nameservers": ["10.0.0.10"], "domain": "example.org", "options": ["ndots:2"] });
    network.runtime = json!({
        "ips": [format!("{}/24", nth(Family::V4, 77)), nth(Family::V6, 0x77)],
        "mac": "02:00:5e:10:00:77",
        "dns": { "servers": ["10.0.0.53"], "searches": ["a.example.org", "example.org"] },
        "bandwidth": { "ingressRate": 1000 },
    });
    let a = Attachment::new(&lab, "h1", "a");
    let result = network.add(&a).map_err(|output| output.stdout).expect_ok("ADD: an undeclared capability is not passed on");
    assert_eq!(result["ips"][0]["address"], format!("{}/24", nth(Family::V4, 77)));
    assert_eq!(result["ips"][1]["address"], format!("{}/64", nth(Family::V6, 0x77)));
    assert_eq!(result["interfaces"][1]["mac"], "02:00:5e:10:00:77");
    let wanted = json!({
        "nameservers": ["10.0.0.53"], "domain": "example.org", "search": ["a.example.org", "example.org"], "options": ["ndots:2"],
    });
    assert_eq!(result["dns"], wanted);
    network.check(&a, &result).map_err(|output| output.stdout).expect_ok("CHECK");

    // Addresses of another endpoint, addresses in use and addresses outside the subnet; by each of the three ways.
    network.runtime = json!({});
    let mut b = Attachment::new(&lab, "h1", "b");
    let mut refused = |network: &Network, arguments: &str, wanted: (u64, &str)| {
        b.arguments = arguments.to_owned();
        let (code, text) = parse_error(&network.add(&b).expect_err(arguments));
        assert!(code == wanted.0 && text.contains(wanted.1), "{code}: {text}");
    };
    let (taken, free) = (nth(Family::V4, 77), nth(Family::V4, 78));
    refused(&network, &format!("IP={taken}"), (101, "in use by endpoint a"));
    refused(&network, "IP=192.0.2.1", (100, "outside this host's subnet"));
    refused(&network, "MAC=02:00:5e:10:00:77", (101, "in use by endpoint a"));
    refused(&network, "MAC=here", (4, "MAC"));
    refused(&network, "K8S_POD_NAME=p", (4, "K8S_POD_NAME"));
    let mut by_args = network.clone();
    by_args.plugins[0]["args"] = json!({ "cni": { "ips": [taken] } });
    refused(&by_args, "", (101, "in use by endpoint a"));
    by_args.plugins[0]["args"] = json!({ "cni": { "ips": [free] } });
    b.arguments = "IgnoreUnknown=1;K8S_POD_NAME=p;MAC=02:00:5e:10:00:78".to_owned();
    let result = by_args.add(&b).map_err(|output| output.stdout).expect_ok("ADD");
    assert_eq!(
        (&result["ips"][0]["address"], &result["interfaces"][1]["mac"]),
        (&json!(format!("{free}/24")), &json!("02:00:5e:10:00:78"))
    );

    // Ports on both wildcards, without the matching family, and duplicates: as runtimes send them.
    let d = Attachment::new(&lab, "h1", "d");
    let mapping = |ip: &str| json!({ "hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ip });
    network.runtime = json!({ "portMappings": [mapping("0.0.0.0"), mapping("::"), mapping(""), mapping("")] });
    let result = network.add(&d).map_err(|output| output.stdout).expect_ok("ADD with both wildcards");
    network.check(&d, &result).map_err(|output| output.stdout).expect_ok("CHECK");
    network.del(&d, &result).map_err(|output| output.stdout).expect_ok("DEL");

    // A limit that nothing would enforce is rejected by name.
    let c = Attachment::new(&lab, "h1", "c");
    network.plugins[0]["capabilities"]["bandwidth"] = true.into();
    network.runtime = json!({ "bandwidth": { "ingressRate": 1000, "ingressBurst": 1000, "egressRate": 0, "egressBurst": 0 } });
    let (code, text) = parse_error(&network.add(&c).expect_err("bandwidth"));
    assert!(code == 2 && text.contains("bandwidth") && text.contains("1000"), "{code}: {text}");
    assert_eq!(endpoints(&lab).await.len(), 2, "failed attachments leave nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn gc_removes_unknown_attachments() {
    let lab = TestLab::one_host(Families::V4).await;
    let network = Network::overlay_only(&lab, "h1", "1.1.0");
    let other = Network { name: "overlay2".to_owned(), ..network.clone() };
    let attachments: Vec<Attachment> = ["a", "b", "c", "d"].iter().map(|name| Attachment::new(&lab, "h1", name)).collect();
    for attachment in &attachments[..3] {
        network.add(attachment).map_err(|output| output.stdout).expect_ok("ADD");
    }
    let second = Attachment { interface: "eth1".to_owned(), ..Attachment::new(&lab, "h1", "e") };
    network.add(&second).map_err(|output| output.stdout).expect_ok("ADD of eth1");
    other.add(&attachments[3]).map_err(|output| output.stdout).expect_ok("ADD to another network");
    lab.ctl("h1", &["attach", "person"]).assert_code(0);
    // One with a deleted namespace.
    Netns::delete(attachments[2].netns.rsplit_once('/').expect_ok("a name").1).expect_ok("delete");
    network
        .gc(&[&attachments[0], &Attachment { interface: "eth0".to_owned(), ..second.clone() }])
        .map_err(|output| output.stdout)
        .expect_ok("GC");
    let left: Vec<String> = endpoints(&lab).await.into_iter().map(|e| e.owner.unwrap_or_default()).collect();
    let owner =
        |network: &str, attachment: &Attachment| format!("cni/{network}/{}/{}", attachment.container, attachment.interface);
    let mut wanted = vec![String::new(), owner("overlay", &attachments[0]), owner("overlay2", &attachments[3])];
    wanted.sort();
    assert_eq!(
        {
            let mut left = left;
            left.sort();
            left
        },
        wanted
    );
    network.gc(&[]).map_err(|output| output.stdout).expect_ok("GC of all");
    assert_eq!(endpoints(&lab).await.len(), 2);
    // Without a list of valid attachments nothing is removed.
    let output = other.exec_own_plugin("GC", &other.config(&other.plugins[0], &[]).to_string());
    assert_eq!(parse_error(&output).0, 7);
    assert_eq!(endpoints(&lab).await.len(), 2);
}
