//! A directory as whole snapshots of manifest files.
