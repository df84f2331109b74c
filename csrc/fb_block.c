/* fb_block.c - the block, line for line reference.block: attention weights, mixing, feed-forward.
 *
 * Nothing but a tile of the attention weights of the block's own, of the mixed positions and of the hidden
 * activations exists at a time. Of as many batch items as fit into ATTENDED bytes, one at least, keys, queries and
 * packed x exist. A block of a few numbers takes a way of its own, because laying them out for the large kernels
 * takes several times as long as to compute them.
 */
#include "fb_internal.h"

#include <string.h>

enum {
    ATTENDED = 16 << 20,
    WEIGHTS = 512 << 10, /* bytes of a tile's weights, which stay in L2 */
    ATTENDED_COLUMNS = 512,
    SMALL_POSITIONS = 32
};

typedef struct block_job {
    const fb_tier *tier;
    const fb_params *params;
    const void *x, *weights; /* weights NULL: of the block's own */
    const uint8_t *key_mask;
    ptrdiff_t batch, x_batch, weights_batch, positions;
    int causal;
    char *out;
} block_job;

typedef struct block_plan {
    const block_job *job;
    ptrdiff_t tile, z_row;
    int by_columns; /* few rows: all mixed positions, to z, and then a feed-forward by columns */
    char *z;
    /* weights of the block's own: the tiles and the blocks of an item, and its x in these, those of depth 0 last */
    const fb_attention *attention;
    ptrdiff_t tiles, blocks;
    fb_panels *values;
} block_plan;

/* z (n x D, z_row apart) = what the weights that are given make of positions i .. i + n of item b */
static ptrdiff_t mix(const block_plan *plan, ptrdiff_t b, ptrdiff_t i, ptrdiff_t n, void *z, fb_arena arena)
{
    const block_job *t = plan->job;
    return fb_mix_rows(t->tier, &(fb_mixing){
        .weights = fb_at(t->weights, b * t->weights_batch, t->tier->size),
        .x = fb_at(t->x, b * t->x_batch, t->tier->size),
        .positions = t->positions,
        .features = t->params->w1.k,
    }, i, n, z, plan->z_row, arena);
}

/* The same, what they attend to. */
static ptrdiff_t attend(const block_plan *plan, ptrdiff_t b, ptrdiff_t i, ptrdiff_t n, void *z, fb_arena arena)
{
    const block_job *t = plan->job;
    const fb_tier *tier = t->tier;
    const ptrdiff_t features = t->params->w1.k, size = tier->size, width = fb_round_up(features, tier->panel);
    const ptrdiff_t columns = fb_round_up(fb_even(width, ATTENDED_COLUMNS), tier->panel);
    const ptrdiff_t row = fb_round_up(t->positions, tier->panel) + tier->panel; /* not a power of two */
    void *weights = fb_take(&arena, fb_bytes(plan->tile, row, size));
    const fb_arena rest = arena; /* needed until the weights are there, before the others are */
    void *spare = fb_take(&arena, fb_min(FB_CHAIN, t->positions) * columns * size);
    const fb_nonzeros list = fb_take_list(&arena, tier, plan->tile, 0, 0);
    if (!arena.memory)
        return fb_max(arena.used, fb_weigh(plan->attention, 0, 0, plan->tile, NULL, NULL, 0, 0, rest));
    ptrdiff_t count[FB_ROWS], blocks = 0, seen = 0;
    fb_panels *values = plan->values + b * plan->blocks;
    fb_count_keys(plan->attention, b, i, n, count);
    for (; seen < count[n - 1]; blocks++)
        seen += values[blocks].k;
    fb_weigh(plan->attention, b, i, n, count, weights, row, seen, rest);
    for (ptrdiff_t j = 0; j < width; j += columns) {
        fb_product g = {.a = weights, .a_row = row, .c_row = plan->z_row, .t_row = plan->z_row, .rows = n,
                        .cols = fb_min(columns, width - j), .first_col = j, .first = 1, .last = 1};
        g.c = g.t = fb_at(z, j, size);
        fb_mix_blocks(tier, &g, values, blocks, t->causal ? count : NULL, spare, list);
    }
    if (blocks == 0)
        memset(z, 0, (size_t)(n * plan->z_row * size));
    return arena.used;
}

/* z (n x D, z_row apart) = positions i .. i + n of item b, mixed */
static ptrdiff_t mixed(const block_plan *plan, ptrdiff_t b, ptrdiff_t i, ptrdiff_t n, void *z, fb_arena arena)
{
    return plan->attention ? attend(plan, b, i, n, z, arena) : mix(plan, b, i, n, z, arena);
}

/* The same positions: mixed, and unless that waits for all of them, fed forward. */
static ptrdiff_t block_rows(const block_plan *plan, ptrdiff_t b, ptrdiff_t i, ptrdiff_t n, fb_arena arena)
{
    const block_job *t = plan->job;
    const fb_tier *tier = t->tier;
    const fb_params *params = t->params;
    const ptrdiff_t features = params->w1.k, row = b * t->positions + i;
    if (plan->by_columns)
        return mixed(plan, b, i, n, fb_at(plan->z, row * plan->z_row, tier->size), arena);
    void *stage = fb_take(&arena, fb_stage_bytes(tier, plan->tile, features));
    /* one block of features: mixed where it is wanted */
    void *z = features <= FB_CHAIN ? stage : fb_take(&arena, plan->tile * plan->z_row * tier->size);
    const ptrdiff_t used = mixed(plan, b, i, n, z, arena);
    fb_left left = {z, plan->z_row, 0};
    if (arena.memory)
        left = z == stage ? fb_fit(tier, left, n, &params->w1, stage)
                          : fb_stage(tier, z, plan->z_row, n, &params->w1, params->w1.n, stage);
    return fb_max(used, fb_feed_forward_rows(tier, params, left, n, fb_at(t->out, row * features, tier->size), arena));
}

/* Weights that are given: all rows of the batch in one line, cut evenly, in tiles that do not cross from one batch item
 * to the next. */
static ptrdiff_t mix_part(const void *plan_, fb_arena arena, int part, int parts)
{
    const block_plan *plan = plan_;
    const ptrdiff_t positions = plan->job->positions, total = plan->job->batch * positions;
    const ptrdiff_t end = total * (part + 1) / parts;
    if (!arena.memory)
        return block_rows(plan, 0, 0, plan->tile, arena);
    for (ptrdiff_t row = total * part / parts, n; row < end; row += n) {
        const ptrdiff_t b = row / positions, i = row % positions;
        n = fb_min(fb_min(plan->tile, positions - i), end - row);
        block_rows(plan, b, i, n, arena);
    }
    return arena.used;
}

/* Weights of the block's own: every parts-th tile, for with causal the later ones are longer. */
static ptrdiff_t attend_part(const void *plan_, fb_arena arena, int part, int parts)
{
    const block_plan *plan = plan_;
    const ptrdiff_t positions = plan->job->positions, tiles = plan->job->batch * plan->tiles;
    if (!arena.memory)
        return block_rows(plan, 0, 0, plan->tile, arena);
    for (ptrdiff_t n = part; n < tiles && !fb_stop(0); n += parts) {
        const ptrdiff_t b = n / plan->tiles, i = n % plan->tiles * plan->tile;
        block_rows(plan, b, i, fb_min(plan->tile, positions - i), arena);
    }
    return arena.used;
}

/* Every parts-th block of x. */
static ptrdiff_t pack_part(const void *plan_, fb_arena arena, int part, int parts)
{
    const block_plan *plan = plan_;
    const block_job *t = plan->job;
    for (ptrdiff_t n = part; arena.memory && n < t->batch * plan->blocks && !fb_stop(0); n += parts) {
        const ptrdiff_t b = n / plan->blocks, size = t->tier->size, features = t->params->w1.k;
        const ptrdiff_t *number = plan->attention->keys[b].number;
        ptrdiff_t first = 0;
        for (const fb_panels *before = &plan->values[b * plan->blocks]; before < &plan->values[n]; before++)
            first += before->k;
        if (plan->values[n].k)
            fb_pack_block(t->tier, fb_at(t->x, b * t->x_batch + (number ? 0 : first * features), size), features,
                          number ? number + first : NULL, &plan->values[n]);
    }
    return arena.used;
}

/* Where the blocks of an item's x will stand. */
static void place_values(const block_plan *plan, const fb_keys *keys, fb_panels *values, char *at)
{
    const fb_tier *tier = plan->job->tier;
    const ptrdiff_t features = plan->job->params->w1.k, width = fb_round_up(features, tier->panel);
    ptrdiff_t first = 0;
    fb_panels *value = values;
    for (const ptrdiff_t *end = keys->ends; first < keys->count; end++) {
        const ptrdiff_t depth = fb_min(*end, keys->count) - first;
        if (depth > 0)
            *value++ = (fb_panels){.data = fb_at(at, first * width, tier->size), .n = features, .k = depth};
        first += depth;
    }
    for (; value < values + plan->blocks; value++)
        *value = (fb_panels){0};
}

/* Features and hidden units that fit into a vector, a few positions: whole batch items. */
static ptrdiff_t small_part(const void *job, fb_arena arena, int part, int parts)
{
    const block_job *t = job;
    const fb_tier *tier = t->tier;
    const fb_params *params = t->params;
    const ptrdiff_t positions = t->positions, features = params->w1.k, hidden = params->w1.n;
    const ptrdiff_t end = t->batch * (part + 1) / parts;
    enum { BYTES = SMALL_POSITIONS * FB_PANEL_BYTES };
    void *z = fb_take(&arena, BYTES), *h = fb_take(&arena, BYTES), *kept = fb_take(&arena, BYTES);
    if (!arena.memory)
        return arena.used;
    fb_product mixing = {.a_row = positions, .c_row = tier->lanes, .cols = features};
    const fb_product up = {.a = z, .a_row = tier->lanes, .b = params->w1.data, .bias = params->b1, .c = h,
                           .c_row = tier->lanes, .rows = positions, .cols = hidden, .depth = features, .relu = 1};
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

/* ---- the whole block */

/* A block of a few numbers, with the weights in t. */
static ptrdiff_t small(const block_job *t, fb_arena arena)
{
    const double work = (double)t->batch * (double)t->positions * (double)t->params->w1.k *
                        ((double)t->positions + 2.0 * (double)t->params->w1.n);
    const int threads = fb_threads(arena, work, t->batch);
    return fb_run(small_part, t, threads, fb_parts(threads, work, t->batch), arena);
}

static int is_small(const block_job *t)
{
    return t->positions <= SMALL_POSITIONS && fb_max(t->params->w1.k, t->params->w1.n) <= t->tier->lanes;
}

/* The block with weights that are given, or those of its own attention. */
static ptrdiff_t mix_and_feed_forward(const block_job *t, fb_attention *attention, fb_arena arena)
{
    const fb_tier *tier = t->tier;
    const ptrdiff_t features = t->params->w1.k, hidden = t->params->w1.n, size = tier->size, positions = t->positions;
    const ptrdiff_t rows = t->batch * positions;
    const ptrdiff_t terms = features + (attention ? t->params->w_q.n + 32 : 0);
    const double mixing = (double)rows * (double)positions * (double)terms;
    const double work = mixing + 2.0 * (double)rows * (double)features * (double)hidden;
    int threads = fb_threads(arena, work, fb_max(rows, hidden / tier->panel));
    block_plan plan = {.job = t, .attention = attention, .tile = fb_stage_rows(tier, positions, features),
                       .z_row = features <= FB_CHAIN ? FB_ROW : fb_round_up(features, tier->panel),
                       .by_columns = threads > 1 && rows < FB_FEW_ROWS * threads};
    if (plan.by_columns)
        threads = fb_threads(arena, mixing, rows);
    const double share = plan.by_columns ? mixing : work;
    ptrdiff_t used = arena.used;
    int parts = fb_parts(threads, share, rows / FB_PART_ROWS);
    if (attention) {
        const ptrdiff_t most = FB_QUERY_PANELS * tier->panel, width = fb_round_up(features, tier->panel);
        plan.tile = fb_min(fb_min(plan.tile, rows / threads), WEIGHTS / (positions * size));
        plan.tile = fb_min(positions, fb_max(most, fb_min(FB_ROWS, plan.tile + most - 1) / most * most));
        plan.tiles = (positions + plan.tile - 1) / plan.tile;
        plan.blocks = positions / FB_CHAIN + 1;
        parts = fb_parts(threads, share, t->batch * plan.tiles);
        used = fb_attend(attention, &arena);
        char *values = fb_take(&arena, fb_bytes(rows, width, size));
        plan.values = fb_take(&arena, fb_bytes(t->batch, plan.blocks, sizeof *plan.values));
        for (ptrdiff_t b = 0; arena.memory && b < t->batch; b++)
            place_values(&plan, &attention->keys[b], plan.values + b * plan.blocks,
                         fb_at(values, b * positions * width, size));
        used = fb_max(used, fb_run(pack_part, &plan, threads, (int)fb_min(threads, t->batch * plan.blocks), arena));
    }
    if (plan.by_columns)
        plan.z = fb_take(&arena, rows * plan.z_row * size);
    used = fb_max(used, fb_run(attention ? attend_part : mix_part, &plan, threads, parts, arena));
    return !plan.by_columns ? used : fb_max(used, fb_feed_forward_all(&(fb_feeding){
        .tier = tier, .params = t->params, .x = plan.z, .x_row = plan.z_row, .rows = rows, .out = t->out,
    }, arena));
}

/* Batch items b .. b + n with attention of the block's own. */
static ptrdiff_t attend_items(const block_job *t, ptrdiff_t b, ptrdiff_t n, fb_arena arena)
{
    const ptrdiff_t size = t->tier->size, positions = t->positions, features = t->params->w1.k;
    block_job items = *t;
    items.batch = n;
    items.x = fb_at(t->x, b * t->x_batch, size);
    items.out = fb_at(t->out, b * positions * features, size);
    items.key_mask = t->key_mask ? t->key_mask + b * positions : NULL;
    fb_attention attention = {.tier = t->tier, .params = t->params, .x = items.x, .batch = n, .positions = positions,
                              .key_mask = items.key_mask, .causal = t->causal};
    if (!is_small(t))
        return mix_and_feed_forward(&items, &attention, arena);
    void *weights = fb_take(&arena, fb_bytes(n * positions, positions, size));
    items.weights = weights;
    items.weights_batch = positions * positions;
    const ptrdiff_t used = fb_weigh_all(&(fb_weighing){.attention = attention, .out = weights}, arena);
    return fb_max(used, small(&items, arena));
}

static ptrdiff_t block(const void *job, fb_arena arena)
{
    const block_job *t = job;
    ptrdiff_t used = arena.used;
    if (t->batch == 0 || t->positions == 0 || t->params->w1.k == 0) /* nothing to write */
        return used;
    if (t->weights)
        return is_small(t) ? small(t, arena) : mix_and_feed_forward(t, NULL, arena);
    const ptrdiff_t columns = is_small(t) ? t->positions : t->params->w1.k; /* of weights, or of packed x */
    const double item =
        (double)t->positions * (double)t->tier->size * (2.0 * (double)t->params->w_q.n + (double)columns);
    const ptrdiff_t step = fb_max(1, (ptrdiff_t)fb_min(t->batch, (ptrdiff_t)(ATTENDED / item)));
    for (ptrdiff_t b = 0; b < t->batch; b += step) {
        used = fb_max(used, attend_items(t, b, fb_min(step, t->batch - b), arena));
        if (!arena.memory && t->batch - b > 2 * step) /* count one whole step and the last one */
            b += (t->batch - b - 1) / step * step - step;
    }
    return used;
}

fb_status fb_block(const fb_params *params, ptrdiff_t batch, const void *x, ptrdiff_t x_batch, ptrdiff_t positions,
                   const void *weights, ptrdiff_t weights_batch, int causal, const uint8_t *key_mask, void *out)
{
    return fb_call(block, &(block_job){
        .tier = fb_tier_in_use(params->dtype), .params = params, .x = x, .weights = weights, .batch = batch,
        .x_batch = x_batch, .weights_batch = weights_batch, .positions = positions, .out = out,
        /* weights that are given hold as they stand */
        .key_mask = weights ? NULL : key_mask, .causal = weights ? 0 : causal,
    });
}
