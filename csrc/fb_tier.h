/* fb_tier.h - what a tier, an instruction set, offers to the loops above it: one table of kernels a dtype.
 *
 * The loops are written once for all tiers and both dtypes: they see elements of tier->size bytes and never look inside
 * them. The kernels are written once in fb_kernels_template.h.
 */
#ifndef FB_TIER_H
#define FB_TIER_H

#include "fastblock.h"
#include "fb_base.h"

/* The tiers, best first. This list makes the declarations, the dispatch and isas(). */
#define FB_TIERS(X) X(avx512) X(avx2) X(neon) X(portable)

enum {
    FB_CHAIN = 256,      /* the contract's block of k, and the depth of one pass of the matmul kernel */
    FB_PANEL_BYTES = 64, /* a panel is 16 float or 8 double columns: one cache line a k, in every tier */
    /* Rows of A in a product at most, and positions of a tile: 128 x 256 float are 128 KB, in a 512 KB L2. Fewer would
     * read all weights more often. */
    FB_ROWS = 128,
    FB_SLICE = 64,       /* k of a list of nonzeros: 64 x 4 panels of B are 16 KB, at home in L1 */
    FB_STEP = 4,         /* nonzeros taken at a time: their offsets are one word, their values one vector */
    FB_FEW_ROWS = 48,    /* fewer rows a thread: cut by columns, so that each weight is read by one thread only */
    FB_QUERY_PANELS = 2, /* of queries in a tile of attention: their scores stay in L2 */
    FB_PART_ROWS = 96,   /* rows of a part, where a thread has more than one: each part reads all weights */
    FB_MAX_THREADS = 256,
    /* Elements from one row of a left operand to the next: an odd number of cache lines, so that rows do not all fall
     * into the same cache sets. */
    FB_ROW = FB_CHAIN + 16,
    FB_STAGE_BYTES = 1400 << 10, /* of a left operand laid out for the kernel: a thread's 2 MiB hold it and its tile */
    FB_SUMS_BYTES = 8 * FB_PANEL_BYTES, /* a row of a group of panels, the widest of all tiers */
};

/* What a tile fetches to L2 in passing, in each of its first `strips` strips: lines from `at` on, `step` bytes further
 * a strip. */
typedef enum fb_fetch_kind { FB_FETCH_NOTHING, FB_FETCH_QUARTER, FB_FETCH_LINES, FB_FETCH_PANELS } fb_fetch_kind;
typedef struct fb_fetch {
    fb_fetch_kind kind; /* a line every fourth k, a line a k, a line a k and panel */
    const char *at;
    ptrdiff_t step, strips;
} fb_fetch;

/* One block of k of a matrix product, C (rows x cols) from A (rows x depth) and B (depth x cols):
 *     s = chain of fma over k;  t = first ? s : T + s;  last ? C = finish(t, bias) [then relu] : T = t
 * A[i,k] = a[i*a_row + k];  C[i,j] = c[i*c_row + j], T likewise;
 * B[k, j] = b[(j / panel)*depth*panel + k*panel + j % panel].
 * With b_rows, B[k, j] = b_rows[k*b_row + j] as well, in rows of whole panels; NULL: B is in panels only.
 * T, the totals of the blocks so far, may be C. B and bias are read in whole panels, C and T have cols columns. */
typedef struct fb_product {
    const void *a, *b, *b_rows, *bias; /* bias NULL: +0.0 */
    void *c, *t;
    void *stage; /* scratch for rows x FB_ROW elements, unless a_row is FB_ROW */
    ptrdiff_t a_row, b_row, c_row, t_row; /* in elements */
    ptrdiff_t rows, cols, depth;   /* depth <= FB_CHAIN */
    int first, last, relu;
    ptrdiff_t unseen; /* so many k at the end of the block take no part, whatever A and B hold there */
    int skip; /* B is finite: k where a whole row tile of A is zero, at either end of the block, may be left out */
    const void *next_a; /* NULL, or what will be A next, in rows as far apart: fetched in passing; need not exist */
    ptrdiff_t first_col; /* for fb_matmul and fb_mix_blocks: of B */
    int shift;     /* for fb_matmul: A holds 2^shift times its numbers */
    void *lowered; /* for fb_matmul: scratch for fb_lowered_bytes */
} fb_product;

/* The nonzeros of A, compressed: row i, slice s (`slice` consecutive k) has FB_STEP * count[s*rows + i] of them, from
 * element i*FB_ROW + s*slice of value and offset on; the last ones may be zeros of some k, to fill up a step. sums:
 * scratch, FB_SUMS_BYTES a row, and for product_rows one row of C. */
typedef struct fb_nonzeros {
    void *value;
    uint16_t *offset, *count;
    void *sums;
    ptrdiff_t slice;
} fb_nonzeros;

typedef struct fb_tier {
    const char *name;
    ptrdiff_t size;  /* bytes of an element */
    ptrdiff_t panel; /* columns of a panel: FB_PANEL_BYTES / size */
    ptrdiff_t lanes; /* elements of a vector */
    int shift;        /* 2^shift times the smallest subnormal number is normal */
    int infinity;     /* the exponent of infinity and NaN, as in fb_range */
    /* columns up to which a product reads A where it stands; with more, an A that is not staged is copied */
    ptrdiff_t direct;
    /* Nonzeros in the span of a tile from which on the dense tile is faster: a share, for 4 to few_rows rows another */
    double dense_from, dense_few;
    ptrdiff_t few_rows;
    void (*copy)(const void *from, ptrdiff_t from_row, ptrdiff_t rows, ptrdiff_t n, void *to, ptrdiff_t to_row);
    /* One panel of one block: panel[k*panel + j] = w[j*w_row + k], j < rows <= panel, k < depth; +0.0 from j = rows
     * on. */
    void (*pack)(const void *w, ptrdiff_t w_row, ptrdiff_t rows, ptrdiff_t depth, void *panel);
    /* The rows of B as they are, B[k, j] = x[k*x_row + j], k < depth, j < cols, as panels of one block; whether all
     * are finite. number: NULL, or the numbers of these rows in x. */
    int (*pack_rows)(const void *x, ptrdiff_t x_row, const ptrdiff_t *number, ptrdiff_t depth, ptrdiff_t cols,
                     void *panels);
    void (*product)(const fb_product *);
    /* The same from the nonzeros of A only; B must be finite. */
    void (*product_sparse)(const fb_product *, const fb_nonzeros *);
    /* The same from b_rows, of which only the rows that meet nonzeros are read; the slice is the whole block. */
    void (*product_rows)(const fb_product *, const fb_nonzeros *);
    /* The same for a whole product (first and last) of at most `lanes` columns, without panels: B[k, j] = b[k*b_row +
     * j]. What stands between the rows of C is overwritten. */
    void (*product_small)(const fb_product *, ptrdiff_t b_row);
    void (*compress)(const void *a, ptrdiff_t a_row, ptrdiff_t rows, ptrdiff_t depth, const fb_nonzeros *out);
    /* At most 6 rows of A: the k from their first to their last nonzero, and the nonzeros of the middle one. A hint. */
    void (*sample)(const void *a, ptrdiff_t a_row, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t *span,
                   ptrdiff_t *nonzeros);
    /* out[i,j] = relu(finish(x[i,j], bias[j])) */
    void (*bias_relu)(const void *x, const void *bias, void *out, ptrdiff_t rows, ptrdiff_t cols);
    /* Softmax of raw scores, queries side by side: scores[j * row + i] of key j and query i, scaled, over the first
     * count[i] keys, not falling, and out[i, j] = its weight; out[i, count[i]:width] = +0.0. ends[] holds, ascending
     * and closed by PTRDIFF_MAX, where the blocks of the chain end. The scores, memory for whole panels of queries,
     * are destroyed. stream: out is too large to be found in a cache later. */
    void (*softmax)(void *scores, ptrdiff_t row, ptrdiff_t queries, const ptrdiff_t *count, const ptrdiff_t *ends,
                    double scale, void *out, ptrdiff_t out_row, ptrdiff_t width, int stream);
    /* Reads rows of n numbers so that fb_fp_met_subnormals can tell whether one was subnormal: far cheaper than
     * range. */
    void (*touch)(const void *x, ptrdiff_t x_row, ptrdiff_t rows, ptrdiff_t n);
    /* The range of rows of n numbers, added to *range. */
    void (*range)(const void *x, ptrdiff_t x_row, ptrdiff_t rows, ptrdiff_t n, fb_range *range);
    /* 2^shift times, which must not overflow, and 2^-shift times; from and to may be the same rows. */
    void (*raise)(const void *from, ptrdiff_t from_row, ptrdiff_t rows, ptrdiff_t n, void *to, ptrdiff_t to_row);
    void (*lower)(const void *from, ptrdiff_t from_row, ptrdiff_t rows, ptrdiff_t n, void *to, ptrdiff_t to_row);
    /* the primitives, elementwise: what the tests compare with the reference */
    void (*fma)(const void *a, const void *b, const void *c, void *out, ptrdiff_t n);
    void (*exp)(const void *x, void *out, ptrdiff_t n);
    /* floating-point work without memory: the peak that benchmarks compare with */
    double (*fma_chains)(ptrdiff_t rounds, int loop, double *flops);
} fb_tier;

#define FB_DECLARE_TIER(tier) extern const fb_tier *const fb_kernels_##tier[2]; /* by fb_dtype; NULL: not compiled */
FB_TIERS(FB_DECLARE_TIER)
#undef FB_DECLARE_TIER

/* fb_dispatch.c: the kernels of the tier in use, NULL if there is none */
const fb_tier *fb_tier_in_use(fb_dtype dtype);

#endif
