//! The seed of "random" moments and places: another one in each run, printed, and given back to repeat the run.
//!
//! ```
//! let seed = testkit::seed::seed();
//! # assert!(seed < 1 << 32);
//! ```
//!
//! It is printed to standard error, which `cargo test` shows of a test that fails:
//! `SEED the_test: 2718281828 (FASTLOAD_SEED=2718281828 repeats it)`. Threads and the kernel still do as they like:
//! a seed brings back what a test chose, not what happened.

use std::time::{SystemTime, UNIX_EPOCH};

/// The environment variable that says which seed to take, as a decimal number below 2^32.
pub const VARIABLE: &str = "FASTLOAD_SEED";

/// The seed of the test that calls it: what [`VARIABLE`] says, or else the clock's. Below 2^32, so that a test can count
/// on from it.
///
/// # Panics
/// If the variable holds something else than such a number.
#[must_use]
pub fn seed() -> u64 {
    let given = std::env::var_os(VARIABLE).map(|value| value.to_string_lossy().into_owned());
    let seed = choose(given.as_deref());
    let thread = std::thread::current();
    eprintln!("SEED {}: {seed} ({VARIABLE}={seed} repeats it)", thread.name().unwrap_or("(unnamed thread)"));
    u64::from(seed)
}

/// The environment variable that says how slow the machine is, by a factor: of repetitions that differ in their seed only,
/// one in that many is enough there. For kernels in QEMU without KVM.
pub const SLOW: &str = "FASTLOAD_SLOW";
/// The repetitions that no machine is too slow for: tests choose what has to occur in every run by their number.
const LEAST: u64 = 8;

/// How many of `count` repetitions are made on this machine: all, unless [`SLOW`] says otherwise.
///
/// # Panics
/// If the variable holds something else than a number.
#[must_use]
pub fn fewer(count: u64) -> u64 {
    let given = std::env::var_os(SLOW).map(|value| value.to_string_lossy().into_owned());
    let factor = given.map_or(1, |given| given.parse().unwrap_or_else(|error| panic!("{SLOW}={given}: {error}")));
    fewer_by(count, factor)
}

/// [`fewer`], for the cases of a property.
#[must_use]
pub fn cases(count: u32) -> u32 {
    u32::try_from(fewer(u64::from(count))).unwrap_or(count)
}

fn fewer_by(count: u64, factor: u64) -> u64 {
    (count / factor.max(1)).max(LEAST.min(count))
}

/// Seeds, each with its number, from which a test may choose what has to occur in every run.
pub fn seeds(count: u64) -> impl Iterator<Item = (u64, u64)> + Clone {
    let first = seed();
    (0..fewer(count)).map(move |number| (number, first + number))
}

fn choose(given: Option<&str>) -> u32 {
    match given {
        Some(given) => given.parse().unwrap_or_else(|error| panic!("{VARIABLE}={given}: {error}")),
        None => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| mixed(now.as_nanos())),
    }
}

/// Times that are close together give seeds that are not.
fn mixed(nanoseconds: u128) -> u32 {
    let low = u64::try_from(nanoseconds & u128::from(u64::MAX)).unwrap_or_default();
    u32::try_from(low.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gives_a_seed_gets_it() {
        assert_eq!(choose(Some("2718281828")), 2_718_281_828);
        assert_eq!(choose(Some("0")), 0);
        for wrong in ["", "x", "-1", "4294967296", " 1"] {
            assert!(std::panic::catch_unwind(|| choose(Some(wrong))).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn without_one_no_two_are_alike() {
        let mut seeds: Vec<u32> = (0..1000).map(|nanosecond| mixed(1_760_000_000_000_000_000 + nanosecond)).collect();
        seeds.sort_unstable();
        assert!(seeds.windows(2).all(|pair| pair[0] != pair[1]));
        // The clock goes on while this is called again and again.
        let first = choose(None);
        while choose(None) == first {}
    }

    #[test]
    fn a_slow_machine_repeats_less_but_not_too_little() {
        assert_eq!([fewer_by(40, 1), fewer_by(40, 4), fewer_by(40, 100), fewer_by(3, 4)], [40, 10, 8, 3]);
    }

    #[test]
    fn seeds_are_numbered() {
        let all: Vec<_> = seeds(3).collect();
        let first = all[0].1;
        assert_eq!(all, [(0, first), (1, first + 1), (2, first + 2)]);
    }
}
