import Migration
import MigrationStream
import TestSupport

/// What a run violated.
struct Violation: Error, CustomStringConvertible {
    let sentence: String
    var description: String { sentence }
}

/// How a run ended, for counting what the seeds reach.
enum RunEnding: String, CaseIterable, Hashable {
    case completed, cancelled, failed, settledThere, settledHere, stillUnsettled, sourceDied, pausedInPostcopy
}

/// Two cores and what stands around them on virtual time: network, shells, guests, operator, faults. One seed, one run.
final class Simulator {
    let plan: SimulationPlan
    let bug: PlantedBug?
    let map: SimulatedMemoryMap
    var generator: SeededRandom
    var now: UInt64 = 0
    var steps = 0
    var violation: Violation?
    private(set) var traceLines: [String] = []
    let isTracing: Bool

    private var queue = EventQueue()

    // The source's process.
    var source: SourceCore
    var sourceIsAlive = true
    var sourceGuest: SimulatedGuest
    var sourceOwnsGuest = true
    var sourceConnection: SimulatedConnection?
    var sourceMessages = ReturnPathDecoder()
    var sourceInput = ReceiveBuffer()
    var sourceTimers: [ProtocolTimer.Kind: UInt64] = [:]
    var records: RAMRecordEncoder
    var pending: [Bool]
    var round: SimulatedRound?
    var stopIsUnderWay = false
    var guestRanBeforeStop = false
    var sourceOutcomes: [SourceOutcome] = []
    var doubts = 0
    var lastReport = MigrationStatus.none
    /// When the present standstill began for the contract.
    var standsStillSince: UInt64?
    var brokenSwitchovers = 0
    /// Pages sent since the mark before, and behind each mark that was not acknowledged.
    var stretch: [Int] = []
    var unacknowledged: [(mark: ResumptionMark, pages: [Int])] = []
    var nextMark = ResumptionMark(number: 0)
    var batchWaits = false
    /// Counts attempts to connect.
    var attempts = 0
    var resumptions = 0
    var pauses = 0

    // The destination's process.
    var destination: DestinationCore
    var destinationIsAlive = true
    /// How often its process was replaced: what the one before still does does not count.
    var destinationEpoch: UInt64 = 0
    var destinationGuest: SimulatedGuest
    var destinationOwnsGuest = false
    var destinationStarts = 0
    var startOrderedAt: UInt64 = 0
    var loads = 0
    var readers: [ConnectionID: SimulatedReader] = [:]
    /// For a QEMU's next connection, which begins without a header.
    var recoveryDecoder: StreamDecoder?
    var destinationTimers: [ProtocolTimer.Kind: UInt64] = [:]
    var destinationOutcomes: [DestinationOutcome] = []

    // Postcopy.
    var move: SimulatedMove
    var pull: SimulatedPull
    /// What a package held that has come whole.
    var packaged: [ConnectionID: [StreamItem]] = [:]
    /// The source's memory when the guest stood still for its move.
    var truth: [UInt64] = []
    var movesTakenBack = 0
    /// How often DISCARD was said again, for what the guest wrote behind the first.
    var discardsAgain = 0
    /// With a safety net; and guests that went on at the source.
    var net = SimulatedNet()
    var takenBack = 0
    /// How often the operator took it up again.
    var recoveries = 0
    /// The source lost its destination in postcopy; the guest runs at the destination.
    var (hasPaused, hasArrived) = (false, false)

    // The network.
    var connections: [SimulatedConnection] = []
    var networkIsSilentUntil: UInt64 = 0
    /// At which step the source entered each phase first.
    var phaseSteps: [SourcePhase: Int] = [:]
    var localOperations: [SimulationPlan.Side: Int] = [:]

    static let stepLimit = 100_000
    static let timeLimit = 3600 * second
    static let machineName = "simulated"

    init(seed: UInt64, plan givenPlan: SimulationPlan? = nil, bug: PlantedBug? = nil, isTracing: Bool = false) {
        var generator = SeededRandom(seed: seed)
        let drawn = SimulationPlan.random(using: &generator)
        let plan = givenPlan ?? drawn
        self.plan = plan
        self.bug = bug
        self.isTracing = isTracing
        self.generator = generator
        map = SimulatedMemoryMap(pages: plan.pages, blocks: plan.blocks)
        sourceGuest = SimulatedGuest(pages: plan.pages, writeInterval: plan.writeInterval, seed: seed &+ 1)
        destinationGuest = SimulatedGuest(emptyPages: plan.pages)
        pending = [Bool](repeating: true, count: plan.pages)
        records = RAMRecordEncoder(blocks: map.blocks)
        move = SimulatedMove(records: RAMRecordEncoder(blocks: map.blocks))
        pull = SimulatedPull(pages: plan.pages, number: 0)
        var configuration =
            SourceConfiguration(
                migration: MigrationIdentifier(high: seed, low: 1), machineName: Self.machineName, blocks: map.blocks,
                catalogue: Self.catalogue, pausesBeforeSwitchover: plan.pauses,
                switchover: SwitchoverPolicy(downtimeLimitNanoseconds: plan.downtimeLimit))
        configuration.isResumable = plan.isResumable
        if let moves = plan.postcopy {
            configuration.features.insert(.postcopy)
            configuration.postcopy = PostcopyTerms(
                usesUrgentChannel: moves.channels > 0, urgentChannels: max(moves.channels, 1),
                pagesForgottenAhead: moves.pagesForgottenAhead, hasNet: moves.hasNet)
            if moves.hasNet { configuration.features.insert(.safetyNet) }
        }
        source = SourceCore(configuration)
        destination = Self.destination(plan, instance: MigrationIdentifier(high: seed, low: 2))
    }

    static func destination(_ plan: SimulationPlan, instance: InstanceIdentifier) -> DestinationCore {
        var waiting =
            DestinationConfiguration(
                instance: instance, machineName: machineName,
                sections: [ExpectedSection(name: "cpu"), ExpectedSection(name: "clock")],
                features: plan.rule == .twoPhase ? .all : [])
        waiting.deadlines.kept = 600 * second
        if plan.postcopy != nil {
            waiting.allowsPostcopy = true
            if plan.rule == .twoPhase { waiting.features.insert(.postcopy) }
            if plan.postcopy?.hasNet == true { waiting.features.insert(.safetyNet) }
        }
        return DestinationCore(waiting)
    }

    static var catalogue: SectionCatalogue {
        var catalogue = SectionCatalogue()
        catalogue.add("cpu", version: 3)
        catalogue.add("clock", version: 1, layout: .fixed(byteCount: 8))
        return catalogue
    }

    // MARK: Time

    func schedule(at time: UInt64, _ action: @escaping () -> Void) { queue.insert(max(time, now), action) }

    func schedule(after low: UInt64, _ high: UInt64, _ action: @escaping () -> Void) {
        let delay = generator.duration(low, high)
        schedule(at: now + delay, action)
    }

    func trace(_ line: @autoclosure () -> String) {
        guard isTracing else { return }
        let micros = now / 1000
        var text = line()
        for noise in Self.noise { text = text.replacing(noise, with: "") }
        traceLines.append("\(String(repeating: " ", count: max(0, 12 - "\(micros)".count)))\(micros) us  \(text)")
    }

    /// What Swift writes before names, which nobody wants to read.
    private static let noise = [
        "MigrationStream.", "Migration.", "Simulation.", "SimulationPlan.", "ProtocolTimer.Kind.", "StreamItem.",
        "ReturnPathMessage.", "ForwardCommand.", "MigrationStatus.", "(rawValue: 1)", "SourceOutcome.",
        "DestinationOutcome.", "HandoverRule.",
    ]

    func violate(_ sentence: String) {
        guard violation == nil else { return }
        trace("VIOLATION: \(sentence)")
        violation = Violation(sentence: sentence)
    }

    /// Runs to the end, which is when nothing is left to happen.
    func run() throws(Violation) -> RunEnding {
        trace("plan: \(plan)")
        if plan.guestRuns { sourceGuest.run(at: 0) }
        arrangeFaults()
        if let time = plan.cancelsAfter { schedule(at: time) { [self] in feedSource(.cancel) } }
        if let time = plan.raisesLimitAfter {
            schedule(at: time) { [self] in feedSource(.setDowntimeLimit(nanoseconds: plan.generousLimit)) }
        }
        if let moves = plan.postcopy {
            schedule(at: moves.startsAfter) { [self] in feedSource(.startPostcopy) }
        }
        schedule(at: 1 * microsecond) { [self] in feedSource(.start) }
        while violation == nil, let (time, action) = queue.removeFirst() {
            now = time
            steps += 1
            action()
            strikeFaults()
            checkInvariants()
            if now > Self.timeLimit, waitsPatiently { break }
            if steps > Self.stepLimit || now > Self.timeLimit {
                violate(
                    "still busy after \(steps) steps and \(now / second) s: source \(source.phase), "
                        + "destination \(destination.phase)")
            }
        }
        if violation == nil { checkEnd() }
        if let violation { throw violation }
        return ending
    }

    /// By QEMU's rule a destination waits for as long as its source's connection stands, and so does a silent channel's visitor.
    private var waitsPatiently: Bool {
        plan.rule == .qemu && destination.phase == .receiving && (!sourceIsAlive || source.phase == .finished)
    }

    /// What may fail or hang: the next local operation of that side answers, fails or says nothing.
    func perform(
        _ side: SimulationPlan.Side, _ low: UInt64, _ high: UInt64, answer: @escaping () -> Void,
        failure: @escaping () -> Void
    ) {
        let epoch = destinationEpoch
        func alive(_ action: @escaping () -> Void) -> () -> Void {
            { [self] in if side == .source || epoch == destinationEpoch { action() } }
        }
        let number = localOperations[side, default: 0]
        localOperations[side] = number + 1
        for case .localFailure(side, number, let hangs) in plan.faults {
            trace("\(side.rawValue): this operation \(hangs ? "hangs" : "fails")")
            if hangs { return }
            return schedule(after: low, high, alive(failure))
        }
        schedule(after: low, high, alive(answer))
    }
}

/// What is to happen, by time; at the same time in the order of insertion. A binary heap.
struct EventQueue {
    private struct Entry {
        let time: UInt64
        let number: UInt64
        let action: () -> Void

        func precedes(_ other: Entry) -> Bool { (time, number) < (other.time, other.number) }
    }

    private var heap: [Entry] = []
    private var inserted: UInt64 = 0

    mutating func insert(_ time: UInt64, _ action: @escaping () -> Void) {
        heap.append(Entry(time: time, number: inserted, action: action))
        inserted += 1
        var index = heap.count - 1
        while index > 0, heap[index].precedes(heap[(index - 1) / 2]) {
            heap.swapAt(index, (index - 1) / 2)
            index = (index - 1) / 2
        }
    }

    mutating func removeFirst() -> (UInt64, () -> Void)? {
        guard let first = heap.first else { return nil }
        heap.swapAt(0, heap.count - 1)
        heap.removeLast()
        var index = 0
        while true {
            var least = index
            for child in [2 * index + 1, 2 * index + 2] where child < heap.count {
                if heap[child].precedes(heap[least]) { least = child }
            }
            if least == index { break }
            heap.swapAt(index, least)
            index = least
        }
        return (first.time, first.action)
    }
}
