/* SPDX-License-Identifier: MIT */
/*
 * The x86 architecture in numbers: register bits, MSRs, vectors, error codes, descriptor types,
 * page-table bits, CPUID bit positions. Nothing of KVM, except that its names are the kernel's
 * where the kernel has one.
 *
 * Sources: Intel SDM volumes 3 and 4, AMD APM volume 2. Names that end in _BIT, and all of CPUID,
 * are positions; everything else is a mask or a value.
 */
#ifndef PYKVM_X86_H
#define PYKVM_X86_H

#include <stdint.h>

/* clang-format off */

/* ---------------------------------------------------------------------------------------------
 * Flags and control registers
 * ------------------------------------------------------------------------------------------ */

#define X86_EFLAGS_CF                   0x00000001UL
#define X86_EFLAGS_FIXED                0x00000002UL    /* always 1 */
#define X86_EFLAGS_PF                   0x00000004UL
#define X86_EFLAGS_AF                   0x00000010UL
#define X86_EFLAGS_ZF                   0x00000040UL
#define X86_EFLAGS_SF                   0x00000080UL
#define X86_EFLAGS_TF                   0x00000100UL
#define X86_EFLAGS_IF                   0x00000200UL
#define X86_EFLAGS_DF                   0x00000400UL
#define X86_EFLAGS_OF                   0x00000800UL
#define X86_EFLAGS_IOPL                 0x00003000UL
#define X86_EFLAGS_IOPL_BIT             12
#define X86_EFLAGS_NT                   0x00004000UL
#define X86_EFLAGS_RF                   0x00010000UL
#define X86_EFLAGS_VM                   0x00020000UL
#define X86_EFLAGS_AC                   0x00040000UL
#define X86_EFLAGS_VIF                  0x00080000UL
#define X86_EFLAGS_VIP                  0x00100000UL
#define X86_EFLAGS_ID                   0x00200000UL

#define X86_CR0_PE                      0x00000001UL
#define X86_CR0_MP                      0x00000002UL
#define X86_CR0_EM                      0x00000004UL
#define X86_CR0_TS                      0x00000008UL
#define X86_CR0_ET                      0x00000010UL
#define X86_CR0_NE                      0x00000020UL
#define X86_CR0_WP                      0x00010000UL
#define X86_CR0_AM                      0x00040000UL
#define X86_CR0_NW                      0x20000000UL
#define X86_CR0_CD                      0x40000000UL
#define X86_CR0_PG                      0x80000000UL

/* in CR3, with CR4.PCIDE: the PCID, and in MOV to CR3 the request not to flush */
#define X86_CR3_PWT                     0x00000008UL
#define X86_CR3_PCD                     0x00000010UL
#define X86_CR3_PCID_MASK               0x00000fffUL
#define X86_CR3_PCID_NOFLUSH            0x8000000000000000ULL
#define X86_CR3_LAM_U57                 0x2000000000000000ULL
#define X86_CR3_LAM_U48                 0x4000000000000000ULL

#define X86_CR4_VME                     0x00000001UL
#define X86_CR4_PVI                     0x00000002UL
#define X86_CR4_TSD                     0x00000004UL
#define X86_CR4_DE                      0x00000008UL
#define X86_CR4_PSE                     0x00000010UL
#define X86_CR4_PAE                     0x00000020UL
#define X86_CR4_MCE                     0x00000040UL
#define X86_CR4_PGE                     0x00000080UL
#define X86_CR4_PCE                     0x00000100UL
#define X86_CR4_OSFXSR                  0x00000200UL
#define X86_CR4_OSXMMEXCPT              0x00000400UL
#define X86_CR4_UMIP                    0x00000800UL
#define X86_CR4_LA57                    0x00001000UL
#define X86_CR4_VMXE                    0x00002000UL
#define X86_CR4_SMXE                    0x00004000UL
#define X86_CR4_FSGSBASE                0x00010000UL
#define X86_CR4_PCIDE                   0x00020000UL
#define X86_CR4_OSXSAVE                 0x00040000UL
#define X86_CR4_SMEP                    0x00100000UL
#define X86_CR4_SMAP                    0x00200000UL
#define X86_CR4_PKE                     0x00400000UL
#define X86_CR4_CET                     0x00800000UL
#define X86_CR4_PKS                     0x01000000UL
#define X86_CR4_LAM_SUP                 0x10000000UL
#define X86_CR4_FRED                    0x0000000100000000ULL

#define EFER_SCE                        0x0001UL
#define EFER_LME                        0x0100UL
#define EFER_LMA                        0x0400UL
#define EFER_NX                         0x0800UL
#define EFER_SVME                       0x1000UL
#define EFER_LMSLE                      0x2000UL
#define EFER_FFXSR                      0x4000UL
#define EFER_TCE                        0x8000UL
#define EFER_AUTOIBRS                   0x200000UL

#define XFEATURE_MASK_FP                0x00000001UL
#define XFEATURE_MASK_SSE               0x00000002UL
#define XFEATURE_MASK_YMM               0x00000004UL
#define XFEATURE_MASK_BNDREGS           0x00000008UL
#define XFEATURE_MASK_BNDCSR            0x00000010UL
#define XFEATURE_MASK_OPMASK            0x00000020UL
#define XFEATURE_MASK_ZMM_HI256         0x00000040UL
#define XFEATURE_MASK_HI16_ZMM          0x00000080UL
#define XFEATURE_MASK_PKRU              0x00000200UL

#define FCW_INIT                        0x037f
#define MXCSR_INIT                      0x1f80
#define MXCSR_MASK                      0xffff

/* ---------------------------------------------------------------------------------------------
 * Debug registers
 * ------------------------------------------------------------------------------------------ */

#define DR6_B0                          0x00000001UL
#define DR6_B1                          0x00000002UL
#define DR6_B2                          0x00000004UL
#define DR6_B3                          0x00000008UL
#define DR6_BUS_LOCK                    0x00000800UL    /* active low */
#define DR6_BD                          0x00002000UL
#define DR6_BS                          0x00004000UL
#define DR6_BT                          0x00008000UL
#define DR6_RTM                         0x00010000UL    /* active low */
#define DR6_FIXED_1                     0xfffe07f0UL    /* always 1 */
#define DR6_ACTIVE_LOW                  0xffff0ff0UL    /* DR6_FIXED_1 and the active-low bits */
#define DR6_INIT                        0xffff0ff0UL

#define DR7_L0                          0x00000001UL
#define DR7_G0                          0x00000002UL
#define DR7_BP_EN_MASK                  0x000000ffUL
#define DR7_LE                          0x00000100UL
#define DR7_GE                          0x00000200UL
#define DR7_FIXED_1                     0x00000400UL    /* always 1 */
#define DR7_RTM                         0x00000800UL
#define DR7_GD                          0x00002000UL
#define DR7_VOLATILE                    0xffff2bffUL    /* bits software may change */
#define DR7_RW_BIT                      16              /* R/W0; 4 bits per breakpoint with LEN */
#define DR7_LEN_BIT                     18
#define DR_RW_EXECUTE                   0
#define DR_RW_WRITE                     1
#define DR_RW_PORT                      2               /* with CR4.DE */
#define DR_RW_ACCESS                    3

/* ---------------------------------------------------------------------------------------------
 * Exceptions
 * ------------------------------------------------------------------------------------------ */

#define DE_VECTOR                       0
#define DB_VECTOR                       1
#define NMI_VECTOR                      2
#define BP_VECTOR                       3
#define OF_VECTOR                       4
#define BR_VECTOR                       5
#define UD_VECTOR                       6
#define NM_VECTOR                       7
#define DF_VECTOR                       8
#define TS_VECTOR                       10
#define NP_VECTOR                       11
#define SS_VECTOR                       12
#define GP_VECTOR                       13
#define PF_VECTOR                       14
#define MF_VECTOR                       16
#define AC_VECTOR                       17
#define MC_VECTOR                       18
#define XM_VECTOR                       19
#define VE_VECTOR                       20
#define CP_VECTOR                       21
#define HV_VECTOR                       28
#define VC_VECTOR                       29
#define SX_VECTOR                       30

/* page-fault error code */
#define PFERR_PRESENT_MASK              0x00000001UL
#define PFERR_WRITE_MASK                0x00000002UL
#define PFERR_USER_MASK                 0x00000004UL
#define PFERR_RSVD_MASK                 0x00000008UL
#define PFERR_FETCH_MASK                0x00000010UL
#define PFERR_PK_MASK                   0x00000020UL
#define PFERR_SS_MASK                   0x00000040UL
#define PFERR_SGX_MASK                  0x00008000UL

/* selector error code: the selector's index and these */
#define SELERR_EXT                      0x0001
#define SELERR_IDT                      0x0002
#define SELERR_TI                       0x0004

/* ---------------------------------------------------------------------------------------------
 * Segments
 * ------------------------------------------------------------------------------------------ */

#define SELECTOR_TI_MASK                0x0004
#define SELECTOR_RPL_MASK               0x0003

/* type of a code or data segment (S = 1), as bits */
#define SEG_TYPE_ACCESSED               0x1
#define SEG_TYPE_WRITABLE               0x2             /* data */
#define SEG_TYPE_READABLE               0x2             /* code */
#define SEG_TYPE_EXPAND_DOWN            0x4             /* data */
#define SEG_TYPE_CONFORMING             0x4             /* code */
#define SEG_TYPE_CODE                   0x8

/* type of a system segment or gate (S = 0) */
#define DESC_TSS16_AVAILABLE            0x1
#define DESC_LDT                        0x2
#define DESC_TSS16_BUSY                 0x3
#define DESC_CALL_GATE16                0x4
#define DESC_TASK_GATE                  0x5
#define DESC_INTR_GATE16                0x6
#define DESC_TRAP_GATE16                0x7
#define DESC_TSS_AVAILABLE              0x9             /* 32-bit, in long mode 64-bit; so the next */
#define DESC_TSS_BUSY                   0xb
#define DESC_CALL_GATE                  0xc
#define DESC_INTR_GATE                  0xe
#define DESC_TRAP_GATE                  0xf

/* ---------------------------------------------------------------------------------------------
 * Page tables
 * ------------------------------------------------------------------------------------------ */

#define PAGE_SHIFT                      12
#define PAGE_SIZE                       4096UL
#define PAGE_MASK                       0xfffffffffffff000ULL

#define PT_PRESENT_MASK                 0x0001ULL
#define PT_WRITABLE_MASK                0x0002ULL
#define PT_USER_MASK                    0x0004ULL
#define PT_PWT_MASK                     0x0008ULL
#define PT_PCD_MASK                     0x0010ULL
#define PT_ACCESSED_MASK                0x0020ULL
#define PT_DIRTY_MASK                   0x0040ULL
#define PT_PAGE_SIZE_MASK               0x0080ULL       /* above the last level */
#define PT_PAT_MASK                     0x0080ULL       /* in the last level */
#define PT_GLOBAL_MASK                  0x0100ULL
#define PT_DIR_PAT_MASK                 0x1000ULL       /* PAT of a large page */
#define PT64_ADDR_MASK                  0x000ffffffffff000ULL
#define PT64_PK_MASK                    0x7800000000000000ULL
#define PT64_PK_BIT                     59
#define PT64_NX_MASK                    0x8000000000000000ULL
#define PT32_ADDR_MASK                  0xfffff000UL
#define PT32_PSE36_MASK                 0x001fe000UL    /* address bits 32-39 of a 4 MiB page */

#define VMX_EPT_READABLE_MASK           0x0001ULL
#define VMX_EPT_WRITABLE_MASK           0x0002ULL
#define VMX_EPT_EXECUTABLE_MASK         0x0004ULL
#define VMX_EPT_RWX_MASK                0x0007ULL
#define VMX_EPT_IPAT_BIT                0x0040ULL
#define VMX_EPT_PAGE_SIZE_MASK          0x0080ULL
#define VMX_EPT_ACCESS_BIT              0x0100ULL
#define VMX_EPT_DIRTY_BIT               0x0200ULL
#define VMX_EPT_SUPPRESS_VE_BIT         0x8000000000000000ULL

/* ---------------------------------------------------------------------------------------------
 * MSRs
 * ------------------------------------------------------------------------------------------ */

#define MSR_IA32_P5_MC_ADDR             0x00000000
#define MSR_IA32_P5_MC_TYPE             0x00000001
#define MSR_IA32_TSC                    0x00000010
#define MSR_IA32_PLATFORM_ID            0x00000017
#define MSR_IA32_APICBASE               0x0000001b
#define MSR_IA32_EBL_CR_POWERON         0x0000002a
#define MSR_EBC_FREQUENCY_ID            0x0000002c
#define MSR_SMI_COUNT                   0x00000034
#define MSR_IA32_FEAT_CTL               0x0000003a
#define MSR_IA32_TSC_ADJUST             0x0000003b
#define MSR_IA32_SPEC_CTRL              0x00000048
#define MSR_IA32_PRED_CMD               0x00000049
#define MSR_IA32_UCODE_WRITE            0x00000079
#define MSR_IA32_UCODE_REV              0x0000008b
#define MSR_IA32_SMBASE                 0x0000009e
#define MSR_IA32_PERFCTR0               0x000000c1
#define MSR_IA32_PERFCTR1               0x000000c2
#define MSR_FSB_FREQ                    0x000000cd
#define MSR_PLATFORM_INFO               0x000000ce
#define MSR_IA32_CORE_CAPS              0x000000cf
#define MSR_IA32_UMWAIT_CONTROL         0x000000e1
#define MSR_IA32_MPERF                  0x000000e7
#define MSR_IA32_APERF                  0x000000e8
#define MSR_MTRRcap                     0x000000fe
#define MSR_IA32_ARCH_CAPABILITIES      0x0000010a
#define MSR_IA32_FLUSH_CMD              0x0000010b
#define MSR_IA32_BBL_CR_CTL             0x00000119
#define MSR_IA32_BBL_CR_CTL3            0x0000011e
#define MSR_IA32_TSX_CTRL               0x00000122
#define MSR_MISC_FEATURES_ENABLES       0x00000140
#define MSR_IA32_SYSENTER_CS            0x00000174
#define MSR_IA32_SYSENTER_ESP           0x00000175
#define MSR_IA32_SYSENTER_EIP           0x00000176
#define MSR_IA32_MCG_CAP                0x00000179
#define MSR_IA32_MCG_STATUS             0x0000017a
#define MSR_IA32_MCG_CTL                0x0000017b
#define MSR_P6_EVNTSEL0                 0x00000186
#define MSR_P6_EVNTSEL1                 0x00000187
#define MSR_IA32_PERF_STATUS            0x00000198
#define MSR_IA32_PERF_CTL               0x00000199
#define MSR_IA32_MISC_ENABLE            0x000001a0
#define MSR_OFFCORE_RSP_0               0x000001a6
#define MSR_OFFCORE_RSP_1               0x000001a7
#define MSR_IA32_XFD                    0x000001c4
#define MSR_IA32_XFD_ERR                0x000001c5
#define MSR_LBR_SELECT                  0x000001c8
#define MSR_LBR_TOS                     0x000001c9
#define MSR_IA32_DEBUGCTLMSR            0x000001d9
#define MSR_IA32_LASTBRANCHFROMIP       0x000001db
#define MSR_IA32_LASTBRANCHTOIP         0x000001dc
#define MSR_IA32_LASTINTFROMIP          0x000001dd
#define MSR_IA32_LASTINTTOIP            0x000001de
#define MSR_IA32_POWER_CTL              0x000001fc
#define MSR_MTRRphysBase0               0x00000200      /* base and mask of range n at 2n, 2n + 1 */
#define MSR_MTRRphysMask0               0x00000201
#define MSR_MTRRfix64K_00000            0x00000250
#define MSR_MTRRfix16K_80000            0x00000258
#define MSR_MTRRfix16K_A0000            0x00000259
#define MSR_MTRRfix4K_C0000             0x00000268
#define MSR_MTRRfix4K_C8000             0x00000269
#define MSR_MTRRfix4K_D0000             0x0000026a
#define MSR_MTRRfix4K_D8000             0x0000026b
#define MSR_MTRRfix4K_E0000             0x0000026c
#define MSR_MTRRfix4K_E8000             0x0000026d
#define MSR_MTRRfix4K_F0000             0x0000026e
#define MSR_MTRRfix4K_F8000             0x0000026f
#define MSR_IA32_CR_PAT                 0x00000277
#define MSR_IA32_MC0_CTL2               0x00000280
#define MSR_MTRRdefType                 0x000002ff
#define MSR_CORE_PERF_FIXED_CTR0        0x00000309
#define MSR_IA32_PERF_CAPABILITIES      0x00000345
#define MSR_CORE_PERF_FIXED_CTR_CTRL    0x0000038d
#define MSR_CORE_PERF_GLOBAL_STATUS     0x0000038e
#define MSR_CORE_PERF_GLOBAL_CTRL       0x0000038f
#define MSR_CORE_PERF_GLOBAL_OVF_CTRL   0x00000390
#define MSR_IA32_PEBS_ENABLE            0x000003f1
#define MSR_IA32_MC0_CTL                0x00000400      /* ctl, status, addr, misc of bank n at 4n */
#define MSR_IA32_MC0_STATUS             0x00000401
#define MSR_IA32_MC0_ADDR               0x00000402
#define MSR_IA32_MC0_MISC               0x00000403
#define MSR_IA32_VMX_BASIC              0x00000480
#define MSR_IA32_VMX_VMFUNC             0x00000491
#define MSR_IA32_DS_AREA                0x00000600
#define MSR_IA32_U_CET                  0x000006a0
#define MSR_IA32_S_CET                  0x000006a2
#define MSR_IA32_PL0_SSP                0x000006a4
#define MSR_IA32_PL1_SSP                0x000006a5
#define MSR_IA32_PL2_SSP                0x000006a6
#define MSR_IA32_PL3_SSP                0x000006a7
#define MSR_IA32_INT_SSP_TAB            0x000006a8
#define MSR_IA32_TSC_DEADLINE           0x000006e0
#define MSR_IA32_PKRS                   0x000006e1
#define APIC_BASE_MSR                   0x00000800      /* x2APIC: register offset >> 4 above it */
#define MSR_IA32_XSS                    0x00000da0

#define MSR_EFER                        0xc0000080
#define MSR_STAR                        0xc0000081
#define MSR_LSTAR                       0xc0000082
#define MSR_CSTAR                       0xc0000083
#define MSR_SYSCALL_MASK                0xc0000084
#define MSR_FS_BASE                     0xc0000100
#define MSR_GS_BASE                     0xc0000101
#define MSR_KERNEL_GS_BASE              0xc0000102
#define MSR_TSC_AUX                     0xc0000103
#define MSR_AMD64_TSC_RATIO             0xc0000104

#define MSR_K7_EVNTSEL0                 0xc0010000
#define MSR_K7_PERFCTR0                 0xc0010004
#define MSR_AMD64_SYSCFG                0xc0010010
#define MSR_K7_HWCR                     0xc0010015
#define MSR_K8_TOP_MEM1                 0xc001001a
#define MSR_K8_TOP_MEM2                 0xc001001d
#define MSR_K8_INT_PENDING_MSG          0xc0010055
#define MSR_AMD64_PATCH_LEVEL           0x0000008b
#define MSR_AMD64_PATCH_LOADER          0xc0010020
#define MSR_FAM10H_MMIO_CONF_BASE       0xc0010058
#define MSR_AMD64_NB_CFG                0xc001001f
#define MSR_VM_CR                       0xc0010114
#define MSR_VM_HSAVE_PA                 0xc0010117
#define MSR_AMD64_VIRT_SPEC_CTRL        0xc001011f
#define MSR_AMD64_OSVW_ID_LENGTH        0xc0010140
#define MSR_AMD64_OSVW_STATUS           0xc0010141
#define MSR_F15H_PERF_CTL0              0xc0010200
#define MSR_F15H_PERF_CTR0              0xc0010201
#define MSR_AMD64_DC_CFG                0xc0011022
#define MSR_AMD64_BU_CFG2               0xc001102a
#define MSR_AMD64_IC_CFG                0xc0011021
#define MSR_AMD64_LS_CFG                0xc0011020
#define MSR_AMD64_DE_CFG                0xc0011029

/* KVM's own, for guests */
#define MSR_KVM_WALL_CLOCK              0x00000011
#define MSR_KVM_SYSTEM_TIME             0x00000012
#define MSR_KVM_WALL_CLOCK_NEW          0x4b564d00
#define MSR_KVM_SYSTEM_TIME_NEW         0x4b564d01
#define MSR_KVM_ASYNC_PF_EN             0x4b564d02
#define MSR_KVM_STEAL_TIME              0x4b564d03
#define MSR_KVM_PV_EOI_EN               0x4b564d04
#define MSR_KVM_POLL_CONTROL            0x4b564d05
#define MSR_KVM_ASYNC_PF_INT            0x4b564d06
#define MSR_KVM_ASYNC_PF_ACK            0x4b564d07
#define MSR_KVM_MIGRATION_CONTROL       0x4b564d08

/* bits of some of them */
#define MSR_IA32_APICBASE_BSP           0x00000100UL
#define X2APIC_ENABLE                   0x00000400UL
#define MSR_IA32_APICBASE_ENABLE        0x00000800UL
#define MSR_IA32_APICBASE_BASE          0x000ffffffffff000ULL
#define APIC_DEFAULT_PHYS_BASE          0xfee00000UL
#define IOAPIC_DEFAULT_BASE_ADDRESS     0xfec00000UL

#define FEAT_CTL_LOCKED                 0x00000001UL
#define FEAT_CTL_VMX_ENABLED_INSIDE_SMX 0x00000002UL
#define FEAT_CTL_VMX_ENABLED_OUTSIDE_SMX 0x00000004UL
#define FEAT_CTL_LMCE_ENABLED           0x00100000UL

#define MSR_IA32_MISC_ENABLE_FAST_STRING 0x00000001UL
#define MSR_IA32_MISC_ENABLE_EMON       0x00000080UL
#define MSR_IA32_MISC_ENABLE_BTS_UNAVAIL 0x00000800UL
#define MSR_IA32_MISC_ENABLE_PEBS_UNAVAIL 0x00001000UL
#define MSR_IA32_MISC_ENABLE_MWAIT      0x00040000UL
#define MSR_IA32_MISC_ENABLE_LIMIT_CPUID 0x00400000UL
#define MSR_IA32_MISC_ENABLE_XD_DISABLE 0x0000000400000000ULL

#define DEBUGCTLMSR_LBR                 0x00000001UL
#define DEBUGCTLMSR_BTF                 0x00000002UL
#define DEBUGCTLMSR_BUS_LOCK_DETECT     0x00000004UL
#define DEBUGCTLMSR_FREEZE_IN_SMM       0x00004000UL

#define MCG_BANKCNT_MASK                0x000000ffUL
#define MCG_CTL_P                       0x00000100UL
#define MCG_EXT_P                       0x00000200UL
#define MCG_CMCI_P                      0x00000400UL
#define MCG_TES_P                       0x00000800UL
#define MCG_SER_P                       0x01000000UL
#define MCG_ELOG_P                      0x04000000UL
#define MCG_LMCE_P                      0x08000000UL
#define MCG_STATUS_RIPV                 0x00000001UL
#define MCG_STATUS_EIPV                 0x00000002UL
#define MCG_STATUS_MCIP                 0x00000004UL
#define MCI_STATUS_VAL                  0x8000000000000000ULL
#define MCI_STATUS_OVER                 0x4000000000000000ULL
#define MCI_STATUS_UC                   0x2000000000000000ULL
#define MCI_STATUS_ADDRV                0x0400000000000000ULL

#define MSR_PAT_RESET                   0x0007040600070406ULL
#define MTRR_DEF_TYPE_FE                0x00000400UL
#define MTRR_DEF_TYPE_E                 0x00000800UL
#define MTRR_TYPE_UNCACHABLE            0
#define MTRR_TYPE_WRCOMB                1
#define MTRR_TYPE_WRTHROUGH             4
#define MTRR_TYPE_WRPROT                5
#define MTRR_TYPE_WRBACK                6

/* ---------------------------------------------------------------------------------------------
 * Bit positions in CPUID, by leaf and register (subleaf 0 unless said)
 * ------------------------------------------------------------------------------------------ */

#define CPUID_1_ECX_SSE3                0
#define CPUID_1_ECX_PCLMULQDQ           1
#define CPUID_1_ECX_DTES64              2
#define CPUID_1_ECX_MONITOR             3
#define CPUID_1_ECX_VMX                 5
#define CPUID_1_ECX_SSSE3               9
#define CPUID_1_ECX_FMA                 12
#define CPUID_1_ECX_CX16                13
#define CPUID_1_ECX_PDCM                15
#define CPUID_1_ECX_PCID                17
#define CPUID_1_ECX_SSE4_1              19
#define CPUID_1_ECX_SSE4_2              20
#define CPUID_1_ECX_X2APIC              21
#define CPUID_1_ECX_MOVBE               22
#define CPUID_1_ECX_POPCNT              23
#define CPUID_1_ECX_TSC_DEADLINE        24
#define CPUID_1_ECX_AES                 25
#define CPUID_1_ECX_XSAVE               26
#define CPUID_1_ECX_OSXSAVE             27
#define CPUID_1_ECX_AVX                 28
#define CPUID_1_ECX_F16C                29
#define CPUID_1_ECX_RDRAND              30
#define CPUID_1_ECX_HYPERVISOR          31

#define CPUID_1_EDX_FPU                 0
#define CPUID_1_EDX_VME                 1
#define CPUID_1_EDX_DE                  2
#define CPUID_1_EDX_PSE                 3
#define CPUID_1_EDX_TSC                 4
#define CPUID_1_EDX_MSR                 5
#define CPUID_1_EDX_PAE                 6
#define CPUID_1_EDX_MCE                 7
#define CPUID_1_EDX_CX8                 8
#define CPUID_1_EDX_APIC                9
#define CPUID_1_EDX_SEP                 11
#define CPUID_1_EDX_MTRR                12
#define CPUID_1_EDX_PGE                 13
#define CPUID_1_EDX_MCA                 14
#define CPUID_1_EDX_CMOV                15
#define CPUID_1_EDX_PAT                 16
#define CPUID_1_EDX_PSE36               17
#define CPUID_1_EDX_CLFLUSH             19
#define CPUID_1_EDX_MMX                 23
#define CPUID_1_EDX_FXSR                24
#define CPUID_1_EDX_SSE                 25
#define CPUID_1_EDX_SSE2                26
#define CPUID_1_EDX_SS                  27
#define CPUID_1_EDX_HTT                 28

#define CPUID_6_EAX_ARAT                2

#define CPUID_7_EBX_FSGSBASE            0
#define CPUID_7_EBX_TSC_ADJUST          1
#define CPUID_7_EBX_BMI1                3
#define CPUID_7_EBX_HLE                 4
#define CPUID_7_EBX_AVX2                5
#define CPUID_7_EBX_FDP_EXCPTN_ONLY     6
#define CPUID_7_EBX_SMEP                7
#define CPUID_7_EBX_BMI2                8
#define CPUID_7_EBX_ERMS                9
#define CPUID_7_EBX_INVPCID             10
#define CPUID_7_EBX_RTM                 11
#define CPUID_7_EBX_ZERO_FCS_FDS        13
#define CPUID_7_EBX_MPX                 14
#define CPUID_7_EBX_AVX512F             16
#define CPUID_7_EBX_RDSEED              18
#define CPUID_7_EBX_ADX                 19
#define CPUID_7_EBX_SMAP                20
#define CPUID_7_EBX_CLFLUSHOPT          23
#define CPUID_7_EBX_CLWB                24
#define CPUID_7_EBX_SHA_NI              29
#define CPUID_7_ECX_UMIP                2
#define CPUID_7_ECX_PKU                 3
#define CPUID_7_ECX_OSPKE               4
#define CPUID_7_ECX_SHSTK               7
#define CPUID_7_ECX_GFNI                8
#define CPUID_7_ECX_VAES                9
#define CPUID_7_ECX_VPCLMULQDQ          10
#define CPUID_7_ECX_LA57                16
#define CPUID_7_ECX_RDPID               22
#define CPUID_7_ECX_BUS_LOCK_DETECT     24
#define CPUID_7_EDX_FSRM                4
#define CPUID_7_EDX_MD_CLEAR            10
#define CPUID_7_EDX_SERIALIZE           14
#define CPUID_7_EDX_IBT                 20
#define CPUID_7_EDX_SPEC_CTRL           26
#define CPUID_7_EDX_INTEL_STIBP         27
#define CPUID_7_EDX_FLUSH_L1D           28
#define CPUID_7_EDX_ARCH_CAPABILITIES   29
#define CPUID_7_EDX_SPEC_CTRL_SSBD      31

#define CPUID_D_1_EAX_XSAVEOPT          0       /* leaf 0xd, subleaf 1 */
#define CPUID_D_1_EAX_XSAVEC            1
#define CPUID_D_1_EAX_XGETBV1           2
#define CPUID_D_1_EAX_XSAVES            3
#define CPUID_D_1_EAX_XFD               4

#define CPUID_80000001_ECX_LAHF_LM      0
#define CPUID_80000001_ECX_CMP_LEGACY   1
#define CPUID_80000001_ECX_SVM          2
#define CPUID_80000001_ECX_CR8_LEGACY   4
#define CPUID_80000001_ECX_ABM          5
#define CPUID_80000001_ECX_SSE4A        6
#define CPUID_80000001_ECX_3DNOWPREFETCH 8
#define CPUID_80000001_ECX_OSVW         9
#define CPUID_80000001_ECX_TOPOEXT      22
#define CPUID_80000001_EDX_SYSCALL      11
#define CPUID_80000001_EDX_NX           20
#define CPUID_80000001_EDX_MMXEXT       22
#define CPUID_80000001_EDX_FXSR_OPT     25
#define CPUID_80000001_EDX_GBPAGES      26
#define CPUID_80000001_EDX_RDTSCP       27
#define CPUID_80000001_EDX_LM           29
#define CPUID_80000007_EDX_CONSTANT_TSC 8

/* clang-format on */

#endif /* PYKVM_X86_H */
