/* fb_attention.c - attention weights, a tile of queries at a time: their scores and softmax with the queries side by
 * side.
 *
 * Keys and queries are projected first, all of them. A masked key takes no part in anything, so the keys that are
 * allowed stand one after the other, in order, and `ends` remembers where the blocks of the original key numbers end.
 * With causal, a tile of queries meets the keys up to its last query only.
 */
#include "fb_internal.h"

#include <math.h>
#include <string.h>

enum {
    MOST_QUERIES = FB_QUERY_PANELS * FB_PANEL_BYTES / 4,
    STREAMED = 8 << 20 /* bytes of all weights from which on they go past the caches */
};

/* Which keys of batch item b there are; *number has room for so many numbers, *ends for the ends of the blocks. */
static fb_keys allowed_keys(const fb_attention *a, ptrdiff_t b, ptrdiff_t *number, ptrdiff_t *ends)
{
    fb_keys keys = {.number = a->key_mask ? number : NULL, .ends = ends};
    const uint8_t *mask = a->key_mask ? a->key_mask + b * a->positions : NULL;
    for (ptrdiff_t j = 0; j < a->positions; j++) {
        if (!mask)
            keys.count++;
        else if (mask[j])
            number[keys.count++] = j;
        if (j % FB_CHAIN == FB_CHAIN - 1)
            *ends++ = keys.count;
    }
    *ends = PTRDIFF_MAX; /* the open last block */
    return keys;
}

/* Of every parts-th batch item: the allowed keys in front, and whether something is subnormal. */
static ptrdiff_t look_part(const void *attention, fb_arena arena, int part, int parts)
{
    const fb_attention *a = attention;
    const fb_tier *tier = a->tier;
    const ptrdiff_t positions = a->positions, width = a->params->w_k.n, row = width * tier->size;
    for (ptrdiff_t b = part; arena.memory && b < a->batch; b += parts) {
        fb_keys *keys = &a->keys[b];
        for (ptrdiff_t n = 0; keys->number && n < keys->count; n++)
            if (keys->number[n] != n)
                memcpy(fb_at(keys->rows.data, n, row), fb_at(keys->rows.data, keys->number[n], row), (size_t)row);
        fb_fp_forget_subnormals();
        tier->touch(keys->rows.data, 0, 1, keys->count * width);
        tier->touch(fb_at(a->queries, b * positions, row), 0, 1, positions * width);
        if ((keys->subnormal = fb_fp_met_subnormals()))
            fb_look_at(tier, &keys->rows, keys->count * width);
    }
    return arena.used;
}

ptrdiff_t fb_attend(fb_attention *a, fb_arena *arena)
{
    const fb_params *params = a->params;
    const ptrdiff_t positions = a->positions, rows = a->batch * positions, width = params->w_q.n, size = a->tier->size;
    const ptrdiff_t blocks = positions / FB_CHAIN + 1;
    const double root = 1.0 / sqrt((double)width);
    a->scale = params->dtype == FB_F32 ? (float)root : root;
    a->queries = fb_take(arena, fb_bytes(rows, width, size));
    a->keys = fb_take(arena, fb_bytes(a->batch, 1, sizeof *a->keys));
    char *keys = fb_take(arena, fb_bytes(rows, width, size));
    ptrdiff_t *ends = fb_take(arena, fb_bytes(a->batch, blocks, sizeof *ends));
    ptrdiff_t *number = fb_take(arena, a->key_mask ? fb_bytes(rows, 1, sizeof *number) : 0);
    for (ptrdiff_t b = 0; arena->memory && b < a->batch; b++) {
        a->keys[b] = allowed_keys(a, b, number + b * positions, ends + b * blocks);
        a->keys[b].rows =
            (fb_panels){.data = fb_at(keys, b * positions * width, size), .n = a->keys[b].count, .k = width};
    }
    ptrdiff_t used = fb_project_rows(&(fb_projection){
        .tier = a->tier, .x = a->x, .rows = rows, .w = &params->w_k, .bias = params->b_k, .ending = FB_FINISH,
        .out = keys,
    }, *arena);
    used = fb_max(used, fb_project_rows(&(fb_projection){
        .tier = a->tier, .x = a->x, .rows = rows, .w = &params->w_q, .bias = params->b_q, .ending = FB_FINISH,
        .out = a->queries,
    }, *arena));
    const int threads = fb_threads(*arena, 2.0 * (double)rows * (double)width, a->batch);
    return fb_max(used, fb_run(look_part, a, threads, threads, *arena));
}

void fb_count_keys(const fb_attention *a, ptrdiff_t b, ptrdiff_t i, ptrdiff_t rows, ptrdiff_t *count)
{
    const fb_keys *keys = &a->keys[b];
    ptrdiff_t seen = a->causal ? fb_min(keys->count, i) : keys->count;
    while (a->causal && keys->number && seen > 0 && keys->number[seen - 1] >= i)
        seen--;
    for (ptrdiff_t r = 0; r < rows; r++) {
        while (seen < keys->count && (keys->number ? keys->number[seen] : seen) <= i + r)
            seen++;
        count[r] = seen;
    }
}

/* scores (n, cols), of the queries from `first` on, a multiple of the panel, with the keys j .. j + n, neither
 * finished nor scaled (see softmax); keys and queries together hold 2^shift times their numbers */
static void score(const fb_attention *a, const fb_keys *keys, ptrdiff_t j, ptrdiff_t n, const void *queries,
                  ptrdiff_t cols, ptrdiff_t first, int shift, void *scores, void *stage)
{
    const fb_tier *tier = a->tier;
    const ptrdiff_t size = tier->size, width = keys->rows.k;
    fb_product g = {.c_row = cols, .t_row = cols, .rows = n, .cols = cols - first, .stage = stage};
    g.c = g.t = fb_at(scores, first, size);
    ptrdiff_t e = 0;
    do { /* one block at least, so that an empty sum is +0.0 */
        g.depth = fb_min(FB_CHAIN, width - e);
        g.first = e == 0;
        g.a = fb_at(keys->rows.data, j * width + e, size);
        g.a_row = width;
        g.b = fb_at(queries, e * cols + first * g.depth, size);
        if (shift) {
            tier->lower(g.a, width, n, g.depth, stage, FB_ROW);
            g.a = stage;
            g.a_row = FB_ROW;
        }
        tier->product(&g);
        e += FB_CHAIN;
    } while (e < width);
}

ptrdiff_t fb_weigh(const fb_attention *a, ptrdiff_t b, ptrdiff_t i, ptrdiff_t rows, const ptrdiff_t *count, void *out,
                   ptrdiff_t out_row, ptrdiff_t columns, fb_arena arena)
{
    const fb_tier *tier = a->tier;
    const ptrdiff_t size = tier->size, width = a->params->w_q.n, most = FB_QUERY_PANELS * tier->panel;
    const ptrdiff_t whole = fb_min(most, fb_round_up(rows, tier->panel));
    char *scores = fb_take(&arena, fb_bytes(a->positions, whole, size));
    char *packed = fb_take(&arena, fb_bytes(width, whole, size));
    void *staged = fb_take(&arena, fb_stage_bytes(tier, fb_min(most, rows), width));
    void *stage = fb_take(&arena, fb_min(FB_ROWS, a->positions) * FB_ROW * size);
    if (!arena.memory)
        return arena.used;
    const fb_keys *keys = &a->keys[b];
    for (ptrdiff_t i0 = 0; i0 < rows; i0 += most) {
        const ptrdiff_t n = fb_min(most, rows - i0), cols = fb_round_up(n, tier->panel), first = i + i0;
        fb_left queries = {fb_at(a->queries, (b * a->positions + first) * width, size), width, 0};
        if (keys->subnormal || width > FB_CHAIN)
            queries = fb_stage(tier, queries.at, width, n, &keys->rows, 0, staged);
        const int shift = queries.shift + keys->rows.shift;
        for (ptrdiff_t e = 0; e < width; e += FB_CHAIN)
            for (ptrdiff_t q = 0; q < n; q += tier->panel) {
                const ptrdiff_t depth = fb_min(FB_CHAIN, width - e);
                tier->pack(fb_at(queries.at, e / FB_CHAIN * n * FB_ROW + q * queries.row, size), queries.row,
                           fb_min(tier->panel, n - q), depth, fb_at(packed, e * cols + q * depth, size));
            }
        /* the keys that all queries see, then those that the first panel of them does not, ... */
        for (ptrdiff_t q = 0, j = 0, some; q < cols; q += tier->panel) {
            const ptrdiff_t end = count[i0 + fb_min(q + tier->panel, n) - 1], most_keys = fb_even(end - j, FB_ROWS);
            for (; j < end; j += some) {
                some = fb_min(most_keys, end - j);
                if (fb_stop((double)some * (double)cols * (double)(width + 32)))
                    return arena.used;
                score(a, keys, j, some, packed, cols, q, shift, fb_at(scores, j * cols, size), stage);
            }
        }
        tier->softmax(scores, cols, n, count + i0, keys->ends, a->scale, fb_at(out, i0 * out_row, size), out_row,
                      columns, a->stream);
    }
    return arena.used;
}

/* ---- attention_weights */

typedef struct weights_job {
    const fb_attention *a;
    ptrdiff_t tile, tiles; /* of each batch item */
    void *out;
} weights_job;

/* Weights of the allowed keys, to where all keys have a place. */
static void spread(const fb_keys *keys, const char *from, ptrdiff_t from_row, ptrdiff_t rows, char *to,
                   ptrdiff_t to_row, ptrdiff_t size)
{
    memset(to, 0, (size_t)(rows * to_row * size));
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t n = 0; n < keys->count; n++)
            memcpy(fb_at(to, r * to_row + keys->number[n], size), fb_at(from, r * from_row + n, size), (size_t)size);
}

/* Every parts-th tile: with causal the later ones are longer. */
static ptrdiff_t weigh_part(const void *job, fb_arena arena, int part, int parts)
{
    const weights_job *t = job;
    const fb_attention *a = t->a;
    const ptrdiff_t positions = a->positions, size = a->tier->size;
    ptrdiff_t count[MOST_QUERIES];
    char *allowed = fb_take(&arena, a->key_mask ? fb_bytes(t->tile, positions, size) : 0);
    if (!arena.memory)
        return fb_weigh(a, 0, 0, t->tile, NULL, NULL, 0, 0, arena);
    for (ptrdiff_t n = part; n < a->batch * t->tiles && !fb_stop(0); n += parts) {
        const ptrdiff_t b = n / t->tiles, i = n % t->tiles * t->tile, rows = fb_min(t->tile, positions - i);
        char *out = fb_at(t->out, (b * positions + i) * positions, size);
        fb_count_keys(a, b, i, rows, count);
        fb_weigh(a, b, i, rows, count, a->key_mask ? allowed : out, positions, a->keys[b].count, arena);
        if (a->key_mask)
            spread(&a->keys[b], allowed, positions, rows, out, positions, size);
    }
    return arena.used;
}

ptrdiff_t fb_weigh_all(const void *weighing, fb_arena arena)
{
    fb_attention a = ((const fb_weighing *)weighing)->attention;
    const ptrdiff_t rows = a.batch * a.positions, most = FB_QUERY_PANELS * a.tier->panel;
    if (rows == 0)
        return arena.used;
    const ptrdiff_t used = fb_attend(&a, &arena);
    const double work = (double)rows * (double)a.positions * (double)(a.params->w_q.n + 32);
    const int threads = fb_threads(arena, work, rows / a.tier->panel);
    weights_job t = {.a = &a, .out = ((const fb_weighing *)weighing)->out};
    t.tile = fb_min(a.positions, rows >= most * threads ? most : a.tier->panel);
    t.tiles = (a.positions + t.tile - 1) / t.tile;
    return fb_max(used, fb_run(weigh_part, &t, threads, fb_parts(threads, work, a.batch * t.tiles), arena));
}

fb_status fb_attention_weights(const fb_params *params, ptrdiff_t batch, const void *x, ptrdiff_t positions, int causal,
                               const uint8_t *key_mask, void *out)
{
    const fb_tier *tier = fb_tier_in_use(params->dtype);
    if (!tier)
        return FB_NO_TIER;
    return fb_call(fb_weigh_all, &(fb_weighing){
        .attention = {.tier = tier, .params = params, .batch = batch, .positions = positions, .x = x, .causal = causal,
                      .key_mask = key_mask,
                      .stream = !key_mask && batch * positions * positions * tier->size >= STREAMED},
        .out = out,
    });
}
