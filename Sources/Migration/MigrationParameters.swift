/// The numbers of a migration, by QEMU's names (`migrate-set-parameters`).
public struct MigrationParameters: Sendable, Equatable {
    /// `downtime-limit`, milliseconds: how long the guest may stand still. At most 2,000,000.
    public var downtimeLimitMilliseconds: UInt64 = 300
    /// `max-bandwidth`, bytes per second; 0: as fast as the transport goes (QEMU starts with 128 MiB/s).
    public var maxBandwidthBytesPerSecond: UInt64 = 0
    /// `avail-switchover-bandwidth`, bytes per second to count on for the last part; 0: what was measured.
    public var availableSwitchoverBytesPerSecond: UInt64 = 0

    /// `xbzrle-cache-size`, bytes: how much of what was sent is kept to compare with. A power of two, at least 4096.
    public var xbzrleCacheBytes: UInt64 = 64 << 20

    public static let longestDowntimeLimit: UInt64 = 2_000_000

    public init() {}
}
