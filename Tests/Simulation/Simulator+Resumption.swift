import Migration
import MigrationStream

// A migration that outlives its connection: the source's shell and operator.

extension Simulator {
    /// Pages between two marks.
    private static let stretchPages = 48
    private static let resumptionLimit = 8

    // MARK: Marks

    /// What stands behind a batch when a mark is due.
    func mark() -> [UInt8] {
        guard source.features.contains(.resumption), stretch.count >= Self.stretchPages else { return [] }
        var writer = StreamWriter()
        writer.ramSectionEnd(id: 2)
        writer.command(.ping(nextMark.pingValue))
        writer.ramRound(final: false, id: 2)
        unacknowledged.append((nextMark, stretch))
        nextMark = nextMark.next
        stretch = []
        return writer.bytes
    }

    func mustWaitForMark() -> Bool {
        if !source.features.contains(.resumption) { stretch = [] }
        batchWaits = unacknowledged.count > 1
        return batchWaits
    }

    func acknowledged(_ mark: ResumptionMark) {
        guard let index = unacknowledged.firstIndex(where: { $0.mark == mark }) else {
            return violate("a mark is acknowledged that nobody said")
        }
        unacknowledged.removeSubrange(...index)
        wakeBatch()
    }

    func wakeBatch() {
        guard batchWaits else { return }
        batchWaits = false
        schedule(at: now) { [self] in batch() }
    }

    // MARK: The connection

    func abandon() {
        attempts += 1
        closeUrgent()
        if let connection = sourceConnection {
            sourceConnection = nil
            close(connection, by: .source)
        }
        // A write that was stuck fails now.
        if round != nil { schedule(at: now) { [self] in batch() } }
    }

    func rewind() {
        let lost = unacknowledged.flatMap(\.pages) + stretch
        if lost.count > 2 * (Self.stretchPages + 24) { violate("\(lost.count) pages are sent again") }
        if bug != .forgetsWhatWasLost { for page in lost { pending[page] = true } }
        unacknowledged = []
        stretch = []
        records = RAMRecordEncoder(blocks: map.blocks)
        lastReport = .setup
    }

    func bidFarewell(_ bytes: [UInt8]) {
        schedule(after: plan.latency.lowerBound, plan.latency.upperBound * 2) { [self] in
            guard sourceIsAlive, destinationIsAlive, now >= networkIsSilentUntil else { return }
            let connection = SimulatedConnection(ConnectionID(UInt64(connections.count + 1)), isStranger: true)
            connections.append(connection)
            destinationAccepts(connection)
            send(bytes, on: connection, towards: .destination)
            schedule(at: now + second) { [self] in close(connection, by: .source) }
        }
    }

    // MARK: The operator

    func paused() {
        // The guest moved.
        if source.phase == .postcopyPaused { return pausedInPostcopy() }
        pauses += 1
        lastReport = .none
        if plan.guestRuns, !sourceGuest.runs { violate("the migration is paused, and the guest stands still") }
        schedule(after: millisecond, 30 * second) { [self] in
            guard sourceIsAlive, source.phase == .paused else { return }
            resumptions += 1
            let isEnough = resumptions > Self.resumptionLimit || generator.chance(plan.mistakes / 4)
            feedSource(isEnough ? .cancel : .resume)
            // Twice does no harm.
            if generator.chance(plan.mistakes) { feedSource(.resume) }
        }
    }

    /// The destination's operator and others, while a lost source is waited for.
    func kept() {
        if generator.chance(plan.mistakes) { schedule(after: millisecond, second) { [self] in strangerConnects() } }
        guard generator.chance(plan.mistakes / 8) else { return }
        schedule(after: millisecond, 30 * second) { [self] in feedDestination(.discard) }
    }

    // MARK: A wrong address

    /// Somebody else listens there: another Godwit, one that has failed, a QEMU, or a program that hangs up.
    func connectToStranger() {
        let connection = SimulatedConnection(ConnectionID(UInt64(connections.count + 1)))
        connections.append(connection)
        sourceConnection = connection
        sourceMessages = ReturnPathDecoder()
        sourceInput = ReceiveBuffer()
        trace("network: a stranger listens there")
        feedSource(.connected(.bothWays))
        var writer = StreamWriter()
        switch Int.random(in: 0..<4, using: &generator) {
        case 0:
            writer.message(.hello(version: 1, features: .all, instance: MigrationIdentifier(high: 9, low: 9)))
            writer.message(.pong(Wire.godwitPing))
        case 1: writer.message(.failure(reason: "an earlier migration failed here"))
        case 2: writer.message(.pong(Wire.godwitPing))
        default: return close(connection, by: .destination)
        }
        send(writer.bytes, on: connection, towards: .source)
    }
}
