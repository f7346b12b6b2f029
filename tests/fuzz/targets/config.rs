//! Fuzzes the network configuration.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| overlay_tests::invalid_values::check_config(&String::from_utf8_lossy(data)));
