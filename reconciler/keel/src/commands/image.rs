//! `image`: the command line of [`crate::images`].

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use keel_api::{ImageRequest, exit};
use serde_json::Value;

use crate::cli::{Form, Image, TextOrJson};
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
        Image::Pull { images } => {
            each(images, |image| act(context, ImageRequest::Pull { image: image.clone() }).map(drop))
        }
        Image::Import { files } => each(files, |file| import(context, file)),
        Image::Rm { images, force, ignore_not_found } => {
            let request = |image: &String| ImageRequest::Remove { image: image.clone(), force: *force };
            each(images, |image| match act(context, request(image)) {
                Err(failure) if failure.code == exit::NOT_FOUND && *ignore_not_found => Ok(()),
                other => other.map(drop),
            })
        }
        Image::Tag { image, reference } => {
            let (image, reference) = (image.clone(), reference.clone());
            act(context, ImageRequest::Tag { image, reference }).map(drop)
        }
        Image::Save { images, output } => {
            let path = std::path::absolute(output)
                .map_err(|error| Failure::io("write", output.display(), &error).code(exit::INVALID))?;
            act(context, ImageRequest::Save { images: images.clone(), path }).map(drop)
        }
        Image::Prune => act(context, ImageRequest::Prune).map(drop),
        Image::Verify { repair, quick, output } => {
            let request = ImageRequest::Verify { full: !quick, repair: *repair };
            let found = act(context, request)?.unwrap_or_default();
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
            let found = act(context, ImageRequest::List)?.unwrap_or_default();
            let images = found.as_array().map(Vec::as_slice).unwrap_or_default();
            let text = match output {
                Form::Json | Form::Yaml => as_data(*output, &found),
                Form::Name => images.iter().map(|image| format!("{}\n", text(image, "reference"))).collect(),
                form => render_images(images, !no_headers, *form == Form::Wide, now_ms()),
            };
            Ok(context.term.print(&text)?)
        }
        Image::Inspect { images, output } => each(images, |image| {
            let found = act(context, ImageRequest::Inspect { image: image.clone() })?.unwrap_or_default();
            Ok(context.term.print(&as_data(*output, &found))?)
        }),
    }
}

fn each<T>(items: &[T], run: impl FnMut(&T) -> Outcome) -> Outcome {
    items.iter().try_for_each(run)
}

/// What the operation gave back, if it gives anything.
fn act(context: &Context, request: ImageRequest) -> Outcome<Option<Value>> {
    let mut reporter = Reporter::new(context.term, TextOrJson::Text, false);
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
fn import(context: &Context, file: &Path) -> Outcome {
    if file != Path::new("-") {
        let path = std::fs::canonicalize(file)
            .map_err(|error| Failure::io("import", file.display(), &error).code(exit::INVALID))?;
        return act(context, ImageRequest::Import { path, name: file.display().to_string() }).map(drop);
    }
    let spooled = Spool::new(context)?;
    act(context, ImageRequest::Import { path: spooled.0.clone(), name: "standard input".into() }).map(drop)
}

struct Spool(PathBuf);

impl Spool {
    fn new(context: &Context) -> Outcome<Spool> {
        let path = context.paths.root().join(format!("import-{}.tar", std::process::id()));
        let fail = |error| Failure::io("write", path.display(), &error);
        std::fs::create_dir_all(context.paths.root()).map_err(fail)?;
        let mut file = File::create_new(&path).map_err(fail)?;
        let spool = Spool(path.clone());
        io::copy(&mut io::stdin().lock(), &mut file).map_err(fail)?;
        Ok(spool)
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        // Nothing better can be done here; the name says what it is.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn render_images(images: &[Value], headers: bool, wide: bool, now: u64) -> String {
    let mut names = vec!["IMAGE", "DIGEST", "SIZE", "AGE"];
    if wide {
        names.extend(["LAYERS", "PINNED"]);
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
