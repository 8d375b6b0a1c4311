/* SPDX-License-Identifier: MIT */
/*
 * Bytes to struct insn: prefixes, opcode maps, ModRM and SIB, immediates, and the choice of
 * the handler that was compiled for the operation, operand kind and operand size.
 *
 * Source: SDM vol. 2 chapter 2 and appendix A.
 */
#include <stdio.h>

#include "vector.h"

#define INSN_MAX 15
#define NO_SEG 0xff

struct decoder {
    const u8 *bytes;
    unsigned n, pos;
    int error; /* 0, or what decode_insn() returns */
    const struct cpu *cpu;
    u32 mode;
    bool code64;
    u8 rex; /* the prefix, or what VEX says in its bits */
    u8 rep; /* 0xf3, 0xf2 or 0 */
    u8 seg; /* override, or NO_SEG */
    bool osz, asz, lock, vex, vex_l;
    u8 vvvv; /* register number */
    bool has_modrm;
    u8 modrm, opcode;
};

/* ---- fetching -------------------------------------------------------------------------------- */

enum { INVALID = 0, NEED_MORE = -1, TOO_LONG = -2, VALID = 1 };

static bool available(struct decoder *d, unsigned size)
{
    if (d->pos + size <= d->n && d->pos + size <= INSN_MAX)
        return true;
    /* Bytes past the 15th are not looked at, so that they need not be there. */
    if (!d->error)
        d->error = d->pos + size > INSN_MAX && d->n >= INSN_MAX ? TOO_LONG : NEED_MORE;
    return false;
}

static u64 fetch(struct decoder *d, unsigned size)
{
    u64 v = 0;
    if (!available(d, size)) {
        d->pos = d->n < INSN_MAX ? d->n : INSN_MAX;
        return 0;
    }
    memcpy(&v, d->bytes + d->pos, size);
    d->pos += size;
    return v;
}

static u64 fetch_signed(struct decoder *d, unsigned size)
{
    u64 v = fetch(d, size);
    return SEXT(size * 8, v);
}

static bool peek_register_form(struct decoder *d)
{
    return available(d, 1) && d->bytes[d->pos] >= 0xc0;
}

static void need_modrm(struct decoder *d)
{
    if (!d->has_modrm)
        d->modrm = (u8)fetch(d, 1);
    d->has_modrm = true;
}

#define MODRM_MOD(d) ((d)->modrm >> 6)
#define MODRM_REG(d) ((d)->modrm >> 3 & 7)
#define MODRM_RM(d) ((d)->modrm & 7)
#define REX_W(d) ((d)->rex & 8)
#define REX_R(d) ((d)->rex << 1 & 8)
#define REX_X(d) ((d)->rex << 2 & 8)
#define REX_B(d) ((d)->rex << 3 & 8)

/* ---- prefixes ---------------------------------------------------------------------------------- */

/* Reads prefixes; the opcode byte that follows them. */
static u8 read_prefixes(struct decoder *d)
{
    for (;;) {
        u8 b = (u8)fetch(d, 1);
        if (d->error)
            return 0;
        if (d->code64 && (b & 0xf0) == 0x40) {
            d->rex = b;
            continue;
        }
        switch (b) {
        case 0x26:
        case 0x2e:
        case 0x36:
        case 0x3e:
            if (!d->code64) /* there they are ignored, even after FS or GS */
                d->seg = b >> 3 & 3;
            break;
        case 0x64: d->seg = CPU_SEG_FS; break;
        case 0x65: d->seg = CPU_SEG_GS; break;
        case 0x66: d->osz = true; break;
        case 0x67: d->asz = true; break;
        case 0xf0: d->lock = true; break;
        case 0xf2:
        case 0xf3: d->rep = b; break;
        default: return b;
        }
        d->rex = 0; /* counts only directly before the opcode */
    }
}

/* The two or three bytes behind C5 or C4; the opcode map, or NULL when the encoding is invalid. */
static const struct op *read_vex(struct decoder *d, u8 escape)
{
    u8 b1 = (u8)fetch(d, 1), b2 = b1;
    unsigned map = MAP_0F;
    u8 inverted = (u8)~b1;

    if (d->rex || d->osz || d->rep || d->lock)
        return NULL;
    d->rex = inverted >> 5 & 4; /* R */
    if (escape == 0xc4) {
        b2 = (u8)fetch(d, 1);
        map = b1 & 0x1f;
        d->rex |= (inverted >> 5 & 3) | (b2 >> 4 & 8);
    }
    if (d->error || map < MAP_0F || map > MAP_0F3A)
        return NULL;
    d->vvvv = ~b2 >> 3 & 15;
    d->vex_l = b2 >> 2 & 1;
    d->osz = (b2 & 3) == 1;
    d->rep = (b2 & 3) == 2 ? 0xf3 : (b2 & 3) == 3 ? 0xf2 : 0;
    d->vex = true;
    if (!d->code64) /* 8 registers; W may choose a row, but not their size */
        d->rex &= 8;
    return opcode_map[map];
}

/* ---- forms ------------------------------------------------------------------------------------- */

/* What a form has: bit set of these, and the kinds of its specialised handlers. */
#define W_MODRM 0x01
#define W_REG_FIRST 0x02 /* reg is the destination of a specialised handler */
#define W_MEM_ONLY 0x04
#define W_REG_ONLY 0x08
#define W_IMM 0x10   /* operand size, at most 32 bits, sign-extended */
#define W_IMM8 0x20  /* sign-extended */
#define W_H 0x40     /* vector register in VEX.vvvv */
#define W_STORE 0x80 /* vector register in reg is the source */

static const struct form_info {
    u8 what, kind_reg, kind_mem;
} forms[F_MAX] = {
    [F_NONE] = {0, K_R, 0},
    [F_E_G] = {W_MODRM, K_RR, K_MR},
    [F_G_E] = {W_MODRM | W_REG_FIRST, K_RR, K_RM},
    [F_A_I] = {W_IMM, K_RI, 0},
    [F_E_I] = {W_MODRM | W_IMM, K_RI, K_MI},
    [F_E_I8] = {W_MODRM | W_IMM8, K_RI, K_MI},
    [F_G_E_I] = {W_MODRM | W_REG_FIRST | W_IMM, K_RR, K_RM},
    [F_G_E_I8] = {W_MODRM | W_REG_FIRST | W_IMM8, K_RR, K_RM},
    [F_E] = {W_MODRM, K_R, K_M},
    [F_E_1] = {W_MODRM, K_RI, K_MI},
    [F_E_CL] = {W_MODRM, K_RR, K_MR},
    [F_E_G_I8] = {W_MODRM | W_IMM8, K_RI, K_MI},
    [F_E_G_CL] = {W_MODRM, K_RR, K_MR},
    [F_Z] = {0, K_R, 0},
    [F_Z_I] = {0, K_RI, 0},
    [F_A_Z] = {0, K_RR, 0},
    [F_I] = {W_IMM, K_RI, 0},
    [F_I8] = {W_IMM8, K_RI, 0},
    [F_I16] = {0, K_RI, 0},
    [F_I16_I8] = {0, K_RI, 0},
    [F_J8] = {W_IMM8, K_RI, 0},
    [F_JV] = {W_IMM, K_RI, 0},
    [F_M] = {W_MODRM | W_MEM_ONLY, 0, K_M},
    [F_G_M] = {W_MODRM | W_MEM_ONLY | W_REG_FIRST, 0, K_RM},
    [F_R] = {W_MODRM | W_REG_ONLY, K_R, 0},
    [F_A_O] = {0, 0, K_RM},
    [F_O_A] = {0, 0, K_MR},
    [F_A_I8PORT] = {0, K_RI, 0},
    [F_A_DX] = {0, K_RR, 0},
    [F_FAR] = {0, K_RI, 0},
    [F_E_S] = {W_MODRM, K_RR, K_MR},
    [F_S_E] = {W_MODRM, K_RR, K_RM},
    [F_C] = {0, K_RR, 0},
    [F_STR] = {0, K_R, 0},
    [F_XLAT] = {0, 0, K_M},
    [F_MODRM] = {W_MODRM, K_R, K_M},
    [F_MODRM_I8] = {W_MODRM | W_IMM8, K_RI, K_MI},
    [F_S] = {0, K_R, 0},
    [F_G_V_E] = {W_MODRM | W_REG_FIRST, K_RR, K_RM},
    [F_G_E_V] = {W_MODRM | W_REG_FIRST, K_RR, K_RM},
    [F_V_E] = {W_MODRM | W_REG_FIRST, K_RR, K_RM},
    [F_V_W] = {W_MODRM, K_RR, K_RM},
    [F_V_W_I8] = {W_MODRM | W_IMM8, K_RR, K_RM},
    [F_V_H_W] = {W_MODRM | W_H, K_RR, K_RM},
    [F_V_H_W_I8] = {W_MODRM | W_H | W_IMM8, K_RR, K_RM},
    [F_W_V] = {W_MODRM | W_STORE, K_RR, K_MR},
    [F_W_H_V] = {W_MODRM | W_STORE | W_H, K_RR, K_MR},
    [F_W_V_I8] = {W_MODRM | W_STORE | W_IMM8, K_RR, K_MR},
    [F_H_W_I8] = {W_MODRM | W_H | W_REG_ONLY | W_IMM8, K_RR, K_RM},
    [F_V_X] = {W_MODRM, K_RR, K_RM},
    [F_V_H_X] = {W_MODRM | W_H, K_RR, K_RM},
    [F_V_H_X_I8] = {W_MODRM | W_H | W_IMM8, K_RR, K_RM},
    [F_X_V] = {W_MODRM | W_STORE, K_RR, K_MR},
    [F_X_V_I8] = {W_MODRM | W_STORE | W_IMM8, K_RR, K_MR},
    [F_G_W] = {W_MODRM, K_RR, K_RM},
    [F_G_W_I8] = {W_MODRM | W_IMM8, K_RR, K_RM},
    [F_V_W_DI] = {W_MODRM | W_REG_ONLY, K_RR, K_RM},
    [F_X87] = {W_MODRM, K_R, K_M},
    [F_MMX] = {W_MODRM, K_R, K_M},
    [F_MMX_I8] = {W_MODRM | W_IMM8, K_RI, K_MI},
    [F_MMX_DI] = {W_MODRM | W_REG_ONLY, K_R, K_M},
};

/* ---- the row ------------------------------------------------------------------------------------ */

#define O_SELECT (O_GROUP | O_MOD3 | O_PREFIX | O_RM | O_REXW | O_CODE | O_ENC | O_REXB)

static bool has_row_feature(const struct decoder *d, const struct op *op)
{
    return !op->feature || !d->cpu ||
           has_feature(d->cpu, op->feature >> 5 & 0x1f, op->feature & 0x1f);
}

static unsigned select_row(struct decoder *d, u32 selector)
{
    switch (selector) {
    case O_GROUP: need_modrm(d); return MODRM_REG(d);
    case O_RM: need_modrm(d); return MODRM_RM(d);
    case O_MOD3: need_modrm(d); return MODRM_MOD(d) == 3;
    case O_PREFIX: return d->rep == 0xf3 ? 2 : d->rep == 0xf2 ? 3 : d->osz;
    case O_REXW: return REX_W(d) != 0;
    case O_REXB: return REX_B(d) != 0;
    case O_CODE: return d->code64;
    default: return d->vex; /* O_ENC */
    }
}

/* Reads the opcode bytes; NULL when undefined. *flags and *form: with those of outer rows. */
static const struct op *find_op(struct decoder *d, u32 *flags, unsigned *form)
{
    const struct op *map = opcode_map[MAP_1], *op, *zero = NULL;
    u8 b = read_prefixes(d);

    if (d->error)
        return NULL;
    if ((b == 0xc4 || b == 0xc5) && (d->code64 || ((d->mode & MODE_PE) && peek_register_form(d)))) {
        map = read_vex(d, b);
        b = (u8)fetch(d, 1);
    } else if (b == 0x0f) {
        map = opcode_map[MAP_0F];
        b = (u8)fetch(d, 1);
        if (b == 0x38 || b == 0x3a) {
            map = opcode_map[b == 0x38 ? MAP_0F38 : MAP_0F3A];
            b = (u8)fetch(d, 1);
        }
    }
    if (d->error || !map)
        return NULL;
    d->opcode = b;
    *flags = 0;
    *form = F_NONE;
    for (op = &map[b]; op->sub; op = op->sub + select_row(d, op->flags & O_SELECT)) {
        if (op->flags & O_PREFIX)
            zero = op->sub;
        *flags |= op->flags & ~(u32)O_SELECT;
        *form = op->form ? op->form : *form;
        if (d->error)
            return NULL;
    }
    if (d->error) /* the row was chosen by a byte that is not there */
        return NULL;
    if ((op->flags & O_ELSE0) && !has_row_feature(d, op))
        op = zero;
    *flags |= op->flags;
    *form = op->form ? op->form : *form;
    return op->name ? op : NULL;
}

/* Is the encoding one this row allows? */
static bool is_row_valid(const struct decoder *d, const struct op *op, u32 flags, unsigned form)
{
    bool uses_vvvv = (flags & O_VVVV) || form == F_G_V_E || form == F_G_E_V || form == F_V_E ||
                     (forms[form].what & W_H);

    if (!has_row_feature(d, op))
        return false;
    if (d->vex ? !(flags & (O_VEX | O_SSE)) || (flags & O_NOVEX) : (flags & O_VEX) != 0)
        return false;
    if (d->vex && ((d->vex_l && !(flags & O_L256)) || (d->vvvv && !uses_vvvv)))
        return false;
    if (d->code64 ? flags & O_I64 : flags & O_O64)
        return false;
    return !(flags & O_PROT) || (d->mode & MODE_PE);
}

static unsigned operand_size(const struct decoder *d, u32 flags)
{
    bool code32 = (d->mode & MODE_CODE) == MODE_CODE32;

    if (flags & O_BYTE)
        return 1;
    if (flags & O_S32)
        return d->code64 && REX_W(d) ? 8 : 4;
    if (!d->code64)
        return code32 == d->osz ? 2 : 4;
    if (flags & O_F64)
        return 8;
    if (REX_W(d) && !(flags & O_NO64))
        return 8;
    if (d->osz)
        return 2;
    return flags & O_D64 ? 8 : 4;
}

static unsigned address_size(const struct decoder *d)
{
    if (d->code64)
        return d->asz ? 4 : 8;
    return ((d->mode & MODE_CODE) == MODE_CODE32) == d->asz ? 2 : 4;
}

/* ---- memory operands ------------------------------------------------------------------------------ */

/* How the linear address is made, and in which segment. */
static void set_segment(const struct decoder *d, struct insn *i, unsigned dflt)
{
    /* 64-bit code ignores CS, DS, ES and SS prefixes: what is a stack reference stays one. */
    bool overridden = d->seg != NO_SEG && !(d->code64 && d->seg < CPU_SEG_FS);
    unsigned seg = overridden ? d->seg : dflt;

    if (d->seg != NO_SEG)
        i->flags |= I_SEGOVR;
    if (seg == CPU_SEG_SS)
        i->flags |= I_STACK;
    i->seg = (u8)seg;
    if (d->code64) {
        i->ea = i->asize == 8 ? EA_64 : EA_64_32;
        i->seg = seg < CPU_SEG_FS ? SEG_ZERO : (u8)seg;
    } else if ((d->mode & MODE_FLAT) && i->asize == 4 && seg < CPU_SEG_FS && seg != CPU_SEG_CS) {
        i->ea = EA_32;
    } else {
        i->ea = EA_SEG;
    }
}

static void decode_mem16(struct decoder *d, struct insn *i)
{
    static const u8 base[8] = {RBX, RBX, RBP, RBP, RSI, RDI, RBP, RBX};
    static const u8 index[8] = {RSI, RDI, RSI, RDI, GPR_ZERO, GPR_ZERO, GPR_ZERO, GPR_ZERO};
    unsigned mod = MODRM_MOD(d), rm = MODRM_RM(d);

    i->base = base[rm];
    i->index = index[rm];
    if (mod == 0 && rm == 6)
        i->base = GPR_ZERO;
    if (mod == 1)
        i->disp = (s64)fetch_signed(d, 1);
    else if (mod == 2 || i->base == GPR_ZERO)
        i->disp = (s64)fetch_signed(d, 2);
    set_segment(d, i, i->base == RBP ? CPU_SEG_SS : CPU_SEG_DS);
}

static void decode_mem(struct decoder *d, struct insn *i, u32 flags)
{
    unsigned mod = MODRM_MOD(d), rm = MODRM_RM(d);
    bool no_base = mod == 0 && rm == 5;

    if (i->asize == 2) {
        decode_mem16(d, i);
        return;
    }
    i->base = (u8)(rm | REX_B(d));
    if (no_base)
        i->base = d->code64 ? GPR_RIP : GPR_ZERO;
    if (rm == 4) {
        u8 sib = (u8)fetch(d, 1);
        i->base = (u8)((sib & 7) | REX_B(d));
        i->index = (u8)((sib >> 3 & 7) | REX_X(d));
        i->scale = sib >> 6;
        if (i->index == RSP && !(flags & O_VSIB)) {
            i->index = GPR_ZERO;
            i->scale = 0;
        }
        no_base = mod == 0 && (sib & 7) == 5;
        if (no_base)
            i->base = GPR_ZERO;
    }
    if (mod == 1)
        i->disp = (s64)fetch_signed(d, 1);
    else if (mod == 2 || no_base)
        i->disp = (s64)fetch_signed(d, 4);
    set_segment(d, i, i->base == RSP || i->base == RBP ? CPU_SEG_SS : CPU_SEG_DS);
}

/* ---- operands ------------------------------------------------------------------------------------- */

/* Byte offset of a general register into the register file. */
static u8 gpr_offset(const struct decoder *d, unsigned n, bool byte)
{
    if (byte && n >= 4 && n < 8 && !d->rex)
        return (u8)((n - 4) * 8 + 1); /* AH CH DH BH */
    return (u8)(n * 8);
}

static u8 opcode_register(const struct decoder *d, const struct insn *i)
{
    return gpr_offset(d, (d->opcode & 7) | REX_B(d), i->opsize == 1);
}

static void decode_modrm(struct decoder *d, struct insn *i, u32 flags)
{
    bool byte = i->opsize == 1;

    need_modrm(d);
    i->modrm = d->modrm;
    i->src = gpr_offset(d, MODRM_REG(d) | REX_R(d), byte && !(flags & O_GFULL));
    if (MODRM_MOD(d) != 3) {
        i->flags |= I_MEM;
        decode_mem(d, i, flags);
    } else {
        i->dst = gpr_offset(d, MODRM_RM(d) | REX_B(d), byte || (flags & O_DST8));
    }
}

/* CR0, 2, 3, 4, 8 and DR0 to 7: others are #UD, before the privilege is looked at. */
static bool is_control_register(const struct decoder *d, unsigned n)
{
    return (d->opcode & 1 ? 0xffu : 0x11du) >> n & 1;
}

/* Control and debug registers: mod is ignored, the operand is always a register. */
static bool decode_control(struct decoder *d, struct insn *i)
{
    need_modrm(d);
    i->modrm = d->modrm;
    i->opsize = d->code64 ? 8 : 4;
    i->dst = gpr_offset(d, MODRM_RM(d) | REX_B(d), false);
    i->src = (u8)(MODRM_REG(d) | REX_R(d));
    if (!d->lock)
        return is_control_register(d, i->src);
    /* LOCK MOV CR0 is MOV CR8 where CPUID says so (AMD APM vol. 3, MOV CRn) */
    if ((d->opcode & 1) || i->src ||
        (d->cpu && !has_feature(d->cpu, CPU_CPUID_8000_0001_ECX, CPUID_80000001_ECX_CR8_LEGACY)))
        return false;
    i->src = 8;
    return true;
}

static bool decode_segment_register(const struct decoder *d, struct insn *i, bool load)
{
    i->src = MODRM_REG(d);
    return i->src <= CPU_SEG_GS && !(load && i->src == CPU_SEG_CS);
}

static void decode_moffs(struct decoder *d, struct insn *i)
{
    i->flags |= I_MEM;
    i->disp = (s64)fetch(d, i->asize);
    set_segment(d, i, CPU_SEG_DS);
}

/* Everything behind the opcode. false: invalid. */
static bool decode_operands(struct decoder *d, struct insn *i, unsigned form, u32 flags)
{
    unsigned what = forms[form].what;
    unsigned imm_size = i->opsize == 8 ? 4 : i->opsize;

    if (what & W_MODRM)
        decode_modrm(d, i, flags);
    if (what & (i->flags & I_MEM ? W_REG_ONLY : W_MEM_ONLY))
        return false;
    if (what & W_IMM8)
        i->imm = fetch_signed(d, 1);
    else if (what & W_IMM)
        i->imm = fetch_signed(d, imm_size);

    switch (form) {
    case F_E_1: i->imm = 1; break;
    case F_E_CL: i->src = RCX * 8; break;
    case F_Z: i->dst = opcode_register(d, i); break;
    case F_Z_I:
        i->dst = opcode_register(d, i);
        i->imm = fetch_signed(d, i->opsize);
        break;
    case F_A_Z: i->dst = opcode_register(d, i); break;
    case F_I16: i->imm = fetch(d, 2); break;
    case F_I16_I8:
        i->imm = fetch(d, 2);
        i->vvvv = (u8)fetch(d, 1);
        break;
    case F_A_I8PORT: i->imm = fetch(d, 1); break;
    case F_A_DX: i->src = RDX * 8; break;
    case F_FAR:
        i->imm = fetch(d, i->opsize);
        i->disp = (s64)fetch(d, 2);
        break;
    case F_J8:
    case F_JV: /* the target is relative to rip as a memory operand may be */
        i->base = GPR_RIP;
        i->disp = (s64)i->imm;
        break;
    case F_A_O:
    case F_O_A: decode_moffs(d, i); break;
    case F_C: return decode_control(d, i);
    case F_E_S: return decode_segment_register(d, i, false);
    case F_S_E: return decode_segment_register(d, i, true);
    case F_S: i->src = d->opcode >> 3 & 7; break;
    case F_STR:
    case F_XLAT:
        i->base = form == F_XLAT ? RBX : GPR_ZERO;
        set_segment(d, i, CPU_SEG_DS);
        break;
    case F_X87: i->imm = (d->opcode & 7u) << 8 | d->modrm; break;
    case F_V_W_DI:
    case F_MMX_DI:
        i->base = RDI;
        set_segment(d, i, CPU_SEG_DS);
        break;
    }
    return true;
}

/* ---- the handler ------------------------------------------------------------------------------------ */

int x_ud(struct cpu *cpu, const struct insn *i) { return fault_ud(cpu, i); }

/* Privileged instruction at CPL 1 to 3, instruction longer than 15 bytes or beyond the limit of CS. */
int x_gp0(struct cpu *cpu, const struct insn *i) { return fault_gp(cpu, i, 0); }

static insn_fn specialised(const struct decoder *d, const struct op *op, const struct insn *i,
                           unsigned form)
{
    const struct form_info *f = &forms[form];
    bool mem = (i->flags & I_MEM) || form == F_XLAT;
    unsigned kind = mem ? f->kind_mem : f->kind_reg;

    if (form == F_STR && d->rep)
        kind = K_M;
    return op->body ? op->body->fn[kind][__builtin_ctz(i->opsize)] : NULL;
}

/* Register operands of a specialised handler, where they differ from rm and reg. */
static void order_registers(const struct decoder *d, struct insn *i, unsigned form)
{
    u8 reg = i->src, rm = i->dst;

    if (!(forms[form].what & W_REG_FIRST))
        return;
    i->dst = form == F_V_E ? d->vvvv * 8 : reg;
    i->src = rm;
}

static void choose_handler(const struct decoder *d, const struct op *op, struct insn *i,
                           unsigned form, u32 flags)
{
    if ((flags & O_CPL0) && (d->mode & MODE_CPL3)) {
        i->fn = x_gp0;
        return;
    }
    if (form >= F_X87 && form <= F_MMX_DI && !(d->mode & MODE_FPU)) {
        i->fn = form == F_X87 ? x_x87_unusable : x_mmx_unusable;
        return;
    }
    i->fn = specialised(d, op, i, form);
    if (i->fn)
        order_registers(d, i, form);
    else
        i->fn = op->x ? op->x : x_ud;
}

/* Vector registers as offsets into their file; the first source of a legacy encoding is the
 * destination. */
static void set_vector_operands(const struct decoder *d, struct insn *i, unsigned form)
{
    u16 reg = i->src / 8 * VREG_SIZE, rm = i->dst / 8 * VREG_SIZE, h = d->vvvv * VREG_SIZE;
    bool store = forms[form].what & W_STORE;

    i->imm8 = (u8)i->imm;
    i->vd = form == F_H_W_I8 ? (d->vex ? h : rm) : store ? rm : reg;
    i->vb = store ? reg : rm;
    i->va = d->vex ? h : i->vd;
}

/* Gathers: the index comes from a SIB byte, and no two of the three registers are the same. */
static bool is_vsib_valid(const struct decoder *d, const struct insn *i)
{
    u16 index = i->index * VREG_SIZE;

    return i->asize != 2 && MODRM_RM(d) == 4 && i->vd != i->va && i->vd != index && i->va != index;
}

static bool choose_vector_handler(const struct decoder *d, const struct op *op, struct insn *i,
                                  unsigned form, u32 flags)
{
    set_vector_operands(d, i, form);
    if (flags & O_VSIB && !is_vsib_valid(d, i))
        return false;
    i->fn = vector_handler(d->cpu, op, i, flags,
                           i->flags & I_MEM ? forms[form].kind_mem : forms[form].kind_reg, d->mode);
    return i->fn != NULL;
}

static bool is_conditional(const struct op *op)
{
    return op->name[0] == 'j' || !strncmp(op->name, "set", 3) || !strncmp(op->name, "cmov", 4);
}

static void set_flags(const struct decoder *d, struct insn *i)
{
    if (d->lock)
        i->flags |= I_LOCK;
    if (d->rep)
        i->flags |= d->rep == 0xf3 ? I_REP : I_REPNE;
    if (d->rex)
        i->flags |= I_REX;
    if (d->osz)
        i->flags |= I_OSZ;
    if (d->code64)
        i->flags |= I_CODE64;
    if (REX_W(d))
        i->flags |= I_REXW;
    if (d->vex)
        i->flags |= I_VEX;
    if (d->vex_l)
        i->flags |= I_VEXL;
}

static bool is_lock_valid(const struct insn *i, unsigned form, u32 flags)
{
    return form == F_C || ((flags & O_LOCK) && (i->flags & I_MEM));
}

static int decode(struct decoder *d, struct insn *i)
{
    unsigned form;
    u32 flags;
    const struct op *op = find_op(d, &flags, &form);

    if (!op)
        return d->error;
    if (!is_row_valid(d, op, flags, form))
        return INVALID;
    if (!d->code64) /* only now: vvvv that is not used must be 1111, all of it (measured on Zen 5) */
        d->vvvv &= 7;
    i->op = op;
    i->opsize = (u8)operand_size(d, flags);
    i->asize = (u8)address_size(d);
    i->vvvv = d->vex ? d->vvvv : is_conditional(op) ? d->opcode & 15 : 0;
    if (!decode_operands(d, i, form, flags))
        return d->error;
    if (d->error)
        return d->error;
    set_flags(d, i);
    if (d->lock && !is_lock_valid(i, form, flags))
        return INVALID;
    if (flags & O_SSE)
        return choose_vector_handler(d, op, i, form, flags) ? VALID : INVALID;
    choose_handler(d, op, i, form, flags);
    return VALID;
}

int decode_insn(struct cpu *cpu, const u8 *bytes, unsigned n, u32 mode, struct insn *i)
{
    struct decoder d = {
        .bytes = bytes,
        .n = n,
        .cpu = cpu,
        .mode = mode,
        .seg = NO_SEG,
        .code64 = (mode & MODE_CODE) == MODE_CODE64,
    };
    int result;

    *i = (struct insn){.fn = x_ud, .base = GPR_ZERO, .index = GPR_ZERO, .seg = CPU_SEG_DS};
    result = decode(&d, i);
    i->len = (u8)d.pos;
    if (result != VALID) {
        i->fn = x_ud;
        return result;
    }
    if (i->base == GPR_RIP)
        i->disp += d.pos;
    return (int)d.pos;
}

/* The mnemonic: rows of vector instructions have that of the legacy encoding with 32-bit operands. */
static void insn_name(const struct insn *i, char *text, size_t size)
{
    const char *name = i->op->name;
    bool vector = i->op->flags & O_SSE;
    size_t n;

    if (!strcmp(name, "vzeroupper") && i->flags & I_VEXL)
        name = "vzeroall";
    snprintf(text, size, "%s%s", vector && i->flags & I_VEX && name[0] != 'v' ? "v" : "", name);
    n = strlen(text);
    if (vector && i->opsize == 8 && n < size &&
        (!strcmp(name, "movd") || !strcmp(name, "pinsrd") || !strcmp(name, "pextrd")))
        text[n - 1] = 'q';
}

int cpu_decode(const uint8_t *bytes, int nbytes, int bits, char *mnemonic, int mnemonic_size)
{
    u32 mode = bits == 64 ? MODE_CODE64 : bits == 32 ? MODE_CODE32 : MODE_CODE16;
    struct insn i;
    int len;

    len = decode_insn(NULL, bytes, nbytes < 0 ? 0 : (unsigned)nbytes, mode | MODE_PE, &i);
    if (mnemonic_size > 0)
        snprintf(mnemonic, (size_t)mnemonic_size, "%s", "");
    if (mnemonic_size > 0 && len > 0)
        insn_name(&i, mnemonic, (size_t)mnemonic_size);
    return len == TOO_LONG ? 0 : len;
}
