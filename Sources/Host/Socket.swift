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

    // MARK: By name

    /// The longest path of a unix socket, in bytes (sun_path less its terminator).
    public static let longestUnixPath = 107

    /// Listens on a path; mode 0600 from the first moment. A stale file is not removed here.
    public static func listen(unix path: String) throws(SystemError) -> Descriptor {
        try listen(on: .unix(path: path), name: "unix:\(path)")
    }

    public static func connect(
        unix path: String, deadline: Deadline = .after(seconds: 30)
    ) throws(SystemError)
        -> Descriptor
    {
        let name = "unix:\(path)"
        guard let socket = try connect(to: .unix(path: path), name: name, wake: nil, deadline: deadline) else {
            throw SystemError("connect to", name, code: ECANCELED)
        }
        return socket
    }

    /// Listens on the first address of a host; port "0" lets the kernel choose (`localPort` tells which).
    public static func listen(host: String, port: String) throws(SystemError) -> Descriptor {
        try firstThatWorks(host, port, passive: true) { (address, name) throws(SystemError) in
            try listen(on: address, name: name)
        }
    }

    /// Connects before the deadline. - Throws: `SystemError` naming the address.
    public static func connect(host: String, port: String, deadline: Deadline) throws(SystemError) -> Descriptor {
        let socket = try firstThatWorks(host, port, passive: false) { (address, name) throws(SystemError) in
            guard let socket = try connect(to: address, name: name, wake: nil, deadline: deadline) else {
                throw SystemError("connect to", name, code: ECANCELED)
            }
            return socket
        }
        tuneForMessages(socket)
        return socket
    }

    /// Tries each address a name stands for; if none works, the last error is thrown.
    private static func firstThatWorks(
        _ host: String, _ port: String, passive: Bool,
        _ attempt: (SocketAddress, String) throws(SystemError) -> Descriptor
    ) throws(SystemError) -> Descriptor {
        let name = "tcp:\(host):\(port)"
        var failure = SystemError("resolve", name, code: EADDRNOTAVAIL)
        for address in try SocketAddress.resolve(host: host, port: port, passive: passive) {
            do throws(SystemError) { return try attempt(address, name) } catch { failure = error }
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
                tuneForMessages(socket)
                return socket
            }
            if errno != EINTR && errno != ECONNABORTED && errno != EAGAIN { throw .last("accept on", listener.name) }
        }
    }

    /// The port a TCP listener was given; `nil` for other sockets.
    public static func localPort(of socket: Descriptor) -> UInt16? {
        (try? localAddress(of: socket))?.numeric.flatMap { UInt16($0.port) }
    }

    /// Ends both directions: a thread blocked on the socket returns at once.
    public static func shutdown(_ socket: Descriptor) { Glibc.shutdown(socket.number, CInt(SHUT_RDWR)) }

    /// The user id of a unix socket's peer.
    public static func peerUserID(_ socket: Descriptor) throws(SystemError) -> UInt32 {
        UInt32(try checked(gw_peer_uid(socket.number), "SO_PEERCRED", socket.name))
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
