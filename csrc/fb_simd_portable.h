/* fb_simd_portable.h - the vector operations in plain C: 4 float or 2 double lanes in a struct.
 *
 * Every fb_simd_*.h defines the same operations in the same order; the diff of two is the comparison of the
 * instruction sets. Each operation rounds once (contract section 1); fma is one rounding everywhere, max and min
 * return the second operand when one is NaN (or NaN: callers only rely on a NaN in the second operand surviving).
 *
 * Where the target has no fma instruction it is emulated here and never left to libm, whose fma is wrong on musl,
 * mingw-w64 and MSYS2.
 */
#include <math.h>
#include <string.h>

#define FB_TILE_ROWS 4
#define FB_TILE_PANELS(rows) 1
#define FB_DIRECT_ROWS FB_TILE_ROWS
#define FB_TILE_VECS 16
#define FB_DIRECT_PANELS 0 /* not tuned */
#define FB_TILE_FUNCTION FB_INLINE
#define FB_FETCH_GROUP 1
#define FB_FETCH_SPREAD 0
#define FB_FETCH_NEXT_A 0
#define FB_DENSE_FROM 0.85
#define FB_DENSE_FEW 0.25
#define FB_FEW_ROWS 7
#define FB_SPARSE_PANELS(rows) 1
#define FB_PANEL_CASES(X) X(1)
#define FB_MOST_PANELS 1
#define FB_TILE_CASES(X) X(1) X(2) X(3) X(4)

FB_INLINE uint64_t fb_bits64(double x) { uint64_t u; memcpy(&u, &x, 8); return u; }
FB_INLINE double fb_from_bits64(uint64_t u) { double x; memcpy(&x, &u, 8); return x; }

/* s = a + b rounded, *error the exact rest (Knuth). */
FB_INLINE double fb_two_sum(double a, double b, double *error)
{
    double s = a + b, t = s - a;
    *error = (a - (s - t)) + (b - t);
    return s;
}
/* a + b rounded to odd: the last bit of an inexact sum is 1, so that a second rounding to fewer bits is right. */
FB_INLINE double fb_add_odd(double a, double b)
{
    double e, s = fb_two_sum(a, b, &e);
    uint64_t u = fb_bits64(s);
    if (e != 0 && !(u & 1))
        u += (e > 0) == (s > 0) ? 1 : (uint64_t)-1;
    return fb_from_bits64(u);
}
#ifdef __FP_FAST_FMAF
FB_INLINE float fb_fma_f32(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
FB_NOINLINE float fb_fma_f32(float a, float b, float c) /* inlined, its copies take gcc 12 a minute */
{
    double product = (double)a * b; /* exact: 48 bits */
    double sum = product + c;
    if (!(fabs(sum) < HUGE_VAL)) /* an infinity or NaN has no error term */
        return (float)sum;
    return (float)fb_add_odd(product, c); /* the one rounding that counts */
}
#endif

#ifdef __FP_FAST_FMA
FB_INLINE double fb_fma_f64(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
/* x + y + z rounded once (Boldo and Melquiond 2008), in pieces: the head and the odd-rounded rest. */
FB_INLINE double fb_sum3(double x, double y, double z, double *rest)
{
    double tl, vl, th = fb_two_sum(z, y, &tl), vh = fb_two_sum(x, th, &vl);
    *rest = fb_add_odd(tl, vl);
    return vh;
}
/* a * b rounded, *error the exact rest (Veltkamp, Dekker). */
FB_INLINE double fb_two_product(double a, double b, double *error)
{
    const double split = 134217729.0; /* 2**27 + 1 */
    double t = split * a, ah = t - (t - a), al = a - ah;
    double u = split * b, bh = u - (u - b), bl = b - bh, p = a * b;
    *error = ((ah * bh - p) + ah * bl + al * bh) + al * bl;
    return p;
}
/* Any operands: scale a and b into [1/2, 1), c along, and round a subnormal result at its absolute position. */
FB_NOINLINE double fb_fma_f64_scaled(double a, double b, double c)
{
    if (!(fabs(a) < HUGE_VAL) || !(fabs(b) < HUGE_VAL))
        return a * b + c;
    if (!(fabs(c) < HUGE_VAL))
        return c + c; /* infinity, or a quiet NaN */
    if (a == 0 || b == 0)
        return a * b + c;
    if (c == 0) /* the product alone is rounded */
        return a * b;
    int ea, eb, ec, er;
    double ma = frexp(a, &ea), mb = frexp(b, &eb), mc = frexp(c, &ec);
    int e = ea + eb, gap = ec - e; /* beyond 200 only the sign of the smaller one matters */
    int base = gap > 200 ? ec - 200 : e;
    double ul, z, uh = fb_two_product(ma, mb, &ul);
    double cc = ldexp(mc, gap > 200 ? 200 : gap < -200 ? -200 : gap);
    double vh = fb_sum3(uh, cc, ul, &z), r = vh + z;
    if (r == 0) /* exact cancellation gives +0 when rounding to nearest */
        return 0.0;
    frexp(r, &er);
    if (er + base > -1022)
        return ldexp(r, base);
    /* subnormal: a big addend with the right ulp makes the sum round at 2**-1074 */
    double t, big = copysign(ldexp(1.0, 52 - 1074 - base), r), h = fb_two_sum(big, vh, &t);
    double x = (h + fb_add_odd(t, z)) - big;
    return x == 0 ? copysign(0.0, r) : ldexp(x, base);
}
/* |x| in [2**-400, 2**400]: no step of the unscaled algorithm can overflow or underflow. */
FB_INLINE int fb_tame(double x) { return ((fb_bits64(x) >> 52 & 0x7ff) - 623) <= 800; }
FB_NOINLINE double fb_fma_f64(double a, double b, double c)
{
    if (!fb_tame(a) || !fb_tame(b) || !fb_tame(c))
        return fb_fma_f64_scaled(a, b, c);
    double ul, z, uh = fb_two_product(a, b, &ul), vh = fb_sum3(uh, c, ul, &z);
    return vh + z;
}
#endif

/* ---- float32 */
#define FB_F32_LANES 4
typedef struct { float lane[FB_F32_LANES]; } fb_f32_vec;
#define FB_EACH(n, expression) for (int i = 0; i < (n); i++) r.lane[i] = (expression)
#define FB_F32(expression) fb_f32_vec r; FB_EACH(FB_F32_LANES, expression); return r
#define FB_F64(expression) fb_f64_vec r; FB_EACH(FB_F64_LANES, expression); return r

FB_INLINE fb_f32_vec fb_f32_zero(void) { FB_F32(0); }
FB_INLINE fb_f32_vec fb_f32_splat(const float *p) { FB_F32(*p); }
FB_INLINE fb_f32_vec fb_f32_load(const float *p) { FB_F32(p[i]); }
FB_INLINE void fb_f32_store(float *p, fb_f32_vec v) { memcpy(p, v.lane, sizeof v.lane); }
FB_INLINE fb_f32_vec fb_f32_add(fb_f32_vec a, fb_f32_vec b) { FB_F32(a.lane[i] + b.lane[i]); }
FB_INLINE fb_f32_vec fb_f32_sub(fb_f32_vec a, fb_f32_vec b) { FB_F32(a.lane[i] - b.lane[i]); }
FB_INLINE fb_f32_vec fb_f32_mul(fb_f32_vec a, fb_f32_vec b) { FB_F32(a.lane[i] * b.lane[i]); }
FB_INLINE fb_f32_vec fb_f32_fma(fb_f32_vec a, fb_f32_vec b, fb_f32_vec c)
{
    FB_F32(fb_fma_f32(a.lane[i], b.lane[i], c.lane[i]));
}
FB_INLINE fb_f32_vec fb_f32_max(fb_f32_vec a, fb_f32_vec b) { FB_F32(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
FB_INLINE fb_f32_vec fb_f32_min(fb_f32_vec a, fb_f32_vec b) { FB_F32(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
FB_INLINE fb_f32_vec fb_f32_canonical(fb_f32_vec v)
{
    const uint32_t quiet = 0x7fc00000;
    float nan;
    memcpy(&nan, &quiet, 4);
    FB_F32(v.lane[i] == v.lane[i] ? v.lane[i] + 0.0f : nan);
}
FB_INLINE fb_f32_vec fb_f32_relu(fb_f32_vec v) { FB_F32(v.lane[i] <= 0 ? 0.0f : v.lane[i]); }
FB_INLINE unsigned fb_f32_nonzero(fb_f32_vec v)
{
    unsigned mask = 0;
    for (int i = 0; i < FB_F32_LANES; i++)
        mask |= (unsigned)(v.lane[i] != 0) << i;
    return mask;
}
FB_INLINE void fb_f32_compress(fb_f32_vec v, unsigned keep, int first, float *value, uint16_t *offset)
{
    /* branchless: write, then advance past a kept lane */
    for (int i = 0, n = 0; i < FB_F32_LANES; n += keep >> i & 1, i++) {
        value[n] = v.lane[i];
        offset[n] = (uint16_t)((first + i) * 64);
    }
}
#define FB_BITS 32
#include "fb_simd_lanes.h"

/* ---- float64 */
#define FB_F64_LANES 2
typedef struct { double lane[FB_F64_LANES]; } fb_f64_vec;

FB_INLINE fb_f64_vec fb_f64_zero(void) { FB_F64(0); }
FB_INLINE fb_f64_vec fb_f64_splat(const double *p) { FB_F64(*p); }
FB_INLINE fb_f64_vec fb_f64_load(const double *p) { FB_F64(p[i]); }
FB_INLINE void fb_f64_store(double *p, fb_f64_vec v) { memcpy(p, v.lane, sizeof v.lane); }
FB_INLINE fb_f64_vec fb_f64_add(fb_f64_vec a, fb_f64_vec b) { FB_F64(a.lane[i] + b.lane[i]); }
FB_INLINE fb_f64_vec fb_f64_sub(fb_f64_vec a, fb_f64_vec b) { FB_F64(a.lane[i] - b.lane[i]); }
FB_INLINE fb_f64_vec fb_f64_mul(fb_f64_vec a, fb_f64_vec b) { FB_F64(a.lane[i] * b.lane[i]); }
FB_INLINE fb_f64_vec fb_f64_fma(fb_f64_vec a, fb_f64_vec b, fb_f64_vec c)
{
    FB_F64(fb_fma_f64(a.lane[i], b.lane[i], c.lane[i]));
}
FB_INLINE fb_f64_vec fb_f64_max(fb_f64_vec a, fb_f64_vec b) { FB_F64(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
FB_INLINE fb_f64_vec fb_f64_min(fb_f64_vec a, fb_f64_vec b) { FB_F64(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
FB_INLINE fb_f64_vec fb_f64_canonical(fb_f64_vec v)
{
    FB_F64(v.lane[i] == v.lane[i] ? v.lane[i] + 0.0 : fb_from_bits64(0x7ff8000000000000));
}
FB_INLINE fb_f64_vec fb_f64_relu(fb_f64_vec v) { FB_F64(v.lane[i] <= 0 ? 0.0 : v.lane[i]); }
FB_INLINE unsigned fb_f64_nonzero(fb_f64_vec v)
{
    unsigned mask = 0;
    for (int i = 0; i < FB_F64_LANES; i++)
        mask |= (unsigned)(v.lane[i] != 0) << i;
    return mask;
}
FB_INLINE void fb_f64_compress(fb_f64_vec v, unsigned keep, int first, double *value, uint16_t *offset)
{
    /* branchless: write, then advance past a kept lane */
    for (int i = 0, n = 0; i < FB_F64_LANES; n += keep >> i & 1, i++) {
        value[n] = v.lane[i];
        offset[n] = (uint16_t)((first + i) * 64);
    }
}
#define FB_BITS 64
#include "fb_simd_lanes.h"

/* ---- for exp in float32, from t = k + 1.5 * 2**23: table[k % 8], and v * 2**(k / 8 rounded down), no subnormals;
 * tables have 16 entries, twice the same 8 */
FB_INLINE uint32_t fb_bits32(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
FB_INLINE float fb_from_bits32(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
FB_INLINE fb_f32_vec fb_f32_lookup8(const float *table, fb_f32_vec t) { FB_F32(table[fb_bits32(t.lane[i]) & 7]); }
FB_INLINE fb_f32_vec fb_f32_scale8(fb_f32_vec v, fb_f32_vec t)
{
    FB_F32(fb_from_bits32(fb_bits32(v.lane[i]) + ((fb_bits32(t.lane[i]) & 0xfffffff8) << 20)));
}

/* ---- for exp: 2**n from t = n + 1.5 * 2**52, and float32 <-> two halves of float64 */
FB_INLINE fb_f64_vec fb_f64_pow2(fb_f64_vec t) { FB_F64(fb_from_bits64((fb_bits64(t.lane[i]) + 1023) << 52)); }
FB_INLINE fb_f64_vec fb_f32_widen_low(fb_f32_vec v) { FB_F64(v.lane[i]); }
FB_INLINE fb_f64_vec fb_f32_widen_high(fb_f32_vec v) { FB_F64(v.lane[i + FB_F64_LANES]); }
FB_INLINE fb_f32_vec fb_f32_narrow(fb_f64_vec low, fb_f64_vec high)
{
    FB_F32((float)(i < FB_F64_LANES ? low.lane[i] : high.lane[i - FB_F64_LANES]));
}
