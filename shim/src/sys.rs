//! The only place of the shim with `unsafe`: system calls that no crate wraps.
