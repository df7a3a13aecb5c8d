import Glibc

// How much may wait in a socket: what is there is in front of all that comes behind it.

extension Socket {
    /// A send waits while more than that has not left this host yet (tcp(7), TCP_NOTSENT_LOWAT); of a unix socket, while the peer has not
    /// taken it (socket(7), SO_SNDBUF). Only advice: a socket that cannot do it stays as it was.
    public static func limitUnsent(_ socket: Descriptor, bytes: Int) {
        guard let address = try? localAddress(of: socket) else { return }
        let value = CInt(clamping: bytes)
        if address.isUnix {
            try? setOption(socket, SOL_SOCKET, SO_SNDBUF, value)
        } else {
            try? setOption(socket, CInt(IPPROTO_TCP), notSentLowWater, value)
        }
    }

    /// Of what was sent to this socket no more than about that much waits here to be received (socket(7), SO_RCVBUF), from now on.
    public static func limitUnreceived(_ socket: Descriptor, bytes: Int) {
        try? setOption(socket, SOL_SOCKET, SO_RCVBUF, CInt(clamping: bytes))
    }

    /// What a byte takes to the peer and back, as the kernel sees it (tcp(7), TCP_INFO); `nil` of other sockets.
    public static func roundTripNanoseconds(of socket: Descriptor) -> UInt64? {
        var info = [UInt32](repeating: 0, count: 64)
        var size = socklen_t(info.count * 4)
        let status = unsafe getsockopt(socket.number, CInt(IPPROTO_TCP), TCP_INFO, &info, &size)
        // tcpi_rtt, in microseconds: 68 bytes are in front of it (linux/tcp.h).
        guard status == 0, Int(size) >= 4 * (roundTripWord + 1) else { return nil }
        return UInt64(info[roundTripWord]) * 1000
    }

    /// Of linux/tcp.h; glibc's netinet/tcp.h shows it to GNU programs only.
    private static let notSentLowWater: CInt = 25
    private static let roundTripWord = 17
}
