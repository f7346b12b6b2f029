//! The harness of the end-to-end tests: labs with guaranteed cleanup, waiting with a deadline, counted traffic, kernel and etcd
//! state.
//!
//! A lab is the result of `overlayctl lab up`. Every test has its own lab with a unique name, so that tests run in parallel. The
//! harness does not touch the machine's own network namespace. A missing program fails the test with advice; it is never skipped.

pub mod bind;
pub mod calls;
pub mod capture;
pub mod churn;
pub mod cluster;
pub mod cni;
pub mod doc_hosts;
pub mod doc_page;
pub mod doc_pages;
pub mod docker;
pub mod dump;
pub mod etcd;
pub mod etcd_gateway;
pub mod event_timer;
pub mod faults;
pub mod http;
pub mod image;
pub mod invalid_values;
pub mod kernel;
pub mod kernel_fault;
pub mod leftovers;
pub mod networks;
pub mod notify;
pub mod output_match;
pub mod packet_builder;
pub mod ping;
pub mod prober;
pub mod process_memory;
pub mod programs;
pub mod proxy;
pub mod recorded_host;
pub mod rules;
pub mod shell;
pub mod synthetic_leases;
pub mod tcp_stream;
pub mod test_lab;
pub mod tmpfs;
pub mod traffic;
pub mod tutorial;
pub mod wait;

use std::fmt::Display;

pub use test_lab::TestLab;
pub use wait::{eventually, eventually_true};

/// Turns an error into a panic with context.
pub trait ExpectContext<T> {
    /// The value, or a panic with the failed action and the reason.
    fn expect_ok(self, context: &str) -> T;
}

impl<T, E: Display> ExpectContext<T> for Result<T, E> {
    #[track_caller]
    fn expect_ok(self, context: &str) -> T {
        match self {
            Ok(value) => value,
            Err(error) => panic!("{context}: {error}"),
        }
    }
}

impl<T> ExpectContext<T> for Option<T> {
    #[track_caller]
    fn expect_ok(self, context: &str) -> T {
        match self {
            Some(value) => value,
            None => panic!("{context}: missing"),
        }
    }
}
