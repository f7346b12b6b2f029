//! Local entries: the data path has each change before the reconciler gets its event. Endpoints create and remove their ports.

use super::*;
use crate::plan::desired::source_elements;
use crate::plan::sysctls;

/// An event on its way may be older than a change of ours.
#[tokio::test]
async fn late_link_event_is_no_drift() {
    let fixture = Fixture::ready([1]).await;
    let (key, bridge) = link(&fixture, Device::bridge(Vni::DEFAULT));
    fixture.kernel.lock().applied_ops.clear();
    let link_value = |mtu| Some(Value::Link(Box::new(LinkState { mtu, ..bridge.clone() })));
    fixture.events.send(KernelEvent::Changed(vec![(key.clone(), link_value(1300))])).await.unwrap();
    let status = fixture.status().await;
    assert_eq!((status.data_path.drift_repairs, fixture.kernel.lock().applied_ops.len()), (0, 0), "the bridge is in sync");

    // The data path's present state counts, whatever the event says.
    fixture.kernel.lock().state.insert(key.clone(), link_value(1200).unwrap());
    fixture.events.send(KernelEvent::Changed(vec![(key.clone(), link_value(1300))])).await.unwrap();
    assert_eq!(fixture.status().await.data_path.drift_repairs, 1);
    assert_eq!(link(&fixture, Device::bridge(Vni::DEFAULT)), (key, bridge));
}

/// Another process changes an entry before a dump, and the event arrives after it.
#[tokio::test]
async fn drift_before_dump_is_counted_once() {
    let fixture = Fixture::ready([1]).await;
    let key = Key::Sysctl(sysctls::IPV4_FORWARD.into());
    let value = fixture.kernel.lock().state.get(&key).cloned();
    assert!(value.is_some());
    fixture.kernel.lock().deleted_before_dump = Some((key.clone(), fixture.events.clone()));
    fixture.events.send(KernelEvent::ResyncNeeded { reason: "test" }).await.unwrap();
    fixture.wait_status("the change is found", |status| status.data_path.drift_repairs > 0).await;
    assert_eq!(fixture.status().await.data_path.drift_repairs, 1);
    assert_eq!(fixture.kernel.lock().state.get(&key), value.as_ref());
}

pub(super) fn endpoint() -> Arc<Endpoint> {
    let endpoint: Endpoint = serde_json::from_value(serde_json::json!({
        "name": "a", "netns": "/run/netns/a", "interface": "eth0", "host_interface": "ove0", "mac": "02:00:00:00:00:01",
        "addresses": {"v4": "10.244.100.2"}, "attached_at": 0
    }))
    .unwrap();
    Arc::new(endpoint)
}

#[tokio::test]
async fn endpoint_is_reported_once_applied() {
    let mut fixture = Fixture::ready([]).await;
    let endpoint = endpoint();
    fixture.endpoints.send_replace(vec![Arc::clone(&endpoint)]);
    fixture.applied_endpoints.wait_for(|all| all.first() == Some(&endpoint)).await.unwrap();
    fixture.endpoints.send_replace(Vec::new());
    fixture.applied_endpoints.wait_for(Vec::is_empty).await.unwrap();
}

/// The endpoints create a port with its elements before they report it, and remove it after it is no longer reported.
#[tokio::test]
async fn port_created_by_endpoints_is_not_written_again() {
    let mut fixture = Fixture::ready([]).await;
    let endpoint = endpoint();
    let port = endpoint.port.as_ref().unwrap();
    let (_, mut link) = link(&fixture, Device::bridge(Vni::DEFAULT));
    (link.kind, link.master) = (LinkKind::Port, Some(Device::bridge(Vni::DEFAULT)));
    let sources = source_elements(port, true).map(|element| (Key::Element(element), Value::Element(None)));
    let entries: State = sources.chain([(Key::Link(port.host_interface.as_str().into()), Value::Link(Box::new(link)))]).collect();
    fixture.kernel.lock().state.extend(entries.clone());
    fixture.kernel.lock().applied_ops.clear();
    // A full comparison while the port is attached, but not reported yet.
    fixture.events.send(KernelEvent::ResyncNeeded { reason: "test" }).await.unwrap();
    fixture.status().await;
    for ports in [vec![Arc::clone(&endpoint)], Vec::new()] {
        fixture.endpoints.send_replace(ports.clone());
        fixture.applied_endpoints.wait_for(|all| *all == ports).await.unwrap();
        assert_eq!(fixture.kernel.lock().applied_ops, []);
    }
    assert!(entries.keys().all(|key| fixture.kernel.lock().state.contains_key(key)));
    // The port is gone, and its elements are not.
    fixture.delete(Key::Link("ove0".into())).await;
    fixture.status().await;
    assert!(!entries.keys().any(|key| fixture.kernel.lock().state.contains_key(key)));
    assert_eq!(fixture.status().await.data_path.drift_repairs, 0);
}
