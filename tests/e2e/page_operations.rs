//! `docs/operations.md`, from the first block to the last, on hosts as the page has them.

use overlay_tests::machines::Machines;
use overlay_tests::pages::Page;

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_life() {
    let machines = Machines::with_overlay(&["host-4", "etcd-1"]).await;
    machines.remember("host-4", "10.244.21.0/24");
    machines.run("host-1", "overlayctl attach web; overlayctl status --wait 30s");
    machines.run("host-2", "overlayctl attach db --ip 10.244.9.5");
    let mut page = Page::open("docs/operations.md", &machines);
    page.up_to("A host that is dead").await;
    machines.run("host-3", "kill -KILL $(cat /run/machine/overlayd.pid)");
    page.up_to("Reserve a subnet").await;
    machines.run("host-3", "systemctl start overlayd");
    // What happened behind the snapshot's back, so that etcd is behind what the agents have seen.
    page.up_to("Restore").await;
    machines.run("etcd", "for n in $(seq 9); do etcdctl put /coreos.com/network/subnets/10.200.250.0-24 $n; done");
    machines.until("host-1", "overlayctl subnets | grep 10.200.250.0").await;
    page.up_to("Lost wholly, with no backup").await;
    machines.until("host-1", "grep 'restored or replaced' /var/log/overlayd.log").await;
    // The page has its reader copy the file.
    page.up_to("Move to another cluster").await;
    page.step().await;
    machines.copy("etcd", "etcd-1", "/var/tmp/overlay.db");
    page.to_the_end().await;
}
