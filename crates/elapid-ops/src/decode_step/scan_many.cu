// One step of the recurrence as in scan.cu, bit for bit, for many sequences, where reading and writing the states is what
// takes the time: a block owns 16 CHANNEL_TILES channels of 8 COLUMN_GROUPS sequences, and each thread has UNDER_WAY bytes
// of states under way from before the kernel waits for the one before it until its last ones are there.
//
// What a state needs besides itself is made ready in shared memory meanwhile: B and C by rows of the selection, Δ by a
// product of the tensor cores of 16 channels and 8 sequences a warp. What is asked for before the kernel waits is first used
// behind it: loads come back in their order, so that whatever is asked for last waits for all states.
//
// Macros: those of scan.cuh, STATES 4, 8, 16 or 32; CHANNEL_TILES, COLUMN_GROUPS; RESIDENT, blocks on a multiprocessor;
// UNDER_WAY; DELTA_WARPS, that share a sum of Δ in scan.cu.
#include "prelude.cuh"
#include "decode_scan.cuh"

constexpr int CHANNELS = CHANNEL_TILES * TILE_ROWS, COLUMNS = COLUMN_GROUPS * TILE_COLUMNS;
constexpr int WARPS = CHANNEL_TILES * COLUMN_GROUPS, THREADS = WARPS * WARP;
constexpr int PAIRS = CHANNELS * COLUMNS, EACH = PAIRS / THREADS;
// Lanes that share a channel, with four states each.
constexpr int QUADS = STATES / 4;
static_assert(STATES % 4 == 0 && (QUADS & (QUADS - 1)) == 0 && QUADS <= 8, "states in quads that a warp shares");
// Turns of the block over its states, columns that a turn goes through, and turns under way.
constexpr int TURNS = PAIRS * QUADS / THREADS;
constexpr int TURN_COLUMNS = THREADS / (CHANNELS * QUADS);
static_assert(TURN_COLUMNS >= 1, "a thread keeps its channel");
constexpr int WANTED = UNDER_WAY / (4 * sizeof(State)), AHEAD = TURNS < WANTED ? TURNS : WANTED;
// Of the selection's rows in shared memory: rows of 16 bytes that lanes read without meeting a bank twice.
constexpr int ROUNDED = (WIDTH + 3) / 4 * 4;
constexpr int STRIDE = ROUNDED % 8 == 0 ? ROUNDED + 4 : ROUNDED;
// Δ's weights come to shared memory before the kernel waits, if they are many and leave room there; the pairs take their place.
constexpr bool KEPT_DELTA = DELTA_BLOCKS >= 4 && DELTA_BLOCKS <= 8;
constexpr int PAIR_BYTES = PAIRS * int(sizeof(Pair)), DELTA_BYTES = KEPT_DELTA ? CHANNEL_TILES * DELTA_BLOCKS * Narrow::BYTES : 0;
constexpr int DELTA_PARTS = DELTA_BLOCKS < DELTA_WARPS ? DELTA_BLOCKS : DELTA_WARPS;

// By one instruction, which a copy of the numbers is not always made into.
DEVICE void store_whole(State* to, const Pack<State, 4>& state) {
#if NARROW_STATE
    Pack<uint32_t, 2> words = {{uint32_t(state.at[0].bits) | uint32_t(state.at[1].bits) << 16,
                                uint32_t(state.at[2].bits) | uint32_t(state.at[3].bits) << 16}};
    store_pack<uint32_t, 2>(reinterpret_cast<uint32_t*>(to), words);
#elif defined(ON_CARD)
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(state.at[0]), "f"(state.at[1]), "f"(state.at[2]), "f"(state.at[3])
                 : "memory");
#else
    store_pack<State, 4>(to, state);
#endif
}

DEVICE Pack<float, 4> four(const float* from) {
    if (RANK % 4 == 0) return load_pack<float, 4>(from);
    return {{from[0], from[1], from[2], from[3]}};
}

KERNEL(decode_scan_many, ScanArguments, 32 * CHANNEL_TILES * COLUMN_GROUPS, RESIDENT) {
    __shared__ Pack<float, 4> row_room[COLUMNS * STRIDE / 4];
    __shared__ uint32_t places[COLUMNS];
    __shared__ float reads[PAIRS];   // Δ's sums, then what is read out
    __shared__ Pack<uint32_t, 4> pair_room[(DELTA_BYTES > PAIR_BYTES ? DELTA_BYTES : PAIR_BYTES) / 16];
    float* rows = row_room[0].at;
    uint8_t* delta_weights = reinterpret_cast<uint8_t*>(pair_room);
    Pair* pairs = reinterpret_cast<Pair*>(pair_room);
    auto delta_from = [&](int half) {
        int64_t tile = least(int64_t(blockIdx.x) * CHANNEL_TILES + half, ceil_div(args.channels, TILE_ROWS) - 1);
        return args.delta + tile * (DELTA_BLOCKS * Narrow::BYTES);
    };
    // Neighbouring blocks have other sequences, so that they do not all want the same rows of the selection at once.
    uint32_t thread = threadIdx.x;
    int64_t channel0 = int64_t(blockIdx.x) * CHANNELS, sequence0 = (int64_t(blockIdx.x) + blockIdx.y) % gridDim.y * COLUMNS;
    int filled = int(least<int64_t>(COLUMNS, args.columns - sequence0));

    // This thread's states: of one channel, and of a column in each turn.
    int quad = thread % QUADS, own = thread / QUADS % CHANNELS, column0 = thread / (QUADS * CHANNELS);
    bool has_own = channel0 + own < args.channels;
    State* states = args.state + (channel0 + own) * STATES + 4 * quad;
    // Of a column: its states' place in quads, NONE without a sequence.
    constexpr uint32_t NONE = 0xffffffffu;
    if (thread < COLUMNS) {
        int32_t slot = thread < filled ? args.slots[sequence0 + thread] : -1;
        places[thread] = slot < 0 ? NONE : uint32_t(slot) * uint32_t(args.channels * QUADS);
    }
    __syncthreads();
    auto place_of = [&](int turn) { return has_own ? places[column0 + turn * TURN_COLUMNS] : NONE; };
    Pack<State, 4> kept[AHEAD];
    auto load = [&](int turn) {
        uint32_t place = place_of(turn);
        if (place != NONE) kept[turn % AHEAD] = load_pack<State, 4>(states + int64_t(place) * 4);
    };
#pragma unroll
    for (int turn = 0; turn < AHEAD; ++turn) load(turn);
    Pack<float, 4> rates = {{0.0f, 0.0f, 0.0f, 0.0f}};
    if (has_own) rates = load_pack<float, 4>(args.a + (channel0 + own) * STATES + 4 * quad);
    // This thread's pairs: of one channel too.
    int pair_channel = thread % CHANNELS;
    int64_t channel = channel0 + pair_channel;
    bool has_channel = channel < args.channels;
    float bias = has_channel && args.delta_bias ? args.delta_bias[channel] : 0.0f;
    float skip = has_channel ? args.d[channel] : 0.0f;
    if (KEPT_DELTA) {
        constexpr int CHUNKS = DELTA_BLOCKS * Narrow::BYTES / 16;
        for (uint32_t i = thread; i < CHANNEL_TILES * CHUNKS; i += THREADS)
            copy_async(delta_weights + i * 16, delta_from(i / CHUNKS) + i % CHUNKS * 16);
    }
    let_next_start();
    wait_for_previous();

    if (WIDTH % 4 == 0) {
        const float* from = args.selection + sequence0 * WIDTH;
        for (uint32_t i = thread; i < filled * (WIDTH / 4u); i += THREADS)
            copy_async(rows + i / (WIDTH / 4u) * STRIDE + i % (WIDTH / 4u) * 4, from + i * 4);
    } else {
        for (int i = thread; i < filled * WIDTH; i += THREADS)
            rows[i / WIDTH * STRIDE + i % WIDTH] = load_fresh(args.selection + sequence0 * WIDTH + i);
    }
    commit_copies();
    float u[EACH], gate[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        int column = thread / CHANNELS + i * (THREADS / CHANNELS);
        bool there = has_channel && column < filled;
        u[i] = there ? to_float(load_fresh(args.u + activation_place(sequence0 + column, channel, args.channel_blocks))) : 0.0f;
        gate[i] = there ? to_float(load_fresh(args.gate + (sequence0 + column) * args.channels + channel)) : 0.0f;
    }
    wait_copies<0>();
    __syncthreads();
#if NORMED
    for (int column = warp_id(); column < filled; column += WARPS) normalise_row(rows + column * STRIDE, args.eps);
    __syncthreads();
#endif

    {
        int g = lane_id() / 4, t = lane_id() % 4, half = warp_id() % CHANNEL_TILES, group = warp_id() / CHANNEL_TILES;
        const float* row = rows + (group * TILE_COLUMNS + g) * STRIDE;
        bool has_row = group * TILE_COLUMNS + g < filled;
        float sums[DELTA_PARTS][1][4];
#pragma unroll
        for (int part = 0; part < DELTA_PARTS; ++part)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[part][0][i] = 0.0f;
#pragma unroll
        for (int block = 0; block < DELTA_BLOCKS; ++block) {
            Narrow weights;
            if (KEPT_DELTA) {
                weights.load_shared(delta_weights + (half * DELTA_BLOCKS + block) * Narrow::BYTES);
            } else {
                weights.load(delta_from(half) + block * Narrow::BYTES);
            }
            Pack<uint32_t, 4> x[1];
            int term = block * BLOCK_TERMS + 8 * t;
            if (RANK % 8 == 0) {
                Pack<float, 4> low = {{0.0f, 0.0f, 0.0f, 0.0f}}, high = low;
                if (term < RANK && has_row) {
                    low = load_pack<float, 4>(row + term);
                    high = load_pack<float, 4>(row + term + 4);
                }
                x[0] = {{pair_of(low.at[0], low.at[1]), pair_of(low.at[2], low.at[3]), pair_of(high.at[0], high.at[1]),
                         pair_of(high.at[2], high.at[3])}};
            } else {
                auto number = [&](int at) { return at < RANK && has_row ? row[at] : 0.0f; };
#pragma unroll
                for (int word = 0; word < 4; ++word)
                    x[0].at[word] = pair_of(number(term + 2 * word), number(term + 2 * word + 1));
            }
            weights.multiply(sums[block % DELTA_WARPS % DELTA_PARTS], x);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float sum = sums[0][0][i];
#pragma unroll
            for (int part = 1; part < DELTA_PARTS; ++part) sum += sums[part][0][i];
            reads[(group * TILE_COLUMNS + 2 * t + i % 2) * CHANNELS + half * TILE_ROWS + g + i / 2 * 8] = sum;
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        float delta = softplus(reads[i * THREADS + thread] + bias);
        pairs[i * THREADS + thread] = {delta, delta * u[i]};
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) rates.at[i] *= LOG2_E;
    const float* own_rows = rows + column0 * STRIDE + RANK + 4 * quad;
    const Pair* own_pairs = pairs + column0 * CHANNELS + own;
    float* own_reads = reads + column0 * CHANNELS + own;
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        // Without a sequence, numbers that nobody reads.
        Pack<State, 4> state = kept[turn % AHEAD];
        Pack<float, 4> b = four(own_rows + turn * (TURN_COLUMNS * STRIDE));
        Pack<float, 4> c = four(own_rows + turn * (TURN_COLUMNS * STRIDE) + STATES);
        Pair pair = own_pairs[turn * (TURN_COLUMNS * CHANNELS)];
        float y = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float h = fmaf(exp2_fast(pair.delta * rates.at[i]), to_float(state.at[i]), pair.step * b.at[i]);
            state.at[i] = from_float<State>(h);
            y = fmaf(c.at[i], h, y);
        }
        uint32_t place = place_of(turn);
        if (place != NONE) store_whole(states + int64_t(place) * 4, state);
        if (turn + AHEAD < TURNS) load(turn + AHEAD);
        y = warp_sum<QUADS>(y);
        if (quad == 0) own_reads[turn * (TURN_COLUMNS * CHANNELS)] = y;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        int column = thread / CHANNELS + i * (THREADS / CHANNELS);
        if (has_channel && column < filled)
            args.y[activation_place(sequence0 + column, channel, args.channel_blocks)] =
                from_float<bf16>(fmaf(skip, u[i], reads[i * THREADS + thread]) * gate[i]);
    }
}
