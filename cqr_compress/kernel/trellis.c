/* Trellis-coded rows: the search of their bits, and their decoding.
 *
 * A row is a ring of `width` bytes, least significant bit first. Dimension d, of P, adds rates[d] bits, which begin at
 * bit rates[0] + ... + rates[d - 1]; the window of L bits that begins there is its state, and values[state] its value.
 * So the state of dimension d is that of dimension d + 1, shifted by rates[d] new bits: a path through a trellis with
 * S = 2**L states, from the last dimension to the first. As the bits are a ring, it ends where it begins
 * (tail-biting). Sums of squared errors are computed by each row alone: results do not depend on the number of threads.
 */
#include "kernel.h"
#include <stdlib.h>
#include <string.h>

#define BLOCK 8 /* dimensions whose windows are read together */
#define CHUNK 64 /* dimensions that are scaled together */
#define UNREACHED 1e30f
#define MAX_TIERS 4
#define TIER_BLOCK 128 /* rows for each entry of their first bytes */

/* ---- search ---- */

#if defined(__AVX512F__)
#define LANES 16
typedef float lanes __attribute__((vector_size(64), aligned(4)));
INLINE lanes smaller(lanes a, lanes b) { return (lanes)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
#define LANES 8
typedef float lanes __attribute__((vector_size(32), aligned(4)));
INLINE lanes smaller(lanes a, lanes b) { return (lanes)_mm256_min_ps((__m256)a, (__m256)b); }
#else
#define LANES 4
typedef float lanes __attribute__((vector_size(16), aligned(4)));
INLINE lanes smaller(lanes a, lanes b) {
    typedef int32_t mask __attribute__((vector_size(16)));
    mask less = a < b;
    return (lanes)(((mask)a & less) | ((mask)b & ~less));
}
#endif

INLINE lanes load(const float *p) { return *(const lanes *)p; }

/* The costs least[s >> k] of the LANES states from `s` on; reads LANES entries. */
INLINE lanes predecessors(const float *least, int s, int k) {
    const float *p = least + (s >> k);
    if (1 << k >= LANES) return (lanes){0} + *p;
    lanes from = load(p);
#if defined(__AVX512F__)
    const __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (lanes)_mm512_permutexvar_ps(_mm512_srli_epi32(number, k), (__m512)from);
#elif defined(__AVX2__)
    const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (lanes)_mm256_permutevar8x32_ps((__m256)from, _mm256_srli_epi32(number, k));
#else
    lanes spread;
    for (int i = 0; i < LANES; i++) spread[i] = from[i >> k];
    return spread;
#endif
}

/* next (S): costs after a dimension of k bits with value x and weight w, from the costs before it. */
INLINE void advance(float *next, const float *cost, float *least, const float *values, float x, float w, int S, int k) {
    const int Q = S >> k;
    if (Q >= LANES)
        for (int q = 0; q < Q; q += LANES) {
            lanes best = load(cost + q);
            for (int from = q + Q; from < S; from += Q) best = smaller(best, load(cost + from));
            *(lanes *)(least + q) = best;
        }
    else
        for (int q = 0; q < Q; q++) {
            float best = cost[q];
            for (int from = q + Q; from < S; from += Q) best = cost[from] < best ? cost[from] : best;
            least[q] = best;
        }
    for (int s = 0; s < S; s += LANES) {
        lanes error = x - load(values + s);
        *(lanes *)(next + s) = predecessors(least, s, k) + w * error * error;
    }
}

static void advance_any(float *next, const float *cost, float *least, const float *values, float x, float w, int S,
                        int k) {
    if (k == 1) advance(next, cost, least, values, x, w, S, 1);
    else if (k == 2) advance(next, cost, least, values, x, w, S, 2);
    else if (k == 3) advance(next, cost, least, values, x, w, S, 3);
    else advance(next, cost, least, values, x, w, S, k);
}

/* The path of least cost over n dimensions of the ring, from `first` downwards, and from and to the state `tied`, or
 * any if that is -1. Writes the states of the dimensions, if `states` is given, and returns that of dimension 0. */
static int best_path(int32_t *states, const float *x, const float *weights, const uint8_t *rates, int P, int first,
                     int n, int L, const float *values, int tied, float *costs, float *least) {
    const int S = 1 << L;
    for (int s = 0; s < S; s++) costs[s] = tied < 0 ? 0.0f : UNREACHED;
    if (tied >= 0) costs[tied] = 0.0f;
    for (int i = 0; i < n; i++) {
        int d = first - i < 0 ? first - i + P : first - i;
        float *cost = costs + (int64_t)i * S;
        advance_any(cost + S, cost, least, values, x[d], weights[d], S, rates[d]);
    }
    const float *end = costs + (int64_t)n * S;
    int state = tied < 0 ? 0 : tied, found = 0;
    for (int s = 1; s < S && tied < 0; s++)
        if (end[s] < end[state]) state = s;
    for (int i = n - 1; i >= 0; i--) {
        int d = first - i < 0 ? first - i + P : first - i, Q = S >> rates[d];
        const float *cost = costs + (int64_t)i * S;
        if (states) states[d] = state;
        if (d == 0) found = state;
        state >>= rates[d];
        for (int from = state + Q; from < S; from += Q)
            if (cost[from] < cost[state]) state = from;
    }
    return found;
}

static void pack(uint8_t *row, int64_t width, const int32_t *states, const uint8_t *rates, int P) {
    memset(row, 0, width);
    for (int64_t d = 0, bit = 0; d < P; bit += rates[d++]) {
        uint32_t bits = (uint32_t)(states[d] & ((1 << rates[d]) - 1)) << (bit & 7);
        row[bit >> 3] |= bits;
        if (bits >> 8) row[(bit >> 3) + 1] |= bits >> 8;
    }
}

/* states (n, P) and codes (n, width) of rows (n, P), either may be null; weights (P), rates (P) of 1 to 8 bits whose
 * sum is 8 * width, values (S). The state at the seam of the ring is that of the best free path over `around`
 * dimensions on each side of it. Returns 0, or -1 if there is no memory. */
int trellis_search(int32_t *states, uint8_t *codes, const float *rows, int64_t n, int P, const float *weights,
                   const uint8_t *rates, int64_t width, int L, const float *values, int around, int threads) {
    const int S = 1 << L, before = around < P / 2 ? around : P / 2, length = 2 * before < P - 1 ? 2 * before : P;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *costs = malloc(((int64_t)(P + 1) * S + S + LANES) * sizeof(float));
        float *least = costs + (int64_t)(P + 1) * S;
        int32_t *path = malloc((int64_t)P * sizeof(int32_t));
        if (costs) memset(least, 0, (S + LANES) * sizeof(float));
        if (!costs || !path) __atomic_store_n(&failed, -1, __ATOMIC_RELAXED);
#pragma omp for schedule(dynamic, 16)
        for (int64_t i = 0; i < n; i++) {
            if (!costs || !path) continue;
            const float *x = rows + i * P;
            int32_t *to = states ? states + i * P : path;
            /* dimensions before - 1, ..., 0, P - 1, ..., P - before: the seam is after dimension 0 */
            int seam = best_path(0, x, weights, rates, P, before ? before - 1 : 0, length, L, values, -1, costs, least);
            best_path(to, x, weights, rates, P, P - 1, P, L, values, seam, costs, least);
            if (codes) pack(codes + i * width, width, to, rates, P);
        }
        free(costs);
        free(path);
    }
    return failed;
}

/* ---- decoding ---- */

/* Positions of the windows: first byte and shift of each dimension, relative to the first byte of its block. */
typedef struct {
    int64_t *byte;  /* of a block */
    int64_t *shift; /* of a dimension, to the first byte of its block */
    uint8_t *is_narrow; /* of a block: all of its windows are within 64 bits from its first byte on */
} positions;

static int find_positions(positions *at, const uint8_t *rates, int P, int64_t width, int L) {
    int64_t blocks = (P + BLOCK - 1) / BLOCK, bit = 0;
    at->byte = malloc(blocks * (BLOCK + 1) * sizeof(int64_t) + blocks);
    if (!at->byte) return -1;
    at->shift = at->byte + blocks;
    at->is_narrow = (uint8_t *)(at->shift + blocks * BLOCK);
    for (int64_t d = 0; d < blocks * BLOCK; d++) {
        int64_t block = d / BLOCK;
        if (d % BLOCK == 0) at->byte[block] = bit >> 3;
        at->shift[d] = bit - 8 * at->byte[block];
        at->is_narrow[block] = at->shift[d] + L <= 64;
        if (d < P && rates[d] > 8) return -2;
        if (d < P) bit += rates[d];
    }
    return bit == 8 * width ? 0 : -2;
}

INLINE uint64_t word_at(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

/* The 64 bits of a ring of at least 8 bytes from its byte `first` on, which may be its length. */
INLINE uint64_t ring_word(const uint8_t *row, int64_t width, int64_t first) {
    int64_t over = first + 8 - width;
    if (over <= 0) return word_at(row + first);
    return over == 8 ? word_at(row) : word_at(row + width - 8) >> 8 * over | word_at(row) << (64 - 8 * over);
}

/* The states of the dimensions of a block, 0 for those beyond the last. */
INLINE void block_states(uint32_t *states, const uint8_t *row, int64_t width, const positions *at, int block, int mask) {
    const int64_t *shift = at->shift + (int64_t)block * BLOCK, first = at->byte[block];
    if (at->is_narrow[block]) {
        uint64_t word = ring_word(row, width, first);
        for (int j = 0; j < BLOCK; j++) states[j] = word >> shift[j] & mask;
    } else
        for (int j = 0; j < BLOCK; j++)
            states[j] = ring_word(row, width, first + (shift[j] >> 3)) >> (shift[j] & 7) & mask;
}

/* One row: states (P), or out (P) = gain * values * scale + mean; `mean` may be null. The values of a chunk are stored
 * before they are read as vectors, because a vector that is read from recent scalar stores has to wait for them. */
INLINE void decode_row(int32_t *states, float *out, const uint8_t *row, int64_t width, const positions *at, int P, int L,
                       const float *values, const float *scale, const float *mean, float gain) {
    const int mask = (1 << L) - 1;
    uint8_t ring[16];
    if (width < 8) {
        for (int i = 0; i < 16; i++) ring[i] = i < width ? row[i] : ring[i - width];
        row = ring;
        width = 16;
    }
    for (int start = 0; start < P; start += CHUNK) {
        float made[CHUNK];
        const int n = P - start < CHUNK ? P - start : CHUNK;
        for (int d = 0; d < n; d += BLOCK) {
            uint32_t found[BLOCK];
            block_states(found, row, width, at, (start + d) / BLOCK, mask);
            if (states)
                for (int j = 0; j < BLOCK && d + j < n; j++) states[start + d + j] = found[j];
            else
                for (int j = 0; j < BLOCK; j++) made[d + j] = values[found[j]];
        }
        if (states) continue;
        float *to = out + start;
        const float *by = scale + start, *add = mean ? mean + start : 0;
        if (mean)
            for (int j = 0; j < n; j++) to[j] = gain * (made[j] * by[j]) + add[j];
        else
            for (int j = 0; j < n; j++) to[j] = gain * (made[j] * by[j]);
    }
}

/* Where the codes of a row are. Rows of several tiers follow each other: `row_tiers` has 2 bits for each row, least
 * significant first, and `starts` the first byte of every TIER_BLOCK-th row. */
typedef struct {
    const uint8_t *codes, *row_tiers;
    const void *starts;
    int64_t size; /* bytes of all codes */
    const int64_t *widths; /* of the T tiers */
    int starts_are_int64, T;
} layout;

typedef struct {
    int64_t first;
    int tier; /* -1 if the codes are not within those of the table */
} place;

INLINE place place_of(const layout *of, int64_t id) {
    const uint64_t low = 0x5555555555555555u;
    if (of->T == 1) return (place){id * of->widths[0], 0};
    int64_t block = id / TIER_BLOCK, rows = id % TIER_BLOCK, counts[4] = {0, 0, 0, 0};
    const uint8_t *p = of->row_tiers + block * (TIER_BLOCK / 4);
    int tier = p[rows / 4] >> 2 * (rows % 4) & 3;
    counts[0] = rows;
    for (int64_t row = 0; row < rows; row += 32) {
        uint64_t word = 0;
        int64_t here = rows - row < 32 ? rows - row : 32;
        memcpy(&word, p + row / 4, (here + 3) / 4);
        if (here < 32) word &= ((uint64_t)1 << 2 * here) - 1;
        uint64_t a = word & low, b = word >> 1 & low;
        int64_t both = __builtin_popcountll(a & b);
        counts[3] += both;
        counts[1] += __builtin_popcountll(a) - both;
        counts[2] += __builtin_popcountll(b) - both;
    }
    counts[0] -= counts[1] + counts[2] + counts[3];
    int64_t first = of->starts_are_int64 ? ((const int64_t *)of->starts)[block] : ((const int32_t *)of->starts)[block];
    for (int t = 0; t < 4; t++) {
        if (t >= of->T && (counts[t] || t == tier)) return (place){0, -1};
        if (t < of->T) first += counts[t] * of->widths[t];
    }
    return (place){first, first < 0 || first + of->widths[tier] > of->size ? -1 : tier};
}

/* The rows of ids: states (B, P), or out (B, P) = gain * values * scale + mean, whichever is given. Rows of T tiers of
 * `widths` (T) bytes, with rates (T, P) of 0 to 8 bits and scale (T, P), in codes of `size` bytes; row_tiers and starts
 * for T > 1. values (2**L), mean (P) or null; gains (N) indices into gain_values (256), or null.
 * Returns -1; the position of an id outside [0, N); -2 if a rate exceeds 8 or they do not add up to the width; -3
 * without memory; -4 if codes of a row are not within the table. */
int64_t trellis_lookup(int32_t *states, float *out, const void *ids, int is_int64, int64_t B, int64_t N,
                       const uint8_t *codes, int64_t size, int T, const int64_t *widths, const uint8_t *row_tiers,
                       const void *starts, int starts_are_int64, const uint8_t *rates, int P, int L,
                       const float *values, const float *scale, const float *mean, const uint8_t *gains,
                       const float *gain_values, int threads) {
    const layout of = {codes, row_tiers, starts, size, widths, starts_are_int64, T};
    positions at[MAX_TIERS] = {{0}};
    int status = 0, lost = 0;
    for (int t = 0; t < T && !status; t++) status = find_positions(&at[t], rates + (int64_t)t * P, P, widths[t], L);
    int64_t bad = -1, step = (B + threads - 1) / threads;
    if (!status) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int t = 0; t < threads; t++) {
            int64_t a = t * step, b = a + step < B ? a + step : B;
            for (int64_t i = a; i < b; i++) {
                if (i + AHEAD < b) {
                    int64_t next = id_at(ids, is_int64, i + AHEAD);
                    if (T == 1)
                        for (int64_t byte = 0; byte < widths[0]; byte += 64) prefetch(codes + byte, next, widths[0]);
                    else if (is_row(next, N)) prefetch(codes, place_of(&of, next).first, 1);
                    if (gains) prefetch(gains, next, 1);
                }
                if (T > 1 && i + 2 * AHEAD < b) {
                    int64_t next = id_at(ids, is_int64, i + 2 * AHEAD);
                    prefetch(row_tiers, next / 4, 1);
                    prefetch(starts, next / TIER_BLOCK, starts_are_int64 ? 8 : 4);
                }
                int64_t id = id_at(ids, is_int64, i);
                if (!is_row(id, N)) {
                    report(&bad, i);
                    break;
                }
                float gain = gains ? gain_values[gains[id]] : 1.0f;
                place found = place_of(&of, id);
                if (found.tier < 0) {
                    __atomic_store_n(&lost, 1, __ATOMIC_RELAXED);
                    break;
                }
                const uint8_t *row = codes + found.first;
                const positions *here = &at[found.tier];
                const float *by = scale + (int64_t)found.tier * P;
                int64_t width = widths[found.tier];
                if (states) decode_row(states + i * P, 0, row, width, here, P, L, values, by, mean, gain);
                else decode_row(0, out + i * P, row, width, here, P, L, values, by, mean, gain);
            }
        }
    }
    for (int t = 0; t < T; t++) free(at[t].byte);
    return status ? (status == -2 ? -2 : -3) : lost ? -4 : bad;
}
