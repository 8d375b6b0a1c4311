/*
 * kvmtest: a small virtual machine monitor that asks /dev/kvm the things every monitor relies on.
 *
 * It needs libc and <linux/kvm.h> only and knows nothing of pykvm: the same program runs on the
 * kernel's KVM and, under `pykvm exec -- ./kvmtest`, on ours.  Each test prints one line per fact,
 *
 *     real.out: port=0x3f8 size=1 data=0x48
 *
 * and no fact depends on time, addresses of the process or luck, so the two outputs are compared
 * byte by byte.  tests/clients/kvmtest.expected is the output of a real device:
 *
 *     cc -std=c11 -O1 -Wall -Wextra -pthread -o kvmtest kvmtest.c
 *     ./kvmtest > kvmtest.expected          (Linux 6.18, x86-64, kvm_pvm)
 *
 * The recording device's vendor module runs guest kernels in KVM's instruction emulator, which
 * departs from Intel's and AMD's processors in a few known places (INT n outside real mode, SSE,
 * x87, SYSCALL, RIP at an OUT exit, when an interrupt is taken after STI).  The tests that run by
 * default print only what all of them agree on.  What needs a whole processor is in the tests
 * marked "whole CPU" in `kvmtest -l`; they run with -a or when named, and their expectation,
 * tests/clients/kvmtest-whole-cpu.expected, is written from the manuals, not recorded.
 *
 * usage: kvmtest [-a] [-l] [-v] [NAME...]
 *     -a  also the tests that need a whole CPU
 *     -l  list the tests
 *     -v  say on stderr what each KVM_RUN returned and where RIP stood
 * status: 0 all ran, 1 an ioctl failed that should not or a test took too long, 2 usage, no KVM
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef __x86_64__
#error "kvmtest holds x86 guests and runs one of them natively: build it for x86-64"
#endif

/* ---- what guests and host agree on --------------------------------------------------------- */

/* One spelling for C and for the assembler. */
#define SHARED(name, value)                                                                        \
    enum { name = value };                                                                         \
    __asm__(".set " #name ", " #value)

/* Guest-physical memory: 2 MiB of RAM from 0; everything above it is a hole, hence MMIO. */
SHARED(CODE, 0x1000);       /* each test's guest code; real mode runs it with CS base 0 */
SHARED(VECTORS, 0x4000);    /* long mode's interrupt handlers */
SHARED(RECORD, 0x6000);     /* struct record, written by those handlers */
SHARED(STACK, 0x9000);      /* grows down */
SHARED(USER_STACK, 0xa000); /* grows down */
SHARED(PML4, 0x10000);      /* PDPT, PD of 0, PD of 3 GiB, PT of 0 follow, a page each */
SHARED(GDT, 0x15000);
SHARED(IDT, 0x16000);
SHARED(TSS, 0x17000);
SHARED(DATA, 0x20000);
SHARED(RAM_SIZE, 0x200000);
SHARED(DEVICE, 0xd0000000); /* in the hole */

/* Selectors of the long mode GDT. */
SHARED(CODE64, 0x08);
SHARED(DATA64, 0x10);
SHARED(ABSENT, 0x18); /* a data segment that is not present */
SHARED(USER_DATA, 0x23);
SHARED(USER_CODE, 0x2b);
SHARED(TASK, 0x30);

SHARED(PORT, 0x10);        /* where guests report a value */
SHARED(PORT_RECORD, 0xe0); /* OUT here: struct record is filled in */

/* What the long mode handlers note about the event they handle. */
struct record {
    uint64_t vector, error, rip, cs, rflags, rsp, ss, cr2;
};

/*
 * Guest code is assembled here, copied to guest memory by load() and never called in place, so it
 * names addresses of its own as (label - name + CODE).  Statements end in `;`.
 */
#define GUEST(name, ...)                                                                           \
    extern const uint8_t name[], name##_end[];                                                     \
    __asm__(".pushsection .rodata; .balign 16; " #name ": " #__VA_ARGS__ "; " #name                \
            "_end: .code64; .popsection")

/* ---- saying facts ---------------------------------------------------------------------------- */

static const char *test_name = "kvmtest";
static bool verbose;

static void __attribute__((format(printf, 2, 3))) say(const char *fact, const char *format, ...)
{
    va_list args;

    printf("%s.%s: ", test_name, fact);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
}

static void __attribute__((format(printf, 1, 2), noreturn)) fail(const char *format, ...)
{
    va_list args;

    fflush(stdout);
    fprintf(stderr, "kvmtest: %s: ", test_name);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(1);
}

static const char *exit_name(uint32_t reason)
{
    static const char *const names[] = {
        [KVM_EXIT_UNKNOWN] = "unknown",
        [KVM_EXIT_EXCEPTION] = "exception",
        [KVM_EXIT_IO] = "io",
        [KVM_EXIT_HYPERCALL] = "hypercall",
        [KVM_EXIT_DEBUG] = "debug",
        [KVM_EXIT_HLT] = "hlt",
        [KVM_EXIT_MMIO] = "mmio",
        [KVM_EXIT_IRQ_WINDOW_OPEN] = "irq_window_open",
        [KVM_EXIT_SHUTDOWN] = "shutdown",
        [KVM_EXIT_FAIL_ENTRY] = "fail_entry",
        [KVM_EXIT_INTR] = "intr",
        [KVM_EXIT_INTERNAL_ERROR] = "internal_error",
    };

    if (reason < sizeof names / sizeof *names && names[reason])
        return names[reason];
    return "other";
}

static const char *errno_name(int error)
{
    switch (error) {
    case 0: return "0";
    case EINTR: return "EINTR";
    case EAGAIN: return "EAGAIN";
    case EFAULT: return "EFAULT";
    case EINVAL: return "EINVAL";
    case ENOENT: return "ENOENT";
    case EEXIST: return "EEXIST";
    case E2BIG: return "E2BIG";
    case ENXIO: return "ENXIO";
    default: return strerror(error);
    }
}

/* ---- machines -------------------------------------------------------------------------------- */

enum { MAX_CPUS = 2 };

struct cpu {
    int fd;
    struct kvm_run *run;
    size_t run_size;
    unsigned runs; /* KVM_RUN calls so far */
};

struct machine {
    int vm;
    uint8_t *ram; /* RAM_SIZE bytes at guest-physical 0, slot 0 */
    struct cpu cpu[MAX_CPUS];
    int cpus;
    uint8_t in_pattern; /* the next byte an IN or an MMIO read gets */
};

static int kvm;

/* An ioctl that must succeed. */
#define must(fd, request, arg)                                                                     \
    do {                                                                                           \
        if (ioctl((fd), (request), (arg)) < 0)                                                     \
            fail("%s: %s", #request, strerror(errno));                                             \
    } while (0)

static void *host_pages(size_t size)
{
    void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (pages == MAP_FAILED)
        fail("mmap of %zu bytes: %s", size, strerror(errno));
    return pages;
}

static void set_slot(struct machine *m, uint32_t slot, uint32_t flags, uint64_t gpa, void *hva,
                     uint64_t size)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot,
        .flags = flags,
        .guest_phys_addr = gpa,
        .memory_size = size,
        .userspace_addr = (uintptr_t)hva,
    };

    must(m->vm, KVM_SET_USER_MEMORY_REGION, &region);
}

static struct cpu *add_cpu(struct machine *m)
{
    struct cpu *c = &m->cpu[m->cpus];
    int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);

    if (size < 0)
        fail("KVM_GET_VCPU_MMAP_SIZE: %s", strerror(errno));
    c->run_size = (size_t)size;
    c->fd = ioctl(m->vm, KVM_CREATE_VCPU, (unsigned long)m->cpus);
    if (c->fd < 0)
        fail("KVM_CREATE_VCPU: %s", strerror(errno));
    c->run = mmap(NULL, c->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, c->fd, 0);
    if (c->run == MAP_FAILED)
        fail("mmap of the vCPU: %s", strerror(errno));
    m->cpus++;
    return c;
}

static struct machine new_machine(void)
{
    struct machine m = {.in_pattern = 0xa1};

    m.vm = ioctl(kvm, KVM_CREATE_VM, 0);
    if (m.vm < 0)
        fail("KVM_CREATE_VM: %s", strerror(errno));
    /* Intel needs three pages for real mode's TSS; without an address it warns. */
    must(m.vm, KVM_SET_TSS_ADDR, 0xfffbd000);
    m.ram = host_pages(RAM_SIZE);
    set_slot(&m, 0, 0, 0, m.ram, RAM_SIZE);
    return m;
}

static void end_machine(struct machine *m)
{
    for (int i = 0; i < m->cpus; i++) {
        munmap(m->cpu[i].run, m->cpu[i].run_size);
        close(m->cpu[i].fd);
    }
    close(m->vm);
    munmap(m->ram, RAM_SIZE);
}

static void load(struct machine *m, uint32_t gpa, const uint8_t *code, const uint8_t *end)
{
    memcpy(m->ram + gpa, code, (size_t)(end - code));
}
#define LOAD(m, gpa, name) load((m), (gpa), name, name##_end)

static struct kvm_regs get_regs(struct cpu *c)
{
    struct kvm_regs regs;

    must(c->fd, KVM_GET_REGS, &regs);
    return regs;
}

static struct kvm_sregs get_sregs(struct cpu *c)
{
    struct kvm_sregs sregs;

    must(c->fd, KVM_GET_SREGS, &sregs);
    return sregs;
}

static void set_pc(struct cpu *c, uint64_t rip, uint64_t rsp)
{
    struct kvm_regs regs = {.rip = rip, .rsp = rsp, .rflags = 2};

    must(c->fd, KVM_SET_REGS, &regs);
}

/* Real mode at CODE with all segment bases 0. */
static void start_real(struct cpu *c)
{
    struct kvm_sregs sregs = get_sregs(c);

    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    must(c->fd, KVM_SET_SREGS, &sregs);
    set_pc(c, CODE, STACK);
}

enum { PRESENT = 1, WRITE = 2, USER = 4, ACCESSED = 0x20, DIRTY = 0x40, LARGE = 0x80 };
#define NX (1ull << 63)

static uint64_t *page_table(struct machine *m) /* the PT of the first 2 MiB */
{
    return (uint64_t *)(m->ram + PML4 + 0x4000);
}

static uint64_t *directory(struct machine *m) /* the PD of the first 1 GiB */
{
    return (uint64_t *)(m->ram + PML4 + 0x2000);
}

/* Identity map: 0-2 MiB by 4 KiB pages, 2-4 MiB and 2 MiB at DEVICE by large ones. */
static void build_page_tables(struct machine *m)
{
    uint64_t *pml4 = (uint64_t *)(m->ram + PML4);
    uint64_t *pdpt = (uint64_t *)(m->ram + PML4 + 0x1000);
    uint64_t *pd3 = (uint64_t *)(m->ram + PML4 + 0x3000);

    pml4[0] = (PML4 + 0x1000) | PRESENT | WRITE | USER;
    pdpt[0] = (PML4 + 0x2000) | PRESENT | WRITE | USER;
    pdpt[3] = (PML4 + 0x3000) | PRESENT | WRITE | USER;
    directory(m)[0] = (PML4 + 0x4000) | PRESENT | WRITE | USER;
    directory(m)[1] = 0x200000 | PRESENT | WRITE | LARGE;
    pd3[(DEVICE >> 21) & 511] = (uint64_t)DEVICE | PRESENT | WRITE | LARGE;
    for (uint64_t i = 0; i < 512; i++)
        page_table(m)[i] = i << 12 | PRESENT | WRITE;
}

static void build_gdt(struct machine *m)
{
    uint64_t *gdt = (uint64_t *)(m->ram + GDT);

    gdt[CODE64 / 8] = 0x00af9b000000ffff;
    gdt[DATA64 / 8] = 0x00cf93000000ffff;
    gdt[ABSENT / 8] = 0x00cf13000000ffff;
    gdt[USER_DATA / 8] = 0x00cff3000000ffff;
    gdt[USER_CODE / 8] = 0x00affb000000ffff;
    /* 64-bit TSS, available, base TSS, limit 0x67; ring 0 stack at STACK */
    gdt[TASK / 8] = 0x0000890000000067 | (TSS & 0xffffull) << 16 | (TSS >> 16 & 0xffull) << 32;
    *(uint64_t *)(m->ram + TSS + 4) = STACK;
    *(uint16_t *)(m->ram + TSS + 102) = 0x68; /* no I/O permission map */
}

static void build_idt(struct machine *m)
{
    for (unsigned vector = 0; vector < 0x31; vector++) {
        uint64_t handler = VECTORS + 16 * vector;
        uint64_t *gate = (uint64_t *)(m->ram + IDT + 16 * vector);
        uint64_t dpl = vector == 3 || vector == 0x30 ? 3 : 0;

        gate[0] = (handler & 0xffff) | CODE64 << 16 | (0x8e00 | dpl << 13) << 32 |
                  (handler & 0xffff0000) << 32;
        gate[1] = 0;
    }
}

/*
 * One stub of 16 bytes per vector.  The guest resumes at R15 after a fault, whose instruction would
 * only fault again, and where it was when R15 is 0.
 */
/* clang-format off */
GUEST(vectors,
    .code64;
    .set vector, 0;
    .rept 0x31;
    .balign 16;
    .if vector != 8 && vector != 17 && (vector < 10 || vector > 14);
    push    $0;
    .endif;
    push    $vector;
    jmp     .Lcommon;
    .set vector, vector + 1;
    .endr;

.Lcommon:
    push    %rax;
    push    %rcx;
    push    %rsi;
    push    %rdi;
    cld;
    lea     32(%rsp), %rsi;
    mov     $RECORD, %edi;
    mov     $7, %ecx;
    rep movsq;
    mov     %cr2, %rax;
    stosq;
    out     %al, $PORT_RECORD;
    test    %r15, %r15;
    jz      1f;
    mov     %r15, 48(%rsp);
1:  pop     %rdi;
    pop     %rsi;
    pop     %rcx;
    pop     %rax;
    add     $16, %rsp;
    iretq
);
/* clang-format on */

/* Long mode at CODE, ring 0, with the tables above. */
static void start_long(struct machine *m, struct cpu *c)
{
    struct kvm_sregs sregs = get_sregs(c);
    struct kvm_segment code = {
        .selector = CODE64, .limit = 0xffffffff, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    struct kvm_segment data = {
        .selector = DATA64, .limit = 0xffffffff, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};

    build_page_tables(m);
    build_gdt(m);
    build_idt(m);
    LOAD(m, VECTORS, vectors);
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = TASK + 15;
    sregs.idt.base = IDT;
    sregs.idt.limit = 0x31 * 16 - 1;
    sregs.cr0 = 0x80010033; /* PG WP NE ET MP PE */
    sregs.cr3 = PML4;
    sregs.cr4 = 0x620;  /* PAE OSFXSR OSXMMEXCPT */
    sregs.efer = 0xd00; /* NXE LMA LME */
    must(c->fd, KVM_SET_SREGS, &sregs);
    set_pc(c, CODE, STACK);
}

/* The host's CPUID, so that the guest may use what its control registers ask for. */
static void give_host_cpuid(struct cpu *c)
{
    static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[256];
    } cpuid;

    cpuid.head.nent = 256;
    must(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
    must(c->fd, KVM_SET_CPUID2, &cpuid);
}

static struct cpu *new_real(struct machine *m)
{
    struct cpu *c = add_cpu(m);

    start_real(c);
    return c;
}

static struct cpu *new_long(struct machine *m)
{
    struct cpu *c = add_cpu(m);

    give_host_cpuid(c);
    start_long(m, c);
    return c;
}

/* ---- running --------------------------------------------------------------------------------- */

enum { MANY_RUNS = 500 }; /* no test needs as many; a guest gone astray does */

/* KVM_RUN once: 0 and exit_reason, or the errno. */
static int run(struct cpu *c)
{
    int error = ioctl(c->fd, KVM_RUN, 0) < 0 ? errno : 0;

    if (++c->runs > MANY_RUNS)
        fail("the guest went astray: more than %d exits", MANY_RUNS);
    if (verbose) {
        struct kvm_regs regs = get_regs(c);

        fprintf(stderr, "%s: KVM_RUN %s, %s, rip %#llx rflags %#llx\n", test_name,
                errno_name(error), exit_name(c->run->exit_reason), regs.rip, regs.rflags);
    }
    return error;
}

static uint64_t value_of(const uint8_t *bytes, unsigned size)
{
    uint64_t value = 0;

    for (unsigned i = size; i-- > 0;)
        value = value << 8 | bytes[i];
    return value;
}

static uint8_t *io_data(struct cpu *c) { return (uint8_t *)c->run + c->run->io.data_offset; }

static void say_out(struct cpu *c)
{
    unsigned size = c->run->io.size;

    printf("%s.out: port=%#x size=%u", test_name, c->run->io.port, size);
    if (c->run->io.count != 1)
        printf(" count=%u", c->run->io.count);
    for (unsigned i = 0; i < c->run->io.count; i++)
        printf("%s0x%0*llx", i ? "," : " data=", 2 * (int)size,
               (unsigned long long)value_of(io_data(c) + i * size, size));
    putchar('\n');
}

static void say_record(struct machine *m)
{
    struct record r;

    memcpy(&r, m->ram + RECORD, sizeof r);
    printf("%s.event: vector=%llu error=%#llx cs=%#llx rip=%#llx rflags=%#llx ss=%#llx rsp=%#llx",
           test_name, (unsigned long long)r.vector, (unsigned long long)r.error,
           (unsigned long long)r.cs, (unsigned long long)r.rip, (unsigned long long)r.rflags,
           (unsigned long long)r.ss, (unsigned long long)r.rsp);
    if (r.vector == 14)
        printf(" cr2=%#llx", (unsigned long long)r.cr2);
    putchar('\n');
}

static void fill_pattern(struct machine *m, uint8_t *to, unsigned size)
{
    for (unsigned i = 0; i < size; i++)
        to[i] = m->in_pattern++;
}

/* Says what the exit was, and gives an IN or an MMIO read its data. */
static void say_exit(struct machine *m, struct cpu *c)
{
    struct kvm_run *r = c->run;

    switch (r->exit_reason) {
    case KVM_EXIT_IO:
        if (r->io.direction == KVM_EXIT_IO_IN) {
            fill_pattern(m, io_data(c), r->io.size * r->io.count);
            say("in", "port=%#x size=%u count=%u", r->io.port, r->io.size, r->io.count);
        } else if (r->io.port == PORT_RECORD) {
            say_record(m);
        } else {
            say_out(c);
        }
        break;
    case KVM_EXIT_MMIO:
        if (r->mmio.is_write) {
            say("write", "addr=%#llx len=%u data=0x%0*llx", r->mmio.phys_addr, r->mmio.len,
                2 * (int)r->mmio.len, (unsigned long long)value_of(r->mmio.data, r->mmio.len));
        } else {
            fill_pattern(m, r->mmio.data, r->mmio.len);
            say("read", "addr=%#llx len=%u", r->mmio.phys_addr, r->mmio.len);
        }
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        say("internal_error", "suberror=%u rip=%#llx", r->internal.suberror, get_regs(c).rip);
        break;
    default: say(exit_name(r->exit_reason), "exit");
    }
}

static void say_pc(struct cpu *c)
{
    struct kvm_regs regs = get_regs(c);

    say("regs", "rip=%#llx rax=%#llx", regs.rip, regs.rax);
}

/* Port and MMIO accesses are said and answered until the guest leaves for another reason. */
enum drive { QUIETLY, WITH_REGS };

static void drive(struct machine *m, struct cpu *c, enum drive how)
{
    for (;;) {
        int error = run(c);

        if (error) {
            say("run", "%s", errno_name(error));
            return;
        }
        say_exit(m, c);
        if (c->run->exit_reason != KVM_EXIT_IO && c->run->exit_reason != KVM_EXIT_MMIO)
            return;
        /* RIP at an OUT is the one place where processors and the emulator differ */
        if (how == WITH_REGS && !(c->run->exit_reason == KVM_EXIT_IO &&
                                  c->run->io.direction == KVM_EXIT_IO_OUT && c->run->io.count == 1))
            say_pc(c);
    }
}

static void say_segment(const char *name, struct kvm_segment s)
{
    say(name, "selector=%#x base=%#llx limit=%#x type=%u dpl=%u db=%u l=%u g=%u", s.selector,
        s.base, s.limit, s.type, s.dpl, s.db, s.l, s.g);
}

/* ---- tests ----------------------------------------------------------------------------------- */

/* A vCPU as KVM_CREATE_VCPU leaves it. */
static void test_reset(struct machine *m)
{
    struct cpu *c = add_cpu(m);
    struct kvm_regs r = get_regs(c);
    struct kvm_sregs s = get_sregs(c);

    say("regs", "rip=%#llx rflags=%#llx rax=%#llx rsp=%#llx", r.rip, r.rflags, r.rax, r.rsp);
    say("cs", "selector=%#x base=%#llx limit=%#x", s.cs.selector, s.cs.base, s.cs.limit);
    say("ds", "selector=%#x base=%#llx limit=%#x", s.ds.selector, s.ds.base, s.ds.limit);
    say("gdt", "base=%#llx limit=%#x", s.gdt.base, s.gdt.limit);
    say("idt", "base=%#llx limit=%#x", s.idt.base, s.idt.limit);
    say("cr", "cr0=%#llx cr2=%#llx cr3=%#llx cr4=%#llx cr8=%#llx efer=%#llx", s.cr0, s.cr2, s.cr3,
        s.cr4, s.cr8, s.efer);
    say("apic_base", "%#llx", s.apic_base);
    say("run", "mapping of %zu bytes", c->run_size);
}

/* clang-format off */
GUEST(real_code,
    .code16;
    mov     $0x48, %al;
    out     %al, $0x10;
    mov     $0x3f8, %dx;
    mov     $0x4c6c6548, %eax;
    out     %al, %dx;
    out     %ax, %dx;
    out     %eax, %dx;
    mov     $0xffffffff, %eax;
    in      $0x71, %al;
    in      $0x71, %ax;
    in      $0x71, %eax;
    mov     $0x60, %dx;
    mov     $0xffffffff, %eax;
    in      %dx, %al;
    in      %dx, %ax;
    in      %dx, %eax;
    out     %eax, $PORT;

    /* INT n and #DE through the interrupt vector table at 0 */
    movw    $(.Lreal_int - real_code + CODE), 0x21*4;
    movw    %cs, 0x21*4 + 2;
    movw    $(.Lreal_div - real_code + CODE), 0;
    movw    %cs, 2;
    mov     $0x1234, %ax;
    stc;
    int     $0x21;
    out     %ax, $PORT;
    xor     %bx, %bx;
    div     %bx;
    out     %ax, $PORT;

    /* a segment register is its selector times 16 */
    mov     $(DATA >> 4), %ax;
    mov     %ax, %es;
    movl    $0x89abcdef, %es:0x10;
    mov     $0x10, %si;
    mov     %es:2(%si), %ax;
    out     %ax, $PORT;
    hlt;
    mov     $0x99, %al;
    out     %al, $PORT;
    hlt;

.Lreal_int:
    mov     %sp, %bp;
    mov     (%bp), %ax;
    out     %ax, $0x22;
    mov     4(%bp), %ax;
    out     %ax, $0x23;
    mov     $0x5678, %ax;
    iret;
.Lreal_div:
    mov     %sp, %bp;
    addw    $2, (%bp);
    mov     $0xd0d0, %ax;
    iret;
);
/* clang-format on */

/* Real mode: IN and OUT of every size and form, IVT, segments, HLT. */
static void test_real(struct machine *m)
{
    struct cpu *c = new_real(m);

    drive(m, c, WITH_REGS);
    say("regs", "rip=%#llx", get_regs(c).rip);
    say("memory", "%#llx", (unsigned long long)value_of(m->ram + DATA + 0x10, 4));
    drive(m, c, QUIETLY); /* on after HLT */
}

/* clang-format off */
GUEST(string_code,
    .code16;
    cld;
    mov     $0x3f8, %dx;
    mov     $(.Ltext - string_code + CODE), %si;
    mov     $3, %cx;
    rep outsb;
    mov     $2, %cx;
    rep outsw;
    mov     $2, %cx;
    rep outsl;
    xor     %cx, %cx;
    rep outsb;
    outsb;

    std;
    mov     $(.Ltext - string_code + CODE + 1), %si;
    mov     $2, %cx;
    rep outsb;
    cld;

    mov     $0x60, %dx;
    mov     $0x3000, %di;
    mov     $5, %cx;
    rep insb;
    mov     $3, %cx;
    rep insw;
    mov     $2, %cx;
    rep insl;
    /* across a page: two exits */
    mov     $0x3ffd, %di;
    mov     $7, %cx;
    rep insb;
    /* downwards: one element an exit */
    std;
    mov     $0x3105, %di;
    mov     $2, %cx;
    rep insb;
    cld;
    insb;
    hlt;
.Ltext:
    .ascii  "Hello, world, from REP OUTS";
);
/* clang-format on */

static void say_string_regs(struct cpu *c)
{
    struct kvm_regs r = get_regs(c);

    say("regs", "rcx=%#llx rsi=%#llx rdi=%#llx rip=%#llx", r.rcx, r.rsi, r.rdi, r.rip);
}

/* REP OUTS exits once an element, after it; REP INS in batches, before them. */
static void test_string_io(struct machine *m)
{
    struct cpu *c = new_real(m);

    do {
        if (run(c))
            fail("KVM_RUN: %s", strerror(errno));
        say_exit(m, c);
        say_string_regs(c);
    } while (c->run->exit_reason == KVM_EXIT_IO);
    for (unsigned i = 0; i < 24; i += 8)
        say("memory", "%#x: %016llx", 0x3000 + i,
            (unsigned long long)value_of(m->ram + 0x3000 + i, 8));
    say("memory", "0x3ffc: %016llx", (unsigned long long)value_of(m->ram + 0x3ffc, 8));
    say("memory", "0x3100: %016llx", (unsigned long long)value_of(m->ram + 0x3100, 8));
}

/* clang-format off */
GUEST(protected_code,
    .code16;
    cli;
    lgdtl   .Lpm_gdtr - protected_code + CODE;
    lidtl   .Lpm_idtr - protected_code + CODE;
    mov     %cr0, %eax;
    or      $1, %eax;
    mov     %eax, %cr0;
    ljmpl   $0x08, $(.Lpm_entry - protected_code + CODE);

    .code32;
.Lpm_entry:
    mov     $0x10, %eax;
    mov     %eax, %ds;
    mov     %eax, %es;
    mov     %eax, %ss;
    mov     $STACK, %esp;
    mov     $0x18, %eax;            /* base DATA, limit 0xff, read and write */
    mov     %eax, %fs;
    mov     $0x50524f54, %eax;
    out     %eax, $PORT;

    movl    $0x11223344, %fs:0x20;
    mov     DATA + 0x20, %eax;
    out     %eax, $PORT;

    mov     $(.Lpm_r1 - protected_code + CODE), %ebp;
    mov     %fs:0xfd, %eax;         /* beyond the limit by one byte */
.Lpm_r1:
    mov     $(.Lpm_r2 - protected_code + CODE), %ebp;
    mov     $0x40, %eax;            /* beyond the GDT */
    mov     %eax, %gs;
.Lpm_r2:
    mov     $(.Lpm_r3 - protected_code + CODE), %ebp;
    mov     $0x20, %eax;            /* present bit clear */
    mov     %eax, %gs;
.Lpm_r3:
    mov     $(.Lpm_r4 - protected_code + CODE), %ebp;
    xor     %edx, %edx;
    xor     %ecx, %ecx;
    div     %ecx;
.Lpm_r4:
    mov     $(.Lpm_r5 - protected_code + CODE), %ebp;
    xor     %eax, %eax;
    mov     %eax, %gs;              /* null is loaded without ado, and faults when used */
    mov     %gs:0, %eax;
.Lpm_r5:

    lcall   $0x28, $(.Lpm_far - protected_code + CODE);
    out     %eax, $PORT;
    pushl   $0x12345678;
    pushw   $0x9abc;
    popl    %eax;
    popw    %cx;
    out     %eax, $PORT;
    str     %ax;
    movzwl  %ax, %eax;
    out     %eax, $PORT;
    mov     $0x30, %eax;
    ltr     %ax;
    hlt;

.Lpm_far:                           /* conforming code */
    mov     %cs, %eax;
    shl     $16, %eax;
    mov     4(%esp), %ax;
    lret;

    /* error code, eip, cs, eflags; vector in AL */
.Lpm_gp: pushl  $13; jmp .Lpm_common;
.Lpm_np: pushl  $11; jmp .Lpm_common;
.Lpm_de: pushl  $0; pushl $0;
.Lpm_common:
    pop     %eax;
    out     %al, $0x21;
    pop     %eax;
    out     %eax, $0x22;
    mov     (%esp), %eax;
    out     %eax, $0x23;
    add     $12, %esp;              /* IRET is for `interrupts`, below */
    jmp     *%ebp;

    .balign 8;
.Lpm_gdt:
    .quad   0;
    .quad   0x00cf9b000000ffff;     /* 08 flat code */
    .quad   0x00cf93000000ffff;     /* 10 flat data */
    .quad   0x00409302000000ff;     /* 18 data at DATA, limit 0xff */
    .quad   0x00cf13000000ffff;     /* 20 not present */
    .quad   0x00cf9f000000ffff;     /* 28 flat code, conforming */
    .quad   0x0000890170000067;     /* 30 32-bit TSS at 0x17000 */
.Lpm_gdtr:
    .word   55;
    .long   .Lpm_gdt - protected_code + CODE;
.Lpm_idt:
    .word   .Lpm_de - protected_code + CODE, 8, 0x8e00, 0;
    .fill   10, 8, 0;
    .word   .Lpm_np - protected_code + CODE, 8, 0x8e00, 0;
    .fill   1, 8, 0;
    .word   .Lpm_gp - protected_code + CODE, 8, 0x8e00, 0;
.Lpm_idtr:
    .word   14*8 - 1;
    .long   .Lpm_idt - protected_code + CODE;
);
/* clang-format on */

/* From real mode into 32-bit protected mode: segments with limits, faults, far calls, TSS. */
static void test_protected(struct machine *m)
{
    struct cpu *c = new_real(m);
    struct kvm_sregs s;

    drive(m, c, QUIETLY);
    s = get_sregs(c);
    say("cr", "cr0=%#llx cr4=%#llx efer=%#llx", s.cr0, s.cr4, s.efer);
    say_segment("cs", s.cs);
    say_segment("ds", s.ds);
    say_segment("fs", s.fs);
    say_segment("tr", s.tr);
    say("gdt", "limit=%#x", s.gdt.limit);
}

/* clang-format off */
GUEST(climb_code,
    .code16;
    cli;
    lgdtl   .Lclimb_gdtr - climb_code + CODE;
    mov     %cr0, %eax;
    or      $1, %al;
    mov     %eax, %cr0;
    ljmpl   $0x08, $(.Lclimb32 - climb_code + CODE);

    .code32;
.Lclimb32:
    mov     $0x10, %eax;
    mov     %eax, %ds;
    mov     %eax, %es;
    mov     %eax, %ss;
    mov     $STACK, %esp;
    mov     $32, %al;
    out     %al, $PORT;

    cld;                            /* PML4, PDPT, PD: 2 MiB at 0, seen at 1 GiB too */
    mov     $DATA, %edi;
    xor     %eax, %eax;
    mov     $(3 * 1024), %ecx;
    rep stosl;
    movl    $(DATA + 0x1003), DATA;
    movl    $(DATA + 0x2003), DATA + 0x1000;
    movl    $(DATA + 0x2003), DATA + 0x1008;
    movl    $0x83, DATA + 0x2000;
    mov     $0x20, %eax;
    mov     %eax, %cr4;
    mov     $DATA, %eax;
    mov     %eax, %cr3;
    mov     $0xc0000080, %ecx;
    rdmsr;
    or      $0x100, %eax;
    wrmsr;
    mov     %cr0, %eax;
    or      $0x80000000, %eax;
    mov     %eax, %cr0;
    rdmsr;                          /* LMA is set, and we are in compatibility mode */
    out     %eax, $PORT;
    ljmpl   $0x18, $(.Lclimb64 - climb_code + CODE);

    .code64;
.Lclimb64:
    mov     $64, %al;
    out     %al, $PORT;
    movabs  $0x1122334455667788, %rax;
    mov     %rax, 0x40000000 + 0x30000;
    mov     0x30000, %rbx;
    bswap   %rbx;
    mov     %ebx, %eax;
    out     %eax, $PORT;

    pushq   $0x08;                  /* down to compatibility mode and up again */
    pushq   $(.Lclimb_compat - climb_code + CODE);
    lretq;
    .code32;
.Lclimb_compat:
    mov     $0xffffffff, %eax;
    inc     %eax;                   /* 0x40 is INC here and a REX prefix in 64-bit mode */
    out     %eax, $PORT;
    ljmpl   $0x18, $(.Lclimb_done - climb_code + CODE);
    .code64;
.Lclimb_done:
    mov     $65, %al;
    out     %al, $PORT;
    hlt;

    .balign 8;
.Lclimb_gdt:
    .quad   0;
    .quad   0x00cf9b000000ffff;
    .quad   0x00cf93000000ffff;
    .quad   0x00af9b000000ffff;
.Lclimb_gdtr:
    .word   31;
    .long   .Lclimb_gdt - climb_code + CODE;
);
/* clang-format on */

/* The guest itself goes from real through protected to long mode, with tables it builds. */
static void test_climb(struct machine *m)
{
    struct cpu *c = add_cpu(m);
    struct kvm_sregs s;

    give_host_cpuid(c);
    start_real(c);
    drive(m, c, QUIETLY);
    s = get_sregs(c);
    say("cr", "cr0=%#llx cr3=%#llx cr4=%#llx efer=%#llx", s.cr0, s.cr3, s.cr4, s.efer);
    say_segment("cs", s.cs);
    say_segment("ss", s.ss);
    say_pc(c);
}

/* Pages of DATA with a mapping of their own, for the fault and accessed/dirty tests. */
SHARED(PAGE_ABSENT, 0x30000);
SHARED(PAGE_READONLY, 0x31000);
SHARED(PAGE_NX, 0x32000);
SHARED(PAGE_USER, 0x34000);
SHARED(PAGE_READ, 0x35000);
SHARED(PAGE_WRITTEN, 0x36000);

static uint64_t *pte_of(struct machine *m, uint64_t gva) { return page_table(m) + (gva >> 12); }

static void special_pages(struct machine *m)
{
    *pte_of(m, PAGE_ABSENT) = 0;
    *pte_of(m, PAGE_READONLY) &= ~(uint64_t)WRITE;
    *pte_of(m, PAGE_NX) |= NX;
    directory(m)[1] |= 1 << 13; /* reserved in an entry that maps 2 MiB */
    *pte_of(m, PAGE_USER) |= USER;
    *pte_of(m, USER_STACK - 8) |= USER;
}

/* clang-format off */
GUEST(faults_code,
    .code64;
    lea     1f(%rip), %r15;
    .byte   0x8e, 0xc8;             /* #UD: MOV to CS */
1:  lea     1f(%rip), %r15;
    movabs  $0x800000000000, %rax;
    mov     (%rax), %rbx;           /* #GP: not canonical */
1:  lea     1f(%rip), %r15;
    mov     $0x1230, %eax;
    mov     %eax, %ds;              /* #GP: selector beyond the GDT */
1:  lea     1f(%rip), %r15;
    mov     $ABSENT, %eax;
    mov     %eax, %es;              /* #NP */
1:  lea     1f(%rip), %r15;
    mov     $0x12345678, %ecx;
    rdmsr;                          /* #GP: no such MSR */
1:  lea     1f(%rip), %r15;
    mov     $0xc0000080, %ecx;
    mov     $0, %edx;
    mov     $0x80000d00, %eax;
    wrmsr;                          /* #GP: reserved bit of EFER */
1:  lea     1f(%rip), %r15;
    mov     $0x80000030, %eax;
    mov     %rax, %cr0;             /* #GP: paging without protection */
1:  lea     1f(%rip), %r15;
    mov     $0, %edx;
    mov     $7, %eax;
    mov     $0, %ecx;
    div     %rcx;                   /* #DE */
1:  lea     1f(%rip), %r15;
    mov     PAGE_ABSENT, %rax;      /* #PF: read, not present */
1:  lea     1f(%rip), %r15;
    movb    $1, PAGE_ABSENT + 5;    /* #PF: write, not present */
1:  lea     1f(%rip), %r15;
    mov     PAGE_READONLY, %rax;    /* fine */
    incb    PAGE_READONLY + 9;      /* #PF: write, protected */
1:  lea     1f(%rip), %r15;
    mov     0x234567, %al;          /* #PF: reserved bit */
1:  lea     1f(%rip), %r15;
    mov     PAGE_ABSENT - 3, %rax;  /* #PF on the second page of a crossing read */
1:  lea     1f(%rip), %r15;
    mov     $PAGE_NX, %eax;
    jmp     *%rax;                  /* #PF: fetch */
1:  hlt;
);
/* clang-format on */

/* Exceptions in long mode: vector, error code, saved state, CR2. */
static void test_faults(struct machine *m)
{
    struct cpu *c = new_long(m);

    special_pages(m);
    LOAD(m, CODE, faults_code);
    drive(m, c, QUIETLY);
}

/* clang-format off */
GUEST(user_code,
    .code64;
    mov     $TASK, %eax;
    ltr     %ax;
    pushq   $USER_DATA;
    pushq   $USER_STACK;
    pushq   $2;
    pushq   $USER_CODE;
    pushq   $PAGE_USER;
    iretq;
);
GUEST(user_page,
    .code64;
    lea     1f(%rip), %r15;
    mov     CODE, %rax;             /* #PF: a supervisor page */
1:  lea     1f(%rip), %r15;
    movb    $0, CODE;
1:  lea     1f(%rip), %r15;
    hlt;                            /* #GP: privileged */
1:  lea     1f(%rip), %r15;
    cli;                            /* #GP: IOPL 0 */
1:  lea     1f(%rip), %r15;
    in      $0x60, %al;             /* #GP: IOPL 0, no permission map */
1:  lea     1f(%rip), %r15;
    mov     %cr3, %rax;
1:  lea     1f(%rip), %r15;
    mov     $DATA64, %eax;
    mov     %eax, %ds;              /* #GP: DPL 0 */
1:  lea     1f(%rip), %r15;
    push    %r15;
    pop     %rax;
    ud2;
1:  jmp     1b;
);
/* clang-format on */

/* Ring 3: what it may not do, and the stack switch through the TSS. */
static void test_user(struct machine *m)
{
    struct cpu *c = new_long(m);

    special_pages(m);
    LOAD(m, PAGE_USER, user_page);
    do {
        if (run(c))
            fail("KVM_RUN: %s", strerror(errno));
        say_exit(m, c);
    } while (c->run->exit_reason == KVM_EXIT_IO && value_of(m->ram + RECORD, 8) != 6);
    say_segment("tr", get_sregs(c).tr);
    say("user_stack", "%#llx", (unsigned long long)value_of(m->ram + USER_STACK - 8, 8));
}

/* clang-format off */
GUEST(accessed_code,
    .code64;
    mov     PAGE_READ, %eax;
    mov     %eax, PAGE_WRITTEN;
    hlt;
    movl    $(0x37000 + 3), PML4 + 0x4000 + (PAGE_READ >> 12) * 8;
    mov     PAGE_READ, %eax;        /* may be the old page still */
    invlpg  PAGE_READ;
    mov     PAGE_READ, %eax;
    out     %eax, $PORT;
    movl    $(0x38000 + 3), PML4 + 0x4000 + (PAGE_READ >> 12) * 8;
    mov     %cr3, %rax;
    mov     %rax, %cr3;
    mov     PAGE_READ, %eax;
    out     %eax, $PORT;
    hlt;
);
/* clang-format on */

/* Accessed and dirty bits appear in the guest's tables; INVLPG and CR3 loads make edits seen. */
static void test_paging(struct machine *m)
{
    struct cpu *c = new_long(m);
    uint64_t *pml4 = (uint64_t *)(m->ram + PML4);

    *(uint32_t *)(m->ram + 0x37000) = 0x37373737;
    *(uint32_t *)(m->ram + 0x38000) = 0x38383838;
    drive(m, c, QUIETLY);
    say("pml4e", "%#x", (unsigned)pml4[0] & 0xfff & ~DIRTY);
    say("pde", "%#x", (unsigned)directory(m)[0] & 0xfff & ~DIRTY);
    say("pte", "code %#x", (unsigned)*pte_of(m, CODE) & 0xfff);
    say("pte", "read %#x", (unsigned)*pte_of(m, PAGE_READ) & 0xfff);
    say("pte", "written %#x", (unsigned)*pte_of(m, PAGE_WRITTEN) & 0xfff);
    say("pte", "untouched %#x", (unsigned)*pte_of(m, PAGE_USER) & 0xfff);
    drive(m, c, QUIETLY);
}

/* clang-format off */
GUEST(irq_code,
    .code64;
    mov     $1, %eax;
    out     %eax, $PORT;            /* IF=0 */
    sti;
1:  cmpl    $0, DATA;
    je      1b;
    mov     $3, %eax;
    out     %eax, $PORT;            /* IF=1 */
1:  cmpl    $0, DATA + 4;
    je      1b;
    cli;
    hlt;
);
/* clang-format on */

static void say_window(struct cpu *c)
{
    say("window", "ready=%u if=%u", c->run->ready_for_interrupt_injection, c->run->if_flag);
}

static int interrupt(struct cpu *c, uint32_t vector)
{
    struct kvm_interrupt irq = {.irq = vector};

    return ioctl(c->fd, KVM_INTERRUPT, &irq) < 0 ? errno : 0;
}

/* One run until the guest's handler has noted the interrupt; its RIP is one of a spin's. */
static void take_interrupt(struct machine *m, struct cpu *c)
{
    struct record r;

    if (run(c) || c->run->exit_reason != KVM_EXIT_IO || c->run->io.port != PORT_RECORD) {
        say_exit(m, c);
        return;
    }
    memcpy(&r, m->ram + RECORD, sizeof r);
    say("event", "vector=%llu error=%#llx cs=%#llx if=%u rsp=%#llx", (unsigned long long)r.vector,
        (unsigned long long)r.error, (unsigned long long)r.cs, (unsigned)(r.rflags >> 9 & 1),
        (unsigned long long)r.rsp);
    say_window(c); /* in the handler, behind an interrupt gate */
}

/* Without an interrupt controller in the kernel: windows, KVM_INTERRUPT, delivery by the IDT. */
static void test_irq(struct machine *m)
{
    struct cpu *c = new_long(m);

    run(c);
    say_exit(m, c);
    say_window(c);
    c->run->request_interrupt_window = 1;
    run(c);
    say_exit(m, c);
    say_window(c);
    c->run->request_interrupt_window = 0;

    say("interrupt", "vector 32: %s", errno_name(interrupt(c, 32)));
    take_interrupt(m, c);
    *(uint32_t *)(m->ram + DATA) = 1;
    run(c);
    say_exit(m, c);
    say_window(c);

    say("interrupt", "vector 256: %s", errno_name(interrupt(c, 256)));
    say("interrupt", "vector 48: %s", errno_name(interrupt(c, 48)));
    take_interrupt(m, c);
    *(uint32_t *)(m->ram + DATA + 4) = 1;
    drive(m, c, QUIETLY);
    say_window(c);
}

/* clang-format off */
GUEST(nmi_code,
    .code64;
    mov     $1, %eax;
    out     %eax, $PORT;
    mov     $2, %eax;
    out     %eax, $PORT;
    hlt;
);
/* clang-format on */

/* KVM_NMI is delivered on the next entry, whatever IF. */
static void test_nmi(struct machine *m)
{
    struct cpu *c = new_long(m);
    struct record r;

    run(c);
    say_exit(m, c);
    must(c->fd, KVM_NMI, 0);
    run(c);
    memcpy(&r, m->ram + RECORD, sizeof r);
    say("event", "vector=%llu cs=%#llx rsp=%#llx", (unsigned long long)r.vector,
        (unsigned long long)r.cs, (unsigned long long)r.rsp);
    drive(m, c, QUIETLY);
}

/* clang-format off */
GUEST(mmio_code,
    .code64;
    mov     $DEVICE, %ebx;
    movabs  $0x1122334455667788, %rax;
    mov     %al, (%rbx);
    mov     %ax, 2(%rbx);
    mov     %eax, 4(%rbx);
    mov     %rax, 8(%rbx);
    movb    $0x5a, 16(%rbx);
    movq    $-2, 24(%rbx);

    mov     $-1, %rax;
    mov     (%rbx), %al;
    mov     2(%rbx), %ax;
    mov     4(%rbx), %eax;
    mov     8(%rbx), %rax;
    movzbl  (%rbx), %eax;
    movsbq  (%rbx), %rax;
    movswl  (%rbx), %eax;
    movslq  (%rbx), %rax;
    /* within a page and not aligned: one access */
    mov     5(%rbx), %rax;
    hlt;
);
/* clang-format on */

/* Loads and stores of 1, 2, 4 and 8 bytes; RIP and RAX at each exit. */
static void test_mmio(struct machine *m)
{
    struct cpu *c = new_long(m);

    drive(m, c, WITH_REGS);
    say_pc(c);
}

/* clang-format off */
GUEST(rmw_code,
    .code64;
    mov     $DEVICE, %ebx;
    mov     $0x0f, %eax;
    incb    (%rbx);
    addw    %ax, 2(%rbx);
    orl     $0x100, 4(%rbx);
    subq    %rax, 8(%rbx);
    lock xorl $-1, (%rbx);
    notb    (%rbx);
    negq    8(%rbx);
    shll    $4, (%rbx);
    btsl    $3, (%rbx);
    xchg    %eax, (%rbx);
    xadd    %eax, (%rbx);
    mov     $0x1234, %ecx;
    cmpxchg %ecx, (%rbx);           /* EAX is not what is read: read, write back, load EAX */
    sete    (%rbx);
    cmpl    $0, (%rbx);             /* reads only */
    testb   $1, (%rbx);
    mov     $3, %edx;
    imul    (%rbx), %edx;
    push    (%rbx);
    pop     8(%rbx);
    hlt;
);
/* clang-format on */

/* Read-modify-write: a read exit, then a write exit, one instruction. */
static void test_mmio_rmw(struct machine *m)
{
    struct cpu *c = new_long(m);

    drive(m, c, WITH_REGS);
    say("regs", "rip=%#llx rax=%#llx rdx=%#llx rsp=%#llx", get_regs(c).rip, get_regs(c).rax,
        get_regs(c).rdx, get_regs(c).rsp);
}

/* clang-format off */
GUEST(mmio_string_code,
    .code64;
    cld;
    mov     $DEVICE, %edi;
    mov     $(DATA), %esi;
    mov     $3, %ecx;
    rep movsb;
    mov     $2, %ecx;
    rep movsl;
    mov     $DEVICE + 0x20, %esi;
    mov     $DATA + 0x40, %edi;
    mov     $2, %ecx;
    rep movsw;
    movsq;
    mov     $DEVICE + 0x80, %edi;
    movabs  $0x0102030405060708, %rax;
    mov     $2, %ecx;
    rep stosl;
    stosq;
    mov     $DEVICE + 0x40, %esi;
    lodsb;
    lodsl;
    mov     $DEVICE + 0x50, %esi;
    mov     $DEVICE + 0x60, %edi;
    movsb;
    /* compare until they differ, which is at once */
    mov     $4, %ecx;
    mov     $DATA, %edi;
    repe cmpsb;
    hlt;
);
/* clang-format on */

/* String instructions exit once an element, with RCX, RSI and RDI in step. */
static void test_mmio_string(struct machine *m)
{
    struct cpu *c = new_long(m);

    for (unsigned i = 0; i < 32; i++)
        m->ram[DATA + i] = (uint8_t)(0x30 + i);
    do {
        if (run(c))
            fail("KVM_RUN: %s", strerror(errno));
        say_exit(m, c);
        say_string_regs(c);
    } while (c->run->exit_reason == KVM_EXIT_MMIO);
    say("memory", "%016llx", (unsigned long long)value_of(m->ram + DATA + 0x40, 8));
    say("memory", "%016llx", (unsigned long long)value_of(m->ram + DATA + 0x48, 8));
}

/* clang-format off */
GUEST(mmio_cross_code,
    .code64;
    mov     $DEVICE + 0xffd, %ebx;
    mov     (%rbx), %rax;           /* 3 bytes and 5 */
    mov     %rax, (%rbx);
    mov     %ax, 2(%rbx);           /* 1 byte and 1 */
    mov     $RAM_SIZE - 6, %ebx;
    mov     (%rbx), %rax;           /* 6 bytes of RAM, 2 of the hole behind it */
    movabs  $0x8877665544332211, %rax;
    mov     %rax, (%rbx);
    addl    $1, 4(%rbx);
    hlt;
);
/* clang-format on */

/* Accesses across pages come in fragments, the part in RAM without an exit. */
static void test_mmio_cross(struct machine *m)
{
    struct cpu *c = new_long(m);

    memset(m->ram + RAM_SIZE - 8, 0xee, 8);
    drive(m, c, WITH_REGS);
    say("memory", "%016llx", (unsigned long long)value_of(m->ram + RAM_SIZE - 8, 8));
}

/* clang-format off */
GUEST(immediate_code,
    .code64;
    mov     $DEVICE, %ebx;
    mov     $-1, %rax;
    mov     (%rbx), %eax;
    incl    (%rbx);
    mov     0xffc(%rbx), %rcx;
    in      $0x60, %al;
    out     %al, $0x61;
    hlt;
);
/* clang-format on */

/* KVM_RUN with immediate_exit set: what is pending is completed, then EINTR. */
static void run_immediate(struct machine *m, struct cpu *c)
{
    int error;

    c->run->immediate_exit = 1;
    error = run(c);
    c->run->immediate_exit = 0;
    say("immediate", "%s, reason %s", errno_name(error), exit_name(c->run->exit_reason));
    if (!error)
        say_exit(m, c);
    say("regs", "rip=%#llx rax=%#llx rcx=%#llx", get_regs(c).rip, get_regs(c).rax, get_regs(c).rcx);
}

static void test_immediate_exit(struct machine *m)
{
    struct cpu *c = new_long(m);

    run_immediate(m, c); /* nothing is pending, nothing runs */
    for (int reads = 0; reads < 4; reads++) {
        run(c);
        say_exit(m, c);
        run_immediate(m, c);
        if (c->run->exit_reason == KVM_EXIT_MMIO && reads > 0)
            run_immediate(m, c); /* the write of INC, the second half of the crossing load */
    }
    run(c);
    say_exit(m, c);
    run_immediate(m, c);
    drive(m, c, QUIETLY);
}

/* clang-format off */
GUEST(smp_code,
    .code64;
    /* RDI: how often; RSI: my number; DATA: counter, then whose turn it is */
    xor     %ebx, %ebx;
1:  mov     $1, %eax;
    lock xadd %rax, DATA;
    add     %rax, %rbx;             /* the sum of what was seen before: each number once */
    dec     %edi;
    jnz     1b;
    mov     $20, %edi;
1:  cmp     %esi, DATA + 0x40;      /* take turns */
    jne     1b;
    incl    DATA + 0x80;            /* mine alone until the turn is given away */
    mov     %esi, %eax;
    xor     $1, %eax;
    mov     %eax, DATA + 0x40;
    dec     %edi;
    jnz     1b;
    hlt;
);
/* clang-format on */

static void *run_thread(void *arg)
{
    struct cpu *c = arg;

    while (run(c) == EINTR || c->run->exit_reason == KVM_EXIT_INTR)
        ;
    return NULL;
}

/* Two vCPUs in two threads: LOCK XADD on one counter, then turns taken through memory. */
static void test_smp(struct machine *m)
{
    enum { TIMES = 10000 };
    pthread_t thread[2];
    uint64_t sum = 0;

    for (uint64_t i = 0; i < 2; i++) {
        struct cpu *c = new_long(m);
        struct kvm_regs regs = get_regs(c);

        regs.rdi = TIMES;
        regs.rsi = i;
        regs.rsp = STACK - 0x800 * i;
        must(c->fd, KVM_SET_REGS, &regs);
    }
    for (int i = 0; i < 2; i++)
        if (pthread_create(&thread[i], NULL, run_thread, &m->cpu[i]))
            fail("pthread_create");
    for (int i = 0; i < 2; i++) {
        pthread_join(thread[i], NULL);
        say("cpu", "%d: %s", i, exit_name(m->cpu[i].run->exit_reason));
        sum += get_regs(&m->cpu[i]).rbx;
    }
    say("counter", "%llu", (unsigned long long)value_of(m->ram + DATA, 8));
    say("sum_of_values_seen", "%llu", (unsigned long long)sum);
    say("turns", "%llu", (unsigned long long)value_of(m->ram + DATA + 0x80, 4));
}

/* clang-format off */
GUEST(spin_code,
    .code64;
1:  incl    DATA;                   /* tell the client that we run */
    jmp     1b;
);
/* clang-format on */

static volatile sig_atomic_t signals;

static void count_signal(int number)
{
    (void)number;
    signals++;
}

static void handle_usr1(void)
{
    struct sigaction action = {.sa_handler = count_signal};

    sigaction(SIGUSR1, &action, NULL);
    signals = 0;
}

struct spinner {
    struct cpu *cpu;
    int error;
};

static void *spin_thread(void *arg)
{
    struct spinner *s = arg;

    s->error = run(s->cpu);
    return NULL;
}

static void wait_until_it_runs(struct machine *m)
{
    uint32_t *count = (uint32_t *)(m->ram + DATA);
    uint32_t before = __atomic_load_n(count, __ATOMIC_ACQUIRE);

    while (__atomic_load_n(count, __ATOMIC_ACQUIRE) == before)
        sched_yield();
}

/* A signal ends KVM_RUN of a guest that never exits; the handler runs; the guest can go on. */
static void test_signal(struct machine *m)
{
    struct cpu *c = new_long(m);
    struct spinner s = {.cpu = c};
    pthread_t thread;

    handle_usr1();
    for (int i = 0; i < 2; i++) {
        bool in_loop;

        if (pthread_create(&thread, NULL, spin_thread, &s))
            fail("pthread_create");
        wait_until_it_runs(m);
        pthread_kill(thread, SIGUSR1);
        pthread_join(thread, NULL);
        in_loop = get_regs(c).rip - CODE < (uint64_t)(spin_code_end - spin_code);
        say("run", "%s, reason %s, handler ran %d times, rip %s", errno_name(s.error),
            exit_name(c->run->exit_reason), (int)signals, in_loop ? "in the loop" : "elsewhere");
    }
}

/*
 * KVM_SET_SIGNAL_MASK: a signal the thread blocks and KVM_RUN does not ends KVM_RUN at once, and
 * is still pending, unhandled, afterwards: the client takes it by sigtimedwait.
 */
static void test_signal_mask(struct machine *m)
{
    struct {
        struct kvm_signal_mask head;
        uint64_t set;
    } __attribute__((packed)) mask = {.head.len = 8};
    struct timespec none = {0};
    struct cpu *c = new_long(m);
    sigset_t blocked, pending;
    int error;

    handle_usr1();
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &blocked, NULL);
    must(c->fd, KVM_SET_SIGNAL_MASK, &mask);
    pthread_kill(pthread_self(), SIGUSR1);
    error = run(c);
    say("run", "%s, reason %s", errno_name(error), exit_name(c->run->exit_reason));
    sigpending(&pending);
    say("signal", "pending %d, handled %d times", sigismember(&pending, SIGUSR1), (int)signals);
    say("sigtimedwait", "%s", sigtimedwait(&blocked, NULL, &none) == SIGUSR1 ? "USR1" : "nothing");
    pthread_sigmask(SIG_UNBLOCK, &blocked, NULL);
    say("signal", "handled %d times", (int)signals);
    mask.head.len = 4;
    error = ioctl(c->fd, KVM_SET_SIGNAL_MASK, &mask) < 0 ? errno : 0;
    say("mask", "length 4: %s", errno_name(error));
    must(c->fd, KVM_SET_SIGNAL_MASK, NULL);
}

/* clang-format off */
GUEST(dirty_code,
    .code16;
    cld;
    mov     $0x3000, %ax;           /* the logged slot, at 0x30000 */
    mov     %ax, %es;
    movb    $1, %es:0x1000;
    mov     %es:0x2000, %al;        /* reading is not writing */
    movw    $0x5555, %es:0x3fff;    /* pages 3 and 4 */
    mov     $0x6ff0, %di;
    mov     $0x1020, %cx;           /* pages 6, 7 and 8 */
    rep stosb;
    mov     $0x3000, %ax;
    mov     %ax, %ss;
    mov     $0xb000, %sp;
    push    %ax;                    /* page 10 */
    hlt;
    lock incw %es:0xf000;
    hlt;
    movb    $2, %es:0;
    hlt;
);
/* clang-format on */

static void say_dirty_log(struct machine *m, uint32_t slot)
{
    uint64_t bitmap[2] = {0, 0x5a5a};
    struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bitmap};
    int error = ioctl(m->vm, KVM_GET_DIRTY_LOG, &log) < 0 ? errno : 0;

    if (error)
        say("log", "slot %u: %s", slot, errno_name(error));
    else
        say("log", "slot %u: %#llx then %#llx", slot, (unsigned long long)bitmap[0],
            (unsigned long long)bitmap[1]);
}

/* The dirty log has the pages the guest wrote since it was last fetched, and no others. */
static void test_dirty_log(struct machine *m)
{
    struct cpu *c = new_real(m);
    uint8_t *pages = host_pages(0x10000);

    /* slot 0 makes room for slot 1, the logged one, at 0x30000 */
    set_slot(m, 0, 0, 0, m->ram, 0);
    set_slot(m, 0, 0, 0, m->ram, 0x30000);
    set_slot(m, 1, KVM_MEM_LOG_DIRTY_PAGES, 0x30000, pages, 0x10000);
    say_dirty_log(m, 0);
    say_dirty_log(m, 1);
    say_dirty_log(m, 2);
    drive(m, c, QUIETLY);
    say_dirty_log(m, 1);
    say_dirty_log(m, 1);
    drive(m, c, QUIETLY);
    say_dirty_log(m, 1);
    set_slot(m, 1, 0, 0x30000, pages, 0x10000);
    say_dirty_log(m, 1);
    drive(m, c, QUIETLY);
    set_slot(m, 1, KVM_MEM_LOG_DIRTY_PAGES, 0x30000, pages, 0x10000);
    say_dirty_log(m, 1);
    say("memory", "%#x %#x %#x", pages[0], pages[0x1000], pages[0xf000]);
    set_slot(m, 1, 0, 0x30000, pages, 0);
    munmap(pages, 0x10000);
}

/* clang-format off */
GUEST(slots_code,
    .code16;
    mov     $0x3000, %ax;
    mov     %ax, %ds;
1:  mov     0x10, %eax;
    movl    $0x11111111, 0x10;
    hlt;
    jmp     1b;
);
/* clang-format on */

static int try_slot(struct machine *m, uint32_t slot, uint32_t flags, uint64_t gpa, void *hva,
                    uint64_t size)
{
    struct kvm_userspace_memory_region region = {slot, flags, gpa, size, (uintptr_t)hva};

    return ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0 ? errno : 0;
}

/* Memory slots made, made read-only, moved, aliased and deleted under a guest that keeps going. */
static void test_slots(struct machine *m)
{
    struct cpu *c = new_real(m);
    uint8_t *pages = host_pages(0x2000);

    set_slot(m, 0, 0, 0, m->ram, 0);
    set_slot(m, 0, 0, 0, m->ram, 0x30000);
    *(uint32_t *)(pages + 0x10) = 0x22222222;
    *(uint32_t *)(pages + 0x1010) = 0x33333333;

    say("slot", "none at 0x30000");
    drive(m, c, QUIETLY);
    set_slot(m, 1, 0, 0x30000, pages, 0x1000);
    say("slot", "memory");
    drive(m, c, QUIETLY);
    say("regs", "rax=%#llx, memory %#x", get_regs(c).rax, *(uint32_t *)(pages + 0x10));
    set_slot(m, 1, 0, 0x30000, pages, 0);
    set_slot(m, 1, KVM_MEM_READONLY, 0x30000, pages + 0x1000, 0x1000);
    say("slot", "read-only");
    drive(m, c, QUIETLY);
    say("regs", "rax=%#llx, memory %#x", get_regs(c).rax, *(uint32_t *)(pages + 0x1010));
    set_slot(m, 2, 0, 0x40000, pages, 0x1000);
    set_slot(m, 1, KVM_MEM_READONLY, 0x30000, pages + 0x1000, 0);
    set_slot(m, 2, 0, 0x30000, pages, 0x1000);
    say("slot", "moved here");
    drive(m, c, QUIETLY);
    say("regs", "rax=%#llx", get_regs(c).rax);
    set_slot(m, 2, 0, 0x30000, pages, 0);
    say("slot", "deleted");
    drive(m, c, QUIETLY);

    say("errno", "overlap %s", errno_name(try_slot(m, 3, 0, 0x2f000, pages, 0x2000)));
    say("errno", "misaligned %s", errno_name(try_slot(m, 3, 0, 0x30800, pages, 0x1000)));
    say("errno", "half a page %s", errno_name(try_slot(m, 3, 0, 0x30000, pages, 0x800)));
    say("errno", "size changed %s", errno_name(try_slot(m, 0, 0, 0, m->ram, 0x10000)));
    say("errno", "no such slot deleted %s", errno_name(try_slot(m, 9, 0, 0, pages, 0)));
    say("errno", "slot 65535 %s", errno_name(try_slot(m, 65535, 0, 0x30000, pages, 0x1000)));
    munmap(pages, 0x2000);
}

/* clang-format off */
GUEST(triple_code,
    .code64;
    lidt    .Lno_idt(%rip);
    mov     $0x12345678, %ecx;
    rdmsr;                          /* #GP, and no handler for it, nor for what follows */
    hlt;
.Lno_idt:
    .word   0;
    .quad   0;
);
/* clang-format on */

/* A triple fault shuts the machine down; the client may give the vCPU a new state and go on. */
static void test_shutdown(struct machine *m)
{
    struct cpu *c = new_long(m);

    drive(m, c, QUIETLY);
    LOAD(m, CODE, nmi_code);
    start_long(m, c);
    drive(m, c, QUIETLY);
}

/* clang-format off */
GUEST(cpuid_code,
    .code64;
    mov     $DATA, %esi;            /* leaf, subleaf; eax, ebx, ecx, edx written behind */
1:  mov     (%rsi), %eax;
    mov     4(%rsi), %ecx;
    cpuid;
    mov     %eax, 8(%rsi);
    mov     %ebx, 12(%rsi);
    mov     %ecx, 16(%rsi);
    mov     %edx, 20(%rsi);
    add     $24, %rsi;
    decl    DATA - 4;
    jnz     1b;
    hlt;
);
/* clang-format on */

/* The guest's CPUID is what KVM_SET_CPUID2 said. */
static void check_cpuid(struct machine *m, bool exact)
{
    static const struct kvm_cpuid_entry2 entries[] = {
        {.function = 0, .eax = 4, .ebx = 0x614b7950, .edx = 0x65546d76, .ecx = 0x72657473},
        {.function = 1, .eax = 0x00a20f12, .ebx = 0x00010800, .ecx = 0x00802001, .edx = 0x078bfbff},
        {.function = 4, .index = 0, .flags = 1, .eax = 0x121, .ebx = 0x1c0003f, .ecx = 63},
        {.function = 4, .index = 1, .flags = 1, .eax = 0x122, .ebx = 0x1c0003f, .ecx = 127},
        {.function = 0x40000000, .eax = 0x40000001, .ebx = 1, .ecx = 2, .edx = 3},
        {.function = 0x80000000, .eax = 0x80000001, .ebx = 4, .ecx = 5, .edx = 6},
        {.function = 0x80000001, .edx = 0x2c100800, .ecx = 1},
    };
    static const uint32_t asked[][2] = {{0, 0},          {1, 0}, {4, 0},          {4, 1},
                                        {4, 9},          {1, 7}, {0x40000000, 0}, {0x80000000, 0},
                                        {0x80000001, 0}, {3, 0}};
    static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[32];
    } cpuid;
    enum { ASKED = sizeof asked / sizeof *asked };
    struct cpu *c = add_cpu(m);
    int error;

    cpuid.head.nent = sizeof entries / sizeof *entries;
    memcpy(cpuid.entries, entries, sizeof entries);
    must(c->fd, KVM_SET_CPUID2, &cpuid);
    start_long(m, c);
    *(uint32_t *)(m->ram + DATA - 4) = ASKED;
    for (unsigned i = 0; i < ASKED; i++)
        memcpy(m->ram + DATA + 24 * i, asked[i], 8);
    drive(m, c, QUIETLY);
    for (unsigned i = 0; i < ASKED; i++) {
        uint32_t *out = (uint32_t *)(m->ram + DATA + 24 * i);

        if (out[0] == 1 && !exact) /* the recording device sets feature bits of its own */
            say("leaf", "%#x.%u: %#x %#x", out[0], out[1], out[2], out[3]);
        else
            say("leaf", "%#x.%u: %#x %#x %#x %#x", out[0], out[1], out[2], out[3], out[4], out[5]);
    }
    if (exact) {
        cpuid.head.nent = 32;
        must(c->fd, KVM_GET_CPUID2, &cpuid);
        say("get", "%u entries", cpuid.head.nent);
        return;
    }
    cpuid.head.nent = 2;
    error = ioctl(c->fd, KVM_GET_CPUID2, &cpuid) < 0 ? errno : 0;
    say("get", "room for 2: %s", errno_name(error));
}

static void test_cpuid(struct machine *m) { check_cpuid(m, false); }

/* clang-format off */
GUEST(msr_code,
    .code64;
    mov     $0xc0000082, %ecx;      /* LSTAR */
    rdmsr;
    out     %eax, $PORT;
    mov     $0x1234, %edx;
    mov     $0x5678, %eax;
    wrmsr;
    mov     $0xc0000100, %ecx;      /* FS.base */
    mov     $0, %edx;
    mov     $DATA, %eax;
    wrmsr;
    mov     %fs:8, %eax;
    out     %eax, $PORT;
    mov     $0xc0000102, %ecx;      /* KERNEL_GS_BASE */
    mov     $(DATA + 0x100), %eax;
    wrmsr;
    swapgs;
    mov     %gs:8, %eax;
    out     %eax, $PORT;
    hlt;
);
/* clang-format on */

static uint64_t get_msr(struct cpu *c, uint32_t index)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry[1];
    } msr = {.head.nmsrs = 1, .entry[0].index = index};
    int got = ioctl(c->fd, KVM_GET_MSRS, &msr);

    if (got != 1)
        fail("KVM_GET_MSRS of %#x: %d", index, got);
    return msr.entry[0].data;
}

static int set_msrs(struct cpu *c, uint32_t index0, uint64_t data0, uint32_t index1, uint64_t data1)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry[2];
    } msrs = {.head.nmsrs = 2,
              .entry = {{.index = index0, .data = data0}, {.index = index1, .data = data1}}};

    return ioctl(c->fd, KVM_SET_MSRS, &msrs);
}

/* MSRs the client sets the guest reads, and the other way round. */
static void test_msr(struct machine *m)
{
    struct cpu *c = new_long(m);

    *(uint32_t *)(m->ram + DATA + 8) = 0xf5f5f5f5;
    *(uint32_t *)(m->ram + DATA + 0x108) = 0x65656565;
    say("set", "%d", set_msrs(c, 0xc0000082, 0xffff800012345678, 0xc0000081, 0x0023001000000000));
    say("set", "%d, the second does not exist", set_msrs(c, 0xc0000084, 0x700, 0x12345678, 1));
    drive(m, c, QUIETLY);
    say("lstar", "%#llx", (unsigned long long)get_msr(c, 0xc0000082));
    say("star", "%#llx", (unsigned long long)get_msr(c, 0xc0000081));
    say("efer", "%#llx", (unsigned long long)get_msr(c, 0xc0000080));
    say("fs", "%#llx and %#llx", (unsigned long long)get_msr(c, 0xc0000100), get_sregs(c).fs.base);
    say("gs", "%#llx and %#llx", (unsigned long long)get_msr(c, 0xc0000101), get_sregs(c).gs.base);
    say("kernel_gs", "%#llx", (unsigned long long)get_msr(c, 0xc0000102));
}

/* clang-format off */
GUEST(rewrite_code,
    .code64;
    mov     $3, %ecx;
1:  lea     2f(%rip), %rbx;
    incb    1(%rbx);                /* the next instruction's immediate */
2:  mov     $0x40, %al;
    out     %al, $PORT;
    dec     %ecx;
    jnz     1b;
    hlt;
    /* a loop hot enough to be cached by whoever caches, rewritten when it is */
    mov     $200, %ecx;
    xor     %eax, %eax;
    lea     2f(%rip), %rbx;
1:  cmp     $100, %ecx;
    jne     2f;
    movb    $3, 2(%rbx);
2:  add     $1, %eax;
    dec     %ecx;
    jnz     1b;
    out     %eax, $PORT;
    hlt;
);
/* clang-format on */

/* Code changed by the guest, by the client, and through another mapping, is what runs. */
static void test_rewrite(struct machine *m)
{
    struct cpu *c = new_long(m);
    uint8_t *hlt;

    drive(m, c, QUIETLY);
    drive(m, c, QUIETLY);
    hlt = m->ram + get_regs(c).rip - 1;
    memcpy(hlt, "\xb0\x77\xe6\x10\xf4", 5); /* mov $0x77,%al; out %al,$PORT; hlt */
    set_pc(c, (uint64_t)(hlt - m->ram), STACK);
    drive(m, c, QUIETLY);
    hlt[1] = 0x78;
    set_pc(c, (uint64_t)(hlt - m->ram), STACK);
    drive(m, c, QUIETLY);
}

/*
 * Integer instructions, hashed with the flags they define.  This one also runs natively: it uses
 * registers and its own stack only and ends in RET.
 */
/* clang-format off */
GUEST(alu_code,
    .code64;
.macro mix;                         /* fold RAX and the flags in R11's mask into R8 */
    pushfq;
    pop     %r9;
    and     %r11, %r9;
    add     %r9, %r8;
    add     %rax, %r8;
    imul    %r10, %r8;
    rol     $17, %r8;
.endm;
    push    %rbx;
    movabs  $0x9e3779b97f4a7c15, %r10;
    movabs  $0x0123456789abcdef, %rax;
    movabs  $0xfedcba9876543210, %rdx;
    mov     $1, %r8d;
    mov     $500, %edi;
1:  mov     $0x8d5, %r11d;          /* all six flags are defined */
    add     %rdx, %rax; mix;
    adc     %eax, %edx; mix;
    sub     %dx, %ax; mix;
    sbb     %dl, %al; mix;
    cmp     %rdx, %rax; mix;
    neg     %eax; mix;
    inc     %al; mix;
    dec     %dx; mix;
    xchg    %rax, %rdx;
    mov     $0x8c5, %r11d;          /* AF is not */
    and     $0x7ffffff7, %eax; mix;
    or      %rdx, %rax; mix;
    xor     %ax, %dx; mix;
    test    %al, %dl; mix;
    movabs  $0xfedcba9876543210, %rbx;
    xor     %rbx, %rax;
    mov     $0x801, %r11d;          /* CF and OF */
    rol     $1, %rax; mix;
    rcr     $1, %edx; mix;
    imul    %edx, %eax; mix;
    mul     %edx; mix;
    mov     $0xc5, %r11d;           /* all but OF and AF */
    mov     %edi, %ecx;
    or      $1, %ecx;
    shl     %cl, %rax; mix;
    sar     $3, %rdx; mix;
    shr     $5, %ax; mix;
    shld    $7, %rdx, %rax; mix;
    shrd    $9, %rax, %rdx; mix;
    mov     $1, %r11d;              /* CF */
    bt      %edi, %eax; mix;
    btc     $11, %rax; mix;
    mov     $0x40, %r11d;           /* ZF */
    or      $0x100, %edx;
    bsf     %rdx, %rax; mix;
    bsr     %edx, %eax; mix;
    xor     %r11d, %r11d;           /* none */
    lea     5(%rdx, %rax, 4), %rax; mix;
    bswap   %rax; mix;
    movsbl  %dh, %eax; mix;
    movzwl  %dx, %eax; mix;
    cmp     %edi, %edx;
    cmovl   %r8, %rax; mix;
    setbe   %al; mix;
    movslq  %edx, %rax; mix;
    cqto;
    add     %r8, %rax;
    mov     %edi, %ecx;
    add     $3, %ecx;
    xor     %edx, %edx;
    div     %rcx; mix;
    mov     %rdx, %rax; mix;
    mov     %r8d, %eax;
    cltd;
    mov     $-7919, %ecx;
    idiv    %ecx; mix;
    mov     $0x8d5, %r11d;
    mov     %r8, %rdx;
    cmpxchg %r8, %rdx; mix;
    xadd    %rax, %rdx; mix;
    dec     %edi;
    jnz     1b;
    pop     %rbx;
    mov     %r8, %rax;
    ret;
);
GUEST(alu_start,
    .code64;
    call    . + DATA - CODE;
    hlt;
);
/* clang-format on */

/* The same bytes natively, from a page of this process. */
static uint64_t run_natively(const uint8_t *code, const uint8_t *end)
{
    uint8_t *page = host_pages(4096);
    uint64_t (*function)(void);
    uint64_t result;

    memcpy(page, code, (size_t)(end - code));
    if (mprotect(page, 4096, PROT_READ | PROT_EXEC))
        fail("mprotect: %s", strerror(errno));
    memcpy(&function, &page, sizeof function);
    result = function();
    munmap(page, 4096);
    return result;
}

static void test_alu(struct machine *m)
{
    struct cpu *c = new_long(m);

    LOAD(m, DATA, alu_code);
    drive(m, c, QUIETLY);
    say("hash", "%#llx", get_regs(c).rax);
    say("natively", "%s",
        run_natively(alu_code, alu_code_end) == get_regs(c).rax ? "the same" : "another");
}

/* ---- tests that need a whole CPU ------------------------------------------------------------- */

static void test_cpuid_exact(struct machine *m) { check_cpuid(m, true); }

/* clang-format off */
GUEST(out_code,
    .code16;
    mov     $0x48, %al;
    out     %al, $PORT;
    hlt;
);
/* clang-format on */

/* At an OUT exit RIP is still at the OUT; the next KVM_RUN moves it on (emulator: at once). */
static void test_out_rip(struct machine *m)
{
    struct cpu *c = new_real(m);

    run(c);
    say_exit(m, c);
    say_pc(c);
    run_immediate(m, c);
}

/* clang-format off */
GUEST(set_regs_code,
    .code16;
    mov     $1, %al;
    out     %al, $PORT;
    mov     $0x2c, %ax;
    in      $0x60, %al;
    out     %al, $PORT;
    in      $0x60, %al;
    out     %al, $PORT;
    hlt;
);
/* clang-format on */

/* A register the client sets while an IN is pending stays set; the IN still completes, unless the
 * client moved RIP. */
static void test_set_regs(struct machine *m)
{
    struct cpu *c = new_real(m);
    struct kvm_regs regs;

    run(c);
    say_exit(m, c);
    run(c);
    say_exit(m, c); /* IN, pending */
    regs = get_regs(c);
    regs.rax = 0xdead00;
    regs.rbx = 0xbeef;
    must(c->fd, KVM_SET_REGS, &regs);
    run(c);
    say_exit(m, c);
    say("regs", "rax=%#llx rbx=%#llx", get_regs(c).rax, get_regs(c).rbx);
    run(c);
    say_exit(m, c); /* IN, pending: RIP is moved behind it, to the OUT */
    regs = get_regs(c);
    regs.rip += 2;
    must(c->fd, KVM_SET_REGS, &regs);
    drive(m, c, QUIETLY);
    say("regs", "rip=%#llx rax=%#llx", get_regs(c).rip, get_regs(c).rax);
}

/* clang-format off */
GUEST(sti_code,
    .code64;
    mov     $1, %eax;
    out     %eax, $PORT;            /* IF=0 */
    sti;
    inc     %eax;
    inc     %eax;
    out     %eax, $PORT;            /* IF=1 */
    inc     %eax;
    hlt;
);
/* clang-format on */

/* The window opens behind the instruction after STI; an open window is left by at once. */
static void test_sti_window(struct machine *m)
{
    struct cpu *c = new_long(m);

    run(c);
    say_exit(m, c);
    c->run->request_interrupt_window = 1;
    run(c);
    say_exit(m, c);
    say_pc(c);
    c->run->request_interrupt_window = 0;
    run(c);
    say_exit(m, c);
    c->run->request_interrupt_window = 1;
    run(c);
    say_exit(m, c);
    say_pc(c);
    c->run->request_interrupt_window = 0;
    drive(m, c, QUIETLY);
}

/* clang-format off */
GUEST(interrupts_code,
    .code64;
    mov     $TASK, %eax;
    ltr     %ax;
    mov     $0, %r15d;
    stc;
    int     $0x30;
    int3;
    .byte   0xf1;                   /* INT1 */
    lea     1f(%rip), %r15;
    ud2;
1:  mov     $0, %r15d;
    pushq   $USER_DATA;
    pushq   $USER_STACK;
    pushq   $2;
    pushq   $USER_CODE;
    pushq   $PAGE_USER;
    iretq;
);
GUEST(interrupts_user,
    .code64;
    mov     $0, %r15d;
    stc;
    int     $0x30;
    int3;
    lea     1f(%rip), %r15;
    int     $0x20;                  /* #GP: the gate's DPL is 0 */
1:  lea     1f(%rip), %r15;
    ud2;
1:  jmp     1b;
);
/* clang-format on */

/* INT n, INT3, INT1 and IRET in long mode, from rings 0 and 3. */
static void test_interrupts(struct machine *m)
{
    struct cpu *c = new_long(m);
    struct record r;

    special_pages(m);
    LOAD(m, PAGE_USER, interrupts_user);
    do {
        if (run(c))
            fail("KVM_RUN: %s", strerror(errno));
        say_exit(m, c);
        memcpy(&r, m->ram + RECORD, sizeof r);
    } while (c->run->exit_reason == KVM_EXIT_IO && !(r.vector == 6 && r.cs == USER_CODE));
}

/* clang-format off */
GUEST(interrupts32_code,
    .code16;
    cli;
    lgdtl   .Li32_gdtr - interrupts32_code + CODE;
    lidtl   .Li32_idtr - interrupts32_code + CODE;
    mov     %cr0, %eax;
    or      $1, %eax;
    mov     %eax, %cr0;
    ljmpl   $0x08, $(.Li32_entry - interrupts32_code + CODE);
    .code32;
.Li32_entry:
    mov     $0x10, %eax;
    mov     %eax, %ds;
    mov     %eax, %es;
    mov     %eax, %ss;
    mov     $STACK, %esp;
    mov     $0x18, %eax;
    ltr     %ax;
    int     $5;
    mov     $0x7f, %al;
    inc     %al;
    into;
    /* to ring 3 and back by INT: the stack comes from the TSS */
    pushl   $0x33;
    pushl   $USER_STACK;
    pushl   $0x3002;                /* IOPL 3 */
    pushl   $0x2b;
    pushl   $(.Li32_user - interrupts32_code + CODE);
    iretl;
.Li32_user:
    mov     $0x33, %eax;
    mov     %eax, %ds;
    int     $6;
    mov     %esp, %eax;
    out     %eax, $PORT;
    int     $7;

.Li32_4: mov $4, %al; jmp 1f;
.Li32_5: mov $5, %al; jmp 1f;
.Li32_6: mov $6, %al;
1:  out     %al, $0x21;
    mov     (%esp), %eax;           /* EIP, CS, EFLAGS */
    out     %eax, $0x22;
    movzwl  4(%esp), %eax;
    out     %eax, $0x23;
    mov     8(%esp), %eax;
    and     $0xfffff72b, %eax;
    out     %eax, $0x24;
    mov     %esp, %eax;
    out     %eax, $0x25;
    iretl;
.Li32_7:
    mov     %ss, %eax;
    out     %eax, $0x26;
    hlt;

    .balign 8;
.Li32_gdt:
    .quad   0;
    .quad   0x00cf9b000000ffff;     /* 08 code, 10 data */
    .quad   0x00cf93000000ffff;
    .quad   0x0000890170000067;     /* 18 TSS at 0x17000 */
    .quad   0;
    .quad   0x00cffb000000ffff;     /* 2b user code, 33 user data */
    .quad   0x00cff3000000ffff;
.Li32_gdtr:
    .word   55;
    .long   .Li32_gdt - interrupts32_code + CODE;
.Li32_idt:
    .fill   4, 8, 0;
    .word   .Li32_4 - interrupts32_code + CODE, 8, 0xee00, 0;
    .word   .Li32_5 - interrupts32_code + CODE, 8, 0xee00, 0;
    .word   .Li32_6 - interrupts32_code + CODE, 8, 0xee00, 0;
    .word   .Li32_7 - interrupts32_code + CODE, 8, 0xee00, 0;
.Li32_idtr:
    .word   8*8 - 1;
    .long   .Li32_idt - interrupts32_code + CODE;
);
/* clang-format on */

/* INT n, INTO and IRET through 32-bit gates, to ring 3 and back. */
static void test_interrupts32(struct machine *m)
{
    struct cpu *c = new_real(m);

    *(uint32_t *)(m->ram + TSS + 4) = STACK - 0x100; /* ESP0, SS0 */
    *(uint32_t *)(m->ram + TSS + 8) = 0x10;
    drive(m, c, QUIETLY);
}

/* clang-format off */
GUEST(syscall_code,
    .code64;
    mov     $TASK, %eax;
    ltr     %ax;
    mov     $0xc0000080, %ecx;      /* EFER.SCE */
    rdmsr;
    or      $1, %eax;
    wrmsr;
    mov     $0xc0000081, %ecx;      /* STAR: SYSRET 0x18, SYSCALL 0x08 */
    mov     $0, %eax;
    mov     $0x00180008, %edx;
    wrmsr;
    mov     $0xc0000082, %ecx;      /* LSTAR */
    mov     $(.Lsyscall_entry - syscall_code + CODE), %eax;
    mov     $0, %edx;
    wrmsr;
    mov     $0xc0000084, %ecx;      /* FMASK: CF */
    mov     $1, %eax;
    wrmsr;
    mov     $2, %r11d;
    mov     $PAGE_USER, %ecx;
    mov     $USER_STACK, %esp;
    sysretq;
.Lsyscall_entry:
    out     %eax, $PORT;
    mov     %ecx, %eax;
    out     %eax, $0x21;
    mov     %r11d, %eax;
    out     %eax, $0x22;
    pushfq;                         /* on the user's stack: SYSCALL changes none */
    pop     %rax;
    out     %eax, $0x23;
    mov     %ss, %eax;
    out     %eax, $0x24;
    sysretq;
);
GUEST(syscall_user,
    .code64;
    mov     $0x1234, %eax;
    stc;
    syscall;
    lea     1f(%rip), %r15;
    ud2;
1:  jmp     1b;
);
/* clang-format on */

/* SYSCALL and SYSRET. */
static void test_syscall(struct machine *m)
{
    struct cpu *c = new_long(m);

    special_pages(m);
    LOAD(m, PAGE_USER, syscall_user);
    do {
        if (run(c))
            fail("KVM_RUN: %s", strerror(errno));
        say_exit(m, c);
    } while (c->run->exit_reason == KVM_EXIT_IO && c->run->io.port != PORT_RECORD);
}

/* clang-format off */
GUEST(vmcall_code,
    .code64;
    mov     $0x1234, %rax;          /* no such hypercall: -KVM_ENOSYS */
    vmcall;
    out     %eax, $PORT;
    mov     $1, %rax;               /* KVM_HC_VAPIC_POLL_IRQ: does nothing */
    vmcall;
    out     %eax, $PORT;
    mov     $0x1234, %rax;
    vmmcall;
    out     %eax, $PORT;
    hlt;
);
/* clang-format on */

/* Hypercalls, by either vendor's instruction. */
static void test_vmcall(struct machine *m)
{
    struct cpu *c = new_long(m);

    drive(m, c, QUIETLY);
    say_pc(c);
}

/* clang-format off */
GUEST(paging32_code,
    .code32;
    mov     $PML4, %eax;            /* two-level tables, 4 KiB and 4 MiB pages */
    mov     %eax, %cr3;
    mov     $0x10, %eax;
    mov     %eax, %cr4;
    mov     %cr0, %ebx;
    mov     %ebx, %eax;
    or      $0x80000000, %eax;
    mov     %eax, %cr0;
    movl    $0x11223344, DATA + 0x400000;
    mov     DATA, %eax;
    out     %eax, $PORT;
    mov     DATA + 0x300000, %eax;  /* the page below, seen through the page table */
    out     %eax, $PORT;
    mov     %ebx, %cr0;

    mov     $(PML4 + 0x8000), %eax; /* PAE: PDPTEs, 4 KiB and 2 MiB pages */
    mov     %eax, %cr3;
    mov     $0x20, %eax;
    mov     %eax, %cr4;
    mov     %ebx, %eax;
    or      $0x80000000, %eax;
    mov     %eax, %cr0;
    movl    $0x55667788, DATA + 0x40000000;
    mov     DATA, %eax;
    out     %eax, $PORT;
    hlt;
);
/* clang-format on */

/* Paging outside long mode: two-level with PSE, and PAE. */
static void test_paging32(struct machine *m)
{
    struct cpu *c = add_cpu(m);
    struct kvm_segment code = {
        .selector = CODE64, .limit = 0xffffffff, .type = 11, .present = 1, .s = 1, .db = 1, .g = 1};
    struct kvm_segment data = code;
    struct kvm_sregs sregs;
    uint32_t *pd = (uint32_t *)(m->ram + PML4);
    uint32_t *pt = (uint32_t *)(m->ram + PML4 + 0x1000);
    uint64_t *pdpt = (uint64_t *)(m->ram + PML4 + 0x8000);
    uint64_t *pae_pd = (uint64_t *)(m->ram + PML4 + 0x9000);

    pd[0] = (PML4 + 0x1000) | PRESENT | WRITE;
    pd[1] = 0 | PRESENT | WRITE | LARGE;
    for (uint32_t i = 0; i < 1024; i++)
        pt[i] = i << 12 | PRESENT | WRITE;
    pt[(DATA + 0x300000) >> 12 & 1023] = (DATA + 0x1000) | PRESENT | WRITE;
    pdpt[0] = pdpt[1] = (PML4 + 0x9000) | PRESENT;
    pae_pd[0] = 0 | PRESENT | WRITE | LARGE;
    *(uint32_t *)(m->ram + DATA + 0x1000) = 0x99aabbcc;

    give_host_cpuid(c);
    sregs = get_sregs(c);
    data.type = 3;
    data.selector = DATA64;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr0 = 0x11;
    must(c->fd, KVM_SET_SREGS, &sregs);
    set_pc(c, CODE, STACK);
    drive(m, c, QUIETLY);
    sregs = get_sregs(c);
    say("cr", "cr0=%#llx cr3=%#llx cr4=%#llx", sregs.cr0, sregs.cr3, sregs.cr4);
    say("pde", "%#x %#x", pd[0] & 0xfff, pd[1] & 0xfff);
}

/* ---- the list -------------------------------------------------------------------------------- */

struct test {
    const char *name;
    void (*run)(struct machine *m);
    const uint8_t *code, *end; /* put at CODE */
    bool whole_cpu;            /* not on the recording device: see the head of the file */
    const char *what;
};

#define TEST(name, code, what) {#name, test_##name, code, code##_end, false, what}
#define WHOLE(name, code, what) {#name, test_##name, code, code##_end, true, what}

static const struct test tests[] = {
    TEST(reset, real_code, "registers of a new vCPU"),
    TEST(real, real_code, "real mode: IN, OUT, IVT, segments, HLT"),
    TEST(string_io, string_code, "REP OUTS and REP INS"),
    TEST(protected, protected_code, "protected mode: segments, faults, far calls"),
    TEST(climb, climb_code, "real, protected, long and compatibility mode"),
    TEST(faults, faults_code, "long mode exceptions: #DE #UD #NP #GP #PF"),
    TEST(user, user_code, "ring 3 and the TSS"),
    TEST(paging, accessed_code, "accessed and dirty bits, INVLPG, CR3"),
    TEST(irq, irq_code, "KVM_INTERRUPT and the interrupt window"),
    TEST(nmi, nmi_code, "KVM_NMI"),
    TEST(mmio, mmio_code, "MMIO reads and writes of 1 to 8 bytes"),
    TEST(mmio_rmw, rmw_code, "MMIO read-modify-write"),
    TEST(mmio_string, mmio_string_code, "MMIO by string instructions"),
    TEST(mmio_cross, mmio_cross_code, "MMIO across pages"),
    TEST(immediate_exit, immediate_code, "immediate_exit: completion, then EINTR"),
    TEST(smp, smp_code, "two vCPUs in two threads"),
    TEST(signal, spin_code, "a signal ends KVM_RUN"),
    TEST(signal_mask, spin_code, "KVM_SET_SIGNAL_MASK"),
    TEST(dirty_log, dirty_code, "KVM_GET_DIRTY_LOG"),
    TEST(slots, slots_code, "memory slots come and go"),
    TEST(shutdown, triple_code, "triple fault"),
    TEST(cpuid, cpuid_code, "CPUID"),
    TEST(msr, msr_code, "MSRs"),
    TEST(rewrite, rewrite_code, "code that changes"),
    TEST(alu, alu_start, "integer instructions against the host CPU"),
    WHOLE(out_rip, out_code, "RIP at an OUT exit"),
    WHOLE(set_regs, set_regs_code, "registers set while an IN is pending"),
    WHOLE(sti_window, sti_code, "STI's shadow and the interrupt window"),
    WHOLE(interrupts, interrupts_code, "INT n, INT3, INT1, UD2 in long mode"),
    WHOLE(interrupts32, interrupts32_code, "INT n, INTO, IRET in protected mode"),
    WHOLE(syscall, syscall_code, "SYSCALL and SYSRET"),
    WHOLE(vmcall, vmcall_code, "VMCALL and VMMCALL"),
    WHOLE(paging32, paging32_code, "paging with two and three levels"),
    WHOLE(cpuid_exact, cpuid_code, "CPUID exactly as set"),
};
enum { TESTS = sizeof tests / sizeof *tests, SECONDS_PER_TEST = 60 };

/* A guest that hangs must not hang its caller. */
static void give_up(int number)
{
    static const char message[] = "kvmtest: a test took too long\n";
    ssize_t ignored = write(2, message, sizeof message - 1);

    (void)number;
    (void)ignored;
    _exit(1);
}

static void run_test(const struct test *test)
{
    struct machine m;

    test_name = test->name;
    alarm(SECONDS_PER_TEST);
    m = new_machine();
    load(&m, CODE, test->code, test->end);
    test->run(&m);
    end_machine(&m);
    alarm(0);
    fflush(stdout);
}

static void list_tests(void)
{
    for (unsigned i = 0; i < TESTS; i++)
        printf("%-16s%s%s\n", tests[i].name, tests[i].what,
               tests[i].whole_cpu ? " (whole CPU)" : "");
}

static const struct test *find_test(const char *name)
{
    for (unsigned i = 0; i < TESTS; i++)
        if (!strcmp(tests[i].name, name))
            return &tests[i];
    return NULL;
}

int main(int argc, char **argv)
{
    bool all = false;
    int option;

    while ((option = getopt(argc, argv, "alv")) != -1) {
        switch (option) {
        case 'a': all = true; break;
        case 'l': list_tests(); return 0;
        case 'v': verbose = true; break;
        default: fprintf(stderr, "usage: kvmtest [-a] [-l] [-v] [NAME...]\n"); return 2;
        }
    }
    for (int i = optind; i < argc; i++) {
        if (!find_test(argv[i])) {
            fprintf(stderr, "kvmtest: no test is called %s; kvmtest -l lists them\n", argv[i]);
            return 2;
        }
    }
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) {
        fprintf(stderr, "kvmtest: cannot open /dev/kvm: %s\n", strerror(errno));
        return 2;
    }
    if (ioctl(kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION) {
        fprintf(stderr, "kvmtest: /dev/kvm does not speak KVM API version %d\n", KVM_API_VERSION);
        return 2;
    }
    signal(SIGALRM, give_up);
    for (int i = optind; i < argc; i++)
        run_test(find_test(argv[i]));
    for (unsigned i = 0; optind == argc && i < TESTS; i++)
        if (all || !tests[i].whole_cpu)
            run_test(&tests[i]);
    return 0;
}
