/* fb_subnormal.c - products whose operands hold subnormal numbers, at the speed of the others.
 *
 * An x86 core takes 15 to 100 times as long for a fused multiply-add of a subnormal number. A B is A 2^s times B 2^-s,
 * for the products are the same real numbers and each is rounded with its sum only: exact where scaling an operand
 * rounds nothing, which is so if whatever is not 0 comes out normal. `shift` of an operand says that it holds 2^shift
 * times its numbers; s is -tier->shift, 0 or tier->shift, with which the smallest subnormal number becomes normal.
 *
 * Weights are scaled up when they are packed, and then the left operand is scaled down where it is laid out. A left
 * operand scaled up meets a copy of a few panels at a time, scaled down. Where the exponents leave no room, or sums are
 * subnormal, it takes its time; small products are not looked at, and others touched first: one operation a vector,
 * after which the CPU says whether it met a subnormal number.
 */
#include "fb_internal.h"

#include <limits.h>

/* Multiply-adds of a product below which looking takes longer than what it could save, usually. */
static const double LOOK_WORK = 50000;

enum { LOWERED_PANELS = 4 }; /* of a block, in L1 and L2 */

static fb_range range_of(const fb_tier *tier, fb_left a, ptrdiff_t rows, ptrdiff_t depth)
{
    fb_range range = {.low = INT_MAX};
    for (ptrdiff_t k0 = 0; k0 < depth; k0 += FB_CHAIN)
        tier->range(fb_at(a.at, k0 / FB_CHAIN * rows * FB_ROW, tier->size), a.row, rows, fb_min(FB_CHAIN, depth - k0),
                    &range);
    return range;
}

static fb_range range_of_panels(const fb_tier *tier, const fb_panels *b)
{
    fb_range range = {.low = INT_MAX};
    tier->range(b->data, 0, 1, fb_round_up(b->n, tier->panel) * b->k, &range);
    return range;
}

void fb_look_at(const fb_tier *tier, fb_panels *b, ptrdiff_t elements)
{
    b->range = (fb_range){.low = INT_MAX};
    tier->range(b->data, 0, 1, elements, &b->range);
    b->finite = b->range.high < tier->infinity;
    b->shift = 0;
    /* those that fit into a panel are for product_small, which takes them as they are */
    if (b->range.low == 0 && b->range.high + tier->shift < tier->infinity && fb_max(b->n, b->k) > tier->panel) {
        tier->raise(b->data, 0, 1, elements, b->data, 0);
        b->shift = tier->shift;
    }
}

void fb_look_at_panels(const fb_tier *tier, fb_panels *b)
{
    fb_look_at(tier, b, fb_round_up(b->n, tier->panel) * b->k);
}

static fb_left scaled(const fb_tier *tier, fb_left a, ptrdiff_t rows, ptrdiff_t depth, int shift, void *to)
{
    for (ptrdiff_t k0 = 0; k0 < depth; k0 += FB_CHAIN) {
        const ptrdiff_t block = k0 / FB_CHAIN * rows * FB_ROW;
        (shift > 0 ? tier->raise : tier->lower)(fb_at(a.at, block, tier->size), a.row, rows,
                                                fb_min(FB_CHAIN, depth - k0), fb_at(to, block, tier->size), FB_ROW);
    }
    return (fb_left){to, FB_ROW, shift};
}

/* Whether a left operand is to be looked at: b was scaled, or it has subnormal numbers itself, and slows its product
 * down. */
static int worth_looking(const fb_tier *tier, fb_left a, ptrdiff_t rows, const fb_panels *b)
{
    if (b->shift)
        return 1;
    if ((double)rows * (double)b->k * (double)b->n < LOOK_WORK)
        return 0;
    fb_fp_forget_subnormals();
    for (ptrdiff_t k0 = 0; k0 < b->k; k0 += FB_CHAIN)
        tier->touch(fb_at(a.at, k0 / FB_CHAIN * rows * FB_ROW, tier->size), a.row, rows, fb_min(FB_CHAIN, b->k - k0));
    return fb_fp_met_subnormals();
}

/* The s for a left operand that has the numbers `a` and is to meet b. */
static int shift_for(const fb_tier *tier, fb_range a, const fb_panels *b)
{
    if (b->shift > 0)
        return a.low > tier->shift ? -tier->shift : 0;
    return a.low == 0 && a.high + tier->shift < tier->infinity && b->range.low > tier->shift ? tier->shift : 0;
}

fb_left fb_fit(const fb_tier *tier, fb_left a, ptrdiff_t rows, const fb_panels *b, void *to)
{
    if (!worth_looking(tier, a, rows, b))
        return a;
    const int shift = shift_for(tier, range_of(tier, a, rows, b->k), b);
    return shift ? scaled(tier, a, rows, b->k, shift, to) : a;
}

fb_left fb_fit_both(const fb_tier *tier, fb_left a, ptrdiff_t rows, fb_panels *b, void *to, void *spare)
{
    const int small = b->range.low == 0 && b->range.high > 0; /* scaled for some rows, perhaps, and not for others */
    if (!b->finite || !(small || worth_looking(tier, a, rows, b)))
        return a;
    const ptrdiff_t elements = fb_round_up(b->n, tier->panel) * b->k;
    const fb_range range = range_of(tier, a, rows, b->k);
    if (range.low == 0 && b->range.high == 0) /* not known yet */
        b->range = range_of_panels(tier, b);
    const int shift = shift_for(tier, range, b);
    while (b->shift != -shift) {
        const int up = b->shift < -shift;
        void *scaled_to = spare ? spare : b->data;
        (up ? tier->raise : tier->lower)(b->data, 0, 1, elements, scaled_to, 0);
        b->data = scaled_to;
        b->shift += up ? tier->shift : -tier->shift;
    }
    return shift ? scaled(tier, a, rows, b->k, shift, to) : a;
}

ptrdiff_t fb_lowered_bytes(const fb_tier *tier, const fb_panels *b)
{
    return fb_min(FB_CHAIN, b->k) * fb_min(LOWERED_PANELS * tier->panel, fb_round_up(b->n, tier->panel)) * tier->size;
}

void fb_product_fitted(const fb_tier *tier, const fb_product *g, int shift, void *lowered)
{
    if (shift == 0) {
        tier->product(g);
        return;
    }
    fb_product part = *g;
    part.b = lowered;
    part.b_rows = NULL;
    for (ptrdiff_t j = 0; j < g->cols; j += LOWERED_PANELS * tier->panel) {
        part.cols = fb_min(LOWERED_PANELS * tier->panel, g->cols - j);
        tier->lower(fb_at(g->b, j * g->depth, tier->size), 0, 1,
                    fb_round_up(part.cols, tier->panel) * g->depth, lowered, 0);
        part.bias = g->bias ? fb_at(g->bias, j, tier->size) : NULL;
        part.c = fb_at(g->c, j, tier->size);
        part.t = fb_at(g->t, j, tier->size);
        part.first_col = g->first_col + j;
        tier->product(&part);
    }
}
