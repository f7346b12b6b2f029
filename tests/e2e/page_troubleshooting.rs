//! `docs/troubleshooting.md`: each of its faults is made, and its commands have to print what the page says.

use overlay_tests::machines::Machines;
use overlay_tests::pages::Page;

/// Where the settings of a host are.
const SETTINGS: &str = "/etc/overlayd/overlayd.toml";

#[tokio::test(flavor = "multi_thread")]
async fn every_symptom() {
    let machines = Machines::with_overlay(&[]).await;
    machines.run("host-1", "overlayctl attach web --ip 10.244.7.2; overlayctl attach api --ip 10.244.7.3 --publish 8080:80");
    machines.run("host-2", "overlayctl attach db --ip 10.244.9.5");
    let mut page = Page::open("docs/troubleshooting.md", &machines);

    the_agents(&machines, &mut page).await;
    between_containers(&machines, &mut page).await;

    page.up_to("Containers do not reach the world").await;
    let forward =
        "nft add table inet filter; nft add chain inet filter forward '{ type filter hook forward priority 0; policy drop; }'";
    machines.run("host-1", forward);
    page.up_to("A published port does not answer").await;
    machines.run("host-1", "nft delete table inet filter");
    page.up_to("Something changes what the agent made").await;
    machines.run("host-1", "ip route delete 10.244.9.0/24");
    machines.until("host-1", "ip route show | grep 10.244.9.0").await;
    page.up_to("Packets are counted as dropped").await;
    let foreign = "ip netns exec api ip address add 10.244.7.99/24 dev eth0; ip netns exec api ping -I 10.244.7.99 -c 1 -W 1 10.244.7.1 || true";
    machines.run("host-1", foreign);
    page.up_to("Left over after a crash").await;
    // The agent forgets a container, as after a loss of power.
    let kept = "/var/lib/overlayd/endpoints.*";
    let attach = format!("mkdir kept; cp {kept} kept/; overlayctl attach old; systemctl stop overlayd");
    machines.run("host-1", &format!("{attach}; rm {kept}; cp kept/* /var/lib/overlayd/"));
    machines.run("host-1", "systemctl start overlayd");
    page.to_the_end().await;
}

/// Agents that do not start, or wait.
async fn the_agents(machines: &Machines, page: &mut Page<'_>) {
    let host = "host-3";
    let start_in_vain = "START_LIMIT=2s systemctl start overlayd || true";
    machines.run(host, &format!("systemctl stop overlayd; echo 'etcd-endpoint = \"x\"' >>{SETTINGS}; {start_in_vain}"));
    page.up_to("It waits and does not become ready").await;
    machines.run(host, &format!("systemctl stop overlayd; sed -i s/192.0.2.10/192.0.2.99/ {SETTINGS}; {start_in_vain}"));
    page.up_to("Another agent runs already").await;
    machines.run(host, &format!("systemctl stop overlayd; sed -i s/192.0.2.99/192.0.2.10/ {SETTINGS}; systemctl start overlayd"));
    page.up_to("A host that was copied").await;
    machines.run(host, "systemctl stop overlayd; overlayd cleanup; install -d -m 0700 /var/lib/overlayd");
    machines.copy("host-1", host, "/var/lib/overlayd/node-id");
    machines.run(host, start_in_vain);
    page.up_to("Not across hosts, while the hosts reach each other").await;
    machines.run(host, "systemctl stop overlayd; rm -r /var/lib/overlayd");
    machines.remember(host, "10.244.12.0/24");
    machines.run(host, "systemctl start overlayd");
}

/// Packets that do not arrive at another container.
async fn between_containers(machines: &Machines, page: &mut Page<'_>) {
    const LEASE: &str = "/coreos.com/network/subnets/10.244.12.0-24";
    let input = "nft add table inet filter; nft add chain inet filter input '{ type filter hook input priority 0; }'; \
                 nft add rule inet filter input udp dport 8472 drop";
    machines.run("host-2", input);
    page.up_to("One certain host only").await;
    machines.run("host-2", "nft delete table inet filter");
    machines.run("host-3", "systemctl stop overlayd");
    machines.run("etcd", &format!("etcdctl put {LEASE} '{{\"PublicIP\": \"127.0.0.1\", \"BackendType\": \"vxlan\"}}'"));
    machines.until("host-1", "overlayctl subnets | grep 'left out'").await;
    page.up_to("Small packets pass, large ones hang").await;
    machines.run("etcd", &format!("etcdctl del {LEASE}"));
    machines.run("host-3", "systemctl start overlayd");
    machines.run("net", "ip link set host-2 mtu 1400");
    page.up_to("Not on one host either").await;
    machines.run("net", "ip link set host-2 mtu 1500");
    machines.run("host-1", "ip netns exec web ip link set eth0 down");
}
