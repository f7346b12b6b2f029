//! Watches sent packets: at the host's rules and at its interfaces, each in order.
//!
//! Two threads listen, one to the nf_tables trace and one at the interfaces; both end with [`watch`]. The kernel removes the
//! table that marks packets when this process ends, however it ends.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use overlay_agent::kernel::icmp::PingSocket;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::trace::{Capture, CaptureFilter, CapturedPacket, KernelQuery, TraceEvent, TraceMonitor, TraceRead};
use overlay_agent::model::Family;

use super::{Live, Observation, Trace, TraceError};

/// Interval at which the listeners check whether to stop.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Silence after the first packet that ends the watch.
const QUIET_PERIOD: Duration = Duration::from_millis(1500);
/// Maximum number of kept events: a watch covers a few packets.
const MAX_EVENTS: usize = 400;
/// Capacity of the channel between the listeners and the reader.
const CHANNEL_CAPACITY: usize = 1024;

/// Options of a watch.
#[derive(Debug, Clone)]
pub struct WatchOptions {
    /// Maximum time to wait for a packet.
    pub wait: Duration,
    /// Whether to send one packet.
    pub send: bool,
    /// Source namespace, if the source is a container of this host.
    pub netns: Option<PathBuf>,
}

enum Event {
    Rules(Vec<TraceEvent>),
    Interface(CapturedPacket),
    Lost,
    Failed(TraceError),
}

/// Watches packets of the trace's flow. Must run on a thread that may block, in the host's namespace.
///
/// # Errors
/// No permission, a kernel older than 5.12, or a failure to send the packet.
pub fn watch(trace: &Trace, watch: &WatchOptions) -> Result<Live, TraceError> {
    let mut pairs: Vec<(IpAddr, IpAddr)> = Vec::new();
    for (source, destination) in &trace.addresses_seen {
        for pair in [(*source, *destination), (*destination, *source)] {
            if !pairs.contains(&pair) && !source.is_unspecified() {
                pairs.push(pair);
            }
        }
    }
    let rules = TraceMonitor::open(&pairs, POLL_INTERVAL)?;
    let capture = Capture::open(CaptureFilter { pairs, port: trace.tunnel_port }, POLL_INTERVAL)?;
    let names: BTreeMap<u32, String> = KernelQuery::open()?.links()?.into_iter().map(|link| (link.index, link.name)).collect();
    let stop = AtomicBool::new(false);
    let start = Instant::now();
    let (sender, events) = sync_channel(CHANNEL_CAPACITY);
    let collected = std::thread::scope(|scope| {
        let rules_sender = sender.clone();
        scope.spawn(|| listen_to_rules(rules, rules_sender, &stop));
        scope.spawn(|| listen_at_interfaces(capture, sender, &stop));
        let sent = if watch.send { send(trace, watch.netns.clone()) } else { Ok(None) };
        let collected = sent.and_then(|socket| {
            let collected = collect(&events, watch.wait, start);
            drop(socket);
            collected
        });
        stop.store(true, Ordering::Relaxed);
        // Unblocks a listener that waits for room in the channel.
        drop(events);
        collected
    })?;
    let (events, lost) = collected;
    Ok(summarise(trace, events, lost, &names))
}

fn listen_to_rules(mut rules: TraceMonitor, sender: SyncSender<(Instant, Event)>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let event = match rules.wait() {
            Ok(TraceRead::Timeout) => continue,
            Ok(TraceRead::Events(trace_events)) => Event::Rules(trace_events),
            Ok(TraceRead::Lost) => Event::Lost,
            Err(error) => Event::Failed(error.into()),
        };
        let is_failure = matches!(event, Event::Failed(_));
        if sender.send((Instant::now(), event)).is_err() || is_failure {
            return;
        }
    }
}

fn listen_at_interfaces(mut capture: Capture, sender: SyncSender<(Instant, Event)>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let event = match capture.wait() {
            Ok(None) => continue,
            Ok(Some(captured)) => Event::Interface(captured),
            Err(error) => Event::Failed(error.into()),
        };
        let is_failure = matches!(event, Event::Failed(_));
        if sender.send((Instant::now(), event)).is_err() || is_failure {
            return;
        }
    }
}

/// Socket of a sent packet, kept open until its answer.
type OpenSocket = Box<dyn std::any::Any + Send>;

/// Sends one packet from the source's namespace.
fn send(trace: &Trace, netns: Option<PathBuf>) -> Result<Option<OpenSocket>, TraceError> {
    let (to, port, protocol) = (trace.to.address, trace.port.unwrap_or(0), trace.protocol.clone());
    let from = trace.from.address;
    let work = move || -> Result<OpenSocket, TraceError> {
        let failed = |error: std::io::Error| TraceError::Target { message: format!("cannot send a packet to {to}: {error}") };
        Ok(match protocol.as_str() {
            "icmp" => {
                let echo = PingSocket::open(Family::of(to), u64::from(std::process::id()) << 32 | 1, Some(POLL_INTERVAL))?;
                echo.send(to, 1).map_err(failed)?;
                Box::new(echo)
            }
            // The watch shows whether it is accepted.
            "tcp" => Box::new(TcpStream::connect_timeout(&SocketAddr::new(to, port), 5 * POLL_INTERVAL).ok()),
            _ => {
                let socket = UdpSocket::bind(SocketAddr::new(Family::of(to).unspecified(), 0)).map_err(failed)?;
                socket.send_to(b"overlayctl trace", SocketAddr::new(to, port)).map_err(failed)?;
                Box::new(socket)
            }
        })
    };
    match netns {
        Some(path) => Ok(Some(Netns::open(path)?.run(work)??)),
        None if KernelQuery::open()?.addresses(0)?.contains(&from) => Ok(Some(work()?)),
        None => Err(TraceError::Target {
            message: format!(
                "{from} is not on this host: --send needs this host or one of its containers as source; without --send the watch waits for a packet"
            ),
        }),
    }
}

type Events = Vec<Event>;

fn collect(events: &Receiver<(Instant, Event)>, wait: Duration, start: Instant) -> Result<(Events, bool), TraceError> {
    let (mut all, mut lost) = (Vec::new(), false);
    let mut end = start + wait;
    let mut count = 0;
    loop {
        match events.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok((_, Event::Failed(error))) => return Err(error),
            Ok((_, Event::Lost)) => lost = true,
            Ok((at, event)) => {
                count += match &event {
                    Event::Rules(trace_events) => trace_events.len(),
                    _ => 1,
                };
                if count > MAX_EVENTS {
                    return Ok((all, true));
                }
                if count > 0 {
                    end = (start + wait).min(at + QUIET_PERIOD);
                }
                all.push(event);
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok((all, lost)),
        }
    }
}

fn summarise(trace: &Trace, events: Events, lost: bool, names: &BTreeMap<u32, String>) -> Live {
    let mut live = Live { lost, ..Live::default() };
    let name = |index: u32| names.get(&index).cloned().unwrap_or_else(|| format!("interface {index}"));
    let (mut drop_location, mut last) = (None, None);
    for event in events {
        match event {
            Event::Interface(captured) => {
                let request = trace.addresses_seen.contains(&(captured.source, captured.destination));
                live.answered |= !request;
                let tunnel = captured.tunnel.map(|(from, to)| format!(", in VXLAN from {from} to {to}")).unwrap_or_default();
                let direction = if captured.outgoing { "out" } else { "in" };
                let interface = name(captured.interface);
                if request {
                    last = Some(interface.clone());
                }
                live.interfaces.push(Observation {
                    packet: if request { "request" } else { "reply" }.to_owned(),
                    place: interface,
                    what: format!("{direction}: {} > {}{tunnel}", captured.source, captured.destination),
                });
            }
            Event::Rules(trace_events) => {
                // A chain that ends without a verdict has a policy event next.
                for trace_event in
                    trace_events.into_iter().filter(|s| s.handle.is_some() || matches!(s.verdict.as_str(), "accept" | "drop"))
                {
                    let chain = format!("{} {} {}", trace_event.family, trace_event.table, trace_event.chain);
                    let rule = trace_event.handle.map_or_else(|| "policy".to_owned(), |handle| format!("rule {handle}"));
                    if trace_event.verdict == "drop" {
                        drop_location = Some(format!("{rule} of chain {chain}"));
                    }
                    live.rules.push(Observation {
                        packet: format!("{:x}", trace_event.packet),
                        place: chain,
                        what: format!("{rule}: {}", trace_event.verdict),
                    });
                }
            }
            Event::Lost | Event::Failed(_) => {}
        }
    }
    live.dropped = drop_location.is_some();
    live.summary = match (&drop_location, live.answered, last) {
        (Some(location), ..) => format!("dropped by {location}"),
        (None, true, _) => "a packet passed, and an answer came back".to_owned(),
        (None, false, Some(last)) => format!("last seen at {last}; no answer came back"),
        (None, false, None) => "no packet was seen".to_owned(),
    };
    live
}
