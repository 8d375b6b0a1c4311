"""A C client under `pykvm exec` whose threads change guest memory while four vCPUs run: the MMU notifier."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from pykvm.preload import doctor
from tests.clients.test_exec import HEAD, execute

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    bool(doctor.installation_problems()), reason=str(doctor.installation_problems())
)

CLIENT = """
#define VCPUS 4
#define PAGE 0x5000
static int kvm, vm, vcpu[VCPUS];
static struct kvm_run *run[VCPUS];
static uint8_t *memory;
static volatile int now, stop, last_turn[VCPUS], last_value[VCPUS];
enum { RW = PROT_READ | PROT_WRITE, PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS };

static long statistic(const char *name)
{
    struct { uint32_t flags, name_size, num_desc, id_offset, desc_offset, data_offset; } head;
    struct { uint32_t flags; int16_t exponent; uint16_t size; uint32_t offset, bucket_size; char name[64]; } desc;
    static int fd;
    long value = -1;
    if (!fd) fd = ioctl(vm, _IO(0xAE, 0xce), 0);
    CHECK(fd > 0 && pread(fd, &head, sizeof head, 0) == sizeof head && head.name_size <= 64);
    for (unsigned n = 0; n < head.num_desc; n++) {
        size_t size = 16 + head.name_size;
        CHECK(pread(fd, &desc, size, head.desc_offset + n * size) == size);
        if (!strcmp(desc.name, name))
            CHECK(pread(fd, &value, 8, head.data_offset + desc.offset) == 8);
    }
    CHECK(value >= 0);
    return value;
}

/* One KVM_RUN: what the guest put out, or -1 for EFAULT. */
static int step(int n)
{
    if (ioctl(vcpu[n], KVM_RUN, 0)) {
        CHECK(errno == EFAULT);
        return -1;
    }
    CHECK(run[n]->exit_reason == KVM_EXIT_IO);
    return *((uint8_t *)run[n] + run[n]->io.data_offset);
}
static void *work(void *arg)
{
    long n = (long)arg;
    while (!stop) {
        int turn = now, value = step(n);
        last_value[n] = value;
        __sync_synchronize();
        last_turn[n] = turn;
        if (value < 0) usleep(500);
    }
    return NULL;
}
/* Every KVM_RUN that begins from now on gives this. */
static void all_see(int line, int value)
{
    now++;
    for (int n = 0; n < VCPUS; n++) {
        for (int i = 0; last_turn[n] != now; i++) {
            usleep(200);
            if (i == 50000) failed(line, "a vCPU hangs");
        }
        if (last_value[n] != value) {
            printf("vcpu %d gives %d, not %d\\n", n, last_value[n], value);
            failed(line, "what the guest sees");
        }
    }
}
#define SEE(value) all_see(__LINE__, value)
#define FIXED(prot) CHECK(mmap(memory + PAGE, 4096, prot, PRIVATE | MAP_FIXED, -1, 0) == memory + PAGE)

int main(void)
{
    static const uint8_t code[] = {0x8a, 0x07, 0xe6, 0x10, 0xeb, 0xfa}; /* mov al, [bx]; out 0x10, al; jmp */
    pthread_t threads[VCPUS];
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = 0x1000, .rflags = 2, .rbx = PAGE + 8};
    kvm = device();
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    memory = mmap(NULL, 0x10000, RW, PRIVATE, -1, 0);
    memcpy(memory + 0x1000, code, sizeof code);
    struct kvm_userspace_memory_region region = {.memory_size = 0x10000, .userspace_addr = (long)memory};
    CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    for (int n = 0; n < VCPUS; n++) {
        vcpu[n] = ioctl(vm, KVM_CREATE_VCPU, n);
        run[n] = mmap(NULL, 12288, RW, MAP_SHARED, vcpu[n], 0);
        CHECK(run[n] != MAP_FAILED && ioctl(vcpu[n], KVM_GET_SREGS, &sregs) == 0);
        sregs.cs.base = sregs.cs.selector = 0;
        struct kvm_mp_state runnable = {KVM_MP_STATE_RUNNABLE};
        CHECK(ioctl(vcpu[n], KVM_SET_MP_STATE, &runnable) == 0);
        CHECK(ioctl(vcpu[n], KVM_SET_SREGS, &sregs) == 0 && ioctl(vcpu[n], KVM_SET_REGS, &regs) == 0);
    }

    /* Each of these takes the page out of the tables before it returns. */
    for (int i = 0; i < 6; i++) {
        memory[PAGE + 8] = 40 + i;
        CHECK(step(0) == 40 + i);
        long mapped = statistic("pages_4k"), flushes = statistic("remote_tlb_flush_requests");
        uint8_t *other = mmap(NULL, 4096, RW, PRIVATE, -1, 0);
        switch (i) {
        case 0: CHECK(mprotect(memory + PAGE, 4096, PROT_READ) == 0); break;
        case 1: CHECK(madvise(memory + PAGE, 4096, MADV_DONTNEED) == 0); break;
        case 2: FIXED(RW); break;
        case 3: CHECK(mremap(other, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, memory + PAGE) == memory + PAGE); break;
        case 4: CHECK(mremap(memory + PAGE, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, other) == other); break;
        case 5: CHECK(munmap(memory + PAGE, 4096) == 0); break;
        }
        CHECK(statistic("pages_4k") == mapped - 1);
        CHECK(statistic("remote_tlb_flush_requests") > flushes);
        if (i == 0) CHECK(mprotect(memory + PAGE, 4096, RW) == 0);
        if (i >= 4) FIXED(RW);
        CHECK(step(0) == (i == 0 ? 40 : 0));
    }
    /* What goes wrong changes nothing: the next fault may map again. */
    FAILS(mprotect(memory + PAGE, 4096, 0x7000), EINVAL);
    memory[PAGE + 8] = 50;
    CHECK(step(0) == 50 && step(0) == 50);

    for (long n = 0; n < VCPUS; n++)
        CHECK(pthread_create(&threads[n], NULL, work, (void *)n) == 0);
    for (int i = 0; i < TURNS; i++) {
        memory[PAGE + 8] = 1 + i;
        SEE(1 + i);
        FIXED(RW);
        SEE(0);
        memory[PAGE + 8] = 100 + i;
        SEE(100 + i);
        CHECK(madvise(memory + PAGE, 4096, MADV_DONTNEED) == 0);
        SEE(0);
        CHECK(mprotect(memory + PAGE, 4096, PROT_NONE) == 0);
        SEE(-1);
        CHECK(mprotect(memory + PAGE, 4096, PROT_READ) == 0);
        SEE(0);
        uint8_t *other = mmap(NULL, 4096, RW, PRIVATE, -1, 0);
        other[8] = 77;
        CHECK(mremap(other, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, memory + PAGE) == memory + PAGE);
        SEE(77);
        CHECK(munmap(memory + PAGE, 4096) == 0);
        SEE(-1);
        FIXED(RW);
    }
    /* Two threads change what two others' vCPUs read: nothing crashes, and the last word counts. */
    for (int i = 0; i < 20; i++) {
        CHECK(munmap(memory + PAGE, 4096) == 0);
        FIXED(RW);
    }
    memory[PAGE + 8] = 5;
    SEE(5);
    CHECK(munmap(memory, 0x10000) == 0);
    SEE(-1);
    stop = 1;
    for (int n = 0; n < VCPUS; n++)
        pthread_join(threads[n], NULL);
    puts("ok");
    return 0;
}
"""


@pytest.mark.spec("mmu.notifier", "vm.memslot_sync", "mmu.smp_flush")
def test_memory_changes_under_running_vcpus(mode: str, tmp_path: Path) -> None:
    source, program = tmp_path / "client.c", tmp_path / "client"
    source.write_text(HEAD + CLIENT)
    subprocess.run(["cc", "-w", "-O1", "-DTURNS=3", "-o", program, source, "-pthread"], check=True)
    options = () if mode == "tdp" else ("--extension", "no-tdp")
    done = execute(program, options=options)
    assert (done.stdout, done.stderr, done.returncode) == ("ok\n", "", 0)


POISON = """
#include <linux/userfaultfd.h>
static volatile int signals;
static siginfo_t last;
static void on_sigbus(int number, siginfo_t *info, void *context) { last = *info; signals++; }

int main(void)
{
    static const uint8_t code[] = {0x8a, 0x07, 0xe6, 0x10, 0xeb, 0xfa}; /* mov al, [bx]; out 0x10, al; jmp */
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
    struct uffdio_api api = {.api = UFFD_API, .features = 1 << 14}; /* UFFD_FEATURE_POISON, Linux 6.6 */
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = 0x1000, .rflags = 2, .rbx = 0x5008};
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api)) return 77;
    sigaction(SIGBUS, &action, NULL);
    int kvm = device(), vm = ioctl(kvm, KVM_CREATE_VM, 0);
    uint8_t *memory = mmap(NULL, 0x10000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(memory + 0x1000, code, sizeof code);
    struct kvm_userspace_memory_region region = {.memory_size = 0x10000, .userspace_addr = (long)memory};
    CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    struct kvm_run *run = mmap(NULL, 12288, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
    sregs.cs.base = sregs.cs.selector = 0;
    CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0 && ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
    for (int turn = 0; turn < 2; turn++) {
        /* Before the guest has touched the page, and after. */
        if (turn) CHECK(ioctl(vcpu, KVM_RUN, 0) == 0 && run->exit_reason == KVM_EXIT_IO);
        CHECK(madvise(memory + 0x5000, 4096, MADV_DONTNEED) == 0);
        struct uffdio_register range = {{(long)memory + 0x5000, 4096}, UFFDIO_REGISTER_MODE_MISSING};
        CHECK(ioctl(uffd, UFFDIO_REGISTER, &range) == 0);
        struct { uint64_t start, len, mode; int64_t updated; } poison = {(long)memory + 0x5000, 4096};
        if (ioctl(uffd, _IOWR(UFFDIO, 0x08, poison), &poison)) return 77;
        for (int i = 1; i < 3; i++) {
            signals = 0;
            FAILS(ioctl(vcpu, KVM_RUN, 0), EINTR);
            CHECK(signals == 1 && last.si_signo == SIGBUS && last.si_code == BUS_MCEERR_AR);
            CHECK(last.si_addr == memory + 0x5000 && last.si_addr_lsb == 12);
            CHECK(run->exit_reason == KVM_EXIT_INTR);
            CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0 && regs.rip == 0x1000);
        }
        /* Another page in its place, and the guest goes on. */
        CHECK(mmap(memory + 0x5000, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
              == memory + 0x5000);
        memory[0x5008] = 9;
        CHECK(ioctl(vcpu, KVM_RUN, 0) == 0 && run->exit_reason == KVM_EXIT_IO);
        CHECK(*((uint8_t *)run + run->io.data_offset) == 9 && signals == 1);
        CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0);
        regs.rip = 0x1000;
        if (!turn) regs.rip = 0x1004;
    }
    puts("ok");
    return 0;
}
"""


@pytest.mark.spec("mmu.abnormal_pfn")
def test_a_page_that_the_hardware_has_lost_is_a_sigbus_with_its_address(mode: str, tmp_path: Path) -> None:
    """As userfaultfd makes one; KVM_RUN ends with EINTR, and the client can put another page there."""
    source, program = tmp_path / "client.c", tmp_path / "client"
    source.write_text(HEAD + POISON)
    subprocess.run(["cc", "-w", "-O1", "-o", program, source, "-pthread"], check=True)
    options = () if mode == "tdp" else ("--extension", "no-tdp")
    done = execute(program, options=options)
    if done.returncode == 77:
        pytest.skip("the host has no userfaultfd that poisons pages")
    assert (done.stdout, done.stderr, done.returncode) == ("ok\n", "", 0)
