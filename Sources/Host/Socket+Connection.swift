import CLinux
import Glibc

/// A resolved socket address: unix, IPv4 or IPv6.
public struct SocketAddress: Sendable, Hashable {
    /// The kernel's structure, byte for byte.
    let bytes: [UInt8]

    /// The address family, `AF_INET` and so on.
    public var family: CInt { CInt(UInt16(bytes[0]) | UInt16(bytes[1]) << 8) }
    public var isUnix: Bool { family == AF_UNIX }

    /// The addresses a host name and a port or service name stand for, in the order in which to try them.
    /// - Parameter passive: to listen on; then an empty host means all addresses of this machine.
    public static func resolve(host: String, port: String, passive: Bool) throws(SystemError) -> [SocketAddress] {
        let name = host.contains(":") ? "tcp:[\(host)]:\(port)" : "tcp:\(host):\(port)"
        var hints = unsafe addrinfo()
        unsafe hints.ai_family = AF_UNSPEC
        unsafe hints.ai_socktype = CInt(SOCK_STREAM.rawValue)
        unsafe hints.ai_flags = passive ? AI_PASSIVE : 0
        var list: UnsafeMutablePointer<addrinfo>?
        let status = unsafe getaddrinfo(host.isEmpty ? nil : host, port, &hints, &list)
        guard status == 0 else {
            let words = unsafe String(cString: gai_strerror(status))
            throw SystemError("resolve", name, code: EINVAL, remedy: "the resolver says: \(words)")
        }
        // SAFETY: the list is getaddrinfo's; every address is valid for its length; it is freed after the last copy.
        defer { unsafe freeaddrinfo(list) }
        var found: [SocketAddress] = []
        var entry = unsafe list
        while let current = unsafe entry {
            let length = unsafe Int(current.pointee.ai_addrlen)
            unsafe found.append(
                SocketAddress(bytes: Array(UnsafeRawBufferPointer(start: current.pointee.ai_addr, count: length))))
            unsafe entry = current.pointee.ai_next
        }
        guard !found.isEmpty else { throw SystemError("resolve", name, code: EADDRNOTAVAIL) }
        return found
    }

    /// The address of a unix socket's path, 1 to 107 bytes.
    public static func unix(path: String) throws(SystemError) -> SocketAddress {
        let text = Array(path.utf8)
        guard !text.isEmpty, text.count <= Socket.longestUnixPath, !text.contains(0) else {
            throw SystemError(
                "use socket path", path, code: text.isEmpty ? ENOENT : ENAMETOOLONG,
                remedy: "a unix socket's path has 1 to \(Socket.longestUnixPath) bytes")
        }
        return SocketAddress(bytes: [UInt8(AF_UNIX), 0] + text + [0])
    }

    /// Host and port as numbers; `nil` for a unix address.
    public var numeric: (host: String, port: String)? {
        guard !isUnix else { return nil }
        var host = [CChar](repeating: 0, count: Int(NI_MAXHOST))
        var port = [CChar](repeating: 0, count: 32)
        // SAFETY: the address is valid for its length, and both buffers for theirs, during the call.
        let status = unsafe withKernelAddress { address, length in
            unsafe getnameinfo(
                address, length, &host, socklen_t(host.count), &port, socklen_t(port.count),
                NI_NUMERICHOST | NI_NUMERICSERV)
        }
        guard status == 0 else { return nil }
        let text = { (buffer: [CChar]) in
            String(decoding: buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        }
        return (text(host), text(port))
    }

    /// The path of a unix address; `nil` if it has none, or one outside the file system.
    public var unixPath: String? {
        guard isUnix, bytes.count > 2, bytes[2] != 0 else { return nil }
        return String(decoding: bytes[2...].prefix { $0 != 0 }, as: UTF8.self)
    }

    /// The same address with another port; a unix address as it is.
    public func with(port: UInt16) -> SocketAddress {
        guard !isUnix, bytes.count >= 4 else { return self }
        var changed = bytes
        changed[2] = UInt8(port >> 8)
        changed[3] = UInt8(port & 0xff)
        return SocketAddress(bytes: changed)
    }

    /// The port; `nil` for a unix address.
    public var port: UInt16? { isUnix || bytes.count < 4 ? nil : UInt16(bytes[2]) << 8 | UInt16(bytes[3]) }

    /// Whether only this machine reaches what listens there: a unix path, 127.0.0.0/8, ::1, and those IPv4 addresses within IPv6.
    /// The unspecified address stands for all, so it is not.
    public var isLocal: Bool {
        switch family {
        case AF_UNIX: return true
        case AF_INET: return bytes.count >= 8 && bytes[4] == 127
        case AF_INET6:
            guard bytes.count >= 24 else { return false }
            let address = bytes[8..<24]
            let mapped: [UInt8] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127]
            return address.starts(with: mapped) || address.elementsEqual([UInt8](repeating: 0, count: 15) + [1])
        default: return false
        }
    }

    @unsafe func withKernelAddress<R>(_ body: (UnsafePointer<sockaddr>, socklen_t) -> R) -> R {
        // SAFETY: the socket calls take any address structure through this type, with its true length.
        unsafe bytes.withUnsafeBytes {
            unsafe body($0.baseAddress!.assumingMemoryBound(to: sockaddr.self), socklen_t($0.count))
        }
    }
}

extension Socket {
    /// Listens on one address. The socket is non-blocking, so that an accept never hangs on a connection that went away.
    public static func listen(on address: SocketAddress, name: String) throws(SystemError) -> Descriptor {
        let socket = try open(address.family, name)
        if !address.isUnix {
            try setOption(socket, SOL_SOCKET, SO_REUSEADDR, 1)
            // IPv4 has its own socket; one that served both would answer for addresses nobody named.
            if address.family == AF_INET6 { try setOption(socket, CInt(IPPROTO_IPV6), IPV6_V6ONLY, 1) }
        } else {
            // The mode a unix socket's file is created with is that of the socket itself.
            guard fchmod(socket.number, 0o600) == 0 else { throw .last("listen on", name) }
        }
        let status = unsafe address.withKernelAddress { unsafe bind(socket.number, $0, $1) }
        guard status == 0, Glibc.listen(socket.number, 128) == 0 else { throw .last("listen on", name) }
        return socket
    }

    /// Connects before the deadline. - Returns: a blocking socket; `nil` when `wake` was raised first.
    public static func connect(
        to address: SocketAddress, name: String, wake: EventDescriptor?, deadline: Deadline
    ) throws(SystemError) -> Descriptor? {
        let socket = try open(address.family, name)
        let wakes = wake.map { [($0.descriptor, Readiness.readable)] } ?? []
        while unsafe address.withKernelAddress({ unsafe Glibc.connect(socket.number, $0, $1) }) != 0 {
            switch errno {
            case EINPROGRESS, EALREADY:
                let ready = try poll([(socket, .writable)] + wakes, deadline: deadline)
                if ready.dropFirst().contains(where: { !$0.isEmpty }) { return nil }
                guard !ready[0].isEmpty else { throw SystemError("connect to", name, code: ETIMEDOUT) }
                let failure = try option(socket, SOL_SOCKET, SO_ERROR)
                guard failure == 0 else { throw SystemError("connect to", name, code: failure) }
            case EISCONN: break
            case EINTR: continue
            case EAGAIN:
                // A unix listener's queue is full, which no poll reports the end of.
                if deadline.hasPassed { throw SystemError("connect to", name, code: ETIMEDOUT) }
                let pause = min(Deadline.after(milliseconds: 10), deadline)
                if try poll(wakes, deadline: pause).contains(where: { !$0.isEmpty }) { return nil }
                continue
            default: throw .last("connect to", name)
            }
            break
        }
        try socket.setNonBlocking(false)
        return socket
    }

    /// The address a socket is bound to.
    public static func localAddress(of socket: Descriptor) throws(SystemError) -> SocketAddress {
        unsafe try address(of: socket) { unsafe getsockname($0, $1, $2) }
    }

    /// The address of a socket's peer.
    public static func peerAddress(of socket: Descriptor) throws(SystemError) -> SocketAddress {
        unsafe try address(of: socket) { unsafe getpeername($0, $1, $2) }
    }

    private static func address(
        of socket: Descriptor, _ ask: (CInt, UnsafeMutablePointer<sockaddr>, UnsafeMutablePointer<socklen_t>) -> CInt
    ) throws(SystemError) -> SocketAddress {
        var bytes = [UInt8](repeating: 0, count: MemoryLayout<sockaddr_storage>.size)
        var length = socklen_t(bytes.count)
        // SAFETY: the call writes at most `length` bytes.
        let status = unsafe bytes.withUnsafeMutableBytes {
            unsafe ask(socket.number, $0.baseAddress!.assumingMemoryBound(to: sockaddr.self), &length)
        }
        guard status == 0 else { throw .last("name", socket.name) }
        return SocketAddress(bytes: Array(bytes.prefix(max(2, Int(length)))))
    }

    /// Whether the socket listens (SO_ACCEPTCONN); otherwise it is a connection.
    public static func isListening(_ socket: Descriptor) throws(SystemError) -> Bool {
        try option(socket, SOL_SOCKET, SO_ACCEPTCONN) != 0
    }

    /// Whether the socket carries a stream of bytes, not datagrams.
    public static func isStream(_ socket: Descriptor) throws(SystemError) -> Bool {
        try option(socket, SOL_SOCKET, SO_TYPE) == CInt(SOCK_STREAM.rawValue)
    }

    /// Says that nothing more will be sent: the peer reads to the end. The other direction stays open.
    public static func finishSending(_ socket: Descriptor) throws(SystemError) {
        guard Glibc.shutdown(socket.number, CInt(SHUT_WR)) == 0 else { throw .last("finish sending to", socket.name) }
    }

    /// A blocking send returns after this long without room in the socket's buffer; `nil` is never.
    public static func setSendTimeout(_ socket: Descriptor, milliseconds: UInt64?) throws(SystemError) {
        try setTimeout(socket, SO_SNDTIMEO, milliseconds)
    }

    /// A blocking receive returns after this long without a byte; `nil` is never.
    public static func setReceiveTimeout(_ socket: Descriptor, milliseconds: UInt64?) throws(SystemError) {
        try setTimeout(socket, SO_RCVTIMEO, milliseconds)
    }

    private static func setTimeout(_ socket: Descriptor, _ name: CInt, _ milliseconds: UInt64?) throws(SystemError) {
        let wanted = milliseconds ?? 0
        var time = timeval(tv_sec: Int(wanted / 1000), tv_usec: Int(wanted % 1000) * 1000)
        let status = unsafe setsockopt(socket.number, SOL_SOCKET, name, &time, socklen_t(MemoryLayout<timeval>.size))
        guard status == 0 else { throw .last("set the timeout of", socket.name) }
    }

    /// Sends small messages at once, and notices within about a minute that a silent TCP peer's host is gone.
    /// Nothing happens to a socket that is not TCP.
    public static func tuneForMessages(_ socket: Descriptor) {
        guard let address = try? localAddress(of: socket), !address.isUnix else { return }
        let tcp = CInt(IPPROTO_TCP)
        let options = [
            (tcp, TCP_NODELAY, 1), (SOL_SOCKET, SO_KEEPALIVE, 1), (tcp, TCP_KEEPIDLE, 30), (tcp, TCP_KEEPINTVL, 10),
            (tcp, TCP_KEEPCNT, 3),
        ]
        for (level, name, value) in options { try? setOption(socket, level, name, CInt(value)) }
    }

    /// Acknowledges what was received up to now; the kernel otherwise waits a moment for data to send along (tcp(7), TCP_QUICKACK, which
    /// does not last). Nothing happens to a socket that is not TCP.
    public static func acknowledgeAtOnce(_ socket: Descriptor) {
        try? setOption(socket, CInt(IPPROTO_TCP), TCP_QUICKACK, 1)
    }

    private static func open(_ family: CInt, _ name: String) throws(SystemError) -> Descriptor {
        let type = CInt(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue)
        let number = socket(family, type, 0)
        guard number >= 0 else { throw .last("socket", name) }
        return Descriptor(owning: number, name: name)
    }

    static func setOption(
        _ socket: Descriptor, _ level: CInt, _ name: CInt, _ value: CInt
    ) throws(SystemError) {
        var value = value
        let status = unsafe setsockopt(socket.number, level, name, &value, socklen_t(MemoryLayout<CInt>.size))
        guard status == 0 else { throw .last("set an option of", socket.name) }
    }

    private static func option(_ socket: Descriptor, _ level: CInt, _ name: CInt) throws(SystemError) -> CInt {
        var value: CInt = 0
        var size = socklen_t(MemoryLayout<CInt>.size)
        guard unsafe getsockopt(socket.number, level, name, &value, &size) == 0 else {
            throw .last("ask an option of", socket.name)
        }
        return value
    }
}
