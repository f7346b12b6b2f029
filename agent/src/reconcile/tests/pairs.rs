//! The end of a veth pair that another namespace's reconciler creates.

use super::*;
use crate::plan::contribution::{Contribution, EntryChange};

#[tokio::test]
async fn arrival_of_pair_ends_the_wait_for_it() {
    let kernel = FakeKernel::default();
    let device = Device::transit(Vni::DEFAULT);
    let key = Key::Link(device.name().into());
    let end = |up| {
        let state = LinkState { kind: LinkKind::Pair(None), mac: None, mtu: 1400, up, master: None, hairpin: false };
        Value::Link(Box::new(state))
    };
    let address = Key::Address(device, "169.254.64.0/31".parse().expect("an address"));
    kernel.lock().failing_keys.insert(key.clone());
    let settings = Settings {
        namespace: NamespaceName::Host,
        nexthop_objects: true,
        resync: Duration::from_secs(3600),
        probe_address: None,
    };
    let metrics = Arc::new(Metrics::new());
    let mut reconciler = Reconciler::new(settings, kernel.clone(), FakeStateStore::default(), metrics);
    let change = EntryChange::Replace(vec![(key.clone(), end(true)), (address.clone(), Value::Address)]);
    let network = NetworkName::default();
    reconciler.fold_network(ReconcilerInput::Contribution(Box::new(Contribution {
        network,
        run: 0,
        sequence: 1,
        shared: None,
        change,
    })));
    let batch = reconciler.plan();
    reconciler.apply_due(batch, Instant::now()).await;
    assert!(reconciler.retries.is_backing_off(&key, Instant::now()), "there is no such link yet");

    {
        let mut kernel = kernel.lock();
        kernel.failing_keys.clear();
        kernel.state.insert(key.clone(), end(false));
    }
    reconciler.fold_kernel(KernelEvent::Changed(vec![(key.clone(), Some(end(false)))]));
    for _ in 0..2 {
        let batch = reconciler.plan();
        reconciler.apply_due(batch, Instant::now()).await;
    }
    let kernel = kernel.lock();
    assert_eq!(kernel.state.get(&key), Some(&end(true)), "set at once");
    assert_eq!(kernel.state.get(&address), Some(&Value::Address), "with its address");
    assert!(reconciler.retries.is_empty());
}
