/// The parameters of a guest as words in its memory, at ``GuestLayout/parameters``. Pages are counted from RAM offset 0.
struct ParameterBlock: Equatable, Sendable {
    static let randomFlag: UInt64 = 1
    static let writeFlag: UInt64 = 2
    static let wordCount = 20

    var kind: UInt64 = 0
    var flags: UInt64 = 0
    /// vCPUs the BSP waits for.
    var cpus: UInt64 = 1
    var fillFirst: UInt64 = 0
    var fillPages: UInt64 = 0
    /// Non-zero words of a filled page.
    var words: UInt64 = 1
    var workFirst: UInt64 = 0
    /// Pages of the working set that are touched, `stride` pages apart.
    var positions: UInt64 = 0
    var stride: UInt64 = 1
    var seed: UInt64 = 0
    /// Touches between two looks at the clock.
    var batch: UInt64 = 64
    /// TSC ticks in which one vCPU alone would do a batch; 0: no limit.
    var slice: UInt64 = 0
    /// Ticks of delay that are made up for by working faster.
    var backlog: UInt64 = 0
    /// Ticks between heartbeats; 0: none.
    var beat: UInt64 = 0
    /// Ticks of a millisecond.
    var millisecond: UInt64 = 1
    /// Where the guest writes the number of vCPUs if some are missing.
    var digits: UInt64 = 0
    var memoryBytes: UInt64 = 0
    var lowMemoryBytes: UInt64 = 0
    /// End of what the guest uses, and of what its page tables map.
    var mappedPages: UInt64 = 0

    var isRandom: Bool { flags & Self.randomFlag != 0 }

    /// Whether touches leave a count in the pages.
    var writesPages: Bool {
        kind == GuestProgram.Kind.dirty.rawValue
            || (kind == GuestProgram.Kind.probe.rawValue && flags & Self.writeFlag != 0)
    }

    var fillRange: Range<UInt64> { fillFirst..<fillFirst + fillPages }

    /// A time in ticks, at least 1 unless it is zero.
    static func ticks(nanoseconds: UInt64, tscKilohertz: UInt64) -> UInt64 {
        if nanoseconds == 0 { return 0 }
        // At most an hour and 2^32 kHz: the product may need more than 64 bits.
        let (high, low) = nanoseconds.multipliedFullWidth(by: tscKilohertz)
        return max(1, (1_000_000 as UInt64).dividingFullWidth((high, low)).quotient)
    }

    /// Spread `rate` bytes of pages per second over batches: about 2 ms of work, but no more than 64 touches, because the guest
    /// looks at its clock, and sends heartbeats, only between batches.
    mutating func setPace(rate: UInt64?, tscKilohertz: UInt64) {
        batch = 64
        backlog = 16 * tscKilohertz
        guard let rate else { return }
        let pagesPerSecond = rate / GuestLayout.pageBytes / cpus
        batch = min(max(pagesPerSecond / 500, 1), 64)
        // At most 2^18 bytes times 2^42 Hz, in 64 bits.
        slice = max(1, batch * GuestLayout.pageBytes * (tscKilohertz * 1000) / rate)
    }
}

extension ParameterBlock {
    /// The block as it stands in memory.
    var bytes: [UInt8] {
        let values = [
            GuestLayout.parametersMagic, kind, flags, cpus, fillFirst, fillPages, words, workFirst, positions, stride,
            seed,
            batch, slice, backlog, beat, millisecond, digits, memoryBytes, lowMemoryBytes, mappedPages,
        ]
        var result = [UInt8](repeating: 0, count: values.count * 8)
        for (index, value) in values.enumerated() {
            result.place(value, at: index * 8)
        }
        return result
    }

    /// Read a block from guest memory, where anything may stand: what would lead a reader astray is refused.
    init(words values: [UInt64]) throws(GuestProgramError) {
        guard values.count == Self.wordCount, values[0] == GuestLayout.parametersMagic else {
            throw .notAGuest(reason: "there is no parameter block at 0x7e00")
        }
        (kind, flags, cpus, fillFirst, fillPages) = (values[1], values[2], values[3], values[4], values[5])
        (words, workFirst, positions, stride, seed) = (values[6], values[7], values[8], values[9], values[10])
        (batch, slice, backlog, beat, millisecond) = (values[11], values[12], values[13], values[14], values[15])
        (digits, memoryBytes, lowMemoryBytes, mappedPages) = (values[16], values[17], values[18], values[19])
        try validate()
    }

    /// The ranges that make all later arithmetic safe.
    private func validate() throws(GuestProgramError) {
        let map = try? MemoryMap(memoryBytes: memoryBytes, lowMemoryBytes: lowMemoryBytes, guest: "")
        let pages = map?.pages ?? 0
        func require(_ holds: Bool, _ what: String) throws(GuestProgramError) {
            if !holds { throw .notAGuest(reason: "its parameter block has an impossible \(what)") }
        }
        try require(map != nil, "memory size")
        try require(GuestProgram.Kind(rawValue: kind) != nil, "kind")
        try require((1...UInt64(GuestLayout.maximumCPUs)).contains(cpus), "number of vCPUs")
        try require((1...UInt64(GuestLayout.wordsPerPage)).contains(words), "number of words")
        try require(millisecond >= 1 && millisecond <= UInt32.max, "clock rate")
        try require(mappedPages <= pages, "end of used memory")
        try require(fillFirst <= mappedPages && fillPages <= mappedPages - fillFirst, "fill range")
        try require((1...1 << 32).contains(stride) && workFirst <= mappedPages, "working set")
        let room = mappedPages - workFirst
        try require(positions <= (room + stride - 1) / stride, "working set")
    }
}
