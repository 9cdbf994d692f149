//! cgroup v1, v2 and hybrid: create, limit, read and remove.
