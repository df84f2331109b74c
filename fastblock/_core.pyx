# cython: language_level=3, binding=False, autotestdict=False, freethreading_compatible=True
"""The boundary: check the arguments, allocate, call C once, turn a status into an exception. No arithmetic here.

Arguments that are not directly usable (strided, unaligned) are copied into contiguous arrays; never is a dtype
converted. `out` is written directly if it can be, else through a temporary array, so that it may overlap an input.

Between the checks and the call Python code may run: in other threads, or in a subclass of ndarray that is looked at. It
may resize what was checked. So `readable` and `writable` take the pointers last of all, compare each array with what
the checks have found, and no Python code runs from there to C.

The first line of a docstring is the signature for `inspect` and `help`. A required argument has the default `_nothing`
in the code: then a call without it is told its name, which Cython's own message does not know.
"""

import operator
import os
import threading
import time

cimport cython
cimport numpy as cnp
from cpython.pystate cimport PyThreadState
from libc.stdint cimport uint8_t
from libc.string cimport memcpy
from numpy cimport npy_intp

import numpy as np

from ._checks cimport *

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

    static int raised(void) { return -1; }
    """
    const char *FB_COMPILER
    int raised() except -1  # an exception that is already set
    int PyErr_CheckSignals()  # declared without its exception: it is to stay set until the call has ended
    unsigned long PyThread_get_thread_ident() noexcept nogil
    PyThreadState *PyEval_SaveThread() noexcept
    void PyEval_RestoreThread(PyThreadState *) noexcept

cdef extern from "fb_internal.h" nogil:
    int fb_quota_cpus(const char *root)

_nothing = type("nothing", (), {})()  # "got nothing"

cdef enum:
    # Below this many multiply-adds (about 10 us) a call keeps the GIL: handing it over would cost more than it gives.
    KEEP_GIL = 300000


# ---- around a call of C

cdef inline PyThreadState *leave_python(Py_ssize_t rows, Py_ssize_t work) noexcept:
    """Hand over the GIL unless rows * work multiply-adds are few: then NULL."""
    return NULL if rows <= KEEP_GIL and work <= KEEP_GIL and rows * work <= KEEP_GIL else PyEval_SaveThread()


cdef inline void enter_python(PyThreadState *state) noexcept:
    if state != NULL:
        PyEval_RestoreThread(state)


include "_block.pxi"


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
    return mix(NULL, as_array(x, "x"), weights, False, None, out, None)


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
    cdef cnp.ndarray x_array = as_array(x, "x")
    cdef cnp.ndarray b = as_array_like(bias, "bias", x_array, "x")
    if cnp.PyArray_NDIM(x_array) < 1:
        raise wrong_shape("x", "(..., F)", x_array)
    cdef int kind = cnp.PyArray_TYPE(x_array)
    cdef Py_ssize_t rows = rows_of(x_array), hidden = last_dim(x_array)
    b = check_bias(b, "bias", hidden, x_array, "x")
    cdef Shape shape
    take_shape(&shape, x_array, hidden)
    cdef cnp.ndarray result = check_out(out, &shape, x_array, "x")
    x_array, b = contiguous(x_array), contiguous(b)
    cdef cnp.ndarray target = target_for(result, out, &shape, x_array, b, None)
    cdef const void *source = readable(x_array, "x", kind, rows * hidden)
    cdef const void *bias_data = readable(b, "bias", kind, hidden)
    cdef void *destination = writable(target, out, kind, rows * hidden)
    cdef PyThreadState *state = leave_python(rows, hidden)
    cdef fb_status status = fb_bias_relu(dtype_of(kind), source, bias_data, destination, rows, hidden)
    enter_python(state)
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
    return project_once(x, "x", w1, b1, "1", out)


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
    return project_once(h, "h", w2, b2, "2", out)


cdef project_once(object x, str x_name, object w, object b, str number, object out):
    """up_project and down_project: pack the weights for this one call."""
    cdef cnp.ndarray x_array = as_array(x, x_name), matrix = as_array_like(w, f"w{number}", x_array, x_name)
    if cnp.PyArray_NDIM(x_array) < 1:
        raise wrong_shape(x_name, f"(..., {'D' if number == '1' else 'F'})", x_array)
    cdef Py_ssize_t k = last_dim(x_array)
    matrix = check_matrix(matrix, f"w{number}", "F" if number == "1" else "D", k, x_array, x_name)
    cdef Py_ssize_t n = cnp.PyArray_DIM(matrix, 0)
    checked = matrix, check_bias(b, f"b{number}", n, x_array, x_name), n, k
    cdef Shape shape
    take_shape(&shape, x_array, n)
    cdef cnp.ndarray result = check_out(out, &shape, x_array, x_name)
    cdef Packed packed = Packed()
    cdef fb_params *p = &packed.params
    p.dtype = dtype_of(cnp.PyArray_TYPE(x_array))
    pack_linear(checked, number, p.dtype, &p.w1, &p.b1)
    return run_rows(x_array, x_name, p, &p.w1, p.b1, number == "1", result if out is None else out)


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
    up, down = check_feed_forward(w1, b1, w2, b2, last_dim(x_array), x_array, "x")
    cdef Shape shape
    take_shape(&shape, x_array, last_dim(x_array))
    cdef cnp.ndarray result = check_out(out, &shape, x_array, "x")
    cdef Packed packed = Packed()
    cdef fb_params *p = &packed.params
    p.dtype = dtype_of(cnp.PyArray_TYPE(x_array))
    pack_linear(up, "1", p.dtype, &p.w1, &p.b1)
    pack_linear(down, "2", p.dtype, &p.w2, &p.b2)
    return run_rows(x_array, "x", p, NULL, NULL, False, result if out is None else out)


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
    cdef cnp.ndarray x_array = as_array(x, "x")
    if cnp.PyArray_NDIM(x_array) < 2:
        raise wrong_shape("x", "(..., P, D)", x_array)
    cdef int kind = cnp.PyArray_TYPE(x_array)
    cdef Sizes sizes
    own_sizes(x_array, &sizes)
    cdef Py_ssize_t positions = sizes.positions, rows = sizes.batch * positions
    query, key = check_query_key(w_q, w_k, b_q, b_k, sizes.features, x_array, "x")
    cdef cnp.ndarray mask = None if key_mask is None else check_key_mask(key_mask, x_array)
    take_shape(&sizes.shape, x_array, positions)
    cdef cnp.ndarray result = check_out(out, &sizes.shape, x_array, "x")
    x_array = contiguous(x_array)
    cdef cnp.ndarray target = target_for(result, out, &sizes.shape, x_array, mask, None)
    cdef Packed packed = Packed()
    cdef fb_params *p = &packed.params
    p.dtype = dtype_of(kind)
    pack_linear(query, "_q", p.dtype, &p.w_q, &p.b_q)
    pack_linear(key, "_k", p.dtype, &p.w_k, &p.b_k)
    cdef const void *source = readable(x_array, "x", kind, rows * sizes.features)
    cdef const uint8_t *mask_bytes = mask_data(mask, rows)
    cdef void *destination = writable(target, out, kind, rows * positions)
    cdef fb_status status
    with nogil:
        status = fb_attention_weights(p, sizes.batch, source, positions, is_causal, mask_bytes, destination)
    return deliver(status, target, result, out)


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

    The number holds for the calls of the thread that enters, and for no other; in it, it goes before that of the
    process, which `set_num_threads` sets. Of several contexts that a thread is in, the one entered last counts.

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
        raise RuntimeError(f"the FMA peak is {best[0]:.1f} GFLOP/s in one loop and {best[1]:.1f} in another: "
                           "one measures something else")
    return max(best[0], best[1])
