import Glibc
public import Host

/// Opens channels to where a migration goes.
public struct Connector: Sendable {
    private let limits: StallLimits
    private let descriptors: DescriptorResolver

    /// - Parameter descriptors: finds what `getfd` passed; asked before a `fd:` is taken as a number.
    public init(limits: StallLimits = StallLimits(), descriptors: @escaping DescriptorResolver = { _ in nil }) {
        self.limits = limits
        self.descriptors = descriptors
    }

    /// Connects, opens or starts what the address says. Call it again for a second channel to the same socket.
    /// - Throws: `ChannelError`: `cancelled` by the token; a `system` error with `ETIMEDOUT` when the deadline passes.
    public func connect(
        to address: MigrationAddress, deadline: Deadline = .never, cancel: CancelToken? = nil
    ) throws(ChannelError) -> Channel {
        try cancel?.check()
        switch address {
        case .tcp(let host, let port):
            let targets = try channelled { () throws(SystemError) in
                try SocketAddress.resolve(host: host, port: port, passive: false)
            }
            return try connect(targets, address.description, deadline, cancel)
        case .unix(let path):
            let target = try channelled { () throws(SystemError) in try SocketAddress.unix(path: path) }
            return try connect([target], address.description, deadline, cancel)
        case .descriptor(let name):
            let descriptor = try Channel.resolve(name, descriptors)
            return try Channel.descriptor(descriptor, .outgoing, limits: limits)
        case .exec(let arguments):
            return try Channel.command(arguments, .outgoing, limits: limits)
        case .file(let path, let offset):
            return try Channel.file(path, offset: offset, .outgoing, limits: limits)
        }
    }

    /// The first of the addresses that answers; if none does, the last error.
    private func connect(
        _ targets: [SocketAddress], _ name: String, _ deadline: Deadline, _ cancel: CancelToken?
    ) throws(ChannelError) -> Channel {
        let wake = try channelled { () throws(SystemError) in
            if let cancel { return cancel.event }
            return try EventDescriptor()
        }
        var failure = SystemError("connect to", name, code: EADDRNOTAVAIL)
        for target in targets {
            try cancel?.check()
            do throws(SystemError) {
                if let socket = try Socket.connect(to: target, name: name, wake: wake, deadline: deadline) {
                    return try Channel(socket: socket, peer: name, limits: limits)
                }
            } catch { failure = error }
        }
        try cancel?.check()
        throw .system(failure)
    }
}
