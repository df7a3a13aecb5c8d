import Host
import Synchronization

/// One client of the server: a reader, a worker for in-band commands and a writer, all blocking threads.
final class ClientConnection: Sendable {
    struct Limits: Sendable {
        var messageBytes = 4 << 20
        var outputBytes = 16 << 20
        var stallNanoseconds: UInt64 = 5_000_000_000
        /// In-band requests waiting; then the reader stops reading until there is room.
        var pendingRequests = 64
        /// Passed descriptors that no command took; further ones are closed.
        var pendingDescriptors = 16
    }

    private struct Work {
        var steps: [QMPSession.Step] = []
        var isRunning = false
        var isFinished = false
    }

    private let number: Int
    private let socket: Descriptor
    private let table: CommandTable
    private let limits: Limits
    private let output: OutputQueue
    private let work = Monitor(Work())
    private let passed = Mutex<[Descriptor]>([])
    private let threads = Monitor<(started: [HostThread], running: Int)>(([], ClientConnection.threadCount))
    private static let threadCount = 3

    /// Debug builds need about 4 KiB of stack per level of JSON, and `MessageFramer.deepestNesting` bounds the levels.
    private static let stackBytes = 4 << 20

    init(number: Int, socket: Descriptor, table: CommandTable, limits: Limits) throws(SystemError) {
        self.number = number
        self.socket = socket
        self.table = table
        self.limits = limits
        try socket.setNonBlocking(true)
        output = OutputQueue(
            socket: socket, limitBytes: limits.outputBytes, stallLimitNanoseconds: limits.stallNanoseconds)
    }

    /// Greets the client and starts its threads.
    func start() throws(SystemError) {
        output.append(QMPSession.greeting(version: table.version))
        do throws(SystemError) {
            try startThread("qmp-\(number)-out") { $0.write() }
            try startThread("qmp-\(number)-run") { $0.runInBand() }
            try startThread("qmp-\(number)") { $0.read() }
        } catch {
            work.withLock { $0.isFinished = true }
            output.cutOff()
            threads.withLock { $0.running -= Self.threadCount - $0.started.count }
            throw error
        }
    }

    private func startThread(
        _ name: String, _ body: @escaping @Sendable (ClientConnection) -> Void
    ) throws(SystemError) {
        let thread = try HostThread(name: name, stackBytes: Self.stackBytes) { [self] in
            body(self)
            threads.withLock { $0.running -= 1 }
        }
        threads.withLock { $0.started.append(thread) }
    }

    // MARK: The three threads

    private func read() {
        var framer = MessageFramer(limitBytes: limits.messageBytes)
        var session = QMPSession()
        reading: while let bytes = receive(), !bytes.isEmpty {
            for frame in framer.receive(bytes) {
                let step = session.receive(frame)
                switch step {
                case .runOutOfBand(let request): answer(request)
                case .reply, .negotiated, .run: enqueue(step)
                case .close:
                    enqueue(step)
                    break reading
                }
            }
        }
        work.withLock { $0.isFinished = true }
    }

    /// The next bytes; none or `nil` at the end. Descriptors that came along are kept for `takeDescriptor`.
    private func receive() -> [UInt8]? {
        while true {
            do throws(SystemError) {
                try socket.wait(for: .readable, deadline: .never, operation: "receive")
                guard let (bytes, descriptor) = try Socket.receive(socket, upTo: 1 << 16) else { continue }
                if let descriptor {
                    passed.withLock { if $0.count < limits.pendingDescriptors { $0.append(descriptor) } }
                }
                return bytes
            } catch {
                return nil
            }
        }
    }

    private func enqueue(_ step: QMPSession.Step) {
        work.wait { $0.steps.count < self.limits.pendingRequests ? true : nil }
        work.withLock { $0.steps.append(step) }
    }

    private func runInBand() {
        while let step = nextStep() {
            switch step {
            case .reply(let reply), .close(let reply): output.append(reply)
            case .negotiated(let reply): output.append(reply, startsEvents: true)
            case .run(let request), .runOutOfBand(let request): answer(request)
            }
        }
        output.finish()
    }

    private func nextStep() -> QMPSession.Step? {
        // Changes take the lock that wakes others: `drain` waits for the end of the work, the reader for room.
        work.withLock { $0.isRunning = false }
        work.wait { !$0.steps.isEmpty || $0.isFinished ? true : nil }
        return work.withLock { work in
            work.isRunning = !work.steps.isEmpty
            return work.steps.isEmpty ? nil : work.steps.removeFirst()
        }
    }

    private func write() {
        output.run()
        Socket.shutdown(socket)
    }

    private func answer(_ request: QMPRequest) {
        let result = table.run(request) { [self] in
            passed.withLock { $0.isEmpty ? nil : $0.removeFirst() }
        }
        output.append(QMPSession.reply(result, id: request.id))
        if case .success = result { table[request.command]?.afterReply?() }
    }

    // MARK: For the server

    func post(eventLine: [UInt8]) { output.appendEvent(line: eventLine) }

    var isOver: Bool { threads.withLock { $0.running == 0 } }

    /// Waits until every request so far is answered and the answers are sent.
    func drain(deadline: Deadline) {
        work.wait(deadline: deadline) { $0.steps.isEmpty && !$0.isRunning ? true : nil }
        output.waitUntilSent(deadline: deadline)
    }

    /// Cuts the client off and waits for its threads. - Returns: whether they all ended in time.
    @discardableResult
    func end(deadline: Deadline) -> Bool {
        output.cutOff()
        guard threads.wait(deadline: deadline, until: { $0.running == 0 ? true : nil }) != nil else { return false }
        threads.withLock { $0.started }.forEach { $0.join() }
        return true
    }
}
