//! Mirrors: containerd's `hosts.toml` and podman's `registries.conf` (version 2), read anew for each pull.
//!
//! A `hosts.toml` for a registry decides alone; without one `registries.conf` does; what neither knows is asked for
//! where its name says. `blocked` holds in any case.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use serde::Deserialize;

use crate::endpoint::{Endpoint, Link};
use crate::error::PullError;
use crate::reference::Reference;
use crate::transport::{host_of, is_loopback};

/// Such files are a few kilobytes.
const FILE_LIMIT: u64 = 1 << 20;
/// Each place costs a connection attempt when all fail.
const MAX_ENDPOINTS: usize = 16;
const HOSTS_FILE: &str = "hosts.toml";
/// containerd's directory for registries that have none of their own.
const DEFAULT_DIR: &str = "_default";

/// The places to ask, in order. The one with `origin` is there exactly once, last.
pub(crate) fn route(
    reference: &Reference,
    hosts_dirs: &[PathBuf],
    registries_conf: &[PathBuf],
) -> Result<Vec<Endpoint>, PullError> {
    let entry = podman_entry(reference, registries_conf)?;
    if let Some((path, entry)) = &entry
        && entry.blocked
    {
        return Err(PullError::Blocked { reference: reference.canonical().to_owned(), path: path.clone() });
    }
    let mut route = match hosts_file(reference, hosts_dirs)? {
        Some((dir, text)) => lower_hosts(reference, &dir, &text)?,
        None => match &entry {
            Some((path, entry)) => lower_entry(reference, path, entry)?,
            None => vec![Endpoint::origin(reference, false)?],
        },
    };
    if route.len() > MAX_ENDPOINTS {
        route.drain(MAX_ENDPOINTS - 1..route.len() - 1);
    }
    Ok(route)
}

/// The places where podman keeps `registries.conf` for this user: the first that exists counts.
pub(crate) fn default_registries_conf() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(path) = variable("CONTAINERS_REGISTRIES_CONF") {
        return vec![path];
    }
    let home = variable("HOME").unwrap_or_else(|| PathBuf::from("/root"));
    let own = home.join(".config/containers/registries.conf");
    if own.exists() { vec![own] } else { vec!["/etc/containers/registries.conf".into()] }
}

// ---- containerd ----

#[derive(Default, Deserialize)]
struct HostEntry {
    capabilities: Option<Vec<String>>,
    #[serde(default)]
    ca: Strings,
    #[serde(default)]
    client: Clients,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    header: BTreeMap<String, Strings>,
    #[serde(default)]
    override_path: bool,
    dial_timeout: Option<String>,
}

/// A string or a list of them.
#[derive(Default, Deserialize)]
#[serde(untagged)]
enum Strings {
    #[default]
    None,
    One(String),
    Many(Vec<String>),
}

/// `"pem of both"`, `["pem of both", ..]` or `[["cert", "key"], ..]`.
#[derive(Default, Deserialize)]
#[serde(untagged)]
enum Clients {
    #[default]
    None,
    One(String),
    Files(Vec<String>),
    Pairs(Vec<Vec<String>>),
}

impl Strings {
    fn all(&self) -> &[String] {
        match self {
            Self::None => &[],
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

impl Clients {
    /// TLS sends one certificate; the first one is it.
    fn first(&self) -> Option<(&str, &str)> {
        match self {
            Self::None => None,
            Self::One(file) => Some((file, file)),
            Self::Files(files) => files.first().map(|file| (file.as_str(), file.as_str())),
            Self::Pairs(pairs) => match pairs.first()?.as_slice() {
                [both] => Some((both, both)),
                [certificate, key, ..] => Some((certificate, key)),
                [] => None,
            },
        }
    }
}

/// The first directory that has the file: the registry's own, then the one for all.
fn hosts_file(reference: &Reference, dirs: &[PathBuf]) -> Result<Option<(PathBuf, String)>, PullError> {
    let registry = reference.registry();
    let escaped = registry.replace(':', "_") + "_";
    for name in [registry, escaped.as_str(), DEFAULT_DIR] {
        for dir in dirs {
            let dir = dir.join(name);
            if let Some(text) = read(&dir.join(HOSTS_FILE))? {
                return Ok(Some((dir, text)));
            }
        }
    }
    Ok(None)
}

fn lower_hosts(reference: &Reference, dir: &Path, text: &str) -> Result<Vec<Endpoint>, PullError> {
    let path = dir.join(HOSTS_FILE);
    let bad = |detail: String| PullError::MirrorFile { path: path.clone(), detail };
    let mut table: toml::Table = parse(&path, text)?;
    let hosts = match table.remove("host") {
        None => toml::Table::new(),
        Some(toml::Value::Table(hosts)) => hosts,
        Some(_) => return Err(bad("host is not a table".to_owned())),
    };
    let server = match table.remove("server") {
        None => None,
        Some(toml::Value::String(server)) => Some(server).filter(|s| !s.is_empty()),
        Some(_) => return Err(bad("server is not a string".to_owned())),
    };
    let entry = |name: &str, value: toml::Value| {
        HostEntry::deserialize(value).map_err(|e| bad(format!("{name}: {}", e.message())))
    };
    let mut route = Vec::new();
    for (name, value) in hosts {
        let entry = entry(&name, value)?;
        route.push(host_endpoint(reference, dir, &name, &entry).map_err(bad)?);
    }
    let root = entry("server", toml::Value::Table(table))?;
    let origin = match server {
        Some(server) => host_endpoint(reference, dir, &server, &root).map_err(bad)?,
        None => {
            let mut origin = Endpoint::origin(reference, root.skip_verify)?;
            let host = host_of(&origin.roots[0]);
            origin.link = link(dir, host, &root).map_err(bad)?;
            origin
        }
    };
    // Whatever it was restricted to: somebody has to have the last word.
    route.push(Endpoint { origin: true, ..origin });
    Ok(route)
}

fn host_endpoint(
    reference: &Reference,
    dir: &Path,
    address: &str,
    entry: &HostEntry,
) -> Result<Endpoint, String> {
    let unusable = |detail: &str| format!("{address}: {detail}");
    let given = if address.contains("://") { address.to_owned() } else { format!("https://{address}") };
    let mut root = Url::parse(&given).map_err(|e| unusable(&e.to_string()))?;
    if !matches!(root.scheme(), "http" | "https") || root.host_str().is_none() {
        return Err(unusable("not an http or https address"));
    }
    let path = root.path().trim_end_matches('/').to_owned();
    root.set_path(&if entry.override_path || path.ends_with("/v2") {
        format!("{path}/")
    } else {
        format!("{path}/v2/")
    });
    let mut roots = vec![root.clone()];
    let without_scheme = !address.contains("://");
    if without_scheme && (entry.skip_verify || is_loopback(&root)) {
        let mut plain = root.clone();
        if plain.set_scheme("http").is_ok() {
            roots.push(plain);
        }
    }
    let can = |what: &str| {
        entry.capabilities.as_ref().is_none_or(|list| list.iter().any(|c| c.eq_ignore_ascii_case(what)))
    };
    let host = host_of(&root);
    let stands_for_itself = host == reference.host() || host == reference.registry();
    Ok(Endpoint {
        // A login for `docker.io` is filed under that name, not under its host's.
        registry: if stands_for_itself { reference.registry().to_owned() } else { host.clone() },
        repository: reference.repository().to_owned(),
        roots,
        namespace: (!stands_for_itself).then(|| reference.registry().to_owned()),
        link: link(dir, host, entry)?,
        resolves: can("resolve"),
        pulls: can("pull"),
        origin: false,
    })
}

fn link(dir: &Path, host: String, entry: &HostEntry) -> Result<Option<Link>, String> {
    let connect = match &entry.dial_timeout {
        None => None,
        Some(text) => Some(go_duration(text).ok_or_else(|| format!("dial_timeout {text:?} is no duration"))?),
    };
    let link = Link {
        host,
        skip_verify: entry.skip_verify,
        authorities: entry.ca.all().iter().map(|path| dir.join(path)).collect(),
        client: entry.client.first().map(|(certificate, key)| (dir.join(certificate), dir.join(key))),
        connect,
        headers: entry
            .header
            .iter()
            .flat_map(|(name, values)| values.all().iter().map(|value| (name.clone(), value.clone())))
            .collect(),
    };
    let empty = Link { host: link.host.clone(), ..Link::default() };
    Ok((link != empty).then_some(link))
}

/// `1s`, `500ms`, `1m30s`, as Go writes durations.
fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let value: f64 = rest[..digits].parse().ok()?;
        let unit_end = rest[digits..]
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .map_or(rest.len(), |end| digits + end);
        let seconds = match &rest[digits..unit_end] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(value * seconds).ok()?)?;
        rest = &rest[unit_end..];
    }
    (total > Duration::ZERO).then_some(total)
}

// ---- podman ----

#[derive(Default, Deserialize)]
struct RegistriesFile {
    #[serde(default)]
    registry: Vec<RegistryEntry>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct RegistryEntry {
    prefix: String,
    location: String,
    insecure: bool,
    blocked: bool,
    mirror_by_digest_only: bool,
    mirror: Vec<MirrorEntry>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct MirrorEntry {
    location: String,
    insecure: bool,
    pull_from_mirror: String,
}

impl RegistryEntry {
    fn prefix(&self) -> &str {
        if self.prefix.is_empty() { &self.location } else { &self.prefix }
    }

    /// How much of `name` (`registry/repository`) the prefix covers.
    fn covers(&self, name: &str) -> Option<usize> {
        let prefix = self.prefix();
        if let Some(domain) = prefix.strip_prefix('*') {
            let host = &name[..name.find('/').unwrap_or(name.len())];
            let without_port = host.split(':').next().unwrap_or(host);
            return (domain.starts_with('.')
                && (host.ends_with(domain) || without_port.ends_with(domain))
                && without_port.len() > domain.len())
            .then_some(host.len());
        }
        let rest = name.strip_prefix(prefix).filter(|_| !prefix.is_empty())?;
        (rest.is_empty() || rest.starts_with('/')).then_some(prefix.len())
    }
}

/// The entry with the longest prefix; of equals, the one of the later file. `x.conf.d/*.conf` follow `x.conf`.
fn podman_entry(
    reference: &Reference,
    files: &[PathBuf],
) -> Result<Option<(PathBuf, RegistryEntry)>, PullError> {
    let name = format!("{}/{}", reference.registry(), reference.repository());
    let mut best: Option<(usize, PathBuf, RegistryEntry)> = None;
    for path in with_drop_ins(files)? {
        let Some(text) = read(&path)? else { continue };
        let file: RegistriesFile = parse(&path, &text)?;
        for entry in file.registry {
            if entry.covers(&name).is_none() {
                continue;
            }
            let length = entry.prefix().len();
            if best.as_ref().is_none_or(|(best, ..)| length >= *best) {
                best = Some((length, path.clone(), entry));
            }
        }
    }
    Ok(best.map(|(_, path, entry)| (path, entry)))
}

fn with_drop_ins(files: &[PathBuf]) -> Result<Vec<PathBuf>, PullError> {
    let mut all = Vec::new();
    for file in files {
        all.push(file.clone());
        let mut dir = file.clone().into_os_string();
        dir.push(".d");
        let dir = PathBuf::from(dir);
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(unreadable(&dir, &e)),
        };
        let mut more = entries
            .map(|entry| entry.map(|e| e.path()).map_err(|e| unreadable(&dir, &e)))
            .collect::<Result<Vec<_>, _>>()?;
        more.retain(|path| path.extension().is_some_and(|e| e == "conf"));
        more.sort();
        all.extend(more);
    }
    Ok(all)
}

fn lower_entry(
    reference: &Reference,
    path: &Path,
    entry: &RegistryEntry,
) -> Result<Vec<Endpoint>, PullError> {
    let name = format!("{}/{}", reference.registry(), reference.repository());
    let covered = entry.covers(&name).unwrap_or(0);
    let place = |location: &str, insecure: bool| {
        let moved = if location.is_empty() {
            name.clone()
        } else {
            format!("{}{}", location.trim_end_matches('/'), &name[covered..])
        };
        match moved.split_once('/') {
            Some((registry, repository)) if !registry.is_empty() && !repository.is_empty() => {
                Endpoint::at(reference, registry, repository, insecure)
            }
            _ => Err(PullError::MirrorFile {
                path: path.to_owned(),
                detail: format!("the location {location:?} makes {moved:?} of {name}"),
            }),
        }
    };
    let by_digest = reference.digest().is_some();
    let mut route = Vec::new();
    for mirror in &entry.mirror {
        let used = match mirror.pull_from_mirror.as_str() {
            "digest-only" => by_digest,
            "tag-only" => !by_digest,
            _ => !entry.mirror_by_digest_only || by_digest,
        };
        if used {
            route.push(place(&mirror.location, mirror.insecure)?);
        }
    }
    let origin = place(&entry.location, entry.insecure)?;
    route.push(Endpoint { origin: true, ..origin });
    Ok(route)
}

// ---- both ----

fn read(path: &Path) -> Result<Option<String>, PullError> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if matches!(e.kind(), NotFound | NotADirectory) => return Ok(None),
        Err(e) => return Err(unreadable(path, &e)),
    };
    let mut text = String::new();
    file.take(FILE_LIMIT + 1).read_to_string(&mut text).map_err(|e| unreadable(path, &e))?;
    if text.len() as u64 > FILE_LIMIT {
        return Err(PullError::MirrorFile {
            path: path.to_owned(),
            detail: format!("it is larger than {FILE_LIMIT} bytes"),
        });
    }
    Ok(Some(text))
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T, PullError> {
    toml::from_str(text).map_err(|e| {
        let line = e.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
        PullError::MirrorFile { path: path.to_owned(), detail: format!("{place}{}", e.message()) }
    })
}

fn unreadable(path: &Path, error: &std::io::Error) -> PullError {
    PullError::MirrorFile { path: path.to_owned(), detail: format!("it cannot be read: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `registry repository root[ root] [ns=..] [no-resolve] [no-pull] [skip-verify]` a line.
    fn show(route: &[Endpoint]) -> String {
        let line = |e: &Endpoint| {
            let roots: Vec<&str> = e.roots.iter().map(Url::as_str).collect();
            let mut words = vec![e.registry.clone(), e.repository.clone(), roots.join("|")];
            words.extend(e.namespace.iter().map(|ns| format!("ns={ns}")));
            words.extend((!e.resolves).then(|| "no-resolve".to_owned()));
            words.extend((!e.pulls).then(|| "no-pull".to_owned()));
            words.extend(e.link.as_ref().filter(|l| l.skip_verify).map(|_| "skip-verify".to_owned()));
            words.extend(e.origin.then(|| "origin".to_owned()));
            words.join(" ")
        };
        route.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    fn reference(text: &str) -> Reference {
        Reference::parse(text).unwrap()
    }

    fn hosts(dir: &Path, name: &str, text: &str) {
        std::fs::create_dir_all(dir.join(name)).unwrap();
        std::fs::write(dir.join(name).join(HOSTS_FILE), text).unwrap();
    }

    fn routed(image: &str, dir: &Path, conf: &str) -> Result<String, PullError> {
        let file = dir.join("registries.conf");
        std::fs::write(&file, conf).unwrap();
        route(&reference(image), &[dir.join("certs.d")], &[file]).map(|route| show(&route))
    }

    #[test]
    fn without_configuration_the_registry_itself_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let found = routed("busybox", dir.path(), "").unwrap();
        assert_eq!(found, "docker.io library/busybox https://registry-1.docker.io/v2/ origin");
        let local =
            routed("localhost:5000/a", dir.path(), "unqualified-search-registries = [\"x\"]").unwrap();
        assert_eq!(local, "localhost:5000 a https://localhost:5000/v2/|http://localhost:5000/v2/ origin");
    }

    #[test]
    fn containerds_hosts_are_asked_in_their_order_and_the_server_last() {
        let dir = tempfile::tempdir().unwrap();
        let certs = dir.path().join("certs.d");
        hosts(
            &certs,
            "docker.io",
            r#"
            server = "https://registry-1.docker.io"
            [host."http://z.local:5000"]
              capabilities = ["pull"]
              skip_verify = true
            [host."https://a.local/hub/v2"]
              capabilities = ["pull", "resolve"]
              override_path = true
              ca = ["ca.crt", "/etc/ca2.crt"]
              client = [["c.cert", "c.key"]]
              dial_timeout = "1m30s"
              [host."https://a.local/hub/v2".header]
                x-token = ["s3cr3t"]
            [host."b.local"]
            "#,
        );
        assert_eq!(
            routed("busybox", dir.path(), "").unwrap(),
            "z.local:5000 library/busybox http://z.local:5000/v2/ ns=docker.io no-resolve skip-verify\n\
             a.local library/busybox https://a.local/hub/v2/ ns=docker.io\n\
             b.local library/busybox https://b.local/v2/ ns=docker.io\n\
             docker.io library/busybox https://registry-1.docker.io/v2/ origin"
        );
        let route = route(&reference("busybox"), std::slice::from_ref(&certs), &[]).unwrap();
        let link = route[1].link.clone().unwrap();
        let own = certs.join("docker.io");
        assert_eq!(link.authorities, [own.join("ca.crt"), "/etc/ca2.crt".into()]);
        assert_eq!(link.client, Some((own.join("c.cert"), own.join("c.key"))));
        assert_eq!(link.connect, Some(Duration::from_secs(90)));
        assert_eq!(link.headers, [("x-token".to_owned(), "s3cr3t".to_owned())]);
        assert!(!format!("{link:?}").contains("s3cr3t"));
    }

    #[test]
    fn the_default_directory_is_for_registries_without_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let certs = dir.path().join("certs.d");
        hosts(&certs, "_default", "[host.\"https://all.local\"]\n");
        hosts(&certs, "quay.io_8443_", "skip_verify = true\n");
        assert_eq!(
            routed("ghcr.io/a/b:1", dir.path(), "").unwrap(),
            "all.local a/b https://all.local/v2/ ns=ghcr.io\nghcr.io a/b https://ghcr.io/v2/ origin"
        );
        assert_eq!(
            routed("quay.io:8443/a/b:1", dir.path(), "").unwrap(),
            "quay.io:8443 a/b https://quay.io:8443/v2/|http://quay.io:8443/v2/ skip-verify origin"
        );
    }

    #[test]
    fn podmans_prefixes_move_names_and_the_longest_wins() {
        let conf = r#"
            [[registry]]
            location = "docker.io"
            [[registry.mirror]]
            location = "m1.local:5000/hub"
            insecure = true
            [[registry.mirror]]
            location = "m2.local"
            pull-from-mirror = "digest-only"
            [[registry]]
            prefix = "docker.io/team"
            location = "harbor.local/team-images"
            [[registry]]
            prefix = "*.corp.example"
            location = "corp.local"
            [[registry]]
            prefix = "bad.example"
            blocked = true
        "#;
        let dir = tempfile::tempdir().unwrap();
        let check = |image: &str, expected: &str| {
            assert_eq!(routed(image, dir.path(), conf).unwrap(), expected, "{image}");
        };
        check(
            "busybox",
            "m1.local:5000 hub/library/busybox https://m1.local:5000/v2/|http://m1.local:5000/v2/ skip-verify\n\
             docker.io library/busybox https://registry-1.docker.io/v2/ origin",
        );
        let pinned = format!("busybox@sha256:{}", "0a".repeat(32));
        assert!(routed(&pinned, dir.path(), conf).unwrap().contains("m2.local library/busybox"));
        check("team/app:1", "harbor.local team-images/app https://harbor.local/v2/ origin");
        check("teammate/app:1", &routed("teammate/app:1", dir.path(), conf).unwrap());
        assert!(routed("teammate/app:1", dir.path(), conf).unwrap().contains("hub/teammate/app"));
        check("a.corp.example/x/y:1", "corp.local x/y https://corp.local/v2/ origin");
        check("corp.example/x/y:1", "corp.example x/y https://corp.example/v2/ origin");
        let error = routed("bad.example/x:1", dir.path(), conf).unwrap_err();
        assert!(matches!(&error, PullError::Blocked { .. }) && !error.is_retryable(), "{error}");
    }

    #[test]
    fn drop_ins_come_after_the_file_and_replace_equal_prefixes() {
        let dir = tempfile::tempdir().unwrap();
        let drop_ins = dir.path().join("registries.conf.d");
        std::fs::create_dir(&drop_ins).unwrap();
        let entry = |to: &str| format!("[[registry]]\nprefix = \"quay.io\"\nlocation = \"{to}\"\n");
        std::fs::write(drop_ins.join("10-a.conf"), entry("a.local")).unwrap();
        std::fs::write(drop_ins.join("20-b.conf"), entry("b.local")).unwrap();
        std::fs::write(drop_ins.join("30-c.conf.bak"), entry("c.local")).unwrap();
        let found = routed("quay.io/x:1", dir.path(), &entry("main.local")).unwrap();
        assert_eq!(found, "b.local x https://b.local/v2/ origin");
    }

    #[test]
    fn broken_files_name_the_file_and_the_line() {
        let dir = tempfile::tempdir().unwrap();
        let error = routed("x", dir.path(), "[[registry]]\nlocation = 7\n").unwrap_err();
        let text = error.to_string();
        assert!(text.contains("registries.conf") && text.contains("line 2"), "{text}");
        for bad in [
            "server = 1",
            "host = 1",
            "[host.\"ftp://x\"]",
            "[host.\"https://x\"]\ndial_timeout = \"soon\"",
            "[",
        ] {
            hosts(&dir.path().join("certs.d"), "docker.io", bad);
            let error = routed("x", dir.path(), "").unwrap_err();
            assert!(matches!(error, PullError::MirrorFile { .. }), "{bad}: {error}");
        }
    }
}
