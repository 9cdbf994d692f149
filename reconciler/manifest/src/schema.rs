//! The shapes of the model, derived from the structs themselves, so that reader, checker and editors' schema agree.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::known::{self, KINDS, KindState};
use crate::model;

/// What a value must look like.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Shape {
    Text,
    Bool,
    Int { min: i64, max: i64 },
    OneOf(Vec<String>),
    Quantity,
    IntOrText,
    List(Box<Shape>),
    Map(Box<Shape>),
    Struct(String),
}

#[derive(Debug)]
pub(crate) struct Field {
    pub shape: Shape,
    pub required: bool,
}

pub(crate) struct Shapes {
    structs: BTreeMap<String, BTreeMap<String, Field>>,
}

pub(crate) static SHAPES: LazyLock<Shapes> = LazyLock::new(Shapes::derive);

impl Shapes {
    pub(crate) fn fields(&self, type_name: &str) -> &BTreeMap<String, Field> {
        static NONE: BTreeMap<String, Field> = BTreeMap::new();
        self.structs.get(type_name).unwrap_or(&NONE)
    }

    /// Shortest path from `root` to a field of this name, e.g. `spec.restartPolicy`. Lists show as `[]`.
    pub(crate) fn path_to(&self, root: &str, field: &str) -> Option<String> {
        let mut seen = BTreeSet::from([root]);
        let mut level = vec![(root, String::new())];
        while !level.is_empty() {
            let mut next = Vec::new();
            for (type_name, path) in level {
                let fields = self.fields(type_name);
                if fields.contains_key(field) || known_field(type_name, field) {
                    return Some(format!("{path}{field}"));
                }
                for (name, inner) in fields {
                    let (target, mark) = inner_struct(&inner.shape);
                    if let Some(target) = target
                        && seen.insert(target)
                    {
                        next.push((target, format!("{path}{name}{mark}.")));
                    }
                }
            }
            level = next;
        }
        None
    }

    fn derive() -> Shapes {
        let definitions = definitions();
        let structs = definitions
            .iter()
            .filter(|(_, d)| d.get("properties").is_some())
            .map(|(name, definition)| (name.clone(), struct_fields(definition, &definitions)))
            .collect();
        Shapes { structs }
    }
}

/// JSON schema (draft 2020-12) of one kind, or of any kind that runs. `None`: no such kind.
pub fn schema(kind: Option<&str>) -> Option<Value> {
    let runs = |name: &str| known::kind_named(name).is_some_and(|k| k.state == KindState::Runs);
    let mut definitions = definitions();
    for (name, definition) in &mut definitions {
        close(name, definition);
    }
    let reference = |name: &str| json!({"$ref": format!("#/$defs/{name}")});
    let mut schema = Map::new();
    schema.insert("$schema".into(), json!("https://json-schema.org/draft/2020-12/schema"));
    match kind {
        Some(wanted) => {
            let name = KINDS.iter().map(|k| k.kind).find(|k| k.eq_ignore_ascii_case(wanted) && runs(k))?;
            schema.insert("title".into(), json!(name));
            schema.insert("$ref".into(), json!(format!("#/$defs/{name}")));
            definitions.retain(|d, _| !runs(d) || d == name);
        }
        None => {
            let kinds = KINDS.iter().filter(|k| k.state == KindState::Runs).map(|k| reference(k.kind));
            let kinds: Vec<Value> = kinds.chain([reference("List")]).collect();
            schema.insert("oneOf".into(), Value::Array(kinds));
            definitions.insert("List".into(), list());
        }
    }
    schema.insert("$defs".into(), Value::Object(definitions));
    Some(Value::Object(schema))
}

/// Any number of objects in one document; lists may hold lists.
fn list() -> Value {
    json!({
        "type": "object",
        "description": "Several objects in one document.",
        "properties": {
            "apiVersion": {"const": "v1"},
            "kind": {"const": "List"},
            "metadata": {"type": "object", "description": "Accepted; has no effect on one host."},
            "items": {"type": "array", "items": {"$ref": "#"}}
        },
        "required": ["apiVersion", "kind", "items"],
        "additionalProperties": false
    })
}

/// Kinds that `schema` knows.
pub fn kinds() -> Vec<&'static str> {
    KINDS.iter().filter(|k| k.state == KindState::Runs).map(|k| k.kind).collect()
}

/// Makes the published form of a definition: no other fields, none that is not done yet, and the envelope of kinds.
fn close(name: &str, definition: &mut Value) {
    let Some(fields) = definition.get_mut("properties").and_then(Value::as_object_mut) else { return };
    if let Some(known) = known::fields(name) {
        for field in known.not_yet {
            fields.shift_remove(*field);
        }
        for field in known.no_effect {
            fields
                .entry(*field)
                .or_insert_with(|| json!({"description": "Accepted; has no effect on one host."}));
        }
    }
    let kind = KINDS.iter().find(|k| k.kind == name && k.state == KindState::Runs);
    if let Some(kind) = kind {
        fields.shift_insert(0, "apiVersion".into(), json!({"const": kind.api_version}));
        fields.shift_insert(1, "kind".into(), json!({"const": kind.kind}));
    }
    let Some(definition) = definition.as_object_mut() else { return };
    definition.insert("additionalProperties".into(), json!(false));
    if kind.is_some()
        && let Some(required) = definition.entry("required").or_insert_with(|| json!([])).as_array_mut()
    {
        required.splice(0..0, [json!("apiVersion"), json!("kind")]);
    }
}

fn definitions() -> Map<String, Value> {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    generator.subschema_for::<model::Pod>();
    generator.subschema_for::<model::Deployment>();
    generator.subschema_for::<model::ConfigMap>();
    generator.subschema_for::<model::Secret>();
    generator.take_definitions(true)
}

fn struct_fields(definition: &Value, all: &Map<String, Value>) -> BTreeMap<String, Field> {
    let required: BTreeSet<&str> =
        definition["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let properties = definition["properties"].as_object().into_iter().flatten();
    properties
        .map(|(name, schema)| {
            let field = Field { shape: shape(schema, all), required: required.contains(name.as_str()) };
            (name.clone(), field)
        })
        .collect()
}

/// Only the forms that the model's derives produce.
fn shape(schema: &Value, all: &Map<String, Value>) -> Shape {
    if schema.get("x-kubernetes-int-or-string").is_some() {
        return Shape::IntOrText;
    }
    if schema["format"] == "quantity" {
        return Shape::Quantity;
    }
    if let Some(target) = schema["$ref"].as_str().and_then(|r| r.strip_prefix("#/$defs/")) {
        let definition = &all[target];
        return if definition.get("properties").is_some() {
            Shape::Struct(target.to_owned())
        } else {
            shape(definition, all)
        };
    }
    let words = enum_words(schema);
    if !words.is_empty() {
        return Shape::OneOf(words);
    }
    if let Some(options) = schema["anyOf"].as_array() {
        let first = options.iter().find(|o| o["type"] != "null").unwrap_or(&Value::Null);
        return shape(first, all);
    }
    match type_name(schema) {
        "boolean" => Shape::Bool,
        "integer" => integer(schema),
        "array" => Shape::List(Box::new(shape(&schema["items"], all))),
        "object" => Shape::Map(Box::new(shape(&schema["additionalProperties"], all))),
        _ => Shape::Text,
    }
}

fn integer(schema: &Value) -> Shape {
    // Kubernetes has signed numbers: its largest uid is 2^31-1, its largest duration 2^63-1.
    let max = match schema["format"].as_str() {
        Some("uint16") => i64::from(u16::MAX),
        Some("int32" | "uint32") => i64::from(i32::MAX),
        _ => i64::MAX,
    };
    Shape::Int {
        min: schema["minimum"].as_i64().unwrap_or(i64::from(i32::MIN)),
        max: schema["maximum"].as_i64().unwrap_or(max).min(max),
    }
}

fn type_name(schema: &Value) -> &str {
    match &schema["type"] {
        Value::Array(options) => {
            options.iter().filter_map(Value::as_str).find(|t| *t != "null").unwrap_or("")
        }
        other => other.as_str().unwrap_or(""),
    }
}

fn enum_words(schema: &Value) -> Vec<String> {
    let word = |v: &Value| v.as_str().map(str::to_owned);
    if let Some(word) = schema.get("const").and_then(word) {
        return vec![word];
    }
    if let Some(words) = schema["enum"].as_array() {
        return words.iter().filter_map(word).collect();
    }
    schema["oneOf"].as_array().into_iter().flatten().flat_map(enum_words).collect()
}

fn inner_struct(shape: &Shape) -> (Option<&str>, &'static str) {
    match shape {
        Shape::Struct(name) => (Some(name), ""),
        Shape::List(inner) => (inner_struct(inner).0, "[]"),
        _ => (None, ""),
    }
}

fn known_field(type_name: &str, field: &str) -> bool {
    known::fields(type_name).is_some_and(|k| k.not_yet.contains(&field) || k.no_effect.contains(&field))
}
