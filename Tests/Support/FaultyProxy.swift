import Host
import Synchronization

/// A TCP proxy between a source and its destination, which counts what passes and can strike at any byte of it.
///
/// Only the first connection meets the fault; what comes later passes.
public final class FaultyProxy: Sendable {
    /// When to strike, in bytes that have passed.
    public enum Point: Sendable, CustomStringConvertible {
        case never
        /// From the source.
        case forward(Int)
        /// From the destination.
        case backward(Int)
        /// From the source, after so much from the destination.
        case forwardAfter(backward: Int, forward: Int)

        public var description: String {
            switch self {
            case .never: "never"
            case .forward(let bytes): "after \(bytes) bytes to the destination"
            case .backward(let bytes): "after \(bytes) bytes to the source"
            case .forwardAfter(let backward, let forward):
                "\(forward) bytes to the destination after \(backward) to the source"
            }
        }
    }

    private enum Way { case forward, backward }

    private struct State {
        var forward = 0
        var backward = 0
        var forwardWhenAnswered: Int?
        var isStruck = false
        /// The strike's body has not returned yet.
        var isStriking = false
        var isHeld = false
        /// Connections that are held by themselves.
        var held: Set<Int> = []
        var isClosed = false
        /// Of each connection, by its number: the source's end and the destination's.
        var sockets: [Int: (source: Descriptor, destination: Descriptor)] = [:]
        var connections = 0
    }

    private let listener: Descriptor
    private let wake: EventDescriptor
    private let target: Mutex<String>
    private let point: Point
    private let state = Monitor(State())
    private let strike = Mutex<(@Sendable (FaultyProxy) -> Void)?>(nil)

    /// - Parameters:
    ///   - target: the destination's port on 127.0.0.1.
    ///   - strike: called once, on the thread that passes bytes: nothing passes in its direction meanwhile.
    public init(
        to target: String, at point: Point = .never, strike: @escaping @Sendable (FaultyProxy) -> Void = { _ in }
    ) throws {
        listener = try Socket.listen(host: "127.0.0.1", port: "0")
        wake = try EventDescriptor()
        self.target = Mutex(target)
        self.point = point
        self.strike.withLock { $0 = strike }
        try HostThread.detached(name: "proxy") { [self] in accept() }
    }

    /// What a source migrates to.
    public var uri: String { "tcp:127.0.0.1:\(Socket.localPort(of: listener) ?? 0)" }

    /// What connects from now on is led to that port of 127.0.0.1.
    public func redirect(to port: String) { target.withLock { $0 = port } }

    /// The numbers of the connections that were not cut, in the order in which they were made.
    public var connections: [Int] { state.withLock { $0.sockets.keys.sorted() } }

    /// Bytes that passed on all connections.
    public var passed: (forward: Int, backward: Int) { state.withLock { ($0.forward, $0.backward) } }

    /// Bytes from the source since the destination had said what `forwardAfter` waits for.
    public var passedSinceAnswer: Int {
        state.withLock { state in state.forward - (state.forwardWhenAnswered ?? state.forward) }
    }

    public var hasStruck: Bool { state.withLock { $0.isStruck } }

    /// Waits for the end of a strike that has begun: it may take its time, and what it strikes may be over meanwhile.
    public func waitForStrike() {
        _ = state.wait(deadline: .after(seconds: 10)) { $0.isStriking ? nil : () }
    }

    // MARK: What a strike can do

    /// Ends all connections at once.
    public func cut() {
        state.withLock { state in
            for pair in state.sockets.values {
                Socket.shutdown(pair.source)
                Socket.shutdown(pair.destination)
            }
            state.sockets = [:]
            state.isHeld = false
            state.held = []
        }
    }

    /// Ends one connection.
    public func cut(connection number: Int) {
        state.withLock { state in
            guard let pair = state.sockets.removeValue(forKey: number) else { return }
            Socket.shutdown(pair.source)
            Socket.shutdown(pair.destination)
            state.held.remove(number)
        }
    }

    /// Tells one side of one connection that the other says nothing more; the other hears nothing of it.
    public func halfClose(connection number: Int, towardsDestination: Bool) {
        let socket = state.withLock { state in
            let pair = state.sockets[number]
            return towardsDestination ? pair?.destination : pair?.source
        }
        if let socket { try? Socket.finishSending(socket) }
    }

    /// Nothing passes on one connection any more, until `release` or `cut`.
    public func hold(connection number: Int) { state.withLock { _ = $0.held.insert(number) } }

    /// Nothing passes any more, in neither direction, until `release` or `cut`.
    public func hold() { state.withLock { $0.isHeld = true } }

    public func release() {
        state.withLock { state in
            state.isHeld = false
            state.held = []
        }
    }

    /// Ends everything.
    public func close() {
        cut()
        state.withLock { $0.isClosed = true }
        wake.raise()
    }

    // MARK: Threads

    private func accept() {
        while let source = try? Socket.accept(listener, wake: wake) {
            guard
                let destination = try? Socket.connect(
                    host: "127.0.0.1", port: target.withLock({ $0 }), deadline: .after(seconds: 5))
            else {
                Socket.shutdown(source)
                continue
            }
            let number = state.withLock { state in
                state.sockets[state.connections] = (source, destination)
                state.connections += 1
                return state.connections - 1
            }
            do {
                try HostThread.detached(name: "proxy-forward") { [self] in
                    pass(.forward, from: source, to: destination, number)
                }
                try HostThread.detached(name: "proxy-back") { [self] in
                    pass(.backward, from: destination, to: source, number)
                }
            } catch { cut() }
            if state.withLock({ $0.isClosed }) { cut() }
        }
    }

    private func pass(_ way: Way, from: Descriptor, to: Descriptor, _ number: Int) {
        let watches = number == 0
        strikeIfDue(way, watches)
        while let bytes = try? from.read(upTo: 1 << 16), !bytes.isEmpty {
            var rest = bytes[...]
            while !rest.isEmpty {
                state.wait { $0.isHeld || $0.held.contains(number) ? nil : () }
                let room = watches ? bytesUntilStrike(way) : nil
                let piece = rest.prefix(max(0, room ?? .max))
                guard !piece.isEmpty, let count = try? to.write(piece) else {
                    guard piece.isEmpty else {
                        // Who is told that nobody listens any more hears it, as without us.
                        Socket.shutdown(from)
                        return
                    }
                    strikeIfDue(way, watches)
                    continue
                }
                rest = rest.dropFirst(count)
                account(way, count)
                strikeIfDue(way, watches)
            }
        }
        // One side said all: the other hears of it, and may still answer.
        try? Socket.finishSending(to)
    }

    private func account(_ way: Way, _ count: Int) {
        state.withLock { state in
            switch way {
            case .forward: state.forward += count
            case .backward: state.backward += count
            }
            if case .forwardAfter(let backward, _) = point, state.backward >= backward {
                state.forwardWhenAnswered = state.forwardWhenAnswered ?? state.forward
            }
        }
    }

    /// How much may pass before the point is reached; `nil`: it is not in this direction, or behind us.
    private func bytesUntilStrike(_ way: Way) -> Int? {
        state.withLock { state in
            guard !state.isStruck else { return nil }
            switch (point, way) {
            case (.forward(let bytes), .forward): return bytes - state.forward
            case (.backward(let bytes), .backward): return bytes - state.backward
            case (.forwardAfter(_, let bytes), .forward):
                return state.forwardWhenAnswered.map { $0 + bytes - state.forward }
            default: return nil
            }
        }
    }

    private func strikeIfDue(_ way: Way, _ watches: Bool) {
        guard watches, let left = bytesUntilStrike(way), left <= 0 else { return }
        strikeNow()
    }

    /// Strikes, if nothing has struck yet.
    public func strikeNow() {
        let isFirst = state.withLock { state in
            defer { state.isStruck = true }
            state.isStriking = state.isStriking || !state.isStruck
            return !state.isStruck
        }
        guard isFirst else { return }
        strike.withLock { strike in
            defer { strike = nil }
            return strike
        }?(self)
        state.withLock { $0.isStriking = false }
    }
}
