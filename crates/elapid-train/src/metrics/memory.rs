//! Memory of this process, asked of the operating system.

/// Largest resident memory of this process so far, in bytes; `None` where the system does not tell
/// without foreign calls (everything but Linux and Android).
pub fn peak_memory_bytes() -> Option<u64> {
    status_field("VmHWM:")
}

/// Resident memory of this process now, in bytes; `None` as for [`peak_memory_bytes`].
pub fn resident_memory_bytes() -> Option<u64> {
    status_field("VmRSS:")
}

fn status_field(name: &str) -> Option<u64> {
    if !cfg!(any(target_os = "linux", target_os = "android")) {
        return None;
    }
    kibibytes(&std::fs::read_to_string("/proc/self/status").ok()?, name)
}

/// The value in bytes of a line such as `VmHWM:     5432 kB`.
fn kibibytes(status: &str, name: &str) -> Option<u64> {
    let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
    let number = rest.trim().strip_suffix("kB")?.trim();
    number.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_lines() {
        let status = "Name:\telapid\nVmPeak:\t  900 kB\nVmHWM:\t    5432 kB\nVmRSS:\t 100 kB\n";
        assert_eq!(kibibytes(status, "VmHWM:"), Some(5432 * 1024));
        assert_eq!(kibibytes(status, "VmRSS:"), Some(100 * 1024));
        assert_eq!(kibibytes(status, "VmSwap:"), None);
        assert_eq!(kibibytes("VmHWM: many kB\n", "VmHWM:"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn touching_memory_raises_the_peak() {
        let before = peak_memory_bytes().unwrap();
        let resident = resident_memory_bytes().unwrap();
        assert!(resident > 1 << 18 && before >= resident / 2);
        let block = std::hint::black_box(vec![1u8; 96 << 20]);
        assert!(peak_memory_bytes().unwrap() >= (96 << 20), "{} bytes held", block.len());
    }
}
