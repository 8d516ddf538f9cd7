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
