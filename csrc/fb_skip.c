/* fb_skip.c - a block of a product whose left operand may hold zeros: dense, or from its nonzeros only (contract
 * section 6). */
#include "fb_internal.h"

/* With few rows the weights have to be read anyway, and the dense tile reads them in order. Up to 3 rows read only what
 * they need, more rows read it from L1. */
static double dense_from(const fb_tier *tier, ptrdiff_t rows)
{
    return rows > 3 && rows <= tier->few_rows ? tier->dense_few : tier->dense_from;
}

/* Nonzeros that meet a row of B, on average, up to which whole rows of B are read, and nonzeros of one row of A, as a
 * share. */
static const double ROWS_MEET = 2, ROWS_DENSITY = 0.7;

/* Multiply-adds of a product below which looking for zeros costs more than it gives. */
static const double SKIP_WORK = 50000;

fb_nonzeros fb_take_list(fb_arena *arena, const fb_tier *tier, ptrdiff_t rows, ptrdiff_t cols, int in_place)
{
    return (fb_nonzeros){
        .value = in_place ? NULL : fb_take(arena, rows * FB_ROW * tier->size),
        .offset = fb_take(arena, rows * FB_ROW * 2),
        .count = fb_take(arena, rows * FB_CHAIN / FB_SLICE * 2),
        .sums = fb_take(arena, fb_max(rows * FB_SUMS_BYTES, cols * tier->size)),
    };
}

void fb_product_skipping(const fb_tier *tier, fb_product *g, int finite, fb_nonzeros list)
{
    g->stage = list.value;
    /* Look at every fourth tile of 6 rows, not at the data's meaning. A tile costs its span, a row its nonzeros. */
    enum { TILE = 6, EVERY = 4 };
    ptrdiff_t seen = 0, spans = 0, nonzeros = 0;
    if (fb_stop(fb_work_of(g)))
        return;
    if (!finite || fb_work_of(g) < SKIP_WORK) {
        tier->product(g);
        return;
    }
    for (ptrdiff_t i = 0; i < g->rows; i += TILE * EVERY) {
        ptrdiff_t span, n;
        tier->sample(fb_at(g->a, i * g->a_row, tier->size), g->a_row, fb_min(TILE, g->rows - i), g->depth, &span, &n);
        seen += g->depth;
        spans += span;
        nonzeros += n;
    }
    const double density = (double)nonzeros / (double)seen;
    const int by_rows = g->b_rows && density < ROWS_DENSITY && density * (double)g->rows < ROWS_MEET;
    if (!by_rows && (double)nonzeros > dense_from(tier, g->rows) * (double)spans) {
        g->skip = spans < seen;
        tier->product(g);
        return;
    }
    list.value = list.value ? list.value : (void *)g->a;
    list.slice = by_rows || g->rows <= 3 || density < 0.125 ? FB_CHAIN : FB_SLICE;
    tier->compress(g->a, g->a_row, g->rows, g->depth, &list);
    (by_rows ? tier->product_rows : tier->product_sparse)(g, &list);
}
