import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite(
    "Memory of 2 MiB pages follows its guest on QEMU's wire, in whole pages, equal byte by byte", .serialized,
    .timeLimit(.minutes(10)), .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"),
    .enabled(if: HugePagePool.has(210, of: .twoMebibytes), needsHugePages))
struct PostcopyHugeConformanceTests {
    private let bench: Workbench
    private let byteCount: UInt64 = 200 << 20
    private let image: MemoryImage

    init() throws {
        bench = try Workbench()
        image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .mixed, seed: 21)
    }

    @Test("from QEMU: pages are there as they come, and huge at the end", arguments: [false, true])
    func fromQEMU(preempts: Bool) throws {
        let pool = try #require(HugePagePool(210, of: .twoMebibytes))
        defer { withExtendedLifetime(pool) {} }
        let source = try startQEMU("source", filled: true)
        let destination = try bench.startVM("destination", Self.godwit(byteCount) + ["--incoming", "defer"])
        for vm in [source, destination] { try turnOn(vm, preempts) }
        try source.client.execute(
            "migrate-set-parameters", ["max-bandwidth": JSON(64 << 20), "max-postcopy-bandwidth": JSON(12 << 20)])
        try source.migrate(to: listen(destination))
        // QEMU sends up to 64 huge pages before it looks whether it was told to switch.
        try source.client.execute("migrate-start-postcopy")
        try destination.waitForMigration("postcopy-active", "completed")
        #expect(destination.wait(seconds: 5) { (try? destination.status()) == "running" })
        try expectEqual(destination)
        try source.waitForMigration("completed", seconds: 60)
        let received = try destination.waitForMigration("completed", seconds: 60)
        #expect((received["ram"]?["postcopy-requests"]?.integerValue(as: Int.self) ?? 0) > 0, "\(received)")
        #expect(destination.wait(seconds: 20) { (try? destination.migration())?["x-huge-share"]?.doubleValue == 1 })
        print("conformance: huge pages from QEMU \(QEMU.version ?? "?"): \(received["x-postcopy-latency-ns"] ?? [:])")
        try expectEqual(destination)
    }

    @Test("to QEMU: whole pages go in one piece on each channel, asked for or not", arguments: [false, true])
    func toQEMU(preempts: Bool) throws {
        let pool = try #require(HugePagePool(210, of: .twoMebibytes))
        defer { withExtendedLifetime(pool) {} }
        let source = try bench.startVM("source", Self.godwit(byteCount) + ["--incoming", "tcp:127.0.0.1:0"])
        try fill(source, at: "tcp:127.0.0.1:\(source.port())")
        let destination = try startQEMU("destination", filled: false)
        for vm in [source, destination] { try turnOn(vm, preempts) }
        try source.client.execute(
            "migrate-set-parameters", ["max-bandwidth": JSON(64 << 20), "max-postcopy-bandwidth": JSON(12 << 20)])
        try source.migrate(to: listen(destination))
        try source.waitForMigration("active")
        if preempts { Clock.sleep(nanoseconds: 500_000_000) }
        try source.client.execute("migrate-start-postcopy")
        try source.waitForMigration("postcopy-active", "completed")
        try expectEqual(destination)
        let told = try source.waitForMigration("completed", seconds: 60)
        try destination.waitForMigration("completed", seconds: 60)
        try expectEqual(destination)
        #expect(told["ram"]?["remaining"] == 0)
        #expect(!destination.log.lowercased().contains("error"), "\(destination.log)")
    }

    // MARK: Steps

    private static func godwit(_ byteCount: UInt64) -> [String] {
        ["--machine", "none", "--memory", "\(byteCount)", "--memory-backing", "hugetlb=2M"]
    }

    /// A QEMU on huge pages; filled by another's migration.
    private func startQEMU(_ name: String, filled: Bool) throws -> VM {
        let vm = try bench.startQEMU(
            name, byteCount: byteCount,
            [
                "-object", "memory-backend-memfd,id=ram,share=on,hugetlb=on,hugetlbsize=2M,size=\(byteCount)",
                "-machine", "none,memory-backend=ram", "-incoming", "defer",
            ])
        if filled { try fill(vm, at: listen(vm)) }
        return vm
    }

    private func fill(_ vm: VM, at uri: String) throws {
        let first = try bench.startQEMU("first", byteCount: byteCount, ram: image.path)
        try first.migrate(to: uri)
        try vm.waitForMigration("completed")
        #expect(vm.wait(seconds: 5) { (try? vm.status()) == "running" })
        try first.client.execute("quit")
    }

    private func listen(_ vm: VM) throws -> String {
        let uri = "unix:\(bench.folder)/to-\(vm.name)"
        try vm.client.execute("migrate-incoming", ["uri": .string(uri)])
        return uri
    }

    private func turnOn(_ vm: VM, _ preempts: Bool) throws {
        let names = ["postcopy-ram"] + (preempts ? ["postcopy-preempt"] : [])
        try vm.client.execute(
            "migrate-set-capabilities",
            ["capabilities": .array(names.map { ["capability": .string($0), "state": true] })])
    }

    private func expectEqual(_ vm: VM) throws {
        let path = "\(bench.folder)/saved"
        try vm.saveMemory(byteCount, to: path)
        #expect(try image.difference(from: path) == nil)
    }
}
