// The order in which sampling ranks logits.
#pragma once
#include "prelude.cuh"

// Orders floats as their keys: larger key, larger float.
DEVICE uint32_t key_of(float value) {
    uint32_t bits = bits_of(value);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
DEVICE float float_of_key(uint32_t key) { return float_of(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

// What NaN and plus infinity have instead of a key: above all others.
constexpr uint32_t BROKEN = 0xffffffffu;

// Larger for larger logits, and for lower ids among equals; 0 is below all.
DEVICE uint64_t rank_of(float logit, uint32_t id) {
    uint32_t key = logit < float_of(0x7f800000u) ? key_of(logit) : BROKEN;
    return uint64_t(key) << 32 | (0xffffffffu - id);
}
DEVICE uint32_t key_of_rank(uint64_t rank) { return uint32_t(rank >> 32); }
DEVICE uint32_t id_of_rank(uint64_t rank) { return 0xffffffffu - uint32_t(rank); }
