/* fb_memory.c - memory, and how an operation gets its scratch: all of it at once, before it writes anything.
 *
 * Scratch is never on the stack, for stacks of threads can be as small as 16 KiB. A small call takes it from one static
 * buffer, in less time than malloc, a call that finds the buffer in use from malloc.
 */
#define _DEFAULT_SOURCE /* posix_memalign, madvise */
#include "fb_kernels.h"

#include <stdatomic.h>
#include <stdlib.h>
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

fb_status fb_call(fb_operation *operation, const void *arguments)
{
    static FB_ALIGNED(64) char small[SMALL];
    static atomic_flag in_use = ATOMIC_FLAG_INIT; /* a child forked in the meantime goes without */
    const fb_fp_mode mode = fb_fp_enter();
    fb_arena arena = {.threads = fb_get_num_threads()};
    const ptrdiff_t bytes = operation(arguments, arena);
    const int is_small = bytes <= SMALL && !atomic_flag_test_and_set_explicit(&in_use, memory_order_acquire);
    arena.memory = is_small ? small : bytes < FB_MOST_BYTES ? fb_alloc(bytes, 1, 1) : NULL;
    if (arena.memory)
        operation(arguments, arena);
    if (is_small)
        atomic_flag_clear_explicit(&in_use, memory_order_release);
    else
        fb_free(arena.memory);
    fb_fp_leave(mode);
    return arena.memory ? FB_OK : FB_NO_MEMORY;
}
