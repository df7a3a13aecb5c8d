import Glibc
public import Host

/// Opens channels to where a migration goes.
public struct Connector: Sendable {
    private let limits: StallLimits
    private let descriptors: DescriptorResolver
    private let tls: TLSSettings?

    /// - Parameters:
    ///   - tls: makes every channel TLS from its first byte.
    ///   - descriptors: finds what `getfd` passed; asked before a `fd:` is taken as a number.
    public init(
        limits: StallLimits = StallLimits(), tls: TLSSettings? = nil,
        descriptors: @escaping DescriptorResolver = { _ in nil }
    ) {
        self.limits = limits
        self.tls = tls
        self.descriptors = descriptors
    }

    /// Connects, opens or starts what the address says, TLS handshake included. Call it again for a second channel to the same socket.
    /// - Throws: `ChannelError`: `cancelled` by the token; a `system` error with `ETIMEDOUT` when the deadline passes; `tls`.
    public func connect(
        to address: MigrationAddress, deadline: Deadline = .never, cancel: CancelToken? = nil
    ) throws(ChannelError) -> Channel {
        try cancel?.check()
        let tls = try tls?.connecting(to: address)
        let channel = try open(address, deadline, cancel, tls)
        if channel.awaitsHandshake { try channel.handshake(deadline: deadline, cancel: cancel) }
        return channel
    }

    private func open(
        _ address: MigrationAddress, _ deadline: Deadline, _ cancel: CancelToken?, _ tls: TLSSettings?
    ) throws(ChannelError) -> Channel {
        switch address {
        case .tcp(let host, let port):
            let targets = try channelled { () throws(SystemError) in
                try SocketAddress.resolve(host: host, port: port, passive: false)
            }
            return try connect(targets, address.description, deadline, cancel, tls)
        case .unix(let path):
            let target = try channelled { () throws(SystemError) in try SocketAddress.unix(path: path) }
            return try connect([target], address.description, deadline, cancel, tls)
        case .descriptor(let name):
            let descriptor = try Channel.resolve(name, descriptors)
            return try Channel.descriptor(descriptor, .outgoing, limits: limits, tls: tls)
        case .exec(let arguments):
            return try Channel.command(arguments, .outgoing, limits: limits)
        case .file(let path, let offset):
            return try Channel.file(path, offset: offset, .outgoing, limits: limits)
        }
    }

    /// The first of the addresses that answers; if none does, the last error.
    private func connect(
        _ targets: [SocketAddress], _ name: String, _ deadline: Deadline, _ cancel: CancelToken?, _ tls: TLSSettings?
    ) throws(ChannelError) -> Channel {
        let wake = try channelled { () throws(SystemError) in
            if let cancel { return cancel.event }
            return try EventDescriptor()
        }
        var failure = SystemError("connect to", name, code: EADDRNOTAVAIL)
        for target in targets {
            try cancel?.check()
            let socket: Descriptor?
            do throws(SystemError) {
                socket = try Socket.connect(to: target, name: name, wake: wake, deadline: deadline)
            } catch {
                failure = error
                continue
            }
            if let socket { return try Channel.socket(socket, peer: name, limits: limits, tls: tls) }
        }
        try cancel?.check()
        throw .system(failure)
    }
}
