//! Runs `docs/operations.md` completely, on the page's hosts.

use overlay_tests::doc_hosts::DocHosts;
use overlay_tests::doc_pages::DocPage;

#[tokio::test(flavor = "multi_thread")]
async fn operations_page_runs() {
    let machines = DocHosts::with_overlay(&["host-4", "etcd-1"]).await;
    machines.write_saved_subnet("host-4", "10.244.21.0/24");
    machines.run("host-1", "overlayctl attach web; overlayctl status --wait 30s");
    machines.run("host-2", "overlayctl attach db --ip 10.244.9.5");
    let mut page = DocPage::open("docs/operations.md", &machines);
    page.run_until_section("A host that is dead").await;
    machines.run("host-3", "kill -KILL $(cat /run/machine/overlayd.pid)");
    page.run_until_section("Reserve a subnet").await;
    machines.run("host-3", "systemctl start overlayd");
    // A change after the snapshot, so that the restored etcd is behind the agents' revision.
    page.run_until_section("Restore").await;
    machines.run("etcd", "for n in $(seq 9); do etcdctl put /coreos.com/network/subnets/10.200.250.0-24 $n; done");
    machines.wait_for("host-1", "overlayctl subnets | grep 10.200.250.0").await;
    page.run_until_section("Complete loss without a backup").await;
    machines.wait_for("host-1", "grep 'restored or replaced' /var/log/overlayd.log").await;
    // The page asks its reader to copy the file.
    page.run_until_section("Move to another cluster").await;
    page.run_block().await;
    machines.copy("etcd", "etcd-1", "/var/tmp/overlay.db");
    page.run_to_end().await;
}
