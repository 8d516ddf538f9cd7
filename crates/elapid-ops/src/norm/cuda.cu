// RMSNorm and LayerNorm over rows, fused with the addition of the residual stream, forward and backward.
//
// A block owns a row at a time and keeps it in registers, PACKS packs of four elements a thread, so that memory is
// read once, the next row during this one's sums; it goes on to further rows with the weight still in registers. A row's sums have an order that its width
// and the block's size decide. Statistics are made again in backward. Gradients of weight and bias are summed over
// the block's rows in order, then over blocks in order.
//
// Macros: ELEMENT, the type of y, dy and dx; SAVED, the type of x, or of what backward reads as r (float after a
// residual addition, else that of x); CENTER (1: LayerNorm, 0: RMSNorm); PACKS, at least ceil(C / (4 threads)); THREADS, the
// most threads of a block of the first two kernels (1024 unless set: fewer leave more registers).
#include "prelude.cuh"

using T = ELEMENT;
using R = SAVED;

constexpr int PACK = 4;
#ifndef THREADS
#define THREADS 1024
#endif
// Blocks that a multiprocessor shall hold.
#ifndef FORWARD_BLOCKS
#define FORWARD_BLOCKS (THREADS > 1536 / 2 ? 1 : 1536 / THREADS)
#endif
#ifndef BACKWARD_BLOCKS
#define BACKWARD_BLOCKS (THREADS > 1280 / 2 ? 1 : 1280 / THREADS)
#endif

struct ForwardArguments {
    const R* x;  // [T, C]
    int64_t x_stride;
    const float* residual;  // [T, C], or null
    int64_t residual_stride;
    const float* weight;  // [C], or null
    const float* bias;    // [C], or null
    T* y;                 // [T, C]
    int64_t y_stride;
    float* residual_out;  // [T, C]: x + residual, or null
    int64_t residual_out_stride;
    int64_t rows;
    int64_t width;
    double eps;
};

struct BackwardArguments {
    const R* r;  // [T, C]
    int64_t r_stride;
    const float* weight;  // [C], or null
    const T* dy;          // [T, C]
    int64_t dy_stride;
    const float* dsum;  // [T, C]: the gradient that r has besides, or null; may be dr
    int64_t dsum_stride;
    float* dr;  // [T, C], or null
    int64_t dr_stride;
    T* dx;  // [T, C]: dr rounded, or null
    int64_t dx_stride;
    float* partial;  // [blocks, 2, C]: gradients of weight and bias, or null
    int64_t rows;
    int64_t rows_per_block;
    int64_t width;
    double eps;
};

struct ReduceArguments {
    const float* partial;  // [parts, 2, C]
    int64_t parts;
    int64_t width;
    float* dweight;  // [C], or null
    float* dbias;    // [C], or null
};

// Four elements of a row of `width` from `at` on; 0 behind its end. FAST: rows are whole packs at aligned places.
template <bool FAST, class E> DEVICE void fetch(float (&to)[PACK], const E* row, int64_t at, int64_t width) {
    if constexpr (FAST) {
        Pack<E, PACK> pack{};
        if (at < width) pack = load_pack<E, PACK>(row + at);
#pragma unroll
        for (int i = 0; i < PACK; ++i) to[i] = to_float(pack.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < PACK; ++i) to[i] = at + i < width ? to_float(row[at + i]) : 0.0f;
    }
}
template <bool FAST, class E> DEVICE void put(E* row, const float (&from)[PACK], int64_t at, int64_t width) {
    if constexpr (FAST) {
        Pack<E, PACK> pack;
#pragma unroll
        for (int i = 0; i < PACK; ++i) pack.at[i] = from_float<E>(from[i]);
        if (at < width) store_pack<E, PACK>(row + at, pack);
    } else {
#pragma unroll
        for (int i = 0; i < PACK; ++i)
            if (at + i < width) row[at + i] = from_float<E>(from[i]);
    }
}

DEVICE int place(int k) { return (k * int(blockDim.x) + int(threadIdx.x)) * PACK; }

struct Pair {
    float a, b;
};

// As block_sum, for two sums at once; `room` is 64 floats.
DEVICE Pair block_sums(Pair value, float* room) {
    value = {warp_sum(value.a), warp_sum(value.b)};
    int warps = blockDim.x / WARP;
    if (warps == 1) return value;
    __syncthreads();
    if (lane_id() == 0) {
        room[warp_id()] = value.a;
        room[WARP + warp_id()] = value.b;
    }
    __syncthreads();
    bool held = lane_id() < warps;
    return {warp_sum(held ? room[lane_id()] : 0.0f), warp_sum(held ? room[WARP + lane_id()] : 0.0f)};
}

template <bool FAST> DEVICE void forward(const ForwardArguments& args, float* room) {
    int width = int(args.width);
    float weight[PACKS][PACK], bias[PACKS][PACK];
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            weight[k][i] = 1.0f;
            bias[k][i] = 0.0f;
        }
        if (args.weight) fetch<FAST>(weight[k], args.weight, place(k), width);
        if (args.bias) fetch<FAST>(bias[k], args.bias, place(k), width);
    }
    float count = float(width);
    // Of the row that comes: its loads are under way while this one's sums are.
    float x[PACKS][PACK], residual[PACKS][PACK];
    auto load = [&](int64_t row) {
#pragma unroll
        for (int k = 0; k < PACKS; ++k) {
            fetch<FAST>(x[k], args.x + row * args.x_stride, place(k), width);
            if (args.residual)
                fetch<FAST>(residual[k], args.residual + row * args.residual_stride, place(k), width);
        }
    };
    if (blockIdx.x < args.rows) load(blockIdx.x);
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        float r[PACKS][PACK];
#pragma unroll
        for (int k = 0; k < PACKS; ++k)
#pragma unroll
            for (int i = 0; i < PACK; ++i) r[k][i] = args.residual ? x[k][i] + residual[k][i] : x[k][i];
        if (row + gridDim.x < args.rows) load(row + gridDim.x);
        if (args.residual_out) {
            float* to = args.residual_out + row * args.residual_out_stride;
#pragma unroll
            for (int k = 0; k < PACKS; ++k) put<FAST>(to, r[k], place(k), width);
        }
        float mean = 0.0f, square = 0.0f;
        if (CENTER) {
            float sum = 0.0f;
#pragma unroll
            for (int k = 0; k < PACKS; ++k)
#pragma unroll
                for (int i = 0; i < PACK; ++i) sum += r[k][i];
            mean = block_sum(sum, room) / count;
        }
#pragma unroll
        for (int k = 0; k < PACKS; ++k)
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                float part = r[k][i] - mean;
                if (place(k) + i < width) square = fmaf(part, part, square);
            }
        float scale = 1.0f / sqrtf(block_sum(square, room) / count + float(args.eps));
#pragma unroll
        for (int k = 0; k < PACKS; ++k) {
            float y[PACK];
#pragma unroll
            for (int i = 0; i < PACK; ++i) y[i] = fmaf((r[k][i] - mean) * scale, weight[k][i], bias[k][i]);
            put<FAST>(args.y + row * args.y_stride, y, place(k), width);
        }
    }
}

// Any number of blocks along x, whole warps a block. Results do not depend on the number of blocks.
KERNEL(norm_forward, ForwardArguments, THREADS, FORWARD_BLOCKS) {
    __shared__ float room[WARP];
    bool fast = args.width % PACK == 0 && packable<R, PACK>(args.x, args.x_stride) &&
                packable<T, PACK>(args.y, args.y_stride) && packable<float, PACK>(args.residual, args.residual_stride) &&
                packable<float, PACK>(args.residual_out, args.residual_out_stride) &&
                packable<float, PACK>(args.weight, 0) && packable<float, PACK>(args.bias, 0);
    if (fast) forward<true>(args, room);
    else forward<false>(args, room);
}

template <bool FAST> DEVICE void backward(const BackwardArguments& args, float* room) {
    int width = int(args.width);
    float weight[PACKS][PACK], dweight[PACKS][PACK], dbias[PACKS][PACK];
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            weight[k][i] = 1.0f;
            dweight[k][i] = 0.0f;
            dbias[k][i] = 0.0f;
        }
        if (args.weight) fetch<FAST>(weight[k], args.weight, place(k), width);
    }
    float count = float(width);
    int64_t first = int64_t(blockIdx.x) * args.rows_per_block;
    int64_t last = least(first + args.rows_per_block, args.rows);
    // As in forward.
    float next_r[PACKS][PACK], next_dy[PACKS][PACK], next_dsum[PACKS][PACK];
    auto load = [&](int64_t row) {
#pragma unroll
        for (int k = 0; k < PACKS; ++k) {
            fetch<FAST>(next_r[k], args.r + row * args.r_stride, place(k), width);
            fetch<FAST>(next_dy[k], args.dy + row * args.dy_stride, place(k), width);
            if (args.dsum) fetch<FAST>(next_dsum[k], args.dsum + row * args.dsum_stride, place(k), width);
        }
    };
    if (first < last) load(first);
    for (int64_t row = first; row < last; ++row) {
        float r[PACKS][PACK], dy[PACKS][PACK], dsum[PACKS][PACK];
#pragma unroll
        for (int k = 0; k < PACKS; ++k)
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                r[k][i] = next_r[k][i];
                dy[k][i] = next_dy[k][i];
                dsum[k][i] = args.dsum ? next_dsum[k][i] : 0.0f;
            }
        if (row + 1 < last) load(row + 1);
        // Sums of r and of g = dy weight.
        float mean = 0.0f, middle = 0.0f;
        if (CENTER) {
            Pair sums = {0.0f, 0.0f};
#pragma unroll
            for (int k = 0; k < PACKS; ++k)
#pragma unroll
                for (int i = 0; i < PACK; ++i) {
                    sums.a += r[k][i];
                    sums.b = fmaf(dy[k][i], weight[k][i], sums.b);
                }
            sums = block_sums(sums, room);
            mean = sums.a / count;
            middle = sums.b / count;
        }
        // Of the squares and of g (r - mean).
        Pair sums = {0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < PACKS; ++k)
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                if (place(k) + i >= width) continue;
                float part = r[k][i] - mean;
                sums.a = fmaf(part, part, sums.a);
                sums.b = fmaf(dy[k][i] * weight[k][i], part, sums.b);
            }
        sums = block_sums(sums, room);
        float scale = 1.0f / sqrtf(sums.a / count + float(args.eps));
        float along = sums.b * scale / count;
#pragma unroll
        for (int k = 0; k < PACKS; ++k) {
            float dr[PACK];
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                float normed = (r[k][i] - mean) * scale;
                float grad = scale * (dy[k][i] * weight[k][i] - middle - normed * along);
                dr[i] = dsum[k][i] + grad;
                dweight[k][i] = fmaf(dy[k][i], normed, dweight[k][i]);
                dbias[k][i] += dy[k][i];
            }
            if (args.dr) put<FAST>(args.dr + row * args.dr_stride, dr, place(k), width);
            if (args.dx) put<FAST>(args.dx + row * args.dx_stride, dr, place(k), width);
        }
    }
    if (!args.partial) return;
    float* to = args.partial + int64_t(blockIdx.x) * 2 * width;
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
        put<FAST>(to, dweight[k], place(k), width);
        put<FAST>(to + width, dbias[k], place(k), width);
    }
}

// Grid: ceil(rows / rows_per_block), whole warps a block.
KERNEL(norm_backward, BackwardArguments, THREADS, BACKWARD_BLOCKS) {
    __shared__ float room[2 * WARP];
    bool fast = args.width % PACK == 0 && packable<R, PACK>(args.r, args.r_stride) &&
                packable<T, PACK>(args.dy, args.dy_stride) && packable<float, PACK>(args.dsum, args.dsum_stride) &&
                packable<float, PACK>(args.dr, args.dr_stride) && packable<T, PACK>(args.dx, args.dx_stride) &&
                packable<float, PACK>(args.weight, 0) && packable<float, PACK>(args.partial, args.width);
    if (fast) backward<true>(args, room);
    else backward<false>(args, room);
}

// Grid: ceil(2 C / 32), block: 32 lanes of neighbouring values times up to 32 warps over the parts. The warps' sums
// run over parts warp, warp + warps, ... and are then added in order.
KERNEL(norm_parameters, ReduceArguments, 1024, 1) {
    __shared__ float room[WARP][WARP + 1];
    int64_t k = int64_t(blockIdx.x) * WARP + lane_id(), size = 2 * args.width;
    int warps = blockDim.x / WARP;
    float sum = 0.0f;
    if (k < size) {
#pragma unroll 8
        for (int64_t part = warp_id(); part < args.parts; part += warps) sum += args.partial[part * size + k];
    }
    room[warp_id()][lane_id()] = sum;
    __syncthreads();
    if (warp_id() > 0 || k >= size) return;
    for (int warp = 1; warp < warps; ++warp) sum += room[warp][lane_id()];
    float* to = k < args.width ? args.dweight : args.dbias;
    if (to) to[k < args.width ? k : k - args.width] = sum;
}
