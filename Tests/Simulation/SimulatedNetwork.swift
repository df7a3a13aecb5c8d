import Migration
import MigrationStream

/// One direction of a connection.
struct SimulatedPipe {
    var inFlight: [UInt8] = []
    var head = 0
    /// When the last bytes on the way arrive: nothing overtakes.
    var arrival: UInt64 = 0
    /// After so many more bytes the connection is cut.
    var bytesUntilCut: Int?
    /// The writer closed; the reader is told when everything has arrived.
    var isClosed = false

    var pending: Int { inFlight.count - head }

    mutating func take(_ count: Int) -> [UInt8] {
        let taken = Array(inFlight[head..<(head + count)])
        head += count
        if head == inFlight.count {
            inFlight = []
            head = 0
        }
        return taken
    }
}

/// A connection between the source (or a stranger) and the destination.
final class SimulatedConnection {
    let id: ConnectionID
    let isStranger: Bool
    var towardsDestination = SimulatedPipe()
    var towardsSource = SimulatedPipe()
    var isOpenAtSource = true
    var isOpenAtDestination = true
    /// Nothing passes any more and nobody is told.
    var isSilent = false
    /// Nothing reaches the destination before that time.
    var isHeldUntil: UInt64 = 0
    /// Nothing reaches the source before that time.
    var answersAreHeldUntil: UInt64 = 0

    init(_ id: ConnectionID, isStranger: Bool = false) {
        self.id = id
        self.isStranger = isStranger
    }
}

extension Simulator {
    /// - Returns: whether the kernel took all of it.
    @discardableResult
    func send(_ bytes: [UInt8], on connection: SimulatedConnection, towards side: SimulationPlan.Side) -> Bool {
        let path: WritableKeyPath<SimulatedConnection, SimulatedPipe> =
            side == .destination ? \.towardsDestination : \.towardsSource
        var connection = connection
        guard !connection[keyPath: path].isClosed else { return false }
        guard !connection.isSilent else { return true }
        guard side == .destination ? connection.isOpenAtDestination : connection.isOpenAtSource else { return false }
        var sent = bytes
        if let left = connection[keyPath: path].bytesUntilCut {
            sent = Array(bytes.prefix(left))
            connection[keyPath: path].bytesUntilCut = left - sent.count
        }
        connection[keyPath: path].inFlight += sent
        // The bytes arrive in some pieces, cut anywhere.
        var left = sent.count
        while left > 0 {
            let piece = generator.chance(0.5) ? left : Int.random(in: 1...left, using: &generator)
            left -= piece
            let earliest = now + UInt64.random(in: plan.latency, using: &generator)
            connection[keyPath: path].arrival = max(connection[keyPath: path].arrival, earliest)
            let (when, id) = (connection[keyPath: path].arrival, connection)
            schedule(at: when) { [self] in arrive(piece, on: id, towards: side) }
        }
        if sent.count < bytes.count { cut(connection) }
        return sent.count == bytes.count
    }

    private func arrive(_ count: Int, on connection: SimulatedConnection, towards side: SimulationPlan.Side) {
        guard !connection.isSilent else { return }
        let held = side == .destination ? connection.isHeldUntil : connection.answersAreHeldUntil
        if now < held { return schedule(at: held) { [self] in arrive(count, on: connection, towards: side) } }
        if side == .destination {
            guard connection.isOpenAtDestination, connection.towardsDestination.pending >= count else { return }
            destinationReads(connection.towardsDestination.take(count), on: connection)
        } else {
            guard connection.isOpenAtSource, connection.towardsSource.pending >= count else { return }
            sourceReads(connection.towardsSource.take(count), on: connection)
        }
    }

    /// The network ends a connection: what is on the way is lost or still arrives, then both sides are told.
    func cut(_ connection: SimulatedConnection) {
        let losses = Int.random(in: 0..<4, using: &generator)
        trace("network: connection \(connection.id.rawValue) is cut")
        if losses & 1 != 0 { _ = connection.towardsDestination.take(connection.towardsDestination.pending) }
        if losses & 2 != 0 { _ = connection.towardsSource.take(connection.towardsSource.pending) }
        end(&connection.towardsDestination, on: connection, towards: .destination, "the connection was reset")
        end(&connection.towardsSource, on: connection, towards: .source, "the connection was reset")
    }

    /// Only the source is told that the connection ended; the destination learns it late, after all that was sent.
    func resetSource(_ connection: SimulatedConnection, heldFor: UInt64) {
        trace("network: connection \(connection.id.rawValue) is reset at the source")
        connection.isHeldUntil = now + heldFor
        _ = connection.towardsSource.take(connection.towardsSource.pending)
        end(&connection.towardsSource, on: connection, towards: .source, "the connection was reset")
        end(&connection.towardsDestination, on: connection, towards: .destination, "the connection was reset")
    }

    /// For a while nothing passes in that direction; then all of it does.
    func stall(_ connection: SimulatedConnection, towards side: SimulationPlan.Side, for nanoseconds: UInt64) {
        trace("network: connection \(connection.id.rawValue) stalls towards the \(side.rawValue)")
        if side == .destination {
            connection.isHeldUntil = max(connection.isHeldUntil, now + nanoseconds)
        } else {
            connection.answersAreHeldUntil = max(connection.answersAreHeldUntil, now + nanoseconds)
        }
    }

    /// One side closed (or died): the other is told after what is on the way; what was on the way to it is lost.
    func close(_ connection: SimulatedConnection, by side: SimulationPlan.Side) {
        if side == .source {
            guard connection.isOpenAtSource else { return }
            connection.isOpenAtSource = false
            end(
                &connection.towardsDestination, on: connection, towards: .destination,
                "the source closed the connection")
        } else {
            guard connection.isOpenAtDestination else { return }
            connection.isOpenAtDestination = false
            end(&connection.towardsSource, on: connection, towards: .source, "the destination closed the connection")
        }
    }

    private func end(
        _ pipe: inout SimulatedPipe, on connection: SimulatedConnection, towards side: SimulationPlan.Side,
        _ reason: String
    ) {
        guard !pipe.isClosed else { return }
        pipe.isClosed = true
        let earliest = max(now, side == .destination ? connection.isHeldUntil : connection.answersAreHeldUntil)
        pipe.arrival = max(pipe.arrival, earliest + UInt64.random(in: plan.latency, using: &generator))
        schedule(at: pipe.arrival) { [self] in
            guard !connection.isSilent else { return }
            if side == .destination {
                guard connection.isOpenAtDestination else { return }
                connection.isOpenAtDestination = false
                destinationLoses(connection, reason)
            } else {
                guard connection.isOpenAtSource else { return }
                connection.isOpenAtSource = false
                sourceLoses(connection, reason)
            }
        }
    }
}
