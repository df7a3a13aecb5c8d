import GuestMemory
import Host
import MigrationStream
import TestSupport
import Testing
import Transport

@testable import Migration

@Suite("The source's end of a safety net")
struct EpochKeeperTests {
    private let memory: GuestMemory
    private let keeper: EpochKeeper
    private let listener: Listener
    private let peer: Descriptor
    private let failure = Monitor<String?>(nil)

    /// A keeper of 64 pages, linked with a destination.
    init() throws {
        memory = GuestMemory(blocks: [try RAMBlock(name: "ram", byteCount: 64 << 12)])
        keeper = EpochKeeper(memory, [RAMBlockDescription(name: "ram", length: 64 << 12)])
        let path = temporaryPath("keeper-\(UInt64.random(in: 0...UInt64.max))")
        listener = try Listener(on: .unix(path: path), tls: nil, descriptors: { _ in nil })
        peer = try Socket.connect(unix: path)
        memory.blocks[0].mapping.write([7], at: 4096)
        try keeper.attach(try listener.accept(), stays: {}) { [failure] error in
            failure.withLock { $0 = error.description }
        }
        #expect(try peer.read(upTo: 64) == EpochMessage.kept(epoch: 0).bytes)
    }

    private func say(_ messages: EpochMessage...) throws {
        let bytes = messages.flatMap(\.bytes)
        #expect(try peer.writeWithoutBlocking(bytes) == bytes.count)
    }

    private var byte: [UInt8] { memory.blocks[0].mapping.read(at: 4096, count: 1) }

    @Test("an epoch that comes while the guest is still here is not kept, and changes nothing of its memory")
    func early() throws {
        try say(.zeroes(block: 0, first: 0, count: 64), .end(epoch: 1, guestRuns: true))
        let told = failure.wait(deadline: .after(seconds: 10)) { $0 }
        #expect(told?.contains("while the guest is here") == true, "\(told ?? "nothing is said")")
        #expect(byte == [7])
        #expect(keeper.takeOut().epoch == 0)
    }

    @Test("the guest is taken back as it was at the end of an epoch that is whole")
    func kept() throws {
        keeper.guestLeaves()
        try say(.zeroes(block: 0, first: 0, count: 64))
        #expect(byte == [7], "that epoch is not over")
        try say(.end(epoch: 1, guestRuns: false))
        #expect(try peer.read(upTo: 64) == EpochMessage.kept(epoch: 1).bytes)
        let kept = keeper.takeOut()
        #expect(kept.epoch == 1 && !kept.guestRuns && byte == [0])
        // Its link is ended.
        #expect(try peer.read(upTo: 64)?.isEmpty == true)
    }

    @Test("a guest that leaves once more is kept from the beginning, and a released one hears it")
    func again() throws {
        keeper.guestLeaves()
        try say(.end(epoch: 1, guestRuns: true))
        #expect(try peer.read(upTo: 64) == EpochMessage.kept(epoch: 1).bytes)
        keeper.guestIsBack()
        keeper.guestLeaves()
        try say(.end(epoch: 1, guestRuns: true))
        #expect(try peer.read(upTo: 64) == EpochMessage.kept(epoch: 1).bytes)
        keeper.release()
        #expect(try peer.read(upTo: 64) == EpochMessage.released.bytes)
        #expect(keeper.figures.isOver && failure.withLock { $0 } == nil)
        keeper.end()
    }
}
