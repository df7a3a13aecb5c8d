import ArgumentParser
import CommandLineKit
import Host
import QMP
import Transport

struct Save: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Save a VM into a file, from which 'godwit run --restore FILE' goes on.",
        discussion: """
            The guest runs while most of its memory is written, and stands still for what it wrote meanwhile. Then it is \
            saved, and stopped for good here: end the process with 'godwit quit' (or --quit). When saving fails or is \
            cancelled (Ctrl-C), the guest runs on, and the file is as it was: until all is written the VM is saved into \
            another one beside it, FILE.….partial. Every page has a place of its own in the file (QEMU's mapped-ram): it is never larger than the \
            VM's memory and state.
            """)

    @OptionGroup var target: VMArgument

    @Argument(
        help:
            "The file: PATH[,offset=N]. With an offset it is written in place, and what is in it behind the offset is lost.",
        completion: .file())
    var file: String

    @Flag(help: "Write past the host's page cache, where the file system can.")
    var directIO = false

    @Option(help: "Write pages by so many threads, 1 to 64; 0 for none beside the migration's own.")
    var channels = 2

    @Option(
        help: ArgumentHelp("The most bytes to write per second, such as 1G; 0 for no limit.", valueName: "size"),
        transform: { try ByteSize($0) })
    var bandwidth: ByteSize?

    @Flag(help: "Print the last query-migrate answer as JSON instead of a report.")
    var json = false

    @Flag(help: "End the VM's process once it is saved.")
    var quit = false

    private var uri: String { "file:\(file)" }

    func validate() throws {
        guard (0...64).contains(channels) else { throw ValidationError("--channels: give a number from 0 to 64.") }
        do { _ = try MigrationAddress(uri) } catch { throw ValidationError(error.description) }
    }

    /// Where the VM is to write, and what that file is called afterwards; `nil` where it is the same file.
    private func places() throws -> (address: MigrationAddress, partial: String?, final: String) {
        guard case .file(let path, let offset) = try MigrationAddress(uri) else { return (try .init(uri), nil, file) }
        // The VM's process may be in another folder.
        let absolute = try FilePath.absolute(path)
        let final = FilePath.resolved(absolute) ?? absolute
        // What is neither a file nor missing is refused by the VM, in a sentence of its own.
        guard offset == 0, FilePath.isRegularFile(final) || FilePath.resolved(final) == nil else {
            return (.file(path: final, offset: offset), nil, final)
        }
        // A name that nobody else saves to, and nobody can lay a link under beforehand.
        let partial = "\(final).\(String(UInt64.random(in: .min ... .max), radix: 16)).partial"
        return (.file(path: partial, offset: 0), partial, final)
    }

    func run() throws {
        let places = try places()
        let interruption = try SignalWatch.startFlag()
        let client = try target.vm.connect()
        let before = try (
            client.execute("query-migrate-parameters"), client.execute("query-migrate-capabilities")
        )
        var settings = MigrationSession.Settings()
        // No limit that matters: rounds go on while each leaves less, and the guest stands still for the rest.
        settings.downtime = try TimeSpan("2000s")
        settings.bandwidthBytesPerSecond = bandwidth?.bytes
        settings.channels = channels
        settings.mapsRAM = true
        settings.usesDirectIO = directIO
        var session = MigrationSession(client: client, display: MigrationDisplay(on: .error)) { interruption.isRaised }
        let answer: JSON
        do {
            answer = try session.run(to: places.address.description, settings)
        } catch QMPClientError.refused(let error) {
            restore(before, client)
            throw CommandFailure("VM \(target.vm): \(error)")
        }
        let reading = MigrationReading(answer)
        if reading.status == "completed" {
            if let partial = places.partial { try FilePath.rename(partial, to: places.final) }
        } else {
            restore(before, client)
            // Not while its fate is open: the file may be whole.
            if let partial = places.partial, ["failed", "cancelled"].contains(reading.status) {
                Descriptor.remove(partial)
            }
        }
        if json {
            Terminal.output.write(answer.prettyDescription + "\n")
        } else if reading.status == "completed" {
            Terminal.output.write(MigrationReport(reading, showsColors: Terminal.output.showsColors).text)
        }
        try reading.requireCompletion(of: "\(target.vm)", to: uri)
        if quit { try client.execute("quit") }
    }

    /// The VM migrates elsewhere as it would have before.
    private func restore(_ before: (JSON, JSON), _ client: QMPClient) {
        let (capabilities, parameters) = MigrationSession.Settings.setForFiles
        let values = parameters.compactMap { name in before.0[name].map { (name, $0) } }
        _ = try? client.execute("migrate-set-parameters", .object(Dictionary(uniqueKeysWithValues: values)))
        let states = (before.1.arrayValue ?? []).filter {
            capabilities.contains($0["capability"]?.stringValue ?? "")
        }
        _ = try? client.execute("migrate-set-capabilities", ["capabilities": .array(states)])
    }
}
