# cython: language_level=3
"""The checks of the core's arguments, part of its one module: each names the argument that does not fit.

They work on the dimensions as NumPy has them, without a Python object for a shape: a call with a leading axis takes the
same way as one without, and as long. What the checks have found holds until Python code runs again; see `readable`.
"""
cimport numpy as cnp
from libc.stdint cimport uint8_t
from numpy cimport npy_intp

cdef extern from *:
    """
    /* What passes the checks: the compiler keeps the rest out of the way, and does not inline it. */
    #if defined(__GNUC__)
    #define usually(x) __builtin_expect(!!(x), 1)
    #else
    #define usually(x) (x)
    #endif

    /* NumPy answers a size that overflows with a ValueError; it is a lack of memory like any other. */
    static inline PyObject *array_of_shape(int n, const npy_intp *dims, int kind)
    {
        PyObject *shape, *array = PyArray_SimpleNew(n, dims, kind);
        if (!usually(array) && PyErr_ExceptionMatches(PyExc_ValueError) &&
            (shape = PyArray_IntTupleFromIntp(n, dims))) {
            PyErr_Format(PyExc_MemoryError, "an array of shape %R is larger than the address space", shape);
            Py_DECREF(shape);
        }
        return array;
    }
    """
    object array_of_shape(int n, const npy_intp *dims, int kind)
    tuple PyArray_IntTupleFromIntp(int n, const npy_intp *dims)
    bint usually(bint) noexcept
    bint PyArray_CheckExact(object)
    bint PyArray_ISCARRAY_RO(cnp.ndarray)
    bint PyArray_ISCARRAY(cnp.ndarray)

cdef struct Shape:
    int n
    npy_intp dims[cnp.NPY_MAXDIMS]

cdef struct Sizes:
    # Of a batch of matrices; the batch strides are 0 where one matrix serves the whole batch.
    Shape shape  # of the result
    Py_ssize_t batch, positions, features, weights_batch, x_batch


# ---- what is an array

cdef inline cnp.ndarray base_array(object a, str name, str types):
    """`a` as an exact ndarray: what a subclass says of its shape or dtype may not be what C would read."""
    return <cnp.ndarray>a if usually(PyArray_CheckExact(a)) else view_of(a, name, types)


cdef inline cnp.ndarray view_of(object a, str name, str types):
    import numpy as np

    # Not isinstance: it believes an object that says of itself what its class is.
    if not cnp.PyArray_Check(a) or issubclass(type(a), np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a numpy.ndarray of {types}, got {type(a).__name__}{remedy(a, name, types)}")
    return <cnp.ndarray>cnp.PyArray_FROM_OF(a, cnp.NPY_ARRAY_ENSUREARRAY)


cdef inline str remedy(object a, str name, str types):
    """How to make an array of what is none; nothing where that would be a guess, or no memory to write a result to."""
    import numpy as np

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


cdef inline bint as_bool(object a, str name) except -1:
    """A bool of Python or NumPy; anything else has a truth, too, but 'no' is true."""
    return a is True if usually(a is True or a is False) else as_bool_of_numpy(a, name)


cdef inline bint as_bool_of_numpy(object a, str name) except -1:
    import numpy as np

    if type(a) is not np.bool_:
        raise TypeError(f"{name}: expected a bool, got {type(a).__name__}")
    return a


cdef inline cnp.ndarray as_array(object a, str name):
    """`a` as an ndarray of native float32 or float64; TypeError if it is anything else."""
    cdef cnp.ndarray array = base_array(a, name, "float32 or float64")
    cdef int kind = cnp.PyArray_TYPE(array)
    if kind != cnp.NPY_FLOAT32 and kind != cnp.NPY_FLOAT64:
        raise TypeError(f"{name}: expected dtype float32 or float64, got {array.dtype}")
    if cnp.PyArray_ISBYTESWAPPED(array):
        raise TypeError(f"{name}: expected native byte order, got dtype {array.dtype.str!r}")
    return array


cdef inline cnp.ndarray as_array_like(object a, str name, cnp.ndarray first, str first_name):
    """`a` as an ndarray of the dtype of the first argument."""
    if usually(is_of_type(a, cnp.PyArray_TYPE(first))):
        return <cnp.ndarray>a
    return as_other_like(a, name, first, first_name)


cdef inline bint is_of_type(object a, int kind) noexcept:
    return (PyArray_CheckExact(a) and cnp.PyArray_TYPE(<cnp.ndarray>a) == kind
            and not cnp.PyArray_ISBYTESWAPPED(<cnp.ndarray>a))


cdef inline cnp.ndarray as_other_like(object a, str name, cnp.ndarray first, str first_name):
    cdef cnp.ndarray array = as_array(a, name)
    if cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(first):
        raise TypeError(f"{name}: expected dtype {first.dtype} (as {first_name}), got {array.dtype}")
    return array


# ---- shapes

cdef inline tuple shape_of(cnp.ndarray a):
    return (<object>a).shape


cdef inline wrong_shape(str name, str expected, cnp.ndarray a):
    return ValueError(f"{name}: expected shape {expected}, got {shape_of(a)}")


cdef inline Py_ssize_t last_dim(cnp.ndarray a) noexcept:
    return cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1)


cdef inline Py_ssize_t product(const npy_intp *dims, int n) noexcept:
    cdef size_t elements = 1
    cdef int i
    if usually(n == 2):
        return dims[0] * dims[1]  # 10 ns less for a call of a small block than the loop
    for i in range(n):
        elements *= dims[i]
    return elements


cdef inline Py_ssize_t elements_of(cnp.ndarray a) noexcept:
    return product(cnp.PyArray_DIMS(a), cnp.PyArray_NDIM(a))


cdef inline Py_ssize_t rows_of(cnp.ndarray x) noexcept:
    """Positions of x (..., features), leading dimensions flattened."""
    return product(cnp.PyArray_DIMS(x), cnp.PyArray_NDIM(x) - 1)


cdef inline bint are_equal(const npy_intp *a, const npy_intp *b, int n) noexcept:
    cdef int i
    for i in range(n):
        if a[i] != b[i]:
            return False
    return True


cdef inline bint has_shape(cnp.ndarray a, const Shape *shape) noexcept:
    return cnp.PyArray_NDIM(a) == shape.n and are_equal(cnp.PyArray_DIMS(a), shape.dims, shape.n)


cdef inline void take_shape(Shape *shape, cnp.ndarray x, Py_ssize_t last) noexcept:
    """The shape of x, but for its last dimension."""
    cdef int i
    shape.n = cnp.PyArray_NDIM(x)
    for i in range(shape.n - 1):
        shape.dims[i] = cnp.PyArray_DIM(x, i)
    shape.dims[shape.n - 1] = last


cdef inline bint broadcast(Shape *to, const npy_intp *dims, int n) noexcept:
    """Broadcast `to` with these dimensions; whether they fit."""
    cdef int i, more = n - to.n
    if more > 0:
        for i in range(to.n - 1, -1, -1):
            to.dims[i + more] = to.dims[i]
        for i in range(more):
            to.dims[i] = 1
        to.n = n
    for i in range(n):
        if to.dims[to.n - n + i] == 1:
            to.dims[to.n - n + i] = dims[i]
        elif dims[i] != 1 and dims[i] != to.dims[to.n - n + i]:
            return False
    return True


cdef inline int mixing_sizes(cnp.ndarray a, cnp.ndarray x, Sizes *sizes) except -1:
    """Sizes of a product of a (..., P, P) and x (..., P, D), whose leading dimensions broadcast.

    They may be too large for their integers as long as there is no array of the result's shape.
    """
    cdef int a_lead = cnp.PyArray_NDIM(a) - 2, x_lead = cnp.PyArray_NDIM(x) - 2
    if not usually(x_lead >= 0 and a_lead >= 0):
        return cannot_mix(a, x)
    cdef Py_ssize_t positions = cnp.PyArray_DIM(x, x_lead), features = cnp.PyArray_DIM(x, x_lead + 1)
    cdef Shape *shape = &sizes.shape
    shape.n = 0
    broadcast(shape, cnp.PyArray_DIMS(x), x_lead)
    if not usually(cnp.PyArray_DIM(a, a_lead) == positions and cnp.PyArray_DIM(a, a_lead + 1) == positions
                   and broadcast(shape, cnp.PyArray_DIMS(a), a_lead)):
        return cannot_mix(a, x)
    shape.n += 2
    shape.dims[shape.n - 2], shape.dims[shape.n - 1] = positions, features
    sizes.batch = product(shape.dims, shape.n - 2)
    sizes.positions, sizes.features = positions, features
    sizes.weights_batch = positions * positions if a_lead else 0
    sizes.x_batch = positions * features if x_lead else 0
    return 0


cdef inline int cannot_mix(cnp.ndarray a, cnp.ndarray x) except -1:
    if cnp.PyArray_NDIM(x) < 2:
        raise wrong_shape("x", "(..., P, D)", x)
    p = cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 2)
    if shape_of(a)[-2:] != (p, p):
        raise wrong_shape("weights", f"(..., {p}, {p})", a)
    raise ValueError(f"weights: expected leading dimensions that broadcast with {shape_of(x)[:-2]} of x, "
                     f"got shape {shape_of(a)}")


cdef inline void own_sizes(cnp.ndarray x, Sizes *sizes) noexcept:
    """Sizes of x (..., P, D) with weights of its own."""
    cdef int lead = cnp.PyArray_NDIM(x) - 2
    take_shape(&sizes.shape, x, last_dim(x))
    sizes.batch = product(cnp.PyArray_DIMS(x), lead)
    sizes.positions, sizes.features = cnp.PyArray_DIM(x, lead), last_dim(x)
    sizes.weights_batch, sizes.x_batch = 0, sizes.positions * sizes.features if lead else 0


cdef inline Py_ssize_t matrices(const Sizes *sizes, Py_ssize_t stride) noexcept:
    """How many matrices an operand with this batch stride has. (Matrices without elements count as one.)"""
    return sizes.batch if stride else 1


# ---- arrays that C can read and write

cdef inline cnp.ndarray new_array(const Shape *shape, int kind):
    return <cnp.ndarray>array_of_shape(shape.n, shape.dims, kind)


cdef inline cnp.ndarray contiguous(cnp.ndarray a):
    """`a`, or a contiguous and aligned copy of it."""
    return a if usually(PyArray_ISCARRAY_RO(a)) else packed_copy(a)


cdef inline cnp.ndarray packed_copy(cnp.ndarray a):
    cdef Shape shape
    take_shape(&shape, a, last_dim(a))
    return repeated(a, shape)


cdef inline cnp.ndarray repeated(cnp.ndarray a, Shape shape):
    """A contiguous array of this shape, to which `a` broadcasts."""
    cdef cnp.ndarray full = new_array(&shape, cnp.PyArray_TYPE(a))
    cnp.PyArray_CopyInto(full, a)
    return full


cdef inline bint is_spread(cnp.ndarray a, const Shape *result) noexcept:
    """Whether matrices are contiguous, with the leading dimensions of the result, or with none."""
    cdef int lead = cnp.PyArray_NDIM(a) - 2
    return PyArray_ISCARRAY_RO(a) and (lead == 0 or (
        lead == result.n - 2 and are_equal(cnp.PyArray_DIMS(a), result.dims, lead)))


cdef inline cnp.ndarray spread(cnp.ndarray a, const Shape *result):
    """A copy that is."""
    cdef Shape shape
    cdef int i, own = cnp.PyArray_NDIM(a) - 2, lead = result.n - 2 if own else 0
    shape.n = lead + 2
    for i in range(lead):
        shape.dims[i] = result.dims[i]
    shape.dims[lead], shape.dims[lead + 1] = cnp.PyArray_DIM(a, own), cnp.PyArray_DIM(a, own + 1)
    return repeated(a, shape)


cdef inline cnp.ndarray check_key_mask(object key_mask, cnp.ndarray x):
    """key_mask as a contiguous bool array of the shape of x without its features, or None."""
    cdef cnp.ndarray mask = base_array(key_mask, "key_mask", "bool")
    if cnp.PyArray_TYPE(mask) != cnp.NPY_BOOL:
        raise TypeError(f"key_mask: expected dtype bool, got {mask.dtype}")
    cdef int n = cnp.PyArray_NDIM(mask)
    cdef Shape shape
    shape.n = cnp.PyArray_NDIM(x) - 1
    if n == shape.n and are_equal(cnp.PyArray_DIMS(mask), cnp.PyArray_DIMS(x), n):
        return contiguous(mask)
    if n < 1 or last_dim(mask) != cnp.PyArray_DIM(x, shape.n - 1):
        raise wrong_shape("key_mask", f"(..., {cnp.PyArray_DIM(x, shape.n - 1)})", mask)
    take_shape(&shape, x, 0)
    shape.n -= 1
    if (n > shape.n or not broadcast(&shape, cnp.PyArray_DIMS(mask), n)
            or not are_equal(shape.dims, cnp.PyArray_DIMS(x), shape.n)):
        raise ValueError(f"key_mask: expected a shape that broadcasts to {shape_of(x)[:-1]}, got {shape_of(mask)}")
    return repeated(mask, shape)


cdef inline cnp.ndarray check_out(object out, const Shape *shape, cnp.ndarray first, str first_name):
    """`out` if given and fit to be written, else a new array."""
    if usually(out is None):
        return new_array(shape, cnp.PyArray_TYPE(first))
    return checked_out(out, shape, first, first_name)


cdef inline cnp.ndarray checked_out(object out, const Shape *shape, cnp.ndarray first, str first_name):
    cdef cnp.ndarray array = as_array_like(out, "out", first, first_name)
    if not has_shape(array, shape):
        raise wrong_shape("out", f"{PyArray_IntTupleFromIntp(shape.n, shape.dims)}", array)
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError("out: expected a writable array, got a read-only one")
    return array


cdef inline bint overlap(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether two contiguous arrays share a byte; None has none."""
    if b is None:
        return False
    cdef size_t a0 = <size_t>cnp.PyArray_DATA(a), b0 = <size_t>cnp.PyArray_DATA(b)
    return (a0 < b0 + elements_of(b) * cnp.PyArray_ITEMSIZE(b)
            and b0 < a0 + elements_of(a) * cnp.PyArray_ITEMSIZE(a))


cdef inline cnp.ndarray target_for(cnp.ndarray result, object out, const Shape *shape,
                                   cnp.ndarray a, cnp.ndarray b, cnp.ndarray c):
    """The result, or a temporary array if C cannot write it directly or would overwrite an input that it still
    reads."""
    return result if usually(out is None or (
        PyArray_ISCARRAY(result) and not overlap(result, a) and not overlap(result, b) and not overlap(result, c)
    )) else new_array(shape, cnp.PyArray_TYPE(result))


cdef inline const void *readable(cnp.ndarray a, str name, int kind, Py_ssize_t elements) except? NULL:
    """The memory of an array, which must still be what the checks have found: so much of this type, contiguous."""
    if not usually(cnp.PyArray_TYPE(a) == kind and PyArray_ISCARRAY_RO(a) and elements_of(a) == elements):
        raise was_changed(name)
    return cnp.PyArray_DATA(a)


cdef inline was_changed(str name):
    return RuntimeError(f"{name}: the array was changed during the call")


cdef inline void *writable(cnp.ndarray target, object out, int kind, Py_ssize_t elements) except? NULL:
    """The same of the array that C writes. One that the call has made itself nobody else knows."""
    return cnp.PyArray_DATA(target) if usually(out is None) else writable_out(target, kind, elements)


cdef inline void *writable_out(cnp.ndarray target, int kind, Py_ssize_t elements) except? NULL:
    if not usually(PyArray_ISCARRAY(target)):
        raise was_changed("out")
    return <void *>readable(target, "out", kind, elements)


cdef inline const uint8_t *mask_data(cnp.ndarray key_mask, Py_ssize_t keys) except? NULL:
    if key_mask is None:
        return NULL
    return <const uint8_t *>readable(key_mask, "key_mask", cnp.NPY_BOOL, keys)
