import Accelerator
import GuestMemory
import GuestPrograms
import Host
import Machine
import QMP

/// Times the last collection of a migration, for which the guest stands still: each time every page of its working set is dirty, and
/// no other, however much memory there is around it.
enum CollectWorker: BenchmarkWorker {
    static let name = "collect"

    /// - Parameter arguments: as `TrackedGuest` has them, and `samples`.
    static func measure(_ arguments: JSON) throws -> JSON {
        let guest = try TrackedGuest(arguments)
        try guest.start()
        guest.machine.pause()
        let records = try guest.tracker.makePages()
        try guest.tracker.start()
        defer { guest.tracker.stop() }
        try guest.tracker.collect(into: records)
        try guest.send(records)
        var nanoseconds: [JSON] = []
        var pages: [JSON] = []
        // The first one meets memory that nobody has touched yet.
        for sample in 0...(arguments["samples"]?.integerValue() ?? 21) {
            try guest.runTwoPasses()
            let start = Clock.monotonicNanoseconds
            try guest.tracker.collect(into: records)
            let end = Clock.monotonicNanoseconds
            if sample > 0 {
                nanoseconds.append(JSON(end - start))
                pages.append(JSON(records.reduce(0) { $0 + $1.count }))
            }
            try guest.send(records)
        }
        let check = try guest.machine.checkGuest()
        return [
            "nanoseconds": .array(nanoseconds), "pages": .array(pages), "verified": .bool(check.isVerified),
            "method": .string(guest.tracker.method),
        ]
    }
}
