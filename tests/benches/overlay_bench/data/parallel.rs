//! Throughput with senders and receivers in parallel, each on its own thread, like separate programs.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};

use super::path::{TrafficPath, UDP_PAYLOAD_LEN, pin_to_cpu};

/// Bytes of one write.
const WRITE_SIZE: usize = 128 << 10;

/// The load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// This many TCP connections, as fast as they can.
    Streams(usize),
    /// One byte over TCP and one back, repeatedly, on one connection.
    Requests,
    /// UDP packets of [`UDP_PAYLOAD_LEN`] bytes, as fast as possible.
    Packets,
}

/// The result of a load.
#[derive(Debug, Clone, Copy)]
pub struct Throughput {
    /// Per second: bytes, answered requests, or arrived packets.
    pub per_second: f64,
    /// CPU seconds of the whole machine per second.
    pub processor: f64,
}

impl Load {
    /// Sends for some time, measured once data flows.
    pub fn run(self, path: &TrafficPath, time: Duration) -> anyhow::Result<Throughput> {
        match self {
            Load::Streams(count) => streams(path, count, time),
            Load::Requests => requests(path, time),
            Load::Packets => packets(path, time),
        }
    }
}

fn streams(path: &TrafficPath, count: usize, time: Duration) -> anyhow::Result<Throughput> {
    let pairs = (0..count).map(|_| path.connect()).collect::<anyhow::Result<Vec<_>>>()?;
    let received = AtomicU64::new(0);
    let ends: Vec<&TcpStream> = pairs.iter().flat_map(|(near, far)| [near, far]).collect();
    // A single stream is pinned, so that turns do not differ in its placement; several streams spread by themselves.
    let pinned = count == 1;
    thread::scope(|scope| {
        for (near, far) in &pairs {
            scope.spawn(move || -> anyhow::Result<()> {
                if pinned {
                    pin_to_cpu(false)?;
                }
                let (mut near, block) = (near, vec![0x5a; WRITE_SIZE]);
                while near.write_all(&block).is_ok() {}
                Ok(())
            });
            let received = &received;
            scope.spawn(move || -> anyhow::Result<()> {
                if pinned {
                    pin_to_cpu(true)?;
                }
                let (mut far, mut block) = (far, vec![0; WRITE_SIZE]);
                while let Ok(length @ 1..) = far.read(&mut block) {
                    received.fetch_add(u64::try_from(length)?, Ordering::Relaxed);
                }
                Ok(())
            });
        }
        let throughput = measure_rate(&received, time);
        for end in ends {
            let _ignored = end.shutdown(Shutdown::Both);
        }
        throughput
    })
}

fn requests(path: &TrafficPath, time: Duration) -> anyhow::Result<Throughput> {
    let (near, far) = path.connect()?;
    let answered = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| -> anyhow::Result<()> {
            pin_to_cpu(false)?;
            let (mut near, mut byte) = (&near, [1]);
            while near.write_all(&byte).is_ok() && near.read_exact(&mut byte).is_ok() {
                answered.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        scope.spawn(|| -> anyhow::Result<()> {
            pin_to_cpu(true)?;
            let (mut far, mut byte) = (&far, [1]);
            while far.read_exact(&mut byte).is_ok() && far.write_all(&byte).is_ok() {}
            Ok(())
        });
        let throughput = measure_rate(&answered, time);
        for end in [&near, &far] {
            let _ignored = end.shutdown(Shutdown::Both);
        }
        throughput
    })
}

fn packets(path: &TrafficPath, time: Duration) -> anyhow::Result<Throughput> {
    let (near, far) = path.datagrams()?;
    far.set_read_timeout(Some(Duration::from_millis(100)))?;
    let (received, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let is_running = || !stop.load(Ordering::Relaxed);
    thread::scope(|scope| {
        scope.spawn(|| -> anyhow::Result<()> {
            pin_to_cpu(false)?;
            while is_running() {
                // A full queue loses the packet: it does not arrive and is not counted.
                let _ignored = near.send(&[0x5a; UDP_PAYLOAD_LEN]);
            }
            Ok(())
        });
        scope.spawn(|| -> anyhow::Result<()> {
            pin_to_cpu(true)?;
            let mut packet = [0; UDP_PAYLOAD_LEN];
            while is_running() {
                if far.recv(&mut packet).is_ok() {
                    received.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        });
        let throughput = measure_rate(&received, time);
        stop.store(true, Ordering::Relaxed);
        throughput
    })
}

/// Waits briefly, and then measures the growth rate of a count and the CPU time of the machine.
fn measure_rate(count: &AtomicU64, time: Duration) -> anyhow::Result<Throughput> {
    thread::sleep(time / 5);
    let (start, idle, before) = (Instant::now(), idle_seconds()?, count.load(Ordering::Relaxed));
    thread::sleep(time);
    let (seconds, increase) = (start.elapsed().as_secs_f64(), count.load(Ordering::Relaxed) - before);
    let idle = self::idle_seconds()? - idle;
    ensure!(increase > 0, "nothing arrives");
    let processors = u32::try_from(thread::available_parallelism().map_or(1, usize::from))?;
    // A count of this size is exact in a double.
    let each_second = u32::try_from(increase >> 16).map(f64::from)? * 65536.0 + f64::from(u16::try_from(increase & 0xffff)?);
    Ok(Throughput { per_second: each_second / seconds, processor: (f64::from(processors) - idle / seconds).max(0.0) })
}

/// Total idle seconds of all processors since boot (`proc_stat(5)`). The kernel measures idle time; busy times are only sampled.
fn idle_seconds() -> anyhow::Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    parse_idle_seconds(&text).ok_or_else(|| anyhow!("/proc/stat does not begin with the sum of all processors"))
}

fn parse_idle_seconds(text: &str) -> Option<f64> {
    let mut fields = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace().skip(3);
    let (idle, waiting): (f64, f64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    // USER_HZ is 100 on every platform of Rust except Alpha.
    Some((idle + waiting) / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_parsed() {
        let text = "cpu  100 0 50 3000 200 0 7 0 0 0\ncpu0 50 0 25 1500 100 0 3 0 0 0\n";
        assert_eq!(parse_idle_seconds(text), Some(32.0));
        assert_eq!(parse_idle_seconds("intr 1 2 3"), None);
    }
}
