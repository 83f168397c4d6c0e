//! The guest as the shim reaches it: connections that the guest dials ([`listener`], over a [`transport`]) and the agent
//! behind them ([`client`]).

pub mod client;
pub mod listener;
pub mod transport;
