use super::*;

fn said(command: &str, more: &[(&str, &str)], input: &str) -> Result<Option<Value>, CniError> {
    let variable = |name: &str| {
        let all = [("CNI_COMMAND", command)];
        all.iter().chain(more).find(|(n, v)| *n == name && !v.is_empty()).map(|(_, v)| OsString::from(v))
    };
    let bytes = input.as_bytes().to_vec();
    call(variable, |_| Ok(bytes), Instant::now()).map_err(|failed| failed.error)
}

const WHO: [(&str, &str); 3] = [("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/run/netns/none")];
const NET: &str = r#"{"cniVersion":"1.1.0","name":"net","type":"overlay-cni","socket":"/nonexistent","timeout":"1s"}"#;

/// A configuration with more keys.
fn with(more: &str) -> String {
    NET.replace("\"1s\"}", &format!("\"1s\",{more}}}"))
}

fn code(result: Result<Option<Value>, CniError>) -> Code {
    result.expect_err("an error").code
}

#[test]
fn version_needs_nothing() {
    let answer = said("VERSION", &[], "").expect("an answer").expect("a value");
    assert_eq!(answer["supportedVersions"], serde_json::json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    assert_eq!(said("VERSION", &[], r#"{"cniVersion":"0.4.0"}"#).expect("an answer").expect("a value")["cniVersion"], "0.4.0");
    assert_eq!(code(said("VERSION", &[], "{")), Code::Decode);
}

#[test]
fn the_environment_is_checked() {
    assert_eq!(code(said("", &WHO, NET)), Code::InvalidEnvironment);
    assert_eq!(code(said("add", &WHO, NET)), Code::InvalidEnvironment);
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
        let who = WHO.map(|(n, v)| (n, if n == name { bad } else { v }));
        for verb in ["ADD", "CHECK"] {
            let error = said(verb, &who, NET).expect_err(bad);
            assert!(error.code == Code::InvalidEnvironment && error.message.contains(name), "{verb} {name}={bad}: {error}");
        }
    }
    for (arguments, wanted) in
        [("x", "KEY=VALUE"), ("a=b", "unknown keys"), ("IgnoreUnknown=perhaps", "neither"), ("IP=1.2.3", "no IP address")]
    {
        let error = said("ADD", &[&WHO[..], &[("CNI_ARGS", arguments)]].concat(), NET).expect_err(arguments);
        assert!(error.code == Code::InvalidEnvironment && error.message.contains(wanted), "{arguments}: {error}");
    }
    // It gets past the arguments.
    let ignored = said("ADD", &[&WHO[..], &[("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=p;IP=10.0.0.1")]].concat(), NET);
    assert_eq!(code(ignored), Code::UnknownContainer);
}

#[test]
fn the_configuration_is_checked() {
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
        (&with(r#""ipam":{"type":"host-local"}"#), Code::UnsupportedField),
        (&with(r#""logFile":"relative""#), Code::InvalidConfig),
        (&with(r#""logLevel":"loud""#), Code::InvalidConfig),
        (&NET.replace("1s", "0s"), Code::InvalidConfig),
        (&NET.replace("/nonexistent", "nonexistent"), Code::InvalidConfig),
        (&with(r#""sourceCheck":"no""#), Code::Decode),
        (&with(r#""isDefaultGateway":"no""#), Code::Decode),
        (&with(r#""runtimeConfig":{"ips":["10.0.0.1","10.0.0.2"]}"#), Code::InvalidConfig),
        (&with(r#""runtimeConfig":{"ips":["10.0.0.1"]},"args":{"cni":{"ips":["10.0.0.2"]}}"#), Code::InvalidConfig),
        (&with(r#""runtimeConfig":{"ips":["here"]}"#), Code::InvalidConfig),
        (&with(r#""runtimeConfig":{"portMappings":[{"hostPort":0,"containerPort":80}]}"#), Code::InvalidConfig),
        (&with(r#""runtimeConfig":{"portMappings":[{"hostPort":1,"containerPort":80,"protocol":"icmp"}]}"#), Code::InvalidConfig),
        (&with(r#""runtimeConfig":{"portMappings":[{"hostPort":1,"containerPort":80,"hostIP":"here"}]}"#), Code::InvalidConfig),
        (&with(r#""runtimeConfig":{"bandwidth":{"ingressRate":1000}}"#), Code::UnsupportedField),
        (&with(r#""prevResult":{"ip4":{}}"#), Code::IncompatibleVersion),
        // These can be right, and get as far as the container.
        (
            &with(r#""runtimeConfig":{"bandwidth":{"ingressRate":0}},"ipam":{},"args":{"other":1},"unknown":[]"#),
            Code::UnknownContainer,
        ),
        (
            &with(r#""runtimeConfig":{"ips":["10.0.0.1/24"]},"args":{"cni":{"ips":["10.0.0.1","fd00::1"]}}"#),
            Code::UnknownContainer,
        ),
        (&with(r#""runtimeConfig":null,"args":{"cni":null},"dns":null,"prevResult":null"#), Code::UnknownContainer),
        (&with(r#""isDefaultGateway":false"#), Code::UnknownContainer),
        (&with(r#""isDefaultGateway":null"#), Code::UnknownContainer),
    ] {
        assert_eq!(code(said("ADD", &WHO, input)), wanted, "{input}");
    }
}

#[test]
fn verbs_came_with_versions() {
    let older = |version: &str| NET.replace("1.1.0", version);
    for (verb, version) in [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "1.0.0"), ("STATUS", "0.4.0")] {
        assert_eq!(code(said(verb, &WHO, &older(version))), Code::IncompatibleVersion, "{verb} {version}");
    }
    assert_eq!(code(said("CHECK", &WHO, &older("0.4.0"))), Code::InvalidConfig, "no prevResult");
    assert_eq!(code(said("GC", &[], NET)), Code::InvalidConfig, "what to keep is not said");
    assert_eq!(code(said("STATUS", &[], NET)), Code::NotAvailable);
    assert_eq!(code(said("GC", &[], &with(r#""cni.dev/valid-attachments":null"#))), Code::TryAgain);
}

#[test]
fn without_an_agent() {
    // The namespace is gone: nothing is left to do but for the agent, which finds out by itself.
    assert_eq!(said("DEL", &WHO, NET), Ok(None));
    assert_eq!(said("DEL", &WHO[..2], NET), Ok(None));
    // Where one is there, the runtime has to come again.
    let here = WHO.map(|(n, v)| (n, if n == "CNI_NETNS" { "/proc/self/ns/net" } else { v }));
    assert_eq!(code(said("DEL", &here, NET)), Code::TryAgain);
    let error = said("ADD", &here, NET).expect_err("the host's own");
    assert!(error.code == Code::InvalidEnvironment && error.message.contains("host's own"), "{error}");
}

#[test]
fn ports_become_runs() {
    let ports = |json: &str| {
        let config =
            Config::decode(with(&format!(r#""runtimeConfig":{{"portMappings":[{json}]}}"#)).as_bytes()).expect("a configuration");
        let attachment = environment::Attachment { container: "c".to_owned(), interface: "eth0".to_owned(), netns: None };
        let request = wish::request(&config, &attachment, &environment::Arguments::default(), String::new()).expect("a request");
        request.publish.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let one = |host: u16, inside: u16, more: &str| format!(r#"{{"hostPort":{host},"containerPort":{inside}{more}}}"#);
    assert_eq!(ports(&one(8080, 80, r#","hostIP":"127.0.0.1","protocol":"TCP""#)), ["127.0.0.1:8080:80/tcp"]);
    let run = [one(8000, 80, ""), one(8001, 81, ""), one(8002, 82, ""), one(8003, 90, ""), one(8004, 91, r#","protocol":"udp""#)];
    assert_eq!(ports(&run.join(",")), ["8000-8002:80-82/tcp", "8003:90/tcp", "8004:91/udp"]);
    assert_eq!(ports(&[one(65535, 1, ""), one(1, 2, "")].join(",")), ["65535:1/tcp", "1:2/tcp"]);
}

#[test]
fn macs_of_three_places() {
    let mac = |more: &str, arguments: Option<&str>| {
        let config = Config::decode(with(more).as_bytes()).expect("a configuration");
        let arguments = environment::Arguments { mac: arguments.map(str::to_owned), ..environment::Arguments::default() };
        let attachment = environment::Attachment { container: "c".to_owned(), interface: "eth0".to_owned(), netns: None };
        let request = wish::request(&config, &attachment, &arguments, String::new());
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
fn errors_as_a_runtime_reads_them() {
    let error = CniError::new(Code::TryAgain, "later").with_details("more");
    let wanted = serde_json::json!({ "cniVersion": "0.4.0", "code": 11, "msg": "later", "details": "more" });
    assert_eq!(error.to_json(Version::V0_4_0), wanted);
    assert!(CniError::new(Code::Io, "no").to_json(Version::LATEST).get("details").is_none());
}
