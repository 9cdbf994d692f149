//! Numbers of the engine, with their reasons.

/// Bounds and intervals. All have defaults that suit a host of any size.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub plan: keel_plan::Settings,
    /// Actions at a time, pulls and stops not counted: enough to hide latency, few enough not to thrash a small host.
    pub max_actions: usize,
    /// Pulls at a time, whatever the registries: each costs a thread and some memory.
    pub max_pulls: usize,
    /// Pulls at a time from one registry; each of them fetches several layers at once. A slow registry holds up only
    /// its own images.
    pub max_pulls_per_registry: usize,
    /// Stops at a time: a stop mostly waits for its grace period.
    pub max_stops: usize,
    /// Probe tries at a time.
    pub max_probes: usize,
    /// The host is read again after this time even when nothing told of a change: hints can be lost.
    pub observe_every_ms: u64,
    /// First wait after a failed action; doubles up to the slowest rate.
    pub retry_initial_ms: u64,
    pub retry_max_ms: u64,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            plan: keel_plan::Settings::default(),
            max_actions: 8,
            max_pulls: 24,
            max_pulls_per_registry: 3,
            max_stops: 64,
            max_probes: 32,
            observe_every_ms: 20_000,
            retry_initial_ms: 10_000,
            retry_max_ms: 300_000,
        }
    }
}
