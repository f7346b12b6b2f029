//! Waiting: always with a limit, always with what is waited for and how it stood at the end.

use std::time::{Duration, Instant};

/// How often a condition is looked at again.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Waits until `look` has a value; its error says how it stands. Panics at the limit.
#[track_caller]
pub fn eventually<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Result<T, String>) -> impl Future<Output = T> {
    let place = std::panic::Location::caller();
    let what = what.to_owned();
    async move {
        let end = Instant::now() + limit;
        loop {
            match check() {
                Ok(value) => return value,
                Err(state) if Instant::now() >= end => {
                    panic!("{place}: {what}: not within {} ms; at the end: {state}", limit.as_millis())
                }
                Err(_) => tokio::time::sleep(POLL_INTERVAL).await,
            }
        }
    }
}

/// Waits until `look` is true. Panics at the limit.
#[track_caller]
pub fn eventually_true(what: &str, limit: Duration, mut check: impl FnMut() -> bool) -> impl Future<Output = ()> {
    eventually(what, limit, move || if check() { Ok(()) } else { Err("it is not so".to_owned()) })
}

/// The same with a question that is asked of somebody and awaited. Panics at the limit.
pub async fn eventually_async<T, F: Future<Output = Result<T, String>>>(
    what: &str,
    limit: Duration,
    mut check: impl FnMut() -> F,
) -> T {
    let end = Instant::now() + limit;
    loop {
        match check().await {
            Ok(value) => return value,
            Err(state) if Instant::now() >= end => {
                panic!("{what}: not within {} ms; at the end: {state}", limit.as_millis())
            }
            Err(_) => tokio::time::sleep(POLL_INTERVAL).await,
        }
    }
}
