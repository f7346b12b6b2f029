//! What containers can leave on a host: to compare before and after.

use overlay_agent::kernel::netns::Netns;
use overlay_agent::model::Endpoint;

use crate::dump::Dump;
use crate::story::SOON;
use crate::{Must, Story, eventually};

/// All that an attach can leave: in the host's namespace, among the names of namespaces and of resolver files, with the agent.
#[derive(Debug, Clone)]
pub struct Left {
    host: Dump,
    names: Vec<String>,
    /// With the agent.
    pub endpoints: Vec<Endpoint>,
}

impl Left {
    /// What there is on host `h1`, once it is quiet. One container has come and gone by then: the first port changes the bridge for good,
    /// its operational state and the sizes that it offloads.
    pub async fn settled(story: &Story) -> Left {
        story.ctl("h1", &["attach", "first"]).exits(0);
        story.ctl("h1", &["detach", "first"]).exits(0);
        // The kernel tells a bridge without ports that it has no carrier up to a second later.
        let has = |dump: &Dump, words: &[&str]| dump.lines().iter().any(|line| words.iter().all(|word| line.contains(word)));
        eventually("the first container's traces are gone", SOON, || {
            let left = Left::now(story);
            if has(&left.host, &["\"tentative\":true"]) {
                return Err("duplicate address detection goes on".to_owned());
            }
            let without_ports = !has(&left.host, &["\"ifname\":\"ove"]);
            if without_ports && !has(&left.host, &["\"ifname\":\"ovb.", "\"NO-CARRIER\""]) {
                return Err("the bridge has carrier without ports".to_owned());
            }
            Ok(left)
        })
        .await
    }

    fn now(story: &Story) -> Left {
        let prefix = story.layout().namespace("h1-");
        let files = std::fs::read_dir("/etc/netns").into_iter().flatten().flatten();
        let files = files.filter_map(|e| e.file_name().into_string().ok()).map(|name| ("resolver file", name));
        let namespaces = Netns::list().must("namespaces").into_iter().map(|name| ("namespace", name));
        let ours = namespaces.chain(files).filter(|(_, name)| name.starts_with(&prefix));
        Left {
            host: Dump::of(&story.inside("h1")),
            names: ours.map(|(kind, name)| format!("{kind} {name}")).collect(),
            endpoints: story.endpoints("h1"),
        }
    }

    /// Waits until it is the same again: the kernel takes a namespace down some time after its last process.
    pub async fn same(&self, story: &Story, after: &str) {
        eventually(&format!("nothing is left behind after {after}"), SOON, || {
            let now = Left::now(story);
            let changes = now.host.changes_since(&self.host);
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
