/* fb_kernel_exp.h - the exponential function; a part of fb_kernels_template.h. */

/* ---- exp: reference.exp of n float64 vectors side by side, so that a constant is loaded once for all of them and no
 * step waits for the one before. The float32 exp falls back on float64, too: shorter, because only its last rounding
 * must come out right; that it does for all 2**32 inputs is tested (tests/test_exp.py). */
#define FB_EACH_VEC                                                                                                   \
    FB_UNROLL                                                                                                         \
    for (int i = 0; i < n; i++)

/* Limits beyond which exp is 0 and infinity; a NaN stays. */
FB_INLINE VEC FN(exp_clamp)(const REAL *range, VEC x)
{
    return V(min)(V(splat)(range + 1), V(max)(V(splat)(range), x));
}

/* x = 2**n * e**r, |r| <= ln(2)/2: returns r_high and r in place of x, and t = n + 1.5 * 2**52 */
FB_INLINE void FN(exp_reduce)(const int n, fb_f64_vec *x, fb_f64_vec *r, fb_f64_vec *t)
{
    static const double round = 0x1.8p52, inv_ln2 = 0x1.71547652b82fep+0;
    static const double ln2_high = -0x1.62e42fefa38p-1, ln2_low = -0x1.ef35793c7673p-45;
    FB_EACH_VEC t[i] = fb_f64_fma(x[i], fb_f64_splat(&inv_ln2), fb_f64_splat(&round));
    FB_EACH_VEC r[i] = fb_f64_sub(t[i], fb_f64_splat(&round));
    FB_EACH_VEC x[i] = fb_f64_fma(r[i], fb_f64_splat(&ln2_high), x[i]);
    FB_EACH_VEC r[i] = fb_f64_fma(r[i], fb_f64_splat(&ln2_low), x[i]);
}

/* The polynomial with coefficients q, highest power first */
FB_INLINE void FN(exp_polynomial)(const int n, const double *q, const int terms, const fb_f64_vec *r, fb_f64_vec *s)
{
    FB_EACH_VEC s[i] = fb_f64_splat(&q[0]);
    FB_UNROLL
    for (int j = 1; j < terms; j++)
        FB_EACH_VEC s[i] = fb_f64_fma(s[i], r[i], fb_f64_splat(&q[j]));
}

#if FB_BITS == 32
/* Two vectors, in float64: right for every input. */
FB_NOINLINE void FN(exp_exact)(VEC *v)
{
    static const double one = 1;
    static const double q[] = {0x1.2880411bad1aap-22, 0x1.72c72ca338df0p-19, 0x1.a019c9a5652d3p-16,
                               0x1.a019ada3609f3p-13, 0x1.6c16c1738ff55p-10, 0x1.1111111c478ebp-7,
                               0x1.5555555554cb7p-5,  0x1.5555555553b78p-3,  0x1p-1};
    static const float range[] = {-150, 130};
    enum { n = 4 };
    fb_f64_vec x[n], r[n], t[n], s[n];
    FB_UNROLL
    for (int i = 0; i < 2; i++) {
        v[i] = FN(exp_clamp)(range, v[i]);
        x[2 * i] = V(widen_low)(v[i]);
        x[2 * i + 1] = V(widen_high)(v[i]);
    }
    FN(exp_reduce)(n, x, r, t);
    FN(exp_polynomial)(n, q, (int)(sizeof q / sizeof *q), r, s);
    FB_EACH_VEC s[i] = fb_f64_fma(fb_f64_mul(r[i], r[i]), s[i], r[i]);
    FB_EACH_VEC s[i] = fb_f64_add(fb_f64_splat(&one), s[i]);
    FB_EACH_VEC s[i] = fb_f64_mul(s[i], fb_f64_pow2(t[i]));
    FB_UNROLL
    for (int i = 0; i < 2; i++)
        v[i] = V(narrow)(s[2 * i], s[2 * i + 1]);
}

/* Nearly always enough. x = k * ln(2)/8 + r and 2**(j/8) = power[j] * (1 + rest[j]), where power[j] has 13 bits. The
 * head of r, a multiple of 2**-11, is taken off, so that s = p + p * head is exact; then, but for a power of two,
 *     e**x = s + p * w,
 *     w = r - head + r * r/2 + rest * (1 + r) + r**2/2 * (rest + r/3 * (1 + rest) + r**2/12 + r**3/60),
 * in absolute value less than 2**-9.6. Its error is less than 1.9 * 2**-34: rounded w 1, rounded r - head +
 * ... 0.25, the product of rest and what k * ln(2)/8 has beyond k * ln2_high 0.27, the sums before 0.06 each, the
 * polynomial 0.12. If s + p * (w +- 2**-33) rounds to one number, it is the right one (`error` is larger, lest the sum
 * be rounded to less); else, in 1 of 360, `unsure` is positive, or NaN. Then x goes to exp_exact, and so it does from
 * +-87 on, where the error is set to x**4 - 87**4: up to 2**18 that is at least 1 and w is less than 1; beyond, r is
 * what rounding t cuts off, less than 2**-22 * x, so up to 2**32 w is less than 2**52 where the error is more than
 * 2**71, and from there on the error is infinite. (With x**2 it was lost in w from 2**50 on.) The order of the steps
 * matters, for registers are what is short: e comes first, so that x is not needed long, and chains are not shortened
 * where that takes a register. */
FB_INLINE void FN(exp_quick)(const int n, const VEC *x, VEC *y, VEC *unsure)
{
    static const float power[16] = {
        0x1p+0f, 0x1.173p+0f, 0x1.307p+0f, 0x1.4cp+0f, 0x1.6a1p+0f, 0x1.8adp+0f, 0x1.ae9p+0f, 0x1.d58p+0f,
        0x1p+0f, 0x1.173p+0f, 0x1.307p+0f, 0x1.4cp+0f, 0x1.6a1p+0f, 0x1.8adp+0f, 0x1.ae9p+0f, 0x1.d58p+0f};
    static const float power_rest[16] = {
        0, -0x1.0736c4p-14f, -0x1.a5f74ep-20f, -0x1.ca8b44p-16f,
        -0x1.140906p-14f, -0x1.156e68p-16f, -0x1.ca89aap-15f, 0x1.b1d272p-17f,
        0, -0x1.0736c4p-14f, -0x1.a5f74ep-20f, -0x1.ca8b44p-16f,
        -0x1.140906p-14f, -0x1.156e68p-16f, -0x1.ca89aap-15f, 0x1.b1d272p-17f};
    static const float inv = 0x1.715476p+3f, ln2_high = -0x1.62e43p-4f, ln2_low = 0x1.05c61p-32f;
    static const float round = 0x1.8p23f, round_head = 0x1.8p12f, error = 0x1.4p-33f, far = -87.0f * 87 * 87 * 87;
    static const float c2 = 0.5f, c3 = 0x1.555556p-2f, c4 = 0x1.555d04p-4f, c5 = 0x1.1115c6p-6f;
    VEC t[FB_EXP_VECS], k[FB_EXP_VECS], r[FB_EXP_VECS], rest[FB_EXP_VECS], head[FB_EXP_VECS], half[FB_EXP_VECS],
        e[FB_EXP_VECS];
    VEC q[FB_EXP_VECS], w[FB_EXP_VECS], p[FB_EXP_VECS], s[FB_EXP_VECS];
    FB_EACH_VEC e[i] = V(mul)(x[i], x[i]);
    FB_EACH_VEC e[i] = V(max)(V(fma)(e[i], e[i], V(splat)(&far)), V(splat)(&error));
    FB_EACH_VEC t[i] = V(fma)(x[i], V(splat)(&inv), V(splat)(&round));
    FB_EACH_VEC k[i] = V(sub)(t[i], V(splat)(&round));
    FB_EACH_VEC r[i] = V(fma)(k[i], V(splat)(&ln2_high), x[i]); /* exact */
    FB_EACH_VEC rest[i] = V(fma)(k[i], V(splat)(&ln2_low), V(lookup8)(power_rest, t[i]));
    FB_EACH_VEC q[i] = V(fma)(r[i], V(splat)(&c5), V(splat)(&c4));
    FB_EACH_VEC q[i] = V(fma)(r[i], q[i], V(fma)(rest[i], V(splat)(&c3), V(splat)(&c3)));
    FB_EACH_VEC q[i] = V(fma)(r[i], q[i], rest[i]);
    FB_EACH_VEC half[i] = V(mul)(r[i], V(splat)(&c2));
    FB_EACH_VEC w[i] = V(fma)(V(mul)(r[i], half[i]), q[i], V(fma)(r[i], rest[i], rest[i]));
    FB_EACH_VEC head[i] = V(sub)(V(add)(r[i], V(splat)(&round_head)), V(splat)(&round_head));
    FB_EACH_VEC w[i] = V(add)(w[i], V(sub)(r[i], head[i]));
    FB_EACH_VEC w[i] = V(fma)(r[i], half[i], w[i]);
    FB_EACH_VEC p[i] = V(lookup8)(power, t[i]);
    FB_EACH_VEC s[i] = V(fma)(p[i], head[i], p[i]);
    FB_EACH_VEC y[i] = V(fma)(p[i], V(add)(w[i], e[i]), s[i]);
    FB_EACH_VEC unsure[i] = V(sub)(y[i], V(fma)(p[i], V(sub)(w[i], e[i]), s[i]));
    FB_EACH_VEC y[i] = V(scale8)(y[i], t[i]);
}

FB_INLINE void FN(exp_vecs)(const int n, VEC *x)
{
    VEC y[FB_EXP_VECS], unsure[FB_EXP_VECS];
    FN(exp_quick)(n, x, y, unsure);
    FB_UNROLL
    for (int i = 0; i < n; i += 2) {
        const int pair = i + 1 < n;
        if (!FB_LIKELY(!V(nonzero)(pair ? V(add)(unsure[i], unsure[i + 1]) : unsure[i]))) {
            VEC two[2] = {x[i], x[pair ? i + 1 : i]};
            FN(exp_exact)(two);
            y[i] = two[0];
            if (pair)
                y[i + 1] = two[1];
        }
    }
    FB_EACH_VEC x[i] = y[i];
}
#else
/* Step for step reference._exp64. */
FB_INLINE void FN(exp_vecs)(const int n, VEC *x)
{
    static const double round = 0x1.8p52, one = 1, half = 0.5, ln2_low = -0x1.ef35793c7673p-45;
    static const double q[] = {0x1.1f66e5b718f3ep-29, 0x1.af38b4925be09p-26, 0x1.27e4e1f1e809dp-22,
                               0x1.71de0da9d06acp-19, 0x1.a01a01a47bb19p-16, 0x1.a01a01a7c54aep-13,
                               0x1.6c16c16c167e0p-10, 0x1.11111111109b2p-7,  0x1.5555555555555p-5,
                               0x1.5555555555556p-3,  0x1p-1};
    static const double range[] = {-746, 710};
    VEC r[FB_EXP_VECS], t[FB_EXP_VECS], s[FB_EXP_VECS];
    FB_EACH_VEC x[i] = FN(exp_clamp)(range, x[i]);
    FN(exp_reduce)(n, x, r, t);
    FN(exp_polynomial)(n, q, (int)(sizeof q / sizeof *q), r, s);
    FB_EACH_VEC {
        VEC whole = V(sub)(t[i], V(splat)(&round)), head = V(add)(V(splat)(&one), x[i]);
        VEC rest = V(fma)(whole, V(splat)(&ln2_low), V(sub)(x[i], V(sub)(head, V(splat)(&one))));
        VEC p = V(add)(head, V(fma)(V(mul)(r[i], r[i]), s[i], rest));
        VEC t_first = V(fma)(whole, V(splat)(&half), V(splat)(&round));
        VEC t_second = V(add)(V(sub)(whole, V(sub)(t_first, V(splat)(&round))), V(splat)(&round));
        x[i] = V(mul)(V(mul)(p, V(pow2)(t_first)), V(pow2)(t_second));
    }
}
#endif
#undef FB_EACH_VEC

static void FN(exp)(const void *x_, void *out_, ptrdiff_t n)
{
    const REAL *x = x_;
    REAL *out = out_;
    VEC v[FB_EXP_VECS];
    for (; n >= FB_EXP_VECS * LANES; n -= FB_EXP_VECS * LANES, x += FB_EXP_VECS * LANES, out += FB_EXP_VECS * LANES) {
        FB_UNROLL
        for (int i = 0; i < FB_EXP_VECS; i++)
            v[i] = V(load)(x + i * LANES);
        FN(exp_vecs)(FB_EXP_VECS, v);
        FB_UNROLL
        for (int i = 0; i < FB_EXP_VECS; i++)
            V(store)(out + i * LANES, V(canonical)(v[i]));
    }
    for (ptrdiff_t j = 0; j < n; j += LANES) {
        v[0] = V(load_first)(x + j, fb_min(LANES, n - j));
        FN(exp_vecs)(1, v);
        V(store_first)(out + j, V(canonical)(v[0]), fb_min(LANES, n - j));
    }
}
