// What every kernel is written in: CUDA C++ for the card (NVRTC, no headers), and the same text for the host's
// C++ compiler over the emulation in emulation.h. Kernels are exported with KERNEL, take one struct of arguments by
// value, and use only what stands here or in the language.
#pragma once

#if defined(__CUDACC_RTC__) || defined(__CUDACC__)

#define DEVICE __device__ __forceinline__
// extern "C" __global__ void NAME(const ARGUMENTS args), at most THREADS threads a block, BLOCKS a multiprocessor.
#define KERNEL(NAME, ARGUMENTS, THREADS, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ ARGUMENTS args)
// The block's dynamic shared memory as an array of TYPE, 16-byte aligned.
#define DYNAMIC_SHARED(TYPE, NAME) \
    extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[]; \
    TYPE* NAME = reinterpret_cast<TYPE*>(dynamic_shared_bytes)
#define ON_CARD 1

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;
static_assert(sizeof(int64_t) == 8 && sizeof(uint64_t) == 8, "64-bit offsets");

#else
#include "emulation.h"
#endif

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr int WARP = 32;
constexpr float LOG2_E = 1.4426950408889634f;

// ---- Numbers ------------------------------------------------------------------------------------------------

DEVICE uint32_t bits_of(float value) {
#ifdef ON_CARD
    return __float_as_uint(value);
#else
    return emulation::copy_bits<uint32_t>(value);
#endif
}

DEVICE float float_of(uint32_t bits) {
#ifdef ON_CARD
    return __uint_as_float(bits);
#else
    return emulation::copy_bits<float>(bits);
#endif
}

// bfloat16: the upper half of an f32.
struct alignas(2) bf16 {
    uint16_t bits;
};

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(bf16 value) { return float_of(uint32_t(value.bits) << 16); }

template <class T> DEVICE T from_float(float value);
template <> DEVICE float from_float<float>(float value) { return value; }
// To nearest even; NaN stays NaN.
template <> DEVICE bf16 from_float<bf16>(float value) {
    bf16 result;
#ifdef ON_CARD
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        result.bits = uint16_t((bits >> 16) | 0x40u);
    } else {
        result.bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
#endif
    return result;
}

// 2^x on the special-function unit: 2 ulp, subnormal results become 0.
DEVICE float exp2_fast(float x) {
#ifdef ON_CARD
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return emulation::exp2(x);
#endif
}

// 1 / x to 1 ulp.
DEVICE float reciprocal(float x) {
#ifdef ON_CARD
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-LOG2_E * x)); }
DEVICE float silu(float x) { return x * sigmoid(x); }
// d silu(x) / dx, given sigmoid(x).
DEVICE float silu_slope(float x, float s) { return s * (1.0f + x * (1.0f - s)); }

// log(1 + e^x). log2(1 + e) would lose small e: a polynomial of log(1 + e) / e on [0, 1] has relative error 2e-7
// everywhere. NaN passes; `slope` is the derivative.
DEVICE float softplus(float x, float* slope = nullptr) {
    float e = exp2_fast(-LOG2_E * fabsf(x));
    float p = -0.00837115255f;
    p = p * e + 0.0434938998f;
    p = p * e - 0.106850029f;
    p = p * e + 0.176874767f;
    p = p * e - 0.244747742f;
    p = p * e + 0.332719284f;
    p = p * e - 0.499971745f;
    p = p * e + 0.999999781f;
    if (slope) *slope = (x < 0.0f ? e : 1.0f) * reciprocal(1.0f + e);
    return fmaxf(x, 0.0f) + e * p;
}

template <class A, class B> DEVICE A least(A a, B b) { return b < a ? A(b) : a; }
template <class A, class B> DEVICE A most(A a, B b) { return b > a ? A(b) : a; }
DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- Memory -------------------------------------------------------------------------------------------------

// COUNT neighbouring elements, moved by one instruction where that is 4, 8 or 16 bytes.
template <class T, int COUNT> struct alignas(sizeof(T) * COUNT) Pack {
    T at[COUNT];
};

template <class T, int COUNT> DEVICE Pack<T, COUNT> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T, COUNT>*>(from);
}
template <class T, int COUNT> DEVICE void store_pack(T* to, const Pack<T, COUNT>& value) {
    *reinterpret_cast<Pack<T, COUNT>*>(to) = value;
}

// True if packs of COUNT elements can start at every row.
template <class T, int COUNT> DEVICE bool packable(const T* from, int64_t stride) {
    return reinterpret_cast<uint64_t>(from) % (sizeof(T) * COUNT) == 0 && stride % COUNT == 0;
}

// ---- Warps and blocks ---------------------------------------------------------------------------------------

DEVICE int lane_id() { return threadIdx.x % WARP; }
DEVICE int warp_id() { return threadIdx.x / WARP; }

// Sum over groups of LANES neighbouring lanes, in the same order in every lane.
template <int LANES = WARP> DEVICE float warp_sum(float value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) value += __shfl_xor_sync(FULL_WARP, value, step);
    return value;
}

// Sum over a block of up to 1024 threads along x; `room` is 32 floats of shared memory that nobody else uses.
// Every thread must call it and gets the sum.
DEVICE float block_sum(float value, float* room) {
    value = warp_sum(value);
    int warps = (blockDim.x + WARP - 1) / WARP;
    if (warps == 1) return value;
    __syncthreads();
    if (lane_id() == 0) room[warp_id()] = value;
    __syncthreads();
    return warp_sum(lane_id() < warps ? room[lane_id()] : 0.0f);
}
