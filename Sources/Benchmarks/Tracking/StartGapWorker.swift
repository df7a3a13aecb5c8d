import Accelerator
import CommandLineKit
import GuestMemory
import GuestPrograms
import Host
import Machine
import QMP

/// Finds the longest time for which a guest stands still when tracking starts.
///
/// The guest's own clock measures it: it looks at its time stamp counter between batches of writes, far more often than it sends the
/// heartbeats of 1 ms, and keeps the longest gap between two looks. We set that word of its memory to zero before each stretch.
enum StartGapWorker: BenchmarkWorker {
    static let name = "start-gap"

    /// The word `C_GAP` of the first vCPU's page (Guests/layout.inc).
    private static let gapOffset = 0x10000 + 0x40

    /// - Parameter arguments: as `TrackedGuest` has them, `rounds`: how often tracking starts and stops again, and
    ///   `stretch-ms`: how long the guest is watched before and after.
    static func measure(_ arguments: JSON) throws -> JSON {
        let guest = try TrackedGuest(arguments)
        try guest.start()
        guard let memory = guest.machine.memory.blocks.first?.mapping else { throw CommandFailure("no memory") }
        let kilohertz = Double(try guest.machine.guestStatus().tscKilohertz)
        let stretch = arguments["stretch-ms"]?.integerValue(as: UInt64.self) ?? 500
        func longestGap(_ body: () throws -> Void) throws -> JSON {
            memory.store(UInt64(0), at: gapOffset)
            let end = Deadline.after(milliseconds: stretch)
            try body()
            Clock.sleep(nanoseconds: end.remainingNanoseconds ?? 0)
            return .double(Double(memory.load(at: gapOffset, as: UInt64.self)) / kilohertz)
        }
        var before: [JSON] = []
        var gaps: [JSON] = []
        var starts: [JSON] = []
        for _ in 0..<(arguments["rounds"]?.integerValue() ?? 3) {
            before.append(try longestGap {})
            let records = try guest.tracker.makePages()
            let gap = try longestGap {
                let start = Clock.monotonicNanoseconds
                try guest.tracker.start()
                try guest.tracker.collect(into: records)
                starts.append(.double(Double(Clock.monotonicNanoseconds - start) / 1e6))
            }
            gaps.append(gap)
            guest.tracker.stop()
        }
        guest.machine.pause()
        let check = try guest.machine.checkGuest()
        return [
            "before-ms": .array(before), "gap-ms": .array(gaps), "start-ms": .array(starts),
            "verified": .bool(check.isVerified), "method": .string(guest.tracker.method),
        ]
    }
}
