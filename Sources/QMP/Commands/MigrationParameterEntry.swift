import Migration

/// One migration parameter that QEMU knows, and what it is here.
struct MigrationParameterEntry: Sendable {
    enum Meaning: Sendable {
        /// A number we have.
        case setting(any WritableKeyPath<MigrationParameters, UInt64> & Sendable)
        /// A switch we have.
        case flag(any WritableKeyPath<MigrationParameters, Bool> & Sendable)
        /// A text we have; null stands for the empty one.
        case text(any WritableKeyPath<MigrationParameters, String> & Sendable)
        /// One of several names: those we have. The others that the parameter's kind lists are known, and refused.
        case choice([String], any WritableKeyPath<MigrationParameters, String> & Sendable)
        /// The value by which QEMU's default says "not used", and what using it would need.
        case off(JSON, String)
        /// As `off`, and not listed as long as it is not set.
        case absent(JSON, String)
    }

    let name: String
    let kind: Parameter.Kind
    let meaning: Meaning

    var parameter: Parameter { .optional(name, kind) }

    private init(_ name: String, _ kind: Parameter.Kind, _ meaning: Meaning) {
        self.name = name
        self.kind = kind
        self.meaning = meaning
    }

    /// Those of QEMU 7.2, and what QEMU 8 to 10 added. Names, types and defaults: `qapi/migration.json`.
    static let all: [MigrationParameterEntry] = ours + announcing + throttling + compressing + channels + rest

    private static let ours = [
        MigrationParameterEntry("downtime-limit", .unsigned(bits: 64), .setting(\.downtimeLimitMilliseconds)),
        MigrationParameterEntry("max-bandwidth", .unsigned(bits: 64), .setting(\.maxBandwidthBytesPerSecond)),
        MigrationParameterEntry(
            "max-postcopy-bandwidth", .unsigned(bits: 64), .setting(\.maxPostcopyBandwidthBytesPerSecond)),
        MigrationParameterEntry("x-postcopy-channels", .unsigned(bits: 8), .setting(\.postcopyChannels)),
        MigrationParameterEntry(
            "x-page-latency-target", .unsigned(bits: 32), .setting(\.pageLatencyTargetMicroseconds)),
        MigrationParameterEntry("x-postcopy-epoch", .unsigned(bits: 32), .setting(\.postcopyEpochMilliseconds)),
        MigrationParameterEntry("x-postcopy-prefetch", .bool, .flag(\.prefetchesPostcopy)),
        MigrationParameterEntry(
            "avail-switchover-bandwidth", .unsigned(bits: 64), .setting(\.availableSwitchoverBytesPerSecond)),
        MigrationParameterEntry("multifd-channels", .unsigned(bits: 8), .setting(\.multifdChannels)),
        MigrationParameterEntry(
            "zero-page-detection", .enumeration(ZeroPageDetection.allCases.map(\.rawValue)),
            .choice(ZeroPageDetection.allCases.map(\.rawValue), \.zeroPageDetection)),
        MigrationParameterEntry(
            "x-multifd-flush-after-each-section", .bool, .flag(\.flushesMultifdAfterEachSection)),
        MigrationParameterEntry("tls-creds", .stringOrNull, .text(\.tlsCredentials)),
        MigrationParameterEntry("tls-hostname", .stringOrNull, .text(\.tlsHostname)),
        MigrationParameterEntry("tls-authz", .stringOrNull, .text(\.tlsAuthorization)),
    ]

    private static func numbers(_ feature: String, _ defaults: [(String, Int, Int64)]) -> [MigrationParameterEntry] {
        defaults.map { name, bits, value in
            MigrationParameterEntry(name, .unsigned(bits: bits), .off(.integer(value), feature))
        }
    }

    private static let announcing = numbers(
        "announcing a network card",
        [
            ("announce-initial", 64, 50), ("announce-max", 64, 550), ("announce-rounds", 64, 5),
            ("announce-step", 64, 100),
        ])

    private static let throttling = [
        MigrationParameterEntry(
            "throttle-trigger-threshold", .unsigned(bits: 8), .setting(\.autoConverge.triggerThreshold)),
        MigrationParameterEntry("cpu-throttle-initial", .unsigned(bits: 8), .setting(\.autoConverge.initial)),
        MigrationParameterEntry("cpu-throttle-increment", .unsigned(bits: 8), .setting(\.autoConverge.increment)),
        MigrationParameterEntry("max-cpu-throttle", .unsigned(bits: 8), .setting(\.autoConverge.maximum)),
        MigrationParameterEntry("cpu-throttle-tailslow", .bool, .flag(\.autoConverge.isTailSlow)),
        MigrationParameterEntry(
            "x-vcpu-dirty-limit-period", .unsigned(bits: 64), .setting(\.vcpuDirtyLimitPeriodMilliseconds)),
        MigrationParameterEntry("vcpu-dirty-limit", .unsigned(bits: 64), .setting(\.vcpuDirtyLimitMegabytes)),
    ]

    private static let compressing =
        numbers(
            "compression of pages",
            [("compress-level", 8, 1), ("compress-threads", 8, 8), ("decompress-threads", 8, 2)])
        + [MigrationParameterEntry("xbzrle-cache-size", .unsigned(bits: 64), .setting(\.xbzrleCacheBytes))]
        + [MigrationParameterEntry("compress-wait-thread", .bool, .off(true, "compression of pages"))]

    private static let channels =
        numbers(
            "sending over several channels (multifd)",
            [("multifd-qatzip-level", 8, 1)])
        + [
            MigrationParameterEntry(
                "multifd-compression", .enumeration(["none", "zlib", "zstd", "qatzip", "qpl", "uadk"]),
                .choice(MigrationParameters.compressionNames, \.compressionName)),
            MigrationParameterEntry("multifd-zlib-level", .unsigned(bits: 8), .setting(\.zlibLevel)),
            MigrationParameterEntry("multifd-zstd-level", .unsigned(bits: 8), .setting(\.zstdLevel)),
        ]

    private static let rest =
        numbers("COLO", [("x-checkpoint-delay", 32, 20000)])
        + [
            MigrationParameterEntry("block-incremental", .bool, .off(false, "copying disks")),
            MigrationParameterEntry("direct-io", .bool, .flag(\.usesDirectIO)),
            MigrationParameterEntry(
                "mode", .enumeration(["normal", "cpr-reboot", "cpr-transfer", "cpr-exec"]),
                .off("normal", "a checkpoint-restart (CPR) mode")),
            MigrationParameterEntry("block-bitmap-mapping", .list(.any), .absent([], "moving dirty bitmaps of disks")),
            MigrationParameterEntry("cpr-exec-command", .list(.string), .absent([], "a checkpoint-restart (CPR) mode")),
        ]
}
