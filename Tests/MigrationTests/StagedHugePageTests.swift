import GuestMemory
import Host
import MigrationStream
import Synchronization
import TestSupport
import Testing

@testable import Migration

/// A block of memory that is awaited, and the thread that serves faults there.
private final class Scene {
    let memory: GuestMemory
    let pending: PendingPages
    let placer: PagePlacer
    private let server: FaultServer
    private let thread: HostThread
    private let watched: WatchedMemory

    /// Of 12 MiB, so that three huge pages lie in it wherever it begins.
    init() throws {
        memory = GuestMemory(blocks: [try RAMBlock(name: "ram", byteCount: 12 << 20)])
        let block = memory.blocks[0]
        watched = try WatchedMemory(memory, wanting: .move)
        pending = try PendingPages(memory)
        pending.expect(block.pages, of: 0)
        try watched.faults.register(block.mapping, 0..<Int(block.byteCount), .missing)
        let placement = PagePlacement(watched: watched, memory: memory, pending: pending)
        let staged = try StagedHugePage(placement)
        placer = try PagePlacer(placement, staged: staged)
        let asked = Box()
        server = try FaultServer(watched, memory, pending, [:]) { requests in
            asked.pages.withLock { $0 += requests.map { $0.offset >> 12 } }
        }
        server.look(in: staged)
        self.asks = asked
        thread = try HostThread(name: "fault-1") { [server] in try? server.run() }
    }

    private final class Box: Sendable {
        let pages = Mutex<[UInt64]>([])
    }
    private let asks: Box

    /// Pages that the source was asked for.
    var requests: [UInt64] { asks.pages.withLock { $0 } }
    /// The first page at which a huge one can lie.
    var first: UInt64 { memory.blocks[0].firstHugePlace.value }

    static func word(_ page: UInt64) -> UInt64 { page &* 0x9e37_79b9_7f4a_7c15 | 1 }

    /// As a connection that brings runs does it.
    func bring(_ pages: Range<UInt64>) throws {
        var start = PageIndex(pages.lowerBound)
        while start.value < pages.upperBound {
            let room = try placer.room(for: start..<PageIndex(pages.upperBound), of: 0)
            for (index, page) in room.pages.enumerated() {
                for word in 0..<512 {
                    room.mapping.store(Self.word(page.value), at: room.offset + index << 12 + word << 3)
                }
            }
            try placer.came(room.pages, of: 0)
            start = room.pages.upperBound
        }
    }

    /// As one does that brings page by page.
    func bringSingly(_ pages: Range<UInt64>) throws {
        for number in pages {
            let page = PageIndex(number)
            let room = try placer.room(for: page, of: 0)
            for word in 0..<512 { room.mapping.store(Self.word(number), at: room.offset + word << 3) }
            try placer.came(page, of: 0)
        }
    }

    func holds(_ page: UInt64) -> Bool {
        let mapping = memory.blocks[0].mapping
        return [0, 2048, 4088].allSatisfy {
            mapping.load(at: Int(page << 12) + $0, as: UInt64.self) == Self.word(page)
        }
    }

    /// A thread that touches a page. - Returns: what it waits for.
    func touch(_ page: UInt64) throws -> Touch {
        try Touch { [memory] in
            memory.blocks[0].mapping.load(at: Int(page << 12), as: UInt64.self) == Self.word(page)
        }
    }

    final class Touch {
        private let isRight = Monitor<Bool?>(nil)
        private let thread: HostThread

        init(_ body: @escaping @Sendable () -> Bool) throws {
            thread = try HostThread(name: "touch") { [isRight] in
                let found = body()
                isRight.withLock { $0 = found }
            }
        }

        /// `nil`: it still waits.
        func result(within milliseconds: UInt64) -> Bool? {
            isRight.wait(deadline: .after(milliseconds: milliseconds)) { $0 }
        }
    }

    func isPlaced(_ page: UInt64) -> Bool { pending.blocks[0].placed.contains(PageIndex(page)) }

    func cameHuge(_ page: UInt64) -> Bool { pending.blocks[0].cameHuge.contains(PageIndex(page)) }

    /// Nobody claimed the page, and it is there.
    func putSomething(at page: UInt64) throws {
        try watched.faults.zero(memory.blocks[0].mapping, Int(page << 12)..<Int((page + 1) << 12))
    }

    func end() {
        server.end()
        thread.join()
    }
}

private let canMove: Bool =
    HostMemory.hasTransparentHugePages && (try? UserFault.supportedFeatures())?.contains(.move) == true

@Suite(
    "postcopy, huge pages that come in order", .enabled(if: canMove, "no transparent huge pages, or Linux before 6.8"),
    .timeLimit(.minutes(10)))
struct StagedHugePageTests {
    @Test("a huge page that comes in order is placed whole, once it is whole", arguments: [false, true])
    func whole(isSingly: Bool) throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        let bring = isSingly ? scene.bringSingly : scene.bring
        try bring(first..<first + 511)
        try scene.placer.flush()
        #expect(!scene.isPlaced(first))
        try bring(first + 511..<first + 1024)
        #expect(scene.isPlaced(first) && scene.isPlaced(first + 1023))
        #expect(scene.cameHuge(first) && scene.cameHuge(first + 512) && !scene.cameHuge(first + 1024))
        #expect((first..<first + 1024).allSatisfy(scene.holds))
        #expect(scene.memory.blocks[0].hugePages() == 1024)
        #expect(scene.pending.missingPages == scene.memory.blocks[0].pageCount - 1024)
        #expect(scene.requests.isEmpty)
    }

    @Test("who touches a page that is here does not wait for the rest, and nobody is asked for it")
    func served() throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        try scene.bring(first..<first + 300)
        #expect(!scene.isPlaced(first + 7))
        #expect(try scene.touch(first + 7).result(within: 5000) == true)
        #expect(scene.requests.isEmpty)
        // It becomes none: what is here is placed with what comes next, and the rest as it comes.
        try scene.bring(first + 300..<first + 301)
        #expect((first..<first + 301).allSatisfy(scene.isPlaced))
        try scene.bring(first + 301..<first + 512)
        #expect(!scene.cameHuge(first))
        #expect((first..<first + 512).allSatisfy(scene.holds))
    }

    @Test("who waits for a page that is not here gets it as soon as it comes")
    func awaited() throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        try scene.bring(first..<first + 100)
        let touch = try scene.touch(first + 100)
        #expect(touch.result(within: 50) == nil)
        #expect(scene.requests == [first + 100])
        try scene.bring(first + 100..<first + 101)
        #expect(touch.result(within: 5000) == true)
        #expect((first..<first + 101).allSatisfy(scene.holds))
    }

    @Test("a gap, other pages, a long run of zeroes or the end have what is here placed; the rest is still missing")
    func gaps() throws {
        for gap in 0..<4 {
            let scene = try Scene()
            defer { scene.end() }
            let first = scene.first
            try scene.bring(first..<first + 10)
            switch gap {
            case 0: try scene.bring(first + 11..<first + 12)
            // Another one that is whole; that closes the first.
            case 1: try scene.bring(first + 512..<first + 1024)
            case 2: try scene.placer.cameAsZeroes(PageIndex(first + 10)..<PageIndex(first + 100), of: 0)
            default: break
            }
            try scene.placer.close()
            #expect((first..<first + 10).allSatisfy(scene.isPlaced), "gap \(gap)")
            #expect((first..<first + 10).allSatisfy(scene.holds), "gap \(gap)")
            #expect(scene.isPlaced(first + 10) == (gap == 2) && scene.isPlaced(first + 11) == (gap == 0 || gap == 2))
            #expect(scene.cameHuge(first + 512) == (gap == 1))
        }
    }

    @Test("a few zeroes are parts of it, whatever was in their place before")
    func zeroes() throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        // Leaves contents behind.
        try scene.bring(first..<first + 200)
        try scene.placer.close()
        let next = first + 512
        try scene.bring(next..<next + 20)
        try scene.placer.cameAsZeroes(PageIndex(next + 20)..<PageIndex(next + 40), of: 0)
        try scene.bring(next + 40..<next + 512)
        #expect(scene.cameHuge(next))
        let mapping = scene.memory.blocks[0].mapping
        #expect(mapping.isZero(at: Int(next + 20) << 12, count: 20 << 12))
        #expect((next + 40..<next + 512).allSatisfy(scene.holds))
    }

    @Test("pages that another connection brought meanwhile are not placed again")
    func claimedElsewhere() throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        try scene.bring(first..<first + 400)
        #expect(scene.pending.claim(PageIndex(first + 20), of: 0))
        try scene.bring(first + 400..<first + 512)
        #expect(!scene.cameHuge(first))
        #expect((first..<first + 512).filter { !scene.isPlaced($0) } == [first + 20])
        #expect(scene.pending.surplusPages == 1)
    }

    @Test("pages that were here already are an error, as elsewhere")
    func presentAlready() throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        try scene.bring(first..<first + 500)
        try scene.putSomething(at: first + 4)
        #expect { try scene.bring(first + 500..<first + 512) } throws: {
            "\($0)".contains("something else put pages there")
        }
    }
}
