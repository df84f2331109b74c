/* fb_attention.c - attention_weights: keys, projected and packed, then queries, scores and softmax, tile by tile.
 *
 * A masked key takes no part in anything, so it is left out of the packed keys altogether: scores exist for allowed
 * keys only, in key order, and `ends` remembers where the blocks of the original key numbers end. With causal, a tile
 * of queries meets the keys up to its last query only, and in the product a tile of rows those up to its last row.
 */
#include "fb_internal.h"

#include <math.h>
#include <string.h>

enum {
    QUERIES = 48,      /* rows of a tile at most */
    SCORES = 1 << 19,  /* bytes of its scores, which stay in L2 */
    STREAMED = 8 << 20 /* bytes of all weights from which on they go past the caches (12 x 512 x 512: 1.07 times as fast) */
};

typedef struct attention_job {
    const fb_attending *a;
    ptrdiff_t tile, tiles, scores_row; /* tiles of each batch item */
    double scale;
    char *keys;            /* (batch, P, E) */
    fb_panels *packed;     /* of each batch item: its allowed keys */
    ptrdiff_t *key, *ends; /* of each batch item: the numbers of its allowed keys, and where the blocks end */
} attention_job;

static ptrdiff_t blocks_of(ptrdiff_t positions)
{
    return positions / FB_CHAIN + 1;
}

/* Pass 2, one batch item: drop the masked keys and pack the others. ends[i]: how many have a number < 256 (i + 1). */
static void pack_keys(const attention_job *t, ptrdiff_t b)
{
    const fb_attending *a = t->a;
    const ptrdiff_t positions = a->positions, width = a->params->w_k.n, size = a->tier->size;
    const uint8_t *mask = a->key_mask ? a->key_mask + b * positions : NULL;
    ptrdiff_t *key = t->key + b * positions, *ends = t->ends + b * blocks_of(positions), n = 0;
    char *keys = fb_at(t->keys, b * positions * width, size);
    for (ptrdiff_t j = 0; j < positions; j++) {
        if (!mask || mask[j]) {
            if (n != j)
                memcpy(fb_at(keys, n * width, size), fb_at(keys, j * width, size), (size_t)(width * size));
            key[n++] = j;
        }
        if (j % FB_CHAIN == FB_CHAIN - 1)
            *ends++ = n;
    }
    *ends = PTRDIFF_MAX; /* the open last block */
    t->packed[b].n = n;
    fb_panels_fill(a->tier, keys, width, &t->packed[b]);
    fb_look_at_panels(a->tier, &t->packed[b]);
}

static ptrdiff_t pack_part(const void *job, fb_arena arena, int part, int parts)
{
    const attention_job *t = job;
    for (ptrdiff_t b = part; arena.memory && b < t->a->batch; b += parts)
        pack_keys(t, b);
    return arena.used;
}

/* Pass 3, one tile of queries: the queries, scores of the keys they may see, neither finished nor scaled (see
 * softmax), and softmax. */
static ptrdiff_t weigh(const attention_job *t, ptrdiff_t b, ptrdiff_t i, fb_arena arena)
{
    const fb_attending *a = t->a;
    const fb_tier *tier = a->tier;
    const fb_panels *w_q = &a->params->w_q;
    const void *b_q = a->params->b_q;
    const ptrdiff_t positions = a->positions, size = tier->size, width = w_q->n, rows = fb_min(t->tile, positions - i);
    void *scores = fb_take(&arena, fb_bytes(fb_round_up(t->tile, FB_SOFTMAX_ROWS), t->scores_row, size));
    void *queries = fb_take(&arena, fb_stage_bytes(tier, t->tile, width));
    void *stage = fb_take(&arena, fb_stage_bytes(tier, t->tile, w_q->k));
    const fb_panels keys = {.n = positions, .k = width};
    void *lowered = fb_take(&arena, fb_max(fb_lowered_bytes(tier, w_q), fb_lowered_bytes(tier, &keys)));
    if (!arena.memory || fb_stop((double)rows * (double)positions * (double)(width + 32)))
        return arena.used;
    const ptrdiff_t *key = t->key + b * positions, *ends = t->ends + b * blocks_of(positions);
    const ptrdiff_t allowed = t->packed[b].n;
    char *out = fb_at(a->out, (b * positions + i) * positions, size);
    ptrdiff_t count[QUERIES], seen = allowed;
    if (a->causal)
        for (seen = fb_min(allowed, i); seen > 0 && key[seen - 1] >= i;)
            seen--;
    for (ptrdiff_t r = 0; r < rows; r++) {
        while (seen < allowed && key[seen] <= i + r)
            seen++;
        count[r] = seen;
    }
    const fb_left x = fb_stage(tier, fb_at(a->x, (b * positions + i) * w_q->k, size), w_q->k, rows, w_q, width, stage);
    for (ptrdiff_t e = 0; e < width; e += FB_CHAIN)
        fb_matmul(tier, &(fb_product){
            .a = x.at,
            .a_row = x.row,
            .bias = b_q ? fb_at(b_q, e, size) : NULL,
            .c = fb_at(queries, e * rows / FB_CHAIN * FB_ROW, size),
            .c_row = FB_ROW,
            .rows = rows,
            .cols = fb_min(FB_CHAIN, width - e),
            .first_col = e,
            .shift = x.shift,
            .lowered = lowered,
        }, w_q, FB_FINISH);
    const fb_left left = fb_fit(tier, (fb_left){queries, FB_ROW, 0}, rows, &t->packed[b], queries);
    fb_matmul(tier, &(fb_product){
        .a = queries,
        .a_row = FB_ROW,
        .shift = left.shift,
        .lowered = lowered,
        .c = scores,
        .c_row = t->scores_row,
        .rows = rows,
        .cols = seen,
        .wanted = a->causal ? count : NULL,
    }, &t->packed[b], FB_SUMS);
    if (allowed == positions) {
        tier->softmax(scores, t->scores_row, out, positions, rows, positions, count, ends, t->scale, a->stream);
        return arena.used;
    }
    tier->softmax(scores, t->scores_row, scores, t->scores_row, rows, allowed, count, ends, t->scale, 0);
    memset(out, 0, (size_t)(rows * positions * size));
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t j = 0; j < count[r]; j++)
            memcpy(fb_at(out, r * positions + key[j], size), fb_at(scores, r * t->scores_row + j, size), (size_t)size);
    return arena.used;
}

/* Every parts-th tile: with causal the later ones are longer. */
static ptrdiff_t weigh_part(const void *job, fb_arena arena, int part, int parts)
{
    const attention_job *t = job;
    if (!arena.memory)
        return weigh(t, 0, 0, arena);
    for (ptrdiff_t n = part; n < t->a->batch * t->tiles; n += parts)
        weigh(t, n / t->tiles, n % t->tiles * t->tile, arena);
    return arena.used;
}

ptrdiff_t fb_attend(const void *attending, fb_arena arena)
{
    const fb_attending *a = attending;
    const fb_tier *tier = a->tier;
    const fb_params *params = a->params;
    const ptrdiff_t batch = a->batch, positions = a->positions, rows = batch * positions;
    const ptrdiff_t width = params->w_q.n, features = params->w_q.k, padded = fb_round_up(positions, tier->panel);
    if (rows == 0)
        return arena.used;
    const double root = 1.0 / sqrt((double)width);
    const double work = (double)rows * ((double)positions * (double)(width + 32) + 2.0 * (double)width * (double)features);
    const int threads = fb_threads(arena, work, rows);
    attention_job t = {.a = a, .scale = params->dtype == FB_F32 ? (float)root : root};
    t.scores_row = padded + tier->panel; /* not a power of two: rows in different cache sets */
    t.tile = fb_max(8, fb_min(fb_min(QUERIES, SCORES / (t.scores_row * tier->size)), (rows + threads - 1) / threads));
    t.tile = fb_min(t.tile, fb_stage_rows(tier, t.tile, features));
    t.tiles = (positions + t.tile - 1) / t.tile;
    t.keys = fb_take(&arena, fb_bytes(rows, width, tier->size));
    t.packed = fb_take(&arena, fb_bytes(batch, 1, sizeof *t.packed));
    t.key = fb_take(&arena, fb_bytes(rows, 1, sizeof *t.key));
    t.ends = fb_take(&arena, fb_bytes(batch, blocks_of(positions), sizeof *t.ends));
    char *panels = fb_take(&arena, fb_bytes(batch * padded, width, tier->size));
    for (ptrdiff_t b = 0; arena.memory && b < batch; b++)
        t.packed[b] = (fb_panels){.data = fb_at(panels, b * padded * width, tier->size), .k = width};
    /* 1. keys */
    ptrdiff_t used = fb_project_rows(&(fb_projection){
        .tier = tier, .x = a->x, .rows = rows, .w = &params->w_k, .bias = params->b_k, .ending = FB_FINISH, .out = t.keys,
    }, arena);
    /* 2. the allowed keys, packed */
    used = fb_max(used, fb_run(pack_part, &t, threads, (int)fb_min(threads, batch), arena));
    /* 3. queries, scores and softmax */
    return fb_max(used, fb_run(weigh_part, &t, threads, fb_parts(threads, work, batch * t.tiles), arena));
}

fb_status fb_attention_weights(const fb_params *params, ptrdiff_t batch, const void *x, ptrdiff_t positions, int causal,
                               const uint8_t *key_mask, void *out)
{
    const fb_tier *tier = fb_tier_in_use(params->dtype);
    if (!tier)
        return FB_NO_TIER;
    return fb_call(fb_attend, &(fb_attending){
        .tier = tier, .params = params, .batch = batch, .positions = positions, .x = x, .causal = causal, .key_mask = key_mask,
        .out = out, .stream = batch * positions * positions * tier->size >= STREAMED,
    });
}
