//! `overlayctl peers`: the peers and their data-path state.

use overlay_agent::model::NetworkName;
use overlay_agent::model::api::PeerEntry;
use serde::Serialize;

use super::networks::{InNetwork, ask_each, merge};
use super::{CommandError, Context, Outcome};
use crate::output::{Style, Table, Tone, View, cell, format_ago, toned};

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Network [default: all]
    #[arg(long, value_name = "NAME")]
    network: Option<NetworkName>,
}

/// Prints the peers.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let answers = ask_each(&context.client, args.network.as_ref(), async |client| Ok(client.peers().await?.peers)).await?;
    context.printer.print(&PeersView { with_network: answers.len() > 1, peers: merge(answers) })?;
    Ok(Outcome::Ok)
}

#[derive(Serialize)]
struct PeersView {
    peers: Vec<InNetwork<PeerEntry>>,
    #[serde(skip)]
    with_network: bool,
}

impl View for PeersView {
    fn text(&self, style: Style, wide: bool) -> String {
        if self.peers.is_empty() {
            return "no peers: this host is alone in the data path".to_owned();
        }
        let mut header = vec!["SUBNET", "HOST", "PUBLIC IP", "DEVICE", "STATE"];
        if wide {
            header.extend(["VTEP MAC", "NEXT HOP", "LAST REPAIR"]);
        }
        if self.with_network {
            header.insert(0, "NETWORK");
        }
        let mut table = Table::new(style, &header);
        for InNetwork { network, item: peer } in &self.peers {
            let tone = if peer.state == "programmed" { Tone::Good } else { Tone::Bad };
            let mut row = vec![
                cell(Some(peer.subnet)),
                cell(peer.host.as_ref()),
                cell(Some(peer.public_ip)),
                cell(Some(&peer.device)),
                toned(tone, &peer.state),
            ];
            if wide {
                let hop = peer.nexthop_id.map_or_else(|| "classic route".to_owned(), |id| format!("id {id}"));
                row.extend([cell(peer.vtep), cell(Some(hop)), cell(peer.last_repair.map(format_ago))]);
            }
            if self.with_network {
                row.insert(0, cell(Some(network)));
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
    fn failed_peer_is_shown() {
        let answer: overlay_agent::model::api::Peers = serde_json::from_str(
            r#"{"peers":[{"subnet":"10.244.2.0/24","host":"h2","public_ip":"10.99.1.2","vtep":"02:00:00:00:00:02","device":"ovx.1",
                "nexthop_id":7,"state":"programmed","last_repair":null},
               {"subnet":"fd00::/64","host":null,"public_ip":"fd99::2","vtep":"02:00:00:00:00:03","device":"ovx6.1",
                "nexthop_id":null,"state":"route missing","last_repair":null}]}"#,
        )
        .expect("peers");
        let view = |network: &str, with_network| {
            let network = network.parse().expect("a network name");
            PeersView { peers: merge(vec![(network, answer.peers.clone())]), with_network }
        };
        let wide = view("default", false);
        assert_eq!(serde_json::to_value(&wide).expect("JSON"), serde_json::to_value(&answer).expect("JSON"));
        let several = view("blue", true);
        assert_eq!(serde_json::to_value(&several).expect("JSON")["peers"][1]["network"], "blue");
        assert!(
            several.text(Style::PLAIN, false).lines().all(|line| line.starts_with("NETWORK  ") || line.starts_with("blue     "))
        );
        assert_eq!(
            wide.text(Style::PLAIN, true),
            "SUBNET         HOST  PUBLIC IP  DEVICE  STATE          VTEP MAC           NEXT HOP       LAST REPAIR\n\
             10.244.2.0/24  h2    10.99.1.2  ovx.1   programmed     02:00:00:00:00:02  id 7           -\n\
             fd00::/64      -     fd99::2    ovx6.1  route missing  02:00:00:00:00:03  classic route  -"
        );
    }
}
