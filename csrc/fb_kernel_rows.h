/* fb_kernel_rows.h - what is done to rows: bias and relu, softmax, subnormal numbers, and the primitives alone; a part of
 * fb_kernels_template.h. */

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
            VEC v = V(add)(V(load_first)(x + whole, rest), V(load_first)(bias + whole, rest));
            V(store_first)(out + whole, V(relu)(V(canonical)(v)), rest);
        }
    }
}

/* ---- softmax: the second half of reference.attention_weights
 *
 * Scaling by a positive number is monotone, so the maximum of the scaled scores is the scaled maximum. canonical() on
 * the scores is left out: exp does not see the sign of a zero, and a NaN makes its whole row the one NaN in the end. */
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

/* sums[] += e[i][j] for j < n, in order; row i is lane i of the vectors. Side by side, for an add waits for the one before:
 * with two, a softmax of 512 takes 0.96 of the time. */
FB_INLINE void FN(add_columns)(const REAL *e, ptrdiff_t e_row, ptrdiff_t n, int vecs, VEC *sums)
{
    VEC column[LANES];
    for (ptrdiff_t j = 0; j < n; j += LANES) {
        const int whole = n - j >= LANES;
        const REAL *at = e + j;
        for (int q = 0; q < vecs; q++, at += LANES * e_row) {
            VEC sum = sums[q];
            FB_UNROLL
            for (int i = 0; i < LANES; i++)
                column[i] = V(load)(at + i * e_row);
            V(transpose)(column);
            if (FB_LIKELY(whole)) {
                FB_UNROLL
                for (int i = 0; i < LANES; i++)
                    sum = V(add)(sum, column[i]);
            } else {
                for (int i = 0; i < n - j; i++)
                    sum = V(add)(sum, column[i]);
            }
            sums[q] = sum;
        }
    }
}

/* out[j] = e[j] * by for j < n, +0.0 from there up to width; by may be infinite if n is 0. Whole vectors wherever they
 * fit: other stores to a line that is streamed made causal rows take 1.25 times as long. */
FB_INLINE void FN(scale_row)(const int stream, const REAL *e, VEC by, ptrdiff_t n, REAL *out, ptrdiff_t width)
{
    void (*const put)(REAL *, VEC) = stream ? V(stream) : V(store);
    ptrdiff_t j = 0;
    for (; j + LANES <= n; j += LANES)
        put(out + j, V(mul)(V(load)(e + j), by));
    VEC v = j < n ? V(mul)(V(load_first)(e + j, n - j), by) : V(zero)();
    for (; j + LANES <= width; j += LANES, v = V(zero)())
        put(out + j, v);
    if (j < width)
        V(store_first)(out + j, v, width - j);
}

static void FN(softmax)(void *scores_, ptrdiff_t scores_row, void *out_, ptrdiff_t out_row, ptrdiff_t rows,
                        ptrdiff_t width, const ptrdiff_t *count, const ptrdiff_t *ends, double scale_, int stream)
{
    /* CHUNK columns of GROUP rows stay in L1 between exp and sum. */
    enum { CHUNK = 128, GROUP = 2 * LANES < FB_SOFTMAX_ROWS ? 2 * LANES : FB_SOFTMAX_ROWS };
    const REAL scale = (REAL)scale_;
    const VEC by = V(splat)(&scale);
    for (ptrdiff_t i0 = 0; i0 < rows; i0 += GROUP) {
        const int group = (int)fb_min(GROUP, rows - i0), vecs = (group + LANES - 1) / LANES;
        REAL *s = (REAL *)scores_ + i0 * scores_row, max[GROUP], total[GROUP];
        VEC sum[GROUP / LANES], block[GROUP / LANES];
        ptrdiff_t longest = 0;
        for (int q = 0; q < vecs; q++)
            sum[q] = block[q] = V(zero)();
        /* 1. m */
        for (int i = 0; i < group; i++) {
            longest = fb_max(longest, count[i0 + i]);
            max[i] = FN(largest)(s + i * scores_row, count[i0 + i]) * scale;
        }
        /* 2. e = exp(score * scale - m), in place, and r = chain256(e, 1), chunk by chunk; +0.0 from the row's count on
         * adds nothing to its chain */
        const ptrdiff_t *block_end = ends;
        for (ptrdiff_t j0 = 0, j1; j0 < longest; j0 = j1) {
            j1 = fb_min(fb_min(j0 + CHUNK, *block_end), longest);
            for (int i = 0; i < group; i++) {
                REAL *s_row = s + i * scores_row;
                const VEC m = V(splat)(max + i);
                const ptrdiff_t end = fb_min(j1, count[i0 + i]);
                ptrdiff_t j = j0;
                for (; j + FB_EXP_VECS * LANES <= end; j += FB_EXP_VECS * LANES) {
                    VEC v[FB_EXP_VECS];
                    FB_UNROLL
                    for (int q = 0; q < FB_EXP_VECS; q++)
                        v[q] = V(sub)(V(mul)(V(load)(s_row + j + q * LANES), by), m);
                    FN(exp_vecs)(FB_EXP_VECS, v);
                    FB_UNROLL
                    for (int q = 0; q < FB_EXP_VECS; q++)
                        V(store)(s_row + j + q * LANES, v[q]);
                }
                for (; j < end; j += LANES) {
                    VEC v = V(sub)(V(mul)(V(load_first)(s_row + j, fb_min(LANES, end - j)), by), m);
                    FN(exp_vecs)(1, &v);
                    V(store_first)(s_row + j, v, fb_min(LANES, end - j));
                }
                for (ptrdiff_t j = fb_max(end, j0); j < j1; j++)
                    s_row[j] = 0;
            }
            FN(add_columns)(s + j0, scores_row, j1 - j0, vecs, block);
            if (j1 == *block_end) {
                for (int q = 0; q < vecs; q++) {
                    sum[q] = V(add)(sum[q], block[q]);
                    block[q] = V(zero)();
                }
                block_end++;
            }
        }
        for (int q = 0; q < vecs; q++)
            V(store)(total + q * LANES, V(add)(sum[q], block[q]));
        /* 3. A = canonical(e * (1 / r)). A sum of r, at least e**0, is NaN if one score is, or one is infinite: then so
         * is the whole row; else nothing is, and no product is -0.0. */
        for (int i = 0; i < group; i++) {
            const REAL *e = s + i * scores_row;
            REAL *out = (REAL *)out_ + (i0 + i) * out_row, inv = 1 / total[i];
            const ptrdiff_t n = count[i0 + i];
            const VEC inverse = V(splat)(&inv);
            if (inv != inv) {
                for (ptrdiff_t j = 0; j < n; j += LANES)
                    V(store_first)(out + j, V(canonical)(inverse), fb_min(LANES, n - j));
                memset(out + n, 0, (size_t)(width - n) * sizeof(REAL));
            } else if (stream && (uintptr_t)out % 16 == 0) {
                FN(scale_row)(1, e, inverse, n, out, width);
            } else {
                FN(scale_row)(0, e, inverse, n, out, width);
            }
        }
    }
    if (stream)
        V(stream_end)();
}

/* ---- subnormal numbers (fb_subnormal.c), in integers: the sign, the exponent, the fraction */

FB_INLINE UINT FN(bits)(REAL x)
{
    UINT u;
    memcpy(&u, &x, sizeof u);
    return u;
}

FB_INLINE REAL FN(real)(UINT u)
{
    REAL x;
    memcpy(&x, &u, sizeof x);
    return x;
}

#define SIGN ((UINT)1 << (FB_BITS - 1))

/* Rows may be short: a vector of each accumulator comes from the row where it is. */
static void FN(touch)(const void *x_, ptrdiff_t x_row, ptrdiff_t rows, ptrdiff_t n)
{
    enum { CHAINS = 4 };
    VEC most[CHAINS];
    REAL some[LANES];
    volatile REAL used;
    for (int q = 0; q < CHAINS; q++)
        most[q] = V(zero)();
    for (ptrdiff_t i = 0; i < rows; i++) {
        const REAL *x = (const REAL *)x_ + i * x_row;
        ptrdiff_t j = 0;
        for (; j + CHAINS * LANES <= n; j += CHAINS * LANES)
            FB_UNROLL
            for (int q = 0; q < CHAINS; q++)
                most[q] = V(max)(most[q], V(load)(x + j + q * LANES));
        for (; j + LANES <= n; j += LANES)
            most[0] = V(max)(most[0], V(load)(x + j));
        if (j < n)
            most[1] = V(max)(most[1], V(load_first)(x + j, n - j));
    }
    V(store)(some, V(max)(V(max)(most[0], most[1]), V(max)(most[2], most[3])));
    used = some[0];
    (void)used;
}

static void FN(range)(const void *x_, ptrdiff_t x_row, ptrdiff_t rows, ptrdiff_t n, fb_range *range)
{
    const UINT none = (UINT)-1; /* what is left of a zero, less 1 */
    UINT low = none, high = 0;
    for (ptrdiff_t i = 0; i < rows; i++) {
        const REAL *x = (const REAL *)x_ + i * x_row;
        for (ptrdiff_t j = 0; j < n; j++) {
            const UINT u = FN(bits)(x[j]) & ~SIGN;
            low = u - 1 < low ? u - 1 : low;
            high = u > high ? u : high;
        }
    }
    if (low != none)
        range->low = (int)fb_min(range->low, (ptrdiff_t)((low + 1) >> FRACTION));
    range->high = (int)fb_max(range->high, (ptrdiff_t)(high >> FRACTION));
}

/* The fraction of a subnormal number, with the exponent shift + 1, less the power of two of that exponent, is 2^shift times
 * the number: both are normal. By way of `some`, so that the compiler need not know whether from is to. */
static void FN(raise)(const void *from_, ptrdiff_t from_row, ptrdiff_t rows, ptrdiff_t n, void *to_, ptrdiff_t to_row)
{
    enum { SHIFT = FRACTION + 1, SOME = FB_PANEL_BYTES };
    const UINT power = (UINT)(SHIFT + 1) << FRACTION, more = (UINT)SHIFT << FRACTION, normal = (UINT)1 << FRACTION;
    REAL some[SOME] = {0};
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t j = 0; j < n; j += SOME) {
            const ptrdiff_t left = fb_min(SOME, n - j);
            memcpy(some, (const REAL *)from_ + i * from_row + j, (size_t)left * sizeof(REAL));
            for (int q = 0; q < SOME; q++) {
                const UINT u = FN(bits)(some[q]), size = u & ~SIGN;
                const UINT raised = FN(bits)(FN(real)(size | power) - FN(real)(power));
                some[q] = FN(real)((size < normal ? raised : size + more) | (u & SIGN));
            }
            memcpy((REAL *)to_ + i * to_row + j, some, (size_t)left * sizeof(REAL));
        }
}

static void FN(lower)(const void *from_, ptrdiff_t from_row, ptrdiff_t rows, ptrdiff_t n, void *to_, ptrdiff_t to_row)
{
    const REAL factor = (REAL)(FB_BITS == 32 ? 0x1p-24 : 0x1p-53);
    const VEC by = V(splat)(&factor);
    for (ptrdiff_t i = 0; i < rows; i++) {
        const REAL *from = (const REAL *)from_ + i * from_row;
        REAL *to = (REAL *)to_ + i * to_row;
        ptrdiff_t j = 0;
        for (; j + LANES <= n; j += LANES)
            V(store)(to + j, V(mul)(V(load)(from + j), by));
        for (; j < n; j += LANES)
            V(store_first)(to + j, V(mul)(V(load_first)(from + j, n - j), by), n - j);
    }
}

#undef SIGN

/* reference.fma */
static void FN(fma)(const void *a_, const void *b_, const void *c_, void *out_, ptrdiff_t n)
{
    const REAL *a = a_, *b = b_, *c = c_;
    REAL *out = out_;
    for (ptrdiff_t j = 0; j < n; j += LANES) {
        ptrdiff_t count = fb_min(LANES, n - j);
        VEC v = V(fma)(V(load_first)(a + j, count), V(load_first)(b + j, count), V(load_first)(c + j, count));
        V(store_first)(out + j, v, count);
    }
}

/* The FMA units at work, on registers only: two loops, which must agree on how fast that is. Chains that begin alike would
 * be merged, and more than 16 would not all be unrolled and stay in registers. */
static double FN(fma_chains)(ptrdiff_t rounds, int loop, double *flops)
{
    enum { CHAINS = 12, OTHER_CHAINS = 10 };
    const REAL factor = (REAL)1e-9, shrink = (REAL)0.9375;
    const VEC x = V(splat)(&factor), y = V(splat)(&shrink);
    VEC s[CHAINS];
    REAL lane[LANES], sum = 0;
    FB_UNROLL
    for (int i = 0; i < CHAINS; i++) {
        const REAL start = (REAL)(1 + i);
        s[i] = V(splat)(&start);
    }
    if (loop == 0) {
        for (ptrdiff_t r = 0; r < rounds; r++) {
            FB_UNROLL
            for (int i = 0; i < CHAINS; i++)
                s[i] = V(fma)(x, y, s[i]);
        }
    } else {
        for (ptrdiff_t r = 0; r < rounds; r++) {
            FB_UNROLL
            for (int i = 0; i < OTHER_CHAINS; i++)
                s[i] = V(fma)(s[i], y, x);
        }
    }
    for (int i = 0; i < CHAINS; i++) {
        V(store)(lane, s[i]);
        sum += lane[0];
    }
    *flops = 2.0 * LANES * (loop == 0 ? CHAINS : OTHER_CHAINS) * (double)rounds;
    return (double)sum; /* keeps the compiler from dropping the work */
}
