/// A look at a migration, with QEMU's fields (`query-migrate`) and ours.
public struct MigrationInfo: Sendable, Equatable {
    /// Counters of RAM. Pages are of 4 KiB; bytes are bytes on the wire.
    public struct RAM: Sendable, Equatable {
        /// All that was sent (or received), the stream's own words included.
        public var transferred: UInt64 = 0
        /// Bytes of guest memory that are known to need sending.
        public var remaining: UInt64 = 0
        /// Guest RAM.
        public var total: UInt64 = 0
        /// Pages sent as "zero".
        public var duplicate: UInt64 = 0
        /// Pages sent whole.
        public var normal: UInt64 = 0
        /// Pages the guest wrote per second, seen over the last round.
        public var dirtyPagesRate: UInt64 = 0
        /// 10^6 bits per second, over the last round.
        public var mbps: Double = 0
        /// Times the dirty pages were collected.
        public var dirtySyncCount: UInt64 = 0
        public var pagesPerSecond: UInt64 = 0
        /// Bytes sent while the guest ran, and while it stood still.
        public var precopyBytes: UInt64 = 0
        public var downtimeBytes: UInt64 = 0
        /// Of `transferred`, what went over the channels besides the main one.
        public var multifdBytes: UInt64 = 0
        /// Pages that the destination asked for, each once, and bytes of pages that went after the guest did (postcopy).
        public var postcopyRequests: UInt64 = 0
        public var postcopyBytes: UInt64 = 0
        /// Never-touched pages of RAM: neither read nor sent.
        public var hole: UInt64 = 0

        public init() {}
        public var normalBytes: UInt64 { normal * 4096 }
    }

    /// What delta compression did (QEMU's `xbzrle-cache`). A page that went as a difference, or not at all because it was as before, is
    /// neither `normal` nor `duplicate`.
    public struct XBZRLE: Sendable, Equatable {
        public var cacheBytes: UInt64 = 0
        /// What pages that were in the cache took on the wire.
        public var bytes: UInt64 = 0
        /// Pages that were in the cache.
        public var pages: UInt64 = 0
        public var cacheMisses: UInt64 = 0
        /// Of the pages of the last round, how many were not in the cache (0...1).
        public var cacheMissRate: Double = 0
        /// How many times smaller the last round's pages became.
        public var encodingRate: Double = 0
        /// Pages that changed too much, and went whole.
        public var overflows: UInt64 = 0

        public init() {}
    }

    /// What the guest's standstill was made of, in nanoseconds, in order; they add up to the whole.
    public struct Downtime: Sendable, Equatable {
        public var parts: [(name: String, nanoseconds: UInt64)] = []
        public var nanoseconds: UInt64 { parts.reduce(0) { $0 + $1.nanoseconds } }

        public init() {}
        public static func == (a: Self, b: Self) -> Bool {
            a.parts.map(\.name) == b.parts.map(\.name) && a.parts.map(\.nanoseconds) == b.parts.map(\.nanoseconds)
        }
    }

    /// How long threads stood still for pages of postcopy: all vCPUs at once, each vCPU, and all that are none.
    public struct BlockTime: Sendable, Equatable {
        /// Waits that are over.
        public struct Sum: Sendable, Equatable {
            public private(set) var count: UInt64 = 0
            public private(set) var nanoseconds: UInt64 = 0

            public init() {}

            mutating func add(_ nanoseconds: UInt64) {
                count += 1
                self.nanoseconds += nanoseconds
            }

            /// 0 of none.
            public var meanNanoseconds: UInt64 { count == 0 ? 0 : nanoseconds / count }
        }

        public var allNanoseconds: UInt64
        public var cpus: [Sum]
        public var others: Sum
    }

    /// What was given back of a guest that moved before its memory.
    public struct SafetyNet: Sendable, Equatable {
        /// Epochs that the source has whole, the pages and bytes of those that were taken (the source: that it has).
        public var epochs: UInt64 = 0
        public var pages: UInt64 = 0
        public var bytes: UInt64 = 0
        /// How long the guest stood still for them, and for one at most; 0 at the source.
        public var pausedNanoseconds: UInt64 = 0
        public var longestPauseNanoseconds: UInt64 = 0
        /// The guest cannot be taken back any more.
        public var isOver = false

        public init() {}

        mutating func add(pages: UInt64, bytes: UInt64, paused: UInt64) {
            self.pages += pages
            self.bytes += bytes
            pausedNanoseconds += paused
            longestPauseNanoseconds = max(longestPauseNanoseconds, paused)
        }
    }

    /// A switchover that would have broken the downtime limit: the guest ran on at the source.
    public struct BrokenAttempt: Sendable, Equatable {
        public var switchover: BrokenSwitchover
        public var parts: Downtime
    }

    public enum Direction: String, Sendable { case outgoing, incoming }

    public var status: MigrationStatus = .none
    /// `nil` before any migration.
    public var direction: Direction?
    public var ram: RAM?
    /// With the capability `xbzrle`, at the source.
    public var xbzrle: XBZRLE?
    public var totalNanoseconds: UInt64?
    public var setupNanoseconds: UInt64?
    public var expectedDowntimeNanoseconds: UInt64?
    public var downtime: Downtime?
    /// How many switchovers were broken off, the longest standstill among them, and the last of them.
    public var brokenSwitchovers: UInt64 = 0
    public var longestBrokenNanoseconds: UInt64 = 0
    public var brokenAttempts: [BrokenAttempt] = []
    public static let brokenAttemptsKept = 16
    /// Times that a new connection took the migration up (`x-resumable`), and the pages that were sent again because it was not known
    /// that they had arrived.
    public var resumptions: UInt64 = 0
    public var repeatedPages: UInt64 = 0
    /// At the destination: how long pages took that the guest waited for. `nil` before the first.
    public var pageLatency: LatencyHistogram?
    /// At the source of such a guest: from when a request was read until its page had left. `nil` before the first.
    public var serviceTime: LatencyHistogram?
    /// With the capability `x-postcopy-safety-net`, once the guest may move; on both sides.
    public var safetyNet: SafetyNet?
    /// With the capability `postcopy-blocktime`.
    public var blockTime: BlockTime?
    /// At the destination, after postcopy: the share of allocated RAM that huge pages stand behind, 0 to 1, once what arrived in pages of
    /// 4 KiB was made huge again.
    public var hugeShare: Double?
    /// How long a destination in state `x-paused` still waits for its source.
    public var keptNanoseconds: UInt64?
    /// One sentence: why it failed or is paused, or what an operator must settle.
    public var errorDescription: String?
    /// How the right to run passed on.
    public var rule: HandoverRule?
    /// `log` or `ring`: how written pages were found.
    public var dirtyTracking: String?
    /// CPU time spent on finding them.
    public var trackingCPUNanoseconds: UInt64?
    /// What the guest is throttled to, in percent of its time; `nil` while it is not (`cpu-throttle-percentage`).
    public var throttlePercentage: UInt64?
    /// How long a vCPU is kept from running while it fills its ring, and how long it takes for that (`dirty-limit-...`).
    public var dirtyLimitThrottleMicroseconds: UInt64?
    public var dirtyLimitRingFullMicroseconds: UInt64?
    /// Whether it gets to its end; `nil` but while rounds are sent.
    public var verdict: ConvergenceVerdict?
    /// Where an incoming migration is waited for.
    public var listening: [ListeningAddress] = []

    public init() {}
}

/// One address of `socket-address`.
public enum ListeningAddress: Sendable, Equatable {
    case inet(host: String, port: String)
    case unix(path: String)
}

/// A command that does not fit what is going on, or has a wrong argument: one sentence.
public struct MigrationError: Error, Sendable, Equatable, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}

/// What a migration tells those who watch.
public enum MigrationEvent: Sendable, Equatable {
    /// `MIGRATION`.
    case status(MigrationStatus)
    /// `MIGRATION_PASS`: the dirty pages are collected for the n-th time.
    case pass(UInt64)
    /// Something worth a line in the log that changes no status: a stranger who was turned away.
    case notice(String)
}
