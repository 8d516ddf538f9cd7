// How weights and activations of decode steps lie in memory: in the order in which lanes hold the fragments of the
// tensor cores' 16 x 8 x 16 product, so that a warp's load is one run of whole sectors.
//
// Weights [rows, K] are cut into tiles of 16 rows and blocks of 32 columns, zeros filling up; the blocks of a tile follow one
// another. With g = lane / 4 and t = lane % 4, the k-th number of a lane within a block belongs to column 8 t + k, so that
// an activation's fragments of both products of a block are 16 neighbouring bytes.
//   bf16: for each half s of a block and each lane 8 numbers: rows g, g + 8, g, g + 8, columns 8 t + 4 s + {0, 1, 0, 1 and 2,
//         3, 2, 3} in pairs.
//   q8:   for each lane 16 int8: rows g, g + 8, g, g + 8, columns 8 t + {0..3, 0..3, 4..7, 4..7}; then for each g the scales
//         of rows g and g + 8 in half precision: 544 bytes a block.
// Activations [columns, K] in bf16: tiles of 8 columns, blocks of 32, a lane's 8 numbers: column g, 8 t + {0..7}.
#pragma once
#include "prelude.cuh"

constexpr int TILE_ROWS = 16;
constexpr int TILE_COLUMNS = 8;
constexpr int BLOCK_TERMS = 32;

// Byte of element (row, term) of bf16 weights, and of q8 weights' int8 and scale.
DEVICE int64_t narrow_place(int64_t row, int64_t term, int64_t blocks) {
    int64_t block = row / TILE_ROWS * blocks + term / BLOCK_TERMS;
    int r = int(row % TILE_ROWS), k = int(term % BLOCK_TERMS);
    int lane = r % 8 * 4 + k / 8, s = k % 8 / 4, pair = k % 4 / 2;
    return block * 1024 + s * 512 + lane * 16 + (pair * 2 + r / 8) * 4 + k % 2 * 2;
}
constexpr int QUANTISED_BLOCK = 544;
DEVICE int64_t quantised_place(int64_t row, int64_t term, int64_t blocks) {
    int64_t block = row / TILE_ROWS * blocks + term / BLOCK_TERMS;
    int r = int(row % TILE_ROWS), k = int(term % BLOCK_TERMS);
    int lane = r % 8 * 4 + k / 8;
    return block * QUANTISED_BLOCK + lane * 16 + (k % 8 / 4 * 2 + r / 8) * 4 + k % 4;
}
DEVICE int64_t scale_place(int64_t row, int64_t term, int64_t blocks) {
    int64_t block = row / TILE_ROWS * blocks + term / BLOCK_TERMS;
    int r = int(row % TILE_ROWS);
    return block * QUANTISED_BLOCK + 512 + r % 8 * 4 + r / 8 * 2;
}

// Element of activations: `blocks` of 32 terms.
DEVICE int64_t activation_place(int64_t column, int64_t term, int64_t blocks) {
    int64_t block = column / TILE_COLUMNS * blocks + term / BLOCK_TERMS;
    int k = int(term % BLOCK_TERMS);
    return (block * WARP + column % TILE_COLUMNS * 4 + k / 8) * 8 + k % 8;
}

// What is left of RMSNorm when its weight was multiplied in: from a sum of squares of `width` numbers.
DEVICE float norm_factor(float squares, float width, float eps) { return 1.0f / sqrtf(squares / width + eps); }

// A lane's part of a block of weights: fragments of both products.
struct Narrow {
    Pack<uint32_t, 4> words[2];
    static constexpr int BYTES = 1024;

    DEVICE void load(const uint8_t* block) {
        words[0] = load_constant(block + lane_id() * 16);
        words[1] = load_constant(block + 512 + lane_id() * 16);
    }
    DEVICE void load_shared(const uint8_t* block) {
        words[0] = load_pack<uint32_t, 4>(reinterpret_cast<const uint32_t*>(block + lane_id() * 16));
        words[1] = load_pack<uint32_t, 4>(reinterpret_cast<const uint32_t*>(block + 512 + lane_id() * 16));
    }
    // sums += this block times columns of activations.
    template <int COUNT> DEVICE void multiply(float (&sums)[COUNT][4], const Pack<uint32_t, 4> (&x)[COUNT]) const {
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int i = 0; i < COUNT; ++i) multiply_tile(sums[i], words[s].at, x[i].at[2 * s], x[i].at[2 * s + 1]);
    }
};

// Two int8 of a word, from byte FIRST on, as bf16.
template <int FIRST> DEVICE uint32_t widen_bytes(uint32_t word) {
#ifdef ON_CARD
    // 0x43 above a byte below 128 is 128 + that byte; the sign is worth another 128 of what is taken away.
    uint32_t spread, result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(spread) : "r"(word), "r"(0x43434343u), "n"(FIRST == 0 ? 0x4140 : 0x4342));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(result)
        : "r"(spread & 0xff7fff7fu), "r"(0x3f803f80u), "r"((spread & 0xff80ff80u) ^ 0x80008000u));
    return result;
#else
    auto number = [word](int byte) { return from_float<bf16>(float(int8_t(word >> 8 * byte))).bits; };
    return uint32_t(number(FIRST)) | uint32_t(number(FIRST + 1)) << 16;
#endif
}

struct Quantised {
    Pack<uint32_t, 4> words;
    uint32_t scales;
    static constexpr int BYTES = QUANTISED_BLOCK;

    DEVICE void load(const uint8_t* block) {
        words = load_constant(block + lane_id() * 16);
        scales = load_constant_word(block + 512 + lane_id() / 4 * 4);
    }
    DEVICE void load_shared(const uint8_t* block) {
        words = load_pack<uint32_t, 4>(reinterpret_cast<const uint32_t*>(block + lane_id() * 16));
        scales = *reinterpret_cast<const uint32_t*>(block + 512 + lane_id() / 4 * 4);
    }
    template <int COUNT> DEVICE void multiply(float (&sums)[COUNT][4], const Pack<uint32_t, 4> (&x)[COUNT]) const {
        uint32_t a[2][4];
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            a[s][0] = widen_bytes<0>(words.at[2 * s]);
            a[s][1] = widen_bytes<0>(words.at[2 * s + 1]);
            a[s][2] = widen_bytes<2>(words.at[2 * s]);
            a[s][3] = widen_bytes<2>(words.at[2 * s + 1]);
        }
        float upper = half_to_float(uint16_t(scales)), lower = half_to_float(uint16_t(scales >> 16));
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float block[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            multiply_tile(block, a[0], x[i].at[0], x[i].at[1]);
            multiply_tile(block, a[1], x[i].at[2], x[i].at[3]);
            sums[i][0] = fmaf(upper, block[0], sums[i][0]);
            sums[i][1] = fmaf(upper, block[1], sums[i][1]);
            sums[i][2] = fmaf(lower, block[2], sums[i][2]);
            sums[i][3] = fmaf(lower, block[3], sums[i][3]);
        }
    }
};
