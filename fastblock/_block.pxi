# Packed parameters and what is computed with them. A part of _core.pyx in a file of its own: a .pxd holds no class.

cdef extern from *:
    """
    #include <stdatomic.h>

    /* What was written before it was set is seen by whoever finds it set, with or without a GIL. */
    typedef struct { atomic_int set; } fb_flag;

    static inline int flag_is_set(fb_flag *flag) { return atomic_load_explicit(&flag->set, memory_order_acquire); }
    static inline void set_flag(fb_flag *flag) { atomic_store_explicit(&flag->set, 1, memory_order_release); }

    /* Whether a call of `a` is the one of `type`, which no class in between has overridden. */
    static inline int has_call_of(PyObject *a, PyObject *type)
    {
        return Py_TYPE(a)->tp_call == ((PyTypeObject *)type)->tp_call;
    }
    """
    ctypedef struct fb_flag:
        pass
    int flag_is_set(fb_flag *) noexcept nogil
    void set_flag(fb_flag *) noexcept nogil
    bint has_call_of(object a, object type) noexcept


cdef int raise_status(fb_status status) except -1:
    if status == FB_INTERRUPTED:
        return raised()  # by the signal's handler
    raise MemoryError("the workspace of the operation cannot be allocated")


cdef inline object deliver(fb_status status, cnp.ndarray target, cnp.ndarray result, object out):
    """The caller's own `out`, of whatever class, or the new array."""
    if status != FB_OK:
        raise_status(status)
    if target is not result:
        cnp.PyArray_CopyInto(result, target)
    return result if out is None else out


cdef inline fb_dtype dtype_of(int kind) noexcept nogil:
    return FB_F32 if kind == cnp.NPY_FLOAT32 else FB_F64


cdef inline int kind_of(fb_dtype dtype) noexcept nogil:
    return cnp.NPY_FLOAT32 if dtype == FB_F32 else cnp.NPY_FLOAT64


# ---- packing

@cython.final
@cython.auto_pickle(False)
cdef class Packed:
    """Packed parameters. Once filled they never change: copies of a block share them."""
    cdef fb_params params

    def __dealloc__(self):
        fb_params_free(&self.params)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        cdef fb_params *p = &self.params
        return _pack, (self.matrix(&p.w1), self.bias(p.b1, &p.w1), self.matrix(&p.w2), self.bias(p.b2, &p.w2),
                       self.matrix(&p.w_q), self.matrix(&p.w_k), self.bias(p.b_q, &p.w_q), self.bias(p.b_k, &p.w_k))

    cdef cnp.ndarray matrix(self, const fb_panels *panels):
        """A copy of a matrix of weights, or None."""
        cdef npy_intp dims[2]
        if panels.data == NULL:
            return None
        dims[0], dims[1] = panels.n, panels.k
        cdef cnp.ndarray w = cnp.PyArray_SimpleNew(2, dims, kind_of(self.params.dtype))
        fb_panels_unpack(self.params.dtype, panels, cnp.PyArray_DATA(w))
        return w

    cdef cnp.ndarray bias(self, const void *bias, const fb_panels *panels):
        """A copy of the bias that goes with a matrix, or None."""
        cdef npy_intp n = panels.n
        if bias == NULL:
            return None
        cdef cnp.ndarray b = cnp.PyArray_SimpleNew(1, &n, kind_of(self.params.dtype))
        memcpy(cnp.PyArray_DATA(b), bias, n * cnp.PyArray_ITEMSIZE(b))
        return b


cdef cnp.ndarray check_matrix(object w, str name, object n, object k, cnp.ndarray first, str first_name):
    """w: (n, k); a dimension given as a str is free."""
    cdef cnp.ndarray matrix = as_array_like(w, name, first, first_name)
    if (cnp.PyArray_NDIM(matrix) != 2 or (not isinstance(n, str) and cnp.PyArray_DIM(matrix, 0) != n)
            or (not isinstance(k, str) and cnp.PyArray_DIM(matrix, 1) != k)):
        raise wrong_shape(name, f"({n}, {k})", matrix)
    return matrix


cdef cnp.ndarray check_bias(object b, str name, Py_ssize_t n, cnp.ndarray first, str first_name):
    """b: (n,) or None"""
    if b is None:
        return None
    cdef cnp.ndarray bias = as_array_like(b, name, first, first_name)
    if cnp.PyArray_NDIM(bias) != 1 or cnp.PyArray_DIM(bias, 0) != n:
        raise wrong_shape(name, f"({n},)", bias)
    return bias


cdef tuple check_feed_forward(object w1, object b1, object w2, object b2, object k, cnp.ndarray first, str first_name):
    """(w1 (F, D), b1, F, D) and (w2 (D, F), b2, D, F), checked, D = k."""
    cdef cnp.ndarray up = check_matrix(w1, "w1", "F", k, first, first_name)
    cdef Py_ssize_t hidden = cnp.PyArray_DIM(up, 0), features = cnp.PyArray_DIM(up, 1)
    w2 = check_matrix(w2, "w2", features, hidden, first, first_name)
    return ((up, check_bias(b1, "b1", hidden, first, first_name), hidden, features),
            (w2, check_bias(b2, "b2", features, first, first_name), features, hidden))


cdef tuple check_query_key(object w_q, object w_k, object b_q, object b_k, object k, cnp.ndarray first, str first_name):
    """(w_q (E, D), b_q, E, D) and (w_k (E, D), b_k, E, D), checked, D = k."""
    cdef cnp.ndarray query = check_matrix(w_q, "w_q", "E", k, first, first_name)
    cdef Py_ssize_t width = cnp.PyArray_DIM(query, 0)
    w_k = check_matrix(w_k, "w_k", width, k, first, first_name)
    return ((query, check_bias(b_q, "b_q", width, first, first_name), width, k),
            (w_k, check_bias(b_k, "b_k", width, first, first_name), width, k))


cdef pack_linear(tuple checked, str number, fb_dtype dtype, fb_panels *panels, void **packed_bias):
    """Copy a matrix into panels, and its bias."""
    cdef cnp.ndarray w = contiguous(checked[0]), b = checked[1]
    cdef Py_ssize_t n = checked[2], k = checked[3]
    cdef const void *data = readable(w, f"w{number}", kind_of(dtype), n * k)
    cdef fb_status status
    with nogil:
        status = fb_panels_pack(dtype, data, n, k, k, panels)
    if status == FB_NO_MEMORY:
        raise MemoryError(f"packed weights of shape ({n}, {k}) cannot be allocated")
    if b is not None:
        b = contiguous(b)
        if fb_bias_pack(dtype, readable(b, f"b{number}", kind_of(dtype), n), n, packed_bias):
            raise MemoryError(f"a packed bias of shape ({n},) cannot be allocated")


def _pack(w1, b1, w2, b2, w_q, w_k, b_q, b_k):
    """The parameters of a block, checked against each other and packed."""
    cdef fb_status status
    cdef cnp.ndarray first = as_array(w1, "w1")
    cdef int kind = cnp.PyArray_TYPE(first)
    up, down = check_feed_forward(first, b1, w2, b2, "D", first, "w1")
    features, query = up[3], None
    if w_q is not None or w_k is not None:
        for name, w in (("w_q", w_q), ("w_k", w_k)):
            if w is None:
                raise ValueError(f"{name}: expected an array of shape (E, {features}), got None: "
                                 "the query-key module needs both w_q and w_k")
        query, key = check_query_key(w_q, w_k, b_q, b_k, features, first, "w1")
    elif b_q is not None or b_k is not None:
        raise ValueError("b_q, b_k: expected None without w_q and w_k, got an array")
    cdef Packed packed = Packed()
    cdef fb_params *p = &packed.params
    p.dtype = dtype_of(kind)
    pack_linear(up, "1", p.dtype, &p.w1, &p.b1)
    pack_linear(down, "2", p.dtype, &p.w2, &p.b2)
    with nogil:
        status = fb_panels_keep_rows(p.dtype, &p.w2)
    if status == FB_NO_MEMORY:
        raise MemoryError(f"packed weights of shape ({p.w2.n}, {p.w2.k}) cannot be allocated")
    if query is not None:
        pack_linear(query, "_q", p.dtype, &p.w_q, &p.b_q)
        pack_linear(key, "_k", p.dtype, &p.w_k, &p.b_k)
    return packed


# ---- calls of C, from checked arguments

cdef run_rows(cnp.ndarray x, str name, const fb_params *params, const fb_panels *w, const void *bias, bint relu,
              object out):
    """out = project(x) for x (..., k), or without w the whole feed-forward network of params."""
    cdef Py_ssize_t k = params.w1.k if w == NULL else w.k, n = k if w == NULL else w.n
    if cnp.PyArray_NDIM(x) < 1 or last_dim(x) != k:
        raise wrong_shape(name, f"(..., {k})", x)
    cdef int kind = kind_of(params.dtype)
    cdef Py_ssize_t rows = rows_of(x)
    cdef Shape shape
    take_shape(&shape, x, n)
    cdef cnp.ndarray result = check_out(out, &shape, x, name)
    x = contiguous(x)
    cdef cnp.ndarray target = target_for(result, out, &shape, x, None, None)
    cdef const void *source = readable(x, name, kind, rows * k)
    cdef void *destination = writable(target, out, kind, rows * n)
    cdef PyThreadState *state = leave_python(rows, 2 * params.w1.n * k if w == NULL else n * k)
    cdef fb_status status
    if w == NULL:
        status = fb_feed_forward(params, source, rows, destination)
    else:
        status = fb_project(params.dtype, source, rows, w, bias, relu, destination)
    enter_python(state)
    return deliver(status, target, result, out)


cdef inline cnp.ndarray of_the_block(object a, str name, int kind):
    """`a` as an ndarray of the block's dtype."""
    return <cnp.ndarray>a if usually(is_of_type(a, kind)) else as_other_of_the_block(a, name, kind)


cdef cnp.ndarray as_other_of_the_block(object a, str name, int kind):
    cdef cnp.ndarray array = as_array(a, name)
    if cnp.PyArray_TYPE(array) != kind:
        dtype = "float32" if kind == cnp.NPY_FLOAT32 else "float64"
        raise TypeError(f"{name}: expected dtype {dtype} (as the block), got {array.dtype}")
    return array


cdef run_block(const fb_params *params, object x_, object weights, object causal_, object key_mask, object out,
               cnp.ndarray spare):
    """The call of a block. Without `out` the result may go into `spare`, if that has its shape."""
    cdef bint causal = as_bool(causal_, "causal")
    cdef cnp.ndarray x = of_the_block(x_, "x", kind_of(params.dtype))
    if cnp.PyArray_NDIM(x) < 2 or last_dim(x) != params.w1.k:
        raise wrong_shape("x", f"(..., P, {params.w1.k})", x)
    return mix(params, x, weights, causal, key_mask, out, spare)


cdef inline mix(const fb_params *params, cnp.ndarray x, object weights, bint causal, object key_mask, object out,
                cnp.ndarray spare):
    """mix_positions, and the layers of `params` after it unless that is NULL."""
    cdef cnp.ndarray a = None, mask = None
    cdef int kind = cnp.PyArray_TYPE(x)
    cdef Sizes sizes
    if weights is not None or params == NULL:
        if causal or key_mask is not None:
            raise ValueError("causal, key_mask: they belong to the block's own query-key module and "
                             "cannot be combined with weights")
        a = as_array_like(weights, "weights", x, "x")
        mixing_sizes(a, x, &sizes)
    elif params.w_q.data == NULL:
        raise ValueError("weights: expected an attention weight matrix of shape (..., P, P), got None, and the "
                         "block has no query-key module of its own (w_q, w_k)")
    else:
        own_sizes(x, &sizes)
        mask = None if key_mask is None else check_key_mask(key_mask, x)
    if out is None and spare is not None and has_shape(spare, &sizes.shape):
        out = spare
    cdef cnp.ndarray result = check_out(out, &sizes.shape, x, "x")
    if not usually(is_spread(x, &sizes.shape)):
        x = spread(x, &sizes.shape)
    if not usually(a is None or is_spread(a, &sizes.shape)):
        a = spread(a, &sizes.shape)
    cdef cnp.ndarray target = target_for(result, out, &sizes.shape, x, a, mask)
    cdef Py_ssize_t positions = sizes.positions, features = sizes.features, matrix = positions * features
    cdef Py_ssize_t work = positions
    cdef const void *source = readable(x, "x", kind, matrices(&sizes, sizes.x_batch) * matrix)
    cdef const void *mixing = NULL
    if a is not None:
        mixing = readable(a, "weights", kind, matrices(&sizes, sizes.weights_batch) * positions * positions)
    cdef const uint8_t *mask_bytes = mask_data(mask, sizes.batch * positions)
    cdef void *destination = writable(target, out, kind, sizes.batch * matrix)
    if params != NULL:
        work += 2 * params.w1.n + (0 if a is not None else positions + 2 * params.w_q.n)
    cdef PyThreadState *state = leave_python(sizes.batch * positions, features * work)
    cdef fb_status status
    if params == NULL:
        status = fb_mix_positions(dtype_of(kind), sizes.batch, mixing, sizes.weights_batch, source, sizes.x_batch,
                                  destination, positions, features)
    else:
        status = fb_block(params, sizes.batch, source, sizes.x_batch, positions, mixing, sizes.weights_batch, causal,
                          mask_bytes, destination)
    enter_python(state)
    return deliver(status, target, result, out)


# ---- the block

@cython.no_gc
@cython.auto_pickle(False)
cdef class PackedBlock:
    """PackedBlock(w1, b1, w2, b2, *, w_q=None, w_k=None, b_q=None, b_k=None)\n--\n\n\
    Parameters of a block, checked, copied and packed once; `fastblock.Block` is its public face.

    They are there from the moment that `ready` is set, and never change again: a call needs no lock.
    """
    cdef Packed packed
    cdef fb_flag ready

    def __init__(self, w1=_nothing, b1=_nothing, w2=_nothing, b2=_nothing, *, w_q=None, w_k=None, b_q=None, b_k=None):
        """__init__($self, w1, b1, w2, b2, *, w_q=None, w_k=None, b_q=None, b_k=None)\n--\n\n\
        Check the parameters against each other, and pack them."""
        self._adopt(_pack(w1, b1, w2, b2, w_q, w_k, b_q, b_k))  # all or nothing: a failure leaves this object as it was

    def _adopt(self, Packed packed not None):
        """Take packed parameters, once; they are shared, not copied."""
        with cython.critical_section(self):
            if flag_is_set(&self.ready):  # asked where nothing can come in between: packing let other threads run
                raise RuntimeError("a block cannot be initialised twice: make a new one")
            self.packed = packed
            set_flag(&self.ready)

    @property
    def _packed(self):
        """The packed parameters, for copies and pickles."""
        self.parameters()
        return self.packed

    @cython.final
    cdef inline const fb_params *parameters(self) except NULL:
        if not usually(flag_is_set(&self.ready)):
            raise RuntimeError("the block has no parameters: its __init__ has not been called, or not to its end")
        return &self.packed.params

    def __call__(self, x=_nothing, weights=None, *, causal=False, key_mask=None, out=None):
        """__call__($self, x, weights=None, *, causal=False, key_mask=None, out=None)\n--\n\n\
        Mix the positions of `x`, then send each through the same two layers.

        ::

            y = relu((A x) w1ᵀ + b1) w2ᵀ + b2    A = weights, or softmax((x w_qᵀ + b_q)(x w_kᵀ + b_k)ᵀ / sqrt(E))

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
        return run_block(self.parameters(), x, weights, causal, key_mask, out, None)

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
        return run_rows(of_the_block(x, "x", kind_of(params.dtype)), "x", params, NULL, NULL, False, out)

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
        return run_rows(of_the_block(x, "x", kind_of(params.dtype)), "x", params, &params.w1, params.b1, True, out)

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
        return run_rows(of_the_block(h, "h", kind_of(params.dtype)), "h", params, &params.w2, params.b2, False, out)

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
        return self.packed.matrix(&self.parameters().w1)

    @property
    def b1(self):
        """A copy of the up-projection bias, (F,), or None."""
        return self.packed.bias(self.parameters().b1, &self.packed.params.w1)

    @property
    def w2(self):
        """A copy of the down-projection weights, (D, F)."""
        return self.packed.matrix(&self.parameters().w2)

    @property
    def b2(self):
        """A copy of the down-projection bias, (D,), or None."""
        return self.packed.bias(self.parameters().b2, &self.packed.params.w2)

    @property
    def w_q(self):
        """A copy of the query weights, (E, D), or None."""
        return self.packed.matrix(&self.parameters().w_q)

    @property
    def b_q(self):
        """A copy of the query bias, (E,), or None."""
        return self.packed.bias(self.parameters().b_q, &self.packed.params.w_q)

    @property
    def w_k(self):
        """A copy of the key weights, (E, D), or None."""
        return self.packed.matrix(&self.parameters().w_k)

    @property
    def b_k(self):
        """A copy of the key bias, (E,), or None."""
        return self.packed.bias(self.parameters().b_k, &self.packed.params.w_k)


# ---- the stack

@cython.auto_pickle(False)
cdef class PackedStack:
    """Blocks one after another; `fastblock.Stack` is its public face, and checks them."""
    cdef public tuple _blocks  # set once

    def _made(self):
        """The blocks; a stack without any is one whose __init__ has not been called, or not to its end."""
        if not self._blocks:
            raise RuntimeError("the stack has no blocks: its __init__ has not been called, or not to its end")
        return self._blocks

    def __call__(self, x=_nothing, weights=None, *, causal=False, key_mask=None, out=None):
        """__call__($self, x, weights=None, *, causal=False, key_mask=None, out=None)\n--\n\n\
        Feed `x` through all blocks.

        Parameters
        ----------
        x : ndarray, shape (..., P, D)
        weights : ndarray, shape (..., P, P), or list or tuple of ndarray or None, optional
            The attention weights: one array for every block, or one for each, where None stands for the
            block's own query-key module.
        causal, key_mask
            As in a call of a `Block`.
        out : ndarray, shape (..., P, D), optional
            Where the result goes. It may overlap `x` or `weights`.

        Returns
        -------
        ndarray, shape (..., P, D)
            `out` if it was given.

        Raises
        ------
        ValueError
            The number of weights is not the number of blocks, or as in a call of a `Block`.
        TypeError
            As in a call of a `Block`, or a subclass of `Block` has returned something else than an array.

        Examples
        --------
        >>> identity = np.eye(2)
        >>> stack = fastblock.Stack([fastblock.Block(2 * identity, None, identity, None)] * 2)
        >>> stack(np.ones((1, 2)), [np.array([[1.0]]), np.array([[10.0]])])
        array([[40., 40.]])
        """
        cdef tuple blocks = self._blocks or self._made()
        cdef Py_ssize_t index, last = len(blocks) - 1
        cdef bint plain, ours = False  # whether x is an array that this call has made and only plain blocks have seen
        each = list(weights) if isinstance(weights, (list, tuple)) else None
        if each is not None and len(each) != last + 1:
            raise ValueError(f"weights: expected one for each of the {last + 1} blocks, got {len(each)}")
        if x is _nothing:
            as_array(x, "x")
        # Such an array can be written again. A block that overrides __call__ may keep what it is given, and return what
        # belongs to somebody else.
        cdef cnp.ndarray spare = None  # one that is not needed any more
        for index in range(last + 1):
            block = blocks[index]
            mixing = weights if each is None else each[index]
            plain = has_call_of(block, PackedBlock)
            target = out if index == last else None
            try:
                if plain:
                    y = run_block((<PackedBlock>block).parameters(), x, mixing, causal, key_mask, target, spare)
                else:
                    y = block(x, mixing, causal=causal, key_mask=key_mask, out=target)
                    y = deliver_any(y, f"the result of blocks[{index}]", target)
            except Exception as error:
                error.add_note(f"in block {index} of the stack")
                raise
            spare = <cnp.ndarray>x if ours and plain else None
            x, ours = y, plain
        return x


cdef deliver_any(object y, str name, object out):
    """What a call has returned that may do as it likes: checked, and in `out` if that is given."""
    cdef cnp.ndarray array = as_array(y, name)
    cdef Shape shape
    if out is None or y is out:
        return y
    shape.n = 0
    broadcast(&shape, cnp.PyArray_DIMS(array), cnp.PyArray_NDIM(array))
    cnp.PyArray_CopyInto(check_out(out, &shape, array, name), array)
    return out
