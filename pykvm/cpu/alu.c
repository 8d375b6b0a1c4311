/* SPDX-License-Identifier: MIT */
/*
 * Integer arithmetic, logic, shifts, bits, multiplication and division.
 *
 * Flags that the SDM leaves undefined are those of AMD's Zen 5, measured: MUL leaves SF, ZF,
 * AF and PF alone, shifts set AF, and so on.  Each such place says so.
 */
#include <sys/random.h>

#include "body.h"

/* ---- flags of the families ------------------------------------------------------------------- */

static ALWAYS_INLINE void flags_bitwise(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    (void)a, (void)b;
    flags_logic(cpu, bits, r);
}

/* INC and DEC keep CF.  of, af: values with OF in the top bit and AF in bit 3. */
static ALWAYS_INLINE void flags_keep_cf(struct cpu *cpu, unsigned bits, u64 r, u64 of, u64 af)
{
    u64 old = cpu->cc_aux;
    cpu->cc_res = SEXT(bits, r);
    cpu->cc_aux = (old & 1ull << 63) | ((of << (64 - bits) ^ old) >> 1 & 1ull << 62) | (af & 8);
}
static ALWAYS_INLINE void flags_inc(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    (void)b;
    flags_keep_cf(cpu, bits, r, ~a & r, a & ~r);
}
static ALWAYS_INLINE void flags_dec(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    (void)b;
    flags_keep_cf(cpu, bits, r, a & ~r, ~a & r);
}
static ALWAYS_INLINE void flags_neg(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    (void)b;
    flags_set(cpu, bits, r, a | r);
}
static ALWAYS_INLINE void flags_none(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    (void)cpu, (void)bits, (void)a, (void)b, (void)r;
}

INSN_BINARY(add, r = a + b, flags_add)
INSN_BINARY(or, r = a | b, flags_bitwise)
INSN_BINARY(adc, r = a + b + get_cf(cpu), flags_add)
INSN_BINARY(sbb, r = a - b - get_cf(cpu), flags_sub)
INSN_BINARY(and, r = a & b, flags_bitwise)
INSN_BINARY(sub, r = a - b, flags_sub)
INSN_BINARY(xor, r = a ^ b, flags_bitwise)
INSN_COMPARE(cmp, r = a - b, flags_sub)
INSN_COMPARE(test, r = a & b, flags_bitwise)
INSN_UNARY(inc, r = a + 1, flags_inc)
INSN_UNARY(dec, r = a - 1, flags_dec)
INSN_UNARY(neg, r = 0 - a, flags_neg)
INSN_UNARY(not, r = ~a, flags_none)

/* ---- shifts and rotates ------------------------------------------------------------------------ */

/* Each operation is a result and its flags.  n is the count as masked to 5 or 6 bits; the flags
 * are left alone when it is 0.  OF for counts other than 1 and AF are undefined: as measured. */

#define MSB(bits, v) ((v) >> ((bits) - 1) & 1)
#define MSB2(bits, v) ((v) >> ((bits) - 2) & 1)

static ALWAYS_INLINE void flags_shift(struct cpu *cpu, unsigned bits, u64 r, u64 cf, u64 of)
{
    cpu->cc_res = SEXT(bits, r);
    cpu->cc_aux = cf << 63 | (cf ^ of) << 62 | 8;
}

static ALWAYS_INLINE u64 shl_result(struct cpu *cpu, unsigned bits, u64 a, unsigned n)
{
    (void)cpu, (void)bits;
    return a << n;
}
static ALWAYS_INLINE void shl_flags(struct cpu *cpu, unsigned bits, u64 a, unsigned n, u64 r)
{
    /* cf ^ of is the top bit of r, and CF has been shifted out to just above it */
    cpu->cc_res = SEXT(bits, r);
    if (bits == 64)
        cpu->cc_aux = (a >> (64 - n)) << 63 | (r >> 1 & 1ull << 62) | 8;
    else
        cpu->cc_aux = r << (63 - bits) | 8;
}

static ALWAYS_INLINE u64 shr_result(struct cpu *cpu, unsigned bits, u64 a, unsigned n)
{
    (void)cpu, (void)bits;
    return a >> n;
}
static ALWAYS_INLINE void shr_flags(struct cpu *cpu, unsigned bits, u64 a, unsigned n, u64 r)
{
    flags_shift(cpu, bits, r, a >> (n - 1) & 1, MSB2(bits, r));
}

static ALWAYS_INLINE u64 sar_result(struct cpu *cpu, unsigned bits, u64 a, unsigned n)
{
    (void)cpu;
    return (u64)((s64)SEXT(bits, a) >> n);
}
static ALWAYS_INLINE void sar_flags(struct cpu *cpu, unsigned bits, u64 a, unsigned n, u64 r)
{
    flags_shift(cpu, bits, r, (u64)((s64)SEXT(bits, a) >> (n - 1)) & 1, 0);
}

static ALWAYS_INLINE u64 rol_result(struct cpu *cpu, unsigned bits, u64 a, unsigned n)
{
    (void)cpu;
    return a << (n & (bits - 1)) | a >> (-n & (bits - 1));
}
static ALWAYS_INLINE void rol_flags(struct cpu *cpu, unsigned bits, u64 a, unsigned n, u64 r)
{
    (void)a, (void)n;
    set_cf_of(cpu, r & 1, MSB(bits, r) ^ (r & 1));
}

static ALWAYS_INLINE u64 ror_result(struct cpu *cpu, unsigned bits, u64 a, unsigned n)
{
    (void)cpu;
    return a >> (n & (bits - 1)) | a << (-n & (bits - 1));
}
static ALWAYS_INLINE void ror_flags(struct cpu *cpu, unsigned bits, u64 a, unsigned n, u64 r)
{
    (void)a, (void)n;
    set_cf_of(cpu, MSB(bits, r), MSB(bits, r) ^ MSB2(bits, r));
}

/* Through carry: a rotation of bits + 1 positions, so 8- and 16-bit counts wrap at 9 and 17. */
static ALWAYS_INLINE u64 rcl_result(struct cpu *cpu, unsigned bits, u64 a, unsigned n)
{
    u64 cf = get_cf(cpu);
    n %= bits + 1;
    return n == 0 ? a : a << n | cf << (n - 1) | (n == 1 ? 0 : a >> (bits + 1 - n));
}
static ALWAYS_INLINE void rcl_flags(struct cpu *cpu, unsigned bits, u64 a, unsigned n, u64 r)
{
    n %= bits + 1;
    u64 cf = n == 0 ? get_cf(cpu) : a >> (bits - n) & 1;
    set_cf_of(cpu, cf, MSB(bits, r) ^ cf);
}

static ALWAYS_INLINE u64 rcr_result(struct cpu *cpu, unsigned bits, u64 a, unsigned n)
{
    u64 cf = get_cf(cpu);
    n %= bits + 1;
    return n == 0 ? a : a >> n | cf << (bits - n) | (n == 1 ? 0 : a << (bits + 1 - n));
}
static ALWAYS_INLINE void rcr_flags(struct cpu *cpu, unsigned bits, u64 a, unsigned n, u64 r)
{
    n %= bits + 1;
    u64 cf = n == 0 ? get_cf(cpu) : a >> (n - 1) & 1;
    set_cf_of(cpu, cf, MSB(bits, r) ^ MSB2(bits, r));
}

/* A 32-bit destination register is written, and so zero-extended, even by count 0. */
#define SHIFT_BITS(bits, op)                                                                       \
    HANDLER(op##_ri##bits)                                                                         \
    {                                                                                              \
        const unsigned n = i->imm & (bits == 64 ? 63 : 31);                                        \
        const u64 a = REG##bits(cpu, i->dst), r = op##_result(cpu, bits, a, n);                    \
        PUT##bits(cpu, i->dst, r);                                                                 \
        if (likely(n))                                                                             \
            op##_flags(cpu, bits, a, n, r);                                                        \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    HANDLER(op##_rr##bits)                                                                         \
    {                                                                                              \
        const unsigned n = GPR(cpu, RCX) & (bits == 64 ? 63 : 31);                                 \
        const u64 a = REG##bits(cpu, i->dst), r = op##_result(cpu, bits, a, n);                    \
        PUT##bits(cpu, i->dst, r);                                                                 \
        if (likely(n))                                                                             \
            op##_flags(cpu, bits, a, n, r);                                                        \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_mi##bits, {                                                                   \
        const unsigned n = i->imm & (bits == 64 ? 63 : 31);                                        \
        RMW(bits, r = op##_result(cpu, bits, a, n))                                                \
        if (likely(n))                                                                             \
            op##_flags(cpu, bits, a, n, r);                                                        \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    MEM_HANDLER(op##_mr##bits, {                                                                   \
        const unsigned n = GPR(cpu, RCX) & (bits == 64 ? 63 : 31);                                 \
        RMW(bits, r = op##_result(cpu, bits, a, n))                                                \
        if (likely(n))                                                                             \
            op##_flags(cpu, bits, a, n, r);                                                        \
        NEXT(cpu, i);                                                                              \
    })
#define INSN_SHIFT(op)                                                                             \
    FOR_SIZES(SHIFT_BITS, op)                                                                      \
    const struct body b_##op = {{[K_RR] = BY_SIZE(op##_rr),                                        \
                                 [K_RI] = BY_SIZE(op##_ri),                                        \
                                 [K_MR] = BY_SIZE(op##_mr),                                        \
                                 [K_MI] = BY_SIZE(op##_mi)}};

INSN_SHIFT(rol)
INSN_SHIFT(ror)
INSN_SHIFT(rcl)
INSN_SHIFT(rcr)
INSN_SHIFT(shl)
INSN_SHIFT(shr)
INSN_SHIFT(sar)

/* Double shifts.  16-bit ones with a count above 16 are undefined: as measured, src follows itself
 * and CF is clear. */
static ALWAYS_INLINE u64 shld_result(unsigned bits, u64 a, u64 b, unsigned n)
{
    if (bits == 64)
        return n ? a << n | b >> (64 - n) : a;
    if (bits == 32)
        return (a << 32 | b) << n >> 32;
    return (a << 32 | b << 16 | b) << n >> 32;
}
static ALWAYS_INLINE void shld_flags(struct cpu *cpu, unsigned bits, u64 a, u64 b, unsigned n,
                                     u64 r)
{
    (void)b;
    u64 cf = n <= bits ? a >> (bits - n) & 1 : 0;
    flags_shift(cpu, bits, r, cf, n >= bits ? cf : MSB(bits, r) ^ cf);
}
static ALWAYS_INLINE u64 shrd_result(unsigned bits, u64 a, u64 b, unsigned n)
{
    if (bits == 64)
        return n ? a >> n | b << (64 - n) : a;
    if (bits == 32)
        return (b << 32 | a) >> n;
    return (b << 32 | b << 16 | a) >> n;
}
static ALWAYS_INLINE void shrd_flags(struct cpu *cpu, unsigned bits, u64 a, u64 b, unsigned n,
                                     u64 r)
{
    u64 cf = n <= bits ? a >> (n - 1) & 1 : 0;
    (void)b;
    flags_shift(cpu, bits, r, cf, MSB(bits, r) ^ MSB2(bits, r));
}

#define DOUBLE_SHIFT_KIND(bits, op, suffix, count)                                                 \
    HANDLER(op##_r##suffix##bits)                                                                  \
    {                                                                                              \
        const unsigned n = (count) & (bits == 64 ? 63 : 31);                                       \
        const u64 a = REG##bits(cpu, i->dst), b = REG##bits(cpu, i->src);                          \
        const u64 r = op##_result(bits, a, b, n);                                                  \
        PUT##bits(cpu, i->dst, r);                                                                 \
        if (likely(n))                                                                             \
            op##_flags(cpu, bits, a, b, n, r);                                                     \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_m##suffix##bits, {                                                            \
        const unsigned n = (count) & (bits == 64 ? 63 : 31);                                       \
        const u64 b = REG##bits(cpu, i->src);                                                      \
        RMW(bits, r = op##_result(bits, a, b, n))                                                  \
        if (likely(n))                                                                             \
            op##_flags(cpu, bits, a, b, n, r);                                                     \
        NEXT(cpu, i);                                                                              \
    })
#define DOUBLE_SHIFT_BITS(bits, op)                                                                \
    DOUBLE_SHIFT_KIND(bits, op, i, i->imm)                                                         \
    DOUBLE_SHIFT_KIND(bits, op, r, GPR(cpu, RCX))
#define INSN_DOUBLE_SHIFT(op)                                                                      \
    FOR_16_UP(DOUBLE_SHIFT_BITS, op)                                                               \
    const struct body b_##op = {{[K_RI] = FROM_16(op##_ri), [K_MI] = FROM_16(op##_mi)}};           \
    const struct body b_##op##_cl = {{[K_RR] = FROM_16(op##_rr), [K_MR] = FROM_16(op##_mr)}};

INSN_DOUBLE_SHIFT(shld)
INSN_DOUBLE_SHIFT(shrd)

/* ---- multiplication and division ------------------------------------------------------------------ */

/* CF = OF = "the upper half is needed"; SF, ZF, AF, PF are undefined: kept, as measured. */
static ALWAYS_INLINE void flags_mul(struct cpu *cpu, bool overflow)
{
    set_cf_of(cpu, overflow, overflow);
}

static ALWAYS_INLINE u64 signed_product(unsigned bits, u64 a, u64 b)
{
    return SEXT(bits, a) * SEXT(bits, b);
}
static ALWAYS_INLINE void flags_imul2(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    s64 t;
    flags_mul(cpu, bits == 64 ? __builtin_mul_overflow((s64)a, (s64)b, &t) : SEXT(bits, r) != r);
}
#define flags_imul3(cpu, bits, a, b, r) flags_imul2(cpu, bits, i->imm, b, r)

INSN_TO_REG(imul2, r = signed_product(BITS, a, b), flags_imul2)
INSN_TO_REG(imul3, r = signed_product(BITS, b, i->imm), flags_imul3)

/* rDX:rAX, or AX */
static ALWAYS_INLINE u64 wide_low(struct cpu *cpu, unsigned bits)
{
    return bits == 8 ? GPR(cpu, RAX) & 0xff : reg_read(cpu, RAX * 8, bits / 8);
}
static ALWAYS_INLINE u64 wide_high(struct cpu *cpu, unsigned bits)
{
    return bits == 8 ? GPR(cpu, RAX) >> 8 & 0xff : reg_read(cpu, RDX * 8, bits / 8);
}
static ALWAYS_INLINE void put_wide(struct cpu *cpu, unsigned bits, u64 low, u64 high)
{
    if (bits == 8) {
        PUT16(cpu, RAX * 8, (u8)low | high << 8);
        return;
    }
    reg_write(cpu, RAX * 8, bits / 8, low);
    reg_write(cpu, RDX * 8, bits / 8, high);
}

static ALWAYS_INLINE void do_mul(struct cpu *cpu, unsigned bits, u64 b)
{
    u128 r = (u128)wide_low(cpu, bits) * b;
    u64 high = bits == 64 ? (u64)(r >> 64) : (u64)r >> bits;
    put_wide(cpu, bits, (u64)r, high);
    flags_mul(cpu, high != 0);
}
static ALWAYS_INLINE void do_imul(struct cpu *cpu, unsigned bits, u64 b)
{
    __int128 r = (__int128)(s64)SEXT(bits, wide_low(cpu, bits)) * (s64)SEXT(bits, b);
    put_wide(cpu, bits, (u64)r, bits == 64 ? (u64)(r >> 64) : (u64)r >> bits);
    flags_mul(cpu, r != (s64)SEXT(bits, (u64)r));
}

/* All status flags are undefined after a division: CF and OF kept, AF set, the rest clear, as
 * measured. */
static ALWAYS_INLINE void flags_div(struct cpu *cpu)
{
    cpu->cc_res = 0x100;
    cpu->cc_aux = (cpu->cc_aux & CC_CARRIES) | 8 | 0x100;
}
/* false: #DE, by 0 or quotient too large. */
static ALWAYS_INLINE bool do_div(struct cpu *cpu, unsigned bits, u64 b)
{
    u64 low = wide_low(cpu, bits), high = wide_high(cpu, bits);
    if (high >= b)
        return false;
    if (bits == 64 && high) {
        u128 a = (u128)high << 64 | low;
        put_wide(cpu, bits, (u64)(a / b), (u64)(a % b));
    } else {
        u64 a = bits == 64 ? low : high << (bits & 63) | low;
        put_wide(cpu, bits, a / b, a % b);
    }
    flags_div(cpu);
    return true;
}
/* Division of magnitudes: the one overflow left is a quotient beyond the signed range. */
static ALWAYS_INLINE bool do_idiv(struct cpu *cpu, unsigned bits, u64 b)
{
    u128 a = bits == 64 ? (u128)wide_high(cpu, bits) << 64 | wide_low(cpu, bits)
                        : (u128)(s64)SEXT(2 * bits & 127, wide_high(cpu, bits) << (bits & 63) |
                                                              wide_low(cpu, bits));
    bool neg_a = (__int128)a < 0, neg_b = (s64)SEXT(bits, b) < 0;
    u64 divisor = neg_b ? 0 - SEXT(bits, b) : b;
    if (neg_a)
        a = 0 - a;
    u64 high = (u64)(a >> 64);
    if (high >= divisor)
        return false;
    u128 q = high ? a / divisor : (u64)a / divisor;
    u64 rem = high ? (u64)(a % divisor) : (u64)a % divisor;
    if (q > ((u128)1 << (bits - 1)) - !(neg_a ^ neg_b))
        return false;
    put_wide(cpu, bits, neg_a ^ neg_b ? 0 - (u64)q : (u64)q, neg_a ? 0 - rem : rem);
    flags_div(cpu);
    return true;
}

static SLOW int divide_error(struct cpu *cpu, const struct insn *i) { return fault_de(cpu, i); }

#define MUL_BITS(bits, op)                                                                         \
    HANDLER(op##_r##bits)                                                                          \
    {                                                                                              \
        do_##op(cpu, bits, REG##bits(cpu, i->dst));                                                \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_m##bits, {                                                                    \
        LOAD(bits, b)                                                                              \
        do_##op(cpu, bits, b);                                                                     \
        NEXT(cpu, i);                                                                              \
    })
#define DIV_BITS(bits, op)                                                                         \
    HANDLER(op##_r##bits)                                                                          \
    {                                                                                              \
        if (unlikely(!do_##op(cpu, bits, REG##bits(cpu, i->dst))))                                 \
            return divide_error(cpu, i);                                                           \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_m##bits, {                                                                    \
        LOAD(bits, b)                                                                              \
        if (unlikely(!do_##op(cpu, bits, b)))                                                      \
            return divide_error(cpu, i);                                                           \
        NEXT(cpu, i);                                                                              \
    })
#define E_ROWS(op)                                                                                 \
    {                                                                                              \
        {                                                                                          \
            [K_R] = BY_SIZE(op##_r), [K_M] = BY_SIZE(op##_m)                                       \
        }                                                                                          \
    }

FOR_SIZES(MUL_BITS, mul)
FOR_SIZES(MUL_BITS, imul)
FOR_SIZES(DIV_BITS, div)
FOR_SIZES(DIV_BITS, idiv)
const struct body b_mul = E_ROWS(mul);
const struct body b_imul = E_ROWS(imul);
const struct body b_div = E_ROWS(div);
const struct body b_idiv = E_ROWS(idiv);

/* ---- sign extension of the accumulator, byte order ----------------------------------------------- */

HANDLER(cbw_r16)
{
    REG16(cpu, RAX * 8) = (u16)(s8)GPR(cpu, RAX);
    NEXT(cpu, i);
}
HANDLER(cbw_r32)
{
    GPR(cpu, RAX) = (u32)(s16)GPR(cpu, RAX);
    NEXT(cpu, i);
}
HANDLER(cbw_r64)
{
    GPR(cpu, RAX) = (u64)(s32)GPR(cpu, RAX);
    NEXT(cpu, i);
}
const struct body b_cbw = {{[K_R] = FROM_16(cbw_r)}};

HANDLER(cwd_r16)
{
    REG16(cpu, RDX * 8) = (u16)((s16)GPR(cpu, RAX) >> 15);
    NEXT(cpu, i);
}
HANDLER(cwd_r32)
{
    GPR(cpu, RDX) = (u32)((s32)GPR(cpu, RAX) >> 31);
    NEXT(cpu, i);
}
HANDLER(cwd_r64)
{
    GPR(cpu, RDX) = (u64)((s64)GPR(cpu, RAX) >> 63);
    NEXT(cpu, i);
}
const struct body b_cwd = {{[K_R] = FROM_16(cwd_r)}};

/* BSWAP of 16 bits is undefined and gives 0. */
HANDLER(bswap_r16)
{
    REG16(cpu, i->dst) = 0;
    NEXT(cpu, i);
}
HANDLER(bswap_r32)
{
    REG64(cpu, i->dst) = __builtin_bswap32(REG32(cpu, i->dst));
    NEXT(cpu, i);
}
HANDLER(bswap_r64)
{
    REG64(cpu, i->dst) = __builtin_bswap64(REG64(cpu, i->dst));
    NEXT(cpu, i);
}
const struct body b_bswap = {{[K_R] = FROM_16(bswap_r)}};

/* ---- bits -------------------------------------------------------------------------------------------- */

#define BIT_OF(bits, b) (1ull << ((b) & ((bits) - 1)))
#define BT_RESULT_bt(a, bit) (a)
#define BT_RESULT_bts(a, bit) ((a) | (bit))
#define BT_RESULT_btr(a, bit) ((a) & ~(bit))
#define BT_RESULT_btc(a, bit) ((a) ^ (bit))

/* With a register as bit offset the memory operand is a bit string that extends to both sides:
 * the operand of that number of bits that holds the bit. */
static ALWAYS_INLINE struct insn bit_string_insn(const struct insn *i, unsigned bits, u64 offset)
{
    struct insn t = *i;
    t.disp += ((s64)SEXT(bits, offset) >> __builtin_ctz(bits)) * (s64)(bits / 8);
    return t;
}

#define BT_BITS(bits, op, write)                                                                   \
    static ALWAYS_INLINE int op##_reg##bits(struct cpu *cpu, const struct insn *i, u64 b)          \
    {                                                                                              \
        const u64 bit = BIT_OF(bits, b), a = REG##bits(cpu, i->dst);                               \
        if (write)                                                                                 \
            PUT##bits(cpu, i->dst, BT_RESULT_##op(a, bit));                                        \
        set_cf(cpu, a & bit);                                                                      \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    HANDLER(op##_rr##bits) { return op##_reg##bits(cpu, i, REG##bits(cpu, i->src)); }              \
    HANDLER(op##_ri##bits) { return op##_reg##bits(cpu, i, i->imm); }
#define BT_READ_BITS(bits, op)                                                                     \
    BT_BITS(bits, op, false)                                                                       \
    MEM_HANDLER(op##_mi##bits, {                                                                   \
        LOAD(bits, a)                                                                              \
        set_cf(cpu, a & BIT_OF(bits, i->imm));                                                     \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    static int op##_mr##bits(struct cpu *cpu, const struct insn *i)                                \
    {                                                                                              \
        const u64 b = REG##bits(cpu, i->src);                                                      \
        const struct insn t = bit_string_insn(i, bits, b);                                         \
        u64 a;                                                                                     \
        if (!load##bits(cpu, &t, false, &a))                                                       \
            return stop(cpu, i);                                                                   \
        set_cf(cpu, a & BIT_OF(bits, b));                                                          \
        NEXT(cpu, i);                                                                              \
    }
#define BT_WRITE_BITS(bits, op)                                                                    \
    BT_BITS(bits, op, true)                                                                        \
    MEM_HANDLER(op##_mi##bits, {                                                                   \
        const u64 bit = BIT_OF(bits, i->imm);                                                      \
        RMW(bits, r = BT_RESULT_##op(a, bit))                                                      \
        set_cf(cpu, a & bit);                                                                      \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    static int op##_string##bits(struct cpu *cpu, const struct insn *i, u64 bit, u64 *old)         \
    {                                                                                              \
        const bool fast = false;                                                                   \
        const insn_fn miss = stop;                                                                 \
        RMW(bits, r = BT_RESULT_##op(a, bit))                                                      \
        *old = a;                                                                                  \
        return LINK0;                                                                              \
    }                                                                                              \
    static int op##_mr##bits(struct cpu *cpu, const struct insn *i)                                \
    {                                                                                              \
        const u64 b = REG##bits(cpu, i->src), bit = BIT_OF(bits, b);                               \
        const struct insn t = bit_string_insn(i, bits, b);                                         \
        u64 a;                                                                                     \
        if (op##_string##bits(cpu, &t, bit, &a) == STOP)                                           \
            return stop(cpu, i);                                                                   \
        set_cf(cpu, a & bit);                                                                      \
        NEXT(cpu, i);                                                                              \
    }
#define BT_ROWS(op)                                                                                \
    {                                                                                              \
        {                                                                                          \
            [K_RR] = FROM_16(op##_rr), [K_RI] = FROM_16(op##_ri), [K_MR] = FROM_16(op##_mr),       \
            [K_MI] = FROM_16(op##_mi),                                                             \
        }                                                                                          \
    }
FOR_16_UP(BT_READ_BITS, bt)
FOR_16_UP(BT_WRITE_BITS, bts)
FOR_16_UP(BT_WRITE_BITS, btr)
FOR_16_UP(BT_WRITE_BITS, btc)
const struct body b_bt = BT_ROWS(bt);
const struct body b_bts = BT_ROWS(bts);
const struct body b_btr = BT_ROWS(btr);
const struct body b_btc = BT_ROWS(btc);

/* BSF and BSR of 0 set ZF and leave the destination, all 64 bits of it, as AMD documents and
 * Intel does.  The other status flags are undefined: clear but PF, which is that of the index, as
 * measured. */
#define SCAN_COMMIT(bits, index)                                                                   \
    const u64 r = b ? (u64)(index) : 0;                                                            \
    cpu->cc_res = b ? 0x100 : 0;                                                                   \
    cpu->cc_aux = r << 8;                                                                          \
    if (likely(b))                                                                                 \
        PUT##bits(cpu, i->dst, r);                                                                 \
    NEXT(cpu, i);
#define SCAN_BITS(bits, op, index)                                                                 \
    HANDLER(op##_rr##bits)                                                                         \
    {                                                                                              \
        const u64 b = REG##bits(cpu, i->src);                                                      \
        SCAN_COMMIT(bits, index)                                                                   \
    }                                                                                              \
    MEM_HANDLER(op##_rm##bits, {LOAD(bits, b) SCAN_COMMIT(bits, index)})
FOR_16_UP(SCAN_BITS, bsf, __builtin_ctzll(b))
FOR_16_UP(SCAN_BITS, bsr, 63 - __builtin_clzll(b))
const struct body b_bsf = {{[K_RR] = FROM_16(bsf_rr), [K_RM] = FROM_16(bsf_rm)}};
const struct body b_bsr = {{[K_RR] = FROM_16(bsr_rr), [K_RM] = FROM_16(bsr_rm)}};

/* ZF by the result; PF, SF, AF clear. */
static ALWAYS_INLINE void flags_popcnt(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    (void)bits, (void)a, (void)b;
    cpu->cc_res = r << 8;
    cpu->cc_aux = 0x100;
}
/* CF: the source was 0.  OF is undefined: kept, as measured. */
static ALWAYS_INLINE void flags_count(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    (void)bits, (void)a;
    u64 cf = b == 0, of = get_of(cpu);
    cpu->cc_res = r << 8;
    cpu->cc_aux = cf << 63 | (cf ^ of) << 62 | 0x100;
}
INSN_TO_REG(popcnt, r = (u64)__builtin_popcountll(b), flags_popcnt)
INSN_TO_REG(lzcnt, r = b ? (u64)__builtin_clzll(b) - (64 - BITS) : (u64)BITS, flags_count)
INSN_TO_REG(tzcnt, r = b ? (u64)__builtin_ctzll(b) : (u64)BITS, flags_count)

/* ---- BMI1, BMI2, ADX ---------------------------------------------------------------------------------- */

static ALWAYS_INLINE void flags_cf(struct cpu *cpu, unsigned bits, u64 r, u64 cf)
{
    cpu->cc_res = SEXT(bits, r);
    cpu->cc_aux = cf ? CC_CARRIES : 0;
}
#define flags_bls(cpu, bits, a, b, r) flags_cf(cpu, bits, r, (b) == 0)
#define flags_blsi(cpu, bits, a, b, r) flags_cf(cpu, bits, r, (b) != 0)
#define flags_bzhi(cpu, bits, a, b, r) flags_cf(cpu, bits, r, (u8)v >= (bits))

/* AF, SF and PF are undefined: 1, 0, and by the result, as measured. */
static ALWAYS_INLINE void flags_bextr(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    (void)a, (void)b;
    cpu->cc_res = SEXT(bits, r);
    cpu->cc_aux = 8 | cpu->cc_res >> 63 << 16;
}

static ALWAYS_INLINE u64 bextr(u64 v, unsigned start, unsigned len)
{
    v = start < 64 ? v >> start : 0;
    return len < 64 ? v & ((1ull << len) - 1) : v;
}
static ALWAYS_INLINE u64 bzhi(u64 v, unsigned n) { return n < 64 ? v & ((1ull << n) - 1) : v; }
static u64 pdep(u64 v, u64 mask)
{
    u64 r = 0;
    for (; mask; mask &= mask - 1, v >>= 1)
        r |= v & 1 ? mask & -mask : 0;
    return r;
}
static u64 pext(u64 v, u64 mask)
{
    u64 r = 0;
    for (unsigned n = 0; mask; mask &= mask - 1, n++)
        r |= (u64) !!(v & mask & -mask) << n;
    return r;
}

#define INSN_VEX(op, expr, flags)                                                                  \
    TO_REG_BITS(32, op, expr, flags)                                                               \
    TO_REG_BITS(64, op, expr, flags)                                                               \
    const struct body b_##op = {{[K_RR] = {NULL, NULL, op##_rr32, op##_rr64},                      \
                                 [K_RM] = {NULL, NULL, op##_rm32, op##_rm64}}};
#define COUNT (v & (BITS - 1))

INSN_VEX(andn, r = ~v & b, flags_bitwise)
INSN_VEX(bextr, r = bextr(b, (u8)v, (u8)(v >> 8)), flags_bextr)
INSN_VEX(bzhi, r = bzhi(b, (u8)v), flags_bzhi)
INSN_VEX(pdep, r = pdep(v, b), flags_none)
INSN_VEX(pext, r = pext(v, b), flags_none)
INSN_VEX(shlx, r = b << COUNT, flags_none)
INSN_VEX(shrx, r = b >> COUNT, flags_none)
INSN_VEX(sarx, r = (u64)((s64)SEXT(BITS, b) >> COUNT), flags_none)
INSN_VEX(rorx, r = ror_result(cpu, BITS, b, i->imm &(BITS - 1)), flags_none)
INSN_VEX(blsr, r = b & (b - 1), flags_bls)
INSN_VEX(blsmsk, r = b ^ (b - 1), flags_bls)
INSN_VEX(blsi, r = b & (0 - b), flags_blsi)

/* The high half is written last: it wins when both destinations are the same register. */
#define MULX_BITS(bits)                                                                            \
    static ALWAYS_INLINE int mulx##bits(struct cpu *cpu, const struct insn *i, u64 b)              \
    {                                                                                              \
        u128 r = (u128)(u##bits)GPR(cpu, RDX) * b;                                                 \
        GPR(cpu, i->vvvv) = (u##bits)r;                                                            \
        REG64(cpu, i->dst) = (u##bits)(r >> bits);                                                 \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    HANDLER(mulx_rr##bits) { return mulx##bits(cpu, i, REG##bits(cpu, i->src)); }                  \
    MEM_HANDLER(mulx_rm##bits, {                                                                   \
        LOAD(bits, b)                                                                              \
        return mulx##bits(cpu, i, b);                                                              \
    })
MULX_BITS(32)
MULX_BITS(64)
const struct body b_mulx = {
    {[K_RR] = {NULL, NULL, mulx_rr32, mulx_rr64}, [K_RM] = {NULL, NULL, mulx_rm32, mulx_rm64}}};

/* Carry out of a + b + carry in, by the carries of every bit. */
#define CARRY_OUT(bits, a, b, r) MSB(bits, ((a) & (b)) | (((a) | (b)) & ~(r)))
static ALWAYS_INLINE void flags_adcx(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    set_cf(cpu, CARRY_OUT(bits, a, b, r));
}
static ALWAYS_INLINE void flags_adox(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    set_cf_of(cpu, get_cf(cpu), CARRY_OUT(bits, a, b, r));
}
INSN_VEX(adcx, r = a + b + get_cf(cpu), flags_adcx)
INSN_VEX(adox, r = a + b + get_of(cpu), flags_adox)

/* ---- CRC32, random numbers ------------------------------------------------------------------------------ */

/* CRC-32C (Castagnoli), reflected, four bits at a time. */
static const u32 crc32c_nibble[16] = {
    0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3, 0x61c69362, 0x7198540d,
    0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9, 0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
};
static u64 crc32c(u64 crc, u64 data, unsigned bytes)
{
    u64 v = (u32)crc;
    for (unsigned n = 0; n < bytes; n++, data >>= 8) {
        v ^= data & 0xff;
        v = v >> 4 ^ crc32c_nibble[v & 15];
        v = v >> 4 ^ crc32c_nibble[v & 15];
    }
    return v;
}
#define CRC32_BITS(bits)                                                                           \
    HANDLER(crc32_rr##bits)                                                                        \
    {                                                                                              \
        const u64 b = REG##bits(cpu, i->src);                                                      \
        REG64(cpu, i->dst) = crc32c(REG64(cpu, i->dst), b, bits / 8);                              \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(crc32_rm##bits, {                                                                  \
        LOAD(bits, b)                                                                              \
        REG64(cpu, i->dst) = crc32c(REG64(cpu, i->dst), b, bits / 8);                              \
        NEXT(cpu, i);                                                                              \
    })
CRC32_BITS(8)
CRC32_BITS(16)
CRC32_BITS(32)
CRC32_BITS(64)
const struct body b_crc32 = {{[K_RR] = BY_SIZE(crc32_rr), [K_RM] = BY_SIZE(crc32_rm)}};

/* CF: a number was there; without, the destination is 0. */
int x_rdrand(struct cpu *cpu, const struct insn *i)
{
    u64 v = 0;
    bool ok = getrandom(&v, sizeof(v), GRND_NONBLOCK) == sizeof(v);
    reg_write(cpu, i->dst, i->opsize, ok ? v : 0);
    set_status(cpu, ok ? X86_EFLAGS_CF : 0);
    NEXT(cpu, i);
}
int x_rdseed(struct cpu *cpu, const struct insn *i) { return x_rdrand(cpu, i); }

/* ---- decimal adjustments --------------------------------------------------------------------------------- */

/* SF, ZF and PF by the result.  What is undefined is as measured: DAA and DAS set OF as one addition
 * or subtraction would; AAA and AAS set all flags by AX before AL is cut to a digit; AAD sets CF, AF
 * and OF by its addition. */
static void flags_adjust(struct cpu *cpu, unsigned bits, u64 r, bool cf, bool af, u64 of)
{
    cpu->cc_res = SEXT(bits, r);
    of = of >> (bits - 1) & 1;
    cpu->cc_aux = (u64)cf << 63 | (cf ^ of) << 62 | (u64)af << 3;
}

static int decimal_adjust(struct cpu *cpu, const struct insn *i, int sign)
{
    u8 al = REG8(cpu, 0), old = al;
    bool cf = get_cf(cpu), af = get_af(cpu);
    if ((old & 15) > 9 || af) {
        af = true;
        al = (u8)(al + sign * 6);
        cf = cf || (sign > 0 ? old > 0xff - 6 : old < 6);
    }
    if (old > 0x99 || get_cf(cpu)) {
        al = (u8)(al + sign * 0x60);
        cf = true;
    }
    REG8(cpu, 0) = al;
    flags_adjust(cpu, 8, al, cf, af, sign > 0 ? ~old & al : old & ~al);
    NEXT(cpu, i);
}
int x_daa(struct cpu *cpu, const struct insn *i) { return decimal_adjust(cpu, i, 1); }
int x_das(struct cpu *cpu, const struct insn *i) { return decimal_adjust(cpu, i, -1); }

static int ascii_adjust(struct cpu *cpu, const struct insn *i, int sign)
{
    u16 old = REG16(cpu, 0), ax = old;
    bool adjust = (old & 15) > 9 || get_af(cpu);
    if (adjust)
        ax = (u16)(ax + sign * 0x106);
    REG16(cpu, 0) = ax & 0xff0f;
    flags_adjust(cpu, 16, ax, adjust, adjust, sign > 0 ? ~old & ax : old & ~ax);
    NEXT(cpu, i);
}
int x_aaa(struct cpu *cpu, const struct insn *i) { return ascii_adjust(cpu, i, 1); }
int x_aas(struct cpu *cpu, const struct insn *i) { return ascii_adjust(cpu, i, -1); }

int x_aam(struct cpu *cpu, const struct insn *i)
{
    u8 base = (u8)i->imm, al = REG8(cpu, 0);
    if (base == 0)
        return fault_de(cpu, i);
    REG16(cpu, 0) = (u16)(al / base << 8 | al % base);
    flags_logic(cpu, 8, al % base);
    NEXT(cpu, i);
}
int x_aad(struct cpu *cpu, const struct insn *i)
{
    u64 a = REG8(cpu, 0), b = (u8)(REG8(cpu, 1) * (u8)i->imm);
    REG16(cpu, 0) = (u8)(a + b);
    flags_add(cpu, 8, a, b, a + b);
    NEXT(cpu, i);
}

int x_salc(struct cpu *cpu, const struct insn *i)
{
    REG8(cpu, 0) = get_cf(cpu) ? 0xff : 0;
    NEXT(cpu, i);
}
