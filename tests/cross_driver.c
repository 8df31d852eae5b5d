/* Runs one tile kernel on arrays from stdin, for a test under emulation. stdin: 14 int64 (kernel, inputs,
   out_stride, add, blocks, then the bytes of weights, scales, bias, codes, highs, masks, x_scales, x_sums, out),
   then the nine arrays. stdout: `out` afterwards. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void kernel(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t, int64_t, int64_t);
#define KERNEL(name) extern kernel name;
#include "kernels.h"
#undef KERNEL
#define KERNEL(name) name,
static kernel *const kernels[] = {
#include "kernels.h"
};

int main(void) {
    int64_t head[14], at[9];
    if (fread(head, 8, 14, stdin) != 14) return 1;
    for (int i = 0; i < 9; i++) {
        size_t bytes = (size_t)head[5 + i];
        void *array = aligned_alloc(64, (bytes + 127) / 64 * 64);
        if (!array || fread(array, 1, bytes, stdin) != bytes) return 2;
        at[i] = bytes ? (int64_t)array : 0;
    }
    kernels[head[0]](at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], head[1], at[8], head[2], head[3], head[4], 1);
    return fwrite((void *)at[8], 1, (size_t)head[13], stdout) != (size_t)head[13];
}
