// AdamW over all parameters in one launch, and the global norm of their gradients.
//
// Every block takes one chunk of CHUNK elements of one tensor. The numbers that change from step to step and the
// factor that clips are read from device memory, so a recorded graph replays with new ones. The norm is a sum of f64
// over elements of a thread, threads of a block, and chunks, in an order that the tensors' lengths alone decide.
//
#include "prelude.cuh"

using G = float;

constexpr int PACK = 4;
// Elements of a block.
constexpr int64_t CHUNK = 8192;

struct Tensor {
    float* p;
    const G* g;
    float* m;
    float* v;
    int64_t len;
    int64_t first_chunk;  // chunks of the tensors before this one: the sum of ceil(len / CHUNK)
    double weight_decay;
    double rate;  // times the learning rate
};

// The step's numbers as in the CPU code, f32 each.
struct Factors {
    float learning_rate;
    float beta1;
    float rest1;  // 1 - beta1
    float beta2;
    float rest2;        // 1 - beta2
    float step_size;    // lr / (1 - beta1^step)
    float root_factor;  // 1 / sqrt(1 - beta2^step)
    float epsilon;
    float clip_norm;   // largest global norm, or 0 for any
    float grad_factor;  // what the stored gradients are multiplied by first (1 / loss scale, 1 / tokens)
    float limit;        // a norm above it is no step to take, or 0 for any
    float unused;
};

// What the norm's last kernel leaves.
struct Norm {
    double norm;  // of grad_factor g
    float grad_scale;  // grad_factor times the clipping factor
    int32_t sound;     // 0 if a gradient is inf or NaN, or the norm above the limit
};

struct StepArguments {
    const Tensor* tensors;
    int64_t tensor_count;
    const Factors* factors;
    const Norm* norm;
};

struct SquaresArguments {
    const Tensor* tensors;
    int64_t tensor_count;
    double* partial;  // [chunks]
};

struct NormArguments {
    const double* partial;  // [chunks]
    int64_t chunks;
    const Factors* factors;
    Norm* norm;
};

struct Span {
    Tensor tensor;
    int64_t first, last;
};

DEVICE Span own_span(const Tensor* tensors, int64_t count) {
    int64_t low = 0, high = count - 1, chunk = blockIdx.x;
    // The last tensor whose first chunk is not behind this one; tensors without elements have no chunk.
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (tensors[middle].first_chunk <= chunk) low = middle;
        else high = middle - 1;
    }
    Span span = {tensors[low], 0, 0};
    span.first = (chunk - span.tensor.first_chunk) * CHUNK;
    span.last = least(span.first + CHUNK, span.tensor.len);
    return span;
}

// Grid: chunks of all tensors (at least one), any block.
KERNEL(adamw_step, StepArguments, 512, 2) {
    Span span = own_span(args.tensors, args.tensor_count);
    Tensor t = span.tensor;
    Factors f = *args.factors;
    if (!args.norm->sound) return;
    float scale = args.norm->grad_scale;
    float rate = float(t.rate), step_size = f.step_size * rate;
    float keep = fmaf(-f.learning_rate * rate, float(t.weight_decay), 1.0f);
    auto update = [&](float& p, float g, float& m, float& v) {
        g *= scale;
        p *= keep;
        m = fmaf(g, f.rest1, m * f.beta1);
        v = fmaf(v, f.beta2, g * g * f.rest2);
        p -= m * step_size / fmaf(sqrtf(v), f.root_factor, f.epsilon);
    };
    bool whole = packable<float, PACK>(t.p, 0) && packable<G, PACK>(t.g, 0) && packable<float, PACK>(t.m, 0) &&
                 packable<float, PACK>(t.v, 0);
    int64_t packed = whole ? span.first + (span.last - span.first) / PACK * PACK : span.first;
#pragma unroll 2
    for (int64_t at = span.first + int64_t(threadIdx.x) * PACK; at < packed; at += int64_t(blockDim.x) * PACK) {
        Pack<float, PACK> p = load_pack<float, PACK>(t.p + at), m = load_pack<float, PACK>(t.m + at);
        Pack<float, PACK> v = load_pack<float, PACK>(t.v + at);
        Pack<G, PACK> g = load_pack<G, PACK>(t.g + at);
#pragma unroll
        for (int i = 0; i < PACK; ++i) update(p.at[i], to_float(g.at[i]), m.at[i], v.at[i]);
        store_pack<float, PACK>(t.p + at, p);
        store_pack<float, PACK>(t.m + at, m);
        store_pack<float, PACK>(t.v + at, v);
    }
    for (int64_t at = packed + threadIdx.x; at < span.last; at += blockDim.x) {
        float p = t.p[at], m = t.m[at], v = t.v[at];
        update(p, to_float(t.g[at]), m, v);
        t.p[at] = p;
        t.m[at] = m;
        t.v[at] = v;
    }
}

DEVICE double block_sum_f64(double value, double* room) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(FULL_WARP, value, step);
    __syncthreads();
    if (lane_id() == 0) room[warp_id()] = value;
    __syncthreads();
    double sum = 0.0;
    for (int warp = 0; warp < int(blockDim.x) / WARP; ++warp) sum += room[warp];
    return sum;
}

// Grid: chunks of all tensors (at least one), block: always 256 threads, as they decide the order of the sum.
KERNEL(adamw_squares, SquaresArguments, 256, 2) {
    __shared__ double room[WARP];
    Span span = own_span(args.tensors, args.tensor_count);
    const G* g = span.tensor.g;
    double sum = 0.0;
    auto add = [&](G element) {
        double value = to_float(element);
        sum = fma(value, value, sum);
    };
    int64_t packed = span.first + (span.last - span.first) / PACK * PACK;
    bool whole = packable<G, PACK>(g, 0);
#pragma unroll 4
    for (int64_t at = span.first + int64_t(threadIdx.x) * PACK; at < packed; at += int64_t(blockDim.x) * PACK) {
        Pack<G, PACK> pack;
        if (whole) {
            pack = load_pack<G, PACK>(g + at);
        } else {
#pragma unroll
            for (int i = 0; i < PACK; ++i) pack.at[i] = g[at + i];
        }
#pragma unroll
        for (int i = 0; i < PACK; ++i) add(pack.at[i]);
    }
    if (packed + threadIdx.x < span.last) add(g[packed + threadIdx.x]);
    sum = block_sum_f64(sum, room);
    if (threadIdx.x == 0) args.partial[blockIdx.x] = sum;
}

// Grid: 1, block: always 1024 threads.
KERNEL(adamw_norm, NormArguments, 1024, 1) {
    __shared__ double room[WARP];
    double sum = 0.0;
    for (int64_t chunk = threadIdx.x; chunk < args.chunks; chunk += blockDim.x) sum += args.partial[chunk];
    sum = block_sum_f64(sum, room);
    if (threadIdx.x != 0) return;
    Factors f = *args.factors;
    double norm = sqrt(sum) * fabs(double(f.grad_factor));
    Norm result;
    result.norm = norm;
    bool clips = f.clip_norm > 0.0f && norm > double(f.clip_norm);
    result.grad_scale = clips ? float(double(f.grad_factor) * (double(f.clip_norm) / norm)) : f.grad_factor;
    // inf - inf and NaN - NaN are NaN.
    result.sound = norm - norm == 0.0 && !(f.limit > 0.0f && norm > double(f.limit));
    *args.norm = result;
}
