/* fb_attention.c - attention_weights: keys, projected and packed, then queries, scores and softmax, tile by tile.
 *
 * A masked key takes no part in anything, so it is left out of the packed keys altogether: scores exist for allowed
 * keys only, in key order, and `ends` remembers where the blocks of the original key numbers end. With causal, a tile
 * of queries meets the keys up to its last query only, and in the product a tile of rows those up to its last row.
 */
#include "fb_kernels.h"

#include <math.h>
#include <string.h>

enum {
    QUERIES = 48,      /* rows of a tile at most */
    SCORES = 1 << 19,  /* bytes of its scores, which stay in L2 */
    STREAMED = 8 << 20 /* bytes of all weights from which on they go past the caches (12 x 512 x 512: 1.07 times as fast) */
};

typedef struct attention_task {
    const struct fb_kernels *k;
    const fb_params *params;
    ptrdiff_t batch, positions, tile, tiles, scores_row; /* tiles of each batch item */
    const uint8_t *key_mask;
    int causal, stream;
    double scale;
    const char *x;          /* (batch, P, D) */
    char *keys, *out;       /* (batch, P, E), (batch, P, P) */
    fb_panels *packed;      /* of each batch item: its allowed keys */
    ptrdiff_t *key, *ends;  /* of each batch item: the numbers of its allowed keys, and where the blocks end */
    char *workspace;        /* of each thread: scores, queries as staged, positions as staged */
    ptrdiff_t workspace_bytes, scores_bytes, queries_bytes;
    fb_status *status; /* of each thread */
} attention_task;

static ptrdiff_t blocks_of(ptrdiff_t positions)
{
    return positions / FB_BLOCK + 1;
}

/* Pass 2, one batch item: drop the masked keys and pack the others. ends[i]: how many have a number < 256 (i + 1). */
static fb_status pack_keys(const attention_task *t, ptrdiff_t b)
{
    const ptrdiff_t width = t->params->w_k.n, size = t->k->size;
    const uint8_t *mask = t->key_mask ? t->key_mask + b * t->positions : NULL;
    ptrdiff_t *key = t->key + b * t->positions, *ends = t->ends + b * blocks_of(t->positions), n = 0;
    char *keys = fb_at(t->keys, b * t->positions * width, size);
    for (ptrdiff_t j = 0; j < t->positions; j++) {
        if (!mask || mask[j]) {
            if (n != j)
                memcpy(fb_at(keys, n * width, size), fb_at(keys, j * width, size), (size_t)(width * size));
            key[n++] = j;
        }
        if (j % FB_BLOCK == FB_BLOCK - 1)
            *ends++ = n;
    }
    *ends = PTRDIFF_MAX; /* the open last block */
    return fb_panels_pack(t->params->dtype, keys, n, width, width, &t->packed[b]);
}

static void pack_part(void *context, int thread, int part, int parts)
{
    const attention_task *t = context;
    for (ptrdiff_t b = part; b < t->batch; b += parts)
        if (pack_keys(t, b))
            t->status[thread] = FB_NO_MEMORY;
}

/* Pass 3, one tile of queries: the queries, scores of the keys they may see, neither finished nor scaled (see
 * softmax), and softmax. */
static void weigh(const attention_task *t, ptrdiff_t b, ptrdiff_t i, void *scores)
{
    const struct fb_kernels *k = t->k;
    const fb_panels *w_q = &t->params->w_q;
    const void *b_q = t->params->b_q;
    const ptrdiff_t size = k->size, width = w_q->n, rows = fb_min(t->tile, t->positions - i);
    const ptrdiff_t *key = t->key + b * t->positions, *ends = t->ends + b * blocks_of(t->positions);
    const ptrdiff_t allowed = t->packed[b].n;
    char *out = fb_at(t->out, (b * t->positions + i) * t->positions, size);
    ptrdiff_t count[QUERIES], seen = allowed;
    if (t->causal)
        for (seen = fb_min(allowed, i); seen > 0 && key[seen - 1] >= i;)
            seen--;
    for (ptrdiff_t r = 0; r < rows; r++) {
        while (seen < allowed && key[seen] <= i + r)
            seen++;
        count[r] = seen;
    }
    char *queries = (char *)scores + t->scores_bytes, *stage = queries + t->queries_bytes;
    const fb_left x = fb_stage(k, fb_at(t->x, (b * t->positions + i) * w_q->k, size), w_q->k, rows, w_q->k, width, stage);
    for (ptrdiff_t e = 0; e < width; e += FB_BLOCK)
        fb_matmul(k, &(fb_product){
            .a = x.at,
            .a_row = x.row,
            .bias = b_q ? fb_at(b_q, e, size) : NULL,
            .c = fb_at(queries, e * rows / FB_BLOCK * FB_ROW, size),
            .c_row = FB_ROW,
            .rows = rows,
            .cols = fb_min(FB_BLOCK, width - e),
            .first_col = e,
        }, w_q, FB_FINISH);
    fb_matmul(k, &(fb_product){
        .a = queries,
        .a_row = FB_ROW,
        .c = scores,
        .c_row = t->scores_row,
        .rows = rows,
        .cols = seen,
        .wanted = t->causal ? count : NULL,
    }, &t->packed[b], FB_SUMS);
    if (allowed == t->positions) {
        k->softmax(scores, t->scores_row, out, t->positions, rows, t->positions, count, ends, t->scale, t->stream);
        return;
    }
    k->softmax(scores, t->scores_row, scores, t->scores_row, rows, allowed, count, ends, t->scale, 0);
    memset(out, 0, (size_t)(rows * t->positions * size));
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t j = 0; j < count[r]; j++)
            memcpy(fb_at(out, r * t->positions + key[j], size), fb_at(scores, r * t->scores_row + j, size), (size_t)size);
}

/* Every parts-th tile: with causal the later ones are longer. */
static void weigh_part(void *context, int thread, int part, int parts)
{
    const attention_task *t = context;
    for (ptrdiff_t n = part; n < t->batch * t->tiles; n += parts)
        weigh(t, n / t->tiles, n % t->tiles * t->tile, t->workspace + thread * t->workspace_bytes);
}

fb_status fb_attend(const fb_params *params, ptrdiff_t batch, const void *x, ptrdiff_t positions, int causal,
                    const uint8_t *key_mask, void *out, int stream)
{
    const struct fb_kernels *k = fb_kernels_in_use(params->dtype);
    const ptrdiff_t width = params->w_q.n, features = params->w_q.k, rows = batch * positions;
    if (rows == 0)
        return FB_OK;
    const double root = 1.0 / sqrt((double)width);
    const double work = (double)rows * ((double)positions * (double)(width + 32) + 2.0 * (double)width * (double)features);
    const int threads = fb_threads(work, rows);
    attention_task t = {.k = k, .params = params, .x = x, .batch = batch, .positions = positions, .key_mask = key_mask,
                        .causal = causal, .stream = stream, .scale = params->dtype == FB_F32 ? (float)root : root, .out = out};
    fb_status status = FB_NO_MEMORY, thread_status[FB_MAX_THREADS] = {FB_OK};
    t.status = thread_status;
    t.scores_row = fb_round_up(positions, k->panel) + k->panel; /* not a power of two: rows in different cache sets */
    t.tile = fb_max(8, fb_min(fb_min(QUERIES, SCORES / (t.scores_row * k->size)), (rows + threads - 1) / threads));
    t.tile = fb_min(t.tile, fb_stage_rows(k, t.tile, features));
    t.tiles = (positions + t.tile - 1) / t.tile;
    t.scores_bytes = fb_round_up(t.tile, FB_SOFTMAX_ROWS) * t.scores_row * k->size;
    t.queries_bytes = fb_round_up(fb_stage_bytes(k, t.tile, width), 64);
    t.workspace_bytes = fb_round_up(t.scores_bytes + t.queries_bytes + fb_stage_bytes(k, t.tile, features), 64);
    t.keys = fb_alloc(rows, width, k->size);
    t.packed = fb_alloc(batch, 1, sizeof *t.packed);
    t.key = fb_alloc(rows, 1, sizeof *t.key);
    t.ends = fb_alloc(batch, blocks_of(positions), sizeof *t.ends);
    t.workspace = fb_alloc(threads, t.workspace_bytes, 1);
    if (t.keys && t.packed && t.key && t.ends && t.workspace) {
        fb_fp_mode mode = fb_fp_enter();
        memset(t.packed, 0, (size_t)batch * sizeof *t.packed);
        /* 1. keys */
        status = fb_project_rows(k, x, rows, &params->w_k, params->b_k, FB_FINISH, t.keys);
        /* 2. the allowed keys, packed */
        if (status == FB_OK)
            fb_parallel(pack_part, &t, threads, (int)fb_min(threads, batch));
        for (int i = 0; i < threads; i++)
            status = thread_status[i] ? thread_status[i] : status;
        /* 3. queries, scores and softmax */
        if (status == FB_OK)
            fb_parallel(weigh_part, &t, threads, fb_parts(threads, work, batch * t.tiles));
        fb_fp_leave(mode);
        for (ptrdiff_t b = 0; b < batch; b++)
            fb_panels_free(&t.packed[b]);
    }
    fb_free(t.workspace);
    fb_free(t.ends);
    fb_free(t.key);
    fb_free(t.packed);
    fb_free(t.keys);
    return status;
}

fb_status fb_attention_weights(const fb_params *params, ptrdiff_t batch, const void *x, ptrdiff_t positions, int causal,
                               const uint8_t *key_mask, void *out)
{
    const ptrdiff_t size = fb_kernels_in_use(params->dtype)->size;
    return fb_attend(params, batch, x, positions, causal, key_mask, out, batch * positions * positions * size >= STREAMED);
}
