/* fastblock.h - the transformer block on the CPU, usable without Python. The only public header.
 *
 * Arithmetic: chain256-v1. fastblock/reference.py defines every bit; the comment of each function gives the formula.
 * Shapes: P positions, D features, F hidden, E head width. Activations are row-major with contiguous features; weights
 * are (out, in) row-major and are packed once. dtype is that of all arrays of a call.
 * Aliasing: out must not overlap an input. Threads: every function may be called from several threads at once;
 * the caller's floating-point mode does not matter and is left as it was. Nothing is written before FB_NO_MEMORY; after
 * FB_INTERRUPTED out is undefined.
 */
#ifndef FASTBLOCK_H
#define FASTBLOCK_H

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define FB_EXPORT __declspec(dllexport)
#else
#define FB_EXPORT __attribute__((visibility("default")))
#endif

typedef enum { FB_F32 = 0, FB_F64 = 1 } fb_dtype;
/* FB_NO_TIER: the environment variable FASTBLOCK_ISA asks for a tier that this CPU or this build has not. */
typedef enum { FB_OK = 0, FB_NO_MEMORY = 1, FB_INTERRUPTED = 2, FB_NO_TIER = 3 } fb_status;

/* ---- packed parameters */

/* The exponents, as encoded, of the numbers of smallest and of largest magnitude, zeros left out; 0: subnormal. */
typedef struct {
    int low, high;
} fb_range;

/* A matrix (n, k) of weights in column panels: for each block of 256 k, for each panel of 64 bytes (16 float or 8
 * double outputs), k-major, the panel's outputs side by side; outputs beyond n are +0.0. The same layout for every
 * tier. */
typedef struct {
    void *data; /* 64-byte aligned; NULL: no such matrix */
    void *rows; /* NULL, or the matrix once more: k rows of n outputs, padded with +0.0 to whole panels */
    ptrdiff_t n, k;
    int finite; /* no infinity or NaN: its zeros may be skipped, and zeros that meet it */
    int shift;  /* data and rows hold 2^shift times the numbers, if some of these are subnormal */
    fb_range range;
} fb_panels;

/* The parameters of a block, as fb_params_pack leaves them. Biases are padded to whole panels; NULL: none. */
typedef struct {
    fb_dtype dtype;
    fb_panels w1, w2, w_q, w_k;
    void *b1, *b2, *b_q, *b_k;
} fb_params;

/* w: (n, k), rows w_row elements apart. out is overwritten; free it with fb_panels_free. */
fb_status fb_panels_pack(fb_dtype dtype, const void *w, ptrdiff_t n, ptrdiff_t k, ptrdiff_t w_row, fb_panels *out);
/* Keep the rows, too, if the matrix is large and finite: the second layer of a feed-forward reads those it needs. */
fb_status fb_panels_keep_rows(fb_dtype dtype, fb_panels *panels);
/* The (n, k) matrix back, contiguous, exactly as it was packed. */
void fb_panels_unpack(fb_dtype dtype, const fb_panels *panels, void *w);
void fb_panels_free(fb_panels *panels);
/* A bias of n elements, copied and padded with +0.0 to whole panels; free it with fb_free. */
fb_status fb_bias_pack(fb_dtype dtype, const void *bias, ptrdiff_t n, void **out);
void fb_params_free(fb_params *params);
void fb_free(void *p);

/* ---- operations; *_rows: positions, any batch of them flattened */

/* out (rows, F) = relu(finish(x (rows, F), bias (F))) */
fb_status fb_bias_relu(fb_dtype dtype, const void *x, const void *bias, void *out, ptrdiff_t rows, ptrdiff_t hidden);
/* out (rows, n) = finish(chain256(x (rows, k), w (n, k)), bias), then relu if asked for: up_project with relu,
 * down_project without */
fb_status fb_project(fb_dtype dtype, const void *x, ptrdiff_t rows, const fb_panels *w, const void *bias, int relu,
                     void *out);
/* out (rows, D) = down_project(up_project(x)); the hidden activations never leave the cache */
fb_status fb_feed_forward(const fb_params *params, const void *x, ptrdiff_t rows, void *out);
/* out[b] (P, D) = finish(chain256(weights[b] (P, P), x[b] (P, D))); batch strides in elements, 0 to share one */
fb_status fb_mix_positions(fb_dtype dtype, ptrdiff_t batch, const void *weights, ptrdiff_t weights_batch, const void *x,
                           ptrdiff_t x_batch, void *out, ptrdiff_t positions, ptrdiff_t features);
/* out[b] (P, P) = softmax over the allowed keys of the scaled dot products of w_q x and w_k x.
 * key_mask (batch, P): nonzero keeps a key; NULL keeps all. causal: position i sees keys 0 .. i. */
fb_status fb_attention_weights(const fb_params *params, ptrdiff_t batch, const void *x, ptrdiff_t positions, int causal,
                               const uint8_t *key_mask, void *out);
/* out[b] (P, D) = feed_forward(mix_positions(A[b], x[b])), A = weights[b], or attention_weights(x) if weights is
 * NULL */
fb_status fb_block(const fb_params *params, ptrdiff_t batch, const void *x, ptrdiff_t x_batch, ptrdiff_t positions,
                   const void *weights, ptrdiff_t weights_batch, int causal, const uint8_t *key_mask, void *out);

/* ---- tiers: "avx512", "avx2", "neon", "portable" */

/* The name of tier i, best first, NULL past the last; whether it was compiled and whether this CPU has it. */
const char *fb_isa_name(int i);
int fb_isa_compiled(int i);
int fb_isa_usable(int i);
/* The tier in use: the one given to fb_use_isa, else what FASTBLOCK_ISA names, else the best; -1 if that one is
 * missing. And use tier i, which must be usable (returns whether it is). */
int fb_isa(void);
int fb_use_isa(int i);

/* ---- threads: large calls are cut into as many parts; from several threads at once, one call gets the pool */
/* Those with FB_EXPORT are for threadpoolctl, which knows a library by its symbols. */
FB_EXPORT int fb_get_num_threads(void); /* of the calling thread: its own number, else that of the process */
FB_EXPORT int fb_get_process_threads(void);
/* n >= 1; 0: the default, min(CPUs of this process, its CPU quota) or what the environment says: FASTBLOCK_NUM_THREADS,
 * else OMP_NUM_THREADS */
FB_EXPORT void fb_set_num_threads(int n);
void fb_set_own_threads(int n); /* for the calls of the calling thread only; 0: that of the process */

/* ---- interruption: a call that takes long asks `check` every 30 ms or so, from the thread of the caller, whether to
 * stop, and if it returns anything but 0 ends with FB_INTERRUPTED. One function for the whole process; NULL: none. */
void fb_set_interrupt(int (*check)(void));

/* ---- the primitives of the tier in use, elementwise over n elements */
fb_status fb_fma(fb_dtype dtype, const void *a, const void *b, const void *c, void *out, ptrdiff_t n);
fb_status fb_exp(fb_dtype dtype, const void *x, void *out, ptrdiff_t n);
/* Keep the FMA units busy with independent chains in registers, in loop 0 or 1; *flops receives the operations done. */
fb_status fb_fma_chains(fb_dtype dtype, ptrdiff_t rounds, int loop, double *flops);

#endif
