//! Manifests to desired pods: Deployments expanded, references resolved, hashes made.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use keel_manifest::extension::{held_ports, notifies};
use keel_manifest::model::{
    Container, Deployment, EnvFrom, EnvVarSource, KeySelector, KeyToPath, Pod, PodSpec, PullPolicy,
    ResourceFieldRef, RestartPolicy, Volume,
};
use keel_manifest::{Kind, Object, ObjectKey, Quantity, logging};
use serde_json::Value;

use crate::hash::Hasher;
use crate::image::{canonical_image, is_latest};
use crate::model::{
    Conflict, ContainerName, Desired, DesiredContainer, DesiredDeployment, DesiredPod, EnvEntry, EnvValue,
    Origin, Owner, PodId, PodKey, PullSecret, Resolved, Role, SpecHash, VolumeFiles,
};

/// Fields of a container that take effect without a restart, or that are hashed in resolved form.
const NOT_HASHED: [&str; 8] = [
    "imagePullPolicy",
    "env",
    "envFrom",
    "ports",
    "livenessProbe",
    "readinessProbe",
    "startupProbe",
    "lifecycle",
];

const DEFAULT_FILE_MODE: u32 = 0o644;

/// Of several declarations of one object the one in its recorded owner's file counts (`owners`: object to file),
/// else the first in the order given. The result is `complete`; a source that knows better says so afterwards.
pub fn lower_desired(objects: &[Object], owners: &BTreeMap<ObjectKey, String>) -> Desired {
    let mut desired = Desired { complete: true, ..Desired::default() };
    let winners = choose_winners(objects, owners, &mut desired.conflicts);
    let sources = Sources::collect(&winners);
    for object in winners {
        match &object.kind {
            Kind::Pod(pod) => add_pod(&mut desired, object, pod, &sources),
            Kind::Deployment(deployment) => add_deployment(&mut desired, object, deployment, &sources),
            Kind::ConfigMap(_) | Kind::Secret(_) => {}
        }
    }
    desired
}

impl From<&keel_manifest::Origin> for Origin {
    fn from(origin: &keel_manifest::Origin) -> Origin {
        Origin { file: origin.file.clone(), line: origin.line, column: origin.column }
    }
}

fn choose_winners<'a>(
    objects: &'a [Object],
    owners: &BTreeMap<ObjectKey, String>,
    conflicts: &mut Vec<Conflict>,
) -> Vec<&'a Object> {
    let mut chosen: BTreeMap<ObjectKey, usize> = BTreeMap::new();
    let mut repeated = Vec::new();
    for (index, object) in objects.iter().enumerate() {
        let key = object.key();
        match chosen.get(&key) {
            None => drop(chosen.insert(key, index)),
            Some(&first) => {
                let owner = owners.get(&key);
                let owned = |i: usize| owner.is_some_and(|file| *file == objects[i].origin.file);
                let takes_over = owned(index) && !owned(first);
                repeated.push((key.clone(), if takes_over { first } else { index }));
                if takes_over {
                    chosen.insert(key, index);
                }
            }
        }
    }
    conflicts.extend(repeated.into_iter().map(|(key, loser)| Conflict {
        kept: Origin::from(&objects[chosen[&key]].origin),
        ignored: Origin::from(&objects[loser].origin),
        object: key.to_string(),
    }));
    let mut kept: Vec<usize> = chosen.into_values().collect();
    kept.sort_unstable();
    kept.into_iter().map(|index| &objects[index]).collect()
}

fn add_pod(desired: &mut Desired, object: &Object, pod: &Pod, sources: &Sources) {
    let key = PodKey { namespace: object.namespace().to_owned(), name: object.name().to_owned() };
    let template = Template {
        owner: Owner { kind: "Pod".into(), name: key.name.clone() },
        origin: Origin::from(&object.origin),
        labels: &pod.metadata.labels,
        annotations: &pod.metadata.annotations,
        spec: &pod.spec,
    };
    let parts = template.resolve(&key.namespace, sources);
    template.insert(desired, key, &parts);
}

fn add_deployment(desired: &mut Desired, object: &Object, deployment: &Deployment, sources: &Sources) {
    let replicas = deployment.spec.replicas.unwrap_or(1);
    let owner = PodKey { namespace: object.namespace().to_owned(), name: object.name().to_owned() };
    let template = Template {
        owner: Owner { kind: "Deployment".into(), name: owner.name.clone() },
        origin: Origin::from(&object.origin),
        labels: &deployment.spec.template.metadata.labels,
        annotations: &deployment.spec.template.metadata.annotations,
        spec: &deployment.spec.template.spec,
    };
    let parts = template.resolve(&owner.namespace, sources);
    for index in 0..replicas {
        let name = format!("{}-{index}", owner.name);
        template.insert(desired, PodKey { namespace: owner.namespace.clone(), name }, &parts);
    }
    let origin = template.origin;
    desired.deployments.insert(owner, DesiredDeployment { replicas, origin });
}

/// What a pod is made from, whether declared by itself or by its owner.
struct Template<'a> {
    owner: Owner,
    origin: Origin,
    labels: &'a BTreeMap<String, String>,
    annotations: &'a BTreeMap<String, String>,
    spec: &'a PodSpec,
}

/// The parts that all replicas have in common.
struct Parts {
    sandbox_hash: SpecHash,
    volumes_hash: SpecHash,
    containers: Vec<DesiredContainer>,
    resolved: Resolved,
}

impl Template<'_> {
    fn resolve(&self, namespace: &str, sources: &Sources) -> Result<Parts, String> {
        let mut resolved = Resolved::default();
        for volume in &self.spec.volumes {
            if let Some(files) = sources.volume_files(namespace, volume)? {
                resolved.files.insert(volume.name.clone(), files);
            }
        }
        for container in self.spec.all_containers() {
            let env = resolve_env(self.spec, container, namespace, sources)?;
            resolved.env.insert(ContainerName(container.name.clone()), env);
        }
        resolved.pull_secrets =
            self.spec.image_pull_secrets.iter().map(|s| sources.pull_secret(namespace, &s.name)).collect();
        let init = self.spec.init_containers.iter().enumerate().map(|(index, c)| (Role::Init, index, c));
        let main = self.spec.containers.iter().enumerate().map(|(index, c)| (Role::Main, index, c));
        let containers: Vec<_> =
            init.chain(main).map(|(role, index, c)| self.container(role, index, c, &resolved)).collect();
        Ok(Parts {
            sandbox_hash: self.sandbox_hash(&containers),
            volumes_hash: volumes_hash(&resolved),
            containers,
            resolved,
        })
    }

    fn insert(&self, desired: &mut Desired, key: PodKey, parts: &Result<Parts, String>) {
        if let Some(other) = desired.pods.get(&key) {
            let conflict = Conflict {
                object: format!("Pod {key}"),
                kept: other.origin.clone(),
                ignored: self.origin.clone(),
            };
            desired.conflicts.push(conflict);
            return;
        }
        match parts {
            Err(missing) => drop(desired.unresolved.insert(key, missing.clone())),
            Ok(parts) => {
                let pod = DesiredPod {
                    id: PodId::of(&key),
                    owner: self.owner.clone(),
                    origin: self.origin.clone(),
                    labels: self.labels.clone(),
                    annotations: self.annotations.clone(),
                    spec: self.spec.clone(),
                    sandbox_hash: parts.sandbox_hash.clone(),
                    volumes_hash: parts.volumes_hash.clone(),
                    containers: parts.containers.clone(),
                    resolved: parts.resolved.clone(),
                    key: key.clone(),
                };
                desired.pods.insert(key, Arc::new(pod));
            }
        }
    }

    fn container(
        &self,
        role: Role,
        index: usize,
        container: &Container,
        resolved: &Resolved,
    ) -> DesiredContainer {
        let image = canonical_image(&container.image);
        let default_policy = if is_latest(&image) { PullPolicy::Always } else { PullPolicy::IfNotPresent };
        let restart = match (role, self.spec.restart_policy.unwrap_or_default()) {
            // An init container is done when it has succeeded.
            (Role::Init, RestartPolicy::Always) => RestartPolicy::OnFailure,
            (_, policy) => policy,
        };
        DesiredContainer {
            name: ContainerName(container.name.clone()),
            role,
            pull_policy: container.image_pull_policy.unwrap_or(default_policy),
            restart,
            hash: self.container_hash(container, &image, resolved),
            image,
            index,
        }
    }

    fn container_hash(&self, container: &Container, image: &str, resolved: &Resolved) -> SpecHash {
        let mut hasher = Hasher::default();
        let mut written = serde_json::to_value(container).unwrap_or(Value::Null);
        if let Value::Object(fields) = &mut written {
            for field in NOT_HASHED {
                fields.remove(field);
            }
            fields.insert("image".into(), image.into());
        }
        hasher.json(&written);
        for (name, _) in held_ports(self.annotations, container) {
            hasher.text("held port").text(name);
        }
        if notifies(self.annotations, container) {
            hasher.text("notifies");
        }
        for entry in resolved.env.get(container.name.as_str()).into_iter().flatten() {
            let (kind, text) = match &entry.value {
                EnvValue::Literal(text) | EnvValue::Verbatim(text) | EnvValue::Resource(text) => {
                    ("=", text.as_str())
                }
                EnvValue::Field(path) => ("@", self.metadata_field(path).unwrap_or(path)),
                EnvValue::Host { resource, divisor_millis } => {
                    hasher.number(*divisor_millis);
                    ("#", resource.as_str())
                }
            };
            hasher.text(&entry.name).text(kind).text(text);
        }
        // A running container keeps its log's driver and options.
        for key in [logging::DRIVER, logging::OPTIONS] {
            if let Some(value) = self.annotations.get(key) {
                hasher.text(key).text(value);
            }
        }
        // A file mounted by subPath does not follow its volume, so its contents belong to the container.
        for mount in &container.volume_mounts {
            let (Some(path), Some(volume)) = (&mount.sub_path, resolved.files.get(&mount.name)) else {
                continue;
            };
            let path = path.trim_end_matches('/');
            let below = |file: &str| {
                file == path || file.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'))
            };
            for (file, (contents, mode)) in volume.files.iter().filter(|(file, _)| below(file)) {
                hasher.text(file).bytes(contents).number(u64::from(*mode));
            }
        }
        hasher.finish()
    }

    /// The value behind `metadata.labels['x']` and `metadata.annotations['x']`: a change of it changes the environment.
    fn metadata_field(&self, path: &str) -> Option<&str> {
        let inner = |prefix| path.strip_prefix(prefix)?.strip_suffix("']");
        let value = match inner("metadata.labels['") {
            Some(key) => self.labels.get(key),
            None => self.annotations.get(inner("metadata.annotations['")?),
        };
        Some(value.map_or("", String::as_str))
    }

    fn sandbox_hash(&self, containers: &[DesiredContainer]) -> SpecHash {
        let spec = PodSpec {
            init_containers: Vec::new(),
            containers: Vec::new(),
            volumes: self.spec.volumes.iter().map(volume_identity).collect(),
            image_pull_secrets: Vec::new(),
            restart_policy: None,
            termination_grace_period_seconds: None,
            ..self.spec.clone()
        };
        let mut hasher = Hasher::default();
        hasher.json(&serde_json::to_value(&spec).unwrap_or(Value::Null));
        for container in containers.iter().filter(|c| c.role == Role::Init) {
            hasher.text(&container.hash.0);
        }
        hasher.finish()
    }
}

/// What of a volume cannot change under a running pod. Contents of ConfigMaps and Secrets can.
fn volume_identity(volume: &Volume) -> Volume {
    let mut identity = volume.clone();
    if identity.config_map.is_some() {
        identity.config_map = Some(keel_manifest::model::ConfigMapVolume::default());
    }
    if identity.secret.is_some() {
        identity.secret = Some(keel_manifest::model::SecretVolume::default());
    }
    identity
}

fn volumes_hash(resolved: &Resolved) -> SpecHash {
    let mut hasher = Hasher::default();
    for (name, volume) in &resolved.files {
        hasher.text(name).number(volume.files.len() as u64);
        for (path, (contents, mode)) in &volume.files {
            hasher.text(path).bytes(contents).number(u64::from(*mode));
        }
    }
    hasher.finish()
}

type Contents = BTreeMap<String, Arc<[u8]>>;

/// ConfigMaps and Secrets by namespace and name.
#[derive(Default)]
struct Sources {
    config_maps: BTreeMap<(String, String), Result<Contents, String>>,
    secrets: BTreeMap<(String, String), Result<Contents, String>>,
    /// Namespace, ConfigMap and key of what is in `binaryData`: for volumes, never for environments.
    binary: BTreeSet<(String, String, String)>,
}

#[derive(Clone, Copy)]
enum SourceKind {
    ConfigMap,
    Secret,
}

impl SourceKind {
    fn as_str(self) -> &'static str {
        match self {
            SourceKind::ConfigMap => "ConfigMap",
            SourceKind::Secret => "Secret",
        }
    }
}

impl Sources {
    fn collect(objects: &[&Object]) -> Sources {
        let mut sources = Sources::default();
        for object in objects {
            if let Kind::ConfigMap(map) = &object.kind {
                let name =
                    |key: &String| (object.namespace().to_owned(), object.name().to_owned(), key.clone());
                sources.binary.extend(map.binary_data.keys().map(name));
            }
            let (into, contents) = match &object.kind {
                Kind::ConfigMap(map) => (&mut sources.config_maps, map.contents()),
                Kind::Secret(secret) => (&mut sources.secrets, secret.contents()),
                Kind::Pod(_) | Kind::Deployment(_) => continue,
            };
            let shared = contents
                .map(|all| all.into_iter().map(|(key, value)| (key, Arc::from(value))).collect())
                .map_err(|error| format!("{}: {error}", object.key()));
            into.insert((object.namespace().to_owned(), object.name().to_owned()), shared);
        }
        sources
    }

    /// `Ok(None)`: it does not exist and may be missing.
    fn object(
        &self,
        kind: SourceKind,
        namespace: &str,
        name: &str,
        optional: bool,
    ) -> Result<Option<&Contents>, String> {
        let all = match kind {
            SourceKind::ConfigMap => &self.config_maps,
            SourceKind::Secret => &self.secrets,
        };
        match all.get(&(namespace.to_owned(), name.to_owned())) {
            Some(Ok(contents)) => Ok(Some(contents)),
            Some(Err(problem)) => Err(problem.clone()),
            None if optional => Ok(None),
            None => Err(format!("{} {namespace}/{name} does not exist", kind.as_str())),
        }
    }

    fn key(
        &self,
        kind: SourceKind,
        namespace: &str,
        selector: &KeySelector,
    ) -> Result<Option<String>, String> {
        let optional = selector.optional.unwrap_or(false);
        let Some(contents) = self.object(kind, namespace, &selector.name, optional)? else { return Ok(None) };
        match contents
            .get(&selector.key)
            .filter(|_| self.is_text(kind, namespace, &selector.name, &selector.key))
        {
            Some(bytes) => text_of(kind, namespace, &selector.name, &selector.key, bytes).map(Some),
            None if optional => Ok(None),
            None => Err(missing_key(kind, namespace, &selector.name, &selector.key)),
        }
    }

    /// Whether environments see the key, by Kubernetes' rule.
    fn is_text(&self, kind: SourceKind, namespace: &str, name: &str, key: &str) -> bool {
        matches!(kind, SourceKind::Secret)
            || !self.binary.contains(&(namespace.to_owned(), name.to_owned(), key.to_owned()))
    }

    /// A missing one is no obstacle, as in Kubernetes: the pull goes on without it, and says so if it fails.
    fn pull_secret(&self, namespace: &str, name: &str) -> PullSecret {
        let config = self.object(SourceKind::Secret, namespace, name, false).and_then(|contents| {
            let contents = contents.cloned().unwrap_or_default();
            if let Some(config) = contents.get(".dockerconfigjson") {
                return Ok(config.clone());
            }
            // The old format is the inner table of the new one.
            let inner = contents
                .get(".dockercfg")
                .ok_or_else(|| missing_key(SourceKind::Secret, namespace, name, ".dockerconfigjson"))?;
            Ok(Arc::from([b"{\"auths\":".as_slice(), inner, b"}"].concat()))
        });
        PullSecret { name: format!("Secret {namespace}/{name}"), config }
    }

    fn env_from(&self, namespace: &str, from: &EnvFrom, env: &mut Vec<EnvEntry>) -> Result<(), String> {
        let prefix = from.prefix.as_deref().unwrap_or("");
        for (kind, source) in
            [(SourceKind::ConfigMap, &from.config_map_ref), (SourceKind::Secret, &from.secret_ref)]
        {
            let Some(source) = source else { continue };
            let optional = source.optional.unwrap_or(false);
            for (key, bytes) in self.object(kind, namespace, &source.name, optional)?.into_iter().flatten() {
                if self.is_text(kind, namespace, &source.name, key) {
                    let text = text_of(kind, namespace, &source.name, key, bytes)?;
                    env.push(EnvEntry { name: format!("{prefix}{key}"), value: EnvValue::Verbatim(text) });
                }
            }
        }
        Ok(())
    }

    fn volume_files(&self, namespace: &str, volume: &Volume) -> Result<Option<VolumeFiles>, String> {
        let (kind, name, items, mode, optional) = match (&volume.config_map, &volume.secret) {
            (Some(map), _) => (SourceKind::ConfigMap, &map.name, &map.items, map.default_mode, map.optional),
            (None, Some(secret)) => {
                (SourceKind::Secret, &secret.secret_name, &secret.items, secret.default_mode, secret.optional)
            }
            (None, None) => return Ok(None),
        };
        let optional = optional.unwrap_or(false);
        let mode = mode.unwrap_or(DEFAULT_FILE_MODE);
        let secret = matches!(kind, SourceKind::Secret);
        let Some(contents) = self.object(kind, namespace, name, optional)? else {
            return Ok(Some(VolumeFiles { files: BTreeMap::new(), secret }));
        };
        if items.is_empty() {
            let files = contents.iter().map(|(key, bytes)| (key.clone(), (bytes.clone(), mode))).collect();
            return Ok(Some(VolumeFiles { files, secret }));
        }
        let mut files = BTreeMap::new();
        for KeyToPath { key, path, mode: own } in items {
            check_relative(path)?;
            match contents.get(key) {
                Some(bytes) => drop(files.insert(path.clone(), (bytes.clone(), own.unwrap_or(mode)))),
                None if optional => {}
                None => return Err(missing_key(kind, namespace, name, key)),
            }
        }
        Ok(Some(VolumeFiles { files, secret }))
    }
}

/// The last guard before a path of a manifest reaches a file system.
fn check_relative(path: &str) -> Result<(), String> {
    let good = !path.is_empty() && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if good { Ok(()) } else { Err(format!("{path:?} is not a relative path below its volume")) }
}

fn missing_key(kind: SourceKind, namespace: &str, name: &str, key: &str) -> String {
    format!("{} {namespace}/{name} has no key {key:?}", kind.as_str())
}

fn text_of(kind: SourceKind, namespace: &str, name: &str, key: &str, bytes: &[u8]) -> Result<String, String> {
    let text = std::str::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
    text.map(str::to_owned).ok_or_else(|| {
        format!(
            "key {key:?} of {} {namespace}/{name} is not text and cannot be an environment variable",
            kind.as_str()
        )
    })
}

fn resolve_env(
    spec: &PodSpec,
    container: &Container,
    namespace: &str,
    sources: &Sources,
) -> Result<Vec<EnvEntry>, String> {
    let mut env = Vec::new();
    for from in &container.env_from {
        sources.env_from(namespace, from, &mut env)?;
    }
    for variable in &container.env {
        let value = match &variable.value_from {
            None => Some(EnvValue::Literal(variable.value.clone().unwrap_or_default())),
            Some(source) => resolve_source(spec, container, namespace, source, sources)?,
        };
        env.extend(value.map(|value| EnvEntry { name: variable.name.clone(), value }));
    }
    Ok(env)
}

fn resolve_source(
    spec: &PodSpec,
    container: &Container,
    namespace: &str,
    source: &EnvVarSource,
    sources: &Sources,
) -> Result<Option<EnvValue>, String> {
    Ok(if let Some(selector) = &source.config_map_key_ref {
        sources.key(SourceKind::ConfigMap, namespace, selector)?.map(EnvValue::Verbatim)
    } else if let Some(selector) = &source.secret_key_ref {
        sources.key(SourceKind::Secret, namespace, selector)?.map(EnvValue::Verbatim)
    } else if let Some(field) = &source.field_ref {
        Some(EnvValue::Field(field.field_path.clone()))
    } else if let Some(resource) = &source.resource_field_ref {
        Some(resource_value(spec, container, resource)?)
    } else {
        Some(EnvValue::Literal(String::new()))
    })
}

/// Amount divided by the divisor, rounded up. A request defaults to the limit and then to nothing, a limit to what the
/// host has.
fn resource_value(
    spec: &PodSpec,
    container: &Container,
    field: &ResourceFieldRef,
) -> Result<EnvValue, String> {
    let of = match &field.container_name {
        None => container,
        Some(name) => spec
            .all_containers()
            .find(|c| c.name == *name)
            .ok_or_else(|| format!("resourceFieldRef names container {name:?}, which does not exist"))?,
    };
    let amount = |resource: &str| -> Option<&Quantity> {
        let resources = of.resources.as_ref()?;
        match resource.split_once('.')? {
            ("limits", name) => resources.limits.get(name),
            ("requests", name) => resources.requests.get(name).or_else(|| resources.limits.get(name)),
            _ => None,
        }
    };
    let bad = |error| format!("resourceFieldRef {}: {error}", field.resource);
    let one = Quantity("1".into());
    let divisor_millis = field.divisor.as_ref().unwrap_or(&one).millis().map_err(bad)?.max(1).unsigned_abs();
    let Some(amount) = amount(&field.resource) else {
        return Ok(match field.resource.as_str() {
            "limits.cpu" | "limits.memory" => {
                EnvValue::Host { resource: field.resource.clone(), divisor_millis }
            }
            _ => EnvValue::Resource("0".into()),
        });
    };
    let amount = amount.millis().map_err(bad)?.max(0).unsigned_abs();
    Ok(EnvValue::Resource(amount.div_ceil(divisor_millis).to_string()))
}
