import Host
import Machine
import MigrationStream
import Synchronization
import Transport

// A guest that moved and can be taken back: the shell's part at the source.

extension OutgoingMigration {
    var keeper: EpochKeeper? { sender.postcopy?.keeper }

    /// The guest goes on here, as it was when it was known last (`x-postcopy-take-back`).
    func takeBackGuest() throws(MigrationError) {
        try command(.takeBackGuest)
        // Its answer comes behind it.
        inbox.wait(deadline: .after(seconds: 10)) { $0.events.isEmpty || $0.isOver ? () : nil }
        if let sentence = refusal.withLock({ $0 }) { throw MigrationError(sentence) }
    }

    /// The safety net's channel is the last of those that a Godwit is given.
    func holdNet(_ channels: inout [Channel], _ attempt: UInt64) throws(SystemError) {
        guard let keeper, let channel = channels.popLast() else { return }
        do throws(SystemError) {
            try keeper.attach(channel) { [self] in
                if isCurrent(attempt) { post(.guestStays) }
            } failed: { [self] error in
                // What the main connection says tells more, where it says something.
                if isLost(attempt, answers: true) { post(.urgentChannelLost(error.description)) }
            }
        } catch {
            channel.cancel()
            throw error
        }
    }

    func takeBack(_ action: SourceAction) {
        if action == .takeBackPages { return sender.takeBackPages() }
        guard let keeper else { return }
        guard action == .takeBackGuest else { return keeper.release() }
        let kept = keeper.takeOut()
        do throws(MachineError) {
            if let states = kept.states {
                try machine.loadState(states)
                stoppedGuest.withLock { $0 = kept.guestRuns }
            }
            report(.notice("the guest is taken back as it was at the end of epoch \(kept.epoch)"))
            post(.guestTakenBack)
        } catch {
            keeper.putBack()
            post(.takeBackFailed(error.description))
        }
    }
}
