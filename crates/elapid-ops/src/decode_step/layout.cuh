// How weights and activations of decode steps lie in memory: in the order in which lanes hold the fragments of the
// tensor cores' 16 x 8 x 16 product, so that a warp's load is one run of whole sectors.
//
// Weights [rows, K] are cut into tiles of 16 rows and blocks of 32 columns, zeros filling up; the blocks of a tile follow one
// another. With g = lane / 4 and t = lane % 4, a lane's numbers within a block belong to columns 8 t to 8 t + 7.
//   bf16: for each half s of a block and each lane 8 numbers: rows g, g + 8, g, g + 8, columns 8 t + 4 s + {0, 1, 0, 1 and 2,
//         3, 2, 3} in pairs.
//   q8:   for each lane 16 int8: rows g, g + 8, g, g + 8, columns 8 t + {0 2 1 3, 0 2 1 3, 4 6 5 7, 4 6 5 7}: every other byte
//         of a word is widened at once; then for each g the scales of rows g and g + 8 in half precision: 544 bytes a block.
// Activations [columns, K] in bf16: tiles of 8 columns, blocks of 32, of which each has four matrices (first those of half
// s = 0) of 8 columns by 8 terms, column by column: terms 8 t + 4 s + 2 h + {0, 1} of t = 0 to 3. So a matrix is 128
// neighbouring bytes in which a lane finds its word at its own place, and which the tensor cores read from shared memory.
#pragma once
#include "prelude.cuh"
#include "decode_groups.cuh"

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
    return block * QUANTISED_BLOCK + lane * 16 + (k % 8 / 4 * 2 + r / 8) * 4 + k % 2 * 2 + k % 4 / 2;
}
DEVICE int64_t scale_place(int64_t row, int64_t term, int64_t blocks) {
    int64_t block = row / TILE_ROWS * blocks + term / BLOCK_TERMS;
    int r = int(row % TILE_ROWS);
    return block * QUANTISED_BLOCK + 512 + r % 8 * 4 + r / 8 * 2;
}

// Element of activations: `blocks` of 32 terms.
DEVICE int64_t activation_place(int64_t column, int64_t term, int64_t blocks) {
    uint32_t c = uint32_t(column), k = uint32_t(term);
    uint32_t block = c / TILE_COLUMNS * uint32_t(blocks) + k / BLOCK_TERMS;
    return int64_t(block) * 256 + ((k % 8 / 2 * TILE_COLUMNS + c % TILE_COLUMNS) * 8 + k % BLOCK_TERMS / 8 * 2 + k % 2);
}
// Two numbers as bf16, the first in the lower half.
DEVICE uint32_t pair_of(float low, float high) {
    return uint32_t(from_float<bf16>(low).bits) | uint32_t(from_float<bf16>(high).bits) << 16;
}
// Bytes of a block of a tile of columns, and of one of its matrices.
constexpr int COLUMN_BLOCK = 512;
constexpr int MATRIX = 128;

// A lane's words of a block that an earlier kernel wrote, of both products, in order.
DEVICE Pack<uint32_t, 4> load_columns(const uint8_t* block) {
    Pack<uint32_t, 4> words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = load_fresh(reinterpret_cast<const uint32_t*>(block + i * MATRIX) + lane_id());
    return words;
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
    // A warp's copy of a block to shared memory, which goes on by itself.
    static DEVICE void copy(uint8_t* shared, const uint8_t* block) {
        copy_async(shared + lane_id() * 16, block + lane_id() * 16);
        copy_async(shared + 512 + lane_id() * 16, block + 512 + lane_id() * 16);
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
    // The blocks' products, from block FIRST on, as multiply_shared begins them.
    template <int FIRST, int STRIDE, int BLOCKS, int COUNT>
    static DEVICE void multiply_from(float (&sums)[COUNT][4], const Narrow (&blocks)[BLOCKS], const uint8_t* columns) {
        multiply_group<FIRST * COLUMN_BLOCK, MATRIX, STRIDE>(sums, blocks[FIRST].words[0].at, columns);
        multiply_group<FIRST * COLUMN_BLOCK + 2 * MATRIX, MATRIX, STRIDE>(sums, blocks[FIRST].words[1].at, columns);
        if constexpr (FIRST + 1 < BLOCKS) multiply_from<FIRST + 1, STRIDE>(sums, blocks, columns);
    }
    // The same of some blocks with COUNT tiles of columns in shared memory, by a group of four warps that have other rows and
    // the same columns: block k's tiles stand from `columns + k * COLUMN_BLOCK` on, STRIDE bytes apart. `during` runs when
    // the tensor cores have begun.
    template <int STRIDE, int BLOCKS, int COUNT, class During>
    static DEVICE void multiply_shared(float (&sums)[COUNT][4], const Narrow (&blocks)[BLOCKS], const uint8_t* columns, During during) {
        start_group(sums);
        multiply_from<0, STRIDE>(sums, blocks, columns);
        begin_group();
        during();
        end_group(sums);
    }
    // The same between start_group and end_group, the fragments from `weights` on, block by block, each loaded while the tensor
    // cores are at the one before: the last block goes on when this returns. `during` runs when nothing is under way that was
    // begun before.
    template <int STRIDE, int BLOCKS, int AT = 0, int COUNT, class During>
    static DEVICE void multiply_on(float (&sums)[COUNT][4], Narrow (&blocks)[BLOCKS], const uint8_t* weights, const uint8_t* columns,
                                   During during) {
        static_assert(BLOCKS >= 2, "fragments that nobody reads while they are loaded");
        blocks[AT].load_shared(weights + AT * BYTES);
        show_registers();
        multiply_group<AT * COLUMN_BLOCK, MATRIX, STRIDE>(sums, blocks[AT].words[0].at, columns);
        multiply_group<AT * COLUMN_BLOCK + 2 * MATRIX, MATRIX, STRIDE>(sums, blocks[AT].words[1].at, columns);
        begin_group();
        wait_for_earlier_group();
        if constexpr (AT == 0) during();
        if constexpr (AT + 1 < BLOCKS) multiply_on<STRIDE, BLOCKS, AT + 1>(sums, blocks, weights, columns, during);
    }
};

// Two int8 of a word as bf16: bytes 0 and 2, or 1 and 3.
template <int FIRST> DEVICE uint32_t widen_bytes(uint32_t word) {
    uint32_t own = word >> (8 * FIRST);
#ifdef ON_CARD
    // 0x43 above a byte below 128 is 128 + that byte; the sign is worth another 128 of what is taken away.
    uint32_t result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(result)
        : "r"((own & (0x00800080u + hidden_zero())) | 0x43004300u), "r"(0xbf80bf80u),
          "r"((own & (0x007f007fu + hidden_zero())) | 0x43004300u));
    return result;
#else
    auto number = [own](int byte) { return from_float<bf16>(float(int8_t(own >> 8 * byte))).bits; };
    return uint32_t(number(0)) | uint32_t(number(2)) << 16;
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
    static DEVICE void copy(uint8_t* shared, const uint8_t* block) {
        copy_async(shared + lane_id() * 16, block + lane_id() * 16);
        if (lane_id() < 2) copy_async(shared + 512 + lane_id() * 16, block + 512 + lane_id() * 16);
    }
    DEVICE void load_shared(const uint8_t* block) {
        words = load_pack<uint32_t, 4>(reinterpret_cast<const uint32_t*>(block + lane_id() * 16));
        scales = *reinterpret_cast<const uint32_t*>(block + 512 + lane_id() / 4 * 4);
    }
    DEVICE void widen(uint32_t (&a)[2][4]) const {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            a[s][0] = widen_bytes<0>(words.at[2 * s]);
            a[s][1] = widen_bytes<0>(words.at[2 * s + 1]);
            a[s][2] = widen_bytes<1>(words.at[2 * s]);
            a[s][3] = widen_bytes<1>(words.at[2 * s + 1]);
        }
    }
    // sums += the scales times a block's sums.
    DEVICE void scale(float (&sums)[4], const float (&block)[4]) const {
        float upper = half_to_float(uint16_t(scales)), lower = half_to_float(uint16_t(scales >> 16));
        sums[0] = fmaf(upper, block[0], sums[0]);
        sums[1] = fmaf(upper, block[1], sums[1]);
        sums[2] = fmaf(lower, block[2], sums[2]);
        sums[3] = fmaf(lower, block[3], sums[3]);
    }
    template <int COUNT> DEVICE void multiply(float (&sums)[COUNT][4], const Pack<uint32_t, 4> (&x)[COUNT]) const {
        uint32_t a[2][4];
        widen(a);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float block[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            multiply_tile(block, a[0], x[i].at[0], x[i].at[1]);
            multiply_tile(block, a[1], x[i].at[2], x[i].at[3]);
            scale(sums[i], block);
        }
    }
    template <int STRIDE, int BLOCKS, int COUNT, class During>
    static DEVICE void multiply_shared(float (&sums)[COUNT][4], const Quantised (&blocks)[BLOCKS], const uint8_t* columns, During during) {
#pragma unroll
        for (int k = 0; k < BLOCKS; ++k) {
            uint32_t a[2][4];
            blocks[k].widen(a);
            float block[COUNT][4];
#pragma unroll
            for (int i = 0; i < COUNT; ++i) block[i][0] = block[i][1] = block[i][2] = block[i][3] = 0.0f;
            start_group(block);
            multiply_group<0, MATRIX, STRIDE>(block, a[0], columns + k * COLUMN_BLOCK);
            multiply_group<2 * MATRIX, MATRIX, STRIDE>(block, a[1], columns + k * COLUMN_BLOCK);
            begin_group();
            if (k == 0) during();
            end_group(block);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) blocks[k].scale(sums[i], block[i]);
        }
    }
};
