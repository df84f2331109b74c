/* fb_base.h - what differs between compilers and platforms, and the floating-point mode.
 *
 * Guarantees: IEEE semantics (a build that would break them does not compile), one spelling for inlining,
 * unrolling, prefetch and alignment, and fb_fp_enter/fb_fp_leave, which give a thread round-to-nearest with
 * subnormals kept for the length of a call. No other file asks which compiler or operating system this is.
 */
#ifndef FB_BASE_H
#define FB_BASE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error "fastblock promises the same bits everywhere: build it without -ffast-math, -Ofast and what they consist of"
#endif
/* 16 says that _Float16 has no excess precision, either. */
#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0 && __FLT_EVAL_METHOD__ != 16
#error "fastblock needs float and double arithmetic without excess precision (on 32-bit x86: -msse2 -mfpmath=sse)"
#endif
_Static_assert(sizeof 1.0 == sizeof(double), "build fastblock without -fsingle-precision-constant");

#define FB_STR_(x) #x
#define FB_STR(x) FB_STR_(x)
#define FB_CAT_(a, b) a##b
#define FB_CAT(a, b) FB_CAT_(a, b)

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#define FB_INLINE static __forceinline
#define FB_NOINLINE static __declspec(noinline)
#define FB_RESTRICT __restrict
#define FB_ALIGNED(n) __declspec(align(n))
#define FB_LIKELY(x) (x)
#define FB_UNROLL
#define FB_UNROLL_K
#define FB_PREFETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)
#define FB_PREFETCH_L2(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
#define FB_PREFETCH_WRITE(p) FB_PREFETCH(p)
#define FB_REGISTER(p)
#else
#define FB_INLINE static inline __attribute__((always_inline))
#define FB_NOINLINE static __attribute__((noinline))
#define FB_RESTRICT __restrict__
#define FB_ALIGNED(n) __attribute__((aligned(n)))
#define FB_LIKELY(x) __builtin_expect(!!(x), 1)
/* Constant-bound loops over accumulators: without the pragma gcc 12 keeps the accumulators on the stack. */
#ifdef __clang__ /* knows these pragmas by other names only */
#define FB_UNROLL _Pragma("clang loop unroll(full)")
#define FB_UNROLL_K _Pragma("clang loop unroll_count(4)")
#else
#define FB_UNROLL _Pragma("GCC unroll 32")
/* k of a tile in one go: the code of more would leave the micro-op cache. */
#define FB_UNROLL_K _Pragma("GCC unroll 4")
#endif
#define FB_PREFETCH(p) __builtin_prefetch((p), 0, 3)
#define FB_PREFETCH_L2(p) __builtin_prefetch((p), 0, 2)
#define FB_PREFETCH_WRITE(p) __builtin_prefetch((p), 1, 3)
/* A pointer in a register of its own: without it gcc computes it anew from its parts at each use. */
#define FB_REGISTER(p) __asm__("" : "+r"(p))
#endif

/* Threads are POSIX threads. */
#ifdef _WIN32
#define FB_THREADS 0
#else
#define FB_THREADS 1
#endif

/* In a spinning loop: leave the core's resources to its sibling. */
FB_INLINE void fb_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* How many bits x has, and of one that is not 0 the number of the lowest and of the highest. */
#if defined(_MSC_VER) && !defined(__clang__)
FB_INLINE int fb_popcount(unsigned x) { return (int)__popcnt(x); }
FB_INLINE int fb_lowest_bit(unsigned x) { unsigned long bit; return _BitScanForward(&bit, x), (int)bit; }
FB_INLINE int fb_highest_bit(unsigned x) { unsigned long bit; return _BitScanReverse(&bit, x), (int)bit; }
#else
FB_INLINE int fb_popcount(unsigned x) { return __builtin_popcount(x); }
FB_INLINE int fb_lowest_bit(unsigned x) { return __builtin_ctz(x); }
FB_INLINE int fb_highest_bit(unsigned x) { return 31 - __builtin_clz(x); }
#endif

/* Four numbers of 16 bits in one load, the first in the lowest bits. */
FB_INLINE uint64_t fb_load_offsets(const uint16_t *p)
{
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return p[0] | (uint64_t)p[1] << 16 | (uint64_t)p[2] << 32 | (uint64_t)p[3] << 48;
#else
    uint64_t four;
    memcpy(&four, p, sizeof four);
    return four;
#endif
}

#if defined(__x86_64__) || defined(_M_X64)
#define FB_X86 1
#else
#define FB_X86 0
#endif
#if defined(__aarch64__) && !defined(__AARCH64EB__)
#define FB_AARCH64 1
#else
#define FB_AARCH64 0
#endif

/* The calling thread's floating-point mode: save it, set the IEEE default (round to nearest even, no flush to zero,
 * no traps), restore it. Control registers are per thread, so every worker does this itself. Writing the register
 * is slow and almost never needed: it is written only when the mode differs. */
#if FB_X86
#include <xmmintrin.h>
typedef unsigned fb_fp_mode;
#define FB_MXCSR_MODE 0xffc0u /* all but the sticky flags */
#define FB_MXCSR_DEFAULT 0x1f80u
#define FB_MXCSR_SUBNORMAL 2u /* sticky: an operand was subnormal */
FB_INLINE fb_fp_mode fb_fp_enter(void)
{
    fb_fp_mode old = _mm_getcsr();
    if ((old & FB_MXCSR_MODE) != FB_MXCSR_DEFAULT)
        _mm_setcsr(FB_MXCSR_DEFAULT);
    return old;
}
FB_INLINE void fb_fp_leave(fb_fp_mode old)
{
    if ((old & FB_MXCSR_MODE) != FB_MXCSR_DEFAULT)
        _mm_setcsr(old);
    else if (old & FB_MXCSR_SUBNORMAL)
        _mm_setcsr(_mm_getcsr() | FB_MXCSR_SUBNORMAL);
}
/* Between the two: whether an operand was subnormal since the first. */
FB_INLINE void fb_fp_forget_subnormals(void)
{
    const unsigned now = _mm_getcsr();
    if (now & FB_MXCSR_SUBNORMAL)
        _mm_setcsr(now & ~FB_MXCSR_SUBNORMAL);
}
FB_INLINE int fb_fp_met_subnormals(void) { return (_mm_getcsr() & FB_MXCSR_SUBNORMAL) != 0; }
#elif FB_AARCH64
typedef uint64_t fb_fp_mode;
FB_INLINE fb_fp_mode fb_fp_enter(void)
{
    fb_fp_mode old, ieee = 0; /* FZ, FZ16, RMode, DN, AHP, FIZ, AH, NEP all 0 */
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    if (old)
        __asm__ volatile("msr fpcr, %0" ::"r"(ieee) : "memory");
    return old;
}
FB_INLINE void fb_fp_leave(fb_fp_mode old)
{
    if (old)
        __asm__ volatile("msr fpcr, %0" ::"r"(old) : "memory");
}
#else
#include <fenv.h>
typedef fenv_t fb_fp_mode;
FB_INLINE fb_fp_mode fb_fp_enter(void)
{
    fb_fp_mode old;
    fegetenv(&old);
    fesetenv(FE_DFL_ENV);
    return old;
}
FB_INLINE void fb_fp_leave(fb_fp_mode old)
{
    fesetenv(&old);
}
#endif
#if !FB_X86 /* they cost nothing, or nobody knows */
FB_INLINE void fb_fp_forget_subnormals(void) {}
FB_INLINE int fb_fp_met_subnormals(void) { return 0; }
#endif

FB_INLINE ptrdiff_t fb_min(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
FB_INLINE ptrdiff_t fb_max(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
/* n dealt out evenly in pieces of at most `most`: the size of a piece. */
FB_INLINE ptrdiff_t fb_even(ptrdiff_t n, ptrdiff_t most)
{
    const ptrdiff_t pieces = (n + most - 1) / most;
    return n <= most ? n : (n + pieces - 1) / pieces;
}
FB_INLINE ptrdiff_t fb_round_up(ptrdiff_t n, ptrdiff_t to) { return (n + to - 1) & -to; } /* to: a power of two */
FB_INLINE void *fb_at(const void *base, ptrdiff_t elements, ptrdiff_t size) { return (char *)base + elements * size; }

#endif
