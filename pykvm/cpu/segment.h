/* SPDX-License-Identifier: MIT */
/*
 * Descriptors, far targets and stacks that are not loaded yet: what event.c, segment.c, system.c
 * and task.c share.
 */
#ifndef PYKVM_SEGMENT_H
#define PYKVM_SEGMENT_H

#include "core.h"

/* VMX access rights of what far transfers load without a descriptor. */
#define AR_DATA 0xc093u   /* flat read/write data, DPL 0 */
#define AR_CODE32 0xc09bu /* flat 32-bit code, DPL 0 */
#define AR_CODE64 0xa09bu /* 64-bit code, DPL 0 */
#define AR_VM86 0x00f3u   /* every segment of virtual-8086 mode */
#define AR_REAL_DATA 0x0093u

static inline unsigned ar_dpl(u32 ar) { return (ar & CPU_AR_DPL) >> CPU_AR_DPL_SHIFT; }
static inline bool ar_is_code(u32 ar)
{
    return (ar & (CPU_AR_S | SEG_TYPE_CODE)) == (CPU_AR_S | SEG_TYPE_CODE);
}
static inline bool ar_is_conforming(u32 ar) { return ar_is_code(ar) && ar & SEG_TYPE_CONFORMING; }
static inline bool ar_is_writable_data(u32 ar)
{
    return (ar & (CPU_AR_S | SEG_TYPE_CODE | SEG_TYPE_WRITABLE)) == (CPU_AR_S | SEG_TYPE_WRITABLE);
}
/* The type of a system descriptor, or 0 (reserved) for code and data. */
static inline unsigned ar_system_type(u32 ar) { return ar & CPU_AR_S ? 0 : ar & CPU_AR_TYPE; }

static inline bool sel_is_null(u16 sel) { return !(sel & ~SELECTOR_RPL_MASK); }
static inline unsigned sel_rpl(u16 sel) { return sel & SELECTOR_RPL_MASK; }

static inline u64 size_mask(unsigned size) { return size >= 8 ? ~0ull : (1ull << size * 8) - 1; }

/* Linear addresses of tables and TSS have 64 bits in long mode, compatibility mode included. */
static inline u64 table_linear(const struct cpu *cpu, u64 la) { return is_lma(cpu) ? la : (u32)la; }

/* Rights of implicit supervisor accesses: SMAP holds whatever EFLAGS.AC says. */
static inline struct tlb *system_tlb(const struct cpu *cpu)
{
    return &cpu->ctx[cpu->vmcs.guest.cr4 & X86_CR4_SMAP ? CTX_KERNEL_SMAP : CTX_KERNEL];
}

static inline bool system_read(struct cpu *cpu, u64 la, void *p, unsigned size)
{
    const struct tlbe *e = &system_tlb(cpu)->r[TLB_INDEX(la)];

    if (likely(e->tag == ((la + size - 1) & PAGE_MASK))) {
        memcpy(p, (const void *)(uintptr_t)(la + e->addend), size);
        return true;
    }
    return mem_read(cpu, la, p, size, ACC_READ | ACC_SYSTEM);
}

/* #GP, #NP, #SS, #TS with a selector as error code. */
static inline bool raise_selector(struct cpu *cpu, unsigned vector, u16 sel)
{
    return raise_exception(cpu, vector, true, sel & ~SELECTOR_RPL_MASK);
}

/* Whether [offset, offset + size) lies within the limit, for expand-down segments too. */
bool seg_within_limit(const struct cpu_seg *s, u64 offset, unsigned size);

/* Descriptor of a selector known not to be null; `vector` when it lies outside its table. */
bool desc_fetch(struct cpu *cpu, u16 sel, unsigned vector, struct desc *d);
/* As above for LDT, TSS and gates: 16 bytes in long mode, where it must be in the GDT or LDT. */
bool desc_fetch_system(struct cpu *cpu, u16 sel, unsigned vector, struct desc *d);
/* Sets or clears bits of the type in memory, atomically where it is plain memory. */
bool desc_change_type(struct cpu *cpu, const struct desc *d, u8 set, u8 clear);
/* Sets the accessed bit of the descriptor in memory where it is clear. */
bool desc_mark_accessed(struct cpu *cpu, const struct desc *d);
/* The segment register for it, RPL replaced. */
struct cpu_seg desc_segment(const struct desc *d, u16 sel, unsigned rpl);

/* ES, SS, DS, FS or GS from a selector that is not null; `vector`: #GP, or #TS in a task switch. */
bool load_data_segment(struct cpu *cpu, unsigned seg, u16 sel, unsigned cpl, unsigned vector);
void set_segment_null(struct cpu *cpu, unsigned seg, u16 sel);

/* SS without a descriptor: 64-bit mode keeps CPL in its DPL. */
static inline struct cpu_seg null_stack_segment(u16 sel, unsigned cpl)
{
    return (struct cpu_seg){.selector = sel, .ar = CPU_AR_UNUSABLE | cpl << CPU_AR_DPL_SHIFT};
}

static inline bool tss_is_16bit(const struct cpu_seg *tr)
{
    return (tr->ar & CPU_AR_TYPE & ~2u) == DESC_TSS16_AVAILABLE;
}

/* #GP(0) when no code at rip can be executed in cs. */
bool check_rip(struct cpu *cpu, const struct cpu_seg *cs, u64 rip);

/* A stack being built, committed by its user: GPR(RSP) = s.sp, SS = s.ss. */
struct stack {
    struct cpu_seg ss;
    u64 sp;
    u64 mask;        /* ~0: 64-bit mode, no segment */
    unsigned access; /* ACC_SYSTEM when it belongs to another privilege level than CPL */
    u16 error;       /* of #SS when the limit is exceeded */
};

/* The stack the processor has. In long mode `wide` makes it 64 bits whatever SS.B says. */
void stack_current(struct cpu *cpu, struct stack *s, bool wide);
/* The stack of a more privileged level, out of the TSS; SS is loaded and checked (#TS, #SS). */
bool stack_from_tss(struct cpu *cpu, unsigned cpl, struct stack *s);
/* Long mode: RSP0..2 are slots 0..2, IST1..7 slots 4..10 of the TSS. */
bool stack_from_tss64(struct cpu *cpu, unsigned slot, unsigned cpl, struct stack *s);
bool stack_push(struct cpu *cpu, struct stack *s, unsigned size, u64 v);
void stack_commit(struct cpu *cpu, const struct stack *s);

/* ---- system.c: virtual-8086 mode extensions (SDM vol. 3 20.3), in virtual-8086 mode with IOPL < 3 ----- */

static inline bool has_vme(const struct cpu *cpu)
{
    return cpu->vmcs.guest.cr4 & X86_CR4_VME && is_vm86(cpu);
}
/* FLAGS as the program sees them: IOPL 3, and IF is VIF. */
u64 vme_flags(const struct cpu *cpu);
/* Loads 16 bits of them; #GP(0) for TF, and for IF while an interrupt waits (VIP). */
bool vme_load_flags(struct cpu *cpu, u64 flags);

/* ---- task.c ------------------------------------------------------------------------------------ */

/*
 * Switch to the TSS `sel`.  TASK_FAILED: nothing has happened yet (fault of the old task
 * or an exit); TASK_FAULT: the new task is there and faulted before its first instruction, rip
 * is its; both with cpu->stop set.
 */
enum task_result { TASK_DONE, TASK_FAILED, TASK_FAULT };
enum task_reason { TASK_JMP, TASK_CALL, TASK_IRET, TASK_GATE };
enum task_result task_switch(struct cpu *cpu, u16 sel, enum task_reason why, bool has_error,
                             u32 error, u64 return_rip);

#endif
