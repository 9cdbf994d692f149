//! The configuration file and what wins: flag, environment, file, default.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use keel_manifest::logging::LogSettings;
use serde::Deserialize;

use crate::cli::Global;
use crate::failure::{Failure, Outcome};

const DEFAULT_CONFIG: &str = "/etc/evenkeel/config.yaml";
const DEFAULT_ROOT: &str = "/var/lib/evenkeel";
const DEFAULT_RUN: &str = "/run/evenkeel";
const DEFAULT_LOG_MAX_BYTES: u64 = 10 << 20;
const DEFAULT_LOG_MAX_FILES: u32 = 5;
/// A configuration is a page of text; more is a mistake in the path.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// `/etc/evenkeel/config.yaml`. Every field is optional, unknown ones are errors.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    pub(crate) root: Option<PathBuf>,
    pub(crate) run: Option<PathBuf>,
    pub(crate) runtime: Option<PathBuf>,
    pub(crate) shim: Option<PathBuf>,
    /// Directory of manifests.
    pub(crate) manifests: Option<PathBuf>,
    pub(crate) network: Network,
    pub(crate) registries: Registries,
    pub(crate) logs: Logs,
    pub(crate) storage: Storage,
    pub(crate) api: Api,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Network {
    /// Addresses of pods, e.g. `10.88.0.0/16`.
    pub(crate) subnet: Option<ipnet::Ipv4Net>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Registries {
    /// `host[:port]` that may be asked without TLS.
    pub(crate) insecure: Vec<String>,
    /// `<dir>/<host[:port]>/*.crt`: additional authorities.
    pub(crate) certs_dir: Option<PathBuf>,
    /// Credentials, docker's `config.json` form.
    pub(crate) auth_file: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Logs {
    pub(crate) max_bytes: Option<u64>,
    pub(crate) max_files: Option<u32>,
    /// `k8s-file`, `raw`, `journald`, `none`, or several with commas between them.
    pub(crate) driver: Option<String>,
    /// As `--log-opt` of docker has them.
    pub(crate) options: BTreeMap<String, String>,
}

impl Logs {
    /// What pods get that do not say it themselves.
    fn lower(&self) -> Result<LogSettings, String> {
        let mut settings = LogSettings::default();
        if let Some(driver) = &self.driver {
            settings.set_drivers(driver).map_err(|problem| format!("driver: {problem}"))?;
        }
        for (name, value) in &self.options {
            settings.set_option(name, value).map_err(|problem| format!("options: {problem}"))?;
        }
        for (older, newer, both) in [
            ("max_bytes", "max-size", self.max_bytes.is_some() && settings.max_bytes.is_some()),
            ("max_files", "max-file", self.max_files.is_some() && settings.max_files.is_some()),
        ] {
            if both {
                return Err(format!("{older} and options: {newer} are the same: give one"));
            }
        }
        if self.max_files == Some(0) {
            return Err("max_files must be at least 1".into());
        }
        settings.check()?;
        settings.max_bytes = settings.max_bytes.or(self.max_bytes).or(Some(DEFAULT_LOG_MAX_BYTES));
        settings.max_files = settings.max_files.or(self.max_files).or(Some(DEFAULT_LOG_MAX_FILES));
        Ok(settings)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Storage {
    /// Percent of the disk or its inodes above which room is made.
    pub(crate) evict_above: Option<u8>,
    /// And down to which.
    pub(crate) evict_to: Option<u8>,
    /// What containers write beside their volumes need not survive a power cut: faster on slow disks.
    pub(crate) volatile: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Api {
    /// Loopback address to serve the control API on, beside the socket.
    pub(crate) listen: Option<SocketAddr>,
}

/// What a command works with, after precedence.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Where the rest comes from, if it was named.
    pub(crate) config: Option<PathBuf>,
    pub(crate) root: PathBuf,
    pub(crate) run: PathBuf,
    pub(crate) runtime: PathBuf,
    pub(crate) shim: PathBuf,
    pub(crate) manifests: Option<PathBuf>,
    pub(crate) subnet: Option<ipnet::Ipv4Net>,
    pub(crate) registries: Registries,
    pub(crate) logs: LogSettings,
    pub(crate) eviction: keel_host::Eviction,
    pub(crate) volatile_rootfs: bool,
    pub(crate) listen: Option<SocketAddr>,
    /// Of objects named in commands.
    pub(crate) namespace: String,
    /// The same, where it was asked for.
    pub(crate) asked_namespace: Option<String>,
}

impl Settings {
    pub(crate) fn load(global: &Global) -> Outcome<Settings> {
        let config = match &global.config {
            Some(path) => read(path)?
                .ok_or_else(|| Failure::invalid(format!("configuration {}: no such file", path.display())))?,
            None => read(Path::new(DEFAULT_CONFIG))?.unwrap_or_default(),
        };
        Settings::lower(global, config)
    }

    /// Flags and environment are one in `global` already.
    fn lower(global: &Global, config: Config) -> Outcome<Settings> {
        let pick = |flag: &Option<PathBuf>, file: Option<PathBuf>, default: &str| {
            flag.clone().or(file).unwrap_or_else(|| PathBuf::from(default))
        };
        let logs = config.logs.lower();
        let logs = logs.map_err(|problem| Failure::invalid(format!("configuration: logs: {problem}")))?;
        let kubelets = keel_host::Eviction::default();
        let above = config.storage.evict_above.unwrap_or(kubelets.above);
        let to = config.storage.evict_to.unwrap_or(kubelets.to.min(above));
        if above > 100 || to > above {
            return Err(Failure::invalid(
                "configuration: storage.evict_above is at most 100, storage.evict_to at most that",
            ));
        }
        Ok(Settings {
            eviction: keel_host::Eviction { above, to },
            volatile_rootfs: config.storage.volatile,
            config: global
                .config
                .as_ref()
                .map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone())),
            root: pick(&global.root, config.root, DEFAULT_ROOT),
            run: pick(&global.run, config.run, DEFAULT_RUN),
            runtime: program(pick(&global.runtime, config.runtime, "keel-runtime"), find_program),
            shim: program(pick(&global.shim, config.shim, "keel-shim"), find_program),
            manifests: config.manifests,
            subnet: config.network.subnet,
            registries: config.registries,
            logs,
            listen: config.api.listen,
            asked_namespace: global.namespace.clone(),
            namespace: global.namespace.clone().unwrap_or_else(|| "default".to_owned()),
        })
    }
}

/// `None` when the file is not there.
fn read(path: &Path) -> Outcome<Option<Config>> {
    let shown = path.display();
    let text = match fs::metadata(path) {
        Ok(found) if found.len() > MAX_CONFIG_BYTES => {
            return Err(Failure::invalid(format!(
                "configuration {shown}: larger than {MAX_CONFIG_BYTES} bytes"
            )));
        }
        Ok(_) => fs::read_to_string(path),
        Err(error) => Err(error),
    };
    match text {
        Ok(text) => parse(&text).map(Some).map_err(|problem| {
            Failure::invalid(format!("configuration {shown}: {problem}"))
                .hint("fields: root, run, runtime, shim, manifests, network, registries, logs, storage, api")
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::io("read configuration", shown, &error)),
    }
}

fn parse(text: &str) -> Result<Config, String> {
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(Config::default());
    }
    serde_saphyr::from_str(text).map_err(|error| error.to_string())
}

/// A bare name is looked for beside our own program first, then where the shell would find it.
fn program(name: PathBuf, find: impl Fn(&Path) -> Option<PathBuf>) -> PathBuf {
    if name.components().count() > 1 || name.is_absolute() {
        return std::path::absolute(&name).unwrap_or(name);
    }
    find(&name).unwrap_or(name)
}

fn find_program(name: &Path) -> Option<PathBuf> {
    let beside = std::env::current_exe().ok()?.parent()?.to_path_buf();
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(beside)
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(global: Global, text: &str) -> Result<Settings, String> {
        let config = parse(text)?;
        Settings::lower(&global, config).map_err(|failure| failure.message)
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let flags = Global { root: Some("/flag".into()), ..Global::default() };
        let file = "root: /file\nrun: /file-run\nruntime: /bin/runc\nnetwork: {subnet: 10.9.0.0/16}\nlogs: {max_files: 2}\n";
        let settings = check(flags, file).unwrap();
        assert_eq!(settings.root, Path::new("/flag"));
        assert_eq!(settings.run, Path::new("/file-run"));
        assert_eq!(settings.runtime, Path::new("/bin/runc"));
        assert_eq!(settings.subnet, Some("10.9.0.0/16".parse().unwrap()));
        assert_eq!(settings.logs.max_files, Some(2));
        assert_eq!(settings.logs.max_bytes, Some(DEFAULT_LOG_MAX_BYTES));
        let low = check(Global::default(), "storage: {evict_above: 50}\n").unwrap().eviction;
        assert_eq!(low, keel_host::Eviction { above: 50, to: 50 });
        assert_eq!(check(Global::default(), "# nothing\n\n").unwrap().root, Path::new(DEFAULT_ROOT));
    }

    #[test]
    fn mistakes_in_the_file_are_errors_with_a_place() {
        let unknown = check(Global::default(), "root: /a\nrootz: /b\n").unwrap_err();
        assert!(unknown.contains("rootz") && unknown.contains('2'), "{unknown}");
        assert!(check(Global::default(), "network: {subnet: x}\n").is_err());
        assert!(check(Global::default(), "logs: {max_files: 0}\n").is_err());
        for (wrong, message) in [
            ("driver: jornald", "logs: driver: no log driver \"jornald\" (did you mean journald?)"),
            ("options: {mode: fast}", "logs: options: mode: \"fast\" is not blocking or non-blocking"),
            (
                "max_bytes: 5000, options: {max-size: 1m}",
                "logs: max_bytes and options: max-size are the same",
            ),
        ] {
            let failed = check(Global::default(), &format!("logs: {{{wrong}}}\n")).unwrap_err();
            assert!(failed.contains(message), "{failed}");
        }
        let right = "logs: {driver: 'k8s-file,journald', options: {mode: non-blocking, max-age: 1d}}\n";
        let logs = check(Global::default(), right).unwrap().logs;
        assert_eq!((logs.non_blocking, logs.max_age_s), (Some(true), Some(86_400)));
        for wrong in ["{evict_above: 101}", "{evict_above: 70, evict_to: 71}"] {
            assert!(check(Global::default(), &format!("storage: {wrong}\n")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn bare_program_names_are_looked_up_and_paths_are_not() {
        let find = |name: &Path| Some(Path::new("/found").join(name));
        assert_eq!(program("runc".into(), find), Path::new("/found/runc"));
        assert_eq!(program("/usr/bin/crun".into(), find), Path::new("/usr/bin/crun"));
        assert_eq!(program("nowhere".into(), |_| None), Path::new("nowhere"));
    }
}
