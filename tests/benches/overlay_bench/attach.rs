//! `attach`: attaches and detaches a container, through the agent's socket and by the CNI plugin as a whole process.
//!
//! The reference is Debian's plugins `bridge` and `host-local`, which do the same work (veth pair, bridge port, address, default
//! route).
//!
//! Two hosts of one lab have a real agent each: one without endpoints, one with many. Two namespaces have the reference, with as
//! many containers of its own. Two more have a bridge with as many ports and do only the kernel's unavoidable work: a veth pair
//! with one end as a bridge port that is up. One turn goes through all of them, so that a disturbance of the machine affects all.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use clap::Args;
use overlay_agent::kernel::netns::Netns;
use overlay_agent::kernel::netns_builder::NetnsBuilder;
use overlay_agent::model::api::AttachRequest;
use overlay_agent::model::endpoint::EndpointName;
use overlayctl::client::Client;
use tokio::runtime::Runtime;

use super::bench_lab::BenchLab;
use super::netns_guard::{BRIDGE, NetnsGuard};
use super::progress;
use super::report::{Report, Row};
use super::stats::milliseconds;

/// The directory of the plugins in Debian's package containernetworking-plugins.
const DEBIAN_PLUGINS: &str = "/usr/lib/cni";
/// Goal of the median of a single ADD, in milliseconds.
const MAX_ADD_MS: f64 = 10.0;
/// Goal of an ADD's time relative to the reference's.
const MAX_ADD_RATIO: f64 = 1.0 / 3.0;
/// Goal of an ADD's time with many endpoints relative to one with none. They must be equal, apart from the variation between two
/// equal runs.
const MAX_SCALING_RATIO: f64 = 1.1;
/// Number of concurrent operations.
const CONCURRENCY: usize = 8;
/// Number of competitors: four on each of two hosts.
const COMPETITORS: usize = 8;
/// Initial turns, with cold caches.
const WARM_UP_ROUNDS: usize = 3;

/// Options of the measurement.
#[derive(Debug, Args)]
pub struct AttachArguments {
    /// Turns of each
    #[arg(long, value_name = "K", default_value_t = 100)]
    samples: usize,
    /// Endpoints already on the second host
    #[arg(long, value_name = "N", default_value_t = 200)]
    endpoints: usize,
}

/// The method of attaching.
enum Method<'a> {
    /// The socket, with the client of `overlayctl`, in this process.
    Socket { client: Client, runtime: &'a Runtime },
    /// A plugin, one process per verb.
    Plugin { program: PathBuf, config: String },
    /// Only a veth pair and a bridge port.
    Kernel { setup: NetnsBuilder },
}

/// One method on one host.
struct Competitor<'a> {
    name: &'static str,
    host: Netns,
    method: Method<'a>,
    containers: &'a [ContainerNetns],
}

/// A container's namespace, removed on drop.
pub struct ContainerNetns {
    /// Its name, also the endpoint's.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
}

impl ContainerNetns {
    /// Creates a namespace.
    pub fn new(name: String) -> anyhow::Result<ContainerNetns> {
        let path = Netns::create(&name)?.path().to_owned();
        Ok(ContainerNetns { name, path })
    }

    fn create_many(kind: &str, count: usize) -> anyhow::Result<Vec<ContainerNetns>> {
        (0..count).map(|n| ContainerNetns::new(format!("ovbench-{}-{kind}{n}", std::process::id()))).collect()
    }
}

impl Drop for ContainerNetns {
    fn drop(&mut self) {
        if let Err(error) = Netns::delete(&self.name) {
            eprintln!("overlay-bench: {error}");
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Add,
    Del,
}

impl Competitor<'_> {
    /// Attaches or detaches one container.
    fn execute(&self, verb: Verb, slot: &ContainerNetns) -> anyhow::Result<()> {
        match &self.method {
            Method::Socket { client, runtime } => {
                let name: EndpointName = slot.name.parse()?;
                runtime.block_on(async {
                    match verb {
                        Verb::Add => {
                            let request = AttachRequest { netns: Some(slot.path.clone()), ..AttachRequest::default() };
                            client.attach(&name, &request).await.map(|_| ())
                        }
                        Verb::Del => client.detach(&name).await.map(|_| ()),
                    }
                })?;
                Ok(())
            }
            Method::Plugin { program, config } => run_plugin(program, config, verb, slot),
            Method::Kernel { setup } => {
                // A distinct name for each slot, short enough for an interface.
                let port = format!("k-{}", slot.name.rsplit('-').next().unwrap_or_default());
                let netns = Netns::open(&slot.path)?;
                if verb == Verb::Del {
                    return Ok(setup.delete_link(&port)?);
                }
                setup.add_veth(&port, "eth9", &netns)?;
                setup.set_master(&port, BRIDGE)?;
                Ok(setup.set_up(&port)?)
            }
        }
    }

    /// The same for several slots concurrently; returns the time from the first begin to the last end.
    fn execute_concurrently(&self, verb: Verb, count: usize) -> anyhow::Result<Duration> {
        let barrier = Barrier::new(count);
        let execute_one = |slot: &ContainerNetns| {
            self.host.run(|| {
                barrier.wait();
                let begin = Instant::now();
                self.execute(verb, slot).map(|()| (begin, Instant::now()))
            })
        };
        let times = thread::scope(|scope| {
            let running: Vec<_> = self.containers[..count].iter().map(|slot| scope.spawn(|| execute_one(slot))).collect();
            running
                .into_iter()
                .map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))??.with_context(|| self.name))
                .collect::<anyhow::Result<Vec<_>>>()
        })?;
        let begin = times.iter().map(|(begin, _)| *begin).min().context("nothing was done")?;
        let end = times.iter().map(|(_, end)| *end).max().context("nothing was done")?;
        Ok(end - begin)
    }
}

/// Runs a plugin like a container runtime, in the calling thread's namespace.
fn run_plugin(program: &Path, config: &str, verb: Verb, slot: &ContainerNetns) -> anyhow::Result<()> {
    let command = match verb {
        Verb::Add => "ADD",
        Verb::Del => "DEL",
    };
    let mut child = Command::new(program)
        .env_clear()
        .envs([("CNI_COMMAND", command), ("CNI_CONTAINERID", &slot.name), ("CNI_IFNAME", "eth0"), ("CNI_PATH", DEBIAN_PLUGINS)])
        .env("CNI_NETNS", &slot.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    std::io::Write::write_all(&mut stdin, config.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{} {command}: {}", program.display(), String::from_utf8_lossy(&output.stdout));
    Ok(())
}

/// Samples of each competitor, in milliseconds.
type Samples = Vec<Vec<f64>>;

/// Runs the measurement.
pub fn measure(arguments: &AttachArguments, report: &mut Report) -> anyhow::Result<()> {
    let bridge = Path::new(DEBIAN_PLUGINS).join("bridge");
    ensure!(bridge.is_file(), "{} is needed: apt-get install containernetworking-plugins", bridge.display());
    let overlay_cni = std::env::current_exe()?.with_file_name("overlay-cni");
    ensure!(
        overlay_cni.is_file(),
        "{} is needed: build it with the same profile (cargo build --release --workspace)",
        overlay_cni.display()
    );
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let bench = runtime.block_on(BenchLab::for_containers(2))?;
    let netns_guards = (0..4).map(|_| NetnsGuard::new()).collect::<anyhow::Result<Vec<_>>>()?;
    let data = tempfile::tempdir()?;
    let slots = ContainerNetns::create_many("s", CONCURRENCY)?;
    let mut competitors = Vec::new();
    for (n, host) in bench.lab.hosts().enumerate() {
        let config =
            format!(r#"{{"cniVersion":"1.0.0","name":"bench","type":"overlay-cni","socket":"{}"}}"#, host.socket().display());
        let reference = format!(
            r#"{{"cniVersion":"1.0.0","name":"reference","type":"bridge","bridge":"ref0","isGateway":true,"mtu":1450,
            "ipam":{{"type":"host-local","dataDir":"{}/{n}","ranges":[[{{"subnet":"10.77.0.0/16"}}]],"routes":[{{"dst":"0.0.0.0/0"}}]}}}}"#,
            data.path().display()
        );
        let competitor = |name, host, method| Competitor { name, host, method, containers: &slots };
        let client = host.client();
        competitors.push(competitor("socket", host.netns()?, Method::Socket { client, runtime: &runtime }));
        competitors.push(competitor("overlay-cni", host.netns()?, Method::Plugin { program: overlay_cni.clone(), config }));
        let method = Method::Plugin { program: bridge.clone(), config: reference };
        competitors.push(competitor("reference", netns_guards[n].netns().clone(), method));
        let kernel_guard = &netns_guards[2 + n];
        kernel_guard.add_bridge()?;
        let setup = NetnsBuilder::open(kernel_guard.netns())?;
        competitors.push(competitor("kernel", kernel_guard.netns().clone(), Method::Kernel { setup }));
    }
    progress(&format!("{} endpoints on the second host, and as many of the reference's", arguments.endpoints));
    let preload =
        [ContainerNetns::create_many("p", arguments.endpoints)?, ContainerNetns::create_many("r", arguments.endpoints)?];
    for (competitor, slots) in preloaded(&competitors, &preload) {
        for slot in slots {
            competitor.host.run(|| competitor.execute(Verb::Add, slot))??;
        }
    }
    for count in [1, CONCURRENCY] {
        let turns = if count == 1 { arguments.samples } else { arguments.samples.div_ceil(4) };
        progress(&format!("{count} at once, {turns} turns"));
        let (mut added, mut removed): (Samples, Samples) = (vec![Vec::new(); COMPETITORS], vec![Vec::new(); COMPETITORS]);
        for turn in 0..turns + WARM_UP_ROUNDS {
            for (number, competitor) in competitors.iter().enumerate() {
                let add = competitor.execute_concurrently(Verb::Add, count)?;
                let del = competitor.execute_concurrently(Verb::Del, count)?;
                if turn >= WARM_UP_ROUNDS {
                    added[number].push(milliseconds(add));
                    removed[number].push(milliseconds(del));
                }
            }
        }
        add_rows(report, arguments, count, &added, &removed)?;
    }
    detach_preloaded(&competitors, &preload)
}

/// The competitors with preloaded endpoints on the second host, and these endpoints.
fn preloaded<'a, 'b>(
    competitors: &'a [Competitor<'b>],
    preload: &'a [Vec<ContainerNetns>; 2],
) -> [(&'a Competitor<'b>, &'a [ContainerNetns]); 3] {
    [(&competitors[5], &preload[0]), (&competitors[6], &preload[1]), (&competitors[7], &preload[1])]
}

/// Detaches the preloaded containers, so that no endpoint outlives its namespace.
fn detach_preloaded(competitors: &[Competitor<'_>], preload: &[Vec<ContainerNetns>; 2]) -> anyhow::Result<()> {
    for (competitor, slots) in preloaded(competitors, preload) {
        for slot in slots {
            competitor.host.run(|| competitor.execute(Verb::Del, slot))??;
        }
    }
    Ok(())
}

/// One row per host, verb and method; and the ratio of the host with many endpoints to the one with none.
fn add_rows(
    report: &mut Report,
    arguments: &AttachArguments,
    count: usize,
    added: &Samples,
    removed: &Samples,
) -> anyhow::Result<()> {
    let [empty_socket, empty, empty_ref, empty_kernel, many_socket, many, many_ref, many_kernel] = columns(added)?;
    let removed = columns(removed)?;
    let title = if count == 1 { "one at a time".to_owned() } else { format!("{count} at once, until the last") };
    let hosts = [
        (0, [empty_socket, empty, empty_ref], [removed[0], removed[1], removed[2]]),
        (arguments.endpoints, [many_socket, many, many_ref], [removed[4], removed[5], removed[6]]),
    ];
    for (endpoint_count, adds, dels) in hosts {
        let conditions = format!("{endpoint_count} endpoints, {title}");
        let row = |what: &str, samples: &[f64], reference: &[f64]| {
            Row::new("attach", &conditions, what, "ms", samples)
                .map(|r| r.with_baseline("bridge + host-local", samples, reference))
        };
        report.add(row("attach by the socket", adds[0], adds[2]));
        let add = row("CNI ADD", adds[1], adds[2]).map(|r| r.ratio_goal(MAX_ADD_RATIO));
        report.add(add);
        if count == 1 {
            report.add(Row::new("attach", &conditions, "CNI ADD", "ms", adds[1]).map(|r| r.median_goal(MAX_ADD_MS)));
        }
        report.add(row("detach by the socket", dels[0], dels[2]));
        report.add(row("CNI DEL", dels[1], dels[2]));
    }
    let conditions = format!("{} endpoints, {title}", arguments.endpoints);
    let row = |what: &str, many: &[f64], empty: &[f64]| {
        Row::new("attach", &conditions, what, "ms", many).map(|r| r.with_baseline("0 endpoints", many, empty))
    };
    report.add(row("CNI ADD", many, empty).map(|r| r.ratio_goal(MAX_SCALING_RATIO)));
    report.add(row("of the kernel alone: a pair, a port", many_kernel, empty_kernel));
    Ok(())
}

fn columns(samples: &Samples) -> anyhow::Result<[&[f64]; COMPETITORS]> {
    let all: Vec<&[f64]> = samples.iter().map(Vec::as_slice).collect();
    <[&[f64]; COMPETITORS]>::try_from(all).map_err(|_| anyhow!("each competitor has samples"))
}
