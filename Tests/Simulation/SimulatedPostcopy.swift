import Migration
import MigrationStream
import TestSupport

/// What a run in which the guest moves before its memory has besides.
struct PostcopyPlan: Sendable {
    /// The operator's word.
    var startsAfter: UInt64
    /// Channels for requested pages; 0: they are asked for on the main connection.
    var channels: Int
    var cpus: Int
    /// With so many dirty pages the destination forgets them before the guest stops.
    var pagesForgottenAhead: UInt64 = .max
    /// How likely loading state touches memory.
    var loadTouches: Double
    /// A channel for requested pages is cut at these steps.
    var cutSteps: Set<Int> = []
    /// The operator takes up what lost its connection.
    var recovers = true
    var blows: [(SimulationPlan.Trigger, PostcopyBlow)] = []
    /// Connections that take it up are cut after so many bytes towards that side.
    var furtherCuts: [(side: SimulationPlan.Side, bytes: Int)] = []
    /// How likely a recovery goes to a wrong address, is begun twice, or is disturbed by strangers.
    var mistakes = 0.0
    /// The guest can be taken back (`x-postcopy-safety-net`).
    var hasNet = false
    var isUndisturbed: Bool { cutSteps.isEmpty && blows.isEmpty }

    static func random(using generator: inout SeededRandom) -> PostcopyPlan {
        var plan = PostcopyPlan(
            startsAfter: generator.duration(10 * microsecond, 500 * millisecond),
            channels: generator.chance(0.3) ? 0 : Int.random(in: 1...4, using: &generator),
            cpus: Int.random(in: 1...4, using: &generator), loadTouches: generator.chance(0.5) ? 0.7 : 0)
        if generator.chance(0.15) {
            plan.cutSteps = [Int.random(in: 0...Int.random(in: 50...1500, using: &generator), using: &generator)]
        }
        plan.recovers = generator.chance(0.85)
        if generator.chance(0.6) {
            plan.blows = (0..<Int.random(in: 1...5, using: &generator)).map { _ in
                PostcopyBlow.random(using: &generator)
            }
        }
        if generator.chance(0.5) {
            plan.furtherCuts = (0..<Int.random(in: 1...5, using: &generator)).map { _ in
                Bool.random(using: &generator)
                    ? (
                        .destination,
                        Int.random(in: 0...Int.random(in: 1...20_000, using: &generator), using: &generator)
                    )
                    : (.source, Int.random(in: 0...Int.random(in: 1...300, using: &generator), using: &generator))
            }
        }
        if generator.chance(0.4) { plan.mistakes = Double.random(in: 0.05...0.4, using: &generator) }
        if generator.chance(0.5) { plan.pagesForgottenAhead = UInt64.random(in: 1...16, using: &generator) }
        return plan
    }
}

/// The source's side of a move.
struct SimulatedMove {
    enum Service { case nothing, requests, everything }

    /// What DISCARD named, again and again until the guest stands still, and what of it nobody took.
    var discarded: [Bool] = []
    var wanted: [Bool] = []
    var isOpen = false
    /// Requests may come that were said before the move was taken back.
    var isWithdrawn = false
    var service = Service.nothing
    /// Asked for on the main connection.
    var queue: [Int] = []
    /// Counts moves: a late step of one before counts for nothing.
    var number = 0
    /// Of its main channel, begun afresh by each job.
    var records: RAMRecordEncoder

    struct Urgent {
        let connection: SimulatedConnection
        var messages: ReturnPathDecoder
        var input = ReceiveBuffer()
        var records: RAMRecordEncoder
    }
    var urgent: [ConnectionID: Urgent] = [:]
    var bitmaps = SimulatedBitmaps()
    /// All was sent.
    var isServed = false
    var packageIsLeaving = false
    /// By QEMU's rule the guest may run at the destination from then on.
    var packageWasSent = false
}

/// The destination's side.
struct SimulatedPull {
    var isListening = false
    var expected: [Bool]
    /// A reader has its contents whole, and places them in a moment.
    var claimed: [Bool]
    var placed: [Bool]
    var asked: [Bool]
    /// What each page must hold: as it was when the guest stood still, or what the guest wrote since.
    var model: [UInt64] = []
    /// Who waits for a page: what is done when it is there, or is waited for no longer.
    var waiting: [(page: Int, goOn: () -> Void)] = []
    var channels: [ConnectionID?] = []
    var main: ConnectionID?
    var accesses = 0
    /// Of this watch over memory: what one before still places does not count.
    var number: Int

    init(pages: Int, number: Int) {
        self.number = number
        expected = [Bool](repeating: false, count: pages)
        claimed = expected
        placed = expected
        asked = expected
    }

    func isMissing(_ page: Int) -> Bool { isListening && expected[page] && !placed[page] }
    var missing: Int { expected.indices.count { expected[$0] && !placed[$0] } }
    var hasClaims: Bool { claimed.indices.contains { claimed[$0] && !placed[$0] } }
}

// The source's shell, as far as postcopy concerns it.

extension Simulator {
    private static let batchPages = 8

    /// - Returns: whether the action was one of postcopy's.
    func performMove(_ action: SourceAction) -> Bool {
        if performNet(action) { return true }
        switch action {
        case .openUrgentChannels(let count): openUrgentChannels(count)
        case .sendDiscards: sendDiscards()
        case .sendPackage(let bytes):
            (move.isOpen, move.packageIsLeaving, move.packageWasSent) = (true, true, true)
            let isWhole = sourceSendsOnMain(bytes)
            schedule(after: microsecond, millisecond) { [self] in
                move.packageIsLeaving = false
                feedSource(isWhole ? .packageSent : .packageCut("the connection was reset"))
            }
        case .openUrgentChannel: openUrgentChannels(1, areGreeted: false)
        case .serveRequests: serve(.requests)
        case .servePages: serve(.everything)
        case .takeBackPages: takeBackPages()
        case .prepareRecovery: prepareRecovery()
        case .adoptBitmaps: adoptBitmaps()
        default: return false
        }
        return true
    }

    private func openUrgentChannels(_ count: Int, areGreeted: Bool = true) {
        let attempt = attempts
        schedule(after: plan.latency.lowerBound, plan.latency.upperBound * 4) { [self] in
            // Of a connection that was given up meanwhile.
            guard attempt == attempts else { return }
            guard sourceIsAlive, sourceConnection != nil, destinationIsAlive, now >= networkIsSilentUntil else {
                return feedSource(.urgentChannelFailed("no route to the destination"))
            }
            for number in 0..<count {
                let connection = SimulatedConnection(ConnectionID(UInt64(connections.count + 1)))
                connections.append(connection)
                let isNet = plan.postcopy?.hasNet == true && number == count - 1
                if !isNet {
                    move.urgent[connection.id] = SimulatedMove.Urgent(
                        connection: connection, messages: ReturnPathDecoder(postcopyOf: map.blocks),
                        records: RAMRecordEncoder(blocks: map.blocks))
                }
                destinationAccepts(connection, isUrgent: areGreeted)
                guard areGreeted else { continue }
                let mark = MultifdGreeting.Mark(
                    migration: source.configuration.migration, channels: count, kind: .urgent)
                send(
                    MultifdGreeting(channel: UInt8(number), mark: mark).bytes, on: connection, towards: .destination)
                if isNet { openNet(connection) }
            }
            feedSource(.urgentChannelOpened)
        }
    }

    private func sendDiscards() {
        move.number += 1
        let number = move.number
        let isFirst = move.discarded.isEmpty
        if isFirst { move.discarded = pending.map { _ in false } }
        if !isFirst { discardsAgain += 1 }
        move.isWithdrawn = false
        truth = sourceGuest.pages
        var named = pending.indices.filter { pending[$0] && !move.discarded[$0] }
        if named.isEmpty, isFirst { named = [0] }
        if bug == .keepsToFirstDiscards, !isFirst { named = [] }
        for page in named { move.discarded[page] = true }
        (move.wanted, move.queue) = (move.discarded, [])
        if bug == .forgetsToDiscard, !named.isEmpty { named.removeFirst() }
        pending = pending.map { _ in false }
        var writer = StreamWriter()
        for page in named {
            let (block, offset) = map.location(of: page)
            writer.command(
                .postcopy(
                    .discard(
                        RAMDiscard(block: map.blocks[block].name, ranges: [.init(offset: offset, length: 4096)]))))
        }
        if !named.isEmpty { sourceSendsOnMain(writer.bytes) }
        schedule(after: 10 * microsecond, 5 * millisecond) { [self] in
            guard number == move.number, sourceConnection != nil else { return }
            feedSource(.discardsSent)
        }
    }

    private func takeBackPages() {
        move.number += 1
        if !move.discarded.isEmpty { movesTakenBack += 1 }
        for page in move.discarded.indices where move.discarded[page] {
            if bug == .losesTakenPages, !move.wanted[page] { continue }
            pending[page] = true
        }
        (move.discarded, move.wanted, move.queue) = ([], [], [])
        (move.isOpen, move.isWithdrawn) = (false, true)
        move.service = .nothing
        closeUrgent()
        records = RAMRecordEncoder(blocks: map.blocks)
    }

    func closeUrgent() {
        let urgent = move.urgent.values.sorted { $0.connection.id.rawValue < $1.connection.id.rawValue }
        move.urgent = [:]
        closeNet()
        for channel in urgent { close(channel.connection, by: .source) }
    }

    // MARK: Requests

    /// - Returns: false: that connection is no channel for requests.
    func urgentSourceReads(_ bytes: [UInt8], on connection: SimulatedConnection) -> Bool {
        if connection === net.channel {
            netSourceReads(bytes, on: connection)
            return true
        }
        guard var urgent = move.urgent.removeValue(forKey: connection.id) else { return false }
        urgent.input.append(bytes)
        var pages: [Int] = []
        do {
            while let message = try urgent.messages.next(from: &urgent.input) {
                guard case .postcopy(.requestPages(let request)) = message else { break }
                pages += claim(request)
            }
        } catch { violate("a request is not understood: \(error)") }
        var out: [UInt8] = []
        for page in pages { write(page, &urgent.records, &out) }
        move.urgent[connection.id] = urgent
        if !out.isEmpty { send(out, on: connection, towards: .destination) }
        return true
    }

    /// On the main connection. - Returns: whether the message was a request.
    func tookRequest(_ message: ReturnPathMessage) -> Bool {
        guard case .postcopy(.requestPages(let request)) = message else { return false }
        let pages = claim(request)
        // To a QEMU they go over the channel for requested pages, which says nothing itself.
        if plan.rule == .qemu, var urgent = move.urgent.values.first {
            var out: [UInt8] = []
            for page in pages { write(page, &urgent.records, &out) }
            move.urgent[urgent.connection.id] = urgent
            if !out.isEmpty { send(out, on: urgent.connection, towards: .destination) }
            return true
        }
        move.queue += pages
        serveQueue()
        return true
    }

    private func claim(_ request: PageRequest) -> [Int] {
        guard move.isOpen else {
            if !move.isWithdrawn { violate("a page is asked for before the destination has the guest's state") }
            return []
        }
        guard let block = map.blocks.firstIndex(where: { $0.name == request.block }) else { return [] }
        let page = map.page(block: block, offset: request.offset)
        guard move.wanted[page] else { return [] }
        if bug != .answersAgain { move.wanted[page] = false }
        if bug == .losesRequests, generator.chance(0.1) { return [] }
        return [page]
    }

    private func write(_ page: Int, _ records: inout RAMRecordEncoder, _ bytes: inout [UInt8]) {
        let (block, offset) = map.location(of: page)
        if sourceGuest.pages[page] == 0 {
            records.zeroPage(block: block, offset: offset, into: &bytes)
        } else {
            records.page(block: block, offset: offset, into: &bytes)
            bytes += SimulatedMemoryMap.contents(sourceGuest.pages[page])
        }
    }

    // MARK: Service

    private func serve(_ service: SimulatedMove.Service) {
        let number = move.number
        move.isServed = false
        guard !move.packageIsLeaving || service == .requests else {
            return schedule(after: microsecond, 100 * microsecond) { [self] in
                if number == move.number, sourceConnection != nil { serve(service) }
            }
        }
        move.service = service
        move.records = RAMRecordEncoder(blocks: map.blocks)
        serveQueue()
        if service == .everything { serveRest(move.number) }
    }

    private func serveQueue() {
        guard move.service != .nothing, sourceIsAlive, !move.queue.isEmpty else { return }
        var out: [UInt8] = []
        for page in move.queue { write(page, &move.records, &out) }
        move.queue = []
        sourceSendsOnMain(out)
    }

    private func serveRest(_ number: Int) {
        guard sourceIsAlive, number == move.number, sourceConnection != nil, move.service == .everything else { return }
        let pages = move.wanted.indices.filter { move.wanted[$0] }
        guard !pages.isEmpty else {
            (move.service, move.isServed) = (.nothing, true)
            return feedSource(.pagesServed)
        }
        let start = Int.random(in: 0..<pages.count, using: &generator)
        var out: [UInt8] = []
        for page in pages[start...].prefix(Self.batchPages) {
            move.wanted[page] = false
            write(page, &move.records, &out)
        }
        sourceSendsOnMain(out)
        let duration = max(UInt64(out.count) * second / plan.bytesPerSecond, microsecond)
        schedule(after: duration, duration * 4) { [self] in serveRest(number) }
    }

    func urgentSourceLoses(_ connection: SimulatedConnection, _ reason: String) -> Bool {
        let isNet = connection === net.channel
        if isNet { net.channel = nil }
        guard move.urgent.removeValue(forKey: connection.id) != nil || isNet else { return false }
        // A QEMU closes it when it has all, and that may be heard before its last word.
        if plan.rule == .qemu, move.isServed { return true }
        feedSource(.urgentChannelLost(reason))
        return true
    }
}
