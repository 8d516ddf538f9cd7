// The ragged causal depthwise convolution, forward and backward.
//
// A warp owns 32 packs of neighbouring channels and a run of tokens; it walks the run sequence by sequence and keeps
// the last W - 1 inputs in registers, so every input is read once. Where a run begins inside a sequence the inputs
// before it are read again. The sum of a token is one chain from the bias over the taps from the oldest to the
// newest, so runs, warps and other sequences never change its bits. A border is where the walk of one sequence ends
// and that of the next begins: no value of one document takes part in another's arithmetic.
//
// Macros: ELEMENT (float or bf16), WIDTH (taps W), SILU (1 or 0). May be set for tuning: FORWARD_PACK and
// BACKWARD_PACK (channels a thread: a power of two of at most 16 bytes), FORWARD_TOKENS and BACKWARD_TOKENS,
// FORWARD_BLOCKS and BACKWARD_BLOCKS.
#include "prelude.cuh"

using T = ELEMENT;

constexpr int TAPS = WIDTH;
constexpr int HISTORY = TAPS - 1;
// Never empty, as C++ has no arrays of length 0.
constexpr int KEPT = HISTORY > 0 ? HISTORY : 1;
#ifndef FORWARD_PACK
#define FORWARD_PACK (WIDTH <= 4 ? 16 / int(sizeof(T)) : WIDTH <= 8 ? 4 : 1)
#endif
#ifndef BACKWARD_PACK
#define BACKWARD_PACK (WIDTH <= 4 ? 4 : WIDTH <= 8 ? 2 : 1)
#endif
// Tokens whose loads are under way while as many are computed.
#ifndef FORWARD_TOKENS
#define FORWARD_TOKENS 4
#endif
#ifndef BACKWARD_TOKENS
#define BACKWARD_TOKENS 4
#endif
// Blocks of 256 threads that a multiprocessor shall hold.
#ifndef FORWARD_BLOCKS
#define FORWARD_BLOCKS 2
#endif
#ifndef BACKWARD_BLOCKS
#define BACKWARD_BLOCKS 2
#endif

// One sequence of the batch; they lie end to end from token 0.
struct Sequence {
    int64_t start, len;
    int32_t slot;
    // 1 if the slot of the incoming state stands before it, 0 if nothing does.
    int32_t continued;
};

struct ForwardArguments {
    const T* x;  // [T, E]
    int64_t x_stride;
    const float* weight;  // [E, W]
    const float* bias;    // [E], or null
    const float* state;   // [slots, E, W - 1], or null if no sequence continues
    T* y;                 // [T, E]
    int64_t y_stride;
    float* state_out;  // as state, or null; holds the incoming state (or zeros) already
    const Sequence* sequences;
    int64_t sequence_count;
    int64_t tokens;
    int64_t channels;
    int64_t run;  // tokens of a warp
};

struct BackwardArguments {
    const T* x;  // [T, E]
    int64_t x_stride;
    const float* weight;  // [E, W]
    const float* bias;    // [E], or null
    const float* state;   // [slots, E, W - 1], or null if no sequence continues
    const T* dy;          // [T, E]
    int64_t dy_stride;
    const float* dstate;  // gradient of the outgoing state, or null
    T* dx;                // [T, E]
    int64_t dx_stride;
    float* dstate_in;  // gradient of the incoming state, or null; holds dstate (or zeros) already
    float* partial;    // [blocks along y, W + 1, E]: sums of the taps' and the bias' gradients
    const Sequence* sequences;
    int64_t sequence_count;
    int64_t tokens;
    int64_t channels;
    int64_t run;  // tokens of a warp
};

struct ReduceArguments {
    const float* partial;  // [parts, W + 1, E]
    int64_t parts;
    int64_t channels;
    float* dweight;  // [E, W]
    float* dbias;    // [E], or null
};

// The channels of one thread: `count` of PACK from `channel` on; 0 beyond the last.
template <int PACK> struct Lane {
    int64_t channel;
    int count;
};

template <int PACK> DEVICE Lane<PACK> own_lane(int64_t channels) {
    int64_t channel = (int64_t(blockIdx.x) * WARP + lane_id()) * PACK;
    int64_t left = channels - channel;
    return {channel, int(left < 0 ? 0 : left > PACK ? PACK : left)};
}

DEVICE uint32_t raw(float value) { return bits_of(value); }
DEVICE uint32_t raw(bf16 value) { return value.bits; }

// A pack as the words in which it came: half as many registers for bf16 as its elements would take.
template <int PACK> struct Words {
    static constexpr int COUNT = (PACK * int(sizeof(T)) + 3) / 4;
    uint32_t at[COUNT];
};

// FAST: whole packs at aligned places. Otherwise what is beyond `count` reads as 0.
template <bool FAST, int PACK> DEVICE Words<PACK> fetch(const T* from, int count) {
    Words<PACK> words;
    if constexpr (FAST && PACK * sizeof(T) % 4 == 0) {
        auto pack = load_pack<uint32_t, Words<PACK>::COUNT>(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
        for (int i = 0; i < Words<PACK>::COUNT; ++i) words.at[i] = pack.at[i];
    } else {
#pragma unroll
        for (int i = 0; i < Words<PACK>::COUNT; ++i) words.at[i] = 0;
#pragma unroll
        for (int i = 0; i < PACK; ++i)
            if (i < count) words.at[i * int(sizeof(T)) / 4] |= raw(from[i]) << (i * int(sizeof(T)) % 4 * 8);
    }
    return words;
}
template <int PACK> DEVICE void widen(float* to, const Words<PACK>& from) {
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
        uint32_t word = from.at[i * int(sizeof(T)) / 4];
        to[i] = float_of(sizeof(T) == 4 ? word : i % 2 ? word & 0xffff0000u : word << 16);
    }
}

template <bool FAST, int PACK> DEVICE void put(T* to, const float* from, int count) {
    Pack<T, PACK> value;
#pragma unroll
    for (int i = 0; i < PACK; ++i) value.at[i] = from_float<T>(from[i]);
    if constexpr (FAST) {
        store_pack<T, PACK>(to, value);
    } else {
#pragma unroll
        for (int i = 0; i < PACK; ++i)
            if (i < count) to[i] = value.at[i];
    }
}

// The first sequence that starts at `first` or later, or the one before it if it reaches beyond `first`.
DEVICE int64_t first_sequence(const Sequence* sequences, int64_t count, int64_t first) {
    int64_t low = 0, high = count;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (sequences[middle].start < first) low = middle + 1;
        else high = middle;
    }
    if (low > 0 && sequences[low - 1].start + sequences[low - 1].len > first) --low;
    return low;
}

// The taps of the block's channels, by way of shared memory so that they are read in one piece: the lanes' taps lie
// at an odd stride there. All threads of the block must call it.
template <int PACK>
DEVICE void load_taps(float (&taps)[PACK][TAPS], const float* weight, int64_t channels, float* room) {
    int64_t base = int64_t(blockIdx.x) * WARP * PACK;
    int64_t held = channels - base;
    int total = int(held > WARP * PACK ? WARP * PACK : held) * TAPS;
    for (int i = threadIdx.x; i < total; i += blockDim.x)
        room[i % (PACK * TAPS) * (WARP + 1) + i / (PACK * TAPS)] = weight[base * TAPS + i];
    __syncthreads();
    Lane<PACK> lane = own_lane<PACK>(channels);
#pragma unroll
    for (int i = 0; i < PACK; ++i)
#pragma unroll
        for (int w = 0; w < TAPS; ++w)
            taps[i][w] = i < lane.count ? room[(i * TAPS + w) * (WARP + 1) + lane_id()] : 0.0f;
}

// The HISTORY inputs before token `t` of a sequence, oldest first.
template <bool FAST, int PACK>
DEVICE void load_history(float (&past)[KEPT][PACK], const T* x, int64_t x_stride, const float* state,
                         const Sequence& sequence, int64_t t, int64_t channels, Lane<PACK> lane) {
#pragma unroll
    for (int h = 0; h < HISTORY; ++h) {
        int64_t at = t - HISTORY + h;
        if (at >= sequence.start) {
            widen<PACK>(past[h], fetch<FAST, PACK>(x + at * x_stride + lane.channel, lane.count));
            continue;
        }
        int64_t column = at - sequence.start + HISTORY;
        const float* row = state + (sequence.slot * channels + lane.channel) * HISTORY + column;
#pragma unroll
        for (int i = 0; i < PACK; ++i)
            past[h][i] = sequence.continued && i < lane.count ? row[int64_t(i) * HISTORY] : 0.0f;
    }
}

template <int PACK> DEVICE void push(float (&past)[KEPT][PACK], const float* newest) {
#pragma unroll
    for (int h = 0; h + 1 < HISTORY; ++h)
#pragma unroll
        for (int i = 0; i < PACK; ++i) past[h][i] = past[h + 1][i];
    if (HISTORY > 0) {
#pragma unroll
        for (int i = 0; i < PACK; ++i) past[KEPT - 1][i] = newest[i];
    }
}

template <int PACK>
DEVICE float sum_of(const float (&taps)[PACK][TAPS], const float (&past)[KEPT][PACK], float newest, float bias, int i) {
    float sum = bias;
#pragma unroll
    for (int w = 0; w < HISTORY; ++w) sum = fmaf(taps[i][w], past[w][i], sum);
    return fmaf(taps[i][HISTORY], newest, sum);
}

// ---- Forward ------------------------------------------------------------------------------------------------

// The walk of one warp. Its arrays stay in registers as everything is inlined.
template <bool FAST, int PACK> struct Forward {
    static constexpr int GROUP = FAST ? FORWARD_TOKENS : 1;
    const ForwardArguments& args;
    const float (&taps)[PACK][TAPS];
    const float (&bias)[PACK];
    Lane<PACK> lane;
    float past[KEPT][PACK];

    DEVICE void step(const Words<PACK>& x, T* y) {
        float now[PACK], out[PACK];
        widen<PACK>(now, x);
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            float sum = sum_of<PACK>(taps, past, now[i], bias[i], i);
            out[i] = SILU ? silu(sum) : sum;
        }
        put<FAST, PACK>(y, out, lane.count);
        push<PACK>(past, now);
    }
    DEVICE void run(int64_t first, int64_t last);
};

template <bool FAST, int PACK> DEVICE void Forward<FAST, PACK>::run(int64_t first, int64_t last) {
    for (int64_t s = first_sequence(args.sequences, args.sequence_count, first); s < args.sequence_count; ++s) {
        Sequence sequence = args.sequences[s];
        // One without tokens belongs to the run in which it stands; those behind the last token to the last run.
        if (sequence.start >= last && !(sequence.len == 0 && last == args.tokens)) break;
        int64_t end = sequence.start + sequence.len;
        if (sequence.len == 0) {
            if (args.state_out && !sequence.continued) {
                float* slot = args.state_out + (sequence.slot * args.channels + lane.channel) * HISTORY;
                for (int i = 0; i < lane.count * HISTORY; ++i) slot[i] = 0.0f;
            }
            continue;
        }
        int64_t t = most(first, sequence.start), to = least(last, end);
        load_history<FAST, PACK>(past, args.x, args.x_stride, args.state, sequence, t, args.channels, lane);
        // Pointers and a 32-bit count, as registers are short here.
        int left = int(to - t);
        const T* from = args.x + t * args.x_stride + lane.channel;
        T* out = args.y + t * args.y_stride + lane.channel;
        if (left >= GROUP) {
            // A load is as far ahead as the group is long.
            const T* ahead = from;
            Words<PACK> next[GROUP];
#pragma unroll
            for (int k = 0; k < GROUP; ++k, ahead += args.x_stride) next[k] = fetch<FAST, PACK>(ahead, lane.count);
#pragma unroll 1
            for (; left >= GROUP; left -= GROUP) {
#pragma unroll
                for (int k = 0; k < GROUP; ++k, ahead += args.x_stride, out += args.y_stride) {
                    Words<PACK> now = next[k];
                    if (GROUP + k < left) next[k] = fetch<FAST, PACK>(ahead, lane.count);
                    step(now, out);
                }
            }
            from = ahead - GROUP * args.x_stride;
        }
#pragma unroll 1
        for (; left > 0; --left, from += args.x_stride, out += args.y_stride)
            step(fetch<FAST, PACK>(from, lane.count), out);
        if (to == end && args.state_out) {
            float* slot = args.state_out + (sequence.slot * args.channels + lane.channel) * HISTORY;
#pragma unroll
            for (int i = 0; i < PACK; ++i)
#pragma unroll
                for (int h = 0; h < HISTORY; ++h)
                    if (i < lane.count) slot[i * HISTORY + h] = past[h][i];
        }
    }
}

// Grid: (ceil(E / (32 PACK)), max(1, ceil(T / (run warps)))), block: 32 warps-of-runs, shared: 33 PACK W floats.
KERNEL(causal_conv1d_forward, ForwardArguments, 256, FORWARD_BLOCKS) {
    constexpr int PACK = FORWARD_PACK;
    DYNAMIC_SHARED(float, room);
    float taps[PACK][TAPS], bias[PACK];
    load_taps<PACK>(taps, args.weight, args.channels, room);
    Lane<PACK> lane = own_lane<PACK>(args.channels);
    if (lane.count == 0) return;
#pragma unroll
    for (int i = 0; i < PACK; ++i) bias[i] = args.bias && i < lane.count ? args.bias[lane.channel + i] : 0.0f;
    int64_t warps = blockDim.x / WARP;
    int64_t first = (blockIdx.y * warps + warp_id()) * args.run;
    int64_t last = least(first + args.run, args.tokens);
    if (first >= args.tokens && first > 0) return;
    if (lane.count == PACK && packable<T, PACK>(args.x, args.x_stride) && packable<T, PACK>(args.y, args.y_stride))
        Forward<true, PACK>{args, taps, bias, lane, {}}.run(first, last);
    else
        Forward<false, PACK>{args, taps, bias, lane, {}}.run(first, last);
}

// ---- Backward -----------------------------------------------------------------------------------------------
//
// With g = dy act'(sum), the input at u has the gradient Σ_w taps[w] g[u + W - 1 - w]: when the walk has g of token
// t it can finish the input at t - (W - 1). A run therefore computes g of up to W - 1 tokens behind it as well.
// The chain of an input starts from the gradient of the outgoing state and goes from the latest token to the
// earliest; inputs before the sequence are those of the incoming state. So a split sequence has the bits of the whole.

template <bool FAST, int PACK> struct Gradients {
    static constexpr int GROUP = FAST ? BACKWARD_TOKENS : 1;
    const BackwardArguments& args;
    const float (&taps)[PACK][TAPS];
    const float (&bias)[PACK];
    float (&dtaps)[PACK][TAPS];
    float (&dbias)[PACK];
    Lane<PACK> lane;
    float past[KEPT][PACK];
    // g of the HISTORY tokens before the current one, oldest first.
    float late[KEPT][PACK];
    float g[PACK];

    DEVICE Words<PACK> input(int64_t t) {
        return fetch<FAST, PACK>(args.x + t * args.x_stride + lane.channel, lane.count);
    }
    DEVICE Words<PACK> outer(int64_t t) {
        return fetch<FAST, PACK>(args.dy + t * args.dy_stride + lane.channel, lane.count);
    }
    // g of one token; adds to the parameters' gradients if the token is the run's own.
    DEVICE void local(const Words<PACK>& x, const Words<PACK>& dy, bool own) {
        float now[PACK];
        widen<PACK>(now, x);
        widen<PACK>(g, dy);
        if (SILU) {
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                float sum = sum_of<PACK>(taps, past, now[i], bias[i], i);
                g[i] *= silu_slope(sum, sigmoid(sum));
            }
        }
        if (own) {
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
#pragma unroll
                for (int w = 0; w < HISTORY; ++w) dtaps[i][w] = fmaf(g[i], past[w][i], dtaps[i][w]);
                dtaps[i][HISTORY] = fmaf(g[i], now[i], dtaps[i][HISTORY]);
                dbias[i] += g[i];
            }
        }
        push<PACK>(past, now);
    }
    // The input at t - HISTORY, all of whose tokens are inside the sequence; its gradient goes to `to`.
    DEVICE void finish(T* to) {
        float sum[PACK];
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            sum[i] = fmaf(taps[i][0], g[i], 0.0f);
#pragma unroll
            for (int w = 1; w < TAPS; ++w) sum[i] = fmaf(taps[i][w], late[KEPT - w][i], sum[i]);
        }
        put<FAST, PACK>(to, sum, lane.count);
    }
    // The same near the sequence's ends, where tokens or the input lie outside; nothing if it is another run's.
    DEVICE void finish_near_ends(const Sequence& sequence, int64_t t, int64_t from) {
        int64_t u = t - HISTORY, end = sequence.start + sequence.len;
        if (u < from && (from != sequence.start || !args.dstate_in || !sequence.continued)) return;
        float sum[PACK];
        int64_t column = u - (end - HISTORY);
        int64_t row = sequence.slot * args.channels + lane.channel;
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            bool leaves = column >= 0 && args.dstate && i < lane.count;
            sum[i] = leaves ? args.dstate[(row + i) * HISTORY + column] : 0.0f;
        }
#pragma unroll
        for (int w = 0; w < TAPS; ++w) {
            if (t - w < sequence.start || t - w >= end) continue;
#pragma unroll
            for (int i = 0; i < PACK; ++i)
                sum[i] = fmaf(taps[i][w], w == 0 ? g[i] : late[w == 0 ? 0 : KEPT - w][i], sum[i]);
        }
        if (u >= sequence.start) {
            put<FAST, PACK>(args.dx + u * args.dx_stride + lane.channel, sum, lane.count);
            return;
        }
        int64_t h = u - (sequence.start - HISTORY);
#pragma unroll
        for (int i = 0; i < PACK; ++i)
            if (i < lane.count) args.dstate_in[(row + i) * HISTORY + h] = sum[i];
    }
    DEVICE void run(int64_t first, int64_t last);
};

template <bool FAST, int PACK> DEVICE void Gradients<FAST, PACK>::run(int64_t first, int64_t last) {
    for (int64_t s = first_sequence(args.sequences, args.sequence_count, first); s < args.sequence_count; ++s) {
        Sequence sequence = args.sequences[s];
        if (sequence.start >= last && !(sequence.len == 0 && last == args.tokens)) break;
        int64_t end = sequence.start + sequence.len;
        // What stood in the slot of a fresh sequence was not used.
        if (sequence.start >= first && !sequence.continued && args.dstate_in) {
            float* slot = args.dstate_in + (sequence.slot * args.channels + lane.channel) * HISTORY;
            for (int i = 0; i < lane.count * HISTORY; ++i) slot[i] = 0.0f;
        }
        if (sequence.len == 0) continue;
        int64_t from = most(first, sequence.start), to = least(last, end);
        int64_t reach = least(to + HISTORY, end);
        load_history<FAST, PACK>(past, args.x, args.x_stride, args.state, sequence, from, args.channels, lane);
#pragma unroll
        for (int h = 0; h < KEPT; ++h)
#pragma unroll
            for (int i = 0; i < PACK; ++i) late[h][i] = 0.0f;
        int64_t t = from;
#pragma unroll 1
        for (; t < reach && t < from + HISTORY; ++t) {
            local(input(t), outer(t), t < to);
            finish_near_ends(sequence, t, from);
            push<PACK>(late, g);
        }
        int left = int(to - t);
        if (left >= GROUP) {
            const T* x = args.x + t * args.x_stride + lane.channel;
            const T* dy = args.dy + t * args.dy_stride + lane.channel;
            T* dx = args.dx + (t - HISTORY) * args.dx_stride + lane.channel;
            t += left / GROUP * GROUP;
            Words<PACK> next[GROUP][2];
#pragma unroll
            for (int k = 0; k < GROUP; ++k, x += args.x_stride, dy += args.dy_stride) {
                next[k][0] = fetch<FAST, PACK>(x, lane.count);
                next[k][1] = fetch<FAST, PACK>(dy, lane.count);
            }
#pragma unroll 1
            for (; left >= GROUP; left -= GROUP) {
#pragma unroll
                for (int k = 0; k < GROUP; ++k) {
                    Words<PACK> now_x = next[k][0], now_dy = next[k][1];
                    if (GROUP + k < left) {
                        next[k][0] = fetch<FAST, PACK>(x, lane.count);
                        next[k][1] = fetch<FAST, PACK>(dy, lane.count);
                    }
                    local(now_x, now_dy, true);
                    finish(dx);
                    push<PACK>(late, g);
                    x += args.x_stride;
                    dy += args.dy_stride;
                    dx += args.dx_stride;
                }
            }
        }
#pragma unroll 1
        for (; t < reach; ++t) {
            local(input(t), outer(t), t < to);
            finish(args.dx + (t - HISTORY) * args.dx_stride + lane.channel);
            push<PACK>(late, g);
        }
#pragma unroll 1
        for (; t < to + HISTORY; ++t) {
#pragma unroll
            for (int i = 0; i < PACK; ++i) g[i] = 0.0f;
            finish_near_ends(sequence, t, from);
            push<PACK>(late, g);
        }
    }
}

// Grid and block as forward, with the backward's PACK; shared: max(33 PACK W, 32 warps PACK (W + 1)) floats.
KERNEL(causal_conv1d_backward, BackwardArguments, 256, BACKWARD_BLOCKS) {
    constexpr int PACK = BACKWARD_PACK;
    constexpr int VALUES = PACK * (TAPS + 1);
    DYNAMIC_SHARED(float, room);
    float taps[PACK][TAPS], bias[PACK], dtaps[PACK][TAPS], dbias[PACK];
    load_taps<PACK>(taps, args.weight, args.channels, room);
    Lane<PACK> lane = own_lane<PACK>(args.channels);
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
        bias[i] = args.bias && i < lane.count ? args.bias[lane.channel + i] : 0.0f;
        dbias[i] = 0.0f;
#pragma unroll
        for (int w = 0; w < TAPS; ++w) dtaps[i][w] = 0.0f;
    }
    int warps = blockDim.x / WARP;
    int64_t first = (int64_t(blockIdx.y) * warps + warp_id()) * args.run;
    int64_t last = least(first + args.run, args.tokens);
    if (lane.count > 0 && (first < args.tokens || first == 0)) {
        bool fast = lane.count == PACK && packable<T, PACK>(args.x, args.x_stride) &&
                    packable<T, PACK>(args.dy, args.dy_stride) && packable<T, PACK>(args.dx, args.dx_stride);
        if (fast) Gradients<true, PACK>{args, taps, bias, dtaps, dbias, lane, {}, {}, {}}.run(first, last);
        else Gradients<false, PACK>{args, taps, bias, dtaps, dbias, lane, {}, {}, {}}.run(first, last);
    }
    // The runs of the block in order.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
#pragma unroll
        for (int w = 0; w < TAPS; ++w) room[(warp_id() * VALUES + w * PACK + i) * WARP + lane_id()] = dtaps[i][w];
        room[(warp_id() * VALUES + TAPS * PACK + i) * WARP + lane_id()] = dbias[i];
    }
    __syncthreads();
    int64_t base = int64_t(blockIdx.x) * WARP * PACK;
    for (int k = threadIdx.x; k < VALUES * WARP; k += blockDim.x) {
        int w = k / (WARP * PACK), c = k % (WARP * PACK);
        if (base + c >= args.channels) continue;
        float sum = 0.0f;
        for (int warp = 0; warp < warps; ++warp) sum += room[(warp * VALUES + w * PACK + c % PACK) * WARP + c / PACK];
        args.partial[(int64_t(blockIdx.y) * (TAPS + 1) + w) * args.channels + base + c] = sum;
    }
}

// Grid: ceil((W + 1) E / threads), any block. A thread sums one value over the parts in order.
KERNEL(causal_conv1d_parameters, ReduceArguments, 256, 2) {
    int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    int64_t size = (TAPS + 1) * args.channels;
    if (k >= size) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t part = 0; part < args.parts; ++part) sum += args.partial[part * size + k];
    int64_t w = k / args.channels, c = k % args.channels;
    if (w < TAPS) args.dweight[c * TAPS + w] = sum;
    else if (args.dbias) args.dbias[c] = sum;
}
