//! Instruction sets of this processor that kernels here are written for, each asked for once.

use std::sync::OnceLock;

/// AVX2, FMA and F16C.
pub(super) fn has_avx2() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    })
}

/// AVX-512 as far as floats need it.
pub(super) fn has_avx512() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        has_avx2()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
    })
}

/// AVX-512 with the instructions that multiply pairs or fours of integers and add them.
pub(super) fn has_vnni() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| has_avx512() && is_x86_feature_detected!("avx512vnni"))
}

/// Tiles of AMX with products of bf16, beside AVX-512. Linux gives them to a process that asks for them.
pub(super) fn has_tiles() -> bool {
    #[cfg(target_os = "linux")]
    {
        static FOUND: OnceLock<bool> = OnceLock::new();
        *FOUND.get_or_init(|| has_avx512() && named() && kept() && granted())
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// AMX-TILE and AMX-BF16 are in the processor's list.
#[cfg(target_os = "linux")]
fn named() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    // Newer versions of the language ask for no block here.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has the instruction.
    let features = unsafe {
        let (leaves, _) = core::arch::x86_64::__get_cpuid_max(0);
        if leaves >= 7 { core::arch::x86_64::__cpuid_count(7, 0).edx } else { 0 }
    };
    features & BF16 != 0 && features & TILE != 0
}

/// The system keeps the tiles and their configuration when it switches between threads.
#[cfg(target_os = "linux")]
fn kept() -> bool {
    const CONFIGURATION: u64 = 1 << 17;
    const DATA: u64 = 1 << 18;
    #[target_feature(enable = "xsave")]
    fn states() -> u64 {
        // SAFETY: register 0 is there wherever the instruction is.
        unsafe { core::arch::x86_64::_xgetbv(0) }
    }
    // SAFETY: a system that keeps the registers of AVX-512, which were found, has turned the instruction on.
    let states = unsafe { states() };
    states & CONFIGURATION != 0 && states & DATA != 0
}

/// The system lets this process use them.
#[cfg(target_os = "linux")]
fn granted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and changes nothing but the permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}
