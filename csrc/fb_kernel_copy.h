/* fb_kernel_copy.h - rows and panels laid out: copy, pack, pack_rows; a part of fb_kernels_template.h. */

/* Rows of n elements. */
static void FN(copy)(const void *from_, ptrdiff_t from_row, ptrdiff_t rows, ptrdiff_t n, void *to_, ptrdiff_t to_row)
{
    const REAL *from = from_;
    REAL *to = to_;
    for (ptrdiff_t i = 0; i < rows; i++, from += from_row, to += to_row) {
        ptrdiff_t j = 0;
        for (; j + LANES <= n; j += LANES)
            V(store)(to + j, V(load)(from + j));
        for (; j < n; j++)
            to[j] = from[j];
    }
}

/* Transposed in squares of LANES x LANES; nothing but moves, so that a signalling NaN survives. */
static void FN(pack)(const void *w_, ptrdiff_t w_row, ptrdiff_t rows, ptrdiff_t depth, void *panel_)
{
    REAL *panel = panel_;
    if (rows < PANEL)
        memset(panel, 0, (size_t)depth * FB_PANEL_BYTES);
    for (ptrdiff_t k = 0; k < depth; k += LANES)
        for (ptrdiff_t j = 0; j < rows; j += LANES) {
            const REAL *w = (const REAL *)w_ + j * w_row + k;
            const ptrdiff_t height = fb_min(LANES, rows - j), width = fb_min(LANES, depth - k);
            VEC square[LANES];
            FB_UNROLL
            for (int i = 0; i < LANES; i++)
                square[i] = i >= height ? V(zero)() : FB_LIKELY(width == LANES) ? V(load)(w + i * w_row)
                                                                                : V(load_first)(w + i * w_row, width);
            V(transpose)(square);
            FB_UNROLL
            for (int i = 0; i < LANES; i++)
                if (i < width)
                    V(store)(panel + (k + i) * PANEL + j, square[i]);
        }
}

/* Rows of B as they are: B[k, j] = x[number[k]*x_row + j], k < depth, j < cols, into panels of one block; columns
 * beyond the last are +0.0. Returns whether all are finite: x * 0 is a zero for finite x, NaN for the others, and a
 * NaN survives every sum. Some rows at a time, so that what a panel gets is whole lines of one page. */
static int FN(pack_rows)(const void *x_, ptrdiff_t x_row, const ptrdiff_t *number, ptrdiff_t depth, ptrdiff_t cols,
                         void *panels)
{
    enum { ROWS = 16 };
    const REAL *x = x_;
    VEC sum[PANEL_VECS];
    REAL lane[PANEL];
    FB_UNROLL
    for (int v = 0; v < PANEL_VECS; v++)
        sum[v] = V(zero)();
    for (ptrdiff_t k0 = 0; k0 < depth; k0 += ROWS) {
        const ptrdiff_t end = fb_min(k0 + ROWS, depth);
        for (ptrdiff_t j = 0; j < cols; j += PANEL) {
            REAL *to = (REAL *)panels + j * depth + k0 * PANEL;
            if (cols - j < PANEL)
                memset(to, 0, (size_t)((end - k0) * FB_PANEL_BYTES));
            for (ptrdiff_t k = k0; k < end; k++, to += PANEL) {
                const REAL *from = x + (number ? number[k] : k) * x_row + j;
                if (FB_LIKELY(cols - j >= PANEL)) {
                    FB_UNROLL
                    for (int v = 0; v < PANEL_VECS; v++)
                        V(store)(to + v * LANES, V(load)(from + v * LANES));
                } else {
                    FN(copy)(from, 0, 1, cols - j, to, 0);
                }
                FB_UNROLL
                for (int v = 0; v < PANEL_VECS; v++)
                    sum[v] = V(add)(sum[v], V(mul)(V(load)(to + v * LANES), V(zero)()));
            }
        }
    }
    FB_UNROLL
    for (int v = 0; v < PANEL_VECS; v++)
        V(store)(lane + v * LANES, sum[v]);
    for (int i = 0; i < PANEL; i++)
        if (lane[i] != 0)
            return 0;
    return 1;
}
