/* Trellis-coded rows: their decoding; trellis_search.c describes their codes. */
#include "kernel.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 8 /* dimensions whose windows are read together, as two halves */
#define HALF (BLOCK / 2)
#define MAX_TIERS 4
#define TIER_BLOCK 128 /* rows for each entry of their first bytes */
#define TOGETHER 6 /* rows that are multiplied together */
#define PANEL (2 * LANES) /* columns that are computed together */
#define WIDE (8 * LANES)  /* of a single row */
#define FEW 8 /* rows up to which only what they need is prepared */
#define CACHED 8192 /* values of rows that are decoded before they are multiplied */

typedef float f8 __attribute__((vector_size(4 * BLOCK), aligned(4)));
INLINE f8 load_8(const float *p) { return *(const f8 *)p; }

/* Positions of the windows. Those of half a block are within 64 bits from its first byte on: rates and the shift of a
 * byte are at most 8 bits, and a window at most 16. */
typedef struct {
    int64_t *byte;  /* of half a block */
    int64_t *shift; /* of a dimension, to the first byte of its half */
    int inner;      /* blocks from the first on of which no window crosses the end of the row */
} positions;

static int find_positions(positions *at, const uint8_t *rates, int P, int64_t width, int L) {
    const int64_t halves = (P + BLOCK - 1) / BLOCK * 2;
    int64_t bit = 0;
    int crosses = width < 8;
    at->byte = malloc(halves * (1 + HALF) * sizeof(int64_t));
    if (!at->byte) return -1;
    at->shift = at->byte + halves;
    at->inner = 0;
    for (int64_t half = 0; half < halves; half++) {
        const int64_t n = P - half * HALF < HALF ? P - half * HALF : HALF;
        int64_t *shift = at->shift + half * HALF, first = bit >> 3, end = 0;
        for (int j = 0; j < HALF; j++) shift[j] = 0;
        for (int j = 0; j < n; j++) {
            const int rate = rates[half * HALF + j];
            if (rate > 8) return -2;
            shift[j] = bit - 8 * first;
            end = bit + L;
            bit += rate;
        }
        crosses |= end > 8 * width;
        if (!crosses) {
            const int64_t back = first + 8 > width ? first + 8 - width : 0; /* a word ends with the row */
            for (int j = 0; j < n; j++) shift[j] += 8 * back;
            first -= back;
            at->inner = (half + 1) / 2;
        }
        at->byte[half] = first;
    }
    return bit == 8 * width && L <= 16 ? 0 : -2;
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

/* The words of the two halves of a block. */
INLINE void read_block(uint64_t *words, const uint8_t *row, int64_t width, const positions *at, int inner, int block) {
    const int64_t *byte = at->byte + 2 * (int64_t)block;
    for (int h = 0; h < 2; h++)
        words[h] = block < inner ? word_at(row + byte[h]) : ring_word(row, width, byte[h]);
}

/* One row: states (P), or out (P) = gain * values * scale + mean; `mean` may be null. Values are loaded one by one:
 * gathers of eight take twice as long on CPUs without a fast one. */
INLINE void decode_row(int32_t *states, float *out, const uint8_t *row, int64_t width, const positions *at, int P, int L,
                       const float *values, const float *scale, const float *mean, float gain) {
    const uint64_t mask = (1 << L) - 1;
    uint8_t ring[16];
    int inner = at->inner;
    if (width < 8) {
        for (int i = 0; i < 16; i++) ring[i] = i < width ? row[i] : ring[i - width];
        row = ring;
        width = 16;
        inner = 0;
    }
    for (int d = 0; d < P; d += BLOCK) {
        const int n = P - d < BLOCK ? P - d : BLOCK;
        const int64_t *shift = at->shift + d;
        uint64_t words[2];
        read_block(words, row, width, at, inner, d / BLOCK);
        if (states) {
            for (int j = 0; j < n; j++) states[d + j] = words[j / HALF] >> shift[j] & mask;
            continue;
        }
#define VALUE(j) values[words[j / HALF] >> shift[j] & mask]
        const f8 made = {VALUE(0), VALUE(1), VALUE(2), VALUE(3), VALUE(4), VALUE(5), VALUE(6), VALUE(7)};
#undef VALUE
        if (n == BLOCK) {
            const f8 scaled = gain * (made * load_8(scale + d));
            *(f8 *)(out + d) = mean ? scaled + load_8(mean + d) : scaled;
        } else
            for (int j = 0; j < n; j++) out[d + j] = gain * (made[j] * scale[d + j]) + (mean ? mean[d + j] : 0.0f);
    }
}

/* ---- rotation ---- */

INLINE lanes multiply_add(float x, lanes y, lanes sum) {
#if defined(__AVX512F__)
    return (lanes)_mm512_fmadd_ps(_mm512_set1_ps(x), (__m512)y, (__m512)sum);
#elif defined(__FMA__)
    return (lanes)_mm256_fmadd_ps(_mm256_set1_ps(x), (__m256)y, (__m256)sum);
#else
    return x * y + sum;
#endif
}

/* out (n, D) = rows (n, P) W + mean in `vectors` vectors of columns from `from` on, for n <= count. Reads `count` rows. */
INLINE void rotate_panel(float *out, const float *rows, int64_t n, const float *W, const float *mean, int P, int D,
                         int from, const int count, const int vectors) {
    lanes sum[2 * TOGETHER];
    for (int j = 0; j < count; j++)
        for (int h = 0; h < vectors; h++) sum[j * vectors + h] = mean ? load(mean + from + h * LANES) : (lanes){0};
    for (int p = 0; p < P; p++) {
        const float *w = W + (int64_t)p * D + from;
        lanes columns[8];
        for (int h = 0; h < vectors; h++) columns[h] = load(w + h * LANES);
        for (int j = 0; j < count; j++)
            for (int h = 0; h < vectors; h++)
                sum[j * vectors + h] = multiply_add(rows[(int64_t)j * P + p], columns[h], sum[j * vectors + h]);
    }
    for (int64_t j = 0; j < count && j < n; j++)
        for (int h = 0; h < vectors; h++) *(lanes *)(out + j * D + from + h * LANES) = sum[j * vectors + h];
}

/* out (n, D) = rows (n, P) W + mean, for D >= PANEL; `mean` may be null. Reads rows up to a multiple of TOGETHER.
 * The last panel overlaps the one before it: each value is the same sum in the order of the dimensions. */
static void rotate(float *out, const float *rows, int64_t n, const float *W, const float *mean, int P, int D) {
    int done = 0;
    for (; n == 1 && done + WIDE <= D; done += WIDE) rotate_panel(out, rows, 1, W, mean, P, D, done, 1, WIDE / LANES);
    for (int c = done; c < D; c += PANEL) {
        const int from = c + PANEL <= D ? c : D - PANEL;
        for (int64_t r = 0; r < n; r += TOGETHER)
            rotate_panel(out + r * D, rows + r * P, n - r, W, mean, P, D, from, TOGETHER, PANEL / LANES);
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

/* `values` (n) as float32: itself, or converted to `room`. */
static const float *as_floats(const void *values, int is_half, int64_t n, float *room) {
    if (!is_half) return values;
    for (int64_t i = 0; i < n; i++) room[i] = half_1((const half *)values + i);
    return room;
}

/* A table of N rows. Rows of T tiers of `widths` bytes, with rates (T, P) of 0 to 8 bits and scale (T, P), in codes of
 * `size` bytes; row_tiers and starts for T > 1. values (2**L); mean (D), or null; gains (N), or null: the gain of code g
 * is low * exp(g / 255 * log_ratio), with (low, log_ratio) in gain_range. rotation (P, D), or null for D = P. scale,
 * mean and gain_range are float16 if `is_half`. The same as TrellisTable of build.py. */
typedef struct {
    int64_t N, size, P, D, T, L, starts_are_int64, is_half, widths[MAX_TIERS];
    const uint8_t *codes, *rates, *row_tiers;
    const void *starts;
    const float *values;
    const void *scale, *mean;
    const uint8_t *gains;
    const void *gain_range;
    const float *rotation;
} trellis_table;

typedef struct {
    layout of;
    positions at[MAX_TIERS];
    const float *values, *scale, *mean;
    float gains[256];
} decoder;

/* Rows [a, b) of the batch: states (b - a, P), or out (b - a, P), before the rotation if there is one. Returns a
 * position of the batch with an id outside the table; -1; or -4 if codes of a row are not within the table. */
INLINE int64_t decode_rows(int32_t *states, float *out, const void *ids, int is_int64, int64_t a, int64_t b, int64_t end,
                           const trellis_table *table, const decoder *by) {
    const int P = table->P, T = table->T;
    const float *mean = table->rotation ? 0 : by->mean;
    for (int64_t i = a; i < b; i++) {
        if (i + AHEAD < end) {
            int64_t next = id_at(ids, is_int64, i + AHEAD), width = table->widths[0];
            if (T == 1)
                for (int64_t byte = 0; byte < width; byte += 64) prefetch(table->codes + byte, next, width);
            else if (is_row(next, table->N)) prefetch(table->codes, place_of(&by->of, next).first, 1);
            if (table->gains) prefetch(table->gains, next, 1);
        }
        if (T > 1 && i + 2 * AHEAD < end) {
            int64_t next = id_at(ids, is_int64, i + 2 * AHEAD);
            prefetch(table->row_tiers, next / 4, 1);
            prefetch(table->starts, next / TIER_BLOCK, table->starts_are_int64 ? 8 : 4);
        }
        const int64_t id = id_at(ids, is_int64, i);
        if (!is_row(id, table->N)) return i;
        const place found = place_of(&by->of, id);
        if (found.tier < 0) return -4;
        const uint8_t *row = table->codes + found.first;
        const int64_t width = table->widths[found.tier];
        const positions *at = &by->at[found.tier];
        if (!at->byte) return -4; /* of an id that has changed since it was first read */
        if (states) decode_row(states + (i - a) * P, 0, row, width, at, P, table->L, 0, 0, 0, 1.0f);
        else
            decode_row(0, out + (i - a) * P, row, width, at, P, table->L, by->values, by->scale + (int64_t)found.tier * P,
                       mean, table->gains ? by->gains[table->gains[id]] : 1.0f);
    }
    return -1;
}

/* The rows of ids (B): result (B, D) = gain * values * scale, rotated, + mean; or int32 states (B, P) if `is_states`.
 * Returns -1; a position of an id outside [0, N); -2 if a rate exceeds 8 or they do not add up to the width; -3 without
 * memory; -4 if codes of a row are not within the table. */
int64_t trellis_lookup(void *result, int is_states, const void *ids, int is_int64, int64_t B, const trellis_table *table,
                       int threads) {
    int32_t *states = is_states ? result : 0;
    float *out = is_states ? 0 : result;
    const int64_t P = table->P, D = table->D, T = table->T, padded = D < PANEL ? PANEL : D;
    const int64_t whole = (B + TOGETHER - 1) / TOGETHER * TOGETHER; /* rows of a batch */
    const int64_t fitting = CACHED / P > TOGETHER ? CACHED / P / TOGETHER * TOGETHER : TOGETHER;
    const int64_t block = whole < fitting ? whole : fitting;
    const int rotates = out && table->rotation;
    const float *rotation = table->rotation;
    int64_t status = -1, step = (B + threads - 1) / threads;
    decoder by = {.of = {table->codes, table->row_tiers, table->starts, table->size, table->widths,
                         table->starts_are_int64, T}, .values = table->values};
    float *room = malloc((T * P + 2 * padded + (rotates && D < PANEL ? P * padded : 0)) * sizeof(float));
    if (!room) return -3;
    float *wide = room + T * P + 2 * padded, *wide_mean = room + T * P + padded;
    int needed[MAX_TIERS] = {0}, few = B <= FEW;
    uint8_t has_gain[256] = {0};
    for (int64_t i = 0; i < B && few; i++) { /* prepare what these rows need */
        const int64_t id = id_at(ids, is_int64, i);
        if (!is_row(id, table->N)) continue;
        const place found = place_of(&by.of, id);
        if (found.tier >= 0) needed[found.tier] = 1;
        if (table->gains) has_gain[table->gains[id]] = 1;
    }
    for (int64_t t = 0; t < T && status == -1; t++) {
        if (few && !needed[t]) continue;
        int found = find_positions(&by.at[t], table->rates + t * P, P, table->widths[t], table->L);
        if (found) status = found == -1 ? -3 : found;
    }
    if (out && status == -1) {
        float range[2];
        by.scale = as_floats(table->scale, table->is_half, T * P, room);
        by.mean = table->mean ? as_floats(table->mean, table->is_half, D, room + T * P) : 0;
        if (table->gains) {
            const float *gain_range = as_floats(table->gain_range, table->is_half, 2, range);
            for (int g = 0; g < 256; g++)
                if (!few || has_gain[g]) by.gains[g] = gain_range[0] * expf(g / 255.0f * gain_range[1]);
        }
        if (rotates && D < PANEL) { /* columns of zeros */
            for (int64_t p = 0; p < P; p++)
                for (int64_t d = 0; d < PANEL; d++) wide[p * PANEL + d] = d < D ? rotation[p * D + d] : 0.0f;
            for (int64_t d = 0; d < PANEL && by.mean; d++) wide_mean[d] = d < D ? by.mean[d] : 0.0f;
            rotation = wide;
            by.mean = by.mean ? wide_mean : 0;
        }
    }
    if (status == -1) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int t = 0; t < threads; t++) {
            const int64_t a = t * step, b = a + step < B ? a + step : B;
            int64_t bad = -1;
            if (!rotates) bad = decode_rows(states ? states + a * P : 0, out ? out + a * P : 0, ids, is_int64, a, b, b, table, &by);
            else {
                float *made = calloc(block * (P + (D < PANEL ? PANEL : 0)), sizeof(float)), *all = made + block * P;
                if (!made) bad = -3;
                for (int64_t i = a; i < b && bad == -1; i += block) {
                    const int64_t n = b - i < block ? b - i : block;
                    bad = decode_rows(0, made, ids, is_int64, i, i + n, b, table, &by);
                    if (bad != -1) break;
                    if (D >= PANEL) rotate(out + i * D, made, n, rotation, by.mean, P, D);
                    else {
                        rotate(all, made, n, rotation, by.mean, P, PANEL);
                        for (int64_t j = 0; j < n; j++) memcpy(out + (i + j) * D, all + j * PANEL, D * sizeof(float));
                    }
                }
                free(made);
            }
            if (bad != -1) __atomic_store_n(&status, bad, __ATOMIC_RELAXED);
        }
    }
    for (int64_t t = 0; t < T; t++) free(by.at[t].byte);
    free(room);
    return status;
}
