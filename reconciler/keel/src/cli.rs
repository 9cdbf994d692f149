//! The command line as data. No logic: `main` matches on it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum, ValueHint};

use crate::text::parse_duration;

const EXIT_CODES: &str = "\
Exit codes:
  0  done, or everything is as declared
  1  failed
  2  invalid input: manifest or flags
  3  applied, but not ready in time
  4  no such object
  5  the daemon cannot be reached, or another process holds the state lock
  6  partly applied
`keel exec` ends with the command's own code, or 125 when it could not be tried, 126 when it
cannot be executed, 127 when it was not found. A closed pipe on standard output is success.";

/// Keeps a host on an even keel: a directory of Kubernetes-style YAML, made true.
#[derive(Debug, Parser)]
#[command(name = "keel", version, after_help = EXIT_CODES, max_term_width = 100, subcommand_required = true)]
#[command(arg_required_else_help = true, disable_help_subcommand = true, infer_long_args = false)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Order of precedence: flag, environment, configuration file, default.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// State that outlives a reboot [default: /var/lib/evenkeel]
    #[arg(long, global = true, env = "KEEL_ROOT", hide_env_values = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) root: Option<PathBuf>,
    /// State of this boot [default: /run/evenkeel]
    #[arg(long, global = true, env = "KEEL_RUN", hide_env_values = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) run: Option<PathBuf>,
    /// OCI runtime: name or path [default: keel-runtime beside keel]
    #[arg(long, global = true, env = "KEEL_RUNTIME", hide_env_values = true, value_name = "PROGRAM", value_hint = ValueHint::CommandName)]
    pub(crate) runtime: Option<PathBuf>,
    /// Container monitor: name or path [default: keel-shim beside keel]
    #[arg(long, global = true, env = "KEEL_SHIM", hide_env_values = true, value_name = "PROGRAM", value_hint = ValueHint::CommandName)]
    pub(crate) shim: Option<PathBuf>,
    /// Configuration file [default: /etc/evenkeel/config.yaml, if there]
    #[arg(long, global = true, env = "KEEL_CONFIG", hide_env_values = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,
    /// Namespace of the objects that the command names
    #[arg(short, long, global = true, env = "KEEL_NAMESPACE", hide_env_values = true, value_name = "NAME")]
    pub(crate) namespace: Option<String>,
    /// Say more (-vv: even more)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Say only errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Form of log lines on standard error
    #[arg(
        long,
        global = true,
        env = "KEEL_LOG_FORMAT",
        hide_env_values = true,
        value_name = "FORM",
        default_value = "text"
    )]
    pub(crate) log_format: LogFormat,
    /// Colours; `auto` needs a terminal and no NO_COLOR
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub(crate) color: When,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum When {
    #[default]
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make the given manifests true, once
    #[command(
        after_help = "Examples:\n  keel apply -f manifests/ --wait          true once, and ready\n  keel apply -f web.yaml --dry-run         only the plan\n  keel apply -f manifests/ --prune         also delete what they no longer name\n  generate | keel apply -f -"
    )]
    Apply(Apply),
    /// Keep a directory of manifests true
    #[command(visible_alias = "run")]
    #[command(after_help = "Examples:\n  keel daemon --manifests /etc/evenkeel/manifests")]
    Daemon(Daemon),
    /// Say what is wrong with manifests; needs no root and no daemon
    #[command(visible_alias = "validate")]
    #[command(after_help = "Examples:\n  keel check -f manifests/\n  keel check -f web.yaml -o json")]
    Check(Check),
    /// Print what apply would do, and why
    #[command(visible_alias = "diff")]
    #[command(
        after_help = "Examples:\n  keel plan -f manifests/\n  keel diff -f manifests/ --exit-code      1 when there is something to do"
    )]
    Plan(Plan),
    /// List objects
    #[command(visible_alias = "ps")]
    #[command(
        after_help = "Examples:\n  keel get                                 pods\n  keel get deploy,cm -A -o wide\n  keel get pod/web -o yaml\n  keel get -l app=web -w"
    )]
    Get(Get),
    /// Everything about one object
    #[command(visible_alias = "inspect")]
    #[command(after_help = "Examples:\n  keel describe web\n  keel describe deployment/web -o json")]
    Describe(Describe),
    /// Print the output of containers
    #[command(
        after_help = "Examples:\n  keel logs web -f --tail 100\n  keel logs web -c sidecar -p              the run before\n  keel logs deployment/web --since 10m --timestamps"
    )]
    Logs(Logs),
    /// Run a command inside a container
    #[command(
        after_help = "Examples:\n  keel exec web -- ls /\n  keel exec -it web -c main -- sh\n  tar c . | keel exec -i web -- tar x -C /data"
    )]
    Exec(Exec),
    /// See the output of a running container as it comes, and type to it
    #[command(
        after_help = "Examples:\n  keel attach web                          Ctrl-C leaves\n  keel attach -it web                      Ctrl-P Ctrl-Q leaves\n  keel attach web -c main --replay 64      with the last 64 KiB\n\nEnds with the container's code; 0 when it is left."
    )]
    Attach(Attach),
    /// One look at the whole host
    #[command(
        after_help = "Examples:\n  keel status\n  keel status --check                      3 unless everything is ready"
    )]
    Status(Status),
    /// What happened
    #[command(after_help = "Examples:\n  keel events\n  keel events --for pod/web -w")]
    Events(Events),
    /// Stop and remove an object
    #[command(visible_alias = "rm")]
    #[command(
        after_help = "Examples:\n  keel delete pod/web configmap/web\n  keel delete -f web.yaml\n  keel delete pod web --now"
    )]
    Delete(Delete),
    /// Stop containers and let their restart policy go on
    #[command(after_help = "Examples:\n  keel restart web\n  keel restart deployment/web")]
    Restart(Restart),
    /// Ask the daemon for a full round now
    #[command(
        after_help = "Examples:\n  keel reconcile\n  keel reconcile --accept-removals         what has gone from the directory is meant to go"
    )]
    Reconcile(Reconcile),
    /// Images of the store
    #[command(subcommand, visible_alias = "images")]
    Image(Image),
    /// The instance as a whole
    #[command(subcommand)]
    System(System),
    /// JSON schema of the manifests, for editors
    Schema(Schema),
    /// Completion script for a shell
    Completion { shell: clap_complete::Shell },
    /// Versions of the command and the daemon
    Version(VersionArgs),
    /// The web server of the demo image
    #[command(hide = true)]
    Hello(Hello),
    /// Called by a shim whose container has ended while nobody keeps the manifests true
    #[command(hide = true)]
    RestartRun(RestartRun),
}

#[derive(Debug, Subcommand)]
pub(crate) enum System {
    /// Stop and remove every container, pod and network of this instance
    ///
    /// Images, logs and applied manifests stay, unless --state is given. The daemon must not run.
    Reset(Reset),
}

#[derive(Debug, Args)]
pub(crate) struct Reset {
    /// Do not ask
    #[arg(long)]
    pub(crate) force: bool,
    /// Also delete images, logs, volumes and applied manifests
    #[arg(long)]
    pub(crate) state: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Files {
    /// Directory (recursive), file, or - for standard input; repeatable
    #[arg(short = 'f', long = "filename", value_name = "DIR|FILE|-", value_hint = ValueHint::AnyPath)]
    pub(crate) filename: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Apply {
    #[command(flatten)]
    pub(crate) files: Files,
    /// Delete applied objects that these files no longer name
    #[arg(long)]
    pub(crate) prune: bool,
    /// Confirm a prune that deletes everything
    #[arg(long)]
    pub(crate) allow_empty: bool,
    /// End only when every applied pod is ready
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait, e.g. 90s or 5m; 0 is for ever
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "5m")]
    pub(crate) timeout: Duration,
    /// Print the plan and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// `json`: one object a line, as it happens
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    pub(crate) output: TextOrJson,
}

#[derive(Debug, Args)]
pub(crate) struct Plan {
    #[command(flatten)]
    pub(crate) files: Files,
    /// Also plan to delete applied objects that these files no longer name
    #[arg(long)]
    pub(crate) prune: bool,
    /// Confirm a prune that deletes everything
    #[arg(long)]
    pub(crate) allow_empty: bool,
    /// End with 1 when there is anything to do
    #[arg(long)]
    pub(crate) exit_code: bool,
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    pub(crate) output: TextOrJson,
}

#[derive(Debug, Args)]
pub(crate) struct Daemon {
    /// Directory of manifests [default: `manifests` of the configuration]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, env = "KEEL_MANIFESTS", hide_env_values = true)]
    pub(crate) manifests: Option<PathBuf>,
    /// The directory is taken at its word also when it is empty, or when most of what it declared has gone at once
    #[arg(long)]
    pub(crate) allow_empty: bool,
    /// Also serve the control API on a loopback address, e.g. 127.0.0.1:7300
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<std::net::SocketAddr>,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    #[command(flatten)]
    pub(crate) files: Files,
    /// Warnings are errors too
    #[arg(long)]
    pub(crate) strict: bool,
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    pub(crate) output: TextOrJson,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TextOrJson {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    #[default]
    Table,
    Wide,
    Name,
    Json,
    Yaml,
}

/// A view for people, or data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum View {
    #[default]
    Table,
    Json,
    Yaml,
}

impl From<View> for Form {
    fn from(view: View) -> Form {
        match view {
            View::Table => Form::Table,
            View::Json => Form::Json,
            View::Yaml => Form::Yaml,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Get {
    /// KIND, KIND/NAME or KIND NAME... [default: pods]
    #[arg(value_name = "KIND[/NAME]")]
    pub(crate) objects: Vec<String>,
    #[arg(short, long, value_name = "FORM", default_value = "table")]
    pub(crate) output: Form,
    /// Print again at each change
    #[arg(short, long)]
    pub(crate) watch: bool,
    #[arg(long)]
    pub(crate) no_headers: bool,
    /// Only objects with these labels, e.g. app=web,tier!=db
    #[arg(short = 'l', long, value_name = "LABELS", value_parser = crate::selector::Selector::parse)]
    pub(crate) selector: Option<crate::selector::Selector>,
    /// Of all namespaces
    #[arg(short = 'A', long)]
    pub(crate) all_namespaces: bool,
    /// No such object is not an error
    #[arg(long)]
    pub(crate) ignore_not_found: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Describe {
    /// KIND/NAME or KIND NAME
    #[arg(value_name = "KIND/NAME", required = true)]
    pub(crate) objects: Vec<String>,
    /// `json` or `yaml`: the object's status as data
    #[arg(short, long, value_name = "FORM", default_value = "table")]
    pub(crate) output: View,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Pod, or KIND/NAME for all pods of it
    #[arg(value_name = "POD")]
    pub(crate) object: String,
    /// Container, same as -c
    #[arg(value_name = "CONTAINER", conflicts_with = "container")]
    pub(crate) container_position: Option<String>,
    #[arg(short, long, value_name = "NAME")]
    pub(crate) container: Option<String>,
    /// Go on as the container writes; ends with it
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last N lines
    #[arg(long, value_name = "N")]
    pub(crate) tail: Option<u64>,
    /// Only what is younger, e.g. 10m
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, conflicts_with = "since_time")]
    pub(crate) since: Option<Duration>,
    /// Only what is younger, e.g. 2026-01-02T15:04:05Z
    #[arg(long, value_name = "TIME", value_parser = crate::text::parse_time)]
    pub(crate) since_time: Option<String>,
    /// The run before the current one
    #[arg(short, long, conflicts_with = "follow")]
    pub(crate) previous: bool,
    /// The time before each line
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// Pod and container before each line
    #[arg(long)]
    pub(crate) prefix: bool,
    /// Of every container of the pod
    #[arg(long, conflicts_with_all = ["container", "container_position"])]
    pub(crate) all_containers: bool,
}

/// A running container, and whether it hears us.
#[derive(Debug, Args)]
pub(crate) struct Target {
    /// Pod
    #[arg(value_name = "POD")]
    pub(crate) object: String,
    /// Container [default: the first]
    #[arg(short, long, value_name = "NAME")]
    pub(crate) container: Option<String>,
    /// Pass standard input on
    #[arg(short = 'i', long = "stdin")]
    pub(crate) interactive: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    #[command(flatten)]
    pub(crate) target: Target,
    /// With a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// NAME|UID[:GROUP|GID]
    #[arg(short, long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// NAME=VALUE, or NAME to pass our own on; repeatable
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Program and arguments
    #[arg(last = true, required = true, value_name = "COMMAND", value_hint = ValueHint::CommandWithArguments)]
    pub(crate) command: Vec<std::ffi::OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Key by key, where the container has a terminal; with -i
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Leave by these keys, with -it: characters or ctrl-<key>, separated by commas; none if empty
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub(crate) detach_keys: DetachKeys,
    /// Earlier output first, so much of it; about 128 at most
    #[arg(long, value_name = "KIB", default_value_t = 0)]
    pub(crate) replay: u16,
}

/// As docker writes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DetachKeys(pub(crate) Vec<u8>);

impl std::str::FromStr for DetachKeys {
    type Err = String;

    fn from_str(text: &str) -> Result<DetachKeys, String> {
        if text.is_empty() {
            return Ok(DetachKeys(Vec::new()));
        }
        let key =
            |word: &str| match (word.strip_prefix("ctrl-").unwrap_or_default().as_bytes(), word.as_bytes()) {
                ([key @ (b'a'..=b'z' | b'@' | b'[' | b'\\' | b']' | b'^' | b'_')], _) => Ok(key & 0x1f),
                (_, [key]) if key.is_ascii_graphic() => Ok(*key),
                _ => Err(format!("`{word}` is neither a character nor ctrl-<a to z, @ [ \\ ] ^ _>")),
            };
        text.split(',').map(key).collect::<Result<_, _>>().map(DetachKeys)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// End with 3 unless everything is ready
    #[arg(long)]
    pub(crate) check: bool,
    #[arg(short, long, value_name = "FORM", default_value = "table")]
    pub(crate) output: View,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Go on as things happen; needs the daemon
    #[arg(short, long)]
    pub(crate) watch: bool,
    /// Only of this object, e.g. pod/web
    #[arg(long = "for", value_name = "KIND/NAME")]
    pub(crate) object: Option<String>,
    /// Only these
    #[arg(long, value_name = "TYPE", value_delimiter = ',')]
    pub(crate) types: Vec<EventType>,
    /// Of all namespaces
    #[arg(short = 'A', long)]
    pub(crate) all_namespaces: bool,
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    pub(crate) output: TextOrJson,
    #[arg(long)]
    pub(crate) no_headers: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EventType {
    Normal,
    Warning,
}

#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// KIND/NAME... or KIND NAME...
    #[arg(value_name = "KIND/NAME", required_unless_present = "filename")]
    pub(crate) objects: Vec<String>,
    /// Everything that these files declare
    #[arg(short = 'f', long, value_name = "DIR|FILE|-", value_hint = ValueHint::AnyPath, conflicts_with = "objects")]
    pub(crate) filename: Vec<PathBuf>,
    /// Return at once
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Seconds between the stop signal and the kill, instead of the pod's own (which are 2 at least)
    #[arg(long, value_name = "SECONDS")]
    pub(crate) grace_period: Option<u64>,
    /// Kill at once
    #[arg(long, conflicts_with = "grace_period")]
    pub(crate) now: bool,
    /// No such object is not an error
    #[arg(long)]
    pub(crate) ignore_not_found: bool,
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    pub(crate) output: TextOrJson,
}

#[derive(Debug, Args)]
pub(crate) struct Restart {
    /// Pod, or KIND/NAME for all pods of it
    #[arg(value_name = "KIND/NAME", required = true)]
    pub(crate) objects: Vec<String>,
    /// Only this container
    #[arg(short, long, value_name = "NAME")]
    pub(crate) container: Option<String>,
    /// Return once it was begun
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// How long to wait, e.g. 90s or 5m; 0 is for ever
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "5m")]
    pub(crate) timeout: Duration,
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    pub(crate) output: TextOrJson,
}

#[derive(Debug, Args)]
pub(crate) struct Reconcile {
    /// Confirm that what has gone from the directory is meant to go, also when that is most of it
    #[arg(long)]
    pub(crate) accept_removals: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// Fetch from a registry
    Pull {
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<String>,
        /// Keep the images of all platforms, packed, and the index over them: for push and save
        #[arg(short, long)]
        all_platforms: bool,
        /// Also fetch packed layers that were given up for space: push and save need them
        #[arg(long)]
        packed: bool,
        /// json: one event a line, with bytes, speed and time left of each layer
        #[arg(short, long, value_name = "FORM", default_value = "text")]
        output: TextOrJson,
    },
    /// List what refers to an image in its registry: signatures, lists of contents
    Referrers {
        #[arg(value_name = "IMAGE")]
        image: String,
        /// Only of this artifact type
        #[arg(long = "type", value_name = "TYPE")]
        artifact_type: Option<String>,
        #[arg(short, long, value_name = "FORM", default_value = "text")]
        output: TextOrJson,
    },
    /// Send to a registry, with all platforms that are kept; blobs that are there already are not sent again
    Push {
        #[arg(value_name = "IMAGE")]
        image: String,
        /// Where to, if not where its name says
        #[arg(value_name = "NAME")]
        target: Option<String>,
        /// json: one event a line
        #[arg(short, long, value_name = "FORM", default_value = "text")]
        output: TextOrJson,
    },
    /// List
    #[command(visible_alias = "list")]
    Ls {
        #[arg(short, long, value_name = "FORM", default_value = "table")]
        output: Form,
        #[arg(long)]
        no_headers: bool,
    },
    /// Take in an OCI archive, OCI layout directory or docker archive; - is standard input
    ///
    /// An index is kept with all its platforms when the archive has them.
    #[command(visible_alias = "load")]
    Import {
        #[arg(value_name = "FILE|DIR|-", required = true, value_hint = ValueHint::AnyPath)]
        files: Vec<PathBuf>,
        /// json: one event a line
        #[arg(short, long, value_name = "FORM", default_value = "text")]
        output: TextOrJson,
    },
    /// Remove
    Rm {
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<String>,
        /// Also an image that a pod is made of
        #[arg(long)]
        force: bool,
        /// No such image is not an error
        #[arg(long)]
        ignore_not_found: bool,
        /// json: one event a line
        #[arg(short, long, value_name = "FORM", default_value = "text")]
        output: TextOrJson,
    },
    /// Give an image one more name
    Tag {
        #[arg(value_name = "IMAGE")]
        image: String,
        #[arg(value_name = "NAME")]
        reference: String,
        /// json: one event a line
        #[arg(short, long, value_name = "FORM", default_value = "text")]
        output: TextOrJson,
    },
    /// Write images as one archive or layout
    Save {
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<String>,
        /// - is standard output
        #[arg(short, long, value_name = "FILE|DIR|-", value_hint = ValueHint::AnyPath)]
        output: PathBuf,
        #[arg(long, value_name = "FORMAT", default_value = "oci-archive")]
        format: SaveAs,
        /// json: one event a line on standard output
        #[arg(long, value_name = "FORM", default_value = "text")]
        progress: TextOrJson,
    },
    /// How an image was built, newest step first
    History {
        #[arg(value_name = "IMAGE")]
        image: String,
        #[arg(short, long, value_name = "FORM", default_value = "text")]
        output: TextOrJson,
    },
    /// What takes how much space
    Du {
        #[arg(short, long, value_name = "FORM", default_value = "text")]
        output: TextOrJson,
    },
    /// Configuration and layers
    Inspect {
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<String>,
        /// json or yaml
        #[arg(short, long, value_name = "FORM", default_value = "json")]
        output: Form,
    },
    /// Check that what is on disk is what was pulled; ends with 1 when something is damaged and not healed
    Verify {
        /// Heal damage: from kept blobs, then from the registry; what cannot be healed is set aside
        #[arg(long)]
        repair: bool,
        /// Only names, owners, modes and lengths, as after each start of the machine
        #[arg(long)]
        quick: bool,
        #[arg(short, long, value_name = "FORM", default_value = "text")]
        output: TextOrJson,
    },
    /// Remove images and layers that nothing uses
    Prune {
        /// json: one event a line
        #[arg(short, long, value_name = "FORM", default_value = "text")]
        output: TextOrJson,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SaveAs {
    /// A tar of an OCI layout; digests stay what they are
    OciArchive,
    /// An OCI layout as a directory
    OciDir,
    /// What `docker save` writes, for docker and podman of any age
    DockerArchive,
}

#[derive(Debug, Args)]
pub(crate) struct Schema {
    /// Only of this kind
    pub(crate) kind: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct VersionArgs {
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    pub(crate) output: TextOrJson,
}

#[derive(Debug, Args)]
pub(crate) struct RestartRun {
    /// The run that has ended
    pub(crate) container: String,
}

#[derive(Debug, Args)]
pub(crate) struct Hello {
    /// Serve this file's text on /
    #[arg(long, value_name = "PATH")]
    pub(crate) file: Option<PathBuf>,
    /// Print this and end
    #[arg(long, value_name = "TEXT")]
    pub(crate) once: Option<String>,
}
