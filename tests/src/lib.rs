//! Harness for end-to-end tests of Bulkhead.
