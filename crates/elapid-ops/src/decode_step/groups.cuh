// Products by groups of four warps, the first a multiple of four: c += a b as multiply_tile does it, for COUNT tiles of
// columns that the tensor cores read from shared memory themselves, once for the rows of all four. A tile's b0 and b1 are
// matrices of 128 bytes, NEXT bytes apart; tiles are STRIDE bytes apart, the first AT bytes behind the place that is given.
// The whole group calls start_group, multiplies, begin_group and end_group, before which the sums mean nothing. On cards that
// have it (compute capability 9.0) the sums have the bits of multiply_tile's; elsewhere they are made by it.
#pragma once
#include "prelude.cuh"

// Four neighbouring matrices of 128 bytes in shared memory, as b0 and b1 of two products of multiply_tile.
DEVICE Pack<uint32_t, 4> load_matrices(const void* shared) {
    Pack<uint32_t, 4> words;
#ifdef ON_CARD
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
                 : "r"(place_of_shared(static_cast<const uint8_t*>(shared) + lane_id() * 16))
                 : "memory");
#else
    const uint32_t* from = static_cast<const uint32_t*>(shared);
    for (int i = 0; i < 4; ++i) words.at[i] = from[i * WARP + lane_id()];
#endif
    return words;
}

// What this thread put into shared memory becomes visible to the tensor cores of those that meet it at a barrier.
DEVICE void show_to_tensor_cores() {
#ifdef ON_CARD
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#if defined(ON_CARD) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_GROUPS 1
// The sums of one tile of columns as operands of an instruction, and of four; the places of the first 16, 32 and 64 in its text.
#define TILE_SUMS(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define FOUR_TILES_SUMS(n) TILE_SUMS(n), TILE_SUMS(n + 1), TILE_SUMS(n + 2), TILE_SUMS(n + 3)
#define SUMS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_32 SUMS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_64 \
    SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
            ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Of COLUMNS columns with SUMS in the instruction's text, behind which the places of a and b follow.
#define MULTIPLY_GROUP(COLUMNS, SUMS, A, B, ...) \
    asm volatile( \
        "{\n.reg .pred always;\nsetp.eq.u32 always, 0, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" SUMS "}, {" A "}, " B ", always, 1, 1, 0;\n}" \
        : __VA_ARGS__ \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
DEVICE void multiply_group_on_card(float (&c)[4][4], const uint32_t (&a)[4], uint64_t b) {
    MULTIPLY_GROUP(32, SUMS_16, "%16, %17, %18, %19", "%20", FOUR_TILES_SUMS(0));
}
DEVICE void multiply_group_on_card(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
    MULTIPLY_GROUP(64, SUMS_32, "%32, %33, %34, %35", "%36", FOUR_TILES_SUMS(0), FOUR_TILES_SUMS(4));
}
DEVICE void multiply_group_on_card(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
    MULTIPLY_GROUP(128, SUMS_64, "%64, %65, %66, %67", "%68", FOUR_TILES_SUMS(0), FOUR_TILES_SUMS(4), FOUR_TILES_SUMS(8),
                   FOUR_TILES_SUMS(12));
}
#endif

template <int COUNT> DEVICE void pin_sums(float (&c)[COUNT][4]) {
#ifdef HAS_GROUPS
#pragma unroll
    for (int n = 0; n < COUNT; ++n) asm volatile("" : TILE_SUMS(n)::"memory");
#endif
}

// What was written to registers is what the tensor cores find there.
DEVICE void show_registers() {
#ifdef HAS_GROUPS
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

template <int COUNT> DEVICE void start_group(float (&c)[COUNT][4]) {
    pin_sums(c);
    show_registers();
}

template <int AT, int NEXT, int STRIDE, int COUNT>
DEVICE void multiply_group(float (&c)[COUNT][4], const uint32_t (&a)[4], const uint8_t* b) {
#ifdef HAS_GROUPS
    uint32_t place = (place_of_shared(b) >> 4 | uint32_t(NEXT / 16) << 16) + AT / 16;
    multiply_group_on_card(c, a, place | uint64_t(STRIDE / 16) << 32);
#else
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(b + AT + n * STRIDE) + lane_id();
        multiply_tile(c[n], a, words[0], words[NEXT / 4]);
    }
#endif
}

DEVICE void begin_group() {
#ifdef HAS_GROUPS
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Between start_group and end_group several may be begun; this waits for all of them but the last.
DEVICE void wait_for_earlier_group() {
#ifdef HAS_GROUPS
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#endif
}

template <int COUNT> DEVICE void end_group(float (&c)[COUNT][4]) {
#ifdef HAS_GROUPS
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin_sums(c);
#endif
}
