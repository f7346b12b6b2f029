//! What a process has used and what an agent says of itself, read now and again later.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use overlay_tests::programs::processor_time;
use overlayctl::lab::{self, Lab, ProcessId};

use super::stage::etcd;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(30);

/// The samples of a page in Prometheus' text format, by name and labels as they stand there.
#[derive(Debug, Clone, Default)]
pub struct Page(BTreeMap<String, f64>);

impl Page {
    fn parse(text: &str) -> Page {
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        Page(text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect())
    }

    /// The page of an agent, from its socket.
    pub fn of_agent(socket: &Path) -> anyhow::Result<Page> {
        let stream = UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(Page::parse(&get(stream, "overlayd").with_context(|| format!("{} does not tell its metrics", socket.display()))?))
    }

    /// The page of a lab's etcd.
    pub fn of_etcd(lab: &Lab) -> anyhow::Result<Page> {
        let text = lab.netns("net")?.run(|| -> anyhow::Result<String> {
            let stream = TcpStream::connect_timeout(&etcd(), LIMIT)?;
            stream.set_read_timeout(Some(LIMIT))?;
            get(stream, &etcd().to_string()).context("etcd does not tell its metrics")
        })??;
        Ok(Page::parse(&text))
    }

    /// The sum of all samples whose name and labels begin so and hold that text.
    pub fn sum(&self, begin: &str, holds: &str) -> f64 {
        self.0.iter().filter(|(name, _)| name.starts_with(begin) && name.contains(holds)).map(|(_, value)| value).sum()
    }

    /// What was added since an earlier page, by the same rule.
    pub fn added(&self, before: &Page, begin: &str, holds: &str) -> f64 {
        self.sum(begin, holds) - before.sum(begin, holds)
    }
}

/// `GET /metrics`. HTTP/1.0: the answer ends with the connection.
fn get(mut stream: impl Read + Write, host: &str) -> anyhow::Result<String> {
    write!(stream, "GET /metrics HTTP/1.0\r\nHost: {host}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.") && answer.contains(" 200 "), "{}", answer.lines().next().unwrap_or_default());
    Ok(answer)
}

/// The process of a lab's etcd.
pub fn etcd_process(lab: &Lab) -> anyhow::Result<ProcessId> {
    ProcessId::recorded(&lab::etcd::record(lab.dir())).context("the lab's etcd has ended")
}

/// What a process has used by a moment.
#[derive(Debug, Clone)]
pub struct Used {
    at: Instant,
    processor: Duration,
    /// Times that each thread went to sleep by itself: each is a wake-up.
    sleeps: BTreeMap<u32, u64>,
}

/// What a process used between two moments.
#[derive(Debug, Clone, Copy)]
pub struct Between {
    /// Time that passed.
    pub wall: Duration,
    /// Processor time.
    pub processor: Duration,
    /// Wake-ups of its threads.
    pub wakes: u64,
}

impl Used {
    /// By now.
    pub fn now(pid: i32) -> anyhow::Result<Used> {
        let mut sleeps = BTreeMap::new();
        for thread in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid} has ended"))? {
            let dir = thread?.path();
            // One may end meanwhile.
            let Ok(status) = fs::read_to_string(dir.join("status")) else { continue };
            let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            let id = dir.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok());
            sleeps.extend(id.zip(count.and_then(|text| text.trim().parse().ok())));
        }
        let processor = processor_time(pid).with_context(|| format!("process {pid} has ended"))?;
        Ok(Used { at: Instant::now(), processor, sleeps })
    }

    /// Processor time since the process was started.
    pub fn since_start(&self) -> Duration {
        self.processor
    }

    /// Between an earlier moment and this one.
    pub fn since(&self, before: &Used) -> Between {
        let then = |id: &u32| before.sleeps.get(id).copied().unwrap_or_default();
        Between {
            wall: self.at.duration_since(before.at),
            processor: self.processor.saturating_sub(before.processor),
            wakes: self.sleeps.iter().map(|(id, count)| count.saturating_sub(then(id))).sum(),
        }
    }
}

impl Between {
    /// Processor time as a share of one processor, in percent.
    pub fn share(&self) -> f64 {
        100.0 * self.processor.as_secs_f64() / self.wall.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_added_up_and_compared() {
        let before = Page::parse("# HELP a x\na{m=\"put\"} 1\na{m=\"get\"} 2\nb 5\n");
        let after = Page::parse("a{m=\"put\"} 4\na{m=\"get\"} 2\na{m=\"new\"} 1\nb 1e1\n");
        assert_eq!(after.sum("a", ""), 7.0);
        assert_eq!(after.added(&before, "a", "put"), 3.0);
        assert_eq!(after.added(&before, "b", ""), 5.0);
    }

    #[test]
    fn this_process_has_used_something() {
        let pid = i32::try_from(std::process::id()).expect("a process id");
        let before = Used::now(pid).expect("this process");
        std::thread::sleep(Duration::from_millis(20));
        let between = Used::now(pid).expect("this process").since(&before);
        assert!(between.wall >= Duration::from_millis(20) && between.wakes >= 1, "{between:?}");
    }
}
