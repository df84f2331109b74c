# cython: language_level=3, embedsignature=True, freethreading_compatible=True
"""The boundary: check the arguments, allocate, call C once, turn a status into an exception. No arithmetic here.

Arguments that are not directly usable (strided, unaligned) are copied into contiguous arrays; never is a dtype
converted. `out` is written directly if it can be, else through a temporary array, so that it may overlap an input.
"""

import operator
import os
import platform
import time

cimport cython
cimport numpy as cnp

import numpy as np

cnp.import_array()

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
    if not isinstance(a, np.ndarray) or isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a numpy.ndarray of {types}, got {type(a).__name__}")
    return cnp.PyArray_FROM_OF(a, cnp.NPY_ARRAY_ENSUREARRAY)


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


cdef object deliver(fb_status status, cnp.ndarray target, cnp.ndarray result, object out):
    """The caller's own `out`, of whatever class, or the new array."""
    if status == FB_NO_MEMORY:
        raise MemoryError("the workspace of the operation cannot be allocated")
    if target is not result:
        np.copyto(result, target)
    return result if out is None else out


cdef fb_dtype dtype_of(cnp.ndarray a):
    return FB_F32 if cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32 else FB_F64


cdef Py_ssize_t rows_of(cnp.ndarray x):
    """Positions of x (..., features), leading dimensions flattened."""
    cdef Py_ssize_t rows = 1
    cdef int i
    for i in range(cnp.PyArray_NDIM(x) - 1):
        rows *= cnp.PyArray_DIM(x, i)
    return rows


# ---- packing

cdef pack(cnp.ndarray w, fb_panels *out):
    """Copy a matrix into panels; rows may be strided, features must be contiguous (else they are copied first)."""
    cdef fb_status status
    cdef fb_dtype dtype = dtype_of(w)
    w = contiguous(w)
    cdef const void *data = cnp.PyArray_DATA(w)
    cdef Py_ssize_t n = cnp.PyArray_DIM(w, 0), k = cnp.PyArray_DIM(w, 1)
    with nogil:
        status = fb_panels_pack(dtype, data, n, k, k, out)
    if status == FB_NO_MEMORY:
        raise MemoryError(f"packed weights of shape {shape_of(w)} cannot be allocated")


cdef pack_bias(cnp.ndarray bias, void **out):
    if bias is not None and fb_bias_pack(dtype_of(bias), cnp.PyArray_DATA(bias), cnp.PyArray_DIM(bias, 0), out):
        raise MemoryError(f"a packed bias of shape {shape_of(bias)} cannot be allocated")


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


cdef check_feed_forward(object w1, object b1, object w2, object b2, cnp.ndarray first, str first_name):
    """(w1, b1, w2, b2) as arrays; w1 (F, D), b1 (F), w2 (D, F), b2 (D)."""
    w1 = as_array_like(w1, "w1", first, first_name)
    check_matrix(w1, "w1", "F", "D" if first is w1 else last_dim(first) if cnp.PyArray_NDIM(first) else "D")
    hidden, features = w1.shape
    w2 = as_array_like(w2, "w2", first, first_name)
    check_matrix(w2, "w2", features, hidden)
    return w1, check_bias(b1, "b1", hidden, first, first_name), w2, check_bias(b2, "b2", features, first, first_name)


cdef check_query_key(object w_q, object w_k, object b_q, object b_k, cnp.ndarray first, str first_name,
                     Py_ssize_t features):
    """(w_q, w_k, b_q, b_k) as arrays; w_q and w_k (E, D), b_q and b_k (E)."""
    w_q = as_array_like(w_q, "w_q", first, first_name)
    check_matrix(w_q, "w_q", "E", features)
    width = w_q.shape[0]
    w_k = as_array_like(w_k, "w_k", first, first_name)
    check_matrix(w_k, "w_k", width, features)
    return w_q, w_k, check_bias(b_q, "b_q", width, first, first_name), check_bias(b_k, "b_k", width, first, first_name)


cdef Packed pack_feed_forward(tuple arrays, Packed packed):
    w1, b1, w2, b2 = arrays
    packed.params.dtype = dtype_of(w1)
    pack(w1, &packed.params.w1)
    pack(w2, &packed.params.w2)
    pack_bias(b1, &packed.params.b1)
    pack_bias(b2, &packed.params.b2)
    return packed


cdef keep_rows(Packed packed):
    cdef fb_status status
    with nogil:
        status = fb_panels_keep_rows(packed.params.dtype, &packed.params.w2)
    if status == FB_NO_MEMORY:
        raise MemoryError(f"packed weights of shape ({packed.params.w2.n}, {packed.params.w2.k}) cannot be allocated")


cdef Packed pack_query_key(tuple arrays, Packed packed):
    w_q, w_k, b_q, b_k = arrays
    packed.params.dtype = dtype_of(w_q)
    pack(w_q, &packed.params.w_q)
    pack(w_k, &packed.params.w_k)
    pack_bias(b_q, &packed.params.b_q)
    pack_bias(b_k, &packed.params.b_k)
    return packed


# ---- calls of C, from checked arguments

cdef project(cnp.ndarray x, const fb_panels *w, const void *bias, bint relu, object out, str name):
    """out = project(x) for x (..., k)"""
    check_rows(x, name, w.k)
    cdef cnp.ndarray result = check_out(out, shape_of(x)[:-1] + (w.n,), x, name)
    x = contiguous(x)
    cdef cnp.ndarray target = target_for(result, (x,))
    cdef const void *source = cnp.PyArray_DATA(x)
    cdef void *destination = cnp.PyArray_DATA(target)
    cdef fb_dtype dtype = dtype_of(x)
    cdef Py_ssize_t rows = rows_of(x)
    cdef fb_status status
    if <double>rows * w.n * w.k <= KEEP_GIL:
        status = fb_project(dtype, source, rows, w, bias, relu, destination)
    else:
        with nogil:
            status = fb_project(dtype, source, rows, w, bias, relu, destination)
    return deliver(status, target, result, out)


cdef run_feed_forward(const fb_params *params, cnp.ndarray x, object out):
    check_rows(x, "x", params.w1.k)
    cdef cnp.ndarray result = check_out(out, shape_of(x), x, "x")
    x = contiguous(x)
    cdef cnp.ndarray target = target_for(result, (x,))
    cdef const void *source = cnp.PyArray_DATA(x)
    cdef void *destination = cnp.PyArray_DATA(target)
    cdef Py_ssize_t rows = rows_of(x)
    cdef fb_status status
    if 2.0 * rows * params.w1.n * params.w1.k <= KEEP_GIL:
        status = fb_feed_forward(params, source, rows, destination)
    else:
        with nogil:
            status = fb_feed_forward(params, source, rows, destination)
    return deliver(status, target, result, out)


cdef tuple mixing_arguments(object weights, cnp.ndarray x, object out):
    """(weights, x, out, shape) checked and made contiguous; of weights and x, the one with 2 dimensions is shared by
    the whole batch."""
    cdef cnp.ndarray a = as_array_like(weights, "weights", x, "x")
    if cnp.PyArray_NDIM(x) < 2:
        raise wrong_shape("x", "(..., P, D)", x)
    shape = shape_of(x)
    positions = shape[-2]
    if cnp.PyArray_NDIM(a) < 2 or shape_of(a)[-2:] != (positions, positions):
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
            a = np.broadcast_to(a, lead + shape_of(a)[-2:])
        if x_lead and x_lead != lead:
            x = np.broadcast_to(x, lead + shape[-2:])
    cdef cnp.ndarray result = check_out(out, lead + shape[-2:], x, "x")
    return contiguous(a), contiguous(x), result


cdef tuple broadcast_lead(tuple a, tuple b):
    """The shape that shapes a and b broadcast to, or None. (numpy.broadcast_shapes takes a product that overflows for
    a mismatch.)"""
    n = max(len(a), len(b))
    pairs = list(zip((1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b))
    if any(i != j and i != 1 and j != 1 for i, j in pairs):
        return None
    return tuple([i if j == 1 else j for i, j in pairs])


cdef Py_ssize_t batch_of(cnp.ndarray a):
    cdef Py_ssize_t batch = 1
    cdef int i
    for i in range(cnp.PyArray_NDIM(a) - 2):
        batch *= cnp.PyArray_DIM(a, i)
    return batch


cdef Py_ssize_t batch_stride(cnp.ndarray a):
    """Elements from one batch item of a contiguous array to the next; 0 if there is one matrix for all."""
    cdef int n = cnp.PyArray_NDIM(a)
    return 0 if n == 2 else cnp.PyArray_DIM(a, n - 2) * cnp.PyArray_DIM(a, n - 1)


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


cdef const uint8_t *mask_data(cnp.ndarray key_mask):
    return NULL if key_mask is None else <uint8_t *>cnp.PyArray_DATA(key_mask)


cdef run_block(const fb_params *params, object x_, object weights, bint causal, object key_mask, object out):
    """Block.__call__ for any arguments."""
    cdef cnp.ndarray x = as_array(x_, "x"), a = None, mask = None, result, target
    if dtype_of(x) != params.dtype:
        raise TypeError(f"x: expected dtype {'float32' if params.dtype == FB_F32 else 'float64'} "
                        f"(as the block), got {x.dtype}")
    if cnp.PyArray_NDIM(x) < 2 or last_dim(x) != params.w1.k:
        raise wrong_shape("x", f"(..., P, {params.w1.k})", x)
    if weights is not None:
        if causal or key_mask is not None:
            raise ValueError("causal, key_mask: they belong to the block's own query-key module and "
                             "cannot be combined with weights")
        a, x, result = mixing_arguments(weights, x, out)
    else:
        if params.w_q.data == NULL:
            raise ValueError("weights: expected an attention weight matrix of shape (..., P, P), got None, and the "
                             "block has no query-key module of its own (w_q, w_k)")
        mask = check_key_mask(key_mask, x)
        result = check_out(out, shape_of(x), x, "x")
        x = contiguous(x)
    target = target_for(result, (x, a, mask))
    cdef const void *source = cnp.PyArray_DATA(x)
    cdef const void *mixing = NULL if a is None else cnp.PyArray_DATA(a)
    cdef void *destination = cnp.PyArray_DATA(target)
    cdef const uint8_t *mask_bytes = mask_data(mask)
    cdef Py_ssize_t batch = batch_of(target), positions = cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 2)
    cdef Py_ssize_t x_batch = batch_stride(x), weights_batch = 0 if a is None else batch_stride(a)
    cdef fb_status status
    with nogil:
        status = fb_block(params, batch, source, x_batch, positions, mixing, weights_batch, causal, mask_bytes,
                          destination)
    return deliver(status, target, result, out)


# ---- operations

def mix_positions(weights, x, *, out=None):
    """Combine features across positions: ``Z = A X``.

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
    a, x_array, result = mixing_arguments(weights, x_array, out)
    target = target_for(result, (a, x_array))
    cdef const void *mixing = cnp.PyArray_DATA(a)
    cdef const void *source = cnp.PyArray_DATA(x_array)
    cdef void *destination = cnp.PyArray_DATA(target)
    cdef Py_ssize_t batch = batch_of(target), a_batch = batch_stride(a), x_batch = batch_stride(x_array)
    cdef Py_ssize_t positions = cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1), features = last_dim(x_array)
    cdef fb_dtype dtype = dtype_of(x_array)
    cdef fb_status status
    if <double>batch * positions * positions * features <= KEEP_GIL:
        status = fb_mix_positions(dtype, batch, mixing, a_batch, source, x_batch, destination, positions, features)
    else:
        with nogil:
            status = fb_mix_positions(dtype, batch, mixing, a_batch, source, x_batch, destination, positions, features)
    return deliver(status, target, result, out)


def bias_relu(x, bias, *, out=None):
    """Add a bias and set negative values to zero: ``relu(x + bias)``.

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
    cdef cnp.ndarray b = as_array_like(bias, "bias", x_array, "x")
    if cnp.PyArray_NDIM(x_array) < 1:
        raise wrong_shape("x", "(..., F)", x_array)
    b = check_bias(b, "bias", last_dim(x_array), x_array, "x")
    cdef cnp.ndarray result = check_out(out, shape_of(x_array), x_array, "x")
    x_array = contiguous(x_array)
    target = target_for(result, (x_array, b))
    cdef const void *source = cnp.PyArray_DATA(x_array)
    cdef const void *bias_data = cnp.PyArray_DATA(b)
    cdef void *destination = cnp.PyArray_DATA(target)
    cdef Py_ssize_t rows = rows_of(x_array), hidden = last_dim(x_array)
    cdef fb_dtype dtype = dtype_of(x_array)
    cdef fb_status status
    with nogil:
        status = fb_bias_relu(dtype, source, bias_data, destination, rows, hidden)
    return deliver(status, target, result, out)


def up_project(x, w1, b1=None, *, out=None):
    """First layer of the feed-forward network: ``relu(x W1^T + b1)``.

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


def down_project(h, w2, b2=None, *, out=None):
    """Second layer of the feed-forward network: ``h W2^T + b2``.

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
    cdef cnp.ndarray bias = check_bias(b, b_name, cnp.PyArray_DIM(w_array, 0), x_array, x_name)
    cdef cnp.ndarray result = check_out(out, shape_of(x_array)[:-1] + (cnp.PyArray_DIM(w_array, 0),), x_array, x_name)
    cdef Packed packed = Packed()
    packed.params.dtype = dtype_of(x_array)
    pack(w_array, &packed.params.w1)
    pack_bias(bias, &packed.params.b1)
    return project(x_array, &packed.params.w1, packed.params.b1, relu, result if out is None else out, x_name)


def feed_forward(x, w1, b1, w2, b2, *, out=None):
    """The position-wise feed-forward network: ``down_project(up_project(x, w1, b1), w2, b2)``.

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
    arrays = check_feed_forward(w1, b1, w2, b2, x_array, "x")
    cdef cnp.ndarray result = check_out(out, shape_of(x_array), x_array, "x")
    cdef Packed packed = pack_feed_forward(arrays, Packed())
    return run_feed_forward(&packed.params, x_array, result if out is None else out)


def attention_weights(x, w_q, w_k, b_q=None, b_k=None, *, causal=False, key_mask=None, out=None):
    """The query-key attention module: ``A = softmax(Q K^T / sqrt(E))``.

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
    causal : bool
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
        If an argument is no array, or the dtypes differ or are not supported.

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
    cdef cnp.ndarray x_array = as_array(x, "x"), target
    if cnp.PyArray_NDIM(x_array) < 2:
        raise wrong_shape("x", "(..., P, D)", x_array)
    arrays = check_query_key(w_q, w_k, b_q, b_k, x_array, "x", last_dim(x_array))
    cdef cnp.ndarray mask = check_key_mask(key_mask, x_array)
    cdef Py_ssize_t positions = cnp.PyArray_DIM(x_array, cnp.PyArray_NDIM(x_array) - 2)
    cdef cnp.ndarray result = check_out(out, shape_of(x_array)[:-1] + (positions,), x_array, "x")
    x_array = contiguous(x_array)
    target = target_for(result, (x_array, mask))
    cdef Packed packed = pack_query_key(arrays, Packed())
    cdef const void *source = cnp.PyArray_DATA(x_array)
    cdef void *destination = cnp.PyArray_DATA(target)
    cdef const uint8_t *mask_bytes = mask_data(mask)
    cdef Py_ssize_t batch = batch_of(x_array)
    cdef bint is_causal = causal
    cdef fb_status status
    with nogil:
        status = fb_attention_weights(&packed.params, batch, source, positions, is_causal, mask_bytes, destination)
    return deliver(status, target, result, out)


# ---- the block

@cython.auto_pickle(False)
cdef class PackedBlock(Packed):
    """Parameters of a block, checked, copied and packed once; `fastblock.Block` is its public face."""

    def __init__(self, w1, b1, w2, b2, *, w_q=None, w_k=None, b_q=None, b_k=None):
        if self.params.w1.data != NULL:
            raise RuntimeError("a block cannot be initialised twice: make a new one")
        first = as_array(w1, "w1")
        feed_forward_arrays = check_feed_forward(first, b1, w2, b2, first, "w1")
        query_key_arrays = None
        if w_q is not None or w_k is not None:
            for name, w in (("w_q", w_q), ("w_k", w_k)):
                if w is None:
                    raise ValueError(f"{name}: expected an array of shape (E, {first.shape[1]}), got None: "
                                     "the query-key module needs both w_q and w_k")
            query_key_arrays = check_query_key(w_q, w_k, b_q, b_k, first, "w1", first.shape[1])
        elif b_q is not None or b_k is not None:
            raise ValueError("b_q, b_k: expected None without w_q and w_k, got an array")
        cdef Packed packed = Packed()  # all or nothing: a failure leaves this object as it was
        pack_feed_forward(feed_forward_arrays, packed)
        keep_rows(packed)
        if query_key_arrays is not None:
            pack_query_key(query_key_arrays, packed)
        self.params, packed.params = packed.params, self.params

    cdef check_ready(self):
        if self.params.w1.data == NULL:
            raise RuntimeError("the block has no parameters: its __init__ has not been called")

    def __call__(self, x, weights=None, *, bint causal=False, key_mask=None, out=None):
        cdef cnp.npy_intp *dims
        cdef Py_ssize_t positions
        cdef int kind = cnp.NPY_FLOAT32 if self.params.dtype == FB_F32 else cnp.NPY_FLOAT64
        # The hot path of small blocks: one matrix of weights, everything directly usable.
        if (key_mask is None and not causal and is_plain(x, kind) and is_plain(weights, kind)
                and cnp.PyArray_NDIM(x) == 2 and cnp.PyArray_NDIM(weights) == 2 and self.params.w1.data != NULL):
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
                if fb_block(&self.params, 1, cnp.PyArray_DATA(x), 0, positions, cnp.PyArray_DATA(weights), 0, 0, NULL,
                            cnp.PyArray_DATA(out)):
                    raise MemoryError("the workspace of the operation cannot be allocated")
                return out
        self.check_ready()
        return run_block(&self.params, x, weights, causal, key_mask, out)

    def feed_forward(self, x, *, out=None):
        """``relu(x W1^T + b1) W2^T + b2`` with the packed parameters: see `fastblock.feed_forward`."""
        self.check_ready()
        return run_feed_forward(&self.params, self.check_input(x, "x"), out)

    def up_project(self, x, *, out=None):
        """``relu(x W1^T + b1)`` with the packed parameters: see `fastblock.up_project`."""
        self.check_ready()
        return project(self.check_input(x, "x"), &self.params.w1, self.params.b1, True, out, "x")

    def down_project(self, h, *, out=None):
        """``h W2^T + b2`` with the packed parameters: see `fastblock.down_project`."""
        self.check_ready()
        return project(self.check_input(h, "h"), &self.params.w2, self.params.b2, False, out, "h")

    cdef cnp.ndarray check_input(self, object x, str name):
        cdef cnp.ndarray array = as_array(x, name)
        if dtype_of(array) != self.params.dtype:
            raise TypeError(f"{name}: expected dtype {self.dtype} (as the block), got {array.dtype}")
        return array

    @property
    def dtype(self):
        """dtype of the parameters, and of everything the block takes and gives."""
        return np.dtype(np.float32 if self.params.dtype == FB_F32 else np.float64)

    @property
    def features(self):
        """D, features of a position."""
        return self.params.w1.k

    @property
    def hidden(self):
        """F, hidden units."""
        return self.params.w1.n

    @property
    def head_width(self):
        """E, head width of the query-key module; None without one."""
        return None if self.params.w_q.data == NULL else self.params.w_q.n

    @property
    def w1(self):
        """A copy of the up-projection weights, (F, D)."""
        return self.unpack(&self.params.w1)

    @property
    def b1(self):
        """A copy of the up-projection bias, (F,), or None."""
        return self.unpack_bias(self.params.b1, self.params.w1.n)

    @property
    def w2(self):
        """A copy of the down-projection weights, (D, F)."""
        return self.unpack(&self.params.w2)

    @property
    def b2(self):
        """A copy of the down-projection bias, (D,), or None."""
        return self.unpack_bias(self.params.b2, self.params.w2.n)

    @property
    def w_q(self):
        """A copy of the query weights, (E, D), or None."""
        return self.unpack(&self.params.w_q)

    @property
    def w_k(self):
        """A copy of the key weights, (E, D), or None."""
        return self.unpack(&self.params.w_k)

    @property
    def b_q(self):
        """A copy of the query bias, (E,), or None."""
        return self.unpack_bias(self.params.b_q, self.params.w_q.n)

    @property
    def b_k(self):
        """A copy of the key bias, (E,), or None."""
        return self.unpack_bias(self.params.b_k, self.params.w_k.n)


# ---- tiers and configuration

cdef list tiers(bint usable):
    names, i = [], 0
    while fb_isa_name(i) != NULL:
        if (fb_isa_usable(i) if usable else fb_isa_compiled(i)):
            names.append(fb_isa_name(i).decode())
        i += 1
    return names


def isas():
    """The names of the tiers (instruction sets) that this CPU can run, fastest first.

    Examples
    --------
    >>> import fastblock
    >>> fastblock.isas()[-1]
    'portable'
    """
    return tiers(True)


def isa():
    """The name of the tier in use.

    Examples
    --------
    >>> import fastblock
    >>> fastblock.isa() in fastblock.isas()
    True
    """
    return fb_isa_name(fb_isa()).decode()


def use_isa(name):
    """Use the tier `name` from now on, in the whole process. The results are the same bits in every tier.

    Parameters
    ----------
    name : str
        One of `isas()`. The environment variable ``FASTBLOCK_ISA`` sets it at import.

    Raises
    ------
    ValueError
        If this CPU or this build does not have the tier; nothing is changed then.

    Examples
    --------
    >>> import fastblock
    >>> fastblock.use_isa(fastblock.isas()[0])
    """
    cdef int i = 0
    while fb_isa_name(i) != NULL:
        if fb_isa_name(i).decode() == name and fb_use_isa(i):
            return
        i += 1
    raise ValueError(f"name: expected one of {', '.join(tiers(True))} (the tiers of this CPU and build), got {name!r}")


# ---- threads

def get_num_threads():
    """How many threads a large call may use.

    The number given to `set_num_threads`, else by the environment variable ``FASTBLOCK_NUM_THREADS``, else by
    ``OMP_NUM_THREADS``, else the CPUs that this process may use (affinity and cgroup quota).

    Examples
    --------
    >>> import fastblock
    >>> fastblock.get_num_threads() >= 1
    True
    """
    return fb_get_num_threads()


def set_num_threads(n):
    """Let large calls use up to `n` threads from now on, in the whole process. No result depends on it.

    Parameters
    ----------
    n : int
        At least 1; more than 256 count as 256.

    Raises
    ------
    ValueError
        If `n` is less than 1.
    TypeError
        If `n` is no integer.

    Examples
    --------
    >>> import fastblock
    >>> fastblock.set_num_threads(2)
    >>> fastblock.get_num_threads()
    2
    """
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"n: expected a number of threads, got {type(n).__name__}") from None
    if count < 1:
        raise ValueError(f"n: expected at least 1 thread, got {count}")
    fb_set_num_threads(min(count, 256))


class num_threads:
    """Context manager: large calls use up to `n` threads inside, and as many as before afterwards.

    The number is that of the whole process, as with `set_num_threads`.

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

    def __init__(self, n):
        self.n = n
        self.before = []  # one may be entered again inside itself

    def __enter__(self):
        before = get_num_threads()
        set_num_threads(self.n)
        self.before.append(before)
        return self

    def __exit__(self, *exception):
        set_num_threads(self.before.pop())


def _cpu():
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _config():
    """What show_config() shows of the compiled core."""
    return {
        "cpu": _cpu(),
        "isas_compiled": tiers(False),
        "isas_usable": tiers(True),
        "isa": isa(),
        "threads": get_num_threads(),
        "compiler": FB_COMPILER.decode(),
    }


# ---- the primitives of the tier in use, for the tests

def _fma(a, b, c):
    """fma of equally long contiguous vectors."""
    cdef cnp.ndarray out = np.empty_like(a)
    assert a.flags.c_contiguous and b.flags.c_contiguous and c.flags.c_contiguous and a.size == b.size == c.size
    fb_fma(dtype_of(a), cnp.PyArray_DATA(a), cnp.PyArray_DATA(b), cnp.PyArray_DATA(c), cnp.PyArray_DATA(out), a.size)
    return out


def _exp(x):
    """exp of a contiguous vector."""
    cdef cnp.ndarray out = np.empty_like(x)
    assert x.flags.c_contiguous
    fb_exp(dtype_of(x), cnp.PyArray_DATA(x), cnp.PyArray_DATA(out), x.size)
    return out


def _peak(dtype, seconds=0.05):
    """GFLOP/s of one core doing nothing but fused multiply-adds: the best of short runs within `seconds`."""
    cdef fb_dtype kind = FB_F32 if np.dtype(dtype) == np.float32 else FB_F64
    cdef double flops, best = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        with nogil:
            fb_fma_chains(kind, 20000, &flops)
        best = max(best, flops / (time.perf_counter() - start) / 1e9)
    return best


_requested = os.environ.get("FASTBLOCK_NUM_THREADS")
if _requested and not (_requested.isascii() and _requested.isdigit() and _requested.strip("0")):
    raise ImportError(f"FASTBLOCK_NUM_THREADS: expected a number of threads, at least 1, got {_requested[:40]!r}")
_requested = os.environ.get("FASTBLOCK_ISA")
if _requested:
    try:
        use_isa(_requested)
    except ValueError:
        raise ImportError(f"FASTBLOCK_ISA: expected one of {', '.join(isas())} (the tiers of this CPU and build), "
                          f"got {_requested!r}") from None
