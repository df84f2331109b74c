# cython: language_level=3, binding=False, autotestdict=False, freethreading_compatible=True
"""The boundary: check the arguments, allocate, call C once, turn a status into an exception. No arithmetic here.

Arguments that are not directly usable (strided, unaligned) are copied into contiguous arrays; never is a dtype
converted. `out` is written directly if it can be, else through a temporary array, so that it may overlap an input.

Between the checks and the call Python code may run: in other threads, or in a finaliser when an allocation starts the
garbage collector. It may resize what was checked. So `readable` and `writable` take the pointers last of all, compare
each array with what the checks have found, and no Python code runs from there to C.

The first line of a docstring is the signature for `inspect` and `help`. A required argument has the default `_nothing`
in the code: then a call without it is told its name, which Cython's own message does not know.
"""

import operator
import os
import threading
import time

cimport cython
cimport numpy as cnp

import numpy as np

cnp.import_array()

cdef extern from *:
    """
    #include <stdatomic.h>

    /* What was written before it was set is seen by whoever finds it set, with or without a GIL. */
    typedef struct { atomic_int set; } fb_flag;

    static inline int flag_is_set(fb_flag *flag) { return atomic_load_explicit(&flag->set, memory_order_acquire); }
    static inline void set_flag(fb_flag *flag) { atomic_store_explicit(&flag->set, 1, memory_order_release); }
    """
    ctypedef struct fb_flag:
        pass
    int flag_is_set(fb_flag *) noexcept nogil
    void set_flag(fb_flag *) noexcept nogil

cdef extern from *:
    """
    #if defined(__clang__)
    #define FB_COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
    #define FB_COMPILER "gcc " __VERSION__
    #elif defined(_MSC_VER)
    #define FB_COMPILER "msvc"
    #else
    #define FB_COMPILER "unknown"
    #endif
    """
    const char *FB_COMPILER
    bint PyArray_CheckExact(object)
    bint PyArray_ISCARRAY_RO(cnp.ndarray)
    bint PyArray_ISCARRAY(cnp.ndarray)

cdef extern from *:
    """
    static int raised(void) { return -1; }
    """
    int raised() except -1  # an exception that is already set
    int PyErr_CheckSignals()  # declared without its exception: it is to stay set until the call has ended
    unsigned long PyThread_get_thread_ident() noexcept nogil

cdef extern from "fb_internal.h" nogil:
    int fb_quota_cpus(const char *root)

_nothing = type("nothing", (), {})()  # "got nothing"

cdef enum:
    # Below this many multiply-adds (about 10 us) a call keeps the GIL: handing it over would cost more than it gives.
    KEEP_GIL = 300000


# ---- checks

cdef inline bint is_plain(object a, int kind):
    """Whether `a` is exactly an ndarray of this type that C can read as it is."""
    return PyArray_CheckExact(a) and cnp.PyArray_TYPE(a) == kind and PyArray_ISCARRAY_RO(a)


cdef cnp.ndarray base_array(object a, str name, str types):
    """`a` as an exact ndarray: what a subclass says of its shape or dtype may not be what C would read."""
    if PyArray_CheckExact(a):
        return a
    # Not isinstance: it believes an object that says of itself what its class is.
    if not cnp.PyArray_Check(a) or issubclass(type(a), np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a numpy.ndarray of {types}, got {type(a).__name__}{remedy(a, name, types)}")
    return cnp.PyArray_FROM_OF(a, cnp.NPY_ARRAY_ENSUREARRAY)


cdef str remedy(object a, str name, str types):
    """How to make an array of what is none; nothing where that would be a guess, or no memory to write a result to."""
    cls = type(a)
    if hasattr(cls, "detach") and hasattr(cls, "numpy"):
        way = f"{name}.detach().numpy()"
    elif name == "out" or cnp.PyArray_Check(a) or issubclass(cls, np.generic):
        return ""
    elif issubclass(cls, (list, tuple, memoryview)) or hasattr(cls, "__array__"):
        way = f"np.asarray({name}, {'bool' if types == 'bool' else 'np.float32'})"
    elif hasattr(cls, "__dlpack__"):
        way = f"np.from_dlpack({name})"
    else:
        return ""
    return f" ({way} gives one)"


cdef bint as_bool(object a, str name) except -1:
    """A bool of Python or NumPy; anything else has a truth, too, but 'no' is true."""
    if a is True or a is False:
        return a is True
    if type(a) is not np.bool_:
        raise TypeError(f"{name}: expected a bool, got {type(a).__name__}")
    return a


cdef cnp.ndarray as_array(object a, str name):
    """`a` as an ndarray of native float32 or float64; TypeError if it is anything else."""
    cdef cnp.ndarray array = base_array(a, name, "float32 or float64")
    cdef int kind = cnp.PyArray_TYPE(array)
    if kind != cnp.NPY_FLOAT32 and kind != cnp.NPY_FLOAT64:
        raise TypeError(f"{name}: expected dtype float32 or float64, got {array.dtype}")
    if cnp.PyArray_ISBYTESWAPPED(array):
        raise TypeError(f"{name}: expected native byte order, got dtype {array.dtype.str!r}")
    return array


cdef cnp.ndarray as_array_like(object a, str name, cnp.ndarray first, str first_name):
    """`a` as an ndarray of the dtype of the first argument."""
    cdef cnp.ndarray array = as_array(a, name)
    if cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(first):
        raise TypeError(f"{name}: expected dtype {first.dtype} (as {first_name}), got {array.dtype}")
    return array


cdef tuple shape_of(cnp.ndarray a):
    return (<object>a).shape


cdef wrong_shape(str name, str expected, cnp.ndarray a):
    return ValueError(f"{name}: expected shape {expected}, got {shape_of(a)}")


cdef Py_ssize_t last_dim(cnp.ndarray a):
    return cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1)


cdef check_rows(cnp.ndarray x, str name, Py_ssize_t features):
    """x: (..., features)"""
    if cnp.PyArray_NDIM(x) < 1 or last_dim(x) != features:
        raise wrong_shape(name, f"(..., {features})", x)


cdef check_matrix(cnp.ndarray w, str name, object n, object k):
    """w: (n, k); a dimension given as a str is free."""
    if (cnp.PyArray_NDIM(w) != 2 or (not isinstance(n, str) and cnp.PyArray_DIM(w, 0) != n)
            or (not isinstance(k, str) and cnp.PyArray_DIM(w, 1) != k)):
        raise wrong_shape(name, f"({n}, {k})", w)


cdef cnp.ndarray check_bias(object b, str name, Py_ssize_t n, cnp.ndarray first, str first_name):
    """b: (n,) or None"""
    if b is None:
        return None
    cdef cnp.ndarray bias = as_array_like(b, name, first, first_name)
    if cnp.PyArray_NDIM(bias) != 1 or cnp.PyArray_DIM(bias, 0) != n:
        raise wrong_shape(name, f"({n},)", bias)
    return contiguous(bias)


cdef cnp.ndarray contiguous(cnp.ndarray a):
    """`a`, or a contiguous and aligned copy of it."""
    if PyArray_ISCARRAY_RO(a):
        return a
    check_size(shape_of(a), cnp.PyArray_ITEMSIZE(a))
    return cnp.PyArray_FROM_OF(a, cnp.NPY_ARRAY_C_CONTIGUOUS | cnp.NPY_ARRAY_ALIGNED)


cdef check_size(tuple shape, Py_ssize_t itemsize):
    """NumPy answers a size that overflows with a ValueError; it is a lack of memory like any other."""
    size = itemsize
    for n in shape:
        size *= max(n, 1)
    if size > <Py_ssize_t>(<size_t>-1 >> 1):
        raise MemoryError(f"an array of shape {shape} is larger than the address space")


cdef cnp.ndarray check_out(object out, tuple shape, cnp.ndarray first, str first_name):
    """`out` if given and fit to be written, else a new array."""
    if out is None:
        check_size(shape, cnp.PyArray_ITEMSIZE(first))
        return np.empty(shape, first.dtype)
    cdef cnp.ndarray array = as_array_like(out, "out", first, first_name)
    if shape_of(array) != shape:
        raise wrong_shape("out", f"{shape}", array)
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError("out: expected a writable array, got a read-only one")
    return array


cdef const void *readable(cnp.ndarray a, str name, int kind, Py_ssize_t elements) except? NULL:
    """The memory of an array, which must still be what the checks have found: so much of this type, contiguous."""
    if cnp.PyArray_TYPE(a) != kind or not PyArray_ISCARRAY_RO(a) or cnp.PyArray_SIZE(a) != elements:
        raise RuntimeError(f"{name}: the array was changed during the call")
    return cnp.PyArray_DATA(a)


cdef void *writable(cnp.ndarray a, str name, int kind, Py_ssize_t elements) except? NULL:
    """The same of an array that C writes."""
    if not PyArray_ISCARRAY(a):
        raise RuntimeError(f"{name}: the array was changed during the call")
    return <void *>readable(a, name, kind, elements)


cdef bint overlap(cnp.ndarray a, cnp.ndarray b):
    """Whether two contiguous arrays share a byte."""
    cdef size_t a0 = <size_t>cnp.PyArray_DATA(a), b0 = <size_t>cnp.PyArray_DATA(b)
    return a0 < b0 + cnp.PyArray_NBYTES(b) and b0 < a0 + cnp.PyArray_NBYTES(a)


cdef cnp.ndarray target_for(cnp.ndarray out, tuple inputs):
    """`out`, or a temporary array if C cannot write `out` directly or would overwrite an input that it still reads."""
    cdef bint direct = PyArray_ISCARRAY(out)
    for a in inputs:
        if a is not None and direct:
            direct = not overlap(out, a)
    if direct:
        return out
    check_size(shape_of(out), cnp.PyArray_ITEMSIZE(out))
    return np.empty(shape_of(out), out.dtype)


cdef int raise_status(fb_status status) except -1:
    if status == FB_INTERRUPTED:
        return raised()  # by the signal's handler
    raise MemoryError("the workspace of the operation cannot be allocated")


cdef object deliver(fb_status status, cnp.ndarray target, cnp.ndarray result, object out):
    """The caller's own `out`, of whatever class, or the new array."""
    if status != FB_OK:
        raise_status(status)
    if target is not result:
        np.copyto(result, target)
    return result if out is None else out


cdef inline fb_dtype dtype_of(int kind) noexcept nogil:
    return FB_F32 if kind == cnp.NPY_FLOAT32 else FB_F64


cdef inline int kind_of(fb_dtype dtype) noexcept nogil:
    return cnp.NPY_FLOAT32 if dtype == FB_F32 else cnp.NPY_FLOAT64


cdef Py_ssize_t rows_of(cnp.ndarray x):
    """Positions of x (..., features), leading dimensions flattened."""
    cdef Py_ssize_t rows = 1
    cdef int i
    for i in range(cnp.PyArray_NDIM(x) - 1):
        rows *= cnp.PyArray_DIM(x, i)
    return rows


# ---- packing

cdef pack(cnp.ndarray w, str name, int kind, Py_ssize_t n, Py_ssize_t k, fb_panels *out):
    """Copy a matrix (n, k) into panels."""
    cdef fb_status status
    w = contiguous(w)
    cdef const void *data = readable(w, name, kind, n * k)
    with nogil:
        status = fb_panels_pack(dtype_of(kind), data, n, k, k, out)
    if status == FB_NO_MEMORY:
        raise MemoryError(f"packed weights of shape ({n}, {k}) cannot be allocated")


cdef pack_bias(cnp.ndarray bias, str name, int kind, Py_ssize_t n, void **out):
    if bias is not None and fb_bias_pack(dtype_of(kind), readable(bias, name, kind, n), n, out):
        raise MemoryError(f"a packed bias of shape ({n},) cannot be allocated")


@cython.auto_pickle(False)
cdef class Packed:
    """Owns packed parameters."""
    cdef fb_params params

    def __dealloc__(self):
        fb_params_free(&self.params)

    cdef cnp.ndarray unpack(self, const fb_panels *panels):
        if panels.data == NULL:
            return None
        w = np.empty((panels.n, panels.k), np.float32 if self.params.dtype == FB_F32 else np.float64)
        fb_panels_unpack(self.params.dtype, panels, cnp.PyArray_DATA(w))
        return w

    cdef cnp.ndarray unpack_bias(self, const void *bias, Py_ssize_t n):
        if bias == NULL:
            return None
        b = np.empty(n, np.float32 if self.params.dtype == FB_F32 else np.float64)
        cdef const char *source = <const char *>bias
        cdef char *destination = <char *>cnp.PyArray_DATA(b)
        cdef Py_ssize_t i
        for i in range(cnp.PyArray_NBYTES(b)):
            destination[i] = source[i]
        return b


cdef tuple check_feed_forward(object w1, object b1, object w2, object b2, cnp.ndarray first, str first_name):
    """(w1, b1, w2, b2) as arrays, w1 (F, D), b1 (F), w2 (D, F), b2 (D), and after them type, F and D."""
    cdef int kind = cnp.PyArray_TYPE(first)
    w1 = as_array_like(w1, "w1", first, first_name)
    check_matrix(w1, "w1", "F", "D" if first is w1 else last_dim(first) if cnp.PyArray_NDIM(first) else "D")
    hidden, features = w1.shape
    w2 = as_array_like(w2, "w2", first, first_name)
    check_matrix(w2, "w2", features, hidden)
    b1, b2 = check_bias(b1, "b1", hidden, first, first_name), check_bias(b2, "b2", features, first, first_name)
    return w1, b1, w2, b2, kind, hidden, features


cdef tuple check_query_key(object w_q, object w_k, object b_q, object b_k, cnp.ndarray first, str first_name,
                           Py_ssize_t features):
    """(w_q, w_k, b_q, b_k) as arrays, w_q and w_k (E, D), b_q and b_k (E), and after them type, E and D."""
    cdef int kind = cnp.PyArray_TYPE(first)
    w_q = as_array_like(w_q, "w_q", first, first_name)
    check_matrix(w_q, "w_q", "E", features)
    width = w_q.shape[0]
    w_k = as_array_like(w_k, "w_k", first, first_name)
    check_matrix(w_k, "w_k", width, features)
    b_q, b_k = check_bias(b_q, "b_q", width, first, first_name), check_bias(b_k, "b_k", width, first, first_name)
    return w_q, w_k, b_q, b_k, kind, width, features


cdef Packed pack_feed_forward(tuple checked, Packed packed):
    w1, b1, w2, b2, kind, hidden, features = checked
    packed.params.dtype = dtype_of(kind)
    pack(w1, "w1", kind, hidden, features, &packed.params.w1)
    pack(w2, "w2", kind, features, hidden, &packed.params.w2)
    pack_bias(b1, "b1", kind, hidden, &packed.params.b1)
    pack_bias(b2, "b2", kind, features, &packed.params.b2)
    return packed


cdef keep_rows(Packed packed):
    cdef fb_status status
    with nogil:
        status = fb_panels_keep_rows(packed.params.dtype, &packed.params.w2)
    if status == FB_NO_MEMORY:
        raise MemoryError(f"packed weights of shape ({packed.params.w2.n}, {packed.params.w2.k}) cannot be allocated")


cdef Packed pack_query_key(tuple checked, Packed packed):
    w_q, w_k, b_q, b_k, kind, width, features = checked
    packed.params.dtype = dtype_of(kind)
    pack(w_q, "w_q", kind, width, features, &packed.params.w_q)
    pack(w_k, "w_k", kind, width, features, &packed.params.w_k)
    pack_bias(b_q, "b_q", kind, width, &packed.params.b_q)
    pack_bias(b_k, "b_k", kind, width, &packed.params.b_k)
    return packed


# ---- calls of C, from checked arguments

cdef inline bint is_quick(Py_ssize_t rows, Py_ssize_t work):
    """Whether rows * work multiply-adds are few. In integers: floating-point exceptions belong to the caller here."""
    return rows <= KEEP_GIL // max(work, 1)


cdef project(cnp.ndarray x, const fb_panels *w, const void *bias, bint relu, object out, str name):
    """out = project(x) for x (..., k)"""
    check_rows(x, name, w.k)
    cdef int kind = cnp.PyArray_TYPE(x)
    cdef Py_ssize_t rows = rows_of(x)
    cdef cnp.ndarray result = check_out(out, shape_of(x)[:-1] + (w.n,), x, name)
    x = contiguous(x)
    cdef cnp.ndarray target = target_for(result, (x,))
    cdef const void *source = readable(x, name, kind, rows * w.k)
    cdef void *destination = writable(target, "out", kind, rows * w.n)
    cdef fb_status status
    if is_quick(rows, w.n * w.k):
        status = fb_project(dtype_of(kind), source, rows, w, bias, relu, destination)
    else:
        with nogil:
            status = fb_project(dtype_of(kind), source, rows, w, bias, relu, destination)
    return deliver(status, target, result, out)


cdef run_feed_forward(const fb_params *params, cnp.ndarray x, object out):
    check_rows(x, "x", params.w1.k)
    cdef int kind = kind_of(params.dtype)
    cdef Py_ssize_t rows = rows_of(x)
    cdef cnp.ndarray result = check_out(out, shape_of(x), x, "x")
    x = contiguous(x)
    cdef cnp.ndarray target = target_for(result, (x,))
    cdef const void *source = readable(x, "x", kind, rows * params.w1.k)
    cdef void *destination = writable(target, "out", kind, rows * params.w1.k)
    cdef fb_status status
    if is_quick(rows, 2 * params.w1.n * params.w1.k):
        status = fb_feed_forward(params, source, rows, destination)
    else:
        with nogil:
            status = fb_feed_forward(params, source, rows, destination)
    return deliver(status, target, result, out)


cdef struct Sizes:
    # Of a batch of matrices; the batch strides are 0 where one matrix serves the whole batch.
    Py_ssize_t batch, positions, features, weights_batch, x_batch


cdef tuple mixing_arguments(object weights, cnp.ndarray x, object out, Sizes *sizes):
    """(weights, x, out) checked, weights and x made contiguous."""
    cdef cnp.ndarray a = as_array_like(weights, "weights", x, "x")
    if cnp.PyArray_NDIM(x) < 2:
        raise wrong_shape("x", "(..., P, D)", x)
    shape = shape_of(x)
    cdef Py_ssize_t positions = shape[-2], features = shape[-1]
    cdef int a_dims = cnp.PyArray_NDIM(a)
    if a_dims < 2 or cnp.PyArray_DIM(a, a_dims - 2) != positions or cnp.PyArray_DIM(a, a_dims - 1) != positions:
        raise wrong_shape("weights", f"(..., {positions}, {positions})", a)
    a_lead, x_lead = shape_of(a)[:-2], shape[:-2]
    lead = x_lead
    if a_lead != x_lead:
        lead = broadcast_lead(a_lead, x_lead)
        if lead is None:
            raise ValueError(f"weights: expected leading dimensions that broadcast with {x_lead} of x, "
                             f"got shape {shape_of(a)}")
        check_size(lead + shape[-2:], cnp.PyArray_ITEMSIZE(x))
        if a_lead and a_lead != lead:
            a = np.broadcast_to(a, lead + (positions, positions))
        if x_lead and x_lead != lead:
            x = np.broadcast_to(x, lead + shape[-2:])
    sizes.positions, sizes.features, sizes.batch = positions, features, 1
    for n in lead:
        sizes.batch *= n
    sizes.weights_batch = sizes.positions * sizes.positions if a_lead else 0
    sizes.x_batch = sizes.positions * sizes.features if x_lead else 0
    cdef cnp.ndarray result = check_out(out, lead + shape[-2:], x, "x")
    return contiguous(a), contiguous(x), result


cdef Sizes sizes_of(cnp.ndarray x):
    """Of x (..., P, D) with weights of its own."""
    cdef Sizes sizes
    cdef int i, n = cnp.PyArray_NDIM(x)
    sizes.positions, sizes.features = cnp.PyArray_DIM(x, n - 2), cnp.PyArray_DIM(x, n - 1)
    sizes.batch = 1
    for i in range(n - 2):
        sizes.batch *= cnp.PyArray_DIM(x, i)
    sizes.weights_batch = 0
    sizes.x_batch = sizes.positions * sizes.features if n > 2 else 0
    return sizes


cdef Py_ssize_t matrices(const Sizes *sizes, Py_ssize_t stride):
    """How many matrices an operand with this batch stride has. (Matrices without elements count as one.)"""
    return sizes.batch if stride else 1


cdef tuple broadcast_lead(tuple a, tuple b):
    """The shape that shapes a and b broadcast to, or None. (numpy.broadcast_shapes takes a product that overflows for
    a mismatch.)"""
    n = max(len(a), len(b))
    pairs = list(zip((1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b))
    if any(i != j and i != 1 and j != 1 for i, j in pairs):
        return None
    return tuple([i if j == 1 else j for i, j in pairs])


cdef cnp.ndarray check_key_mask(object key_mask, cnp.ndarray x):
    """key_mask as a contiguous bool array of the shape of x without its features, or None."""
    if key_mask is None:
        return None
    key_mask = base_array(key_mask, "key_mask", "bool")
    if cnp.PyArray_TYPE(key_mask) != cnp.NPY_BOOL:
        raise TypeError(f"key_mask: expected dtype bool, got {key_mask.dtype}")
    shape = shape_of(x)[:-1]
    if key_mask.shape != shape:
        if key_mask.ndim < 1 or key_mask.shape[-1] != shape[-1]:
            raise wrong_shape("key_mask", f"(..., {shape[-1]})", key_mask)
        try:
            key_mask = np.broadcast_to(key_mask, shape)
        except ValueError:
            raise ValueError(f"key_mask: expected a shape that broadcasts to {shape}, got {key_mask.shape}") from None
    return contiguous(key_mask)


cdef const uint8_t *mask_data(cnp.ndarray key_mask, Py_ssize_t keys) except? NULL:
    if key_mask is None:
        return NULL
    return <const uint8_t *>readable(key_mask, "key_mask", cnp.NPY_BOOL, keys)


cdef run_block(const fb_params *params, object x_, object weights, object causal_, object key_mask, object out):
    """Block.__call__ for any arguments."""
    cdef bint causal = as_bool(causal_, "causal")
    cdef cnp.ndarray x = as_array(x_, "x"), a = None, mask = None, result, target
    cdef int kind = kind_of(params.dtype)
    cdef Sizes sizes
    if cnp.PyArray_TYPE(x) != kind:
        raise TypeError(f"x: expected dtype {'float32' if params.dtype == FB_F32 else 'float64'} "
                        f"(as the block), got {x.dtype}")
    if cnp.PyArray_NDIM(x) < 2 or last_dim(x) != params.w1.k:
        raise wrong_shape("x", f"(..., P, {params.w1.k})", x)
    if weights is not None:
        if causal or key_mask is not None:
            raise ValueError("causal, key_mask: they belong to the block's own query-key module and "
                             "cannot be combined with weights")
        a, x, result = mixing_arguments(weights, x, out, &sizes)
    else:
        if params.w_q.data == NULL:
            raise ValueError("weights: expected an attention weight matrix of shape (..., P, P), got None, and the "
                             "block has no query-key module of its own (w_q, w_k)")
        sizes = sizes_of(x)
        mask = check_key_mask(key_mask, x)
        result = check_out(out, shape_of(x), x, "x")
        x = contiguous(x)
    target = target_for(result, (x, a, mask))
    cdef Py_ssize_t matrix = sizes.positions * params.w1.k
    cdef const void *source = readable(x, "x", kind, matrices(&sizes, sizes.x_batch) * matrix)
    cdef const void *mixing = NULL
    if a is not None:
        mixing = readable(a, "weights", kind,
                          matrices(&sizes, sizes.weights_batch) * sizes.positions * sizes.positions)
    cdef const uint8_t *mask_bytes = mask_data(mask, sizes.batch * sizes.positions)
    cdef void *destination = writable(target, "out", kind, sizes.batch * matrix)
    cdef fb_status status
    with nogil:
        status = fb_block(params, sizes.batch, source, sizes.x_batch, sizes.positions, mixing, sizes.weights_batch,
                          causal, mask_bytes, destination)
    return deliver(status, target, result, out)


# ---- operations

def mix_positions(weights=_nothing, x=_nothing, *, out=None):
    """mix_positions(weights, x, *, out=None)\n--\n\n\
    Combine features across positions: ``Z = A X``.

    ::

        Z[i, c] = finish(chain256_j(A[i, j], X[j, c]))

    Parameters
    ----------
    weights : ndarray (..., P, P), float32 or float64
        The attention weight matrix A, one or one for each batch item.
    x : ndarray (..., P, D), same dtype
        Features of the positions. Leading dimensions broadcast with those of `weights` as in `numpy.matmul`.
    out : ndarray (..., P, D), optional
        Where to put the result. It may overlap an input.

    Returns
    -------
    ndarray (..., P, D)
        `out`, or a new array.

    Raises
    ------
    ValueError
        If a shape does not fit or `out` is read-only.
    TypeError
        If an argument is no array, or the dtypes differ or are not supported.

    See Also
    --------
    fastblock.reference.mix_positions : the definition of the result.

    Examples
    --------
    >>> import numpy as np, fastblock
    >>> a = np.array([[1, 1], [0, 1]], np.float32)
    >>> x = np.array([[1, 2, 3], [10, 20, 30]], np.float32)
    >>> fastblock.mix_positions(a, x)
    array([[11., 22., 33.],
           [10., 20., 30.]], dtype=float32)
    """
    cdef cnp.ndarray x_array = as_array(x, "x"), a, result, target
    cdef int kind = cnp.PyArray_TYPE(x_array)
    cdef Sizes sizes
    a, x_array, result = mixing_arguments(weights, x_array, out, &sizes)
    target = target_for(result, (a, x_array))
    cdef Py_ssize_t matrix = sizes.positions * sizes.features
    cdef const void *mixing = readable(a, "weights", kind,
                                       matrices(&sizes, sizes.weights_batch) * sizes.positions * sizes.positions)
    cdef const void *source = readable(x_array, "x", kind, matrices(&sizes, sizes.x_batch) * matrix)
    cdef void *destination = writable(target, "out", kind, sizes.batch * matrix)
    cdef fb_status status
    if is_quick(sizes.batch, matrix * sizes.positions):
        status = fb_mix_positions(dtype_of(kind), sizes.batch, mixing, sizes.weights_batch, source, sizes.x_batch,
                                  destination, sizes.positions, sizes.features)
    else:
        with nogil:
            status = fb_mix_positions(dtype_of(kind), sizes.batch, mixing, sizes.weights_batch, source, sizes.x_batch,
                                      destination, sizes.positions, sizes.features)
    return deliver(status, target, result, out)


def bias_relu(x=_nothing, bias=_nothing, *, out=None):
    """bias_relu(x, bias, *, out=None)\n--\n\n\
    Add a bias and set negative values to zero: ``relu(x + bias)``.

    ::

        relu(finish(x[i, f], bias[f])),   relu(v) = v if v > 0 or v is NaN, else +0.0

    Parameters
    ----------
    x : ndarray (..., F), float32 or float64
    bias : ndarray (F,), same dtype
    out : ndarray (..., F), optional
        Where to put the result. It may overlap an input.

    Returns
    -------
    ndarray (..., F)
        `out`, or a new array.

    Raises
    ------
    ValueError
        If a shape does not fit or `out` is read-only.
    TypeError
        If an argument is no array, or the dtypes differ or are not supported.

    See Also
    --------
    fastblock.reference.bias_relu : the definition of the result.

    Examples
    --------
    >>> import numpy as np, fastblock
    >>> fastblock.bias_relu(np.array([[-3.0, 0.5], [2.0, -0.0]]), np.array([1.0, -1.0]))
    array([[0., 0.],
           [3., 0.]])
    """
    cdef cnp.ndarray x_array = as_array(x, "x"), target
    cdef cnp.ndarray b = as_array_like(bias, "bias", x_array, "x")  # required: check_bias takes None, too
    if cnp.PyArray_NDIM(x_array) < 1:
        raise wrong_shape("x", "(..., F)", x_array)
    cdef int kind = cnp.PyArray_TYPE(x_array)
    cdef Py_ssize_t rows = rows_of(x_array), hidden = last_dim(x_array)
    b = check_bias(b, "bias", hidden, x_array, "x")
    cdef cnp.ndarray result = check_out(out, shape_of(x_array), x_array, "x")
    x_array = contiguous(x_array)
    target = target_for(result, (x_array, b))
    cdef const void *source = readable(x_array, "x", kind, rows * hidden)
    cdef const void *bias_data = readable(b, "bias", kind, hidden)
    cdef void *destination = writable(target, "out", kind, rows * hidden)
    cdef fb_status status
    with nogil:
        status = fb_bias_relu(dtype_of(kind), source, bias_data, destination, rows, hidden)
    return deliver(status, target, result, out)


def up_project(x=_nothing, w1=_nothing, b1=None, *, out=None):
    """up_project(x, w1, b1=None, *, out=None)\n--\n\n\
    First layer of the feed-forward network: ``relu(x W1^T + b1)``.

    ::

        H[i, f] = relu(finish(chain256_k(X[i, k], W1[f, k]), b1[f]))

    Parameters
    ----------
    x : ndarray (..., D), float32 or float64
        Features of the positions.
    w1 : ndarray (F, D), same dtype
        Weights, (out, in) as in `torch.nn.Linear`. They are packed on every call; `Block.up_project` has them packed.
    b1 : ndarray (F,), optional
    out : ndarray (..., F), optional
        Where to put the result. It may overlap an input.

    Returns
    -------
    ndarray (..., F)
        `out`, or a new array.

    Raises
    ------
    ValueError
        If a shape does not fit or `out` is read-only.
    TypeError
        If an argument is no array, or the dtypes differ or are not supported.

    See Also
    --------
    fastblock.reference.up_project : the definition of the result.

    Examples
    --------
    >>> import numpy as np, fastblock
    >>> x = np.array([[1.0, 2.0]])
    >>> fastblock.up_project(x, np.array([[1.0, 1.0], [1.0, -1.0], [0.0, 3.0]]), np.array([0.0, 0.5, -1.0]))
    array([[3., 0., 5.]])
    """
    return project_once(x, "x", w1, "w1", "F", b1, "b1", True, out)


def down_project(h=_nothing, w2=_nothing, b2=None, *, out=None):
    """down_project(h, w2, b2=None, *, out=None)\n--\n\n\
    Second layer of the feed-forward network: ``h W2^T + b2``.

    ::

        Y[i, c] = finish(chain256_f(H[i, f], W2[c, f]), b2[c])

    Parameters
    ----------
    h : ndarray (..., F), float32 or float64
        Hidden activations.
    w2 : ndarray (D, F), same dtype
        Weights, (out, in) as in `torch.nn.Linear`. They are packed on every call; `Block.down_project` has them packed.
    b2 : ndarray (D,), optional
    out : ndarray (..., D), optional
        Where to put the result. It may overlap an input.

    Returns
    -------
    ndarray (..., D)
        `out`, or a new array.

    Raises
    ------
    ValueError
        If a shape does not fit or `out` is read-only.
    TypeError
        If an argument is no array, or the dtypes differ or are not supported.

    See Also
    --------
    fastblock.reference.down_project : the definition of the result.

    Examples
    --------
    >>> import numpy as np, fastblock
    >>> h = np.array([[3.0, 0.0, 5.0]])
    >>> fastblock.down_project(h, np.array([[1.0, 2.0, -1.0], [0.0, 1.0, 1.0]]), np.array([0.5, 0.0]))
    array([[-1.5,  5. ]])
    """
    return project_once(h, "h", w2, "w2", "D", b2, "b2", False, out)


cdef project_once(object x, str x_name, object w, str w_name, str n_name, object b, str b_name, bint relu, object out):
    """up_project and down_project: pack the weights for this one call."""
    cdef cnp.ndarray x_array = as_array(x, x_name)
    cdef cnp.ndarray w_array = as_array_like(w, w_name, x_array, x_name)
    if cnp.PyArray_NDIM(x_array) < 1:
        raise wrong_shape(x_name, f"(..., {'D' if relu else 'F'})", x_array)
    check_matrix(w_array, w_name, n_name, last_dim(x_array))
    cdef int kind = cnp.PyArray_TYPE(x_array)
    cdef Py_ssize_t n = cnp.PyArray_DIM(w_array, 0), k = last_dim(x_array)
    cdef cnp.ndarray bias = check_bias(b, b_name, n, x_array, x_name)
    cdef cnp.ndarray result = check_out(out, shape_of(x_array)[:-1] + (n,), x_array, x_name)
    cdef Packed packed = Packed()
    packed.params.dtype = dtype_of(kind)
    pack(w_array, w_name, kind, n, k, &packed.params.w1)
    pack_bias(bias, b_name, kind, n, &packed.params.b1)
    return project(x_array, &packed.params.w1, packed.params.b1, relu, result if out is None else out, x_name)


def feed_forward(x=_nothing, w1=_nothing, b1=_nothing, w2=_nothing, b2=_nothing, *, out=None):
    """feed_forward(x, w1, b1, w2, b2, *, out=None)\n--\n\n\
    The position-wise feed-forward network: ``down_project(up_project(x, w1, b1), w2, b2)``.

    ::

        Y = relu(X W1^T + b1) W2^T + b2

    Parameters
    ----------
    x : ndarray (..., D), float32 or float64
        Features of the positions.
    w1 : ndarray (F, D), same dtype
    b1 : ndarray (F,) or None
    w2 : ndarray (D, F)
    b2 : ndarray (D,) or None
        Parameters, weights (out, in) as in `torch.nn.Linear`. They are packed on every call; `Block.feed_forward` has
        them packed.
    out : ndarray (..., D), optional
        Where to put the result. It may overlap an input.

    Returns
    -------
    ndarray (..., D)
        `out`, or a new array.

    Raises
    ------
    ValueError
        If a shape does not fit or `out` is read-only.
    TypeError
        If an argument is no array, or the dtypes differ or are not supported.

    See Also
    --------
    fastblock.reference.feed_forward : the definition of the result.

    Examples
    --------
    >>> import numpy as np, fastblock
    >>> x = np.array([[1.0, 2.0]])
    >>> w1, b1 = np.array([[1.0, 1.0], [1.0, -1.0], [0.0, 3.0]]), np.array([0.0, 0.5, -1.0])
    >>> w2, b2 = np.array([[1.0, 2.0, -1.0], [0.0, 1.0, 1.0]]), np.array([0.5, 0.0])
    >>> fastblock.feed_forward(x, w1, b1, w2, b2)
    array([[-1.5,  5. ]])
    """
    cdef cnp.ndarray x_array = as_array(x, "x")
    if cnp.PyArray_NDIM(x_array) < 1:
        raise wrong_shape("x", "(..., D)", x_array)
    checked = check_feed_forward(w1, b1, w2, b2, x_array, "x")
    cdef cnp.ndarray result = check_out(out, shape_of(x_array), x_array, "x")
    cdef Packed packed = pack_feed_forward(checked, Packed())
    return run_feed_forward(&packed.params, x_array, result if out is None else out)


def attention_weights(x=_nothing, w_q=_nothing, w_k=_nothing, b_q=None, b_k=None, *, causal=False, key_mask=None,
                      out=None):
    """attention_weights(x, w_q, w_k, b_q=None, b_k=None, *, causal=False, key_mask=None, out=None)\n--\n\n\
    The query-key attention module: ``A = softmax(Q K^T / sqrt(E))``.

    ::

        Q = X Wq^T + bq,  K = X Wk^T + bk
        S[i, j] = finish(chain256_e(Q[i, e], K[j, e])) * scale,  scale = 1 / sqrt(E)
        A[i, j] = exp(S[i, j] - max_j S[i, j]) * (1 / chain256_j(exp(...), 1))   over the allowed keys j

    Keys that are not allowed get +0.0, and so does a whole row without an allowed key.

    Parameters
    ----------
    x : ndarray (..., P, D), float32 or float64
        Features of the positions.
    w_q, w_k : ndarray (E, D), same dtype
        Weights of the projections, (out, in) as in `torch.nn.Linear`.
    b_q, b_k : ndarray (E,), optional
    causal : bool, optional
        Position i sees the keys 0 .. i only.
    key_mask : ndarray (..., P) of bool, optional
        True keeps a key. It broadcasts to the shape of `x` without the features.
    out : ndarray (..., P, P), optional
        Where to put the result. It may overlap an input.

    Returns
    -------
    ndarray (..., P, P)
        `out`, or a new array.

    Raises
    ------
    ValueError
        If a shape does not fit or `out` is read-only.
    TypeError
        If an argument is no array, or the dtypes differ or are not supported; if `causal` is no bool.

    See Also
    --------
    fastblock.reference.attention_weights : the definition of the result.

    Examples
    --------
    >>> import numpy as np, fastblock
    >>> x, w = np.array([[1.0], [0.0]]), np.array([[1.0]])
    >>> fastblock.attention_weights(x, w, w, causal=True)
    array([[1. , 0. ],
           [0.5, 0.5]])
    """
    cdef bint is_causal = as_bool(causal, "causal")
    cdef cnp.ndarray x_array = as_array(x, "x"), target
    if cnp.PyArray_NDIM(x_array) < 2:
        raise wrong_shape("x", "(..., P, D)", x_array)
    cdef int kind = cnp.PyArray_TYPE(x_array)
    cdef Sizes sizes = sizes_of(x_array)
    cdef Py_ssize_t rows = sizes.batch * sizes.positions
    checked = check_query_key(w_q, w_k, b_q, b_k, x_array, "x", sizes.features)
    cdef cnp.ndarray mask = check_key_mask(key_mask, x_array)
    cdef cnp.ndarray result = check_out(out, shape_of(x_array)[:-1] + (sizes.positions,), x_array, "x")
    x_array = contiguous(x_array)
    target = target_for(result, (x_array, mask))
    cdef Packed packed = pack_query_key(checked, Packed())
    cdef const void *source = readable(x_array, "x", kind, rows * sizes.features)
    cdef const uint8_t *mask_bytes = mask_data(mask, rows)
    cdef void *destination = writable(target, "out", kind, rows * sizes.positions)
    cdef fb_status status
    with nogil:
        status = fb_attention_weights(&packed.params, sizes.batch, source, sizes.positions, is_causal, mask_bytes,
                                      destination)
    return deliver(status, target, result, out)


# ---- the block

@cython.auto_pickle(False)
cdef class PackedBlock(Packed):
    """PackedBlock(w1, b1, w2, b2, *, w_q=None, w_k=None, b_q=None, b_k=None)\n--\n\n\
    Parameters of a block, checked, copied and packed once; `fastblock.Block` is its public face.

    They are there from the moment that `ready` is set, and never change again: a call needs no lock.
    """
    cdef fb_flag ready

    def __init__(self, w1=_nothing, b1=_nothing, w2=_nothing, b2=_nothing, *, w_q=None, w_k=None, b_q=None, b_k=None):
        """__init__($self, w1, b1, w2, b2, *, w_q=None, w_k=None, b_q=None, b_k=None)\n--\n\n\
        Check the parameters against each other, and pack them."""
        first = as_array(w1, "w1")
        feed_forward_checked = check_feed_forward(first, b1, w2, b2, first, "w1")
        features = feed_forward_checked[-1]
        query_key_checked = None
        if w_q is not None or w_k is not None:
            for name, w in (("w_q", w_q), ("w_k", w_k)):
                if w is None:
                    raise ValueError(f"{name}: expected an array of shape (E, {features}), got None: "
                                     "the query-key module needs both w_q and w_k")
            query_key_checked = check_query_key(w_q, w_k, b_q, b_k, first, "w1", features)
        elif b_q is not None or b_k is not None:
            raise ValueError("b_q, b_k: expected None without w_q and w_k, got an array")
        cdef Packed packed = Packed()  # all or nothing: a failure leaves this object as it was
        pack_feed_forward(feed_forward_checked, packed)
        keep_rows(packed)
        if query_key_checked is not None:
            pack_query_key(query_key_checked, packed)
        with cython.critical_section(self):
            if flag_is_set(&self.ready):  # asked where nothing can come in between: packing let other threads run
                raise RuntimeError("a block cannot be initialised twice: make a new one")
            self.params, packed.params = packed.params, self.params
            set_flag(&self.ready)

    cdef const fb_params *parameters(self) except NULL:
        if not flag_is_set(&self.ready):
            raise RuntimeError("the block has no parameters: its __init__ has not been called, or not to its end")
        return &self.params

    def __call__(self, x=_nothing, weights=None, *, causal=False, key_mask=None, out=None):
        """__call__($self, x, weights=None, *, causal=False, key_mask=None, out=None)\n--\n\n\
        Mix the positions of `x`, then send each through the same two layers.

        ::

            y = relu((A x) w1ᵀ + b1) w2ᵀ + b2        A = weights, or softmax((x w_qᵀ + b_q)(x w_kᵀ + b_k)ᵀ / sqrt(E))

        Parameters
        ----------
        x : ndarray, shape (..., P, D)
            Features of the positions, of the block's dtype.
        weights : ndarray, shape (..., P, P), optional
            The attention weight matrix A, one or one for each batch item. Without it the block's own query-key module
            computes A.
        causal : bool, optional
            Position i attends to the positions 0 .. i only. Not with `weights`.
        key_mask : ndarray of bool, shape (..., P), optional
            True keeps a key. It broadcasts to the shape of `x` without the features. Not with `weights`.
        out : ndarray, shape (..., P, D), optional
            Where to put the result. It may overlap an input.

        Returns
        -------
        ndarray, shape (..., P, D)
            `out`, or a new array.

        Raises
        ------
        ValueError
            A shape does not fit; there are `weights` together with `causal` or `key_mask`, or no weights and the block
            has no query-key module; `out` is read-only.
        TypeError
            An argument is no array, or is not of the block's dtype; `causal` is no bool.
        RuntimeError
            The block was never initialised.

        Examples
        --------
        >>> one = np.eye(2)
        >>> block = fastblock.Block(one, None, one, None, w_q=one, w_k=one)
        >>> x = np.array([[0.0, 2.0], [4.0, 0.0]])
        >>> block(x, np.array([[1.0, 0.0], [0.5, 0.5]]))
        array([[0., 2.],
               [2., 1.]])
        >>> block(x, key_mask=np.array([True, False]))
        array([[0., 2.],
               [0., 2.]])
        """
        cdef cnp.npy_intp *dims
        cdef Py_ssize_t positions
        cdef fb_status status
        cdef int kind = kind_of(self.params.dtype)
        # The hot path of small blocks: one matrix of weights, everything directly usable. No Python code runs in it.
        if (key_mask is None and causal is False and is_plain(x, kind) and is_plain(weights, kind)
                and cnp.PyArray_NDIM(x) == 2 and cnp.PyArray_NDIM(weights) == 2 and flag_is_set(&self.ready)):
            dims = cnp.PyArray_DIMS(x)
            positions = dims[0]
            if (dims[1] == self.params.w1.k and cnp.PyArray_DIM(weights, 0) == positions
                    and cnp.PyArray_DIM(weights, 1) == positions
                    and positions * (positions + 2 * self.params.w1.n) * dims[1] <= KEEP_GIL):
                if out is None:
                    out = cnp.PyArray_SimpleNew(2, dims, kind)
                elif not (is_plain(out, kind) and PyArray_ISCARRAY(out) and cnp.PyArray_NDIM(out) == 2
                          and cnp.PyArray_DIM(out, 0) == positions and cnp.PyArray_DIM(out, 1) == dims[1]
                          and not overlap(out, x) and not overlap(out, weights)):
                    return run_block(&self.params, x, weights, False, None, out)
                status = fb_block(&self.params, 1, cnp.PyArray_DATA(x), 0, positions, cnp.PyArray_DATA(weights), 0, 0,
                                  NULL, cnp.PyArray_DATA(out))
                if status != FB_OK:
                    raise_status(status)
                return out
        return run_block(self.parameters(), x, weights, causal, key_mask, out)

    def feed_forward(self, x=_nothing, *, out=None):
        """feed_forward($self, x, *, out=None)\n--\n\n\
        ``relu(x W1^T + b1) W2^T + b2`` with the packed parameters: both layers, without mixing positions.

        Parameters
        ----------
        x : ndarray, shape (..., D)
        out : ndarray, shape (..., D), optional
            Where to put the result. It may overlap `x`.

        Returns
        -------
        ndarray, shape (..., D)
            `out`, or a new array.

        See Also
        --------
        fastblock.feed_forward : the same for parameters that are used once; errors are the same.

        Examples
        --------
        >>> block = fastblock.Block(np.eye(2), np.array([0.0, 0.5]), 2 * np.eye(2), None)
        >>> block.feed_forward(np.array([[-1.0, 1.0]]))
        array([[0., 3.]])
        """
        cdef const fb_params *params = self.parameters()
        return run_feed_forward(params, self.check_input(x, "x"), out)

    def up_project(self, x=_nothing, *, out=None):
        """up_project($self, x, *, out=None)\n--\n\n\
        ``relu(x W1^T + b1)`` with the packed parameters: the first layer.

        Parameters
        ----------
        x : ndarray, shape (..., D)
        out : ndarray, shape (..., F), optional
            Where to put the result. It may overlap `x`.

        Returns
        -------
        ndarray, shape (..., F)
            `out`, or a new array.

        See Also
        --------
        fastblock.up_project : the same for parameters that are used once; errors are the same.

        Examples
        --------
        >>> block = fastblock.Block(np.eye(2), np.array([0.0, 0.5]), 2 * np.eye(2), None)
        >>> block.up_project(np.array([[-1.0, 1.0]]))
        array([[0. , 1.5]])
        """
        cdef const fb_params *params = self.parameters()
        return project(self.check_input(x, "x"), &params.w1, params.b1, True, out, "x")

    def down_project(self, h=_nothing, *, out=None):
        """down_project($self, h, *, out=None)\n--\n\n\
        ``h W2^T + b2`` with the packed parameters: the second layer.

        Parameters
        ----------
        h : ndarray, shape (..., F)
        out : ndarray, shape (..., D), optional
            Where to put the result. It may overlap `h`.

        Returns
        -------
        ndarray, shape (..., D)
            `out`, or a new array.

        See Also
        --------
        fastblock.down_project : the same for parameters that are used once; errors are the same.

        Examples
        --------
        >>> block = fastblock.Block(np.eye(2), np.array([0.0, 0.5]), 2 * np.eye(2), None)
        >>> block.down_project(np.array([[0.0, 1.5]]))
        array([[0., 3.]])
        """
        cdef const fb_params *params = self.parameters()
        return project(self.check_input(h, "h"), &params.w2, params.b2, False, out, "h")

    cdef cnp.ndarray check_input(self, object x, str name):
        cdef cnp.ndarray array = as_array(x, name)
        if cnp.PyArray_TYPE(array) != kind_of(self.params.dtype):
            raise TypeError(f"{name}: expected dtype {self.dtype} (as the block), got {array.dtype}")
        return array

    @property
    def dtype(self):
        """dtype of the parameters, and of everything the block takes and gives."""
        return np.dtype(np.float32 if self.parameters().dtype == FB_F32 else np.float64)

    @property
    def features(self):
        """D, features of a position."""
        return self.parameters().w1.k

    @property
    def hidden(self):
        """F, hidden units."""
        return self.parameters().w1.n

    @property
    def head_width(self):
        """E, head width of the query-key module; None without one."""
        cdef const fb_params *params = self.parameters()
        return None if params.w_q.data == NULL else params.w_q.n

    @property
    def w1(self):
        """A copy of the up-projection weights, (F, D)."""
        return self.unpack(&self.parameters().w1)

    @property
    def b1(self):
        """A copy of the up-projection bias, (F,), or None."""
        cdef const fb_params *params = self.parameters()
        return self.unpack_bias(params.b1, params.w1.n)

    @property
    def w2(self):
        """A copy of the down-projection weights, (D, F)."""
        return self.unpack(&self.parameters().w2)

    @property
    def b2(self):
        """A copy of the down-projection bias, (D,), or None."""
        cdef const fb_params *params = self.parameters()
        return self.unpack_bias(params.b2, params.w2.n)

    @property
    def w_q(self):
        """A copy of the query weights, (E, D), or None."""
        return self.unpack(&self.parameters().w_q)

    @property
    def w_k(self):
        """A copy of the key weights, (E, D), or None."""
        return self.unpack(&self.parameters().w_k)

    @property
    def b_q(self):
        """A copy of the query bias, (E,), or None."""
        cdef const fb_params *params = self.parameters()
        return self.unpack_bias(params.b_q, params.w_q.n)

    @property
    def b_k(self):
        """A copy of the key bias, (E,), or None."""
        cdef const fb_params *params = self.parameters()
        return self.unpack_bias(params.b_k, params.w_k.n)


def _deliver(y, str name, out):
    """What a call has returned that may do as it likes: checked, and in `out` if that is given."""
    cdef cnp.ndarray array = as_array(y, name)
    if out is None or y is out:
        return y
    np.copyto(check_out(out, shape_of(array), array, name), array)
    return out


# ---- signals

cdef unsigned long _main_thread = threading.main_thread().ident


cdef int signals_raise() noexcept nogil:
    """Run the handlers of the signals that have come, where Python does that; whether one has raised an exception."""
    if PyThread_get_thread_ident() != _main_thread:
        return 0
    with gil:
        return PyErr_CheckSignals()


fb_set_interrupt(signals_raise)


# ---- tiers and threads, for _runtime

def _tiers(usable):
    """The names of the tiers of this CPU, or of this build, fastest first."""
    names, i = [], 0
    while fb_isa_name(i) != NULL:
        if (fb_isa_usable(i) if usable else fb_isa_compiled(i)):
            names.append(fb_isa_name(i).decode())
        i += 1
    return names


def _isa():
    """The name of the tier in use; None if the environment names one that is missing."""
    return None if fb_isa() < 0 else fb_isa_name(fb_isa()).decode()


def _use_isa(str name):
    """Use a tier from now on; whether there is such a tier."""
    cdef int i = 0
    while fb_isa_name(i) != NULL:
        if fb_isa_name(i).decode() == name and fb_use_isa(i):
            return True
        i += 1
    return False


def _compiler():
    return FB_COMPILER.decode()


def _get_num_threads():
    return fb_get_num_threads()


def _set_num_threads(n):
    fb_set_num_threads(thread_count(n))


cdef int thread_count(n) except -1:
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"n: expected a number of threads, got {type(n).__name__}") from None
    if count < 1:
        raise ValueError(f"n: expected at least 1 thread, got {count}")
    return min(count, 256)


def _quota_cpus(root):
    """How many CPUs the files of the cgroups under `root` allow, 0 if they say nothing: for the tests."""
    return fb_quota_cpus(os.fsencode(root))


@cython.auto_pickle(False)
cdef class num_threads:
    """num_threads(n)\n--\n\n\
    Context manager: large calls use up to `n` threads inside, and as many as before afterwards.

    The number holds for the calls of the thread that enters, and for no other; in it, it goes before that of the process,
    which `set_num_threads` sets. Of several contexts that a thread is in, the one entered last counts.

    Parameters
    ----------
    n : int
        At least 1.

    Examples
    --------
    >>> import fastblock
    >>> with fastblock.num_threads(1):
    ...     fastblock.get_num_threads()
    1
    """

    cdef readonly object n  # None until __init__

    def __init__(self, n=_nothing):
        """__init__($self, n)\n--\n\n\
        Check the number."""
        thread_count(n)
        self.n = n

    def __enter__(self):
        if self.n is None:
            raise RuntimeError("num_threads has no number: its __init__ has not been called")
        count = thread_count(self.n)
        if not hasattr(_entered, "contexts"):
            _entered.contexts = []
        _entered.contexts.append((self, count))
        fb_set_own_threads(count)
        return self

    def __exit__(self, *exception):
        contexts = getattr(_entered, "contexts", [])
        for i in reversed(range(len(contexts))):  # generators and coroutines may leave in another order
            if contexts[i][0] is self:
                del contexts[i]
                fb_set_own_threads(contexts[-1][1] if contexts else 0)
                return
        raise RuntimeError("num_threads: this thread has not entered it, or has left it")


_entered = threading.local()  # contexts: what the thread is in, the last one last


# ---- the primitives of the tier in use, for the tests

def _fma(a, b, c):
    """fma of equally long contiguous vectors."""
    cdef cnp.ndarray out = np.empty_like(a)
    assert a.flags.c_contiguous and b.flags.c_contiguous and c.flags.c_contiguous and a.size == b.size == c.size
    fb_fma(dtype_of(cnp.PyArray_TYPE(out)), cnp.PyArray_DATA(a), cnp.PyArray_DATA(b), cnp.PyArray_DATA(c),
           cnp.PyArray_DATA(out), a.size)
    return out


def _exp(x):
    """exp of a contiguous vector."""
    cdef cnp.ndarray out = np.empty_like(x)
    assert x.flags.c_contiguous
    fb_exp(dtype_of(cnp.PyArray_TYPE(out)), cnp.PyArray_DATA(x), cnp.PyArray_DATA(out), x.size)
    return out


def _peak(dtype, seconds=0.05):
    """GFLOP/s of one core doing nothing but fused multiply-adds: the best of short runs within `seconds`.

    Two loops of unlike shape take turns. One of which the compiler made something else would be far from the other.
    """
    cdef fb_dtype kind = FB_F32 if np.dtype(dtype) == np.float32 else FB_F64
    cdef double flops, best[2]
    cdef int loop = 0
    best[0] = best[1] = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best[1] == 0:
        start = time.perf_counter()
        with nogil:
            fb_fma_chains(kind, 20000, loop, &flops)
        best[loop] = max(best[loop], flops / (time.perf_counter() - start) / 1e9)
        loop = 1 - loop
    if not 0.6 < best[0] / best[1] < 1.6:
        raise RuntimeError(f"the FMA peak is {best[0]:.1f} GFLOP/s in one loop and {best[1]:.1f} in another: one measures something else")
    return max(best[0], best[1])
