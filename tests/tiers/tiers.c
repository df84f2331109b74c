/* tiers.c - runs every kernel and every operation on the tiers named on the command line and compares their bits.
 *
 *     tiers FIRST [OTHER ...]
 *
 * Each case makes its inputs from its own number, runs, and logs its results. The logs of the other tiers must equal
 * the first tier's; the exit status says whether they do. Printed is one line an operation and dtype, which ends in a
 * hash of the first tier's log: equal lines of programs built for different CPUs mean equal bits. For that, inputs come
 * from integers by exact steps, and hashes from values, not from bytes in memory.
 */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fb_internal.h"

/* ---- random numbers: splitmix64. Never two in one expression: C leaves open which would be drawn first. */

static uint64_t state;

static uint64_t random64(void)
{
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}
static ptrdiff_t between(ptrdiff_t low, ptrdiff_t high)
{
    return low + (ptrdiff_t)(random64() % (uint64_t)(high - low + 1));
}
static int chance(int percent)
{
    return between(0, 99) < percent;
}
static double bell(void) /* nearly Gaussian: four uniform numbers, variance 1 */
{
    int64_t sum = -((int64_t)2 << 40);
    for (int i = 0; i < 4; i++)
        sum += (int64_t)(random64() >> 24);
    return (double)sum * 0x1.bb67ae8584caap-40;
}

/* ---- elements of either dtype */

static const fb_tier *tier; /* of the tier that runs */
static fb_dtype dtype;
#define F32 (dtype == FB_F32)

static uint64_t bits_at(const void *p, ptrdiff_t i)
{
    uint32_t narrow;
    uint64_t wide;
    memcpy(&narrow, (const char *)p + 4 * i, F32 ? 4 : 0);
    memcpy(&wide, (const char *)p + 8 * i, F32 ? 0 : 8);
    return F32 ? narrow : wide;
}
static void put_bits(void *p, ptrdiff_t i, uint64_t bits)
{
    const uint32_t narrow = (uint32_t)bits;
    if (F32)
        memcpy((char *)p + 4 * i, &narrow, 4);
    else
        memcpy((char *)p + 8 * i, &bits, 8);
}
static void put(void *p, ptrdiff_t i, double value)
{
    if (F32)
        ((float *)p)[i] = (float)value;
    else
        ((double *)p)[i] = value;
}
static double get(const void *p, ptrdiff_t i)
{
    return F32 ? ((const float *)p)[i] : ((const double *)p)[i];
}
static void *at(const void *p, ptrdiff_t i)
{
    return fb_at(p, i, tier->size);
}
static const uint64_t infinity[2] = {0x7f800000, (uint64_t)0x7ff << 52};
static const uint64_t sign[2] = {(uint64_t)1 << 31, (uint64_t)1 << 63};

/* ---- memory: given back all at once after each case; what is never written holds a pattern */

static void *blocks[64];
static int num_blocks;

static void *memory(ptrdiff_t elements)
{
    void *p = fb_alloc(elements, 1, 8);
    if (!p || num_blocks == 64)
        exit(2);
    memset(p, 0x55, (size_t)elements * 8);
    return blocks[num_blocks++] = p;
}

/* ---- inputs */

enum { GAUSSIAN, INTEGERS, WIDE, SUBNORMAL, ZEROS, OVERFLOWS, FINITE, INFINITIES = FINITE, NANS, CLASSES };

static void put_random(void *p, ptrdiff_t i, int class)
{
    static const double zeros[] = {0, -0.0, 0, -0.0, 1, -1};
    int exponent;
    const int few = chance(2); /* most rows of a result stay free of infinities and NaNs */
    switch (class) {
    case INTEGERS:
        put(p, i, (double)between(-8, 8));
        break;
    case WIDE:
        exponent = (int)between(F32 ? -60 : -470, F32 ? 60 : 470);
        put(p, i, ldexp(bell(), exponent));
        break;
    case SUBNORMAL: /* products are around the smallest subnormal; some factors are subnormal themselves */
        put(p, i, ldexp(bell(), few ? (F32 ? -132 : -1030) : (F32 ? -70 : -530)));
        break;
    case ZEROS:
        put(p, i, few ? (F32 ? 0x1p-126 : 0x1p-1022) : zeros[between(0, 5)]);
        break;
    case OVERFLOWS:
        put(p, i, ldexp(bell(), F32 ? 62 : 510));
        break;
    case INFINITIES:
    case NANS: /* quiet and signalling, of both signs, with payloads */
        if (few) {
            const uint64_t payload = class == NANS && chance(80) ? random64() >> 12 : 0;
            put_bits(p, i, infinity[dtype] | (F32 ? payload & 0x7fffff : payload) | (chance(50) ? sign[dtype] : 0));
            break;
        } /* fall through */
    default:
        put(p, i, bell());
    }
}

static void *array(ptrdiff_t n, int class)
{
    void *p = memory(n);
    for (ptrdiff_t i = 0; i < n; i++)
        put_random(p, i, class);
    return p;
}

/* A matrix with zeros of both signs: some anywhere, and before and after a part of the columns common to some rows. */
static void *sparse_array(ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t row, int class, int percent)
{
    void *p = array(rows * row, class);
    ptrdiff_t first = 0, end = cols;
    for (ptrdiff_t i = 0; i < rows; i++) {
        if (i % 7 == 0) {
            first = chance(50) ? 0 : between(0, cols);
            end = chance(50) ? cols : between(first, cols);
        }
        for (ptrdiff_t j = 0; j < cols; j++)
            if (j < first || j >= end || chance(percent))
                put_bits(p, i * row + j, chance(50) ? sign[dtype] : 0);
    }
    return p;
}

/* ---- the log */

static struct log {
    uint64_t *value;
    size_t count, room;
} logs[2], *log_to;

static void note(uint64_t value)
{
    if (log_to->count == log_to->room) {
        log_to->room = 2 * log_to->room + 4096;
        if (!(log_to->value = realloc(log_to->value, log_to->room * sizeof(uint64_t))))
            exit(2);
    }
    log_to->value[log_to->count++] = value;
}
static void note_bits(const void *p, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++)
        note(bits_at(p, i));
}
/* Of what is not yet finished, the sign of a zero is open; and of a NaN, everything else (contract sections 3 and
 * 6). */
static void note_unfinished(const void *p, ptrdiff_t n, int zeros_too)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        const uint64_t bits = bits_at(p, i), size = bits & ~sign[dtype];
        note(size > infinity[dtype] ? infinity[dtype] + 1 : zeros_too && size == 0 ? 0 : bits);
    }
}

/* ---- kernels */

/* Significands and exponents where rounding is hard: products of few bits, of exactly one bit too many, and close to
 * the limits of the format; c near the product or far below it. Random operands never show a second rounding. */
static void *fma_factor(ptrdiff_t n)
{
    static const int exponents[2][5] = {{0, -70, 63, -126, -149}, {0, -530, 511, -1022, -1074}};
    void *p = memory(n);
    const int half = F32 ? 13 : 27, whole = F32 ? 24 : 53;
    for (ptrdiff_t i = 0; i < n; i++) {
        double m = 1 + (double)between(-2, 2) * (F32 ? 0x1p-23 : 0x1p-52);
        if (chance(70)) {
            const int width = chance(50) ? half : whole;
            m = ldexp((double)((random64() >> (64 - width)) | 1), 1 - width);
        }
        const int exponent = exponents[dtype][chance(40) ? 0 : between(0, 4)], negative = chance(50);
        put(p, i, ldexp(negative ? -m : m, exponent + (int)between(-3, 3)));
        if (chance(3))
            put_random(p, i, ZEROS + (int)between(0, 3));
    }
    return p;
}

static void run_fma(int number)
{
    enum { N = 1001 };
    void *a = fma_factor(N), *b = fma_factor(N), *c = fma_factor(N), *out = memory(N);
    (void)number;
    for (ptrdiff_t i = 0; i < N; i++) {
        const double product = get(a, i) * get(b, i);
        if (chance(50)) { /* cancels all but a few units, or nearly half a unit, or far less, or nothing */
            put(c, i, -product);
            if (chance(70) && bits_at(c, i) + 4 < bits_at(c, i) + 8)
                put_bits(c, i, bits_at(c, i) + (uint64_t)between(-3, 3));
        } else if (chance(80)) {
            put(c, i, ldexp(product, -(int)between(20, F32 ? 60 : 120)));
        } else if (chance(30)) {
            put(c, i, chance(50) ? 0.0 : -0.0);
        }
    }
    tier->fma(a, b, c, out, N);
    note_unfinished(out, N, 0);
}

static void run_exp(int number)
{
    static const double thresholds[2][7] = {
        {-150, -103.97208, -103.2789, -87.33655, 88.72284, 130, 0},
        {-746, -745.1332191019412, -744.4400719213812, -708.3964185322641, 709.782712893384, 710, 0},
    };
    enum { N = 1001 };
    void *x = memory(N), *out = memory(N);
    for (ptrdiff_t i = 0; i < N; i++)
        switch (number % 4) {
        case 0:
            put_bits(x, i, random64());
            break;
        case 1:
            put(x, i, ldexp((double)between(-1000000, 1000000), F32 ? -13 : -10));
            break;
        case 2:
            put(x, i, bell());
            put(x, i, -fabs(get(x, i)) * ldexp(1, (int)between(-40, 6)));
            break;
        case 3:
            put(x, i, thresholds[dtype][between(0, 6)]);
            put_bits(x, i, bits_at(x, i) + (uint64_t)between(-20, 20));
        }
    tier->exp(x, out, N);
    note_bits(out, N);
}

/* What holds on every tier for itself; comparing tiers would not see what is wrong on all of them. */
static void expect(int holds, const char *what, int number)
{
    if (holds)
        return;
    printf("WRONG: %s %s case %d\n", what, F32 ? "f32" : "f64", number);
    exit(3);
}

static uint64_t random_size(void) /* of all lengths: subnormal numbers are as likely as others */
{
    return random64() >> between(0, F32 ? 32 : 63) & ~sign[dtype] & (F32 ? UINT32_MAX : UINT64_MAX);
}

static void run_range(int number)
{
    const int fraction = F32 ? 23 : 52;
    const ptrdiff_t rows = between(0, 3), n = number % 70, row = n + between(0, 3);
    void *x = array(rows * row + 1, number % CLASSES);
    for (int i = 0; i < 40; i++) {
        fb_range range = {.low = INT_MAX};
        int low = INT_MAX, high = 0;
        for (ptrdiff_t r = 0; r < rows; r++)
            for (ptrdiff_t j = 0; j < n; j++) {
                const uint64_t size = bits_at(x, r * row + j) & ~sign[dtype];
                const int exponent = (int)(size >> fraction);
                low = size && exponent < low ? exponent : low;
                high = exponent > high ? exponent : high;
            }
        fb_fp_forget_subnormals();
        tier->touch(x, row, rows, n);
        const int met = fb_fp_met_subnormals();
        tier->range(x, row, rows, n, &range);
        expect(range.low == low && range.high == high, "range", number);
        expect(met == (FB_X86 && low == 0) || high == (int)(infinity[dtype] >> fraction), "touch", number);
        note((uint64_t)low);
        note((uint64_t)high);
        const ptrdiff_t where = between(0, rows * row);
        put_bits(x, where, chance(30) ? 0 : random_size());
    }
}

static void run_raise_lower(int number)
{
    const ptrdiff_t rows = between(0, 3), n = number * 3 % 200, row = n + between(0, 3), to_row = n + between(0, 3);
    const uint64_t normal = (uint64_t)1 << (F32 ? 23 : 52), most = infinity[dtype] - (uint64_t)tier->shift * normal;
    const uint64_t edges[] = {0, 1, normal - 1, normal, normal + 1, most - 1};
    void *x = array(rows * row, ZEROS), *out = memory(rows * to_row);
    for (ptrdiff_t i = 0; i < rows * row; i++) {
        const uint64_t size = random_size() % most;
        const int edge = chance(20) ? (int)between(0, 5) : -1;
        put_bits(x, i, (edge < 0 ? size : edges[edge]) | (chance(50) ? sign[dtype] : 0));
    }
    tier->raise(x, row, rows, n, out, to_row);
    for (ptrdiff_t i = 0; i < rows; i++) {
        for (ptrdiff_t j = 0; j < n; j++)
            expect(get(out, i * to_row + j) == ldexp(get(x, i * row + j), tier->shift), "raise", number);
        note_bits(at(out, i * to_row), n);
    }
    tier->lower(out, to_row, rows, n, out, to_row);
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t j = 0; j < n; j++)
            expect(bits_at(out, i * to_row + j) == bits_at(x, i * row + j), "lower", number);
}

/* Sizes that overflow, which no caller from Python can ask for: there is no memory for them, and no less is taken. */
static void run_sizes(int number)
{
    const ptrdiff_t large[] = {PTRDIFF_MAX, PTRDIFF_MAX / 2 + 1, PTRDIFF_MAX / 4, (ptrdiff_t)1 << (sizeof large[0] * 4),
                               5, 1, 0};
    const ptrdiff_t rows = large[number % 7], cols = large[number / 7 % 7], size = F32 ? 4 : 8;
    const double bytes = (double)rows * (double)cols * (double)size;
    fb_arena arena = {0};
    expect(fb_bytes(rows, cols, size) == (bytes < (double)FB_MOST_BYTES ? (ptrdiff_t)bytes : FB_MOST_BYTES), "fb_bytes",
           number);
    for (int i = 0; i < 9; i++) {
        fb_take(&arena, fb_bytes(rows, cols, size));
        expect(bytes > 0 ? arena.used >= fb_bytes(rows, cols, size) && arena.used <= FB_MOST_BYTES : arena.used == 0,
               "fb_take",
               number);
    }
    if (bytes > 1e6) {
        void *p = fb_alloc(rows, cols, size);
        expect(p == NULL || bytes < 1e15, "fb_alloc", number);
        fb_free(p);
    }
    note(bytes > 0);
}

static void run_bias_relu(int number)
{
    const ptrdiff_t rows = between(0, 4), cols = number % 70;
    void *out = memory(rows * cols + 8), *x = array(rows * cols, number % CLASSES);
    tier->bias_relu(x, array(cols, (int)between(0, CLASSES - 1)), out, rows, cols);
    note_bits(out, rows * cols + 8);
}

/* The rows of B, from its panels. */
static void *rows_from_panels(const void *panels, ptrdiff_t depth, ptrdiff_t row)
{
    void *b = memory(depth * row + tier->panel);
    for (ptrdiff_t i = 0; i < depth; i++)
        for (ptrdiff_t j = 0; j < row; j++)
            put_bits(b, i * row + j, bits_at(panels, (j / tier->panel * depth + i) * tier->panel + j % tier->panel));
    return b;
}

/* A product of `rows` rows: all combinations of flags by number, the rest by chance. */
typedef enum { DENSE, SPARSE, BY_ROWS } kernel;
static void run_product_of(ptrdiff_t rows, int flags, kernel sparse)
{
    static const ptrdiff_t depths[] = {0, 1, 5, 15, 16, 17, 33, 48, 64, 65, 130, 256};
    const ptrdiff_t panels = rows <= 4 ? between(0, 10) : between(0, 3);
    const ptrdiff_t cols = panels * tier->panel + (chance(40) ? 0 : between(1, tier->panel - 1));
    const ptrdiff_t depth = depths[between(sparse == BY_ROWS, 11)], padded = fb_round_up(cols, tier->panel);
    const ptrdiff_t a_row = chance(50) ? FB_ROW : depth + between(0, 3);
    const int finite = sparse || flags & 8;
    fb_product g = {.rows = rows, .cols = cols, .depth = depth, .a_row = a_row,
                    .c_row = cols + 1, .t_row = chance(30) ? FB_ROW : cols + between(0, 3),
                    .first = flags & 1, .last = flags >> 1 & 1, .relu = flags >> 2 & 1, .skip = !sparse && finite};
    const int class = (int)between(0, CLASSES - 1);
    void *a = g.skip || sparse || chance(20)
                  ? sparse_array(rows, depth, a_row, class, chance(50) ? 0 : (int)between(0, 99))
                  : array(rows * a_row, class);
    g.a = a;
    g.stage = a_row == FB_ROW ? NULL : memory(rows * FB_ROW);
    g.b = array(padded * depth + tier->panel, (int)between(0, (finite ? FINITE : CLASSES) - 1));
    g.bias = chance(50) ? array(padded, (int)between(0, CLASSES - 1)) : NULL;
    g.t = array(rows * g.t_row + 8, (int)between(0, CLASSES - 1));
    g.c = g.t_row == g.c_row ? g.t : memory(rows * g.c_row + 8); /* the totals may be in C */
    if (sparse) {
        fb_nonzeros list = {.value = a_row == FB_ROW ? a : memory(rows * FB_ROW), /* in place where it can be */
                            .offset = memory(rows * FB_ROW), .count = memory(rows * 4), .slice = chance(50) ? 64 : 256,
                            .sums = memory(sparse == BY_ROWS ? padded : rows * FB_SUMS_BYTES / 8)};
        if (sparse == BY_ROWS) {
            list.slice = FB_CHAIN;
            g.b_row = padded;
            g.b_rows = rows_from_panels(g.b, depth, padded);
        }
        tier->compress(a, a_row, rows, depth, &list);
        for (ptrdiff_t s = 0; s * list.slice < depth; s++)
            for (ptrdiff_t i = 0; i < rows; i++) {
                const ptrdiff_t start = i * FB_ROW + s * list.slice, n = FB_STEP * list.count[s * rows + i];
                note((uint64_t)n);
                note_bits(at(list.value, start), n);
                for (ptrdiff_t j = 0; j < n; j++)
                    note(list.offset[start + j]);
            }
        (sparse == BY_ROWS ? tier->product_rows : tier->product_sparse)(&g, &list);
    } else {
        tier->product(&g);
    }
    /* with what stands between the rows and behind the last */
    if (g.last)
        note_bits(g.c, rows * g.c_row + 8);
    else
        note_unfinished(g.t, rows * g.t_row + 8, 1);
}

static ptrdiff_t rows_of(int number)
{
    const int rows = number % 33;
    return rows <= 30 ? rows : rows == 31 ? 57 : FB_ROWS;
}
static void run_product(int number)
{
    run_product_of(rows_of(number), number / 33, DENSE);
}
static void run_product_sparse(int number)
{
    run_product_of(rows_of(number), number / 33, SPARSE);
}
static void run_product_rows(int number)
{
    run_product_of(rows_of(number), number / 33, BY_ROWS);
}

/* As many columns as fit into the narrowest vector of all tiers. */
static void run_product_small(int number)
{
    const ptrdiff_t rows = between(1, 9), cols = between(1, F32 ? 4 : 2),
                    depth = number % 4 ? between(0, 9) : between(0, 256);
    const ptrdiff_t a_row = depth + between(0, 3), b_row = cols + between(0, 3);
    const int class = (int)between(0, CLASSES - 1);
    const fb_product g = {.a = array(rows * a_row, class), .a_row = a_row, .b = array(depth * b_row, class),
                          .bias = chance(50) ? array(cols, class) : NULL, .c = memory(rows * cols + 8), .c_row = cols,
                          .rows = rows, .cols = cols, .depth = depth, .relu = chance(50)};
    tier->product_small(&g, b_row);
    note_bits(g.c, rows * cols + 8);
}

static void run_sample(int number)
{
    const ptrdiff_t rows = between(1, 6), depth = number % 2 ? between(0, 256) : between(0, 40),
                    row = depth + between(0, 3);
    const int class = (int)between(0, CLASSES - 1);
    void *a = sparse_array(rows, depth, row, class, chance(50) ? 0 : (int)between(0, 100));
    ptrdiff_t span, nonzeros;
    tier->sample(a, row, rows, depth, &span, &nonzeros);
    note((uint64_t)nonzeros);
    /* The span is a hint, not the same for all vector lengths: at least all nonzeros, at most everything. */
    note(span >= 0 && span <= depth && span >= nonzeros);
}

static void run_softmax(int number)
{
    static const ptrdiff_t keys_of[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 65, 255, 256, 257, 300, 520};
    const ptrdiff_t keys = keys_of[number % 17], queries = between(1, 36), row = fb_round_up(queries, tier->panel);
    void *scores = array(keys * row, chance(60) ? GAUSSIAN : (int)between(0, CLASSES - 1));
    const ptrdiff_t width = keys + (chance(50) ? 0 : between(0, 20));
    const ptrdiff_t out_row = chance(50) ? fb_round_up(width, FB_PANEL_BYTES) : width + between(0, 3);
    void *out = memory(queries * out_row + 4); /* streaming asks for lines, wherever they begin */
    ptrdiff_t count[36], ends[4], n = 0;
    count[queries - 1] = chance(80) ? keys : between(0, keys);
    for (ptrdiff_t i = queries - 2; i >= 0; i--)
        count[i] = chance(50) ? count[i + 1] : between(0, count[i + 1]);
    for (ptrdiff_t end = chance(50) ? 256 : between(0, 256); end < keys && n < 3; end += between(0, 255))
        ends[n++] = end;
    ends[n] = PTRDIFF_MAX;
    const double root = 1 / sqrt((double)between(1, 200));
    char *to = at(out, chance(50) ? 0 : F32 ? 4 : 2);
    tier->softmax(scores, row, queries, count, ends, F32 ? (float)root : root, to, out_row, width, number % 2);
    for (ptrdiff_t i = 0; i < queries; i++)
        note_bits(at(to, i * out_row), width);
}

/* ---- whole operations */

static fb_panels packed(ptrdiff_t n, ptrdiff_t depth, int class)
{
    fb_panels p;
    void *w = array(n * depth + 1, class);
    if (fb_panels_pack(dtype, w, n, depth, depth, &p))
        exit(2);
    note((uint64_t)p.finite);
    blocks[num_blocks++] = p.data;
    return p;
}
static void *packed_bias(ptrdiff_t n, int class)
{
    void *p, *bias = array(n + 1, class);
    if (chance(20))
        return NULL;
    if (fb_bias_pack(dtype, bias, n, &p))
        exit(2);
    return blocks[num_blocks++] = p;
}

/* 9 sizes x tame or wild inputs x 1 to 3 threads. Were all inputs wild, most results would be NaN. */
static void run_operation(int operation, int number)
{
    static const ptrdiff_t sizes[][4] = {/* positions, features, hidden, head width */
        {1, 1, 1, 1}, {5, 3, 4, 2}, {17, 24, 40, 9}, {1, 260, 300, 16}, {2, 64, 272, 8}, {50, 33, 130, 12},
        {70, 48, 64, 20}, {260, 40, 30, 5}, {3, 5, 7, 2},
    };
    const ptrdiff_t *size = sizes[number % 9], positions = size[0], features = size[1], hidden = size[2],
                    width = size[3];
    const ptrdiff_t batch = positions > 100 ? 1 : between(1, 3);
    const int wild = number / 9 % 2, shared = chance(30), causal = chance(50), given = chance(50);
    const int class = wild ? (int)between(0, CLASSES - 1) : GAUSSIAN,
              other = wild ? (int)between(0, CLASSES - 1) : GAUSSIAN;
    fb_params params = {.dtype = dtype};
    params.w1 = packed(hidden, features, other);
    params.b1 = packed_bias(hidden, other);
    params.w2 = packed(features, hidden, GAUSSIAN);
    params.b2 = packed_bias(features, class);
    params.w_q = packed(width, features, GAUSSIAN);
    params.b_q = packed_bias(width, class);
    params.w_k = packed(width, features, other);
    params.b_k = packed_bias(width, GAUSSIAN);
    void *x = array(batch * positions * features, class);
    void *weights = sparse_array(batch * positions, positions, positions, other, chance(50) ? 0 : (int)between(0, 99));
    uint8_t *mask = memory(batch * positions);
    const ptrdiff_t widest = fb_max(fb_max(features, hidden), positions);
    void *out = memory(batch * positions * widest);
    ptrdiff_t out_cols = features;
    for (ptrdiff_t i = 0; i < batch * positions; i++)
        mask[i] = chance(70);
    if (chance(50))
        mask = NULL;
    fb_set_num_threads(1 + number / 18 % 3); /* the cut into parts decides which tiles there are */
    fb_status status = FB_OK;
    switch (operation) {
    case 0:
        status = fb_project(dtype, x, batch * positions, &params.w1, params.b1, wild, out);
        out_cols = hidden;
        break;
    case 1:
        status = fb_feed_forward(&params, x, batch * positions, out);
        break;
    case 2:
        status = fb_mix_positions(dtype, batch, weights, shared ? 0 : positions * positions, x, positions * features,
                                  out, positions, features);
        break;
    case 3:
        status = fb_attention_weights(&params, batch, x, positions, causal, mask, out);
        out_cols = positions;
        break;
    case 4:
        status = fb_block(&params, batch, x, positions * features, positions, given ? weights : NULL,
                          shared ? 0 : positions * positions, causal, mask, out);
    }
    note((uint64_t)status);
    note_bits(out, batch * positions * out_cols);
}
static void run_project(int number) { run_operation(0, number); }
static void run_feed_forward(int number) { run_operation(1, number); }
static void run_mix_positions(int number) { run_operation(2, number); }
static void run_attention_weights(int number) { run_operation(3, number); }
static void run_block(int number) { run_operation(4, number); }

/* ---- all of it */

static const struct {
    const char *name;
    void (*run)(int number);
    int cases;
} runs[] = {
    {"fma", run_fma, 20},
    {"exp", run_exp, 20},
    {"range", run_range, 140},
    {"raise, lower", run_raise_lower, 140},
    {"sizes", run_sizes, 49},
    {"bias_relu", run_bias_relu, 140},
    {"product", run_product, 33 * 16},
    {"product_sparse", run_product_sparse, 33 * 8},
    {"product_small", run_product_small, 200},
    {"sample", run_sample, 200},
    {"softmax", run_softmax, 17 * 6},
    {"project", run_project, 54},
    {"feed_forward", run_feed_forward, 54},
    {"mix_positions", run_mix_positions, 54},
    {"attention_weights", run_attention_weights, 54},
    {"block", run_block, 54},
    {"product_rows", run_product_rows, 33 * 8},
};

static void use_tier(const char *name)
{
    for (int i = 0; fb_isa_name(i); i++)
        if (strcmp(fb_isa_name(i), name) == 0 && fb_use_isa(i)) {
            tier = fb_tier_in_use(dtype);
            return;
        }
    fprintf(stderr, "no tier %s here\n", name);
    exit(2);
}

/* FNV-1a over the bytes of the values, the lowest first. */
static uint64_t hash_on(uint64_t hash, const struct log *log)
{
    for (size_t i = 0; i < log->count; i++)
        for (int shift = 0; shift < 64; shift += 8)
            hash = (hash ^ (log->value[i] >> shift & 0xff)) * 0x100000001b3;
    return hash;
}

static int differ(const char *first, const char *other, const char *name, int number)
{
    size_t i = 0;
    if (logs[0].count == logs[1].count && memcmp(logs[0].value, logs[1].value, logs[0].count * sizeof(uint64_t)) == 0)
        return 0;
    while (i < logs[0].count && i < logs[1].count && logs[0].value[i] == logs[1].value[i])
        i++;
    printf("DIFFERENT: %s %s case %d, value %zu of %zu", name, F32 ? "f32" : "f64", number, i, logs[0].count);
    if (i < logs[0].count && i < logs[1].count)
        printf(": %s %#llx, %s %#llx", first, (unsigned long long)logs[0].value[i], other,
               (unsigned long long)logs[1].value[i]);
    printf("\n");
    return 1;
}

int main(int count, char **names)
{
    enum { RUNS = sizeof runs / sizeof *runs };
    int different = 0;
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ); /* a crash leaves the lines before it */
    for (int r = 0; r < RUNS; r++)
        for (dtype = FB_F32; dtype <= FB_F64; dtype++) {
            uint64_t hash = 0xcbf29ce484222325;
            size_t values = 0;
            for (int number = 0; number < runs[r].cases; number++)
                for (int tier = 1; tier < count; tier++) {
                    use_tier(names[tier]);
                    log_to = &logs[tier > 1];
                    log_to->count = 0;
                    state = (uint64_t)(r * 2 + (int)dtype) << 32 | (uint64_t)number;
                    runs[r].run(number);
                    while (num_blocks)
                        fb_free(blocks[--num_blocks]);
                    if (tier > 1) {
                        different += differ(names[1], names[tier], runs[r].name, number);
                    } else {
                        hash = hash_on(hash, log_to);
                        values += log_to->count;
                    }
                }
            printf("%-17s %s %4d cases %8zu values %016llx\n", runs[r].name, F32 ? "f32" : "f64", runs[r].cases, values,
                   (unsigned long long)hash);
        }
    return different != 0;
}
