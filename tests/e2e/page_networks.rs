//! Runs `docs/networks.md` completely, on the page's hosts.

use overlay_tests::doc_hosts::DocHosts;
use overlay_tests::doc_pages::DocPage;
use overlay_tests::programs::require_program;

#[tokio::test(flavor = "multi_thread")]
async fn networks_page_runs() {
    require_program("busybox", "busybox-static");
    let hosts = DocHosts::boot(&["host-1", "host-2", "etcd"]).await;
    hosts.start_etcd("etcd");
    for (host, number) in [("host-1", 7), ("host-2", 9)] {
        hosts.configure(host, &format!("10.244.{number}.0/24"));
        // The page's subnets: each host takes its saved one again.
        for (network, range) in [("blue", "10.0"), ("green", "10.0"), ("lab", "10.1"), ("dmz", "10.245")] {
            let directory = format!("/var/lib/overlayd/networks/{network}");
            hosts.run(host, &format!("install -d -m 0700 /var/lib/overlayd/networks {directory}"));
            let state = format!("{{\"version\": 1, \"subnet\": {{\"v4\": \"{range}.{number}.0/24\"}}}}\n");
            hosts.write(host, &format!("{directory}/state.json"), &state);
        }
        // Ready once the page has created the default network.
        hosts.run(host, "START_LIMIT=1s systemctl start overlayd || test $? = 4");
        hosts.wait_for(host, "overlayctl status --brief || test $? = 3").await;
    }
    let mut page = DocPage::open("docs/networks.md", &hosts);
    page.run_until_section("An isolated network").await;
    for host in ["host-1", "host-2"] {
        hosts.run(host, "overlayctl status --wait 30s");
    }
    page.run_to_end().await;
}
