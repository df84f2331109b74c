/* avx512.c - stands in for csrc/fb_kernels_avx512.c where the CPU has AVX2 only: SIMDe does in halves of 256 bits what
 * AVX-512 does at once. Compile with -mavx2 -mfma, so that the halves of an fma are fused.
 */
#include <immintrin.h> /* first: where fb_simd_avx512.h includes it, it is empty, and SIMDe's names stay */
#include <math.h>
#include <string.h>

#if !defined(__FMA__) || defined(__AVX512F__)
#error "compile this with -mavx2 -mfma and without AVX-512"
#endif
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

/* Conversions that SIMDe 0.7.4 lacks: both halves, or lane by lane. */
static __m512d halves_cvtps_pd(__m256 v)
{
    simde__m512d_private r;
    r.m256d[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    r.m256d[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    return simde__m512d_from_private(r);
}
static __m256 halves_cvtpd_ps(__m512d v)
{
    const simde__m512d_private x = simde__m512d_to_private(v);
    return _mm256_set_m128(_mm256_cvtpd_ps(x.m256d[1]), _mm256_cvtpd_ps(x.m256d[0]));
}
static __m256i lanes_cvtepi32_epi16(__m512i v)
{
    int32_t from[16];
    int16_t to[16];
    __m256i r;
    memcpy(from, &v, sizeof from);
    for (int i = 0; i < 16; i++)
        to[i] = (int16_t)from[i];
    memcpy(&r, to, sizeof r);
    return r;
}
static __m128i lanes_cvtepi64_epi16(__m512i v)
{
    int64_t from[8];
    int16_t to[8];
    __m128i r;
    memcpy(from, &v, sizeof from);
    for (int i = 0; i < 8; i++)
        to[i] = (int16_t)from[i];
    memcpy(&r, to, sizeof r);
    return r;
}
/* Masks of the first n lanes, the only ones the library makes. */
static __m512 lanes_maskz_loadu_ps(unsigned mask, const float *p)
{
    __m512 v = _mm512_setzero_ps();
    memcpy(&v, p, (size_t)__builtin_popcount(mask) * sizeof *p);
    return v;
}
static __m512d lanes_maskz_loadu_pd(unsigned mask, const double *p)
{
    __m512d v = _mm512_setzero_pd();
    memcpy(&v, p, (size_t)__builtin_popcount(mask) * sizeof *p);
    return v;
}
static void lanes_mask_storeu_ps(float *p, unsigned mask, __m512 v)
{
    memcpy(p, &v, (size_t)__builtin_popcount(mask) * sizeof *p);
}
static void lanes_mask_storeu_pd(double *p, unsigned mask, __m512d v)
{
    memcpy(p, &v, (size_t)__builtin_popcount(mask) * sizeof *p);
}
/* Quarters: two of a, two of b. */
static __m512 quarters_shuffle_f32x4(__m512 a, __m512 b, int which)
{
    const char *from[4] = {(const char *)&a, (const char *)&a, (const char *)&b, (const char *)&b};
    __m512 r;
    for (int i = 0; i < 4; i++)
        memcpy((char *)&r + 16 * i, from[i] + 16 * (which >> 2 * i & 3), 16);
    return r;
}
static __m512d quarters_shuffle_f64x2(__m512d a, __m512d b, int which)
{
    return _mm512_castps_pd(quarters_shuffle_f32x4(_mm512_castpd_ps(a), _mm512_castpd_ps(b), which));
}
/* Of each lane its class, and of the class what becomes of it: 0 that of a, 1 that of v, 8 +0.0. SIMDe 0.7.4 takes
 * subnormal numbers for zeros. */
#define LANES_FIXUPIMM(name, vector, real, bits)                                                                       \
    static vector name(vector a, vector v, __m512i table)                                                              \
    {                                                                                                                  \
        enum { LANES = sizeof(vector) / sizeof(real) };                                                                \
        real from[LANES], to[LANES];                                                                                   \
        bits classes[LANES];                                                                                           \
        memcpy(from, &v, sizeof from);                                                                                 \
        memcpy(to, &a, sizeof to);                                                                                     \
        memcpy(classes, &table, sizeof classes);                                                                       \
        for (int i = 0; i < LANES; i++) {                                                                              \
            const real x = from[i];                                                                                    \
            const int finite = x == 0 ? 2 : x == 1 ? 3 : x < 0 ? 6 : 7;                                                \
            const int class = x != x ? 0 : x == -INFINITY ? 4 : x == INFINITY ? 5 : finite;                            \
            const int becomes = classes[i] >> 4 * class & 15;                                                          \
            to[i] = becomes == 0 ? to[i] : becomes == 1 ? x : 0;                                                       \
        }                                                                                                              \
        memcpy(&v, to, sizeof v);                                                                                      \
        return v;                                                                                                      \
    }
LANES_FIXUPIMM(lanes_fixupimm_ps, __m512, float, uint32_t)
LANES_FIXUPIMM(lanes_fixupimm_pd, __m512d, double, uint64_t)
#undef LANES_FIXUPIMM
#undef _mm512_fixupimm_ps
#undef _mm512_fixupimm_pd
#define _mm512_fixupimm_ps(a, v, table, flags) lanes_fixupimm_ps(a, v, table)
#define _mm512_fixupimm_pd(a, v, table, flags) lanes_fixupimm_pd(a, v, table)
#define _mm512_shuffle_f32x4 quarters_shuffle_f32x4
#define _mm512_shuffle_f64x2 quarters_shuffle_f64x2
#define _mm512_maskz_loadu_ps lanes_maskz_loadu_ps
#define _mm512_maskz_loadu_pd lanes_maskz_loadu_pd
#define _mm512_mask_storeu_ps lanes_mask_storeu_ps
#define _mm512_mask_storeu_pd lanes_mask_storeu_pd
#define _mm512_stream_ps(p, v) _mm512_storeu_ps(p, v)
#define _mm512_cvtps_pd halves_cvtps_pd
#define _mm512_cvtpd_ps halves_cvtpd_ps
#define _mm512_cvtepi32_epi16 lanes_cvtepi32_epi16
#define _mm512_cvtepi64_epi16 lanes_cvtepi64_epi16

#include "fb_tier.h"

/* A vector is memory here, not a register: inlined and unrolled the tiles would gain nothing and compile for
 * minutes. */
#undef FB_INLINE
#undef FB_UNROLL
#undef FB_UNROLL_K
#define FB_INLINE static inline
#define FB_UNROLL
#define FB_UNROLL_K

#define FB_TIER avx512
#include "fb_simd_avx512.h"
#define FB_BITS 32
#include "fb_kernels_template.h"
#define FB_BITS 64
#include "fb_kernels_template.h"
const fb_tier *const fb_kernels_avx512[2] = {&fb_kernels_f32_avx512, &fb_kernels_f64_avx512};
