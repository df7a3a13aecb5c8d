import Host
import QMP
import TestSupport

/// Looks at both processes of a migration until it is over, above all at whether both run the guest.
final class Watch {
    let source: VM
    let destination: VM
    private(set) var sourceLives = true
    private(set) var destinationLives = true
    private(set) var sourceRuns = false
    private(set) var destinationRuns = false
    /// Of the migration, in `query-migrate`.
    private(set) var sourceStatus = ""
    private var destinationStatus = ""

    private static let over = ["completed", "failed", "cancelled", "x-unsettled"]
    private static let underWay = ["setup", "active", "device"]

    init(source: VM, destination: VM) {
        self.source = source
        self.destination = destination
    }

    /// - Returns: violations.
    func untilOver() -> [String] {
        let deadline = Deadline.after(seconds: 20)
        while true {
            if look() { return ["both sides run the guest"] }
            if isOver {
                // One look more: what has just ended may show a last state now.
                return look() ? ["both sides run the guest"] : []
            }
            guard !deadline.hasPassed else {
                return [
                    "the migration does not end: '\(sourceStatus)' at the source, '\(destinationStatus)' at the destination: "
                        + "\(source.log)\n\(destination.log)"
                ]
            }
            Clock.sleep(nanoseconds: 1_000_000)
        }
    }

    private var isOver: Bool {
        let sourceIsOver = !sourceLives || Self.over.contains(sourceStatus)
        return sourceIsOver && (!destinationLives || !Self.underWay.contains(destinationStatus))
    }

    /// - Returns: whether both run. The destination is asked first: a guest that has left never comes back to its source.
    private func look() -> Bool {
        destinationRuns = runs(destination)
        sourceRuns = runs(source)
        destinationStatus = status(destination, &destinationLives)
        sourceStatus = status(source, &sourceLives)
        return destinationRuns && sourceRuns
    }

    private func runs(_ vm: VM) -> Bool { (try? vm.client.execute("query-status"))?["running"] == true }

    private func status(_ vm: VM, _ lives: inout Bool) -> String {
        lives = vm.process.poll() == nil
        guard lives else { return "" }
        if let status = try? vm.migrationStatus() { return status }
        // A killed process loses its sockets before its parent can see its end.
        lives = vm.process.wait(deadline: .after(seconds: 2)) == nil
        return ""
    }
}
