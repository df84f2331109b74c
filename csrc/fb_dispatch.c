/* fb_dispatch.c - which tier this CPU runs. The only file that knows more than one tier. */
#include "fb_internal.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define FB_TIER_ROW(tier) {#tier, fb_kernels_##tier},
static const struct {
    const char *name;
    const fb_tier *const *kernels;
} tiers[] = {FB_TIERS(FB_TIER_ROW)};
#undef FB_TIER_ROW
enum { TIERS = sizeof tiers / sizeof *tiers };

static _Atomic int in_use = -1; /* -1: not chosen yet */

static int cpu_has(const char *tier)
{
#if FB_X86 && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init(); /* asks the operating system, too, whether it saves the wide registers */
    if (strcmp(tier, "avx512") == 0)
        return __builtin_cpu_supports("avx512f");
    if (strcmp(tier, "avx2") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    (void)tier;
    return 1; /* neon and portable need nothing that the target does not promise */
}

const char *fb_isa_name(int i)
{
    return i >= 0 && i < TIERS ? tiers[i].name : NULL;
}

int fb_isa_compiled(int i)
{
    return i >= 0 && i < TIERS && tiers[i].kernels[0] != NULL;
}

int fb_isa_usable(int i)
{
    return fb_isa_compiled(i) && cpu_has(tiers[i].name);
}

int fb_isa(void)
{
    int i = atomic_load_explicit(&in_use, memory_order_relaxed);
    if (i < 0) { /* two threads that come here at once choose the same */
        const char *name = getenv("FASTBLOCK_ISA");
        for (i = 0; i < TIERS && (!fb_isa_usable(i) || (name && *name && strcmp(name, tiers[i].name))); i++)
            ;
        if (i == TIERS)
            return -1;
        atomic_store_explicit(&in_use, i, memory_order_relaxed);
    }
    return i;
}

int fb_use_isa(int i)
{
    if (!fb_isa_usable(i))
        return 0;
    atomic_store_explicit(&in_use, i, memory_order_relaxed);
    return 1;
}

const fb_tier *fb_tier_in_use(fb_dtype dtype)
{
    const int i = fb_isa();
    return i < 0 ? NULL : tiers[i].kernels[dtype];
}

fb_status fb_fma(fb_dtype dtype, const void *a, const void *b, const void *c, void *out, ptrdiff_t n)
{
    const fb_fp_mode mode = fb_fp_enter();
    const fb_tier *tier = fb_tier_in_use(dtype);
    if (tier)
        tier->fma(a, b, c, out, n);
    fb_fp_leave(mode);
    return tier ? FB_OK : FB_NO_TIER;
}

fb_status fb_exp(fb_dtype dtype, const void *x, void *out, ptrdiff_t n)
{
    const fb_fp_mode mode = fb_fp_enter();
    const fb_tier *tier = fb_tier_in_use(dtype);
    if (tier)
        tier->exp(x, out, n);
    fb_fp_leave(mode);
    return tier ? FB_OK : FB_NO_TIER;
}

fb_status fb_fma_chains(fb_dtype dtype, ptrdiff_t rounds, int loop, double *flops)
{
    const fb_fp_mode mode = fb_fp_enter();
    const fb_tier *tier = fb_tier_in_use(dtype);
    if (tier)
        tier->fma_chains(rounds, loop, flops);
    fb_fp_leave(mode);
    return tier ? FB_OK : FB_NO_TIER;
}
