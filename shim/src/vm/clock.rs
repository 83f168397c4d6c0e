//! The guest's clock under TCG, which hands the host's time stamp counter through to the guest.
//!
//! Left to itself the guest measures that counter against an emulated PIT. On a busy host the measurement fails ("could not
//! calculate TSC khz"), and the guest runs on for ever with a clock that ticks each 4 ms and loses time with each tick that came
//! late; or it succeeds, and the kernel's watchdog calls the counter unstable by the same lost ticks. So the host measures, and
//! the guest is told. Measuring the local APIC's timer waits for 200 ms of ticks at boot, so the PIT (or HPET) serves as the
//! timer; the writes to port 0x80 that real ones need between two accesses would each leave the translated code. Under KVM none
//! of this is needed: kvm-clock and the TSC deadline timer are there.
//! <https://docs.kernel.org/admin-guide/kernel-parameters.html>: `tsc`, `tsc_early_khz`, `no_timer_check`, `nolapic_timer`,
//! `io_delay`.

use std::time::Duration;

use nix::time::ClockId;

use crate::sys;
use crate::vm::accel::Accel;
use crate::vm::config::VmConfig;

/// How long is measured: two readings are taken some 100 ns apart at worst, so the error stays below 50 in a million.
const MEASURED: Duration = Duration::from_millis(5);

/// What a guest under TCG is told about its timers, apart from the frequency.
pub const TCG_PARAMS: &[&str] = &["tsc=reliable", "no_timer_check", "nolapic_timer", "io_delay=none"];

/// `config` with the counter's frequency among the kernel's parameters where the guest cannot measure it. Takes 5 ms then.
pub async fn told(config: &VmConfig) -> VmConfig {
    let mut config = config.clone();
    if config.accel == Accel::Tcg {
        let begin = Reading::take();
        tokio::time::sleep(MEASURED).await;
        let khz = begin.zip(Reading::take()).and_then(|(begin, end)| khz(begin, end));
        config.kernel_params.extend(khz.map(|khz| format!("tsc_early_khz={khz}")));
    }
    config
}

/// Counter and clock at one moment.
#[derive(Debug, Clone, Copy)]
struct Reading {
    counter: u64,
    time: Duration,
}

impl Reading {
    /// The tightest of a few: one that was interrupted between counter and clock spreads wider.
    fn take() -> Option<Self> {
        let one = || {
            let before = sys::time_stamp_counter();
            let time = ClockId::CLOCK_MONOTONIC_RAW.now().ok()?.into();
            let spread = sys::time_stamp_counter().checked_sub(before)?;
            Some((spread, Self { counter: before + spread / 2, time }))
        };
        (0..5).filter_map(|_| one()).min_by_key(|(spread, _)| *spread).map(|(_, reading)| reading)
    }
}

/// Ticks a millisecond; `None` when counter or clock did not go forward, as after a move to another host.
fn khz(begin: Reading, end: Reading) -> Option<u64> {
    let ticks = u128::from(end.counter.checked_sub(begin.counter)?);
    let nanos = end.time.checked_sub(begin.time)?.as_nanos();
    u64::try_from((ticks * 1_000_000).checked_div(nanos)?).ok().filter(|&khz| khz > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(counter: u64, nanos: u64) -> Reading {
        Reading { counter, time: Duration::from_nanos(nanos) }
    }

    #[test]
    fn frequency_is_ticks_a_millisecond() {
        let end = reading(1_000 + 11_500_000, 50 + 5_000_000);
        assert_eq!(khz(reading(1_000, 50), end), Some(2_300_000));
    }

    #[test]
    fn a_clock_or_counter_that_stands_or_goes_back_gives_no_frequency() {
        for end in [reading(2_000, 50), reading(2_000, 40), reading(999, 60), reading(1_000, 60)] {
            assert_eq!(khz(reading(1_000, 50), end), None, "{end:?}");
        }
    }

    #[tokio::test]
    async fn two_measurements_of_this_machine_agree() {
        let measure = async || {
            let begin = Reading::take().expect("the clock reads");
            tokio::time::sleep(MEASURED).await;
            khz(begin, Reading::take().expect("the clock reads")).expect("time passes")
        };
        let (first, second) = (measure().await, measure().await);
        assert!(first.abs_diff(second) < first / 1_000, "{first} and {second} kHz");
    }
}
