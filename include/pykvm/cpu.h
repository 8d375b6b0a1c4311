/*
 * The VM-entry contract between the kernel module (Python) and the processor (C).
 *
 * As between KVM and VT-x: the module writes `guest` and `ctl` while the processor is
 * out, calls cpu_enter(), and reads `exit` when it comes back.  Only the request word
 * (cpu_request(), cpu_kick()) may be touched while the processor is in guest mode.
 *
 * The processor knows guest state, guest page tables and SPTEs.  It knows no memslot, no
 * ioctl and no KVM_EXIT.  An instruction that exits before it is complete has changed
 * nothing and is executed again from its start; what it needs to get further (the data of
 * an IN or of an MMIO read) is put into `ctl` beforehand.
 *
 * This header is also read by cffi: structs, enums, integer #defines and prototypes only.
 */
#ifndef PYKVM_CPU_H
#define PYKVM_CPU_H

#include <stdint.h>

/* ---- guest state --------------------------------------------------------------- */

/* Order of seg[]: that of the sreg field of ModRM, then LDTR and TR. */
#define CPU_SEG_ES 0
#define CPU_SEG_CS 1
#define CPU_SEG_SS 2
#define CPU_SEG_DS 3
#define CPU_SEG_FS 4
#define CPU_SEG_GS 5
#define CPU_SEG_LDTR 6
#define CPU_SEG_TR 7

/* cpu_seg.ar: VMX access-rights format, SDM vol. 3 24.4.1 */
#define CPU_AR_TYPE 0x0000f
#define CPU_AR_S 0x00010
#define CPU_AR_DPL 0x00060
#define CPU_AR_DPL_SHIFT 5
#define CPU_AR_P 0x00080
#define CPU_AR_AVL 0x01000
#define CPU_AR_L 0x02000
#define CPU_AR_DB 0x04000
#define CPU_AR_G 0x08000
#define CPU_AR_UNUSABLE 0x10000

struct cpu_seg {
    uint64_t base;
    uint32_t limit; /* in bytes, already scaled */
    uint32_t ar;
    uint16_t selector;
};

struct cpu_table {
    uint64_t base;
    uint32_t limit;
};

/* guest.interruptibility, SDM vol. 3 24.4.2 */
#define CPU_BLOCK_STI 1
#define CPU_BLOCK_MOVSS 2
#define CPU_BLOCK_SMI 4
#define CPU_BLOCK_NMI 8

#define CPU_ACTIVE 0
#define CPU_SHUTDOWN 2

/* gpr[16] is always 0 and gpr[17] is the base of RIP-relative addresses: the processor's
 * own, they let one address formula serve every addressing form. */
#define CPU_NR_GPR 18

struct cpu_fpu {
    uint16_t fcw, fsw;
    uint8_t ftw; /* abridged: 1 = valid */
    uint8_t pad;
    uint16_t fop;
    uint64_t fip, fdp;
    uint32_t mxcsr;
    uint32_t mxcsr_mask;
    uint64_t xinuse;     /* components that are not in their init state; MXCSR is part of SSE */
    uint64_t reserved;   /* the processor keeps ymm[] aligned to 32 bytes */
    uint8_t st[8][16];   /* ST(i), 80 bits each, in stack order as FXSAVE stores them */
    uint8_t ymm[16][32]; /* XMM in the low half */
};

struct cpu_guest {
    uint64_t gpr[CPU_NR_GPR];
    uint64_t rip, rflags;
    struct cpu_seg seg[8];
    struct cpu_table gdtr, idtr;
    uint64_t cr0, cr2, cr3, cr4, cr8;
    uint64_t efer, xcr0, xss;
    uint64_t pdptr[4]; /* latched PDPTEs of PAE paging */
    uint64_t dr[4], dr6, dr7;
    uint32_t pkru;
    uint32_t interruptibility;
    uint32_t activity;
    uint32_t pending_dbg; /* DR6 bits of a #DB trap due at the next boundary */
    uint64_t star, lstar, cstar, sfmask, kernel_gs_base;
    uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
    uint64_t tsc_aux, debugctl;
    struct cpu_fpu fpu;
};

/* ---- events --------------------------------------------------------------------- */

/* ctl.entry_event and exit.idt_vectoring: SDM vol. 3 24.8.3 */
#define CPU_EVENT_VECTOR 0x000000ff
#define CPU_EVENT_TYPE 0x00000700
#define CPU_EVENT_INTR 0x00000000
#define CPU_EVENT_NMI 0x00000200
#define CPU_EVENT_HARD_EXC 0x00000300
#define CPU_EVENT_SOFT_INTR 0x00000400
#define CPU_EVENT_PRIV_SW_EXC 0x00000500 /* INT1 */
#define CPU_EVENT_SOFT_EXC 0x00000600    /* INT3, INTO */
#define CPU_EVENT_HAS_ERROR 0x00000800
#define CPU_EVENT_VALID 0x80000000u

struct cpu_event {
    uint32_t info; /* CPU_EVENT_* */
    uint32_t error_code;
    uint32_t insn_len; /* of the INT n, INT1, INT3 or INTO */
};

/* ---- second-level page tables ---------------------------------------------------- */

/*
 * SPTEs are EPT entries (SDM vol. 3 28.3.2) whose address is a host *virtual* page:
 * pfn = hva >> 12.  In shadow mode (CPU_TDP clear) the same format translates linear
 * addresses and SPTE_U says that CPL 3 may use the translation.
 * The processor sets A and D with atomic operations; the module changes entries that the
 * processor may be using only with spte_cmpxchg() / spte_xchg().
 */
#define SPTE_R 0x1
#define SPTE_W 0x2
#define SPTE_X 0x4
#define SPTE_U 0x8
#define SPTE_PS 0x80
#define SPTE_A 0x100
#define SPTE_D 0x200
/* Of leaves. ROM: the frame is in a read-only slot; A and D of guest tables in it are left as they are.
 * GUEST_USER (shadow mode): to the guest this is a user page although SPTE_U is clear, so that SMEP
 * and SMAP look at it. */
#define SPTE_ROM 0x400
#define SPTE_GUEST_USER 0x800
#define SPTE_PFN 0x000ffffffffff000
/* Bits 52..62 belong to the module.  R=0 W=1 X=1 marks MMIO (an EPT misconfiguration, as
 * KVM does it): bits 12..51 are then the gfn and bits 52..62 with 3..10 a generation;
 * the processor takes the entry as MMIO when (spte & ctl.mmio_gen_mask) == ctl.mmio_gen
 * and as not present (EPT violation) otherwise. */
#define SPTE_MMIO 0x6
/* Rights of an MMIO entry in shadow mode (tdp: the guest's tables say them). Never in the
 * generation mask. */
#define SPTE_MMIO_U 0x800
#define SPTE_MMIO_W 0x8000000000000000
#define SPTE_RWX 0x7

/* ---- controls --------------------------------------------------------------------- */

/* ctl.flags */
#define CPU_TDP 0x1      /* eptp maps gpa; clear: eptp maps linear addresses (shadow) */
#define CPU_EXIT_HLT 0x2 /* HLT exits in any case: a processor has nowhere to wait */
#define CPU_EXIT_PAUSE 0x4
#define CPU_EXIT_MWAIT 0x8    /* MONITOR and MWAIT; clear: they are NOPs */
#define CPU_EXIT_INVLPG 0x10  /* trap-like, also INVPCID */
#define CPU_EXIT_CR3 0x20     /* trap-like */
#define CPU_EXIT_CR0_CR4 0x40 /* trap-like */
#define CPU_EXIT_CR8 0x80 /* trap-like, when a write lowers CR8 (any write with CPU_EXIT_CR8_ALL) */
#define CPU_EXIT_CR8_ALL 0x100
#define CPU_EXIT_MSR_ALL 0x200 /* no MSR is passed through */
#define CPU_EXIT_IRQ_WINDOW 0x400
#define CPU_EXIT_NMI_WINDOW 0x800
#define CPU_EXIT_DR 0x1000     /* fault-like exit on MOV DR */
#define CPU_SINGLE_STEP 0x2000 /* monitor trap: EXIT_MTF after one instruction */
#define CPU_NO_HOST_TSC 0x4000 /* TSC counts instructions */
#define CPU_MWAIT_UD 0x8000    /* MONITOR and MWAIT raise #UD when CPUID lacks them */
/* Where AMD's processors differ from Intel's: SYSCALL, SYSRET, SYSENTER, null selectors, far
 * pointers with REX.W, what an entry checks. */
#define CPU_AMD 0x10000
/* The guest's CPUID says the other vendor: SYSCALL and SYSENTER of that vendor work outside
 * 64-bit mode, too (KVM emulates them). */
#define CPU_OTHER_VENDOR 0x20000

#define CPU_NR_CPUID 12
/* ctl.cpuid[]: the CPUID words that gate instructions and CR bits */
#define CPU_CPUID_1_ECX 0
#define CPU_CPUID_1_EDX 1
#define CPU_CPUID_7_EBX 2
#define CPU_CPUID_7_ECX 3
#define CPU_CPUID_7_EDX 4
#define CPU_CPUID_7_1_EAX 5
#define CPU_CPUID_D_1_EAX 6
#define CPU_CPUID_8000_0001_ECX 7
#define CPU_CPUID_8000_0001_EDX 8
#define CPU_CPUID_8000_0008_EBX 9
#define CPU_CPUID_6_EAX 10

#define CPU_PIO_DATA 4096
#define CPU_NR_MMIO 8    /* pieces of one instruction that may be replayed */
#define CPU_NR_EMULATE 8 /* frames that one instruction may write to as MMIO */

/* One piece of an MMIO access: never crosses a page. */
struct cpu_mmio {
    uint64_t gpa;
    uint32_t len; /* 1..64 bytes */
    uint8_t data[64];
};

/* A frame that is mapped read-only, and in shadow mode the linear page (exit.gla) that maps it. */
struct cpu_emulate {
    uint64_t gfn, gla;
};

struct cpu_ctl {
    uint32_t flags;
    uint32_t ept_level; /* of the root: 4 or 5 (tdp), 4 or 3 (shadow; 3 = PAE, 4 entries) */
    uint64_t eptp;      /* host address of the root table: 512 SPTEs */
    uint32_t maxphyaddr;
    uint32_t insn_budget; /* exit EXIT_PREEMPTED after about so many instructions; 0: none */
    uint64_t mmio_gen, mmio_gen_mask;
    /* Writes the module wants to see although the frame is mapped read-only (READONLY slot,
     * write-protected guest page table): writes to these frames become MMIO writes for the one
     * next instruction.  A/D updates of guest page tables in them are left out.  Cleared when
     * the instruction retires. */
    uint32_t emulate_count;
    struct cpu_emulate emulate[CPU_NR_EMULATE];
    uint64_t cr0_valid, cr4_valid, efer_valid; /* bits the guest may set; others #GP */
    uint32_t cpuid[CPU_NR_CPUID];
    uint64_t xcr0_valid;
    uint64_t tsc_offset;
    uint64_t tsc_ratio;           /* 16.48 fixed point, 1 << 48 = host rate; 0 means 1 */
    uint64_t exception_bitmap;    /* vectors that exit instead of being delivered */
    struct cpu_event entry_event; /* taken by the next entry; not delivered: exit.idt_vectoring */
    uint64_t deadline; /* host TSC at which cpu_enter returns EXIT_PREEMPTED; 0: about 10 ms */
    /* Answer to the last EXIT_IO: elements in pio_data that an IN or INS may consume; for
     * OUT, pio_out_done makes the OUT that exited complete. Cleared when consumed. */
    uint32_t pio_count;
    uint32_t pio_pos; /* first element not consumed yet */
    uint32_t pio_out_done;
    uint32_t mmio_count; /* answers to EXIT_MMIO reads of the instruction being restarted */
    struct cpu_mmio mmio[CPU_NR_MMIO];
    uint8_t pio_data[CPU_PIO_DATA];
};

/* ---- exits ------------------------------------------------------------------------- */

enum cpu_exit_reason {
    EXIT_NONE = 0,
    EXIT_PREEMPTED, /* deadline reached, nothing to do */
    EXIT_KICK,      /* cpu_kick() or a pending, unblocked signal */
    EXIT_EXCEPTION, /* vector in exception_bitmap; intr_info and error_code, not delivered */
    EXIT_TRIPLE_FAULT,
    EXIT_IRQ_WINDOW,
    EXIT_NMI_WINDOW,
    EXIT_HLT,   /* rip after the HLT */
    EXIT_CPUID, /* at; finish with cpu_skip() */
    EXIT_RDMSR, /* at; index in rcx; cpu_skip() or inject */
    EXIT_WRMSR,
    EXIT_VMCALL,        /* at; qualification 0 = VMCALL, 1 = VMMCALL */
    EXIT_IO,            /* see exit.io */
    EXIT_MMIO_READ,     /* at; exit.mmio[0].gpa/len wanted */
    EXIT_MMIO_WRITE,    /* after; exit.mmio[0..mmio_count-1] written */
    EXIT_EPT_VIOLATION, /* at; gpa, gla, qualification CPU_EPT_* */
    EXIT_PAGE_FAULT,    /* at; shadow mode only: gla, error_code as of #PF, with CPU_PF_IMPLICIT */
    EXIT_CR_ACCESS, /* after (trap-like); qualification = CR number | CPU_CR3_NOFLUSH, gla = what it was before */
    EXIT_INVLPG,    /* after; gla; qualification 0 = INVLPG, 1 + type for INVPCID with gpa = PCID */
    EXIT_DR_ACCESS, /* at; qualification = DR number | write << 4 | gpr << 8 */
    EXIT_MTF,       /* after one instruction with CPU_SINGLE_STEP */
    EXIT_PAUSE,     /* after */
    EXIT_MONITOR,   /* at; cpu_skip() or inject */
    EXIT_MWAIT,     /* the same */
    EXIT_RSM,       /* at */
    EXIT_XSETBV,    /* at; cpu_skip() or inject */
    EXIT_HOST_FAULT, /* at; guest memory at host address `hva` is gone (SIGSEGV, SIGBUS) */
    EXIT_EMULATION, /* at; instruction cannot be executed: fetch from MMIO, MMIO in a descriptor table ... */
    EXIT_INVALID_STATE, /* entry refused, guest state no processor can hold; qualification says what */
    CPU_NR_EXITS
};

/* qualification of EXIT_EPT_VIOLATION, SDM vol. 3 27.2.1 table 27-7 */
#define CPU_EPT_READ 1
#define CPU_EPT_WRITE 2
#define CPU_EPT_FETCH 4
#define CPU_EPT_R 8 /* what the entry allowed */
#define CPU_EPT_W 0x10
#define CPU_EPT_X 0x20
#define CPU_EPT_GLA_VALID 0x80
#define CPU_EPT_GLA_FINAL 0x100 /* clear: the access was to a guest paging-structure entry */

/* qualification of EXIT_CR_ACCESS: CR3 was written with bit 63 set, nothing of its PCID was invalidated */
#define CPU_CR3_NOFLUSH 0x100

/* error_code of EXIT_PAGE_FAULT: an implicit supervisor access, which EFLAGS.AC does not help */
#define CPU_PF_IMPLICIT 0x80000000

struct cpu_exit_io {
    uint16_t port;
    uint8_t size; /* 1, 2, 4 */
    uint8_t in;
    uint8_t string;
    uint8_t rep;
    uint16_t pad;
    /* IN, INS: elements wanted, rip at.  OUT: 1 element in data, rip at (finish by setting
     * pio_out_done and cpu_complete()).  OUTS: 1 element in data, already committed. */
    uint32_t count;
    uint32_t data;
};

struct cpu_exit {
    uint32_t reason; /* enum cpu_exit_reason */
    uint32_t insn_len;
    uint64_t qualification;
    uint64_t gpa, gla, hva;
    uint32_t intr_info; /* CPU_EVENT_*, EXIT_EXCEPTION */
    uint32_t error_code;
    struct cpu_event idt_vectoring; /* the event whose delivery the exit interrupted */
    struct cpu_exit_io io;
    uint32_t mmio_count;
    uint32_t insn_bytes; /* how many of insn[] are valid */
    uint8_t insn[16];
    struct cpu_mmio mmio[CPU_NR_MMIO];
};

struct cpu_stats {
    uint64_t insns; /* retired */
    uint64_t blocks_built, blocks_flushed, tlb_fills, tlb_flushes, smc, walks;
    uint64_t exits[32];   /* of cpu_enter(), by enum cpu_exit_reason */
    uint64_t completed;   /* calls of cpu_complete() */
    uint64_t injected[8]; /* events at entry, by the type in cpu_event.info */
};

struct vmcs {
    struct cpu_guest guest;
    struct cpu_ctl ctl;
    struct cpu_exit exit;
    struct cpu_stats stats;
};

/* ---- operations ---------------------------------------------------------------------- */

struct cpu;

/* A processor in the state after reset, or NULL without memory. */
struct cpu *cpu_create(void);
void cpu_destroy(struct cpu *cpu);
struct vmcs *cpu_vmcs(struct cpu *cpu);
/* RESET (init = 0) or INIT (init = 1): SDM vol. 3 9.1.1 */
void cpu_reset(struct cpu *cpu, int init);

/* Runs the guest until something in enum cpu_exit_reason happens; returns exit.reason. */
int cpu_enter(struct cpu *cpu);
/* Executes the one instruction at rip with the answers in ctl (pio_*, mmio[], emulate[]):
 * no event is injected before it and no request looked at.  EXIT_NONE when it retired or the
 * exception it raised was delivered, else the exit it met.  A REP instruction goes on
 * until it needs another answer, retires, or has run for a while. */
int cpu_complete(struct cpu *cpu);
/* Retires the instruction of the last exit: rip += exit.insn_len, shadows cleared, TF. */
void cpu_skip(struct cpu *cpu);

/* Request bits, any thread. KICK leaves guest mode; FLUSH is done by the processor. */
#define CPU_REQ_KICK 1
#define CPU_REQ_FLUSH_TLB 2
#define CPU_REQ_FLUSH_CODE 4
void cpu_request(struct cpu *cpu, uint32_t bits);
void cpu_clear_kick(struct cpu *cpu);
/* Waits until the processor has seen every FLUSH request or is out of guest mode. */
void cpu_sync(struct cpu *cpu);
int cpu_in_guest(struct cpu *cpu);

/* Called by the module (never by the guest) while the processor is out. */
void cpu_flush_tlb(struct cpu *cpu);
/* Guest memory may have been written behind the processor's back: check code before use. */
void cpu_sync_code(struct cpu *cpu);
/* The module changed segments, control registers, EFER, CPUID words ...: derive modes anew. */
void cpu_state_changed(struct cpu *cpu);
/* Loads the PDPTEs from guest memory; 0, or -1 when one has reserved bits set, or -2 when
 * the table is not mapped (exit.gpa says where): map it and try again. */
int cpu_load_pdptrs(struct cpu *cpu);

/* Signals: the calling thread's blocked mask during guest execution is managed by the
 * module; the processor returns EXIT_KICK when one outside `mask` (8 bytes) is pending. */
void cpu_set_signal_mask(struct cpu *cpu, int check, uint64_t mask);
/* sigaction() for a client that must not take SIGSEGV and SIGBUS from the processor: reads and sets
 * what happens with faults that are not the guest's. Both are struct sigaction, or NULL. 1 when done;
 * 0 when the processor has not taken the signal yet and sigaction() itself is right. */
int cpu_guard_action(int sig, const void *action, void *old_action);

/* SPTE access from the module. */
uint64_t spte_read(const uint64_t *sptep);
void spte_write(uint64_t *sptep, uint64_t spte); /* entry not reachable by any processor yet */
uint64_t spte_xchg(uint64_t *sptep, uint64_t spte);
int spte_cmpxchg(uint64_t *sptep, uint64_t old_spte, uint64_t new_spte);
/* A zeroed table page, aligned to its size; NULL without memory. */
uint64_t *spt_alloc(void);
void spt_free(uint64_t *spt);

/* Clears `bits` in the entries of a table that `mask` (512 bits) names; all they were, ORed. */
uint64_t spt_clear_bits(uint64_t *spt, const uint64_t *mask, uint64_t bits);

/* 1 when [hva, hva+len) can be read (write=0) or written (write=1) by this process. */
int host_probe(uint64_t hva, uint64_t len, int write);
/* 1 when host_probe() just said 0 because the hardware cannot give the memory back (EHWPOISON). */
int host_poisoned(void);
/* Sends this thread the SIGBUS that the kernel sends for an access to such a page: BUS_MCEERR_AR. */
void host_send_hwpoison_signal(uint64_t hva);
/* 1 when nothing in [hva, hva+len) is unmapped; says nothing about rights, and touches nothing. */
int host_mapped(uint64_t hva, uint64_t len);
/* 1 when the page is in memory already: reading it would not have to wait. */
int host_resident(uint64_t hva);
/* An entry of a guest page table for the module; the memory may vanish at any time.  size is 4 or 8,
 * hva aligned to it.  gpte_read: 1, or 0 when nothing is there.  gpte_cmpxchg: 1 when exchanged, 0 when
 * it was another, -1 when nothing writable is there. */
int gpte_read(uint64_t hva, uint64_t *gpte, int size);
int gpte_cmpxchg(uint64_t hva, uint64_t old_gpte, uint64_t new_gpte, int size);
uint64_t host_tsc(void);

/* The bits of ctl.cpuid[word] that this host lets the guest have: vector instructions are
 * executed by the host's own, and clients look up the XSAVE area's layout in the host's CPUID. */
uint32_t cpu_host_features(int word);

/* Decoding without executing, for `pykvm insns`, tests and exit information.
 * bits: 16, 32, 64.  Returns the length, 0 when invalid, -1 when bytes are missing. */
int cpu_decode(const uint8_t *bytes, int nbytes, int bits, char *mnemonic, int mnemonic_size);

/* Row n of the instruction table for docs: NULL behind the last. "map opcode name forms" */
const char *cpu_insn_row(int n);
/* The CPUID bit that row n needs, as word << 5 | bit with the words of ctl.cpuid[]; -1: none. */
int cpu_insn_feature(int n);

#endif
