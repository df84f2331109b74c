/* no_tier.c - what the library answers where FASTBLOCK_ISA names a tier that is missing, and after another was
 * chosen. */
#include "fastblock.h"

#include <stdio.h>

int main(void)
{
    float x[64] = {0}, out[64] = {0};
    double flops = 0;
    fb_panels panels = {.data = x, .n = 1, .k = 1, .finite = 1};
    fb_params params = {.dtype = FB_F32, .w1 = panels, .w2 = panels, .w_q = panels, .w_k = panels};
    printf("%d", fb_isa());
    printf(" %d", fb_panels_keep_rows(FB_F32, &panels));
    printf(" %d", fb_bias_relu(FB_F32, x, x, out, 1, 1));
    printf(" %d", fb_project(FB_F32, x, 1, &panels, NULL, 0, out));
    printf(" %d", fb_feed_forward(&params, x, 1, out));
    printf(" %d", fb_mix_positions(FB_F32, 1, x, 0, x, 0, out, 1, 1));
    printf(" %d", fb_attention_weights(&params, 1, x, 1, 0, NULL, out));
    printf(" %d", fb_block(&params, 1, x, 1, 1, x, 1, 0, NULL, out));
    printf(" %d", fb_fma(FB_F32, x, x, x, out, 1));
    printf(" %d", fb_exp(FB_F32, x, out, 1));
    printf(" %d", fb_fma_chains(FB_F32, 1, 0, &flops));
    printf(" %d", fb_panels_pack(FB_F32, x, 1, 1, 1, &panels));
    for (int i = 0; fb_isa_name(i); i++)
        if (fb_use_isa(i)) {
            printf(" %d %d\n", fb_isa() == i, fb_exp(FB_F32, x, out, 1));
            return 0;
        }
    return 1;
}
