//! Resolver files: parsing, writing, and foreign files.

use super::*;

fn name(text: &str) -> EndpointName {
    text.parse().expect(text)
}

fn parse_host_files(files: &[(&str, &str)]) -> ResolvConf {
    ResolvConf::from_host(|path| {
        let found = files.iter().find(|(name, _)| Path::new(name) == path);
        found.map(|(_, text)| (*text).to_owned()).ok_or_else(|| io::ErrorKind::NotFound.into())
    })
}

const STUB: &str = "# a comment\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch stub.example\n";

#[test]
fn unreachable_nameservers_are_left_out() {
    let text = parse_host_files(&[(
        HOST_RESOLV_CONF,
        "nameserver 127.0.0.1\nnameserver 192.0.2.53\nnameserver ::1\nnameserver fe80::1%eth0\ndomain a.example\n",
    )]);
    assert_eq!(text.servers, ["192.0.2.53".parse::<IpAddr>().expect("an address")]);
    assert_eq!(
        (text.unreachable.join(" "), text.search),
        ("127.0.0.1 ::1 fe80::1%eth0".to_owned(), vec!["a.example".to_owned()])
    );
    assert_eq!(parse_host_files(&[]), ResolvConf::default());
    let many = "nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n";
    assert_eq!(parse_host_files(&[(HOST_RESOLV_CONF, many)]).servers.len(), 3);
}

#[test]
fn stub_resolver_is_replaced_by_upstream() {
    let [resolved, manager] = UPSTREAM_RESOLV_CONFS;
    let text = parse_host_files(&[
        (HOST_RESOLV_CONF, STUB),
        (resolved, "nameserver 192.0.2.53\n"),
        (manager, "nameserver 192.0.2.54\n"),
    ]);
    assert_eq!(text.servers, ["192.0.2.53".parse::<IpAddr>().expect("an address")]);
    assert_eq!((text.search.join(" "), text.options), ("stub.example".to_owned(), vec![]), "the stub's options are the stub's");
    let text = parse_host_files(&[
        (HOST_RESOLV_CONF, STUB),
        (resolved, "search x\n"),
        (manager, "nameserver 192.0.2.54\nsearch b.example c.example\n"),
    ]);
    assert_eq!((text.servers.len(), text.search.join(" ")), (1, "b.example c.example".to_owned()));
    let text = parse_host_files(&[(HOST_RESOLV_CONF, STUB)]);
    assert!(text.servers.is_empty() && text.unreachable == ["127.0.0.53"]);
}

#[test]
fn flags_override_host_lists() {
    let host = parse_host_files(&[(HOST_RESOLV_CONF, "nameserver 192.0.2.53\nsearch a.example b.example\noptions ndots:2\n")]);
    let text = |servers: &[&str], search: &[&str], options: &[&str]| {
        let words = |list: &[&str]| list.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let servers = servers.iter().map(|s| s.parse().expect(s)).collect();
        ResolverArgs { servers, search: words(search), options: words(options) }.merge_with_host(&host).render(&name("web"))
    };
    let lines = |text: String| text.lines().skip(1).collect::<Vec<_>>().join("|");
    assert_eq!(lines(text(&[], &[], &[])), "nameserver 192.0.2.53|search a.example b.example|options ndots:2");
    assert_eq!(lines(text(&["::1"], &["."], &["rotate"])), "nameserver ::1|options rotate");
    assert!(text(&[], &[], &[]).starts_with("# Written by overlayctl for endpoint web,"));
}

#[test]
fn invalid_words_are_refused() {
    let check = |search: &str| ResolverArgs { search: vec![search.to_owned()], ..ResolverArgs::default() }.validate();
    for bad in ["", "a b", "a\nnameserver 192.0.2.1", "a#b", "\u{1b}"] {
        assert!(check(bad).is_err(), "{bad:?}");
    }
    check("a.example").expect("one word");
    let servers = ["192.0.2.1".parse().expect("an address"); 4].to_vec();
    assert!(ResolverArgs { servers, ..ResolverArgs::default() }.validate().is_err());
}

#[test]
fn only_named_namespaces_have_a_file() {
    let path = |netns: &str| ResolverFile::for_namespace(Path::new(netns), &name("a")).map(|file| file.path);
    assert_eq!(path("/run/netns/web"), Some("/etc/netns/web/resolv.conf".into()));
    for none in ["/proc/7/ns/net", "/run/netns", "/run/netns/a/b", "/var/lib/a"] {
        assert_eq!(path(none), None, "{none}");
    }
}

#[test]
fn managed_file_is_removed_and_foreign_file_kept() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = ResolverFile { path: directory.path().join("web/resolv.conf"), endpoint: name("web") };
    let given = |server: &str| ResolverArgs { servers: vec![server.parse().expect(server)], ..ResolverArgs::default() };
    let read = || fs::read_to_string(&file.path).unwrap_or_default();
    drop(file.write(&given("192.0.2.1"), true).expect("writable").expect("written"));
    assert!(!file.path.parent().expect("a directory").exists(), "nothing is left of an attach that failed");
    file.write(&given("192.0.2.1"), true).expect("writable").expect("written").keep();
    assert!(read().contains("nameserver 192.0.2.1\n"));
    assert!(file.write(&ResolverArgs::default(), false).expect("left").is_none() && read().contains("192.0.2.1"));
    drop(file.write(&given("192.0.2.2"), false).expect("writable").expect("written"));
    assert!(read().contains("192.0.2.1"), "the previous file is restored");
    let other = ResolverFile { endpoint: name("other"), ..file.clone() };
    assert!(matches!(other.write(&given("192.0.2.3"), true), Err(ResolverError::Foreign { .. })));
    other.remove().expect("nothing to do");
    assert!(read().contains("192.0.2.1"));
    file.remove().expect("removed");
    assert!(!file.path.parent().expect("a directory").exists());
    file.remove().expect("again");
    fs::create_dir(file.path.parent().expect("a directory")).expect("a directory");
    fs::write(&file.path, "nameserver 192.0.2.9\n").expect("writable");
    assert!(file.write(&ResolverArgs::default(), true).expect("left").is_none());
    file.remove().expect("left");
    assert_eq!(read(), "nameserver 192.0.2.9\n");
}
