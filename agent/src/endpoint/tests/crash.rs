//! Kills of the agent at each step of attach and detach, and a full disk at each write.

use super::fake_kernel::BlockPoint;
use super::*;

/// Runs `work` until the kernel blocks, then drops the runtime with all its tasks, as a kill would.
fn kill_during(host: &TestHost, work: impl AsyncFnOnce(Endpoints<FakeKernel>)) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let endpoints = host.start(DUAL).await;
        tokio::select! {
            () = work(endpoints) => panic!("the work should have blocked"),
            () = host.kernel.wait_blocked() => {}
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    host.kernel.unblock();
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[test]
fn kill_during_attach_is_cleaned_up_at_restart() {
    for point in [BlockPoint::BeforeDetach, BlockPoint::AfterDetach, BlockPoint::BeforeAttach, BlockPoint::AfterAttach] {
        let host = TestHost::new(&["/ns/a"]);
        host.kernel.block_at(point);
        kill_during(&host, async |endpoints| {
            let _ = endpoints.attach(name("a"), attach_request("/ns/a")).await;
        });
        assert!(host.stored_json().contains("\"attaching\""), "{point:?}: persisted before the kernel's work");
        block_on(async {
            let endpoints = host.start(DUAL).await;
            assert!(endpoints.list().is_empty() && host.kernel.port_specs().is_empty(), "{point:?}");
            assert!(!host.stored_json().contains("\"a\""), "{point:?}");
            endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
        });
    }
}

#[test]
fn kill_during_detach_is_finished_at_restart() {
    for point in [BlockPoint::BeforeDetach, BlockPoint::AfterDetach] {
        let host = TestHost::new(&["/ns/a"]);
        kill_during(&host, async |endpoints| {
            endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
            host.kernel.block_at(point);
            let _ = endpoints.detach(name("a"), false).await;
        });
        block_on(async {
            let endpoints = host.start(DUAL).await;
            assert!(endpoints.list().is_empty() && host.kernel.port_specs().is_empty(), "{point:?}");
        });
    }
}

#[test]
fn corrupt_file_is_quarantined_and_attach_works() {
    let host = TestHost::new(&["/ns/a"]);
    block_on(async {
        let endpoints = host.start(DUAL).await;
        endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
        endpoints.close().await;
    });
    std::fs::write(host.directory.path().join(FILE), &host.stored_json()[..40]).unwrap();
    block_on(async {
        let endpoints = host.start(DUAL).await;
        assert!(endpoints.list().is_empty());
        endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
        assert_eq!(host.kernel.port_specs().len(), 1);
    });
}

/// Makes writes fail: non-empty directories replace the temporary file and the journal.
fn set_disk_full(host: &TestHost, full: bool) {
    let paths = [format!(".{FILE}.tmp"), JOURNAL.to_owned()].map(|name| host.directory.path().join(name));
    for path in paths {
        if full {
            let _ = std::fs::remove_file(&path);
            std::fs::create_dir_all(path.join("full")).unwrap();
        } else {
            std::fs::remove_dir_all(path).unwrap();
        }
    }
}

#[test]
fn full_disk_rejects_attach_but_allows_detach() {
    let host = TestHost::new(&["/ns/a", "/ns/b"]);
    block_on(async {
        let endpoints = host.start(DUAL).await;
        let a = endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
        set_disk_full(&host, true);
        let error = endpoints.attach(name("b"), attach_request("/ns/b")).await.unwrap_err();
        assert!(error.to_string().contains("endpoint b: cannot write"), "{error}");
        assert_eq!(endpoints.list(), vec![a.endpoint]);
        assert_eq!(host.kernel.port_specs().len(), 1);
        let error = endpoints.detach(name("a"), false).await.unwrap_err();
        assert!(error.to_string().contains("endpoint a: cannot write"), "{error}");
        assert!(host.kernel.port_specs().is_empty());
        assert!(endpoints.detach(name("a"), false).await.is_err(), "still not persisted");
        set_disk_full(&host, false);
        assert_eq!(endpoints.detach(name("a"), false).await.unwrap().endpoint, None);
        assert!(!host.stored_json().contains("\"a\""));
    });
}

#[test]
fn disk_full_during_attach_rolls_back() {
    let host = TestHost::new(&["/ns/a"]);
    block_on(async {
        let endpoints = host.start(DUAL).await;
        let gate = host.kernel.block_before_attach();
        let ((), outcome) = tokio::join!(
            async {
                host.kernel.wait_blocked().await;
                assert!(host.stored_json().contains("\"attaching\""));
                set_disk_full(&host, true);
                gate.add_permits(1);
            },
            endpoints.attach(name("a"), attach_request("/ns/a"))
        );
        assert!(matches!(outcome, Err(EndpointError::State { .. })));
        assert!(host.kernel.port_specs().is_empty() && endpoints.list().is_empty() && endpoints.ports().borrow().is_empty());
    });
}

/// The state was lost, but the port still exists: a detach by name removes it, and no other port.
#[test]
fn detach_without_record_removes_leftover_port() {
    let host = TestHost::new(&["/ns/a", "/ns/b"]);
    block_on(async {
        let endpoints = host.start(DUAL).await;
        endpoints.attach(name("a"), attach_request("/ns/a")).await.unwrap();
        endpoints.close().await;
        drop(endpoints);
        std::fs::remove_file(host.directory.path().join(FILE)).unwrap();
        let endpoints = host.start(DUAL).await;
        endpoints.attach(name("b"), attach_request_with("/ns/b", &["10.244.1.77", "fd00:10:244:1::77"])).await.unwrap();
        assert_eq!((endpoints.list().len(), host.kernel.port_specs().len()), (1, 2));
        assert_eq!(endpoints.detach(name("a"), false).await.unwrap().endpoint, None);
        assert_eq!(host.kernel.port_specs().values().map(|spec| spec.netns.to_str().unwrap()).collect::<Vec<_>>(), ["/ns/b"]);
    });
}
