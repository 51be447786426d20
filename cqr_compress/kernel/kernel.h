/* What the files of the compiled library share. */
#ifndef CQR_COMPRESS_KERNEL_H
#define CQR_COMPRESS_KERNEL_H

#include <stdint.h>
#if defined(__AVX__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define AHEAD 12 /* prefetch distance, in rows */

typedef float f4 __attribute__((vector_size(16), aligned(4)));
typedef float f16 __attribute__((vector_size(64), aligned(4)));

/* The widest vector of the CPU. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
INLINE lanes load(const float *p) { return *(const lanes *)p; }

INLINE float float_1(const float *p) { return *p; }
INLINE f4 float_4(const float *p) { return *(const f4 *)p; }
INLINE f16 float_16(const float *p) { return *(const f16 *)p; }

typedef uint16_t half; /* the bits of an IEEE float16 */

#ifdef __F16C__
#define HAS_HALF 1
INLINE float half_1(const half *p) { return _cvtsh_ss(*p); }
INLINE f4 half_4(const half *p) { return (f4)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)p)); }
INLINE f16 half_16(const half *p) {
#ifdef __AVX512F__
    return (f16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    union { __m256 two[2]; f16 all; } sum;
    sum.two[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    sum.two[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)));
    return sum.all;
#endif
}
#else
#define HAS_HALF 0 /* the caller converts float16 to float32 */
INLINE float half_1(const half *p) { return (float)*p; }
INLINE f4 half_4(const half *p) { return (f4){(float)*p}; }
INLINE f16 half_16(const half *p) { return (f16){(float)*p}; }
#endif

/* The i-th id; volatile, so that the compiler does not read it a second time after the check. */
INLINE int64_t id_at(const void *ids, int is_int64, int64_t i) {
    return is_int64 ? ((const volatile int64_t *)ids)[i] : (int64_t)((const volatile int32_t *)ids)[i];
}

INLINE int is_row(int64_t id, int64_t N) { return (uint64_t)id < (uint64_t)N; }

INLINE void report(int64_t *bad, int64_t position) {
    if (position >= 0) __atomic_store_n(bad, position, __ATOMIC_RELAXED);
}

/* Fetch an entry of an id that is not checked: an address that is not mapped is ignored. */
INLINE void prefetch(const void *values, int64_t id, int64_t width) {
    __builtin_prefetch((const void *)((uintptr_t)values + (uintptr_t)id * (uintptr_t)width));
}

#endif
