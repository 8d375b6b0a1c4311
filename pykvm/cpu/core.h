/*
 * Private to the processor: decoded instructions, the soft TLB, lazy flags, and the
 * helpers every instruction is written with.
 *
 * How an instruction runs
 *   decode.c turns bytes into a block: an array of struct insn, each with the handler that
 *   was compiled for its operation, operand size and operand kind.  A handler ends with
 *   NEXT() (a tail call of the next handler), with a branch status, or with stop().
 *
 * Rules of a handler
 *   1. Nothing architectural changes before every access of the instruction that can fail
 *      has succeeded: memory is written before registers and flags, registers last.  An
 *      instruction that stops is executed again from its start (EPT violation, MMIO, ...).
 *   2. ld*(), st*(), rmw_begin() and their kin are the only way to guest memory.
 *   3. Faults are return values, never longjmp.
 */
#ifndef PYKVM_CORE_H
#define PYKVM_CORE_H

#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "pykvm/cpu.h"
#include "pykvm/x86.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef unsigned __int128 u128;

/* Guest memory has no type and no alignment. */
typedef u16 __attribute__((may_alias, aligned(1))) u16_mem;
typedef u32 __attribute__((may_alias, aligned(1))) u32_mem;
typedef u64 __attribute__((may_alias, aligned(1))) u64_mem;
typedef u8 __attribute__((may_alias)) u8_mem;

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

struct cpu;
struct insn;

/* ---- handlers and blocks ------------------------------------------------------------ */

/* What a handler returns. */
enum status {
    LINK0 = 0,  /* block done, rip is the fall-through successor */
    LINK1 = 1,  /* block done, rip is the taken direct target */
    LOOKUP = 2, /* block done, find the block of rip (indirect, or the mode may have changed) */
    STOP = 3,   /* cpu->stop says why; see stop() and friends */
};

typedef int (*insn_fn)(struct cpu *cpu, const struct insn *i);

/* insn.flags */
#define I_MEM 0x0001 /* the ModRM operand is memory */
#define I_LOCK 0x0002
#define I_REP 0x0004   /* F3 */
#define I_REPNE 0x0008 /* F2 */
#define I_STACK 0x0010 /* the segment is SS: faults are #SS */
#define I_REX 0x0020
#define I_OSZ 0x0040    /* 66 */
#define I_CODE64 0x0080 /* decoded for 64-bit mode */
#define I_REXW 0x0100
#define I_VEX 0x0200
#define I_VEXL 0x0400   /* 256 bits */
#define I_SEGOVR 0x0800 /* explicit segment override, in insn.seg */

/* insn.ea: how the linear address is made */
enum ea_kind {
    EA_64,    /* 64-bit address size: seg_base[seg] + offset */
    EA_32,    /* offset & 0xffffffff: flat 32-bit segment */
    EA_64_32, /* 67 prefix in 64-bit mode: seg_base[seg] + (u32)offset */
    EA_SEG,   /* limit and type checks, 16- or 32-bit offset */
};

/* Pseudo index of cpu->seg_base: always 0 (ES, CS, SS, DS in 64-bit mode). */
#define SEG_ZERO 6

struct insn {
    insn_fn fn;
    s64 disp; /* displacement (RIP-relative: against the block's first byte) */
    union {
        u64 imm; /* immediate, sign-extended to 64 bits; branch: displacement */
        struct { /* vector rows: registers as byte offsets from guest.fpu.ymm */
            u8 imm8;
            u16 vd, va, vb; /* destination, first source (legacy encoding: = vd), last source */
        };
    };
    const struct op *op;
    u8 dst, src;    /* GPR operands: byte offset into the register file; others: number */
    u8 base, index; /* register numbers, 16 = none, 17 = RIP */
    u8 scale, seg;  /* log2; cpu->seg_base index (EA_SEG, EA_32: real segment number) */
    u8 ea, asize;   /* enum ea_kind; address size in bytes 2, 4, 8 */
    u8 opsize;      /* 1, 2, 4, 8 */
    u8 len;
    u16 off;   /* of its first byte from the block's first byte */
    u16 flags; /* I_* */
    u8 modrm;
    u8 vvvv; /* VEX.vvvv as a register number, or imm2 of ENTER and far pointers' helper */
};

#define BLOCK_MAX 48 /* instructions */

struct block {
    u64 epoch;      /* usable without a check while equal to cpu->epoch; 0 = dead */
    uintptr_t hva;  /* host address of the first byte */
    uintptr_t hva2; /* page crossing instruction: host address of the second page, else 0 */
    u16 mode;       /* cpu->mode it was decoded for */
    u16 n;          /* instructions, without the closing x_end */
    u16 len;        /* bytes */
    u16 repeats;    /* the last one is a REP: it may come back unfinished */
    struct block *link[2];
    struct block *next;       /* hash chain */
    struct block *page_next;  /* blocks of the same host page, for invalidation */
    struct block *page2_next; /* blocks that reach into the same second page */
    const u8 *bytes;          /* copy of what was decoded */
    struct insn insn[];
};

/* cpu->mode: what decoding depends on */
#define MODE_CODE16 0x0
#define MODE_CODE32 0x1
#define MODE_CODE64 0x2
#define MODE_CODE 0x3
#define MODE_SS32 0x4  /* 32-bit stack pointer (SS.B); 64-bit mode ignores it */
#define MODE_FLAT 0x8  /* CS, DS, ES, SS have base 0, 4 GiB limit and are usable, writable */
#define MODE_STEP 0x10 /* block of one instruction: side effects in order, stop after it */
#define MODE_PE 0x20   /* protected mode and not virtual-8086 */
#define MODE_CPL3 0x40 /* CPL is not 0: privileged instructions are #GP(0) */
#define MODE_LMA 0x80
#define MODE_SSE 0x100 /* no reason in CR0, CR4 not to execute legacy SSE */
#define MODE_AVX 0x200 /* nor in CR0, CR4, XCR0 for VEX */
#define MODE_XM 0x400  /* MXCSR leaves an exception unmasked */
#define MODE_FPU 0x800 /* no reason in CR0 (EM, TS) not to execute x87 and MMX */

/* ---- instruction table ---------------------------------------------------------------- */

/* Kinds of operands a specialised handler exists for. */
enum kind { K_RR, K_RM, K_MR, K_RI, K_MI, K_R, K_M, K_MAX };

/* The handlers of one operation: fn[kind][log2 of the operand size]. */
struct body {
    insn_fn fn[K_MAX][4];
};

enum form {
    F_NONE,
    F_E_G,  /* ModRM r/m, reg */
    F_G_E,  /* reg, r/m */
    F_A_I,  /* accumulator, immediate of operand size (max. 32 bits) */
    F_E_I,  /* r/m, immediate */
    F_E_I8, /* r/m, sign-extended 8-bit immediate */
    F_G_E_I,
    F_G_E_I8, /* IMUL */
    F_E,      /* r/m */
    F_E_1,
    F_E_CL, /* shifts */
    F_E_G_I8,
    F_E_G_CL, /* SHLD, SHRD */
    F_Z,      /* register in the opcode */
    F_Z_I,    /* register in the opcode, full immediate (64 bits with REX.W) */
    F_A_Z,    /* XCHG accumulator, register */
    F_I,
    F_I8,
    F_I16,
    F_I16_I8,
    F_J8,
    F_JV,
    F_M, /* memory only, register form #UD */
    F_G_M,
    F_R, /* register form only, memory #UD */
    F_A_O,
    F_O_A, /* moffs */
    F_A_I8PORT,
    F_A_DX,
    F_FAR, /* ptr16:16/32: imm = offset, vvvv unused, disp = selector */
    F_E_S,
    F_S_E, /* segment register in reg */
    F_C,   /* MOV CR/DR: reg and rm registers */
    F_STR, /* string */
    F_XLAT,
    F_MODRM, /* ModRM present; the handler looks at insn.modrm, dst, src, I_MEM itself */
    F_MODRM_I8,
    F_S, /* segment register in the opcode */
    F_G_V_E,
    F_G_E_V,
    F_V_E, /* VEX: vvvv is a GPR */
    /* Vector rows (O_SSE). V: register of reg, H: of vvvv (legacy: the destination), W: r/m, X: W
     * that is a GPR or memory, G: reg that is a GPR; the first is the destination. */
    F_V_W,
    F_V_W_I8,
    F_V_H_W,
    F_V_H_W_I8,
    F_W_V,
    F_W_H_V,
    F_W_V_I8,
    F_H_W_I8, /* shifts */
    F_V_X,
    F_V_H_X,
    F_V_H_X_I8,
    F_X_V,
    F_X_V_I8,
    F_G_W,
    F_G_W_I8,
    F_V_W_DI, /* registers, and memory at DS:rDI */
    F_X87,    /* ModRM; imm = the 11 bits of the x87 opcode, as FOP holds them */
    /* ModRM: the handler takes MMX registers from insn.modrm, others from dst and src */
    F_MMX,
    F_MMX_I8,
    F_MMX_DI, /* registers, and memory at DS:rDI */
    F_MAX
};

/* op.flags */
#define O_BYTE 0x0001   /* 8-bit operands */
#define O_D64 0x0002    /* 64-bit operand size by default in 64-bit mode (66 gives 16) */
#define O_F64 0x0004    /* always 64-bit in 64-bit mode */
#define O_I64 0x0008    /* #UD in 64-bit mode */
#define O_O64 0x0010    /* #UD outside 64-bit mode */
#define O_LOCK 0x0020   /* LOCK allowed with a memory destination */
#define O_END 0x0040    /* ends the block */
#define O_PROT 0x0080   /* #UD in real and virtual-8086 mode */
#define O_CPL0 0x0100   /* #GP(0) unless CPL 0 (checked by the decoder's wrapper) */
#define O_GROUP 0x0200  /* sub: table of 8 by ModRM.reg */
#define O_MOD3 0x0400   /* sub: [0] memory forms, [1] register forms */
#define O_PREFIX 0x0800 /* sub: [0] none, [1] 66, [2] F3, [3] F2 */
#define O_RM 0x1000     /* sub: table of 8 by ModRM.rm (with mod 3) */
#define O_REXW 0x2000   /* sub: [0] W=0, [1] W=1 */
#define O_DST8 0x4000   /* MOVZX and the like: source is 8 bits */
#define O_SRC16 0x8000
#define O_VEX 0x10000 /* VEX encoding only */
#define O_NOVEX 0x20000
#define O_SSE 0x40000   /* XMM state: #NM, #UD checks by CR0.TS, CR0.EM, CR4.OSFXSR */
#define O_CODE 0x80000  /* sub: [0] 16/32-bit code, [1] 64-bit code */
#define O_ENC 0x100000  /* sub: [0] legacy encoding, [1] VEX */
#define O_REXB 0x200000 /* sub: [0] B=0, [1] B=1 */
#define O_VVVV                                                                                     \
    0x400000 /* uses VEX.vvvv though its form does not say so (other rows: must be 1111) */
#define O_L256 0x800000    /* VEX.L may be 1 */
#define O_LIG O_L256       /* scalar: VEX.L is ignored */
#define O_VSIB 0x1000000   /* the index of the SIB byte is a vector register number */
#define O_S32 0x2000000    /* operands of 32 bits, 64 with W, whatever mode and 66 say */
#define O_NO64 0x4000000   /* REX.W does not make them 64 bits (port I/O) */
#define O_GFULL 0x8000000  /* O_BYTE, but reg is a whole register (CRC32) */
#define O_ELSE0 0x10000000 /* without its feature: row [0] of the O_PREFIX table */
#define O_TFLATE                                                                                   \
    0x20000000 /* single-step trap only if TF is still set afterwards (INT n, SYSCALL) */
#define O_FLOAT 0x40000000 /* vector row that looks at MXCSR */
#define O_AVX2 0x80000000  /* vector row: VEX.256 needs AVX2, not just AVX */

struct op {
    const char *name;
    const struct body *body; /* specialised handlers ... */
    insn_fn x;               /* ... or one handler for every size and kind */
    const struct op *sub;    /* with O_GROUP, O_MOD3, O_PREFIX ... */
    u32 flags;
    u16 form;
    u16 feature; /* FEAT(word, bit) that must be in ctl.cpuid, 0 = always there */
};

#define FEAT(word, bit) (u16)(0x8000 | (word) << 5 | (bit))

/* ---- soft TLB ----------------------------------------------------------------------------- */

#define TLB_BITS 10
#define TLB_SIZE (1u << TLB_BITS)
#define TLB_INDEX(la) (((la) >> 12) & (TLB_SIZE - 1))
#define TLB_EMPTY 1ull /* no page address has bit 0 set */

struct tlbe {
    u64 tag;    /* linear page address, or TLB_EMPTY */
    u64 addend; /* host address = linear address + addend */
};

/* One per privilege the page tables distinguish. An entry is filled only when the access
 * needs nothing more: rights checked, A and D set, RAM, and for w: no decoded code in the page. */
enum tlb_ctx {
    CTX_KERNEL,
    CTX_KERNEL_SMAP,
    CTX_USER,
    CTX_USER_AC, /* user, and alignment is checked: never filled for data, so no fast path */
    NR_CTX
};
struct tlb {
    struct tlbe r[TLB_SIZE], w[TLB_SIZE], x[TLB_SIZE];
};

/* ---- the processor -------------------------------------------------------------------------- */

/* cpu->stop: why a handler returned STOP */
enum stop_reason {
    STOP_NONE,
    STOP_EXCEPTION, /* cpu->exc */
    STOP_EXIT,      /* vmcs.exit is filled, instruction not committed */
    STOP_EXIT_DONE, /* vmcs.exit is filled, instruction committed, rip is valid (HLT, trap-like) */
    STOP_STEP,      /* do this instruction again in a MODE_STEP block (MMIO write, own code) */
};

struct exception {
    u8 vector;
    bool has_error;
    u8 type; /* CPU_EVENT_* type >> 8: HARD_EXC, SOFT_INT, ... */
    u32 error;
    u64 cr2; /* #PF: loaded into CR2 at delivery */
    u64 dr6; /* #DB: bits merged into DR6 at delivery */
};

struct codepage; /* block.c */

/* cpu.request: a FLUSH_* is being done. cpu_sync() waits for this as for the request itself. */
#define R_FLUSHING 0x80000000u

struct cpu {
    struct vmcs vmcs;

    /* hot */
    u64 cc_res, cc_aux; /* lazy status flags, see below */
    struct tlb *tlb;    /* current context */
    u64 seg_base[8];    /* [0..5] bases, [SEG_ZERO] = 0 */
    u64 ip_mask;        /* 64-bit mode ~0, else 0xffffffff: only 16-bit branches truncate */
    u64 sp_mask;        /* 0xffff, 0xffffffff, ~0 */
    u32 mode;
    u32 cpl;
    s64 budget;          /* instructions until the loop looks around */
    _Atomic u32 request; /* CPU_REQ_* and R_* */
    _Atomic u32 in_guest;
    struct block *block;   /* being executed */
    uintptr_t stack_limit; /* blocks are chained above it */
    u64 epoch;             /* see struct block */

    /* why the last handler stopped */
    u32 stop;
    const struct insn *insn; /* the instruction that stopped */
    struct exception exc;
    bool step;       /* executing a MODE_STEP block: MMIO and code writes allowed */
    bool delivering; /* event delivery in progress: linear addresses are 64 bits in long mode */
    struct cpu_event vectoring; /* the event being delivered */

    /* replay of the answers in ctl.mmio[] */
    u32 mmio_pos; /* reads of this execution answered so far */
    u32 posted;   /* MMIO writes in exit.mmio[] waiting for the instruction to retire */

    u64 rmw_buf[8]; /* rmw_begin() on anything but plain RAM in one page */
    u64 rmw_la;
    u32 rmw_size;
    bool bus_locked; /* by rmw_slow(), until rmw_flush() */

    struct tlb *ctx;        /* NR_CTX contexts */
    struct tlb_state *ts;   /* tlb.c: second level, fill log, large pages, breakpoints */
    struct walk_cache *wc;  /* walk.c */
    struct block_cache *bc; /* block.c */
    u64 preempt_at;         /* host TSC */
    u64 insns_at_entry;     /* retired so far = insns_at_entry - budget */
    u64 check_at;           /* host TSC of the next look at signals */
    u64 guard_at;           /* and of the next look at who takes SIGSEGV and SIGBUS */
    u32 attention;          /* enter.c: every boundary is to be looked at (windows, breakpoints) */
    bool mtf;               /* EXIT_MTF is due */
    bool repeating;         /* the stepped instruction is a REP that is not through */
    u32 shadow;             /* CPU_BLOCK_* and RFLAGS.RF that end with the instruction being */
    u64 rf;                 /* stepped, put back when it stops uncommitted */
    u32 looks;              /* around, so far */
    u64 insn_end;           /* stats.insns at which ctl.insn_budget is used up */
    bool check_signals;
    u64 signal_mask;
    u32 cpuid[CPU_NR_CPUID]; /* ctl.cpuid as of the last cpu_state_changed() */

    /* DR6 bits of data breakpoints that an instruction hit in step mode (elsewhere such an
     * access is STOP_STEP): 0 at the start of every attempt, into guest.pending_dbg at retire. */
    u32 data_bp;

    sigjmp_buf guard; /* host.c: where a SIGSEGV on guest memory comes back to */

    u8 fpu_where; /* fpu.h: where the x87 and MMX state is */
    u16 host_fcw; /* x87 control word of the module */

    /* vector.c. While in guest mode MXCSR of the host thread is the guest's, all masked: nothing
     * else in the core may use SSE floating point. */
    u32 host_mxcsr;               /* of the module */
    u32 fault_mxcsr;              /* at the SIGSEGV that came back to guard */
    _Alignas(32) u8 vscratch[32]; /* memory operand that the fast path could not take */
};

/* ---- registers ---------------------------------------------------------------------------- */

#define GPR(cpu, n) ((cpu)->vmcs.guest.gpr[n])
#define RAX 0
#define RCX 1
#define RDX 2
#define RBX 3
#define RSP 4
#define RBP 5
#define RSI 6
#define RDI 7
#define GPR_ZERO 16
#define GPR_RIP 17 /* address of the current block's first byte: offset in CS, not linear */

/* Register operands by byte offset (AH is offset 1): */
#define REG8(cpu, o) (*(u8_mem *)((u8 *)(cpu)->vmcs.guest.gpr + (o)))
#define REG16(cpu, o) (*(u16_mem *)((u8 *)(cpu)->vmcs.guest.gpr + (o)))
#define REG32(cpu, o) (*(u32_mem *)((u8 *)(cpu)->vmcs.guest.gpr + (o)))
#define REG64(cpu, o) (*(u64_mem *)((u8 *)(cpu)->vmcs.guest.gpr + (o)))

static inline u64 reg_read(struct cpu *cpu, unsigned off, unsigned size)
{
    switch (size) {
    case 1: return REG8(cpu, off);
    case 2: return REG16(cpu, off);
    case 4: return REG32(cpu, off);
    default: return REG64(cpu, off);
    }
}

/* 32-bit writes clear the upper half, 8- and 16-bit writes keep it. */
static inline void reg_write(struct cpu *cpu, unsigned off, unsigned size, u64 v)
{
    switch (size) {
    case 1: REG8(cpu, off) = (u8)v; break;
    case 2: REG16(cpu, off) = (u16)v; break;
    case 4: REG64(cpu, off) = (u32)v; break;
    default: REG64(cpu, off) = v; break;
    }
}

#define SEG(cpu, n) ((cpu)->vmcs.guest.seg[n])
#define GUEST(cpu) ((cpu)->vmcs.guest)
#define CTL(cpu) ((cpu)->vmcs.ctl)
#define EXIT(cpu) ((cpu)->vmcs.exit)

static inline bool is_code64(const struct cpu *cpu)
{
    return (cpu->mode & MODE_CODE) == MODE_CODE64;
}
static inline bool is_pe(const struct cpu *cpu) { return cpu->vmcs.guest.cr0 & X86_CR0_PE; }
static inline bool is_lma(const struct cpu *cpu) { return cpu->vmcs.guest.efer & EFER_LMA; }
static inline bool is_vm86(const struct cpu *cpu) { return cpu->vmcs.guest.rflags & X86_EFLAGS_VM; }
static inline unsigned iopl(const struct cpu *cpu) { return cpu->vmcs.guest.rflags >> 12 & 3; }
static inline bool is_amd(const struct cpu *cpu) { return cpu->vmcs.ctl.flags & CPU_AMD; }
static inline bool has_feature(const struct cpu *cpu, unsigned word, unsigned bit)
{
    return cpu->vmcs.ctl.cpuid[word] >> bit & 1;
}

static inline bool is_canonical(const struct cpu *cpu, u64 a)
{
    unsigned shift = cpu->vmcs.guest.cr4 & X86_CR4_LA57 ? 7 : 16;
    return (u64)((s64)(a << shift) >> shift) == a;
}

/* ---- vector state (vector.c) ----------------------------------------------------------------- */

#define XFEATURES_AVX (XFEATURE_MASK_SSE | XFEATURE_MASK_YMM)

/* What CR0, CR4, XCR0 and MXCSR say of vector instructions. (VEX outside protected mode is not
 * decoded.) */
static inline u32 vector_mode(const struct cpu *cpu)
{
    const struct cpu_guest *g = &cpu->vmcs.guest;
    u32 mode = 0;

    if (g->cr0 & X86_CR0_TS)
        return 0;
    if (g->cr4 & X86_CR4_OSFXSR && !(g->cr0 & X86_CR0_EM))
        mode |= MODE_SSE;
    if (g->cr4 & X86_CR4_OSXSAVE && (g->xcr0 & XFEATURES_AVX) == XFEATURES_AVX)
        mode |= MODE_AVX;
    return mode && ~g->fpu.mxcsr & 0x1f80 ? mode | MODE_XM : mode;
}

/* Around guest mode: MXCSR of the host becomes the guest's and back. recover: after a SIGSEGV. */
void mxcsr_enter(struct cpu *cpu);
void mxcsr_leave(struct cpu *cpu);
void mxcsr_recover(struct cpu *cpu);

/* ---- lazy flags ------------------------------------------------------------------------------
 * rflags in the guest state holds everything but the six status flags while the processor
 * runs.  Those are kept as the last result and its carries, with no record of the operation:
 *   cc_res  the result, sign-extended to 64 bits
 *   cc_aux  bit 63 carry out of the top bit, bit 62 carry into it, bit 3 carry out of bit 3,
 *           bits 15:8 correction of the parity byte, bit 16 correction of the sign;
 *           the other bits are anything
 */
#define CC_CARRIES (3ull << 62)
#define CC_CORRECTIONS 0x1ff00ull
static inline bool get_cf(const struct cpu *cpu) { return cpu->cc_aux >> 63; }
static inline bool get_of(const struct cpu *cpu) { return (cpu->cc_aux ^ cpu->cc_aux << 1) >> 63; }
static inline bool get_zf(const struct cpu *cpu) { return cpu->cc_res == 0; }
static inline bool get_sf(const struct cpu *cpu)
{
    return (cpu->cc_res >> 63 ^ cpu->cc_aux >> 16) & 1;
}
static inline bool get_af(const struct cpu *cpu) { return cpu->cc_aux >> 3 & 1; }
static inline bool get_pf(const struct cpu *cpu)
{
    return !__builtin_parity((u8)(cpu->cc_res ^ cpu->cc_aux >> 8));
}

#define STATUS_FLAGS                                                                               \
    (X86_EFLAGS_CF | X86_EFLAGS_PF | X86_EFLAGS_AF | X86_EFLAGS_ZF | X86_EFLAGS_SF | X86_EFLAGS_OF)

static inline u64 get_status(const struct cpu *cpu)
{
    return (u64)get_cf(cpu) | (u64)get_pf(cpu) << 2 | (u64)get_af(cpu) << 4 |
           (u64)get_zf(cpu) << 6 | (u64)get_sf(cpu) << 7 | (u64)get_of(cpu) << 11;
}

static inline void set_status(struct cpu *cpu, u64 f)
{
    u64 cf = f & 1, of = f >> 11 & 1;
    cpu->cc_res = f & X86_EFLAGS_ZF ? 0 : 0x100;
    cpu->cc_aux = cf << 63 | (cf ^ of) << 62 | (f >> 4 & 1) << 3 | (f >> 7 & 1) << 16 |
                  (u64) !(f & X86_EFLAGS_PF) << 8;
}

/* Whole RFLAGS, and its setter (no permission logic). */
static inline u64 get_rflags(const struct cpu *cpu)
{
    return (cpu->vmcs.guest.rflags & ~(u64)STATUS_FLAGS) | get_status(cpu);
}
static inline void set_rflags(struct cpu *cpu, u64 f)
{
    cpu->vmcs.guest.rflags = f;
    set_status(cpu, f);
}

static inline void set_cf(struct cpu *cpu, bool cf)
{
    u64 of = get_of(cpu);
    cpu->cc_aux = (cpu->cc_aux & ~CC_CARRIES) | (u64)cf << 63 | ((u64)cf ^ of) << 62;
}
static inline void set_cf_of(struct cpu *cpu, u64 cf, u64 of)
{
    cpu->cc_aux = (cpu->cc_aux & ~CC_CARRIES) | cf << 63 | (cf ^ of) << 62;
}
static inline void set_zf(struct cpu *cpu, bool zf)
{
    u64 f = get_status(cpu);
    set_status(cpu, zf ? f | X86_EFLAGS_ZF : f & ~(u64)X86_EFLAGS_ZF);
}

/* bits: operand width; r as zero-extended value of that width. carries: carry out of every bit. */
#define SEXT(bits, r) ((u64)((s64)((u64)(r) << (64 - (bits))) >> (64 - (bits))))
static inline void flags_set(struct cpu *cpu, unsigned bits, u64 r, u64 carries)
{
    cpu->cc_res = SEXT(bits, r);
    cpu->cc_aux = bits == 64 ? carries & ~CC_CORRECTIONS : carries << (64 - bits) | (carries & 8);
}
static inline void flags_add(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    flags_set(cpu, bits, r, (a & b) | ((a | b) & ~r));
}
static inline void flags_sub(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    flags_set(cpu, bits, r, (~a & b) | ((~a | b) & r));
}
static inline void flags_logic(struct cpu *cpu, unsigned bits, u64 r)
{
    cpu->cc_res = SEXT(bits, r);
    cpu->cc_aux = 0;
}

/* The 16 conditions of Jcc, SETcc, CMOVcc. */
static inline bool condition(const struct cpu *cpu, unsigned cc)
{
    bool v;
    switch (cc >> 1) {
    case 0: v = get_of(cpu); break;
    case 1: v = get_cf(cpu); break;
    case 2: v = get_zf(cpu); break;
    case 3: v = get_cf(cpu) || get_zf(cpu); break;
    case 4: v = get_sf(cpu); break;
    case 5: v = get_pf(cpu); break;
    case 6: v = get_sf(cpu) != get_of(cpu); break;
    default: v = get_zf(cpu) || get_sf(cpu) != get_of(cpu); break;
    }
    return v ^ (cc & 1);
}

/* ---- going on and stopping ---------------------------------------------------------------------- */

/* Ends every handler that neither branches nor stops. The empty asm keeps `i` itself in a
 * register until guest memory has been accessed: after a SIGSEGV host.c has to find it. */
#define NEXT(cpu, i)                                                                               \
    do {                                                                                           \
        const struct insn *here_ = (i);                                                            \
        __asm__ volatile("" : "+r"(here_) : : "memory");                                           \
        return here_[1].fn((cpu), here_ + 1);                                                      \
    } while (0)

/* rip of the instruction and behind it (offset in CS). */
static inline u64 insn_rip(const struct cpu *cpu, const struct insn *i)
{
    return (cpu->vmcs.guest.gpr[GPR_RIP] + i->off) & cpu->ip_mask;
}
static inline u64 next_rip(const struct cpu *cpu, const struct insn *i)
{
    return (cpu->vmcs.guest.gpr[GPR_RIP] + i->off + i->len) & cpu->ip_mask;
}
static inline void set_rip(struct cpu *cpu, u64 rip) { cpu->vmcs.guest.rip = rip; }

/* `return stop(cpu, i);` when a memory access or a helper returned false: cpu->stop is set. */
static inline int stop(struct cpu *cpu, const struct insn *i)
{
    cpu->insn = i;
    cpu->vmcs.guest.rip = insn_rip(cpu, i);
    return STOP;
}

/* Helpers that record an exception and return false, so that both
 *   return raise_gp(cpu, 0)            (in a bool helper) and
 *   return fault_gp(cpu, i, 0)         (in a handler)
 * read well. Out of line, in event.c. */
bool raise_exception(struct cpu *cpu, unsigned vector, bool has_error, u32 error);
static inline bool raise_ud(struct cpu *cpu) { return raise_exception(cpu, UD_VECTOR, false, 0); }
static inline bool raise_gp(struct cpu *cpu, u32 e)
{
    return raise_exception(cpu, GP_VECTOR, true, e);
}
static inline bool raise_ss(struct cpu *cpu, u32 e)
{
    return raise_exception(cpu, SS_VECTOR, true, e);
}
static inline bool raise_np(struct cpu *cpu, u32 e)
{
    return raise_exception(cpu, NP_VECTOR, true, e);
}
static inline bool raise_ts(struct cpu *cpu, u32 e)
{
    return raise_exception(cpu, TS_VECTOR, true, e);
}
static inline bool raise_nm(struct cpu *cpu) { return raise_exception(cpu, NM_VECTOR, false, 0); }
static inline bool raise_de(struct cpu *cpu) { return raise_exception(cpu, DE_VECTOR, false, 0); }
bool raise_pf(struct cpu *cpu, u64 la, u32 error); /* CR2 is written at delivery */
bool raise_db(struct cpu *cpu, u64 dr6);           /* fault-like #DB */

static inline int fault_ud(struct cpu *cpu, const struct insn *i)
{
    raise_ud(cpu);
    return stop(cpu, i);
}
static inline int fault_gp(struct cpu *cpu, const struct insn *i, u32 e)
{
    raise_gp(cpu, e);
    return stop(cpu, i);
}
static inline int fault_de(struct cpu *cpu, const struct insn *i)
{
    raise_de(cpu);
    return stop(cpu, i);
}
static inline int fault_nm(struct cpu *cpu, const struct insn *i)
{
    raise_nm(cpu);
    return stop(cpu, i);
}

/* VM exit with the instruction not done: `return vmexit(cpu, i, EXIT_CPUID);` (enter.c) */
int vmexit(struct cpu *cpu, const struct insn *i, u32 reason);
/* VM exit with the instruction done; the caller has set rip. */
int vmexit_done(struct cpu *cpu, const struct insn *i, u32 reason);
/* For helpers without an insn at hand: record the exit, return false. insn_len is filled by stop. */
bool raise_exit(struct cpu *cpu, u32 reason);

/* ---- guest memory --------------------------------------------------------------------------------- */

/* access */
#define ACC_READ 0
#define ACC_WRITE 1
#define ACC_FETCH 2
#define ACC_STACK 0x10  /* non-canonical is #SS(0) */
#define ACC_SYSTEM 0x20 /* implicit supervisor access: descriptor tables, TSS */
#define ACC_BYTES 0x40  /* any alignment will do */

/* Slow paths (tlb.c): TLB miss, page crossing, MMIO, code pages. They set cpu->stop on false. */
bool mem_read(struct cpu *cpu, u64 la, void *p, unsigned size, unsigned access);
bool mem_write(struct cpu *cpu, u64 la, const void *p, unsigned size, unsigned access);
/* Checks that [la, la+size) could be read, written without doing it. */
bool mem_probe_read(struct cpu *cpu, u64 la, unsigned size, unsigned access);
bool mem_probe_write(struct cpu *cpu, u64 la, unsigned size, unsigned access);
/* #AC when alignment is checked; every access but ACC_BYTES has that already. */
bool mem_check_alignment(struct cpu *cpu, u64 la, unsigned size);
void *rmw_slow(struct cpu *cpu, u64 la, unsigned size, unsigned access);
void rmw_flush(struct cpu *cpu);
void bus_unlock(struct cpu *cpu); /* when it is */
/* Host pointer for up to *len bytes at la (shortened to the page end) of plain RAM with the
 * right already checked; NULL when it must be done element by element (no fault raised). */
void *mem_direct(struct cpu *cpu, u64 la, unsigned access, unsigned *len);

#define DEFINE_LD_ST(bits)                                                                         \
    static inline bool ld##bits(struct cpu *cpu, u64 la, u##bits *v, unsigned access)              \
    {                                                                                              \
        const struct tlbe *e = &cpu->tlb->r[TLB_INDEX(la)];                                        \
        if (likely(e->tag == ((la + bits / 8 - 1) & PAGE_MASK) && !(access & ACC_SYSTEM))) {       \
            *v = *(const volatile u##bits##_mem *)(uintptr_t)(la + e->addend);                     \
            return true;                                                                           \
        }                                                                                          \
        return mem_read(cpu, la, v, bits / 8, access);                                             \
    }                                                                                              \
    static inline bool st##bits(struct cpu *cpu, u64 la, u##bits v, unsigned access)               \
    {                                                                                              \
        const struct tlbe *e = &cpu->tlb->w[TLB_INDEX(la)];                                        \
        if (likely(e->tag == ((la + bits / 8 - 1) & PAGE_MASK) && !(access & ACC_SYSTEM))) {       \
            *(volatile u##bits##_mem *)(uintptr_t)(la + e->addend) = v;                            \
            return true;                                                                           \
        }                                                                                          \
        return mem_write(cpu, la, &v, bits / 8, access | ACC_WRITE);                               \
    }
DEFINE_LD_ST(8)
DEFINE_LD_ST(16)
DEFINE_LD_ST(32)
DEFINE_LD_ST(64)

/* Read-modify-write: a pointer to work on, or NULL (cpu->stop set). After *p = result call
 * rmw_end(), which cannot fail.  Writability and every page were checked by rmw_begin(). */
static inline void *rmw_begin(struct cpu *cpu, u64 la, unsigned size, unsigned access)
{
    const struct tlbe *e = &cpu->tlb->w[TLB_INDEX(la)];
    if (likely(e->tag == ((la + size - 1) & PAGE_MASK) && !(access & ACC_SYSTEM)))
        return (void *)(uintptr_t)(la + e->addend);
    return rmw_slow(cpu, la, size, access | ACC_WRITE);
}
static inline void rmw_end(struct cpu *cpu, void *p)
{
    if (unlikely(p == cpu->rmw_buf))
        rmw_flush(cpu);
}
static inline bool rmw_is_direct(const struct cpu *cpu, const void *p) { return p != cpu->rmw_buf; }

static inline bool ld_size(struct cpu *cpu, u64 la, unsigned size, u64 *v, unsigned access)
{
    *v = 0;
    switch (size) { /* little endian: the low bytes of *v */
    case 1: return ld8(cpu, la, (u8 *)v, access);
    case 2: return ld16(cpu, la, (u16 *)v, access);
    case 4: return ld32(cpu, la, (u32 *)v, access);
    default: return ld64(cpu, la, v, access);
    }
}
static inline bool st_size(struct cpu *cpu, u64 la, unsigned size, u64 v, unsigned access)
{
    switch (size) {
    case 1: return st8(cpu, la, (u8)v, access);
    case 2: return st16(cpu, la, (u16)v, access);
    case 4: return st32(cpu, la, (u32)v, access);
    default: return st64(cpu, la, v, access);
    }
}

/* ---- effective addresses --------------------------------------------------------------------------- */

static inline u64 ea_sum(const struct cpu *cpu, const struct insn *i)
{
    return cpu->vmcs.guest.gpr[i->base] + (cpu->vmcs.guest.gpr[i->index] << i->scale) +
           (u64)i->disp;
}
/* Offset in the segment, address size applied (LEA). */
static inline u64 ea_offset(const struct cpu *cpu, const struct insn *i)
{
    u64 a = ea_sum(cpu, i);
    return i->asize == 8 ? a : i->asize == 4 ? (u32)a : (u16)a;
}
/* Segment checks of legacy modes (segment.c): limit, type, null; 16/32-bit offsets; raises
 * #GP(0)/#SS(0). In 64-bit mode adds FS/GS bases and truncates nothing. */
bool seg_linear(struct cpu *cpu, unsigned seg, u64 offset, unsigned size, unsigned access, u64 *la);

/* Linear address of the ModRM memory operand. */
static inline bool ea_linear(struct cpu *cpu, const struct insn *i, unsigned size, unsigned access,
                             u64 *la)
{
    u64 a = ea_sum(cpu, i);
    switch (i->ea) {
    case EA_64: *la = a + cpu->seg_base[i->seg]; return true;
    case EA_32: *la = (u32)a; return true;
    case EA_64_32: *la = (u32)a + cpu->seg_base[i->seg]; return true;
    default: return seg_linear(cpu, i->seg, i->asize == 4 ? (u32)a : (u16)a, size, access, la);
    }
}
/* #SS or #GP for non-canonical addresses of this operand */
static inline unsigned ea_access(const struct insn *i)
{
    return i->flags & I_STACK ? ACC_STACK : 0;
}

/* Whole operand at once, for handlers that are not specialised. */
static inline bool rm_read(struct cpu *cpu, const struct insn *i, unsigned reg_off, unsigned size,
                           u64 *v)
{
    u64 la;
    if (!(i->flags & I_MEM)) {
        *v = reg_read(cpu, reg_off, size);
        return true;
    }
    return ea_linear(cpu, i, size, ACC_READ, &la) && ld_size(cpu, la, size, v, ea_access(i));
}
static inline bool rm_write(struct cpu *cpu, const struct insn *i, unsigned reg_off, unsigned size,
                            u64 v)
{
    u64 la;
    if (!(i->flags & I_MEM)) {
        reg_write(cpu, reg_off, size, v);
        return true;
    }
    return ea_linear(cpu, i, size, ACC_WRITE, &la) && st_size(cpu, la, size, v, ea_access(i));
}

/* ---- stack -------------------------------------------------------------------------------------------- */

/* Stack pointer arithmetic honours SS.B: bits outside sp_mask are kept. */
static inline u64 sp_add(const struct cpu *cpu, u64 rsp, s64 delta)
{
    return (rsp & ~cpu->sp_mask) | ((rsp + (u64)delta) & cpu->sp_mask);
}
static inline bool stack_linear(struct cpu *cpu, u64 rsp, unsigned size, unsigned access, u64 *la)
{
    if (likely((cpu->mode & MODE_CODE) == MODE_CODE64)) {
        *la = rsp;
        return true;
    }
    if (likely((cpu->mode & (MODE_FLAT | MODE_SS32)) == (MODE_FLAT | MODE_SS32))) {
        *la = (u32)rsp;
        return true;
    }
    return seg_linear(cpu, CPU_SEG_SS, rsp & cpu->sp_mask, size, access | ACC_STACK, la);
}
/* Reads or writes a stack slot without moving rsp: *rsp is advanced for the caller to commit. */
static inline bool push_at(struct cpu *cpu, u64 *rsp, unsigned size, u64 v)
{
    u64 sp = sp_add(cpu, *rsp, -(s64)size), la;
    if (!stack_linear(cpu, sp, size, ACC_WRITE, &la) || !st_size(cpu, la, size, v, ACC_STACK))
        return false;
    *rsp = sp;
    return true;
}
static inline bool pop_at(struct cpu *cpu, u64 *rsp, unsigned size, u64 *v)
{
    u64 la;
    if (!stack_linear(cpu, *rsp, size, ACC_READ, &la) || !ld_size(cpu, la, size, v, ACC_STACK))
        return false;
    *rsp = sp_add(cpu, *rsp, size);
    return true;
}

/* ---- between the files ---------------------------------------------------------------------------------- */

/* enter.c */
void update_mode(struct cpu *cpu); /* cpl, mode, ip_mask, sp_mask, seg_base, tlb from guest state */
/* Must be called by every handler that changed CS, SS, DS, ES, CR0, CR4, EFER, RFLAGS.VM,
 * CPL or RFLAGS.AC; such a handler sets rip and returns LOOKUP (or stops done). */
void serialize(struct cpu *cpu); /* foreign stores to code become visible: epoch++ */

/* block.c */
struct block *block_find(struct cpu *cpu, bool step); /* block of rip, or NULL: cpu->stop set */
void block_flush(struct cpu *cpu);                    /* all of them (CPUID changed, arena full) */
bool block_page_has_code(struct cpu *cpu, uintptr_t hva);
/* A store to [hva, hva+len) of a page with code: false = it overlaps what is being executed
 * outside a MODE_STEP block (cpu->stop = STOP_STEP), else overlapping blocks are dead now. */
bool block_store(struct cpu *cpu, uintptr_t hva, unsigned len);
bool block_cache_init(struct cpu *cpu);
void block_cache_free(struct cpu *cpu);

/* decode.c: decodes one instruction. bytes: at least n valid ones. Fills *i except off.
 * Returns length; 0: invalid (raise #UD), -1: needs more than n bytes, -2: longer than 15 (#GP). */
int decode_insn(struct cpu *cpu, const u8 *bytes, unsigned n, u32 mode, struct insn *i);
int x_end(struct cpu *cpu, const struct insn *i); /* closes a block: rip, LINK0 */
int x_ud(struct cpu *cpu, const struct insn *i);
int x_gp0(struct cpu *cpu, const struct insn *i); /* #GP(0) */

/* tlb.c */
bool tlb_init(struct cpu *cpu);
void tlb_free(struct cpu *cpu);
void tlb_flush(struct cpu *cpu);       /* everything, also what is known of SPTEs */
void tlb_flush_guest(struct cpu *cpu); /* all linear translations: CR0, CR4, EFER, PKRU changed */
void tlb_flush_nonglobal(struct cpu *cpu);                  /* CR3 loaded; may flush more */
void tlb_invlpg(struct cpu *cpu, u64 la);                   /* whatever page size maps la */
void tlb_protect_code(struct cpu *cpu, uintptr_t hva_page); /* drop w entries of that host page */
/* Before an entry: flushes when the module changed what translations are made from, without
 * saying so (root, paging bits, MAXPHYADDR ...), and looks at DR7 (see below). */
void tlb_check(struct cpu *cpu);
/* DR0..DR3 or DR7 changed: pages with data breakpoints leave the fast path. */
void tlb_breakpoints(struct cpu *cpu);
/* Host address of the instruction byte at la, rights checked; 0 with cpu->stop set. Read it with
 * host_load(): the page may be gone. */
uintptr_t tlb_fetch(struct cpu *cpu, u64 la);
/* CR0.AM and EFLAGS.AC, which mean something at CPL 3 only */
static inline bool checks_alignment(const struct cpu *cpu)
{
    return cpu->vmcs.guest.rflags & X86_EFLAGS_AC && cpu->vmcs.guest.cr0 & X86_CR0_AM;
}
/* The context of data accesses: cpu->tlb = &cpu->ctx[tlb_context(cpu, ...)]. system: implicit
 * supervisor access, which SMAP checks whatever EFLAGS.AC says (SDM vol. 3 4.6.1). */
static inline enum tlb_ctx tlb_context(const struct cpu *cpu, bool system)
{
    if (cpu->cpl == 3 && !system)
        return unlikely(checks_alignment(cpu)) ? CTX_USER_AC : CTX_USER;
    if (!(cpu->vmcs.guest.cr4 & X86_CR4_SMAP))
        return CTX_KERNEL;
    return system || !(cpu->vmcs.guest.rflags & X86_EFLAGS_AC) ? CTX_KERNEL_SMAP : CTX_KERNEL;
}

/* walk.c: guest page tables x SPTEs */
struct translation {
    u64 gpa;       /* not known in shadow mode, except for MMIO */
    uintptr_t hva; /* 0: no memory there */
    u64 page_size; /* of the guest's mapping, for INVLPG */
    bool readable; /* reads need no further walk */
    bool writable; /* nor do writes: W in both tables, D set in both */
    bool global;
    bool mmio; /* with hva: emulate_gfn, reads go to memory and writes do not */
};
/* access: ACC_*; user: CPL 3 rights. false: #PF raised, or exit recorded. */
bool walk_linear(struct cpu *cpu, u64 la, unsigned access, bool user, struct translation *t);
bool walk_gpa(struct cpu *cpu, u64 gpa, unsigned access, struct translation *t); /* tdp only */
void walk_flush(struct cpu *cpu);       /* forget what is known of SPTEs */
void walk_flush_guest(struct cpu *cpu); /* ... of upper levels of guest tables */
bool walk_init(struct cpu *cpu);
void walk_free(struct cpu *cpu);
/* Loads and checks PDPTEs at cr3; 0, -1 reserved bits or no memory, -2 exit recorded.
 * Shadow mode: the module does it at EXIT_CR_ACCESS, here pdptr[] stays what it is. */
int load_pdptrs(struct cpu *cpu, u64 cr3, u64 pdptr[4]);

/* event.c */
/* Delivers through IVT/IDT. Handles nested faults (#DF, triple fault). false: exit recorded
 * (EPT violation with vectoring info, triple fault). soft events push next_rip. */
bool deliver_event(struct cpu *cpu, struct cpu_event ev, u64 next_rip);
bool deliver_exception(struct cpu *cpu); /* cpu->exc, of the instruction at rip */
/* INT n, INT3, INTO, INT1 as instructions. */
int x_int(struct cpu *cpu, const struct insn *i);
int x_int3(struct cpu *cpu, const struct insn *i);
int x_into(struct cpu *cpu, const struct insn *i);
int x_int1(struct cpu *cpu, const struct insn *i);

/* segment.c */
struct desc {
    u64 raw, raw_hi;
    u64 base;
    u32 limit;
    u32 ar;
    u64 la;
};
bool desc_read(struct cpu *cpu, u16 sel, struct desc *d,
               bool *in_table); /* GDT/LDT; false: fault */
/* Loads a data or stack segment register with all checks; committed only on success. */
bool load_segment(struct cpu *cpu, unsigned seg, u16 sel);
void set_segment_real(struct cpu *cpu, unsigned seg, u16 sel); /* real mode and virtual-8086 */

/* system.c */
bool io_allowed(struct cpu *cpu, u16 port, unsigned size); /* IOPL, TSS bitmap; raises #GP */
bool write_cr0(struct cpu *cpu, u64 v);
bool write_cr3(struct cpu *cpu, u64 v);
bool write_cr4(struct cpu *cpu, u64 v);
u64 guest_tsc(struct cpu *cpu);

/* x87.c: in guest mode the x87 state may live in the host's FPU. */
void fpu_enter(struct cpu *cpu);
void fpu_leave(
    struct cpu *cpu); /* back to guest.fpu: before anything outside x87.c, mmx.c looks at it */
/* After a signal whose handler is not returned from; fxsave: the image in its frame. */
void fpu_rescue(struct cpu *cpu, const void *fxsave);
/* xsave.c: XINUSE, the state components that are not in their initial configuration */
u64 fpu_xinuse(struct cpu *cpu);
u64 fpu_components(struct cpu *cpu); /* the same for guest.fpu.xinuse, whatever the mode */

/* host.c: signals, SIGSEGV/SIGBUS recovery, memory */
bool host_signal_pending(struct cpu *cpu);
/* Guest memory that may be gone (unmapped, truncated, poisoned) without the module knowing.
 * Slow paths use host_*(): false with EXIT_HOST_FAULT recorded. Single accesses for sizes 1, 2,
 * 4, 8. Handlers access it plainly; there the guard, armed by the outermost frame, gets control:
 *     if (host_guard_enter(cpu))
 *         reason = host_guard_fault(cpu);   rip, exit and cpu->stop as for any other exit
 *     else
 *         reason = run(cpu);
 *     host_guard_leave(cpu);
 * This is the one exception to rule 3: it is sound because of rule 1. Between blocks cpu->block
 * must be NULL (or rip is taken from it). */
bool host_load(struct cpu *cpu, void *dst, uintptr_t hva, unsigned size);
bool host_store(struct cpu *cpu, uintptr_t hva, const void *src, unsigned size);
/* *old: expected in, found out; compare them for success. size 4 or 8. */
bool host_cmpxchg(struct cpu *cpu, uintptr_t hva, u64 *old, u64 val, unsigned size);
bool host_guard_install(void); /* takes SIGSEGV and SIGBUS, again if somebody else has since */
void host_guard_arm(struct cpu *cpu);
#define host_guard_enter(cpu) (host_guard_arm(cpu), sigsetjmp((cpu)->guard, 0))
int host_guard_fault(struct cpu *cpu);
void host_guard_leave(struct cpu *cpu);

#endif
