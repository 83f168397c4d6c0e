//! QEMU's two languages: its command line and QMP. Knows no domain: devices and machines are composed in [`crate::device`] and
//! [`crate::vm`].

pub mod args;
pub mod commands;
pub mod event;
pub mod qmp;
