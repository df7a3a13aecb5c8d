import Glibc
import Host
import Synchronization
import Testing

@testable import Transport

/// Something that runs on its own thread and has a result.
final class Background<Value: Sendable>: Sendable {
    private let result = Mutex<Result<Value, any Error>?>(nil)
    private let thread = Mutex<HostThread?>(nil)

    init(_ body: @escaping @Sendable () throws -> Value) throws {
        let thread = try HostThread(name: "test") { [self] in
            let outcome = Result { try body() }
            result.withLock { $0 = outcome }
        }
        self.thread.withLock { $0 = thread }
    }

    var isDone: Bool { result.withLock { $0 != nil } }

    func value() throws -> Value {
        thread.withLock { $0 }?.join()
        return try #require(result.withLock { $0 }).get()
    }
}

/// A directory that goes away at the end of the test, with what is in it.
final class Directory: Sendable {
    let path: String

    init() throws {
        var template = Array("/tmp/godwit-transport-XXXXXX".utf8CString)
        let made = unsafe mkdtemp(&template)
        try #require(unsafe made != nil)
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    func file(_ name: String) -> String { "\(path)/\(name)" }

    deinit { _ = try? ChildProcess(["rm", "-rf", path]).wait() }
}

/// Two channels over a socket pair. Small buffers make every larger transfer a partial one.
func channelPair(
    bufferBytes: CInt? = nil, limits: StallLimits = StallLimits()
) throws -> (Channel, Channel) {
    let (a, b) = try Socket.pair()
    if let bufferBytes { setBuffers(of: [a, b], bufferBytes) }
    return (
        try Channel(socket: a, peer: "peer a", limits: limits), try Channel(socket: b, peer: "peer b", limits: limits)
    )
}

/// Two channels over TCP on this machine.
func tcpPair(bufferBytes: CInt? = nil, limits: StallLimits = StallLimits()) throws -> (Channel, Channel) {
    let listener = try Listener(on: .tcp(host: "127.0.0.1", port: "0"), limits: limits)
    guard case .inet(let host, let port) = listener.addresses.first else { throw ChannelError.cancelled }
    let a = try Connector(limits: limits).connect(to: .tcp(host: host, port: port), deadline: .after(seconds: 5))
    let b = try listener.accept(deadline: .after(seconds: 5))
    // Buffers below the size of a segment make TCP crawl by its timers.
    if let bufferBytes { setBuffers(of: [a.input, b.input].compactMap(\.self), max(bufferBytes, 1 << 16)) }
    return (a, b)
}

func setBuffers(of sockets: [Descriptor], _ byteCount: CInt) {
    var size = byteCount
    for socket in sockets {
        for option in [SO_SNDBUF, SO_RCVBUF] {
            unsafe setsockopt(socket.number, SOL_SOCKET, option, &size, socklen_t(MemoryLayout<CInt>.size))
        }
    }
}

/// Two channels over a pipe: one sends, the other receives.
func pipePair(limits: StallLimits = StallLimits()) throws -> (Channel, Channel) {
    let (read, write) = try Descriptor.pipe()
    return (
        try Channel.descriptor(write, .outgoing, limits: limits),
        try Channel.descriptor(read, .incoming, limits: limits)
    )
}

/// Pages with different contents, in an order that never joins two.
func scatteredPages(_ mapping: Mapping) -> IOVector {
    var vector = IOVector()
    for page in stride(from: mapping.byteCount / 4096 - 1, through: 0, by: -1) {
        vector.append(mapping, offset: page * 4096, count: 4096)
    }
    return vector
}

/// Checks that an operation, once blocked, throws `cancelled` within 100 ms of `cancel`. The machine may be busy: one of five
/// attempts has to be that quick, and each has to end with the right error.
func expectQuickCancel(_ attempt: () throws -> (blocked: Background<Void>, cancel: () -> Void)) throws {
    var quickest = UInt64.max
    for _ in 0..<5 where quickest > 100_000_000 {
        let (blocked, cancel) = try attempt()
        Clock.sleep(nanoseconds: 50_000_000)
        #expect(!blocked.isDone, "the operation blocks before it is cancelled")
        let start = Clock.monotonicNanoseconds
        cancel()
        #expect(throws: ChannelError.cancelled) { try blocked.value() }
        quickest = min(quickest, Clock.monotonicNanoseconds - start)
    }
    #expect(quickest <= 100_000_000)
}
