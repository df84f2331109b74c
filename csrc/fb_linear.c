/* fb_linear.c - y = x W^T + b: the loops around the matrix product, and the operations that are one such product each.
 *
 * Loops are numbered as in the BLIS papers: 5 columns of C, 4 blocks of 256 k, 3 rows of C; the kernel holds 2 (panels)
 * and 1 (row tiles). Outermost is loop 3, in the callers: it stages a tile of rows of A. A block of k is a block of the
 * chain, so the order of the loops cannot be seen in the result.
 */
#include "fb_internal.h"

enum {
    FEWEST_ROWS = 12,  /* staged at a time, however long they are */
    COLUMNS = 256,     /* columns of C per pass over A: their part of C stays in L2 from one block of k to the next */
};

static ptrdiff_t row_bytes(const fb_tier *tier, ptrdiff_t depth)
{
    return fb_max(1, (depth + FB_CHAIN - 1) / FB_CHAIN) * FB_ROW * tier->size;
}

ptrdiff_t fb_stage_rows(const fb_tier *tier, ptrdiff_t rows, ptrdiff_t depth)
{
    return fb_even(rows, fb_max(FEWEST_ROWS, fb_min(FB_ROWS, FB_STAGE_BYTES / row_bytes(tier, depth))));
}

ptrdiff_t fb_stage_bytes(const fb_tier *tier, ptrdiff_t rows, ptrdiff_t depth)
{
    return rows * row_bytes(tier, depth);
}

fb_left fb_stage(const fb_tier *tier, const void *a, ptrdiff_t a_row, ptrdiff_t rows, const fb_panels *b,
                 ptrdiff_t cols, void *stage)
{
    fb_left left = {a, a_row, 0};
    if (b->k > FB_CHAIN || cols > tier->direct) {
        for (ptrdiff_t k0 = 0; k0 < b->k; k0 += FB_CHAIN)
            tier->copy(fb_at(a, k0, tier->size), a_row, rows, fb_min(FB_CHAIN, b->k - k0),
                    fb_at(stage, k0 / FB_CHAIN * rows * FB_ROW, tier->size), FB_ROW);
        left = (fb_left){stage, FB_ROW, 0};
    }
    return fb_fit(tier, left, rows, b, stage);
}

void fb_matmul(const fb_tier *tier, const fb_product *whole, const fb_panels *b, fb_ending ending)
{
    const ptrdiff_t padded = fb_round_up(b->n, tier->panel);
    for (ptrdiff_t j = 0; j < whole->cols; j += COLUMNS) { /* loop 5 */
        fb_product g = *whole;
        g.bias = whole->bias ? fb_at(whole->bias, j, tier->size) : NULL;
        g.c = fb_at(whole->c, j, tier->size);
        g.t = whole->t ? whole->t : g.c;
        g.t_row = whole->t ? FB_ROW : g.c_row;
        g.cols = fb_min(COLUMNS, whole->cols - j);
        g.first_col += j;
        g.relu = ending == FB_RELU;
        ptrdiff_t k0 = 0;
        do { /* loop 4: one block at least, so that an empty sum is +0.0 */
            g.depth = fb_min(FB_CHAIN, b->k - k0);
            if (fb_stop(fb_work_of(&g)))
                return;
            g.a = fb_at(whole->a, k0 / FB_CHAIN * g.rows * FB_ROW, tier->size);
            g.b = fb_at(b->data, k0 * padded + g.first_col * g.depth, tier->size);
            g.first = k0 == 0;
            g.last = k0 + g.depth == b->k && ending != FB_SUMS;
            fb_product_fitted(tier, &g, whole->shift + b->shift, whole->lowered);
            k0 += FB_CHAIN;
        } while (k0 < b->k);
    }
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
    const ptrdiff_t size = p->tier->size;
    void *stage = fb_take(&arena, fb_stage_bytes(p->tier, t->tile, w->k));
    void *totals = t->totals ? fb_take(&arena, t->tile * FB_ROW * size) : NULL;
    void *lowered = fb_take(&arena, fb_lowered_bytes(p->tier, w));
    ptrdiff_t i = 0, end = p->rows, first = 0, cols = w->n;
    if (!arena.memory)
        return arena.used;
    if (t->by_columns) {
        fb_columns_of(p->tier, w->n, part, parts, &first, &cols);
    } else {
        i = p->rows * part / parts;
        end = p->rows * (part + 1) / parts;
    }
    for (ptrdiff_t rows; i < end; i += rows) { /* loop 3 */
        rows = fb_min(t->tile, end - i);
        const fb_left x = fb_stage(p->tier, fb_at(p->x, i * w->k, size), w->k, rows, w, cols, stage);
        fb_matmul(p->tier, &(fb_product){
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
    const fb_tier *tier = p->tier;
    const fb_panels *w = p->w;
    if (w->n == 0 || p->rows == 0)
        return arena.used;
    const double work = (double)p->rows * (double)w->n * (double)w->k;
    const int threads = fb_threads(arena, work, fb_max(p->rows, w->n / tier->panel));
    project_job t = {.p = p};
    /* Several blocks of k and long rows of C: totals in C would share few cache sets. */
    t.totals = w->k > FB_CHAIN && w->n > COLUMNS && p->rows > 16;
    t.by_columns = p->rows < FB_FEW_ROWS * threads;
    /* each part stages its rows: all of them, if it has columns */
    const int parts = fb_parts(threads, work, t.by_columns ? w->n / COLUMNS : p->rows / FB_PART_ROWS);
    t.tile = fb_stage_rows(tier, t.by_columns ? p->rows : (p->rows + parts - 1) / parts, w->k);
    return fb_run(project_part, &t, threads, parts, arena);
}

fb_status fb_project(fb_dtype dtype, const void *x, ptrdiff_t rows, const fb_panels *w, const void *bias, int relu,
                     void *out)
{
    return fb_call(fb_project_rows, &(fb_projection){
        .tier = fb_tier_in_use(dtype), .x = x, .rows = rows, .w = w, .bias = bias,
        .ending = relu ? FB_RELU : FB_FINISH, .out = out,
    });
}

typedef struct bias_job {
    const fb_tier *tier;
    const void *x, *bias;
    void *out;
    ptrdiff_t rows, hidden;
} bias_job;

static ptrdiff_t bias_all(const void *job, fb_arena arena)
{
    const bias_job *t = job;
    const ptrdiff_t size = t->tier->size, some = fb_max(1, FB_STAGE_BYTES / fb_max(1, t->hidden * size));
    if (!arena.memory || t->hidden == 0)
        return arena.used;
    for (ptrdiff_t i = 0; i < t->rows && !fb_stop((double)some * (double)t->hidden); i += some)
        t->tier->bias_relu(fb_at(t->x, i * t->hidden, size), t->bias, fb_at(t->out, i * t->hidden, size),
                        fb_min(some, t->rows - i), t->hidden);
    return arena.used;
}

fb_status fb_bias_relu(fb_dtype dtype, const void *x, const void *bias, void *out, ptrdiff_t rows, ptrdiff_t hidden)
{
    return fb_call(bias_all, &(bias_job){
        .tier = fb_tier_in_use(dtype), .x = x, .bias = bias, .out = out, .rows = rows, .hidden = hidden,
    });
}
