//! The list of settings, and the command line derived from it.

use clap::{Arg, ArgAction, Command};

/// The type of a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettingKind {
    /// One value.
    Text,
    /// Several values: a repeated flag, an array in the file, or comma-separated text in both.
    List,
    /// `true` or `false`; a flag without a value means true.
    Boolean,
}

/// One setting.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The flag without its dashes, and the key in the file. The variable is `OVERLAYD_` and the name in capitals with `_`.
    pub name: &'static str,
    /// The setting's type.
    pub kind: SettingKind,
    /// Placeholder for the value in the help.
    pub value: &'static str,
    /// The default value; empty for none.
    pub default: &'static str,
    /// The help text.
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
    list("etcd-endpoints", "URL", "http://127.0.0.1:2379", "Client URLs of etcd"),
    text("etcd-prefix", "KEY", "/coreos.com/network", "Prefix of all keys in etcd; flannel's by default"),
    text("etcd-cafile", "FILE", "", "CA certificate (PEM) to verify etcd's certificate"),
    text("etcd-certfile", "FILE", "", "Client certificate (PEM)"),
    text("etcd-keyfile", "FILE", "", "Key of the client certificate (PEM)"),
    text("etcd-username", "NAME", "", "etcd user"),
    text("etcd-password-file", "FILE", "", "File with the etcd user's password"),
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
        "External interface by name or address; the first existing one is used [default: that of the default route]",
    ),
    text("iface-regex", "REGEX", "", "External interface by a regular expression for its name or address"),
    text("iface-can-reach", "IP", "", "External interface by the kernel's route to this address"),
    text("public-ip", "IPV4", "", "IPv4 address that peers send to, if not the interface's (behind NAT)"),
    text("public-ipv6", "IPV6", "", "IPv6 address that peers send to, if not the interface's"),
    list("networks", "NAME", "", "Named networks that this host joins at the start; all others with its first container there"),
    text("leave-after", "DURATION", "5m", "How long the host stays in a named network without containers there"),
    text(
        "netns-prefix",
        "TEXT",
        "ov-",
        "Start of the names of isolated networks' namespaces, for several agents with one /run/netns",
    ),
    text("node-name", "NAME", "", "Display name of this host [default: the system's host name]"),
    boolean("ip-masq", "true", "Masquerade traffic that leaves the overlay"),
    boolean("docker", "false", "Reserve the upper half of the subnet for Docker's containers on the host's bridge"),
    text("run-dir", "DIR", "/run/overlayd", "Directory of the socket and subnet.env"),
    text("state-dir", "DIR", "/var/lib/overlayd", "Directory of the host's identity, MACs and endpoints"),
    text("subnet-file", "FILE", "", "File with the leased subnet for other tools [default: <run-dir>/subnet.env]"),
    text("cni-conflist", "FILE", "", "CNI network list to write once the overlay is up [default: none]"),
    text("metrics-listen", "ADDR:PORT", "", "TCP address for /metrics, /healthz, /readyz and /mesh [default: off]"),
    text("log-level", "FILTER", "info", "error, warn, info, debug, trace, or a filter by module"),
    text(
        "log-format",
        "FORMAT",
        "auto",
        "auto, text, json or journal; auto selects the journal if standard error is connected to it, else text",
    ),
    boolean("vxlan-tx-checksum", "true", "Transmit checksum offload on the VXLAN devices; false for NICs that break it"),
    boolean("nexthop-objects", "true", "Use next-hop objects if the kernel supports them; false forces classic routes"),
    text(
        "resync-interval",
        "DURATION",
        "5m",
        "Interval of full comparisons with the kernel's state, for changes without an event",
    ),
    text(
        "mesh-interval",
        "DURATION",
        "30s",
        "Interval of probes to each peer (ICMP echo over overlay and underlay, at most 50 per second); 0s disables them",
    ),
];

/// The environment variable of a setting.
pub fn env_variable(name: &str) -> String {
    format!("OVERLAYD_{}", name.to_uppercase().replace('-', "_"))
}

/// The settings that name a file with a secret.
pub const SECRET_FILES: [&str; 2] = ["etcd-keyfile", "etcd-password-file"];

/// The default path of the file, used without `--config`; this file may be missing.
pub const DEFAULT_CONFIG_FILE: &str = "/etc/overlayd/overlayd.toml";

/// The subcommand that names an isolated network's namespace for the agent, whose request is on standard input.
pub const SERVE_NETNS_NAME: &str = "serve-netns-name";

/// The command line of `overlayd`.
pub fn command() -> Command {
    let mut command = Command::new("overlayd")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Leases a subnet of the overlay network from etcd and maintains this host's bridge, VXLAN device, routes and NAT")
        .after_help(
            "Every flag is also an environment variable (OVERLAYD_<FLAG>) and a key of the file; a flag overrides the environment, \
             the environment the file.\n\nExit codes: 0 success, 1 error, 2 usage.",
        )
        .arg(
            Arg::new("config")
                .long("config")
                .env("OVERLAYD_CONFIG")
                .value_name("FILE")
                .global(true)
                .help(format!("Configuration file [default: {DEFAULT_CONFIG_FILE}, if it exists]")),
        )
        .subcommand(
            Command::new("cleanup")
                .about("Removes everything the agent created on this host and releases its lease; the agent must not be running")
                .arg(
                    Arg::new("network")
                        .long("network")
                        .value_name("NAME")
                        .action(ArgAction::Append)
                        .help("Leave only this named network; can be repeated"),
                ),
        )
        // For the unit overlayd-netns@.service alone.
        .subcommand(Command::new(SERVE_NETNS_NAME).hide(true));
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
