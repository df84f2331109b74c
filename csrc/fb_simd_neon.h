/* fb_simd_neon.h - the vector operations on AArch64 Advanced SIMD: 4 float or 2 double lanes.
 *
 * Every fb_simd_*.h defines the same operations in the same order; the diff of two is the comparison of the
 * instruction sets. Each operation rounds once (contract section 1); fma is one rounding everywhere, max and min
 * return the second operand when one is NaN (or NaN: callers only rely on a NaN in the second operand surviving).
 */
#include <arm_neon.h>

/* Registers: 32. A tile of 6 rows x 1 panel (4 vectors) holds 24 accumulators, 4 weights and 1 broadcast in 29. */
#define FB_TILE_ROWS 6
#define FB_DIRECT_ROWS 6
#define FB_TILE_PANELS(rows) ((rows) == 1 ? 6 : (rows) == 2 ? 3 : (rows) == 3 ? 2 : 1)
#define FB_TILE_VECS 24
#define FB_DIRECT_PANELS 0 /* not tuned */
#define FB_TILE_FUNCTION FB_INLINE
#define FB_FETCH_GROUP 1
#define FB_FETCH_SPREAD 0
#define FB_FETCH_NEXT_A 0
#define FB_DENSE_FROM 0.85
#define FB_DENSE_FEW 0.25
#define FB_FEW_ROWS 7
#define FB_SPARSE_PANELS(rows) 6
#define FB_PANEL_CASES(X) X(1) X(2) X(3) X(4) X(5) X(6)
#define FB_MOST_PANELS 6
#define FB_TILE_CASES(X) X(1) X(2) X(3) X(4) X(5) X(6)

/* ---- float32 */
#define FB_F32_LANES 4
typedef float32x4_t fb_f32_vec;

FB_INLINE fb_f32_vec fb_f32_zero(void) { return vdupq_n_f32(0); }
FB_INLINE fb_f32_vec fb_f32_splat(const float *p) { return vld1q_dup_f32(p); }
FB_INLINE fb_f32_vec fb_f32_load(const float *p) { return vld1q_f32(p); }
FB_INLINE void fb_f32_store(float *p, fb_f32_vec v) { vst1q_f32(p, v); }
FB_INLINE fb_f32_vec fb_f32_add(fb_f32_vec a, fb_f32_vec b) { return vaddq_f32(a, b); }
FB_INLINE fb_f32_vec fb_f32_sub(fb_f32_vec a, fb_f32_vec b) { return vsubq_f32(a, b); }
FB_INLINE fb_f32_vec fb_f32_mul(fb_f32_vec a, fb_f32_vec b) { return vmulq_f32(a, b); }
FB_INLINE fb_f32_vec fb_f32_fma(fb_f32_vec a, fb_f32_vec b, fb_f32_vec c) { return vfmaq_f32(c, a, b); }
FB_INLINE fb_f32_vec fb_f32_max(fb_f32_vec a, fb_f32_vec b) { return vmaxq_f32(a, b); }
FB_INLINE fb_f32_vec fb_f32_min(fb_f32_vec a, fb_f32_vec b) { return vminq_f32(a, b); }
FB_INLINE fb_f32_vec fb_f32_canonical(fb_f32_vec v)
{
    v = vaddq_f32(v, vdupq_n_f32(0));
    return vbslq_f32(vceqq_f32(v, v), v, vreinterpretq_f32_u32(vdupq_n_u32(0x7fc00000)));
}
FB_INLINE fb_f32_vec fb_f32_relu(fb_f32_vec v)
{
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vclezq_f32(v)));
}
FB_INLINE unsigned fb_f32_nonzero(fb_f32_vec v)
{
    const uint32x4_t bit = {1, 2, 4, 8};
    return vaddvq_u32(vbicq_u32(bit, vceqzq_f32(v)));
}
FB_INLINE void fb_f32_compress(fb_f32_vec v, unsigned keep, int first, float *value, uint16_t *offset)
{
    float lane[4];
    vst1q_f32(lane, v);
    for (int i = 0, n = 0; i < 4; n += keep >> i & 1, i++) { /* branchless: write, then advance past a kept lane */
        value[n] = lane[i];
        offset[n] = (uint16_t)((first + i) * 64);
    }
}
#define FB_BITS 32
#include "fb_simd_lanes.h"

/* ---- float64 */
#define FB_F64_LANES 2
typedef float64x2_t fb_f64_vec;

FB_INLINE fb_f64_vec fb_f64_zero(void) { return vdupq_n_f64(0); }
FB_INLINE fb_f64_vec fb_f64_splat(const double *p) { return vld1q_dup_f64(p); }
FB_INLINE fb_f64_vec fb_f64_load(const double *p) { return vld1q_f64(p); }
FB_INLINE void fb_f64_store(double *p, fb_f64_vec v) { vst1q_f64(p, v); }
FB_INLINE fb_f64_vec fb_f64_add(fb_f64_vec a, fb_f64_vec b) { return vaddq_f64(a, b); }
FB_INLINE fb_f64_vec fb_f64_sub(fb_f64_vec a, fb_f64_vec b) { return vsubq_f64(a, b); }
FB_INLINE fb_f64_vec fb_f64_mul(fb_f64_vec a, fb_f64_vec b) { return vmulq_f64(a, b); }
FB_INLINE fb_f64_vec fb_f64_fma(fb_f64_vec a, fb_f64_vec b, fb_f64_vec c) { return vfmaq_f64(c, a, b); }
FB_INLINE fb_f64_vec fb_f64_max(fb_f64_vec a, fb_f64_vec b) { return vmaxq_f64(a, b); }
FB_INLINE fb_f64_vec fb_f64_min(fb_f64_vec a, fb_f64_vec b) { return vminq_f64(a, b); }
FB_INLINE fb_f64_vec fb_f64_canonical(fb_f64_vec v)
{
    v = vaddq_f64(v, vdupq_n_f64(0));
    return vbslq_f64(vceqq_f64(v, v), v, vreinterpretq_f64_u64(vdupq_n_u64(0x7ff8000000000000)));
}
FB_INLINE fb_f64_vec fb_f64_relu(fb_f64_vec v)
{
    return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(v), vclezq_f64(v)));
}
FB_INLINE unsigned fb_f64_nonzero(fb_f64_vec v)
{
    const uint64x2_t bit = {1, 2};
    return (unsigned)vaddvq_u64(vbicq_u64(bit, vceqzq_f64(v)));
}
FB_INLINE void fb_f64_compress(fb_f64_vec v, unsigned keep, int first, double *value, uint16_t *offset)
{
    double lane[2];
    vst1q_f64(lane, v);
    for (int i = 0, n = 0; i < 2; n += keep >> i & 1, i++) { /* branchless: write, then advance past a kept lane */
        value[n] = lane[i];
        offset[n] = (uint16_t)((first + i) * 64);
    }
}
#define FB_BITS 64
#include "fb_simd_lanes.h"

/* ---- for exp in float32, from t = k + 1.5 * 2**23: table[k % 8], and v * 2**(k / 8 rounded down), no subnormals;
 * tables have 16 entries, twice the same 8 */
FB_INLINE fb_f32_vec fb_f32_lookup8(const float *table, fb_f32_vec t)
{
    uint32_t k[4];
    vst1q_u32(k, vreinterpretq_u32_f32(t));
    const float lane[4] = {table[k[0] & 7], table[k[1] & 7], table[k[2] & 7], table[k[3] & 7]};
    return vld1q_f32(lane);
}
FB_INLINE fb_f32_vec fb_f32_scale8(fb_f32_vec v, fb_f32_vec t)
{
    uint32x4_t n = vshlq_n_u32(vandq_u32(vreinterpretq_u32_f32(t), vdupq_n_u32(0xfffffff8)), 20);
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(v), n));
}

/* ---- for exp: 2**n from t = n + 1.5 * 2**52, and float32 <-> two halves of float64 */
FB_INLINE fb_f64_vec fb_f64_pow2(fb_f64_vec t)
{
    int64x2_t biased = vaddq_s64(vreinterpretq_s64_f64(t), vdupq_n_s64(1023));
    return vreinterpretq_f64_s64(vshlq_n_s64(biased, 52));
}
FB_INLINE fb_f64_vec fb_f32_widen_low(fb_f32_vec v) { return vcvt_f64_f32(vget_low_f32(v)); }
FB_INLINE fb_f64_vec fb_f32_widen_high(fb_f32_vec v) { return vcvt_high_f64_f32(v); }
FB_INLINE fb_f32_vec fb_f32_narrow(fb_f64_vec low, fb_f64_vec high)
{
    return vcvt_high_f32_f64(vcvt_f32_f64(low), high);
}
