//! The list of settings, and the command line that follows from it.

use clap::{Arg, ArgAction, Command};

/// How a setting is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettingKind {
    /// One value.
    Text,
    /// Several values: a flag is repeated or its values are separated by commas, the file has an array or such a text.
    List,
    /// `true` or `false`; the flag alone means true.
    Boolean,
}

/// One setting.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The flag without its dashes, and the key in the file; the variable is `OVERLAYD_` and the same in capitals with `_`.
    pub name: &'static str,
    /// How it is written.
    pub kind: SettingKind,
    /// What stands for its value in the help.
    pub value: &'static str,
    /// The value where none is given; empty for none.
    pub default: &'static str,
    /// What it does.
    pub help: &'static str,
}

const fn text(name: &'static str, value: &'static str, default: &'static str, help: &'static str) -> Setting {
    Setting { name, kind: SettingKind::Text, value, default, help }
}

const fn list(name: &'static str, value: &'static str, default: &'static str, help: &'static str) -> Setting {
    Setting { name, kind: SettingKind::List, value, default, help }
}

const fn boolean(name: &'static str, default: &'static str, help: &'static str) -> Setting {
    Setting { name, kind: SettingKind::Boolean, value: "true|false", default, help }
}

/// Every setting, in the order of the reference.
pub const SETTINGS: &[Setting] = &[
    list("etcd-endpoints", "URL", "http://127.0.0.1:2379", "etcd's client URLs"),
    text("etcd-prefix", "KEY", "/coreos.com/network", "Prefix of all keys in etcd; flannel's by default"),
    text("etcd-cafile", "FILE", "", "CA certificate (PEM) that etcd's certificate is checked against"),
    text("etcd-certfile", "FILE", "", "Client certificate (PEM)"),
    text("etcd-keyfile", "FILE", "", "Key of the client certificate (PEM)"),
    text("etcd-username", "NAME", "", "etcd user"),
    text("etcd-password-file", "FILE", "", "File that holds the etcd user's password"),
    text(
        "etcd-discovery-srv",
        "DOMAIN",
        "",
        "Domain whose SRV records (_etcd-client-ssl._tcp, _etcd-client._tcp) name etcd's endpoints",
    ),
    list(
        "iface",
        "NAME|IP",
        "",
        "External interface by name or address; the first one that is there [default: that of the default route]",
    ),
    text("iface-regex", "REGEX", "", "External interface by a regular expression on its name or address"),
    text("iface-can-reach", "IP", "", "External interface by the route to an address"),
    text("public-ip", "IPV4", "", "IPv4 address that peers send to, where it is not the interface's (behind NAT)"),
    text("public-ipv6", "IPV6", "", "IPv6 address that peers send to, where it is not the interface's"),
    text("node-name", "NAME", "", "Name that people see [default: the host's name]"),
    boolean("ip-masq", "true", "Give what leaves the overlay the host's address"),
    boolean("docker", "false", "Leave the upper half of the subnet to Docker's containers on the host's bridge"),
    text("run-dir", "DIR", "/run/overlayd", "Where the socket and subnet.env are"),
    text("state-dir", "DIR", "/var/lib/overlayd", "Where the host's identity, MACs and endpoints are kept"),
    text("subnet-file", "FILE", "", "File with the leased subnet for other tools [default: <run-dir>/subnet.env]"),
    text("cni-conflist", "FILE", "", "CNI network list to write when the overlay is in place [default: none]"),
    text("metrics-listen", "ADDR:PORT", "", "TCP address for /metrics, /healthz, /readyz and /mesh [default: off]"),
    text("log-level", "FILTER", "info", "error, warn, info, debug, trace, or a filter by module"),
    text(
        "log-format",
        "FORMAT",
        "auto",
        "auto, text, json or journal; auto is the journal where standard error goes there, else text",
    ),
    boolean("vxlan-tx-checksum", "true", "Transmit checksum offload on the VXLAN devices; false for NICs that break it"),
    boolean("nexthop-objects", "true", "Use next-hop objects where the kernel has them; false forces classic routes"),
    text(
        "resync-interval",
        "DURATION",
        "5m",
        "Time between two full comparisons with the kernel, the safety net behind its events",
    ),
    text(
        "mesh-interval",
        "DURATION",
        "30s",
        "Time between two probes of a peer (ICMP echo over overlay and underlay, 50 a second at the most); 0s switches them off",
    ),
];

/// The environment variable of a setting.
pub fn env_variable(name: &str) -> String {
    format!("OVERLAYD_{}", name.to_uppercase().replace('-', "_"))
}

/// Settings that name a file with a secret.
pub const SECRET_FILES: [&str; 2] = ["etcd-keyfile", "etcd-password-file"];

/// Where the file is unless `--config` says otherwise; it need not be there then.
pub const DEFAULT_CONFIG_FILE: &str = "/etc/overlayd/overlayd.toml";

/// The command line of `overlayd_command`.
pub fn command() -> Command {
    let mut command = Command::new("overlayd")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Leases a subnet of the overlay network from etcd and keeps this host's bridge, VXLAN device, routes and NAT as they should be")
        .after_help(
            "Every flag is also an environment variable (OVERLAYD_<FLAG>) and a key of the file; a flag wins over the environment, \
             the environment over the file.\n\nExit codes: 0 well, 1 error, 2 usage.",
        )
        .arg(
            Arg::new("config")
                .long("config")
                .env("OVERLAYD_CONFIG")
                .value_name("FILE")
                .global(true)
                .help(format!("Configuration file [default: {DEFAULT_CONFIG_FILE}, where it is there]")),
        )
        .subcommand(
            Command::new("cleanup")
                .about("Removes all that the agent made on this host and gives its lease back; the agent must not be running"),
        );
    for setting in SETTINGS {
        let arg =
            Arg::new(setting.name).long(setting.name).env(env_variable(setting.name)).value_name(setting.value).global(true);
        let help = if setting.default.is_empty() {
            setting.help.to_owned()
        } else {
            format!("{} [default: {}]", setting.help, setting.default)
        };
        let arg = arg.help(help).hide_env(true);
        command = command.arg(match setting.kind {
            SettingKind::Text => arg.action(ArgAction::Set),
            SettingKind::List => arg.action(ArgAction::Append).value_delimiter(','),
            SettingKind::Boolean => arg.action(ArgAction::Set).num_args(0..=1).require_equals(true).default_missing_value("true"),
        });
    }
    command
}
