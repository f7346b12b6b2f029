//! What the direct way costs beside a process of `nft` for the same. Prints figures; the bound is wide.

use std::time::{Duration, Instant};

use super::*;
use crate::kernel::nft::Nft;

fn median(runs: usize, mut body: impl FnMut()) -> Duration {
    let mut times: Vec<Duration> = (0..runs)
        .map(|_| {
            let begin = Instant::now();
            body();
            begin.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[runs / 2]
}

#[test]
fn faster_than_a_process() {
    in_namespace(|| {
        let mut nft = Nft::open().expect("open");
        let rules = rules();
        let script = format!("add table inet overlayd\ndelete table inet overlayd\n{rules}");
        let process_set = median(31, || drop(super::nft(&script)));
        let process_list = median(31, || drop(output("nft", &["list", "table", "inet", "overlayd"], "")));
        let set = median(301, || nft.set_ruleset(&rules).expect("set"));
        let dump = median(301, || drop(nft.dump().expect("dump")));
        println!("set: {set:?}, `nft -f -`: {process_set:?}; dump: {dump:?}, `nft list table`: {process_list:?}");
        assert!(dump < process_list, "{dump:?} {process_list:?}");
    });
}
