// A thin emulation of CUDA's execution model for the host's C++ compiler: the threads of a block are fibers of one
// host thread, blocks run one after another, barriers and warp exchanges switch fibers. The order in which threads
// run is drawn anew for every launch, so that a missing barrier shows as a wrong result in some order.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if !defined(__x86_64__) || defined(_WIN32)
#include <ucontext.h>
#endif

#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
#endif

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace emulation {

template <class To, class From> To copy_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// The card's ex2.approx.ftz: subnormal results are 0.
inline float exp2(float x) {
    float y = ::exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

constexpr int LANES = 32;
constexpr unsigned MOST_THREADS = 1024;
constexpr size_t STACK = 64 << 10;

// Where a fiber stands while others run.
#if defined(__x86_64__) && !defined(_WIN32)
// swapcontext asks the kernel for the mask of signals each time, and sanitizers make it clear the whole stack's shadow.
struct Standing {
    void* stack = nullptr;  // its top: where to go on, then what is kept
};
inline void start(Standing& fiber, char* stack, size_t bytes, void (*entry)()) {
    // As if it had been called: a return address above, 16 bytes aligned before that was put down.
    void** top = reinterpret_cast<void**>(uint64_t(stack + bytes) & ~uint64_t(15)) - 2;
    top[0] = reinterpret_cast<void*>(entry);
    top[1] = nullptr;
    fiber.stack = top;
}
inline void change(Standing& from, Standing& to) {
    void** save = &from.stack;
    void* target = to.stack;
    // The first 128 bytes below the stack may be in use; rbx and rbp cannot be named as lost.
    asm volatile(
        "leaq -128(%%rsp), %%rsp\n\tpushq %%rbp\n\tpushq %%rbx\n\t"
        "leaq 1f(%%rip), %%rax\n\tpushq %%rax\n\tmovq %%rsp, (%%rdi)\n\t"
        "movq %%rsi, %%rsp\n\tpopq %%rax\n\tjmpq *%%rax\n"
        "1:\n\tpopq %%rbx\n\tpopq %%rbp\n\tleaq 128(%%rsp), %%rsp"
        : "+D"(save), "+S"(target)
        :
        : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4",
          "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");
}
#else
struct Standing {
    ucontext_t context;
};
inline void start(Standing& fiber, char* stack, size_t bytes, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}
inline void change(Standing& from, Standing& to) { swapcontext(&from.context, &to.context); }
#endif

enum class State { Ready, Barrier, Warp, Done };

// A copy of 16 bytes under way.
struct Copy {
    void* to;
    const void* from;
    unsigned group;
};

// One thread of a block.
struct Fiber {
    Standing standing;
    char* stack = nullptr;
    void* shadow = nullptr;
    dim3 index;
    unsigned number = 0;
    State state = State::Done;
    unsigned mask = 0;      // lanes of the exchange that this one waits for
    uint64_t seen[LANES];   // what the lanes of its last exchange put down
    std::vector<Copy> copies;
    unsigned group = 0;     // of copies that start now
};

// What the lanes of a warp have put down for the exchange under way.
struct Warp {
    uint64_t values[LANES];
};

struct Block {
    dim3 grid, block, index;
    Fiber* fibers[MOST_THREADS] = {};  // made when first wanted, kept for the host thread's life
    unsigned fibers_used = 0;
    std::vector<Warp> warps;
    unsigned char* dynamic = nullptr;
    size_t dynamic_bytes = 0;
    Fiber* current = nullptr;
    Standing scheduler;
    void* shadow = nullptr;
    const void* bottom = nullptr;
    size_t bottom_size = 0;
    void (*run)(const void*) = nullptr;
    const void* args = nullptr;
    uint64_t random = 0x9e3779b97f4a7c15ull;
};

inline Block& block() {
    static thread_local Block instance;
    return instance;
}

[[noreturn]] inline void fail(const char* message) {
    fprintf(stderr, "emulated kernel: %s\n", message);
    abort();
}

inline void to_scheduler() {
    Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&b.current->shadow, b.bottom, b.bottom_size);
#endif
    change(b.current->standing, b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(b.current->shadow, &b.bottom, &b.bottom_size);
#endif
}

// A fiber runs a thread of one block after another, since what it leaves behind on its stack would be in the next one's way.
[[noreturn]] inline void entry() {
    Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &b.bottom, &b.bottom_size);
#endif
    for (;;) {
        b.run(b.args);
        b.current->state = State::Done;
        to_scheduler();
    }
}

inline void resume(Fiber& fiber) {
    Block& b = block();
    b.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&b.shadow, fiber.stack, STACK);
#endif
    change(b.scheduler, fiber.standing);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(b.shadow, nullptr, nullptr);
#endif
}

inline uint64_t draw() {
    uint64_t& x = block().random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x;
}

inline void barrier() {
    block().current->state = State::Barrier;
    to_scheduler();
}

// Puts down a value for the lanes of `mask` and returns the table of theirs when all have come.
inline const uint64_t* exchange(unsigned mask, uint64_t value) {
    Block& b = block();
    Fiber* self = b.current;
    unsigned lane = self->number % LANES, first = self->number - lane;
    if (!(mask >> lane & 1)) fail("a lane calls a warp operation whose mask leaves it out");
    Warp& warp = b.warps[self->number / LANES];
    warp.values[lane] = value;
    self->mask = mask;
    self->state = State::Warp;
    unsigned present = 0;
    for (unsigned other = 0; other < LANES && first + other < b.fibers_used; ++other) {
        Fiber& fiber = *b.fibers[first + other];
        if ((mask >> other & 1) && fiber.state == State::Warp) {
            if (fiber.mask != mask) fail("lanes of one warp operation disagree about its mask");
            present |= 1u << other;
        }
    }
    if (present != mask) {
        to_scheduler();
        return self->seen;
    }
    // The last to come hands the table to all and lets them go on.
    for (unsigned other = 0; other < LANES; ++other) {
        if (!(mask >> other & 1)) continue;
        Fiber& fiber = *b.fibers[first + other];
        memcpy(fiber.seen, warp.values, sizeof(warp.values));
        fiber.state = State::Ready;
    }
    return self->seen;
}

template <class T> uint64_t widen(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t wide = 0;
    memcpy(&wide, &value, sizeof(T));
    return wide;
}
template <class T> T narrow(uint64_t wide) {
    T value;
    memcpy(&value, &wide, sizeof(T));
    return value;
}

template <class T> T shuffle(unsigned mask, T value, unsigned source) {
    unsigned lane = block().current->number % LANES;
    const uint64_t* table = exchange(mask, widen(value));
    if (source >= LANES) source = lane;
    if (!(mask >> source & 1)) fail("a lane reads one outside the mask");
    return narrow<T>(table[source]);
}

// The tensor cores' 16 x 8 x 16 product; see the prelude for who holds what.
struct Fragment {
    uint32_t a[4], b[2];
};
inline float wide(uint32_t word, int half) { return copy_bits<float>(half ? word & 0xffff0000u : word << 16); }
inline void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Fragment own = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const Fragment* lanes[LANES];
    // Where each lane's fragment lies, on its own stack.
    const uint64_t* table = exchange(0xffffffffu, uint64_t(&own));
    for (int lane = 0; lane < LANES; ++lane) lanes[lane] = reinterpret_cast<const Fragment*>(table[lane]);
    int g = block().current->number % LANES / 4, t = block().current->number % 4;
    for (int i = 0; i < 4; ++i) {
        int row = g + i / 2 * 8, column = 2 * t + i % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) {
            const Fragment& left = *lanes[row % 8 * 4 + k % 8 / 2];
            const Fragment& right = *lanes[column * 4 + k % 8 / 2];
            sum += wide(left.a[row / 8 + k / 8 * 2], k % 2) * wide(right.b[k / 8], k % 2);
        }
        c[i] += sum;
    }
    // Nobody's stack goes on before all have read.
    exchange(0xffffffffu, 0);
}

// Copies are carried out as late as they may be, so that a missing wait shows.
inline void copy_async(void* to, const void* from) {
    if (uint64_t(to) % 16 || uint64_t(from) % 16) fail("a copy of 16 bytes between places that are no multiple of 16");
    Fiber& self = *block().current;
    self.copies.push_back({to, from, self.group});
}
inline void commit_copies() { ++block().current->group; }
inline void wait_copies(unsigned left) {
    Fiber& self = *block().current;
    size_t done = 0;
    for (; done < self.copies.size() && self.copies[done].group + left < self.group; ++done)
        memcpy(self.copies[done].to, self.copies[done].from, 16);
    self.copies.erase(self.copies.begin(), self.copies.begin() + done);
}

inline float half_to_float(uint16_t bits) {
    uint32_t sign = uint32_t(bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return copy_bits<float>(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) {
        float value = float(fraction) * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    return copy_bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
}
inline uint16_t float_to_half(float value) {
    uint32_t bits = copy_bits<uint32_t>(value);
    uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    float size = fabsf(value);
    if (size != size) return sign | 0x7e00u;
    if (size >= 65520.0f) return sign | 0x7c00u;
    // Adding 2^k rounds to the step of a half of this size: 2^-24 at least.
    int exponent = size < 6.103515625e-5f ? -14 : int(copy_bits<uint32_t>(size) >> 23) - 127;
    float scaled = ldexpf(size, 10 - exponent);
    float rounded = nearbyintf(scaled);
    if (exponent == -14 && rounded < 1024.0f) return sign | uint16_t(rounded);
    return sign | uint16_t((uint32_t(exponent + 15) << 10) + uint32_t(rounded) - 1024u);
}

inline void run_block() {
    Block& b = block();
    unsigned count = b.block.x * b.block.y * b.block.z;
    b.fibers_used = count;
    b.warps.assign((count + LANES - 1) / LANES, Warp());
    // Shared memory starts as NaN: what was not written shows.
    if (b.dynamic_bytes) memset(b.dynamic, 0xff, b.dynamic_bytes);
    for (unsigned i = 0; i < count; ++i) {
        if (!b.fibers[i]) b.fibers[i] = new Fiber();
        Fiber& fiber = *b.fibers[i];
        fiber.number = i;
        fiber.index = {i % b.block.x, i / b.block.x % b.block.y, i / (b.block.x * b.block.y)};
        fiber.state = State::Ready;
        fiber.copies.clear();
        fiber.group = 0;
        if (!fiber.stack) {
            fiber.stack = (char*)malloc(STACK);
            start(fiber.standing, fiber.stack, STACK, entry);
        }
    }
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; ++i) order[i] = i;
    for (;;) {
        for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
        bool progress = false;
        for (unsigned i : order) {
            if (b.fibers[i]->state == State::Ready) {
                resume(*b.fibers[i]);
                progress = true;
            }
        }
        if (progress) continue;
        unsigned waiting = 0, done = 0;
        for (unsigned i = 0; i < count; ++i) {
            waiting += b.fibers[i]->state == State::Barrier;
            done += b.fibers[i]->state == State::Done;
        }
        if (done == count) return;
        if (waiting + done < count) fail("deadlock: lanes of a warp operation do not all come");
        if (done) fail("a barrier that ended threads never reach");
        for (unsigned i = 0; i < count; ++i) b.fibers[i]->state = State::Ready;
    }
}

// Runs a whole grid. `sizes` are grid x, y, z, block x, y, z and the bytes of dynamic shared memory.
inline void run_grid(void (*run)(const void*), const void* args, const uint32_t* sizes, uint64_t seed) {
    Block& b = block();
    b.grid = {sizes[0], sizes[1], sizes[2]};
    b.block = {sizes[3], sizes[4], sizes[5]};
    unsigned count = sizes[3] * sizes[4] * sizes[5];
    if (count == 0 || count > MOST_THREADS) fail("a block has 1 to 1024 threads");
    b.run = run;
    b.args = args;
    b.random = (seed * 0x9e3779b97f4a7c15ull) | 1;  // neighbours draw nothing alike
    b.dynamic_bytes = sizes[6];
    b.dynamic = nullptr;
    if (b.dynamic_bytes && posix_memalign((void**)&b.dynamic, 16, b.dynamic_bytes)) fail("out of memory");
    // Blocks in a drawn order too: they must not depend on one another.
    uint64_t blocks = uint64_t(b.grid.x) * b.grid.y * b.grid.z;
    uint64_t start = draw() % (blocks ? blocks : 1);
    for (uint64_t k = 0; k < blocks; ++k) {
        uint64_t i = (start + k) % blocks;
        b.index = {unsigned(i % b.grid.x), unsigned(i / b.grid.x % b.grid.y), unsigned(i / (uint64_t(b.grid.x) * b.grid.y))};
        run_block();
    }
    free(b.dynamic);
}

}  // namespace emulation

#define DEVICE inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
// One array for all fibers of this host thread, as blocks run one after another.
#define __shared__ static thread_local
#define __align__(n) alignas(n)
#define __grid_constant__
#define KERNEL(NAME, ARGUMENTS, THREADS, BLOCKS)                                                       \
    static void NAME(const ARGUMENTS args);                                                            \
    extern "C" void NAME##_on_host(const void* args, const uint32_t* sizes, uint64_t seed) {           \
        if (sizes[3] * sizes[4] * sizes[5] > (THREADS)) emulation::fail(#NAME ": too many threads");   \
        emulation::run_grid([](const void* a) { NAME(*static_cast<const ARGUMENTS*>(a)); }, args, sizes, seed); \
    }                                                                                                  \
    extern "C" const uint32_t NAME##_arguments = sizeof(ARGUMENTS);                                    \
    static void NAME(const ARGUMENTS args)
#define DYNAMIC_SHARED(TYPE, NAME) TYPE* NAME = reinterpret_cast<TYPE*>(emulation::block().dynamic)

#define threadIdx (emulation::block().current->index)
#define blockIdx (emulation::block().index)
#define blockDim (emulation::block().block)
#define gridDim (emulation::block().grid)

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::exchange(mask, 0); }
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    unsigned lane = emulation::block().current->number % 32;
    return emulation::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    unsigned lane = emulation::block().current->number % 32;
    unsigned source = lane ^ bits;
    return emulation::shuffle(mask, value, (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source);
}

// Fibers change only where they wait, so nothing comes between.
template <class T> T atomicAdd(T* at, T term) {
    T before = *at;
    *at += term;
    return before;
}
template <class T> T atomicOr(T* at, T bits) {
    T before = *at;
    *at |= bits;
    return before;
}
