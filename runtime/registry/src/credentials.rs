//! Logins: docker's `config.json`, podman's `auth.json`, and the helpers that they name.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::PullError;
use crate::reference::DOCKER_HUB;

/// A file of logins is a few kilobytes; a larger one is not such a file.
const AUTH_FILE_LIMIT: u64 = 1 << 20;
/// Helpers talk to a keyring or a cloud service. They must not hang a pull.
const HELPER_DEADLINE: Duration = Duration::from_secs(20);
const HELPER_OUTPUT_LIMIT: u64 = 64 << 10;

/// What a registry or its token service accepts. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    Basic {
        username: String,
        password: String,
    },
    /// An OAuth2 refresh token, exchanged for access tokens by POST.
    IdentityToken(String),
    /// A ready-made bearer token.
    RegistryToken(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Basic(..)",
            Self::IdentityToken(_) => "IdentityToken(..)",
            Self::RegistryToken(_) => "RegistryToken(..)",
        })
    }
}

/// Logins that come with one pull (an `imagePullSecrets` entry): the contents of a `config.json`.
#[derive(Clone)]
pub struct InlineAuth {
    /// Where it is from, for messages, e.g. `secret default/regcred`.
    pub name: String,
    pub config_json: Vec<u8>,
}

impl fmt::Debug for InlineAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InlineAuth").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The places where docker and podman keep logins of this user, most specific first.
pub fn default_auth_files() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = variable("HOME").unwrap_or_else(|| PathBuf::from("/root"));
    let mut files = Vec::new();
    files.extend(variable("REGISTRY_AUTH_FILE"));
    files.extend(variable("DOCKER_CONFIG").map(|dir| dir.join("config.json")));
    files.extend(variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")));
    files.push(PathBuf::from("/run/containers/0/auth.json"));
    files.push(home.join(".config/containers/auth.json"));
    files.push(home.join(".docker/config.json"));
    files
}

/// Finds the logins for a repository, in the order to try them: one of each inline source, as Kubernetes tries all
/// secrets of a pod, then that of the first file that has one.
pub(crate) async fn find(
    inline: &[InlineAuth],
    files: &[PathBuf],
    registry: &str,
    repository: &str,
) -> Result<Vec<Credential>, PullError> {
    let mut all = Vec::new();
    for source in inline {
        let file = parse(&source.config_json, Path::new(&source.name))?;
        let found = file.look_up(registry, repository).resolve(registry).await?;
        all.extend(found.filter(|login| !all.contains(login)));
    }
    for path in files {
        let Some(bytes) = read(path)? else { continue };
        let file = parse(&bytes, path)?;
        if let Some(found) = file.look_up(registry, repository).resolve(registry).await? {
            all.push(found);
            break;
        }
    }
    Ok(all)
}

/// `None` where the file does not exist; a small local file, so reading it does not hold up the runtime.
fn read(path: &Path) -> Result<Option<Vec<u8>>, PullError> {
    let failed = |e: std::io::Error| PullError::AuthFile {
        path: path.to_owned(),
        detail: format!("it cannot be read: {e}"),
    };
    use std::io::ErrorKind::{NotADirectory, NotFound};
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if matches!(e.kind(), NotFound | NotADirectory) => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let mut bytes = Vec::new();
    file.take(AUTH_FILE_LIMIT + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > AUTH_FILE_LIMIT {
        return Err(PullError::AuthFile {
            path: path.to_owned(),
            detail: format!("it is larger than {AUTH_FILE_LIMIT} bytes"),
        });
    }
    Ok(Some(bytes))
}

fn parse(bytes: &[u8], path: &Path) -> Result<AuthFile, PullError> {
    // podman leaves an empty file behind after the last logout
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(AuthFile::default());
    }
    serde_json::from_slice(bytes).map_err(|e| PullError::AuthFile {
        path: path.to_owned(),
        // The message of serde_json may quote a value, and the values are secrets.
        detail: format!("not valid JSON of logins (line {}, column {})", e.line(), e.column()),
    })
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AuthFile {
    #[serde(default)]
    auths: BTreeMap<String, AuthEntry>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    #[serde(default)]
    creds_store: String,
}

#[derive(Default, Deserialize)]
struct AuthEntry {
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default)]
    identitytoken: Option<String>,
    #[serde(default)]
    registrytoken: Option<String>,
}

/// What a file says about a repository.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Login(Credential),
    /// Ask `docker-credential-<0>` for the server `<1>`.
    Helper(String, String),
}

impl AuthFile {
    /// The longest matching key wins; for one host a helper of its own, then a stored login, then the store.
    fn look_up(&self, registry: &str, repository: &str) -> Found {
        let mut path = format!("{registry}/{repository}");
        while path.len() > registry.len() {
            if let Some(login) = self.login(&[path.clone()]) {
                return Found::Login(login);
            }
            path.truncate(path.rfind('/').unwrap_or(0));
        }
        let names = server_names(registry);
        for name in &names {
            if let Some(helper) = self.cred_helpers.get(name).filter(|h| !h.is_empty()) {
                return Found::Helper(helper.clone(), name.clone());
            }
        }
        if let Some(login) = self.login(&names) {
            return Found::Login(login);
        }
        if !self.creds_store.is_empty() {
            return Found::Helper(self.creds_store.clone(), names[0].clone());
        }
        Found::Nothing
    }

    fn login(&self, names: &[String]) -> Option<Credential> {
        let wanted: Vec<&str> = names.iter().map(|n| normal_key(n)).collect();
        self.auths
            .iter()
            .filter(|(key, _)| wanted.contains(&normal_key(key)))
            .find_map(|(_, entry)| entry.credential())
    }
}

impl AuthEntry {
    fn credential(&self) -> Option<Credential> {
        let given = |field: &Option<String>| field.clone().filter(|s| !s.is_empty());
        if let Some(token) = given(&self.registrytoken) {
            return Some(Credential::RegistryToken(token));
        }
        if let Some(token) = given(&self.identitytoken) {
            return Some(Credential::IdentityToken(token));
        }
        if let Some(auth) = given(&self.auth) {
            let decoded = base64::engine::general_purpose::STANDARD.decode(auth.trim()).ok()?;
            let text = String::from_utf8(decoded).ok()?;
            let (username, password) = text.trim_end_matches('\0').split_once(':')?;
            return Some(basic_or_token(username, password));
        }
        Some(basic_or_token(&given(&self.username)?, &given(&self.password)?))
    }
}

/// docker marks an identity token by the user name `<token>`.
fn basic_or_token(username: &str, password: &str) -> Credential {
    if username == "<token>" {
        Credential::IdentityToken(password.to_owned())
    } else {
        Credential::Basic { username: username.to_owned(), password: password.to_owned() }
    }
}

/// The names under which a registry's login may be filed, the one to tell helpers first.
fn server_names(registry: &str) -> Vec<String> {
    match registry {
        DOCKER_HUB | "index.docker.io" | "registry-1.docker.io" => vec![
            "https://index.docker.io/v1/".to_owned(),
            "index.docker.io".to_owned(),
            DOCKER_HUB.to_owned(),
            "registry-1.docker.io".to_owned(),
        ],
        other => vec![other.to_owned()],
    }
}

/// Old files hold URLs as keys: without scheme, version path and slash they are comparable.
fn normal_key(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let key = key.trim_end_matches('/');
    key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key)
}

impl Found {
    async fn resolve(self, registry: &str) -> Result<Option<Credential>, PullError> {
        match self {
            Found::Nothing => Ok(None),
            Found::Login(login) => Ok(Some(login)),
            Found::Helper(helper, server) => {
                let answer = if is_program_name(&helper) {
                    ask_helper(&format!("docker-credential-{helper}"), &server).await
                } else {
                    Err("its name is not one of a program".to_owned())
                };
                answer.map_err(|detail| PullError::CredentialHelper {
                    helper,
                    registry: registry.to_owned(),
                    detail,
                })
            }
        }
    }
}

/// A name that is looked up in `PATH`, never a path.
fn is_program_name(helper: &str) -> bool {
    helper.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// Runs `docker-credential-<helper> get`: the server on stdin, JSON on stdout.
async fn ask_helper(program: &str, server: &str) -> Result<Option<Credential>, String> {
    let mut child = tokio::process::Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| format!("it cannot be started: {e}"))?;
    let mut stdin = child.stdin.take().expect("stdin was asked for as a pipe");
    let stdout = child.stdout.take().expect("stdout was asked for as a pipe");
    let talk = async {
        // A helper that does not read its input ends with its own error.
        let _ = stdin.write_all(server.as_bytes()).await;
        drop(stdin);
        let mut output = Vec::new();
        stdout
            .take(HELPER_OUTPUT_LIMIT)
            .read_to_end(&mut output)
            .await
            .map_err(|e| format!("its output cannot be read: {e}"))?;
        let status = child.wait().await.map_err(|e| format!("waiting for it failed: {e}"))?;
        Ok::<_, String>((status, output))
    };
    let (status, output) = tokio::time::timeout(HELPER_DEADLINE, talk)
        .await
        .map_err(|_| format!("no answer within {} s", HELPER_DEADLINE.as_secs()))??;
    lower_helper_answer(status.success(), &output)
}

fn lower_helper_answer(success: bool, output: &[u8]) -> Result<Option<Credential>, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    if !success {
        // Fixed by the helper protocol.
        let text = String::from_utf8_lossy(output);
        return if text.contains("credentials not found in native keychain") {
            Ok(None)
        } else {
            Err(text.trim().chars().take(200).collect())
        };
    }
    let answer: Answer =
        serde_json::from_slice(output).map_err(|_| "its answer is not as agreed".to_owned())?;
    Ok(Some(basic_or_token(&answer.username, &answer.secret)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(username: &str, password: &str) -> Found {
        Found::Login(Credential::Basic { username: username.into(), password: password.into() })
    }

    fn check(file: &str, registry: &str, repository: &str, expected: Found) {
        let file = parse(file.as_bytes(), Path::new("config.json")).unwrap();
        assert_eq!(file.look_up(registry, repository), expected, "{registry}/{repository}");
    }

    #[test]
    fn logins_are_found_under_every_name_they_are_filed_by() {
        // a2VlbDpzZWNyZXQ= is keel:secret
        let hub = r#"{"auths":{"https://index.docker.io/v1/":{"auth":"a2VlbDpzZWNyZXQ="}}}"#;
        check(hub, "docker.io", "library/x", basic("keel", "secret"));
        check(hub, "quay.io", "library/x", Found::Nothing);
        let url = r#"{"auths":{"https://reg.example:5000/v2/":{"auth":"a2VlbDpzZWNyZXQ="}}}"#;
        check(url, "reg.example:5000", "x", basic("keel", "secret"));
        check(url, "reg.example", "x", Found::Nothing);
        let plain = r#"{"auths":{"r":{"username":"u","password":"p:q"}}}"#;
        check(plain, "r", "x", basic("u", "p:q"));
    }

    #[test]
    fn the_most_specific_login_wins() {
        let file = r#"{"auths":{"r":{"username":"u","password":"host"},
            "r/a":{"username":"u","password":"a"},"r/a/b":{"username":"u","password":"ab"}}}"#;
        check(file, "r", "a/b", basic("u", "ab"));
        check(file, "r", "a/b/c", basic("u", "ab"));
        check(file, "r", "a/x", basic("u", "a"));
        check(file, "r", "ab", basic("u", "host"));
    }

    #[test]
    fn helpers_are_asked_where_named() {
        let file = r#"{"auths":{"r":{}},"credsStore":"store","credHelpers":{"gcr.io":"gcloud"}}"#;
        check(file, "gcr.io", "x", Found::Helper("gcloud".into(), "gcr.io".into()));
        check(file, "r", "x", Found::Helper("store".into(), "r".into()));
        check(file, "docker.io", "x", Found::Helper("store".into(), "https://index.docker.io/v1/".into()));
    }

    #[test]
    fn tokens_are_told_from_passwords() {
        let identity = r#"{"auths":{"r":{"auth":"","identitytoken":"t"}}}"#;
        check(identity, "r", "x", Found::Login(Credential::IdentityToken("t".into())));
        let answer = lower_helper_answer(true, br#"{"ServerURL":"r","Username":"<token>","Secret":"s"}"#);
        assert_eq!(answer, Ok(Some(Credential::IdentityToken("s".into()))));
        let none = lower_helper_answer(false, b"credentials not found in native keychain\n");
        assert_eq!(none, Ok(None));
        assert!(lower_helper_answer(false, b"vault sealed").unwrap_err().contains("vault sealed"));
    }

    #[tokio::test]
    async fn helpers_are_told_the_server_and_answer_on_stdout() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, body: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let good = script(
            "good",
            r#"read -r server; [ "$1" = get ] && printf '{"ServerURL":"%s","Username":"u","Secret":"for %s"}' "$server" "$server""#,
        );
        let answer = ask_helper(&good, "r:5000").await;
        let expected = Credential::Basic { username: "u".into(), password: "for r:5000".into() };
        assert_eq!(answer, Ok(Some(expected)));
        let fails = script("fails", "echo the vault is sealed; exit 1");
        assert!(ask_helper(&fails, "r").await.unwrap_err().contains("vault is sealed"));
        let none = script("none", "echo credentials not found in native keychain; exit 1");
        assert_eq!(ask_helper(&none, "r").await, Ok(None));
        assert!(ask_helper("/no/such/helper", "r").await.unwrap_err().contains("cannot be started"));
        assert!(is_program_name("ecr-login"));
        let path = Found::Helper("x/../../good".into(), "r".into()).resolve("r").await;
        assert!(path.unwrap_err().to_string().contains("not one of a program"));
    }

    #[test]
    fn secrets_never_reach_a_message() {
        let error = parse(br#"{"auths":{"r":{"auth":["s3cr3t"]}}}"#, Path::new("f")).err().unwrap();
        assert!(!format!("{error:?}").contains("s3cr3t"));
        let credential = Credential::Basic { username: "u".into(), password: "s3cr3t".into() };
        assert!(!format!("{credential:?}").contains("s3cr3t"));
    }
}
