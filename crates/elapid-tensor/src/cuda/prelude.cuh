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

typedef signed char int8_t;
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

DEVICE uint64_t bits_of_double(double value) {
#ifdef ON_CARD
    return uint64_t(__double_as_longlong(value));
#else
    return emulation::copy_bits<uint64_t>(value);
#endif
}

DEVICE double double_of_bits(uint64_t bits) {
#ifdef ON_CARD
    return __longlong_as_double((long long)(bits));
#else
    return emulation::copy_bits<double>(bits);
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

// Half precision, of which only scales of quantised weights are made.
DEVICE float half_to_float(uint16_t bits) {
#ifdef ON_CARD
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return emulation::half_to_float(bits);
#endif
}
// To nearest even.
DEVICE uint16_t float_to_half(float value) {
#ifdef ON_CARD
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    return emulation::float_to_half(value);
#endif
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

// 16 bytes that no kernel writes while this one runs, passed by the first-level cache.
DEVICE Pack<uint32_t, 4> load_constant(const void* from) {
    Pack<uint32_t, 4> words;
#ifdef ON_CARD
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
                 : "l"(from));
#else
    words = *static_cast<const Pack<uint32_t, 4>*>(from);
#endif
    return words;
}
DEVICE uint32_t load_constant_word(const void* from) {
#ifdef ON_CARD
    uint32_t word;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
#else
    return *static_cast<const uint32_t*>(from);
#endif
}

// What an earlier kernel wrote, from the second-level cache, where all multiprocessors see the same.
DEVICE Pack<uint32_t, 4> load_fresh_words(const void* from) {
    Pack<uint32_t, 4> words;
#ifdef ON_CARD
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
                 : "l"(from));
#else
    words = *static_cast<const Pack<uint32_t, 4>*>(from);
#endif
    return words;
}
DEVICE float load_fresh(const float* from) {
#ifdef ON_CARD
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from));
    return value;
#else
    return *from;
#endif
}
DEVICE uint32_t load_fresh(const uint32_t* from) {
#ifdef ON_CARD
    uint32_t value;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
#else
    return *from;
#endif
}
DEVICE bf16 load_fresh(const bf16* from) {
#ifdef ON_CARD
    bf16 value;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(value.bits) : "l"(from));
    return value;
#else
    return *from;
#endif
}

// Has the second-level cache fetch what will be wanted.
DEVICE void fetch_ahead(const void* from) {
#ifdef ON_CARD
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

// Where something lies in shared memory, as instructions want it. The compiler sees through it, so that it calculates with words.
#ifdef ON_CARD
DEVICE uint32_t place_of_shared(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }
#endif

// Zero, but the compiler does not know: constants that it is added to stay in registers instead of being made for each use.
DEVICE uint32_t hidden_zero() { return threadIdx.z; }

// Copies of 16 bytes into shared memory that go on while the thread does. Those since the last commit_copies are a group;
// wait_copies<N> waits for all groups of this thread but the N last. Other threads see them after a barrier.
DEVICE void copy_async(void* shared, const void* from) {
#ifdef ON_CARD
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(place_of_shared(shared)), "l"(from) : "memory");
#else
    emulation::copy_async(shared, from);
#endif
}
DEVICE void commit_copies() {
#ifdef ON_CARD
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulation::commit_copies();
#endif
}
template <int LEFT> DEVICE void wait_copies() {
#ifdef ON_CARD
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#else
    emulation::wait_copies(LEFT);
#endif
}

// ---- One kernel after another -------------------------------------------------------------------------------

// Lets the next kernel of a chain start. It may read what nobody writes, and must call wait_for_previous before all else.
DEVICE void let_next_start() {
#if defined(ON_CARD) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until every kernel before this one has ended and what it wrote is there. A kernel of a chain must call it, also
// where it reads nothing: the one after it relies on all that came before.
DEVICE void wait_for_previous() {
#if defined(ON_CARD) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
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

// c += a b for a tile of 16 x 8 sums and 16 terms each, by a whole warp, on the tensor cores. With g = lane / 4 and
// t = lane % 4, two bf16 a word, the first in its lower half: a has rows g, g + 8, g, g + 8 and terms 2t, 2t, 2t + 8, 2t + 8;
// b has column g and terms 2t, 2t + 8; c has rows g, g, g + 8, g + 8 and columns 2t, 2t + 1, 2t, 2t + 1. A column's sums do
// not depend on the other columns.
DEVICE void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef ON_CARD
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    emulation::multiply_tile(c, a, b0, b1);
#endif
}
