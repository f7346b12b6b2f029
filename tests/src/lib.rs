//! The harness of the stories: labs that are taken down whatever happens, waiting with a deadline, traffic that is counted, the kernel's and
//! etcd's state as a test wants to see it.
//!
//! A lab is what `overlayctl start_lab report_up` makes; every story has its own, with a name of its own, so that stories run side by side. Nothing here
//! touches the machine's own network namespace. What is missing on the machine fails with advice, it never skips.

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
pub mod notify;
pub mod output_match;
pub mod packet_builder;
pub mod ping;
pub mod process_memory;
pub mod programs;
pub mod proxy;
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

/// Turns an error into the end of the test, with what was to be done.
pub trait ExpectContext<T> {
    /// The value, or a panic that says what failed and why.
    fn expect_ok(self, what: &str) -> T;
}

impl<T, E: Display> ExpectContext<T> for Result<T, E> {
    #[track_caller]
    fn expect_ok(self, what: &str) -> T {
        match self {
            Ok(value) => value,
            Err(error) => panic!("{what}: {error}"),
        }
    }
}

impl<T> ExpectContext<T> for Option<T> {
    #[track_caller]
    fn expect_ok(self, what: &str) -> T {
        match self {
            Some(value) => value,
            None => panic!("{what}: there is none"),
        }
    }
}
