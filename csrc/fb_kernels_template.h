/* fb_kernels_template.h - the kernels, written once for every tier and both dtypes.
 *
 * A tier file includes its fb_simd_*.h, then this file twice, with FB_BITS 32 and 64. Parameters:
 *   FB_TIER            the tier's name, the last part of every name made here
 *   FB_BITS            32 or 64
 * and from fb_simd_*.h:
 *   FB_TILE_ROWS, FB_TILE_VECS, FB_TILE_CASES  rows of the largest register tile, its accumulators, X(r) for all its rows
 *   FB_TILE_PANELS(r)                          panels that a tile of r rows spans
 *   FB_DIRECT_ROWS, FB_DIRECT_PANELS           rows of a tile and panels of a product that reads A where it stands, at most
 *   FB_TILE_FUNCTION                           FB_INLINE or FB_NOINLINE: how the tiles are compiled
 *   FB_FETCH_GROUP                             panels of a tile up to which it fetches the next ones
 *   FB_FETCH_SPREAD, FB_FETCH_NEXT_A           whether it may fetch at every fourth k only; whether it fetches the next A
 *   FB_DENSE_FROM, FB_DENSE_FEW, FB_FEW_ROWS   see struct fb_kernels
 *   FB_SPARSE_PANELS(r)                        panels at a time in a sparse product of r rows
 *   FB_MOST_PANELS, FB_PANEL_CASES             the most of these, X(n) for all of them
 * Each kernel's comment names the function of fastblock/reference.py that defines its bits.
 */
#if FB_BITS == 32
#define REAL float
#define VEC fb_f32_vec
#define LANES FB_F32_LANES
#define V(operation) FB_CAT(fb_f32_, operation)
#define FN(name) FB_CAT(FB_CAT(fb_, name), FB_CAT(_f32_, FB_TIER))
#define UINT uint32_t /* the bits of a REAL, of which so many are the fraction */
#define FRACTION 23
#else
#define REAL double
#define VEC fb_f64_vec
#define LANES FB_F64_LANES
#define V(operation) FB_CAT(fb_f64_, operation)
#define FN(name) FB_CAT(FB_CAT(fb_, name), FB_CAT(_f64_, FB_TIER))
#define UINT uint64_t
#define FRACTION 52
#endif
#define PANEL ((ptrdiff_t)(FB_PANEL_BYTES / sizeof(REAL)))
#define PANEL_VECS ((int)(FB_PANEL_BYTES / sizeof(VEC)))
#define FB_STRIP 16 /* k between two looks at what is left */
#define FB_EXP_VECS 4 /* vectors side by side in exp: 2 take 1.05, 1 takes 1.34 times as long, for each step waits */

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

/* Rows of B as they are: B[k, j] = x[k*x_row + j], k < depth, j < cols, into panels of one block, columns beyond the last
 * are +0.0, and so are rows that keep, if there is one, does not keep. Returns whether all are finite: x * 0 is a zero for finite x, NaN for the others, and a NaN survives every sum.
 * Some rows at a time, so that what a panel gets is whole lines of one page: with all rows of a panel at a time mixing 512 x
 * 768 took 1.06 times as long. */
static int FN(pack_rows)(const void *x_, ptrdiff_t x_row, ptrdiff_t depth, ptrdiff_t cols, const uint8_t *keep, void *panels)
{
    enum { ROWS = 16 /* 8 as good, 32 and more not */ };
    static const REAL nothing[PANEL] = {0};
    VEC sum[PANEL_VECS];
    REAL lane[PANEL];
    FB_UNROLL
    for (int v = 0; v < PANEL_VECS; v++)
        sum[v] = V(zero)();
    for (ptrdiff_t k = 0; k < depth; k += ROWS) {
        const ptrdiff_t rows = fb_min(ROWS, depth - k);
        for (ptrdiff_t j = 0; j < cols; j += PANEL) {
            const REAL *from = (const REAL *)x_ + k * x_row + j;
            REAL *to = (REAL *)panels + j * depth + k * PANEL;
            ptrdiff_t from_row = x_row;
            if (cols - j < PANEL) {
                memset(to, 0, (size_t)(rows * FB_PANEL_BYTES));
                FN(copy)(from, x_row, rows, cols - j, to, PANEL);
                from = to;
                from_row = PANEL;
            }
            for (ptrdiff_t i = 0; i < rows; i++, from += from_row, to += PANEL) {
                const REAL *row = keep && !keep[k + i] ? nothing : from;
                FB_UNROLL
                for (int v = 0; v < PANEL_VECS; v++) {
                    const VEC x = V(load)(row + v * LANES);
                    V(store)(to + v * LANES, x);
                    sum[v] = V(add)(sum[v], V(mul)(x, V(zero)()));
                }
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

/* ---- product: one block of k of a matrix product (reference.chain256, finish, relu) */

/* Where a tile finds the totals so far and puts the new ones, which after the last block are results. */
typedef struct FN(place) {
    const REAL *from;
    REAL *to;
    ptrdiff_t from_row, to_row;
} FN(place);

FB_INLINE FN(place) FN(place_at)(const fb_product *g, ptrdiff_t i, ptrdiff_t j)
{
    REAL *c = (REAL *)g->c + i * g->c_row + j, *t = (REAL *)g->t + i * g->t_row + j;
    return (FN(place)){t, g->last ? c : t, g->t_row, g->last ? g->c_row : g->t_row};
}

/* What becomes of the block sums s of a tile: added to the totals, finished if they are the last (reference.finish). */
FB_INLINE void FN(finish_tile)(const int rows, const int vecs, const fb_product *g, VEC *s, const REAL *bias,
                               const FN(place) at)
{
    if (!g->first) {
        FB_UNROLL
        for (int i = 0; i < rows; i++) {
            FB_UNROLL
            for (int j = 0; j < vecs; j++)
                s[i * vecs + j] = V(add)(V(load)(at.from + i * at.from_row + j * LANES), s[i * vecs + j]);
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
        V(end)(rows * vecs, s, g->relu);
    }
    FB_UNROLL
    for (int i = 0; i < rows; i++) {
        FB_UNROLL
        for (int j = 0; j < vecs; j++)
            V(store)(at.to + i * at.to_row + j * LANES, s[i * vecs + j]);
    }
}

/* The longer side of the tile comes one by one, so that the shorter side and the accumulators fit into the registers. */
FB_INLINE void FN(tile_step)(const int rows, const int vecs, const REAL *a, ptrdiff_t a_row, const REAL *b,
                             ptrdiff_t b_panel, VEC *s)
{
    VEC side[FB_TILE_VECS], one;
    if (rows < vecs) {
        FB_UNROLL
        for (int i = 0; i < rows; i++)
            side[i] = V(splat)(a + i * a_row);
        FB_UNROLL
        for (int j = 0; j < vecs; j++) {
            one = V(load)(b + j / PANEL_VECS * b_panel + j % PANEL_VECS * LANES);
            FB_UNROLL
            for (int i = 0; i < rows; i++)
                s[i * vecs + j] = V(fma)(side[i], one, s[i * vecs + j]);
        }
        return;
    }
    FB_UNROLL
    for (int j = 0; j < vecs; j++)
        side[j] = V(load)(b + j / PANEL_VECS * b_panel + j % PANEL_VECS * LANES);
    FB_UNROLL
    for (int i = 0; i < rows; i++) {
        one = V(splat)(a + i * a_row);
        FB_UNROLL
        for (int j = 0; j < vecs; j++)
            s[i * vecs + j] = V(fma)(one, side[j], s[i * vecs + j]);
    }
}

/* A tile of `rows` x `panels` panels, both constants: its accumulators are registers. For a staged A a_row is a constant,
 * too: one register points to all rows. In its first `fetches` strips the tile fetches a line a k, `fetch` elements ahead
 * in B (L2); the hardware does not notice that a panel will be followed by the next one.
 *
 * No instruction here is free: with a second thread on the core, whom the machine gives every other cycle, 27 instead of
 * 21 instructions a k took 1.25 times as long (rows a variable distance apart; fetches of the next rows of A).
 * Not better: the same lines in bursts between the tiles (6 to 16 rows 1.2 to 1.3 times as long), every second line
 * (1.5 times), a line every second k (1.05 times), to L1 (the same), all lines in the first of two tiles (1.03); both
 * halves of the panel at once (7 to 12 rows 0.9 to 1 on one day, 1.03 to 1.1 on another, 6 and 16 rows 1.02 to 1.13), in
 * every strip two lines 8 apart (1.1 to 1.2).
 * Not better: 3 rows x 2 panels with operands in memory, 17.5 instead of 21.5 instructions a k (0.95: loads), or without
 * (from L1 1.03 beside a second thread, 1 else; but 2 panels fit into L1 in halves of k only, with twice as many ends); k in
 * one loop of 4 instead of strips (gcc then moves accumulators: 0.8).
 * Not better either: 150 instead of 290 instructions at the ends of a tile (a function a tile height that walks down the
 * rows; NaN looked for in the sum of all vectors): 0.99 to 1.02, and 16 rows at depth 64 1.07 times as long. The ends
 * overlap with the neighbouring tiles: a tile of 6 rows takes 6.05 cycles a k and 48 more, 25 to 30 with nothing at its end
 * but stores; finish and relu in 3 instead of 5 operations 1 to 1.02. 8 rows as 5 + 3 instead of 4 + 4: 1.2. */
FB_INLINE void FN(tile)(const int rows, const int panels, const fb_product *g, const REAL *a, ptrdiff_t a_row,
                        const REAL *b, ptrdiff_t left, const REAL *bias, const FN(place) at, const fb_fetch fetch)
{
    const int vecs = panels * PANEL_VECS;
    const ptrdiff_t b_panel = g->depth * PANEL;
    VEC s[FB_TILE_VECS];
    FB_UNROLL
    for (int i = 0; i < rows * vecs; i++)
        s[i] = V(zero)();
    FB_UNROLL
    for (int i = 0; i < rows; i++)
        FB_PREFETCH_WRITE(at.to + i * at.to_row);

    ptrdiff_t strips = fetch.strips;
    const char *line = fetch.at;
#define FB_FETCHING(fetch_at_k)                                                                                       \
    for (; left >= FB_STRIP && strips > 0; left -= FB_STRIP, a += FB_STRIP, b += FB_STRIP * PANEL, strips--) {         \
        FB_UNROLL_K                                                                                                    \
        for (int k = 0; k < FB_STRIP; k++) {                                                                           \
            fetch_at_k;                                                                                                \
            FN(tile_step)(rows, vecs, a + k, a_row, b + k * PANEL, b_panel, s);                                        \
        }                                                                                                              \
        line += fetch.step;                                                                                            \
    }
    if (FB_FETCH_SPREAD && fetch.kind == FB_FETCH_QUARTER) { /* the same line 4 times, for every k is to be the same code */
        FB_FETCHING(FB_PREFETCH_L2(line + k * FB_PANEL_BYTES / 4))
    } else if (fetch.kind == FB_FETCH_LINES) {
        FB_FETCHING(FB_PREFETCH_L2(line + k * FB_PANEL_BYTES))
    } else if (FB_FETCH_GROUP > 1 && fetch.kind == FB_FETCH_PANELS) {
        FB_FETCHING(FB_UNROLL for (int q = 0; q < panels; q++)
                        FB_PREFETCH_L2(line + k * FB_PANEL_BYTES + q * b_panel * (ptrdiff_t)sizeof(REAL)))
    }
#undef FB_FETCHING
    for (; left >= FB_STRIP; left -= FB_STRIP, a += FB_STRIP, b += FB_STRIP * PANEL) {
        FB_UNROLL_K
        for (int k = 0; k < FB_STRIP; k++)
            FN(tile_step)(rows, vecs, a + k, a_row, b + k * PANEL, b_panel, s);
    }
    for (; left > 0; left--, a++, b += PANEL)
        FN(tile_step)(rows, vecs, a, a_row, b, b_panel, s);

    FN(finish_tile)(rows, vecs, g, s, bias, at);
}

/* The tile at row i and panel p; returns the number of panels done. The last panel, where it is partly outside C,
 * goes through a scratch tile: C is never written or read outside. */
FB_INLINE ptrdiff_t FN(tile_at)(const int rows, const fb_product *g, const REAL *a, ptrdiff_t a_row, ptrdiff_t i,
                                ptrdiff_t p, const int16_t *range, const fb_fetch fetch)
{
    const ptrdiff_t depth = range[1] - range[0];
    const REAL *b = (const REAL *)g->b + p * g->depth * PANEL + range[0] * PANEL;
    const REAL *bias = g->bias ? (const REAL *)g->bias + p * PANEL : NULL;
    const FN(place) at = FN(place_at)(g, i, p * PANEL);
    const ptrdiff_t left = g->cols - p * PANEL;
    a += i * a_row + range[0];
    if (FB_LIKELY(left >= FB_TILE_PANELS(rows) * PANEL)) {
        FN(tile)(rows, FB_TILE_PANELS(rows), g, a, a_row, b, depth, bias, at, fetch);
        return FB_TILE_PANELS(rows);
    }
    if (FB_TILE_PANELS(rows) > 2 && left >= 2 * PANEL) {
        FN(tile)(rows, 2, g, a, a_row, b, depth, bias, at, (fb_fetch){0});
        return 2;
    }
    if (FB_TILE_PANELS(rows) > 1 && left >= PANEL) {
        FN(tile)(rows, 1, g, a, a_row, b, depth, bias, at, (fb_fetch){0});
        return 1;
    }
    REAL scratch[FB_TILE_ROWS * FB_PANEL_BYTES / sizeof(REAL)];
    if (!g->first) {
        memset(scratch, 0, sizeof scratch);
        FN(copy)(at.from, at.from_row, rows, left, scratch, PANEL);
    }
    FN(tile)(rows, 1, g, a, a_row, b, depth, bias, (FN(place)){scratch, scratch, PANEL, PANEL}, (fb_fetch){0});
    FN(copy)(scratch, PANEL, rows, left, at.to, at.to_row);
    return 1;
}

/* As FB_NOINLINE, each tile height is a function of its own: what registers it gets does not depend on the others. */
#define FB_TILE_OF(r)                                                                                                 \
    FB_TILE_FUNCTION ptrdiff_t FN(FB_CAT(staged_, r))(const fb_product *g, const REAL *a, ptrdiff_t i, ptrdiff_t p,    \
                                                      const int16_t *range, const fb_fetch *fetch)                     \
    {                                                                                                                  \
        return FN(tile_at)(r, g, a, FB_ROW, i, p, range, *fetch);                                                      \
    }                                                                                                                  \
    FB_TILE_FUNCTION ptrdiff_t FN(FB_CAT(direct_, r))(const fb_product *g, const REAL *a, ptrdiff_t i, ptrdiff_t p,    \
                                                      const int16_t *range, const fb_fetch *fetch)                     \
    {                                                                                                                  \
        return FN(tile_at)(r > FB_DIRECT_ROWS ? FB_DIRECT_ROWS : r, g, a, g->a_row, i, p, range, *fetch); /* at most */     \
    }
FB_TILE_CASES(FB_TILE_OF)
#undef FB_TILE_OF

/* Which of the vectors at k in the rows of a tile hold nonzeros in which lanes. */
FB_INLINE unsigned FN(nonzero_lanes)(const REAL *const *row, ptrdiff_t k)
{
    unsigned lanes = 0;
    FB_UNROLL
    for (int i = 0; i < FB_TILE_ROWS; i++)
        lanes |= V(nonzero)(V(load)(row[i] + k));
    return lanes;
}

/* The k that matter to a tile: outside of [range[0], range[1]) all its rows of A are zero (contract section 6). All rows
 * side by side, for each end that is found is a mispredicted branch: with the rows one by one, and ends in whole vectors,
 * 12 x 128 x 64 causal took 1.04 times as long, 12 x 128 x 128 1.08. */
FB_INLINE void FN(nonzero_range)(const REAL *a, ptrdiff_t a_row, ptrdiff_t rows, ptrdiff_t depth, int16_t *range)
{
    const REAL *row[FB_TILE_ROWS];
    ptrdiff_t first = 0, end = depth;
    FB_UNROLL
    for (int i = 0; i < FB_TILE_ROWS; i++)
        row[i] = a + fb_min(i, rows - 1) * a_row;
    for (; first + LANES <= depth; first += LANES) {
        const unsigned lanes = FN(nonzero_lanes)(row, first);
        if (lanes) {
            first += fb_lowest_bit(lanes);
            break;
        }
    }
    for (; end - LANES >= first; end -= LANES) {
        const unsigned lanes = FN(nonzero_lanes)(row, end - LANES);
        if (lanes) {
            end -= LANES - 1 - fb_highest_bit(lanes);
            break;
        }
    }
    range[0] = (int16_t)first;
    range[1] = (int16_t)end;
}

/* How each of the tiles side by side fetches its share of the next group of panels. The hardware does not notice that a
 * panel will be followed by the next one. */
FB_INLINE fb_fetch FN(fetch_panels)(const fb_product *g, ptrdiff_t group, ptrdiff_t tiles)
{
    const ptrdiff_t strips = g->depth / FB_STRIP, lines = group * g->depth;
    if (group > FB_FETCH_GROUP || strips == 0)
        return (fb_fetch){0};
    if (tiles == 1)
        return (fb_fetch){group > 1 ? FB_FETCH_PANELS : FB_FETCH_LINES, NULL, FB_STRIP * FB_PANEL_BYTES, strips};
    const int spread = FB_FETCH_SPREAD && lines <= 4 * strips * tiles;
    const ptrdiff_t at_once = spread ? FB_STRIP / 4 : FB_STRIP, share = (lines + at_once * tiles - 1) / (at_once * tiles);
    return (fb_fetch){spread ? FB_FETCH_QUARTER : FB_FETCH_LINES, NULL, at_once * FB_PANEL_BYTES, fb_min(strips, share)};
}

/* The same `rows` rows of the next A, where they stand: whole lines if the rows touch, else up to FB_STRIP lines a row. */
FB_INLINE fb_fetch FN(fetch_rows)(const fb_product *g, ptrdiff_t i, ptrdiff_t rows)
{
    const ptrdiff_t at_once = FB_STRIP * FB_PANEL_BYTES, row = g->a_row * (ptrdiff_t)sizeof(REAL);
    const int touch = g->a_row == g->depth;
    return (fb_fetch){.kind = FB_FETCH_LINES, .at = (const char *)g->next_a + i * row, .step = touch ? at_once : row,
                      .strips = touch ? (rows * row + at_once - 1) / at_once : rows};
}

/* Loop 2 of the BLIS numbering runs over the panels of B, loop 1 over the row tiles of A: a panel (16 KB) stays in
 * L1 for all rows. Rows are dealt out evenly (13 = 5 + 4 + 4, not 6 + 6 + 1), because a tile of fewer than 4 rows x
 * 1 panel has too few chains to fill the FMA units; 3 rows or fewer span several panels instead. staged, a constant: A is
 * read, or copied to, FB_ROW apart. */
FB_INLINE void FN(product_of)(const fb_product *g, const int staged)
{
    const ptrdiff_t a_row = staged ? FB_ROW : g->a_row, most = staged ? FB_TILE_ROWS : FB_DIRECT_ROWS;
    const ptrdiff_t panels = (g->cols + PANEL - 1) / PANEL, tiles = (g->rows + most - 1) / most;
    if (tiles == 0)
        return;
    const ptrdiff_t fewest = tiles == 1 ? g->rows : g->rows / tiles;
    const ptrdiff_t longer_until = (g->rows - tiles * fewest) * (fewest + 1);
    const ptrdiff_t group = FB_TILE_PANELS(fewest);
    const fb_fetch ahead = staged ? FN(fetch_panels)(g, group, tiles) : (fb_fetch){0};
    const int16_t whole[2] = {0, (int16_t)(g->depth - g->unseen)};
    int16_t range[FB_ROWS][2];
    const REAL *a = g->a;
    ptrdiff_t rows;
    for (ptrdiff_t i = 0, t = 0; g->skip && i < g->rows; i += rows, t++) {
        rows = i < longer_until ? fewest + 1 : fewest;
        FN(nonzero_range)(a + i * g->a_row, g->a_row, rows, g->depth, range[t]);
        if (g->a_row != a_row)
            FN(copy)(a + i * g->a_row + range[t][0], g->a_row, rows, range[t][1] - range[t][0],
                     (REAL *)g->stage + i * FB_ROW + range[t][0], FB_ROW);
    }
    if (g->a_row != a_row) {
        if (!g->skip)
            FN(copy)(a, g->a_row, g->rows, g->depth, g->stage, FB_ROW);
        a = g->stage;
    }
    for (ptrdiff_t p0 = 0; p0 < panels; p0 += group) {
        const ptrdiff_t p1 = fb_min(p0 + group, panels);
        for (ptrdiff_t i = 0, t = 0; i < g->rows; i += rows, t++) {
            rows = i < longer_until ? fewest + 1 : fewest;
            if (g->wanted && g->wanted[i + rows - 1] <= g->first_col + p0 * PANEL)
                continue;
            fb_fetch fetch = ahead;
            fetch.at = (const char *)((const REAL *)g->b + p1 * g->depth * PANEL) + t * ahead.strips * ahead.step;
            if (FB_FETCH_NEXT_A && g->next_a && p0 == 0)
                fetch = FN(fetch_rows)(g, i, rows);
            for (ptrdiff_t p = p0; p < p1;) {
                switch (rows) {
#define FB_TILE_CASE(r)                                                                                               \
    case r:                                                                                                           \
        p += (staged ? FN(FB_CAT(staged_, r)) : FN(FB_CAT(direct_, r)))(g, a, i, p, g->skip ? range[t] : whole, &fetch); \
        break;
                    FB_TILE_CASES(FB_TILE_CASE)
#undef FB_TILE_CASE
                }
            }
        }
    }
}

/* A copy of A that few panels read is not worth its time, though the tile then needs more registers for the rows: mixing 12 x
 * 128 x 64 1.06 times as fast without, 12 x 512 x 64 causal 1.06 to 1.14, 128 x 16 1.15, 128 x 128 1.02; 128 x 256 0.83 to
 * 0.95, 512 x 768 0.95; attention weights from 64 features 12 x 128 1.04, causal 1.05. Not better: fetches of the rows of the
 * next tile, during the first panel (0.9 to 1). */
static void FN(product)(const fb_product *g)
{
    if (FB_DIRECT_PANELS && g->a_row != FB_ROW && g->cols <= FB_DIRECT_PANELS * PANEL)
        FN(product_of)(g, 0);
    else
        FN(product_of)(g, 1);
}

/* ---- product_sparse: the same, from the nonzeros of A only (contract section 6) */

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
 * one, and 4 panels are enough chains to hide the latency of an fma. At 128 x 256 -> 768, times of this: 6 panels and
 * nonzeros one by one 1.07 (half zeros) and 1.1 to 1.2 (90 and 97 %); 6 panels in steps 1.07; 5 panels x 80 k 1.12;
 * slices of 88 and 96 k the same, of 256 k at 16 rows 1.25; rows in chunks whose sums stay in L1 1.01 to 1.05; pairs of
 * rows side by side, 2 panels x 128 k, 1.01. Sorting the rows by the length of their lists gains less in predicted
 * branches than it loses in the order of memory. A panel's address in no register of its own: 1.05; offsets loaded one by
 * one 1.02, values 1.04; the loop not at the start of a cache line: 1.06.
 * The next slice of B, at `ahead`, is fetched to L2 in passing. */
FB_INLINE void FN(sparse_rows)(const int panels, const fb_product *g, const fb_nonzeros *list, ptrdiff_t slice,
                               ptrdiff_t p, const REAL *ahead)
{
    const int vecs = panels * PANEL_VECS, first = slice == 0, last = (slice + 1) * list->slice >= g->depth;
    const ptrdiff_t b_panel = g->depth * PANEL, left = g->cols - p * PANEL, rows = g->rows, lines = ahead ? list->slice : 0;
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
 * time: whole blocks of more panels at once, 1.02 to 1.1 times as fast. */
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

/* n nonzeros of a row: all columns of the rows of B that they meet, while the next rows, those of next[], come to L2. */
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
 * fetches the others, too; every other row of B takes half as long as all rows. 8 rows side by side, for one stream of
 * lines has half the speed of several. 1 x 768 -> 3072 at half zeros: 1.3 to 1.5 times as fast as by panels. */
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

/* ---- product_small: a whole product of one vector's columns, from operands as they are. A row is stored whole where
 * the rows below will overwrite what is too much. */
static void FN(product_small)(const fb_product *g, ptrdiff_t b_row)
{
    /* copies: the compiler cannot know that what is stored is not g */
    const ptrdiff_t rows = g->rows, cols = g->cols, depth = g->depth, a_row = g->a_row, c_row = g->c_row;
    const int relu = g->relu;
    const REAL *a = g->a;
    REAL *c = g->c, *const end = c + (rows - 1) * c_row + cols;
    const VEC bias = g->bias ? V(load_first)(g->bias, cols) : V(zero)();
    for (ptrdiff_t i = 0; i < rows; i++, a += a_row, c += c_row) {
        const REAL *b = g->b;
        VEC s = V(zero)();
        for (ptrdiff_t k = 0; k < depth; k++, b += b_row)
            s = V(fma)(V(splat)(a + k), V(load_first)(b, cols), s);
        s = V(canonical)(V(add)(s, bias));
        if (relu)
            s = V(relu)(s);
        if (end - c >= LANES)
            V(store)(c, s);
        else
            V(store_first)(c, s, cols);
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
            VEC v = V(add)(V(load_first)(x + whole, rest), V(load_first)(bias + whole, rest));
            V(store_first)(out + whole, V(relu)(V(canonical)(v)), rest);
        }
    }
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

/* ---- exp: reference.exp of n float64 vectors side by side, so that a constant is loaded once for all of them and no
 * step waits for the one before. The float32 exp falls back on float64, too: shorter, because only its last rounding must
 * come out right; that it does for all 2**32 inputs is tested (tests/test_exp.py). */
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
 *     e**x = s + p * w,  w = r - head + r * r/2 + rest * (1 + r) + r**2/2 * (rest + r/3 * (1 + rest) + r**2/12 + r**3/60)
 * in absolute value less than 2**-9.6. Its error is less than 1.9 * 2**-34: rounded w 1, rounded r - head + ... 0.25,
 * the product of rest and what k * ln(2)/8 has beyond k * ln2_high 0.27, the sums before 0.06 each, the polynomial 0.12.
 * If s + p * (w +- 2**-33) rounds to one number, it is the right one (`error` is larger, lest the sum be rounded to
 * less); else, in 1 of 360, `unsure` is positive, or NaN. Then x goes to exp_exact, and so it does from +-87 on, where
 * the error is set to x**4 - 87**4: up to 2**18 that is at least 1 and w is less than 1; beyond, r is what rounding t cuts
 * off, less than 2**-22 * x, so up to 2**32 w is less than 2**52 where the error is more than 2**71, and from there on the
 * error is infinite. (With x**2 it was lost in w from 2**50 on.) A softmax of 512 takes 0.90 ns an element, with exp_exact alone 1.22.
 * The order of the steps matters, for registers are what is short: e at the end, where it is used, 1.05 (x is needed so
 * long); with shorter chains exp alone takes longer, too: r - head added before q is known 1.13, q from two halves 1.22. */
FB_INLINE void FN(exp_quick)(const int n, const VEC *x, VEC *y, VEC *unsure)
{
    static const float power[16] = {0x1p+0f, 0x1.173p+0f, 0x1.307p+0f, 0x1.4cp+0f, 0x1.6a1p+0f, 0x1.8adp+0f, 0x1.ae9p+0f, 0x1.d58p+0f,
                                    0x1p+0f, 0x1.173p+0f, 0x1.307p+0f, 0x1.4cp+0f, 0x1.6a1p+0f, 0x1.8adp+0f, 0x1.ae9p+0f, 0x1.d58p+0f};
    static const float power_rest[16] = {
        0, -0x1.0736c4p-14f, -0x1.a5f74ep-20f, -0x1.ca8b44p-16f, -0x1.140906p-14f, -0x1.156e68p-16f, -0x1.ca89aap-15f, 0x1.b1d272p-17f,
        0, -0x1.0736c4p-14f, -0x1.a5f74ep-20f, -0x1.ca8b44p-16f, -0x1.140906p-14f, -0x1.156e68p-16f, -0x1.ca89aap-15f, 0x1.b1d272p-17f};
    static const float inv = 0x1.715476p+3f, ln2_high = -0x1.62e43p-4f, ln2_low = 0x1.05c61p-32f;
    static const float round = 0x1.8p23f, round_head = 0x1.8p12f, error = 0x1.4p-33f, far = -87.0f * 87 * 87 * 87;
    static const float c2 = 0.5f, c3 = 0x1.555556p-2f, c4 = 0x1.555d04p-4f, c5 = 0x1.1115c6p-6f;
    VEC t[FB_EXP_VECS], k[FB_EXP_VECS], r[FB_EXP_VECS], rest[FB_EXP_VECS], head[FB_EXP_VECS], half[FB_EXP_VECS], e[FB_EXP_VECS];
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

static const struct fb_kernels FN(kernels) = {
    .tier = FB_STR(FB_TIER),
    .size = sizeof(REAL),
    .panel = FB_PANEL_BYTES / sizeof(REAL),
    .lanes = LANES,
    .shift = FRACTION + 1,
    .infinity = (1 << (FB_BITS - 1 - FRACTION)) - 1,
    .direct = FB_DIRECT_PANELS * (FB_PANEL_BYTES / sizeof(REAL)),
    .dense_from = FB_DENSE_FROM,
    .dense_few = FB_DENSE_FEW,
    .few_rows = FB_FEW_ROWS,
    .copy = FN(copy),
    .pack = FN(pack),
    .pack_rows = FN(pack_rows),
    .product = FN(product),
    .sample = FN(sample),
    .compress = FN(compress),
    .product_sparse = FN(product_sparse),
    .product_rows = FN(product_rows),
    .product_small = FN(product_small),
    .bias_relu = FN(bias_relu),
    .softmax = FN(softmax),
    .touch = FN(touch),
    .range = FN(range),
    .raise = FN(raise),
    .lower = FN(lower),
    .fma = FN(fma),
    .exp = FN(exp),
    .fma_chains = FN(fma_chains),
};

#undef REAL
#undef UINT
#undef FRACTION
#undef VEC
#undef LANES
#undef V
#undef FN
#undef PANEL
#undef PANEL_VECS
#undef FB_STRIP
#undef FB_EXP_VECS
#undef FB_BITS
