import Glibc
public import Host
import Synchronization

extension Channel {
    /// Says that everything was handed over.
    ///
    /// A socket's peer reads to the end (TLS tells it so: close_notify), and may still answer. A pipe is closed. A file is closed and
    /// reports what a file system met that writes at close; nothing waits for the disk. A command sees the end of its input and is
    /// waited for; what it still prints is dropped, unless this side sends and has received (a return path): then go on receiving to
    /// its end.
    /// - Parameter deadline: for the end of a command; `nil` is the send stall limit from now.
    /// - Throws: `ChannelError`: `commandFailed` for a command that did not end with status 0.
    public func finish(deadline: Deadline? = nil) throws(ChannelError) {
        try token.check()
        switch kind {
        case .socket:
            guard let input else { return }
            try tls?.finish(limit: stallLimits.sendMilliseconds)
            do throws(SystemError) { try Socket.finishSending(input) } catch {
                throw failure("finish sending to", error)
            }
        case .pipe:
            output.withLock { $0 = nil }
        case .file:
            guard let descriptor = output.withLock({ $0.take() }) else { return }
            do throws(SystemError) { try descriptor.flushAsAtClose() } catch { throw failure("close", error) }
        case .command:
            output.withLock { $0 = nil }
            let limit = stallLimits.sendMilliseconds.map { Deadline.after(milliseconds: $0) } ?? .never
            try waitForCommand(deadline: deadline ?? limit)
        }
    }

    /// Behind `finish`, where the peer answers nothing: waits until it closes, having read everything.
    ///
    /// What it says is dropped, but must be read: a socket that is closed with bytes unread takes back what it had sent.
    /// - Throws: `ChannelError`: the peer broke the connection off, or did not close within the send stall limit.
    public func awaitEnd() throws(ChannelError) {
        let limits = stallLimits
        try channelled { () throws(SystemError) in
            try setStallLimits(
                StallLimits(sendMilliseconds: limits.sendMilliseconds, receiveMilliseconds: limits.sendMilliseconds))
        }
        // A peer that talks on is not waited for any longer than one that is silent.
        let deadline = limits.sendMilliseconds.map { Deadline.after(milliseconds: $0) } ?? .never
        var words: [UInt8] = []
        while try receive(appendingTo: &words, upTo: 4096) > 0 {
            guard !deadline.hasPassed else {
                throw .stalled(
                    operation: "wait for the end of", peer: peer, milliseconds: limits.sendMilliseconds ?? 0)
            }
            words.removeAll(keepingCapacity: true)
        }
    }

    /// Whether a short message would be taken at once: the peer has read most of what it was sent.
    public var takesBytesNow: Bool {
        guard kind == .socket, let input else { return true }
        return (try? poll([(input, .writable)], deadline: Deadline(at: 0)))?[0].isEmpty == false
    }

    /// Waits for the end of the child. Output nobody asked for would fill its pipe and keep it from ending, so it is read here.
    private func waitForCommand(deadline: Deadline) throws(ChannelError) {
        guard let child else { return }
        // Out, a return path's thread may still be receiving; in, the thread that received is the one here.
        var drain = isIncoming || !hasReceived.load(ordering: .relaxed) ? input : nil
        var pauseNanoseconds: UInt64 = 200_000
        while true {
            try token.check()
            if let status = child.poll() {
                guard status.isSuccess else {
                    throw commandFailed(status)
                }
                return
            }
            if deadline.hasPassed {
                throw .system(
                    SystemError(
                        "wait for the end of", peer, code: ETIMEDOUT, remedy: "its input has ended; it should end too"))
            }
            let pause = min(Deadline.after(nanoseconds: pauseNanoseconds), deadline)
            pauseNanoseconds = min(pauseNanoseconds * 2, 10_000_000)
            var wanted: [(Descriptor, Readiness)] = [(token.event.descriptor, .readable)]
            if let drain { wanted.append((drain, .readable)) }
            let ready = try channelled { () throws(SystemError) in try poll(wanted, deadline: pause) }
            if let pipe = drain, !ready[1].isEmpty {
                let piece = try channelled { () throws(SystemError) in try pipe.read(upTo: 1 << 16) }
                if let piece, piece.isEmpty { drain = nil }
            }
        }
    }

    /// Ends everything: each blocked call, and each later one, throws `ChannelError.cancelled`; the command of `exec:` is ended.
    /// May be called by any thread at any time; does not wait.
    public func cancel() {
        token.cancel()
        if kind == .socket, let input { Socket.shutdown(input) }
        if let child { Self.endInBackground(child) }
    }

    /// Whether `cancel` was called.
    public var isCancelled: Bool { token.isCancelled }

    /// Ends a child and waits for it, without keeping the caller.
    static func endInBackground(_ child: ChildProcess) {
        guard child.poll() == nil else { return }
        child.signal(ChildProcess.terminationSignal)
        try? HostThread.detached(name: "command end") { child.end(graceMilliseconds: 500) }
    }
}
