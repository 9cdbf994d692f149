//! An object of any kind, with the place it was declared at.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::model::{ConfigMap, Deployment, ObjectMeta, Pod, Secret};

/// One declared object.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    pub origin: Origin,
    pub kind: Kind,
    /// The name's place, then that of everything which `check::visit` visits, in its order.
    pub(crate) places: Arc<[Place]>,
}

/// A token in a file, for messages that are made when other files are known.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Place {
    pub line: u32,
    pub column: u32,
    pub width: u32,
    pub path: String,
    pub source_line: String,
}

/// Where an object was declared: line and column count from 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Origin {
    pub file: String,
    pub line: u32,
    pub column: u32,
}

/// The kinds that run.
#[expect(
    clippy::large_enum_variant,
    reason = "objects live in vectors of hundreds; plain fields are worth the bytes"
)]
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    Pod(Pod),
    Deployment(Deployment),
    ConfigMap(ConfigMap),
    Secret(Secret),
}

/// What makes two declarations the same object. The file is not part of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectKey {
    pub kind: String,
    pub namespace: String,
    pub name: String,
}

impl std::fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

impl Object {
    /// An object that was not read from a file's text.
    pub fn new(origin: Origin, kind: Kind) -> Object {
        Object { origin, kind, places: Arc::new([]) }
    }

    pub fn metadata(&self) -> &ObjectMeta {
        match &self.kind {
            Kind::Pod(pod) => &pod.metadata,
            Kind::Deployment(deployment) => &deployment.metadata,
            Kind::ConfigMap(map) => &map.metadata,
            Kind::Secret(secret) => &secret.metadata,
        }
    }

    pub(crate) fn metadata_mut(&mut self) -> &mut ObjectMeta {
        match &mut self.kind {
            Kind::Pod(pod) => &mut pod.metadata,
            Kind::Deployment(deployment) => &mut deployment.metadata,
            Kind::ConfigMap(map) => &mut map.metadata,
            Kind::Secret(secret) => &mut secret.metadata,
        }
    }

    pub fn name(&self) -> &str {
        &self.metadata().name
    }

    /// The declared namespace, or `default`.
    pub fn namespace(&self) -> &str {
        self.metadata().namespace.as_deref().unwrap_or("default")
    }

    pub fn key(&self) -> ObjectKey {
        ObjectKey {
            kind: self.kind.name().to_owned(),
            namespace: self.namespace().to_owned(),
            name: self.name().to_owned(),
        }
    }

    /// The whole manifest, `apiVersion` and `kind` first.
    pub fn to_json(&self) -> Value {
        let body = match &self.kind {
            Kind::Pod(pod) => json!(pod),
            Kind::Deployment(deployment) => json!(deployment),
            Kind::ConfigMap(map) => json!(map),
            Kind::Secret(secret) => json!(secret),
        };
        let mut manifest = serde_json::Map::new();
        manifest.insert("apiVersion".into(), json!(self.kind.api_version()));
        manifest.insert("kind".into(), json!(self.kind.name()));
        if let Value::Object(fields) = body {
            manifest.extend(fields);
        }
        Value::Object(manifest)
    }
}

impl Kind {
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Pod(_) => "Pod",
            Kind::Deployment(_) => "Deployment",
            Kind::ConfigMap(_) => "ConfigMap",
            Kind::Secret(_) => "Secret",
        }
    }

    pub fn api_version(&self) -> &'static str {
        match self {
            Kind::Deployment(_) => "apps/v1",
            Kind::Pod(_) | Kind::ConfigMap(_) | Kind::Secret(_) => "v1",
        }
    }
}
