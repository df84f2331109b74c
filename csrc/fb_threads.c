/* fb_threads.c - a small pool of threads.
 *
 * Static partition: part p of a call runs on worker p - 1, part 0 on the caller. Workers start at the first call that
 * wants them, spin briefly for the next one, then sleep. A caller that finds the pool busy runs its parts itself, so
 * concurrent callers never oversubscribe the CPU. After fork() the child begins with an empty pool.
 */
#define _GNU_SOURCE /* sched_getaffinity */
#include "fb_kernels.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_THREADS = 256 };
static const double PART_WORK = 1e6; /* multiply-adds: about 20 us; waking a sleeping worker takes 5 to 50 us */

static _Atomic int num_threads; /* 0: not yet known */

static int from_environment(const char *name)
{
    const char *text = getenv(name);
    long n = text ? strtol(text, NULL, 10) : 0; /* OMP_NUM_THREADS may be a list: its first number counts */
    return n < 1 ? 0 : n > MAX_THREADS ? MAX_THREADS : (int)n;
}

#if FB_THREADS
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif

/* CPUs that this process may use: its affinity, cut to its cgroup's quota (version 2, then version 1). */
static int available_cpus(void)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        cpus = CPU_COUNT(&set);
    double quota = 0, period = 0;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r");
    if (f) {
        if (fscanf(f, "%lf %lf", &quota, &period) != 2)
            quota = 0; /* "max" */
        fclose(f);
    } else if ((f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r"))) {
        if (fscanf(f, "%lf", &quota) != 1)
            quota = 0;
        fclose(f);
        if ((f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r"))) {
            if (fscanf(f, "%lf", &period) != 1)
                period = 0;
            fclose(f);
        }
    }
    if (quota > 0 && period > 0) {
        long whole = (long)((quota + period - 1) / period);
        cpus = whole < cpus ? whole : cpus;
    }
#endif
    return cpus < 1 ? 1 : cpus > MAX_THREADS ? MAX_THREADS : (int)cpus;
}

static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    _Atomic int busy;       /* a call owns the pool */
    _Atomic uint64_t round; /* number of the call * 2**16 + its parts: one word, so that a late worker sees both */
    _Atomic int pending;    /* parts not yet done by workers */
    _Atomic int sleepers, caller_sleeps;
    fb_task *task;
    void *context;
    int workers;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

enum { SPINS = 20000 }; /* about 50 us: longer than the serial stretches between two calls of a stack of blocks */

static void *worker(void *argument)
{
    const int part = (int)(intptr_t)argument;
    uint64_t seen = 0;
    fb_fp_enter();
    for (;;) {
        uint64_t round = atomic_load(&pool.round);
        for (int spin = 0; round == seen && spin < SPINS; spin++) {
            fb_pause();
            round = atomic_load(&pool.round);
        }
        if (round == seen) {
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.sleepers, 1);
            while ((round = atomic_load(&pool.round)) == seen)
                pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        seen = round;
        const int parts = (int)(round & 0xffff);
        if (part >= parts)
            continue; /* not in this call: the fields below may already belong to the next */
        pool.task(pool.context, part, parts);
        if (atomic_fetch_sub(&pool.pending, 1) == 1 && atomic_load(&pool.caller_sleeps)) {
            pthread_mutex_lock(&pool.lock);
            pthread_cond_signal(&pool.done);
            pthread_mutex_unlock(&pool.lock);
        }
    }
    return NULL;
}

/* In a forked child no worker exists, and a lock may be held by nobody: begin anew. */
static void forget_workers(void)
{
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    atomic_store(&pool.busy, 0);
    atomic_store(&pool.round, 0);
    atomic_store(&pool.pending, 0);
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

void fb_parallel(fb_task *task, void *context, int parts)
{
    int helped = 1; /* parts 1 .. helped - 1 run on workers */
    if (parts > 1 && !atomic_exchange(&pool.busy, 1)) {
        if (pool.workers < parts - 1)
            start_workers(parts - 1);
        helped = (int)fb_min(parts, pool.workers + 1);
        if (helped > 1 && helped < parts)
            helped = 1; /* the system denied threads: workers go by the number of parts, so do without them */
        if (helped > 1) {
            pool.task = task;
            pool.context = context;
            atomic_store(&pool.pending, helped - 1);
            atomic_store(&pool.round, ((atomic_load(&pool.round) >> 16) + 1) << 16 | (uint64_t)parts);
            if (atomic_load(&pool.sleepers)) {
                pthread_mutex_lock(&pool.lock);
                pthread_cond_broadcast(&pool.wake);
                pthread_mutex_unlock(&pool.lock);
            }
        } else {
            atomic_store(&pool.busy, 0);
        }
    }
    task(context, 0, parts);
    if (helped == 1) {
        for (int part = 1; part < parts; part++)
            task(context, part, parts);
        return;
    }
    for (int spin = 0; atomic_load(&pool.pending) && spin < SPINS; spin++)
        fb_pause();
    if (atomic_load(&pool.pending)) {
        pthread_mutex_lock(&pool.lock);
        atomic_store(&pool.caller_sleeps, 1);
        while (atomic_load(&pool.pending))
            pthread_cond_wait(&pool.done, &pool.lock);
        atomic_store(&pool.caller_sleeps, 0);
        pthread_mutex_unlock(&pool.lock);
    }
    atomic_store(&pool.busy, 0);
}

#else /* no threads on this platform */

static int available_cpus(void)
{
    return 1;
}

void fb_parallel(fb_task *task, void *context, int parts)
{
    for (int part = 0; part < parts; part++)
        task(context, part, parts);
}

#endif

int fb_get_num_threads(void)
{
    int n = atomic_load(&num_threads);
    if (!n) {
        n = from_environment("FASTBLOCK_NUM_THREADS");
        n = n ? n : from_environment("OMP_NUM_THREADS");
        n = n ? n : available_cpus();
        atomic_store(&num_threads, n);
    }
    return n;
}

void fb_set_num_threads(int n)
{
    atomic_store(&num_threads, n < 0 ? 1 : n > MAX_THREADS ? MAX_THREADS : n);
}

int fb_parts(double work, ptrdiff_t limit)
{
    if (work < 2 * PART_WORK || limit < 2)
        return 1;
    ptrdiff_t parts = fb_min(fb_get_num_threads(), limit);
    return work / PART_WORK < (double)parts ? (int)(work / PART_WORK) : (int)parts;
}
