//! Reads the world back: records of this boot, processes, exit records.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use keel_plan::{ContainerId, ContainerState, Exit, Millis, ObservedContainer, ObservedPod, PodId, PodKey};

use crate::paths::Paths;
use crate::podinit;
use crate::records::{ContainerRecord, PodRecord};
use crate::state::{At, Keep, PathError, names, read_json, write_file};

/// A process that may not be the one that once had this number: the start time tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessMark {
    pub(crate) pid: u32,
    /// Field 22 of `/proc/<pid>/stat` (proc_pid_stat(5)), clock ticks since boot.
    pub(crate) start_time: u64,
}

/// A container whose monitor is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Orphan {
    pub(crate) id: ContainerId,
    pub(crate) pod: PodId,
    pub(crate) name: String,
    pub(crate) attempt: u32,
}

/// Everything about pods and containers, and the orphans among them. A run that has ended without a monitor is one too if
/// it `can_recover`: it counts as running until it is known how it ended.
pub(crate) fn pods(
    paths: &Paths,
    can_recover: impl Fn(&ContainerId) -> bool,
) -> Result<(BTreeMap<PodKey, ObservedPod>, Vec<Orphan>), PathError> {
    let mut pods = BTreeMap::new();
    for id in names(&paths.pods())? {
        let id = PodId(id);
        if let Some(record) = read_json::<PodRecord>(&paths.pod_record(&id))? {
            pods.insert(
                record.pod.key.clone(),
                ObservedPod {
                    incarnation: record.incarnation,
                    created_at: record.created_at,
                    ready: record.ready && pod_is_whole(paths, &record),
                    ip: record.ip,
                    containers: Vec::new(),
                    over_limit: None,
                    pod: record.pod,
                },
            );
        }
    }
    let mut orphans = Vec::new();
    for id in names(&paths.containers())? {
        let id = ContainerId(id);
        let Some(record) = read_json::<ContainerRecord>(&paths.container_record(&id))? else { continue };
        let (mut state, mut orphaned) = container_state(paths, &id, record.created_at)?;
        if matches!(state, ContainerState::Lost { .. })
            && !paths.exit_record(&id).exists()
            && can_recover(&id)
        {
            (state, orphaned) = (starting(record.created_at), true);
        }
        if orphaned {
            orphans.push(Orphan {
                id: id.clone(),
                pod: record.pod_id.clone(),
                name: record.name.0.clone(),
                attempt: record.attempt,
            });
        }
        if let Some(pod) = pods.get_mut(&record.pod) {
            pod.containers.push(ObservedContainer {
                id,
                name: record.name,
                role: record.role,
                hash: record.hash,
                attempt: record.attempt,
                state,
                image_digest: record.image_digest,
                stand_in: record.stand_in,
            });
        }
    }
    for pod in pods.values_mut() {
        pod.containers.sort_by(|a, b| (a.role, &a.name, a.attempt).cmp(&(b.role, &b.name, b.attempt)));
    }
    Ok((pods, orphans))
}

/// State of one container, and whether it runs without a monitor.
///
/// The exit record decides first: the shim writes it before it goes. Without one, a live process means running, a live
/// shim means that the record is about to come, and neither means that nobody knows.
pub(crate) fn container_state(
    paths: &Paths,
    id: &ContainerId,
    created_at: Millis,
) -> Result<(ContainerState, bool), PathError> {
    if let Some(exit) = read_exit(&paths.exit_record(id))? {
        return Ok((exit, false));
    }
    let dir = paths.container(id);
    let shim_lives = read_mark(&dir.join("shim.pid"))?.is_some_and(is_alive);
    let Some(process) = read_mark(&dir.join("pid"))? else {
        return Ok((if shim_lives { starting(created_at) } else { ContainerState::Partial }, false));
    };
    let running = ContainerState::Running { pid: process.pid, started_at: created_at };
    if is_alive(process) {
        return Ok((running, !shim_lives));
    }
    if shim_lives {
        return Ok((running, false));
    }
    // The record may have been written between the two reads.
    match read_exit(&paths.exit_record(id))? {
        Some(exit) => Ok((exit, false)),
        None => Ok((ContainerState::Lost { noticed_at: now() }, false)),
    }
}

/// The shim is between its first and its last step of a start, or is about to be replaced after the end.
fn starting(created_at: Millis) -> ContainerState {
    ContainerState::Running { pid: 0, started_at: created_at }
}

fn read_exit(path: &Path) -> Result<Option<ContainerState>, PathError> {
    let text = match fs::read(path) {
        // Damaged bytes are damage like any other.
        Ok(text) => String::from_utf8_lossy(&text).into_owned(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).at("read", path),
    };
    let Ok(record) = keel_proto::ExitRecord::parse(&text) else {
        let aside = path.with_extension("broken");
        let (from, to) = (path.display(), aside.display());
        tracing::warn!(path = %from, aside = %to, "exit record does not parse; the end of this container is unknown");
        // Said once; and where it cannot be moved, again the next time.
        let _ = fs::rename(path, &aside);
        return Ok(Some(ContainerState::Lost { noticed_at: now() }));
    };
    if record.lost {
        return Ok(Some(ContainerState::Lost { noticed_at: record.finished_at_ms }));
    }
    Ok(Some(ContainerState::Exited(Exit {
        code: record.code,
        signal: record.signal,
        oom: record.oom,
        started_at: record.started_at_ms,
        finished_at: record.finished_at_ms,
    })))
}

/// `"<pid> <start time>"`.
pub(crate) fn read_mark(path: &Path) -> Result<Option<ProcessMark>, PathError> {
    let text = match fs::read(path) {
        // Damaged bytes are damage like any other.
        Ok(text) => String::from_utf8_lossy(&text).into_owned(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).at("read", path),
    };
    let mut words = text.split_whitespace();
    let mark =
        || Some(ProcessMark { pid: words.next()?.parse().ok()?, start_time: words.next()?.parse().ok()? });
    let mut mark = mark;
    Ok(mark())
}

/// A zombie counts as dead: it runs nothing any more.
pub(crate) fn is_alive(mark: ProcessMark) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", mark.pid)) else { return false };
    // The command name may hold spaces and parentheses: fields count from behind the last one.
    let Some((_, rest)) = stat.rsplit_once(") ") else { return false };
    let mut fields = rest.split(' ');
    let state = fields.next().unwrap_or("X");
    let start_time = fields.nth(18).and_then(|text| text.parse::<u64>().ok());
    !matches!(state, "Z" | "X") && start_time == Some(mark.start_time)
}

/// What a record says exists must exist: someone may have unmounted a namespace.
fn pod_is_whole(paths: &Paths, record: &PodRecord) -> bool {
    let pinned = paths.pod_namespaces(&record.pod.id);
    let on_network = record.pod.spec.host_network || is_namespace(&pinned.join("net"));
    let has_init = podinit::is_whole(paths, &record.pod);
    let has_users = record.first_id.is_none() || is_namespace(&pinned.join("user"));
    on_network && has_init && has_users && (record.pod.spec.host_ipc || is_namespace(&pinned.join("ipc")))
}

/// A pinned namespace is a file of nsfs; what is left after an unmount is an empty regular file.
pub(crate) fn is_namespace(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
}

/// Keeps what was noticed first: otherwise the end of that run would be a later one with every look. By whoever acts; a
/// reader changes nothing.
pub(crate) fn record_lost(paths: &Paths, id: &ContainerId, noticed_at: Millis) -> Result<(), PathError> {
    let path = paths.exit_record(id);
    if path.exists() {
        return Ok(());
    }
    let record = keel_proto::ExitRecord {
        id: id.0.clone(),
        pid: read_mark(&paths.container(id).join("pid"))?.map_or(0, |mark| mark.pid),
        code: -1,
        lost: true,
        finished_at_ms: noticed_at,
        ..keel_proto::ExitRecord::default()
    };
    write_file(&path, record.to_json().as_bytes(), Keep::Boot)
}

/// Milliseconds since the epoch.
pub fn now() -> Millis {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_pid_is_not_alive() {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let start: u64 = stat.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap().parse().unwrap();
        let pid = std::process::id();
        assert!(is_alive(ProcessMark { pid, start_time: start }));
        assert!(!is_alive(ProcessMark { pid, start_time: start + 1 }));
    }
}
