import Host
import Machine
import MigrationStream
import Synchronization
import Transport

// The threads that read: one per connection.

extension IncomingMigration {
    /// Enough for either kind's first words, and little of what should go straight into guest memory.
    private static let recognitionBytes = 4096
    /// Between two signs that data arrives.
    static let progressNanoseconds: UInt64 = 1_000_000_000

    /// The first four bytes tell a migration stream from a channel of multifd.
    func recognize(_ channel: Channel, _ id: ConnectionID) {
        defer { forget(id) }
        var first: [UInt8] = []
        do {
            while MultifdGreeting.isAnnounced(by: first) == nil {
                // What is too short to be either is for the stream's decoder to describe.
                guard try channel.receive(appendingTo: &first, upTo: Self.recognitionBytes) > 0 else { break }
            }
        } catch { return post(.disconnected(id, error.description)) }
        if MultifdGreeting.isAnnounced(by: first) == true {
            readChannel(channel, id, behind: first)
        } else if StreamDecoder.recoveryIsAnnounced(by: first) {
            post(.cameToRecover(id))
            readStream(channel, id, behind: first, recovers: true)
        } else if !StreamDecoder.isAnnounced(by: first), expectsUrgentChannel {
            // Silent for good: nothing was ever requested.
            if first.isEmpty { return post(.disconnected(id, "it was closed without a word")) }
            readRequestedPages(channel, id, behind: first)
        } else {
            readStream(channel, id, behind: first)
        }
    }

    // MARK: The stream

    /// - Parameter recovers: it goes on without a header where another connection was lost in postcopy.
    private func readStream(_ channel: Channel, _ id: ConnectionID, behind first: [UInt8], recovers: Bool = false) {
        recognized(id)
        do {
            guard var receiver = makeReceiver(channel, id, behind: first, recovers: recovers) else {
                return post(.disconnected(id, "what a lost connection brought is still being placed"))
            }
            var progress = ProgressTeller()
            var marks = ChannelMarks()
            while let item = try receiver.next() {
                switch item {
                case .page, .zeroPage, .pageDelta, .pageBatch:
                    // While memory is watched no page may wait for the core, which may wait for memory.
                    guard receiver.placer != nil || takesPages(on: id) else {
                        // Nobody wants these pages: the core says why, and the connection ends.
                        post(.item(id, item))
                        post(.rejected(id, "it sends pages that nobody waits for"))
                        return hangUp(channel, id)
                    }
                    try receiver.place(item)
                    if progress.isDue() { post(.progressed(id)) }
                case .ramRound where receiver.placer != nil:
                    post(.item(id, item))
                    // The guest did not start after all, and a new section begins, of pages that go straight to their places.
                    if !watchesMemory { receiver.placer = nil }
                case .ramSetup:
                    post(.item(id, item))
                    receiver.isCounted = acceptsPages(on: id)
                    if receiver.isCounted, !receiver.regions.isEmpty { try readFile(channel, id, receiver.regions) }
                case .command(.postcopy(let command)):
                    post(.item(id, item))
                    guard try read(command, channel, id, &receiver) else { return }
                // Channels that wrote into a file left nothing to wait for.
                case .multifdFlush where !receiver.regions.isEmpty: break
                case .multifdFlush:
                    post(.item(id, item))
                    if !marks.flushes { hearStrangers() }
                    marks.flushes = true
                    if isOpen(id) { waitForChannels(id) }
                case .ramRecordsEnded:
                    // Not at the footer behind it: an old QEMU keeps that back until its channels have gone on.
                    if !marks.flushes, receiver.placer == nil, usesChannels {
                        if !marks.sections { hearStrangers() }
                        marks.sections = true
                        waitForChannels(id)
                    }
                case .vmDescription: try receiver.skipPayload()
                case .command(.begin), .command(.resume):
                    post(.item(id, item))
                    if acceptsSource(id) { receiver.verification = verification }
                    if isRecovering(id), !waitForEarlierReaders(id) {
                        return post(.disconnected(id, "what a lost connection brought is still being placed"))
                    }
                default: post(.item(id, item))
                }
                // What the core closed is not read any further.
                guard isOpen(id) else { return }
            }
            post(
                receiver.failure.map {
                    $0.isTruncation && isResumable ? .disconnected(id, $0.description) : .rejected(id, $0.description)
                }
                    ?? .disconnected(id, "the source closed the connection"))
        } catch {
            post(.disconnected(id, "\(error)"))
        }
    }

    /// - Returns: `nil` if readers of a lost connection are still at work.
    private func makeReceiver(
        _ channel: Channel, _ id: ConnectionID, behind first: [UInt8], recovers: Bool
    ) -> PageReceiver? {
        guard recovers else {
            return PageReceiver(
                channel, behind: first, memory: machine.memory, blocks: blocks, catalogue: machine.sectionCatalogue,
                received: received, statistics: statistics, populating: populating)
        }
        guard isOpen(id), let decoder = recoveryDecoder.withLock({ $0 }), waitForEarlierReaders(id) else { return nil }
        var receiver = PageReceiver(
            channel, behind: first, memory: machine.memory, decoder: decoder, received: received,
            statistics: statistics)
        receiver.isCounted = true
        return receiver
    }

    /// Pages that stand in the file at places of their own: all at once.
    private func readFile(_ channel: Channel, _ id: ConnectionID, _ regions: [MappedRegion]) throws {
        guard let stream = channel.file else { return }
        // A VM that is being saved under the same name replaces the file; its pages must not be taken for this one's.
        let pages = try mapped.isDirect && !mapped.isLazy ? stream.openedDirect(writing: false) : stream
        let reader = MappedRAMReader(
            stream, pages: pages, memory: machine.memory, received: received, statistics: statistics,
            threads: mapped.threadCount, isLazy: mapped.isLazy)
        var progress = ProgressTeller()
        try reader.load(regions) {
            if progress.isDue() { post(.progressed(id)) }
            return isOpen(id)
        }
    }

    /// The main channel has come to a mark: what the others bring before their SYNC belongs before it.
    private func waitForChannels(_ id: ConnectionID) {
        switch barrier.waitForAll(main: id) {
        case .complete, .closed: break
        case .channelEnded where isResumable: post(.disconnected(id, "one of its channels ended"))
        case .stalled where isResumable: post(.disconnected(id, "its channels bring nothing any more"))
        case .channelEnded: post(.rejected(id, "one of its channels ended before its pages were complete"))
        case .stalled: post(.rejected(id, "its channels bring nothing any more"))
        }
    }

    /// Whether marks in the stream stand for all channels' pages; without, the ends of its sections of RAM do.
    private struct ChannelMarks {
        var flushes = false
        var sections = false
    }

    struct ProgressTeller {
        private var last = Clock.monotonicNanoseconds

        mutating func isDue() -> Bool {
            let now = Clock.monotonicNanoseconds
            guard now - last > IncomingMigration.progressNanoseconds else { return false }
            last = now
            return true
        }
    }

    private func hangUp(_ channel: Channel, _ id: ConnectionID) {
        forget(id)
        channel.cancel()
    }

    // MARK: A channel of multifd

    private func readChannel(_ channel: Channel, _ id: ConnectionID, behind first: [UInt8]) {
        do {
            var buffer = ReceiveBuffer(capacity: Self.recognitionBytes)
            buffer.append(first)
            guard let greeting = try greeting(channel, &buffer) else {
                return post(.disconnected(id, "it ended inside its greeting"))
            }
            if greeting.mark?.kind == .urgent {
                return readUrgentChannel(channel, id, greeting, behind: buffer)
            }
            barrier.greeted(id)
            post(.greeted(id, greeting))
            recognized(id)
            guard barrier.waitForAdmission(id) else { return }
            HostThread.renameCurrent("multifd-recv-\(greeting.channel + 1)")
            var receiver = try ChannelReceiver(
                channel, behind: buffer, memory: machine.memory, blocks: blocks, received: received,
                statistics: statistics, mayMix: greeting.mark != nil, verification: verification,
                populating: populating)
            var progress = ProgressTeller()
            while let packet = try receiver.next() {
                if !packet.normal.isEmpty || !packet.zero.isEmpty {
                    guard takesPages(on: id) else {
                        return post(.rejected(id, "it sends pages that nobody waits for"))
                    }
                    try receiver.place(packet)
                }
                barrier.came()
                if progress.isDue() { post(.progressed(id)) }
                if packet.isSync, !barrier.synchronize(id) { return }
            }
            barrier.endAndWait(id)
        } catch let error as StreamError {
            post(.rejected(id, error.description))
        } catch {
            post(.disconnected(id, "\(error)"))
        }
    }

    /// The whole greeting; `nil` when the connection ends before.
    private func greeting(_ channel: Channel, _ buffer: inout ReceiveBuffer) throws -> MultifdGreeting? {
        while true {
            if let greeting = try MultifdGreeting(from: &buffer) { return greeting }
            let count = try unsafe buffer.fill(atLeast: MultifdGreeting.byteCount) { (room) throws(ChannelError) in
                try unsafe channel.receive(into: room)
            }
            if count == 0 { return nil }
        }
    }
}
