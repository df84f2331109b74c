"""Mutation testing: small wrong edits of csrc and of the Cython sources, each of which the tests must notice.

    python tests/mutants.py                    every mutant: killed by which test, or survived
    python tests/mutants.py --list             names and files
    python tests/mutants.py --only NAME ...    these; --jobs N: so many side by side; what follows -- goes to pytest

A mutant that survives is a blind spot of the tests: write the test that kills it. Left out are edits that change no
result: thresholds and prefetches that change the time only, and edits that are equivalent, as the larger operand of max
where the sum decides. A mutant whose old text is not in its file exactly once is out of date, which is an error.

Each mutant is the baseline with one file changed: what depends on it is compiled (-O1) and linked into a package of its
own, against which the fast tests run until the first failure, and then, for what Python cannot reach, tiers/tiers.c,
whose output must be the baseline's. No existing tool does that for C and Cython together: Mull
needs clang and test programs that it can link, mutmut and cosmic-ray edit Python. Takes about 20 s a mutant and core.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# those that kill soon first
TESTS = [
    "exp",
    "block",
    "bad_input",
    "skipping",
    "exact",
    "threads",
    "invariance",
    "excluded_keys",
    "memory",
    "subnormal",
]
FLAGS = ["-O1", "-std=gnu11", "-fvisibility=hidden", "-pthread", "-fPIC", "-ffp-contract=off", "-w"]
FLAGS += ["-DNPY_NO_DEPRECATED_API=NPY_1_7_API_VERSION"]
TIMEOUT = 400  # seconds of the tests; a mutant that takes longer hangs

MUTANTS = {  # file: (name, old text, new text)
    "csrc/fb_attention.c": [
        ("causal: a position does not see itself", ": seen) <= i + r)", ": seen) < i + r)"),
        ("causal: masked keys are not counted", "(keys->number ? keys->number[seen] : seen) <=", "seen <="),
        ("causal: the last keys of a mask", "keys->number[seen - 1] >= i)", "keys->number[seen - 1] >= i + 2)"),
        ("masked keys move the blocks", "if (j % FB_CHAIN == FB_CHAIN - 1)", "if (0)"),
        ("the scale is rounded once", "params->dtype == FB_F32 ? (float)root : root", "root * (1 + 0x1p-40)"),
        ("one mask for the whole batch", "a->key_mask ? a->key_mask + b * a->positions : NULL", "a->key_mask"),
        ("masked weights are left as they were", "memset(to, 0, (size_t)(rows * to_row * size));", "(void)to;"),
        (
            "ends of the first batch item",
            "number + b * positions, ends + b * blocks);",
            "number + b * positions, ends);",
        ),
        (
            "numbers of the first batch item",
            "number + b * positions, ends + b * blocks);",
            "number, ends + b * blocks);",
        ),
        (
            "only the first part of the keys is moved",
            "b < a->batch; b += parts)",
            "b < a->batch; b += parts + (parts > 1))",
        ),
        ("queries of the first batch item", "(b * a->positions + first) * width", "first * width"),
        ("a second block of queries is the first", "e / FB_CHAIN * n * FB_ROW + q * queries.row", "q * queries.row"),
        ("a second block of keys is the first", "j * width + e, size);", "j * width, size);"),
        ("keys of the first query for all", "fb_min(q + tier->panel, n) - 1]", "0]"),
        (
            "later queries meet what the first do",
            "fb_at(queries, e * cols + first * g.depth, size)",
            "fb_at(queries, e * cols, size)",
        ),
        ("keys keep their scale", "if (shift) {", "if (0) {"),
    ],
    "csrc/fb_base.h": [
        ("subnormals read as zero are not noticed", "FB_MXCSR_MODE 0xffc0u", "FB_MXCSR_MODE 0xff80u"),
        ("the mode is not set back", "        _mm_setcsr(old);", "        (void)old;"),
    ],
    "csrc/fb_block.c": [
        (
            "small blocks share their weights",
            "mixing.a = fb_at(t->weights, b * t->weights_batch, tier->size);",
            "mixing.a = t->weights;",
        ),
        ("a block of a few numbers without relu", ".depth = features, .relu = 1};", ".depth = features, .relu = 0};"),
        (
            "one positions too many for a small block",
            "t->positions <= SMALL_POSITIONS &&",
            "t->positions <= SMALL_POSITIONS + 1 &&",
        ),
        (
            "a tile crosses into the next batch item",
            "fb_min(fb_min(plan->tile, positions - i), end - row)",
            "fb_min(plan->tile, end - row)",
        ),
        ("small blocks share the key_mask", "t->key_mask[b * positions + j]", "t->key_mask[j]"),
        ("small blocks are never causal", "mixing.depth = t->causal ? i + 1 : positions;", "mixing.depth = positions;"),
        ("key_mask of the first step for all", "t->key_mask ? t->key_mask + b * positions : NULL", "t->key_mask"),
        ("x of the first step for all", "items.x = fb_at(t->x, b * t->x_batch, size);", "items.x = t->x;"),
        ("attention is never causal", ".causal = t->causal};", ".causal = 0};"),
        ("garbage at later keys spreads", "t->causal ? count : NULL", "NULL"),
        ("a row without keys is left as it was", "memset(z, 0, (size_t)(n * plan->z_row * size));", "(void)z;"),
        ("values of the first batch item", "plan->values + b * plan->blocks;", "plan->values;"),
        (
            "masked values move the blocks",
            "fb_min(*end, keys->count) - first;",
            "fb_min(FB_CHAIN, keys->count - first);",
        ),
        (
            "values are scaled under other threads",
            "t->causal ? count : NULL, spare,",
            "t->causal ? count : NULL, NULL,",
        ),
        ("wide features attend to the first", ".first_col = j,", ".first_col = 0,"),
        (
            "few rows: one row of z too low",
            "fb_at(plan->z, row * plan->z_row, tier->size)",
            "fb_at(plan->z, row / 2 * plan->z_row, tier->size)",
        ),
        ("few rows: all in one place", "fb_at(plan->z, row * plan->z_row, tier->size)", "plan->z"),
        ("values of the first block", "first += before->k;", ";"),
        ("values of the first keys", "number ? number + first : NULL", "number"),
        ("values of masked keys", "number ? number + first : NULL", "NULL"),
    ],
    "csrc/fb_dispatch.c": [
        ("a tier that is not there is used", "    if (!fb_isa_usable(i))\n        return 0;\n", ""),
    ],
    "csrc/fb_feed_forward.c": [
        ("block sums of hidden units replace each other", ".first = f == 0,", ".first = 1,"),
        ("no hidden unit, no bias", "ptrdiff_t f = 0;\n    do { /*", "ptrdiff_t f = 0;\n    if (params->w1.n) do { /*"),
        ("b2 of the first columns for all", "params->b2 ? fb_at(params->b2, first, tier->size) : NULL", "params->b2"),
        ("b1 of the first units for all", "b1 ? fb_at(b1, f, tier->size) : NULL", "b1"),
        (
            "columns: hidden units of another block",
            "f / FB_CHAIN * rows * FB_ROW + f % FB_CHAIN",
            "f / FB_CHAIN * rows * FB_ROW",
        ),
    ],
    "csrc/fb_internal.h": [
        (
            "the last part has whole panels",
            "fb_min(panels * (part + 1) / parts * tier->panel, cols) - *first",
            "panels * (part + 1) / parts * tier->panel - *first",
        ),
        (
            "pieces of memory overlap",
            "arena->used + fb_round_up(bytes, 64), FB_MOST_BYTES",
            "arena->used + fb_round_up(bytes, 64) / 2 / 64 * 64, FB_MOST_BYTES",
        ),
        ("a size overflows", "(double)rows * (double)cols * (double)size < (double)FB_MOST_BYTES ?", "1 ?"),
    ],
    "csrc/fb_kernel_copy.h": [
        (
            "copy leaves out the last element",
            "for (; j < n; j++)\n            to[j] = from[j];",
            "for (; j + 1 < n; j++)\n            to[j] = from[j];",
        ),
        (
            "pack_rows finds everything finite",
            "if (lane[i] != 0)\n            return 0;\n    return 1;\n}\n",
            "if (lane[i] != 0)\n            return 1;\n    return 1;\n}\n",
        ),
        (
            "pack_rows looks at the last row only",
            "sum[v] = V(add)(sum[v], V(mul)(V(load)(to + v * LANES), V(zero)()));",
            "sum[v] = V(mul)(V(load)(to + v * LANES), V(zero)());",
        ),
        ("pack_rows takes what has another number", "number ? number[k] : k", "number ? number[k - k0] : k"),
    ],
    "csrc/fb_kernel_exp.h": [
        ("exp loses NaN", "V(max)(V(splat)(range), x)", "V(max)(x, V(splat)(range))"),
        (
            "exp, float32: subnormal results are zero",
            "static const float range[] = {-150, 130};",
            "static const float range[] = {-103, 130};",
        ),
        (
            "exp, float32: no overflow",
            "static const float range[] = {-150, 130};",
            "static const float range[] = {-150, 88.7f};",
        ),
        ("exp, float32: a coefficient", "0x1.1111111c478ebp-7", "0x1.1111113c478ebp-7"),
        ("exp, float32: the quick path trusts itself too much", "error = 0x1.4p-33f", "error = 0x1.4p-36f"),
        (
            "exp, float32: every second vector is trusted",
            "pair ? V(add)(unsure[i], unsure[i + 1]) : unsure[i]",
            "unsure[i]",
        ),
        (
            "exp, float32: the power's rest",
            "-0x1.ca89aap-15f, 0x1.b1d272p-17f,\n        0, -0x1.0736c4p-14f",
            "-0x1.ca89aap-15f, 0x1.b1d272p-17f,\n        0, -0x1.0738c4p-14f",
        ),
        (
            "exp, float64: the smallest results are zero",
            "static const double range[] = {-746, 710};",
            "static const double range[] = {-745, 710};",
        ),
        (
            "exp, float64: a coefficient",
            "0x1.5555555555556p-3,  0x1p-1};\n    static const double range[] = {-746, 710};",
            "0x1.5555555555557p-3,  0x1p-1};\n    static const double range[] = {-746, 710};",
        ),
        (
            "exp, float64: scaled at once",
            "x[i] = V(mul)(V(mul)(p, V(pow2)(t_first)), V(pow2)(t_second));",
            "x[i] = V(mul)(p, V(mul)(V(pow2)(t_first), V(pow2)(t_second)));",
        ),
    ],
    "csrc/fb_kernel_product.h": [
        ("results lie as far apart as totals", "g->last ? g->c_row : g->t_row", "g->t_row"),
        (
            "totals of the first block are added",
            "    if (!g->first) {\n        FB_UNROLL",
            "    if (1) {\n        FB_UNROLL",
        ),
        ("all vectors of a tile get the first bias", "VEC v = V(load)(bias + j * LANES);", "VEC v = V(load)(bias);"),
        (
            "a wide tile rounds twice",
            "s[i * vecs + j] = V(fma)(side[i], one, s[i * vecs + j]);",
            "s[i * vecs + j] = V(add)(V(mul)(side[i], one), s[i * vecs + j]);",
        ),
        (
            "a high tile rounds twice",
            "s[i * vecs + j] = V(fma)(one, side[j], s[i * vecs + j]);",
            "s[i * vecs + j] = V(add)(V(mul)(one, side[j]), s[i * vecs + j]);",
        ),
        (
            "a tile leaves out the last k",
            "for (; left > 0; left--, a++, b += PANEL)",
            "for (; left > 1; left--, a++, b += PANEL)",
        ),
        (
            "a tile leaves out strips that fetch",
            "a += FB_STRIP, b += FB_STRIP * PANEL, strips--) {",
            "a += FB_STRIP, b += FB_STRIP * PANEL, strips -= 2) {\\\n        if (strips == 3) continue;",
        ),
        (
            "totals of the last panel are forgotten",
            "    if (!g->first) {\n        memset(scratch, 0, sizeof scratch);",
            "    if (0) {\n        memset(scratch, 0, sizeof scratch);",
        ),
        (
            "the last panel is written whole",
            "if (FB_TILE_PANELS(rows) > 1 && left >= PANEL) {",
            "if (FB_TILE_PANELS(rows) > 1 && left > 0) {",
        ),
        ("range starts one late", "first += fb_lowest_bit(lanes);", "first += fb_lowest_bit(lanes) + 1;"),
        ("range ends one early", "end -= LANES - 1 - fb_highest_bit(lanes);", "end -= LANES - fb_highest_bit(lanes);"),
        ("range of the first row only", "row[i] = a + fb_min(i, rows - 1) * a_row;", "row[i] = a;"),
        (
            "range without the last row",
            "row[i] = a + fb_min(i, rows - 1) * a_row;",
            "row[i] = a + fb_min(i, fb_max(rows - 2, 0)) * a_row;",
        ),
        (
            "rows are dealt out wrongly",
            "(g->rows - tiles * fewest) * (fewest + 1);",
            "(g->rows - tiles * fewest) * fewest;",
        ),
        ("rows that skip are staged one short", "range[t][1] - range[t][0],\n", "range[t][1] - range[t][0] - 1,\n"),
        ("small: not canonical", "s = V(canonical)(V(add)(s, bias));", "s = V(add)(s, bias);"),
        (
            "small: rounds twice",
            "s = V(fma)(V(splat)(a + k), V(load_first)(b, cols), s);",
            "s = V(add)(V(mul)(V(splat)(a + k), V(load_first)(b, cols)), s);",
        ),
        ("small: the last row is written whole", "if (end - c >= LANES)", "if (end - c > 0)"),
        ("keys that are not seen take part", "(int16_t)(g->depth - g->unseen)", "(int16_t)g->depth"),
    ],
    "csrc/fb_kernel_rows.h": [
        (
            "bias_relu: NaN in the rest keeps its bits",
            "V(store_first)(out + whole, V(relu)(V(canonical)(v)), rest);",
            "V(store_first)(out + whole, V(relu)(v), rest);",
        ),
        ("range: a negative number is large", "u = FN(bits)(x[j]) & ~SIGN;", "u = FN(bits)(x[j]);"),
        ("touch leaves out the rest", "most[1] = V(max)(most[1], V(load_first)(x + j, n - j));", ";"),
        (
            "touch: three of four",
            "V(max)(V(max)(most[0], most[1]), V(max)(most[2], most[3]))",
            "V(max)(V(max)(most[0], most[1]), most[2])",
        ),
        (
            "range: a zero is small",
            "UINT u = FN(bits)(x[j]) & ~SIGN;\n            low = u - 1 < low",
            "UINT u = FN(bits)(x[j]) & ~SIGN;\n            low = u < low",
        ),
        ("raise: the sign is lost", "size + more) | (u & SIGN)", "size + more) | 0"),
        ("raise: subnormal numbers as if they were normal", "size < normal ? raised : size + more", "size + more"),
        ("raise: the smallest normal number as if it were not", "size < normal ? raised", "size <= normal ? raised"),
        (
            "softmax: the last scores are no maximum",
            "for (; j < keys; j++)\n        FB_UNROLL",
            "for (; 0;)\n        FB_UNROLL",
        ),
        (
            "softmax: every second key is no maximum",
            "m[q % PANEL_VECS] = V(max)(m[q % PANEL_VECS], m[q]);",
            "(void)m;",
        ),
        ("softmax: one block", "const ptrdiff_t end = fb_min(*block_end, keys);", "const ptrdiff_t end = keys;"),
        (
            "softmax: a block begins with the sum of the one before",
            "block[q] = V(zero)();\n            for (; j + KEYS",
            "block[q] = j ? block[q] : V(zero)();\n            for (; j + KEYS",
        ),
        (
            "softmax: the first key that is not seen is",
            "s[j * row + i] = lowest;",
            "s[j * row + i] = j == count[i] ? s[j * row + i] : lowest;",
        ),
        ("softmax: NaN as it comes", "V(canonical)(V(splat)(inverse + i))", "V(splat)(inverse + i)"),
        (
            "softmax: what follows NaN stays",
            "memset(out + i * out_row + count[i], 0, (size_t)(width - count[i]) * sizeof(REAL));",
            ";",
        ),
        ("softmax: the end of a row is not written", "if (rest < width)\n", "if (0)\n"),
        (
            "softmax: what is behind the last key is not written",
            "queries && j < width; i++, out",
            "queries && 0; i++, out",
        ),
        ("softmax: streams to any address", "stream && (uintptr_t)out_ % 16 == 0 &&", "stream &&"),
        ("softmax: streams to any row", "out_row * sizeof(REAL) % FB_PANEL_BYTES == 0;", "1;"),
    ],
    "csrc/fb_kernel_sparse.h": [
        (
            "compress leaves out the last element",
            "for (; k < end; k++) {\n                const REAL x = a[k];",
            "for (; k + 1 < end; k++) {\n                const REAL x = a[k];",
        ),
        ("compress drops negative values at the end", "v += x != 0;", "v += x > 0;"),
        (
            "compress drops NaN at the end",
            "v += x != 0;\n                offset += x != 0;",
            "v += x != 0 && x == x;\n                offset += x != 0 && x == x;",
        ),
        (
            "compress fills up with ones",
            "*v = 0;\n                *offset = 0;",
            "*v = 1;\n                *offset = 0;",
        ),
        (
            "compress counts k from the slice at the end",
            "*offset = (uint16_t)(k * 64);",
            "*offset = (uint16_t)((k - k0) * 64);",
        ),
        (
            "sparse: one slice ends too late",
            "last = (slice + 1) * list->slice >= g->depth;",
            "last = (slice + 1) * list->slice > g->depth;",
        ),
        (
            "sparse: sums of the slice before are forgotten",
            "s[j] = first ? V(zero)() : V(load)(sums + j * LANES);",
            "s[j] = V(zero)();",
        ),
        (
            "sparse: rounds twice",
            "s[j] = V(fma)(x[q], V(load)((const REAL *)w + j % PANEL_VECS * LANES), s[j]);",
            "s[j] = V(add)(V(mul)(x[q], V(load)((const REAL *)w + j % PANEL_VECS * LANES)), s[j]);",
        ),
        (
            "sparse: totals of a last panel are forgotten",
            "    if (!g->first)\n        FN(copy)(at.from, 0, 1, left, scratch, 0);",
            "    if (0)\n        FN(copy)(at.from, 0, 1, left, scratch, 0);",
        ),
        (
            "sparse: a last panel is written whole",
            "if (FB_LIKELY(left >= panels * PANEL)) {\n        FN(finish_tile)(1,",
            "if (FB_LIKELY(left > 0)) {\n        FN(finish_tile)(1,",
        ),
        (
            "sparse: no bias in the last panel",
            "const REAL *bias = g->bias ? (const REAL *)g->bias + p * PANEL : NULL;\n    const uint16_t",
            "const REAL *bias = g->bias && left >= PANEL ? (const REAL *)g->bias + p * PANEL : NULL;\n"
            "    const uint16_t",
        ),
        (
            "rows: round twice",
            "s[v] = V(fma)(x[q], V(load)(b[q] + j + v * LANES), s[v]);",
            "s[v] = V(add)(V(mul)(x[q], V(load)(b[q] + j + v * LANES)), s[v]);",
        ),
        (
            "rows: sums before are forgotten",
            "s[v] = first ? V(zero)() : V(load)(sums + j + v * LANES);",
            "s[v] = V(zero)();",
        ),
        (
            "rows: a row of zeros is not written",
            "        else\n            FN(meet_rows)(0, g,",
            "        else if (0)\n            FN(meet_rows)(0, g,",
        ),
    ],
    "csrc/fb_linear.c": [
        (
            "a staged block is cut short",
            "fb_min(FB_CHAIN, b->k - k0),\n                    fb_at(stage,",
            "fb_min(FB_CHAIN, b->k - k0) - (b->k > 512),\n                    fb_at(stage,",
        ),
        ("a chain without blocks", "g.first = k0 == 0;", "g.first = k0 <= FB_CHAIN;"),
        ("an empty sum is not written", "} while (k0 < b->k);", "} while (k0 + g.depth < b->k);"),
        ("a part has no bias of its own", ".bias = p->bias ? fb_at(p->bias, first, size) : NULL,", ".bias = p->bias,"),
    ],
    "csrc/fb_memory.c": [
        ("an overflow is not seen", "rows > PTRDIFF_MAX / 2 / size / cols", "rows > PTRDIFF_MAX / 2 / size"),
        (
            "two callers share the small buffer",
            "bytes <= SMALL && !atomic_flag_test_and_set_explicit(&in_use, memory_order_acquire)",
            "bytes <= SMALL && (atomic_flag_test_and_set_explicit(&in_use, memory_order_acquire), 1)",
        ),
        (
            "an operation works in the caller's mode",
            "const fb_fp_mode mode = fb_fp_enter();\n    fb_arena arena",
            "const fb_fp_mode mode = fb_fp_enter();\n    fb_fp_leave(mode);\n    fb_arena arena",
        ),
        ("memory that cannot be had is not missed", "return !arena.memory ? FB_NO_MEMORY : atomic", "return atomic"),
    ],
    "csrc/fb_mix.c": [
        ("mixing: one x for the whole batch", "m.x = fb_at(t->x, b * t->x_batch, size);", "m.x = t->x;"),
        ("mixing: every block is the first", "whole->first && i == 0;", "whole->first;"),
        (
            "mixing: wide features start anew",
            "fb_at(m->x, k0 * features + j, size), features,",
            "fb_at(m->x, k0 * features, size), features,",
        ),
        ("mixing: wide features meet the first", "whole->first_col * block.k", "0"),
        ("mixing: later keys count where they are not finite", "if (count && !block.finite)", "if (0)"),
        ("mixing: the first key of a later block counts", "fb_max(0, count[i] - k)", "fb_max(1, count[i] - k)"),
        ("mixing: one key too many", "fb_max(0, count[i] - k)", "fb_max(0, count[i] + 1 - k)"),
        ("mixing: scaled blocks do not stay so", "blocks[i] = block;", "blocks[i].range = block.range;"),
    ],
    "csrc/fb_packed.c": [
        (
            "rows of the last block come from elsewhere",
            "fb_at(panels->data, k0 * n + j * depth, size)",
            "fb_at(panels->data, k0 * n + j * FB_CHAIN, size)",
        ),
        ("weights are not looked at", "        fb_look_at_panels(tier, out);\n", "        out->finite = 1;\n"),
        ("scaled weights are read as they are", "if (panels->shift)", "if (0)"),
        (
            "scaled weights are read in the caller's mode",
            "const fb_fp_mode mode = fb_fp_enter();\n        for",
            "const fb_fp_mode mode = FB_MXCSR_DEFAULT;\n        for",
        ),
    ],
    "csrc/fb_simd_avx2.h": [
        ("avx2: -0.0 is canonical", "    v = _mm256_add_ps(v, _mm256_setzero_ps());\n", ""),
        (
            "avx2: another NaN, float64",
            "_mm256_set1_epi64x(0x7ff8000000000000)",
            "_mm256_set1_epi64x(0x7ff8000000000001)",
        ),
        (
            "avx2: relu of NaN is 0, float32",
            "_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)",
            "_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ)",
        ),
        (
            "avx2: relu of NaN is 0, float64",
            "_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NLE_UQ)",
            "_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_GT_OQ)",
        ),
        (
            "avx2: NaN counts as zero, float32",
            "_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ)",
            "_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_OQ)",
        ),
        (
            "avx2: NaN counts as zero, float64",
            "_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NEQ_UQ)",
            "_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NEQ_OQ)",
        ),
        (
            "avx2: negative values count as zero",
            "_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ)",
            "_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)",
        ),
        (
            "avx2: one permutation of compress, float32",
            "0x0000000000060504, 0x0000000006050400,",
            "0x0000000000060504, 0x0000000006050401,",
        ),
        (
            "avx2: one permutation of compress, float64",
            "0x0000050403020100, 0x0000000000000706, 0x0000000007060100",
            "0x0000050403020100, 0x0000000000000607, 0x0000000007060100",
        ),
        (
            "avx2: a tail of 3 stores 2",
            "    if (n & 1)\n        _mm_store_ss(p, part);",
            "    if ((n & 3) == 1)\n        _mm_store_ss(p, part);",
        ),
        ("avx2: max returns the number", "_mm256_max_ps(a, b)", "_mm256_max_ps(b, a)"),
        (
            "avx2: stream swaps halves",
            "_mm_stream_pd(p + 2, _mm256_extractf128_pd(v, 1));",
            "_mm_stream_pd(p + 2, _mm256_extractf128_pd(v, 0));",
        ),
    ],
    "csrc/fb_simd_avx512.h": [
        (
            "avx512: a tile keeps -0.0, float32",
            "{0x7fc00000, 0x11111800, 0x18181800}",
            "{0x7fc00000, 0x11111100, 0x18181800}",
        ),
        (
            "avx512: relu keeps what is negative, float64",
            "{0x7ff8000000000000, 0x11111800, 0x18181800}",
            "{0x7ff8000000000000, 0x11111800, 0x11181800}",
        ),
        (
            "avx512: a tile keeps NaN's bits, float64",
            "{0x7ff8000000000000, 0x11111800, 0x18181800}",
            "{0x7ff8000000000000, 0x11111811, 0x18181800}",
        ),
        ("avx512: another NaN, float32", "_mm512_set1_epi32(0x7fc00000)", "_mm512_set1_epi32(0xffc00000)"),
        (
            "avx512: relu of NaN is 0, float64",
            "_mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NLE_UQ)",
            "_mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_GT_OQ)",
        ),
        (
            "avx512: NaN counts as zero, float64",
            "_mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NEQ_UQ)",
            "_mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NEQ_OQ)",
        ),
        (
            "avx512: NaN counts as zero, float32",
            "_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ)",
            "_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_OQ)",
        ),
        (
            "avx512: stream repeats a quarter",
            "_mm_stream_ps(p + 12, _mm512_extractf32x4_ps(v, 3));",
            "_mm_stream_ps(p + 12, _mm512_extractf32x4_ps(v, 2));",
        ),
        (
            "avx512: a lane of compress",
            "_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)",
            "_mm512_set_epi64(7, 6, 5, 5, 3, 2, 1, 0)",
        ),
    ],
    "csrc/fb_simd_lanes.h": [
        ("a tile is not made canonical", "        s[i] = V(canonical)(s[i]);", "        s[i] = s[i];"),
        (
            "relu of a tile loses NaN",
            "            s[i] = V(relu)(s[i]);",
            "            s[i] = V(max)(s[i], V(zero)());",
        ),
    ],
    "csrc/fb_simd_portable.h": [
        ("portable: rounds to odd upwards", "u += (e > 0) == (s > 0) ? 1 : (uint64_t)-1;", "u += 1;"),
        ("portable: fma of float32 rounds twice", "return (float)fb_add_odd(product, c);", "return (float)sum;"),
        ("portable: fma of float64 rounds twice", "    return vh + z;\n}\n#endif", "    return a * b + c;\n}\n#endif"),
        ("portable: too large is tame", "- 623) <= 800; }", "- 623) <= 1000; }"),
        ("portable: fma of subnormal results rounds twice", "if (er + base > -1022)", "if (er + base > -1074)"),
        ("portable: fma far apart", "gap > 200 ? 200 :", "gap > 200 ? 52 :"),
        ("portable: -0.0 is canonical", "v.lane[i] + 0.0f : nan", "v.lane[i] : nan"),
        (
            "portable: negative values count as zero",
            "for (int i = 0; i < FB_F64_LANES; i++)\n        mask |= (unsigned)(v.lane[i] != 0) << i;",
            "for (int i = 0; i < FB_F64_LANES; i++)\n        mask |= (unsigned)(v.lane[i] > 0) << i;",
        ),
        (
            "portable: max returns the number",
            "FB_F32(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i])",
            "FB_F32(a.lane[i] < b.lane[i] ? b.lane[i] : a.lane[i])",
        ),
    ],
    "csrc/fb_skip.c": [
        ("zeros are skipped, whatever they meet", "if (!finite || fb_work_of(g)", "if (fb_work_of(g)"),
    ],
    "csrc/fb_subnormal.c": [
        (
            "the last weights are not looked at",
            "tier->range(b->data, 0, 1, fb_round_up(b->n, tier->panel) * b->k, &range);",
            "tier->range(b->data, 0, 1, b->n / tier->panel * tier->panel * b->k, &range);",
        ),
        ("weights are finite, whatever they are", "b->finite = b->range.high < tier->infinity;", "b->finite = 1;"),
        (
            "weights are raised to infinity",
            "b->range.low == 0 && b->range.high + tier->shift < tier->infinity",
            "b->range.low == 0 && b->range.high + tier->shift <= tier->infinity",
        ),
        ("weights are raised even if they are for product_small", " && fb_max(b->n, b->k) > tier->panel)", ")"),
        ("weights are never raised", "if (b->range.low == 0 && b->range.high", "if (b->range.low < 0 && b->range.high"),
        (
            "a left operand is lowered below normal",
            "return a.low > tier->shift ? -tier->shift : 0;",
            "return a.low >= tier->shift ? -tier->shift : 0;",
        ),
        (
            "a left operand is raised to infinity",
            "a.high + tier->shift < tier->infinity && b->range.low",
            "a.high + tier->shift <= tier->infinity && b->range.low",
        ),
        (
            "panels are lowered below normal",
            "b->range.low > tier->shift ? tier->shift",
            "b->range.low >= tier->shift ? tier->shift",
        ),
        ("a left operand is never raised", "return a.low == 0 && a.high", "return a.low < 0 && a.high"),
        (
            "the first block is looked at only",
            "for (ptrdiff_t k0 = 0; k0 < depth; k0 += FB_CHAIN)\n        tier->range",
            "for (ptrdiff_t k0 = 0; k0 < 1; k0 += FB_CHAIN)\n        tier->range",
        ),
        (
            "the first block is scaled only",
            "for (ptrdiff_t k0 = 0; k0 < depth; k0 += FB_CHAIN) {",
            "for (ptrdiff_t k0 = 0; k0 < 1; k0 += FB_CHAIN) {",
        ),
        ("x keeps the scale of the rows before", "while (b->shift != -shift) {", "while (0) {"),
        ("infinite x is scaled", "if (!b->finite || !(", "if (!("),
        (
            "lowered panels: the bias of the first",
            "part.bias = g->bias ? fb_at(g->bias, j, tier->size) : NULL;",
            "part.bias = g->bias;",
        ),
        (
            "lowered panels: less than there are",
            "fb_round_up(part.cols, tier->panel) * g->depth, lowered",
            "part.cols * g->depth, lowered",
        ),
    ],
    "csrc/fb_threads.c": [
        ("a child takes over the workers", "    pool.workers = 0;\n", ""),
        (
            "a child takes over the owner",
            "    atomic_store(&pool.busy, 0);\n    atomic_store(&pool.call, 0);",
            "    atomic_store(&pool.call, 0);",
        ),
        ("workers take signals", "sigfillset(&all);", "sigemptyset(&all);"),
        ("the caller does not wait", "while (inside(atomic_load(&pool.call)))", "while (0)"),
        ("a second caller is let in", "!atomic_exchange(&pool.busy, 1)", "(atomic_store(&pool.busy, 1), 1)"),
        (
            "OMP_NUM_THREADS first",
            'n = from_environment("FASTBLOCK_NUM_THREADS");\n        n = n ? n : from_environment("OMP_NUM_THREADS");',
            'n = from_environment("OMP_NUM_THREADS");\n        n = n ? n : from_environment("FASTBLOCK_NUM_THREADS");',
        ),
        (
            "one part too few",
            "arena.memory && part < parts && !fb_stop(0)",
            "arena.memory && part < parts - 1 && !fb_stop(0)",
        ),
        ("threads share their memory", "pool.memory + thread * pool.each", "pool.memory"),
    ],
    "fastblock/_block.pxi": [
        ("out may overlap the key_mask of a block", "&sizes.shape, x, a, mask)", "&sizes.shape, x, a, None)"),
        ("out may overlap the weights of a block", "&sizes.shape, x, a, mask)", "&sizes.shape, x, None, mask)"),
        ("out may overlap the x of a block", "&sizes.shape, x, a, mask)", "&sizes.shape, None, a, mask)"),
        (
            "an unpacked bias lacks its last element",
            "memcpy(cnp.PyArray_DATA(b), bias, n * ",
            "memcpy(cnp.PyArray_DATA(b), bias, (n - 1) * ",
        ),
        (
            "out may overlap x of a projection",
            "&shape, x, None, None)",
            "&shape, None, None, None)",
        ),
        (
            "strided weights are packed as they stand",
            'cdef const void *data = readable(w, f"w{number}", kind_of(dtype), n * k)',
            "cdef const void *data = cnp.PyArray_DATA(checked[0])",
        ),
        (
            "another dtype than the block's passes",
            "    if cnp.PyArray_TYPE(array) != kind:\n        dtype =",
            "    if False:\n        dtype =",
        ),
        (
            "a strided bias is packed as it stands",
            "        b = contiguous(b)\n        if fb_bias_pack",
            "        if fb_bias_pack",
        ),
        ("a block can be initialised twice", "if flag_is_set(&self.ready):  # asked", "if False:  # asked"),
        (
            "a block without parameters computes",
            'if not usually(flag_is_set(&self.ready)):\n            raise RuntimeError("the block has',
            'if False:\n            raise RuntimeError("the block has',
        ),
        (
            "a copy of a block is another block",
            "        return self\n\n    def __deepcopy__",
            "        return Packed()\n\n    def __deepcopy__",
        ),
        (
            "pickles exchange two biases",
            "self.bias(p.b_q, &p.w_q), self.bias(p.b_k, &p.w_k))",
            "self.bias(p.b_k, &p.w_k), self.bias(p.b_q, &p.w_q))",
        ),
    ],
    "fastblock/_checks.pxd": [
        (
            "what is strided is contiguous",
            "return a if usually(PyArray_ISCARRAY_RO(a)) else packed_copy(a)",
            "return a",
        ),
        ("swapped bytes pass", "    if cnp.PyArray_ISBYTESWAPPED(array):", "    if False:"),
        (
            "swapped bytes pass after another array",
            "\n            and not cnp.PyArray_ISBYTESWAPPED(<cnp.ndarray>a))",
            ")",
        ),
        ("a read-only out is written", "    if not cnp.PyArray_ISWRITEABLE(array):", "    if False:"),
        (
            "overlap from one side only",
            "return (a0 < b0 + elements_of(b) * cnp.PyArray_ITEMSIZE(b)",
            "return (a0 <= b0",
        ),
        (
            "overlap needs two elements",
            "return (a0 < b0 + elements_of(b)",
            "return (a0 + 8 < b0 + elements_of(b)",
        ),
        ("a strided key_mask is read as it stands", "        return contiguous(mask)", "        return mask"),
        (
            "leading dimensions broadcast one way only",
            "lead = result.n - 2 if own else 0",
            "lead = own",
        ),
        (
            "leading dimensions of as many axes are equal",
            "lead == result.n - 2 and are_equal(cnp.PyArray_DIMS(a), result.dims, lead)))",
            "lead == result.n - 2))",
        ),
        ("more leading dimensions do not move the others", "to.dims[i + more] = to.dims[i]", "to.dims[i] = to.dims[i]"),
        (
            "leading dimensions broadcast to anything",
            "elif dims[i] != 1 and dims[i] != to.dims[to.n - n + i]:",
            "elif False:",
        ),
        ("masked arrays pass", " or issubclass(type(a), np.ma.MaskedArray):", ":"),
        (
            "an object that lies about its class is an array",
            "if not cnp.PyArray_Check(a) or issubclass",
            "if not isinstance(a, np.ndarray) or issubclass",
        ),
        (
            "weights with one leading dimension are shared",
            "sizes.weights_batch = positions * positions if a_lead else 0",
            "sizes.weights_batch = positions * positions if a_lead > 1 else 0",
        ),
        (
            "x with one leading dimension is shared",
            "sizes.x_batch = positions * features if x_lead else 0",
            "sizes.x_batch = positions * features if x_lead > 1 else 0",
        ),
        (
            "x with one leading dimension is shared by own weights",
            "sizes.positions * sizes.features if lead else 0",
            "sizes.positions * sizes.features if lead > 1 else 0",
        ),
        ("an array that was resized meanwhile is read", " and elements_of(a) == elements):", "):"),
        ("anything is true", "    if type(a) is not np.bool_:", "    if False:"),
        ("a size that overflows is a ValueError", "PyErr_Format(PyExc_MemoryError,", "PyErr_Format(PyExc_ValueError,"),
    ],
    "fastblock/_core.pyx": [
        ("out may overlap a bias", "&shape, x_array, b, None)", "&shape, x_array, None, None)"),
        (
            "num_threads entered twice forgets",
            "fb_set_own_threads(contexts[-1][1] if contexts else 0)",
            "fb_set_own_threads(0)",
        ),
        (
            "num_threads is left in order only",
            "for i in reversed(range(len(contexts))):",
            "for i in range(len(contexts) - 1, len(contexts)):",
        ),
    ],
}
# fmt: skip


def all_mutants():
    return {name: (file, old, new) for file, mutants in MUTANTS.items() for name, old, new in mutants}


def check_list():
    """Every mutant has a name of its own, and its old text is in the file once."""
    names = [name for mutants in MUTANTS.values() for name, _, _ in mutants]
    problems = [f"{name}: named twice" for name in set(names) if names.count(name) > 1]
    for name, (file, old, _) in all_mutants().items():
        found = (ROOT / file).read_text().count(old)
        if found != 1:
            problems.append(f"{name}: the old text is in {file} {found} times")
    return problems


# ---- building


def call(*command):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:3]))} ...: {result.stderr[-2000:]}")
    return result.stdout


class Build:
    """A copy of the sources in a folder, with objects beside them and the package to import."""

    def __init__(self, folder, base=None):
        self.folder, self.base = folder, base
        for part in ("csrc", "fastblock"):
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "*.c" if part == "fastblock" else "")
            )
        self.package = folder / "package"
        (self.package / "fastblock").mkdir(parents=True)
        for file in (ROOT / "fastblock").glob("*.py"):
            shutil.copy(file, self.package / "fastblock")
        (folder / "objects").mkdir()

    def mutate(self, file, old, new):
        path = self.folder / file
        path.write_text(path.read_text().replace(old, new))

    def sources(self):
        return [*sorted((self.folder / "csrc").glob("*.c")), self.folder / "fastblock" / "_core.pyx"]

    def depends(self, source, changed):
        """Whether a source has to be compiled again after a change of one file."""
        if source == changed:
            return True
        if source.suffix == ".pyx":
            return changed.parent.name == "fastblock" or changed.name == "fastblock.h"
        return changed.suffix == ".h" and changed.name in call(compiler(), "-MM", *FLAGS, source)

    def compile(self, source):
        target = self.folder / "objects" / f"{source.stem}.o"
        flags = [*FLAGS, "-I", self.folder / "csrc", "-I", sysconfig.get_path("include"), "-I", np.get_include()]
        if source.suffix == ".pyx":
            call(sys.executable, "-m", "cython", "-3", source, "-o", source.with_suffix(".c"))
            source = source.with_suffix(".c")
        call(compiler(), "-c", *flags, source, "-o", target)

    def make(self, changed=None):
        """Compile what has changed (or everything), take the rest from the baseline, and link."""
        objects = []
        for source in self.sources():
            name = Path("objects") / f"{source.stem}.o"
            if self.base is None or self.depends(source, self.folder / changed):
                self.compile(source)
                objects.append(self.folder / name)
            else:
                objects.append(self.base.folder / name)
        self.objects = objects
        target = self.package / "fastblock" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
        call(compiler(), "-shared", "-pthread", *objects, "-lm", "-o", target)

    def test(self, more):
        """None if all tests pass, else what noticed."""
        files = [path for name in TESTS if (path := ROOT / "tests" / f"test_{name}.py").exists()]
        command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files, *more]
        environment = {**os.environ, "PYTHONPATH": str(self.package), "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(
            [str(c) for c in command], cwd=ROOT, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the interpreters that tests have started
            process.communicate()
            return "timed out"
        if process.returncode == 0:
            return None
        found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", output, re.M)
        if found:
            return found[1]
        if process.returncode < 0:
            inside = re.findall(r"^tests/(test_\w+\.py)", output, re.M)
            return f"{signal.Signals(-process.returncode).name} {''.join(inside[-1:])}".strip()
        return f"exit status {process.returncode}: {output.strip()[-500:]}"

    def tiers(self):
        """What tests/tiers/tiers.c prints about the C sources, on every tier that this CPU has."""
        program = self.folder / "tiers"
        objects = [path for path in self.objects if path.stem != "_core"]
        call(
            compiler(),
            *FLAGS,
            "-I",
            self.folder / "csrc",
            ROOT / "tests" / "tiers" / "tiers.c",
            *objects,
            "-lm",
            "-o",
            program,
        )
        printed = []
        for tier in ("portable", "neon", "avx2", "avx512"):
            result = subprocess.run([program, tier], capture_output=True, text=True, timeout=TIMEOUT)
            if result.returncode != 2:  # there is such a tier
                printed.append(f"exit status {result.returncode}\n{result.stdout}")
        return "\n".join(printed)


def compiler():
    return (sysconfig.get_config_var("CC") or "cc").split()[0]


def where_it_comes_from(build):
    """The path of the core that the tests of this build import."""
    code = "import fastblock._core; print(fastblock._core.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(build.package)}
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment
    ).stdout.strip()


def try_mutant(folder, base, name, more):
    """(name, what happened, seconds of the build, seconds of the tests)"""
    file, old, new = all_mutants()[name]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as own:
        build = Build(Path(own) / "mutant", base)
        build.mutate(file, old, new)
        try:
            build.make(file)
        except RuntimeError as error:
            return name, f"DOES NOT BUILD: {error}", time.perf_counter() - start, 0
        built = time.perf_counter()
        killer = build.test(more)
        if killer is None and file.startswith("csrc/"):
            try:
                killer = None if build.tiers() == base.tiers_output else "tiers.c"
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                killer = f"tiers.c: {type(error).__name__}"
        return name, killer or "SURVIVED", built - start, time.perf_counter() - built


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = sys.argv[1:]
    more = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    options = parser.parse_args(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    problems = check_list()
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 2
    names = [n for n in all_mutants() if not options.only or any(part in n for part in options.only)]
    if options.list:
        for name in names:
            print(f"{all_mutants()[name][0]:30} {name}")
        print(f"{len(names)} mutants")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        base = Build(Path(folder) / "baseline")
        base.make()
        came = where_it_comes_from(base)
        if not came.startswith(str(base.package)):
            print(f"the tests would import {came}, not the baseline", file=sys.stderr)
            return 2
        if failure := base.test(more):
            print(f"the tests fail without any mutant: {failure}", file=sys.stderr)
            return 2
        base.tiers_output = base.tiers()
        survivors = []
        with ThreadPoolExecutor(options.jobs) as pool:
            for name, result, build, test in pool.map(lambda n: try_mutant(folder, base, n, more), names):
                print(f"{name:55} {result}  ({build:.0f} + {test:.0f} s)", flush=True)
                if result.startswith(("SURVIVED", "DOES NOT BUILD")):
                    survivors.append(name)
    print(f"{len(names)} mutants, {len(survivors)} not killed{': ' if survivors else ''}{', '.join(survivors)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
