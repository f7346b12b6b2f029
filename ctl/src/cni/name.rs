//! Names of an attachment at the agent. The owner is the runtime's identification; the endpoint's name derives from it, so that
//! no state is needed between ADD and DEL.

use overlay_agent::model::endpoint::{EndpointName, EndpointNameError};

use super::config::Config;
use super::environment::Attachment;
use super::error::{CniError, Code};

/// Longest owner that the agent accepts, in bytes.
const MAX_OWNER_BYTES: usize = 256;

/// Characters of the container's ID in a name: as many as `docker ps` and `podman ps` show.
const SHORT_ID_LEN: usize = 12;

/// Prefix of the owners of a network's attachments: `cni/NETWORK/`. No part can contain a slash.
pub fn owner_prefix(network: &str) -> String {
    format!("cni/{network}/")
}

/// Builds the owner of an attachment: `cni/NETWORK/CONTAINERID/IFNAME`.
pub fn owner(config: &Config, attachment: &Attachment) -> Result<String, CniError> {
    let owner = format!("{}{}/{}", owner_prefix(&config.name), attachment.container, attachment.interface);
    if owner.len() <= MAX_OWNER_BYTES {
        return Ok(owner);
    }
    let limit = MAX_OWNER_BYTES - owner_prefix("").len() - 2;
    let text = format!("the network's name, CNI_CONTAINERID and CNI_IFNAME have {} bytes together, limit {limit}", owner.len());
    Err(CniError::new(Code::InvalidConfig, text))
}

/// Derives the endpoint name of an owner: `0123456789ab-eth0-` and 16 hex digits of the owner's hash.
pub fn endpoint(owner: &str) -> Result<EndpointName, EndpointNameError> {
    let mut parts = owner.rsplit('/');
    let (interface, container) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let sanitize = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
    let interface: String = interface.chars().map(sanitize).collect();
    // The ID has only ASCII characters.
    let short_id: String = container.chars().take(SHORT_ID_LEN).collect();
    format!("{short_id}-{interface}-{:016x}", fnv1a(owner.as_bytes())).parse()
}

/// FNV-1a, 64 bits. It must not change between versions: DEL may come from another version than ADD. The odds against a name
/// collision are 2^64 to the number of pairs of a host's attachments; the agent would reject the second, because its namespace
/// differs.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_readable_and_differ() {
        let long = format!("cni/net/{}/eth0", "0123456789abcdef".repeat(4));
        let name = endpoint(&long).expect("a name");
        assert!(name.as_str().starts_with("0123456789ab-eth0-"), "{name}");
        assert!(name.as_str().len() <= 63);
        // Fixed for every version.
        assert_eq!(endpoint("cni/net/c1/eth0").expect("a name").as_str(), "c1-eth0-c4d29313054bf7a8");
        let others = ["cni/net/c1/eth1", "cni/net2/c1/eth0", "cni/net/c2/eth0", "cni/net/c1/e!h0"];
        for other in others {
            assert_ne!(endpoint(other), endpoint("cni/net/c1/eth0"));
        }
        assert!(endpoint("cni/net/c/fifteen.bytes!?").expect("a name").as_str().starts_with("c-fifteen.bytes__-"));
    }
}
