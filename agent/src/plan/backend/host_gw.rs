//! A second backend for tests: routes by the underlay, without a device, encapsulation or data in leases.

use super::Backend;
use crate::model::peer::RemoteSubnet;
use crate::model::{BackendData, Device, Family, LeaseRecord, Mac, NetworkConfig, RejectReason, Vni};
use crate::plan::host_spec::HostSpec;
use crate::plan::ruleset::Tunnel;
use crate::plan::state::{Key, LinkState, RouteTarget, Value};

/// Hosts on one link route to each other.
pub struct HostGw;

impl Backend for HostGw {
    fn name(&self) -> &'static str {
        "host-gw"
    }

    fn label(&self) -> String {
        self.name().to_owned()
    }

    fn bridge(&self) -> Device {
        Device::bridge(Vni::DEFAULT)
    }

    fn device(&self, _: Family) -> Option<Device> {
        None
    }

    fn tunnel(&self) -> Option<Tunnel> {
        None
    }

    fn overhead(&self, _: Family) -> u32 {
        0
    }

    fn underlay_mtu(&self) -> Option<u32> {
        None
    }

    fn lease_data(&self, _: &NetworkConfig, _: &mut dyn FnMut(Device) -> Mac) -> BackendData {
        BackendData::Other { name: self.name().to_owned() }
    }

    fn check_lease(&self, record: &LeaseRecord) -> Result<(), RejectReason> {
        match record.lease.backend.name() {
            name if name == self.name() => Ok(()),
            other => Err(RejectReason::OtherBackend { name: other.to_owned() }),
        }
    }

    fn link(&self, _: &HostSpec, _: Family) -> Option<LinkState> {
        None
    }

    fn peer_entries(&self, _: &HostSpec, _: Family, remote: &RemoteSubnet, entries: &mut Vec<(Key, Value)>) {
        entries.push((Key::Route(remote.subnet), Value::Route(RouteTarget::Via(remote.public_ip))));
    }
}
