//! Runs the commands of the reference pages, on their hosts.

use overlay_tests::doc_hosts::DocHosts;
use overlay_tests::doc_page::repo_root;
use overlay_tests::doc_pages::DocPage;
use overlay_tests::programs::require_program;

#[tokio::test(flavor = "multi_thread")]
async fn readme_page_runs() {
    let machines = DocHosts::boot(&["host-1", "host-2", "etcd"]).await;
    machines.start_etcd("etcd");
    machines.write_saved_subnet("host-1", "10.244.7.0/24");
    machines.write_saved_subnet("host-2", "10.244.9.0/24");
    let mut page = DocPage::open("README.md", &machines);
    page.run_block().await;
    page.run_block().await;
    machines.run("host-2", "overlayctl status --wait 30s; overlayctl attach db --ip 10.244.9.5");
    page.run_to_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn container_and_inspection_pages_run() {
    require_program("curl", "curl");
    require_program("busybox", "busybox-static");
    let machines = DocHosts::with_overlay(&[]).await;
    machines.run("host-2", "overlayctl attach db --ip 10.244.9.5; overlayctl attach site --ip 10.244.9.2; mkdir /root/www; echo hello >/root/www/index.html");
    machines.run("host-2", "ip netns exec site busybox httpd -p 80 -h /root/www");
    DocPage::open("docs/containers.md", &machines).run_to_end().await;
    machines.wait_for("host-3", "curl -s http://192.0.2.1:8080/ | grep .").await;
    DocPage::open("docs/api.md", &machines).run_to_end().await;

    machines.run("host-1", "overlayctl attach web --ip 10.244.7.2; overlayctl attach api --ip 10.244.7.3 --publish 9090:80");
    DocPage::open("docs/check.md", &machines).run_to_end().await;
    DocPage::open("docs/trace.md", &machines).run_to_end().await;
    DocPage::open("docs/support.md", &machines).run_to_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mesh_page_runs() {
    let machines = DocHosts::with_overlay(&[]).await;
    for host in ["host-1", "host-2", "host-3"] {
        let listen = "echo 'metrics-listen = \"0.0.0.0:9780\"' >>/etc/overlayd/overlayd.toml; echo 'mesh-interval = \"1s\"' >>/etc/overlayd/overlayd.toml";
        machines.run(host, &format!("{listen}; systemctl restart overlayd"));
    }
    let input = "nft add table inet filter; nft add chain inet filter input '{ type filter hook input priority 0; }'; \
                 nft add rule inet filter input udp dport 8472 ip saddr 192.0.2.1 drop";
    machines.run("host-2", input);
    let mut page = DocPage::open("docs/mesh.md", &machines);
    page.run_block().await;
    machines.run("host-2", "nft delete table inet filter");
    for host in ["host-1", "host-2"] {
        machines.wait_for(host, "overlayctl mesh").await;
    }
    page.run_to_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lab_and_graph_pages_run() {
    let machines = DocHosts::boot(&["host-3"]).await;
    DocPage::open("docs/lab.md", &machines).run_to_end().await;
    machines.run("host-3", "overlayctl lab up");
    DocPage::open("docs/graph.md", &machines).run_to_end().await;
    machines.run("host-3", "overlayctl lab down");
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_page_runs() {
    let machines = DocHosts::with_overlay(&[]).await;
    machines.run("host-2", "echo 'docker = true' >>/etc/overlayd/overlayd.toml");
    let drop_in = std::fs::read_to_string(repo_root().join("deploy/docker/60-overlay.conf")).expect("the drop-in");
    // Replace the packages' program directory by that of these hosts.
    machines.write("host-2", "/root/deploy/docker/60-overlay.conf", &drop_in.replace("/usr/bin/", ""));
    DocPage::open("docs/docker.md", &machines).run_to_end().await;
    let options = machines.run("host-2", "cat /etc/docker/daemon.json");
    assert!(options.contains("10.244.9.128/25") && options.contains("ovb.1"), "{options}");
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_page_runs() {
    require_program("openssl", "openssl");
    let members = ["etcd-1", "etcd-2", "etcd-3"];
    let machines = DocHosts::boot(&["etcd", "etcd-1", "etcd-2", "etcd-3"]).await;
    for machine in members.iter().chain(["etcd"].iter()) {
        for file in ["certs.sh", "member.sh", "access.sh", "overlay-etcd.service"] {
            let text = std::fs::read_to_string(repo_root().join("deploy/etcd").join(file)).expect(file);
            machines.write(machine, &format!("/root/{file}"), &text);
        }
        machines.run(machine, "chmod +x *.sh; echo '{\"Network\": \"10.244.0.0/16\"}' >network.json");
    }
    let mut page = DocPage::open("docs/etcd.md", &machines);
    page.run_block().await;
    for member in members {
        machines.run(member, "mkdir pki");
        for file in ["ca.crt".to_owned(), format!("{member}.crt"), format!("{member}.key")] {
            machines.copy("etcd", member, &format!("/root/pki/{file}"));
        }
    }
    page.run_block().await;
    let ask = "ETCDCTL_CACERT=pki/ca.crt ETCDCTL_CERT=pki/overlay-agent.crt ETCDCTL_KEY=pki/overlay-agent.key etcdctl --endpoints https://192.0.2.11:2379";
    machines.wait_for("etcd", &format!("{ask} endpoint health")).await;
    page.run_to_end().await;
    machines.run("etcd", &format!("{ask} --user root:$(cat passwords/root) get /coreos.com/network/config | grep 10.244.0.0"));
}
