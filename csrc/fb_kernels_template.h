/* fb_kernels_template.h - the kernels, written once for every tier and both dtypes.
 *
 * A tier file includes its fb_simd_*.h, then this file twice, with FB_BITS 32 and 64. Parameters:
 *   FB_TIER    the tier's name, the last part of every name made here
 *   FB_BITS    32 or 64
 * and from fb_simd_*.h:
 *   FB_TILE_ROWS, FB_TILE_VECS, FB_TILE_CASES  rows of the largest register tile, its accumulators, X(r) for all rows
 *   FB_TILE_PANELS(r)                          panels that a tile of r rows spans
 *   FB_DIRECT_ROWS, FB_DIRECT_PANELS           at most so many rows of a tile, panels of a product: A where it stands
 *   FB_TILE_FUNCTION                           FB_INLINE or FB_NOINLINE: how the tiles are compiled
 *   FB_FETCH_GROUP                             panels of a tile up to which it fetches the next ones
 *   FB_FETCH_SPREAD, FB_FETCH_NEXT_A           whether it may fetch at every fourth k only, and the next A at all
 *   FB_DENSE_FROM, FB_DENSE_FEW, FB_FEW_ROWS   see fb_tier
 *   FB_SPARSE_PANELS(r)                        panels at a time in a sparse product of r rows
 *   FB_MOST_PANELS, FB_PANEL_CASES             the most of these, X(n) for all of them
 * Each kernel's comment names the function of fastblock/reference.py that defines its bits.
 */
#include "fb_real_begin.h"
#define FB_STRIP 16 /* k between two looks at what is left */
#define FB_EXP_VECS 4 /* vectors side by side in exp, for each step waits for the one before */

#include "fb_kernel_copy.h"
#include "fb_kernel_product.h"
#include "fb_kernel_sparse.h"
#include "fb_kernel_exp.h"
#include "fb_kernel_rows.h"

static const fb_tier FN(kernels) = {
    .name = FB_STR(FB_TIER),
    .size = sizeof(REAL),
    .panel = FB_PANEL_BYTES / sizeof(REAL),
    .lanes = LANES,
    .shift = FRACTION + 1,
    .infinity = (1 << (FB_BITS - 1 - FRACTION)) - 1,
    .direct = FB_DIRECT_PANELS * (FB_PANEL_BYTES / sizeof(REAL)),
    .dense_from = FB_DENSE_FROM,
    .dense_few = FB_DENSE_FEW,
    .few_rows = FB_FEW_ROWS,
    .copy = FN(copy),
    .pack = FN(pack),
    .pack_rows = FN(pack_rows),
    .product = FN(product),
    .sample = FN(sample),
    .compress = FN(compress),
    .product_sparse = FN(product_sparse),
    .product_rows = FN(product_rows),
    .product_small = FN(product_small),
    .bias_relu = FN(bias_relu),
    .softmax = FN(softmax),
    .touch = FN(touch),
    .range = FN(range),
    .raise = FN(raise),
    .lower = FN(lower),
    .fma = FN(fma),
    .exp = FN(exp),
    .fma_chains = FN(fma_chains),
};

#undef FB_STRIP
#undef FB_EXP_VECS
#include "fb_real_end.h"
