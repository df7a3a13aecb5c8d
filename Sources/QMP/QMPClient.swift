import Glibc
public import Host
import Synchronization

/// Why a client's call failed.
public enum QMPClientError: Error, Equatable, Sendable, CustomStringConvertible {
    /// The VM refused the command.
    case refused(QMPError)
    /// The VM cannot be reached, closed the connection, or spoke no QMP.
    case disconnected(String)
    /// No answer in time. The command may still take effect.
    case timedOut(String)

    public var description: String {
        switch self {
        case .refused(let error): error.description
        case .disconnected(let sentence), .timedOut(let sentence): sentence
        }
    }
}

/// The other end of a VM's monitor: blocking calls, from any number of threads.
///
/// A reader thread gives replies to those who wait for them, by `id`, and keeps events in order for `waitForEvent`.
public final class QMPClient: Sendable {
    private struct State {
        var replies: [Int64: JSON] = [:]
        /// Requests somebody waits for; a reply to another came too late and is dropped.
        var awaited: Set<Int64> = []
        var nextID: Int64 = 1
        var events: [QMPEvent] = []
        var greeting: JSON?
        /// Why nothing more will come.
        var end: String?
    }

    /// The path of the socket.
    public let path: String
    private let socket: Descriptor
    private let onEvent: (@Sendable (QMPEvent) -> Void)?
    private let state = Monitor(State())
    private let sending = Mutex(())
    private let reader = Mutex<HostThread?>(nil)

    /// Events nobody asks for are kept up to this many, then the oldest go.
    static let mostEvents = 4096
    /// A reply or event longer than this ends the connection.
    private static let messageBytes = 64 << 20

    /// Connects and negotiates.
    /// - Parameters:
    ///   - outOfBand: asks for `exec-oob`.
    ///   - onEvent: called for each event on the reader thread, which it must not block.
    public init(
        path: String, deadline: Deadline = .after(seconds: 10), outOfBand: Bool = true,
        onEvent: (@Sendable (QMPEvent) -> Void)? = nil
    ) throws(QMPClientError) {
        self.path = path
        self.onEvent = onEvent
        do throws(SystemError) {
            // A VM that closes is an error of write(2), never a signal.
            Descriptor.ignoreBrokenPipes()
            // Nobody raises `wake`: the deadline alone ends a connect to a VM which accepts no more.
            let wake = try EventDescriptor()
            let address = try SocketAddress.unix(path: path)
            guard
                let connection = try Socket.connect(
                    to: address, name: "unix:\(path)", wake: wake, deadline: deadline)
            else { throw SystemError("connect to", "unix:\(path)", code: ECANCELED) }
            socket = connection
            try socket.setNonBlocking(true)
            let link = Link(socket: socket, state: state, onEvent: onEvent)
            let thread = try HostThread(name: "qmp-client", stackBytes: 4 << 20) { link.read() }
            reader.withLock { $0 = thread }
        } catch {
            throw .disconnected("\(error)")
        }
        do throws(QMPClientError) {
            try negotiate(outOfBand: outOfBand, deadline: deadline)
        } catch {
            close()
            throw error
        }
    }

    deinit { close() }

    /// Ends the connection; calls that wait fail.
    public func close() {
        Socket.shutdown(socket)
        // Called from an event's callback this is the reader thread: joining itself is refused, and it ends by itself.
        let thread = reader.withLock { thread in
            defer { thread = nil }
            return thread
        }
        thread?.join()
    }

    /// What the VM called itself: `{"version": ..., "capabilities": ...}`.
    public var greeting: JSON { state.withLock { $0.greeting ?? [:] } }

    private func negotiate(outOfBand: Bool, deadline: Deadline) throws(QMPClientError) {
        let greeting = try wait("the greeting", deadline) { $0.greeting }
        let offered = greeting["capabilities"]?.arrayValue?.contains("oob") ?? false
        let wanted: JSON = outOfBand && offered ? ["enable": ["oob"]] : [:]
        try execute("qmp_capabilities", wanted, deadline: deadline)
    }

    // MARK: Commands

    /// Runs a command and waits for its result.
    /// - Parameters:
    ///   - outOfBand: runs it beside the in-band commands of this client (`exec-oob`).
    ///   - descriptor: passed along with the command, for `getfd`.
    @discardableResult
    public func execute(
        _ command: String, _ arguments: JSON = [:], outOfBand: Bool = false, passing descriptor: Descriptor? = nil,
        deadline: Deadline = .after(seconds: 30)
    ) throws(QMPClientError) -> JSON {
        let id = state.withLock { state in
            defer { state.nextID += 1 }
            state.awaited.insert(state.nextID)
            return state.nextID
        }
        defer {
            state.withLock {
                $0.awaited.remove(id)
                $0.replies[id] = nil
            }
        }
        var message: [String: JSON] = [outOfBand ? "exec-oob" : "execute": .string(command), "id": .integer(id)]
        if arguments != [:] { message["arguments"] = arguments }
        try send(JSON.object(message).encoded() + [0x0A], command, descriptor, deadline)
        let reply = try wait("the reply to \(command)", deadline) { $0.replies[id] }
        if let error = reply["error"] {
            throw .refused(QMPError(error) ?? QMPError("\(command) failed: \(error)"))
        }
        return reply["return"] ?? .null
    }

    private func send(
        _ bytes: [UInt8], _ command: String, _ descriptor: Descriptor?, _ deadline: Deadline
    ) throws(QMPClientError) {
        do throws(SystemError) {
            try sending.withLock { _ throws(SystemError) in
                var rest = bytes[...]
                if let descriptor { rest = rest.dropFirst(try Socket.send(socket, bytes, passing: descriptor)) }
                try socket.writeAll(Array(rest), deadline: deadline)
            }
        } catch {
            // Half a message may be out: the connection is of no use any more.
            Socket.shutdown(socket)
            throw .disconnected("send \(command): \(error)")
        }
    }

    private func wait<Value>(
        _ what: String, _ deadline: Deadline, until found: (inout State) -> Value?
    ) throws(QMPClientError) -> Value {
        var value: Value?
        let ending: String? = state.wait(deadline: deadline) { state in
            value = found(&state)
            return value == nil ? state.end : ""
        }
        if let value { return value }
        if let ending { throw .disconnected("wait for \(what) of \(path): \(ending)") }
        throw .timedOut("wait for \(what) of \(path): nothing came in time")
    }

    // MARK: Events

    /// Waits for an event and takes it out of the queue, with earlier ones of its name.
    /// - Parameter matching: of the events with this name, the one whose data satisfies it.
    @discardableResult
    public func waitForEvent(
        _ name: String, deadline: Deadline, matching: (JSON) -> Bool = { _ in true }
    ) throws(QMPClientError) -> QMPEvent {
        try wait("the event \(name)", deadline) { state in
            guard let index = state.events.firstIndex(where: { $0.name == name && matching($0.data) }) else {
                return nil
            }
            let event = state.events[index]
            state.events = state.events[..<index].filter { $0.name != name } + state.events[(index + 1)...]
            return event
        }
    }

    /// Takes all events that have come and were not waited for.
    public func takeEvents() -> [QMPEvent] {
        state.withLock { state in
            defer { state.events = [] }
            return state.events
        }
    }

    // MARK: The reader thread

    /// What the reader thread holds on to; not the client, which ends it.
    private struct Link: Sendable {
        let socket: Descriptor
        let state: Monitor<State>
        let onEvent: (@Sendable (QMPEvent) -> Void)?

        func read() {
            var framer = MessageFramer(limitBytes: QMPClient.messageBytes)
            var reason = "the VM closed the connection"
            do {
                while true {
                    try socket.wait(for: .readable, deadline: .never, operation: "receive")
                    guard let bytes = try socket.read(upTo: 1 << 16) else { continue }
                    guard !bytes.isEmpty else { break }
                    for frame in framer.receive(bytes) { try take(frame) }
                }
            } catch {
                reason = "\(error)"
                Socket.shutdown(socket)
            }
            state.withLock { $0.end = $0.end ?? reason }
        }

        private func take(_ frame: MessageFramer.Frame) throws {
            guard case .message(let text) = frame, let message = try? JSON(parsing: text) else {
                throw JSONError("the VM sent something that is no QMP")
            }
            if let event = QMPEvent(message) {
                onEvent?(event)
                state.withLock { state in
                    if state.events.count == QMPClient.mostEvents { state.events.removeFirst() }
                    state.events.append(event)
                }
                return
            }
            state.withLock { state in
                if let greeting = message["QMP"] {
                    state.greeting = greeting
                } else if let id = message["id"]?.integerValue(as: Int64.self) {
                    if state.awaited.contains(id) { state.replies[id] = message }
                } else if let error = message["error"].flatMap(QMPError.init) {
                    // Without an id it is about the connection: a peer that may not connect, say.
                    state.end = error.description
                }
            }
        }
    }
}
