//! Waiting: always with a limit, always with what is waited for and how it stood at the end.

use std::time::{Duration, Instant};

/// How often a condition is looked at again.
const POLL: Duration = Duration::from_millis(10);

/// Waits until `look` has a value; its error says how it stands. Panics at the limit.
#[track_caller]
pub fn eventually<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<T, String>) -> impl Future<Output = T> {
    let place = std::panic::Location::caller();
    let what = what.to_owned();
    async move {
        let end = Instant::now() + limit;
        loop {
            match look() {
                Ok(value) => return value,
                Err(state) if Instant::now() >= end => {
                    panic!("{place}: {what}: not within {} ms; at the end: {state}", limit.as_millis())
                }
                Err(_) => tokio::time::sleep(POLL).await,
            }
        }
    }
}

/// Waits until `look` is true. Panics at the limit.
#[track_caller]
pub fn within(what: &str, limit: Duration, mut look: impl FnMut() -> bool) -> impl Future<Output = ()> {
    eventually(what, limit, move || if look() { Ok(()) } else { Err("it is not so".to_owned()) })
}

/// The same with a question that is asked of somebody and awaited. Panics at the limit.
pub async fn eventually_asked<T, F: Future<Output = Result<T, String>>>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> F,
) -> T {
    let end = Instant::now() + limit;
    loop {
        match ask().await {
            Ok(value) => return value,
            Err(state) if Instant::now() >= end => {
                panic!("{what}: not within {} ms; at the end: {state}", limit.as_millis())
            }
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}
