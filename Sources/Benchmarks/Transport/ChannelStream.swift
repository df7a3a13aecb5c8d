import Glibc
import Host
import Synchronization
import Transport

/// Memory like a guest's, in huge pages, and the vectors in which it is sent and received: 256 pages each, none joined with the next.
struct GuestPages: Sendable {
    static let vectorPages = 256
    static let pageBytes = 4096
    static let vectorBytes = vectorPages * pageBytes
    private let vectorCount: Int
    let source: Mapping
    let target: Mapping

    /// - Parameter mebibytes: how much memory the vectors go over, again and again; as many as there are vectors.
    init(mebibytes: Int) throws {
        vectorCount = mebibytes
        let byteCount = mebibytes << 20
        source = try Mapping(anonymousByteCount: byteCount)
        target = try Mapping(anonymousByteCount: byteCount)
        for mapping in [source, target] { try? mapping.advise(.hugePages) }
        var word: UInt64 = 1
        for offset in stride(from: 0, to: byteCount, by: 8) {
            word = word &* 6_364_136_223_846_793_005 &+ 1
            source.store(word, at: offset)
        }
        try target.advise(.populate)
    }

    /// Makes it the n-th vector of a mapping.
    func fill(_ vector: inout IOVector, _ number: Int, of mapping: Mapping) {
        vector.removeAll()
        for page in pages(number) { vector.append(mapping, offset: page * Self.pageBytes, count: Self.pageBytes) }
    }

    /// The pages of the n-th vector. Neighbours change places.
    func pages(_ number: Int) -> some Sequence<Int> {
        let first = number % vectorCount * Self.vectorPages
        return (0..<Self.vectorPages).lazy.map { first + ($0 ^ 1) }
    }
}

/// One channel to another over loopback, by two threads.
enum ChannelStream {
    /// Credentials of both ends with one key.
    static func keys(in folder: String) throws -> (server: TLSSettings, client: TLSSettings) {
        let key = (0..<32).map { _ in String(UInt8.random(in: 16...255), radix: 16) }.joined()
        try Descriptor.create("\(folder)/keys.psk").writeAll(Array("qemu:\(key)\n".utf8))
        return (
            TLSSettings(try TLSCredentials("bench", pskFolder: folder, endpoint: .server)),
            TLSSettings(try TLSCredentials("bench", pskFolder: folder, endpoint: .client))
        )
    }

    static func measure(
        _ pages: GuestPages, byteCount: Int, tls: (server: TLSSettings, client: TLSSettings)?
    ) throws -> StreamRate {
        let vectors = byteCount / GuestPages.vectorBytes
        let rate = try withPair(tls: tls) { out, into in
            try StreamRate.measuring(vectors * GuestPages.vectorBytes) {
                let sender = try Background {
                    var vector = IOVector()
                    for number in 0..<vectors {
                        pages.fill(&vector, number, of: pages.source)
                        try out.send(&vector)
                    }
                }
                var vector = IOVector()
                for number in 0..<vectors {
                    pages.fill(&vector, number, of: pages.target)
                    try into.receive(&vector)
                }
                try sender.value()
            }
        }
        try check(pages)
        return rate
    }

    /// Two ends of a connection over loopback, which last as long as `body`.
    static func withPair<Result>(
        tls: (server: TLSSettings, client: TLSSettings)? = nil,
        _ body: (_ out: Channel, _ into: Channel) throws -> Result
    ) throws -> Result {
        let listener = try Listener(on: .tcp(host: "127.0.0.1", port: "0"), tls: tls?.server)
        guard case .inet(let host, let port) = listener.addresses.first else { throw ChannelError.cancelled }
        let receiver = try Background {
            let channel = try listener.accept(deadline: .after(seconds: 10))
            try channel.handshake()
            return channel
        }
        let out = try Connector(tls: tls?.client).connect(
            to: .tcp(host: host, port: port), deadline: .after(seconds: 10))
        let into = try receiver.value()
        defer {
            out.cancel()
            into.cancel()
        }
        return try body(out, into)
    }

    /// What arrived is what was sent.
    private static func check(_ pages: GuestPages) throws {
        let isEqual = unsafe pages.source.withBytes(at: 0, count: pages.source.byteCount) { left in
            unsafe pages.target.withBytes(at: 0, count: left.count) { right in
                // SAFETY: both mappings have that many bytes.
                unsafe memcmp(left.baseAddress!, right.baseAddress!, left.count) == 0
            }
        }
        guard isEqual else { throw WrongBytes() }
    }

    struct WrongBytes: Error, CustomStringConvertible {
        var description: String { "transport: what was received is not what was sent" }
    }
}

/// Something that runs on a thread of its own, and its result.
final class Background<Value: Sendable>: Sendable {
    private let result = Mutex<Result<Value, any Error>?>(nil)
    private let thread = Mutex<HostThread?>(nil)

    init(_ body: @escaping @Sendable () throws -> Value) throws {
        let thread = try HostThread(name: "bench-stream") { [self] in
            let outcome = Result { try body() }
            result.withLock { $0 = outcome }
        }
        self.thread.withLock { $0 = thread }
    }

    /// Waits for the end.
    func value() throws -> Value {
        thread.withLock { $0 }?.join()
        guard let outcome = result.withLock({ $0 }) else { throw ChannelError.cancelled }
        return try outcome.get()
    }
}
