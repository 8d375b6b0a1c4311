/* SPDX-License-Identifier: MIT */
/*
 * System instructions: control and debug registers, MSRs, flags that need privilege, caches
 * and TLB, time stamps, and the instructions that mostly leave to the module.
 *
 * CPL 0 of the rows with O_CPL0 has been checked before a handler runs.
 */
#include "insns.h"
#include "segment.h"

/* An instruction that changed what decoding or the loop depend on is done. */
static int done_lookup(struct cpu *cpu, const struct insn *i)
{
    set_rip(cpu, next_rip(cpu, i));
    return LOOKUP;
}

/* ---- control registers ------------------------------------------------------------------------ */

#define CR0_DEFINED                                                                                \
    (X86_CR0_PE | X86_CR0_MP | X86_CR0_EM | X86_CR0_TS | X86_CR0_ET | X86_CR0_NE | X86_CR0_WP |    \
     X86_CR0_AM | X86_CR0_NW | X86_CR0_CD | X86_CR0_PG)
/* Changes of these bits make PAE paging read its PDPTEs again, and invalidate translations
 * (SDM vol. 3 4.4.1, 4.10.4.1). */
#define CR0_PDPTR_BITS (X86_CR0_PG | X86_CR0_CD | X86_CR0_NW)
#define CR4_PDPTR_BITS (X86_CR4_PAE | X86_CR4_PGE | X86_CR4_PSE | X86_CR4_SMEP)
#define CR0_TLB_BITS (X86_CR0_PG | X86_CR0_PE | X86_CR0_WP)
#define CR4_TLB_BITS                                                                               \
    (X86_CR4_PAE | X86_CR4_PGE | X86_CR4_PSE | X86_CR4_SMEP | X86_CR4_SMAP | X86_CR4_PKE |         \
     X86_CR4_PKS | X86_CR4_LA57 | X86_CR4_PCIDE | X86_CR4_LAM_SUP)

/* The PDPTEs at cr3; false: #GP, or an exit because the table is not mapped. */
static bool fetch_pdptrs(struct cpu *cpu, u64 cr3, u64 pdptr[4])
{
    int r = load_pdptrs(cpu, cr3, pdptr);

    if (r == -1)
        raise_gp(cpu, 0);
    return r == 0;
}

static bool check_cr0(struct cpu *cpu, u64 v)
{
    const struct cpu_guest *g = &GUEST(cpu);
    bool cs_l = is_lma(cpu) && g->seg[CPU_SEG_CS].ar & CPU_AR_L;

    if (v & ~CTL(cpu).cr0_valid)
        return false;
    if ((v & X86_CR0_PG && !(v & X86_CR0_PE)) || (v & X86_CR0_NW && !(v & X86_CR0_CD)))
        return false;
    if (!(v & X86_CR0_WP) && g->cr4 & X86_CR4_CET)
        return false;
    if (!(v & X86_CR0_PG))
        return !(g->cr0 & X86_CR0_PG) || !(cs_l || g->cr4 & X86_CR4_PCIDE);
    if (!(g->cr0 & X86_CR0_PG) && g->efer & EFER_LME)
        return g->cr4 & X86_CR4_PAE && !(g->seg[CPU_SEG_CS].ar & CPU_AR_L);
    return true;
}

bool write_cr0(struct cpu *cpu, u64 v)
{
    struct cpu_guest *g = &GUEST(cpu);
    u64 pdptr[4], changed;

    /* Reserved bits of the low half are ignored, those of the high half fault. */
    v = (v & (CR0_DEFINED | 0xffffffff00000000)) | X86_CR0_ET;
    if (!check_cr0(cpu, v))
        return raise_gp(cpu, 0);
    changed = g->cr0 ^ v;
    bool pae = v & X86_CR0_PG && g->cr4 & X86_CR4_PAE && !(g->efer & EFER_LME);
    if (pae && changed & CR0_PDPTR_BITS) {
        if (!fetch_pdptrs(cpu, g->cr3, pdptr))
            return false;
        memcpy(g->pdptr, pdptr, sizeof(pdptr));
    }
    if (changed & X86_CR0_PG)
        g->efer =
            v & X86_CR0_PG && g->efer & EFER_LME ? g->efer | EFER_LMA : g->efer & ~(u64)EFER_LMA;
    g->cr0 = v;
    if (changed & CR0_TLB_BITS)
        tlb_flush_guest(cpu);
    return true;
}

static u64 cr3_reserved(const struct cpu *cpu)
{
    u64 reserved;

    if (!is_lma(cpu))
        return 0xffffffff00000000;
    reserved = ~((1ull << cpu->vmcs.ctl.maxphyaddr) - 1);
    if (has_feature(cpu, CPU_CPUID_7_1_EAX, 26)) /* LAM */
        reserved &= ~(X86_CR3_LAM_U48 | X86_CR3_LAM_U57);
    return reserved;
}

bool write_cr3(struct cpu *cpu, u64 v)
{
    struct cpu_guest *g = &GUEST(cpu);
    u64 pdptr[4];

    /* The PCIDs of the guest share one TLB: a switch flushes whatever bit 63 says. */
    if (g->cr4 & X86_CR4_PCIDE)
        v &= ~X86_CR3_PCID_NOFLUSH;
    if (v & cr3_reserved(cpu))
        return raise_gp(cpu, 0);
    if (g->cr0 & X86_CR0_PG && g->cr4 & X86_CR4_PAE && !is_lma(cpu)) {
        if (!fetch_pdptrs(cpu, v, pdptr))
            return false;
        memcpy(g->pdptr, pdptr, sizeof(pdptr));
    }
    g->cr3 = v;
    tlb_flush_nonglobal(cpu);
    return true;
}

static bool check_cr4(struct cpu *cpu, u64 v)
{
    const struct cpu_guest *g = &GUEST(cpu);
    u64 changed = g->cr4 ^ v;

    if (v & ~CTL(cpu).cr4_valid)
        return false;
    if (is_lma(cpu) && (changed & X86_CR4_LA57 || !(v & X86_CR4_PAE)))
        return false;
    if (changed & v & X86_CR4_PCIDE && (!is_lma(cpu) || g->cr3 & X86_CR3_PCID_MASK))
        return false;
    return !(v & X86_CR4_CET) || g->cr0 & X86_CR0_WP;
}

bool write_cr4(struct cpu *cpu, u64 v)
{
    struct cpu_guest *g = &GUEST(cpu);
    u64 pdptr[4], changed = g->cr4 ^ v;

    if (!check_cr4(cpu, v))
        return raise_gp(cpu, 0);
    bool pae = g->cr0 & X86_CR0_PG && v & X86_CR4_PAE && !is_lma(cpu);
    if (pae && changed & CR4_PDPTR_BITS) {
        if (!fetch_pdptrs(cpu, g->cr3, pdptr))
            return false;
        memcpy(g->pdptr, pdptr, sizeof(pdptr));
    }
    g->cr4 = v;
    if (changed & CR4_TLB_BITS)
        tlb_flush_guest(cpu);
    return true;
}

static bool write_cr8(struct cpu *cpu, u64 v)
{
    if (v > 15)
        return raise_gp(cpu, 0);
    GUEST(cpu).cr8 = v;
    return true;
}

/* Whether the module is told of this write. */
static bool cr_exits(const struct cpu *cpu, unsigned cr, u64 old)
{
    const struct vmcs *v = &cpu->vmcs;

    switch (cr) {
    case 0: return v->ctl.flags & CPU_EXIT_CR0_CR4 && v->guest.cr0 != old;
    case 3: return v->ctl.flags & CPU_EXIT_CR3;
    case 4: return v->ctl.flags & CPU_EXIT_CR0_CR4 && v->guest.cr4 != old;
    default:
        return v->ctl.flags & CPU_EXIT_CR8_ALL ||
               (v->ctl.flags & CPU_EXIT_CR8 && v->guest.cr8 < old);
    }
}

static u64 register_operand(struct cpu *cpu, const struct insn *i)
{
    return reg_read(cpu, i->dst, i->flags & I_CODE64 ? 8 : 4);
}

/* Bit 63 of what MOV CR3 wrote, where PCIDs give it a meaning. */
static bool is_cr3_noflush(struct cpu *cpu, const struct insn *i)
{
    return GUEST(cpu).cr4 & X86_CR4_PCIDE && register_operand(cpu, i) & X86_CR3_PCID_NOFLUSH;
}

/* A control register was written: serializing, and maybe another mode. */
static int cr_written(struct cpu *cpu, const struct insn *i, unsigned cr, u64 old)
{
    set_rip(cpu, next_rip(cpu, i));
    if (cr != 8) /* CR8 is the one that does not serialize */
        serialize(cpu);
    if (!cr_exits(cpu, cr, old))
        return LOOKUP;
    int status = vmexit_done(cpu, i, EXIT_CR_ACCESS);
    EXIT(cpu).qualification = cr | (cr == 3 && is_cr3_noflush(cpu, i)) * CPU_CR3_NOFLUSH;
    EXIT(cpu).gla = old;
    return status;
}

int x_mov_cr_r(struct cpu *cpu, const struct insn *i)
{
    struct cpu_guest *g = &GUEST(cpu);
    u64 v = register_operand(cpu, i), old;
    bool ok;

    switch (i->src) {
    case 0:
        old = g->cr0;
        ok = write_cr0(cpu, v);
        break;
    case 2: g->cr2 = v; return done_lookup(cpu, i);
    case 3:
        old = g->cr3;
        ok = write_cr3(cpu, v);
        break;
    case 4:
        old = g->cr4;
        ok = write_cr4(cpu, v);
        break;
    case 8:
        old = g->cr8;
        ok = write_cr8(cpu, v);
        break;
    default: return x_ud(cpu, i);
    }
    return ok ? cr_written(cpu, i, i->src, old) : stop(cpu, i);
}

int x_mov_r_cr(struct cpu *cpu, const struct insn *i)
{
    const struct cpu_guest *g = &GUEST(cpu);
    u64 v;

    switch (i->src) {
    case 0: v = g->cr0; break;
    case 2: v = g->cr2; break;
    case 3: v = g->cr3; break;
    case 4: v = g->cr4; break;
    case 8: v = g->cr8; break;
    default: return x_ud(cpu, i);
    }
    reg_write(cpu, i->dst, i->flags & I_CODE64 ? 8 : 4, v);
    NEXT(cpu, i);
}

int x_lmsw(struct cpu *cpu, const struct insn *i)
{
    u64 old = GUEST(cpu).cr0, v;

    if (!rm_read(cpu, i, i->dst, 2, &v))
        return stop(cpu, i);
    /* PE, MP, EM and TS, but PE is never cleared. */
    if (!write_cr0(cpu, (old & ~0xeull) | (v & 0xf)))
        return stop(cpu, i);
    return cr_written(cpu, i, 0, old);
}

int x_smsw(struct cpu *cpu, const struct insn *i)
{
    if (GUEST(cpu).cr4 & X86_CR4_UMIP && cpu->cpl > 0)
        return fault_gp(cpu, i, 0);
    if (!rm_write(cpu, i, i->dst, i->flags & I_MEM ? 2 : i->opsize, GUEST(cpu).cr0))
        return stop(cpu, i);
    NEXT(cpu, i);
}

int x_clts(struct cpu *cpu, const struct insn *i)
{
    u64 old = GUEST(cpu).cr0;

    GUEST(cpu).cr0 = old & ~(u64)X86_CR0_TS;
    return cr_written(cpu, i, 0, old);
}

/* ---- debug registers ---------------------------------------------------------------------------- */

#define DR6_VOLATILE (DR6_B0 | DR6_B1 | DR6_B2 | DR6_B3 | DR6_BD | DR6_BS | DR6_BT)

/* Number of the register MOV DR names, or -1 with cpu->stop set. */
static int dr_number(struct cpu *cpu, const struct insn *i, bool write)
{
    unsigned dr = i->src;

    if (dr > 7 || ((dr == 4 || dr == 5) && GUEST(cpu).cr4 & X86_CR4_DE)) {
        raise_ud(cpu);
        return -1;
    }
    if (CTL(cpu).flags & CPU_EXIT_DR) { /* before #DB, as on VMX */
        raise_exit(cpu, EXIT_DR_ACCESS);
        EXIT(cpu).qualification = dr | (unsigned)write << 4 | (u64)(i->dst / 8) << 8;
        return -1;
    }
    if (GUEST(cpu).dr7 & DR7_GD) {
        raise_db(cpu, DR6_BD);
        return -1;
    }
    return (int)(dr == 4 || dr == 5 ? dr + 2 : dr);
}

int x_mov_r_dr(struct cpu *cpu, const struct insn *i)
{
    const struct cpu_guest *g = &GUEST(cpu);
    int dr = dr_number(cpu, i, false);

    if (dr < 0)
        return stop(cpu, i);
    reg_write(cpu, i->dst, i->flags & I_CODE64 ? 8 : 4,
              dr < 4    ? g->dr[dr]
              : dr == 6 ? g->dr6
                        : g->dr7);
    NEXT(cpu, i);
}

int x_mov_dr_r(struct cpu *cpu, const struct insn *i)
{
    struct cpu_guest *g = &GUEST(cpu);
    u64 v = register_operand(cpu, i);
    int dr = dr_number(cpu, i, true);

    if (dr < 0)
        return stop(cpu, i);
    if (dr >= 6 && v >> 32)
        return fault_gp(cpu, i, 0);
    if (dr < 4)
        g->dr[dr] = v;
    else if (dr == 6) /* without RTM and bus-lock detection their bits stay 1 */
        g->dr6 = (v & DR6_VOLATILE) | DR6_ACTIVE_LOW;
    else
        g->dr7 = (v & DR7_VOLATILE) | DR7_FIXED_1;
    tlb_breakpoints(cpu);
    serialize(cpu);
    return done_lookup(cpu, i);
}

/* ---- MSRs ------------------------------------------------------------------------------------------ */

static bool has_tsc_aux(const struct cpu *cpu)
{
    return has_feature(cpu, CPU_CPUID_8000_0001_EDX, CPUID_80000001_EDX_RDTSCP) ||
           has_feature(cpu, CPU_CPUID_7_ECX, CPUID_7_ECX_RDPID);
}

/* MSRs that are nothing but state of the processor; every other one is the module's. */
static u64 *own_msr(struct cpu *cpu, u32 index)
{
    struct cpu_guest *g = &GUEST(cpu);

    if (CTL(cpu).flags & CPU_EXIT_MSR_ALL)
        return NULL;
    switch (index) {
    case MSR_FS_BASE: return &g->seg[CPU_SEG_FS].base;
    case MSR_GS_BASE: return &g->seg[CPU_SEG_GS].base;
    case MSR_KERNEL_GS_BASE: return &g->kernel_gs_base;
    case MSR_STAR: return &g->star;
    case MSR_LSTAR: return &g->lstar;
    case MSR_CSTAR: return &g->cstar;
    case MSR_SYSCALL_MASK: return &g->sfmask;
    case MSR_IA32_SYSENTER_CS: return &g->sysenter_cs;
    case MSR_IA32_SYSENTER_ESP: return &g->sysenter_esp;
    case MSR_IA32_SYSENTER_EIP: return &g->sysenter_eip;
    case MSR_TSC_AUX: return has_tsc_aux(cpu) ? &g->tsc_aux : NULL;
    default: return NULL;
    }
}

static bool is_valid_msr_value(const struct cpu *cpu, u32 index, u64 v)
{
    switch (index) {
    case MSR_FS_BASE:
    case MSR_GS_BASE:
    case MSR_KERNEL_GS_BASE:
    case MSR_LSTAR:
    case MSR_CSTAR:
    case MSR_IA32_SYSENTER_ESP:
    case MSR_IA32_SYSENTER_EIP: return is_canonical(cpu, v);
    case MSR_TSC_AUX: return !(v >> 32);
    default: return true;
    }
}

/* Result in EDX:EAX, as all that return 64 bits in two registers. */
static void set_edx_eax(struct cpu *cpu, u64 v)
{
    GPR(cpu, RAX) = (u32)v;
    GPR(cpu, RDX) = v >> 32;
}

int x_rdmsr(struct cpu *cpu, const struct insn *i)
{
    u32 index = (u32)GPR(cpu, RCX);
    const u64 *msr = own_msr(cpu, index);

    if (msr)
        set_edx_eax(cpu, *msr);
    else if (index == MSR_IA32_TSC && !(CTL(cpu).flags & CPU_EXIT_MSR_ALL))
        set_edx_eax(cpu, guest_tsc(cpu));
    else
        return vmexit(cpu, i, EXIT_RDMSR);
    NEXT(cpu, i);
}

int x_wrmsr(struct cpu *cpu, const struct insn *i)
{
    u32 index = (u32)GPR(cpu, RCX);
    u64 v = GPR(cpu, RDX) << 32 | (u32)GPR(cpu, RAX);
    u64 *msr = own_msr(cpu, index);

    if (!msr)
        return vmexit(cpu, i, EXIT_WRMSR);
    if (!is_valid_msr_value(cpu, index, v))
        return fault_gp(cpu, i, 0);
    *msr = v;
    serialize(cpu);
    return done_lookup(cpu, i);
}

/* ---- time and identification -------------------------------------------------------------------------- */

u64 guest_tsc(struct cpu *cpu)
{
    const struct cpu_ctl *c = &CTL(cpu);
    u64 tsc;

    if (c->flags & CPU_NO_HOST_TSC)
        tsc = cpu->insns_at_entry - (u64)cpu->budget;
    else
        tsc = host_tsc();
    if (c->tsc_ratio)
        tsc = (u64)((u128)tsc * c->tsc_ratio >> 48);
    return tsc + c->tsc_offset;
}

static bool tsc_allowed(const struct cpu *cpu)
{
    return cpu->cpl == 0 || !(cpu->vmcs.guest.cr4 & X86_CR4_TSD);
}

int x_rdtsc(struct cpu *cpu, const struct insn *i)
{
    if (!tsc_allowed(cpu))
        return fault_gp(cpu, i, 0);
    set_edx_eax(cpu, guest_tsc(cpu));
    NEXT(cpu, i);
}

int x_rdtscp(struct cpu *cpu, const struct insn *i)
{
    if (!tsc_allowed(cpu))
        return fault_gp(cpu, i, 0);
    set_edx_eax(cpu, guest_tsc(cpu));
    GPR(cpu, RCX) = (u32)GUEST(cpu).tsc_aux;
    NEXT(cpu, i);
}

int x_rdpid(struct cpu *cpu, const struct insn *i)
{
    reg_write(cpu, i->dst, 8, (u32)GUEST(cpu).tsc_aux);
    NEXT(cpu, i);
}

/* No performance counter exists, so that every index is invalid. */
int x_rdpmc(struct cpu *cpu, const struct insn *i) { return fault_gp(cpu, i, 0); }

int x_cpuid(struct cpu *cpu, const struct insn *i) { return vmexit(cpu, i, EXIT_CPUID); }

/* ---- flags ----------------------------------------------------------------------------------------------- */

static bool may_change_if(const struct cpu *cpu) { return cpu->cpl <= iopl(cpu); }

/* Whether CLI and STI, not being allowed to change IF, change VIF: SDM vol. 3 20.3, 20.4. */
static bool has_virtual_if(const struct cpu *cpu)
{
    u64 enable = is_vm86(cpu) ? X86_CR4_VME : X86_CR4_PVI;

    return cpu->cpl == 3 && cpu->vmcs.guest.cr4 & enable;
}

u64 vme_flags(const struct cpu *cpu)
{
    u64 flags = get_rflags(cpu);
    u64 virtual_if = flags & X86_EFLAGS_VIF ? X86_EFLAGS_IF : 0;

    return (flags & ~(u64)X86_EFLAGS_IF) | X86_EFLAGS_IOPL | virtual_if;
}

bool vme_load_flags(struct cpu *cpu, u64 flags)
{
    u64 mask = STATUS_FLAGS | X86_EFLAGS_DF | X86_EFLAGS_NT;
    u64 old = get_rflags(cpu);

    if (flags & X86_EFLAGS_TF || (flags & X86_EFLAGS_IF && old & X86_EFLAGS_VIP))
        return raise_gp(cpu, 0);
    u64 vif = flags & X86_EFLAGS_IF ? X86_EFLAGS_VIF : 0;
    u64 clear = mask | X86_EFLAGS_TF | X86_EFLAGS_RF | X86_EFLAGS_VIF;
    set_rflags(cpu, (old & ~clear) | (flags & mask) | vif);
    return true;
}

int x_cli(struct cpu *cpu, const struct insn *i)
{
    bool virtual = !may_change_if(cpu);

    if (virtual && !has_virtual_if(cpu))
        return fault_gp(cpu, i, 0);
    GUEST(cpu).rflags &= ~(u64)(virtual ? X86_EFLAGS_VIF : X86_EFLAGS_IF);
    NEXT(cpu, i);
}

/* An interrupt that waits (VIP) is the supervisor's business. */
static int sti_virtual(struct cpu *cpu, const struct insn *i)
{
    if (!has_virtual_if(cpu) || GUEST(cpu).rflags & X86_EFLAGS_VIP)
        return fault_gp(cpu, i, 0);
    GUEST(cpu).rflags |= X86_EFLAGS_VIF;
    NEXT(cpu, i);
}

int x_sti(struct cpu *cpu, const struct insn *i)
{
    struct cpu_guest *g = &GUEST(cpu);

    if (!may_change_if(cpu))
        return sti_virtual(cpu, i);
    if (g->rflags & X86_EFLAGS_IF)
        NEXT(cpu, i);
    g->rflags |= X86_EFLAGS_IF;
    g->interruptibility |= CPU_BLOCK_STI;
    return done_lookup(cpu, i);
}

int x_pushf(struct cpu *cpu, const struct insn *i)
{
    u64 hidden = X86_EFLAGS_VM | X86_EFLAGS_RF;
    u64 rsp = GPR(cpu, RSP);
    bool virtual = is_vm86(cpu) && iopl(cpu) < 3;

    if (virtual && !(has_vme(cpu) && i->opsize == 2))
        return fault_gp(cpu, i, 0);
    u64 flags = virtual ? vme_flags(cpu) : get_rflags(cpu);
    if (!push_at(cpu, &rsp, i->opsize, flags & ~hidden))
        return stop(cpu, i);
    GPR(cpu, RSP) = rsp;
    NEXT(cpu, i);
}

/* VM, VIF and VIP never change; the pop clears RF. */
static u64 popf_mask(const struct cpu *cpu, unsigned size)
{
    u64 mask = STATUS_FLAGS | X86_EFLAGS_TF | X86_EFLAGS_DF | X86_EFLAGS_NT;

    if (size > 2)
        mask |= X86_EFLAGS_AC | X86_EFLAGS_ID;
    if (may_change_if(cpu))
        mask |= X86_EFLAGS_IF;
    if (cpu->cpl == 0)
        mask |= X86_EFLAGS_IOPL;
    return mask;
}

/* AC selects the rights of kernel accesses to user pages, and nothing else update_mode() sees. */
static void ac_changed(struct cpu *cpu) { cpu->tlb = &cpu->ctx[tlb_context(cpu, false)]; }

static int popf_vme(struct cpu *cpu, const struct insn *i)
{
    u64 rsp = GPR(cpu, RSP), v;

    if (!has_vme(cpu) || i->opsize != 2)
        return fault_gp(cpu, i, 0);
    if (!pop_at(cpu, &rsp, 2, &v) || !vme_load_flags(cpu, v))
        return stop(cpu, i);
    GPR(cpu, RSP) = rsp;
    return done_lookup(cpu, i);
}

int x_popf(struct cpu *cpu, const struct insn *i)
{
    u64 rsp = GPR(cpu, RSP), old = get_rflags(cpu), v, changed;

    if (is_vm86(cpu) && iopl(cpu) < 3)
        return popf_vme(cpu, i);
    if (!pop_at(cpu, &rsp, i->opsize, &v))
        return stop(cpu, i);
    u64 mask = popf_mask(cpu, i->opsize);
    v = ((old & ~mask) | (v & mask)) & ~(u64)X86_EFLAGS_RF;
    GPR(cpu, RSP) = rsp;
    set_rflags(cpu, v);
    changed = (v ^ old) & (X86_EFLAGS_IF | X86_EFLAGS_TF | X86_EFLAGS_AC | X86_EFLAGS_RF);
    if (!changed)
        NEXT(cpu, i);
    ac_changed(cpu);
    return done_lookup(cpu, i);
}

static int set_ac(struct cpu *cpu, const struct insn *i, u64 ac)
{
    if (cpu->cpl != 0) /* #UD, not #GP */
        return x_ud(cpu, i);
    GUEST(cpu).rflags = (GUEST(cpu).rflags & ~(u64)X86_EFLAGS_AC) | ac;
    ac_changed(cpu);
    NEXT(cpu, i);
}

int x_clac(struct cpu *cpu, const struct insn *i) { return set_ac(cpu, i, 0); }
int x_stac(struct cpu *cpu, const struct insn *i) { return set_ac(cpu, i, X86_EFLAGS_AC); }

/* ---- TLB and caches --------------------------------------------------------------------------------------- */

/* A translation was invalidated: the module of a shadow MMU wants to know. */
static int invalidated(struct cpu *cpu, const struct insn *i, u64 la, u64 pcid, u64 qualification)
{
    serialize(cpu);
    set_rip(cpu, next_rip(cpu, i));
    if (!(CTL(cpu).flags & CPU_EXIT_INVLPG))
        return LOOKUP;
    int status = vmexit_done(cpu, i, EXIT_INVLPG);
    EXIT(cpu).gla = la;
    EXIT(cpu).gpa = pcid;
    EXIT(cpu).qualification = qualification;
    return status;
}

/* Linear address without the checks of an access: INVLPG faults on nothing. */
static u64 unchecked_linear(const struct cpu *cpu, const struct insn *i)
{
    if (i->flags & I_CODE64)
        return ea_offset(cpu, i) + cpu->seg_base[i->seg];
    return (u32)(ea_offset(cpu, i) + SEG(cpu, i->seg).base);
}

int x_invlpg(struct cpu *cpu, const struct insn *i)
{
    u64 la = unchecked_linear(cpu, i);

    if (!is_canonical(cpu, la))
        return done_lookup(cpu, i);
    tlb_invlpg(cpu, la);
    return invalidated(cpu, i, la, 0, 0);
}

enum { INVPCID_ADDRESS, INVPCID_SINGLE, INVPCID_ALL_GLOBAL, INVPCID_ALL };

int x_invpcid(struct cpu *cpu, const struct insn *i)
{
    u64 type = reg_read(cpu, i->src, i->flags & I_CODE64 ? 8 : 4), la, pcid, address;

    if (type > INVPCID_ALL)
        return fault_gp(cpu, i, 0);
    if (!ea_linear(cpu, i, 16, ACC_READ, &la) || !ld64(cpu, la, &pcid, ea_access(i)) ||
        !ld64(cpu, la + 8, &address, ea_access(i)))
        return stop(cpu, i);
    if (pcid & ~X86_CR3_PCID_MASK)
        return fault_gp(cpu, i, 0);
    if (type <= INVPCID_SINGLE && pcid && !(GUEST(cpu).cr4 & X86_CR4_PCIDE))
        return fault_gp(cpu, i, 0);
    if (type == INVPCID_ADDRESS && !is_canonical(cpu, address))
        return fault_gp(cpu, i, 0);
    /* One TLB for all PCIDs, and only the current one's translations are in it. */
    if (type == INVPCID_ADDRESS)
        tlb_invlpg(cpu, address);
    else if (type == INVPCID_ALL_GLOBAL)
        tlb_flush_guest(cpu);
    else
        tlb_flush_nonglobal(cpu);
    return invalidated(cpu, i, type == INVPCID_ADDRESS ? address : 0, pcid, 1 + type);
}

/* Memory is coherent: nothing to write back. Both serialize. */
int x_invd(struct cpu *cpu, const struct insn *i)
{
    serialize(cpu);
    return done_lookup(cpu, i);
}

int x_wbinvd(struct cpu *cpu, const struct insn *i) { return x_invd(cpu, i); }

/* CLFLUSH, CLFLUSHOPT, CLWB: translate the address as a read would, and touch nothing. */
static int check_line(struct cpu *cpu, const struct insn *i)
{
    struct translation t;
    u64 la;

    if (!ea_linear(cpu, i, 1, ACC_READ, &la))
        return stop(cpu, i);
    if (cpu->tlb->r[TLB_INDEX(la)].tag == (la & PAGE_MASK))
        NEXT(cpu, i);
    if (i->flags & I_CODE64 && !is_canonical(cpu, la)) {
        (void)(ea_access(i) ? raise_ss(cpu, 0) : raise_gp(cpu, 0));
        return stop(cpu, i);
    }
    if (!walk_linear(cpu, la, ACC_READ, cpu->cpl == 3, &t))
        return stop(cpu, i);
    NEXT(cpu, i);
}

int x_clflush(struct cpu *cpu, const struct insn *i) { return check_line(cpu, i); }
int x_clflushopt(struct cpu *cpu, const struct insn *i) { return check_line(cpu, i); }
int x_clwb(struct cpu *cpu, const struct insn *i) { return check_line(cpu, i); }

int x_mfence(struct cpu *cpu, const struct insn *i)
{
    atomic_thread_fence(memory_order_seq_cst);
    NEXT(cpu, i);
}

/* The host keeps loads in order with loads and stores with stores, as the guest expects. */
int x_lfence(struct cpu *cpu, const struct insn *i)
{
    atomic_thread_fence(memory_order_acquire);
    NEXT(cpu, i);
}

int x_sfence(struct cpu *cpu, const struct insn *i)
{
    atomic_thread_fence(memory_order_release);
    NEXT(cpu, i);
}

int x_serialize(struct cpu *cpu, const struct insn *i)
{
    atomic_thread_fence(memory_order_seq_cst);
    serialize(cpu);
    return done_lookup(cpu, i);
}

int x_nop(struct cpu *cpu, const struct insn *i) { NEXT(cpu, i); }
int x_prefetch(struct cpu *cpu, const struct insn *i) { NEXT(cpu, i); }

/* ---- leaving to the module ------------------------------------------------------------------------------------ */

/* There is nowhere to wait inside the processor: HLT always leaves. */
int x_hlt(struct cpu *cpu, const struct insn *i)
{
    set_rip(cpu, next_rip(cpu, i));
    return vmexit_done(cpu, i, EXIT_HLT);
}

int x_pause(struct cpu *cpu, const struct insn *i)
{
    if (CTL(cpu).flags & CPU_EXIT_PAUSE) {
        set_rip(cpu, next_rip(cpu, i));
        return vmexit_done(cpu, i, EXIT_PAUSE);
    }
    __builtin_ia32_pause();
    NEXT(cpu, i);
}

int x_vmcall(struct cpu *cpu, const struct insn *i) { return vmexit(cpu, i, EXIT_VMCALL); }

int x_vmmcall(struct cpu *cpu, const struct insn *i)
{
    int status = vmexit(cpu, i, EXIT_VMCALL);

    EXIT(cpu).qualification = 1;
    return status;
}

int x_rsm(struct cpu *cpu, const struct insn *i) { return vmexit(cpu, i, EXIT_RSM); }

/* MONITOR and MWAIT: #UD, an exit, or a NOP, as the module says. */
static int monitor_mwait(struct cpu *cpu, const struct insn *i, u32 reason)
{
    bool offered = has_feature(cpu, CPU_CPUID_1_ECX, CPUID_1_ECX_MONITOR);

    if (cpu->cpl != 0 || (CTL(cpu).flags & CPU_MWAIT_UD && !offered))
        return x_ud(cpu, i);
    if (CTL(cpu).flags & CPU_EXIT_MWAIT)
        return vmexit(cpu, i, reason);
    NEXT(cpu, i);
}

int x_monitor(struct cpu *cpu, const struct insn *i) { return monitor_mwait(cpu, i, EXIT_MONITOR); }
int x_mwait(struct cpu *cpu, const struct insn *i) { return monitor_mwait(cpu, i, EXIT_MWAIT); }

/* ---- extended state and protection keys -------------------------------------------------------------------------- */

int x_xgetbv(struct cpu *cpu, const struct insn *i)
{
    const struct cpu_guest *g = &GUEST(cpu);
    u32 index = (u32)GPR(cpu, RCX);

    if (!(g->cr4 & X86_CR4_OSXSAVE))
        return x_ud(cpu, i);
    if (index == 0)
        set_edx_eax(cpu, g->xcr0);
    else if (index == 1 && has_feature(cpu, CPU_CPUID_D_1_EAX, CPUID_D_1_EAX_XGETBV1))
        set_edx_eax(cpu, g->xcr0 & fpu_xinuse(cpu));
    else
        return fault_gp(cpu, i, 0);
    NEXT(cpu, i);
}

int x_xsetbv(struct cpu *cpu, const struct insn *i)
{
    if (!(GUEST(cpu).cr4 & X86_CR4_OSXSAVE)) /* undefined before it is privileged */
        return x_ud(cpu, i);
    if (cpu->cpl != 0)
        return fault_gp(cpu, i, 0);
    return vmexit(cpu, i, EXIT_XSETBV);
}

int x_rdpkru(struct cpu *cpu, const struct insn *i)
{
    if (!(GUEST(cpu).cr4 & X86_CR4_PKE))
        return x_ud(cpu, i);
    if ((u32)GPR(cpu, RCX))
        return fault_gp(cpu, i, 0);
    set_edx_eax(cpu, GUEST(cpu).pkru);
    NEXT(cpu, i);
}

int x_wrpkru(struct cpu *cpu, const struct insn *i)
{
    u32 pkru = (u32)GPR(cpu, RAX);

    if (!(GUEST(cpu).cr4 & X86_CR4_PKE))
        return x_ud(cpu, i);
    if ((u32)GPR(cpu, RCX) || (u32)GPR(cpu, RDX))
        return fault_gp(cpu, i, 0);
    if (GUEST(cpu).pkru != pkru) { /* its rights are part of every TLB entry */
        GUEST(cpu).pkru = pkru;
        tlb_flush_guest(cpu);
    }
    NEXT(cpu, i);
}

/* ---- I/O permission ------------------------------------------------------------------------------------------------- */

bool io_allowed(struct cpu *cpu, u16 port, unsigned size)
{
    const struct cpu_seg *tr = &SEG(cpu, CPU_SEG_TR);
    u32 mask = ((1u << size) - 1) << (port & 7);
    u16 map, bits;

    if (!is_pe(cpu) || (!is_vm86(cpu) && may_change_if(cpu)))
        return true;
    if ((tr->ar & CPU_AR_TYPE & ~2u) != DESC_TSS_AVAILABLE || tr->limit < 103)
        return raise_gp(cpu, 0);
    if (!system_read(cpu, table_linear(cpu, tr->base + 102), &map, 2))
        return false;
    if (map + port / 8 + 1u > tr->limit)
        return raise_gp(cpu, 0);
    if (!system_read(cpu, table_linear(cpu, tr->base + map + port / 8), &bits, 2))
        return false;
    return !(bits & mask) || raise_gp(cpu, 0);
}
