//! Repeated writes and deletions of unrelated peers in etcd during a test.
//!
//! One thread, which ends with [`Churn::stop`], or when the churn is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use overlayctl::lab::Lab;

use crate::etcd;

/// Background writes and deletions of leases.
#[derive(Debug)]
pub struct Churn {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<ChurnStats>>,
}

/// Numbers of operations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChurnStats {
    /// Writes and deletions that etcd accepted.
    pub succeeded: u32,
    /// Writes and deletions that etcd rejected or did not answer in time.
    pub failed: u32,
}

/// The lease value of a peer without a host.
pub fn lease(number: u8, mac: u8) -> String {
    format!(
        r#"{{"PublicIP":"10.99.77.{number}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:77:{mac:02x}:{number:02x}"}}}}"#
    )
}

impl Churn {
    /// Starts the churn in the subnets 10.244.240.0 to 10.244.247.0. No host may own one of these, or the test must tolerate it.
    pub fn start(lab: &Lab) -> Churn {
        let stop = Arc::new(AtomicBool::new(false));
        let (lab, thread_stop) = (lab.clone(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut count = ChurnStats::default();
            let mut round = 0u8;
            while !thread_stop.load(Ordering::Relaxed) {
                round = round.wrapping_add(1);
                let number = round % 8;
                let key = etcd::lease_key(&format!("10.244.{}.0-24", 240 + number));
                let value = lease(number + 1, round / 16);
                // Every third operation is a deletion, so that the next write creates the key.
                let output = match round % 3 {
                    0 => etcd::etcdctl(&lab, &["del", "--", &key]),
                    _ => etcd::etcdctl(&lab, &["put", "--", &key, &value]),
                };
                if output.code == Some(0) {
                    count.succeeded += 1;
                } else {
                    count.failed += 1;
                }
            }
            for number in 0..8 {
                etcd::etcdctl(&lab, &["del", "--", &etcd::lease_key(&format!("10.244.{}.0-24", 240 + number))]);
            }
            count
        });
        Churn { stop, thread: Some(thread) }
    }

    /// Stops the churn and deletes its remaining keys.
    pub async fn stop(mut self) -> ChurnStats {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return ChurnStats::default() };
        let joined = tokio::task::spawn_blocking(move || thread.join()).await;
        match joined {
            Ok(Ok(count)) => count,
            other => panic!("unexpected end of the churn thread: {other:?}"),
        }
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}
