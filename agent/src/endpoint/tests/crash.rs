//! The agent is killed at each step of an attach and a detach; the disk is full at each writing.

use super::kernel::Point;
use super::*;

/// Runs on a runtime that is then torn down with everything on it, as a kill does.
fn killed_during(host: &Host, work: impl AsyncFnOnce(Endpoints<FakeKernel>)) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let endpoints = host.start(DUAL).await;
        let reached = async {
            while !host.kernel.reached() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            () = work(endpoints) => panic!("the work was to hang"),
            outcome = tokio::time::timeout(Duration::from_secs(20), reached) => outcome.expect("the point is reached"),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    host.kernel.hang_nowhere();
}

fn after<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[test]
fn a_kill_during_an_attach_leaves_nothing_after_the_next_start() {
    for point in [Point::BeforeUnplug, Point::AfterUnplug, Point::BeforePlug, Point::AfterPlug] {
        let host = Host::new(&["/ns/a"]);
        host.kernel.hang_at(point);
        killed_during(&host, async |endpoints| {
            let _ = endpoints.attach(name("a"), ask("/ns/a")).await;
        });
        assert!(host.file().contains("\"attaching\""), "{point:?}: written down before the kernel's work");
        after(async {
            let endpoints = host.start(DUAL).await;
            assert!(endpoints.list().is_empty() && host.kernel.plugs().is_empty(), "{point:?}");
            assert!(!host.file().contains("\"a\""), "{point:?}");
            endpoints.attach(name("a"), ask("/ns/a")).await.unwrap();
        });
    }
}

#[test]
fn a_kill_during_a_detach_is_finished_at_the_next_start() {
    for point in [Point::BeforeUnplug, Point::AfterUnplug] {
        let host = Host::new(&["/ns/a"]);
        killed_during(&host, async |endpoints| {
            endpoints.attach(name("a"), ask("/ns/a")).await.unwrap();
            host.kernel.hang_at(point);
            let _ = endpoints.detach(name("a"), false).await;
        });
        after(async {
            let endpoints = host.start(DUAL).await;
            assert!(endpoints.list().is_empty() && host.kernel.plugs().is_empty(), "{point:?}");
        });
    }
}

#[test]
fn a_torn_file_is_set_aside_and_what_the_kernel_still_has_does_not_stand_in_the_way() {
    let host = Host::new(&["/ns/a"]);
    after(async {
        let endpoints = host.start(DUAL).await;
        endpoints.attach(name("a"), ask("/ns/a")).await.unwrap();
        endpoints.close().await;
    });
    std::fs::write(host.directory.path().join(FILE), &host.file()[..40]).unwrap();
    after(async {
        let endpoints = host.start(DUAL).await;
        assert!(endpoints.list().is_empty());
        endpoints.attach(name("a"), ask("/ns/a")).await.unwrap();
        assert_eq!(host.kernel.plugs().len(), 1);
    });
}

/// Makes writing fail: the places of the temporary file and of the journal are taken by directories that are not empty.
fn disk(host: &Host, full: bool) {
    let places = [format!(".{FILE}.tmp"), JOURNAL.to_owned()].map(|name| host.directory.path().join(name));
    for place in places {
        if full {
            let _ = std::fs::remove_file(&place);
            std::fs::create_dir_all(place.join("full")).unwrap();
        } else {
            std::fs::remove_dir_all(place).unwrap();
        }
    }
}

#[test]
fn where_nothing_can_be_written_nothing_is_attached_and_a_detach_still_unplugs() {
    let host = Host::new(&["/ns/a", "/ns/b"]);
    after(async {
        let endpoints = host.start(DUAL).await;
        let a = endpoints.attach(name("a"), ask("/ns/a")).await.unwrap();
        disk(&host, true);
        let error = endpoints.attach(name("b"), ask("/ns/b")).await.unwrap_err();
        assert!(error.to_string().contains("endpoint b: cannot write"), "{error}");
        assert_eq!(endpoints.list(), vec![a.endpoint]);
        assert_eq!(host.kernel.plugs().len(), 1);
        let error = endpoints.detach(name("a"), false).await.unwrap_err();
        assert!(error.to_string().contains("endpoint a: cannot write"), "{error}");
        assert!(host.kernel.plugs().is_empty());
        assert!(endpoints.detach(name("a"), false).await.is_err(), "still not written down");
        disk(&host, false);
        assert_eq!(endpoints.detach(name("a"), false).await.unwrap().endpoint, None);
        assert!(!host.file().contains("\"a\""));
    });
}

#[test]
fn a_disk_that_fills_while_the_kernel_works_takes_the_attach_back() {
    let host = Host::new(&["/ns/a"]);
    after(async {
        let endpoints = host.start(DUAL).await;
        let gate = host.kernel.hang_before_plug();
        let ((), outcome) = tokio::join!(
            async {
                while !host.file().contains("\"attaching\"") {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                disk(&host, true);
                gate.add_permits(1);
            },
            endpoints.attach(name("a"), ask("/ns/a"))
        );
        assert!(matches!(outcome, Err(EndpointError::State { .. })));
        assert!(host.kernel.plugs().is_empty() && endpoints.list().is_empty() && endpoints.plugged().borrow().is_empty());
    });
}

/// The state was lost, the kernel's part was not: the one who made it can still be rid of it, and of nobody else's.
#[test]
fn a_detach_removes_what_a_lost_state_left() {
    let host = Host::new(&["/ns/a", "/ns/b"]);
    after(async {
        let endpoints = host.start(DUAL).await;
        endpoints.attach(name("a"), ask("/ns/a")).await.unwrap();
        endpoints.close().await;
        drop(endpoints);
        std::fs::remove_file(host.directory.path().join(FILE)).unwrap();
        let endpoints = host.start(DUAL).await;
        endpoints.attach(name("b"), ask_for("/ns/b", &["10.244.1.77", "fd00:10:244:1::77"])).await.unwrap();
        assert_eq!((endpoints.list().len(), host.kernel.plugs().len()), (1, 2));
        assert_eq!(endpoints.detach(name("a"), false).await.unwrap().endpoint, None);
        assert_eq!(host.kernel.plugs().values().map(|plug| plug.netns.to_str().unwrap()).collect::<Vec<_>>(), ["/ns/b"]);
    });
}
