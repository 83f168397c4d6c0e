//! The guest's clocks: wall time is the host's, uptime is the guest's own.

use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

use crate::error::{During, Result};

/// A drift below this is left alone after the first setting, so that running programs see no jumps.
const TOLERATED: Duration = Duration::from_millis(200);

/// Microseconds since the guest's kernel started.
pub fn uptime_us() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |now| Duration::from(now).as_micros() as u64)
}

/// Sets the wall clock to the host's time, given in nanoseconds since the Unix epoch; 0 says nothing.
pub fn set_wall_clock(host_unix_ns: u64) -> Result<()> {
    if host_unix_ns == 0 {
        return Ok(());
    }
    let host = Duration::from_nanos(host_unix_ns);
    let guest = clock_gettime(ClockId::CLOCK_REALTIME).map_or(Duration::ZERO, Duration::from);
    if host.abs_diff(guest) < TOLERATED {
        return Ok(());
    }
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(host)).during(|| "set the guest's clock")
}
