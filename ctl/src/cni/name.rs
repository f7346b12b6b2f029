//! How an attachment is called at the agent: the owner is what a runtime knows it by, the endpoint's name follows from it, so that nothing
//! has to be remembered between ADD and DEL.

use overlay_agent::model::endpoint::{EndpointName, EndpointNameError};

use super::config::Config;
use super::environment::Attachment;
use super::error::{CniError, Code};

/// The longest owner in bytes that the agent takes.
const MAX_OWNER_BYTES: usize = 256;

/// How many characters of the container's id a name shows: as many as `docker_share ps` and `podman ps` do.
const SHORT_ID_LEN: usize = 12;

/// What stands before the owners of a network's attachments: `cni/NETWORK/`. None of the parts can have a slash.
pub fn owner_prefix(network: &str) -> String {
    format!("cni/{network}/")
}

/// The owner of an attachment: `cni/NETWORK/CONTAINERID/IFNAME`.
pub fn owner(config: &Config, attachment: &Attachment) -> Result<String, CniError> {
    let owner = format!("{}{}/{}", owner_prefix(&config.name), attachment.container, attachment.interface);
    if owner.len() <= MAX_OWNER_BYTES {
        return Ok(owner);
    }
    let room = MAX_OWNER_BYTES - owner_prefix("").len() - 2;
    let text =
        format!("the network's name, CNI_CONTAINERID and CNI_IFNAME have {} bytes together, more than {room}", owner.len());
    Err(CniError::new(Code::InvalidConfig, text))
}

/// The endpoint of an owner: `0123456789ab-eth0-` and 16 hex digits of the owner's hash.
pub fn endpoint(owner: &str) -> Result<EndpointName, EndpointNameError> {
    let mut parts = owner.rsplit('/');
    let (interface, container) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
    let interface: String = interface.chars().map(plain).collect();
    // The id has ASCII only.
    let shown: String = container.chars().take(SHORT_ID_LEN).collect();
    format!("{shown}-{interface}-{:016x}", fnv1a(owner.as_bytes())).parse()
}

/// FNV-1a, 64 bits: it has to be the same in every version, because DEL may come from another than ADD. Two attachments of one host with
/// the same name are 2^64 to the number of pairs against; the agent would refuse the second, for its namespace differs.
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
        // The same in every version.
        assert_eq!(endpoint("cni/net/c1/eth0").expect("a name").as_str(), "c1-eth0-c4d29313054bf7a8");
        let others = ["cni/net/c1/eth1", "cni/net2/c1/eth0", "cni/net/c2/eth0", "cni/net/c1/e!h0"];
        for other in others {
            assert_ne!(endpoint(other), endpoint("cni/net/c1/eth0"));
        }
        assert!(endpoint("cni/net/c/fifteen.bytes!?").expect("a name").as_str().starts_with("c-fifteen.bytes__-"));
    }
}
