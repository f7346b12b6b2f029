//! The harness of the stories: labs that are taken down whatever happens, waiting with a deadline, traffic that is counted, the kernel's and
//! etcd's state as a test wants to see it.
//!
//! A lab is what `overlayctl lab up` makes; every story has its own, with a name of its own, so that stories run side by side. Nothing here
//! touches the machine's own network namespace. What is missing on the machine fails with advice, it never skips.

pub mod capture;
pub mod churn;
pub mod cluster;
pub mod cni;
pub mod craft;
pub mod damage;
pub mod docker;
pub mod dump;
pub mod etcd;
pub mod faults;
pub mod flow;
pub mod gateway;
pub mod http;
pub mod image;
pub mod junk;
pub mod kernel;
pub mod left;
pub mod machines;
pub mod memory;
pub mod notify;
pub mod page;
pub mod pages;
pub mod peers;
pub mod programs;
pub mod proxy;
pub mod rules;
pub mod shell;
pub mod shown;
pub mod stopwatch;
pub mod story;
pub mod traffic;
pub mod transfer;
pub mod tutorial;
pub mod volume;
pub mod wait;

use std::fmt::Display;

pub use story::Story;
pub use wait::{eventually, within};

/// Turns an error into the end of the test, with what was to be done.
pub trait Must<T> {
    /// The value, or a panic that says what failed and why.
    fn must(self, what: &str) -> T;
}

impl<T, E: Display> Must<T> for Result<T, E> {
    #[track_caller]
    fn must(self, what: &str) -> T {
        match self {
            Ok(value) => value,
            Err(error) => panic!("{what}: {error}"),
        }
    }
}

impl<T> Must<T> for Option<T> {
    #[track_caller]
    fn must(self, what: &str) -> T {
        match self {
            Some(value) => value,
            None => panic!("{what}: there is none"),
        }
    }
}
