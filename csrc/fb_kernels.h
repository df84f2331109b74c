/* fb_kernels.h - what a tier offers to the loops above it: one table of kernels a dtype.
 *
 * The loops (fb_matmul.c, fb_feed_forward.c, fb_attention.c) are written once for all tiers and both dtypes: they
 * see elements of k->size bytes and never look inside them. The kernels are written once in fb_kernels_template.h.
 */
#ifndef FB_KERNELS_H
#define FB_KERNELS_H

#include "fastblock.h"
#include "fb_base.h"

/* The tiers, best first. This list makes the declarations, the dispatch and isas(). */
#define FB_TIERS(X) X(avx512) X(avx2) X(neon) X(portable)

enum {
    FB_BLOCK = 256,      /* the contract's block of k, and the depth of one pass of the matmul kernel */
    FB_PANEL_BYTES = 64, /* a panel is 16 float or 8 double columns: one cache line a k, in every tier */
};

/* One block of k of a matrix product, C (rows x cols) from A (rows x depth) and B (depth x cols):
 *     s = chain of fma over k;  t = first ? s : C + s;  C = last ? finish(t, bias) [then relu] : t
 * A[i,k] = a[i*a_row + k];  B[k, j] = b[(j / panel)*b_panel + k*b_k + j % panel];  C[i,j] = c[i*c_row + j].
 * B is read in whole panels, bias in whole panels too; C is written in cols columns only. */
typedef struct fb_product {
    const void *a, *b, *bias; /* bias NULL: +0.0 */
    void *c;
    ptrdiff_t a_row, b_k, b_panel, c_row; /* in elements */
    ptrdiff_t rows, cols, depth;          /* depth <= FB_BLOCK */
    int first, last, relu;
} fb_product;

struct fb_kernels {
    const char *tier;
    ptrdiff_t size;  /* bytes of an element */
    ptrdiff_t panel; /* columns of a panel: FB_PANEL_BYTES / size */
    void (*product)(const fb_product *);
    /* out[i,j] = relu(finish(x[i,j], bias[j])) */
    void (*bias_relu)(const void *x, const void *bias, void *out, ptrdiff_t rows, ptrdiff_t cols);
    /* Softmax of `rows` rows of raw scores, scaled: row i over its first count[i] scores; out[i, count[i]:width] = +0.0.
     * ends[] holds, ascending and closed by width, where the blocks of the chain end. The scores are destroyed. */
    void (*softmax)(void *scores, ptrdiff_t scores_row, void *out, ptrdiff_t out_row, ptrdiff_t rows, ptrdiff_t width,
                    const ptrdiff_t *count, const ptrdiff_t *ends, double scale);
    int (*all_finite)(const void *x, ptrdiff_t n);
    /* the primitives, elementwise: what the tests compare with the reference */
    void (*fma)(const void *a, const void *b, const void *c, void *out, ptrdiff_t n);
    void (*exp)(const void *x, void *out, ptrdiff_t n);
};

#define FB_DECLARE_TIER(tier) extern const struct fb_kernels *const fb_kernels_##tier[2]; /* by fb_dtype; NULL: not compiled */
FB_TIERS(FB_DECLARE_TIER)
#undef FB_DECLARE_TIER

/* fb_dispatch.c: the kernels of the tier in use */
const struct fb_kernels *fb_kernels_in_use(fb_dtype dtype);

/* fb_pack.c: 64-byte-aligned memory for rows x cols elements, NULL if that overflows or cannot be had; fb_free frees it */
void *fb_alloc(ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t size);
/* Pack rows of B as they are, k-major: B[k, j] = x[k*x_row + j], k < depth, j < cols, into panels of one block. */
void fb_panels_from_rows(const struct fb_kernels *k, const void *x, ptrdiff_t x_row, ptrdiff_t depth, ptrdiff_t cols,
                         void *panels);

/* fb_matmul.c: C (rows x cols) = finish(A B, bias) [then relu] where B is columns first_col .. first_col + cols of a
 * packed matrix; first_col is a multiple of the panel, bias starts at column first_col. */
void fb_matmul(const struct fb_kernels *k, const void *a, ptrdiff_t a_row, ptrdiff_t rows, const fb_panels *b,
               ptrdiff_t first_col, ptrdiff_t cols, const void *bias, int relu, void *c, ptrdiff_t c_row);
/* The loops inside fb_mix_positions and fb_feed_forward, for callers with the mode set and a workspace at hand. */
ptrdiff_t fb_mix_workspace(const struct fb_kernels *k, ptrdiff_t features);
void fb_mix_rows(const struct fb_kernels *k, const void *weights, ptrdiff_t weights_row, ptrdiff_t rows, const void *x,
                 ptrdiff_t positions, ptrdiff_t features, void *out, void *workspace);
ptrdiff_t fb_feed_forward_workspace(const struct fb_kernels *k);
void fb_feed_forward_rows(const struct fb_kernels *k, const fb_params *params, const void *x, ptrdiff_t rows, void *out,
                          void *workspace);

FB_INLINE ptrdiff_t fb_min(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
FB_INLINE ptrdiff_t fb_round_up(ptrdiff_t n, ptrdiff_t to) { return (n + to - 1) / to * to; }
FB_INLINE void *fb_at(const void *base, ptrdiff_t elements, ptrdiff_t size) { return (char *)base + elements * size; }

#endif
