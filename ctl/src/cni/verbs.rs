//! The verbs, except CHECK.

use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Cidr;
use overlay_agent::model::api::{AttachRequest, AttachResponse};
use overlay_agent::model::endpoint::EndpointName;

use super::agent::AgentClient;
use super::config::Config;
use super::environment::{Arguments, Attachment};
use super::error::{CniError, Code};
use super::log::Log;
use super::result::{Address, CniResult, Interface, Route};
use super::{attach_request, name, sandbox};

/// Timeout of STATUS. Runtimes call it often, and it reports "not now" instead of waiting.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// Timeout of the undo after a failed ADD.
const UNDO_TIMEOUT: Duration = Duration::from_secs(3);

/// One run of the plugin.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Network configuration.
    pub config: &'a Config,
    /// Log file.
    pub log: &'a Log,
    /// Start time of the process.
    pub started: Instant,
}

impl Context<'_> {
    /// ADD: attaches the container. A failure leaves nothing behind.
    pub fn add(&self, attachment: &Attachment, arguments: &Arguments) -> Result<CniResult, CniError> {
        let owner = name::owner(self.config, attachment)?;
        let endpoint = endpoint_name(&owner)?;
        let request = attach_request::request(self.config, attachment, arguments, owner)?;
        let path = attachment.netns.as_deref().unwrap_or_else(|| std::path::Path::new(""));
        let netns = sandbox::open(path)?;
        // The specification requires a second ADD to fail. The existing interface stays unchanged.
        if sandbox::has_interface(&netns, &attachment.interface)? {
            let text = format!(
                "{} already has an interface {}: DEL it first, or choose another CNI_IFNAME",
                path.display(),
                attachment.interface
            );
            return Err(CniError::new(Code::Conflict, text));
        }
        drop(netns);
        let attached = self.attach(&endpoint, &request).map_err(|error| {
            // A container that ended meanwhile is reported as such, whatever error the kernel returned.
            match sandbox::open(path) {
                Err(gone) if gone.code == Code::UnknownContainer => gone.with_details(error.message),
                _ => error,
            }
        })?;
        self.log.info(format_args!(
            "ADD {endpoint}: {} in {}, {:?}, by {} after {:.1} ms",
            attachment.interface,
            path.display(),
            attached.endpoint.addresses(),
            request.owner.as_deref().unwrap_or_default(),
            self.elapsed_ms(),
        ));
        Ok(self.result(attachment, &attached))
    }

    fn attach(&self, name: &EndpointName, request: &AttachRequest) -> Result<AttachResponse, CniError> {
        let agent = self.agent();
        match agent.attach(name, request) {
            Ok(attached) => {
                let unsupported_error = unsupported(request, &attached);
                unsupported_error.map_or(Ok(attached), |error| Err(self.undo(&agent, name, error)))
            }
            // The request may have been applied in part or in full.
            Err(error) if error.code == Code::TryAgain => Err(self.undo(&agent, name, error)),
            Err(error) => Err(error),
        }
    }

    /// Undoes an attachment if the agent answers; otherwise the runtime's DEL does.
    fn undo(&self, agent: &AgentClient<'_>, name: &EndpointName, error: CniError) -> CniError {
        if let Err(second) = agent.with_deadline(Instant::now() + UNDO_TIMEOUT).detach(name) {
            self.log.warn(format_args!("ADD {name}: undo failed, endpoint may remain until DEL: {second}"));
        }
        error
    }

    /// Builds the result of the chain: the previous plugins' parts, then this plugin's.
    fn result(&self, attachment: &Attachment, attached: &AttachResponse) -> CniResult {
        let mut result = self.config.prev_result.clone().unwrap_or_default();
        result.dns = match &self.config.prev_result {
            Some(before) if self.config.dns == super::result::Dns::default() => before.dns.clone(),
            _ => self.config.dns.clone(),
        };
        let Some(port) = &attached.endpoint.port else { return result };
        result.interfaces.push(Interface { name: port.host_interface.clone(), mtu: attached.mtu, ..Interface::default() });
        let index = result.interfaces.len();
        result.interfaces.push(Interface {
            name: port.interface.clone(),
            mac: port.mac.to_string(),
            mtu: attached.mtu,
            sandbox: attachment.netns.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
            ..Interface::default()
        });
        for (family, address) in port.addresses.iter() {
            let length = attached.prefix_length.get(family).copied().unwrap_or(family.bits());
            let gateway = attached.gateway.get(family).copied();
            // Cannot fail: the length fits the family.
            let Ok(address) = IpNetwork::new(*address, length) else { continue };
            result.ips.push(Address { version: None, interface: Some(index), address, gateway });
            let route = |dst: &Cidr| Route { dst: dst.network(), gw: gateway, extra: serde_json::Map::new() };
            result.routes.extend(attached.routes.get(family).map(route));
        }
        result
    }

    /// DEL: detaches the container. Missing parts are no error.
    pub fn del(&self, attachment: &Attachment) -> Result<(), CniError> {
        let owner = name::owner(self.config, attachment)?;
        let endpoint = endpoint_name(&owner)?;
        match self.agent().detach(&endpoint) {
            Ok(detached) => {
                let action = if detached.endpoint.is_some() { "detached" } else { "was not attached" };
                self.log.info(format_args!("DEL {endpoint}: {action}, by {owner} after {:.1} ms", self.elapsed_ms()));
                Ok(())
            }
            // The interface disappeared with its namespace, and the agent releases the endpoint of a missing namespace by itself:
            // a second DEL would do nothing more.
            Err(error) if error.code == Code::TryAgain && namespace_is_gone(attachment) => {
                self.log.warn(format_args!("DEL {endpoint}: namespace missing, left to the agent's audit: {error}"));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// GC: detaches this network's attachments that the runtime does not list. Continues after a failure and reports all.
    pub fn gc(&self) -> Result<(), CniError> {
        let Some(valid) = &self.config.valid_attachments else {
            let text = "GC without cni.dev/valid-attachments: nothing is removed";
            return Err(CniError::new(Code::InvalidConfig, text));
        };
        let prefix = name::owner_prefix(&self.config.name);
        let keep: std::collections::BTreeSet<String> =
            valid.iter().map(|valid| format!("{prefix}{}/{}", valid.container, valid.interface)).collect();
        let agent = self.agent();
        let mut failed = Vec::new();
        for endpoint in agent.endpoints()?.endpoints {
            let Some(owner) = endpoint.owner.filter(|owner| owner.starts_with(&prefix) && !keep.contains(owner)) else {
                continue;
            };
            match agent.detach(&endpoint.name) {
                Ok(_) => self.log.info(format_args!("GC {}: detached, by {owner}", endpoint.name)),
                Err(error) => failed.push((endpoint.name, error)),
            }
        }
        let Some((_, first)) = failed.first() else { return Ok(()) };
        let details: Vec<String> = failed.iter().map(|(name, error)| format!("{name}: {}", error.message)).collect();
        Err(CniError::new(first.code, format!("cannot detach {} endpoints", failed.len())).with_details(details.join("\n")))
    }

    /// STATUS: reports whether an ADD would succeed now.
    pub fn status(&self) -> Result<(), CniError> {
        let limit = self.config.timeout.min(STATUS_TIMEOUT);
        let agent = AgentClient::new(&self.config.socket, &self.config.network, self.started + limit, self.log);
        agent
            .check_ready()
            .map_err(|reason| CniError::new(Code::NotAvailable, format!("no container can be attached now: {reason}")))
    }

    /// Client of the agent with the verb's deadline.
    pub(super) fn agent(&self) -> AgentClient<'_> {
        AgentClient::new(&self.config.socket, &self.config.network, self.started + self.config.timeout, self.log)
    }

    pub(super) fn elapsed_ms(&self) -> f64 {
        self.started.elapsed().as_secs_f64() * 1e3
    }
}

/// Derives the endpoint name.
pub(super) fn endpoint_name(owner: &str) -> Result<EndpointName, CniError> {
    name::endpoint(owner).map_err(|e| CniError::new(Code::InvalidEnvironment, e.to_string()))
}

/// Detects requested features that are missing in the response: an agent of an older version ignores unknown fields.
fn unsupported(request: &AttachRequest, attached: &AttachResponse) -> Option<CniError> {
    let missing: Vec<String> =
        request.publish.iter().filter(|port| !attached.endpoint.published.contains(port)).map(ToString::to_string).collect();
    (!missing.is_empty()).then(|| {
        let text = format!(
            "runtimeConfig.portMappings {} is not supported by this agent: remove the capability from overlay-cni, and chain the plugin \
             `portmap` after it",
            missing.join(", ")
        );
        CniError::new(Code::UnsupportedField, text)
    })
}

/// Whether the container's namespace is known to be gone.
fn namespace_is_gone(attachment: &Attachment) -> bool {
    attachment.netns.as_deref().is_none_or(|path| Netns::open(path).is_err())
}
