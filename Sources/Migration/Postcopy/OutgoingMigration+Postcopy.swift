import Host
import MigrationStream
import Synchronization
import Transport

// What the core of a source asks of its shell for postcopy.

extension OutgoingMigration {
    /// The guest moves now; its memory follows (`migrate-start-postcopy`).
    func startPostcopy() throws(MigrationError) { try command(.startPostcopy) }

    func openUrgent(_ action: SourceAction) {
        if case .openUrgentChannels(let count) = action { openUrgentChannels(count) } else { openUrgentChannel() }
    }

    /// Connects once more to where the destination listens. Nothing is said there: the first requested page is its first word.
    private func openUrgentChannel() {
        guard let postcopy = sender.postcopy else { return }
        let attempt = attempts.withLock { $0 }
        do throws(SystemError) {
            let token = try CancelToken()
            connecting.withLock { $0 = token }
            _ = try HostThread(name: "migration-conn") { [self] in
                do throws(ChannelError) {
                    let connector = Connector(tls: tls, descriptors: descriptors)
                    let channel = try connector.connect(to: target.withLock { $0 }, cancel: token)
                    try hold(channel, attempt, postcopy)
                } catch {
                    if isCurrent(attempt) { post(.urgentChannelFailed(error.description)) }
                }
            }
        } catch { post(.urgentChannelFailed(error.description)) }
    }

    /// Connects so many times, and says on each which it is.
    private func openUrgentChannels(_ count: Int) {
        guard let postcopy = sender.postcopy else { return }
        let attempt = attempts.withLock { $0 }
        do throws(SystemError) {
            let token = try CancelToken()
            connecting.withLock { $0 = token }
            _ = try HostThread(name: "migration-conn") { [self] in
                do throws(ChannelError) {
                    let call = ChannelCall(count: count, migration: configuration.migration, kind: .urgent)
                    let channels = try call.connect(
                        to: target.withLock { $0 }, connector: Connector(tls: tls, descriptors: descriptors),
                        cancel: token)
                    try hold(channels, attempt, postcopy)
                } catch {
                    if isCurrent(attempt) { post(.urgentChannelFailed(error.description)) }
                }
            }
        } catch { post(.urgentChannelFailed(error.description)) }
    }

    private func hold(
        _ channels: [Channel], _ attempt: UInt64, _ postcopy: PostcopySource
    ) throws(ChannelError) {
        // The migration may have ended meanwhile.
        guard isCurrent(attempt), open.withLock({ $0 != nil }) else {
            for channel in channels { channel.cancel() }
            return
        }
        var channels = channels
        do throws(SystemError) {
            try holdNet(&channels, attempt)
            try postcopy.open(channels) { [self] urgent, error in
                // What the main connection says tells more, where it says something.
                if isLost(attempt, answers: true), !urgent.isEnded { post(.urgentChannelLost(error.description)) }
            }
        } catch {
            for channel in channels { channel.cancel() }
            throw .system(error)
        }
        guard isCurrent(attempt), open.withLock({ $0 != nil }) else { return postcopy.end() }
        post(.urgentChannelOpened)
    }

    private func hold(_ channel: Channel, _ attempt: UInt64, _ postcopy: PostcopySource) throws(ChannelError) {
        // A later connection's is another one.
        guard isCurrent(attempt) else { return channel.cancel() }
        do throws(SystemError) {
            try postcopy.open(channel) { [self] error, matters in
                guard matters() else { return }
                // What the main connection says tells more, where it says something.
                if isLost(attempt, answers: true), matters() { post(.urgentChannelLost(error.description)) }
            }
        } catch {
            channel.cancel()
            throw .system(error)
        }
        // The migration may have ended meanwhile.
        guard isCurrent(attempt), open.withLock({ $0 != nil }) else { return postcopy.end() }
        post(.urgentChannelOpened)
    }

    /// The guest's state goes, and from here on pages may be asked for.
    func sendPackage(_ bytes: [UInt8]) {
        sender.postcopy?.openForRequests()
        sender.enqueue(.package(bytes))
    }

    /// A request needs no decision: it goes to who sends pages. - Returns: whether the message was one.
    func tookRequest(_ message: ReturnPathMessage) throws(PageRequests.Refusal) -> Bool {
        guard case .postcopy(.requestPages(let request)) = message, let postcopy = sender.postcopy else { return false }
        try postcopy.add(request)
        return true
    }
}

extension SourceConfiguration {
    mutating func allowPostcopy(_ capabilities: Set<MigrationCapability>, channels: Int) {
        guard capabilities.contains(.postcopyRAM) else { return }
        features.insert(.postcopy)
        let hasNet = capabilities.contains(.postcopySafetyNet)
        if hasNet { features.insert(.safetyNet) }
        postcopy = PostcopyTerms(
            usesUrgentChannel: capabilities.contains(.postcopyPreempt), urgentChannels: channels, hasNet: hasNet)
    }
}

extension StreamSender {
    /// - Throws: `ChannelError`, and then its last bytes did not leave.
    func sendPackage(
        _ bytes: [UInt8], to channel: Channel, _ post: @Sendable (SourceEvent) -> Void
    ) throws(ChannelError) {
        do throws(ChannelError) { try send(bytes, to: channel) } catch {
            post(.packageCut(error.description))
            throw error
        }
        post(.packageSent)
    }

    func sendDiscards(to channel: Channel, _ post: @Sendable (SourceEvent) -> Void) throws(ChannelError) {
        guard let postcopy else { return }
        try round.withLock { (round) throws(ChannelError) in
            try round.discard(postcopy, over: channel) { statistics.sent(bytes: $0) }
        }
        post(.discardsSent)
    }

    /// Until there is another job.
    func serveRequests(over channel: Channel) throws(ChannelError) {
        try postcopy?.serveRequests(over: channel) { hasJobs }
    }

    /// What DISCARD named is dirty again.
    func takeBackPages() {
        guard let postcopy else { return }
        postcopy.takeBack { outgoing in round.withLock { round in round.takeBack(outgoing) } }
    }

    func servePages(over channel: Channel, _ post: @Sendable (SourceEvent) -> Void) throws(ChannelError) {
        guard let postcopy else { return }
        if try postcopy.serve(over: channel, mustEnd: { isInterrupted }) { post(.pagesServed) }
    }
}
