//! The allocator of the C library, for processes that stay.

/// Lets all threads share a few arenas of the heap (`mallopt(3)`, `M_ARENA_MAX`). By default glibc gives each of up to
/// eight threads per processor one of its own, and what they free in a burst stays with them. To be called before the
/// first thread starts; false when the library refuses.
pub fn limit_arenas(count: i32) -> bool {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: plain numbers.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, count) == 1 }
    }
    #[cfg(not(target_env = "gnu"))]
    {
        let _ = count;
        false
    }
}
