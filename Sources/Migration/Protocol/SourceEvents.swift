public import MigrationStream

// The source's face to the shell. `ProtocolEvents.swift` has the rules.

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
    /// How many of those a Godwit is given.
    public var urgentChannels: Int
    /// With so many dirty pages behind a round the destination forgets them while the guest still runs; only what is written meanwhile
    /// is left for when it stands still.
    public var pagesForgottenAhead: UInt64
    /// The guest can be taken back (`x-postcopy-safety-net`): there are channels in any case, and one more.
    public var hasNet: Bool

    public init(
        usesUrgentChannel: Bool = false, urgentChannels: Int = 1, pagesForgottenAhead: UInt64 = 256,
        hasNet: Bool = false
    ) {
        self.usesUrgentChannel = usesUrgentChannel || hasNet
        self.urgentChannels = urgentChannels
        self.pagesForgottenAhead = pagesForgottenAhead
        self.hasNet = hasNet
    }
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
    /// The destination says on its safety net that the guest stays there.
    case guestStays
    /// The operator's `x-postcopy-take-back`.
    case takeBackGuest
    /// The answers to the action of that name.
    case guestTakenBack
    case takeBackFailed(String)
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
    /// Between two Godwits: open so many, and greet on each. -> `urgentChannelOpened`, when all are there, or `urgentChannelFailed`.
    case openUrgentChannels(Int)
    /// Say DISCARD for all that `collect` found, but for what it was said for since pages were taken back last: from here on that is sent by
    /// `servePages` alone. -> `discardsSent`, `trackingFailed`,
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
    /// Tell the destination that the guest is never taken back.
    case releaseGuest
    /// Nothing of what the destination still says is kept; make memory and state those of the last epoch that is. -> `guestTakenBack`,
    /// `takeBackFailed`.
    case takeBackGuest
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
