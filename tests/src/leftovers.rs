//! Possible leftovers of containers on a host, for comparisons.

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Endpoint;

use crate::dump::NetnsDump;
use crate::test_lab::CONVERGE_TIMEOUT;
use crate::{ExpectContext, TestLab, eventually};

/// The state that an attach can leave: in the host's namespace, in the names of namespaces and resolver files, and in the agent.
#[derive(Debug, Clone)]
pub struct Leftovers {
    host_dump: NetnsDump,
    names: Vec<String>,
    /// Endpoints of the agent.
    pub endpoints: Vec<Endpoint>,
}

impl Leftovers {
    /// The state of host `h1` once it is quiet. It first attaches and detaches a container, because the first port changes the
    /// bridge permanently: its operational state and its offload sizes.
    pub async fn baseline(lab: &TestLab) -> Leftovers {
        lab.ctl("h1", &["attach", "first"]).assert_code(0);
        lab.ctl("h1", &["detach", "first"]).assert_code(0);
        // The kernel reports the lost carrier of a bridge without ports up to a second later.
        let has = |dump: &NetnsDump, words: &[&str]| dump.lines().iter().any(|line| words.iter().all(|word| line.contains(word)));
        eventually("the host is quiet after the first container", CONVERGE_TIMEOUT, || {
            let state = Leftovers::collect(lab);
            if has(&state.host_dump, &["\"tentative\":true"]) {
                return Err("duplicate address detection is in progress".to_owned());
            }
            let without_ports = !has(&state.host_dump, &["\"ifname\":\"ove"]);
            if without_ports && !has(&state.host_dump, &["\"ifname\":\"ovb.", "\"NO-CARRIER\""]) {
                return Err("the bridge has carrier without ports".to_owned());
            }
            Ok(state)
        })
        .await
    }

    fn collect(lab: &TestLab) -> Leftovers {
        let prefix = lab.layout().namespace("h1-");
        let files = std::fs::read_dir("/etc/netns").into_iter().flatten().flatten();
        let files = files.filter_map(|e| e.file_name().into_string().ok()).map(|name| ("resolver file", name));
        let namespaces = Netns::list().expect_ok("namespaces").into_iter().map(|name| ("namespace", name));
        let own_names = namespaces.chain(files).filter(|(_, name)| name.starts_with(&prefix));
        Leftovers {
            host_dump: NetnsDump::of(&lab.open_netns("h1")),
            names: own_names.map(|(kind, name)| format!("{kind} {name}")).collect(),
            endpoints: lab.endpoints("h1"),
        }
    }

    /// Waits for the same state again: the kernel destroys a namespace some time after its last process.
    pub async fn assert_unchanged(&self, lab: &TestLab, action: &str) {
        eventually(&format!("nothing is left behind after {action}"), CONVERGE_TIMEOUT, || {
            let now = Leftovers::collect(lab);
            let changes = now.host_dump.changes_since(&self.host_dump);
            if !changes.is_empty() {
                return Err(format!("\n{changes}"));
            }
            if now.names != self.names || now.endpoints != self.endpoints {
                return Err(format!("{:?} {:?}, not {:?} {:?}", now.names, now.endpoints, self.names, self.endpoints));
            }
            Ok(())
        })
        .await;
    }
}
