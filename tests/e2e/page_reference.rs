//! The commands of the pages that describe one thing each, on hosts as the pages have them.

use overlay_tests::machines::Machines;
use overlay_tests::page::top;
use overlay_tests::pages::Page;
use overlay_tests::programs::needs;

#[tokio::test(flavor = "multi_thread")]
async fn a_first_deployment_by_hand() {
    let machines = Machines::boot(&["host-1", "host-2", "etcd"]).await;
    machines.etcd("etcd");
    machines.remember("host-1", "10.244.7.0/24");
    machines.remember("host-2", "10.244.9.0/24");
    let mut page = Page::open("README.md", &machines);
    page.step().await;
    page.step().await;
    machines.run("host-2", "overlayctl status --wait 30s; overlayctl attach db --ip 10.244.9.5");
    page.to_the_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_and_looking() {
    needs("curl", "curl");
    needs("busybox", "busybox-static");
    let machines = Machines::with_overlay(&[]).await;
    machines.run("host-2", "overlayctl attach db --ip 10.244.9.5; overlayctl attach site --ip 10.244.9.2; mkdir /root/www; echo hello >/root/www/index.html");
    machines.run("host-2", "ip netns exec site busybox httpd -p 80 -h /root/www");
    Page::open("docs/containers.md", &machines).to_the_end().await;
    machines.until("host-3", "curl -s http://192.0.2.1:8080/ | grep .").await;
    Page::open("docs/api.md", &machines).to_the_end().await;

    machines.run("host-1", "overlayctl attach web --ip 10.244.7.2; overlayctl attach api --ip 10.244.7.3 --publish 9090:80");
    Page::open("docs/check.md", &machines).to_the_end().await;
    Page::open("docs/trace.md", &machines).to_the_end().await;
    Page::open("docs/support.md", &machines).to_the_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mesh() {
    let machines = Machines::with_overlay(&[]).await;
    for host in ["host-1", "host-2", "host-3"] {
        let listen = "echo 'metrics-listen = \"0.0.0.0:9780\"' >>/etc/overlayd/overlayd.toml; echo 'mesh-interval = \"1s\"' >>/etc/overlayd/overlayd.toml";
        machines.run(host, &format!("{listen}; systemctl restart overlayd"));
    }
    let input = "nft add table inet filter; nft add chain inet filter input '{ type filter hook input priority 0; }'; \
                 nft add rule inet filter input udp dport 8472 ip saddr 192.0.2.1 drop";
    machines.run("host-2", input);
    let mut page = Page::open("docs/mesh.md", &machines);
    page.step().await;
    machines.run("host-2", "nft delete table inet filter");
    for host in ["host-1", "host-2"] {
        machines.until(host, "overlayctl mesh").await;
    }
    page.to_the_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn labs_and_pictures() {
    let machines = Machines::boot(&["host-3"]).await;
    Page::open("docs/lab.md", &machines).to_the_end().await;
    machines.run("host-3", "overlayctl lab up");
    Page::open("docs/graph.md", &machines).to_the_end().await;
    machines.run("host-3", "overlayctl lab down");
}

#[tokio::test(flavor = "multi_thread")]
async fn options_for_docker() {
    let machines = Machines::with_overlay(&[]).await;
    machines.run("host-2", "echo 'docker = true' >>/etc/overlayd/overlayd.toml");
    let drop_in = std::fs::read_to_string(top().join("deploy/docker/60-overlay.conf")).expect("the drop-in");
    // Where the programs are on these machines, in place of the packages' directory.
    machines.write("host-2", "/root/deploy/docker/60-overlay.conf", &drop_in.replace("/usr/bin/", ""));
    Page::open("docs/docker.md", &machines).to_the_end().await;
    let options = machines.run("host-2", "cat /etc/docker/daemon.json");
    assert!(options.contains("10.244.9.128/25") && options.contains("ovb.1"), "{options}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_with_roles() {
    needs("openssl", "openssl");
    let members = ["etcd-1", "etcd-2", "etcd-3"];
    let machines = Machines::boot(&["etcd", "etcd-1", "etcd-2", "etcd-3"]).await;
    for machine in members.iter().chain(["etcd"].iter()) {
        for file in ["certs.sh", "member.sh", "access.sh", "overlay-etcd.service"] {
            let text = std::fs::read_to_string(top().join("deploy/etcd").join(file)).expect(file);
            machines.write(machine, &format!("/root/{file}"), &text);
        }
        machines.run(machine, "chmod +x *.sh; echo '{\"Network\": \"10.244.0.0/16\"}' >network.json");
    }
    let mut page = Page::open("docs/etcd.md", &machines);
    page.step().await;
    for member in members {
        machines.run(member, "mkdir pki");
        for file in ["ca.crt".to_owned(), format!("{member}.crt"), format!("{member}.key")] {
            machines.copy("etcd", member, &format!("/root/pki/{file}"));
        }
    }
    page.step().await;
    let ask = "ETCDCTL_CACERT=pki/ca.crt ETCDCTL_CERT=pki/overlay-agent.crt ETCDCTL_KEY=pki/overlay-agent.key etcdctl --endpoints https://192.0.2.11:2379";
    machines.until("etcd", &format!("{ask} endpoint health")).await;
    page.to_the_end().await;
    machines.run("etcd", &format!("{ask} --user root:$(cat passwords/root) get /coreos.com/network/config | grep 10.244.0.0"));
}
