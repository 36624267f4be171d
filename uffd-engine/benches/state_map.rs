//! What the state map costs: a page that is claimed and installed on demand, in the background, and not at all.
//!
//! `cargo bench -p uffd-engine`

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use uffd_engine::bench::States;

/// Granules of 1 GiB.
const GRANULES: usize = 1 << 18;

fn fresh() -> States {
    States::new(GRANULES).unwrap()
}

fn state_map(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("state_map");
    group.throughput(Throughput::Elements(GRANULES as u64));
    group.sample_size(20);
    group.bench_function("demand", |bencher| {
        bencher.iter_batched(fresh, |map| (0..GRANULES).for_each(|at| assert!(map.demand(at))), BatchSize::LargeInput);
    });
    group.bench_function("background", |bencher| {
        let pieces = || (0..GRANULES).step_by(256);
        bencher.iter_batched(
            fresh,
            |map| pieces().for_each(|first| assert_eq!(map.background(first..first + 256), 256)),
            BatchSize::LargeInput,
        );
    });
    group.bench_function("zero", |bencher| {
        bencher.iter_batched(fresh, |map| (0..GRANULES).for_each(|at| assert!(map.zero(at))), BatchSize::LargeInput);
    });
    let map = fresh();
    (0..GRANULES).step_by(2).for_each(|at| assert!(map.demand(at)));
    group.bench_function("scan", |bencher| bencher.iter(|| map.present_runs()));
    group.finish();
}

criterion_group!(benches, state_map);
criterion_main!(benches);
