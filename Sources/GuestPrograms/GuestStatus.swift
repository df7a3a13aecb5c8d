/// What the guest says about itself: read from the memory of a guest, stopped or running.
public struct GuestStatus: Equatable, Sendable {
    /// The words of a vCPU's status block; `Guests/layout.inc` describes them.
    enum Word: Int {
        case magic, index, phase, filled, progress, touches, beats, beatTSC, gap, backwards, late, slowest
        case clock, deadline, nextBeat, bits, half, napTicks, slice, fault
        case gapEnd = 25
        case longGaps, gapLog
    }

    static let blockWords = Word.gapLog.rawValue + 2 * gapsKept
    /// Of each vCPU's long gaps.
    static let gapsKept = 16

    /// A time between two looks at the clock, in TSC ticks.
    public struct Gap: Equatable, Sendable {
        public let ticks: UInt64
        /// The TSC at the second look.
        public let end: UInt64
        /// The TSC at the first.
        public var start: UInt64 { end &- ticks }
    }

    /// How far a vCPU has come.
    public enum Phase: UInt64, Sendable {
        case notStarted = 0
        /// Waits until the number of vCPUs is settled.
        case waiting = 1
        case filling = 2
        /// Does what the guest is for.
        case running = 3
        /// Has nothing to do, and sleeps; the BSP still sends heartbeats.
        case parked = 4
        /// Stopped by an exception it cannot have.
        case faulted = 5
    }

    /// One vCPU's part.
    public struct CPU: Equatable, Sendable {
        public let phase: Phase
        /// Pages of its share of the fill that are complete.
        public let filledPages: UInt64
        /// Walks over its share of the working set that are complete.
        public let passes: UInt64
        /// Pages touched since the start, one in flight not counted.
        public let touches: UInt64
        /// Heartbeats sent; only the BSP sends them.
        public let heartbeats: UInt64
        /// Longest time between two looks at the clock, in TSC ticks.
        public let longestGapTicks: UInt64
        /// The TSC at the end of that; 0 before there was one.
        public let longestGapEnd: UInt64
        /// How many of a millisecond or more there were so far.
        public let longGaps: UInt64
        /// The last of them, at most 16, in order.
        public let latestLongGaps: [Gap]
        /// How often the TSC was lower than at the look before.
        public let tscBackwards: UInt64
        /// How often it fell so far behind its rate that it gave up making up for it.
        public let lateSlices: UInt64
        /// The longest access a `probe` timed, in TSC ticks.
        public let longestAccessTicks: UInt64
        /// The TSC at the last look at the clock.
        public let lastTSC: UInt64
        /// Pass and index in the pass, in one word.
        let progress: UInt64
    }

    public let kind: GuestProgram.Kind
    /// TSC ticks of a millisecond.
    public let tscKilohertz: UInt64
    /// vCPUs the guest was built for.
    public let cpusExpected: Int
    /// vCPUs that share the work; 0 until that is settled.
    public let cpusActive: Int
    /// Whether the guest has filled its memory and printed its line.
    public let isReady: Bool
    /// One entry for each vCPU expected.
    public let cpus: [CPU]

    public var touches: UInt64 { cpus.reduce(0) { $0 &+ $1.touches } }
    public var heartbeats: UInt64 { cpus.reduce(0) { $0 &+ $1.heartbeats } }
    public var filledPages: UInt64 { cpus.reduce(0) { $0 &+ $1.filledPages } }
    public var tscBackwards: UInt64 { cpus.reduce(0) { $0 &+ $1.tscBackwards } }
    public var longestGapTicks: UInt64 { cpus.map(\.longestGapTicks).max() ?? 0 }
    /// Where each vCPU keeps its longest gap, in guest-physical memory: eight bytes.
    public var gapAddresses: [UInt64] {
        cpus.indices.map { GuestLayout.cpuPageAddress($0) + UInt64(Word.gap.rawValue) * 8 }
    }

    /// Passes which every vCPU that has work has completed.
    public var passes: UInt64 { cpus.filter { $0.phase == .running }.map(\.passes).min() ?? 0 }

    /// Read the status from guest memory.
    ///
    /// - Throws: ``GuestProgramError/notAGuest(reason:)`` if the memory is not that of a built-in guest, and what `read` throws.
    public init(read: @escaping GuestMemoryReader) throws(GuestProgramError) {
        let memory = unsafe GuestMemoryView(read: read)
        self = try memory.status(of: memory.parameters())
    }

    init(parameters: ParameterBlock, active: UInt64, ready: UInt64, blocks: [[UInt64]]) throws(GuestProgramError) {
        guard let kind = GuestProgram.Kind(rawValue: parameters.kind), active <= parameters.cpus else {
            throw .notAGuest(reason: "\(active) of \(parameters.cpus) vCPUs share its work")
        }
        self.kind = kind
        tscKilohertz = parameters.millisecond
        cpusExpected = Int(parameters.cpus)
        cpusActive = Int(active)
        isReady = ready != 0
        var cpus: [CPU] = []
        for (index, block) in blocks.enumerated() {
            cpus.append(try CPU(index: index, block: block))
        }
        self.cpus = cpus
    }
}

extension GuestStatus.CPU {
    init(index: Int, block: [UInt64]) throws(GuestProgramError) {
        func word(_ word: GuestStatus.Word) -> UInt64 { block[word.rawValue] }
        guard word(.magic) == GuestLayout.statusMagic, word(.index) == UInt64(index) else {
            let address = String(GuestLayout.cpuPageAddress(index), radix: 16)
            throw .notAGuest(reason: "there is no status block of vCPU \(index) at 0x\(address)")
        }
        guard let phase = GuestStatus.Phase(rawValue: word(.phase)), word(.bits) < 64 else {
            throw .notAGuest(reason: "the status block of vCPU \(index) is damaged")
        }
        self.phase = phase
        filledPages = word(.filled)
        progress = word(.progress)
        passes = word(.progress) >> word(.bits)
        touches = word(.touches)
        heartbeats = word(.beats)
        longestGapTicks = word(.gap)
        longestGapEnd = word(.gapEnd)
        longGaps = word(.longGaps)
        let kept = UInt64(GuestStatus.gapsKept)
        latestLongGaps = (word(.longGaps) - min(word(.longGaps), kept)..<word(.longGaps)).map { number in
            let place = GuestStatus.Word.gapLog.rawValue + 2 * Int(number % kept)
            return GuestStatus.Gap(ticks: block[place], end: block[place + 1])
        }
        tscBackwards = word(.backwards)
        lateSlices = word(.late)
        longestAccessTicks = word(.slowest)
        lastTSC = word(.clock)
    }
}
