import Glibc
public import Host

/// Finds the descriptor that QMP `getfd` was given under a name, and gives it away; `nil` if there is none.
public typealias DescriptorResolver = @Sendable (_ name: String) -> Descriptor?

extension Channel {
    /// The side of a migration.
    enum Direction: Sendable {
        case outgoing, incoming
    }

    /// A connected stream socket, in plaintext.
    convenience init(socket: Descriptor, peer: String, limits: StallLimits) throws(SystemError) {
        Socket.tuneForMessages(socket)
        try self.init(.socket, peer: peer, input: socket, output: socket, limits: limits)
    }

    /// A connected stream socket; with TLS settings nothing goes through it before the handshake.
    static func socket(
        _ socket: Descriptor, peer: String, limits: StallLimits, tls settings: TLSSettings?
    ) throws(ChannelError) -> Channel {
        let token = try channelled { () throws(SystemError) in try CancelToken() }
        var session: TLSSession?
        if let settings { session = try TLSSession(settings, socket: socket, token: token, peer: peer) }
        Socket.tuneForMessages(socket)
        return try channelled { () throws(SystemError) in
            try Channel(
                .socket, peer: peer, input: socket, output: socket, limits: limits, token: token, tls: session)
        }
    }

    /// A child process: we write to its standard input and read from its standard output, as QEMU does in both directions.
    static func command(
        _ arguments: [String], _ direction: Direction, limits: StallLimits
    ) throws(ChannelError) -> Channel {
        let peer = "exec:\(MigrationAddress.commandText(arguments))"
        guard !arguments.isEmpty, !arguments[0].isEmpty else {
            throw .unusable("\(peer): there is no program to start")
        }
        return try channelled { () throws(SystemError) in
            let toChild = try Descriptor.pipe()
            let fromChild = try Descriptor.pipe()
            let child = try ChildProcess(arguments, input: toChild.read, output: fromChild.write)
            return try Channel(
                .command, peer: peer, input: fromChild.read, output: toChild.write, child: child,
                isIncoming: direction == .incoming, limits: limits)
        }
    }

    /// A file, made where it is missing (mode 0600) and cut at the offset for sending.
    static func file(
        _ path: String, offset: UInt64, _ direction: Direction, limits: StallLimits
    ) throws(ChannelError) -> Channel {
        try channelled { () throws(SystemError) in
            // A FIFO without a peer must not block the opening.
            let flags = direction == .outgoing ? O_WRONLY | O_CREAT : O_RDONLY
            let file = try Descriptor.open(path, flags | O_NONBLOCK, mode: 0o600)
            let isRegular = file.kind == .file
            if isRegular {
                if direction == .outgoing { try file.truncate(to: offset) }
                let size = try file.size()
                guard size >= offset else {
                    throw SystemError(
                        "read", path, code: EINVAL, remedy: "the offset \(offset) is past its end at \(size)")
                }
                try file.seek(to: offset)
            } else if offset != 0 {
                throw SystemError("seek in", path, code: ESPIPE, remedy: "leave out the offset")
            }
            return try Channel(
                isRegular ? .file : .pipe, peer: "file:\(path)", input: direction == .incoming ? file : nil,
                output: direction == .outgoing ? file : nil, limits: limits)
        }
    }

    /// A descriptor we were given: a connected socket, a pipe or a file, from where it stands.
    static func descriptor(
        _ descriptor: Descriptor, _ direction: Direction, limits: StallLimits, tls: TLSSettings? = nil
    ) throws(ChannelError) -> Channel {
        let name = descriptor.name
        let kind = descriptor.kind
        if kind == .socket {
            try channelled { () throws(SystemError) in
                guard try Socket.isStream(descriptor) else {
                    throw SystemError("use", name, code: EPROTOTYPE, remedy: "the socket must be of type SOCK_STREAM")
                }
            }
            return try Channel.socket(descriptor, peer: name, limits: limits, tls: tls)
        }
        guard tls == nil else { throw .tls("\(name): TLS needs a socket, and this is none; clear tls-creds") }
        let access = try channelled { () throws(SystemError) in try descriptor.access() }
        switch direction {
        case .outgoing:
            guard access.writes else {
                throw .unusable("\(name) is open for reading only; a migration out writes to it")
            }
        case .incoming:
            guard access.reads else {
                throw .unusable("\(name) is open for writing only; a migration in reads from it")
            }
        }
        return try channelled { () throws(SystemError) in
            try Channel(
                kind == .file ? .file : .pipe, peer: name, input: direction == .incoming ? descriptor : nil,
                output: direction == .outgoing ? descriptor : nil, limits: limits)
        }
    }

    /// The descriptor `fd:` names: by number, inherited when the process started, or by a name known to the resolver.
    static func resolve(_ text: String, _ resolver: DescriptorResolver) throws(ChannelError) -> Descriptor {
        if let found = resolver(text) { return found }
        guard let first = text.utf8.first, (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(first) else {
            throw .unusable("fd:\(text): no descriptor has that name; pass it with getfd before, or give a number")
        }
        guard let number = CInt(text) else { throw .unusable("fd:\(text): this is no descriptor number") }
        return try channelled { () throws(SystemError) in try Descriptor.adopt(number, name: "fd:\(text)") }
    }
}
