//! Prometheus' text format (version 0.0.4): a page builder and histograms.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Builds the page's text.
pub(super) struct Page(String);

impl Page {
    pub(super) fn new() -> Page {
        Page(String::with_capacity(8 << 10))
    }

    pub(super) fn text(self) -> String {
        self.0
    }

    pub(super) fn line(&mut self, line: &str) {
        self.0.push_str(line);
        self.0.push('\n');
    }

    pub(super) fn header(&mut self, name: &str, help: &str, kind: &str) {
        // Writing to a String cannot fail.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    pub(super) fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.header(name, help, "gauge");
        self.line(&format!("{name} {value}"));
    }

    pub(super) fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.header(name, help, "counter");
        self.line(&format!("{name} {value}"));
    }

    /// A counter with one label. The label's values are our own constants and need no escapes.
    pub(super) fn counters<'a>(&mut self, name: &str, help: &str, label: &str, values: impl IntoIterator<Item = (&'a str, u64)>) {
        self.header(name, help, "counter");
        for (value, count) in values {
            self.line(&format!("{name}{{{label}=\"{value}\"}} {count}"));
        }
    }
}

/// Observations by bucket; values above the last bound count only in `count`.
#[derive(Debug)]
pub(super) struct Histogram<const N: usize> {
    buckets: [AtomicU64; N],
    sum: AtomicU64,
    count: AtomicU64,
}

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        Histogram { buckets: [const { AtomicU64::new(0) }; N], sum: AtomicU64::new(0), count: AtomicU64::new(0) }
    }
}

impl<const N: usize> Histogram<N> {
    pub(super) fn observe(&self, value: u64, bounds: impl IntoIterator<Item = u64>) {
        if let Some((bucket, _)) = self.buckets.iter().zip(bounds).find(|(_, bound)| value <= *bound) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum.fetch_add(value, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// `sum` converts the sum from the observed unit to the metric's unit.
    pub(super) fn render(&self, page: &mut Page, name: &str, help: &str, bounds: [&str; N], sum: impl FnOnce(u64) -> String) {
        page.header(name, help, "histogram");
        self.samples(page, name, "", bounds, sum);
    }

    /// Writes the samples without the header, so that a family can have several histograms.
    ///
    /// `label` is `name="value"`, or empty.
    pub(super) fn samples(&self, page: &mut Page, name: &str, label: &str, bounds: [&str; N], sum: impl FnOnce(u64) -> String) {
        let (label_prefix, labels) =
            if label.is_empty() { (String::new(), String::new()) } else { (format!("{label},"), format!("{{{label}}}")) };
        let mut cumulative = 0;
        for (bucket, bound) in self.buckets.iter().zip(bounds) {
            cumulative += bucket.load(Ordering::Relaxed);
            page.line(&format!("{name}_bucket{{{label_prefix}le=\"{bound}\"}} {cumulative}"));
        }
        // Read after the buckets and at least their sum, because an observation may run concurrently.
        let count = self.count.load(Ordering::Relaxed).max(cumulative);
        page.line(&format!("{name}_bucket{{{label_prefix}le=\"+Inf\"}} {count}"));
        page.line(&format!("{name}_sum{labels} {}", sum(self.sum.load(Ordering::Relaxed))));
        page.line(&format!("{name}_count{labels} {count}"));
    }
}

/// Nanoseconds as seconds.
pub(super) fn seconds(nanoseconds: u64) -> String {
    format!("{}.{:09}", nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000)
}

pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
