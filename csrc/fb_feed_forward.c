/* fb_feed_forward.c - down_project(up_project(x)), fused: the hidden activations exist one tile at a time.
 *
 * A tile is at most FB_ROWS positions x 256 hidden units; 256 is the block of the chain, so each tile gives exactly
 * one block sum of the down-projection, which is added to the totals in out. The down-projection skips the units that
 * ReLU made zero. Many rows are cut among the threads; few rows are cut by columns, with all hidden activations of
 * these few rows (at most FEW_HIDDEN bytes a thread) between the two layers.
 */
#include "fb_kernels.h"

enum { FEW_HIDDEN = 1 << 20 };

typedef struct feed_forward {
    const struct fb_kernels *k;
    const fb_params *params;
    const void *x;
    ptrdiff_t x_row, rows;
    void *out;
    void *stage, *hidden; /* by columns: all of x, staged; all of the hidden activations, as staged */
    fb_left left;         /* by columns: all of x */
    char *workspace; /* of each thread */
    ptrdiff_t workspace_bytes, stage_bytes, tile; /* one tile size for all parts: fewer rows may mean larger even tiles */
} feed_forward;

/* h (rows x n, FB_ROW apart) = up_project of hidden units f .. f + n, and of the padding up to whole panels */
static void up(const feed_forward *t, fb_left x, ptrdiff_t rows, ptrdiff_t f, ptrdiff_t n, void *h)
{
    const void *b1 = t->params->b1;
    fb_matmul(t->k, &(fb_product){
        .a = x.at,
        .a_row = x.row,
        .bias = b1 ? fb_at(b1, f, t->k->size) : NULL,
        .c = h,
        .c_row = FB_ROW,
        .rows = rows,
        .cols = fb_round_up(n, t->k->panel),
        .first_col = f,
    }, &t->params->w1, FB_RELU);
}

/* columns first .. first + cols of out += the block sum of hidden units f .. f + depth; after the last, finish with b2 */
static void down(const feed_forward *t, void *h, ptrdiff_t rows, ptrdiff_t f, ptrdiff_t first, ptrdiff_t cols, void *out,
                 int in_place, void *workspace)
{
    const struct fb_kernels *k = t->k;
    const fb_panels *w2 = &t->params->w2;
    const ptrdiff_t depth = fb_min(FB_BLOCK, w2->k - f), padded = fb_round_up(w2->n, k->panel);
    fb_product_skipping(k, &(fb_product){
        .a = h,
        .a_row = FB_ROW,
        .b = fb_at(w2->data, f * padded + first * depth, k->size),
        .b_rows = w2->rows ? fb_at(w2->rows, f * padded + first, k->size) : NULL,
        .b_row = padded,
        .bias = t->params->b2 ? fb_at(t->params->b2, first, k->size) : NULL,
        .c = fb_at(out, first, k->size),
        .c_row = w2->n,
        .t = fb_at(out, first, k->size),
        .t_row = w2->n,
        .rows = rows,
        .cols = cols,
        .depth = depth,
        .first = f == 0,
        .last = f + depth == w2->k,
    }, w2->finite, in_place, workspace);
}

ptrdiff_t fb_feed_forward_workspace(const struct fb_kernels *k, const fb_params *params, ptrdiff_t rows)
{
    return rows * FB_ROW * k->size + fb_skip_workspace(k, rows, params->w2.n, 1);
}

void fb_feed_forward_rows(const struct fb_kernels *k, const fb_params *params, fb_left x, ptrdiff_t rows,
                          void *out, void *workspace)
{
    const feed_forward t = {.k = k, .params = params};
    ptrdiff_t f = 0;
    do { /* one tile at least: without hidden units out is the bias */
        up(&t, x, rows, f, fb_min(FB_BLOCK, params->w1.n - f), workspace);
        down(&t, workspace, rows, f, 0, params->w2.n, out, 1, fb_at(workspace, rows * FB_ROW, k->size));
        f += FB_BLOCK;
    } while (f < params->w1.n);
}

static void rows_part(void *context, int thread, int part, int parts)
{
    const feed_forward *t = context;
    const ptrdiff_t features = t->params->w1.k, size = t->k->size, end = t->rows * (part + 1) / parts;
    char *stage = t->workspace + thread * t->workspace_bytes;
    ptrdiff_t i = t->rows * part / parts;
    for (ptrdiff_t rows; i < end; i += rows) {
        rows = fb_min(t->tile, end - i);
        const fb_left x = fb_stage(t->k, fb_at(t->x, i * t->x_row, size), t->x_row, rows, features, t->params->w1.n, stage);
        fb_feed_forward_rows(t->k, t->params, x, rows, fb_at(t->out, i * features, size), stage + t->stage_bytes);
    }
}

static void up_part(void *context, int thread, int part, int parts)
{
    (void)thread;
    const feed_forward *t = context;
    ptrdiff_t f, n, step;
    fb_columns_of(t->k, t->params->w1.n, part, parts, &f, &n);
    for (const ptrdiff_t end = f + n; f < end; f += step) {
        step = fb_min(FB_BLOCK - f % FB_BLOCK, end - f);
        up(t, t->left, t->rows, f, step, fb_at(t->hidden, f / FB_BLOCK * t->rows * FB_ROW + f % FB_BLOCK, t->k->size));
    }
}

static void down_part(void *context, int thread, int part, int parts)
{
    const feed_forward *t = context;
    ptrdiff_t first, cols;
    fb_columns_of(t->k, t->params->w2.n, part, parts, &first, &cols);
    for (ptrdiff_t f = 0; f < t->params->w1.n; f += FB_BLOCK)
        down(t, fb_at(t->hidden, f * t->rows / FB_BLOCK * FB_ROW, t->k->size), t->rows, f, first, cols, t->out, 0,
             t->workspace + thread * t->workspace_bytes);
}

fb_status fb_feed_forward_all(const struct fb_kernels *k, const fb_params *params, const void *x, ptrdiff_t x_row,
                              ptrdiff_t rows, void *out)
{
    const ptrdiff_t hidden = params->w1.n, features = params->w1.k;
    if (features == 0)
        return FB_OK;
    const double work = 2.0 * (double)rows * (double)hidden * (double)features;
    const int threads = fb_threads(work, fb_max(rows, fb_min(hidden, features) / k->panel));
    feed_forward t = {.k = k, .params = params, .x = x, .x_row = x_row, .rows = rows, .out = out};
    FB_SCRATCH(stack);
    const ptrdiff_t blocks = (hidden + FB_BLOCK - 1) / FB_BLOCK;
    const int by_columns = threads > 1 && rows < FB_FEW_ROWS * threads && rows <= FB_ROWS
                           && rows * blocks * FB_ROW * k->size <= (ptrdiff_t)FEW_HIDDEN * threads;
    const int parts = fb_parts(threads, work, rows / FB_PART_ROWS);
    const ptrdiff_t tile = t.tile = fb_stage_rows(k, (rows + parts - 1) / parts, features);
    if (by_columns) {
        t.workspace_bytes = fb_round_up(fb_skip_workspace(k, rows, features, 0), 64);
        t.stage = fb_alloc(fb_stage_bytes(k, rows, features), 1, 1);
        t.hidden = fb_alloc(rows * blocks, FB_ROW, k->size);
    } else {
        t.stage_bytes = fb_round_up(fb_stage_bytes(k, tile, features), 64);
        t.workspace_bytes = fb_round_up(t.stage_bytes + fb_feed_forward_workspace(k, params, tile), 64);
    }
    fb_status status = FB_NO_MEMORY;
    t.workspace = fb_workspace(stack, threads, t.workspace_bytes);
    if (t.workspace && !by_columns) {
        fb_parallel(rows_part, &t, threads, parts);
        status = FB_OK;
    } else if (t.workspace && t.stage && t.hidden) {
        t.left = fb_stage(k, x, x_row, rows, features, hidden, t.stage);
        fb_parallel(up_part, &t, threads, fb_parts(threads, work / 2, hidden / k->panel));
        fb_parallel(down_part, &t, threads, threads);
        status = FB_OK;
    }
    fb_free(t.stage);
    fb_free(t.hidden);
    fb_workspace_free(stack, t.workspace);
    return status;
}

fb_status fb_feed_forward(const fb_params *params, const void *x, ptrdiff_t rows, void *out)
{
    fb_fp_mode mode = fb_fp_enter();
    fb_status status = fb_feed_forward_all(fb_kernels_in_use(params->dtype), params, x, params->w1.k, rows, out);
    fb_fp_leave(mode);
    return status;
}
