//! `get`, `describe`, `status` and `events`: views of one status.

use std::collections::BTreeMap;
use std::sync::Arc;

use keel_api::{ClientError, Event, Status, exit};
use keel_manifest::Object;
use keel_plan::{DeploymentStatus, PodKey, PodStatus};
use serde_json::{Value, json};

use crate::cli::{self, Describe, Events, Form, Get, TextOrJson};
use crate::commands::apply::client_runtime;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::object::{self, Kind, Wanted};
use crate::render::contents;
use crate::render::objects::{self, Columns};
use crate::text::now_ms;
use crate::world;

/// What a command asked for, in the order of the status.
#[derive(Default)]
struct Found {
    pods: Vec<Arc<PodStatus>>,
    deployments: Vec<DeploymentStatus>,
    /// ConfigMaps and Secrets, which have no status: what is declared is all there is.
    contents: Vec<Object>,
    missing: Vec<Failure>,
}

impl Found {
    fn len(&self) -> usize {
        self.pods.len() + self.deployments.len() + self.contents.len()
    }

    fn is_empty(&self) -> bool {
        self.pods.is_empty() && self.deployments.is_empty() && self.contents.is_empty()
    }
}

pub(crate) fn get(context: &Context, args: &Get) -> Outcome {
    let wanted = object::parse(&args.objects)?;
    if args.watch {
        return watch(context, args, &wanted);
    }
    let status = world::status(context)?;
    note_no_daemon(context, &status, args.output);
    let found = find(context, &status, args, &wanted)?;
    let one = matches!(&wanted[..], [Wanted { name: Some(_), .. }]);
    let text = render(context, args, &found, one);
    context.term.print(&text)?;
    if found.is_empty() && found.missing.is_empty() && matches!(args.output, Form::Table | Form::Wide) {
        let place = if args.all_namespaces {
            "anywhere".into()
        } else {
            format!("in namespace {}", context.settings.namespace)
        };
        context.term.note(&format!("nothing {place}\n"));
    }
    missing(context, found.missing, args.ignore_not_found)
}

/// Without anybody who looks after them, what ends stays so.
fn note_no_daemon(context: &Context, status: &Status, form: Form) {
    let for_people = matches!(form, Form::Table | Form::Wide);
    if for_people && !status.pods.is_empty() && !world::has_daemon(context) {
        context.term.note("no daemon is running: manifests are not watched\n");
    }
}

/// All but the last are said here.
fn missing(context: &Context, mut missing: Vec<Failure>, ignore: bool) -> Outcome {
    let last = missing.pop();
    if ignore {
        return Ok(());
    }
    for failure in missing {
        context.term.say(&failure.render(context.term.color_err));
    }
    last.map_or(Ok(()), Err)
}

fn find(context: &Context, status: &Status, args: &Get, wanted: &[Wanted]) -> Outcome<Found> {
    let mut found = Found::default();
    let namespace = &context.settings.namespace;
    let here = |key: &PodKey| args.all_namespaces || key.namespace == *namespace;
    let labelled =
        |pod: &PodStatus| args.selector.as_ref().is_none_or(|selector| selector.matches(&pod.labels));
    for Wanted { kind, name } in wanted {
        let named = |key: &PodKey| here(key) && name.as_ref().is_none_or(|name| key.name == *name);
        let before = found.len();
        match kind {
            Kind::Pod => {
                found.pods.extend(status.pods.iter().filter(|pod| named(&pod.key) && labelled(pod)).cloned());
            }
            // A status of a deployment carries no labels; it is found by those of its pods.
            Kind::Deployment => {
                let fits = |d: &&DeploymentStatus| {
                    named(&d.key) && (args.selector.is_none() || owned(status, d).any(labelled))
                };
                found.deployments.extend(status.deployments.iter().filter(fits).cloned());
            }
            Kind::ConfigMap | Kind::Secret => {
                let declared = world::contents(context)?;
                let fits = |object: &Object| {
                    let key = object.key();
                    let place = PodKey { namespace: key.namespace, name: key.name };
                    let labels = &contents::metadata(object).labels;
                    key.kind == kind.name()
                        && named(&place)
                        && args.selector.as_ref().is_none_or(|selector| selector.matches(labels))
                };
                found.contents.extend(declared.into_iter().filter(fits));
            }
        }
        if let (Some(name), true) = (name, before == found.len()) {
            found.missing.push(object::not_found(status, *kind, namespace, name));
        }
    }
    Ok(found)
}

fn owned<'a>(status: &'a Status, deployment: &'a DeploymentStatus) -> impl Iterator<Item = &'a PodStatus> {
    status.pods.iter().map(AsRef::as_ref).filter(|pod| {
        pod.key.namespace == deployment.key.namespace
            && pod.owner.kind == Kind::Deployment.name()
            && pod.owner.name == deployment.key.name
    })
}

fn render(context: &Context, args: &Get, found: &Found, one: bool) -> String {
    let columns = Columns {
        headers: !args.no_headers,
        wide: args.output == Form::Wide,
        namespace: args.all_namespaces,
        color: context.term.color_out,
    };
    match args.output {
        Form::Table | Form::Wide => {
            let mut tables = Vec::new();
            if !found.pods.is_empty() {
                tables.push(objects::render_pods(found.pods.iter().map(AsRef::as_ref), columns, now_ms()));
            }
            if !found.deployments.is_empty() {
                tables.push(objects::render_deployments(&found.deployments, columns));
            }
            for kind in [Kind::ConfigMap, Kind::Secret] {
                let of = found.contents.iter().filter(|object| object.key().kind == kind.name());
                let of: Vec<&Object> = of.collect();
                if !of.is_empty() {
                    tables.push(contents::render(&of, columns));
                }
            }
            tables.join("\n")
        }
        Form::Name => {
            let pods = found.pods.iter().map(|pod| format!("pod/{}\n", pod.key.name));
            let deployments = found.deployments.iter().map(|d| format!("deployment/{}\n", d.key.name));
            let contents = found.contents.iter().map(|object| {
                let key = object.key();
                format!("{}/{}\n", key.kind.to_lowercase(), key.name)
            });
            pods.chain(deployments).chain(contents).collect()
        }
        Form::Json | Form::Yaml => data(args.output, &items(context, found), one),
    }
}

fn items(context: &Context, found: &Found) -> Vec<Value> {
    let pod = |pod: &Arc<PodStatus>| {
        let mut item = with_kind(Kind::Pod, &**pod);
        if let (Some(declared), Some(fields)) = (world::declared(context, &pod.key), item.as_object_mut()) {
            let status = fields.shift_remove("status").unwrap_or_default();
            fields.insert("spec".into(), serde_json::to_value(&declared.spec).unwrap_or_default());
            fields.insert("status".into(), status);
            for (name, value) in &declared.annotations {
                fields["metadata"]["annotations"][name] = json!(value);
            }
        }
        item
    };
    let pods = found.pods.iter().map(pod);
    let deployments = found.deployments.iter().map(|d| with_kind(Kind::Deployment, d));
    pods.chain(deployments).chain(found.contents.iter().map(contents::data)).collect()
}

/// In Kubernetes' shape, so that `jq` and templates that know a Pod know this one: who it is under `metadata`, how it is
/// under `status`. What Kubernetes has no place for is an annotation.
fn with_kind(kind: Kind, status: &impl serde::Serialize) -> Value {
    let Ok(Value::Object(mut fields)) = serde_json::to_value(status) else { return Value::Null };
    let mut take = |name: &str| fields.shift_remove(name);
    let mut metadata = json!({ "name": take("name"), "namespace": take("namespace") });
    for (from, to) in [("id", "uid"), ("labels", "labels")] {
        if let Some(value) = take(from) {
            metadata[to] = value;
        }
    }
    if let Some(origin) = take("origin") {
        let place = format!("{}:{}", origin["file"].as_str().unwrap_or_default(), origin["line"]);
        metadata["annotations"] = json!({ "evenkeel.dev/declared-in": place });
    }
    if let Some(owner) = take("owner").filter(|owner| owner["kind"] != kind.name()) {
        metadata["ownerReferences"] = json!([owner]);
    }
    json!({ "apiVersion": kind.api_version(), "kind": kind.name(), "metadata": metadata, "status": fields })
}

/// The object itself when one was named, else a list.
fn data(form: Form, items: &[Value], one: bool) -> String {
    let whole = match items {
        [item] if one => item.clone(),
        items => json!({ "apiVersion": "v1", "kind": "List", "items": items }),
    };
    as_data(form, &whole)
}

pub(crate) fn as_data(form: Form, value: &Value) -> String {
    match form {
        Form::Yaml => keel_manifest::to_yaml(value),
        _ => format!("{value:#}\n"),
    }
}

/// The list, then each object again when it changes.
fn watch(context: &Context, args: &Get, wanted: &[Wanted]) -> Outcome {
    let client = context.client();
    let mut shown: BTreeMap<String, Value> = BTreeMap::new();
    let mut headers = !args.no_headers;
    client_runtime()?.block_on(async {
        let mut snapshots = client.watch_status().await?;
        while let Some(snapshot) = snapshots.next().await? {
            let mut found = find(context, &snapshot.status, args, wanted)?;
            found.pods.retain(|pod| changed(&mut shown, format!("Pod/{}", pod.key), &**pod));
            found.deployments.retain(|d| changed(&mut shown, format!("Deployment/{}", d.key), d));
            found.contents.retain(|object| changed(&mut shown, object.key().to_string(), &object.to_json()));
            let columns = Columns {
                headers,
                wide: args.output == Form::Wide,
                namespace: args.all_namespaces,
                color: context.term.color_out,
            };
            let text = match args.output {
                Form::Json => items(context, &found).iter().map(|item| format!("{item}\n")).collect(),
                Form::Table | Form::Wide if !found.pods.is_empty() && found.deployments.is_empty() => {
                    objects::render_pods(found.pods.iter().map(AsRef::as_ref), columns, now_ms())
                }
                _ => render(context, args, &found, false),
            };
            headers &= found.is_empty();
            context.term.print(&text)?;
        }
        Err(gone())
    })
}

/// What is watched has no end but the daemon's.
fn gone() -> Failure {
    keel_api::ControlError::new(keel_api::ErrorCode::Unavailable, "the daemon has gone away")
        .hint("what runs goes on; look with: keel status")
        .into()
}

fn changed(shown: &mut BTreeMap<String, Value>, key: String, status: &impl serde::Serialize) -> bool {
    let now = serde_json::to_value(status).unwrap_or_default();
    shown.get(&key) != Some(&now) && {
        shown.insert(key, now);
        true
    }
}

pub(crate) fn describe(context: &Context, args: &Describe) -> Outcome {
    // A bare name is a pod's.
    let wanted = match &args.objects[..] {
        [name] if !name.contains('/') && Kind::parse(name).is_none() => vec![object::parse_one(name)?],
        words => object::parse(words)?,
    };
    let status = world::status(context)?;
    let output = Form::from(args.output);
    let look = Get {
        objects: Vec::new(),
        output,
        watch: false,
        no_headers: false,
        selector: None,
        all_namespaces: false,
        ignore_not_found: false,
    };
    let found = find(context, &status, &look, &wanted)?;
    if matches!(output, Form::Json | Form::Yaml) {
        let one = matches!(&wanted[..], [Wanted { name: Some(_), .. }]);
        context.term.print(&data(output, &items(context, &found), one))?;
        return missing(context, found.missing, false);
    }
    let events = world::events(context)?;
    let now = now_ms();
    let of = |object: String| -> Vec<Event> {
        events.iter().filter(|event| event.object == object).cloned().collect()
    };
    // A pod that waits for its image has no events of its own yet.
    let of_pod = |pod: &PodStatus| -> Vec<Event> {
        let containers = pod.init_container_statuses.iter().chain(&pod.container_statuses);
        let images = containers.map(|container| format!("Image/{}", container.image));
        let objects: Vec<String> = images.chain([format!("Pod/{}", pod.key)]).collect();
        events.iter().filter(|event| objects.contains(&event.object)).cloned().collect()
    };
    let pods = found.pods.iter().map(|pod| {
        let declared = world::declared(context, &pod.key);
        let spec = declared.as_ref().map(|pod| &pod.spec);
        objects::describe_pod(pod, spec, &of_pod(pod), now)
    });
    let deployments = found.deployments.iter().map(|deployment| {
        let pods: Vec<&PodStatus> = owned(&status, deployment).collect();
        objects::describe_deployment(deployment, &pods, &of(format!("Deployment/{}", deployment.key)), now)
    });
    let contents = found.contents.iter().map(contents::describe);
    let texts: Vec<String> = pods.chain(deployments).chain(contents).collect();
    context.term.print(&texts.join("\n\n"))?;
    missing(context, found.missing, false)
}

pub(crate) fn status(context: &Context, args: &cli::Status) -> Outcome {
    let status = world::status(context)?;
    let output = Form::from(args.output);
    note_no_daemon(context, &status, output);
    let well = objects::all_well(&status);
    let text = match output {
        Form::Json | Form::Yaml => {
            let mut whole = serde_json::to_value(&status).map_err(|error| Failure::of(&error))?;
            whole["healthy"] = json!(well);
            as_data(output, &whole)
        }
        _ => objects::render_status(&status, world::daemon(context), context.term.color_out, now_ms()),
    };
    context.term.print(&text)?;
    if args.check && !well { Err(Failure::silent(exit::NOT_READY)) } else { Ok(()) }
}

pub(crate) fn events(context: &Context, args: &Events) -> Outcome {
    let filter = EventFilter::new(context, args)?;
    let client = context.client();
    if !args.watch {
        let events: Vec<Event> =
            world::events(context)?.into_iter().filter(|event| filter.takes(event)).collect();
        let text = render_events(context, args, &events, !args.no_headers);
        return Ok(context.term.print(&text)?);
    }
    match client.probe() {
        Ok(()) => {}
        Err(error @ ClientError::NoDaemon { .. }) => {
            return Err(Failure::from(error).hint("without a daemon there is nothing to watch: leave out -w"));
        }
        Err(error) => return Err(error.into()),
    }
    let mut headers = !args.no_headers;
    client_runtime()?.block_on(async {
        let mut stream = client.events(0, true).await?;
        while let Some(event) = stream.next().await? {
            if filter.takes(&event) {
                context.term.print(&render_events(context, args, &[event], headers))?;
                headers = false;
            }
        }
        Err(gone())
    })
}

struct EventFilter {
    namespace: Option<String>,
    object: Option<String>,
    warnings: bool,
    normal: bool,
}

impl EventFilter {
    fn new(context: &Context, args: &Events) -> Outcome<EventFilter> {
        let namespace = &context.settings.namespace;
        let object = match &args.object {
            Some(word) => {
                let wanted = object::parse_one(word)?;
                Some(format!("{}/{namespace}/{}", wanted.kind.name(), wanted.name.unwrap_or_default()))
            }
            None => None,
        };
        let takes = |kind| args.types.is_empty() || args.types.contains(&kind);
        Ok(EventFilter {
            namespace: (!args.all_namespaces && object.is_none()).then(|| namespace.clone()),
            object,
            warnings: takes(cli::EventType::Warning),
            normal: takes(cli::EventType::Normal),
        })
    }

    fn takes(&self, event: &Event) -> bool {
        let kind = if event.warning { self.warnings } else { self.normal };
        let object = self.object.as_ref().is_none_or(|object| event.object == *object);
        // Images, files and the host belong to no namespace.
        let parts: Vec<&str> = event.object.splitn(3, '/').collect();
        let here = match (&self.namespace, &parts[..]) {
            (Some(wanted), ["Pod" | "Deployment", namespace, _]) => wanted == namespace,
            _ => true,
        };
        kind && object && here
    }
}

fn render_events(context: &Context, args: &Events, events: &[Event], headers: bool) -> String {
    match args.output {
        TextOrJson::Json => {
            events.iter().filter_map(|e| serde_json::to_string(e).ok()).map(|line| line + "\n").collect()
        }
        TextOrJson::Text if events.is_empty() => String::new(),
        TextOrJson::Text => objects::render_events(events, headers, context.term.color_out, now_ms()),
    }
}
