import Host

/// What one client is still to receive: bounded, sent in order, never blocking those who append.
///
/// A message goes out at once if the socket takes it; the rest is the writer thread's. A client that takes nothing for
/// `stallLimitNanoseconds`, or lets more than `limitBytes` pile up, is cut off.
final class OutputQueue: Sendable {
    private struct State {
        var pending: [ArraySlice<UInt8>] = []
        var byteCount = 0
        var receivesEvents = false
        /// Nothing more is appended; what is pending still goes out.
        var isFinished = false
        /// The client is cut off.
        var isBroken = false

        var isEmpty: Bool { pending.isEmpty || isBroken }
    }

    private let socket: Descriptor
    private let limitBytes: Int
    private let stallLimitNanoseconds: UInt64
    private let state = Monitor(State())

    /// - Parameter socket: in non-blocking mode.
    init(socket: Descriptor, limitBytes: Int, stallLimitNanoseconds: UInt64) {
        self.socket = socket
        self.limitBytes = limitBytes
        self.stallLimitNanoseconds = stallLimitNanoseconds
    }

    /// Appends a reply; from then on events go out too if `startsEvents`.
    func append(_ message: JSON, startsEvents: Bool = false) {
        let bytes = Self.line(message)
        state.withLock { state in
            append(bytes, &state)
            if startsEvents { state.receivesEvents = true }
        }
    }

    /// Appends an event's line, if the client has negotiated.
    func appendEvent(line: [UInt8]) {
        state.withLock { if $0.receivesEvents { append(line, &$0) } }
    }

    static func line(_ message: JSON) -> [UInt8] { message.encoded() + [0x0D, 0x0A] }

    private func append(_ bytes: [UInt8], _ state: inout State) {
        guard !state.isFinished, !state.isBroken else { return }
        state.pending.append(bytes[...])
        state.byteCount += bytes.count
        if state.pending.count == 1 { send(&state) }
        if state.byteCount > limitBytes { cutOff(&state) }
    }

    /// Sends what the socket takes now.
    private func send(_ state: inout State) {
        do throws(SystemError) {
            while let head = state.pending.first, let count = try socket.write(head) {
                state.byteCount -= count
                if count == head.count {
                    state.pending.removeFirst()
                } else {
                    state.pending[0] = head.dropFirst(count)
                }
            }
        } catch {
            cutOff(&state)
        }
    }

    private func cutOff(_ state: inout State) {
        state.isBroken = true
        state.pending = []
        Socket.shutdown(socket)
    }

    /// After this nothing is appended; `run` ends when the rest is out.
    func finish() { state.withLock { $0.isFinished = true } }

    /// Drops what is pending and ends the connection.
    func cutOff() { state.withLock { cutOff(&$0) } }

    /// Waits until everything is with the kernel or the client is cut off.
    func waitUntilSent(deadline: Deadline) { state.wait(deadline: deadline) { $0.isEmpty ? true : nil } }

    /// The writer thread: sends what could not be sent at once.
    func run() {
        while state.wait(until: { $0.isEmpty ? ($0.isFinished || $0.isBroken ? false : nil) : true }) == true {
            do throws(SystemError) {
                try socket.wait(for: .writable, deadline: .after(nanoseconds: stallLimitNanoseconds), operation: "send")
                state.withLock { send(&$0) }
            } catch {
                cutOff()
            }
        }
    }
}
