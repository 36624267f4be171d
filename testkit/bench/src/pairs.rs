//! Measuring in turns.

/// How many pairs a ratio is the median of.
pub const PAIRS: usize = 7;

/// Runs `product` and `floor` in turns, [`PAIRS`] times after one round that does not count, and returns what each
/// pair gave.
///
/// # Errors
/// The first error of either.
pub fn interleave<T, E>(
    product: impl FnMut() -> Result<T, E>,
    floor: impl FnMut() -> Result<T, E>,
) -> Result<Vec<(T, T)>, E> {
    interleave_times(PAIRS, product, floor)
}

/// Repeats that a number of times: what takes less than a millisecond varies more.
///
/// # Errors
/// The first error of either.
pub fn interleave_times<T, E>(
    times: usize,
    mut product: impl FnMut() -> Result<T, E>,
    mut floor: impl FnMut() -> Result<T, E>,
) -> Result<Vec<(T, T)>, E> {
    product()?;
    floor()?;
    let mut pairs = Vec::with_capacity(times);
    for round in 0..times {
        // Who goes first changes, so that neither always finds what the other left in the caches.
        if round % 2 == 0 {
            let first = product()?;
            pairs.push((first, floor()?));
        } else {
            let first = floor()?;
            pairs.push((product()?, first));
        }
    }
    Ok(pairs)
}

/// The value below which a percentage of the values lie; sorts.
///
/// # Panics
/// If there are no values.
pub fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) * percent / 100]
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn both_take_turns() {
        let order = RefCell::new(String::new());
        let run = |who: &'static str| {
            order.borrow_mut().push_str(who);
            Ok::<_, ()>(who)
        };
        let pairs = interleave(|| run("p"), || run("f")).unwrap();
        assert_eq!(pairs, [("p", "f"); PAIRS]);
        assert!(order.borrow().starts_with("pfpffppf"));
        assert_eq!(interleave(|| Err::<(), _>("bad"), || Ok(())), Err("bad"));
    }

    #[test]
    fn percentiles_are_found() {
        let mut values: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!((percentile(&mut values, 50), percentile(&mut values, 99)), (50.0, 99.0));
    }
}
