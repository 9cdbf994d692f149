//! Random manifests: what a user does to the directory, as objects.

use std::collections::BTreeMap;

use keel_manifest::model::{
    ConfigMap, ConfigMapVolume, Container, ContainerPort, Deployment, DeploymentSpec, EnvVar, EnvVarSource,
    KeySelector, ObjectMeta, Pod, PodSpec, PodTemplate, Probe, PullPolicy, RestartPolicy, TcpSocketAction,
    Volume, VolumeMount,
};
use keel_manifest::{Kind, Object, Origin};

use crate::rng::Rng;

pub(crate) const POD_NAMES: [&str; 3] = ["alpha", "beta", "gamma"];
pub(crate) const DEPLOYMENT_NAMES: [&str; 2] = ["delta", "epsilon"];
const IMAGES: [&str; 4] = ["one:1", "one:2", "two", "three:1"];

/// One declaration, small enough to change a single thing in.
#[derive(Clone, Debug)]
pub(crate) struct Declared {
    pub name: String,
    /// `None`: a bare pod.
    pub replicas: Option<u32>,
    pub file: String,
    image: usize,
    variable: u64,
    inits: u64,
    mains: u64,
    policy: RestartPolicy,
    host_port: Option<u16>,
    config: Config,
    hostname: u64,
    label: u64,
    probes: u64,
    never_pull: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Config {
    None,
    Env,
    Volume,
    SubPath,
    Missing,
}

impl Declared {
    pub(crate) fn random(rng: &mut Rng, name: &str, replicas: Option<u32>) -> Declared {
        Declared {
            name: name.into(),
            replicas,
            file: format!("{name}.yaml"),
            image: usize::try_from(rng.below(IMAGES.len() as u64)).unwrap_or(0),
            variable: rng.below(3),
            inits: [0, 0, 0, 1, 2][usize::try_from(rng.below(5)).unwrap_or(0)],
            mains: rng.between(1, 2),
            policy: *rng.pick(&[
                RestartPolicy::Always,
                RestartPolicy::Always,
                RestartPolicy::OnFailure,
                RestartPolicy::Never,
            ]),
            host_port: rng.chance(30).then(|| *rng.pick(&[80, 81])),
            config: *rng.pick(&[Config::None, Config::None, Config::Env, Config::Volume, Config::SubPath]),
            hostname: 0,
            label: 0,
            probes: if rng.chance(40) { rng.below(8) } else { 0 },
            never_pull: rng.chance(3),
        }
    }

    /// One edit, as a user would make it.
    pub(crate) fn edit(&mut self, rng: &mut Rng) {
        match rng.below(12) {
            0 | 1 => self.image = usize::try_from(rng.below(IMAGES.len() as u64)).unwrap_or(0),
            2 => self.variable = rng.below(3),
            3 => self.inits = rng.below(3),
            4 => self.mains = rng.between(1, 2),
            5 => self.host_port = rng.chance(50).then(|| *rng.pick(&[80, 81])),
            6 => self.config = *rng.pick(&[Config::None, Config::Env, Config::Volume, Config::Missing]),
            7 => self.hostname = rng.below(2),
            8 => self.label += 1,
            9 => self.probes = rng.below(8),
            10 => self.file = format!("{}-{}.yaml", self.name, rng.below(3)),
            _ => {
                if let Some(replicas) = &mut self.replicas {
                    *replicas = u32::try_from(rng.below(4)).unwrap_or(1);
                }
            }
        }
    }

    fn object(&self) -> Object {
        let metadata = ObjectMeta { name: self.name.clone(), ..ObjectMeta::default() };
        let labels = BTreeMap::from([("version".to_owned(), self.label.to_string())]);
        let kind = match self.replicas {
            None => Kind::Pod(Pod { metadata: ObjectMeta { labels, ..metadata }, spec: self.spec() }),
            Some(replicas) => {
                let mut template = PodTemplate { spec: self.spec(), ..PodTemplate::default() };
                template.metadata.labels = labels;
                let spec = DeploymentSpec { replicas: Some(replicas), template, ..DeploymentSpec::default() };
                Kind::Deployment(Deployment { metadata, spec })
            }
        };
        Object::new(Origin { file: self.file.clone(), line: 1, column: 1 }, kind)
    }

    fn spec(&self) -> PodSpec {
        let volume = Volume {
            name: "config".into(),
            config_map: Some(ConfigMapVolume { name: "settings".into(), ..ConfigMapVolume::default() }),
            ..Volume::default()
        };
        let mounted = matches!(self.config, Config::Volume | Config::SubPath);
        PodSpec {
            init_containers: (0..self.inits).map(|i| self.container(&format!("init-{i}"), false)).collect(),
            containers: (0..self.mains).map(|i| self.container(&format!("main-{i}"), i == 0)).collect(),
            volumes: if mounted { vec![volume] } else { Vec::new() },
            restart_policy: Some(self.policy),
            termination_grace_period_seconds: Some(5),
            hostname: (self.hostname > 0).then(|| format!("host-{}", self.hostname)),
            ..PodSpec::default()
        }
    }

    fn container(&self, name: &str, first: bool) -> Container {
        let probe = |failures| Probe {
            tcp_socket: Some(TcpSocketAction::default()),
            period_seconds: Some(20),
            failure_threshold: Some(failures),
            ..Probe::default()
        };
        let key = |config| match config {
            Config::Env => Some(("settings", "mode")),
            Config::Missing => Some(("absent", "mode")),
            _ => None,
        };
        let from = key(self.config).map(|(name, key)| EnvVar {
            name: "FROM".into(),
            value_from: Some(EnvVarSource {
                config_map_key_ref: Some(KeySelector { name: name.into(), key: key.into(), optional: None }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        });
        let variable = EnvVar { name: "V".into(), value: Some(self.variable.to_string()), value_from: None };
        let mount = VolumeMount {
            name: "config".into(),
            mount_path: "/etc/config".into(),
            sub_path: (self.config == Config::SubPath).then(|| "mode".into()),
            ..VolumeMount::default()
        };
        let port = |host_port| ContainerPort {
            container_port: 8080,
            host_port: Some(host_port),
            ..ContainerPort::default()
        };
        let mounted = matches!(self.config, Config::Volume | Config::SubPath);
        Container {
            name: name.into(),
            image: IMAGES[self.image].into(),
            image_pull_policy: self.never_pull.then_some(PullPolicy::Never),
            env: std::iter::once(variable).chain(from).collect(),
            ports: self.host_port.filter(|_| first).map(port).into_iter().collect(),
            volume_mounts: if mounted { vec![mount] } else { Vec::new() },
            liveness_probe: (first && self.probes & 1 != 0).then(|| probe(2)),
            readiness_probe: (first && self.probes & 2 != 0).then(|| probe(1)),
            startup_probe: (first && self.probes & 4 != 0).then(|| probe(3)),
            ..Container::default()
        }
    }
}

/// All objects of the directory, sorted by file as a source gives them.
pub(crate) fn objects(declared: &[Declared], mode: u64) -> Vec<Object> {
    let data = BTreeMap::from([("mode".to_owned(), mode.to_string())]);
    let metadata = ObjectMeta { name: "settings".into(), ..ObjectMeta::default() };
    let map = ConfigMap { metadata, data, ..ConfigMap::default() };
    let origin = Origin { file: "settings.yaml".into(), line: 1, column: 1 };
    let mut all: Vec<Object> = declared.iter().map(Declared::object).collect();
    all.push(Object::new(origin, Kind::ConfigMap(map)));
    all.sort_by(|a, b| a.origin.cmp(&b.origin));
    all
}
