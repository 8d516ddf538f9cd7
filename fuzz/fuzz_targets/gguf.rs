#![no_main]

#[path = "../entries.rs"]
#[allow(dead_code)]
mod entries;

// A panic inside of the library for tokenizers becomes an error; only one that gets out ends the run.
libfuzzer_sys::fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |data: &[u8]| entries::gguf(data));
