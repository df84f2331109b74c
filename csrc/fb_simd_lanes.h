/* fb_simd_lanes.h - vector operations for which a tier has no instructions of its own, lane by lane.
 *
 * An fb_simd_*.h includes this behind the operations of each dtype, with FB_BITS 32 or 64. What it has defined
 * itself, it names: FB_OWN_SPLATS, FB_OWN_FIRST, FB_OWN_STREAM, FB_OWN_TRANSPOSE, FB_OWN_END.
 */
#include "fb_real_begin.h"

#ifndef FB_OWN_SPLATS
/* v[i] = p[i] in all lanes, i < 4 */
FB_INLINE void V(splats)(const REAL *p, VEC *v)
{
    FB_UNROLL
    for (int i = 0; i < 4; i++)
        v[i] = V(splat)(p + i);
}
#endif

#ifndef FB_OWN_FIRST
/* the first n lanes, 0 <= n <= LANES; the others are +0.0, and no memory is touched for them */
FB_INLINE VEC V(load_first)(const REAL *p, ptrdiff_t n)
{
    REAL lane[LANES] = {0};
    memcpy(lane, p, (size_t)n * sizeof *p);
    return V(load)(lane);
}
FB_INLINE void V(store_first)(REAL *p, VEC v, ptrdiff_t n)
{
    REAL lane[LANES];
    V(store)(lane, v);
    memcpy(p, lane, (size_t)n * sizeof *p);
}
#endif

#ifndef FB_OWN_STREAM
/* store to a multiple of 16 bytes, past the caches where that is possible; stream_end comes after the last one, before
 * another thread may read */
FB_INLINE void V(stream)(REAL *p, VEC v)
{
    V(store)(p, v);
}
FB_INLINE void V(stream_end)(void)
{
}
#endif

#ifndef FB_OWN_TRANSPOSE
/* lane j of v[i] <-> lane i of v[j] */
FB_INLINE void V(transpose)(VEC *v)
{
    REAL rows[LANES][LANES], column[LANES];
    for (int i = 0; i < LANES; i++)
        V(store)(rows[i], v[i]);
    for (int j = 0; j < LANES; j++) {
        for (int i = 0; i < LANES; i++)
            column[i] = rows[i][j];
        v[j] = V(load)(column);
    }
}
#endif

#ifndef FB_OWN_END
/* canonical, and with relu that, of n vectors */
FB_INLINE void V(end)(const int n, VEC *s, int relu)
{
    FB_UNROLL
    for (int i = 0; i < n; i++)
        s[i] = V(canonical)(s[i]);
    if (relu) {
        FB_UNROLL
        for (int i = 0; i < n; i++)
            s[i] = V(relu)(s[i]);
    }
}
#endif

#include "fb_real_end.h"
#undef FB_OWN_SPLATS
#undef FB_OWN_FIRST
#undef FB_OWN_STREAM
#undef FB_OWN_TRANSPOSE
#undef FB_OWN_END
