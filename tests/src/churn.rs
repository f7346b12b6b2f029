//! Unrelated peers that come, change and go in the store, again and again, while a story goes on.
//!
//! One thread, which ends with [`Churn::stop_agent`], or when the churn is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use overlayctl::lab::Lab;

use crate::etcd;

/// Writes and deletions that come and go.
#[derive(Debug)]
pub struct Churn {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<ChurnStats>>,
}

/// How much there was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChurnStats {
    /// Writes and deletions that etcd took.
    pub succeeded: u32,
    /// Those that it did not take in time, or refused.
    pub failed: u32,
}

/// The value of a peer that no host is.
pub fn lease(number: u8, mac: u8) -> String {
    format!(
        r#"{{"PublicIP":"10.99.77.{number}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:77:{mac:02x}:{number:02x}"}}}}"#
    )
}

impl Churn {
    /// Begins: subnets of the block 10.244.240.0 to 10.244.247.0, of which the caller knows that no host has one, or does not mind.
    pub fn start(lab: &Lab) -> Churn {
        let stop = Arc::new(AtomicBool::new(false));
        let (lab, ended) = (lab.clone(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut count = ChurnStats::default();
            let mut round = 0u8;
            while !ended.load(Ordering::Relaxed) {
                round = round.wrapping_add(1);
                let number = round % 8;
                let key = etcd::lease_key(&format!("10.244.{}.0-24", 240 + number));
                let value = lease(number + 1, round / 16);
                // Every third time it goes, so that next time it comes anew.
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

    /// Ends it and removes what is left of it.
    pub async fn stop(mut self) -> ChurnStats {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return ChurnStats::default() };
        let joined = tokio::task::spawn_blocking(move || thread.join()).await;
        match joined {
            Ok(Ok(count)) => count,
            other => panic!("the churn ended otherwise: {other:?}"),
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
