/// Tiny 16-bit programs, assembled by hand (GNU as syntax in the comments), entered at 0000:7c00.
enum BootCode {
    /// Counts boots in the byte at 0x9000, prints the count, and leaves with status 0x2b at the fourth; falls into `end` before.
    ///
    ///     incb 0x9000; mov 0x9000,%al; add $'0',%al; mov $0x3f8,%dx; out %al,%dx
    ///     cmpb $4,0x9000; jne end; mov $0x15,%al; out %al,$0xf4; 1: hlt; jmp 1b; end:
    static func countBoots(then end: [UInt8]) -> [UInt8] {
        bytes("fe060090a000900430baf803ee803e0090047507b015e6f4f4ebfd") + end
    }

    /// `1: in $0x92,%al; or $1,%al; out %al,$0x92; jmp 1b`
    static let resetByPort92 = bytes("e4920c01e692ebf8")
    /// `1: mov $0xfe,%al; out %al,$0x64; jmp 1b`
    static let resetByKeyboardController = bytes("b0fee664ebfa")
    /// Turns paging on without page tables and without an interrupt table.
    ///
    ///     cli; lidt 0x9100 (which holds zeroes); mov $0xa000,%eax; mov %eax,%cr3
    ///     mov $0x80000001,%eax; mov %eax,%cr0; 1: jmp 1b
    static let tripleFault = bytes("fa0f011e009166b800a000000f22d866b8010000800f22c0ebfe")

    /// Reads sector 1 by cylinder, head and sector to 0x8000, sector 2 by its number to 0x8200, prints the text in both and leaves
    /// with status 0x2b, or 0xff when the BIOS reports an error.
    ///
    ///     mov $0x0201,%ax; mov $2,%cx; xor %dh,%dh; mov $0x8000,%bx; int $0x13; jc fail
    ///     mov $packet,%si; mov $0x42,%ah; int $0x13; jc fail
    ///     mov $0x8000,%si; call print; mov $0x8200,%si; call print
    ///     mov $0x15,%al; out %al,$0xf4; 1: hlt; jmp 1b; fail: mov $0x7f,%al; out %al,$0xf4; jmp 1b
    ///     print: mov $0x3f8,%dx; 2: lodsb; test %al,%al; jz 3f; out %al,%dx; jmp 2b; 3: mov $0x80,%dl; ret
    ///     packet: .byte 16,0; .word 1,0x8200,0; .quad 2
    static func loader(sector1: String, sector2: String) -> [UInt8] {
        let code = bytes(
            "b80102b9020030f6bb0080cd13721cbe3f7cb442cd137213be0080e81300be0082e80d00b015e6f4f4ebfdb07fe6f4eb"
                + "f7baf803ac84c07403eeebf8b280c310000100008200000200000000000000")
        return [code, Array(sector1.utf8), Array(sector2.utf8)].flatMap { part in
            part + [UInt8](repeating: 0, count: 512 - part.count)
        }
    }

    /// `mov $0x3f8,%dx; 1: mov $0xfd,%dl; in %dx,%al; test $1,%al; jz 1b; mov $0xf8,%dl; in %dx,%al; out %al,%dx; jmp 1b`
    static let echo = bytes("baf803b2fdeca80174f9b2f8eceeebf3")
    /// Leaves at once: `out %al,$0xf4; 1: jmp 1b`
    static let leave = bytes("e6f4ebfe")
    /// `1: incl 0x9000; jmp 1b`
    static let count = bytes("66ff060090ebf9")
    /// `mov $0x3f8,%dx; mov $'a',%al; 1: out %al,%dx; incl 0x9000; jmp 1b`
    static let flood = bytes("baf803b061ee66ff060090ebf8")

    /// Sleeps by HLT and counts timer interrupts, 1 kHz, at 0x9000.
    ///
    ///     cli; movw $tick,0x80; movw $0,0x82
    ///     outb $0x11,$0x20; outb $0x20,$0x21; outb $4,$0x21; outb $1,$0x21; outb $0xfe,$0x21
    ///     outb $0x34,$0x43; outb $0xa9,$0x40; outb $0x04,$0x40; sti; 1: hlt; jmp 1b
    ///     tick: incl 0x9000; mov $0x20,%al; out %al,$0x20; iret
    static let ticks = bytes(
        "fac7068000317cc70682000000b011e620b020e621b004e621b001e621b0fee621b034e643b0a9e640b004e640fbf4ebfd66ff060090b020e620cf"
    )

    private static func bytes(_ digits: String) -> [UInt8] {
        stride(from: 0, to: digits.utf8.count, by: 2).map { at in
            UInt8(digits.dropFirst(at).prefix(2), radix: 16)!
        }
    }
}
