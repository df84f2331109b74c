/* fb_simd_avx512.h - the vector operations on AVX-512F: 16 float or 8 double lanes.
 *
 * Every fb_simd_*.h defines the same operations in the same order; the diff of two is the comparison of the
 * instruction sets. Each operation rounds once (contract section 1); fma is one rounding everywhere, max and min
 * return the second operand when one is NaN (or NaN: callers only rely on a NaN in the second operand surviving).
 */
#include <immintrin.h>

/* Registers: 32. A tile of 14 rows x 2 panels (2 vectors) holds 28 accumulators, 2 weights and 1 broadcast in 31. */
#define FB_TILE_ROWS 14
#define FB_DIRECT_ROWS 6
#define FB_TILE_PANELS(rows) ((rows) == 1 ? 8 : (rows) == 2 ? 6 : (rows) <= 6 ? 4 : 2)
#define FB_TILE_VECS 28
#define FB_DIRECT_PANELS 8
#define FB_TILE_FUNCTION FB_NOINLINE
#define FB_FETCH_GROUP 4
#define FB_FETCH_SPREAD 1
#define FB_FETCH_NEXT_A 1
#define FB_DENSE_FROM 0.57
#define FB_DENSE_FEW 0.25
#define FB_FEW_ROWS 16
#define FB_SPARSE_PANELS(rows) 8
#define FB_PANEL_CASES(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#define FB_MOST_PANELS 8
#define FB_TILE_CASES(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14)

/* ---- float32 */
#define FB_F32_LANES 16
typedef __m512 fb_f32_vec;

FB_INLINE fb_f32_vec fb_f32_zero(void) { return _mm512_setzero_ps(); }
FB_INLINE fb_f32_vec fb_f32_splat(const float *p) { return _mm512_set1_ps(*p); }
FB_INLINE fb_f32_vec fb_f32_load(const float *p) { return _mm512_loadu_ps(p); }
FB_INLINE void fb_f32_store(float *p, fb_f32_vec v) { _mm512_storeu_ps(p, v); }
FB_INLINE fb_f32_vec fb_f32_load_first(const float *p, ptrdiff_t n)
{
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
FB_INLINE void fb_f32_store_first(float *p, fb_f32_vec v, ptrdiff_t n)
{
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v);
}
FB_INLINE void fb_f32_stream(float *p, fb_f32_vec v)
{
    if ((uintptr_t)p % 64 == 0) {
        _mm512_stream_ps(p, v);
        return;
    }
    _mm_stream_ps(p, _mm512_extractf32x4_ps(v, 0));
    _mm_stream_ps(p + 4, _mm512_extractf32x4_ps(v, 1));
    _mm_stream_ps(p + 8, _mm512_extractf32x4_ps(v, 2));
    _mm_stream_ps(p + 12, _mm512_extractf32x4_ps(v, 3));
}
FB_INLINE void fb_f32_stream_end(void) { _mm_sfence(); }
FB_INLINE fb_f32_vec fb_f32_add(fb_f32_vec a, fb_f32_vec b) { return _mm512_add_ps(a, b); }
FB_INLINE fb_f32_vec fb_f32_sub(fb_f32_vec a, fb_f32_vec b) { return _mm512_sub_ps(a, b); }
FB_INLINE fb_f32_vec fb_f32_mul(fb_f32_vec a, fb_f32_vec b) { return _mm512_mul_ps(a, b); }
FB_INLINE fb_f32_vec fb_f32_fma(fb_f32_vec a, fb_f32_vec b, fb_f32_vec c) { return _mm512_fmadd_ps(a, b, c); }
FB_INLINE fb_f32_vec fb_f32_max(fb_f32_vec a, fb_f32_vec b) { return _mm512_max_ps(a, b); }
FB_INLINE fb_f32_vec fb_f32_min(fb_f32_vec a, fb_f32_vec b) { return _mm512_min_ps(a, b); }
/* one instruction: of each class of numbers what becomes of it; 0: the NaN, 1: itself, 8: +0.0 */
FB_INLINE fb_f32_vec fb_f32_canonical(fb_f32_vec v)
{
    return _mm512_fixupimm_ps(_mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)), v, _mm512_set1_epi32(0x11111800), 0);
}
FB_INLINE void fb_f32_end(const int n, fb_f32_vec *s, int relu)
{
    static const int32_t nan_and_classes[3] = {0x7fc00000, 0x11111800, 0x18181800};
    const int32_t *constant = nan_and_classes;
    __asm__ volatile("" : "+r"(constant)); /* or they would be in registers, which loops before need, from the start */
    const __m512i classes = _mm512_set1_epi32(constant[relu ? 2 : 1]);
    FB_UNROLL
    for (int i = 0; i < n; i++)
        s[i] = _mm512_fixupimm_ps(_mm512_castsi512_ps(_mm512_set1_epi32(constant[0])), s[i], classes, 0);
}
FB_INLINE fb_f32_vec fb_f32_relu(fb_f32_vec v)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ), v);
}
FB_INLINE unsigned fb_f32_nonzero(fb_f32_vec v)
{
    return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
}
FB_INLINE void fb_f32_compress(fb_f32_vec v, unsigned keep, int first, float *value, uint16_t *offset)
{
    __m512i lane = _mm512_add_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                    _mm512_set1_epi32(first));
    _mm512_storeu_ps(value, _mm512_maskz_compress_ps((__mmask16)keep, v));
    lane = _mm512_slli_epi32(_mm512_maskz_compress_epi32((__mmask16)keep, lane), 6);
    _mm256_storeu_si256((__m256i *)offset, _mm512_cvtepi32_epi16(lane));
}
FB_INLINE void fb_f32_transpose(fb_f32_vec *v)
{
    __m512 t[16];
    FB_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    FB_UNROLL
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
        v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    }
    FB_UNROLL
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
    }
    FB_UNROLL
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
#define FB_OWN_TRANSPOSE
#define FB_OWN_END
#define FB_OWN_FIRST
#define FB_OWN_STREAM
#define FB_BITS 32
#include "fb_simd_lanes.h"

/* ---- float64 */
#define FB_F64_LANES 8
typedef __m512d fb_f64_vec;

FB_INLINE fb_f64_vec fb_f64_zero(void) { return _mm512_setzero_pd(); }
FB_INLINE fb_f64_vec fb_f64_splat(const double *p) { return _mm512_set1_pd(*p); }
FB_INLINE fb_f64_vec fb_f64_load(const double *p) { return _mm512_loadu_pd(p); }
FB_INLINE void fb_f64_store(double *p, fb_f64_vec v) { _mm512_storeu_pd(p, v); }
FB_INLINE fb_f64_vec fb_f64_load_first(const double *p, ptrdiff_t n)
{
    return _mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
FB_INLINE void fb_f64_store_first(double *p, fb_f64_vec v, ptrdiff_t n)
{
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), v);
}
FB_INLINE void fb_f64_stream(double *p, fb_f64_vec v)
{
    fb_f32_stream((float *)p, _mm512_castpd_ps(v));
}
FB_INLINE void fb_f64_stream_end(void) { _mm_sfence(); }
FB_INLINE fb_f64_vec fb_f64_add(fb_f64_vec a, fb_f64_vec b) { return _mm512_add_pd(a, b); }
FB_INLINE fb_f64_vec fb_f64_sub(fb_f64_vec a, fb_f64_vec b) { return _mm512_sub_pd(a, b); }
FB_INLINE fb_f64_vec fb_f64_mul(fb_f64_vec a, fb_f64_vec b) { return _mm512_mul_pd(a, b); }
FB_INLINE fb_f64_vec fb_f64_fma(fb_f64_vec a, fb_f64_vec b, fb_f64_vec c) { return _mm512_fmadd_pd(a, b, c); }
FB_INLINE fb_f64_vec fb_f64_max(fb_f64_vec a, fb_f64_vec b) { return _mm512_max_pd(a, b); }
FB_INLINE fb_f64_vec fb_f64_min(fb_f64_vec a, fb_f64_vec b) { return _mm512_min_pd(a, b); }
/* one instruction: of each class of numbers what becomes of it; 0: the NaN, 1: itself, 8: +0.0 */
FB_INLINE fb_f64_vec fb_f64_canonical(fb_f64_vec v)
{
    return _mm512_fixupimm_pd(_mm512_castsi512_pd(_mm512_set1_epi64(0x7ff8000000000000)), v,
                              _mm512_set1_epi64(0x11111800), 0);
}
FB_INLINE void fb_f64_end(const int n, fb_f64_vec *s, int relu)
{
    static const int64_t nan_and_classes[3] = {0x7ff8000000000000, 0x11111800, 0x18181800};
    const int64_t *constant = nan_and_classes;
    __asm__ volatile("" : "+r"(constant)); /* or they would be in registers, which loops before need, from the start */
    const __m512i classes = _mm512_set1_epi64(constant[relu ? 2 : 1]);
    FB_UNROLL
    for (int i = 0; i < n; i++)
        s[i] = _mm512_fixupimm_pd(_mm512_castsi512_pd(_mm512_set1_epi64(constant[0])), s[i], classes, 0);
}
FB_INLINE fb_f64_vec fb_f64_relu(fb_f64_vec v)
{
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NLE_UQ), v);
}
FB_INLINE unsigned fb_f64_nonzero(fb_f64_vec v)
{
    return _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NEQ_UQ);
}
FB_INLINE void fb_f64_compress(fb_f64_vec v, unsigned keep, int first, double *value, uint16_t *offset)
{
    __m512i lane = _mm512_add_epi64(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi64(first));
    _mm512_storeu_pd(value, _mm512_maskz_compress_pd((__mmask8)keep, v));
    lane = _mm512_slli_epi64(_mm512_maskz_compress_epi64((__mmask8)keep, lane), 6);
    _mm_storeu_si128((__m128i *)offset, _mm512_cvtepi64_epi16(lane));
}
FB_INLINE void fb_f64_transpose(fb_f64_vec *v)
{
    __m512d t[8];
    FB_UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm512_unpacklo_pd(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_pd(v[i], v[i + 1]);
    }
    FB_UNROLL
    for (int i = 0; i < 2; i++) {
        v[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
        v[i + 2] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
        v[i + 4] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
        v[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
    }
    FB_UNROLL
    for (int i = 0; i < 2; i++) {
        t[i] = _mm512_shuffle_f64x2(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f64x2(v[i], v[i + 4], 0xdd);
        t[i + 2] = _mm512_shuffle_f64x2(v[i + 2], v[i + 6], 0x88);
        t[i + 6] = _mm512_shuffle_f64x2(v[i + 2], v[i + 6], 0xdd);
    }
    FB_UNROLL
    for (int i = 0; i < 8; i++)
        v[i] = t[i];
}
#define FB_OWN_TRANSPOSE
#define FB_OWN_END
#define FB_OWN_FIRST
#define FB_OWN_STREAM
#define FB_BITS 64
#include "fb_simd_lanes.h"

/* ---- for exp in float32, from t = k + 1.5 * 2**23: table[k % 8], and v * 2**(k / 8 rounded down), no subnormals;
 * tables have 16 entries, twice the same 8 */
FB_INLINE fb_f32_vec fb_f32_lookup8(const float *table, fb_f32_vec t)
{
    return _mm512_permutexvar_ps(_mm512_castps_si512(t), _mm512_loadu_ps(table));
}
FB_INLINE fb_f32_vec fb_f32_scale8(fb_f32_vec v, fb_f32_vec t)
{
    __m512i n = _mm512_slli_epi32(_mm512_and_si512(_mm512_castps_si512(t), _mm512_set1_epi32(-8)), 20);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), n));
}

/* ---- for exp: 2**n from t = n + 1.5 * 2**52, and float32 <-> two halves of float64 */
FB_INLINE fb_f64_vec fb_f64_pow2(fb_f64_vec t)
{
    __m512i biased = _mm512_add_epi64(_mm512_castpd_si512(t), _mm512_set1_epi64(1023));
    return _mm512_castsi512_pd(_mm512_slli_epi64(biased, 52));
}
FB_INLINE fb_f64_vec fb_f32_widen_low(fb_f32_vec v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
FB_INLINE fb_f64_vec fb_f32_widen_high(fb_f32_vec v)
{
    return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
}
FB_INLINE fb_f32_vec fb_f32_narrow(fb_f64_vec low, fb_f64_vec high)
{
    __m512d joined = _mm512_castps_pd(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)));
    return _mm512_castpd_ps(_mm512_insertf64x4(joined, _mm256_castps_pd(_mm512_cvtpd_ps(high)), 1));
}
