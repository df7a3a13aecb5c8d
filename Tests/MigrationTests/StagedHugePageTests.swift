import Glibc
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
    let placement: PagePlacement
    let placer: PagePlacer
    private let server: FaultServer
    private let thread: HostThread
    private let watched: WatchedMemory

    /// Of 12 MiB, so that three huge pages lie in it wherever it begins.
    /// - Parameter locks: what was mapped up to then is locked in memory, the place where huge pages are made is not.
    init(locks: Bool = false) throws {
        memory = GuestMemory(blocks: [try RAMBlock(name: "ram", byteCount: 12 << 20)])
        let block = memory.blocks[0]
        watched = try WatchedMemory(memory, wanting: .move)
        pending = try PendingPages(memory)
        pending.expect(block.pages, of: 0)
        try watched.faults.register(block.mapping, 0..<Int(block.byteCount), .missing)
        placement = PagePlacement(watched: watched, memory: memory, pending: pending)
        if locks { #expect(mlockall(MCL_CURRENT | MCL_ONFAULT) == 0) }
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
    func bringSingly(_ pages: Range<UInt64>) throws { try bring(pages.map(\.self), by: placer) }

    func bring(_ pages: [UInt64], by placer: PagePlacer) throws {
        for number in pages {
            let page = PageIndex(number)
            let room = try placer.room(for: page, of: 0)
            for word in 0..<512 { room.mapping.store(Self.word(number), at: room.offset + word << 3) }
            try placer.came(page, of: 0)
            try placer.flush()
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

    /// Which page of the host's memory stands there: none can take its place without another one being needed.
    /// - Returns: 0: the kernel does not tell who may not ask.
    func frame(at page: UInt64) throws -> UInt64 {
        let map = try Descriptor.open("/proc/self/pagemap", O_RDONLY)
        let place = (UInt64(memory.blocks[0].mapping.hostAddress(at: Int(page << 12))) >> 12) * 8
        let entry = try map.read(at: place, count: 8)
        return entry.reversed().reduce(0) { ($0 << 8) | UInt64($1) } & ((1 << 55) - 1)
    }

    /// A page that is there is locked in memory, and does not change places with others any more.
    func lock(_ page: UInt64) {
        let address = unsafe UnsafeRawPointer(bitPattern: memory.blocks[0].mapping.hostAddress(at: Int(page << 12)))
        #expect(unsafe mlock(address, 4096) == 0)
    }

    func isPlaced(_ page: UInt64) -> Bool { pending.blocks[0].placed.contains(PageIndex(page)) }

    func cameHuge(_ page: UInt64) -> Bool { pending.blocks[0].cameHuge.contains(PageIndex(page)) }

    /// Nobody claimed the page, and it is there.
    func putSomething(at page: UInt64) throws {
        try watched.faults.zero(memory.blocks[0].mapping, Int(page << 12)..<Int((page + 1) << 12))
    }

    /// Pages are not waited for there any more, and none can be put there.
    func stopWatching(_ page: UInt64) throws {
        try watched.faults.unregister(memory.blocks[0].mapping, Int(page << 12)..<Int((page + 1) << 12))
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
        try scene.bring(first + 300..<first + 512)
        #expect(scene.cameHuge(first))
        #expect((first..<first + 512).allSatisfy(scene.holds))
        #expect(scene.memory.blocks[0].hugePages() == 512)
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
        #expect(scene.isPlaced(first + 100) && !scene.isPlaced(first + 99))
        try scene.bring(first + 101..<first + 512)
        #expect(scene.cameHuge(first))
        #expect((first..<first + 512).allSatisfy(scene.holds))
    }

    @Test("in whatever order its pages come, it is whole when the last one is here", arguments: [1, 2, 3] as [UInt64])
    func anyOrder(seed: UInt64) throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        var random = SeededRandom(seed: seed)
        // The first ones open it.
        let parts = [first] + stride(from: first + 16, to: first + 512, by: 16).shuffled(using: &random)
        for start in parts.dropLast() { try scene.bring(start..<start + 16) }
        #expect(!scene.isPlaced(parts[0]))
        try scene.bring(parts[31]..<parts[31] + 16)
        #expect(scene.cameHuge(first))
        #expect((first..<first + 512).allSatisfy(scene.holds))
    }

    @Test("what does not become whole is placed with other pages' beginning, or at the end; the rest is still missing")
    func gaps() throws {
        for ending in 0..<2 {
            let scene = try Scene()
            defer { scene.end() }
            let first = scene.first
            try scene.bring(first..<first + 10)
            try scene.bring(first + 11..<first + 12)
            if ending == 0 { try scene.bring(first + 512..<first + 1024) } else { try scene.placer.close() }
            let here = (first..<first + 10).map(\.self) + [first + 11]
            #expect(here.allSatisfy(scene.isPlaced) && here.allSatisfy(scene.holds), "\(ending)")
            #expect((first..<first + 512).count(where: scene.isPlaced) == 11, "\(ending)")
            #expect(scene.cameHuge(first + 512) == (ending == 0))
            // And it is asked for, once.
            let touch = try scene.touch(first + 10)
            #expect(touch.result(within: 50) == nil)
            #expect(scene.requests == [first + 10])
            try scene.bring(first + 10..<first + 11)
            #expect(touch.result(within: 5000) == true)
        }
    }

    @Test(
        "pages that are in guest memory already, and are written all the time, are parts of it with all that is written"
    )
    func written() throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        let ahead = try PagePlacer(scene.placement)
        // A counter on every 16th page, up and up.
        let counters = stride(from: first, to: first + 1024, by: 16).map(\.self)
        for page in counters {
            let room = try ahead.room(for: PageIndex(page), of: 0)
            room.mapping.zero(at: room.offset, count: 4096)
            try ahead.came(PageIndex(page), of: 0)
            try ahead.flush()
        }
        let isOver = Atomic(false)
        let wrong = Atomic(0)
        let last = Atomic<UInt64>(0)
        let writer = try HostThread(name: "writer") { [memory = scene.memory] in
            var count: UInt64 = 0
            let mapping = memory.blocks[0].mapping
            while !isOver.load(ordering: .relaxed) {
                for page in counters {
                    let offset = Int(page << 12) + 8
                    if mapping.load(at: offset, as: UInt64.self) != count { wrong.add(1, ordering: .relaxed) }
                    mapping.store(count + 1, at: offset)
                }
                count += 1
            }
            last.store(count, ordering: .relaxed)
        }
        for start in stride(from: first, to: first + 1024, by: 512) {
            for page in start..<start + 512 where (page - first) % 16 != 0 { try scene.bring(page..<page + 1) }
            Clock.sleep(nanoseconds: 5_000_000)
        }
        isOver.store(true, ordering: .relaxed)
        writer.join()
        #expect(wrong.load(ordering: .relaxed) == 0)
        #expect(last.load(ordering: .relaxed) > 0)
        #expect(scene.cameHuge(first) && scene.cameHuge(first + 512))
        #expect(scene.memory.blocks[0].hugePages() == 1024)
        #expect((first..<first + 1024).filter { ($0 - first) % 16 != 0 }.allSatisfy(scene.holds))
    }

    @Test("pages that are out of guest memory for a moment are no holes for who looks at page tables")
    func noHoles() throws {
        let scene = try Scene()
        defer { scene.end() }
        let (block, first) = (scene.memory.blocks[0], scene.first)
        block.expect(scene.pending.blocks[0])
        let ahead = try PagePlacer(scene.placement)
        // Each is moved by itself.
        try scene.bring(stride(from: first, to: first + 1024, by: 8).map(\.self), by: ahead)
        let isOver = Atomic(false)
        let looks = Atomic(0)
        let holes = Atomic(0)
        let reader = try HostThread(name: "reader") {
            while !isOver.load(ordering: .relaxed) {
                if (try? block.allocatedRuns(in: block.pages)) != [block.pages] { holes.add(1, ordering: .relaxed) }
                looks.add(1, ordering: .relaxed)
            }
        }
        for start in stride(from: first, to: first + 1024, by: 512) {
            for page in start..<start + 512 where (page - first) % 8 != 0 { try scene.bring(page..<page + 1) }
        }
        while looks.load(ordering: .relaxed) == 0 { Clock.sleep(nanoseconds: 1_000_000) }
        isOver.store(true, ordering: .relaxed)
        reader.join()
        #expect(holes.load(ordering: .relaxed) == 0)
        #expect(scene.cameHuge(first) && scene.cameHuge(first + 512))
    }

    @Test("what was claimed for a huge page that cannot be placed is given back: another connection brings it")
    func failure() throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        try scene.bring(first..<first + 500)
        try scene.stopWatching(first + 70)
        #expect(throws: SystemError.self) { try scene.bring(first + 500..<first + 512) }
        let record = scene.pending.blocks[0]
        let stuck = (first..<first + 512).map { PageIndex($0) }.filter {
            record.claimed.contains($0) && !record.placed.contains($0)
        }
        #expect(stuck.isEmpty)
        let other = try PagePlacer(scene.placement)
        try scene.bring((first + 80..<first + 512).map(\.self), by: other)
        #expect((first + 80..<first + 512).allSatisfy(scene.holds))
    }

    @Test("a page that somebody asked for does not end the huge page that is being put together")
    func requestElsewhere() throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        try scene.bring(first..<first + 300)
        let touch = try scene.touch(first + 512)
        #expect(touch.result(within: 50) == nil)
        #expect(scene.requests == [first + 512])
        try scene.bringSingly(first + 512..<first + 513)
        #expect(touch.result(within: 5000) == true)
        try scene.bring(first + 300..<first + 512)
        try scene.bring(first + 513..<first + 1024)
        #expect(scene.cameHuge(first) && scene.cameHuge(first + 512))
        #expect((first..<first + 1024).allSatisfy(scene.holds))
    }

    @Test("with too many pages there already, or many zeroes, it is placed page by page")
    func notWorthIt() throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        try scene.bring(first..<first + 10)
        try scene.placer.cameAsZeroes(PageIndex(first + 10)..<PageIndex(first + 200), of: 0)
        try scene.bring(first + 200..<first + 512)
        try scene.placer.close()
        #expect(!scene.cameHuge(first))
        #expect((first..<first + 512).allSatisfy(scene.isPlaced))
        #expect((first + 200..<first + 512).allSatisfy(scene.holds))
        #expect(scene.memory.blocks[0].mapping.isZero(at: Int(first + 10) << 12, count: 190 << 12))
    }

    @Test("where the kernel does not move pages, all come to their places all the same")
    func unmoved() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                // Memory that is locked and memory that is not do not change places.
                let scene = try Scene(locks: true)
                defer { scene.end() }
                let first = scene.first
                let ahead = try PagePlacer(scene.placement)
                try scene.bring([first + 3, first + 4, first + 100], by: ahead)
                try scene.bring(first..<first + 512)
                claim((first..<first + 512).allSatisfy(scene.isPlaced), "pages are missing")
                claim((first..<first + 512).allSatisfy(scene.holds), "pages are wrong")
                claim(!scene.cameHuge(first), "it moved")
            }
        }
    }

    @Test("a page that was moved out for nothing comes back itself: a host without memory for another one loses none")
    func movedBack() throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        let ahead = try PagePlacer(scene.placement)
        let (moved, stuck) = ([first + 3, first + 4, first + 9], first + 100)
        try scene.bring(moved + [stuck], by: ahead)
        for page in moved { scene.memory.blocks[0].mapping.store(page, at: Int(page << 12) + 16) }
        scene.lock(stuck)
        let frames = try moved.map(scene.frame)
        try scene.bring((first..<first + 512))
        #expect(!scene.cameHuge(first))
        #expect((first..<first + 512).allSatisfy(scene.isPlaced) && (first..<first + 512).allSatisfy(scene.holds))
        let record = scene.pending.blocks[0]
        #expect(moved.allSatisfy { record.wasMoved.contains(PageIndex($0)) }, "nothing was moved")
        #expect(try moved.map(scene.frame) == frames)
        // And with what the guest wrote there.
        let mapping = scene.memory.blocks[0].mapping
        #expect(moved.allSatisfy { mapping.load(at: Int($0 << 12) + 16, as: UInt64.self) == $0 })
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
        #expect((first..<first + 512).filter { $0 != first + 20 }.allSatisfy(scene.holds))
    }

    @Test("a page that comes again is dropped, and counted")
    func twice() throws {
        let scene = try Scene()
        defer { scene.end() }
        let first = scene.first
        try scene.bring(first..<first + 8)
        let touch = try scene.touch(first + 3)
        #expect(touch.result(within: 5000) == true)
        scene.memory.blocks[0].mapping.store(7 as UInt64, at: Int(first + 3) << 12)
        try scene.bring(first..<first + 512)
        #expect(scene.pending.surplusPages == 1)
        #expect(scene.memory.blocks[0].mapping.load(at: Int(first + 3) << 12, as: UInt64.self) == 7)
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
