//! The agent: whether it answers, its reported problems, and its capabilities.

use tokio::net::UnixStream;

use super::{Facts, Findings};

/// `CAP_NET_ADMIN` and `CAP_SYS_ADMIN` in `linux/capability.h`.
const REQUIRED_CAPABILITIES: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")];

pub(super) async fn check(facts: &Facts, findings: &mut Findings) {
    let status = match &facts.status {
        Ok(status) => status,
        Err(error) => {
            let remedy =
                "start it: systemctl start overlayd, then journalctl -u overlayd; checks that need its answers are skipped";
            return findings.error("the agent does not answer", vec![error.clone()], remedy);
        }
    };
    if !status.ready {
        let summary = "the agent is not ready";
        findings.error(summary, status.problems.clone(), "follow the evidence; `overlayctl -o wide status` has more");
    } else if !status.problems.is_empty() {
        findings.warning("the agent works, but reports problems", status.problems.clone(), "follow the evidence");
    }
    let own = env!("CARGO_PKG_VERSION");
    if status.version != own {
        let remedy = "restart the agent after an upgrade: systemctl restart overlayd cuts no traffic";
        findings.info("overlayctl and the agent have different versions", vec![format!("{own}, {}", status.version)], remedy);
    }
    capabilities(facts, findings).await;
}

/// Checks the capabilities of the process behind the socket. A systemd-activated socket belongs to systemd: then it reports
/// nothing.
async fn capabilities(facts: &Facts, findings: &mut Findings) {
    let Ok(stream) = UnixStream::connect(facts.settings.client.socket()).await else { return };
    let Some(pid) = stream.peer_cred().ok().and_then(|peer| peer.pid()) else { return };
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    if read("comm").trim() != "overlayd" {
        return;
    }
    let missing = missing_capabilities(&read("status"));
    if !missing.is_empty() {
        findings.error(
            format!("the agent (process {pid}) lacks required capabilities"),
            vec![format!("not in its effective set: {}", missing.join(", "))],
            "run it from its systemd unit, which grants them: systemctl restart overlayd",
        );
    }
}

fn missing_capabilities(status: &str) -> Vec<&'static str> {
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    let lacks = |bit: u32| mask.is_some_and(|mask| mask & (1 << bit) == 0);
    REQUIRED_CAPABILITIES.iter().filter(|(bit, _)| lacks(*bit)).map(|(_, name)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_use_effective_set() {
        assert!(missing_capabilities("CapEff:\t000001ffffffffff\n").is_empty());
        assert_eq!(missing_capabilities("CapPrm:\t000001ffffffffff\nCapEff:\t0000000000001000\n"), ["CAP_SYS_ADMIN"]);
        assert!(missing_capabilities("").is_empty(), "an unreadable status is no finding");
    }
}
