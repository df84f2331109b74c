/* fb_kernel_product.h - one block of k of a matrix product (reference.chain256, finish, relu); a part of
 * fb_kernels_template.h.
 *
 * product is for operands laid out for it, product_small for those that stand where they are. */

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

/* The longer side of the tile comes one by one, so that the shorter side and the accumulators fit into the
 * registers. */
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

/* A tile of `rows` x `panels` panels, both constants: its accumulators are registers. For a staged A a_row is a
 * constant, too: one register points to all rows. In its first `fetches` strips the tile fetches a line a k, `fetch`
 * elements ahead in B (L2); the hardware does not notice that a panel will be followed by the next one.
 *
 * No instruction in this loop is free, for a second thread on the core gets every other cycle: hence strips of constant
 * length, rows a constant apart and one line fetched a k. The ends of a tile overlap with the neighbouring tiles. */
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
    if (FB_FETCH_SPREAD && fetch.kind == FB_FETCH_QUARTER) { /* a line 4 times, for every k is to be the same code */
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

/* As FB_NOINLINE, each tile height is a function of its own: what registers it gets does not depend on the others. A
 * direct tile has FB_DIRECT_ROWS rows at most. */
#define FB_TILE_OF(r)                                                                                                 \
    FB_TILE_FUNCTION ptrdiff_t FN(FB_CAT(staged_, r))(const fb_product *g, const REAL *a, ptrdiff_t i, ptrdiff_t p,    \
                                                      const int16_t *range, const fb_fetch *fetch)                     \
    {                                                                                                                  \
        return FN(tile_at)(r, g, a, FB_ROW, i, p, range, *fetch);                                                      \
    }                                                                                                                  \
    FB_TILE_FUNCTION ptrdiff_t FN(FB_CAT(direct_, r))(const fb_product *g, const REAL *a, ptrdiff_t i, ptrdiff_t p,    \
                                                      const int16_t *range, const fb_fetch *fetch)                     \
    {                                                                                                                  \
        return FN(tile_at)(r > FB_DIRECT_ROWS ? FB_DIRECT_ROWS : r, g, a, g->a_row, i, p, range, *fetch);              \
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

/* The k that matter to a tile: outside of [range[0], range[1]) all its rows of A are zero (contract section 6). All
 * rows side by side, for each end that is found is a mispredicted branch. */
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
    const ptrdiff_t at_once = spread ? FB_STRIP / 4 : FB_STRIP,
                    share = (lines + at_once * tiles - 1) / (at_once * tiles);
    return (fb_fetch){spread ? FB_FETCH_QUARTER : FB_FETCH_LINES, NULL, at_once * FB_PANEL_BYTES,
                      fb_min(strips, share)};
}

/* The same `rows` rows of the next A, where they stand: whole lines if the rows touch, else up to FB_STRIP lines a
 * row. */
FB_INLINE fb_fetch FN(fetch_rows)(const fb_product *g, ptrdiff_t i, ptrdiff_t rows)
{
    const ptrdiff_t at_once = FB_STRIP * FB_PANEL_BYTES, row = g->a_row * (ptrdiff_t)sizeof(REAL);
    const int touch = g->a_row == g->depth;
    return (fb_fetch){.kind = FB_FETCH_LINES, .at = (const char *)g->next_a + i * row, .step = touch ? at_once : row,
                      .strips = touch ? (rows * row + at_once - 1) / at_once : rows};
}

/* Loop 2 of the BLIS numbering runs over the panels of B, loop 1 over the row tiles of A: a panel (16 KB) stays in
 * L1 for all rows. Rows are dealt out evenly (13 = 5 + 4 + 4, not 6 + 6 + 1), because a tile of fewer than 4 rows x
 * 1 panel has too few chains to fill the FMA units; 3 rows or fewer span several panels instead. staged, a constant: A
 * is read, or copied to, FB_ROW apart. */
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
            fb_fetch fetch = ahead;
            fetch.at = (const char *)((const REAL *)g->b + p1 * g->depth * PANEL) + t * ahead.strips * ahead.step;
            if (FB_FETCH_NEXT_A && g->next_a && p0 == 0)
                fetch = FN(fetch_rows)(g, i, rows);
            for (ptrdiff_t p = p0; p < p1;) {
                switch (rows) {
#define FB_TILE_CASE(r)                                                                                               \
    case r:                                                                                                           \
        p += (staged ? FN(FB_CAT(staged_, r)) : FN(FB_CAT(direct_, r)))(g, a, i, p, g->skip ? range[t] : whole,        \
                                                                        &fetch);                                      \
        break;
                    FB_TILE_CASES(FB_TILE_CASE)
#undef FB_TILE_CASE
                }
            }
        }
    }
}

/* A copy of A that few panels read is not worth its time, though the tile then needs more registers for the rows. */
static void FN(product)(const fb_product *g)
{
    if (FB_DIRECT_PANELS && g->a_row != FB_ROW && g->cols <= FB_DIRECT_PANELS * PANEL)
        FN(product_of)(g, 0);
    else
        FN(product_of)(g, 1);
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
