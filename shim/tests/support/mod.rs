//! What tests of the driver need around it.

pub mod agent;
pub mod world;
