import Glibc
public import Host
import Synchronization

/// A stream of bytes to or from a peer: a socket, a pipe, a child process or a file.
///
/// One thread sends and one receives at a time; `cancel` and the counters are for any thread. A socket blocks in its system calls,
/// with timeouts; a pipe polls when it would block. No method is called after `finish` but `receive` (what the peer still says),
/// `cancel` and the counters.
public final class Channel: Sendable {
    /// What carries the bytes.
    public enum Kind: Sendable { case socket, pipe, command, file }

    public let kind: Kind
    /// The other end, for people: `tcp:192.0.2.1:4444`, `unix:/run/m.sock`, `exec:gzip -c`, `file:/tmp/state`.
    public let peer: String

    /// `nil` once finished, or if nothing can be sent.
    let output: Mutex<Descriptor?>
    let input: Descriptor?
    /// The child of an `exec:` channel.
    let child: ChildProcess?
    let token: CancelToken
    /// Encrypts what goes through a socket; `nil` for plaintext.
    let tls: TLSSession?
    private let limits: Mutex<StallLimits>
    let hasReceived = Atomic(false)
    /// Whether `finish` drops what a command still prints, though some of it was received.
    let isIncoming: Bool
    let sent = Atomic<UInt64>(0)
    let received = Atomic<UInt64>(0)

    /// Takes what was opened (see `Channel+Opening.swift`).
    init(
        _ kind: Kind, peer: String, input: Descriptor?, output: Descriptor?, child: ChildProcess? = nil,
        isIncoming: Bool = false, limits: StallLimits, token: CancelToken? = nil, tls: TLSSession? = nil
    ) throws(SystemError) {
        self.kind = kind
        self.peer = peer
        self.input = input
        self.output = Mutex(output)
        self.child = child
        self.isIncoming = isIncoming
        self.limits = Mutex(limits)
        if let token { self.token = token } else { self.token = try CancelToken() }
        self.tls = tls
        Descriptor.ignoreBrokenPipes()
        for descriptor in [input, output] {
            try descriptor?.setNonBlocking(kind == .pipe || kind == .command || tls != nil)
            // A third more throughput than with the 64 KiB of a new pipe. (Sockets gain nothing from larger buffers.)
            if kind == .pipe || kind == .command { descriptor?.setPipeCapacity(1 << 20) }
        }
        try setStallLimits(limits)
    }

    deinit {
        if let child { Self.endInBackground(child) }
    }

    /// Whether the peer can answer: true of sockets and, as in QEMU, of commands (their standard input and output). A command need
    /// not answer: after `exec:cat > file` a receive sees the end of the stream.
    public var isBidirectional: Bool { kind == .socket || kind == .command }

    /// Bytes sent and received so far. Any thread may ask.
    public var bytesSent: UInt64 { sent.load(ordering: .relaxed) }
    public var bytesReceived: UInt64 { received.load(ordering: .relaxed) }

    /// Changes the limits from the next operation on.
    public func setStallLimits(_ new: StallLimits) throws(SystemError) {
        limits.withLock { $0 = new }
        guard kind == .socket, let input else { return }
        try Socket.setSendTimeout(input, milliseconds: StallLimits.slice(of: new.sendMilliseconds))
        try Socket.setReceiveTimeout(input, milliseconds: StallLimits.slice(of: new.receiveMilliseconds))
    }

    var stallLimits: StallLimits { limits.withLock { $0 } }

    // MARK: Sending

    /// Sends all of the vector and leaves it empty of bytes. - Throws: `ChannelError`; what was sent is gone from the vector.
    public func send(_ vector: inout IOVector) throws(ChannelError) {
        let descriptor = try sendingEnd()
        if let tls { return try send(&vector, through: tls) }
        var quiet: UInt64 = 0
        while vector.byteCount > 0 {
            try token.check()
            let count: Int?
            do throws(SystemError) { count = try descriptor.write(&vector) } catch { throw failure("send to", error) }
            try account(count, of: descriptor, &quiet)
        }
    }

    /// Sends all of the bytes.
    public func send(_ bytes: [UInt8]) throws(ChannelError) {
        let descriptor = try sendingEnd()
        if let tls { return try send(bytes, through: tls) }
        var rest = bytes[...]
        var quiet: UInt64 = 0
        while !rest.isEmpty {
            try token.check()
            let count: Int?
            do throws(SystemError) { count = try descriptor.write(rest) } catch { throw failure("send to", error) }
            try account(count, of: descriptor, &quiet)
            rest = rest.dropFirst(count ?? 0)
        }
    }

    private func sendingEnd() throws(ChannelError) -> Descriptor {
        guard let descriptor = output.withLock({ $0 }) else {
            throw .unusable("send to \(peer): the channel is for receiving only, or finished")
        }
        return descriptor
    }

    private func account(_ count: Int?, of descriptor: Descriptor, _ quiet: inout UInt64) throws(ChannelError) {
        guard let count, count > 0 else {
            try waitForProgress(descriptor, .writable, limit: stallLimits.sendMilliseconds, "send to", &quiet)
            return
        }
        quiet = 0
        sent.wrappingAdd(UInt64(count), ordering: .relaxed)
    }

    // MARK: Receiving

    /// Receives what is there, at least one byte. - Returns: the number of bytes; 0 at the end of the stream.
    @unsafe public func receive(into buffer: UnsafeMutableRawBufferPointer) throws(ChannelError) -> Int {
        guard unsafe !buffer.isEmpty else { return 0 }
        if let tls { return try unsafe receive(into: buffer, through: tls) }
        // SAFETY: the caller's buffer is valid during this call.
        let isFirst = !hasReceived.load(ordering: .relaxed)
        let count = try receiveOnce { (descriptor) throws(SystemError) in unsafe try descriptor.read(into: buffer) }
        if isFirst, kind == .socket { try unsafe refuseTLS(buffer.prefix(min(count, 3))) }
        return count
    }

    /// Receives what is there, at most `limit` bytes, at the end of `bytes`. - Returns: how many; 0 at the end of the stream.
    @discardableResult
    public func receive(appendingTo bytes: inout [UInt8], upTo limit: Int) throws(ChannelError) -> Int {
        precondition(limit > 0, "room for a byte")
        let old = bytes.count
        bytes += [UInt8](repeating: 0, count: limit)
        var count = 0
        defer { bytes.removeLast(bytes.count - old - count) }
        if let tls {
            count = try receive(into: &bytes, from: old, through: tls)
            return count
        }
        let isFirst = !hasReceived.load(ordering: .relaxed)
        count = try receiveOnce { (descriptor) throws(SystemError) in
            var result: Result<Int?, SystemError> = .success(nil)
            unsafe bytes.withUnsafeMutableBytes { all in
                // SAFETY: the part of the array after its old end, `limit` bytes long.
                let room = unsafe UnsafeMutableRawBufferPointer(rebasing: all[old...])
                do throws(SystemError) { result = .success(unsafe try descriptor.read(into: room)) } catch {
                    result = .failure(error)
                }
            }
            return try result.get()
        }
        if isFirst, kind == .socket { try refuseTLS(bytes[old..<old + count]) }
        return count
    }

    /// Receives exactly `count` bytes. - Throws: `ChannelError.endOfStream` if the stream ends before.
    public func receive(exactly count: Int) throws(ChannelError) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(count)
        while bytes.count < count {
            guard try receive(appendingTo: &bytes, upTo: min(count - bytes.count, 1 << 20)) > 0 else {
                throw earlyEnd(received: bytes.count, wanted: count)
            }
        }
        return bytes
    }

    /// Fills all of the vector. - Throws: `ChannelError.endOfStream` if the stream ends before; what came is in memory.
    public func receive(_ vector: inout IOVector) throws(ChannelError) {
        let wanted = vector.byteCount
        while vector.byteCount > 0 {
            let count =
                if let tls {
                    try receive(&vector, through: tls)
                } else {
                    try receiveOnce { (descriptor) throws(SystemError) in try descriptor.read(&vector) }
                }
            guard count > 0 else {
                throw earlyEnd(received: wanted - vector.byteCount, wanted: wanted)
            }
        }
    }

    private func receiveOnce(_ read: (Descriptor) throws(SystemError) -> Int?) throws(ChannelError) -> Int {
        guard let input else { throw .unusable("receive from \(peer): the channel is for sending only") }
        var quiet: UInt64 = 0
        // A FIFO without a writer looks like the end of a stream to read(2), but not to poll(2).
        if !hasReceived.exchange(true, ordering: .relaxed), kind == .pipe {
            try waitForProgress(input, .readable, limit: stallLimits.receiveMilliseconds, "receive from", &quiet)
        }
        while true {
            try token.check()
            let count: Int?
            do throws(SystemError) { count = try read(input) } catch { throw failure("receive from", error) }
            if let count {
                // Cancelling a socket looks like the end of its stream.
                if count == 0 { try token.check() }
                received.wrappingAdd(UInt64(count), ordering: .relaxed)
                return count
            }
            let limit = stallLimits.receiveMilliseconds
            try waitForProgress(input, .readable, limit: limit, "receive from", &quiet)
        }
    }

    /// Has the kernel acknowledge what was just received, instead of a moment later: a peer whose socket gathers small messages (QEMU's)
    /// sends the next one only then. Counts for what was received up to now.
    public func acknowledgeAtOnce() {
        if kind == .socket, let input { Socket.acknowledgeAtOnce(input) }
    }

    // MARK: Waiting

    /// After a call that moved nothing: waits for a pipe; counts the timeouts of a socket, which has waited already.
    private func waitForProgress(
        _ descriptor: Descriptor, _ readiness: Readiness, limit: UInt64?, _ operation: String, _ quiet: inout UInt64
    ) throws(ChannelError) {
        try token.check()
        switch kind {
        case .socket:
            quiet += 1
            guard let limit, quiet >= StallLimits.slices else { return }
            throw .stalled(operation: operation, peer: peer, milliseconds: limit)
        case .pipe, .command:
            let deadline = limit.map { Deadline.after(milliseconds: $0) } ?? .never
            let ready = try channelled { () throws(SystemError) in
                try poll([(descriptor, readiness), (token.event.descriptor, .readable)], deadline: deadline)
            }
            try token.check()
            if ready[0].isEmpty { throw .stalled(operation: operation, peer: peer, milliseconds: limit ?? 0) }
        case .file:
            throw .system(SystemError(operation, peer, code: EIO, remedy: "the file takes no bytes"))
        }
    }

    private func earlyEnd(received: Int, wanted: Int) -> ChannelError {
        failedCommand() ?? .endOfStream(peer: peer, received: received, wanted: wanted)
    }

    /// A command that closed its end has mostly ended: how it ended says more than that it did.
    private func failedCommand() -> ChannelError? {
        guard let status = child?.wait(deadline: .after(milliseconds: 200)), !status.isSuccess else { return nil }
        return commandFailed(status)
    }

    func commandFailed(_ status: ChildProcess.ExitStatus) -> ChannelError {
        .commandFailed(command: String(peer.dropFirst("exec:".count)), status: status)
    }

    /// The error of a failed call as the caller shall see it: a cancelled socket reports a broken pipe.
    func failure(_ operation: String, _ error: SystemError) -> ChannelError {
        if token.isCancelled { return .cancelled }
        if error.code == EPIPE, let failed = failedCommand() { return failed }
        return .system(SystemError(operation, peer, code: error.code, remedy: error.remedy))
    }
}
