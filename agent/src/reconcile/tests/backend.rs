//! A network with another backend, from the store's events to the kernel's entries.

use super::*;
use crate::model::BackendConfig;

/// The record of a lease with this `BackendType`, which carries nothing else.
fn other_entry(number: u8, name: &str) -> StoreEntry {
    let mut entry = entry(number, number);
    entry.value.as_mut().unwrap().lease.backend = BackendData::Other { name: name.to_owned() };
    entry
}

#[tokio::test]
async fn network_without_tunnel_routes_by_the_underlay() {
    let mut fixture = Fixture::start();
    fixture.send(StoreEvent::Connection(Connection::Up { position: StorePosition(1) })).await;
    let mut config = network();
    config.config.backend = BackendConfig::HostGw;
    fixture.send(StoreEvent::Config(Some(Ok(config)))).await;
    fixture.send(StoreEvent::Snapshot(vec![other_entry(1, "host-gw"), entry(2, 2), other_entry(3, "wireguard")])).await;
    fixture.send(held_lease(100)).await;
    fixture.ready.wait_for(|ready| *ready).await.unwrap();
    let request = fixture.lease_request.borrow().clone().expect("a lease is requested");
    assert_eq!(request.backend, BackendData::Other { name: "host-gw".to_owned() });
    let status = fixture.status().await;
    assert_eq!((status.data_path.peers, status.data_path.mtu), (1, Some(1500)), "nothing is in front of a packet");
    let rejected: Vec<_> = status.store.refused.iter().map(|rejected| rejected.kind.to_string()).collect();
    assert_eq!(rejected, ["vxlan", "wireguard"].map(|name| format!("its backend is `{name}`, which is not the network's")));
    assert_eq!(fixture.route(1).map(|route| route.to_string()).as_deref(), Some("via 192.0.2.1"));
    {
        let kernel = fixture.kernel.lock();
        let links: Vec<String> = kernel.state.keys().filter(|key| matches!(key, Key::Link(_))).map(ToString::to_string).collect();
        assert_eq!(links, ["link ovb.1"]);
        assert!(kernel.state.keys().any(|key| key.to_string() == "address 10.244.100.0/32 dev ovb.1"));
        let Some(Value::Ruleset(rules)) = kernel.state.get(&Key::Ruleset(Table::Inet)) else { panic!("no rules") };
        let chains: Vec<&str> = rules.chains.iter().map(|chain| chain.name.as_str()).collect();
        assert_eq!(chains, ["incoming", "overlay", "postrouting"]);
        assert!(!rules.to_string().contains("ovx"), "{rules}");
    }
    let peers = fixture.queries.peers().await.unwrap().peers;
    assert_eq!(peers.len(), 1);
    assert_eq!((peers[0].device.as_str(), peers[0].vtep, peers[0].state.as_str()), ("eth0", None, "programmed"));
    fixture.delete(route(1)).await;
    assert_eq!(fixture.status().await.data_path.drift_repairs, 1);
    assert!(fixture.route(1).is_some());
}

#[tokio::test]
async fn lease_of_another_backend_is_listed_and_rejected() {
    let mut fixture = Fixture::start();
    fixture.join([1]).await;
    fixture.send(StoreEvent::Upsert(other_entry(2, "host-gw"))).await;
    fixture.ready.wait_for(|ready| *ready).await.unwrap();
    let status = fixture.status().await;
    assert_eq!((status.data_path.peers, status.store.leases), (1, 2));
    let rows = fixture.queries.subnets().await.unwrap();
    let row = rows.iter().map(|(row, _)| row).find(|row| row.subnet == Some(subnet(2))).unwrap();
    assert_eq!((row.backend.as_deref(), row.vni, row.public_ip.v4), (Some("host-gw"), None, "192.0.2.2".parse().ok()));
    assert!(row.refused.as_ref().is_some_and(|reason| reason.contains("`host-gw`")), "{row:?}");
    // The host changes to the network's backend.
    fixture.send(StoreEvent::Upsert(entry(2, 2))).await;
    assert_eq!(fixture.status().await.data_path.peers, 2);
}
