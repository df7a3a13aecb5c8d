import Migration
import MigrationStream
import TestSupport

/// What strikes a guest that has moved and not got its memory.
enum PostcopyBlow: Sendable {
    case cutMain
    case cutUrgent
    /// The source is told at once, the destination late.
    case resetSource(heldFor: UInt64)
    /// For a while nothing passes in that direction: towards the source it is the return path.
    case stall(towards: SimulationPlan.Side, for: UInt64)
    /// Nothing passes on the connections there are, and nobody is told.
    case silence
    /// `migrate-pause`.
    case pause(SimulationPlan.Side)
    case death(SimulationPlan.Side)
    case stranger
    /// An operator says what makes no sense just then.
    case nonsense

    static func random(using generator: inout SeededRandom) -> (SimulationPlan.Trigger, PostcopyBlow) {
        let blow: PostcopyBlow
        switch Int.random(in: 0..<36, using: &generator) {
        case 0..<10: blow = .cutMain
        case 10..<16: blow = .cutUrgent
        case 16..<19: blow = .resetSource(heldFor: generator.duration(millisecond, 60 * second))
        case 19..<22: blow = .silence
        case 22..<24: blow = .pause(.source)
        case 24..<26: blow = .pause(.destination)
        case 26..<28: blow = .stranger
        case 28..<31: blow = .nonsense
        case 31..<35:
            blow = .stall(
                towards: Bool.random(using: &generator) ? .source : .destination,
                for: generator.duration(millisecond, 100 * second))
        default: blow = .death(Bool.random(using: &generator) ? .source : .destination)
        }
        let phases: [SourcePhase] = [
            .committed, .pulled, .pulled, .pulled, .pulled, .pulledWhole, .postcopyPaused, .postcopyPaused,
            .recoverConnecting, .recoverGreeting, .recoverGreeting, .recoveringBitmaps, .recoveringBitmaps,
            .resumingPostcopy,
        ]
        let phase = phases.randomElement(using: &generator) ?? .pulled
        let most = phase == .pulled || phase == .postcopyPaused ? 400 : 12
        let steps = Int.random(in: 0...Int.random(in: 1...most, using: &generator), using: &generator)
        return (.phase(phase, plus: steps), blow)
    }
}

/// What a destination says it has.
struct SimulatedBitmaps {
    var received: [Bool] = []
    var block = 0
    var bytes: [UInt8] = []
}

// A postcopy that outlives its connection: the shells of both sides, and their operators.

extension Simulator {
    private static let recoveryLimit = 12

    func strikePostcopy() {
        guard let moves = plan.postcopy else { return }
        if moves.cutSteps.contains(steps) { strike(.cutUrgent) }
        for (trigger, blow) in moves.blows where strikes(trigger) { strike(blow) }
    }

    private func strike(_ blow: PostcopyBlow) {
        trace("blow: \(blow)")
        switch blow {
        case .cutMain: if let connection = sourceConnection { cut(connection) }
        case .cutUrgent:
            if let channel = urgentConnections.randomElement(using: &generator) { cut(channel) }
        case .resetSource(let heldFor):
            if let connection = sourceConnection { resetSource(connection, heldFor: heldFor) }
        case .stall(let side, let nanoseconds):
            if let connection = sourceConnection { stall(connection, towards: side, for: nanoseconds) }
            for channel in urgentConnections where generator.chance(0.5) {
                stall(channel, towards: side, for: nanoseconds)
            }
        case .silence:
            sourceConnection?.isSilent = true
            for channel in urgentConnections { channel.isSilent = true }
        case .pause(.source): feedSource(.breakOff)
        case .pause(.destination): feedDestination(.breakOff)
        case .death(.source): sourceDies()
        case .death(.destination): destinationDies()
        case .stranger: strangerConnects()
        case .nonsense: nonsense()
        }
    }

    /// In an order that is the same in every run.
    private var urgentConnections: [SimulatedConnection] {
        (move.urgent.values.map(\.connection) + [net.channel].compactMap { $0 })
            .sorted { $0.id.rawValue < $1.id.rawValue }
    }

    /// None of it may do harm.
    private func nonsense() {
        guard source.phase > .committed, destination.phase >= .pulling else { return }
        switch Int.random(in: 0..<9, using: &generator) {
        case 0: feedSource(.resume)
        case 1: feedSource(.cancel)
        case 2: feedSource(.startPostcopy)
        case 3: feedSource(.proceed)
        case 4: feedSource(.settle(.resumeHere))
        case 5: feedDestination(.awaitRecovery)
        case 6: feedDestination(.discard)
        case 7: feedDestination(.giveUp)
        default: feedSource(.start)
        }
    }

    // MARK: The source

    /// Whether whoever is needed for it lives.
    var canBecomeWhole: Bool {
        // By QEMU's rule a guest whose state cannot be loaded is lost, and a last SHUT 0 that is lost is not said again.
        let isUnfinished = plan.rule == .twoPhase || destination.phase < .started
        return plan.postcopy?.recovers == true && sourceIsAlive && destinationIsAlive && destinationEpoch == 0
            && isUnfinished && !net.isTakenBack
    }

    func pausedInPostcopy() {
        if bug == .resumesAfterFailedRecovery, recoveries > 0 { resumeGuest() }
        schedule(after: millisecond, 20 * second) { [self] in
            guard sourceIsAlive, let moves = plan.postcopy, moves.recovers, source.phase == .postcopyPaused else {
                return
            }
            if takesBack() { return }
            guard recoveries < Self.recoveryLimit || canBecomeWhole else { return }
            // `migrate-recover` there, which between two Godwits need not be said.
            if generator.chance(plan.rule == .qemu ? 0.8 : 0.3) { feedDestination(.awaitRecovery) }
            if generator.chance(moves.mistakes) { strangerConnects() }
            if now >= networkIsSilentUntil { recoveries += 1 }
            feedSource(.resume)
            if generator.chance(moves.mistakes) { feedSource(.resume) }
            if generator.chance(moves.mistakes) { nonsense() }
        }
    }

    /// Where the new connection leads. - Returns: false: not to the destination.
    func findsDestination() -> Bool {
        guard source.phase == .recoverConnecting, let moves = plan.postcopy, recoveries <= 8 else { return true }
        guard generator.chance(moves.mistakes) else { return true }
        if Bool.random(using: &generator) {
            connectToStranger()
        } else {
            feedSource(.connectFailed("connection refused"))
        }
        return false
    }

    func prepareRecoveryCut(of connection: SimulatedConnection) {
        guard let cuts = plan.postcopy?.furtherCuts, (1...max(cuts.count, 1)).contains(recoveries), !cuts.isEmpty
        else { return }
        let cut = cuts[recoveries - 1]
        if cut.side == .destination {
            connection.towardsDestination.bytesUntilCut = cut.bytes
        } else {
            connection.towardsSource.bytesUntilCut = cut.bytes
        }
    }

    func prepareRecovery() {
        move.number += 1
        (move.service, move.queue, move.isOpen, move.isWithdrawn) = (.nothing, [], false, false)
        move.bitmaps = SimulatedBitmaps(received: [Bool](repeating: false, count: plan.pages))
    }

    func adoptBitmaps() {
        move.isOpen = true
        if bug == .takesSentForDelivered { return }
        for page in move.wanted.indices {
            let isThere = bug == .sendsAllAgain ? false : move.bitmaps.received[page]
            move.wanted[page] = move.discarded[page] && !isThere
        }
    }

    /// - Returns: whether there is more to be read.
    func takeBitmap() -> Bool {
        let count = min(sourceMessages.payloadBytes, sourceInput.count)
        guard count > 0 else { return false }
        var piece = [UInt8](repeating: 0, count: count)
        let moved = unsafe piece.withUnsafeMutableBytes { unsafe sourceInput.move(to: $0) }
        sourceMessages.payloadConsumed(moved)
        move.bitmaps.bytes += piece
        guard sourceMessages.payloadBytes == 0 else { return true }
        let block = move.bitmaps.block
        for index in 0..<Int(map.blocks[block].length / 4096)
        where move.bitmaps.bytes[index / 8] >> (index % 8) & 1 != 0 {
            move.bitmaps.received[map.firstPages[block] + index] = true
        }
        return true
    }

    /// - Returns: whether the message announced a bitmap.
    func tookBitmapHead(_ message: ReturnPathMessage) -> Bool {
        guard case .postcopy(.receivedBitmap(let name, _)) = message else { return false }
        if source.phase != .recoveringBitmaps { violate("a bitmap comes that nobody asked for") }
        (move.bitmaps.block, move.bitmaps.bytes) = (map.blocks.firstIndex { $0.name == name } ?? 0, [])
        return true
    }

    // MARK: The destination

    /// A lost connection is closed. Its reader places what it has claimed.
    func dropAtDestination(_ id: ConnectionID) {
        guard let reader = readers.removeValue(forKey: id) else { return }
        netCloses(id)
        if let number = pull.channels.firstIndex(of: id) { pull.channels[number] = nil }
        if bug == .dropsClaimed { pull.number += 1 }
        if bug == .wakesOnLoss {
            let waiting = pull.waiting
            pull.waiting = []
            for waiter in waiting { schedule(after: microsecond, 50 * microsecond) { waiter.goOn() } }
        }
        close(reader.connection, by: .destination)
    }

    /// The source came back: what the readers of its lost connections claimed is placed before anything is told.
    func awaitClaims(_ id: ConnectionID) {
        guard destination.isRecovering(id), pull.hasClaims, bug != .tellsBitmapEarly, bug != .dropsClaimed else {
            return
        }
        readers[id]?.isBlocked = true
        let epoch = destinationEpoch
        schedule(after: 10 * microsecond, millisecond) { [self] in
            guard epoch == destinationEpoch, let reader = readers[id] else { return }
            readers[id]?.isBlocked = false
            awaitClaims(id)
            if readers[id]?.isBlocked == false { destinationReads([], on: reader.connection) }
        }
    }

    /// The core has heard of a command that takes up postcopy.
    func recover(_ command: PostcopyCommand, on id: ConnectionID) {
        switch command {
        case .receiveBitmap(let block): if destination.isRecovering(id) { tellReceived(block, id) }
        case .resume: if readers[id] != nil, !destination.isRecovering(id) { askAgain(id) }
        default: break
        }
    }

    private func tellReceived(_ name: String, _ id: ConnectionID) {
        guard let reader = readers[id], let block = map.blocks.firstIndex(where: { $0.name == name }) else { return }
        let byteCount = ReceivedBitmap.byteCount(of: map.blocks[block])
        var writer = StreamWriter()
        writer.message(.postcopy(.receivedBitmap(block: name, byteCount: byteCount)))
        var bits = [UInt8](repeating: 0, count: Int(byteCount))
        for index in 0..<Int(map.blocks[block].length / 4096) {
            let page = map.firstPages[block] + index
            let isClaimed = bug == .dropsClaimed && pull.claimed[page]
            if !pull.expected[page] || pull.placed[page] || isClaimed { bits[index / 8] |= 1 << UInt8(index % 8) }
        }
        let head = writer.take()
        writer.message(.postcopy(.bitmapEnded(block: name)))
        send(head + bits + writer.bytes, on: reader.connection, towards: .source)
    }

    /// What was asked for and did not come is asked for again.
    private func askAgain(_ id: ConnectionID) {
        guard let reader = readers[id] else { return }
        pull.main = id
        var writer = StreamWriter()
        for page in pull.asked.indices where pull.asked[page] && !pull.placed[page] {
            let (block, offset) = map.location(of: page)
            let request = PageRequest(block: map.blocks[block].name, offset: offset, length: 4096)
            writer.message(.postcopy(.requestPages(request)))
        }
        let bytes = writer.bytes
        if !bytes.isEmpty { send(bytes, on: reader.connection, towards: .source) }
    }

    // MARK: Invariants

    /// From `migrate` with `resume` on: how the status may go on.
    private static let statuses: [MigrationStatus: [MigrationStatus]] = [
        .postcopyPaused: [.postcopyRecoverSetup, .cancelled],
        .postcopyRecoverSetup: [.postcopyRecover, .postcopyPaused],
        .postcopyRecover: [.postcopyActive, .postcopyPaused, .completed],
    ]

    /// - Returns: whether the status is one of a recovery.
    func checkRecoveryOrder(_ status: MigrationStatus) -> Bool {
        guard let next = Self.statuses[lastReport] else { return false }
        if !next.contains(status) { violate("the status goes from \(lastReport.rawValue) to \(status.rawValue)") }
        lastReport = status
        return true
    }

    /// A guest that moved never goes back, and neither side gives it up.
    func checkMoved() {
        if sourceIsAlive {
            let allowed = (SourcePhase.pulled...SourcePhase.resumingPostcopy).contains(source.phase)
            if hasPaused, !allowed, source.phase != .finished {
                violate("postcopy was paused, and the source is in phase \(source.phase)")
            }
            if source.phase == .postcopyPaused { hasPaused = true }
            if hasPaused, source.mayRun, !net.isTakenBack { violate("the guest moved, and the source may run it") }
        }
        guard destinationIsAlive else { return }
        let isThere = destination.phase >= .pulling && destination.phase < .failed
        if hasArrived, destinationEpoch == 0, !isThere { violate("the guest was given up at the destination") }
        if isThere { hasArrived = true }
    }

    /// Nothing is left to happen.
    func checkWhole() {
        guard canBecomeWhole else { return }
        let waits = (SourcePhase.pulled...SourcePhase.resumingPostcopy).contains(source.phase)
        let misses = destination.phase == .pulling || destination.phase == .pullPaused
        if waits || misses {
            violate(
                "a postcopy whose connection was lost is never whole: source \(source.phase), destination "
                    + "\(destination.phase)")
        }
        guard ending == .completed, destination.phase == .started, !pull.model.isEmpty else { return }
        if destinationGuest.pages != pull.model { violate("pages differ in the end") }
    }
}

// A QEMU's connections are known by their first bytes alone.

extension Simulator {
    /// - Returns: whether it is known what the connection is, and there is more to be read of it.
    func isRecognized(_ id: ConnectionID) -> Bool {
        guard let reader = readers[id] else { return false }
        guard !reader.isRecognized else { return true }
        guard reader.input.count >= 3 else { return false }
        var peek = reader.input
        var first = [UInt8](repeating: 0, count: 3)
        _ = unsafe first.withUnsafeMutableBytes { unsafe peek.move(to: $0) }
        readers[id]?.isRecognized = true
        if StreamDecoder.recoveryIsAnnounced(by: first) {
            feedDestination(.cameToRecover(id))
            guard readers[id] != nil, let decoder = recoveryDecoder else { return false }
            readers[id]?.decoder = decoder
            awaitClaims(id)
        } else if first[0] != UInt8(ascii: "Q") {
            feedDestination(.cameForUrgentPages(id))
            guard readers[id] != nil else { return false }
            readers[id]?.decoder = .requestedPages(of: map.blocks)
        }
        return readers[id]?.isBlocked == false
    }
}
