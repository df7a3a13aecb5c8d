public import Host
import Synchronization

/// The monitor of a VM: listens on unix sockets, takes commands of any number of clients, tells them events.
///
/// Each client has three threads: `qmp-N` reads, checks and runs out-of-band commands; `qmp-N-run` runs in-band commands
/// in the order they came; `qmp-N-out` sends what the socket did not take at once. So a slow command holds up its own
/// client only, out-of-band commands overtake it, and a client that does not read is cut off without anybody waiting.
/// Replies and events of a client go through one queue: what happened first is sent first.
public final class QMPServer: Sendable {
    private struct State {
        var clients: [ClientConnection] = []
        var nextNumber = 0
        var isStopping = false
    }

    public let sockets: [ControlSocket]
    private let table: CommandTable
    private let policy: PeerPolicy
    private let limits: ClientConnection.Limits
    private let wake: EventDescriptor
    private let state = Mutex(State())
    private let acceptors = Mutex<[HostThread]>([])

    /// More clients than this are turned away with a sentence.
    static let mostClients = 64

    /// Serves at once. - Throws: `SystemError` if a thread cannot be started.
    public convenience init(sockets: [ControlSocket], table: CommandTable) throws(SystemError) {
        try self.init(sockets: sockets, table: table, policy: PeerPolicy(), limits: .init())
    }

    init(
        sockets: [ControlSocket], table: CommandTable, policy: PeerPolicy = PeerPolicy(),
        limits: ClientConnection.Limits = .init()
    ) throws(SystemError) {
        self.sockets = sockets
        self.table = table
        self.policy = policy
        self.limits = limits
        wake = try EventDescriptor()
        // A client that closes is an error of write(2), never a signal.
        Descriptor.ignoreBrokenPipes()
        for socket in sockets {
            let thread = try HostThread(name: "qmp-accept") { [self] in accept(on: socket.listener) }
            acceptors.withLock { $0.append(thread) }
        }
    }

    /// Tells an event to every client that has negotiated. Never blocks.
    public func post(_ name: String, data: JSON = [:]) {
        state.withLock { state in
            // Under the lock, so that all clients see one order, and the timestamps follow it.
            let line = OutputQueue.line(QMPEvent(name, data: data).json)
            for client in state.clients { client.post(eventLine: line) }
        }
    }

    /// Stops listening and removes the sockets, lets running commands finish and their replies out, then ends all
    /// connections. Not to be called from a command's handler, which would wait for itself.
    /// - Parameter deadline: for clients and commands that take long; they are left behind.
    public func stop(deadline: Deadline = .after(seconds: 2)) {
        let isFirst = state.withLock { state in
            defer { state.isStopping = true }
            return !state.isStopping
        }
        guard isFirst else { return }
        sockets.forEach { $0.remove() }
        wake.raise()
        acceptors.withLock { $0 }.forEach { $0.join() }
        let clients = state.withLock { $0.clients }
        clients.forEach { $0.drain(deadline: deadline) }
        clients.forEach { $0.end(deadline: max(deadline, .after(milliseconds: 100))) }
        state.withLock { $0.clients = [] }
    }

    // MARK: Accepting

    private func accept(on listener: Descriptor) {
        while true {
            do throws(SystemError) {
                guard let socket = try Socket.accept(listener, wake: wake) else { return }
                try admit(socket)
            } catch {
                // Out of descriptors or threads: the client is gone, later ones may fare better.
                Clock.sleep(nanoseconds: 10_000_000)
            }
        }
    }

    private func admit(_ socket: Descriptor) throws(SystemError) {
        if let refusal = policy.refusal(ofUserID: try Socket.peerUserID(socket)) {
            return turnAway(socket, refusal)
        }
        let (over, number) = state.withLock { state in
            let over = state.clients.filter(\.isOver)
            state.clients.removeAll(where: \.isOver)
            defer { state.nextNumber += 1 }
            return (over, state.clients.count < Self.mostClients ? state.nextNumber : nil)
        }
        over.forEach { $0.end(deadline: .after(seconds: 1)) }
        guard let number else {
            return turnAway(socket, "The VM already has \(Self.mostClients) QMP clients; close one")
        }
        let client = try ClientConnection(number: number, socket: socket, table: table, limits: limits)
        // Listed first: a client that has negotiated misses no event. One that cannot start is over at once.
        state.withLock { $0.clients.append(client) }
        try client.start()
    }

    private func turnAway(_ socket: Descriptor, _ sentence: String) {
        let reply = QMPSession.reply(.failure(QMPError(sentence)), id: nil)
        try? socket.setNonBlocking(true)
        _ = try? socket.write(OutputQueue.line(reply)[...])
    }
}

/// Who may command a VM: the user it runs as, and root.
struct PeerPolicy: Sendable {
    var ownerUserID = Account.effectiveUserID
    var admitsRoot = true

    /// The sentence for a peer that may not; `nil` for one that may.
    func refusal(ofUserID user: UInt32) -> String? {
        if user == ownerUserID || (admitsRoot && user == 0) { return nil }
        return "User \(user) may not command this VM: it belongs to user \(ownerUserID)"
    }
}
