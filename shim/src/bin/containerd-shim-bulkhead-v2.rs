//! The shim binary that containerd runs.

fn main() {}
