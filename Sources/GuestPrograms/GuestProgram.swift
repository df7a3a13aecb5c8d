/// A built-in guest and its parameters: what `godwit run --guest` names.
///
/// The room in short: ``init(parsing:)`` turns `dirty,working-set=1G,rate=800M,random` into a value;
/// ``image(memoryBytes:lowMemoryBytes:cpus:tscKilohertz:)`` makes the bytes a VMM loads; ``GuestChecker``, ``GuestStatus`` and
/// ``GuestHistogram`` read the memory of a stopped guest. The programs themselves are `Guests/*.s`.
public struct GuestProgram: Equatable, Sendable {
    /// What the guest does once its memory is filled.
    public enum Kind: UInt64, CaseIterable, Sendable {
        /// Sleeps, with heartbeats.
        case idle = 0
        /// Writes one word in each page of the working set, pass after pass.
        case dirty = 1
        /// Times its own accesses to the pages of the working set.
        case probe = 2

        /// The name on the command line.
        public var name: String {
            switch self {
            case .idle: "idle"
            case .dirty: "dirty"
            case .probe: "probe"
            }
        }
    }

    /// How much memory the guest fills before it works, from its first free page upwards.
    public enum Fill: Equatable, Sendable {
        /// Nothing; a `dirty` guest still fills its working set.
        case none
        /// This many bytes, a multiple of 4 KiB; a `dirty` guest fills at least its working set.
        case bytes(UInt64)
        /// All RAM from 1 MiB up, except the guest's page tables.
        case all
    }

    /// In which order a pass walks the working set.
    public enum Order: Equatable, Sendable {
        /// Ascending addresses.
        case sequential
        /// A permutation which differs from pass to pass and from vCPU to vCPU.
        case random
    }

    public var kind: Kind
    public var fill: Fill = .all
    /// Words of a filled page that are not zero, 1 to 512.
    public var wordsPerPage: UInt64 = 2
    /// Time between heartbeats on the UART; 0: none.
    public var heartbeatNanoseconds: UInt64 = 10_000_000
    /// Size of the working set, a multiple of 4 KiB; nil: what is filled, or with nothing filled all RAM. It is the end of
    /// what the guest uses, so that a migration sends it last.
    public var workingSetBytes: UInt64?
    /// Bytes of pages touched per second by all vCPUs together; nil: as fast as they can.
    public var rateBytesPerSecond: UInt64?
    public var order: Order
    /// Pages from one touched page to the next; 1 touches all.
    public var stridePages: UInt64 = 1
    /// Whether a `probe` writes the pages it times; it reads them otherwise.
    public var probeWrites = false
    /// Varies the random order and the noise in the pages.
    public var seed: UInt64 = 1

    /// A guest with default parameters: everything filled, 10 ms heartbeat, no rate limit; `probe` random, others sequential.
    public init(_ kind: Kind) {
        self.kind = kind
        self.order = kind == .probe ? .random : .sequential
    }

    /// Whether the guest's work leaves traces in the pages it touches.
    var writesPages: Bool {
        kind == .dirty || (kind == .probe && probeWrites)
    }
}
