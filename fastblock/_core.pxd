# The public C header of fastblock, for Cython code that calls it directly.
from libc.stdint cimport uint8_t


cdef extern from "fastblock.h" nogil:
    ctypedef enum fb_dtype:
        FB_F32
        FB_F64
    ctypedef enum fb_status:
        FB_OK
        FB_NO_MEMORY
        FB_INTERRUPTED
        FB_NO_TIER
    ctypedef struct fb_panels:
        void *data
        Py_ssize_t n, k
        int finite
    ctypedef struct fb_params:
        fb_dtype dtype
        fb_panels w1, w2, w_q, w_k
        void *b1
        void *b2
        void *b_q
        void *b_k
    fb_status fb_panels_pack(fb_dtype, const void *w, Py_ssize_t n, Py_ssize_t k, Py_ssize_t w_row, fb_panels *)
    fb_status fb_panels_keep_rows(fb_dtype, fb_panels *)
    void fb_panels_unpack(fb_dtype, const fb_panels *, void *w)
    void fb_panels_free(fb_panels *)
    fb_status fb_bias_pack(fb_dtype, const void *bias, Py_ssize_t n, void **out)
    void fb_params_free(fb_params *)
    fb_status fb_bias_relu(fb_dtype, const void *x, const void *bias, void *out, Py_ssize_t rows, Py_ssize_t hidden)
    fb_status fb_project(fb_dtype, const void *x, Py_ssize_t rows, const fb_panels *w, const void *bias, int relu,
                         void *out)
    fb_status fb_feed_forward(const fb_params *, const void *x, Py_ssize_t rows, void *out)
    fb_status fb_mix_positions(fb_dtype, Py_ssize_t batch, const void *weights, Py_ssize_t weights_batch,
                               const void *x, Py_ssize_t x_batch, void *out, Py_ssize_t positions,
                               Py_ssize_t features)
    fb_status fb_attention_weights(const fb_params *, Py_ssize_t batch, const void *x, Py_ssize_t positions,
                                   int causal, const uint8_t *key_mask, void *out)
    fb_status fb_block(const fb_params *, Py_ssize_t batch, const void *x, Py_ssize_t x_batch, Py_ssize_t positions,
                       const void *weights, Py_ssize_t weights_batch, int causal, const uint8_t *key_mask, void *out)
    const char *fb_isa_name(int i)
    int fb_isa_compiled(int i)
    int fb_isa_usable(int i)
    int fb_isa()
    int fb_use_isa(int i)
    int fb_get_num_threads()
    int fb_get_process_threads()
    void fb_set_own_threads(int n)
    void fb_set_num_threads(int n)
    void fb_set_interrupt(int (*check)() noexcept nogil)
    fb_status fb_fma(fb_dtype, const void *a, const void *b, const void *c, void *out, Py_ssize_t n)
    fb_status fb_exp(fb_dtype, const void *x, void *out, Py_ssize_t n)
    fb_status fb_fma_chains(fb_dtype, Py_ssize_t rounds, int loop, double *flops)
