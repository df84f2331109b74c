/* fb_matmul.c - the loops around the matmul kernel: C = finish(A B, bias) [then relu], by the one rule for sums.
 *
 * Loops are numbered as in the BLIS papers: 5 columns of C, 4 blocks of 256 k, 3 rows of C; the kernel holds 2 (panels)
 * and 1 (row tiles). A block of k is a block of the chain, so the order of the loops cannot be seen in the result.
 */
#include "fb_kernels.h"

enum {
    ROWS = 192,   /* rows x 256 k of A: 192 KB (float32), with a panel of B at home in a 512 KB L2 */
    COLUMNS = 256 /* columns per pass over A: their part of C stays in L2 between blocks of k */
};

void fb_matmul(const struct fb_kernels *k, const void *a, ptrdiff_t a_row, ptrdiff_t rows, const fb_panels *b,
               ptrdiff_t first_col, ptrdiff_t cols, const void *bias, int relu, void *c, ptrdiff_t c_row)
{
    const ptrdiff_t padded = fb_round_up(b->n, k->panel);
    for (ptrdiff_t i = 0; i < rows; i += ROWS)             /* loop 5 and loop 3: a tile of C */
        for (ptrdiff_t j = 0; j < cols; j += COLUMNS) {
            ptrdiff_t k0 = 0;
            do { /* loop 4: one block at least, so that an empty sum is +0.0 */
                const ptrdiff_t depth = fb_min(FB_BLOCK, b->k - k0);
                k->product(&(fb_product){
                    .a = fb_at(a, i * a_row + k0, k->size),
                    .a_row = a_row,
                    .b = fb_at(b->data, k0 * padded + (first_col + j) * depth, k->size),
                    .b_k = k->panel,
                    .b_panel = depth * k->panel,
                    .bias = bias ? fb_at(bias, j, k->size) : NULL,
                    .c = fb_at(c, i * c_row + j, k->size),
                    .c_row = c_row,
                    .rows = fb_min(ROWS, rows - i),
                    .cols = fb_min(COLUMNS, cols - j),
                    .depth = depth,
                    .first = k0 == 0,
                    .last = k0 + depth == b->k,
                    .relu = relu,
                });
                k0 += FB_BLOCK;
            } while (k0 < b->k);
        }
}

fb_status fb_project(fb_dtype dtype, const void *x, ptrdiff_t rows, const fb_panels *w, const void *bias, int relu,
                     void *out)
{
    fb_fp_mode mode = fb_fp_enter();
    fb_matmul(fb_kernels_in_use(dtype), x, w->k, rows, w, 0, w->n, bias, relu, out, w->n);
    fb_fp_leave(mode);
    return FB_OK;
}

/* Rows of reference.mix_positions: out (rows x features) = finish(weights (rows x positions) x (positions x features)).
 * x is packed here, 256 positions and MIX_COLUMNS features at a time; workspace: fb_mix_workspace elements. */
enum { MIX_COLUMNS = 1024 };

ptrdiff_t fb_mix_workspace(const struct fb_kernels *k, ptrdiff_t features)
{
    return FB_BLOCK * fb_round_up(fb_min(MIX_COLUMNS, features), k->panel);
}

void fb_mix_rows(const struct fb_kernels *k, const void *weights, ptrdiff_t weights_row, ptrdiff_t rows, const void *x,
                 ptrdiff_t positions, ptrdiff_t features, void *out, void *workspace)
{
    for (ptrdiff_t j = 0; j < features; j += MIX_COLUMNS) {
        const ptrdiff_t cols = fb_min(MIX_COLUMNS, features - j);
        for (ptrdiff_t k0 = 0; k0 < positions; k0 += FB_BLOCK) {
            const ptrdiff_t depth = fb_min(FB_BLOCK, positions - k0);
            fb_panels_from_rows(k, fb_at(x, k0 * features + j, k->size), features, depth, cols, workspace);
            for (ptrdiff_t i = 0; i < rows; i += ROWS)
                k->product(&(fb_product){
                    .a = fb_at(weights, i * weights_row + k0, k->size),
                    .a_row = weights_row,
                    .b = workspace,
                    .b_k = k->panel,
                    .b_panel = depth * k->panel,
                    .c = fb_at(out, i * features + j, k->size),
                    .c_row = features,
                    .rows = fb_min(ROWS, rows - i),
                    .cols = cols,
                    .depth = depth,
                    .first = k0 == 0,
                    .last = k0 + depth == positions,
                });
        }
    }
}

fb_status fb_mix_positions(fb_dtype dtype, ptrdiff_t batch, const void *weights, ptrdiff_t weights_batch, const void *x,
                           ptrdiff_t x_batch, void *out, ptrdiff_t positions, ptrdiff_t features)
{
    const struct fb_kernels *k = fb_kernels_in_use(dtype);
    void *workspace = fb_alloc(fb_mix_workspace(k, features), 1, k->size);
    if (!workspace)
        return FB_NO_MEMORY;
    fb_fp_mode mode = fb_fp_enter();
    for (ptrdiff_t b = 0; b < batch; b++)
        fb_mix_rows(k, fb_at(weights, b * weights_batch, k->size), positions, positions, fb_at(x, b * x_batch, k->size),
                    positions, features, fb_at(out, b * positions * features, k->size), workspace);
    fb_fp_leave(mode);
    fb_free(workspace);
    return FB_OK;
}

fb_status fb_bias_relu(fb_dtype dtype, const void *x, const void *bias, void *out, ptrdiff_t rows, ptrdiff_t hidden)
{
    fb_fp_mode mode = fb_fp_enter();
    fb_kernels_in_use(dtype)->bias_relu(x, bias, out, rows, hidden);
    fb_fp_leave(mode);
    return FB_OK;
}
