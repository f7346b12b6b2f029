//! `overlayctl attach`: puts a network namespace on the overlay; without one, makes a named one first.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::ValueEnum;
use overlay_agent::model::api::{AttachRequest, Attached};
use overlay_agent::model::endpoint::EndpointName;
use overlay_agent::model::{Family, PerFamily};
use serde::Serialize;

use super::{CommandError, Context, Outcome};
use crate::netns::{NamedNamespaces, PrefixArg};
use crate::output::{Style, Tone, View};

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "overlayctl attach web && ip netns exec web ip address")]
pub struct Args {
    /// The endpoint's name, unique on this host
    name: EndpointName,
    /// The network namespace to attach; without it a namespace NAME is made, as by `ip netns add`, and removed again by `detach`
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// What the container gets
    #[arg(long, value_enum, default_value_t = Mode::Overlay)]
    mode: Mode,
    /// A wished address of this host's subnet; once per family
    #[arg(long = "ip", value_name = "ADDRESS")]
    ips: Vec<IpAddr>,
    /// The interface to make in the namespace
    #[arg(long, value_name = "NAME", default_value = "eth0")]
    interface: String,
    #[command(flatten)]
    prefix: PrefixArg,
}

/// What a container gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// An interface with addresses of this host's subnet
    Overlay,
}

/// Attaches.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let Mode::Overlay = args.mode;
    let addresses = wished(&args.ips)?;
    let namespaces = NamedNamespaces::of(context.client.socket(), &args.prefix);
    let (netns, made) = match &args.netns {
        // The agent has another working directory.
        Some(path) => (std::path::absolute(path).map_err(|source| CommandError::Read { path: path.clone(), source })?, None),
        None => {
            let known = context.client.endpoints().await?.endpoints.into_iter().find(|e| e.name == args.name);
            let path = namespaces.path(&args.name);
            // One that has gone away in the meantime is made again, and the endpoint plugged into it.
            if known.is_some_and(|e| e.netns == path) && path.exists() {
                (path, None)
            } else {
                (path, Some(namespaces.make(&args.name)?))
            }
        }
    };
    let request =
        AttachRequest { netns: Some(netns), interface: Some(args.interface.clone()), addresses, ..AttachRequest::default() };
    let attached = context.client.attach(&args.name, &request).await?;
    if let Some(made) = made {
        made.keep();
    }
    context.printer.show(&AttachedView(&attached))?;
    Ok(Outcome::Well)
}

/// The wished addresses by family.
fn wished(ips: &[IpAddr]) -> Result<PerFamily<IpAddr>, CommandError> {
    let mut addresses = PerFamily::default();
    for ip in ips {
        let family = Family::of(*ip);
        if let Some(before) = addresses.slot(family).replace(*ip) {
            let message = format!("--ip {before} and --ip {ip}: an endpoint has one {family} address");
            return Err(CommandError::Usage { message });
        }
    }
    Ok(addresses)
}

#[derive(Serialize)]
#[serde(transparent)]
struct AttachedView<'a>(&'a Attached);

impl View for AttachedView<'_> {
    fn text(&self, style: Style, wide: bool) -> String {
        let Attached { endpoint, prefix_length, gateway, mtu } = self.0;
        let addresses: Vec<String> = endpoint
            .addresses()
            .iter()
            .map(|(family, address)| match (prefix_length.get(family), gateway.get(family)) {
                (Some(length), Some(gateway)) => format!("{address}/{length} via {gateway}"),
                _ => address.to_string(),
            })
            .collect();
        let mut lines = vec![format!("{}  {}", endpoint.name, style.paint(Tone::Good, &addresses.join(", ")))];
        if let (Some(port), Some(mtu)) = (&endpoint.port, mtu) {
            lines.push(format!("  {} in {}, MTU {mtu}", port.interface, endpoint.netns.display()));
            if wide {
                lines.push(format!("  {} on the host, MAC {}", port.host_interface, port.mac));
            }
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_a_family() {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        let both = wished(&[ip("10.0.0.2"), ip("fd00::2")]).expect("one each");
        assert_eq!((both.v4, both.v6), (Some(ip("10.0.0.2")), Some(ip("fd00::2"))));
        assert!(matches!(wished(&[ip("10.0.0.2"), ip("10.0.0.3")]), Err(CommandError::Usage { .. })));
    }
}
