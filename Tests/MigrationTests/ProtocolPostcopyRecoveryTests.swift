import GuestMemory
import MigrationStream
import Testing

@testable import Migration

/// A source whose guest has moved, to a QEMU.
private struct Source: SourceDriver {
    var core: SourceCore
    var actions: [SourceAction] = []

    init(preempts: Bool = false) {
        core = SourceCore(.withPostcopy(blocks: ["ram", "rom"], PostcopyTerms(usesUrgentChannel: preempts)))
        feed(.start, .connected(.bothWays), .received(.pong(Wire.godwitPing)), .trackingStarted)
        if preempts { feed(.urgentChannelOpened) }
        feed(.collected(remainingPages: 256), .startPostcopy)
        feed(.roundSent(RoundReport(pages: 16, bytes: 6000, nanoseconds: 1_000_000, interrupted: true)))
        feed(.collected(remainingPages: 240), .guestStopped(wasRunning: true), .collected(remainingPages: 241))
        feed(.stateSaved([DeviceSection(name: "cpu", version: 1, body: [1])]), .discardsSent)
        feed(.received(.pong(3)), .packageSent)
    }

    static func bitmap(_ block: String) -> SourceEvent { .received(.postcopy(.bitmapEnded(block: block))) }

    /// Events up to the given step of a recovery.
    static let steps: [SourceEvent] = [
        .resume, .connected(.bothWays), bitmap("rom"), bitmap("ram"), .received(.postcopy(.resumeAcknowledged)),
    ]

    var deadline: SourceEvent? {
        actions.compactMap { action -> SourceEvent? in
            if case .setTimer(let timer, _) = action, timer.kind == .deadline { .timer(timer) } else { nil }
        }.last
    }
    var isPaused: Bool { core.phase == .postcopyPaused && core.status == .postcopyPaused }
}

/// A destination that runs a QEMU's guest, of which pages are missing.
private struct Destination: DestinationDriver {
    var core: DestinationCore
    var actions: [DestinationAction] = []
    static let old = ConnectionID(1)
    static let new = ConnectionID(2)

    init(isStarted: Bool = true) {
        core = DestinationCore(.withPostcopy())
        feed(.accepted(Self.old, answers: true))
        let discard = RAMDiscard(block: "ram", ranges: [.init(offset: 0, length: 8192)])
        for item: StreamItem in [
            .header, .configuration(machine: "m"), .command(.openReturnPath),
            .command(.postcopy(.advise(PostcopyAdvice(blockPageSizes: 4096)))), .ramSetup([]), .ramSectionEnded(.start),
            .command(.postcopy(.discard(discard))), .command(.postcopy(.packaged(byteCount: 9))),
            .command(.postcopy(.listen)),
            .device(SectionHead(type: .full, id: 9, name: "cpu", instance: 0, version: 1), body: [1]),
            .command(.postcopy(.run)),
        ] { feed(.item(Self.old, item)) }
        if isStarted { feed(.stateLoaded(nanoseconds: 1), .guestStarted(nanoseconds: 1)) }
    }

    @discardableResult
    mutating func say(_ command: PostcopyCommand) -> [DestinationAction] {
        feed(.item(Self.new, .command(.postcopy(command))))
    }

    /// A new connection begins as one that recovers.
    mutating func come() {
        feed(.accepted(Self.new, answers: true), .cameToRecover(Self.new))
    }

    var answers: [ReturnPathMessage] { Self.messages(on: Self.new, in: actions) }
}

@Suite("A postcopy's next connection")
struct ProtocolPostcopyRecoveryTests {
    @Test("the source asks what is there, without a header, then goes on with the rest; nothing is sent before")
    func source() {
        var source = Source()
        source.feed(.disconnected("reset"))
        #expect(source.isPaused)
        #expect(source.feed(.resume).contains(.connect) && source.core.status == .postcopyRecoverSetup)
        let first = source.feed(.connected(.bothWays))
        #expect(first.first == .prepareRecovery && source.core.status == .postcopyRecover)
        let words = first.compactMap { if case .send(let bytes) = $0 { bytes } else { nil } }.flatMap(\.self)
        #expect(StreamDecoder.recoveryIsAnnounced(by: words) && words.count == 2 * (5 + 4))
        #expect(!source.feed(Source.bitmap("rom")).contains(.adoptBitmaps))
        let last = source.feed(Source.bitmap("ram"))
        #expect(last.contains(.adoptBitmaps) && !last.contains(.servePages))
        #expect(source.feed(.received(.postcopy(.resumeAcknowledged))).contains(.servePages))
        #expect(source.core.phase == .pulled && source.core.status == .postcopyActive)
        source.feed(.pagesServed, .received(.shut(0)))
        #expect(source.actions.contains(.finished(.completed)))
    }

    @Test("with a channel for requested pages it waits for that, which is asked for when the main one is known")
    func preempt() {
        var source = Source(preempts: true)
        source.feed(.disconnected("reset"), .resume)
        #expect(!source.feed(.connected(.bothWays)).contains(.openUrgentChannel))
        #expect(source.feed(Source.bitmap("ram")).contains(.openUrgentChannel))
        source.feed(Source.bitmap("rom"))
        #expect(source.core.phase == .recoveringBitmaps)
        source.feed(.urgentChannelOpened)
        #expect(source.core.phase == .resumingPostcopy)
    }

    @Test("whatever goes wrong on the way, it is paused again, the guest never runs here, and it may be tried again")
    func sourceFails() {
        let failures: [SourceEvent] = [
            .disconnected("gone"), .connectFailed("refused"), .breakOff, .received(.shut(1)), .received(.shut(0)),
            .received(.failure(reason: "no")), .received(.ready(nanoseconds: 1)), Source.bitmap("rom"),
            Source.bitmap("unknown"), .urgentChannelFailed("refused"), .urgentChannelLost("gone"),
        ]
        for count in 1..<Source.steps.count {
            for failure in failures.map(Optional.some) + [nil] {
                var source = Source()
                source.feed(.disconnected("reset"))
                for step in Source.steps.prefix(count) { source.feed(step) }
                guard let event = failure ?? source.deadline else { continue }
                let before = source.core.phase
                source.feed(event)
                let isExpected = source.core.phase == before || source.isPaused
                #expect(isExpected, "\(event) in \(before): \(source.core.phase)")
                if case .disconnected = event, count > 1 { #expect(source.isPaused) }
                if failure == nil || event == .breakOff { #expect(source.isPaused, "\(event) in \(before)") }
                #expect(!source.core.mayRun && !source.actions.contains(.resumeGuest))
                guard source.isPaused else { continue }
                for step in Source.steps { source.feed(step) }
                #expect(source.core.phase == .pulled, "\(event) in \(before)")
            }
        }
    }

    @Test("there is nothing to break off before the guest has moved, nor when nothing is connected")
    func nothingToPause() {
        var source = Source()
        source.feed(.disconnected("reset"))
        #expect(source.feed(.breakOff) == [.refused(SourceCore.nothingToPause)])
        var early = SourceCore(
            SourceConfiguration(migration: MigrationIdentifier(high: 1, low: 2), machineName: "m", blocks: []))
        _ = early.handle(.start)
        #expect(early.handle(.breakOff) == [.refused(SourceCore.nothingToPause)])
    }

    @Test("who comes without a name is believed where the operator announced one, and when the old connection is lost")
    func destination() {
        var destination = Destination()
        destination.come()
        #expect(destination.actions.contains(.close(Destination.new)), "the old connection stands")
        destination = Destination()
        destination.feed(.disconnected(Destination.old, "gone"))
        destination.come()
        #expect(destination.actions.contains(.close(Destination.new)), "nobody said migrate-recover")
        destination = Destination()
        destination.feed(.disconnected(Destination.old, "gone"), .awaitRecovery)
        destination.come()
        #expect(destination.core.isRecovering(Destination.new) && !destination.core.acceptsPages(on: Destination.new))
        destination.say(.receiveBitmap(block: "ram"))
        destination.say(.resume)
        #expect(destination.answers == [.postcopy(.resumeAcknowledged)])
        #expect(destination.core.phase == .pulling && destination.core.acceptsPages(on: Destination.new))
        #expect(destination.reported.suffix(3) == [.postcopyPaused, .postcopyRecover, .postcopyActive])
        // What the end of the old connection was asked about does not count for the new one.
        destination.feed(.pullEnded(missing: 2))
        #expect(destination.core.phase == .pulling)
        destination.feed(.item(Destination.new, .ramSectionEnded(.end)), .item(Destination.new, .endOfStream))
        destination.feed(.pullEnded(missing: 0))
        #expect(destination.core.phase == .started)
    }

    @Test(
        "pages and other words before POSTCOPY_RESUME, a loss and an operator's pause lead back, and it may come again")
    func destinationFails() {
        let failures: [DestinationEvent] = [
            .item(Destination.new, .ramRound(final: false)), .item(Destination.new, .command(.postcopy(.run))),
            .item(Destination.new, .endOfStream), .disconnected(Destination.new, "gone"), .breakOff,
            .rejected(Destination.new, "nonsense"),
        ]
        for failure in failures {
            var destination = Destination()
            destination.feed(.disconnected(Destination.old, "gone"), .awaitRecovery)
            destination.come()
            destination.feed(failure)
            #expect(destination.core.phase == .pullPaused && destination.core.status == .postcopyPaused, "\(failure)")
            #expect(destination.actions.contains(.drop(Destination.new)), "\(failure)")
            destination.come()
            destination.say(.resume)
            #expect(destination.core.phase == .pulling, "\(failure)")
        }
    }

    @Test("a source that sends nothing any more is lost; one that sends is not")
    func silence() {
        var destination = Destination()
        func deadlines() -> [DestinationEvent] {
            destination.actions.compactMap {
                if case .setTimer(let timer, _) = $0, timer.kind == .deadline { .timer(timer) } else { nil }
            }
        }
        let first = deadlines().last
        destination.feed(.progressed(Destination.old))
        if let first { destination.feed(first) }
        #expect(destination.core.phase == .pulling)
        if let second = deadlines().last { destination.feed(second) }
        #expect(destination.core.phase == .pullPaused)
    }

    @Test("a guest that is still being started, and may wait for a page with it, is taken up like any other")
    func whileStarting() {
        var destination = Destination(isStarted: false)
        destination.feed(.disconnected(Destination.old, "gone"), .awaitRecovery)
        #expect(destination.core.phase == .loading && destination.core.status == .postcopyPaused)
        destination.come()
        destination.say(.resume)
        #expect(destination.core.phase == .loading && destination.core.acceptsPages(on: Destination.new))
        destination.feed(.stateLoaded(nanoseconds: 1), .guestStarted(nanoseconds: 1))
        #expect(destination.core.phase == .pulling && destination.core.status == .postcopyActive)
    }

    @Test("a bitmap is taken once for each block, in its size, and holds for whole pages only")
    func bitmaps() throws {
        let blocks = [
            RAMBlockDescription(name: "ram", length: 70 * 4096), RAMBlockDescription(name: "rom", length: 4096),
        ]
        let bitmaps = ReceivedBitmaps(blocks)
        #expect(throws: ReceivedBitmaps.Refusal.self) { try bitmaps.begin("flash") }
        try bitmaps.begin("ram")
        // In pieces, with bits behind the last page.
        let bytes: [UInt8] = [0b101, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0xff, 0, 0, 0, 0, 0, 0]
        for piece in [bytes[..<3], bytes[3...]] {
            var buffer = ReceiveBuffer()
            buffer.append(piece)
            bitmaps.take(buffer.bytes)
        }
        #expect(throws: ReceivedBitmaps.Refusal.self) { try bitmaps.begin("ram") }
        #expect(bitmaps.received == nil)
        try bitmaps.begin("rom")
        let received = try #require(bitmaps.received)
        let pages = (UInt64(0)..<70).filter { received[0].contains(PageIndex($0)) }
        #expect(pages == [0, 2, 63, 64, 65, 66, 67, 68, 69])
        #expect(received[1].nextRun(from: PageIndex(0)) == nil)
    }
}
