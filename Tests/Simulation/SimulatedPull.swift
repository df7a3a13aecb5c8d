import Migration
import MigrationStream
import TestSupport

// The destination's shell, as far as postcopy concerns it; and a guest whose memory is not all there.

extension Simulator {
    /// - Returns: whether the action was one of postcopy's.
    func performPull(_ action: DestinationAction) -> Bool {
        let epoch = destinationEpoch
        if performNet(action) { return true }
        switch action {
        case .admitUrgent(let id, let number, let count):
            if pull.channels.count != count { pull.channels = [ConnectionID?](repeating: nil, count: count) }
            pull.channels[Int(number)] = id
        case .discardPages(let discard):
            guard let block = map.blocks.firstIndex(where: { $0.name == discard.block }) else { break }
            for range in discard.ranges {
                for offset in stride(from: range.offset, to: range.offset + range.length, by: 4096) {
                    let page = map.page(block: block, offset: offset)
                    destinationGuest.place(0, at: page)
                    pull.expected[page] = true
                }
            }
        case .listen: pull.isListening = true
        case .unlisten(let closed):
            stopListening()
            schedule(after: microsecond, 5 * millisecond) { [self] in
                guard epoch == destinationEpoch else { return }
                // Their threads have ended by now.
                for id in closed { readers[id] = nil }
                net.forgetDestination()
                if bug != .keepsExpectations { pull = SimulatedPull(pages: plan.pages, number: pull.number + 1) }
                feedDestination(.unlistened)
            }
        case .endPostcopy: stopListening()
        case .finishPull(let waits): finishPull(until: waits ? now + 10 * second : now, epoch)
        case .drop(let id): dropAtDestination(id)
        case .pullPaused: operatorLooksAtDestination()
        case .preparePostcopy: break
        default: return false
        }
        return true
    }

    /// Whoever waits goes on, and finds zeroes.
    private func stopListening() {
        pull.isListening = false
        let waiting = pull.waiting
        pull.waiting = []
        for waiter in waiting { schedule(after: microsecond, 50 * microsecond) { waiter.goOn() } }
    }

    private func finishPull(until end: UInt64, _ epoch: UInt64) {
        schedule(after: millisecond, 20 * millisecond) { [self] in
            guard epoch == destinationEpoch, destinationIsAlive else { return }
            guard pull.missing == 0 || now >= end else { return finishPull(until: end, epoch) }
            if pull.missing == 0 {
                stopListening()
                if destinationGuest.pages != pulledModel {
                    let wrong = destinationGuest.pages.indices.filter { destinationGuest.pages[$0] != pulledModel[$0] }
                    violate("\(wrong.count) pages differ when all have come, the first is page \(wrong.first ?? 0)")
                }
            }
            feedDestination(.pullEnded(missing: UInt64(pull.missing)))
        }
    }

    private var pulledModel: [UInt64] { pull.model.isEmpty ? truth : pull.model }

    // MARK: Pages

    /// A page came, on whatever channel. - Returns: false: it goes straight to its place.
    func pulled(_ value: UInt64, _ page: Int) -> Bool {
        guard pull.isListening else { return false }
        guard pull.expected[page], !pull.claimed[page] else {
            if pull.claimed[page] { violate("page \(page) came twice in one move") }
            return true
        }
        pull.claimed[page] = true
        guard generator.chance(0.2) else {
            settle(value, page)
            return true
        }
        let number = pull.number
        schedule(after: microsecond, 5 * millisecond) { [self] in
            if number == pull.number, pull.isListening { settle(value, page) }
        }
        return true
    }

    private func settle(_ value: UInt64, _ page: Int) {
        pull.placed[page] = true
        destinationGuest.place(value, at: page)
        let ready = pull.waiting.filter { $0.page == page }
        pull.waiting.removeAll { $0.page == page }
        for waiter in ready { schedule(after: microsecond, 20 * microsecond) { waiter.goOn() } }
    }

    /// Does something once that page is there, and has it asked for.
    func touch(_ page: Int, _ goOn: @escaping () -> Void) {
        guard pull.isMissing(page) else { return goOn() }
        pull.waiting.append((page, goOn))
        guard !pull.asked[page] else { return }
        pull.asked[page] = true
        let (block, offset) = map.location(of: page)
        let request = PageRequest(block: map.blocks[block].name, offset: offset, length: 4096)
        var writer = StreamWriter()
        writer.message(.postcopy(.requestPages(request)))
        // Without a source it stays asked for, and is asked for again when there is one.
        guard let main = pull.main, readers[main] != nil else { return }
        let isComplete = !pull.channels.isEmpty && !pull.channels.contains(nil)
        let id = isComplete ? pull.channels[page / 4 % pull.channels.count] : pull.main
        guard let id, let reader = readers[id] else { return }
        send(writer.bytes, on: reader.connection, towards: .source)
    }

    // MARK: The guest

    /// The guest has started: each of its vCPUs reads and writes pages, and knows what they must hold.
    func runPulledGuest() {
        pull.model = truth
        for _ in 0..<(plan.postcopy?.cpus ?? 0) { step(destinationEpoch) }
    }

    private static let accessLimit = 4000

    private func step(_ epoch: UInt64) {
        guard destinationIsAlive, epoch == destinationEpoch, pull.isListening || net.isActive,
            pull.accesses < Self.accessLimit
        else { return }
        guard !net.isArmed || !net.isHeld else { return whenRunning { [self] in step(epoch) } }
        pull.accesses += 1
        let page = Int.random(in: 0..<plan.pages, using: &generator)
        touch(page) { [self] in whenRunning { [self] in access(page, epoch) } }
    }

    private func access(_ page: Int, _ epoch: UInt64) {
        guard destinationIsAlive, epoch == destinationEpoch, pull.isListening || net.isActive else { return }
        if destinationGuest.pages[page] != pull.model[page] {
            return violate(
                "the guest reads \(destinationGuest.pages[page]) in page \(page), not \(pull.model[page])")
        }
        if generator.chance(0.5) {
            let value = now << 8 | 1
            pull.model[page] = value
            destinationGuest.place(value, at: page)
            wrote(page)
        }
        schedule(after: microsecond, 500 * microsecond) { [self] in step(epoch) }
    }

    /// Of loading state, which may touch memory.
    func afterTouches(_ body: @escaping () -> Void) {
        guard let moves = plan.postcopy, pull.isListening, generator.chance(moves.loadTouches) else { return body() }
        touch(Int.random(in: 0..<plan.pages, using: &generator), body)
    }

    /// Nothing is left to happen: no vCPU may be waiting, unless the source is lost.
    func checkPullEnd() {
        guard destinationIsAlive, destination.phase == .pulling, !isSilenced || canBecomeWhole else { return }
        violate("the guest waits for ever for \(pull.waiting.count) pages")
    }

    var isSilenced: Bool { connections.contains(where: \.isSilent) }
}
