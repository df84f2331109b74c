/* fb_attention.c - attention_weights: projections, scores, softmax, in numbered passes over tiles of queries.
 *
 * A masked key takes no part in anything, so it is left out of the packed keys altogether: scores exist for allowed
 * keys only, in key order, and `ends` remembers where the blocks of the original key numbers end.
 */
#include "fb_kernels.h"

#include <math.h>
#include <string.h>

enum { QUERIES = 48 }; /* rows of scores at a time */

/* The allowed keys of one batch item, in order; returns their number. ends[b]: how many have a number < 256 (b + 1). */
static ptrdiff_t allowed_keys(const uint8_t *mask, ptrdiff_t positions, ptrdiff_t *key, ptrdiff_t *ends)
{
    ptrdiff_t n = 0;
    for (ptrdiff_t j = 0; j < positions; j++) {
        if (!mask || mask[j])
            key[n++] = j;
        if (j % FB_BLOCK == FB_BLOCK - 1)
            *ends++ = n;
    }
    *ends = PTRDIFF_MAX; /* the open last block */
    return n;
}

fb_status fb_attention_weights(const fb_params *params, ptrdiff_t batch, const void *x, ptrdiff_t positions, int causal,
                               const uint8_t *key_mask, void *out)
{
    const struct fb_kernels *k = fb_kernels_in_use(params->dtype);
    const ptrdiff_t size = k->size, features = params->w_q.k, width = params->w_q.n;
    const ptrdiff_t scores_row = fb_round_up(positions, k->panel);
    const double root = 1.0 / sqrt((double)width);
    const double scale = params->dtype == FB_F32 ? (float)root : root;
    fb_status status = FB_NO_MEMORY;
    fb_panels packed = {0};
    void *q = fb_alloc(positions, width, size), *keys = fb_alloc(positions, width, size);
    void *scores = fb_alloc(QUERIES, scores_row, size);
    ptrdiff_t *key = fb_alloc(positions, 1, sizeof *key), *ends = fb_alloc(positions / FB_BLOCK + 1, 1, sizeof *ends);
    fb_fp_mode mode = fb_fp_enter();
    if (!q || !keys || !scores || !key || !ends)
        goto done;
    for (ptrdiff_t b = 0; b < batch; b++) {
        const void *x_b = fb_at(x, b * positions * features, size);
        char *out_b = fb_at(out, b * positions * positions, size);
        const ptrdiff_t allowed = allowed_keys(key_mask ? key_mask + b * positions : NULL, positions, key, ends);

        /* 1. queries and keys; masked keys are dropped */
        fb_matmul(k, x_b, features, positions, &params->w_q, 0, width, params->b_q, 0, q, width);
        fb_matmul(k, x_b, features, positions, &params->w_k, 0, width, params->b_k, 0, keys, width);
        for (ptrdiff_t j = 0; j < allowed; j++)
            if (key[j] != j)
                memcpy(fb_at(keys, j * width, size), fb_at(keys, key[j] * width, size), (size_t)(width * size));
        fb_panels_free(&packed);
        if (fb_panels_pack(params->dtype, keys, allowed, width, width, &packed))
            goto done;

        ptrdiff_t seen = 0; /* allowed keys up to the current position */
        for (ptrdiff_t i = 0; i < positions; i += QUERIES) {
            const ptrdiff_t rows = fb_min(QUERIES, positions - i);
            ptrdiff_t count[QUERIES];
            for (ptrdiff_t r = 0; r < rows; r++) {
                while (seen < allowed && key[seen] <= i + r)
                    seen++;
                count[r] = causal ? seen : allowed;
            }
            /* 2. scores of these queries with the keys they may see, finished but not yet scaled */
            fb_matmul(k, fb_at(q, i * width, size), width, rows, &packed, 0, count[rows - 1], NULL, 0, scores, scores_row);
            /* 3. softmax; where keys were dropped, spread the weights over the original keys */
            if (allowed == positions) {
                k->softmax(scores, scores_row, out_b + i * positions * size, positions, rows, positions, count, ends,
                           scale);
            } else {
                k->softmax(scores, scores_row, scores, scores_row, rows, allowed, count, ends, scale);
                for (ptrdiff_t r = 0; r < rows; r++) {
                    char *out_row = out_b + (i + r) * positions * size;
                    memset(out_row, 0, (size_t)(positions * size));
                    for (ptrdiff_t j = 0; j < count[r]; j++)
                        memcpy(out_row + key[j] * size, fb_at(scores, r * scores_row + j, size), (size_t)size);
                }
            }
        }
    }
    status = FB_OK;
done:
    fb_fp_leave(mode);
    fb_panels_free(&packed);
    fb_free(ends);
    fb_free(key);
    fb_free(scores);
    fb_free(keys);
    fb_free(q);
    return status;
}
