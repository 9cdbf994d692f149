//! Manifests and what is said about them.

use std::fmt::Write as _;

use crate::{Parsed, parse};

const CASES: &str = include_str!("../cases.txt");

fn describe(parsed: &Parsed) -> String {
    let mut out = String::new();
    for d in &parsed.diagnostics {
        let path = if d.path.is_empty() { String::new() } else { format!(" {}", d.path) };
        write!(out, "{}:{} {}{path}: {}", d.line, d.column, d.severity.word(), d.message).unwrap();
        if let Some(related) = &d.related {
            write!(out, " | {} {}:{}", related.message, related.line, related.column).unwrap();
        }
        if let Some(help) = &d.help {
            write!(out, " | {help}").unwrap();
        }
        out.push('\n');
    }
    out
}

/// (name, manifest, answer) of each case.
fn cases() -> Vec<(&'static str, &'static str, &'static str)> {
    CASES
        .split("\n==== ")
        .skip(1)
        .map(|case| {
            let (name, rest) = case.split_once('\n').unwrap();
            let (manifest, answer) = rest.split_once("----").unwrap();
            (name, manifest, answer.strip_prefix('\n').unwrap_or(answer))
        })
        .collect()
}

#[test]
fn every_case_is_answered_as_written() {
    let mut blessed = CASES.split("\n==== ").next().unwrap().to_owned();
    let mut wrong = Vec::new();
    for (name, manifest, answer) in cases() {
        let found = describe(&parse("f.yaml", manifest.as_bytes()));
        if found.trim_end() != answer.trim_end() {
            wrong.push(format!("==== {name}\n-- expected\n{answer}\n-- found\n{found}"));
        }
        write!(blessed, "\n==== {name}\n{manifest}----\n{found}").unwrap();
        blessed.truncate(blessed.trim_end().len());
    }
    if std::env::var_os("KEEL_BLESS").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/cases.txt"), blessed + "\n").unwrap();
    } else {
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
    assert!(cases().len() >= 80, "only {} cases", cases().len());
}

#[test]
fn the_schema_knows_what_the_reader_accepts() {
    for kind in crate::kinds() {
        let schema = crate::schema(Some(kind)).unwrap();
        assert_eq!(schema["$ref"], format!("#/$defs/{kind}"));
        assert_eq!(schema["$defs"][kind]["properties"]["kind"]["const"], kind);
        assert_eq!(schema["$defs"][kind]["additionalProperties"], false);
    }
    assert!(crate::schema(Some("deployment")).is_some());
    assert!(crate::schema(Some("Spaceship")).is_none());
    let all = crate::schema(None).unwrap();
    let list = 1;
    assert_eq!(all["oneOf"].as_array().unwrap().len(), crate::kinds().len() + list);
    assert!(all["$defs"]["Container"]["properties"].get("lifecycle").is_none(), "not done yet");
    assert!(all["$defs"]["PodSpec"]["properties"].get("nodeSelector").is_some(), "accepted");
}

/// A misspelt type in the table of known fields would silently do nothing.
#[test]
fn known_fields_belong_to_types_of_the_model() {
    for known in crate::known::FIELDS {
        assert!(!crate::schema::SHAPES.fields(known.type_name).is_empty(), "{}", known.type_name);
        for field in known.no_effect {
            assert!(!known.not_yet.contains(field), "{}.{field}", known.type_name);
        }
    }
}

fn errors(file: &str, text: &[u8]) -> Vec<String> {
    parse(file, text).diagnostics.iter().map(crate::Diagnostic::one_line).collect()
}

#[test]
fn files_that_are_no_text_are_refused_with_the_place() {
    assert_eq!(errors("f.yaml", b"a: b\nc: \xff\n"), ["f.yaml:2:4: error: byte 0xff is not valid UTF-8"]);
    assert_eq!(errors("f.yaml", b"\xff\xfea\0"), ["f.yaml:1:1: error: byte 0xff is not valid UTF-8"]);
    let large = vec![b'#'; crate::MAX_FILE_BYTES + 1];
    assert_eq!(
        errors("f.yaml", &large),
        ["f.yaml: error: the file is larger than 1048576 bytes (1 MiB) (1048577 bytes)"]
    );
    assert_eq!(errors("f.yaml", b""), [""; 0]);
    assert_eq!(errors("f.yaml", b"\xef\xbb\xbf# with a mark\n"), [""; 0]);
}

#[test]
fn secret_values_reach_no_message() {
    let (_, manifest, _) = cases().into_iter().find(|c| c.0 == "secret contents are never shown").unwrap();
    let broken = format!("{manifest}  more: [swordfish\n");
    for text in [manifest.to_owned(), broken] {
        for d in parse("f.yaml", text.as_bytes()).diagnostics {
            let shown = format!("{}{}", d.render(false), serde_json::to_string(&d).unwrap());
            for secret in ["hunter2", "swordfish", "12345"] {
                assert!(!shown.contains(secret), "{shown}");
            }
        }
    }
    let (_, manifest, _) = cases().into_iter().find(|c| c.0 == "secret contents are never shown").unwrap();
    let fixed = manifest.replace("twice: swordfish\n  twice", "twice").replace("12345", "\"12345\"");
    let debug = format!(
        "{:?}",
        parse("f.yaml", fixed.as_bytes()).objects.iter().map(|o| &o.kind).collect::<Vec<_>>()
    );
    assert!(debug.contains("twice") && !debug.contains("swordfish"), "{debug}");
}

#[test]
fn a_message_shows_the_line_and_marks_the_token() {
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  containers:\n  - name: c\n    image: x\n    comand: [a]\n";
    let parsed = parse("web.yaml", text.as_bytes());
    assert_eq!(
        parsed.diagnostics[0].render(false),
        "error: unknown field \"comand\"\n --> web.yaml:8:5  spec.containers[0].comand\n  |\n8 |     comand: [a]\n  |     ^^^^^^\n  = hint: did you mean \"command\"?\n"
    );
    let json = serde_json::to_value(&parsed.diagnostics[0]).unwrap();
    assert_eq!(json["line"], 8);
    assert_eq!(json["severity"], "error");
    let long = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: a}}\ndata: {{ {} x: 5 }}",
        "a: ".repeat(0) + &"k: v, ".repeat(0) + &(0..100).map(|i| format!("k{i}: v, ")).collect::<String>()
    );
    let rendered = parse("web.yaml", long.as_bytes()).diagnostics[0].render(false);
    let lines: Vec<&str> = rendered.lines().collect();
    assert!(lines[3].len() < 200, "{rendered}");
    let at = lines[4].find('^').unwrap();
    assert_eq!(lines[3].as_bytes()[at], b'5', "{rendered}");
}

#[test]
fn thousands_of_problems_are_counted_not_listed() {
    let mut text =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  containers: [{name: c, image: x}]\n"
            .to_owned();
    for i in 0..20_000 {
        text.push_str(&format!("  field{i}: x\n"));
    }
    let parsed = parse("f.yaml", text.as_bytes());
    assert_eq!(parsed.diagnostics.len(), crate::report::MAX_PROBLEMS + 1);
    assert!(parsed.diagnostics.iter().any(|d| d.line == 0 && d.message.contains("more")));
}

#[test]
fn what_is_read_is_written_again_the_same() {
    for (name, manifest, _) in cases() {
        let parsed = parse("f.yaml", manifest.as_bytes());
        if parsed.has_errors() {
            continue;
        }
        for object in &parsed.objects {
            let written = crate::to_yaml(&object.to_json());
            let again = parse("f.yaml", written.as_bytes());
            assert_eq!(errors("f.yaml", written.as_bytes()), [""; 0], "{name}\n{written}");
            assert_eq!(again.objects[0].kind, object.kind, "{name}\n{written}");
        }
    }
}

#[test]
fn checks_between_objects_name_both_places() {
    let read = |file: &str, text: &str| {
        let parsed = parse(file, text.as_bytes());
        assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
        parsed.objects
    };
    let pod = |name: &str, rest: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  containers:\n  - name: c\n    image: x\n{rest}"
        )
    };
    let mut objects = read("a.yaml", &pod("a", "    ports: [{containerPort: 80, hostPort: 80}]\n"));
    objects.extend(read("b.yaml", &pod("b", "    ports: [{containerPort: 81, hostPort: 80}, {containerPort: 9, hostPort: 80, protocol: UDP}]\n")));
    objects.extend(read("c.yaml", &pod("a", "")));
    objects.extend(read("d.yaml", &pod("d", "    envFrom: [{configMapRef: {name: conf}}, {configMapRef: {name: gone, optional: true}}]\n    env: [{name: A, valueFrom: {secretKeyRef: {name: s, key: tokem}}}]\n")));
    objects.extend(read("e.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: confs}\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {token: x}\n"));
    let found: Vec<String> = crate::check(&objects)
        .iter()
        .map(|d| {
            let related =
                d.related.as_ref().map(|r| format!(" | {} {}:{}:{}", r.message, r.file, r.line, r.column));
            let help = d.help.as_ref().map(|h| format!(" | {h}"));
            format!("{}{}{}", d.one_line(), related.unwrap_or_default(), help.unwrap_or_default())
        })
        .collect();
    assert_eq!(
        found,
        [
            "b.yaml:8:43: error: host port 80/TCP is already taken by Pod default/a (spec.containers[0].ports[0].hostPort) | taken here a.yaml:8:43 | choose another hostPort",
            "c.yaml:3:18: error: Pod default/a is declared twice (metadata.name) | first declared here a.yaml:3:18 | give one of them another name or namespace, or delete it",
            "d.yaml:8:37: warning: ConfigMap default/conf is not declared; the pod waits until it is (spec.containers[0].envFrom[0].configMapRef.name) | did you mean \"confs\"?",
            "d.yaml:9:54: warning: Secret default/s has no key \"tokem\"; the pod waits until it has (spec.containers[0].env[0].valueFrom.secretKeyRef.name) | declared here e.yaml:7:18 | did you mean \"token\"?",
        ]
    );
}

#[test]
fn own_annotations_are_checked_against_the_pod() {
    let check = |annotation: &str, expected: &str| {
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, annotations: {{{annotation}}}}}\nspec:\n  containers:\n  \
             - {{name: web, image: x, ports: [{{name: http, containerPort: 1}}, {{name: s, containerPort: 2, protocol: SCTP}}]}}\n  \
             - {{name: db, image: x, startupProbe: {{tcpSocket: {{port: 1}}}}, ports: [{{name: sql, containerPort: 3}}]}}\n"
        );
        let found = parse("f.yaml", text.as_bytes()).diagnostics;
        let found: Vec<String> = found
            .iter()
            .map(|d| d.one_line() + &d.help.as_ref().map(|help| format!(" | {help}")).unwrap_or_default())
            .collect();
        assert_eq!(found.join("\n"), expected, "{annotation}");
    };
    check("evenkeel.dev/held-ports: 'http, sql', evenkeel.dev/notify: web", "");
    check("evenkeel.dev/declared-in: x", "");
    check(
        "evenkeel.dev/held-ports: htp",
        "f.yaml:3:60: error: no container has a port named \"htp\" (metadata.annotations[\"evenkeel.dev/held-ports\"]) | did you mean \"http\"?",
    );
    check(
        "evenkeel.dev/held-ports: s",
        "f.yaml:3:60: error: the port \"s\" is SCTP; TCP and UDP sockets can be held (metadata.annotations[\"evenkeel.dev/held-ports\"])",
    );
    check(
        "evenkeel.dev/notify: db",
        "f.yaml:3:56: error: container \"db\" has a startupProbe (metadata.annotations[\"evenkeel.dev/notify\"]) | one of them says when it has started: remove the other",
    );
    check(
        "evenkeel.dev/notify: wib",
        "f.yaml:3:56: error: the pod has no container \"wib\" (metadata.annotations[\"evenkeel.dev/notify\"]) | did you mean \"web\"?",
    );
    check(
        "evenkeel.dev/held-port: http",
        "f.yaml:3:35: error: unknown annotation \"evenkeel.dev/held-port\" (metadata.annotations[\"evenkeel.dev/held-port\"]) | did you mean \"evenkeel.dev/held-ports\"?",
    );
}

/// Longest that reading one hostile file may take. Unoptimised builds on a busy machine are slow; what this guards
/// against takes minutes.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

fn reads_in_time(what: &str, text: &[u8]) -> Parsed {
    let start = std::time::Instant::now();
    let parsed = parse("f.yaml", text);
    assert!(start.elapsed() < PATIENCE, "{what} took {:?}", start.elapsed());
    parsed
}

#[test]
fn hostile_files_are_answered_in_time() {
    let head = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n";
    let many = |piece: &str| piece.repeat((crate::MAX_FILE_BYTES - 200) / piece.len());
    let bomb: String = (1..40)
        .map(|i| {
            format!(
                "  k{i}: &k{i} {{{}}}\n",
                (0..9).map(|j| format!("j{j}: *k{}, ", i - 1)).collect::<String>()
            )
        })
        .collect();
    let merges: String = (1..2000).map(|i| format!("  k{i}: &k{i} {{<<: *k{}, j{i}: x}}\n", i - 1)).collect();
    let numbered = |f: &dyn Fn(usize) -> String| (0..60_000).map(f).collect::<String>();
    let files = [
        ("deep lists", many("[")),
        ("deep maps", many("{a: ")),
        ("deep blocks", (0..1000).map(|i| format!("{}a:\n", " ".repeat(i))).collect()),
        ("deep dashes", many("- ")),
        ("question marks", many("? ")),
        ("anchors", many("&a ")),
        ("aliases", format!("{head}  a: &a x\n  b: [{}]\n", many("*a,"))),
        ("tags", many("!a ")),
        ("colons", many(": ")),
        ("one quote", format!("{head}  a: \"{}", many("x "))),
        ("escapes", format!("{head}  a: \"{}\"", many("\\n"))),
        ("one line", format!("{head}  a: {}", many("x"))),
        ("comments", many("#\n")),
        ("documents", many("---\n")),
        ("small documents", many("---\na\n")),
        ("broken documents", many("---\n[\n")),
        ("directives", many("%YAML 1.2\n")),
        ("empty keys", many("? \n: \n")),
        ("commas", format!("[{}]", many("a,"))),
        ("flow pairs", format!("[{}]", many("a: b,"))),
        ("distinct keys", head.to_owned() + &numbered(&|i| format!("  k{i}: v\n"))),
        ("same keys", head.to_owned() + &numbered(&|_| "  k: v\n".into())),
        ("distinct anchors", head.to_owned() + &numbered(&|i| format!("  k{i}: &a{i} v\n"))),
        ("bomb", format!("{head}  k0: &k0 x\n{bomb}")),
        ("merges", format!("{head}  k0: &k0 {{a: b}}\n{merges}")),
        ("folded", format!("{head}  a: >\n{}", many("    x\n"))),
        ("literal", format!("{head}  a: |\n{}", many("    x\n"))),
        ("plain lines", format!("{head}  a: x\n{}", many("    x\n"))),
        ("tabs", many("\t")),
        ("zero bytes", many("\0")),
    ];
    for (what, text) in files {
        let start = std::time::Instant::now();
        reads_in_time(what, &text.as_bytes()[..text.len().min(crate::MAX_FILE_BYTES)]);
        println!("{what}: {:?}", start.elapsed());
    }
}

/// A small generator, so that the crate needs no other for its tests.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}

/// Cuts, doubles, swaps and overwrites; reading must answer, in time, with places inside the text.
#[test]
fn damaged_manifests_never_break_the_reader() {
    let good: Vec<&str> = cases().into_iter().map(|c| c.1).collect();
    let pieces = [
        "\n", "  ", "- ", ": ", "{", "}", "[", "]", "\"", "'", "&a ", "*a", "<<: ", "|\n", "\t", "\0", "é",
        "---\n", "!x ",
    ];
    let rounds: u64 = std::env::var("KEEL_FUZZ_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(3000);
    for seed in 1..=rounds {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut text = good[random.below(good.len())].as_bytes().to_vec();
        for _ in 0..=random.below(4) {
            let at = random.below(text.len());
            match random.below(5) {
                0 => text.truncate(at),
                1 => {
                    let piece = pieces[random.below(pieces.len())].as_bytes();
                    text.splice(at..at, piece.iter().copied());
                }
                2 if at < text.len() => text[at] = u8::try_from(random.below(256)).unwrap(),
                3 => {
                    let end = (at + random.below(40)).min(text.len());
                    let part = text[at..end].to_vec();
                    let to = random.below(text.len());
                    text.splice(to..to, part);
                }
                _ => {
                    let end = (at + random.below(20)).min(text.len());
                    text.drain(at..end);
                }
            }
        }
        let parsed = reads_in_time(&format!("seed {seed}"), &text);
        let lines = text.split(|b| *b == b'\n').count();
        for d in &parsed.diagnostics {
            assert!(d.line as usize <= lines, "seed {seed}: {}", d.one_line());
            assert!(!d.render(true).is_empty());
            // The walk reports every value that the model would not take.
            assert!(!d.message.starts_with("cannot be read"), "seed {seed}: {}", d.one_line());
        }
        assert_eq!(parsed, parse("f.yaml", &text), "seed {seed}: two readings differ");
        check_and_write(&parsed);
    }
}

fn check_and_write(parsed: &Parsed) {
    let _ = crate::check(&parsed.objects);
    for object in &parsed.objects {
        assert!(!crate::to_yaml(&object.to_json()).is_empty());
    }
}

#[test]
fn every_example_reads_without_a_word_and_agrees_with_the_others() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/manifests");
    let mut dirs = vec![root];
    let mut objects = Vec::new();
    let mut files = 0;
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            let parsed = parse(path.to_str().unwrap(), &std::fs::read(&path).unwrap());
            let shown: String = parsed.diagnostics.iter().map(|d| d.render(false)).collect();
            assert!(parsed.diagnostics.is_empty(), "{shown}");
            objects.extend(parsed.objects);
            files += 1;
        }
    }
    assert!(files >= 6, "{files} files");
    let shown: String = crate::check(&objects).iter().map(|d| d.render(false)).collect();
    assert!(shown.is_empty(), "{shown}");
}
