import Glibc
import Host
import Synchronization
import Testing

/// Memory that faults, and bytes to put there.
private struct Scene {
    static let page = 4096
    let pageCount: Int
    let guest: Mapping
    /// The same memory seen beside the faults, where it is a file's.
    let alias: Mapping?
    let source: Mapping

    enum Memory: String, CaseIterable, CustomTestStringConvertible {
        case anonymous, shared
        var testDescription: String { rawValue }
    }

    init(_ memory: Memory, pages: Int = 64) throws {
        pageCount = pages
        switch memory {
        case .anonymous:
            guest = try Mapping(anonymousByteCount: pages * Self.page)
            alias = nil
        case .shared:
            let file = try MemoryFile(name: "faults", byteCount: UInt64(pages * Self.page))
            guest = try Mapping(file.descriptor, byteCount: pages * Self.page)
            alias = try Mapping(file.descriptor, byteCount: pages * Self.page)
        }
        source = try Mapping(anonymousByteCount: pages * Self.page)
        for index in 0..<pages { source.store(Self.word(index), at: index * Self.page + 8) }
    }

    var all: Range<Int> { 0..<pageCount * Self.page }

    static func word(_ page: Int) -> UInt64 { UInt64(page + 1) &* 0x9E37_79B9_7F4A_7C15 }
    static func range(_ page: Int, _ count: Int = 1) -> Range<Int> { page * Self.page..<(page + count) * Self.page }

    func pageIndex(_ fault: PageFault) -> Int { Int(fault.address - guest.hostAddress(at: 0)) / Self.page }
    func holds(_ page: Int) -> Bool { guest.load(at: page * Self.page + 8, as: UInt64.self) == Self.word(page) }
}

/// All need the right to handle faults of the kernel.
private let isAllowed = (try? UserFault.supportedFeatures()) != nil

@Suite(.enabled(if: isAllowed, "this process may have no userfaultfd")) struct UserFaultTests {
    @Test(
        "who touches a missing page sleeps until it is placed, and reads what was placed",
        arguments: Scene.Memory.allCases)
    fileprivate func missing(_ memory: Scene.Memory) throws {
        let scene = try Scene(memory)
        let faults = try UserFault()
        #expect(try faults.register(scene.guest, scene.all, .missing).isSuperset(of: [.copy, .zero, .wake]))
        let isRight = Atomic(false)
        let touch = try Touch { isRight.store(scene.holds(5), ordering: .relaxed) }
        #expect(!touch.hasEnded(within: 50))
        let server = try FaultServer(faults) { faults, fault in
            let range = Scene.range(scene.pageIndex(fault))
            try faults.copy(scene.source, at: range.lowerBound, into: scene.guest, range)
        }
        #expect(touch.hasEnded())
        #expect(isRight.load(ordering: .relaxed) == true)
        server.end()
        #expect(server.errors.isEmpty)
        #expect(server.seen.map(scene.pageIndex) == [5])
        #expect(server.seen.allSatisfy { !$0.isMinor && !$0.isWrite })
    }

    @Test("a page that the file has and nobody mapped yet stops who touches it once, and needs no copy")
    func minor() throws {
        let scene = try Scene(.shared)
        let alias = try #require(scene.alias)
        let faults = try UserFault(wanting: .minorShared)
        try #require(faults.features.contains(.minorShared))
        #expect(try faults.register(scene.guest, scene.all, [.missing, .minor]).contains(.mapExisting))
        alias.copy(from: scene.source, at: 0, count: scene.source.byteCount)
        let server = try FaultServer(faults) { faults, fault in
            try faults.mapExisting(scene.guest, Scene.range(scene.pageIndex(fault)))
        }
        let right = Atomic(0)
        let touch = try Touch {
            for page in 0..<scene.pageCount where scene.holds(page) { right.add(1, ordering: .relaxed) }
            for page in 0..<scene.pageCount where scene.holds(page) { right.add(1, ordering: .relaxed) }
        }
        #expect(touch.hasEnded())
        server.end()
        #expect(right.load(ordering: .relaxed) == 2 * scene.pageCount)
        #expect(server.errors.isEmpty)
        #expect(server.seen.map(scene.pageIndex) == Array(0..<scene.pageCount))
        #expect(server.seen.filter { !$0.isMinor }.isEmpty)
    }

    @Test(
        "who sleeps in one mapping of a file goes on when its page is placed through another, and is woken in the first"
    )
    func window() throws {
        let scene = try Scene(.shared)
        let window = try #require(scene.alias)
        let faults = try UserFault()
        let (here, there) = (scene.guest.hostAddress(at: 0), window.hostAddress(at: 0))
        try faults.register(scene.guest, scene.all, .missing)
        try faults.register(there..<there + UInt(window.byteCount), .missing)
        let isRight = Atomic(false)
        let touch = try Touch {
            isRight.store(window.load(at: 7 * Scene.page + 8, as: UInt64.self) == Scene.word(7), ordering: .relaxed)
        }
        var batch = PageFaultBatch()
        try #require(try faults.waitForFaults(into: &batch, stop: EventDescriptor()))
        #expect(batch[0].address == there + UInt(7 * Scene.page))
        try faults.copy(scene.source, at: Scene.range(7).lowerBound, into: scene.guest, Scene.range(7))
        try faults.wake(here..<here + UInt(Scene.page))
        #expect(!touch.hasEnded(within: 50))
        try faults.wake(batch[0].address..<batch[0].address + UInt(Scene.page))
        #expect(touch.hasEnded())
        #expect(isRight.load(ordering: .relaxed) == true)
        // What is not registered any more stops nobody.
        try faults.unregister(there..<there + UInt(window.byteCount))
        #expect(window.load(at: 8 * Scene.page, as: UInt64.self) == 0)
    }

    @Test("a hole of the file is no minor fault, and cannot be mapped")
    func holeIsMissing() throws {
        let scene = try Scene(.shared)
        let faults = try UserFault(wanting: .minorShared)
        try faults.register(scene.guest, scene.all, [.missing, .minor])
        #expect { try faults.mapExisting(scene.guest, Scene.range(3)) } throws: { ($0 as? SystemError)?.code == EFAULT }
        let server = try FaultServer(faults) { faults, fault in
            try faults.zero(scene.guest, Scene.range(scene.pageIndex(fault)))
        }
        let touch = try Touch { scene.guest.store(UInt8(1), at: 3 * Scene.page) }
        #expect(touch.hasEnded())
        server.end()
        #expect(server.errors.isEmpty)
        #expect(server.seen.map(\.isMinor) == [false] && server.seen.map(\.isWrite) == [true])
    }

    @Test(
        "a page that is there is never overwritten, and the others around it are placed",
        arguments: Scene.Memory.allCases)
    fileprivate func present(_ memory: Scene.Memory) throws {
        let scene = try Scene(memory)
        let faults = try UserFault()
        try faults.register(scene.guest, scene.all, .missing)
        let placed = try faults.copy(scene.source, at: 0, into: scene.guest, Scene.range(10))
        #expect(placed == Scene.page)
        scene.guest.store(UInt64(77), at: 10 * Scene.page + 8)
        try faults.zero(scene.guest, Scene.range(20, 2))
        #expect(
            try faults.copy(scene.source, at: 0, into: scene.guest, scene.all) == (scene.pageCount - 3) * Scene.page)
        #expect(scene.guest.load(at: 10 * Scene.page + 8, as: UInt64.self) == 77)
        #expect(scene.guest.isZero(at: 20 * Scene.page, count: 2 * Scene.page))
        #expect((0..<scene.pageCount).allSatisfy { [10, 20, 21].contains($0) || scene.holds($0) })
        #expect(try faults.copy(scene.source, at: 0, into: scene.guest, scene.all) == 0)
        #expect(try faults.zero(scene.guest, scene.all) == 0)
    }

    @Test("who was not to be woken sleeps on until wake")
    func wake() throws {
        let scene = try Scene(.anonymous)
        let faults = try UserFault()
        try faults.register(scene.guest, scene.all, .missing)
        let touch = try Touch { _ = scene.holds(0) }
        var batch = PageFaultBatch(capacity: 4)
        let never = try EventDescriptor()
        #expect(try faults.waitForFaults(into: &batch, stop: never))
        #expect(batch.count == 1)
        try faults.copy(scene.source, at: 0, into: scene.guest, Scene.range(0), wakes: false)
        #expect(!touch.hasEnded(within: 50))
        try faults.wake(scene.guest, Scene.range(0))
        #expect(touch.hasEnded())
    }

    @Test("a page that comes a second time wakes who began to wait for it between")
    func secondCopyWakes() throws {
        let scene = try Scene(.anonymous)
        let faults = try UserFault()
        try faults.register(scene.guest, scene.all, .missing)
        let touch = try Touch { _ = scene.holds(1) }
        var batch = PageFaultBatch(capacity: 4)
        #expect(try faults.waitForFaults(into: &batch, stop: EventDescriptor()))
        try faults.copy(scene.source, at: 0, into: scene.guest, scene.all, wakes: false)
        #expect(!touch.hasEnded(within: 20))
        #expect(try faults.copy(scene.source, at: Scene.page, into: scene.guest, Scene.range(1)) == 0)
        #expect(touch.hasEnded())
    }

    @Test("a page placed through another userfaultfd than the range's own wakes nobody")
    func other() throws {
        let scene = try Scene(.anonymous)
        let (faults, other) = (try UserFault(), try UserFault())
        try faults.register(scene.guest, scene.all, .missing)
        let touch = try Touch { _ = scene.holds(0) }
        #expect(!touch.hasEnded(within: 20))
        try other.copy(scene.source, at: 0, into: scene.guest, Scene.range(0))
        #expect(!touch.hasEnded(within: 50))
        try faults.wake(scene.guest, Scene.range(0))
        #expect(touch.hasEnded())
    }

    @Test("many threads that wait are read in one batch, each with its thread")
    func batch() throws {
        let scene = try Scene(.anonymous)
        let faults = try UserFault(wanting: [.threadID, .exactAddress])
        try faults.register(scene.guest, scene.all, .missing)
        let touches = try (0..<8).map { page in try Touch { _ = scene.holds(page) } }
        for touch in touches { #expect(!touch.hasEnded(within: 20)) }
        var batch = PageFaultBatch(capacity: 5)
        var seen: [PageFault] = []
        while seen.count < 8, try faults.waitForFaults(into: &batch, stop: EventDescriptor()) {
            if seen.isEmpty { #expect(batch.count == 5) }
            seen += (0..<batch.count).map { batch[$0] }
        }
        #expect(Set(seen.map(scene.pageIndex)) == Set(0..<8))
        for fault in seen {
            #expect(fault.threadID == touches[scene.pageIndex(fault)].thread.identifier)
            #expect(fault.address % 4096 == 8)
        }
        try faults.copy(scene.source, at: 0, into: scene.guest, Scene.range(0, 8))
        #expect(touches.allSatisfy { $0.hasEnded() })
        try faults.read(into: &batch)
        #expect(batch.count == 0)
    }

    @Test("a fault of the kernel, which copies to the page, is one like any other")
    func kernelFault() throws {
        let scene = try Scene(.anonymous)
        let faults = try UserFault()
        try faults.register(scene.guest, scene.all, .missing)
        let server = try FaultServer(faults) { faults, fault in
            try faults.zero(scene.guest, Scene.range(scene.pageIndex(fault)))
        }
        let (reader, writer) = try Descriptor.pipe()
        try writer.writeAll([UInt8](repeating: 9, count: 100))
        let count = Atomic(0)
        let touch = try Touch {
            let read = unsafe scene.guest.withMutableBytes(at: 2 * Scene.page - 50, count: 100) {
                unsafe (try? reader.read(into: $0)) ?? nil
            }
            count.store(read ?? -1, ordering: .relaxed)
        }
        #expect(touch.hasEnded())
        server.end()
        #expect(count.load(ordering: .relaxed) == 100)
        #expect(scene.guest.read(at: 2 * Scene.page - 50, count: 100) == [UInt8](repeating: 9, count: 100))
        #expect(Set(server.seen.map(scene.pageIndex)) == [1, 2])
    }

    @Test(
        "whoever sleeps goes on when the range is no longer watched, or the userfaultfd is gone",
        arguments: [true, false])
    func unregister(_ byUnregister: Bool) throws {
        let scene = try Scene(.anonymous)
        var faults: UserFault? = try UserFault()
        try faults?.register(scene.guest, scene.all, .missing)
        let touch = try Touch { _ = scene.holds(7) }
        #expect(!touch.hasEnded(within: 50))
        if byUnregister { try faults?.unregister(scene.guest, scene.all) } else { faults = nil }
        #expect(touch.hasEnded())
        #expect(scene.guest.isZero(at: 7 * Scene.page, count: Scene.page))
    }

    @Test("a waiting reader ends when it is told to")
    func stop() throws {
        let faults = try UserFault()
        let stop = try EventDescriptor()
        let touch = try Touch {
            var batch = PageFaultBatch()
            while (try? faults.waitForFaults(into: &batch, stop: stop)) ?? false {}
        }
        #expect(!touch.hasEnded(within: 20))
        stop.raise()
        #expect(touch.hasEnded())
    }
}

@Suite(.enabled(if: isAllowed, "this process may have no userfaultfd")) struct UserFaultErrorTests {
    @Test("what memory cannot do is refused with a sentence that says what could")
    func refused() throws {
        let scene = try Scene(.anonymous)
        let faults = try UserFault()
        #expect {
            try faults.register(scene.guest, scene.all, .minor)
        } throws: {
            "\($0)".hasPrefix("UFFDIO_REGISTER \(scene.guest.byteCount) bytes at offset 0: invalid argument")
                && "\($0)".contains("memfd")
        }
        try faults.register(scene.guest, scene.all, .missing)
        let other = try UserFault()
        #expect {
            try other.register(scene.guest, scene.all, .missing)
        } throws: {
            ($0 as? SystemError)?.code == EBUSY
        }
        #expect { try faults.zero(scene.guest, 100..<200) } throws: { ($0 as? SystemError)?.code == EINVAL }
        #expect { try faults.zero(scene.source, Scene.range(0)) } throws: { ($0 as? SystemError)?.code == ENOENT }
    }

    @Test("a range outside the mapping ends the process")
    func bounds() async {
        await #expect(processExitsWith: .failure) {
            let mapping = try Mapping(anonymousByteCount: 4096)
            try UserFault().register(mapping, 0..<8192, .missing)
        }
    }

    /// Where everybody may have one, there is nothing to be refused.
    private static let asksForPrivilege: Bool = {
        let text = (try? Descriptor.contents(of: "/proc/sys/vm/unprivileged_userfaultfd")) ?? []
        return geteuid() == 0 && text.first == UInt8(ascii: "0")
    }()

    @Test("who may not have one is told how to get it", .enabled(if: asksForPrivilege))
    func permission() async {
        await #expect(processExitsWith: .exitCode(7)) {
            guard setuid(65534) == 0 else { exit(2) }
            do throws(SystemError) { _ = try UserFault() } catch {
                let text = error.description
                let words = ["userfaultfd", "CAP_SYS_PTRACE", "/dev/userfaultfd", "vm.unprivileged_userfaultfd=1"]
                exit(words.allSatisfy(text.contains) && error.code == EPERM ? 7 : 3)
            }
            exit(4)
        }
    }
}
