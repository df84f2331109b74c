/* fb_feed_forward.c - down_project(up_project(x)), fused: the hidden activations exist one tile at a time.
 *
 * A tile is ROWS positions x 256 hidden units; 256 is the block of the chain, so each tile gives exactly one block sum
 * of the down-projection, which is added to the totals in out. The tile (192 KB in float32) lives in L2.
 */
#include "fb_kernels.h"

enum { ROWS = 192 };

ptrdiff_t fb_feed_forward_workspace(const struct fb_kernels *k)
{
    (void)k;
    return ROWS * FB_BLOCK;
}

void fb_feed_forward_rows(const struct fb_kernels *k, const fb_params *params, const void *x, ptrdiff_t rows, void *out,
                          void *workspace)
{
    const fb_panels *w1 = &params->w1, *w2 = &params->w2;
    const ptrdiff_t features = w1->k, hidden = w1->n, padded = fb_round_up(features, k->panel);
    for (ptrdiff_t i = 0; i < rows; i += ROWS) {
        const ptrdiff_t tile_rows = fb_min(ROWS, rows - i);
        ptrdiff_t f = 0;
        do { /* one tile at least: without hidden units out is the bias */
            const ptrdiff_t depth = fb_min(FB_BLOCK, hidden - f);
            /* 1. up: h = relu(finish(x w1', b1)) for hidden units f .. f + depth */
            fb_matmul(k, fb_at(x, i * features, k->size), features, tile_rows, w1, f, depth,
                      params->b1 ? fb_at(params->b1, f, k->size) : NULL, 1, workspace, FB_BLOCK);
            /* 2. down: out += the block sum of h w2'; after the last, finish with b2 */
            k->product(&(fb_product){
                .a = workspace,
                .a_row = FB_BLOCK,
                .b = fb_at(w2->data, f * padded, k->size),
                .b_k = k->panel,
                .b_panel = depth * k->panel,
                .bias = params->b2,
                .c = fb_at(out, i * features, k->size),
                .c_row = features,
                .rows = tile_rows,
                .cols = features,
                .depth = depth,
                .first = f == 0,
                .last = f + depth == hidden,
            });
            f += FB_BLOCK;
        } while (f < hidden);
    }
}

fb_status fb_feed_forward(const fb_params *params, const void *x, ptrdiff_t rows, void *out)
{
    const struct fb_kernels *k = fb_kernels_in_use(params->dtype);
    void *workspace = fb_alloc(fb_feed_forward_workspace(k), 1, k->size);
    if (!workspace)
        return FB_NO_MEMORY;
    fb_fp_mode mode = fb_fp_enter();
    fb_feed_forward_rows(k, params, x, rows, out, workspace);
    fb_fp_leave(mode);
    fb_free(workspace);
    return FB_OK;
}
