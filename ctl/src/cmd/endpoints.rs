//! `overlayctl endpoints`: the containers of this host.

use overlay_agent::model::NetworkName;
use overlay_agent::model::api::Endpoints;
use serde::Serialize;

use super::networks::ask_each;
use super::{CommandError, Context, Outcome};
use crate::output::{Style, Table, View, cell, format_ago, joined};

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Network [default: all]
    #[arg(long, value_name = "NAME")]
    network: Option<NetworkName>,
}

/// Prints the endpoints.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let answers = ask_each(&context.client, args.network.as_ref(), async |client| client.endpoints().await).await?;
    let with_network = answers.len() > 1;
    let endpoints = Endpoints { endpoints: answers.into_iter().flat_map(|(_, answer)| answer.endpoints).collect() };
    context.printer.print(&EndpointsView { endpoints: &endpoints, with_network })?;
    Ok(Outcome::Ok)
}

#[derive(Serialize)]
struct EndpointsView<'a> {
    #[serde(flatten)]
    endpoints: &'a Endpoints,
    #[serde(skip)]
    with_network: bool,
}

impl View for EndpointsView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        if self.endpoints.endpoints.is_empty() {
            return "no endpoints on this host; attach one: overlayctl attach NAME".to_owned();
        }
        let mut header = vec!["NAME", "MODE", "ADDRESS", "PUBLISHED", "NAMESPACE", "ATTACHED"];
        if wide {
            header.extend(["INTERFACE", "HOST INTERFACE", "MAC", "SOURCE CHECK", "OWNER"]);
        }
        if self.with_network {
            header.insert(1, "NETWORK");
        }
        let mut table = Table::new(style, &header);
        for endpoint in &self.endpoints.endpoints {
            let mut row = vec![
                cell(Some(&endpoint.name)),
                cell(Some(&endpoint.mode)),
                cell(Some(joined(endpoint.addresses().iter().map(|(_, a)| a)))),
                cell(Some(joined(&endpoint.published))),
                cell(Some(endpoint.netns.display())),
                cell(Some(format_ago(endpoint.attached_at))),
            ];
            if wide {
                let port = endpoint.port.as_ref();
                row.extend([cell(port.map(|p| &p.interface)), cell(port.map(|p| &p.host_interface)), cell(port.map(|p| p.mac))]);
                let check = port.map(|_| if endpoint.source_check { "on" } else { "off" });
                row.extend([cell(check), cell(endpoint.owner.as_ref())]);
            }
            if self.with_network {
                row.insert(1, cell(Some(&endpoint.network)));
            }
            table.row(row);
        }
        table.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_is_shown_if_there_are_several() {
        let endpoints: Endpoints = serde_json::from_str(
            r#"{"endpoints":[{"name":"web","mode":"none","netns":"/run/netns/web","attached_at":0},
                {"name":"web","network":"blue","mode":"none","netns":"/run/netns/web","attached_at":0}]}"#,
        )
        .expect("endpoints");
        let rows = |with_network| {
            let text = EndpointsView { endpoints: &endpoints, with_network }.text(Style::PLAIN, false);
            text.lines().map(|line| line.split("  ").take(2).map(str::trim).collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
        };
        assert_eq!(rows(true), ["NAME NETWORK", "web default", "web blue"]);
        assert_eq!(rows(false), ["NAME MODE", "web none", "web none"]);
        let json = serde_json::to_value(EndpointsView { endpoints: &endpoints, with_network: true }).expect("JSON");
        assert_eq!((json["endpoints"][0].get("network"), &json["endpoints"][1]["network"]), (None, &"blue".into()));
    }
}
