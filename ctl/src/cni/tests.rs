use super::*;
use crate::client::tests::fake_agent::FakeAgent;

fn run_plugin(command: &str, more: &[(&str, &str)], input: &str) -> Result<Option<Value>, CniError> {
    let variable = |name: &str| {
        let all = [("CNI_COMMAND", command)];
        all.iter().chain(more).find(|(n, v)| *n == name && !v.is_empty()).map(|(_, v)| OsString::from(v))
    };
    let bytes = input.as_bytes().to_vec();
    handle(variable, |_| Ok(bytes), Instant::now()).map_err(|failed| failed.error)
}

const CNI_ENV: [(&str, &str); 3] = [("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/run/netns/none")];
const NETWORK_CONFIG: &str = r#"{"cniVersion":"1.1.0","name":"net","type":"overlay-cni","socket":"/nonexistent","timeout":"1s"}"#;

/// Adds keys to the configuration.
fn config_with(more: &str) -> String {
    NETWORK_CONFIG.replace("\"1s\"}", &format!("\"1s\",{more}}}"))
}

fn error_code(result: Result<Option<Value>, CniError>) -> Code {
    result.expect_err("an error").code
}

#[test]
fn version_needs_no_environment() {
    let answer = run_plugin("VERSION", &[], "").expect("an answer").expect("a value");
    assert_eq!(answer["supportedVersions"], serde_json::json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    assert_eq!(
        run_plugin("VERSION", &[], r#"{"cniVersion":"0.4.0"}"#).expect("an answer").expect("a value")["cniVersion"],
        "0.4.0"
    );
    assert_eq!(error_code(run_plugin("VERSION", &[], "{")), Code::Decode);
}

#[test]
fn environment_is_validated() {
    assert_eq!(error_code(run_plugin("", &CNI_ENV, NETWORK_CONFIG)), Code::InvalidEnvironment);
    assert_eq!(error_code(run_plugin("add", &CNI_ENV, NETWORK_CONFIG)), Code::InvalidEnvironment);
    for (name, bad) in [
        ("CNI_CONTAINERID", ""),
        ("CNI_CONTAINERID", "a/b"),
        ("CNI_CONTAINERID", "-a"),
        ("CNI_IFNAME", ""),
        ("CNI_IFNAME", "sixteen-letters!"),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "lo"),
        ("CNI_NETNS", ""),
    ] {
        let who = CNI_ENV.map(|(n, v)| (n, if n == name { bad } else { v }));
        for verb in ["ADD", "CHECK"] {
            let error = run_plugin(verb, &who, NETWORK_CONFIG).expect_err(bad);
            assert!(error.code == Code::InvalidEnvironment && error.message.contains(name), "{verb} {name}={bad}: {error}");
        }
    }
    for (arguments, wanted) in
        [("x", "KEY=VALUE"), ("a=b", "unknown keys"), ("IgnoreUnknown=perhaps", "neither"), ("IP=1.2.3", "not an IP address")]
    {
        let error = run_plugin("ADD", &[&CNI_ENV[..], &[("CNI_ARGS", arguments)]].concat(), NETWORK_CONFIG).expect_err(arguments);
        assert!(error.code == Code::InvalidEnvironment && error.message.contains(wanted), "{arguments}: {error}");
    }
    // The arguments are accepted; the error is a later one.
    let ignored = run_plugin(
        "ADD",
        &[&CNI_ENV[..], &[("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=p;IP=10.0.0.1")]].concat(),
        NETWORK_CONFIG,
    );
    assert_eq!(error_code(ignored), Code::UnknownContainer);
}

#[test]
fn configuration_is_validated() {
    for (input, wanted) in [
        ("", Code::Decode),
        ("{", Code::Decode),
        ("[]", Code::Decode),
        (r#"{"cniVersion":1}"#, Code::Decode),
        ("{}", Code::IncompatibleVersion),
        (r#"{"cniVersion":"0.2.0","name":"net"}"#, Code::IncompatibleVersion),
        (r#"{"cniVersion":"1.2.0","name":"net"}"#, Code::IncompatibleVersion),
        (r#"{"cniVersion":"1.0.0"}"#, Code::InvalidConfig),
        (r#"{"cniVersion":"1.0.0","name":"a/b"}"#, Code::InvalidConfig),
        (&config_with(r#""ipam":{"type":"host-local"}"#), Code::UnsupportedField),
        (&config_with(r#""logFile":"relative""#), Code::InvalidConfig),
        (&config_with(r#""logLevel":"loud""#), Code::InvalidConfig),
        (&NETWORK_CONFIG.replace("1s", "0s"), Code::InvalidConfig),
        (&NETWORK_CONFIG.replace("/nonexistent", "nonexistent"), Code::InvalidConfig),
        (&config_with(r#""sourceCheck":"no""#), Code::Decode),
        (&config_with(r#""isDefaultGateway":"no""#), Code::Decode),
        (&config_with(r#""network":7"#), Code::Decode),
        (&config_with(r#""network":"Blue""#), Code::InvalidConfig),
        (&config_with(r#""runtimeConfig":{"ips":["10.0.0.1","10.0.0.2"]}"#), Code::InvalidConfig),
        (&config_with(r#""runtimeConfig":{"ips":["10.0.0.1"]},"args":{"cni":{"ips":["10.0.0.2"]}}"#), Code::InvalidConfig),
        (&config_with(r#""runtimeConfig":{"ips":["here"]}"#), Code::InvalidConfig),
        (&config_with(r#""runtimeConfig":{"portMappings":[{"hostPort":0,"containerPort":80}]}"#), Code::InvalidConfig),
        (
            &config_with(r#""runtimeConfig":{"portMappings":[{"hostPort":1,"containerPort":80,"protocol":"icmp"}]}"#),
            Code::InvalidConfig,
        ),
        (
            &config_with(r#""runtimeConfig":{"portMappings":[{"hostPort":1,"containerPort":80,"hostIP":"here"}]}"#),
            Code::InvalidConfig,
        ),
        (&config_with(r#""runtimeConfig":{"bandwidth":{"ingressRate":1000}}"#), Code::UnsupportedField),
        (&config_with(r#""prevResult":{"ip4":{}}"#), Code::IncompatibleVersion),
        // These configurations are valid; the error is the missing container.
        (
            &config_with(r#""runtimeConfig":{"bandwidth":{"ingressRate":0}},"ipam":{},"args":{"other":1},"unknown":[]"#),
            Code::UnknownContainer,
        ),
        (
            &config_with(r#""runtimeConfig":{"ips":["10.0.0.1/24"]},"args":{"cni":{"ips":["10.0.0.1","fd00::1"]}}"#),
            Code::UnknownContainer,
        ),
        (&config_with(r#""runtimeConfig":null,"args":{"cni":null},"dns":null,"prevResult":null"#), Code::UnknownContainer),
        (&config_with(r#""isDefaultGateway":false"#), Code::UnknownContainer),
        (&config_with(r#""isDefaultGateway":null"#), Code::UnknownContainer),
        (&config_with(r#""network":"blue""#), Code::UnknownContainer),
    ] {
        assert_eq!(error_code(run_plugin("ADD", &CNI_ENV, input)), wanted, "{input}");
    }
}

#[test]
fn verb_requires_its_spec_version() {
    let older = |version: &str| NETWORK_CONFIG.replace("1.1.0", version);
    for (verb, version) in [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "1.0.0"), ("STATUS", "0.4.0")] {
        assert_eq!(error_code(run_plugin(verb, &CNI_ENV, &older(version))), Code::IncompatibleVersion, "{verb} {version}");
    }
    assert_eq!(error_code(run_plugin("CHECK", &CNI_ENV, &older("0.4.0"))), Code::InvalidConfig, "no prevResult");
    assert_eq!(error_code(run_plugin("GC", &[], NETWORK_CONFIG)), Code::InvalidConfig, "no list of attachments");
    assert_eq!(error_code(run_plugin("STATUS", &[], NETWORK_CONFIG)), Code::NotAvailable);
    assert_eq!(error_code(run_plugin("GC", &[], &config_with(r#""cni.dev/valid-attachments":null"#))), Code::TryAgain);
}

#[test]
fn del_without_agent_depends_on_namespace() {
    // The namespace is gone: the agent's audit releases the endpoint by itself.
    assert_eq!(run_plugin("DEL", &CNI_ENV, NETWORK_CONFIG), Ok(None));
    assert_eq!(run_plugin("DEL", &CNI_ENV[..2], NETWORK_CONFIG), Ok(None));
    // The namespace exists: the runtime must retry.
    let here = CNI_ENV.map(|(n, v)| (n, if n == "CNI_NETNS" { "/proc/self/ns/net" } else { v }));
    assert_eq!(error_code(run_plugin("DEL", &here, NETWORK_CONFIG)), Code::TryAgain);
    let error = run_plugin("ADD", &here, NETWORK_CONFIG).expect_err("the host's own");
    assert!(error.code == Code::InvalidEnvironment && error.message.contains("host's own"), "{error}");
}

#[test]
fn consecutive_ports_become_one_range() {
    let ports = |json: &str| {
        let config = Config::decode(config_with(&format!(r#""runtimeConfig":{{"portMappings":[{json}]}}"#)).as_bytes())
            .expect("a configuration");
        let attachment = environment::Attachment { container: "c".to_owned(), interface: "eth0".to_owned(), netns: None };
        let request =
            attach_request::request(&config, &attachment, &environment::Arguments::default(), String::new()).expect("a request");
        request.publish.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let one = |host: u16, inside: u16, more: &str| format!(r#"{{"hostPort":{host},"containerPort":{inside}{more}}}"#);
    assert_eq!(ports(&one(8080, 80, r#","hostIP":"127.0.0.1","protocol":"TCP""#)), ["127.0.0.1:8080:80/tcp"]);
    let run = [one(8000, 80, ""), one(8001, 81, ""), one(8002, 82, ""), one(8003, 90, ""), one(8004, 91, r#","protocol":"udp""#)];
    assert_eq!(ports(&run.join(",")), ["8000-8002:80-82/tcp", "8003:90/tcp", "8004:91/udp"]);
    assert_eq!(ports(&[one(65535, 1, ""), one(1, 2, "")].join(",")), ["65535:1/tcp", "1:2/tcp"]);
}

#[test]
fn mac_sources_have_precedence() {
    let mac = |more: &str, arguments: Option<&str>| {
        let config = Config::decode(config_with(more).as_bytes()).expect("a configuration");
        let arguments = environment::Arguments { mac: arguments.map(str::to_owned), ..environment::Arguments::default() };
        let attachment = environment::Attachment { container: "c".to_owned(), interface: "eth0".to_owned(), netns: None };
        let request = attach_request::request(&config, &attachment, &arguments, String::new());
        request.map(|request| request.mac.map(|mac| mac.to_string())).map_err(|error| error.code)
    };
    let text = |n: u8| format!("02:00:00:00:00:0{n}");
    let both = format!(r#""runtimeConfig":{{"mac":"{}"}},"args":{{"cni":{{"mac":"{}"}}}}"#, text(1), text(2));
    assert_eq!(mac(&both, Some(&text(3))), Ok(Some(text(1))));
    assert_eq!(mac(r#""args":{}"#, Some(&text(3))), Ok(Some(text(3))));
    assert_eq!(mac(r#""args":{}"#, None), Ok(None));
    assert_eq!(mac(r#""args":{}"#, Some("here")), Err(Code::InvalidEnvironment));
    assert_eq!(mac(r#""runtimeConfig":{"mac":"ff:ff:ff:ff:ff:ff"}"#, None), Err(Code::InvalidConfig));
}

#[test]
fn error_json_matches_specification() {
    let error = CniError::new(Code::TryAgain, "later").with_details("more");
    let wanted = serde_json::json!({ "cniVersion": "0.4.0", "code": 11, "msg": "later", "details": "more" });
    assert_eq!(error.to_json(Version::V0_4_0.as_str()), wanted);
    assert!(CniError::new(Code::Io, "no").to_json(Version::LATEST.as_str()).get("details").is_none());
}

#[test]
fn network_of_configuration_selects_paths() {
    let agent = FakeAgent::start(|request| match request {
        "GET /v1/networks" => {
            let blue = serde_json::json!({"name": "blue", "kind": "isolated", "subnet": null, "ready": true, "endpoints": 1, "problems": 0});
            (200, serde_json::json!({"networks": [blue]}).to_string())
        }
        "GET /v1/networks/blue/endpoints" => {
            let stale = serde_json::json!({"name": "c2-eth0", "network": "blue", "netns": "/x", "owner": "cni/net/c2/eth0", "attached_at": 0});
            (200, serde_json::json!({"endpoints": [stale]}).to_string())
        }
        delete if delete.starts_with("DELETE") => (200, r#"{"endpoint":null,"sharers":[]}"#.to_owned()),
        other => (404, serde_json::json!({"error": other}).to_string()),
    });
    let config = |network: &str, more: &str| {
        let text = config_with(&format!(r#""network":"{network}"{more}"#));
        text.replace("/nonexistent", &agent.socket().display().to_string())
    };
    assert_eq!(run_plugin("DEL", &CNI_ENV, &config("blue", "")), Ok(None));
    assert_eq!(agent.take_requests(), ["DELETE /v1/networks/blue/endpoints/c1-eth0-c4d29313054bf7a8?force=true"]);
    let keep_none = r#","cni.dev/valid-attachments":[]"#;
    assert_eq!(run_plugin("GC", &[], &config("blue", keep_none)), Ok(None));
    assert_eq!(
        agent.take_requests(),
        ["GET /v1/networks", "GET /v1/networks/blue/endpoints", "DELETE /v1/networks/blue/endpoints/c2-eth0?force=true"]
    );
    // The host has left the network: nothing is to be collected.
    assert_eq!(run_plugin("GC", &[], &config("green", keep_none)), Ok(None));
    assert_eq!(agent.take_requests(), ["GET /v1/networks"]);
}
