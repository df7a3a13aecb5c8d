# Godwit's built-in guests: one flat image for 64-bit ring 3, without an OS.
#
# The host (Sources/GuestPrograms) loads the image at 0x7C00, sets the parameter
# block, adds the pages listed below as "host", and enters 0x7C00 in 32-bit
# protected mode: flat segments, paging off, interrupts off (as PVH starts).
# Ring 0 does a few hundred instructions at boot and then only sleeps and wakes.
# All loops run in 64-bit ring 3, because a KVM without hardware support runs
# nothing else natively.
#
# Physical memory, first number included, second not:
#
#   0x07C00 0x07E00   entry
#   0x07E00 0x08000   parameter block, set by the host
#   0x08000 0x09000   code and IDT; never written.  0x8000 is the SIPI vector
#   0x09000 0x09440   GDT; the processor sets the busy bits of the TSSs
#   0x0F000 0x10000   host: shared block and the lines to print
#   0x10000 0x50000   host: one page per vCPU: status, TSS, both stacks
#   0x50000 0x90000   host: one histogram page per vCPU, `probe` only
#   0x100000          host: page tables, as many as needed; CR3 = 0x100000
#   behind them       RAM the guest fills and works on
#
# Virtual memory, all in 2 MiB pages with accessed and dirty set beforehand:
#
#   0                 2 MiB, identity: everything above
#   0xFEE00000        local APIC, identity, ring 0 only
#   WINDOW + r        the RAM at offset r; hides the hole below 4 GiB
#
# A page the guest owns holds in word 0 a stamp, which names the page and counts
# its passes, in the words behind it noise derived from the page number, then
# zeroes.  GuestChecker.swift is the other side of this contract.

.intel_syntax noprefix
.text
.globl _start

.include "layout.inc"

.code32
_start: cli
        cld
        lgdt    [gdtr]
        FARJUMP SEL_CODE32, boot_bsp

        .org    PARAMETERS - IMAGE
        .ascii  "GODWITP1"              # the host writes the words behind it

        .org    0x8000 - IMAGE
.include "boot.inc"
.include "ring0.inc"
.include "ring3.inc"
.include "walk.inc"
.include "tables.inc"
