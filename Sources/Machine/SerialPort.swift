public import Host
import Synchronization

/// The host's end of the guest's serial line: nothing, this process's terminal, a file, or a unix socket that listens.
///
/// The guest never waits for it: what nobody takes is kept up to a limit, and then dropped.
public final class SerialPort: Sendable {
    public enum Target: Sendable, Equatable {
        case none
        /// Standard output, and standard input where it is a terminal or a pipe.
        case standard
        case file(String)
        /// Listens on a path; one client at a time, the newest wins.
        case unix(String)
    }

    /// What waits for a slow or absent reader, in bytes.
    public static let backlogLimit = 64 << 10

    private struct State {
        var output: Descriptor?
        var backlog: [UInt8] = []
        /// From outside, refused by the UART until it has room.
        var pendingInput: [UInt8] = []
        var receive: (@Sendable (ArraySlice<UInt8>) -> Int)?
        /// What the guest said and nobody may hear yet; `nil`: all may be heard.
        var held: HeldOutput?
    }

    private let state = Mutex(State())
    private let wake: EventDescriptor
    private let listener: Descriptor?
    private let input: Descriptor?
    private let socketPath: String?
    /// Whether somebody outside may hear what the guest says.
    private let serves: Bool

    /// - Throws: `SystemError` naming the path that cannot be opened or listened on.
    public init(_ target: Target) throws(SystemError) {
        wake = try EventDescriptor()
        serves = target != .none
        switch target {
        case .none: (listener, input, socketPath) = (nil, nil, nil)
        case .standard:
            let output = try Descriptor.standard(1, name: "standard output")
            input = try Descriptor.standard(0, name: "standard input")
            state.withLock { $0.output = output }
            (listener, socketPath) = (nil, nil)
        case .file(let path):
            let file = try Descriptor.create(path)
            state.withLock { $0.output = file }
            (listener, input, socketPath) = (nil, nil, nil)
        case .unix(let path):
            listener = try Socket.listen(unix: path)
            (input, socketPath) = (nil, path)
        }
        guard target != .none else { return }
        _ = try HostThread(name: "serial") { [self] in serve() }
    }

    /// Removes the socket this port listened on.
    public func close() {
        if let socketPath { Descriptor.remove(socketPath) }
    }

    /// Who takes what comes from outside; returns how many bytes it took.
    func connect(_ receive: @escaping @Sendable (ArraySlice<UInt8>) -> Int) {
        state.withLock { $0.receive = receive }
    }

    /// The UART has room again.
    func receiveRoom() { wake.raise() }

    /// One byte from the guest. Never blocks.
    func transmit(_ byte: UInt8) {
        var tooMuch: (@Sendable () -> Void)?
        let mustWake = state.withLock { state -> Bool in
            if state.held != nil {
                tooMuch = state.held?.append(byte)
                return false
            }
            guard let output = state.output else { return false }
            if state.backlog.isEmpty {
                // A reader that has gone shows up in `serve`.
                if let written = try? output.writeWithoutBlocking([byte]), written == 1 { return false }
            }
            if state.backlog.count < Self.backlogLimit { state.backlog.append(byte) }
            return true
        }
        if mustWake { wake.raise() }
        tooMuch?()
    }

    // MARK: Output that is held back

    /// From here on nothing the guest says is heard before it is released.
    /// - Parameter tooMuch: called on the vCPU's thread for each byte beyond ``HeldOutput/limit``: the guest is to be stopped for a moment.
    func holdOutput(tooMuch: @escaping @Sendable () -> Void) {
        guard serves else { return }
        state.withLock { $0.held = HeldOutput(tooMuch: tooMuch) }
    }

    /// What was said up to here belongs to that epoch.
    func cutOutput(epoch: UInt64) { state.withLock { $0.held?.cut(epoch) } }

    /// What was said in the epochs up to that one is heard.
    func releaseOutput(upTo epoch: UInt64) {
        let mustWake = state.withLock { Self.say($0.held?.take(upTo: epoch) ?? [], &$0) }
        if mustWake { wake.raise() }
    }

    /// All that was said is heard, and will be at once.
    func endHolding() {
        let mustWake = state.withLock { state in
            defer { state.held = nil }
            return Self.say(state.held?.bytes ?? [], &state)
        }
        if mustWake { wake.raise() }
    }

    /// Not cut off at the limit of what waits: it came at once because it was held back.
    private static func say(_ bytes: [UInt8], _ state: inout State) -> Bool {
        guard !bytes.isEmpty, state.output != nil else { return false }
        if state.backlog.count < backlogLimit { state.backlog += bytes }
        return true
    }

    // MARK: The serial thread

    private func serve() {
        var reader = input
        while true {
            let (output, hasBacklog, hasInput) = state.withLock {
                ($0.output, !$0.backlog.isEmpty, !$0.pendingInput.isEmpty)
            }
            var wanted: [(Descriptor, Readiness)] = [(wake.descriptor, .readable)]
            if let listener { wanted.append((listener, .readable)) }
            let source = hasInput ? nil : listener == nil ? reader : output
            if let source { wanted.append((source, .readable)) }
            if hasBacklog, let output { wanted.append((output, .writable)) }
            guard let ready = try? poll(wanted) else { return }
            wake.clear()
            for (entry, readiness) in zip(wanted, ready) where !readiness.isEmpty {
                if entry.0 === listener {
                    accept()
                } else if entry.1 == .writable {
                    flush()
                } else if entry.0 === source {
                    if !receive(from: entry.0) {
                        if listener == nil { reader = nil } else { drop(entry.0) }
                    }
                }
            }
            if hasInput { feed([]) }
        }
    }

    private func accept() {
        guard let listener, let client = try? Socket.accept(listener, deadline: Deadline(at: 0)) else { return }
        try? client.setNonBlocking(true)
        state.withLock { state in
            state.output = client
            state.backlog = []
        }
    }

    private func drop(_ client: Descriptor) {
        state.withLock { state in
            guard state.output === client else { return }
            state.output = nil
            state.backlog = []
        }
    }

    private func flush() {
        state.withLock { state in
            guard let output = state.output else { return }
            guard let written = try? output.writeWithoutBlocking(state.backlog[...]) else {
                state.backlog = []
                return
            }
            state.backlog.removeFirst(written)
        }
    }

    /// - Returns: false at the end of the input.
    private func receive(from source: Descriptor) -> Bool {
        guard let bytes = try? source.read(upTo: 256) else { return true }
        guard !bytes.isEmpty else { return false }
        feed(bytes)
        return true
    }

    private func feed(_ bytes: [UInt8]) {
        let (all, receive) = state.withLock { state in
            let all = state.pendingInput + bytes
            state.pendingInput = []
            return (all, state.receive)
        }
        let taken = receive?(all[...]) ?? all.count
        if taken < all.count { state.withLock { $0.pendingInput = Array(all[taken...]) + $0.pendingInput } }
    }
}

/// What a guest said that may still be taken back, in the order in which it was said.
struct HeldOutput {
    private(set) var bytes: [UInt8] = []
    /// So many of them belong to the epochs up to that one.
    private var cuts: [(epoch: UInt64, end: Int)] = []
    private let tooMuch: @Sendable () -> Void

    /// Bytes of an epoch that is not over, from which on the guest is stopped.
    static let limit = 64 << 10

    init(tooMuch: @escaping @Sendable () -> Void) { self.tooMuch = tooMuch }

    /// - Returns: whom to tell that it is too much.
    mutating func append(_ byte: UInt8) -> (@Sendable () -> Void)? {
        bytes.append(byte)
        return bytes.count - (cuts.last?.end ?? 0) >= Self.limit ? tooMuch : nil
    }

    mutating func cut(_ epoch: UInt64) { cuts.append((epoch, bytes.count)) }

    mutating func take(upTo epoch: UInt64) -> [UInt8] {
        guard let end = cuts.last(where: { $0.epoch <= epoch })?.end else { return [] }
        let taken = Array(bytes[..<end])
        bytes.removeFirst(end)
        cuts = cuts.filter { $0.epoch > epoch }.map { ($0.epoch, $0.end - end) }
        return taken
    }
}
