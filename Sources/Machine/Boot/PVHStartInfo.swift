import Devices

/// What a PVH kernel is told: `hvm_start_info` version 1, the memory map, and the command line.
///
/// Fixed places in low memory: the structure at 0x1000, the memory map at 0x1080, the command line at 0x2000 to
/// 0x2fff. Source: Xen, `xen/include/public/arch-x86/hvm/start_info.h`.
struct PVHStartInfo: Equatable {
    /// The memory that the parts lie in; kernels must not be linked here.
    static let range: Range<UInt64> = 0x1000..<0x3000
    static let address: UInt64 = 0x1000
    static let memoryMapAddress: UInt64 = 0x1080
    static let commandLineAddress: UInt64 = 0x2000
    /// The longest command line in bytes, without the zero that ends it.
    static let maximumCommandLineBytes = 4095

    private static let magic: UInt32 = 0x336e_c578
    private static let version: UInt32 = 1

    let segments: [BootPlan.Segment]

    init(memoryMap: [E820Entry], commandLine: String) throws(KernelFault) {
        let text = Array(commandLine.utf8)
        guard text.count <= Self.maximumCommandLineBytes else {
            throw .commandLineTooLong(bytes: text.count, limit: Self.maximumCommandLineBytes)
        }
        var structure = LittleEndianBytes()
        structure.append(Self.magic)
        structure.append(Self.version)
        structure.append(UInt32(0))  // flags
        structure.append(UInt32(0))  // number of modules
        structure.append(UInt64(0))  // module list
        structure.append(Self.commandLineAddress)
        structure.append(UInt64(0))  // RSDP: there are no ACPI tables
        structure.append(Self.memoryMapAddress)
        structure.append(UInt32(memoryMap.count))
        structure.append(UInt32(0))  // reserved

        var map = LittleEndianBytes()
        for entry in memoryMap {
            map.append(entry.base)
            map.append(entry.length)
            map.append(entry.kind.rawValue)
            map.append(UInt32(0))  // reserved
        }
        segments = [
            .init(address: Self.address, bytes: structure.bytes[...]),
            .init(address: Self.memoryMapAddress, bytes: map.bytes[...]),
            .init(address: Self.commandLineAddress, bytes: text[...], byteCount: UInt64(text.count + 1)),
        ]
    }
}

private struct LittleEndianBytes {
    private(set) var bytes: [UInt8] = []

    mutating func append<Value: FixedWidthInteger>(_ value: Value) {
        for shift in stride(from: 0, to: Value.bitWidth, by: 8) {
            bytes.append(UInt8(truncatingIfNeeded: value >> Value(shift)))
        }
    }
}
