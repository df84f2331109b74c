/* fb_block.c - the block, line for line reference.block: attention weights, mixing, feed-forward.
 *
 * The mixed positions exist one tile at a time, like the hidden activations; attention weights of the block's own
 * exist for as many batch items as fit into OWN_WEIGHTS bytes, one at least. A block of a few numbers takes a way of
 * its own, because laying them out for the large kernels takes several times as long as to compute them.
 */
#include "fb_internal.h"

#include <string.h>

enum { OWN_WEIGHTS = 16 << 20, SMALL_POSITIONS = 32 };

typedef struct block_job {
    const fb_tier *tier;
    const fb_params *params;
    const void *x, *weights;
    const uint8_t *key_mask;
    ptrdiff_t batch, x_batch, weights_batch, positions;
    int causal;
    char *out;
} block_job;

typedef struct block_plan {
    const block_job *job;
    ptrdiff_t tile, z_row;
} block_plan;

static fb_mixing mixing_of(const block_job *t, ptrdiff_t b)
{
    return (fb_mixing){
        .weights = fb_at(t->weights, b * t->weights_batch, t->tier->size),
        .x = fb_at(t->x, b * t->x_batch, t->tier->size),
        .positions = t->positions,
        .features = t->params->w1.k,
        .key_mask = t->key_mask ? t->key_mask + b * t->positions : NULL,
        .causal = t->causal,
    };
}

/* z (n x D, z_row apart) = mixed positions row .. row + n of the batch, all of one item */
static ptrdiff_t mix(const block_plan *plan, ptrdiff_t row, ptrdiff_t n, void *z, fb_arena arena)
{
    const block_job *t = plan->job;
    const fb_mixing m = mixing_of(t, row / t->positions);
    return fb_mix_rows(t->tier, &m, row % t->positions, n, z, plan->z_row, arena);
}

/* All rows of the batch in one line, cut evenly, in tiles that do not cross from one batch item to the next. */
static ptrdiff_t rows_part(const void *plan_, fb_arena arena, int part, int parts)
{
    const block_plan *plan = plan_;
    const block_job *t = plan->job;
    const fb_tier *tier = t->tier;
    const fb_params *params = t->params;
    const ptrdiff_t total = t->batch * t->positions, end = total * (part + 1) / parts, features = params->w1.k;
    char *stage = fb_take(&arena, fb_stage_bytes(tier, plan->tile, features));
    /* one block of features: mixed where it is wanted */
    char *z = features <= FB_CHAIN ? stage : fb_take(&arena, plan->tile * plan->z_row * tier->size);
    if (!arena.memory)
        return fb_max(mix(plan, 0, plan->tile, NULL, arena),
                      fb_feed_forward_rows(tier, params, (fb_left){0}, plan->tile, NULL, arena));
    for (ptrdiff_t row = total * part / parts, n; row < end; row += n) {
        n = fb_min(fb_min(plan->tile, t->positions - row % t->positions), end - row);
        mix(plan, row, n, z, arena);
        const fb_left mixed = z == stage ? fb_fit(tier, (fb_left){z, plan->z_row, 0}, n, &params->w1, z)
                                          : fb_stage(tier, z, plan->z_row, n, &params->w1, params->w1.n, stage);
        fb_feed_forward_rows(tier, params, mixed, n, fb_at(t->out, row * features, tier->size), arena);
    }
    return arena.used;
}

/* Features and hidden units that fit into a vector, a few positions: whole batch items. */
static ptrdiff_t small_part(const void *job, fb_arena arena, int part, int parts)
{
    const block_job *t = job;
    const fb_tier *tier = t->tier;
    const fb_params *params = t->params;
    const ptrdiff_t positions = t->positions, features = params->w1.k, hidden = params->w1.n, end = t->batch * (part + 1) / parts;
    enum { BYTES = SMALL_POSITIONS * FB_PANEL_BYTES };
    void *z = fb_take(&arena, BYTES), *h = fb_take(&arena, BYTES), *kept = fb_take(&arena, BYTES);
    if (!arena.memory)
        return arena.used;
    fb_product mixing = {.a_row = positions, .c_row = tier->lanes, .cols = features};
    const fb_product up = {.a = z, .a_row = tier->lanes, .b = params->w1.data, .bias = params->b1, .c = h, .c_row = tier->lanes,
                           .rows = positions, .cols = hidden, .depth = features, .relu = 1};
    fb_product down = {.a = h, .a_row = tier->lanes, .b = params->w2.data, .bias = params->b2, .c_row = features,
                       .rows = positions, .cols = features, .depth = hidden};
    const double work = (double)positions * (double)features * ((double)positions + 2.0 * (double)hidden);
    for (ptrdiff_t b = t->batch * part / parts; b < end && !fb_stop(work); b++) {
        mixing.a = fb_at(t->weights, b * t->weights_batch, tier->size);
        mixing.b = fb_at(t->x, b * t->x_batch, tier->size);
        down.c = fb_at(t->out, b * positions * features, tier->size);
        if (t->key_mask) {
            memcpy(kept, mixing.b, (size_t)(positions * features * tier->size));
            for (ptrdiff_t j = 0; j < positions; j++)
                if (!t->key_mask[b * positions + j])
                    memset(fb_at(kept, j * features, tier->size), 0, (size_t)(features * tier->size));
            mixing.b = kept;
        }
        mixing.c = z;
        mixing.rows = t->causal ? 1 : positions;
        for (ptrdiff_t i = 0; i < positions; i += mixing.rows) {
            mixing.depth = t->causal ? i + 1 : positions;
            tier->product_small(&mixing, features);
            mixing.a = fb_at(mixing.a, positions, tier->size);
            mixing.c = fb_at(mixing.c, mixing.c_row, tier->size);
        }
        tier->product_small(&up, tier->panel);
        tier->product_small(&down, tier->panel);
    }
    return arena.used;
}

/* The block with the weights in t. */
static ptrdiff_t mix_and_feed_forward(const block_job *t, fb_arena arena)
{
    const fb_tier *tier = t->tier;
    const ptrdiff_t features = t->params->w1.k, hidden = t->params->w1.n, rows = t->batch * t->positions;
    const double work = (double)rows * (double)features * ((double)t->positions + 2.0 * (double)hidden);
    if (t->positions <= SMALL_POSITIONS && fb_max(features, hidden) <= tier->lanes) {
        const int threads = fb_threads(arena, work, t->batch);
        return fb_run(small_part, t, threads, fb_parts(threads, work, t->batch), arena);
    }
    const int threads = fb_threads(arena, work, fb_max(rows, hidden / tier->panel));
    const block_plan plan = {.job = t, .tile = fb_stage_rows(tier, t->positions, features),
                             .z_row = features <= FB_CHAIN ? FB_ROW : fb_round_up(features, tier->panel)};
    if (threads == 1 || rows >= FB_FEW_ROWS * threads)
        return fb_run(rows_part, &plan, threads, fb_parts(threads, work, rows / FB_PART_ROWS), arena);
    /* few rows: all mixed positions, then a feed-forward by columns */
    char *z = fb_take(&arena, rows * plan.z_row * tier->size);
    const ptrdiff_t used = mix(&plan, 0, plan.tile, NULL, (fb_arena){.used = arena.used});
    for (ptrdiff_t row = 0, n; arena.memory && row < rows; row += n) {
        n = fb_min(plan.tile, t->positions - row % t->positions);
        mix(&plan, row, n, fb_at(z, row * plan.z_row, tier->size), arena);
    }
    return fb_max(used, fb_feed_forward_all(&(fb_feeding){
        .tier = tier, .params = t->params, .x = z, .x_row = plan.z_row, .rows = rows, .out = t->out,
    }, arena));
}

/* The weights of as many batch items at a time as fit into OWN_WEIGHTS, and the block with them. */
static ptrdiff_t weigh_and_feed_forward(const block_job *t, fb_arena arena)
{
    const ptrdiff_t size = t->tier->size, positions = t->positions, features = t->params->w1.k, item = positions * positions;
    const ptrdiff_t step = fb_min(t->batch, fb_max(1, OWN_WEIGHTS / (item * size)));
    void *own = fb_take(&arena, fb_bytes(step * positions, positions, size));
    ptrdiff_t used = arena.used;
    for (ptrdiff_t b = 0; b < t->batch; b += step) {
        block_job part = *t;
        part.batch = fb_min(step, t->batch - b);
        part.x = fb_at(t->x, b * t->x_batch, size);
        part.out = fb_at(t->out, b * positions * features, size);
        part.key_mask = t->key_mask ? t->key_mask + b * positions : NULL;
        part.weights = own;
        part.weights_batch = item;
        used = fb_max(used, fb_attend(&(fb_attending){
            .tier = t->tier, .params = t->params, .batch = part.batch, .positions = positions, .x = part.x, .causal = t->causal,
            .key_mask = part.key_mask, .out = own,
        }, arena));
        used = fb_max(used, mix_and_feed_forward(&part, arena));
        if (!arena.memory && t->batch - b > 2 * step) /* count one whole step and the last one */
            b += (t->batch - b - 1) / step * step - step;
    }
    return used;
}

static ptrdiff_t block(const void *job, fb_arena arena)
{
    const block_job *t = job;
    if (t->batch == 0 || t->positions == 0 || t->params->w1.k == 0) /* nothing to write */
        return arena.used;
    return t->weights ? mix_and_feed_forward(t, arena) : weigh_and_feed_forward(t, arena);
}

fb_status fb_block(const fb_params *params, ptrdiff_t batch, const void *x, ptrdiff_t x_batch, ptrdiff_t positions,
                   const void *weights, ptrdiff_t weights_batch, int causal, const uint8_t *key_mask, void *out)
{
    return fb_call(block, &(block_job){
        .tier = fb_tier_in_use(params->dtype), .params = params, .x = x, .weights = weights, .batch = batch, .x_batch = x_batch,
        .weights_batch = weights_batch, .positions = positions, .out = out,
        /* weights that are given hold as they stand */
        .key_mask = weights ? NULL : key_mask, .causal = weights ? 0 : causal,
    });
}
