/* fb_memory.c - a call: its memory, which an operation gets all at once before it writes anything, and its
 * interruption.
 *
 * Scratch is never on the stack, for stacks of threads can be as small as 16 KiB. A small call takes it from one static
 * buffer, in less time than malloc, a call that finds the buffer in use from malloc.
 */
#define _DEFAULT_SOURCE /* posix_memalign, madvise */
#include "fb_internal.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#ifndef _WIN32
#include <sys/mman.h>
#endif

enum { SMALL = 32768 };

void *fb_alloc(ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t size)
{
    if (rows < 0 || cols < 0 || (cols && rows > PTRDIFF_MAX / 2 / size / cols))
        return NULL;
    size_t bytes = (size_t)fb_round_up(rows * cols * size, 64);
    void *p;
#ifdef _WIN32
    p = _aligned_malloc(bytes ? bytes : 64, 64);
#else
    const size_t huge = 2 << 20;
    if (posix_memalign(&p, bytes >= 2 * huge ? huge : 64, bytes ? bytes : 64))
        return NULL;
#ifdef MADV_HUGEPAGE
    if (bytes >= 2 * huge)
        madvise(p, bytes, MADV_HUGEPAGE);
#endif
#endif
    return p;
}

void fb_free(void *p)
{
#ifdef _WIN32
    _aligned_free(p);
#else
    free(p);
#endif
}

struct fb_calling {
    _Atomic int stopped;
    double work; /* of the caller since it last looked at the clock */
    struct timespec asked;
};

static int (*_Atomic interrupt)(void);
static _Thread_local fb_calling *calling; /* what this thread works for */
static _Thread_local int is_helper;

static const double CLOCK_WORK = 1 << 20; /* multiply-adds between two looks at the clock: tens of microseconds */
static const long ASK_EVERY = 30000000;   /* nanoseconds */

void fb_set_interrupt(int (*check)(void))
{
    atomic_store(&interrupt, check);
}

fb_calling *fb_this_call(void)
{
    return calling;
}

void fb_help_with(fb_calling *call)
{
    calling = call;
    is_helper = 1;
}

static void ask(fb_calling *call, int (*check)(void))
{
    struct timespec now;
    call->work = 0;
    timespec_get(&now, TIME_UTC);
    const int64_t passed = (int64_t)(now.tv_sec - call->asked.tv_sec) * 1000000000 + now.tv_nsec - call->asked.tv_nsec;
    if (call->asked.tv_sec && passed >= 0 && passed < ASK_EVERY) /* a clock that was set back has passed, too */
        return;
    if (call->asked.tv_sec && check())
        atomic_store_explicit(&call->stopped, 1, memory_order_relaxed);
    timespec_get(&call->asked, TIME_UTC);
}

int fb_stop(double work)
{
    fb_calling *const call = calling;
    if (!call)
        return 0;
    if (!is_helper && (call->work += work) >= CLOCK_WORK) {
        int (*const check)(void) = atomic_load_explicit(&interrupt, memory_order_relaxed);
        if (check)
            ask(call, check);
    }
    return atomic_load_explicit(&call->stopped, memory_order_relaxed);
}

fb_status fb_call(fb_operation *operation, const void *arguments)
{
    fb_calling call = {0}, *const outer = calling; /* a check may call in turn */
    static FB_ALIGNED(64) char small[SMALL];
    static atomic_flag in_use = ATOMIC_FLAG_INIT; /* a child forked in the meantime goes without */
    if (!*(const fb_tier *const *)arguments)
        return FB_NO_TIER;
    const fb_fp_mode mode = fb_fp_enter();
    fb_arena arena = {.threads = fb_get_num_threads()};
    const ptrdiff_t bytes = operation(arguments, arena);
    const int is_small = bytes <= SMALL && !atomic_flag_test_and_set_explicit(&in_use, memory_order_acquire);
    arena.memory = is_small ? small : bytes < FB_MOST_BYTES ? fb_alloc(bytes, 1, 1) : NULL;
    if (arena.memory) {
        calling = &call;
        int forks;
        do { /* once more in a child that a signal's handler has forked meanwhile: there the workers' parts are lost */
            forks = fb_forks();
            operation(arguments, arena);
        } while (forks != fb_forks());
        calling = outer;
    }
    if (is_small)
        atomic_flag_clear_explicit(&in_use, memory_order_release);
    else
        fb_free(arena.memory);
    fb_fp_leave(mode);
    return !arena.memory ? FB_NO_MEMORY : atomic_load_explicit(&call.stopped, memory_order_relaxed) ? FB_INTERRUPTED
                                                                                                    : FB_OK;
}
