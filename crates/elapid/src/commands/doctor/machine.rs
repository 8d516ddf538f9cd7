//! What the machine is, as far as it can be asked without another library.

use std::thread;

use serde::Serialize;

/// This machine.
#[derive(Debug, Serialize)]
pub struct Machine {
    pub system: &'static str,
    pub architecture: &'static str,
    /// The processor's name; Linux only.
    pub processor: Option<String>,
    /// Cores that this process may use.
    pub cores: usize,
    /// The instruction set that the vector code was chosen for.
    pub vector_code: String,
    /// What multiplies weights of bf16 on the CPU.
    pub bf16_products: &'static str,
    /// Instruction sets found at run time, of those that matter here.
    pub features: Vec<&'static str>,
    /// Linux only.
    pub memory_bytes: Option<u64>,
    /// Linux only.
    pub free_bytes: Option<u64>,
}

impl Machine {
    /// Asks.
    pub fn this() -> Self {
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            system: std::env::consts::OS,
            architecture: std::env::consts::ARCH,
            processor: value_of(&processor, "model name").map(str::to_owned),
            cores: thread::available_parallelism().map_or(1, usize::from),
            vector_code: vector_code(),
            bf16_products: bf16_products(),
            features: features(),
            memory_bytes: kilobytes(&memory, "MemTotal"),
            free_bytes: kilobytes(&memory, "MemAvailable"),
        }
    }
}

/// The instruction set that was chosen, by the name that processors give it.
fn vector_code() -> String {
    let name = format!("{:?}", elapid_ops::simd::arch());
    match name.split(['(', ' ', '{']).next().unwrap_or_default() {
        "V3" => "AVX2 with FMA".into(),
        "V4" => "AVX-512".into(),
        "Scalar" => "portable".into(),
        other => other.to_owned(),
    }
}

/// AMX, where its tiles multiply bf16, or the vector code, which does so after widening.
fn bf16_products() -> &'static str {
    if elapid_ops::quantized_linear::has_tiles() { "AMX" } else { "vector code" }
}

/// The first `key : value` line with that key.
fn value_of<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then_some(value.trim())
    })
}

fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let number = value_of(text, key)?.strip_suffix("kB")?.trim();
    number.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    let mut found = Vec::new();
    macro_rules! ask {
        ($($name:tt),*) => {
            $(if std::arch::is_x86_feature_detected!($name) { found.push($name); })*
        };
    }
    ask!("sse4.2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq");
    found
}

#[cfg(target_arch = "aarch64")]
fn features() -> Vec<&'static str> {
    let mut found = Vec::new();
    macro_rules! ask {
        ($($name:tt),*) => {
            $(if std::arch::is_aarch64_feature_detected!($name) { found.push($name); })*
        };
    }
    ask!("neon", "fp16", "bf16", "dotprod", "sve");
    found
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> Vec<&'static str> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_tables_of_linux() {
        let text = "MemTotal:       16000 kB\nMemAvailable:    9000 kB\nodd\n";
        assert_eq!(kilobytes(text, "MemTotal"), Some(16000 * 1024));
        assert_eq!(kilobytes(text, "MemAvailable"), Some(9000 * 1024));
        assert_eq!(kilobytes(text, "odd"), None);
        assert_eq!(value_of("model name\t: A CPU\n", "model name"), Some("A CPU"));
    }
}
