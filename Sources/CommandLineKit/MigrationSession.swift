import Host
public import QMP

/// One migration as its operator sees it: start, watch, cancel, end. Everything goes through the source's QMP socket.
public struct MigrationSession {
    /// What is set before the start; `nil` leaves what the VM has.
    public struct Settings: Sendable {
        public var downtime: TimeSpan?
        public var bandwidthBytesPerSecond: UInt64?
        /// The id of TLS credentials, and the name the destination's certificate must have; empty for none.
        public var tlsCredentials: String?
        public var tlsHostname: String?
        /// Stop in `pre-switchover` until somebody says `migrate-continue`; false leaves what the VM has.
        public var holdsBeforeSwitchover = false
        /// Channels for pages besides the main one; 0 for none.
        public var channels: Int?
        /// Throttle the guest while it writes too much (`auto-converge`); false leaves what the VM has.
        public var throttlesGuest = false
        /// `zlib`, `zstd`, `xbzrle` or `none`.
        public var compression: String?
        /// Let a lost connection pause the migration (`x-resumable`); false leaves what the VM has.
        public var isResumable = false
        /// Go on with a migration that is paused.
        public var resumes = false
        /// Pages get places of their own in a file (`mapped-ram`), and what does not fit that is turned off; false leaves what the VM has.
        public var mapsRAM = false
        /// A file is written in one go, as pages are, and nobody answers.
        private static let unfitForFiles = ["x-resumable", "x-verify", "xbzrle"]
        /// All that is set with ``mapsRAM``, for those who set it back.
        public static let setForFiles = (
            capabilities: ["mapped-ram", "multifd"] + unfitForFiles,
            parameters: [
                "downtime-limit", "max-bandwidth", "multifd-channels", "direct-io", "multifd-compression", "tls-creds",
            ]
        )
        /// With it: past the host's page cache.
        public var usesDirectIO: Bool?
        /// The guest moves before its memory (`postcopy-ram`); `nil`: it does not.
        public var postcopy: PostcopyStart?
        /// With it: pages that it asks for come over a channel of their own (`postcopy-preempt`).
        public var preempts = false

        public init() {}

        /// Sets all of this but for what goes with `migrate` itself.
        func apply(to client: QMPClient) throws(QMPClientError) {
            var parameters: [String: JSON] = [:]
            if let downtime {
                // Whole milliseconds, and never less than was allowed.
                parameters["downtime-limit"] = JSON((downtime.nanoseconds &+ 999_999) / 1_000_000)
            }
            if let bandwidthBytesPerSecond { parameters["max-bandwidth"] = JSON(bandwidthBytesPerSecond) }
            if let channels, channels > 0 { parameters["multifd-channels"] = JSON(channels) }
            if let usesDirectIO { parameters["direct-io"] = .bool(usesDirectIO) }
            if let tlsCredentials { parameters["tls-creds"] = .string(tlsCredentials) }
            if let tlsHostname { parameters["tls-hostname"] = .string(tlsHostname) }
            var capabilities: [JSON] = []
            if let compression {
                parameters["multifd-compression"] = .string(compression == "xbzrle" ? "none" : compression)
                capabilities.append(["capability": "xbzrle", "state": .bool(compression == "xbzrle")])
            }
            if let channels { capabilities.append(["capability": "multifd", "state": .bool(channels > 0)]) }
            if mapsRAM {
                capabilities.append(["capability": "mapped-ram", "state": true])
                capabilities += Self.unfitForFiles.map { ["capability": .string($0), "state": false] }
                parameters["multifd-compression"] = "none"
                parameters["tls-creds"] = ""
            }
            if throttlesGuest { capabilities.append(["capability": "auto-converge", "state": true]) }
            if isResumable { capabilities.append(["capability": "x-resumable", "state": true]) }
            // First: while a migration is under way they are refused, and it keeps its limits.
            if !capabilities.isEmpty {
                try client.execute("migrate-set-capabilities", ["capabilities": .array(capabilities)])
            }
            if !parameters.isEmpty { try client.execute("migrate-set-parameters", .object(parameters)) }
        }
    }

    /// How often the VM is asked.
    static let intervalMilliseconds: UInt64 = 50

    private let client: QMPClient
    private var display: MigrationDisplay
    private let isInterrupted: () -> Bool

    /// - Parameter isInterrupted: whether the operator wants the migration cancelled.
    public init(client: QMPClient, display: MigrationDisplay, isInterrupted: @escaping () -> Bool = { false }) {
        self.client = client
        self.display = display
        self.isInterrupted = isInterrupted
    }

    /// Migrates to `uri` and waits for the end. - Returns: the last answer to `query-migrate`, whatever it says.
    /// - Throws: `QMPClientError` if the VM refuses or does not answer, `CommandFailure` for a descriptor we do not have.
    public mutating func run(to uri: String, _ settings: Settings = Settings()) throws -> JSON {
        try settings.apply(to: client)
        var arguments: [String: JSON] = ["uri": .string(try passDescriptor(of: uri))]
        if settings.resumes { arguments["resume"] = true }
        // Part of the command, and no capability: nobody need turn it off again, whoever sees this migration's end.
        if settings.holdsBeforeSwitchover { arguments["x-hold"] = true }
        if settings.postcopy != nil { try allowPostcopy(true, settings) }
        // The next migration shall be as it is told to be. One that is under way still, paused or in doubt, keeps what it began with:
        // there it is refused, which is no news.
        defer { if settings.postcopy != nil { try? allowPostcopy(false, settings) } }
        try client.execute("migrate", .object(arguments))
        defer { display.finish() }
        return try watch(settings)
    }

    private func allowPostcopy(_ on: Bool, _ settings: Settings) throws(QMPClientError) {
        let list = PostcopyStart.capabilities(on, preempts: settings.preempts)
        try client.execute("migrate-set-capabilities", ["capabilities": list])
    }

    /// `fd:N` means a descriptor of this process: the VM is given it, under a name of its own.
    private func passDescriptor(of uri: String) throws -> String {
        guard uri.hasPrefix("fd:"), let number = Int32(uri.dropFirst(3)) else { return uri }
        let name = "godwit-migrate-\(number)"
        let descriptor: Descriptor
        do {
            descriptor = try Descriptor.standard(number, name: "descriptor \(number)")
        } catch {
            throw CommandFailure("migration address \"\(uri)\": this process has no descriptor \(number)")
        }
        try client.execute("getfd", ["fdname": .string(name)], passing: descriptor)
        return "fd:\(name)"
    }

    /// The guest is to move, unless precopy comes to its end first.
    private func startPostcopy(_ start: PostcopyStart, _ reading: MigrationReading) throws(QMPClientError) -> Bool {
        guard start.isDue(reading) else { return false }
        do throws(QMPClientError) { try client.execute("migrate-start-postcopy") } catch {
            guard case .refused = error else { throw error }
            return false
        }
        display.note("the guest moves now, its memory follows")
        return true
    }

    private mutating func watch(_ settings: Settings) throws -> JSON {
        var start = settings.postcopy
        var wasCancelled = false
        var wasHeld = false
        let begun = Deadline.after(seconds: 5)
        while true {
            let answer = try client.execute("query-migrate")
            let reading = MigrationReading(answer)
            // A migration that was just begun has no status yet; one that never gets any is none.
            if reading.status != "none" { display.show(reading, at: Clock.monotonicNanoseconds) }
            if reading.isOver || (reading.status == "none" && begun.hasPassed) { return answer }
            if reading.status == "pre-switchover", !wasHeld {
                wasHeld = true
                display.note("held before the switchover; go on with 'godwit migrate NAME --proceed'")
            }
            if let due = start, try startPostcopy(due, reading) { start = nil }
            if isInterrupted(), !wasCancelled {
                wasCancelled = true
                if reading.status.hasPrefix("postcopy-") {
                    display.note("too late to cancel: the guest moved, and nobody has all of its memory yet")
                } else {
                    display.note("cancelling the migration")
                    try client.execute("migrate_cancel")
                }
            }
            do throws(QMPClientError) {
                try client.waitForEvent("MIGRATION", deadline: .after(milliseconds: Self.intervalMilliseconds))
            } catch {
                guard case .timedOut = error else { throw error }
            }
        }
    }
}
