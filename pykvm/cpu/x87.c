/* SPDX-License-Identifier: MIT */
/*
 * x87: every computation is done by the host's x87 on the guest's own state.
 *
 * From its first x87 instruction after an entry on, the guest's registers, control and status
 * word are in the host's FPU (cpu->fpu_where).  A guest instruction is then that very
 * instruction, called as a stub; a memory operand is guest memory itself where the TLB has it.
 * So results, condition codes, stack faults, and what unmasked exceptions leave undone are the
 * host's.  What remains is done here: FOP, FIP and FDP, the images of FNSTENV and its kin, and
 * #MF.  Nothing else in the core may use the host's x87.
 *
 * A stub may leave an exception pending in the host's FPU (FCW is the guest's).  It is never
 * raised there, since before each waiting instruction of the guest the status word is looked at.
 *
 * Choices where processors differ:
 *   - An exception pending is #MF whatever CR0.NE says: FERR# and IGNNE# are not modelled, nor
 *     are they under VMX, which keeps CR0.NE set (SDM vol. 3 A.7).
 *   - FOP, FIP and FDP are those of the last non-control instruction (with a memory operand, for
 *     FDP), not only of those that raise an exception.
 *   - FCS and FDS are zero, as CPUID.7.EBX bit 13 says.
 *
 * Source: SDM vol. 1 chapter 8, vol. 2 instruction pages; AMD APM vol. 1 chapter 6.
 */
#include "fpu.h"

/* ---- stubs --------------------------------------------------------------------------------------- */

/* One for each opcode: with registers, and with the memory operand at (%rdi). */
extern const u8 x87_reg_stubs[] __attribute__((visibility("hidden")));
extern const u8 x87_mem_stubs[] __attribute__((visibility("hidden")));
__asm__(".pushsection .text\n"
        ".globl x87_reg_stubs, x87_mem_stubs\n.hidden x87_reg_stubs, x87_mem_stubs\n"
        ".balign 64\nx87_reg_stubs:\n"
        ".set .Lop, 0xd8\n.rept 8\n"
        ".set .Lmodrm, 0xc0\n.rept 64\n.byte .Lop, .Lmodrm, 0xc3, 0xcc\n"
        ".set .Lmodrm, .Lmodrm + 1\n.endr\n.set .Lop, .Lop + 1\n.endr\n"
        "x87_mem_stubs:\n"
        ".set .Lop, 0xd8\n.rept 8\n"
        ".set .Lmodrm, 0x07\n.rept 8\n.byte .Lop, .Lmodrm, 0xc3, 0xcc\n"
        ".set .Lmodrm, .Lmodrm + 8\n.endr\n.set .Lop, .Lop + 1\n.endr\n"
        ".popsection\n");

typedef void (*stub_fn)(void *operand);

/* insn.imm: bits 10:8 low bits of the first opcode byte, 7:0 ModRM */
static ALWAYS_INLINE stub_fn reg_stub(const struct insn *i)
{
    size_t n = (i->imm >> 8) * 64 + (i->imm & 63);
    return (stub_fn)(uintptr_t)(x87_reg_stubs + n * 4);
}
static ALWAYS_INLINE stub_fn mem_stub(const struct insn *i)
{
    size_t n = (i->imm >> 8) * 8 + (i->imm >> 3 & 7);
    return (stub_fn)(uintptr_t)(x87_mem_stubs + n * 4);
}

/* With RFLAGS: status flags in and out. */
static u64 call_with_flags(stub_fn stub, u64 status)
{
    u64 flags = status | X86_EFLAGS_FIXED | X86_EFLAGS_IF;
    __asm__ volatile("lea -128(%%rsp), %%rsp\n\t" /* below is the red zone */
                     "push %[flags]\n\tpopfq\n\t"
                     "call *%[stub]\n\t"
                     "pushfq\n\tpop %[flags]\n\t"
                     "lea 128(%%rsp), %%rsp"
                     : [flags] "+r"(flags)
                     : [stub] "r"(stub)
                     : "memory", "cc");
    return flags & STATUS_FLAGS;
}

/* ---- the state, in memory and in the host's FPU ---------------------------------------------------- */

/* What FNSAVE stores and FRSTOR loads: the 32-bit protected-mode format. */
struct x87_image {
    u32 fcw, fsw, ftw, fip, fcs_fop, fdp, fds;
    u8 st[8][10];
} __attribute__((packed));
_Static_assert(sizeof(struct x87_image) == 108, "SDM vol. 1 figure 8-9");

#define TAG_EMPTY 3u

static u32 expand_tags(u8 ftw, u32 tag_of_full)
{
    u32 tags = 0;
    for (unsigned r = 0; r < 8; r++)
        tags |= (ftw >> r & 1 ? tag_of_full : TAG_EMPTY) << 2 * r;
    return tags;
}

static u8 abridge_tags(u32 tags)
{
    u32 ftw = 0;
    for (unsigned r = 0; r < 8; r++)
        ftw |= (u32)((tags >> 2 * r & 3) != TAG_EMPTY) << r;
    return (u8)ftw;
}

static inline u16 host_fsw(void)
{
    u16 fsw;
    __asm__ volatile("fnstsw %0" : "=a"(fsw));
    return fsw;
}

static inline u16 host_fcw(void)
{
    u16 fcw;
    __asm__ volatile("fnstcw %0" : "=m"(fcw));
    return fcw;
}

static inline void set_host_fcw(u16 fcw) { __asm__ volatile("fldcw %0" : : "m"(fcw)); }

static inline bool is_in_host(const struct cpu *cpu) { return cpu->fpu_where >= FPU_HOST_UNMASKED; }

static enum fpu_where host_state_for(u16 fcw)
{
    return (fcw & FCW_MASKS) == FCW_MASKS ? FPU_HOST : FPU_HOST_UNMASKED;
}

void fpu_normalize(struct cpu_fpu *f)
{
    f->fcw = (f->fcw & FCW_DEFINED) | FCW_FIXED;
    f->fsw &= ~(FSW_ES | FSW_B);
    if (fpu_is_pending(f))
        f->fsw |= FSW_ES | FSW_B;
}

void fpu_set_top(struct cpu_fpu *f, unsigned top)
{
    unsigned move = top - fpu_top(f);
    u8 st[8][16];

    if (!move)
        return;
    memcpy(st, f->st, sizeof(st));
    for (unsigned n = 0; n < 8; n++)
        memcpy(f->st[n], st[(n + move) & 7], sizeof(st[0]));
    f->fsw = (u16)((f->fsw & ~FSW_TOP) | top << FSW_TOP_SHIFT);
}

static SLOW void load(struct cpu *cpu)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;
    struct x87_image image;

    fpu_normalize(f);
    image = (struct x87_image){.fcw = f->fcw, .fsw = f->fsw, .ftw = expand_tags(f->ftw, 0)};
    for (unsigned n = 0; n < 8; n++)
        memcpy(image.st[n], f->st[n], sizeof(image.st[n]));
    __asm__ volatile("frstor %0" : : "m"(image));
    cpu->fpu_where = host_state_for(f->fcw);
}

static void keep_host(struct cpu *cpu)
{
    if (!is_in_host(cpu))
        load(cpu);
}

static SLOW void save(struct cpu *cpu)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;
    struct x87_image image;

    __asm__ volatile("fnsave %0" : "=m"(image));
    f->fsw = (u16)image.fsw;
    f->ftw = abridge_tags(image.ftw);
    memset(f->st, 0, sizeof(f->st));
    for (unsigned n = 0; n < 8; n++)
        memcpy(f->st[n], image.st[n], sizeof(image.st[n]));
    cpu->fpu_where = FPU_MEMORY;
}

void fpu_save(struct cpu *cpu)
{
    if (is_in_host(cpu))
        save(cpu);
}

void fpu_enter(struct cpu *cpu) { cpu->host_fcw = host_fcw(); }

void fpu_leave(struct cpu *cpu)
{
    fpu_save(cpu);
    cpu->fpu_where = FPU_MEMORY; /* the module may change anything */
    if (host_fcw() !=
        cpu->host_fcw) /* after FNSAVE, or a signal handler that was not returned from */
        set_host_fcw(cpu->host_fcw);
}

void fpu_rescue(struct cpu *cpu, const void *fxsave)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;
    const u8 *image = fxsave;

    if (!is_in_host(cpu))
        return;
    memcpy(&f->fsw, image + 2, sizeof(f->fsw));
    f->ftw = image[4];
    memset(f->st, 0, sizeof(f->st));
    for (unsigned n = 0; n < 8; n++)
        memcpy(f->st[n], image + 32 + 16 * n, 10);
    cpu->fpu_where = FPU_MEMORY;
}

bool fpu_check_pending(struct cpu *cpu)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;

    if (is_in_host(cpu) ? host_fsw() & FSW_ES : fpu_is_pending(f))
        return raise_mf(cpu);
    return true;
}

/* ---- handlers: beginning and end --------------------------------------------------------------------- */

static SLOW bool begin_slow(struct cpu *cpu)
{
    keep_host(cpu);
    return fpu_check_pending(cpu);
}

/* Every waiting instruction: the state in the host's FPU, nothing pending. */
static ALWAYS_INLINE bool begin(struct cpu *cpu)
{
    return likely(cpu->fpu_where == FPU_HOST) || begin_slow(cpu);
}

static ALWAYS_INLINE void record(struct cpu *cpu, const struct insn *i)
{
    GUEST(cpu).fpu.fop = (u16)i->imm;
    GUEST(cpu).fpu.fip = insn_rip(cpu, i);
}

static ALWAYS_INLINE void record_mem(struct cpu *cpu, const struct insn *i)
{
    record(cpu, i);
    GUEST(cpu).fpu.fdp = ea_offset(cpu, i);
}

int x_x87_unusable(struct cpu *cpu, const struct insn *i) { return fault_nm(cpu, i); }

/* ---- registers ------------------------------------------------------------------------------------------ */

int x_x87(struct cpu *cpu, const struct insn *i)
{
    if (!begin(cpu))
        return stop(cpu, i);
    reg_stub(i)(NULL);
    record(cpu, i);
    NEXT(cpu, i);
}

/* FCMOVcc: the host looks at the guest's flags. */
int x_fcmov(struct cpu *cpu, const struct insn *i)
{
    if (!begin(cpu))
        return stop(cpu, i);
    call_with_flags(reg_stub(i), get_status(cpu));
    record(cpu, i);
    NEXT(cpu, i);
}

/* FCOMI and its kin: an unmasked #IA leaves the flags alone, so they go in as well. */
int x_fcomi(struct cpu *cpu, const struct insn *i)
{
    if (!begin(cpu))
        return stop(cpu, i);
    set_status(cpu, call_with_flags(reg_stub(i), get_status(cpu)));
    record(cpu, i);
    NEXT(cpu, i);
}

/* FENI, FDISI, FSETPM: of the 8087 and 287, nothing on any later one. */
int x_fnop87(struct cpu *cpu, const struct insn *i) { NEXT(cpu, i); }

/* ---- memory operands -------------------------------------------------------------------------------------- */

#define X87_LOAD(name, size)                                                                       \
    static SLOW int name##_slow(struct cpu *cpu, const struct insn *i)                             \
    {                                                                                              \
        u8 operand[size];                                                                          \
        u64 la;                                                                                    \
        if (!begin(cpu) || !ea_linear(cpu, i, size, ACC_READ, &la) ||                              \
            !mem_read(cpu, la, operand, size, ea_access(i)))                                       \
            return stop(cpu, i);                                                                   \
        mem_stub(i)(operand);                                                                      \
        record_mem(cpu, i);                                                                        \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    int x_##name(struct cpu *cpu, const struct insn *i)                                            \
    {                                                                                              \
        u64 la;                                                                                    \
        if (unlikely(cpu->fpu_where != FPU_HOST ||                                                 \
                     !operand_linear(cpu, i, size, ACC_READ, true, &la)))                          \
            return name##_slow(cpu, i);                                                            \
        const struct tlbe *e = &cpu->tlb->r[TLB_INDEX(la)];                                        \
        if (!tlb_hit(e, la, size))                                                                 \
            return name##_slow(cpu, i);                                                            \
        mem_stub(i)((void *)(uintptr_t)(la + e->addend));                                          \
        record_mem(cpu, i);                                                                        \
        NEXT(cpu, i);                                                                              \
    }
X87_LOAD(x87_ld16, 2)
X87_LOAD(x87_ld32, 4)
X87_LOAD(x87_ld64, 8)
X87_LOAD(x87_ld80, 10)

/* What an instruction changes that it may have to take back. */
struct x87_regs {
    u16 fsw;
    u8 ftw;
    u8 st[8][16];
};

static void keep_regs(const struct cpu_fpu *f, struct x87_regs *old)
{
    old->fsw = f->fsw;
    old->ftw = f->ftw;
    memcpy(old->st, f->st, sizeof(old->st));
}

static void put_back(struct cpu_fpu *f, const struct x87_regs *old)
{
    f->fsw = old->fsw;
    f->ftw = old->ftw;
    memcpy(f->st, old->st, sizeof(old->st));
}

/*
 * Stores to what is not plain memory in one page.  The result is only known once the instruction
 * is done, and then the store may still not be possible.
 */
static SLOW bool store_indirectly(struct cpu *cpu, const struct insn *i, u64 la, unsigned size)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;
    struct x87_regs old;
    u8 result[10];

    save(cpu);
    keep_regs(f, &old);
    load(cpu);
    mem_stub(i)(result);
    save(cpu);
    /* An unmasked exception keeps the result from being stored, except inexact: there is one. */
    if (f->fsw & ~f->fcw & FSW_FLAGS & ~FSW_PE)
        return true;
    if (mem_write(cpu, la, result, size, ea_access(i)))
        return true;
    put_back(f, &old);
    return false;
}

/* Memory faults come before what the instruction itself raises. */
static SLOW int store_slow(struct cpu *cpu, const struct insn *i, unsigned size)
{
    u64 la;

    if (!begin(cpu) || !ea_linear(cpu, i, size, ACC_WRITE, &la) ||
        !mem_probe_write(cpu, la, size, ea_access(i)))
        return stop(cpu, i);
    const struct tlbe *e = &cpu->tlb->w[TLB_INDEX(la)];
    if (tlb_hit(e, la, size))
        mem_stub(i)((void *)(uintptr_t)(la + e->addend));
    else if (!store_indirectly(cpu, i, la, size))
        return stop(cpu, i);
    record_mem(cpu, i);
    NEXT(cpu, i);
}

#define X87_STORE(name, size)                                                                      \
    int x_##name(struct cpu *cpu, const struct insn *i)                                            \
    {                                                                                              \
        u64 la;                                                                                    \
        if (unlikely(cpu->fpu_where != FPU_HOST ||                                                 \
                     !operand_linear(cpu, i, size, ACC_WRITE, true, &la)))                         \
            return store_slow(cpu, i, size);                                                       \
        const struct tlbe *e = &cpu->tlb->w[TLB_INDEX(la)];                                        \
        if (!tlb_hit(e, la, size))                                                                 \
            return store_slow(cpu, i, size);                                                       \
        mem_stub(i)((void *)(uintptr_t)(la + e->addend));                                          \
        record_mem(cpu, i);                                                                        \
        NEXT(cpu, i);                                                                              \
    }
X87_STORE(x87_st16, 2)
X87_STORE(x87_st32, 4)
X87_STORE(x87_st64, 8)
X87_STORE(x87_st80, 10)

/* ---- control and status ---------------------------------------------------------------------------------------- */

int x_fwait(struct cpu *cpu, const struct insn *i)
{
    u64 stopped = X86_CR0_MP | X86_CR0_TS;

    if ((GUEST(cpu).cr0 & stopped) == stopped)
        return fault_nm(cpu, i);
    if (cpu->fpu_where != FPU_HOST && !fpu_check_pending(cpu))
        return stop(cpu, i);
    NEXT(cpu, i);
}

int x_fldcw(struct cpu *cpu, const struct insn *i)
{
    u64 fcw;

    if (!begin(cpu) || !rm_read(cpu, i, 0, 2, &fcw))
        return stop(cpu, i);
    GUEST(cpu).fpu.fcw = (u16)((fcw & FCW_DEFINED) | FCW_FIXED);
    set_host_fcw((u16)fcw);
    cpu->fpu_where = host_state_for((u16)fcw);
    NEXT(cpu, i);
}

int x_fnstcw(struct cpu *cpu, const struct insn *i)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;

    if (!is_in_host(cpu))
        fpu_normalize(f);
    if (!rm_write(cpu, i, 0, 2, f->fcw))
        return stop(cpu, i);
    NEXT(cpu, i);
}

static u16 status_word(struct cpu *cpu)
{
    if (is_in_host(cpu))
        return host_fsw();
    fpu_normalize(&GUEST(cpu).fpu);
    return GUEST(cpu).fpu.fsw;
}

int x_fnstsw(struct cpu *cpu, const struct insn *i)
{
    if (!rm_write(cpu, i, 0, 2, status_word(cpu)))
        return stop(cpu, i);
    NEXT(cpu, i);
}

int x_fnstsw_ax(struct cpu *cpu, const struct insn *i)
{
    REG16(cpu, RAX * 8) = status_word(cpu);
    NEXT(cpu, i);
}

int x_fnclex(struct cpu *cpu, const struct insn *i)
{
    keep_host(cpu);
    __asm__ volatile("fnclex");
    NEXT(cpu, i);
}

static void init_control(struct cpu_fpu *f)
{
    f->fcw = FCW_INIT;
    f->fop = 0;
    f->fip = f->fdp = 0;
}

int x_fninit(struct cpu *cpu, const struct insn *i)
{
    keep_host(cpu);
    __asm__ volatile("fninit");
    init_control(&GUEST(cpu).fpu);
    cpu->fpu_where = FPU_HOST;
    NEXT(cpu, i);
}

/* ---- environment -------------------------------------------------------------------------------------------------- */

/*
 * The environment as FNSTENV stores it: seven fields of 2 or 4 bytes, and in two ways where the
 * pointers go: with selectors in protected mode, else as linear addresses (SDM vol. 1 8.1.10).
 */
enum { ENV_FCW, ENV_FSW, ENV_FTW, ENV_FIP, ENV_FCS, ENV_FDP, ENV_FDS, ENV_FIELDS };
#define ENV_MAX (ENV_FIELDS * 4)
#define FOP_MASK 0x7ffu

static unsigned env_field_size(const struct insn *i) { return i->opsize == 2 ? 2 : 4; }

static bool env_has_selectors(const struct cpu *cpu) { return is_pe(cpu) && !is_vm86(cpu); }

/* Full tag word: of each physical register valid 0, zero 1, special 2, empty 3. */
static u32 tag_of(const u8 *st)
{
    u64 significand;
    u16 exponent;

    memcpy(&significand, st, 8);
    memcpy(&exponent, st + 8, 2);
    exponent &= 0x7fff;
    if (!exponent && !significand)
        return 1;
    return !exponent || exponent == 0x7fff || !(significand >> 63) ? 2 : 0;
}

static u32 full_tags(const struct cpu_fpu *f)
{
    u32 tags = 0;
    for (unsigned r = 0; r < 8; r++) {
        bool valid = f->ftw >> r & 1;
        tags |= (valid ? tag_of(f->st[(r - fpu_top(f)) & 7]) : TAG_EMPTY) << 2 * r;
    }
    return tags;
}

static void put_pointers(u32 field[ENV_FIELDS], const struct cpu_fpu *f, bool wide, bool selectors)
{
    u32 fip = (u32)f->fip, fdp = (u32)f->fdp, fop = f->fop & FOP_MASK;

    field[ENV_FIP] = fip;
    field[ENV_FDP] = fdp;
    field[ENV_FCS] = 0;
    field[ENV_FDS] = wide ? 0xffff0000 : 0;
    if (selectors) {
        field[ENV_FCS] = wide ? fop << 16 : 0;
        return;
    }
    field[ENV_FCS] = (fip >> 16) << 12 | fop;
    field[ENV_FDS] = (fdp >> 16) << 12;
    if (wide) {
        field[ENV_FIP] |= 0xffff0000;
        field[ENV_FDP] |= 0xffff0000;
    }
}

/* Makes the image; its size. */
static unsigned put_env(struct cpu *cpu, const struct insn *i, u8 *image)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;
    unsigned size = env_field_size(i);
    u32 field[ENV_FIELDS] = {
        0xffff0000 | f->fcw, 0xffff0000 | f->fsw, 0xffff0000 | full_tags(f), 0, 0, 0, 0,
    };

    put_pointers(field, f, size == 4, env_has_selectors(cpu));
    for (unsigned n = 0; n < ENV_FIELDS; n++)
        memcpy(image + n * size, &field[n], size);
    return ENV_FIELDS * size;
}

static void get_pointers(struct cpu_fpu *f, const u32 field[ENV_FIELDS], bool wide, bool selectors)
{
    if (selectors) {
        f->fip = field[ENV_FIP];
        f->fdp = field[ENV_FDP];
        f->fop = wide ? field[ENV_FCS] >> 16 & FOP_MASK : 0; /* the 16-bit image has no opcode */
        return;
    }
    f->fip = (field[ENV_FIP] & 0xffff) | field[ENV_FCS] >> 12 << 16;
    f->fdp = (field[ENV_FDP] & 0xffff) | field[ENV_FDS] >> 12 << 16;
    f->fop = field[ENV_FCS] & FOP_MASK;
}

static unsigned get_env(struct cpu *cpu, const struct insn *i, const u8 *image)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;
    unsigned size = env_field_size(i);
    u32 field[ENV_FIELDS] = {0};

    for (unsigned n = 0; n < ENV_FIELDS; n++)
        memcpy(&field[n], image + n * size, size);
    fpu_set_top(f, field[ENV_FSW] >> FSW_TOP_SHIFT & 7);
    f->fcw = (u16)field[ENV_FCW];
    f->fsw = (u16)field[ENV_FSW];
    f->ftw = abridge_tags(field[ENV_FTW]);
    get_pointers(f, field, size == 4, env_has_selectors(cpu));
    fpu_normalize(f);
    return ENV_FIELDS * size;
}

static bool write_image(struct cpu *cpu, const struct insn *i, const u8 *image, unsigned size)
{
    u64 la;
    return ea_linear(cpu, i, size, ACC_WRITE, &la) && mem_write(cpu, la, image, size, ea_access(i));
}

static bool read_image(struct cpu *cpu, const struct insn *i, u8 *image, unsigned size)
{
    u64 la;
    return ea_linear(cpu, i, size, ACC_READ, &la) && mem_read(cpu, la, image, size, ea_access(i));
}

int x_fnstenv(struct cpu *cpu, const struct insn *i)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;
    u8 image[ENV_MAX];

    fpu_save(cpu);
    fpu_normalize(f);
    if (!write_image(cpu, i, image, put_env(cpu, i, image)))
        return stop(cpu, i);
    f->fcw |= FCW_MASKS;
    fpu_normalize(f);
    NEXT(cpu, i);
}

/* The image with the registers behind it: 94 or 108 bytes. */
#define REGS_SIZE 80

int x_fnsave(struct cpu *cpu, const struct insn *i)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;
    u8 image[ENV_MAX + REGS_SIZE];
    unsigned env;

    fpu_save(cpu);
    fpu_normalize(f);
    env = put_env(cpu, i, image);
    for (unsigned n = 0; n < 8; n++)
        memcpy(image + env + 10 * n, f->st[n], 10);
    if (!write_image(cpu, i, image, env + REGS_SIZE))
        return stop(cpu, i);
    fpu_set_top(f, 0);
    f->fsw = 0;
    f->ftw = 0;
    init_control(f);
    cpu->fpu_where = FPU_MEMORY;
    NEXT(cpu, i);
}

int x_fldenv(struct cpu *cpu, const struct insn *i)
{
    u8 image[ENV_MAX];

    if (!begin(cpu) || !read_image(cpu, i, image, ENV_FIELDS * env_field_size(i)))
        return stop(cpu, i);
    save(cpu);
    get_env(cpu, i, image);
    NEXT(cpu, i);
}

int x_frstor(struct cpu *cpu, const struct insn *i)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;
    u8 image[ENV_MAX + REGS_SIZE];
    unsigned env = ENV_FIELDS * env_field_size(i);

    if (!begin(cpu) || !read_image(cpu, i, image, env + REGS_SIZE))
        return stop(cpu, i);
    save(cpu);
    get_env(cpu, i, image);
    memset(f->st, 0, sizeof(f->st));
    for (unsigned n = 0; n < 8; n++)
        memcpy(f->st[n], image + env + 10 * n, 10);
    NEXT(cpu, i);
}
