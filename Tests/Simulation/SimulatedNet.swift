import Migration
import MigrationStream
import TestSupport

/// A guest that moved and can be taken back: what both shells keep of it, and what the world hears.
///
/// The guest says numbers, one after the other; how many it has said is part of its state, as its pages are.
struct SimulatedNet {
    // The destination's.
    var isArmed = false
    var isOn = false
    var isOver = false
    /// Its vCPUs stand still.
    var isHeld = false
    var link: ConnectionID?
    var decoder = EpochDecoder([])
    var input = ReceiveBuffer()
    var kept: UInt64?
    var taken: UInt64 = 0
    /// Whether the source has the epoch taken last is not known; its bytes.
    var isOpen = false
    var bytes: [UInt8] = []
    var isSent = false
    var (mustSayStays, staysIsSaid) = (false, false)
    var dirty: Set<Int> = []
    var said: UInt64 = 0
    var held: [(epoch: UInt64, word: UInt64)] = []
    /// What vCPUs do when they go on.
    var parked: [() -> Void] = []
    /// Counts guests that were given up before they ran.
    var number = 0

    /// As the guest was at the end of each epoch.
    var snapshots: [(pages: [UInt64], said: UInt64)] = []

    // The source's.
    var channel: SimulatedConnection?
    var epochs = EpochDecoder([])
    var sourceInput = ReceiveBuffer()
    var pages: [Int: UInt64] = [:]
    var awaited: [Int] = []
    var payload: [UInt8] = []
    var saidInEpoch: UInt64 = 0
    var keptEpoch: UInt64 = 0
    var keptSaid: UInt64 = 0
    var isReleased = false
    var isTakenBack = false

    // The world.
    var heard: UInt64 = 0
    /// The destination's operator said that the guest stays.
    var isKept = false

    /// Whether what the guest says is held back.
    var isActive: Bool { isArmed && !isOver }

    mutating func nextAtDestination() throws(StreamError) -> EpochMessage? { try decoder.next(from: &input) }
    mutating func nextAtSource() throws(StreamError) -> EpochMessage? { try epochs.next(from: &sourceInput) }

    mutating func forgetDestination() {
        (isArmed, isOn, isOver, isHeld, isOpen, isSent) = (false, false, false, false, false, false)
        (link, kept, bytes, dirty, held, parked) = (nil, nil, [], [], [], [])
        (taken, said, number) = (0, 0, number + 1)
        (mustSayStays, staysIsSaid) = (false, false)
    }
}

extension PlantedBug {
    static let ofNet: [PlantedBug] = [
        .isHeardAtOnce, .keepsTornEpochs, .freesItself, .takesLostEpochsForKept, .forgetsWhatIsWrittenMeanwhile,
    ]
}

// The destination's shell.

extension Simulator {
    /// - Returns: whether the action was one of a safety net's.
    func performNet(_ action: DestinationAction) -> Bool {
        switch action {
        case .admitNet(let id):
            (net.link, net.kept, net.isSent, net.staysIsSaid) = (id, nil, false, false)
            (net.decoder, net.input) = (EpochDecoder(map.blocks), ReceiveBuffer())
            schedule(after: microsecond, 50 * microsecond) { [self] in
                if let reader = readers[id] { destinationReads([], on: reader.connection) }
            }
        case .prepareEpochs:
            // Its link may be there before.
            let (link, kept) = (net.link, net.kept)
            net.forgetDestination()
            (net.link, net.kept) = (link, kept)
        case .armEpochs: net.isArmed = true
        case .goOnWithEpochs:
            net.isOn = true
            letRun()
        case .holdEpochs: (net.isOn, net.isHeld, net.mustSayStays) = (false, true, false)
        case .sayStays:
            net.mustSayStays = true
            if bug == .freesItself { endEpochs() }
            sayToSource()
        case .endEpochs: endEpochs()
        default: return false
        }
        return true
    }

    /// Whoever reads its link hears that it is gone.
    func netCloses(_ id: ConnectionID) { if net.link == id { (net.link, net.kept) = (nil, nil) } }

    private func endEpochs() {
        net.isOver = true
        let words = net.held.map(\.word)
        net.held = []
        for word in words { hear(word) }
        unhold()
    }

    private func unhold() {
        net.isHeld = false
        let parked = net.parked
        net.parked = []
        for body in parked { schedule(after: microsecond, 20 * microsecond) { body() } }
    }

    private func letRun() {
        guard net.isOn, !net.isOver, net.kept != nil, net.link != nil, !net.isOpen else { return }
        unhold()
        let number = net.number
        schedule(after: millisecond, 5 * millisecond) { [self] in if number == net.number { takeEpoch() } }
    }

    private func takeEpoch() {
        guard destinationIsAlive, net.isOn, !net.isOver, !net.isOpen, !pull.model.isEmpty else { return }
        net.isHeld = true
        net.taken += 1
        let number = net.number
        var bytes: [UInt8] = []
        for page in net.dirty.sorted() {
            let (block, offset) = map.location(of: page)
            let first = offset / 4096
            if destinationGuest.pages[page] == 0 {
                bytes += EpochMessage.zeroes(block: block, first: first, count: 1).bytes
            } else {
                bytes += EpochMessage.pages(block: block, first: first, count: 1).bytes
                bytes += SimulatedMemoryMap.contents(destinationGuest.pages[page])
            }
        }
        let said = (0..<8).map { UInt8(truncatingIfNeeded: net.said >> (8 * UInt64($0))) }
        bytes += EpochMessage.section(DeviceSection(name: "said", version: 1, body: said)).bytes
        bytes += EpochMessage.end(epoch: net.taken, guestRuns: true).bytes
        (net.bytes, net.isOpen, net.isSent, net.dirty) = (bytes, true, false, [])
        net.snapshots.append((pull.model, net.said))
        let taken = net.taken
        schedule(after: 10 * microsecond, 200 * microsecond) { [self] in
            guard number == net.number, destinationIsAlive else { return }
            sayToSource()
            if net.isOn || net.isOver { unhold() }
            schedule(after: second, second + millisecond) { [self] in
                if number == net.number, net.isOpen, net.taken == taken, !net.isOver { net.isHeld = true }
            }
        }
    }

    private func sayToSource() {
        guard let link = net.link, let reader = readers[link] else { return }
        if net.mustSayStays, !net.staysIsSaid {
            net.staysIsSaid = true
            send(EpochMessage.stays.bytes, on: reader.connection, towards: .source)
        }
        guard !net.isOver, net.isOpen, !net.isSent, let kept = net.kept, kept < net.taken else { return }
        net.isSent = true
        send(net.bytes, on: reader.connection, towards: .source)
    }

    /// - Returns: whether it is the net's connection, of which all was read then.
    func netDestinationReads(_ id: ConnectionID) throws(StreamError) -> Bool {
        guard net.link == id, var reader = readers.removeValue(forKey: id) else { return false }
        var bytes = [UInt8](repeating: 0, count: reader.input.count)
        _ = unsafe bytes.withUnsafeMutableBytes { unsafe reader.input.move(to: $0) }
        readers[id] = reader
        net.input.append(bytes)
        while net.link == id, let message = try net.nextAtDestination() {
            switch message {
            case .kept(let epoch): heard(kept: epoch)
            case .released: feedDestination(.guestReleased(id))
            default: violate("the source says \(message) on its safety net")
            }
        }
        return true
    }

    private func heard(kept epoch: UInt64) {
        net.kept = epoch
        if net.isOpen, epoch == net.taken || bug == .takesLostEpochsForKept {
            net.isOpen = false
            let taken = net.taken
            let words = net.held.filter { $0.epoch <= taken }.map(\.word)
            net.held.removeAll { $0.epoch <= taken }
            for word in words { hear(word) }
        }
        sayToSource()
        letRun()
    }

    // MARK: The guest

    /// A vCPU goes on, now or when it may.
    func whenRunning(_ body: @escaping () -> Void) {
        if net.isArmed, net.isHeld { net.parked.append(body) } else { body() }
    }

    /// The guest wrote a page, and says so.
    func wrote(_ page: Int) {
        guard net.isArmed else { return }
        if bug != .forgetsWhatIsWrittenMeanwhile || !net.isOpen { net.dirty.insert(page) }
        net.said += 1
        if net.isActive, bug != .isHeardAtOnce {
            net.held.append((net.taken + 1, net.said))
        } else {
            hear(net.said)
        }
    }

    private func hear(_ word: UInt64) {
        if word != net.heard + 1 { violate("the world hears \(word) behind \(net.heard)") }
        net.heard = word
        guard !net.isReleased, !net.isKept, word > net.keptSaid else { return }
        violate("\(word) is heard, and the source could take the guest back as it was at \(net.keptSaid)")
    }
}

// The source's shell.

extension Simulator {
    func openNet(_ connection: SimulatedConnection) {
        net.channel = connection
        (net.epochs, net.sourceInput) = (EpochDecoder(map.blocks), ReceiveBuffer())
        (net.pages, net.awaited, net.payload) = ([:], [], [])
        send(EpochMessage.kept(epoch: net.keptEpoch).bytes, on: connection, towards: .destination)
    }

    func closeNet() {
        guard let channel = net.channel else { return }
        net.channel = nil
        close(channel, by: .source)
    }

    func netSourceReads(_ bytes: [UInt8], on connection: SimulatedConnection) {
        net.sourceInput.append(bytes)
        do {
            while net.channel === connection {
                if net.epochs.payloadBytes > 0 {
                    guard takeContents() else { return }
                    continue
                }
                guard let message = try net.nextAtSource() else { return }
                took(message, connection)
            }
        } catch { violate("an epoch is not understood: \(error)") }
    }

    private func took(_ message: EpochMessage, _ connection: SimulatedConnection) {
        switch message {
        case .pages(let block, let first, _): net.awaited = [map.page(block: block, offset: first * 4096)]
        case .zeroes(let block, let first, _): note(0, map.page(block: block, offset: first * 4096))
        case .section(let section): net.saidInEpoch = section.body.reversed().reduce(0) { $0 << 8 | UInt64($1) }
        case .end(let epoch, _):
            guard epoch == net.keptEpoch + 1 else {
                return violate("epoch \(epoch) comes behind epoch \(net.keptEpoch)")
            }
            for (page, value) in net.pages { sourceGuest.place(value, at: page) }
            (net.keptEpoch, net.keptSaid, net.pages) = (epoch, net.saidInEpoch, [:])
            send(EpochMessage.kept(epoch: epoch).bytes, on: connection, towards: .destination)
        case .stays: feedSource(.guestStays)
        case .kept, .released: violate("the destination says \(message) on its safety net")
        }
    }

    private func note(_ value: UInt64, _ page: Int) {
        net.pages[page] = value
        if bug == .keepsTornEpochs { sourceGuest.place(value, at: page) }
    }

    private func takeContents() -> Bool {
        let count = min(net.epochs.payloadBytes, net.sourceInput.count)
        guard count > 0 else { return false }
        var piece = [UInt8](repeating: 0, count: count)
        let moved = unsafe piece.withUnsafeMutableBytes { unsafe net.sourceInput.move(to: $0) }
        net.epochs.payloadConsumed(moved)
        net.payload += piece
        guard net.epochs.payloadBytes == 0, let page = net.awaited.popLast() else { return true }
        if let value = SimulatedMemoryMap.value(net.payload[...]) {
            note(value, page)
        } else {
            violate("page \(page) of an epoch has contents that are not a page's")
        }
        net.payload = []
        return true
    }

    /// - Returns: whether the action was one of a safety net's.
    func performNet(_ action: SourceAction) -> Bool {
        switch action {
        case .releaseGuest:
            net.isReleased = true
            if let channel = net.channel { send(EpochMessage.released.bytes, on: channel, towards: .destination) }
        case .takeBackGuest:
            closeNet()
            checkTakenBack()
            schedule(after: microsecond, millisecond) { [self] in
                net.isTakenBack = true
                feedSource(.guestTakenBack)
            }
        default: return false
        }
        return true
    }

    /// The guest must be as it was at the end of the epoch, and the world must not know it otherwise.
    private func checkTakenBack() {
        if net.isReleased || net.isKept { violate("a guest that stays at the destination is taken back") }
        let epoch = Int(net.keptEpoch)
        let (pages, said) = epoch == 0 ? (truth, 0) : net.snapshots[epoch - 1]
        if sourceGuest.pages != pages { violate("pages differ from those at the end of epoch \(epoch)") }
        if net.keptSaid != said { violate("the state differs from that at the end of epoch \(epoch)") }
        let before = epoch < 2 ? 0 : net.snapshots[epoch - 2].said
        if !(before...said).contains(net.heard) {
            violate("the guest goes on at \(said), and the world heard \(net.heard)")
        }
        takenBack += 1
    }

    /// The operator finds a migration that is paused or in doubt. - Returns: whether he has the guest go on at the source.
    func takesBack() -> Bool {
        guard plan.postcopy?.hasNet == true, source.features.contains(.safetyNet), !net.isReleased else { return false }
        guard !destinationIsAlive || generator.chance(0.3) else { return false }
        feedSource(.takeBackGuest)
        return true
    }

    /// The destination's operator learns some day that the source is gone.
    func operatorLooksAtDestination() {
        guard plan.postcopy?.hasNet == true else { return }
        schedule(after: second, 20 * second) { [self] in
            guard !sourceIsAlive, destinationIsAlive, destination.phase == .pullPaused, !net.isOver else { return }
            net.isKept = true
            feedDestination(.keepGuest)
        }
    }
}
