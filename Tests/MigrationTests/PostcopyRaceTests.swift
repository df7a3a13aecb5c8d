import GuestMemory
import Host
import Machine
import MigrationStream
import Synchronization
import TestSupport
import Testing
import Transport

@testable import Migration

/// Two threads at the same page at the same moment, again and again.
@Suite("postcopy, races", .serialized, .timeLimit(.minutes(10)))
struct PostcopyRaceTests {
    /// Runs `first` on a thread of its own and `second` here, both at once, `times` times over.
    private static func race(
        _ times: Int, _ first: @escaping @Sendable (Int) -> Void, _ second: (Int) throws -> Void
    ) throws {
        let (ready, done) = (Box(), Box())
        let thread = try HostThread(name: "racer") {
            for turn in 0..<times {
                while ready.value.load(ordering: .acquiring) <= turn {}
                first(turn)
                done.value.store(turn + 1, ordering: .releasing)
            }
        }
        defer { thread.join() }
        for turn in 0..<times {
            ready.value.store(turn + 1, ordering: .releasing)
            do { try second(turn) } catch {
                // The other one must come to its end.
                ready.value.store(times, ordering: .releasing)
                throw error
            }
            while done.value.load(ordering: .acquiring) <= turn {}
        }
    }

    private static let turns = 3000

    private final class Box: Sendable {
        let value = Atomic(0)
    }

    @Test("a page that is asked for when it is the last one left is sent before all is said to be sent")
    func lastPage() throws {
        let blocks = [RAMBlockDescription(name: "ram", length: 64 << 12)]
        let known = try AtomicPages(pageCount: 64)
        var trials: [(requests: PageRequests, pages: OutgoingPages)] = []
        for turn in 0..<Self.turns {
            let bitmap = try DirtyBitmap(pageCount: 64)
            bitmap.insert(PageIndex(UInt64(turn % 64)))
            trials.append((PageRequests(), try OutgoingPages(of: blocks, taking: [bitmap], known: [known])))
            trials[turn].requests.open(trials[turn].pages)
        }
        var lost = 0
        try Self.race(Self.turns) { [trials] turn in
            try? trials[turn].requests.add(PageRequest(block: "ram", offset: UInt64(turn % 64) << 12, length: 4096))
        } _: { turn in
            let (requests, pages) = trials[turn]
            var sent: UInt64 = 0
            while true {
                while requests.nextNow() != nil {
                    sent += 1
                    requests.sent()
                }
                guard pages.count == 0 else { continue }
                if requests.settle(nanoseconds: 1_000_000, servesItself: true) { break }
            }
            if sent == 0 { lost += 1 }
            requests.close()
        }
        #expect(lost == 0)
    }

    @Test("no run of pages is empty, though another thread takes the page at which it begins")
    func emptyRun() throws {
        let pages = try AtomicPages(pageCount: 256)
        var empty = 0
        try Self.race(200) { [pages] _ in
            for _ in 0..<500 {
                pages.insert(PageIndex(63))
                pages.remove(PageIndex(63))
            }
        } _: { _ in
            for _ in 0..<500 where pages.nextRun(from: PageIndex(0))?.isEmpty == true { empty += 1 }
        }
        #expect(empty == 0)
    }

    @Test("who touches what never was, while the last page comes, does not disturb the end", .timeLimit(.minutes(10)))
    func holesAtTheEnd() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 90) {
                let source = Migrator(try Self.machine(isIncoming: false))
                source.machine.memory.blocks[0].mapping.store(7 as UInt64, at: 0)
                for number in 0..<25 {
                    let destination = Migrator(try Self.machine(isIncoming: true))
                    try destination.set(.postcopyRAM, true)
                    let script = try ScriptedPostcopySource(of: source.machine, to: try destination.listen())
                    try script.open()
                    try script.discard([PageIndex(0)..<PageIndex(1)])
                    try script.send(package: script.package())
                    script.waitToHear(.pong(4))
                    let isOver = Atomic(false)
                    let reader = try HostThread(name: "reader") {
                        var page = 1
                        while !isOver.load(ordering: .relaxed), page < Self.pageCount {
                            _ = destination.machine.memory.blocks[0].mapping.read(at: page << 12, count: 8)
                            page += 1
                        }
                        claim(page < Self.pageCount, "there were too few holes")
                    }
                    Clock.sleep(nanoseconds: 2_000_000)
                    try script.pages([PageIndex(0)..<PageIndex(1)], final: true)
                    try script.end()
                    try destination.awaitEnd(.completed, "at end \(number)")
                    script.waitToHear(.shut(0))
                    isOver.store(true, ordering: .relaxed)
                    reader.join()
                    claim(destination.info().errorDescription == nil, "\(destination.info())")
                }
            }
        }
    }

    /// Far more than anybody touches while the test waits.
    private static let pageCount = 4 << 20

    private static func machine(isIncoming: Bool) throws -> VirtualMachine {
        try VirtualMachine(
            MachineConfiguration(kind: .none, memoryByteCount: UInt64(pageCount) << 12, isIncoming: isIncoming),
            serial: SerialPort(.none))
    }

    @Test("a page that comes at the moment in which a vCPU begins to wait for it")
    func blockTime() throws {
        let times = BlockTime(threads: [1, 2])
        let place = PageLatency.Place(block: 0, page: PageIndex(7))
        try Self.race(20_000) { _ in
            times.began(place, thread: 1)
            times.began(place, thread: 2)
        } _: { _ in
            for _ in 0..<3 { times.ended(PageIndex(7)..<PageIndex(8), of: 0) }
        }
        times.ended(PageIndex(7)..<PageIndex(8), of: 0)
        let figures = times.figures
        #expect(figures.cpus.allSatisfy { $0.nanoseconds < 60_000_000_000 } && figures.allNanoseconds < 60_000_000_000)
    }
}
