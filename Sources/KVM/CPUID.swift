import Accelerator
import CLinux
import Glibc

/// The processor features a guest sees: the entries of `struct kvm_cpuid2`.
struct CPUID: Equatable {
    struct Entry: Equatable {
        var function: UInt32
        var index: UInt32
        var flags: UInt32
        var eax: UInt32
        var ebx: UInt32
        var ecx: UInt32
        var edx: UInt32
    }

    var entries: [Entry]
    static let maximumEntries = 256
    /// Words of the table: a header of two, then ten for each entry.
    private static let tableWords = 2 + maximumEntries * 10

    init(entries: [Entry]) { self.entries = entries }

    /// Reads a table which `call` fills.
    init(_ call: (UnsafeMutableRawPointer) -> CInt) throws(AcceleratorError) {
        var table = [UInt32](repeating: 0, count: Self.tableWords)
        table[0] = UInt32(Self.maximumEntries)
        try kvm(unsafe table.withUnsafeMutableBytes { unsafe call($0.baseAddress!) }, "KVM_GET_SUPPORTED_CPUID")
        entries = (0..<min(Int(table[0]), Self.maximumEntries)).map { number in
            let word = 2 + number * 10
            return Entry(
                function: table[word], index: table[word + 1], flags: table[word + 2], eax: table[word + 3],
                ebx: table[word + 4], ecx: table[word + 5], edx: table[word + 6])
        }
    }

    /// The table as the kernel takes it.
    var table: [UInt32] {
        var table: [UInt32] = [UInt32(entries.count), 0]
        for entry in entries {
            table += [entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx, 0, 0, 0]
        }
        return table
    }

    /// What CPU `number` of `count` sees: its own APIC id, a topology of single-threaded cores in one package.
    func forCPU(_ number: Int, of count: Int) -> CPUID {
        var result = self
        let id = UInt32(number)
        let idBits = UInt32(count <= 1 ? 0 : Int.bitWidth - (count - 1).leadingZeroBitCount)
        for position in result.entries.indices {
            switch result.entries[position].function {
            case 1:
                result.entries[position].ebx &= 0x0000_ffff
                result.entries[position].ebx |= id << 24 | UInt32(min(count, 255)) << 16
                result.entries[position].ecx |= 1 << 31 | 1 << 24  // hypervisor, TSC deadline timer
                if count > 1 { result.entries[position].edx |= 1 << 28 }
            case 4 where result.entries[position].eax & 0x1f != 0:
                result.entries[position].eax &= 0x3fff
                result.entries[position].eax |= UInt32(count - 1) << 26
            case 0xb, 0x1f:
                result.entries[position].edx = id
                switch result.entries[position].index {
                case 0: (result.entries[position].eax, result.entries[position].ebx) = (0, 1)
                case 1: (result.entries[position].eax, result.entries[position].ebx) = (idBits, UInt32(count))
                default: (result.entries[position].eax, result.entries[position].ebx) = (0, 0)
                }
                let level = result.entries[position].index
                result.entries[position].ecx = level | (level == 0 ? 0x100 : level == 1 ? 0x200 : 0)
            case 0x8000_0008:
                result.entries[position].ecx &= ~0xf0ff
                result.entries[position].ecx |= idBits << 12 | UInt32(count - 1)
            case 0x8000_001e:
                result.entries[position].eax = id
                result.entries[position].ebx = id
                result.entries[position].ecx = 0
            default: break
            }
        }
        return result
    }

    /// The first feature of `wanted` that this host does not have, as words; `nil` if it has all.
    func firstMissing(from wanted: CPUID) -> String? {
        for entry in wanted.entries {
            guard let mask = Self.featureRegisters(entry) else { continue }
            let own = entries.first { $0.function == entry.function && $0.index == entry.index }
            let pairs = [
                ("eax", entry.eax, own?.eax ?? 0), ("ebx", entry.ebx, own?.ebx ?? 0), ("ecx", entry.ecx, own?.ecx ?? 0),
                ("edx", entry.edx, own?.edx ?? 0),
            ]
            for (place, (name, needed, offered)) in pairs.enumerated() where mask[place] && needed & ~offered != 0 {
                let bits = String(needed & ~offered, radix: 16)
                return "leaf 0x\(String(entry.function, radix: 16)) \(name) bits 0x\(bits)"
            }
        }
        return nil
    }

    /// Which registers of a leaf are sets of features: (eax, ebx, ecx, edx).
    private static func featureRegisters(_ entry: Entry) -> [Bool]? {
        switch (entry.function, entry.index) {
        case (1, _): [false, false, true, true]
        case (7, 0): [false, true, true, true]
        case (0xd, 0): [true, false, false, true]
        case (0x8000_0001, _): [false, false, true, true]
        default: nil
        }
    }
}
