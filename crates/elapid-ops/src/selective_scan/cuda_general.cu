// The selective scan in its general form: complex states, and B or C that are constant. Real scans with B and C of
// the token have kernels of their own, in cuda.cu; these are for experiments and are kept simple.
//
// LANES neighbouring lanes share a channel and keep OWN states of each in registers; a block walks one sequence for
// the channels of a tile, eight steps at a time. Each of a channel's first eight lanes loads and computes what one
// step of the eight needs, and shuffles hand it round. Backward computes the states between two saved ones again:
// first those before every eighth step, then, from the last eight steps to the first, those of each step.
#include "cuda_general_channel.cuh"
#include "cuda_general_backward.cuh"

// ---- Forward ---------------------------------------------------------------------------------------------------

struct ForwardArguments {
    Inputs inputs;
    const float* h0;  // [slots, E, STATES, PARTS] or null
    float* last;
    float* chunks;  // states before every 64th step [chunks, E, STATES, PARTS], or null
    Element* y;     // [T, E]
};

KERNEL(selective_scan_general_forward, ForwardArguments, THREADS, 2) {
    const Inputs& in = args.inputs;
    const Place place(in, CHANNELS);
    const Sequence sequence = in.sequences[place.sequence];
    const Channel own(in, place, 0);
    const int mine = own.lane % STEPS;
    Number h[OWN];
    if (args.h0 && sequence.continued) {
        own.load(h, args.h0 + sequence.slot * own.matrix);
    } else {
#pragma unroll
        for (int j = 0; j < OWN; ++j) h[j] = zero();
    }
    for (int64_t begin = 0; begin < sequence.length; begin += STEPS) {
        if (args.chunks && begin % CHUNK == 0) {
            own.store(args.chunks + (sequence.chunk + begin / CHUNK) * own.matrix, h);
        }
        const int count = int(least(sequence.length - begin, int64_t(STEPS)));
        const int64_t first = sequence.first + begin;
        const bool valid = own.there && mine < count;
        const Token token = own.token_of(in, first + mine, valid);
        float y = 0.0f;
#pragma unroll UNROLLED
        for (int s = 0; s < STEPS; ++s) {
            const bool live = s < count;
            const int64_t row = first + (live ? s : 0);
            const float delta = own.give(token.delta, s), step = own.give(token.delta * token.u, s);
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < OWN; ++j) {
                Number next = add(times(decay(own.a[j], delta), h[j]), scale(own.b_of(in, row, j), step));
                h[j] = chosen(live, next, h[j]);
                sum += real_of_product(own.c_of(in, row, j), h[j]);
            }
            sum = warp_sum<LANES>(sum);
            if (s == mine) y = sum;
        }
        if (valid && own.lane < STEPS) {
            float out = FACTOR * y;
            if (in.d) out += own.d * token.u;
            if (in.z) out *= silu(to_float(in.z[(first + mine) * in.z_stride + own.channel]));
            args.y[(first + mine) * in.channels + own.channel] = from_float<Element>(out);
        }
    }
    own.store(args.last + sequence.slot * own.matrix, h);
}

// ---- Sums in a fixed order -------------------------------------------------------------------------------------

struct SumMapsArguments {
    const float* dmaps;  // [G * tiles, T, MAPS, STATES, PARTS]
    Element* db;         // [T, G, STATES, PARTS] if TOKEN_B
    Element* dc;         // the same if TOKEN_C
    int64_t tokens;
    int32_t groups;
    int32_t tiles;  // of a group
};

// One gradient a thread, the tiles of its group in order.
KERNEL(selective_scan_general_sum_maps, SumMapsArguments, 256, 4) {
    constexpr int WIDTH = MAPS ? ROW : 1;
    const int64_t plane = args.tokens * ROW, i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i >= plane * args.groups) return;
    const int64_t group = i / plane, within = i - group * plane, token = within / WIDTH;
    const int column = int(within - token * WIDTH);
    const float* from = args.dmaps + group * args.tiles * plane + within;
    float sum = 0.0f;
    for (int tile = 0; tile < args.tiles; ++tile) sum += from[tile * plane];
    Element* to = TOKEN_B && column < NUMBERS ? args.db : args.dc;
    to[(token * args.groups + group) * NUMBERS + column % NUMBERS] = from_float<Element>(sum);
}

struct SumSequencesArguments {
    const float* parts;  // [sequences, length]
    float* sum;          // [length]
    int64_t length;
    int64_t sequences;
};

KERNEL(selective_scan_general_sum_sequences, SumSequencesArguments, 256, 4) {
    int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i >= args.length) return;
    float sum = 0.0f;
    for (int64_t k = 0; k < args.sequences; ++k) sum += args.parts[k * args.length + i];
    args.sum[i] = sum;
}
