//! Builds the agent's attach request from the network configuration and `CNI_ARGS`. Pure.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use overlay_agent::model::api::AttachRequest;
use overlay_agent::model::{Family, Mac, Mode, PerFamily, PublishedPort, Transport};
use serde_json::Value;

use super::config::{Config, PortMapping};
use super::environment::{Arguments, Attachment, quoted};
use super::error::{CniError, Code};

/// Builds the request of an ADD.
pub fn request(
    config: &Config,
    attachment: &Attachment,
    arguments: &Arguments,
    owner: String,
) -> Result<AttachRequest, CniError> {
    if let Some(limits) = config.runtime_config.bandwidth.as_ref().filter(|value| is_requested(value)) {
        let text = format!(
            "runtimeConfig.bandwidth {limits} is not supported: remove the capability from overlay-cni, and chain the plugin `bandwidth` after it"
        );
        return Err(CniError::new(Code::UnsupportedField, text));
    }
    Ok(AttachRequest {
        mode: Mode::Overlay,
        netns: attachment.netns.clone(),
        interface: Some(attachment.interface.clone()),
        addresses: addresses(config, arguments)?,
        mac: mac(config, arguments)?,
        publish: ports(&config.runtime_config.port_mappings)?,
        source_check: config.source_check,
        default_route: config.default_route,
        owner: Some(owner),
    })
}

/// Whether a limit is requested: absent, null and 0 mean no limit.
fn is_requested(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Object(fields) => fields.values().any(is_requested),
        Value::Number(number) => number.as_f64() != Some(0.0),
        _ => true,
    }
}

/// Merges the requested addresses of all three sources, one per family. A prefix length is ignored: the subnet determines it.
fn addresses(config: &Config, arguments: &Arguments) -> Result<PerFamily<IpAddr>, CniError> {
    let mut requested = PerFamily::default();
    let sources = [
        ("runtimeConfig.ips", Code::InvalidConfig, &config.runtime_config.ips),
        ("args.cni.ips", Code::InvalidConfig, &config.args.ips),
        ("CNI_ARGS: IP", Code::InvalidEnvironment, &arguments.ips),
    ];
    for (source, code, texts) in sources {
        for text in texts {
            let address = text.parse::<IpAddr>().ok().or_else(|| text.parse::<IpNetwork>().ok().map(|network| network.ip()));
            let address =
                address.ok_or_else(|| CniError::new(code, format!("{source}: {} is not an IP address", quoted(text))))?;
            let family = Family::of(address);
            match requested.slot(family).replace(address) {
                Some(before) if before != address => {
                    let text = format!("{source}: {address} conflicts with {before}: an endpoint has one {family} address");
                    return Err(CniError::new(code, text));
                }
                _ => {}
            }
        }
    }
    Ok(requested)
}

/// Selects the requested MAC; the capability precedes the other two sources.
fn mac(config: &Config, arguments: &Arguments) -> Result<Option<Mac>, CniError> {
    let sources = [
        ("runtimeConfig.mac", Code::InvalidConfig, &config.runtime_config.mac),
        ("args.cni.mac", Code::InvalidConfig, &config.args.mac),
        ("CNI_ARGS: MAC", Code::InvalidEnvironment, &arguments.mac),
    ];
    let Some((source, code, text)) = sources.into_iter().find_map(|(place, code, text)| {
        let text = text.as_deref().filter(|text| !text.is_empty())?;
        Some((place, code, text))
    }) else {
        return Ok(None);
    };
    let mac = text.parse::<Mac>().map_err(|e| CniError::new(code, format!("{source}: {e}")))?;
    if mac.is_unicast() { Ok(Some(mac)) } else { Err(CniError::new(code, format!("{source}: {mac} is not a unicast address"))) }
}

/// Converts the port mappings. Mappings with consecutive ports on both sides become one range.
fn ports(mappings: &[PortMapping]) -> Result<Vec<PublishedPort>, CniError> {
    let mut ranges: Vec<PublishedPort> = Vec::new();
    for mapping in mappings {
        let published = port(mapping)?;
        match ranges.last_mut() {
            Some(range) if continues_range(range, &published) => range.count += 1,
            _ => ranges.push(published),
        }
    }
    Ok(ranges)
}

fn continues_range(range: &PublishedPort, next: &PublishedPort) -> bool {
    let after = |first: u16, port: u16| first.checked_add(range.count) == Some(port);
    range.address == next.address
        && range.protocol == next.protocol
        && after(range.host_port, next.host_port)
        && after(range.container_port, next.container_port)
}

fn port(mapping: &PortMapping) -> Result<PublishedPort, CniError> {
    let invalid = |reason: String| CniError::new(Code::InvalidConfig, format!("runtimeConfig.portMappings: {reason}"));
    let number = |name: &str, value: i64| {
        u16::try_from(value).ok().filter(|port| *port != 0).ok_or_else(|| invalid(format!("{name} {value} is not 1 to 65535")))
    };
    let protocol = match mapping.protocol.to_ascii_lowercase().as_str() {
        "" | "tcp" => Transport::Tcp,
        "udp" => Transport::Udp,
        "sctp" => Transport::Sctp,
        _ => return Err(invalid(format!("protocol {} is not tcp, udp or sctp", quoted(&mapping.protocol)))),
    };
    let address = match mapping.host_ip.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| invalid(format!("hostIP {} is not an IP address", quoted(text))))?),
    };
    Ok(PublishedPort {
        address,
        host_port: number("hostPort", mapping.host_port)?,
        container_port: number("containerPort", mapping.container_port)?,
        count: 1,
        protocol,
    })
}
