//! The lab's private etcd: Debian's program with its own data directory, in the switch's namespace, so that no other process
//! shares its ports.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use overlay_agent::model::NetworkChange;
use overlay_agent::store::{NetworkError, WriteKind};

use super::layout::{ETCD_PORT, ETCD_PREFIX, etcd_address, etcd_url, isolated_network};
use super::process::{ProcessId, ended_error, log_tail, start as start_process};
use super::{Lab, LabError};
use crate::etcd::{EtcdArgs, EtcdError};

/// etcd's port for other members; the lab has none.
const PEER_PORT: u16 = 2380;

/// Time for etcd to answer: usually a fraction of a second, more on a busy machine with a slow disk.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// Finds etcd's program.
pub fn find_program() -> Result<PathBuf, LabError> {
    find_in_path("etcd").ok_or_else(|| LabError::Program {
        program: "etcd".to_owned(),
        remedy: "apt-get install etcd-server (the lab runs its own; no service is needed)".to_owned(),
    })
}

/// Finds a program in PATH.
pub fn find_in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let default_dirs = ["/usr/local/bin", "/usr/bin", "/usr/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(default_dirs).map(|dir| dir.join(name)).find(|p| p.is_file())
}

/// PID file of etcd.
pub fn pid_file(dir: &Path) -> PathBuf {
    dir.join("etcd.pid")
}

fn log_file(dir: &Path) -> PathBuf {
    dir.join("etcd.log")
}

/// Starts etcd and waits until it answers. A stopped etcd of the lab restarts with its data.
pub async fn start(lab: &Lab) -> Result<ProcessId, LabError> {
    let urls = |port: u16| lab.layout().families().map(|family| etcd_url(family, port)).collect::<Vec<_>>().join(",");
    let data = lab.dir().join("etcd");
    let mut command = Command::new(find_program()?);
    for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("ETCD_")) {
        command.env_remove(name);
    }
    if cfg!(not(target_arch = "x86_64")) {
        // etcd 3.4 requires this variable on every other architecture.
        command.env("ETCD_UNSUPPORTED_ARCH", if cfg!(target_arch = "aarch64") { "arm64" } else { std::env::consts::ARCH });
    }
    command.args(["--name", "lab", "--logger", "zap", "--log-outputs", "stderr", "--data-dir"]).arg(data);
    command.args(["--listen-client-urls", &urls(ETCD_PORT), "--advertise-client-urls", &urls(ETCD_PORT)]);
    command.args(["--listen-peer-urls", &urls(PEER_PORT), "--initial-advertise-peer-urls", &urls(PEER_PORT)]);
    let cluster: Vec<String> = lab.layout().families().map(|family| format!("lab={}", etcd_url(family, PEER_PORT))).collect();
    command.args(["--initial-cluster", &cluster.join(","), "--initial-cluster-state", "new"]);
    let netns = lab.netns("net")?;
    let id = start_process(command, Some(&netns), &log_file(lab.dir()), &pid_file(lab.dir()))?;
    wait_ready(lab, id).await?;
    Ok(id)
}

async fn wait_ready(lab: &Lab, id: ProcessId) -> Result<(), LabError> {
    let netns = lab.netns("net")?;
    let addresses: Vec<SocketAddr> = lab.layout().families().map(|f| SocketAddr::new(etcd_address(f), ETCD_PORT)).collect();
    let end = Instant::now() + READY_TIMEOUT;
    loop {
        if netns.run(|| addresses.iter().all(|address| is_healthy(*address)))? {
            return Ok(());
        }
        if !id.is_alive() {
            return Err(ended_error("etcd", &log_file(lab.dir())));
        }
        if Instant::now() >= end {
            let detail = format!("the end of its log:\n{}", log_tail(&log_file(lab.dir())));
            return Err(LabError::TimedOut { what: "etcd does not answer".to_owned(), limit: READY_TIMEOUT, detail });
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whether etcd reports itself healthy. Blocks for a second at most.
fn is_healthy(address: SocketAddr) -> bool {
    let limit = Duration::from_secs(1);
    let query_health = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(format!("GET /health HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.take(4096).read_to_string(&mut answer)?;
        Ok(answer)
    };
    query_health().is_ok_and(|answer| answer.contains("\"health\":\"true\""))
}

/// Flags that reach this etcd from inside the lab.
pub fn etcd_args(lab: &Lab) -> EtcdArgs {
    EtcdArgs::without_tls(lab.layout().etcd_endpoints(), ETCD_PREFIX)
}

/// Writes the network configuration if there is none, and the records of the isolated networks.
pub async fn configure(lab: &Lab) -> Result<(), LabError> {
    let arguments = etcd_args(lab);
    let layout = lab.layout();
    let isolated = NetworkChange {
        cidrs: layout.families().map(|family| (family, isolated_network(family))).collect(),
        isolated: Some(true),
        ..NetworkChange::default()
    };
    in_switch_namespace(lab, || async move {
        if arguments.read_config().await?.is_none() {
            arguments.put_config(&layout.config, None).await?;
        }
        for name in &layout.isolated {
            match arguments.write_network(name, WriteKind::Create, &isolated).await {
                Ok(_) | Err(EtcdError::Network(NetworkError::Exists { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    })?
    .map_err(LabError::from)
}

/// Runs requests to etcd inside the switch's namespace, on a separate thread and runtime: sockets belong to the namespace of the
/// thread that opens them.
fn in_switch_namespace<T: Send, F: Future<Output = Result<T, EtcdError>>>(
    lab: &Lab,
    work: impl FnOnce() -> F + Send,
) -> Result<Result<T, EtcdError>, LabError> {
    let netns = lab.netns("net")?;
    let run_client = || -> Result<Result<T, EtcdError>, std::io::Error> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(work()))
    };
    netns.run(run_client)?.map_err(|source| LabError::Spawn { program: "a thread for requests to etcd".to_owned(), source })
}
