//! `overlayctl peers`: the peers and their data-path state.

use overlay_agent::model::api::Peers;
use serde::Serialize;

use super::{CommandError, Context, Outcome};
use crate::output::{Style, Table, Tone, View, cell, format_ago, toned};

/// The arguments: none.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Prints the peers.
pub async fn run(context: &Context, _args: &Args) -> Result<Outcome, CommandError> {
    let peers = context.client.peers().await?;
    context.printer.print(&PeersView(&peers))?;
    Ok(Outcome::Ok)
}

#[derive(Serialize)]
#[serde(transparent)]
struct PeersView<'a>(&'a Peers);

impl View for PeersView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        if self.0.peers.is_empty() {
            return "no peers: this host is alone in the data path".to_owned();
        }
        let mut header = vec!["SUBNET", "HOST", "PUBLIC IP", "DEVICE", "STATE"];
        if wide {
            header.extend(["VTEP MAC", "NEXT HOP", "LAST REPAIR"]);
        }
        let mut table = Table::new(style, &header);
        for peer in &self.0.peers {
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
        let peers: Peers = serde_json::from_str(
            r#"{"peers":[{"subnet":"10.244.2.0/24","host":"h2","public_ip":"10.99.1.2","vtep":"02:00:00:00:00:02","device":"ovx.1",
                "nexthop_id":7,"state":"programmed","last_repair":null},
               {"subnet":"fd00::/64","host":null,"public_ip":"fd99::2","vtep":"02:00:00:00:00:03","device":"ovx6.1",
                "nexthop_id":null,"state":"route missing","last_repair":null}]}"#,
        )
        .expect("peers");
        assert_eq!(
            PeersView(&peers).text(Style::PLAIN, true),
            "SUBNET         HOST  PUBLIC IP  DEVICE  STATE          VTEP MAC           NEXT HOP       LAST REPAIR\n\
             10.244.2.0/24  h2    10.99.1.2  ovx.1   programmed     02:00:00:00:00:02  id 7           -\n\
             fd00::/64      -     fd99::2    ovx6.1  route missing  02:00:00:00:00:03  classic route  -"
        );
    }
}
