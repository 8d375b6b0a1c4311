/* SPDX-License-Identifier: MIT */
/*
 * The KVM ABI of Linux 6.18 on x86-64: requests, structures, capabilities, flags, exit reasons.
 *
 * This file is the single source of these facts: the C core includes it, cffi parses it after a
 * small filter (pykvm/abi/_build.py), and pykvm.abi derives every Python name from it. So that the
 * filter can stay small:
 *
 *   - object-like macros are integers, one per line where that is possible; function-like macros
 *     are C only and do not reach Python;
 *   - a structure or union that is not at file scope has a tag, except the two kinds cffi reads
 *     right: the unnamed union directly inside a tagged structure, and nothing else;
 *   - a request is one line: name, direction, number, argument type, then a comment with the file
 *     descriptors that take it and the capability that announces it ("always" if none does).
 *
 * Names, numbers and layouts are Linux's; tests/abi/test_headers.py compares them with the system's
 * <linux/kvm.h> and <asm/kvm.h>. Names of other architectures are here because a client may send
 * or print them; their structures are not, except inside struct kvm_run.
 */
#ifndef PYKVM_KVM_H
#define PYKVM_KVM_H

#include <stdint.h>

/* clang-format off */

#define KVM_API_VERSION 12

/* ---------------------------------------------------------------------------------------------
 * Virtual machine types: the argument of KVM_CREATE_VM
 * ------------------------------------------------------------------------------------------ */

#define KVM_X86_DEFAULT_VM           0
#define KVM_X86_SW_PROTECTED_VM      1
#define KVM_X86_SEV_VM               2
#define KVM_X86_SEV_ES_VM            3
#define KVM_X86_SNP_VM               4
#define KVM_X86_TDX_VM               5

/* the same argument elsewhere */
#define KVM_VM_S390_UCONTROL         1
#define KVM_VM_PPC_HV                1
#define KVM_VM_PPC_PR                2
#define KVM_VM_MIPS_AUTO             0
#define KVM_VM_MIPS_VZ               1
#define KVM_VM_MIPS_TE               2
#define KVM_VM_TYPE_ARM_IPA_SIZE_MASK 0xffULL

/* ---------------------------------------------------------------------------------------------
 * Capabilities: the argument of KVM_CHECK_EXTENSION and KVM_ENABLE_CAP
 *
 * Missing numbers (5, 17, 19, 20, 27, 28) were withdrawn before or after release.
 * ------------------------------------------------------------------------------------------ */

#define KVM_CAP_IRQCHIP                          0
#define KVM_CAP_HLT                              1
#define KVM_CAP_MMU_SHADOW_CACHE_CONTROL         2
#define KVM_CAP_USER_MEMORY                      3
#define KVM_CAP_SET_TSS_ADDR                     4
#define KVM_CAP_VAPIC                            6
#define KVM_CAP_EXT_CPUID                        7
#define KVM_CAP_CLOCKSOURCE                      8
#define KVM_CAP_NR_VCPUS                         9      /* answer: recommended vCPUs per VM */
#define KVM_CAP_NR_MEMSLOTS                      10     /* answer: slots per address space */
#define KVM_CAP_PIT                              11
#define KVM_CAP_NOP_IO_DELAY                     12
#define KVM_CAP_PV_MMU                           13
#define KVM_CAP_MP_STATE                         14
#define KVM_CAP_COALESCED_MMIO                   15     /* answer: page of the ring in the vCPU mmap */
#define KVM_CAP_SYNC_MMU                         16     /* guest sees changes of the host mapping */
#define KVM_CAP_IOMMU                            18
#define KVM_CAP_DESTROY_MEMORY_REGION_WORKS      21
#define KVM_CAP_USER_NMI                         22
#define KVM_CAP_SET_GUEST_DEBUG                  23
#define KVM_CAP_REINJECT_CONTROL                 24
#define KVM_CAP_IRQ_ROUTING                      25
#define KVM_CAP_IRQ_INJECT_STATUS                26
#define KVM_CAP_ASSIGN_DEV_IRQ                   29
#define KVM_CAP_JOIN_MEMORY_REGIONS_WORKS        30
#define KVM_CAP_MCE                              31
#define KVM_CAP_IRQFD                            32
#define KVM_CAP_PIT2                             33
#define KVM_CAP_SET_BOOT_CPU_ID                  34
#define KVM_CAP_PIT_STATE2                       35
#define KVM_CAP_IOEVENTFD                        36
#define KVM_CAP_SET_IDENTITY_MAP_ADDR            37
#define KVM_CAP_XEN_HVM                          38
#define KVM_CAP_ADJUST_CLOCK                     39
#define KVM_CAP_INTERNAL_ERROR_DATA              40
#define KVM_CAP_VCPU_EVENTS                      41
#define KVM_CAP_S390_PSW                         42
#define KVM_CAP_PPC_SEGSTATE                     43
#define KVM_CAP_HYPERV                           44
#define KVM_CAP_HYPERV_VAPIC                     45
#define KVM_CAP_HYPERV_SPIN                      46
#define KVM_CAP_PCI_SEGMENT                      47
#define KVM_CAP_PPC_PAIRED_SINGLES               48
#define KVM_CAP_INTR_SHADOW                      49
#define KVM_CAP_DEBUGREGS                        50
#define KVM_CAP_X86_ROBUST_SINGLESTEP            51
#define KVM_CAP_PPC_OSI                          52
#define KVM_CAP_PPC_UNSET_IRQ                    53
#define KVM_CAP_ENABLE_CAP                       54
#define KVM_CAP_XSAVE                            55
#define KVM_CAP_XCRS                             56
#define KVM_CAP_PPC_GET_PVINFO                   57
#define KVM_CAP_PPC_IRQ_LEVEL                    58
#define KVM_CAP_ASYNC_PF                         59
#define KVM_CAP_TSC_CONTROL                      60
#define KVM_CAP_GET_TSC_KHZ                      61
#define KVM_CAP_PPC_BOOKE_SREGS                  62
#define KVM_CAP_SPAPR_TCE                        63
#define KVM_CAP_PPC_SMT                          64
#define KVM_CAP_PPC_RMA                          65
#define KVM_CAP_MAX_VCPUS                        66     /* answer: most vCPUs per VM */
#define KVM_CAP_PPC_HIOR                         67
#define KVM_CAP_PPC_PAPR                         68
#define KVM_CAP_SW_TLB                           69
#define KVM_CAP_ONE_REG                          70
#define KVM_CAP_S390_GMAP                        71
#define KVM_CAP_TSC_DEADLINE_TIMER               72
#define KVM_CAP_S390_UCONTROL                    73
#define KVM_CAP_SYNC_REGS                        74     /* answer: mask of KVM_SYNC_X86_* */
#define KVM_CAP_PCI_2_3                          75
#define KVM_CAP_KVMCLOCK_CTRL                    76
#define KVM_CAP_SIGNAL_MSI                       77
#define KVM_CAP_PPC_GET_SMMU_INFO                78
#define KVM_CAP_S390_COW                         79
#define KVM_CAP_PPC_ALLOC_HTAB                   80
#define KVM_CAP_READONLY_MEM                     81
#define KVM_CAP_IRQFD_RESAMPLE                   82
#define KVM_CAP_PPC_BOOKE_WATCHDOG               83
#define KVM_CAP_PPC_HTAB_FD                      84
#define KVM_CAP_S390_CSS_SUPPORT                 85
#define KVM_CAP_PPC_EPR                          86
#define KVM_CAP_ARM_PSCI                         87
#define KVM_CAP_ARM_SET_DEVICE_ADDR              88
#define KVM_CAP_DEVICE_CTRL                      89
#define KVM_CAP_IRQ_MPIC                         90
#define KVM_CAP_PPC_RTAS                         91
#define KVM_CAP_IRQ_XICS                         92
#define KVM_CAP_ARM_EL1_32BIT                    93
#define KVM_CAP_SPAPR_MULTITCE                   94
#define KVM_CAP_EXT_EMUL_CPUID                   95
#define KVM_CAP_HYPERV_TIME                      96
#define KVM_CAP_IOAPIC_POLARITY_IGNORED          97
#define KVM_CAP_ENABLE_CAP_VM                    98
#define KVM_CAP_S390_IRQCHIP                     99
#define KVM_CAP_IOEVENTFD_NO_LENGTH              100
#define KVM_CAP_VM_ATTRIBUTES                    101
#define KVM_CAP_ARM_PSCI_0_2                     102
#define KVM_CAP_PPC_FIXUP_HCALL                  103
#define KVM_CAP_PPC_ENABLE_HCALL                 104
#define KVM_CAP_CHECK_EXTENSION_VM               105
#define KVM_CAP_S390_USER_SIGP                   106
#define KVM_CAP_S390_VECTOR_REGISTERS            107
#define KVM_CAP_S390_MEM_OP                      108
#define KVM_CAP_S390_USER_STSI                   109
#define KVM_CAP_S390_SKEYS                       110
#define KVM_CAP_MIPS_FPU                         111
#define KVM_CAP_MIPS_MSA                         112
#define KVM_CAP_S390_INJECT_IRQ                  113
#define KVM_CAP_S390_IRQ_STATE                   114
#define KVM_CAP_PPC_HWRNG                        115
#define KVM_CAP_DISABLE_QUIRKS                   116
#define KVM_CAP_X86_SMM                          117
#define KVM_CAP_MULTI_ADDRESS_SPACE              118    /* answer: address spaces per VM */
#define KVM_CAP_GUEST_DEBUG_HW_BPS               119
#define KVM_CAP_GUEST_DEBUG_HW_WPS               120
#define KVM_CAP_SPLIT_IRQCHIP                    121
#define KVM_CAP_IOEVENTFD_ANY_LENGTH             122
#define KVM_CAP_HYPERV_SYNIC                     123
#define KVM_CAP_S390_RI                          124
#define KVM_CAP_SPAPR_TCE_64                     125
#define KVM_CAP_ARM_PMU_V3                       126
#define KVM_CAP_VCPU_ATTRIBUTES                  127
#define KVM_CAP_MAX_VCPU_ID                      128    /* answer: highest vCPU id + 1 */
#define KVM_CAP_X2APIC_API                       129    /* answer: mask of KVM_X2APIC_API_* */
#define KVM_CAP_S390_USER_INSTR0                 130
#define KVM_CAP_MSI_DEVID                        131
#define KVM_CAP_PPC_HTM                          132
#define KVM_CAP_SPAPR_RESIZE_HPT                 133
#define KVM_CAP_PPC_MMU_RADIX                    134
#define KVM_CAP_PPC_MMU_HASH_V3                  135
#define KVM_CAP_IMMEDIATE_EXIT                   136
#define KVM_CAP_MIPS_VZ                          137
#define KVM_CAP_MIPS_TE                          138
#define KVM_CAP_MIPS_64BIT                       139
#define KVM_CAP_S390_GS                          140
#define KVM_CAP_S390_AIS                         141
#define KVM_CAP_SPAPR_TCE_VFIO                   142
#define KVM_CAP_X86_DISABLE_EXITS                143    /* answer: mask of KVM_X86_DISABLE_EXITS_* */
#define KVM_CAP_ARM_USER_IRQ                     144
#define KVM_CAP_S390_CMMA_MIGRATION              145
#define KVM_CAP_PPC_FWNMI                        146
#define KVM_CAP_PPC_SMT_POSSIBLE                 147
#define KVM_CAP_HYPERV_SYNIC2                    148
#define KVM_CAP_HYPERV_VP_INDEX                  149
#define KVM_CAP_S390_AIS_MIGRATION               150
#define KVM_CAP_PPC_GET_CPU_CHAR                 151
#define KVM_CAP_S390_BPB                         152
#define KVM_CAP_GET_MSR_FEATURES                 153
#define KVM_CAP_HYPERV_EVENTFD                   154
#define KVM_CAP_HYPERV_TLBFLUSH                  155
#define KVM_CAP_S390_HPAGE_1M                    156
#define KVM_CAP_NESTED_STATE                     157    /* answer: most bytes of struct kvm_nested_state */
#define KVM_CAP_ARM_INJECT_SERROR_ESR            158
#define KVM_CAP_MSR_PLATFORM_INFO                159
#define KVM_CAP_PPC_NESTED_HV                    160
#define KVM_CAP_HYPERV_SEND_IPI                  161
#define KVM_CAP_COALESCED_PIO                    162
#define KVM_CAP_HYPERV_ENLIGHTENED_VMCS          163
#define KVM_CAP_EXCEPTION_PAYLOAD                164
#define KVM_CAP_ARM_VM_IPA_SIZE                  165
#define KVM_CAP_MANUAL_DIRTY_LOG_PROTECT         166    /* obsolete, replaced by 168 */
#define KVM_CAP_HYPERV_CPUID                     167
#define KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2        168    /* answer: mask of KVM_DIRTY_LOG_* */
#define KVM_CAP_PPC_IRQ_XIVE                     169
#define KVM_CAP_ARM_SVE                          170
#define KVM_CAP_ARM_PTRAUTH_ADDRESS              171
#define KVM_CAP_ARM_PTRAUTH_GENERIC              172
#define KVM_CAP_PMU_EVENT_FILTER                 173
#define KVM_CAP_ARM_IRQ_LINE_LAYOUT_2            174
#define KVM_CAP_HYPERV_DIRECT_TLBFLUSH           175
#define KVM_CAP_PPC_GUEST_DEBUG_SSTEP            176
#define KVM_CAP_ARM_NISV_TO_USER                 177
#define KVM_CAP_ARM_INJECT_EXT_DABT              178
#define KVM_CAP_S390_VCPU_RESETS                 179
#define KVM_CAP_S390_PROTECTED                   180
#define KVM_CAP_PPC_SECURE_GUEST                 181
#define KVM_CAP_HALT_POLL                        182
#define KVM_CAP_ASYNC_PF_INT                     183
#define KVM_CAP_LAST_CPU                         184
#define KVM_CAP_SMALLER_MAXPHYADDR               185
#define KVM_CAP_S390_DIAG318                     186
#define KVM_CAP_STEAL_TIME                       187
#define KVM_CAP_X86_USER_SPACE_MSR               188    /* answer: mask of KVM_MSR_EXIT_REASON_* */
#define KVM_CAP_X86_MSR_FILTER                   189
#define KVM_CAP_ENFORCE_PV_FEATURE_CPUID         190
#define KVM_CAP_SYS_HYPERV_CPUID                 191
#define KVM_CAP_DIRTY_LOG_RING                   192    /* answer: most bytes of a ring */
#define KVM_CAP_X86_BUS_LOCK_EXIT                193    /* answer: mask of KVM_BUS_LOCK_DETECTION_* */
#define KVM_CAP_PPC_DAWR1                        194
#define KVM_CAP_SET_GUEST_DEBUG2                 195    /* answer: mask of KVM_GUESTDBG_* */
#define KVM_CAP_SGX_ATTRIBUTE                    196
#define KVM_CAP_VM_COPY_ENC_CONTEXT_FROM         197
#define KVM_CAP_PTP_KVM                          198
#define KVM_CAP_HYPERV_ENFORCE_CPUID             199
#define KVM_CAP_SREGS2                           200
#define KVM_CAP_EXIT_HYPERCALL                   201    /* answer: mask of 1 << KVM_HC_* */
#define KVM_CAP_PPC_RPT_INVALIDATE               202
#define KVM_CAP_BINARY_STATS_FD                  203
#define KVM_CAP_EXIT_ON_EMULATION_FAILURE        204
#define KVM_CAP_ARM_MTE                          205
#define KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM         206
#define KVM_CAP_VM_GPA_BITS                      207
#define KVM_CAP_XSAVE2                           208    /* answer: bytes of struct kvm_xsave */
#define KVM_CAP_SYS_ATTRIBUTES                   209
#define KVM_CAP_PPC_AIL_MODE_3                   210
#define KVM_CAP_S390_MEM_OP_EXTENSION            211
#define KVM_CAP_PMU_CAPABILITY                   212    /* answer: mask of KVM_PMU_CAP_* */
#define KVM_CAP_DISABLE_QUIRKS2                  213    /* answer: mask of KVM_X86_QUIRK_* */
#define KVM_CAP_VM_TSC_CONTROL                   214
#define KVM_CAP_SYSTEM_EVENT_DATA                215
#define KVM_CAP_ARM_SYSTEM_SUSPEND               216
#define KVM_CAP_S390_PROTECTED_DUMP              217
#define KVM_CAP_X86_TRIPLE_FAULT_EVENT           218
#define KVM_CAP_X86_NOTIFY_VMEXIT                219
#define KVM_CAP_VM_DISABLE_NX_HUGE_PAGES         220
#define KVM_CAP_S390_ZPCI_OP                     221
#define KVM_CAP_S390_CPU_TOPOLOGY                222
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL           223    /* answer: most bytes of a ring */
#define KVM_CAP_S390_PROTECTED_ASYNC_DISABLE     224
#define KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP       225
#define KVM_CAP_PMU_EVENT_MASKED_EVENTS          226
#define KVM_CAP_COUNTER_OFFSET                   227
#define KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE       228
#define KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES        229
#define KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES    230
#define KVM_CAP_USER_MEMORY2                     231
#define KVM_CAP_MEMORY_FAULT_INFO                232
#define KVM_CAP_MEMORY_ATTRIBUTES                233    /* answer: mask of KVM_MEMORY_ATTRIBUTE_* */
#define KVM_CAP_GUEST_MEMFD                      234
#define KVM_CAP_VM_TYPES                         235    /* answer: mask of 1 << KVM_X86_*_VM */
#define KVM_CAP_PRE_FAULT_MEMORY                 236
#define KVM_CAP_X86_APIC_BUS_CYCLES_NS           237
#define KVM_CAP_X86_GUEST_MODE                   238
#define KVM_CAP_ARM_WRITABLE_IMP_ID_REGS         239
#define KVM_CAP_ARM_EL2                          240
#define KVM_CAP_ARM_EL2_E2H0                     241
#define KVM_CAP_RISCV_MP_STATE_RESET             242
#define KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED   243
#define KVM_CAP_GUEST_MEMFD_FLAGS                244    /* answer: mask of GUEST_MEMFD_FLAG_* */

/* KVM_ENABLE_CAP */
struct kvm_enable_cap {
    uint32_t cap;
    uint32_t flags;             /* must be 0 */
    uint64_t args[4];
    uint8_t pad[64];
};

/* KVM_CAP_DISABLE_QUIRKS(2) */
#define KVM_X86_QUIRK_LINT0_REENABLED        (1 << 0)
#define KVM_X86_QUIRK_CD_NW_CLEARED          (1 << 1)
#define KVM_X86_QUIRK_LAPIC_MMIO_HOLE        (1 << 2)
#define KVM_X86_QUIRK_OUT_7E_INC_RIP         (1 << 3)
#define KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT   (1 << 4)
#define KVM_X86_QUIRK_FIX_HYPERCALL_INSN     (1 << 5)
#define KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS  (1 << 6)
#define KVM_X86_QUIRK_SLOT_ZAP_ALL           (1 << 7)
#define KVM_X86_QUIRK_STUFF_FEATURE_MSRS     (1 << 8)
#define KVM_X86_QUIRK_IGNORE_GUEST_PAT       (1 << 9)

/* KVM_CAP_X86_DISABLE_EXITS */
#define KVM_X86_DISABLE_EXITS_MWAIT          (1 << 0)
#define KVM_X86_DISABLE_EXITS_HLT            (1 << 1)
#define KVM_X86_DISABLE_EXITS_PAUSE          (1 << 2)
#define KVM_X86_DISABLE_EXITS_CSTATE         (1 << 3)
#define KVM_X86_DISABLE_EXITS_APERFMPERF     (1 << 4)

/* KVM_CAP_X2APIC_API */
#define KVM_X2APIC_API_USE_32BIT_IDS            (1ULL << 0)
#define KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK  (1ULL << 1)

/* KVM_CAP_X86_BUS_LOCK_EXIT */
#define KVM_BUS_LOCK_DETECTION_OFF           (1 << 0)
#define KVM_BUS_LOCK_DETECTION_EXIT          (1 << 1)

/* KVM_CAP_X86_NOTIFY_VMEXIT */
#define KVM_X86_NOTIFY_VMEXIT_ENABLED        (1ULL << 0)
#define KVM_X86_NOTIFY_VMEXIT_USER           (1ULL << 1)

/* KVM_CAP_PMU_CAPABILITY */
#define KVM_PMU_CAP_DISABLE                  (1 << 0)

/* ---------------------------------------------------------------------------------------------
 * Guest memory
 * ------------------------------------------------------------------------------------------ */

#define KVM_MEM_LOG_DIRTY_PAGES              (1UL << 0)
#define KVM_MEM_READONLY                     (1UL << 1)
#define KVM_MEM_GUEST_MEMFD                  (1UL << 2)

/* KVM_SET_USER_MEMORY_REGION. slot: id in bits 0-15, address space in bits 16-31; sizes in bytes */
struct kvm_userspace_memory_region {
    uint32_t slot;
    uint32_t flags;
    uint64_t guest_phys_addr;
    uint64_t memory_size;
    uint64_t userspace_addr;
};

/* KVM_SET_USER_MEMORY_REGION2 */
struct kvm_userspace_memory_region2 {
    uint32_t slot;
    uint32_t flags;
    uint64_t guest_phys_addr;
    uint64_t memory_size;
    uint64_t userspace_addr;
    uint64_t guest_memfd_offset;
    uint32_t guest_memfd;
    uint32_t pad1;
    uint64_t pad2[14];
};

/* KVM_GET_DIRTY_LOG. The bitmap has one bit per page, whole 64-bit words */
struct kvm_dirty_log {
    uint32_t slot;
    uint32_t padding1;
    union {
        void *dirty_bitmap;
        uint64_t padding2;
    };
};

/* KVM_CLEAR_DIRTY_LOG */
struct kvm_clear_dirty_log {
    uint32_t slot;
    uint32_t num_pages;
    uint64_t first_page;
    union {
        void *dirty_bitmap;
        uint64_t padding2;
    };
};

/* KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 */
#define KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE  (1 << 0)
#define KVM_DIRTY_LOG_INITIALLY_SET          (1 << 1)

/* one entry of a vCPU's dirty ring: 00 free, 01 dirty, 1x collected and to be reset */
struct kvm_dirty_gfn {
    uint32_t flags;
    uint32_t slot;
    uint64_t offset;
};

#define KVM_DIRTY_GFN_F_DIRTY                (1UL << 0)
#define KVM_DIRTY_GFN_F_RESET                (1UL << 1)
#define KVM_DIRTY_GFN_F_MASK                 0x3

/* KVM_TRANSLATE */
struct kvm_translation {
    uint64_t linear_address;
    uint64_t physical_address;
    uint8_t valid;
    uint8_t writeable;
    uint8_t usermode;
    uint8_t pad[5];
};

/* KVM_SET_MEMORY_ATTRIBUTES */
struct kvm_memory_attributes {
    uint64_t address;
    uint64_t size;
    uint64_t attributes;
    uint64_t flags;
};

#define KVM_MEMORY_ATTRIBUTE_PRIVATE         (1ULL << 3)

/* KVM_CREATE_GUEST_MEMFD */
struct kvm_create_guest_memfd {
    uint64_t size;
    uint64_t flags;
    uint64_t reserved[6];
};

#define GUEST_MEMFD_FLAG_MMAP                (1ULL << 0)
#define GUEST_MEMFD_FLAG_INIT_SHARED         (1ULL << 1)

/* KVM_PRE_FAULT_MEMORY */
struct kvm_pre_fault_memory {
    uint64_t gpa;
    uint64_t size;
    uint64_t flags;
    uint64_t padding[5];
};

/* KVM_MEMORY_ENCRYPT_REG_REGION, KVM_MEMORY_ENCRYPT_UNREG_REGION */
struct kvm_enc_region {
    uint64_t addr;
    uint64_t size;
};

/* ---------------------------------------------------------------------------------------------
 * Registers of a vCPU
 * ------------------------------------------------------------------------------------------ */

#define KVM_NR_INTERRUPTS                    256

/* KVM_GET_REGS, KVM_SET_REGS */
struct kvm_regs {
    uint64_t rax, rbx, rcx, rdx;
    uint64_t rsi, rdi, rsp, rbp;
    uint64_t r8, r9, r10, r11;
    uint64_t r12, r13, r14, r15;
    uint64_t rip, rflags;
};

/* limit is in bytes whatever g says */
struct kvm_segment {
    uint64_t base;
    uint32_t limit;
    uint16_t selector;
    uint8_t type;
    uint8_t present, dpl, db, s, l, g, avl;
    uint8_t unusable;
    uint8_t padding;
};

struct kvm_dtable {
    uint64_t base;
    uint16_t limit;
    uint16_t padding[3];
};

/* KVM_GET_SREGS, KVM_SET_SREGS. interrupt_bitmap: one bit, the vector injected and not yet taken */
struct kvm_sregs {
    struct kvm_segment cs, ds, es, fs, gs, ss;
    struct kvm_segment tr, ldt;
    struct kvm_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8;
    uint64_t efer;
    uint64_t apic_base;
    uint64_t interrupt_bitmap[(KVM_NR_INTERRUPTS + 63) / 64];
};

/* KVM_GET_SREGS2, KVM_SET_SREGS2 */
struct kvm_sregs2 {
    struct kvm_segment cs, ds, es, fs, gs, ss;
    struct kvm_segment tr, ldt;
    struct kvm_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8;
    uint64_t efer;
    uint64_t apic_base;
    uint64_t flags;
    uint64_t pdptrs[4];
};

#define KVM_SREGS2_FLAGS_PDPTRS_VALID        1

/* KVM_GET_FPU, KVM_SET_FPU. ftwx: the abridged tag word of FXSAVE; mxcsr is not transferred */
struct kvm_fpu {
    uint8_t fpr[8][16];
    uint16_t fcw;
    uint16_t fsw;
    uint8_t ftwx;
    uint8_t pad1;
    uint16_t last_opcode;
    uint64_t last_ip;
    uint64_t last_dp;
    uint8_t xmm[16][16];
    uint32_t mxcsr;
    uint32_t pad2;
};

/* KVM_GET_XSAVE, KVM_SET_XSAVE, KVM_GET_XSAVE2: the standard XSAVE format, laid out by CPUID 0xd */
struct kvm_xsave {
    uint32_t region[1024];
    uint32_t extra[];
};

#define KVM_MAX_XCRS                         16

struct kvm_xcr {
    uint32_t xcr;
    uint32_t reserved;
    uint64_t value;
};

/* KVM_GET_XCRS, KVM_SET_XCRS */
struct kvm_xcrs {
    uint32_t nr_xcrs;
    uint32_t flags;
    struct kvm_xcr xcrs[KVM_MAX_XCRS];
    uint64_t padding[16];
};

/* KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS */
struct kvm_debugregs {
    uint64_t db[4];
    uint64_t dr6;
    uint64_t dr7;
    uint64_t flags;
    uint64_t reserved[9];
};

/* KVM_GET_ONE_REG, KVM_SET_ONE_REG. addr: where the value is, in user memory */
struct kvm_one_reg {
    uint64_t id;
    uint64_t addr;
};

/* KVM_GET_REG_LIST */
struct kvm_reg_list {
    uint64_t n;
    uint64_t reg[];
};

/* register ids: architecture in bits 60-63, log2 of the size in bits 52-55 */
#define KVM_REG_ARCH_MASK                    0xff00000000000000ULL
#define KVM_REG_GENERIC                      0x0000000000000000ULL
#define KVM_REG_PPC                          0x1000000000000000ULL
#define KVM_REG_X86                          0x2000000000000000ULL
#define KVM_REG_IA64                         0x3000000000000000ULL
#define KVM_REG_ARM                          0x4000000000000000ULL
#define KVM_REG_S390                         0x5000000000000000ULL
#define KVM_REG_ARM64                        0x6000000000000000ULL
#define KVM_REG_MIPS                         0x7000000000000000ULL
#define KVM_REG_RISCV                        0x8000000000000000ULL
#define KVM_REG_LOONGARCH                    0x9000000000000000ULL

#define KVM_REG_SIZE_SHIFT                   52
#define KVM_REG_SIZE_MASK                    0x00f0000000000000ULL
#define KVM_REG_SIZE_U8                      0x0000000000000000ULL
#define KVM_REG_SIZE_U16                     0x0010000000000000ULL
#define KVM_REG_SIZE_U32                     0x0020000000000000ULL
#define KVM_REG_SIZE_U64                     0x0030000000000000ULL
#define KVM_REG_SIZE_U128                    0x0040000000000000ULL
#define KVM_REG_SIZE_U256                    0x0050000000000000ULL
#define KVM_REG_SIZE_U512                    0x0060000000000000ULL
#define KVM_REG_SIZE_U1024                   0x0070000000000000ULL
#define KVM_REG_SIZE_U2048                   0x0080000000000000ULL

/* x86 ids are KVM_REG_X86 | KVM_REG_SIZE_U64 | type << 32 | MSR number or KVM_REG_GUEST_* */
#define KVM_X86_REG_TYPE_MSR                 2
#define KVM_X86_REG_TYPE_KVM                 3
#define KVM_REG_GUEST_SSP                    0
#define KVM_X86_REG_MSR(index) (KVM_REG_X86 | KVM_REG_SIZE_U64 | ((uint64_t)KVM_X86_REG_TYPE_MSR << 32) | (index))
#define KVM_X86_REG_KVM(index) (KVM_REG_X86 | KVM_REG_SIZE_U64 | ((uint64_t)KVM_X86_REG_TYPE_KVM << 32) | (index))

/* ---------------------------------------------------------------------------------------------
 * Events of a vCPU
 * ------------------------------------------------------------------------------------------ */

/* KVM_INTERRUPT */
struct kvm_interrupt {
    uint32_t irq;
};

struct kvm_vcpu_events_exception {
    uint8_t injected;
    uint8_t nr;
    uint8_t has_error_code;
    uint8_t pending;
    uint32_t error_code;
};

struct kvm_vcpu_events_interrupt {
    uint8_t injected;
    uint8_t nr;
    uint8_t soft;
    uint8_t shadow;
};

struct kvm_vcpu_events_nmi {
    uint8_t injected;
    uint8_t pending;
    uint8_t masked;
    uint8_t pad;
};

struct kvm_vcpu_events_smi {
    uint8_t smm;
    uint8_t pending;
    uint8_t smm_inside_nmi;
    uint8_t latched_init;
};

struct kvm_vcpu_events_triple_fault {
    uint8_t pending;
};

/* KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS. flags say which optional members count */
struct kvm_vcpu_events {
    struct kvm_vcpu_events_exception exception;
    struct kvm_vcpu_events_interrupt interrupt;
    struct kvm_vcpu_events_nmi nmi;
    uint32_t sipi_vector;
    uint32_t flags;
    struct kvm_vcpu_events_smi smi;
    struct kvm_vcpu_events_triple_fault triple_fault;
    uint8_t reserved[26];
    uint8_t exception_has_payload;
    uint64_t exception_payload;
};

#define KVM_VCPUEVENT_VALID_NMI_PENDING      0x00000001
#define KVM_VCPUEVENT_VALID_SIPI_VECTOR      0x00000002
#define KVM_VCPUEVENT_VALID_SHADOW           0x00000004
#define KVM_VCPUEVENT_VALID_SMM              0x00000008
#define KVM_VCPUEVENT_VALID_PAYLOAD          0x00000010
#define KVM_VCPUEVENT_VALID_TRIPLE_FAULT     0x00000020

/* kvm_vcpu_events.interrupt.shadow */
#define KVM_X86_SHADOW_INT_MOV_SS            0x01
#define KVM_X86_SHADOW_INT_STI               0x02

/* KVM_GET_MP_STATE, KVM_SET_MP_STATE */
struct kvm_mp_state {
    uint32_t mp_state;
};

#define KVM_MP_STATE_RUNNABLE                0
#define KVM_MP_STATE_UNINITIALIZED           1
#define KVM_MP_STATE_INIT_RECEIVED           2
#define KVM_MP_STATE_HALTED                  3
#define KVM_MP_STATE_SIPI_RECEIVED           4
#define KVM_MP_STATE_STOPPED                 5
#define KVM_MP_STATE_CHECK_STOP              6
#define KVM_MP_STATE_OPERATING               7
#define KVM_MP_STATE_LOAD                    8
#define KVM_MP_STATE_AP_RESET_HOLD           9
#define KVM_MP_STATE_SUSPENDED               10

/* KVM_SET_SIGNAL_MASK. len: bytes of sigset, 8 on x86-64 */
struct kvm_signal_mask {
    uint32_t len;
    uint8_t sigset[];
};

/* KVM_X86_SET_MCE */
struct kvm_x86_mce {
    uint64_t status;
    uint64_t addr;
    uint64_t misc;
    uint64_t mcg_status;
    uint8_t bank;
    uint8_t pad1[7];
    uint64_t pad2[3];
};

/* KVM_SET_GUEST_DEBUG */
#define KVM_GUESTDBG_ENABLE                  0x00000001
#define KVM_GUESTDBG_SINGLESTEP              0x00000002
#define KVM_GUESTDBG_USE_SW_BP               0x00010000
#define KVM_GUESTDBG_USE_HW_BP               0x00020000
#define KVM_GUESTDBG_INJECT_DB               0x00040000
#define KVM_GUESTDBG_INJECT_BP               0x00080000
#define KVM_GUESTDBG_BLOCKIRQ                0x00100000

struct kvm_guest_debug_arch {
    uint64_t debugreg[8];
};

struct kvm_guest_debug {
    uint32_t control;
    uint32_t pad;
    struct kvm_guest_debug_arch arch;
};

struct kvm_debug_exit_arch {
    uint32_t exception;
    uint32_t pad;
    uint64_t pc;
    uint64_t dr6;
    uint64_t dr7;
};

/* ---------------------------------------------------------------------------------------------
 * CPUID and MSRs
 * ------------------------------------------------------------------------------------------ */

struct kvm_cpuid_entry {
    uint32_t function;
    uint32_t eax;
    uint32_t ebx;
    uint32_t ecx;
    uint32_t edx;
    uint32_t padding;
};

/* KVM_SET_CPUID */
struct kvm_cpuid {
    uint32_t nent;
    uint32_t padding;
    struct kvm_cpuid_entry entries[];
};

struct kvm_cpuid_entry2 {
    uint32_t function;
    uint32_t index;
    uint32_t flags;
    uint32_t eax;
    uint32_t ebx;
    uint32_t ecx;
    uint32_t edx;
    uint32_t padding[3];
};

/* the first name is misspelt in Linux too */
#define KVM_CPUID_FLAG_SIGNIFCANT_INDEX      (1 << 0)
#define KVM_CPUID_FLAG_STATEFUL_FUNC         (1 << 1)
#define KVM_CPUID_FLAG_STATE_READ_NEXT       (1 << 2)

/* KVM_GET_SUPPORTED_CPUID, KVM_GET_EMULATED_CPUID, KVM_SET_CPUID2, KVM_GET_CPUID2, ... */
struct kvm_cpuid2 {
    uint32_t nent;
    uint32_t padding;
    struct kvm_cpuid_entry2 entries[];
};

struct kvm_msr_entry {
    uint32_t index;
    uint32_t reserved;
    uint64_t data;
};

/* KVM_GET_MSRS, KVM_SET_MSRS */
struct kvm_msrs {
    uint32_t nmsrs;
    uint32_t pad;
    struct kvm_msr_entry entries[];
};

/* KVM_GET_MSR_INDEX_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST */
struct kvm_msr_list {
    uint32_t nmsrs;
    uint32_t indices[];
};

/* KVM_X86_SET_MSR_FILTER. A 1 in the bitmap allows what flags name, a 0 denies it */
#define KVM_MSR_FILTER_READ                  (1 << 0)
#define KVM_MSR_FILTER_WRITE                 (1 << 1)
#define KVM_MSR_FILTER_RANGE_VALID_MASK      (KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE)
#define KVM_MSR_FILTER_DEFAULT_ALLOW         (0 << 0)
#define KVM_MSR_FILTER_DEFAULT_DENY          (1 << 0)
#define KVM_MSR_FILTER_VALID_MASK            (KVM_MSR_FILTER_DEFAULT_DENY)
#define KVM_MSR_FILTER_MAX_RANGES            16
#define KVM_MSR_FILTER_MAX_BITMAP_SIZE       0x600      /* bytes */

struct kvm_msr_filter_range {
    uint32_t flags;
    uint32_t nmsrs;
    uint32_t base;
    uint8_t *bitmap;
};

struct kvm_msr_filter {
    uint32_t flags;
    struct kvm_msr_filter_range ranges[KVM_MSR_FILTER_MAX_RANGES];
};

/* KVM_SET_PMU_EVENT_FILTER */
struct kvm_pmu_event_filter {
    uint32_t action;
    uint32_t nevents;
    uint32_t fixed_counter_bitmap;
    uint32_t flags;
    uint32_t pad[4];
    uint64_t events[];
};

#define KVM_PMU_EVENT_ALLOW                  0
#define KVM_PMU_EVENT_DENY                   1
#define KVM_PMU_EVENT_FLAG_MASKED_EVENTS     (1UL << 0)
#define KVM_PMU_EVENT_FLAGS_VALID_MASK       (KVM_PMU_EVENT_FLAG_MASKED_EVENTS)

/* a masked event: select in 0-7 and 32-35, umask match in 8-15, exclude in 55, umask mask in 56-63 */
#define KVM_PMU_MASKED_ENTRY_EVENT_SELECT    0x0000000f000000ffULL
#define KVM_PMU_MASKED_ENTRY_UMASK_MATCH     0x000000000000ff00ULL
#define KVM_PMU_MASKED_ENTRY_EXCLUDE         0x0080000000000000ULL
#define KVM_PMU_MASKED_ENTRY_UMASK_MASK      0xff00000000000000ULL
#define KVM_PMU_MASKED_ENTRY_UMASK_MASK_SHIFT 56

/* ---------------------------------------------------------------------------------------------
 * KVM_RUN and its shared page
 *
 * mmap(vcpu_fd): page 0 struct kvm_run, page 1 the data of KVM_EXIT_IO, page 2 the coalesced ring,
 * from page 64 on the dirty ring.
 * ------------------------------------------------------------------------------------------ */

#define KVM_PIO_PAGE_OFFSET                  1
#define KVM_COALESCED_MMIO_PAGE_OFFSET       2
#define KVM_DIRTY_LOG_PAGE_OFFSET            64

/* kvm_run.exit_reason */
#define KVM_EXIT_UNKNOWN                     0
#define KVM_EXIT_EXCEPTION                   1
#define KVM_EXIT_IO                          2
#define KVM_EXIT_HYPERCALL                   3
#define KVM_EXIT_DEBUG                       4
#define KVM_EXIT_HLT                         5
#define KVM_EXIT_MMIO                        6
#define KVM_EXIT_IRQ_WINDOW_OPEN             7
#define KVM_EXIT_SHUTDOWN                    8
#define KVM_EXIT_FAIL_ENTRY                  9
#define KVM_EXIT_INTR                        10
#define KVM_EXIT_SET_TPR                     11
#define KVM_EXIT_TPR_ACCESS                  12
#define KVM_EXIT_S390_SIEIC                  13
#define KVM_EXIT_S390_RESET                  14
#define KVM_EXIT_DCR                         15
#define KVM_EXIT_NMI                         16
#define KVM_EXIT_INTERNAL_ERROR              17
#define KVM_EXIT_OSI                         18
#define KVM_EXIT_PAPR_HCALL                  19
#define KVM_EXIT_S390_UCONTROL               20
#define KVM_EXIT_WATCHDOG                    21
#define KVM_EXIT_S390_TSCH                   22
#define KVM_EXIT_EPR                         23
#define KVM_EXIT_SYSTEM_EVENT                24
#define KVM_EXIT_S390_STSI                   25
#define KVM_EXIT_IOAPIC_EOI                  26
#define KVM_EXIT_HYPERV                      27
#define KVM_EXIT_ARM_NISV                    28
#define KVM_EXIT_X86_RDMSR                   29
#define KVM_EXIT_X86_WRMSR                   30
#define KVM_EXIT_DIRTY_RING_FULL             31
#define KVM_EXIT_AP_RESET_HOLD               32
#define KVM_EXIT_X86_BUS_LOCK                33
#define KVM_EXIT_XEN                         34
#define KVM_EXIT_RISCV_SBI                   35
#define KVM_EXIT_RISCV_CSR                   36
#define KVM_EXIT_NOTIFY                      37
#define KVM_EXIT_LOONGARCH_IOCSR             38
#define KVM_EXIT_MEMORY_FAULT                39
#define KVM_EXIT_TDX                         40

/* kvm_run.flags */
#define KVM_RUN_X86_SMM                      (1 << 0)
#define KVM_RUN_X86_BUS_LOCK                 (1 << 1)
#define KVM_RUN_X86_GUEST_MODE               (1 << 2)

/* kvm_run.kvm_valid_regs, kvm_run.kvm_dirty_regs */
#define KVM_SYNC_X86_REGS                    (1UL << 0)
#define KVM_SYNC_X86_SREGS                   (1UL << 1)
#define KVM_SYNC_X86_EVENTS                  (1UL << 2)
#define KVM_SYNC_X86_VALID_FIELDS            (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS)
#define SYNC_REGS_SIZE_BYTES                 2048

struct kvm_sync_regs {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_vcpu_events events;
};

/* kvm_run.io.direction */
#define KVM_EXIT_IO_IN                       0
#define KVM_EXIT_IO_OUT                      1

/* kvm_run.hypercall.flags */
#define KVM_EXIT_HYPERCALL_LONG_MODE         (1ULL << 0)

/* kvm_run.internal.suberror */
#define KVM_INTERNAL_ERROR_EMULATION                            1
#define KVM_INTERNAL_ERROR_SIMUL_EX                             2
#define KVM_INTERNAL_ERROR_DELIVERY_EV                          3
#define KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON               4
#define KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES     (1ULL << 0)

/* kvm_run.system_event.type */
#define KVM_SYSTEM_EVENT_SHUTDOWN            1
#define KVM_SYSTEM_EVENT_RESET               2
#define KVM_SYSTEM_EVENT_CRASH               3
#define KVM_SYSTEM_EVENT_WAKEUP              4
#define KVM_SYSTEM_EVENT_SUSPEND             5
#define KVM_SYSTEM_EVENT_SEV_TERM            6
#define KVM_SYSTEM_EVENT_TDX_FATAL           7

/* kvm_run.msr.reason */
#define KVM_MSR_EXIT_REASON_INVAL            (1 << 0)
#define KVM_MSR_EXIT_REASON_UNKNOWN          (1 << 1)
#define KVM_MSR_EXIT_REASON_FILTER           (1 << 2)
#define KVM_MSR_EXIT_REASON_VALID_MASK       (KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER)

/* kvm_run.notify.flags */
#define KVM_NOTIFY_CONTEXT_INVALID           (1 << 0)

/* kvm_run.memory_fault.flags */
#define KVM_MEMORY_EXIT_FLAG_PRIVATE         (1ULL << 3)

struct kvm_hyperv_exit_synic {
    uint32_t msr;
    uint32_t pad2;
    uint64_t control;
    uint64_t evt_page;
    uint64_t msg_page;
};

struct kvm_hyperv_exit_hcall {
    uint64_t input;
    uint64_t result;
    uint64_t params[2];
};

struct kvm_hyperv_exit_syndbg {
    uint32_t msr;
    uint32_t pad2;
    uint64_t control;
    uint64_t status;
    uint64_t send_page;
    uint64_t recv_page;
    uint64_t pending_page;
};

#define KVM_EXIT_HYPERV_SYNIC                1
#define KVM_EXIT_HYPERV_HCALL                2
#define KVM_EXIT_HYPERV_SYNDBG               3

struct kvm_hyperv_exit {
    uint32_t type;
    uint32_t pad1;
    union kvm_hyperv_exit_u {
        struct kvm_hyperv_exit_synic synic;
        struct kvm_hyperv_exit_hcall hcall;
        struct kvm_hyperv_exit_syndbg syndbg;
    } u;
};

#define KVM_EXIT_XEN_HCALL                   1

struct kvm_xen_exit_hcall {
    uint32_t longmode;
    uint32_t cpl;
    uint64_t input;
    uint64_t result;
    uint64_t params[6];
};

struct kvm_xen_exit {
    uint32_t type;
    union kvm_xen_exit_u {
        struct kvm_xen_exit_hcall hcall;
    } u;
};

struct kvm_run_hw {
    uint64_t hardware_exit_reason;
};

struct kvm_run_fail_entry {
    uint64_t hardware_entry_failure_reason;
    uint32_t cpu;
};

struct kvm_run_ex {
    uint32_t exception;
    uint32_t error_code;
};

/* count elements of size bytes at data_offset from the start of struct kvm_run */
struct kvm_run_io {
    uint8_t direction;
    uint8_t size;
    uint16_t port;
    uint32_t count;
    uint64_t data_offset;
};

struct kvm_run_debug {
    struct kvm_debug_exit_arch arch;
};

/* one fragment: at most 8 bytes, in one page */
struct kvm_run_mmio {
    uint64_t phys_addr;
    uint8_t data[8];
    uint32_t len;
    uint8_t is_write;
};

/* flags overlays the longmode member of old clients */
struct kvm_run_hypercall {
    uint64_t nr;
    uint64_t args[6];
    uint64_t ret;
    union {
        uint32_t longmode;
        uint64_t flags;
    };
};

struct kvm_run_tpr_access {
    uint64_t rip;
    uint32_t is_write;
    uint32_t pad;
};

struct kvm_run_s390_sieic {
    uint8_t icptcode;
    uint16_t ipa;
    uint32_t ipb;
};

struct kvm_run_s390_ucontrol {
    uint64_t trans_exc_code;
    uint32_t pgm_code;
};

struct kvm_run_dcr {
    uint32_t dcrn;
    uint32_t data;
    uint8_t is_write;
};

struct kvm_run_internal {
    uint32_t suberror;
    uint32_t ndata;
    uint64_t data[16];
};

/* how suberror KVM_INTERNAL_ERROR_EMULATION uses struct kvm_run_internal */
struct kvm_run_emulation_failure {
    uint32_t suberror;
    uint32_t ndata;
    uint64_t flags;
    uint8_t insn_size;
    uint8_t insn_bytes[15];
};

struct kvm_run_osi {
    uint64_t gprs[32];
};

struct kvm_run_papr_hcall {
    uint64_t nr;
    uint64_t ret;
    uint64_t args[9];
};

struct kvm_run_s390_tsch {
    uint16_t subchannel_id;
    uint16_t subchannel_nr;
    uint32_t io_int_parm;
    uint32_t io_int_word;
    uint32_t ipb;
    uint8_t dequeued;
};

struct kvm_run_epr {
    uint32_t epr;
};

struct kvm_run_system_event {
    uint32_t type;
    uint32_t ndata;
    union {
        uint64_t flags;
        uint64_t data[16];
    };
};

struct kvm_run_s390_stsi {
    uint64_t addr;
    uint8_t ar;
    uint8_t reserved;
    uint8_t fc;
    uint8_t sel1;
    uint16_t sel2;
};

struct kvm_run_eoi {
    uint8_t vector;
};

struct kvm_run_arm_nisv {
    uint64_t esr_iss;
    uint64_t fault_ipa;
};

/* error and, for RDMSR, data come from userspace */
struct kvm_run_msr {
    uint8_t error;
    uint8_t pad[7];
    uint32_t reason;
    uint32_t index;
    uint64_t data;
};

struct kvm_run_riscv_sbi {
    unsigned long extension_id;
    unsigned long function_id;
    unsigned long args[6];
    unsigned long ret[2];
};

struct kvm_run_riscv_csr {
    unsigned long csr_num;
    unsigned long new_value;
    unsigned long write_mask;
    unsigned long ret_value;
};

struct kvm_run_notify {
    uint32_t flags;
};

struct kvm_run_memory_fault {
    uint64_t flags;
    uint64_t gpa;
    uint64_t size;
};

struct kvm_run_tdx_unknown {
    uint64_t ret;
    uint64_t data[5];
};

struct kvm_run_tdx_get_quote {
    uint64_t ret;
    uint64_t gpa;
    uint64_t size;
};

struct kvm_run_tdx_get_tdvmcall_info {
    uint64_t ret;
    uint64_t leaf;
    uint64_t r11, r12, r13, r14;
};

struct kvm_run_tdx_setup_event_notify {
    uint64_t ret;
    uint64_t vector;
};

struct kvm_run_tdx {
    uint64_t flags;
    uint64_t nr;
    union {
        struct kvm_run_tdx_unknown unknown;
        struct kvm_run_tdx_get_quote get_quote;
        struct kvm_run_tdx_get_tdvmcall_info get_tdvmcall_info;
        struct kvm_run_tdx_setup_event_notify setup_event_notify;
    };
};

/* request_interrupt_window, immediate_exit, kvm_dirty_regs are read by KVM_RUN; cr8 both ways */
struct kvm_run {
    uint8_t request_interrupt_window;
    uint8_t immediate_exit;
    uint8_t padding1[6];

    uint32_t exit_reason;
    uint8_t ready_for_interrupt_injection;
    uint8_t if_flag;
    uint16_t flags;

    uint64_t cr8;
    uint64_t apic_base;

    union {
        struct kvm_run_hw hw;                                   /* UNKNOWN */
        struct kvm_run_fail_entry fail_entry;
        struct kvm_run_ex ex;                                   /* EXCEPTION */
        struct kvm_run_io io;
        struct kvm_run_debug debug;
        struct kvm_run_mmio mmio;
        struct kvm_run_mmio iocsr_io;                           /* LOONGARCH_IOCSR */
        struct kvm_run_hypercall hypercall;
        struct kvm_run_tpr_access tpr_access;
        struct kvm_run_s390_sieic s390_sieic;
        uint64_t s390_reset_flags;
        struct kvm_run_s390_ucontrol s390_ucontrol;
        struct kvm_run_dcr dcr;
        struct kvm_run_internal internal;                       /* INTERNAL_ERROR */
        struct kvm_run_emulation_failure emulation_failure;     /* INTERNAL_ERROR */
        struct kvm_run_osi osi;
        struct kvm_run_papr_hcall papr_hcall;
        struct kvm_run_s390_tsch s390_tsch;
        struct kvm_run_epr epr;
        struct kvm_run_system_event system_event;
        struct kvm_run_s390_stsi s390_stsi;
        struct kvm_run_eoi eoi;                                 /* IOAPIC_EOI */
        struct kvm_hyperv_exit hyperv;
        struct kvm_run_arm_nisv arm_nisv;
        struct kvm_run_msr msr;                                 /* X86_RDMSR, X86_WRMSR */
        struct kvm_xen_exit xen;
        struct kvm_run_riscv_sbi riscv_sbi;
        struct kvm_run_riscv_csr riscv_csr;
        struct kvm_run_notify notify;
        struct kvm_run_memory_fault memory_fault;
        struct kvm_run_tdx tdx;
        char padding[256];
    };

    uint64_t kvm_valid_regs;
    uint64_t kvm_dirty_regs;
    union kvm_run_s {
        struct kvm_sync_regs regs;
        char padding[SYNC_REGS_SIZE_BYTES];
    } s;
};

/* KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO */
struct kvm_coalesced_mmio_zone {
    uint64_t addr;
    uint32_t size;
    union {
        uint32_t pad;
        uint32_t pio;
    };
};

struct kvm_coalesced_mmio {
    uint64_t phys_addr;
    uint32_t len;
    union {
        uint32_t pad;
        uint32_t pio;
    };
    uint8_t data[8];
};

struct kvm_coalesced_mmio_ring {
    uint32_t first, last;
    struct kvm_coalesced_mmio coalesced_mmio[];
};

/* entries of the ring: what one page holds */
#define KVM_COALESCED_MMIO_MAX ((4096 - sizeof(struct kvm_coalesced_mmio_ring)) / sizeof(struct kvm_coalesced_mmio))

/* KVM_TPR_ACCESS_REPORTING */
struct kvm_tpr_access_ctl {
    uint32_t enabled;
    uint32_t flags;
    uint32_t reserved[8];
};

/* KVM_SET_VAPIC_ADDR */
struct kvm_vapic_addr {
    uint64_t vapic_addr;
};

/* ---------------------------------------------------------------------------------------------
 * Interrupt controllers, timers, routing, eventfds
 * ------------------------------------------------------------------------------------------ */

/* KVM_IRQ_LINE, KVM_IRQ_LINE_STATUS */
struct kvm_irq_level {
    union {
        uint32_t irq;
        int32_t status;
    };
    uint32_t level;
};

struct kvm_pic_state {
    uint8_t last_irr;
    uint8_t irr;
    uint8_t imr;
    uint8_t isr;
    uint8_t priority_add;
    uint8_t irq_base;
    uint8_t read_reg_select;
    uint8_t poll;
    uint8_t special_mask;
    uint8_t init_state;
    uint8_t auto_eoi;
    uint8_t rotate_on_auto_eoi;
    uint8_t special_fully_nested_mode;
    uint8_t init4;
    uint8_t elcr;
    uint8_t elcr_mask;
};

#define KVM_IOAPIC_NUM_PINS                  24

struct kvm_ioapic_redirect_fields {
    uint8_t vector;
    uint8_t delivery_mode:3;
    uint8_t dest_mode:1;
    uint8_t delivery_status:1;
    uint8_t polarity:1;
    uint8_t remote_irr:1;
    uint8_t trig_mode:1;
    uint8_t mask:1;
    uint8_t reserve:7;
    uint8_t reserved[4];
    uint8_t dest_id;
};

union kvm_ioapic_redirect_entry {
    uint64_t bits;
    struct kvm_ioapic_redirect_fields fields;
};

struct kvm_ioapic_state {
    uint64_t base_address;
    uint32_t ioregsel;
    uint32_t id;
    uint32_t irr;
    uint32_t pad;
    union kvm_ioapic_redirect_entry redirtbl[KVM_IOAPIC_NUM_PINS];
};

#define KVM_IRQCHIP_PIC_MASTER               0
#define KVM_IRQCHIP_PIC_SLAVE                1
#define KVM_IRQCHIP_IOAPIC                   2
#define KVM_NR_IRQCHIPS                      3

/* KVM_GET_IRQCHIP, KVM_SET_IRQCHIP */
struct kvm_irqchip {
    uint32_t chip_id;
    uint32_t pad;
    union kvm_irqchip_chip {
        char dummy[512];
        struct kvm_pic_state pic;
        struct kvm_ioapic_state ioapic;
    } chip;
};

#define KVM_APIC_REG_SIZE                    0x400

/* KVM_GET_LAPIC, KVM_SET_LAPIC: the register page as the guest sees it, 16 bytes per register */
struct kvm_lapic_state {
    char regs[KVM_APIC_REG_SIZE];
};

/* KVM_CREATE_PIT2 */
struct kvm_pit_config {
    uint32_t flags;
    uint32_t pad[15];
};

#define KVM_PIT_SPEAKER_DUMMY                1

struct kvm_pit_channel_state {
    uint32_t count;             /* up to 65536 */
    uint16_t latched_count;
    uint8_t count_latched;
    uint8_t status_latched;
    uint8_t status;
    uint8_t read_state;
    uint8_t write_state;
    uint8_t write_latch;
    uint8_t rw_mode;
    uint8_t mode;
    uint8_t bcd;
    uint8_t gate;
    int64_t count_load_time;
};

/* KVM_GET_PIT, KVM_SET_PIT */
struct kvm_pit_state {
    struct kvm_pit_channel_state channels[3];
};

#define KVM_PIT_FLAGS_HPET_LEGACY            0x00000001
#define KVM_PIT_FLAGS_SPEAKER_DATA_ON        0x00000002

/* KVM_GET_PIT2, KVM_SET_PIT2 */
struct kvm_pit_state2 {
    struct kvm_pit_channel_state channels[3];
    uint32_t flags;
    uint32_t reserved[9];
};

/* KVM_REINJECT_CONTROL */
struct kvm_reinject_control {
    uint8_t pit_reinject;
    uint8_t reserved[31];
};

struct kvm_irq_routing_irqchip {
    uint32_t irqchip;
    uint32_t pin;
};

struct kvm_irq_routing_msi {
    uint32_t address_lo;
    uint32_t address_hi;
    uint32_t data;
    union {
        uint32_t pad;
        uint32_t devid;
    };
};

struct kvm_irq_routing_s390_adapter {
    uint64_t ind_addr;
    uint64_t summary_addr;
    uint64_t ind_offset;
    uint32_t summary_offset;
    uint32_t adapter_id;
};

struct kvm_irq_routing_hv_sint {
    uint32_t vcpu;
    uint32_t sint;
};

struct kvm_irq_routing_xen_evtchn {
    uint32_t port;
    uint32_t vcpu;
    uint32_t priority;
};

#define KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL ((uint32_t)(-1))

/* kvm_irq_routing_entry.type */
#define KVM_IRQ_ROUTING_IRQCHIP              1
#define KVM_IRQ_ROUTING_MSI                  2
#define KVM_IRQ_ROUTING_S390_ADAPTER         3
#define KVM_IRQ_ROUTING_HV_SINT              4
#define KVM_IRQ_ROUTING_XEN_EVTCHN           5

struct kvm_irq_routing_entry {
    uint32_t gsi;
    uint32_t type;
    uint32_t flags;
    uint32_t pad;
    union kvm_irq_routing_entry_u {
        struct kvm_irq_routing_irqchip irqchip;
        struct kvm_irq_routing_msi msi;
        struct kvm_irq_routing_s390_adapter adapter;
        struct kvm_irq_routing_hv_sint hv_sint;
        struct kvm_irq_routing_xen_evtchn xen_evtchn;
        uint32_t pad[8];
    } u;
};

/* KVM_SET_GSI_ROUTING */
struct kvm_irq_routing {
    uint32_t nr;
    uint32_t flags;
    struct kvm_irq_routing_entry entries[];
};

/* KVM_SIGNAL_MSI; also kvm_irq_routing_entry.flags */
#define KVM_MSI_VALID_DEVID                  (1U << 0)

struct kvm_msi {
    uint32_t address_lo;
    uint32_t address_hi;
    uint32_t data;
    uint32_t flags;
    uint32_t devid;
    uint8_t pad[12];
};

/* KVM_IRQFD */
#define KVM_IRQFD_FLAG_DEASSIGN              (1 << 0)
#define KVM_IRQFD_FLAG_RESAMPLE              (1 << 1)   /* KVM_CAP_IRQFD_RESAMPLE: resamplefd is valid */

struct kvm_irqfd {
    uint32_t fd;
    uint32_t gsi;
    uint32_t flags;
    uint32_t resamplefd;
    uint8_t pad[16];
};

/* KVM_IOEVENTFD. addr: a port or a gpa; len: 1, 2, 4, 8, or 0 for any */
#define KVM_IOEVENTFD_FLAG_DATAMATCH         (1 << 0)
#define KVM_IOEVENTFD_FLAG_PIO               (1 << 1)
#define KVM_IOEVENTFD_FLAG_DEASSIGN          (1 << 2)
#define KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY (1 << 3)
#define KVM_IOEVENTFD_VALID_FLAG_MASK        ((1 << 5) - 1)

struct kvm_ioeventfd {
    uint64_t datamatch;
    uint64_t addr;
    uint32_t len;
    int32_t fd;
    uint32_t flags;
    uint8_t pad[36];
};

/* ---------------------------------------------------------------------------------------------
 * Limits of Linux's implementation that a client can meet
 * ------------------------------------------------------------------------------------------ */

#define KVM_MAX_CPUID_ENTRIES                256        /* of KVM_SET_CPUID2, KVM_GET_SUPPORTED_CPUID */
#define MAX_IO_MSRS                          256        /* of KVM_GET_MSRS and KVM_SET_MSRS */
#define KVM_MAX_IRQ_ROUTES                   4096
#define KVM_USER_MEM_SLOTS                   32764      /* per address space */
#define KVM_MEM_MAX_NR_PAGES                 ((1UL << 31) - 1)

/* ---------------------------------------------------------------------------------------------
 * Time
 * ------------------------------------------------------------------------------------------ */

/* KVM_GET_CLOCK, KVM_SET_CLOCK. Bit 0 of flags is not used: old kernels answered 1 for "yes" */
#define KVM_CLOCK_TSC_STABLE                 2
#define KVM_CLOCK_REALTIME                   (1 << 2)
#define KVM_CLOCK_HOST_TSC                   (1 << 3)

struct kvm_clock_data {
    uint64_t clock;
    uint32_t flags;
    uint32_t pad0;
    uint64_t realtime;
    uint64_t host_tsc;
    uint32_t pad[4];
};

/* ---------------------------------------------------------------------------------------------
 * Devices and attributes
 * ------------------------------------------------------------------------------------------ */

/* KVM_CREATE_DEVICE. fd is the answer */
struct kvm_create_device {
    uint32_t type;
    uint32_t fd;
    uint32_t flags;
};

#define KVM_CREATE_DEVICE_TEST               1

#define KVM_DEV_TYPE_FSL_MPIC_20             1
#define KVM_DEV_TYPE_FSL_MPIC_42             2
#define KVM_DEV_TYPE_XICS                    3
#define KVM_DEV_TYPE_VFIO                    4
#define KVM_DEV_TYPE_ARM_VGIC_V2             5
#define KVM_DEV_TYPE_FLIC                    6
#define KVM_DEV_TYPE_ARM_VGIC_V3             7
#define KVM_DEV_TYPE_ARM_VGIC_ITS            8
#define KVM_DEV_TYPE_XIVE                    9
#define KVM_DEV_TYPE_ARM_PV_TIME             10
#define KVM_DEV_TYPE_RISCV_AIA               11
#define KVM_DEV_TYPE_LOONGARCH_IPI           12
#define KVM_DEV_TYPE_LOONGARCH_EIOINTC       13
#define KVM_DEV_TYPE_LOONGARCH_PCHPIC        14
#define KVM_DEV_TYPE_MAX                     15

/* KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR. addr: in user memory */
struct kvm_device_attr {
    uint32_t flags;
    uint32_t group;
    uint64_t attr;
    uint64_t addr;
};

/* of /dev/kvm */
#define KVM_X86_GRP_SYSTEM                   0
#define KVM_X86_XCOMP_GUEST_SUPP             0
#define KVM_X86_GRP_SEV                      1
#define KVM_X86_SEV_VMSA_FEATURES            0

/* of a vCPU */
#define KVM_VCPU_TSC_CTRL                    0
#define KVM_VCPU_TSC_OFFSET                  0

/* of KVM_DEV_TYPE_VFIO */
#define KVM_DEV_VFIO_FILE                    1
#define KVM_DEV_VFIO_FILE_ADD                1
#define KVM_DEV_VFIO_FILE_DEL                2
#define KVM_DEV_VFIO_GROUP                   KVM_DEV_VFIO_FILE
#define KVM_DEV_VFIO_GROUP_ADD               KVM_DEV_VFIO_FILE_ADD
#define KVM_DEV_VFIO_GROUP_DEL               KVM_DEV_VFIO_FILE_DEL
#define KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE     3

struct kvm_vfio_spapr_tce {
    int32_t groupfd;
    int32_t tablefd;
};

/* ---------------------------------------------------------------------------------------------
 * Binary statistics: what a KVM_GET_STATS_FD descriptor reads
 * ------------------------------------------------------------------------------------------ */

/* offsets are in bytes from the start of the file */
struct kvm_stats_header {
    uint32_t flags;
    uint32_t name_size;
    uint32_t num_desc;
    uint32_t id_offset;
    uint32_t desc_offset;
    uint32_t data_offset;
};

/* size: uint64_t values at offset in the data block; name: name_size bytes, zero-terminated */
struct kvm_stats_desc {
    uint32_t flags;
    int16_t exponent;
    uint16_t size;
    uint32_t offset;
    uint32_t bucket_size;
    char name[];
};

#define KVM_STATS_TYPE_SHIFT                 0
#define KVM_STATS_TYPE_MASK                  (0xF << KVM_STATS_TYPE_SHIFT)
#define KVM_STATS_TYPE_CUMULATIVE            (0x0 << KVM_STATS_TYPE_SHIFT)
#define KVM_STATS_TYPE_INSTANT               (0x1 << KVM_STATS_TYPE_SHIFT)
#define KVM_STATS_TYPE_PEAK                  (0x2 << KVM_STATS_TYPE_SHIFT)
#define KVM_STATS_TYPE_LINEAR_HIST           (0x3 << KVM_STATS_TYPE_SHIFT)
#define KVM_STATS_TYPE_LOG_HIST              (0x4 << KVM_STATS_TYPE_SHIFT)
#define KVM_STATS_TYPE_MAX                   KVM_STATS_TYPE_LOG_HIST
#define KVM_STATS_UNIT_SHIFT                 4
#define KVM_STATS_UNIT_MASK                  (0xF << KVM_STATS_UNIT_SHIFT)
#define KVM_STATS_UNIT_NONE                  (0x0 << KVM_STATS_UNIT_SHIFT)
#define KVM_STATS_UNIT_BYTES                 (0x1 << KVM_STATS_UNIT_SHIFT)
#define KVM_STATS_UNIT_SECONDS               (0x2 << KVM_STATS_UNIT_SHIFT)
#define KVM_STATS_UNIT_CYCLES                (0x3 << KVM_STATS_UNIT_SHIFT)
#define KVM_STATS_UNIT_BOOLEAN               (0x4 << KVM_STATS_UNIT_SHIFT)
#define KVM_STATS_UNIT_MAX                   KVM_STATS_UNIT_BOOLEAN
#define KVM_STATS_BASE_SHIFT                 8
#define KVM_STATS_BASE_MASK                  (0xF << KVM_STATS_BASE_SHIFT)
#define KVM_STATS_BASE_POW10                 (0x0 << KVM_STATS_BASE_SHIFT)
#define KVM_STATS_BASE_POW2                  (0x1 << KVM_STATS_BASE_SHIFT)
#define KVM_STATS_BASE_MAX                   KVM_STATS_BASE_POW2

/* ---------------------------------------------------------------------------------------------
 * The paravirtual interface of guests: CPUID 0x40000000, hypercalls (its MSRs are in x86.h)
 * ------------------------------------------------------------------------------------------ */

#define KVM_CPUID_SIGNATURE                  0x40000000
#define KVM_CPUID_FEATURES                   0x40000001

/* bits of KVM_CPUID_FEATURES, eax */
#define KVM_FEATURE_CLOCKSOURCE              0
#define KVM_FEATURE_NOP_IO_DELAY             1
#define KVM_FEATURE_MMU_OP                   2
#define KVM_FEATURE_CLOCKSOURCE2             3
#define KVM_FEATURE_ASYNC_PF                 4
#define KVM_FEATURE_STEAL_TIME               5
#define KVM_FEATURE_PV_EOI                   6
#define KVM_FEATURE_PV_UNHALT                7
#define KVM_FEATURE_PV_TLB_FLUSH             9
#define KVM_FEATURE_ASYNC_PF_VMEXIT          10
#define KVM_FEATURE_PV_SEND_IPI              11
#define KVM_FEATURE_POLL_CONTROL             12
#define KVM_FEATURE_PV_SCHED_YIELD           13
#define KVM_FEATURE_ASYNC_PF_INT             14
#define KVM_FEATURE_MSI_EXT_DEST_ID          15
#define KVM_FEATURE_HC_MAP_GPA_RANGE         16
#define KVM_FEATURE_MIGRATION_CONTROL        17
#define KVM_FEATURE_CLOCKSOURCE_STABLE_BIT   24

/* bit of KVM_CPUID_FEATURES, edx */
#define KVM_HINTS_REALTIME                   0

#define KVM_HC_VAPIC_POLL_IRQ                1
#define KVM_HC_MMU_OP                        2
#define KVM_HC_FEATURES                      3
#define KVM_HC_PPC_MAP_MAGIC_PAGE            4
#define KVM_HC_KICK_CPU                      5
#define KVM_HC_MIPS_GET_CLOCK_FREQ           6
#define KVM_HC_MIPS_EXIT_VM                  7
#define KVM_HC_MIPS_CONSOLE_OUTPUT           8
#define KVM_HC_CLOCK_PAIRING                 9
#define KVM_HC_SEND_IPI                      10
#define KVM_HC_SCHED_YIELD                   11
#define KVM_HC_MAP_GPA_RANGE                 12

/* a hypercall's error is the negative of one of these in RAX */
#define KVM_EPERM                            1
#define KVM_E2BIG                            7
#define KVM_EFAULT                           14
#define KVM_EINVAL                           22
#define KVM_EOPNOTSUPP                       95
#define KVM_ENOSYS                           1000

/* KVM_HC_MAP_GPA_RANGE, third argument */
#define KVM_MAP_GPA_RANGE_PAGE_SZ_4K         0
#define KVM_MAP_GPA_RANGE_PAGE_SZ_2M         (1 << 0)
#define KVM_MAP_GPA_RANGE_PAGE_SZ_1G         (1 << 1)
#define KVM_MAP_GPA_RANGE_ENCRYPTED          (1 << 4)
#define KVM_MAP_GPA_RANGE_DECRYPTED          (0 << 4)

/* KVM_HC_CLOCK_PAIRING */
#define KVM_CLOCK_PAIRING_WALLCLOCK          0

struct kvm_clock_pairing {
    int64_t sec;
    int64_t nsec;
    uint64_t tsc;
    uint32_t flags;
    uint32_t pad[9];
};

/* MSR_KVM_WALL_CLOCK_NEW: time of boot; an odd version means that it is being written */
struct pvclock_wall_clock {
    uint32_t version;
    uint32_t sec;
    uint32_t nsec;
};

/* MSR_KVM_SYSTEM_TIME_NEW: ns = system_time + ((tsc - tsc_timestamp) << tsc_shift) * mul >> 32 */
struct pvclock_vcpu_time_info {
    uint32_t version;
    uint32_t pad0;
    uint64_t tsc_timestamp;
    uint64_t system_time;
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags;
    uint8_t pad[2];
};

#define PVCLOCK_TSC_STABLE_BIT               (1 << 0)
#define PVCLOCK_GUEST_STOPPED                (1 << 1)

/* bit 0 of MSR_KVM_SYSTEM_TIME_NEW, MSR_KVM_STEAL_TIME and MSR_KVM_PV_EOI_EN */
#define KVM_MSR_ENABLED                      1

/* MSR_KVM_STEAL_TIME */
struct kvm_steal_time {
    uint64_t steal;
    uint32_t version;
    uint32_t flags;
    uint8_t preempted;
    uint8_t u8_pad[3];
    uint32_t pad[11];
};

#define KVM_VCPU_PREEMPTED                   (1 << 0)
#define KVM_VCPU_FLUSH_TLB                   (1 << 1)
#define KVM_STEAL_ALIGNMENT_BITS             5
#define KVM_STEAL_VALID_BITS                 (-1ULL << (KVM_STEAL_ALIGNMENT_BITS + 1))
#define KVM_STEAL_RESERVED_MASK              (((1 << KVM_STEAL_ALIGNMENT_BITS) - 1) << 1)

/* MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_INT */
struct kvm_vcpu_pv_apf_data {
    uint32_t flags;
    uint32_t token;
    uint8_t pad[56];
};

#define KVM_ASYNC_PF_ENABLED                 (1 << 0)
#define KVM_ASYNC_PF_SEND_ALWAYS             (1 << 1)
#define KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT   (1 << 2)
#define KVM_ASYNC_PF_DELIVERY_AS_INT         (1 << 3)
#define KVM_ASYNC_PF_VEC_MASK                0xff
#define KVM_PV_REASON_PAGE_NOT_PRESENT       1
#define KVM_PV_REASON_PAGE_READY             2

/* MSR_KVM_PV_EOI_EN, MSR_KVM_MIGRATION_CONTROL */
#define KVM_PV_EOI_BIT                       0
#define KVM_PV_EOI_MASK                      (0x1 << KVM_PV_EOI_BIT)
#define KVM_PV_EOI_ENABLED                   KVM_PV_EOI_MASK
#define KVM_PV_EOI_DISABLED                  0x0
#define KVM_MIGRATION_READY                  (1 << 0)

/* ---------------------------------------------------------------------------------------------
 * Nested virtualization
 * ------------------------------------------------------------------------------------------ */

#define KVM_STATE_NESTED_FORMAT_VMX          0
#define KVM_STATE_NESTED_FORMAT_SVM          1
#define KVM_STATE_NESTED_GUEST_MODE          0x00000001
#define KVM_STATE_NESTED_RUN_PENDING         0x00000002
#define KVM_STATE_NESTED_EVMCS               0x00000004
#define KVM_STATE_NESTED_MTF_PENDING         0x00000008
#define KVM_STATE_NESTED_GIF_SET             0x00000100
#define KVM_STATE_NESTED_SMM_GUEST_MODE      0x00000001
#define KVM_STATE_NESTED_SMM_VMXON           0x00000002
#define KVM_STATE_NESTED_VMX_VMCS_SIZE       0x1000
#define KVM_STATE_NESTED_SVM_VMCB_SIZE       0x1000
#define KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE 0x00000001

struct kvm_vmx_nested_state_data {
    uint8_t vmcs12[KVM_STATE_NESTED_VMX_VMCS_SIZE];
    uint8_t shadow_vmcs12[KVM_STATE_NESTED_VMX_VMCS_SIZE];
};

struct kvm_vmx_nested_state_smm {
    uint16_t flags;
};

struct kvm_vmx_nested_state_hdr {
    uint64_t vmxon_pa;
    uint64_t vmcs12_pa;
    struct kvm_vmx_nested_state_smm smm;
    uint16_t pad;
    uint32_t flags;
    uint64_t preemption_timer_deadline;
};

struct kvm_svm_nested_state_data {
    uint8_t vmcb12[KVM_STATE_NESTED_SVM_VMCB_SIZE];
};

struct kvm_svm_nested_state_hdr {
    uint64_t vmcb_pa;
};

/* KVM_GET_NESTED_STATE, KVM_SET_NESTED_STATE. The data has no size here: the request's number
 * was fixed when only the 128-byte header existed */
struct kvm_nested_state {
    uint16_t flags;
    uint16_t format;
    uint32_t size;
    union kvm_nested_state_hdr {
        struct kvm_vmx_nested_state_hdr vmx;
        struct kvm_svm_nested_state_hdr svm;
        uint8_t pad[120];
    } hdr;
    union kvm_nested_state_data {
        struct kvm_vmx_nested_state_data vmx[0];
        struct kvm_svm_nested_state_data svm[0];
#ifdef PYKVM_CDEF
        ...;                    /* cffi gives an empty union one byte unless told to ask */
#endif
    } data;
};

/* ---------------------------------------------------------------------------------------------
 * Hyper-V and Xen
 * ------------------------------------------------------------------------------------------ */

/* KVM_HYPERV_EVENTFD */
struct kvm_hyperv_eventfd {
    uint32_t conn_id;
    int32_t fd;
    uint32_t flags;
    uint32_t padding[3];
};

#define KVM_HYPERV_CONN_ID_MASK              0x00ffffff
#define KVM_HYPERV_EVENTFD_DEASSIGN          (1 << 0)

/* KVM_XEN_HVM_CONFIG; the flags are also KVM_CAP_XEN_HVM's answer */
struct kvm_xen_hvm_config {
    uint32_t flags;
    uint32_t msr;
    uint64_t blob_addr_32;
    uint64_t blob_addr_64;
    uint8_t blob_size_32;
    uint8_t blob_size_64;
    uint8_t pad2[30];
};

#define KVM_XEN_HVM_CONFIG_HYPERCALL_MSR     (1 << 0)
#define KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL   (1 << 1)
#define KVM_XEN_HVM_CONFIG_SHARED_INFO       (1 << 2)
#define KVM_XEN_HVM_CONFIG_RUNSTATE          (1 << 3)
#define KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL     (1 << 4)
#define KVM_XEN_HVM_CONFIG_EVTCHN_SEND       (1 << 5)
#define KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG (1 << 6)
#define KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE (1 << 7)
#define KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA   (1 << 8)
#define KVM_XEN_MSR_MIN_INDEX                0x40000000u
#define KVM_XEN_MSR_MAX_INDEX                0x4fffffffu

union kvm_xen_hvm_attr_shared_info {
    uint64_t gfn;
    uint64_t hva;
};

struct kvm_xen_hvm_attr_port {
    uint32_t port;
    uint32_t vcpu;
    uint32_t priority;
};

struct kvm_xen_hvm_attr_eventfd {
    uint32_t port;
    int32_t fd;
};

union kvm_xen_hvm_attr_deliver {
    struct kvm_xen_hvm_attr_port port;
    struct kvm_xen_hvm_attr_eventfd eventfd;
    uint32_t padding[4];
};

struct kvm_xen_hvm_attr_evtchn {
    uint32_t send_port;
    uint32_t type;
    uint32_t flags;
    union kvm_xen_hvm_attr_deliver deliver;
};

/* KVM_XEN_HVM_GET_ATTR, KVM_XEN_HVM_SET_ATTR */
struct kvm_xen_hvm_attr {
    uint16_t type;
    uint16_t pad[3];
    union kvm_xen_hvm_attr_u {
        uint8_t long_mode;
        uint8_t vector;
        uint8_t runstate_update_flag;
        union kvm_xen_hvm_attr_shared_info shared_info;
        struct kvm_xen_hvm_attr_evtchn evtchn;
        uint32_t xen_version;
        uint64_t pad[8];
    } u;
};

#define KVM_XEN_INVALID_GFN                  ((uint64_t)-1)
#define KVM_XEN_INVALID_GPA                  ((uint64_t)-1)
#define KVM_XEN_EVTCHN_DEASSIGN              (1 << 0)
#define KVM_XEN_EVTCHN_UPDATE                (1 << 1)
#define KVM_XEN_EVTCHN_RESET                 (1 << 2)
#define KVM_XEN_ATTR_TYPE_LONG_MODE          0x0
#define KVM_XEN_ATTR_TYPE_SHARED_INFO        0x1
#define KVM_XEN_ATTR_TYPE_UPCALL_VECTOR      0x2
#define KVM_XEN_ATTR_TYPE_EVTCHN             0x3
#define KVM_XEN_ATTR_TYPE_XEN_VERSION        0x4
#define KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG 0x5
#define KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA    0x6

struct kvm_xen_vcpu_attr_runstate {
    uint64_t state;
    uint64_t state_entry_time;
    uint64_t time_running;
    uint64_t time_runnable;
    uint64_t time_blocked;
    uint64_t time_offline;
};

struct kvm_xen_vcpu_attr_timer {
    uint32_t port;
    uint32_t priority;
    uint64_t expires_ns;
};

/* KVM_XEN_VCPU_GET_ATTR, KVM_XEN_VCPU_SET_ATTR */
struct kvm_xen_vcpu_attr {
    uint16_t type;
    uint16_t pad[3];
    union kvm_xen_vcpu_attr_u {
        uint64_t gpa;
        uint64_t hva;
        uint64_t pad[8];
        struct kvm_xen_vcpu_attr_runstate runstate;
        uint32_t vcpu_id;
        struct kvm_xen_vcpu_attr_timer timer;
        uint8_t vector;
    } u;
};

#define KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO         0x0
#define KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO    0x1
#define KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR     0x2
#define KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT  0x3
#define KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA     0x4
#define KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST   0x5
#define KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID           0x6
#define KVM_XEN_VCPU_ATTR_TYPE_TIMER             0x7
#define KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR     0x8
#define KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA     0x9

/* ---------------------------------------------------------------------------------------------
 * Encrypted guests: KVM_MEMORY_ENCRYPT_OP takes struct kvm_sev_cmd or struct kvm_tdx_cmd
 * ------------------------------------------------------------------------------------------ */

#define KVM_SEV_INIT                         0
#define KVM_SEV_ES_INIT                      1
#define KVM_SEV_LAUNCH_START                 2
#define KVM_SEV_LAUNCH_UPDATE_DATA           3
#define KVM_SEV_LAUNCH_UPDATE_VMSA           4
#define KVM_SEV_LAUNCH_SECRET                5
#define KVM_SEV_LAUNCH_MEASURE               6
#define KVM_SEV_LAUNCH_FINISH                7
#define KVM_SEV_SEND_START                   8
#define KVM_SEV_SEND_UPDATE_DATA             9
#define KVM_SEV_SEND_UPDATE_VMSA             10
#define KVM_SEV_SEND_FINISH                  11
#define KVM_SEV_RECEIVE_START                12
#define KVM_SEV_RECEIVE_UPDATE_DATA          13
#define KVM_SEV_RECEIVE_UPDATE_VMSA          14
#define KVM_SEV_RECEIVE_FINISH               15
#define KVM_SEV_GUEST_STATUS                 16
#define KVM_SEV_DBG_DECRYPT                  17
#define KVM_SEV_DBG_ENCRYPT                  18
#define KVM_SEV_CERT_EXPORT                  19
#define KVM_SEV_GET_ATTESTATION_REPORT       20
#define KVM_SEV_SEND_CANCEL                  21
#define KVM_SEV_INIT2                        22
#define KVM_SEV_SNP_LAUNCH_START             100
#define KVM_SEV_SNP_LAUNCH_UPDATE            101
#define KVM_SEV_SNP_LAUNCH_FINISH            102
#define KVM_SEV_NR_MAX                       103

struct kvm_sev_cmd {
    uint32_t id;
    uint32_t pad0;
    uint64_t data;
    uint32_t error;
    uint32_t sev_fd;
};

struct kvm_sev_init {
    uint64_t vmsa_features;
    uint32_t flags;
    uint16_t ghcb_version;
    uint16_t pad1;
    uint32_t pad2[8];
};

struct kvm_sev_launch_start {
    uint32_t handle;
    uint32_t policy;
    uint64_t dh_uaddr;
    uint32_t dh_len;
    uint32_t pad0;
    uint64_t session_uaddr;
    uint32_t session_len;
    uint32_t pad1;
};

struct kvm_sev_launch_update_data {
    uint64_t uaddr;
    uint32_t len;
    uint32_t pad0;
};

struct kvm_sev_launch_secret {
    uint64_t hdr_uaddr;
    uint32_t hdr_len;
    uint32_t pad0;
    uint64_t guest_uaddr;
    uint32_t guest_len;
    uint32_t pad1;
    uint64_t trans_uaddr;
    uint32_t trans_len;
    uint32_t pad2;
};

struct kvm_sev_launch_measure {
    uint64_t uaddr;
    uint32_t len;
    uint32_t pad0;
};

struct kvm_sev_guest_status {
    uint32_t handle;
    uint32_t policy;
    uint32_t state;
};

struct kvm_sev_dbg {
    uint64_t src_uaddr;
    uint64_t dst_uaddr;
    uint32_t len;
    uint32_t pad0;
};

struct kvm_sev_attestation_report {
    uint8_t mnonce[16];
    uint64_t uaddr;
    uint32_t len;
    uint32_t pad0;
};

struct kvm_sev_send_start {
    uint32_t policy;
    uint32_t pad0;
    uint64_t pdh_cert_uaddr;
    uint32_t pdh_cert_len;
    uint32_t pad1;
    uint64_t plat_certs_uaddr;
    uint32_t plat_certs_len;
    uint32_t pad2;
    uint64_t amd_certs_uaddr;
    uint32_t amd_certs_len;
    uint32_t pad3;
    uint64_t session_uaddr;
    uint32_t session_len;
    uint32_t pad4;
};

struct kvm_sev_send_update_data {
    uint64_t hdr_uaddr;
    uint32_t hdr_len;
    uint32_t pad0;
    uint64_t guest_uaddr;
    uint32_t guest_len;
    uint32_t pad1;
    uint64_t trans_uaddr;
    uint32_t trans_len;
    uint32_t pad2;
};

struct kvm_sev_receive_start {
    uint32_t handle;
    uint32_t policy;
    uint64_t pdh_uaddr;
    uint32_t pdh_len;
    uint32_t pad0;
    uint64_t session_uaddr;
    uint32_t session_len;
    uint32_t pad1;
};

struct kvm_sev_receive_update_data {
    uint64_t hdr_uaddr;
    uint32_t hdr_len;
    uint32_t pad0;
    uint64_t guest_uaddr;
    uint32_t guest_len;
    uint32_t pad1;
    uint64_t trans_uaddr;
    uint32_t trans_len;
    uint32_t pad2;
};

struct kvm_sev_snp_launch_start {
    uint64_t policy;
    uint8_t gosvw[16];
    uint16_t flags;
    uint8_t pad0[6];
    uint64_t pad1[4];
};

#define KVM_SEV_PAGE_TYPE_INVALID            0x0
#define KVM_SEV_SNP_PAGE_TYPE_NORMAL         0x1
#define KVM_SEV_SNP_PAGE_TYPE_ZERO           0x3
#define KVM_SEV_SNP_PAGE_TYPE_UNMEASURED     0x4
#define KVM_SEV_SNP_PAGE_TYPE_SECRETS        0x5
#define KVM_SEV_SNP_PAGE_TYPE_CPUID          0x6

struct kvm_sev_snp_launch_update {
    uint64_t gfn_start;
    uint64_t uaddr;
    uint64_t len;
    uint8_t type;
    uint8_t pad0;
    uint16_t flags;
    uint32_t pad1;
    uint64_t pad2[4];
};

#define KVM_SEV_SNP_ID_BLOCK_SIZE            96
#define KVM_SEV_SNP_ID_AUTH_SIZE             4096
#define KVM_SEV_SNP_FINISH_DATA_SIZE         32

struct kvm_sev_snp_launch_finish {
    uint64_t id_block_uaddr;
    uint64_t id_auth_uaddr;
    uint8_t id_block_en;
    uint8_t auth_key_en;
    uint8_t vcek_disabled;
    uint8_t host_data[KVM_SEV_SNP_FINISH_DATA_SIZE];
    uint8_t pad0[3];
    uint16_t flags;
    uint64_t pad1[4];
};

#define KVM_TDX_CAPABILITIES                 0
#define KVM_TDX_INIT_VM                      1
#define KVM_TDX_INIT_VCPU                    2
#define KVM_TDX_INIT_MEM_REGION              3
#define KVM_TDX_FINALIZE_VM                  4
#define KVM_TDX_GET_CPUID                    5
#define KVM_TDX_CMD_NR_MAX                   6

#define KVM_TDX_MEASURE_MEMORY_REGION        (1ULL << 0)

struct kvm_tdx_cmd {
    uint32_t id;
    uint32_t flags;
    uint64_t data;
    uint64_t hw_error;
};

struct kvm_tdx_capabilities {
    uint64_t supported_attrs;
    uint64_t supported_xfam;
    uint64_t kernel_tdvmcallinfo_1_r11;
    uint64_t user_tdvmcallinfo_1_r11;
    uint64_t kernel_tdvmcallinfo_1_r12;
    uint64_t user_tdvmcallinfo_1_r12;
    uint64_t reserved[250];
    struct kvm_cpuid2 cpuid;
};

/* the three measurements are SHA-384 digests */
struct kvm_tdx_init_vm {
    uint64_t attributes;
    uint64_t xfam;
    uint64_t mrconfigid[6];
    uint64_t mrowner[6];
    uint64_t mrownerconfig[6];
    uint64_t reserved[12];
    struct kvm_cpuid2 cpuid;
};

struct kvm_tdx_init_mem_region {
    uint64_t source_addr;
    uint64_t gpa;
    uint64_t nr_pages;
};

/* ---------------------------------------------------------------------------------------------
 * Requests
 *
 * number = direction << 30 | argument bytes << 16 | KVMIO << 8 | nr. Directions are as Linux has
 * them, also where they are wrong: KVM_SET_IRQCHIP reads user memory and says "read". The same nr
 * means different things with another direction, size or kind of descriptor.
 * ------------------------------------------------------------------------------------------ */

#define KVMIO                                0xAE

#define KVM_IOC_NONE                         0U
#define KVM_IOC_WRITE                        1U
#define KVM_IOC_READ                         2U
#define KVM_IOC(dir, nr, size) ((dir) << 30 | (unsigned int)(size) << 16 | (unsigned int)KVMIO << 8 | (nr))
#define KVM_IO(nr)         KVM_IOC(KVM_IOC_NONE, nr, 0)
#define KVM_IOW(nr, type)  KVM_IOC(KVM_IOC_WRITE, nr, sizeof(type))
#define KVM_IOR(nr, type)  KVM_IOC(KVM_IOC_READ, nr, sizeof(type))
#define KVM_IOWR(nr, type) KVM_IOC(KVM_IOC_READ | KVM_IOC_WRITE, nr, sizeof(type))

/* on /dev/kvm */
#define KVM_GET_API_VERSION             KVM_IO(0x00)                                        /* system: always */
#define KVM_CREATE_VM                   KVM_IO(0x01)                                        /* system: always */
#define KVM_GET_MSR_INDEX_LIST          KVM_IOWR(0x02, struct kvm_msr_list)                 /* system: always */
#define KVM_CHECK_EXTENSION             KVM_IO(0x03)                                        /* system, vm: always */
#define KVM_GET_VCPU_MMAP_SIZE          KVM_IO(0x04)                                        /* system: always */
#define KVM_GET_SUPPORTED_CPUID         KVM_IOWR(0x05, struct kvm_cpuid2)                   /* system: KVM_CAP_EXT_CPUID */
#define KVM_GET_EMULATED_CPUID          KVM_IOWR(0x09, struct kvm_cpuid2)                   /* system: KVM_CAP_EXT_EMUL_CPUID */
#define KVM_GET_MSR_FEATURE_INDEX_LIST  KVM_IOWR(0x0a, struct kvm_msr_list)                 /* system: KVM_CAP_GET_MSR_FEATURES */
#define KVM_X86_GET_MCE_CAP_SUPPORTED   KVM_IOR(0x9d, uint64_t)                             /* system: KVM_CAP_MCE */

/* on a VM: vCPUs and memory */
#define KVM_CREATE_VCPU                 KVM_IO(0x41)                                        /* vm: always */
#define KVM_GET_DIRTY_LOG               KVM_IOW(0x42, struct kvm_dirty_log)                 /* vm: always */
#define KVM_SET_NR_MMU_PAGES            KVM_IO(0x44)                                        /* vm: KVM_CAP_MMU_SHADOW_CACHE_CONTROL */
#define KVM_GET_NR_MMU_PAGES            KVM_IO(0x45)                                        /* vm: KVM_CAP_MMU_SHADOW_CACHE_CONTROL */
#define KVM_SET_USER_MEMORY_REGION      KVM_IOW(0x46, struct kvm_userspace_memory_region)   /* vm: KVM_CAP_USER_MEMORY */
#define KVM_SET_TSS_ADDR                KVM_IO(0x47)                                        /* vm: KVM_CAP_SET_TSS_ADDR */
#define KVM_SET_IDENTITY_MAP_ADDR       KVM_IOW(0x48, uint64_t)                             /* vm: KVM_CAP_SET_IDENTITY_MAP_ADDR */
#define KVM_SET_USER_MEMORY_REGION2     KVM_IOW(0x49, struct kvm_userspace_memory_region2)  /* vm: KVM_CAP_USER_MEMORY2 */
#define KVM_REGISTER_COALESCED_MMIO     KVM_IOW(0x67, struct kvm_coalesced_mmio_zone)       /* vm: KVM_CAP_COALESCED_MMIO */
#define KVM_UNREGISTER_COALESCED_MMIO   KVM_IOW(0x68, struct kvm_coalesced_mmio_zone)       /* vm: KVM_CAP_COALESCED_MMIO */
#define KVM_SET_BOOT_CPU_ID             KVM_IO(0x78)                                        /* vm: KVM_CAP_SET_BOOT_CPU_ID */
#define KVM_CLEAR_DIRTY_LOG             KVM_IOWR(0xc0, struct kvm_clear_dirty_log)          /* vm: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 */
#define KVM_RESET_DIRTY_RINGS           KVM_IO(0xc7)                                        /* vm: KVM_CAP_DIRTY_LOG_RING */
#define KVM_SET_MEMORY_ATTRIBUTES       KVM_IOW(0xd2, struct kvm_memory_attributes)         /* vm: KVM_CAP_MEMORY_ATTRIBUTES */
#define KVM_CREATE_GUEST_MEMFD          KVM_IOWR(0xd4, struct kvm_create_guest_memfd)       /* vm: KVM_CAP_GUEST_MEMFD */

/* on a VM: interrupts, timers, devices */
#define KVM_CREATE_IRQCHIP              KVM_IO(0x60)                                        /* vm: KVM_CAP_IRQCHIP */
#define KVM_IRQ_LINE                    KVM_IOW(0x61, struct kvm_irq_level)                 /* vm: KVM_CAP_IRQCHIP */
#define KVM_GET_IRQCHIP                 KVM_IOWR(0x62, struct kvm_irqchip)                  /* vm: KVM_CAP_IRQCHIP */
#define KVM_SET_IRQCHIP                 KVM_IOR(0x63, struct kvm_irqchip)                   /* vm: KVM_CAP_IRQCHIP */
#define KVM_CREATE_PIT                  KVM_IO(0x64)                                        /* vm: KVM_CAP_PIT */
#define KVM_GET_PIT                     KVM_IOWR(0x65, struct kvm_pit_state)                /* vm: KVM_CAP_PIT */
#define KVM_SET_PIT                     KVM_IOR(0x66, struct kvm_pit_state)                 /* vm: KVM_CAP_PIT */
#define KVM_IRQ_LINE_STATUS             KVM_IOWR(0x67, struct kvm_irq_level)                /* vm: KVM_CAP_IRQ_INJECT_STATUS */
#define KVM_SET_GSI_ROUTING             KVM_IOW(0x6a, struct kvm_irq_routing)               /* vm: KVM_CAP_IRQ_ROUTING */
#define KVM_REINJECT_CONTROL            KVM_IO(0x71)                                        /* vm: KVM_CAP_REINJECT_CONTROL */
#define KVM_IRQFD                       KVM_IOW(0x76, struct kvm_irqfd)                     /* vm: KVM_CAP_IRQFD */
#define KVM_CREATE_PIT2                 KVM_IOW(0x77, struct kvm_pit_config)                /* vm: KVM_CAP_PIT2 */
#define KVM_IOEVENTFD                   KVM_IOW(0x79, struct kvm_ioeventfd)                 /* vm: KVM_CAP_IOEVENTFD */
#define KVM_GET_PIT2                    KVM_IOR(0x9f, struct kvm_pit_state2)                /* vm: KVM_CAP_PIT_STATE2 */
#define KVM_SET_PIT2                    KVM_IOW(0xa0, struct kvm_pit_state2)                /* vm: KVM_CAP_PIT_STATE2 */
#define KVM_SIGNAL_MSI                  KVM_IOW(0xa5, struct kvm_msi)                       /* vm: KVM_CAP_SIGNAL_MSI */
#define KVM_CREATE_DEVICE               KVM_IOWR(0xe0, struct kvm_create_device)            /* vm: KVM_CAP_DEVICE_CTRL */

/* on a VM: time, policy, other hypervisors, encryption */
#define KVM_XEN_HVM_CONFIG              KVM_IOW(0x7a, struct kvm_xen_hvm_config)            /* vm: KVM_CAP_XEN_HVM */
#define KVM_SET_CLOCK                   KVM_IOW(0x7b, struct kvm_clock_data)                /* vm: KVM_CAP_ADJUST_CLOCK */
#define KVM_GET_CLOCK                   KVM_IOR(0x7c, struct kvm_clock_data)                /* vm: KVM_CAP_ADJUST_CLOCK */
#define KVM_SET_PMU_EVENT_FILTER        KVM_IOW(0xb2, struct kvm_pmu_event_filter)          /* vm: KVM_CAP_PMU_EVENT_FILTER */
#define KVM_MEMORY_ENCRYPT_OP           KVM_IOWR(0xba, unsigned long)                       /* vm, vcpu: KVM_CAP_VM_TYPES */
#define KVM_MEMORY_ENCRYPT_REG_REGION   KVM_IOR(0xbb, struct kvm_enc_region)                /* vm: KVM_CAP_VM_TYPES */
#define KVM_MEMORY_ENCRYPT_UNREG_REGION KVM_IOR(0xbc, struct kvm_enc_region)                /* vm: KVM_CAP_VM_TYPES */
#define KVM_HYPERV_EVENTFD              KVM_IOW(0xbd, struct kvm_hyperv_eventfd)            /* vm: KVM_CAP_HYPERV_EVENTFD */
#define KVM_X86_SET_MSR_FILTER          KVM_IOW(0xc6, struct kvm_msr_filter)                /* vm: KVM_CAP_X86_MSR_FILTER */
#define KVM_XEN_HVM_GET_ATTR            KVM_IOWR(0xc8, struct kvm_xen_hvm_attr)             /* vm: KVM_CAP_XEN_HVM */
#define KVM_XEN_HVM_SET_ATTR            KVM_IOW(0xc9, struct kvm_xen_hvm_attr)              /* vm: KVM_CAP_XEN_HVM */
#define KVM_XEN_HVM_EVTCHN_SEND         KVM_IOW(0xd0, struct kvm_irq_routing_xen_evtchn)    /* vm: KVM_CAP_XEN_HVM */

/* on a vCPU: running and registers */
#define KVM_RUN                         KVM_IO(0x80)                                        /* vcpu: always */
#define KVM_GET_REGS                    KVM_IOR(0x81, struct kvm_regs)                      /* vcpu: always */
#define KVM_SET_REGS                    KVM_IOW(0x82, struct kvm_regs)                      /* vcpu: always */
#define KVM_GET_SREGS                   KVM_IOR(0x83, struct kvm_sregs)                     /* vcpu: always */
#define KVM_SET_SREGS                   KVM_IOW(0x84, struct kvm_sregs)                     /* vcpu: always */
#define KVM_TRANSLATE                   KVM_IOWR(0x85, struct kvm_translation)              /* vcpu: always */
#define KVM_SET_SIGNAL_MASK             KVM_IOW(0x8b, struct kvm_signal_mask)               /* vcpu: always */
#define KVM_GET_FPU                     KVM_IOR(0x8c, struct kvm_fpu)                       /* vcpu: always */
#define KVM_SET_FPU                     KVM_IOW(0x8d, struct kvm_fpu)                       /* vcpu: always */
#define KVM_SET_GUEST_DEBUG             KVM_IOW(0x9b, struct kvm_guest_debug)               /* vcpu: KVM_CAP_SET_GUEST_DEBUG */
#define KVM_GET_DEBUGREGS               KVM_IOR(0xa1, struct kvm_debugregs)                 /* vcpu: KVM_CAP_DEBUGREGS */
#define KVM_SET_DEBUGREGS               KVM_IOW(0xa2, struct kvm_debugregs)                 /* vcpu: KVM_CAP_DEBUGREGS */
#define KVM_GET_XSAVE                   KVM_IOR(0xa4, struct kvm_xsave)                     /* vcpu: KVM_CAP_XSAVE */
#define KVM_SET_XSAVE                   KVM_IOW(0xa5, struct kvm_xsave)                     /* vcpu: KVM_CAP_XSAVE */
#define KVM_GET_XCRS                    KVM_IOR(0xa6, struct kvm_xcrs)                      /* vcpu: KVM_CAP_XCRS */
#define KVM_SET_XCRS                    KVM_IOW(0xa7, struct kvm_xcrs)                      /* vcpu: KVM_CAP_XCRS */
#define KVM_GET_ONE_REG                 KVM_IOW(0xab, struct kvm_one_reg)                   /* vcpu: KVM_CAP_ONE_REG */
#define KVM_SET_ONE_REG                 KVM_IOW(0xac, struct kvm_one_reg)                   /* vcpu: KVM_CAP_ONE_REG */
#define KVM_GET_REG_LIST                KVM_IOWR(0xb0, struct kvm_reg_list)                 /* vcpu: KVM_CAP_ONE_REG */
#define KVM_GET_NESTED_STATE            KVM_IOWR(0xbe, struct kvm_nested_state)             /* vcpu: KVM_CAP_NESTED_STATE */
#define KVM_SET_NESTED_STATE            KVM_IOW(0xbf, struct kvm_nested_state)              /* vcpu: KVM_CAP_NESTED_STATE */
#define KVM_GET_SREGS2                  KVM_IOR(0xcc, struct kvm_sregs2)                    /* vcpu: KVM_CAP_SREGS2 */
#define KVM_SET_SREGS2                  KVM_IOW(0xcd, struct kvm_sregs2)                    /* vcpu: KVM_CAP_SREGS2 */
#define KVM_GET_XSAVE2                  KVM_IOR(0xcf, struct kvm_xsave)                     /* vcpu: KVM_CAP_XSAVE2 */
#define KVM_PRE_FAULT_MEMORY            KVM_IOWR(0xd5, struct kvm_pre_fault_memory)         /* vcpu: KVM_CAP_PRE_FAULT_MEMORY */

/* on a vCPU: CPUID and MSRs */
#define KVM_GET_MSRS                    KVM_IOWR(0x88, struct kvm_msrs)                     /* system, vcpu: always */
#define KVM_SET_MSRS                    KVM_IOW(0x89, struct kvm_msrs)                      /* vcpu: always */
#define KVM_SET_CPUID                   KVM_IOW(0x8a, struct kvm_cpuid)                     /* vcpu: always */
#define KVM_SET_CPUID2                  KVM_IOW(0x90, struct kvm_cpuid2)                    /* vcpu: KVM_CAP_EXT_CPUID */
#define KVM_GET_CPUID2                  KVM_IOWR(0x91, struct kvm_cpuid2)                   /* vcpu: KVM_CAP_EXT_CPUID */
#define KVM_GET_SUPPORTED_HV_CPUID      KVM_IOWR(0xc1, struct kvm_cpuid2)                   /* system, vcpu: KVM_CAP_HYPERV_CPUID */

/* on a vCPU: events */
#define KVM_INTERRUPT                   KVM_IOW(0x86, struct kvm_interrupt)                 /* vcpu: always */
#define KVM_GET_LAPIC                   KVM_IOR(0x8e, struct kvm_lapic_state)               /* vcpu: KVM_CAP_IRQCHIP */
#define KVM_SET_LAPIC                   KVM_IOW(0x8f, struct kvm_lapic_state)               /* vcpu: KVM_CAP_IRQCHIP */
#define KVM_TPR_ACCESS_REPORTING        KVM_IOWR(0x92, struct kvm_tpr_access_ctl)           /* vcpu: KVM_CAP_VAPIC */
#define KVM_SET_VAPIC_ADDR              KVM_IOW(0x93, struct kvm_vapic_addr)                /* vcpu: KVM_CAP_VAPIC */
#define KVM_GET_MP_STATE                KVM_IOR(0x98, struct kvm_mp_state)                  /* vcpu: KVM_CAP_MP_STATE */
#define KVM_SET_MP_STATE                KVM_IOW(0x99, struct kvm_mp_state)                  /* vcpu: KVM_CAP_MP_STATE */
#define KVM_NMI                         KVM_IO(0x9a)                                        /* vcpu: KVM_CAP_USER_NMI */
#define KVM_X86_SETUP_MCE               KVM_IOW(0x9c, uint64_t)                             /* vcpu: KVM_CAP_MCE */
#define KVM_X86_SET_MCE                 KVM_IOW(0x9e, struct kvm_x86_mce)                   /* vcpu: KVM_CAP_MCE */
#define KVM_GET_VCPU_EVENTS             KVM_IOR(0x9f, struct kvm_vcpu_events)               /* vcpu: KVM_CAP_VCPU_EVENTS */
#define KVM_SET_VCPU_EVENTS             KVM_IOW(0xa0, struct kvm_vcpu_events)               /* vcpu: KVM_CAP_VCPU_EVENTS */
#define KVM_KVMCLOCK_CTRL               KVM_IO(0xad)                                        /* vcpu: KVM_CAP_KVMCLOCK_CTRL */
#define KVM_SMI                         KVM_IO(0xb7)                                        /* vcpu: KVM_CAP_X86_SMM */
#define KVM_XEN_VCPU_GET_ATTR           KVM_IOWR(0xca, struct kvm_xen_vcpu_attr)            /* vcpu: KVM_CAP_XEN_HVM */
#define KVM_XEN_VCPU_SET_ATTR           KVM_IOW(0xcb, struct kvm_xen_vcpu_attr)             /* vcpu: KVM_CAP_XEN_HVM */

/* on more than one kind */
#define KVM_SET_TSC_KHZ                 KVM_IO(0xa2)                                        /* vm, vcpu: KVM_CAP_TSC_CONTROL */
#define KVM_GET_TSC_KHZ                 KVM_IO(0xa3)                                        /* vm, vcpu: KVM_CAP_GET_TSC_KHZ */
#define KVM_ENABLE_CAP                  KVM_IOW(0xa3, struct kvm_enable_cap)                /* vm, vcpu: KVM_CAP_ENABLE_CAP */
#define KVM_GET_STATS_FD                KVM_IO(0xce)                                        /* vm, vcpu: KVM_CAP_BINARY_STATS_FD */
#define KVM_SET_DEVICE_ATTR             KVM_IOW(0xe1, struct kvm_device_attr)               /* device, vcpu: KVM_CAP_DEVICE_CTRL */
#define KVM_GET_DEVICE_ATTR             KVM_IOW(0xe2, struct kvm_device_attr)               /* device, vcpu, system: KVM_CAP_DEVICE_CTRL */
#define KVM_HAS_DEVICE_ATTR             KVM_IOW(0xe3, struct kvm_device_attr)               /* device, vcpu, system: KVM_CAP_DEVICE_CTRL */

/*
 * Requests of other architectures. x86 does not know them, clients name them. Their structures are
 * not declared; the size in bytes stands in the number, and the structure in the comment.
 */
#define KVM_S390_ENABLE_SIE             KVM_IO(0x06)                                        /* none: KVM_CAP_S390_PSW */
#define KVM_S390_UCAS_MAP               KVM_IOC(KVM_IOC_WRITE, 0x50, 24)                    /* none: KVM_CAP_S390_UCONTROL; struct kvm_s390_ucas_mapping */
#define KVM_S390_UCAS_UNMAP             KVM_IOC(KVM_IOC_WRITE, 0x51, 24)                    /* none: KVM_CAP_S390_UCONTROL; struct kvm_s390_ucas_mapping */
#define KVM_S390_VCPU_FAULT             KVM_IOW(0x52, unsigned long)                        /* none: KVM_CAP_S390_UCONTROL */
#define KVM_S390_INTERRUPT              KVM_IOC(KVM_IOC_WRITE, 0x94, 16)                    /* none: KVM_CAP_S390_PSW; struct kvm_s390_interrupt */
#define KVM_S390_STORE_STATUS           KVM_IOW(0x95, unsigned long)                        /* none: KVM_CAP_S390_PSW */
#define KVM_S390_SET_INITIAL_PSW        KVM_IOC(KVM_IOC_WRITE, 0x96, 16)                    /* none: KVM_CAP_S390_PSW; struct kvm_s390_psw */
#define KVM_S390_INITIAL_RESET          KVM_IO(0x97)                                        /* none: KVM_CAP_S390_PSW */
#define KVM_S390_MEM_OP                 KVM_IOC(KVM_IOC_WRITE, 0xb1, 64)                    /* none: KVM_CAP_S390_MEM_OP; struct kvm_s390_mem_op */
#define KVM_S390_GET_SKEYS              KVM_IOC(KVM_IOC_WRITE, 0xb2, 64)                    /* none: KVM_CAP_S390_SKEYS; struct kvm_s390_skeys */
#define KVM_S390_SET_SKEYS              KVM_IOC(KVM_IOC_WRITE, 0xb3, 64)                    /* none: KVM_CAP_S390_SKEYS; struct kvm_s390_skeys */
#define KVM_S390_IRQ                    KVM_IOC(KVM_IOC_WRITE, 0xb4, 72)                    /* none: KVM_CAP_S390_INJECT_IRQ; struct kvm_s390_irq */
#define KVM_S390_SET_IRQ_STATE          KVM_IOC(KVM_IOC_WRITE, 0xb5, 32)                    /* none: KVM_CAP_S390_IRQ_STATE; struct kvm_s390_irq_state */
#define KVM_S390_GET_IRQ_STATE          KVM_IOC(KVM_IOC_WRITE, 0xb6, 32)                    /* none: KVM_CAP_S390_IRQ_STATE; struct kvm_s390_irq_state */
#define KVM_S390_GET_CMMA_BITS          KVM_IOC(KVM_IOC_READ | KVM_IOC_WRITE, 0xb8, 32)     /* none: KVM_CAP_S390_CMMA_MIGRATION; struct kvm_s390_cmma_log */
#define KVM_S390_SET_CMMA_BITS          KVM_IOC(KVM_IOC_WRITE, 0xb9, 32)                    /* none: KVM_CAP_S390_CMMA_MIGRATION; struct kvm_s390_cmma_log */
#define KVM_S390_NORMAL_RESET           KVM_IO(0xc3)                                        /* none: KVM_CAP_S390_VCPU_RESETS */
#define KVM_S390_CLEAR_RESET            KVM_IO(0xc4)                                        /* none: KVM_CAP_S390_VCPU_RESETS */
#define KVM_S390_PV_COMMAND             KVM_IOC(KVM_IOC_READ | KVM_IOC_WRITE, 0xc5, 32)     /* none: KVM_CAP_S390_PROTECTED; struct kvm_pv_cmd */
#define KVM_S390_PV_CPU_COMMAND         KVM_IOC(KVM_IOC_READ | KVM_IOC_WRITE, 0xd0, 32)     /* none: KVM_CAP_S390_PROTECTED_DUMP; struct kvm_pv_cmd */
#define KVM_S390_ZPCI_OP                KVM_IOC(KVM_IOC_WRITE, 0xd1, 72)                    /* none: KVM_CAP_S390_ZPCI_OP; struct kvm_s390_zpci_op */

#define KVM_PPC_GET_PVINFO              KVM_IOC(KVM_IOC_WRITE, 0xa1, 128)                   /* none: KVM_CAP_PPC_GET_PVINFO; struct kvm_ppc_pvinfo */
#define KVM_PPC_GET_SMMU_INFO           KVM_IOC(KVM_IOC_READ, 0xa6, 592)                    /* none: KVM_CAP_PPC_GET_SMMU_INFO; struct kvm_ppc_smmu_info */
#define KVM_PPC_ALLOCATE_HTAB           KVM_IOWR(0xa7, uint32_t)                            /* none: KVM_CAP_PPC_ALLOC_HTAB */
#define KVM_CREATE_SPAPR_TCE            KVM_IOC(KVM_IOC_WRITE, 0xa8, 16)                    /* none: KVM_CAP_SPAPR_TCE; struct kvm_create_spapr_tce */
#define KVM_CREATE_SPAPR_TCE_64         KVM_IOC(KVM_IOC_WRITE, 0xa8, 32)                    /* none: KVM_CAP_SPAPR_TCE_64; struct kvm_create_spapr_tce_64 */
#define KVM_ALLOCATE_RMA                KVM_IOC(KVM_IOC_READ, 0xa9, 8)                      /* none: KVM_CAP_PPC_RMA; struct kvm_allocate_rma */
#define KVM_PPC_GET_HTAB_FD             KVM_IOC(KVM_IOC_WRITE, 0xaa, 32)                    /* none: KVM_CAP_PPC_HTAB_FD; struct kvm_get_htab_fd */
#define KVM_DIRTY_TLB                   KVM_IOC(KVM_IOC_WRITE, 0xaa, 16)                    /* none: KVM_CAP_SW_TLB; struct kvm_dirty_tlb */
#define KVM_PPC_RTAS_DEFINE_TOKEN       KVM_IOC(KVM_IOC_WRITE, 0xac, 128)                   /* none: KVM_CAP_PPC_RTAS; struct kvm_rtas_token_args */
#define KVM_PPC_RESIZE_HPT_PREPARE      KVM_IOC(KVM_IOC_READ, 0xad, 16)                     /* none: KVM_CAP_SPAPR_RESIZE_HPT; struct kvm_ppc_resize_hpt */
#define KVM_PPC_RESIZE_HPT_COMMIT       KVM_IOC(KVM_IOC_READ, 0xae, 16)                     /* none: KVM_CAP_SPAPR_RESIZE_HPT; struct kvm_ppc_resize_hpt */
#define KVM_PPC_CONFIGURE_V3_MMU        KVM_IOC(KVM_IOC_WRITE, 0xaf, 16)                    /* none: KVM_CAP_PPC_MMU_RADIX; struct kvm_ppc_mmuv3_cfg */
#define KVM_PPC_GET_RMMU_INFO           KVM_IOC(KVM_IOC_WRITE, 0xb0, 96)                    /* none: KVM_CAP_PPC_MMU_RADIX; struct kvm_ppc_rmmu_info */
#define KVM_PPC_GET_CPU_CHAR            KVM_IOC(KVM_IOC_READ, 0xb1, 32)                     /* none: KVM_CAP_PPC_GET_CPU_CHAR; struct kvm_ppc_cpu_char */
#define KVM_PPC_SVM_OFF                 KVM_IO(0xb3)                                        /* none: KVM_CAP_PPC_SECURE_GUEST */

#define KVM_ARM_SET_DEVICE_ADDR         KVM_IOC(KVM_IOC_WRITE, 0xab, 16)                    /* none: KVM_CAP_ARM_SET_DEVICE_ADDR; struct kvm_arm_device_addr */
#define KVM_ARM_VCPU_INIT               KVM_IOC(KVM_IOC_WRITE, 0xae, 32)                    /* none: always; struct kvm_vcpu_init */
#define KVM_ARM_PREFERRED_TARGET        KVM_IOC(KVM_IOC_READ, 0xaf, 32)                     /* none: always; struct kvm_vcpu_init */
#define KVM_ARM_MTE_COPY_TAGS           KVM_IOC(KVM_IOC_READ, 0xb4, 48)                     /* none: KVM_CAP_ARM_MTE; struct kvm_arm_copy_mte_tags */
#define KVM_ARM_SET_COUNTER_OFFSET      KVM_IOC(KVM_IOC_WRITE, 0xb5, 16)                    /* none: KVM_CAP_COUNTER_OFFSET; struct kvm_arm_counter_offset */
#define KVM_ARM_GET_REG_WRITABLE_MASKS  KVM_IOC(KVM_IOC_READ, 0xb6, 64)                     /* none: KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES; struct reg_mask_range */
#define KVM_ARM_VCPU_FINALIZE           KVM_IOW(0xc2, int)                                  /* none: KVM_CAP_ARM_SVE */

/* numbers that go with them */
#define KVM_S390_STORE_STATUS_NOADDR         (-1ul)
#define KVM_S390_STORE_STATUS_PREFIXED       (-2ul)
#define KVM_S390_GET_SKEYS_NONE              1
#define KVM_S390_SKEYS_MAX                   1048576
#define KVM_S390_SIE_PAGE_OFFSET             1
#define KVM_MMU_FSL_BOOKE_NOHV               0
#define KVM_MMU_FSL_BOOKE_HV                 1

/* clang-format on */

#endif /* PYKVM_KVM_H */
