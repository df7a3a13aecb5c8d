import Accelerator
import Host
import MigrationStream
import Synchronization
import Transport

// A connection that was lost before the handover, and the next one.

extension OutgoingMigration {
    /// Whether no later attempt to connect was made.
    func isCurrent(_ attempt: UInt64) -> Bool { attempts.withLock { $0 == attempt } }

    /// Ends the connection, or the attempt to make one, whatever is queued for it.
    func abandon() {
        connecting.withLock { $0 }?.cancel()
        attempts.withLock { $0 += 1 }
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

    /// A few words to a destination that waits in vain. It gives up by itself, too, if they do not reach it.
    func bidFarewell(_ bytes: [UInt8]) {
        let connector = Connector(tls: tls, descriptors: descriptors)
        let address = target.withLock { $0 }
        guard let token = try? CancelToken() else { return }
        _ = try? HostThread.detached(name: "migration-bye") {
            guard let channel = try? connector.connect(to: address, cancel: token) else { return }
            try? channel.send(bytes)
            // It answers what became of the migration: then it has read this.
            var answer: [UInt8] = []
            _ = try? channel.receive(appendingTo: &answer, upTo: 64)
            channel.cancel()
        }
    }

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
