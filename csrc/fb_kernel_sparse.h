/* fb_kernel_sparse.h - the same products from the nonzeros of A only (contract section 6); a part of
 * fb_kernels_template.h. */

/* A look at a tile of A: how many k all its rows together span, and how many nonzeros its middle row has. */
static void FN(sample)(const void *a_, ptrdiff_t a_row, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t *span,
                       ptrdiff_t *nonzeros)
{
    const REAL *a = (const REAL *)a_ + rows / 2 * a_row;
    int16_t range[2];
    ptrdiff_t n = 0, k = 0;
    FN(nonzero_range)(a_, a_row, fb_min(rows, FB_TILE_ROWS), depth, range);
    for (; k + LANES <= depth; k += LANES)
        n += fb_popcount(V(nonzero)(V(load)(a + k)));
    for (; k < depth; k++)
        n += a[k] != 0;
    *span = range[1] - range[0];
    *nonzeros = n;
}

/* The nonzeros of each row of A, slice by slice: value and byte offset of its row of B in a panel. The list of a slice
 * stands where the slice stood, so the values may replace A itself; zeros fill up its last step, for which the
 * slice, or behind the last one FB_ROW, has room. */
static void FN(compress)(const void *a_, ptrdiff_t a_row, ptrdiff_t rows, ptrdiff_t depth, const fb_nonzeros *out)
{
    for (ptrdiff_t i = 0; i < rows; i++) {
        const REAL *a = (const REAL *)a_ + i * a_row;
        for (ptrdiff_t k0 = 0, slice = 0; k0 < depth; k0 += out->slice, slice++) {
            const ptrdiff_t end = fb_min(k0 + out->slice, depth);
            REAL *value = (REAL *)out->value + i * FB_ROW + k0, *v = value;
            uint16_t *offset = out->offset + i * FB_ROW + k0;
            ptrdiff_t k = k0;
            for (; k + LANES <= end; k += LANES) {
                const VEC x = V(load)(a + k);
                const unsigned keep = V(nonzero)(x);
                V(compress)(x, keep, (int)k, v, offset);
                v += fb_popcount(keep);
                offset += fb_popcount(keep);
            }
            for (; k < end; k++) {
                const REAL x = a[k];
                *v = x;
                *offset = (uint16_t)(k * 64);
                v += x != 0;
                offset += x != 0;
            }
            for (; (v - value) % FB_STEP; v++, offset++) {
                *v = 0;
                *offset = 0;
            }
            out->count[slice * rows + i] = (uint16_t)((v - value) / FB_STEP);
        }
    }
}

/* The block sums s of one row: finish_tile, through a scratch row where the last panel is partly outside C. */
FB_INLINE void FN(finish_row)(const int panels, const fb_product *g, VEC *s, const REAL *bias, const FN(place) at,
                              ptrdiff_t left)
{
    if (FB_LIKELY(left >= panels * PANEL)) {
        FN(finish_tile)(1, panels * PANEL_VECS, g, s, bias, at);
        return;
    }
    REAL scratch[FB_MOST_PANELS * FB_PANEL_BYTES / sizeof(REAL)] = {0};
    if (!g->first)
        FN(copy)(at.from, 0, 1, left, scratch, 0);
    FN(finish_tile)(1, panels * PANEL_VECS, g, s, bias, (FN(place)){scratch, scratch, 0, 0});
    FN(copy)(scratch, 0, 1, left, at.to, 0);
}

/* The sums of one slice, all rows, a group of panels: a nonzero is an fma with a memory operand for each vector. The
 * loads are the limit, two a cycle; so nonzeros come in steps of 4, whose offsets are one load and whose values are
 * one, and 4 panels are enough chains to hide the latency of an fma. Each panel's address has a register of its own,
 * and the loop begins a cache line (setup.py). The next slice of B, at `ahead`, is fetched to L2 in passing. */
FB_INLINE void FN(sparse_rows)(const int panels, const fb_product *g, const fb_nonzeros *list, ptrdiff_t slice,
                               ptrdiff_t p, const REAL *ahead)
{
    const int vecs = panels * PANEL_VECS, first = slice == 0, last = (slice + 1) * list->slice >= g->depth;
    const ptrdiff_t b_panel = g->depth * PANEL, left = g->cols - p * PANEL, rows = g->rows,
                    lines = ahead ? list->slice : 0;
    const REAL *b = (const REAL *)g->b + p * b_panel, *values = (const REAL *)list->value + slice * list->slice;
    const REAL *bias = g->bias ? (const REAL *)g->bias + p * PANEL : NULL;
    const uint16_t *offsets = list->offset + slice * list->slice, *count = list->count + slice * rows;
    const REAL *panel[FB_MOST_PANELS];
    REAL *sums = list->sums;
    FN(place) at = FN(place_at)(g, 0, p * PANEL);
    ptrdiff_t due = 0;
    FB_UNROLL
    for (int q = 0; q < panels; q++) {
        panel[q] = b + q * b_panel;
        FB_REGISTER(panel[q]);
    }
    for (ptrdiff_t i = 0; i < rows; i++, values += FB_ROW, offsets += FB_ROW, sums += FB_MOST_PANELS * PANEL) {
        const REAL *value = values;
        const uint16_t *offset = offsets;
        VEC s[FB_TILE_VECS];
        for (due += lines; due >= rows; due -= rows, ahead += PANEL) {
            FB_UNROLL
            for (int q = 0; q < panels; q++)
                FB_PREFETCH_L2(ahead + q * b_panel);
        }
        FB_PREFETCH(value + FB_ROW);
        FB_PREFETCH(value + FB_ROW + PANEL);
        FB_PREFETCH(offset + FB_ROW);
        if (last) {
            FB_UNROLL
            for (int j = 0; j < panels; j++)
                FB_PREFETCH_WRITE(at.to + at.to_row + j * PANEL);
        }
        FB_UNROLL
        for (int j = 0; j < vecs; j++)
            s[j] = first ? V(zero)() : V(load)(sums + j * LANES);
        for (ptrdiff_t n = count[i]; n > 0; n--, value += FB_STEP, offset += FB_STEP) {
            VEC x[FB_STEP];
            const uint64_t four = fb_load_offsets(offset);
            V(splats)(value, x);
            FB_UNROLL
            for (int q = 0; q < FB_STEP; q++) {
                FB_UNROLL
                for (int j = 0; j < vecs; j++) {
                    const void *w = (const char *)panel[j / PANEL_VECS] + (uint16_t)(four >> 16 * q);
                    s[j] = V(fma)(x[q], V(load)((const REAL *)w + j % PANEL_VECS * LANES), s[j]);
                }
            }
        }
        if (!last) {
            FB_UNROLL
            for (int j = 0; j < vecs; j++)
                V(store)(sums + j * LANES, s[j]);
            continue;
        }
        FN(finish_row)(panels, g, s, bias, at, left);
        at.from += at.from_row;
        at.to += at.to_row;
    }
}

/* A group of panels x a slice of k of B is 16 KB, at home in L1 for all rows. Up to 3 rows read no line of it a second
 * time: whole blocks of more panels at once. */
static void FN(product_sparse)(const fb_product *g, const fb_nonzeros *list)
{
    const ptrdiff_t panels = (g->cols + PANEL - 1) / PANEL, slices = (g->depth + list->slice - 1) / list->slice;
    const ptrdiff_t most = FB_SPARSE_PANELS(g->rows), groups = (panels + most - 1) / most;
    for (ptrdiff_t group = 0; group < groups; group++) {
        const ptrdiff_t p = group * panels / groups, wide = (group + 1) * panels / groups - p;
        for (ptrdiff_t slice = 0; slice < slices; slice++) {
            const ptrdiff_t next = slice + 1 < slices ? (p * g->depth + (slice + 1) * list->slice) * PANEL
                                                      : (p + wide) * g->depth * PANEL;
            /* 3 rows and fewer do not need most of the lines */
            const REAL *ahead = g->rows > 3 ? (const REAL *)g->b + next : NULL;
            switch (wide) {
#define FB_PANEL_CASE(n)                                                                                              \
    case n:                                                                                                           \
        FN(sparse_rows)(n, g, list, slice, p, ahead);                                                                 \
        break;
                FB_PANEL_CASES(FB_PANEL_CASE)
#undef FB_PANEL_CASE
            }
        }
    }
}

/* n nonzeros of a row: all columns of the rows of B that they meet, while the next rows, those of next[], come to
 * L2. */
FB_INLINE void FN(meet_rows)(const int n, const fb_product *g, const REAL *value, const uint16_t *offset,
                             const uint16_t *next, REAL *sums, int first, int last, const FN(place) at)
{
    const REAL *b[2 * FB_STEP], *ahead[2 * FB_STEP];
    VEC x[2 * FB_STEP], s[PANEL_VECS];
    FB_UNROLL
    for (int q = 0; q < n; q++) {
        b[q] = (const REAL *)g->b_rows + offset[q] / FB_PANEL_BYTES * g->b_row;
        ahead[q] = (const REAL *)g->b_rows + next[q] / FB_PANEL_BYTES * g->b_row;
        x[q] = V(splat)(value + q);
    }
    for (ptrdiff_t j = 0; j < g->cols; j += PANEL) {
        FB_UNROLL
        for (int v = 0; v < PANEL_VECS; v++)
            s[v] = first ? V(zero)() : V(load)(sums + j + v * LANES);
        FB_UNROLL
        for (int q = 0; q < n; q++) {
            FB_PREFETCH_L2(ahead[q] + j);
            FB_UNROLL
            for (int v = 0; v < PANEL_VECS; v++)
                s[v] = V(fma)(x[q], V(load)(b[q] + j + v * LANES), s[v]);
        }
        if (last) {
            const REAL *bias = g->bias ? (const REAL *)g->bias + j : NULL;
            FN(finish_row)(1, g, s, bias, (FN(place)){at.from + j, at.to + j, 0, 0}, g->cols - j);
            continue;
        }
        FB_UNROLL
        for (int v = 0; v < PANEL_VECS; v++)
            V(store)(sums + j + v * LANES, s[v]);
    }
}

/* For large weights that come from far away: every other line of a panel takes as long as all lines, for the hardware
 * fetches the others, too; rows of B that are left out cost nothing. Rows side by side, for one stream of lines is
 * slower than several. */
static void FN(product_rows)(const fb_product *g, const fb_nonzeros *list)
{
    enum { MOST = 2 * FB_STEP };
    for (ptrdiff_t i = 0; i < g->rows; i++) {
        const REAL *value = (const REAL *)list->value + i * FB_ROW;
        const uint16_t *offset = list->offset + i * FB_ROW;
        const FN(place) at = FN(place_at)(g, i, 0);
        ptrdiff_t n = FB_STEP * list->count[i];
        int first = 1;
        for (; n > MOST; n -= MOST, value += MOST, offset += MOST, first = 0)
            FN(meet_rows)(MOST, g, value, offset, offset + fb_min(MOST, n - MOST), list->sums, first, 0, at);
        if (n == MOST)
            FN(meet_rows)(MOST, g, value, offset, offset, list->sums, first, 1, at);
        else if (n)
            FN(meet_rows)(FB_STEP, g, value, offset, offset, list->sums, first, 1, at);
        else
            FN(meet_rows)(0, g, value, offset, offset, list->sums, first, 1, at);
    }
}
