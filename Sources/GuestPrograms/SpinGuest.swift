/// The guest `spin`, which notices when memory is not there: for benchmarks and tests of changes of the memory layout.
///
/// Its vCPUs read words, call functions, go through page tables and count in pages, all of them where the host changes what the guest
/// sees. Each place has up to four legal answers. `Guests/spin.s` is the other side of this contract.
public struct SpinGuest: Sendable {
    /// A place and what it may answer.
    public struct Place: Sendable, Equatable {
        public let address: UInt64
        /// 1 to 4.
        public let answers: [UInt64]

        public init(_ address: UInt64, answers: [UInt64]) {
            precondition((1...4).contains(answers.count), "one to four answers")
            self.address = address
            self.answers = answers
        }
    }

    public static let maximumCPUs = 32
    /// Where every vCPU starts, in 32-bit protected mode with its index in EBX.
    public static let entryAddress: UInt32 = 0x7C00
    /// Guest memory below belongs to the guest and must stay as it is.
    public static let ownBytes: UInt64 = 0xA0000

    /// vCPUs that spin outside the places, and only watch the clock.
    public var outside: Set<Int>
    public let cpuCount: Int
    public var reads: [Place] = []
    public var calls: [Place] = []
    public var walks: [Place] = []
    /// Pages in which the vCPUs count; they answer nothing.
    public var writes: [UInt64] = []
    /// Guest-physical addresses of page tables: number k maps what `walkAddress(k, …)` says.
    public var walkTables: [UInt64] = []

    /// - Parameter cpuCount: 1 to 32.
    public init(cpuCount: Int, outside: Set<Int>) {
        precondition((1...Self.maximumCPUs).contains(cpuCount), "1 to 32 vCPUs")
        self.cpuCount = cpuCount
        self.outside = outside
    }

    // MARK: What the places hold

    /// A function that returns `answer`.
    public static func function(returning answer: UInt32) -> [UInt8] {
        [0xB8] + (0..<4).map { UInt8(truncatingIfNeeded: answer >> ($0 * 8)) } + [0xC3]
    }

    /// Offset of this vCPU's counter in a page of `writes`.
    public static func counterOffset(cpu: Int) -> Int { 64 + cpu * 8 }

    /// The virtual address that entry `entry` of walk table `table` maps.
    public static func walkAddress(table: Int, entry: Int) -> UInt64 {
        walkBase + UInt64(table) << 21 + UInt64(entry) << 12
    }

    /// A page table all of whose entries map the guest-physical page at `address`; accessed and dirty are set.
    public static func walkTable(mapping address: UInt64) -> [UInt8] {
        let entry = address | 0x67
        return (0..<512).flatMap { _ in (0..<8).map { UInt8(truncatingIfNeeded: entry >> (UInt64($0) * 8)) } }
    }

    // MARK: Image

    private static let walkBase: UInt64 = 1 << 39
    private static let cpuPages: UInt64 = 0x10000
    private static let tables: UInt64 = 0x30000
    private static let places: UInt64 = 0x40000
    private static let parameters: UInt64 = 0x7E00

    /// What the host writes before the vCPUs start, as (guest-physical address, bytes).
    /// - Precondition: the places fit below `ownBytes`.
    public var segments: [(address: UInt64, bytes: [UInt8])] {
        var code = SpinCode.bytes
        var list: [UInt8] = []
        for (number, places) in [reads, calls, walks, writes.map { Place($0, answers: [0]) }].enumerated() {
            func parameter(_ index: Int) -> Int { Int(Self.parameters - UInt64(Self.entryAddress)) + 0x10 + index * 8 }
            code.place(Self.places + UInt64(list.count), at: parameter(number * 2))
            for place in places {
                let answers = (0..<4).map { place.answers[min($0, place.answers.count - 1)] }
                for word in [place.address] + answers {
                    list += (0..<8).map { UInt8(truncatingIfNeeded: word >> (UInt64($0) * 8)) }
                }
            }
            code.place(Self.places + UInt64(list.count), at: parameter(number * 2 + 1))
        }
        precondition(Self.places + UInt64(list.count) <= Self.ownBytes, "the places fit below the guest's limit")
        return [
            (UInt64(Self.entryAddress), code), (Self.cpuPages, (0..<cpuCount).flatMap(cpuPage)),
            (Self.tables, tablePages), (Self.places, list),
        ]
    }

    private func cpuPage(_ index: Int) -> [UInt8] {
        var page = [UInt8](repeating: 0, count: 4096)
        page.place(UInt64(index), at: 0x08)
        page.place(outside.contains(index) ? 1 : 0, at: 0x18)
        // The TSS at 0x200: the stack of ring 0, and no I/O bitmap.
        page.place(Self.cpuPages + UInt64(index) * 4096 + 0x800, at: 0x204)
        page.place(UInt64(0x68) << 48, at: 0x200 + 0x60)
        return page
    }

    /// The first 4 GiB where they are, in pages of 2 MiB, and the way to the walk tables.
    private var tablePages: [UInt8] {
        var pages = [UInt8](repeating: 0, count: 8 * 4096)
        func set(_ page: Int, _ entry: Int, _ value: UInt64) { pages.place(value, at: page * 4096 + entry * 8) }
        func pointer(_ page: Int) -> UInt64 { Self.tables + UInt64(page) * 4096 | 0x27 }
        set(0, 0, pointer(1))
        for directory in 0..<4 {
            set(1, directory, pointer(2 + directory))
            for entry in 0..<512 { set(2 + directory, entry, UInt64(directory) << 30 | UInt64(entry) << 21 | 0xE7) }
        }
        set(0, Int(Self.walkBase >> 39), pointer(6))
        set(6, 0, pointer(7))
        for (number, table) in walkTables.enumerated() { set(7, number, table | 0x27) }
        return pages
    }

    // MARK: While it runs

    /// The word by which the host has all vCPUs park (1) or go on (0).
    public static let stopAddress: UInt64 = parameters + 8

    /// Where the status of a vCPU is, and how many bytes of it.
    public static func statusAddress(cpu: Int) -> UInt64 { cpuPages + UInt64(cpu) * 4096 }
    public static let statusByteCount = 0x80
}

/// What one vCPU of ``SpinGuest`` says of itself.
public struct SpinStatus: Sendable, Equatable {
    public let isRunning: Bool
    public let isParked: Bool
    public let rounds: UInt64
    /// The longest time between two looks at the clock, in ticks of the time stamp counter.
    public let longestGapTicks: UInt64
    /// How often this vCPU has counted, in all pages together.
    public let writes: UInt64
    public let badReads: UInt64
    public let badCalls: UInt64
    public let badWalks: UInt64
    public let faults: UInt64
    /// The first failure in words; `nil` if there was none.
    public let firstFailure: String?

    public var failures: UInt64 { badReads + badCalls + badWalks + faults }

    /// - Precondition: `SpinGuest.statusByteCount` bytes from `SpinGuest.statusAddress` on.
    public init(_ bytes: [UInt8]) {
        func word(_ offset: Int) -> UInt64 {
            (0..<8).reversed().reduce(0) { $0 << 8 | UInt64(bytes[offset + $1]) }
        }
        func hexadecimal(_ offset: Int) -> String { "0x" + String(word(offset), radix: 16) }
        isRunning = word(0x10) == 1
        isParked = word(0x10) == 2
        rounds = word(0x20)
        longestGapTicks = word(0x30)
        writes = word(0x38)
        badReads = word(0x40)
        badCalls = word(0x48)
        badWalks = word(0x50)
        faults = word(0x58)
        switch word(0x60) {
        case 0: firstFailure = nil
        case let kind where kind < 16:
            let what = ["", "a read of", "a call of", "a walk to"][Int(min(kind, 3))]
            firstFailure = "\(what) \(hexadecimal(0x68)) gave \(hexadecimal(0x70))"
        case let vector:
            firstFailure =
                "exception \(vector - 16) at \(hexadecimal(0x78)), error code \(hexadecimal(0x70)), CR2 \(hexadecimal(0x68))"
        }
    }
}
