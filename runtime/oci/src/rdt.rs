//! `linux.intelRdt`: a class of service of the resctrl file system, and a monitoring group in it.

use crate::error::{RuntimeError, io_error};
use crate::lower::{SpecError, invalid};
use crate::spec::IntelRdt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What is to be done below the resctrl mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rdt {
    /// Directory below the mount; empty is the default class.
    pub class: String,
    /// Lines for `schemata`, in this order.
    pub lines: Vec<String>,
    /// The class must have been configured by somebody else.
    pub must_exist: bool,
    /// The class is the container's own and goes with it.
    pub own: bool,
    /// Name of the monitoring group.
    pub monitor: Option<String>,
}

pub(crate) fn lower_rdt(rdt: &IntelRdt, id: &str) -> Result<Rdt, SpecError> {
    let field = |name: &str| format!("linux.intelRdt.{name}");
    let class = match rdt.clos_id.as_deref().filter(|c| !c.is_empty()) {
        None => id.to_owned(),
        Some("/") => String::new(),
        Some(name)
            if name.contains(['/', '\n'])
                || matches!(name, "." | ".." | "info" | "mon_groups" | "mon_data") =>
        {
            return Err(invalid(field("closID"), format!("{name:?} is not a directory name for a class")));
        }
        Some(name) => name.to_owned(),
    };
    let mut lines = Vec::new();
    for (name, value, start) in
        [("l3CacheSchema", &rdt.l3_cache_schema, "L3"), ("memBwSchema", &rdt.mem_bw_schema, "MB:")]
    {
        if value.is_empty() {
            continue;
        }
        if value.contains('\n') || !value.starts_with(start) {
            return Err(invalid(field(name), format!("{value:?} is not one line that begins with {start}")));
        }
        lines.push(value.clone());
    }
    for (i, line) in rdt.schemata.iter().enumerate() {
        if line.contains('\n') || !line.contains(':') {
            return Err(invalid(
                field(&format!("schemata[{i}]")),
                format!("{line:?} is not one line RESOURCE:ID=MASK"),
            ));
        }
        lines.push(line.clone());
    }
    let given = rdt.clos_id.as_deref().is_some_and(|c| !c.is_empty());
    // Both older words ask for measurement; the hardware cannot enable one of them alone.
    let monitor = rdt.enable_monitoring || rdt.enable_cmt || rdt.enable_mbm;
    Ok(Rdt {
        class,
        must_exist: given && lines.is_empty(),
        own: !given,
        lines,
        monitor: monitor.then(|| id.to_owned()),
    })
}

/// The mount point of the resctrl file system.
pub(crate) fn find_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, fs) = line.split_once(" - ")?;
        fs.starts_with("resctrl ").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// Directories that were made for one container, in the order of their removal.
pub(crate) type Made = Vec<PathBuf>;

/// Puts the process into its class and group. What was made is told also when a later step fails.
pub(crate) fn apply(rdt: &Rdt, mount: &Path, pid: i32, made: &mut Made) -> Result<(), RuntimeError> {
    let class = if rdt.class.is_empty() { mount.to_owned() } else { mount.join(&rdt.class) };
    let existed = class.is_dir();
    if !existed {
        if rdt.must_exist {
            return Err(io_error("open the class of service", &class)(io::ErrorKind::NotFound.into()));
        }
        fs::create_dir(&class).map_err(io_error("create the class of service", &class))?;
        if rdt.own {
            made.push(class.clone());
        }
    }
    let schemata = class.join("schemata");
    if existed && !rdt.own && !rdt.lines.is_empty() {
        let present = fs::read_to_string(&schemata).map_err(io_error("read", &schemata))?;
        let same = |line: &String| present.lines().any(|p| normal(p) == normal(line));
        if let Some(line) = rdt.lines.iter().find(|l| !same(l)) {
            return Err(RuntimeError::Usage(format!(
                "linux.intelRdt: class {:?} exists and its schemata has no line {line:?}",
                rdt.class
            )));
        }
    } else if !rdt.lines.is_empty() {
        let text: String = rdt.lines.iter().map(|l| format!("{l}\n")).collect();
        fs::write(&schemata, text).map_err(io_error("write", &schemata))?;
    }
    let mut place = class;
    if let Some(name) = &rdt.monitor {
        place = place.join("mon_groups").join(name);
        fs::create_dir(&place).map_err(io_error("create the monitoring group", &place))?;
        made.insert(0, place.clone());
    }
    let tasks = place.join("tasks");
    fs::write(&tasks, pid.to_string()).map_err(io_error("write the process to", &tasks))
}

/// Spaces and leading zeros of a mask are the kernel's choice of form: `L3:0=00f` is `L3:0=f`.
fn normal(line: &str) -> String {
    let Some((resource, rest)) = line.trim().split_once(':') else { return line.trim().to_owned() };
    let mut cells: Vec<String> = rest
        .split(';')
        .filter_map(|cell| cell.trim().split_once('='))
        .map(|(id, mask)| format!("{}={}", id.trim(), mask.trim().trim_start_matches('0')))
        .collect();
    cells.sort();
    format!("{}:{}", resource.trim(), cells.join(";"))
}

pub(crate) fn remove(made: &[PathBuf]) -> Result<(), RuntimeError> {
    for dir in made {
        match fs::remove_dir(dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", dir)(e)),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rdt(value: &str) -> Result<Rdt, String> {
        lower_rdt(&serde_json::from_str(value).unwrap(), "c").map_err(|e| e.to_string())
    }

    #[test]
    fn the_class_is_the_containers_unless_one_is_named() {
        let own =
            rdt(r#"{"l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=20", "schemata": ["L2:0=1"]}"#).unwrap();
        assert_eq!(own.lines, ["L3:0=f", "MB:0=20", "L2:0=1"]);
        assert!(own.own && !own.must_exist && own.class == "c" && own.monitor.is_none());
        let named = rdt(r#"{"closID": "gold", "enableMonitoring": true}"#).unwrap();
        assert!(!named.own && named.must_exist && named.monitor.as_deref() == Some("c"));
        assert_eq!(rdt(r#"{"closID": "/"}"#).unwrap().class, "");
    }

    #[test]
    fn words_that_are_no_lines_or_names_are_refused() {
        for bad in [
            r#"{"closID": "../x"}"#,
            r#"{"closID": "info"}"#,
            r#"{"memBwSchema": "L3:0=f"}"#,
            r#"{"l3CacheSchema": "L3:0=f\nMB:0=1"}"#,
            r#"{"schemata": ["L3:0=f\nL2:0=1"]}"#,
        ] {
            let error = rdt(bad).unwrap_err();
            assert!(error.starts_with("linux.intelRdt."), "{bad}: {error}");
        }
    }

    #[test]
    fn the_mount_is_found_in_the_table() {
        let table =
            "25 1 0:22 / /proc rw - proc proc rw\n40 30 0:40 / /sys/fs/resctrl rw - resctrl resctrl rw\n";
        assert_eq!(find_mount(table), Some(PathBuf::from("/sys/fs/resctrl")));
        assert_eq!(find_mount("25 1 0:22 / /proc rw - proc proc rw\n"), None);
    }

    /// The files of resctrl are plain to write; what only its kernel part can do is not claimed here.
    #[test]
    fn a_process_goes_into_its_class_and_what_was_made_goes_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut made = Made::new();
        let mut plan = rdt(r#"{"l3CacheSchema": "L3:0=f"}"#).unwrap();
        apply(&plan, dir.path(), 42, &mut made).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("c/schemata")).unwrap(), "L3:0=f\n");
        assert_eq!(fs::read_to_string(dir.path().join("c/tasks")).unwrap(), "42");
        assert_eq!(made, [dir.path().join("c")]);
        // A class of somebody else: compared, never written, never removed.
        plan.own = false;
        plan.lines = vec!["L3: 0=00f".to_owned()];
        apply(&plan, dir.path(), 43, &mut Made::new()).unwrap();
        plan.lines = vec!["L3:0=1".to_owned()];
        assert!(apply(&plan, dir.path(), 43, &mut Made::new()).is_err());
        plan.must_exist = true;
        plan.class = "absent".to_owned();
        let error = apply(&plan, dir.path(), 43, &mut Made::new()).unwrap_err();
        assert!(error.chain().contains("absent"), "{}", error.chain());
        for name in ["schemata", "tasks"] {
            fs::remove_file(dir.path().join("c").join(name)).unwrap();
        }
        remove(&made).unwrap();
        assert!(!dir.path().join("c").exists());
    }
}
