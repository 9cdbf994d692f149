//! Which ids of the host a pod has that has users of its own (`hostUsers: false`). Chosen once for a pod and kept in its
//! record, so two pods never have one in common.

use std::collections::BTreeSet;

use keel_plan::PodId;
use sha2::{Digest, Sha256};

use crate::error::HostError;
use crate::paths::Paths;
use crate::records::PodRecord;
use crate::state::{names, read_json};

/// All that a program can name with 16 bits, as the kubelet gives.
pub(crate) const RANGE: u32 = 1 << 16;
/// Above what systemd, login managers and `/etc/subuid` give away by default, below the ids that are negative in 32 bits.
const FIRST: u32 = 0x7000_0000;
const RANGES: u32 = (0x7fff_0000 - FIRST) / RANGE;

/// A range that no other pod of the host's record has: by the pod's name, so that it is mostly the same again, else the
/// next free one. Whoever calls holds the lock for choosing.
pub(crate) fn choose(paths: &Paths, pod: &PodId) -> Result<u32, HostError> {
    let mut taken = BTreeSet::new();
    for id in names(&paths.pods())?.into_iter().map(PodId).filter(|id| id != pod) {
        taken.extend(read_json::<PodRecord>(&paths.pod_record(&id))?.and_then(|record| record.first_id));
    }
    let name = [paths.tag(), &pod.0].join("/");
    free(&taken, &name).ok_or_else(|| HostError::NoIds(pod.to_string()))
}

fn free(taken: &BTreeSet<u32>, name: &str) -> Option<u32> {
    let hash = Sha256::digest(name);
    let start = u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]]) % RANGES;
    let range = |n: u32| FIRST + (start + n) % RANGES * RANGE;
    (0..RANGES).map(range).find(|first| !taken.contains(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_never_meet_and_a_name_has_the_same_one_again() {
        let mut taken = BTreeSet::new();
        for n in 0..RANGES {
            let first = free(&taken, &format!("pod-{n}")).unwrap();
            assert_eq!(first % RANGE, 0);
            assert!(
                first >= FIRST && first.checked_add(RANGE - 1).is_some_and(|last| last < i32::MAX as u32)
            );
            assert!(taken.insert(first));
        }
        assert_eq!(free(&taken, "one more"), None);
        let own = free(&BTreeSet::new(), "pod-7").unwrap();
        taken.remove(&own);
        assert_eq!(free(&taken, "pod-7"), Some(own));
    }
}
