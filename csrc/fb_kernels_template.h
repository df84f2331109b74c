/* fb_kernels_template.h - the kernels, written once for every tier and both dtypes.
 *
 * A tier file includes its fb_simd_*.h, then this file twice, with FB_BITS 32 and 64. Parameters:
 *   FB_TIER            the tier's name, the last part of every name made here
 *   FB_BITS            32 or 64
 *   FB_TILE_ROWS       rows of the largest register tile (fb_simd_*.h)
 *   FB_TILE_PANELS(r)  panels that a tile of r rows spans (fb_simd_*.h)
 * Each kernel's comment names the function of fastblock/reference.py that defines its bits.
 */
#if FB_BITS == 32
#define REAL float
#define VEC fb_f32_vec
#define LANES FB_F32_LANES
#define V(operation) FB_CAT(fb_f32_, operation)
#define FN(name) FB_CAT(FB_CAT(fb_, name), FB_CAT(_f32_, FB_TIER))
#else
#define REAL double
#define VEC fb_f64_vec
#define LANES FB_F64_LANES
#define V(operation) FB_CAT(fb_f64_, operation)
#define FN(name) FB_CAT(FB_CAT(fb_, name), FB_CAT(_f64_, FB_TIER))
#endif
#define PANEL ((ptrdiff_t)(FB_PANEL_BYTES / sizeof(REAL)))
#define PANEL_VECS ((int)(FB_PANEL_BYTES / sizeof(VEC)))

FB_INLINE VEC FN(load_first)(const REAL *p, ptrdiff_t n)
{
    REAL lane[LANES] = {0};
    memcpy(lane, p, (size_t)n * sizeof(REAL));
    return V(load)(lane);
}
FB_INLINE void FN(store_first)(REAL *p, VEC v, ptrdiff_t n)
{
    REAL lane[LANES];
    V(store)(lane, v);
    memcpy(p, lane, (size_t)n * sizeof(REAL));
}

/* ---- product: one block of k of a matrix product (chain256, finish, relu) */

/* A tile of `rows` x `panels` panels, both constants: its accumulators are registers. */
FB_INLINE void FN(tile)(const int rows, const int panels, const fb_product *g, const REAL *a, const REAL *b,
                        const REAL *bias, REAL *c, ptrdiff_t c_row)
{
    const int vecs = panels * PANEL_VECS;
    const ptrdiff_t a_row = g->a_row, b_k = g->b_k, b_panel = g->b_panel, depth = g->depth;
    VEC s[FB_TILE_VECS];
    FB_UNROLL
    for (int i = 0; i < rows * vecs; i++)
        s[i] = V(zero)();

    for (ptrdiff_t k = 0; k < depth; k++, b += b_k) {
        VEC w[FB_TILE_VECS];
        FB_UNROLL
        for (int j = 0; j < vecs; j++)
            w[j] = V(load)(b + j / PANEL_VECS * b_panel + j % PANEL_VECS * LANES);
        FB_UNROLL
        for (int i = 0; i < rows; i++) {
            VEC x = V(splat)(a + i * a_row + k);
            FB_UNROLL
            for (int j = 0; j < vecs; j++)
                s[i * vecs + j] = V(fma)(x, w[j], s[i * vecs + j]);
        }
    }

    if (!g->first) {
        FB_UNROLL
        for (int i = 0; i < rows; i++) {
            FB_UNROLL
            for (int j = 0; j < vecs; j++)
                s[i * vecs + j] = V(add)(V(load)(c + i * c_row + j * LANES), s[i * vecs + j]);
        }
    }
    if (g->last) {
        if (bias) {
            FB_UNROLL
            for (int j = 0; j < vecs; j++) {
                VEC v = V(load)(bias + j * LANES);
                FB_UNROLL
                for (int i = 0; i < rows; i++)
                    s[i * vecs + j] = V(add)(s[i * vecs + j], v);
            }
        }
        FB_UNROLL
        for (int i = 0; i < rows * vecs; i++)
            s[i] = V(canonical)(s[i]);
        if (g->relu) {
            FB_UNROLL
            for (int i = 0; i < rows * vecs; i++)
                s[i] = V(relu)(s[i]);
        }
    }
    FB_UNROLL
    for (int i = 0; i < rows; i++) {
        FB_UNROLL
        for (int j = 0; j < vecs; j++)
            V(store)(c + i * c_row + j * LANES, s[i * vecs + j]);
    }
}

/* The tile at row i and panel p; returns the number of panels done. The last panel, where it is partly outside C,
 * goes through a scratch tile: C is never written or read outside. */
FB_INLINE ptrdiff_t FN(tile_at)(const int rows, const fb_product *g, ptrdiff_t i, ptrdiff_t p)
{
    const REAL *a = (const REAL *)g->a + i * g->a_row;
    const REAL *b = (const REAL *)g->b + p * g->b_panel;
    const REAL *bias = g->bias ? (const REAL *)g->bias + p * PANEL : NULL;
    REAL *c = (REAL *)g->c + i * g->c_row + p * PANEL;
    const ptrdiff_t left = g->cols - p * PANEL;
    if (FB_LIKELY(left >= FB_TILE_PANELS(rows) * PANEL)) {
        FN(tile)(rows, FB_TILE_PANELS(rows), g, a, b, bias, c, g->c_row);
        return FB_TILE_PANELS(rows);
    }
    if (FB_TILE_PANELS(rows) > 1 && left >= PANEL) {
        FN(tile)(rows, 1, g, a, b, bias, c, g->c_row);
        return 1;
    }
    REAL scratch[FB_TILE_ROWS * FB_PANEL_BYTES / sizeof(REAL)];
    if (!g->first) {
        memset(scratch, 0, sizeof scratch);
        for (int r = 0; r < rows; r++)
            memcpy(scratch + r * PANEL, c + r * g->c_row, (size_t)left * sizeof(REAL));
    }
    FN(tile)(rows, 1, g, a, b, bias, scratch, PANEL);
    for (int r = 0; r < rows; r++)
        memcpy(c + r * g->c_row, scratch + r * PANEL, (size_t)left * sizeof(REAL));
    return 1;
}

/* Loop 2 of the BLIS numbering runs over the panels of B, loop 1 over the row tiles of A: a panel (16 KB) stays in
 * L1 for all rows. Rows are dealt out evenly (13 = 5 + 4 + 4, not 6 + 6 + 1), because a tile of fewer than 4 rows x
 * 1 panel has too few chains to fill the FMA units; 3 rows or fewer span several panels instead. */
static void FN(product)(const fb_product *g)
{
    const ptrdiff_t panels = (g->cols + PANEL - 1) / PANEL;
    const ptrdiff_t tiles = (g->rows + FB_TILE_ROWS - 1) / FB_TILE_ROWS;
    if (tiles == 0)
        return;
    const ptrdiff_t fewest = g->rows / tiles, longer_until = g->rows % tiles * (fewest + 1);
    const ptrdiff_t group = FB_TILE_PANELS(fewest);
    for (ptrdiff_t p0 = 0; p0 < panels; p0 += group) {
        const ptrdiff_t p1 = p0 + group < panels ? p0 + group : panels;
        ptrdiff_t rows;
        for (ptrdiff_t i = 0; i < g->rows; i += rows) {
            rows = i < longer_until ? fewest + 1 : fewest;
            for (ptrdiff_t p = p0; p < p1;) {
                switch (rows) {
#define FB_TILE_CASE(r)                                                                                               \
    case r:                                                                                                           \
        p += FN(tile_at)(r, g, i, p);                                                                                 \
        break;
                    FB_TILE_CASES(FB_TILE_CASE)
#undef FB_TILE_CASE
                }
            }
        }
    }
}

/* ---- elementwise */

/* reference.bias_relu */
static void FN(bias_relu)(const void *x_, const void *bias_, void *out_, ptrdiff_t rows, ptrdiff_t cols)
{
    const ptrdiff_t whole = cols / LANES * LANES, rest = cols - whole;
    for (ptrdiff_t i = 0; i < rows; i++) {
        const REAL *x = (const REAL *)x_ + i * cols, *bias = bias_;
        REAL *out = (REAL *)out_ + i * cols;
        for (ptrdiff_t j = 0; j < whole; j += LANES)
            V(store)(out + j, V(relu)(V(canonical)(V(add)(V(load)(x + j), V(load)(bias + j)))));
        if (rest) {
            VEC v = V(add)(FN(load_first)(x + whole, rest), FN(load_first)(bias + whole, rest));
            FN(store_first)(out + whole, V(relu)(V(canonical)(v)), rest);
        }
    }
}

/* x * 0 is a zero for finite x, NaN for the others, and a NaN survives every sum. */
static int FN(all_finite)(const void *x_, ptrdiff_t n)
{
    const REAL *x = x_;
    VEC sum = V(zero)();
    REAL lane[LANES];
    ptrdiff_t j = 0;
    for (; j + LANES <= n; j += LANES)
        sum = V(add)(sum, V(mul)(V(load)(x + j), V(zero)()));
    sum = V(add)(sum, V(mul)(FN(load_first)(x + j, n - j), V(zero)()));
    V(store)(lane, sum);
    for (int i = 0; i < LANES; i++)
        if (lane[i] != 0)
            return 0;
    return 1;
}

/* reference.exp */
#if FB_BITS == 32
/* In binary64: e**x = 2**n * p(r), r = x - n ln 2, |r| <= ln(2)/2, p of degree 10. The value before the last rounding
 * is close enough to e**x that the float32 is the nearest one for all 2**32 inputs (tests/test_exp.py). */
FB_INLINE fb_f64_vec FN(exp_half)(fb_f64_vec z)
{
    static const double lo = -150, hi = 130, round = 0x1.8p52, one = 1; /* beyond lo and hi: 0 and infinity */
    static const double inv_ln2 = 0x1.71547652b82fep+0, ln2_high = -0x1.62e42fefa38p-1, ln2_low = -0x1.ef35793c7673p-45;
    static const double q[] = {0x1.2880411bad1aap-22, 0x1.72c72ca338df0p-19, 0x1.a019c9a5652d3p-16,
                               0x1.a019ada3609f3p-13, 0x1.6c16c1738ff55p-10, 0x1.1111111c478ebp-7,
                               0x1.5555555554cb7p-5,  0x1.5555555553b78p-3,  0x1p-1};
    z = fb_f64_min(fb_f64_splat(&hi), fb_f64_max(fb_f64_splat(&lo), z));
    fb_f64_vec t = fb_f64_fma(z, fb_f64_splat(&inv_ln2), fb_f64_splat(&round));
    fb_f64_vec n = fb_f64_sub(t, fb_f64_splat(&round));
    fb_f64_vec r = fb_f64_fma(n, fb_f64_splat(&ln2_low), fb_f64_fma(n, fb_f64_splat(&ln2_high), z));
    fb_f64_vec s = fb_f64_splat(&q[0]);
    FB_UNROLL
    for (int i = 1; i < (int)(sizeof q / sizeof *q); i++)
        s = fb_f64_fma(s, r, fb_f64_splat(&q[i]));
    fb_f64_vec p = fb_f64_add(fb_f64_splat(&one), fb_f64_fma(fb_f64_mul(r, r), s, r));
    return fb_f64_mul(p, fb_f64_pow2(t));
}
FB_INLINE VEC FN(exp_vec)(VEC x)
{
    return V(narrow)(FN(exp_half)(V(widen_low)(x)), FN(exp_half)(V(widen_high)(x)));
}
#else
/* Step for step reference._exp64. */
FB_INLINE VEC FN(exp_vec)(VEC x)
{
    static const double lo = -746, hi = 710, round = 0x1.8p52, one = 1, half = 0.5;
    static const double inv_ln2 = 0x1.71547652b82fep+0, ln2_high = -0x1.62e42fefa38p-1, ln2_low = -0x1.ef35793c7673p-45;
    static const double q[] = {0x1.1f66e5b718f3ep-29, 0x1.af38b4925be09p-26, 0x1.27e4e1f1e809dp-22,
                               0x1.71de0da9d06acp-19, 0x1.a01a01a47bb19p-16, 0x1.a01a01a7c54aep-13,
                               0x1.6c16c16c167e0p-10, 0x1.11111111109b2p-7,  0x1.5555555555555p-5,
                               0x1.5555555555556p-3,  0x1p-1};
    VEC z = V(min)(V(splat)(&hi), V(max)(V(splat)(&lo), x));
    VEC t = V(fma)(z, V(splat)(&inv_ln2), V(splat)(&round));
    VEC n = V(sub)(t, V(splat)(&round));
    VEC r = V(fma)(n, V(splat)(&ln2_low), V(fma)(n, V(splat)(&ln2_high), z));
    VEC s = V(splat)(&q[0]);
    FB_UNROLL
    for (int i = 1; i < (int)(sizeof q / sizeof *q); i++)
        s = V(fma)(s, r, V(splat)(&q[i]));
    VEC p = V(add)(V(splat)(&one), V(fma)(V(mul)(r, r), s, r));
    VEC t_first = V(fma)(n, V(splat)(&half), V(splat)(&round));
    VEC n_first = V(sub)(t_first, V(splat)(&round));
    VEC t_second = V(add)(V(sub)(n, n_first), V(splat)(&round));
    return V(mul)(V(mul)(p, V(pow2)(t_first)), V(pow2)(t_second));
}
#endif

static void FN(exp)(const void *x_, void *out_, ptrdiff_t n)
{
    const REAL *x = x_;
    REAL *out = out_;
    for (ptrdiff_t j = 0; j < n; j += LANES) {
        ptrdiff_t count = fb_min(LANES, n - j);
        FN(store_first)(out + j, V(canonical)(FN(exp_vec)(FN(load_first)(x + j, count))), count);
    }
}

/* reference.fma */
static void FN(fma)(const void *a_, const void *b_, const void *c_, void *out_, ptrdiff_t n)
{
    const REAL *a = a_, *b = b_, *c = c_;
    REAL *out = out_;
    for (ptrdiff_t j = 0; j < n; j += LANES) {
        ptrdiff_t count = fb_min(LANES, n - j);
        VEC v = V(fma)(FN(load_first)(a + j, count), FN(load_first)(b + j, count), FN(load_first)(c + j, count));
        FN(store_first)(out + j, v, count);
    }
}

/* ---- softmax: the second half of reference.attention_weights
 *
 * Scaling by a positive number is monotone, so the maximum of the scaled scores is the scaled maximum. canonical() on
 * the scores is left out: exp does not see the sign of a zero, and a NaN makes its whole row the one NaN in the end. */
enum { FN(chains) = 8 }; /* rows summed side by side: an add has 3 or 4 cycles of latency, two start in a cycle */

FB_INLINE REAL FN(largest)(const REAL *s, ptrdiff_t n)
{
    REAL lane[LANES];
    const REAL lowest = -INFINITY;
    VEC m = V(splat)(&lowest);
    ptrdiff_t j = 0;
    for (; j + LANES <= n; j += LANES)
        m = V(max)(m, V(load)(s + j));
    V(store)(lane, m);
    for (; j < n; j++)
        lane[0] = lane[0] > s[j] ? lane[0] : s[j];
    for (int i = 1; i < LANES; i++)
        lane[0] = lane[0] > lane[i] ? lane[0] : lane[i];
    return lane[0];
}

/* chain256(e, 1) of `chains` rows over the keys 0 .. n-1 */
FB_INLINE void FN(sum_rows)(const int chains, const REAL *e, ptrdiff_t e_row, ptrdiff_t n, const ptrdiff_t *ends,
                            REAL *total)
{
    for (int i = 0; i < chains; i++)
        total[i] = 0;
    for (ptrdiff_t j = 0; j < n; ends++) {
        REAL s[FN(chains)] = {0};
        for (ptrdiff_t end = fb_min(*ends, n); j < end; j++) {
            FB_UNROLL
            for (int i = 0; i < chains; i++)
                s[i] += e[i * e_row + j];
        }
        for (int i = 0; i < chains; i++)
            total[i] += s[i];
    }
}

static void FN(softmax)(void *scores_, ptrdiff_t scores_row, void *out_, ptrdiff_t out_row, ptrdiff_t rows,
                        ptrdiff_t width, const ptrdiff_t *count, const ptrdiff_t *ends, double scale_)
{
    const REAL scale = (REAL)scale_;
    for (ptrdiff_t i0 = 0; i0 < rows; i0 += FN(chains)) {
        const int chains = (int)fb_min(FN(chains), rows - i0);
        REAL *s = (REAL *)scores_ + i0 * scores_row, total[FN(chains)];
        ptrdiff_t longest = 0;
        for (int i = 0; i < chains; i++)
            longest = count[i0 + i] > longest ? count[i0 + i] : longest;

        /* 1. e = exp(score * scale - max), in place; +0.0 from the row's count on adds nothing to its chain */
        for (int i = 0; i < chains; i++) {
            REAL *s_row = s + i * scores_row, m = FN(largest)(s_row, count[i0 + i]) * scale;
            const VEC max = V(splat)(&m), by = V(splat)(&scale);
            for (ptrdiff_t j = 0; j < count[i0 + i]; j += LANES)
                V(store)(s_row + j, FN(exp_vec)(V(sub)(V(mul)(V(load)(s_row + j), by), max)));
            for (ptrdiff_t j = count[i0 + i]; j < longest; j++)
                s_row[j] = 0;
        }
        /* 2. r = chain256(e, 1) */
        if (chains == FN(chains))
            FN(sum_rows)(FN(chains), s, scores_row, longest, ends, total);
        else
            for (int i = 0; i < chains; i++)
                FN(sum_rows)(1, s + i * scores_row, scores_row, longest, ends, total + i);
        /* 3. A = canonical(e * (1 / r)) */
        for (int i = 0; i < chains; i++) {
            const REAL *s_row = s + i * scores_row;
            REAL *out = (REAL *)out_ + (i0 + i) * out_row, inv = 1 / total[i];
            const ptrdiff_t n = count[i0 + i];
            const VEC by = V(splat)(&inv);
            ptrdiff_t j = 0;
            for (; j + LANES <= n; j += LANES)
                V(store)(out + j, V(canonical)(V(mul)(V(load)(s_row + j), by)));
            if (j < n)
                FN(store_first)(out + j, V(canonical)(V(mul)(V(load)(s_row + j), by)), n - j);
            memset(out + n, 0, (size_t)(width - n) * sizeof(REAL));
        }
    }
}

static const struct fb_kernels FN(kernels) = {
    .tier = FB_STR(FB_TIER),
    .size = sizeof(REAL),
    .panel = FB_PANEL_BYTES / sizeof(REAL),
    .product = FN(product),
    .bias_relu = FN(bias_relu),
    .softmax = FN(softmax),
    .all_finite = FN(all_finite),
    .fma = FN(fma),
    .exp = FN(exp),
};

#undef REAL
#undef VEC
#undef LANES
#undef V
#undef FN
#undef PANEL
#undef PANEL_VECS
#undef FB_BITS
