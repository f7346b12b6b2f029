//! Runs `docs/migrating-from-flannel.md` completely, on hosts with a simulated flannel.

use overlay_tests::doc_hosts::DocHosts;
use overlay_tests::doc_pages::DocPage;
use overlay_tests::programs::require_program;

#[tokio::test(flavor = "multi_thread")]
async fn migration_page_runs() {
    require_program("iptables-restore", "iptables");
    let machines = DocHosts::boot(&["host-1", "host-2", "host-3", "etcd"]).await;
    machines.start_etcd("etcd");
    machines.set_network_config("host-1", r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}"#);
    for (n, subnet) in [(1, 7), (2, 9), (3, 12)] {
        let host = format!("host-{n}");
        machines.write(&host, "/etc/flannel.env", &format!("SUBNET=10.244.{subnet}\nIP=192.0.2.{n}\n"));
        machines.run(&host, &format!("systemctl start flanneld; flannel-container c{n} 10.244.{subnet}.2"));
    }
    let reaches = async |from: &str, container: &str, address: &str| {
        machines.wait_for(from, &format!("ip netns exec {container} ping -c 1 -W 1 {address}")).await;
    };
    // The simulated flannel carries packets; otherwise the rest would prove little.
    reaches("host-1", "c1", "10.244.9.2").await;
    let mut page = DocPage::open("docs/migrating-from-flannel.md", &machines);
    page.run_until_section("Back").await;
    reaches("host-3", "c3", "10.244.7.2").await;
    page.run_to_end().await;
    // Unchanged hosts notice nothing.
    reaches("host-2", "c2", "10.244.12.2").await;
    machines.run("host-1", "flannel-container c1 10.244.7.2");
    reaches("host-2", "c2", "10.244.7.2").await;
    assert_eq!(machines.run("host-1", "ip link show group 22102"), "", "nothing of ours is left");
}
