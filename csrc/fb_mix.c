/* fb_mix.c - mixing: Z = A X, A given or from attention, X packed on the way. */
#include "fb_internal.h"

enum {
    MIX_BYTES = 800 << 10, /* of X packed at a time, all its positions for some columns, up to these; they stay in L2 */
    MIX_DEPTH = 2048,
    MIX_COLUMNS = 1024
};

void fb_pack_block(const fb_tier *tier, const void *x, ptrdiff_t x_row, const ptrdiff_t *number, fb_panels *block)
{
    fb_fp_forget_subnormals();
    block->finite = tier->pack_rows(x, x_row, number, block->k, block->n, block->data);
    if (block->finite && fb_fp_met_subnormals())
        fb_look_at_panels(tier, block);
}

/* A product whose block of B has something that is not finite, where row i may see its first count[i] - k keys only:
 * its own terms only, for a zero weight would not hide the others. */
static void product_causal(const fb_tier *tier, const fb_product *whole, const ptrdiff_t *count, ptrdiff_t k)
{
    fb_product g = *whole;
    g.rows = 1;
    for (ptrdiff_t i = 0; i < whole->rows; i++) {
        if (fb_stop(fb_work_of(&g)))
            return;
        g.unseen = fb_max(0, g.depth - fb_max(0, count[i] - k));
        tier->product(&g);
        g.a = fb_at(g.a, g.a_row, tier->size);
        g.c = g.t = fb_at(g.c, g.c_row, tier->size);
    }
}

void fb_mix_blocks(const fb_tier *tier, const fb_product *whole, fb_panels *blocks, ptrdiff_t n, const ptrdiff_t *count,
                   void *spare, fb_nonzeros list)
{
    ptrdiff_t k = 0;
    for (ptrdiff_t i = 0; i < n && !fb_stop(0); k += blocks[i++].k) {
        fb_panels block = blocks[i];
        fb_product g = *whole;
        if (spare) { /* what may be scaled, there, is the columns that take part */
            block.data = fb_at(block.data, whole->first_col * block.k, tier->size);
            block.n = whole->cols;
        }
        fb_nonzeros own = list;
        g.a = fb_at(whole->a, k, tier->size);
        g.next_a = i + 1 < n ? fb_at(g.a, block.k, tier->size) : whole->next_a;
        g.depth = block.k;
        g.stage = list.value;
        g.first = whole->first && i == 0;
        g.last = whole->last && i == n - 1;
        if (!count || block.finite) {
            const fb_left left = fb_fit_both(tier, (fb_left){g.a, g.a_row, 0}, g.rows, &block, list.value, spare);
            if (left.at == list.value)
                own.value = NULL;
            g.a = left.at;
            g.a_row = left.row;
        }
        g.b = block.data;
        if (count && !block.finite)
            product_causal(tier, &g, count, k);
        else
            fb_product_skipping(tier, &g, block.finite, own);
        if (!spare)
            blocks[i] = block;
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
            fb_panels blocks[MIX_DEPTH / FB_CHAIN];
            char *at = packed;
            ptrdiff_t n = 0;
            for (ptrdiff_t k0 = d; k0 < end && !fb_stop(0); k0 += FB_CHAIN, n++) {
                blocks[n] = (fb_panels){.data = at, .n = cols, .k = fb_min(FB_CHAIN, end - k0)};
                fb_pack_block(tier, fb_at(m->x, k0 * features + j, size), features, NULL, &blocks[n]);
                at += blocks[n].k * fb_round_up(cols, tier->panel) * size;
            }
            for (ptrdiff_t i = 0; i < rows; i += FB_ROWS) {
                const ptrdiff_t row = (first_row + i) * positions + d;
                fb_mix_blocks(tier, &(fb_product){
                    .a = fb_at(m->weights, row, size),
                    .a_row = positions,
                    .next_a = fb_at(m->weights, row + FB_ROWS * positions, size),
                    .c = fb_at(out, i * out_row + j, size),
                    .c_row = out_row,
                    .t = fb_at(out, i * out_row + j, size),
                    .t_row = out_row,
                    .rows = fb_min(FB_ROWS, rows - i),
                    .cols = fb_min(columns, width - j),
                    .first = d == 0,
                    .last = end == positions,
                }, blocks, n, NULL, NULL, list);
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
        .tier = fb_tier_in_use(dtype), .weights = weights, .x = x, .out = out, .batch = batch,
        .weights_batch = weights_batch, .x_batch = x_batch, .positions = positions, .features = features,
    });
}
