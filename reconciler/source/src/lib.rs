//! A directory as whole snapshots of manifest files.
//!
//! Never: half a directory, half a file, or "empty" for "could not look". An event only says that looking may be
//! worth it; what counts is the listing that follows. Contents are bytes here: reading them is `keel-manifest`'s.

mod keep;
mod list;
mod names;
#[cfg(test)]
mod tests;
mod watch;

pub use keep::{Keep, KeepError, Kept};
pub use list::{Condition, FileState, ListError, Options, Snapshot, list};
pub use names::is_manifest_name;
pub use watch::{Mode, Watcher};
