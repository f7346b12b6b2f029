//! Output of `overlayctl network`.

use overlay_agent::model::api::SubnetEntry;
use overlay_agent::model::network::{ConfigErrors, FieldError};
use overlay_agent::model::{NetworkConfig, NetworkName, NetworkSet};
use overlay_agent::plan::backend;
use serde::Serialize;

use crate::cmd::config::summary;
use crate::output::{Style, Table, Tone, View, cell, joined, toned};

/// A network.
#[derive(Debug, Serialize)]
pub struct NetworkView {
    name: String,
    /// Key of the record, for one network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// `routed` or `isolated`; `None` if the record is invalid.
    kind: Option<&'static str>,
    internal: bool,
    peers: Vec<String>,
    encrypted: bool,
    domain: Option<String>,
    config: Option<NetworkConfig>,
    /// Why it does not work: errors of its record, and contradictions to other networks.
    pub errors: Vec<FieldError>,
    warnings: Vec<FieldError>,
    /// The hosts' leases, for one network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnets: Option<Vec<SubnetEntry>>,
}

impl NetworkView {
    /// The view of one of these networks.
    pub fn new(name: &NetworkName, networks: &NetworkSet) -> NetworkView {
        let (record, errors) = match networks.networks.get(name) {
            Some(Ok(record)) => (Some(record), networks.check(name, record).err()),
            Some(Err(errors)) => (None, Some(errors.clone())),
            None => (None, None),
        };
        NetworkView {
            name: name.to_string(),
            key: None,
            kind: record.map(|record| if record.isolated { "isolated" } else { "routed" }),
            internal: record.is_some_and(|record| record.internal),
            peers: record.map(|record| record.peers.iter().map(ToString::to_string).collect()).unwrap_or_default(),
            encrypted: record.is_some_and(|record| record.encrypted),
            domain: record.and_then(|record| record.domain.clone()),
            config: record.map(|record| record.config.clone()),
            errors: errors.map(|ConfigErrors(errors)| errors).unwrap_or_default(),
            warnings: record.map(|record| record.warnings.clone()).unwrap_or_default(),
            subnets: None,
        }
    }

    /// The kind with what differs from the usual network.
    fn kind_text(&self) -> String {
        let features = [("internal", self.internal), ("encrypted", self.encrypted)];
        let features = features.into_iter().filter(|(_, given)| *given).map(|(feature, _)| feature);
        self.kind.into_iter().chain(features).collect::<Vec<_>>().join(", ")
    }
}

impl View for NetworkView {
    fn text(&self, style: Style, _wide: bool) -> String {
        let mut lines = vec![self.name.clone()];
        let mut line = |name: &str, value: &str| lines.push(format!("  {name:<8} {value}"));
        line("key", self.key.as_deref().unwrap_or("-"));
        if let Some(config) = &self.config {
            line("kind", &self.kind_text());
            for text in summary(config) {
                line("", &text);
            }
            line("peers", &joined(&self.peers));
            line("domain", self.domain.as_deref().unwrap_or("-"));
        }
        let subnets = self.subnets.iter().flatten();
        for (n, entry) in subnets.enumerate() {
            let subnet = entry.subnet.map_or_else(|| entry.key.clone(), |subnet| subnet.to_string());
            let host = entry.host.clone().unwrap_or_else(|| joined(entry.public_ip.iter().map(|(_, address)| address)));
            let state = entry.refused.as_ref().map(|reason| style.paint(Tone::Bad, &format!(" ignored: {reason}")));
            line(if n == 0 { "hosts" } else { "" }, &format!("{subnet} {host}{}", state.unwrap_or_default()));
        }
        lines.extend(self.errors.iter().map(|error| format!("{} {error}", style.paint(Tone::Bad, "error:"))));
        let warning = |w: &FieldError| format!("{} {} {}", style.paint(Tone::Warning, "warning:"), w.field, w.rule);
        lines.extend(self.warnings.iter().map(warning));
        lines.join("\n")
    }
}

/// All networks.
#[derive(Debug, Serialize)]
pub struct ListView {
    /// The networks by name.
    pub networks: Vec<NetworkView>,
}

impl View for ListView {
    fn text(&self, style: Style, _wide: bool) -> String {
        if self.networks.is_empty() {
            return "no networks: create one with `overlayctl network create default --cidr 10.244.0.0/16`".to_owned();
        }
        let mut table = Table::new(style, &["NAME", "KIND", "CIDR", "BACKEND", "PEERS", "STATE"]);
        for network in &self.networks {
            let config = network.config.as_ref();
            table.row(vec![
                cell(Some(&network.name)),
                cell(Some(network.kind_text()).filter(|kind| !kind.is_empty())),
                cell(config.map(|config| joined(config.pools.iter().map(|(_, pool)| pool.network)))),
                cell(config.map(|config| backend::of(config).label())),
                cell(Some(joined(&network.peers))),
                match network.errors.first() {
                    None => cell(Some("ok")),
                    Some(error) => toned(Tone::Bad, format!("invalid: {error}")),
                },
            ]);
        }
        table.text()
    }
}

/// A removed network.
#[derive(Debug, Serialize)]
pub struct RemovedView {
    /// Its name.
    pub name: String,
    /// Each deleted lease: its host and subnet.
    pub deleted_leases: Vec<String>,
}

impl View for RemovedView {
    fn text(&self, _style: Style, _wide: bool) -> String {
        let mut lines = vec![format!("network {} removed", self.name)];
        lines.extend(self.deleted_leases.iter().map(|lease| format!("  lease deleted: {lease}")));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use overlay_agent::model::NetworkRecord;

    use super::*;

    fn networks() -> NetworkSet {
        let record = NetworkRecord::parse;
        let networks = [
            ("default", record(r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/56"}"#)),
            (
                "blue",
                record(r#"{"Network":"10.0.0.0/16","Isolated":true,"Internal":true,"Peers":["green"],"Backend":{"VNI":2}}"#),
            ),
            ("broken", record("{")),
        ];
        let networks = networks.into_iter().map(|(name, record)| (name.parse().expect(name), record)).collect();
        NetworkSet { networks, ..NetworkSet::default() }
    }

    #[test]
    fn list_shows_kind_and_errors() {
        let networks = networks();
        let view = ListView { networks: networks.networks.keys().map(|name| NetworkView::new(name, &networks)).collect() };
        let text = view.text(Style::PLAIN, false);
        let rows: Vec<Vec<&str>> =
            text.lines().map(|line| line.split("  ").filter(|cell| !cell.is_empty()).map(str::trim).collect()).collect();
        assert_eq!(rows[0], ["NAME", "KIND", "CIDR", "BACKEND", "PEERS", "STATE"]);
        assert_eq!(rows[1][..5], ["blue", "isolated, internal", "10.0.0.0/16", "VXLAN VNI 2", "green"]);
        assert!(rows[1][5].starts_with("invalid: Peers: `green` is unknown"), "{text}");
        assert!(rows[2][0] == "broken" && rows[2][5].contains("is not JSON"), "{text}");
        assert_eq!(rows[3], ["default", "routed", "10.244.0.0/16 fd00::/56", "VXLAN VNI 1", "-", "ok"]);
        assert!(ListView { networks: Vec::new() }.text(Style::PLAIN, false).contains("network create default"));
    }

    #[test]
    fn one_network_is_shown_with_its_hosts() {
        let mut view = NetworkView::new(&NetworkName::default(), &networks());
        view.key = Some("/p/config".to_owned());
        view.subnets = Some(Vec::new());
        assert_eq!(
            view.text(Style::PLAIN, false),
            "default\n  key      /p/config\n  kind     routed\n           10.244.0.0/16: 255 subnets of /24, 10.244.1.0 to 10.244.255.0\n           fd00::/56: 255 subnets of /64, fd00:0:0:1:: to fd00:0:0:ff::\n           VXLAN VNI 1, UDP port 8472\n  peers    -\n  domain   -"
        );
        let json = serde_json::to_value(&view).expect("JSON");
        assert_eq!((&json["kind"], &json["subnets"]), (&"routed".into(), &serde_json::json!([])));
    }
}
