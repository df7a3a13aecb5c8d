# The guest `spin`: for measurements of changes of the memory layout. Not a
# built-in guest that users can start: benchmarks and tests alone know it.
#
# The host (Sources/GuestPrograms/SpinGuest.swift) loads the image at 0x7C00,
# fills in the parameters, tables and vCPU pages, and starts every vCPU at
# 0x7C00 in 32-bit protected mode with its index in ebx: no INIT, no SIPI, no
# device, no interrupt. Ring 0 sets up long mode and takes faults; all else is
# 64-bit ring 3.
#
# A vCPU that spins inside works through four tables, round after round. An
# entry is an address and four legal answers:
#
#   reads    the word at the address must be one of them
#   calls    a function at the address; what it returns in eax must be one
#   walks    as reads; the page table of this address lies in a changing range
#   writes   a counter of this vCPU in the page at the address counts one up
#
# One that spins outside looks at its clock. Anything that is not as it should be
# is counted, remembered if it is the first, and the vCPU goes on.

.intel_syntax noprefix
.text
.globl _start

.set IMAGE,         0x7C00
.set PARAMETERS,    0x7E00
.set GDT,           0x9000
.set CPUS,          0x10000
.set TABLES,        0x30000

# Parameters: u64 words.
.set P_STOP,        PARAMETERS+0x08     # not 0: every vCPU parks
.set P_READS,       PARAMETERS+0x10     # address of the first entry, and of
.set P_READSEND,    PARAMETERS+0x18     # the first behind the last
.set P_CALLS,       PARAMETERS+0x20
.set P_CALLSEND,    PARAMETERS+0x28
.set P_WALKS,       PARAMETERS+0x30
.set P_WALKSEND,    PARAMETERS+0x38
.set P_WRITES,      PARAMETERS+0x40
.set P_WRITESEND,   PARAMETERS+0x48
.set ENTRY,         40

# Page of a vCPU; offsets. u64 words, then the TSS and both stacks.
.set C_INDEX,       0x08                # host
.set C_STATE,       0x10
.set C_OUTSIDE,     0x18                # host: 1 for one that spins outside
.set C_ROUNDS,      0x20
.set C_CLOCK,       0x28                # TSC at the last look
.set C_GAP,         0x30                # longest time between two looks
.set C_WRITES,      0x38                # counted up in all pages together
.set C_BADREADS,    0x40
.set C_BADCALLS,    0x48
.set C_BADWALKS,    0x50
.set C_FAULTS,      0x58
.set C_FIRST,       0x60                # first failure: kind (1 to 3, or 16 +
                                        # vector), address, value or error code,
                                        # rip of a fault
.set C_SCRATCH,     0x300
.set C_STACK0,      0x800
.set C_STACK3,      0x1000

.set STATE_RUNNING, 1
.set STATE_PARKED,  2

.set SEL_CODE64,    0x08
.set SEL_DATA,      0x10
.set SEL_CODE32,    0x18
.set SEL_USERDATA,  0x23
.set SEL_USERCODE,  0x2B
.set SEL_TSS,       0x30                # 16 bytes per vCPU

.code32
_start: cli
        cld
        lgdt    [gdtr]
        .byte   0xEA
        .long   start32
        .word   SEL_CODE32

        .org    PARAMETERS - IMAGE
        .ascii  "GODWITS1"              # the host writes the words behind it

        .org    0x8000 - IMAGE
start32:
        mov     eax, SEL_DATA
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        mov     ebp, ebx
        shl     ebp, 12
        add     ebp, CPUS
        mov     eax, 0x20               # PAE
        mov     cr4, eax
        mov     eax, TABLES
        mov     cr3, eax
        mov     ecx, 0xC0000080         # EFER: LME
        mov     eax, 0x100
        xor     edx, edx
        wrmsr
        mov     eax, 0x80000033         # PG, NE, ET, MP, PE
        mov     cr0, eax
        .byte   0xEA
        .long   start64
        .word   SEL_CODE64

.code64
start64:
        mov     ebp, ebp
        lea     rsp, [rbp+C_STACK0]
        lidt    [idtr]
        shl     ebx, 4
        add     ebx, SEL_TSS
        ltr     bx
        push    SEL_USERDATA
        lea     rax, [rbp+C_STACK3]
        push    rax
        push    2                       # interrupts off
        push    SEL_USERCODE
        push    offset ring3
        iretq

# All exceptions: count, remember the first, go on at `ring3`. On the stack:
# vector, error code, rip, cs, rflags, rsp, ss.
fault:  mov     rbp, rsp
        and     rbp, -0x1000
        inc     qword ptr [rbp+C_FAULTS]
        cmp     qword ptr [rbp+C_FIRST], 0
        jne     1f
        pop     rax
        push    rax
        add     rax, 16
        mov     [rbp+C_FIRST], rax
        mov     rax, cr2
        mov     [rbp+C_FIRST+8], rax
        mov     rax, [rsp+8]
        mov     [rbp+C_FIRST+16], rax
        mov     rax, [rsp+16]
        mov     [rbp+C_FIRST+24], rax
1:      add     rsp, 16
        mov     rax, offset ring3
        mov     [rsp], rax
        lea     rax, [rbp+C_STACK3]
        mov     [rsp+24], rax
        mov     qword ptr [rsp+16], 2
        iretq

.macro  STUB vector, haserror
stub\vector:
        .if     \haserror == 0
        push    0
        .endif
        push    \vector
        jmp     fault
.endm
.irp    vector, 0,1,2,3,4,5,6,7,9,15,16,18,19
        STUB    \vector, 0
.endr
.irp    vector, 8,10,11,12,13,14,17
        STUB    \vector, 1
.endr

# rbp: page of this vCPU, at the start and after a fault.
ring3:  mov     qword ptr [rbp+C_STATE], STATE_RUNNING
        mov     rbx, [rbp+C_INDEX]
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        cmp     qword ptr [rbp+C_CLOCK], 0
        jne     1f
        mov     [rbp+C_CLOCK], rax
1:      cmp     qword ptr [rbp+C_OUTSIDE], 0
        jne     outside

inside: call    look

        mov     rsi, [P_READS]          # reads
1:      cmp     rsi, [P_READSEND]
        jae     3f
        mov     rdi, [rsi]
        mov     rax, [rdi]
        call    check
        je      2f
        inc     qword ptr [rbp+C_BADREADS]
        mov     edx, 1
        call    remember
2:      add     rsi, ENTRY
        jmp     1b

3:      mov     rsi, [P_CALLS]          # calls
4:      cmp     rsi, [P_CALLSEND]
        jae     6f
        mov     rdi, [rsi]
        lea     rax, [rbp+C_SCRATCH]    # where zeroes as code may write
        call    rdi
        call    check
        je      5f
        inc     qword ptr [rbp+C_BADCALLS]
        mov     edx, 2
        call    remember
5:      add     rsi, ENTRY
        jmp     4b

6:      mov     rsi, [P_WALKS]          # walks
7:      cmp     rsi, [P_WALKSEND]
        jae     9f
        mov     rdi, [rsi]
        mov     rax, [rdi]
        call    check
        je      8f
        inc     qword ptr [rbp+C_BADWALKS]
        mov     edx, 3
        call    remember
8:      add     rsi, ENTRY
        jmp     7b

9:      mov     rsi, [P_WRITES]         # writes
10:     cmp     rsi, [P_WRITESEND]
        jae     11f
        mov     rdi, [rsi]
        inc     qword ptr [rdi+rbx*8+64]
        inc     qword ptr [rbp+C_WRITES]
        add     rsi, ENTRY
        jmp     10b
11:     inc     qword ptr [rbp+C_ROUNDS]
        jmp     inside

outside:
        call    look
        mov     ecx, 64
1:      pause
        dec     ecx
        jnz     1b
        inc     qword ptr [rbp+C_ROUNDS]
        jmp     outside

# Keeps the longest gap; parks while the host says so.
look:   rdtsc
        shl     rdx, 32
        or      rax, rdx
        mov     rdx, rax
        sub     rdx, [rbp+C_CLOCK]
        jb      1f
        cmp     rdx, [rbp+C_GAP]
        jbe     1f
        mov     [rbp+C_GAP], rdx
1:      mov     [rbp+C_CLOCK], rax
        cmp     qword ptr [P_STOP], 0
        jne     2f
        ret
2:      mov     qword ptr [rbp+C_STATE], STATE_PARKED
3:      pause
        cmp     qword ptr [P_STOP], 0
        jne     3b
        mov     qword ptr [rbp+C_STATE], STATE_RUNNING
        rdtsc                           # time in the park is no gap
        shl     rdx, 32
        or      rax, rdx
        mov     [rbp+C_CLOCK], rax
        ret

# Equal if rax is one of the answers of entry rsi.
check:  cmp     rax, [rsi+8]
        je      1f
        cmp     rax, [rsi+16]
        je      1f
        cmp     rax, [rsi+24]
        je      1f
        cmp     rax, [rsi+32]
1:      ret

# edx: kind, rdi: address, rax: value.
remember:
        cmp     qword ptr [rbp+C_FIRST], 0
        jne     1f
        mov     [rbp+C_FIRST], rdx
        mov     [rbp+C_FIRST+8], rdi
        mov     [rbp+C_FIRST+16], rax
1:      ret

.p2align 2
gdtr:   .word   0x22F
        .long   GDT
        .p2align 2
idtr:   .word   0x1FF
        .quad   idt

.macro  GATE handler
        .word   \handler, SEL_CODE64, 0x8E00, 0
        .quad   0
.endm

.p2align 4
idt:
.irp    vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19
        GATE    stub\vector
.endr
        .rept   12
        GATE    stub15
        .endr

        .org    GDT - IMAGE
        .quad   0
        .quad   0x00AF9B000000FFFF      # 08 ring-0 64-bit code
        .quad   0x00CF93000000FFFF      # 10 ring-0 data
        .quad   0x00CF9B000000FFFF      # 18 ring-0 32-bit code
        .quad   0x00CFF3000000FFFF      # 20 ring-3 data
        .quad   0x00AFFB000000FFFF      # 28 ring-3 64-bit code
.set cpu, 0
.rept   32                              # 30 TSSs
        .quad   0x0000890000000000 | 0x67 | (CPUS + 0x200 + cpu * 0x1000) << 16
        .quad   0
.set cpu, cpu + 1
.endr
