//! A model world that drives the engine under faults. Development only.
