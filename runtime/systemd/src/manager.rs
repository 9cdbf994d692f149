//! What is asked of systemd: start a scope, change its properties, stop it.

use crate::Property;
use crate::bus::{BUS, Bus, BusError, Instance, Message, Object};
use crate::unit::{Unit, UnitError};
use std::time::{Duration, Instant};
use zbus::{OwnedObjectPath, OwnedVariant, Variant};

/// How long systemd may take for one request and the job that it makes.
const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Unit(#[from] UnitError),
    #[error("start systemd unit {unit}: the job ended with {result:?}")]
    Job { unit: String, result: String },
}

/// Other units of this name are of no use to `start`.
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";

const MANAGER: Object = object("org.freedesktop.systemd1.Manager");
const PROPERTIES: Object = object("org.freedesktop.DBus.Properties");

const fn object(interface: &'static str) -> Object {
    Object { destination: "org.freedesktop.systemd1", path: "/org/freedesktop/systemd1", interface }
}

/// A conversation with one instance of systemd.
pub struct Manager {
    bus: Bus,
}

impl Manager {
    pub fn connect(instance: Instance, uid: u32) -> Result<Manager, SystemdError> {
        Ok(Manager { bus: Bus::connect(instance, uid, Instant::now() + DEADLINE)? })
    }

    /// The cgroup below which this instance makes its units; empty for the root of the hierarchy.
    pub fn cgroup(&mut self) -> Result<String, SystemdError> {
        Ok(self.property("ControlGroup")?.trim_end_matches('/').to_owned())
    }

    /// The number that systemd's version begins with.
    pub fn version(&mut self) -> Result<u32, SystemdError> {
        let text = self.property("Version")?;
        let digits = text.trim_start_matches('v');
        let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        Ok(digits[..end].parse().unwrap_or(0))
    }

    fn property(&mut self, name: &str) -> Result<String, SystemdError> {
        self.bus.until(Instant::now() + DEADLINE);
        let answer = self.bus.call(&PROPERTIES, "Get", &(MANAGER.interface, name))?;
        match &*answer.body::<OwnedVariant>()? {
            Variant::Str(text) => Ok(text.to_string()),
            other => Err(BusError::Decode(format!("{name} is {other:?}")).into()),
        }
    }

    /// Makes the scope around a process and waits until it stands.
    pub fn start(&mut self, unit: &Unit, pid: u32, more: &[Property]) -> Result<(), SystemdError> {
        self.bus.until(Instant::now() + DEADLINE);
        self.subscribe()?;
        let mut properties: Vec<(&str, Variant<'_>)> = vec![
            ("Description", format!("container {}", unit.name.trim_end_matches(".scope")).into()),
            ("Slice", unit.slice.as_str().into()),
            // Everything below the scope is the runtime's and the container's.
            ("Delegate", true.into()),
            ("PIDs", vec![pid].into()),
            ("MemoryAccounting", true.into()),
            ("CPUAccounting", true.into()),
            ("IOAccounting", true.into()),
            ("TasksAccounting", true.into()),
            // Otherwise the scope would be stopped early in a shutdown, before those who use the container.
            ("DefaultDependencies", false.into()),
        ];
        for (name, value) in more {
            // The caller's word is the later one.
            properties.retain(|(known, _)| known != name);
            properties.push((name, value.try_clone().map_err(|e| BusError::Encode(e.to_string()))?));
        }
        let started = match self.start_transient(unit, &properties) {
            Err(BusError::Answer { name, .. }) if name == UNIT_EXISTS => {
                // What is left of a failed unit of this name; one that runs is not touched, and the answer is the same.
                self.reset_failed(&unit.name);
                self.start_transient(unit, &properties)
            }
            other => other,
        };
        let result = self.job(&started?)?;
        if result != "done" {
            self.reset_failed(&unit.name);
            return Err(SystemdError::Job { unit: unit.name.clone(), result });
        }
        Ok(())
    }

    fn start_transient(
        &mut self,
        unit: &Unit,
        properties: &[(&str, Variant<'_>)],
    ) -> Result<Message, BusError> {
        let auxiliary: [(&str, Vec<(&str, Variant<'_>)>); 0] = [];
        let body = (unit.name.as_str(), "replace", properties, auxiliary.as_slice());
        self.bus.call(&MANAGER, "StartTransientUnit", &body)
    }

    /// Changes a running unit, until it ends.
    pub fn set(&mut self, unit: &str, properties: &[Property]) -> Result<(), SystemdError> {
        self.bus.until(Instant::now() + DEADLINE);
        let list: Vec<(&str, &Variant<'_>)> = properties.iter().map(|(n, v)| (n.as_str(), v)).collect();
        self.bus.call(&MANAGER, "SetUnitProperties", &(unit, true, list))?;
        Ok(())
    }

    /// Moves a process into the unit, at `below` within its cgroup: across the border of what the caller owns only
    /// systemd can.
    pub fn attach(&mut self, unit: &str, below: &str, pid: u32) -> Result<(), SystemdError> {
        self.bus.until(Instant::now() + DEADLINE);
        self.bus.call(&MANAGER, "AttachProcessesToUnit", &(unit, below, vec![pid]))?;
        Ok(())
    }

    /// Ends the unit and waits; one that has gone is no error.
    pub fn stop(&mut self, unit: &str) -> Result<(), SystemdError> {
        self.bus.until(Instant::now() + DEADLINE);
        self.subscribe()?;
        match self.bus.call(&MANAGER, "StopUnit", &(unit, "replace")) {
            Err(BusError::Answer { name, .. }) if name == NO_SUCH_UNIT => return Ok(()),
            answer => {
                self.job(&answer?)?;
            }
        }
        self.reset_failed(unit);
        Ok(())
    }

    /// A failed unit stays in memory, and in the way of its name's next use, until somebody does this.
    fn reset_failed(&mut self, unit: &str) {
        // That it is not there or has not failed is what is wanted.
        let _ = self.bus.call(&MANAGER, "ResetFailedUnit", &(unit,));
    }

    /// Ends of jobs are told to those who ask; on the manager's own socket to everybody.
    fn subscribe(&mut self) -> Result<(), BusError> {
        if !self.bus.shared {
            return Ok(());
        }
        let rule = "type='signal',sender='org.freedesktop.systemd1',\
                    interface='org.freedesktop.systemd1.Manager',member='JobRemoved'";
        self.bus.call(&BUS, "AddMatch", &(rule,))?;
        match self.bus.call(&MANAGER, "Subscribe", &()) {
            // Twice by one client.
            Err(BusError::Answer { name, .. }) if name.ends_with("AlreadySubscribed") => Ok(()),
            other => other.map(drop),
        }
    }

    /// How the job that the answer names ended.
    fn job(&mut self, answer: &Message) -> Result<String, BusError> {
        let job: OwnedObjectPath = answer.body()?;
        loop {
            let signal = self.bus.signal("wait for systemd's job")?;
            if signal.member != "JobRemoved" {
                continue;
            }
            let (_, ended, _, result): (u32, OwnedObjectPath, String, String) = signal.body()?;
            if ended == job {
                return Ok(result);
            }
        }
    }
}
