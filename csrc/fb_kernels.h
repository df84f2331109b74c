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
    /* Rows of A in a product at most, and positions of a tile: 128 x 256 float are 128 KB, in a 512 KB L2. Measured at 512
     * and 2048 x 768 -> 3072: 192 rows take 1.01 to 1.03 times as long (float64 1.01 to 1.05), 256 some 1.03 to 1.06; 96 the
     * same, but at 97 % zeros 1.03 to 1.08, 64 rows 1.1 to 1.14, for each tile reads all weights. */
    FB_ROWS = 128,
    FB_SLICE = 64,       /* k of a list of nonzeros: 64 x 4 panels of B are 16 KB, at home in L1 */
    FB_STEP = 4,         /* nonzeros taken at a time: their offsets are one word, their values one vector */
    FB_FEW_ROWS = 48,    /* fewer rows a thread: cut by columns, so that each weight is read by one thread only */
    FB_SOFTMAX_ROWS = 16, /* the most lanes of a vector in any tier: they are rows where softmax sums */
    FB_PART_ROWS = 96,   /* rows of a part, where a thread has more than one: each part reads all weights */
    FB_MAX_THREADS = 256,
    /* Elements from one row of a left operand to the next: an odd number of cache lines, so that rows do not all fall
     * into the same cache sets. */
    FB_ROW = FB_BLOCK + 16,
    FB_STAGE_BYTES = 1400 << 10, /* of a left operand laid out for the kernel: a thread's 2 MiB hold it and its tile */
    FB_SUMS_BYTES = 8 * FB_PANEL_BYTES, /* a row of a group of panels, the widest of all tiers */
};

#define FB_MOST_BYTES (PTRDIFF_MAX / 4) /* more than can be had */

/* What a tile fetches to L2 in passing, in each of its first `strips` strips: lines from `at` on, `step` bytes further a strip. */
typedef enum fb_fetch_kind { FB_FETCH_NOTHING, FB_FETCH_QUARTER, FB_FETCH_LINES, FB_FETCH_PANELS } fb_fetch_kind;
typedef struct fb_fetch {
    fb_fetch_kind kind; /* a line every fourth k, a line a k, a line a k and panel */
    const char *at;
    ptrdiff_t step, strips;
} fb_fetch;

/* One block of k of a matrix product, C (rows x cols) from A (rows x depth) and B (depth x cols):
 *     s = chain of fma over k;  t = first ? s : T + s;  last ? C = finish(t, bias) [then relu] : T = t
 * A[i,k] = a[i*a_row + k];  B[k, j] = b[(j / panel)*depth*panel + k*panel + j % panel];  C[i,j] = c[i*c_row + j], T likewise.
 * With b_rows, B[k, j] = b_rows[k*b_row + j] as well, in rows of whole panels; NULL: B is in panels only.
 * T, the totals of the blocks so far, may be C. B and bias are read in whole panels, C and T have cols columns. */
typedef struct fb_product {
    const void *a, *b, *b_rows, *bias; /* bias NULL: +0.0 */
    void *c, *t;
    void *stage; /* scratch for rows x FB_ROW elements, unless a_row is FB_ROW */
    ptrdiff_t a_row, b_row, c_row, t_row; /* in elements */
    ptrdiff_t rows, cols, depth;   /* depth <= FB_BLOCK */
    int first, last, relu;
    ptrdiff_t unseen; /* so many k at the end of the block take no part, whatever A and B hold there */
    int skip; /* B is finite: k where a whole row tile of A is zero, at either end of the block, may be left out */
    /* NULL, or of each row how many columns matter, not falling, where the first of C is number first_col: the others may be
     * left as they are */
    const ptrdiff_t *wanted;
    ptrdiff_t first_col;
    const void *next_a; /* NULL, or what will be A next, in rows as far apart: fetched in passing; need not exist */
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

struct fb_kernels {
    const char *tier;
    ptrdiff_t size;  /* bytes of an element */
    ptrdiff_t panel; /* columns of a panel: FB_PANEL_BYTES / size */
    ptrdiff_t lanes; /* elements of a vector */
    int shift;        /* 2^shift times the smallest subnormal number is normal */
    int infinity;     /* the exponent of infinity and NaN, as in fb_range */
    ptrdiff_t direct; /* columns up to which a product reads A where it stands; with more, an A that is not staged is copied */
    /* Nonzeros in the span of a tile from which on the dense tile is faster: a share, for 4 to few_rows rows another */
    double dense_from, dense_few;
    ptrdiff_t few_rows;
    void (*copy)(const void *from, ptrdiff_t from_row, ptrdiff_t rows, ptrdiff_t n, void *to, ptrdiff_t to_row);
    /* One panel of one block: panel[k*panel + j] = w[j*w_row + k], j < rows <= panel, k < depth; +0.0 from j = rows on. */
    void (*pack)(const void *w, ptrdiff_t w_row, ptrdiff_t rows, ptrdiff_t depth, void *panel);
    /* The rows of B as they are, B[k, j] = x[k*x_row + j], k < depth, j < cols, as panels of one block; whether all are finite.
     * keep: NULL, or rows where it is zero are read as +0.0. */
    int (*pack_rows)(const void *x, ptrdiff_t x_row, ptrdiff_t depth, ptrdiff_t cols, const uint8_t *keep, void *panels);
    void (*product)(const fb_product *);
    /* The same from the nonzeros of A only; B must be finite. */
    void (*product_sparse)(const fb_product *, const fb_nonzeros *);
    /* The same from b_rows, of which only the rows that meet nonzeros are read; the slice is the whole block. */
    void (*product_rows)(const fb_product *, const fb_nonzeros *);
    /* The same for a whole product (first and last) of at most `lanes` columns, without panels: B[k, j] = b[k*b_row + j].
     * What stands between the rows of C is overwritten. */
    void (*product_small)(const fb_product *, ptrdiff_t b_row);
    void (*compress)(const void *a, ptrdiff_t a_row, ptrdiff_t rows, ptrdiff_t depth, const fb_nonzeros *out);
    /* At most 6 rows of A: the k from their first to their last nonzero, and the nonzeros of the middle one. A hint. */
    void (*sample)(const void *a, ptrdiff_t a_row, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t *span, ptrdiff_t *nonzeros);
    /* out[i,j] = relu(finish(x[i,j], bias[j])) */
    void (*bias_relu)(const void *x, const void *bias, void *out, ptrdiff_t rows, ptrdiff_t cols);
    /* Softmax of `rows` rows of raw scores, scaled: row i over its first count[i] scores; out[i, count[i]:width] = +0.0.
     * ends[] holds, ascending and closed by width or more, where the blocks of the chain end. The scores are destroyed;
     * they are memory for whole panels and one more in each row, and for rows in whole numbers of FB_SOFTMAX_ROWS.
     * stream: out is too large to be found in a cache later. */
    void (*softmax)(void *scores, ptrdiff_t scores_row, void *out, ptrdiff_t out_row, ptrdiff_t rows, ptrdiff_t width,
                    const ptrdiff_t *count, const ptrdiff_t *ends, double scale, int stream);
    /* Reads rows of n numbers so that fb_fp_met_subnormals can tell whether one was subnormal, at a tenth of the cost of range. */
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
};

#define FB_DECLARE_TIER(tier) extern const struct fb_kernels *const fb_kernels_##tier[2]; /* by fb_dtype; NULL: not compiled */
FB_TIERS(FB_DECLARE_TIER)
#undef FB_DECLARE_TIER

/* fb_dispatch.c: the kernels of the tier in use, NULL if there is none */
const struct fb_kernels *fb_kernels_in_use(fb_dtype dtype);

/* fb_memory.c: 64-byte-aligned memory for rows x cols elements, NULL if that overflows or cannot be had; fb_free frees it */
void *fb_alloc(ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t size);

/* What an operation may use: scratch memory, and threads. fb_take takes a piece of the memory, 64-byte aligned; an arena
 * without memory only counts, so the size and the pointers come from the same lines. Arenas are passed by value: what a
 * function has taken is free again when it returns. */
typedef struct fb_arena {
    char *memory; /* NULL: only count */
    ptrdiff_t used;
    int threads; /* asked for once a call, so that counting and working plan the same */
} fb_arena;
FB_INLINE void *fb_take(fb_arena *arena, ptrdiff_t bytes);
/* rows x cols elements in bytes, or if that overflows FB_MOST_BYTES, for which there is no memory */
FB_INLINE ptrdiff_t fb_bytes(ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t size);
/* An operation returns how much of the arena it uses; without memory it does nothing else. */
typedef ptrdiff_t fb_operation(const void *arguments, fb_arena arena);
/* Every public function that computes: the operation, in the default floating-point mode, with all the memory that it will
 * need, taken before the first result is written. */
/* The arguments of an operation begin with its kernels; NULL: there is no tier. */
fb_status fb_call(fb_operation *operation, const void *arguments);
/* Whether the call that this thread works for is to end; asked before each piece of work, which is `work` multiply-adds and
 * takes a few milliseconds at most. Whoever is told so returns, with results undefined. */
int fb_stop(double work);
/* The call that this thread works for, for the threads that help with it; NULL: none. */
typedef struct fb_calling fb_calling;
fb_calling *fb_this_call(void);
void fb_help_with(fb_calling *call);

/* fb_pack.c: w (out->n, out->k), rows w_row apart, into out->data. */
void fb_panels_fill(const struct fb_kernels *k, const void *w, ptrdiff_t w_row, fb_panels *out);

/* fb_matmul.c: a left operand A as the kernel wants it. Staged (row is FB_ROW): its blocks of 256 k one after the other,
 * rows x FB_ROW each; or, if it is one block and meets few columns, as it stands. fb_stage: A for a product of cols columns
 * of b; fb_stage_rows: how many rows to take at a time, dealt out evenly; fb_stage_bytes: the size of that many. */
typedef struct fb_left {
    const void *at;
    ptrdiff_t row;
    int shift; /* it holds 2^shift times its numbers */
} fb_left;
/* fb_subnormal.c. Of a packed matrix: finite, range, shift, and scaled accordingly. */
void fb_look_at_panels(const struct fb_kernels *k, fb_panels *b);
/* A left operand (rows x b->k) that is to meet b: a itself, or its numbers scaled, at `to`, staged; a may be there. */
fb_left fb_fit(const struct fb_kernels *k, fb_left a, ptrdiff_t rows, const fb_panels *b, void *to);
/* The same where b may change: afterwards it fits what is returned. b is one block; range {0, 0}: not known yet. */
fb_left fb_fit_both(const struct fb_kernels *k, fb_left a, ptrdiff_t rows, fb_panels *b, void *to);
/* k->product, where A and B together hold 2^shift times their numbers, shift 0 or k->shift; lowered: scratch. */
void fb_product_fitted(const struct fb_kernels *k, const fb_product *g, int shift, void *lowered);
ptrdiff_t fb_lowered_bytes(const struct fb_kernels *k, const fb_panels *b);
ptrdiff_t fb_stage_rows(const struct fb_kernels *k, ptrdiff_t rows, ptrdiff_t depth);
ptrdiff_t fb_stage_bytes(const struct fb_kernels *k, ptrdiff_t rows, ptrdiff_t depth);
fb_left fb_stage(const struct fb_kernels *k, const void *a, ptrdiff_t a_row, ptrdiff_t rows, const fb_panels *b,
                 ptrdiff_t cols, void *stage);
/* What becomes of the sums of a product: nothing; finish(sum, bias); that and relu. */
typedef enum fb_ending { FB_SUMS = -1, FB_FINISH, FB_RELU } fb_ending;
/* C (rows x cols) = A B, ended, where B is columns first_col .. first_col + cols of a packed matrix and first_col is a
 * multiple of the panel. One thread. Of the product, these matter: a, a_row, shift as fb_stage says; lowered; bias, from
 * column first_col on; c, c_row; t, scratch for FB_ROWS x FB_ROW elements, NULL if C itself is a good place for the totals;
 * rows, at most FB_ROWS; cols; first_col; wanted. */
void fb_matmul(const struct fb_kernels *k, const fb_product *whole, const fb_panels *b, fb_ending ending);
/* An operation (its arguments): the same for all columns, on all threads; C has w->n columns. */
typedef struct fb_projection {
    const struct fb_kernels *k;
    const void *x;
    ptrdiff_t rows;
    const fb_panels *w;
    const void *bias;
    fb_ending ending;
    void *out;
} fb_projection;
fb_operation fb_project_rows;
/* One block of a product whose A may hold zeros, at most FB_ROWS rows; finite says that B is. list: from fb_take_list, for
 * products of at most so many rows and, where B is kept in rows, columns; in_place: A may be destroyed, and its a_row is FB_ROW. */
fb_nonzeros fb_take_list(fb_arena *arena, const struct fb_kernels *k, ptrdiff_t rows, ptrdiff_t cols, int in_place);
void fb_product_skipping(const struct fb_kernels *k, fb_product *g, int finite, fb_nonzeros list);
/* An operation on one thread: rows first_row .. first_row + rows of A X. */
typedef struct fb_mixing {
    const void *weights, *x; /* (P, P), (P, D) */
    ptrdiff_t positions, features;
    const uint8_t *key_mask; /* NULL, or zero where a key takes no part */
    int causal;              /* nor do keys behind the row's position */
} fb_mixing;
ptrdiff_t fb_mix_rows(const struct fb_kernels *k, const fb_mixing *m, ptrdiff_t first_row, ptrdiff_t rows, void *out,
                      ptrdiff_t out_row, fb_arena arena);
/* fb_feed_forward.c: operations on one thread, x as fb_stage says; and on all threads, rows of x x_row apart */
ptrdiff_t fb_feed_forward_rows(const struct fb_kernels *k, const fb_params *params, fb_left x, ptrdiff_t rows, void *out,
                               fb_arena arena);
typedef struct fb_feeding {
    const struct fb_kernels *k;
    const fb_params *params;
    const void *x;
    ptrdiff_t x_row, rows;
    void *out;
} fb_feeding;
fb_operation fb_feed_forward_all;
/* fb_attention.c: an operation, attention weights; stream: out is too large to be found in a cache later. */
typedef struct fb_attending {
    const struct fb_kernels *k;
    const fb_params *params;
    ptrdiff_t batch, positions;
    const void *x;
    int causal, stream;
    const uint8_t *key_mask;
    void *out;
} fb_attending;
fb_operation fb_attend;

/* fb_cpus.c: how many CPUs this process may use, at least 1; and how many by the quotas of its cgroups, 0 if there is none,
 * where root stands before the name of every file (the tests have trees of their own; "": this system's). */
int fb_available_cpus(void);
int fb_quota_cpus(const char *root);

/* fb_threads.c: fb_run is an operation that does every part of a task, on at most `threads` threads, each in the default
 * floating-point mode and with memory of its own, as much as the task says it uses. fb_threads: how many threads of the
 * arena `work` multiply-adds are worth, at most `limit`. fb_parts: into how many parts to cut it for them, a whole number a
 * thread, at most `limit` or one a thread. */
typedef ptrdiff_t fb_task(const void *job, fb_arena arena, int part, int parts);
ptrdiff_t fb_run(fb_task *task, const void *job, int threads, int parts, fb_arena arena);
int fb_threads(fb_arena arena, double work, ptrdiff_t limit);
/* Changes in a child of a process whose workers it has not. */
int fb_forks(void);
int fb_parts(int threads, double work, ptrdiff_t limit);

FB_INLINE ptrdiff_t fb_min(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
FB_INLINE ptrdiff_t fb_max(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
/* n dealt out evenly in pieces of at most `most`: the size of a piece. */
FB_INLINE ptrdiff_t fb_even(ptrdiff_t n, ptrdiff_t most)
{
    const ptrdiff_t pieces = (n + most - 1) / most;
    return n <= most ? n : (n + pieces - 1) / pieces;
}
FB_INLINE ptrdiff_t fb_round_up(ptrdiff_t n, ptrdiff_t to) { return (n + to - 1) & -to; } /* to: a power of two */
FB_INLINE ptrdiff_t fb_bytes(ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t size)
{
    return (double)rows * (double)cols * (double)size < (double)FB_MOST_BYTES ? rows * cols * size : FB_MOST_BYTES;
}
FB_INLINE void *fb_take(fb_arena *arena, ptrdiff_t bytes)
{
    char *piece = arena->memory ? arena->memory + arena->used : NULL;
    arena->used = fb_min(arena->used + fb_round_up(bytes, 64), FB_MOST_BYTES);
    return piece;
}
FB_INLINE void *fb_at(const void *base, ptrdiff_t elements, ptrdiff_t size) { return (char *)base + elements * size; }

/* The columns of a part: whole panels, dealt out evenly. */
FB_INLINE void fb_columns_of(const struct fb_kernels *k, ptrdiff_t cols, int part, int parts, ptrdiff_t *first,
                             ptrdiff_t *n)
{
    const ptrdiff_t panels = (cols + k->panel - 1) / k->panel;
    *first = panels * part / parts * k->panel;
    *n = fb_min(panels * (part + 1) / parts * k->panel, cols) - *first;
}

#endif
