/// The real-mode registers of a guest that called the BIOS.
///
/// The instruction pointer is not among them, and services never change `esp`: give the vCPU back what it had.
public struct BIOSRegisters: Equatable, Sendable {
    public var eax: UInt32 = 0
    public var ebx: UInt32 = 0
    public var ecx: UInt32 = 0
    public var edx: UInt32 = 0
    public var esi: UInt32 = 0
    public var edi: UInt32 = 0
    public var esp: UInt32 = 0
    public var ds: UInt16 = 0
    public var es: UInt16 = 0
    public var ss: UInt16 = 0

    /// All zero.
    public init() {}

    /// The guest physical address of `segment:offset`.
    static func address(_ segment: UInt16, _ offset: UInt32) -> UInt64 {
        UInt64(segment) << 4 + UInt64(offset & 0xffff)
    }
}

// The 16-bit and 8-bit parts; setting one leaves the rest of the register as it was.
extension BIOSRegisters {
    public var ax: UInt16 {
        get { UInt16(truncatingIfNeeded: eax) }
        set { eax = eax & 0xffff_0000 | UInt32(newValue) }
    }
    public var bx: UInt16 {
        get { UInt16(truncatingIfNeeded: ebx) }
        set { ebx = ebx & 0xffff_0000 | UInt32(newValue) }
    }
    public var cx: UInt16 {
        get { UInt16(truncatingIfNeeded: ecx) }
        set { ecx = ecx & 0xffff_0000 | UInt32(newValue) }
    }
    public var dx: UInt16 {
        get { UInt16(truncatingIfNeeded: edx) }
        set { edx = edx & 0xffff_0000 | UInt32(newValue) }
    }
    public var ah: UInt8 {
        get { UInt8(ax >> 8) }
        set { ax = ax & 0x00ff | UInt16(newValue) << 8 }
    }
    public var al: UInt8 {
        get { UInt8(truncatingIfNeeded: ax) }
        set { ax = ax & 0xff00 | UInt16(newValue) }
    }
    public var bh: UInt8 {
        get { UInt8(bx >> 8) }
        set { bx = bx & 0x00ff | UInt16(newValue) << 8 }
    }
    public var ch: UInt8 {
        get { UInt8(cx >> 8) }
        set { cx = cx & 0x00ff | UInt16(newValue) << 8 }
    }
    public var cl: UInt8 {
        get { UInt8(truncatingIfNeeded: cx) }
        set { cx = cx & 0xff00 | UInt16(newValue) }
    }
    public var dh: UInt8 {
        get { UInt8(dx >> 8) }
        set { dx = dx & 0x00ff | UInt16(newValue) << 8 }
    }
    public var dl: UInt8 {
        get { UInt8(truncatingIfNeeded: dx) }
        set { dx = dx & 0xff00 | UInt16(newValue) }
    }
}

/// The guest's memory as BIOS services use it: guest physical addresses, whole ranges or nothing.
public protocol BIOSMemory {
    /// The `count` bytes at `address`, or nil when one of them is not RAM.
    func read(at address: UInt64, count: Int) -> [UInt8]?
    /// Writes `bytes` at `address`; false, and nothing is written, when one of them is not RAM.
    func write(_ bytes: ArraySlice<UInt8>, at address: UInt64) -> Bool
}
