/* (h) five integer instructions, no memory: what an engine's inner loop costs at best.
 * The same loop as in pykvm/guest/hello.S. */
#include "guest.h"
u64 workload(u64 mode, u64 n, u64 *ops)
{
    u64 a = n, c = n;
    (void)mode;
    *ops = n;
    if (!n)
        return 0;
    asm volatile("1: add %2,%0\n\trol $13,%0\n\txor %1,%0\n\tdec %1\n\tjnz 1b"
                 : "+r"(a), "+r"(c)
                 : "r"(0x9e3779b97f4a7c15UL)
                 : "cc");
    return a;
}
