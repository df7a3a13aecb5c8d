public import MigrationStream

// The destination's face to the shell. `ProtocolEvents.swift` has the rules.

/// A connection at the destination, numbered by its shell.
public struct ConnectionID: Hashable, Sendable {
    public let rawValue: UInt64
    public init(_ rawValue: UInt64) { self.rawValue = rawValue }
}

/// A device section the destination's machine wants.
public struct ExpectedSection: Hashable, Sendable {
    public let name: String
    public let instance: UInt32
    /// Without it the guest cannot start.
    public let required: Bool

    public init(name: String, instance: UInt32 = 0, required: Bool = true) {
        self.name = name
        self.instance = instance
        self.required = required
    }
}

/// What a destination knows when it begins to wait.
public struct DestinationConfiguration: Sendable {
    /// This process.
    public var instance: InstanceIdentifier
    public var machineName: String
    /// The sections of this machine besides `globalstate`; anything else in the stream is an error.
    public var sections: [ExpectedSection]
    /// Run the guest if it ran on the source; false: leave it paused (`--paused`, QEMU's -S).
    public var startsGuest: Bool
    /// Say at once that the source may stop the guest (QEMU's capability `switchover-ack`): no device here needs time for it.
    public var acknowledgesSwitchover = false
    /// What is offered to a Godwit source.
    public var features: FeatureSet
    public var deadlines: ProtocolDeadlines
    /// Channels that a source which does not announce their number brings (QEMU, capability `multifd`); `nil`: none.
    public var multifdChannels: Int?
    /// The UUID this machine was started with: one that a source tells must be the same.
    public var uuid: MigrationIdentifier?
    /// The stream comes from a file, where pages may have places of their own (`mapped-ram`).
    public var readsMappedRAM = false
    /// A QEMU source may switch to postcopy (capability `postcopy-ram`).
    public var allowsPostcopy = false
    /// The page sizes of all blocks' memory, joined by OR: the source's must be the same.
    public var blockPageSizes = UInt64(Wire.pageSize)

    public init(
        instance: InstanceIdentifier, machineName: String, sections: [ExpectedSection], startsGuest: Bool = true,
        features: FeatureSet = .all, deadlines: ProtocolDeadlines = ProtocolDeadlines()
    ) {
        self.instance = instance
        self.machineName = machineName
        self.sections = sections
        self.startsGuest = startsGuest
        self.features = features
        self.deadlines = deadlines
    }
}

public enum DestinationEvent: Hashable, Sendable {
    /// A peer connected. `answers`: false for a one-way transport (`exec:`, `file:`). Go on accepting: a stranger must
    /// not keep the real source out, and a source may come back to ask (SETTLE).
    case accepted(ConnectionID, answers: Bool)
    /// That connection began with the greeting of a multifd channel. -> `admit`, or `close`, at once or later.
    case greeted(ConnectionID, MultifdGreeting)
    /// That connection began with page records, as QEMU's channel for requested pages does. It is closed if there can be none.
    case cameForUrgentPages(ConnectionID)
    /// The channel for requested pages said its last word.
    case urgentEnded(ConnectionID)
    /// That connection began as one that takes up postcopy, without a header (QEMU). It is closed if none is awaited.
    case cameToRecover(ConnectionID)
    /// The operator's `migrate-recover`: somebody listens for such a connection.
    case awaitRecovery
    /// The operator's `migrate-pause`: the connection of a postcopy is given up.
    case breakOff
    /// The source says on its safety net that it will never take the guest back.
    case guestReleased(ConnectionID)
    /// The operator's `x-postcopy-keep`: the source is gone, or will not take the guest back.
    case keepGuest
    /// Pages that are still missing, as an answer to `finishPull`.
    case pullEnded(missing: UInt64)
    /// The answer to `unlisten`.
    case unlistened
    /// What the decoder of that connection found. Page records need not come here as long as
    /// ``DestinationCore/acceptsPages(on:)``: the shell applies them by itself.
    case item(ConnectionID, StreamItem)
    /// The decoder of that connection rejected its input: the stream error's sentence.
    case rejected(ConnectionID, String)
    /// The peer closed, or the connection failed.
    case disconnected(ConnectionID, String)
    /// Data arrives: at most once per second while a long section is read.
    case progressed(ConnectionID)
    /// No thread reads any more from these connections, which `awaitReaders` named. Later ones may have been closed since.
    case readersEnded([ConnectionID])
    /// A page could not be placed into guest memory.
    case pagesFailed(String)
    case stateLoaded(nanoseconds: UInt64)
    case loadFailed(String)
    case compared(RootVerdict)
    /// The guest runs, or is paused if it was to be: nanoseconds from the action to the first entry into the guest.
    case guestStarted(nanoseconds: UInt64)
    /// No vCPU ever entered the guest, and none will.
    case startFailed(String)
    /// No vCPU had entered the guest at the moment that `startGuest` gave, and none will.
    case startedTooLate
    case timer(ProtocolTimer)
    /// The address brings no further connection: a file, a command or a connected descriptor brings one.
    case noFurtherConnection
    /// The operator gives up this destination (`quit`): the guest will never start here.
    case giveUp
    /// The operator gives up what is kept of a migration whose source was lost (`migrate_cancel`).
    case discard
}

public enum DestinationAction: Hashable, Sendable {
    case send(ConnectionID, [UInt8])
    /// Hand over what was sent if the peer takes it, then close and forget this connection.
    case close(ConnectionID)
    /// Close and forget this connection at once, whatever was said on it and not taken: nobody listens there any more.
    case drop(ConnectionID)
    /// A channel belongs to the migration, which has so many: its packets may be read as far as ``DestinationCore/acceptsPages(on:)``.
    case admit(ConnectionID, of: Int)
    /// A Godwit's channel for requested pages belongs to the migration, which has so many: pages may be asked for there.
    case admitUrgent(ConnectionID, number: UInt8, of: Int)
    /// That one belongs to the migration, and is the safety net's: epochs go there once they are taken.
    case admitNet(ConnectionID)
    /// The source is to be able to take the guest back: have its writes told, long before it runs. If it cannot be done: -> `pagesFailed`.
    case prepareEpochs
    /// The guest is about to run: from now on nobody hears what it says before the source has the epoch in which it was said.
    case armEpochs
    /// Take epochs, and let the guest run as long as the source gets them.
    case goOnWithEpochs
    /// The guest stands still, at once; what is on its way to the source and was not acknowledged will be said once more.
    case holdEpochs
    /// Tell the source that the guest stays here. -> `guestReleased`
    case sayStays
    /// No epochs any more: what the guest said is heard, and it runs.
    case endEpochs
    /// Those connections were closed: nothing of what they brought may be placed after the answer. -> `readersEnded`.
    case awaitReaders([ConnectionID])
    /// The source is lost; what was received is kept, and another connection is awaited: the reason, one sentence, and how long.
    case keeps(String, forNanoseconds: UInt64)
    /// From here on digests come with the pages of this migration, under the key that its name is.
    case verify(MigrationIdentifier)
    /// The root of the source, behind all its pages. -> `compared`.
    case compareRoot(UInt64)
    /// What the source answered to `RootVerdict.ask`. -> `compared`.
    case compareDigests(DigestRange, [UInt64])
    /// Postcopy may come: see whether this host can do it (userfaultfd), before anything moves. If not: -> `pagesFailed`.
    case preparePostcopy
    /// These pages are out of date, and will come again. If they cannot be forgotten: -> `pagesFailed`.
    case discardPages(RAMDiscard)
    /// From here on whoever touches a page that was discarded waits for it, and the source is asked for it on its connection; pages are
    /// placed as they come. `loadState` and `startGuest` may then wait for pages, too: their answers come later. If it cannot be done:
    /// -> `pagesFailed`.
    case listen
    /// The source sent all, or is lost: when nothing is missing, end the watch over memory. `waits`: what is on its way on other channels
    /// is waited for a while. -> `pullEnded`.
    case finishPull(waits: Bool)
    /// Memory is not watched any more, whatever is missing: the guest will not run here.
    case endPostcopy
    /// The same, but the migration goes on as if nothing had been discarded: whoever waits for a page finds zeroes. Those connections, which
    /// were closed, may have brought pages: nothing of it may be placed after the answer. -> `unlistened`, `pagesFailed`.
    case unlisten([ConnectionID])
    /// The guest runs on with pages missing: the reason, one sentence.
    case pullPaused(String)
    /// All device state, complete and in the order of the stream; `globalstate` is not in it. -> `stateLoaded`,
    /// `loadFailed`.
    case loadState([DeviceSection])
    /// Take the guest: let it run, or leave it paused; by a moment on the core's clock, if one is given. The answer must come, and
    /// only it tells whether there is a way back. -> `guestStarted`, `startFailed`, `startedTooLate`.
    case startGuest(running: Bool, by: UInt64?)
    case setTimer(ProtocolTimer, nanoseconds: UInt64)
    case cancelTimer(ProtocolTimer.Kind)
    case report(MigrationStatus)
    /// The rule was agreed, for `info migrate`.
    case agreed(HandoverRule, features: FeatureSet)
    /// A connection was closed that never became the source's, or a channel of the source's that may not be needed any more: one
    /// sentence, for the log.
    case turnedAway(ConnectionID, String)
    case finished(DestinationOutcome)
}

public enum DestinationOutcome: Hashable, Sendable {
    /// The guest is here. Later connections are still answered when they ask (SETTLE).
    case completed
    /// Nothing of this machine was touched: the core waits for another connection.
    case waitsForAnother(String)
    /// The guest never starts here. Memory or devices may be half loaded; later connections are still answered.
    case failed(String)
}
