/* fb_packed.c - the layout of packed matrices: column panels, k-major, block of 256 k by block.
 *
 * B[k, j] (k < K input, j < N output) of a matrix stands at
 *     block * 256 * N' + (panel * depth + k % 256) * width + j % width,   block = k / 256, panel = j / width,
 * width = 64 bytes of columns, N' = N rounded up to whole panels, depth = rows of that block (256, the last may have
 * fewer). A panel of a block is one stream of cache lines, 16 KB, half of an L1 cache. Padding columns are +0.0.
 * fb_panels_keep_rows adds B[k, j] at k * N' + j: whole rows, for products that need few of them.
 */
#include "fb_internal.h"

#include <string.h>

enum {
    /* Bytes of a matrix whose rows are kept, too: one that an L2 holds is read as fast by panels. */
    KEEP_ROWS = 2 << 20
};

void fb_panels_fill(const fb_tier *tier, const void *w, ptrdiff_t w_row, fb_panels *out)
{
    char *panel = out->data;
    for (ptrdiff_t k0 = 0; k0 < out->k; k0 += FB_CHAIN) {
        const ptrdiff_t depth = fb_min(FB_CHAIN, out->k - k0);
        for (ptrdiff_t j = 0; j < out->n; j += tier->panel) {
            tier->pack(fb_at(w, j * w_row + k0, tier->size), w_row, fb_min(tier->panel, out->n - j), depth, panel);
            panel += depth * FB_PANEL_BYTES;
        }
    }
}

fb_status fb_panels_pack(fb_dtype dtype, const void *w, ptrdiff_t n, ptrdiff_t k, ptrdiff_t w_row, fb_panels *out)
{
    const fb_tier *tier = fb_tier_in_use(dtype);
    if (!tier)
        return FB_NO_TIER;
    const fb_fp_mode mode = fb_fp_enter();
    const ptrdiff_t padded = n <= PTRDIFF_MAX - tier->panel ? fb_round_up(n, tier->panel) : n;
    void *data = fb_alloc(padded, k, tier->size);
    if (data) {
        *out = (fb_panels){.data = data, .n = n, .k = k};
        fb_panels_fill(tier, w, w_row, out);
        fb_look_at_panels(tier, out);
    }
    fb_fp_leave(mode);
    return data ? FB_OK : FB_NO_MEMORY;
}

fb_status fb_panels_keep_rows(fb_dtype dtype, fb_panels *panels)
{
    const fb_tier *tier = fb_tier_in_use(dtype);
    if (!tier)
        return FB_NO_TIER;
    const ptrdiff_t size = tier->size, width = tier->panel, n = fb_round_up(panels->n, width), k = panels->k;
    if (!panels->finite || n * k * size < KEEP_ROWS)
        return FB_OK;
    if (!(panels->rows = fb_alloc(n, k, size)))
        return FB_NO_MEMORY;
    for (ptrdiff_t k0 = 0; k0 < k; k0 += FB_CHAIN) {
        const ptrdiff_t depth = fb_min(FB_CHAIN, k - k0);
        for (ptrdiff_t j = 0; j < n; j += width)
            tier->copy(fb_at(panels->data, k0 * n + j * depth, size), width, depth, width,
                          fb_at(panels->rows, k0 * n + j, size), n);
    }
    return FB_OK;
}

void fb_panels_unpack(fb_dtype dtype, const fb_panels *panels, void *w)
{
    const ptrdiff_t size = dtype == FB_F32 ? 4 : 8, width = FB_PANEL_BYTES / size;
    const char *p = panels->data;
    for (ptrdiff_t k0 = 0; k0 < panels->k; k0 += FB_CHAIN)
        for (ptrdiff_t j0 = 0; j0 < panels->n; j0 += width)
            for (ptrdiff_t k = k0; k < fb_min(k0 + FB_CHAIN, panels->k); k++, p += FB_PANEL_BYTES)
                for (ptrdiff_t j = j0; j < fb_min(j0 + width, panels->n); j++)
                    memcpy(fb_at(w, j * panels->k + k, size), p + (j - j0) * size, (size_t)size);
    if (panels->shift) {
        const fb_fp_mode mode = fb_fp_enter();
        for (ptrdiff_t i = 0; i < panels->n * panels->k; i++) {
            if (dtype == FB_F32)
                ((float *)w)[i] *= 0x1p-24f;
            else
                ((double *)w)[i] *= 0x1p-53;
        }
        fb_fp_leave(mode);
    }
}

void fb_panels_free(fb_panels *panels)
{
    fb_free(panels->data);
    fb_free(panels->rows);
    *panels = (fb_panels){0};
}

fb_status fb_bias_pack(fb_dtype dtype, const void *bias, ptrdiff_t n, void **out)
{
    const ptrdiff_t size = dtype == FB_F32 ? 4 : 8;
    if (n > PTRDIFF_MAX - FB_PANEL_BYTES || !(*out = fb_alloc(fb_round_up(n, FB_PANEL_BYTES / size), 1, size)))
        return FB_NO_MEMORY;
    memset(*out, 0, (size_t)(fb_round_up(n, FB_PANEL_BYTES / size) * size));
    memcpy(*out, bias, (size_t)(n * size));
    return FB_OK;
}

void fb_params_free(fb_params *params)
{
    fb_panels *panels[] = {&params->w1, &params->w2, &params->w_q, &params->w_k};
    void **biases[] = {&params->b1, &params->b2, &params->b_q, &params->b_k};
    for (int i = 0; i < 4; i++) {
        fb_panels_free(panels[i]);
        fb_free(*biases[i]);
        *biases[i] = NULL;
    }
}
