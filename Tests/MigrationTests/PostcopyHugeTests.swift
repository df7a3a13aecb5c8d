import GuestMemory
import Host
import Machine
import MigrationStream
import TestSupport
import Testing

@testable import Migration

private func pages(_ range: Range<UInt64>) -> Range<PageIndex> {
    PageIndex(range.lowerBound)..<PageIndex(range.upperBound)
}

@Suite("postcopy, huge pages at the destination", .serialized)
struct PostcopyHugeTests {
    @Test(
        "what arrived in pages of 4 KiB is huge behind the stream, zeros and all", .timeLimit(.minutes(10)),
        .enabled(if: HostMemory.hasTransparentHugePages, "this host has no transparent huge pages"))
    func transparent() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                let source = try Migrator.memoryAlone(mebibytes: 64)
                let destination = try source.postcopyDestination()
                let script = try ScriptedPostcopySource(of: source.machine, to: try destination.listen())
                try script.open()
                let block = destination.machine.memory.blocks[0]
                try script.discard([block.pages])
                try script.send(package: script.package())
                script.waitToHear(.pong(4))
                try script.pages([pages(0..<8000)])
                claim(destination.info().hugeShare == nil, "it tells before the end")
                try script.pages([block.pages], final: true)
                try script.end()
                try destination.awaitEnd(.completed, "at its end")
                destination.claimMemory(of: source, "while it becomes huge")
                try waitFor("memory to be huge", seconds: 30) { destination.info().hugeShare != nil }
                // Where the mapping begins inside a huge page's place, its ends cannot be huge.
                claim((destination.info().hugeShare ?? 0) > 0.9, "\(destination.info().hugeShare ?? 0)")
                destination.claimMemory(of: source, "when it is huge")
            }
        }
    }

    @Test(
        "hugetlb pages arrive in pages of 4 KiB, those that came before among them, and are whole behind the stream",
        .timeLimit(.minutes(10)), .enabled(if: HugePagePool.has(40, of: .twoMebibytes), needsHugePages))
    func hugetlb() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                guard let pool = HugePagePool(40, of: .twoMebibytes) else { Child.fail("no huge pages") }
                defer { withExtendedLifetime(pool) {} }
                let source = try Migrator.memoryAlone(mebibytes: 32)
                let destination = try source.postcopyDestination("hugetlb=2M")
                let script = try ScriptedPostcopySource(
                    of: source.machine, to: try destination.listen(), pageBytes: 2 << 20)
                try script.open()
                try script.pages([pages(0..<5000)])
                // Out of date: a whole huge page and more, parts of some, and all that did not come.
                try script.discard([
                    pages(600..<1700), pages(2048..<2049), pages(3000..<3010), pages(4607..<4608), pages(5000..<8192),
                ])
                try script.send(package: script.package())
                script.waitToHear(.pong(4))
                // What came before is read at once, from the huge page behind; all else is waited for.
                let block = destination.machine.memory.blocks[0]
                claim(
                    block.read(at: 2050 << 12, count: 4096)
                        == source.machine.memory.blocks[0].read(at: 2050 << 12, count: 4096), "")
                claim(script.requests.isEmpty, "a page was asked for that came before")
                let allocated = try block.allocatedRuns(in: pages(2048..<2560))
                claim(allocated == [pages(2048..<2560)], "\(allocated)")
                try script.serve(readers: 2, of: destination, against: source)
                claim(
                    script.requests.allSatisfy { $0.length == 2 << 20 && $0.offset % (2 << 20) == 0 },
                    "asked for parts of a page: \(script.requests)")
                try script.pages([pages(0..<8192)], final: true)
                try script.end()
                try destination.awaitEnd(.completed, "at its end")
                try waitFor("memory to be huge", seconds: 30) { destination.info().hugeShare == 1 }
                destination.claimMemory(of: source, "when it is huge")
                // Nobody is needed any more who would serve a fault.
                try waitFor("the watch to end") { destination.machine.memory.blocks[0].hugePages() == 8192 }
            }
        }
    }

    @Test(
        "a guest runs on while the memory it writes is moved into huge pages: nothing it wrote is lost",
        .timeLimit(.minutes(10)), .enabled(if: hasKVM, needsKVM),
        .enabled(if: HugePagePool.has(1, of: .oneGibibyte) && HugePagePool.has(600, of: .twoMebibytes), needsHugePages),
        arguments: ["hugetlb=2M", "hugetlb=1G"])
    func runningGuest(backing: String) async {
        await #expect(processExitsWith: .success) { [backing] in
            Child.run(seconds: 120) {
                let size = backing == "hugetlb=1G" ? HugePagePool.Size.oneGibibyte : .twoMebibytes
                guard let pool = HugePagePool(backing == "hugetlb=1G" ? 1 : 600, of: size) else {
                    Child.fail("no huge pages")
                }
                defer { withExtendedLifetime(pool) {} }
                let source = try Migrator.source(
                    "dirty,working-set=64M,fill=16M,random,rate=100M", mebibytes: 1024, cpus: 2)
                let destination = try source.postcopyDestination(backing)
                let script = try ScriptedPostcopySource(
                    of: source.machine, to: try destination.listen(), pageBytes: size.byteCount)
                try script.open()
                let block = source.machine.memory.blocks[0]
                let early = try block.allocatedRuns(in: block.pages)
                try script.pages(early)
                _ = try source.machine.stopForMigration()
                let all = try block.allocatedRuns(in: block.pages)
                try script.discard(all)
                try script.send(package: script.package())
                script.waitToHear(.pong(4))
                try script.serve(quietMilliseconds: 50) { script.requests.count > 3 }
                try script.pages(all, final: true)
                try script.end()
                try destination.awaitEnd(.completed, "at its end")
                try destination.claimGuestRuns("while memory becomes huge")
                try waitFor("memory to be huge, it is \(destination.info().hugeShare ?? -1)", seconds: 60) {
                    destination.info().hugeShare == 1
                }
                try destination.claimGuestRuns("in huge pages")
                destination.machine.pause()
            }
        }
    }
}
