import Accelerator

/// The exit loop of one vCPU: wait for the gate, run the guest, answer it, look for requests, again.
final class VirtualCPUThread: Sendable {
    private let cpu: any VirtualCPU
    private let board: Board
    private let gate: RunGate
    private let ending: @Sendable (ExitReason) -> Void
    private let ended: @Sendable (ExitReason) -> Void

    /// - Parameters:
    ///   - ending: told before the vCPU leaves the gate, so that whoever stops the machine just now knows of it. Must not wait.
    ///   - ended: told behind it.
    init(
        cpu: any VirtualCPU, board: Board, gate: RunGate, ending: @escaping @Sendable (ExitReason) -> Void,
        ended: @escaping @Sendable (ExitReason) -> Void
    ) {
        self.cpu = cpu
        self.board = board
        self.gate = gate
        self.ending = ending
        self.ended = ended
    }

    func run() {
        while true {
            let closings = gate.enter()
            let found = runUntilStopped()
            let reason = gate.isRetired ? nil : found
            // The answer to the last access must be in the registers before anybody saves them.
            cpu.completePendingAccess(board)
            if let reason { ending(reason) }
            gate.leave()
            if let reason {
                ended(reason)
                // What ends a vCPU stops the machine: wait until that has closed the gate.
                gate.waitUntilClosed(since: closings)
            }
        }
    }

    /// - Returns: `nil` when asked to stop, else what the machine must deal with.
    private func runUntilStopped() -> ExitReason? {
        while true {
            cpu.clearKick()
            if gate.mustStop { return nil }
            switch cpu.run(board) {
            case .handled, .interrupted: continue
            case .halted: continue
            case let reason: return reason
            }
        }
    }
}
