/* fb_kernel_rows.h - what is done to rows: bias and relu, softmax, subnormal numbers, and the primitives alone; a
 * part of fb_kernels_template.h. */

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

/* ---- softmax: the second half of reference.attention_weights, queries as lanes
 *
 * Scaling by a positive number is monotone, so the maximum of the scaled scores is the scaled maximum. canonical() on
 * the scores is left out: exp does not see the sign of a zero, and a NaN makes its whole row the one NaN in the end. */

/* Keys side by side, so that exp has FB_EXP_VECS vectors of the PANEL_VECS of each. */
#define KEYS (FB_EXP_VECS / PANEL_VECS)
_Static_assert(FB_EXP_VECS % (FB_PANEL_BYTES / sizeof(VEC)) == 0, "exp takes whole panels");

/* largest[] = the scaled maximum over the keys of each lane */
FB_INLINE void FN(largest)(const REAL *s, ptrdiff_t row, ptrdiff_t keys, VEC by, VEC *largest)
{
    const REAL lowest = -INFINITY;
    VEC m[FB_EXP_VECS];
    ptrdiff_t j = 0;
    FB_UNROLL
    for (int q = 0; q < FB_EXP_VECS; q++)
        m[q] = V(splat)(&lowest);
    for (; j + KEYS <= keys; j += KEYS)
        FB_UNROLL
        for (int q = 0; q < FB_EXP_VECS; q++)
            m[q] = V(max)(m[q], V(load)(s + (j + q / PANEL_VECS) * row + q % PANEL_VECS * LANES));
    for (; j < keys; j++)
        FB_UNROLL
        for (int q = 0; q < PANEL_VECS; q++)
            m[q] = V(max)(m[q], V(load)(s + j * row + q * LANES));
    FB_UNROLL
    for (int q = PANEL_VECS; q < FB_EXP_VECS; q++)
        m[q % PANEL_VECS] = V(max)(m[q % PANEL_VECS], m[q]);
    FB_UNROLL
    for (int q = 0; q < PANEL_VECS; q++)
        largest[q] = V(mul)(m[q], by);
}

/* e = exp(score * scale - m), in place, of `keys` keys; added to the sums, in order */
FB_INLINE void FN(exp_keys)(const int keys, REAL *s, ptrdiff_t row, VEC by, const VEC *m, VEC *sum)
{
    VEC v[FB_EXP_VECS];
    FB_UNROLL
    for (int q = 0; q < keys * PANEL_VECS; q++)
        v[q] = V(sub)(V(mul)(V(load)(s + q / PANEL_VECS * row + q % PANEL_VECS * LANES), by), m[q % PANEL_VECS]);
    FN(exp_vecs)(keys * PANEL_VECS, v);
    FB_UNROLL
    for (int q = 0; q < keys * PANEL_VECS; q++) {
        V(store)(s + q / PANEL_VECS * row + q % PANEL_VECS * LANES, v[q]);
        sum[q % PANEL_VECS] = V(add)(sum[q % PANEL_VECS], v[q]);
    }
}

/* out[i, j] = e[j, i] * inverse[i] for the queries i of one vector and the keys j, +0.0 from there up to width. A
 * line of each row at a time, and what is streamed is whole lines: the first may be short, so that the others are. */
FB_INLINE void FN(scale_keys)(const int stream, const REAL *e, ptrdiff_t row, ptrdiff_t keys, ptrdiff_t queries,
                              VEC inverse, REAL *out, ptrdiff_t out_row, ptrdiff_t width)
{
    void (*const put)(REAL *, VEC) = stream ? V(stream) : V(store);
    const ptrdiff_t first = PANEL - (ptrdiff_t)((uintptr_t)out / sizeof(REAL)) % PANEL;
    VEC square[PANEL_VECS][LANES];
    ptrdiff_t j = 0, step;
    queries = fb_min(LANES, queries);
    for (; j < keys; j += step) {
        const ptrdiff_t n = fb_min(PANEL, keys - j);
        step = fb_min(stream && j == 0 ? first : PANEL, width - j);
        FB_UNROLL
        for (int v = 0; v < PANEL_VECS; v++) {
            if (FB_LIKELY(n == PANEL)) {
                FB_UNROLL
                for (int i = 0; i < LANES; i++)
                    square[v][i] = V(mul)(V(load)(e + (j + v * LANES + i) * row), inverse);
            } else {
                for (int i = 0; i < LANES; i++) {
                    const ptrdiff_t k = v * LANES + i;
                    square[v][i] = k < n ? V(mul)(V(load)(e + (j + k) * row), inverse) : V(zero)();
                }
            }
            V(transpose)(square[v]);
        }
        if (FB_LIKELY(step == PANEL && queries == LANES)) {
            FB_UNROLL
            for (int i = 0; i < LANES; i++) {
                FB_UNROLL
                for (int v = 0; v < PANEL_VECS; v++)
                    put(out + i * out_row + j + v * LANES, square[v][i]);
            }
        } else {
            for (int i = 0; i < queries; i++)
                for (int v = 0; v < PANEL_VECS && v * LANES < step; v++)
                    V(store_first)(out + i * out_row + j + v * LANES, square[v][i], fb_min(LANES, step - v * LANES));
        }
    }
    for (ptrdiff_t i = 0; i < queries && j < width; i++, out += out_row) {
        ptrdiff_t rest = j;
        for (; rest + LANES <= width; rest += LANES)
            put(out + rest, V(zero)());
        if (rest < width)
            V(store_first)(out + rest, V(zero)(), width - rest);
    }
}

static void FN(softmax)(void *scores_, ptrdiff_t row, ptrdiff_t queries, const ptrdiff_t *count, const ptrdiff_t *ends,
                        double scale_, void *out_, ptrdiff_t out_row, ptrdiff_t width, int stream)
{
    const REAL scale = (REAL)scale_, lowest = -INFINITY;
    const VEC by = V(splat)(&scale);
    const int lines = stream && (uintptr_t)out_ % 16 == 0 && out_row * sizeof(REAL) % FB_PANEL_BYTES == 0;
    for (ptrdiff_t i0 = 0; i0 < queries; i0 += PANEL, count += PANEL) {
        const ptrdiff_t n = fb_min(PANEL, queries - i0), keys = count[n - 1];
        REAL *s = (REAL *)scores_ + i0, *out = (REAL *)out_ + i0 * out_row, inverse[PANEL];
        VEC m[PANEL_VECS], sum[PANEL_VECS], block[PANEL_VECS];
        /* a key that a query may not see is no maximum, and adds exp(-inf) = +0.0 to its chain */
        for (ptrdiff_t i = 0; i < n; i++)
            for (ptrdiff_t j = count[i]; j < keys; j++)
                s[j * row + i] = lowest;
        /* 1. m */
        FN(largest)(s, row, keys, by, m);
        /* 2. e, and r = chain256(e, 1) */
        FB_UNROLL
        for (int q = 0; q < PANEL_VECS; q++)
            sum[q] = V(zero)();
        const ptrdiff_t *block_end = ends;
        for (ptrdiff_t j = 0; j < keys; block_end++) {
            const ptrdiff_t end = fb_min(*block_end, keys);
            FB_UNROLL
            for (int q = 0; q < PANEL_VECS; q++)
                block[q] = V(zero)();
            for (; j + KEYS <= end; j += KEYS)
                FN(exp_keys)(KEYS, s + j * row, row, by, m, block);
            for (; j < end; j++)
                FN(exp_keys)(1, s + j * row, row, by, m, block);
            FB_UNROLL
            for (int q = 0; q < PANEL_VECS; q++)
                sum[q] = V(add)(sum[q], block[q]);
        }
        FB_UNROLL
        for (int q = 0; q < PANEL_VECS; q++)
            V(store)(inverse + q * LANES, sum[q]);
        for (int i = 0; i < PANEL; i++)
            inverse[i] = 1 / inverse[i];
        /* 3. A = canonical(e * (1 / r)). A sum of r, at least e**0, is NaN if one score is, or one is infinite: then so
         * is the whole row; else nothing is, and no product is -0.0. */
        for (int q = 0; q < PANEL_VECS && q * LANES < n; q++) {
            const VEC by_inverse = V(load)(inverse + q * LANES);
            REAL *to = out + q * LANES * out_row;
            if (lines)
                FN(scale_keys)(1, s + q * LANES, row, keys, n - q * LANES, by_inverse, to, out_row, width);
            else
                FN(scale_keys)(0, s + q * LANES, row, keys, n - q * LANES, by_inverse, to, out_row, width);
        }
        for (ptrdiff_t i = 0; i < n; i++)
            if (inverse[i] != inverse[i]) {
                const VEC nan = V(canonical)(V(splat)(inverse + i));
                for (ptrdiff_t j = 0; j < count[i]; j += LANES)
                    V(store_first)(out + i * out_row + j, nan, fb_min(LANES, count[i] - j));
                memset(out + i * out_row + count[i], 0, (size_t)(width - count[i]) * sizeof(REAL));
            }
    }
    if (lines)
        V(stream_end)();
}
#undef KEYS

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

/* The fraction of a subnormal number, with the exponent shift + 1, less the power of two of that exponent, is 2^shift
 * times the number: both are normal. By way of `some`, so that the compiler need not know whether from is to. */
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

/* The FMA units at work, on registers only: two loops, which must agree on how fast that is. Chains that begin alike
 * would be merged, and more than 16 would not all be unrolled and stay in registers. */
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
