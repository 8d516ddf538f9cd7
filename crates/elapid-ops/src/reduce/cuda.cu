// Sums and maxima over the middle extent of [outer, count, inner].
//
// A sum is cut into parts of `each` summands. The threads of a part add every so many summands in order, in f32, and
// their sums are added in a fixed order; where there are several parts, each leaves its sum in a workspace, and a
// second kernel adds these in f64. How it is cut depends on `count`, `inner` and the type alone, so the bits are the
// same on every card and for one row as for many. A maximum is the same in any order.
//
// Macros: ELEMENT, the type of what is reduced; RESULT, that of the sums.
#include "prelude.cuh"

using T = ELEMENT;

constexpr int THREADS = 256;

struct SumArguments {
    const T* x;      // [outer, count, inner]
    float* partial;  // [outer, parts, inner], or null: one part
    RESULT* out;     // [outer, inner]
    int64_t outer;
    int64_t count;
    int64_t inner;
    int64_t parts;
    int64_t each;   // summands of a part
    int64_t lanes;  // neighbouring threads of one row: a power of two up to 32; in reduce_rows also 256
    double factor;  // of the final sum
};

struct MaxArguments {
    const T* x;       // [outer, count, inner]
    T* values;        // [outer, inner]
    int64_t* places;  // [outer, inner]: where along count the largest stands first
    int64_t outer;
    int64_t count;
    int64_t inner;
};

struct PlaceArguments {
    const T* dy;            // [outer, inner]
    const int64_t* places;  // [outer, inner]
    T* dx;                  // [outer, count, inner], zeros
    int64_t outer;
    int64_t count;
    int64_t inner;
};

// Up to PACK elements from `from` on; 0 behind `count`.
template <class E, int PACK> DEVICE void fetch(float (&to)[PACK], const E* from, int64_t count) {
    if (count >= PACK && packable<E, PACK>(from, 0)) {
        Pack<E, PACK> pack = load_pack<E, PACK>(from);
#pragma unroll
        for (int i = 0; i < PACK; ++i) to[i] = to_float(pack.at[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < PACK; ++i) to[i] = i < count ? to_float(from[i]) : 0.0f;
}

// Any number of blocks of 256 threads; inner is 1.
KERNEL(reduce_rows, SumArguments, THREADS, 4) {
    __shared__ float room[WARP];
    constexpr int PACK = 16 / sizeof(T);
    int64_t lanes = args.lanes, together = THREADS / lanes, lane = threadIdx.x % lanes;
    int64_t all = args.outer * args.parts;
    // Whole blocks go round together, as all threads have to meet.
    for (int64_t first = blockIdx.x * together; first < all; first += gridDim.x * together) {
        int64_t at = first + threadIdx.x / lanes, row = at / args.parts, begin = (at - row * args.parts) * args.each;
        int64_t length = at < all ? least(args.each, args.count - begin) : 0;
        const T* from = args.x + row * args.count + begin;
        float sums[PACK] = {};
#pragma unroll 4
        for (int64_t k = lane * PACK; k < length; k += lanes * PACK) {
            float values[PACK];
            fetch<T, PACK>(values, from + k, length - k);
#pragma unroll
            for (int i = 0; i < PACK; ++i) sums[i] += values[i];
        }
        float sum = sums[0];
#pragma unroll
        for (int i = 1; i < PACK; ++i) sum += sums[i];
        if (lanes == THREADS) {
            sum = block_sum(sum, room);
        } else {
            for (int step = int(lanes) / 2; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
        }
        if (lane > 0 || at >= all) continue;
        if (args.partial) {
            args.partial[at] = sum;
        } else {
            args.out[at] = from_float<RESULT>(float(sum * args.factor));
        }
    }
}

// Sums of columns of x [outer, count, inner], added in type SUM; `lanes` threads with PACK columns each share a row,
// and the rows of a part go round the groups of so many threads.
template <class SUM, class E>
DEVICE void columns(const E* x, const SumArguments& args, int64_t count, int64_t parts, int64_t each, float* partial) {
    constexpr int PACK = 16 / sizeof(E);
    __shared__ SUM room[THREADS * PACK];
    int64_t lanes = args.lanes, groups = THREADS / lanes, inner = args.inner, tile = lanes * PACK;
    int64_t lane = threadIdx.x % lanes, group = threadIdx.x / lanes, tiles = ceil_div(inner, tile);
    for (int64_t at = blockIdx.x; at < args.outer * parts * tiles; at += gridDim.x) {
        int64_t piece = at / tiles, base = (at - piece * tiles) * tile, c = base + lane * PACK;
        int64_t o = piece / parts, begin = (piece - o * parts) * each, end = least(begin + each, count);
        const E* from = x + o * count * inner + c;
        SUM sums[PACK] = {};
        if (c < inner) {
#pragma unroll 4
            for (int64_t k = begin + group; k < end; k += groups) {
                float values[PACK];
                fetch<E, PACK>(values, from + k * inner, inner - c);
#pragma unroll
                for (int i = 0; i < PACK; ++i) sums[i] += values[i];
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PACK; ++i) room[group * tile + lane * PACK + i] = sums[i];
        __syncthreads();
        for (int64_t k = threadIdx.x; k < tile && base + k < inner; k += THREADS) {
            SUM sum = room[k];
            for (int64_t g = 1; g < groups; ++g) sum += room[g * tile + k];
            if (partial) {
                partial[piece * inner + base + k] = float(sum);
            } else {
                args.out[o * inner + base + k] = from_float<RESULT>(float(sum * args.factor));
            }
        }
    }
}

// Any number of blocks of 256 threads.
KERNEL(reduce_columns, SumArguments, THREADS, 4) {
    columns<float>(args.x, args, args.count, args.parts, args.each, args.partial);
}

// As above, after one of the kernels above: adds its parts. `lanes` may be another than there.
KERNEL(reduce_parts, SumArguments, THREADS, 4) {
    columns<double>(static_cast<const float*>(args.partial), args, args.parts, 1, args.parts, nullptr);
}

// -inf, which has no name in the language.
DEVICE float lowest() { return float_of(0xff800000u); }

struct Best {
    float value;
    int64_t place;
};

// NaN is larger than everything; the first of equals is taken.
DEVICE Best better(Best a, Best b) {
    bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    bool equal = a.value == b.value || (a_nan && b_nan);
    bool second = equal ? b.place < a.place : b_nan || (!a_nan && b.value > a.value);
    return second ? b : a;
}

DEVICE Best warp_best(Best best) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        Best other = {__shfl_xor_sync(FULL_WARP, best.value, step), __shfl_xor_sync(FULL_WARP, best.place, step)};
        best = better(best, other);
    }
    return best;
}

// A place behind all others: what a thread without elements offers.
constexpr int64_t NOWHERE = 0x7fffffffffffffffll;

// Any number of blocks along x, whole warps a block; inner is 1 and count at least 1.
KERNEL(max_rows, MaxArguments, THREADS, 4) {
    __shared__ float values[WARP];
    __shared__ int64_t places[WARP];
    int warps = blockDim.x / WARP;
    for (int64_t row = blockIdx.x; row < args.outer; row += gridDim.x) {
        Best best = {lowest(), NOWHERE};
        for (int64_t k = threadIdx.x; k < args.count; k += blockDim.x)
            best = better(best, Best{to_float(args.x[row * args.count + k]), k});
        best = warp_best(best);
        __syncthreads();
        if (lane_id() == 0) {
            values[warp_id()] = best.value;
            places[warp_id()] = best.place;
        }
        __syncthreads();
        if (threadIdx.x > 0) continue;
        for (int warp = 1; warp < warps; ++warp) best = better(best, Best{values[warp], places[warp]});
        args.values[row] = from_float<T>(best.value);
        args.places[row] = best.place;
    }
}

// Any number of blocks along x, any block; count is at least 1.
KERNEL(max_columns, MaxArguments, THREADS, 4) {
    int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, all = args.outer * args.inner;
    for (; at < all; at += int64_t(gridDim.x) * blockDim.x) {
        int64_t o = at / args.inner, i = at - o * args.inner;
        const T* from = args.x + o * args.count * args.inner + i;
        Best best = {lowest(), NOWHERE};
        for (int64_t k = 0; k < args.count; ++k) best = better(best, Best{to_float(from[k * args.inner]), k});
        args.values[at] = from_float<T>(best.value);
        args.places[at] = best.place;
    }
}

// Any number of blocks along x, any block.
KERNEL(max_backward, PlaceArguments, THREADS, 4) {
    int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, all = args.outer * args.inner;
    for (; at < all; at += int64_t(gridDim.x) * blockDim.x) {
        int64_t o = at / args.inner, i = at - o * args.inner;
        args.dx[(o * args.count + args.places[at]) * args.inner + i] = args.dy[at];
    }
}
