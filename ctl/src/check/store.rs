//! etcd, queried from this host: every server separately, with the settings of the command line, or the agent's if they need no
//! file.

use std::time::Duration;

use overlay_agent::store::{self, StoreConfig};
use tokio::time::Instant;

use super::{Facts, Findings};

/// Oldest etcd that its project still maintains. The agent needs leases and watches with progress, which older versions have too.
const MIN_ETCD_VERSION: (u32, u32) = (3, 4);
/// Response time that is worth a warning: renewals have five seconds.
const SLOW_RESPONSE: Duration = Duration::from_millis(500);
/// Maximum difference of the clocks in seconds. HTTP's `Date` has whole seconds, and certificates need an accuracy of minutes only.
const MAX_CLOCK_SKEW: u64 = 5;

pub(super) async fn check(facts: &Facts, findings: &mut Findings) {
    let Some(config) = store_config(facts) else {
        if let Some(status) = facts.status().filter(|status| !status.store.connected) {
            let error = status.store.error.clone().unwrap_or_default();
            findings.error("the agent has no connection to etcd", vec![error], "follow the evidence");
        }
        let remedy =
            "overlayctl check --etcd-endpoints URLS, with --etcd-cafile and the other flags if etcd requires TLS or a login";
        return findings.info("not checked: etcd itself", vec![String::new()], remedy);
    };
    let mut unreachable = Vec::new();
    for endpoint in &config.endpoints {
        let member_config = StoreConfig { endpoints: vec![endpoint.clone()], ..config.clone() };
        clock_skew(&member_config, findings).await;
        let start = Instant::now();
        match store::member_status(&member_config).await {
            Ok(member) => report_member(endpoint, &member, start.elapsed(), findings),
            Err(error) => unreachable.push(error.to_string()),
        }
    }
    let all = config.endpoints.len();
    match unreachable.len() {
        0 => {}
        count if count == all => {
            let remedy =
                "check that etcd runs and that its port is reachable from this host; the data path keeps working meanwhile";
            findings.error("etcd does not answer", unreachable, remedy);
        }
        count => {
            let remedy = "repair them, or remove them from --etcd-endpoints; the agent uses the remaining servers";
            findings.warning(format!("{count} of {all} etcd servers do not answer"), unreachable, remedy);
        }
    }
}

/// Returns the given settings, or the agent's endpoints. TLS and logins need files that only the agent may read.
fn store_config(facts: &Facts) -> Option<StoreConfig> {
    let args = &facts.settings.etcd;
    if args.is_given() {
        return Some(args.store_config());
    }
    let endpoints = &facts.status()?.store.endpoints;
    let plain = |endpoint: &String| endpoint.starts_with("http://");
    let usable = !endpoints.is_empty() && endpoints.iter().all(plain);
    let prefix = facts.status()?.store.prefix.clone();
    usable.then(|| StoreConfig { endpoints: endpoints.clone(), prefix, ..StoreConfig::default() })
}

fn report_member(endpoint: &str, member: &store::MemberStatus, elapsed: Duration, findings: &mut Findings) {
    let mut parts = member.version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if version < MIN_ETCD_VERSION {
        findings.warning(
            format!("etcd {} is older than {}.{}", member.version, MIN_ETCD_VERSION.0, MIN_ETCD_VERSION.1),
            vec![endpoint.to_owned()],
            "upgrade etcd, one minor version at a time, one member at a time",
        );
    }
    if !member.has_leader {
        let remedy = "without a majority etcd takes no writes: start the other members (etcdctl endpoint status --cluster)";
        findings.error("the etcd cluster has no leader", vec![endpoint.to_owned()], remedy);
    }
    if !member.alarms.is_empty() {
        let remedy = "etcdctl alarm list; for NOSPACE: etcdctl compact, etcdctl defrag, etcdctl alarm disarm";
        findings.error("etcd reports alarms", member.alarms.clone(), remedy);
    }
    if elapsed > SLOW_RESPONSE {
        findings.warning(
            "etcd answers slowly",
            vec![format!("{endpoint}: {} ms for a connection and two responses", elapsed.as_millis())],
            "check its disk and its network: etcdctl check perf",
        );
    }
}

/// Compares the server's clock with this host's. An unreachable server is reported elsewhere, as one that does not answer.
async fn clock_skew(server: &StoreConfig, findings: &mut Findings) {
    let Ok(Some(server_time)) = store::server_clock(server).await else { return };
    let local_time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let skew = local_time.abs_diff(server_time);
    if skew > MAX_CLOCK_SKEW {
        findings.warning(
            format!("the clocks of this host and etcd differ by {skew} s"),
            vec![format!("{} says {server_time}, this host {local_time} (seconds since 1970)", server.endpoints.join(", "))],
            "synchronise both: systemctl status systemd-timesyncd, or chronyc tracking. Certificates and logs depend on it",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn member_problems_are_reported() {
        let member = |version: &str, has_leader, alarms: &[&str]| store::MemberStatus {
            version: version.to_owned(),
            has_leader,
            alarms: alarms.iter().map(ToString::to_string).collect(),
        };
        let fast = Duration::from_millis(3);
        for (member, elapsed, wanted) in [
            (member("3.5.16", true, &[]), fast, ""),
            (member("3.4.0", true, &[]), fast, ""),
            (member("3.3.27", true, &[]), fast, "older than 3.4"),
            (member("2.3.8", true, &[]), fast, "older than 3.4"),
            (member("3.5.16", false, &[]), fast, "no leader"),
            (member("3.5.16", true, &["memberID:1 alarm:NOSPACE"]), fast, "reports alarms"),
            (member("3.5.16", true, &[]), Duration::from_secs(2), "slow"),
        ] {
            let mut findings = Findings::for_check("store");
            report_member("http://x:2379", &member, elapsed, &mut findings);
            let summaries: Vec<String> = findings.into_vec().into_iter().map(|finding| finding.summary).collect();
            assert!(
                if wanted.is_empty() { summaries.is_empty() } else { summaries.len() == 1 && summaries[0].contains(wanted) },
                "{summaries:?}"
            );
        }
    }
}
