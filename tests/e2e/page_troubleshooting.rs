//! `docs/troubleshooting.md`: each of its faults is made, and its commands have to print what the page says.

use overlay_tests::doc_hosts::DocHosts;
use overlay_tests::doc_pages::DocPage;

/// Where the settings of a host are.
const CONFIG_PATH: &str = "/etc/overlayd/overlayd.toml";

#[tokio::test(flavor = "multi_thread")]
async fn troubleshooting_page_runs() {
    let machines = DocHosts::with_overlay(&[]).await;
    machines.run("host-1", "overlayctl attach web --ip 10.244.7.2; overlayctl attach api --ip 10.244.7.3 --publish 8080:80");
    machines.run("host-2", "overlayctl attach db --ip 10.244.9.5");
    let mut page = DocPage::open("docs/troubleshooting.md", &machines);

    run_agent_sections(&machines, &mut page).await;
    run_container_sections(&machines, &mut page).await;

    page.run_until_section("Containers do not reach the world").await;
    let forward =
        "nft add table inet filter; nft add chain inet filter forward '{ type filter hook forward priority 0; policy drop; }'";
    machines.run("host-1", forward);
    page.run_until_section("A published port does not answer").await;
    machines.run("host-1", "nft delete table inet filter");
    page.run_until_section("Something changes what the agent made").await;
    machines.run("host-1", "ip route delete 10.244.9.0/24");
    machines.wait_for("host-1", "ip route show | grep 10.244.9.0").await;
    page.run_until_section("Packets are counted as dropped").await;
    let foreign = "ip netns exec api ip address add 10.244.7.99/24 dev eth0; ip netns exec api ping -I 10.244.7.99 -c 1 -W 1 10.244.7.1 || true";
    machines.run("host-1", foreign);
    page.run_until_section("Left over after a crash").await;
    // The agent forgets a container, as after a loss of power.
    let kept = "/var/lib/overlayd/endpoints.*";
    let attach = format!("mkdir kept; cp {kept} kept/; overlayctl attach old; systemctl stop overlayd");
    machines.run("host-1", &format!("{attach}; rm {kept}; cp kept/* /var/lib/overlayd/"));
    machines.run("host-1", "systemctl start overlayd");
    page.run_to_end().await;
}

/// Agents that do not start, or wait.
async fn run_agent_sections(hosts: &DocHosts, page: &mut DocPage<'_>) {
    let host = "host-3";
    let start_in_vain = "START_LIMIT=2s systemctl start overlayd || true";
    hosts.run(host, &format!("systemctl stop overlayd; echo 'etcd-endpoint = \"x\"' >>{CONFIG_PATH}; {start_in_vain}"));
    page.run_until_section("It waits and does not become ready").await;
    hosts.run(host, &format!("systemctl stop overlayd; sed -i s/192.0.2.10/192.0.2.99/ {CONFIG_PATH}; {start_in_vain}"));
    page.run_until_section("Another agent runs already").await;
    hosts.run(host, &format!("systemctl stop overlayd; sed -i s/192.0.2.99/192.0.2.10/ {CONFIG_PATH}; systemctl start overlayd"));
    page.run_until_section("A host that was copied").await;
    hosts.run(host, "systemctl stop overlayd; overlayd cleanup; install -d -m 0700 /var/lib/overlayd");
    hosts.copy("host-1", host, "/var/lib/overlayd/node-id");
    hosts.run(host, start_in_vain);
    page.run_until_section("Not across hosts, while the hosts reach each other").await;
    hosts.run(host, "systemctl stop overlayd; rm -r /var/lib/overlayd");
    hosts.write_saved_subnet(host, "10.244.12.0/24");
    hosts.run(host, "systemctl start overlayd");
}

/// Packets that do not arrive at another container.
async fn run_container_sections(hosts: &DocHosts, page: &mut DocPage<'_>) {
    const LEASE: &str = "/coreos.com/network/subnets/10.244.12.0-24";
    let input = "nft add table inet filter; nft add chain inet filter input '{ type filter hook input priority 0; }'; \
                 nft add rule inet filter input udp dport 8472 drop";
    hosts.run("host-2", input);
    page.run_until_section("One certain host only").await;
    hosts.run("host-2", "nft delete table inet filter");
    hosts.run("host-3", "systemctl stop overlayd");
    hosts.run("etcd", &format!("etcdctl put {LEASE} '{{\"PublicIP\": \"127.0.0.1\", \"BackendType\": \"vxlan\"}}'"));
    hosts.wait_for("host-1", "overlayctl subnets | grep 'ignored:'").await;
    page.run_until_section("Small packets pass, large ones hang").await;
    hosts.run("etcd", &format!("etcdctl del {LEASE}"));
    hosts.run("host-3", "systemctl start overlayd");
    hosts.run("net", "ip link set host-2 mtu 1400");
    page.run_until_section("Not on one host either").await;
    hosts.run("net", "ip link set host-2 mtu 1500");
    hosts.run("host-1", "ip netns exec web ip link set eth0 down");
}
