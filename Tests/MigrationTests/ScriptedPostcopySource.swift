import GuestMemory
import Host
import Machine
import MigrationStream
import Synchronization
import TestSupport
import Testing
import Transport

@testable import Migration

/// The source of a postcopy, word by word as a test wants it. It says what a QEMU would, and knows the machine whose guest it moves.
final class ScriptedPostcopySource: Sendable {
    let channel: Channel
    let machine: VirtualMachine
    let blocks: [RAMBlockDescription]
    private let address: MigrationAddress
    private let heard = Monitor(Heard())

    private struct Heard {
        var messages: [ReturnPathMessage] = []
        var requests: [PageRequest] = []
        /// Of those, how many were taken.
        var served = 0
        var hasEnded = false
    }

    static let ramID: UInt32 = 2

    /// - Parameter pageBytes: of the memory that it says it has.
    init(of machine: VirtualMachine, to address: MigrationAddress, pageBytes: UInt64 = 4096) throws {
        self.machine = machine
        self.address = address
        channel = try Connector().connect(to: address, deadline: .after(seconds: 10))
        blocks = machine.memory.blocks.map {
            RAMBlockDescription(name: $0.name, length: $0.byteCount, pageSize: pageBytes)
        }
        _ = try HostThread.detached(name: "script-return") { [self] in listen() }
    }

    /// A further connection.
    func connect() throws -> Channel { try Connector().connect(to: address, deadline: .after(seconds: 10)) }

    private func listen() {
        var decoder = ReturnPathDecoder(postcopyOf: blocks)
        var buffer = ReceiveBuffer()
        var bytes: [UInt8] = []
        while let count = try? channel.receive(appendingTo: &bytes, upTo: 65536), count > 0 {
            buffer.append(bytes)
            bytes = []
            while let message = try? decoder.next(from: &buffer) {
                heard.withLock { heard in
                    if case .postcopy(.requestPages(let request)) = message {
                        heard.requests.append(request)
                    } else {
                        heard.messages.append(message)
                    }
                }
            }
        }
        heard.withLock { $0.hasEnded = true }
    }

    var messages: [ReturnPathMessage] { heard.withLock { $0.messages } }
    var requests: [PageRequest] { heard.withLock { $0.requests } }

    func waitToHear(_ message: ReturnPathMessage) {
        let came = heard.wait(deadline: .after(seconds: 20)) { $0.messages.contains(message) ? true : nil }
        claim(came != nil, "the source did not hear \(message), but \(messages)")
    }

    func awaitEnd() {
        let came = heard.wait(deadline: .after(seconds: 20)) { $0.hasEnded ? true : nil }
        claim(came != nil, "the destination does not close the connection; it said \(messages)")
    }

    // MARK: What it says

    func say(_ write: (inout StreamWriter) -> Void) throws {
        var writer = StreamWriter()
        write(&writer)
        try channel.send(writer.bytes)
    }

    func command(_ command: PostcopyCommand) throws { try say { $0.command(.postcopy(command)) } }

    /// Up to the list of blocks.
    func open(advising advice: PostcopyAdvice? = nil) throws {
        let advice = advice ?? PostcopyAdvice(blockPageSizes: blocks.reduce(0) { $0 | $1.pageSize })
        try say { writer in
            writer.header()
            writer.configuration(machine: machine.configuration.streamName)
            writer.command(.openReturnPath)
            writer.command(.ping(1))
            writer.command(.postcopy(.advise(advice)))
            writer.ramSetup(id: Self.ramID, blocks: blocks, postcopyIsAdvised: true)
        }
    }

    /// A PART, or the END, with those pages of a block.
    func pages(_ runs: [Range<PageIndex>], of block: Int = 0, final: Bool = false) throws {
        var writer = StreamWriter()
        writer.ramRound(final: final, id: Self.ramID)
        let head = writer.take()
        writer.ramSectionEnd(id: Self.ramID)
        try records(of: runs, block, on: channel, between: head, and: writer.take())
    }

    /// Page records, as they stand on any channel.
    func records(
        of runs: [Range<PageIndex>], _ block: Int = 0, on channel: Channel, between head: [UInt8] = [],
        and foot: [UInt8] = []
    ) throws {
        var encoder = RAMRecordEncoder(blocks: blocks)
        let memory = machine.memory.blocks[block]
        var bytes = head
        for run in runs {
            for page in run {
                let offset = Int(page.offset.value)
                if memory.mapping.isZero(at: offset, count: 4096) {
                    encoder.zeroPage(block: block, offset: page.offset.value, into: &bytes)
                } else {
                    encoder.page(block: block, offset: page.offset.value, into: &bytes)
                    bytes += memory.mapping.read(at: offset, count: 4096)
                }
                guard bytes.count > 1 << 20 else { continue }
                try channel.send(bytes)
                bytes.removeAll(keepingCapacity: true)
            }
        }
        try channel.send(bytes + foot)
    }

    func discard(_ runs: [Range<PageIndex>], of block: Int = 0) throws {
        for start in stride(from: 0, to: runs.count, by: 12) {
            let ranges = runs[start..<min(start + 12, runs.count)].map {
                RAMDiscard.ByteRange(
                    offset: $0.lowerBound.offset.value, length: $0.upperBound.offset.value - $0.lowerBound.offset.value)
            }
            try command(.discard(RAMDiscard(block: blocks[block].name, ranges: ranges)))
        }
    }

    /// LISTEN, the devices of the machine, RUN.
    func package(runState: String = "running") throws -> [UInt8] {
        let catalogue = machine.sectionCatalogue
        var writer = StreamWriter()
        writer.command(.postcopy(.listen))
        var sections = try machine.saveState().map {
            DeviceSection(name: $0.name, instance: $0.instance, version: $0.version, body: $0.body)
        }
        sections.append(GlobalState(runState: runState).section)
        for (index, section) in sections.enumerated() {
            let layout = catalogue.layout(of: section.name) ?? .fixed(byteCount: section.body.count)
            writer.deviceSection(section, id: UInt32(10 + index), layout: layout)
        }
        writer.command(.ping(3))
        writer.command(.postcopy(.run))
        return writer.bytes
    }

    func send(package: [UInt8], announcing count: Int? = nil) throws {
        try command(.packaged(byteCount: UInt32(count ?? package.count)))
        try channel.send(package)
        try say { $0.command(.ping(4)) }
    }

    func end() throws { try say { $0.endOfStream() } }

    // MARK: Serving

    /// Sends pages that are asked for, on that channel, until there was nothing to do for a while.
    func serve(on urgent: Channel? = nil, quietMilliseconds: UInt64 = 300, until isDone: () -> Bool = { false }) throws
    {
        while !isDone() {
            let next = heard.wait(deadline: .after(milliseconds: quietMilliseconds)) { heard -> [PageRequest]? in
                guard heard.served < heard.requests.count else { return nil }
                defer { heard.served = heard.requests.count }
                return Array(heard.requests[heard.served...])
            }
            guard let next else { return }
            let runs = next.map { RAMOffset($0.offset).page..<RAMOffset($0.offset + UInt64($0.length)).page }
            if let urgent { try records(of: runs, on: urgent) } else { try pages(runs) }
        }
    }

    /// Serves what so many threads ask for that compare all of the destination's memory, until they are through.
    func serve(readers count: Int, of destination: Migrator, against source: Migrator) throws {
        let readers = try (0..<count).map { number in
            try HostThread(name: "read\(number)") { destination.claimMemory(of: source, "reader \(number)") }
        }
        let isOver = Atomic(false)
        let server = try HostThread(name: "serve") { [self] in
            while !isOver.load(ordering: .acquiring) { try? serve(quietMilliseconds: 50) }
        }
        for reader in readers { reader.join() }
        isOver.store(true, ordering: .releasing)
        server.join()
    }
}
