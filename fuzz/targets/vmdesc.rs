#![no_main]

libfuzzer_sys::fuzz_target!(
    init: fastload_fuzz::seed(fastload_fuzz::seeds::descriptions),
    |data: &[u8]| fastload_fuzz::vmdesc(data)
);
