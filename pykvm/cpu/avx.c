/* SPDX-License-Identifier: MIT */
/*
 * Vector instructions that exist in VEX encoding only: broadcasts, permutations, variable
 * shifts, halves of YMM registers, masked moves, gathers, VZEROUPPER and VZEROALL.
 */
#include "vector.h"

/* clang-format off */

#define SOURCE VREG(cpu, i->vb)
#define DEST VREG(cpu, i->vd)

/* ---- broadcasts ------------------------------------------------------------------------------ */

#define BROADCAST_256(name, size) V_VEX256_UNARY(name, #name, size)
#define BROADCAST(name, size)                                                                      \
    V_VEX128_UNARY(name, #name, size)                                                              \
    BROADCAST_256(name, size)                                                                      \
    V_VEX(name)
BROADCAST(vbroadcastss, 4)
BROADCAST(vpbroadcastb, 1) BROADCAST(vpbroadcastw, 2) BROADCAST(vpbroadcastd, 4)
BROADCAST(vpbroadcastq, 8)
BROADCAST_256(vbroadcastsd, 8) V_VEX_256(vbroadcastsd)
BROADCAST_256(vbroadcastf128, 16)
const struct body b_vbroadcastf128 = {{[K_RM] = {NULL, NULL, vbroadcastf128_y_rm}}};

/* ---- permutations and blends ----------------------------------------------------------------- */

V_VEX_BINARY(vpermilps) V_VEX_BINARY(vpermilpd)
V_VEX256_BINARY(vpermd, "vpermd", 32) V_VEX_256(vpermd)
V_VEX256_BINARY(vpermps, "vpermps", 32) V_VEX_256(vpermps)

#define PERMUTE_IMM_128(name, text)                                                                \
    DEFINE_STUBS(name##_v, 256, text " $.Limm, %xmm1, %xmm0")                                      \
    V_VEX128_UNARY_IMM(name, "movups", 16)
#define PERMUTE_IMM_256(name, text)                                                                \
    DEFINE_STUBS(name##_y, 256, text " $.Limm, %ymm1, %ymm0")                                      \
    V_VEX256_UNARY_IMM(name)
PERMUTE_IMM_128(vpermilps_imm, "vpermilps") PERMUTE_IMM_256(vpermilps_imm, "vpermilps")
V_VEX(vpermilps_imm)
PERMUTE_IMM_128(vpermilpd_imm, "vpermilpd") PERMUTE_IMM_256(vpermilpd_imm, "vpermilpd")
V_VEX(vpermilpd_imm)
PERMUTE_IMM_256(vpermq, "vpermq") V_VEX_256(vpermq)
PERMUTE_IMM_256(vpermpd, "vpermpd") V_VEX_256(vpermpd)

V_VEX_BINARY_IMM(vpblendd)

#define HALVES_IMM(name)                                                                           \
    DEFINE_STUBS(name##_y, 256, #name " $.Limm, %ymm1, %ymm0, %ymm0")                              \
    V_VEX256_BINARY_IMM(name)                                                                      \
    V_VEX_256(name)
HALVES_IMM(vperm2f128) HALVES_IMM(vperm2i128)

/* ---- variable shifts ------------------------------------------------------------------------- */

V_VEX_BINARY(vpsllvd) V_VEX_BINARY(vpsllvq) V_VEX_BINARY(vpsrlvd) V_VEX_BINARY(vpsrlvq)
V_VEX_BINARY(vpsravd)

/* ---- halves ---------------------------------------------------------------------------------- */

V_PAIR(vinsertf128_y, 16, 1, {
    if (i->imm8 & 1)
        V_ASM_DAB("vmovaps %[a], %%ymm0\n\tvinsertf128 $1, %[b], %%ymm0, %%ymm0\n\t"
                  "vmovaps %%ymm0, %[d]\n\tvzeroupper", p);
    else
        V_ASM_DAB("vmovaps %[a], %%ymm0\n\tvinsertf128 $0, %[b], %%ymm0, %%ymm0\n\t"
                  "vmovaps %%ymm0, %[d]\n\tvzeroupper", p);
})
V_VEX_256(vinsertf128)

static const void *half(struct cpu *cpu, const struct insn *i)
{
    return (const u8 *)SOURCE + (i->imm8 & 1) * 16;
}
HANDLER(vextractf128_rr)
{
    V_ASM_DB("vmovaps %[b], %%xmm0\n\tvmovaps %%ymm0, %[d]", half(cpu, i));
    NEXT(cpu, i);
}
HANDLER(vextractf128_mr)
{
    const void *s = half(cpu, i);
    void *p;
    if (unlikely(!v_target(cpu, i, 16, 1, &p)))
        return v_store_slow(cpu, i, s, 16, 1);
    __asm__ volatile("vmovaps %[b], %%xmm0\n\tvmovups %%xmm0, %[d]"
                     : : [d] "m"(VEC(p)), [b] "m"(VEC(s)) : V_CLOBBERS);
    NEXT(cpu, i);
}
const struct body b_vextractf128 = {{
    [K_RR] = {NULL, NULL, vextractf128_rr}, [K_MR] = {NULL, NULL, vextractf128_mr},
}};

/* ---- masked moves -------------------------------------------------------------------------------
 *
 * An element whose mask bit is clear is not there: it cannot fault.  When everything is in one
 * page that is at hand the host does it, else it is done by elements.
 */
static unsigned vector_size(const struct insn *i) { return i->flags & I_VEXL ? 32 : 16; }

static bool is_masked_in(const u8 *mask, unsigned k, unsigned size)
{
    return mask[(k + 1) * size - 1] & 0x80;
}

/* The memory operand displaced by so many bytes; the offset, once there, does not wrap at the
 * address size. */
static struct insn element(struct cpu *cpu, const struct insn *i, unsigned from)
{
    struct insn e = *i;

    e.disp = (s64)(ea_offset(cpu, i) + from);
    e.base = e.index = GPR_ZERO;
    e.ea = i->ea == EA_64_32 ? EA_64 : i->ea;
    e.asize = 4;
    return e;
}

static SLOW int masked_load_slow(struct cpu *cpu, const struct insn *i, unsigned size)
{
    const u8 *mask = VREG(cpu, i->va);
    struct vec result = {{0}};

    for (unsigned k = 0; k < vector_size(i) / size; k++) {
        struct insn e = element(cpu, i, k * size);
        if (is_masked_in(mask, k, size) && !v_read(cpu, &e, result.b + k * size, size, 1))
            return stop(cpu, i);
    }
    VEC(DEST) = result;
    NEXT(cpu, i);
}

static bool masked_store_check(struct cpu *cpu, const struct insn *i, unsigned size)
{
    const u8 *mask = VREG(cpu, i->va);
    u64 la;

    for (unsigned k = 0; k < vector_size(i) / size; k++) {
        struct insn e = element(cpu, i, k * size);
        if (is_masked_in(mask, k, size) && !(ea_linear(cpu, &e, size, ACC_WRITE, &la) &&
                                             mem_probe_write(cpu, la, size, ea_access(i))))
            return false;
    }
    return true;
}

/* As a step, where every element is checked before the first is written. */
static SLOW int masked_store_slow(struct cpu *cpu, const struct insn *i, unsigned size)
{
    const u8 *mask = VREG(cpu, i->va), *s = SOURCE;

    if (!cpu->step) {
        cpu->stop = STOP_STEP;
        return stop(cpu, i);
    }
    if (!masked_store_check(cpu, i, size))
        return stop(cpu, i);
    for (unsigned k = 0; k < vector_size(i) / size; k++) {
        struct insn e = element(cpu, i, k * size);
        if (is_masked_in(mask, k, size) && !v_write(cpu, &e, s + k * size, size, 1))
            return stop(cpu, i);
    }
    NEXT(cpu, i);
}

#define MASKED_HANDLERS(name, text, size, enc, bytes, reg, zeroupper)                              \
    static int name##_##enc##_rm(struct cpu *cpu, const struct insn *i)                            \
    {                                                                                              \
        const void *p;                                                                             \
        if (unlikely(!v_source(cpu, i, bytes, 1, &p)))                                             \
            return masked_load_slow(cpu, i, size);                                                 \
        V_ASM_DAB("vmovaps %[a], " reg "1\n\t" text " %[b], " reg "1, " reg "0\n\t"                \
                  "vmovaps %%ymm0, %[d]" zeroupper, p);                                            \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    static int name##_##enc##_mr(struct cpu *cpu, const struct insn *i)                            \
    {                                                                                              \
        void *p;                                                                                   \
        if (unlikely(!v_target(cpu, i, bytes, 1, &p)))                                             \
            return masked_store_slow(cpu, i, size);                                                \
        __asm__ volatile("vmovaps %[a], " reg "1\n\tvmovaps %[b], " reg "0\n\t"                    \
                         text " " reg "0, " reg "1, %[d]" zeroupper                                \
                         :                                                                         \
                         : [d] "m"(VEC(p)), [a] "m"(VEC(VREG(cpu, i->va))), [b] "m"(VEC(SOURCE))   \
                         : V_CLOBBERS);                                                            \
        NEXT(cpu, i);                                                                              \
    }
/* vpmaskmov is the same with another name */
#define MASKED(name, size)                                                                         \
    MASKED_HANDLERS(name, #name, size, v, 16, "%%xmm", "")                                         \
    MASKED_HANDLERS(name, #name, size, y, 32, "%%ymm", "\n\tvzeroupper")                           \
    const struct body b_##name = {{                                                                \
        [K_RM] = {NULL, name##_v_rm, name##_y_rm}, [K_MR] = {NULL, name##_v_mr, name##_y_mr},      \
    }};
MASKED(vmaskmovps, 4) MASKED(vmaskmovpd, 8)

/* ---- gathers ------------------------------------------------------------------------------------
 *
 * Element by element.  When one faults, those before it are done and their mask is cleared, so
 * that the instruction goes on there (SDM vol. 2, VGATHERDPS); an exit starts it again.
 */
static ALWAYS_INLINE bool gather_element(struct cpu *cpu, const struct insn *i, s64 index, void *p,
                                         unsigned size)
{
    struct insn e = *i;
    u64 la;

    e.index = GPR_ZERO;
    e.scale = 0;
    e.disp += (s64)((u64)index << i->scale);
    if (!ea_linear(cpu, &e, size, ACC_READ, &la))
        return false;
    return size == 4 ? ld32(cpu, la, p, ea_access(i)) : ld64(cpu, la, p, ea_access(i));
}

static ALWAYS_INLINE int gather(struct cpu *cpu, const struct insn *i, unsigned size,
                                unsigned index_size)
{
    const u8 *index = VREG(cpu, i->index * VREG_SIZE);
    unsigned n = vector_size(i) / (size > index_size ? size : index_size);
    struct vec mask = VEC(VREG(cpu, i->va)), result = VEC(DEST);
    bool done = true;

    for (unsigned k = 0; k < n && done; k++) {
        s64 x = index_size == 4 ? (s64)((const s32 *)index)[k] : ((const s64 *)index)[k];
        if (is_masked_in(mask.b, k, size))
            done = gather_element(cpu, i, x, result.b + k * size, size);
        if (done)
            memset(mask.b + k * size, 0, size);
    }
    if (!done && cpu->stop != STOP_EXCEPTION)
        return stop(cpu, i);
    if (done) {
        memset(&mask, 0, sizeof(mask));
        memset(result.b + n * size, 0, VREG_SIZE - n * size);
    }
    VEC(VREG(cpu, i->va)) = mask;
    VEC(DEST) = result;
    if (!done)
        return stop(cpu, i);
    NEXT(cpu, i);
}

#define GATHER(name, size, index_size)                                                             \
    HANDLER(name) { return gather(cpu, i, size, index_size); }                                     \
    const struct body b_##name = {{[K_RM] = {NULL, name, name}}};
/* vgatherdps and so on are the same */
GATHER(vpgatherdd, 4, 4) GATHER(vpgatherdq, 8, 4) GATHER(vpgatherqd, 4, 8) GATHER(vpgatherqq, 8, 8)

/* ---- VZEROUPPER, VZEROALL -------------------------------------------------------------------- */

static unsigned nr_registers(const struct cpu *cpu) { return is_code64(cpu) ? 16 : 8; }

HANDLER(vzeroupper)
{
    for (unsigned n = 0; n < nr_registers(cpu); n++)
        memset(GUEST(cpu).fpu.ymm[n] + 16, 0, 16);
    NEXT(cpu, i);
}
HANDLER(vzeroall)
{
    memset(GUEST(cpu).fpu.ymm, 0, nr_registers(cpu) * VREG_SIZE);
    NEXT(cpu, i);
}
const struct body b_vzeroupper = {{[K_R] = {NULL, vzeroupper, vzeroall}}};
