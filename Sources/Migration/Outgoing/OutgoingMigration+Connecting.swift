import Host
import Machine
import MigrationStream
import Synchronization
import Transport

// Connections: made, handed to the threads that use them, closed.

extension OutgoingMigration {
    /// How long a peer may take for the last bytes of a migration that has ended.
    private static let farewellNanoseconds: UInt64 = 3_000_000_000

    func connect(withChannels: Bool) {
        let attempt = attempts.withLock { attempts in
            attempts += 1
            return attempts
        }
        do throws(SystemError) {
            let token = try CancelToken()
            connecting.withLock { $0 = token }
            _ = try HostThread(name: "migration-conn") { [self] in
                do throws(ChannelError) { try connect(attempt, withChannels: withChannels, cancel: token) } catch {
                    if isCurrent(attempt) { post(.connectFailed(error.description)) }
                }
            }
        } catch { post(.connectFailed(error.description)) }
    }

    /// The main channel first, then those for pages: a QEMU destination listens to nobody before all are there.
    private func connect(_ attempt: UInt64, withChannels: Bool, cancel token: CancelToken) throws(ChannelError) {
        let connector = Connector(tls: tls, descriptors: descriptors)
        let address = target.withLock { $0 }
        let channel = try connector.connect(to: address, cancel: token)
        if let words = channel.securityNotice { report(.notice(words)) }
        let file: MappedRAMWriter?
        let group: ChannelGroup?
        do throws(ChannelError) {
            file = try withChannels ? makeFile(channel) : nil
            group = try withChannels && channelCount > 0 && file == nil ? makeGroup(address, connector, token) : nil
        } catch {
            channel.cancel()
            throw error
        }
        sender.waitUntilClosed()
        // What an earlier connection asked for is not this one's.
        answering.wait(deadline: .after(milliseconds: Self.lastWordsMilliseconds)) { $0 == 0 ? () : nil }
        guard claim(channel, attempt) else {
            group?.end()
            file?.end()
            return channel.cancel()
        }
        let answers = channel.kind == .socket && usesReturnPath
        do throws(SystemError) {
            try sender.attach(channel, group, file, answers: answers) { [self] event in
                if case .disconnected = event, !isLost(attempt, answers: answers) { return }
                post(event)
            }
        } catch {
            isAbandoned.withLock { $0 = true }
            open.withLock { $0 = nil }
            channel.cancel()
            throw .system(error)
        }
        guard isCurrent(attempt) else { return }
        post(.connected(answers ? .bothWays : .oneWay))
        // Only now: a connection that ends at once must not end before it began.
        guard answers else { return }
        answering.withLock { $0 += 1 }
        startThread("migration-return") { [self] in
            readAnswers(channel, attempt)
            answering.withLock { $0 -= 1 }
            answersEnded.withLock { $0 = max($0, attempt) }
        }
    }

    /// Whoever gives up the connection from here on finds it; who did so before is found out here, and nothing else is started.
    private func claim(_ channel: Channel, _ attempt: UInt64) -> Bool {
        attempts.withLock { attempts in
            guard attempts == attempt else { return false }
            isAbandoned.withLock { $0 = false }
            open.withLock { $0 = channel }
            return true
        }
    }

    private func makeGroup(
        _ address: MigrationAddress, _ connector: Connector, _ token: CancelToken
    ) throws(ChannelError) -> ChannelGroup {
        let call = ChannelCall(
            count: channelCount, migration: configuration.migration,
            uuid: machine.configuration.uuid.map(MigrationIdentifier.init))
        return ChannelGroup(
            try call.connect(to: address, connector: connector, cancel: token), memory: machine.memory, blocks: blocks,
            statistics: statistics, packing: packing, verification: verification)
    }

    /// Where pages go if they have places of their own in a file.
    private func makeFile(_ channel: Channel) throws(ChannelError) -> MappedRAMWriter? {
        guard let mapped = configuration.mapped, case .file(_, let offset) = target.withLock({ $0 })
        else { return nil }
        return try MappedRAMWriter(
            channel, at: offset, regions: mapped.regions, threads: channelCount, direct: usesDirectIO,
            memory: machine.memory, statistics: statistics)
    }

    /// What is queued goes out first, but for a round, which ends at its next batch; an attempt to connect is given up.
    func close(patiently: Bool) {
        let channel = attempts.withLock { attempts in
            let channel = open.withLock { $0.take() }
            // A connection that is just being made is nobody's any more.
            if channel == nil { attempts += 1 }
            return channel
        }
        guard let channel else {
            connecting.withLock { $0 }?.cancel()
            return
        }
        sender.interruptRound()
        sender.enqueue(.close)
        guard !patiently else { return }
        let attempt = attempts.withLock { $0 }
        startThread("migration-bye") { [self] in
            Clock.sleep(nanoseconds: Self.farewellNanoseconds)
            channel.cancel()
            // Those of a later connection are not meant.
            if isCurrent(attempt) { sender.endChannels() }
        }
    }
}

extension MigrationIdentifier {
    init(_ uuid: MachineUUID) { self.init(high: uuid.high, low: uuid.low) }

    /// Where it is the UUID of a machine.
    var uuidText: String { MachineUUID(high: high, low: low).description }
}
