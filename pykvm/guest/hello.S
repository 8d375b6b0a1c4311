/*
 * hello: the guest `pykvm run` boots when no image is named.
 *
 * From the reset vector it climbs to 64-bit long mode and on the way makes use of what a monitor has
 * to get right: port output (OUT and REP OUTSB), CPUID, page tables of its own, memory-mapped I/O, a
 * software interrupt, an interrupt injected by the host, and enough arithmetic to be timed.
 *
 *     cc -c -o hello.o hello.S && ld -T hello.ld -o hello.bin hello.o
 *
 * Machine
 *     RAM     2 MiB or more at 0.  Nothing is assumed about its contents.
 *     ROM     this image, 64 KiB, at 0xffff0000; it is not written, a read-only slot will do.
 *     vCPU    as after KVM_CREATE_VCPU (the processor's reset state), with any CPUID that has long mode.
 *     No interrupt controller in the kernel; one that is there gets all its lines masked.
 *
 * What the host does
 *     port 0x3f8, OUT of 1 byte     a character of console output
 *     port 0x80, OUT of 1 byte V    inject vector V by KVM_INTERRUPT as soon as the guest can take it
 *                                   (KVM_EXIT_IRQ_WINDOW_OPEN).  A host that does not is waited for
 *                                   a while and then reported.
 *     gpa 0xd0000000, 4 bytes       the test device's one register: a write stores a value, a read
 *                                   returns the stored value plus one
 *     HLT with interrupts off       the end
 *     Writes to ports 0x21 and 0xa1 (the interrupt controllers' masks) may be ignored.
 *
 * Parameters, patched into the image by whoever loads it (offsets from the image's end)
 *     -0x40   8 bytes   "pykvmrom"
 *     -0x38   u32       iterations of the loop that is timed; default 20 000 000
 *     -0x34   u32       flags: bit 0 leaves INT 0x30 out (KVM's emulator has no INT n in long mode)
 *
 * The timed loop is LOOP_INSNS instructions an iteration.  The console's last line but one holds its
 * result; for the default count it must be 0x185f2e107cafeb29 on every processor.
 */

#define CONSOLE         0x3f8
#define REQUEST_IRQ     0x80
#define DEVICE          0xd0000000
#define ROM             0xffff0000
#define LOOP_INSNS      5

/* RAM, a page each */
#define PML4            0x1000
#define PDPT            0x2000
#define PD_LOW          0x3000          /* 0 to 1 GiB */
#define PD_HIGH         0x4000          /* 3 to 4 GiB */
#define PT_LOW          0x5000          /* 0 to 2 MiB */
#define IDT             0x6000
#define INTERRUPTS      0x7000          /* how many of the vector awaited were taken, u32 */
#define STACK           0x9000          /* grows down */

#define PRESENT         0x001
#define WRITABLE        0x002
#define UNCACHED        0x010
#define LARGE           0x080

#define CODE32          0x08
#define DATA            0x10
#define CODE64          0x18

        .section .reset, "ax"
        .code16
        .globl  reset_vector
reset_vector:
        jmp     real_mode

        .section .parameters, "a"
        .ascii  "pykvmrom"
iterations:
        .long   20000000
flags:  .long   0

/* ---- real mode ------------------------------------------------------------------------------- */

        .section .rom, "ax"
        .code16
/*
 * CS has selector 0xf000 and, as no real mode selector can, base 0xffff0000: until CS is loaded the
 * ROM is reached through it, at its offset in the image.
 */
real_mode:
        cli
        cld
        mov     $(real_text - ROM), %si
        mov     $CONSOLE, %dx
1:      lodsb   %cs:(%si), %al
        test    %al, %al
        jz      2f
        out     %al, %dx
        jmp     1b
2:      lgdtl   %cs:gdt_pointer - ROM
        mov     %cr0, %eax
        or      $1, %al                 /* PE */
        mov     %eax, %cr0
        ljmpl   $CODE32, $protected_mode

real_text:
        .asciz  "hello from real mode\n"

/* ---- protected mode -------------------------------------------------------------------------- */

        .code32
protected_mode:
        mov     $DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $STACK, %esp
        mov     $protected_text, %esi
        mov     $protected_text_size, %ecx
        mov     $CONSOLE, %edx
        rep outsb

        /* Tables: the low 2 MiB in 4 KiB pages, the device and the ROM in large ones. */
        mov     $PML4, %edi
        xor     %eax, %eax
        mov     $(5 * 4096 / 4), %ecx
        rep stosl
        movl    $(PDPT + PRESENT + WRITABLE), PML4
        movl    $(PD_LOW + PRESENT + WRITABLE), PDPT
        movl    $(PD_HIGH + PRESENT + WRITABLE), PDPT + 3 * 8
        movl    $(PT_LOW + PRESENT + WRITABLE), PD_LOW
        movl    $(DEVICE + PRESENT + WRITABLE + UNCACHED + LARGE), PD_HIGH + ((DEVICE >> 21) & 511) * 8
        movl    $((ROM & 0xffe00000) + PRESENT + LARGE), PD_HIGH + ((ROM >> 21) & 511) * 8
        mov     $PT_LOW, %edi
        mov     $(PRESENT + WRITABLE), %eax
1:      mov     %eax, (%edi)
        add     $8, %edi
        add     $4096, %eax
        cmp     $0x200000, %eax
        jb      1b

        mov     $0x20, %eax             /* PAE */
        mov     %eax, %cr4
        mov     $PML4, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx       /* EFER.LME */
        rdmsr
        or      $0x100, %eax
        wrmsr
        mov     %cr0, %eax
        or      $0x80010000, %eax       /* PG, WP */
        mov     %eax, %cr0
        ljmpl   $CODE64, $long_mode

protected_text:
        .ascii  "hello from protected mode\n"
        .set    protected_text_size, . - protected_text

/* ---- long mode ------------------------------------------------------------------------------- */

        .code64
long_mode:
        mov     $STACK, %esp
        lea     long_text(%rip), %rsi
        call    print
        call    print_vendor
        call    build_idt
        call    try_device
        call    software_interrupt
        call    host_interrupt
        call    timed_loop
        lea     halt_text(%rip), %rsi
        call    print
halt:   cli
        hlt
        jmp     halt

long_text:
        .asciz  "hello from long mode on "
halt_text:
        .asciz  "halting\n"

/* print: the zero-terminated text at RSI, by one REP OUTSB. */
print:
        mov     %rsi, %rdi
        xor     %eax, %eax
        mov     $-1, %rcx
        repne scasb
        not     %rcx
        dec     %rcx                    /* the length without the 0 */
        mov     $CONSOLE, %edx
        rep outsb
        ret

/* print_hex: RAX as 0x and CL digits, by an OUT for each, then a newline. */
print_hex:
        mov     %rax, %rbx
        mov     %cl, %bpl
        mov     $CONSOLE, %edx
        mov     $'0', %al
        out     %al, %dx
        mov     $'x', %al
        out     %al, %dx
        neg     %cl                     /* the highest digit wanted to the top */
        add     $16, %cl
        shl     $2, %cl
        shl     %cl, %rbx
1:      rol     $4, %rbx
        mov     %bl, %al
        and     $15, %al
        add     $'0', %al
        cmp     $'9', %al
        jbe     2f
        add     $('a' - '9' - 1), %al
2:      out     %al, %dx
        dec     %bpl
        jnz     1b
        mov     $'\n', %al
        out     %al, %dx
        ret

/* print_vendor: the twelve letters of CPUID leaf 0, from the stack. */
print_vendor:
        xor     %eax, %eax
        cpuid
        movabs  $0x0a00000000, %rax     /* ECX's letters, a newline and a 0 */
        or      %rcx, %rax
        push    %rax
        shl     $32, %rdx
        or      %rdx, %rbx
        push    %rbx
        mov     %rsp, %rsi
        call    print
        add     $16, %rsp
        ret

/* ---- interrupts ------------------------------------------------------------------------------ */

/* build_idt: exceptions stop the guest; vectors 0x20 and 0x30 are counted. */
build_idt:
        mov     $0xff, %al              /* a PC's interrupt controllers: all lines masked */
        out     %al, $0x21
        out     %al, $0xa1
        movl    $0, INTERRUPTS
        mov     $IDT, %edi
        xor     %eax, %eax
        mov     $(4096 / 4), %ecx
        rep stosl
        mov     $IDT, %edi
        lea     exceptions(%rip), %rax
        mov     $32, %ecx
1:      call    set_gate
        add     $16, %edi
        add     $EXCEPTION_STUB, %rax
        dec     %ecx
        jnz     1b
        lea     count_interrupt(%rip), %rax
        mov     $(IDT + 0x20 * 16), %edi
        call    set_gate
        mov     $(IDT + 0x30 * 16), %edi
        call    set_gate
        lidt    idt_pointer(%rip)
        ret

/* set_gate: a 64-bit interrupt gate at RDI that leads to RAX. */
set_gate:
        mov     %ax, (%rdi)
        movw    $CODE64, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        mov     %rax, %rdx
        shr     $16, %rdx
        mov     %dx, 6(%rdi)
        shr     $16, %rdx
        mov     %edx, 8(%rdi)
        ret

count_interrupt:
        incl    INTERRUPTS
        iretq

        .set    EXCEPTION_STUB, 8
exceptions:
        .set    vector, 0
        .rept   32
        .balign EXCEPTION_STUB
        mov     $vector, %al
        jmp     unexpected
        .set    vector, vector + 1
        .endr
        .balign EXCEPTION_STUB

unexpected:
        movzbl  %al, %eax
        push    %rax
        lea     unexpected_text(%rip), %rsi
        call    print
        pop     %rax
        mov     $2, %cl
        call    print_hex
        jmp     halt

unexpected_text:
        .asciz  "unexpected exception "

software_interrupt:
        testl   $1, flags(%rip)
        jnz     1f
        int     $0x30
        lea     software_text(%rip), %rsi
        jmp     say_interrupts
1:      lea     skipped_text(%rip), %rsi
        jmp     print

/* Asks the host for vector 0x20 and waits for it with interrupts enabled. */
host_interrupt:
        movl    $0, INTERRUPTS
        mov     $0x20, %al
        out     %al, $REQUEST_IRQ
        mov     $100000, %ecx
        sti
1:      cmpl    $0, INTERRUPTS
        jne     2f
        pause
        dec     %ecx
        jnz     1b
2:      cli
        lea     host_text(%rip), %rsi

say_interrupts:
        call    print
        lea     taken_text(%rip), %rsi
        cmpl    $1, INTERRUPTS
        je      print
        lea     not_taken_text(%rip), %rsi
        jmp     print

software_text:
        .asciz  "interrupt 0x30 by INT"
host_text:
        .asciz  "interrupt 0x20 from the host"
taken_text:
        .asciz  ": taken\n"
not_taken_text:
        .asciz  ": did not come\n"
skipped_text:
        .asciz  "interrupt 0x30 by INT: left out\n"

/* ---- the test device ------------------------------------------------------------------------- */

/* A write, a read, and a read-modify-write, which is a read and a write. */
try_device:
        mov     $DEVICE, %edi
        movl    $0x12345600, (%rdi)
        mov     (%rdi), %eax            /* +1 */
        push    %rax
        incl    (%rdi)                  /* reads +1, stores +2 */
        mov     (%rdi), %eax            /* +3 */
        push    %rax
        lea     device_text(%rip), %rsi
        call    print
        mov     8(%rsp), %rax
        mov     $8, %cl
        call    print_hex
        lea     device_again_text(%rip), %rsi
        call    print
        pop     %rax
        mov     $8, %cl
        call    print_hex
        pop     %rax
        ret

device_text:
        .asciz  "device: 0x12345600 written, read back as "
device_again_text:
        .asciz  "device: incremented in place, read back as "

/* ---- the timed loop -------------------------------------------------------------------------- */

timed_loop:
        mov     iterations(%rip), %ecx
        movabs  $0x9e3779b97f4a7c15, %rdx
        mov     %rcx, %rax
1:      add     %rdx, %rax
        rol     $13, %rax
        xor     %rcx, %rax
        dec     %rcx
        jnz     1b
        push    %rax
        lea     loop_text(%rip), %rsi
        call    print
        pop     %rax
        mov     $16, %cl
        jmp     print_hex

loop_text:
        .asciz  "checksum "

/* ---- tables in ROM --------------------------------------------------------------------------- */

/* The accessed bits are set: a processor that loads these has nothing to write to the ROM. */
        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      /* CODE32: flat */
        .quad   0x00cf93000000ffff      /* DATA: flat */
        .quad   0x00af9b000000ffff      /* CODE64 */
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt
idt_pointer:
        .word   4096 - 1
        .quad   IDT
