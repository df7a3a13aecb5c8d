import Glibc
import Host
import Synchronization
import Transport

/// What a page that is fetched over a connection costs at least on this host, in nanoseconds, in the middle of many: sending 16 bytes and
/// getting 4 KiB back, and a fault that a page at hand ends. Nothing else goes on meanwhile.
struct PageFloor: Sendable {
    let roundTrip: Double
    let fault: Double

    var sum: Double { roundTrip + fault }

    /// - Parameter page: nanoseconds from the fault read to the page placed; the fault is in both.
    func ratio(ofPage page: Double) -> Double { (page + fault) / sum }

    private static let requestBytes = 16
    private static let pageBytes = 4096
    private static let warmUp = 200
    private static let rounds = 2000

    /// - Parameter tls: credentials of both ends; `nil`: bare sockets.
    static func measure(tls: (server: TLSSettings, client: TLSSettings)?) throws -> PageFloor {
        PageFloor(
            roundTrip: try tls.map { try roundTrip(through: $0) } ?? roundTrip(), fault: try faultCost())
    }

    /// The same while idle processors are kept awake, as both ends of a postcopy do. - Returns: `nil` where the host does not allow that.
    static func measureAwake(tls: (server: TLSSettings, client: TLSSettings)?) throws -> PageFloor? {
        guard let awake = try? AwakeProcessors() else { return nil }
        defer { extendLifetime(awake) }
        return try measure(tls: tls)
    }

    private static func middle(_ times: [UInt64]) -> Double {
        times.dropFirst(warmUp).map { Double($0) }.median ?? .nan
    }

    /// - Parameter exchange: asks for a page and waits for it.
    private static func times(_ exchange: () throws -> Void) rethrows -> [UInt64] {
        try (0..<warmUp + rounds).map { _ in
            let start = Clock.monotonicNanoseconds
            try exchange()
            return Clock.monotonicNanoseconds - start
        }
    }

    // MARK: Round trips

    private static func roundTrip() throws -> Double {
        let (asking, answering) = try LoopbackPair.connect()
        for end in [asking, answering] { Socket.tuneForMessages(end) }
        let answers = try Background {
            let page = [UInt8](repeating: 0x5A, count: pageBytes)
            while try receive(requestBytes, from: answering) { try answering.writeAll(page) }
        }
        let request = [UInt8](repeating: 0xA5, count: requestBytes)
        let times = try times {
            try asking.writeAll(request)
            guard try receive(pageBytes, from: asking) else { throw ChannelError.cancelled }
        }
        Socket.shutdown(asking)
        try answers.value()
        return middle(times)
    }

    /// - Returns: false: the other end is gone.
    private static func receive(_ count: Int, from socket: Descriptor) throws -> Bool {
        var left = count
        while left > 0 {
            let bytes = try socket.read(upTo: left)
            guard let bytes, !bytes.isEmpty else { return false }
            left -= bytes.count
        }
        return true
    }

    private static func roundTrip(through tls: (server: TLSSettings, client: TLSSettings)) throws -> Double {
        try ChannelStream.withPair(tls: tls) { asking, answering in
            let answers = try Background {
                let page = [UInt8](repeating: 0x5A, count: pageBytes)
                for _ in 0..<warmUp + rounds {
                    _ = try answering.receive(exactly: requestBytes)
                    try answering.send(page)
                }
            }
            let request = [UInt8](repeating: 0xA5, count: requestBytes)
            let times = try times {
                try asking.send(request)
                _ = try asking.receive(exactly: pageBytes)
            }
            try answers.value()
            return middle(times)
        }
    }

    // MARK: Faults

    /// From touching a missing page to reading it, where who hears of the fault has the page.
    private static func faultCost() throws -> Double {
        let memory = try Mapping(anonymousByteCount: (warmUp + rounds) * pageBytes)
        // No fault would follow the first of 512.
        try memory.advise(.noHugePages)
        let page = try Mapping(anonymousByteCount: pageBytes)
        page.store(UInt64(1), at: 0)
        let faults = try UserFault()
        try faults.register(memory, 0..<memory.byteCount, .missing)
        let stop = try EventDescriptor()
        let server = try Background {
            var batch = PageFaultBatch(capacity: 16)
            while try faults.waitForFaults(into: &batch, stop: stop) {
                for index in 0..<batch.count {
                    let start = Int(batch[index].address - memory.hostAddress(at: 0)) / pageBytes * pageBytes
                    try faults.copy(page, at: 0, into: memory, start..<start + pageBytes)
                }
            }
        }
        var next = 0
        let times = times {
            _ = memory.load(at: next * pageBytes, as: UInt64.self)
            next += 1
        }
        stop.raise()
        try server.value()
        return middle(times)
    }
}
