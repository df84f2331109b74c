/* fb_internal.h - what the files above the kernels offer each other: memory and threads of a call, then the
 * operations. */
#ifndef FB_INTERNAL_H
#define FB_INTERNAL_H

#include "fb_tier.h"

#define FB_MOST_BYTES (PTRDIFF_MAX / 4) /* more than can be had */

/* fb_memory.c: 64-byte-aligned memory for rows x cols elements, NULL if that overflows or cannot be had; fb_free frees
 * it */
void *fb_alloc(ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t size);

/* What an operation may use: scratch memory, and threads. fb_take takes a piece of the memory, 64-byte aligned; an
 * arena without memory only counts, so the size and the pointers come from the same lines. Arenas are passed by value:
 * what a function has taken is free again when it returns. */
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
/* Every public function that computes: the operation, in the default floating-point mode, with all the memory that it
 * will need, taken before the first result is written. */
/* The arguments of an operation begin with its kernels; NULL: there is no tier. */
fb_status fb_call(fb_operation *operation, const void *arguments);
/* Whether the call that this thread works for is to end; asked before each piece of work, which is `work` multiply-adds
 * and takes a few milliseconds at most. Whoever is told so returns, with results undefined. */
int fb_stop(double work);
/* The call that this thread works for, for the threads that help with it; NULL: none. */
typedef struct fb_calling fb_calling;
fb_calling *fb_this_call(void);
void fb_help_with(fb_calling *call);

/* fb_packed.c: w (out->n, out->k), rows w_row apart, into out->data. */
void fb_panels_fill(const fb_tier *tier, const void *w, ptrdiff_t w_row, fb_panels *out);

/* fb_linear.c: a left operand A as the kernel wants it. Staged (row is FB_ROW): its blocks of 256 k one after the
 * other, rows x FB_ROW each; or, if it is one block and meets few columns, as it stands. fb_stage: A for a product of
 * cols columns of b; fb_stage_rows: how many rows to take at a time, dealt out evenly; fb_stage_bytes: the size of that
 * many. */
typedef struct fb_left {
    const void *at;
    ptrdiff_t row;
    int shift; /* it holds 2^shift times its numbers */
} fb_left;
/* fb_subnormal.c. Of a packed matrix, or so many elements in another order: finite, range, shift, and scaled
 * accordingly. */
void fb_look_at_panels(const fb_tier *tier, fb_panels *b);
void fb_look_at(const fb_tier *tier, fb_panels *b, ptrdiff_t elements);
/* A left operand (rows x b->k) that is to meet b: a itself, or its numbers scaled, at `to`, staged; a may be there. */
fb_left fb_fit(const fb_tier *tier, fb_left a, ptrdiff_t rows, const fb_panels *b, void *to);
/* The same where b may change, too: afterwards it fits what is returned, and stands at spare, if that is not NULL. b
 * is one block; range {0, 0}: not known yet. */
fb_left fb_fit_both(const fb_tier *tier, fb_left a, ptrdiff_t rows, fb_panels *b, void *to, void *spare);
/* tier->product, where A and B together hold 2^shift times their numbers, shift 0 or tier->shift; lowered: scratch. */
void fb_product_fitted(const fb_tier *tier, const fb_product *g, int shift, void *lowered);
ptrdiff_t fb_lowered_bytes(const fb_tier *tier, const fb_panels *b);
ptrdiff_t fb_stage_rows(const fb_tier *tier, ptrdiff_t rows, ptrdiff_t depth);
ptrdiff_t fb_stage_bytes(const fb_tier *tier, ptrdiff_t rows, ptrdiff_t depth);
fb_left fb_stage(const fb_tier *tier, const void *a, ptrdiff_t a_row, ptrdiff_t rows, const fb_panels *b,
                 ptrdiff_t cols, void *stage);
/* What becomes of the sums of a product: nothing; finish(sum, bias); that and relu. */
typedef enum fb_ending { FB_SUMS = -1, FB_FINISH, FB_RELU } fb_ending;
/* C (rows x cols) = A B, ended, where B is columns first_col .. first_col + cols of a packed matrix and first_col is a
 * multiple of the panel. One thread. Of the product, these matter: a, a_row, shift as fb_stage says; lowered; bias,
 * from column first_col on; c, c_row; t, scratch for FB_ROWS x FB_ROW elements, NULL if C itself is a good place for
 * the totals; rows, at most FB_ROWS; cols; first_col; wanted. */
void fb_matmul(const fb_tier *tier, const fb_product *whole, const fb_panels *b, fb_ending ending);
/* An operation (its arguments): the same for all columns, on all threads; C has w->n columns. */
typedef struct fb_projection {
    const fb_tier *tier;
    const void *x;
    ptrdiff_t rows;
    const fb_panels *w;
    const void *bias;
    fb_ending ending;
    void *out;
} fb_projection;
fb_operation fb_project_rows;
/* fb_skip.c: one block of a product whose A may hold zeros, at most FB_ROWS rows; finite says that B is. list: from
 * fb_take_list, for products of at most so many rows and, where B is kept in rows, columns; in_place: A may be
 * destroyed, and its a_row is FB_ROW. */
FB_INLINE double fb_work_of(const fb_product *g) { return (double)g->rows * (double)g->depth * (double)g->cols; }
fb_nonzeros fb_take_list(fb_arena *arena, const fb_tier *tier, ptrdiff_t rows, ptrdiff_t cols, int in_place);
void fb_product_skipping(const fb_tier *tier, fb_product *g, int finite, fb_nonzeros list);
/* fb_mix.c: n blocks of a product A B, one after the other, on one thread; of the product, these matter: a, a_row,
 * next_a, c, c_row, t, t_row, rows, at most FB_ROWS, cols, first_col (0 without
 * spare), first, last. count: NULL, or of each row of A,
 * which is zero from there on, how many k take part. spare: memory for these
 * columns of a block, or NULL, where the blocks may be scaled as they stand. */
void fb_mix_blocks(const fb_tier *tier, const fb_product *whole, fb_panels *blocks, ptrdiff_t n, const ptrdiff_t *count,
                   void *spare, fb_nonzeros list);
/* Rows of x, all or those of these numbers, as a block, whose data, n and k are given. */
void fb_pack_block(const fb_tier *tier, const void *x, ptrdiff_t x_row, const ptrdiff_t *number, fb_panels *block);
/* An operation on one thread, rows first_row .. first_row + rows of A X. */
typedef struct fb_mixing {
    const void *weights, *x; /* (P, P), (P, D) */
    ptrdiff_t positions, features;
} fb_mixing;
ptrdiff_t fb_mix_rows(const fb_tier *tier, const fb_mixing *m, ptrdiff_t first_row, ptrdiff_t rows, void *out,
                      ptrdiff_t out_row, fb_arena arena);
/* fb_feed_forward.c: operations on one thread, x as fb_stage says; and on all threads, rows of x x_row apart */
ptrdiff_t fb_feed_forward_rows(const fb_tier *tier, const fb_params *params, fb_left x, ptrdiff_t rows, void *out,
                               fb_arena arena);
typedef struct fb_feeding {
    const fb_tier *tier;
    const fb_params *params;
    const void *x;
    ptrdiff_t x_row, rows;
    void *out;
} fb_feeding;
fb_operation fb_feed_forward_all;
/* fb_attention.c: attention of some batch items. fb_attend takes memory for the keys and queries, which stays taken,
 * and makes them, on all threads; it returns what it used. */
typedef struct fb_keys { /* those that the mask allows */
    ptrdiff_t count;
    const ptrdiff_t *number; /* NULL: all */
    const ptrdiff_t *ends;   /* how many have a number < 256, 512, ...; closed by PTRDIFF_MAX */
    fb_panels rows;          /* as they stand: data (count, E) */
    int subnormal;           /* some key or query has subnormal numbers */
} fb_keys;
typedef struct fb_attention {
    const fb_tier *tier;
    const fb_params *params;
    const void *x;
    ptrdiff_t batch, positions;
    const uint8_t *key_mask;
    int causal, stream; /* stream: the weights are too large to be found in a cache later */
    /* of fb_attend */
    double scale;
    void *queries; /* (batch, P, E) */
    fb_keys *keys;
} fb_attention;
ptrdiff_t fb_attend(fb_attention *a, fb_arena *arena);
/* How many of the allowed keys of item b each of the queries i .. i + rows may see. */
void fb_count_keys(const fb_attention *a, ptrdiff_t b, ptrdiff_t i, ptrdiff_t rows, ptrdiff_t *count);
/* An operation on one thread, the weights of these queries: out (rows, columns), out_row apart, one column for each
 * allowed key, and +0.0 from a row's count on. */
ptrdiff_t fb_weigh(const fb_attention *a, ptrdiff_t b, ptrdiff_t i, ptrdiff_t rows, const ptrdiff_t *count, void *out,
                   ptrdiff_t out_row, ptrdiff_t columns, fb_arena arena);
/* The operation of fb_attention_weights. */
typedef struct fb_weighing {
    fb_attention attention;
    void *out;
} fb_weighing;
fb_operation fb_weigh_all;

/* fb_cpus.c: how many CPUs this process may use, at least 1; and how many by the quotas of its cgroups, 0 if there is
 * none, where root stands before the name of every file (the tests have trees of their own; "": this system's). */
int fb_available_cpus(void);
int fb_quota_cpus(const char *root);

/* fb_threads.c: fb_run is an operation that does every part of a task, on at most `threads` threads, each in the
 * default floating-point mode and with memory of its own, as much as the task says it uses. fb_threads: how many
 * threads of the arena `work` multiply-adds are worth, at most `limit`. fb_parts: into how many parts to cut it for
 * them, a whole number a thread, at most `limit` or one a thread. */
typedef ptrdiff_t fb_task(const void *job, fb_arena arena, int part, int parts);
ptrdiff_t fb_run(fb_task *task, const void *job, int threads, int parts, fb_arena arena);
int fb_threads(fb_arena arena, double work, ptrdiff_t limit);
/* Changes in a child of a process whose workers it has not. */
int fb_forks(void);
int fb_parts(int threads, double work, ptrdiff_t limit);

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
/* The columns of a part: whole panels, dealt out evenly. */
FB_INLINE void fb_columns_of(const fb_tier *tier, ptrdiff_t cols, int part, int parts, ptrdiff_t *first,
                             ptrdiff_t *n)
{
    const ptrdiff_t panels = (cols + tier->panel - 1) / tier->panel;
    *first = panels * part / parts * tier->panel;
    *n = fb_min(panels * (part + 1) / parts * tier->panel, cols) - *first;
}

#endif
