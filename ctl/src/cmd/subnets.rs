//! `overlayctl subnets`: every host's subnet, from the agent's socket or, with etcd flags, directly from etcd.

use overlay_agent::model::NetworkName;
use overlay_agent::model::api::SubnetEntry;
use serde::Serialize;

use super::networks::{InNetwork, ask_each, merge};
use super::{CommandError, Context, Outcome};
use crate::etcd::{EtcdArgs, SubnetsWatch};
use crate::output::{Style, Table, Tone, View, cell, format_seconds, joined, toned};

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Network [default: all; with --watch and from etcd the default network]
    #[arg(long, value_name = "NAME")]
    network: Option<NetworkName>,
    /// Print again on each change, until interrupted
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    etcd: EtcdArgs,
}

/// Prints the subnets.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let (printer, network) = (&context.printer, args.network.as_ref());
    let name = network.cloned().unwrap_or_default();
    let etcd = || args.etcd.of_network(&name);
    let of_one = |subnets| SubnetsView::new(vec![(name.clone(), subnets)]);
    match (args.etcd.is_given(), args.watch) {
        (false, false) => {
            let answers = ask_each(&context.client, network, async |client| Ok(client.subnets().await?.subnets)).await?;
            printer.print(&SubnetsView::new(answers))?;
        }
        (true, false) => printer.print(&of_one(etcd()?.subnets().await?.subnets))?,
        (false, true) => {
            let mut stream = context.client.of_network(network).watch_subnets().await?;
            while let Some(subnets) = stream.next().await? {
                printer.print_next(&of_one(subnets.subnets))?;
            }
        }
        (true, true) => {
            let mut watch = SubnetsWatch::start(&etcd()?).await?;
            loop {
                printer.print_next(&of_one(watch.next().await?.subnets))?;
            }
        }
    }
    Ok(Outcome::Ok)
}

#[derive(Serialize)]
struct SubnetsView {
    subnets: Vec<InNetwork<SubnetEntry>>,
    #[serde(skip)]
    with_network: bool,
}

impl SubnetsView {
    fn new(answers: Vec<(NetworkName, Vec<SubnetEntry>)>) -> SubnetsView {
        SubnetsView { with_network: answers.len() > 1, subnets: merge(answers) }
    }
}

impl View for SubnetsView {
    fn text(&self, style: Style, wide: bool) -> String {
        if self.subnets.is_empty() {
            return "no subnets: no host has a lease yet".to_owned();
        }
        let mut header = vec!["SUBNET", "HOST", "PUBLIC IP", "BACKEND", "EXPIRES", "STATE"];
        if wide {
            header.extend(["VNI", "VTEP MAC", "NODE ID"]);
        }
        if self.with_network {
            header.insert(0, "NETWORK");
        }
        let mut table = Table::new(style, &header);
        for InNetwork { network, item: entry } in &self.subnets {
            let subnet = entry.subnet.map_or_else(|| entry.key.clone(), |s| s.to_string());
            let mut row = vec![
                cell(Some(subnet)),
                cell(entry.host.as_ref()),
                cell(Some(joined(entry.public_ip.iter().map(|(_, a)| a)))),
                cell(entry.backend.as_ref()),
                cell(Some(expiry(entry))),
                state(entry),
            ];
            if wide {
                row.extend([
                    cell(entry.vni),
                    cell(Some(joined(entry.vtep.iter().map(|(_, m)| m)))),
                    cell(entry.node_id.as_ref()),
                ]);
            }
            if self.with_network {
                row.insert(0, cell(Some(network)));
            }
            table.row(row);
        }
        table.text()
    }
}

fn expiry(entry: &SubnetEntry) -> String {
    match (entry.reservation, entry.expires_in_seconds) {
        (true, _) => "never".to_owned(),
        (false, None) => "-".to_owned(),
        (false, Some(left)) => format_seconds(u64::try_from(left).unwrap_or(0)),
    }
}

fn state(entry: &SubnetEntry) -> comfy_table::Cell {
    match &entry.refused {
        Some(reason) => toned(Tone::Bad, format!("ignored: {reason}")),
        None if entry.own => toned(Tone::Good, "this host"),
        None => cell(Some("ok")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_reserved_and_rejected_leases_are_distinguished() {
        let answer: overlay_agent::model::api::Subnets = serde_json::from_str(
            r#"{"subnets":[
             {"key":"10.244.1.0-24","subnet":{"v4":"10.244.1.0/24"},"host":"h1","node_id":"aa","public_ip":{"v4":"10.99.1.1"},"backend":"vxlan",
              "vni":1,"vtep":{"v4":"02:00:00:00:00:01"},"expires_in_seconds":86340,"reservation":false,"own":true,"refused":null},
             {"key":"10.244.2.0-24","subnet":{"v4":"10.244.2.0/24"},"host":null,"node_id":null,"public_ip":{"v4":"10.99.1.2"},"backend":"vxlan",
              "vni":1,"vtep":{"v4":"02:00:00:00:00:02"},"expires_in_seconds":null,"reservation":true,"own":false,"refused":null},
             {"key":"junk","subnet":null,"host":null,"node_id":null,"public_ip":{},"backend":null,
              "vni":null,"vtep":{},"expires_in_seconds":null,"reservation":false,"own":false,"refused":"its key is no subnet"}]}"#,
        )
        .expect("subnets");
        let view = SubnetsView::new(vec![(NetworkName::default(), answer.subnets.clone())]);
        assert_eq!(serde_json::to_value(&view).expect("JSON"), serde_json::to_value(&answer).expect("JSON"));
        let blue = ("blue".parse().expect("a network name"), answer.subnets.clone());
        let both = SubnetsView::new(vec![(NetworkName::default(), Vec::new()), blue]).text(Style::PLAIN, false);
        assert!(both.starts_with("NETWORK  SUBNET") && both.contains("\nblue     10.244.1.0/24  h1"), "{both}");
        assert_eq!(
            view.text(Style::PLAIN, false),
            "SUBNET         HOST  PUBLIC IP  BACKEND  EXPIRES  STATE\n\
             10.244.1.0/24  h1    10.99.1.1  vxlan    23h59m   this host\n\
             10.244.2.0/24  -     10.99.1.2  vxlan    never    ok\n\
             junk           -     -          -        -        ignored: its key is no subnet"
        );
    }
}
