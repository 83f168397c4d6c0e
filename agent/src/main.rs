//! PID 1 of a Bulkhead guest.

fn main() {}
