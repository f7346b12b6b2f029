//! `overlayctl inspect`: the network of this host, or one endpoint, with the kernel's state.

use overlay_agent::model::NetworkName;
use overlay_agent::model::api::{Counters, DeviceView, EndpointView, NetworkView, PortView};
use overlay_agent::model::endpoint::EndpointName;
use serde::Serialize;

use super::{CommandError, Context, Outcome};
use crate::output::{Style, Table, Tone, View, cell, format_ago, joined};

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Endpoint to show; the whole network by default
    name: Option<EndpointName>,
    /// Network [default: default]
    #[arg(long, value_name = "NAME")]
    network: Option<NetworkName>,
    /// Show the bridge and its ports as a tree, like `brctl show`
    #[arg(long, conflicts_with = "name")]
    tree: bool,
}

/// Prints the network or the endpoint. JSON and YAML always contain all fields.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let network = context.client.of_network(args.network.as_ref()).network().await?;
    match &args.name {
        Some(name) => {
            let missing = || {
                let place = args.network.as_ref().map_or(String::new(), |network| format!(" of network {network}"));
                let message = format!("no endpoint {name}{place} on this host: `overlayctl endpoints` lists them");
                CommandError::Missing { message }
            };
            let endpoint = network.endpoints.iter().find(|view| view.endpoint.name == *name).ok_or_else(missing)?;
            context.printer.print(&EndpointDetailView(endpoint))?;
        }
        None if args.tree => context.printer.print(&TreeView(&network))?,
        None => context.printer.print(&NetworkSummaryView(&network))?,
    }
    Ok(Outcome::Ok)
}

/// Aligns names in one column and values in the next.
fn key_value_lines(style: Style, pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 2;
    let line = |(name, value): &(&str, String)| format!("{}{value}", style.paint(Tone::Quiet, &format!("{name:width$}")));
    pairs.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn up(up: bool) -> &'static str {
    if up { "up" } else { "down" }
}

fn device(device: &DeviceView) -> String {
    let mac = device.mac.map(|mac| mac.to_string()).unwrap_or_default();
    format!("{}  {mac}  MTU {}  {}  {}", device.interface, device.mtu, up(device.up), joined(&device.addresses))
}

fn traffic(counters: &Counters) -> String {
    let Counters { rx_bytes, rx_packets, rx_dropped, tx_bytes, tx_packets, tx_dropped } = counters;
    format!(
        "in {rx_bytes} bytes, {rx_packets} packets, {rx_dropped} dropped; out {tx_bytes} bytes, {tx_packets} packets, {tx_dropped} dropped"
    )
}

#[derive(Serialize)]
#[serde(transparent)]
struct NetworkSummaryView<'a>(&'a NetworkView);

impl View for NetworkSummaryView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        let network = self.0;
        let vni = network.vni.map(|vni| format!(", VNI {vni}"));
        let port = network.port.map(|port| format!(", UDP port {port}"));
        let driver = [Some(network.driver.clone()), vni, port].into_iter().flatten().collect();
        let mut pairs = vec![
            ("network", network.name.clone()),
            ("driver", driver),
            ("MTU", network.mtu.map_or("-".to_owned(), |mtu| mtu.to_string())),
            ("masquerade", if network.masquerade { "yes" } else { "no" }.to_owned()),
        ];
        for (_, ipam) in network.ipam.iter() {
            pairs.push(("addresses", format!("{} of {}, gateway {}", ipam.subnet, ipam.network, ipam.gateway)));
            pairs.push(("", format!("{} to {}: {} in use, {} free", ipam.first, ipam.last, ipam.in_use, ipam.free)));
        }
        pairs.extend(network.devices.iter().map(|d| ("tunnel", device(d))));
        pairs.extend(network.bridge.iter().map(|bridge| ("bridge", device(&bridge.device))));
        let mut text = key_value_lines(style, &pairs);
        if network.endpoints.is_empty() {
            return text + "\n\nno endpoints";
        }
        let mut header = vec!["NAME", "MODE", "ADDRESS", "MAC", "INTERFACE", "HOST INTERFACE", "PORT", "PUBLISHED", "STATE"];
        if wide {
            header.extend(["IN", "OUT", "NAMESPACE"]);
        }
        let mut table = Table::new(style, &header);
        for view in &network.endpoints {
            let (endpoint, port) = (&view.endpoint, view.endpoint.port.as_ref());
            let mut row = vec![
                cell(Some(&endpoint.name)),
                cell(Some(&endpoint.mode)),
                cell(Some(joined(endpoint.addresses().iter().map(|(_, a)| a)))),
                cell(port.map(|p| p.mac)),
                cell(port.map(|p| &p.interface)),
                cell(port.map(|p| &p.host_interface)),
                cell(view.bridge_port),
                cell(Some(joined(&endpoint.published))),
                cell(Some(&view.state)),
            ];
            if wide {
                row.push(cell(view.counters.map(|c| c.rx_bytes)));
                row.push(cell(view.counters.map(|c| c.tx_bytes)));
                row.push(cell(Some(endpoint.netns.display())));
            }
            table.row(row);
        }
        text.push_str("\n\n");
        text + &table.text()
    }
}

#[derive(Serialize)]
#[serde(transparent)]
struct EndpointDetailView<'a>(&'a EndpointView);

impl View for EndpointDetailView<'_> {
    fn text(&self, style: Style, _wide: bool) -> String {
        let EndpointView { endpoint, state, bridge_port, shared_by, counters } = self.0;
        let mut pairs = vec![
            ("name", endpoint.name.to_string()),
            ("mode", endpoint.mode.to_string()),
            ("state", state.clone()),
            ("namespace", endpoint.netns.display().to_string()),
            ("attached", format_ago(endpoint.attached_at)),
        ];
        if let Some(port) = &endpoint.port {
            let number = bridge_port.map_or("not a bridge port".to_owned(), |number| format!("port {number} of the bridge"));
            pairs.push(("interface", format!("{}, MAC {}", port.interface, port.mac)));
            pairs.push(("on the host", format!("{}, {number}", port.host_interface)));
            pairs.push(("addresses", joined(port.addresses.iter().map(|(_, a)| a))));
            pairs.push(("published", joined(&endpoint.published)));
            let on = |on: bool| if on { "on" } else { "off" }.to_owned();
            pairs.push(("source check", on(endpoint.source_check)));
            pairs.push(("default route", on(endpoint.default_route)));
        }
        if let Some(counters) = counters {
            pairs.push(("traffic", traffic(counters)));
        }
        if !shared_by.is_empty() {
            pairs.push(("shared by", joined(shared_by)));
        }
        pairs.extend(endpoint.owner.iter().map(|owner| ("owner", owner.clone())));
        key_value_lines(style, &pairs)
    }
}

#[derive(Serialize)]
#[serde(transparent)]
struct TreeView<'a>(&'a NetworkView);

impl View for TreeView<'_> {
    fn text(&self, style: Style, _wide: bool) -> String {
        let network = self.0;
        let vni = network.vni.map_or_else(String::new, |vni| format!(" {vni}"));
        let mut text = vec![format!("{}  {}{vni}", network.name, network.driver)];
        let last = network.devices.len() + usize::from(network.bridge.is_some());
        let branch = |n: usize, of: usize| if n + 1 == of { "└─ " } else { "├─ " };
        for (n, found) in network.devices.iter().enumerate() {
            text.push(format!("{}{}", branch(n, last), device(found)));
        }
        let Some(bridge) = &network.bridge else { return text.join("\n") };
        text.push(format!("{}{}", branch(0, 1), device(&bridge.device)));
        for (n, port) in bridge.ports.iter().enumerate() {
            text.push(format!("   {}{}", branch(n, bridge.ports.len()), self.port(port, style)));
        }
        text.join("\n")
    }
}

impl TreeView<'_> {
    fn port(&self, port: &PortView, style: Style) -> String {
        let views = self.0.endpoints.iter();
        let owner = views.map(|v| &v.endpoint).find(|e| Some(&e.name) == port.endpoint.as_ref());
        let endpoint_text = match owner.and_then(|e| Some((e, e.port.as_ref()?))) {
            Some((endpoint, inner)) => {
                format!("{} of {}  {}", inner.interface, endpoint.name, joined(inner.addresses.iter().map(|(_, a)| a)))
            }
            None => style.paint(Tone::Warning, "no endpoint"),
        };
        format!("{}  {}  {}  {endpoint_text}", port.number, port.interface, port.state)
    }
}
