//! A container runtime according to the CNI specification.
//!
//! It runs the plugins of a network list in order, passes each result to the next plugin, and relies on the plugins' output
//! alone.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use overlay_agent::kernel::netns::Netns;
use serde_json::{Value, json};

use crate::programs::{CommandOutput, workspace_binary};
use crate::{ExpectContext, TestLab};

/// The directory of the plugins in Debian's package containernetworking-plugins.
pub const DEBIAN_PLUGINS: &str = "/usr/lib/cni";

/// The supported CNI versions.
pub const SUPPORTED_VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// One interface of one container.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_IFNAME`.
    pub interface: String,
    /// `CNI_NETNS`.
    pub netns: String,
    /// `CNI_ARGS`.
    pub arguments: String,
}

/// A network list on one host.
#[derive(Debug, Clone)]
pub struct Network {
    /// The namespace of the host.
    pub host: Netns,
    /// `cniVersion`.
    pub version: String,
    /// `name`.
    pub name: String,
    /// The plugins' configurations.
    pub plugins: Vec<Value>,
    /// The runtime's values for capabilities (`runtimeConfig`).
    pub runtime: Value,
}

/// Our plugin's configuration for a host's agent.
pub fn plugin_config(lab: &TestLab, host: &str) -> Value {
    json!({
        "type": "overlay-cni",
        "socket": lab.host(host).socket(),
        "timeout": "20s",
        "logFile": lab.host(host).dir().join("cni.log"),
        "logLevel": "debug",
        "capabilities": { "ips": true, "mac": true, "portMappings": true, "dns": true },
    })
}

/// The code and message of a plugin's error.
#[track_caller]
pub fn parse_error(output: &CommandOutput) -> (u64, String) {
    assert_ne!(output.code, Some(0), "`{}` succeeded: {}", output.command, output.stdout);
    let value: Value = output.json();
    let code = value["code"].as_u64().expect_ok("a code");
    assert!(value["cniVersion"].is_string() && value["msg"].as_str().is_some_and(|m| !m.is_empty()), "{value}");
    (code, value["msg"].as_str().unwrap_or_default().to_owned())
}

impl Attachment {
    /// A new namespace for a container, removed with the lab.
    #[track_caller]
    pub fn new(lab: &TestLab, host: &str, name: &str) -> Attachment {
        let netns = Netns::create(&lab.layout().namespace(&format!("{host}-{name}"))).expect_ok("a namespace");
        Attachment {
            container: format!("{name}{}", "0123456789abcdef".repeat(4)).chars().take(64).collect(),
            interface: "eth0".to_owned(),
            netns: netns.path().display().to_string(),
            arguments: String::new(),
        }
    }

    /// The container's namespace.
    #[track_caller]
    pub fn open_netns(&self) -> Netns {
        Netns::open(&self.netns).expect_ok(&self.netns)
    }
}

impl Network {
    /// A network with only our plugin.
    pub fn overlay_only(lab: &TestLab, host: &str, version: &str) -> Network {
        Network {
            host: lab.open_netns(host),
            version: version.to_owned(),
            name: "overlay".to_owned(),
            plugins: vec![plugin_config(lab, host)],
            runtime: json!({}),
        }
    }

    /// The configuration of one plugin (`SPEC.md`, "Deriving execution configuration from plugin configuration").
    pub fn config(&self, plugin: &Value, extra: &[(&str, Value)]) -> Value {
        let mut config = plugin.clone();
        config["cniVersion"] = self.version.clone().into();
        config["name"] = self.name.clone().into();
        let capabilities = config.as_object_mut().and_then(|keys| keys.remove("capabilities")).unwrap_or_default();
        let capability_args = self.runtime.as_object().into_iter().flatten();
        let runtime_config: serde_json::Map<String, Value> =
            capability_args.filter(|(key, _)| capabilities[key.as_str()] == true).map(|(k, v)| (k.clone(), v.clone())).collect();
        if !runtime_config.is_empty() {
            config["runtimeConfig"] = runtime_config.into();
        }
        for (key, value) in extra.iter().filter(|(_, value)| !value.is_null()) {
            config[*key] = value.clone();
        }
        config
    }

    /// Runs ADD of each plugin; stops at the first failure.
    pub fn add(&self, attachment: &Attachment) -> Result<Value, CommandOutput> {
        let mut result = Value::Null;
        for plugin in &self.plugins {
            let output = self.exec_plugin("ADD", attachment, plugin, &self.config(plugin, &[("prevResult", result)]));
            if output.code != Some(0) {
                return Err(output);
            }
            result = output.json();
        }
        Ok(result)
    }

    /// Runs CHECK of each plugin, with the result of ADD.
    pub fn check(&self, attachment: &Attachment, result: &Value) -> Result<(), CommandOutput> {
        self.plugins.iter().try_for_each(|plugin| {
            into_result(self.exec_plugin("CHECK", attachment, plugin, &self.config(plugin, &[("prevResult", result.clone())])))
        })
    }

    /// Runs DEL of each plugin in reverse order; `result` may be null.
    pub fn del(&self, attachment: &Attachment, result: &Value) -> Result<(), CommandOutput> {
        self.plugins.iter().rev().try_for_each(|plugin| {
            into_result(self.exec_plugin("DEL", attachment, plugin, &self.config(plugin, &[("prevResult", result.clone())])))
        })
    }

    /// Runs GC of our plugin, with the valid attachments.
    pub fn gc(&self, keep: &[&Attachment]) -> Result<(), CommandOutput> {
        let keep: Vec<Value> = keep
            .iter()
            .map(|attachment| json!({ "containerID": attachment.container, "ifname": attachment.interface }))
            .collect();
        into_result(
            self.exec_own_plugin("GC", &self.config(&self.plugins[0], &[("cni.dev/valid-attachments", keep.into())]).to_string()),
        )
    }

    /// Runs STATUS of our plugin.
    pub fn status(&self) -> Result<(), CommandOutput> {
        into_result(self.exec_own_plugin("STATUS", &self.config(&self.plugins[0], &[]).to_string()))
    }

    /// Runs our plugin with only a verb and an input.
    pub fn exec_own_plugin(&self, verb: &str, input: &str) -> CommandOutput {
        self.exec_with_env(&workspace_binary("overlay-cni"), &[("CNI_COMMAND", verb), ("CNI_PATH", DEBIAN_PLUGINS)], input)
    }

    /// Runs one verb of one plugin.
    pub fn exec_plugin(&self, verb: &str, attachment: &Attachment, plugin: &Value, config: &Value) -> CommandOutput {
        let name = plugin["type"].as_str().expect_ok("a type");
        let variables = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", &attachment.container),
            ("CNI_IFNAME", &attachment.interface),
            ("CNI_NETNS", &attachment.netns),
            ("CNI_ARGS", &attachment.arguments),
            ("CNI_PATH", DEBIAN_PLUGINS),
        ];
        self.exec_with_env(&plugin_path(name), &variables, &config.to_string())
    }

    /// Runs a plugin with an environment, without empty values, and an input.
    #[track_caller]
    pub fn exec_with_env(&self, program: &Path, variables: &[(&str, &str)], input: &str) -> CommandOutput {
        let output = self.host.run(|| {
            let mut command = Command::new(program);
            command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
            command.envs(variables.iter().filter(|(_, value)| !value.is_empty()).copied());
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                // A plugin that exits before it has read its input reports the reason on its output.
                let _ = stdin.write_all(input.as_bytes());
            }
            child.wait_with_output()
        });
        let verb = variables.first().map_or("", |(_, verb)| verb);
        CommandOutput::from_output(
            &[&program.to_string_lossy(), verb],
            &output.expect_ok("enter the host").expect_ok(&program.display().to_string()),
        )
    }
}

fn into_result(output: CommandOutput) -> Result<(), CommandOutput> {
    if output.code == Some(0) { Ok(()) } else { Err(output) }
}

/// The path of a plugin: ours next to the tests, the others in Debian's directory.
fn plugin_path(name: &str) -> PathBuf {
    if name == "overlay-cni" {
        return workspace_binary(name);
    }
    let path = Path::new(DEBIAN_PLUGINS).join(name);
    assert!(path.is_file(), "{} is not installed: apt-get install containernetworking-plugins", path.display());
    path
}
