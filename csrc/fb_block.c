/* fb_block.c - the block, line for line reference.block: attention weights, mixing, feed-forward.
 *
 * The mixed positions exist one tile at a time, like the hidden activations.
 */
#include "fb_kernels.h"

enum { ROWS = 192 };

fb_status fb_block(const fb_params *params, ptrdiff_t batch, const void *x, ptrdiff_t x_batch, ptrdiff_t positions,
                   const void *weights, ptrdiff_t weights_batch, int causal, const uint8_t *key_mask, void *out)
{
    const struct fb_kernels *k = fb_kernels_in_use(params->dtype);
    const ptrdiff_t size = k->size, features = params->w1.k;
    fb_status status = FB_NO_MEMORY;
    void *own = weights ? NULL : fb_alloc(positions, positions, size);
    void *z = fb_alloc(fb_min(ROWS, positions), features, size);
    void *mix_workspace = fb_alloc(fb_mix_workspace(k, features), 1, size);
    void *ff_workspace = fb_alloc(fb_feed_forward_workspace(k), 1, size);
    fb_fp_mode mode = fb_fp_enter();
    if ((!weights && !own) || !z || !mix_workspace || !ff_workspace)
        goto done;
    for (ptrdiff_t b = 0; b < batch; b++) {
        const void *x_b = fb_at(x, b * x_batch, size), *a = fb_at(weights, b * weights_batch, size);
        if (!weights) {
            a = own;
            if (fb_attention_weights(params, 1, x_b, positions, causal, key_mask ? key_mask + b * positions : NULL, own))
                goto done;
        }
        for (ptrdiff_t i = 0; i < positions; i += ROWS) {
            const ptrdiff_t rows = fb_min(ROWS, positions - i);
            fb_mix_rows(k, fb_at(a, i * positions, size), positions, rows, x_b, positions, features, z, mix_workspace);
            fb_feed_forward_rows(k, params, z, rows, fb_at(out, (b * positions + i) * features, size), ff_workspace);
        }
    }
    status = FB_OK;
done:
    fb_fp_leave(mode);
    fb_free(ff_workspace);
    fb_free(mix_workspace);
    fb_free(z);
    fb_free(own);
    return status;
}
