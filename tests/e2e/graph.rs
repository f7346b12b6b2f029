//! `overlayctl graph` of a real overlay: it contains every host and container, and shows a broken link.

use overlay_tests::faults::Fault;
use overlay_tests::{ExpectContext, TestLab, eventually, kernel};
use overlayctl::graph::Graph;

#[tokio::test(flavor = "multi_thread")]
async fn graph_shows_every_host_and_broken_link() {
    let lab = TestLab::up(|options| options.hosts = 3).await;
    let sockets: Vec<String> = ["h2", "h3"].map(|host| lab.host(host).socket().to_string_lossy().into_owned()).into();
    let all = ["graph", "--also", &sockets[0], "--also", &sockets[1]];
    let render = |format: &str| {
        let arguments: Vec<&str> = all.iter().copied().chain(["--format", format]).collect();
        lab.ctl("h1", &arguments).assert_code(0).stdout
    };
    let pictures = ["svg", "dot", "text"].map(render);
    let mut wanted = vec!["10.244.0.0/16".to_owned()];
    for host in lab.hosts() {
        wanted.push(host.name().to_owned());
        let status = lab.status(host.name()).await;
        wanted.push(status.lease.expect_ok("a lease").subnet.to_string());
        for endpoint in host.client().endpoints().await.expect_ok("endpoints").endpoints {
            wanted.push(endpoint.name.to_string());
            wanted.push(endpoint.addresses().v4.expect_ok("an address").to_string());
        }
    }
    assert_eq!(wanted.len(), 1 + 3 * (2 + 2 * 2));
    for picture in &pictures {
        for text in &wanted {
            assert!(picture.contains(text.as_str()), "{text} in {picture}");
        }
    }
    assert_eq!(pictures, ["svg", "dot", "text"].map(render), "the same overlay gives the same pictures");
    assert_eq!(pictures[0].matches("<path class=\"link\"").count(), 3, "each pair of hosts is linked: {}", pictures[0]);

    // A single agent knows the other hosts from their leases.
    let single: Graph = lab.ctl("h1", &["-o", "json", "graph"]).assert_code(0).json();
    let known: Vec<bool> = single.hosts.iter().map(|host| host.containers.is_some()).collect();
    assert_eq!((single.hosts.len(), single.links.len()), (3, 2));
    assert_eq!(known.iter().filter(|known| **known).count(), 1, "only its own containers");

    // With a foreign device under our device's name, no link of this host works.
    let hang = Fault::AgentFrozen("h1");
    hang.begin(&lab).await;
    kernel::shell(&lab, "h1", "ip link delete ovx.1; ip link add ovx.1 type bridge");
    hang.end(&lab).await;
    eventually("the broken links are shown", overlay_tests::test_lab::CONVERGE_TIMEOUT, || {
        let graph: Graph = lab.ctl("h1", &["-o", "json", "graph"]).json();
        let broken = graph.links.iter().filter(|link| !link.well && link.state.contains("missing")).count();
        let svg = lab.ctl("h1", &["graph", "--format", "svg"]).stdout;
        if broken == 2 && svg.matches("class=\"link bad\"").count() == 2 { Ok(()) } else { Err(format!("{:#?}", graph.links)) }
    })
    .await;
}
