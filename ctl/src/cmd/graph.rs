//! `overlayctl graph`: a drawing of the overlay.

use std::path::PathBuf;

use clap::ValueEnum;
use overlay_agent::model::NetworkName;
use serde::Serialize;

use super::{CommandError, Context, Outcome};
use crate::client::{Client, ClientError};
use crate::graph::{AgentSnapshot, Graph, dot, svg, text};
use crate::output::{Style, View};

/// Format of the drawing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Drawing {
    /// Text
    #[default]
    Text,
    /// SVG, for a browser or a page
    Svg,
    /// DOT, for Graphviz
    Dot,
}

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "An agent knows every host and its own containers. `-o json` prints the graph's data.")]
pub struct Args {
    /// Network [default: default]
    #[arg(long, value_name = "NAME")]
    network: Option<NetworkName>,
    /// Format of the drawing
    #[arg(long, value_enum, default_value_t = Drawing::Text)]
    format: Drawing,
    /// Socket of another agent on this machine (as in a lab) whose containers are drawn too
    #[arg(long, value_name = "SOCKET")]
    also: Vec<PathBuf>,
}

/// Fetches the snapshots and draws the graph.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let mut all = vec![fetch_snapshot(&context.client.of_network(args.network.as_ref())).await?];
    for socket in &args.also {
        all.push(fetch_snapshot(&Client::new(socket).of_network(args.network.as_ref())).await?);
    }
    let graph = Graph::from_snapshots(&all);
    context.printer.print(&GraphView { graph: &graph, drawing: args.format })?;
    Ok(Outcome::Ok)
}

async fn fetch_snapshot(client: &Client) -> Result<AgentSnapshot, ClientError> {
    Ok(AgentSnapshot {
        status: client.status().await?,
        subnets: client.subnets().await?,
        peers: client.peers().await?,
        endpoints: client.endpoints().await?,
    })
}

#[derive(Serialize)]
struct GraphView<'a> {
    #[serde(flatten)]
    graph: &'a Graph,
    #[serde(skip)]
    drawing: Drawing,
}

impl View for GraphView<'_> {
    fn text(&self, _style: Style, _wide: bool) -> String {
        let rendered = match self.drawing {
            Drawing::Text => text(self.graph),
            Drawing::Svg => svg(self.graph),
            Drawing::Dot => dot(self.graph),
        };
        rendered.trim_end().to_owned()
    }
}
