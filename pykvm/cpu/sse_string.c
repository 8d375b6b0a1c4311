/* SPDX-License-Identifier: MIT */
/*
 * SSE4.2 string comparison: PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM.  The memory operand
 * need not be aligned, in either encoding.
 */
#include "vector.h"

/* clang-format off */

DEFINE_STUBS(pcmpistri, 256, "pcmpistri $.Limm, %xmm1, %xmm0")
DEFINE_STUBS(pcmpistrm, 256, "pcmpistrm $.Limm, %xmm1, %xmm0")
DEFINE_STUBS(pcmpestri, 256, "pcmpestri $.Limm, %xmm1, %xmm0")
DEFINE_STUBS(pcmpestrm, 256, "pcmpestrm $.Limm, %xmm1, %xmm0")

/* Lengths in (r|e)ax and (r|e)dx saturate at the number of elements: 64-bit ones here already. */
static ALWAYS_INLINE u64 length(const struct insn *i, u64 v)
{
    s64 n = (s64)v;
    if (i->opsize != 8)
        return (u32)v;
    return (u32)(n > 16 ? 16 : n < -16 ? -16 : n);
}

struct string_flags {
    bool c, z, s, o;
};

static ALWAYS_INLINE void set_flags(struct cpu *cpu, struct string_flags f)
{
    set_status(cpu, (u64)f.c | (u64)f.z << 6 | (u64)f.s << 7 | (u64)f.o << 11);
}

/* index: ECX; the mask is left in xmm0 */
static ALWAYS_INLINE struct string_flags compare(struct cpu *cpu, const struct insn *i,
                                                 const void *p, const u8 *stubs, u64 *index)
{
    struct string_flags f;
    __asm__ volatile("movups %[b], %%xmm1\n\tmovaps %[d], %%xmm0\n\t"
                     "lea -128(%%rsp), %%rsp\n\tcall *%[f]\n\tlea 128(%%rsp), %%rsp"
                     : "=@ccc"(f.c), "=@ccz"(f.z), "=@ccs"(f.s), "=@cco"(f.o), "=&c"(*index)
                     : [d] "m"(VEC(VREG(cpu, i->vd))), [b] "m"(VEC(p)),
                       [f] "r"(stubs + (size_t)i->imm8 * 8), "a"(length(i, GPR(cpu, RAX))),
                       "d"(length(i, GPR(cpu, RDX)))
                     : V_CLOBBERS);
    return f;
}

#define STRING_INDEX(name)                                                                         \
    V_PAIR(name##_l, 16, 1, {                                                                      \
        u64 index;                                                                                 \
        struct string_flags f = compare(cpu, i, p, stubs_##name, &index);                          \
        GPR(cpu, RCX) = (u32)index;                                                                \
        set_flags(cpu, f);                                                                         \
    })                                                                                             \
    const struct body b_##name = V_ROWS(name##_l, name##_l, none);
STRING_INDEX(pcmpistri) STRING_INDEX(pcmpestri)

/* The mask goes to XMM0; VEX clears its upper half. */
#define STRING_MASK(name, enc, store)                                                              \
    V_PAIR(name##_##enc, 16, 1, {                                                                  \
        struct string_flags f;                                                                     \
        __asm__ volatile("movups %[b], %%xmm1\n\tmovaps %[d], %%xmm0\n\t"                          \
                         "lea -128(%%rsp), %%rsp\n\tcall *%[f]\n\tlea 128(%%rsp), %%rsp\n\t" store \
                         : "=@ccc"(f.c), "=@ccz"(f.z), "=@ccs"(f.s), "=@cco"(f.o)                  \
                         : [d] "m"(VEC(VREG(cpu, i->vd))), [b] "m"(VEC(p)),                        \
                           [m] "m"(VEC(VREG(cpu, 0))), [f] "r"(STUB(name, i->imm8)),               \
                           "a"(length(i, GPR(cpu, RAX))), "d"(length(i, GPR(cpu, RDX)))            \
                         : V_CLOBBERS);                                                            \
        set_flags(cpu, f);                                                                         \
    })
#define STRING_MASKS(name)                                                                         \
    STRING_MASK(name, l, "movaps %%xmm0, %[m]")                                                    \
    STRING_MASK(name, v, "vmovdqa %%xmm0, %%xmm0\n\tvmovaps %%ymm0, %[m]")                         \
    V_128(name)
STRING_MASKS(pcmpistrm) STRING_MASKS(pcmpestrm)
