import Host
import Synchronization
import TestSupport
import Transport

/// A proxy for the connections of one migration, numbered as they come (0 is the main one), which strikes one of them.
final class ChannelProxy: Sendable {
    enum Fault: Sendable {
        /// Both ends are closed after so many bytes from the source.
        case cut(after: Int)
        /// The bits of the byte there, counted from the source's first, are turned over.
        case spoil(at: Int)
        /// It is accepted and leads nowhere.
        case swallow
    }

    private let listener: Descriptor
    private let target: String
    private let struck: Int
    private let fault: Fault
    private let kept = Mutex<[Descriptor]>([])

    init(to address: MigrationAddress, striking index: Int, _ fault: Fault) throws {
        guard case .tcp(_, let port) = address else { Child.fail("the proxy leads to a TCP port") }
        listener = try Socket.listen(host: "127.0.0.1", port: "0")
        target = port
        struck = index
        self.fault = fault
        try HostThread.detached(name: "proxy") { [self] in
            for index in 0... {
                guard let socket = try? Socket.accept(listener) else { return }
                try? pass(socket, index)
            }
        }
    }

    var address: MigrationAddress { .tcp(host: "127.0.0.1", port: "\(Socket.localPort(of: listener) ?? 0)") }

    /// Ends all connections that are there.
    func cutAll() { kept.withLock { for socket in $0 { Socket.shutdown(socket) } } }

    private func pass(_ source: Descriptor, _ index: Int) throws {
        kept.withLock { $0.append(source) }
        var limit = Int.max
        var spoiled = -1
        if index == struck {
            switch fault {
            case .cut(let count): limit = count
            case .spoil(let place): spoiled = place
            case .swallow: return
            }
        }
        let destination = try Socket.connect(host: "127.0.0.1", port: target, deadline: .after(seconds: 5))
        let (most, place) = (limit, spoiled)
        try HostThread.detached(name: "proxy-forward") {
            var left = most
            var position = 0
            while left > 0, var bytes = try? source.read(upTo: min(left, 65536)), !bytes.isEmpty {
                if bytes.indices.contains(place - position) { bytes[place - position] ^= 0xff }
                guard (try? destination.writeAll(bytes)) != nil else { break }
                left -= bytes.count
                position += bytes.count
            }
            if left == 0 { Socket.shutdown(source) }
            Socket.shutdown(destination)
        }
        try HostThread.detached(name: "proxy-backward") {
            while let bytes = try? destination.read(upTo: 65536), !bytes.isEmpty,
                (try? source.writeAll(bytes)) != nil
            {}
            Socket.shutdown(source)
        }
    }
}
