public import Compression

/// The numbers of a migration, by QEMU's names (`migrate-set-parameters`).
public struct MigrationParameters: Sendable, Equatable {
    /// `downtime-limit`, milliseconds: how long the guest may stand still. At most 2,000,000.
    public var downtimeLimitMilliseconds: UInt64 = 300
    /// `max-bandwidth`, bytes per second; 0: as fast as the transport goes (QEMU starts with 128 MiB/s).
    public var maxBandwidthBytesPerSecond: UInt64 = 0
    /// `avail-switchover-bandwidth`, bytes per second to count on for the last part; 0: what was measured.
    public var availableSwitchoverBytesPerSecond: UInt64 = 0

    /// `max-postcopy-bandwidth`, bytes per second of pages that a guest which moved did not ask for; those that it did never wait. 0: as
    /// fast as the transport goes.
    public var maxPostcopyBandwidthBytesPerSecond: UInt64 = 0

    /// `x-postcopy-channels`, with the capability `postcopy-preempt`: channels for requested pages to a Godwit, 1 to 16.
    public var postcopyChannels: UInt64 = 1

    /// `x-page-latency-target`, microseconds: so much of the link's time may be taken by what nobody asked for, in front of a page of
    /// postcopy that somebody waits for. 0: nobody looks.
    public var pageLatencyTargetMicroseconds: UInt64 = 200

    /// `x-postcopy-prefetch`: pages that requests of postcopy lead to go in front of the others that nobody asked for.
    public var prefetchesPostcopy = true

    /// `x-postcopy-epoch`, milliseconds, with the capability `x-postcopy-safety-net`, at the destination: so often what the guest changed goes back
    /// to its source. 1 to 10,000.
    public var postcopyEpochMilliseconds: UInt64 = 50

    /// `xbzrle-cache-size`, bytes: how much of what was sent is kept to compare with. A power of two, at least 4096.
    public var xbzrleCacheBytes: UInt64 = 64 << 20
    /// `multifd-channels`, with the capability `multifd`: channels besides the main one, 1 to 64.
    public var multifdChannels: UInt64 = 2
    /// What `zero-page-detection` was set to; `nil`: `multifd` where pages go over several channels to a Godwit, else `legacy`.
    public var chosenZeroPageDetection: ZeroPageDetection?
    /// `x-multifd-flush-after-each-section`: what QEMU 8.0 and older want as a destination of several channels.
    public var flushesMultifdAfterEachSection = false

    /// `direct-io`, with the capability `mapped-ram`: pages go past the host's page cache.
    public var usesDirectIO = false

    /// `zero-page-detection` as it is told; setting it chooses.
    public var zeroPageDetection: String {
        get { (chosenZeroPageDetection ?? .legacy).rawValue }
        set { chosenZeroPageDetection = ZeroPageDetection(rawValue: newValue) }
    }
    /// `tls-creds`: the id of the credentials that every channel uses; empty: plaintext.
    public var tlsCredentials = ""
    /// `tls-hostname`: the name a destination's certificate must have; empty: the host of the address.
    public var tlsHostname = ""
    /// `tls-authz`: the id of the list of sources that may come; empty: all with good credentials.
    public var tlsAuthorization = ""
    /// `throttle-trigger-threshold`, `cpu-throttle-initial`, `cpu-throttle-increment`, `max-cpu-throttle`, `cpu-throttle-tailslow`.
    public var autoConverge = AutoConverge.Settings()
    /// `vcpu-dirty-limit`, 2^20 bytes per second: what each vCPU may dirty, with the capability `dirty-limit`.
    public var vcpuDirtyLimitMegabytes: UInt64 = 1
    /// `x-vcpu-dirty-limit-period`, milliseconds: so long are the periods after two of which the limit is set.
    public var vcpuDirtyLimitPeriodMilliseconds: UInt64 = 1000

    /// `multifd-compression`, with the capability `multifd`: what the channels' packets are compressed with; `nil`: nothing.
    public var compression: CompressionMethod?
    /// `multifd-zlib-level`, 0 to 9, and `multifd-zstd-level`, 0 to 20.
    public var zlibLevel: UInt64 = 1
    public var zstdLevel: UInt64 = 1

    /// `multifd-compression` as it is told; setting it chooses.
    public var compressionName: String {
        get { compression?.rawValue ?? Self.noCompression }
        set { compression = CompressionMethod(rawValue: newValue) }
    }

    /// What `multifd-compression` may be.
    public static let compressionNames = [noCompression] + CompressionMethod.allCases.map(\.rawValue)
    private static let noCompression = "none"

    /// `max-bandwidth`; `nil`: as fast as the transport goes.
    var bandwidthLimit: UInt64? { maxBandwidthBytesPerSecond > 0 ? maxBandwidthBytesPerSecond : nil }

    public static let longestDowntimeLimit: UInt64 = 2_000_000

    public init() {}
}

extension MigrationParameters {
    /// The first value that is out of range, as a sentence.
    var throttlingMistake: String? {
        let settings = autoConverge
        let ranges: [(name: String, value: UInt64, range: ClosedRange<UInt64>)] = [
            ("throttle-trigger-threshold", settings.triggerThreshold, 1...100),
            ("cpu-throttle-initial", settings.initial, 1...99),
            ("cpu-throttle-increment", settings.increment, 1...99),
            ("max-cpu-throttle", settings.maximum, min(settings.initial, 99)...99),
            ("vcpu-dirty-limit", vcpuDirtyLimitMegabytes, 1...UInt64(Int64.max) >> 20),
            ("x-vcpu-dirty-limit-period", vcpuDirtyLimitPeriodMilliseconds, 1...1000),
        ]
        for entry in ranges where !entry.range.contains(entry.value) {
            return "\(entry.name) \(entry.value): possible are \(entry.range.lowerBound) to \(entry.range.upperBound)"
        }
        return nil
    }
}
