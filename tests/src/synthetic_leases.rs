//! Synthetic peers: leases in etcd without a host in the lab, in any number.

use std::net::{Ipv4Addr, Ipv6Addr};

use overlay_agent::model::{Cidr, PerFamily};
use overlayctl::lab::Lab;

use crate::etcd::{etcdctl, lease_key};
use crate::programs::{CommandOutput, require_program};
use crate::{ExpectContext, etcd};

/// Maximum number of operations of one transaction; etcd's limit is 128.
const MAX_OPS_PER_TXN: usize = 100;

/// The networks of a lab with room for 4,000 peers.
pub fn networks() -> PerFamily<Cidr> {
    PerFamily { v4: "10.240.0.0/12".parse().ok(), v6: "fd00:10:240::/48".parse().ok() }
}

/// The key and value of a peer's lease; its subnets have the index `4000 - number` in [`networks`].
pub fn lease(number: u16, dual: bool) -> (String, String) {
    let subnet_index = 4000 - number;
    let [high, low] = number.to_be_bytes();
    let subnet = Ipv4Addr::from_bits(Ipv4Addr::new(10, 240, 0, 0).to_bits() + u32::from(subnet_index) * 256);
    let address = Ipv4Addr::new(10, 99, 128 + high, low);
    let mac = |family: u8| format!("02:aa:00:0{family}:{high:02x}:{low:02x}");
    let node = format!(r#""Node":{{"Name":"peer{number}","Id":"{number:032x}"}}"#);
    let v4 = format!(r#""BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{}"}}"#, mac(4));
    if !dual {
        return (format!("{subnet}-24"), format!(r#"{{"PublicIP":"{address}","PublicIPv6":null,{v4},{node}}}"#));
    }
    let subnet6 = Ipv6Addr::new(0xfd00, 0x10, 0x240, subnet_index, 0, 0, 0, 0);
    let address6 = Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0x100, number);
    let v6 = format!(r#""BackendV6Data":{{"VNI":1,"VtepMAC":"{}"}}"#, mac(6));
    (format!("{subnet}-24&{}-64", subnet6), format!(r#"{{"PublicIP":"{address}","PublicIPv6":"{address6}",{v4},{v6},{node}}}"#))
}

/// The given number of leases, without the subnets of the lab's hosts.
pub fn unused_leases(lab: &Lab, count: u16, dual: bool) -> Vec<(String, String)> {
    let used_keys: Vec<String> = etcd::leases(lab).into_iter().map(|entry| entry.key).collect();
    let free = (1..4000).map(|number| lease(number, dual)).filter(|(key, _)| !used_keys.contains(&lease_key(key)));
    free.take(usize::from(count)).collect()
}

/// Writes many keys, in transactions of several keys.
pub fn put_all(lab: &Lab, pairs: &[(String, String)]) {
    require_program("etcdctl", "etcd-client");
    let file = lab.dir().join("transaction");
    for chunk in pairs.chunks(MAX_OPS_PER_TXN) {
        // Comparisons, requests for success, requests for failure; each part ends with an empty line.
        let puts: String = chunk.iter().map(|(key, value)| format!("put {} {value:?}\n", lease_key(key))).collect();
        std::fs::write(&file, format!("\n{puts}\n\n")).expect_ok("a file for the transaction");
        let endpoints = lab.layout().etcd_endpoints().join(",");
        let script = "ETCDCTL_API=3 exec etcdctl --endpoints=\"$1\" txn <\"$2\"";
        let command = ["sh", "-c", script, "sh", &endpoints, &file.to_string_lossy()];
        let output = CommandOutput::from_output(&command, &lab.exec("net", &command).expect_ok("etcdctl")).assert_code(0);
        assert!(output.stdout.starts_with("SUCCESS"), "the transaction: {}", output.stdout);
    }
}

/// Deletes every lease that is not of a lab host.
pub fn delete_all(lab: &Lab) {
    for entry in etcd::leases(lab).iter().filter(|entry| entry.lease == 0) {
        etcdctl(lab, &["del", "--", &entry.key]).assert_code(0);
    }
}
