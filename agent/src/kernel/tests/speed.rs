//! How fast peers are programmed, beside the raw limit. Not part of the ordinary run: the figures mean something only in a release build on an
//! otherwise idle machine. `NETLINK_LIMIT` names the program of the raw limit; its line is printed as it is.
//!
//!     NETLINK_LIMIT=/tmp/netlink_limit cargo test --release -p overlay-agent --lib speed -- --ignored --nocapture

use std::time::{Duration, Instant};

use super::support::*;
use crate::kernel::KernelOptions;
use crate::model::Family;
use crate::plan::DataPath;

const PEERS: u32 = 10_000;
const ROUNDS: usize = 200;

/// Time that this thread has had a processor: what remains comparable on a busy machine. The test's runtime has one thread.
fn cpu_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    Duration::from_nanos(text.split(' ').next().expect("a number").parse().expect("nanoseconds"))
}

#[test]
#[ignore = "a measurement: run it in a release build"]
fn ten_thousand_peers() {
    let limit = std::env::var("NETLINK_LIMIT").ok();
    for _ in 0..5 {
        on_host("limit", KernelOptions::default(), async |host| {
            host.make_devices().await;
            host.stop_monitor();
            if let Some(program) = &limit {
                let raw = format!("time {program} {PEERS} ovx.1 200 nexthop");
                let timed =
                    std::process::Command::new("bash").env("TIMEFORMAT", "%U + %S").args(["-c", &raw]).output().expect("bash");
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
                eprintln!("raw: {}; CPU {} s", text(&timed.stdout), text(&timed.stderr));
            }
        });
        for (what, monitored) in [("ours", false), ("ours, monitored", true)] {
            on_host("speed", KernelOptions::default(), async |host| {
                host.make_devices().await;
                if !monitored {
                    host.stop_monitor();
                }
                let batch = peers(Family::V4, 0..PEERS, true);
                let (begun, cpu) = (Instant::now(), cpu_time());
                host.apply(&batch).await;
                let (set, cpu) = (begun.elapsed(), cpu_time() - cpu);
                let again = Instant::now();
                host.apply(&batch).await;
                let again = again.elapsed();
                let begun = Instant::now();
                let state = host.kernel.dump().await.expect("a dump");
                let dumped = begun.elapsed();
                assert!(state.len() > batch.len());
                let gone = removal(&batch);
                let begun = Instant::now();
                host.apply(&gone).await;
                eprintln!(
                    "{what:16} set {set:?} (CPU {cpu:?}), set again {again:?}, dump {dumped:?}, delete {:?}",
                    begun.elapsed()
                );
            });
        }
    }
}

#[test]
#[ignore = "a measurement: run it in a release build"]
fn a_container() {
    use crate::kernel::netns::named_path;
    use crate::model::Mac;
    use crate::plan::{ContainerPath, Plug};

    for threads in [0, 2] {
        let container = Scratch::new("ctrspeed");
        on_threaded_host("plugspeed", KernelOptions::default(), threads, async |host| {
            host.make_devices().await;
            let plugger = host.kernel.plugger();
            let plug = Plug {
                netns: named_path(container.name()).expect("a path"),
                interface: "eth0".to_owned(),
                host_interface: "ove1".to_owned(),
                bridge: bridge(),
                mac: Mac([2, 0, 0, 0, 2, 2]),
                mtu: 1430,
                addresses: vec!["10.244.0.2/24".parse().expect("address"), "fd00:244::2/64".parse().expect("address")],
                gateways: vec![ip("10.244.0.1"), ip("fd00:244::1")],
            };
            let (mut plug_times, mut again_times, mut unplug_times) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                let begun = Instant::now();
                plugger.plug(&plug).await.expect("plugged");
                plug_times.push(begun.elapsed());
                let begun = Instant::now();
                plugger.plug(&plug).await.expect("again");
                again_times.push(begun.elapsed());
                let begun = Instant::now();
                plugger.unplug("ove1").await.expect("unplugged");
                unplug_times.push(begun.elapsed());
            }
            for (what, times) in [("plug", &mut plug_times), ("plug again", &mut again_times), ("unplug", &mut unplug_times)] {
                times.sort();
                eprintln!(
                    "{threads} threads: {what:10} median of {ROUNDS}: {:?}, slowest {:?}",
                    times[ROUNDS / 2],
                    times[ROUNDS - 1]
                );
            }
        });
    }
}
