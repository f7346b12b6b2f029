//! The usage of a process and the metrics of an agent, at one time and as differences.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use overlay_tests::programs::process_cpu_time;
use overlayctl::lab::{self, Lab, ProcessId};

use super::bench_lab::etcd_socket_addr;

/// Time limit of a response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// The samples of a page in Prometheus' text format, by name with labels.
#[derive(Debug, Clone, Default)]
pub struct MetricsPage(BTreeMap<String, f64>);

impl MetricsPage {
    fn parse(text: &str) -> MetricsPage {
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        MetricsPage(text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect())
    }

    /// Reads an agent's page from its socket.
    pub fn of_agent(socket: &Path) -> anyhow::Result<MetricsPage> {
        let stream = UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
        Ok(MetricsPage::parse(
            &http_get(stream, "overlayd", "/metrics")
                .with_context(|| format!("{} does not return its metrics", socket.display()))?,
        ))
    }

    /// Reads the page of a lab's etcd.
    pub fn of_etcd(lab: &Lab) -> anyhow::Result<MetricsPage> {
        let text = lab.netns("net")?.run(|| -> anyhow::Result<String> {
            let stream = TcpStream::connect_timeout(&etcd_socket_addr(), RESPONSE_TIMEOUT)?;
            stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
            http_get(stream, &etcd_socket_addr().to_string(), "/metrics").context("etcd does not tell its metrics")
        })??;
        Ok(MetricsPage::parse(&text))
    }

    /// The sum of all samples whose name with labels has this prefix and contains this text.
    pub fn sum(&self, prefix: &str, substring: &str) -> f64 {
        self.0.iter().filter(|(name, _)| name.starts_with(prefix) && name.contains(substring)).map(|(_, value)| value).sum()
    }

    /// The increase of this sum since an earlier page.
    pub fn delta(&self, before: &MetricsPage, prefix: &str, substring: &str) -> f64 {
        self.sum(prefix, substring) - before.sum(prefix, substring)
    }
}

/// `GET` over HTTP/1.0: the response ends with the connection. Returns the response with its header.
fn http_get(mut stream: impl Read + Write, host: &str, path: &str) -> anyhow::Result<String> {
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    ensure!(response.starts_with("HTTP/1.") && response.contains(" 200 "), "{}", response.lines().next().unwrap_or_default());
    Ok(response)
}

/// Reads a JSON document from an agent's socket.
pub fn agent_json(socket: &Path, path: &str) -> anyhow::Result<serde_json::Value> {
    let stream = UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
    let response = http_get(stream, "overlayd", path).with_context(|| format!("overlayd does not answer {path}"))?;
    let (_, body) = response.split_once("\r\n\r\n").with_context(|| format!("the response to {path} has no body"))?;
    serde_json::from_str(body).with_context(|| format!("the response to {path}"))
}

/// The process of a lab's etcd.
pub fn etcd_process(lab: &Lab) -> anyhow::Result<ProcessId> {
    ProcessId::from_pid_file(&lab::etcd::pid_file(lab.dir())).context("the lab's etcd has ended")
}

/// The usage of a process at one time.
#[derive(Debug, Clone)]
pub struct Usage {
    at: Instant,
    cpu_time: Duration,
    /// Voluntary context switches of each thread: each is a wake-up.
    voluntary_switches: BTreeMap<u32, u64>,
}

/// The usage of a process between two times.
#[derive(Debug, Clone, Copy)]
pub struct UsageDelta {
    /// Elapsed time.
    pub wall: Duration,
    /// CPU time.
    pub cpu_time: Duration,
    /// Wake-ups of its threads.
    pub wakeups: u64,
}

impl Usage {
    /// Reads the current usage.
    pub fn now(pid: i32) -> anyhow::Result<Usage> {
        let mut sleeps = BTreeMap::new();
        for thread in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid} has ended"))? {
            let dir = thread?.path();
            // A thread may end meanwhile.
            let Ok(status) = fs::read_to_string(dir.join("status")) else { continue };
            let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            let id = dir.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok());
            sleeps.extend(id.zip(count.and_then(|text| text.trim().parse().ok())));
        }
        let processor = process_cpu_time(pid).with_context(|| format!("process {pid} has ended"))?;
        Ok(Usage { at: Instant::now(), cpu_time: processor, voluntary_switches: sleeps })
    }

    /// CPU time since the process was started.
    pub fn total_cpu_time(&self) -> Duration {
        self.cpu_time
    }

    /// The difference from an earlier usage.
    pub fn since(&self, before: &Usage) -> UsageDelta {
        let previous_count = |id: &u32| before.voluntary_switches.get(id).copied().unwrap_or_default();
        UsageDelta {
            wall: self.at.duration_since(before.at),
            cpu_time: self.cpu_time.saturating_sub(before.cpu_time),
            wakeups: self.voluntary_switches.iter().map(|(id, count)| count.saturating_sub(previous_count(id))).sum(),
        }
    }
}

impl UsageDelta {
    /// CPU time in per cent of one processor.
    pub fn cpu_percent(&self) -> f64 {
        100.0 * self.cpu_time.as_secs_f64() / self.wall.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_and_subtracted() {
        let before = MetricsPage::parse("# HELP a x\na{m=\"put\"} 1\na{m=\"get\"} 2\nb 5\n");
        let after = MetricsPage::parse("a{m=\"put\"} 4\na{m=\"get\"} 2\na{m=\"new\"} 1\nb 1e1\n");
        assert_eq!(after.sum("a", ""), 7.0);
        assert_eq!(after.delta(&before, "a", "put"), 3.0);
        assert_eq!(after.delta(&before, "b", ""), 5.0);
    }

    #[test]
    fn own_process_usage_is_measured() {
        let pid = i32::try_from(std::process::id()).expect("a process id");
        let before = Usage::now(pid).expect("this process");
        std::thread::sleep(Duration::from_millis(20));
        let delta = Usage::now(pid).expect("this process").since(&before);
        assert!(delta.wall >= Duration::from_millis(20) && delta.wakeups >= 1, "{delta:?}");
    }
}
