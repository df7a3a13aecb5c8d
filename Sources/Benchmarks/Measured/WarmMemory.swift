import CommandLineKit
import Host
import Synchronization

/// Memory of this host that somebody has just used, for VMs that are about to take it.
///
/// Where the host is a VM itself, memory that stays free for some seconds goes back to its own host, and the next first touch costs fifty
/// times as much: a destination looks slow then, and measures the outer host. So as much as the VMs will take is held here, touched, and
/// let go piece by piece just ahead of their growth. On other hosts that changes nothing.
final class WarmMemory: Sendable {
    private struct State {
        var pieces: [Mapping] = []
        var processes: [Int32] = []
        /// Bytes let go, and what the processes had taken when counting began.
        var released: UInt64 = 0
        var base: UInt64 = 0
        var isOver = false
    }

    private let state = Monitor(State())
    private let thread = Mutex<HostThread?>(nil)
    private let byteCount: UInt64

    private static let pieceBytes = 32 << 20
    /// So much is free ahead of the growth; more would be cold before it is taken.
    private static let leadBytes: UInt64 = 192 << 20
    private static let lookNanoseconds: UInt64 = 2_000_000

    /// - Parameter byteCount: what the VMs take.
    init(byteCount: UInt64) throws {
        self.byteCount = byteCount
        let thread = try HostThread(name: "warm-memory") { [self] in run() }
        self.thread.withLock { $0 = thread }
    }

    /// Takes what was let go; soon after VMs have ended, or it takes long. - Throws: `CommandFailure` once the user has asked for the end.
    func refill(_ options: BenchmarkOptions) throws {
        state.withLock { $0.processes = [] }
        let missing = (Int(byteCount) - state.withLock { $0.pieces.count } * Self.pieceBytes) / Self.pieceBytes
        for _ in 0..<max(0, missing) {
            try options.checkInterruption()
            // What other processes need is not taken from them.
            guard HostMemory.availableByteCount > Self.leadBytes * 4 else { return }
            let piece = try Mapping(anonymousByteCount: Self.pieceBytes)
            try? piece.advise(.hugePages)
            try piece.advise(.populate, at: 0, count: Self.pieceBytes)
            state.withLock { $0.pieces.append(piece) }
        }
    }

    /// From now on lets go what these processes take, and a little more.
    func follow(_ processes: [Int32]) {
        let taken = Self.residentBytes(of: processes)
        state.withLock { state in
            (state.processes, state.base, state.released) = (processes, taken, 0)
        }
    }

    func end() {
        state.withLock { $0.isOver = true }
        thread.withLock { $0.take() }?.join()
    }

    private func run() {
        while true {
            let processes =
                state.wait { state -> [Int32]? in
                    if state.isOver { return [] }
                    return state.processes.isEmpty || state.pieces.isEmpty ? nil : state.processes
                } ?? []
            guard !processes.isEmpty else { return state.withLock { $0.pieces = [] } }
            let taken = Self.residentBytes(of: processes)
            // Unmapping takes time: not under the lock.
            let gone = state.withLock { state -> [Mapping] in
                let wanted = taken - min(taken, state.base) + Self.leadBytes
                guard wanted > state.released, state.processes == processes else { return [] }
                let count = Int((wanted - state.released) / UInt64(Self.pieceBytes))
                let gone = Array(state.pieces.suffix(count))
                state.pieces.removeLast(gone.count)
                state.released += UInt64(gone.count * Self.pieceBytes)
                return gone
            }
            withExtendedLifetime(gone) {}
            Clock.sleep(nanoseconds: Self.lookNanoseconds)
        }
    }

    private static func residentBytes(of processes: [Int32]) -> UInt64 {
        processes.reduce(0) { $0 + ProcessMemory.residentBytes(of: $1) }
    }
}

/// What a process has of this host's memory.
enum ProcessMemory {
    /// Physical memory of its own, page tables left out; 0 for a process that is not there.
    static func residentBytes(of process: Int32) -> UInt64 {
        let bytes = (try? Descriptor.contents(of: "/proc/\(process)/statm", limit: 4096)) ?? []
        let fields = String(decoding: bytes, as: UTF8.self).split(separator: " ")
        return fields.count > 1 ? (UInt64(fields[1]) ?? 0) << 12 : 0
    }
}
