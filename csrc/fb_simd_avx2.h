/* fb_simd_avx2.h - the vector operations on AVX2 + FMA: 8 float or 4 double lanes.
 *
 * Every fb_simd_*.h defines the same operations in the same order; the diff of two is the comparison of the
 * instruction sets. Each operation rounds once (contract section 1); fma is one rounding everywhere, max and min
 * return the second operand when one is NaN (or NaN: callers only rely on a NaN in the second operand surviving).
 */
#include <immintrin.h>

/* Registers: 16. A tile of 6 rows x 1 panel (2 vectors) holds 12 accumulators, 2 weights and 1 broadcast in 15. */
#define FB_TILE_ROWS 6
#define FB_DIRECT_ROWS 6
#define FB_TILE_PANELS(rows) ((rows) == 1 ? 6 : (rows) == 2 ? 3 : (rows) == 3 ? 2 : 1)
#define FB_TILE_VECS 12
#define FB_DIRECT_PANELS 8 /* see product */
#define FB_TILE_FUNCTION FB_INLINE
#define FB_FETCH_GROUP 1
#define FB_FETCH_SPREAD 0
#define FB_FETCH_NEXT_A 0
#define FB_DENSE_FROM 0.85
#define FB_DENSE_FEW 0.25
#define FB_FEW_ROWS 7
#define FB_SPARSE_PANELS(rows) ((rows) > 3 ? 4 : 6) /* see sparse_rows */
#define FB_PANEL_CASES(X) X(1) X(2) X(3) X(4) X(5) X(6)
#define FB_MOST_PANELS 6
#define FB_TILE_CASES(X) X(1) X(2) X(3) X(4) X(5) X(6)

/* The bit positions of an 8-bit (4-bit) mask, packed to the front, one byte each: permutations for compress. */
static const uint64_t fb_avx2_compress8[256] = {
    0x0000000000000000, 0x0000000000000000, 0x0000000000000001, 0x0000000000000100,
    0x0000000000000002, 0x0000000000000200, 0x0000000000000201, 0x0000000000020100,
    0x0000000000000003, 0x0000000000000300, 0x0000000000000301, 0x0000000000030100,
    0x0000000000000302, 0x0000000000030200, 0x0000000000030201, 0x0000000003020100,
    0x0000000000000004, 0x0000000000000400, 0x0000000000000401, 0x0000000000040100,
    0x0000000000000402, 0x0000000000040200, 0x0000000000040201, 0x0000000004020100,
    0x0000000000000403, 0x0000000000040300, 0x0000000000040301, 0x0000000004030100,
    0x0000000000040302, 0x0000000004030200, 0x0000000004030201, 0x0000000403020100,
    0x0000000000000005, 0x0000000000000500, 0x0000000000000501, 0x0000000000050100,
    0x0000000000000502, 0x0000000000050200, 0x0000000000050201, 0x0000000005020100,
    0x0000000000000503, 0x0000000000050300, 0x0000000000050301, 0x0000000005030100,
    0x0000000000050302, 0x0000000005030200, 0x0000000005030201, 0x0000000503020100,
    0x0000000000000504, 0x0000000000050400, 0x0000000000050401, 0x0000000005040100,
    0x0000000000050402, 0x0000000005040200, 0x0000000005040201, 0x0000000504020100,
    0x0000000000050403, 0x0000000005040300, 0x0000000005040301, 0x0000000504030100,
    0x0000000005040302, 0x0000000504030200, 0x0000000504030201, 0x0000050403020100,
    0x0000000000000006, 0x0000000000000600, 0x0000000000000601, 0x0000000000060100,
    0x0000000000000602, 0x0000000000060200, 0x0000000000060201, 0x0000000006020100,
    0x0000000000000603, 0x0000000000060300, 0x0000000000060301, 0x0000000006030100,
    0x0000000000060302, 0x0000000006030200, 0x0000000006030201, 0x0000000603020100,
    0x0000000000000604, 0x0000000000060400, 0x0000000000060401, 0x0000000006040100,
    0x0000000000060402, 0x0000000006040200, 0x0000000006040201, 0x0000000604020100,
    0x0000000000060403, 0x0000000006040300, 0x0000000006040301, 0x0000000604030100,
    0x0000000006040302, 0x0000000604030200, 0x0000000604030201, 0x0000060403020100,
    0x0000000000000605, 0x0000000000060500, 0x0000000000060501, 0x0000000006050100,
    0x0000000000060502, 0x0000000006050200, 0x0000000006050201, 0x0000000605020100,
    0x0000000000060503, 0x0000000006050300, 0x0000000006050301, 0x0000000605030100,
    0x0000000006050302, 0x0000000605030200, 0x0000000605030201, 0x0000060503020100,
    0x0000000000060504, 0x0000000006050400, 0x0000000006050401, 0x0000000605040100,
    0x0000000006050402, 0x0000000605040200, 0x0000000605040201, 0x0000060504020100,
    0x0000000006050403, 0x0000000605040300, 0x0000000605040301, 0x0000060504030100,
    0x0000000605040302, 0x0000060504030200, 0x0000060504030201, 0x0006050403020100,
    0x0000000000000007, 0x0000000000000700, 0x0000000000000701, 0x0000000000070100,
    0x0000000000000702, 0x0000000000070200, 0x0000000000070201, 0x0000000007020100,
    0x0000000000000703, 0x0000000000070300, 0x0000000000070301, 0x0000000007030100,
    0x0000000000070302, 0x0000000007030200, 0x0000000007030201, 0x0000000703020100,
    0x0000000000000704, 0x0000000000070400, 0x0000000000070401, 0x0000000007040100,
    0x0000000000070402, 0x0000000007040200, 0x0000000007040201, 0x0000000704020100,
    0x0000000000070403, 0x0000000007040300, 0x0000000007040301, 0x0000000704030100,
    0x0000000007040302, 0x0000000704030200, 0x0000000704030201, 0x0000070403020100,
    0x0000000000000705, 0x0000000000070500, 0x0000000000070501, 0x0000000007050100,
    0x0000000000070502, 0x0000000007050200, 0x0000000007050201, 0x0000000705020100,
    0x0000000000070503, 0x0000000007050300, 0x0000000007050301, 0x0000000705030100,
    0x0000000007050302, 0x0000000705030200, 0x0000000705030201, 0x0000070503020100,
    0x0000000000070504, 0x0000000007050400, 0x0000000007050401, 0x0000000705040100,
    0x0000000007050402, 0x0000000705040200, 0x0000000705040201, 0x0000070504020100,
    0x0000000007050403, 0x0000000705040300, 0x0000000705040301, 0x0000070504030100,
    0x0000000705040302, 0x0000070504030200, 0x0000070504030201, 0x0007050403020100,
    0x0000000000000706, 0x0000000000070600, 0x0000000000070601, 0x0000000007060100,
    0x0000000000070602, 0x0000000007060200, 0x0000000007060201, 0x0000000706020100,
    0x0000000000070603, 0x0000000007060300, 0x0000000007060301, 0x0000000706030100,
    0x0000000007060302, 0x0000000706030200, 0x0000000706030201, 0x0000070603020100,
    0x0000000000070604, 0x0000000007060400, 0x0000000007060401, 0x0000000706040100,
    0x0000000007060402, 0x0000000706040200, 0x0000000706040201, 0x0000070604020100,
    0x0000000007060403, 0x0000000706040300, 0x0000000706040301, 0x0000070604030100,
    0x0000000706040302, 0x0000070604030200, 0x0000070604030201, 0x0007060403020100,
    0x0000000000070605, 0x0000000007060500, 0x0000000007060501, 0x0000000706050100,
    0x0000000007060502, 0x0000000706050200, 0x0000000706050201, 0x0000070605020100,
    0x0000000007060503, 0x0000000706050300, 0x0000000706050301, 0x0000070605030100,
    0x0000000706050302, 0x0000070605030200, 0x0000070605030201, 0x0007060503020100,
    0x0000000007060504, 0x0000000706050400, 0x0000000706050401, 0x0000070605040100,
    0x0000000706050402, 0x0000070605040200, 0x0000070605040201, 0x0007060504020100,
    0x0000000706050403, 0x0000070605040300, 0x0000070605040301, 0x0007060504030100,
    0x0000070605040302, 0x0007060504030200, 0x0007060504030201, 0x0706050403020100,
};
static const uint64_t fb_avx2_compress4[16] = {
    0x0000000000000000, 0x0000000000000100, 0x0000000000000302, 0x0000000003020100, 0x0000000000000504,
    0x0000000005040100, 0x0000000005040302, 0x0000050403020100, 0x0000000000000706, 0x0000000007060100,
    0x0000000007060302, 0x0000070603020100, 0x0000000007060504, 0x0000070605040100, 0x0000070605040302,
    0x0706050403020100,
};

/* From element 8 - n on: the mask of the first n of 8 lanes. */
static const int32_t fb_avx2_first[16] = {-1, -1, -1, -1, -1, -1, -1, -1};

/* ---- float32 */
#define FB_F32_LANES 8
typedef __m256 fb_f32_vec;

FB_INLINE fb_f32_vec fb_f32_zero(void) { return _mm256_setzero_ps(); }
FB_INLINE fb_f32_vec fb_f32_splat(const float *p) { return _mm256_broadcast_ss(p); }
FB_INLINE void fb_f32_splats(const float *p, fb_f32_vec *v)
{
    const fb_f32_vec x = _mm256_broadcast_ps((const __m128 *)(const void *)p);
    v[0] = _mm256_permute_ps(x, 0x00);
    v[1] = _mm256_permute_ps(x, 0x55);
    v[2] = _mm256_permute_ps(x, 0xaa);
    v[3] = _mm256_permute_ps(x, 0xff);
}
FB_INLINE fb_f32_vec fb_f32_load(const float *p) { return _mm256_loadu_ps(p); }
FB_INLINE void fb_f32_store(float *p, fb_f32_vec v) { _mm256_storeu_ps(p, v); }
FB_INLINE fb_f32_vec fb_f32_load_first(const float *p, ptrdiff_t n)
{
    return _mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i *)(const void *)(fb_avx2_first + 8 - n)));
}
FB_INLINE void fb_f32_store_first(float *p, fb_f32_vec v, ptrdiff_t n) /* masked stores are slow on Zen 1 to 3 */
{
    __m128 part = _mm256_castps256_ps128(v);
    if (n & 8)
        _mm256_storeu_ps(p, v);
    if (n & 4) {
        _mm_storeu_ps(p, part);
        part = _mm256_extractf128_ps(v, 1);
        p += 4;
    }
    if (n & 2) {
        _mm_storel_pi((__m64 *)(void *)p, part);
        part = _mm_movehl_ps(part, part);
        p += 2;
    }
    if (n & 1)
        _mm_store_ss(p, part);
}
FB_INLINE void fb_f32_stream(float *p, fb_f32_vec v)
{
    _mm_stream_ps(p, _mm256_castps256_ps128(v));
    _mm_stream_ps(p + 4, _mm256_extractf128_ps(v, 1));
}
FB_INLINE void fb_f32_stream_end(void) { _mm_sfence(); }
FB_INLINE fb_f32_vec fb_f32_add(fb_f32_vec a, fb_f32_vec b) { return _mm256_add_ps(a, b); }
FB_INLINE fb_f32_vec fb_f32_sub(fb_f32_vec a, fb_f32_vec b) { return _mm256_sub_ps(a, b); }
FB_INLINE fb_f32_vec fb_f32_mul(fb_f32_vec a, fb_f32_vec b) { return _mm256_mul_ps(a, b); }
FB_INLINE fb_f32_vec fb_f32_fma(fb_f32_vec a, fb_f32_vec b, fb_f32_vec c) { return _mm256_fmadd_ps(a, b, c); }
FB_INLINE fb_f32_vec fb_f32_max(fb_f32_vec a, fb_f32_vec b) { return _mm256_max_ps(a, b); }
FB_INLINE fb_f32_vec fb_f32_min(fb_f32_vec a, fb_f32_vec b) { return _mm256_min_ps(a, b); }
FB_INLINE fb_f32_vec fb_f32_canonical(fb_f32_vec v)
{
    v = _mm256_add_ps(v, _mm256_setzero_ps());
    return _mm256_blendv_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}
FB_INLINE fb_f32_vec fb_f32_relu(fb_f32_vec v)
{
    return _mm256_and_ps(v, _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ));
}
FB_INLINE unsigned fb_f32_nonzero(fb_f32_vec v)
{
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
FB_INLINE void fb_f32_compress(fb_f32_vec v, unsigned keep, int first, float *value, uint16_t *offset)
{
    __m128i byte = _mm_cvtsi64_si128((long long)fb_avx2_compress8[keep]);
    _mm256_storeu_ps(value, _mm256_permutevar8x32_ps(v, _mm256_cvtepu8_epi32(byte)));
    __m128i lane = _mm_add_epi16(_mm_cvtepu8_epi16(byte), _mm_set1_epi16((short)first));
    _mm_storeu_si128((__m128i *)offset, _mm_slli_epi16(lane, 6));
}
FB_INLINE void fb_f32_transpose(fb_f32_vec *v)
{
    fb_f32_vec pair[8], four[8];
    FB_UNROLL
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    FB_UNROLL
    for (int i = 0; i < 8; i += 4) {
        four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    FB_UNROLL
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x31);
    }
}
#define FB_OWN_SPLATS
#define FB_OWN_FIRST
#define FB_OWN_STREAM
#define FB_OWN_TRANSPOSE
#define FB_BITS 32
#include "fb_simd_lanes.h"

/* ---- float64 */
#define FB_F64_LANES 4
typedef __m256d fb_f64_vec;

FB_INLINE fb_f64_vec fb_f64_zero(void) { return _mm256_setzero_pd(); }
FB_INLINE fb_f64_vec fb_f64_splat(const double *p) { return _mm256_broadcast_sd(p); }
FB_INLINE fb_f64_vec fb_f64_load(const double *p) { return _mm256_loadu_pd(p); }
FB_INLINE void fb_f64_store(double *p, fb_f64_vec v) { _mm256_storeu_pd(p, v); }
FB_INLINE fb_f64_vec fb_f64_load_first(const double *p, ptrdiff_t n)
{
    return _mm256_maskload_pd(p, _mm256_loadu_si256((const __m256i *)(const void *)(fb_avx2_first + 8 - 2 * n)));
}
FB_INLINE void fb_f64_store_first(double *p, fb_f64_vec v, ptrdiff_t n)
{
    __m128d part = _mm256_castpd256_pd128(v);
    if (n & 4)
        _mm256_storeu_pd(p, v);
    if (n & 2) {
        _mm_storeu_pd(p, part);
        part = _mm256_extractf128_pd(v, 1);
        p += 2;
    }
    if (n & 1)
        _mm_store_sd(p, part);
}
FB_INLINE void fb_f64_stream(double *p, fb_f64_vec v)
{
    _mm_stream_pd(p, _mm256_castpd256_pd128(v));
    _mm_stream_pd(p + 2, _mm256_extractf128_pd(v, 1));
}
FB_INLINE void fb_f64_stream_end(void) { _mm_sfence(); }
FB_INLINE fb_f64_vec fb_f64_add(fb_f64_vec a, fb_f64_vec b) { return _mm256_add_pd(a, b); }
FB_INLINE fb_f64_vec fb_f64_sub(fb_f64_vec a, fb_f64_vec b) { return _mm256_sub_pd(a, b); }
FB_INLINE fb_f64_vec fb_f64_mul(fb_f64_vec a, fb_f64_vec b) { return _mm256_mul_pd(a, b); }
FB_INLINE fb_f64_vec fb_f64_fma(fb_f64_vec a, fb_f64_vec b, fb_f64_vec c) { return _mm256_fmadd_pd(a, b, c); }
FB_INLINE fb_f64_vec fb_f64_max(fb_f64_vec a, fb_f64_vec b) { return _mm256_max_pd(a, b); }
FB_INLINE fb_f64_vec fb_f64_min(fb_f64_vec a, fb_f64_vec b) { return _mm256_min_pd(a, b); }
FB_INLINE fb_f64_vec fb_f64_canonical(fb_f64_vec v)
{
    v = _mm256_add_pd(v, _mm256_setzero_pd());
    return _mm256_blendv_pd(v, _mm256_castsi256_pd(_mm256_set1_epi64x(0x7ff8000000000000)),
                            _mm256_cmp_pd(v, v, _CMP_UNORD_Q));
}
FB_INLINE fb_f64_vec fb_f64_relu(fb_f64_vec v)
{
    return _mm256_and_pd(v, _mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NLE_UQ));
}
FB_INLINE unsigned fb_f64_nonzero(fb_f64_vec v)
{
    return (unsigned)_mm256_movemask_pd(_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NEQ_UQ));
}
FB_INLINE void fb_f64_compress(fb_f64_vec v, unsigned keep, int first, double *value, uint16_t *offset)
{
    __m256i half = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)fb_avx2_compress4[keep]));
    _mm256_storeu_pd(value, _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(v), half)));
    __m128i byte = _mm_cvtsi64_si128((long long)fb_avx2_compress8[keep]);
    __m128i lane = _mm_add_epi16(_mm_cvtepu8_epi16(byte), _mm_set1_epi16((short)first));
    _mm_storel_epi64((__m128i *)offset, _mm_slli_epi16(lane, 6));
}
FB_INLINE void fb_f64_transpose(fb_f64_vec *v)
{
    const fb_f64_vec a = _mm256_unpacklo_pd(v[0], v[1]), b = _mm256_unpackhi_pd(v[0], v[1]);
    const fb_f64_vec c = _mm256_unpacklo_pd(v[2], v[3]), d = _mm256_unpackhi_pd(v[2], v[3]);
    v[0] = _mm256_permute2f128_pd(a, c, 0x20);
    v[1] = _mm256_permute2f128_pd(b, d, 0x20);
    v[2] = _mm256_permute2f128_pd(a, c, 0x31);
    v[3] = _mm256_permute2f128_pd(b, d, 0x31);
}
#define FB_OWN_FIRST
#define FB_OWN_STREAM
#define FB_OWN_TRANSPOSE
#define FB_BITS 64
#include "fb_simd_lanes.h"

/* ---- for exp in float32, from t = k + 1.5 * 2**23: table[k % 8], and v * 2**(k / 8 rounded down), no subnormals;
 * tables have 16 entries, twice the same 8 */
FB_INLINE fb_f32_vec fb_f32_lookup8(const float *table, fb_f32_vec t)
{
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), _mm256_castps_si256(t));
}
FB_INLINE fb_f32_vec fb_f32_scale8(fb_f32_vec v, fb_f32_vec t)
{
    __m256i n = _mm256_slli_epi32(_mm256_and_si256(_mm256_castps_si256(t), _mm256_set1_epi32(-8)), 20);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), n));
}

/* ---- for exp: 2**n from t = n + 1.5 * 2**52, and float32 <-> two halves of float64 */
FB_INLINE fb_f64_vec fb_f64_pow2(fb_f64_vec t)
{
    __m256i biased = _mm256_add_epi64(_mm256_castpd_si256(t), _mm256_set1_epi64x(1023));
    return _mm256_castsi256_pd(_mm256_slli_epi64(biased, 52));
}
FB_INLINE fb_f64_vec fb_f32_widen_low(fb_f32_vec v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
FB_INLINE fb_f64_vec fb_f32_widen_high(fb_f32_vec v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }
FB_INLINE fb_f32_vec fb_f32_narrow(fb_f64_vec low, fb_f64_vec high)
{
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(low)), _mm256_cvtpd_ps(high), 1);
}
