public import MigrationStream

// The protocol's face to the shell: what goes into `SourceCore` and `DestinationCore`, and what comes out.
//
// Rules for a shell:
// * Actions are performed in the order given. An action with an arrow answers with exactly one of the events named, at
//   once or later; other events may come in between. Answers nobody waits for any more are ignored by the core, so a
//   shell need not withdraw them.
// * Whoever owns the core feeds it one event at a time and never blocks on the network while doing so: `send` queues or
//   writes, and a write that fails is told as `disconnected`. `close` interrupts a write or read that is stuck.
// * Bytes that arrived before a connection ended are told before `disconnected`.
// * Timers are one-shot; setting a timer of the same `kind` replaces it. A timer that fires although it was replaced or
//   cancelled is recognised by its generation and ignored.
// * A core serves one migration (source) or one waiting process (destination). It holds no clock: durations come in
//   events, measured by the shell, and the moment of an event comes with it (`at`, monotonic).

/// Which timer, and which setting of it.
public struct ProtocolTimer: Hashable, Sendable {
    public enum Kind: Hashable, Sendable {
        /// The wait of the present phase.
        case deadline
        /// The next sign of life to send.
        case keepAlive
        /// By then the destination must have been told to start, or the guest runs on at the source.
        case contract
        /// The wait for the first PONG before the channel for requested pages is opened.
        case urgentChannel
        /// The wait for a further connection to say what it wants.
        case visitor(ConnectionID)
        /// The wait for all channels of a multifd migration.
        case channels
    }

    public let kind: Kind
    public let generation: UInt64

    public init(kind: Kind, generation: UInt64) {
        self.kind = kind
        self.generation = generation
    }
}

/// How long each wait may last, in nanoseconds.
public struct ProtocolDeadlines: Hashable, Sendable {
    /// The connection is made.
    public var connect: UInt64 = 30_000_000_000
    /// The peer's first words: PONG at the source, the header at the destination.
    public var greeting: UInt64 = 10_000_000_000
    /// The peer takes or sends no data for that long.
    public var stall: UInt64 = 30_000_000_000
    /// Work of the own process: tracking starts, the guest stops, state is saved or loaded, the guest starts.
    public var localWork: UInt64 = 30_000_000_000
    /// At the source, from PREPARE to READY. At the destination, from READY to COMMIT.
    public var ready: UInt64 = 30_000_000_000
    /// From COMMIT (or QEMU's EOF) to the last acknowledgement.
    public var acknowledgement: UInt64 = 30_000_000_000
    /// A CANCEL is delivered to the peer, the guest meanwhile runs again.
    public var farewell: UInt64 = 1_000_000_000
    /// Between two signs of life while the source waits for its operator.
    public var keepAlive: UInt64 = 5_000_000_000
    /// A destination hears nothing from its source for that long. Not with a QEMU source, which is silent for as long as
    /// its operator lets it wait before the switch.
    public var idle: UInt64 = 120_000_000_000
    /// A destination whose source was lost waits for RESUME: a day.
    public var kept: UInt64 = 86_400_000_000_000

    public init() {}
}

// MARK: - Source

/// Where in the main stream the pages of all channels are complete (multifd).
public enum MultifdMode: Hashable, Sendable {
    /// At MULTIFD_FLUSH, once per round: Godwit, QEMU 8.1 and newer.
    case flush
    /// At the end of every section of RAM: QEMU 8.0 and older.
    case eachSection
}

/// What a source knows when a migration begins.
public struct SourceConfiguration: Sendable {
    public var migration: MigrationIdentifier
    /// Both sides must have the same machine.
    public var machineName: String
    /// The machine's UUID, which the destination compares with its own (QEMU's capability `validate-uuid`); `nil`: it is not told.
    public var uuid: MigrationIdentifier?
    /// All RAM, in the order in which it is listed. Indices are those of the shell's page records.
    public var blocks: [RAMBlockDescription]
    /// The layouts of the sections that `stateSaved` will bring.
    public var catalogue: SectionCatalogue
    /// Stop before the switch until `proceed` comes (QEMU's capability `pause-before-switchover`).
    public var pausesBeforeSwitchover: Bool
    /// Do not stop the guest before the destination said that it may be (QEMU's capability `switchover-ack`).
    public var awaitsSwitchoverAcknowledgement = false
    public var switchover: SwitchoverPolicy
    /// A connection lost before the handover pauses the migration instead of ending it (capability `x-resumable`).
    public var isResumable = false
    /// What is offered to a Godwit destination.
    public var features: FeatureSet
    public var deadlines: ProtocolDeadlines
    /// Pages go over further channels, which are connected before `connected` is told; `nil`: over the main one.
    public var multifd: MultifdMode?
    /// Digests travel with all pages (`x-verify`): a destination that cannot compare them is none.
    public var verifies: Bool { features.contains(.verification) }
    /// Pages go to places of their own in a file, one-way; `nil`: they go into the stream.
    public var mapped: MappedRAMSetup?
    /// The guest may be told to move before its memory (`postcopy-ram`); `nil`: it never does.
    public var postcopy: PostcopyTerms?

    public init(
        migration: MigrationIdentifier, machineName: String, blocks: [RAMBlockDescription],
        catalogue: SectionCatalogue = SectionCatalogue(), pausesBeforeSwitchover: Bool = false,
        switchover: SwitchoverPolicy = SwitchoverPolicy(), features: FeatureSet = .all,
        deadlines: ProtocolDeadlines = ProtocolDeadlines()
    ) {
        self.migration = migration
        self.machineName = machineName
        self.blocks = blocks
        self.catalogue = catalogue
        self.pausesBeforeSwitchover = pausesBeforeSwitchover
        self.switchover = switchover
        self.features = features
        self.deadlines = deadlines
    }
}

/// How memory follows a guest that moved first.
public struct PostcopyTerms: Hashable, Sendable {
    /// Requested pages go over a channel of their own (QEMU's capability `postcopy-preempt`).
    public var usesUrgentChannel: Bool

    public init(usesUrgentChannel: Bool = false) { self.usesUrgentChannel = usesUrgentChannel }
}

/// Whether the connection carries answers.
public enum ConnectionDirection: Hashable, Sendable {
    case bothWays
    /// `exec:`, `file:`, a one-way descriptor.
    case oneWay
}

/// What one round of sending did.
public struct RoundReport: Hashable, Sendable {
    /// Pages sent, zero pages included.
    public var pages: UInt64
    public var bytes: UInt64
    /// Of pages that went compressed with others: what they have in memory. 0 where nothing is compressed.
    public var contentBytes: UInt64 = 0
    public var nanoseconds: UInt64
    /// The round ended early because an event waited; the pages not sent are still dirty.
    public var interrupted: Bool

    public init(pages: UInt64, bytes: UInt64, nanoseconds: UInt64, interrupted: Bool = false) {
        self.pages = pages
        self.bytes = bytes
        self.nanoseconds = nanoseconds
        self.interrupted = interrupted
    }
}

/// How an operator ends the doubt about a migration whose connection was lost after COMMIT.
public enum Settlement: Hashable, Sendable {
    /// Connect again and ask the destination.
    case askDestination
    /// The operator knows that the guest runs there.
    case startedThere
    /// The operator knows that the guest does not and never will run there.
    case resumeHere
}

public enum SourceEvent: Hashable, Sendable {
    /// The operator's `migrate`. Once, first.
    case start
    case connected(ConnectionDirection)
    case connectFailed(String)
    case received(ReturnPathMessage)
    /// The connection failed or the peer closed it. Also what the return path's decoder rejects.
    case disconnected(String)
    case trackingStarted
    case trackingFailed(String)
    /// The dirty pages known but not sent, in pages, after asking the tracker. The first collect counts all RAM.
    case collected(remainingPages: UInt64)
    /// The peer takes data: at most once per second while a round or a flush is under way.
    case progressed
    case roundSent(RoundReport)
    /// No vCPU runs and no device writes guest memory any more. `wasRunning`: false when the guest was paused already.
    case guestStopped(wasRunning: Bool)
    case stopFailed(String)
    /// All device state in loading order, without `globalstate`, which the core adds.
    case stateSaved([DeviceSection])
    case stateFailed(String)
    /// All that was sent is in the kernel's hands.
    case flushed
    /// The connection is closed; an error when the other end of a one-way transport reports one (`exec:` exit status).
    case closed(error: String?)
    case timer(ProtocolTimer)
    /// The operator's `migrate_cancel`.
    case cancel
    /// The operator's `migrate-continue` in pre-switchover.
    case proceed
    /// The operator's `migrate` with `resume`, in `paused` or `postcopyPaused`.
    case resume
    /// The operator's `migrate-pause`: the connection of a postcopy is given up.
    case breakOff
    case settle(Settlement)
    /// The operator's `migrate-start-postcopy`.
    case startPostcopy
    case urgentChannelOpened
    case urgentChannelFailed(String)
    /// It was open, and is of no use any more.
    case urgentChannelLost(String)
    /// DISCARD of all that is still to come is in the kernel's hands.
    case discardsSent
    /// All of the package is in the kernel's hands; or not all: its last bytes never left.
    case packageSent
    case packageCut(String)
    /// No page is left here that the destination does not have, or has on its way.
    case pagesServed
    /// The operator changed the limit while the migration runs.
    case setDowntimeLimit(nanoseconds: UInt64)
    /// The operator changed what all rounds but the last may send; `nil`: as much as the transport takes.
    case setBandwidthLimit(bytesPerSecond: UInt64?)
    /// The operator changed what the last round can count on; `nil`: what was measured.
    case setAvailableBandwidth(bytesPerSecond: UInt64?)
}

public enum SourceAction: Hashable, Sendable {
    /// -> `connected`, `connectFailed`.
    case connect
    /// Stream bytes, after all sent before.
    case send([UInt8])
    /// Go on so many bytes further in the file, behind all sent before.
    case skip(UInt64)
    /// -> `trackingStarted`, `trackingFailed`.
    case startTracking
    case stopTracking
    /// Learn what is dirty; `final`: the guest is stopped, nothing may be missed. -> `collected`, `trackingFailed`.
    case collect(final: Bool)
    /// Write records for all dirty pages known, after the section head that the core sent just before; no EOS. `final`:
    /// without bandwidth limit. `batches`: the peer understands page batches. Between batches, look whether events wait;
    /// if so and it is not final, end the round as interrupted. `keepsPages`: what remains is too much to be the last, so that pages
    /// are worth a place in a cache. -> `roundSent`.
    case sendRound(final: Bool, batches: Bool, keepsPages: Bool)
    /// With multifd, once behind the list of blocks: SYNC on every channel. A round ends with it by itself.
    case synchronizeChannels
    /// Send ROOT over all that was sent: every round has ended.
    case sendRoot
    /// Send DIGESTS. The guest may run meanwhile, no round does.
    case sendDigests(DigestRange)
    /// A switchover was broken off: `resumeGuest` came before, RAM goes on. For reports.
    case brokeOff(BrokenSwitchover)
    /// End the round under way at the next batch, final or not; its `roundSent` still comes.
    case interruptRound
    /// The connection, and an attempt to make one, ends at once, whatever is queued for it; a round that is under way still answers.
    case abandon
    /// The guest runs here, and nothing happens before `resume`: the reason, one sentence.
    case paused(String)
    /// On the new connection, before anything is collected: pages that were sent but not acknowledged by a ``ResumptionMark`` are
    /// dirty again, and whatever is remembered of what the destination has (differences, compression) begins empty.
    case rewind
    /// Connect once more, if that can be done, say this and close. Nobody waits for it, and it has no answer.
    case bidFarewell([UInt8])
    /// -> `guestStopped`, `stopFailed`.
    case stopGuest
    /// Undo `stopGuest`, also one still under way: a guest that ran before runs again.
    case resumeGuest
    /// From here on nothing but this core may start the guest: record it, refuse `cont`. Comes before the bytes that
    /// let the destination start are sent.
    case giveUpRightToRun
    /// The guest is ours again; `resumeGuest` follows.
    case regainRightToRun
    /// -> `stateSaved`, `stateFailed`.
    case saveState
    /// Open the channel for requested pages; nothing is said on it yet. -> `urgentChannelOpened`, `urgentChannelFailed`.
    case openUrgentChannel
    /// Say DISCARD for all that `collect` found, which from here on is sent by `servePages` alone. -> `discardsSent`, `trackingFailed`,
    /// or `disconnected`.
    case sendDiscards
    /// These bytes, behind all sent before. Requests for pages count from here on. -> `packageSent`, `packageCut`; also when the
    /// connection is lost, before or after `disconnected`.
    case sendPackage([UInt8])
    /// Send what is asked for, and nothing else, until there is something else to say. It has no answer.
    case serveRequests
    /// Send what is asked for, and between that everything else, once each. Tracking is over. -> `pagesServed`, or `disconnected`.
    case servePages
    /// A new connection takes up postcopy: nothing of the old one is under way any more, and what the destination has is taken in,
    /// block by block, up to its `bitmapEnded`.
    case prepareRecovery
    /// All bitmaps were taken in: what is to be sent is what was to be sent and is not there. Requests count from here on.
    case adoptBitmaps
    /// The guest did not move after all: what DISCARD named is dirty again, sent or not, and what is remembered of what the destination has
    /// (differences, compression) begins empty. Nobody may ask for pages, and the channel for them is closed. Before anything is collected.
    case takeBackPages
    /// -> `flushed`, or `disconnected`.
    case flush
    /// Close once what is queued has left, without waiting for a peer that takes nothing. -> `closed`.
    case close
    /// One-shot, after that many nanoseconds; replaces the timer of the same kind. -> `timer`.
    case setTimer(ProtocolTimer, nanoseconds: UInt64)
    case cancelTimer(ProtocolTimer.Kind)
    case report(MigrationStatus)
    /// The rule was agreed, for `info migrate`.
    case agreed(HandoverRule, features: FeatureSet)
    /// The operator's command (`cancel`, `proceed`, `settle`) does not fit the phase: one sentence.
    case refused(String)
    /// The migration is over. After `unsettled`, `settle` events still work, and another `finished` follows.
    case finished(SourceOutcome)
}

public enum SourceOutcome: Hashable, Sendable {
    case completed
    /// The guest was given back (`resumeGuest` came before if it had been stopped).
    case cancelled
    case failed(String)
    /// The guest stays stopped: whether it runs at the destination is not known.
    case unsettled(String)
}

// MARK: - Destination

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
