//! Waiting with a time limit, a description, and the last state in the failure message.

use std::time::{Duration, Instant};

/// The interval between two checks of a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Waits until `check` returns a value; its error describes the current state. Panics at the limit.
#[track_caller]
pub fn eventually<T>(condition: &str, limit: Duration, mut check: impl FnMut() -> Result<T, String>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    let condition = condition.to_owned();
    async move {
        let end = Instant::now() + limit;
        loop {
            match check() {
                Ok(value) => return value,
                Err(state) if Instant::now() >= end => {
                    panic!("{caller}: {condition}: not within {} ms; last state: {state}", limit.as_millis())
                }
                Err(_) => tokio::time::sleep(POLL_INTERVAL).await,
            }
        }
    }
}

/// Waits until `check` is true. Panics at the limit.
#[track_caller]
pub fn eventually_true(condition: &str, limit: Duration, mut check: impl FnMut() -> bool) -> impl Future<Output = ()> {
    eventually(condition, limit, move || if check() { Ok(()) } else { Err("the condition is false".to_owned()) })
}

/// The same as [`eventually`] for an asynchronous check. Panics at the limit.
pub async fn eventually_async<T, F: Future<Output = Result<T, String>>>(
    condition: &str,
    limit: Duration,
    mut check: impl FnMut() -> F,
) -> T {
    let end = Instant::now() + limit;
    loop {
        match check().await {
            Ok(value) => return value,
            Err(state) if Instant::now() >= end => {
                panic!("{condition}: not within {} ms; last state: {state}", limit.as_millis())
            }
            Err(_) => tokio::time::sleep(POLL_INTERVAL).await,
        }
    }
}
