//! The picture of a real overlay: every host and container is in it, and a link that is broken shows.

use overlay_tests::faults::Fault;
use overlay_tests::{Must, Story, eventually, kernel};
use overlayctl::graph::Graph;

#[tokio::test(flavor = "multi_thread")]
async fn a_lab_is_drawn_whole() {
    let story = Story::up(|options| options.hosts = 3).await;
    let sockets: Vec<String> = ["h2", "h3"].map(|host| story.at(host).socket().to_string_lossy().into_owned()).into();
    let all = ["graph", "--also", &sockets[0], "--also", &sockets[1]];
    let drawn = |format: &str| {
        let arguments: Vec<&str> = all.iter().copied().chain(["--format", format]).collect();
        story.ctl("h1", &arguments).exits(0).out
    };
    let pictures = ["svg", "dot", "text"].map(drawn);
    let mut wanted = vec!["10.244.0.0/16".to_owned()];
    for host in story.hosts() {
        wanted.push(host.name().to_owned());
        let status = story.status(host.name()).await;
        wanted.push(status.lease.must("a lease").subnet.to_string());
        for endpoint in host.client().endpoints().await.must("endpoints").endpoints {
            wanted.push(endpoint.name.to_string());
            wanted.push(endpoint.addresses().v4.must("an address").to_string());
        }
    }
    assert_eq!(wanted.len(), 1 + 3 * (2 + 2 * 2));
    for picture in &pictures {
        for text in &wanted {
            assert!(picture.contains(text.as_str()), "{text} in {picture}");
        }
    }
    assert_eq!(pictures, ["svg", "dot", "text"].map(drawn), "the same overlay gives the same pictures");
    assert_eq!(pictures[0].matches("<path class=\"link\"").count(), 3, "each pair of hosts is linked: {}", pictures[0]);

    // One agent alone knows the others by their leases.
    let alone: Graph = story.ctl("h1", &["-o", "json", "graph"]).exits(0).json();
    let known: Vec<bool> = alone.hosts.iter().map(|host| host.containers.is_some()).collect();
    assert_eq!((alone.hosts.len(), alone.links.len()), (3, 2));
    assert_eq!(known.iter().filter(|known| **known).count(), 1, "its own containers alone");

    // With somebody else's device in the place of ours no link of this host is whole.
    let hang = Fault::AgentHangs("h1");
    hang.begin(&story).await;
    kernel::shell(&story, "h1", "ip link delete ovx.1; ip link add ovx.1 type bridge");
    hang.end(&story).await;
    eventually("the broken links show", overlay_tests::story::SOON, || {
        let graph: Graph = story.ctl("h1", &["-o", "json", "graph"]).json();
        let broken = graph.links.iter().filter(|link| !link.well && link.state.contains("missing")).count();
        let svg = story.ctl("h1", &["graph", "--format", "svg"]).out;
        if broken == 2 && svg.matches("class=\"link bad\"").count() == 2 { Ok(()) } else { Err(format!("{:#?}", graph.links)) }
    })
    .await;
}
