//! Facts about the host, read once per command.

use crate::error::{RuntimeError, sys_error};
use crate::lower::HostFacts;
use keel_cgroup::{Layout, Roots};
use keel_sys::{cred, process};
use std::fs;

pub fn observe(roots: &Roots) -> Result<HostFacts, RuntimeError> {
    let own = cred::capget().map_err(sys_error("read the capabilities"))?;
    let mut bounding = 0u64;
    let mut last = 0;
    for cap in 0..63 {
        match cred::bounding_has(cap) {
            Ok(has) => {
                bounding |= u64::from(has) << cap;
                last = cap;
            }
            Err(_) => break,
        }
    }
    let euid = process::geteuid();
    // An ordinary user is root of the user namespace to come, with all that the bounding set lets through.
    let capabilities = if euid == 0 { own.permitted & bounding } else { bounding };
    Ok(HostFacts {
        layout: Layout::detect(roots)?,
        capabilities,
        last_capability: last,
        euid,
        apparmor: fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|t| t.starts_with(b"Y")),
        selinux: fs::metadata("/sys/fs/selinux/enforce").is_ok(),
        resctrl: None,
    })
}
