/* fb_matmul.c - the loops around the matmul kernels, and the operations that are one matrix product each.
 *
 * Loops are numbered as in the BLIS papers: 5 columns of C, 4 blocks of 256 k, 3 rows of C; the kernel holds 2 (panels)
 * and 1 (row tiles). Outermost is loop 3, in the callers: it stages a tile of rows of A. A block of k is a block of the
 * chain, so the order of the loops cannot be seen in the result.
 */
#include "fb_kernels.h"

#include <string.h>

/* Nonzeros in the span of a tile from which on the dense tile is faster. With 4 to 7 rows the weights have to be read
 * anyway, and the dense tile reads them in order (6 x 768 -> 3072: at half zeros lists take 1.14 times as long, at 90 %
 * 0.95; 8 rows: 0.98 and 0.96). Fewer rows read only what they need, more rows read it from L1. */
static double dense_from(ptrdiff_t rows)
{
    return rows > 3 && rows < 8 ? 0.25 : 0.85;
}

/* Nonzeros that meet a row of B, on average, up to which whole rows of B are read, and nonzeros of one row of A, as a
 * share. 768 -> 3072: 11 rows at 90 % zeros 1.4 times as fast as by panels, 48 rows at 97 % 1.08, 24 rows at 90 % 1.1, 4
 * rows at half zeros the same, 48 rows at 90 % 0.95, 8 rows at half zeros 0.87; one row without zeros 0.95. */
static const double ROWS_MEET = 2, ROWS_DENSITY = 0.7;

/* Multiply-adds of a product below which looking for zeros costs more than it gives. */
static const double SKIP_WORK = 50000;

enum {
    FEWEST_ROWS = 12,  /* staged at a time, however long they are */
    COLUMNS = 256,     /* columns of C per pass over A: their part of C stays in L2 from one block of k to the next */
    MIX_COLUMNS = 1024 /* columns of X packed at a time: 256 x 1024 float are 1 MB */
};

static ptrdiff_t row_bytes(const struct fb_kernels *k, ptrdiff_t depth)
{
    return fb_max(1, (depth + FB_BLOCK - 1) / FB_BLOCK) * FB_ROW * k->size;
}

ptrdiff_t fb_stage_rows(const struct fb_kernels *k, ptrdiff_t rows, ptrdiff_t depth)
{
    return fb_even(rows, fb_max(FEWEST_ROWS, fb_min(FB_ROWS, FB_STAGE_BYTES / row_bytes(k, depth))));
}

ptrdiff_t fb_stage_bytes(const struct fb_kernels *k, ptrdiff_t rows, ptrdiff_t depth)
{
    return rows * row_bytes(k, depth);
}

fb_left fb_stage(const struct fb_kernels *k, const void *a, ptrdiff_t a_row, ptrdiff_t rows, ptrdiff_t depth,
                 ptrdiff_t cols, void *stage)
{
    if (depth <= FB_BLOCK && cols <= k->direct)
        return (fb_left){a, a_row};
    for (ptrdiff_t k0 = 0; k0 < depth; k0 += FB_BLOCK)
        k->copy(fb_at(a, k0, k->size), a_row, rows, fb_min(FB_BLOCK, depth - k0),
                fb_at(stage, k0 / FB_BLOCK * rows * FB_ROW, k->size), FB_ROW);
    return (fb_left){stage, FB_ROW};
}

void fb_matmul(const struct fb_kernels *k, const fb_product *whole, const fb_panels *b, fb_ending ending)
{
    const ptrdiff_t padded = fb_round_up(b->n, k->panel);
    for (ptrdiff_t j = 0; j < whole->cols; j += COLUMNS) { /* loop 5 */
        fb_product g = *whole;
        g.bias = whole->bias ? fb_at(whole->bias, j, k->size) : NULL;
        g.c = fb_at(whole->c, j, k->size);
        g.t = whole->t ? whole->t : g.c;
        g.t_row = whole->t ? FB_ROW : g.c_row;
        g.cols = fb_min(COLUMNS, whole->cols - j);
        g.first_col += j;
        g.relu = ending == FB_RELU;
        ptrdiff_t k0 = 0;
        do { /* loop 4: one block at least, so that an empty sum is +0.0 */
            g.depth = fb_min(FB_BLOCK, b->k - k0);
            g.a = fb_at(whole->a, k0 / FB_BLOCK * g.rows * FB_ROW, k->size);
            g.b = fb_at(b->data, k0 * padded + g.first_col * g.depth, k->size);
            g.first = k0 == 0;
            g.last = k0 + g.depth == b->k && ending != FB_SUMS;
            k->product(&g);
            k0 += FB_BLOCK;
        } while (k0 < b->k);
    }
}

/* ---- a product that skips zeros of A */

ptrdiff_t fb_skip_workspace(const struct fb_kernels *k, ptrdiff_t rows, ptrdiff_t cols, int in_place)
{
    const ptrdiff_t value = in_place ? 0 : rows * FB_ROW * k->size, offset = rows * FB_ROW * 2;
    const ptrdiff_t count = rows * FB_BLOCK / FB_SLICE * 2;
    return value + fb_round_up(offset, 64) + fb_round_up(count, 64)
           + fb_max(rows * FB_SUMS_BYTES, fb_round_up(cols * k->size, FB_PANEL_BYTES));
}

void fb_product_skipping(const struct fb_kernels *k, fb_product *g, int finite, int in_place, void *workspace)
{
    g->stage = workspace;
    /* Look at every fourth tile of 6 rows, not at the data's meaning. A tile costs its span, a row its nonzeros. */
    enum { TILE = 6, EVERY = 4 };
    ptrdiff_t seen = 0, spans = 0, nonzeros = 0;
    if (!finite || (double)g->rows * (double)g->depth * (double)g->cols < SKIP_WORK) {
        k->product(g);
        return;
    }
    for (ptrdiff_t i = 0; i < g->rows; i += TILE * EVERY) {
        ptrdiff_t span, n;
        k->sample(fb_at(g->a, i * g->a_row, k->size), g->a_row, fb_min(TILE, g->rows - i), g->depth, &span, &n);
        seen += g->depth;
        spans += span;
        nonzeros += n;
    }
    const double density = (double)nonzeros / (double)seen;
    const int by_rows = g->b_rows && density < ROWS_DENSITY && density * (double)g->rows < ROWS_MEET;
    if (!by_rows && (double)nonzeros > dense_from(g->rows) * (double)spans) {
        g->skip = spans < seen;
        k->product(g);
        return;
    }
    char *at = workspace;
    fb_nonzeros list = {.value = (void *)g->a, .slice = by_rows || g->rows <= 3 || density < 0.125 ? FB_BLOCK : FB_SLICE};
    if (!in_place) {
        list.value = at;
        at += g->rows * FB_ROW * k->size;
    }
    list.offset = (void *)at;
    at += fb_round_up(g->rows * FB_ROW * 2, 64);
    list.count = (void *)at;
    at += fb_round_up(g->rows * FB_BLOCK / FB_SLICE * 2, 64);
    list.sums = at;
    k->compress(g->a, g->a_row, g->rows, g->depth, &list);
    (by_rows ? k->product_rows : k->product_sparse)(g, &list);
}

/* ---- up_project, down_project */

typedef struct project_task {
    const struct fb_kernels *k;
    const void *x, *bias;
    const fb_panels *w;
    void *out;
    char *workspace; /* of each thread: a stage, and totals if they have a place of their own */
    ptrdiff_t workspace_bytes, stage_bytes, tile; /* one tile size for all parts: fewer rows may mean larger even tiles */
    ptrdiff_t rows;
    fb_ending ending;
    int totals, by_columns;
} project_task;

static void project_part(void *context, int thread, int part, int parts)
{
    const project_task *t = context;
    const fb_panels *w = t->w;
    const ptrdiff_t size = t->k->size;
    char *stage = t->workspace + thread * t->workspace_bytes, *totals = t->totals ? stage + t->stage_bytes : NULL;
    ptrdiff_t i = 0, end = t->rows, first = 0, cols = w->n;
    if (t->by_columns) {
        fb_columns_of(t->k, w->n, part, parts, &first, &cols);
    } else {
        i = t->rows * part / parts;
        end = t->rows * (part + 1) / parts;
    }
    for (ptrdiff_t rows; i < end; i += rows) { /* loop 3 */
        rows = fb_min(t->tile, end - i);
        const fb_left x = fb_stage(t->k, fb_at(t->x, i * w->k, size), w->k, rows, w->k, cols, stage);
        fb_matmul(t->k, &(fb_product){
            .a = x.at,
            .a_row = x.row,
            .bias = t->bias ? fb_at(t->bias, first, size) : NULL,
            .c = fb_at(t->out, i * w->n + first, size),
            .c_row = w->n,
            .t = totals,
            .rows = rows,
            .cols = cols,
            .first_col = first,
        }, w, t->ending);
    }
}

fb_status fb_project_rows(const struct fb_kernels *k, const void *x, ptrdiff_t rows, const fb_panels *w,
                          const void *bias, fb_ending ending, void *out)
{
    if (w->n == 0)
        return FB_OK;
    project_task t = {.k = k, .x = x, .bias = bias, .w = w, .out = out, .rows = rows, .ending = ending};
    const double work = (double)rows * (double)w->n * (double)w->k;
    const int threads = fb_threads(work, fb_max(rows, w->n / k->panel));
    /* Several blocks of k and long rows of C: totals in C would share few cache sets (up_project 128 x 768 -> 3072:
     * 85 % of the FMA peak with the totals in C). */
    t.totals = w->k > FB_BLOCK && w->n > COLUMNS && rows > 16;
    t.by_columns = rows < FB_FEW_ROWS * threads;
    /* each part stages its rows: all of them, if it has columns */
    const int parts = fb_parts(threads, work, t.by_columns ? w->n / COLUMNS : rows / FB_PART_ROWS);
    const ptrdiff_t tile = t.tile = fb_stage_rows(k, t.by_columns ? rows : (rows + parts - 1) / parts, w->k);
    FB_SCRATCH(stack);
    t.stage_bytes = fb_round_up(fb_stage_bytes(k, tile, w->k), 64);
    t.workspace_bytes = t.stage_bytes + (t.totals ? tile * FB_ROW * k->size : 0);
    if (!(t.workspace = fb_workspace(stack, threads, t.workspace_bytes)))
        return FB_NO_MEMORY;
    fb_parallel(project_part, &t, threads, parts);
    fb_workspace_free(stack, t.workspace);
    return FB_OK;
}

fb_status fb_project(fb_dtype dtype, const void *x, ptrdiff_t rows, const fb_panels *w, const void *bias, int relu,
                     void *out)
{
    fb_fp_mode mode = fb_fp_enter();
    fb_status status = fb_project_rows(fb_kernels_in_use(dtype), x, rows, w, bias, relu ? FB_RELU : FB_FINISH, out);
    fb_fp_leave(mode);
    return status;
}

/* ---- mix_positions */

ptrdiff_t fb_mix_workspace(const struct fb_kernels *k, ptrdiff_t rows, ptrdiff_t positions, ptrdiff_t features)
{
    const ptrdiff_t cols = fb_round_up(fb_min(MIX_COLUMNS, features), k->panel);
    return fb_min(FB_BLOCK, positions) * cols * k->size + fb_skip_workspace(k, fb_min(FB_ROWS, rows), 0, 0);
}

void fb_mix_rows(const struct fb_kernels *k, const void *weights, ptrdiff_t weights_row, ptrdiff_t rows, const void *x,
                 ptrdiff_t positions, ptrdiff_t features, void *out, ptrdiff_t out_row, void *workspace)
{
    const ptrdiff_t size = k->size, packed = fb_mix_workspace(k, 0, positions, features);
    /* an out_row of whole panels has room for the columns beyond the last */
    const ptrdiff_t width = fb_min(fb_round_up(features, k->panel), out_row);
    for (ptrdiff_t j = 0; j < features; j += MIX_COLUMNS) {
        const ptrdiff_t cols = fb_min(MIX_COLUMNS, features - j);
        for (ptrdiff_t k0 = 0; k0 < positions; k0 += FB_BLOCK) {
            fb_product g = {
                .a = fb_at(weights, k0, size),
                .a_row = weights_row,
                .c = fb_at(out, j, size),
                .c_row = out_row,
                .t = fb_at(out, j, size),
                .t_row = out_row,
                .rows = rows,
                .cols = fb_min(MIX_COLUMNS, width - j),
                .depth = fb_min(FB_BLOCK, positions - k0),
                .first = k0 == 0,
                .last = k0 + FB_BLOCK >= positions,
            };
            g.b = workspace;
            const int finite = k->pack_rows(fb_at(x, k0 * features + j, size), features, g.depth, cols, workspace);
            for (ptrdiff_t i = 0; i < rows; i += FB_ROWS) {
                g.rows = fb_min(FB_ROWS, rows - i);
                fb_product_skipping(k, &g, finite, 0, (char *)workspace + packed);
                g.a = fb_at(g.a, FB_ROWS * weights_row, size);
                g.c = g.t = fb_at(g.c, FB_ROWS * out_row, size);
            }
        }
    }
}

typedef struct mix_task {
    const struct fb_kernels *k;
    const void *weights, *x;
    void *out;
    ptrdiff_t batch, weights_batch, x_batch, positions, features;
    char *workspace;
    ptrdiff_t workspace_bytes;
    ptrdiff_t unit; /* rows that stay together: those of a batch item where there are enough of them */
} mix_task;

/* All rows of the batch in one line, cut evenly. */
static void mix_part(void *context, int thread, int part, int parts)
{
    const mix_task *t = context;
    const ptrdiff_t units = t->batch * t->positions / t->unit, end = units * (part + 1) / parts * t->unit, size = t->k->size;
    ptrdiff_t row = units * part / parts * t->unit, rows;
    for (; row < end; row += rows) {
        const ptrdiff_t b = row / t->positions, i = row % t->positions;
        rows = fb_min(t->positions - i, end - row);
        fb_mix_rows(t->k, fb_at(t->weights, b * t->weights_batch + i * t->positions, size), t->positions, rows,
                    fb_at(t->x, b * t->x_batch, size), t->positions, t->features,
                    fb_at(t->out, row * t->features, size), t->features, t->workspace + thread * t->workspace_bytes);
    }
}

fb_status fb_mix_positions(fb_dtype dtype, ptrdiff_t batch, const void *weights, ptrdiff_t weights_batch, const void *x,
                           ptrdiff_t x_batch, void *out, ptrdiff_t positions, ptrdiff_t features)
{
    if (batch == 0 || positions == 0 || features == 0)
        return FB_OK;
    const struct fb_kernels *k = fb_kernels_in_use(dtype);
    const double work = (double)batch * (double)positions * (double)positions * (double)features;
    const int threads = fb_threads(work, batch * positions);
    mix_task t = {.k = k, .weights = weights, .x = x, .out = out, .batch = batch, .weights_batch = weights_batch,
                  .x_batch = x_batch, .positions = positions, .features = features};
    t.unit = batch < 2 * threads ? 1 : positions;
    FB_SCRATCH(stack);
    t.workspace_bytes = fb_round_up(fb_mix_workspace(k, positions, positions, features), 64);
    if (!(t.workspace = fb_workspace(stack, threads, t.workspace_bytes)))
        return FB_NO_MEMORY;
    fb_fp_mode mode = fb_fp_enter();
    fb_parallel(mix_part, &t, threads, fb_parts(threads, work, t.unit > 1 ? batch : batch * positions / FB_PART_ROWS));
    fb_fp_leave(mode);
    fb_workspace_free(stack, t.workspace);
    return FB_OK;
}

fb_status fb_bias_relu(fb_dtype dtype, const void *x, const void *bias, void *out, ptrdiff_t rows, ptrdiff_t hidden)
{
    if (hidden == 0)
        return FB_OK;
    fb_fp_mode mode = fb_fp_enter();
    fb_kernels_in_use(dtype)->bias_relu(x, bias, out, rows, hidden);
    fb_fp_leave(mode);
    return FB_OK;
}
