/* Trellis-coded rows: the search of their bits.
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

#define UNREACHED 1e30f

#if defined(__AVX512F__)
INLINE lanes smaller(lanes a, lanes b) { return (lanes)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
INLINE lanes smaller(lanes a, lanes b) { return (lanes)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE lanes smaller(lanes a, lanes b) {
    typedef int32_t mask __attribute__((vector_size(16)));
    mask less = a < b;
    return (lanes)(((mask)a & less) | ((mask)b & ~less));
}
#endif

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

