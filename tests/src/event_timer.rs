//! Measures how long kernel state of a namespace differs from its expected state.
//!
//! The source is the kernel's notifications with their times of arrival, so that neither a program's start nor a state dump is
//! part of the measurement.
//!
//! One thread, which ends when the timer is dropped.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use overlay_agent::kernel::netns::Netns;

use crate::ExpectContext;
use crate::notify::{self, messages};

/// The time and the key of a changed entry.
type TimedEvent = (Instant, String);

/// Records every change in a namespace.
#[derive(Debug)]
pub struct EventTimer {
    stop: Arc<AtomicBool>,
    events: Arc<Mutex<Vec<TimedEvent>>>,
    thread: Option<JoinHandle<()>>,
}

/// The duration of changes in one measurement.
#[derive(Debug, Clone, Default)]
pub struct EventSpans {
    /// For each entry that changed more than once, the time from its first change to its last.
    pub entries: BTreeMap<String, Duration>,
    /// From the first change of any entry to the last change of any entry.
    pub total: Duration,
}

impl EventTimer {
    /// Starts to record.
    pub fn start(netns: &Netns) -> EventTimer {
        let sockets = notify::sockets(netns);
        let (stop, changes) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (thread_stop, thread_events) = (Arc::clone(&stop), Arc::clone(&changes));
        let thread = std::thread::spawn(move || {
            use_realtime_scheduling();
            while !thread_stop.load(Ordering::Relaxed) {
                read_events(&sockets, &thread_events);
            }
        });
        EventTimer { stop, events: changes, thread: Some(thread) }
    }

    /// Waits for a period without changes, and returns the changes since the last call.
    pub async fn collect_until_quiet(&self, quiet_period: Duration, limit: Duration) -> EventSpans {
        let end = Instant::now() + limit;
        loop {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let mut changes = self.events.lock().unwrap_or_else(PoisonError::into_inner);
            let last = changes.last().map(|(at, _)| *at);
            if last.is_none_or(|at| at.elapsed() >= quiet_period) || Instant::now() >= end {
                return EventSpans::from_events(&std::mem::take(&mut *changes));
            }
        }
    }
}

impl Drop for EventTimer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

impl EventSpans {
    fn from_events(events: &[TimedEvent]) -> EventSpans {
        let mut spans: BTreeMap<&str, (Instant, Instant)> = BTreeMap::new();
        for (at, key) in events {
            spans.entry(key).and_modify(|(_, last)| *last = *at).or_insert((*at, *at));
        }
        let total = match (events.first(), events.last()) {
            (Some((first, _)), Some((last, _))) => last.duration_since(*first),
            _ => Duration::ZERO,
        };
        let repaired = spans.into_iter().filter(|(_, (first, last))| first != last);
        EventSpans { entries: repaired.map(|(key, (first, last))| (key.to_owned(), last.duration_since(first))).collect(), total }
    }
}

/// Gives the calling thread real-time priority. A late read would record a change and its repair at almost the same time.
fn use_realtime_scheduling() {
    // Priority 1 of sched(7)'s real-time scheduling precedes all ordinary threads.
    let first = libc::sched_param { sched_priority: 1 };
    // SAFETY: the kernel reads the structure and keeps no reference to it; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const first) };
    if result != 0 {
        println!("without real-time scheduling ({}): times may come out too short", std::io::Error::last_os_error());
    }
}

/// Reads the available messages, or waits briefly for the next ones.
fn read_events(sockets: &[(&'static str, OwnedFd); 2], events: &Mutex<Vec<TimedEvent>>) {
    let mut poll_fds: Vec<PollFd> = sockets.iter().map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
    let _ready = poll(&mut poll_fds, PollTimeout::from(50u8));
    let mut buffer = vec![0; 64 << 10];
    for (kind, fd) in sockets {
        loop {
            match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => {
                    let at = Instant::now();
                    let timed = messages(&buffer[..length]).filter_map(|m| entry_key(kind, m)).map(|key| (at, key));
                    events.lock().unwrap_or_else(PoisonError::into_inner).extend(timed);
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => panic!("the kernel's notifications ({kind}): {errno}"),
            }
        }
    }
}

/// The key of a changed entry, equal for its deletion and its addition; `None` for changes by the kernel itself.
fn entry_key(kind: &str, message: &[u8]) -> Option<String> {
    let code = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    // The message of a deleted permanent neighbour no longer has the permanent state; NDA_PROTOCOL distinguishes it from learned
    // ones.
    let is_agent_neighbour =
        matches!(code, 28 | 29) && message.get(28..).and_then(|attributes| find_attribute(attributes, 12)).is_some();
    if !is_agent_neighbour {
        notify::describe(kind, message)?;
    }
    if kind == "nftables" {
        return Some("nftables".to_owned());
    }
    let body = message.get(16..)?;
    let family = body.first()?;
    // Structures and attributes: linux/rtnetlink.h, linux/neighbour.h and linux/nexthop.h.
    let (name, attribute) = match code {
        16 | 17 => return Some(format!("link {}", i32::from_ne_bytes(body.get(4..8)?.try_into().ok()?))),
        20 | 21 => ("address", find_attribute(body.get(8..)?, 1)?),
        24 | 25 => ("route", find_attribute(body.get(12..)?, 1)?),
        28 | 29 if *family == 7 => ("fdb", find_attribute(body.get(12..)?, 2)?),
        28 | 29 => ("neigh", find_attribute(body.get(12..)?, 1)?),
        104 | 105 => ("nexthop", find_attribute(body.get(8..)?, 6)?),
        80 | 81 => return Some("netconf".to_owned()),
        _ => return Some(format!("message {code}")),
    };
    Some(format!("{name} {attribute:?}"))
}

/// The value of an attribute.
fn find_attribute(mut bytes: &[u8], attribute_type: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & 0x3fff;
        let value = bytes.get(4..length.max(4))?;
        if kind == attribute_type {
            return Some(value);
        }
        bytes = bytes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

/// Repair times for a table: median and maximum.
#[derive(Debug, Clone, Default)]
pub struct RepairTimes(Vec<Duration>);

impl RepairTimes {
    /// Adds a time.
    pub fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// The number of times.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no times.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The median; of an even number, the upper of the two middle times.
    pub fn median(&self) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied().expect_ok("a time")
    }

    /// The maximum.
    pub fn worst(&self) -> Duration {
        self.0.iter().max().copied().expect_ok("a time")
    }
}

impl Extend<Duration> for RepairTimes {
    fn extend<T: IntoIterator<Item = Duration>>(&mut self, times: T) {
        self.0.extend(times);
    }
}
