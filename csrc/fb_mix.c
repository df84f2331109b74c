/* fb_mix.c - mixing: Z = A X, A given or from attention, X packed on the way. */
#include "fb_internal.h"

enum {
    MIX_BYTES = 800 << 10, /* of X packed at a time, all its positions for some columns, up to these; they stay in L2 */
    MIX_DEPTH = 2048,
    MIX_COLUMNS = 1024
};

/* Row i of a product whose block of B has something that is not finite, and that may see only the keys up to i: its own
 * terms only, for a zero weight would not hide the others. */
static void product_causal(const fb_tier *tier, const fb_product *whole, ptrdiff_t seen)
{
    fb_product g = *whole;
    g.rows = 1;
    for (ptrdiff_t i = 0; i < whole->rows; i++, seen++) {
        if (fb_stop(fb_work_of(&g)))
            return;
        g.unseen = fb_max(0, g.depth - fb_max(0, seen));
        tier->product(&g);
        g.a = fb_at(g.a, g.a_row, tier->size);
        g.c = g.t = fb_at(g.c, g.c_row, tier->size);
    }
}

static ptrdiff_t mix_columns(const fb_tier *tier, ptrdiff_t positions, ptrdiff_t features)
{
    if (features * fb_min(MIX_DEPTH, positions) <= MIX_BYTES / 8 && features <= MIX_COLUMNS)
        return fb_round_up(features, tier->panel);
    const ptrdiff_t fit = MIX_BYTES / (fb_min(MIX_DEPTH, positions) * tier->size);
    return fb_round_up(fb_even(features, fb_max(4 * tier->panel, fb_min(MIX_COLUMNS, fit))), tier->panel);
}

ptrdiff_t fb_mix_rows(const fb_tier *tier, const fb_mixing *m, ptrdiff_t first_row, ptrdiff_t rows, void *out,
                      ptrdiff_t out_row, fb_arena arena)
{
    const ptrdiff_t size = tier->size, positions = m->positions, features = m->features;
    const ptrdiff_t columns = mix_columns(tier, positions, features);
    /* an out_row of whole panels has room for the columns beyond the last */
    const ptrdiff_t width = fb_min(fb_round_up(features, tier->panel), out_row);
    void *packed = fb_take(&arena, fb_min(MIX_DEPTH, positions) * columns * size);
    const fb_nonzeros list = fb_take_list(&arena, tier, fb_min(FB_ROWS, rows), 0, 0);
    if (!arena.memory)
        return arena.used;
    for (ptrdiff_t j = 0; j < features; j += columns)
        for (ptrdiff_t d = 0; d < positions; d += MIX_DEPTH) {
            const ptrdiff_t cols = fb_min(columns, features - j), end = fb_min(d + MIX_DEPTH, positions);
            fb_panels blocks[MIX_DEPTH / FB_CHAIN], *block = blocks;
            char *at = packed;
            for (ptrdiff_t k0 = d; k0 < end && !fb_stop(0); k0 += FB_CHAIN, block++) {
                *block = (fb_panels){.data = at, .n = cols, .k = fb_min(FB_CHAIN, end - k0)};
                fb_fp_forget_subnormals();
                block->finite = tier->pack_rows(fb_at(m->x, k0 * features + j, size), features, block->k, cols,
                                             m->key_mask ? m->key_mask + k0 : NULL, at);
                if (block->finite && fb_fp_met_subnormals())
                    fb_look_at_panels(tier, block);
                at += block->k * fb_round_up(cols, tier->panel) * size;
            }
            for (ptrdiff_t i = 0; i < rows; i += FB_ROWS) {
                const ptrdiff_t end_row = fb_min(i + FB_ROWS, rows);
                block = blocks;
                for (ptrdiff_t k0 = d; k0 < end && !fb_stop(0); k0 += FB_CHAIN, block++) {
                    const ptrdiff_t row = (first_row + i) * positions;
                    fb_product g = {
                        .a = fb_at(m->weights, row + k0, size),
                        .a_row = positions,
                        .next_a = fb_at(m->weights, k0 + FB_CHAIN < end ? row + k0 + FB_CHAIN : row + FB_ROWS * positions + d, size),
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
                        .last = k0 + FB_CHAIN >= positions,
                    };
                    if (m->causal && !block->finite) {
                        product_causal(tier, &g, first_row + i + 1 - k0);
                    } else {
                        const fb_left left = fb_fit_both(tier, (fb_left){g.a, positions, 0}, g.rows, block, list.value);
                        fb_nonzeros own = list;
                        if (left.at == list.value)
                            own.value = NULL;
                        g.a = left.at;
                        g.a_row = left.row;
                        fb_product_skipping(tier, &g, block->finite, own);
                    }
                }
            }
        }
    return arena.used;
}

typedef struct mix_job {
    const fb_tier *tier;
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
    const ptrdiff_t unit = ((const mix_plan *)plan)->unit, units = t->batch * t->positions / unit, size = t->tier->size;
    const ptrdiff_t end = units * (part + 1) / parts * unit;
    fb_mixing m = {.weights = t->weights, .x = t->x, .positions = t->positions, .features = t->features};
    if (!arena.memory)
        return fb_mix_rows(t->tier, &m, 0, t->positions, NULL, t->features, arena);
    for (ptrdiff_t row = units * part / parts * unit, rows; row < end; row += rows) {
        const ptrdiff_t b = row / t->positions, i = row % t->positions;
        rows = fb_min(t->positions - i, end - row);
        m.weights = fb_at(t->weights, b * t->weights_batch, size);
        m.x = fb_at(t->x, b * t->x_batch, size);
        fb_mix_rows(t->tier, &m, i, rows, fb_at(t->out, row * t->features, size), t->features, arena);
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
        .tier = fb_tier_in_use(dtype), .weights = weights, .x = x, .out = out, .batch = batch, .weights_batch = weights_batch,
        .x_batch = x_batch, .positions = positions, .features = features,
    });
}
