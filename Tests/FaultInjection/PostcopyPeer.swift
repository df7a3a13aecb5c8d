import Host
import TestSupport

@testable import MigrationStream

/// The other end of a real source's postcopy: reads its stream, answers PING, keeps every byte, and does what a test wants in between.
final class PostcopyPeer {
    /// How far the stream has been read.
    enum Moment: Int, CaseIterable, Comparable, CustomStringConvertible {
        case connected, rounds, discards, package, arrived, pulled, whole

        var description: String {
            switch self {
            case .connected: "before the first answer"
            case .rounds: "in a round"
            case .discards: "at the first DISCARD"
            case .package: "before the package was read"
            case .arrived: "behind the package, before that was said"
            case .pulled: "while pages follow"
            case .whole: "at the end of the stream"
            }
        }

        static func < (left: Moment, right: Moment) -> Bool { left.rawValue < right.rawValue }
    }

    /// All of a stream, in the parts between the moments, and what came over the channel for requested pages.
    struct Recording {
        /// Opening, rounds, DISCARDs, package, pages behind it.
        var parts: [[UInt8]] = []
        var urgent: [UInt8] = []
        /// How what the destination says behind the package begins: PONG 3, or a Godwit's READY.
        var answer: [UInt8] = []
        /// What a Godwit says first on each of its channels for requested pages.
        var greetings: [[UInt8]] = []
        /// Bytes of the last part up to the end of COMMIT, of a Godwit.
        var commitEnd = 0
        static let packagePart = 3
    }

    let main: Descriptor
    private let listener: Descriptor
    /// Channels for requested pages: a QEMU has one.
    private(set) var urgents: [Descriptor] = []
    var urgent: Descriptor? { urgents.first }
    private let channels: Int
    private var commitEnd = 0
    private let blocks: [RAMBlockDescription]
    private var decoder: StreamDecoder
    private var buffer = ReceiveBuffer()
    private var all: [UInt8] = []
    /// Where the moments after the first are in it.
    private var borders: [Int] = []
    private(set) var reached = Moment.connected
    /// The last byte of RUN, or of a Godwit's COMMIT, was read: a real destination might run the guest.
    private(set) var mayHaveGuest = false
    private let deadline: Deadline

    /// - Parameter migrate: has the source connect to the address given.
    /// - Parameter isGodwit: it says HELLO, and the guest goes by COMMIT; else it is a QEMU to the source.
    /// - Parameter channels: for requested pages, where the source has such.
    init(
        byteCount: UInt64, preempts: Bool, isGodwit: Bool, channels: Int = 1, migrate: (String) throws -> Void
    ) throws {
        deadline = .after(seconds: 20)
        listener = try Socket.listen(host: "127.0.0.1", port: "0")
        try migrate("tcp:127.0.0.1:\(Socket.localPort(of: listener) ?? 0)")
        guard let socket = try Socket.accept(listener, deadline: deadline) else { throw TestObstacle("no source came") }
        main = socket
        blocks = [RAMBlockDescription(name: "ram", length: byteCount)]
        decoder = StreamDecoder(.load(blocks: blocks, catalogue: SectionCatalogue()))
        decoder.allowsPostcopy = true
        // One that has two connections says nothing on the second before it is asked for pages.
        self.preempts = preempts
        self.channels = channels
        self.isGodwit = isGodwit
    }

    private let preempts: Bool
    let isGodwit: Bool

    // MARK: Reading

    /// Reads until that moment; the operator's word to move comes with the first page.
    func read(to moment: Moment, atFirstPage start: () throws -> Void) throws {
        while reached < moment {
            if reached == .package, decoder.payloadBytes > 0 {
                try readPackage()
                continue
            }
            if reached == .arrived {
                try takeGuest()
                continue
            }
            guard let item = try next() else { throw TestObstacle("the source closed \(reached)") }
            switch item {
            case .command(.prepare):
                borders.append(Int(decoder.position))
                reached = .arrived
            case .page, .zeroPage, .pageBatch:
                guard reached == .connected else { continue }
                advance(to: .rounds)
                while preempts, urgents.count < channels, let next = try Socket.accept(listener, deadline: deadline) {
                    urgents.append(next)
                }
                try start()
            case .command(.postcopy(.discard)) where reached < .discards: advance(to: .discards)
            case .command(.postcopy(.packaged)): advance(to: .package)
            case .endOfStream: advance(to: .whole)
            default: break
            }
        }
    }

    /// The item just read belongs to what follows the moment.
    private func advance(to moment: Moment) {
        borders.append(moment == .whole ? all.count : start)
        reached = moment
    }

    /// Where the item that was read last begins.
    private var start = 0

    private func next() throws -> StreamItem? {
        while true {
            start = Int(decoder.position)
            if let item = try decoder.next(from: &buffer) {
                switch item {
                case .page, .pageBatch: guard try consume(decoder.payloadBytes) else { return nil }
                case .command(.ping(let value)):
                    if isGodwit, value == Wire.godwitPing {
                        let features = FeatureSet.all.union(.postcopy)
                        let instance = MigrationIdentifier(high: 1, low: 2)
                        try say(.hello(version: 1, features: features, instance: instance))
                    }
                    try say(.pong(value))
                default: break
                }
                return item
            }
            guard try fill() else { return nil }
        }
    }

    private func readPackage() throws {
        guard try consume(decoder.payloadBytes) else { throw TestObstacle("the source closed in its package") }
        // Its PREPARE belongs to it.
        guard !isGodwit else { return }
        mayHaveGuest = true
        borders.append(Int(decoder.position))
        reached = .arrived
    }

    /// Says what a destination that runs the guest says.
    private func takeGuest() throws {
        guard isGodwit else {
            try say(.pong(3))
            return reached = .pulled
        }
        try say(.ready(nanoseconds: 1000))
        while let item = try next() {
            guard case .command(.commitWithin) = item else { continue }
            mayHaveGuest = true
            // How late it may be is said last; whoever says it again is slower.
            let end = Int(decoder.position)
            commitEnd = end - borders[borders.count - 1]
            all.replaceSubrange(end - 8..<end, with: [0, 0, 0, 60, 0, 0, 0, 0])
            try say(.started(nanoseconds: 1000))
            return reached = .pulled
        }
        throw TestObstacle("the source closed without COMMIT")
    }

    private func consume(_ count: Int) throws -> Bool {
        while buffer.count < count { guard try fill() else { return false } }
        buffer.consume(count)
        decoder.payloadConsumed(count)
        return true
    }

    private func fill() throws -> Bool {
        try main.wait(for: .readable, deadline: deadline, operation: "receive")
        let bytes = try main.read(upTo: 1 << 16) ?? []
        buffer.append(bytes)
        all += bytes
        return !bytes.isEmpty
    }

    /// Reads and throws away what still comes, until the source closes. - Returns: whether it did in time.
    func drain(seconds: UInt64) -> Bool {
        let end = Deadline.after(seconds: seconds)
        for socket in [main] + urgents {
            while true {
                guard (try? socket.wait(for: .readable, deadline: end, operation: "receive")) != nil else {
                    return false
                }
                guard let bytes = try? socket.read(upTo: 1 << 16), !bytes.isEmpty else { break }
            }
        }
        return true
    }

    /// What was read, when the stream has come to its end.
    func recording() throws -> Recording {
        var recording = Recording()
        for (from, to) in zip([0] + borders, borders) { recording.parts.append(Array(all[from..<to])) }
        recording.answer = isGodwit ? [0x47, 0x02, 0, 8] : [0, 2, 0, 4, 0, 0, 0, 3]
        recording.commitEnd = commitEnd
        if isGodwit {
            for urgent in urgents {
                var greeting: [UInt8] = []
                while greeting.count < MultifdGreeting.byteCount { _ = try read(urgent, &greeting) }
                recording.greetings.append(Array(greeting.prefix(MultifdGreeting.byteCount)))
            }
        } else if let urgent {
            var decoder = StreamDecoder.requestedPages(of: blocks)
            var buffer = ReceiveBuffer()
            while true {
                let item = try decoder.next(from: &buffer)
                if item == .ramRecordsEnded { break }
                if case .page? = item {
                    while buffer.count < 4096 { buffer.append(try read(urgent, &recording.urgent)) }
                    buffer.consume(4096)
                    decoder.payloadConsumed(4096)
                } else if item == nil {
                    buffer.append(try read(urgent, &recording.urgent))
                }
            }
        }
        return recording
    }

    private func read(_ socket: Descriptor, _ all: inout [UInt8]) throws -> [UInt8] {
        try socket.wait(for: .readable, deadline: deadline, operation: "receive")
        let bytes = try socket.read(upTo: 1 << 16) ?? []
        guard !bytes.isEmpty else { throw TestObstacle("the channel for requested pages has no last word") }
        all += bytes
        return bytes
    }

    // MARK: Speaking

    func say(_ message: ReturnPathMessage) throws {
        var writer = StreamWriter()
        writer.message(message)
        try say(writer.bytes)
    }

    /// - Throws: also when the source takes nothing any more.
    func say(_ bytes: [UInt8]) throws { try main.writeAll(bytes, deadline: .after(seconds: 10)) }
}

extension VM {
    /// Of all its threads.
    var threadNames: [String] {
        let tasks = "/proc/\(process.identifier)/task"
        return ((try? FileSystem.names(inFolder: tasks)) ?? []).map {
            let bytes = (try? Descriptor.contents(of: "\(tasks)/\($0)/comm", limit: 64)) ?? []
            return String(decoding: bytes.prefix { $0 != 10 }, as: UTF8.self)
        }
    }

    /// The most memory that it ever had, in bytes.
    var peakMemory: UInt64 {
        let path = "/proc/\(process.identifier)/status"
        let text = String(decoding: (try? Descriptor.contents(of: path)) ?? [], as: UTF8.self)
        let line = text.split(separator: "\n").first { $0.hasPrefix("VmHWM:") }
        return (line?.split(separator: " ").dropFirst().first).flatMap { UInt64($0) }.map { $0 << 10 } ?? 0
    }
}
