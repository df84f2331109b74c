/* fb_threads.c - a small pool of threads.
 *
 * The parts of a call are dealt out on demand, to the caller and the workers that have come: a thread whose core is
 * shared with others takes fewer, and nobody waits for a worker that comes late. Which thread takes a part cannot be
 * seen in the result. Workers start at the first call that wants them, spin briefly for the next one, then sleep. A
 * caller that finds the pool busy runs its parts itself, so concurrent callers never oversubscribe the CPU. After
 * fork() the child begins with an empty pool.
 */
#define _GNU_SOURCE /* sched_getaffinity */
#include "fb_internal.h"

#include <errno.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { MOST_PARTS = 8 /* a thread */ };
static const double PART_WORK = 1e6; /* multiply-adds: about 20 us; waking a sleeping worker takes 5 to 50 us */

static _Atomic int num_threads; /* of the process; 0: not yet known */
static _Thread_local int own_threads; /* 0: none */

static int from_environment(const char *name)
{
    const char *text = getenv(name);
    long n = text ? strtol(text, NULL, 10) : 0; /* OMP_NUM_THREADS may be a list: its first number counts */
    return n < 1 ? 0 : n > FB_MAX_THREADS ? FB_MAX_THREADS : (int)n;
}

static ptrdiff_t serial(fb_task *task, const void *job, int parts, fb_arena arena)
{
    ptrdiff_t used = task(job, arena, 0, parts); /* all that counts, where there is no memory */
    for (int part = 1; arena.memory && part < parts && !fb_stop(0); part++)
        task(job, arena, part, parts);
    return used;
}

#if FB_THREADS
#include <pthread.h>
#include <signal.h>
#include <time.h>
#ifdef __linux__
#include <sched.h>
#endif

enum {
    SPINS = 20000,  /* about 50 us: longer than the serial stretches between two calls of a stack of blocks */
    OPEN = 1 << 15, /* bit of pool.call: parts may be left */
    WAIT = 30000000, /* nanoseconds */
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    _Atomic int busy; /* a call owns the pool */
    /* number of the call * 2**32 + its threads * 2**16 + OPEN + workers inside: one word, so that a worker that
     * comes late enters the call that it has seen, or none */
    _Atomic uint64_t call;
    _Atomic int next; /* the first part not yet taken */
    _Atomic int sleepers, caller_sleeps, core; /* the caller's core, if it knew it when it woke the sleepers */
    fb_task *task;
    const void *job;
    char *memory; /* each thread has `each` bytes of it */
    ptrdiff_t each;
    fb_calling *calling;
    int parts, workers;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

/* A worker may wake on the core of the caller and share it for several milliseconds while another one idles. Then it
 * moves, and may be moved again. */
#ifdef __linux__
static int this_core(void)
{
    return sched_getcpu();
}

static void leave_core(int core)
{
    cpu_set_t allowed, others;
    if (core < 0 || sched_getcpu() != core || sched_getaffinity(0, sizeof allowed, &allowed))
        return;
    others = allowed;
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0)
        sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
static int this_core(void)
{
    return -1;
}

static void leave_core(int core)
{
    (void)core;
}
#endif

static void take_parts(int thread)
{
    const fb_arena own = {.memory = pool.memory + thread * pool.each};
    for (int part; !fb_stop(0) && (part = atomic_fetch_add(&pool.next, 1)) < pool.parts;)
        pool.task(pool.job, own, part, pool.parts);
}

static int inside(uint64_t call)
{
    return (int)(call & (OPEN - 1));
}

static int threads_of(uint64_t call)
{
    return (int)(call >> 16 & 0xffff);
}

static void *worker(void *argument)
{
    const int thread = (int)(intptr_t)argument;
    uint64_t seen = 0;
    for (;;) { /* in the floating-point mode of fb_call, which started it */
        uint64_t call = atomic_load(&pool.call);
        for (int spin = 0; call >> 32 == seen && spin < SPINS; spin++) {
            fb_pause();
            call = atomic_load(&pool.call);
        }
        if (call >> 32 == seen) {
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.sleepers, 1);
            while ((call = atomic_load(&pool.call)) >> 32 == seen)
                pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.lock);
            if (thread < threads_of(call))
                leave_core(atomic_load(&pool.core));
        }
        seen = call >> 32;
        int enters = 0;
        while (!enters && call >> 32 == seen && call & OPEN && thread < threads_of(call))
            enters = atomic_compare_exchange_weak(&pool.call, &call, call + 1);
        if (!enters)
            continue; /* not in this call: the fields of the pool may already belong to the next */
        fb_help_with(pool.calling);
        take_parts(thread);
        call = atomic_fetch_sub(&pool.call, 1) - 1;
        if (!(call & OPEN) && !inside(call) && atomic_load(&pool.caller_sleeps)) {
            pthread_mutex_lock(&pool.lock);
            pthread_cond_signal(&pool.done);
            pthread_mutex_unlock(&pool.lock);
        }
    }
    return NULL;
}

static _Atomic int forks; /* between this process and the one that started the first worker */

int fb_forks(void)
{
    return atomic_load_explicit(&forks, memory_order_relaxed);
}

/* In a forked child no worker exists, and a lock may be held by nobody: begin anew. */
static void forget_workers(void)
{
    atomic_fetch_add(&forks, 1);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    atomic_store(&pool.busy, 0);
    atomic_store(&pool.call, 0);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.caller_sleeps, 0);
    pool.workers = 0;
}

/* Start workers up to `wanted`, as many as the system allows; the caller owns the pool. */
static void start_workers(int wanted)
{
    static int at_fork;
    if (!at_fork)
        at_fork = pthread_atfork(NULL, NULL, forget_workers) == 0;
    sigset_t all, old;
    pthread_attr_t detached;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* signals are for the threads of the program */
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    while (at_fork && pool.workers < wanted
           && pthread_create(&thread, &detached, worker, (void *)(intptr_t)(pool.workers + 1)) == 0)
        pool.workers++;
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static void parallel(fb_task *task, const void *job, char *memory, ptrdiff_t each, int threads, int parts)
{
    int owner = threads > 1 && parts > 1 && !atomic_exchange(&pool.busy, 1);
    if (owner && pool.workers < threads - 1)
        start_workers(threads - 1);
    if (owner && pool.workers == 0) { /* the system denied threads */
        atomic_store(&pool.busy, 0);
        owner = 0;
    }
    if (!owner) {
        serial(task, job, parts, (fb_arena){.memory = memory});
        return;
    }
    pool.task = task;
    pool.job = job;
    pool.memory = memory;
    pool.each = each;
    pool.calling = fb_this_call();
    pool.parts = parts;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.call, ((atomic_load(&pool.call) >> 32) + 1) << 32 | (uint64_t)threads << 16 | OPEN);
    if (atomic_load(&pool.sleepers)) {
        atomic_store(&pool.core, this_core());
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    take_parts(0);
    uint64_t call = atomic_fetch_and(&pool.call, ~(uint64_t)OPEN);
    for (int spin = 0; inside(call) && spin < SPINS; spin++) {
        fb_pause();
        call = atomic_load(&pool.call);
    }
    if (inside(call)) {
        pthread_mutex_lock(&pool.lock);
        atomic_store(&pool.caller_sleeps, 1);
        while (inside(atomic_load(&pool.call))) {
            struct timespec soon;
            timespec_get(&soon, TIME_UTC);
            soon.tv_nsec += WAIT;
            soon.tv_sec += soon.tv_nsec / 1000000000;
            soon.tv_nsec %= 1000000000;
            if (pthread_cond_timedwait(&pool.done, &pool.lock, &soon) == ETIMEDOUT) {
                pthread_mutex_unlock(&pool.lock);
                fb_stop(INFINITY); /* the caller asks for all of them */
                pthread_mutex_lock(&pool.lock);
            }
        }
        atomic_store(&pool.caller_sleeps, 0);
        pthread_mutex_unlock(&pool.lock);
    }
    atomic_store(&pool.busy, 0);
}

#else /* no threads on this platform */

int fb_forks(void)
{
    return 0;
}

static void parallel(fb_task *task, const void *job, char *memory, ptrdiff_t each, int threads, int parts)
{
    (void)each;
    (void)threads;
    serial(task, job, parts, (fb_arena){.memory = memory});
}

#endif

int fb_get_num_threads(void)
{
    return own_threads ? own_threads : fb_get_process_threads();
}

void fb_set_own_threads(int n)
{
    own_threads = n < 0 ? 1 : n > FB_MAX_THREADS ? FB_MAX_THREADS : n;
}

int fb_get_process_threads(void)
{
    int n = atomic_load(&num_threads);
    if (!n) {
        n = from_environment("FASTBLOCK_NUM_THREADS");
        n = n ? n : from_environment("OMP_NUM_THREADS");
        n = n ? n : fb_available_cpus();
        atomic_store(&num_threads, n);
    }
    return n;
}

void fb_set_num_threads(int n)
{
    atomic_store(&num_threads, n < 0 ? 1 : n > FB_MAX_THREADS ? FB_MAX_THREADS : n);
}

ptrdiff_t fb_run(fb_task *task, const void *job, int threads, int parts, fb_arena arena)
{
    if (threads == 1)
        return serial(task, job, parts, arena);
    const ptrdiff_t each = task(job, (fb_arena){0}, 0, parts);
    char *memory = fb_take(&arena, fb_bytes(threads, each, 1));
    if (memory)
        parallel(task, job, memory, each, threads, parts);
    return arena.used;
}

int fb_threads(fb_arena arena, double work, ptrdiff_t limit)
{
    if (work < 2 * PART_WORK || limit < 2)
        return 1;
    ptrdiff_t threads = fb_min(arena.threads, limit);
    return work / PART_WORK < (double)threads ? (int)(work / PART_WORK) : (int)threads;
}

int fb_parts(int threads, double work, ptrdiff_t limit)
{
    if (threads == 1)
        return 1;
    const ptrdiff_t each = fb_min(fb_min((ptrdiff_t)(work / PART_WORK), limit) / threads, MOST_PARTS);
    return each < 2 ? threads : threads * (int)each;
}
