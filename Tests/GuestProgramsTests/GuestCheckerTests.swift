import TestSupport
import Testing

@testable import GuestPrograms

@Suite("Checker of guest memory")
struct GuestCheckerTests {
    static let guests = [
        "dirty,words=1", "dirty,random,words=3", "dirty,random,words=5,working-set=300K",
        "dirty,sequential,stride=3,words=1",
        "dirty,random,stride=5,working-set=1M,words=1", "dirty,fill=none,working-set=100K,random",
        "probe,write,words=1,fill=1M,working-set=2M", "probe,write,fill=none,working-set=64K,sequential",
        "idle,words=2",
        "probe,words=1,working-set=64K", "dirty,fill=300K,working-set=12K,random,seed=0xffffffffffffffff",
    ]

    /// RAM that crosses the hole: 4 MiB at 0, 2 MiB at 4 GiB.
    private func model(_ text: String, cpus: Int = 2, active: Int? = nil) throws -> GuestModel {
        try GuestModel(text, memoryBytes: 6 << 20, lowMemoryBytes: 4 << 20, cpus: cpus, active: active)
    }

    private func check(_ model: GuestModel) throws -> GuestCheck {
        try unsafe GuestChecker(read: model.reader).check()
    }

    @Test("a guest stopped between any two stores is verified", arguments: guests, [1, 2, 5])
    func sound(text: String, cpus: Int) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var random = SeededRandom(seed: seed)
        let model = try model(text, cpus: cpus)
        for round in 0..<24 {
            if round == 8 { model.fillAll() }
            model.run(stores: Int.random(in: 0..<(round % 4 == 0 ? 3000 : 4), using: &random), random: &random)
            let result = try check(model)
            #expect(result.isVerified, "seed \(seed), round \(round): \(result)")
            if round >= 8, !text.hasPrefix("probe,write") {
                #expect(result.pagesUnwritten == 0, "seed \(seed), round \(round)")
            }
        }
    }

    @Test("with every store of a short run in turn, no stop gives a false alarm", arguments: ["sequential", "random"])
    func everyStop(order: String) throws {
        let model = try model("dirty,\(order),fill=none,working-set=20K,words=2", cpus: 2)
        var random = SeededRandom(seed: 7)
        for stop in 0..<400 {
            let result = try check(model)
            #expect(result.isVerified, "store \(stop): \(result)")
            model.run(stores: 1, random: &random)
        }
        #expect(try check(model).status.passes >= 2)
    }

    /// A guest some way into its third pass.
    private func busy(_ text: String, cpus: Int = 2) throws -> GuestModel {
        let model = try model(text, cpus: cpus)
        model.fillAll()
        var random = SeededRandom(seed: 99)
        while try check(model).status.passes < 2 {
            model.run(stores: 500, random: &random)
        }
        return model
    }

    @Test("every single stale page is found, in either order", arguments: ["sequential", "random"])
    func stale(order: String) throws {
        let model = try busy("dirty,\(order),working-set=400K,fill=400K,words=1")
        let block = model.block
        var inFlight = 0
        for page in block.workFirst..<block.mappedPages {
            let stamp = model.load(page * 4096)
            model.store(stamp - 1, at: page * 4096)
            let result = try check(model)
            if result.isVerified {
                inFlight += 1
            } else {
                #expect(result.stalePages == 1 && result.faultyPages == 1)
                #expect(result.examples.first?.physicalAddress == page * 4096)
            }
            model.store(stamp, at: page * 4096)
        }
        #expect(inFlight <= model.activeCPUs, "only a page in flight may have either count")
    }

    @Test("a write from the future is found", arguments: ["sequential", "random"])
    func premature(order: String) throws {
        let model = try busy("dirty,\(order),working-set=400K,words=1")
        for page in [model.block.workFirst + 7, model.block.fillFirst + 3] {
            let stamp = model.load(page * 4096)
            model.store(stamp + 2, at: page * 4096)
            let result = try check(model)
            #expect(result.prematurePages == 1 && result.faultyPages == 1, "\(result)")
            model.store(stamp, at: page * 4096)
        }
    }

    @Test(
        "a zeroed page, two swapped pages and one damaged word are found and named",
        arguments: guests.filter { !$0.contains("none") })
    func planted(text: String) throws {
        let model = try model(text)
        model.fillAll()
        let pages = [model.block.fillFirst + 5, model.block.fillFirst + 50]
        let contents = pages.map { page in (0..<512).map { model.load(page * 4096 + $0 * 8) } }
        func put(_ words: [UInt64], _ page: UInt64) {
            for (index, word) in words.enumerated() { model.store(word, at: page * 4096 + UInt64(index) * 8) }
        }
        put([UInt64](repeating: 0, count: 512), pages[0])
        var result = try check(model)
        #expect(result.mismatchedTags == 1 && result.faultyPages == 1, "\(result)")
        #expect(result.examples.map(\.physicalAddress) == [pages[0] * 4096])
        put(contents[1], pages[0])
        put(contents[0], pages[1])
        result = try check(model)
        #expect(result.mismatchedTags == 2 && result.faultyPages == 2, "\(result)")
        put(contents[0], pages[0])
        put(contents[1], pages[1])
        for word in [1, 2, 511] as [UInt64] {
            let old = model.load(pages[1] * 4096 + word * 8)
            model.store(old ^ 1 << 40, at: pages[1] * 4096 + word * 8)
            result = try check(model)
            #expect(result.damagedPages == 1 && result.faultyPages == 1, "\(result)")
            #expect(result.examples.first?.expected == old)
            model.store(old, at: pages[1] * 4096 + word * 8)
        }
        #expect(try check(model).isVerified)
    }

    @Test("a fault beyond the hole is reported at its physical address")
    func highMemory() throws {
        let model = try model("dirty,words=1")
        model.fillAll()
        model.store(0, at: 5 << 20)
        #expect(try check(model).examples.map(\.physicalAddress) == [4 << 30 + 1 << 20])
    }

    @Test("damage to the guest's code and to its page tables is found", arguments: [0x8010, 0x100008] as [UInt64])
    func ownPages(address: UInt64) throws {
        let model = try model("idle,fill=none")
        #expect(try check(model).isVerified)
        model.store(model.load(address) ^ 4, at: address)
        let result = try check(model)
        #expect(result.damagedPages == 1 && !result.isVerified)
    }

    @Test("many faults are counted, few are shown")
    func manyFaults() throws {
        let model = try model("idle,words=1")
        model.fillAll()
        for page in model.block.fillRange { model.store(0, at: page * 4096) }
        let result = try check(model)
        #expect(result.mismatchedTags == model.block.fillPages)
        #expect(result.examples.count == GuestCheck.examplesPerFault)
        #expect("\(result)".hasPrefix("NOT verified: \(model.block.fillPages) of"))
    }

    @Test("vCPUs that did not come up leave no gap: the others share their work")
    func missingCPUs() throws {
        let model = try model("dirty,words=1", cpus: 5, active: 3)
        model.fillAll()
        let result = try check(model)
        #expect(result.isVerified && result.pagesUnwritten == 0)
        #expect(result.status.cpusActive == 3 && result.status.cpusExpected == 5)
    }

    @Test("a vCPU stopped by an exception is not verified, whatever its pages hold")
    func faulted() throws {
        let model = try model("idle,words=1")
        model.fillAll()
        model.store(5, at: model.status(1, 0x10))
        let result = try check(model)
        #expect(result.faultyPages == 0 && !result.isVerified)
        #expect("\(result)".contains("vCPU 1 was stopped by an exception"))
    }

    @Test("a guest that has not started is verified as far as it is loaded, and says that nothing else is written")
    func notStarted() throws {
        let model = try model("dirty")
        model.store(0, at: 0xF010)
        let result = try check(model)
        #expect(result.isVerified && result.pagesUnwritten == model.block.fillPages)
    }

    @Test("memory without a guest is an error, not a result")
    func notAGuest() throws {
        let model = try model("dirty")
        for address in [0x7E00, 0xF000, 0x11000] as [UInt64] {
            let word = model.load(address)
            model.store(word ^ 1, at: address)
            #expect(throws: GuestProgramError.self) { try check(model) }
            model.store(word, at: address)
        }
        #expect(try check(model).isVerified)
    }

    @Test("a reader's error comes through")
    func readerFails() throws {
        let checker = unsafe GuestChecker { (address, _) throws(GuestProgramError) in
            throw .unreadable(physicalAddress: address, reason: "gone")
        }
        #expect(throws: GuestProgramError.unreadable(physicalAddress: 0x7E00, reason: "gone")) { try checker.check() }
    }

    @Test("random words in the guest's blocks give an error or faults, never a trap")
    func hostileBlocks() throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var random = SeededRandom(seed: seed)
        let model = try model("dirty,random,fill=none,working-set=40K,words=2")
        model.fillAll()
        model.run(stores: 100, random: &random)
        let places = (0..<20).map { 0x7E00 + $0 * 8 } + [0xF010] + (0..<20).map { 0x10000 + $0 * 8 }
        for _ in 0..<300 {
            let place = UInt64(places.randomElement(using: &random) ?? 0x7E00)
            let old = model.load(place)
            let word = UInt64.random(in: 0...UInt64.max, using: &random)
            model.store([word, word & 0xFF, .max, old ^ 1 << (word & 63), old &+ 1][Int(word % 5)], at: place)
            _ = try? check(model)
            _ = try? unsafe GuestStatus(read: model.reader)
            _ = try? unsafe GuestHistogram(read: model.reader)
            model.store(old, at: place)
        }
        #expect(try check(model).isVerified, "seed \(seed)")
    }
}
