//! Tests of SRV discovery against a local name server.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::SRV;
use hickory_resolver::proto::rr::{Name, Record};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::net::UdpSocket;

use super::*;

fn srv_record(priority: u16, weight: u16, host: &str) -> SrvRecord {
    SrvRecord { priority, weight, host: host.to_owned(), port: 2379 }
}

#[test]
fn records_are_ordered_by_priority_and_weight() {
    let targets =
        vec![srv_record(20, 0, "last"), srv_record(10, 90, "heavy"), srv_record(10, 10, "light"), srv_record(10, 0, "nil")];
    let mut first = std::collections::BTreeMap::new();
    for seed in 0..1000 {
        let sorted = order_records(targets.clone(), &mut SmallRng::seed_from_u64(seed));
        assert_eq!(sorted.len(), 4);
        assert_eq!(sorted[3].host, "last");
        *first.entry(sorted[0].host.clone()).or_insert(0) += 1;
    }
    let count = |host: &str| first.get(host).copied().unwrap_or(0);
    assert!(count("heavy") > 820 && count("light") > 50 && count("nil") < 30, "{first:?}");
}

/// Starts a name server on a loopback port that serves these SRV records, and NXDOMAIN for all other names.
async fn name_server(records: Vec<(&'static str, SRV)>) -> SocketAddr {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        while let Ok((size, from)) = socket.recv_from(&mut buffer).await {
            let request = Message::from_vec(&buffer[..size]).unwrap();
            let query = request.queries[0].clone();
            let mut answer = Message::response(request.metadata.id, OpCode::Query);
            answer.metadata.recursion_desired = true;
            answer.metadata.recursion_available = true;
            for (name, srv) in &records {
                if query.name() == &Name::from_ascii(name).unwrap() {
                    answer.add_answer(Record::from_rdata(query.name().clone(), 60, RData::SRV(srv.clone())));
                }
            }
            if answer.answers.is_empty() {
                answer.metadata.response_code = ResponseCode::NXDomain;
            }
            answer.add_query(query);
            socket.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
        }
    });
    address
}

fn resolver(server: SocketAddr) -> TokioResolver {
    let mut udp = ConnectionConfig::udp();
    udp.port = server.port();
    let server = NameServerConfig::new(IpAddr::V4(Ipv4Addr::LOCALHOST), true, vec![udp]);
    let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
    TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).build().unwrap()
}

#[tokio::test]
async fn endpoints_come_from_srv_records() {
    let srv = |priority, port, host| SRV::new(priority, 0, port, Name::from_ascii(host).unwrap());
    let server = name_server(vec![
        ("_etcd-client-ssl._tcp.example.test.", srv(20, 2379, "etcd2.example.test.")),
        ("_etcd-client-ssl._tcp.example.test.", srv(10, 2380, "etcd1.example.test.")),
        ("_etcd-client._tcp.example.test.", srv(1, 4001, "plain.example.test.")),
        ("_etcd-client._tcp.plain.test.", srv(1, 4001, "plain.example.test.")),
        ("_etcd-client._tcp.none.test.", srv(0, 0, ".")),
    ])
    .await;
    let resolver = resolver(server);
    let tls = ["https://etcd1.example.test:2380", "https://etcd2.example.test:2379"];
    assert_eq!(endpoints_with(&resolver, "example.test", true).await.unwrap(), tls);
    let all = endpoints_with(&resolver, "example.test.", false).await.unwrap();
    assert_eq!((&all[..2], all[2].as_str()), (&tls.map(str::to_owned)[..], "http://plain.example.test:4001"));
    assert_eq!(endpoints_with(&resolver, "plain.test", false).await.unwrap(), ["http://plain.example.test:4001"]);
    for name in ["none.test", "nothing.test"] {
        let error = endpoints_with(&resolver, name, false).await.unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("dig SRV"), "{error}");
    }
    // Records without TLS are ignored if TLS is requested.
    assert!(endpoints_with(&resolver, "plain.test", true).await.is_err());
}

#[tokio::test]
async fn ip_endpoints_resolve_to_themselves() {
    let endpoints = ["http://192.0.2.7:2379", "https://[2001:db8::7]:2379", "http://server.invalid:2379"].map(str::to_owned);
    let found: Vec<String> = resolve_addresses(&endpoints).await.iter().map(ToString::to_string).collect();
    assert_eq!(found, ["192.0.2.7", "2001:db8::7"], "an unresolvable name yields no address");
}
