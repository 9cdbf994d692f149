//! ConfigMaps and Secrets: what they are called and which keys they have. Values of Secrets are shown nowhere.

use std::collections::BTreeSet;

use keel_manifest::model::ObjectMeta;
use keel_manifest::{Kind, Object};
use serde_json::{Value, json};

use crate::render::objects::{Columns, field};
use crate::render::table::Table;

pub(crate) fn is_contents(object: &Object) -> bool {
    matches!(object.kind, Kind::ConfigMap(_) | Kind::Secret(_))
}

pub(crate) fn metadata(object: &Object) -> &ObjectMeta {
    match &object.kind {
        Kind::Pod(pod) => &pod.metadata,
        Kind::Deployment(deployment) => &deployment.metadata,
        Kind::ConfigMap(map) => &map.metadata,
        Kind::Secret(secret) => &secret.metadata,
    }
}

fn keys(object: &Object) -> BTreeSet<&str> {
    let (plain, encoded) = match &object.kind {
        Kind::ConfigMap(map) => (&map.data, &map.binary_data),
        Kind::Secret(secret) => (&secret.string_data, &secret.data),
        Kind::Pod(_) | Kind::Deployment(_) => return BTreeSet::new(),
    };
    plain.keys().chain(encoded.keys()).map(String::as_str).collect()
}

fn listed(object: &Object, between: &str) -> String {
    let keys: Vec<&str> = keys(object).into_iter().collect();
    if keys.is_empty() { "-".to_owned() } else { keys.join(between) }
}

fn place(object: &Object) -> String {
    format!("{}:{}", object.origin.file, object.origin.line)
}

/// Objects of one kind.
pub(crate) fn render(objects: &[&Object], columns: Columns) -> String {
    let mut names = vec!["NAME", "KEYS", "DECLARED-IN"];
    if columns.namespace {
        names.insert(0, "NAMESPACE");
    }
    let mut table = Table::with_header(&names, columns.headers);
    for object in objects {
        let key = object.key();
        let mut row = vec![key.name, listed(object, ","), place(object)];
        if columns.namespace {
            row.insert(0, key.namespace);
        }
        table.row(row);
    }
    table.render(0)
}

pub(crate) fn describe(object: &Object) -> String {
    let key = object.key();
    let mut text = String::new();
    field(&mut text, 0, "Name", &key.name);
    field(&mut text, 0, "Namespace", &key.namespace);
    field(&mut text, 0, "Kind", &key.kind);
    field(&mut text, 0, "Declared in", &place(object));
    field(&mut text, 0, "Keys", &listed(object, ", "));
    text
}

/// The object; a Secret has its keys without their values.
pub(crate) fn data(object: &Object) -> Value {
    let mut whole = object.to_json();
    if matches!(object.kind, Kind::Secret(_)) {
        for field in ["data", "stringData"] {
            if let Some(values) = whole.get_mut(field).and_then(Value::as_object_mut) {
                values.values_mut().for_each(|value| *value = Value::Null);
            }
        }
    }
    whole["metadata"]["annotations"]["evenkeel.dev/declared-in"] = json!(place(object));
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_shows_its_keys_and_nothing_of_its_values() {
        let text = b"{apiVersion: v1, kind: Secret, metadata: {name: s}, stringData: {token: hunter2}, data: {a: aHVudGVyMg==}}";
        let object = keel_manifest::parse("s.yaml", text).objects.remove(0);
        let table = render(&[&object], Columns { headers: true, ..Columns::default() });
        assert_eq!(table, "NAME   KEYS      DECLARED-IN\ns      a,token   s.yaml:1\n");
        let whole = format!("{table}{}{}", describe(&object), data(&object));
        assert!(whole.contains("token"), "{whole}");
        assert!(!whole.contains("hunter2") && !whole.contains("aHVudGVyMg"), "{whole}");
    }
}
