/* fb_matmul.c - the loops around the matmul kernels, and the operations that are one matrix product each.
 *
 * Loops are numbered as in the BLIS papers: 5 columns of C, 4 blocks of 256 k, 3 rows of C; the kernel holds 2 (panels)
 * and 1 (row tiles). Outermost is loop 3, in the callers: it stages a tile of rows of A. A block of k is a block of the
 * chain, so the order of the loops cannot be seen in the result.
 */
#include "fb_kernels.h"

#include <string.h>

/* With few rows the weights have to be read anyway, and the dense tile reads them in order (AVX2, 6 x 768 -> 3072: at half
 * zeros lists take 1.14 times as long, at 90 % 0.95; 8 rows: 0.98 and 0.96). Up to 3 rows read only what they need, more rows
 * read it from L1. */
static double dense_from(const struct fb_kernels *k, ptrdiff_t rows)
{
    return rows > 3 && rows <= k->few_rows ? k->dense_few : k->dense_from;
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
    MIX_BYTES = 800 << 10, /* of X packed at a time, all its positions for some columns, up to these; they stay in L2 */
    MIX_DEPTH = 2048,
    MIX_COLUMNS = 1024
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

fb_left fb_stage(const struct fb_kernels *k, const void *a, ptrdiff_t a_row, ptrdiff_t rows, const fb_panels *b,
                 ptrdiff_t cols, void *stage)
{
    fb_left left = {a, a_row, 0};
    if (b->k > FB_BLOCK || cols > k->direct) {
        for (ptrdiff_t k0 = 0; k0 < b->k; k0 += FB_BLOCK)
            k->copy(fb_at(a, k0, k->size), a_row, rows, fb_min(FB_BLOCK, b->k - k0),
                    fb_at(stage, k0 / FB_BLOCK * rows * FB_ROW, k->size), FB_ROW);
        left = (fb_left){stage, FB_ROW, 0};
    }
    return fb_fit(k, left, rows, b, stage);
}

static double work_of(const fb_product *g)
{
    return (double)g->rows * (double)g->depth * (double)g->cols;
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
            if (fb_stop(work_of(&g)))
                return;
            g.a = fb_at(whole->a, k0 / FB_BLOCK * g.rows * FB_ROW, k->size);
            g.b = fb_at(b->data, k0 * padded + g.first_col * g.depth, k->size);
            g.first = k0 == 0;
            g.last = k0 + g.depth == b->k && ending != FB_SUMS;
            fb_product_fitted(k, &g, whole->shift + b->shift, whole->lowered);
            k0 += FB_BLOCK;
        } while (k0 < b->k);
    }
}

/* ---- a product that skips zeros of A */

fb_nonzeros fb_take_list(fb_arena *arena, const struct fb_kernels *k, ptrdiff_t rows, ptrdiff_t cols, int in_place)
{
    return (fb_nonzeros){
        .value = in_place ? NULL : fb_take(arena, rows * FB_ROW * k->size),
        .offset = fb_take(arena, rows * FB_ROW * 2),
        .count = fb_take(arena, rows * FB_BLOCK / FB_SLICE * 2),
        .sums = fb_take(arena, fb_max(rows * FB_SUMS_BYTES, cols * k->size)),
    };
}

void fb_product_skipping(const struct fb_kernels *k, fb_product *g, int finite, fb_nonzeros list)
{
    g->stage = list.value;
    /* Look at every fourth tile of 6 rows, not at the data's meaning. A tile costs its span, a row its nonzeros. */
    enum { TILE = 6, EVERY = 4 };
    ptrdiff_t seen = 0, spans = 0, nonzeros = 0;
    if (fb_stop(work_of(g)))
        return;
    if (!finite || work_of(g) < SKIP_WORK) {
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
    if (!by_rows && (double)nonzeros > dense_from(k, g->rows) * (double)spans) {
        g->skip = spans < seen;
        k->product(g);
        return;
    }
    list.value = list.value ? list.value : (void *)g->a;
    list.slice = by_rows || g->rows <= 3 || density < 0.125 ? FB_BLOCK : FB_SLICE;
    k->compress(g->a, g->a_row, g->rows, g->depth, &list);
    (by_rows ? k->product_rows : k->product_sparse)(g, &list);
}

/* ---- up_project, down_project */

typedef struct project_job {
    const fb_projection *p;
    ptrdiff_t tile; /* one tile size for all parts: fewer rows may mean larger even tiles */
    int totals, by_columns;
} project_job;

static ptrdiff_t project_part(const void *job, fb_arena arena, int part, int parts)
{
    const project_job *t = job;
    const fb_projection *p = t->p;
    const fb_panels *w = p->w;
    const ptrdiff_t size = p->k->size;
    void *stage = fb_take(&arena, fb_stage_bytes(p->k, t->tile, w->k));
    void *totals = t->totals ? fb_take(&arena, t->tile * FB_ROW * size) : NULL;
    void *lowered = fb_take(&arena, fb_lowered_bytes(p->k, w));
    ptrdiff_t i = 0, end = p->rows, first = 0, cols = w->n;
    if (!arena.memory)
        return arena.used;
    if (t->by_columns) {
        fb_columns_of(p->k, w->n, part, parts, &first, &cols);
    } else {
        i = p->rows * part / parts;
        end = p->rows * (part + 1) / parts;
    }
    for (ptrdiff_t rows; i < end; i += rows) { /* loop 3 */
        rows = fb_min(t->tile, end - i);
        const fb_left x = fb_stage(p->k, fb_at(p->x, i * w->k, size), w->k, rows, w, cols, stage);
        fb_matmul(p->k, &(fb_product){
            .a = x.at,
            .a_row = x.row,
            .bias = p->bias ? fb_at(p->bias, first, size) : NULL,
            .c = fb_at(p->out, i * w->n + first, size),
            .c_row = w->n,
            .t = totals,
            .rows = rows,
            .cols = cols,
            .shift = x.shift,
            .lowered = lowered,
            .first_col = first,
        }, w, p->ending);
    }
    return arena.used;
}

ptrdiff_t fb_project_rows(const void *projection, fb_arena arena)
{
    const fb_projection *p = projection;
    const struct fb_kernels *k = p->k;
    const fb_panels *w = p->w;
    if (w->n == 0 || p->rows == 0)
        return arena.used;
    const double work = (double)p->rows * (double)w->n * (double)w->k;
    const int threads = fb_threads(arena, work, fb_max(p->rows, w->n / k->panel));
    project_job t = {.p = p};
    /* Several blocks of k and long rows of C: totals in C would share few cache sets (up_project 128 x 768 -> 3072:
     * 85 % of the FMA peak with the totals in C). */
    t.totals = w->k > FB_BLOCK && w->n > COLUMNS && p->rows > 16;
    t.by_columns = p->rows < FB_FEW_ROWS * threads;
    /* each part stages its rows: all of them, if it has columns */
    const int parts = fb_parts(threads, work, t.by_columns ? w->n / COLUMNS : p->rows / FB_PART_ROWS);
    t.tile = fb_stage_rows(k, t.by_columns ? p->rows : (p->rows + parts - 1) / parts, w->k);
    return fb_run(project_part, &t, threads, parts, arena);
}

fb_status fb_project(fb_dtype dtype, const void *x, ptrdiff_t rows, const fb_panels *w, const void *bias, int relu,
                     void *out)
{
    return fb_call(fb_project_rows, &(fb_projection){
        .k = fb_kernels_in_use(dtype), .x = x, .rows = rows, .w = w, .bias = bias, .ending = relu ? FB_RELU : FB_FINISH, .out = out,
    });
}

/* ---- mix_positions */

/* Row i of a product whose block of B has something that is not finite, and that may see only the keys up to i: its own
 * terms only, for a zero weight would not hide the others. */
static void product_causal(const struct fb_kernels *k, const fb_product *whole, ptrdiff_t seen)
{
    fb_product g = *whole;
    g.rows = 1;
    for (ptrdiff_t i = 0; i < whole->rows; i++, seen++) {
        if (fb_stop(work_of(&g)))
            return;
        g.unseen = fb_max(0, g.depth - fb_max(0, seen));
        k->product(&g);
        g.a = fb_at(g.a, g.a_row, k->size);
        g.c = g.t = fb_at(g.c, g.c_row, k->size);
    }
}

static ptrdiff_t mix_columns(const struct fb_kernels *k, ptrdiff_t positions, ptrdiff_t features)
{
    if (features * fb_min(MIX_DEPTH, positions) <= MIX_BYTES / 8 && features <= MIX_COLUMNS)
        return fb_round_up(features, k->panel);
    const ptrdiff_t fit = MIX_BYTES / (fb_min(MIX_DEPTH, positions) * k->size);
    return fb_round_up(fb_even(features, fb_max(4 * k->panel, fb_min(MIX_COLUMNS, fit))), k->panel);
}

ptrdiff_t fb_mix_rows(const struct fb_kernels *k, const fb_mixing *m, ptrdiff_t first_row, ptrdiff_t rows, void *out,
                      ptrdiff_t out_row, fb_arena arena)
{
    const ptrdiff_t size = k->size, positions = m->positions, features = m->features;
    const ptrdiff_t columns = mix_columns(k, positions, features);
    /* an out_row of whole panels has room for the columns beyond the last */
    const ptrdiff_t width = fb_min(fb_round_up(features, k->panel), out_row);
    void *packed = fb_take(&arena, fb_min(MIX_DEPTH, positions) * columns * size);
    const fb_nonzeros list = fb_take_list(&arena, k, fb_min(FB_ROWS, rows), 0, 0);
    if (!arena.memory)
        return arena.used;
    for (ptrdiff_t j = 0; j < features; j += columns)
        for (ptrdiff_t d = 0; d < positions; d += MIX_DEPTH) {
            const ptrdiff_t cols = fb_min(columns, features - j), end = fb_min(d + MIX_DEPTH, positions);
            fb_panels blocks[MIX_DEPTH / FB_BLOCK], *block = blocks;
            char *at = packed;
            for (ptrdiff_t k0 = d; k0 < end && !fb_stop(0); k0 += FB_BLOCK, block++) {
                *block = (fb_panels){.data = at, .n = cols, .k = fb_min(FB_BLOCK, end - k0)};
                fb_fp_forget_subnormals();
                block->finite = k->pack_rows(fb_at(m->x, k0 * features + j, size), features, block->k, cols,
                                             m->key_mask ? m->key_mask + k0 : NULL, at);
                if (block->finite && fb_fp_met_subnormals())
                    fb_look_at_panels(k, block);
                at += block->k * fb_round_up(cols, k->panel) * size;
            }
            for (ptrdiff_t i = 0; i < rows; i += FB_ROWS) {
                const ptrdiff_t end_row = fb_min(i + FB_ROWS, rows);
                block = blocks;
                for (ptrdiff_t k0 = d; k0 < end && !fb_stop(0); k0 += FB_BLOCK, block++) {
                    const ptrdiff_t row = (first_row + i) * positions;
                    fb_product g = {
                        .a = fb_at(m->weights, row + k0, size),
                        .a_row = positions,
                        .next_a = fb_at(m->weights, k0 + FB_BLOCK < end ? row + k0 + FB_BLOCK : row + FB_ROWS * positions + d, size),
                        .b = block->data,
                        .c = fb_at(out, i * out_row + j, size),
                        .c_row = out_row,
                        .t = fb_at(out, i * out_row + j, size),
                        .t_row = out_row,
                        .rows = end_row - i,
                        .cols = fb_min(columns, width - j),
                        .depth = block->k,
                        .stage = list.value,
                        .first = k0 == 0,
                        .last = k0 + FB_BLOCK >= positions,
                    };
                    if (m->causal && !block->finite) {
                        product_causal(k, &g, first_row + i + 1 - k0);
                    } else {
                        const fb_left left = fb_fit_both(k, (fb_left){g.a, positions, 0}, g.rows, block, list.value);
                        fb_nonzeros own = list;
                        if (left.at == list.value)
                            own.value = NULL;
                        g.a = left.at;
                        g.a_row = left.row;
                        fb_product_skipping(k, &g, block->finite, own);
                    }
                }
            }
        }
    return arena.used;
}

typedef struct mix_job {
    const struct fb_kernels *k;
    const void *weights, *x;
    void *out;
    ptrdiff_t batch, weights_batch, x_batch, positions, features;
} mix_job;

typedef struct mix_plan {
    const mix_job *job;
    ptrdiff_t unit; /* rows that stay together: those of a batch item where there are enough of them */
} mix_plan;

/* All rows of the batch in one line, cut evenly. */
static ptrdiff_t mix_part(const void *plan, fb_arena arena, int part, int parts)
{
    const mix_job *t = ((const mix_plan *)plan)->job;
    const ptrdiff_t unit = ((const mix_plan *)plan)->unit, units = t->batch * t->positions / unit, size = t->k->size;
    const ptrdiff_t end = units * (part + 1) / parts * unit;
    fb_mixing m = {.weights = t->weights, .x = t->x, .positions = t->positions, .features = t->features};
    if (!arena.memory)
        return fb_mix_rows(t->k, &m, 0, t->positions, NULL, t->features, arena);
    for (ptrdiff_t row = units * part / parts * unit, rows; row < end; row += rows) {
        const ptrdiff_t b = row / t->positions, i = row % t->positions;
        rows = fb_min(t->positions - i, end - row);
        m.weights = fb_at(t->weights, b * t->weights_batch, size);
        m.x = fb_at(t->x, b * t->x_batch, size);
        fb_mix_rows(t->k, &m, i, rows, fb_at(t->out, row * t->features, size), t->features, arena);
    }
    return arena.used;
}

static ptrdiff_t mix_all(const void *job, fb_arena arena)
{
    const mix_job *t = job;
    if (t->batch == 0 || t->positions == 0 || t->features == 0)
        return arena.used;
    const double work = (double)t->batch * (double)t->positions * (double)t->positions * (double)t->features;
    const int threads = fb_threads(arena, work, t->batch * t->positions);
    const mix_plan plan = {.job = t, .unit = t->batch < 2 * threads ? 1 : t->positions};
    const ptrdiff_t limit = plan.unit > 1 ? t->batch : t->batch * t->positions / FB_PART_ROWS;
    return fb_run(mix_part, &plan, threads, fb_parts(threads, work, limit), arena);
}

fb_status fb_mix_positions(fb_dtype dtype, ptrdiff_t batch, const void *weights, ptrdiff_t weights_batch, const void *x,
                           ptrdiff_t x_batch, void *out, ptrdiff_t positions, ptrdiff_t features)
{
    return fb_call(mix_all, &(mix_job){
        .k = fb_kernels_in_use(dtype), .weights = weights, .x = x, .out = out, .batch = batch, .weights_batch = weights_batch,
        .x_batch = x_batch, .positions = positions, .features = features,
    });
}

typedef struct bias_job {
    const struct fb_kernels *k;
    const void *x, *bias;
    void *out;
    ptrdiff_t rows, hidden;
} bias_job;

static ptrdiff_t bias_all(const void *job, fb_arena arena)
{
    const bias_job *t = job;
    const ptrdiff_t size = t->k->size, some = fb_max(1, FB_STAGE_BYTES / fb_max(1, t->hidden * size));
    if (!arena.memory || t->hidden == 0)
        return arena.used;
    for (ptrdiff_t i = 0; i < t->rows && !fb_stop((double)some * (double)t->hidden); i += some)
        t->k->bias_relu(fb_at(t->x, i * t->hidden, size), t->bias, fb_at(t->out, i * t->hidden, size),
                        fb_min(some, t->rows - i), t->hidden);
    return arena.used;
}

fb_status fb_bias_relu(fb_dtype dtype, const void *x, const void *bias, void *out, ptrdiff_t rows, ptrdiff_t hidden)
{
    return fb_call(bias_all, &(bias_job){
        .k = fb_kernels_in_use(dtype), .x = x, .bias = bias, .out = out, .rows = rows, .hidden = hidden,
    });
}
