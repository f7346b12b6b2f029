//! Fake networks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch as channel;

use super::*;
use crate::model::api::{
    AttachRequest, AttachResponse, DataPathStatus, DetachResponse, Endpoints, Health, Mesh, NetworkEntry, NetworkKind,
    NetworkView, Networks, Peers, Status, StoreStatus, SubnetEntry, Subnets,
};
use crate::model::endpoint::EndpointName;
use crate::model::{Endpoint, Mac, NetworkName, PerFamily, Port};

/// A host in the default network and in `blue`, which can join `green`.
#[derive(Debug)]
pub(super) struct FakeDirectory(Mutex<BTreeMap<NetworkName, Arc<FakeBackend>>>);

impl Default for FakeDirectory {
    fn default() -> Self {
        let networks = [NetworkName::default(), "blue".into()].map(|name| (name.clone(), Arc::new(FakeBackend::of(name))));
        FakeDirectory(Mutex::new(networks.into()))
    }
}

impl Directory for FakeDirectory {
    type Network = FakeBackend;

    fn default_network(&self) -> Arc<FakeBackend> {
        self.network(&NetworkName::default()).expect("the default network")
    }

    fn network(&self, name: &NetworkName) -> Option<Arc<FakeBackend>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    async fn list(&self) -> Networks {
        let entry = |name: &NetworkName| NetworkEntry {
            name: name.clone(),
            kind: if name.is_default() { NetworkKind::Routed } else { NetworkKind::Isolated },
            subnet: None,
            ready: true,
            endpoints: 0,
            problems: 0,
        };
        let mut networks: Vec<_> = self.0.lock().unwrap().keys().map(entry).collect();
        networks.sort_by_key(|entry| !entry.name.is_default());
        Networks { networks }
    }

    async fn join(&self, name: &NetworkName) -> Result<Arc<FakeBackend>, ApiError> {
        if let Some(network) = self.network(name) {
            return Ok(network);
        }
        if *name != NetworkName::from("green") {
            return Err(ApiError::new(ErrorKind::NotFound, format!("there is no network {name}")));
        }
        let joined = Arc::new(FakeBackend::of(name.clone()));
        self.0.lock().unwrap().insert(name.clone(), Arc::clone(&joined));
        Ok(joined)
    }
}

#[derive(Debug)]
pub(super) struct FakeBackend {
    network: NetworkName,
    subnets: Mutex<Vec<SubnetEntry>>,
    reasons: Mutex<Vec<String>>,
    level: Mutex<String>,
    changes: channel::Sender<u64>,
    /// Number of attach requests.
    pub(super) attach_requests: AtomicUsize,
}

impl FakeBackend {
    pub(super) fn of(network: NetworkName) -> FakeBackend {
        FakeBackend {
            network,
            subnets: Mutex::default(),
            reasons: Mutex::default(),
            level: Mutex::new("info".to_owned()),
            changes: channel::Sender::new(0),
            attach_requests: AtomicUsize::new(0),
        }
    }

    pub(super) fn not_ready(&self, reasons: &[&str]) {
        *self.reasons.lock().unwrap() = reasons.iter().map(|s| (*s).to_owned()).collect();
    }

    pub(super) fn notify_change(&self) {
        self.changes.send_modify(|n| *n += 1);
    }

    pub(super) fn add_subnet(&self, key: &str) {
        let entry = SubnetEntry {
            key: key.to_owned(),
            subnet: None,
            host: None,
            node_id: None,
            public_ip: PerFamily::default(),
            backend: None,
            vni: None,
            vtep: PerFamily::default(),
            expires_in_seconds: None,
            reservation: false,
            own: false,
            refused: None,
        };
        self.subnets.lock().unwrap().push(entry);
        self.notify_change();
    }
}

impl Backend for FakeBackend {
    async fn status(&self) -> Result<Status, ApiError> {
        Ok(Status {
            name: "default".to_owned(),
            kind: NetworkKind::Routed,
            version: "0".to_owned(),
            node: "h1".to_owned(),
            node_id: "0".repeat(32),
            uptime_seconds: 1,
            ready: true,
            health: Health::Ok,
            problems: Vec::new(),
            store: StoreStatus {
                connected: true,
                endpoints: Vec::new(),
                prefix: "/coreos.com/network".to_owned(),
                revision: 1,
                error: None,
                config_errors: Vec::new(),
                leases: 0,
                refused: Vec::new(),
            },
            network: None,
            lease: None,
            underlay: None,
            data_path: DataPathStatus {
                peers: 0,
                failed: Vec::new(),
                drift_repairs: 0,
                last_drift: None,
                mtu: None,
                nexthop_objects: true,
                dropped: std::collections::BTreeMap::new(),
            },
            endpoints: 0,
        })
    }

    async fn subnets(&self) -> Result<Subnets, ApiError> {
        Ok(Subnets { subnets: self.subnets.lock().unwrap().clone() })
    }

    fn mesh(&self) -> Mesh {
        Mesh::default()
    }

    async fn peers(&self) -> Result<Peers, ApiError> {
        Ok(Peers { peers: Vec::new() })
    }

    async fn endpoints(&self) -> Result<Endpoints, ApiError> {
        Ok(Endpoints { endpoints: Vec::new() })
    }

    async fn network(&self) -> Result<NetworkView, ApiError> {
        Ok(NetworkView {
            name: self.network.to_string(),
            driver: "vxlan".to_owned(),
            vni: Some(crate::model::Vni::DEFAULT),
            port: Some(8472),
            mtu: None,
            masquerade: true,
            ipam: PerFamily::default(),
            devices: Vec::new(),
            bridge: None,
            endpoints: Vec::new(),
        })
    }

    async fn attach(&self, name: EndpointName, request: AttachRequest) -> Result<AttachResponse, ApiError> {
        self.attach_requests.fetch_add(1, Ordering::Relaxed);
        match name.as_str() {
            "bad" => return Err(ApiError::new(ErrorKind::BadValue, "bad value")),
            "conflict" => return Err(ApiError::new(ErrorKind::Conflict, "conflict")),
            "early" => return Err(ApiError::new(ErrorKind::NotReady, "not yet")),
            "broken" => return Err(ApiError::new(ErrorKind::Internal, "disk")),
            "missing" => return Err(ApiError::new(ErrorKind::NotFound, "no such")),
            "panics" => panic!("a defect"),
            "slow" => std::future::pending().await,
            _ => {}
        }
        let endpoint = Endpoint {
            name,
            network: self.network.clone(),
            mode: request.mode,
            netns: request.netns.unwrap_or_default(),
            port: Some(Port {
                interface: request.interface.unwrap_or_else(|| "eth0".to_owned()),
                host_interface: "ove0".to_owned(),
                mac: Mac::local([0; 6]),
                addresses: request.addresses,
            }),
            published: request.publish,
            source_check: true,
            default_route: true,
            owner: request.owner,
            attached_at: 0,
        };
        Ok(AttachResponse {
            endpoint,
            prefix_length: PerFamily::default(),
            gateway: PerFamily::default(),
            routes: PerFamily::default(),
            mtu: Some(1450),
        })
    }

    async fn detach(&self, name: EndpointName, force: bool) -> Result<DetachResponse, ApiError> {
        let sharers = if force { vec!["sharer".parse().expect("a name")] } else { Vec::new() };
        Ok(DetachResponse { endpoint: Some(name), sharers })
    }

    async fn alive(&self) -> Result<(), String> {
        let stuck = self.reasons.lock().unwrap().iter().find(|reason| reason.contains("stuck")).cloned();
        stuck.map_or(Ok(()), Err)
    }

    async fn ready(&self) -> Result<(), Vec<String>> {
        let reasons = self.reasons.lock().unwrap().clone();
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }

    fn changes(&self) -> channel::Receiver<u64> {
        self.changes.subscribe()
    }

    async fn metrics(&self) -> String {
        "# HELP x y\n".to_owned()
    }

    fn log_level(&self) -> String {
        self.level.lock().unwrap().clone()
    }

    fn set_log_level(&self, level: &str) -> Result<(), ApiError> {
        crate::telemetry::parse_filter(level).map_err(|e| ApiError::new(ErrorKind::BadValue, e))?;
        *self.level.lock().unwrap() = level.to_owned();
        Ok(())
    }
}
