/* fb_feed_forward.c - down_project(up_project(x)), fused: the hidden activations exist one tile at a time.
 *
 * A tile is at most FB_ROWS positions x 256 hidden units; 256 is the block of the chain, so each tile gives exactly
 * one block sum of the down-projection, which is added to the totals in out. The down-projection skips the units that
 * ReLU made zero. Many rows are cut among the threads; few rows are cut by columns, with all hidden activations of
 * these few rows (at most FEW_HIDDEN bytes a thread) between the two layers.
 */
#include "fb_internal.h"

enum { FEW_HIDDEN = 1 << 20 };

typedef struct feed_forward {
    const fb_feeding *f;
    void *hidden; /* by columns: all of the hidden activations, as staged */
    fb_left left; /* by columns: all of x */
    ptrdiff_t tile; /* one tile size for all parts: fewer rows may mean larger even tiles */
} feed_forward;

/* h (rows x n, FB_ROW apart) = up_project of hidden units f .. f + n, and of the padding up to whole panels */
static void up(const fb_tier *tier, const fb_params *params, fb_left x, ptrdiff_t rows, ptrdiff_t f, ptrdiff_t n,
               void *h, void *lowered)
{
    const void *b1 = params->b1;
    fb_matmul(tier, &(fb_product){
        .a = x.at,
        .a_row = x.row,
        .bias = b1 ? fb_at(b1, f, tier->size) : NULL,
        .c = h,
        .c_row = FB_ROW,
        .rows = rows,
        .cols = fb_round_up(n, tier->panel),
        .first_col = f,
        .shift = x.shift,
        .lowered = lowered,
    }, &params->w1, FB_RELU);
}

/* columns first .. first + cols of out += the block sum of hidden units f .. f + depth; after the last, finish with
 * b2 */
static void down(const fb_tier *tier, const fb_params *params, void *h, ptrdiff_t rows, ptrdiff_t f, ptrdiff_t first,
                 ptrdiff_t cols, void *out, fb_nonzeros list, void *lowered)
{
    const fb_panels *w2 = &params->w2;
    const ptrdiff_t depth = fb_min(FB_CHAIN, w2->k - f), padded = fb_round_up(w2->n, tier->panel);
    fb_panels block = *w2;
    block.k = depth;
    const fb_left left = fb_fit(tier, (fb_left){h, FB_ROW, 0}, rows, &block, list.value ? list.value : h);
    if (left.at == list.value)
        list.value = NULL;
    fb_product g = {
        .a = left.at,
        .a_row = FB_ROW,
        .b = fb_at(w2->data, f * padded + first * depth, tier->size),
        .b_rows = w2->rows ? fb_at(w2->rows, f * padded + first, tier->size) : NULL,
        .b_row = padded,
        .bias = params->b2 ? fb_at(params->b2, first, tier->size) : NULL,
        .c = fb_at(out, first, tier->size),
        .c_row = w2->n,
        .t = fb_at(out, first, tier->size),
        .t_row = w2->n,
        .rows = rows,
        .cols = cols,
        .depth = depth,
        .first = f == 0,
        .last = f + depth == w2->k,
    };
    if (left.shift + w2->shift)
        fb_product_fitted(tier, &g, left.shift + w2->shift, lowered);
    else
        fb_product_skipping(tier, &g, w2->finite, list);
}

ptrdiff_t fb_feed_forward_rows(const fb_tier *tier, const fb_params *params, fb_left x, ptrdiff_t rows, void *out,
                               fb_arena arena)
{
    void *hidden = fb_take(&arena, rows * FB_ROW * tier->size);
    const fb_nonzeros list = fb_take_list(&arena, tier, rows, params->w2.n, 1);
    void *lowered = fb_take(&arena, fb_max(fb_lowered_bytes(tier, &params->w1), fb_lowered_bytes(tier, &params->w2)));
    if (!arena.memory)
        return arena.used;
    ptrdiff_t f = 0;
    do { /* one tile at least: without hidden units out is the bias */
        up(tier, params, x, rows, f, fb_min(FB_CHAIN, params->w1.n - f), hidden, lowered);
        down(tier, params, hidden, rows, f, 0, params->w2.n, out, list, lowered);
        f += FB_CHAIN;
    } while (f < params->w1.n);
    return arena.used;
}

static ptrdiff_t rows_part(const void *job, fb_arena arena, int part, int parts)
{
    const feed_forward *t = job;
    const fb_feeding *f = t->f;
    const fb_params *params = f->params;
    const ptrdiff_t features = params->w1.k, size = f->tier->size, end = f->rows * (part + 1) / parts;
    void *stage = fb_take(&arena, fb_stage_bytes(f->tier, t->tile, features));
    if (!arena.memory)
        return fb_feed_forward_rows(f->tier, params, (fb_left){0}, t->tile, NULL, arena);
    for (ptrdiff_t i = f->rows * part / parts, rows; i < end; i += rows) {
        rows = fb_min(t->tile, end - i);
        const fb_left x = fb_stage(f->tier, fb_at(f->x, i * f->x_row, size), f->x_row, rows, &params->w1, params->w1.n,
                                   stage);
        fb_feed_forward_rows(f->tier, params, x, rows, fb_at(f->out, i * features, size), arena);
    }
    return arena.used;
}

static ptrdiff_t up_part(const void *job, fb_arena arena, int part, int parts)
{
    const feed_forward *t = job;
    const fb_tier *tier = t->f->tier;
    const fb_params *params = t->f->params;
    const ptrdiff_t rows = t->f->rows;
    void *lowered = fb_take(&arena, fb_lowered_bytes(tier, &params->w1));
    ptrdiff_t f, n, step;
    if (!arena.memory)
        return arena.used;
    fb_columns_of(tier, params->w1.n, part, parts, &f, &n);
    for (const ptrdiff_t end = f + n; f < end; f += step) {
        step = fb_min(FB_CHAIN - f % FB_CHAIN, end - f);
        up(tier, params, t->left, rows, f, step,
           fb_at(t->hidden, f / FB_CHAIN * rows * FB_ROW + f % FB_CHAIN, tier->size), lowered);
    }
    return arena.used;
}

static ptrdiff_t down_part(const void *job, fb_arena arena, int part, int parts)
{
    const feed_forward *t = job;
    const fb_tier *tier = t->f->tier;
    const fb_params *params = t->f->params;
    const ptrdiff_t rows = t->f->rows;
    const fb_nonzeros list = fb_take_list(&arena, tier, rows, params->w2.n, 0);
    void *lowered = fb_take(&arena, fb_lowered_bytes(tier, &params->w2));
    ptrdiff_t first, cols;
    if (!arena.memory)
        return arena.used;
    fb_columns_of(tier, params->w2.n, part, parts, &first, &cols);
    for (ptrdiff_t f = 0; f < params->w1.n; f += FB_CHAIN)
        down(tier, params, fb_at(t->hidden, f * rows / FB_CHAIN * FB_ROW, tier->size), rows, f, first, cols, t->f->out,
             list, lowered);
    return arena.used;
}

ptrdiff_t fb_feed_forward_all(const void *feeding, fb_arena arena)
{
    const fb_feeding *f = feeding;
    const fb_tier *tier = f->tier;
    const ptrdiff_t hidden = f->params->w1.n, features = f->params->w1.k, rows = f->rows;
    if (features == 0 || rows == 0)
        return arena.used;
    const double work = 2.0 * (double)rows * (double)hidden * (double)features;
    const int threads = fb_threads(arena, work, fb_max(rows, fb_min(hidden, features) / tier->panel));
    const ptrdiff_t blocks = (hidden + FB_CHAIN - 1) / FB_CHAIN;
    feed_forward t = {.f = f};
    if (threads == 1 || rows >= FB_FEW_ROWS * threads || rows > FB_ROWS
        || rows * blocks * FB_ROW * tier->size > (ptrdiff_t)FEW_HIDDEN * threads) {
        const int parts = fb_parts(threads, work, rows / FB_PART_ROWS);
        t.tile = fb_stage_rows(tier, (rows + parts - 1) / parts, features);
        return fb_run(rows_part, &t, threads, parts, arena);
    }
    void *stage = fb_take(&arena, fb_stage_bytes(tier, rows, features));
    t.hidden = fb_take(&arena, rows * blocks * FB_ROW * tier->size);
    if (arena.memory)
        t.left = fb_stage(tier, f->x, f->x_row, rows, &f->params->w1, hidden, stage);
    const ptrdiff_t up_used = fb_run(up_part, &t, threads, fb_parts(threads, work / 2, hidden / tier->panel), arena);
    return fb_max(up_used, fb_run(down_part, &t, threads, threads, arena));
}

fb_status fb_feed_forward(const fb_params *params, const void *x, ptrdiff_t rows, void *out)
{
    return fb_call(fb_feed_forward_all, &(fb_feeding){
        .tier = fb_tier_in_use(params->dtype), .params = params, .x = x, .x_row = params->w1.k, .rows = rows,
        .out = out,
    });
}
