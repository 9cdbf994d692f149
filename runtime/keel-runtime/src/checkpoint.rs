//! `checkpoint` and `restore`.

use crate::args::{Globals, Options};
use crate::commands::usage;
use crate::log::Log;
use keel_oci::checkpoint::{CheckpointOptions, CriuOptions, RestoreOptions};
use keel_oci::foreground::{self, Signals};
use keel_oci::{Runtime, RuntimeError};
use std::path::{Path, PathBuf};

fn criu_options(globals: &Globals, options: &Options) -> Result<CriuOptions, RuntimeError> {
    for name in ["lazy-pages", "page-server", "status-fd"] {
        if options.has(name) || options.get(name).is_some() {
            return Err(usage(format!(
                "--{name} is not supported: images are written whole, to the image path"
            )));
        }
    }
    let manage_cgroups = options.get("manage-cgroups-mode").unwrap_or("soft");
    if !matches!(manage_cgroups, "soft" | "full" | "strict" | "ignore") {
        return Err(usage(format!(
            "invalid --manage-cgroups-mode {manage_cgroups:?}: it is soft, full, strict or ignore"
        )));
    }
    let empty = options.all("empty-ns");
    if let Some(other) = empty.iter().find(|name| *name != "network") {
        return Err(usage(format!("--empty-ns {other:?} is not supported: only network is")));
    }
    Ok(CriuOptions {
        program: globals.criu.clone(),
        image_path: options.path("image-path").unwrap_or_else(|| PathBuf::from("checkpoint")),
        work_path: options.path("work-path"),
        tcp_established: options.has("tcp-established"),
        ext_unix_sk: options.has("ext-unix-sk"),
        shell_job: options.has("shell-job"),
        file_locks: options.has("file-locks"),
        link_remap: options.has("link-remap"),
        auto_dedup: options.has("auto-dedup"),
        manage_cgroups: manage_cgroups.to_owned(),
        empty_network: !empty.is_empty(),
    })
}

pub(crate) fn checkpoint(
    runtime: &Runtime,
    globals: &Globals,
    options: &Options,
    id: &str,
) -> Result<u8, RuntimeError> {
    let checkpoint = CheckpointOptions {
        criu: criu_options(globals, options)?,
        parent_path: options.path("parent-path"),
        leave_running: options.has("leave-running"),
        pre_dump: options.has("pre-dump"),
        tcp_skip_in_flight: options.has("tcp-skip-in-flight"),
    };
    runtime.checkpoint(id, &checkpoint)?;
    Ok(0)
}

pub(crate) fn restore(
    runtime: &Runtime,
    globals: &Globals,
    options: &Options,
    id: &str,
    log: &Log,
) -> Result<u8, RuntimeError> {
    if options.get("console-socket").is_some() {
        return Err(usage("--console-socket: restore of a container with a terminal is not supported"));
    }
    let restore = RestoreOptions {
        id: id.to_owned(),
        bundle: options.path("bundle").unwrap_or_else(|| PathBuf::from(".")),
        criu: criu_options(globals, options)?,
        pid_file: options.path("pid-file"),
        lsm_profile: options.get("lsm-profile").map(str::to_owned),
        lsm_mount_context: options.get("lsm-mount-context").map(str::to_owned),
    };
    let detach = options.has("detach");
    let signals = if detach { None } else { Some(Signals::block()?) };
    if signals.is_some() && !options.has("no-subreaper") {
        let _ = keel_sys::process::set_subreaper(true);
    }
    let restored = runtime.restore(&restore, Path::new("/proc/self/exe"))?;
    restored.warnings.iter().for_each(|w| log.warning(w));
    let Some(signals) = signals else { return Ok(0) };
    let exit = foreground::wait(restored.pid, &restored.pidfd, &signals, None, None)?;
    restored.finish()?;
    Ok(exit.code() as u8)
}
