// Softmax cross entropy of a chunk of logits, and its gradient in their place.
//
// A block owns one row: it reads the row once, keeping it in shared memory, with the largest logit and the sum of
// exponentials made on the way, and then writes the gradient once. Rows beyond shared memory are read twice. A
// thread meets the same elements in both passes, so the gradient may overwrite the logits. A row's bits depend on its
// width, its alignment and the block's size alone.
//
// Macros: LOGIT, the type of the logits; ELEMENT, that of the gradient.
#include "prelude.cuh"

using L = LOGIT;
using T = ELEMENT;

// Elements of a 16-byte load.
constexpr int PACK = 16 / int(sizeof(L));
constexpr int GROUP = 4;
constexpr int64_t IGNORED = -100;
// Below every logit, and finite so that differences are.
constexpr float LOWEST = -3.402823466e38f;

struct Arguments {
    const L* logits;  // [rows, V]
    int64_t logits_stride;
    const int64_t* targets;  // [rows]: below real_vocab, or IGNORED
    float* losses;           // [rows]: 0 where ignored; or null
    float* log_sum_exp;      // [rows]: 0 where ignored; or null
    T* gradient;             // [rows, V], 0 from real_vocab on and where ignored; or null. Without `cached` it may
                             // overlap logits only if the types are of one size and the strides agree
    int64_t gradient_stride;
    const float* scale;  // one number, or null for 1
    double factor;       // the gradient is that of factor scale Σ loss
    int64_t rows;
    int64_t vocab;       // V
    int64_t real_vocab;  // classes that take part
    int64_t cached;      // 1 if the shared memory holds real_vocab + PACK logits
};

// A sum of exponentials of differences from the largest.
struct Sum {
    float largest, sum;
};

DEVICE float power(float x, float largest) { return exp2_fast((x - largest) * LOG2_E); }

DEVICE Sum both(Sum a, Sum b) {
    float largest = fmaxf(a.largest, b.largest);
    return {largest, a.sum * power(a.largest, largest) + b.sum * power(b.largest, largest)};
}

DEVICE Sum warp_both(Sum value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        Sum other = {__shfl_xor_sync(FULL_WARP, value.largest, step), __shfl_xor_sync(FULL_WARP, value.sum, step)};
        value = both(value, other);
    }
    return value;
}

DEVICE Sum block_both(Sum value, Sum* room) {
    value = warp_both(value);
    if (lane_id() == 0) room[warp_id()] = value;
    __syncthreads();
    bool held = lane_id() < int(blockDim.x) / WARP;
    return warp_both(held ? room[lane_id()] : Sum{LOWEST, 0.0f});
}

DEVICE void add(Sum& to, float x) { to = both(to, Sum{x, 1.0f}); }

DEVICE void add(Sum& to, const Pack<L, PACK>& pack) {
    float largest = to.largest;
#pragma unroll
    for (int i = 0; i < PACK; ++i) largest = fmaxf(largest, to_float(pack.at[i]));
    float sum = to.sum * power(to.largest, largest);
#pragma unroll
    for (int i = 0; i < PACK; ++i) sum += power(to_float(pack.at[i]), largest);
    to = {largest, sum};
}

struct TotalArguments {
    const float* losses;  // [rows]
    const float* scale;   // one number
    float* total;         // one number
    int64_t rows;
};

// total = scale Σ losses. Grid: 1, block: always 1024 threads, as they decide the order of the sum.
KERNEL(cross_entropy_total, TotalArguments, 1024, 1) {
    __shared__ float room[WARP];
    float sum = 0.0f;
    for (int64_t row = threadIdx.x; row < args.rows; row += blockDim.x) sum += args.losses[row];
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) *args.total = sum * *args.scale;
}

// Grid: (rows), block: whole warps, shared: 0, or 16 ceil((real_vocab + PACK) sizeof(LOGIT) / 16) bytes if cached.
KERNEL(cross_entropy, Arguments, 1024, 1) {
    DYNAMIC_SHARED(L, cache);
    __shared__ Sum room[WARP];
    int64_t row = blockIdx.x, classes = args.real_vocab;
    int64_t target = args.targets[row];
    T* gradient = args.gradient ? args.gradient + row * args.gradient_stride : nullptr;
    if (target == IGNORED) {
        if (threadIdx.x == 0) {
            if (args.losses) args.losses[row] = 0.0f;
            if (args.log_sum_exp) args.log_sum_exp[row] = 0.0f;
        }
        if (!gradient) return;
        int64_t head = (PACK - int64_t(reinterpret_cast<uint64_t>(gradient) / sizeof(T) % PACK)) % PACK;
        head = least(head, args.vocab);
        int64_t packs = (args.vocab - head) / PACK;
        Pack<T, PACK> nothing;
#pragma unroll
        for (int i = 0; i < PACK; ++i) nothing.at[i] = from_float<T>(0.0f);
        for (int64_t k = threadIdx.x; k < packs; k += blockDim.x)
            store_pack<T, PACK>(gradient + head + k * PACK, nothing);
        for (int64_t c = threadIdx.x; c < head; c += blockDim.x) gradient[c] = nothing.at[0];
        for (int64_t c = head + packs * PACK + threadIdx.x; c < args.vocab; c += blockDim.x)
            gradient[c] = nothing.at[0];
        return;
    }
    const L* logits = args.logits + row * args.logits_stride;
    // Single elements up to the first aligned pack, packs, and single elements behind the last.
    int64_t head = (PACK - int64_t(reinterpret_cast<uint64_t>(logits) / sizeof(L) % PACK)) % PACK;
    head = least(head, classes);
    int64_t packs = (classes - head) / PACK, tail = head + packs * PACK;
    // So that packs are aligned in shared memory, too.
    int64_t shift = (PACK - head) % PACK;
    bool cached = args.cached != 0;

    // A target that is no class makes the loss NaN: it is seen, and nothing outside of the row is read.
    bool is_class = target >= 0 && target < classes;
    float wanted = is_class ? to_float(logits[target]) : float_of(0x7fc00000u);
    Sum sum = {LOWEST, 0.0f};
    auto single = [&](int64_t c) {
        L x = logits[c];
        if (cached) cache[shift + c] = x;
        add(sum, to_float(x));
    };
    for (int64_t c = threadIdx.x; c < head; c += blockDim.x) single(c);
    const L* body = logits + head;
    L* kept = cache + shift + head;
    int64_t k = threadIdx.x, hop = blockDim.x;
    for (; k + (GROUP - 1) * hop < packs; k += GROUP * hop) {
        Pack<L, PACK> group[GROUP];
#pragma unroll
        for (int j = 0; j < GROUP; ++j) group[j] = load_pack<L, PACK>(body + (k + j * hop) * PACK);
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            if (cached) store_pack<L, PACK>(kept + (k + j * hop) * PACK, group[j]);
            add(sum, group[j]);
        }
    }
    for (; k < packs; k += hop) {
        Pack<L, PACK> pack = load_pack<L, PACK>(body + k * PACK);
        if (cached) store_pack<L, PACK>(kept + k * PACK, pack);
        add(sum, pack);
    }
    for (int64_t c = tail + threadIdx.x; c < classes; c += blockDim.x) single(c);

    // All have read the target's logit, and with a cache the whole row, when any goes on to write.
    sum = block_both(sum, room);
    float log_sum = logf(sum.sum);
    if (threadIdx.x == 0) {
        if (args.losses) args.losses[row] = log_sum + (sum.largest - wanted);
        if (args.log_sum_exp) args.log_sum_exp[row] = log_sum + sum.largest;
    }
    if (!gradient) return;
    float scale = float(args.factor) * (args.scale ? *args.scale : 1.0f);
    float share = scale / sum.sum;
    float at_target = (power(wanted, sum.largest) / sum.sum - 1.0f) * scale;
    const L* source = cached ? cache + shift : logits;
    auto finish = [&](int64_t c) {
        gradient[c] = from_float<T>(c == target ? at_target : power(to_float(source[c]), sum.largest) * share);
    };
    bool whole = reinterpret_cast<uint64_t>(gradient + head) % (sizeof(T) * PACK) == 0;
    for (int64_t c = threadIdx.x; c < head; c += blockDim.x) finish(c);
    for (k = threadIdx.x; k < packs; k += hop) {
        int64_t c = head + k * PACK;
        Pack<L, PACK> pack = load_pack<L, PACK>(source + c);
        Pack<T, PACK> out;
#pragma unroll
        for (int i = 0; i < PACK; ++i) out.at[i] = from_float<T>(power(to_float(pack.at[i]), sum.largest) * share);
        if (target >= c && target < c + PACK) {
            int hit = int(target - c);
#pragma unroll
            for (int i = 0; i < PACK; ++i)
                if (i == hit) out.at[i] = from_float<T>(at_target);
        }
        if (whole) {
            store_pack<T, PACK>(gradient + c, out);
        } else {
#pragma unroll
            for (int i = 0; i < PACK; ++i) gradient[c + i] = out.at[i];
        }
    }
    for (int64_t c = tail + threadIdx.x; c < classes; c += blockDim.x) finish(c);
    for (int64_t c = classes + threadIdx.x; c < args.vocab; c += blockDim.x) gradient[c] = from_float<T>(0.0f);
}
