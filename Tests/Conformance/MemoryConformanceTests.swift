import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite(
    "RAM travels between QEMU and Godwit, equal page by page", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"))
struct MemoryConformanceTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    struct Case: Sendable, CustomTestStringConvertible {
        let mebibytes: UInt64
        let content: MemoryImage.Content
        let transport: String

        var byteCount: UInt64 { mebibytes << 20 }
        var testDescription: String { "\(mebibytes) MiB, \(content.rawValue), \(transport)" }
    }

    private static let cases: [Case] =
        MemoryImage.Content.allCases.flatMap { content in
            [
                Case(mebibytes: 16, content: content, transport: "tcp"),
                Case(mebibytes: 77, content: content, transport: "unix"),
            ]
        } + [
            Case(mebibytes: 64, content: .mixed, transport: "tcp"),
            Case(mebibytes: 64, content: .data, transport: "unix"),
            Case(mebibytes: 1, content: .mixed, transport: "unix"),
        ]

    @Test("QEMU to Godwit, from there to another QEMU, and back to Godwit", arguments: cases)
    func roundTrip(trip: Case) throws {
        let image = try MemoryImage(
            "\(bench.folder)/image", byteCount: trip.byteCount, content: trip.content, seed: trip.mebibytes)
        let first = try bench.startQEMU("first", byteCount: trip.byteCount, ram: image.path)
        let second = try startGodwit("second", trip)
        let sent = try move(first, to: second, trip)
        try expectEqual(image, second)
        try expectFigures(of: sent, image: image, receiver: second)

        let third = try bench.startQEMU("third", byteCount: trip.byteCount, ram: emptyRAM(trip), incoming)
        try move(second, to: third, trip)
        try expectEqual(image, third)
        let counted = try second.migration()["ram"]
        #expect(counted?["normal"] == JSON(image.dataPages))
        // Never-touched memory is neither read nor sent; zero pages that are sent can only be touched ones.
        let zeroPages = counted?["duplicate"]?.integerValue(as: UInt64.self) ?? .max
        let holes = counted?["x-hole"]?.integerValue(as: UInt64.self) ?? .max
        #expect(zeroPages + holes == image.zeroPages)

        let fourth = try startGodwit("fourth", trip)
        let sentOn = try move(third, to: fourth, trip)
        try expectEqual(image, fourth)
        try expectFigures(of: sentOn, image: image, receiver: fourth)
    }

    // MARK: Steps

    private let incoming = ["-incoming", "defer"]

    private func startGodwit(_ name: String, _ trip: Case) throws -> VM {
        try bench.startVM(name, ["--machine", "none", "--memory", "\(trip.byteCount)", "--incoming", "defer"])
    }

    /// A QEMU destination's block has the same name as ours in both of QEMU's ways to have RAM.
    private func emptyRAM(_ trip: Case) throws -> String? {
        guard trip.transport == "unix" else { return nil }
        return try MemoryImage("\(bench.folder)/empty", byteCount: trip.byteCount, content: .zero, seed: 0).path
    }

    /// Makes the VM wait. - Returns: where.
    private func uri(_ destination: VM, _ trip: Case) throws -> String {
        let path = "unix:\(bench.folder)/to-\(destination.name)"
        let address = trip.transport == "unix" ? path : "tcp:127.0.0.1:0"
        try destination.client.execute("migrate-incoming", ["uri": .string(address)])
        return trip.transport == "unix" ? path : "tcp:127.0.0.1:\(try destination.port())"
    }

    /// - Returns: what the source says afterwards.
    @discardableResult
    private func move(_ source: VM, to destination: VM, _ trip: Case) throws -> JSON {
        try source.migrate(to: uri(destination, trip))
        let answer = try source.waitForMigration("completed")
        try destination.waitForMigration("completed")
        #expect(try source.status() == "postmigrate")
        #expect(destination.wait(seconds: 5) { (try? destination.status()) == "running" })
        return answer
    }

    private func expectEqual(_ image: MemoryImage, _ vm: VM) throws {
        let path = "\(bench.folder)/saved"
        try vm.saveMemory(image.byteCount, to: path)
        #expect(try image.difference(from: path) == nil)
    }

    /// What QEMU says it sent, what we say we received, and what there is.
    private func expectFigures(of sent: JSON, image: MemoryImage, receiver: VM) throws {
        let received = try receiver.migration()["ram"]
        for name in ["normal", "duplicate", "normal-bytes", "total"] {
            #expect(sent["ram"]?[name] == received?[name], "\(name)")
        }
        #expect(received?["normal"] == JSON(image.dataPages))
        #expect(received?["duplicate"] == JSON(image.zeroPages))
        let transferred = received?["transferred"]?.integerValue(as: UInt64.self) ?? 0
        let counted = sent["ram"]?["transferred"]?.integerValue(as: UInt64.self) ?? 0
        #expect(
            QEMU.countsEveryByte
                ? transferred == counted : transferred > counted && transferred - counted < 2048,
            "\(transferred) received, \(counted) sent")
    }
}
