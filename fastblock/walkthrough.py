"""The worked example: two small blocks, step by step, to follow with pencil and paper; then how long blocks take.

Every number shown comes from the C core. What the whole blocks return is compared with `fastblock.reference`,
byte for byte, and so is every block that is timed.
"""

import os
import statistics
import subprocess
import sys
import time

import numpy as np

from . import Block, down_project, isa, mix_positions, reference, up_project

X = [[2, 0, 1], [-1, 1, 1], [2, 3, -1], [1, -1, 3], [3, 1, 0]]
A = [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
BLOCKS = [
    {
        "w1": [[1, 0, -1], [0, 2, 1], [-1, 1, 0], [1, 1, 1]],
        "b1": [2, -2, 0, -5],
        "w2": [[1, 0, 2, 0], [0, 1, 0, -1], [-1, 0, 1, 1]],
        "b2": [0, 1, -1],
    },
    {
        "w1": [[0, 1, 1], [1, -1, 0], [-1, 1, -1], [0, 1, 2]],
        "b1": [-2, 0, 1, 3],
        "w2": [[0, 1, 0, 1], [1, 0, -1, 0], [0, -1, 1, 0]],
        "b2": [1, 0, -2],
    },
]

POSITIONS = [f"X{i}" for i in range(1, 6)]
HIDDEN = [f"h{f}" for f in range(1, 5)]
OUTPUTS = [f"y{c}" for c in range(1, 4)]

DIFFERED = 10  # exit status of the process that takes the times; 1 would also be that of a Python that cannot start


def main():
    """Print the worked example and the timings; return whether every result equalled the reference."""
    x, weights = _arrays(X), _arrays(A)
    print(
        "Two transformer blocks, one after the other: 5 positions of 3 features, 4 hidden values in between.\n"
        "Check any number with pencil and paper; a sum of a row times a row is spelled out where it first occurs."
    )
    equal = True
    for number, parameters in enumerate(BLOCKS, start=1):
        parameters = {name: _arrays(values) for name, values in parameters.items()}
        print(f"\n\nBLOCK {number}")
        _show_steps(number, x, weights, **parameters)
        y = Block(**parameters)(x, weights)
        expected = reference.block(x, **parameters, weights=weights)
        equal &= _same_bytes(y, expected)
        print(f"\n   C result equals the reference bit for bit: {_compared(y, expected)}")
        x = y
    return _show_timings() and equal


def _show_timings():
    """Print what `timings` prints with one thread for everybody; return whether all bits were right.

    Threads of a BLAS go on spinning for milliseconds after a product and keep ours from their cores, and the number of
    them is read when NumPy is imported: hence a process of its own.
    """
    names = ["FASTBLOCK", "OMP", "OPENBLAS", "MKL", "BLIS"]
    one_each = dict.fromkeys([*(f"{name}_NUM_THREADS" for name in names), "VECLIB_MAXIMUM_THREADS"], "1")
    command = [sys.executable, "-P", "-m", __name__]
    result = subprocess.run(
        command, env=os.environ | {"FASTBLOCK_ISA": isa()} | one_each, stdout=subprocess.PIPE, text=True
    )
    print(result.stdout, end="")
    if result.returncode not in (0, DIFFERED):
        raise RuntimeError(f"the process that takes the times ended with status {result.returncode}")
    return result.returncode == 0


def _show_steps(number, x, weights, w1, b1, w2, b2):
    z = mix_positions(weights, x)
    before = down_project(z, w1, b1)  # a projection with its bias and no ReLU
    after = up_project(z, w1, b1)
    y = down_project(after, w2, b2)
    source = f"Block {number - 1} has returned" if number > 1 else "The block before has returned"

    _step(1, f"Features from the previous block. {source} 5 positions of 3 features.")
    _show(_panel("X", x, POSITIONS))

    _step(2, "Attention weight matrix A. The caller brings it here; a query-key module would compute it from X.")
    _show(_panel("A", weights, POSITIONS))

    _step(3, "Attention weighting: Z = A X combines features across positions, X1 := X1 + X2 and so on.")
    _show(
        _panel("A", weights, POSITIONS),
        _panel("X", x, POSITIONS),
        _panel("Z = A X", z, POSITIONS),
    )
    _spell_out("Z of X1, first feature", weights[0], x[:, 0], None, z[0, 0])

    _step(4, "Feed-forward, first layer: every position meets the same W1 and b1; 3 features become 4 hidden values.")
    _show(
        _panel("Z", z, POSITIONS),
        _panel("W1 | b1", w1, HIDDEN, b1),
        _panel("Z W1' + b1", before, POSITIONS),
    )
    _spell_out("h1 of X1 (row X1 of Z times row h1 of W1, plus b1)", z[0], w1[0], b1[0], before[0, 0])

    _step(5, "ReLU: negative values become zero.")
    _show(
        _panel("before", before, POSITIONS),
        _panel("H, after", after, POSITIONS),
    )

    _step(6, "Feed-forward, second layer: W2 and b2 bring 4 hidden values back to 3 features.")
    _show(
        _panel("H", after, POSITIONS),
        _panel("W2 | b2", w2, OUTPUTS, b2),
        _panel("Y = H W2' + b2", y, POSITIONS),
    )
    _spell_out("y1 of X1 (row X1 of H times row y1 of W2, plus b2)", after[0], w2[0], b2[0], y[0, 0])


def _step(number, text):
    print(f"\n{number}. {text}\n")


def _panel(title, rows, labels, bias=None):
    """Lines of one matrix, aligned: a title, then a labelled row in brackets for each row, its bias behind a bar."""
    cells = [[f"{value:g}" for value in row] for row in rows]
    width = max(len(cell) for row in cells for cell in row)
    lines = [f"[ {'  '.join(f'{cell:>{width}}' for cell in row)} ]" for row in cells]
    if bias is not None:
        ends = [f"{value:g}" for value in bias]
        width = max(map(len, ends))
        lines = [f"{line[:-1]}| {end:>{width}} ]" for line, end in zip(lines, ends)]
    lines = [f"{label} {line}" for label, line in zip(labels, lines)]
    return [f"   {title}".ljust(len(lines[0])), *lines]


def _show(*panels):
    """Print panels side by side."""
    height = max(map(len, panels))
    columns = [panel + [" " * len(panel[0])] * (height - len(panel)) for panel in panels]
    for row in zip(*columns):
        print(f"   {'     '.join(row)}".rstrip())


def _spell_out(what, left, right, bias, result):
    terms = [f"{a:g}*{f'({b:g})' if b < 0 else f'{b:g}'}" for a, b in zip(left, right)]
    if bias is not None:
        terms.append(f"({bias:g})" if bias < 0 else f"{bias:g}")
    print(f"\n   {what}: {' + '.join(terms)} = {result:g}")


def timings():
    """Print the time of blocks beside the same expression in NumPy; return whether all bits were right."""
    rng = np.random.default_rng(0)
    small = {name: _arrays(values) for name, values in BLOCKS[0].items()}
    large = {
        name: rng.standard_normal(shape, dtype=np.float32)
        for name, shape in {"w1": (3072, 768), "b1": 3072, "w2": (768, 3072), "b2": 768}.items()
    }
    cases = [
        ("5 x 3 -> 4", _arrays(X), _arrays(A), small),
        (
            "128 x 768 -> 3072",
            rng.standard_normal((128, 768), dtype=np.float32),
            rng.random((128, 128), dtype=np.float32),
            large,
        ),
    ]
    print(
        "\n\nTIME of one block in float32, A given, beside np.maximum(A @ x @ w1.T + b1, 0) @ w2.T + b2\n"
        f"(medians of interleaved rounds; tier {isa()}; one thread each, "
        "so that the threads of neither keep the other from a core)\n\n"
        "                          fastblock          NumPy   ratio   rounds   "
        "first and last position equal the reference"
    )
    equal = True
    for name, x, weights, parameters in cases:
        w1, b1, w2, b2 = parameters.values()
        block = Block(**parameters)
        ends = [0, -1]
        expected = reference.feed_forward(reference.mix_positions(weights, x)[ends], **parameters)
        y = block(x, weights)[ends]
        equal &= _same_bytes(y, expected)
        ours, numpys, rounds = _medians(
            lambda: block(x, weights),
            lambda: np.maximum(weights @ x @ w1.T + b1, 0) @ w2.T + b2,
        )
        print(
            f"   {name:<20} {_duration(ours):>11}    {_duration(numpys):>11}   {numpys / ours:5.2f}   {rounds:6}   "
            f"{_compared(y, expected)}"
        )
    return equal


def _medians(*functions):
    """Median seconds of a call of each function, and of how many rounds: they take turns, for up to three seconds."""
    calls = []
    for function in functions:
        start = time.perf_counter()
        function()
        calls.append(max(1, int(0.005 / (time.perf_counter() - start))))
    seconds = [[] for _ in functions]
    end = time.perf_counter() + 3
    while not seconds[0] or (len(seconds[0]) < 25 and time.perf_counter() < end):
        for function, count, taken in zip(functions, calls, seconds):
            wait_until_quiet()
            start = time.perf_counter()
            for _ in range(count):
                function()
            taken.append((time.perf_counter() - start) / count)
    return *map(statistics.median, seconds), len(seconds[0])


def wait_until_quiet():
    """Return when the threads of a pool, which spin in the hope of more work, have stopped, or in half a second."""
    give_up = time.perf_counter() + 0.5
    while time.perf_counter() < give_up:
        busy, start = time.process_time(), time.perf_counter()
        time.sleep(0.004)
        if time.process_time() - busy < 0.1 * (time.perf_counter() - start):
            return


def _duration(seconds):
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.2f} us"


def _arrays(values):
    return np.array(values, dtype=np.float32)


def _same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _compared(a, b):
    return f"{'yes' if _same_bytes(a, b) else 'NO'} ({b.nbytes} bytes compared)"


if __name__ == "__main__":  # the process that takes the times
    sys.exit(0 if timings() else DIFFERED)
