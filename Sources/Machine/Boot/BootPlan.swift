/// What a way of booting asks of the machine: bytes in memory, and where the first vCPU starts.
///
/// Pure values, made by `BootSector`, `PVHKernel` and the built-in guests. The machine carries a plan out at power-on
/// and again at every reset, and a destination of a migration does not carry it out at all.
public struct BootPlan: Equatable, Sendable {
    /// A range of guest memory and what it holds when the guest starts.
    public struct Segment: Equatable, Sendable {
        /// Guest physical address of the first byte.
        public let address: UInt64
        /// The first bytes. They share the storage of the file they come from.
        public let bytes: ArraySlice<UInt8>
        /// The length in bytes, at least `bytes.count`. What follows `bytes` is zero: nothing to write in fresh memory,
        /// so that it stays a hole there.
        public let byteCount: UInt64

        /// `bytes` at `address`, and zeros after them up to `byteCount` bytes.
        public init(address: UInt64, bytes: ArraySlice<UInt8>, byteCount: UInt64? = nil) {
            self.address = address
            self.bytes = bytes
            self.byteCount = max(byteCount ?? 0, UInt64(bytes.count))
        }
    }

    /// Segments in ascending order of addresses, within the guest's RAM and without overlap.
    public let segments: [Segment]
    /// How the first vCPU starts; the others wait for INIT and SIPI.
    public let cpu: InitialCPUState
    /// The image behind BIOS drive 80h, at most 480 KiB; empty for none.
    public let bootDiskImage: [UInt8]

    /// A plan from its parts.
    public init(segments: [Segment], cpu: InitialCPUState, bootDiskImage: [UInt8] = []) {
        self.segments = segments.sorted { $0.address < $1.address }
        self.cpu = cpu
        self.bootDiskImage = bootDiskImage
    }
}

/// The state in which the first vCPU starts; registers that are not named are zero, and interrupts are off.
public enum InitialCPUState: Equatable, Sendable {
    /// 16-bit real mode. DS, ES and SS are zero: their base is 0 and their limit 64 KiB.
    ///
    /// - `cs`, `ip`: where it starts
    /// - `sp`: the top of a stack in segment 0
    /// - `dl`: the BIOS number of the boot drive
    case real16(cs: UInt16, ip: UInt16, sp: UInt16, dl: UInt8)

    /// 32-bit protected mode as PVH defines it: paging off, all segments flat (base 0, limit 4 GiB), no descriptor
    /// tables. Source: Xen, `docs/misc/pvh.pandoc`.
    ///
    /// - `entry`: where it starts
    /// - `ebx`: the physical address of the start info, 0 for none
    case protected32(entry: UInt32, ebx: UInt32)
}
