/* ioctlbench [DIVISOR]: cost of single KVM ioctls and of VM/vCPU creation; prints a line each.
 * Only open/ioctl/mmap/munmap/close, so it also runs under an LD_PRELOAD emulator.
 * DIVISOR makes the loops shorter.  Env: KVM_DEV. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <time.h>
#include <fcntl.h>
#include <unistd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <linux/kvm.h>
typedef unsigned long long u64;
static double now(int c)
{
    struct timespec t;
    clock_gettime(c, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}
static int cmp(const void *a, const void *b)
{
    double x = *(double *)a, y = *(double *)b;
    return x < y ? -1 : x > y;
}
static long rss_kb(void)
{
    long a = 0, b = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (f) {
        if (fscanf(f, "%ld %ld", &a, &b) != 2)
            b = 0;
        fclose(f);
    }
    return b * 4;
}
static long mem_avail_kb(void)
{
    char l[128];
    long v = 0;
    FILE *f = fopen("/proc/meminfo", "r");
    while (f && fgets(l, 128, f))
        if (sscanf(l, "MemAvailable: %ld", &v) == 1)
            break;
    if (f)
        fclose(f);
    return v;
}
static int divisor = 1;
/* over 9 batches: median process-CPU ns per call, min and median wall, errno if it failed */
#define BENCH(name, COUNT, stmt)                                                                   \
    do {                                                                                           \
        double w_[9], v_[9];                                                                       \
        int rc = 0;                                                                                \
        const int N = (COUNT) / divisor + 1;                                                       \
        for (int b_ = 0; b_ < 9; b_++) {                                                           \
            double t_ = now(CLOCK_PROCESS_CPUTIME_ID), u_ = now(CLOCK_MONOTONIC);                  \
            for (int i_ = 0; i_ < N; i_++) {                                                       \
                rc = (stmt);                                                                       \
            }                                                                                      \
            w_[b_] = (now(CLOCK_PROCESS_CPUTIME_ID) - t_) * 1e9 / N;                               \
            v_[b_] = (now(CLOCK_MONOTONIC) - u_) * 1e9 / N;                                        \
        }                                                                                          \
        qsort(w_, 9, sizeof *w_, cmp);                                                             \
        qsort(v_, 9, sizeof *v_, cmp);                                                             \
        printf("%-44s cpu %9.0f ns  wall min %9.0f med %9.0f ns%s%s\n", name, w_[4], v_[0], v_[4], \
               rc < 0 ? "  FAILED " : "", rc < 0 ? strerror(errno) : "");                          \
    } while (0)

static int slot(int vm, struct kvm_userspace_memory_region z, size_t len)
{
    z.memory_size = len;
    int r = ioctl(vm, KVM_SET_USER_MEMORY_REGION, &z);
    z.memory_size = 0;
    return r | ioctl(vm, KVM_SET_USER_MEMORY_REGION, &z);
}

int main(int ac, char **av)
{
    if (ac > 1 && (divisor = atoi(av[1])) < 1) {
        fprintf(stderr, "usage: ioctlbench [DIVISOR]\n");
        return 2;
    }
    const char *dev = getenv("KVM_DEV") ? getenv("KVM_DEV") : "/dev/kvm";
    int kvm = open(dev, O_RDWR);
    if (kvm < 0) {
        perror(dev);
        return 2;
    }
    int rsz = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    int vm = ioctl(kvm, KVM_CREATE_VM, 0), cpu;
    if (vm < 0) {
        perror("KVM_CREATE_VM");
        return 2;
    }
    size_t G = 1UL << 30;
    void *ram = mmap(0, G, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct kvm_userspace_memory_region r = {.slot = 0,
                                            .flags = KVM_MEM_LOG_DIRTY_PAGES,
                                            .memory_size = G,
                                            .userspace_addr = (u64)ram},
                                       z;
    if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r))
        perror("region");
    cpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    if (cpu < 0) {
        perror("KVM_CREATE_VCPU");
        return 2;
    }
    struct kvm_run *run = mmap(0, rsz, 3, MAP_SHARED, cpu, 0);
    struct kvm_regs g;
    struct kvm_sregs s;
    struct kvm_fpu f;
    static struct kvm_xsave x;
    struct kvm_mp_state mp;
    struct kvm_vcpu_events ev;
    struct {
        struct kvm_msrs h;
        struct kvm_msr_entry e[4];
    } ms;
    memset(&ms, 0, sizeof ms);
    ms.h.nmsrs = 1;
    ms.e[0].index = 0xC0000080;
    static struct {
        struct kvm_cpuid2 h;
        struct kvm_cpuid_entry2 e[128];
    } cp;
    struct kvm_translation tr = {.linear_address = 0x1000};
    static u64 bits[1 << 12];
    struct kvm_dirty_log dl = {.slot = 0, .dirty_bitmap = bits};

    BENCH("getppid syscall", 200000, getppid());
    BENCH("KVM_GET_API_VERSION", 200000, ioctl(kvm, KVM_GET_API_VERSION, 0));
    BENCH("KVM_CHECK_EXTENSION", 200000, ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY));
    BENCH("KVM_GET_SUPPORTED_CPUID", 200,
          (cp.h.nent = 128, ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cp)));
    BENCH("KVM_GET_REGS", 100000, ioctl(cpu, KVM_GET_REGS, &g));
    BENCH("KVM_SET_REGS", 100000, ioctl(cpu, KVM_SET_REGS, &g));
    BENCH("KVM_GET_SREGS", 100000, ioctl(cpu, KVM_GET_SREGS, &s));
    BENCH("KVM_SET_SREGS", 20000, ioctl(cpu, KVM_SET_SREGS, &s));
    BENCH("KVM_GET_FPU", 50000, ioctl(cpu, KVM_GET_FPU, &f));
    BENCH("KVM_GET_XSAVE", 50000, ioctl(cpu, KVM_GET_XSAVE, &x));
    BENCH("KVM_GET_MSRS(1)", 50000, ioctl(cpu, KVM_GET_MSRS, &ms));
    BENCH("KVM_GET_MP_STATE", 50000, ioctl(cpu, KVM_GET_MP_STATE, &mp));
    BENCH("KVM_GET_VCPU_EVENTS", 50000, ioctl(cpu, KVM_GET_VCPU_EVENTS, &ev));
    BENCH("KVM_TRANSLATE", 20000, ioctl(cpu, KVM_TRANSLATE, &tr));
    run->immediate_exit = 1;
    BENCH("KVM_RUN immediate_exit (EINTR)", 50000, (ioctl(cpu, KVM_RUN, 0), 0));
    run->immediate_exit = 0;
    BENCH("KVM_GET_DIRTY_LOG 1GiB clean", 2000, ioctl(vm, KVM_GET_DIRTY_LOG, &dl));
    z = r;
    z.slot = 1;
    z.flags = 0;
    z.guest_phys_addr = 2 * G;
    BENCH("SET_USER_MEMORY_REGION create+delete 2MiB", 300, slot(vm, z, 2 << 20));
    BENCH("SET_USER_MEMORY_REGION create+delete 1GiB", 100, slot(vm, z, G));
    {
        int v, c = 0;
        BENCH("CREATE_VM + close", 50, (v = ioctl(kvm, KVM_CREATE_VM, 0), close(v), v));
        BENCH("CREATE_VM + CREATE_VCPU + mmap + close", 50,
              (v = ioctl(kvm, KVM_CREATE_VM, 0), c = ioctl(v, KVM_CREATE_VCPU, 0),
               munmap(mmap(0, rsz, 3, MAP_SHARED, c, 0), rsz), close(c), close(v), c));
    }
    {
        enum { K = 64 };
        int v[K], c[K];
        long a0 = mem_avail_kb(), r0 = rss_kb();
        double t = now(CLOCK_MONOTONIC), tc = now(CLOCK_PROCESS_CPUTIME_ID);
        for (int i = 0; i < K; i++) {
            v[i] = ioctl(kvm, KVM_CREATE_VM, 0);
            c[i] = ioctl(v[i], KVM_CREATE_VCPU, 0);
            if (c[i] >= 0)
                mmap(0, rsz, 3, MAP_SHARED, c[i], 0);
        }
        double wt = (now(CLOCK_MONOTONIC) - t) / K, ct = (now(CLOCK_PROCESS_CPUTIME_ID) - tc) / K;
        printf("%-44s %12.0f ns  (wall %.0f)\n", "VM+vCPU, 64 kept alive", ct * 1e9, wt * 1e9);
        printf("%-44s %12.1f KiB (RSS %.1f)\n", "memory per VM+vCPU (MemAvailable delta)",
               (double)(a0 - mem_avail_kb()) / K, (double)(rss_kb() - r0) / K);
        for (int i = 0; i < K; i++) {
            close(c[i]);
            close(v[i]);
        }
    }
    return 0;
}
