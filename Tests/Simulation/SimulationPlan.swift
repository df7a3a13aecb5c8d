import Migration
import MigrationStream
import TestSupport

extension SeededRandom {
    /// True with that probability.
    mutating func chance(_ probability: Double) -> Bool { Double.random(in: 0..<1, using: &self) < probability }

    /// A duration between both bounds, each order of magnitude as likely as the next.
    mutating func duration(_ low: UInt64, _ high: UInt64) -> UInt64 {
        let octaves = 64 - (high / low).leadingZeroBitCount
        let bound = low << UInt64.random(in: 0...UInt64(octaves), using: &self)
        return UInt64.random(in: low...min(max(bound, low), high), using: &self)
    }
}

let microsecond: UInt64 = 1_000
let millisecond: UInt64 = 1_000_000
let second: UInt64 = 1_000_000_000

/// A bug planted into a shell, which the simulation must find.
enum PlantedBug: String, CaseIterable, Sendable {
    /// The destination starts the guest when it begins to load state.
    case startsBeforeStateIsComplete
    /// The source resumes the guest when the connection ends behind COMMIT.
    case resumesAfterAcknowledgement
    /// The final round is reported as sent, and was not.
    case losesFinalRound
    /// A page's dirty mark is cleared after the page was read instead of before.
    case clearsDirtyMarkLate
    /// The source forgets the timers it was told to set.
    case losesTimers
    /// The destination's clock does not go on: a word to start that comes too late is not noticed.
    case stopsTheClock
    /// The destination's vCPU takes its time, and does not look at the clock before it enters the guest.
    case startsLate
    /// The destination loads device state once; what comes after a retraction is not loaded.
    case keepsOldState
    /// What was on its way when the connection was lost is taken for delivered.
    case forgetsWhatWasLost
    /// A page that is to come is not named in DISCARD.
    case forgetsToDiscard
    /// What the guest writes between the first DISCARD and its stop is not named in another.
    case keepsToFirstDiscards
    /// A page that was asked for is sent again with the rest.
    case answersAgain
    /// Now and then a request comes to nothing.
    case losesRequests
    /// Pages that were sent in a move which is taken back are not sent again.
    case losesTakenPages
    /// A destination whose move was taken back goes on expecting what was discarded then.
    case keepsExpectations
    /// What the destination says it has is not looked at: all is sent again.
    case sendsAllAgain
    /// Pages that were sent over the lost connection are taken for delivered.
    case takesSentForDelivered
    /// The destination says what it has before the readers of the lost connection have placed what they claimed.
    case tellsBitmapEarly
    /// What a reader of the lost connection claimed is said to be there, and never placed.
    case dropsClaimed
    /// Who waits for a page is woken when the connection is lost.
    case wakesOnLoss
    /// A recovery that fails has the source resume its guest.
    case resumesAfterFailedRecovery

    /// What the guest says is heard before the source has it (`x-postcopy-safety-net`).
    case isHeardAtOnce
    /// Pages of an epoch count before it is whole.
    case keepsTornEpochs
    /// A destination that has all memory does not wait until it is released.
    case freesItself
    /// An epoch that was on its way when the connection was lost is taken for kept.
    case takesLostEpochsForKept
    /// What is written while an epoch is on its way is in none.
    case forgetsWhatIsWrittenMeanwhile

    var isOfRecovery: Bool {
        switch self {
        case .sendsAllAgain, .takesSentForDelivered, .tellsBitmapEarly, .dropsClaimed, .wakesOnLoss,
            .resumesAfterFailedRecovery:
            true
        default: false
        }
    }

    static var ofPrecopy: [PlantedBug] { allCases.filter { !$0.isOfPostcopy && !ofNet.contains($0) } }

    var isOfPostcopy: Bool {
        switch self {
        case .forgetsToDiscard, .keepsToFirstDiscards, .answersAgain, .losesRequests, .losesTakenPages,
            .keepsExpectations:
            true
        default: isOfRecovery
        }
    }

    /// By which words of a violation it may be found.
    var symptoms: [String] {
        switch self {
        case .startsBeforeStateIsComplete: ["device state differs", "both sides have the right"]
        case .resumesAfterAcknowledgement: ["without the right", "both sides run"]
        case .losesFinalRound, .clearsDirtyMarkLate: ["pages differ at the switch"]
        case .losesTimers: ["waits for ever", "nothing disturbed the migration"]
        case .stopsTheClock, .startsLate: ["are allowed"]
        case .forgetsWhatWasLost: ["pages differ at the switch"]
        case .keepsOldState: ["device state differs"]
        case .forgetsToDiscard, .keepsToFirstDiscards: ["pages differ"]
        case .answersAgain: ["came twice"]
        case .losesRequests: ["waits for ever", "yet it", "still busy", "never whole"]
        case .losesTakenPages: ["differ", "the guest reads"]
        case .keepsExpectations: ["came twice", "differ", "the guest reads"]
        case .sendsAllAgain, .tellsBitmapEarly: ["came twice"]
        case .takesSentForDelivered, .dropsClaimed: ["still busy", "waits for ever", "never whole"]
        case .wakesOnLoss: ["the guest reads"]
        case .isHeardAtOnce, .freesItself: ["is heard"]
        case .keepsTornEpochs, .forgetsWhatIsWrittenMeanwhile: ["pages differ from"]
        case .takesLostEpochsForKept: ["is heard", "comes behind"]
        case .resumesAfterFailedRecovery: ["both sides run", "without the right"]
        }
    }
}

/// Everything that is decided about a run before it begins.
struct SimulationPlan: Sendable {
    enum Side: String, Sendable { case source, destination }

    enum Trigger: Sendable {
        /// At that step of the run.
        case step(Int)
        /// So many steps after the source entered that phase.
        case phase(SourcePhase, plus: Int)
    }

    enum Fault: Sendable {
        /// The connection ends after that many bytes towards that side.
        case cut(towards: Side, afterBytes: Int)
        /// The connection ends that many bytes after the source began to write device state.
        case cutTail(afterBytes: Int)
        /// The connection ends then.
        case cutAt(Trigger)
        /// The source's end is reset then; what it had sent arrives late, and so does the end at the destination.
        case halfCut(Trigger, heldFor: UInt64)
        /// From then on nothing passes any more, and nobody is told; new connections work again later.
        case silence(Trigger, healsAfter: UInt64)
        /// For a while nothing reaches that side.
        case stall(Trigger, towards: Side, for: UInt64)
        case death(of: Side, Trigger)
        /// The destination dies, and another process takes its address.
        case restart(Trigger, after: UInt64)
        /// That local operation of that side fails, or never answers.
        case localFailure(Side, nth: Int, hangs: Bool)
        /// Connecting fails.
        case refusal
        /// Strangers connect to the destination and say nonsense.
        case strangers(Int)
    }

    var rule = HandoverRule.twoPhase
    var faults: [Fault] = []
    var pages = 64
    var blocks = 1
    var latency: ClosedRange<UInt64> = (10 * microsecond)...(100 * microsecond)
    var bytesPerSecond: UInt64 = 200_000_000
    /// Nanoseconds between two writes of the guest.
    var writeInterval: UInt64 = 100 * microsecond
    var guestRuns = true
    /// A lost connection pauses the migration, and the operator resumes it.
    var isResumable = false
    /// Later connections are cut after so many bytes towards that side, too.
    var furtherCuts: [(side: Side, bytes: Int)] = []
    /// The connection of these steps is cut.
    var cutSteps: Set<Int> = []
    /// How likely an operator resumes to a wrong address, cancels, gives up the destination; and a stranger comes meanwhile.
    var mistakes = 0.0
    var pauses = false
    /// The guest may move before its memory.
    var postcopy: PostcopyPlan?
    /// The operator's cancel comes then, if at all.
    var cancelsAfter: UInt64?
    var proceedsAfter: UInt64 = 20 * millisecond
    var downtimeLimit: UInt64 = 300 * millisecond
    /// A limit that cannot be kept is raised to ``generousLimit`` then.
    var raisesLimitAfter: UInt64?
    /// Everything the simulated hosts and network may need, twice.
    var generousLimit: UInt64 { 2 * (40 * millisecond + 8 * latency.upperBound) }

    /// The plan that belongs to a seed.
    static func random(using generator: inout SeededRandom) -> SimulationPlan {
        var plan = SimulationPlan()
        let kind = Int.random(in: 0..<10, using: &generator)
        plan.rule = kind == 0 ? .qemu : kind == 1 ? .oneWay : .twoPhase
        plan.pages = Int.random(in: 64...256, using: &generator)
        plan.blocks = Int.random(in: 1...3, using: &generator)
        let latency = generator.duration(5 * microsecond, 20 * millisecond)
        plan.latency = latency...(latency * 2)
        plan.bytesPerSecond = UInt64.random(in: 20_000_000...2_000_000_000, using: &generator)
        plan.writeInterval = generator.duration(5 * microsecond, 5 * millisecond)
        plan.guestRuns = generator.chance(0.9)
        plan.downtimeLimit = generator.duration(1 * millisecond, 500 * millisecond)
        if plan.downtimeLimit < plan.generousLimit {
            if generator.chance(0.6) {
                plan.downtimeLimit = plan.generousLimit
            } else {
                plan.raisesLimitAfter = generator.duration(100 * millisecond, 5 * second)
            }
        }
        plan.pauses = generator.chance(0.2)
        plan.proceedsAfter = generator.duration(1 * millisecond, 100 * second)
        if generator.chance(0.25) { plan.cancelsAfter = generator.duration(10 * microsecond, 2 * second) }
        if generator.chance(0.4) {
            for _ in 0..<Int.random(in: 1...6, using: &generator) { plan.faults.append(stall(using: &generator)) }
        }
        if generator.chance(0.85) { plan.faults.append(fault(plan, using: &generator)) }
        if generator.chance(0.25) { plan.faults.append(fault(plan, using: &generator)) }
        if plan.rule == .twoPhase, generator.chance(0.7) {
            plan.isResumable = true
            plan.interruptOften(using: &generator)
        }
        return plan
    }

    /// Cuts at any step, while the migration is taken up again, and people who make mistakes.
    private mutating func interruptOften(using generator: inout SeededRandom) {
        if generator.chance(0.6) {
            furtherCuts = (0..<Int.random(in: 1...6, using: &generator)).map { _ in
                switch Int.random(in: 0..<4, using: &generator) {
                // Inside the words that take the migration up.
                case 0: (.destination, Int.random(in: 0...90, using: &generator))
                case 1: (.source, Int.random(in: 0...60, using: &generator))
                default: (.destination, Int.random(in: 0...(pages * 4000), using: &generator))
                }
            }
        }
        if generator.chance(0.4) {
            for _ in 0..<Int.random(in: 1...4, using: &generator) {
                cutSteps.insert(Int.random(in: 0...Int.random(in: 50...1500, using: &generator), using: &generator))
            }
        }
        if generator.chance(0.5) { mistakes = Double.random(in: 0.02...0.3, using: &generator) }
        if generator.chance(0.08) {
            faults.append(
                .restart(Self.trigger(using: &generator), after: generator.duration(millisecond, 20 * second)))
        }
    }

    /// Around the switchover, where it breaks the limit.
    private static func stall(using generator: inout SeededRandom) -> Fault {
        let phases: [SourcePhase] = [
            .finalSending, .savingState, .preparing, .preparing, .committed, .retracting, .breakingOff, .collecting,
        ]
        let phase = phases.randomElement(using: &generator) ?? .preparing
        let trigger =
            generator.chance(0.3)
            ? Trigger.step(.random(in: 0...300, using: &generator))
            : .phase(phase, plus: .random(in: 0...4, using: &generator))
        return .stall(
            trigger, towards: Bool.random(using: &generator) ? .source : .destination,
            for: generator.duration(1 * millisecond, 1500 * millisecond))
    }

    private static func fault(_ plan: SimulationPlan, using generator: inout SeededRandom) -> Fault {
        let side: Side = Bool.random(using: &generator) ? .source : .destination
        switch Int.random(in: 0..<20, using: &generator) {
        case 0..<2:
            return .cut(towards: .destination, afterBytes: .random(in: 0...(plan.pages * 5000), using: &generator))
        case 2..<5: return .cut(towards: .source, afterBytes: .random(in: 0...110, using: &generator))
        case 5..<8: return .cutTail(afterBytes: .random(in: 0...700, using: &generator))
        case 8..<10:
            return .silence(
                trigger(using: &generator), healsAfter: generator.duration(1 * second, 200 * second))
        case 10..<13: return .death(of: side, trigger(using: &generator))
        case 13: return .localFailure(side, nth: .random(in: 0...6, using: &generator), hangs: generator.chance(0.4))
        case 14..<16: return .cutAt(trigger(using: &generator))
        case 16..<18:
            let early = Trigger.phase(.committed, plus: .random(in: 0...2, using: &generator))
            return .halfCut(
                generator.chance(0.7) ? early : trigger(using: &generator),
                heldFor: generator.duration(10 * millisecond, 25 * second))
        case 18: return .strangers(.random(in: 1...10, using: &generator))
        default: return .refusal
        }
    }

    /// Half of the blows fall around the handover, where they matter most.
    private static func trigger(using generator: inout SeededRandom) -> Trigger {
        if Bool.random(using: &generator) { return .step(.random(in: 0...150, using: &generator)) }
        let phases: [SourcePhase] = [
            .greeting, .sendingRound, .stoppingGuest, .savingState, .preparing, .preparing, .committed, .committed,
            .acknowledged, .asking, .retracting, .breakingOff, .resting,
        ]
        let phase = phases.randomElement(using: &generator) ?? .committed
        return .phase(phase, plus: .random(in: 0...8, using: &generator))
    }

    /// Nothing goes wrong and nobody interferes: the migration must complete.
    var isUndisturbed: Bool {
        cancelsAfter == nil && cutSteps.isEmpty && postcopy?.isUndisturbed ?? true
            && faults.allSatisfy { if case .stall = $0 { true } else { false } }
    }
}
