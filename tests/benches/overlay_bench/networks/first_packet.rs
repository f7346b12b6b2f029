//! `overlayctl network create` until a packet of a container in the new network arrives outside.
//!
//! Baseline: a container in the default network, attached in the same way in the same turn.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::ensure;
use overlay_agent::kernel::netns::Netns;
use overlayctl::lab::Host;
use overlayctl::lab::layout::outside_address;
use tokio::runtime::Runtime;

use super::super::attach::ContainerNetns;
use super::super::bench_lab::{BenchLab, FAMILY};
use super::super::progress;
use super::super::report::{Report, Row};
use super::super::stats::milliseconds;
use super::run_overlayctl;

/// Goal of the median, in milliseconds.
const MAX_FIRST_PACKET_MS: f64 = 80.0;
/// The range of every network.
const CIDR: &str = "10.0.0.0/16";
/// A packet that is lost is repeated after this time.
const RESEND_INTERVAL: Duration = Duration::from_millis(5);
/// Time limit for the first packet.
const PACKET_TIMEOUT: Duration = Duration::from_secs(20);

/// The times of one container, in ms.
#[derive(Debug, Clone, Copy)]
struct Sample {
    create: f64,
    attach: f64,
    /// All, until the packet arrived.
    total: f64,
}

/// Runs the measurement.
pub fn measure(samples: usize, runtime: &Runtime, report: &mut Report) -> anyhow::Result<()> {
    let bench = runtime.block_on(BenchLab::for_containers(1))?;
    let host = bench.lab.host("h1")?;
    let outside = SocketAddr::new(outside_address(FAMILY), 0);
    let receiver = bench.lab.netns("world")?.run(|| UdpSocket::bind(outside))??;
    receiver.set_read_timeout(Some(RESEND_INTERVAL))?;
    // The first packet of all resolves the address of the world.
    first_packet(&host, &receiver, "warm-up", None)?;
    let (mut new, mut present) = (Vec::new(), Vec::new());
    for turn in 0..samples {
        progress(&format!("a new network: {} of {samples}", turn + 1));
        present.push(first_packet(&host, &receiver, &format!("default{turn}"), None)?);
        new.push(first_packet(&host, &receiver, &format!("new{turn}"), Some(&format!("new{turn}")))?);
    }
    let mut add = |what: &str, goal: Option<f64>, value: fn(&Sample) -> f64, baseline: fn(&Sample) -> f64| {
        let (values, baseline): (Vec<f64>, Vec<f64>) = (new.iter().map(value).collect(), present.iter().map(baseline).collect());
        let row = Row::new("networks", "a new isolated network", what, "ms", &values);
        let row = row.map(|row| row.with_baseline("attach to first packet, default network", &values, &baseline));
        report.add(row.map(|row| match goal {
            Some(limit) => row.median_goal(limit),
            None => row,
        }));
    };
    add("`network create` to the first packet outside", Some(MAX_FIRST_PACKET_MS), |s| s.total, |s| s.total);
    add("of it: without `network create`", None, |s| s.total - s.create, |s| s.total);
    add("of it: attach", None, |s| s.attach, |s| s.attach);
    Ok(())
}

/// Attaches a container, in a new network on request, and sends until a packet arrives.
fn first_packet(host: &Host<'_>, receiver: &UdpSocket, name: &str, network: Option<&str>) -> anyhow::Result<Sample> {
    let container = ContainerNetns::new(format!("ovbench-{}-{name}", std::process::id()))?;
    let path = container.path.to_string_lossy().into_owned();
    let mut attach = vec!["attach", name, "--netns", &path];
    let begun = Instant::now();
    if let Some(network) = network {
        run_overlayctl(host, &["network", "create", network, "--cidr", CIDR])?;
        attach.extend(["--network", network]);
    }
    let created = begun.elapsed();
    run_overlayctl(host, &attach)?;
    let attached = begun.elapsed();
    send_until_received(&Netns::open(&container.path)?, receiver, name)?;
    let total = begun.elapsed();
    run_overlayctl(host, &["detach", name])?;
    Ok(Sample { create: milliseconds(created), attach: milliseconds(attached - created), total: milliseconds(total) })
}

/// Sends a packet repeatedly until it arrives.
fn send_until_received(container: &Netns, receiver: &UdpSocket, text: &str) -> anyhow::Result<()> {
    let to = receiver.local_addr()?;
    let sender = container.run(|| UdpSocket::bind("0.0.0.0:0"))??;
    let end = Instant::now() + PACKET_TIMEOUT;
    let mut buffer = [0; 64];
    while Instant::now() < end {
        // An unreachable destination is an error of the next send.
        let _lost = sender.send_to(text.as_bytes(), to);
        match receiver.recv(&mut buffer) {
            Ok(length) if buffer.get(..length) == Some(text.as_bytes()) => return Ok(()),
            // A late packet of the turn before.
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error.into()),
        }
    }
    ensure!(false, "no packet of {text} arrives outside");
    Ok(())
}
