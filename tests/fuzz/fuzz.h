/* SPDX-License-Identifier: MIT */
/*
 * One instruction with its state, as the host processor (native.c) and the core (core.c) execute
 * it, and what differs (cases.c).  This header is also read by cffi.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdint.h>

/* Where things lie, for both: below 2 GiB so that every addressing form reaches them.
 * Data pages: 0, 1, 4 writable; 2 absent; 3 read-only. */
#define FUZZ_DATA 0x10000000
#define FUZZ_DATA_PAGES 5
/* Two pages, filled with INT3. */
#define FUZZ_CODE 0x20000000
#define FUZZ_CODE_PAGES 2
#define FUZZ_GS_BASE 0x1000

/* fuzz_template.flags, fuzz_case.flags */
#define FUZZ_BRANCH 1    /* behind it there is INT3, and rip says where it went */
#define FUZZ_REPEATED 2  /* may come back with rip at itself when single-stepped */
#define FUZZ_RAX_FOUND 4 /* rax is the word most of the data consists of (SCAS) */
#define FUZZ_STEP 8      /* the core executes it in single-step mode */
#define FUZZ_CODE32 16   /* 32-bit code in flat segments; neither this nor the next: 64-bit code */
#define FUZZ_CODE16 32   /* 16-bit code: CS at FUZZ_CODE; DS, ES, SS at FUZZ_DATA */
#define FUZZ_VECTOR 64   /* vector registers, MXCSR and data are of interest for vector instructions */
#define FUZZ_FPU 128     /* x87 registers and data are of interest for x87 and MMX */
#define FUZZ_PARTS 256   /* accessed in parts, in any order: which of them faults first is not compared */

/* Limits of 16-bit code.  ES expands down: what is above its limit is accessible. */
#define FUZZ_CS_LIMIT 0x1fff
#define FUZZ_DS_LIMIT 0x4ffb
#define FUZZ_SS_LIMIT 0x4fff
#define FUZZ_ES_LIMIT 0x00ff

/* Of the XSAVE image (SDM vol. 1 13.4), which struct fuzz_state contains. */
#define FUZZ_MXCSR 24
#define FUZZ_ST 32
#define FUZZ_XMM 160
#define FUZZ_XSTATE_BV 512
#define FUZZ_YMM 576
#define FUZZ_XSAVE_SIZE 832

struct fuzz_state {
    uint64_t gpr[16];
    uint64_t rip, rflags;
    uint64_t pad[6];
    uint8_t xsave[FUZZ_XSAVE_SIZE]; /* standard format; aligned to 64 bytes where it is used */
};

/* A part of the data pages; size 0: none. */
#define FUZZ_RANGES 2
struct fuzz_range {
    uint64_t at, size;
};

struct fuzz_template {
    uint8_t bytes[16];
    uint32_t len;
    uint32_t flags;
    uint32_t fixed; /* bit n: gpr[n] is value[n], else random */
    uint32_t pad;
    uint64_t value[16];
    uint64_t rip;
    uint64_t patch_at, patch; /* eight bytes of data with a value that matters; 0: none */
    uint64_t flags_mask;      /* rflags bits that are defined */
    uint32_t index_size;      /* 4 or 8: vector register index_register holds small numbers of that size */
    uint32_t index_register;
    struct fuzz_range zeroed[FUZZ_RANGES];  /* before patch */
    struct fuzz_range ignored[FUZZ_RANGES]; /* not compared: processors are free to differ */
};

struct fuzz_case {
    uint8_t bytes[16];
    uint32_t len;
    uint32_t flags;
    struct fuzz_state in;
    uint64_t memory_seed;
    uint64_t patch_at, patch;
    uint64_t flags_mask;
    struct fuzz_range zeroed[FUZZ_RANGES];  /* before patch */
    struct fuzz_range ignored[FUZZ_RANGES]; /* not compared: processors are free to differ */
};

struct fuzz_result {
    struct fuzz_state out;
    int32_t vector; /* -1: none; below: the core left for another reason */
    uint32_t error;
    uint64_t cr2;
    uint64_t memory_hash;
};

/* The core with its guest memory; the functions are those of cpu.h. */
struct fuzz_core {
    void *cpu;
    void *vmcs;
    uint8_t *data, *code;
    int (*enter)(void *);
    void (*sync_code)(void *);
};

/* A case from a template: the registers that are not fixed come from the seed. */
void fuzz_expand(const struct fuzz_template *t, uint64_t seed, struct fuzz_case *c);
/* What the data pages hold before a case (page 2 is left alone), and their hash afterwards. */
void fuzz_fill(uint8_t *pages, const struct fuzz_case *c);
uint64_t fuzz_hash(const uint8_t *pages);
/* Clears what is not compared. */
void fuzz_forget(uint8_t *pages, const struct fuzz_case *c);

/* Shared memory for n cases and as many results, all zero. */
void *fuzz_shared(uint64_t size);
/* Runs n cases on the host in a forked child; both arrays in shared memory.  Returns how many
 * have run: fewer than n when one of them killed the child or hung. */
int fuzz_native(const struct fuzz_case *cases, struct fuzz_result *results, int n);
void fuzz_core_run(const struct fuzz_core *core, const struct fuzz_case *cases,
                   struct fuzz_result *results, int n);
/* Index of the first case at or behind `from` whose results differ, or n. */
int fuzz_differs(const struct fuzz_case *cases, const struct fuzz_result *native,
                 const struct fuzz_result *core, int from, int n);

#endif
