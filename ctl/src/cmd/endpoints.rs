//! `overlayctl endpoints`: the containers of this host.

use overlay_agent::model::api::Endpoints;
use serde::Serialize;

use super::{CommandError, Context, Outcome};
use crate::output::{Style, Table, View, cell, format_ago, joined};

/// The arguments: none.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Prints the endpoints.
pub async fn run(context: &Context, _args: &Args) -> Result<Outcome, CommandError> {
    let endpoints = context.client.endpoints().await?;
    context.printer.print(&EndpointsView(&endpoints))?;
    Ok(Outcome::Ok)
}

#[derive(Serialize)]
#[serde(transparent)]
struct EndpointsView<'a>(&'a Endpoints);

impl View for EndpointsView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        if self.0.endpoints.is_empty() {
            return "no endpoints on this host; attach one: overlayctl attach NAME".to_owned();
        }
        let mut header = vec!["NAME", "MODE", "ADDRESS", "PUBLISHED", "NAMESPACE", "ATTACHED"];
        if wide {
            header.extend(["INTERFACE", "HOST INTERFACE", "MAC", "SOURCE CHECK", "OWNER"]);
        }
        let mut table = Table::new(style, &header);
        for endpoint in &self.0.endpoints {
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
            table.row(row);
        }
        table.text()
    }
}
