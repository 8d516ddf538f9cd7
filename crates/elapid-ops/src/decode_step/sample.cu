// The next token of each sequence from its logits: repetition penalty, temperature, top-k, top-p, min-p, in the order and
// with the meaning of the sampler on the host; the draw is the same function of (seed, id, position).
//
// A block owns a column; each sequence has its own options, and some may have their tokens chosen elsewhere. Weights exp((logit - best) / temperature) are kept as integers of 2^-40, so that their sums do
// not depend on how threads share them. What top-k and top-p keep is a beginning of the ranking (larger logits first,
// lower ids first among equals): all above a key, and some that equal it. It is found byte by byte of the key, from a
// histogram over the candidates of what is not decided yet.
#include "prelude.cuh"
#include "decode_ranking.cuh"

constexpr uint64_t ONE = uint64_t(1) << 40;
constexpr int BINS = 256;

// How a sequence's tokens are chosen.
struct Choice {
    uint64_t key;         // of the draws
    double temperature;   // 0: the best
    double top_p;
    double min_p;
    uint64_t top_k;       // 0: all
    float penalty;
    uint32_t window;      // of the last tokens that the penalty is for
};

// What a slot's sequence is and where it stands.
struct Slot {
    uint64_t id;
    uint64_t position;    // tokens read before the step under way
    uint64_t produced;    // tokens sampled so far
    uint64_t left;        // tokens still wanted; 0: they are chosen elsewhere
    uint64_t seen;        // tokens in its history, prompt included
    Choice choice;
};

struct Sampled {
    uint32_t token;
    uint32_t broken;      // 1: the logit of `token` cannot be sampled from
    float value;          // that logit
    uint32_t ended;       // 1: the sequence has ended
};

struct SampleArguments {
    float* logits;        // [columns, stride]
    const uint64_t* best; // [columns, best_stride]: the highest rank of every 16 logits
    int64_t best_stride;
    int64_t stride;
    int64_t classes;      // that take part
    int32_t* slots;       // [columns], -1 without a sequence; becomes so at a sequence's end
    Slot* sequences;      // [capacity], by slot
    uint32_t* ids;        // [columns]: the next step's tokens
    uint32_t* history;    // [capacity, room], the last tokens, token i at i % window
    int64_t room;         // 0: no sequence has a penalty
    Sampled* out;         // [ring, capacity], in the host's memory
    int64_t ring;
    int64_t capacity;
    const uint32_t* ends; // tokens that end a sequence
    int64_t end_count;
};

DEVICE void philox(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
        uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1, uint32_t(p0)};
        for (int i = 0; i < 4; ++i) c[i] = next[i];
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// A uniform number of [0, 1) with 53 bits.
DEVICE double draw(uint64_t key, uint64_t id, uint64_t position) {
    uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), uint32_t(id), uint32_t(id >> 32)};
    philox(c, uint32_t(key), uint32_t(key >> 32));
    return double((uint64_t(c[0]) << 32 | c[1]) >> 11) * (1.0 / 9007199254740992.0);
}

template <class F> DEVICE uint64_t warp_reduce(uint64_t value, F join) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value = join(value, __shfl_xor_sync(FULL_WARP, value, step));
    return value;
}
// The largest of a block's numbers; every thread gets it. `room` is WARP numbers.
DEVICE uint64_t block_largest(uint64_t value, uint64_t* room) {
    auto larger = [](uint64_t a, uint64_t b) { return a > b ? a : b; };
    value = warp_reduce(value, larger);
    __syncthreads();
    if (lane_id() == 0) room[warp_id()] = value;
    __syncthreads();
    return warp_reduce(lane_id() < int(blockDim.x) / WARP ? room[lane_id()] : 0, larger);
}

// The beginning of the ranking: keys above `key`, and the first `equals` that equal it.
struct Cut {
    uint32_t key;
    uint64_t equals;
};

struct Row {
    float* logits;
    int64_t classes;
    float best;
    double temperature;

    DEVICE double weight(float logit) const { return exp((double(logit) - double(best)) / temperature); }
    DEVICE uint64_t share(float logit) const { return uint64_t(weight(logit) * double(ONE) + 0.5); }
};

// Walks down the bytes of the keys. `amount` of a candidate (its number of occurrences or share) is summed by bin; the
// search goes on in the first bin, from the largest, with which the sum above reaches `enough`. Candidates below `within`
// count for nothing, and of those that equal its key only `within.equals`. Gives the key and the sum above it.
template <class F> DEVICE Cut descend(const Row& row, Cut within, double enough, uint64_t* bins, uint64_t* room, F amount, bool of_total) {
    uint32_t prefix = 0;
    uint64_t above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) bins[bin] = 0;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < row.classes; i += blockDim.x) {
            uint32_t key = key_of(row.logits[i]);
            bool undecided = shift == 24 || key >> (shift + 8) == prefix >> (shift + 8);
            if (undecided && key > within.key) atomicAdd(&bins[key >> shift & 255], amount(row.logits[i]));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            bool undecided = shift == 24 || within.key >> (shift + 8) == prefix >> (shift + 8);
            if (undecided && within.equals > 0) bins[within.key >> shift & 255] += within.equals * amount(float_of_key(within.key));
            if (shift == 24 && of_total) {
                uint64_t total = 0;
                for (int bin = 0; bin < BINS; ++bin) total += bins[bin];
                enough *= double(total);
            }
            int bin = BINS - 1;
            int lowest = BINS - 1;  // of those that hold something
            uint64_t sum = above, before = above;
            for (; bin >= 0; --bin) {
                if (bins[bin] == 0) continue;
                before = sum;
                lowest = bin;
                sum += bins[bin];
                if (double(sum) >= enough) break;
            }
            room[0] = prefix | uint32_t(lowest) << shift;
            room[1] = before;
            room[2] = bits_of_double(enough);
        }
        __syncthreads();
        prefix = uint32_t(room[0]);
        above = room[1];
        enough = double_of_bits(room[2]);
    }
    __syncthreads();
    // How many of the key are needed.
    uint64_t each = amount(float_of_key(prefix));
    double needed = each == 0 ? 1.0 : ceil((enough - double(above)) / double(each));
    return {prefix, uint64_t(needed < 1.0 ? 1.0 : needed)};
}

KERNEL(decode_sample, SampleArguments, 1024, 1) {
    DYNAMIC_SHARED(uint32_t, mask);  // a bit a class, if there is room for histories
    __shared__ Slot own;
    __shared__ uint64_t room[WARP];
    __shared__ uint64_t bins[BINS];
    int64_t column = blockIdx.x;
    int thread = threadIdx.x, threads = blockDim.x, warps = threads / WARP;
    let_next_start();
    wait_for_previous();
    int64_t slot = args.slots[column];
    if (slot < 0) return;
    if (thread == 0) own = args.sequences[slot];
    __syncthreads();
    if (own.left == 0) return;
    const Choice& choice = own.choice;
    bool penalised = choice.penalty != 1.0f && args.room > 0;
    Row row = {args.logits + column * args.stride, args.classes, 0.0f, choice.temperature};

    if (penalised) {
        int64_t words = ceil_div(args.classes, 32);
        for (int64_t i = thread; i < words; i += threads) mask[i] = 0;
        __syncthreads();
        int64_t count = least<int64_t>(choice.window, own.seen);
        for (int64_t i = thread; i < count; i += threads) {
            uint32_t token = args.history[slot * args.room + i];
            if (token >= args.classes) continue;
            uint32_t bit = 1u << token % 32;
            if (atomicOr(&mask[token / 32], bit) & bit) continue;
            float logit = row.logits[token];
            row.logits[token] = logit > 0.0f ? logit / choice.penalty : logit * choice.penalty;
        }
        __syncthreads();
    }

    // The penalty changes logits, so that what is known of them no longer holds.
    int64_t known = penalised ? 0 : args.classes / 16;
    uint64_t best = 0;
    // Some at a time, so that many are under way.
    constexpr int AT_ONCE = 4;
    for (int64_t first = thread; first < known; first += AT_ONCE * threads) {
        uint64_t some[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            some[j] = first + j * threads < known ? args.best[column * args.best_stride + first + j * threads] : 0;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) best = most(best, some[j]);
    }
    for (int64_t first = known * 16 + thread; first < args.classes; first += AT_ONCE * threads) {
        float some[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            some[j] = first + j * threads < args.classes ? row.logits[first + j * threads] : 0.0f;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            int64_t i = first + j * threads;
            if (i < args.classes) best = most(best, rank_of(some[j], uint32_t(i)));
        }
    }
    auto sum = [](uint64_t a, uint64_t b) { return a + b; };
    best = block_largest(best, room);
    uint32_t token = id_of_rank(best);
    bool broken = key_of_rank(best) == BROKEN;
    row.best = broken ? 0.0f : float_of_key(key_of_rank(best));
    bool fails = broken || row.best == float_of(0xff800000u);

    if (!fails && choice.temperature > 0.0) {
        Cut cut = {0, 0};  // no logit has the key 0
        if (choice.top_k > 0 && choice.top_k < uint64_t(args.classes))
            cut = descend(row, cut, double(choice.top_k), bins, room, [](float) { return uint64_t(1); }, false);
        if (choice.top_p < 1.0)
            cut = descend(row, cut, choice.top_p, bins, room, [&](float logit) { return row.share(logit); }, true);
        // A warp owns a run of ids.
        int64_t run = ceil_div(ceil_div(args.classes, warps), WARP) * WARP, first = warp_id() * run;
        int64_t end = least(first + run, args.classes);
        uint64_t ties = 0;
        for (int64_t i = first + lane_id(); i < end; i += WARP) ties += key_of(row.logits[i]) == cut.key;
        ties = warp_reduce(ties, sum);
        __syncthreads();
        if (lane_id() == 0) room[warp_id()] = ties;
        __syncthreads();
        uint64_t ties_before = 0;
        for (int warp = 0; warp < warp_id(); ++warp) ties_before += room[warp];
        __syncthreads();
        // The share of a candidate, 0 if it is out; the lanes of a warp together, in the order of ids.
        auto share = [&](int64_t i, uint64_t& rank) -> uint64_t {
            float logit = i < end ? row.logits[i] : float_of(0xff800000u);
            uint32_t key = key_of(logit);
            bool tie = i < end && key == cut.key;
            uint64_t own_ties = tie, up_to = own_ties;
            for (int step = 1; step < WARP; step *= 2) {
                uint64_t other = __shfl_sync(FULL_WARP, up_to, lane_id() >= step ? lane_id() - step : lane_id());
                if (lane_id() >= step) up_to += other;
            }
            uint64_t own_rank = rank + up_to - own_ties;
            rank += __shfl_sync(FULL_WARP, up_to, WARP - 1);
            bool kept = i < end && (key > cut.key || (tie && own_rank < cut.equals));
            if (!kept) return 0;
            double weight = row.weight(logit);
            return weight >= choice.min_p ? uint64_t(weight * double(ONE) + 0.5) : 0;
        };
        uint64_t shares = 0, rank = ties_before;
        for (int64_t base = first; base < end; base += WARP) shares += share(base + lane_id(), rank);
        shares = warp_reduce(shares, sum);
        if (lane_id() == 0) room[warp_id()] = shares;
        __syncthreads();
        uint64_t total = 0, before = 0;
        for (int warp = 0; warp < warps; ++warp) {
            if (warp == warp_id()) before = total;
            total += room[warp];
        }
        double target = draw(choice.key, own.id, own.position + 1) * double(total);
        __syncthreads();
        if (thread == 0) room[0] = token;
        __syncthreads();
        // In the run of exactly one warp the sums pass the target.
        if (double(before) <= target && double(before + shares) > target) {
            uint64_t so_far = before;
            rank = ties_before;
            for (int64_t base = first; base < end; base += WARP) {
                uint64_t mine = share(base + lane_id(), rank), up_to = mine;
                for (int step = 1; step < WARP; step *= 2) {
                    uint64_t other = __shfl_sync(FULL_WARP, up_to, lane_id() >= step ? lane_id() - step : lane_id());
                    if (lane_id() >= step) up_to += other;
                }
                bool passes = mine > 0 && double(so_far + up_to) > target && double(so_far + up_to - mine) <= target;
                if (passes) room[0] = uint64_t(base + lane_id());
                so_far += __shfl_sync(FULL_WARP, up_to, WARP - 1);
                if (double(so_far) > target) break;
            }
        }
        __syncthreads();
        token = uint32_t(room[0]);
    }

    if (thread != 0) return;
    if (fails) {
        token = broken ? token : 0;
    } else {
        args.ids[column] = token;
        if (penalised) args.history[slot * args.room + own.seen % choice.window] = token;
    }
    bool ends = fails || own.left <= 1;
    for (int64_t i = 0; i < args.end_count; ++i) ends = ends || args.ends[i] == token;
    Sampled* out = args.out + own.produced % args.ring * args.capacity + slot;
    *out = {token, fails ? 1u : 0u, row.logits[token], ends ? 1u : 0u};
    Slot* kept = args.sequences + slot;
    kept->position = own.position + 1;
    kept->produced = own.produced + 1;
    kept->seen = own.seen + 1;
    kept->left = own.left - 1;
    if (ends) args.slots[column] = -1;
}
