import ArgumentParser
import CommandLineKit
import Host
import QMP
import Transport

struct Migrate: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Move a running VM to a VM that waits for it.",
        discussion: """
            Shows the migration while it goes on, then a report. The exit status is 0 only if it was completed. Ctrl-C \
            cancels it, and the guest runs on here. Afterwards the source stays, stopped, until 'godwit quit'.
            """)

    enum Verdict: String, ExpressibleByArgument, CaseIterable {
        case askDestination = "ask-destination"
        case startedThere = "started-there"
        case resumeHere = "resume-here"
    }

    @OptionGroup var target: VMArgument

    @Argument(help: "Where to: tcp:HOST:PORT, unix:PATH, fd:N, exec:COMMAND or file:PATH[,offset=N].")
    var uri: String?

    @Option(
        help: ArgumentHelp("How long the guest may stand still, such as 300ms.", valueName: "time"),
        transform: { try TimeSpan($0) })
    var downtime: TimeSpan?

    @Option(
        help: ArgumentHelp("The most bytes to send per second, such as 1G; 0 for no limit.", valueName: "size"),
        transform: { try ByteSize($0) })
    var bandwidth: ByteSize?

    @Option(help: "Send pages over so many channels besides the main one, 1 to 64, with tcp: or unix:; 0 for none.")
    var channels: Int?
    @Option(
        help: ArgumentHelp(
            "Encrypt, with the credentials of this id (godwit run --object, QMP object-add); '' for plaintext.",
            valueName: "id"))
    var tls: String?

    @Option(
        help: ArgumentHelp(
            "The name that the destination's certificate must have, if not the host of the address.", valueName: "name")
    )
    var tlsHostname: String?

    enum Compression: String, ExpressibleByArgument, CaseIterable { case none, zlib, zstd, xbzrle }

    @Option(help: "Compress pages: zlib or zstd on the --channels; xbzrle sends what changed of pages sent before.")
    var compress: Compression?

    @Flag(help: "Print the last query-migrate answer as JSON instead of a report.")
    var json = false

    @Flag(help: "End the source's process once the guest runs at the destination.")
    var quitSource = false

    @Flag(help: "Stop before the switchover, until 'godwit migrate NAME --proceed'.")
    var hold = false

    @Option(
        help: ArgumentHelp(
            "Move the guest before its memory: after=N rounds (0: at once), or once the migration is stalled.",
            valueName: "when"),
        transform: { try PostcopyStart($0) })
    var postcopy: PostcopyStart?

    @Flag(
        help: "With --postcopy: pages that the guest asks for come over a connection of their own; set it there, too.")
    var preempt = false

    @Flag(help: "Watch the guest for 2 s, predict the migration, move nothing; status 3 if it would not converge.")
    var dryRun = false

    @Flag(help: "Throttle the guest, more and more, as long as it writes too much to be moved.")
    var autoConverge = false

    @Flag(help: "A connection that is lost pauses the migration, to a Godwit; go on with --resume.")
    var resumable = false

    @Flag(help: "Go on with a migration that is paused, over a new connection to the address given.")
    var resume = false

    @Flag(help: "Let a migration that was held go on.")
    var proceed = false

    @Flag(help: "Cancel the migration that is under way.")
    var cancel = false

    @Option(help: "Settle a migration that ended in doubt: ask its destination, or say what happened.")
    var settle: Verdict?

    func validate() throws {
        if dryRun, !proceed, !cancel, settle == nil, uri == nil { return }
        guard [uri != nil, proceed, cancel, settle != nil].count(where: \.self) == 1 else {
            throw ValidationError("Give one of: where to migrate to, --dry-run, --proceed, --cancel, --settle.")
        }
        if dryRun, uri == nil { throw ValidationError("--dry-run goes with an address or alone.") }
        if preempt, postcopy == nil { throw ValidationError("--preempt goes with --postcopy.") }
        if resume, uri == nil { throw ValidationError("--resume goes with an address.") }
        guard let uri else { return }
        let others = [
            resumable, hold, channels != nil, compress != nil, autoConverge, tls != nil, tlsHostname != nil, dryRun,
            postcopy != nil,
        ]
        if resume, others.contains(true) {
            throw ValidationError("--resume goes on as the migration began: leave other settings out.")
        }
        guard channels.map({ (0...64).contains($0) }) ?? true else {
            throw ValidationError("--channels: give a number from 0 to 64.")
        }
        switch compress {
        case .zlib, .zstd:
            guard channels ?? 0 > 0 else {
                throw ValidationError("--compress zlib and zstd work on several channels: give --channels, too.")
            }
        case .xbzrle:
            guard channels ?? 0 == 0 else { throw ValidationError("--compress xbzrle works without --channels.") }
        case nil, .some(.none): break
        }
        do { _ = try MigrationAddress(uri) } catch { throw ValidationError(error.description) }
    }

    func run() throws {
        if dryRun {
            try predict()
        } else if let settle {
            try target.execute("x-migrate-settle", ["verdict": .string(settle.rawValue)])
        } else if proceed {
            try target.execute("migrate-continue", ["state": "pre-switchover"])
        } else if cancel {
            try target.execute("migrate_cancel")
        } else if let uri {
            try migrate(to: uri)
        }
    }

    /// The status of a guest that would not converge: neither a failure nor a success.
    private static let divergingStatus: Int32 = 3

    private func predict() throws {
        var arguments: [String: JSON] = [:]
        if let uri { arguments["uri"] = .string(uri) }
        let client = try target.vm.connect()
        if let bandwidth, bandwidth.bytes > 0 { arguments["bandwidth"] = JSON(bandwidth.bytes) }
        if let downtime { arguments["downtime-limit"] = JSON((downtime.nanoseconds &+ 999_999) / 1_000_000) }
        if autoConverge { arguments["auto-converge"] = true }
        let answer: JSON
        do {
            answer = try client.execute("x-migrate-dry-run", .object(arguments), deadline: .after(seconds: 120))
        } catch QMPClientError.refused(let error) {
            throw CommandFailure("VM \(target.vm): \(error)")
        }
        let reading = DryRunReading(answer)
        Terminal.output.write(json ? answer.prettyDescription + "\n" : reading.text(of: "\(target.vm)"))
        if !reading.converges { throw ExitCode(Self.divergingStatus) }
    }

    private func migrate(to uri: String) throws {
        let interruption = try SignalWatch.startFlag()
        let client = try target.vm.connect()
        var settings = MigrationSession.Settings()
        settings.downtime = downtime
        settings.bandwidthBytesPerSecond = bandwidth?.bytes
        settings.holdsBeforeSwitchover = hold
        settings.channels = channels
        settings.tlsCredentials = tls
        settings.tlsHostname = tlsHostname
        settings.throttlesGuest = autoConverge
        settings.compression = compress?.rawValue
        settings.isResumable = resumable
        settings.resumes = resume
        settings.postcopy = postcopy
        settings.preempts = preempt
        var session = MigrationSession(client: client, display: MigrationDisplay(on: .error)) { interruption.isRaised }
        let answer: JSON
        do {
            answer = try session.run(to: uri, settings)
        } catch QMPClientError.refused(let error) {
            throw CommandFailure("VM \(target.vm): \(error)")
        }
        let reading = MigrationReading(answer)
        if json {
            Terminal.output.write(answer.prettyDescription + "\n")
        } else if reading.status == "completed" {
            Terminal.output.write(MigrationReport(reading, showsColors: Terminal.output.showsColors).text)
        }
        try reading.requireCompletion(of: "\(target.vm)", to: uri)
        if quitSource { try client.execute("quit") }
    }
}
