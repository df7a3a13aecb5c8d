import Accelerator
import Host
import MigrationStream
import Synchronization
import Transport

// A connection that was lost before the handover, and the next one.

extension OutgoingMigration {
    /// Whether no later attempt to connect was made.
    func isCurrent(_ attempt: UInt64) -> Bool { attempts.withLock { $0 == attempt } }

    /// Whether a connection that takes nothing more is a loss: what the destination said before it closed tells more, and is read first.
    func isLost(_ attempt: UInt64, answers: Bool) -> Bool {
        if answers {
            answersEnded.wait(deadline: .after(milliseconds: Self.lastWordsMilliseconds)) { $0 >= attempt ? () : nil }
        }
        return isCurrent(attempt)
    }

    static let lastWordsMilliseconds: UInt64 = 200

    /// What a connection that was given up has said, and nobody has taken yet. On the migration thread, which is at the first event.
    private func forgetConnections() {
        inbox.withLock { inbox in
            let stale = inbox.events.indices.dropFirst().filter { inbox.events[$0].isOfConnection }
            for index in stale.reversed() { inbox.events.remove(at: index) }
            inbox.taken += UInt64(stale.count)
        }
    }

    /// The destination is where the connection went.
    func noteHome() {
        let address = target.withLock { $0 }
        home.withLock { $0 = address }
    }

    /// Ends the connection, or the attempt to make one, whatever is queued for it.
    func abandon() {
        connecting.withLock { $0 }?.cancel()
        attempts.withLock { $0 += 1 }
        // One that was made just now: the next attempt's must not be taken for it.
        forgetConnections()
        guard let channel = open.withLock({ $0.take() }) else { return }
        isAbandoned.withLock { $0 = true }
        sender.interruptRound()
        channel.cancel()
        sender.endChannels()
        sender.enqueue(.close)
    }

    func stopTracking() {
        guard isAbandoned.withLock({ $0 }) else { return sender.enqueue(.stopTracking) }
        sender.waitUntilClosed()
        tracker?.stop()
    }

    /// So long is taken for each step of it: what listens there may be anybody, who says nothing.
    private static let farewellMilliseconds: UInt64 = 10_000

    /// A few words to a destination that waits in vain. It gives up by itself, too, if they do not reach it.
    func bidFarewell(_ bytes: [UInt8]) {
        let limits = StallLimits(
            sendMilliseconds: Self.farewellMilliseconds, receiveMilliseconds: Self.farewellMilliseconds)
        let connector = Connector(limits: limits, tls: tls, descriptors: descriptors)
        // Where it was to be resumed, and, should that have been another's address, where it was before.
        var addresses = [target.withLock { $0 }]
        if let home = home.withLock({ $0 }), home != addresses[0] { addresses.append(home) }
        for address in addresses {
            guard let token = try? CancelToken() else { return }
            farewells.withLock { $0 += 1 }
            do {
                try HostThread.detached(name: "migration-bye") { [self] in
                    defer { farewells.withLock { $0 -= 1 } }
                    let deadline = Deadline.after(milliseconds: Self.farewellMilliseconds)
                    guard let channel = try? connector.connect(to: address, deadline: deadline, cancel: token)
                    else { return }
                    try? channel.send(bytes)
                    // It answers what became of the migration: then it has read this.
                    var answer: [UInt8] = []
                    _ = try? channel.receive(appendingTo: &answer, upTo: 64)
                    channel.cancel()
                }
            } catch { farewells.withLock { $0 -= 1 } }
        }
    }

    /// The process ends: what is being said to a destination that waits in vain should reach it first.
    func awaitFarewell() { farewells.wait(deadline: .after(seconds: 1)) { $0 == 0 ? () : nil } }

    /// Asks a destination that fell silent after COMMIT whether it started, a few times; after that an operator must settle it.
    func askAgain() {
        guard target.withLock({ $0.canReconnect }) else { return }
        let attempt = settleAttempts.withLock { attempts in
            attempts += 1
            return attempts
        }
        guard attempt <= Self.settleAttemptLimit else { return }
        startThread("migration-ask") { [self] in
            Clock.sleep(nanoseconds: UInt64(attempt) * 500_000_000)
            if isUnsettled { post(.settle(.askDestination)) }
        }
    }
}

extension SourceEvent {
    /// Whether it tells of a connection.
    fileprivate var isOfConnection: Bool {
        switch self {
        case .connected, .connectFailed, .received, .disconnected: true
        default: false
        }
    }
}
