import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite(
    "Compressed packets travel between QEMU and Godwit, equal page by page", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"))
struct CompressionConformanceTests {
    private let bench: Workbench
    private let byteCount: UInt64 = 24 << 20

    init() throws { bench = try Workbench() }

    /// From 8.1 on pages of all channels are complete at a mark per round, before at the end of each section.
    private static let knowsFlush: Bool = {
        let numbers = (QEMU.version ?? "0.0").split(separator: ".").compactMap { Int($0) }
        return numbers.count >= 2 && (numbers[0], numbers[1]) >= (8, 1)
    }()

    struct Case: Sendable, CustomTestStringConvertible {
        let method: String
        let level: UInt64
        let content: MemoryImage.Content

        var testDescription: String { "\(method), level \(level), \(content.rawValue)" }
    }

    /// Pages of an image are noise: they do not shrink, which QEMU wants to have compressed all the same.
    private static let cases = [
        Case(method: "zlib", level: 1, content: .mixed), Case(method: "zlib", level: 0, content: .mixed),
        Case(method: "zlib", level: 9, content: .zero), Case(method: "zstd", level: 1, content: .mixed),
        Case(method: "zstd", level: 3, content: .data), Case(method: "zstd", level: 9, content: .mixed),
    ]

    @Test("QEMU to Godwit, from there to another QEMU, and back to Godwit", arguments: cases)
    func roundTrip(trip: Case) throws {
        let image = try MemoryImage(
            "\(bench.folder)/image", byteCount: byteCount, content: trip.content, seed: trip.level)
        try repeatWords(image)
        let first = try bench.startQEMU("first", byteCount: byteCount, ram: image.path)
        let second = try startGodwit("second")
        try move(first, to: second, trip)
        try expectEqual(image, second)

        let third = try bench.startQEMU("third", byteCount: byteCount, ["-incoming", "defer"])
        try move(second, to: third, trip, toQEMU: true)
        try expectEqual(image, third)
        let sent = try second.migration()["ram"]
        #expect(sent?["normal"] == JSON(image.dataPages))
        let bytes = sent?["multifd-bytes"]?.integerValue(as: UInt64.self) ?? .max
        // A third of the words in each page of data is noise.
        if trip.level > 0 { #expect(bytes < image.dataPages * 4096 * 2 / 3 + byteCount / 50, "\(bytes)") }

        let fourth = try startGodwit("fourth")
        try move(third, to: fourth, trip)
        try expectEqual(image, fourth)
    }

    @Test("a QEMU destination that expects another compression ends the migration; we say so and go on")
    func notExpected() throws {
        let image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .data, seed: 7)
        let trip = Case(method: "zstd", level: 1, content: .data)
        let first = try bench.startQEMU("first", byteCount: byteCount, ram: image.path)
        let source = try startGodwit("source")
        try move(first, to: source, trip)
        let destination = try bench.startQEMU("destination", byteCount: byteCount, ["-incoming", "defer"])
        try turnOn(destination, Case(method: "zlib", level: 1, content: .data))
        try turnOn(source, trip, flushesAfterEachSection: !Self.knowsFlush)
        try source.migrate(to: uri(destination))
        let answer = try source.waitForMigration("failed")
        #expect(answer["error-desc"]?.stringValue?.isEmpty == false)
        #expect(try source.status() == "running")
        try expectEqual(image, source)
    }

    // MARK: Steps

    /// Makes two of three words of each page alike.
    private func repeatWords(_ image: MemoryImage) throws {
        let mapping = try Mapping(Descriptor.open(image.path, O_RDWR), byteCount: Int(image.byteCount))
        for page in 0..<Int(image.byteCount / 4096) where !mapping.isZero(at: page * 4096, count: 4096) {
            for word in 1..<511 where word % 3 != 0 { mapping.store(UInt64(page), at: page * 4096 + word * 8) }
        }
    }

    private func startGodwit(_ name: String) throws -> VM {
        try bench.startVM(name, ["--machine", "none", "--memory", "\(byteCount)", "--incoming", "defer"])
    }

    private func turnOn(_ vm: VM, _ trip: Case, flushesAfterEachSection: Bool = false) throws {
        try vm.client.execute(
            "migrate-set-capabilities", ["capabilities": [["capability": "multifd", "state": true]]])
        var parameters: [String: JSON] = [
            "multifd-channels": 3, "multifd-compression": .string(trip.method),
            "multifd-\(trip.method)-level": JSON(trip.level),
        ]
        if flushesAfterEachSection { parameters["x-multifd-flush-after-each-section"] = true }
        try vm.client.execute("migrate-set-parameters", .object(parameters))
    }

    /// Makes the VM wait. - Returns: where.
    private func uri(_ destination: VM) throws -> String {
        try destination.client.execute("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
        return "tcp:127.0.0.1:\(try destination.port())"
    }

    private func move(
        _ source: VM, to destination: VM, _ trip: Case, toQEMU: Bool = false
    ) throws {
        try turnOn(destination, trip)
        try turnOn(source, trip, flushesAfterEachSection: toQEMU && !Self.knowsFlush)
        try source.migrate(to: uri(destination))
        try source.waitForMigration("completed")
        try destination.waitForMigration("completed")
        #expect(destination.wait(seconds: 5) { (try? destination.status()) == "running" })
    }

    private func expectEqual(_ image: MemoryImage, _ vm: VM) throws {
        let path = "\(bench.folder)/saved"
        try vm.saveMemory(image.byteCount, to: path)
        #expect(try image.difference(from: path) == nil)
    }
}
