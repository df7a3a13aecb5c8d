import CLinux
import Glibc

/// Stream sockets: unix and TCP, listening and connecting. All are close-on-exec; waits have deadlines.
public enum Socket {
    /// A pair of connected unix sockets.
    public static func pair() throws(SystemError) -> (Descriptor, Descriptor) {
        var ends: [CInt] = [-1, -1]
        let type = CInt(SOCK_STREAM.rawValue) | CInt(SOCK_CLOEXEC.rawValue)
        guard unsafe socketpair(AF_UNIX, type, 0, &ends) == 0 else { throw .last("socketpair") }
        return (Descriptor(owning: ends[0], name: "socket pair"), Descriptor(owning: ends[1], name: "socket pair"))
    }

    // MARK: Unix

    /// The longest path of a unix socket, in bytes (sun_path less its terminator).
    public static let longestUnixPath = 107

    /// Listens on a path; mode 0600 from the first moment. A stale file is not removed here.
    public static func listen(unix path: String) throws(SystemError) -> Descriptor {
        var address = try unixAddress(path)
        let socket = try make(AF_UNIX, "unix:\(path)")
        let mask = umask(0o177)
        defer { umask(mask) }
        guard unsafe withSocketAddress(&address, { unsafe bind(socket.number, $0, $1) }) == 0 else {
            throw .last("listen on", "unix:\(path)")
        }
        guard Glibc.listen(socket.number, 64) == 0 else { throw .last("listen on", "unix:\(path)") }
        return socket
    }

    public static func connect(unix path: String) throws(SystemError) -> Descriptor {
        var address = try unixAddress(path)
        let socket = try make(AF_UNIX, "unix:\(path)")
        while unsafe withSocketAddress(&address, { unsafe Glibc.connect(socket.number, $0, $1) }) != 0 {
            if errno == EINTR { continue }
            throw .last("connect to", "unix:\(path)")
        }
        return socket
    }

    private static func unixAddress(_ path: String) throws(SystemError) -> sockaddr_un {
        let bytes = Array(path.utf8)
        guard !bytes.isEmpty, bytes.count <= longestUnixPath, !bytes.contains(0) else {
            throw SystemError(
                "use socket path", path, code: bytes.isEmpty ? ENOENT : ENAMETOOLONG,
                remedy: "a unix socket's path has 1 to \(longestUnixPath) bytes")
        }
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: bytes) }
        return address
    }

    private static func withSocketAddress(
        _ address: inout sockaddr_un, _ body: (UnsafePointer<sockaddr>, socklen_t) -> CInt
    ) -> CInt {
        // SAFETY: the socket calls take any address structure through this type, with its true length.
        unsafe withUnsafeBytes(of: &address) {
            unsafe body($0.baseAddress!.assumingMemoryBound(to: sockaddr.self), socklen_t($0.count))
        }
    }

    private static func make(_ family: CInt, _ name: String) throws(SystemError) -> Descriptor {
        let number = socket(family, CInt(SOCK_STREAM.rawValue) | CInt(SOCK_CLOEXEC.rawValue), 0)
        guard number >= 0 else { throw .last("socket", name) }
        return Descriptor(owning: number, name: name)
    }

    // MARK: TCP

    /// Listens on a TCP address; port "0" lets the kernel choose (`localPort` tells which).
    public static func listen(host: String, port: String) throws(SystemError) -> Descriptor {
        let name = "tcp:\(host):\(port)"
        return unsafe try eachAddress(host, port, name, passive: true) {
            (socket, address, length) throws(SystemError) in
            var on: CInt = 1
            unsafe setsockopt(socket.number, SOL_SOCKET, SO_REUSEADDR, &on, socklen_t(MemoryLayout<CInt>.size))
            guard unsafe bind(socket.number, address, length) == 0, Glibc.listen(socket.number, 64) == 0 else {
                throw .last("listen on", name)
            }
        }
    }

    /// Connects before the deadline. - Throws: `SystemError` naming the address.
    public static func connect(host: String, port: String, deadline: Deadline) throws(SystemError) -> Descriptor {
        let name = "tcp:\(host):\(port)"
        return unsafe try eachAddress(host, port, name, passive: false) {
            (socket, address, length) throws(SystemError) in
            try socket.setNonBlocking(true)
            if unsafe Glibc.connect(socket.number, address, length) != 0 {
                guard errno == EINPROGRESS || errno == EINTR else { throw .last("connect to", name) }
                try socket.wait(for: .writable, deadline: deadline, operation: "connect to")
                var status: CInt = 0
                var size = socklen_t(MemoryLayout<CInt>.size)
                unsafe getsockopt(socket.number, SOL_SOCKET, SO_ERROR, &status, &size)
                guard status == 0 else { throw SystemError("connect to", name, code: status) }
            }
            try socket.setNonBlocking(false)
            setNoDelay(socket)
        }
    }

    /// Tries each address a name stands for; the first that works wins, the last error is thrown.
    private static func eachAddress(
        _ host: String, _ port: String, _ name: String, passive: Bool,
        _ attempt: (Descriptor, UnsafePointer<sockaddr>, socklen_t) throws(SystemError) -> Void
    ) throws(SystemError) -> Descriptor {
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
        // SAFETY: the list is getaddrinfo's and is freed once, after its last use.
        defer { unsafe freeaddrinfo(list) }
        var failure = SystemError("resolve", name, code: EADDRNOTAVAIL)
        var entry = unsafe list
        while let current = unsafe entry {
            do throws(SystemError) {
                let socket = try make(unsafe current.pointee.ai_family, name)
                unsafe try attempt(socket, current.pointee.ai_addr, current.pointee.ai_addrlen)
                return socket
            } catch { failure = error }
            unsafe entry = current.pointee.ai_next
        }
        throw failure
    }

    // MARK: Both

    /// The next connection of a listening socket; `nil` when the deadline passes or `wake` is raised.
    public static func accept(
        _ listener: Descriptor, wake: EventDescriptor? = nil, deadline: Deadline = .never
    )
        throws(SystemError) -> Descriptor?
    {
        while true {
            var wanted: [(Descriptor, Readiness)] = [(listener, .readable)]
            if let wake { wanted.append((wake.descriptor, .readable)) }
            let ready = try poll(wanted, deadline: deadline)
            if wake != nil, !ready[1].isEmpty { return nil }
            guard !ready[0].isEmpty else { return nil }
            let number = Glibc.accept(listener.number, nil, nil)
            if number >= 0 {
                _ = gw_fcntl_int(number, F_SETFD, FD_CLOEXEC)
                let socket = Descriptor(owning: number, name: "connection to \(listener.name)")
                setNoDelay(socket)
                return socket
            }
            if errno != EINTR && errno != ECONNABORTED && errno != EAGAIN { throw .last("accept on", listener.name) }
        }
    }

    /// The port a TCP listener was given; `nil` for other sockets.
    public static func localPort(of socket: Descriptor) -> UInt16? {
        var storage = sockaddr_in6()
        var length = socklen_t(MemoryLayout<sockaddr_in6>.size)
        // SAFETY: getsockname writes at most `length` bytes; both families keep the port at the same place.
        let status = unsafe withUnsafeMutableBytes(of: &storage) {
            unsafe getsockname(socket.number, $0.baseAddress!.assumingMemoryBound(to: sockaddr.self), &length)
        }
        guard status == 0, CInt(storage.sin6_family) == AF_INET || CInt(storage.sin6_family) == AF_INET6 else {
            return nil
        }
        return UInt16(bigEndian: storage.sin6_port)
    }

    /// Ends both directions: a thread blocked on the socket returns at once.
    public static func shutdown(_ socket: Descriptor) { Glibc.shutdown(socket.number, CInt(SHUT_RDWR)) }

    /// The user id of a unix socket's peer.
    public static func peerUserID(_ socket: Descriptor) throws(SystemError) -> UInt32 {
        UInt32(try checked(gw_peer_uid(socket.number), "SO_PEERCRED", socket.name))
    }

    /// Blocking calls on the socket return after this long without progress; 0 is never.
    public static func setTimeouts(_ socket: Descriptor, milliseconds: UInt64) {
        var time = timeval(tv_sec: Int(milliseconds / 1000), tv_usec: Int(milliseconds % 1000) * 1000)
        unsafe setsockopt(socket.number, SOL_SOCKET, SO_RCVTIMEO, &time, socklen_t(MemoryLayout<timeval>.size))
        unsafe setsockopt(socket.number, SOL_SOCKET, SO_SNDTIMEO, &time, socklen_t(MemoryLayout<timeval>.size))
    }

    private static func setNoDelay(_ socket: Descriptor) {
        var on: CInt = 1
        unsafe setsockopt(socket.number, CInt(IPPROTO_TCP), TCP_NODELAY, &on, socklen_t(MemoryLayout<CInt>.size))
    }

    /// Receives bytes and at most one passed descriptor. - Returns: no bytes at the end; `nil` if it would block.
    public static func receive(
        _ socket: Descriptor, upTo limit: Int
    ) throws(SystemError)
        -> (bytes: [UInt8], passed: Descriptor?)?
    {
        var bytes = [UInt8](repeating: 0, count: limit)
        while true {
            var passed: CInt = -1
            let count = unsafe bytes.withUnsafeMutableBytes {
                unsafe gw_receive_with_descriptor(socket.number, $0.baseAddress!, $0.count, &passed)
            }
            if count == -Int(EINTR) { continue }
            if count == -Int(EAGAIN) { return nil }
            guard count >= 0 else { throw SystemError("receive from", socket.name, code: CInt(-count)) }
            bytes.removeLast(limit - count)
            return (bytes, passed >= 0 ? Descriptor(owning: passed, name: "passed descriptor \(passed)") : nil)
        }
    }

    /// Sends bytes with a descriptor. - Returns: how many bytes the kernel took.
    public static func send(
        _ socket: Descriptor, _ bytes: [UInt8], passing descriptor: Descriptor
    ) throws(SystemError) -> Int {
        let count = unsafe bytes.withUnsafeBytes {
            unsafe gw_send_with_descriptor(socket.number, $0.baseAddress!, $0.count, descriptor.number)
        }
        guard count >= 0 else { throw SystemError("send to", socket.name, code: CInt(-count)) }
        return count
    }
}
