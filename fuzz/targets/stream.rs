#![no_main]

libfuzzer_sys::fuzz_target!(
    init: fastload_fuzz::seed(fastload_fuzz::seeds::streams),
    |data: &[u8]| fastload_fuzz::stream(data)
);
