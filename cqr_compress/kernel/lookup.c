/* Lookups in compressed tables and their gradients on the CPU.
 *
 * Rows are decoded directly from packed codes, without the index tensors that torch operations require.
 * Shapes: N rows, D = C * S columns, C columns of S dimensions, L levels, K codewords; a row of codes is
 * `width` bytes, C * L codes of n_bits without gaps, least significant bit first. Codes are below K because K is
 * 2**n_bits. No two threads write to the same location: results do not depend on the number of threads.
 *
 * Another thread of the process may write to the ids meanwhile: each id is read once, checked, and used as it was
 * checked. The functions stop at an id outside [0, N) and return its position in the batch, or -1.
 */
#include "kernel.h"

#define MAX_LEVELS 64 /* levels that are summed in one pass */

const int has_half = HAS_HALF;

/* The m-th code of a packed row; reads no byte beyond the row. */
INLINE uint32_t code_at(const uint8_t *row, int64_t m, int n_bits) {
    if (n_bits == 8) return row[m];
    if (n_bits == 4) return row[m >> 1] >> (m & 1) * 4 & 15;
    if (n_bits == 32) return ((const uint32_t *)row)[m]; /* codes that were computed, not packed */
    int64_t bit = m * n_bits;
    int shift = bit & 7;
    uint32_t word = row[bit >> 3];
    if (shift + n_bits > 8) word |= (uint32_t)row[(bit >> 3) + 1] << 8;
    if (shift + n_bits > 16) word |= (uint32_t)row[(bit >> 3) + 2] << 16;
    return word >> shift & ((1u << n_bits) - 1);
}

/* Sum over the levels, from dimension s on, in vectors of `width` floats; added to `to` if `more`. */
#define SUM_LEVELS(vector, width, load)                                                                \
    for (; s + width <= S; s += width) {                                                               \
        vector sum = load(words[0] + s);                                                               \
        for (int l = 1; l < levels; l++) sum += load(words[l] + s);                                    \
        if (more) sum += *(vector *)(to + s);                                                          \
        *(vector *)(to + s) = sum;                                                                     \
    }

/* The same for 64 dimensions at a time, so that a codeword is read contiguously. */
#define SUM_LEVELS_BY_FOUR(load)                                                                       \
    for (; s + 64 <= S; s += 64) {                                                                     \
        f16 sum[4];                                                                                    \
        for (int j = 0; j < 4; j++) sum[j] = load(words[0] + s + 16 * j);                              \
        for (int l = 1; l < levels; l++)                                                               \
            for (int j = 0; j < 4; j++) sum[j] += load(words[l] + s + 16 * j);                         \
        for (int j = 0; j < 4; j++) {                                                                  \
            if (more) sum[j] += *(f16 *)(to + s + 16 * j);                                             \
            *(f16 *)(to + s + 16 * j) = sum[j];                                                        \
        }                                                                                              \
    }

/* Rows a..b of the batch. The compiler unrolls the loops if L, S and n_bits are constants. */
#define DEFINE_ROWS(value)                                                                             \
    INLINE int64_t value##_rows(float *out, const void *ids, int is_int64, int64_t a, int64_t b,       \
                                int64_t N, const uint8_t *codes, int64_t width,                        \
                                const value *codebooks, int C, int L, int K, int S, int n_bits) {      \
        for (int64_t i = a; i < b; i++) {                                                              \
            if (i + AHEAD < b) prefetch(codes, id_at(ids, is_int64, i + AHEAD), width);                \
            int64_t id = id_at(ids, is_int64, i);                                                      \
            if (!is_row(id, N)) return i;                                                              \
            const uint8_t *row = codes + id * width;                                                   \
            float *to = out + i * C * S;                                                               \
            for (int c = 0; c < C; c++, to += S) {                                                     \
                const value *first = codebooks + (int64_t)c * L * K * S, *words[MAX_LEVELS];           \
                for (int start = 0; start < L; start += MAX_LEVELS) {                                  \
                    int levels = L - start < MAX_LEVELS ? L - start : MAX_LEVELS, more = start, s = 0; \
                    for (int l = 0; l < levels; l++) {                                                 \
                        int64_t m = (int64_t)c * L + start + l;                                        \
                        words[l] = first + ((int64_t)(start + l) * K + code_at(row, m, n_bits)) * S;   \
                    }                                                                                  \
                    SUM_LEVELS_BY_FOUR(value##_16)                                                     \
                    SUM_LEVELS(f16, 16, value##_16)                                                    \
                    SUM_LEVELS(f4, 4, value##_4)                                                       \
                    SUM_LEVELS(float, 1, value##_1)                                                    \
                }                                                                                      \
            }                                                                                          \
        }                                                                                              \
        return -1;                                                                                     \
    }                                                                                                  \
    static int64_t value##_rows_any(float *out, const void *ids, int is_int64, int64_t a, int64_t b,   \
                                    int64_t N, const uint8_t *codes, int64_t width,                    \
                                    const value *codebooks, int C, int L, int K, int S, int n_bits) {  \
        if (L == 1 && n_bits == 8 && S == 4)                                                           \
            return value##_rows(out, ids, is_int64, a, b, N, codes, width, codebooks, C, 1, 256, 4, 8);\
        if (L == 1 && n_bits == 4 && S == 4)                                                           \
            return value##_rows(out, ids, is_int64, a, b, N, codes, width, codebooks, C, 1, 16, 4, 4); \
        if (L == 1 && n_bits == 8)                                                                     \
            return value##_rows(out, ids, is_int64, a, b, N, codes, width, codebooks, C, 1, 256, S, 8);\
        if (L == 1)                                                                                    \
            return value##_rows(out, ids, is_int64, a, b, N, codes, width, codebooks, C, 1, K, S, n_bits);\
        if (n_bits == 8)                                                                               \
            return value##_rows(out, ids, is_int64, a, b, N, codes, width, codebooks, C, L, 256, S, 8);\
        return value##_rows(out, ids, is_int64, a, b, N, codes, width, codebooks, C, L, K, S, n_bits); \
    }

DEFINE_ROWS(float)
DEFINE_ROWS(half)

/* out (B, D) = rows of ids; codebooks (C, L, K, S) float or half. */
int64_t lookup_codewords(float *out, const void *ids, int is_int64, int64_t B, int64_t N, const uint8_t *codes,
                      int64_t width, const void *codebooks, int is_half, int C, int L, int K, int S, int n_bits,
                      int threads) {
    int64_t bad = -1, step = (B + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        int64_t a = t * step, b = a + step < B ? a + step : B;
        report(&bad, is_half
            ? half_rows_any(out, ids, is_int64, a, b, N, codes, width, codebooks, C, L, K, S, n_bits)
            : float_rows_any(out, ids, is_int64, a, b, N, codes, width, codebooks, C, L, K, S, n_bits));
    }
    return bad;
}

INLINE int64_t add_codewords(float *grad, const float *g, const void *ids, int is_int64, int64_t B, int64_t N,
                             const uint8_t *codes, int64_t width, int first, int last, int C, int L, int K, int S,
                             int n_bits) {
    for (int64_t i = 0; i < B; i++) {
        if (i + AHEAD < B) prefetch(codes, id_at(ids, is_int64, i + AHEAD), width);
        int64_t id = id_at(ids, is_int64, i);
        if (!is_row(id, N)) return i;
        const uint8_t *row = codes + id * width;
        for (int m = first; m < last; m++) {
            float *to = grad + ((int64_t)m * K + code_at(row, m, n_bits)) * S;
            const float *from = g + i * C * S + (int64_t)(m / L) * S;
            for (int s = 0; s < S; s++) to[s] += from[s];
        }
    }
    return -1;
}

/* grad (C, L, K, S) += gradients of the codewords, from those of the rows g (B, D). */
int64_t lookup_backward(float *grad, const float *g, const void *ids, int is_int64, int64_t B, int64_t N,
                        const uint8_t *codes, int64_t width, int C, int L, int K, int S, int n_bits, int threads) {
    int64_t bad = -1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        int first = (int64_t)C * L * t / threads, last = (int64_t)C * L * (t + 1) / threads;
        report(&bad,
            L == 1 && n_bits == 8 && S == 4
                ? add_codewords(grad, g, ids, is_int64, B, N, codes, width, first, last, C, 1, K, 4, 8)
            : L == 1 && n_bits == 4 && S == 4
                ? add_codewords(grad, g, ids, is_int64, B, N, codes, width, first, last, C, 1, K, 4, 4)
            : n_bits == 8
                ? add_codewords(grad, g, ids, is_int64, B, N, codes, width, first, last, C, L, K, S, 8)
                : add_codewords(grad, g, ids, is_int64, B, N, codes, width, first, last, C, L, K, S, n_bits));
    }
    return bad;
}

INLINE float half_at(const void *values, int is_half, int64_t i) {
    return is_half ? half_1((const half *)values + i) : ((const float *)values)[i];
}

INLINE int64_t integer_rows(float *out, const void *ids, int is_int64, int64_t a, int64_t b, int64_t N,
                            const uint8_t *codes, int64_t width, const void *scale, const void *offset, int is_half,
                            int D, int n_bits) {
    for (int64_t i = a; i < b; i++) {
        if (i + AHEAD < b) {
            int64_t next = id_at(ids, is_int64, i + AHEAD);
            for (int64_t byte = 0; byte < width; byte += 64) prefetch(codes + byte, next, width);
            prefetch(scale, next, is_half ? 2 : 4);
            prefetch(offset, next, is_half ? 2 : 4);
        }
        int64_t id = id_at(ids, is_int64, i);
        if (!is_row(id, N)) return i;
        const uint8_t *row = codes + id * width;
        float *to = out + i * D, step = half_at(scale, is_half, id), low = half_at(offset, is_half, id);
        for (int d = 0; d < D; d++) to[d] = low + step * (float)code_at(row, d, n_bits);
    }
    return -1;
}

/* out (B, D) = offset + scale * integers of n_bits 8 or 4. */
int64_t lookup_integers(float *out, const void *ids, int is_int64, int64_t B, int64_t N, const uint8_t *codes,
                     int64_t width, const void *scale, const void *offset, int is_half, int D, int n_bits,
                     int threads) {
    int64_t bad = -1, step = (B + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        int64_t a = t * step, b = a + step < B ? a + step : B;
        report(&bad, n_bits == 8
            ? integer_rows(out, ids, is_int64, a, b, N, codes, width, scale, offset, is_half, D, 8)
            : integer_rows(out, ids, is_int64, a, b, N, codes, width, scale, offset, is_half, D, 4));
    }
    return bad;
}

typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));

/* Keep the smaller of two vectors of distances, and the numbers of their centroids. */
INLINE void keep_nearer(f16 *best, i16 *which, f16 distance, i16 number) {
    i16 nearer = distance < *best;
    *best = (f16)(((i16)distance & nearer) | ((i16)*best & ~nearer));
    *which = (number & nearer) | (*which & ~nearer);
}

INLINE void nearest_rows(int32_t *codes, const float *rows, int64_t a, int64_t b, const float *centroids,
                         const float *norms, int K, int S) {
    for (int64_t i = a; i < b; i += 2) { /* two rows share the loads of the centroids */
        const float *x = rows + i * S, *y = i + 1 < b ? x + S : x;
        f16 best_x = float_16(norms), best_y = best_x;
        i16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, which_x = lanes, which_y = lanes;
        for (int k = 0; k < K; k += 16) {
            f16 to_x = float_16(norms + k), to_y = to_x;
            for (int s = 0; s < S; s++) {
                f16 c = float_16(centroids + (int64_t)s * K + k);
                to_x -= c * x[s];
                to_y -= c * y[s];
            }
            if (k == 0) best_x = to_x, best_y = to_y;
            else keep_nearer(&best_x, &which_x, to_x, lanes + k), keep_nearer(&best_y, &which_y, to_y, lanes + k);
        }
        int of_x = 0, of_y = 0;
        for (int lane = 1; lane < 16; lane++) {
            if (best_x[lane] < best_x[of_x] || (best_x[lane] == best_x[of_x] && which_x[lane] < which_x[of_x]))
                of_x = lane;
            if (best_y[lane] < best_y[of_y] || (best_y[lane] == best_y[of_y] && which_y[lane] < which_y[of_y]))
                of_y = lane;
        }
        codes[i] = which_x[of_x];
        if (i + 1 < b) codes[i + 1] = which_y[of_y];
    }
}

/* codes (n) = numbers of the centroids nearest to rows (n, S), the first of equally near ones; centroids are (S, K)
 * with norms (K), half of their squared norms; K is a multiple of 16. */
void nearest(int32_t *codes, const float *rows, int64_t n, const float *centroids, const float *norms, int K, int S,
             int threads) {
    int64_t step = (n + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        int64_t a = t * step, b = a + step < n ? a + step : n;
        if (S == 1) nearest_rows(codes, rows, a, b, centroids, norms, K, 1);
        else if (S == 2) nearest_rows(codes, rows, a, b, centroids, norms, K, 2);
        else if (S == 4) nearest_rows(codes, rows, a, b, centroids, norms, K, 4);
        else if (S == 8) nearest_rows(codes, rows, a, b, centroids, norms, K, 8);
        else nearest_rows(codes, rows, a, b, centroids, norms, K, S);
    }
}

#define PRIME 2147483647ll /* 2**31 - 1 */

/* all (B, n) = all codes of the rows: the hashes of hashing.py with coefficients (n, 3), or, where those are
 * zeros, the next packed code of the row. */
int64_t all_codes(int32_t *all, const void *ids, int is_int64, int64_t B, int64_t N, const uint8_t *codes,
                  int64_t width, int n_bits, const int64_t *coefficients, int n, int64_t K, int threads) {
    int64_t bad = -1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < B; i++) {
        int64_t id = id_at(ids, is_int64, i), low = id & ((1 << 30) - 1), high = id >> 30;
        if (!is_row(id, N)) {
            report(&bad, i);
            continue;
        }
        for (int j = 0, stored = 0; j < n; j++) {
            const int64_t *h = coefficients + 3 * j;
            if (h[1]) {
                uint32_t sum = (h[1] * low % PRIME + (high ? h[0] * high % PRIME : 0) + h[2]) % PRIME;
                all[i * n + j] = sum % (uint32_t)K;
            } else all[i * n + j] = code_at(codes + id * width, stored++, n_bits);
        }
    }
    return bad;
}
