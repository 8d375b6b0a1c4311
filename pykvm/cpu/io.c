/* SPDX-License-Identifier: MIT */
/*
 * IN, OUT, INS, OUTS: what there is at a port the module knows, so each exits.
 *
 * An input instruction exits uncommitted with what it wants, and is executed again with the
 * answer in ctl.pio_data; INS asks for as many elements as fit its page.  OUT exits uncommitted
 * too, and is completed with ctl.pio_out_done.  OUTS exits with each element committed.
 */
#include "stringop.h"

static bool hits_port(const struct cpu_guest *g, unsigned n, u16 port, unsigned size)
{
    static const u8 length[4] = {1, 2, 8, 4};
    u32 control = (u32)(g->dr7 >> (DR7_RW_BIT + 4 * n));
    u32 len = length[control >> 2 & 3], first = (u16)g->dr[n] & ~(len - 1);

    return g->dr7 >> 2 * n & 3 && (control & 3) == DR_RW_PORT && port < first + len &&
           first < port + size;
}

/* I/O breakpoints trap behind the instruction or iteration, which is done again as a step for that:
 * SDM vol. 3 17.2.4, 17.3.1.3. */
static bool check_breakpoints(struct cpu *cpu, u16 port, unsigned size)
{
    const struct cpu_guest *g = &GUEST(cpu);
    u32 hits = 0;

    if (likely(!(g->dr7 & DR7_BP_EN_MASK) || !(g->cr4 & X86_CR4_DE)))
        return true;
    for (unsigned n = 0; n < 4; n++)
        hits |= hits_port(g, n, port, size) ? DR6_B0 << n : 0;
    if (hits && !cpu->step) {
        cpu->stop = STOP_STEP;
        return false;
    }
    cpu->data_bp |= hits;
    return true;
}

/* Whether the instruction may go to the port at all. */
static bool port_ready(struct cpu *cpu, u16 port, unsigned size)
{
    return io_allowed(cpu, port, size) && check_breakpoints(cpu, port, size);
}

#define INS_BATCH 1024u /* bytes; KVM's own limit of one batch */

static int exit_io(struct cpu *cpu, const struct insn *i, struct cpu_exit_io io)
{
    EXIT(cpu).io = io;
    return vmexit(cpu, i, EXIT_IO);
}

static bool answer_there(const struct cpu *cpu) { return CTL(cpu).pio_pos < CTL(cpu).pio_count; }

static u32 answer_peek(const struct cpu *cpu, unsigned size)
{
    u32 v = 0;
    unsigned at = CTL(cpu).pio_pos * size;
    if (at + size <= CPU_PIO_DATA)
        memcpy(&v, CTL(cpu).pio_data + at, size);
    return v;
}

static void answer_consume(struct cpu *cpu)
{
    if (++CTL(cpu).pio_pos == CTL(cpu).pio_count)
        CTL(cpu).pio_pos = CTL(cpu).pio_count = 0;
}

static int input(struct cpu *cpu, const struct insn *i, u16 port)
{
    if (!port_ready(cpu, port, i->opsize))
        return stop(cpu, i);
    if (!answer_there(cpu))
        return exit_io(cpu, i,
                       (struct cpu_exit_io){
                           .port = port,
                           .size = i->opsize,
                           .in = 1,
                           .count = 1,
                       });
    reg_write(cpu, RAX * 8, i->opsize, answer_peek(cpu, i->opsize));
    answer_consume(cpu);
    NEXT(cpu, i);
}

static int output(struct cpu *cpu, const struct insn *i, u16 port)
{
    if (!port_ready(cpu, port, i->opsize))
        return stop(cpu, i);
    if (!CTL(cpu).pio_out_done)
        return exit_io(cpu, i,
                       (struct cpu_exit_io){
                           .port = port,
                           .size = i->opsize,
                           .count = 1,
                           .data = (u32)reg_read(cpu, RAX * 8, i->opsize),
                       });
    CTL(cpu).pio_out_done = 0;
    NEXT(cpu, i);
}

int x_in(struct cpu *cpu, const struct insn *i) { return input(cpu, i, (u8)i->imm); }
int x_in_dx(struct cpu *cpu, const struct insn *i) { return input(cpu, i, (u16)GPR(cpu, RDX)); }
int x_out(struct cpu *cpu, const struct insn *i) { return output(cpu, i, (u8)i->imm); }
int x_out_dx(struct cpu *cpu, const struct insn *i) { return output(cpu, i, (u16)GPR(cpu, RDX)); }

/* ---- strings -------------------------------------------------------------------------------------- */

/* How many elements to ask for. KVM's formula: the rest of the page counts in bytes whatever
 * the element size, and with DF the page is what lies below the first element. */
static u32 ins_batch(const struct cpu *cpu, const struct insn *i, u64 la, u64 count)
{
    u64 offset = la & (PAGE_SIZE - 1);
    u64 room = GUEST(cpu).rflags & X86_EFLAGS_DF ? offset : PAGE_SIZE - offset;
    u64 n = INS_BATCH / i->opsize;

    if (n > room)
        n = room;
    if (n > count)
        n = count;
    return n ? (u32)n : 1;
}

/* The destination is known to be writable before the port is read: what the port gave must not
 * be lost. */
int x_ins(struct cpu *cpu, const struct insn *i)
{
    const u16 port = (u16)GPR(cpu, RDX);
    if (!io_allowed(cpu, port, i->opsize))
        return stop(cpu, i);
    for (;;) {
        u64 count = repeat_count(cpu, i), la;
        if (count == 0)
            break;
        if (!check_breakpoints(cpu, port, i->opsize) ||
            !destination_linear(cpu, i, ACC_WRITE, &la) ||
            !mem_probe_write(cpu, la, i->opsize, ACC_WRITE))
            return stop(cpu, i);
        if (!answer_there(cpu))
            return exit_io(cpu, i,
                           (struct cpu_exit_io){
                               .port = port,
                               .size = i->opsize,
                               .in = 1,
                               .string = 1,
                               .rep = is_repeated(i),
                               .count = ins_batch(cpu, i, la, count),
                           });
        if (!st_size(cpu, la, i->opsize, answer_peek(cpu, i->opsize), 0))
            return stop(cpu, i);
        answer_consume(cpu);
        string_advance(cpu, i, RDI, 1);
        repeat_done(cpu, i, 1);
        if (count == 1)
            break;
        if (cpu->step || !answer_there(cpu))
            return repeat_later(cpu, i);
    }
    NEXT(cpu, i);
}

int x_outs(struct cpu *cpu, const struct insn *i)
{
    const u16 port = (u16)GPR(cpu, RDX);
    u64 count = repeat_count(cpu, i), la, v;
    if (!io_allowed(cpu, port, i->opsize))
        return stop(cpu, i);
    if (count == 0)
        NEXT(cpu, i);
    if (!check_breakpoints(cpu, port, i->opsize) || !source_linear(cpu, i, &la) ||
        !ld_size(cpu, la, i->opsize, &v, ea_access(i)))
        return stop(cpu, i);
    string_advance(cpu, i, RSI, 1);
    repeat_done(cpu, i, 1);
    /* The last one, too, leaves rip at a REP OUTS: it retires when it finds rcx 0, as in KVM. */
    set_rip(cpu, is_repeated(i) ? insn_rip(cpu, i) : next_rip(cpu, i));
    EXIT(cpu).io = (struct cpu_exit_io){
        .port = port,
        .size = i->opsize,
        .string = 1,
        .rep = is_repeated(i),
        .count = 1,
        .data = (u32)v,
    };
    return vmexit_done(cpu, i, EXIT_IO);
}
