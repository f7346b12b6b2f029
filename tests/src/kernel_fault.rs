//! Manual changes of a host's kernel state: each deletes or changes one kind of entry.

use crate::{ExpectContext, TestLab, kernel};

/// A named change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelFault {
    /// The name of the change.
    pub name: &'static str,
    script: &'static str,
}

const fn kernel_fault(name: &'static str, script: &'static str) -> KernelFault {
    KernelFault { name, script }
}

/// All changes.
pub const ALL: [KernelFault; 26] = [
    kernel_fault(
        "routes deleted",
        "for f in -4 -6; do ip $f route show proto 86 type unicast | while read dst _; do ip $f route delete $dst proto 86; done; done",
    ),
    kernel_fault(
        "unreachable routes deleted",
        "for f in -4 -6; do ip $f route show proto 86 type unreachable | while read _ dst _; do ip $f route delete unreachable $dst proto 86; done; done",
    ),
    kernel_fault(
        "unreachable routes to elsewhere",
        "for f in -4 -6; do ip $f route show proto 86 type unreachable | while read _ dst _; do ip $f route replace blackhole $dst metric 4294967295; done; done",
    ),
    kernel_fault("loopback device down and up, which takes IPv6's unreachable routes", "ip link set lo down; ip link set lo up"),
    kernel_fault("next hops deleted", "ip nexthop flush proto 86"),
    kernel_fault("neighbours deleted", "neighbours -4 ovx.1; neighbours -6 ovx6.1"),
    kernel_fault(
        "forwarding entries deleted",
        "for d in ovx.1 ovx6.1; do bridge fdb show dev $d | while read mac _ dst _; do bridge fdb del $mac dev $d dst $dst; done; done",
    ),
    kernel_fault("addresses of the tunnel deleted", "addresses -4 ovx.1; addresses -6 ovx6.1"),
    kernel_fault("addresses of the bridge deleted", "addresses -4 ovb.1; addresses -6 ovb.1"),
    kernel_fault("table deleted", "nft delete table inet overlayd"),
    kernel_fault("all rules deleted", "nft flush ruleset"),
    kernel_fault("a rule added in front", "nft insert rule inet overlayd incoming drop"),
    kernel_fault("forwarding off", "echo 0 >/proc/sys/net/ipv4/ip_forward"),
    kernel_fault("IPv6 forwarding off", "echo 0 >/proc/sys/net/ipv6/conf/all/forwarding"),
    kernel_fault("tunnel down", "ip link set ovx.1 down; ip link set ovx6.1 down"),
    kernel_fault("tunnel deleted", "ip link delete ovx.1; ip link delete ovx6.1"),
    kernel_fault("tunnel with another MAC", "ip link set ovx.1 address 02:11:22:33:44:55"),
    kernel_fault("tunnel with another MTU", "ip link set ovx.1 mtu 1300; ip link set ovb.1 mtu 1300"),
    kernel_fault("tunnel from another address", "ip link set ovx.1 type vxlan id 1 dev eth0 local 10.99.77.77"),
    kernel_fault("bridge down", "ip link set ovb.1 down"),
    kernel_fault("bridge deleted", "ip link delete ovb.1"),
    kernel_fault(
        "ports taken off the bridge",
        "for p in $(ip -o link show master ovb.1 | sed -n 's/^[0-9]*: \\([^@:]*\\).*/\\1/p'); do ip link set $p nomaster; done",
    ),
    kernel_fault(
        "ports down",
        "for p in $(ip -o link show type veth | sed -n 's/^[0-9]*: \\(ove[^@:]*\\).*/\\1/p'); do ip link set $p down; done",
    ),
    kernel_fault(
        "a neighbour with another MAC",
        "n=$(ip neigh show dev ovx.1 | head -1 | cut -d' ' -f1); ip neigh replace $n lladdr 02:99:99:99:99:99 dev ovx.1 nud permanent",
    ),
    kernel_fault(
        "a forwarding entry to elsewhere",
        "m=$(bridge fdb show dev ovx.1 | head -1 | cut -d' ' -f1); bridge fdb replace $m dev ovx.1 dst 10.99.77.77",
    ),
    kernel_fault(
        "a route to elsewhere",
        "r=$(ip route show proto 86 type unicast | head -1 | cut -d' ' -f1); ip route replace $r via 10.99.0.254",
    ),
];

/// Deletes entries one by one. (`flush` verifies its result and gives up after ten rounds, because the agent is faster.)
const SHELL_FUNCTIONS: &str = "addresses() {
    ip -o $1 address show dev $2 scope global | while read _ _ _ address _; do ip address delete $address dev $2; done
}
neighbours() {
    ip $1 neigh show dev $2 nud permanent | while read address _; do ip neigh delete $address dev $2; done
}
";

impl KernelFault {
    /// Applies the change to a host.
    pub fn inject(&self, lab: &TestLab, host: &str) {
        shell(lab, host, self.script);
    }

    /// Applies the change and accepts any exit code, for example if the entry does not exist.
    pub fn try_inject(&self, lab: &TestLab, host: &str) {
        kernel::attempt(lab, host, &["sh", "-c", &format!("{SHELL_FUNCTIONS}{}", self.script)]);
    }

    /// The same in the namespace of an isolated network, whose devices are named after its VNI.
    pub fn try_inject_in(&self, lab: &TestLab, target: &str, vni: u64) {
        let own = |device: &str| (format!("{device}.1"), format!("{device}.{vni}"));
        let script = ["ovx", "ovx6", "ovb"]
            .map(own)
            .iter()
            .fold(self.script.to_owned(), |script, (of_default, of_network)| script.replace(of_default.as_str(), of_network));
        kernel::attempt(lab, target, &["sh", "-c", &format!("{SHELL_FUNCTIONS}{script}")]);
    }

    /// The shell script, for [`shell`].
    pub fn script(&self) -> &'static str {
        self.script
    }
}

/// The change of that name.
#[track_caller]
pub fn by_name(name: &str) -> KernelFault {
    ALL.into_iter().find(|fault| fault.name == name).expect_ok(name)
}

/// Runs a shell script on a host, with the functions of the changes.
pub fn shell(lab: &TestLab, host: &str, script: &str) {
    kernel::shell(lab, host, &format!("{SHELL_FUNCTIONS}{script}"));
}
