/* fb_block.c - the block, line for line reference.block: attention weights, mixing, feed-forward.
 *
 * The mixed positions exist one tile at a time, like the hidden activations; attention weights of the block's own
 * exist for as many batch items as fit into OWN_WEIGHTS bytes, one at least. A block of a few numbers takes a way of
 * its own, because laying them out for the large kernels takes several times as long as to compute them.
 */
#include "fb_kernels.h"

enum { OWN_WEIGHTS = 16 << 20, SMALL_POSITIONS = 32 };

typedef struct block_task {
    const struct fb_kernels *k;
    const fb_params *params;
    const void *x, *weights;
    ptrdiff_t batch, x_batch, weights_batch, positions, z_row;
    char *out, *workspace;
    ptrdiff_t workspace_bytes, tile, stage_bytes; /* the workspace of each thread */
} block_task;

/* z (n x D, z_row apart) = mixed positions row .. row + n of one batch item */
static void mix(const block_task *t, ptrdiff_t row, ptrdiff_t n, void *z, void *workspace)
{
    const ptrdiff_t b = row / t->positions, i = row % t->positions, size = t->k->size;
    fb_mix_rows(t->k, fb_at(t->weights, b * t->weights_batch + i * t->positions, size), t->positions, n,
                fb_at(t->x, b * t->x_batch, size), t->positions, t->params->w1.k, z, t->z_row, workspace);
}

/* All rows of the batch in one line, cut evenly, in tiles that do not cross from one batch item to the next. */
static void rows_part(void *context, int thread, int part, int parts)
{
    const block_task *t = context;
    const ptrdiff_t total = t->batch * t->positions, end = total * (part + 1) / parts, features = t->params->w1.k;
    char *stage = t->workspace + thread * t->workspace_bytes, *workspace = stage + t->stage_bytes;
    /* one block of features: mixed where it is wanted */
    char *z = features <= FB_BLOCK ? stage : workspace;
    workspace += z == stage ? 0 : fb_round_up(t->tile * t->z_row * t->k->size, 64);
    ptrdiff_t row = total * part / parts, n;
    for (; row < end; row += n) {
        n = fb_min(fb_min(t->tile, t->positions - row % t->positions), end - row);
        mix(t, row, n, z, workspace);
        const fb_left mixed = z == stage ? (fb_left){z, t->z_row}
                                         : fb_stage(t->k, z, t->z_row, n, features, t->params->w1.n, stage);
        fb_feed_forward_rows(t->k, t->params, mixed, n, fb_at(t->out, row * features, t->k->size), workspace);
    }
}

/* Features and hidden units that fit into a vector, a few positions: whole batch items. */
static void small_part(void *context, int thread, int part, int parts)
{
    (void)thread;
    const block_task *t = context;
    const struct fb_kernels *k = t->k;
    const fb_params *params = t->params;
    const ptrdiff_t positions = t->positions, features = params->w1.k, hidden = params->w1.n, end = t->batch * (part + 1) / parts;
    FB_ALIGNED(64) char z[SMALL_POSITIONS * FB_PANEL_BYTES];
    FB_ALIGNED(64) char h[SMALL_POSITIONS * FB_PANEL_BYTES];
    fb_product mixing = {.a_row = positions, .c = z, .c_row = k->lanes, .rows = positions, .cols = features, .depth = positions};
    const fb_product up = {.a = z, .a_row = k->lanes, .b = params->w1.data, .bias = params->b1, .c = h, .c_row = k->lanes,
                           .rows = positions, .cols = hidden, .depth = features, .relu = 1};
    fb_product down = {.a = h, .a_row = k->lanes, .b = params->w2.data, .bias = params->b2, .c_row = features,
                       .rows = positions, .cols = features, .depth = hidden};
    for (ptrdiff_t b = t->batch * part / parts; b < end; b++) {
        mixing.a = fb_at(t->weights, b * t->weights_batch, k->size);
        mixing.b = fb_at(t->x, b * t->x_batch, k->size);
        down.c = fb_at(t->out, b * positions * features, k->size);
        k->product_small(&mixing, features);
        k->product_small(&up, k->panel);
        k->product_small(&down, k->panel);
    }
}

/* The block with the weights in t. */
static fb_status mix_and_feed_forward(block_task *t)
{
    const struct fb_kernels *k = t->k;
    const fb_params *params = t->params;
    const ptrdiff_t features = params->w1.k, rows = t->batch * t->positions;
    const double work = (double)rows * (double)features * ((double)t->positions + 2.0 * (double)params->w1.n);
    if (t->positions <= SMALL_POSITIONS && fb_max(features, params->w1.n) <= k->lanes) {
        const int threads = fb_threads(work, t->batch);
        fb_parallel(small_part, t, threads, fb_parts(threads, work, t->batch));
        return FB_OK;
    }
    const int threads = fb_threads(work, fb_max(rows, params->w1.n / k->panel));
    const ptrdiff_t tile = t->tile = fb_stage_rows(k, t->positions, features);
    const ptrdiff_t mix_workspace = fb_mix_workspace(k, tile, t->positions, features);
    fb_status status = FB_OK;
    FB_SCRATCH(stack);
    t->z_row = features <= FB_BLOCK ? FB_ROW : fb_round_up(features, k->panel);
    if (threads > 1 && rows < FB_FEW_ROWS * threads) { /* few rows: all mixed positions, then a feed-forward by columns */
        char *z = fb_alloc(rows, t->z_row, k->size);
        void *workspace = fb_workspace(stack, 1, mix_workspace);
        if (z && workspace) {
            for (ptrdiff_t row = 0, n; row < rows; row += n) {
                n = fb_min(tile, t->positions - row % t->positions);
                mix(t, row, n, fb_at(z, row * t->z_row, k->size), workspace);
            }
            status = fb_feed_forward_all(k, params, z, t->z_row, rows, t->out);
        } else {
            status = FB_NO_MEMORY;
        }
        fb_free(z);
        fb_workspace_free(stack, workspace);
        return status;
    }
    t->stage_bytes = fb_round_up(fb_stage_bytes(k, tile, features), 64);
    t->workspace_bytes = t->stage_bytes + (features <= FB_BLOCK ? 0 : fb_round_up(tile * t->z_row * k->size, 64))
                        + fb_round_up(fb_max(mix_workspace, fb_feed_forward_workspace(k, params, tile)), 64);
    if (!(t->workspace = fb_workspace(stack, threads, t->workspace_bytes)))
        return FB_NO_MEMORY;
    fb_parallel(rows_part, t, threads, fb_parts(threads, work, rows / FB_PART_ROWS));
    fb_workspace_free(stack, t->workspace);
    return FB_OK;
}

fb_status fb_block(const fb_params *params, ptrdiff_t batch, const void *x, ptrdiff_t x_batch, ptrdiff_t positions,
                   const void *weights, ptrdiff_t weights_batch, int causal, const uint8_t *key_mask, void *out)
{
    const struct fb_kernels *k = fb_kernels_in_use(params->dtype);
    block_task t = {.k = k, .params = params, .x = x, .weights = weights, .batch = batch, .x_batch = x_batch,
                    .weights_batch = weights_batch, .positions = positions, .out = out};
    fb_status status = FB_OK;
    if (batch == 0 || positions == 0 || params->w1.k == 0) /* nothing to write */
        return FB_OK;
    fb_fp_mode mode = fb_fp_enter();
    if (weights) {
        status = mix_and_feed_forward(&t);
        fb_fp_leave(mode);
        return status;
    }
    const ptrdiff_t item = positions * positions * k->size;
    const ptrdiff_t step = fb_min(batch, fb_max(1, OWN_WEIGHTS / item));
    void *own = fb_alloc(step * positions, positions, k->size);
    status = own ? FB_OK : FB_NO_MEMORY;
    t.weights = own;
    t.weights_batch = positions * positions;
    for (ptrdiff_t b = 0; b < batch && status == FB_OK; b += step) {
        t.batch = fb_min(step, batch - b);
        t.x = fb_at(x, b * x_batch, k->size);
        t.out = fb_at(out, b * positions * params->w1.k, k->size);
        status = fb_attend(params, t.batch, t.x, positions, causal, key_mask ? key_mask + b * positions : NULL, own, 0);
        if (status == FB_OK)
            status = mix_and_feed_forward(&t);
    }
    fb_fp_leave(mode);
    fb_free(own);
    return status;
}
