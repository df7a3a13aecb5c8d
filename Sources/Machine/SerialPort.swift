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
    }

    private let state = Mutex(State())
    private let wake: EventDescriptor
    private let listener: Descriptor?
    private let input: Descriptor?
    private let socketPath: String?

    /// - Throws: `SystemError` naming the path that cannot be opened or listened on.
    public init(_ target: Target) throws(SystemError) {
        wake = try EventDescriptor()
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
        let mustWake = state.withLock { state -> Bool in
            guard let output = state.output else { return false }
            if state.backlog.isEmpty {
                // A reader that has gone shows up in `serve`.
                if let written = try? output.writeWithoutBlocking([byte]), written == 1 { return false }
            }
            if state.backlog.count < Self.backlogLimit { state.backlog.append(byte) }
            return true
        }
        if mustWake { wake.raise() }
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
