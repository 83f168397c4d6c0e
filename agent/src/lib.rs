//! The agent of a Bulkhead guest.
