import Glibc
public import Host
import Synchronization

/// Waits for channels where a migration arrives.
///
/// A socket may bring several channels (multifd, postcopy preemption); a connected descriptor, a command and a file bring one, and
/// are opened at once so that their errors are seen at once.
public final class Listener: Sendable {
    /// Where a socket listens, as `query-migrate` reports in `socket-address`.
    public enum BoundAddress: Equatable, Sendable {
        /// The numeric host, and the port really bound.
        case inet(host: String, port: String)
        case unix(path: String)
    }

    /// The address asked for.
    public let address: MigrationAddress
    /// All sockets that listen; none for what is not a socket.
    public let addresses: [BoundAddress]
    private let limits: StallLimits
    private let tls: TLSSettings?
    private let state: Mutex<State>
    private let closing: CancelToken
    /// The socket file we made, to be removed.
    private let socketFile: (path: String, identity: FileIdentity)?

    private struct State: Sendable {
        var sockets: [Descriptor] = []
        /// The only channel of what is not a listening socket, until it is accepted.
        var single: Channel?
        /// A connection may be leaving the kernel's queue, or be in the hands of whoever accepted it.
        var isAccepting = false
    }

    /// Listens on, opens or starts what the address says.
    ///
    /// Without TLS it listens on this machine only, unless `allowsPlaintext` says otherwise.
    /// - Parameter tls: makes every channel TLS from its first byte; whoever accepts one calls its `handshake`.
    /// - Throws: `ChannelError`, also when the address is in use, and `tls` for one that would be open to others in plaintext.
    public init(
        on address: MigrationAddress, limits: StallLimits = StallLimits(), tls: TLSSettings? = nil,
        allowsPlaintext: Bool = false, descriptors: @escaping DescriptorResolver = { _ in nil }
    ) throws(ChannelError) {
        self.address = address
        self.limits = limits
        self.tls = tls
        try tls?.check(.server, address)
        let isClosed = tls == nil && !allowsPlaintext
        closing = try channelled { () throws(SystemError) in try CancelToken() }
        var opened = State()
        var madeFile: (path: String, identity: FileIdentity)?
        switch address {
        case .tcp(let host, let port):
            let targets = try channelled { () throws(SystemError) in
                try SocketAddress.resolve(host: host, port: port, passive: true)
            }
            if isClosed { try Self.requireLocal(targets, address) }
            opened.sockets = try channelled { () throws(SystemError) in
                try Self.listen(on: targets, name: address.description)
            }
        case .unix(let path):
            opened.sockets = [try channelled { () throws(SystemError) in try Self.listen(unix: path) }]
            madeFile = FileIdentity(path: path).map { (path, $0) }
        case .descriptor(let name):
            let descriptor = try Channel.resolve(name, descriptors)
            let listens = try channelled { () throws(SystemError) in
                descriptor.kind == .socket ? try Socket.isListening(descriptor) : false
            }
            if listens {
                let bound = try channelled { () throws(SystemError) in
                    try descriptor.setNonBlocking(true)
                    return try Socket.localAddress(of: descriptor)
                }
                if isClosed { try Self.requireLocal([bound], address) }
                opened.sockets = [descriptor]
            } else {
                opened.single = try Channel.descriptor(descriptor, .incoming, limits: limits, tls: tls)
            }
        case .exec(let arguments):
            opened.single = try Channel.command(arguments, .incoming, limits: limits)
        case .file(let path, let offset):
            opened.single = try Channel.file(path, offset: offset, .incoming, limits: limits)
        }
        addresses = opened.sockets.compactMap(Self.boundAddress)
        socketFile = madeFile
        state = Mutex(opened)
    }

    deinit { socketFile.map { $0.identity.remove($0.path) } }

    /// Whether one connection comes and no other.
    public var bringsOneChannel: Bool { addresses.isEmpty && state.withLock { $0.sockets.isEmpty } }

    // MARK: Accepting

    /// The next channel. - Throws: `ChannelError`: `cancelled` by the token or `close`; a `system` error with `ETIMEDOUT` when the
    /// deadline passes; `unusable` when the address can bring no further channel.
    public func accept(deadline: Deadline = .never, cancel: CancelToken? = nil) throws(ChannelError) -> Channel {
        try closing.check()
        try cancel?.check()
        let (sockets, single) = state.withLock { state in
            state.isAccepting = false
            return (state.sockets, state.single.take())
        }
        if let single { return single }
        guard !sockets.isEmpty else {
            throw .unusable("accept on \(address): it brings one channel only, and that was accepted already")
        }
        var wanted: [(Descriptor, Readiness)] = [(closing.event.descriptor, .readable)]
        if let cancel { wanted.append((cancel.event.descriptor, .readable)) }
        wanted += sockets.map { ($0, .readable) }
        while true {
            let ready = try channelled { () throws(SystemError) in try poll(wanted, deadline: deadline) }
            try closing.check()
            try cancel?.check()
            for (entry, readiness) in zip(wanted, ready).dropFirst(wanted.count - sockets.count)
            where !readiness.isEmpty {
                if let channel = try acceptNow(entry.0) { return channel }
            }
            if deadline.hasPassed { throw .system(SystemError("accept on", "\(address)", code: ETIMEDOUT)) }
        }
    }

    /// Whether a connection was made that nobody has accepted yet, or one was accepted by a thread that did not come back for the next.
    public var hasConnectionWaiting: Bool {
        let sockets = state.withLock { $0.sockets.map { ($0, Readiness.readable) } }
        guard !sockets.isEmpty, let ready = try? poll(sockets, deadline: Deadline(at: 0)) else { return false }
        // In this order: what the queue has lost by now is marked.
        return ready.contains { !$0.isEmpty } || state.withLock { $0.isAccepting }
    }

    /// `nil` if the connection went away in the meantime.
    private func acceptNow(_ listener: Descriptor) throws(ChannelError) -> Channel? {
        state.withLock { $0.isAccepting = true }
        let socket = try channelled { () throws(SystemError) in
            try Socket.accept(listener, deadline: Deadline(at: 0))
        }
        guard let socket else {
            state.withLock { $0.isAccepting = false }
            return nil
        }
        return try Channel.socket(socket, peer: Self.peer(of: socket, on: address), limits: limits, tls: tls)
    }

    private static func peer(of socket: Descriptor, on address: MigrationAddress) -> String {
        guard let (host, port) = (try? Socket.peerAddress(of: socket))?.numeric else { return "\(address)" }
        return MigrationAddress.tcp(host: host, port: port).description
    }

    // MARK: Closing

    /// Stops listening: a blocked accept throws `cancelled`, and the socket file we made is removed. Channels stay open.
    public func close() {
        closing.cancel()
        if let (path, identity) = socketFile { identity.remove(path) }
        let released = state.withLock { old in
            let now = old
            old = State()
            return now
        }
        released.single?.cancel()
    }

    // MARK: Opening

    /// Closed by default: who could be reached by others without TLS does not listen.
    private static func requireLocal(_ targets: [SocketAddress], _ address: MigrationAddress) throws(ChannelError) {
        guard !targets.allSatisfy(\.isLocal) else { return }
        throw .tls(
            "listen on \(address): other machines reach this address, and without TLS anybody there could send a guest or read the "
                + "one that comes; use TLS (tls-creds), listen on 127.0.0.1 or unix:PATH, or allow it with --insecure-plaintext"
        )
    }

    /// Listens on every address the host stands for, all with the same port.
    private static func listen(on targets: [SocketAddress], name: String) throws(SystemError) -> [Descriptor] {
        var sockets: [Descriptor] = []
        var chosen: UInt16?
        var failure = SystemError("listen on", name, code: EADDRNOTAVAIL)
        for target in targets {
            do throws(SystemError) {
                let socket = try Socket.listen(on: chosen.map(target.with(port:)) ?? target, name: name)
                sockets.append(socket)
                if target.port == 0, chosen == nil { chosen = try Socket.localAddress(of: socket).port }
            } catch {
                failure = error
                // A host may lack a family (IPv6); but the half of an address must not belong to someone else.
                if error.code == EADDRINUSE, chosen == nil { break }
            }
        }
        let taken = failure.code == EADDRINUSE && chosen == nil
        guard !sockets.isEmpty, !taken else {
            let remedy = "another socket listens on that port; choose another port, or 0 for one the kernel chooses"
            throw failure.code == EADDRINUSE
                ? SystemError("listen on", name, code: EADDRINUSE, remedy: remedy) : failure
        }
        return sockets
    }

    private static func listen(unix path: String) throws(SystemError) -> Descriptor {
        do throws(SystemError) {
            return try Socket.listen(on: .unix(path: path), name: "unix:\(path)")
        } catch {
            guard error.code == EADDRINUSE else { throw error }
            let isSocket = FileIdentity(path: path)?.isSocket ?? false
            throw SystemError(
                error.operation, error.object, code: error.code,
                remedy: isSocket
                    ? "a socket is there already; remove the file if nothing listens on it any more"
                    : "a file is there which is no socket; choose another path")
        }
    }

    private static func boundAddress(_ socket: Descriptor) -> BoundAddress? {
        guard let local = try? Socket.localAddress(of: socket) else { return nil }
        if let (host, port) = local.numeric { return .inet(host: host, port: port) }
        return local.unixPath.map { .unix(path: $0) }
    }
}
