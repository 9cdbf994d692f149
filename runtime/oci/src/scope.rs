//! The systemd cgroup driver's part in a container's life. Nothing here runs without the option.

use crate::error::{RuntimeError, io_error};
use crate::spec::Spec;
use crate::state::SystemdUnit;
use keel_cgroup::{Cgroup, Mode, Resources, Roots, Version};
use keel_sys::process;
use keel_systemd::{Instance, Manager, Property, Unit, annotated, limits};
use std::fs;

/// A scope that is to be made around a container's process.
pub(crate) struct Scope {
    manager: Manager,
    unit: Unit,
    instance: Instance,
    annotated: Vec<Property>,
    /// The unit is there, and it is this container's.
    pub(crate) started: bool,
    /// As [`keel_cgroup::Layout::cgroup`] takes it.
    pub(crate) path: String,
}

impl Scope {
    /// Decides about name and place and finds the manager; nothing is made yet.
    pub(crate) fn prepare(spec: &Spec, id: &str, roots: &Roots) -> Result<Scope, RuntimeError> {
        let instance = instance(roots)?;
        let given = spec.linux.as_ref().and_then(|l| l.cgroups_path.as_deref());
        let unit = Unit::parse(given, id, instance == Instance::User)?;
        let annotated = annotated(spec.annotations.iter())?;
        let mut manager = Manager::connect(instance, process::geteuid())?;
        let path = format!("{}{}", manager.cgroup()?, unit.cgroup()?);
        Ok(Scope { manager, unit, instance, annotated, started: false, path })
    }

    /// What a later command needs to find the unit.
    pub(crate) fn record(&self) -> SystemdUnit {
        SystemdUnit { unit: self.unit.name.clone(), user: self.instance == Instance::User }
    }

    /// Makes the scope around the process, its cgroup in the hierarchies that systemd does not drive, and the limits.
    pub(crate) fn start(
        &mut self,
        cgroup: &Cgroup,
        pid: i32,
        mut resources: Resources,
        roots: &Roots,
    ) -> Result<(), RuntimeError> {
        let user = self.instance == Instance::User;
        if user {
            // Also for root of a user namespace, who looks like root to the lowering.
            resources.devices.clear();
        }
        let version = self.manager.version()?;
        let mut properties = limits(&mut resources, cgroup.mode, version, &devices(roots)?)?;
        properties.extend(self.annotated.iter().filter_map(|(n, v)| Some((n.clone(), v.try_clone().ok()?))));
        self.manager.start(&self.unit, pid as u32, &properties)?;
        self.started = true;
        if user && cgroup.mode != Mode::V2 {
            // On v1 no controller is given to users.
            return Ok(());
        }
        cgroup.create()?;
        if cgroup.mode != Mode::V2 {
            cgroup.add(pid)?;
        }
        Ok(cgroup.apply(&resources)?)
    }
}

/// Whose manager has to do it. Root of a user namespace is an ordinary user outside.
fn instance(roots: &Roots) -> Result<Instance, RuntimeError> {
    let path = roots.proc.join("self/uid_map");
    let map = fs::read_to_string(&path).map_err(io_error("read", &path))?;
    let whole = map.split_whitespace().eq(["0", "0", "4294967295"]);
    Ok(if whole && process::geteuid() == 0 { Instance::System } else { Instance::User })
}

fn devices(roots: &Roots) -> Result<String, RuntimeError> {
    let path = roots.proc.join("devices");
    fs::read_to_string(&path).map_err(io_error("read", &path))
}

/// Hierarchies in which the instance makes the unit's cgroup or lets us make it.
pub(crate) fn reachable(cgroup: &mut Cgroup, unit: &SystemdUnit) {
    if unit.user && cgroup.mode != Mode::V2 {
        cgroup
            .entries
            .retain(|e| e.version == Version::V2 || e.controllers.iter().any(|c| c == "name=systemd"));
    }
}

fn connect(unit: &SystemdUnit) -> Result<Manager, RuntimeError> {
    let instance = if unit.user { Instance::User } else { Instance::System };
    Ok(Manager::connect(instance, process::geteuid())?)
}

/// Tells systemd new limits; in `resources` is then what the files must get.
pub(crate) fn update(
    unit: &SystemdUnit,
    mode: Mode,
    resources: &mut Resources,
    roots: &Roots,
) -> Result<(), RuntimeError> {
    let mut manager = connect(unit)?;
    let version = manager.version()?;
    let mut properties = limits(resources, mode, version, &devices(roots)?)?;
    // Only at a scope's start does systemd take this one.
    properties.retain(|(name, _)| name != "OOMPolicy");
    if !properties.is_empty() {
        manager.set(&unit.unit, &properties)?;
    }
    Ok(())
}

/// Moves a further process in.
pub(crate) fn attach(unit: &SystemdUnit, below: &str, pid: i32) -> Result<(), RuntimeError> {
    Ok(connect(unit)?.attach(&unit.unit, below, pid as u32)?)
}

/// Ends the scope. The container goes whether or not systemd can be asked; what stays is told.
pub(crate) fn stop(unit: Option<&SystemdUnit>, warn: &dyn Fn(&str)) {
    let Some(unit) = unit else { return };
    if let Err(e) = connect(unit).and_then(|mut manager| Ok(manager.stop(&unit.unit)?)) {
        warn(&format!("stop systemd unit {}: {}", unit.unit, e.chain()));
    }
}
