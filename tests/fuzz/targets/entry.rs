//! Fuzzes an entry below `<prefix>/subnets/`: its key's last part, a newline, its value.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (key, value) = data.split_at(data.iter().position(|b| *b == b'\n').unwrap_or(data.len()));
    overlay_tests::invalid_values::check_entry(&String::from_utf8_lossy(key), value.get(1..).unwrap_or_default());
});
