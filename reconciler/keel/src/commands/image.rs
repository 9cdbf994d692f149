//! `image`: the command line of [`crate::images`].

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use keel_api::{ImageRequest, SaveFormat, exit};
use serde_json::{Value, json};

use crate::cli::{Form, Image, SaveAs, TextOrJson};
use crate::commands::apply::{Operation, Reporter, one_shot, through_daemon};
use crate::commands::see::as_data;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::render::table::Table;
use crate::text::{age, now_ms, size};

/// Digits of a digest that a table shows, as docker does.
const SHORT_DIGEST: usize = "sha256:".len() + 12;

pub(crate) fn image(context: &Context, command: &Image) -> Outcome {
    match command {
        Image::Pull { images, all_platforms, packed, output } => each(context, images, "pulled", |image| {
            let (all_platforms, packed) = (*all_platforms, *packed);
            let request = ImageRequest::Pull { image: image.clone(), all_platforms, packed };
            act(context, *output, request).map(drop)
        }),
        Image::Referrers { image, artifact_type, output } => {
            let (image, artifact_type) = (image.clone(), artifact_type.clone());
            let found = ask(context, ImageRequest::Referrers { image, artifact_type })?;
            Ok(context.term.print(&match output {
                TextOrJson::Json => as_data(Form::Json, &found),
                TextOrJson::Text => render_referrers(&found),
            })?)
        }
        Image::Push { image, target, output } => {
            let request = ImageRequest::Push { image: image.clone(), target: target.clone() };
            act(context, *output, request).map(drop)
        }
        Image::Import { files, output } => {
            each(context, files, "imported", |file| import(context, *output, file))
        }
        Image::Rm { images, force, ignore_not_found, output } => {
            let request = |image: &String| ImageRequest::Remove { image: image.clone(), force: *force };
            each(context, images, "removed", |image| match act(context, *output, request(image)) {
                Err(failure) if failure.code == exit::NOT_FOUND && *ignore_not_found => Ok(()),
                other => other.map(drop),
            })
        }
        Image::Tag { image, reference, output } => {
            let (image, reference) = (image.clone(), reference.clone());
            act(context, *output, ImageRequest::Tag { image, reference }).map(drop)
        }
        Image::Save { images, output, format, progress } => save(context, images, output, *format, *progress),
        Image::History { image, output } => {
            let found = ask(context, ImageRequest::Inspect { image: image.clone() })?;
            let steps = history(&found);
            Ok(context.term.print(&match output {
                TextOrJson::Json => as_data(Form::Json, &Value::Array(steps)),
                TextOrJson::Text => render_history(&steps),
            })?)
        }
        Image::Du { output } => {
            let found = ask(context, ImageRequest::Usage)?;
            Ok(context.term.print(&match output {
                TextOrJson::Json => as_data(Form::Json, &found),
                TextOrJson::Text => render_usage(&found),
            })?)
        }
        Image::Prune { output } => act(context, *output, ImageRequest::Prune).map(drop),
        Image::Verify { repair, quick, output } => {
            let request = ImageRequest::Verify { full: !quick, repair: *repair };
            let found = ask(context, request)?;
            let text = match output {
                TextOrJson::Json => as_data(Form::Json, &found),
                TextOrJson::Text => render_verified(&found),
            };
            context.term.print(&text)?;
            if found["whole"].as_bool().unwrap_or(false) {
                Ok(())
            } else {
                Err(Failure::silent(exit::FAILED))
            }
        }
        Image::Ls { output, no_headers } => {
            let found = ask(context, ImageRequest::List)?;
            let images = found.as_array().map(Vec::as_slice).unwrap_or_default();
            let text = match output {
                Form::Json | Form::Yaml => as_data(*output, &found),
                Form::Name => images.iter().map(|image| format!("{}\n", text(image, "reference"))).collect(),
                form => render_images(images, !no_headers, *form == Form::Wide, now_ms()),
            };
            Ok(context.term.print(&text)?)
        }
        Image::Inspect { images, output } => each(context, images, "found", |image| {
            let found = ask(context, ImageRequest::Inspect { image: image.clone() })?;
            Ok(context.term.print(&as_data(*output, &found))?)
        }),
    }
}

/// One that fails keeps no other from its turn.
fn each<T>(context: &Context, items: &[T], done: &str, mut run: impl FnMut(&T) -> Outcome) -> Outcome {
    if let [one] = items {
        return run(one);
    }
    let mut codes = Vec::new();
    for item in items {
        match run(item) {
            Ok(()) => {}
            // Nobody reads, or nobody answers: the others would fare no better.
            Err(failure) if matches!(failure.code, exit::DONE | exit::UNAVAILABLE) => return Err(failure),
            Err(failure) => {
                codes.push(failure.code);
                context.term.say(&failure.render(context.term.color_err));
            }
        }
    }
    let good = items.len() - codes.len();
    match codes.first() {
        None => Ok(()),
        Some(first) => {
            let code = if good > 0 { exit::PARTIAL } else { *first };
            Err(Failure::new(code, format!("{good} of {} {done}", items.len())))
        }
    }
}

/// What the operation gave back.
fn ask(context: &Context, request: ImageRequest) -> Outcome<Value> {
    Ok(act(context, TextOrJson::Text, request)?.unwrap_or_default())
}

/// What the operation gave back, if it gives anything.
fn act(context: &Context, form: TextOrJson, request: ImageRequest) -> Outcome<Option<Value>> {
    let doing = match &request {
        ImageRequest::Push { .. } => "pushing",
        ImageRequest::Import { .. } => "importing",
        ImageRequest::Save { .. } => "saving",
        _ => "pulling",
    };
    let mut reporter = Reporter::new(context.term, form, false).doing(doing);
    let operation = Operation::Image(request);
    match context.client().probe() {
        Ok(()) => through_daemon(context, operation, &mut reporter)?,
        Err(keel_api::ClientError::NoDaemon { .. }) => one_shot(context, operation, &mut reporter)?,
        Err(error) => return Err(error.into()),
    }
    let data = reporter.take_data();
    reporter.end()?;
    Ok(data)
}

/// A stream is kept on disk until it is taken in: archives are read more than once, and maybe by another process.
fn import(context: &Context, form: TextOrJson, file: &Path) -> Outcome {
    if file != Path::new("-") {
        let path = std::fs::canonicalize(file)
            .map_err(|error| Failure::io("import", file.display(), &error).code(exit::INVALID))?;
        return act(context, form, ImageRequest::Import { path, name: file.display().to_string() }).map(drop);
    }
    let spooled = Spool::new(context, "import")?;
    let fail = |error| Failure::io("write", spooled.0.display(), &error);
    let mut to = File::create_new(&spooled.0).map_err(fail)?;
    io::copy(&mut io::stdin().lock(), &mut to).map_err(fail)?;
    act(context, form, ImageRequest::Import { path: spooled.0.clone(), name: "standard input".into() })
        .map(drop)
}

fn save(
    context: &Context,
    images: &[String],
    output: &Path,
    format: SaveAs,
    progress: TextOrJson,
) -> Outcome {
    let format = match format {
        SaveAs::OciArchive => SaveFormat::OciArchive,
        SaveAs::OciDir => SaveFormat::OciDirectory,
        SaveAs::DockerArchive => SaveFormat::DockerArchive,
    };
    let images = images.to_vec();
    if output != Path::new("-") {
        let path = std::path::absolute(output)
            .map_err(|error| Failure::io("write", output.display(), &error).code(exit::INVALID))?;
        return act(context, progress, ImageRequest::Save { images, path, format }).map(drop);
    }
    if progress == TextOrJson::Json {
        return Err(Failure::new(exit::INVALID, "standard output cannot have both the archive and events"));
    }
    if format == SaveFormat::OciDirectory {
        return Err(Failure::new(exit::INVALID, "a directory cannot be written to standard output"));
    }
    let spooled = Spool::new(context, "save")?;
    let path = spooled.0.clone();
    act(context, TextOrJson::Text, ImageRequest::Save { images, path, format })?;
    let mut from =
        File::open(&spooled.0).map_err(|error| Failure::io("read", spooled.0.display(), &error))?;
    match io::copy(&mut from, &mut io::stdout().lock()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::io("write", "standard output", &error))
        }
        _ => Ok(()),
    }
}

/// A place for an archive that comes or goes as a stream.
struct Spool(PathBuf);

impl Spool {
    fn new(context: &Context, what: &str) -> Outcome<Spool> {
        let path = context.paths.root().join(format!("{what}-{}.tar", std::process::id()));
        std::fs::create_dir_all(context.paths.root())
            .map_err(|error| Failure::io("create", context.paths.root().display(), &error))?;
        Ok(Spool(path))
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        // Nothing better can be done here; the name says what it is.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// One entry a step, newest first, with the size of the layer that it made.
fn history(image: &Value) -> Vec<Value> {
    let mut layers = image["layers"].as_array().into_iter().flatten();
    let mut steps: Vec<Value> = image["config"]["history"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|step| {
            let layer = match step["empty_layer"].as_bool() {
                Some(true) => None,
                _ => layers.next(),
            };
            json!({
                "created": step["created"],
                "createdBy": step["created_by"],
                "comment": step["comment"],
                "layer": layer.map(|layer| layer["blob_digest"].clone()),
                "sizeBytes": layer.and_then(|layer| layer["size"].as_u64()).unwrap_or(0),
            })
        })
        .collect();
    // Builders that write no history leave their layers all the same.
    steps.extend(layers.map(|layer| json!({"layer": layer["blob_digest"], "sizeBytes": layer["size"]})));
    steps.reverse();
    steps
}

fn render_history(steps: &[Value]) -> String {
    let mut table = Table::with_header(&["CREATED", "SIZE", "BY"], true);
    for step in steps {
        let by = text(step, "createdBy");
        let by = if by.is_empty() { text(step, "comment") } else { by };
        let created = text(step, "created");
        table.row(vec![
            if created.is_empty() { "-".to_owned() } else { created.to_owned() },
            size(step["sizeBytes"].as_u64().unwrap_or_default()),
            by.split_whitespace().collect::<Vec<_>>().join(" "),
        ]);
    }
    table.render(0)
}

fn render_referrers(found: &Value) -> String {
    let mut table = Table::with_header(&["DIGEST", "TYPE", "SIZE"], true);
    for entry in found["referrers"].as_array().into_iter().flatten() {
        let kind = text(entry, "artifactType");
        let kind = if kind.is_empty() { text(entry, "mediaType") } else { kind };
        let bytes = size(entry["size"].as_u64().unwrap_or_default());
        table.row(vec![text(entry, "digest").to_owned(), kind.to_owned(), bytes]);
    }
    table.render(0)
}

fn render_usage(usage: &Value) -> String {
    let number = |value: &Value, field: &str| size(value[field].as_u64().unwrap_or_default());
    let mut table = Table::with_header(&["IMAGE", "OWN", "SHARED", "OTHER PLATFORMS"], true);
    for image in usage["images"].as_array().into_iter().flatten() {
        let sizes = ["uniqueBytes", "sharedBytes", "otherPlatformsBytes"].map(|field| number(image, field));
        table.row([text(image, "reference").to_owned()].into_iter().chain(sizes).collect());
    }
    format!(
        "{}\nunpacked layers {}, blobs {}, unfinished {}\n",
        table.render(0),
        number(usage, "layersBytes"),
        number(usage, "blobsBytes"),
        number(usage, "partialBytes"),
    )
}

fn render_images(images: &[Value], headers: bool, wide: bool, now: u64) -> String {
    let mut names = vec!["IMAGE", "DIGEST", "SIZE", "AGE"];
    if wide {
        names.extend(["LAYERS", "PINNED", "PLATFORMS"]);
    }
    let mut table = Table::with_header(&names, headers);
    for image in images {
        let digest = text(image, "digest");
        let shown = if wide { digest } else { digest.get(..SHORT_DIGEST).unwrap_or(digest) };
        let number = |field: &str| image[field].as_u64().unwrap_or_default();
        let mut row = vec![
            text(image, "reference").to_owned(),
            shown.to_owned(),
            size(number("sizeBytes")),
            age(now, number("pulledAtMs")),
        ];
        if wide {
            row.extend([
                number("layers").to_string(),
                image["pinned"].as_bool().unwrap_or(false).to_string(),
                image["platforms"].as_array().map_or(1, Vec::len).to_string(),
            ]);
        }
        table.row(row);
    }
    table.render(0)
}

fn render_verified(found: &Value) -> String {
    let list = |field: &str| found[field].as_array().cloned().unwrap_or_default();
    let mut lines = Vec::new();
    for damage in list("damage") {
        let outcome = if damage["repaired"].as_bool().unwrap_or(false) { "repaired" } else { "damaged" };
        lines.push(format!("{outcome} {}: {}", text(&damage, "digest"), text(&damage, "problem")));
    }
    for image in list("pulled") {
        lines.push(format!("pulled again {}", image.as_str().unwrap_or_default()));
    }
    for image in list("lost") {
        lines.push(format!("lost {}: {}", text(&image, "reference"), text(&image, "problem")));
    }
    lines.push(format!("checked {} layers and {} blobs", found["layers"], found["blobs"]));
    lines.join("\n") + "\n"
}

fn text<'a>(image: &'a Value, field: &str) -> &'a str {
    image[field].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_has_the_sizes_of_its_layers_newest_first() {
        let image = json!({
            "layers": [{"blob_digest": "sha256:a", "size": 10}, {"blob_digest": "sha256:b", "size": 2048}],
            "config": {"history": [
                {"created": "2026-01-01T00:00:00Z", "created_by": "ADD rootfs"},
                {"created_by": "ENV  A=1", "empty_layer": true},
                {"comment": "by hand"},
            ]},
        });
        let steps = history(&image);
        assert_eq!(
            render_history(&steps),
            "CREATED                SIZE      BY\n\
             -                      2.0 KiB   by hand\n\
             -                      0 B       ENV A=1\n\
             2026-01-01T00:00:00Z   10 B      ADD rootfs\n"
        );
        assert_eq!(steps[1]["layer"], Value::Null);
    }

    #[test]
    fn images_are_listed_short_and_wide() {
        let image = serde_json::json!({
            "reference": "docker.io/library/busybox:latest", "digest": format!("sha256:{}", "ab".repeat(32)),
            "sizeBytes": 1_500_000, "layers": 1, "pulledAtMs": 0, "pinned": false
        });
        assert_eq!(
            render_images(&[image], true, false, 60_000),
            "IMAGE                              DIGEST                SIZE      AGE\n\
             docker.io/library/busybox:latest   sha256:abababababab   1.4 MiB   60s\n"
        );
    }
}
